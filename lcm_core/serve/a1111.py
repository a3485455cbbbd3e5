"""A1111's form: `/sdapi/v1/` with txt2img, img2img, progress, interrupt, samplers, sd-models, loras and options."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from typing import Any

from lcm_core.pipeline.image import SAMPLER_NAMES, parameters_text
from lcm_core.serve.fields import Fields, RequestError, decode_picture
from lcm_core.serve.painter import Painted, PictureRequest
from lcm_core.serve.service import Service, read_options, read_seed

_LORA = re.compile(r"<lora:([^:>]+)(?::([-+]?\d*\.?\d+))?>")
_MOST_LORAS = 8
_USUAL_STRENGTH = 0.75  # of A1111's img2img
_WITHOUT_EFFECT = (  # what clients send with every request, and what changes no picture here
    *("send_images", "save_images", "do_not_save_samples", "do_not_save_grid", "denoising_strength"),
    "override_settings_restore_afterwards",
)


async def txt2img(service: Service, fields: Fields) -> dict[str, Any]:
    """`POST /sdapi/v1/txt2img`."""
    return await _paint(service, fields, with_image=False)


async def img2img(service: Service, fields: Fields) -> dict[str, Any]:
    """`POST /sdapi/v1/img2img`."""
    return await _paint(service, fields, with_image=True)


async def _paint(service: Service, fields: Fields, with_image: bool) -> dict[str, Any]:
    request = await asyncio.to_thread(_read, service, fields, with_image)
    ignored = fields.unread(_WITHOUT_EFFECT)
    painted = await service.paint(request)
    return {
        "images": [base64.b64encode(picture.png).decode() for picture in painted],
        "parameters": {"prompt": request.prompt, "seed": request.seed},
        "info": json.dumps(_info(painted, request, ignored)),
    }


def _info(painted: list[Painted], request: PictureRequest, ignored: list[str]) -> dict[str, Any]:
    """What clients read of the pictures; `ignored` names the fields that asked for what is not done here."""
    seeds = [picture.settings["seed"] for picture in painted]
    return {
        "prompt": request.prompt,
        "seed": request.seed,
        "all_seeds": seeds,
        "all_prompts": [request.prompt] * len(painted),
        "infotexts": [parameters_text(picture.settings) for picture in painted],
        "sd_model_name": request.model,
        "ignored": ignored,
    }


def _read(service: Service, fields: Fields, with_image: bool) -> PictureRequest:
    options = read_options(fields, guidance="cfg_scale")
    options["sampler"] = _sampler(fields)
    prompt, loras = _split_loras(fields.text("prompt"))
    model = fields.inner("override_settings").text("sd_model_checkpoint") or service.shelf.usual
    service.shelf.check(model, loras)
    image = mask = None
    if with_image:
        image, mask = _input_picture(fields), fields.picture("mask")
        options["strength"] = fields.number("denoising_strength", 0.01, 1.0, default=_USUAL_STRENGTH)
    return PictureRequest(model, prompt, read_seed(fields), _count(fields), loras, options, image, mask)


def _sampler(fields: Fields) -> str | None:
    """The sampler of that name; of another name, which clients send unasked, the model's own, and `info` says so."""
    names = {name.lower(): key for key, name in SAMPLER_NAMES.items()}
    wanted = fields.text("sampler_name") or fields.text("sampler_index")
    found = names.get(wanted.lower())
    if wanted and found is None:
        fields.mark_unread("sampler_name")
    return found


def _split_loras(prompt: str) -> tuple[str, list[tuple[str, float]]]:
    """`a cat <lora:style:0.8>` to the words and the LoRAs."""
    loras = [(name, float(strength or 1)) for name, strength in _LORA.findall(prompt)]
    if len(loras) > _MOST_LORAS:
        raise RequestError(f"prompt asks for {len(loras)} LoRAs; use up to {_MOST_LORAS}")
    return (_LORA.sub("", prompt).strip(), loras) if loras else (prompt, [])


def _count(fields: Fields) -> int:
    most = fields.limits.pictures
    size, batches = fields.whole("batch_size", 1, most) or 1, fields.whole("n_iter", 1, most) or 1
    if size * batches > most:
        raise RequestError(f"batch_size {size} times n_iter {batches} is more than {most} pictures; ask for fewer")
    return size * batches


def _input_picture(fields: Fields) -> Any:
    pictures = fields.get("init_images")
    if not isinstance(pictures, list) or len(pictures) != 1:
        raise RequestError("init_images must be a list of one picture in base64")
    return decode_picture("init_images[0]", pictures[0], fields.limits)


def progress(service: Service) -> dict[str, Any]:
    """`GET /sdapi/v1/progress`."""
    job = service.painter.running
    done, steps = (job.steps_done, job.steps) if job else (0, 0)
    state = {
        "job": "painting" if job else "",
        "job_count": service.painter.count,
        "job_no": 0,
        "sampling_step": done,
        "sampling_steps": steps,
        "interrupted": bool(job and job.stopped.is_set()),
        "skipped": False,
    }
    share = done / steps if steps else 0.0
    return {"progress": share, "eta_relative": 0.0, "state": state, "current_image": None, "textinfo": None}


async def interrupt(service: Service, fields: Fields) -> dict[str, Any]:
    """`POST /sdapi/v1/interrupt`: the request that is being painted ends with the pictures that are finished."""
    service.painter.interrupt()
    return {}


def samplers(service: Service) -> list[dict[str, Any]]:
    """`GET /sdapi/v1/samplers`."""
    return [{"name": name, "aliases": [key], "options": {}} for key, name in SAMPLER_NAMES.items()]


def sd_models(service: Service) -> list[dict[str, Any]]:
    """`GET /sdapi/v1/sd-models`."""
    rest = {"hash": None, "sha256": None, "config": None}
    return [{"title": name, "model_name": name, "filename": name, **rest} for name in service.shelf.models]


def loras(service: Service) -> list[dict[str, Any]]:
    """`GET /sdapi/v1/loras`: those for the model of requests that name none."""
    names = service.shelf.lora_names(service.shelf.usual)
    return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in names]


def options(service: Service) -> dict[str, Any]:
    """`GET /sdapi/v1/options`."""
    return {"sd_model_checkpoint": service.shelf.usual}


async def set_options(service: Service, fields: Fields) -> dict[str, Any]:
    """`POST /sdapi/v1/options`: the model of requests that name none."""
    model = fields.text("sd_model_checkpoint")
    if others := fields.unread():
        raise RequestError(f"option {others[0][:60]!r} is unknown; only sd_model_checkpoint can be set")
    if model:
        service.shelf.check(model, [])
        service.shelf.usual = model
    return {}

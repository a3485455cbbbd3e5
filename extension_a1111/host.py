"""Where AUTOMATIC1111's versions, Forge, Forge Neo and reForge differ: every such question is answered here.

A host is asked for what it has and never for its name: forks mix the parts of their parents.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

from modules import sd_models, sd_samplers, sd_samplers_common, shared
from torch import nn

from extension_a1111.architecture import FLOW, check_network, prediction_of
from extension_a1111.denoising import PositiveRows
from extension_a1111.schedules import flow_of_levels, get_sigmas_host
from extension_a1111.translation import Mistake, Say, explain, speaker
from lcm_core.diffusion.process import Process, VariancePreserving, abar_from_sigma

try:  # 1.9 split schedules from samplers
    from modules import sd_schedulers
except ImportError:
    sd_schedulers = None

AUTOMATIC = "Automatic"
# The noise of every step is drawn from seeds that "Eta noise seed delta" moves, so that it belongs into the infotext.
_SAMPLER_OPTIONS = {"scheduler": "lcm_skip", "uses_ensd": True}


def _patched() -> Any:
    """The wrapper around the network of hosts that call it by a function of their own; None in A1111."""
    objects = getattr(shared.sd_model, "forge_objects", None)
    return None if objects is None else objects.unet.model


def _process() -> Any:
    """What knows the noise process in those hosts: Forge's and Neo's `predictor`, reForge's `model_sampling`."""
    patched = _patched()
    return getattr(patched, "predictor", None) or getattr(patched, "model_sampling", None)


def unet() -> nn.Module:
    """The network that the host paints with now."""
    return (_patched() or shared.sd_model.model).diffusion_model


def _is_flow() -> bool:
    """Whether the model is a rectified flow in a host that mixes pictures and noise as flows want it.

    Forge and Neo do, by their predictor; reForge and A1111 add the noise to the picture whatever the model.
    """
    predictor = getattr(_patched(), "predictor", None)
    return predictor is not None and prediction_of(predictor) == FLOW


def check_supported() -> None:
    """Refuse a loaded model that LCM and TCD cannot sample from; see `check_network` and `flow_of_levels`."""
    process = _process()
    if _is_flow():
        flow_of_levels(checkpoint_file().stem, process.sigmas)
        return
    if process is None:
        prediction = "v_prediction" if getattr(shared.sd_model, "parameterization", "eps") == "v" else "epsilon"
    else:
        prediction = prediction_of(process)
    check_network(checkpoint_file().stem, unet(), prediction)


def noise_process(model_wrap: Any = None) -> Process:
    """The noise levels of the loaded model, which options (zero terminal SNR, a flow's shift) may have changed.

    Args:
        model_wrap: A1111's denoiser, which has them in `sigmas`; None reads the model itself.
    """
    source = _process() or model_wrap
    if source is None:
        return VariancePreserving(shared.sd_model.alphas_cumprod)
    if _is_flow():
        return flow_of_levels(checkpoint_file().stem, source.sigmas)
    return VariancePreserving(abar_from_sigma(source.sigmas.cpu().double()))


def checkpoint_file() -> Path:
    """The file of the model that is loaded now."""
    return Path(shared.sd_model.sd_checkpoint_info.filename)


def refiner_file(p: Any) -> Path | None:
    """The file of the model that a request goes over to in the middle; None without one."""
    named = getattr(p, "refiner_checkpoint", None)
    if named in ("None", "none") or not 0 < (getattr(p, "refiner_switch_at", None) or 0) < 1:
        return None
    return checkpoint_named(named)


def checkpoint_named(title: str | None) -> Path | None:
    """The file of a checkpoint by its title, or what is left of it, in the host's lists; None where it is in none."""
    info = sd_models.get_closet_checkpoint_match(title) if title else None
    return Path(info.filename) if info else None


def chosen_checkpoint(p: Any = None) -> Path | None:
    """The file of the model that a request, or the page, is going to use; None where none can be found.

    It may not be loaded yet: Forge loads late, and a request can name its own.
    """
    named = (getattr(p, "override_settings", None) or {}).get("sd_model_checkpoint")
    try:
        return checkpoint_named(named) or Path(sd_models.select_checkpoint().filename)
    except FileNotFoundError:
        return None


def lora_file(name: str) -> Path | None:
    """A LoRA's file by its name or alias in the prompt, from the host's own list; None where there is none."""
    networks: Any = sys.modules.get("networks")  # the built-in Lora extension
    on_disk = _listed_lora(networks, name)
    if on_disk is None and hasattr(networks, "list_available_networks"):  # as the host itself: it may be a new file
        networks.list_available_networks()
        on_disk = _listed_lora(networks, name)
    return Path(on_disk.filename) if on_disk is not None else None


def all_loras() -> Iterator[tuple[str, Path]]:
    """Every LoRA in the host's own list: its name in the prompt, and its file."""
    for name, on_disk in getattr(sys.modules.get("networks"), "available_networks", {}).items():
        yield name, Path(on_disk.filename)


def _listed_lora(networks: Any, name: str) -> Any:
    aliases = getattr(networks, "available_network_aliases", {})
    return aliases.get(name) or getattr(networks, "available_networks", {}).get(name)


def prompts_of(p: Any) -> str:
    """All prompts of a request with their styles, in one string."""
    given = [*_listed(p.prompt), *_listed(getattr(p, "hr_prompt", ""))]
    return " ".join(shared.prompt_styles.apply_styles_to_prompt(text, p.styles or []) for text in given)


def negative_prompts_of(p: Any) -> str:
    """All negative prompts of a request, in one string; those of its styles are not counted as the user's."""
    return " ".join(_listed(p.negative_prompt))


def torch_build() -> tuple[str, str]:
    """The version of torch that is installed, and the index that the host's own installer takes torch from, if any."""
    from modules import launch_utils

    named = re.search(r"""['"]TORCH_INDEX_URL['"], ['"]([^'"]+)""", inspect.getsource(launch_utils))
    return version("torch"), os.environ.get("TORCH_INDEX_URL") or (named[1] if named else "")


def file_link(file: Path) -> str:
    """The address under which the page may open a file, as it may those of its own pictures."""
    from modules import ui_tempdir

    ui_tempdir.register_tmp_file(shared.demo, str(file))
    return f"file={quote(str(file))}"


def say() -> Say:
    """Speaks the page's language."""
    return speaker(getattr(shared.opts, "localization", None))


@contextmanager
def told() -> Iterator[None]:
    """Around what the host calls, which shows a mistake's text below the picture: it is in the page's language."""
    try:
        yield
    except Mistake as mistake:
        mistake.args = (explain(mistake, say()),)
        raise


def unnamed_settings() -> dict[str, float]:
    """What changes a picture and is not always in the host's infotext: reForge leaves it out for the first step."""
    skipped = float(getattr(shared.opts, "skip_early_cond", 0))
    return {"Skip Early CFG": skipped} if skipped else {}


def apply_noise_multiplier(p: Any) -> None:
    """Take a request's own "Noise multiplier for img2img", which hosts read before its settings are in force."""
    multiplier = (getattr(p, "override_settings", None) or {}).get("initial_noise_multiplier")
    if multiplier is not None and hasattr(p, "initial_noise_multiplier"):
        p.initial_noise_multiplier = float(multiplier)


def cfg_scale(p: Any) -> float:
    """The CFG slider of the current pass: Forge has one of its own for hires."""
    hires = getattr(p, "hr_cfg", None) if getattr(p, "is_hr_pass", False) else None
    return float(p.cfg_scale if hires is None else hires)


@contextmanager
def at_scale(p: Any, guidance_scale: float) -> Iterator[None]:
    """Guide this step by `guidance_scale`: Forge would take the slider of the hires pass there."""
    if not hasattr(p, "hr_cfg"):
        yield
        return
    slider, p.hr_cfg = p.hr_cfg, guidance_scale
    try:
        yield
    finally:
        p.hr_cfg = slider


def prepare_denoiser(model_wrap: Any, rows: PositiveRows) -> None:
    """Make A1111's denoiser ask at whole timesteps, and compute no idle negative rows. Others do both themselves."""
    if _patched() is not None:
        return
    model_wrap.quantize = True
    model_wrap.forward = rows.wrap(model_wrap.forward)


def positive_rows(denoiser: Any, x: Any, cond: Any, guidance_scale: float) -> int | None:
    """How many rows a step needs where the negative prompt does nothing; None where it does something."""
    if _patched() is not None or guidance_scale != 1 or getattr(denoiser, "cond_scale_miltiplier", 1.0) != 1:
        return None
    if getattr(shared.sd_model, "cond_stage_key", "") == "edit":
        return None
    # With AND, or weights, the parts are differences to the negative prompt.
    plain = all(len(parts) == 1 and parts[0].weight == 1 for parts in cond.batch)
    return len(x) if plain else None


def scales_noise_itself() -> bool:
    """Whether an option makes the host start from noise of the exact strength."""
    return bool(getattr(shared.opts, "sgm_noise_multiplier", False))


def register_samplers(entries: Sequence[tuple[str, Callable[[Any], Any], list[str]]]) -> None:
    """Put samplers into the host's lists, in the place of those of the same name.

    Args:
        entries: name, constructor from the loaded model, and aliases.
    """
    ours = {
        name: sd_samplers_common.SamplerData(name, constructor, aliases, dict(_SAMPLER_OPTIONS))
        for name, constructor, aliases in entries
    }
    every = sd_samplers.all_samplers
    for index, sampler in enumerate(every):
        if sampler.name in ours:
            every[index] = ours.pop(sampler.name)
    every.extend(ours.values())
    sd_samplers.all_samplers_map.clear()
    sd_samplers.all_samplers_map.update({sampler.name: sampler for sampler in every})
    sd_samplers.set_samplers()
    _forget_pairs()


def first_sampler() -> str:
    """The sampler that the host's page begins with."""
    return str(sd_samplers.all_samplers[0].name)


def name_setting(setting: str, name: str) -> None:
    """Have a pasted infotext set an option whose name the host writes into infotexts but does not read (Neo: NGMS)."""
    known = shared.opts.data_labels.get(setting)
    if known is not None and not known.infotext:
        known.infotext = name


def register_schedule(name: str, label: str) -> None:
    """Offer the skipping grid to every sampler, where the host has schedules of their own (1.9 and later, Forge)."""
    if sd_schedulers is None:
        return
    entry = sd_schedulers.Scheduler(name, label, _schedule, need_inner_model=True)
    every = sd_schedulers.schedulers
    every[:] = [other for other in every if other.name != name] + [entry]
    sd_schedulers.schedulers_map.update({name: entry, label: entry})
    _forget_pairs()


@told()
def _schedule(n: int, sigma_min: float, sigma_max: float, inner_model: Any, device: Any) -> Any:
    check_supported()
    # From the model: the denoiser of the built-in LCM knows every twentieth noise level only.
    return get_sigmas_host(noise_process(), n).to(device)


def _forget_pairs() -> None:
    pairs = getattr(sd_samplers, "get_sampler_and_scheduler", None)
    if isinstance(pairs, functools._lru_cache_wrapper):
        pairs.cache_clear()


def _listed(text: Any) -> list[str]:
    return [str(part) for part in text] if isinstance(text, list) else [str(text or "")]

"""Files beside a plain model that are odd: 8-bit weights, tiny VAEs, networks that guide, flow models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from torch import Tensor

from tests.fuzz.guards import Case, Content
from tests.fuzz.models import files_of
from tests.fuzz.mutations import odd_json
from tests.fuzz.training import picture
from tests.fuzz.weights import QUICK

PARTS = "parts"
"""The folder of what is made here, beside the models."""
_UNET = "unet/diffusion_pytorch_model"
_DTYPES = (
    *(torch.int8, torch.uint8, torch.bool, torch.int64, torch.float64, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.complex64),
)
_NAMES = ("", "x", "weight", "0", "99999999999.weight", "\u00b2.weight", "-1.weight", "9" * 5000 + ".weight")
_CONTROLS = ("adapter", "adapter.safetensors", "controlnet", "eyes.safetensors", "eyes_plus.safetensors")


def make_parts(models: Path) -> None:
    """Make them in the folder `parts` beside the models."""
    import diffusers

    from tests.core.test_ip_adapter import make_adapter, make_encoder
    from tests.flow_models import save_model

    torch.manual_seed(0)
    root = models / PARTS
    unet: Any = diffusers.UNet2DConditionModel.from_pretrained(models / "plain" / "unet")
    diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 4, 4)).save_pretrained(
        root / "controlnet"
    )
    widths = list(unet.config.block_out_channels)
    adapter: Any = diffusers.T2IAdapter(3, widths, num_res_blocks=1, downscale_factor=8, adapter_type="full_adapter")
    adapter.save_pretrained(root / "adapter")
    tensors = load_file(root / "adapter" / "diffusion_pytorch_model.safetensors")
    (root / "adapter.safetensors").write_bytes(save(tensors))
    make_encoder(root / "image_encoder")
    make_adapter(root / "eyes.safetensors", unet)
    make_adapter(root / "eyes_plus.safetensors", unet, is_plus=True)
    tiny: Any = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1)
    )  # fmt: skip
    tiny.save_pretrained(root / "tiny")
    for half, first in (("encoder", 0), ("decoder", 1)):
        layers = {key.split(".", 2)[2]: value for key, value in tiny.state_dict().items() if key.startswith(half)}
        renamed = {f"{int(key.split('.')[0]) + first}.{key.split('.', 1)[1]}": v for key, v in layers.items()}
        (root / f"taesd_{half}.safetensors").write_bytes(save(renamed))
    save_model("sd3", root / "sd3")


@st.composite
def odd_tensors(draw: st.DrawFn, tensors: dict[str, Tensor]) -> tuple[bytes, str]:
    """A safetensors file in which one or two tensors are of another type, shape or name, or hold no numbers."""
    changed, notes = dict(tensors), []
    for _ in range(draw(st.integers(1, 2))):
        key = draw(st.sampled_from(sorted(changed) or ["x"]))
        tensor = changed.pop(key, torch.zeros(1))
        how = draw(st.sampled_from(["dtype", "dtype", "shape", "shape", "value", "name", "more", "lost"]))
        note: object = how
        if how == "dtype":
            note = dtype = draw(st.sampled_from(_DTYPES))
            changed[key] = tensor.to(dtype)
        elif how == "shape":
            changed[key] = draw(st.sampled_from(_shapes(tensor)))
            note = tuple(changed[key].shape)
        elif how == "value":
            note = value = draw(st.sampled_from([0.0, float("nan"), float("inf"), 1e30, -1.0]))
            changed[key] = torch.full(tensor.shape, value).to(tensor.dtype)
        elif how in ("name", "more"):
            note = name = draw(st.sampled_from([*_NAMES, f"{key}_scale", key.partition(".")[2]]))
            changed |= {name: tensor} | ({key: tensor.clone()} if how == "more" else {})
        notes.append(f"{key}: {note!s:.40}")
    return save({key: value.contiguous() for key, value in changed.items()}), "; ".join(notes)


def _shapes(tensor: Tensor) -> list[Tensor]:
    return [
        tensor.flatten(),
        tensor.flatten()[:1].squeeze(),
        tensor[None],
        tensor.flatten()[:0],
        *([tensor[:1], tensor[:0], tensor.transpose(0, -1)] if tensor.ndim else []),
    ]


@st.composite
def _odd_folder(draw: st.DrawFn, folder: Path, names: list[str]) -> tuple[dict[str, Content], str]:
    """The files of a folder with one of these odd: JSON, or weights."""
    files: dict[str, Content] = dict(files_of(folder))
    name = draw(st.sampled_from(names))
    path = folder / name
    if path.suffix == ".json":
        files[name], about = draw(odd_json(json.loads(path.read_text(encoding="utf-8"))))
    else:
        files[name], about = draw(odd_tensors(load_file(path)))
    return files, f"{name}: {about}"


@st.composite
def control_case(draw: st.DrawFn, models: Path) -> Case:
    """An odd T2I-Adapter, ControlNet or IP-Adapter, or an odd image encoder of the last."""
    root = models / PARTS
    name = draw(st.sampled_from(_CONTROLS))
    files: dict[str, Content] = {"small.png": picture()}
    if (root / name).is_dir():
        inside, about = draw(_odd_folder(root / name, ["config.json", "diffusion_pytorch_model.safetensors"]))
        files |= {f"{name}/{file}": content for file, content in inside.items()}
    elif name.startswith("eyes") and draw(st.booleans()):
        inside, about = draw(_odd_folder(root / "image_encoder", ["config.json", "config.json", "model.safetensors"]))
        files |= {f"image_encoder/{file}": content for file, content in inside.items()} | {name: root / name}
    else:
        files[name], about = draw(odd_tensors(load_file(root / name)))
        files |= {f"image_encoder/{file}": path for file, path in files_of(root / "image_encoder").items()}
    control = f"INPUTS/{name}=INPUTS/small.png"
    return Case(
        ("generate", "a cat", "--model", str(models / "plain"), "--control", control, *QUICK), files, f"{name}: {about}"
    )


@st.composite
def vae_case(draw: st.DrawFn, models: Path) -> Case:
    """An odd tiny VAE, as a folder or in its own two files."""
    root = models / PARTS
    if draw(st.booleans()):
        inside, about = draw(_odd_folder(root / "tiny", ["config.json", "diffusion_pytorch_model.safetensors"]))
        files, name = {f"v/{file}": content for file, content in inside.items()}, "v"
    else:
        name, other = draw(st.permutations(["taesd_encoder.safetensors", "taesd_decoder.safetensors"]))
        content, about = draw(odd_tensors(load_file(root / name)))
        files = {name: content, other: root / other}
        name = draw(st.sampled_from([name, other]))
    argv = ("generate", "a cat", "--model", str(models / "plain"), "--vae", f"INPUTS/{name}", *QUICK)
    more = draw(st.sampled_from([(), ("--image", "INPUTS/small.png", "--strength", "1")]))
    return Case((*argv, *more), {"small.png": picture(), **files}, about)


@st.composite
def quantised_case(draw: st.DrawFn, models: Path) -> Case:
    """A model whose U-Net is stored in 8 bits, with something odd about that."""
    tensors = load_file(models / "plain" / f"{_UNET}.safetensors")
    small = ("conv_in.weight", "mid_block.resnets.0.conv1.weight", "time_embedding.linear_1.weight")
    for name in small:
        scale = tensors[name].flatten(1).abs().amax(1) / 127
        whole = (tensors[name] / scale.view(-1, *[1] * (tensors[name].ndim - 1))).round().to(torch.int8)
        tensors |= {name: whole, f"{name}_scale": scale.half()}
    shown = [*small, *(f"{name}_scale" for name in small)]
    content, about = draw(odd_tensors({name: tensors.pop(name) for name in shown}))
    from safetensors.torch import load

    whole_file = save({**tensors, **load(content)})
    files: dict[str, Content] = {f"m/{name}": path for name, path in files_of(models / "plain").items()}
    del files[f"m/{_UNET}.safetensors"]
    files[f"m/{_UNET}.int8.safetensors"] = whole_file
    argv = draw(
        st.sampled_from(
            [
                ("info", "INPUTS/m"),
                ("generate", "a cat", "--model", "INPUTS/m", *QUICK),
                ("export", "--to", "single-file", "--model", "INPUTS/m", "--path", "a.safetensors"),
            ]
        )
    )
    return Case(argv, files, about)


@st.composite
def teacher_case(draw: st.DrawFn, models: Path) -> Case:
    """An odd folder of a flow model, or of Stable Diffusion, given to the trainer or painted with."""
    kind = draw(st.sampled_from(["sd3", "sd3", "sd3", "plain"]))
    root = models / "plain" if kind == "plain" else models / PARTS / kind
    names = sorted(name for name in files_of(root) if name.endswith("config.json") and "tokenizer" not in name)
    names += ["model_index.json"] if kind != "plain" else []
    inside, about = draw(_odd_folder(root, names))
    files = {f"m/{name}": content for name, content in inside.items()} | {"d/0.png": picture(), "d/0.txt": b"a cat"}
    data = ("--teacher", "INPUTS/m", "--data", "INPUTS/d", "--output", "out", "--resolution", "64")
    plan = ("distill", *data, "--steps", "1", "--dry-run")
    paint = ("generate", "a cat", "--model", "INPUTS/m", *QUICK)
    argv = draw(st.sampled_from([plan, plan, ("cache", *data), paint]))
    program = "lcm_core.cli.main" if argv is paint else "trainer.cli.main"
    return Case(argv, files, about, program)

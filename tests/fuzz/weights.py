"""Safetensors files and LoRA files that are odd."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save

from tests.fuzz.guards import Case
from tests.fuzz.mutations import NUMBERS, TEXTS, damaged, dump, json_like, odd, odd_json

_PACKED = ("lcm_suite.config", "lcm_suite.tokenizer", "lcm_suite.recommended")
_SAID = st.dictionaries(st.sampled_from(["steps", "original_steps", "gamma", "sampler"]), odd | st.just("tcd"))
_RECOMMENDED = _SAID.map(lambda said: dump(said).decode())
QUICK = ("--size", "64", "--steps", "1", "--output", "a.png")
"""A picture as small and quick as the tiny models allow."""
MODULE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
KEYS = [
    ("lora_unet_" + MODULE.replace(".", "_"), ".lora_down.weight", ".lora_up.weight"),
    (f"unet.{MODULE}", ".lora_A.weight", ".lora_B.weight"),
    (f"unet.{MODULE}", ".lora.down.weight", ".lora.up.weight"),
    (f"base_model.model.{MODULE}", ".lora_A.weight", ".lora_B.weight"),
    (f"unet.base_model.model.{MODULE}", ".lora_A.default.weight", ".lora_B.default.weight"),
    ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", ".lora_down.weight", ".lora_up.weight"),
    ("lora_te2_text_model_encoder_layers_0_self_attn_q_proj", ".lora_down.weight", ".lora_up.weight"),
    ("lora_unet_nowhere", ".lora_down.weight", ".lora_up.weight"),
    ("", ".lora_down.weight", ".lora_up.weight"),
]
_LORA_PARTS = ["rank", "width", "dtype", "alpha", "halves", "more", "lost"]
_WHOLE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_v"
_MORE_KEYS = [
    ".dora_scale",
    ".hada_w1_a",
    ".lokr_w1",
    ".lora_mid.weight",
    ".diff",
    ".bogus",
    ".lora_A.weight",
    ".alpha",
]


def split(file: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file as its header, without the checksum that would refuse all changes, and the bytes behind it."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.get("__metadata__", {}).pop("lcm_suite.checksum", None)
    return header, content[8 + length :]


def join(header: bytes, body: bytes, length: int | None = None) -> bytes:
    """The bytes of a file with this header, whatever it says."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + body


@st.composite
def odd_header(draw: st.DrawFn, header: dict[str, Any]) -> tuple[bytes, str]:
    """A header with something changed: in the metadata, in the JSON that the metadata holds, or in a tensor."""
    metadata = header.get("__metadata__", {})
    packed = [key for key in _PACKED if key in metadata]
    if draw(st.booleans()) and packed:
        key = draw(st.sampled_from(packed))
        inner, notes = draw(odd_json(json.loads(metadata[key])))
        text = inner.decode("latin-1")
        return dump({**header, "__metadata__": {**metadata, key: text}}), f"{key}: {notes}"
    names = draw(st.lists(st.sampled_from(sorted(header)), min_size=1, max_size=3, unique=True))
    changed, notes = draw(json_like({name: header[name] for name in names}))
    kept = {key: value for key, value in header.items() if key not in names}
    return dump({**kept, **changed}), notes


@st.composite
def odd_file(draw: st.DrawFn, file: Path) -> tuple[bytes, str]:
    """A safetensors file that is odd in its header or, now and then, in its length or single bits."""
    header, body = split(file)
    if draw(st.integers(0, 3)) == 0:
        content = join(dump(header), body)
        if draw(st.booleans()):
            return draw(damaged(content, within=len(content) - len(body)))
        length = draw(st.sampled_from([0, 1, 7, 2**31, 2**62, 2**63, 2**64 - 1]))
        return join(dump(header), body, length), f"length {length}"
    changed, notes = draw(odd_header(header))
    return join(changed, body), notes


@st.composite
def file_case(draw: st.DrawFn, models: Path) -> Case:
    """An odd single file, VAE or LoRA, given to a command that reads it."""
    kind = draw(st.sampled_from(["info", "model", "export", "vae", "lora"]))
    vae, lora = models / "plain/vae/diffusion_pytorch_model.safetensors", models / "emoji/lora/lcm_lora.safetensors"
    base = {"vae": vae, "lora": lora}.get(kind, models / "plain.safetensors")
    content, about = draw(odd_file(base))
    argv = {
        "info": ("info", "INPUTS/a.safetensors"),
        "model": ("generate", "a cat", "--model", "INPUTS/a.safetensors", *QUICK),
        "export": ("export", "--to", "diffusers", "--model", "INPUTS/a.safetensors", "--path", "folder"),
        "vae": ("generate", "a cat", "--model", str(models / "plain"), "--vae", "INPUTS/a.safetensors", *QUICK),
        "lora": ("generate", "a cat", "--model", str(models / "plain"), "--lora", "INPUTS/a.safetensors", *QUICK),
    }[kind]
    return Case(argv, {"a.safetensors": content}, about)


@st.composite
def lora_tensors(draw: st.DrawFn) -> tuple[dict[str, torch.Tensor], str]:
    """One module of a LoRA of which up to two things are odd, beside another that is whole."""
    what: list[str] = draw(st.lists(st.sampled_from(_LORA_PARTS), max_size=2))

    def choose(name: str, usual: Any, values: list[Any]) -> Any:
        return draw(st.sampled_from(values)) if name in what else usual

    name, down, up = draw(st.sampled_from(KEYS))
    dtypes = [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.bool]
    width = choose("width", 128 if "_te" in name else 64, [0, 1, 32, 320])
    rank, dtype = choose("rank", 4, [0, 1, 64, 1000]), choose("dtype", torch.float32, [*dtypes, torch.float64])
    tensors = {name + down: torch.ones(rank, width).to(dtype)}
    tensors[name + up] = torch.ones(width, choose("halves", rank, [0, 2, rank + 1])).to(dtype)
    alpha = choose("alpha", 4.0, [0.0, -1.0, math.nan, 1e38, [], [1.0, 2.0], [[4.0]], 4, True])
    tensors[name + ".alpha"] = torch.tensor(alpha)
    more = choose("more", None, _MORE_KEYS)
    if more is not None:
        tensors[name + more] = torch.ones(draw(st.sampled_from([(), (0,), (4, 64), (1, 1, 1, 1, 1)])))
    if "lost" in what:
        tensors.pop(draw(st.sampled_from(sorted(tensors))))
    if draw(st.booleans()):
        tensors |= {f"{_WHOLE}.lora_down.weight": torch.ones(4, 64), f"{_WHOLE}.lora_up.weight": torch.ones(64, 4)}
    return tensors, f"{name}{down} rank {rank}, width {width}, {dtype}, alpha {alpha}, {more}, {what}"


PEFT = {
    "r": 4,
    "lora_alpha": 4,
    "alpha_pattern": {"to_q": 8},
    "rank_pattern": {"to_q": 4},
    "use_rslora": False,
    "use_dora": False,
    "peft_type": "LORA",
    "target_modules": ["to_q"],
}


@st.composite
def lora_case(draw: st.DrawFn, models: Path) -> Case:
    """An odd LoRA, given to a command that reads it."""
    tensors, about = draw(lora_tensors())
    patterns = st.sampled_from(["(", "to_q", "(.*)*x", "[", *TEXTS])
    settings = {**PEFT, "alpha_pattern": {draw(patterns): draw(st.sampled_from([8, *NUMBERS]))}}
    content, more = draw(st.one_of(st.just((dump(PEFT), "")), odd_json(settings)))
    packed = json.dumps({f"unet.{key}": value for key, value in PEFT.items()}) if draw(st.booleans()) else ""
    if more and packed:
        packed = content.decode("latin-1")
    stated = {"lora_adapter_metadata": packed} if packed else {}
    stated |= draw(st.fixed_dictionaries({}, optional={"ss_network_alpha": odd.map(str)}))
    stated |= draw(st.fixed_dictionaries({}, optional={"lcm_suite.recommended": _RECOMMENDED}))
    file = save(tensors, {key: value for key, value in stated.items() if _is_text(value)})
    folder = draw(st.booleans())
    files = {"a/adapter_model.safetensors": file, "a/adapter_config.json": content} if folder else {"a": file}
    lora = f"INPUTS/a{draw(st.sampled_from(['', ':0.5', ':-1', ':0', ':99999999999']))}"
    argv = draw(
        st.sampled_from(
            [
                ("info", "INPUTS/a"),
                ("generate", "a cat", "--model", str(models / "plain"), "--lora", lora, *QUICK),
                ("export", "--to", "diffusers", "--model", str(models / "plain"), "--lora", lora, "--path", "folder"),
            ]
        )
    )
    return Case(argv, files, f"{about}; {more}; {stated!r:.200}")


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True

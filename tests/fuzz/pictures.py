"""Pictures whose settings are odd: what `generate --from` and `info` read."""

from __future__ import annotations

import io
import json
import struct
import zlib
from functools import cache
from pathlib import Path

from hypothesis import strategies as st

from tests.fuzz.guards import Case
from tests.fuzz.mutations import damaged, odd_json

KEY = b"lcm_suite"


def settings_of(models: Path) -> dict[str, object]:
    """What a small picture of this suite carries, with everything that may stand in it."""
    model = str(models / "plain")
    picture = {"prompt": "a cat", "negative_prompt": "", "seed": 0, "width": 64, "height": 64, "image": None}
    numbers = {"num_inference_steps": 1, "guidance_scale": 1.0, "original_steps": 50, "gamma": 0.3, "strength": 1.0}
    upscale = {"upscale": 1.0, "upscale_strength": 0.5, "sampler": "lcm", "timesteps": [999], "mask": None}
    network: dict[str, object] = {
        "model": model,
        "vae": f"{model}/vae",
        "lora": [],
        "tokenizer": f"{model}/tokenizer",
        "unet": None,
    }
    machine = {"device": "cpu", "dtype": "float32", "vae_dtype": "float32", "threads": 1}
    return {**picture, **numbers, **upscale, **network, **machine}


def png(text: bytes, kind: bytes = b"tEXt") -> bytes:
    """A picture of one pixel with a text chunk, whatever is in it."""
    body = {
        b"tEXt": KEY + b"\0" + text,
        b"zTXt": KEY + b"\0\0" + zlib.compress(text),
        b"iTXt": KEY + b"\0\1\0\0\0" + zlib.compress(text),
    }[kind]
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)), (kind, body)]
    chunks += [(b"IDAT", zlib.compress(b"\0\xff\0\0")), (b"IEND", b"")]
    parts = [len(c).to_bytes(4, "big") + k + c + zlib.crc32(k + c).to_bytes(4, "big") for k, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def with_exif(text: bytes, kind: str) -> bytes:
    """A JPEG or WebP picture with a description."""
    from PIL import Image

    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x010E] = text[:60_000].decode("latin-1")
    Image.new("RGB", (8, 8)).save(buffer, kind, exif=exif)
    return buffer.getvalue()


@cache
def _bomb() -> bytes:
    """A small file with a text of 100 MB."""
    return png(json.dumps({"prompt": "x" * 100_000_000}).encode(), b"zTXt")


@st.composite
def picture_case(draw: st.DrawFn, models: Path) -> Case:
    """An odd picture, given to a command that reads its settings."""
    text, about = draw(odd_json(settings_of(models)))
    kind = draw(st.sampled_from(["tEXt", "tEXt", "zTXt", "iTXt", "JPEG", "WEBP", "bomb"]))
    if kind == "bomb":
        content = _bomb()
    else:
        content = with_exif(text, kind) if kind in ("JPEG", "WEBP") else png(text, kind.encode())
    if draw(st.integers(0, 9)) == 0:
        content, more = draw(damaged(content, within=2000))
        about = f"{about}; {more}"
    name = {"JPEG": "a.jpg", "WEBP": "a.webp"}.get(kind, "a.png")
    generate = ("generate", "--from", f"INPUTS/{name}", "--output", "a.png")
    argv = draw(st.sampled_from([("info", f"INPUTS/{name}"), generate, (*generate, "--size", "64", "--steps", "1")]))
    return Case(argv, {name: content}, f"{kind}: {about}", encoding=draw(st.sampled_from(["utf-8", "cp1252", "ascii"])))

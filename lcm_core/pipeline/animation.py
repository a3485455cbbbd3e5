"""Frames to GIF, animated WebP, MP4 or a folder of numbered pictures; the same frames give the same bytes."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_core.errors import InputError
from lcm_core.files.atomic import atomic_write, new_folder
from lcm_core.pipeline.image import save_image, write_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

ANIMATION_SUFFIXES = (".gif", ".webp", ".mp4")

_MAX_GIF_FPS = 50  # browsers slow anything faster down to 10


def save_animation(frames: Sequence[Image], path: str | os.PathLike[str], fps: float = 12, loop: bool = True) -> None:
    """Write frames as .gif, .webp or .mp4, or, when `path` has no suffix, as a new folder of numbered PNG files.

    `loop` repeats a GIF or WebP for ever; an MP4 leaves that to the player.

    Raises:
        InputError: another suffix, an impossible `fps`, PyAV missing for .mp4, or the output cannot be written.
    """
    check_animation(path, fps)
    suffix = Path(path).suffix.lower()
    if suffix in (".gif", ".webp"):
        write_bytes(path, encode_animation(frames, suffix, fps, loop))
    elif suffix == ".mp4":
        with atomic_write(path) as temporary:
            _write_mp4(frames, temporary, fps)
    else:
        with new_folder(path) as folder:
            for index, frame in enumerate(frames):
                save_image(frame, folder / f"frame_{index:04d}.png")


def encode_animation(frames: Sequence[Image], suffix: str, fps: float = 12, loop: bool = True) -> bytes:
    """The bytes of a .gif or .webp that `save_animation` writes."""
    return (_encode_gif if suffix.lower() == ".gif" else _encode_webp)(frames, fps, loop)


def check_animation(path: str | os.PathLike[str], fps: float) -> None:
    """Refuse, before any frame is made, what `save_animation` could not write."""
    suffix = Path(path).suffix.lower()
    if suffix and suffix not in ANIMATION_SUFFIXES:
        raise InputError(f"cannot write an animation as {suffix!r}; use .gif, .webp, .mp4 or a folder without suffix")
    if not 0 < fps <= (_MAX_GIF_FPS if suffix == ".gif" else 240):
        raise InputError(f"{fps:g} frames a second is out of range; a GIF takes up to {_MAX_GIF_FPS}, others up to 240")
    if suffix == ".mp4":
        _import_av()


def _encode_gif(frames: Sequence[Image], fps: float, loop: bool) -> bytes:
    from PIL import Image

    # One palette for all frames: with a palette each, flat areas would flicker from frame to frame.
    side = 128
    sample = Image.new("RGB", (side, side * len(frames)))
    for index, frame in enumerate(frames):
        sample.paste(frame.resize((side, side), Image.Resampling.NEAREST), (0, side * index))
    palette = sample.quantize(256, Image.Quantize.MEDIANCUT, kmeans=2)
    indexed = [frame.convert("RGB").quantize(palette=palette) for frame in frames]
    durations = [10 * ticks for ticks in _durations(len(frames), fps, 100)]  # GIF counts hundredths of a second
    buffer = io.BytesIO()
    extra = {"loop": 0} if loop else {}
    indexed[0].save(buffer, "GIF", save_all=True, append_images=indexed[1:], duration=durations, **extra)
    return buffer.getvalue()


def _encode_webp(frames: Sequence[Image], fps: float, loop: bool) -> bytes:
    buffer = io.BytesIO()
    durations = _durations(len(frames), fps, 1000)
    options: dict[str, Any] = {"duration": durations, "loop": 0 if loop else 1, "quality": 90}
    frames[0].save(buffer, "WEBP", save_all=True, append_images=list(frames[1:]), **options)
    return buffer.getvalue()


def _durations(count: int, fps: float, ticks: int) -> list[int]:
    """Whole ticks per frame that together keep the true length, e.g. 3 frames at 12 fps and 100 ticks: 8, 9, 8."""
    ends = [round(index * ticks / fps) for index in range(count + 1)]
    return [end - start for start, end in pairwise(ends)]


def _write_mp4(frames: Sequence[Image], path: Path, fps: float) -> None:
    av = _import_av()
    width, height = (max(side - side % 2, 2) for side in frames[0].size)  # yuv420p halves the colour planes
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "16"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for image in frames:
            frame = av.VideoFrame.from_image(image.convert("RGB").crop((0, 0, width, height)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _import_av() -> Any:
    try:
        import av
    except ImportError:
        raise InputError(
            'writing .mp4 needs PyAV, which is missing; run: pip install "lcm-suite[video]", or write .gif or .webp'
        ) from None
    return av

"""Animations: every frame for its time, steady colours, the same bytes each time, and what is refused."""

from __future__ import annotations

import builtins
from pathlib import Path

import numpy
import pytest
from PIL import Image, ImageDraw

from lcm_core.errors import InputError
from lcm_core.pipeline.animation import save_animation


def animation(count: int = 6, size: int = 64) -> list[Image.Image]:
    frames = []
    for index in range(count):
        frame = Image.new("RGB", (size, size), "white")
        box = (4 + 6 * index, 16, 24 + 6 * index, 40)
        ImageDraw.Draw(frame).ellipse(box, (230, 80, 30), "black")
        frames.append(frame)
    return frames


def assert_like(shown: Image.Image, frame: Image.Image, tolerance: float) -> None:
    difference = numpy.abs(numpy.asarray(shown.convert("RGB"), float) - numpy.asarray(frame, float))
    assert difference.mean() < tolerance


@pytest.mark.parametrize(("name", "tolerance"), [("a.gif", 2.0), ("a.webp", 3.0)])
def test_gif_and_webp_show_every_frame_for_its_time(tmp_path: Path, name: str, tolerance: float) -> None:
    frames = animation()
    save_animation(frames, tmp_path / name, fps=12)
    with Image.open(tmp_path / name) as shown:
        assert shown.n_frames == len(frames)
        assert shown.info["loop"] == 0
        total = 0.0
        for index, frame in enumerate(frames):
            shown.seek(index)
            assert_like(shown, frame, tolerance)
            total += shown.info["duration"]
    assert total == pytest.approx(6 / 12 * 1000, abs=5)


def test_gif_frames_share_one_palette(tmp_path: Path) -> None:
    """A palette per frame makes still areas flicker."""
    save_animation(animation(), tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as shown:
        corners = set()
        for index in range(shown.n_frames):
            shown.seek(index)
            corners.add(shown.convert("RGB").getpixel((60, 60)))
    assert corners == {(255, 255, 255)}


def test_mp4_holds_every_frame_in_colours_close_to_the_originals(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    frames = [frame.resize((63, 65)) for frame in animation()]  # odd sides, which yuv420p cannot hold
    save_animation(frames, tmp_path / "a.mp4", fps=7.5)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate) == 7.5
        shown = [frame.to_image() for frame in container.decode(stream)]
    assert len(shown) == len(frames)
    for image, frame in zip(shown, frames, strict=True):
        assert image.size == (62, 64)
        assert_like(image, frame.crop((0, 0, 62, 64)), 6.0)


def test_animations_are_written_the_same_each_time(tmp_path: Path) -> None:
    for suffix in (".gif", ".webp", ".mp4"):
        for name in ("a", "b"):
            save_animation(animation(), tmp_path / (name + suffix))
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_frames_go_into_a_new_folder_and_never_among_old_ones(tmp_path: Path) -> None:
    save_animation(animation(3), tmp_path / "deep" / "frames")
    assert [path.name for path in sorted((tmp_path / "deep" / "frames").iterdir())] == [
        f"frame_{index:04d}.png" for index in range(3)
    ]
    with pytest.raises(InputError, match="exists already"):
        save_animation(animation(3), tmp_path / "deep" / "frames")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["frames"]


def test_missing_pyav_is_told_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_av(name: str, *args, **kwargs):
        if name == "av":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_av)
    with pytest.raises(InputError, match=r"lcm-suite\[video\]"):
        save_animation(animation(), tmp_path / "a.mp4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "fps", "words"), [("a.avi", 12, r"\.avi"), ("a.gif", 60, "50"), ("a.webp", 0, "0 fr")]
)
def test_impossible_animations_are_refused(tmp_path: Path, name: str, fps: float, words: str) -> None:
    with pytest.raises(InputError, match=words):
        save_animation(animation(), tmp_path / name, fps)

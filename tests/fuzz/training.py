"""Data folders and settings of the trainer that are odd."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import asdict
from pathlib import Path

from hypothesis import strategies as st

from tests.fuzz.guards import FIFO, Case, Content
from tests.fuzz.mutations import TEXTS, damaged, odd, odd_json
from tests.fuzz.pictures import png, with_exif

_TRAINER = "trainer.cli.main"


def picture() -> bytes:
    """A plain one, 64 pixels wide."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def tar(members: dict[str, bytes]) -> bytes:
    """A tar with these members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@st.composite
def _odd_picture(draw: st.DrawFn) -> tuple[Content, str]:
    whole = draw(st.sampled_from([picture(), png(b"{}"), with_exif(b"x", "JPEG"), with_exif(b"x", "WEBP")]))
    instead: list[Content] = [b"", b"GIF89a", b"BM", b"II*\0", FIFO, Path("/dev/zero"), Path("/nowhere")]
    return draw(st.one_of(damaged(whole), st.sampled_from(instead).map(lambda content: (content, f"{content!s:.40}"))))


@st.composite
def _folder(draw: st.DrawFn) -> tuple[dict[str, Content], str]:
    """Pictures with captions, of which one thing is odd."""
    files: dict[str, Content] = {"d/0.png": picture(), "d/0.txt": b"a cat"}
    kind = draw(st.sampled_from(["picture", "caption", "metadata", "tar", "saved", "prompts"]))
    about = ""
    if kind == "picture":
        name = draw(st.sampled_from(["1.png", "1.jpg", "1.webp", "1.bmp", "1.tif", "1.gif", "e/1.png"]))
        files[f"d/{name}"], about = draw(_odd_picture())
    elif kind == "caption":
        instead: list[Content] = [
            b"\xff",
            b"",
            b"x" * 1_000_000,
            b"\0",
            FIFO,
            Path("/dev/zero"),
            b"\xed\xa0\x80",
            b"a\r\nb",
        ]
        content = draw(st.sampled_from(instead))
        files["d/0.txt"], about = content, f"{content!s:.40}"
    elif kind == "metadata":
        row = {"file_name": "0.png", "text": "a cat", "caption": "x"}
        files["d/metadata.jsonl"], about = draw(odd_json(row))
    elif kind == "tar":
        text, about = draw(odd_json({"text": "a cat", "caption": None}))
        name = draw(st.sampled_from(["0.png", "../0.png", "/evil.png", "a/b/0.png", ".png", "0.x.png"]))
        whole = tar({name: picture(), "0.json": text, "1.png": picture(), "1.txt": b"a dog"})
        content, more = draw(st.one_of(st.just((whole, "")), damaged(whole)))
        return {"d/0.tar": content}, f"tar {name}: {about}; {more}"
    elif kind == "saved":
        files["d/state.json"], about = draw(odd_json({"_data_files": [{"filename": "x.arrow"}]}))
    return files, f"{kind}: {about}"


@st.composite
def data_case(draw: st.DrawFn, models: Path) -> Case:
    """An odd data folder, given to `cache`."""
    files, about = draw(_folder())
    argv = ["cache", "--teacher", str(models / "plain"), "--data", "INPUTS/d", "--output", "out", "--resolution", "64"]
    argv += draw(st.sampled_from([[], ["--flip"], ["--crop", "0.5"], ["--no-buckets"]]))
    return Case(tuple(argv), files, about, _TRAINER)


_FLAGS = (
    *("--steps", "--batch-size", "--learning-rate", "--method", "--rank", "--alpha", "--seed", "--phases", "--student"),
    *("--huber-c", "--clean-share", "--ema-decay", "--precision", "--teacher", "--data", "--prompts", "--start"),
)


@st.composite
def settings_case(draw: st.DrawFn, models: Path) -> Case:
    """An odd configuration, or odd flags, for a plan."""
    teacher = str(models / "plain")
    argv, files, about = ["distill", "--preset", "emoji", "--teacher", teacher, "--dry-run"], {}, ""
    if draw(st.booleans()):
        from trainer.config import DistillConfig

        content, about = draw(odd_json(json.loads(json.dumps(asdict(DistillConfig())))))
        name = draw(st.sampled_from(["c.json", "c.json", "c.toml", "c"]))
        argv, files = [*argv, "--config", f"INPUTS/{name}"], {name: content}
    else:
        for flag in draw(st.lists(st.sampled_from(_FLAGS), min_size=1, max_size=3, unique=True)):
            argv += [flag, draw(st.one_of(odd.map(str), st.sampled_from(TEXTS)))]
    return Case(tuple(argv), files, about, _TRAINER)

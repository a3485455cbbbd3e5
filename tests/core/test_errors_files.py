"""Atomic writes on real files and real failures of the file system."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lcm_core.errors import InputError
from lcm_core.files.atomic import atomic_write, new_folder

ROOT = Path(__file__).parents[2]


def test_written_file_or_leftovers_are_wrong(tmp_path: Path) -> None:
    target = tmp_path / "new folder" / "picture.png"
    with atomic_write(target) as temporary:
        assert temporary.parent == target.parent  # a rename across file systems would not be atomic
        assert temporary.suffix == ".png"  # writers choose the format by it
        temporary.write_bytes(b"first")
        assert not target.exists()
    with atomic_write(str(target)) as temporary:
        temporary.write_bytes(b"second")
        assert target.read_bytes() == b"first"
    assert target.read_bytes() == b"second"
    assert list(target.parent.iterdir()) == [target]


def test_failed_write_damages_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    target.write_bytes(b"old")

    def fail() -> None:
        with atomic_write(target) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_folder_that_is_a_file_gives_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    target = tmp_path / "file" / "picture.png"
    with pytest.raises(InputError, match=r"cannot write .*picture\.png: .*; choose another output path") as caught:
        atomic_write(target).__enter__()
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the file size")
def test_full_disk_leaves_half_a_file(tmp_path: Path) -> None:
    """A limit on the file size fails the write as a full disk does, with OSError in its middle."""
    script = """
import resource, sys
from lcm_core.errors import InputError
from lcm_core.files.atomic import atomic_write
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with atomic_write(sys.argv[1]) as temporary:
        temporary.write_bytes(bytes(5000))
except InputError as error:
    print(error)
"""
    target = tmp_path / "model.safetensors"
    result = subprocess.run(
        [sys.executable, "-c", script, str(target)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.stdout.startswith(f"cannot write {target}: "), result.stderr
    assert "free some space" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="file modes are POSIX's")
def test_file_is_private_against_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "a.txt") as temporary:
            temporary.write_text("a")
        assert os.umask(0o027) == 0o027  # reading the umask must not change it
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640


def test_new_folder_is_seen_half_written(tmp_path: Path) -> None:
    target = tmp_path / "models" / "emoji"
    with new_folder(target) as temporary:
        (temporary / "unet").mkdir()
        (temporary / "unet" / "config.json").write_text("{}")
        assert not target.exists()
    assert (target / "unet" / "config.json").read_text() == "{}"
    assert list(target.parent.iterdir()) == [target]


def test_failed_folder_stays_behind(tmp_path: Path) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "emoji") as temporary:
            (temporary / "half.bin").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "emoji").mkdir()
    (tmp_path / "file").write_bytes(b"")
    for name, message in (("emoji", "emoji exists already; choose another"), ("file/emoji", "cannot write .*emoji: ")):
        with pytest.raises(InputError, match=message):
            new_folder(tmp_path / name).__enter__()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["emoji", "file"]


_WRITER = """
import os, sys
from lcm_core.files.atomic import atomic_write, new_folder
with (new_folder if sys.argv[2] == "folder" else atomic_write)(sys.argv[1]) as temporary:
    file = temporary / "half.bin" if sys.argv[2] == "folder" else temporary
    file.write_bytes(b"half")
    print(temporary, flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs the locks of POSIX")
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_killed_writer_leaves_its_half_for_ever_or_a_living_one_loses_it(kind: str, tmp_path: Path) -> None:
    """Runs that are killed again and again would fill the disk with states; a second run must not take the first's."""
    target = tmp_path / "state.safetensors"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", _WRITER, str(target if kind == "file" else tmp_path / "model"), kind]
    writers = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(2)]
    halves = [Path(writer.stdout.readline().strip()) for writer in writers]
    assert all(half.exists() for half in halves)
    writers[0].kill()
    writers[0].wait()
    with atomic_write(target) as temporary:
        temporary.write_bytes(b"whole")
        assert [half.exists() for half in halves] == [False, True]
    writers[1].communicate("", timeout=60)
    assert writers[1].returncode == 0
    assert not any(half.exists() for half in halves)
    assert target.read_bytes() == (b"half" if kind == "file" else b"whole")  # the later of two writers


def test_file_of_the_user_is_taken_for_a_leftover(tmp_path: Path) -> None:
    names = [".a.partial-abc.png", "a.partial-abcdefgh.png", ".state-abcdefgh.png", ".a.partial-abcdefgh.png.bak.x"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with atomic_write(tmp_path / "a.png") as temporary:
        temporary.write_bytes(b"")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "a.png"])


def test_folder_that_refuses_to_be_flushed_spoils_a_good_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network drives flush files but no folders; the file has its name already when that is found."""
    fsync = os.fsync

    def refuse_folders(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(22, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    with atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("a")
    with new_folder(tmp_path / "b") as temporary:
        (temporary / "c").mkdir()
    assert (tmp_path / "a.txt").read_text() == "a"
    assert (tmp_path / "b" / "c").is_dir()


@pytest.mark.parametrize("letter", ["a", "猫"])
def test_longest_name_that_the_disk_takes_is_too_long_for_the_temporary_file(letter: str, tmp_path: Path) -> None:
    size = len(letter.encode())
    target = tmp_path / (letter * ((255 - 4) // size) + ".png")
    with atomic_write(target) as temporary:
        temporary.write_bytes(b"x")
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a" * 300 + ".png", "its name has more than 255 bytes"),
        ("é" * 200 + ".png", "its name has more than 255 bytes"),
        ("a\0b.png", "no null byte"),
        ("\ud800.png", "no valid text"),
    ],
)
def test_name_that_no_disk_takes_gives_a_traceback(name: str, words: str, tmp_path: Path) -> None:
    for writer in (atomic_write, new_folder):
        with pytest.raises(InputError, match=words):
            writer(tmp_path / name).__enter__()


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes in the file system")
def test_pipe_or_device_is_replaced(tmp_path: Path) -> None:
    """The rename would put a file in its place: for root, in that of /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: it is a device or a pipe"):
        atomic_write(tmp_path / "pipe").__enter__()
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_input_error_escapes_handlers_of_value_error() -> None:
    with pytest.raises(ValueError, match="one line"):
        raise InputError("one line")

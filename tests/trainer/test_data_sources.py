"""Reading data: every kind gives the right captions, and nothing that a user can throw at it ends in a traceback."""

import io
import json
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lcm_core.errors import InputError
from trainer.data.sources import read_prompts, read_source

COLOURS = {"cat": (255, 0, 0), "dog": (0, 255, 0), "bird": (0, 0, 255)}


def picture(colour=(255, 0, 0), size=(8, 8), kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


def put(root, files):
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def tar_of(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            data = data.encode() if isinstance(data, str) else data
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def captions(source):
    return {item.key: item.caption for item in source.items}


def colours(source):
    return {item.key: np.asarray(item.open().convert("RGB"))[0, 0].tolist() for item in source.items}


def test_a_folder_is_read_in_the_order_of_names_whatever_the_disk_says(tmp_path):
    root = put(tmp_path, {"b/dog.JPG": picture(kind="JPEG"), "b/a.png": picture(), "z.webp": picture(kind="WEBP")})
    put(root, {".hidden.png": picture(), "__MACOSX/x.png": picture(), ".git/x.png": picture(), "note.md": "x"})
    assert [item.key for item in read_source(root).items] == ["b/a.png", "b/dog.JPG", "z.webp"]


def test_captions_come_from_text_files_and_metadata_jsonl_which_goes_first(tmp_path):
    put(tmp_path, {"cat.png": picture(), "cat.txt": "\ufeff a  cat\non a mat \n", "sub/dog.png": picture()})
    put(tmp_path, {"sub/dog.txt": "wrong", "bird.png": picture(), "bird.caption": "a bird"})
    put(tmp_path, {"metadata.jsonl": '{"file_name": "./sub/dog.png", "text": "a dog", "other": 1}\n\n'})
    source = read_source(tmp_path)
    assert captions(source) == {"bird.png": "a bird", "cat.png": "a cat on a mat", "sub/dog.png": "a dog"}
    assert source.skipped == []


def test_what_is_not_used_is_named(tmp_path):
    put(tmp_path, {"cat.png": picture(), "lost.txt": "no picture", "phone.heic": b"x", "more.tar": tar_of({})})
    put(tmp_path, {"metadata.jsonl": '{"file_name": "gone.png", "text": "gone"}'})
    put(tmp_path, {"latin.png": picture(), "latin.txt": "caf\xe9".encode("latin-1")})
    source = read_source(tmp_path)
    assert captions(source) == {"cat.png": ""}
    assert {name for name, _ in source.skipped} == {"lost.txt", "phone.heic", "more.tar", "gone.png", "latin.png"}
    assert "UTF-8" in dict(source.skipped)["latin.png"]


def test_tars_pair_pictures_with_text_or_json(tmp_path):
    first = {"d/1.png": picture(COLOURS["cat"]), "d/1.txt": "a cat", "d/1.json": '{"caption": "wrong"}'}
    second = {"2.JPG": picture(COLOURS["dog"], kind="JPEG"), "2.json": '{"prompt": "a dog"}', "3.txt": "lone"}
    put(tmp_path, {"a.tar": tar_of(first), "b.tar": tar_of(second)})
    source = read_source(tmp_path)
    assert captions(source) == {"a.tar/d/1.png": "a cat", "b.tar/2.JPG": "a dog"}
    assert colours(source)["a.tar/d/1.png"] == [255, 0, 0]
    assert source.skipped == [("b.tar/3", "a caption without a picture")]
    assert captions(read_source(tmp_path / "b.tar")) == {"b.tar/2.JPG": "a dog"}


def test_of_a_tar_that_was_cut_short_the_whole_samples_are_used(tmp_path):
    whole = tar_of({f"{i}.png": picture() for i in range(4)})
    put(tmp_path, {"a.tar": whole[: 2 * 1024 + 540]})  # two samples, and the start of a third
    source = read_source(tmp_path)
    assert list(captions(source)) == ["a.tar/0.png", "a.tar/1.png"]
    assert [name for name, _ in source.skipped] == ["a.tar"]


def test_a_folder_saved_by_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": picture(c), "path": None} for c in COLOURS.values()], "text": ["a cat", "a dog", None]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows["image"][1]["bytes"] = b"broken"
    table = datasets.Dataset.from_dict(rows, features)
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "saved"))
    source = read_source(tmp_path / "saved")
    assert captions(source) == {"row 0": "a cat", "row 1": "a dog", "row 2": ""}
    assert np.asarray(source.items[2].open())[0, 0].tolist() == [0, 0, 255]
    assert [file.suffix for file in source.files] == [".arrow"]
    with pytest.raises(InputError, match="row 1"):
        source.items[1].open()
    table.remove_columns("image").save_to_disk(str(tmp_path / "words"))
    with pytest.raises(InputError, match="no column of images"):
        read_source(tmp_path / "words")


def test_a_damaged_saved_folder_is_named(tmp_path):
    """Where `datasets` is missing, the message says so instead."""
    put(tmp_path / "saved", {"state.json": "{}", "dataset_info.json": "{}"})
    with pytest.raises(InputError, match="saved"):
        read_source(tmp_path / "saved")


def test_pictures_are_turned_as_their_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert read_source(tmp_path).items[0].open().size == (4, 8)


BAD = [
    ({}, "holds no images"),
    ({"a.txt": "x", "b.txt": "y"}, "2 captions but no images"),
    ({"metadata.jsonl": "{", "a.png": "x"}, "metadata.jsonl line 1 is not readable JSON"),
    ({"metadata.jsonl": "[1]", "a.png": "x"}, "line 1 holds no JSON object"),
    ({"metadata.jsonl": '\n{"text": "a"}', "a.png": "x"}, "line 2 names no image"),
    ({"metadata.jsonl": '{"file_name": "a.png", "text": 3}', "a.png": "x"}, "caption is int"),
    ({"metadata.jsonl": '{"file_name": "a.png"}\n{"file_name": "./a.png"}', "a.png": "x"}, "names a.png again"),
    ({"metadata.jsonl": b"\xff\xfe", "a.png": "x"}, "not UTF-8"),
    ({"x.tar": "no tar at all"}, "no image that can be used .*damaged"),
    ({"x.tar.gz": b"\x1f\x8b"}, "compressed"),
    ({"x.heic": "x"}, "heic files are not read"),
]


@pytest.mark.parametrize(("files", "message"), BAD, ids=[message for _, message in BAD])
def test_unusable_data_is_refused_in_one_line(tmp_path, files, message):
    with pytest.raises(InputError, match=message) as caught:
        read_source(put(tmp_path, files))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_path_and_a_lone_file_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_source(tmp_path / "gone")
    with pytest.raises(InputError, match="single file"):
        read_source(put(tmp_path, {"prompts.txt": "a cat"}) / "prompts.txt")


def test_prompts_are_the_lines_that_are_not_blank(tmp_path):
    put(tmp_path, {"prompts.txt": "\ufeffa cat\r\n\n  # a dog  \nein B\u00e4r"})
    assert read_prompts(tmp_path / "prompts.txt") == ["a cat", "# a dog", "ein B\u00e4r"]
    for data in (b"", b" \n\n", b"\xff\xff"):
        put(tmp_path, {"prompts.txt": data})
        with pytest.raises(InputError, match=r"prompts\.txt"):
            read_prompts(tmp_path / "prompts.txt")


# --- fuzz: whatever the files hold, the answer is a list or an InputError ---------------------------------------------

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from(["a.png", "./a.png", "../a.png", "b/a.png", "", "\0", "\ud800", "/", "a" * 300]) | st.text()
records = st.dictionaries(st.sampled_from(["text", "caption", "prompt", "x"]), json_values).flatmap(
    lambda record: (names | json_values).map(lambda name: {**record, "file_name": name})
)


def use(path):
    """Read all that there is. Anything but an InputError is a bug."""
    try:
        source = read_source(path)
    except InputError:
        return
    for item in source.items:
        assert isinstance(item.caption, str)
        item.caption.encode()  # whole characters only, or tokenizers fail
        json.dumps([item.key, source.skipped])
        try:
            item.open()
        except InputError:
            continue


@FUZZ
@given(st.lists(records.map(json.dumps) | st.text(), max_size=4).map("\n".join) | st.binary())
def test_any_metadata_jsonl_is_read_or_refused(content):
    with tempfile.TemporaryDirectory() as folder:
        data = content if isinstance(content, bytes) else content.encode("utf-8", "replace")
        use(put(Path(folder), {"a.png": picture(), "metadata.jsonl": data}))


WHOLE = tar_of({"a.png": picture(), "a.txt": "a cat", "b.jpg": picture(kind="JPEG"), "b.json": '{"text": "b"}'})


@FUZZ
@given(
    st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=12),
    st.integers(0, len(WHOLE)),
)
def test_any_damage_to_a_tar_is_read_or_refused(changes, length):
    data = bytearray(WHOLE)
    for place, value in changes:
        data[place] = value
    with tempfile.TemporaryDirectory() as folder:
        use(put(Path(folder), {"x.tar": bytes(data[:length])}))


@FUZZ
@given(st.sampled_from(["size", "name", "type", "all"]), st.binary(max_size=1200))
def test_any_tar_header_is_read_or_refused(field, noise):
    """With a checksum that is right, so that the fields themselves are looked at."""
    places = {"size": (124, 12), "name": (0, 100), "type": (156, 1), "all": (0, 512)}
    start, length = places[field]
    header = bytearray(WHOLE[:512])
    header[start : start + length] = noise[:length].ljust(length, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    with tempfile.TemporaryDirectory() as folder:
        use(put(Path(folder), {"x.tar": bytes(header) + WHOLE[512:]}))


@FUZZ
@given(st.binary() | st.text().map(lambda text: text.encode("utf-8", "replace")))
def test_any_prompts_file_is_read_or_refused(data):
    with tempfile.TemporaryDirectory() as folder:
        put(Path(folder), {"prompts.txt": data})
        try:
            assert all(prompt.strip() for prompt in read_prompts(Path(folder) / "prompts.txt"))
        except InputError:
            return


@FUZZ
@given(
    st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF", "BMP"]),
    st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=8),
    st.floats(0, 1),
)
def test_any_damaged_picture_is_decoded_or_refused(kind, changes, share):
    data = bytearray(picture(size=(24, 16), kind=kind))
    for place, value in changes:
        data[int(place * len(data))] = value
    with tempfile.TemporaryDirectory() as folder:
        use(put(Path(folder), {f"a.{kind.lower()}": bytes(data[: int(share * len(data))])}))

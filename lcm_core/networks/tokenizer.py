"""CLIP's tokenizer: finding its files without a network, and prompts as rows of 77 numbers."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcm_core.errors import InputError
from lcm_core.files.checkpoint import TOKENIZER_KEY, Checkpoint, ModelPath
from lcm_core.files.reading import check_text, open_file, parse_json, read_text
from lcm_core.files.safetensors import PathLike, check_file, read_metadata

TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""All files that a CLIP tokenizer consists of; no other name is read or written, whatever a model's file says."""
CLIP_WORDS = Path(__file__).parents[1] / "models" / "clip_tokenizer" / "merges.txt.gz"
"""CLIP's byte-pair merges, which come with this package."""
_CLIP_VOCABULARY = 49408
_BPE_LIMIT = 16 * 2**20  # bytes, unpacked; CLIP's list has 3 MB
_CLIP_MERGES = 49152 - 256 - 2  # what CLIP uses of the longer list
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


class Tokenizer:
    """Prompts to token numbers, all rows of one length.

    Args:
        tokenizer: a transformers CLIPTokenizer.
        length: tokens per row, start and end included.
        pad: number that fills the rows; None takes the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, length: int = 77, pad: int | None = None) -> None:
        self.tokenizer, self.length = tokenizer, length
        self.pad: int = tokenizer.pad_token_id if pad is None else pad
        if None in (self.pad, tokenizer.bos_token_id, tokenizer.eos_token_id):
            raise InputError("the tokenizer has no token for start, end or padding; get its files again")

    def __call__(self, prompt: str) -> list[int]:
        """Token numbers of one prompt. What does not fit is left out, with a warning that names it.

        Raises:
            InputError: it holds a null byte or half a character.
        """
        words = self.words(prompt)
        room = self.length - 2
        if len(words) > room:
            lost = self.tokenizer.decode(words[room:]).strip()
            warnings.warn(f"the prompt is longer than {room} tokens; left out: '{lost}'", stacklevel=2)
        return self.row(words[:room])

    def words(self, text: str) -> list[int]:
        """Token numbers of a text, however many, without start and end.

        Raises:
            InputError: it holds a null byte or half a character.
        """
        check_text("prompt", text)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def row(self, words: Sequence[int]) -> list[int]:
        """Up to `length - 2` token numbers with start, end and padding."""
        ids = [self.tokenizer.bos_token_id, *words, self.tokenizer.eos_token_id]
        return ids + [self.pad] * (self.length - len(ids))

    def token(self, text: str) -> int | None:
        """The number of one token, None where the vocabulary lacks it."""
        number: int | None = self.tokenizer.get_vocab().get(text)
        return number


def find_tokenizer(model: ModelPath, tokenizer: PathLike | None = None, name: str = "tokenizer") -> Any:
    """The transformers CLIPTokenizer of a model, without a network.

    Args:
        model, tokenizer, name: see `find_tokenizer_files`.

    Raises:
        InputError: there is none, or it is damaged.
    """
    return build_tokenizer(*find_tokenizer_files(model, tokenizer, name))


def find_tokenizer_files(
    model: ModelPath, tokenizer: PathLike | None = None, name: str = "tokenizer"
) -> tuple[dict[str, str], Path]:
    """The files of a model's tokenizer, name to text, and where they were found.

    From the first of these that exists: the folder given; the model's own folder, or a single file's metadata; a folder
    beside a single file; for a single file with CLIP's number of words, CLIP's own list.

    Args:
        model: folder or single file of the model, opened or not.
        tokenizer: a folder with `vocab.json` and `merges.txt` (or a model's folder that has one), or CLIP's
            `bpe_simple_vocab_16e6.txt.gz`.
        name: "tokenizer" or "tokenizer_2".

    Raises:
        InputError: there is none, or a file cannot be read.
    """
    root = model.path if isinstance(model, Checkpoint) else Path(model)
    if tokenizer is not None:
        return _read_given(Path(tokenizer), name)
    if root.is_file() and (files := read_tokenizer_files(model)):
        return files, root
    near = [root, root.parent] if root.is_dir() else [root.with_suffix(""), root.parent]
    for folder in (place / kind for kind in (name, "tokenizer") for place in near):
        if _has_words(folder):
            return read_tokenizer_folder(folder), folder
    if root.is_file() and _has_clip_words(root):
        return _clip_files(CLIP_WORDS), CLIP_WORDS
    raise InputError(
        f"{root} has no tokenizer; put its tokenizer folder (vocab.json, merges.txt) beside it, or name one"
    )


def _has_clip_words(file: Path) -> bool:
    """Whether the text encoders in a single file have as many words as CLIP, and none has words of its own."""
    header = check_file(file)
    shapes = [value.get("shape") for key, value in header.items() if key.endswith("token_embedding.weight")]
    return bool(shapes) and all(isinstance(shape, list) and shape[:1] == [_CLIP_VOCABULARY] for shape in shapes)


def read_tokenizer_files(model: ModelPath) -> dict[str, str]:
    """The tokenizer's files that one of our own single files carries in its metadata, name to text; else empty.

    Only those of `TOKENIZER_FILES`: the names come from outside, and files of these names are written by `export`.

    Raises:
        InputError: the metadata are broken.
    """
    file, metadata = (model.path, model.metadata) if isinstance(model, Checkpoint) else (model, read_metadata(model))
    where = f"the metadata '{TOKENIZER_KEY}' of {os.fspath(file)}"
    files = parse_json(metadata.get(TOKENIZER_KEY, "{}"), where, "export it again")
    for name, text in files.items():
        if name not in TOKENIZER_FILES:
            warnings.warn(f"{where} holds a file {name!r}, which is not used", stacklevel=2)
        elif not isinstance(text, str):
            raise InputError(f"{where} holds no text for {name}; export it again")
    return _check_json({name: text for name, text in files.items() if name in TOKENIZER_FILES}, file)


def read_tokenizer_folder(folder: Path) -> dict[str, str]:
    """The tokenizer's files in a folder, name to text.

    Raises:
        InputError: one of them cannot be read, or is no JSON where it should be.
    """
    return _check_json({name: read_text(folder / name) for name in TOKENIZER_FILES if (folder / name).exists()}, folder)


def _check_json(files: dict[str, str], source: PathLike) -> dict[str, str]:
    """The files, which are copied as they are, once it is sure that a reader of the copy can read them."""
    for name, text in files.items():
        if name.endswith(".json"):
            parse_json(text, f"{name} of {os.fspath(source)}")
    return files


def build_tokenizer(files: Mapping[str, str], source: Path) -> Any:
    """A transformers CLIPTokenizer of files, name to text.

    Raises:
        InputError: they are damaged.
    """
    ready = _checked(files, source)
    if source.is_dir() and ready == files:
        return _from_folder(source, source)
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name, text in ready.items():
                (Path(folder) / name).write_text(text, encoding="utf-8")
            return _from_folder(Path(folder), source)
    except OSError as error:
        raise InputError(f"cannot write a temporary file: {error.strerror}; free some space") from error


def _checked(files: Mapping[str, str], source: Path) -> dict[str, str]:
    """The files, where they are what they should be, without what leads elsewhere."""
    ready = dict(files)
    for name in ready.keys() & {"vocab.json", "tokenizer_config.json"}:
        content = parse_json(files[name], f"{name} of {source}")
        if name == "vocab.json" and not all(type(number) is int and 0 <= number < 2**31 for number in content.values()):
            raise InputError(f"{source} holds no usable CLIP tokenizer (a word without number); get its files again")
        if name == "tokenizer_config.json" and type(content.get("model_max_length", 77)) not in (int, float):
            raise InputError(f"{source} holds no usable CLIP tokenizer (its length is no number); get its files again")
        if name == "tokenizer_config.json":  # it may name files of its own, anywhere on the disk
            own = {key: value for key, value in content.items() if not key.endswith("_file") and key != "auto_map"}
            ready[name] = files[name] if own == content else json.dumps(own)
    return ready


def _from_folder(folder: Path, source: Path) -> Any:
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing more precise
        reason = " ".join(str(error).replace(str(folder), str(source)).split())
        raise InputError(f"{source} holds no usable CLIP tokenizer ({reason}); get its files again") from error


def _read_given(path: Path, name: str) -> tuple[dict[str, str], Path]:
    if path.name.endswith(".txt.gz"):
        return _clip_files(path), path
    folder = path / name if (path / name).is_dir() else path
    folder = path / "tokenizer" if not (folder / "vocab.json").is_file() and (path / "tokenizer").is_dir() else folder
    if not _has_words(folder):
        raise InputError(f"{path} has no vocab.json; give a folder with CLIP's vocab.json and merges.txt")
    return read_tokenizer_folder(folder), folder


def _has_words(folder: Path) -> bool:
    return (folder / "vocab.json").exists() or (folder / "tokenizer.json").exists()


def _clip_files(bpe: Path) -> dict[str, str]:
    """CLIP's vocabulary from its merges: 256 bytes, the same ending a word, one token per merge, start and end."""
    try:
        with open_file(bpe) as stream, gzip.open(stream) as unpacked:
            lines = unpacked.read(_BPE_LIMIT).decode("utf-8").split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{bpe} is not CLIP's word list ({error}); get it again") from error
    merges = lines[1 : _CLIP_MERGES + 1]
    letters = _byte_letters()
    tokens = (
        letters + [letter + "</w>" for letter in letters] + [merge.replace(" ", "") for merge in merges] + [BOS, EOS]
    )
    config = {"model_max_length": 77, "bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
    return {
        "vocab.json": json.dumps({token: number for number, token in enumerate(tokens)}),
        "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
        "tokenizer_config.json": json.dumps({"tokenizer_class": "CLIPTokenizer", "do_lower_case": True, **config}),
    }


def _byte_letters() -> list[str]:
    """A visible letter for each of the 256 bytes, in CLIP's order: those that are visible already come first."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    return [chr(byte) for byte in visible] + [chr(256 + i) for i in range(len(hidden))]

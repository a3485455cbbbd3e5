"""CLIP's tokenizer: finding its files without a network, and prompts as rows of 77 numbers."""

from __future__ import annotations

import gzip
import json
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcm_core.errors import InputError
from lcm_core.files.checkpoint import read_tokenizer_files
from lcm_core.files.safetensors import PathLike, check_file

CLIP_WORDS = Path(__file__).parent / "models" / "clip_tokenizer" / "merges.txt.gz"
"""CLIP's byte-pair merges, which come with this package."""
_CLIP_VOCABULARY = 49408
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

    def __call__(self, prompt: str) -> list[int]:
        """Token numbers of one prompt. What does not fit is left out, with a warning that names it."""
        words = self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        room = self.length - 2
        if len(words) > room:
            lost = self.tokenizer.decode(words[room:]).strip()
            warnings.warn(f"the prompt is longer than {room} tokens; left out: '{lost}'", stacklevel=2)
        ids = [self.tokenizer.bos_token_id, *words[:room], self.tokenizer.eos_token_id]
        return ids + [self.pad] * (self.length - len(ids))


def find_tokenizer(model: PathLike, tokenizer: PathLike | None = None, name: str = "tokenizer") -> Any:
    """The transformers CLIPTokenizer of a model, without a network.

    From the first of these that exists: the folder given; the model's own folder, or a single file's metadata; a folder
    beside a single file; for a single file with CLIP's number of words, CLIP's own list.

    Args:
        model: folder or single file of the model.
        tokenizer: a folder with `vocab.json` and `merges.txt` (or a model's folder that has one), or CLIP's
            `bpe_simple_vocab_16e6.txt.gz`.
        name: "tokenizer" or "tokenizer_2".

    Raises:
        InputError: there is none, or it is damaged.
    """
    root = Path(model)
    if tokenizer is not None:
        return _load(Path(tokenizer), name)
    if root.is_file() and (files := read_tokenizer_files(root)):
        return _from_files(files)
    near = [root, root.parent] if root.is_dir() else [root.with_suffix(""), root.parent]
    for folder in (place / kind for kind in (name, "tokenizer") for place in near):
        if (folder / "vocab.json").is_file() or (folder / "tokenizer.json").is_file():
            return _load(folder, name)
    if root.is_file() and _has_clip_words(root):
        return _from_files(_clip_files(CLIP_WORDS))
    raise InputError(
        f"{root} has no tokenizer; put its tokenizer folder (vocab.json, merges.txt) beside it, or name one"
    )


def _has_clip_words(file: Path) -> bool:
    """Whether the text encoders in a single file have as many words as CLIP, and none has words of its own."""
    header = check_file(file)
    rows = {header[key]["shape"][0] for key in header if key.endswith("token_embedding.weight")}
    return rows == {_CLIP_VOCABULARY}


def _load(path: Path, name: str) -> Any:
    if path.name.endswith(".txt.gz"):
        return _from_files(_clip_files(path))
    folder = path / name if (path / name).is_dir() else path
    folder = path / "tokenizer" if not (folder / "vocab.json").is_file() and (path / "tokenizer").is_dir() else folder
    if not (folder / "vocab.json").is_file() and not (folder / "tokenizer.json").is_file():
        raise InputError(f"{path} has no vocab.json; give a folder with CLIP's vocab.json and merges.txt")
    return _from_folder(folder)


def _from_folder(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing more precise
        reason = str(error).splitlines()[0]
        raise InputError(f"{folder} holds no usable CLIP tokenizer ({reason}); get its files again") from error


def _from_files(files: Mapping[str, str]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / Path(name).name).write_text(text, encoding="utf-8")
        return _from_folder(Path(folder))


def _clip_files(bpe: Path) -> dict[str, str]:
    """CLIP's vocabulary from its merges: 256 bytes, the same ending a word, one token per merge, start and end."""
    try:
        lines = gzip.decompress(bpe.read_bytes()).decode("utf-8").split("\n")
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

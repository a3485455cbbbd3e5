"""Safetensors and JSON files of our own and of others: damage is found, and nothing but plain files is opened."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lcm_core.errors import InputError
from lcm_core.files.safetensors import CHECKSUM_KEY, check_checksum, read_safetensors, write_safetensors

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.ones(3, dtype=torch.bfloat16),
    "empty": torch.tensor([]),
    "mask": torch.tensor([True, False]),
    "scalar": torch.tensor(7, dtype=torch.int64),
}


def test_file_of_our_own_passes_its_checksum(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write_safetensors(file, TENSORS, {"lcm_suite.kind": "lcm", "other": "x"})
    tensors, metadata = read_safetensors(file)
    check_checksum(file, tensors, metadata)
    check_checksum(file, tensors, metadata | {"added": "by another program"})
    check_checksum(file, {}, {"format": "pt"})  # states none
    write_safetensors(file, {"a": TENSORS["a"]}, metadata)  # a stale checksum is not carried along
    check_checksum(file, *read_safetensors(file))


def test_flipped_bit_of_the_weights_is_found(tmp_path: Path) -> None:
    """safetensors itself has no checksum: any bit of the weights may flip and the file still opens."""
    file = tmp_path / "a.safetensors"
    write_safetensors(file, TENSORS)
    whole = file.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    assert len(whole) - start == 24 + 6 + 2 + 8
    for place in range(start, len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        file.write_bytes(flipped)
        tensors, metadata = read_safetensors(file)
        with pytest.raises(InputError, match=r"a\.safetensors is damaged, or another program changed it"):
            check_checksum(file, tensors, metadata)


@pytest.mark.parametrize("change", ["name", "shape", "dtype", "metadata"])
def test_other_description_of_the_same_bytes_is_found(change: str) -> None:
    from lcm_core.files.safetensors import checksum

    tensors, metadata = {"a": torch.arange(4.0)}, {"lcm_suite.kind": "lcm"}
    stated = metadata | {CHECKSUM_KEY: checksum(tensors, metadata)}
    if change == "metadata":
        stated["lcm_suite.kind"] = "tcd"
    other = {"name": {"b": tensors["a"]}, "shape": {"a": tensors["a"].reshape(2, 2)}}
    other |= {"dtype": {"a": tensors["a"].view(torch.int32)}, "metadata": tensors}
    with pytest.raises(InputError, match="its checksum is not"):
        check_checksum("a", other[change], stated)

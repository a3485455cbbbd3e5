"""How long training from a large cache takes to start, and how much memory its batches take.

    python benchmarks/cache_start.py FOLDER --pictures 1000000

makes a cache of that many pictures whose latents and text embeddings are all zeros, in sparse files that take hardly
any disk, then starts from it in a process of its own and prints one line of JSON: seconds until the first batch (and of
these, of the processor), seconds for each batch, and the memory of its own that the process has then, libraries
included (what it maps from files does not count).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainer.data.cache import CachePlan, plan_cache
from trainer.data.index import index_path, write_index
from trainer.data.rows import CHECKSUMS, LATENTS, NUMBERS, SKIPPED, TEXT_CHECKSUMS, TIME_IDS
from trainer.data.settings import DataConfig
from trainer.data.shards import Shards, remember_whole
from trainer.data.teacher import Teacher
from trainer.distributed import Processes

LATENT, TEXT = (4, 64, 64), (77, 768)  # of SD 1.5 at 512 pixels
BATCHES, BATCH_SIZE = 50, 32
_TYPES = {torch.float16: "F16", torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8"}


@dataclass
class Captions:
    """Stands for the pictures of a data set."""

    captions: list[str]
    repeats: tuple[int, ...] = ()
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def identity(self) -> dict[str, Any]:
        """Nothing real."""
        return {"synthetic": len(self.captions)}

    def load(self, device: torch.device) -> Any:
        """Never asked: the cache is whole."""
        raise AssertionError("pictures were asked for, though the cache is whole")


def write_sparse(path: Path, zeros: dict[str, tuple[int, ...]], tensors: dict[str, torch.Tensor]) -> None:
    """A safetensors file with float16 zeros of some shapes, which are holes, behind some real tensors."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape)}
        header[name]["data_offsets"] = [end, end := end + tensor.nbytes]
    for name, shape in zeros.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end := end + size]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.numpy().tobytes())
        file.truncate(8 + len(text) + end)


def make(folder: Path, pictures: int) -> None:
    """The cache."""
    data, config, teacher = Captions([f"picture {i}" for i in range(pictures)]), DataConfig(path="x"), Teacher("emoji")
    captions = ["", *data.captions]
    latents = Shards(folder / "latents", data.identity(), pictures, config.shard_size)
    texts = Shards(folder / "text", {"captions": pictures}, len(captions), config.shard_size)
    nothing = torch.frombuffer(bytearray(b"[]"), dtype=torch.uint8)
    for shards, shape in ((latents, LATENT), (texts, TEXT)):
        shards.begin()
        code = zlib.crc32(bytes(2 * torch.Size(shape).numel()))
        for index in range(len(shards)):
            numbers = torch.tensor(shards.numbers(index))
            sums = torch.full((len(numbers),), code)
            if shards is texts:
                zeros = {"encoder_hidden_states": (len(numbers), *shape)}
                write_sparse(shards.path(index), zeros, {TEXT_CHECKSUMS: sums})
                continue
            sizes = torch.tensor([[512, 512, 0, 0, 512, 512]] * len(numbers), dtype=torch.int32)
            held = {CHECKSUMS + "64x64": sums, NUMBERS + "64x64": numbers, TIME_IDS + "64x64": sizes, SKIPPED: nothing}
            write_sparse(shards.path(index), {LATENTS + "64x64": (len(numbers), *shape)}, held)
    plan = CachePlan(config, teacher, data, captions, latents, texts)
    write_index(plan, index_path(plan))
    for shards in (latents, texts):
        remember_whole(shards.folder)


def own_memory() -> int:
    """Bytes that this process holds and that are no mapped files'; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def start(folder: Path) -> dict[str, float]:
    """What one process of a run does with it."""
    Teacher("emoji").hash_text()  # loads the libraries, which every run does
    started, worked = time.perf_counter(), time.process_time()
    plan = plan_cache(DataConfig(path=str(folder)), Teacher("emoji"), folder, Processes())
    cache = plan.fill(torch.device("cpu"), Processes())
    generator = torch.Generator().manual_seed(0)
    cache.batch(BATCH_SIZE, generator)
    ready, working = time.perf_counter(), time.process_time()
    for _ in range(BATCHES):
        cache.batch(BATCH_SIZE, generator)
    return {
        "pictures": len(cache),
        "start_seconds": round(ready - started, 3),
        "start_processor_seconds": round(working - worked, 3),
        "batch_seconds": round((time.perf_counter() - ready) / BATCHES, 4),
        "memory_mb": round(own_memory() / 1e6),
    }


def main() -> None:
    """Make it if it is not there, then start from it."""
    parser = argparse.ArgumentParser(description="Start-up and memory of a large cache.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=1_000_000)
    parser.add_argument("--start", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start:
        print(json.dumps(start(args.folder)))
        return
    if not args.folder.exists():
        args.folder.mkdir(parents=True)
        make(args.folder, args.pictures)
    command = [sys.executable, __file__, str(args.folder), "--start"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})


if __name__ == "__main__":
    main()

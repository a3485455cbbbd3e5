"""Runs inside a real ComfyUI's Python: a step of LCM Distiller on a transformer of 500 million random 8-bit weights.

Usage: python host_memory.py CHECKOUT FOLDER (weights | ours | plain). Writes the weights and prints their number; or
prints the bytes of this process's own memory that a run took at its peak, or that the same step by plain autograd on
bfloat16 weights took. On a CPU the weights are offloaded to a file: its pages are not the process's own, and are read
again when a layer runs.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from host_start import load_suite, start

FOLDER, WHAT = Path(sys.argv[2]), sys.argv[3]
start(Path(sys.argv[1]), FOLDER)

import comfy.model_patcher  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from host_models import CONFIGS, SIZES, empty, prompt  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

DEPTH = 15  # of SD 3's transformer, which is 64 times as wide
CPU = torch.device("cpu")


def own_bytes() -> int:
    """Memory of this process that is not a file's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("RssAnon:")).split()[1])


@contextmanager
def peak() -> Iterator[list[int]]:
    """The most that is taken within this context, beyond what was there before, as the list's only entry."""
    before, found, done = own_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            found[0] = max(found[0], own_bytes() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join(10)


def make_model(dtype: torch.dtype, state: dict[str, Any] | None) -> Any:
    """A MODEL of random weights, or of those of a file."""
    sizes = copy.deepcopy(SIZES["SD3"]) | {"depth": DEPTH}
    sizes["context_embedder_config"]["params"]["out_features"] = 64 * DEPTH
    config = CONFIGS["SD3"](sizes)
    config.set_inference_dtype(dtype, torch.float32)
    base = config.get_model({}, "", device=torch.device("meta"))
    network = base.diffusion_model
    if state is None:
        generator = torch.Generator().manual_seed(0)
        network.to_empty(device="cpu")
        for weight in network.parameters():
            weight.data = (0.02 * torch.randn(weight.shape, generator=generator)).to(dtype)
    else:
        network.load_state_dict(state, assign=True, strict=False)
    return comfy.model_patcher.ModelPatcher(base, CPU, CPU, size=1)


def lay_out(file: Path) -> int:
    """Write the weights; returns their number."""
    network = make_model(torch.float8_e4m3fn, None).model.diffusion_model
    save_file({name: weight.contiguous() for name, weight in network.state_dict().items()}, file)
    return sum(weight.numel() for weight in network.parameters())


def plain_step(model: Any) -> None:
    """The forward and backward pass alone, on weights in bfloat16, with gradients for the input only."""
    network = model.model.diffusion_model.to(torch.bfloat16)
    x = torch.randn(1, 16, 16, 16, dtype=torch.bfloat16, requires_grad=True)
    text, others = prompt("SD3", 1)[0]
    pooled = others["pooled_output"].bfloat16()
    network(x, torch.full((1,), 500.0), context=text.bfloat16(), y=pooled).float().square().mean().backward()


def distil(file: Path) -> None:
    """Two steps of the node, from the loading of the weights on."""
    node = load_suite()["LCMDistiller"]
    prompts = {"positive": prompt("SD3", 1), "negative": prompt("SD3", 2)}
    options = {"output_name": "memory", "steps": 2, "batch_size": 1, "rank": 4, "w": 1.0, "preview_every": 2}
    with peak() as found, torch.inference_mode():
        model = make_model(torch.float8_e4m3fn, comfy.utils.load_torch_file(str(file)))
        node.EXECUTE_NORMALIZED(model=model, latents={"samples": empty("SD3", 16) + 1}, **prompts, **options)
    print(found[0])


def main() -> None:
    """Do one of the three, each in a process of its own: what is freed stays with a process."""
    file = FOLDER / "weights.safetensors"
    if WHAT == "weights":
        print(lay_out(file))
    elif WHAT == "ours":
        distil(file)
    else:
        with peak() as found:
            plain_step(make_model(torch.bfloat16, None))
        print(found[0])


if __name__ == "__main__":
    main()

"""A 512x512 picture of Stable Diffusion 1.5's size on a CPU: lcm_core beside diffusers and OpenVINO, in one run.

    python benchmarks/cpu_sd15.py               # several minutes, 10 GB of memory, 3 GB of temporary files
    python benchmarks/cpu_sd15.py --size tiny   # seconds; shows that it runs, its times say nothing

Weights are random and made here, nothing is downloaded. Compared are
- one call of the U-Net: diffusers as it is (float32), OpenVINO at its defaults (which compute in bfloat16 where the
  processor can; `pip install openvino`), and lcm_core; with each one's deviation from float32;
- one picture, 4 steps, from prompt to pixels: diffusers' LatentConsistencyModelPipeline at its defaults with the full
  VAE, and lcm_core's pipeline with the tiny VAE.
- the same picture beside one process that keeps a core busy.
Contestants take turns, after one call each that does not count, and the medians are printed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcm_core.pipeline import Pipeline

PROMPT = "a slice of pizza on a wooden table, studio light"
BARS = {"unet": 1.15, "picture": 3.9, "busy": 2.5}
"""The bars: at least this many times as fast as OpenVINO's U-Net, as diffusers' picture, and as that beside a busy
process."""
BUSY = "while True: pass"
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "sd15": {
        "unet": {"sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768},
        "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
        "tiny_vae": {},
        "text": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    },
    "tiny": {
        "unet": {
            "sample_size": 8,
            "attention_head_dim": 2,
            "cross_attention_dim": 32,
            "block_out_channels": (32, 32, 64, 64),
            "layers_per_block": 1,
        },
        "vae": {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
        "tiny_vae": {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4},
        "text": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="sd15", help="architecture (default sd15)")
    parser.add_argument("--rounds", type=int, default=3, help="pictures per contestant (default 3)")
    parser.add_argument("--calls", type=int, default=5, help="U-Net calls per contestant (default 5)")
    parser.add_argument("--no-openvino", action="store_true", help="leave OpenVINO out although it is installed")
    args = parser.parse_args()
    silence_libraries()
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), SIZES[args.size])
        theirs, ours = load_diffusers(Path(folder)), Pipeline.load(folder, "cpu", vae=Path(folder) / "tiny_vae")
        use_openvino = not args.no_openvino and has_openvino()
        print_machine()
        unet_ratio = compare_unets(theirs, ours, args.calls, Path(folder) if use_openvino else None)
        ratios = {"unet": unet_ratio, "picture": compare_pictures(theirs, ours, args.rounds)}
        with subprocess.Popen([sys.executable, "-c", BUSY]) as neighbour:
            try:
                ratios["busy"] = compare_pictures(theirs, ours, args.rounds, " beside a busy process")
            finally:
                neighbour.kill()
    if args.size == "sd15":
        print_verdicts(ratios)


def silence_libraries() -> None:
    """Leave the table alone on the screen: no progress bars, no notes on what is not installed or traced."""
    import diffusers
    import transformers

    warnings.filterwarnings("ignore")
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def make_model(folder: Path, size: dict[str, dict[str, Any]]) -> None:
    """Write a latent consistency model with random weights as a diffusers folder, and a tiny VAE inside it."""
    from diffusers import AutoencoderKL, AutoencoderTiny, LatentConsistencyModelPipeline, LCMScheduler
    from diffusers import UNet2DConditionModel as UNet
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = make_tokenizer(folder / "tokenizer")
    words = len(tokenizer)
    text = CLIPTextConfig(vocab_size=words, bos_token_id=words - 2, eos_token_id=words - 1, **size["text"])
    downs, ups = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    LatentConsistencyModelPipeline(
        vae=AutoencoderKL(latent_channels=4, down_block_types=downs, up_block_types=ups, **size["vae"]),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=UNet(time_cond_proj_dim=256, **size["unet"]),
        scheduler=LCMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float16).save_pretrained(folder)
    AutoencoderTiny(**size["tiny_vae"]).save_pretrained(folder / "tiny_vae")


def make_tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer without its merges: every letter is a token, which costs the text encoder no more time."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def load_diffusers(folder: Path) -> Any:
    from diffusers import LatentConsistencyModelPipeline

    pipe = LatentConsistencyModelPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def has_openvino() -> bool:
    try:
        version = importlib.metadata.version("openvino")
    except importlib.metadata.PackageNotFoundError:
        print("OpenVINO is not installed, its row is left out (pip install openvino)")
        return False
    print(f"OpenVINO {version}")
    return True


def print_machine() -> None:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    features = [flag for flag in ("avx512_bf16", "amx_bf16") if any(flag in line for line in lines)]
    print(
        f"{name}, {torch.get_num_threads()} threads, {', '.join(features) or 'no bfloat16'}; torch {torch.__version__}"
    )


class PlainUNet(torch.nn.Module):
    """diffusers' U-Net with nothing but tensors going in and out, which is what OpenVINO can convert."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, text: Tensor, timestep_cond: Tensor) -> Tensor:
        return self.unet(x, t, text, timestep_cond=timestep_cond, return_dict=False)[0]


def compare_unets(theirs: Any, ours: Pipeline, calls: int, folder: Path | None) -> float | None:
    """One call on one picture's latents. Returns how many times as fast as OpenVINO lcm_core is.

    `folder` is where OpenVINO's model may be written; None leaves it out.
    """
    config, generator = theirs.unet.config, torch.Generator().manual_seed(1)
    shapes = [(1, 4, config.sample_size, config.sample_size), (1, 77, config.cross_attention_dim), (1, 256)]
    x, text, embedding = (torch.randn(shape, generator=generator) for shape in shapes)
    inputs = (x, torch.tensor([499.0]), text, embedding)
    reference, fast = PlainUNet(theirs.unet), ours.model.unet
    name = f"lcm_core, {str(fast.dtype).removeprefix('torch.')}"
    contestants = {"diffusers, float32": lambda: reference(*inputs), name: lambda: fast(*inputs)}
    if folder is not None:
        contestants["OpenVINO"] = convert_for_openvino(reference, inputs, folder / "openvino.xml")
    times, outputs = measure(contestants, calls)
    exact = outputs["diffusers, float32"]
    remarks = {key: f"deviates by {float((out - exact).norm() / exact.norm()):.1e}" for key, out in outputs.items()}
    print_table(f"U-Net, one call, latents {tuple(x.shape)}", times, remarks)
    return None if folder is None else times["OpenVINO"] / times[name]


def convert_for_openvino(unet: PlainUNet, inputs: tuple[Tensor, ...], file: Path) -> Callable[[], Tensor]:
    """The U-Net compiled by OpenVINO for low latency, with all else at its defaults."""
    import openvino

    print("converting the U-Net for OpenVINO, which takes a while", flush=True)
    model = openvino.convert_model(unet, example_input=inputs)
    model.reshape({port: list(tensor.shape) for port, tensor in zip(model.inputs, inputs, strict=True)})
    openvino.save_model(model, file)  # in float16; so that the float32 weights need not stay in memory
    del model
    compiled = openvino.Core().compile_model(file, "CPU", {"PERFORMANCE_HINT": "LATENCY"})
    print(f"OpenVINO computes in {compiled.get_property('INFERENCE_PRECISION_HINT').to_string()}")
    request, arrays = compiled.create_infer_request(), [tensor.numpy() for tensor in inputs]
    return lambda: torch.from_numpy(request.infer(arrays)[0].copy())


def compare_pictures(theirs: Any, ours: Pipeline, rounds: int, where: str = "") -> float:
    """One picture, from prompt to pixels. Returns how many times as fast as diffusers lcm_core is."""
    contestants = {
        "diffusers, float32, full VAE": lambda: theirs(PROMPT).images[0],
        f"lcm_core, {str(ours.model.unet.dtype).removeprefix('torch.')}, tiny VAE": lambda: ours(PROMPT).images[0],
    }
    times, pictures = measure(contestants, rounds)
    sizes = {name: "x".join(map(str, picture.size)) for name, picture in pictures.items()}
    print_table(f"One picture, 4 steps, from prompt to pixels{where}", times, sizes)
    slow, fast = times.values()
    return slow / fast


def measure(contestants: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds of each contestant, and what it returned. They take turns, so that a busy moment hits all."""
    outputs = {name: run() for name, run in contestants.items()}  # the first call warms up
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}, outputs


def print_table(title: str, times: dict[str, float], remarks: dict[str, str]) -> None:
    print(f"\n{title}")
    slowest = next(iter(times.values()))
    for name, seconds in times.items():
        print(f"{name:32} {seconds:7.3f} s {slowest / seconds:6.2f} x   {remarks[name]}")


def print_verdicts(ratios: dict[str, float | None]) -> None:
    print()
    others = {"unet": "OpenVINO's U-Net", "picture": "diffusers' picture", "busy": "that beside a busy process"}
    for bar, other in others.items():
        if (ratio := ratios[bar]) is not None:
            verdict = "ok" if ratio >= BARS[bar] else "TOO SLOW"
            print(f"{ratio:.2f} times as fast as {other}: {verdict} (bar {BARS[bar]})")


if __name__ == "__main__":
    main()

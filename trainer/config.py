"""Everything that `python -m trainer distill` can be told; a method's own settings are in `trainer.methods.config`.

Settings come from, in rising order: the defaults below, a preset, a file (TOML or JSON), flags. This file loads no
other library, so that `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from trainer.data.settings import DataConfig
from trainer.methods.config import LcdConfig, MethodConfig


@dataclass(frozen=True)
class StudentConfig:
    """What is trained."""

    kind: str = "lora"
    """lora (small file for any checkpoint of the family; one U-Net in memory) or full (a U-Net that reads guidance)."""
    rank: int = 64
    """Width of the LoRA."""
    alpha: float = 0.0
    """The LoRA is scaled by alpha / rank; 0 takes the rank."""
    target_modules: tuple[str, ...] = ()
    """Ends of the names of the layers that get a LoRA; none stands for those of LCM-LoRA."""
    guidance_embedding_dim: int = 256
    """Width of a full student's guidance input."""
    start: str = ""
    """What the student starts from: an earlier LoRA of the same shape, or for a full student a checkpoint; the teacher
    where empty."""
    precision: str = "auto"
    """Number format of the frozen weights and of the computation: float32, bfloat16, float16 (for GPUs without
    bfloat16; the loss is scaled), or auto for this machine's."""
    base_dtype: str = ""
    """Store the frozen weights under a LoRA in int8, fp8 or nf4 (needs bitsandbytes), and convert each when its layer
    runs: half or a quarter of bfloat16's memory, slower; as they are computed with where empty."""
    offload: bool = False
    """Keep the frozen weights under a LoRA in main memory, and copy each to the GPU when its layer runs: for networks
    that do not fit; slower by that copying."""
    sharded: bool = False
    """Share all weights out over the processes (FSDP2), which each gather a block when it runs; with one, nothing."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: a third slower, much less memory."""
    compile: bool = False
    """Compile the U-Net with torch.compile; CUDA only, pays after some minutes."""


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast."""

    steps: int
    """Optimiser steps in all."""
    batch_size: int
    """Samples in each step, over all processes and accumulated parts together."""
    learning_rate: float
    """Peak learning rate of AdamW."""
    warmup_steps: int = 200
    """Steps over which the learning rate rises from zero."""
    lr_schedule: str = "trapezoid"
    """What the learning rate does behind the warm-up: trapezoid (stays, then falls evenly to zero over `cooldown`),
    constant, linear (falls evenly to zero) or cosine (falls to zero along half a wave)."""
    cooldown: float = 0.3
    """The last share of the steps, over which the trapezoid's learning rate falls to zero."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    adam_beta2: float = 0.999
    """How long AdamW remembers the squares of the gradients; 0.99 keeps large batches at high learning rates stable."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    ema_decay: float = 0.999
    """Decay of the moving average of the weights, which is the target and the result; smaller at the start, where an
    average has nothing to remember. 0 for none: the target is the student itself."""
    seed: int = 0
    """Seeds the first weights, and the batches and the noise of every step."""
    save_every: float = 120.0
    """Seconds between two saved states."""
    checkpoint_every: int = 0
    """Steps between two checkpoints: the weights as they are then, with a preview, the loss on held-out pictures
    (--holdout) and the state, which --back-to goes back to; 0 for none."""
    keep_checkpoints: int = 3
    """Last checkpoints that are kept, beside the one with the lowest loss on held-out pictures; 0 keeps all."""
    accumulation: int = 1
    """Parts that each process takes its share of a batch in, one after the other: less memory, the same result."""
    optimizer: str = "adamw"
    """adamw, or adamw8bit (a quarter of the memory; needs bitsandbytes and CUDA)."""
    tensorboard: bool = True
    """Write curves for TensorBoard where it is installed."""
    trackers: tuple[str, ...] = ()
    """Where the curves are sent as well, through accelerate: wandb, mlflow, comet_ml, aim, clearml, swanlab, trackio,
    ...; what goes over the network is up to them."""


@dataclass(frozen=True)
class ReportConfig:
    """What the run shows."""

    preview_every: int = 500
    """Steps between two preview grids; 0 for none, and no pictures in the report either."""
    preview_prompts: tuple[str, ...] = ()
    """Prompts of the preview grids; none takes captions. Each may end with switches: `--n` negative prompt, `--d` seed,
    `--w` and `--h` size, `--l` guidance scale."""
    preview_steps: int = 4
    """Sampling steps of the previews."""
    samples: int = 512
    """Pictures behind each line of the final table; 0 for no table."""


@dataclass(frozen=True)
class DistillConfig:
    """One run of `distill`."""

    teacher: str = ""
    """The checkpoint to distil: a diffusers folder, a .safetensors file, or emoji."""
    output: str = ""
    """Folder of the run: state, previews, report and results. Running again with it continues."""
    name: str = ""
    """Name of the files that come out; the output folder's where empty."""
    prediction_type: str = ""
    """epsilon, v_prediction or sample, where the teacher's own files say it wrongly."""
    shift: float = 0.0
    """The shift of a flow model's noise levels, where the distillation looks and the student is sampled; 0 takes what
    the teacher states for the resolution."""
    tokenizer: str = ""
    """Folder with vocab.json and merges.txt, for a single file with other words than CLIP's and none beside it."""
    lora: tuple[str, ...] = ()
    """LoRAs that are in the teacher, as PATH or PATH:STRENGTH; the student learns to paint as it does with them."""
    control: str = ""
    """A ControlNet or T2I-Adapter, which need --control-pictures, or an IP-Adapter, as PATH or PATH:STRENGTH: teacher
    and student are asked with it alike, so that the student goes with it."""
    vae: str = ""
    """Another VAE than the teacher's: a .safetensors file or a diffusers folder."""
    clip_skip: int = 0
    """Last layers of the CLIP text encoder to leave out, for checkpoints that were trained so; 1 is what web UIs and
    other trainers call clip skip 2."""
    device: str = ""
    """cpu, cuda, cuda:1 or mps; the best one here where empty."""
    accept_changes: bool = False
    """Go on with a run though the files of its teacher, its data or its start have changed since it began."""
    back_to: int = 0
    """Go back to the checkpoint of this step, e.g. with another learning rate; 0 goes on where the run is."""
    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=LcdConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    training: LoopConfig = field(default_factory=lambda: LoopConfig(steps=1000, batch_size=16, learning_rate=1e-4))
    report: ReportConfig = field(default_factory=ReportConfig)

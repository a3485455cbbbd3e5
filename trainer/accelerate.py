"""Settings that make a LoRA fast, by what teacher, LoRA and prompts are: nothing else has to be given."""

from __future__ import annotations

from pathlib import Path

from lcm_core.cli.common import parse_lora
from lcm_core.errors import InputError
from lcm_core.files.safetensors import read_safetensors
from lcm_core.pipeline.sources import ModelSource
from trainer.config import DistillConfig, StudentConfig
from trainer.data.settings import DataConfig
from trainer.data.sources import read_prompts
from trainer.data.teacher import find_teacher
from trainer.methods.config import SegmentedConfig
from trainer.presets import PRESETS, Values

GUIDANCE = 7.5
"""The guidance scale of a teacher that does not say what it is used with."""
PICTURES, MOST_VARIANTS = 256, 16
"""Pictures that the teacher paints at least, in several from each prompt where there are few prompts."""
SAMPLES = 256
LCM_LORA = "lcm_lora"
"""Name of the LCM-LoRA that a model may come with."""
METHOD: Values = {"method": {"kind": SegmentedConfig.kind}}
"""The method where none is asked for and the teacher paints well in `COARSE` steps."""
COARSE = 8
"""Steps of the embedded teacher that paint as well as many; the student, which does two of them at once, then has less
to learn."""


def usual_settings(config: DistillConfig) -> Values:
    """What `accelerate` sets where nothing is said.

    The guidance that the teacher is used with goes into the student. How long and with which learning rate, the preset
    for LoRAs of the teacher's family says. The embedded model learns by `segmented`, for just the number of steps that
    it is to be used with. Another method starts from the LCM-LoRA that a model comes with.

    Args:
        config: what was given, over `METHOD`.

    Raises:
        InputError: no teacher, or no LoRA was given; or the teacher is unknown.
    """
    if not config.teacher:
        raise InputError("no teacher was given; give --teacher, the checkpoint that the LoRA is for")
    if not config.lora:
        raise InputError("no LoRA was given; give --lora, the style that is to paint in few steps")
    source = find_teacher(config.teacher)
    preset = PRESETS[preset_of(source)][1]
    w = max(0.0, (source.recommended.teacher_guidance_scale or GUIDANCE) - 1)
    is_segmented = source.is_shipped and config.method.kind == SegmentedConfig.kind
    method = {**METHOD["method"], "original_steps": COARSE} if is_segmented else {}
    start = {} if is_segmented else start_of(source, config.student)
    return {
        "output": f"runs/{Path(parse_lora(config.lora[0])[0]).stem}-fast",
        "data": {"variants": _variants(config.data)},
        "method": {"w_min": w, "w_max": w, **method},
        "student": preset["student"] | start,
        "training": preset["training"],
        "report": {**preset.get("report", {}), "samples": SAMPLES},
    }


def start_of(source: ModelSource, student: StudentConfig) -> Values:
    """A model's own LCM-LoRA as the start of a student: the speed is there already, what is missing is the style."""
    own = source.root / "lora" / f"{LCM_LORA}.safetensors"
    if student.start or student.rank != StudentConfig.rank or not own.is_file():
        return {}
    tensors, _ = read_safetensors(own)
    rank = next(len(tensor) for name, tensor in tensors.items() if name.endswith(".lora_down.weight"))
    return {"rank": rank, "start": str(own)}


def preset_of(source: ModelSource) -> str:
    """Name of the preset that has the steps and the learning rate."""
    if source.is_shipped:
        return "emoji"
    return "sdxl-lora" if source.info.family == "sdxl" else "sd15-lora"


def _variants(config: DataConfig) -> int:
    if not config.prompts:
        return config.variants
    return min(MOST_VARIANTS, -(-PICTURES // len(read_prompts(Path(config.prompts)))))

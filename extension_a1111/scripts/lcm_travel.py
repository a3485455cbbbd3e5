"""The script "LCM latent travel": frames between prompts and seeds, and an animation of them in the gallery."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gradio as gr
from modules import extra_networks, processing, prompt_parser, rng, scripts, shared
from PIL import Image

from extension_a1111 import host
from extension_a1111.travel import Point, describe, mix_parts, read_points, travelling
from lcm_core.diffusion.interpolation import EASINGS, MODES, Frame, plan_frames
from lcm_core.errors import InputError
from lcm_core.pipeline.animation import check_animation, save_animation

HAS_VIDEO = find_spec("av") is not None
FORMATS = ["gif", "webp", *(["mp4"] if HAS_VIDEO else [])]
_HELP = (
    "One point a line: `a prompt`, `a prompt @ seed`, or `@ seed` for the main prompt with another seed. "
    "Extra networks such as `<lora:...>` belong into the main prompt. "
    "Prompt and all noise travel; samplers that draw noise in their own way (DPM++ SDE) mix the first noise only."
)
_NO_VIDEO_HELP = "MP4 files need the package `av` in the web UI's own Python: `pip install av`, then start anew."


class LcmTravel(scripts.Script):
    """Translates between the page and `extension_a1111.travel`; the web UI paints every frame as a usual picture."""

    def title(self) -> str:
        return "LCM latent travel"

    def ui(self, is_img2img: bool) -> list[Any]:
        gr.Markdown(host.say()(_HELP))
        if not HAS_VIDEO:
            gr.Markdown(host.say()(_NO_VIDEO_HELP))
        points = gr.Textbox(
            label="Points of the travel",
            lines=4,
            placeholder="a green pear @ 7\n@ 8",
            elem_id=self.elem_id("lcm_travel_points"),
        )
        with gr.Row():
            above = gr.Checkbox(True, label="Start from the prompt and seed of this page")
            loop = gr.Checkbox(False, label="Travel back to the start (endless loop)")
            keep = gr.Checkbox(False, label="Save every frame")
        with gr.Row():
            frames = gr.Slider(
                2, 240, 24, step=1, label="Frames of the travel", elem_id=self.elem_id("lcm_travel_frames")
            )
            fps = gr.Slider(1, 50, 12, step=1, label="Frames per second")
        with gr.Row():
            easing = gr.Dropdown(list(EASINGS), value="linear", label="Easing of the travel")
            mode = gr.Dropdown(list(MODES), value="slerp", label="Interpolation of the travel")
            formats = gr.CheckboxGroup(FORMATS, value=["gif"], label="Animation files")
        return [points, above, loop, keep, frames, fps, easing, mode, formats]

    @host.told()
    def run(
        self,
        p: Any,
        text: str,
        above: bool,
        loop: bool,
        keep: bool,
        frames: int,
        fps: float,
        easing: str,
        mode: str,
        formats: list[str],
    ) -> Any:
        processing.fix_seed(p)  # every frame must start from the same random seed, and from the same variation seed
        points = [_fixed(point) for point in read_points(text, p.prompt, p.seed, above)]
        plan = plan_frames(len(points), int(frames), easing, loop)
        for suffix in formats:
            check_animation(f"travel.{suffix}", fps)
        shared.state.job_count = len(plan) * (2 if getattr(p, "enable_hr", False) else 1)
        painted: list[Any] = []
        for number, frame in enumerate(plan, 1):
            if shared.state.interrupted or shared.state.stopping_generation:
                break
            shared.state.job = f"frame {number} of {len(plan)}"
            try:
                painted.append(_paint(p, points, frame, mode, keep))
            except OSError as error:  # a full disk; what is painted is not lost
                if not painted:
                    raise
                words = "Frame {number} could not be written ({reason}); here are the frames before it."
                p.comment(host.say()(words, number=number, reason=error.strerror or error))
                break
        return _with_animations(p, painted, formats, fps)


def _fixed(point: Point) -> Point:
    return point if point.seed >= 0 else point._replace(seed=random.randrange(2**32))


def _paint(p: Any, points: list[Point], frame: Frame, mode: str, keep: bool) -> Any:
    """One frame as the web UI's `Processed`."""
    start, end = points[frame.start], points[frame.end]
    one = copy(p)
    one.prompt, one.seed, one.n_iter, one.batch_size = start.prompt, start.seed, 1, 1
    one.do_not_save_grid = True
    one.do_not_save_samples = p.do_not_save_samples or not keep
    one.extra_generation_params = dict(p.extra_generation_params)
    if frame.fraction == 0:
        return processing.process_images(one)
    one.extra_generation_params["LCM travel"] = describe(end, frame.fraction)
    for method, prompts, result in (("setup_conds", "prompts", "c"), ("calculate_hr_conds", "hr_prompts", "hr_c")):
        _mix_prompts(one, end.prompt, frame.fraction, mode, method, prompts, result)
    with _travelling_noise(end.seed, frame.fraction, mode):
        return processing.process_images(one)


def _mix_prompts(p: Any, prompt: str, fraction: float, mode: str, method: str, prompts: str, result: str) -> None:
    """Have `p.method()`, which turns `p.prompts` into the conditioning `p.result`, mix that with another prompt's."""
    original = getattr(p, method, None)
    if original is None:  # img2img has no second pass
        return
    styled = shared.prompt_styles.apply_styles_to_prompt(prompt, p.styles)
    other = extra_networks.parse_prompts([styled])[0]

    def mixed() -> None:
        own = getattr(p, prompts)
        if own is None:
            return
        setattr(p, prompts, other)
        setattr(p, result, None)  # what is there already is not made again
        original()
        goal = getattr(p, result)
        setattr(p, prompts, own)
        setattr(p, result, None)
        original()
        if goal is not None:
            setattr(p, result, _mix_multicond(getattr(p, result), goal, fraction, mode))

    setattr(p, method, mixed)


def _mix_multicond(a: Any, b: Any, fraction: float, mode: str) -> Any:
    """The web UI's conditioning of one picture: parts joined by AND, each with a weight and its own schedule."""
    own, others = ([(part.schedules, part.weight) for part in multi.batch[0]] for multi in (a, b))
    parts = []
    for mixed, weight in mix_parts(own, others, fraction, mode):
        schedules = [prompt_parser.ScheduledPromptConditioning(end, conditioning) for end, conditioning in mixed]
        parts.append(prompt_parser.ComposableScheduledPromptConditioning(schedules, weight))
    return prompt_parser.MulticondLearnedConditioning(shape=(1,), batch=[parts])


@contextmanager
def _travelling_noise(seed: int, fraction: float, mode: str) -> Iterator[None]:
    original = rng.ImageRNG
    rng.ImageRNG = travelling(original, [seed], fraction, mode)
    try:
        yield
    finally:
        rng.ImageRNG = original


def _with_animations(p: Any, painted: list[Any], formats: list[str], fps: float) -> Any:
    """All frames as one `Processed`, the animations before them."""
    images = [result.images[0] for result in painted if result.images]
    texts = [result.infotexts[0] for result in painted if result.images]
    result = processing.Processed(p, images, p.seed, texts[0] if texts else "", infotexts=texts)
    if len(images) < 2:
        return result
    stem = _free_name(Path(p.outpath_samples), f"travel-{p.seed}")
    files = [stem.with_name(f"{stem.name}.{suffix}") for suffix in formats]
    written = [file for file in files if _save(p, images, file, fps)]
    shown = [_shown(file) for file in written if file.suffix != ".mp4"]  # the gallery shows pictures only
    result.images[:0], result.infotexts[:0] = shown, texts[:1] * len(shown)
    result.index_of_first_image = len(shown)
    if written:
        p.comment(host.say()("Animation: {files}", files=", ".join(map(str, written))))
    result.comments = "".join(f"{comment}\n" for comment in p.comments)
    return result


def _save(p: Any, images: list[Any], file: Path, fps: float) -> bool:
    """Whether an animation could be written; a full disk costs that file alone, and is said below the frames."""
    try:
        save_animation(images, file, fps)
    except (InputError, OSError) as error:
        p.comment(str(error))
        return False
    return True


def _free_name(folder: Path, name: str) -> Path:
    number = 1
    while any(folder.glob(f"{name}-{number:03d}.*")):
        number += 1
    return folder / f"{name}-{number:03d}"


def _shown(file: Path) -> Any:
    """A picture that the gallery serves as the file that it is, so that it moves."""
    picture: Any = Image.open(file)
    picture.already_saved_as = str(file)
    return picture

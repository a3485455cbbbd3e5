"""The tab "LCM Distil": make a checkpoint's LCM-LoRA with the trainer, which runs in a Python of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from modules import paths, script_callbacks, sd_models, shared

from extension_a1111 import advice, distil, distil_page, distil_python, host
from extension_a1111.distil import AUTO, EMOJI, PRESETS, Order, Places
from extension_a1111.distil_status import look
from extension_a1111.folders import LORA_OPTIONS, option_folders
from extension_a1111.translation import explain
from lcm_core.errors import InputError

_HELP = (
    "Distils a checkpoint into an LCM-LoRA that paints in 2 to 8 steps. The trainer runs beside the web UI, in a "
    "Python of its own: the one that **Settings > LCM Suite** names, or the one that a button below makes. It goes on "
    "when this page is closed. One run at a time. "
    "Where video memory is short, first unload the checkpoint in **Settings > Actions**."
)
_SCRIPT = "script_txt2img_lcm_suite_lcm_suite"
_USED = (
    "txt2img_prompt",
    "txt2img_sampling",
    "txt2img_steps",
    "txt2img_cfg_scale",
    f"{_SCRIPT}_gamma",
    f"{_SCRIPT}_original_steps",
)
"""What "Use this LoRA" fills in, in the order of `advice.offer`."""
_page: dict[str, Any] = {}


def places() -> Places:
    """What the settings say now."""
    root = shared.opts.data.get("lcm_suite_distil_folder") or str(Path(paths.data_path) / "outputs" / "lcm-distil")
    python = shared.opts.data.get("lcm_suite_distil_python") or ""
    loras = [*option_folders(shared.cmd_opts, *LORA_OPTIONS), Path(paths.models_path, "Lora").absolute()]
    return Places(python.strip() or distil_python.made_python(Path(root)), Path(root).absolute(), loras[0])


def on_ui_tabs() -> list[tuple[Any, str, str]]:
    with gr.Blocks(analytics_enabled=False) as tab, gr.Row():
        with gr.Column():
            gr.Markdown(host.say()(_HELP))
            inputs = _inputs()
            with gr.Row():
                foresee = gr.Button("Time and memory", elem_id="lcm_distil_plan")
                go = gr.Button("Start distillation", variant="primary", elem_id="lcm_distil_start")
            with gr.Row():
                halt = gr.Button("Stop distillation", interactive=False, elem_id="lcm_distil_stop")
                again = gr.Button("Continue distillation", interactive=False, elem_id="lcm_distil_continue")
                make = gr.Button("Make the trainer's Python", interactive=False, elem_id="lcm_distil_python")
        with gr.Column():
            said = gr.HTML(elem_id="lcm_distil_said")
            use = gr.Button("Use this LoRA", interactive=False, elem_id="lcm_distil_use")
            view = gr.HTML(elem_id="lcm_distil_view")
            shown = gr.State("")
            # javascript/lcm_suite.js presses it, for a gradio timer exists in some of the hosts only
            refresh = gr.Button("Refresh the view", elem_id="lcm_distil_refresh", size="sm")
        foresee.click(_answer(_plan), inputs=inputs, outputs=[said])
        go.click(_answer(_start), inputs=inputs, outputs=[said])
        halt.click(_answer(_stop), outputs=[said])
        again.click(_answer(_continue), outputs=[said])
        make.click(_answer(_make_python), outputs=[said])
        outputs = [view, shown, go, halt, again, make, use]
        refresh.click(_refresh, inputs=[shown], outputs=outputs, show_progress=False, queue=False)
        if len(_page) == len(_USED):
            fields = [_page[name] for name in _USED]
            use.click(_use, inputs=fields, outputs=[*fields, said], queue=False)
    return [(tab, "LCM Distil", "lcm_distil")]


def _inputs() -> list[Any]:
    """The fields of an `Order`, in its order."""
    with gr.Row():
        name = gr.Textbox(label="Name of the LoRA", value="my_lcm", elem_id="lcm_distil_name")
        teacher = gr.Dropdown(_teachers(), value=EMOJI, label="Teacher (checkpoint)", elem_id="lcm_distil_teacher")
        preset = gr.Dropdown(
            [AUTO, *PRESETS],
            value=AUTO,
            label="Preset (auto: by the teacher)",
            elem_id="lcm_distil_preset",
        )
    data = gr.Textbox(
        label="Folder of pictures with captions (.txt beside each); the embedded emoji model has its own",
        elem_id="lcm_distil_data",
    )
    prompts = gr.Textbox(label="Or a text file with one prompt a line: the teacher paints what is learnt from")
    with gr.Row():  # all four beside each other on a page of usual width
        steps = gr.Number(0, label="Training steps (0: preset)", precision=0, min_width=100, elem_id="lcm_distil_steps")
        batch = gr.Number(0, label="Pictures per training step", precision=0, min_width=100, elem_id="lcm_distil_batch")
        rate = gr.Number(0, label="Learning rate of the LoRA", min_width=100)
        rank = gr.Number(0, label="Rank of the LoRA", precision=0, min_width=100)
    scored = gr.Checkbox(False, label="Measure teacher and student at the end (can take longer than the training)")
    more = gr.Textbox(label="More options of `python -m trainer distill`", elem_id="lcm_distil_more")
    return [name, teacher, preset, data, prompts, steps, batch, rate, rank, scored, more]


def _teachers() -> list[str]:
    return [EMOJI, *(title for title in sd_models.checkpoint_tiles() if ".safetensors" in title)]


def _answer(work: Callable[..., str]) -> Callable[..., str]:
    """Show what `work` says, which is HTML, and mistakes as such."""

    def answer(*values: Any) -> str:
        try:
            return work(*values)
        except InputError as error:
            return distil_page.mistake(explain(error, host.say()))

    return answer


def _order(name: str, teacher: str, *rest: Any) -> Order:
    if teacher != EMOJI:
        known = sd_models.get_closet_checkpoint_match(teacher)
        teacher = known.filename if known else teacher
    return Order(name.strip(), teacher, *rest)


def _plan(*values: Any) -> str:
    return distil_page.described(distil.plan(_order(*values), places()), host.say())


def _start(*values: Any) -> str:
    order = _order(*values)
    words = "Started: {name}, preset {preset}."
    return distil_page.said(host.say()(words, name=distil.start(order, places()), preset=order.preset_name))


def _stop() -> str:
    distil.stop(places())
    return distil_page.said(host.say()("Asked to save and stop. Press again to stop at once."))


def _continue() -> str:
    return distil_page.said(host.say()("Continued: {name}.", name=distil.resume(places())))


def _make_python() -> str:
    distil_python.make_python(places().root, *host.torch_build())
    return distil_page.said(host.say()("The trainer's Python is being made."))


def _use(prompt: str, *settings: Any) -> tuple[Any, ...]:
    """The page's fields with the new LoRA in the prompt and what suits it."""
    lora = Path(look(places()).lora)
    if not lora.is_file():
        return prompt, *settings, distil_page.mistake(host.say()("The LoRA is not there any more; distil it again."))
    tag = f"<lora:{lora.stem}:1>"
    prompt = prompt if tag in prompt else f"{prompt} {tag}".strip()
    *fitting, said = advice.offer(prompt, *settings)
    return prompt, *fitting, said


def _refresh(shown: str) -> tuple[Any, ...]:
    """View and buttons, which are active where they do something; nothing where all is as it was."""
    where = places()
    status = look(where)
    link = host.file_link(status.report) if status.report else ""
    page = distil_page.render(status, host.say(), link)
    is_idle = status.state not in ("running", "stopping", "making")
    active = (
        is_idle,
        status.state in ("running", "stopping"),
        status.state in ("stopped", "failed", "interrupted") and bool(status.name),
        is_idle and not where.python,
        bool(status.lora),
    )
    now = f"{active}{page}"
    if now == shown:
        return (gr.update(), now, *(gr.update() for _ in active))
    return (page, now, *(gr.update(interactive=is_active) for is_active in active))


def _remember(component: Any, **kwargs: Any) -> None:
    """Keep the fields of the page for text to image, which are made before this tab."""
    name = kwargs.get("elem_id") or ""
    if name in _USED:
        _page[name] = component


script_callbacks.on_after_component(_remember)
script_callbacks.on_ui_tabs(on_ui_tabs)

"""The tab "LCM Distil": make a checkpoint's LCM-LoRA with the trainer, which runs in a Python of its own."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from modules import paths, script_callbacks, sd_models, shared

from extension_a1111 import distil, host
from extension_a1111.distil import AUTO, EMOJI, PRESETS, Order, Places
from extension_a1111.distil_status import look, render
from extension_a1111.folders import LORA_OPTIONS, option_folders
from lcm_core.errors import InputError

SECTION = ("lcm_suite", "LCM Suite")
_HELP = (
    "Distils a checkpoint into an LCM-LoRA that paints in 2 to 8 steps. The trainer runs beside the web UI, in the "
    "Python that **Settings > LCM Suite** names; it goes on when this page is closed. One run at a time. "
    "Where video memory is short, first unload the checkpoint in **Settings > Actions**."
)


def places() -> Places:
    """What the settings say now."""
    root = shared.opts.data.get("lcm_suite_distil_folder") or str(Path(paths.data_path) / "outputs" / "lcm-distil")
    python = shared.opts.data.get("lcm_suite_distil_python") or ""
    loras = [*option_folders(shared.cmd_opts, *LORA_OPTIONS), Path(paths.models_path, "Lora").absolute()]
    return Places(python.strip(), Path(root).absolute(), loras[0])


def on_ui_settings() -> None:
    python = shared.OptionInfo("", "Distillation: Python that has the trainer's packages (path)", section=SECTION)
    folder = shared.OptionInfo("", "Distillation: folder of the runs (empty: outputs/lcm-distil)", section=SECTION)
    shared.opts.add_option("lcm_suite_distil_python", python)
    shared.opts.add_option("lcm_suite_distil_folder", folder)


def on_ui_tabs() -> list[tuple[Any, str, str]]:
    with gr.Blocks(analytics_enabled=False) as tab, gr.Row():
        with gr.Column():
            gr.Markdown(host.say()(_HELP))
            inputs = _inputs()
            with gr.Row():
                go = gr.Button("Start distillation", variant="primary", elem_id="lcm_distil_start")
                halt = gr.Button("Stop distillation", elem_id="lcm_distil_stop")
                again = gr.Button("Continue distillation", elem_id="lcm_distil_continue")
        with gr.Column():
            said = gr.HTML(elem_id="lcm_distil_said")
            view = gr.HTML(elem_id="lcm_distil_view")
            shown = gr.State("")
            # javascript/lcm_suite_distil.js presses it, for a gradio timer exists in one of the two hosts only
            refresh = gr.Button("Refresh the view", elem_id="lcm_distil_refresh", size="sm")
        go.click(_answer(_start), inputs=inputs, outputs=[said])
        halt.click(_answer(_stop), outputs=[said])
        again.click(_answer(_continue), outputs=[said])
        refresh.click(_refresh, inputs=[shown], outputs=[view, shown], show_progress=False, queue=False)
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
    with gr.Row():
        steps = gr.Number(0, label="Training steps (0: the preset's)", precision=0, elem_id="lcm_distil_steps")
        batch = gr.Number(0, label="Pictures per training step", precision=0, elem_id="lcm_distil_batch")
        rate = gr.Number(0, label="Learning rate of the LoRA")
        rank = gr.Number(0, label="Rank of the LoRA", precision=0)
    more = gr.Textbox(label="More options of `python -m trainer distill`", elem_id="lcm_distil_more")
    return [name, teacher, preset, data, prompts, steps, batch, rate, rank, more]


def _teachers() -> list[str]:
    return [EMOJI, *(title for title in sd_models.checkpoint_tiles() if ".safetensors" in title)]


def _answer(work: Callable[..., str]) -> Callable[..., str]:
    """Show what `work` says, and mistakes as a message."""

    def answer(*values: Any) -> str:
        try:
            return f"<p>{escape(work(*values))}</p>"
        except InputError as error:
            return f'<p class="error">{escape(str(error))}</p>'

    return answer


def _start(name: str, teacher: str, *rest: Any) -> str:
    if teacher != EMOJI:
        known = sd_models.get_closet_checkpoint_match(teacher)
        teacher = known.filename if known else teacher
    order = Order(name.strip(), teacher, *rest)
    return host.say()("Started: {name}, preset {preset}.", name=distil.start(order, places()), preset=order.preset_name)


def _stop() -> str:
    distil.stop(places())
    return host.say()("Asked to save and stop. Press again to stop at once.")


def _continue() -> str:
    return host.say()("Continued: {name}.", name=distil.resume(places()))


def _refresh(shown: str) -> tuple[Any, str]:
    page = render(look(places()), host.say())
    return (gr.update() if page == shown else page), page


script_callbacks.on_ui_settings(on_ui_settings)
script_callbacks.on_ui_tabs(on_ui_tabs)

"""The samplers, and the accordion "LCM Suite" with what belongs to them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import gradio as gr
from modules import errors, script_callbacks, scripts, shared

from extension_a1111 import advice, host, sampler
from extension_a1111.options import (
    AUTO_FIELD,
    GAMMA_FIELD,
    LCM_SAMPLER,
    ORIGINAL_STEPS_FIELD,
    SAMPLERS,
    Options,
    read_options,
    reset_unnamed,
)
from extension_a1111.translation import explain
from lcm_core.errors import InputError

_WANTED = ("prompt", "neg_prompt", "sampling", "steps", "cfg_scale")
_REFINER = "checkpoint"
_SECTION = ("lcm_suite", "LCM Suite")
_HELP = (
    "Both set sampler, steps and CFG where an LCM-LoRA or an LCM is in use; "
    "the button also puts right what is remarked on below a picture."
)


class LcmSuite(scripts.Script):
    """Translates between the page and `Options`; the work is done by the sampler."""

    def __init__(self) -> None:
        super().__init__()
        self.connected: set[str] = set()
        self.page: dict[str, Any] = {}  # the host's own components, by the end of their ids
        self.ours: tuple[Any, Any, Any, Any] | None = None  # the button, two sliders, and what it says

    def title(self) -> str:
        return LCM_SAMPLER

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        with gr.Accordion(LCM_SAMPLER, open=False, elem_id=self.elem_id("lcm_suite")):
            with gr.Row():
                button = gr.Button("Set what suits the models", elem_id=self.elem_id("lcm_suite_offer"))
                auto = gr.Checkbox(
                    bool(shared.opts.data.get("lcm_suite_auto", False)),
                    label="Apply automatically",
                    elem_id=self.elem_id("lcm_suite_auto"),
                )
            said = gr.HTML(host.say()(_HELP), elem_id=self.elem_id("lcm_suite_said"))
            with gr.Row():
                gamma = gr.Slider(
                    0, 1, Options.gamma, step=0.05, label=GAMMA_FIELD, elem_id=self.elem_id("lcm_suite_gamma")
                )
                original_steps = gr.Slider(
                    1,
                    200,
                    Options.original_steps,
                    step=1,
                    label=ORIGINAL_STEPS_FIELD,
                    elem_id=self.elem_id("lcm_suite_original_steps"),
                )
        self.infotext_fields = [(auto, AUTO_FIELD), (gamma, GAMMA_FIELD), (original_steps, ORIGINAL_STEPS_FIELD)]
        self.paste_field_names = [GAMMA_FIELD, ORIGINAL_STEPS_FIELD]
        self.ours = (button, gamma, original_steps, said)
        self._connect()
        return [auto, gamma, original_steps]

    def after_component(self, component: Any, **kwargs: Any) -> None:
        """Remember the host's own components; which of them come before `ui` is up to the user's settings."""
        tab, _, name = (kwargs.get("elem_id") or "").partition("_")
        if name in (*_WANTED, _REFINER) and tab == ("img2img" if self.is_img2img else "txt2img"):
            self.page[name] = component
            self._connect()

    def before_process(self, p: Any, *args: Any) -> None:
        """Leave the options for the sampler, which says what is wrong with them where the user sees it."""
        axes = getattr(p, "lcm_suite_axes", {})
        p.lcm_suite = functools.partial(read_options, args, axes)
        try:
            advice.apply(p, args, axes)
        except InputError as error:
            p.comment(explain(error, host.say()))
        if p.sampler_name in SAMPLERS:
            host.apply_noise_multiplier(p)

    def _connect(self) -> None:
        """Connect the button with what is there by now."""
        if self.ours is None:
            return
        button, gamma, original_steps, said = self.ours
        if all(name in self.page for name in _WANTED):
            prompts_and_settings = [self.page[name] for name in _WANTED] + [gamma, original_steps]
            self._click(button, "put_right", advice.put_right, prompts_and_settings, [*prompts_and_settings, said])
        if "sampling" in self.page and _REFINER in self.page:  # not in every host, nor with every setting
            refiner = self.page[_REFINER]
            fit = functools.partial(advice.fit_refiner, refiner.value)
            self._click(button, "fit_refiner", fit, [self.page["sampling"], refiner], [refiner])

    def _click(self, button: Any, name: str, work: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> None:
        if name not in self.connected:
            self.connected.add(name)
            # without the queue, so that the button answers while a picture is being made
            button.click(work, inputs=inputs, outputs=outputs, queue=False)


def _add_settings() -> None:
    for name, default, label, component, span in (
        ("lcm_suite_auto", False, "Tick 'Apply automatically' when the page is opened", gr.Checkbox, {}),
        ("lcm_suite_steps", 4, "Steps to set", gr.Slider, {"minimum": 1, "maximum": 8, "step": 1}),
        ("lcm_suite_lora_cfg", 1.0, "CFG to set for an LCM-LoRA", gr.Slider, {"minimum": 1, "maximum": 2, "step": 0.1}),
        ("lcm_suite_full_cfg", 8.0, "CFG to set for a full LCM", gr.Slider, {"minimum": 2, "maximum": 14, "step": 0.5}),
        (
            "lcm_suite_distil_python",
            "",
            "Distillation: Python of the trainer (empty: the one made in the tab)",
            None,
            None,
        ),
        ("lcm_suite_distil_folder", "", "Distillation: folder of the runs (empty: outputs/lcm-distil)", None, None),
    ):
        shared.opts.add_option(name, shared.OptionInfo(default, label, component, span, section=_SECTION))


def _complete(infotext: str, params: dict[str, Any]) -> None:
    reset_unnamed(infotext, params, getattr(shared.opts, "infotext_skip_pasting", None) or ())


def _add_axes() -> None:
    """Axes for the X/Y/Z plot, whose module is loaded anew with every reload."""
    for data in scripts.scripts_data:
        if data.script_class.__module__ == "xyz_grid.py":
            plot = data.module
            plot.axis_options.extend(
                plot.AxisOption(
                    f"[LCM Suite] {label}",
                    float,
                    functools.partial(_set_axis, name),
                    confirm=functools.partial(_check_axis, name),
                )
                for label, name in (("guidance, w + 1", "guidance"), (GAMMA_FIELD, "gamma"))
            )


@host.told()
def _check_axis(name: str, p: Any, values: list[float]) -> None:
    """Refuse bad values before the first cell; the plot only leaves cells empty whose picture failed."""
    for value in values:
        read_options([], {name: value})
    if name == "guidance":
        advice.check_guidance_embedding(p)


def _set_axis(name: str, p: Any, value: float, values: Any) -> None:
    # A new dict: the plot copies requests without what they hold.
    p.lcm_suite_axes = {**getattr(p, "lcm_suite_axes", {}), name: value}


def _add_axes_or_say() -> None:
    try:
        _add_axes()
    except Exception:  # another plot than the host's own must not cost the page
        errors.report("LCM Suite could not add its axes to the X/Y/Z plot", exc_info=True)


sampler.register()
script_callbacks.on_ui_settings(_add_settings)
script_callbacks.on_before_ui(_add_axes_or_say)
script_callbacks.on_infotext_pasted(_complete)
host.name_setting("s_min_uncond", "NGMS")

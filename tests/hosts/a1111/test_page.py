"""The web UI's plot, reloads of its page, changes of the checkpoint, and bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
from sampling_references import (
    axes_of,
    check,
    check_listed_once,
    diffusers_timesteps,
    elem_id,
    pipeline,
    plot_args,
    reference,
)
from webui_harness import HttpError, WebUI, difference

pytestmark = pytest.mark.host


def test_plot_axes(webui: WebUI) -> None:
    """X/Y/Z plot of the guidance and of gamma: the cells are the pictures painted one by one."""
    webui.load("emoji_lcm")
    choices = axes_of(webui)
    guidance, gamma = (choices.index(f"[LCM Suite] {name}") for name in ("guidance, w + 1", "TCD gamma"))
    args = plot_args(webui, {"x": (guidance, "2, 9"), "y": (gamma, "0, 1")})
    plot = webui.paint(sampler_name="TCD Suite", cfg_scale=7, script_name="x/y/z plot", script_args=args)
    cells = plot.pictures[1:] if len(plot.pictures) == 5 else plot.pictures[-4:]
    for cell, (scale, share) in zip(cells, [(2, 0), (9, 0), (2, 1), (9, 1)], strict=True):
        wanted = reference(pipeline("emoji", "lcm"), guidance_scale=float(scale), sampler="tcd", gamma=float(share))
        assert difference(cell, wanted) <= 1


def test_reloads_and_checkpoint_changes(webui: WebUI) -> None:
    """Reload UI three times, change the checkpoint and back: everything once, and the guidance still right."""
    webui.load("emoji_lcm")
    before = webui.paint(sampler_name="LCM Suite", cfg_scale=5)
    for _ in range(3):
        webui.reload_ui()
    check_listed_once(webui)
    parts = webui.call("/config")["components"]
    for tab in ("txt2img", "img2img"):
        drop = next(part for part in parts if elem_id(part) == f"{tab}_sampling")
        assert [str(choice) for choice in drop["props"]["choices"]].count(str(_choice(drop, "LCM Suite"))) == 1
    assert sum(axis.startswith("[LCM Suite]") for axis in axes_of(webui)) == 2
    webui.load("emoji_teacher")
    plain = webui.paint(sampler_name="LCM Suite", cfg_scale=5)
    assert plain.batches == [2] * 4  # ordinary guidance, and nothing left behind of the other kind
    webui.load("emoji_lcm")
    after = webui.paint(sampler_name="LCM Suite", cfg_scale=5)
    assert after.calls == before.calls
    assert difference(after.pictures[0], before.pictures[0]) == 0


def _choice(drop: dict[str, dict[str, list[object]]], name: str) -> object:
    return next(choice for choice in drop["props"]["choices"] if choice == name or choice == [name, name])


def test_bad_input_is_said_and_the_webui_goes_on(webui: WebUI) -> None:
    webui.load("emoji_teacher")
    sdxl = webui.data / "models" / "Lora" / "lcm-lora-sdxl.safetensors"
    _write_lora(sdxl, 2048)
    webui.call("/sdapi/v1/refresh-loras", {})
    cases = {
        "was made for SDXL": {"prompt": "pizza <lora:lcm-lora-sdxl:1>"},
        "TCD gamma 2.0 is out of range": {"alwayson_scripts": {"LCM Suite": {"args": [False, 2]}}},
        "emoji_teacher is no full LCM": {"script_name": "x/y/z plot", "script_args": _guidance_plot(webui)},
    }
    for message, body in cases.items():
        with pytest.raises(HttpError, match=message):
            webui.paint(sampler_name="LCM Suite", **body)
    check(webui.paint(sampler_name="LCM Suite"), "LCM Suite", diffusers_timesteps(4), 1)


def test_mistakes_below_a_picture_are_in_the_language_of_the_page(webui: WebUI) -> None:
    webui.load("emoji_teacher")
    webui.call("/sdapi/v1/options", {"localization": "zh_CN"})
    try:
        with pytest.raises(HttpError, match=r"TCD gamma 的值 2\.0 超出范围"):
            webui.paint(sampler_name="LCM Suite", alwayson_scripts={"LCM Suite": {"args": [False, 2]}})
    finally:
        webui.call("/sdapi/v1/options", {"localization": "None"})


def _guidance_plot(webui: WebUI) -> list[object]:
    return plot_args(webui, {"x": (axes_of(webui).index("[LCM Suite] guidance, w + 1"), "2, 9")})


def _write_lora(file: Path, width: int) -> None:
    import torch
    from safetensors.torch import save_file

    stem = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {
        "lora_down.weight": torch.zeros(4, width),
        "lora_up.weight": torch.zeros(640, 4),
        "alpha": torch.ones(()),
    }
    save_file({f"{stem}.{name}": tensor for name, tensor in tensors.items()}, file)

"""The script "LCM latent travel" in the real web UIs: frames against single pictures and against lcm_core."""

from __future__ import annotations

import time
from typing import Any

import pytest
from PIL import Image
from webui_harness import HttpError, Painted, WebUI, difference, to_base64

from lcm_core.pipeline import Keyframe, PictureOptions, Pipeline

pytestmark = pytest.mark.host
PIZZA, PEAR = "a slice of pizza, noto style", "a green pear, twemoji style"
FULL = {"sampler_name": "LCM Suite", "steps": 3, "cfg_scale": 2, "prompt": PIZZA, "seed": 5}


def travel(
    webui: WebUI, points: str, frames: int = 3, easing: str = "linear", loop: bool = False, **settings: Any
) -> Painted:
    """Frames only: no animation before them."""
    args = [points, True, loop, False, frames, 6, easing, "slerp", []]
    return webui.paint(**FULL | settings, script_name="lcm latent travel", script_args=args)


def test_every_frame_is_lcm_core_s(webui: WebUI) -> None:
    """Prompt, first noise and all later noise travel together, or the frames between the points would differ."""
    webui.load("emoji_lcm")
    painted = travel(webui, f"{PEAR} @ 7", frames=4, easing="smooth", loop=True)
    pipe = Pipeline.load("emoji", device="cpu", dtype="float32")
    settings = {"num_inference_steps": 3, "guidance_scale": 2.0, "width": 64, "height": 64}
    wanted = list(
        pipe.interpolate(
            [Keyframe(PIZZA, 5), Keyframe(PEAR, 7)], 4, "slerp", "smooth", True, None, PictureOptions(**settings)
        )
    )
    assert len(painted.pictures) == 4
    assert [difference(*pair) <= 1 for pair in zip(painted.pictures, wanted, strict=True)] == [True] * 4
    assert "0.5 of the way to a green pear, twemoji style @ 7" in painted.pictures[1].info["parameters"]


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {
            "enable_hr": True,
            "hr_scale": 2,
            "denoising_strength": 0.5,
            "hr_second_pass_steps": 2,
        },
        {"negative_prompt": "a face", "cfg_scale": 1.5, "prompt": f"{PIZZA} <lora:emoji_lcm_lora:0.9>"},
    ],
    ids=["plain", "hires", "lora"],
)
def test_the_ends_are_the_single_pictures(webui: WebUI, extra: dict[str, Any]) -> None:
    webui.load("emoji_teacher" if "prompt" in extra else "emoji_lcm")
    extra = extra | ({"hr_upscaler": webui.upscaler} if "enable_hr" in extra else {})
    networks = " <lora:emoji_lcm_lora:0.9>" if "prompt" in extra else ""
    painted = travel(webui, f"{PEAR} @ 7", **extra)
    first = webui.paint(**FULL | extra)
    last = webui.paint(**FULL | extra | {"prompt": PEAR + networks, "seed": 7})
    assert painted.sampler == "LCM Suite"
    assert len(painted.pictures) == 3
    assert painted.pictures[0].size == first.pictures[0].size
    assert difference(painted.pictures[0], first.pictures[0]) == 0
    assert difference(painted.pictures[2], last.pictures[0]) == 0
    assert min(difference(painted.pictures[1], end.pictures[0]) for end in (first, last)) > 8


def test_prompts_of_unequal_parts_travel(webui: WebUI) -> None:
    """The part that the other prompt lacks fades; both ends are the single pictures."""
    webui.load("emoji_teacher")
    extra = {"prompt": f"{PIZZA} AND a face :0.5", "cfg_scale": 2}
    painted = travel(webui, f"{PEAR} @ 5", **extra)
    ends = [webui.paint(**FULL | extra), webui.paint(**FULL | extra | {"prompt": PEAR})]
    assert difference(painted.pictures[0], ends[0].pictures[0]) == 0
    assert difference(painted.pictures[2], ends[1].pictures[0]) <= 1
    assert min(difference(painted.pictures[1], end.pictures[0]) for end in ends) > 8


def test_an_input_picture_travels_too(webui: WebUI) -> None:
    webui.load("emoji_lcm")
    picture = Image.new("RGB", (64, 64), "orange")
    given = FULL | {"kind": "img2img", "init_images": [to_base64(picture)], "denoising_strength": 0.6}
    args = ["@ 7", True, False, False, 2, 6, "linear", "slerp", []]
    painted = webui.paint(**given, script_name="lcm latent travel", script_args=args)
    ends = [webui.paint(**given | {"seed": seed}).pictures[0] for seed in (5, 7)]
    # not 0: the host draws the latents of the input picture from a stream that no seed sets
    assert max(difference(*pair) for pair in zip(painted.pictures, ends, strict=True)) <= 4
    assert difference(*ends) > 32


def test_an_animation_of_all_frames_comes_first(webui: WebUI) -> None:
    webui.load("emoji_lcm")
    args = ["@ 7\n@ 9", True, False, False, 5, 10, "linear", "slerp", ["gif"]]
    painted = webui.paint(**FULL, script_name="lcm latent travel", script_args=args)
    assert len(painted.pictures) == 6
    files = sorted(webui.data.rglob("travel-5-*.gif"))
    with Image.open(files[-1]) as gif:
        assert (gif.n_frames, gif.size) == (5, (64, 64))


def test_a_mistake_is_told_and_the_web_ui_goes_on(webui: WebUI) -> None:
    webui.load("emoji_lcm")
    for points, message in (("", "travel needs two points"), ("x <lora:y:1>", "write it in the main prompt")):
        with pytest.raises((HttpError, TypeError)):  # Forge's interface answers null; its page shows the message
            travel(webui, points)
        end = time.monotonic() + 30  # Forge's log is buffered
        while message not in webui.read_log():
            assert time.monotonic() < end, f"nobody was told {message!r}"
            time.sleep(0.5)
    assert len(travel(webui, "@ 7").pictures) == 3

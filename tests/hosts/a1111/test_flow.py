"""Flow models in Forge and Neo: the host's own predictors and loop around a network that knows the picture.

The network answers the velocity towards a picture of one value, so that what it is fed must lie on the straight line
between noise and that picture, and every sampler with any number of steps must paint it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
from PIL import Image
from sampling_references import drawing, left_half
from webui_harness import Painted, WebUI, difference, to_base64

pytestmark = pytest.mark.host
X0 = 1.5
SHIFTS = {"PredictionDiscreteFlow": 3.0, "PredictionFlux": 1.15}
"""SD3's and Flux's, of whom Flux's is the logarithm."""
SIDE = 256  # 4096 values of latents: their mean and spread are known to some percent


@pytest.fixture
def flow(webui: WebUI, request: pytest.FixtureRequest) -> Iterator[tuple[WebUI, float]]:
    if not webui.is_forge:
        pytest.skip("A1111 is no host for LCM on flow models")
    kind = request.param
    webui.load("emoji_teacher")
    webui.paint(sampler_name="LCM Suite", steps=1)  # Forge loads late
    webui.call("/probe/flow", {"kind": kind, "shift": SHIFTS[kind], "x0": X0})
    webui.call("/probe/fed")
    try:
        yield webui, math.exp(SHIFTS[kind]) if kind == "PredictionFlux" else SHIFTS[kind]
    finally:
        webui.call("/probe/flow", {})


def shifted(shift: float, even: float) -> float:
    return shift * even / (1 + (shift - 1) * even)


def check_fed(webui: WebUI, levels: list[float]) -> None:
    """Mean (1 - s) x0 and spread s at each level."""
    fed = webui.call("/probe/fed")
    assert [s for s, _, _ in fed] == pytest.approx(levels, abs=1e-4)
    for s, mean, spread in fed:
        assert mean == pytest.approx((1 - s) * X0, abs=0.08)
        assert spread == pytest.approx(s, rel=0.08)


def paint(webui: WebUI, sampler: str, steps: int, **settings: object) -> Painted:
    return webui.paint(sampler_name=sampler, steps=steps, **{"width": SIDE, "height": SIDE} | settings)  # type: ignore[arg-type]


def known(webui: WebUI) -> Image.Image:
    """The picture as the host's own Euler paints it, which is right on flows; its usual schedule would ask at 0."""
    picture = paint(webui, "Euler", 2, scheduler="Simple").pictures[0]
    webui.call("/probe/fed")
    return picture


@pytest.mark.parametrize("flow", SHIFTS, indirect=True)
@pytest.mark.parametrize("sampler", ["LCM Suite", "TCD Suite"])
def test_the_network_is_fed_the_right_noise_and_the_picture_comes_out(flow: tuple[WebUI, float], sampler: str) -> None:
    webui, shift = flow
    wanted = known(webui)
    for steps in (1, 2, 4, 8):
        painted = paint(webui, sampler, steps)
        assert painted.sampler == sampler
        check_fed(webui, [shifted(shift, 1 - i / steps) for i in range(steps)])
        assert difference(painted.pictures[0], wanted) <= 1


@pytest.mark.parametrize("flow", SHIFTS, indirect=True)
def test_image_to_image_begins_at_the_exact_strength(flow: tuple[WebUI, float]) -> None:
    """The input picture is mixed in by 1 - s; after one step of the network nothing of it is left."""
    webui, shift = flow
    wanted = known(webui)
    given = {"kind": "img2img", "init_images": [to_base64(drawing().resize((SIDE, SIDE)))]}
    for strength in (0.3, 0.5, 0.75, 1.0):
        painted = webui.paint(
            **given, width=SIDE, height=SIDE, sampler_name="LCM Suite", steps=2, denoising_strength=strength
        )
        levels = [level for level, _, _ in webui.call("/probe/fed")]
        assert levels == pytest.approx([shifted(shift, strength), shifted(shift, strength / 2)], abs=1e-4)
        assert difference(painted.pictures[0], wanted) <= 1


@pytest.mark.parametrize("flow", ["PredictionDiscreteFlow"], indirect=True)
def test_a_mask_keeps_the_rest_and_cfg_runs_two_rows(flow: tuple[WebUI, float]) -> None:
    webui, _ = flow
    picture = drawing().resize((SIDE, SIDE))
    settings = {"sampler_name": "TCD Suite", "cfg_scale": 3, "denoising_strength": 0.8, "width": SIDE, "height": SIDE}
    painted = webui.paint("img2img", **settings, **left_half(picture))
    kept = (SIDE // 2 + 32, 0, SIDE, SIDE)
    assert painted.batches == [2] * 4
    assert difference(painted.pictures[0].crop(kept), picture.crop(kept)) <= 1

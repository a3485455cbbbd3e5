"""LCM latent travel without a web UI: points, mixed noise and mixed prompts."""

from __future__ import annotations

import errno
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from extension_a1111.travel import (
    Point,
    TravelNoise,
    describe,
    mix_conditioning,
    mix_parts,
    mix_schedules,
    read_points,
    travelling,
)
from lcm_core.errors import InputError
from lcm_core.pipeline.generate import Inputs, mix_inputs, noise_source

MAIN = "a pizza <lora:lcm:0.8>"


def test_points_take_what_a_line_leaves_out_from_the_page() -> None:
    points = read_points("a pear @ 7\n\n @-1 \na plum", MAIN, 3)
    assert points == [
        Point(MAIN, 3),
        Point("a pear <lora:lcm:0.8>", 7),
        Point(MAIN, -1),
        Point("a plum <lora:lcm:0.8>", 3),
    ]


def test_an_at_sign_without_a_number_belongs_to_the_prompt() -> None:
    assert read_points("me @ home\nyou @ home @ 2", "", 1, start_above=False) == [
        Point("me @ home", 1),
        Point("you @ home", 2),
    ]


@pytest.mark.parametrize(("text", "above"), [("", True), ("a pear", False), ("\n \n", True)])
def test_one_point_is_no_travel(text: str, above: bool) -> None:
    with pytest.raises(InputError, match="two points"):
        read_points(text, MAIN, 0, above)


def test_a_network_that_only_one_point_has_is_refused() -> None:
    with pytest.raises(InputError, match=r"<lora:other:1>; write it in the main prompt"):
        read_points("a pear <lora:other:1>", MAIN, 0)


class Source:
    """Noise as the web UI draws it: a stream for each seed."""

    def __init__(self, shape: tuple[int, ...], seeds: list[int], subseeds: Any = None) -> None:
        self.shape, self.seeds, self.subseeds = shape, seeds, subseeds
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def next(self) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=generator) for generator in self.generators])


def test_first_and_later_noise_of_a_frame_are_those_of_the_library() -> None:
    """If later noise did not travel, the second and third draw would differ."""
    shape = (4, 8, 8)
    noise = travelling(Source, [9], 0.3, "slerp")(shape, [5], subseeds=[1])
    assert noise.subseeds == [1]  # the host's own attributes stay visible
    a, b = (Inputs({}, None, noise_source([seed], torch.device("cpu"))) for seed in (5, 9))
    first, later = mix_inputs(a, b, 0.3, "slerp").noise(shape)
    torch.testing.assert_close(noise.next(), first, rtol=0, atol=0)
    for _ in range(2):
        torch.testing.assert_close(noise.next(), later(torch.ones(1), torch.ones(1)), rtol=0, atol=0)


@pytest.mark.parametrize(("fraction", "seed"), [(0.0, 5), (1.0, 9)])
def test_the_ends_draw_one_point_s_noise_bit_for_bit(fraction: float, seed: int) -> None:
    noise = TravelNoise(Source((4, 2, 2), [5]), Source((4, 2, 2), [9]), fraction, "slerp")
    alone = Source((4, 2, 2), [seed])
    for _ in range(3):
        assert torch.equal(noise.next(), alone.next())


def rows(seed: int, length: int, width: int = 6) -> Tensor:
    return torch.randn(length, width, generator=torch.Generator().manual_seed(seed))


def test_prompts_are_mixed_on_the_arc_of_the_whole_embedding() -> None:
    a, b, t = rows(1, 77), rows(2, 77), 0.25
    wide_a, wide_b = a.double().flatten(), b.double().flatten()
    angle = math.acos(float(wide_a @ wide_b / wide_a.norm() / wide_b.norm()))
    arc = (math.sin((1 - t) * angle) * wide_a + math.sin(t * angle) * wide_b) / math.sin(angle)
    torch.testing.assert_close(mix_conditioning(a, b, t, "slerp"), arc.view(77, 6).float())


def test_a_shorter_prompt_is_lengthened_as_the_host_does() -> None:
    a, b = rows(1, 154), rows(2, 77)
    expected = 0.5 * a + 0.5 * torch.cat([b, b[-1:].repeat(77, 1)])
    torch.testing.assert_close(mix_conditioning(a, b, 0.5, "lerp"), expected)
    torch.testing.assert_close(mix_conditioning(b, a, 0.5, "lerp"), expected)


def test_sdxl_conditioning_is_mixed_in_rows_and_vector_and_keeps_its_class() -> None:
    class Host(dict):
        pass

    a, b = (Host(crossattn=rows(seed, 77), vector=rows(seed + 10, 1)[0]) for seed in (1, 2))
    mixed = mix_conditioning(a, b, 0.5, "lerp")
    assert type(mixed) is Host
    torch.testing.assert_close(mixed["vector"], 0.5 * (a["vector"] + b["vector"]))
    torch.testing.assert_close(mixed["crossattn"], 0.5 * (a["crossattn"] + b["crossattn"]))


def test_a_prompt_that_changes_within_the_picture_changes_where_either_changes() -> None:
    a = [(2, rows(1, 2)), (8, rows(2, 2))]
    b = [(5, rows(3, 2)), (8, rows(4, 2))]
    mixed = mix_schedules(a, b, 0.5, "lerp")
    assert [end for end, _ in mixed] == [2, 5, 8]
    for (_, found), (one, other) in zip(mixed, ((0, 0), (1, 0), (1, 1)), strict=True):
        torch.testing.assert_close(found, 0.5 * (a[one][1] + b[other][1]))


def test_parts_that_the_other_prompt_lacks_fade_in_and_out() -> None:
    """The host sums weight * (part - negative): at both ends the sum is that end's own."""
    a = [([(8, rows(1, 2))], 1.0), ([(8, rows(2, 2))], 0.5)]
    b = [([(8, rows(3, 2))], 2.0)]
    for first, second, t in ((a, b, 0.25), (b, a, 0.75)):
        mixed = mix_parts(first, second, t, "lerp")
        assert [weight for _, weight in mixed] == [1.25, pytest.approx(0.375)]
        torch.testing.assert_close(mixed[0][0][0][1], 0.75 * rows(1, 2) + 0.25 * rows(3, 2))
        torch.testing.assert_close(mixed[1][0][0][1], rows(2, 2), rtol=0, atol=0)


def test_a_seed_that_no_source_of_noise_takes_is_named() -> None:
    with pytest.raises(InputError, match=r"'a pear @ 99999999999999999999' has a seed that is too large; use at most"):
        read_points("a pear @ 99999999999999999999", MAIN, 0)
    assert read_points(f"@ {2**63 - 1}", MAIN, 0)[1].seed == 2**63 - 1


class Painted(SimpleNamespace):
    pass


@pytest.fixture
def script(fake_host: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The real script, on a host whose painting a test replaces."""
    monkeypatch.setitem(sys.modules, "gradio", ModuleType("gradio"))
    fake_host.scripts.Script = object
    fake_host.processing.fix_seed = lambda p: None
    fake_host.shared.state = SimpleNamespace(interrupted=False, stopping_generation=False)
    fake_host.shared.prompt_styles = SimpleNamespace(apply_styles_to_prompt=lambda text, styles: text)
    fake_host.extra_networks.parse_prompts = lambda prompts: (prompts, {})
    fake_host.rng.ImageRNG = Source

    def processed(p: Any, images: list[Any], seed: int, info: str, infotexts: list[str]) -> Any:
        return Painted(images=images, infotexts=infotexts, comments="".join(f"{said}\n" for said in p.comments))

    fake_host.processing.Processed = processed
    return fake_host.load_script("lcm_travel")


def request_for(folder: Path) -> Any:
    p = SimpleNamespace(
        prompt="a", seed=1, styles=[], comments={}, outpath_samples=str(folder), do_not_save_samples=True,
        extra_generation_params={}, setup_conds=lambda: None,
    )  # fmt: skip
    p.comment = lambda text: p.comments.update({text: 1})
    return p


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def paint_until(fake_host: Any, last: int) -> None:
    def paint(p: Any) -> Any:
        paint.count += 1  # type: ignore[attr-defined]
        if paint.count > last:  # type: ignore[attr-defined]
            full_disk()
        return Painted(images=[Image.new("RGB", (8, 8), (paint.count * 20,) * 3)], infotexts=["text"])  # type: ignore[attr-defined]

    paint.count = 0  # type: ignore[attr-defined]
    fake_host.processing.process_images = paint


def test_a_full_disk_keeps_the_frames_painted_so_far(fake_host: Any, script: Any, tmp_path: Path) -> None:
    p = request_for(tmp_path)
    paint_until(fake_host, 3)
    result = script.LcmTravel().run(p, "@ 2", True, False, True, 5, 6, "linear", "slerp", [])
    assert len(result.images) == 3
    assert "Frame 4 could not be written (No space left on device); here are the frames before it." in result.comments
    paint_until(fake_host, 0)
    with pytest.raises(OSError, match="No space left"):  # nothing to keep
        script.LcmTravel().run(request_for(tmp_path), "@ 2", True, False, True, 5, 6, "linear", "slerp", [])


def test_an_animation_that_cannot_be_written_costs_no_frame(
    fake_host: Any, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paint_until(fake_host, 9)
    monkeypatch.setattr(script, "save_animation", full_disk)
    result = script.LcmTravel().run(request_for(tmp_path), "@ 2", True, False, True, 4, 6, "linear", "slerp", ["gif"])
    assert len(result.images) == 4
    assert "No space left on device" in result.comments


def test_the_infotext_says_where_a_frame_lies() -> None:
    assert describe(Point("a pear <lora:lcm:0.8>", 7), 1 / 3) == "0.3333 of the way to a pear @ 7"

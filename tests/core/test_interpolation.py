"""Interpolation against float64 geometry, and the promise that keyframes come back bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lcm_core.diffusion.interpolation import EASINGS, ease, lerp, plan_frames, slerp, travel, travel_noise_sampler
from lcm_core.errors import InputError


def noise(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def textbook_slerp(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """Shoemake's formula, one sample, float64."""
    a, b = a.double(), b.double()
    angle = math.acos(float((a * b).sum() / (a.norm() * b.norm())))
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.93])
def test_slerp_is_shoemakes_formula_per_sample(t: float) -> None:
    a, b = noise(0, 3, 4, 8, 8), noise(1, 3, 4, 8, 8)
    expected = torch.stack([textbook_slerp(x, y, t) for x, y in zip(a, b, strict=True)])
    assert_close(slerp(a, b, t), expected.float(), rtol=1e-5, atol=1e-5)


def test_slerp_of_noise_keeps_the_variance_that_lerp_halves() -> None:
    a, b = noise(0, 1, 4, 64, 64), noise(1, 1, 4, 64, 64)
    assert_close(slerp(a, b, 0.5).var(), torch.tensor(1.0), rtol=0.03, atol=0)
    assert_close(lerp(a, b, 0.5).var(), torch.tensor(0.5), rtol=0.05, atol=0)


@pytest.mark.parametrize("mix", [lerp, slerp])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_ends_are_bit_exact_even_for_negative_zero(mix, dtype: torch.dtype) -> None:
    a, b = noise(0, 2, 4, 8, dtype=dtype), noise(1, 2, 4, 8, dtype=dtype)
    a[0, 0, 0] = b[0, 0, 1] = -0.0
    for t, end in ((0.0, a), (1.0, b)):
        result = mix(a, b, t)
        assert result.dtype == dtype
        assert torch.equal(result.view(torch.uint8), end.view(torch.uint8))


@pytest.mark.parametrize("mix", [lerp, slerp])
def test_equal_ends_do_not_drift_on_the_way(mix) -> None:
    a = noise(3, 2, 4, 8, 8)
    assert torch.equal(mix(a, a.clone(), 0.37), a)


def test_opposite_and_zero_vectors_take_the_straight_line() -> None:
    a = noise(0, 1, 16)
    assert_close(slerp(a, -a, 0.25), 0.5 * a)
    assert_close(slerp(torch.zeros_like(a), a, 0.25), 0.25 * a)


def test_fraction_per_sample_matches_single_fractions() -> None:
    a, b, t = noise(0, 3, 4, 5), noise(1, 3, 4, 5), torch.tensor([0.0, 0.3, 1.0])
    expected = torch.cat([slerp(a[i : i + 1], b[i : i + 1], float(t[i])) for i in range(3)])
    assert_close(slerp(a, b, t), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", EASINGS)
def test_easings_keep_the_ends_and_never_run_backwards(kind: str) -> None:
    values = [ease(i / 100, kind) for i in range(101)]
    assert values[0] == 0.0
    assert values[-1] == 1.0
    assert values == sorted(values)


def test_easing_values() -> None:
    """Named curves at a quarter: 3t^2-2t^3, (1-cos pi t)/2, 4t^3, t^2, t(2-t)."""
    expected = {"linear": 0.25, "smooth": 0.15625, "sine": 0.1464466, "cubic": 0.0625, "in": 0.0625, "out": 0.4375}
    assert {kind: ease(0.25, kind) for kind in EASINGS} == pytest.approx(expected)


@given(keyframes=st.integers(1, 6), frames=st.integers(1, 40), loop=st.booleans())
@settings(max_examples=60, deadline=None)
def test_frames_are_evenly_spread_and_meet_the_keyframes(keyframes: int, frames: int, loop: bool) -> None:
    plan = plan_frames(keyframes, frames, loop=loop)
    assert len(plan) == frames
    assert plan[0] == (0, 0, 0.0)
    if not loop and frames > 1:
        assert plan[-1].start == keyframes - 1
        assert plan[-1].fraction == 0.0
    places = [frame.start + frame.fraction for frame in plan]
    gap = keyframes / frames if loop else (keyframes - 1) / max(frames - 1, 1)
    assert places == pytest.approx([i * gap for i in range(frames)])


def test_closed_loop_goes_back_to_the_first_keyframe_without_repeating_it() -> None:
    plan = plan_frames(3, 6, loop=True)
    assert [tuple(frame) for frame in plan] == [(0, 0, 0), (0, 1, 0.5), (1, 1, 0), (1, 2, 0.5), (2, 2, 0), (2, 0, 0.5)]


def test_travel_passes_through_its_keyframes_bit_for_bit() -> None:
    keys = noise(5, 3, 4, 6, 6)
    frames = travel(keys, 9, "slerp", "sine")
    assert torch.equal(frames[[0, 4, 8]], keys)
    assert_close(frames[2], textbook_slerp(keys[0], keys[1], ease(0.5, "sine")).float(), rtol=1e-5, atol=1e-5)


def test_travel_noise_mixes_what_both_keyframes_draw_at_the_same_step() -> None:
    def drawer(seed: int):
        generator = torch.Generator().manual_seed(seed)
        return lambda sigma, sigma_next: torch.randn(1, 4, 8, 8, generator=generator)

    sample, a, b = travel_noise_sampler(drawer(1), drawer(2), 0.3), drawer(1), drawer(2)
    for _ in range(3):
        assert torch.equal(sample(None, None), slerp(a(None, None), b(None, None), 0.3))


def test_a_wrong_name_or_count_is_refused_in_words() -> None:
    with pytest.raises(InputError, match=r"unknown easing 'bouncy'.*linear"):
        ease(0.5, "bouncy")
    with pytest.raises(InputError, match=r"unknown interpolation mode 'spline'.*slerp"):
        travel(torch.zeros(2, 3), 4, "spline")
    with pytest.raises(InputError, match="at least one"):
        plan_frames(0, 4)
    with pytest.raises(InputError, match="0 frames"):
        plan_frames(2, 0)


def test_nothing_is_read_back_from_the_device() -> None:
    """A step must run on fake tensors: a branch on a value would raise here."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        a, b = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
        assert slerp(a, b, 0.3).shape == (2, 4, 8, 8)

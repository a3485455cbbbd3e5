"""The numbers of the benchmark against independent formulas."""

import numpy as np
import pytest
import scipy.linalg
import torch

from lcm_core.errors import InputError
from trainer.evaluate.metrics import frechet_distance, recall, retrieval_accuracy


def test_frechet_distance_equals_the_matrix_square_root_formula():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator)
    a = torch.randn(300, 6, generator=generator) @ mixing
    b = torch.randn(200, 6, generator=generator) * 1.5 + 0.3
    cov_a, cov_b = np.cov(a.double().numpy().T), np.cov(b.double().numpy().T)
    shift = (a.double().mean(0) - b.double().mean(0)).numpy()
    expected = shift @ shift + np.trace(cov_a + cov_b - 2 * scipy.linalg.sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_a_set_to_itself_is_zero_even_where_its_covariance_is_singular():
    a = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    flat = torch.cat([a, a[:, :1] * 2], dim=1)  # rank 3 in 4 dimensions
    assert frechet_distance(flat, flat) == pytest.approx(0, abs=1e-5)


def test_recall_counts_the_modes_that_were_dropped():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(200, 4, generator=generator), torch.randn(200, 4, generator=generator) + 50
    real = torch.cat([left, right])
    only_left = torch.randn(400, 4, generator=generator)
    both = torch.cat([only_left[:200], only_left[200:] + 50])
    assert recall(real, only_left) == pytest.approx(0.5, abs=0.05)
    assert recall(real, both) > 0.9


def test_retrieval_takes_the_nearest_real_picture_in_any_style():
    real = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    labels = torch.tensor([7, 7, 9])
    generated = torch.tensor([[2.0, 0.1], [0.1, 3.0], [0.1, 3.0]])
    assert retrieval_accuracy(generated, torch.tensor([7, 9, 7]), real, labels) == pytest.approx(2 / 3)


@pytest.mark.parametrize("broken", [torch.zeros(1, 3), torch.full((5, 3), float("nan")), torch.zeros(5, 4)])
def test_unusable_features_are_named(broken):
    with pytest.raises(InputError, match="features"):
        frechet_distance(torch.randn(10, 3), broken)

"""A loss by CUDA graphs trains as the plain one does."""

import copy

import pytest
import torch
from torch import nn

from trainer.cuda_graphs import graphed, graphed_sample
from trainer.methods.shared import Pair, Sample


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_training_by_graphs_ends_where_plain_training_does():
    device = torch.device("cuda")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 4)).to(device)
    other = copy.deepcopy(plain)
    loss = graphed(lambda x, y: (other(x) - y).square().mean(), other.parameters(), device)
    slow, fast = (torch.optim.SGD(network.parameters(), 0.1) for network in (plain, other))
    for step in range(6):
        x, y = torch.randn(3 + step % 2, 8), torch.randn(3 + step % 2, 4)  # two shapes, two graphs
        expected = (plain(x.to(device)) - y.to(device)).square().mean()
        expected.backward()
        given = loss(x, y)
        given.backward()
        torch.testing.assert_close(given, expected)
        for optimizer in (slow, fast):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    torch.testing.assert_close(list(other.parameters()), list(plain.parameters()))


def test_on_a_cpu_the_loss_stays_as_it_is():
    def loss(x: torch.Tensor) -> torch.Tensor:
        return x.sum()

    assert graphed(loss, [], torch.device("cpu")) is loss


def test_a_samples_tensors_reach_the_loss_each_in_its_place():
    def sample(seed: int) -> Sample:
        numbers = torch.Generator().manual_seed(seed)
        x0, eps, w, text = (torch.randn(2, n, generator=numbers) for n in (3, 3, 1, 5))
        t, s, end = torch.randint(1000, (3, 2), generator=numbers)
        return Sample(x0, eps, Pair(t, s, end), w[:, 0], {"text": text, "more": {"label": t}}, None)

    def loss(given: Sample) -> torch.Tensor:
        assert given.null_conditioning is None
        words = given.conditioning["text"].sum() * given.conditioning["more"]["label"]
        points = given.points.t - 2 * given.points.s + 3 * given.points.end
        return ((given.x0 - 2 * given.eps).sum(1) * given.w + words + points).sum()

    of_sample = graphed_sample(loss, [], torch.device("cpu"))
    for seed in (0, 1):
        torch.testing.assert_close(of_sample(sample(seed)), loss(sample(seed)))

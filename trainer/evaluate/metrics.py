"""Numbers for pictures: Frechet distance, recall and retrieval accuracy, in any feature space."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lcm_core.errors import InputError


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Frechet distance of two Gaussians fitted to the features, (N, D) and (M, D) (arXiv 1706.08500 Eq. 6).

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), in float64. The trace of the root is taken from the eigenvalues of the
    symmetric S1^(1/2) S2 S1^(1/2), which are those of S1 S2 and cannot turn complex.

    Raises:
        InputError: fewer than two rows, other widths, or values that are not finite.
    """
    _check(real, generated)
    (mean1, cov1), (mean2, cov2) = ((f.double().mean(0), torch.cov(f.double().T)) for f in (real, generated))
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross)


def recall(real: Tensor, generated: Tensor, neighbours: int = 3) -> float:
    """Share of the real features (N, D) inside the manifold of the generated ones (M, D) (arXiv 1904.06991 Eq. 1-2).

    The manifold: balls around each generated feature, reaching to its k-th nearest generated neighbour.

    Raises:
        InputError: as `frechet_distance`, or not more generated features than `neighbours`.
    """
    _check(real, generated)
    if len(generated) <= neighbours:
        raise InputError(f"recall with {neighbours} neighbours needs more than {len(generated)} pictures")
    radii = torch.cdist(generated, generated).kthvalue(neighbours + 1).values  # (M,); the nearest is the point itself
    inside = [(torch.cdist(part, generated) <= radii).any(1) for part in real.split(1024)]
    return float(torch.cat(inside).double().mean())


def retrieval_accuracy(generated: Tensor, wanted: Tensor, real: Tensor, labels: Tensor) -> float:
    """Share of the pictures whose nearest real picture, by cosine, shows what was asked for; NaN if there are none.

    Args:
        generated: (M, D) features; wanted: (M,) the label asked for.
        real: (N, D) features; labels: (N,) their labels.
    """
    _check(real, generated, least=0)
    similarity = torch.nn.functional.normalize(generated) @ torch.nn.functional.normalize(real).T  # (M, N)
    return float((labels[similarity.argmax(1)] == wanted).double().mean())


def class_alignment(
    wanted: Sequence[str], real: Tensor, classes: Sequence[str]
) -> Callable[[Tensor], dict[str, float]]:
    """The share of pictures that are taken for the class that was asked for: that of the nearest real picture.

    Args:
        wanted: of each picture.
        real: features of the real ones, (N, D).
        classes: of each real one.
    """
    numbers = {name: number for number, name in enumerate(dict.fromkeys([*classes, *wanted]))}
    asked, shown = (torch.tensor([numbers[name] for name in names]) for names in (wanted, classes))
    return lambda features: {"alignment": retrieval_accuracy(features, asked, real, shown)}


def _check(real: Tensor, generated: Tensor, least: int = 2) -> None:
    for name, features in (("real", real), ("generated", generated)):
        if features.ndim != 2 or len(features) < least:
            shape = tuple(features.shape)
            raise InputError(f"{name} features of shape {shape} are too few; give (N, D) with N >= {least}")
        if not bool(torch.isfinite(features).all()):
            raise InputError(f"{name} features are not finite; the pictures came from a broken model")
    if real.shape[1] != generated.shape[1]:
        raise InputError(f"real features have width {real.shape[1]}, generated ones {generated.shape[1]}")

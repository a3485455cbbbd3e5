"""`Diffusion`: a model's noise process and what its network predicts. Samplers, solvers, losses and hosts ask it alone.

Wherever a timestep `t` (B,) is given, it belongs to the samples of a batch (B, ...) of any further shape: pictures
(B, C, h, w), video (B, C, T, h, w). Samples are in the network's own scale, x_t = a x0 + b eps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lcm_core.diffusion.process import Process, RectifiedFlow, VariancePreserving
from lcm_core.errors import InputError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow")
"""What a network answers: the noise eps; v = a eps - b x0 (arXiv 2202.00512); x0; the velocity eps - x0."""


@dataclass(frozen=True, eq=False)
class Diffusion:
    """A frozen description of one model's diffusion; it holds no network.

    >>> d = Diffusion(RectifiedFlow(shift=3.0), "flow")
    >>> x_t = d.noise(x0, eps, t)  # doctest: +SKIP
    >>> x_s = d.jump(teacher(x_t, t), x_t, t, s)  # doctest: +SKIP
    >>> aim = d.f(target(x_s, s), x_s, s)  # doctest: +SKIP

    Raises:
        InputError: an unknown prediction type, or one that does not go with the process.
    """

    process: Process = field(default_factory=VariancePreserving)
    prediction_type: str = "epsilon"
    """What the network predicts, one of `PREDICTION_TYPES`."""
    original_steps: int = 50
    """Points of the grid that a distillation knows, or knew."""
    sigma_data: float = 0.5
    """The spread of the data in the boundary scalings (arXiv 2310.04378 Sec. 4.1)."""
    timestep_scaling: float = 10.0
    """The factor of timesteps in the boundary scalings."""

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise InputError(f"unknown prediction_type {self.prediction_type!r}; choose {', '.join(PREDICTION_TYPES)}")
        is_flow = isinstance(self.process, RectifiedFlow)
        if is_flow != (self.prediction_type == "flow"):
            kind, fits = ("flow", "'flow'") if is_flow else ("variance-preserving", "'epsilon' or 'v_prediction'")
            raise InputError(f"prediction_type {self.prediction_type!r} does not go with a {kind} process; use {fits}")
        if self.prediction_type == "epsilon" and self.process.zero_terminal_snr:
            raise InputError(
                "prediction_type 'epsilon' is undefined on a zero-terminal-SNR schedule; "
                "use 'v_prediction' or 'sample', or a schedule without zero_terminal_snr"
            )
        if not 1 <= self.original_steps <= self.process.num_train_timesteps:
            raise InputError(
                f"original_steps={self.original_steps} must be 1 to {self.process.num_train_timesteps}, "
                "the training timesteps"
            )

    def grid(self, index: Tensor) -> Tensor:
        """Timesteps of points 0 (clean) to `original_steps` (noise) of the skipping grid, same shape."""
        return self.process.grid(index, self.original_steps)

    def scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) at timesteps t (B,), each (B, 1, ...) to go with `like` (B, ...), in float32, float64 if that is."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        a, b = self.process.coefficients(t)
        return per_sample(a.to(dtype), like), per_sample(b.to(dtype), like)

    def noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = a x0 + b eps, like x0 (arXiv 2006.11239 Eq. 4)."""
        a, b = self.scales(t, x0)
        return a * x0 + b * eps

    def x0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean sample that the network's output at x_t means, like x_t."""
        return to_x0(output, x_t, *self.scales(t, x_t), self.prediction_type)

    def eps(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that the network's output at x_t means, like x_t."""
        return to_eps(output, x_t, *self.scales(t, x_t), self.prediction_type)

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What a perfect network answers at `noise(x0, eps, t)`, like x0: the target of a diffusion loss."""
        a, b = self.scales(t, x0)
        targets = {"epsilon": eps, "v_prediction": a * eps - b * x0, "sample": x0, "flow": eps - x0}
        return targets[self.prediction_type]

    def jump(self, output: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """x_s = a_s x0 + b_s eps, like x_t: deterministic DDIM (arXiv 2010.02502 Eq. 12 with sigma 0).

        On a flow it is Euler's step, x_t + (s - t) v. It is also the consistency function of trajectories (arXiv
        2402.19159 Eq. 9), which needs no boundary scalings: at s = t it is x_t.
        """
        return self.noise(self.x0(output, x_t, t), self.eps(output, x_t, t), s)

    def f(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The consistency function, like x_t: c_skip(t) x_t + c_out(t) x0 (arXiv 2310.04378 Eq. 9); on a flow x0."""
        return self.bounded(self.x0(output, x_t, t), x_t, t)

    def bounded(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """`f` where x0 is known already, like x_t."""
        if not self.process.has_boundary:
            return x0
        c_skip, c_out = boundary_scalings(per_sample(t, x_t), self.sigma_data, self.timestep_scaling)
        return c_skip * x_t + c_out * x0

    def snr(self, t: Tensor) -> Tensor:
        """a^2 / b^2 at timesteps t, same shape, float32 or better."""
        a, b = self.process.coefficients(t)
        return (a / b) ** 2


def boundary_scalings(
    timesteps: Tensor, sigma_data: float = 0.5, timestep_scaling: float = 10.0
) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) at `timesteps`, each of the same shape; (1, 0) at t = 0, so that f(x, 0) = x.

    arXiv 2310.04378 Sec. 4.1 and App. C: c_skip = sd^2 / ((s t)^2 + sd^2), c_out = s t / sqrt((s t)^2 + sd^2).
    """
    scaled = timesteps * timestep_scaling
    norm = (scaled * scaled).add_(sigma_data**2)
    return sigma_data**2 / norm, scaled / norm.sqrt()


def to_x0(output: Tensor, x_t: Tensor, a: Tensor, b: Tensor, prediction_type: str) -> Tensor:
    """x0 from a network's output at x_t = a x0 + b eps, like x_t.

    epsilon: (x_t - b out) / a; v_prediction: a x_t - b out (arXiv 2202.00512 App. D); sample: out; flow: x_t - b out.
    """
    if prediction_type == "epsilon":
        return (x_t - b * output).div_(a)
    if prediction_type == "v_prediction":
        return a * x_t - b * output
    return output if prediction_type == "sample" else x_t - b * output


def to_eps(output: Tensor, x_t: Tensor, a: Tensor, b: Tensor, prediction_type: str) -> Tensor:
    """eps from a network's output at x_t = a x0 + b eps, like x_t.

    epsilon: out; v_prediction: a out + b x_t; sample: (x_t - a out) / b; flow: x_t + a out.
    """
    if prediction_type == "epsilon":
        return output
    if prediction_type == "v_prediction":
        return a * output + b * x_t
    return (x_t - a * output) / b if prediction_type == "sample" else x_t + a * output


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """Values (B,), or one for all, as (B, 1, ...), to go with samples (B, ...)."""
    return values.reshape((-1,) + (1,) * (x.ndim - 1))

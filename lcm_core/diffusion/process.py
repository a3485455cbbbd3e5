"""Noise processes, x_t = a(t) x0 + b(t) eps: how much signal and how much noise a sample holds at timestep t.

Two coordinates name a noise level: the timestep `t` that a network is asked at, and `sigma`, by which samplers and
hosts go. Each process says what they mean for it, so that one sampler and one loss serve all models:

| | `VariancePreserving` (Stable Diffusion) | `RectifiedFlow` (SD3, Flux, Qwen-Image, Wan, ...) |
|---|---|---|
| t | 0 .. T - 1, whole numbers in training | 0 .. T, fractions too |
| a, b | sqrt(abar), sqrt(1 - abar) | 1 - t / T, t / T |
| sigma | b / a, from 0 to infinity | t / T, from 0 to 1 |
| a sampler's x | x0 + sigma eps, as in k-diffusion | (1 - sigma) x0 + sigma eps |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from lcm_core.diffusion.schedule import get_alphas_cumprod
from lcm_core.errors import InputError

# A schedule that ends in no signal at all has an infinite last sigma. Hosts put this abar in its place (ComfyUI's
# number, sigma 4518.8); such a table is recognised by it, and timesteps between the last two are interpolated with it.
ZERO_SNR_ABAR = 4.8973451890853435e-08
# Timesteps are rounded to this fraction of one: float32 sigmas give them to about 1e-4 only, and a network asked at
# 998.9999 would not answer quite as it does at 999.
_PARTS = 512
Tables = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True, eq=False)
class VariancePreserving:
    """Diffusion with a^2 + b^2 = 1, given by its table of cumulative signal fractions (arXiv 2006.11239).

    `VariancePreserving()` is Stable Diffusion's. Any falling `alphas_cumprod` in [0, 1] will do; it is kept on the CPU
    in float64. Where the last one is 0 (zero terminal SNR, arXiv 2305.08891) the last sigma is infinite, and samplers
    carry x_t = a x0 + b eps itself instead of x_t / a, so that pure noise is as exact as any other level.

    Raises:
        InputError: not one-dimensional, fewer than 2 values, not strictly falling, or outside [0, 1].
    """

    alphas_cumprod: Tensor = field(default_factory=get_alphas_cumprod)  # (T,)
    _tables: dict[Any, tuple[Tensor, ...]] = field(default_factory=dict, init=False, repr=False)

    reaches_pure_noise: bool = field(init=False)
    """Whether the last timestep carries no signal at all: a = 0."""

    _highest: float = field(init=False, repr=False)  # the last sigma, or what stands for it between timesteps

    has_boundary = True
    """Whether f needs boundary scalings to be the identity at the clean end, where t = 0 still holds some noise."""

    def __post_init__(self) -> None:
        abar = torch.as_tensor(self.alphas_cumprod).detach().to("cpu", torch.float64).clone()
        if abar.ndim != 1 or len(abar) < 2:
            raise InputError(f"alphas_cumprod of shape {tuple(abar.shape)} is no schedule; give one row of 2 or more")
        if not bool((abar.diff() < 0).all()) or abar[0] > 1 or abar[-1] < 0:
            raise InputError(
                "alphas_cumprod must fall strictly and lie in [0, 1]; check for NaN or a reversed schedule"
            )
        if abar[-1] < 1e-12:  # what rounding left of 0
            abar[-1] = 0
        object.__setattr__(self, "alphas_cumprod", abar)
        # read once, here: inside a sampler's loop nothing may be read back from a device
        last = min(ZERO_SNR_ABAR, float(abar[-2]) / 2) if abar[-1] == 0 else float(abar[-1])
        object.__setattr__(self, "reaches_pure_noise", float(abar[-1]) == 0)
        object.__setattr__(self, "_highest", ((1 - last) / last) ** 0.5)

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of training timesteps."""
        return len(self.alphas_cumprod)

    @cached_property
    def sigmas(self) -> Tensor:
        """b / a of every timestep, (T,) float64 on the CPU, rising."""
        return ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()

    @cached_property
    def zero_terminal_snr(self) -> bool:
        """Whether the last timestep carries (almost) no signal, so that x0 cannot be computed from eps there."""
        return bool(self.alphas_cumprod[-1] <= ZERO_SNR_ABAR * 1.001 and self.alphas_cumprod[-2] < 1e-6)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) at timesteps t, whole or fractional, each of t's shape, in t's precision but at least float32."""
        if t.is_floating_point():
            return self.network_scales(self.t_to_sigma(t))
        a, b = self._coefficients(t.device)  # (T,) each
        return a[t], b[t]

    def scales(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of a sampler's x at noise levels sigma, each of sigma's shape: 1 and sigma."""
        if self.reaches_pure_noise:
            return self.network_scales(sigma)
        return torch.ones_like(sigma), sigma

    def network_scales(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of what the network sees at noise levels sigma, each of sigma's shape."""
        a = (sigma * sigma).add_(1).rsqrt_()
        b = sigma * a
        return a, (torch.where(sigma.isinf(), 1.0, b) if self.reaches_pure_noise else b)

    def initial_scale(self, sigma: Tensor) -> Tensor:
        """What a sampler's x begins with at sigma where there is no picture: noise of unit variance for the network."""
        return torch.ones_like(sigma) if self.reaches_pure_noise else (1 + sigma * sigma) ** 0.5

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        """Timesteps of `sigma`, same shape and device, in sigma's precision but at least float32.

        By interpolation in log sigma; whole numbers exactly on grid points. Levels outside the table give its first or
        last timestep (0 and inf included). Nothing is read back from the device.
        """
        sigma = sigma if sigma.dtype == torch.float64 else sigma.float()
        inner, floors, gaps = self._intervals(sigma.device, sigma.dtype)
        log_sigma = sigma.log()
        low = torch.searchsorted(inner, log_sigma, right=True)  # 0..T-2
        parts = (log_sigma - torch.take(floors, low)).div_(torch.take(gaps, low)).clamp_(0, _PARTS)
        return parts.add_(low, alpha=_PARTS).round_().div_(_PARTS)

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """Sigmas of timesteps `t` (whole or fractional, in 0..T-1), same shape and device; float32, float64 if t is."""
        dtype = torch.float64 if t.dtype == torch.float64 else torch.float32
        (log_sigmas,) = self._log_sigmas(t.device, dtype)
        low = t.floor().long().clamp(0, len(log_sigmas) - 2)
        sigma = torch.lerp(torch.take(log_sigmas, low), torch.take(log_sigmas, low + 1), (t - low).to(dtype)).exp()
        return torch.where(t >= len(log_sigmas) - 1, torch.inf, sigma) if self.reaches_pure_noise else sigma

    def ratio_to_sigma(self, ratio: Tensor) -> Tensor:
        """Sigmas at which b / a is `ratio`, same shape: here it is sigma itself."""
        return ratio

    def sigmas_at(self, timesteps: Tensor) -> Tensor:
        """Sigmas of whole timesteps, (N,) int64 -> (N,) float64, straight from the table."""
        return self.sigmas[timesteps]

    def grid(self, index: Tensor, original_steps: int) -> Tensor:
        """Timesteps of points of the skipping grid (arXiv 2310.04378 Sec. 4.3), same shape, int64.

        Args:
            index: 1 to `original_steps`, from clean to noisy, k = T // original_steps timesteps apart, beginning with
                k - 1; 0 is timestep 0. Fractions lie between.
        """
        k = self.num_train_timesteps // original_steps
        return (index.double() * k - 1).round().clamp(min=0).long()

    def below(self, t: Tensor, share: Tensor) -> Tensor:
        """Timesteps that are even over 0..t where `share` is even over [0, 1), same shape."""
        return (share * (t + 1)).long()

    def draw(self, size: int, generator: torch.Generator, lowest: float = 0.0, highest: float = 1.0) -> Tensor:
        """Random training timesteps, (size,) int64, even between these shares of T."""
        total = self.num_train_timesteps
        return torch.randint(
            round(lowest * total), min(round(highest * total) + 1, total), (size,), generator=generator
        )

    def landing(self, sigma_next: Tensor, gamma: float) -> Tensor:
        """Where a step of TCD lands before noise leads it up to `sigma_next` (arXiv 2402.19159 Alg. 4), same shape.

        On timestep floor((1 - gamma) t_next); sigma 0 stands for timestep 0, as in diffusers' TCDScheduler.
        """
        # In float32 because diffusers is: 0.7 * 700 is 490 there, and 489.99999999999994 in float64.
        t = self.sigma_to_t(sigma_next.float())
        jump = ((1 - gamma) * t).floor()
        moved = (sigma_next == 0) | ((gamma > 0) & (jump < t))
        return torch.where(moved, self.sigmas[jump.long()], sigma_next.double())

    def end_scale(self, sigma: Tensor) -> Tensor:
        """What the last step of TCD, which lands at sigma above 0, is multiplied by: diffusers takes it for clean."""
        return self.network_scales(sigma)[0] / self.scales(sigma)[0]

    def _coefficients(self, device: torch.device) -> tuple[Tensor, ...]:
        """a and b of every timestep, each (T,)."""
        dtype = torch.float32 if device.type == "mps" else torch.float64
        abar = self.alphas_cumprod
        return self._on(device, dtype, "coefficients", lambda: (abar.sqrt(), (1 - abar).sqrt()))

    def _log_sigmas(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """(T,) finite: only what lies between the last two timesteps depends on what stands for an infinite one."""
        return self._on(device, dtype, "log_sigmas", lambda: (self.sigmas.clamp(max=self._highest).log(),))

    def _intervals(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Inner edges of the intervals between log sigmas (T - 2,), where each begins, its length in parts (T - 1,)."""
        (edges,) = self._log_sigmas(device, dtype)
        return self._on(device, dtype, "intervals", lambda: (edges[1:-1], edges[:-1], edges.diff() / _PARTS))

    def _on(self, device: torch.device, dtype: torch.dtype, name: str, make: Tables) -> tuple[Tensor, ...]:
        # Moved once per device: a copy inside every step would wait for the device.
        if (name, device, dtype) not in self._tables:
            self._tables[name, device, dtype] = tuple(table.to(device, dtype) for table in make())
        return self._tables[name, device, dtype]


@dataclass(frozen=True)
class RectifiedFlow:
    """Straight lines between picture and noise, a = 1 - t / T and b = t / T (arXiv 2209.03003, 2403.03206).

    Raises:
        InputError: shift that is not above 0, or fewer than 2 timesteps.
    """

    shift: float = 1.0
    """alpha in s = alpha u / (1 + (alpha - 1) u): how far even steps u are moved to the noisy end (arXiv 2403.03206
    Eq. 23). 3 for SD3 and Z-Image, e^mu for Flux; it moves grids, never the process."""
    num_train_timesteps: int = 1000
    """T: the network is asked at t = T s."""

    has_boundary = False  # f(x, 0) = x by itself
    reaches_pure_noise = True
    zero_terminal_snr = True

    def __post_init__(self) -> None:
        if not 0 < self.shift < float("inf"):
            raise InputError(
                f"shift={self.shift:g} is out of range; use a number above 0 (1 shifts nothing, 3 is SD3's)"
            )
        if self.num_train_timesteps < 2:
            raise InputError(f"num_train_timesteps={self.num_train_timesteps} is too few; use 2 or more")

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) at timesteps t, each of t's shape."""
        return self.scales(self.t_to_sigma(t))

    def scales(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of a sampler's x at noise levels sigma, each of sigma's shape."""
        return 1 - sigma, sigma

    def network_scales(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of what the network sees: the sampler's x as it is."""
        return self.scales(sigma)

    def initial_scale(self, sigma: Tensor) -> Tensor:
        """What a sampler's x begins with at sigma where there is no picture: sigma times the noise."""
        return sigma

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        """Timesteps of `sigma`, same shape, in sigma's precision but at least float32."""
        return (sigma if sigma.dtype == torch.float64 else sigma.float()) * self.num_train_timesteps

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """Sigmas of timesteps, same shape; float32, float64 if t is."""
        return (t if t.dtype == torch.float64 else t.float()) / self.num_train_timesteps

    def ratio_to_sigma(self, ratio: Tensor) -> Tensor:
        """Sigmas at which b / a is `ratio`, same shape: ratio / (1 + ratio)."""
        return torch.where(ratio.isinf(), 1.0, ratio / (1 + ratio))

    def sigmas_at(self, timesteps: Tensor) -> Tensor:
        """Sigmas of timesteps, (N,) -> (N,) float64."""
        return timesteps.double() / self.num_train_timesteps

    def shifted(self, u: Tensor) -> Tensor:
        """s of u in [0, 1], same shape: shift u / (1 + (shift - 1) u)."""
        return self.shift * u / (1 + (self.shift - 1) * u)

    def grid(self, index: Tensor, original_steps: int) -> Tensor:
        """Timesteps of points of the skipping grid, same shape, float64: T times index / original_steps, shifted.

        Args:
            index: 0, the picture, to `original_steps`, pure noise; fractions lie between.
        """
        return self.num_train_timesteps * self.shifted((index.double() / original_steps).clamp(0, 1))

    def below(self, t: Tensor, share: Tensor) -> Tensor:
        """Timesteps that are even over [0, t) where `share` is even over [0, 1), same shape."""
        return share * t

    def draw(self, size: int, generator: torch.Generator, lowest: float = 0.0, highest: float = 1.0) -> Tensor:
        """Random training timesteps, (size,) float64, even between these shares of T and then shifted."""
        u = lowest + (highest - lowest) * torch.rand(size, generator=generator, dtype=torch.float64)
        return self.num_train_timesteps * self.shifted(u)

    def landing(self, sigma_next: Tensor, gamma: float) -> Tensor:
        """Where a step of TCD lands before noise leads it up to `sigma_next`: (1 - gamma) sigma_next, float64."""
        return (1 - gamma) * sigma_next.double()

    def end_scale(self, sigma: Tensor) -> Tensor:
        """What the last step of TCD is multiplied by: nothing, since it lands on the clean picture."""
        return torch.ones_like(sigma)


Process = VariancePreserving | RectifiedFlow


@cache
def stable_diffusion() -> VariancePreserving:
    """What stands for a process that is not given, made once."""
    return VariancePreserving()


def abar_from_sigma(sigma: Tensor) -> Tensor:
    """abar = 1 / (1 + sigma^2) of a variance-preserving process, same shape."""
    return 1 / (1 + sigma * sigma)

"""Stand-ins for a host's `model_sampling`, of kinds that LCM knows and of others."""

from __future__ import annotations

from torch import Tensor

from lcm_core.diffusion.process import VariancePreserving


class Flow:
    """A host's model_sampling of a flow model."""

    shift, noise_scale = 3.0, 1.0

    def noise_scaling(self, s: Tensor, noise: Tensor, image: Tensor, max_denoise: bool = False) -> Tensor:
        """(1 - s) x0 + s eps."""
        return s * self.noise_scale * noise + (1 - s) * image

    def calculate_denoised(self, s: Tensor, output: Tensor, x: Tensor) -> Tensor:
        """x - s v."""
        return x - s * output

    def calculate_input(self, s: Tensor, x: Tensor) -> Tensor:
        """As it is."""
        return x

    def percent_to_sigma(self, percent: float) -> float:
        """Shifted."""
        u = 1 - percent
        return self.shift * u / (1 + (self.shift - 1) * u)


class Loud(Flow):
    """Of a flow model whose noise is larger."""

    noise_scale = 8.0


class Discrete:
    """Of a model whose x is x0 + sigma eps, with a table of noise levels."""

    def __init__(self) -> None:
        abar = VariancePreserving().alphas_cumprod
        self.sigmas, self.num_timesteps = ((1 - abar) / abar).sqrt().float(), 1000

    def noise_scaling(self, s: Tensor, noise: Tensor, image: Tensor, max_denoise: bool = False) -> Tensor:
        """The host writes into the noise, too."""
        noise *= s
        noise += image
        return noise

    def calculate_denoised(self, s: Tensor, output: Tensor, x: Tensor) -> Tensor:
        """Of epsilon."""
        return x - s * output

    def calculate_input(self, s: Tensor, x: Tensor) -> Tensor:
        """In unit variance."""
        return x / (s**2 + 1) ** 0.5

    def timestep(self, s: Tensor) -> Tensor:
        """The nearest level's place."""
        return (s.log() - self.sigmas.log()[:, None]).abs().argmin(0).view(s.shape)


class DiscreteV(Discrete):
    """The same where v is predicted."""

    def calculate_denoised(self, s: Tensor, output: Tensor, x: Tensor) -> Tensor:
        """a x_t - b v, in x's scale."""
        return x / (s**2 + 1) - output * s / (s**2 + 1) ** 0.5


class Raw(DiscreteV):
    """Of a video model that is fed x as it is."""

    def calculate_input(self, s: Tensor, x: Tensor) -> Tensor:
        """As it is."""
        return x


class Continuous(Discrete):
    """Of a model that is asked at the logarithm of the noise level."""

    def timestep(self, s: Tensor) -> Tensor:
        """EDM's."""
        return 0.25 * s.log()


class Cold(Flow):
    """Of a model that knows no noise."""

    def noise_scaling(self, s: Tensor, noise: Tensor, image: Tensor, max_denoise: bool = False) -> Tensor:
        """Images stay what they are."""
        return image


class Mute:
    """That cannot be asked."""

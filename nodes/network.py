"""A host's network as the trainer calls one: through the host's own `apply_model`, with all conditioning of the graph.

What a batch is conditioned on are numbers of prompts; each prompt is a whole entry of the host's conditioning, with
whatever belongs to it: pooled embeddings, guidance, ControlNets, reference latents, areas.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.diffusion.process import RectifiedFlow

from .model_sampling import noise_scale_of

PROMPT = "prompt"
"""Name of a batch's only conditioning: numbers of prompts, (B,)."""
Entry = dict[str, Any]
_ALONE = frozenset(("area", "control", "default", "gligen", "hooks", "mask", "timestep_end", "timestep_start"))
"""Parts of an entry with which it cannot be one of a batch."""


class HostNetwork:
    """`network(x_t, t, conditioning, w) -> model output`, see `trainer.methods.shared.Network`.

    Args:
        base: the host's model, whose `model_sampling` is replaced by one that leaves x and the output as they are.
        model: the MODEL that it came from, with its patches.
        diffusion: the model's.
        prompts: the host's conditioning.
        shape: of one latent, (1, C, ...).
        device: where it runs.
    """

    def __init__(
        self,
        base: Any,
        model: Any,
        diffusion: Diffusion,
        prompts: Sequence[Any],
        shape: Sequence[int],
        device: torch.device,
    ) -> None:
        self.base, self.process = base, diffusion.process
        self.noise_scale = noise_scale_of(base.model_sampling)
        self.options = comfy.model_patcher.create_model_options_clone(model.model_options)
        transformer = self.options.setdefault("transformer_options", {})
        transformer["sample_sigmas"] = self._sigmas(diffusion.grid(torch.tensor([diffusion.original_steps, 0])))
        base.current_patcher = model.clone()
        base.model_sampling = _untouched(base.model_sampling, diffusion)
        conds = {"positive": comfy.sampler_helpers.convert_cond(prompts)}
        comfy.sampler_helpers.prepare_model_patcher(base.current_patcher, conds, self.options)
        dtype = base.manual_cast_dtype or base.get_dtype()  # what newer hosts name get_dtype_inference
        comfy.samplers.cast_to_load_options(self.options, device=device, dtype=dtype)
        others, _ = comfy.sampler_helpers.get_additional_models(conds, dtype)
        if others:  # ControlNets and the like
            comfy.model_management.load_models_gpu(others)
        blank = torch.zeros(tuple(shape), device=device)
        conds = comfy.samplers.process_conds(base, blank, conds, device, torch.zeros_like(blank), None, 0)
        self.entries: list[Entry] = [_ordinary(entry) for entry in conds["positive"]]

    def __call__(self, x: Tensor, t: Tensor, conditioning: dict[str, Tensor], w: Tensor | None) -> Tensor:
        """The network's output, like x."""
        rows: list[int] = conditioning[PROMPT].tolist()
        sigma, x_host = self._sigmas(t).to(x.device), x * self.noise_scale
        entry = _joined([self.entries[row] for row in rows])
        if entry is not None:
            return self._apply(entry, x_host, sigma)
        output = torch.empty_like(x)
        for prompt in dict.fromkeys(rows):
            places = torch.tensor([place for place, row in enumerate(rows) if row == prompt], device=x.device)
            part = self._apply(self.entries[prompt], x_host[places], sigma[places])
            output = output.index_copy(0, places, part)
        return output

    def _apply(self, entry: Entry, x: Tensor, sigma: Tensor) -> Tensor:
        with _training():
            [output] = comfy.samplers.calc_cond_batch(self.base, [[entry]], x, sigma, self.options)
        # x holds noise of a larger spread, and the output its velocity
        scaled: Tensor = output.to(x.dtype) / self.noise_scale
        return scaled

    def _sigmas(self, t: Tensor) -> Tensor:
        return self.process.t_to_sigma(t.double()).float()


@contextmanager
def _training() -> Iterator[None]:
    """Let newer hosts, within this context, run what can be differentiated, and not their fused operations."""
    before = getattr(comfy.model_management, "in_training", False)
    comfy.model_management.in_training = True
    try:
        yield
    finally:
        comfy.model_management.in_training = before


def _untouched(sampling: Any, diffusion: Diffusion) -> Any:
    """A copy of a host's `model_sampling` behind which the network sees x_t itself, and answers for itself."""
    own = copy.copy(sampling)
    own.calculate_input = lambda sigma, x: x
    own.calculate_denoised = lambda sigma, output, x: output
    if not isinstance(diffusion.process, RectifiedFlow):
        own.timestep = diffusion.process.sigma_to_t  # the host's rounds to whole timesteps
    return own


def _ordinary(entry: Entry) -> Entry:
    """The same with tensors that may be used in training; what nodes make in inference mode may not."""
    conds = {name: cond._copy_with(_cloned(cond.cond)) for name, cond in entry["model_conds"].items()}
    return {**entry, "model_conds": conds}


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return [_cloned(part) for part in value] if isinstance(value, list) else value


def _joined(entries: Sequence[Entry]) -> Entry | None:
    """One entry with a row for each of the given ones; None where they do not go into one batch."""
    first, *others = entries
    if all(entry is first for entry in others):
        return first
    if any(_ALONE & entry.keys() or entry["model_conds"].keys() != first["model_conds"].keys() for entry in entries):
        return None
    joined = {}
    for name, cond in first["model_conds"].items():
        rest = [entry["model_conds"][name] for entry in others]
        if not all(cond.can_concat(other) for other in rest):
            return None
        joined[name] = cond._copy_with(cond.concat(rest))
    return {**first, "model_conds": joined}

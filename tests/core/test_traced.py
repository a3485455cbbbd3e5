"""A U-Net's recorded calls give what the network gives, bit for bit, for the shapes that they were recorded with."""

from __future__ import annotations

from pathlib import Path

import torch

from lcm_core.networks.traced import _TRACED_AFTER, trace_calls
from lcm_core.networks.unet import UNet
from lcm_core.pipeline import Pipeline


@torch.inference_mode()
def test_a_recorded_call_gives_something_else(models: Path) -> None:
    for name in ("lcm", "plain"):
        unet = Pipeline.load(models / name, device="cpu", dtype="float32").model.unet
        assert isinstance(unet, UNet)
        plain, calls = UNet(unet.model), 0

        def count(module: object, given: object) -> None:
            nonlocal calls
            calls += 1

        unet.model.register_forward_pre_hook(count)
        trace_calls(unet)
        for batch, side, length in ((1, 8, 77), (2, 8, 77), (1, 16, 154), (1, 8, 77)):
            for number in range(_TRACED_AFTER + 3):
                torch.manual_seed(number)
                x, t = torch.randn(batch, 4, side, side), torch.full((batch,), 100.0 * number)
                cond = {"encoder_hidden_states": torch.randn(batch, length, 128)}
                if unet.guidance_embedding_dim is not None:
                    cond["timestep_cond"] = torch.randn(batch, unet.guidance_embedding_dim)
                expected = plain(x, t, **cond)
                calls = 0
                assert torch.equal(unet(x, t, **cond), expected)
            assert calls == 0, "the last call was not replayed"
        residuals = {"mid_block_additional_residual": [torch.ones(1)]}
        residuals["down_block_additional_residuals"] = [torch.zeros(1)] * 8
        with_residuals = [network(x, t, residuals=residuals, **cond) for network in (unet, plain)]
        assert torch.equal(*with_residuals)
        assert not torch.equal(with_residuals[0], expected)

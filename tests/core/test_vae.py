"""Pixels to latents and back, against diffusers; tiles against the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lcm_core.errors import InputError
from lcm_core.files.safetensors import write_safetensors
from lcm_core.networks.vae import OVERLAP, VAE, load_vae
from lcm_core.pipeline import Pipeline
from lcm_core.pipeline.sources import find_model, find_vae


def save_kl(folder: Path, **settings: Any) -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(32, 32), layers_per_block=1, **blocks, **settings)
    vae.save_pretrained(folder)
    return vae.eval()


def tiny(blocks: int = 2) -> Any:
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    counts, widths = (1,) * blocks, (16,) * blocks
    return AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=counts,
        num_decoder_blocks=counts,
    ).eval()


@torch.no_grad()
def test_encode_and_decode_equal_diffusers(tmp_path: Path) -> None:
    """Scale and shift must go the right way in both directions, or every picture comes out grey."""
    reference = save_kl(tmp_path / "vae", scaling_factor=0.3, shift_factor=0.2)
    vae = load_vae(tmp_path, "cpu", "float32")
    image = torch.rand(2, 3, 16, 24) * 2 - 1
    distribution = reference.encode(image).latent_dist
    latents = vae.encode(image)
    torch.testing.assert_close(latents, (distribution.mean - 0.2) * 0.3, rtol=1e-5, atol=1e-5)
    decoded = reference.decode(distribution.mean).sample
    torch.testing.assert_close(vae.decode(latents), decoded.clamp(-1, 1), rtol=1e-4, atol=1e-4)
    assert (vae.scale, vae.latent_channels) == (2, 4)


@torch.no_grad()
def test_sampling_follows_the_encoder_s_distribution(tmp_path: Path) -> None:
    """Latents drawn with the wrong spread would teach a U-Net the wrong data."""
    reference = save_kl(tmp_path / "vae", scaling_factor=1.0)
    vae = load_vae(tmp_path, "cpu", "float32")
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    distribution = reference.encode(image).latent_dist
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    drawn = vae.encode(image, torch.Generator().manual_seed(5))
    torch.testing.assert_close(drawn, distribution.mean + distribution.std * noise, rtol=1e-5, atol=1e-5)
    assert (drawn - vae.encode(image)).abs().max() > 0.1


@torch.no_grad()
def test_tiny_vae_equals_diffusers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """AutoencoderTiny has no distribution, and its own ranges. It is loaded without a warning."""
    reference = tiny()
    reference.save_pretrained(tmp_path)
    vae = load_vae(tmp_path, "cpu", "float32")
    assert capfd.readouterr().err == ""
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(vae.encode(image), reference.encode(image).latents, rtol=1e-5, atol=1e-5)
    latents = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(vae.decode(latents), reference.decode(latents).sample.clamp(-1, 1), rtol=1e-5, atol=1e-5)
    assert vae.scale == 2


@torch.no_grad()
@pytest.mark.parametrize("given", ["encoder", "decoder"])
def test_tiny_vae_in_its_own_two_files(given: str, tmp_path: Path) -> None:
    """taesd_encoder and taesd_decoder hold bare sequences, and the decoder counts from 1."""
    reference = tiny(4)
    for half, first in (("encoder", 0), ("decoder", 1)):
        state = getattr(reference, half).layers.state_dict()
        renumbered = {f"{int(k.split('.')[0]) + first}.{k.split('.', 1)[1]}": v for k, v in state.items()}
        write_safetensors(tmp_path / f"taesd_{half}.safetensors", renumbered)
    vae = load_vae(tmp_path / f"taesd_{given}.safetensors", "cpu", "float32")
    latents = torch.randn(1, 4, 4, 4)
    torch.testing.assert_close(vae.decode(latents), reference.decode(latents).sample.clamp(-1, 1), rtol=1e-5, atol=1e-5)
    assert vae.scale == 8
    (tmp_path / "taesd_encoder.safetensors").rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(InputError, match=r"taesd_encoder.safetensors"):
        load_vae(tmp_path / "taesd_decoder.safetensors")


@pytest.mark.parametrize(
    "name", ["x", "\N{SUPERSCRIPT TWO}.weight", "99999999999.weight", "9" * 5000 + ".weight", "-1.weight"]
)
def test_a_half_of_a_tiny_vae_is_something_else(name: str, tmp_path: Path) -> None:
    """Each ended in a traceback, or in a search for layers without end."""
    good = {"1.weight": torch.zeros(1)}
    for half in ("encoder", "decoder"):
        write_safetensors(tmp_path / "taesd_encoder.safetensors", {name: torch.zeros(1)} if half == "encoder" else good)
        write_safetensors(tmp_path / "taesd_decoder.safetensors", {name: torch.zeros(1)} if half == "decoder" else good)
        for given in ("encoder", "decoder"):
            with pytest.raises(InputError, match=r"taesd_(en|de)coder\.safetensors"):
                load_vae(tmp_path / f"taesd_{given}.safetensors", "cpu")


@pytest.mark.parametrize("change", [{"upsample_fn": "magic"}, {"upsampling_scaling_factor": {}}], ids=str)
def test_an_unknown_way_to_enlarge_is_found_while_painting(change: dict[str, Any], tmp_path: Path) -> None:
    tiny(4).save_pretrained(tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=rf"says {next(iter(change))} = "):
        load_vae(tmp_path, "cpu")


@torch.no_grad()
def test_tiles_equal_the_whole_away_from_seams() -> None:
    """The tiny VAE has no norms, so a tile's inside must equal the whole picture's; seams may differ a little."""
    vae = VAE(tiny())
    latents = torch.randn(1, 4, 40, 40)
    whole, tiled = vae.decode(latents, tile=0), vae.decode(latents, tile=28)
    reach = 2 * (40 - 28)  # where only the first tile reaches
    torch.testing.assert_close(tiled[..., : reach - 12, : reach - 12], whole[..., : reach - 12, : reach - 12])
    torch.testing.assert_close(
        tiled[..., -(reach - 12) :, -(reach - 12) :], whole[..., -(reach - 12) :, -(reach - 12) :]
    )
    assert (tiled - whole).abs().max() < 0.5 * whole.std()
    assert (tiled - whole).abs().mean() < 0.02 * whole.std()
    image = torch.rand(1, 3, 80, 80) * 2 - 1
    encoded, encoded_whole = vae.encode(image, tile=28), vae.encode(image, tile=0)
    torch.testing.assert_close(encoded[..., :6, :6], encoded_whole[..., :6, :6])
    assert (encoded - encoded_whole).abs().mean() < 0.02 * encoded_whole.std()


@torch.no_grad()
def test_tiles_of_the_full_vae_are_close_to_the_whole(tmp_path: Path) -> None:
    """Its norms see a tile instead of the picture: colours may shift a little, seams must not show."""
    save_kl(tmp_path / "vae")
    vae = load_vae(tmp_path, "cpu", "float32")
    latents = torch.randn(1, 4, 48, 33) * 0.18
    whole, tiled = vae.decode(latents, tile=0), vae.decode(latents, tile=32)
    assert tiled.shape == whole.shape == (1, 3, 96, 66)
    assert (tiled - whole).abs().mean() < 0.1 * whole.std()
    steps = (tiled[..., 1:, :] - tiled[..., :-1, :]).abs().mean(dim=(0, 1, 3))
    assert steps.max() < 2 * steps.median()  # a seam would be one row that jumps


def test_blending_weights_add_up_to_one() -> None:
    """With a decoder that only repeats pixels, tiles must give what the whole gives, seams and borders included."""

    class Repeat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Parameter(torch.ones(1))
            self.config = tiny().config

        def decode(self, z: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
            sizes.append(tuple(z.shape[-2:]))
            return (z[:, :3].repeat_interleave(2, -1).repeat_interleave(2, -2),)

    sizes: list[tuple[int, ...]] = []
    vae, latents = VAE(Repeat()), torch.rand(1, 4, 61, 150) * 2 - 1
    expected = latents[:, :3].repeat_interleave(2, -1).repeat_interleave(2, -2)
    torch.testing.assert_close(vae.decode(latents, tile=40), expected, rtol=0, atol=1e-6)
    assert set(sizes) == {(40, 40)}
    sizes.clear()
    vae.decode(torch.zeros(1, 4, 128, 128))
    assert sizes == [(128, 128)]
    sizes.clear()
    vae.decode(torch.zeros(1, 4, 129, 128))  # larger than 1024 x 1024 pixels: memory must stay that of a tile
    assert max(sizes) == (64, 64)
    with pytest.raises(InputError, match=f"more than {OVERLAP}"):
        vae.decode(latents, tile=OVERLAP)


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """diffusers would crop the picture, or fail deep inside."""
    tiny(4).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"size 500x333 does not fit this VAE; use multiples of 8, e\.g\. 496x336"):
        load_vae(tmp_path, "cpu").encode(torch.zeros(1, 3, 333, 500))


def test_scaling_factor_and_class_are_checked(tmp_path: Path) -> None:
    """A bare SDXL VAE has SD 1.x's shapes, so its factor must be given; other autoencoders must be refused."""
    save_kl(tmp_path / "vae")
    assert load_vae(tmp_path, "cpu").scaling_factor == 0.18215
    assert load_vae(tmp_path, "cpu", scaling_factor=0.13025).scaling_factor == 0.13025
    assert load_vae(tmp_path, "cpu", "float16").dtype == torch.float16
    config = tmp_path / "vae" / "config.json"
    config.write_text(config.read_text().replace('"AutoencoderKL"', '"AsymmetricAutoencoderKL"'))
    with pytest.raises(InputError, match="holds a AsymmetricAutoencoderKL"):
        load_vae(tmp_path)


def test_tiny_names_no_vae_beside_the_model(tmp_path: Path) -> None:
    """`vae="tiny"` is the folder vae_tiny of the model; of a model that has none, and of a path, the path itself."""
    model = find_model("emoji")
    assert find_vae("tiny", model) == model / "vae_tiny"
    assert find_vae("tiny", tmp_path) == Path("tiny")
    assert find_vae(tmp_path, model) == tmp_path
    loaded = Pipeline.load("emoji", device="cpu", vae="tiny").model
    assert type(loaded.vae.model).__name__ == "AutoencoderTiny"
    assert loaded.describe().vae == "tiny"

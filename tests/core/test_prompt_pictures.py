"""What prompts with syntax do in pictures: changes at a step, AND, textual inversions, and models that cannot."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from lcm_core.errors import InputError
from lcm_core.families.known import find_family
from lcm_core.families.network import TransformerText
from lcm_core.networks import text_encoder
from lcm_core.networks.conditioning import repeat_alike
from lcm_core.pipeline import Keyframe, PictureOptions, Pipeline
from lcm_core.pipeline.image import read_settings, save_image


def denoised(pipe: Pipeline, prompt: str, steps: int = 2, **options: Any) -> list[Tensor]:
    """x0 of each step."""
    found: list[Tensor] = []
    size = {"width": 64, "height": 64}
    pipe(prompt, num_inference_steps=steps, callback=lambda info: found.append(info["denoised"]), **size, **options)
    return found


def test_a_prompt_changes_at_the_wrong_step(lcm: Pipeline) -> None:
    first, second = denoised(lcm, "cat"), denoised(lcm, "dog")
    changed = denoised(lcm, "[cat:dog:0.5]")
    assert torch.equal(changed[0], first[0])
    assert not torch.equal(changed[1], first[1])
    assert torch.equal(denoised(lcm, "[cat:dog:0]")[1], second[1])
    assert torch.equal(denoised(lcm, "[cat:dog:2]")[1], first[1])
    assert torch.equal(denoised(lcm, "[cat|dog]")[1], changed[1])
    assert not torch.equal(denoised(lcm, "[cat:dog:0.5]", prompt_syntax="plain")[0], first[0])


def test_the_negative_prompt_does_not_change(plain: Pipeline) -> None:
    options = {"sampler": "euler", "guidance_scale": 3.0}
    steady = denoised(plain, "cat", negative_prompt="dog", **options)
    changed = denoised(plain, "cat", negative_prompt="[dog:owl:1]", **options)
    assert torch.equal(changed[0], steady[0])
    assert not torch.equal(changed[1], steady[1])


def test_and_does_not_add_up(lcm: Pipeline, plain: Pipeline) -> None:
    """x0_n + scale * sum of w (x0_i - x0_n) where there is a negative pass; else the mean by the weights."""
    options = {"steps": 1, "sampler": "euler"}
    cat, dog, nothing = (denoised(plain, words, guidance_scale=1.0, **options)[0] for words in ("cat", "dog", ""))
    given = denoised(plain, "cat AND dog :0.5", guidance_scale=3.0, **options)[0]
    assert_close(given, nothing + 3.0 * ((cat - nothing) + 0.5 * (dog - nothing)), rtol=1e-4, atol=1e-4)
    given = denoised(plain, "cat AND dog :0.5", guidance_scale=1.0, **options)[0]
    assert_close(given, nothing + (cat - nothing) + 0.5 * (dog - nothing), rtol=1e-4, atol=1e-4)
    cat, dog = (denoised(lcm, words, 1)[0] for words in ("cat", "dog"))
    assert_close(denoised(lcm, "cat AND dog :3", 1)[0], (cat + 3 * dog) / 4, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="add up to nothing"):
        denoised(lcm, "cat AND dog :-1", 1)


def test_pictures_of_a_batch_share_a_prompt_s_changes(plain: Pipeline) -> None:
    prompts = ["cat AND dog", "[owl:cat:1]"]
    options = {"num_inference_steps": 2, "width": 64, "height": 64, "sampler": "euler", "guidance_scale": 2.0}
    alone = [plain(prompt, **options).images[0] for prompt in prompts]
    together = plain(prompts, batch_size=2, **options).images
    for one, other in zip(alone, together, strict=True):
        pair = [torch.tensor(list(image.tobytes()), dtype=torch.float32) for image in (one, other)]
        assert_close(*pair, rtol=0, atol=2)


def test_a_longer_negative_prompt_changes_attention(plain: Pipeline) -> None:
    """Shorter conditioning is repeated: the network computes the same as with it alone."""
    torch.manual_seed(0)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500.0])
    short, long = ({"encoder_hidden_states": torch.randn(1, length, 128)} for length in (77, 154))
    repeated, kept = repeat_alike(short, long)
    assert torch.equal(kept["encoder_hidden_states"], long["encoder_hidden_states"])
    assert_close(plain.model.unet(x, t, **repeated), plain.model.unet(x, t, **short), rtol=1e-5, atol=1e-5)


def test_travel_between_prompts_of_different_length_fails(lcm: Pipeline, tmp_path: Path) -> None:
    keyframes = [Keyframe("cat"), Keyframe("a (dog:1.2) BREAK owl"), Keyframe("[cat:owl:1]")]
    options = PictureOptions(num_inference_steps=2, width=64, height=64)
    frames = list(lcm.interpolate(keyframes, 5, options=options))
    for frame, keyframe in zip(frames[::2], keyframes, strict=True):
        expected = lcm(keyframe.prompt, num_inference_steps=2, width=64, height=64).images[0]
        assert frame.tobytes() == expected.tobytes()
    with pytest.raises(InputError, match="give both as many"):
        list(lcm.interpolate([Keyframe("cat"), Keyframe("dog AND owl")], 3, options=options))


def test_a_textual_inversion_is_not_its_vectors(tmp_path: Path) -> None:
    """An inversion with the vectors of known words encodes as those words, in every layout and way to name it."""
    plain = Pipeline.load("emoji", device="cpu", dtype="float32")
    encoder = plain.model.text.encoders[0]
    ids = encoder.tokenizer.words("red apple")
    model = getattr(encoder.model, "text_model", encoder.model)
    vectors = model.embeddings.token_embedding.weight[ids].clone()
    layouts = {"kohya": {"emb_params": vectors}, "diffusers": {"<s1>": vectors}, "sdxl-like": {"clip_l": vectors}}
    for name, tensors in layouts.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    paths = [tmp_path / f"{name}.safetensors" for name in layouts]
    pipe = Pipeline.load("emoji", device="cpu", dtype="float32", embedding=paths)
    expected = plain.model.encode(["a (red apple:1.2), noto style"], 64, 64, weighted=True)
    for name in ("kohya", "embedding:kohya", "diffusers", "embedding:sdxl-like.safetensors"):
        given = pipe.model.encode([f"a ({name}:1.2), noto style"], 64, 64, weighted=True)
        assert_close(given["encoder_hidden_states"], expected["encoder_hidden_states"], rtol=1e-5, atol=1e-5)
    result = pipe("a kohya", num_inference_steps=1)
    assert result.settings[0]["embedding"] == [str(path) for path in paths]
    save_image(result.images[0], tmp_path / "picture.png", result.settings[0])
    assert read_settings(tmp_path / "picture.png")["embedding"] == [str(path) for path in paths]


def test_a_textual_inversion_changes_another_thread_s_prompt(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its vectors stand in the encoder while its own prompt is encoded, when no other may be."""
    save_file({"emb_params": torch.ones(1, 128)}, tmp_path / "mark.safetensors")
    text = Pipeline.load(models / "lcm", device="cpu", embedding=[tmp_path / "mark.safetensors"]).model.text
    assert text is not None
    running = most = 0
    run = text_encoder._run

    def slowly(*args: Any) -> Any:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.05)
        running -= 1
        return run(*args)

    monkeypatch.setattr(text_encoder, "_run", slowly)
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda prompt: text.encode([prompt], weighted=True), ("mark", "cat", "dog")))
    assert most == 1


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"emb_params": torch.zeros(2, 7)}, r"does not fit: its vectors are \(2, 7\)"),
        ({"clip_l": torch.zeros(2, 128), "clip_g": torch.zeros(2, 1280)}, "does not fit"),
        ({"emb_params": torch.full((1, 128), torch.nan)}, "NaN"),
        ({"emb_params": torch.zeros(1, 128, dtype=torch.int64)}, "does not fit"),
        ({"emb_params": torch.zeros(0, 128)}, "does not fit"),
    ],
    ids=["width", "sdxl", "nan", "whole", "empty"],
)
def test_an_unfit_inversion_is_loaded(models: Path, tmp_path: Path, tensors: dict[str, Tensor], words: str) -> None:
    save_file(tensors, tmp_path / "style.safetensors")
    with pytest.raises(InputError, match=words):
        Pipeline.load(models / "plain", device="cpu", embedding=[tmp_path / "style.safetensors"])


def test_an_inversion_that_is_not_there_is_passed_over(lcm: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="asks for embedding 'easy', which is not loaded"):
        denoised(lcm, "a cat, (embedding:easy:1.2)", 1)
    (tmp_path / "easy.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match="pickle"):
        Pipeline.load("emoji", device="cpu", embedding=[tmp_path / "easy.pt"])


def test_a_flow_model_passes_over_weights(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    family = find_family(tmp_path)
    assert family is not None
    text = TransformerText(family, tmp_path, torch.device("cpu"), torch.float32)
    for prompt in ("a (red:1.3) apple", "a [red] apple", "red BREAK apple"):
        with pytest.raises(InputError, match=r"has weights or BREAK .* which this model's text encoder cannot"):
            text.encode([prompt], weighted=True)
    with pytest.raises(InputError, match="not loaded"):
        text.encode(["embedding:easy"], weighted=True)

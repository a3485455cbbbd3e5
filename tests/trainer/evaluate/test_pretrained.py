"""Scores by CLIP and Inception, whose weights the user brings."""

import sys

import pytest
import torch

from lcm_core.errors import InputError
from lcm_core.files.safetensors import write_safetensors
from trainer.evaluate import pretrained
from trainer.evaluate.metrics import frechet_distance


def test_clip_score_is_the_cosine_that_the_model_itself_gives(clip_folder):
    from transformers import AutoTokenizer, CLIPModel

    pictures = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    captions = ["a cat", "two words", "z"]
    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), AutoTokenizer.from_pretrained(clip_folder)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    expected = []
    for picture, caption in zip(pictures, captions, strict=True):
        words = tokenizer(caption, return_tensors="pt")
        with torch.no_grad():
            output = model(pixel_values=((picture / 255 - mean) / std)[None], **words)
        cosine = float((output.image_embeds * output.text_embeds).sum())  # both have length 1
        expected.append(100 * max(cosine, 0))
    assert any(value > 0 for value in expected)
    found = pretrained.load_clip(clip_folder, torch.device("cpu"))(pictures, captions)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_inception_fid_is_that_of_torch_fidelity(tmp_path, monkeypatch):
    """With random weights, which both must treat alike."""
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    reference = pytest.importorskip("torch_fidelity.metric_fid")
    kind = extractor.FeatureExtractorInceptionV3
    torch.manual_seed(0)
    with monkeypatch.context() as patch:  # its constructor wants weights, which are made here
        patch.setattr(kind, "load_state_dict", lambda self, state: None)
        patch.setattr(torch, "load", lambda *args, **kwargs: None)
        network = kind("inception", ["2048"], "none")
    write_safetensors(tmp_path / "inception.safetensors", network.state_dict())
    features = pretrained.load_inception(tmp_path / "inception.safetensors", torch.device("cpu"))
    pictures = torch.randint(0, 256, (2, 8, 3, 64, 64), dtype=torch.uint8)
    statistics = [reference.fid_features_to_statistics(network(part)[0]) for part in pictures]
    (expected,) = reference.fid_statistics_to_metric(*statistics, verbose=False).values()
    assert frechet_distance(*map(features, pictures)) == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_missing_weights_and_packages_are_named_in_one_line(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    with pytest.raises(InputError, match=r"config\.json does not exist"):
        pretrained.load_clip(tmp_path / "nowhere", cpu)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match="'bert'"):
        pretrained.load_clip(tmp_path, cpu)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(InputError, match="no complete CLIP model") as error:
        pretrained.load_clip(tmp_path, cpu)
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(InputError, match="pip install torch-fidelity"):
        pretrained.load_inception(tmp_path / "x.safetensors", cpu)


def test_a_pickle_of_inception_weights_is_refused(tmp_path):
    pytest.importorskip("torch_fidelity")
    torch.save({"a": torch.zeros(1)}, tmp_path / "inception.pth")
    with pytest.raises(InputError, match="pickle"):
        pretrained.load_inception(tmp_path / "inception.pth", torch.device("cpu"))

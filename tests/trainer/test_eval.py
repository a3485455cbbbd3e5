"""`trainer eval`: the scores are those of the formulas, however many processes paint, and bad input is named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lcm_core.errors import InputError
from lcm_core.files.safetensors import write_safetensors
from lcm_core.pipeline import Pipeline
from lcm_core.pipeline.model import load_model
from trainer.cli import eval as command
from trainer.distributed import Processes
from trainer.evaluate import pretrained
from trainer.evaluate.metrics import frechet_distance, recall
from trainer.evaluate.scores import Evaluation, benchmark_evaluation, evaluate_rows, folder_evaluation, read_pictures
from trainer.recipes.emoji.benchmark import Benchmark
from trainer.recipes.emoji.data import Drawing
from trainer.recipes.emoji.features import FeatureNetwork, extract

ALONE = Processes()


@pytest.fixture(scope="module")
def benchmark():
    """A small benchmark with an untrained network: the arithmetic is what is tested."""
    labels = ["red apple", "cat face", "pizza", "rocket"]
    entries = [
        Drawing(str(i), label, (), "food", style, held_out=(style == "noto" and i == 0))
        for style in ("noto", "fluent", "twemoji")
        for i, label in enumerate(labels)
    ]
    torch.manual_seed(0)
    network = FeatureNetwork().eval().requires_grad_(False)
    real = network(torch.rand(len(entries), 3, 64, 64) * 2 - 1)
    return Benchmark(entries, real, network, samples=12)


def test_rows_are_scores_of_the_pictures_that_a_user_gets(benchmark):
    model = load_model("emoji", "cpu", unet="lcm")
    (row,) = evaluate_rows("mine", model, benchmark_evaluation(benchmark), [1], guidance_scale=2.0)
    captions = [benchmark.entries[i].plain_caption for i in benchmark.chosen.tolist()]
    images = Pipeline(model)(captions, num_inference_steps=1, guidance_scale=2.0, seed=range(len(captions))).images
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    features = extract(benchmark.features, pixels)
    cosine = torch.cosine_similarity(features.double()[:, None], benchmark.real.double()[None], dim=2)
    shown = benchmark.codes[cosine.argmax(1)]
    right = (shown == benchmark.codes[benchmark.chosen]).double()
    expected = {
        "fd": frechet_distance(benchmark.real, features),
        "recall": recall(benchmark.real, features),
        "alignment": right.mean().item(),
        "held_out_alignment": right[benchmark.held_out].mean().item(),
        "seen_alignment": right[~benchmark.held_out].mean().item(),
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert (row["model"], row["sampler"], row["steps"], row["guidance_scale"]) == ("mine", "lcm", 1, 2.0)


@pytest.mark.parametrize(("option", "value"), [("gamma", 1.0), ("original_steps", 10)])
def test_what_is_measured_is_painted_with_the_settings_that_were_given(option, value):
    seen = []
    evaluation = Evaluation(
        ["pizza"] * 4, lambda pictures: seen.append(pictures) or torch.randn(len(pictures), 4), torch.eye(4)
    )
    model = load_model("emoji", "cpu", unet="lcm")
    options = {"sampler": "tcd", "gamma": 0.0, "original_steps": 50}
    evaluate_rows("mine", model, evaluation, [3], **options)
    evaluate_rows("mine", model, evaluation, [3], **options | {option: value})
    plain, changed = seen
    assert not torch.equal(plain, changed)


def test_a_perfect_and_a_broken_model_are_told_apart():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(64, 8, generator=generator)
    evaluation = Evaluation(["a"] * 16, lambda pictures: real[: len(pictures)] + 100, real)
    model = load_model("emoji", "cpu", unet="lcm")
    (row,) = evaluate_rows("broken", model, evaluation, [1])
    assert row["recall"] == 0
    assert row["fd"] == pytest.approx(frechet_distance(real, real[:16] + 100))


class Item:
    """What the trainer's data gives: a name, a caption, a picture that may be broken."""

    def __init__(self, number):
        self.key, self.caption, self.number = f"{number}.png", f"caption {number}", number

    def open(self):
        if self.number == 3:
            raise InputError("3.png is broken")
        return Image.new("RGB", (16, 16), (self.number * 10, 0, 0))


def means(pictures):
    """Features that show which picture they are of."""
    return pictures.float().flatten(2).mean(2)


def test_real_pictures_are_read_in_order_and_broken_ones_are_named():
    real = read_pictures([Item(i) for i in range(7)], (16, 16), means, ALONE)
    assert real.captions == [f"caption {i}" for i in (0, 1, 2, 4, 5, 6)]
    assert real.skipped == [("3.png", "3.png is broken")]
    torch.testing.assert_close(real.features[:, 0], torch.tensor([0.0, 10, 20, 40, 50, 60]))
    with pytest.raises(InputError, match="none of 1 picture"):
        read_pictures([Item(3)], (16, 16), means, ALONE)


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path):
    """Seven captions do not divide by two; rows, features and skipped pictures must come back in order."""
    script = tmp_path / "worker.py"
    script.write_text(_worker_source())
    outputs = []
    for count in (1, 2):
        out = tmp_path / f"{count}.json"
        launch = [] if count == 1 else ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29653"]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *launch, str(script), str(out)], check=True, env=environment, timeout=300)
        rows, *rest = json.loads(out.read_text())
        outputs.append(({k: v for k, v in rows[0].items() if k != "images_per_second"}, rest))
    assert outputs[1][1] == outputs[0][1]
    assert outputs[1][1][3] == "from 0"
    for name, value in outputs[0][0].items():
        assert outputs[1][0][name] == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value)


def _worker_source():
    return """
import json, sys, torch
from PIL import Image
from lcm_core.errors import InputError
from lcm_core.pipeline.model import load_model
from trainer.evaluate.scores import Evaluation, evaluate_rows, from_main, read_pictures
from trainer.distributed import join_processes

class Item:
    def __init__(self, number):
        self.key, self.caption, self.number = f"{number}.png", f"caption {number}", number
    def open(self):
        if self.number == 3:
            raise InputError("3.png is broken")
        return Image.new("RGB", (16, 16), (self.number * 10, 0, 0))

def means(pictures):
    return pictures.float().flatten(2).mean(2)

processes = join_processes(torch.device("cpu"))
real = read_pictures([Item(i) for i in range(7)], (16, 16), means, processes)
captions = [f"a cat number {i}" for i in range(7)]
evaluation = Evaluation(captions, means, real.features, caption_score=lambda p, c: means(p)[:, 0])
rows = evaluate_rows("m", load_model("emoji", "cpu", unet="lcm"), evaluation, [1], processes)
told = from_main(processes, lambda: f"from {processes.rank}")
if processes.is_main:
    json.dump([rows, real.features.tolist(), real.captions, real.skipped, told], open(sys.argv[1], "w"))
"""


def test_a_folder_evaluation_asks_for_every_caption_before_any_twice():
    real = read_pictures([Item(i) for i in (0, 1, 2)], (16, 16), means, ALONE)
    evaluation = folder_evaluation(real, 8, means, is_inception=True)
    assert sorted(evaluation.captions[:3]) == ["caption 0", "caption 1", "caption 2"]
    assert len(evaluation.captions) == 8
    assert evaluation.distance == "fid"
    assert folder_evaluation(real, 8, means, is_inception=True).captions == evaluation.captions


@pytest.fixture
def clip_folder(tmp_path):
    """A tiny CLIP with random weights, as transformers writes it."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")).save_pretrained(tmp_path)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**shape, "vocab_size": len(tokens), "bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config={**shape, "image_size": 16, "patch_size": 8}, projection_dim=16)
    CLIPModel(config).save_pretrained(tmp_path)
    return tmp_path


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


@pytest.fixture
def run_eval(benchmark, monkeypatch):
    """`trainer eval ...` with the small benchmark. Returns the exit code's message, empty if all went well."""
    import argparse

    import trainer.recipes.emoji.benchmark

    monkeypatch.setattr(trainer.recipes.emoji.benchmark, "load_benchmark", lambda samples: benchmark)

    def run(*words):
        parser = argparse.ArgumentParser()
        command.add_eval(parser.add_subparsers())
        args = parser.parse_args(["eval", *map(str, words), "--device", "cpu"])
        try:
            args.run(args)
        except InputError as error:
            return str(error)
        return ""

    return run


def test_the_command_collects_models_in_one_table_and_does_not_measure_twice(run_eval, tmp_path, capsys):
    assert run_eval("--unet", "lcm", "--steps", 1, 2, "--output", tmp_path) == ""
    first = json.loads((tmp_path / "eval.json").read_text())
    assert [(row["model"], row["steps"]) for row in first["rows"]] == [("emoji (lcm)", 1), ("emoji (lcm)", 2)]
    lora = ("--unet", "teacher", "--lora", "lcm_lora")
    assert run_eval(*lora, "--steps", 1, "--guidance", 1, "--output", tmp_path) == ""
    assert run_eval("--unet", "lcm", "--steps", 1, "--output", tmp_path) == ""
    rows = json.loads((tmp_path / "eval.json").read_text())["rows"]
    assert rows[:2] == first["rows"]
    assert [row["model"] for row in rows] == ["emoji (lcm)"] * 2 + ["emoji (teacher) + lcm_lora"]
    printed = capsys.readouterr()
    assert (tmp_path / "eval.md").read_text() in printed.out
    assert "measured before" in printed.err
    message = run_eval(*lora, "--steps", 2, "--name", "emoji (lcm)", "--output", tmp_path)
    assert "--name" in message  # two models must not be taken for one


def test_scores_against_ones_own_pictures(run_eval, photos, clip_folder, tmp_path):
    words = ("--unet", "lcm", "--steps", 1, "--samples", 8, "--data", photos, "--clip", clip_folder)
    assert run_eval(*words, "--output", tmp_path / "out") == ""
    content = json.loads((tmp_path / "out" / "eval.json").read_text())
    (row,) = content["rows"]
    assert {"fd", "recall", "clip_score"} <= row.keys()
    assert not {"alignment", "fid"} & row.keys()
    assert "other pictures" in run_eval("--unet", "lcm", "--steps", 1, "--output", tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--inception", "x.safetensors"], "--data"),
        (["--data", "nowhere"], "nowhere does not exist"),
        (["--clip", "nowhere"], "nowhere does not exist"),
        (["--samples", 3], "--samples 3"),
        (["--model", "nowhere"], "nowhere"),
        (["--lora", "nowhere"], "nowhere"),
        (["--steps", 0], "0 steps"),
        (["--sampler", "magic"], "magic"),
    ],
)
def test_bad_input_is_named(run_eval, tmp_path, words, message):
    assert message in run_eval(*words, "--output", tmp_path / "out")

"""`trainer eval`: the scores are those of the formulas, however many processes paint, and bad input is named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lcm_core.errors import InputError
from lcm_core.pipeline import Pipeline
from lcm_core.pipeline.model import load_model
from tests.trainer.evaluate.numbered import Item, means
from trainer.distributed import Processes
from trainer.evaluate.metrics import frechet_distance, recall
from trainer.evaluate.scores import Evaluation, benchmark_evaluation, evaluate_rows, folder_evaluation, read_pictures
from trainer.recipes.emoji.features import extract

ALONE = Processes()


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
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
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
from lcm_core.pipeline.model import load_model
from trainer.evaluate.scores import Evaluation, evaluate_rows, read_pictures
from trainer.evaluate.share import from_main
from trainer.distributed import join_processes
from tests.trainer.evaluate.numbered import Item, means

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

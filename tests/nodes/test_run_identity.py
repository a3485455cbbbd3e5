"""What makes a run of LCM Distiller the same one, and what is said where it is another, or cannot be."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from lcm_core.errors import InputError
from trainer.config import LoopConfig, MethodConfig
from trainer.distill import Latents
from trainer.loop import Diverged
from trainer.methods.config import LcdConfig


class Identified:
    """A run of the distiller up to its first step."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.latents, self.prompts = torch.ones(2, 4, 8, 8), [torch.ones(1, 3, 4), torch.zeros(1, 3, 4)]

    def start(self, if_exists: str = "ask", loop: Any = None, w: float = 1.0, rank: int = 4) -> None:
        """What `train` does first, for a model known as "a"."""
        from lcm_suite_nodes.training_data import TrainingData
        from lcm_suite_nodes.training_run import Run

        latents = Latents(self.latents, {"prompt": torch.tensor([0, 0])}, {"prompt": torch.tensor([1])})
        data = TrainingData(latents, [[prompt, {"pooled_output": None}] for prompt in self.prompts])
        run = Run(None, None, data, None, self.home, self.home / "x", rank, 1, if_exists, print)
        method = MethodConfig(w_min=w, w_max=w)
        run._identify("a", method, loop or LOOP)


LOOP = LoopConfig(steps=12, batch_size=2, learning_rate=1e-4, seed=1)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"loop": dataclasses.replace(LOOP, learning_rate=1e-3)}, "learning rate"),
        ({"loop": dataclasses.replace(LOOP, batch_size=3)}, "batch size"),
        ({"loop": dataclasses.replace(LOOP, seed=2)}, "seed"),
        ({"w": 2.0}, "w"),
        ({"rank": 8}, "rank"),
        ({"data": torch.zeros(2, 4, 8, 8)}, "data"),
        ({"captions": torch.zeros(1, 3, 4)}, "captions"),
    ],
)
def test_another_run_of_the_same_name_is_not_handed_out_for_this_one(
    runtime: Any, tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    """It is asked about; started anew, nothing of the old one is left; continued, only if the weights still mean it."""
    run = Identified(tmp_path)
    run.start()
    run.start(loop=dataclasses.replace(LOOP, steps=24))  # the same with more steps goes on
    for left in ("state.safetensors", "log.jsonl"):
        (tmp_path / left).write_text("{}")
    parts = dict(changed)
    if "data" in parts:
        run.latents = parts.pop("data")
    if "captions" in parts:
        run.prompts = [parts.pop("captions"), *run.prompts[1:]]
    with pytest.raises(InputError, match=f"begun with another {said}; set if_exists"):
        run.start(**parts)
    if said == "rank":
        with pytest.raises(InputError, match="set if_exists to 'start anew'"):
            run.start("continue", **parts)
    else:
        run.start("continue", **parts)
        run.start(**parts)  # it is the run of this name now
        assert (tmp_path / "state.safetensors").exists()
        parts["loop"] = dataclasses.replace(parts.get("loop", LOOP), seed=9)
    run.start("start anew", **parts)
    assert not (tmp_path / "state.safetensors").exists()
    assert not (tmp_path / "log.jsonl").exists()
    run.start(**parts)


def test_a_run_with_all_steps_done_says_so(runtime: Any, tmp_path: Path) -> None:
    """Not that it has just learnt."""
    from lcm_suite_nodes.training_run import Run

    done = Run(None, None, None, None, tmp_path, tmp_path, 4, 1, "ask", print, steps=12, losses=[0.5] * 12)
    assert done.summary().startswith("nothing to do: 12 of 12 steps were done before")


@torch.library.custom_op("lcm_suite_tests::fused", mutates_args=())
def fused(x: torch.Tensor) -> torch.Tensor:
    """An operation as some hosts have them, which cannot be differentiated."""
    return 2 * x


@pytest.fixture
def run(runtime: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run without a network, whose training is still to be given."""
    from lcm_suite_nodes import training_run

    facts, data = SimpleNamespace(family="Anima", diffusion=None), SimpleNamespace(latents=None)
    run = training_run.Run(None, facts, data, None, tmp_path, tmp_path / "x", 4, 100, "ask", print)
    monkeypatch.setattr(run, "_student", lambda *_: (None, {}))
    monkeypatch.setattr(run, "_paint", lambda *_: Image.new("RGB", (8, 8)))
    monkeypatch.setattr(training_run, "_own_arithmetic", lambda model: nullcontext())
    host = training_run.comfy.model_management  # the copy lacks its word for full memory
    monkeypatch.setattr(host, "OOM_EXCEPTION", torch.OutOfMemoryError, raising=False)
    return run


def test_a_model_that_the_host_cannot_train_is_named(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Newer hosts run Anima's attention by an operation without a backward pass."""
    from lcm_suite_nodes import training_run

    x = torch.ones(1, requires_grad=True)
    monkeypatch.setattr(training_run, "distill", lambda *_: fused(x).sum().backward())
    with pytest.raises(InputError, match=r"cannot train Anima: .*lcm_suite_tests.fused"):
        run.train(LcdConfig(), LOOP)


@pytest.mark.parametrize(("saved", "kept"), [(0, ""), (40, "'continue', which goes on from step 40, or ")])
def test_a_loss_that_is_not_finite_is_told_in_the_nodes_words(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, saved: int, kept: str
) -> None:
    """Wrong when it names flags of the command line, or a state that was never written."""
    from lcm_suite_nodes import training_run

    def distill(*_: Any) -> None:
        raise Diverged("loss became nan", 52, tmp_path / "state.safetensors", saved)

    monkeypatch.setattr(training_run, "distill", distill)
    with pytest.raises(InputError) as caught:
        run.train(LcdConfig(), dataclasses.replace(LOOP, learning_rate=0.5))
    assert str(caught.value) == (
        "the loss became nan at step 52: learning_rate 0.5 is too high for this MODEL, or the data has a broken "
        f"picture; lower it, and set if_exists to {kept}'start anew'"
    )


def test_stop_ends_its_own_run_and_keeps_what_was_learnt(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong when it goes through the host's interrupt, which ends whatever runs by the time that it is heard."""
    from lcm_suite_nodes import panel, training_run

    def distill(*given: Any) -> None:
        for step in range(12):
            if step == 2:
                panel._requests[panel.STOP].set()
            given[-1](step, 0.5)

    saved: list[int] = []
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(training_run, "distill", distill)
    monkeypatch.setattr(run, "_save", lambda *_: saved.append(len(run.losses)))
    run.show = told.append
    host = training_run.comfy.model_management
    with pytest.raises(host.InterruptProcessingException):
        run.train(LcdConfig(), LOOP)
    assert saved == [3]
    assert (told[-1]["step"], told[-1]["saved"], told[-1]["running"]) == (3, 3, False)
    assert told[0]["before"] == told[0]["after"]  # not the end of an earlier run
    host.throw_exception_if_processing_interrupted()  # nothing is left for the next one

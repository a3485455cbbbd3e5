"""The painter: who waits, what is stopped, and drafts of a small model that are painted two at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from PIL import Image

from lcm_core.pipeline import Pipeline
from lcm_core.serve.fields import RequestError
from lcm_core.serve.painter import Job, Painter, PictureRequest
from lcm_core.serve.shelf import Shelf


class _Slow:
    """A pipeline whose steps wait until they are let go."""

    def __init__(self, pipe: Pipeline) -> None:
        self._pipe = pipe
        self.go = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)

    def paint(self, *args: Any, callback: Any, **options: Any) -> Any:
        def step(info: Any) -> Any:
            self.go.wait(60)
            return callback(info)

        return self._pipe.paint(*args, callback=step, **options)


@pytest.fixture
def slow(shelf: Shelf) -> Iterator[tuple[_Slow, Painter]]:
    pipe = _Slow(shelf.pipeline("emoji"))
    painter = Painter(Shelf(shelf.models, {}, lambda *_, **__: pipe), waiting=2)
    yield pipe, painter
    pipe.go.set()  # a thread that waits would keep Python from ending
    painter.close()


def _wait(condition: Any) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came true")


def test_the_queue_grows_without_end(slow: tuple[_Slow, Painter]) -> None:
    pipe, painter = slow
    request = PictureRequest("emoji", "a", 1, options={"num_inference_steps": 1})
    jobs = [painter.submit(request) for _ in range(3)]
    with pytest.raises(RequestError, match="waiting already") as refused:
        painter.submit(request)
    assert refused.value.status == 429
    pipe.go.set()
    assert [len(job.future.result(60)) for job in jobs] == [1, 1, 1]
    _wait(lambda: painter.count == 0)
    painter.submit(request).future.result(60)


def test_interrupt_loses_finished_pictures_or_stops_nothing(slow: tuple[_Slow, Painter]) -> None:
    pipe, painter = slow
    job = painter.submit(PictureRequest("emoji", "a", 1, count=4, options={"num_inference_steps": 4}))
    _wait(lambda: painter.running is job)
    painter.interrupt()
    pipe.go.set()
    assert job.future.result(60) == []
    assert job.steps_done == 1


@pytest.fixture
def two_cores(shelf: Shelf) -> Iterator[Painter]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    painter = Painter(shelf, waiting=8)
    yield painter
    painter.close()
    torch.set_num_threads(threads)


def _at_once(painter: Painter, monkeypatch: pytest.MonkeyPatch, **more: Any) -> tuple[int, set[int]]:
    """How many of four such requests are painted at once, and on how many cores each."""
    running, most, cores = 0, 0, set()
    lock = threading.Lock()

    def paint(job: Job, done: list[Any]) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            cores.add(torch.get_num_threads())
        time.sleep(0.05)
        with lock:
            running -= 1

    monkeypatch.setattr(painter, "_paint", paint)
    for job in [painter.submit(PictureRequest("emoji", "a", 1, **more)) for _ in range(4)]:
        job.future.result(60)
    return most, cores


def test_drafts_wait_for_each_other_or_pictures_do_not(
    two_cores: Painter, monkeypatch: pytest.MonkeyPatch, shelf: Shelf
) -> None:
    shelf.pipeline("emoji")
    assert _at_once(two_cores, monkeypatch) == (1, {2})
    assert _at_once(two_cores, monkeypatch, draft=True) == (2, {1})
    assert _at_once(two_cores, monkeypatch) == (1, {2})


def test_drafts_of_a_large_model_or_of_one_that_is_not_loaded_are_painted_at_once(
    two_cores: Painter, monkeypatch: pytest.MonkeyPatch, shelf: Shelf
) -> None:
    """Each of them uses all cores well, or would load the model beside another."""
    shelf.pipeline("emoji (teacher)")
    assert _at_once(two_cores, monkeypatch, draft=True)[0] == 1
    shelf.pipeline("emoji")
    monkeypatch.setattr("lcm_core.serve.shelf.is_large", lambda network: True)
    assert _at_once(two_cores, monkeypatch, draft=True)[0] == 1


def test_drafts_at_once_are_other_pictures(two_cores: Painter, shelf: Shelf) -> None:
    """Of four drafts at once, each is what it is alone."""
    two_cores.warm_up()
    options = {"num_inference_steps": 1, "guidance_scale": 2.0, "strength": 0.6}
    images = [Image.new("RGB", (128, 128), colour) for colour in ("red", "blue", "green", "white")]
    requests = [PictureRequest("emoji", "an apple", 1, options=options, image=image, draft=True) for image in images]
    together = [job.future.result(60)[0].png for job in [two_cores.submit(request) for request in requests]]
    assert together == [two_cores.submit(request).future.result(60)[0].png for request in requests]
    assert len(set(together)) == 4

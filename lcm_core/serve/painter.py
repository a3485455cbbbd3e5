"""Requests in, pictures out: one after the other as they came, or a small model's drafts side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lcm_core.errors import is_out_of_memory
from lcm_core.networks.traced import calls_to_record
from lcm_core.serve.fields import RequestError
from lcm_core.serve.shelf import Loras, Shelf

if TYPE_CHECKING:
    from PIL.Image import Image

    from lcm_core.pipeline import PictureOptions, Pipeline
    from lcm_core.pipeline.settings import Settings

_DRAFTS_AT_ONCE = 2
_SEEDS = 2**64
_FRAMES_PER_SECOND = 12


@dataclass(frozen=True)
class PictureRequest:
    """Pictures that differ in their seeds alone."""

    model: str
    prompt: str
    seed: int
    """The seed of the first picture; the next one has the next seed."""
    count: int = 1
    loras: Loras = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `PictureOptions`; None leaves a choice to the model."""
    image: Image | None = None
    mask: Image | None = None
    draft: bool = False
    """With the model's tiny VAE where it has one: in about two thirds of the time, with softer edges."""
    frames: int = 0
    """Where not 0: of a loop to the second prompt, or to the next seed, and back, instead of pictures."""


@dataclass(frozen=True)
class Painted:
    """One picture: a PNG with its settings inside, and the settings; or a loop as an animated WebP."""

    png: bytes
    settings: dict[str, Any]


class Job:
    """A request that waits or is being painted."""

    def __init__(self, request: PictureRequest) -> None:
        self.request = request
        self.future: Future[list[Painted]]
        self.stopped = threading.Event()
        self.steps_done = 0
        self.steps = 1
        """In all pictures."""

    def stop(self) -> None:
        """Paint no further than to the end of this step. What is finished remains."""
        self.stopped.set()

    def step(self, info: Mapping[str, Any]) -> bool:
        """The pipeline's callback: whether to go on."""
        self.steps_done += 1
        return not self.stopped.is_set()


class Lane:
    """Threads that paint requests of one kind, side by side.

    Args:
        name: of the threads.
        width: how many requests at once.
        cores: of the processor, for each of them.
    """

    def __init__(self, name: str, width: int, cores: int) -> None:
        self.width = width
        self.cores = cores
        self._threads = ThreadPoolExecutor(width, name)

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Queue a call."""
        return self._threads.submit(self._run, work, *arguments)

    def close(self) -> None:
        """Wait for what runs; whatever waits is dropped."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        torch.set_num_threads(self.cores)  # of this thread, but a part of it counts for all, hence for each call anew
        return work(*arguments)


class Painter:
    """Takes requests, gives jobs whose `future` will hold the pictures.

    A network of a few million weights gains little from a second core (a draft of the embedded model takes 105 ms on
    two, 112 on one), so that two drafts at once, each on half of the cores, are painted in nearly the time of one.
    """

    def __init__(self, shelf: Shelf, waiting: int) -> None:
        self.shelf = shelf
        self.running: Job | None = None
        """The job that is being painted; drafts are not counted, which are over at once."""
        self._waiting = waiting
        self._jobs: set[Job] = set()
        self._lock = threading.Lock()
        cores = torch.get_num_threads()
        self._pictures = Lane("painter", 1, cores)
        self._drafts = Lane("drafts", min(_DRAFTS_AT_ONCE, cores), max(1, cores // _DRAFTS_AT_ONCE))

    @property
    def count(self) -> int:
        """Jobs that wait or run."""
        return len(self._jobs)

    def lane(self, request: PictureRequest) -> Lane:
        """Where a request is painted."""
        is_quick = request.draft and self.shelf.has_small(request.model, request.loras)
        return self._drafts if is_quick else self._pictures

    def submit(self, request: PictureRequest) -> Job:
        """Queue a request.

        Raises:
            RequestError: too many wait already.
        """
        job = Job(request)
        with self._lock:
            if len(self._jobs) > self._waiting:
                raise RequestError(f"{self._waiting} requests are waiting already; try again in a moment", 429)
            self._jobs.add(job)
            lane = self.lane(request)
            job.future = lane.submit(self._run, job, lane is self._pictures)
        job.future.add_done_callback(lambda _: self._jobs.discard(job))
        return job

    def warm_up(self) -> None:
        """Load the usual model. Then every thread paints with it, which nobody waits for: first calls are slower than
        all others.

        In the threads that paint: each thread that has computed keeps helpers of its own, and those of two threads take
        the processor from each other.

        Raises:
            InputError: a file that cannot be used.
        """
        pipe = self._pictures.submit(self.shelf.pipeline, self.shelf.usual, (), True).result()
        self._pictures.submit(_try, pipe, calls_to_record(pipe.model.unet))
        if self.shelf.has_small(self.shelf.usual):
            for _ in range(self._drafts.width):
                self._drafts.submit(_try, pipe, 1)

    def interrupt(self) -> None:
        """Stop what is being painted; what waits comes next."""
        if (job := self.running) is not None:
            job.stop()

    def close(self) -> None:
        """End the threads; whatever waits is dropped."""
        for job in list(self._jobs):
            job.stop()
        self._pictures.close()
        self._drafts.close()

    def _run(self, job: Job, is_shown: bool) -> list[Painted]:
        if is_shown:
            self.running = job
        done: list[Painted] = []
        try:
            if not job.stopped.is_set():
                self._paint(job, done)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise RequestError("out of memory; ask for a smaller picture", 503) from None
        finally:
            if is_shown:
                self.running = None
        return done

    def _paint(self, job: Job, done: list[Painted]) -> None:
        from dataclasses import replace

        from lcm_core.pipeline import PictureOptions
        from lcm_core.pipeline.image import encode_image

        request = job.request
        pipe = self.shelf.pipeline(request.model, request.loras, request.draft)
        options = PictureOptions(**request.options)
        base = pipe.resolve(options, request.image)
        if request.frames:
            done += self._travel(job, pipe, options, base)
            return
        seeds = [(request.seed + number) % _SEEDS for number in range(request.count)]
        pictures = [replace(base, prompt=request.prompt, seed=seed).check() for seed in seeds]
        job.steps = pipe.count_steps(base) * len(pictures)
        painted = pipe.paint(pictures, request.image, request.mask, callback=job.step)
        for settings, image in zip(pictures, painted, strict=False):  # fewer are painted when it is stopped
            described = pipe.describe(settings).said
            done.append(Painted(encode_image(image, ".png", described), described))

    def _travel(self, job: Job, pipe: Pipeline, options: PictureOptions, base: Settings) -> list[Painted]:
        """A loop from the prompt to the second one and back, or to another seed where there is none."""
        from dataclasses import replace

        from lcm_core.pipeline import Keyframe
        from lcm_core.pipeline.animation import encode_animation

        request = job.request
        job.steps = pipe.count_steps(base) * request.frames
        far = Keyframe(base.second_prompt or request.prompt, request.seed + (not base.second_prompt), request.image)
        keyframes = [Keyframe(request.prompt, request.seed, request.image), far]
        options = replace(options, second_prompt=None, blend=None)
        travel = pipe.interpolate(keyframes, request.frames, loop=True, callback=job.step, options=options)
        frames = list(travel)
        if len(frames) < request.frames:  # it was stopped
            return []
        described = pipe.describe(replace(base, prompt=request.prompt, seed=request.seed)).said
        return [Painted(encode_animation(frames, ".webp", _FRAMES_PER_SECOND), described)]


def _try(pipe: Pipeline, count: int) -> None:
    pipe("", num_inference_steps=1, num_images_per_prompt=count)

"""From prompt to picture: text to image, image to image, inpainting, two-pass upscaling, and travel between keyframes.

Every picture is computed alone unless `batch_size` says otherwise, because networks round differently in batches of
different sizes; so a picture is the same, bit for bit, whatever is made beside it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from lcm_core.diffusion.interpolation import plan_frames
from lcm_core.diffusion.samplers import Callback
from lcm_core.errors import InputError
from lcm_core.pipeline.calls import OUTPUT_TYPES, Generators, OutputType, Result, as_output, pair_up, seeds_of, whole
from lcm_core.pipeline.generate import Stopped, make_inputs, mix_inputs, paint, paint_latents, plan_passes
from lcm_core.pipeline.guides import check_nag
from lcm_core.pipeline.image import open_image, to_pil
from lcm_core.pipeline.model import Model, load_model
from lcm_core.pipeline.options import PictureOptions
from lcm_core.pipeline.settings import Settings

if TYPE_CHECKING:
    import numpy
    from PIL.Image import Image

    Controls = Sequence[tuple[str, "ImageInput", float]]
    ImageInput = str | os.PathLike[str] | Image | numpy.ndarray | torch.Tensor

DEFAULT_STRENGTH = 0.6


@dataclass(frozen=True)
class Keyframe:
    """A picture that an animation passes through."""

    prompt: str = ""
    seed: int = 0
    image: ImageInput | None = None
    """Input picture, for image to image; give one to every keyframe or to none."""


class Pipeline:
    """A loaded model, ready to paint.

    >>> pipe = Pipeline.load("emoji")  # doctest: +SKIP
    >>> pipe("a panda, noto style", seed=1).images[0].save("panda.png")  # doctest: +SKIP
    """

    def __init__(self, model: Model) -> None:
        self.model = model

    @classmethod
    def load(
        cls,
        name: str | os.PathLike[str] = "emoji",
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        memory_format: torch.memory_format | None = None,
        lora: Sequence[tuple[str | os.PathLike[str], float]] = (),
        vae: str | os.PathLike[str] | None = None,
        unet: str | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
        vae_dtype: str | torch.dtype | None = None,
        embedding: Sequence[str | os.PathLike[str]] = (),
    ) -> Pipeline:
        """Load a model; see `lcm_core.pipeline.model.load_model`."""
        options = (lora, vae, unet, tokenizer, vae_dtype)
        return cls(load_model(name, device, dtype, memory_format, *options, embedding=embedding))

    @classmethod
    def from_diffusers(cls, pipe: Any) -> Pipeline:
        """Share the networks of a diffusers pipeline; see `lcm_core.pipeline.shared.share_model`."""
        from lcm_core.pipeline.shared import share_model

        return cls(share_model(pipe))

    def __repr__(self) -> str:
        model = self.model
        return f"Pipeline({model.title}, {model.resolution} pixels, {model.unet.dtype} on {model.device})"

    @classmethod
    def open(cls, options: PictureOptions) -> Pipeline:
        """Load the model that is asked for."""
        names = ("device", "dtype", "vae", "unet", "tokenizer", "vae_dtype")
        lora = [(path, strength) for path, strength in options.lora or ()]
        chosen = {name: getattr(options, name) for name in names}
        return cls.load(options.model or "emoji", lora=lora, embedding=options.embedding or (), **chosen)

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str = "",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | Sequence[int] = 0,
        height: int | None = None,
        width: int | None = None,
        sampler: str | None = None,
        original_steps: int | None = None,
        strength: float | None = None,
        image: ImageInput | None = None,
        mask: ImageInput | None = None,
        control: Controls = (),
        timesteps: Sequence[int] | None = None,
        upscale: float | None = None,
        upscale_strength: float | None = None,
        gamma: float | None = None,
        shift: float | None = None,
        prompt_syntax: str | None = None,
        second_prompt: str | None = None,
        blend: float | None = None,
        nag_scale: float | None = None,
        nag_tau: float | None = None,
        nag_alpha: float | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators | None = None,
        output_type: OutputType = "pil",
        batch_size: int = 1,
        callback: Callback | None = None,
    ) -> Result:
        """Paint one picture for each prompt and seed. What is None, the model decides; see `Settings` for the rest.

        Args:
            prompt, seed: one, or a list; one prompt with many seeds, many prompts with one seed, or pairs.
            image: start from this picture, noised by `strength`: a path, a Pillow picture, an array (H, W, 3) or a
                tensor (3, H, W); whole numbers are 0 to 255, fractions 0 to 1.
            mask: repaint only where this picture is white; as `image`, of one channel or three.
            control: (network, picture, strength) of each picture that guides the painting. The network is the path of
                a T2I-Adapter, ControlNet or IP-Adapter, or "canny" of the embedded model, for white outlines on black.
            num_images_per_prompt: pictures of each prompt and seed, with rising seeds.
            generator: one, or one for each picture, that the seeds are taken from; see `calls.seeds_of`.
            output_type: "pil", "np" (B, H, W, 3), "pt" (B, 3, H, W), both in [0, 1], or "latent".
            batch_size: more than 1 is faster on a GPU, at the price of last bits that depend on the batch.
            callback: called in every step with the sampler's {"i", "x", "sigma", "sigma_hat", "denoised"} and with
                "pictures", the number of pictures that the step was made for, and "preview", a function that gives
                these as they look now, as Pillow pictures. When it returns False, nothing more is painted; the result
                has the pictures that are finished.

        Raises:
            InputError: a setting, picture or weight that cannot be used; the message says what to do.
        """
        options = PictureOptions(
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            sampler=sampler,
            original_steps=original_steps,
            strength=strength,
            timesteps=timesteps,
            upscale=upscale,
            upscale_strength=upscale_strength,
            gamma=gamma,
            shift=shift,
            prompt_syntax=prompt_syntax,
            second_prompt=second_prompt,
            blend=blend,
            nag_scale=nag_scale,
            nag_tau=nag_tau,
            nag_alpha=nag_alpha,
        )
        base = self.resolve(options, image)
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"unknown output_type {output_type!r:.40}; use {', '.join(OUTPUT_TYPES)}")
        count = whole("num_images_per_prompt", num_images_per_prompt)
        pairs = pair_up(prompt, seed if generator is None else seeds_of(generator), count)
        pictures = [replace(base, prompt=words, seed=number).check() for words, number in pairs]
        batches = list(self._batches(pictures, image, mask, batch_size, callback, output_type == "latent", control))
        done = pictures[: sum(map(len, batches))]
        return Result(as_output(batches, output_type), [self.describe(one, image, mask, control).said for one in done])

    def resolve(self, options: PictureOptions, image: ImageInput | None = None) -> Settings:
        """Options with all that they leave open chosen by the model.

        Args:
            options: what was asked for.
            image: the input picture.

        Raises:
            InputError: a setting that this model cannot use.
        """
        if options.shift is not None and not self.model.is_flow:
            raise InputError(f"shift was given, but {self.model.name} is no flow model; leave it out")
        options = options.for_classes(self.model.classes, self.model.name)
        usual = self.model.settings(options.sampler)
        if options.timesteps:
            usual = replace(usual, num_inference_steps=len(options.timesteps))
        if image is not None:
            width, height = self._size(image)
            usual = replace(usual, strength=DEFAULT_STRENGTH, width=width, height=height)
        elif options.strength not in (None, 1):
            raise InputError(f"strength {options.strength} was given without an input image; add one or leave it out")
        settings = options.over(usual).check()
        check_nag(self.model, settings)
        plan_passes(self.model, settings)
        return settings

    def paint(
        self,
        pictures: Sequence[Settings],
        image: ImageInput | None = None,
        mask: ImageInput | None = None,
        batch_size: int = 1,
        callback: Callback | None = None,
        control: Controls = (),
    ) -> Iterator[Image]:
        """Paint pictures that differ in prompt and seed alone, handing out each as soon as it is done.

        Ends early when `callback` returns False; see `__call__`.
        """
        for batch in self._batches(pictures, image, mask, batch_size, callback, control=control):
            yield from to_pil(batch)

    def _batches(
        self,
        pictures: Sequence[Settings],
        image: ImageInput | None,
        mask: ImageInput | None,
        batch_size: int,
        callback: Callback | None,
        as_latents: bool = False,
        control: Controls = (),
    ) -> Iterator[torch.Tensor]:
        """(B, 3, H, W) in [-1, 1], or latents."""
        if mask is not None and image is None:
            raise InputError("a mask was given without an input image; add the image that it belongs to")
        if mask is not None and pictures[0].upscale > 1:
            raise InputError("upscale does not go with a mask; repaint first, then upscale the result as input image")
        for start in range(0, len(pictures), max(batch_size, 1)):
            batch = pictures[start : start + max(batch_size, 1)]
            work = paint_latents if as_latents else paint
            try:
                yield work(self.model, make_inputs(self.model, batch, image, mask, control), batch[0], callback)
            except Stopped:
                return

    def interpolate(
        self,
        keyframes: Sequence[Keyframe],
        frames: int = 24,
        mode: str = "slerp",
        easing: str = "linear",
        loop: bool = False,
        callback: Callback | None = None,
        options: PictureOptions | None = None,
    ) -> Iterator[Image]:
        """Hand out the frames of an animation through `keyframes`, each of mixed prompts, noise and input latents.

        The noise of all steps travels. A frame on a keyframe equals, bit for bit, the picture that the pipeline paints
        from that keyframe's prompt, seed and image with the same options. See `interpolation.plan_frames` for `easing`
        and `loop`, `interpolation.interpolate` for `mode`, and `resolve` for the options.

        Raises:
            InputError: as `__call__`; or only some of the keyframes have an image.
        """
        plan = plan_frames(len(keyframes), frames, easing, loop)
        if len({keyframe.image is None for keyframe in keyframes}) > 1:
            raise InputError("only some keyframes have an image; give one to every keyframe or to none")
        base = self.resolve(options or PictureOptions(), keyframes[0].image)
        inputs = [
            make_inputs(self.model, [replace(base, prompt=keyframe.prompt, seed=keyframe.seed)], keyframe.image)
            for keyframe in keyframes
        ]
        for frame in plan:
            mixed = mix_inputs(inputs[frame.start], inputs[frame.end], frame.fraction, mode)
            try:
                yield from to_pil(paint(self.model, mixed, base, callback))
            except Stopped:
                return

    def count_steps(self, settings: Settings) -> int:
        """Steps of the sampler that one picture takes, in all passes."""
        return sum(len(run.sigmas) - 1 for run in plan_passes(self.model, settings))

    def describe(
        self,
        settings: Settings,
        image: ImageInput | None = None,
        mask: ImageInput | None = None,
        control: Controls = (),
    ) -> PictureOptions:
        """All that makes a picture again, as far as its input pictures were given by their paths."""
        pictures = (image, mask, *(picture for _, picture, _ in control))
        paths = [os.fspath(path) if isinstance(path, (str, os.PathLike)) else None for path in pictures]
        named = [[name, path, float(share)] for (name, _, share), path in zip(control, paths[2:], strict=True) if path]
        options = PictureOptions(**asdict(settings), image=paths[0], mask=paths[1], control=named or None)
        return options | self.model.describe()

    def _size(self, image: ImageInput) -> tuple[int, int]:
        """The model's own size, in the proportions of the input image."""
        (width, height), multiple = open_image(image).size, self.model.size_multiple
        scale = self.model.resolution / (width * height) ** 0.5
        width, height = (max(round(length * scale / multiple), 1) * multiple for length in (width, height))
        return width, height

"""What the data is and how it is prepared. Loads no other library, so that `--help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass

from lcm_core.errors import InputError
from trainer.ranges import check_choices, check_ranges

NULL_PROMPTS = ("empty", "zeros")


@dataclass(frozen=True)
class DataConfig:
    """Pictures with captions, or prompts alone; give `path` or `prompts`."""

    path: str = ""
    """A folder of images with captions in .txt files or metadata.jsonl, and for each folder in it, if you like, a
    folder.json with `repeats` and a `caption` for images without one; a webdataset .tar or a folder of them, on this
    machine or in a store that fsspec reads, such as s3://bucket/photos-{000..099}.tar, whose tars are read once while
    the cache is made; a folder saved by the `datasets` library; a finished cache; or emoji, for the drawings of the
    embedded model."""
    prompts: str = ""
    """A text file with one prompt on each line, instead of images: the teacher paints what the student learns from."""
    labels: str = ""
    """Where the classes of a class-conditional teacher's pictures are told: folder, where pictures lie in folders named
    like their classes; or the column of metadata.jsonl, of a table or of a tar's JSON that names them, or in tars the
    suffix of a file beside each picture, such as cls. Folder where empty."""
    control_pictures: str = ""
    """Folder of the pictures that --control looks at: one for each picture of the data, of the same path and name but
    for its suffix. Those of a ControlNet are scaled to their pictures and lie in the cache, which becomes some twenty
    times as large; an IP-Adapter looks at the pictures of the data where no folder is given."""
    cache: str = ""
    """Folder of latents and text embeddings, which several runs may share; OUTPUT/cache where empty."""
    resolution: int = 0
    """Side of a square picture in pixels; other shapes get about as many pixels. 0 takes the teacher's."""
    buckets: bool = True
    """Keep each picture's shape, as nearly as the teacher's sizes allow; without it all are cropped to squares."""
    max_aspect: float = 2.0
    """Longest bucket: its long side by its short one. What is longer is cropped."""
    flip: bool = False
    """Whether to learn mirror images too; not for data with letters or faces that must not be mirrored."""
    crop: float = 1.0
    """The least share of both sides that random crops keep, which are learnt too; 1 for none."""
    colour: float = 0.0
    """The share by which brightness, contrast, saturation and hue are changed at most, to be learnt too; 0 for none,
    0.1 is mild."""
    variants: int = 0
    """Versions of each picture in the cache, of which the first is plain; for prompts, pictures of each. 0 takes 1, or
    2 with flip, or 4 with crop or colour."""
    folder_names: bool = False
    """Folders named like `10_a cat` mean 10 repeats and that caption, as for sd-scripts."""
    caption_versions: int = 1
    """Versions of each caption: the first is as written, the others have its tags, which commas part, in other orders.
    One is drawn each time; each takes its place in the cache."""
    keep_tags: int = 0
    """First tags of a caption that stay where they are."""
    holdout: int = 0
    """Pictures that are not learnt from, to measure the loss on; from all over the data."""
    caption_dropout: float = 0.0
    """Share of captions that are replaced by the empty prompt while training."""
    null_prompt: str = "empty"
    """What the teacher's guidance leads away from: empty, the text encoders' embedding of the empty prompt; or zeros,
    as SDXL was trained with and as its usual distillation script takes."""
    teacher_steps: int = 0
    """Steps in which the teacher paints a prompt; 0 takes its own number, mostly 25."""
    teacher_guidance: float = 0.0
    """Guidance scale with which the teacher paints a prompt; 0 takes its own, mostly 7.5."""
    teacher_seed: int = 0
    """Seeds the teacher's pictures and the random parts of the augmentation."""
    cache_batch: int = 4
    """Pictures that go through the VAE or the teacher at once while the cache is made; the VAE takes fewer of those
    beyond 512 x 512 pixels."""
    shard_size: int = 128
    """Pictures in one file of the cache: what is done again after a stop."""

    @property
    def is_image_free(self) -> bool:
        """Whether the teacher paints the pictures."""
        return bool(self.prompts)

    @property
    def is_augmented(self) -> bool:
        """Whether a picture's later variants differ from its first."""
        return self.flip or self.crop < 1 or self.colour > 0

    @property
    def variant_count(self) -> int:
        """`variants`, resolved."""
        if self.variants:
            return self.variants
        return 4 if self.crop < 1 or self.colour > 0 else 2 if self.flip else 1

    def check(self) -> DataConfig:
        """Refuse what cannot be meant; returns itself.

        Raises:
            InputError: names the first setting that is wrong, and what it may be.
        """
        if bool(self.path) == bool(self.prompts):
            given = "both data and prompts were" if self.path else "neither data nor prompts were"
            raise InputError(f"{given} given; give a folder of images, or a prompts file for an image-free run")
        ranges = {
            "resolution": (0, 8192),
            "max_aspect": (1, 8),
            "crop": (0.1, 1),
            "colour": (0, 1),
            "variants": (0, 1000),
            "caption_versions": (1, 1000),
            "keep_tags": (0, 1000),
            "holdout": (0, 10**6),
            "caption_dropout": (0, 1),
            "teacher_steps": (0, 1000),
            "teacher_guidance": (0, 100),
            "teacher_seed": (0, 2**53),
            "cache_batch": (1, 1024),
            "shard_size": (1, 65536),
        }
        check_ranges(self, ranges)
        check_choices(self, {"null_prompt": NULL_PROMPTS})
        if self.prompts and self.control_pictures:
            raise InputError("control_pictures are for images; give these as data instead of prompts")
        if "://" in self.path and self.control_pictures:
            raise InputError("control_pictures go with pictures on this machine, not with those in a store")
        if self.prompts and self.is_augmented:
            raise InputError("flip, crop and colour are for images; leave them out with prompts")
        if self.path and self.variants > 1 and not self.is_augmented:
            raise InputError(f"{self.variants} variants would all be alike; add flip, crop or colour")
        if self.is_augmented and self.variant_count == 1:
            raise InputError("1 variant is the plain picture, without augmentation; use variants 2 or more")
        return self

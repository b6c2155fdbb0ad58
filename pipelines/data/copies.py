"""Augmented copies of training images: written once into the shards, read as often as there are epochs.

They pay where decoding and augmenting is dearer than reading: large photographs, many epochs, few cores. Copy k of row
r is what a training without copies would show of row r in epoch k under the same seed, to the bit where pixels are
stored as they are.

In the shards, the rows of one image follow each other: the image itself, where it is kept, and its copies 0 to N - 1.
So the number of a row says which it is, and nothing else must be stored.

Torch is not imported here: Ray's tasks that only move bytes start without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from panoptic.segmentation import Sample
    from panoptic.transforms import Augment

KEY = "copies"
"""Entry of a manifest's `source` that describes the copies."""

QUALITY = 95
"""The JPEG quality of copies that are stored as JPEG."""


@dataclass(frozen=True)
class Copies:
    """The copies of a set of shards."""

    augment: Augment
    """The augmentation that makes the copies; its `copies` is their number."""
    seed: int
    """The seed of the augmentation."""

    @property
    def rows(self) -> int:
        """Rows of each image."""
        return self.augment.copies + self.augment.originals

    def views(self, sample: Sample, number: int) -> Iterator[tuple[int, Sample]]:
        """The copies of an image.

        Args:
            sample: decoded, with its truth.
            number: of its row, among those that a preparation without copies would write.

        Yields:
            the number of the copy, and the sample as training sees it.
        """
        from panoptic.transforms import generator, training_view

        for copy in range(self.augment.copies):
            yield copy, training_view(sample, self.augment, generator(self.seed, copy, number))

    def encode(self, sample: Sample) -> bytes:
        """The bytes of a copy's pixels."""
        from panoptic.png import encode_image, encode_jpeg, encode_raw

        if self.augment.stored == "jpeg":
            return encode_jpeg(sample.image, QUALITY)
        return (encode_raw if self.augment.stored == "raw" else encode_image)(sample.image)

    def left(self, augment: Augment, row: int) -> Augment:
        """The part of a training's augmentation that is still to be done to a row: all of it to an image itself.

        Args:
            augment: of the training.
            row: of the shards.
        """
        if self.augment.originals and row % self.rows == 0:
            return augment
        return without(augment, self.augment)

    def record(self) -> dict[str, Any]:
        """The entry of the manifest."""
        options = {entry.name: getattr(self.augment, entry.name) for entry in fields(self.augment)}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
        return {"seed": self.seed, "augment": plain}


def copies_of(source: Mapping[str, Any]) -> Copies | None:
    """The copies that a manifest's `source` describes, None where there are none.

    Raises:
        ValueError: they were written by a later version, with options that are unknown here.
    """
    from panoptic.transforms import Augment

    record = source.get(KEY)
    if record is None:
        return None
    try:
        options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record["augment"].items()}
        return Copies(Augment(**options), int(record["seed"]))
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"source.{KEY} of the manifest cannot be read ({error}); prepare the shards again") from error


def copy_name(name: str, copy: int) -> str:
    """The name of a copy's row. No image has it: the name of a file is no folder beside it."""
    return f"{name}/copy-{copy}"


def without(augment: Augment, done: Augment) -> Augment:
    """An augmentation without the kinds of steps (scale, crop with its padding, flip, colour) that were done already.

    A crop stays where images are still scaled: it gives them their size.
    """
    scaled = done.scale != "none" or any(done.fit) or any(done.size) or any(done.early_crop)
    cropped = any(done.crop) or any(done.early_crop)
    if scaled:
        augment = replace(augment, fit=(0, 0), size=(0, 0), scale="none", early_crop=(0, 0))
    scales = augment.scale != "none" or any(augment.fit) or any(augment.size) or any(augment.early_crop)
    if cropped and not scales:
        augment = replace(augment, crop=(0, 0), crop_share=1.0, pad="none")
    if done.flip:
        augment = replace(augment, flip=0.0)
    if done.colour != "none":
        augment = replace(augment, colour="none", doubled=False)
    return augment


def check_copies(asked: Augment, source: Mapping[str, Any], uri: str) -> None:
    """Compare the copies that a training asks for with those of its shards; it may ask for none, whatever they have.

    Raises:
        ValueError: the shards have others, or none; or the training doubles what has copies.
    """
    there = copies_of(source)
    if there is not None and asked.doubled:
        raise ValueError(f"{uri}: holds {there.augment.copies} copies of each image; set augment.doubled to False")
    if not asked.copies:
        return
    again = "prepare them with jobs/prepare.py and these options, or leave augment.copies out"
    if there is None:
        raise ValueError(f"augment.copies {asked.copies}: the shards at {uri} hold no copies; {again}")
    own, other = Copies(asked, there.seed).record()["augment"], there.record()["augment"]
    listed = [f"augment.{name} {other[name]}, not {own[name]}" for name in own if own[name] != other[name]]
    if listed:
        raise ValueError(f"{uri}: holds copies made with {', '.join(listed)}; {again}")

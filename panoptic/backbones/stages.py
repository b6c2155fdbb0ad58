"""The names of a backbone's feature maps."""

from __future__ import annotations

STAGES: tuple[str, ...] = ("res2", "res3", "res4", "res5")
"""The four stages, fine to coarse, as detectron2 names them: strides 4, 8, 16 and 32 where nothing is dilated."""

STEM_AND_STAGES: tuple[str, ...] = ("stem", *STAGES)
"""With the layers before them, which give a feature map of their own in most backbones: what `freeze` counts."""

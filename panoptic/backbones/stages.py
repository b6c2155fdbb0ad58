"""The names of a backbone's feature maps."""

from __future__ import annotations

STAGES: tuple[str, ...] = ("res2", "res3", "res4", "res5")
"""The four stages, fine to coarse, as detectron2 names them: strides 4, 8, 16 and 32 where nothing is dilated."""

STEM_AND_STAGES: tuple[str, ...] = ("stem", *STAGES)
"""The stages and the layers before them, whose feature map most backbones give, too; `freeze` counts these."""

"""The choices that a command line offers for evaluations and predictions, read without torch."""

from __future__ import annotations

FORMATS = ("coco", "rle", "cityscapes", "overlay")
"""Forms in which predictions are written."""

"""Options of several parts, which a command line reads without torch: the normalisation and the precision."""

from __future__ import annotations

from typing import Literal

Norm = Literal["batch", "sync", "group", "frozen", "absolute"]
"""batch: over the worker's batch; sync: over all workers (GPU only when training); group: 32 groups;
frozen: fixed statistics and affine; absolute: batch norm that scales by the weight's absolute value (EfficientPS)."""

Precision = Literal["float32", "bfloat16", "float16"]
"""Type of the numbers in which a network computes, by autocast."""

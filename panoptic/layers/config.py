"""An option of several architectures: the normalisation."""

from __future__ import annotations

from typing import Literal

Norm = Literal["batch", "sync", "group", "frozen", "absolute"]
"""batch: over the worker's batch; sync: over all workers (GPU only when training); group: 32 groups;
frozen: fixed statistics and affine; absolute: batch norm that scales by the weight's absolute value (EfficientPS)."""

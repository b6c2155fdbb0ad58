"""Named experiments, one function each; the command line only changes them.

    jobs/train.py PRESET --optim.lr 1e-4 --model.backbone.freeze 2

One file an architecture. A docstring says which PQ to expect, on which hardware, in what time, by which command, and
where the figure comes from. Figures "from the paper" and "from the reference's table" were not measured here.
"""

from __future__ import annotations

from collections.abc import Callable

from pipelines.config import Experiment
from pipelines.presets import (
    detr,
    efficientps,
    eomt,
    jsis_net,
    mask2former,
    maskformer,
    panoptic_deeplab,
    panoptic_fcn,
    panoptic_fpn,
)

PRESETS: dict[str, Callable[[], Experiment]] = {
    function.__name__.replace("_", "-"): function
    for module in (
        panoptic_deeplab,
        detr,
        panoptic_fcn,
        panoptic_fpn,
        jsis_net,
        maskformer,
        mask2former,
        efficientps,
        eomt,
    )
    for function in module.PRESETS
}
"""Function of each preset by its name on the command line."""

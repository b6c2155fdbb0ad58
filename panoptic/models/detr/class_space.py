"""The logits of a classification head with "no object", and the classes that they stand for.

Trained here, a head has one logit a class and a last one for "no object". A published head may be wider:
DETR's has 250 for COCO's sparse category ids, of which 133 mean something. All of them are kept, since the
unused ones take part in softmax and loss; they are never a target, and a query that picks one is dropped.

Shapes: C classes, K logits without the last.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panoptic.segmentation import IGNORE


class ClassSpace(nn.Module):
    """The map from class index to logit and back.

    `index`, int64 [C], is part of the weights: a checkpoint brings its own.

    Args:
        classes: C.
        logits: K; 0 means C.
    """

    index: Tensor

    def __init__(self, classes: int, logits: int = 0) -> None:
        super().__init__()
        if 0 < logits < classes:
            raise ValueError(f"logits: {logits} cannot stand for {classes} classes; give 0 for one logit a class")
        self.logits = logits or classes
        self.register_buffer("index", torch.arange(classes))

    def to_logits(self, labels: Tensor) -> Tensor:
        """The logits that classes (int64, any shape) train; `IGNORE` becomes "no object"."""
        table = F.pad(self.index, (0, 1), value=self.logits)
        return table[labels]  # IGNORE, -1, reads the last entry

    def to_classes(self, logits: Tensor) -> Tensor:
        """The classes that logits (int64 indices, any shape) stand for; `IGNORE` for "no object" and unused ones."""
        table = torch.full((self.logits + 1,), IGNORE, device=logits.device)
        table[self.index] = torch.arange(len(self.index), device=logits.device)
        return table[logits]

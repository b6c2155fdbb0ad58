"""The files of a checkpoint folder, and reading one."""

from __future__ import annotations

import io
from typing import Any

from panoptic.training import checkpoint as checkpoints
from pipelines.cluster import storage

CHECKPOINT = "checkpoint.pt"


REPORT = "report.txt"


METRICS = "metrics.json"


def load_checkpoint(uri: str) -> dict[str, Any]:
    """The checkpoint in a file, or in the folder that a run wrote, local or s3://.

    Raises:
        ValueError: there is none, or it is not one.
    """
    file = uri if uri.endswith(".pt") else storage.join(uri, CHECKPOINT)
    if not storage.exists(file):
        raise ValueError(f"{file}: no checkpoint there; name a folder step_* that a run wrote, or a .pt file")
    return checkpoints.load(io.BytesIO(storage.read_bytes(file)), file)

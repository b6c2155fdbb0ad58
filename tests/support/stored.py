"""A stored model that was never trained, shards, and an actor that dies, for tests of evaluation and prediction."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from panoptic.png import encode_segments
from pipelines.data.manifest import Manifest
from pipelines.evaluation.evaluate import Chunk, Task, counter
from tests.conftest import draw_segmentation
from tests.support.shards import store

OPTIONS = {"train.validation_batch": 2}


def write_model(folder: Path, categories: Any, seed: int = 0, class_map: Any = None) -> str:
    """A checkpoint folder of a tiny Panoptic-DeepLab with random weights."""
    import torch

    from panoptic.training import checkpoint
    from tests.support.small import SMALL_DEEPLAB

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = SMALL_DEEPLAB.build(categories)
    file = str(folder / "checkpoint.pt")
    checkpoint.save(file, config=SMALL_DEEPLAB, model=model, experiment=OPTIONS, class_map=class_map)
    return str(folder)


def write_shards(root: Path, categories: Any, count: int, names: Sequence[str] = ()) -> Manifest:
    """A split of drawn images of two sizes in no order, written without Ray; called 0.jpg, 1.jpg, ... by default."""
    root.mkdir(parents=True, exist_ok=True)
    rng, rows = np.random.default_rng(1), []
    for number in range(count):
        height, width = [(48, 64), (48, 64), (64, 48)][rng.integers(3)]
        truth = draw_segmentation(rng, height, width, categories, crowd=number == 3)
        pixels = cv2.resize(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8), (width, height))
        rows.append(
            {
                "name": names[number] if names else f"{number}.jpg",
                "image": cv2.imencode(".jpg", pixels)[1].tobytes(),
                "segments": encode_segments(truth.segments),
                "labels": truth.labels.tolist(),
                "crowd": truth.is_crowd().tolist(),
                "height": height,
                "width": width,
                "image_id": number,
            }
        )
    shards, index = store(root, [rows])
    manifest = Manifest(
        *(2, "val", count, shards[0].sha256, categories, shards, index, 64, 64),
        *((0,) * len(categories), 0, 0, 0, (), 0, {}),
        uri=str(root),
    )
    (root / "manifest.json").write_bytes(manifest.to_json())
    return manifest


def mortal(tasks: Sequence[Task], marker: str) -> Callable[[Chunk], Any]:
    """`counter` in a process that is killed over row 2, the first time that one is asked for it."""
    count = counter(tasks)

    def until_killed(chunk: Chunk) -> Any:
        if 2 in chunk.rows and not os.path.exists(marker):
            Path(marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return count(chunk)

    return until_killed

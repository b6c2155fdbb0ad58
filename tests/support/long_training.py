"""2,000 tiny steps with validations in a fresh process: `python -m tests.support.long_training TRAIN VAL`.

TRAIN and VAL are folders of prepared shards. Prints the memory of the process, MiB by step, as JSON.
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import dataclass, replace

from panoptic.transforms import Augment
from pipelines.data.loader import FeedConfig
from pipelines.data.manifest import Manifest
from pipelines.presets import PRESETS
from pipelines.tracking.runs import Run
from pipelines.training import worker
from pipelines.training.state import Job
from tests.support.feeding import memory
from tests.support.tiny import TinyBackbone, TinyConfig


@dataclass(frozen=True)
class Backbone(TinyBackbone):
    """With what a worker asks of every backbone."""

    weights: str = "none"


def main(train: str, val: str) -> dict[int, float]:
    """MiB at every hundredth step."""
    demo = PRESETS["demo"]()
    options = replace(demo.train, steps=2_000, batch=2, validate_every=100, log_every=100, threads=1)
    experiment = replace(
        demo, model=TinyConfig(Backbone()), train=options, augment=Augment(), feed=FeedConfig(threads=1)
    )
    found: dict[int, float] = {}

    def log(state: worker.State, *_: object) -> None:
        gc.collect()
        found[state.step] = memory()

    def save(*_: object) -> None:
        """Checkpoints are Ray Train's part."""

    worker.log, worker.Writer.save = log, save
    job = Job(experiment, Manifest.load(train), Manifest.load(val), Run("", "", ""), "", False)
    state = worker.build_state(job, rank=1, world=2)
    state.rank, state.world = 0, 1  # the first rank would record in MLflow
    state.accumulation = 1
    worker.train(state)
    return found


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))

"""Photographs a second of `jobs/serve.py`: `python -m tests.benchmarks.serving [MODEL] [--replicas N] [--batch N]`.

Clients of this machine ask over loopback, 1, 4 and 16 at once. Without MODEL, the demo's network with random weights
on drawn noise of 192 x 320 pixels: the time of a forward pass depends on neither.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import tempfile
from pathlib import Path

import cv2
import numpy as np
import torch

from panoptic.classes import classes
from panoptic.training import checkpoint
from pipelines.config import flatten
from pipelines.presets.panoptic_deeplab import demo
from pipelines.serving.server import Server, serving
from tests.support.load_client import load

SECONDS = 8.0
"""About so long each row takes."""


def main() -> None:
    """Serve, ask, print a row for each number of clients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    noise = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    image = cv2.imencode(".jpg", cv2.resize(noise, (320, 192)))[1].tobytes()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        model = options.model or random_model(Path(folder))
        server = Server(port=8123, replicas=options.replicas, batch=options.batch, threads=options.threads)
        address = stack.enter_context(serving(model, "", server))
        load(address, [image], 4, 8)
        print("| clients | photographs/s | median ms | 95 % ms |\n|---|---|---|---|")
        for clients in (1, 4, 16):
            one = load(address, [image], clients, 2 * clients)
            count = max(2 * clients, int(SECONDS * len(one.answers) / one.seconds))
            seen = load(address, [image], clients, count)
            assert all(answer.status == 200 for answer in seen.answers)
            print(seen.sentence(clients), flush=True)


def random_model(folder: Path) -> str:
    """A checkpoint of the demo's network with random weights."""
    experiment = demo()
    torch.manual_seed(0)
    model = experiment.model.build(classes("cityscapes"))
    file = str(folder / "random.pt")
    checkpoint.save(file, config=experiment.model, model=model, experiment=flatten(experiment))
    return file


if __name__ == "__main__":
    main()

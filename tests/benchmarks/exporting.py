"""Networks of ONNX Runtime beside torch's own, on a CPU: `python -m tests.benchmarks.exporting [PRESETS]`.

Each architecture's published preset (by default one a head), untrained, with COCO's 133 classes, is exported as
jobs/export.py does it, on one image of 480x640. Times are CPU milliseconds of one thread, the median of rounds that
alternate between the two, after both gave the same numbers; the size is that of all files. Second graphs and the merge
are not in the times: an untrained model finds nothing to look into.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from panoptic.export import differences, quantise, write
from panoptic.export.graphs import Network
from panoptic.metrics.text import markdown_table
from panoptic.runtime import Runner
from panoptic.segmentation import Categories
from panoptic.transforms import Resize
from pipelines.presets import PRESETS
from tests.benchmarks.timing import hardware

DEFAULT = (
    "panoptic-deeplab-r52-coco",
    "panoptic-fpn-r50-coco",
    "jsis-net-r50-coco",
    "panoptic-fcn-r50-coco",
    "detr-r50-coco",
    "maskformer-r50-coco",
    "mask2former-r50-coco",
    "efficientps-b5-cityscapes",
    "eomt-small-coco",
)

SIDES = (480, 640)


def main() -> None:
    """Print a row as each model is measured, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=DEFAULT, help=f"default: {' '.join(DEFAULT)}")
    parser.add_argument("--repeat", type=int, default=5, help="rounds of which the median counts")
    parser.add_argument("--int8", action="store_true", help="also with weights of 8 bits")
    given = parser.parse_args()
    print(hardware(), flush=True)
    torch.set_num_threads(1)
    rows = []
    for name in given.presets:
        rows.append(measure(name, given.repeat, given.int8))
        print(" | ".join(rows[-1]), flush=True)
    print(markdown_table([["preset", "MB", "torch, ms", "ONNX Runtime, ms", "share", "int8: MB, ms", "apart"], *rows]))


def measure(name: str, repeat: int, int8: bool) -> list[str]:
    """One line of the table."""
    torch.manual_seed(0)
    names = tuple(f"class {k}" for k in range(133))
    things = tuple(k < 80 for k in range(133))
    categories = Categories(names, things, tuple(range(133)), ((0, 0, 0),) * 133)
    model = PRESETS[name]().model.build(categories).eval()
    with tempfile.TemporaryDirectory() as folder:
        files = write(model, Resize(), folder)
        apart = max(differences(model, folder).values())
        size = megabytes(files)
        height, width = (-(-side // model.divisor) * model.divisor for side in SIDES)
        images, sizes = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8), torch.tensor([SIDES])
        network, runner = Network(model), Runner(folder, threads=1)
        inputs = {"images": images.numpy(), "sizes": np.array([SIDES])}

        def eager() -> object:
            with torch.inference_mode():
                return network(images, sizes)

        ours, theirs = medians([eager, lambda: runner.graph("network", inputs)], repeat)
        small = ""
        if int8:
            for file in files.values():
                quantise(file)
            quantised = Runner(folder, threads=1)
            (milliseconds,) = medians([lambda: quantised.graph("network", inputs)], repeat)
            small = f"{megabytes(files):.0f}, {milliseconds:.0f}"
    row = [f"`{name}`", f"{size:.0f}", f"{ours:.0f}", f"{theirs:.0f}", f"{theirs / ours:.0%}", small, f"{apart:.0e}"]
    return row


def megabytes(files: dict[str, Path]) -> float:
    """The size of all files together."""
    return sum(file.stat().st_size for file in files.values()) / 1e6


def medians(runs: list[Callable[[], object]], repeat: int) -> list[float]:
    """CPU milliseconds of each, in turn."""
    taken: list[list[float]] = [[] for _ in runs]
    for _ in range(1 + repeat):
        for run, times in zip(runs, taken, strict=True):
            begin = time.process_time()
            run()
            times.append(1000 * (time.process_time() - begin))
    return [statistics.median(times[1:]) for times in taken]


if __name__ == "__main__":
    main()

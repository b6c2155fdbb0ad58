"""PQ of exported models on a split, beside the model's own: `python -m tests.benchmarks.exported CHECKPOINT SHARDS`.

SHARDS is a folder of shards (`…/val`). The checkpoint is exported as ONNX, run on the first --most images by torch, by
ONNX Runtime, and with 8-bit weights, of all layers and of matrix products alone. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

import panoptic
from panoptic.export import quantise, write
from panoptic.metrics.panoptic_quality import QualityCounts, count, quality
from panoptic.metrics.text import markdown_table
from panoptic.runtime import Runner
from panoptic.segmentation import Categories, Sample, Segmentation
from panoptic.transforms import Resize
from pipelines.data.loader import evaluation_batches
from pipelines.data.manifest import Manifest

LAYERS = {"int8": ("MatMul", "Gemm", "Conv"), "int8, products alone": ("MatMul", "Gemm")}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("shards")
    parser.add_argument("--most", type=int, default=10**6, help="images that are looked at, the first ones")
    given = parser.parse_args()
    torch.set_num_threads(1)
    manifest = Manifest.load(given.shards)
    chosen = range(min(given.most, manifest.rows))
    batches = evaluation_batches(manifest, Resize(), 1, rows=chosen)  # each at its own size
    samples = [sample for _, _, drawn in batches for sample in drawn]
    predictor = panoptic.load(given.checkpoint, "cpu", "float32")
    rows = [_row("torch", 0.0, predictor, samples, manifest.categories)]
    print(rows[0], flush=True)
    with tempfile.TemporaryDirectory() as parent:
        whole = Path(parent) / "float32"
        write(predictor.model, predictor.resize, whole)
        folders = {"ONNX Runtime": whole}
        for name, layers in LAYERS.items():
            folders[name] = Path(shutil.copytree(whole, Path(parent) / name))
            for file in folders[name].glob("*.onnx"):
                quantise(file, layers)
        for name, folder in folders.items():
            size = sum(file.stat().st_size for file in folder.glob("*.onnx")) / 1e6
            rows.append(_row(name, size, Runner(folder, threads=1), samples, manifest.categories))
            print(rows[-1], flush=True)
    print(markdown_table([["", "MB", "PQ", "things", "stuff", "CPU ms an image"], *rows]))


def _row(
    name: str,
    size: float,
    run: Callable[[np.ndarray], Segmentation],
    samples: Sequence[Sample],
    categories: Categories,
) -> list[str]:
    """PQ over the samples, and the CPU time of an image from pixels to map."""
    counts, begin, seconds = QualityCounts.zeros(len(categories)), time.process_time(), 0.0
    for sample in samples:
        begin = time.process_time()
        found = run(sample.image)
        seconds += time.process_time() - begin
        counts += count(sample.truth, found, categories)
    result = quality(counts, categories)
    groups = (result.all, result.things, result.stuff)
    figures = [f"{group.pq:.2f}" for group in groups]
    return [name, f"{size:.1f}" if size else "", *figures, f"{1000 * seconds / len(samples):.0f}"]


if __name__ == "__main__":
    main()

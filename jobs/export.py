"""A trained model for other runtimes: `python jobs/export.py MODEL --to onnx --out FOLDER`.

MODEL is a run's or a checkpoint's folder, a .pt file, models:/name@alias, runs:/id/model or hub:NAME.

FOLDER gets network.onnx (or .pt2) from uint8 images [B, 3, H, W], RGB, and the int64 [B, 2] sizes of the images within
their padding, to the outputs of the network; height and width are free. Models that look at single segments have second
graphs beside it: "boxes" and "masks" (Panoptic FPN, EfficientPS, JSIS-Net), "masks" (DETR), "kernels" (Panoptic FCN).
Classes, resizing, pixel statistics and the rules of the merge lie in the metadata of the first file.

`python -m panoptic.runtime FOLDER IMAGE --out FILE.jpg` segments a photograph with --to onnx, without torch.
--to torch writes programs of torch.export, --to aot packages of AOTInductor (needs a C++ compiler here).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.common import TRACKING, command
from pipelines.config import Model, Store, parse_options
from pipelines.tracking.config import Tracking


@dataclass(frozen=True)
class Options:
    """The model, and the files that are written."""

    model: Model
    """Folder of a run (its best checkpoint) or of a checkpoint, .pt file, models:/name@alias, runs:/id/model or
    hub:NAME (published weights, whose names the list of presets ends with)."""
    to: Literal["onnx", "torch", "aot"] = "onnx"
    """onnx: for ONNX Runtime; torch: programs of torch.export; aot: machine code by AOTInductor."""
    out: str = "exported"
    """Folder that is written to, on this machine."""
    batch: bool = True
    """The network takes any number of images; --no-batch: one."""
    int8: bool = False
    """onnx: weights of 8 bits, by ONNX Runtime's dynamic quantisation. Costs PQ: see infra/RESULTS.md."""
    tracking: Store = field(default_factory=Store)
    """MLflow."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Path]:
    """Export, compare with the model, and print a line for each file.

    Raises:
        ValueError: there is no model, or a part of it cannot be exported; names it.
    """
    given = sys.argv[1:] if arguments is None else arguments
    options: Options = parse_options(Options, given, str(__doc__), TRACKING)
    if options.int8 and options.to != "onnx":
        raise ValueError(f"--int8: only with --to onnx, not --to {options.to}")
    if "://" in options.out:
        raise ValueError(f"--out {options.out}: give a folder of this machine, and copy it from there")

    # what follows takes seconds to import: help and mistakes on the command line need none of it
    from panoptic.export import check_tools, differences, quantise, write
    from pipelines.evaluation.evaluate import assign_images, stored_of
    from pipelines.presets import PRESETS
    from pipelines.tracking.runs import resolve_uri

    check_tools(options.to)
    tracking_uri = resolve_uri(Tracking(uri=options.tracking.uri), "runs")
    task = assign_images(options.model, None, PRESETS["demo"](), tracking_uri)
    model = stored_of(task).model.cpu()
    files = write(model, task.experiment.resize, options.out, options.to, options.batch)
    measured: dict[str, float] = {}
    if options.int8:
        for file in files.values():
            quantise(file)
    elif options.to == "onnx":
        measured = differences(model, options.out)
    for name, file in files.items():
        apart = f", within {measured[name]:.0e} of torch" if name in measured else ""
        print(f"{file}  {file.stat().st_size / 1e6:.1f} MB{apart}")
    return files


if __name__ == "__main__":
    command(main)

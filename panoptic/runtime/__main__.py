"""Segment a photograph with an exported model: `python -m panoptic.runtime FOLDER IMAGE --out FILE.jpg`.

Needs NumPy, OpenCV, Pillow and ONNX Runtime, and no torch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from panoptic.png import decode_image, encode_jpeg
from panoptic.runtime.runner import Runner
from panoptic.visualization import overlay


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m panoptic.runtime", description=str(__doc__).split("\n")[0])
    made.add_argument("folder", help="folder that jobs/export.py --to onnx wrote")
    made.add_argument("image", help="photograph")
    made.add_argument("--out", help="the photograph with its segments drawn over it (.jpg)", default="")
    made.add_argument("--threads", type=int, default=0, help="threads of ONNX Runtime; 0 = as many as cores")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Segment, write the picture, and print a line for each segment."""
    options = parser().parse_args(arguments)
    try:
        runner = Runner(options.folder, options.threads)
        image = decode_image(Path(options.image).read_bytes(), options.image)
        begin = time.perf_counter()
        result = runner(image)
        seconds = time.perf_counter() - begin
        if options.out:
            Path(options.out).write_bytes(encode_jpeg(overlay(image, result, runner.categories), 92))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    scores = result.scores if result.scores is not None else [None] * len(result.labels)
    for label, area, score in zip(result.labels.tolist(), result.areas().tolist(), scores, strict=True):
        certainty = "" if score is None else f"  {float(score):.2f}"
        print(f"{runner.categories.names[label]:24} {area:8} px{certainty}")
    print(f"{len(result.labels)} segments in {seconds:.2f} s" + (f" -> {options.out}" if options.out else ""))


if __name__ == "__main__":
    main()

"""All commands under one name: `panoptic-ray train …` is `python jobs/train.py …`."""

from __future__ import annotations

import importlib
import sys
from difflib import get_close_matches

from jobs.common import command

JOBS = {
    "prepare": "check a data set and write its shards",
    "train": "prepare, train, validate, track",
    "tune": "search options; run a table of the papers and print ours beside it",
    "evaluate": "every figure of a stored model, and a report; also by the clock",
    "predict": "segment photographs or shards",
    "serve": "a model behind HTTP, on Ray Serve",
    "status": "how a run stands, from its files and MLflow alone",
    "replay": "a step whose numbers were not finite, once more",
    "oracle": "the figures were some outputs the truth",
    "submit": "any of these on a Ray cluster",
    "independent": "joint against independent training of JSIS-Net",
    "convert": "published checkpoints to ours",
    "export": "a model for other runtimes: ONNX, torch.export, AOTInductor",
}
"""Every job, a module of this package, with what it does."""


def main() -> None:
    """Run the job that the first argument names."""
    arguments = sys.argv[1:]
    name = arguments.pop(0) if arguments else "--help"
    if name not in JOBS:
        if name in ("-h", "--help"):
            print("usage: panoptic-ray JOB …; --help after a job lists its options")
            print("\n".join(f"  {job:12} {what}" for job, what in JOBS.items()))
            return
        near = get_close_matches(name, JOBS, 3)
        hint = f"near: {', '.join(near)}; " if near else ""
        print(f"error: there is no job {name!r}; {hint}there are {', '.join(JOBS)}", file=sys.stderr)
        sys.exit(2)
    sys.argv[0] = f"panoptic-ray {name}"
    command(importlib.import_module(f"jobs.{name}").main, arguments)


if __name__ == "__main__":
    main()

"""A model behind HTTP, on Ray Serve: `python jobs/serve.py MODEL`. Needs the extra `serve`.

    curl -X POST -T photo.jpg 'http://127.0.0.1:8000/segment?format=overlay' -o segmented.jpg

MODEL is a run's or a checkpoint's folder, a .pt file, models:/name@alias, runs:/id/model or hub:NAME. POST /segment
takes an image file and gives JSON with the PNG of segment ids and the segments, or with format=png or format=overlay a
picture; GET /health says whether a replica answers. What is no image gets 400 with one line. Ends with Ctrl-C.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.common import TRACKING, command
from panoptic.ranges import NonNegativeFloat, PositiveInt, ThreadCount
from pipelines.config import Model, Store, parse_options
from pipelines.tracking.config import Tracking


@dataclass(frozen=True)
class Options:
    """The model, and the size of the server."""

    model: Model
    """Folder of a run (its best checkpoint) or of a checkpoint, .pt file, models:/name@alias, runs:/id/model or
    hub:NAME (published weights, whose names the list of presets ends with)."""
    host: str = "127.0.0.1"
    """Address that is listened on; 0.0.0.0 = every one of the machine. Nobody is asked for a password."""
    port: Annotated[int, Interval(ge=1, le=65535)] = 8000
    """Port that is listened on."""
    replicas: PositiveInt = 1
    """Processes that hold the model; each has a GPU where the cluster has enough."""
    batch: PositiveInt = 8
    """Most photographs that pass the network at once."""
    wait_ms: NonNegativeFloat = 10.0
    """Milliseconds that the first photograph of a batch waits for others."""
    waiting: PositiveInt = 100
    """Requests that may wait for a place in a batch; more are refused with 503."""
    threads: ThreadCount = 0
    """Torch threads of a replica; 0 = the machine's cores divided by the replicas."""
    gpu: Literal["auto", "yes", "no"] = "auto"
    """Serve from GPUs: `auto` where the cluster has one for each replica."""
    tracking: Store = field(default_factory=Store)
    """MLflow."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until a signal comes.

    Raises:
        ValueError: there is no such model, or the server cannot start.
    """
    given = sys.argv[1:] if arguments is None else arguments
    options: Options = parse_options(Options, given, str(__doc__), TRACKING)

    # what follows takes seconds to import: help and mistakes on the command line need none of it
    from pipelines.cluster import session
    from pipelines.serving.server import Server, serving
    from pipelines.tracking.runs import resolve_uri

    threads = options.threads or max(1, (os.cpu_count() or 1) // options.replicas)
    size = (options.replicas, options.batch, options.wait_ms / 1000, options.waiting, threads, options.gpu)
    tracking_uri = resolve_uri(Tracking(uri=options.tracking.uri), "runs")
    server = Server(options.host, options.port, *size)
    with serving(options.model, tracking_uri, server) as at, session.sigterm_raises():
        print(f"{options.model}: POST photographs to {at}/segment; {at}/health says how it is; Ctrl-C ends", flush=True)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    command(main)

"""Pictures of a run's curves, as artifacts: what remains to be seen where nobody opens MLflow's charts."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pipelines.tracking.client import answering
from pipelines.tracking.runs import Run

if TYPE_CHECKING:
    from mlflow import MlflowClient

Curve = Sequence[tuple[int, float]]
"""Steps and values."""

PLOTS = {
    "plots/learning_rate.png": ("learning rate", ("train/lr",)),
    "plots/losses.png": ("training losses", ("train/loss/",)),
    "plots/validation.png": ("validation", ("val/pq", "val/sq", "val/rq", "val/miou")),
}
"""Artifact -> title and the metrics that it shows; a name that ends in / stands for all below it."""

MOST = 12
"""Curves in a picture: the ones with the largest last values."""


def log_curves(run: Run) -> list[str]:
    """Draw the curves of a run and keep them as its artifacts; the names of those that there is something to show in.

    Raises:
        ConnectionError: the store does not answer.
    """
    import tempfile
    from pathlib import Path

    drawn = []
    with answering(run.tracking_uri) as client, tempfile.TemporaryDirectory() as folder:
        names = sorted(client.get_run(run.run_id).data.metrics)
        for artifact, (title, wanted) in PLOTS.items():
            chosen = [name for name in names if any(name == w or (w[-1] == "/" and name.startswith(w)) for w in wanted)]
            if chosen:
                file = Path(folder) / artifact
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(draw(title, {name: _curve(client, run, name) for name in chosen}))
                client.log_artifact(run.run_id, str(file), str(Path(artifact).parent))
                drawn.append(artifact)
    return drawn


def curves(run: Run, names: Sequence[str]) -> list[Curve]:
    """The values of metrics of a run by their steps, in the order of the names; empty where it has none.

    Raises:
        ConnectionError: the store does not answer.
    """
    with answering(run.tracking_uri) as client:
        return [_curve(client, run, name) for name in names]


def _curve(client: MlflowClient, run: Run, name: str) -> Curve:
    history = client.get_metric_history(run.run_id, name)
    return sorted({metric.step: metric.value for metric in history}.items())


def draw(title: str, curves: Mapping[str, Curve]) -> bytes:
    """A PNG of curves over the steps; values that span more than a hundredfold on a logarithmic axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = sorted(curves, key=lambda name: curves[name][-1][1], reverse=True)[:MOST]
    figure = Figure(figsize=(8, 4.5), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for name in shown:
        steps, values = zip(*curves[name], strict=True)
        axes.plot(steps, values, label=name.rsplit("/", 1)[-1], marker="." if len(steps) < 30 else None, linewidth=1.2)
    positive = [value for name in shown for _, value in curves[name] if value > 0]
    everything = [value for name in shown for _, value in curves[name]]
    if len(positive) == len(everything) and max(positive) > 100 * min(positive):
        axes.set_yscale("log")
    axes.set(title=title, xlabel="step")
    axes.grid(alpha=0.3)
    if len(shown) > 1:
        axes.legend(fontsize="small")
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()

"""The presets as a table, by architecture: what they train on, on what hardware, and which PQ their docstrings give."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping

from panoptic import published
from panoptic.metrics.text import markdown_table
from pipelines.config import Experiment

FIGURE = re.compile(r"PQ (?:\w+ )?(\d+\.\d)")
"""The first PQ of a sentence."""


def listing(presets: Mapping[str, Callable[[], Experiment]]) -> str:
    """A table for each architecture: the preset, its hardware and batch, its steps, its PQ, and its first sentence.

    "cpu" is a preset that is made for two processor cores. A PQ is the one that was measured at the preset's last step
    (of its val images, "57.1 at 1200"), or the first of the docstring's first sentence, which says where it comes from;
    "-" where the docstring has neither. A last table has the published weights.
    """
    tables: dict[str, list[list[str]]] = {}
    for name, function in presets.items():
        experiment, description = function(), " ".join(str(inspect.getdoc(function)).split())
        sentence = " ".join(str(inspect.getdoc(function)).split("\n\n")[0].split())
        train = experiment.train
        hardware = f"{train.workers} GPU{'s' * (train.workers > 1)}" if train.gpu == "yes" else "cpu"
        measured = re.search(rf"(\d+\.\d) at (?:step )?{train.steps}\b", description)
        figure = measured or FIGURE.search(sentence)
        row = [name, hardware, f"{train.steps:,} x {train.batch}", figure[1] if figure else "-", sentence]
        tables.setdefault(type(experiment.model).__name__.removesuffix("Config"), []).append(row)
    head = ["preset", "hardware", "steps x batch", "PQ", "what it is"]
    parts = [f"{architecture}\n\n{markdown_table([head, *rows])}" for architecture, rows in tables.items()]
    return "\n\n".join(
        [
            *parts,
            "Published weights: --train.weights NAME, jobs/predict.py NAME, panoptic.load(NAME); PQ from their page\n\n"
            + markdown_table(published.listing()),
            "jobs/train.py PRESET --help shows the whole description and the usual options, --help-all every option.",
        ]
    )

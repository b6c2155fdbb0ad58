"""Two branches of JSIS-Net that were trained apart, merged as one model; and the table that compares it with a
model that learnt both at once (de Geus et al., arXiv 1809.02110, table 3).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from panoptic.evaluation.tally import Measures, evaluate_batches, summarise
from panoptic.metrics.report import Evaluation, metrics
from panoptic.models.jsis_net.model import JSISNet, JSISNetConfig
from panoptic.training import checkpoint as checkpoints
from panoptic.training.checkpoint import check_categories
from panoptic.training.device import prepare
from pipelines.cluster import storage
from pipelines.config import Experiment
from pipelines.data.manifest import Manifest
from pipelines.evaluation.evaluate import Stored, options_of
from pipelines.training.checkpoints import CHECKPOINT
from pipelines.training.validation import share_batches

FREE = ("branches", "trunks", "regularisation")
"""Options in which the two models may differ: what is trained, and how."""

VIEW = "resize."
"""How the options begin that say what of an image the models see."""

COLUMNS = {"mIoU": "val/miou", "AP50": "val/ap50", "PQ": "val/pq"}
"""Of the table, by the name of the metric."""


def merge(semantic: Stored, instances: Stored) -> Stored:
    """One model with the semantic branch of one and the instance branch of another, each on its own backbone.

    Raises:
        ValueError: a model is no JSIS-Net, lacks its branch, or they differ in classes, options or view.
    """
    first, second = _config(semantic, "semantic"), _config(instances, "instances")
    different = [
        f"model.{field.name}"
        for field in fields(JSISNetConfig)
        if field.name not in FREE and getattr(first, field.name) != getattr(second, field.name)
    ]
    views = {path for path in {**semantic.options, **instances.options} if path.startswith(VIEW)}
    different += sorted(path for path in views if semantic.options.get(path) != instances.options.get(path))
    if different:
        raise ValueError(f"the two models differ in {', '.join(different)}; train both with the same options")
    categories = instances.model.categories
    check_categories(semantic.model.categories, categories, "the semantic model")
    model = replace(second, branches="both", trunks="separate").build(categories)
    own = model.state_dict()
    weights = dict(instances.model.state_dict())
    for name, value in semantic.model.state_dict().items():
        name = name if name.startswith("semantic.") else f"semantic_{name}"
        if name in own:  # a backbone that went on to a head of regions has a stage more
            weights[name] = value
    checkpoints.load_weights(model, {name: value for name, value in weights.items() if name in own}, "the two models")
    return Stored(model.eval(), instances.options)


def save(stored: Stored, uri: str) -> str:
    """Write the merged model as a checkpoint that every other job reads; the folder or file, local or s3://."""
    file = uri if uri.endswith(".pt") else storage.join(uri, CHECKPOINT)
    data = io.BytesIO()
    checkpoints.save(data, config=stored.model.config, model=stored.model, experiment=stored.options)
    storage.write_bytes(file, data.getvalue())
    return file


def compare(models: Mapping[str, Stored], manifest: Manifest, base: Experiment) -> dict[str, Evaluation]:
    """Every image of the split for each model, with AP, in this process (on a GPU when there is one).

    Raises:
        ValueError: the classes of a model and of the data differ.
    """
    found = {}
    for name, stored in models.items():
        check_categories(stored.model.categories, manifest.categories, name)
        experiment = options_of(stored, base)
        model = prepare(stored.model, "cuda" if torch.cuda.is_available() else "cpu", experiment.engine).eval()
        batches = share_batches(manifest, experiment, model.divisor)
        tally = evaluate_batches(model, batches, experiment.engine, Measures(instances=True))
        found[name] = summarise([tally], manifest.categories)
    return found


def table(joint: Evaluation, merged: Evaluation) -> str:
    """The rows of the paper's table 3: a branch alone has the figure of its task, and the PQ of both merged."""
    every = tuple(COLUMNS)
    rows = [
        ("joint", metrics(joint), every),
        ("semantic alone", metrics(merged), ("mIoU", "PQ")),
        ("instances alone", metrics(merged), ("AP50", "PQ")),
    ]
    lines = [_line("", every)]
    for name, values, shown in rows:
        lines.append(_line(name, [f"{values[COLUMNS[c]]:.2f}" if c in shown else "-" for c in every]))
    return "\n".join(lines)


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:<16}" + "".join(f"{cell:>8}" for cell in cells)


def _config(stored: Stored, branch: str) -> JSISNetConfig:
    """The options of a model that has this branch, on a backbone that it may share."""
    if not isinstance(stored.model, JSISNet):
        raise ValueError(f"the {branch} model is a {type(stored.model).__name__}; JSISNet is wanted")
    config: Any = stored.model.config
    if config.branches not in (branch, "both") or (config.branches == "both" and config.trunks == "separate"):
        raise ValueError(
            f"the {branch} model has branches {config.branches} (backbones {config.trunks}); train {branch}"
        )
    return config

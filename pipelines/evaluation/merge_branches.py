"""Joint against independent training of JSIS-Net (de Geus et al., arXiv 1809.02110, table 3).

Two branches that were trained apart are merged as one model, which is compared with one that learnt both at once.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from panoptic.evaluation.tally import Measures
from panoptic.metrics.report import Evaluation, metrics, number
from panoptic.metrics.text import text_table
from panoptic.models.jsis_net.config import JSISNetConfig
from panoptic.models.jsis_net.model import JSISNet
from panoptic.training import checkpoint
from panoptic.training.checkpoint import check_categories
from pipelines.cluster import storage
from pipelines.cluster.actor_pool import Pool
from pipelines.config import Experiment
from pipelines.data.manifest import Manifest
from pipelines.evaluation.evaluate import HERE, Stored, assign_stored, evaluate_all, options_of
from pipelines.training.checkpoints import CHECKPOINT

FREE = ("branches", "trunks", "regularisation")
"""Options of the model in which the two may differ: the branch that is trained, and its regularisation."""

VIEW = "resize."
"""Prefix of the options that decide what a model sees of an image."""

COLUMNS = {"mIoU": "val/miou", "AP50": "val/ap50", "PQ": "val/pq"}
"""Columns of the table, and the metrics that they show."""

ROWS = {"joint": (), "semantic alone": ("AP50",), "instances alone": ("mIoU",)}
"""Rows of the table, and the columns of the other branch's task, in which they have no figure."""


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
    checkpoint.load_weights(model, {name: value for name, value in weights.items() if name in own}, "the two models")
    return Stored(model.eval(), instances.options)


def save(stored: Stored, uri: str) -> str:
    """Write the merged model as a checkpoint that every other job reads; returns the URI of the file.

    Args:
        uri: a folder or a .pt file, local or s3://.
    """
    file = uri if uri.endswith(".pt") else storage.join(uri, CHECKPOINT)
    data = io.BytesIO()
    checkpoint.save(data, config=stored.model.config, model=stored.model, experiment=stored.options)
    storage.write_bytes(file, data.getvalue())
    return file


def compare(
    models: Mapping[str, Stored], manifest: Manifest, base: Experiment, pool: Pool = HERE
) -> dict[str, Evaluation]:
    """Figures of each model on the split, with AP, each under the options that it was evaluated with while it trained.

    Args:
        models: by name.
        pool: actors that share the work; by default this process does it. The figures are the same.

    Raises:
        ValueError: the classes of a model and of the data differ, or images kill every actor.
    """
    measures = Measures(instances=True, losses=False)
    tasks = [assign_stored(one, manifest, options_of(one, base), measures, name) for name, one in models.items()]
    evaluated = evaluate_all(tasks, pool)
    return {name: one.evaluation for name, one in zip(models, evaluated, strict=True)}


def table(joint: Evaluation, merged: Evaluation) -> str:
    """The rows of the paper's table 3: a branch alone has the figure of its task, and the PQ of both merged."""
    together, apart = metrics(joint), metrics(merged)
    rows = [["", *COLUMNS]]
    for row, without in ROWS.items():
        values = together if row == "joint" else apart
        rows.append([row, *("-" if column in without else number(values[name]) for column, name in COLUMNS.items())])
    return text_table(rows)


def _config(stored: Stored, branch: str) -> JSISNetConfig:
    """The options of a model that has this branch on its own backbone, or on one that both branches share.

    Raises:
        ValueError: the model is no JSIS-Net, or lacks the branch.
    """
    if not isinstance(stored.model, JSISNet):
        raise ValueError(f"the {branch} model is a {type(stored.model).__name__}; JSISNet is wanted")
    config: Any = stored.model.config
    if config.branches not in (branch, "both") or (config.branches == "both" and config.trunks == "separate"):
        raise ValueError(
            f"the {branch} model has branches {config.branches} (backbones {config.trunks}); train {branch}"
        )
    return config

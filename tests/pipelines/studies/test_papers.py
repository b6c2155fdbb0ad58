"""The papers' tables: their figures are the documents', and rows differ in what the table names and in nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import Experiment, flatten, parse
from pipelines.evaluation.oracle import choices_of
from pipelines.presets import PRESETS
from pipelines.studies import STUDIES, listing, run
from pipelines.studies.papers import (
    TABLES,
    coco_challenges,
    detr_cityscapes_slides,
    jsis_net,
    panoptic_deeplab_pytorch,
    panoptic_fcn,
)
from pipelines.studies.plan import Options, PlannedTrial, experiment_of, plan
from pipelines.training.preflight import STAND_IN, meta_model

DOCUMENTS = {
    coco_challenges: "papers/000_504dd77d2a08f588.txt",
    jsis_net: "papers/001_4e55b8415a23d357.txt",
    panoptic_deeplab_pytorch: "papers/002_3d6c4d2aeb032938.txt",
    panoptic_fcn: "papers/003_06e12ff7729eb23c.txt",
    detr_cityscapes_slides: "papers/004_78c8cc2dedcab5f8.txt",
}
OF_DOCUMENTS = {name for module in DOCUMENTS for name in module.STUDIES}

SIZE = ("augment.sides", "augment.longest", "resize.short", "resize.longest")
METHODS = ("model.*", "augment.*", "resize.*", "optim.*", "engine.*", "train.*")
SPLITS = ("data.train", "data.val")
LENGTH = ("train.steps", "train.validate_every", "optim.milestones", "optim.warmup_steps")
DILATED = ("model.backbone.output_stride", "model.rates")
"""The report's model has the dilations that belong to its output stride."""

NAMED: dict[str, tuple[str, ...]] = {
    "deeplab-default": (),
    "freezing-r50": ("model.backbone.freeze",),
    "freezing-r101": ("model.backbone.freeze",),
    "aspp": ("model.shared_aspp",),
    "dilation": ("model.rates",),
    "batch": ("train.batch",),
    "weight-decay": ("optim.weight_decay",),
    "fpn-double3x3": ("model.backbone.name",),
    "fpn-vgg": LENGTH,
    "fpn-res2net": ("train.batch", *LENGTH),
    "jsis-results": (*METHODS, *SPLITS),
    "joint": ("model.branches",),
    "rpn-recall": (*METHODS, *SPLITS),
    "deeplab-cityscapes": (),
    "deeplab-oracle": (),
    "deeplab-gap": (*DILATED, "model.backbone.stem", "train.batch"),
    "deeplab-foreground": ("model.foreground",),
    "fcn-kernels": ("model.position_deform", "model.head_convs"),
    "fcn-coordinates": ("model.kernel_coordinates", "model.encoder_coordinates"),
    "fcn-fusion": (),
    "fcn-channels": ("model.encoder_channels",),
    "fcn-feature": ("model.feature",),
    "fcn-points": ("model.points",),
    "fcn-schedule": LENGTH,
    "fcn-star": ("model.encoder_deform", "model.encoder_channels"),
    "fcn-oracle": (),
    "fcn-merge": (),
    "fcn-centres": ("model.stuff_positions",),
    "fcn-methods": METHODS,
    "fcn-test-dev": METHODS,
    "fcn-cityscapes": METHODS,
    "fcn-mapillary": METHODS,
    "detr-lr": ("optim.lr",),
    "detr-rates": ("optim.lr", "optim.backbone_lr"),
    "detr-clip": ("optim.clip_norm",),
    "detr-head": ("model.class_hidden", "model.class_dropout"),
    "detr-size": SIZE,
    "detr-longest": ("augment.longest", "resize.longest"),
    "detr-length": ("data.limit",),
    "detr-batch": ("train.batch",),
    "detr-augmentation": ("augment.colour", "augment.doubled"),
    "detr-rotation": ("augment.rotation",),
    "detr-balance": ("data.balance",),
    "detr-datasets": (),
    "detr-freezing": ("train.freeze",),
}
"""Options that the table of each study is about."""

ONE_ON_ONE_SET = ("jsis-results", "rpn-recall")
"""Studies whose rows are data sets: the small preset has one."""


@cache
def rows_of(name: str, small: bool) -> list[tuple[PlannedTrial, Experiment]]:
    """The rows of a study at 40 steps, of one seed; rows with the same options share one experiment."""
    experiments: dict[str, Experiment] = {}
    rows = []
    for entry in plan(Options(study=(name,), small=small, steps=40, seeds=1), [], PRESETS):
        key = f"{entry.preset} {entry.changes}"
        if key not in experiments:
            experiments[key] = experiment_of(entry, {entry.preset: PRESETS[entry.preset]()})
        rows.append((entry, experiments[key]))
    return rows


def options_of(name: str, small: bool) -> list[dict[str, Any]]:
    """The options of each row of a study, flat."""
    return [flatten(experiment) for _, experiment in rows_of(name, small)]


@pytest.fixture(scope="module")
def built() -> set[str]:
    """Models that were built already, by their options."""
    return set()


@pytest.mark.parametrize("small", [False, True], ids=["published", "small"])
@pytest.mark.parametrize("name", STUDIES)
def test_every_row_is_understood_and_makes_a_model(name: str, small: bool, built: set[str]):
    rows = rows_of(name, small)
    assert [entry.row for entry, _ in rows] == [n for n, row in enumerate(STUDIES[name].rows) if not row.quoted]
    workers = set()
    for entry, experiment in rows:
        workers.add(experiment.train.workers)
        assert 1 <= experiment.train.validate_every <= experiment.train.steps
        assert experiment.optim.warmup_steps < max(experiment.train.steps, 10)
        row = STUDIES[name].rows[entry.row]
        if repr(experiment.model) not in built:
            meta_model(experiment)
            built.add(repr(experiment.model))
        for path in row.evaluate_with:
            assert path.removeprefix("model.") in type(experiment.model).__dataclass_fields__
    assert len(workers) == 1


@pytest.mark.parametrize("name", [name for name, study in STUDIES.items() if any(row.true for row in study.rows)])
def test_what_is_true_in_a_row_is_an_output_that_the_truth_can_stand_for(name: str):
    """Of the small model, which has the outputs of the published one."""
    (_, experiment), *_ = rows_of(name, True)
    model = experiment.model.build(STAND_IN).eval()
    wanted = ["+".join(row.true) or "none" for row in STUDIES[name].trained if row.true is not None]
    assert choices_of(model, wanted) == [row.true for row in STUDIES[name].trained]


def differing(rows: list[dict[str, Any]]) -> set[str]:
    """The options in which some rows differ; those of one architecture that another has not, too."""
    paths = {path for row in rows for path in row}
    return {path for path in paths if len({repr(row.get(path)) for row in rows}) > 1}


@pytest.mark.parametrize("small", [False, True], ids=["published", "small"])
@pytest.mark.parametrize("name", sorted(OF_DOCUMENTS))
def test_rows_differ_only_in_what_the_table_names(name: str, small: bool):
    found = differing(options_of(name, small))
    stray = {path for path in found if not any(fnmatchcase(path, pattern) for pattern in NAMED[name])}
    assert not stray
    if not set(METHODS) <= set(NAMED[name]):  # and in all of it
        needed = {path for path in NAMED[name] if path not in LENGTH}
        assert found >= needed


@pytest.mark.parametrize("name", sorted(OF_DOCUMENTS - set(ONE_ON_ONE_SET)))
def test_small_rows_are_as_many_trainings_as_the_published_ones(name: str):
    whole, small = ({repr(sorted(row.items())) for row in options_of(name, small)} for small in (False, True))
    assert len(whole) == len(small)
    if not set(METHODS) <= set(NAMED[name]):
        published, little = (differing(options_of(name, small)) - set(LENGTH) for small in (False, True))
        assert published == little


def parameters(name: str, small: bool) -> list[int]:
    """Parameters of the backbone of each row."""
    models = [meta_model(experiment) for _, experiment in rows_of(name, small)]
    return [sum(p.numel() for p in model.get_submodule("backbone").parameters()) for model in models]


def test_small_backbones_are_small_and_of_the_tables_kind():
    """Twice as many 3x3 weights and nothing else in table 7: the same share of more parameters in both sizes."""
    published, small = (parameters("fpn-double3x3", size) for size in (False, True))
    assert published[0] / published[1] == pytest.approx(1.48, abs=0.02)
    assert small[0] / small[1] == pytest.approx(1.48, abs=0.12) and max(small) < 13e6
    for name in ("fpn-vgg", "fpn-res2net"):
        assert max(parameters(name, True)) < 10e6 < min(parameters(name, False))
        backbones = {row["model.backbone.name"] for row in options_of(name, True)}
        assert backbones == {"vgg11" if name == "fpn-vgg" else "res2net14_26w_4s"}


def test_small_weight_decay_can_be_seen():
    """A weight that no gradient moves loses 5 % at the least by the end, and half of itself under the larger one."""
    none, low, high = options_of("weight-decay", True)
    steps = PRESETS["panoptic-deeplab-pedestrians"]().train.steps
    shrunk = [row["optim.lr"] * row["optim.weight_decay"] * steps for row in (none, low, high)]
    assert shrunk[0] == 0 and shrunk[1] > 0.05 and shrunk[2] > 0.5
    assert none["optim.optimiser"] == "adamw"  # of which the decay is the rate times this


# Figures


@pytest.mark.parametrize("module", DOCUMENTS, ids=lambda module: module.__name__.rsplit(".", 1)[1])
def test_figures_are_printed_so_in_the_documents(module: Any, shared: Callable[[str], Path]):
    """A row's figures stand one after the other in a line of the document; where that prints a row as a column, each of
    them stands somewhere."""
    text = shared(DOCUMENTS[module]).read_text()
    plain = re.sub(r"<su[pb]>.*?</su[pb]>|[*†‡⁺%]", "", text)
    plain = re.sub(r"(\d),(\d{3})\b", r"\1.\2", plain)  # the slides print 3,111 beside 3.14
    lines = [re.findall(r"[+]?\d+(?:\.\d+)?", line) for line in plain.splitlines()]
    tokens = {token for line in lines for token in line}
    columns = {"deeplab-default", "fpn-double3x3", "fpn-res2net"}
    for name, study in module.STUDIES.items():
        for row in study.rows:
            figures = [figure for figure in row.figures(len(study.columns)) if figure != "-"]
            assert set(figures) <= tokens, (name, row.label, set(figures) - tokens)
            beside = study.columns[-1] in ("loss", "PQ") and len(figures) > 1  # of another table of the document
            wanted = figures[:-1] if beside else figures
            assert name in columns or any(in_order(wanted, line) for line in lines), (name, row.label)


def in_order(wanted: list[str], line: list[str]) -> bool:
    """True if all of these stand in the line, one after the other."""
    rest = iter(line)
    return all(figure in rest for figure in wanted)


def test_each_table_of_each_document_is_listed(shared: Callable[[str], Path]):
    """Each "Table 7." or "Table 7:" of a document; those of the slides about DETR have no numbers."""
    for (document, tables), file in zip(TABLES.items(), DOCUMENTS.values(), strict=True):
        text = shared(file).read_text()
        numbers = {int(n) for n in re.findall(r"^Table (\d+)[.:]", text, re.MULTILINE)}
        listed = {int(n) for key in tables for n in re.findall(r"^table (\d+)", key)}
        assert numbers <= listed <= numbers | {9}, document  # the slides leave the caption of table 9 out
        assert document.split("(")[0].strip().lower() in " ".join(re.sub(r"[#*]", " ", text).lower().split())


def test_the_list_has_every_study_once():
    named = [name for tables in TABLES.values() for names in tables.values() for name in names]
    assert len(named) == len(set(named)) and set(named) == OF_DOCUMENTS <= set(STUDIES) and set(NAMED) == OF_DOCUMENTS
    lines = listing.listing(PRESETS).splitlines()
    for name in STUDIES:
        assert sum(line.strip().startswith(f"{name} ") for line in lines) == 1
    assert not [line for line in lines if "not yet" in line]


def test_the_best_model_of_the_report_is_a_preset():
    """Its options are those of table 6's last row, but for machinery."""
    planned = plan(Options(study=("batch",)), [], PRESETS)[-1]
    row = flatten(experiment_of(planned, {planned.preset: PRESETS[planned.preset]()}))
    preset = flatten(PRESETS["panoptic-deeplab-r101-frozen-coco"]())
    differ = {path for path in row.keys() | preset.keys() if row.get(path) != preset.get(path)}
    assert differ <= {"train.workers", "train.validate_every"}


def test_the_weights_of_the_losses_are_the_papers(shared: Callable[[str], Path]):
    """Table 2 of the paper on JSIS-Net, which no study varies."""
    text = shared(DOCUMENTS[jsis_net]).read_text()
    (printed,) = re.findall(r"^λ_1\tλ_2.*\n\n?(.*)$", text, re.MULTILINE)
    config = asdict(PRESETS["jsis-net-r50-coco"]().model)
    names = ("objectness", "region", "class", "box", "mask", "semantic")
    ours = [config[f"{name}_weight"] for name in names] + [config["regularisation"]]
    assert ours == [float(figure) for figure in printed.split()]


# Beginnings


def test_a_study_says_when_it_begins_from_other_weights_than_its_paper():
    def line(name: str, small: bool, *typed: str, steps: int = 0, preset: str = "") -> str:
        planned = plan(Options(study=(name,), small=small, steps=40), [*filter(None, [preset]), *typed], PRESETS)
        bases = {preset: parse([preset, *typed], PRESETS)[1] for preset in {entry.preset for entry in planned}}
        return run.beginning(name, planned, bases, steps)

    assert line("joint", False) == (
        "joint: the paper's models begin with a backbone trained on ImageNet (--model.backbone.weights imagenet, or "
        "FILE), these with random weights; no package has ImageNet weights of resnet50"
    )
    assert line("joint", False, "--model.backbone.weights", "imagenet") == (
        "joint: begins with ImageNet weights, as the paper's models: resnet50"
    )
    assert line("fpn-double3x3", False) == ""  # from scratch in the paper as well
    assert line("aspp", True, steps=600) == (
        "aspp: begins with ImageNet weights, as the paper's models: tf_efficientnet_lite2"
    )
    assert line("aspp", True, preset="panoptic-deeplab-pedestrians", steps=600).endswith(
        "these with a training on drawn scenes; no package has ImageNet weights of resnet34"
    )
    assert line("detr-freezing", True, steps=600).endswith(
        "these with a training on drawn scenes, the backbone with ImageNet weights "
        f"({PRESETS['detr-pedestrians-imagenet']().model.backbone.name})"
    )
    assert line("detr-lr", False, "--train.weights", "detr.pt") == ""
    assert "on COCO (--train.weights CHECKPOINT), these with random" in line(
        "detr-lr", False, "--model.backbone.weights", "imagenet"
    )


def test_small_values_are_named():
    def substitutions(name: str, *preset: str) -> str:
        planned = plan(Options(study=(name,), small=True, steps=40), preset, PRESETS)
        return run.substitutions(name, planned, {entry.preset: PRESETS[entry.preset]() for entry in planned})

    for preset, backbone in (((), "tf_efficientnet_lite2"), (("panoptic-deeplab-pedestrians",), "resnet34")):
        assert substitutions("weight-decay", *preset) == (
            f"With --small: model.backbone.name resnet101 is {backbone}; optim.weight_decay 1e-05 is 0.05; "
            "optim.weight_decay 0.0001 is 0.5."
        )
    assert "model.backbone.name resnet50 is resnet14;" not in substitutions("fcn-fusion")
    assert substitutions("fpn-double3x3") == (
        "With --small: model.backbone.name resnet50_double3x3 is resnet14_double3x3; "
        "model.backbone.name resnet50 is resnet14."
    )

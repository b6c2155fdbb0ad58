"""The papers' studies: every row is understood and makes a model; budgets, shares of the data, weights."""

from __future__ import annotations

import ast
import inspect
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from panoptic.backbones import Backbone
from panoptic.backbones.imagenet import PACKAGES
from pipelines.config import Train, override, typed_paths
from pipelines.presets import PRESETS
from pipelines.presets.panoptic_deeplab import demo
from pipelines.studies import STUDIES, listing, run
from pipelines.studies import plan as planning
from pipelines.studies.papers import (
    coco_challenges,
    detr_cityscapes_slides,
    freezing,
    jsis_net,
    panoptic_deeplab_pytorch,
    panoptic_fcn,
    trunks,
)
from pipelines.studies.plan import Options, changes_of, key_of, limited, plan, shortened, with_weights
from pipelines.studies.study import METRICS, Row
from pipelines.training.preflight import lacking
from pipelines.tuning.trial_config import apply

SCRATCH = "panoptic-deeplab-pedestrians"
"""A small preset without ImageNet weights, for which parts that are frozen are trained on drawn scenes first."""

PAPERS_TABLES = {
    "deeplab-default": 1,
    "freezing-r50": 4,
    "freezing-r101": 3,
    "aspp": 2,
    "dilation": 3,
    "batch": 2,
    "joint": 3,
    "jsis-results": 3,
    "deeplab-cityscapes": 2,
    "deeplab-oracle": 17,
    "fcn-kernels": 5,
    "fcn-coordinates": 4,
    "fcn-fusion": 5,
    "fcn-channels": 4,
    "fcn-feature": 3,
    "fcn-points": 6,
    "fcn-schedule": 3,
    "fcn-star": 2,
    "trunks": 4,
    "freezing-photographs": 6,
    "fcn-oracle": 4,
    "fcn-methods": 18,
    "fcn-test-dev": 15,
    "fcn-cityscapes": 12,
    "fcn-mapillary": 7,
}
"""Rows of the tables that the papers print whole."""


@pytest.mark.parametrize("name", STUDIES)
def test_tables_are_whole(name: str):
    table = STUDIES[name]
    assert len(table.rows) == PAPERS_TABLES.get(name, len(table.rows)) <= 30
    assert table.trained
    assert set(table.columns) <= set(METRICS) and len({row.label for row in table.rows}) == len(table.rows)
    milliseconds = [column.endswith(" ms") for column in table.columns]
    for row in table.rows:
        figures = row.figures(len(table.columns))
        assert len(figures) == len(table.columns)
        for figure, time in zip(figures, milliseconds, strict=True):
            assert figure == "-" or 0 < float(figure) <= (1000 if time else 100)


def test_what_has_not_landed_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(listing, "STUDIES", {name: STUDIES[name] for name in ("aspp", "fcn-points")})
    some = {name: preset for name, preset in PRESETS.items() if name != "panoptic-fcn-pedestrians"}
    assert "unknown preset 'panoptic-fcn-pedestrians'" in listing.unavailable("fcn-points", some)
    lines = [line.strip() for line in listing.listing(some).splitlines()]
    (place,) = [n for n, line in enumerate(lines) if line.startswith("fcn-points ")]
    assert "not yet: unknown preset" in lines[place + 1]
    (aspp,) = [n for n, line in enumerate(lines) if line.startswith("aspp ")]
    assert "Table 4" in lines[aspp] and "not yet" not in lines[aspp + 1]


@pytest.mark.parametrize(
    ("options", "rest", "message"),
    [
        (Options(study=("nothing",)), [], "unknown; .*there are: list, deeplab-default"),
        (Options(study=("aspp",), sweep=("a=1",)), [], "leave --sweep"),
        (Options(study=("aspp",), searcher="optuna"), [], "--searcher and --scheduler out"),
        (Options(study=("aspp",), scheduler="asha"), [], "--searcher and --scheduler out"),
        (Options(study=("aspp",), seeds=-1), [], "--seeds is 1 or more"),
        (Options(study=("aspp",), steps=10, small=True), [SCRATCH, "--storage", "s3://b/x"], "--tracking.uri: missing"),
        (
            Options(study=("aspp",), steps=10, small=True),
            [SCRATCH, "--storage", "s3://b/x", "--tracking.uri", "http://mlflow"],
            "drawn into a local folder",
        ),
        (Options(study=("aspp",)), ["dmo"], "unknown preset 'dmo'; near: demo"),
        (Options(study=("aspp", "batch")), ["--train.batch", "9"], "--train.batch: the rows of batch differ in it"),
        (Options(study=("detr-length",)), ["--data.limit=9"], "--data.limit: the rows of detr-length differ in it"),
        (Options(study=("fcn-fusion",)), ["--model.fusion-threshold", "0.5"], "the rows of fcn-fusion differ in it"),
        (Options(study=("aspp",)), ["--train.steps", "9"], "the length of a study is --steps"),
        (Options(study=("aspp",), steps=10), ["demo"], r"aspp dual ASPP, seed 0: .*frozen noise"),
        (Options(study=("freezing-r50",), steps=10), [], r"frozen noise.*--pretrain-steps 600"),
    ],
)
def test_what_is_refused(options: Options, rest: list[str], message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run, "join_cluster", lambda *given: pytest.fail("Ray was started"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # MLflow sets it when a store is chosen
    with pytest.raises(ValueError, match=message):
        run.run(options, rest, PRESETS)


def test_small_studies_map_backbones_and_leave_the_recipe_out():
    (first, *_) = plan(Options(study=("dilation",), small=True), [SCRATCH], PRESETS)
    assert first.changes["model.backbone.name"] == "resnet34" and first.changes["model.rates"] == (1, 2, 3)
    assert "optim.lr" not in first.changes and first.changes["model.backbone.freeze"] == 4
    (published, *_) = plan(Options(study=("dilation",)), [], PRESETS)
    assert published.changes["optim.lr"] == 0.0025 and published.changes["model.backbone.name"] == "resnet101"
    (other, *_) = plan(Options(study=("dilation",)), ["demo", "--optim.lr", "0.5"], PRESETS)
    assert other.preset == "demo" and "optim.lr" not in other.changes


@pytest.mark.parametrize("name", ["freezing-r50", "freezing-r101", "aspp", "dilation", "batch", "weight-decay"])
def test_small_rows_of_the_report_begin_from_imagenet_weights(name: str):
    """Where the small preset has them, of backbones whose weights a package has, so that nothing is trained on scenes;
    ResNets on a preset that has none."""
    backbones = {}
    for preset in ([], [SCRATCH]):
        for entry in plan(Options(study=(name,), small=True, steps=40), preset, PRESETS):
            experiment, _ = apply(PRESETS[entry.preset](), entry.changes)
            backbones.setdefault(bool(preset), set()).add(experiment.model.backbone.name)
            assert (lacking(experiment) == "") == (experiment.model.backbone.freeze == 0 or not preset)
    deep = name != "freezing-r50"
    assert backbones == {False: {f"tf_efficientnet_lite{2 * deep}"}, True: {"resnet34" if deep else "resnet18"}}
    assert backbones[False] <= set(PACKAGES)


def test_the_study_of_freezing_has_every_number_of_stages_under_three_seeds():
    """Its rows differ in nothing else, on other presets too; --seeds gives another number."""
    for preset in ("panoptic-deeplab-pedestrians-imagenet", "mask2former-pedestrians-imagenet"):
        planned = plan(Options(study=("freezing-photographs",), steps=40), [preset], PRESETS)
        rows = [apply(PRESETS[entry.preset](), entry.changes)[0] for entry in planned]
        assert [(row.model.backbone.freeze, row.train.seed) for row in rows] == [
            (stages, seed) for stages in range(6) for seed in range(3)
        ]
        thawed = [replace(row.model, backbone=replace(row.model.backbone, freeze=0)) for row in rows]
        assert len({repr(replace(row, model=m, train=Train())) for row, m in zip(rows, thawed, strict=True)}) == 1
        assert {row.model.backbone.weights for row in rows} == {"imagenet"} and not any(map(lacking, rows))
    assert len(plan(Options(study=("freezing-photographs",), seeds=2), [], PRESETS)) == 12
    decays = plan(Options(study=("stage-decay-photographs",), seeds=1), [], PRESETS)
    own = PRESETS[decays[0].preset]().optim.stage_decay
    assert [entry.changes["optim.stage_decay"] for entry in decays] == [1.0, 0.85, 0.7, 0.5] and own == 0.7
    assert len(plan(Options(study=("aspp",)), [], PRESETS)) == 2


def test_the_backbones_of_trunks_differ_in_nothing_else():
    """The published recipe is one for all rows but for Swin's dropped paths and a ResNet's frozen norms."""
    for small in (False, True):
        planned = plan(Options(study=("trunks",), small=small, steps=40), [], PRESETS)
        rows = [apply(PRESETS[entry.preset](), entry.changes)[0] for entry in planned]
        backbones = [row.model.backbone for row in rows]
        plain = ("name", "norm", "drop_path")
        assert len({backbone.name for backbone in backbones}) == 4
        assert len({repr(replace(b, **{name: getattr(Backbone(), name) for name in plain})) for b in backbones}) == 1
        assert len({repr(replace(row, name="", model=replace(row.model, backbone=Backbone()))) for row in rows}) == 1
        assert [backbone.drop_path for backbone in backbones] == [0.0, 0.3, 0.0, 0.0]
        frozen = "batch" if small else "frozen"  # what starts from scratch has to learn its norms
        assert [backbone.norm for backbone in backbones] == [frozen, "batch", "batch", "batch"]


def test_rows_of_other_lengths_follow_the_budget():
    lengths = {
        (name, steps): [
            entry.changes.get("train.steps") for entry in plan(Options(study=(name,), steps=steps), [], PRESETS)
        ]
        for name, steps in (("fcn-schedule", 90), ("fpn-res2net", 1000), ("fpn-vgg", 50), ("aspp", 77))
    }
    assert lengths == {
        ("fcn-schedule", 90): [90, 180, 270],
        ("fpn-res2net", 1000): [700, 1000],
        ("fpn-vgg", 50): [10, 20, 50],
        ("aspp", 77): [77, 77],
    }
    base = replace(demo(), optim=replace(demo().optim, milestones=(600, 900), warmup_steps=50))
    assert shortened(base, 1200) == {}
    assert shortened(base, 120) == {
        "train.steps": 120,
        "train.validate_every": 60,
        "optim.milestones": (60, 90),
        "optim.warmup_steps": 12,
    }
    both = replace(base, optim=replace(base.optim, milestones=(), backbone_warmup_steps=100))
    assert shortened(both, 120)["optim.backbone_warmup_steps"] == shortened(both, 120)["optim.warmup_steps"] == 12
    rare = replace(base, train=replace(base.train, validate_every=5000))
    assert shortened(rare, 1200) == {"train.validate_every": 1200}
    row = Row("a", {"optim.lr": 0.5})
    changes = changes_of(STUDIES["detr-lr"], row, base, Options(steps=1), published=True)
    assert changes["train.steps"] == changes["train.validate_every"] == 1 and changes["optim.warmup_steps"] == 0


def test_milestones_belong_to_the_length_of_the_recipe():
    """Table 3 stops Mapillary's recipe two epochs early, and halves the rate after the same epochs; where a row's
    length differs from its table's, they follow."""
    joint = plan(Options(study=("joint",)), [], PRESETS)
    assert [entry.changes["train.steps"] for entry in joint] == [153_000] * 3
    experiment, _ = apply(PRESETS[joint[0].preset](), joint[0].changes)
    assert experiment.optim.milestones == (7 * 9000, 13 * 9000) and experiment.train.validate_every == 9000
    (half, *_) = plan(Options(study=("joint",), steps=76_500), [], PRESETS)
    assert half.changes["optim.milestones"] == (31_500, 58_500)
    stepped = replace(demo(), optim=replace(demo().optim, milestones=(60_000, 80_000)))
    study, row = STUDIES["fcn-schedule"], Row("twice", {"train.steps": 180_000})
    changes = changes_of(study, row, stepped, Options(), published=True)
    assert (changes["train.steps"], changes["optim.milestones"]) == (180_000, (120_000, 160_000))


def test_seeds_multiply_rows_and_equal_rows_train_once():
    planned = plan(Options(study=("freezing-r101", "aspp"), seeds=2, small=True, steps=40), [], PRESETS)
    bases = {entry.preset: PRESETS[entry.preset]() for entry in planned}
    assert len(planned) == 10 and {entry.changes["train.seed"] for entry in planned} == {0, 1}
    keys = [key_of(entry, bases) for entry in planned]
    assert len(set(keys)) == 8  # "up to stage 4" is one of the rows of "aspp", under both seeds
    fusion = plan(Options(study=("fcn-fusion",), small=True, steps=40), [], PRESETS)
    bases = {entry.preset: PRESETS[entry.preset]() for entry in fusion}
    assert len({key_of(entry, bases) for entry in fusion}) == 1  # rows that differ while they are evaluated


def small_data(monkeypatch: pytest.MonkeyPatch, rows: int = 485) -> None:
    """Instead of a data set, one of so many training images, which refuses to be limited to more."""

    class Shards:
        pass

    def prepare(experiment: Any) -> Any:
        if experiment.data.limit > rows:
            raise ValueError(f"data.limit {experiment.data.limit}: the training split has {rows} rows")
        Shards.rows = rows  # type: ignore[attr-defined]
        return Shards, Shards

    monkeypatch.setattr(planning, "prepare_data", prepare)


def test_lengths_of_the_data_set_are_shares_of_it(monkeypatch: pytest.MonkeyPatch):
    small_data(monkeypatch)
    planned = plan(Options(study=("detr-length",), small=True, steps=40), [], PRESETS)
    found, _ = limited(planned, {entry.preset: PRESETS[entry.preset]() for entry in planned})
    assert [entry.changes["data.limit"] for entry in found] == [163, 196, 485]


@pytest.mark.parametrize("name", [name for name in STUDIES if name.startswith("detr-")])
def test_published_lengths_are_shares_of_smaller_data_too(name: str, monkeypatch: pytest.MonkeyPatch):
    """The preset's own 1200 images of 2975 are 196 of 485, and nothing asks for more than there are."""
    small_data(monkeypatch)
    planned = plan(Options(study=(name,), steps=40), [], PRESETS)
    found, bases = limited(planned, {"detr-004-cityscapes": PRESETS["detr-004-cityscapes"]()})
    limits = [apply(bases[entry.preset], entry.changes)[0].data.limit for entry in found]
    assert limits == ([163, 196, 485] if name == "detr-length" else [196] * len(found))
    for base in bases.values():
        planning.prepare_data(base)
    small_data(monkeypatch, rows=2975)
    assert limited(planned, {"detr-004-cityscapes": PRESETS["detr-004-cityscapes"]()})[1] == {
        "detr-004-cityscapes": PRESETS["detr-004-cityscapes"]()
    }


def test_a_limit_that_is_typed_is_a_number_of_images(monkeypatch: pytest.MonkeyPatch):
    small_data(monkeypatch)
    arguments = ["--data.limit", "100"]
    planned = plan(Options(study=("detr-lr",), steps=40), arguments, PRESETS)
    base = override(PRESETS["detr-004-cityscapes"](), {"data.limit": 100})
    found, bases = limited(planned, {"detr-004-cityscapes": base}, typed_paths(arguments))
    assert found == planned and bases["detr-004-cityscapes"].data.limit == 100


def test_all_rows_of_a_freezing_study_start_from_the_same_weights(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[str, str, int]] = []

    def stand_in(experiment: Any, base: Any, kind: str, steps: int) -> dict[str, str]:
        assert base == bases[next(iter(bases))]
        asked.append((experiment.model.backbone.name, kind, steps))
        return {"model.backbone.weights": f"{experiment.model.backbone.name}.pt"}

    monkeypatch.setattr(planning, "pretrained", stand_in)
    planned = plan(Options(study=("freezing-r50", "weight-decay"), small=True, steps=40), [SCRATCH], PRESETS)
    bases = {entry.preset: PRESETS[entry.preset]() for entry in planned}
    found = with_weights(planned, bases, 50)
    weights = [entry.changes.get("model.backbone.weights") for entry in found]
    assert weights == ["resnet18.pt"] * 4 + ["resnet34.pt"] * 3 and {steps for *_, steps in asked} == {50}
    assert with_weights(planned, bases, 0) == planned
    asked.clear()
    rows = plan(Options(study=("detr-freezing",), small=True, steps=40), [], PRESETS)
    bases = {entry.preset: PRESETS[entry.preset]() for entry in rows}
    with_weights(rows, bases, 50)
    assert {kind for _, kind, _ in asked} == {"model"}


def test_rows_are_shared_where_their_studies_need_the_same_weights(monkeypatch: pytest.MonkeyPatch):
    """A row that starts from weights in one study and from scratch in another is no training of both."""
    monkeypatch.setattr(
        planning, "pretrained", lambda experiment, base, kind, steps: {"model.backbone.weights": "w.pt"}
    )
    batch, freezing = STUDIES["batch"], STUDIES["freezing-r50"]
    rows = (replace(freezing.rows[0], label="5"), Row("8", {**freezing.rows[0].change, "optim.lr": 0.1}))
    monkeypatch.setitem(STUDIES, "unfrozen", replace(batch, rows=rows, setting={}))
    monkeypatch.setitem(STUDIES, "frozen", replace(freezing, rows=freezing.rows[:2]))

    def keys(studies: tuple[str, ...], steps: int) -> list[str]:
        planned = plan(Options(study=studies, small=True, steps=40), [SCRATCH], PRESETS)
        bases = {entry.preset: PRESETS[entry.preset]() for entry in planned}
        return [key_of(entry, bases) for entry in with_weights(planned, bases, steps)]

    pretrained = keys(("frozen", "unfrozen"), 50)
    assert len(set(pretrained)) == 4 and "'w.pt'" in pretrained[0] and "'w.pt'" not in pretrained[2]
    given = keys(("frozen", "unfrozen"), 0)
    assert given[0] == given[2] and len(set(given)) == 3
    shared = keys(("freezing-r101", "aspp"), 50)
    assert shared[1] == shared[4] and len(set(shared)) == 4  # the small preset has one pooling


@pytest.mark.parametrize(
    "module",
    [coco_challenges, jsis_net, panoptic_deeplab_pytorch, panoptic_fcn, detr_cityscapes_slides, freezing, trunks],
    ids=lambda module: module.__name__,
)
def test_a_study_is_at_most_thirty_lines(module: ModuleType):
    calls = [
        node
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Study"
    ]
    assert len(calls) == len(module.STUDIES)
    assert max(int(node.end_lineno or 0) - node.lineno + 1 for node in calls) <= 30


def test_what_the_user_types_wins_where_it_fits():
    """Over the recipe, the setting and what a shorter run would change; a row's own options are refused elsewhere."""
    typed = ["--optim.lr", "0.5", "--train.validate-every", "40", "--model.backbone.freeze=2"]
    (first, *_) = plan(Options(study=("aspp",), steps=40), typed, PRESETS)
    experiment, _ = apply(override(PRESETS[first.preset](), {"optim.lr": 0.5}), first.changes)
    assert "optim.lr" not in first.changes and "model.backbone.freeze" not in first.changes
    assert first.changes["train.validate_every"] == 40 and experiment.optim.lr == 0.5
    (rare, *_) = plan(Options(study=("aspp",), steps=30), typed, PRESETS)
    assert rare.changes["train.validate_every"] == 30
    (usual, *_) = plan(Options(study=("aspp",), steps=40), [], PRESETS)
    assert usual.changes["train.validate_every"] == 20

    base = replace(demo(), optim=replace(demo().optim, milestones=(60, 90), warmup_steps=50))
    own = ("optim.milestones", "optim.warmup_steps")
    kept = shortened(base, 120, own, 120)
    assert not set(kept) & set(own)
    assert shortened(base, 240, own, 120)["optim.milestones"] == (120, 180)
    assert shortened(base, 40, own, 120)["optim.warmup_steps"] == 4  # longer than the run


def test_rows_of_one_study_have_one_number_of_workers():
    """Else batch norm would see other shares of the batch as well."""

    def workers(name: str, small: bool, *typed: str) -> list[int]:
        entries = plan(Options(study=(name,), small=small, steps=40), typed, PRESETS)
        return [apply(PRESETS[entry.preset](), entry.changes)[0].train.workers for entry in entries]

    assert workers("batch", True) == workers("batch", False) == [1, 1]  # of 5 and of 8 images
    assert workers("detr-batch", True) == [2, 2, 2] and workers("aspp", True) == [2, 2]
    assert "train.workers" not in plan(Options(study=("aspp",)), [], PRESETS)[0].changes


def test_the_recipe_of_the_report():
    """Ordinary ResNets of ImageNet, where the preset has detectron2's ResNet-52; Adam for both architectures."""
    for name in ("freezing-r50", "freezing-r101", "aspp", "dilation", "batch", "weight-decay"):
        for entry in plan(Options(study=(name,)), [], PRESETS):
            backbone = apply(PRESETS[entry.preset](), entry.changes)[0].model.backbone
            assert backbone.stem == "conv7" and backbone.output_stride == 16
    for name in ("fpn-double3x3", "fpn-vgg", "fpn-res2net"):
        for entry in plan(Options(study=(name,)), [], PRESETS):
            assert apply(PRESETS[entry.preset](), entry.changes)[0].optim.optimiser == "adam"


def test_a_study_validates_on_as_many_images_as_its_paper_where_there_are_so_many(monkeypatch: pytest.MonkeyPatch):
    def validated(rows: int, small: bool = False) -> set[int]:
        small_data(monkeypatch, rows)
        planned = plan(Options(study=("detr-lr",), steps=40, small=small), [], PRESETS)
        bases = {entry.preset: PRESETS[entry.preset]() for entry in planned}
        found, _ = limited(planned, bases)
        return {apply(bases[entry.preset], entry.changes)[0].data.limit_val for entry in found}

    assert (validated(485), validated(31), validated(485, small=True)) == ({50}, {31}, {0})

"""The options: every preset round-trips, a typo names its path, the command line changes what it says."""

from __future__ import annotations

import dataclasses

import pytest

from pipelines.config import Experiment, check_run_name, flatten, override, parse
from pipelines.presets import PRESETS


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_flat_config_is_the_config(name: str) -> None:
    preset = PRESETS[name]()
    assert override(preset, flatten(preset)) == preset
    changed = override(preset, {"optim.lr": 0.25, "model.backbone.freeze": 2, "resize.canvas": (33, 65)})
    assert (changed.optim.lr, changed.model.backbone.freeze, changed.resize.canvas) == (0.25, 2, (33, 65))
    assert override(preset, flatten(changed)) == changed != preset


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_says_what_to_expect(name: str) -> None:
    text = PRESETS[name].__doc__
    assert text and any(character.isdigit() for character in text) and "PQ" in text


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("optim.lrr", 1, "optim.lrr.*Optim has.*lr"),
        ("optim.lr", "fast", "optim.lr.*fast"),
        ("model", 3, "group of options"),
        ("model.flavour", "tensorflow", "model.flavour.*tensorflow"),
        ("augment.crop", (3,), "augment.crop"),
    ],
)
def test_a_wrong_change_names_its_path(path: str, value: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        override(PRESETS["demo"](), {path: value})


def test_of_many_changes_only_the_wrong_ones_are_named() -> None:
    """Each with what is wrong with it."""
    right = {"name": "a", "model.backbone.freeze": 2, "optim.lr": 0.5}
    with pytest.raises(ValueError, match=r"^resize\.canvas: .*; --train\.steps: "):
        override(PRESETS["demo"](), {**right, "resize.canvas": (1, 2, 3), "train.steps": "model.backbone.freeze"})


def test_presets_for_cpu_cores_are_channels_last() -> None:
    """As the option's help says: a frozen EfficientNet-Lite0 takes 29 ms so, and 50 ms the other way."""
    engines = {name: preset().engine for name, preset in PRESETS.items() if preset().train.gpu != "yes"}
    assert len(engines) >= 18 and all(engine.channels_last for engine in engines.values())


def test_the_published_recipes_that_were_trained_in_tf32_are() -> None:
    """EoMT's, whose code asks for products of "medium" precision; the others' machines were older than that format."""
    engines = {name: preset().engine for name, preset in PRESETS.items() if preset().train.gpu == "yes"}
    assert {name for name, engine in engines.items() if engine.tf32 == "all"} == {
        name for name in engines if name.startswith("eomt-")
    }


def test_no_preset_is_the_demo_and_options_follow() -> None:
    assert parse([], PRESETS) == ("demo", PRESETS["demo"]())
    name, experiment = parse(["--optim.lr", "0.5", "--train.steps", "7"], PRESETS)
    assert name == "demo" and (experiment.optim.lr, experiment.train.steps) == (0.5, 7)
    name, experiment = parse(["panoptic-deeplab-r52-coco", "--data.root", "coco"], PRESETS)
    assert name == "panoptic-deeplab-r52-coco" and experiment.data.root == "coco"
    with pytest.raises(ValueError, match=r"unknown preset 'nothing'; .*--list shows all"):
        parse(["nothing"], PRESETS)


def test_every_option_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["demo", "--help-all"], PRESETS)
    shown = capsys.readouterr().out
    for path in flatten(PRESETS["demo"]()):
        assert f"--{path.replace('_', '-')}" in shown

    def undocumented(kind: type) -> list[str]:
        import inspect

        source = "".join(inspect.getsource(base) for base in kind.__mro__ if dataclasses.is_dataclass(base))
        lines = [line.strip() for line in source.splitlines()]
        names = [entry.name for entry in dataclasses.fields(kind)]
        starts = {name: next(i for i, line in enumerate(lines) if line.startswith(f"{name}:")) for name in names}
        return [name for name, at in starts.items() if not lines[at + 1].startswith('"""')]

    preset = PRESETS["demo"]()
    groups = [Experiment, *(type(value) for value in vars(preset).values() if dataclasses.is_dataclass(value))]
    assert {kind.__name__: found for kind in groups if (found := undocumented(kind))} == {}


@pytest.mark.parametrize("name", ["a", "demo-20260101-120000", "r50_v1.2", "7", "Shards-2", "a" * 100])
def test_names_of_runs(name: str) -> None:
    assert check_run_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../x", "/tmp/x", "a/b", "a\\b", "-x", ".hidden", "~", "s3://b/k", "a b", "a\nb", "a\n", "\n"),
        *("a#b", "a?b", "a%2e", "grün", "a\x00", "a:b", "a" * 101),
        *("shards", "Shards", "pretrained", "evaluations", "studies", "mlruns", "mlflow.db-wal", "scenes-800-96-0"),
    ],
)
def test_what_is_no_name_of_a_run(name: str) -> None:
    with pytest.raises(ValueError, match=r"^--name ") as refused:
        check_run_name(name)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400

"""`jobs/evaluate.py` as a scheduler calls it: exit codes, one run a key, options that would be ignored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from panoptic.segmentation import Categories
from pipelines.tracking.client import connect


def register(store: str, folder: Path, categories: Categories, seed: int) -> None:
    """One more version of "street"."""
    from panoptic.training import checkpoint
    from panoptic.transforms import Resize
    from pipelines.tracking import model as mlflow_model
    from pipelines.tracking import runs as tracking
    from tests.support.stored import write_model

    file = f"{write_model(folder / f'model-{seed}', categories, seed)}/checkpoint.pt"
    run = tracking.start(tracking.Tracking(uri=store), folder)
    mlflow_model.log_model(run, checkpoint.load(file, file), Resize(), register="street")


@pytest.fixture
def exit_code(mlflow_store: str, tmp_path: Path, small_categories: Categories) -> Callable[..., int]:
    """`exit_code(model, *options)` of a call on 22 images; models 1 and 2 of "street" are registered."""
    from jobs import evaluate
    from jobs.common import command
    from tests.support.stored import write_shards

    (tmp_path / "shards").mkdir()
    write_shards(tmp_path / "shards", small_categories, 22)
    for seed in (0, 1):
        register(mlflow_store, tmp_path, small_categories, seed)
    places = ["--data.root", str(tmp_path / "shards"), "--out", str(tmp_path / "out"), "--tracking.uri", mlflow_store]

    def call(model: str, *options: str) -> int:
        try:
            command(evaluate.main, [model, *places, "--actors", "0", "--quick", *options])
        except SystemExit as end:
            assert isinstance(end.code, int)
            return end.code
        return 0

    return call


def test_once_twice_and_worse_once(
    exit_code: Callable[..., int], mlflow_store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    client = connect(mlflow_store)

    def runs() -> list:
        found = client.get_experiment_by_name("evaluation")
        assert found is not None
        return client.search_runs([found.experiment_id])

    assert exit_code("models:/street/1", "--once") == exit_code("models:/street/1", "--once") == 0
    assert len(runs()) == 1 and "as evaluated before" in capsys.readouterr().out
    assert exit_code("models:/street/latest", "--once") == exit_code("models:/street/2", "--once") == 0
    ids = {run.data.tags["model"]: run.info.run_id for run in runs()}
    worse, better = sorted(ids)
    client.log_metric(ids[better], "val/pq", 50.0, step=1)  # neither has learnt anything
    client.set_registered_model_alias("street", "champion", "2")
    compared = ("--once", "--reference", "models:/street@champion", "--margin", "0")
    assert [exit_code(worse, *compared) for _ in range(2)] == [1, 0]
    printed = capsys.readouterr()
    assert printed.err.startswith("error: PQ ") and printed.err.count("\n") == 1
    assert "worse when it was compared with models:/street@champion" in printed.out
    assert exit_code(better, *compared) == 0 and len(runs()) == 2


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--reference", "models:/street@champion"], "--reference needs --once"),
        (["--margin", "0"], "--margin needs --once"),
        (["--promote"], "--promote needs --once"),
        (["--once", "--promote"], "--promote needs --reference"),
        (["--once", "--margin", "2"], "--margin needs --reference"),
        (
            ["--once", "--reference", "models:/street@champion", "--margin", "nan"],
            "margin: nan, but it must be 0 or more and finite",
        ),
        (["--once", "--against", "other"], "--against cannot be given with --once"),
        (["--once", "--no-log"], "--no-log cannot be given with --once"),
        (["--once", "--examples", "0"], "--examples cannot be given with --once"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    options: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from jobs import evaluate
    from jobs.common import command

    with pytest.raises(SystemExit) as end:
        command(evaluate.main, ["model", "--data.root", "nowhere", *options])
    assert end.value.code == 2 and line in capsys.readouterr().err.splitlines()[-1]


def test_a_store_that_is_away_is_one_line(tmp_path: Path, small_categories, capsys: pytest.CaptureFixture[str]) -> None:
    from jobs import evaluate
    from jobs.common import command
    from tests.support.stored import write_shards

    write_shards(tmp_path, small_categories, 1)
    options = ["--data.root", str(tmp_path), "--once", "--tracking.uri", "http://127.0.0.1:9"]
    with pytest.raises(SystemExit) as end:
        command(evaluate.main, ["models:/street@challenger", *options])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert error.startswith("error: ") and "http://127.0.0.1:9 does not answer" in error

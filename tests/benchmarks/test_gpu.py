"""The GPU benchmark on the CPU, with a model of two convolutions: that every figure and the table come out."""

from __future__ import annotations

import typing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from panoptic.models import Architecture
from panoptic.training.optim import Optim
from pipelines.presets import PRESETS
from tests.benchmarks import gpu
from tests.benchmarks.gpu_cases import Case, batches, from_presets, read, write
from tests.support.host_reads import HostReads
from tests.support.small import SMALL_FPN
from tests.support.tiny import TinyConfig

TINY = Case("tiny", TinyConfig(), Optim(lr=1e-3), False, (32, 48), 2, stuff=2, things=2)


def test_every_figure_of_a_small_model() -> None:
    (figures,) = gpu.run([TINY], ["float32"], "cpu", 1, compiled=[], peers=["float32"])
    assert "error" not in figures, figures
    assert figures["step"] > 0 and figures["teraflop"] > 0
    text = gpu.table([gpu.row(figures, peak=1.0)])
    assert "tiny" in text and "2 of 32x48" in text


def test_a_fault_is_a_line_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "measure", lambda *_: 1 / 0)
    (figures,) = gpu.run([TINY], ["float32"], "cpu", 1, [], [])
    assert "ZeroDivisionError" in gpu.table([gpu.row(figures, peak=1.0)])


def test_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(case: Case, *_: object) -> dict:
        if case.batch > 2:
            raise torch.OutOfMemoryError
        return {"batch": case.batch}

    monkeypatch.setattr(gpu, "measure", full)
    assert gpu.fitting(replace(TINY, batch=8), "float32", "cpu", 1, False)["batch"] == 2


def test_cases_survive_their_file(tmp_path: Path) -> None:
    case = replace(TINY, config=SMALL_FPN)
    write([case], tmp_path / "cases.json")
    assert read(tmp_path / "cases.json") == [case]


def test_every_architecture_has_a_case_of_its_recipes_size() -> None:
    """Crops, where the recipe has them; photographs of varying sizes stand as one of the usual size."""
    cases = from_presets()
    assert {type(case.config) for case in cases} == set(typing.get_args(Architecture))
    crops = {case.name: PRESETS[case.name]().augment.crop for case in cases}
    assert [case.name for case in cases if all(crops[case.name]) and crops[case.name] != case.size] == []


def test_batches_are_maps_of_several_segments() -> None:
    (images, targets), (others, _) = batches(TINY, 4, 2)
    assert images.shape == (2, 3, 32, 48) and not torch.equal(images, others)
    assert targets.segments.max() > 2 and targets.segments.min() == 0


def test_host_reads_are_counted() -> None:
    x = torch.arange(6)
    with HostReads() as reads:
        x[x > 2] = x[x > 2] * 2
        x.nonzero()
        float(x.sum())
    assert reads.count == 4 and set(reads.places) == {"elsewhere"}

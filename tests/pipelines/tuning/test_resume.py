"""The sweep that a name goes on with, and the state of Ray Tune from which it does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.tuning.resume import read_record, restorable


def test_names_of_sweeps(tmp_path: Path):
    folder, record = str(tmp_path / "one"), {"sweep": ["a=1"], "arguments": ["demo"]}
    assert read_record(folder, "one", record, resume=False) == {}
    with pytest.raises(ValueError, match="there is no sweep 'one'"):
        read_record(folder, "one", record, resume=True)
    (tmp_path / "one").mkdir()
    with pytest.raises(ValueError, match="exists and is no sweep"):
        read_record(folder, "one", record, resume=False)
    (tmp_path / "one" / "sweep.json").write_text(json.dumps({"run_id": "7", **record}))
    assert read_record(folder, "one", record, resume=True)["run_id"] == "7"
    with pytest.raises(ValueError, match="go on with --resume"):
        read_record(folder, "one", record, resume=False)
    with pytest.raises(ValueError, match="other options: sweep was a=1, is a=2"):
        read_record(folder, "one", {**record, "sweep": ["a=2"]}, resume=True)
    (tmp_path / "one" / "sweep.json").write_text(json.dumps({"run_id": "7", **record, "metric": "val/pq"}))
    with pytest.raises(ValueError, match="metric was val/pq, is val/miou"):
        read_record(folder, "one", {**record, "metric": "val/miou"}, resume=True)


def test_what_tune_left_to_go_on_from(tmp_path: Path, caplog):
    assert not restorable(str(tmp_path))
    state = tmp_path / "tune"
    state.mkdir()
    (state / "tuner.pkl").write_bytes(b"x")
    assert not restorable(str(tmp_path))  # killed before anything was saved
    (state / "experiment_state-2026-01-01_00-00-00.json").write_text('{"trial_data": []}')
    assert restorable(str(tmp_path))
    broken = state / "experiment_state-2026-01-02_00-00-00.json"
    broken.write_text('{"trial_da')
    assert restorable(str(tmp_path)) and not broken.exists() and "cut off" in caplog.text

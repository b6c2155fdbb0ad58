"""The driver's memory for a data set as large as COCO's, and preparations that are killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.cluster import session
from tests.conftest import ROOT
from tests.support.coco_folder import write_folder
from tests.support.large_json import IMAGES, write_large_json

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

READ = """
import json, sys
from pipelines.cluster import session
from pipelines.data import prepare
from pipelines.data.readers import coco_panoptic

def count(rows, out, categories, **how):
    import pyarrow as pa
    return pa.table({"report": [json.dumps({"images": rows.num_rows, "segments": sum(
        len(json.loads(record)["segments_info"]) for record in rows["record"].to_pylist())})]})

prepare._write_or_tell = count
class Counts:
    path, problems, before = "", [], False
    def __init__(self, images, segments):
        self.images = images
        totals.append((images, segments))

prepare.Report = Counts
totals = []
session.connect(cpus=2, object_store=400_000_000)
source = coco_panoptic(sys.argv[1], "train2017")
prepare._write_all(source.rows, None, 256, source, {})
# Not getrusage: the peak that it tells begins with that of the process which started this one.
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
print(json.dumps([len(source.problems), *map(sum, zip(*totals)), peak]))
"""


def test_the_driver_of_a_data_set_as_large_as_cocos_stays_small(tmp_path: Path) -> None:
    """2 GB at most, of which the libraries are 0.7: the annotations of 1.3 million segments reach the workers."""
    root = tmp_path / "coco"
    pngs, images = root / "annotations/panoptic_train2017", root / "train2017"
    pngs.mkdir(parents=True)
    images.mkdir()
    file = root / "annotations/panoptic_train2017.json"
    for stem in write_large_json(file):
        (pngs / f"{stem}.png").touch()
        (images / f"{stem}.jpg").touch()
    assert file.stat().st_size > 380_000_000
    try:
        done = subprocess.run(
            [sys.executable, "-c", READ, str(root)], cwd=ROOT, capture_output=True, text=True, timeout=500
        )
    finally:
        shutil.rmtree(root)
    assert done.returncode == 0, done.stderr[-3000:]
    problems, rows, segments, peak = json.loads(done.stdout.splitlines()[-1])
    print(f"peak {peak / 1e9:.2f} GB")
    assert (problems, rows) == (0, IMAGES) and 1_200_000 < segments < 1_400_000
    assert peak < 2e9


PREPARE = """
import sys
from pipelines.cluster import session
from pipelines.data.prepare import prepare
from pipelines.data.readers import coco_panoptic
session.connect(cpus=int(sys.argv[3]), object_store=100_000_000)
print(session.own_folder(), flush=True)
prepare(coco_panoptic(sys.argv[1], "train"), sys.argv[2], rows_per_shard=8)
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.nightly
def test_killed_again_and_again_it_ends_in_the_same_bytes(tmp_path: Path) -> None:
    """Of 48 shards some are finished when the driver is killed; other numbers of workers go on with the others."""
    write_folder(tmp_path / "data", "train", count=384, height=300, width=400)

    def start(out: str, cpus: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PREPARE, str(tmp_path / "data"), str(tmp_path / out), str(cpus)]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    undisturbed = start("undisturbed", 1)
    assert undisturbed.wait(200) == 0
    out, finished = tmp_path / "out", 0
    for cpus, more in ((2, 1), (3, 5)):
        driver = start("out", cpus)
        assert driver.stdout is not None
        folder = driver.stdout.readline().strip()
        end = time.monotonic() + 150
        while len(list(out.glob(".prepare/shard-*.json"))) < finished + more and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        session.end_leftovers(folder)
        finished = len(list(out.glob(".prepare/shard-*.json")))
        assert 0 < finished < 48 and not (out / "manifest.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("shard-*.arrow")}
    reported = {path.stem for path in out.glob(".prepare/shard-*.json")}
    assert start("out", 2).wait(200) == 0
    assert all(path.stat().st_mtime_ns == time_ for path, time_ in kept.items() if path.stem in reported)
    assert contents(out) == contents(tmp_path / "undisturbed")

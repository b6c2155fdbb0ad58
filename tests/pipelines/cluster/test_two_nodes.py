"""The whole pipeline on two machines: two raylets, one of which sees none of the other's files.

One cluster serves all tests of the file, and each builds on what those before it have left on S3: the data is prepared
while the head is alone, a second node joins and is lost, a third takes its place.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.training.checkpoints import newest_step
from pipelines.training.elastic import INTERVAL
from tests.support import s3_server, two_nodes
from tests.support.tracking_server import tracking_server
from tests.support.two_nodes import Cluster, Node

TINY = """
--model.rates 2 --model.aspp-channels 16 --model.semantic-projections 8 8 8 --model.instance-projections 8 8 8
--model.semantic-channels 16 --model.instance-channels 16 --model.semantic-head-channels 16
--model.instance-head-channels 8 --augment.crop 65 97 --train.batch 4 --train.log-every 1 --train.overlays 0
"""

BUCKET = "s3://bucket"

STEPS = 120
"""Of the training that loses a node and gets two."""

ACTORS = """
from ray.util.state import list_actors
for actor in list_actors(limit=1000):
    print(actor.node_id, actor.class_name)
"""


@dataclass
class Place:
    """A cluster with an S3 and a tracking server, and a folder that the head alone sees."""

    cluster: Cluster
    local: Path

    def job(self, name: str, *arguments: str, timeout: float = 500) -> subprocess.CompletedProcess[str]:
        return self.cluster.run([sys.executable, f"jobs/{name}.py", *arguments], timeout=timeout)

    def done(self, name: str, *arguments: str) -> str:
        """The output of a job that succeeds."""
        job = self.job(name, *arguments)
        assert job.returncode == 0, job.stdout + self.cluster.logs()
        return job.stdout

    def nodes_of(self, kind: str) -> set[str]:
        """Ids of the nodes on which actors of a class run or ran."""
        lines = self.cluster.run([sys.executable, "-c", ACTORS], timeout=180).stdout.splitlines()
        return {line.split(" ", 1)[0] for line in lines if kind in line}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, mlflow_template: Path) -> Iterator[Place]:
    """The head alone, and drawn scenes on S3 and in the folder that it alone sees."""
    import boto3

    folder = tmp_path_factory.mktemp("two-nodes")
    (folder / "local").mkdir()
    with pytest.MonkeyPatch.context() as patch, s3_server.s3_server() as endpoint:
        for name, value in {**s3_server.ENVIRONMENT, "AWS_ENDPOINT_URL_S3": endpoint}.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="bucket")
        upload_scenes(folder / "local" / "scenes")
        with tracking_server(folder, f"{BUCKET}/mlflow", mlflow_template) as tracking:
            environment = {"MLFLOW_TRACKING_URI": tracking}
            with two_nodes.cluster_of_nodes(nodes=1, environment=environment) as cluster:
                yield Place(cluster, folder / "local")


def upload_scenes(folder: Path, place: str = f"{BUCKET}/scenes") -> None:
    from pyarrow import fs

    from pipelines.cluster import storage
    from pipelines.data.scenes import write_scenes

    write_scenes(folder, train=8, val=4, seed=7, workers=1)
    filesystem, path = storage.resolve(place)
    fs.copy_files(str(folder), path, destination_filesystem=filesystem)


@pytest.fixture(scope="module")
def shards(place: Place) -> str:
    """Both splits, prepared by the head alone; then a second node joins, which sees no file of the head's."""
    for split in ("train", "val"):
        place.done("prepare", "--data.root", f"{BUCKET}/scenes", "--data.split", split, "--out", f"{BUCKET}/s/{split}")
    assert len(place.cluster.nodes) == 1
    place.cluster.add(hide=[place.local])
    return f"{BUCKET}/s"


def wait_for(condition: Callable[[], object], seconds: float = 300, said: Callable[[], str] = str) -> None:
    """Wait until something is so; past the time, fail with what was `said`."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, said()
        time.sleep(0.2)


def training(name: str, shards: str, steps: int) -> list[str]:
    """A training of as many workers as there are nodes: each takes all CPUs of one."""
    options = [*TINY.split(), "--train.workers", "1..2", "--train.cpus-per-worker", "2", "--train.keep", "3"]
    options += ["--train.validate-every", str(steps // 3), "--train.checkpoint-every", "4"]
    options += ["--train.steps", str(steps), "--data.root", shards, "--storage", f"{BUCKET}/runs", "--name", name]
    return [sys.executable, "jobs/train.py", "demo", *options]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_local_files_of_one_machine_are_refused_on_two(place: Place, shards: str, tmp_path: Path):
    """In one line, with the option and the machine that lacks them, and before anything is written."""
    second = place.cluster.nodes[1].address
    told = r"error: {} {}: the machine {} of the cluster does not see it; give s3://bucket/folder, or a folder that all"
    local = str(place.local)
    cases = [
        ("prepare", ["--data.root", f"{local}/scenes", "--data.split", "val", "--out", f"{BUCKET}/x"], "--data.root"),
        ("train", ["demo", "--storage", f"{local}/runs", "--data.root", shards, "--name", "x"], "--storage"),
    ]
    if os.getuid() != 0:
        pytest.skip("hiding one machine's files from another needs root")
    for name, arguments, option in cases:
        job = place.job(name, *arguments)
        path = arguments[arguments.index(option) + 1]
        assert job.returncode == 2 and re.search(told.format(option, path, second), job.stdout), job.stdout


@pytest.fixture(scope="module")
def trained(place: Place, shards: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Node]]:
    """The log of a training that lost one of its two nodes in mid-run, got one, and had that one drained for another;
    and the nodes that were there: four."""
    log = tmp_path_factory.mktemp("trained") / "log.txt"
    environment = place.cluster.environment | {INTERVAL: "1", two_nodes.MARK: place.cluster.mark}
    job = place.cluster.start(training("lost-node", shards, STEPS), log, env=environment)

    alone = place.cluster.head

    def add() -> None:
        """No step meanwhile, so that however fast the machine is, steps are left for the node."""
        with alone.paused("RayTrainWorker"):
            place.cluster.add(hide=[place.local])

    def wait_until(text: str, times: int = 1) -> None:
        wait_for(lambda: log.read_text().count(text) >= times or job.poll() is not None, said=log.read_text)
        assert job.poll() is None, log.read_text()

    # without a whole checkpoint the next attempt begins anew, and "continuing" is said once less
    wait_for(lambda: newest_step(f"{BUCKET}/runs/lost-node") >= 4 or job.poll() is not None, said=log.read_text)
    place.cluster.nodes[1].kill()
    wait_until("training with 1 workers")
    add()
    wait_until("continuing at step", times=2)
    with alone.paused("RayTrainWorker"):
        place.cluster.drain(place.cluster.nodes[2], 120)
    wait_until("(a node is taken back)")
    add()
    assert job.wait(600) == 0, log.read_text() + place.cluster.logs()
    return log.read_text(), place.cluster.nodes


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_training_on_two_nodes_survives_the_loss_of_one(place: Place, trained: tuple[str, list[Node]]):
    """A worker on each; when a node dies, the run goes on with the other, and takes in the node that is added.

    A node that is drained is left at a common step, so that none is repeated. It is one run, which has each step.
    """
    from mlflow import MlflowClient

    from pipelines.cluster import storage

    log, nodes = trained
    assert place.nodes_of("RayTrainWorker") == {node.id for node in nodes} and len(nodes) == 4
    counts = "".join(re.findall(r"training with (\d) workers, of 1\.\.2", log))
    assert re.fullmatch("2121?2", counts), log  # the fourth node may have come before anybody looks
    first, second, third, *_ = map(int, re.findall(r"continuing at step (\d+)", log))
    assert 4 <= first < second < third < STEPS and f"step {STEPS}/{STEPS}" in log, log
    assert f"workers stopped on notice (room for 2 workers); going on from step {second}" in log, log
    assert f"workers stopped on notice (a node is taken back); going on from step {third}" in log, log
    later = log.split("(room for 2 workers)", 1)[1]
    trained_steps = [int(step) for step in re.findall(rf"step (\d+)/{STEPS} \|", later)]
    assert trained_steps == list(range(second + 1, STEPS + 1))  # none twice
    assert f"{BUCKET}/runs/lost-node/step_" in log and "lost-node: best checkpoint, on 4 images of val" in log
    client = MlflowClient(place.cluster.environment["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("panoptic")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], "tags.mlflow.runName = 'lost-node'")
    steps = {metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss/total")}
    assert run.info.status == "FINISHED" and steps == set(range(1, STEPS + 1))
    assert "checkpoint.pt" in storage.list_files(f"{BUCKET}/runs/lost-node/step_{STEPS:06d}")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_actors_of_an_evaluation_are_on_both_nodes(place: Place, trained: tuple[str, list[Node]], shards: str):
    """Two models of one batch of images each; the figures are those of the training."""
    run = f"{BUCKET}/runs/lost-node"
    options = [
        "--data.root",
        shards,
        "--data.split",
        "val",
        "--out",
        f"{BUCKET}/evaluations",
        "--actors",
        "2",
        "--quick",
    ]
    text = place.done("evaluate", f"{run}/step_{STEPS:06d}", *options, "--against", f"{run}/step_{2 * STEPS // 3:06d}")
    assert place.nodes_of("_Actor") == {place.cluster.nodes[0].id, place.cluster.nodes[3].id}
    validated = trained[0].split(f"validation at step {STEPS}")[1].splitlines()
    trained_row = next(line for line in validated if re.match(r"(.* )?all ", line))
    assert trained_row.split("all ")[1].split()[:3] == next(
        line.split()[1:4] for line in text.splitlines() if line.startswith("all ")
    )


@pytest.mark.slow
def test_a_cluster_asks_for_its_token(place: Place):
    stranger = place.cluster.environment | {"RAY_AUTH_TOKEN": "0" * 64}
    done = place.cluster.run([sys.executable, "-c", "import ray; ray.init()"], env=stranger, timeout=180)
    assert done.returncode != 0 and "auth" in done.stdout.lower()


@pytest.mark.slow
def test_a_cluster_ends_with_the_process_that_started_it():
    """Although that is killed and can end nothing itself."""
    text = (
        "import time\nfrom tests.support.two_nodes import cluster_of_nodes\n"
        "with cluster_of_nodes(nodes=1) as c:\n    print(c.mark, c.folder, flush=True)\n    time.sleep(600)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", text], cwd=two_nodes.ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        mark, folder = owner.stdout.readline().split()
        assert len(two_nodes.marked(mark)) > 3
    finally:
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
    wait_for(lambda: not two_nodes.marked(mark) and not Path(folder).exists(), 20)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_a_training_survives_the_raylet_of_a_node(place: Place, shards: str, tmp_path: Path):
    """Ray's own process of the newest node is killed, not the machine: the run goes on with the head's worker.

    Every step is counted once, in one MLflow run.
    """
    from mlflow import MlflowClient

    steps, log, lost = 60, tmp_path / "log.txt", place.cluster.nodes[-1]
    job = place.cluster.start(training("lost-raylet", shards, steps), log)

    def reached(step: int) -> bool:
        return newest_step(f"{BUCKET}/runs/lost-raylet") >= step or job.poll() is not None

    wait_for(lambda: reached(4), said=log.read_text)
    with place.cluster.head.paused("RayTrainWorker"):  # steps are left, however fast the machine is
        assert job.poll() is None, log.read_text()
        before = len(log.read_text())
        lost.kill_raylet()
        wait_for(lambda: not any("RayTrainWorker" in " ".join(two_nodes.command_line(pid)) for pid in lost.pids()))
    assert job.wait(600) == 0, log.read_text() + place.cluster.logs()
    text = log.read_text()
    counts = "".join(re.findall(r"training with (\d) workers, of 1\.\.2", text))
    assert counts == "21", text
    (continued,) = map(int, re.findall(r"continuing at step (\d+)", text[before:]))
    assert 4 <= continued < steps and "(failure 1, of 2 at the most)" in text, text
    client = MlflowClient(place.cluster.environment["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("panoptic")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], "tags.mlflow.runName = 'lost-raylet'")
    counted = [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss/total")]
    assert run.info.status == "FINISHED" and counted == list(range(1, steps + 1))

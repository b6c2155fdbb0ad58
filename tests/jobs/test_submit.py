"""`ray job submit` and `jobs/submit.py` against a cluster of processes of its own that asks for a token."""

from __future__ import annotations

import base64
import json
import shlex
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs import submit
from pipelines.cluster import submission
from tests.support import s3_server, two_nodes
from tests.support.readme import README, blocks, commands
from tests.support.tracking_server import tracking_server
from tests.support.two_nodes import Cluster, ray

SMALL = """
--model.backbone.name resnet14 --model.backbone.weights none --model.backbone.freeze 0 --augment.sides 64
--augment.crop 64 96 --resize.short 64 --train.batch 4 --train.workers 1 --train.log-every 1 --train.steps 3000
--train.validate-every 4 --train.overlays 1 --train.gpu no
"""
"""Makes the README's submitted training one of many short steps."""

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "planted-aws-0f1e2d3c4b5a",
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-5a4b3c2d1e",
    "RAY_AUTH_TOKEN": "9lanted0" * 8,
}
"""What the machines have in their environment and nothing may hold."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One node, an S3, and an MLflow that asks for a password. PYTHONPATH is unset: jobs bring their code."""
    import boto3

    folder = tmp_path_factory.mktemp("submit")
    with pytest.MonkeyPatch.context() as patch, s3_server.s3_server() as endpoint:
        own = {**s3_server.ENVIRONMENT, **SECRETS, "AWS_ENDPOINT_URL_S3": endpoint, "MLFLOW_TRACKING_USERNAME": "admin"}
        for name, value in own.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="bucket")
        with tracking_server(folder, "s3://bucket/mlflow", password=SECRETS["MLFLOW_TRACKING_PASSWORD"]) as uri:
            environment = {"PYTHONPATH": "", "MLFLOW_TRACKING_URI": uri, "RAY_AUTH_TOKEN": SECRETS["RAY_AUTH_TOKEN"]}
            with two_nodes.cluster_of_nodes(nodes=1, environment=environment) as cluster:
                yield cluster


def test_what_would_be_sent_is_listed(capsys: pytest.CaptureFixture[str]):
    assert submit.main(["files"]) == ""
    head, *lines, total = capsys.readouterr().out.splitlines()
    listed = {name: int(size.replace(",", "")) for name, size in map(str.split, lines)}
    assert head.split() == ["file", "bytes"] and listed["jobs/train.py"] == Path("jobs/train.py").stat().st_size
    assert total.startswith(f"{len(listed)} files of {sum(listed.values()):,} bytes; ")


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_submitted_jobs_without_a_lasting_place_are_refused(cluster: Cluster, tmp_path: Path):
    """What they write would vanish with Ray's copy of the code; one job of all commands, as each submission takes 10 s.

    Absolute paths in the copy are none that last either. The copy holds the code and nothing else.
    """
    jobs = [
        "train.py demo --name x",
        "tune.py demo --name x --sweep 'optim.lr=grid(1e-3,1e-2)'",
        "prepare.py --data.root x --data.split val --out shards",
        "evaluate.py model.pt --data.root x",
        "predict.py model.pt x --out $PWD/out",
        "train.py demo --name x --storage /tmp/x --tracking.uri sqlite:///mlflow.db",
    ]
    script = tmp_path / "jobs.sh"
    jobs.append("train.py demo --name x --storage s3://bucket/x")  # and no tracking server
    lines = "".join(f"python jobs/{job}\necho code $?\n" for job in jobs)
    script.write_text(f"unset MLFLOW_TRACKING_URI\n{lines}echo top $(ls -A)\n")
    command = ray("job", "submit", "--working-dir", ".", "--", "bash", str(script))
    text = cluster.run(command).stdout
    assert "top jobs panoptic pipelines" in text
    assert "error: --tracking.uri: missing, though a cluster works (RAY_ADDRESS)" in text
    assert text.count("code 2") == len(jobs) and "Traceback" not in text, text
    for option, times in {"--storage": 2, "--out": 3, "--tracking.uri": 1}.items():
        told = [line for line in text.splitlines() if line.startswith(f"error: {option} ")]
        assert len(told) == times and all("temporary copy of the submitted code" in line for line in told), text


def client(folder: Path) -> Path:
    """A folder as a person works in, who keeps secrets and data beside the code."""
    submission.stage(folder)
    for name in (".env", "data/labels.json", "jobs/.token", "runs/notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("\n".join(SECRETS.values()))
    return folder


def submissions() -> list[list[str]]:
    """The words of the README's commands that submit jobs, for the Python that runs here."""
    listed = [command for _, script in blocks(README, "sh") for command in commands(script)]
    return [[sys.executable, *words[1:]] for words in map(shlex.split, listed) if words[1:2] == ["jobs/submit.py"]]


def wait_for(condition: Callable[[], object], seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_readmes_commands_and_a_training_that_is_stopped_and_goes_on(cluster: Cluster, tmp_path: Path):
    """Data is prepared, and a training's log followed; stopped it is KILLED with a checkpoint, and the same --name goes
    on with an edited file.

    And the secrets that machines and client hold are in nothing that was written or sent.
    """
    from mlflow import MlflowClient

    from pipelines.cluster import storage
    from pipelines.training.checkpoints import load_checkpoint
    from tests.pipelines.cluster.test_two_nodes import upload_scenes

    folder, log = client(tmp_path / "client"), tmp_path / "log.txt"
    upload_scenes(tmp_path / "scenes", "s3://bucket/data")
    *prepare, train, follow = submissions()
    for words in prepare:
        prepared = cluster.run(words, cwd=folder)
        assert prepared.returncode == 0 and "s3://bucket/shards/" in prepared.stdout, prepared.stdout
    assert train[:4] == [sys.executable, "jobs/submit.py", "--id", "a"] and follow[2:] == ["follow", "a"]
    options = [*train[4:], *SMALL.split()]
    submit = [sys.executable, "jobs/submit.py"]
    first = cluster.start([*submit, "--id", "a", *options], log, cwd=folder)
    wait_for(lambda: "validation at step 8" in log.read_text() or first.poll() is not None)
    assert first.poll() is None, log.read_text()
    stopped = cluster.run([*submit, "stop", "a"], cwd=folder)
    assert stopped.returncode == 0 and "a: STOPPED" in stopped.stdout, stopped.stdout
    assert first.wait(60) == submission.STOPPED
    followed = cluster.run(follow, cwd=folder)
    assert followed.returncode == submission.STOPPED and "validation at step 8" in followed.stdout, followed.stdout
    text = log.read_text()
    assert "a submitted" in text and "interrupted by SIGTERM; the same command goes on" in text
    assert "not sent, since secret: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_PASSWORD" in text

    store = MlflowClient(cluster.environment["MLFLOW_TRACKING_URI"])
    begun = json.loads(storage.read_bytes("s3://bucket/runs/a/run.json"))
    run = begun["run_id"]
    assert store.get_run(run).info.status == "KILLED" and begun["options"]["train.steps"] == 3000
    last = max(name.split("/")[0] for name in storage.list_files("s3://bucket/runs/a") if "checkpoint.pt" in name)
    step = load_checkpoint(f"s3://bucket/runs/a/{last}")["step"]
    assert step >= 8 and last == f"step_{step:06d}"

    with (folder / "jobs" / "train.py").open("a") as file:
        file.write("    print('this file was edited')\n")
    again = [*submit, "--id", "second", *options, "--train.stop-after", str(step + 4)]
    done = cluster.run(again, cwd=folder)
    assert done.returncode == 0 and "second ended with code 0" in done.stdout, done.stdout
    assert f"continuing at step {step}," in done.stdout and "this file was edited" in done.stdout
    assert f"step {step + 4}/{step + 4} " in done.stdout
    assert "a: best checkpoint, on 4 images of val" in done.stdout
    files = storage.list_files("s3://bucket/runs/a")
    assert f"step_{step + 4:06d}/checkpoint.pt" in files
    assert any(name.startswith("overlays/") and name.endswith(".png") for name in files)
    assert store.get_run(run).info.status == "FINISHED"
    repeated = cluster.run(again, cwd=folder)
    assert repeated.returncode == 0 and "second is there already (SUCCEEDED), and is not submitted" in repeated.stdout
    wrong = cluster.run([*submit, "--id", "third", *options, "--optim.lr", "7"], cwd=folder)
    assert wrong.returncode == 2 and "began with other options: optim.lr" in wrong.stdout

    assert_no_secret(cluster, tmp_path, [text, done.stdout, wrong.stdout, str(store.get_run(run))])


def assert_no_secret(cluster: Cluster, tmp_path: Path, texts: list[str]) -> None:
    """In no text, none of Ray's files and jobs (the uploaded code among them), no object on S3, no table of MLflow."""
    from pipelines.cluster import storage

    info = cluster.run([*ray("job", "list"), "--format", "json"], timeout=180)
    places = {f"text {number}": text.encode() for number, text in enumerate([*texts, info.stdout])}
    for path in cluster.folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            places[str(path)] = path.read_bytes()
    for name in storage.list_files("s3://bucket"):
        places[name] = storage.read_bytes(f"s3://bucket/{name}")
    (database,) = tmp_path.parent.glob("submit[0-9]*/server.db")
    places["MLflow"] = database.read_bytes()
    assert len(places) > 100 and any("checkpoint.pt" in name for name in places)
    assert any(name.endswith("jobs/train.py") for name in places)
    for name, content in places.items():
        assert not any(secret.encode() in content for secret in SECRETS.values()), name


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_servers_ask_who_is_there(cluster: Cluster):
    """MLflow for a password and for its own host name, Ray's job server for the token: 401, 403, 401."""
    uri = f"{cluster.environment['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/experiments/search?max_results=1"
    admin = base64.b64encode(f"admin:{SECRETS['MLFLOW_TRACKING_PASSWORD']}".encode()).decode()
    assert status_of(uri, {}) == 401
    assert status_of(uri, {"Authorization": f"Basic {admin}"}) == 200
    assert status_of(uri, {"Authorization": f"Basic {admin}", "Host": "evil.example"}) == 403
    jobs = f"{cluster.dashboard}/api/jobs/"
    assert status_of(jobs, {}) == 401
    assert status_of(jobs, {"Authorization": f"Bearer {SECRETS['RAY_AUTH_TOKEN']}"}) == 200


def status_of(url: str, headers: dict[str, str]) -> int:
    """The status of the answer to a request."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code

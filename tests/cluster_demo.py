"""`make cluster`: the pipeline as a cluster runs it, on this machine, without containers, with the real parts.

A Ray head and a second node, which ask for a token; an MLflow server with a password on PostgreSQL; an S3 server that
holds everything else. Jobs are submitted from a folder that holds the code alone: shards of both splits, a training
on both nodes, a sweep of two trials, a scheduled evaluation that makes the model the champion. At the end, after an
error and after Ctrl-C every process that was started is ended; logs and reports stay in a folder, by default
`runs/cluster`. With `--keep` the servers stay until Ctrl-C, so that their pages can be looked at.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from pipelines.cluster import submission
from tests.support import postgres, s3_server, two_nodes
from tests.support.tracking_server import tracking_server

BUCKET = "s3://panoptic"

SMALL = """
--model.rates 2 4 --model.aspp-channels 32 --model.semantic-projections 16 16 16 --model.instance-projections 8 8 8
--model.semantic-channels 32 --model.instance-channels 16 --model.semantic-head-channels 32
--model.instance-head-channels 16 --augment.crop 97 129 --train.batch 8 --train.overlays 2
"""
"""Options of a model and of crops that two busy cores train in seconds."""

LOST = 5
"""Lines of a log that are shown of a job that failed, beside the nodes' own."""


class Client:
    """A person with a copy of the code, who submits jobs and looks at what they print."""

    def __init__(self, cluster: two_nodes.Cluster, code: Path, logs: Path, told: Callable[[str], None]) -> None:
        self.cluster, self.code, self.logs, self.told = cluster, code, logs, told

    def submit(self, **jobs: list[str]) -> list[str]:
        """Submit jobs at the same time and wait for all of them.

        Args:
            jobs: by a title, the arguments of `jobs/submit.py`.

        Returns:
            what each has printed.

        Raises:
            SystemExit: one failed; the end of its log is shown.
        """
        running = {}
        for title, arguments in jobs.items():
            log = self.logs / f"{title}.txt"
            running[title] = self.cluster.start([sys.executable, "jobs/submit.py", *arguments], log, cwd=self.code)
        texts = []
        for title, process in running.items():
            code = process.wait()
            texts.append((self.logs / f"{title}.txt").read_text(errors="replace"))
            if code:
                last = "\n".join(texts[-1].splitlines()[-LOST:])
                raise SystemExit(
                    f"{title}: exit code {code}; its log is {self.logs / title}.txt, which ends with\n{last}\n"
                    f"and the nodes' own with\n{self.cluster.logs()}"
                )
            self.told(title.replace("_", " "))
        return texts

    def nodes_of(self, actor: str) -> int:
        """Number of nodes on which actors of a class have run."""
        script = f"""
from ray.util.state import list_actors
print("nodes", len({{a.node_id for a in list_actors(limit=1000) if a.class_name == {actor!r}}}))
"""
        done = self.cluster.run([sys.executable, "-c", script], timeout=60)
        return int(re.findall(r"^nodes (\d+)$", done.stdout, re.MULTILINE)[0])


def main() -> None:
    """Start everything, run the jobs, end everything."""
    parser = argparse.ArgumentParser(prog="make cluster", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/cluster"), help="folder of logs and reports")
    parser.add_argument("--keep", action="store_true", help="leave the servers until Ctrl-C")
    options = parser.parse_args()
    postgres.check()
    begin, mark = time.monotonic(), secrets.token_hex(8)
    folder = Path(tempfile.mkdtemp(prefix="cluster-"))
    folder.chmod(0o755)  # PostgreSQL refuses root: as root it runs as a user of its own
    os.environ[two_nodes.MARK] = mark  # of all that is started here, so that nothing outlives this process
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    marks = [mark]

    def told(what: str) -> None:
        print(f"{time.monotonic() - begin:6.1f} s  {what}", flush=True)

    with two_nodes.ended_without_us(mark, folder):
        try:
            run(folder, options.out.absolute(), options.keep, told, marks)
        finally:
            two_nodes.end(lambda: list(two_nodes.marked(mark)))
            shutil.rmtree(folder, ignore_errors=True)
            left = [pid for each in marks for pid in two_nodes.marked(each)]
            told(f"all is ended; {len(left) or 'no'} processes are left")


def run(folder: Path, out: Path, keep: bool, told: Callable[[str], None], marks: list[str]) -> None:
    """Start the servers, then run the jobs.

    Args:
        folder: of the servers' files, which is removed.
        out: of logs and reports, which is not.
        keep: stay until Ctrl-C.
        told: called with what is done.
        marks: the cluster's is appended.
    """
    for name in ("postgres", "mlflow", "client", "data"):
        (folder / name).mkdir()
    out.mkdir(parents=True, exist_ok=True)
    password = secrets.token_hex(16)
    keys = {"AWS_ACCESS_KEY_ID": "panoptic", "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20)}
    os.environ.update(s3_server.ENVIRONMENT | keys)
    with ExitStack() as stack:
        endpoint = stack.enter_context(s3_server.s3_server())
        os.environ["AWS_ENDPOINT_URL_S3"] = endpoint
        upload_scenes(folder / "data" / "scenes")
        store, os.environ["PGPASSWORD"] = stack.enter_context(postgres.postgres(folder / "postgres", "mlflow"))
        tracking = stack.enter_context(
            tracking_server(folder / "mlflow", f"{BUCKET}/mlflow", password=password, store=store, direct=True)
        )
        del os.environ["PGPASSWORD"]
        environment = {
            **{"PYTHONPATH": "", "MLFLOW_TRACKING_URI": tracking, "MLFLOW_DISABLE_TELEMETRY": "true"},
            **{"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": password, "OMP_NUM_THREADS": "1"},
        }
        cluster = stack.enter_context(two_nodes.cluster_of_nodes(2, environment=environment))
        marks.append(cluster.mark)
        told(f"S3, PostgreSQL, MLflow, Ray on {len(cluster.nodes)} nodes")
        submission.stage(folder / "client")
        run_jobs(Client(cluster, folder / "client", out, told), tracking, password, out)
        if keep:
            token = cluster.environment["RAY_AUTH_TOKEN"]
            print(f"MLflow: {tracking} (admin, {password})\nRay: {cluster.dashboard} (token {token})\nCtrl-C ends all")
            signal.pause()


def run_jobs(client: Client, tracking: str, password: str, out: Path) -> None:
    """The jobs of the pipeline, and what came of them.

    Raises:
        SystemExit: a job failed, or something is not as it should be.
    """
    shards, runs = f"{BUCKET}/shards", f"{BUCKET}/runs"
    prepare = {
        f"prepare_{split}": ["prepare", "--data.root", f"{BUCKET}/scenes", "--data.split", split]
        + ["--out", f"{shards}/{split}"]
        for split in ("train", "val")
    }
    client.submit(**prepare)
    shared = ["--data.root", shards, "--storage", runs, *SMALL.split()]
    both = ["--train.workers", "2", "--train.cpus-per-worker", "2"]  # all CPUs of a node, so one worker on each
    length = ["--train.steps", "24", "--train.validate-every", "12"]
    registered = ["--tracking.register", "street", "--tracking.alias", "challenger"]
    (text,) = client.submit(training=["train", "demo", "--name", "first", *shared, *both, *length, *registered])
    if (nodes := client.nodes_of("RayTrainWorker")) != 2:
        raise SystemExit(f"the training's workers ran on {nodes} of 2 nodes")
    sweep = ["--sweep", "optim.lr=grid(5e-4,2e-3)", "--train.workers", "1", "--train.steps", "6"]
    client.submit(sweep=["tune", "demo", "--name", "sweep", *shared, *sweep, "--train.validate-every", "6"])
    evaluate = ["evaluate", "models:/street@challenger", "--data.root", shards, "--data.split", "val"]
    evaluate += ["--out", f"{BUCKET}/evaluations", "--once", "--reference", "models:/street@champion", "--promote"]
    (verdict,) = client.submit(scheduled_evaluation=["--id", "evaluation-1", *evaluate])
    champion, challenger = (version(tracking, password, alias) for alias in ("champion", "challenger"))
    if champion is None or champion != challenger:
        raise SystemExit(f"the model was not promoted: champion {champion}, challenger {challenger}\n{verdict}")
    reports = download(f"{BUCKET}/evaluations", out / "evaluations", ".html")
    table = re.search(r"first: best checkpoint.*?(?=\nshards)", text, re.DOTALL)
    told = [line for line in verdict.splitlines() if line.startswith(("models:/street", "street "))]
    print("\n".join(["", table[0].strip() if table else text[-3000:], "", *told]))
    print(f"\nlogs of the jobs: {out}; report of the evaluation: {', '.join(map(str, reports)) or 'none'}")
    print(f"runs, models and aliases lay in MLflow on PostgreSQL, everything else in {BUCKET}:")
    print("\n".join(listing()))


def version(tracking: str, password: str, alias: str) -> str | None:
    """The version of the registered model that an alias names, as MLflow's server tells whoever has the password."""
    url = f"{tracking}/api/2.0/mlflow/registered-models/alias?name=street&alias={alias}"
    login = base64.b64encode(f"admin:{password}".encode()).decode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Authorization": f"Basic {login}"})) as answer:
            return json.load(answer)["model_version"]["version"]
    except urllib.error.HTTPError as error:
        print(error.read().decode(errors="replace"), file=sys.stderr)
        return None


def download(place: str, folder: Path, suffix: str) -> list[Path]:
    """Copy files of a folder on S3; their paths."""
    from pipelines.cluster import storage

    paths = []
    for name in storage.list_files(place):
        if name.endswith(suffix):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(storage.read_bytes(storage.join(place, name)))
            paths.append(path)
    return paths


def listing() -> list[str]:
    """The folders of the bucket, with the files and bytes of each."""
    from pipelines.cluster import storage

    sizes: dict[str, list[int]] = defaultdict(list)
    for name, (size, _) in storage.list_stamps(BUCKET).items():
        parts = name.split("/")
        sizes["/".join(parts[: 2 if parts[0] == "runs" else 1])].append(size)
    return [f"  {BUCKET}/{name:20} {len(each):4} files {sum(each):12,} bytes" for name, each in sorted(sizes.items())]


def upload_scenes(folder: Path) -> None:
    """Drawn scenes, put on S3 as a data set comes there."""
    import boto3
    from pyarrow import fs

    from pipelines.cluster import storage
    from pipelines.data.scenes import write_scenes

    boto3.client("s3").create_bucket(Bucket=BUCKET.removeprefix("s3://"))
    write_scenes(folder, train=32, val=8, seed=0, workers=1)
    filesystem, path = storage.resolve(f"{BUCKET}/scenes")
    fs.copy_files(str(folder), path, destination_filesystem=filesystem)


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, FileNotFoundError, subprocess.CalledProcessError) as error:
        raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else f"make cluster: {error}") from None

"""`ray job submit` against a cluster started by `ray start --head`, the way that the README shows."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

TINY = """
--model.rates 2 --model.aspp-channels 16 --model.semantic-projections 8 8 8 --model.instance-projections 8 8 8
--model.semantic-channels 16 --model.instance-channels 16 --model.semantic-head-channels 16
--model.instance-head-channels 8 --augment.crop 65 97 --data.scenes.train 8 --data.scenes.val 4
--train.steps 2 --train.batch 4 --train.workers 2 --train.log-every 1
"""


def ray(*arguments: str) -> list[str]:
    """The command line of Ray's program of this environment."""
    return [sys.executable, "-m", "ray.scripts.scripts", *arguments]


def free_ports(count: int) -> list[str]:
    """Ports that nobody listens on, held all at once so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [str(one.getsockname()[1]) for one in sockets]


def environment(session: Path) -> dict[str, str]:
    """As a person's shell would have it: no package path, no session of ours."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RAY_ADDRESS")}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]])  # as an activated environment has it
    return kept | {
        "PATH": path,
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(session),
    }


@pytest.fixture
def cluster() -> Iterator[tuple[str, dict[str, str]]]:
    """Address of the job server of a Ray on its own ports. `ray stop` would end every Ray on the machine."""
    session = Path(tempfile.mkdtemp(prefix="ray-"))  # short: sockets lie in it, whose paths may have 107 bytes
    port, dashboard, client, agent, grpc, metrics = free_ports(6)
    command = ray("start", "--head", "--block", "--node-ip-address", "127.0.0.1", "--port", port)
    command += ["--dashboard-port", dashboard, "--ray-client-server-port", client, "--num-cpus", "2"]
    command += ["--dashboard-agent-listen-port", agent, "--dashboard-agent-grpc-port", grpc]
    command += ["--metrics-export-port", metrics, "--object-store-memory", "300000000"]
    command += ["--temp-dir", str(session), "--disable-usage-stats"]
    variables = environment(session)
    with (session / "head.log").open("wb") as log:
        head = subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until_open(int(dashboard), head, session / "head.log")
        yield f"http://127.0.0.1:{dashboard}", variables
    finally:
        # `--block` ends what it started when it is asked to; the rest of its session would be left by a crash
        head.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(timeout=20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        for pid in with_argument(str(session)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(session, ignore_errors=True)


def wait_until_open(port: int, head: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and head.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    pytest.fail(f"Ray did not start: {log.read_text()}")


def with_argument(text: str) -> list[int]:
    """Processes whose command line holds `text`: those of a Ray name its folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if text in (entry / "cmdline").read_text() and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_training_job_runs_as_a_submitted_job(cluster: tuple[str, dict[str, str]], tmp_path: Path):
    address, variables = cluster
    job = ["python", "jobs/train.py", "demo", "--name", "submitted", "--storage", str(tmp_path), *TINY.split()]
    command = ray("job", "submit", "--address", address, "--working-dir", ".", "--", *job)
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=240, check=False)
    text = done.stdout + done.stderr
    assert done.returncode == 0 and "succeeded" in text, text
    assert "submitted: best checkpoint, on 4 images of val" in text and "step 2/2" in text
    folder = tmp_path / "submitted"
    assert (folder / "step_000002" / "checkpoint.pt").exists() and list((folder / "overlays").glob("*.png"))
    assert json.loads((folder / "run.json").read_text())["options"]["train.steps"] == 2
    assert (tmp_path / "mlflow.db").exists()

    refused = subprocess.run(
        [*command, "--optim.lr", "1"], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120, check=False
    )
    assert refused.returncode != 0 and "began with other options: optim.lr" in refused.stdout + refused.stderr


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_submitted_jobs_without_a_lasting_place_are_refused(cluster: tuple[str, dict[str, str]], tmp_path: Path):
    """What they write would vanish with Ray's copy of the code; one job of all commands, as each submission takes 10 s.

    Absolute paths in the copy are none that last either.
    """
    address, variables = cluster
    jobs = [
        "train.py demo --name x",
        "tune.py demo --name x --sweep 'optim.lr=grid(1e-3,1e-2)'",
        "prepare.py --data.root x --data.split val --out shards",
        "evaluate.py model.pt --data.root x",
        "predict.py model.pt x --out $PWD/out",
        "train.py demo --name x --storage /tmp/x --tracking.uri sqlite:///mlflow.db",
    ]
    script = tmp_path / "jobs.sh"
    script.write_text("".join(f"python jobs/{job}\necho code $?\n" for job in jobs))
    command = ray("job", "submit", "--address", address, "--working-dir", ".", "--", "bash", str(script))
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=200, check=False)
    text = done.stdout + done.stderr
    assert text.count("code 2") == len(jobs) and "Traceback" not in text, text
    for option, times in {"--storage": 2, "--out": 3, "--tracking.uri": 1}.items():
        told = [line for line in text.splitlines() if line.startswith(f"error: {option} ")]
        assert len(told) == times and all("temporary copy of the submitted code" in line for line in told), text

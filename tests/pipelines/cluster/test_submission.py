"""What is sent to a cluster with a submitted job, and what never is."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines.cluster import submission

SECRET = "planted-s3cret"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder as a person works in: code, and much that is nobody else's business."""
    files = ["jobs/train.py", "panoptic/a/b.py", "panoptic/classes/x.json"]
    private = [".env", "data/000.jpg", "runs/a/run.json", ".git/config", ".venv/lib/x.py", "jobs/.env.py", "notes.py"]
    private += ["pipelines/__pycache__/a.py", "panoptic/weights.pt", "jobs/.hidden/x.py"]
    for name in [*files, *private]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(SECRET if name in private else "1")
    (tmp_path / "jobs" / "link.py").symlink_to(tmp_path / ".env")
    return tmp_path


def test_code_is_sent_and_nothing_else(checkout: Path, tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("staged")
    sent = submission.stage(out, root=checkout)
    assert sent == [(n, 1) for n in ("jobs/train.py", "panoptic/a/b.py", "panoptic/classes/x.json")]
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) == 3 and not any(SECRET in path.read_text() for path in files)


def test_files_that_are_named_are_sent_from_below_the_working_directory_only(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(checkout)
    out = tmp_path_factory.mktemp("staged")
    assert ("runs/a/run.json", len(SECRET)) in submission.stage(out, ["runs/a/run.json"], checkout)
    assert (out / "runs/a/run.json").exists()
    for wrong in (str(checkout / "notes.py"), "../x", "nothing.json"):
        with pytest.raises(ValueError, match=r"^--carry .*: no file below the working directory; give a relative path"):
            submission.stage(out, [wrong], checkout)


def test_this_code_is_sent_in_less_than_two_megabytes():
    """What Ray is given is one archive, which it would not make of a folder: it does not compress."""
    server = JobServer([])
    client_of(server).submit(["train"], "b")
    (sent,) = server.sent
    with zipfile.ZipFile(io.BytesIO(sent)) as archive:
        assert archive.namelist() == sorted(submission.code_files()) and archive.testzip() is None
        assert archive.read("jobs/train.py") == (submission.REPOSITORY / "jobs" / "train.py").read_bytes()
    assert 100_000 < len(sent) < 2_000_000
    assert {name.split("/")[0] for name in submission.code_files()} == set(submission.PACKAGES)


def test_what_a_cluster_has_is_not_sent_again(checkout: Path, tmp_path_factory: pytest.TempPathFactory):
    """Ray knows it by the hash of the archive, in which no time of a copy stands."""
    folder = tmp_path_factory.mktemp("sent") / "code"
    submission.stage(folder, root=checkout)
    before = submission.pack(folder).read_bytes()
    os.utime(folder / "jobs" / "train.py", (1e9, 1e9))
    assert submission.pack(folder).read_bytes() == before


def test_too_much_code_is_refused(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(submission, "MOST", 2)
    with pytest.raises(
        ValueError, match=r": 3 bytes of code, of which 2 are sent at most; the largest is jobs/train.py"
    ):
        submission.stage(tmp_path / "out", root=checkout)


def test_a_job_gets_settings_and_no_secrets():
    given = {
        "MLFLOW_TRACKING_URI": "http://mlflow:5000",
        "AWS_REGION": "eu-central-1",
        "AWS_ACCESS_KEY_ID": SECRET,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "MLFLOW_TRACKING_PASSWORD": SECRET,
        "RAY_AUTH_TOKEN": SECRET,
        "HOME": "/home/x",
    }
    sent = submission.settings(given)
    assert sent["MLFLOW_TRACKING_URI"] == "http://mlflow:5000" and sent["AWS_REGION"] == "eu-central-1"
    assert SECRET not in str(sent) and "HOME" not in sent and int(sent["RAY_JOB_STOP_WAIT_TIME_S"]) >= 30
    told = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN"]
    assert submission.withheld(given) == told
    with pytest.raises(ValueError, match=r"^MLFLOW_TRACKING_URI=http://\*\*\*@mlflow: a job's settings can be read"):
        submission.settings({"MLFLOW_TRACKING_URI": f"http://me:{SECRET}@mlflow"})


def test_a_command_with_a_password_is_refused(monkeypatch: pytest.MonkeyPatch):
    client = submission.Client.__new__(submission.Client)
    with pytest.raises(ValueError, match=r"\*\*\*@mlflow.*take the password out of it") as told:
        client.submit(["train", "--tracking.uri", f"http://me:{SECRET}@mlflow:5000"], "x")
    assert SECRET not in str(told.value)


def test_rays_own_command_sends_the_same_files(checkout: Path):
    """By `.rayignore`, as Ray 2.60 reads it."""
    packaging = pytest.importorskip("ray._private.runtime_env.packaging", reason="Ray has moved its packaging")
    (checkout / ".rayignore").write_bytes((submission.REPOSITORY / ".rayignore").read_bytes())
    (checkout / "jobs" / "link.py").unlink()
    packed = checkout.parent / "packed.zip"
    packaging.create_package(str(checkout), packed, include_gitignore=True)
    with zipfile.ZipFile(packed) as archive:
        files = {name for name in archive.namelist() if not name.endswith("/")}
    assert files - {"panoptic/weights.pt"} == set(submission.code_files(checkout))  # it does not look at the kind


class JobServer:
    """A job whose log comes over connections that break, and that has ended when the last one is read."""

    def __init__(self, *connections: list[str | Exception], status: str = "SUCCEEDED", code: int | None = 0) -> None:
        self.connections, self.ended, self.code, self.submitted = list(connections), status, code, 0
        self.sent: list[bytes] = []

    def list_jobs(self) -> list[SimpleNamespace]:
        status = SimpleNamespace(value="RUNNING" if len(self.connections) > 1 else self.ended)
        return [SimpleNamespace(submission_id=None, status=status), SimpleNamespace(submission_id="a", status=status)]

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        for part in self.connections.pop(0):
            if isinstance(part, Exception):
                raise part
            yield part

    def get_job_info(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(status=SimpleNamespace(value=self.ended), driver_exit_code=self.code, message="no\nnode")

    def submit_job(self, runtime_env: dict[str, str], **given: object) -> None:
        self.submitted += 1
        self.sent.append(Path(runtime_env["working_dir"]).read_bytes())


def client_of(server: JobServer) -> submission.Client:
    client = submission.Client.__new__(submission.Client)
    client.address, client._client = "http://head", server
    return client


def test_a_log_is_shown_once_over_a_connection_that_breaks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(submission, "PAUSE", 0)
    shown: list[str] = []
    server = JobServer(["one ", "two ", RuntimeError("closed")], ["one two th", "ree "], ["one two three ", "four"])
    client_of(server).follow("a", shown.append)
    assert "".join(shown) == "one two three four"


def test_a_job_server_that_stays_away_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(submission, "PAUSE", 0)
    monkeypatch.setattr(submission, "PATIENCE", 0)
    server = JobServer(*([[OSError("refused")]] * 9))
    with pytest.raises(ConnectionError, match=r"^http://head: lost while a ran; it may go on$"):
        client_of(server).follow("a", print)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, (0, "")),
        ("FAILED", 1, (1, "")),
        ("FAILED", None, (2, "no")),
        ("STOPPED", None, (143, "it was stopped")),
    ],
)
def test_the_exit_code_is_the_jobs(status: str, code: int | None, expected: tuple[int, str]):
    assert client_of(JobServer([], status=status, code=code)).exit_code("a") == expected


def test_a_name_is_submitted_once():
    server = JobServer([])
    assert client_of(server).submit(["train"], "a") == ("a", False) and server.submitted == 0
    name, new = client_of(server).submit(["train"], "b")
    assert (name, new, server.submitted) == ("b", True, 1)

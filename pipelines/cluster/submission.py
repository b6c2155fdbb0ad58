"""Jobs of a cluster, submitted from another machine: what is sent, what is not, and how a job ended.

Sent are the Python files of our three packages, files that are named, and settings that are no secrets. Data, `.venv`,
`runs` and `.git` never are; passwords, keys and tokens lie in the environment of the cluster's machines, since whoever
reaches the job server reads the settings and the command of every job.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.cluster.masking import masked
from pipelines.cluster.session import REPOSITORY

PACKAGES = ("jobs", "panoptic", "pipelines")
"""Folders whose files are sent."""

SUFFIXES = (".py", ".json")
"""Suffixes of the files that are sent: code, and tables of data set formats."""

MOST = 8_000_000
"""Bytes of code at most: what is larger is no code of ours."""

SETTINGS = (
    *("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"),
    *("PANOPTIC_S3_PATIENCE", "OMP_NUM_THREADS"),
)
"""Variables of this machine that a job gets where they are set."""

SECRETS = re.compile(r"^(AWS_(SECRET|SESSION|ACCESS).*|MLFLOW_TRACKING_(USERNAME|PASSWORD|TOKEN)|RAY_AUTH_TOKEN.*)$")
"""Variables that a job does not get: the machines of the cluster have their own."""

DEFAULTS = {
    # Ray gives a job that is stopped three seconds, then kills it: its MLflow runs would stay RUNNING for ever.
    "RAY_JOB_STOP_WAIT_TIME_S": "60",
    # lines as they are printed, through the log that is followed
    "PYTHONUNBUFFERED": "1",
}

SETUP = 1800
"""Seconds that a machine may take to set up what is sent."""

STOPPED = 143
"""Exit code of a job that was stopped."""

PATIENCE = 300.0
"""Seconds for which a job server that went away is asked again while a job's log is followed."""

PAUSE = 2.0
"""Seconds between two questions about a job whose log cannot be followed."""

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class Client:
    """The job server of a cluster."""

    def __init__(self, address: str) -> None:
        """Connect.

        Raises:
            ConnectionError: nobody answers, or not to us.
        """
        if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
            os.environ.setdefault("RAY_AUTH_MODE", "token")  # the client alone does not think of it
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        from ray.job_submission import JobSubmissionClient

        for chatty in ("job.sdk", "dashboard_sdk"):  # a line for each connection and upload
            logging.getLogger(f"ray.dashboard.modules.{chatty}").setLevel(logging.WARNING)
        self.address = address
        try:
            self._client: Any = JobSubmissionClient(address)
        except Exception as error:  # of Ray, requests and aiohttp
            reason = " ".join(str(error).split())[:200]
            raise ConnectionError(
                f"{masked(address)}: no job server that lets us in ({masked(reason)}). Give --address "
                "http://HEAD:8265, and export RAY_AUTH_TOKEN where the cluster asks for a token"
            ) from error

    def submit(self, arguments: Sequence[str], name: str, carried: Sequence[str] = ()) -> tuple[str, bool]:
        """Submit a job of ours, once for each name.

        Args:
            arguments: the job and its arguments, as after `panoptic-ray`.
            name: of the submission; "" = one that is drawn.
            carried: files that are sent, too, by their paths relative to the working directory.

        Returns:
            the name, and False where a job of that name was there already.

        Raises:
            ValueError: an argument holds a password, a file cannot be sent, or it is too much.
        """
        name = name or f"{arguments[0]}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        command = shlex.join(["python", f"jobs/{arguments[0]}.py", *arguments[1:]])
        if masked(command) != command:
            raise ValueError(
                f"{masked(command)}: whoever reaches the job server reads a job's command; take the password out of "
                "it, and export it where the cluster's machines start Ray (MLFLOW_TRACKING_USERNAME, _PASSWORD, AWS_…)"
            )
        if self.status(name):
            return name, False
        with tempfile.TemporaryDirectory() as folder:
            stage(Path(folder) / "code", carried)
            environment = {
                "working_dir": str(pack(Path(folder) / "code")),
                "env_vars": settings(os.environ),
                "config": {"setup_timeout_seconds": SETUP},
            }
            self._client.submit_job(entrypoint=command, submission_id=name, runtime_env=environment)
        return name, True

    def status(self, name: str) -> str:
        """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED; "" where there is no such job.

        Raises:
            ConnectionError: the job server does not answer.
        """
        try:
            jobs = self._client.list_jobs()
        except (RuntimeError, OSError) as error:  # of Ray and of requests
            raise ConnectionError(f"{masked(self.address)}: {masked(first_line(error))}") from error
        return next((str(job.status.value) for job in jobs if job.submission_id == name), "")

    def follow(self, name: str, write: Callable[[str], object]) -> None:
        """Pass on what a job prints, from its beginning to its end, also over a connection that breaks.

        Raises:
            ConnectionError: the job server was away for `PATIENCE`; the job may go on.
        """
        shown, away = 0, 0.0

        async def tail() -> None:
            nonlocal shown
            place = 0
            async for text in self._client.tail_job_logs(name):
                new = text[max(0, shown - place) :]
                place += len(text)
                shown = max(shown, place)
                write(new)

        while True:
            try:
                ended = self.status(name) in ENDED
                asyncio.run(tail())
                away = 0.0
            except Exception as error:  # of Ray, requests and aiohttp; what was shown is not shown again
                away = away or time.monotonic()
                if time.monotonic() - away > PATIENCE:
                    raise ConnectionError(f"{masked(self.address)}: lost while {name} ran; it may go on") from error
                time.sleep(PAUSE)
                continue
            if ended:
                return
            time.sleep(0.2)

    def stop(self, name: str) -> str:
        """Ask a job to end, wait until it has, and return its status."""
        self._client.stop_job(name)
        while (status := self.status(name)) not in ENDED:
            time.sleep(0.5)
        return status

    def exit_code(self, name: str) -> tuple[int, str]:
        """The exit code of a job that ended, and why where Ray ended it."""
        info = self._client.get_job_info(name)
        status = str(info.status.value)
        if status == "SUCCEEDED":
            return 0, ""
        if status == "STOPPED":
            return STOPPED, "it was stopped"
        if info.driver_exit_code is None:
            return 2, masked(first_line(info.message or "Ray did not start it"))
        return int(info.driver_exit_code), ""


def first_line(error: object) -> str:
    """The first line that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a job gets.

    Raises:
        ValueError: one holds a password.
    """
    kept = {name: environment[name] for name in SETTINGS if environment.get(name)}
    for name, value in kept.items():
        if masked(value) != value:
            raise ValueError(
                f"{name}={masked(value)}: a job's settings can be read by whoever reaches the job server; take the "
                "password out, and export it where the cluster's machines start Ray"
            )
    return {**DEFAULTS, **commit(), **kept}


def withheld(environment: Mapping[str, str]) -> list[str]:
    """Names of the variables of this machine that a job does not get because they are secrets."""
    return sorted(name for name, value in environment.items() if value and SECRETS.match(name))


def commit() -> dict[str, str]:
    """The commit of the code that is sent, which has no .git there, and whether files differ from it."""
    if not (REPOSITORY / ".git").exists():
        return {}
    try:
        head, changed = (
            subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True, timeout=10, check=True)
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"PANOPTIC_COMMIT": head.stdout.strip(), "PANOPTIC_DIRTY": str(bool(changed.stdout.strip())).lower()}


def code_files(root: Path = REPOSITORY) -> list[str]:
    """The files of our packages, relative to `root`; neither links nor what begins with a dot."""
    found = []
    for package in PACKAGES:
        for folder, folders, names in os.walk(root / package):
            folders[:] = sorted(f for f in folders if not f.startswith((".", "__pycache__")))
            place = Path(folder)
            found += [
                (place / name).relative_to(root).as_posix()
                for name in sorted(names)
                if name.endswith(SUFFIXES) and not name.startswith(".") and not (place / name).is_symlink()
            ]
    return found


def stage(folder: Path, carried: Sequence[str] = (), root: Path = REPOSITORY) -> list[tuple[str, int]]:
    """Copy what is sent into a folder; its files and their bytes.

    Raises:
        ValueError: the code is larger than code is, or a file lies elsewhere or is none.
    """
    files = [(name, (root / name).stat().st_size) for name in code_files(root)]
    if (total := sum(size for _, size in files)) > MOST:
        largest = max(files, key=lambda entry: entry[1])[0]
        raise ValueError(
            f"{root}: {total:,} bytes of code, of which {MOST:,} are sent at most; the largest is {largest}"
        )
    for name in carried:
        path = Path(name)
        if path.is_absolute() or ".." in path.parts or not path.is_file():
            raise ValueError(
                f"--carry {name}: no file below the working directory; give a relative path, or put it on S3"
            )
        files.append((path.as_posix(), path.stat().st_size))
    for name, _ in files:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(name if name in carried else root / name, target)
    return files


def pack(folder: Path) -> Path:
    """A compressed archive of a staged folder, beside it: Ray would send the folder itself uncompressed.

    The same files give the same bytes, by whose hash Ray knows what a cluster has already.
    """
    file = folder.with_suffix(".zip")
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(path.relative_to(folder).as_posix())  # without the time of the copy
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
    return file


def python_of() -> str:
    """This Python, as a person types it."""
    return os.path.relpath(sys.executable)

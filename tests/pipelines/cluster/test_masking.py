"""Users and passwords in URIs, which messages must not show."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap

import pytest

from jobs.common import command
from pipelines.cluster import storage
from pipelines.cluster.masking import Masking, masked, masked_values


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:hunter2@host:5432/mlflow", "postgresql://***@host:5432/mlflow"),
        ("mysql+pymysql://me:p@ss@host/db", "mysql+pymysql://***@host/db"),
        ("https://token@host and s3://key:secret@bucket/x", "https://***@host and s3://***@bucket/x"),
        ("postgresql://host/db?user=me&password=hunter2&x=1", "postgresql://host/db?user=me&password=***&x=1"),
        (
            "https://bucket/key?X-Amz-Signature=abc&X-Amz-Security-Token=d",
            "https://bucket/key?X-Amz-Signature=***&X-Amz-Security-Token=***",
        ),
        ("models:/street@champion", "models:/street@champion"),
        ("s3://bucket/a@b/c, sqlite:////home/a@b/mlflow.db", "s3://bucket/a@b/c, sqlite:////home/a@b/mlflow.db"),
        ("http://host:5000/#/experiments?page=2", "http://host:5000/#/experiments?page=2"),
    ],
)
def test_users_and_passwords_are_masked_and_nothing_else(text: str, shown: str) -> None:
    assert masked(text) == shown


def test_a_command_prints_and_logs_no_password(capsys: pytest.CaptureFixture[str]) -> None:
    def failing(arguments: object) -> None:
        raise OSError("postgresql://me:hunter2@host/db is away")

    with pytest.raises(SystemExit):
        command(failing)
    assert capsys.readouterr().err == "error: postgresql://***@host/db is away\n"
    record = logging.LogRecord("x", logging.INFO, "", 0, "%s is %d", ("http://me:hunter2@host", 3), None)
    assert Masking().filter(record) and record.getMessage() == "http://***@host is 3"


@pytest.mark.parametrize("uri", ["ftp://me:hunter2@host/x", "https://me:hunter2@host"])
def test_storage_that_is_refused_shows_no_password(uri: str) -> None:
    with pytest.raises(ValueError, match=r"://\*\*\*@host.*unknown kind of storage") as refused:
        storage.resolve(uri)
    assert "hunter2" not in str(refused.value)


def test_what_a_process_prints_is_masked_tracebacks_included() -> None:
    """Also what other libraries print, and lines of Ray's workers that pass through."""
    program = textwrap.dedent(
        """
        import sys, threading
        from pipelines.cluster.masking import mask_output
        mask_output()
        mask_output()
        print("http://me:hunter2@host", ["s3://me:hunter2@b/x"])
        sys.stderr.writelines(["postgresql://me:hunter2@host/db\\n"])
        def fail():
            raise ValueError("in a thread, http://me:hunter2@host")
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        assert sys.stdout.isatty() is False and sys.stdout.encoding
        raise RuntimeError("broke at https://me:hunter2@host?token=" + "hunter2")
        """
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and done.stdout == "http://***@host ['s3://***@b/x']\n"
    assert "RuntimeError: broke at https://***@host?token=***\n" in done.stderr
    assert "postgresql://***@host/db" in done.stderr and "in a thread, http://***@host" in done.stderr


def test_options_are_masked_however_deep_they_lie() -> None:
    given = {"a": ("s3://k:s@b", 1), "b": [{"c": "http://u:p@h"}], "d": None, "e": 0.5}
    assert masked_values(given) == {"a": ("s3://***@b", 1), "b": [{"c": "http://***@h"}], "d": None, "e": 0.5}

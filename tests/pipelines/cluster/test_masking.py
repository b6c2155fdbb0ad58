"""Users and passwords in URIs, which messages must not show."""

from __future__ import annotations

import logging

import pytest

from jobs.common import command
from pipelines.cluster import storage
from pipelines.cluster.masking import Masking, masked


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

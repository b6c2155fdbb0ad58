"""A PostgreSQL of its own, from the programs of Debian's package `postgresql`."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.two_nodes import free_ports

MISSING = "PostgreSQL's server is not installed (no initdb and postgres): on Debian and Ubuntu, apt install postgresql"

FOLDER = Path("/usr/lib/postgresql")
"""Of Debian's package: a folder a version."""


def program(name: str) -> str:
    """Path of a program of the server, which Debian keeps off the PATH.

    Raises:
        FileNotFoundError: it is not installed; says how it is.
    """
    folders = sorted(FOLDER.glob("*/bin"), key=lambda path: float(path.parent.name))
    found = next((str(path / name) for path in reversed(folders) if (path / name).exists()), shutil.which(name))
    if found is None:
        raise FileNotFoundError(MISSING)
    return found


def check() -> None:
    """Look for the server's programs, before anything is started.

    Raises:
        FileNotFoundError: they are not installed; says how they are.
    """
    for name in ("initdb", "postgres"):
        program(name)


@contextmanager
def postgres(folder: Path, database: str) -> Iterator[tuple[str, str]]:
    """URI without a password of an empty database on the loopback address, and its password, while it lasts.

    Args:
        folder: an empty one, which the server's user must be able to reach.
        database: its name, and that of its user.
    """
    import psycopg2

    data, password = folder / "data", secrets.token_hex(16)
    (port,) = free_ports(1)
    data.mkdir(mode=0o700)
    (folder / "password").write_text(password)
    user = None
    if os.getuid() == 0:  # whom the server refuses; the package has made a user for it
        user = "postgres"
        for path in (folder, data, folder / "password"):
            shutil.chown(path, user)
    initialise = [program("initdb"), "-D", str(data), "-U", database, "--auth=scram-sha-256", "--no-sync"]
    initialise += ["--pwfile", str(folder / "password"), "--encoding=UTF8", "--locale=C.UTF-8"]
    subprocess.run(initialise, user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (folder / "password").unlink()
    command = [program("postgres"), "-D", str(data), "-h", "127.0.0.1", "-p", port, "-k", str(folder)]
    with (folder / "log.txt").open("wb") as log:
        server = subprocess.Popen(command, user=user, cwd=folder, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 60
        while True:
            try:
                connection = psycopg2.connect(
                    dbname="postgres", host="127.0.0.1", port=port, user=database, password=password
                )
                break
            except psycopg2.OperationalError:
                if server.poll() is not None or time.monotonic() > end:
                    raise
                time.sleep(0.1)
        connection.autocommit = True
        connection.cursor().execute(f'CREATE DATABASE "{database}"')
        connection.close()
        yield f"postgresql+psycopg2://{database}@127.0.0.1:{port}/{database}", password
    finally:
        server.send_signal(signal.SIGINT)  # its fast shutdown
        server.wait()

"""MLflow's own server in a process beside this one, with or without a password."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.two_nodes import free_ports


@contextmanager
def tracking_server(
    folder: Path,
    artifacts: str,
    template: Path | None = None,
    password: str = "",
    store: str = "",
    direct: bool = False,
) -> Iterator[str]:
    """Its URI, while it lasts.

    Args:
        folder: of its database and log.
        artifacts: where it keeps artifacts, which clients send to it; s3:// with this process's variables.
        template: a migrated database, which saves seconds.
        password: of its user admin; "" = everybody is let in.
        store: URI of its database, in place of a SQLite file in `folder`.
        direct: clients bring artifacts to `artifacts` themselves, in place of the server.
    """
    if template is not None:
        shutil.copy(template, folder / "server.db")
    (port,) = free_ports(1)
    command = [str(Path(sys.executable).parent / "mlflow"), "server", "--host", "127.0.0.1", "--port", port]
    command += ["--backend-store-uri", store or f"sqlite:///{folder / 'server.db'}", "--workers", "1"]
    command += ["--allowed-hosts", f"127.0.0.1:{port},localhost:{port}"]
    if direct:
        command += ["--no-serve-artifacts", "--default-artifact-root", artifacts]
    else:
        command += ["--artifacts-destination", artifacts]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    if password:
        (folder / "auth.ini").write_text(
            "[mlflow]\ndefault_permission = READ\n"
            f"database_uri = sqlite:///{folder / 'auth.db'}\nadmin_username = admin\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
            "auth_cache_ttl_seconds = 60\n"
        )
        command += ["--app-name", "basic-auth"]
        environment |= {"MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"), "MLFLOW_AUTH_ADMIN_PASSWORD": password}
        environment["MLFLOW_FLASK_SERVER_SECRET_KEY"] = secrets.token_hex(16)
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        end = time.monotonic() + 120
        while True:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            if time.monotonic() > end or server.poll() is not None:
                raise RuntimeError(f"MLflow's server did not start: {(folder / 'server.log').read_text()}")
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()

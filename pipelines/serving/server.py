"""Starting and ending a server on Ray Serve."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pipelines.cluster import session
from pipelines.evaluation.evaluate import identify

NAME = "panoptic"
"""The name of the application in Ray Serve, and on its dashboard."""


@dataclass(frozen=True)
class Server:
    """The size of a server, and the address where it listens."""

    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    batch: int = 8
    wait: float = 0.01
    waiting: int = 100
    threads: int = 1
    gpu: Literal["auto", "yes", "no"] = "auto"


@contextlib.contextmanager
def serving(source: str, tracking_uri: str, server: Server) -> Iterator[str]:
    """A model behind HTTP for as long as the block lasts; gives the address.

    Ray is joined where there is one, else started.

    Args:
        source: of the model, as `pipelines.evaluation.evaluate.load` takes it.
        tracking_uri: of MLflow's store, for models in it.

    Raises:
        ValueError: the extra is not installed, there is no such model, the address is taken, or no replica comes up.
    """
    try:
        from ray import serve

        from pipelines.serving.deployment import application
    except ImportError as error:
        raise ValueError(f"Ray Serve is not installed ({error}): pip install 'panoptic-ray[serve]'") from error
    fixed, _ = identify(source, tracking_uri)
    _check_address(server.host, server.port)
    session.connect(cpus=max(os.cpu_count() or 1, server.replicas * server.threads + 1))
    import ray

    gpus = ray.cluster_resources().get("GPU", 0)
    if server.gpu == "yes" and gpus < server.replicas:
        raise ValueError(f"--gpu yes: {server.replicas} replicas need as many GPUs, the cluster has {gpus:g}")
    each = 1.0 if server.gpu != "no" and gpus >= server.replicas else 0.0
    size = (server.replicas, server.batch, server.wait, server.waiting, server.threads)
    serve.start(http_options={"host": server.host, "port": server.port})
    try:
        try:
            quiet = {"enable_access_log": False}  # a line for each request would hide those of what fails
            app = application(fixed, tracking_uri, *size, each)
            serve.run(app, name=NAME, route_prefix="/", logging_config=quiet)
        except RuntimeError as error:  # Ray Serve tells why in its log, and in the status of the deployment
            raise ValueError(f"{source}: no replica came up: {_reason(serve, error)}") from error
        yield f"http://{server.host}:{server.port}"
    finally:
        serve.shutdown()


def _check_address(host: str, port: int) -> None:
    """Refuse an address that another program has; on other machines of a cluster Ray Serve says so.

    Raises:
        ValueError: names it.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            raise ValueError(
                f"--host {host} --port {port}: {'another program listens there' if taken else error.strerror}; give "
                "another one"
            ) from error


def _reason(serve: object, error: Exception) -> str:
    """The last line of what a deployment says of its failure."""
    deployments = serve.status().applications[NAME].deployments.values()  # type: ignore[attr-defined]
    lines = [line for one in deployments for line in one.message.strip().splitlines() if line.strip()]
    return (lines or [str(error)])[-1].strip()

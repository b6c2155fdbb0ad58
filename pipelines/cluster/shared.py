"""Folders of a cluster of several machines: what a driver names must be there on every one of them."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping

from pipelines.cluster import storage

REMEDY = "give s3://bucket/folder, or a folder that all machines mount"

PATIENCE = 120
"""Seconds for which the machines are waited for."""


def check_shared(read: Mapping[str, str], written: Mapping[str, str]) -> None:
    """Refuse local paths that a machine of the joined cluster does not see. On one machine nothing is asked.

    Every machine looks for itself, in a task that reserves nothing. A path that is only read may be a copy of each
    machine's own; a folder that is written must be the same one, which a file shows that this process puts into it.

    Args:
        read: option -> file or folder; those on S3 and empty ones are left out.
        written: option -> folder, which is made where it is not there.

    Raises:
        ValueError: names the option, the path and the machine.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    wanted = {option: path for option, uri in read.items() if uri and "://" not in (path := storage.absolute(uri))}
    folders = {option: path for option, uri in written.items() if uri and "://" not in (path := storage.absolute(uri))}
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2 or not wanted | folders:
        return
    probes = {}
    try:
        for option, folder in folders.items():
            os.makedirs(folder, exist_ok=True)
            probe = os.path.join(folder, f".seen-{uuid.uuid4().hex[:8]}")
            with open(probe, "xb"):
                probes[option] = probe
        look = ray.remote(num_cpus=0, max_retries=0)(missing)
        asked = {
            node["NodeManagerAddress"]: look.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote({**wanted, **probes})
            for node in nodes
        }
        for address, answer in asked.items():
            for option in ray.get(answer, timeout=PATIENCE):
                place = {**wanted, **folders}[option]
                raise ValueError(f"{option} {place}: the machine {address} of the cluster does not see it; {REMEDY}")
    finally:
        for probe in probes.values():
            os.remove(probe)


def missing(paths: Mapping[str, str]) -> list[str]:
    """The options whose paths are not there on this machine."""
    return [option for option, path in paths.items() if not os.path.exists(path)]

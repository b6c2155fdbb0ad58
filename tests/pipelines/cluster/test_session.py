"""A local session beside another one on the same machine."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import os
from pipelines.cluster import session
session.connect(2)
assert "RAY_API_SERVER_ADDRESS" not in os.environ  # for the session's processes only
import ray

@ray.remote
def nodes():
    from ray.util.state import list_nodes
    return len(list_nodes())

print("nodes", ray.get(nodes.remote()))
"""


def test_processes_of_a_local_session_ask_their_own_server(ray_cluster) -> None:
    """Ray's state API looks for any running session otherwise, and fails where it finds two."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "nodes 1"

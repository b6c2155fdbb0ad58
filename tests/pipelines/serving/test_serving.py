"""A model behind HTTP: the maps of this process, under load, with a replica killed, and no map of what is no image."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket

import cv2
import numpy as np
import pytest

import panoptic
from pipelines.serving.server import Server, serving
from tests.support.load_client import ask, health, load
from tests.support.stored import write_model


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    """Photographs of two sizes."""
    rng = np.random.default_rng(0)
    sizes = [(64, 48), (64, 48), (48, 64)]
    pixels = [cv2.resize(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8), size) for size in sizes]
    return [cv2.imencode(".png", image)[1].tobytes() for image in pixels]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_what_cannot_be_served_is_refused_before_ray_starts(tmp_path, small_categories) -> None:
    pytest.importorskip("ray.serve")
    with pytest.raises(ValueError, match="no checkpoint there"):
        serving(str(tmp_path / "nothing"), "", Server()).__enter__()
    folder = write_model(tmp_path / "step", small_categories)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port}: another program listens there"):
            serving(folder, "", Server(port=port)).__enter__()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_no_request_is_lost(ray_cluster, tmp_path, small_categories, images, capsys) -> None:
    folder = write_model(tmp_path / "step", small_categories, seed=4)
    model = panoptic.load(folder, device="cpu")
    expected = [result.to_coco("image") for result in model(images)]
    with serving(folder, "", Server(port=free_port(), replicas=2, batch=4, wait=0.02)) as address:
        told = health(address)
        assert told["status"] == "ok" and told["classes"] == list(small_categories.names)
        for clients in (1, 4, 16):
            seen = load(address, images, clients, 24)
            for number, answer in enumerate(seen.answers):
                assert answer.status == 200, answer.content
                content, (png, record) = json.loads(answer.content), expected[number % 3]
                assert base64.b64decode(content["png"]) == png
                assert content["segments"] == json.loads(json.dumps(record["segments_info"]))
            print(seen.sentence(clients))
        told = health(address)  # of one replica; another question may go to the other
        assert told["images"] > told["batches"] > 0  # several at once

        for body, words in ((b"no image", "the body"), (b"", "the body is empty")):
            answer = ask(address, "/segment", body)
            reason = json.loads(answer.content)["error"]
            assert answer.status == 400 and reason.startswith(words) and "\n" not in reason
        assert ask(address, "/segment?format=gif", images[0]).status == 400
        assert ask(address, "/other").status == 404
        assert ask(address, "/segment?format=png", images[0]).content == expected[0][0]
        overlay = cv2.imdecode(np.frombuffer(ask(address, "/segment?format=overlay", images[0]).content, np.uint8), 1)
        assert overlay.shape == (48, 64, 3)

        killed: list[int] = []

        def kill(number: int) -> None:
            if number == 12:
                killed.append(health(address)["process"])
                os.kill(killed[0], signal.SIGKILL)

        seen = load(address, images, 8, 60, kill)
        assert killed and [answer.status for answer in seen.answers] == [200] * 60

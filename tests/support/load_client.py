"""Clients that ask a server for the maps of photographs, several at once."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple
from urllib.parse import urlsplit


class Answer(NamedTuple):
    status: int
    content: bytes
    seconds: float


class Load(NamedTuple):
    """What clients saw."""

    answers: list[Answer]
    seconds: float

    def sentence(self, clients: int) -> str:
        """Images per second and how long one took, as a row of a table."""
        took = sorted(answer.seconds for answer in self.answers)
        middle, slow = took[len(took) // 2], took[int(0.95 * (len(took) - 1))]
        rate = len(took) / self.seconds
        return f"| {clients} | {rate:.1f} | {1000 * middle:.0f} | {1000 * slow:.0f} |"


def ask(address: str, path: str, body: bytes | None = None) -> Answer:
    """One request on a connection of its own: POST where there is a body."""
    began = time.perf_counter()
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    try:
        connection.request("GET" if body is None else "POST", path, body)
        answer = connection.getresponse()
        return Answer(answer.status, answer.read(), time.perf_counter() - began)
    finally:
        connection.close()


def load(
    address: str, images: Sequence[bytes], clients: int, count: int, between: Callable[[int], None] = lambda done: None
) -> Load:
    """Ask for `count` images, so many at once; `between` is told before each request how many went before."""

    def one(number: int) -> Answer:
        between(number)
        return ask(address, "/segment", images[number % len(images)])

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(one, range(count)))
    return Load(answers, time.perf_counter() - began)


def health(address: str) -> dict:
    """What the server says of itself."""
    answer = ask(address, "/health")
    assert answer.status == 200, answer.content
    return json.loads(answer.content)

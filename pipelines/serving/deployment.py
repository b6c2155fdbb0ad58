"""The deployments of Ray Serve: replicas that hold the model, and one in front that speaks HTTP.

| request | answer |
|---|---|
| POST /segment, the body an image file | JSON: `png` (base64, the PNG of segment ids), `segments` as in COCO-panoptic |
| POST /segment?format=png | the PNG of segment ids |
| POST /segment?format=overlay | a JPEG of the map over the photograph |
| GET /health | 200 while a replica answers, with the model and its classes; else 503 |

What is no image gets 400, a body that is too large 413, and a request where too many wait already 503, each with one
line under `error`. A request whose replica died goes to another one, since a photograph may be segmented twice. The
deployment in front holds no model and does little that could end it; its clients' requests would get 500 then.

Requests of several clients that come within a few milliseconds go through the network together (dynamic batching);
only photographs of one size can.
"""

from __future__ import annotations

import asyncio
import base64
import os
from typing import Any

import torch
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from panoptic.png import decode_image, encode_jpeg
from panoptic.predictor import Predictor, stored_resize
from panoptic.training.device import Engine, prepare
from pipelines.evaluation import evaluate

FORMATS = ("json", "png", "overlay")

TRIES = 5
"""Replicas that a request is given to, when one after the other dies over it."""

LARGEST = 64 << 20
"""Bytes of the largest image file that is taken."""

HEALTH_PATIENCE = 10.0
"""Seconds in which a replica has to answer for the server to be healthy."""


class Segmenter:
    """A replica: the model, and the batches that it is given.

    Args:
        source: URI of one fixed version of the model.
        tracking_uri: of MLflow's store, for models in it.
        batch: most photographs of a batch.
        wait: seconds that the first photograph of a batch waits for others.
        threads: of torch.
    """

    def __init__(self, source: str, tracking_uri: str, batch: int, wait: float, threads: int) -> None:
        torch.set_num_threads(threads)
        stored = evaluate.load(source, tracking_uri)
        engine = Engine(precision=stored.options.get("engine.precision", "float32"))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.predictor = Predictor(prepare(stored.model, device, engine), stored_resize(stored.options), engine)
        self.failure: Exception | None = None
        self.images = self.batches = 0
        self.segment.set_max_batch_size(batch)  # type: ignore[attr-defined]
        self.segment.set_batch_wait_timeout_s(wait)  # type: ignore[attr-defined]

    @serve.batch
    async def segment(self, requests: list[tuple[bytes, str]]) -> list[dict[str, Any]]:
        """Answers to a batch of image files, each with the format of its answer.

        One is {"content": bytes, or what becomes JSON}, or {"error": reason} where the bytes are no image.
        """
        return await asyncio.to_thread(self._segment, requests)  # meanwhile the next batch fills

    def _segment(self, requests: list[tuple[bytes, str]]) -> list[dict[str, Any]]:
        images, formats = zip(*requests, strict=True)
        answers: list[dict[str, Any]] = [{} for _ in images]
        pixels = {}
        for place, data in enumerate(images):
            try:
                pixels[place] = decode_image(data, "the body")
            except ValueError as error:
                answers[place] = {"error": str(error)}
        try:
            results = self.predictor(list(pixels.values()), batch=len(images))
        except Exception as error:  # of the network or the device; the next health check replaces the replica
            self.failure = error
            raise
        self.images, self.batches = self.images + len(images), self.batches + 1
        for place, result in zip(pixels, results, strict=True):
            if formats[place] == "overlay":
                answers[place] = {"content": encode_jpeg(result.draw(), 90)}
                continue
            png, record = result.to_coco("image")
            if formats[place] == "png":
                answers[place] = {"content": png}
            else:
                text = base64.b64encode(png).decode()
                answers[place] = {"content": {"png": text, "segments": record["segments_info"]}}
        return answers

    async def about(self) -> dict[str, Any]:
        """The model, its process, and the work that it has done."""
        done = {"process": os.getpid(), "images": self.images, "batches": self.batches}
        return {"model": repr(self.predictor), "classes": list(self.predictor.categories.names), **done}

    def check_health(self) -> None:
        """Called by Ray Serve from time to time; a replica that raises is replaced."""
        if self.failure is not None:
            raise RuntimeError(f"the model failed: {self.failure}")


class Front:
    """The HTTP front end: checks a request, gives it to a replica, and to another one where that dies."""

    def __init__(self, segmenter: DeploymentHandle, source: str) -> None:
        self.segmenter, self.source = segmenter, source

    async def __call__(self, request: Request) -> Response:
        """The answer to a request."""
        match request.method, request.url.path.rstrip("/"):
            case "POST", "/segment":
                return await self._segment(request)
            case "GET", "/health":
                return await self._health()
        return _refuse(404, "there are POST /segment, with an image file as the body, and GET /health")

    async def _segment(self, request: Request) -> Response:
        kind = request.query_params.get("format", "json")
        if kind not in FORMATS:
            return _refuse(400, f"format={kind}: there are {', '.join(FORMATS)}")
        if int(request.headers.get("content-length") or 0) > LARGEST:
            return _refuse(413, f"the body is larger than {LARGEST >> 20} MiB")
        image = await request.body()
        if not image:
            return _refuse(400, "the body is empty; send the bytes of an image file")
        try:
            answer = await self._ask(image, kind)
        except RayServeException as error:  # too many wait, or there is no replica
            return _refuse(503, " ".join(str(error).split())[:300], {"Retry-After": "1"})
        except RayError as error:
            return _refuse(500, (str(error).strip().splitlines() or [type(error).__name__])[-1][:300])
        if "error" in answer:
            return _refuse(400, answer["error"])
        if kind == "json":
            return JSONResponse(answer["content"])
        return Response(answer["content"], media_type="image/png" if kind == "png" else "image/jpeg")

    async def _ask(self, image: bytes, kind: str) -> dict[str, Any]:
        """The answer of a replica that lives.

        Raises:
            RayActorError: several died over it.
        """
        for left in range(TRIES - 1, -1, -1):
            try:
                return await self.segmenter.segment.remote((image, kind))
            except RayActorError:
                if not left:
                    raise
        raise AssertionError

    async def _health(self) -> Response:
        try:
            about = await asyncio.wait_for(_value(self.segmenter.about.remote()), HEALTH_PATIENCE)
        except (RayError, RayServeException, TimeoutError) as error:
            return _refuse(503, f"no replica answers ({type(error).__name__})")
        return JSONResponse({"status": "ok", "source": self.source, **about})


async def _value(response: Any) -> Any:
    return await response


def _refuse(status: int, reason: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": reason}, status, headers)


def application(
    source: str, tracking_uri: str, replicas: int, batch: int, wait: float, waiting: int, threads: int, gpus: float
) -> serve.Application:
    """Both deployments, bound.

    Args:
        source, tracking_uri, batch, wait, threads: of `Segmenter`.
        replicas: that hold the model.
        waiting: requests that may wait for a place in a batch; more are refused.
        gpus: of each replica.
    """
    segmenter = serve.deployment(Segmenter, name="Segmenter").options(
        num_replicas=replicas,
        max_ongoing_requests=2 * batch,  # one batch in the network, one that fills
        max_queued_requests=waiting,
        health_check_period_s=5,
        ray_actor_options={"num_cpus": threads, "num_gpus": gpus},
    )
    front = serve.deployment(Front, name="Front").options(
        max_ongoing_requests=waiting + 2 * batch * replicas + 10, ray_actor_options={"num_cpus": 0}
    )
    return front.bind(segmenter.bind(source, tracking_uri, batch, wait, threads), source)

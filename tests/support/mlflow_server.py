"""As much of MLflow's REST interface as a run's writes need, from memory, with faults that a test switches on."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts/"


class MlflowServer:
    """One run in experiment "0" on a loopback port, which is the same after `stop` and `start`."""

    def __init__(self) -> None:
        self.run_id = uuid.uuid4().hex
        """Another one for each server: MLflow keeps where a run's artifacts go, by its id, for the whole process."""
        self.delay = 0.0
        """Seconds before each answer."""
        self.status = 200
        """500 and the like: answered to everything instead of doing it."""
        self.lost_answers = 0
        """So many writes are done, and then answered with 500."""
        self.refused = ""
        """Artifacts of this name are answered with 400."""
        self.broken = ""
        """Artifacts of this name are answered with 500."""
        self.metrics: list[tuple[str, int, float, int]] = []
        """(key, step, value, timestamp) as the store holds them: an equal one is stored once, as MLflow does."""
        self.received: Counter[tuple[str, int]] = Counter()
        """How often each (key, step) came, stored or not."""
        self.tags: dict[str, str] = {}
        self.artifacts: dict[str, bytes] = {}
        self.uploads: Counter[str] = Counter()
        self.requests: list[str] = []
        self.run_status = "RUNNING"
        self._server: ThreadingHTTPServer | None = None
        self._port = 0
        self.start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listen."""
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), _handler(self))
        self._server.daemon_threads = True
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def steps(self, key: str) -> list[int]:
        """The steps of a metric in the order in which they came."""
        return [step for name, step, _, _ in self.metrics if name == key]

    def answer(self, path: str, query: dict[str, str], body: bytes) -> dict[str, Any]:
        """The content of the answer to a request that is granted."""
        if path.startswith(ARTIFACTS):
            name = unquote(path.removeprefix(ARTIFACTS)).removeprefix(f"0/{self.run_id}/artifacts/")
            self.uploads[name] += 1
            self.artifacts[name] = body
            return {}
        call, sent = path.split("/mlflow/")[1], json.loads(body or b"{}")
        if call == "runs/get":
            latest = {key: (step, value, stamp) for key, step, value, stamp in self.metrics}
            metrics = [{"key": k, "step": s, "value": v, "timestamp": t} for k, (s, v, t) in latest.items()]
            tags = [{"key": key, "value": value} for key, value in self.tags.items()]
            return {"run": {"info": self._info(), "data": {"metrics": metrics, "tags": tags}}}
        if call == "metrics/get-history":
            entries = [m for m in self.metrics if m[0] == query["metric_key"]]
            return {"metrics": [{"key": k, "step": s, "value": v, "timestamp": t} for k, s, v, t in entries]}
        if call == "runs/log-batch":
            for metric in sent.get("metrics", ()):
                entry = (metric["key"], int(metric["step"]), float(metric["value"]), int(metric["timestamp"]))
                self.received[entry[:2]] += 1
                if entry not in self.metrics:
                    self.metrics.append(entry)
            self.tags |= {tag["key"]: tag["value"] for tag in sent.get("tags", ())}
            return {}
        if call == "runs/set-tag":
            self.tags[sent["key"]] = sent["value"]
            return {}
        if call == "runs/update":
            self.run_status = sent["status"]
            return {"run_info": self._info()}
        if call == "experiments/search":
            return {"experiments": []}
        raise AssertionError(f"the test server does not know {path}")

    def _info(self) -> dict[str, Any]:
        where = f"mlflow-artifacts:/0/{self.run_id}/artifacts"
        return {"run_id": self.run_id, "experiment_id": "0", "status": self.run_status, "artifact_uri": where}


def _handler(server: MlflowServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlparse(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            server.requests.append(url.path)
            time.sleep(server.delay)
            status, content = server.status, {}
            if status == 200 and server.refused and url.path.endswith(server.refused):
                status, content = 400, {"error_code": "INVALID_PARAMETER_VALUE", "message": "not this one"}
            elif status == 200 and server.broken and url.path.endswith(server.broken):
                status = 500
            elif status == 200:
                content = server.answer(url.path, {k: v[0] for k, v in parse_qs(url.query).items()}, body)
                if server.lost_answers and self.command != "GET":
                    server.lost_answers -= 1
                    status, content = 500, {}
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_PUT = do_PATCH = do_GET

        def log_message(self, *_: object) -> None:
            """Silent."""

        def handle(self) -> None:
            try:
                super().handle()
            except ConnectionError:
                return  # the client gave up before a delayed answer

    return Handler

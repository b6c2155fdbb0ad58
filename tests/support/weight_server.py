"""A server of weights on this machine, and a small file in the form in which DETR's authors publish theirs."""

from __future__ import annotations

import io
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from panoptic.models.detr.model import DETRConfig
from panoptic.segmentation import Categories

ORIGINAL = (
    (r"backbone\.(.+)", r"detr.backbone.0.body.\1"),
    (r"((?:en|de)coder\..+)", r"detr.transformer.\1"),
    (r"class_head\.layers\.0\.(.+)", r"detr.class_embed.\1"),
    (r"box_head\.(.+)", r"detr.bbox_embed.\1"),
    (r"queries\.weight", "detr.query_embed.weight"),
    (r"projection\.(.+)", r"detr.input_proj.\1"),
    (r"mask_attention\.(q|k)(?:uery|ey)\.(.+)", r"bbox_attention.\1_linear.\2"),
    (r"mask_head\.predictor\.(.+)", r"mask_head.out_lay.\1"),
)
"""Our names, and those of facebookresearch/detr."""


def published_detr(config: DETRConfig, categories: Categories) -> tuple[bytes, dict[str, torch.Tensor]]:
    """A .pth file of random weights as DETR's authors publish theirs, and the weights under our names."""
    torch.manual_seed(5)
    weights = config.build(categories).state_dict()
    file = io.BytesIO()
    torch.save({"model": {_original(key): v for key, v in weights.items() if key != "classes.index"}}, file)
    return file.getvalue(), weights


def _original(key: str) -> str:
    for ours, theirs in (("convs", "lay"), ("norms", "gn"), ("adapters", "adapter")):
        if match := re.fullmatch(rf"mask_head\.{ours}\.(\d)\.(.+)", key):
            return f"mask_head.{theirs}{int(match[1]) + 1}.{match[2]}"
    for ours, theirs in ORIGINAL:
        if re.fullmatch(ours, key):
            name = re.sub(rf"^{ours}$", theirs, key)
            return name.replace("self_attention", "self_attn").replace("cross_attention", "multihead_attn")
    raise AssertionError(key)


class WeightServer:
    """Counts what it is asked for; its answers can be made late, short or refused."""

    def __init__(self, url: str) -> None:
        self.url, self.files, self.asked = url, {}, []
        self.status, self.keep, self.late = 200, None, 0.0
        """Of the next answers: their code, how many of their bytes come, and after how many seconds."""


@contextmanager
def serve_weights() -> Iterator[WeightServer]:
    """A server on a free port of the loopback interface."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.path)
            time.sleep(state.late)
            content = state.files.get(self.path.rsplit("/", 1)[-1])
            self.send_response(404 if content is None else state.status)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if content is not None and state.status == 200:
                self.wfile.write(content[: state.keep])

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = WeightServer(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

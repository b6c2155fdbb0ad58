"""Downloads, whole or not at all; an error names the reason."""

from __future__ import annotations

import http.client
import logging
import shutil
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path

logger = logging.getLogger(__name__)

PATIENCE = 60
"""Seconds that a server may be silent."""

BLOCK = 1 << 20
TOLD_EVERY = 10.0
"""Seconds between two lines that say how far a download is."""


def download(url: str, file: Path) -> None:
    """Write what an address gives into a file. Proxies are those of the environment (HTTPS_PROXY, NO_PROXY).

    Args:
        url: http:// or https://.
        file: overwritten; holds a part where the download fails.

    Raises:
        ValueError: the server cannot be reached, refuses, or breaks off; one line with the reason.
        OSError: the file cannot be written, or the disk is too small for it.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "panoptic-ray"})
    try:
        # the opener of `urlopen` would keep the proxies of its first use
        with urllib.request.build_opener().open(request, timeout=PATIENCE) as answer:
            length = int(answer.headers.get("Content-Length") or 0)
            if length > shutil.disk_usage(file.parent).free:
                raise OSError(f"it has {length / 1e6:.0f} MB, more than the disk has room for")
            _copy(answer, length, file)
    except urllib.error.HTTPError as error:
        proxy = ", so the proxy wants a name and a password in HTTPS_PROXY" if error.code == 407 else ""
        raise ValueError(f"the server answers {error.code} {error.reason}{proxy}") from error
    except urllib.error.URLError as error:
        raise ValueError(
            f"no connection to {request.host} ({error.reason}): offline, or behind a proxy that HTTPS_PROXY does not "
            "name"
        ) from error
    except (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
        raise ValueError(f"the connection to {request.host} broke off ({error or type(error).__name__})") from error


def _copy(answer: http.client.HTTPResponse, length: int, file: Path) -> None:
    """Write an answer into a file, and say from time to time how far it is.

    Raises:
        ValueError: the answer is shorter than its head said.
    """
    told, done = time.monotonic(), 0
    with file.open("wb") as out:
        while block := answer.read(BLOCK):
            out.write(block)
            done += len(block)
            if time.monotonic() - told > TOLD_EVERY:
                told = time.monotonic()
                of = f" of {length / 1e6:.0f}" if length else ""
                logger.info("%.0f%s MB", done / 1e6, of)
    if done < length:
        raise ValueError(f"the download ended after {done} of {length} bytes")

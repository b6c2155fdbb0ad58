"""Passwords masked in messages, since URIs of stores may carry them."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping
from typing import Any, TextIO, cast

USER = re.compile(r"(?<=://)[^\s/?#'\"]*@")
"""The part before the host of a URI: user, password or both."""

PARAMETER = re.compile(
    r"(?<=[?&])([\w.-]*(?:password|passwd|pwd|secret|token|access_?key|signature)[\w.-]*=)[^&\s'\")]+", re.IGNORECASE
)
"""A parameter of a URI whose value is secret."""


def masked(text: object) -> str:
    """The text with `***` in place of users and passwords in all URIs that it holds."""
    return PARAMETER.sub(r"\1***", USER.sub("***@", str(text)))


def masked_values(values: Any) -> Any:
    """A value of JSON, options for example, with every text in it masked."""
    if isinstance(values, str):
        return masked(values)
    if isinstance(values, Mapping):
        return {key: masked_values(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(masked_values(value) for value in values)
    return values


class MaskedStream:
    """A text stream that masks what is written to it; in all else the stream that it wraps."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text, masked; its length."""
        self._stream.write(masked(text) if "://" in text else text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write lines, masked."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def mask_output() -> None:
    """Mask all that this process prints from now on, tracebacks and the lines of its workers among it."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, MaskedStream):
            setattr(sys, name, cast("TextIO", MaskedStream(stream)))


class Masking(logging.Filter):
    """Masks what other libraries log, too, where a handler has it."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep every record, masked."""
        record.msg, record.args = masked(record.getMessage()), None
        return True

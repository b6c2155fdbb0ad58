"""Passwords do not belong into messages: URIs of stores may carry them."""

from __future__ import annotations

import logging
import re

USER = re.compile(r"(?<=://)[^\s/?#'\"]*@")
"""The part before the host of a URI: user, password or both."""

PARAMETER = re.compile(
    r"(?<=[?&])([\w.-]*(?:password|passwd|pwd|secret|token|access_?key|signature)[\w.-]*=)[^&\s'\")]+", re.IGNORECASE
)
"""A parameter of a URI whose value is secret."""


def masked(text: object) -> str:
    """The text with `***` in place of users and passwords in all URIs that it holds."""
    return PARAMETER.sub(r"\1***", USER.sub("***@", str(text)))


class Masking(logging.Filter):
    """Masks what other libraries log, too, where a handler has it."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep every record, masked."""
        record.msg, record.args = masked(record.getMessage()), None
        return True

"""JSON files that this package wrote and reads again: cut short, empty or edited ones are told in one line."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipelines.cluster import storage


def read_json(uri: storage.Uri, shape: Any, remedy: str) -> Any:
    """The content of a file, checked.

    Args:
        uri: of the file.
        shape: a type that pydantic checks, such as a TypedDict, dict[str, float] or list[int].
        remedy: ends the message: what to do about a file that is no such thing.

    Raises:
        ValueError: it is no JSON in UTF-8, or of another shape; names the file and the first fault.
        OSError: it cannot be read.
    """
    return parse_json(storage.read_bytes(uri), shape, str(uri), remedy)


def parse_json(data: bytes | str, shape: Any, name: str, remedy: str) -> Any:
    """The content of the file `name` from its bytes or text, checked; arguments and errors as of `read_json`."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        said = "empty" if not data.strip() else f"cut short or no JSON ({' '.join(str(error).split())[:100]})"
        raise ValueError(f"{name}: {said}; {remedy}") from error
    try:
        return _adapter(shape).validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise ValueError(f"{name}: {place}: {first['msg'][:1].lower()}{first['msg'][1:]}; {remedy}") from error


@lru_cache(maxsize=32)
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)

"""A JSON object read in pieces, so that a file of hundreds of megabytes never stands in memory as Python objects.

The annotation files of large data sets are one object whose members are long lists. `members` hands such lists out in
pieces of a few megabytes, each a JSON list by itself that pydantic parses and checks at full speed, and every other
member whole. Where pieces begin and end follows from the brackets, commas and quotes alone (RFC 8259, section 2);
NumPy finds them about three times as fast as json.loads reads the text.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

CHUNK = 4 << 20
"""Bytes read at a time: about what a piece has."""

SHOWN = 40
"""Bytes of a text that is no object which its error message shows."""

_QUOTE, _COMMA = ord('"'), ord(",")
_STEPS = np.zeros(256, np.int8)
_STEPS[[ord("{"), ord("[")]] = 1
_STEPS[[ord("}"), ord("]")]] = -1
_MARKS = bytes(1 if _STEPS[code] or code in (_QUOTE, _COMMA) else 0 for code in range(256))
_VALUE = re.compile(r'[\["\d-]|(null|true|false)\b')
"""The beginning of a JSON value that is no object."""
_KEY = re.compile(rb'\s*("(?:[^"\\]|\\.)*")\s*:\s*', re.DOTALL)


class NotJson(ValueError):
    """The text is not valid JSON; the message says why, without the file."""


class NotAnObject(ValueError):
    """The text begins with something else than an object; the message shows it."""


class Readable(Protocol):
    """An open file of bytes."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes, none only at the end."""
        ...


class Member(NamedTuple):
    """A member of the object, or a piece of one."""

    key: str
    text: bytes
    """JSON of its value, or a JSON list of some of its elements."""
    position: int | None
    """Number of the elements that lie in the pieces before, None where the value is whole."""


def chunks(stream: Readable, seen: Callable[[bytes], object] = lambda data: None) -> Iterator[bytes]:
    """The bytes of a file as UTF-8 without a byte order mark; only another encoding is read as a whole.

    Args:
        stream: the file, at its beginning.
        seen: is called with all bytes as they are in the file, piece by piece.

    Raises:
        NotJson: they are not in the encoding that their first bytes show.
    """

    def read() -> bytes:
        data = stream.read(CHUNK)
        seen(data)
        return data

    first = read()
    encoding = json.detect_encoding(first)
    if encoding not in ("utf-8", "utf-8-sig"):
        try:
            yield b"".join([first, *iter(read, b"")]).decode(encoding).encode()
        except UnicodeError as error:
            raise NotJson(f"{error}; save it in UTF-8") from error
        return
    decoder = codecs.getincrementaldecoder("utf-8")()
    chunk = first.removeprefix(codecs.BOM_UTF8)
    while chunk:
        following = read()
        if not chunk.isascii() or decoder.getstate()[0]:
            try:
                decoder.decode(chunk, final=not following)
            except UnicodeError as error:
                raise NotJson(f"{error}; save it in UTF-8") from error
        yield chunk
        chunk = following


def members(text: Iterable[bytes], lists: Collection[str]) -> Iterator[Member]:
    """The members of the object that a text holds, in its order.

    Args:
        text: chunks of UTF-8.
        lists: keys of the members that are handed out in pieces, where their value is a list. A list without an
            element is one piece, `[]`.

    Raises:
        NotJson: brackets do not match, a member has no key, something follows the object, or the text ends too early.
            What stands inside a piece is not checked.
        NotAnObject: the first bracket is not `{`.
    """
    scanner = _Scanner()
    begun = ended = False
    member = _Reading(lists)
    for chunk in scanner.whole_escapes(text):
        start = 0
        if not begun:
            start = len(chunk) - len(chunk.lstrip())
            if start == len(chunk):
                continue
            if chunk[start : start + 1] != b"{":
                first = chunk[start : start + SHOWN].decode(errors="replace").strip()
                raise NotAnObject(first) if _VALUE.match(first) else NotJson(_no_value(first))
            begun, start = True, start + 1
        separators, ends = scanner.find(chunk)
        for end in ends:
            if ended:
                break
            yield from member.extend(chunk[start:end], separators[(separators >= start) & (separators < end)] - start)
            ended = chunk[end] != _COMMA
            yield from member.finish(last=ended)
            if ended and chunk[end : end + 1] != b"}":
                raise NotJson(f"the object ends with {chunk[end : end + 1].decode()!r}")
            start = end + 1
        if ended and chunk[start:].strip():
            raise NotJson("something follows the object")
        if not ended:
            yield from member.extend(chunk[start:], separators[separators >= start] - start)
    if not ended:
        raise NotJson(f"EOF while parsing: {scanner.depth} brackets are open" if begun else "EOF: it is empty")


def _no_value(first: str) -> str:
    """The beginning of a file that is no JSON at all, for a message."""
    first = " ".join(first.split())
    if first.startswith("version https://git-lfs"):
        return f"it begins with {first!r}: this is a pointer of Git LFS, which `git lfs pull` replaces by the file"
    return f"it begins with {first!r}"


class _Scanner:
    """Finds the commas and brackets that divide members and elements, over chunks."""

    def __init__(self) -> None:
        self.depth = 0
        self._quoted = False

    def whole_escapes(self, text: Iterable[bytes]) -> Iterator[bytes]:
        """The chunks, so cut that no escape sequence of a string is divided."""
        rest = b""
        for chunk in text:
            chunk = rest + chunk
            count = len(chunk) - len(chunk.rstrip(b"\\"))
            rest = b"\\" * (count % 2)
            yield chunk[: len(chunk) - len(rest)]
        if rest:
            yield rest

    def find(self, chunk: bytes) -> tuple[np.ndarray, list[int]]:
        """Positions of the commas between elements of members, and of what ends members: commas, the last bracket."""
        if b"\\" in chunk:
            chunk = re.sub(rb"\\.", b"__", chunk, flags=re.DOTALL)
        characters = np.frombuffer(chunk, np.uint8)
        places = np.flatnonzero(np.frombuffer(chunk.translate(_MARKS), bool))
        marks = characters[places]
        quoted = np.bitwise_xor.accumulate(marks == _QUOTE) ^ self._quoted
        free = ~quoted
        steps = _STEPS[marks] * free
        depth = self.depth + np.cumsum(steps, dtype=np.int32)
        if len(places):
            self._quoted, self.depth = bool(quoted[-1]), int(depth[-1])
        commas = free & (marks == _COMMA)
        ends = (commas & (depth == 1)) | ((steps < 0) & (depth == 0))
        return places[commas & (depth == 2)], places[ends].tolist()


class _Reading:
    """The member that is being read."""

    def __init__(self, lists: Collection[str]) -> None:
        self._lists = lists
        self._text = bytearray()
        self._first = True
        self._key: str | None = None
        self._position: int | None = None

    def extend(self, text: bytes, separators: np.ndarray) -> Iterator[Member]:
        """Add text. Of a list in pieces, all elements that are whole are handed out.

        Args:
            text: as far as it belongs to this member.
            separators: positions in it of commas between elements.
        """
        before = len(self._text)
        self._text += text
        if self._key is None:
            before -= self._read_key()
        if self._position is None or not len(separators):
            return
        end = before + int(separators[-1])
        piece = b"[%b]" % bytes(self._text[:end])
        del self._text[: end + 1]
        yield Member(str(self._key), piece, self._position)
        self._position += len(separators)

    def finish(self, last: bool) -> Iterator[Member]:
        """Hand out what is left of the member, and begin the next.

        Args:
            last: nothing follows, so that there may be none at all.
        """
        text = bytes(self._text).strip()
        if self._key is None and (text or not (last and self._first)):
            raise NotJson(f"a member of the object has no key or no value ({text[:20].decode(errors='replace')!r})")
        self._first = False
        if self._key is not None and self._position is None:
            yield Member(self._key, text, None)
        elif self._key is not None and self._position is not None:
            if not text.endswith(b"]"):
                raise NotJson(f"the list {self._key} has no end")
            if self._position and not text[:-1].strip():
                raise NotJson(f"the list {self._key} ends with a comma")
            yield Member(self._key, b"[%b" % text, self._position)
        self._text.clear()
        self._key = self._position = None

    def _read_key(self) -> int:
        """Take the key and, of a list in pieces, the first bracket off the text; the number of bytes taken."""
        match = _KEY.match(self._text)
        if match is None or match.end() == len(self._text):
            return 0
        self._key = json.loads(bytes(match[1]))
        taken = match.end()
        if self._key in self._lists and self._text[taken : taken + 1] == b"[":
            taken, self._position = taken + 1, 0
        del self._text[:taken]
        return taken

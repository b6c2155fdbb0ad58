"""The one way to open local and S3 paths.

A URI is a local path (absolute, relative to the working directory, `~` or `file://`) or `s3://bucket/key`.
S3 follows the usual variables: `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL` for a store of one's own,
`AWS_REGION` or `AWS_DEFAULT_REGION`, and the standard chain of credentials.

A request that S3 refuses, drops, does not answer or answers with a fault of its own (500, 503) is sent again, at once
and then after pauses that double from 0.05 s, for as long as `PATIENCE` says; the bounds are in `Waits`. These are the
only waits: the same filesystem does the work of Ray Train, Ray Tune and Ray Data.
"""

from __future__ import annotations

import math
import os
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple, cast
from urllib.parse import unquote

import pyarrow as pa
from pyarrow import NativeFile, fs

from pipelines.cluster.masking import masked

Uri = str | os.PathLike[str]

PATIENCE = "PANOPTIC_S3_PATIENCE"
"""Environment variable: the most seconds of pauses between the attempts of one request to S3; 60 by default."""

FIRST_PAUSE = 0.05
"""Seconds before the third attempt, the second follows at once; of the AWS SDK."""


class Unavailable(OSError):
    """A store did not do what it was asked for, for as long as it is waited for; the message names what and why."""


class Waits(NamedTuple):
    """The retries and timeouts of one request to S3.

    With the default of 60 s: 12 attempts with 51 s of pauses between them (the largest number whose pauses are within
    it), each of which has 5 s (a twelfth, 1 to 5 s) for a connection and 5 s without a byte of the answer. A store that
    refuses connections is given up after 51 s, one that takes them and says nothing after 111 s.
    """

    retries: int
    """Attempts after the first."""
    answer: float
    """Seconds without a byte after which an attempt has failed."""
    connection: float
    """Seconds after which an attempt to connect has failed."""

    def pauses(self) -> list[float]:
        """Seconds before each further attempt."""
        return [0.0, *(FIRST_PAUSE * 2**k for k in range(self.retries - 1))]


def waits() -> Waits:
    """The waits that the environment variable `PATIENCE` asks for, else those of 60 s.

    Raises:
        ValueError: it is no number of seconds.
    """
    text = os.environ.get(PATIENCE) or "60"
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{PATIENCE}={text}: give the seconds for which a request to S3 is repeated, 0 or more")
    retries = max(1, int(math.log2(seconds / FIRST_PAUSE + 1)) + 1)
    answer = min(5.0, max(1.0, seconds / 12))
    return Waits(retries, answer, answer)


class S3(fs.S3FileSystem):
    """An S3 filesystem that keeps its patience where it is sent to another process, which pyarrow's own loses."""

    def __init__(self, endpoint: str, region: str, waits: Waits) -> None:
        """Make a client; nothing is asked.

        Args:
            endpoint: "" = AWS.
        """
        self._given = endpoint, region, waits
        super().__init__(
            endpoint_override=endpoint or None,
            region=region,
            request_timeout=waits.answer,
            connect_timeout=waits.connection,
            retry_strategy=fs.AwsDefaultS3RetryStrategy(max_attempts=waits.retries),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return S3, self._given

    def open_input_file(self, path: str) -> NativeFile:
        """A file to read at any place."""
        return pa.PythonFile(self.repeating(path), mode="r")

    def open_input_stream(self, path: str, compression: None = None, buffer_size: None = None) -> NativeFile:
        """A file to read from its beginning, as it is."""
        return self.open_input_file(path)

    def repeating(self, path: str) -> Repeating:
        """A file whose reads several threads may do at once."""
        return Repeating(super().open_input_file(path), path, self._given[2])


class Repeating:
    """An open file on S3 whose reads are repeated, and whose errors are `Unavailable`.

    The SDK repeats them, too, but for one case: an error's text that is longer than the bytes that were asked for
    ends the request at once ("Failed to flush response stream", pyarrow 25).
    """

    def __init__(self, file: NativeFile, path: str, waits: Waits) -> None:
        self._file, self._path, self._waits = file, path, waits

    def read(self, size: int | None = None) -> bytes:
        """The next bytes."""
        place = self._file.tell()

        def read() -> bytes:
            self._file.seek(place)
            return self._file.read(size)

        return self._repeated(read)

    def read_at(self, size: int, place: int) -> bytes:
        """Bytes of any place."""
        return self._repeated(lambda: self._file.read_at(size, place))

    def _repeated(self, read: Callable[[], bytes]) -> bytes:
        """Read; nothing is repeated that the SDK has repeated for as long as is waited for."""
        pauses = self._waits.pauses()
        end = time.monotonic() + sum(pauses)
        with naming(f"s3://{self._path}", "read"):
            for pause in pauses:
                try:
                    return read()
                except OSError:
                    if time.monotonic() + pause > end:
                        raise
                    time.sleep(pause)
            return read()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Repeating:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def resolve(uri: Uri) -> tuple[fs.FileSystem, str]:
    """The filesystem of `uri` and the path within it, as pyarrow, Ray Data and Ray Train take them.

    Raises:
        ValueError: the scheme is neither local nor s3, or the bucket is missing.
    """
    text = absolute(uri)
    if not text.startswith("s3://"):
        return fs.LocalFileSystem(), text
    path = text.removeprefix("s3://")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ""
    with naming(uri, "reached"):
        return _s3(path.split("/", 1)[0], endpoint, region, waits(), os.environ.get("AWS_ACCESS_KEY_ID", "")), path


@lru_cache(maxsize=32)
def _s3(bucket: str, endpoint: str, region: str, waits: Waits, key: str) -> fs.FileSystem:
    """One client per store; `key` is only there so that changed credentials make a new one."""
    if endpoint:
        return S3(endpoint, region or "us-east-1", waits)
    return S3("", region or fs.resolve_s3_region(bucket), waits)


def absolute(uri: Uri) -> str:
    """`uri` in the form that means the same in every process: an absolute path, or `s3://bucket/key`."""
    text = os.fspath(uri)
    if text.startswith("s3://"):
        path = text.removeprefix("s3://").strip("/")
        if not path:
            raise ValueError(f"{masked(text)}: no bucket; write s3://bucket/key")
        return f"s3://{path}"
    if text.startswith("file://"):
        text = _local_path(text)
    if "://" in text:
        raise ValueError(f"{masked(text)}: unknown kind of storage; give a local path or s3://bucket/key")
    if not text:
        raise ValueError("an empty path was given where a folder or file is needed")
    return os.path.abspath(os.path.expanduser(text))


def _local_path(uri: str) -> str:
    """The path of a file:// URI, whose characters may be quoted as RFC 8089 has it: %20 is a blank.

    Relative paths and `~` behind file:// are no such URIs, but were always taken.

    Raises:
        ValueError: it names another machine.
    """
    host, slash, path = uri.removeprefix("file://").partition("/")
    if host not in ("", "localhost", ".", "..", "~"):
        raise ValueError(f"{uri}: names the machine {host!r}; write file:///absolute/path, or the path alone")
    return unquote(f"{'' if host == 'localhost' else host}{slash}{path}")


def check_lasting(uri: Uri, option: str) -> None:
    """Refuse a place that vanishes: Ray's temporary copy of the code of a submitted job.

    Args:
        uri: where something is to be kept.
        option: that it was given by, for the message.

    Raises:
        ValueError: it lies there, as every relative path of `ray job submit --working-dir` does.
    """
    path = absolute(uri)
    if "/runtime_resources/working_dir_files/" in path:
        raise ValueError(
            f"{option} {os.fspath(uri)}: lies in Ray's temporary copy of the submitted code, where it would vanish; "
            f"give a place that lasts and that all machines of the cluster reach: {option} s3://bucket/folder, or an "
            "absolute path"
        )


def join(uri: Uri, *parts: str) -> str:
    """`uri` with `parts` below it."""
    return "/".join([os.fspath(uri).rstrip("/"), *(part.strip("/") for part in parts)])


@contextmanager
def naming(uri: Uri, done: str) -> Iterator[None]:
    """Errors of the filesystem, with the URI that the caller used in the message.

    Raises:
        FileNotFoundError: there is no such file or folder.
        Unavailable: another error of S3, in one line.
        OSError: another one of a local filesystem.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{masked(uri)}: no such file or folder") from error
    except UnicodeError as error:  # pyarrow's paths are UTF-8
        raise ValueError(
            f"{masked(uri)}: a name there is not UTF-8 ({error}); rename the file, as `convmv -f latin1 -t utf8` does"
        ) from error
    except OSError as error:
        if not os.fspath(uri).startswith("s3://"):
            raise OSError(masked(f"{os.fspath(uri)}: could not be {done}: {error}")) from error
        # Ray Train repeats what has "AWS Error" in its message, three times; here it was repeated already
        reason = " ".join(str(error).replace("AWS Error ", "").split())
        raise Unavailable(masked(f"{os.fspath(uri)}: could not be {done}: {reason}")) from error


def read_bytes(uri: Uri) -> bytes:
    """The whole file."""
    filesystem, path = resolve(uri)
    with naming(uri, "read"), filesystem.open_input_stream(path) as stream:
        return stream.read()


def open_file(uri: Uri) -> NativeFile:
    """A file open at random access: `read_at(bytes, offset)` may be called by several threads at once."""
    filesystem, path = resolve(uri)
    with naming(uri, "read"):
        if isinstance(filesystem, S3):  # arrow's own wrapper lets one thread read at a time
            return cast(NativeFile, filesystem.repeating(path))
        return filesystem.open_input_file(path)


def write_bytes(uri: Uri, data: bytes | memoryview) -> None:
    """The whole file at once: readers see the old content or the new, never a part. Makes the folders above it."""
    filesystem, path = resolve(uri)
    with naming(uri, "written"):
        if isinstance(filesystem, fs.LocalFileSystem):
            _write_local(path, data)
        else:
            # An S3 object appears when its stream is closed, which an exception does, too: SIGTERM would leave a
            # part of the file. Signals reach the main thread only; it waits for the upload even when it has to end.
            with ThreadPoolExecutor(1) as uploading:
                # An exception while a thread starts leaves one that the executor does not know and would not wait
                # for; so it starts before there is anything to upload.
                uploading.submit(int).result()
                uploading.submit(_upload, filesystem, path, data).result()


def _upload(filesystem: fs.FileSystem, path: str, data: bytes | memoryview) -> None:
    with filesystem.open_output_stream(path) as stream:
        stream.write(data)


def _write_local(path: str, data: bytes | memoryview) -> None:
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def create(uri: Uri, data: bytes) -> bool:
    """Write a file unless there is one of this name; True if it was written. Of several who try at once one succeeds.

    A local file appears before its content; an S3 object with it.

    Args:
        data: of this caller alone. A put whose answer was lost is sent again and then finds its own object: on S3
            an object of the same content counts as written.
    """
    filesystem, path = resolve(uri)
    with naming(uri, "created"):
        if not isinstance(filesystem, fs.LocalFileSystem):
            return _put_if_absent(path, data) or _content(filesystem, path) == data
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        return True


def _put_if_absent(path: str, data: bytes) -> bool:
    """S3's conditional put, which pyarrow does not offer; as patient as all else.

    Raises:
        OSError: S3 refuses, or did not answer.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError

    bucket, key = path.split("/", 1)
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    patience = waits()
    once = Config(connect_timeout=patience.connection, read_timeout=patience.answer, retries={"total_max_attempts": 1})
    last: Exception | None = None
    try:
        client = boto3.client("s3", region_name=region, config=once)
        for pause in [0.0, *patience.pauses()]:
            time.sleep(pause)
            try:
                client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
                return True
            except ClientError as error:
                last, status = error, error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
                if status in (409, 412):
                    return False
                if status < 500 and status != 429:  # S3 has said no
                    break
            except (ConnectionError, HTTPClientError) as error:
                last = error
    except BotoCoreError as error:  # no credentials
        last = error
    raise OSError(str(last)) from last


def _content(filesystem: fs.FileSystem, path: str) -> bytes | None:
    """The bytes of an object, None where there is none: one whose creation came in between may be gone again."""
    try:
        with filesystem.open_input_stream(path) as stream:
            return stream.read()
    except FileNotFoundError:
        return None


def exists(uri: Uri) -> bool:
    """True if there is a file or a folder."""
    filesystem, path = resolve(uri)
    with naming(uri, "looked up"):
        return filesystem.get_file_info(path).type != fs.FileType.NotFound


def is_folder(uri: Uri) -> bool:
    """True if there is a folder."""
    filesystem, path = resolve(uri)
    with naming(uri, "looked up"):
        return filesystem.get_file_info(path).type == fs.FileType.Directory


def list_stamps(uri: Uri) -> dict[str, tuple[int, int]]:
    """Every file below a folder: its path relative to `uri` -> (bytes, time of change in whole seconds)."""
    return _list(uri, recursive=True)[0]


def list_folder(uri: Uri) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """The files right in a folder, as `list_stamps` gives them, and the names of the folders in it, sorted."""
    return _list(uri, recursive=False)


def _list(uri: Uri, recursive: bool) -> tuple[dict[str, tuple[int, int]], list[str]]:
    filesystem, path = resolve(uri)
    with naming(uri, "listed"):
        entries = filesystem.get_file_info(fs.FileSelector(path, recursive=recursive))
        files, folders = {}, []
        for info in entries:
            name = info.path[len(path) :].lstrip("/")
            if info.type == fs.FileType.File:
                files[name] = (info.size, (info.mtime_ns or 0) // 10**9)
            elif info.type == fs.FileType.Directory:
                folders.append(name)
    return files, sorted(folders)


def list_files(uri: Uri) -> list[str]:
    """Every file below a folder, as sorted paths relative to `uri`."""
    return sorted(list_stamps(uri))


def delete(uri: Uri) -> None:
    """Remove a file, or a folder with all that is in it. What is absent already is no error.

    Raises:
        ValueError: `uri` is a whole bucket or the root of the filesystem.
    """
    filesystem, path = resolve(uri)
    bucket = not isinstance(filesystem, fs.LocalFileSystem) and "/" not in path
    if bucket or path == os.sep:
        raise ValueError(f"{masked(uri)}: refuses to delete a whole bucket or filesystem")
    with naming(uri, "deleted"):
        kind = filesystem.get_file_info(path).type
        if kind == fs.FileType.Directory:
            filesystem.delete_dir(path)
        elif kind != fs.FileType.NotFound:
            filesystem.delete_file(path)

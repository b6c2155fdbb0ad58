"""The one way to open local and S3 paths.

A URI is a local path (absolute, relative to the working directory, `~` or `file://`) or `s3://bucket/key`.
S3 follows the usual variables: `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL` for a store of one's own,
`AWS_REGION` or `AWS_DEFAULT_REGION`, and the standard chain of credentials.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from urllib.parse import unquote

from pyarrow import NativeFile, fs

from pipelines.cluster.masking import masked

Uri = str | os.PathLike[str]


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
    with _naming(uri, "reached"):
        return _s3(path.split("/", 1)[0], endpoint, region, os.environ.get("AWS_ACCESS_KEY_ID", "")), path


@lru_cache(maxsize=32)
def _s3(bucket: str, endpoint: str, region: str, key: str) -> fs.FileSystem:
    """One client per store; `key` is only there so that changed credentials make a new one."""
    if endpoint:
        return fs.S3FileSystem(endpoint_override=endpoint, region=region or "us-east-1")
    if region:
        return fs.S3FileSystem(region=region)
    return fs.FileSystem.from_uri(f"s3://{bucket}")[0]  # asks S3 for the bucket's region


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
def _naming(uri: Uri, done: str) -> Iterator[None]:
    """Errors of the filesystem, with the URI that the caller used in the message."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{masked(uri)}: no such file or folder") from error
    except OSError as error:
        raise OSError(masked(f"{os.fspath(uri)}: could not be {done}: {error}")) from error


def read_bytes(uri: Uri) -> bytes:
    """The whole file."""
    filesystem, path = resolve(uri)
    with _naming(uri, "read"), filesystem.open_input_stream(path) as stream:
        return stream.read()


def open_file(uri: Uri) -> NativeFile:
    """A file open at random access: `read_at(bytes, offset)` may be called by several threads at once."""
    filesystem, path = resolve(uri)
    with _naming(uri, "read"):
        return filesystem.open_input_file(path)


def write_bytes(uri: Uri, data: bytes | memoryview) -> None:
    """The whole file at once: readers see the old content or the new, never a part. Makes the folders above it."""
    filesystem, path = resolve(uri)
    with _naming(uri, "written"):
        if isinstance(filesystem, fs.LocalFileSystem):
            _write_local(path, data)
        else:  # an S3 object appears when its upload is complete
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
    """Write a file unless there is one of this name; whether it was written. Of several who try at once one succeeds.

    A local file appears before its content; an S3 object with it.

    Args:
        data: of this caller alone. A put whose answer was lost is sent again and then finds its own object: on S3
            an object of the same content counts as written.
    """
    filesystem, path = resolve(uri)
    with _naming(uri, "created"):
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
    """S3's conditional put, which pyarrow does not offer."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, key = path.split("/", 1)
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    try:
        boto3.client("s3", region_name=region).put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
    except ClientError as error:
        if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") in (409, 412):
            return False
        raise OSError(str(error)) from error
    except BotoCoreError as error:  # no connection, no credentials
        raise OSError(str(error)) from error
    return True


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
    with _naming(uri, "looked up"):
        return filesystem.get_file_info(path).type != fs.FileType.NotFound


def is_folder(uri: Uri) -> bool:
    """True if there is a folder."""
    filesystem, path = resolve(uri)
    with _naming(uri, "looked up"):
        return filesystem.get_file_info(path).type == fs.FileType.Directory


def list_stamps(uri: Uri) -> dict[str, tuple[int, int]]:
    """Every file below a folder: its path relative to `uri` -> (bytes, time of change in whole seconds)."""
    return _list(uri, recursive=True)[0]


def list_folder(uri: Uri) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """The files right in a folder, as `list_stamps` gives them, and the names of the folders in it, sorted."""
    return _list(uri, recursive=False)


def _list(uri: Uri, recursive: bool) -> tuple[dict[str, tuple[int, int]], list[str]]:
    filesystem, path = resolve(uri)
    with _naming(uri, "listed"):
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


def makedirs(uri: Uri) -> None:
    """A folder and those above it; S3 needs none."""
    filesystem, path = resolve(uri)
    if isinstance(filesystem, fs.LocalFileSystem):
        with _naming(uri, "created"):
            filesystem.create_dir(path, recursive=True)


def delete(uri: Uri) -> None:
    """Remove a file, or a folder with all that is in it. What is absent already is no error.

    Raises:
        ValueError: `uri` is a whole bucket or the root of the filesystem.
    """
    filesystem, path = resolve(uri)
    bucket = not isinstance(filesystem, fs.LocalFileSystem) and "/" not in path
    if bucket or path == os.sep:
        raise ValueError(f"{masked(uri)}: refuses to delete a whole bucket or filesystem")
    with _naming(uri, "deleted"):
        kind = filesystem.get_file_info(path).type
        if kind == fs.FileType.Directory:
            filesystem.delete_dir(path)
        elif kind != fs.FileType.NotFound:
            filesystem.delete_file(path)

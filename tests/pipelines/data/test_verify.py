"""`prepare --verify` looks at everything: files, rows and the hash of the content."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.prepare import main
from pipelines.data.manifest import Manifest
from pipelines.data.verify import verify
from tests.pipelines.data.test_shard_file import encoded, with_column
from tests.support.shards import change_manifest, forge, read_table, write_shards


def test_what_was_written_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = write_shards(tmp_path)
    before = sorted((file.name, file.stat().st_mtime_ns) for file in out.iterdir())
    assert main(["--verify", str(out)]) == Manifest.load(out)
    assert "every file and every row is what was written" in capsys.readouterr().out
    assert sorted((file.name, file.stat().st_mtime_ns) for file in out.iterdir()) == before


def test_every_shard_that_changed_is_named(tmp_path: Path) -> None:
    out = write_shards(tmp_path)
    (out / "shard-00000.arrow").unlink()
    (out / "shard-00001.arrow").write_bytes(b"cut")
    message = r"2 of 2 shards(.|\n)*00000.arrow  the shard is missing(.|\n)*00001.arrow  has another sha256"
    with pytest.raises(ValueError, match=message):
        main(["--verify", str(out)])


def test_content_is_compared_with_its_hash(tmp_path: Path) -> None:
    """Where shards and their hashes were changed together, and where the manifest alone was."""
    out = write_shards(tmp_path)
    table = read_table(out)
    labels = [[1, 2, 0] for _ in range(4)]
    forge(out, encoded(with_column(table, "labels", labels)))
    with pytest.raises(ValueError, match="the manifest's hash is of other content"):
        verify(out)
    out = write_shards(tmp_path / "second")
    change_manifest(out, lambda content: content["categories"].reverse())
    with pytest.raises(ValueError, match="the manifest's hash is of other content"):
        verify(out)
    out = write_shards(tmp_path / "third")
    change_manifest(out, lambda content: content["shards"].reverse())
    with pytest.raises(ValueError, match=r"2 of 2 shards at .* are not what was written"):
        verify(out)

"""`infra/Dockerfile`: both targets, what they copy, and the lock of the CPU target, made by its own command."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INSTRUCTIONS = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "HEALTHCHECK", "RUN", "USER", "WORKDIR"}


def instructions() -> list[tuple[str, str]]:
    """Every instruction and its arguments, continued lines joined, comments left out."""
    lines = [
        line for line in (ROOT / "infra" / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")
    ]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]  # type: ignore[misc]


def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """The base and the instructions of each stage by its name."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    for instruction, text in instructions():
        if instruction == "FROM":
            base, _, name = text.partition(" AS ")
            current: list[tuple[str, str]] = []
            found[name] = (base, current)
        elif found:
            current.append((instruction, text))
    return found


def test_only_known_instructions() -> None:
    assert {name for name, _ in instructions()} <= INSTRUCTIONS


@pytest.mark.parametrize("target", ["cuda", "cpu"])
def test_a_target_is_a_service_without_privileges(target: str) -> None:
    base, steps = stages()[target]
    assert base == f"{target}-packages" and stages()[base][0] == "base"
    names = [name for name, _ in steps]
    assert dict(steps)["USER"] == "1000:1000" and names.index("USER") > max(
        k for k, n in enumerate(names) if n == "RUN"
    )
    assert "HEALTHCHECK" in names and dict(steps)["ENTRYPOINT"].startswith('["tini"')
    assert dict(steps)["HEALTHCHECK"].endswith("/api/local_raylet_healthz | grep -q success")


def test_what_is_copied_is_there_and_reaches_the_builder() -> None:
    listed = (ROOT / "infra" / "Dockerfile.dockerignore").read_text().split()
    allowed = {line.removeprefix("!") for line in listed if line.startswith("!")}
    assert "*" in listed
    sources = {source for name, text in instructions() if name == "COPY" for source in text.split()[:-1]}
    assert sources == allowed and all((ROOT / source).exists() for source in sources)


def test_the_cpu_target_installs_the_lock_but_for_torch_and_cuda(tmp_path: Path) -> None:
    """Its own commands are run on the lock: what remains is hashed, and torch keeps its version."""
    if shutil.which("awk") is None or shutil.which("sed") is None:
        pytest.skip("awk or sed is absent")
    (run,) = (text for name, text in stages()["cpu-packages"][1] if name == "RUN")
    awk, sed, *_ = run.split(" && ")[0], run.split("&& ")[1]
    script = f"{awk.strip()}\n{sed.strip()}".replace(
        "/opt/requirements.lock", str(ROOT / "infra" / "requirements.lock")
    )
    subprocess.run(["sh", "-c", script.replace("/opt/", f"{tmp_path}/")], check=True)
    lock, kept = (ROOT / "infra" / "requirements.lock").read_text(), (tmp_path / "cpu.lock").read_text()
    pins = re.compile(r"^([a-z0-9._-]+)==", re.MULTILINE)
    gone = set(pins.findall(lock)) - set(pins.findall(kept))
    assert {"torch", "torchvision", "triton"} <= gone
    assert all(re.match(r"torch|triton|nvidia-|cuda-", name) for name in gone) and len(gone) > 10
    entries = re.split(r"(?=^[a-z])", kept, flags=re.MULTILINE)
    assert all("--hash=sha256:" in entry for entry in entries if "==" in entry)
    assert re.fullmatch(r"torch==[\d.]+\ntorchvision==[\d.]+\n", (tmp_path / "torch.txt").read_text())


def test_no_registry_of_packages_is_named() -> None:
    text = (ROOT / "infra" / "Dockerfile").read_text()
    assert "://" not in text.replace("http://127.0.0.1", "")

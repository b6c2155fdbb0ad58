"""The clocks of the scheduled evaluation: systemd, cron and Kubernetes say the same."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.command_lines import commands_of, parse_command

INFRA = Path(__file__).resolve().parents[2] / "infra"
UNITS = sorted((INFRA / "systemd").iterdir())


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(INFRA / "systemd" / name)
    return parser


def crontab() -> tuple[str, str]:
    """The schedule and the command of the only job in it."""
    lines = (INFRA / "crontab").read_text().splitlines()
    (line,) = [line for line in lines if line and not line.startswith("#") and not re.match(r"\w+=", line)]
    match = re.fullmatch(r"(\S+ \S+ \S+ \S+ \S+) (.*)", line)
    assert match is not None and "%" not in line, "cron takes % for the end of the line"
    return match[1], match[2]


def test_they_run_one_command() -> None:
    (by_cron,) = (parse_command(words) for words in commands_of(crontab()[1]))
    by_systemd = parse_command(unit("panoptic-evaluate.service")["Service"]["ExecStart"].split())
    assert by_cron == by_systemd and by_cron.once and by_cron.promote
    text = (INFRA / "kuberay" / "base" / "evaluate-cronjob.yaml").read_text()
    pod = yaml.safe_load(text)["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert parse_command(pod["containers"][0]["args"]) == by_cron


def test_they_say_one_time() -> None:
    minute, hour, *rest = crontab()[0].split()
    assert rest == ["*", "*", "*"]
    assert unit("panoptic-evaluate.timer")["Timer"]["OnCalendar"] == f"*-*-* {int(hour):02}:{int(minute):02}:00 UTC"
    for file in ("base/evaluate-cronjob.yaml", "raycronjob/evaluate.yaml"):
        spec = yaml.safe_load((INFRA / "kuberay" / file).read_text())["spec"]
        assert spec["schedule"] == crontab()[0] and spec["timeZone"] == "Etc/UTC"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is absent")
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    """It names unknown keys, and the program, which is not installed here."""
    copies = []
    for file in UNITS:
        program = re.sub(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", file.read_text())
        copies.append(tmp_path / file.name)
        copies[-1].write_text(program)
    done = subprocess.run(
        ["systemd-analyze", "verify", *map(str, copies)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    bad = copies[0].read_text().replace("[Service]", "[Service]\nRestartForEver=yes")
    copies[0].write_text(bad)
    done = subprocess.run(
        ["systemd-analyze", "verify", *map(str, copies)], capture_output=True, text=True, timeout=60, check=False
    )
    assert "RestartForEver" in done.stderr

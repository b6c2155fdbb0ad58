"""Command lines that stand in files, parsed by the programs that would run them, without running them."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import click

ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")


def commands_of(script: str) -> list[list[str]]:
    """The words of each command of a shell script in one line, without `export`s and leading assignments."""
    parts = re.split(r"&&|;", script)
    lines = [shlex.split(part) for part in parts if part.strip()]
    return [bare for words in lines if (bare := _without_assignments(words)) and bare[0] not in ("ulimit", "cd", ".")]


def _without_assignments(words: list[str]) -> list[str]:
    words = words[1:] if words[:1] == ["export"] else words
    while words and ASSIGNMENT.match(words[0]):
        words = words[1:]
    return words


def parse_command(words: Sequence[str]) -> Any:
    """What the program of a command line makes of its arguments: a job's options, or click's parameters.

    The command behind `ray job submit … --` is parsed too, and is what is returned.

    Raises:
        ValueError: the program would refuse the arguments, or is none that is known here.
    """
    program, *rest = words
    name = PurePosixPath(program).name
    try:
        if name == "panoptic-ray":
            return _job(rest[0], rest[1:])
        if name == "python" and rest[0] == "jobs/submit.py":
            return _submitted(rest[1:])
        if name == "python" and rest[0].startswith("jobs/"):
            return _job(PurePosixPath(rest[0]).stem, rest[1:])
        if name == "python" and rest[:2] == ["-m", "panoptic.runtime"]:
            return importlib.import_module("panoptic.runtime.__main__").parser().parse_args(rest[2:])
        if name == "ray" and rest[:2] == ["job", "submit"]:
            submit = importlib.import_module("ray.dashboard.modules.job.cli").submit
            return parse_command(_clicked(submit, rest[2:])["entrypoint"])
        if name == "ray" and rest[0] in ("start", "stop"):
            return _clicked(getattr(importlib.import_module("ray.scripts.scripts"), rest[0]), rest[1:])
        if name == "mlflow":
            group = importlib.import_module("mlflow.cli").cli
            command = group.get_command(click.Context(group), rest[0])  # `ui` is another name of `server`
            return _clicked(command or group, rest[1:])
    except (SystemExit, click.ClickException) as error:
        raise ValueError(f"{shlex.join(words)}: {error}") from error
    raise ValueError(f"{shlex.join(words)}: no program of the image")


def _clicked(command: click.Command, arguments: Sequence[str]) -> dict[str, Any]:
    return command.make_context(command.name, list(arguments)).params


def _submitted(arguments: Sequence[str]) -> Any:
    """The options of the job that is submitted; the name of one that is followed or stopped."""
    from jobs.submit import Options, split
    from pipelines.config import parse_options

    own, asked = split(arguments)
    parse_options(Options, own, "", {})
    return asked[1] if asked[0] in ("follow", "stop") else _job(asked[0], asked[1:])


def _job(name: str, arguments: Sequence[str]) -> Any:
    """The options of a job, after the checks that it makes before it touches data or a cluster."""
    from pipelines.config import check_run_name, parse, parse_known, parse_options

    if name == "train":
        from pipelines.presets import PRESETS
        from pipelines.training.preflight import check_options

        shown = {"--list", "--help", "--help-all", "--dry-run"} & set(arguments)
        arguments = [word for word in arguments if word not in shown]
        _, experiment = parse(arguments, PRESETS)
        if experiment.name:
            check_run_name(experiment.name)
        if not experiment.train.weights and experiment.model.backbone.weights == "none":  # else they are not here
            check_options(experiment)
        return experiment
    if name == "tune":
        from pipelines.presets import PRESETS
        from pipelines.studies import run
        from pipelines.tuning import sweep

        options, rest = parse_known(run.Options, arguments, "")
        return (
            options if options.study == ("list",) else (run if options.study else sweep).checked(options, rest, PRESETS)
        )
    if name in ("prepare", "predict", "oracle", "convert", "export", "serve", "status", "replay"):
        return parse_options(importlib.import_module(f"jobs.{name}").Options, arguments, "", {})
    if name == "evaluate":
        evaluate = importlib.import_module("jobs.evaluate")
        options = parse_options(evaluate.Options, arguments, "", {})
        evaluate.check(options)
        return options
    raise ValueError(f"{name}: no job whose options are checked here")

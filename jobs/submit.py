"""Submit a job to a Ray cluster: `python jobs/submit.py [--address URL] [--id NAME] JOB [--option value …]`.

JOB and what follows are those of `panoptic-ray`: `submit.py train PRESET --storage s3://bucket/runs --name a`. Its log
is followed, and its exit code is this one's. Ctrl-C leaves the job running. In place of a job: `files` lists what would
be sent, `follow NAME` shows the log of a job that is there, `stop NAME` ends one.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.common import command
from panoptic.metrics.text import text_table
from pipelines.cluster import submission
from pipelines.cluster.session import API_SERVER
from pipelines.config import HELP, parse_options

JOBS = ("prepare", "train", "tune", "evaluate", "predict", "oracle", "independent", "convert")
"""Jobs that run on a cluster."""

OTHERS = {"files": 0, "follow": 1, "stop": 1}
"""Other commands that can be asked for, with the number of their arguments."""


@dataclass(frozen=True)
class Options:
    """The cluster, and what is sent."""

    address: str = ""
    """Address of the job server; by default RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265."""
    id: str = ""
    """Name of the submission; one that is there already is followed, not repeated. By default one is drawn."""
    carry: tuple[str, ...] = ()
    """Files that are sent beside the code, by paths below the working directory: a class map, say."""
    detach: bool = False
    """Do not follow the log."""


def main(arguments: Sequence[str] | None = None) -> str:
    """Submit and follow; the name of the submission.

    Raises:
        ValueError: there is no such job, or something is not to be sent.
        ConnectionError: the job server does not answer.
        SystemExit: with the exit code of a job that failed.
    """
    own, asked = split(sys.argv[1:] if arguments is None else arguments)
    options: Options = parse_options(Options, own, str(__doc__), {})
    if asked[0] == "files":
        with tempfile.TemporaryDirectory() as folder:
            files = submission.stage(Path(folder) / "code", options.carry)
            sent = submission.pack(Path(folder) / "code").stat().st_size
        print(text_table([("file", "bytes"), *((name, f"{size:,}") for name, size in files)]))
        print(f"{len(files)} files of {sum(size for _, size in files):,} bytes; {sent:,} are sent, compressed")
        return ""
    client = submission.Client(options.address or os.environ.get(API_SERVER) or "http://127.0.0.1:8265")
    again = f"{submission.python_of()} jobs/submit.py"
    if asked[0] in ("follow", "stop"):
        name = asked[1]
        if not client.status(name):
            raise ValueError(f"{name}: {client.address} has no such job")
        if asked[0] == "stop":
            print(f"{name}: {client.stop(name)}")
            return name
    else:
        name, new = client.submit(asked, options.id, options.carry)
        if kept := submission.withheld(os.environ):
            print(f"not sent, since secret: {', '.join(kept)}; the cluster's machines use their own")
        told = "submitted" if new else f"is there already ({client.status(name)}), and is not submitted again"
        print(f"{name} {told}; {again} stop {name} ends it", flush=True)
        if options.detach:
            return name
    try:
        client.follow(name, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        print(f"\n{name} goes on; {again} follow {name} shows its log, {again} stop {name} ends it", file=sys.stderr)
        raise SystemExit(0) from None
    code, why = client.exit_code(name)
    print(f"{name} ended with code {code}{f': {why}' if why else ''}", flush=True)
    if code:
        raise SystemExit(code)
    return name


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own options, and the job with its arguments.

    Raises:
        ValueError: no job is named, or the number of arguments is another one.
    """
    given = list(arguments)
    for number, word in enumerate(given):
        value = number and given[number - 1] in ("--address", "--id")
        if word in (*JOBS, *OTHERS) and not value:
            own, asked = given[:number], given[number:]
            if word in OTHERS and len(asked) - 1 != OTHERS[word]:
                raise ValueError(f"{word}: takes {OTHERS[word] or 'no'} name{'s' if not OTHERS[word] else ''}")
            return own, asked
    if set(HELP) & set(given):
        return given, ["files"]
    near = [job for word in given for job in get_close_matches(word, (*JOBS, *OTHERS), 1)]
    hint = f"near: {', '.join(near)}; " if near else ""
    raise ValueError(f"no job is named; {hint}there are {', '.join((*JOBS, *OTHERS))}")


if __name__ == "__main__":
    command(main)

"""Help, lists and mistakes on the command line come at once: none of them imports what trains, reads or tracks."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

from jobs import convert
from jobs.__main__ import JOBS
from panoptic.convert import FAMILIES
from pipelines.data.config import READER_NAMES
from pipelines.data.readers import READERS

ROOT = Path(__file__).resolve().parents[2]

HEAVY = (
    *("torch", "torchvision", "timm", "numpy", "scipy", "cv2", "pycocotools"),
    *("ray", "mlflow", "pyarrow", "pandas", "pydantic", "boto3"),
)
"""Libraries that take tenths of a second to import, or seconds."""

SHOWN = [
    *([job, "--help"] for job in JOBS),
    *(["train", *words] for words in (["--list"], ["mask2former-r50-coco", "--help"], ["--help-all"])),
    ["tune", "--study", "list"],
]
"""Commands that show what there is."""

REFUSED = [
    (["train", "dmeo"], "near: demo"),
    (["train", "demo", "--train.batch", "0"], "train.batch"),
    (["train", "demo", "--name", "a b"], "--name"),
    (["train", "demo", "--train.workers", "3"], "cannot be shared by 3 workers"),
    (["train", "demo", "--data.reader", "cityscape"], "near: cityscapes"),
    (["train", "demo", "--data.balance", "0.1", "--data.window", "8"], "data.window"),
    (["tune"], "--sweep"),
    (["tune", "--sweep", "optim.lr=grd(1)"], "loguniform"),
    (["tune", "dmeo", "--sweep", "optim.lr=grid(1)"], "near: demo"),
    (["tune", "--sweep", "train.steps=uniform(1,9)"], "randint"),
    (["tune", "--study", "freezing-r05"], "near: freezing-r50"),
    (["tune", "--study", "aspp", "--samples", "3"], "--samples"),
    (["evaluate", "a.pt", "--data.root", "b", "--promote"], "--once"),
    (["evaluate", "a.pt", "--data.root", "b", "--actors", "-2"], "actors"),
    (["predict", "a.pt", "b", "--out", "c", "--formats", "voc"], "cityscapes"),
    (["prepare", "--data.root", "a", "--data.split", "b"], "--check"),
    (["prepare", "--data.root", "a", "--data.split", "b", "--out", "c", "--data.reader", "coc"], "near: coco"),
    (["prepare", "--data.root", "a", "--data.split", "b", "--out", "c", "--policy", "lsi"], "lsj"),
    (["convert", "a", "--source", "detr2", "--categories", "b", "--out", "c"], "detectron2"),
    (["submit", "trian"], "independent"),
    (["status", "a", "--stalled-after", "0"], "stalled_after"),
    # an option that does not exist, with a near name; its value, which then belongs to none, is not told
    (["train", "demo", "--optim.lrr", "1"], "no option --optim.lrr; near: --optim.lr;"),
    (["train", "--lr", "1"], "no option --lr; near: --optim.lr; --help-all shows all"),
    (["train", "--dry-rn"], "no option --dry-rn; near: --dry-run;"),
    (["train", "--train.Steps=3", "--data.rot", "a"], "no option --train.Steps; near: --train.steps"),
    (
        ["evaluate", "a.pt", "--data.root", "b", "--data.splt", "c"],
        "no option --data.splt; near: --data.split, --data.skip;",
    ),
    (["evaluate", "--model", "a.pt", "--data.root", "b"], "no option --model; "),
    (["predict", "a.pt", "b", "--formts", "coco"], "no option --formts; near: --formats;"),  # and --out is missing
    (["tune", "--sampels", "3", "--sweep", "optim.lr=grid(1)"], "no option --sampels; near: --samples;"),
    (["tune", "--sweep", "optim.lr=grid(1)", "--lr", "1"], "no option --lr; near: --optim.lr;"),
    (["tune", "--sweep", "optim.lr=grid(1)", "--optim.emma", "1"], "no option --optim.emma; near: --optim.ema"),
    (["submit", "--adress", "a", "train"], "no option --adress; near: --address;"),
    (["train", "demo", "stray"], "stray: belongs to no option"),
    # values of the wrong type, with the type
    (
        ["train", "--optim.lr", "abc"],
        "error: --optim.lr: could not convert string to float: 'abc'; --optim.lr FLOAT Learning",
    ),
    (["train", "--train.steps", "1.5"], "'1.5'; --train.steps INT Optimiser updates in all. (default: 1200)"),
    (["train", "--train.workers", "4..1"], "error: --train.workers: 4..1: a range goes from 1 or more"),
    (["train", "--engine.precision", "bf16"], "Expected one of ('float32', 'bfloat16', 'float16')."),
    (["train", "--train.steps"], "error: Missing value for argument '--train.steps'."),
    (["export", "a.pt", "--to", "onx", "--out", "b"], "Expected one of ('onnx', 'torch', 'aot')."),
    (["tune", "--samples", "many"], "--samples INT"),
    # what is missing, all of it
    (["prepare", "--data.root", "a"], "error: Missing from -c: --data.split STR [STR …] Name of the split"),
    (["predict", "a.pt"], "IMAGES Folder of photographs or of shards, one photograph, or an s3:// prefix.; --out STR"),
    (["status"], "error: Missing from -c: RUN Name of a run"),
]
"""Commands with a mistake that needs nothing else to be seen, and a word of what is said."""

PROGRAM = f"""
import contextlib, importlib, io, json, sys
from jobs.common import command
for job, *arguments in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            command(importlib.import_module(f"jobs.{{job}}").main, arguments)
            code = 0
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, said.getvalue(), sorted(set({HEAVY!r}) & set(sys.modules))]))
"""
"""Runs jobs one after the other; after each, its exit code, its words, and the heavy libraries that are there."""


def run(commands: list[list[str]]) -> list[tuple[int, str, list[str]]]:
    """Exit code, words, and the heavy libraries after each command."""
    program = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(program, cwd=ROOT, input=json.dumps(commands), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_what_only_shows_imports_nothing_heavy() -> None:
    for words, (code, said, heavy) in zip(SHOWN, run(SHOWN), strict=True):
        assert (code or 0, heavy) == (0, []) and len(said) > 500, (words, said)


def test_mistakes_on_the_command_line_are_told_before_anything_heavy_is_imported() -> None:
    """In one line each, and without colours where nobody asks for them."""
    for (words, said), (code, text, heavy) in zip(REFUSED, run([words for words, _ in REFUSED]), strict=True):
        assert (code, heavy) == (2, []) and said in text, (words, heavy, text)
        assert text.startswith("error: ") and text.count("\n") == 1 and not set("\x1b│╭─") & set(text), (words, text)


def test_help_takes_less_than_a_second_of_a_core() -> None:
    """0.25 s of CPU in all, measured on a core of an AMD EPYC (Zen 5); with torch and timm it was 2.9 s."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "jobs/train.py", "demo", "--help"], cwd=ROOT, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_names_that_are_listed_without_their_libraries_are_all_of_them() -> None:
    assert tuple(FAMILIES) == convert.SOURCES
    assert set(READERS) == set(READER_NAMES)

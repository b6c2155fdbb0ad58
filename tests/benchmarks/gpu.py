"""Training steps of every architecture on this machine's GPU, taken apart: `make benchmark GPU=1`.

    python -m tests.benchmarks.gpu --write cases.json          where pipelines/ is installed
    python -m tests.benchmarks.gpu --cases cases.json          where the GPU is; needs panoptic/ and torch alone

For each case and precision: a whole `train_step` by the clock, its parts by CUDA events, the share of the time in
which the GPU computes, how often the step waits for the GPU, memory, and what the arithmetic is of the machine's own
matrix product. Beside it the bare loop (the same network, a sum for a loss, backward, the same optimiser) and the same
step with `torch.compile(model.network)`, and the step of Hugging Face's transformers where that is installed. Times
are medians over steps, after warm-up; every step has another batch.
Without a GPU it all runs on the CPU, to try it out.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from panoptic.models.base import PanopticModel, full_precision
from panoptic.segmentation import Targets
from panoptic.training.compiling import compile_network
from panoptic.training.device import Engine, autocast, pinned, prepare, set_tf32, to_device
from panoptic.training.optim import build_optimiser
from panoptic.training.step import SkipCounter, StepResult, clip_gradients, total, train_step
from tests.benchmarks.gpu_cases import PRECISIONS, Case, batches, calibrate, from_presets, read, write
from tests.benchmarks.gpu_peers import stepper
from tests.benchmarks.gpu_table import Figures, row, table
from tests.support.host_reads import HostReads, place

BATCHES = 3
"""Different ones that the steps take in turn."""


class Bench:
    """One case at one precision on one device.

    Args:
        case: what is measured.
        precision: one of `PRECISIONS`.
        device: cuda or cpu.
        steps: that are timed, after two that are not.
    """

    def __init__(self, case: Case, precision: str, device: str, steps: int) -> None:
        torch.manual_seed(0)
        self.case, self.steps, self.device = case, steps, torch.device(device)
        self.engine: Engine = case.engine(precision)
        self.model: PanopticModel = prepare(case.config.build(case.categories), device, self.engine).train()
        self.optimiser = build_optimiser(self.model, case.optim)
        drawn = batches(case, self.model.divisor, BATCHES)
        self.batches = [pinned(*batch) for batch in drawn] if device == "cuda" else drawn
        self.health, self.done = SkipCounter(), 0
        calibrate(self.model, self.batches[0][0][:2].to(device))

    def step(self) -> StepResult:
        """`train_step`, the data at hand already."""
        batch = self.batches[self.done % BATCHES]
        options: Any = {"optim": self.case.optim, "engine": self.engine, "health": self.health}
        result = train_step(self.model, self.optimiser, [batch], step=self.done, total=10_000, **options)
        self.done += 1
        return result

    def placed(self, k: int) -> tuple[Tensor, Targets]:
        """Batch k on the device, in the memory format of the weights."""
        return to_device(self.model, *self.batches[k % BATCHES], self.engine)

    def bare(self, k: int) -> None:
        """The network, a sum of its outputs, backward, optimiser: what no training step can do without."""
        images, targets = self.placed(k)
        self.optimiser.zero_grad(set_to_none=True)
        with autocast(images, self.engine):
            outputs = self.model.network(images, targets.frame)
        sum((value.float().mean() for value in outputs.values()), torch.zeros((), device=self.device)).backward()
        for group in self.optimiser.param_groups:
            group["lr"] = 0.0
        self.optimiser.step()

    def parts(self, k: int) -> dict[str, float]:
        """Milliseconds of network, loss, backward and update (clipping and optimiser), on the device's clock."""
        images, targets = self.placed(k)
        self.optimiser.zero_grad(set_to_none=True)
        clock = Laps(self.device)
        with autocast(images, self.engine):
            outputs = self.model.network(images, targets.frame)
        clock.lap("network")
        losses = self.model.loss(full_precision(outputs), targets)
        loss = total(losses)
        clock.lap("loss")
        loss.backward()
        clock.lap("backward")
        clip_gradients(self.optimiser, self.case.optim.clip_norm, self.case.optim.clip_value)
        for group in self.optimiser.param_groups:
            group["lr"] = 0.0
        self.optimiser.step()
        clock.lap("update")
        return clock.milliseconds()

    def timed(self, work: Callable[[int], Any]) -> float:
        """Median milliseconds of `work(k)`."""
        return timed(work, self.device, self.steps)


class Laps:
    """Times between calls of `lap` by events of the device, or by the host's clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda, self.marks = device.type == "cuda", []
        synchronise(device)
        self.lap("start")

    def lap(self, name: str) -> None:
        mark: Any = time.perf_counter()
        if self.cuda:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        self.marks.append((name, mark))

    def milliseconds(self) -> dict[str, float]:
        if self.cuda:
            torch.cuda.synchronize()
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return {name: a.elapsed_time(b) if self.cuda else 1e3 * (b - a) for (_, a), (name, b) in pairs}


def timed(work: Callable[[int], Any], device: torch.device, steps: int) -> float:
    """Median milliseconds of `work(k)` after two that are not timed, the device waited for after each."""
    taken = []
    for k in range(2 + steps):
        synchronise(device)
        start = time.perf_counter()
        work(k)
        synchronise(device)
        taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken[2:])


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(case: Case, precision: str, device: str, steps: int, compiled: bool) -> Figures:
    """Everything about one case at one precision.

    Raises:
        torch.OutOfMemoryError: the batch does not fit.
    """
    bench, cuda = Bench(case, precision, device, steps), device == "cuda"
    figures: Figures = {"case": case.name, "precision": precision, "size": case.size, "batch": case.batch}
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    figures["step"] = bench.timed(lambda _: bench.step())
    if bench.step().skipped:
        raise FloatingPointError(f"{case.name}: a loss or gradient is not finite")
    if cuda:
        figures["memory"] = torch.cuda.max_memory_allocated() / 2**30
    parts = [bench.parts(k) for k in range(2 + steps)][2:]
    figures |= {name: statistics.median(part[name] for part in parts) for name in parts[0]}
    figures["bare"] = bench.timed(bench.bare)
    figures["waits"] = waits(bench.step, cuda)
    if cuda:
        figures["busy"] = busy(bench.step, 2) / figures["step"]
    with FlopCounterMode(display=False) as counter:
        bench.bare(0)
    figures["teraflop"] = counter.get_total_flops() / 1e12
    if compiled:
        figures |= measure_compiled(bench)
    return figures


def measure_peer(case: Case, precision: str, device: str, steps: int) -> Figures:
    """Milliseconds and memory of the same architecture in transformers; nothing where there is none."""
    set_tf32(case.engine(precision))
    step = stepper(case, batches(case, 32, BATCHES), device, case.engine(precision))
    if step is None:
        return {}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    figures: Figures = {"peer": timed(step, torch.device(device), steps)}
    if device == "cuda":
        figures["peer_memory"] = torch.cuda.max_memory_allocated() / 2**30
    return figures


def waits(step: Callable[[], None], cuda: bool) -> dict[str, int]:
    """Where a step waits for the device, or on a CPU where it reads values: place in panoptic/ to count."""
    if not cuda:
        with HostReads() as reads:
            step()
        return dict(reads.places)
    places: Counter[str] = Counter()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message):
            places[place()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return dict(places)


def busy(step: Callable[[], None], count: int) -> float:
    """Milliseconds of a step in which the GPU computes or copies: the union of all its kernels."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(count):
            step()
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or []
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    microseconds, reached = 0.0, float("-inf")
    for start, end in spans:
        microseconds += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return microseconds / 1e3 / count


def measure_compiled(bench: Bench) -> Figures:
    """The same step with a compiled network: seconds to compile, milliseconds, graphs and breaks."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compile_network(bench.model)
    start = time.perf_counter()
    try:
        bench.step()
        synchronise(bench.device)
        seconds = time.perf_counter() - start
        milliseconds = bench.timed(lambda _: bench.step())
    except Exception as error:
        return {"compiled": None, "compile_error": f"{type(error).__name__}: {str(error)[:400]}"}
    finally:
        del bench.model.network
    return {
        "compiled": milliseconds,
        "compile_seconds": seconds,
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": dict(counters["graph_break"]),
    }


def matrix_rate(precision: str, device: str, side: int = 8192) -> float:
    """TFLOP/s of one large matrix product of random numbers, the best that this machine reaches."""
    set_tf32(Engine(*PRECISIONS[precision]))
    kind = getattr(torch, PRECISIONS[precision][0])
    a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    taken = []
    for _ in range(8):
        clock = Laps(torch.device(device))
        _ = a @ b
        clock.lap("product")
        taken.append(clock.milliseconds()["product"])
    return 2 * side**3 / statistics.median(taken[3:]) / 1e9


def hardware(device: str) -> str:
    """The device and the versions that matter, in a line."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}; torch {torch.__version__}"


def fitting(case: Case, precision: str, device: str, steps: int, compiled: bool) -> Figures:
    """`measure`, with half the batch as often as memory asks for it; a fault becomes part of the result."""
    while True:
        try:
            return measure(case, precision, device, steps, compiled)
        except torch.OutOfMemoryError as error:
            if case.batch == 1:
                return _fault(case, precision, error)
            case = replace(case, batch=case.batch // 2)
        except Exception as error:
            traceback.print_exc()
            return _fault(case, precision, error)
        finally:
            _free()


def _free() -> None:
    """Give the memory of what is no longer used back to the device."""
    gc.collect()
    with contextlib.suppress(Exception):
        torch.cuda.empty_cache()


def _fault(case: Case, precision: str, error: Exception) -> Figures:
    reason = f"{type(error).__name__}: {error}"[:60].replace("\n", " ")
    return {"case": case.name, "precision": precision, "batch": case.batch, "error": reason}


def run(
    cases: list[Case], precisions: list[str], device: str, steps: int, compiled: list[str], peers: list[str]
) -> Iterator[Figures]:
    """The figures of every case and precision; also compiled, and beside a peer, at the precisions named for these."""
    for case in cases:
        for precision in precisions:
            figures = fitting(case, precision, device, steps, precision in compiled)
            if precision in peers and "error" not in figures:
                try:
                    same = replace(case, batch=figures["batch"])
                    figures |= measure_peer(same, precision, device, steps)
                except Exception as error:
                    figures["peer_error"] = f"{type(error).__name__}: {error}"
                _free()
            yield figures


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="note the cases down in this file, and end")
    parser.add_argument("--cases", type=Path, help="what --write made; without it the presets are read")
    parser.add_argument("--only", nargs="*", help="names of cases")
    parser.add_argument("--precisions", nargs="+", default=["bfloat16", "tf32"], choices=list(PRECISIONS))
    parser.add_argument("--compiled", nargs="*", default=["bfloat16"], help="precisions at which to compile too")
    parser.add_argument("--peers", nargs="*", default=["bfloat16"], help="precisions at which transformers runs too")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--divide", type=int, default=1, help="height, width and batch, to try it out")
    parser.add_argument("--json", type=Path, help="all figures, a line each")
    options = parser.parse_args(arguments)
    if options.write:
        write(from_presets(), options.write)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = read(options.cases) if options.cases else from_presets()
    cases = [case for case in cases if not options.only or case.name in options.only]
    if options.divide > 1:
        by = options.divide
        sizes = [(max(64, case.size[0] // by), max(64, case.size[1] // by)) for case in cases]
        cases = [replace(c, size=size, batch=max(2, c.batch // by)) for c, size in zip(cases, sizes, strict=True)]
    side = 8192 if device == "cuda" else 256
    peaks = {precision: matrix_rate(precision, device, side) for precision in options.precisions}
    rows = []
    for figures in run(cases, options.precisions, device, options.steps, options.compiled, options.peers):
        rows.append(row(figures, peaks[figures["precision"]]))
        print(json.dumps(figures), flush=True)
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(figures) + "\n")
    products = ", ".join(f"{precision} {rate:.0f} TFLOP/s" for precision, rate in peaks.items())
    print(f"\n{hardware(device)}. One large matrix product: {products}.\n")
    print(table(rows))


if __name__ == "__main__":
    main()

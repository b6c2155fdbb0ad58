"""The figures of `gpu.py` as a table."""

from __future__ import annotations

from typing import Any

from panoptic.metrics.text import markdown_table

Figures = dict[str, Any]
"""Of one case at one precision, by name."""

COLUMNS = ("case", "precision", "batch", "step ms", "images/s", "GiB", "network", "loss", "backward", "update") + (
    "step / bare",
    "busy",
    "waits",
    "TFLOP/s",
    "of peak",
    "compiled ms",
    "speed-up",
    "breaks",
    "peer ms",
    "peer GiB",
)


def row(figures: Figures, peak: float) -> list[str]:
    """The figures as cells of the table."""
    if "error" in figures:
        return [
            figures["case"],
            figures["precision"],
            str(figures["batch"]),
            figures["error"],
            *[""] * (len(COLUMNS) - 4),
        ]
    rate = figures["teraflop"] / figures["step"] * 1e3
    compiled = figures.get("compiled")
    size = "x".join(map(str, figures["size"]))
    return [
        figures["case"],
        figures["precision"],
        f"{figures['batch']} of {size}",
        f"{figures['step']:.0f}",
        f"{1e3 * figures['batch'] / figures['step']:.1f}",
        f"{figures['memory']:.1f}" if "memory" in figures else "-",
        *(f"{figures[name]:.0f}" for name in ("network", "loss", "backward", "update")),
        f"{figures['step'] / figures['bare']:.2f}",
        f"{100 * figures['busy']:.0f} %" if "busy" in figures else "-",
        str(sum(figures["waits"].values())),
        f"{rate:.0f}",
        f"{100 * rate / peak:.0f} %",
        f"{compiled:.0f}" if compiled else "-",
        f"{figures['step'] / compiled:.2f}" if compiled else "-",
        str(sum(figures["breaks"].values())) if compiled else figures.get("compile_error", "-")[:40],
        f"{figures['peer']:.0f}" if "peer" in figures else figures.get("peer_error", "-")[:40],
        f"{figures['peer_memory']:.1f}" if "peer_memory" in figures else "-",
    ]


def table(rows: list[list[str]]) -> str:
    """Rows as Markdown under `COLUMNS`."""
    return markdown_table([COLUMNS, *rows])

"""The studies as a list, by the documents and tables that they repeat."""

from __future__ import annotations

import itertools

from pipelines.config import check_path
from pipelines.studies import STUDIES
from pipelines.studies.config import Options, Presets, check, preset_of
from pipelines.studies.papers import TABLES
from pipelines.studies.study import Study


def listing(presets: Presets) -> str:
    """Every table of every document, and below it its studies with their rows, and why one cannot run yet.

    Studies of no document come last.
    """
    lines, rest = [], dict(STUDIES)
    for document, tables in TABLES.items():
        lines.append(document)
        for table, names in tables.items():
            if not any(STUDIES[name].title.startswith(("Table", "Section")) for name in names if name in STUDIES):
                lines.append(f"  {table}" + ("" if names else " (no study)"))
            lines += [line for name in names if name in rest for line in _listed(name, rest.pop(name), presets)]
    if rest:
        lines.append("Beside the documents' tables")
    return "\n".join(lines + [line for name, study in rest.items() for line in _listed(name, study, presets)])


def _listed(name: str, study: Study, presets: Presets) -> list[str]:
    """The lines of one study."""
    quoted = len(study.rows) - len(study.trained)
    rows = f"{len(study.rows)} rows" + (f", {quoted} of them quoted" if quoted else "")
    reason = unavailable(name, presets)
    return [f"    {name:18} {rows:>8}  {study.title}", *([f"{'':23} not yet: {reason}"] if reason else [])]


def unavailable(name: str, presets: Presets) -> str:
    """The error of a preset or an option that a study's rows need and that does not exist; "" where all exist."""
    study = STUDIES[name]
    for small in (False, True):
        try:
            check(Options(study=(name,), small=small), [], presets)
            for preset in {preset_of(study, row, small) for row in study.trained}:
                rows = [row for row in study.trained if preset_of(study, row, small) == preset]
                changes = [row.small_change if small and row.small_change is not None else row.change for row in rows]
                base = presets[preset]()
                for path in {*({} if small else study.recipe), *study.setting, *itertools.chain(*changes)}:
                    check_path(base, path)
        except ValueError as error:
            return str(error)
    return ""

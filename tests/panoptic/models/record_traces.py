"""Write traces.json anew, after a change of behaviour that is meant: `python -m tests.panoptic.models.record_traces`.

Names of cases as arguments limit it to these. Says what changed, and writes nothing of a case that does not repeat.
"""

from __future__ import annotations

import sys

from tests.panoptic.models.traces import CASES, differences, digests, measured, recorded, write


def main(names: list[str]) -> None:
    """Measure twice, with digests on one and on two threads; print what is not as recorded; record it."""
    unknown = set(names) - CASES.keys()
    if unknown:
        sys.exit(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    before = recorded()
    content = {name: case for name, case in before.items() if name in CASES}
    for name in sorted(before.keys() - CASES.keys()):
        print(f"{name}: gone", flush=True)
    for name in names or CASES:
        found = measured(name)
        again = {**measured(name), **digests(name, count=2)}
        if unsteady := differences(found, again, 0.0):
            sys.exit(f"{name}: does not repeat: {'; '.join(unsteady)}")
        lines = ["new"] if name not in before else differences(before[name], found, 0.0)
        print(f"{name}: {'; '.join(lines) or 'as it was'}", flush=True)
        content[name] = found
        write({name: content[name] for name in CASES if name in content})


if __name__ == "__main__":
    main(sys.argv[1:])

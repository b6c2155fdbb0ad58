"""The chain of executions in which Ray Data reads a stream, here without Ray."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Generator, Sequence

import pytest

from pipelines.data.ray_source import HELD, in_turn


class Executions:
    """Executions that note what becomes of them; each plan is its number."""

    def __init__(self, lengths: Sequence[int], fails: str = "") -> None:
        """Args: the items of each execution, and what fails: nothing, the "plan" or the "begin" of the second one."""
        ends = list(itertools.accumulate(lengths, initial=0))
        self.parts = [range(first, end) for first, end in itertools.pairwise(ends)]
        self.fails = fails
        self.planned, self.begun = ([threading.Event() for _ in lengths] for _ in range(2))
        self.at_once: list[int] = []
        """How many ran as each one began."""
        self.running: list[int] = []

    def items(self) -> Generator[int, None, None]:
        return in_turn(self.parts, self.plan, self.begin)

    def plan(self, part: range) -> int:
        number = self.parts.index(part)
        if (number, self.fails) == (1, "plan"):
            raise OSError("no memory to plan")
        self.planned[number].set()
        return number

    def begin(self, number: int) -> Generator[int, None, None]:
        if (number, self.fails) == (1, "begin"):
            raise OSError("no machine to begin on")
        self.running.append(number)
        self.at_once.append(len(self.running))
        self.begun[number].set()
        try:
            yield from self.parts[number]
        finally:
            self.running.remove(number)


@pytest.mark.parametrize("lengths", [[], [5], [1, 1, 1, 1], [30, 30, 7], [HELD, HELD + 1, HELD - 1, 2 * HELD]])
def test_the_items_of_all_executions_come_in_order_and_no_two_run_at_once(lengths: list[int]) -> None:
    executions = Executions(lengths)
    assert list(executions.items()) == list(range(sum(lengths)))
    assert executions.at_once == [1] * len(lengths)
    assert not executions.running


def test_the_next_execution_is_planned_at_half_and_begun_before_the_last_items_are_taken() -> None:
    length = 5 * HELD
    executions, waits = Executions([length, length, length]), 10
    items = executions.items()
    for number in range(2):
        for _ in range(length // 2):
            next(items)
        assert not executions.planned[number + 1].is_set()
        next(items)  # the first one of the other half
        assert executions.planned[number + 1].wait(waits)
        for _ in range(length // 2 - HELD - 1):
            next(items)
        assert not executions.begun[number + 1].is_set() and executions.running == [number]
        next(items)  # the first of those that are held
        assert executions.begun[number + 1].wait(waits)
        assert [next(items) for _ in range(HELD - 1)] == list(range((number + 1) * length))[-HELD + 1 :]
    assert list(items) == list(range(2 * length, 3 * length))


@pytest.mark.parametrize("fails", ["plan", "begin"])
def test_what_fails_ahead_of_time_is_raised_after_the_items_before_it(fails: str) -> None:
    executions = Executions([30, 30, 30], fails)
    items = executions.items()
    assert [next(items) for _ in range(30)] == list(range(30))
    with pytest.raises(OSError, match=f"to {fails}"):
        next(items)
    assert not executions.running and not executions.planned[2].is_set()


def test_an_execution_that_breaks_off_in_its_last_items_is_no_end() -> None:
    def broken(number: int) -> Generator[int, None, None]:
        yield from range(28)
        raise OSError("a task was lost")

    items = in_turn([range(30), range(30, 60)], lambda part: 0, broken)
    assert [next(items) for _ in range(28)] == list(range(28))
    with pytest.raises(OSError, match="a task was lost"):
        next(items)


@pytest.mark.parametrize("taken", [1, 20, 30 - HELD + 1, 29, 30, 31])
def test_closing_ends_what_runs_and_what_is_under_way(taken: int) -> None:
    """After the first item, in the second half, while the next one begins, and when it has begun."""
    executions, before = Executions([30, 30, 30]), threading.active_count()
    items = executions.items()
    for _ in range(taken):
        next(items)
    items.close()
    assert not executions.running and threading.active_count() == before
    assert not executions.begun[2].is_set()

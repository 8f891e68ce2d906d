"""Timing by turns: each round runs every contestant once, so that a machine's moods touch all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

_WARM = 8  # steps at most that tell how long one takes
Step = Callable[[], None]
K = TypeVar("K")


@dataclass(frozen=True)
class Spread:
    """A median between its quartiles.

    Args:
        median: The middle value.
        low: First quartile.
        high: Third quartile.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Return the spread of some values."""
        values = list(values)
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def time_step(step: Step, repeats: int, synchronize: Step) -> float:
    """Return seconds of one step, the mean over a turn of some repeats."""
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    synchronize()
    return (time.perf_counter() - start) / repeats


def warm_up(step: Step, synchronize: Step) -> tuple[float, float]:
    """Return seconds until a step runs at its speed (compilation among them), and about how many it then takes."""
    start = time.perf_counter()
    step()
    singles = [time_step(step, 1, synchronize) for _ in range(2)]
    seconds = time.perf_counter() - start
    while len(singles) < _WARM and sum(singles) < 0.5:  # short steps are disturbed more
        singles.append(time_step(step, 1, synchronize))
    return seconds, min(singles)


def take_turns(
    steps: Mapping[K, tuple[Step, int]],
    *,
    rounds: int,
    synchronize: Step,
    out_of_time: Callable[[], bool],
    progress: Callable[[], object],
    failed: Callable[[K, Exception], object],
    least: int = 3,
) -> dict[K, list[float]]:
    """Return seconds of one step in each round, for each contestant that never failed.

    Args:
        steps: A contestant's step and its repeats in a turn.
        rounds: Rounds at most.
        out_of_time: Asked after each round; there are `least` rounds even so.
        progress: Called after each turn.
        failed: Called with who raised what; it takes no more turns.
    """
    seconds: dict[K, list[float]] = {name: [] for name in steps}
    for done in range(rounds):
        if done >= least and out_of_time():
            break
        for name in list(seconds):
            try:
                seconds[name].append(time_step(*steps[name], synchronize))
            except Exception as error:  # others' models
                failed(name, error)
                del seconds[name]
            progress()
    return seconds

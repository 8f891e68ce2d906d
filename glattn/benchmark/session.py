"""One run of the benchmark: its cases one after another, in each all models by turns with a matrix product."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from glattn.benchmark import rows as table
from glattn.benchmark.contestant import DTYPES, Case, Contestant, prepare
from glattn.benchmark.cost import measure_growth
from glattn.benchmark.machine import matrix_product, synchronizer
from glattn.benchmark.peers import PEERS, SIZES
from glattn.benchmark.rows import Row
from glattn.benchmark.timing import Spread, Step, take_turns, warm_up

_PRODUCT = "matrix product"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """How long and against what is measured.

    Args:
        rounds: Rounds of a case.
        turn: Seconds of a model's turn in a round.
        minutes: Time for the run; a case that has begun still gets three rounds. None: no limit.
        baseline: The model that ratios are to.
    """

    rounds: int
    turn: float
    minutes: float | None
    baseline: str


class Session:
    """Measures cases and keeps their rows in a file.

    Args:
        path: The CSV file; rows that it holds stay.
        about: The machine's columns.
        report: Called with what goes on, how much of it is done, and how much there is.
    """

    def __init__(
        self, path: Path, settings: Settings, device: torch.device, about: Row, report: Progress, *, resume: bool
    ) -> None:
        self.path, self.settings, self.device, self.about, self.report = path, settings, device, about, report
        self.rows: list[Row] = table.read(path) if resume and path.exists() else []
        self.end = time.monotonic() + settings.minutes * 60 if settings.minutes else float("inf")

    def out_of_time(self) -> bool:
        """Tell whether the run's time is up."""
        return time.monotonic() >= self.end

    def run(self, names: Sequence[str], cases: Sequence[Case]) -> Iterator[tuple[Case, list[Row]]]:
        """Yield each case with all its rows once they are in the file; stop where the time is up."""
        for case in cases:
            known = {table.key(row): row for row in self.rows}
            keys = {name: table.key(self._head(name, case)) for name in names}
            missing = [name for name in names if keys[name] not in known]
            if missing:
                if self.out_of_time():
                    return
                self.rows += self._measure(missing, case)
                table.write(self.path, self.rows)
            wanted = set(keys.values())
            yield case, [row for row in self.rows if table.key(row) in wanted]

    def _head(self, name: str, case: Case) -> Row:
        peer = PEERS.get(name)
        family, _, own = name.partition("_")
        own_size = own if family == "glattn" and own in SIZES else ""
        row = dict.fromkeys(table.FIELDS, "") | self.about
        return row | {
            "model": name,
            "size_class": peer.size if peer else own_size,
            "published_top1": f"{peer.top1:.3f}" if peer else "",
            "published_pixels": str(peer.pixels) if peer else "",
            "task": case.task,
            "precision": case.precision,
            "engine": case.engine,
            "batch": str(case.batch),
            "pixels": str(case.pixels),
        }

    def _measure(self, names: Sequence[str], case: Case) -> list[Row]:
        """Return rows of the models; the baseline is measured along, for the ratios, where its row is there."""
        gc.collect()
        torch.compiler.reset()
        torch.manual_seed(0)
        synchronize = synchronizer(self.device)
        product, product_macs = matrix_product(self.device, DTYPES[case.precision])
        ready: dict[str, Contestant] = {}
        steps: dict[str, tuple[Step, int]] = {
            _PRODUCT: (product, warm_up(product, synchronize, turn=self.settings.turn)[1])
        }
        errors: dict[str, str] = {}
        seconds_to_warm: dict[str, float] = {}
        everyone = list(dict.fromkeys([*names, self.settings.baseline]))
        for done, name in enumerate(everyone):
            self.report(f"{case}: preparing {name}", done, len(everyone))
            try:
                ready[name] = prepare(name, case, self.device, turn=self.settings.turn / 3)
                seconds_to_warm[name], repeats = warm_up(ready[name].step, synchronize, turn=self.settings.turn)
                steps[name] = (ready[name].step, repeats)
            except Exception as error:  # others' models: what one of them cannot do is a row, not the run's end
                ready.pop(name, None)
                errors[name] = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:200]
        turns = 0

        def progress() -> None:
            nonlocal turns
            turns += 1
            self.report(str(case), turns, len(steps) * self.settings.rounds)

        seconds = take_turns(
            steps, rounds=self.settings.rounds, synchronize=synchronize, out_of_time=self.out_of_time, progress=progress
        )
        rate = product_macs / Spread.of(seconds[_PRODUCT]).median / 1e9
        result = []
        for name in names:
            row = self._head(name, case)
            if name in errors:
                result.append(row | {"error": errors[name]})
                continue
            growth = measure_growth(ready[name].step, self.device)
            row |= _figures(ready[name], case, seconds[name], rate, growth)
            row |= {"repeats": str(steps[name][1]), "warm_up_seconds": f"{seconds_to_warm[name]:.2f}"}
            if self.settings.baseline in seconds:
                row |= _ratio(self.settings.baseline, seconds[self.settings.baseline], seconds[name])
            result.append(row)
        return result


def _figures(contestant: Contestant, case: Case, seconds: list[float], rate: float, growth: int) -> Row:
    spread = Spread.of(seconds)
    macs_per_second = contestant.macs * case.batch / spread.median / 1e9
    return {
        "memory_format": contestant.memory_format,
        "folded": contestant.folded,
        "params_m": f"{contestant.parameters / 1e6:.3f}",
        "gmacs": f"{contestant.macs / 1e9:.6g}",
        "images_per_second": f"{case.batch / spread.median:.6g}",
        "images_per_second_low": f"{case.batch / spread.high:.6g}",
        "images_per_second_high": f"{case.batch / spread.low:.6g}",
        "milliseconds": f"{spread.median * 1e3:.6g}",
        "rounds": str(len(seconds)),
        "gmacs_per_second": f"{macs_per_second:.6g}",
        "matmul_gmacs_per_second": f"{rate:.6g}",
        "share_of_matmul": f"{macs_per_second / rate:.6g}",
        "held_mb": f"{contestant.held / 1e6:.2f}",
        "peak_mb": f"{(contestant.held + growth) / 1e6:.2f}",
    }


def _ratio(baseline: str, theirs: list[float], mine: list[float]) -> Row:
    """Return how many times as fast as the baseline: round by round, so that a slow minute cancels."""
    spread = Spread.of(a / b for a, b in zip(theirs, mine, strict=True))
    return {
        "baseline": baseline,
        "ratio": f"{spread.median:.4f}",
        "ratio_low": f"{spread.low:.4f}",
        "ratio_high": f"{spread.high:.4f}",
    }

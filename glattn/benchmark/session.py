"""One run of the benchmark: its cases one after another, in each all models by turns with a matrix product."""

from __future__ import annotations

import contextlib
import gc
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._dynamo

from glattn.benchmark import rows as table
from glattn.benchmark.contestant import DTYPES, FORMATS, Case, Contestant, prepare
from glattn.benchmark.cost import measure_growth
from glattn.benchmark.machine import matrix_product, synchronizer
from glattn.benchmark.peers import PEERS, SIZES
from glattn.benchmark.probe import usable_formats
from glattn.benchmark.rows import Row
from glattn.benchmark.timing import Spread, Step, take_turns, warm_up

_PRODUCT = ("matrix product", "")
_CLOSE = 1.5  # a memory format so many times slower when warming up takes no turns
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
        path: The CSV file; rows that it holds stay, but for those asked for that are of other code or another baseline,
            of fewer rounds, or of a case whose rows were not measured together.
        about: The machine's columns.
        report: Called with what goes on, how much of it is done, and how much there is.
    """

    def __init__(
        self, path: Path, settings: Settings, device: torch.device, about: Row, report: Progress, *, resume: bool
    ) -> None:
        self.path, self.settings, self.device, self.about, self.report = path, settings, device, about, report
        self.rows: list[Row] = table.read(path) if resume and path.exists() else []
        self.no_baseline: dict[Case, str] = {}
        """Why the baseline could not be measured, of cases where it could not."""
        self.end = time.monotonic() + settings.minutes * 60 if settings.minutes else float("inf")

    def out_of_time(self) -> bool:
        """Tell whether the run's time is up."""
        return time.monotonic() >= self.end

    def run(self, names: Sequence[str], cases: Sequence[Case]) -> Iterator[tuple[Case, list[Row]]]:
        """Yield each case with all its rows once they are in the file; measure no more where the time is up.

        Raises:
            ValueError: The file has other models' rows of these cases whose ratios are to another baseline.
        """
        for row in self.rows:
            if row["model"] in names or not row["ratio"] or row["baseline"] == self.settings.baseline:
                continue
            if any(table.key(row) == table.key(self._head(row["model"], case)) for case in cases):
                raise ValueError(f"{self.path}: ratios of {row['model']} are to {row['baseline']}; give another --out")
        for case in cases:
            wanted = {table.key(self._head(name, case)) for name in names}
            kept = [row for row in self.rows if table.key(row) in wanted and self._stays(row)]
            measurements = {row["matmul_gmacs_per_second"] for row in kept if not row["error"]}
            if not wanted <= {table.key(row) for row in kept} or len(measurements) > 1:
                if self.out_of_time():
                    continue
                # all of them, those that are there too: only what took turns can be compared
                # models of one class share one store of compiled programs; what it has no room for runs eager, unsaid
                room = torch._dynamo.config.cache_size_limit + len(FORMATS) * len(names)
                with torch._dynamo.config.patch(cache_size_limit=room):
                    measured = self._measure(names, case)
                self.rows = [row for row in self.rows if table.key(row) not in wanted] + measured
                table.write(self.path, self.rows)
            yield case, [row for row in self.rows if table.key(row) in wanted]

    def _stays(self, row: Row) -> bool:
        """Tell whether a row is of this code, for all that is known, its ratio to this baseline, and of all rounds."""
        if row["commit"].endswith("-dirty") or any(row[name] != self.about[name] for name in ("glattn", "commit")):
            return False
        if row["error"]:
            return True
        return row["baseline"] == self.settings.baseline and int(row["rounds"]) >= self.settings.rounds

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
            "published_source": peer.source if peer else "",
            "task": case.task,
            "precision": case.precision,
            "engine": case.engine,
            "batch": str(case.batch),
            "pixels": str(case.pixels),
            "baseline": self.settings.baseline,
        }

    def _measure(self, names: Sequence[str], case: Case) -> list[Row]:
        """Return rows of the models, each in its faster memory format; the baseline takes turns for the ratios."""
        gc.collect()
        torch.compiler.reset()
        torch.manual_seed(0)
        synchronize = synchronizer(self.device)
        product, product_macs = matrix_product(self.device, DTYPES[case.precision])

        def repeats(seconds: float) -> int:
            return max(1, round(self.settings.turn / seconds))

        ready: dict[tuple[str, str], Contestant] = {}
        steps: dict[tuple[str, str], tuple[Step, int]] = {
            _PRODUCT: (product, repeats(warm_up(product, synchronize)[1]))
        }
        errors: dict[str, str] = {}
        seconds_to_warm: dict[tuple[str, str], float] = {}
        everyone = list(dict.fromkeys([*names, self.settings.baseline]))
        for done, name in enumerate(everyone):
            self.report(f"{case}: preparing {name}", done, len(everyone))
            trials: list[tuple[float, Contestant]] = []
            with _noted(errors, name):
                for one in prepare(name, case, self.device, usable_formats(name, case, self.device)):
                    with _noted(errors, name):
                        seconds_to_warm[name, one.memory_format], single = warm_up(one.step, synchronize)
                        trials.append((single, one))
            least = min((single for single, _ in trials), default=0.0)
            for single, one in trials:
                if single < _CLOSE * least:
                    ready[name, one.memory_format] = one
                    steps[name, one.memory_format] = (one.step, repeats(single))
            del trials
        turns = 0

        def progress() -> None:
            nonlocal turns
            turns += 1
            self.report(str(case), turns, len(steps) * self.settings.rounds)

        def failed(entry: tuple[str, str], error: Exception) -> None:
            if entry == _PRODUCT:
                raise error
            errors[entry[0]] = _said(error)

        seconds = take_turns(
            steps,
            rounds=self.settings.rounds,
            synchronize=synchronize,
            out_of_time=self.out_of_time,
            progress=progress,
            failed=failed,
        )
        rate = product_macs / Spread.of(seconds[_PRODUCT]).median / 1e9
        median = {entry: Spread.of(seconds[entry]).median for entry in ready if entry in seconds}
        faster = {
            name: min((entry for entry in median if entry[0] == name), key=median.__getitem__) for name, _ in median
        }
        if self.settings.baseline not in faster:
            self.no_baseline[case] = errors[self.settings.baseline]
        result = []
        for name in names:
            row: Row = {}
            if entry := faster.get(name):
                with _noted(errors, name):
                    # a graph's memory is its own, taken before
                    growth = None if case.engine == "graph" else measure_growth(ready[entry].step, self.device)
                    row = _figures(ready[entry], case, seconds[entry], rate, growth)
                    row |= {"repeats": str(steps[entry][1]), "warm_up_seconds": f"{seconds_to_warm[entry]:.2f}"}
                    if self.settings.baseline in faster:
                        row |= _ratio(seconds[faster[self.settings.baseline]], seconds[entry])
            result.append(self._head(name, case) | (row or {"error": errors[name]}))
        return result


@contextlib.contextmanager
def _noted(errors: dict[str, str], name: str) -> Iterator[None]:
    """Note what others' models raise: what one of them cannot do is a row, not the run's end."""
    try:
        yield
    except Exception as error:
        errors[name] = _said(error)


def _said(error: Exception) -> str:
    return re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:200]


def _figures(contestant: Contestant, case: Case, seconds: list[float], rate: float, growth: int | None) -> Row:
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
        "held_mb": f"{contestant.held() / 1e6:.2f}",
        "peak_mb": "" if growth is None else f"{(contestant.held() + growth) / 1e6:.2f}",
    }


def _ratio(theirs: list[float], mine: list[float]) -> Row:
    """Return how many times as fast as the baseline: round by round, so that a slow minute cancels."""
    spread = Spread.of(a / b for a, b in zip(theirs, mine, strict=True))
    return {
        "ratio": f"{spread.median:.4f}",
        "ratio_low": f"{spread.low:.4f}",
        "ratio_high": f"{spread.high:.4f}",
    }

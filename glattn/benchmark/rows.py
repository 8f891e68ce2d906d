"""Rows of a benchmark: a CSV file that grows case by case and is whole at any time."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from glattn.files import write_text

Row = dict[str, str]

FIELDS = (
    "model", "size_class", "published_top1", "published_pixels", "published_source",
    "task", "precision", "engine", "batch", "pixels",
    "memory_format", "folded", "params_m", "gmacs",
    "images_per_second", "images_per_second_low", "images_per_second_high", "milliseconds", "rounds", "repeats",
    "warm_up_seconds", "gmacs_per_second", "matmul_gmacs_per_second", "share_of_matmul", "held_mb", "peak_mb",
    "baseline", "ratio", "ratio_low", "ratio_high",
    "device", "machine", "cores", "threads", "capability", "freed_memory",
    "python", "torch", "timm", "glattn", "commit", "error",
)  # fmt: skip
_PLACE = ("device", "machine", "cores", "threads", "capability", "freed_memory", "torch", "timm")
_KEY = ("model", "task", "precision", "engine", "batch", "pixels", *_PLACE)


def key(row: Row) -> tuple[str, ...]:
    """Return what a row is the measurement of: model, case, machine and libraries."""
    return tuple(row[name] for name in _KEY)


def same_place(rows: Iterable[Row], about: Row) -> list[Row]:
    """Return the rows of one machine, its libraries and what it does with freed memory."""
    return [row for row in rows if all(row[name] == about[name] for name in _PLACE)]


def places(rows: Iterable[Row]) -> str:
    """Return the machines that rows were measured on, in words."""
    return "; ".join(dict.fromkeys(map(_place, rows)))


def _place(row: Row) -> str:
    if row["device"] == "cuda":
        return row["machine"]
    kind = f" ({row['capability']})" if row["capability"] else ""
    returned = ", freed memory returned" if row["freed_memory"] == "returned" else ""
    return f"{row['threads']} threads of {row['machine']}{kind}{returned}"


def read(path: Path) -> list[Row]:
    """Return a file's rows.

    Raises:
        ValueError: It is no benchmark's file, or a line of it is damaged.
    """
    head, *lines = path.read_bytes().splitlines() or [b""]  # no cell has a line break
    names = head.decode(errors="replace").split(",")
    if set(names) != set(FIELDS):
        raise ValueError(f"{path} is not a table of this version of glattn benchmark; give another --out")
    found = []
    for number, line in enumerate(lines, 2):
        try:
            (cells,) = csv.reader([line.decode()], strict=True)
            found.append(dict(zip(names, cells, strict=True)))
        except (ValueError, csv.Error):
            raise ValueError(f"{path}, line {number}: damaged; remove the line, or give another --out") from None
    return found


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write rows, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


_COLUMNS = (
    ("model", "model", ""),
    ("params_m", "M", ".1f"),
    ("gmacs", "GMAC", ".2f"),
    ("published_top1", "top-1", ".1f"),
    ("images_per_second", "img/s", ".1f"),
    ("images_per_second_low", "25%", ".1f"),
    ("images_per_second_high", "75%", ".1f"),
    ("gmacs_per_second", "GMAC/s", ".0f"),
    ("share_of_matmul", "of mm", ".0%"),
    ("peak_mb", "MB", ".0f"),
    ("ratio", "ratio", ".2f"),
    ("memory_format", "memory", ""),
)


def table(rows: Sequence[Row]) -> str:
    """Return one case's rows as text, fastest first."""
    ok = sorted((r for r in rows if not r["error"]), key=lambda r: -float(r["images_per_second"]))
    cells = [[title for _, title, _ in _COLUMNS]]
    for row in ok:
        cells.append([f"{float(row[f]):{spec}}" if spec and row[f] else row[f] for f, _, spec in _COLUMNS])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            c.ljust(w) if i in (0, len(line) - 1) else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    lines += [f"{row['model']}: not measured: {row['error']}" for row in rows if row["error"]]
    return "\n".join(line.rstrip() for line in lines)

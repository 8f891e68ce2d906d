"""Pictures of a benchmark: speed against parameters, and how cost grows with resolution."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from glattn.benchmark.rows import Row, places
from glattn.figures import save_figure

_OURS, _THEIRS = "#b91c1c", "#475569"


def _ours(row: Row) -> bool:
    return row["model"].startswith(("glattn", "test_glattn"))


def _cases(rows: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Return rows by case and measurement: what took turns with one and the same matrix product."""
    cases: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if not row["error"]:
            names = ("task", "precision", "engine", "batch", "pixels", "matmul_gmacs_per_second")
            cases.setdefault(tuple(row[name] for name in names), []).append(row)
    return cases


def draw_speed(folder: Path, rows: Sequence[Row]) -> Path | None:
    """Draw images a second against parameters, one panel a case of the commonest size; ours in red."""
    cases = _cases(rows)
    if not cases:
        return None
    sizes = [members[0]["pixels"] for members in cases.values()]
    common = max(dict.fromkeys(sizes), key=sizes.count)
    cases = {case: members for case, members in cases.items() if members[0]["pixels"] == common}
    columns = min(2, len(cases))
    lines = -(-len(cases) // columns)
    figure = Figure(figsize=(7.5 * columns, 5.2 * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in panels[len(cases) :]:
        axes.set_axis_off()
    for axes, (case, members) in zip(panels, cases.items(), strict=False):
        task, precision, engine, batch, pixels, _ = case
        for row in members:
            x, y = float(row["params_m"]), float(row["images_per_second"])
            colour = _OURS if _ours(row) else _THEIRS
            low, high = float(row["images_per_second_low"]), float(row["images_per_second_high"])
            axes.errorbar(x, y, [[y - low], [high - y]], marker="o", markersize=5, color=colour, elinewidth=1)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.margins(0.1, 0.1)
        axes.autoscale_view()
        _label(axes, members)
        _plain_ticks(axes)
        axes.set_title(f"{task}, {precision}, {engine}, batch {batch}, {pixels} px", fontsize=10)
        axes.set_xlabel("parameters, millions")
        axes.set_ylabel("images a second (quartiles of the rounds)")
        axes.grid(alpha=0.3, which="both")
    figure.suptitle(f"on {places(rows)}", fontsize=10)
    return save_figure(figure, folder / "speed.png")


def _plain_ticks(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        axis.set_major_locator(MaxNLocator(6) if high < 4 * low else LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def _label(axes: Any, members: Sequence[Row]) -> None:
    """Name the points in a column beside the panel, none over another; scales and limits are set."""
    to_axes = axes.transData + axes.transAxes.inverted()
    least = 0.0
    for row in sorted(members, key=lambda row: float(row["images_per_second"])):
        point = (float(row["params_m"]), float(row["images_per_second"]))
        height = max(to_axes.transform(point)[1], least)
        least = height + 0.035
        axes.annotate(
            textwrap.shorten(row["model"], 40, placeholder="..."),
            point, xytext=(1.02, height), textcoords="axes fraction", va="center", fontsize=7,
            color=_OURS if _ours(row) else _THEIRS, fontweight="bold" if _ours(row) else "normal",
            arrowprops={"arrowstyle": "-", "linewidth": 0.3, "color": _THEIRS},
        )  # fmt: skip


def draw_scaling(folder: Path, rows: Sequence[Row]) -> Path | None:
    """Draw cost and memory per pixel against resolution, relative to the smallest; flat is linear in pixels."""
    swept: dict[str, list[Row]] = {}
    for (task, precision, engine, batch, *_), members in _cases(rows).items():
        if (task, precision, engine, batch) == ("infer", "fp32", "eager", "1"):
            for row in members:
                swept.setdefault(row["model"], []).append(row)
    swept = {name: members for name, members in swept.items() if len(members) > 1}
    if not swept:
        return None
    figure = Figure(figsize=(13, 5), layout="constrained")
    costs_of = {
        "time per pixel": lambda row: float(row["milliseconds"]),
        "peak memory per pixel, weights left out": lambda row: float(row["peak_mb"]) - float(row["held_mb"]),
    }
    for axes, (title, cost_of) in zip(figure.subplots(1, 2), costs_of.items(), strict=True):
        for number, (_, members) in enumerate(sorted(swept.items())):
            members = sorted(members, key=lambda row: int(row["pixels"]))
            costs = [cost_of(row) / int(row["pixels"]) ** 2 for row in members]
            if not costs[0]:  # nothing grew that torch knows of
                continue
            ours = _ours(members[0])
            axes.plot(
                [int(row["pixels"]) for row in members], [cost / costs[0] for cost in costs], marker=".",
                label=textwrap.fill(members[0]["model"], 36), color=f"C{number % 10}", linewidth=2.4 if ours else 1,
                linestyle="-" if number < 10 else "--",
            )  # fmt: skip
        axes.set_title(f"{title}, as a multiple of that at the smallest size", fontsize=10)
        axes.set_xlabel("side of the image, pixels")
        axes.set_ylim(0, max(1.2, axes.get_ylim()[1]))
        axes.grid(alpha=0.3)
    figure.axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.suptitle(f"on {places(rows)}", fontsize=10)
    return save_figure(figure, folder / "scaling.png")

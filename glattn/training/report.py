"""The end of a run: samples.png and report.html, from the exported model as anyone would load it."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure
from PIL import Image

from glattn.files import write_text
from glattn.training.classifier import open_checkpoint
from glattn.training.config import TrainConfig
from glattn.training.run_folder import draw_samples, plot_accuracies, plot_losses, thumbnail
from glattn.training.source import Source
from glattn.training.validation import Predictions, predict_source

_MATRIX_CLASSES, _MOST_CLASSES = 30, 1000
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --bar: #2563eb; --bad: #dc2626; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
.numbers { display: flex; flex-wrap: wrap; gap: 1rem; }
.numbers div { border: 1px solid var(--line); border-radius: 8px; padding: .5rem 1rem; }
.numbers b { display: block; font-size: 1.4rem; }
.scroll { overflow: auto; max-height: 36rem; } .whole { white-space: nowrap; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
td, th { padding: .2rem .5rem; text-align: right; border: 1px solid var(--line); }
th { font-weight: 600; } .name { text-align: left; overflow-wrap: anywhere; min-width: 5rem; max-width: 14rem; }
thead .name { text-align: right; writing-mode: vertical-rl; transform: rotate(180deg); min-width: 0; max-height: 9rem; }
td.strong { color: #fff; }
.curves { display: flex; flex-wrap: wrap; gap: .5rem; }
.curves img { flex: 1 1 18rem; min-width: 0; }
.meter { background: var(--line); width: min(8rem, 12vw); height: .7rem; border-radius: 4px; overflow: hidden; }
.meter i { display: block; height: 100%; background: var(--bar); }
.mistakes { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: .75rem; }
figure { margin: 0; font-size: .8rem; overflow-wrap: anywhere; } figure img { width: 100%; image-rendering: pixelated; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; }
pre { background: var(--line); padding: .75rem; border-radius: 6px; }
"""


def write_report(folder: Path, source: Source, *, say: Callable[[str], None] = print) -> None:
    """Load best/, look at every validation image once more, and write samples.png and report.html.

    Args:
        folder: The run's folder.
        source: The validation images.
        say: Prints one line.
    """
    best = folder / "best"
    if not (best / "config.json").exists():
        raise OSError(f"{best} was not written: there is no model to report on")
    config = TrainConfig.read(folder / "config.yaml")
    classifier = open_checkpoint(f"local-dir:{best}")
    device = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
    predictions = predict_source(
        classifier.model.to(device),
        source,
        classifier.data_config,
        batch_size=min(config.batch_size, 128),
        workers=config.workers,
        device=device,
    )
    noted = json.loads((best / "metrics.json").read_text(encoding="utf-8"))
    found = predictions.metrics()
    if abs(found["top1"] - noted["top1"]) > 0.5:
        say(f"warning: {best} loads with top-1 {found['top1']:.2f}%, but was measured at {noted['top1']:.2f}%")
    draw_samples(folder / "samples.png", source, predictions, seed=config.seed)
    write_text(folder / "report.html", render(folder, source, predictions))
    say(
        f"best: epoch {noted['epoch']}, top-1 {noted['top1']:.2f}%, top-5 {noted['top5']:.2f}%"
        f"; curves, mistakes and more: {folder / 'report.html'}"
    )
    say(f'load it: import timm, glattn; model = timm.create_model("local-dir:{best}", pretrained=True)')


def _embed(png: bytes) -> str:
    return f'src="data:image/png;base64,{base64.b64encode(png).decode()}"'


def _thumbnail(image: Image.Image) -> str:
    data = io.BytesIO()
    thumbnail(image).save(data, format="PNG")
    return _embed(data.getvalue())


def _curves(rows: list[dict[str, Any]]) -> str:
    """Return two pictures, which stand side by side where there is room."""
    drawn = []
    for what, plot in (("loss", plot_losses), ("validation accuracy", plot_accuracies)):
        figure = Figure(figsize=(4.5, 3.4), layout="constrained")
        plot(figure.subplots(), rows)
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=150)
        drawn.append(f'<img alt="{what} over the epochs" {_embed(data.getvalue())}>')
    return f'<div class="curves">{"".join(drawn)}</div>'


def render(folder: Path, source: Source, predictions: Predictions) -> str:
    """Return the report as one page that needs no other file."""
    table = csv.DictReader((folder / "metrics.csv").read_text(encoding="utf-8").splitlines())
    rows = [{name: float(value) for name, value in row.items() if value} for row in table]
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    metrics = json.loads((folder / "best" / "metrics.json").read_text(encoding="utf-8"))
    speed = np.median([row["images_per_second"] for row in rows])
    numbers = {
        "top-1": f"{metrics['top1']:.2f}%",
        "top-5": f"{metrics['top5']:.2f}%",
        "loss": f"{metrics['loss']:.4f}",
        "calibration error": f"{metrics['ece']:.2f}%",
        "best epoch": f"{metrics['epoch']} of {len(rows)}",
        "training": f"{speed:.0f} img/s",
    }
    title = html.escape(f"{config['model']} on {Path(config['data']).name or config['dataset']}")
    boxes = "".join(f"<div>{html.escape(name)}<b>{value}</b></div>" for name, value in numbers.items())
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{_STYLE}</style></head><body>
<h1>{title}</h1>
<div class="numbers">{boxes}</div>
<h2>Curves</h2>{_curves(rows)}
<h2>Classes</h2>{_classes(source, predictions)}
<h2>Confusion</h2>{_confusion(source, predictions)}
<h2>Worst mistakes</h2>{_mistakes(source, predictions)}
<h2>Command</h2><pre>{html.escape(shlex.join(environment["command"]))}</pre>
<p>{html.escape(versions)}; Python {html.escape(environment["python"])}; {html.escape(str(environment["device"]))},
{environment["processes"]} process(es), {environment["cores"]} cores;
commit {html.escape(str(environment["commit"]))}</p>
<details><summary>Configuration</summary><pre>{html.escape(yaml.safe_dump(config, sort_keys=False))}</pre></details>
</body></html>
"""


def _classes(source: Source, predictions: Predictions) -> str:
    classes = len(source.class_names)
    totals = np.bincount(predictions.target, minlength=classes)
    share = predictions.class_accuracy(classes)
    right = np.rint(np.nan_to_num(share) * totals).astype(int)
    order = np.argsort(share, kind="stable")  # NaN, of classes whose images could not be read, is last
    note = f"<p>The {_MOST_CLASSES} worst of {classes} classes.</p>" if classes > _MOST_CLASSES else ""
    lines = "".join(
        f'<tr><td class="name">{html.escape(source.class_names[n])}</td>'
        f'<td class="whole">{right[n]} of {totals[n]}</td>'
        + (
            f'<td>{share[n]:.1%}</td><td><div class="meter"><i style="width:{share[n]:.0%}"></i></div></td></tr>'
            if totals[n]
            else "<td>-</td><td></td></tr>"
        )
        for n in order[:_MOST_CLASSES]
    )
    return _table("<th>class</th><th>right</th><th>accuracy</th><th></th>", lines, note)


def _table(head: str, lines: str, note: str) -> str:
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
    return f'{note}<div class="scroll">{table}</div>'


def _confusion(source: Source, predictions: Predictions) -> str:
    names = [html.escape(name) for name in source.class_names]
    if len(names) <= _MATRIX_CLASSES:
        return _matrix(names, predictions.confusion(len(names)))
    wrong = predictions.target != predictions.predicted
    if not wrong.any():
        return "<p>None.</p>"
    pairs, counts = np.unique(
        np.stack([predictions.target[wrong], predictions.predicted[wrong]]), axis=1, return_counts=True
    )
    worst = np.argsort(-counts, kind="stable")[:50]
    lines = "".join(
        f'<tr><td class="name">{names[pairs[0, n]]}</td><td class="name">{names[pairs[1, n]]}</td>'
        f"<td>{counts[n]}</td></tr>"
        for n in worst
    )
    note = f"<p>The {len(worst)} most frequent of {len(counts)} confusions.</p>"
    return _table("<th>true</th><th>taken for</th><th>images</th>", lines, note)


def _matrix(names: list[str], counts: np.ndarray) -> str:
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    lines = ""
    for n, name in enumerate(names):
        lines += f'<tr><th class="name">{name}</th>'
        for m in range(len(names)):
            colour = "37,99,235" if n == m else "220,38,38"
            strong = ' class="strong"' if share[n, m] > 0.5 else ""
            lines += f'<td{strong} style="background:rgba({colour},{share[n, m]:.2f})">{counts[n, m] or ""}</td>'
        lines += "</tr>"
    head = "<th></th>" + "".join(f'<th class="name">{name}</th>' for name in names)
    return _table(head, lines, "<p>Rows: true class; columns: predicted; numbers: images.</p>")


def _mistakes(source: Source, predictions: Predictions, count: int = 24) -> str:
    wrong = np.flatnonzero(predictions.target != predictions.predicted)
    if not len(wrong):
        return "<p>None.</p>"
    figures = []
    for entry in wrong[np.argsort(-predictions.loss[wrong], kind="stable")][:count]:
        index = int(predictions.index[entry])
        image, _ = source.read(index)
        true = html.escape(source.class_names[predictions.target[entry]])
        taken = html.escape(source.class_names[predictions.predicted[entry]])
        figures.append(
            f'<figure><img alt="{true}, taken for {taken}" {_thumbnail(image)}><figcaption>'
            f"<b>{true}</b> taken for <b>{taken}</b>, "
            f"{predictions.confidence[entry]:.0%}<br>{html.escape(Path(source.name(index)).name)}</figcaption></figure>"
        )
    return f'<div class="mistakes">{"".join(figures)}</div>'

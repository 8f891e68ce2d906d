"""The end of a run: samples.png and report.html, from the exported model as anyone would load it."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from glattn.training.build import create
from glattn.training.checkpoint import write_text
from glattn.training.config import TrainConfig
from glattn.training.data import Source, ValidationBatches, make_loader
from glattn.training.run_folder import draw_samples, thumbnail
from glattn.training.validation import Predictions, predict_all

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --bar: #2563eb; --bad: #dc2626; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
.numbers { display: flex; flex-wrap: wrap; gap: 1rem; }
.numbers div { border: 1px solid var(--line); border-radius: 8px; padding: .5rem 1rem; }
.numbers b { display: block; font-size: 1.4rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
td, th { padding: .2rem .5rem; text-align: right; border: 1px solid var(--line); }
th { font-weight: 600; } td.name { text-align: left; }
.meter { background: var(--line); width: 8rem; height: .7rem; border-radius: 4px; overflow: hidden; }
.meter i { display: block; height: 100%; background: var(--bar); }
.mistakes { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: .75rem; }
figure { margin: 0; font-size: .8rem; overflow-wrap: anywhere; } figure img { width: 100%; image-rendering: pixelated; }
pre { overflow-x: auto; background: var(--line); padding: .75rem; border-radius: 6px; font-size: .8rem; }
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
    model = create(f"local-dir:{best}", pretrained=True)
    predictions = look_again(model, source, config)
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


def look_again(model: Any, source: Source, config: TrainConfig) -> Predictions:
    """Return the predictions of an exported model."""
    device = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
    model = model.to(device, memory_format=torch.channels_last)
    loader = make_loader(
        source,
        ValidationBatches(len(source), min(config.batch_size, 128)),
        {key: model.pretrained_cfg[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct")},
        workers=config.workers,
        device=device,
    )
    return predict_all(model, loader)


def _png(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, format="PNG")
    return f'src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"'


def render(folder: Path, source: Source, predictions: Predictions) -> str:
    """Return the report as one page that needs no other file."""
    rows = list(csv.DictReader((folder / "metrics.csv").read_text(encoding="utf-8").splitlines()))
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    metrics = json.loads((folder / "best" / "metrics.json").read_text(encoding="utf-8"))
    speed = np.median([float(row["images_per_second"]) for row in rows])
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
    with Image.open(folder / "curve.png") as curve:
        picture = _png(curve)
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{_STYLE}</style></head><body>
<h1>{title}</h1>
<div class="numbers">{boxes}</div>
<h2>Curves</h2><img alt="loss and accuracy over the epochs" {picture}>
<h2>Classes</h2>{_classes(source, predictions)}
<h2>Confusion</h2>{_confusion(source, predictions)}
<h2>Worst mistakes</h2>{_mistakes(source, predictions)}
<h2>Command</h2><pre>{html.escape(" ".join(environment["command"]))}</pre>
<p>{html.escape(versions)}; Python {environment["python"]}; {html.escape(str(environment["device"]))},
{environment["processes"]} process(es), {environment["cores"]} cores;
commit {html.escape(str(environment["commit"]))}</p>
<details><summary>Configuration</summary><pre>{html.escape(yaml.safe_dump(config, sort_keys=False))}</pre></details>
</body></html>
"""


def _classes(source: Source, predictions: Predictions) -> str:
    classes = len(source.class_names)
    totals = np.bincount(predictions.target, minlength=classes)
    right = np.bincount(predictions.target[predictions.target == predictions.predicted], minlength=classes)
    share = right / np.maximum(totals, 1)
    order = np.argsort(share, kind="stable")
    note = f"<p>The 100 worst of {classes} classes.</p>" if classes > 100 else ""
    lines = "".join(
        f'<tr><td class="name">{html.escape(source.class_names[n])}</td><td>{right[n]} of {totals[n]}</td>'
        f'<td>{share[n]:.1%}</td><td><div class="meter"><i style="width:{share[n]:.0%}"></i></div></td></tr>'
        for n in order[:100]
    )
    return (
        f'{note}<div class="scroll"><table><tr><th>class</th><th>right</th><th>accuracy</th><th></th></tr>'
        f"{lines}</table></div>"
    )


def _confusion(source: Source, predictions: Predictions) -> str:
    names = [html.escape(name) for name in source.class_names]
    if len(names) <= 30:
        counts = predictions.confusion(len(names))
        share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        head = "".join(f"<th>{name}</th>" for name in names)
        body = "".join(
            f"<tr><th>{name}</th>"
            + "".join(
                f'<td style="background:rgba({"37,99,235" if n == m else "220,38,38"},{share[n, m]:.2f})">'
                f"{counts[n, m] or ''}</td>"
                for m in range(len(names))
            )
            + "</tr>"
            for n, name in enumerate(names)
        )
        return (
            "<p>Rows: true class; columns: predicted.</p>"
            f'<div class="scroll"><table><tr><th></th>{head}</tr>{body}</table></div>'
        )
    wrong = predictions.target != predictions.predicted
    pairs, counts = np.unique(
        np.stack([predictions.target[wrong], predictions.predicted[wrong]]), axis=1, return_counts=True
    )
    worst = np.argsort(-counts, kind="stable")[:50]
    lines = "".join(
        f'<tr><td class="name">{names[pairs[0, n]]}</td><td class="name">{names[pairs[1, n]]}</td>'
        f"<td>{counts[n]}</td></tr>"
        for n in worst
    )
    return (
        '<p>The most frequent confusions.</p><div class="scroll"><table>'
        f"<tr><th>true</th><th>taken for</th><th>images</th></tr>{lines}</table></div>"
    )


def _mistakes(source: Source, predictions: Predictions, count: int = 24) -> str:
    wrong = np.flatnonzero(predictions.target != predictions.predicted)
    if not len(wrong):
        return "<p>None.</p>"
    figures = []
    for entry in wrong[np.argsort(-predictions.loss[wrong], kind="stable")][:count]:
        index = int(predictions.index[entry])
        image, _ = source.read(index)
        figures.append(
            f'<figure><img alt="" {_png(thumbnail(image))}><figcaption>'
            f"<b>{html.escape(source.class_names[predictions.target[entry]])}</b> taken for "
            f"<b>{html.escape(source.class_names[predictions.predicted[entry]])}</b>, "
            f"{predictions.confidence[entry]:.0%}<br>{html.escape(Path(source.name(index)).name)}</figcaption></figure>"
        )
    return f'<div class="mistakes">{"".join(figures)}</div>'

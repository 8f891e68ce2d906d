"""The model card: what was measured, how to use the weights, how they were made; a person's edits stay."""

from __future__ import annotations

import csv
import hashlib
import html
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from timm.data.config import resolve_model_data_config
from torch import nn

from glattn.files import one_line, plain

CURVE = "curve.png"
_MARK = re.compile(r"\n<!-- glattn card ([0-9a-f]{16}) -->\n?\Z")


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of a model's training; what is not known is left out of the card.

    Args:
        metrics: What was measured of these weights: ``top1`` and ``top5`` in percent, ``loss``, ``images``...
        dataset: Name of the dataset they were trained and measured on.
        command: The training's command line.
        environment: Versions and machine, as plain JSON.
        epochs: Epochs trained.
        seen: Training images that these weights saw: up to the best epoch, over all of them.
        hours: That the training steps took.
        seed: Of the training.
        notes: Paragraphs of Markdown, put first.
        curve: Picture of the training curve.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    dataset: str | None = None
    command: str | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    epochs: int | None = None
    seen: int | None = None
    hours: float | None = None
    seed: int | None = None
    notes: str = ""
    curve: Path | None = None


def read_record(run: Path) -> Record:
    """Return what a training's run folder, or its ``best``, says of its best weights; what is missing says nothing.

    Raises:
        ValueError: A file is there and broken.
    """
    above = run.resolve().parent
    if run.resolve().name == "best" and not (run / "best").is_dir() and (above / "config.yaml").is_file():
        run = above
    environment: dict[str, Any] = _read(run / "environment.json", json.loads) or {}
    config: dict[str, Any] = _read(run / "config.yaml", yaml.safe_load) or {}
    rows: list[Any] = _read(run / "metrics.csv", lambda text: list(csv.DictReader(text.splitlines()))) or []
    metrics: dict[str, float] = _read(run / "best" / "metrics.json", json.loads) or {}
    if not (run / "best").is_dir():  # weights alone, beside which may lie anybody's metrics.json
        found = _read(run / "metrics.json", json.loads)
        if isinstance(found, dict) and all(isinstance(value, int | float) for value in found.values()):
            metrics = found
    scores = [epoch_score(row, config.get("eval_metric", "top1")) for row in rows if row.get("top1")]
    seen = int(metrics.get("epoch") or (scores.index(max(scores)) + 1 if scores else len(rows)))
    command = environment.pop("command", None) or environment.pop("argv", None)
    per_epoch = int(environment.pop("images_per_epoch", 0))
    dataset = config.get("dataset")
    if isinstance(dataset, Mapping):
        dataset = dataset.get("name")
    if not dataset and config.get("data"):
        dataset = Path(str(config["data"])).resolve().name  # a folder of images goes by its own name
    return Record(
        metrics=metrics,
        dataset=str(dataset) if dataset else None,
        command=shlex.join(command) if isinstance(command, list) else command,
        environment=environment,
        epochs=len(rows) or None,
        seen=seen * per_epoch or None,
        hours=sum(per_epoch / float(row["images_per_second"]) for row in rows if per_epoch) / 3600 or None,
        seed=config.get("seed"),
        curve=run / CURVE if (run / CURVE).is_file() else None,
    )


def epoch_score(row: Mapping[str, Any], metric: str) -> float:
    """Return how good an epoch is, a row of metrics.csv, by the training's ``eval_metric``: the best is kept."""
    return -float(row["val_loss"]) if metric == "loss" else float(row["top1"])


def _read(path: Path, parse: Any) -> Any:
    if not path.is_file():
        return None
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError, csv.Error) as error:
        raise ValueError(f"{path}: {one_line(error)}") from error


def model_card(model: nn.Module, name: str, config: Mapping[str, Any], record: Record) -> str:
    """Return the card's text, signed so that `is_untouched` knows it again.

    Args:
        model: The model, for its size.
        name: What timm's ``hf-hub:`` takes: ``org/name``, with ``@revision`` if there is one.
        config: The config.json that lies beside the card.
        record: What is known of the training.
    """
    cfg = config["pretrained_cfg"]
    ours = type(model).__module__.startswith("glattn.")
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    classes = config["num_classes"]
    sections = [
        f"# {name}",
        f"`{config['architecture']}`, an image {'classifier' if classes else 'backbone'} of {millions:.1f}M parameters"
        + (f" and {classes} classes" if classes else "")
        + ", for [timm](https://github.com/huggingface/pytorch-image-models)"
        + (" with `glattn`." if ours else "."),
        *([_FORMULA.format(**_KINDS[record.dataset])] if record.dataset in _KINDS else []),
        *([record.notes] if record.notes else []),
        *_measured(record),
        "## Use",
        _usage(name, config, ours),
        *_training(record),
        "## Input",
        _table(("what", "value"), _input_rows(model, cfg)),
    ]
    if names := config.get("label_names"):
        shown = ", ".join(_shown(label) for label in list(names)[:20])
        sections += ["## Classes", shown + (f", ... ({len(names)} in all)" if len(names) > 20 else "")]
    text = plain(f"---\n{_metadata(name, config, record, ours).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")
    return f"{text}\n<!-- glattn card {_signature(text)} -->\n"


def is_untouched(card: str) -> bool:
    """Return whether a card is one of ours that nobody edited since."""
    found = _MARK.search(card)
    return found is not None and _signature(card[: found.start()]) == found[1]


def _signature(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]


# of the Hub's names of licences those that weights and code have as a rule
_LICENCES = {
    "agpl-3.0", "apache-2.0", "apple-amlr", "apple-ascl", "artistic-2.0", "bigcode-openrail-m",
    "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc",
    "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0",
    "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0",
    "cc-by-sa-4.0", "cc0-1.0", "creativeml-openrail-m", "fair-noncommercial-research-license", "gpl", "gpl-2.0",
    "gpl-3.0", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "mit", "mpl-2.0", "openrail", "openrail++", "other",
    "unknown", "unlicense", "wtfpl", "zlib",
}  # fmt: skip


def _metadata(name: str, config: Mapping[str, Any], record: Record, ours: bool) -> ModelCardData:
    # what is drawn is no data set of the Hub's
    named = record.dataset if record.dataset not in _KINDS else ""
    dataset = named if named and _is_id(named) else None
    title = name.partition("@")[0].rpartition("/")[2]
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type="accuracy",
            metric_name=f"top-{key[3:]}",
            metric_value=round(float(record.metrics[key]), 4),
        )
        for key in ("top1", "top5")
        if dataset and key in record.metrics
    ]
    task = "image-classification" if config["num_classes"] else "image-feature-extraction"
    pipeline = ["transformers"] if _has_pipeline(config) else []
    licence, licence_name = _license(config["pretrained_cfg"].get("license"))
    return ModelCardData(
        license=licence,
        license_name=licence_name,
        library_name="timm",
        pipeline_tag=task,
        tags=[task, "timm", *pipeline, *(["glattn"] if ours else [])],
        datasets=[dataset] if dataset else None,
        model_name=title if results else None,
        eval_results=results or None,
    )


def _is_id(name: str) -> bool:
    """Tell whether a name may be one of a data set on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.isascii()


def _license(name: str | None) -> tuple[str | None, str | None]:
    """Return a licence, and its name if that is none of the Hub's own, as the Hub takes both."""
    if not name:
        return None, None
    slug = re.sub(r"[^a-z0-9.+]+", "-", name.lower()).strip("-")
    return (slug, None) if slug in _LICENCES else ("other", slug)


def _measured(record: Record) -> list[str]:
    if not record.metrics:
        return ["## Measured", "Nothing: these weights came without measurements."]
    on = f" on the validation images of {record.dataset}" if record.dataset else ""
    rows = [(_METRICS.get(key, key), _number(value)) for key, value in record.metrics.items()]
    picture = [f"![Loss and accuracy over the epochs]({CURVE})"] if record.curve else []
    return ["## Measured", f"These weights{on}:", _table(("what", "value"), rows), *picture]


_FORMULA = """**A start for fine-tuning, nothing else.** These weights were trained on pictures made by formula,
{of}, drawn while it trained: no photograph, so nobody's licence and
nobody's privacy. Their classes are {classes}: without fine-tuning they predict nothing that a person wants."""
_KINDS: Mapping[str | None, dict[str, str]] = {
    "fractals": {
        "of": """fractals of iterated function systems ([arXiv:2101.08515](https://arxiv.org/abs/2101.08515),
[arXiv:2110.03091](https://arxiv.org/abs/2110.03091))""",
        "classes": "fractals",
    },
    "contours": {
        "of": "scenes of closed contours (after [arXiv:2206.09132](https://arxiv.org/abs/2206.09132))",
        "classes": "scenes of contours",
    },
}

_METRICS = {"top1": "top-1 accuracy, %", "top5": "top-5 accuracy, %", "images": "images", "epoch": "epoch"}


def _has_pipeline(config: Mapping[str, Any]) -> bool:
    """Tell whether transformers' pipeline takes the model: a classifier of RGB images."""
    return bool(config["num_classes"]) and config["pretrained_cfg"]["input_size"][0] == 3


def _usage(name: str, config: Mapping[str, Any], ours: bool) -> str:
    channels, height, width = config["pretrained_cfg"]["input_size"]
    mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(channels)
    picture = f"""image = Image.new("{mode}", (320, 240))  # or Image.open("picture.jpg").convert("{mode}")
batch = transform(image).unsqueeze(0)"""
    drawn = f"batch = torch.rand(1, {channels}, {height}, {width})  # or images of yours, normalised as below"
    answer = """with torch.inference_mode():
    probabilities = model(batch).softmax(dim=-1)[0]

names = model.pretrained_cfg.get("label_names") or range(model.num_classes)
for probability, index in zip(*probabilities.topk(min(5, model.num_classes))):
    print(f"{probability:.3f} {names[int(index)]}")"""
    features = """with torch.inference_mode():
    print(model(batch).shape)"""
    pooled = ', global_pool="avg"' if config.get("model_args", {}).get("global_pool") == "" else ""
    imports = "import glattn  # registers the architecture with timm\n" if ours else ""
    backbone = f'timm.create_model("hf-hub:{name}", pretrained=True, features_only=True)'
    repo, _, revision = name.partition("@")
    pinned = f', revision="{revision}"' if revision else ""
    transformers = f"""

With transformers:

```python
{imports}from transformers import pipeline

classify = pipeline("image-classification", model="{repo}"{pinned})
print(classify(image))
```"""
    install = "pip install glattn" if ours else "pip install timm"
    return f"""```sh
{install}
```

```python
{imports}import timm
import torch
from PIL import Image

model = timm.create_model("hf-hub:{name}", pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)

{picture if mode else drawn}
{answer if config["num_classes"] else features}
```

Another number of classes, and features of every stage:

```python
model = timm.create_model("hf-hub:{name}", pretrained=True, num_classes=5{pooled})
backbone = {backbone}
```{transformers if _has_pipeline(config) else ""}"""


def _training(record: Record) -> list[str]:
    facts = {
        "dataset": record.dataset,
        "epochs": record.epochs,
        "images seen up to the best epoch": f"{record.seen:,}" if record.seen else None,
        "hours of training steps": f"{record.hours:.2f}" if record.hours else None,
        "seed": record.seed,
    }
    rows: list[tuple[str, Any]] = [(key, value) for key, value in facts.items() if value is not None]
    for key, value in record.environment.items():
        nested = value if isinstance(value, Mapping) else {key: value}
        rows += [(name, item) for name, item in nested.items() if isinstance(item, str | int | float)]
    sections = [f"```sh\n{record.command}\n```"] if record.command else []
    if rows:
        sections.append(_table(("what", "value"), rows))
    return ["## Training", *sections] if sections else []


def _input_rows(model: nn.Module, cfg: Mapping[str, Any]) -> list[tuple[str, Any]]:
    data = resolve_model_data_config(model, pretrained_cfg=dict(cfg))
    channels, height, width = data["input_size"]
    return [
        ("size", f"{height} x {width} pixels, {channels} channels"),
        ("mean", ", ".join(f"{v:.4g}" for v in data["mean"])),
        ("standard deviation", ", ".join(f"{v:.4g}" for v in data["std"])),
        ("resized by", data["interpolation"]),
        ("crop", f"{data['crop_pct']:.4g} ({data['crop_mode']})"),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_shown(cell).replace("|", r"\|") for cell in line) + " |" for line in lines)


def _shown(text: Any) -> str:
    """Return text on one line, in which nothing is a tag."""
    return html.escape(" ".join(str(text).split()), quote=False)


def _number(value: Any) -> str:
    return f"{value:.4f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)

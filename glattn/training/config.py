"""`TrainConfig`: every option of a training run, from a YAML recipe and ``key=value`` overrides."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from glattn.config import did_you_mean
from glattn.files import one_line, user_path

DRAWN = ("fractals", "contours")  # datasets whose pictures are made by formula, see `pretrain`
OF_TEACHER = ("teacher_checkpoint", "distill", "distill_weight", "distill_temperature")
NO_DEFAULTS: Mapping[str, Any] = types.MappingProxyType({})


def option(default: Any, text: str) -> Any:
    """Declare one option: its default and what it means, with its unit."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Every option of a training run; validated when made, and saved whole in the run folder."""

    # data
    data: str = option("", "folder with train/ and val/, or with one folder a class; or the source's root")
    dataset: str = option(
        "",
        "empty: an image folder or a .tar; digits: scikit-learn's, written to the folder data where it is not there; "
        "fractals or contours: drawn as they are asked for, see glattn pretrain; "
        "or a timm dataset name (hfds/NAME, torch/cifar10, ...)",
    )
    train_split: str = option("train", "name of the training split")
    val_split: str = option("validation", "name of the validation split (a folder val/ or validation/)")
    epoch_samples: int = option(50_000, "of fractals or contours: training pictures of an epoch")
    instances: int = option(1, "of fractals or contours: a training picture shows 1 to so many classes")
    val_fraction: float = option(0.2, "share held out, stratified and seeded, where there is no validation split")
    partial_val: bool = option(False, "allow classes without validation images")
    bad_images: Literal["skip", "refuse"] = option(
        "skip", "unreadable images: skip (counted and listed) or refuse (all are read before training starts)"
    )
    workers: int = option(2, "processes that load images, or draw by formula for a GPU, for each training process")

    # model
    model: str = option("glattn_atto", "timm model name, hf-hub:ORG/NAME or local-dir:PATH")
    pretrained: bool = option(False, "start from the model's pretrained weights")
    checkpoint: str = option("", "file of weights to start from (the classifier is replaced where it does not fit)")
    model_args: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "further keywords of timm.create_model, e.g. model_args.head_dim=32"}
    )
    image_size: int | None = option(None, "side of the training and validation images, pixels; null: the model's")
    drop_rate: float = option(0.0, "dropout before the classifier, probability")
    drop_path_rate: float = option(0.0, "stochastic depth of the last block, probability")
    freeze: Literal["none", "stem", "stages", "backbone"] = option(
        "none", "what is not trained: stem (stem and first stage), stages (all but the last stage), "
        "backbone (linear probe)"
    )  # fmt: skip
    grad_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    channels_last: bool = option(True, "NHWC memory")
    compile: bool = option(False, "torch.compile the model")
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = option(
        "default", "mode of compile=true; reduce-overhead replays a small model's steps on a GPU as CUDA graphs"
    )

    # optimisation
    optimizer: str = option("adamw", "timm optimiser name")
    optimizer_args: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "further keywords of the optimiser, e.g. optimizer_args.eps=1e-6"}
    )
    lr: float = option(1e-3, "peak learning rate, for the global batch")
    min_lr: float = option(1e-6, "last learning rate")
    warmup_lr: float = option(1e-6, "first learning rate")
    warmup_epochs: float = option(1, "linear warm-up, epochs")
    schedule: str = option("cosine", "timm scheduler name: cosine, poly, wsd, step, constant, none, ...")
    epochs: int = option(30, "passes over the training images")
    batch_size: int = option(64, "global batch of one optimiser step, images over all processes and accumulation")
    accumulate: int = option(1, "parts that each process's share of a batch is computed in, to fit memory")
    weight_decay: float = option(0.05, "decoupled weight decay (none on norms and biases)")
    layer_decay: float | None = option(None, "factor on the learning rate from each layer to the one before; null: 1")
    clip_grad: float | None = option(1.0, "largest norm of the gradient; null: any")
    label_smoothing: float = option(0.1, "share of the target spread over all classes")
    loss: Literal["cross_entropy", "bce"] = option("cross_entropy", "classification loss")
    class_weights: Literal["none", "balanced"] = option("none", "balanced: weigh classes by 1 / number of images")

    # augmentation
    auto_augment: str = option("", "timm policy, e.g. rand-m9-mstd0.5-inc1; empty: none")
    crop_scale: float = option(0.08, "smallest share of the area that a random crop keeps")
    crop_ratio: float = option(0.75, "narrowest aspect ratio of a random crop (widest: its inverse)")
    hflip: float = option(0.5, "horizontal flip, probability")
    vflip: float = option(0.0, "vertical flip, probability")
    color_jitter: float = option(0.0, "jitter of brightness, contrast and saturation, factor (off with auto_augment)")
    random_erase: float = option(0.0, "random erasing, probability")
    mixup: float = option(0.0, "mixup alpha; 0: off")
    cutmix: float = option(0.0, "cutmix alpha; 0: off")
    mixup_prob: float = option(1.0, "probability that a batch is mixed")
    mixup_off_epoch: int | None = option(None, "epoch from which batches are no longer mixed; null: never")
    interpolation: str = option("", "resize filter: bilinear, bicubic, ...; empty: the model's")
    crop_pct: float | None = option(None, "share of the resized image's side that validation sees; null: the model's")

    # averaging and distillation
    ema_decay: float = option(0.0, "decay a step of the averaged weights, which are then validated and saved; 0: off")
    ema_warmup: bool = option(True, "let the decay grow from 0")
    teacher: str = option("", "timm model to distil from; empty: none")
    teacher_checkpoint: str = option("", "the teacher's weights; empty: its pretrained ones")
    distill: Literal["logits", "features"] = option("logits", "what of the teacher is matched")
    distill_weight: float = option(0.5, "share of the distillation loss in the whole")
    distill_temperature: float = option(1.0, "softmax temperature of logit distillation")

    # the run
    run: str = option("", "run folder; empty: runs/MODEL-DATA")
    seed: int = option(0, "seed of weights, order, augmentation and split")
    precision: Literal["no", "bf16", "fp16"] = option("no", "mixed precision; no: fp32")
    device: Literal["auto", "cpu"] = option("auto", "cpu: leave an accelerator unused")
    deterministic: bool = option(False, "also on GPUs, only algorithms that repeat to the bit (slower)")
    resume: str = option("", "auto: go on from the run folder's last good checkpoint, if any; empty: start anew")
    keep: int = option(2, "training checkpoints kept")
    checkpoint_minutes: float = option(15.0, "time between checkpoints within an epoch, minutes (one ends each epoch)")
    eval_metric: Literal["top1", "loss"] = option(
        "top1", "the epoch kept in best/: of the highest top-1, or of the lowest validation loss"
    )
    early_stop: int | None = option(None, "epochs without a better one before stopping; null: never")
    tracker: str = option("auto", "accelerate tracker (tensorboard, wandb, ...), none; auto: tensorboard if installed")

    def __post_init__(self) -> None:
        """Refuse ill-typed and impossible values, naming the key."""
        hints = get_type_hints(type(self))
        for item in dataclasses.fields(self):
            value = _convert(item.name, getattr(self, item.name), hints[item.name])
            object.__setattr__(self, item.name, value)
        for names, low, high in _RANGES:
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not low <= value <= high:
                    raise ValueError(f"{name}={value} is out of range: allowed is {low:g} to {high:g}")
        if self.loss == "bce" and self.label_smoothing == 1:
            raise ValueError("label_smoothing=1: loss=bce takes less than 1")
        if self.resume not in ("", "auto"):
            raise ValueError(f"resume={self.resume!r}: allowed is 'auto' or nothing")
        for name, what in (("instances", "show several classes"), ("epoch_samples", "are as many as asked")):
            if getattr(self, name) != getattr(type(self), name) and self.dataset not in DRAWN:
                kinds = " or ".join(f"dataset={kind}" for kind in DRAWN)
                given = f"{name}={getattr(self, name)} with dataset={self.dataset!r}"
                raise ValueError(f"{given}: only pictures of {kinds} {what}")
        if self.pretrained and self.checkpoint:
            raise ValueError(
                f"pretrained=true and checkpoint={self.checkpoint}: both say what to start from; leave one out"
            )
        if not self.teacher:
            for name in OF_TEACHER:
                if getattr(self, name) != getattr(type(self), name):
                    raise ValueError(
                        f"{name}={getattr(self, name)} does nothing without teacher=MODEL; give both or neither"
                    )
        if self.compile_mode != "default" and not self.compile:
            raise ValueError(
                f"compile_mode={self.compile_mode} does nothing without compile=true; give both or neither"
            )
        if self.compile_mode in ("reduce-overhead", "max-autotune") and self.accumulate > 1:
            # pytorch/pytorch#169545: a CUDA graph writes a part's gradients where the last one's are
            raise ValueError(
                f"compile_mode={self.compile_mode} loses gradients between the parts of accumulate={self.accumulate}: "
                "give accumulate=1 or another compile_mode"
            )

    @classmethod
    def read(
        cls,
        recipe: str | Path | None = None,
        overrides: Iterable[str] = (),
        defaults: Mapping[str, Any] = NO_DEFAULTS,
    ) -> TrainConfig:
        """Read a YAML recipe and apply ``key=value`` overrides, all over some defaults.

        An override's value is YAML too, but text is taken as typed.
        """
        hints = get_type_hints(cls)
        values: dict[str, Any] = {} if recipe is None else dict(read_recipe(user_path(recipe)))
        for name in values:
            _check_name(str(name), f" in {recipe}")
        values = {**defaults, **values}
        for text in overrides:
            name, sign, value = text.partition("=")
            if not sign:
                raise ValueError(f"{text!r} is no key=value")
            head, _, entry = name.partition(".")
            _check_name(head, "")
            try:
                parsed = yaml.safe_load(value) if value and hints[head] is not str else value
            except (yaml.YAMLError, ValueError):  # the latter: a date that is none
                parsed = value
            if entry:
                if not isinstance(values.get(head, {}), dict) or head not in ("model_args", "optimizer_args"):
                    raise ValueError(f"{name!r}: {head!r} holds no keys of its own")
                values[head] = {**values.get(head, {}), entry: parsed}
            else:
                values[head] = parsed
        return cls(**values)

    def to_yaml(self) -> str:
        """Return every option as YAML, in the order of this class."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


LARGEST_SIDE = 8192  # of an image, pixels: Pillow takes twice the area for an attack
_LARGEST = 1e15  # of what has no other bound; what is infinite fails later, or never begins
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("drop_rate drop_path_rate label_smoothing hflip vflip random_erase mixup_prob distill_weight", 0, 1),
    ("val_fraction", 0.001, 0.9),
    ("instances", 1, 16),
    ("crop_scale crop_ratio crop_pct", 0.01, 1),
    ("ema_decay layer_decay", 0, 1),
    ("epochs epoch_samples batch_size accumulate keep early_stop", 1, _LARGEST),
    ("image_size", 1, LARGEST_SIDE),
    ("lr clip_grad distill_temperature", 1e-12, _LARGEST),
    ("min_lr warmup_lr warmup_epochs weight_decay checkpoint_minutes", 0, _LARGEST),
    ("workers", 0, 1024),
    ("mixup cutmix color_jitter", 0, 100),
    ("seed", 0, 2**32 - 1),
)


def help_text() -> str:
    """Return one line a key: its name, type, default and meaning."""
    hints = get_type_hints(TrainConfig)
    lines = ["keys (in a recipe: `key: value`; on the command line: key=value), with type and default:"]
    for item in dataclasses.fields(TrainConfig):
        default = {} if item.default is dataclasses.MISSING else item.default
        shown = yaml.safe_dump(default, default_flow_style=True).partition("\n")[0] if default != "" else "''"
        lines.append(f"  {item.name}={shown}  ({_describe(hints[item.name])})\n      {item.metadata['help']}")
    return "\n".join(lines)


def read_recipe(path: Path) -> Mapping[str, Any]:
    """Return the keys that a recipe sets, as it says them.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no YAML, no list of keys, or says a key twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no recipe {str(path)!r}")
    try:
        text = path.read_text(encoding="utf-8")
        values, node = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
        twice = _said_twice(node)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is no YAML: {one_line(error)}") from None
    except RecursionError:
        raise ValueError(f"{path} is no recipe: a mapping in it holds itself") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; a recipe is a list of `key: value` lines")
    if twice:
        raise ValueError(f"{path} says {twice!r} twice; keep one of the lines")
    return values


def _said_twice(node: yaml.Node | None) -> str:
    """Return a key that a mapping, or one in it, holds again: YAML takes the last; "" if there is none."""
    if not isinstance(node, yaml.MappingNode):
        return ""
    names = [str(key.value) for key, _ in node.value]
    again = [name for number, name in enumerate(names) if name in names[:number]]
    return next(iter(again + [found for _, value in node.value if (found := _said_twice(value))]), "")


def _check_name(name: str, where: str) -> None:
    names = [item.name for item in dataclasses.fields(TrainConfig)]
    if name not in names:
        hint = did_you_mean(name, names, cutoff=0.5) or "; `glattn train --help` lists the keys"
        raise ValueError(f"unknown key {name!r}{where}{hint}")


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else _describe(part) for part in get_args(hint))
    if get_origin(hint) is dict:
        return "mapping"
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}[hint.__name__]


def _number(entry: Any) -> Any:
    """Return text such as 1e-6, which YAML does not take for a number, as one; anything else as it is."""
    number = r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"
    return float(entry) if isinstance(entry, str) and re.fullmatch(number, entry) else entry


def _convert(name: str, value: Any, hint: Any) -> Any:
    """Return `value` as the hinted type, or raise; YAML reads 1e-3 as text, and off as false."""
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        hint = next(part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is Literal:
        if value is False and "no" in get_args(hint):
            return "no"
        if value is None and "none" in get_args(hint):
            return "none"
        if value in get_args(hint):
            return value
        raise ValueError(f"{name}={value!r}: allowed is {_describe(hint)}{did_you_mean(str(value), get_args(hint))}")
    if get_origin(hint) is dict:
        if isinstance(value, dict):
            if strange := [key for key in value if not isinstance(key, str)]:
                raise ValueError(f"{name}={value!r}: {strange[0]!r} is no keyword")
            return {key: _number(entry) for key, entry in value.items()}
    elif hint is float and not isinstance(value, bool):
        try:
            number = float(value)
            if number == number:
                return number
        except (TypeError, ValueError):
            pass
    elif hint is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    elif type(value) is hint:
        return value
    raise ValueError(f"{name}={value!r} is a {type(value).__name__}; it must be a {_describe(hint)}")

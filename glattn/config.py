"""Every option of the family: what a block's mixer is made of, and how blocks make a network.

A config is plain data that goes to JSON and back.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from timm.layers.create_act import _ACT_LAYER_DEFAULT

NUM_STAGES = 4


@dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """The options of one `GlobalLocalAttention` mixer.

    Args:
        fusion: How the branches meet: ``sum``, ``gated``, ``concat``, ``split`` (part of the channels goes to
            each branch), or one branch alone, ``local`` or ``global``.
        split_ratio: Share of the channels that goes to the local branch under ``fusion="split"``.
        local: Local branch: ``conv`` or ``augmented`` (attention-augmented convolution).
        kernel_sizes: Odd kernel sizes of the local branch's parallel convolutions, in cells.
        local_groups: ``depthwise``, ``dense``, or the number of groups of those convolutions.
        local_gate: Channel gate behind them: ``se``, ``eca`` or ``none``.
        augment_ratio: Share of the local branch's channels that attention provides under ``local="augmented"``,
            rounded to eight channels, of 16 channels a quarter to none, then down to whole heads of one width.
        num_heads: Attention heads; ``None`` takes the branch's width over ``head_dim``.
        head_dim: Channels a head, where ``num_heads`` is ``None``.
        layout: Which cells see which: ``full``, ``pooled``, ``window``, ``shifted``, ``grid``, ``overlap``,
            ``multi_scale`` or ``cross_shaped``. The sizes, atto to large, pool by 8, 4 and 2 before their last stage.
        pool_stride: Stride of the map that ``layout="pooled"`` attends on, in cells.
        window_sizing: Where the window size comes from: ``fixed`` (``window_size``), ``image`` (the nominal image
            size, rounded up to the map's stride, over ``window_ratio``), ``map`` (the map cut into
            ``window_ratio`` windows an axis, at run time) or ``tokens`` (windows in which a query sees at most
            ``window_tokens`` cells, at run time).
        window_size: Side of a square window (``grid``: cells an axis; ``cross_shaped``: width of a stripe).
        window_ratio: Divisor of ``window_sizing="image"`` and ``"map"``.
        window_tokens: Bound on the cells that a query sees, a halo counted, under ``window_sizing="tokens"``.
        window_sizes: Window sides of ``layout="multi_scale"``, one a head group; 0 is the whole map.
        halo: Cells around a window that ``layout="overlap"`` sees too.
        position: Where a cell is: ``none``, ``bias`` (relative bias table), ``cpb`` (log-spaced continuous
            bias), ``rope`` (axial rotary), ``rope_mixed`` (learned 2-D rotary) or ``conv``.
        mechanism: ``softmax``, ``relu_linear``, ``performer``, ``linformer`` or ``reformer``.
        random_features: Random features a head of ``mechanism="performer"``.
        linformer_rank: Rows that ``mechanism="linformer"`` projects the tokens to.
        lsh_bucket_size: Tokens a bucket of ``mechanism="reformer"``.
        lsh_rounds: Hash rounds of ``mechanism="reformer"``.
        cross_window: Exchange between windows behind the attention: ``none`` or ``strip``.
        context: Global context block behind the fusion: ``none`` or ``gc``.
        attn_drop: Dropout rate of the attention weights, which softmax and Linformer alone have.
        proj_drop: Dropout rate of the mixer's output.

    Raises:
        ValueError: An option is out of its range, or two options contradict each other.
    """

    fusion: str = "sum"
    split_ratio: float = 0.5
    local: str = "conv"
    kernel_sizes: tuple[int, ...] = (1, 3, 5)
    local_groups: str | int = "depthwise"
    local_gate: str = "se"
    augment_ratio: float = 0.25
    num_heads: int | None = None
    head_dim: int = 32
    layout: str = "full"
    pool_stride: int = 4
    window_sizing: str = "fixed"
    window_size: int = 7
    window_ratio: int = 32
    window_tokens: int = 196
    window_sizes: tuple[int, ...] = (4, 8)
    halo: int = 2
    position: str = "conv"
    mechanism: str = "softmax"
    random_features: int = 64
    linformer_rank: int = 64
    lsh_bucket_size: int = 64
    lsh_rounds: int = 2
    cross_window: str = "none"
    context: str = "none"
    attn_drop: float = 0.0
    proj_drop: float = 0.0

    def __post_init__(self) -> None:
        for name in ("kernel_sizes", "window_sizes"):
            object.__setattr__(self, name, _integers(name, getattr(self, name)))
        for name in ("kernel_sizes", "window_sizes"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; give at least one size, such as {(3, 5)}")
        if bad := [k for k in self.kernel_sizes if k < 1 or k % 2 == 0]:
            raise ValueError(f"kernel_sizes has {bad}; every size must be odd and positive, such as (1, 3, 5)")
        if bad := [w for w in self.window_sizes if w < 0]:
            raise ValueError(f"window_sizes has {bad}; a size is positive, or 0 for the whole map")
        groups: Any = self.local_groups
        if isinstance(groups, bool) or not isinstance(groups, Integral):
            check_choice("local_groups", groups, ("depthwise", "dense"), "or a number of groups")
        else:
            object.__setattr__(self, "local_groups", int(groups))
        positive = (
            "head_dim", "pool_stride", "window_size", "window_ratio", "window_tokens", "random_features",
            "linformer_rank", "lsh_bucket_size", "lsh_rounds",
        )  # fmt: skip
        least = {**dict.fromkeys(positive, 1), "halo": 0} | ({} if self.num_heads is None else {"num_heads": 1})
        for name, smallest in least.items():
            object.__setattr__(self, name, as_integer(name, getattr(self, name), smallest))
        for name in ("attn_drop", "proj_drop"):
            object.__setattr__(self, name, as_rate(name, getattr(self, name)))
        for name in ("split_ratio", "augment_ratio"):
            object.__setattr__(self, name, _as_share(name, getattr(self, name)))
        _check_kinds(self)


@dataclass(frozen=True, kw_only=True)
class GLAttnConfig:
    """The options of a `GLAttn` network.

    Args:
        dims: Channels of the four stages.
        depths: Blocks of the four stages.
        mlp_ratio: Hidden width of each stage's MLP over its channels.
        mixer: The mixer of each stage; one `MixerConfig` stands for all four.
        stem_stride: Stride of the stem, in pixels: 4, or 2 for small images.
        act_layer: Activation of stem and MLP, by timm's name.
        layer_scale: First value of the residual branches' layer scale; 0 leaves it out (None is dropped by timm).
        abs_pos: Learnable absolute position encoding: ``none``, ``stem`` (added once) or ``stages`` (added at
            each stage's start).

    Raises:
        ValueError: An option is out of its range, or two options contradict each other.
    """

    dims: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    mlp_ratio: tuple[float, ...] = (4.0, 4.0, 4.0, 4.0)
    mixer: tuple[MixerConfig, ...] = field(default_factory=lambda: (MixerConfig(),) * NUM_STAGES)
    stem_stride: int = 4
    act_layer: str = "relu"
    layer_scale: float = 0.1
    abs_pos: str = "none"

    def __post_init__(self) -> None:
        stages = per_stage("mixer", self.mixer)
        if not all(isinstance(stage, MixerConfig) for stage in stages):
            raise ValueError(f"mixer={self.mixer!r}; give a MixerConfig, or {NUM_STAGES} of them, one a stage")
        object.__setattr__(self, "mixer", stages)
        for name in ("dims", "depths"):
            value = _integers(name, getattr(self, name))
            object.__setattr__(self, name, value)
            if len(value) != NUM_STAGES or min(value) < 1:
                raise ValueError(f"{name}={value}; give {NUM_STAGES} positive integers, one a stage")
        ratios = per_stage("mlp_ratio", self.mlp_ratio)
        if any(isinstance(r, bool) or not isinstance(r, Real) or not 0 < float(r) < math.inf for r in ratios):
            raise ValueError(f"mlp_ratio={self.mlp_ratio!r}; give a positive number, or {NUM_STAGES} of them")
        if any(int(dim * r) < 1 for dim, r in zip(self.dims, ratios, strict=True)):
            raise ValueError(f"mlp_ratio={self.mlp_ratio!r} leaves a stage of dims={self.dims} no hidden channel")
        object.__setattr__(self, "mlp_ratio", tuple(float(r) for r in ratios))
        check_choice("abs_pos", self.abs_pos, ("none", "stem", "stages"))
        check_choice("act_layer", self.act_layer, _ACT_LAYER_DEFAULT)
        if self.stem_stride not in (2, 4):
            raise ValueError(
                f"stem_stride={self.stem_stride!r} is not a stride of the stem; use 4, or 2 for small images"
            )
        object.__setattr__(self, "stem_stride", int(self.stem_stride))
        scale: Any = self.layer_scale
        if isinstance(scale, bool) or not isinstance(scale, Real) or not 0 <= float(scale) < math.inf:
            raise ValueError(f"layer_scale={scale!r}; give a positive number such as 0.1, or 0 to leave it out")
        object.__setattr__(self, "layer_scale", float(scale))

    def replace(self, **options: Any) -> GLAttnConfig:
        """Return this config with options changed: fields of this class, or of `MixerConfig` (one value, or four).

        Raises:
            TypeError: An option's name is unknown; the closest name is given.
            ValueError: An option's value is not allowed, or the options contradict each other.
        """
        check_names(options)
        stages: list[dict[str, Any]] = [{} for _ in range(NUM_STAGES)]
        for name in MIXER_OPTIONS & set(options):
            nested = name in ("kernel_sizes", "window_sizes")
            for stage, value in zip(stages, per_stage(name, options[name], nested=nested), strict=True):
                stage[name] = value
        mixer = tuple(dataclasses.replace(m, **stage) for m, stage in zip(self.mixer, stages, strict=True))
        changes = {name: value for name, value in options.items() if name not in MIXER_OPTIONS}
        return dataclasses.replace(self, mixer=mixer, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the config as plain JSON data that `replace` takes back: mixer options are lists of four."""
        plain = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "mixer"}
        for name in sorted(MIXER_OPTIONS):
            plain[name] = [_plain(getattr(m, name)) for m in self.mixer]
        return plain


MIXER_OPTIONS = frozenset(f.name for f in dataclasses.fields(MixerConfig))


def check_choice(name: str, value: object, allowed: Iterable[str], more: str = "") -> None:
    """Raise a ``ValueError`` that names the option, its value, what is allowed and the closest choice."""
    allowed = tuple(allowed)
    if isinstance(value, str) and value in allowed:
        return
    choices = f"{', '.join(allowed)}{f' {more}' if more else ''}"
    raise ValueError(f"{name}={value!r} is not one of {choices}{did_you_mean(str(value), allowed)}")


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return the end of a message about a misspelt name, which asks for the closest known one; "" if none is close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""


def as_rate(name: str, value: Any) -> float:
    """Return a probability below one, NumPy's too, as Python's; raise a ``ValueError`` if it is none."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < 1:
        raise ValueError(f"{name}={value!r}; give a rate from 0 up to, not including, 1")
    return float(value)


def as_integer(name: str, value: Any, least: int) -> int:
    """Return an integer of ``least`` or more, NumPy's too, as Python's; raise a ``ValueError`` if it is none."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name}={value!r}; give an integer of {least} or more")
    return int(value)


def check_names(options: Iterable[str], more: Iterable[str] = ()) -> None:
    """Refuse options that are fields of neither config; the message counts in ``more`` keywords of the model.

    Raises:
        TypeError: An option's name is unknown; the closest name is given.
    """
    known = {f.name for f in dataclasses.fields(GLAttnConfig)} - {"mixer"} | MIXER_OPTIONS
    unknown = sorted(set(options) - known)
    if unknown:
        raise TypeError(unknown_name("option", unknown[0], sorted(known.union(more))))


def unknown_name(kind: str, name: str, known: Sequence[str]) -> str:
    """Return the message for a misspelt name: the closest known one, or all of them."""
    return f"unknown {kind} {name!r}" + (did_you_mean(name, known) or f"; known: {', '.join(known)}")


def per_stage(name: str, value: Any, *, nested: bool = False) -> tuple[Any, ...]:
    """Return ``value`` once a stage: four values as they are, one value four times.

    ``nested`` values are sequences themselves, so that four of them are a sequence of sequences.
    """
    is_sequence = isinstance(value, list | tuple)
    if nested and is_sequence:
        is_sequence = any(isinstance(v, list | tuple) for v in value)
    if not is_sequence:
        return (value,) * NUM_STAGES
    if len(value) != NUM_STAGES:
        raise ValueError(f"{name} has {len(value)} values; give one for all stages, or {NUM_STAGES}, one a stage")
    return tuple(value)


def _as_share(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise ValueError(f"{name}={value!r}; give a share from 0 to 1")
    return float(value)


def _integers(name: str, value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list | tuple) else (value,)
    if any(isinstance(v, bool) or not isinstance(v, Integral) for v in values):
        raise ValueError(f"{name}={value!r}; give integers, such as (1, 3, 5)")
    return tuple(int(v) for v in values)


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _check_kinds(config: MixerConfig) -> None:
    """Refuse unknown kinds, and kinds that exclude each other; the layers' tables say which there are."""
    from glattn.layers import TABLES  # here, since the layers import this module

    for name, table in TABLES.items():
        check_choice(name, getattr(config, name), table)
    layout, position, mechanism = (TABLES[axis][getattr(config, axis)] for axis in ("layout", "position", "mechanism"))
    name = config.mechanism
    if position.adds_bias and not mechanism.takes_bias:
        raise ValueError(
            f"position={config.position!r} with mechanism={name!r}: {name} has no score matrix to add a bias to;"
            " use position='rope' or 'conv', or mechanism='softmax'"
        )
    if layout.sees_beyond and mechanism.shares_qk:
        raise ValueError(
            f"layout={config.layout!r} with mechanism={name!r}: {name} shares queries and keys, which a halo tells"
            " apart; use layout='window', or mechanism='softmax'"
        )
    if config.window_sizing != "fixed" and not layout.sized and config.layout != "full":
        # `full` ignores every window option alike, so that one setting may serve all four stages.
        sized = ", ".join(kind for kind, row in TABLES["layout"].items() if row.sized)
        raise ValueError(
            f"window_sizing={config.window_sizing!r} with layout={config.layout!r}: only {sized} size their windows"
            " by it; use window_sizing='fixed', or layout='window'"
        )

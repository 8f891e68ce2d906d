"""GLAttn, the hierarchical global-local backbone, as timm knows models: its contract, default cfgs, entry points."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from timm.layers import ClassifierHead, calculate_drop_path_rates, get_device_dtype, trunc_normal_
from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from glattn.config import GLAttnConfig, as_integer, as_rate, check_choice, check_names
from glattn.models.checkpoint import checkpoint_filter_fn
from glattn.models.stages import Stage, Stem, ceil_size
from glattn.models.variants import VARIANTS
from glattn.models.weights import HUB, reading_checkpoint, source_overlay

# what `timm.create_model` takes before the model does
_OF_TIMM = (
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "features_only",
    "out_indices", "feature_cls", "scriptable", "exportable", "no_jit",
)  # fmt: skip
POOLS = ("avg", "max", "avgmax", "catavgmax", "fast", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax", "")


class GLAttn(nn.Module):
    """Four stages of `GlobalLocalBlock` behind a strided stem: ``(B, in_chans, H, W) -> (B, num_classes)``.

    Stage ``i`` has stride ``2 ** (i + 2)`` pixels (a power less with ``stem_stride=2``); sizes round up. Any image of
    32 pixels or more works, at any batch size.

    Args:
        cfg: The network's options.
        in_chans: Channels of the image.
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: Pooling before the classifier, by timm's name; ``""`` for none.
        img_size: Nominal image size in pixels, one side or (height, width): what tables are made for.
        output_stride: Largest stride, in pixels: 32, 16 or 8; stages beyond it dilate their convolutions instead.
        stem_features: Count the stem's map at stride 2 as the first feature, for decoders that take one.
        drop_rate: Dropout rate before the classifier.
        drop_path_rate: Rate at which an image skips a branch of the last block; it grows from 0 along the depth.
        device: Device of the parameters.
        dtype: Type of the parameters.
        options: Fields of `GLAttnConfig` or `MixerConfig` that replace ``cfg``'s, one value or one a stage.

    Raises:
        TypeError: An option's name is unknown.
        ValueError: An option's value is not allowed, or the options contradict each other.
    """

    def __init__(
        self,
        cfg: GLAttnConfig | None = None,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | Sequence[int] = 224,
        output_stride: int = 32,
        stem_features: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        check_names(options, more=(*(GLAttn.__init__.__kwdefaults__ or ()), *_OF_TIMM))
        config = (cfg or GLAttnConfig()).replace(**options)
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride={output_stride!r} is not one of 8, 16, 32")
        check_choice("global_pool", global_pool, POOLS)
        drop_rate, drop_path_rate = as_rate("drop_rate", drop_rate), as_rate("drop_path_rate", drop_path_rate)
        in_chans, num_classes = as_integer("in_chans", in_chans, 1), as_integer("num_classes", num_classes, 0)
        if stem_features and config.stem_stride != 4:
            raise ValueError(
                f"stem_features=True with stem_stride={config.stem_stride}: the first stage is at stride 2 itself;"
                " leave stem_features out"
            )
        factory = {"device": device, "dtype": dtype}
        size = image_size(img_size)
        self.cfg = config  # not `config`, which transformers takes for one of its own
        self.in_chans, self.num_classes, self.drop_rate = in_chans, num_classes, drop_rate

        stride = config.stem_stride
        self.stem = Stem(
            in_chans, config.dims[0], stride=stride, map_size=ceil_size(size, stride), config=config, **factory
        )
        rates = calculate_drop_path_rates(drop_path_rate, list(config.depths), stagewise=True)
        self.feature_info: list[dict[str, Any]] = []
        if stem_features:
            self.feature_info.append({"num_chs": self.stem.inner_dim, "reduction": 2, "module": "stem.act"})
        # features in front of the stages'
        self.num_stem_features = len(self.feature_info)
        stages, dilation, dim = [], 1, config.dims[0]
        for i in range(len(config.dims)):
            before, step = dilation, 1 if i == 0 else 2
            if stride * step > output_stride:
                dilation, step = dilation * step, 1
            stride *= step
            stages.append(
                Stage(
                    dim,
                    index=i,
                    stride=step,
                    dilation=(before, dilation),
                    total_stride=stride,
                    map_size=ceil_size(size, stride),
                    drop_path_rates=rates[i],
                    config=config,
                    **factory,
                )
            )
            dim = config.dims[i]
            self.feature_info.append({"num_chs": dim, "reduction": stride, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.num_features = dim
        self.head = ClassifierHead(dim, num_classes, pool_type=global_pool, drop_rate=drop_rate, **factory)
        self.head_hidden_size = self.head.num_features
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draw every parameter anew, and set every buffer, on whatever device they are.

        | what | how |
        |---|---|
        | 1x1 convolutions, linear layers | truncated normal, standard deviation 0.02 |
        | other convolutions | normal, variance 2 / (outputs a cell takes part in) |
        | their biases | 0 |
        | BatchNorm, LayerNorm | weight 1, bias 0; running mean 0, variance 1 |
        | layer scale | ``layer_scale`` |
        | ECA, global context | timm's own; the last layer of the context 0: the block starts without it |
        | relative and absolute tables | truncated normal, standard deviation 0.02 |
        | rotary frequencies (mixed) | axial ones turned to a random direction a head |
        | Linformer's projections | truncated normal, variance 1 / tokens |
        | Performer's, Reformer's random vectors | orthogonal, and plain, Gaussian |
        | relative embeddings of augmented convolution | truncated normal, variance 1 / head_dim |
        """
        for module in reversed(list(self.modules())):  # parts before the whole, whose word is the last
            if isinstance(module, nn.Conv2d | nn.Linear):
                pointwise = isinstance(module, nn.Linear) or module.kernel_size == (1, 1)
                if pointwise:
                    trunc_normal_(module.weight, std=0.02)
                else:
                    fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
                    nn.init.normal_(module.weight, std=(2.0 / fan_out) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the parameters whose zero means nothing, so that weight decay spares them: tables, frequencies."""
        kinds = ("table", "freqs", "rows", "columns", "project_k", "project_v")
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in kinds}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns that sort parameters into layers, for layer-wise learning rates."""
        blocks = r"^stages\.(\d+)" if coarse else [
            (r"^stages\.(\d+)\.(?:downsample|pos_embed)", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
        ]  # fmt: skip
        return {"stem": r"^stem", "blocks": blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training: recompute each block in the backward pass."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def set_input_size(self, img_size: int | Sequence[int] | None = None) -> None:
        """Resize what was made for the nominal image size, in pixels; images of other sizes work without."""
        if img_size is None:
            return
        size = image_size(img_size)
        if hasattr(self.stem.pos_embed, "set_map_size"):
            self.stem.pos_embed.set_map_size(ceil_size(size, self.cfg.stem_stride))
        for stage, info in zip(self.stages, self.feature_info[self.num_stem_features :], strict=False):
            stage.set_map_size(ceil_size(size, info["reduction"]))
        update_model_input_size(self, size)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.head.fc

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """Give the model a new classifier for this many classes (0: none), and another pooling if named.

        As in timm, a model without pooling, as one that was pruned, needs one to be named.

        Raises:
            ValueError: There are classes, and ``global_pool`` is ``""``.
        """
        num_classes = as_integer("num_classes", num_classes, 0)
        if global_pool is not None:
            check_choice("global_pool", global_pool, POOLS)
            check_pooled(num_classes, global_pool)
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, reset_other, in_features=self.num_features, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features
        if isinstance(cfg := getattr(self, "pretrained_cfg", None), dict):
            cfg.pop("label_names", None)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return features, which are the stages' maps (see ``stem_features`` for one more), beside the last stage's.

        Args:
            x: Images, ``(B, in_chans, H, W)``.
            indices: Features to return: a list, the last n for an integer, all for None.
            norm: Accepted for timm's sake: no norm stands behind a stage.
            stop_early: Leave out the stages behind the last feature wanted.
            output_fmt: ``NCHW``, the only one there is.
            intermediates_only: Return the list alone.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}; maps are returned as 'NCHW' only")
        before = self.num_stem_features
        take_indices, max_index = feature_take_indices(before + len(self.stages), indices)
        intermediates: list[Tensor] = []
        if before > 0:
            x = self.stem.act(self.stem.conv1(x))
            if 0 in take_indices:
                intermediates.append(x)
            x = self.stem.pos_embed(self.stem.conv2(x))
        else:
            x = self.stem(x)
        for i, stage in enumerate(self.stages):
            if not stop_early or before + i <= max_index:
                x = stage(x)
            if before + i in take_indices:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
        return x, intermediates

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last feature of ``indices``, and the classifier; return the indices kept."""
        before = self.num_stem_features
        take_indices, max_index = feature_take_indices(before + len(self.stages), indices)
        kept = max_index + 1 - before
        pruned = kept < len(self.stages)
        self.stages = self.stages[:kept]
        if pruned:
            self.num_features = self.head_hidden_size = self.cfg.dims[max(kept - 1, 0)]
        if prune_head or pruned:
            self.reset_classifier(0, "", reset_other=True)
        return list(take_indices)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last stage's map, ``(B, num_features, H / 32, W / 32)``."""
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the classes' logits of a map, or with ``pre_logits`` what the classifier reads."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)  # a head of one's own may take no more

    def forward(self, x: Tensor) -> Tensor:
        """Return the classes' logits, ``(B, num_classes)``."""
        return self.forward_head(self.forward_features(x))


def check_pooled(num_classes: int, global_pool: str) -> None:
    """Refuse a classifier of a map.

    Raises:
        ValueError: There are classes, and no pooling before them.
    """
    if num_classes and not global_pool:
        raise ValueError(f"global_pool='' leaves num_classes={num_classes} a map; give 0, or a pooling")


def image_size(img_size: int | Sequence[int]) -> tuple[int, int]:
    """Return (height, width) in pixels.

    Raises:
        ValueError: It is neither a positive integer nor two of them.
    """
    sides: tuple[Any, ...] = tuple(img_size) if isinstance(img_size, Iterable) else (img_size, img_size)
    if len(sides) != 2 or any(isinstance(s, bool) or not isinstance(s, Integral) or s < 1 for s in sides):
        raise ValueError(f"img_size={img_size!r}; give one side, or (height, width), in whole pixels")
    return int(sides[0]), int(sides[1])


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "min_input_size": (3, 32, 32),
        "crop_pct": 0.95,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.conv1.conv",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2109.08937",
        **kwargs,
    }


# tags of weights that the package carries, a variant's default first: the kinds of pictures that they saw one after the
# other; ``input_size`` stays the family's, though those were of 64 pixels a side
_SHIPPED = {
    "glattn_atto": ("fractal1k_ft_contour1k_64", "fractal1k_64"),
    "glattn_pico": ("fractal1k_ft_contour1k_64", "fractal1k_64"),
}
_PAPERS = {"fractal": ("arXiv:2101.08515", "arXiv:2110.03091"), "contour": ("arXiv:2206.09132",)}


def _variant_cfgs(variant: str) -> dict[str, dict[str, Any]]:
    cfgs = {}
    for tag in _SHIPPED.get(variant, ()):
        name, kinds = f"{variant}.{tag}", re.findall("([a-z]+)1k", tag)
        cfgs[name] = _cfg(
            hf_hub_id=f"{HUB}/{name}",
            file=str(Path(__file__).with_name(f"{name}.safetensors")),
            label_names=tuple(f"{kinds[-1]}{number:04d}" for number in range(1000)),
            paper_ids=("arXiv:2109.08937", *(paper for kind in kinds for paper in _PAPERS[kind])),
        )
    return cfgs or {variant: _cfg(hf_hub_id=f"{HUB}/{variant}")}


default_cfgs = generate_default_cfgs(
    {name: cfg for variant in VARIANTS for name, cfg in _variant_cfgs(variant).items()}
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    overlay = source_overlay(kwargs.get("pretrained_cfg_overlay"))
    other = any(overlay.get(name) for name in ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename"))
    if (other or not pretrained) and not isinstance(kwargs.get("pretrained_cfg"), Mapping | PretrainedCfg):
        overlay.setdefault("label_names", None)  # those of the variant's own weights, which are not loaded
    kwargs["pretrained_cfg_overlay"] = overlay
    source = {name: kwargs.get(name) for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")}
    with reading_checkpoint(variant, pretrained, **source):
        model: nn.Module = build_model_with_cfg(
            GLAttn,
            variant,
            pretrained,
            model_cfg=VARIANTS[variant],
            feature_cfg={
                "out_indices": tuple(range(5 if kwargs.get("stem_features") else 4)),
                "flatten_sequential": True,
            },
            pretrained_filter_fn=partial(
                checkpoint_filter_fn,
                named=True,
                features_only=kwargs.get("features_only", False),
                strict=kwargs.get("pretrained_strict", True),
                cache_dir=kwargs.get("cache_dir"),
            ),
            **kwargs,
        )
    if isinstance(model, GLAttn):  # a wrapper for features has no use for what follows
        names = model.pretrained_cfg.get("label_names")
        if names and len(names) != model.num_classes:
            del model.pretrained_cfg["label_names"]  # of a classifier that was not kept
        check_pooled(model.num_classes, model.head.global_pool.pool_type)
    return model


def _entry_point(variant: str) -> Any:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(variant, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = variant
    create.__doc__ = f"Return a `GLAttn` of the variant {variant}; keywords are `GLAttn`'s and timm's."
    return create


__all__ = ["GLAttn"]

for _variant in VARIANTS:
    globals()[_variant] = register_model(_entry_point(_variant))

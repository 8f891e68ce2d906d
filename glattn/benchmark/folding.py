"""Folding batch norms into the convolutions before them, in any model, as it would be deployed."""

from __future__ import annotations

import copy

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from glattn.layers.conv2d import Pointwise, StridedConv
from glattn.layers.norm import BatchNorm2d

_CONVS = (nn.Conv2d, Conv2dSame, Pointwise, StridedConv)
_NORMS = (nn.BatchNorm2d, BatchNormAct2d, BatchNorm2d)


def _settle(model: nn.Module) -> None:
    """Give every batch norm statistics that no default has: a wrong fold then shows in the outputs."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                shape = module.running_mean.shape
                module.running_mean.copy_(torch.randn(shape, generator=generator) * 0.1)
                if module.running_var is not None:
                    module.running_var.copy_(torch.rand(shape, generator=generator) + 0.5)


def observe(model: nn.Module, image: Tensor) -> list[tuple[str, str]]:
    """Return names of (convolution, batch norm) where a model in evaluation mode feeds one's output to the other."""
    convs = {name: m for name, m in model.named_modules() if type(m) in _CONVS}
    norms = {name: m for name, m in model.named_modules() if type(m) in _NORMS and not m.training}
    made: dict[int, tuple[str, Tensor]] = {}  # keeps the tensors: an id is not used again
    pairs: list[tuple[str, str]] = []
    handles = []
    for name, conv in convs.items():

        def made_by(_: nn.Module, __: object, output: Tensor, name: str = name) -> None:
            made[id(output)] = (name, output)

        handles.append(conv.register_forward_hook(made_by))
    for name, norm in norms.items():

        def takes(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            if id(inputs[0]) in made:
                pairs.append((made[id(inputs[0])][0], name))

        handles.append(norm.register_forward_pre_hook(takes))
    try:
        model(image)
    finally:
        for handle in handles:
            handle.remove()
    once = [column.count for column in (list(names) for names in zip(*pairs, strict=True))] if pairs else []
    return [pair for pair in pairs if all(count(name) == 1 for count, name in zip(once, pair, strict=True))]


def _same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 2e-3 * a.abs().max().clamp_min(1e-6))


@torch.no_grad()
def fold(model: nn.Module, image: Tensor) -> tuple[nn.Module, str]:
    """Return the model folded as far as its outputs stay the same, and a word on how far that was.

    First by its own means (``timm.utils.reparameterize_model``), then each batch norm that takes a convolution's
    output as it is; either is kept only if the outputs agree. The model is changed in place: its batch norms get
    random statistics, its weights are random to begin with.

    Args:
        image: An input, for watching the model run.
    """
    _settle(model.eval())
    expected = model(image)
    total = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    try:
        own = reparameterize_model(model).eval()  # modules that it makes are in training mode
        agrees = _same(expected, own(image))
    except Exception:  # others' models: one that cannot do it is measured as it is
        agrees = False
    if not agrees:
        own = model
    folded = _fold_agreeing(own, observe(own, image), image, expected)
    left = sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    return folded, f"{total - left} of {total} batch norms" if total else "none to fold"


def _fold_agreeing(model: nn.Module, pairs: list[tuple[str, str]], image: Tensor, expected: Tensor) -> nn.Module:
    """Return the model with those pairs folded that leave its outputs the same, found by halving."""
    if not pairs:
        return model
    folded = _fold_pairs(copy.deepcopy(model), pairs)
    if _same(expected, folded(image)):
        return folded
    if len(pairs) == 1:
        return model
    half = len(pairs) // 2
    model = _fold_agreeing(model, pairs[:half], image, expected)
    return _fold_agreeing(model, pairs[half:], image, expected)


def _fold_pairs(model: nn.Module, pairs: list[tuple[str, str]]) -> nn.Module:
    for conv_name, norm_name in pairs:
        conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        model.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))
        after = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
        model.set_submodule(norm_name, after)
    return model

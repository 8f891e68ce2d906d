"""What a model costs whatever the machine: parameters, multiply-adds, and the memory that a step takes."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from glattn.layers.conv2d import FoldedConv


def count_macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Return multiply-adds of a forward pass: convolutions, matrix products, attention's among them.

    Nothing is computed: the model is copied to the meta device, or run once where it cannot be.

    Args:
        shape: Of the batch of images.
    """

    def count(image: torch.Tensor) -> int:
        # the counter hooks what modules are called with, and fails on a view of a parameter that wants a gradient
        copied = copy.deepcopy(model).requires_grad_(False).to(image.device)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            copied(image)
        return counter.get_total_flops() // 2

    try:
        return count(torch.empty(shape, device="meta"))
    except Exception:  # others' models: what they cannot do on meta, each says in its own way
        with sdpa_kernel(SDPBackend.MATH):  # matrix products; the CPU's fused attention is not counted
            return count(torch.zeros(shape, device=next(model.parameters()).device))


def count_bytes(module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Return bytes of weights, buffers, weights that are kept laid out as well, and the optimiser's state."""
    held = [*module.parameters(), *module.buffers()]
    kept = sum(conv.kept_bytes() for conv in module.modules() if isinstance(conv, FoldedConv))
    if optimizer is not None:
        held += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return kept + sum(tensor.numel() * tensor.element_size() for tensor in held)


def measure_growth(step: Callable[[], None], device: torch.device) -> int:
    """Return by how many bytes torch's allocations grow, at their highest, during a step.

    On CUDA the allocator's own count; on the CPU the profiler's record of each allocation. Libraries' scratch
    space that does not go through torch's allocator is seen by neither.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    results = profile.profiler.kineto_results if profile.profiler else None
    assert results is not None
    events = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    held = peak = 0
    for _, change in events:
        held += change
        peak = max(peak, held)
    return peak

"""The machine that a number belongs to, and the matrix product that is its yardstick."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
import torch.nn.functional as F

from glattn.benchmark.timing import Step, warm_up
from glattn.provenance import commit

# side of the square matrices: large enough for the full rate, small enough for a turn
_SIDE = {"cpu": 2048, "cuda": 8192}


def describe(device: torch.device, *, kept: bool) -> dict[str, str]:
    """Return the machine, the versions and the commit that rows are written with; no path and no name of a host.

    Args:
        device: What is measured.
        kept: This process keeps the memory that it frees, see `keep_freed_memory`.
    """
    import timm

    import glattn

    return {
        "device": device.type,
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "capability": "" if device.type == "cuda" else torch.backends.cpu.get_cpu_capability(),
        "freed_memory": "kept" if kept else "returned",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "glattn": glattn.__version__,
        "commit": commit(12),
    }


def _processor() -> str:
    """Return the processor's name, with family and model where Linux tells: rented ones of many kinds share a name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().partition("\n\n")[0].splitlines() if info.exists() else []
    about = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "model name" not in about:
        return platform.processor() or platform.machine()
    kind = [f"{word} {about[name]}" for word, name in (("family", "cpu family"), ("model", "model")) if name in about]
    return ", ".join([about["model name"], *kind])


def matrix_product(device: torch.device, dtype: torch.dtype) -> tuple[Step, int]:
    """Return a square matrix product as a step, and its multiply-adds.

    On a CPU it is the faster one of torch.mm, which in fp32 is MKL's, and oneDNN's as a 1x1 convolution, which has
    twice the rate on AMD processors whose units are 512 bits wide.
    """
    side = _SIDE[device.type]
    # at random: a GPU multiplies ones with less power, thus faster
    a, b, out = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(3))

    def product() -> None:
        torch.mm(a, b, out=out)

    if device.type != "cpu":
        return product, side**3
    # in channels_last memory; of a batch that oneDNN is given even on one thread
    rows, weight = a.view(64, -1, 1, side).permute(0, 3, 1, 2), b[:, :, None, None]

    def convolution() -> None:
        F.conv2d(rows, weight)

    return min((product, convolution), key=lambda step: warm_up(step, synchronizer(device))[1]), side**3


def synchronizer(device: torch.device) -> Step:
    """Return what waits for a device to have done its work."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None

"""What several tests do with models."""

import warnings

import timm
import torch
from torch import nn

import glattn  # noqa: F401 (registers the family)

SIZES = [name for name in timm.list_models("glattn_*", module="glattn") if name.count("_") == 1]
VARIANTS = timm.list_models(module="glattn")


def randomize(model: nn.Module) -> nn.Module:
    """Give BatchNorm statistics, layer scales and biases values that no default has; return the model in eval mode."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.1)
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
            elif name.endswith((".ls1", ".ls2")) and hasattr(module, "gamma"):
                module.gamma.uniform_(0.1, 0.3)
    return model.eval()


def scripted(model: nn.Module) -> torch.jit.ScriptModule:
    """Return the model in TorchScript, without torch's word that TorchScript is deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*TorchScript type system.*", category=UserWarning)
        return torch.jit.script(model)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference over the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()

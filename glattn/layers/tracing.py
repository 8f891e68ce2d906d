"""What functions ask that are scripted, traced, compiled and exported as well as called."""

import torch


def sizes_are_known() -> bool:
    """Tell whether sizes may be branched on: in a trace, and in what the compiler makes, they are to stay free."""
    if torch.jit.is_scripting():
        return True
    else:  # noqa: RET505 (TorchScript compiles what stands behind an if)
        return not (torch.jit.is_tracing() or torch.compiler.is_compiling())

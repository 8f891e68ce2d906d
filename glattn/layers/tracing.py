"""What functions ask that are scripted, traced, compiled and exported as well as called."""

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true


def sizes_are_known() -> bool:
    """Tell whether sizes may be branched on: in a trace, and in what the compiler makes, they are to stay free."""
    if torch.jit.is_scripting():
        return True
    else:  # noqa: RET505 (TorchScript compiles what stands behind an if)
        return not (torch.jit.is_tracing() or torch.compiler.is_compiling())


_CAN_TELL = torch.__version__ >= (2, 14)  # before, untried


def certain(condition: bool) -> bool:
    """Tell whether a condition on sizes holds of every size that a trace, or what the compiler makes, is for."""
    if torch.jit.is_scripting():
        return condition
    else:  # noqa: RET505
        if torch.compiler.is_compiling():
            return _CAN_TELL and statically_known_true(condition)
        return not torch.jit.is_tracing() and condition

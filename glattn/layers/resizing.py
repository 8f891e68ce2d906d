"""Learned tables that follow the nominal image size."""

from torch import Tensor, nn


def resized(parameter: nn.Parameter, table: Tensor) -> nn.Parameter:
    """Return a resized table as a parameter; the same one where the size is the same, for an optimiser may hold it."""
    return parameter if table is parameter else nn.Parameter(table, parameter.requires_grad)

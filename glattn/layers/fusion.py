"""How the local and the global branch meet: what each is given, and what is made of their answers.

The sum is UNetFormer's (arXiv:2109.08937), the channel split Inception Transformer's (arXiv:2205.12956).
"""

from typing import Any

import torch
from torch import Tensor, nn

from glattn.config import MixerConfig
from glattn.layers.conv import ConvNorm


class SumFusion(nn.Module):
    """``local + global``, each of the whole input.

    Attributes ``local_dim``, ``global_dim`` and ``out_dim`` are the branches' widths (0: no such branch) and the
    fusion's.

    Args:
        dim: Channels of the input.
        config: ``split_ratio`` is read by `SplitFusion`.
    """

    def __init__(self, dim: int, *, config: MixerConfig, **factory: Any) -> None:
        super().__init__()
        self.local_dim = self.global_dim = self.out_dim = dim

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the local and the global branch's input."""
        return x, x

    def forward(self, local: Tensor, globe: Tensor) -> Tensor:
        """Return the fused branches, ``(B, out_dim, H, W)``."""
        return local + globe


class GatedFusion(SumFusion):
    """``g local + (1 - g) global``, ``g = sigmoid(BatchNorm(conv1x1([local, global])))`` a channel and cell."""

    def __init__(self, dim: int, *, config: MixerConfig, **factory: Any) -> None:
        super().__init__(dim, config=config)
        self.gate = ConvNorm(2 * dim, dim, **factory)

    def forward(self, local: Tensor, globe: Tensor) -> Tensor:
        """Return the fused branches, ``(B, out_dim, H, W)``."""
        gate = self.gate(torch.cat([local, globe], dim=1)).sigmoid()
        # under autocast a norm that is frozen answers in the type of its buffers, and lerp takes one type
        return torch.lerp(globe, local.to(globe.dtype), gate.to(globe.dtype))


class ConcatFusion(SumFusion):
    """``[local, global]``: the projection behind it sees both, at twice the cost."""

    def __init__(self, dim: int, *, config: MixerConfig, **factory: Any) -> None:
        super().__init__(dim, config=config)
        self.out_dim = 2 * dim

    def forward(self, local: Tensor, globe: Tensor) -> Tensor:
        """Return the fused branches, ``(B, out_dim, H, W)``."""
        return torch.cat([local, globe], dim=1)


class SplitFusion(SumFusion):
    """``[local(x1), global(x2)]`` with ``x = [x1, x2]``: fewer multiply-adds.

    ``x1`` has ``split_ratio`` of the channels, rounded so that ``x2`` divides into heads of ``head_dim``.

    Raises:
        ValueError: The split leaves a branch without channels.
    """

    def __init__(self, dim: int, *, config: MixerConfig, **factory: Any) -> None:
        super().__init__(dim, config=config)
        step = config.head_dim if config.num_heads is None else config.num_heads
        self.global_dim = round(dim * (1 - config.split_ratio) / step) * step
        self.local_dim = dim - self.global_dim
        if self.global_dim <= 0 or self.local_dim <= 0:
            raise ValueError(
                f"fusion='split' with split_ratio={config.split_ratio} leaves {self.local_dim} of {dim} channels to the"
                f" local branch and {self.global_dim} to the global one (a multiple of {step}); change split_ratio,"
                " head_dim or num_heads, or use fusion='sum'"
            )

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the local and the global branch's input."""
        return x[:, : self.local_dim], x[:, self.local_dim :]

    def forward(self, local: Tensor, globe: Tensor) -> Tensor:
        """Return the fused branches, ``(B, out_dim, H, W)``."""
        return torch.cat([local, globe], dim=1)


class LocalOnly(SumFusion):
    """The local branch alone: there is no global one."""

    def __init__(self, dim: int, *, config: MixerConfig, **factory: Any) -> None:
        super().__init__(dim, config=config)
        self.global_dim = 0

    def forward(self, local: Tensor, globe: Tensor) -> Tensor:
        """Return the local branch's answer."""
        return local


class GlobalOnly(SumFusion):
    """The global branch alone: there is no local one."""

    def __init__(self, dim: int, *, config: MixerConfig, **factory: Any) -> None:
        super().__init__(dim, config=config)
        self.local_dim = 0

    def forward(self, local: Tensor, globe: Tensor) -> Tensor:
        """Return the global branch's answer."""
        return globe


FUSIONS: dict[str, type[SumFusion]] = {
    "sum": SumFusion,
    "gated": GatedFusion,
    "concat": ConcatFusion,
    "split": SplitFusion,
    "local": LocalOnly,
    "global": GlobalOnly,
}

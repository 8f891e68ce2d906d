"""The block: a global-local mixer and an MLP, both residual (after UNetFormer, arXiv:2109.08937).

UNetFormer normalises before each branch; here every norm stands right behind a convolution, so that all of them fold.
"""

from typing import Any

import torch
from timm.layers import DropPath, LayerScale2d
from torch import Tensor, nn

from glattn.config import MixerConfig
from glattn.layers import onednn
from glattn.layers.attention import MultiHeadGlobalAttention
from glattn.layers.context import CONTEXTS
from glattn.layers.conv import ConvNorm, activate_in_place, activation, is_watched, scale_output
from glattn.layers.conv2d import FoldedConv
from glattn.layers.fusion import FUSIONS, SumFusion
from glattn.layers.local import LOCALS, SqueezeExcite


def is_idle(drop: nn.Module) -> bool:
    """Tell whether a dropout passes on what it is given; what took its place may work in evaluation, too."""
    return not drop.training and type(drop) in (nn.Identity, nn.Dropout, DropPath)


class GlobalLocalAttention(nn.Module):
    """``proj(context(fusion(local(x), attn(x))))``: ``(B, C, H, W) -> (B, C, H, W)``.

    The projection behind the fusion is the only one: the global branch has none of its own here.

    Args:
        dim: Channels in and out.
        config: The mixer's options.
        map_size: The map's height and width at the nominal image size; any other works.
        stride: Stride of the map, in pixels.
        dilation: Dilation of the local branch's convolutions, in cells.

    Raises:
        ValueError: The width does not divide as the options want.
    """

    def __init__(
        self,
        dim: int,
        *,
        config: MixerConfig | None = None,
        map_size: tuple[int, int] = (14, 14),
        stride: int = 16,
        dilation: int = 1,
        **factory: Any,
    ) -> None:
        super().__init__()
        config = config or MixerConfig()
        self.fusion = FUSIONS[config.fusion](dim, config=config, **factory)
        self.local: nn.Module = nn.Identity()
        if self.fusion.local_dim:
            self.local = LOCALS[config.local](self.fusion.local_dim, config=config, dilation=dilation, **factory)
        self.attn: nn.Module = nn.Identity()
        if self.fusion.global_dim:
            self.attn = MultiHeadGlobalAttention(
                self.fusion.global_dim, config=config, map_size=map_size, stride=stride, project=False, **factory
            )
        self.context = CONTEXTS[config.context](self.fusion.out_dim, **factory)
        self.proj = ConvNorm(self.fusion.out_dim, dim, **factory)
        self.proj_drop = nn.Dropout(config.proj_drop)

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Return the mixed map, or its sum with another if that is given."""
        out = self.context(self.fused(x))
        if not torch.jit.is_scripting():
            if added is not None and isinstance(self.proj, FoldedConv):
                if is_idle(self.proj_drop) and not is_watched(self.proj, self.proj_drop):
                    return self.proj(out, added)
        out = self.proj_drop(self.proj(out))
        return out if added is None else added + out

    def fused(self, x: Tensor) -> Tensor:
        """Return the fusion of the branches' answers; a sum, in inference, is computed with the local one's gate."""
        local, globe = self.fusion.split(x)
        if not torch.jit.is_scripting():
            if self.gate_adds(local):
                gate: Any = self.local.gate
                return gate.add(self.local.conv(local), self.attn(globe))
        return self.fusion(self.local(local), self.attn(globe))

    @torch.jit.ignore
    def gate_adds(self, x: Tensor) -> bool:
        """Tell whether the gate is to add the global branch's answer: folded, by `onednn`, none looking on."""
        parts = self._modules  # as attributes they take ten times as long to be found
        fusion, local = parts["fusion"], parts["local"]
        return (
            isinstance(parts["proj"], FoldedConv)
            and onednn.takes(x)
            and type(fusion) is SumFusion
            and type(local) in LOCALS.values()
            and not is_watched(fusion, local)
            and type(local.gate) is SqueezeExcite
            and local.gate.can_add()
        )


class Mlp(nn.Module):
    """``BatchNorm(conv1x1(act(BatchNorm(conv1x1(x)))))``: ``(B, C, H, W) -> (B, C, H, W)``; ``2 ratio C^2`` a cell.

    Args:
        dim: Channels in and out.
        hidden_dim: Channels between.
        act_layer: Activation, by timm's name.
    """

    def __init__(self, dim: int, *, hidden_dim: int, act_layer: str, **factory: Any) -> None:
        super().__init__()
        self.fc1 = ConvNorm(dim, hidden_dim, **factory)
        self.act = activation(act_layer, **factory)
        self.fc2 = ConvNorm(hidden_dim, dim, **factory)

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Return the transformed map, or its sum with another if that is given."""
        out = self.hidden(x)
        if not torch.jit.is_scripting():
            if added is not None and isinstance(self.fc2, FoldedConv) and not is_watched(self.fc2):
                return self.fc2(out, added)
        out = self.fc2(out)
        return out if added is None else added + out

    def hidden(self, x: Tensor) -> Tensor:
        """Return the activated map between the convolutions; folded, a ReLU is computed with the first of them."""
        if not torch.jit.is_scripting():
            if type(self.act) is nn.ReLU and isinstance(self.fc1, FoldedConv) and not is_watched(self.fc1, self.act):
                return self.fc1(x, relu=True)
        return self.act(self.fc1(x))

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Activate in place."""
        activate_in_place(self.act)


class GlobalLocalBlock(nn.Module):
    """``x + drop_path(scale(mixer(x)))``, then ``x + drop_path(scale(mlp(x)))``: ``(B, C, H, W) -> (B, C, H, W)``.

    Args:
        mixer: A `GlobalLocalAttention`.
        mlp: An `Mlp`.
        dim: Channels in and out.
        layer_scale: First value of the layer scale; 0 leaves it out.
        drop_path: Rate at which an image skips a branch in training.
    """

    folded = False

    def __init__(
        self,
        mixer: nn.Module,
        mlp: nn.Module,
        *,
        dim: int,
        layer_scale: float,
        drop_path: float,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.mixer = mixer
        self.ls1 = LayerScale2d(dim, layer_scale, **factory) if layer_scale else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.mlp = mlp
        self.ls2 = LayerScale2d(dim, layer_scale, **factory) if layer_scale else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's map."""
        if not torch.jit.is_scripting():
            if self.adds():
                x = self.mixer(x, x)
                return self.mlp(x, x)
        x = x + self.drop_path1(self.ls1(self.mixer(x)))
        return x + self.drop_path2(self.ls2(self.mlp(x)))

    @torch.jit.ignore
    def adds(self) -> bool:
        """Tell whether what ends a branch is to add the block's map: once folded, with nothing in between to do."""
        parts = self._modules
        return (
            self.folded
            and is_idle(parts["drop_path1"])
            and is_idle(parts["drop_path2"])
            and type(parts["mixer"]) is GlobalLocalAttention
            and type(parts["mlp"]) is Mlp
            and type(parts["ls1"]) is type(parts["ls2"]) is nn.Identity
            and not is_watched(*parts.values())
        )

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold the layer scales into the convolutions before them, in place."""
        if isinstance(self.ls1, LayerScale2d):
            scale_output(self.mixer.proj, self.ls1.gamma)
        if isinstance(self.ls2, LayerScale2d):
            scale_output(self.mlp.fc2, self.ls2.gamma)
        self.ls1, self.ls2 = nn.Identity(), nn.Identity()
        self.folded = True

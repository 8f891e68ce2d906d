"""timm's models that each size is compared with, and the ImageNet-1k top-1 that was published for them."""

from __future__ import annotations

from dataclasses import dataclass

TIMM = "timm results-imagenet.csv, 2024"
PAPER = "the model's paper"


@dataclass(frozen=True)
class Peer:
    """A published result, for orientation: recipes differ (epochs, distillation), so it ranks no architecture.

    Args:
        size: Class of comparison, a size of this family.
        tag: timm's tag of the weights that reached it, trained on ImageNet-1k alone.
        top1: ImageNet-1k top-1, percent.
        pixels: Side of the images it was reached at.
        source: Where the number is from.
    """

    size: str
    tag: str
    top1: float
    pixels: int = 224
    source: str = TIMM


PEERS: dict[str, Peer] = {
    "convnext_atto": Peer("atto", "d2_in1k", 75.668),
    "edgenext_small": Peer("atto", "usi_in1k", 81.064, 256),
    "fastvit_t8": Peer("atto", "apple_dist_in1k", 77.172, 256),
    "repvit_m0_9": Peer("atto", "dist_450e_in1k", 79.058),
    "starnet_s4": Peer("atto", "in1k", 78.4, source=PAPER),
    "shvit_s2": Peer("atto", "in1k", 75.2, source=PAPER),
    "mobilenetv4_conv_small": Peer("atto", "e2400_r224_in1k", 73.730),
    "convnext_pico": Peer("pico", "d1_in1k", 79.516),
    "efficientvit_b1": Peer("pico", "r224_in1k", 79.240),
    "repvit_m1_1": Peer("pico", "dist_450e_in1k", 81.302),
    "levit_192": Peer("pico", "fb_dist_in1k", 79.850),
    "swiftformer_s": Peer("pico", "dist_in1k", 78.5, source=PAPER),
    "convnext_nano": Peer("nano", "d1h_in1k", 80.762),
    "fastvit_sa12": Peer("nano", "apple_dist_in1k", 81.842, 256),
    "repvit_m1_5": Peer("nano", "dist_450e_in1k", 82.520),
    "mobilenetv4_hybrid_medium": Peer("nano", "e500_r224_in1k", 80.438),
    "levit_256": Peer("nano", "fb_dist_in1k", 81.506),
    "convnext_tiny": Peer("tiny", "fb_in1k", 82.066),
    "swin_tiny_patch4_window7_224": Peer("tiny", "ms_in1k", 81.388),
    "caformer_s18": Peer("tiny", "sail_in1k", 83.668),
    "davit_tiny": Peer("tiny", "msft_in1k", 82.698),
    "maxvit_tiny_tf_224": Peer("tiny", "in1k", 83.422),
    "nextvit_small": Peer("tiny", "bd_in1k", 82.620),
    "fastvit_sa24": Peer("tiny", "apple_dist_in1k", 83.362, 256),
    "hiera_tiny_224": Peer("tiny", "mae_in1k_ft_in1k", 82.824),
    "mambaout_tiny": Peer("tiny", "in1k", 82.7, source=PAPER),
    "efficientvit_b2": Peer("tiny", "r224_in1k", 82.162),
    "tiny_vit_21m_224": Peer("tiny", "in1k", 83.270),
    "levit_384": Peer("tiny", "fb_dist_in1k", 82.598),
    "convnext_small": Peer("small", "fb_in1k", 83.144),
    "swin_small_patch4_window7_224": Peer("small", "ms_in1k", 83.228),
    "mambaout_small": Peer("small", "in1k", 84.1, source=PAPER),
    "efficientvit_l1": Peer("small", "r224_in1k", 84.448),
    "caformer_s36": Peer("small", "sail_in1k", 84.544),
}
SIZES: tuple[str, ...] = tuple(dict.fromkeys(peer.size for peer in PEERS.values()))


def of_size(size: str) -> list[str]:
    """Return the family's model of a size and its peers, the ConvNeXt of the same name first among them."""
    return [f"glattn_{size}", *(name for name, peer in PEERS.items() if peer.size == size)]

"""What sits on the backbone's feature maps: pyramids for detectors, decoders for segmentation."""

from glattn.heads.fpn import FPNBackbone, fpn_backbone
from glattn.heads.unetformer import UNetFormer, UNetFormerDecoder, unetformer

__all__ = ["FPNBackbone", "UNetFormer", "UNetFormerDecoder", "fpn_backbone", "unetformer"]

"""Global-local attention vision backbones for timm; importing this package registers the family."""

from glattn.config import GLAttnConfig, MixerConfig

from glattn.models.glattn import GLAttn  # isort: skip (registers the family)
from glattn.hub import create_model  # isort: skip (needs it)

__version__ = "0.1.0"
__all__ = ["GLAttn", "GLAttnConfig", "MixerConfig", "create_model"]

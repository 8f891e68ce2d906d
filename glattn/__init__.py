"""Global-local attention vision backbones for timm; importing this package registers the family."""

__version__ = "0.1.0"

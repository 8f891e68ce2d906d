"""Checkpoints that travel: publish one on the Hugging Face Hub, and load one from anywhere, safely."""

from glattn.hub.loading import create_model
from glattn.hub.publish import push

__all__ = ["create_model", "push"]

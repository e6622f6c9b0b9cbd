"""Devices that keep large runs alive: losses, attention devices, clipping, guards, monitors."""

from .losses import next_token_loss
from .soft_cap import soft_cap

__all__ = ["next_token_loss", "soft_cap"]

"""Decoding: one compiled loop for autoregressive and speculative decoding, and its benchmark."""

from specjax.decoding.drafter import DFlashDrafter, Drafter
from specjax.decoding.generate import Generation, generate

__all__ = ["DFlashDrafter", "Drafter", "Generation", "generate"]

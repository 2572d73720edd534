"""Decoding: one compiled loop for autoregressive and speculative decoding, and its benchmark."""

from specjax.decoding.auto_width import AutoWidth
from specjax.decoding.drafter import DFlashDrafter, Drafter
from specjax.decoding.generate import Generation, Stream, generate

__all__ = ["AutoWidth", "DFlashDrafter", "Drafter", "Generation", "Stream", "generate"]

"""Fused windows for a trainer of one's own: examples, a dataset of the stream, a collator, and the loss as a mixin."""

from services.distill.huggingface.collator import FusedCollator
from services.distill.huggingface.dataset import FusedDataset
from services.distill.huggingface.example import example_of
from services.distill.huggingface.mixin import FusedLossMixin

__all__ = ["FusedCollator", "FusedDataset", "FusedLossMixin", "example_of"]

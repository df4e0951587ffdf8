"""Mixtures of experts: made from a dense decoder, routed, balanced and measured."""

"""Alignment and projection: a source's distributions in the target's vocabulary.

`byte` is the default; `min_edit` and `transport` are the published methods, for comparison.
"""

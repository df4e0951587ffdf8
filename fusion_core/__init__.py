"""Tokens as bytes, alignment, projection, fusion and sparse losses: the pure library under LLM Fusion.

Nothing below this package imports Ray, gRPC or anything from `services`; a test asserts it.
"""

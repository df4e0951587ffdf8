"""Plumbing shared by the services: configuration, channels, errors, the wire codec, corpus and models on disk."""

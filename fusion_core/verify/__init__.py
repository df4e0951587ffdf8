"""Verifiers: judge a model's answer by what can be checked. Pure code that runs nothing of the answer."""

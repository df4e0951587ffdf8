"""Answers of sources to prompts, kept so that no answer is asked for twice.

answers/IDENTITY/source.json       the source whose answers these are: `AnswerIdentity`
answers/IDENTITY/HASH.parquet      some answers with their prompts and settings, named by the hash of the file
"""

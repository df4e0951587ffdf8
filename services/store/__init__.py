"""Scored windows, stored so that an epoch, a second target or another strategy pays no source pass twice.

IDENTITY/source.json                       the source whose windows these are: `SourceIdentity`
IDENTITY/captures/SPLIT/capture.json       a split that `fusion capture` scores: `CapturePlan`
IDENTITY/captures/SPLIT/NUMBER.parquet     its windows by place, with NUMBER.json beside each: `ShardRecord`
IDENTITY/captures/SPLIT/keys.sorted        where each of its windows is, by key: see `captured_keys`
IDENTITY/kept/HASH.parquet, HASH.json      windows that were scored for a stream or a call, found by key
"""

"""Readers of the curves that trackers keep, independent of what wrote them: {curve: {step: value}}.

Each refuses a step that stands twice in a curve.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

from tensorboardX.proto.event_pb2 import Event, SessionLog

Curves = dict[str, dict[int, float]]


def tensorboard_curves(events: Path) -> Curves:
    """The curves of a folder of events; a session takes back the steps from which it goes on, as TensorBoard has it."""
    found: Curves = {}
    for file in sorted(events.glob("events.*")):
        data, start = file.read_bytes(), 0
        while start + 12 < len(data):  # records of length, its checksum, an event, its checksum
            (length,) = struct.unpack_from("<Q", data, start)
            event = Event.FromString(data[start + 12 : start + 12 + length])
            if event.session_log.status == SessionLog.START:
                for curve in found.values():
                    for step in [step for step in curve if step >= event.step]:
                        del curve[step]
            for value in event.summary.value:
                _add(found, value.tag, event.step, value.simple_value)
            start += length + 16
    return found


def wandb_curves(folder: Path) -> dict[str, Curves]:
    """The curves of all offline runs in a folder, by the names of their projects and runs."""
    from wandb.proto.wandb_internal_pb2 import Record

    runs: dict[str, Curves] = {}
    for file in folder.glob("offline-run-*/*.wandb"):
        found: Curves = {}
        for content in _log_records(file.read_bytes()):
            record = Record.FromString(content)
            if record.HasField("run"):
                name = f"{record.run.project}/{record.run.display_name}"
                assert name not in runs, f"{name} stands in two folders"
                runs[name] = found
            if record.HasField("history"):
                values = {(item.key or "/".join(item.nested_key)): item.value_json for item in record.history.item}
                for key, value in values.items():
                    if not key.startswith("_"):
                        _add(found, key, int(values["_step"]), json.loads(value))
    return runs


def _log_records(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, behind a head of seven bytes."""
    block, at, record = 32768, 7, b""
    while at + 7 <= len(data):
        if (left := block - at % block) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in {1, 4}:  # whole, or the last part
            yield record
            record = b""


def mlflow_curves(folder: Path) -> dict[str, Curves]:
    """The curves of all runs in a file store, by the names of their experiments and runs."""
    from mlflow import MlflowClient

    runs: dict[str, Curves] = {}
    with patch.dict(os.environ, {"MLFLOW_ALLOW_FILE_STORE": "true"}):
        client = MlflowClient(tracking_uri=folder.as_uri())
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id]):
            found: Curves = {}
            for key in run.data.metrics:
                for metric in client.get_metric_history(run.info.run_id, key):
                    _add(found, key, metric.step, metric.value)
            name = f"{experiment.name}/{run.info.run_name}"
            assert name not in runs, f"{name} stands there twice"
            runs[name] = found
    return runs


def _add(curves: Curves, key: str, step: int, value: float) -> None:
    curve = curves.setdefault(key, {})
    assert step not in curve, f"{key}: step {step} stands there twice"
    curve[step] = value

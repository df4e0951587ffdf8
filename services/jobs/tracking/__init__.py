"""The curves of a run at TensorBoard, Weights & Biases and MLflow."""

from services.jobs.tracking.config import TrackerName, Tracking
from services.jobs.tracking.trackers import Trackers

__all__ = ["TrackerName", "Trackers", "Tracking"]

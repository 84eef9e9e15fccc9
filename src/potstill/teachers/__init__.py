"""Who teaches. A teacher gives typed signals about the states of a batch and never receives gradients."""

from potstill.teachers.cached import CachedTeacher
from potstill.teachers.local import FrozenStart, LocalTeacher, PrivilegedTeacher
from potstill.teachers.moving import (
    EMATeacher,
    LiveTeacher,
    ProgressiveTeacher,
    RefreshedTeacher,
    follow,
    moving_state,
)
from potstill.teachers.panel import Panel, TrustRegion
from potstill.teachers.served import ServedTeacher

__all__ = [
    "CachedTeacher",
    "EMATeacher",
    "FrozenStart",
    "LiveTeacher",
    "LocalTeacher",
    "Panel",
    "PrivilegedTeacher",
    "ProgressiveTeacher",
    "RefreshedTeacher",
    "ServedTeacher",
    "TrustRegion",
    "follow",
    "moving_state",
]

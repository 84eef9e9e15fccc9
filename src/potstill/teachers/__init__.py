"""Who teaches. A teacher gives typed signals about the states of a batch and never receives gradients."""

from potstill.teachers.local import EMATeacher, FrozenStart, LocalTeacher, PrivilegedTeacher

__all__ = ["EMATeacher", "FrozenStart", "LocalTeacher", "PrivilegedTeacher"]

"""Which positions count: weights, selections and curricula over the positions of a batch."""

from potstill.weighting.base import Positions, Weighting
from potstill.weighting.members import EarlyPrefix, EntropyTop, Uniform, top_share

__all__ = ["EarlyPrefix", "EntropyTop", "Positions", "Uniform", "Weighting", "top_share"]

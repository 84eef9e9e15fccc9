"""Which positions count: weights, selections and curricula over the positions of a batch."""

from potstill.weighting.base import Positions, Weighting
from potstill.weighting.members import (
    Agreement,
    EarlyPrefix,
    Opener,
    PerResponse,
    Product,
    RelativeConfidence,
    Uniform,
)
from potstill.weighting.rewards import (
    BetaKernel,
    CorrectOnly,
    HardBand,
    IncorrectOnly,
    RewardItself,
    RewardSoftmax,
    pass_rates,
)
from potstill.weighting.selections import (
    DivergenceTop,
    EntropyTop,
    Overconfident,
    Quadrants,
    SampledShare,
    SoftOR,
    top_share,
    unit_range,
)

__all__ = [
    "Agreement",
    "BetaKernel",
    "CorrectOnly",
    "DivergenceTop",
    "EarlyPrefix",
    "EntropyTop",
    "HardBand",
    "IncorrectOnly",
    "Opener",
    "Overconfident",
    "PerResponse",
    "Positions",
    "Product",
    "Quadrants",
    "RelativeConfidence",
    "RewardItself",
    "RewardSoftmax",
    "SampledShare",
    "SoftOR",
    "Uniform",
    "Weighting",
    "pass_rates",
    "top_share",
    "unit_range",
]

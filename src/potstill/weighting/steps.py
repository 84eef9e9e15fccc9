"""Weights by step of an agent's trajectory: all tokens of a step weigh alike. B rows, R positions, K steps, I_k a step's
positions.

A step is a turn (`segment_BR`), or a maximal run of counted tokens, `runs_of`: what the tools answer stands between.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.contracts.errors import RecipeError
from potstill.divergences.family import promoted
from potstill.rollouts.groups import group_advantages
from potstill.weighting.base import Positions, Weighting


@dataclass(frozen=True)
class StepPositions(Positions):
    """Positions of trajectories whose errors are known."""

    first_error_B: Tensor | None = None  # int64: the step whose action could not be carried out; -1 where all could


@dataclass(frozen=True)
class StepRatio(Weighting):
    """SOD's w_k = min( prod_{u < k} (d_u + e) / (d_{u+1} + e), 1 + delta ), d_k = mean over I_k of |log_ratio|.

    The product telescopes to (d_1 + e) / (d_k + e): a step weighs less as the student is further from the teacher there
    than in its first step, whose weight is 1. The bound is on what comes out, never on the running product; delta None:
    no bound. Source: arXiv 2605.07725, Eqs. 6-7, e 1e-6 and delta 0.2.
    """

    delta: float | None = 0.2
    epsilon: float = 1e-6
    needs = ("log_ratio_BR", "segment_BR")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.delta is not None and not self.delta >= 0.0:
            raise RecipeError(f"StepRatio.delta must not be negative, got {self.delta}; null sets no bound.")
        if not self.epsilon > 0.0:
            raise RecipeError(f"StepRatio.epsilon must be positive, got {self.epsilon}.")

    def weigh(self, values: Positions) -> Tensor:
        assert values.log_ratio_BR is not None and values.segment_BR is not None
        d_BK, there_BK = step_means(promoted(values.log_ratio_BR).abs(), values.segment_BR, values.mask_BR)
        first_B1 = there_BK.int().argmax(1, keepdim=True)  # replayed steps, which do not count, may stand before it
        ratio_BK = (d_BK.gather(1, first_B1) + self.epsilon) / (d_BK + self.epsilon)
        if self.delta is not None:
            ratio_BK = ratio_BK.clamp_max(1 + self.delta)
        return ratio_BK.gather(1, values.segment_BR.clamp_min(0))


@dataclass(frozen=True)
class ErrorDecay(Weighting):
    """gamma^(k - k_error) in the steps after a trajectory's first error, 1 up to it and without one. gamma 0: a hard mask.

    SOD's heuristic baselines (arXiv 2605.07725): 0.9, and the mask.
    """

    gamma: float = 0.9
    needs = ("first_error_B", "segment_BR")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.gamma <= 1.0:
            raise RecipeError(f"ErrorDecay.gamma must lie in [0, 1], got {self.gamma}.")

    def weigh(self, values: Positions) -> Tensor:
        assert isinstance(values, StepPositions) and values.first_error_B is not None and values.segment_BR is not None
        error_B1 = values.first_error_B[:, None]
        after_BR = (values.segment_BR - error_B1).clamp_min(0).masked_fill(error_B1 < 0, 0)
        return torch.tensor(self.gamma, device=after_BR.device).pow(after_BR)


@dataclass(frozen=True)
class AdvantageGate(Weighting):
    """low + (high - low) sigmoid(-gamma A_i), A_i the row's advantage in its group: successes need less of a teacher.

    The older mode of SOD's code (off when its steps weigh), with its defaults.
    """

    low: float = 0.0
    high: float = 0.1
    gamma: float = 1.0
    needs = ("reward_B",)

    def weigh(self, values: Positions) -> Tensor:
        assert values.reward_B is not None
        gate_B = torch.sigmoid(-self.gamma * group_advantages(values.reward_B, values.group))
        return (self.low + (self.high - self.low) * gate_B)[:, None].expand(values.mask_BR.shape)


def step_means(values_BR: Tensor, segment_BR: Tensor, mask_BR: Tensor) -> tuple[Tensor, Tensor]:
    """(mean of the values over each step's counted positions [B, K], whether a row has that step [B, K])."""
    mask_BR = mask_BR.bool()
    place_BR = segment_BR.masked_fill(~mask_BR, 0)
    shape = (len(mask_BR), int(place_BR.max()) + 1 if place_BR.numel() else 1)
    sums_BK = values_BR.new_zeros(shape).scatter_add(1, place_BR, values_BR.masked_fill(~mask_BR, 0.0))
    count_BK = values_BR.new_zeros(shape).scatter_add(1, place_BR, mask_BR.to(values_BR.dtype))
    return sums_BK / count_BK.clamp_min(1), count_BK > 0


def runs_of(counted_BT: Tensor) -> Tensor:
    """Which maximal run of counted tokens each belongs to, from 0; -1 elsewhere. [B, T] int64."""
    counted_BT = counted_BT.bool()
    before_BT = torch.nn.functional.pad(counted_BT[:, :-1], (1, 0))
    return ((counted_BT & ~before_BT).cumsum(1) - 1).masked_fill(~counted_BT, -1)

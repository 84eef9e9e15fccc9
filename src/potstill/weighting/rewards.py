"""Weights of whole responses, from how they and their group were graded. B responses, K of them a problem, side by side.

    p^ = (sum of the K rewards + prior) / (K + 2 prior)

is a problem's pass rate. `mean_one` divides by the mean over the responses of the batch, which with the objective's average
"sequence" is sum_i w_i D_i / sum_i w_i; `normalize` divides by the mean over positions instead. Source: PACED, arXiv
2603.11178, and its code for RewardSoftmax.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from potstill.contracts.errors import DataError, RecipeError
from potstill.weighting.base import Positions, Weighting


@dataclass(frozen=True, kw_only=True)
class _OfResponses(Weighting):
    """Base: one weight a response."""

    mean_one: bool = False
    needs = ("reward_B",)

    @property
    def couples(self) -> Literal["row", "batch"]:
        return "batch" if self.mean_one else super().couples

    def of_responses(self, reward_B: Tensor, group: int) -> Tensor:
        """Weights [B]; those of responses in which nothing counts are ignored."""
        raise NotImplementedError

    def weigh(self, values: Positions) -> Tensor:
        assert values.reward_B is not None
        counts_B = values.mask_BR.any(1)
        weights_B = self.of_responses(values.reward_B.double(), values.group)
        if self.mean_one:
            tiny = torch.finfo(torch.float64).tiny
            weights_B = weights_B * counts_B.sum() / weights_B[counts_B].sum().clamp_min(tiny)
        return weights_B[:, None].expand(values.mask_BR.shape)


@dataclass(frozen=True)
class BetaKernel(_OfResponses):
    """w = p^^alpha (1 - p^)^beta: nothing for problems that are never or always solved; peak at alpha / (alpha + beta).

    prior: so many right and as many wrong answers seen before, without which a problem of small p is dropped with
    probability (1 - p)^K. unbiased (integer powers, no prior): the mean over the K answers is the kernel of the true p,

        w = c (c - 1) ... (c - alpha + 1) (K - c) ... (K - c - beta + 1) / (K (K - 1) ... (K - alpha - beta + 1)),

    c right ones; for alpha = beta = 1 that is K / (K - 1) p^ (1 - p^).
    """

    alpha: float = 1.0
    beta: float = 1.0
    prior: float = 0.0
    unbiased: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0 or self.beta < 0 or self.prior < 0:
            raise RecipeError(
                f"BetaKernel takes powers and a prior of at least 0, got alpha {self.alpha}, beta {self.beta}, prior "
                f"{self.prior}."
            )
        if self.unbiased and (self.alpha % 1 or self.beta % 1 or self.prior):
            raise RecipeError(
                "BetaKernel.unbiased needs whole alpha and beta, and no prior. Set prior 0, or leave it out."
            )

    def of_responses(self, reward_B: Tensor, group: int) -> Tensor:
        if not self.unbiased:
            rate_B = pass_rates(reward_B, group, self.prior).repeat_interleave(group)
            return rate_B**self.alpha * (1 - rate_B) ** self.beta
        if group < self.alpha + self.beta:
            raise RecipeError(
                f"BetaKernel.unbiased needs at least alpha + beta = {self.alpha + self.beta:g} answers a problem, got {group}. "
                "Raise rollouts.samples_per_prompt."
            )
        right = (pass_rates(reward_B, group) * group).repeat_interleave(group)
        weight = torch.ones_like(right)
        for power, count in ((self.alpha, right), (self.beta, group - right)):
            for i in range(int(power)):
                weight = weight * (count - i)
        for i in range(int(self.alpha + self.beta)):
            weight = weight / (group - i)
        return weight


@dataclass(frozen=True)
class HardBand(_OfResponses):
    """1 for problems whose pass rate lies in [low, high], else 0: the hard filter that PACED is compared with.

    The paper's band is not known.
    """

    low: float = 0.2
    high: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.low <= self.high <= 1.0:
            raise RecipeError(f"HardBand takes 0 <= low <= high <= 1, got {self.low} and {self.high}.")

    def of_responses(self, reward_B: Tensor, group: int) -> Tensor:
        rate_B = pass_rates(reward_B, group).repeat_interleave(group)
        return ((rate_B >= self.low - 1e-6) & (rate_B <= self.high + 1e-6)).double()


@dataclass(frozen=True)
class RewardSoftmax(_OfResponses):
    """n softmax(reward / beta) over the n responses of the batch: the right ones count more (mean 1)."""

    beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0.0:
            raise RecipeError(f"RewardSoftmax.beta must be positive, got {self.beta}.")

    @property
    def couples(self) -> Literal["row", "batch"]:
        return "batch"

    def of_responses(self, reward_B: Tensor, group: int) -> Tensor:
        return len(reward_B) * (reward_B / self.beta).softmax(0)


@dataclass(frozen=True)
class CorrectOnly(_OfResponses):
    """1 for responses graded `threshold` or more, else 0."""

    threshold: float = 0.5

    def of_responses(self, reward_B: Tensor, group: int) -> Tensor:
        return (reward_B >= self.threshold).double()


@dataclass(frozen=True)
class IncorrectOnly(_OfResponses):
    """1 for responses graded below `threshold`, else 0."""

    threshold: float = 0.5

    def of_responses(self, reward_B: Tensor, group: int) -> Tensor:
        return (reward_B < self.threshold).double()


@dataclass(frozen=True)
class RewardItself(_OfResponses):
    """The reward is the weight: weights made elsewhere, handed on as rewards."""

    def of_responses(self, reward_B: Tensor, group: int) -> Tensor:
        return reward_B


def pass_rates(reward_B: Tensor, group: int, prior: float = 0.0) -> Tensor:
    """p^ of each problem, [B / K], from rewards in [0, 1] whose groups of K stand side by side."""
    if group < 1 or len(reward_B) % group:
        raise DataError(f"Pass rates need whole groups: got {len(reward_B)} rewards in groups of {group}.")
    if len(reward_B) and not (reward_B.min() >= 0 and reward_B.max() <= 1):
        raise DataError(
            f"A pass rate is a mean of rewards in [0, 1], got {reward_B.min():g} to {reward_B.max():g}. Scale the grades."
        )
    return (reward_B.double().view(-1, group).sum(1) + prior) / (group + 2 * prior)

"""Weightings of the student's and the teacher's confidence, and combinators. B rows, R positions of a row."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from potstill.contracts.errors import RecipeError
from potstill.divergences.family import one_of, promoted
from potstill.weighting.base import Positions, Weighting


@dataclass(frozen=True)
class Uniform(Weighting):
    """Every counted position weighs 1."""

    def weigh(self, values: Positions) -> Tensor:
        return torch.ones_like(values.mask_BR, dtype=torch.float32)


@dataclass(frozen=True)
class EarlyPrefix(Weighting):
    """1 + gamma (1 - share of the row's |log_ratio| spent before the position): 1 + gamma first, then falling to 1.

    Source: arXiv 2606.22600, Algorithm 1. gamma = 0 is Uniform. A row without any |log_ratio| weighs 1 + gamma.
    """

    gamma: float = 0.5
    needs = ("log_ratio_BR",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gamma >= 0.0:
            raise RecipeError(f"EarlyPrefix.gamma must not be negative, got {self.gamma}.")

    def weigh(self, values: Positions) -> Tensor:
        assert values.log_ratio_BR is not None
        size = values.log_ratio_BR.float().abs().masked_fill(~values.mask_BR.bool(), 0.0)
        before = size.cumsum(1) - size
        return 1 + self.gamma * (1 - before / size.sum(1, keepdim=True).clamp_min(1e-12))


@dataclass(frozen=True)
class RelativeConfidence(Weighting):
    """sigmoid((H(q) - H(p)) / tau): near 1 where the student is unsure and the teacher is not, 1/2 where they are alike.

    Source: TSD-KD, arXiv 2603.13260 (tau = 1 in its code).
    """

    tau: float = 1.0
    needs = ("student_entropy_BR", "teacher_entropy_BR")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tau > 0.0:
            raise RecipeError(f"RelativeConfidence.tau must be positive, got {self.tau}.")

    def weigh(self, values: Positions) -> Tensor:
        assert values.student_entropy_BR is not None and values.teacher_entropy_BR is not None
        return ((values.student_entropy_BR - values.teacher_entropy_BR) / self.tau).sigmoid()


@dataclass(frozen=True)
class Opener(Weighting):
    """1 for the opening of each response, else 0: its first m positions, the fewest whose student entropies add up to `share`
    of the response's. Equal entropies keep ceil(share L); a response without any entropy keeps its first position.

    Source: TSD-KD, arXiv 2603.13260 (share = 0.1).
    """

    share: float = 0.1
    needs = ("student_entropy_BR",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.share <= 1.0:
            raise RecipeError(f"Opener.share must lie in (0, 1], got {self.share}.")

    def weigh(self, values: Positions) -> Tensor:
        assert values.student_entropy_BR is not None
        mask = values.mask_BR.bool()
        if self.share == 1.0:
            return mask.float()
        size = values.student_entropy_BR.double().masked_fill(~mask, 0.0)
        before = size.cumsum(1) - size
        reached = before >= self.share * size.sum(1, keepdim=True) * (1 - 1e-9)  # 0.07 * 100 is 7.000000000000001
        return (~reached | (mask.cumsum(1) == 1)).float()


@dataclass(frozen=True)
class Agreement(Weighting):
    """How far K contexts agree on the tokens there: less weight where the teacher's log-probs l^k differ among them.

    level "token": d_t = var_k(l_t^k) (unbiased) or max - min, n_t = min(d_t / scale, 10), scale the 95 % quantile of d over
        the counted positions of the batch (at least 1e-6); w_t = max(1 / (1 + gamma n_t), 0.01).
    level "sequence": d = var_k of the response's mean l^k (biased) or max - min; w = max(exp(-gamma d), 1e-6), for all its
        tokens. Under a mean over each response's own weights (`PerResponse`) such weights cancel, as the paper's code has it.
    Source: UniSD, arXiv 2605.06597, Eq. 2 and its code (gamma = 0.01, K = 3).
    """

    level: Literal["token", "sequence"] = "token"
    gamma: float = 0.01
    statistic: Literal["variance", "range"] = "variance"
    needs = ("context_logp_KBR",)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "level", self.level, ("token", "sequence"))
        one_of(self, "statistic", self.statistic, ("variance", "range"))
        if not self.gamma >= 0.0:
            raise RecipeError(f"Agreement.gamma must not be negative, got {self.gamma}.")

    @property
    def couples(self) -> Literal["row", "batch"]:
        return "batch" if self.level == "token" else super().couples

    def weigh(self, values: Positions) -> Tensor:
        assert values.context_logp_KBR is not None
        mask = values.mask_BR.bool()
        logp = promoted(values.context_logp_KBR).masked_fill(~mask, 0.0)
        if len(logp) < 2:
            raise RecipeError(f"Agreement needs at least 2 contexts to compare, got {len(logp)}. Give more contexts.")
        if self.level == "sequence":
            means_KB = logp.sum(-1) / mask.sum(-1).clamp_min(1)
            return (-self.gamma * self._differ(means_KB, 0)).exp().clamp_min(1e-6)[:, None].expand_as(mask)
        d = self._differ(logp, 1)
        scale = d[mask].quantile(0.95).clamp_min(1e-6) if mask.any() else 1.0
        return (1 / (1 + self.gamma * (d / scale).clamp_max(10.0))).clamp_min(0.01)

    def _differ(self, x: Tensor, correction: int) -> Tensor:
        return x.var(0, correction=correction) if self.statistic == "variance" else x.amax(0) - x.amin(0)


@dataclass(frozen=True)
class PerResponse(Weighting):
    """Another weighting divided by its mean over each response, so that a mean over the response is its weighted mean.

        sum_t w_t D_t / max(sum_t w_t, least)

    with the objective's average "sequence". least: the paper's guard where weights are small (UniSD: 1); weights that add up
    to less then count for less than a response. A response whose weights are all 0 counts 0.
    """

    of: Weighting = field(default_factory=Uniform)
    least: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.least >= 0.0:
            raise RecipeError(f"PerResponse.least must not be negative, got {self.least}.")

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.of.needs

    @property
    def couples(self) -> Literal["row", "batch"]:
        return "batch" if self.of.couples == "batch" else super().couples

    def weigh(self, values: Positions) -> Tensor:
        weights, length = self.of(values), values.mask_BR.sum(1, keepdim=True)
        least = max(self.least, torch.finfo(torch.float32).tiny)
        return weights * length / weights.sum(1, keepdim=True).clamp_min(least)


@dataclass(frozen=True)
class Product(Weighting):
    """Two weightings, multiplied: a selection of tokens and a weight of its problem, say."""

    first: Weighting = field(default_factory=Uniform)
    second: Weighting = field(default_factory=Uniform)

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(dict.fromkeys((*self.first.needs, *self.second.needs)))

    @property
    def couples(self) -> Literal["row", "batch"]:
        return "batch" if "batch" in (self.first.couples, self.second.couples) else super().couples

    def weigh(self, values: Positions) -> Tensor:
        return self.first(values) * self.second(values)

"""Which share of the positions is kept: weight 1 for the chosen, 0 for the others. B rows, R positions of a row.

Of n counted positions floor(share n) are kept, but at least one; of equals, the earlier. scope: n counts each response,
or the batch. The mean over kept positions alone is normalize="mean" over the batch, `PerResponse` for each response.
Source: TIP, arXiv 2604.14084, unless said otherwise. h = H(q) is the student's entropy; its factor 1 / log V in the paper
falls out of every rule here, since ranges are normalised and probabilities too.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from potstill.contracts.errors import RecipeError
from potstill.divergences.family import one_of, promoted
from potstill.weighting.base import Positions, Weighting

Scope = Literal["batch", "response"]
DIVERGENCES = ("reverse_kl", "forward_kl", "jensen_shannon")
FLOOR = 1e-8  # of the factors of a sampling probability


@dataclass(frozen=True)
class _Kept(Weighting):
    """Base: the top share by a score."""

    share: float = 0.5
    scope: Scope = "response"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "scope", self.scope, ("batch", "response"))
        if not 0.0 < self.share <= 1.0:
            raise RecipeError(f"{type(self).__name__}.share must lie in (0, 1], got {self.share}.")

    @property
    def couples(self) -> Literal["row", "batch"]:
        return "batch" if self.scope == "batch" else super().couples

    def score(self, values: Positions) -> Tensor:
        """What the positions are ranked by, [B, R]."""
        raise NotImplementedError

    def weigh(self, values: Positions) -> Tensor:
        return top_share(self.score(values), values.mask_BR.bool(), self.share, self.scope).float()


@dataclass(frozen=True)
class EntropyTop(_Kept):
    """The share with the highest student entropy. No rule of the entropy alone tells confident errors from mastery."""

    needs = ("student_entropy_BR",)

    def score(self, values: Positions) -> Tensor:
        assert values.student_entropy_BR is not None
        return values.student_entropy_BR


@dataclass(frozen=True)
class DivergenceTop(_Kept):
    """The share with the highest divergence: TIP's delta is the reverse KL(q || p)."""

    divergence: Literal["reverse_kl", "forward_kl", "jensen_shannon"] = "reverse_kl"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "divergence", self.divergence, DIVERGENCES)

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return (f"{self.divergence}_BR",)

    def score(self, values: Positions) -> Tensor:
        score: Tensor = getattr(values, f"{self.divergence}_BR")
        return score


@dataclass(frozen=True)
class _Ranged(_Kept):
    """Base of scores on h^, the entropy clipped at a percentile and brought to [0, 1], over the batch or each response."""

    clip: float = 0.98
    ranges: Scope = "batch"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "ranges", self.ranges, ("batch", "response"))
        if not 0.0 < self.clip <= 1.0:
            raise RecipeError(f"{type(self).__name__}.clip must lie in (0, 1], got {self.clip}; 1 clips nothing.")

    @property
    def couples(self) -> Literal["row", "batch"]:
        return "batch" if self.ranges == "batch" else super().couples

    def entropy_range(self, values: Positions) -> Tensor:
        assert values.student_entropy_BR is not None
        return unit_range(values.student_entropy_BR, values.mask_BR, self.ranges, self.clip)


@dataclass(frozen=True)
class SoftOR(_Ranged):
    """The share with the highest s = 1 - (1 - h^)(1 - delta^), delta = KL(q || p): unsure, or far from the teacher (Eq. 7).

    h is clipped at its 98th percentile, delta is not; both are brought to [0, 1] over the batch. lowest: the lowest s.
    """

    lowest: bool = False
    needs = ("student_entropy_BR", "reverse_kl_BR")

    def score(self, values: Positions) -> Tensor:
        assert values.reverse_kl_BR is not None
        h, delta = self.entropy_range(values), unit_range(values.reverse_kl_BR, values.mask_BR, self.ranges)
        score = h + delta - h * delta
        return -score if self.lowest else score


@dataclass(frozen=True)
class Overconfident(_Ranged):
    """The share with the highest KL(p || q)(1 - h^): sure and wrong (quadrant Q3), which no entropy rule sees.

    The forward KL, since the reverse one of a student that is nearly certain knows only the teacher's mass on its choice.
    """

    share: float = 0.1
    needs = ("student_entropy_BR", "forward_kl_BR")

    def score(self, values: Positions) -> Tensor:
        assert values.forward_kl_BR is not None
        return values.forward_kl_BR * (1 - self.entropy_range(values))


@dataclass(frozen=True)
class SampledShare(_Kept):
    """A random share, drawn without replacement with probabilities h^alpha JSD^gamma: entropy or product sampling.

    alpha = gamma = 0 is the random control. Drawn as the top of log h^alpha JSD^gamma + Gumbel noise, which is sampling one
    after another without replacement, from keyed noise. Source: TIP's code, where n counts the micro-batch, and the
    factors are H / log V and JSD / log 2, each at least 1e-8, as here; V is not known here, so that the bound on h is in nats.
    """

    alpha: float = 1.0
    gamma: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0 or self.gamma < 0:
            raise RecipeError(f"SampledShare takes powers of at least 0, got alpha {self.alpha}, gamma {self.gamma}.")

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        factors = {"student_entropy_BR": self.alpha, "jensen_shannon_BR": self.gamma}
        return ("noise_BR", *(name for name, power in factors.items() if power))

    def score(self, values: Positions) -> Tensor:
        assert values.noise_BR is not None
        score = -(-values.noise_BR.double().log()).log()
        if self.alpha:
            assert values.student_entropy_BR is not None
            score = score + self.alpha * values.student_entropy_BR.double().clamp_min(FLOOR).log()
        if self.gamma:
            assert values.jensen_shannon_BR is not None
            score = score + self.gamma * (values.jensen_shannon_BR.double() / LOG_2).clamp_min(FLOOR).log()
        return score


LOG_2: float = torch.tensor(2.0, dtype=torch.float64).log().item()


def top_share(score_BR: Tensor, mask_BR: Tensor, share: float, scope: Scope) -> Tensor:
    """Which counted positions are among the top floor(share n), at least one, by score; bool [B, R]. Ties: the earlier."""
    score, mask = (x.reshape(1, -1) if scope == "batch" else x for x in (promoted(score_BR), mask_BR))
    order = score.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    # Counted positions go first even where their score is -inf or padding comes earlier.
    order = order.gather(1, mask.gather(1, order).int().argsort(dim=1, descending=True, stable=True))
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    keep = (mask.sum(1, keepdim=True).double() * share + 1e-9).floor().clamp_min(1)  # 0.29 * 100 is 28.999...
    return ((rank < keep) & mask).reshape(mask_BR.shape)


def unit_range(values_BR: Tensor, mask_BR: Tensor, scope: Scope, clip: float = 1.0) -> Tensor:
    """Counted values clipped at their quantile `clip`, then (x - min) / (max - min) in [0, 1]; 0 where all are equal."""
    mask = mask_BR.bool()
    if not mask.any():
        return torch.zeros_like(promoted(values_BR))
    x, counted = (x.reshape(1, -1) if scope == "batch" else x for x in (promoted(values_BR), mask))
    x = x.masked_fill(~counted, torch.nan)
    if clip < 1.0:
        x = torch.minimum(x, x.nanquantile(clip, dim=1, keepdim=True))
    low = x.masked_fill(~counted, torch.inf).amin(1, keepdim=True)
    high = x.masked_fill(~counted, -torch.inf).amax(1, keepdim=True)
    x = (x - low) / (high - low).clamp_min(torch.finfo(x.dtype).tiny)
    return x.masked_fill(~counted, 0.0).reshape(mask_BR.shape)


class Quadrants:
    """TIP's four kinds of positions: 1 unsure and far, 2 unsure and near, 3 sure and far, 4 sure and near (to the teacher)."""

    NAMES: ClassVar[tuple[str, ...]] = ("q1", "q2", "q3", "q4")

    @staticmethod
    def of(values: Positions) -> dict[str, Tensor]:
        """Which counted positions belong to each, bool [B, R]. High is above the batch's mean (unsourced)."""
        mask = values.mask_BR.bool()
        assert values.student_entropy_BR is not None and values.reverse_kl_BR is not None
        unsure, far = (x > x[mask].mean() for x in (values.student_entropy_BR, values.reverse_kl_BR))
        parts = (unsure & far, unsure & ~far, ~unsure & far, ~unsure & ~far)
        return {name: part & mask for name, part in zip(Quadrants.NAMES, parts, strict=True)}

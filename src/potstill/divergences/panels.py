"""Several teachers as one: their mixture, their product, and where a weighted sum of divergences to them is least.

    panel(q) = sum_i w_i D(p_i, q) = W c D(m, q) + panel(m),   W = sum_i w_i

    D                        least at m                                     c                  order of `power_mean`
    forward KL(p_i || q)     the mixture sum_i w_i p_i / W                  1                  1
    reverse KL(q || p_i)     the product of experts prod_i p_i^(w_i/W) / Z  1                  0
    Alpha(a)                 the power mean (sum_i w_i p_i^a / W)^(1/a) / Z Z^a                a

So under these members a panel is one teacher: training on either has the same gradient up to the factor W c, and panel(m)
is what no student can mend. Others (JensenShannon, TotalVariation) have no such teacher.

Teachers are log-probabilities, K of [*P, V] (a list, or a stack [K, *P, V]); weights [K], or [K, *P] where they differ by
position; None is equal weights of sum 1. Everything in float32 or better, and differentiable in the teachers.
P positions, V outcomes.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from potstill.contracts.errors import ModelError, RecipeError
from potstill.divergences.family import (
    Alpha,
    FDivergence,
    ForwardKL,
    NeymanChi2,
    PearsonChi2,
    ReverseKL,
    SquaredHellinger,
    promoted,
)
from potstill.divergences.supports import log_mass

INF = math.inf


def panel(
    divergence: FDivergence,
    *,
    teachers_logp: Sequence[Tensor] | Tensor,
    student_logp: Tensor,
    weights: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """sum_i w_i D(p_i, q), [*P], nats: a divergence to each teacher, then the weighted sum, weights as they are.

    A teacher of weight 0 is absent, even where its divergence is infinite. Sources: MAD-OPD, arXiv 2605.01347, Eq. 8
    (w = `confidence_weights`); SELFCI, arXiv 2605.20258, its allow and disallow branches under ReverseKL, whose weights
    its code divides by max(their sum, 1).
    """
    teachers, w = _stacked(teachers_logp, weights)
    values = torch.stack([divergence(teacher_logp=teacher, student_logp=student_logp) for teacher in teachers])
    w = w.to(values.dtype).squeeze(-1)
    return (w * values).masked_fill(w == 0, 0.0).sum(0)


def mixture(teachers_logp: Sequence[Tensor] | Tensor, weights: Sequence[float] | Tensor | None = None) -> Tensor:
    """log sum_i w_i p_i, weights divided by their sum, [*P, V]: what any of the teachers would say."""
    return power_mean(teachers_logp, weights, order=1.0)


def product(teachers_logp: Sequence[Tensor] | Tensor, exponents: Sequence[float] | Tensor | None = None) -> Tensor:
    """log of prod_i p_i^e_i / Z, [*P, V], exponents as they are (None: 1 / K, the geometric mean): what all agree on.

    A negative exponent subtracts an expert: (1 + s, -s) over (expert, amateur) is contrastive, and (a, 1 - a) over
    (teacher, reference) is the best answer to a log-ratio reward scaled by a: a between 0 and 1 interpolates, above 1
    extrapolates beyond the teacher (arXiv 2604.00626, Eq. 14). Interpolated teacher logits, (1 - c) z_T + c z_S, are
    the exponents (1 - c, c) (SELFCI's "interp", c = 0.3).
    An outcome that an expert with a positive exponent forbids is dead; exponent 0 is no expert.
    """
    return _product(*_stacked(teachers_logp, exponents))


def _product(teachers: Tensor, e: Tensor) -> Tensor:
    forbids = teachers == -INF
    dead = (forbids & (e > 0)).any(0)
    joint = (e * teachers.masked_fill(forbids & (e == 0), 0.0)).sum(0).masked_fill(dead, -INF)
    return _normalised(joint, "product")


def power_mean(
    teachers_logp: Sequence[Tensor] | Tensor, weights: Sequence[float] | Tensor | None = None, order: float = 1.0
) -> Tensor:
    """log of (sum_i w_i p_i^order)^(1/order) / Z, [*P, V], weights divided by their sum; order 0 is their product.

    1 is the mixture, -1 the harmonic mean; the higher the order, the more one teacher alone can bring. Up to order 0
    an outcome that one teacher forbids is dead.
    """
    teachers, w = _stacked(teachers_logp, weights)
    w = w / _total(w)
    if order == 0.0:
        return _product(teachers, w)
    if (w < 0).any():
        raise RecipeError(f"A mean of order {order} needs weights of at least 0. To subtract an expert use product.")
    absent, forbids = w == 0, teachers == -INF
    dead = (forbids & ~absent).any(0) & (order < 0)
    raised = order * teachers.masked_fill(dead | (forbids & absent), 0.0) + w.log()
    mean = log_mass(raised.movedim(0, -1)) / order
    return _normalised(mean.masked_fill(dead, -INF), "mean")


def minimiser(
    divergence: FDivergence,
    teachers_logp: Sequence[Tensor] | Tensor,
    weights: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """The log q [*P, V] at which `panel` is least over all distributions, for the members where that has a closed form.

    All of them are Alpha up to a factor: its Lagrange condition q^-a sum_i w_i p_i^a = const is a power mean of order a.
    (For any member the condition is that sum_i w_i `conjugate_at`(log p_i - log q) is the same at every outcome.)
    """
    if isinstance(divergence, Alpha):
        return power_mean(teachers_logp, weights, divergence.alpha)
    if type(divergence) not in ORDERS:
        raise RecipeError(
            f"The best answer to several teachers under {type(divergence).__name__} has no closed form here. It has for "
            f"{', '.join(sorted(d.__name__ for d in ORDERS))} and Alpha; otherwise minimise `panel` itself."
        )
    return power_mean(teachers_logp, weights, ORDERS[type(divergence)])


ORDERS: dict[type[FDivergence], float] = {
    ForwardKL: 1.0,
    ReverseKL: 0.0,
    SquaredHellinger: 0.5,
    PearsonChi2: 2.0,
    NeymanChi2: -1.0,
}


def confidence_weights(confidence: Tensor, temperature: float = 1.0) -> Tensor:
    """softmax(c / temperature) over K teachers, [K, *P] -> [K, *P]; equal where any confidence is missing (NaN).

    c in 0 to 1, so that two teachers' weights stay within 0.269 and 0.731 at temperature 1.
    Source: MAD-OPD, arXiv 2605.01347, Eqs. 6-7, with c = (self-reported 0 to 100) / 100.
    """
    if not temperature > 0.0:
        raise RecipeError(f"confidence_weights: temperature must be positive, got {temperature}.")
    missing = confidence.isnan().any(0)
    return (confidence / temperature).masked_fill(missing, 0.0).softmax(0)


def disagreement(tokens_logp: Sequence[Tensor] | Tensor, spread: Literal["variance", "range"] = "variance") -> Tensor:
    """How far K teachers differ about the sampled tokens, K of [*P] -> [*P]: the unbiased variance of their
    log-probabilities (nats^2), or the largest minus the smallest (nats). Source: UniSD, arXiv 2605.06597, Eq. 2.
    """
    if spread not in ("variance", "range"):
        raise RecipeError(f"disagreement.spread must be one of variance, range, got {spread!r}.")
    if len(tokens_logp) < 2:
        raise ModelError(f"disagreement needs at least two teachers, got {len(tokens_logp)}.")
    logp = torch.stack(list(tokens_logp))
    logp = promoted(logp)
    return logp.var(0) if spread == "variance" else logp.amax(0) - logp.amin(0)


def contrast(*, positive_logp: Tensor, negative_logp: Tensor, student_logp: Tensor, margin: float = 0.5) -> Tensor:
    """max(0, margin + |log q - log p+| - |log q - log p-|) at the sampled tokens, [*P] each -> [*P], nats.

    Nearer, by a margin, to the teacher that saw a right answer than to the one that saw a plausible wrong one. Teachers
    get no gradient. Unlike `product` with a negative exponent it can push log q down as well as up, and stops.
    Source: UniSD, arXiv 2605.06597, Eqs. 4-5 (weight 0.1).
    """
    shapes = [list(x.shape) for x in (positive_logp, negative_logp, student_logp)]
    if not shapes[0] == shapes[1] == shapes[2]:
        raise ModelError(f"contrast compares equal shapes of sampled tokens, got {shapes}.")
    log_q = promoted(student_logp)
    near, far = ((log_q - x.detach().to(log_q.dtype)).abs() for x in (positive_logp, negative_logp))
    return (margin + near - far).clamp_min(0.0)


def _stacked(
    teachers_logp: Sequence[Tensor] | Tensor, weights: Sequence[float] | Tensor | None
) -> tuple[Tensor, Tensor]:
    """Teachers [K, *P, V] in float32 or better, and weights [K, *P or 1s, 1]."""
    shapes = {tuple(teacher.shape) for teacher in teachers_logp}
    if len(shapes) != 1:
        raise ModelError(
            f"A panel needs at least one teacher, and all of one shape [*P, V], got {[list(s) for s in sorted(shapes)]}. "
            "Bring them to the same positions and the same vocabulary first."
        )
    teachers = torch.stack(list(teachers_logp))
    teachers = promoted(teachers)
    if weights is None:
        weights = [1.0 / len(teachers)] * len(teachers)
    w = torch.as_tensor(weights, dtype=teachers.dtype, device=teachers.device)
    if tuple(w.shape) not in ((len(teachers),), tuple(teachers.shape[:-1])):
        raise ModelError(
            f"A panel of {len(teachers)} teachers at positions {list(teachers.shape[1:-1])} has weights of shape "
            f"{list(w.shape)}. Give one a teacher, or one a teacher and position."
        )
    return teachers, w.reshape(w.shape + (1,) * (teachers.dim() - w.dim()))


def _total(w: Tensor) -> Tensor:
    total = w.sum(0)
    if not (total > 0).all():
        raise RecipeError("The weights of a panel must have a positive sum at every position.")
    return total


def _normalised(log_x: Tensor, what: str) -> Tensor:
    mass = log_mass(log_x)
    if not mass.isfinite().all():
        raise ModelError(
            f"The {what} of these teachers is no distribution: at some position no outcome is allowed by all, or one is "
            "forbidden only by a subtracted expert. Mask the same outcomes for all teachers, or take the mixture."
        )
    return log_x - mass.unsqueeze(-1)

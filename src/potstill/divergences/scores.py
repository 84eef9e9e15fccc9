"""Divergences between two noised distributions, known by their scores: what one-step diffusion minimises.

x_t = x_0 + sigma eps (or alpha_t x_0 + sigma_t eps), x_0 = G(z) made by the student. teacher_score and student_score are
grad log p_t and grad log q_t at x_t, by networks whose parameters are held fixed, and `gap` = student - teacher. What
comes back is one value a sample [B], summed over all else, to be averaged over samples and noise levels with a weight of
one's own. A surrogate's value means nothing: its gradient in the generator is that of the divergence named.

Two rules make them all. Samples move: E_q[v(x_t)] has the gradient of v through x_t. The score
moves: for any field u, E[u(x_t) (student_score - conditional_score)] = 0, conditional_score = grad log q(x_t | x_0) =
-(x_t - alpha_t x_0) / sigma_t^2, so the derivative of E[u . student_score] in the score's own dependence is minus the
gradient of that product through the samples, with the networks frozen. x_t must not be detached there.

Denoisers may stand for scores, with x_0 for the conditional score: gap and student_score - conditional_score are then
both larger by sigma_t^2 / alpha_t, which is a weight of the noise level. Float32 or better.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.contracts.errors import ModelError, RecipeError
from potstill.contracts.spec import Part
from potstill.divergences.family import FDivergence

PARTS = ("score", "ratio", "sampling")


class ScoreDistance:
    """d(y) of a score gap y, with d(0) = 0: [B, ...] -> [B]; `slope` is d'(y), [B, ...].

    A member writes d; one whose slope has a form that is finite at y = 0 writes that too.
    """

    def __call__(self, gap: Tensor) -> Tensor:
        raise NotImplementedError

    def slope(self, gap: Tensor) -> Tensor:
        slope: Tensor = torch.func.grad(lambda y: self(y).sum())(gap)
        return slope


Part(ScoreDistance)


@dataclass(frozen=True)
class SquaredScore(ScoreDistance):
    """|y|^2: the Fisher divergence."""

    def __call__(self, gap: Tensor) -> Tensor:
        return _inner(gap, gap)

    def slope(self, gap: Tensor) -> Tensor:
        return 2 * gap


@dataclass(frozen=True)
class PseudoHuber(ScoreDistance):
    """sqrt(|y|^2 + c^2) - c, the norm over a whole sample: an update of length below 1 at every noise level.

    Source: SIM, arXiv 2410.16794. c has the unit of the gap; the paper's is unsourced.
    """

    c: float = 0.03

    def __post_init__(self) -> None:
        if not self.c > 0:
            raise RecipeError(f"PseudoHuber.c must be positive, got {self.c}.")

    def __call__(self, gap: Tensor) -> Tensor:
        squared = _inner(gap, gap)
        return squared / ((squared + self.c**2).sqrt() + self.c)  # the difference of roots would cancel at small gaps

    def slope(self, gap: Tensor) -> Tensor:
        return gap / _wide((_inner(gap, gap) + self.c**2).sqrt(), gap)


@dataclass(frozen=True)
class PowerScore(ScoreDistance):
    """|y|^power, the norm over a whole sample, for power > 1; 2 is SquaredScore."""

    power: float = 1.5

    def __post_init__(self) -> None:
        if not self.power > 1:
            raise RecipeError(f"PowerScore.power must be above 1, got {self.power}: below, the slope jumps at 0.")

    def __call__(self, gap: Tensor) -> Tensor:
        return self._scale(gap, self.power)

    def slope(self, gap: Tensor) -> Tensor:
        return self.power * _wide(self._scale(gap, self.power - 2), gap) * gap

    def _scale(self, gap: Tensor, power: float) -> Tensor:
        squared = _inner(gap, gap)
        none = squared == 0  # a negative power of it, and its derivatives, are infinite
        return (squared.masked_fill(none, 1.0) ** (power / 2)).masked_fill(none, 0.0)


@dataclass(frozen=True)
class Huber(ScoreDistance):
    """|y|^2 / 2 up to |y| = c, then c |y| - c^2 / 2, the norm over a whole sample: an update never longer than c."""

    c: float = 0.03

    def __post_init__(self) -> None:
        if not self.c > 0:
            raise RecipeError(f"Huber.c must be positive, got {self.c}.")

    def __call__(self, gap: Tensor) -> Tensor:
        squared = _inner(gap, gap)
        norm = squared.clamp_min(self.c**2).sqrt()
        return torch.where(squared > self.c**2, self.c * (norm - self.c / 2), squared / 2)

    def slope(self, gap: Tensor) -> Tensor:
        return _wide(self.c / _inner(gap, gap).clamp_min(self.c**2).sqrt(), gap) * gap


def fisher(*, teacher_score: Tensor, student_score: Tensor) -> Tensor:
    """|student_score - teacher_score|^2, [B, ...] -> [B]: a value to watch; to train by it, `score_implicit`."""
    gap = _gap("fisher", teacher_score, student_score)
    return _inner(gap, gap)


def integral_kl(x_t: Tensor, *, teacher_score: Tensor, student_score: Tensor) -> Tensor:
    """Surrogate [B] of KL(q_t || p_t), student from teacher: x_t . sg(student_score - teacher_score).

    Source: Diff-Instruct (arXiv 2305.18455), DMD. Scores are detached here. Times `divergence.score_weight(log_ratio)` [B],
    log_ratio = log p_t - log q_t, it is that of D_f(p_t, q_t) for any f-divergence (f-distill, arXiv 2502.15681).
    """
    gap = _gap("integral_kl", teacher_score, student_score, x_t=x_t)
    return _inner(x_t, gap.detach())


def score_implicit(
    distance: ScoreDistance, *, teacher_score: Tensor, student_score: Tensor, conditional_score: Tensor
) -> Tensor:
    """Surrogate [B] of E[d(student_score - teacher_score)], where the law of the points x_t is not differentiated:

        -d'(gap) . (student_score - conditional_score)

    Scores carry their gradients through x_t. With the squared distance it is twice SiD's term at alpha = 1 in denoisers,
    (D_T - D_S)(D_S - x_0) / sigma^4. Source: SIM, arXiv 2410.16794, its theorem on score divergences.
    """
    gap = _gap("score_implicit", teacher_score, student_score, conditional_score=conditional_score)
    return -_inner(distance.slope(gap), _gap("score_implicit", conditional_score, student_score))


def sid(x_0: Tensor, *, teacher: Tensor, student: Tensor, alpha: float = 1.0) -> Tensor:
    """SiD in denoisers D(x_t), [B]: (1 - alpha) |D_T - D_S|^2 + (D_T - D_S) . (D_S - x_0). Source: arXiv 2404.04057."""
    gap = -_gap("sid", teacher, student, x_0=x_0)
    return (1 - alpha) * _inner(gap, gap) + _inner(gap, _gap("sid", x_0, student))


def expanded(
    divergence: FDivergence,
    x_t: Tensor,
    *,
    teacher_score: Tensor,
    student_score: Tensor,
    conditional_score: Tensor,
    log_ratio: Tensor,
    parts: Sequence[str] = PARTS,
    detach_ratio: bool = False,
) -> Tensor:
    """Surrogate [B] of a slice of any f-divergence's expansion over noise levels: E_q[F(r) |gap|^2], F = r^2 f''(r).

    log_ratio [B] = log p_t - log q_t at x_t (a discriminator's logit), with its gradient in x_t, or that of the scores by
    `with_score_gradient`. D_f(p_0, q_0) is the integral of half the slice d(sigma^2), and D_f at the largest sigma; a
    slice's value to watch is the mean of divergence.score_weight(log_ratio) * fisher(...). The gradient is the sum of
    three parts, each there if named in `parts`:
        "score": of -2 F gap . (student_score - conditional_score), through x_t everywhere, in r too
        "ratio": r^2 F''(r) |gap|^2 gap . dx_t, the coefficient detached
        "sampling": (F - r F')(r), detached, times the gradient of |gap|^2 through x_t
    For ForwardKL the last two vanish; for ReverseKL F = 1, and SIM and SiD are its score part alone.
    detach_ratio: no gradient through r in the score part, as the released code does; a wrong gradient unless F is constant.
    Source: Uni-Instruct, arXiv 2505.20755; the parts re-derived, since the paper's statement lacks the third for ReverseKL.
    """
    gap = _gap("expanded", teacher_score, student_score, conditional_score=conditional_score, x_t=x_t)
    if log_ratio.shape != gap.shape[:1]:
        raise ModelError(
            f"expanded needs one log-ratio a sample, [{len(gap)}], got {list(log_ratio.shape)}. Average a map of logits first."
        )
    if unknown := sorted(set(parts) - set(PARTS)):
        raise RecipeError(f"expanded knows the parts {', '.join(PARTS)}, got {', '.join(unknown)}.")
    u = log_ratio.detach() if detach_ratio else log_ratio
    value = torch.zeros_like(log_ratio)
    if "score" in parts:
        value = value - 2 * divergence.curvature(u) * _inner(gap, _gap("expanded", conditional_score, student_score))
    ratio, sampling = _coefficients(divergence, log_ratio.detach())
    if "ratio" in parts:
        value = value + _inner(_wide(ratio * _inner(gap, gap), gap).detach() * gap.detach(), x_t)
    if "sampling" in parts:
        value = value + sampling * _inner(gap, gap)
    return value


def with_score_gradient(log_ratio: Tensor, x_t: Tensor, *, teacher_score: Tensor, student_score: Tensor) -> Tensor:
    """log_ratio [B] in value, with the gradient that log p_t - log q_t has in x_t: teacher_score - student_score.

    For ratios from a discriminator, whose own gradient is no difference of scores, or costs a backward pass.
    """
    gap = _gap("with_score_gradient", teacher_score, student_score, x_t=x_t).detach()
    return log_ratio.detach() - _inner(gap, x_t - x_t.detach())


def _coefficients(divergence: FDivergence, u: Tensor) -> tuple[Tensor, Tensor]:
    """r^2 F'' and F - r F' of the weight F at r = e^u. With G(u) = F(e^u): G'' - G' and G - G', taken in float64."""
    wide = u.double()
    first = torch.func.grad(lambda x: divergence.curvature(x).sum())
    second = torch.func.grad(lambda x: first(x).sum())
    slope = first(wide)
    dtype = torch.promote_types(u.dtype, torch.float32)
    return (second(wide) - slope).to(dtype), (divergence.curvature(wide) - slope).to(dtype)


def _gap(name: str, teacher: Tensor, student: Tensor, **others: Tensor) -> Tensor:
    """student - teacher, after a look at all shapes: what broadcasts would be summed without a word."""
    for which, x in {"teacher": teacher, **others}.items():
        if x.shape != student.shape:
            raise ModelError(
                f"{name} compares scores of one shape [B, ...], got {which} {list(x.shape)} and student "
                f"{list(student.shape)}."
            )
    dtype = torch.promote_types(torch.promote_types(teacher.dtype, student.dtype), torch.float32)
    return student.to(dtype) - teacher.to(dtype)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each sample, [B, ...] -> [B]."""
    return (a * b).flatten(1).sum(1)


def _wide(values_B: Tensor, like: Tensor) -> Tensor:
    return values_B.view(-1, *[1] * (like.dim() - 1))

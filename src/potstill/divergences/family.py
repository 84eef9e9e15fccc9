"""f-divergences between a teacher p and a student q, as small frozen objects.

    D(p, q) = sum_v q_v f(r_v),   r = p / q,   log_ratio = log p - log q,   f convex, f(1) = 0.

Log-probabilities [*P, V] go in, one value in nats per position [*P] comes out, never reduced. The direction is in the
name: forward KL = KL(p || q), covers modes; reverse KL = KL(q || p), seeks modes. P positions (any leading shape),
V outcomes.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor

from potstill.contracts.errors import ModelError, RecipeError
from potstill.contracts.spec import Part

INF = math.inf


class FDivergence:
    """Base of the family. A member is a frozen dataclass with a generator `f`; all else follows from it.

    Members override `_entry` where q f(p / q) has a form that neither overflows nor cancels, and the two costs at the
    border where they are known in closed form.
    """

    def f(self, log_ratio: Tensor) -> Tensor:
        """The generator at r = exp(log_ratio), elementwise."""
        raise NotImplementedError

    @property
    def at_zero(self) -> float:
        """f(0): the cost of a unit of student mass where the teacher has none. Read off numerically unless given."""
        return float(self._seen_at_zero())

    @property
    def at_infinity(self) -> float:
        """lim f(r) / r: the cost of a unit of teacher mass where the student has none."""
        return float(self._seen_at_infinity())

    def _seen_at_zero(self) -> Tensor:
        return _limit(self.f(-_FAR))

    def _seen_at_infinity(self) -> Tensor:
        return _limit(self.f(_FAR) / _FAR.exp())

    def _entry(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        """q f(p / q) where both are positive. Elsewhere what it is does not matter, and log_ratio is 0; the logarithms,
        which may be -inf there, go through exp alone."""
        return log_q.exp() * self.f(log_ratio)

    def _pull(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        """The gradient of the same in log q, -q f*(f'(r)), for members that have it in closed form."""
        raise NotImplementedError

    _pulls: ClassVar[bool] = False  # whether `_pull` speaks of this very class's entries

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        first = next(c for c in cls.__mro__ if "_pull" in vars(c))
        rivals = [c for c in cls.__mro__ for name in ("f", "_entry", "entries") if name in vars(c)]
        cls._pulls = first is not FDivergence and all(issubclass(first, c) for c in rivals)

    def entries(self, *, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        """The contributions q f(p / q) of the single outcomes, [*P, V]. They may be negative; their sum is not."""
        return self._entries(_inside(type(self).__name__, teacher_logp, student_logp))

    def _entries(self, at: "_Inside") -> Tensor:
        values = self._entry(at.log_p, at.log_q, at.log_ratio).masked_fill(at.border, 0.0)
        zero, infinity = self._costs()
        values = _charge(values, at.log_q, at.only_q, zero)
        return _charge(values, at.log_p, at.only_p, infinity)

    def entries_and_pull(self, *, teacher_logp: Tensor, student_logp: Tensor) -> tuple[Tensor, Tensor]:
        """`entries`, and their gradient in the student's log-probabilities, -q f*(f'(r)), [*P, V] each, detached.

        In one pass and with the same exponentials for members with a `_pull`, by autograd for the others.
        """
        if not self._pulls:
            values, back = cast(
                Any,
                torch.func.vjp(lambda log_q: self.entries(teacher_logp=teacher_logp, student_logp=log_q), student_logp),
            )
            return values, back(torch.ones_like(values))[0]
        at = _inside(type(self).__name__, teacher_logp, student_logp)
        pull = self._pull(at.log_p, at.log_q, at.log_ratio).masked_fill(at.border, 0.0)
        zero, _ = self._costs()
        unpaid = 0.0 if isinstance(zero, float) and math.isinf(zero) else zero  # an infinite cost has no slope
        return self._entries(at), _charge(pull, at.log_q, at.only_q, unpaid)

    def _costs(self) -> tuple[float | Tensor, float | Tensor]:
        """The two costs at the border. Those that are read off stay tensors, which a compiler can trace."""
        member, base = type(self), FDivergence
        zero = self._seen_at_zero() if member.at_zero is base.at_zero else self.at_zero
        return zero, self._seen_at_infinity() if member.at_infinity is base.at_infinity else self.at_infinity

    def nonnegative_entries(self, *, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        """The entries of the generator f(r) - f'(1) (r - 1), [*P, V]: the same sum of normalised rows, none negative."""
        values = self.entries(teacher_logp=teacher_logp, student_logp=student_logp)
        return values - self._slope() * (teacher_logp.to(values.dtype).exp() - student_logp.to(values.dtype).exp())

    def __call__(self, *, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        """The divergence in nats, [*P, V] and [*P, V] -> [*P], in float32 or better.

        Non-negative for normalised rows; +inf where the mathematics says so. Gradients are finite where the value is.
        """
        return self.entries(teacher_logp=teacher_logp, student_logp=student_logp).sum(-1)

    def score_weight(self, log_ratio: Tensor) -> Tensor:
        """r^2 f''(r), detached: the weight of the score difference in one-step diffusion (f-distill, arXiv 2502.15681)."""
        return self.curvature(log_ratio.detach())

    def curvature(self, log_ratio: Tensor) -> Tensor:
        """r^2 f''(r), elementwise and differentiable.

        With F(u) = f(e^u) it is F''(u) - F'(u); in float64, because the two cancel at large ratios.
        """
        second = torch.func.grad(lambda u: self._first(u).sum())
        u = log_ratio.double()
        return (second(u) - self._first(u)).to(torch.promote_types(log_ratio.dtype, torch.float32))

    def slope(self, log_ratio: Tensor) -> Tensor:
        """f'(r), elementwise and differentiable; the gradient law d D / d log p_v = p_v f'(r_v).

        With F(u) = f(e^u) it is e^-u F'(u), in float64. At a kink (TotalVariation at r = 1) one of the subgradients.
        """
        u = log_ratio.double()
        return (self._first(u) * (-u).exp()).to(torch.promote_types(log_ratio.dtype, torch.float32))

    def conjugate_at(self, log_ratio: Tensor) -> Tensor:
        """f*(f'(r)) = r f'(r) - f(r), elementwise and differentiable: the convex conjugate f*(t) = max_r (r t - f(r)) at
        the slope t = f'(r), without solving for r. With F(u) = f(e^u) it is F'(u) - F(u); at r = 0 it is -f(0).

        The gradient law d D / d log q_v = -q_v f*(f'(r_v)), so that -f*(f'(r)) log q of a token sampled from q (the first
        factor detached) has the divergence's gradient on average. And the variational form
        D = E_p f'(r) - E_q f*(f'(r)), which any other r only lowers (f-GAN, arXiv 1606.00709, Eq. 4).
        """
        u = log_ratio.double()
        never = u == -INF
        inside = u.masked_fill(never, 0.0)
        value = (self._first(inside) - self.f(inside)).masked_fill(never, -self.at_zero)
        return value.to(torch.promote_types(log_ratio.dtype, torch.float32))

    def _first(self, u: Tensor) -> Tensor:
        """F'(u) = r f'(r)."""
        return torch.func.grad(lambda u: self.f(u).sum())(u)

    def estimate(self, log_ratio: Tensor, kind: Literal["k1", "k2", "k3"] = "k3") -> Tensor:
        """A detached metric on tokens sampled from the student q; its mean over them estimates this divergence.

        From D = E_q f(r): k1 = f(r), unbiased; k3 = f(r) - f'(1) (r - 1), unbiased and never negative;
        k2 = f''(1) log_ratio^2 / 2, right to second order near p = q. For ReverseKL these are the usual -log r,
        (log r)^2 / 2 and r - 1 - log r. Teacher mass where q = 0 is never sampled, so never counted.
        Not a loss: differentiated, k1 of the reverse KL has zero expected gradient, and k3 has the forward KL's.
        """
        return self._estimate(log_ratio.detach(), kind)

    def _estimate(self, log_ratio: Tensor, kind: str) -> Tensor:
        log_ratio = promoted(log_ratio)
        one_of(self, "kind", kind, ("k1", "k2", "k3"))
        if kind == "k2":
            curvature = float(self.score_weight(torch.zeros((), dtype=torch.float64)))
            if curvature == 0.0:
                raise RecipeError(f"{type(self).__name__} has no second-order estimate k2. Use k1 or k3.")
            return curvature * log_ratio.square() / 2
        never = log_ratio == -INF  # the teacher gives the sampled token no mass
        inside = log_ratio.masked_fill(never, 0.0)
        slope = self._slope() if kind == "k3" else torch.zeros(())
        return (self.f(inside) - slope * torch.expm1(inside)).masked_fill(never, self.at_zero + slope)

    def _slope(self) -> Tensor:
        """f'(1), a float64 scalar."""
        return self.slope(torch.zeros((), dtype=torch.float64))


Part(FDivergence)  # recipes write a combinator's members by name too


@dataclass(frozen=True)
class ForwardKL(FDivergence):
    """KL(p || q) = sum p log(p / q): covers the teacher's modes. +inf where q = 0 < p."""

    at_zero: ClassVar[float] = 0.0
    at_infinity: ClassVar[float] = INF

    def f(self, log_ratio: Tensor) -> Tensor:
        return log_ratio.exp() * log_ratio

    def _entry(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        return log_p.exp() * log_ratio

    def _pull(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        return -log_p.exp()


@dataclass(frozen=True)
class ReverseKL(FDivergence):
    """KL(q || p) = sum q log(q / p): seeks a teacher's mode. +inf where p = 0 < q."""

    at_zero: ClassVar[float] = INF
    at_infinity: ClassVar[float] = 0.0

    def f(self, log_ratio: Tensor) -> Tensor:
        return -log_ratio

    def _entry(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        return -log_q.exp() * log_ratio

    def _pull(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        return log_q.exp() * (1 - log_ratio)


@dataclass(frozen=True)
class JensenShannon(FDivergence):
    """w KL(p || m) + (1 - w) KL(q || m), m = w p + (1 - w) q, w = teacher_share.

    Range 0 to the entropy of w (log 2 at one half). Tends to 0 at both ends of w.
    Source: GKD, arXiv 2306.13649, whose beta is our teacher_share.
    """

    teacher_share: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 < self.teacher_share < 1.0:
            raise RecipeError(
                f"JensenShannon.teacher_share must lie strictly between 0 and 1, got {self.teacher_share}. "
                "At both ends it is 0: for a pure KL write ForwardKL (p || q) or ReverseKL (q || p)."
            )

    @property
    def at_zero(self) -> float:
        return -(1 - self.teacher_share) * math.log1p(-self.teacher_share)

    @property
    def at_infinity(self) -> float:
        return -self.teacher_share * math.log(self.teacher_share)

    def f(self, log_ratio: Tensor) -> Tensor:
        w, log_m = self.teacher_share, _log_mix(log_ratio, self.teacher_share)
        return w * log_ratio.exp() * (log_ratio - log_m) - (1 - w) * log_m

    def _entry(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        w, log_m = self.teacher_share, _log_mix(log_ratio, self.teacher_share)  # log m - log q
        return w * log_p.exp() * (log_ratio - log_m) - (1 - w) * log_q.exp() * log_m

    def _pull(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        return (self.teacher_share - 1) * log_q.exp() * _log_mix(log_ratio, self.teacher_share)


@dataclass(frozen=True)
class SkewForwardKL(FDivergence):
    """KL(p || alpha p + (1 - alpha) q), at most log(1 / alpha). alpha = 0 is ForwardKL.

    Source: DistiLLM, arXiv 2402.03898.
    """

    alpha: float = 0.1
    at_zero: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        _check_skew(self, self.alpha)

    @property
    def at_infinity(self) -> float:
        return -_log(self.alpha)

    def f(self, log_ratio: Tensor) -> Tensor:
        return log_ratio.exp() * (log_ratio - _log_mix(log_ratio, self.alpha))

    def _entry(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        return log_p.exp() * (log_ratio - _log_mix(log_ratio, self.alpha))

    def _pull(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        return (self.alpha - 1) * log_p.exp() * (-_log_mix(log_ratio, self.alpha)).exp()


@dataclass(frozen=True)
class SkewReverseKL(FDivergence):
    """KL(q || (1 - alpha) p + alpha q), at most log(1 / alpha). alpha = 0 is ReverseKL.

    Source: DistiLLM, arXiv 2402.03898.
    """

    alpha: float = 0.1
    at_infinity: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        _check_skew(self, self.alpha)

    @property
    def at_zero(self) -> float:
        return -_log(self.alpha)

    def f(self, log_ratio: Tensor) -> Tensor:
        return -_log_mix(log_ratio, 1 - self.alpha)

    def _pull(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        log_m = _log_mix(log_ratio, 1 - self.alpha)  # log m - log q
        return log_q.exp() * (1 - (_log(self.alpha) - log_m).exp() - log_m)


@dataclass(frozen=True)
class Alpha(FDivergence):
    """(sum p^a q^(1-a) - 1) / (a (a - 1)), a = alpha: ForwardKL at 1, ReverseKL at 0, 4 SquaredHellinger at 1/2.

    The generator carries the linear term that makes it non-negative, (r^a - 1 - a (r - 1)) / (a (a - 1)), so that it is
    continuous in a; for normalised rows the sums are the same.
    """

    alpha: float = 0.5

    @property
    def at_zero(self) -> float:
        return 1 / self.alpha if self.alpha > 0 else INF

    @property
    def at_infinity(self) -> float:
        return 1 / (1 - self.alpha) if self.alpha < 1 else INF

    def f(self, log_ratio: Tensor) -> Tensor:
        return self._generator(log_ratio, self.alpha)

    @staticmethod
    def _generator(u: Tensor, a: float) -> Tensor:
        if a == 0.0:
            return torch.expm1(u) - u
        if a == 1.0:
            return u * u.exp() - torch.expm1(u)
        return (torch.expm1(a * u) - a * torch.expm1(u)) / (a * (a - 1))

    def _entry(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        # Measured from the larger of p and q: D_a(p, q) = D_{1-a}(q, p), and neither exponential overflows.
        above = log_ratio > 0
        from_q = log_q.exp() * self._generator(log_ratio.masked_fill(above, 0.0), self.alpha)
        from_p = log_p.exp() * self._generator((-log_ratio).masked_fill(~above, 0.0), 1 - self.alpha)
        return torch.where(above, from_p, from_q)

    def _pull(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        above, a = log_ratio > 0, self.alpha
        below_u, above_u = log_ratio.masked_fill(above, 0.0), (-log_ratio).masked_fill(~above, 0.0)
        if a == 0.0:
            return torch.where(above, log_p.exp() * (-log_ratio).exp(), log_q.exp()) * -log_ratio
        from_q = -log_q.exp() * torch.expm1(a * below_u)
        from_p = log_p.exp() * (torch.expm1(above_u) - torch.expm1((1 - a) * above_u))
        return torch.where(above, from_p, from_q) / a


@dataclass(frozen=True)
class TotalVariation(FDivergence):
    """1/2 sum |p - q|, between 0 and 1. Its score weight is 0: the generator has no curvature."""

    at_zero: ClassVar[float] = 0.5
    at_infinity: ClassVar[float] = 0.5

    def f(self, log_ratio: Tensor) -> Tensor:
        return torch.expm1(log_ratio).abs() / 2

    def _entry(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        return (log_p.exp() - log_q.exp()).abs() / 2

    def _pull(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        p, q = log_p.exp(), log_q.exp()
        return (q - p).sign() * q / 2


@dataclass(frozen=True)
class SquaredHellinger(FDivergence):
    """1 - sum sqrt(p q) = 1/2 sum (sqrt p - sqrt q)^2, between 0 and 1. The second form is the one computed."""

    at_zero: ClassVar[float] = 0.5
    at_infinity: ClassVar[float] = 0.5

    def f(self, log_ratio: Tensor) -> Tensor:
        return torch.expm1(log_ratio / 2).square() / 2

    def _entry(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        above = log_ratio > 0  # from the larger of both, so that nothing underflows before it must
        larger = torch.where(above, log_p, log_q).exp()
        return larger * torch.expm1(torch.where(above, -log_ratio, log_ratio) / 2).square() / 2

    def _pull(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        above = log_ratio > 0
        larger = torch.where(above, log_p, log_q).exp()
        less = torch.expm1(torch.where(above, -log_ratio, log_ratio) / 2)  # sqrt(smaller / larger) - 1
        return larger / 2 * torch.where(above, less * (1 + less), -less)


@dataclass(frozen=True)
class PearsonChi2(FDivergence):
    """sum (p - q)^2 / q. +inf where q = 0 < p."""

    at_zero: ClassVar[float] = 1.0
    at_infinity: ClassVar[float] = INF

    def f(self, log_ratio: Tensor) -> Tensor:
        return torch.expm1(log_ratio).square()

    def _entry(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        return _chi2(log_p, log_q, log_ratio)

    def _pull(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        above = log_ratio > 0
        scale = torch.where(above, log_p + log_ratio, log_q).exp()  # the larger square over q
        return torch.where(above, 1.0, -1.0) * scale * torch.expm1(-2 * log_ratio.abs())


@dataclass(frozen=True)
class NeymanChi2(FDivergence):
    """sum (p - q)^2 / p. +inf where p = 0 < q."""

    at_zero: ClassVar[float] = INF
    at_infinity: ClassVar[float] = 1.0

    def f(self, log_ratio: Tensor) -> Tensor:
        return (log_ratio / 2).sinh().square() * 4  # (1 - r)^2 / r

    def _entry(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        return _chi2(log_q, log_p, -log_ratio)

    def _pull(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        above = log_ratio > 0  # 2 q (q - p) / p
        scale = torch.where(above, log_q, log_q - log_ratio).exp()
        return torch.where(above, 2.0, -2.0) * scale * torch.expm1(-log_ratio.abs())


@dataclass(frozen=True)
class Jeffreys(FDivergence):
    """KL(p || q) + KL(q || p) = sum (p - q) log(p / q). +inf where exactly one of p and q is 0."""

    at_zero: ClassVar[float] = INF
    at_infinity: ClassVar[float] = INF

    def f(self, log_ratio: Tensor) -> Tensor:
        return torch.expm1(log_ratio) * log_ratio

    def _entry(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        return (log_p.exp() - log_q.exp()) * log_ratio

    def _pull(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        return log_q.exp() * (1 - log_ratio) - log_p.exp()


@dataclass(frozen=True)
class SoftenedReverseKL(FDivergence):
    """sum (p + q) log((p + q) / (2 p)) = 2 KL((p + q) / 2 || p). +inf where p = 0 < q.

    Source: f-distill, arXiv 2502.15681.
    """

    at_zero: ClassVar[float] = INF
    at_infinity: ClassVar[float] = -math.log(2)

    def f(self, log_ratio: Tensor) -> Tensor:
        return (log_ratio.exp() + 1) * (_log_mix(log_ratio, 0.5) - log_ratio)

    def _entry(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        return (log_p.exp() + log_q.exp()) * (_log_mix(log_ratio, 0.5) - log_ratio)

    def _pull(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        return log_q.exp() * (1 + _log_mix(log_ratio, 0.5) - log_ratio)


@dataclass(frozen=True)
class Mixture(FDivergence):
    """weight * first + (1 - weight) * second. A weight [*P] given at the call replaces the number."""

    first: FDivergence = ForwardKL()
    second: FDivergence = ReverseKL()
    weight: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.weight <= 1.0:
            raise RecipeError(f"Mixture.weight must lie between 0 and 1, got {self.weight}.")

    @property
    def at_zero(self) -> float:
        return _mixed(self.weight, self.first.at_zero, self.second.at_zero)

    @property
    def at_infinity(self) -> float:
        return _mixed(self.weight, self.first.at_infinity, self.second.at_infinity)

    def f(self, log_ratio: Tensor) -> Tensor:
        return self.weight * self.first.f(log_ratio) + (1 - self.weight) * self.second.f(log_ratio)

    def entries(self, *, teacher_logp: Tensor, student_logp: Tensor, weight: Tensor | None = None) -> Tensor:
        first = self.first.entries(teacher_logp=teacher_logp, student_logp=student_logp)
        second = self.second.entries(teacher_logp=teacher_logp, student_logp=student_logp)
        if weight is None:
            weight = first.new_full((), self.weight)
        elif weight.dim() and weight.shape != first.shape[:-1]:
            raise ModelError(
                f"Mixture: the weight has shape {list(weight.shape)}, but the positions are {list(first.shape[:-1])}. "
                "Give one weight a position, or a scalar."
            )
        return _blend(first, second, weight)

    def __call__(self, *, teacher_logp: Tensor, student_logp: Tensor, weight: Tensor | None = None) -> Tensor:
        return self.entries(teacher_logp=teacher_logp, student_logp=student_logp, weight=weight).sum(-1)


class _Gated(FDivergence):
    """Base of mixtures whose weight depends on the position: gate * high + (1 - gate) * low."""

    high: FDivergence
    low: FDivergence

    def gate(self, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        """The weight of `high`, [*P], detached."""
        raise NotImplementedError

    def f(self, log_ratio: Tensor) -> Tensor:
        raise _no_generator(self, "its mixture depends on the position")

    def entries(self, *, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        pair = {"teacher_logp": teacher_logp, "student_logp": student_logp}
        return _blend(self.high.entries(**pair), self.low.entries(**pair), self.gate(teacher_logp, student_logp))

    def nonnegative_entries(self, *, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        pair = {"teacher_logp": teacher_logp, "student_logp": student_logp}
        high, low = self.high.nonnegative_entries(**pair), self.low.nonnegative_entries(**pair)
        return _blend(high, low, self.gate(teacher_logp, student_logp))


@dataclass(frozen=True)
class EntropyGated(_Gated):
    """Per position g * high + (1 - g) * low with g = min(H(p) / log(levels), 1), detached, H the teacher's entropy.

    Forward KL where the teacher is unsure (it covers), reverse KL where it is certain (it seeks). The gate is
    EdgeRazor's (arXiv 2605.04062, k = levels = 16), which takes one mean over the batch: for that, give `Mixture` its
    weight.
    """

    high: FDivergence = ForwardKL()
    low: FDivergence = ReverseKL()
    levels: float = 16.0

    def __post_init__(self) -> None:
        if not self.levels > 1.0:
            raise RecipeError(f"EntropyGated.levels must be above 1, got {self.levels}.")

    def gate(self, teacher_logp: Tensor, student_logp: Tensor | None = None) -> Tensor:
        return (entropy(teacher_logp.detach()) / math.log(self.levels)).clamp(0.0, 1.0)


@dataclass(frozen=True)
class Adaptive(_Gated):
    """AKL: g * high + (1 - g) * low per position, g = gap(head) / (gap(head) + gap(tail)), detached, gap = sum |p - q|.

    The head is the teacher's likeliest outcomes, as few as reach `head_mass`: forward KL weighs by how wrong the student
    is there, reverse KL by how wrong it is in the tail. Both are over all outcomes. Not of f-form, and g depends on q,
    so no convexity; still 0 exactly at p = q, where g, 0 / 0, is 0.
    Source: AKL, arXiv 2404.02657 (mu = head_mass = 0.5), as STAR states it (arXiv 2602.03022). Outcomes as likely as the
    last of the head belong to it as well, so that the order of the vocabulary is free; code that leaves the outcome
    which crosses `head_mass` to the tail differs. Sorts the teacher's row.
    """

    high: FDivergence = ForwardKL()
    low: FDivergence = ReverseKL()
    head_mass: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 < self.head_mass < 1.0:
            raise RecipeError(
                f"Adaptive.head_mass must lie strictly between 0 and 1, got {self.head_mass}. "
                "For one KL alone write ForwardKL (p || q) or ReverseKL (q || p)."
            )

    @torch.no_grad()
    def gate(self, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        p, q = (x.exp() for x in _pair("Adaptive", teacher_logp, student_logp))
        ordered = p.sort(-1, descending=True).values
        before = ordered.cumsum(-1) - ordered
        last = ordered.masked_fill(before >= self.head_mass, INF).amin(-1, keepdim=True)
        gap = (p - q).abs()
        total = gap.sum(-1)
        return gap.masked_fill(p < last, 0.0).sum(-1) / total.masked_fill(total == 0, 1.0)


@dataclass(frozen=True)
class Clipped(FDivergence):
    """Nothing counts for more than `limit` nats: sum_v min(entry_v, limit), or min(sum_v entry_v, limit).

    per "entry": of the single outcomes (OPSD, arXiv 2601.18734, tau = 0.05). The entries clipped are those of the
    non-negative generator f(r) - f'(1) (r - 1), so that the value stays 0 at p = q and positive elsewhere. `raw=True`
    clips q f(r) itself, as OPSD's code does: its entries are signed for the KLs, so the value can fall below 0 and the
    minimum need not be at p = q.
    per "position": of the whole value (UniSD, arXiv 2605.06597, kappa = 10); a position above it has no gradient.
    An infinite limit is the divergence itself.
    """

    divergence: FDivergence = ForwardKL()
    limit: float = 0.05
    raw: bool = False
    per: Literal["entry", "position"] = "entry"

    def __post_init__(self) -> None:
        if not self.limit > 0.0:
            raise RecipeError(f"Clipped.limit must be positive (nats), got {self.limit}.")
        one_of(self, "per", self.per, ("entry", "position"))
        if self.raw and self.per == "position":
            raise RecipeError("Clipped.raw is about single entries, and per 'position' clips their sum. Leave raw out.")

    def f(self, log_ratio: Tensor) -> Tensor:
        raise _no_generator(self, "clipping acts on q f(r), not on f")

    def entries(self, *, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        pair = {"teacher_logp": teacher_logp, "student_logp": student_logp}
        if self.per == "entry":
            part = self.divergence
            return (part.entries(**pair) if self.raw else part.nonnegative_entries(**pair)).clamp_max(self.limit)
        values = self.divergence.entries(**pair)
        over = values.sum(-1, keepdim=True) > self.limit
        return torch.where(over, self.limit / values.shape[-1], values)  # constants that sum to the limit


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) of log-probabilities, [*P, V] and [*P, V] -> [*P], nats. Outcomes with a = 0 count 0."""
    return ForwardKL()(teacher_logp=log_a, student_logp=log_b)


def promoted(x: Tensor) -> Tensor:
    """In float32 or better: what every value here is computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def entropy(logp: Tensor) -> Tensor:
    """-sum p log p, [*P, V] -> [*P], nats, in float32 or better. Outcomes with p = 0 count 0."""
    logp = promoted(logp)
    return -(logp.exp() * logp.masked_fill(logp == -INF, 0.0)).sum(-1)


def one_of(part: object, option: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not among the allowed words."""
    if value not in allowed:
        raise RecipeError(f"{type(part).__name__}.{option} must be one of {', '.join(allowed)}, got {value!r}.")


_FAR = torch.tensor([300.0, 600.0], dtype=torch.float64)  # two log-ratios at the edge of what float64 can hold


def _limit(values: Tensor) -> Tensor:
    """The limit of a generator seen at two far points: their value when they agree, else +inf."""
    near, far = values
    far = far.masked_fill(far.abs() <= 1e-12, 0.0)
    return far.masked_fill(~torch.isclose(near, far, rtol=1e-9, atol=1e-12), INF)


def _pair(name: str, teacher_logp: Tensor, student_logp: Tensor) -> tuple[Tensor, Tensor]:
    if teacher_logp.shape != student_logp.shape:
        raise ModelError(
            f"{name} compares equal shapes [*P, V], got teacher {list(teacher_logp.shape)} and student "
            f"{list(student_logp.shape)}. Bring both to the same positions and the same vocabulary first."
        )
    dtype = torch.promote_types(torch.promote_types(teacher_logp.dtype, student_logp.dtype), torch.float32)
    return teacher_logp.to(dtype), student_logp.to(dtype)


class _Inside(NamedTuple):
    """A pair of rows, and where each of them is 0; log_ratio is 0 at the border."""

    log_p: Tensor
    log_q: Tensor
    log_ratio: Tensor
    border: Tensor
    only_p: Tensor
    only_q: Tensor


def _inside(name: str, teacher_logp: Tensor, student_logp: Tensor) -> _Inside:
    """-inf must reach no arithmetic: 0 * inf is NaN, in the value or in the gradient."""
    log_p, log_q = _pair(name, teacher_logp, student_logp)
    no_p, no_q = log_p == -INF, log_q == -INF
    border = no_p | no_q
    log_ratio = log_p.masked_fill(border, 0.0) - log_q.masked_fill(border, 0.0)
    return _Inside(log_p, log_q, log_ratio, border, no_q & ~no_p, no_p & ~no_q)


def _charge(values: Tensor, logp: Tensor, where: Tensor, cost: float | Tensor) -> Tensor:
    """Set values to cost * exp(logp) at `where`; an infinite cost stays infinite when exp underflows."""
    if isinstance(cost, Tensor):
        infinite = cost == INF
        values = _charge_by(values, logp, where, cost.masked_fill(infinite, 0.0))
        return values.masked_fill(where & infinite, INF)
    if cost == 0.0:
        return values
    if math.isinf(cost):
        return values.masked_fill(where, cost)
    return _charge_by(values, logp, where, cost)


def _charge_by(values: Tensor, logp: Tensor, where: Tensor, cost: float | Tensor) -> Tensor:
    return torch.where(where, cost * logp.exp(), values)


def _blend(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """weight * first + (1 - weight) * second, [*P, V] with a weight [*P]; a part of weight 0 is absent, even if inf."""
    w = weight.to(first.dtype).unsqueeze(-1)
    return (w * first).masked_fill(w == 0, 0.0) + ((1 - w) * second).masked_fill(w == 1, 0.0)


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -INF


def _log_mix(u: Tensor, w: float) -> Tensor:
    """log(w e^u + 1 - w): exactly 0 at u = 0, and no overflow far from it."""
    if w in (0.0, 1.0):
        return w * u
    above = u > 0  # measured from the larger of both, so that one exponential serves near 0 and far from it
    below = torch.expm1(torch.where(above, -u, u))
    return torch.where(above, u, 0.0) + torch.log1p(torch.where(above, (1 - w) * below, w * below))


def _chi2(log_a: Tensor, log_b: Tensor, u: Tensor) -> Tensor:
    """(a - b)^2 / b, u = log(a / b), factored by the larger of both so that nothing overflows before it must."""
    scale = torch.where(u > 0, log_a + u, log_b)
    return scale.exp() * torch.expm1(torch.where(u > 0, -u, u)).square()


def _check_skew(part: object, alpha: float) -> None:
    if not 0.0 <= alpha < 1.0:
        raise RecipeError(
            f"{type(part).__name__}.alpha must lie in [0, 1), got {alpha}. 0 is the KL, at 1 it vanishes."
        )


def _mixed(w: float, first: float, second: float) -> float:
    return (w * first if w else 0.0) + ((1 - w) * second if w < 1 else 0.0)


def _no_generator(part: object, why: str) -> RecipeError:
    return RecipeError(
        f"{type(part).__name__} has no generator f: {why}. "
        "Score weights, conjugates and estimates need a plain member, such as ReverseKL."
    )

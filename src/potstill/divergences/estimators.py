"""What to differentiate at the positions of a rollout: the exact divergence, or an estimate from the sampled token.

One axis: `estimator.per_position(teacher_logp, student_logp, tokens_N)` gives values [N] whose gradient is that of the
divergence at each state, exactly or on average over tokens sampled from the student. Nothing here sees through the
sampling: the effect of a token on later states is not counted. N positions, V vocabulary; p teacher, q student.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from potstill.contracts.errors import RecipeError, SignalError
from potstill.contracts.signals import FullLogits, Signal, TokenLogp
from potstill.contracts.spec import Part
from potstill.divergences.family import FDivergence, JensenShannon, ReverseKL, kl, one_of, promoted
from potstill.divergences.supports import Full, Support, TopK


class Estimator:
    """Base. `needs` is the least signal that the teacher must give; `on_policy` says that the tokens must be sampled
    from the student (or reweighted), since only their mean means something."""

    on_policy: ClassVar[bool] = False

    @property
    def needs(self) -> type[Signal]:
        return FullLogits

    def per_position(
        self, teacher_logp: Tensor, student_logp: Tensor, tokens_N: Tensor, sampled_logp_N: Tensor | None = None
    ) -> Tensor:
        """Values [N] to differentiate, from rows of log-probabilities [N, V] at the states before `tokens_N`.

        sampled_logp_N: log-probabilities under the policy that sampled the tokens, where that is not the student now.
        """
        raise NotImplementedError


Part(Estimator)


@dataclass(frozen=True)
class Exact(Estimator):
    """The divergence over a support at the given states: no variance, whole rows. Tokens do not matter."""

    divergence: FDivergence = field(default_factory=ReverseKL)
    support: Support = field(default_factory=Full)

    def per_position(
        self, teacher_logp: Tensor, student_logp: Tensor, tokens_N: Tensor, sampled_logp_N: Tensor | None = None
    ) -> Tensor:
        teacher, student = self.support(teacher_logp=teacher_logp.detach(), student_logp=student_logp)
        return self.divergence(teacher_logp=teacher, student_logp=student)


@dataclass(frozen=True)
class SampledReverseKL(Estimator):
    """The gradient of KL(q || p) from one token sampled from q: -a_t log q(y_t), with a detached advantage a_t.

        r_t = log p(y_t) - log q(y_t),   a_t = r_t - b_t,   E_q[ -a_t grad log q(y_t) ] = grad KL(q || p)

    for any b_t that does not look at y_t (vOPD, arXiv 2605.07865):
    "none": b = 0. "full": b = -KL(q || p), the value of the state. "topk": the same of both rows renormalised on the
    student's k likeliest tokens; still unbiased, since the sampled token keeps its probability under all V.
    clip: lambda in (0, 1) bounds the reward below by log(lambda) / (1 - lambda); biased, and for baseline "none" only.
    exact_k: Rao-Blackwellised. The student's exact_k likeliest tokens enter with their expectation, whichever was
    sampled, and the sampled token only when it is another: -sum_top q_v a_v grad log q_v - [y not in top] a_y grad log q_y.
    Unbiased with every baseline; the noise left is that of the remainder, and V makes it the exact gradient.

    Tokens of another policy (an older student, the teacher) carry the ratio q / that policy, and the mean over that
    policy is the same gradient; the summed tokens of exact_k need none. Two bounds, both biased, of which at most one:
    ppo_clip: PPO's, beyond which a token has no gradient. max_ratio: truncated importance sampling, min(ratio, max_ratio)
    as a constant factor of the gradient; small for tokens that the other policy rarely says.

    Unbiased only for untruncated sampling at the temperature of the scored rows. With baseline "none" and exact_k 0
    the log-probabilities of the sampled tokens [N] do in place of rows [N, V].
    """

    on_policy: ClassVar[bool] = True
    baseline: Literal["none", "full", "topk"] = "none"
    k: int = 100
    clip: float | None = None
    ppo_clip: float | None = None
    max_ratio: float | None = None
    exact_k: int = 0

    def __post_init__(self) -> None:
        one_of(self, "baseline", self.baseline, ("none", "full", "topk"))
        if self.k < 1:
            raise RecipeError(f"{type(self).__name__}.k must be at least 1, got {self.k}.")
        if self.exact_k < 0:
            raise RecipeError(f"{type(self).__name__}.exact_k must not be negative, got {self.exact_k}.")
        if self.clip is not None and not 0.0 < self.clip < 1.0:
            raise RecipeError(f"{type(self).__name__}.clip must lie strictly between 0 and 1, got {self.clip}.")
        if self.clip is not None and self.baseline != "none":
            raise RecipeError(
                f"{type(self).__name__}.clip bounds the reward without a baseline; with baseline {self.baseline!r} it would "
                "make the advantage biased. Leave clip out, or take baseline 'none'."
            )
        if self.ppo_clip is not None and not self.ppo_clip > 0.0:
            raise RecipeError(f"{type(self).__name__}.ppo_clip must be positive, got {self.ppo_clip}.")
        if self.max_ratio is not None and not self.max_ratio > 0.0:
            raise RecipeError(f"{type(self).__name__}.max_ratio must be positive, got {self.max_ratio}.")
        if self.max_ratio is not None and self.ppo_clip is not None:
            raise RecipeError(f"{type(self).__name__} takes one bound on the ratio: leave ppo_clip or max_ratio out.")

    @property
    def needs(self) -> type[Signal]:
        return TokenLogp if self.baseline == "none" and not self.exact_k else FullLogits

    def _reward(self, log_ratio: Tensor) -> Tensor:
        """r, elementwise: minus what a unit of log q costs at this ratio, up to a constant."""
        return log_ratio if self.clip is None else log_ratio.clamp_min(math.log(self.clip) / (1 - self.clip))

    def _value(self, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        """E_q r of a state, [N]."""
        return -kl(student_logp, teacher_logp)

    @torch.no_grad()
    def advantage(self, teacher_logp: Tensor, student_logp: Tensor, tokens_N: Tensor | None = None) -> Tensor:
        """a_t [N], detached, in nats: positive where the teacher likes the sampled token better than the student does."""
        log_ratio = self._chosen(teacher_logp, tokens_N, "teacher") - self._chosen(student_logp, tokens_N, "student")
        return self._reward(log_ratio) - self._baseline(teacher_logp, student_logp)

    def _baseline(self, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        """b, [N] or a scalar 0."""
        if self.baseline == "none":
            return student_logp.new_zeros(())
        self._check_rows(f"baseline {self.baseline!r}", teacher_logp, student_logp)
        support = Full() if self.baseline == "full" else TopK(self.k, of="student", tail="renormalize")
        teacher, student = support(teacher_logp=teacher_logp, student_logp=student_logp)
        return self._value(teacher, student)

    def _summed(self, teacher_logp: Tensor, student_logp: Tensor, tokens_N: Tensor) -> tuple[Tensor, Tensor]:
        """(-sum of q_v a_v over the student's exact_k likeliest tokens [N], whether the sampled token is one of them)."""
        self._check_rows(f"exact_k {self.exact_k}", teacher_logp, student_logp)
        support = TopK(self.exact_k, of="student", tail="drop")
        ids = support.indices(teacher_logp=teacher_logp, student_logp=student_logp)
        log_p, log_q = support(teacher_logp=promoted(teacher_logp), student_logp=promoted(student_logp))
        with torch.no_grad():
            advantage = self._reward(log_p - log_q) - self._baseline(teacher_logp, student_logp).unsqueeze(-1)
            advantage = advantage.masked_fill(log_q == -math.inf, 0.0)  # nothing is there to be weighed
        return -(log_q.exp() * advantage).sum(-1), (ids == tokens_N.unsqueeze(-1)).any(-1)

    def surrogate(
        self,
        *,
        teacher_logp: Tensor,
        student_logp: Tensor,
        tokens_N: Tensor | None = None,
        sampled_logp_N: Tensor | None = None,
        extra_advantage_N: Tensor | None = None,
    ) -> Tensor:
        """Values [N] to minimise; only their gradient has a meaning. [N, V] rows, or [N] of the sampled tokens.

        extra_advantage_N is added to the advantage: that of a task's reward. With `sampled_logp_N` the gradient carries
        the importance ratio q / (policy that sampled).
        """
        advantage = self.advantage(teacher_logp, student_logp, tokens_N)
        chosen = self._chosen(student_logp, tokens_N, "student")
        summed: Tensor | float = 0.0
        if self.exact_k:
            summed, within = self._summed(teacher_logp, student_logp, cast(Tensor, tokens_N))
            advantage = advantage.masked_fill(within, 0.0)
        if extra_advantage_N is not None:
            advantage = advantage + extra_advantage_N.detach()
        if sampled_logp_N is None:
            return summed - advantage * chosen
        log_ratio = chosen - sampled_logp_N.detach()
        if self.max_ratio is not None:
            log_ratio = log_ratio - (log_ratio.detach() - math.log(self.max_ratio)).clamp_min(0.0)
        ratio = log_ratio.exp()
        if self.ppo_clip is None:
            return summed - advantage * ratio
        bounded = ratio.clamp(1 - self.ppo_clip, 1 + self.ppo_clip)
        return summed - torch.minimum(advantage * ratio, advantage * bounded)

    def per_position(
        self, teacher_logp: Tensor, student_logp: Tensor, tokens_N: Tensor, sampled_logp_N: Tensor | None = None
    ) -> Tensor:
        return self.surrogate(
            teacher_logp=teacher_logp, student_logp=student_logp, tokens_N=tokens_N, sampled_logp_N=sampled_logp_N
        )

    def _check_rows(self, option: str, teacher_logp: Tensor, student_logp: Tensor) -> None:
        if teacher_logp.dim() != 2 or student_logp.dim() != 2:
            raise SignalError(
                f"{type(self).__name__} with {option} needs rows [N, V] of teacher and student, got "
                f"{list(teacher_logp.shape)} and {list(student_logp.shape)}. "
                "With token log-probs only, take baseline 'none' and exact_k 0."
            )

    def _chosen(self, logp: Tensor, tokens_N: Tensor | None, whose: str) -> Tensor:
        """The sampled tokens' log-probabilities [N], in float32 or better."""
        logp = promoted(logp)
        if logp.dim() == 1:
            return logp
        if tokens_N is None or tokens_N.shape != logp.shape[:1]:
            got = None if tokens_N is None else list(tokens_N.shape)
            raise SignalError(
                f"{type(self).__name__}: the {whose}'s rows {list(logp.shape)} need tokens of shape {list(logp.shape[:1])}, "
                f"got {got}. Give the sampled tokens, one a row."
            )
        return logp.gather(-1, tokens_N.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class SampledDivergence(SampledReverseKL):
    """SampledReverseKL for any divergence with a generator f: only the reward differs.

        r_t = f*(f'(p / q)) at the sampled token,   E_q[ -(r_t - b_t) grad log q(y_t) ] = grad D(p, q)

    with f*(f'(.)) = `FDivergence.conjugate_at`; for ReverseKL it is log(p / q) - 1. ForwardKL has r_t = p / q, unbounded
    like every divergence that is infinite where q = 0 < p: heavy tails. Teacher mass where q = 0 is never sampled. No clip.
    """

    divergence: FDivergence = field(default_factory=JensenShannon)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip is not None:
            raise RecipeError(
                "SampledDivergence has no clip: its bound is on log-ratios. Take SampledReverseKL for it."
            )

    def _reward(self, log_ratio: Tensor) -> Tensor:
        return self.divergence.conjugate_at(log_ratio)

    def _value(self, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        log_p, log_q = promoted(teacher_logp), promoted(student_logp)
        never = log_q == -math.inf
        reward = self._reward(log_p.masked_fill(never, 0.0) - log_q.masked_fill(never, 0.0))
        return (log_q.exp() * reward).sum(-1)

"""What to differentiate at the positions of a rollout: the exact divergence, or an estimate from the sampled token.

One axis: `estimator.per_position(teacher_logp, student_logp, tokens_N)` gives values [N] whose gradient is that of the
divergence at each state, exactly or on average over tokens sampled from the student. Nothing here sees through the
sampling: the effect of a token on later states is not counted. N positions, V vocabulary; p teacher, q student.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from potstill.contracts.errors import RecipeError, SignalError
from potstill.contracts.signals import FullLogits, Signal, TokenLogp
from potstill.contracts.spec import Part
from potstill.divergences.family import FDivergence, ReverseKL, kl, one_of
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
    ppo_clip: with tokens of an older policy, PPO's bound on the importance ratio; None leaves it free (and unbiased).

    Unbiased only for untruncated sampling at the temperature of the scored rows. With baseline "none"
    the log-probabilities of the sampled tokens [N] do in place of rows [N, V].
    """

    on_policy: ClassVar[bool] = True
    baseline: Literal["none", "full", "topk"] = "none"
    k: int = 100
    clip: float | None = None
    ppo_clip: float | None = None

    def __post_init__(self) -> None:
        one_of(self, "baseline", self.baseline, ("none", "full", "topk"))
        if self.k < 1:
            raise RecipeError(f"SampledReverseKL.k must be at least 1, got {self.k}.")
        if self.clip is not None and not 0.0 < self.clip < 1.0:
            raise RecipeError(f"SampledReverseKL.clip must lie strictly between 0 and 1, got {self.clip}.")
        if self.clip is not None and self.baseline != "none":
            raise RecipeError(
                f"SampledReverseKL.clip bounds the reward without a baseline; with baseline {self.baseline!r} it would "
                "make the advantage biased. Leave clip out, or take baseline 'none'."
            )
        if self.ppo_clip is not None and not self.ppo_clip > 0.0:
            raise RecipeError(f"SampledReverseKL.ppo_clip must be positive, got {self.ppo_clip}.")

    @property
    def needs(self) -> type[Signal]:
        return TokenLogp if self.baseline == "none" else FullLogits

    @torch.no_grad()
    def advantage(self, teacher_logp: Tensor, student_logp: Tensor, tokens_N: Tensor | None = None) -> Tensor:
        """a_t [N], detached, in nats: positive where the teacher likes the sampled token better than the student does."""
        reward = self._chosen(teacher_logp, tokens_N, "teacher") - self._chosen(student_logp, tokens_N, "student")
        if self.clip is not None:
            reward = reward.clamp_min(math.log(self.clip) / (1 - self.clip))
        if self.baseline == "none":
            return reward
        if teacher_logp.dim() != 2 or student_logp.dim() != 2:
            raise SignalError(
                f"SampledReverseKL with baseline {self.baseline!r} needs rows [N, V] of teacher and student, got "
                f"{list(teacher_logp.shape)} and {list(student_logp.shape)}. "
                "With token log-probs only, take baseline 'none'."
            )
        support = Full() if self.baseline == "full" else TopK(self.k, of="student", tail="renormalize")
        teacher, student = support(teacher_logp=teacher_logp, student_logp=student_logp)
        return reward + kl(student, teacher)

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
        if extra_advantage_N is not None:
            advantage = advantage + extra_advantage_N.detach()
        chosen = self._chosen(student_logp, tokens_N, "student")
        if sampled_logp_N is None:
            return -advantage * chosen
        ratio = (chosen - sampled_logp_N.detach()).exp()
        if self.ppo_clip is None:
            return -advantage * ratio
        return -torch.minimum(advantage * ratio, advantage * ratio.clamp(1 - self.ppo_clip, 1 + self.ppo_clip))

    def per_position(
        self, teacher_logp: Tensor, student_logp: Tensor, tokens_N: Tensor, sampled_logp_N: Tensor | None = None
    ) -> Tensor:
        return self.surrogate(
            teacher_logp=teacher_logp, student_logp=student_logp, tokens_N=tokens_N, sampled_logp_N=sampled_logp_N
        )

    @staticmethod
    def _chosen(logp: Tensor, tokens_N: Tensor | None, whose: str) -> Tensor:
        """The sampled tokens' log-probabilities [N], in float32 or better."""
        logp = logp.to(torch.promote_types(logp.dtype, torch.float32))
        if logp.dim() == 1:
            return logp
        if tokens_N is None or tokens_N.shape != logp.shape[:1]:
            got = None if tokens_N is None else list(tokens_N.shape)
            raise SignalError(
                f"SampledReverseKL: the {whose}'s rows {list(logp.shape)} need tokens of shape {list(logp.shape[:1])}, "
                f"got {got}. Give the sampled tokens, one a row."
            )
        return logp.gather(-1, tokens_N.unsqueeze(-1)).squeeze(-1)

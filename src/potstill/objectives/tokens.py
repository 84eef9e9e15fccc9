"""Token distillation: the one step behind the language methods.

Roll out or take given text, score the same tokens under student and teacher, compare at every counted position, weigh,
sum and count. A paper is a choice of estimator (exact divergence or sampled gradient), states (data or rollouts),
weighting and teacher.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from potstill.contracts import keyed
from potstill.contracts.batch import Batch, PromptBatch, TokenBatch
from potstill.contracts.errors import DataError, RecipeError
from potstill.contracts.players import Objective, OptimizerSpec, Player
from potstill.contracts.signals import FullLogits, check_signals
from potstill.contracts.spec import Spec
from potstill.contracts.terms import Loss, Term
from potstill.divergences import Estimator, Exact, FDivergence, ForwardKL, ReverseKL, log_probs
from potstill.models.ema import EMA
from potstill.rollouts.local import sample
from potstill.teachers.local import check_vocabulary
from potstill.weighting import Positions, Uniform, Weighting


class RolloutSpec(Spec):
    """How completions are sampled from a policy."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    samples_per_prompt: int = 1


@dataclass(frozen=True)
class Rows:
    """Where the N counted positions of a batch lie in rows: [N] <-> [B, R], R the longest row."""

    row_N: Tensor
    order_N: Tensor
    mask_BR: Tensor

    @staticmethod
    def of(counted_BT: Tensor) -> "Rows":
        order_BT = counted_BT.cumsum(1) - 1
        row_N = torch.arange(len(counted_BT), device=counted_BT.device)[:, None].expand_as(counted_BT)[counted_BT]
        length_B = counted_BT.sum(1)
        longest = int(length_B.max()) if len(length_B) else 0
        return Rows(
            row_N, order_BT[counted_BT], torch.arange(longest, device=counted_BT.device)[None] < length_B[:, None]
        )

    def spread(self, values_N: Tensor) -> Tensor:
        """[N] -> [B, R], zero beyond a row's end."""
        out = values_N.new_zeros(self.mask_BR.shape)
        return out.index_put((self.row_N, self.order_N), values_N)

    def gather(self, values_BR: Tensor) -> Tensor:
        return values_BR[self.row_N, self.order_N]


class TokenDistillation(Objective):
    """Distil a causal language model at the counted tokens of text, completions or the student's own rollouts.

    student, teacher: a CausalLM and anything that gives FullLogits (None: plain language modelling, the control).
    estimator: an FDivergence (exact over the vocabulary) or an Estimator (sampled gradient; needs on-policy states).
    rollouts: with a PromptBatch, how to continue it; on_policy: the share of steps that do so, the others taking the
        prompt's ground-truth completion (GKD's lambda, drawn by a keyed coin a step).
    weighting: which positions count and how much. cross_entropy: weight of the next-token loss on the given tokens.
    average: "token" divides by counted tokens, "sequence" averages over each sequence first.
    temperature divides both logits; no T^2 is applied unless `temperature_squared`.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any | None,
        estimator: Estimator | FDivergence = Exact(ForwardKL()),
        *,
        optimizer: OptimizerSpec,
        seed: int,
        rollouts: RolloutSpec | None = None,
        on_policy: float = 1.0,
        policy: Any | None = None,
        weighting: Weighting = Uniform(),
        distillation: float = 1.0,
        cross_entropy: float = 0.0,
        average: Literal["token", "sequence"] = "token",
        temperature: float = 1.0,
        temperature_squared: bool = False,
        ema: float | None = None,
        reward: Callable[[TokenBatch], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher, self.policy = teacher, policy
        self.estimator = Exact(estimator) if isinstance(estimator, FDivergence) else estimator
        self.optimizer, self.seed = optimizer, seed
        self.rollouts, self.on_policy = rollouts, on_policy
        self.weighting, self.distillation, self.cross_entropy = weighting, distillation, cross_entropy
        self.average, self.temperature, self.reward = average, temperature, reward
        self.coefficient = distillation * (temperature**2 if temperature_squared else 1.0)
        self.ema = EMA(student, ema) if ema is not None else None
        if teacher is not None:
            check_signals(type(self).__name__, FullLogits, teacher)
            self.shared = check_vocabulary(student, teacher)
        elif cross_entropy == 0:
            raise RecipeError("Without a teacher nothing is left to learn: give a teacher, or cross_entropy > 0.")
        if self.estimator.on_policy and rollouts is not None:
            if rollouts.top_p < 1 or rollouts.top_k or rollouts.temperature != temperature:
                raise RecipeError(
                    f"{type(self.estimator).__name__} is unbiased only on untruncated samples at the scored temperature: set "
                    f"rollouts.top_p 1, rollouts.top_k 0 and rollouts.temperature {temperature}."
                )
            if on_policy < 1 or policy is not None:
                raise RecipeError(
                    f"{type(self.estimator).__name__} needs the student's own samples everywhere: set on_policy 1."
                )

    @property
    def couples(self) -> Literal["position", "group", "batch"]:  # type: ignore[override]
        return "batch" if self.weighting.couples == "batch" else "position"

    @property
    def players(self) -> dict[str, Player]:
        return {"student": Player([self.student], self.optimizer)}

    def collect(self, batch: Batch, step: int) -> TokenBatch:
        """Token batches pass; prompts are continued by the policy, or by their own completion on off-policy steps."""
        if isinstance(batch, TokenBatch):
            if self.estimator.on_policy:
                raise DataError(
                    f"{type(self.estimator).__name__} needs prompts to continue, and this data gives finished text."
                )
            return batch
        assert isinstance(batch, PromptBatch)
        coin = keyed.uniform(keyed.key(self.seed, "on-policy"), torch.tensor([step]))
        if self.rollouts is None or coin.item() >= self.on_policy:
            return completed(batch, self.student.pad_id)
        return sample(
            self.policy or self.student,
            batch,
            max_new_tokens=self.rollouts.max_new_tokens,
            temperature=self.rollouts.temperature,
            top_p=self.rollouts.top_p,
            top_k=self.rollouts.top_k,
            samples_per_prompt=self.rollouts.samples_per_prompt,
            seed=keyed.key(self.seed, "rollout", step),
        )

    def loss(self, player: str, batch: Batch, step: int) -> Loss:
        assert isinstance(batch, TokenBatch)
        tokens_N, rows = batch.tokens_counted, Rows.of(batch.counted_BT)
        logits_NV = self.student.counted_logits(batch)
        terms: dict[str, Term] = {}
        metrics: dict[str, Term] = {}
        positions: dict[str, Tensor] = {}
        if self.teacher is not None:
            teacher_logits = self.teacher.score(batch, FullLogits).logits
            log_q = log_probs(logits_NV[:, : self.shared], self.temperature)
            log_p = log_probs(teacher_logits[:, : self.shared], self.temperature)
            values_N = self.estimator.per_position(
                teacher_logp=log_p, student_logp=log_q, tokens_N=tokens_N, sampled_logp_N=self._sampled(batch)
            )
            with torch.no_grad():
                reverse_N = ReverseKL()(teacher_logp=log_p, student_logp=log_q)
                entropy_N = -(log_q.exp() * log_q).nan_to_num(0.0).sum(-1)
                weights_BR = self.weighting(self._positions(rows, log_p, log_q, reverse_N, entropy_N, tokens_N))
            terms["divergence"] = self._term(rows, values_N, rows.gather(weights_BR), self.coefficient)
            metrics |= {"reverse_kl": Term.over(reverse_N), "student_entropy": Term.over(entropy_N)}
            positions |= {"reverse_kl": rows.spread(reverse_N), "weights": weights_BR}
        if self.cross_entropy:
            nll_N = -log_probs(logits_NV).gather(-1, tokens_N[:, None])[:, 0]
            terms["cross_entropy"] = self._term(rows, nll_N, None, self.cross_entropy)
        return Loss(terms, metrics, positions)

    def after_step(self, player: str, step: int) -> None:
        if self.ema is not None:
            self.ema.update(self.student)

    def _term(self, rows: Rows, values_N: Tensor, weights_N: Tensor | None, coefficient: float) -> Term:
        weights_N = torch.ones_like(values_N) if weights_N is None else weights_N
        if self.average == "token":
            return Term.weighted(values_N, weights_N, None, coefficient, unit="token")
        length_N = rows.mask_BR.sum(1)[rows.row_N]
        count = rows.mask_BR.any(1).sum().to(values_N.dtype)
        return Term((values_N * weights_N.detach() / length_N).sum(), count, coefficient, unit="sequence")

    def _positions(
        self, rows: Rows, log_p: Tensor, log_q: Tensor, reverse_N: Tensor, entropy_N: Tensor, tokens_N: Tensor
    ) -> Positions:
        teacher_entropy_N = -(log_p.exp() * log_p).nan_to_num(0.0).sum(-1)
        log_ratio_N = (log_p - log_q).gather(-1, tokens_N[:, None])[:, 0]
        return Positions(
            mask_BR=rows.mask_BR,
            teacher_entropy_BR=rows.spread(teacher_entropy_N),
            student_entropy_BR=rows.spread(entropy_N),
            log_ratio_BR=rows.spread(log_ratio_N),
            divergence_BR=rows.spread(reverse_N),
        )

    def _sampled(self, batch: TokenBatch) -> Tensor | None:
        """What another policy gave its tokens; the student's own samples of this step need no reweighting."""
        if self.policy is None or batch.sampled_logp_BT is None:
            return None
        return batch.sampled_logp_BT[batch.counted_BT]


def completed(batch: PromptBatch, pad_id: int) -> TokenBatch:
    """Prompts followed by their ground-truth completions, which count."""
    if batch.completions is None:
        raise DataError("These prompts have no completions to learn from: use rollouts at every step (on_policy: 1).")
    longest = max(len(c) for c in batch.completions)
    size, prompt = batch.tokens_BT.shape
    tokens_BT = torch.full((size, prompt + longest), pad_id, dtype=torch.int64, device=batch.tokens_BT.device)
    attention_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    tokens_BT[:, :prompt], attention_BT[:, :prompt] = batch.tokens_BT, batch.attention_BT
    counted_BT = torch.zeros_like(attention_BT)
    for b, completion in enumerate(batch.completions):
        end = prompt + len(completion)
        tokens_BT[b, prompt:end] = torch.tensor(completion, device=tokens_BT.device)
        attention_BT[b, prompt:end] = counted_BT[b, prompt:end] = True
    return TokenBatch(batch.ids_B, tokens_BT, attention_BT, counted_BT, extra=batch.extra)

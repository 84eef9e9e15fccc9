"""Token distillation: the one step behind the language methods.

Roll out or take given text, score the same tokens under student and teacher, compare at every counted position, weigh,
sum and count. A paper is a choice of estimator (exact divergence or sampled gradient), states (data or rollouts),
weighting and teacher.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from potstill.contracts import keyed
from potstill.contracts.batch import Batch, PromptBatch, TokenBatch
from potstill.contracts.errors import DataError, NonFiniteError, RecipeError
from potstill.contracts.players import Objective, OptimizerSpec, Player
from potstill.contracts.signals import FullLogits, HiddenAndHead, check_signals
from potstill.contracts.spec import Spec
from potstill.contracts.terms import Loss, Term
from potstill.divergences import (
    Estimator,
    Exact,
    FDivergence,
    ForwardKL,
    ReverseKL,
    entropy,
    linear_divergence,
    log_probs,
)
from potstill.models.ema import EMA
from potstill.rollouts.groups import group_advantages
from potstill.rollouts.local import completions_of, sample
from potstill.teachers.local import LocalTeacher, check_vocabulary
from potstill.weighting import Positions, Uniform, Weighting

CHUNK = 2**20  # logits that go through the row-wise work at once


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


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, function: Callable[[Tensor, slice], Tensor]) -> Tensor:
        size = max(1, CHUNK // logits_NV.shape[-1])
        gradient = torch.empty_like(logits_NV) if ctx.needs_input_grad[0] else None
        values = []
        for start in range(0, len(logits_NV), size):
            where = slice(start, start + size)
            with torch.set_grad_enabled(gradient is not None):
                rows = logits_NV[where].detach().requires_grad_(gradient is not None)
                value = function(rows, where)
                if gradient is not None:
                    gradient[where] = torch.autograd.grad(value.sum(), rows)[0]
            values.append(value.detach())
        ctx.save_for_backward(*([gradient] if gradient is not None else []))
        return torch.cat(values) if values else logits_NV.new_zeros(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradient_N[:, None].to(gradient.dtype), None


def by_rows(function: Callable[[Tensor, slice], Tensor], logits_NV: Tensor) -> Tensor:
    """`function(some rows of logits, which) -> a value each`, over all rows. [N, V] -> [N].

    A value may depend on its own row alone. The rows go through in pieces that fit a cache, and each piece's gradient is
    made at once, so that one [N, V] tensor is kept for the backward pass and not one for every operation.
    """
    return cast(Tensor, _ByRows.apply(logits_NV, function))


class TokenDistillation(Objective):
    """Distil a causal language model at the counted tokens of text, completions or the student's own rollouts.

    student, teacher: a CausalLM and anything that gives FullLogits (None: plain language modelling, the control).
    estimator: an FDivergence (exact over the vocabulary) or an Estimator (sampled gradient; needs on-policy states).
    rollouts: with a PromptBatch, how to continue it; on_policy: the share of steps that do so, the others taking the
        prompt's ground-truth completion (GKD's lambda, drawn by a keyed coin a step).
    policy: a model, held as a teacher is, that continues the prompts instead of the student; policy_share: the share of
        the rollout steps that it does, by a second coin. Exact divergences need no reweighting of its samples.
    weighting: which positions count and how much. cross_entropy: weight of the next-token loss on the given tokens.
    average: "token" divides by counted tokens, "sequence" averages over each sequence first.
    temperature divides both logits; no T^2 is applied unless `temperature_squared`.
    reward: of a prompt's row and the student's completion, a float; its advantage in the group of `samples_per_prompt`
        (mean and deviation taken off) is added to the sampled gradient of every token of the completion.
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
        policy: LocalTeacher | None = None,
        policy_share: float = 1.0,
        weighting: Weighting = Uniform(),
        distillation: float = 1.0,
        cross_entropy: float = 0.0,
        average: Literal["token", "sequence"] = "token",
        temperature: float = 1.0,
        temperature_squared: bool = False,
        ema: float | None = None,
        reward: Callable[[Mapping[str, Any], str], float] | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher, self.policy, self.policy_share = teacher, policy, policy_share
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
        if reward is not None:
            if rollouts is None or on_policy < 1 or policy is not None or rollouts.temperature != temperature:
                raise RecipeError(
                    "A reward needs the student's own samples everywhere, at the scored temperature: set on_policy 1 and "
                    f"rollouts.temperature {temperature}."
                )
            if rollouts.samples_per_prompt < 2:
                raise RecipeError("A reward is compared within a group: set rollouts.samples_per_prompt to 2 or more.")

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
        out = sample(
            self._writer(step),
            batch,
            max_new_tokens=self.rollouts.max_new_tokens,
            temperature=self.rollouts.temperature,
            top_p=self.rollouts.top_p,
            top_k=self.rollouts.top_k,
            samples_per_prompt=self.rollouts.samples_per_prompt,
            seed=keyed.key(self.seed, "rollout", step),
        )
        if self.reward is not None:
            texts = self.student.tokenizer.batch_decode(completions_of(out), skip_special_tokens=True)
            rewards = [self.reward(row, text) for row, text in zip(out.extra["rows"], texts, strict=True)]
            out.extra["reward"] = torch.tensor(rewards, dtype=torch.float32, device=out.tokens_BT.device)
            out.extra["advantage"] = group_advantages(out.extra["reward"], self.rollouts.samples_per_prompt)
        return out

    def _writer(self, step: int) -> Any:
        """Who continues this step's prompts."""
        coin = keyed.uniform(keyed.key(self.seed, "policy"), torch.tensor([step]))
        return self.student if self.policy is None or coin.item() >= self.policy_share else self.policy.model

    def loss(self, player: str, batch: Batch, step: int) -> Loss:
        assert isinstance(batch, TokenBatch)
        tokens_N, rows = batch.tokens_counted, Rows.of(batch.counted_BT)
        hidden_ND = self.student.counted_hidden(batch)
        compare = self._from_hidden if self.student.has_linear_head else self._from_logits
        share_N, count = self._average(rows)
        terms: dict[str, Term] = {}
        metrics: dict[str, Term] = {}
        positions: dict[str, Tensor] = {}
        if self.teacher is not None:
            weigh = lambda **seen: self.weighting(Positions(mask_BR=rows.mask_BR, **seen))
            early_BR = None if self.weighting.needs else weigh()  # else they wait for what the comparison finds
            early_N = None if early_BR is None else share_N * rows.gather(early_BR).detach()
            total, values_N, seen = compare(hidden_ND, batch, tokens_N, early_N)
            spread = {f"{name}_BR": rows.spread(values) for name, values in seen.items()}
            weights_BR = weigh(**spread) if early_BR is None else early_BR
            if early_BR is None:
                total = (values_N * share_N * rows.gather(weights_BR).detach()).sum()
            terms["divergence"] = Term(total, count, self.coefficient, unit=self.average)
            looked_at_N = rows.gather(weights_BR) != 0
            metrics |= {
                "reverse_kl": Term.over(seen["divergence"], looked_at_N),
                "student_entropy": Term.over(seen["student_entropy"], looked_at_N),
            }
            positions |= {"reverse_kl": spread["divergence_BR"], "weights": weights_BR}
        if "advantage" in batch.extra or self.cross_entropy:
            logits_NV = self.student.head(hidden_ND)
            if "advantage" in batch.extra:
                advantage_N = batch.extra["advantage"][rows.row_N]
                nll_N = by_rows(lambda some, where: _nll(some, tokens_N[where], self.temperature), logits_NV)
                terms["reward"] = Term((share_N * advantage_N * nll_N).sum(), count, 1.0, unit=self.average)
                metrics["reward"] = Term.over(batch.extra["reward"])
            if self.cross_entropy:
                nll_N = by_rows(lambda some, where: _nll(some, tokens_N[where]), logits_NV)
                terms["cross_entropy"] = Term((share_N * nll_N).sum(), count, self.cross_entropy, unit=self.average)
        return Loss(terms, metrics, positions)

    def _from_hidden(
        self, hidden_ND: Tensor, batch: TokenBatch, tokens_N: Tensor, weights_N: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The weighted total, values [N], and what weightings and metrics see of the positions, detached.

        Weights that wait for those (None here) make the values differentiable instead of the total.
        """
        teacher = cast(Any, self.teacher)
        signal = teacher.score(batch, HiddenAndHead if _linear(teacher) else FullLogits)
        head = self.student.with_head(hidden_ND)
        out = linear_divergence(
            self.estimator,
            hidden_ND,
            head.head_VD,
            teacher=signal,
            weights=weights_N,
            tokens=tokens_N,
            sampled_logp=self._sampled(batch),
            temperature=self.temperature,
            student_bias=head.bias_V,
            student_scale=head.scale,
            student_softcap=head.softcap,
            vocabulary=self.shared,
            compiled=self.student.compiled,
            differentiable_values=weights_N is None,
            also=ReverseKL(),
        )
        assert out.also is not None and out.student_entropy is not None and out.teacher_entropy is not None
        assert out.student_logp is not None and out.teacher_logp is not None
        # Logits of hidden states are finite; those that are given need a look, for which an accelerator has to wait.
        if isinstance(signal, FullLogits) and not out.values.isfinite().all() and (signal.logits == -math.inf).any():
            raise self._impossible()
        return (
            out.total,
            out.values,
            {
                "divergence": out.also,
                "student_entropy": out.student_entropy,
                "teacher_entropy": out.teacher_entropy,
                "log_ratio": out.teacher_logp - out.student_logp,
            },
        )

    def _from_logits(
        self, hidden_ND: Tensor, batch: TokenBatch, tokens_N: Tensor, weights_N: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The same where the student's output layer is no single weight, from whole logits."""
        logits_NV = self.student.head(hidden_ND)
        teacher_logits = self.teacher.score(batch, FullLogits).logits.to(logits_NV.device)  # type: ignore[union-attr]
        sampled_N = self._sampled(batch)
        names = ("divergence", "student_entropy", "teacher_entropy", "log_ratio")
        dtype = torch.promote_types(logits_NV.dtype, torch.float32)
        seen = {name: logits_NV.new_empty(len(logits_NV), dtype=dtype) for name in names}

        def values(rows_MV: Tensor, where: slice) -> Tensor:
            log_q = log_probs(rows_MV[:, : self.shared], self.temperature)
            log_p = log_probs(teacher_logits[where, : self.shared], self.temperature)
            chosen = tokens_N[where]
            with torch.no_grad():
                seen["divergence"][where] = ReverseKL()(teacher_logp=log_p, student_logp=log_q)
                seen["student_entropy"][where] = entropy(log_q)
                seen["teacher_entropy"][where] = entropy(log_p)
                seen["log_ratio"][where] = (log_p - log_q).gather(-1, chosen[:, None])[:, 0]
            value = self.estimator.per_position(
                teacher_logp=log_p,
                student_logp=log_q,
                tokens_N=chosen,
                sampled_logp_N=None if sampled_N is None else sampled_N[where],
            )
            if not value.isfinite().all() and (log_p == -math.inf).any():
                raise self._impossible()
            return value

        values_N = by_rows(values, logits_NV)
        total = values_N.sum() if weights_N is None else (values_N * weights_N).sum()
        return total, values_N, seen

    def _impossible(self) -> NonFiniteError:
        return NonFiniteError(
            f"{getattr(self.teacher, 'name', 'The teacher')} gives probability 0 to tokens that the student can say, where "
            "this divergence is infinite. Take one that stays finite (ForwardKL, JensenShannon), or SampledReverseKL with "
            "baseline 'none' and a clip."
        )

    def after_step(self, player: str, step: int) -> None:
        if self.ema is not None:
            self.ema.update(self.student)

    def _average(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """What each position counts for in the average [N], and what the sum is divided by."""
        length_N = rows.mask_BR.sum(1)[rows.row_N].float()
        if self.average == "token":
            return torch.ones_like(length_N), length_N.new_tensor(float(len(length_N)))
        return 1 / length_N, rows.mask_BR.any(1).sum().float()

    def _sampled(self, batch: TokenBatch) -> Tensor | None:
        """What another policy gave its tokens; the student's own samples of this step need no reweighting."""
        if self.policy is None or batch.sampled_logp_BT is None:
            return None
        return batch.sampled_logp_BT[batch.counted_BT]


def _linear(teacher: Any) -> bool:
    """Whether a teacher's hidden states and output layer can be had, which spares its logits."""
    return HiddenAndHead in teacher.gives and getattr(teacher.model, "has_linear_head", False)


def _nll(logits_MV: Tensor, tokens_M: Tensor, temperature: float = 1.0) -> Tensor:
    return -log_probs(logits_MV, temperature).gather(-1, tokens_M[:, None])[:, 0]


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

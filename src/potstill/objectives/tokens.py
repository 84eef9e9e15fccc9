"""Token distillation: the one step behind the language methods.

Roll out or take given text, score the same tokens under student and teacher, compare at every counted position, weigh,
sum and count. A paper is a choice of estimator (exact divergence or sampled gradient), states (data or rollouts),
weighting and teacher, and perhaps a further term on the same states.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from potstill.contracts import keyed
from potstill.contracts.batch import Batch, PromptBatch, TokenBatch
from potstill.contracts.errors import DataError, NonFiniteError, RecipeError, SignalError
from potstill.contracts.players import Objective, OptimizerSpec, Player
from potstill.contracts.signals import FullLogits, HiddenAndHead, Signal, SpanLogp, TokenLogp, TopKLogp
from potstill.contracts.spec import Spec
from potstill.contracts.terms import Loss, Term
from potstill.divergences import (
    Clipped,
    Estimator,
    Exact,
    FDivergence,
    ForwardKL,
    Full,
    JensenShannon,
    ReverseKL,
    SampledReverseKL,
    entropy,
    event_divergence,
    linear_divergence,
    log_probs,
    shared_rows,
    span_logp,
)
from potstill.models.ema import EMA
from potstill.objectives.states import (
    Rows,
    TokenStates,
    TokenTerm,
    average_of,
    by_rows,
    coupling,
    positions_of,
    signal_of,
    token_logp,
    weighted_nll,
)
from potstill.rollouts.groups import group_advantages
from potstill.rollouts.local import completions_of, sample
from potstill.rollouts.served import ServedStudent, ServerSpec
from potstill.teachers.local import LocalTeacher, check_vocabulary
from potstill.weighting import Positions, Uniform, Weighting

ALSO: dict[str, FDivergence] = {
    "reverse_kl": ReverseKL(),
    "forward_kl": ForwardKL(),
    "jensen_shannon": JensenShannon(0.5),
}
WATCHED = ("reverse_kl", "student_entropy", "clip_fraction")  # logged of what was seen
COMPARED = {*ALSO, "student_entropy", "teacher_entropy", "log_ratio"}  # what is known once two models were compared


@dataclass(frozen=True)
class ClippedShare:
    """Which share of a position's outcomes a clipped divergence cuts off (all or none of them `per` position), [*P].

    To be looked at beside the divergence, over all outcomes that the teacher gives.
    """

    of: Clipped

    def entries(self, *, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        whole = replace(self.of, limit=math.inf).entries(teacher_logp=teacher_logp, student_logp=student_logp)
        size = whole if self.of.per == "entry" else whole.sum(-1, keepdim=True).expand_as(whole)
        return (size > self.of.limit).to(whole) / whole.shape[-1]

    def __call__(self, *, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        return self.entries(teacher_logp=teacher_logp, student_logp=student_logp).sum(-1)


class RolloutSpec(Spec):
    """How completions are sampled from a policy, and by whom."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    samples_per_prompt: int = 1
    server: ServerSpec | None = None  # that samples the student; None: it is sampled here

    @property
    def sampling(self) -> dict[str, Any]:
        """The options of `rollouts.local.sample`."""
        return self.model_dump(exclude={"server"})

    def served(self, student: Any) -> ServedStudent | None:
        return None if self.server is None else ServedStudent(student, self.server)


class TokenDistillation(Objective):
    """Distil a causal language model at the counted tokens of text, completions or the student's own rollouts.

    student, teacher: a CausalLM and a teacher (None: plain language modelling, the control). One that gives its top k
        alone serves exact divergences, one that gives its tokens' log-probabilities the sampled gradient without baseline,
        one of another vocabulary (`AlignedTeacher`) either, by spans of text.
    estimator: an FDivergence (exact over the vocabulary) or an Estimator (sampled gradient; needs on-policy states).
    rollouts: with a PromptBatch, how to continue it, here or at a server that holds the student; on_policy: the share of
        steps that do so, the others taking the prompt's ground-truth completion (GKD's lambda, drawn by a keyed coin a step).
    policy: a model, held as a teacher is, that continues the prompts instead of the student; policy_share: the share of
        the rollout steps that it does, by a second coin. Exact divergences need no reweighting of its samples.
    weighting: which positions count and how much. cross_entropy: weight of the next-token loss on the given tokens.
    average: "token" divides by counted tokens, "sequence" averages over each sequence first.
    temperature divides both logits; no T^2 is applied unless `temperature_squared`.
    reward: of a prompt's row and the student's completion, a float; its advantage in the group of `samples_per_prompt`
        (mean and deviation taken off) is added to the sampled gradient of every token of the completion, `advantage` times;
        at 0 it is there for the weighting alone.
    extras: further terms on the same states.
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
        advantage: float = 1.0,
        extras: Sequence[TokenTerm] = (),
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher, self.policy, self.policy_share = teacher, policy, policy_share
        self.estimator = Exact(estimator) if isinstance(estimator, FDivergence) else estimator
        self.optimizer, self.seed = optimizer, seed
        self.rollouts, self.on_policy = rollouts, on_policy
        self.weighting, self.distillation, self.cross_entropy = weighting, distillation, cross_entropy
        self.average, self.temperature, self.reward, self.advantage = average, temperature, reward, advantage
        self.extras = tuple(extras)
        self.coefficient = distillation * (temperature**2 if temperature_squared else 1.0)
        self.ema = EMA(student, ema) if ema is not None else None
        self.teacher_state = getattr(teacher, "state", None)  # of a teacher that moves: saved with the student
        self.shared: int | None = None
        if teacher is not None:
            self._check_teacher(teacher)
            self.shared = None if SpanLogp in teacher.gives else check_vocabulary(student, teacher)
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
        self.server = rollouts.served(student) if rollouts is not None else None

    def _check_teacher(self, teacher: Any) -> None:
        """Refuse, before any work, a teacher that gives less than is asked."""
        if teacher.gives & {FullLogits, HiddenAndHead}:
            return
        known = getattr(teacher, "temperature", 1.0)
        if teacher.gives and known != self.temperature:
            raise SignalError(
                f"{teacher.name} gives log-probabilities at temperature {known}, and {self.temperature} is asked. "
                f"Set method.temperature to {known}, or use a live teacher."
            )
        if SpanLogp in teacher.gives:
            self._check_spans(teacher)
            return
        exact = TopKLogp in teacher.gives and isinstance(self.estimator, Exact)
        if not exact and not (TokenLogp in teacher.gives and self.estimator.needs is TokenLogp):
            given = ", ".join(sorted(s.__name__ for s in teacher.gives)) or "nothing"
            raise SignalError(
                f"{type(self.estimator).__name__} needs more than {teacher.name} gives ({given}). With a top k, use an exact "
                "divergence; with tokens' log-probabilities, SampledReverseKL without baseline; else a live teacher."
            )

    def _check_spans(self, teacher: Any) -> None:
        """Refuse what looks at single tokens of a teacher that has others."""
        whole = isinstance(self.estimator, Exact) and self.estimator.support == Full()
        if not (whole or self.estimator.needs is TokenLogp) or self._waits or self.extras:
            raise SignalError(
                f"{teacher.name} is compared by spans, not token by token: take a divergence over the full vocabulary or "
                "SampledReverseKL without baseline, a weighting that does not compare the models, and no further terms."
            )

    @property
    def _waits(self) -> bool:
        """Whether the weighting reads what is known once two models were compared."""
        return bool(set(self.weighting.needs) & {f"{name}_BR" for name in COMPARED})

    @property
    def couples(self) -> Literal["position", "group", "batch"]:  # type: ignore[override]
        return coupling(self.weighting, *self.extras)

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
        writer, how = self._writer(step), {**self.rollouts.sampling, "seed": keyed.key(self.seed, "rollout", step)}
        if self.server is not None and writer is self.student:
            out = self.server.sample(batch, step=step, **how)
        else:
            out = sample(writer, batch, **how)
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
        states = self._states(batch)
        rows, count = states.rows, states.count
        terms: dict[str, Term] = {}
        metrics: dict[str, Term] = {}
        positions: dict[str, Tensor] = {}
        if self.teacher is not None:
            terms["divergence"] = Term(self._divergence(states, step), count, self.coefficient, unit=self.average)
            assert states.weights_BR is not None
            if isinstance(self.estimator, SampledReverseKL) and self.estimator.clip and "log_ratio" in states.seen:
                lowest = math.log(self.estimator.clip) / (1 - self.estimator.clip)
                states.seen = {**states.seen, "clip_fraction": (states.seen["log_ratio"] < lowest).float()}
            looked_at_N = rows.gather(states.weights_BR) != 0
            metrics |= {name: Term.over(states.seen[name], looked_at_N) for name in WATCHED if name in states.seen}
            away = [name for name in ("reverse_kl", "log_ratio") if name in states.seen]
            positions |= {name: rows.spread(states.seen[name]) for name in away[:1]} | {"weights": states.weights_BR}
        spent: dict[str, Any] = {"temperature": self.temperature, "vocabulary": self.shared}
        if "advantage" in batch.extra and self.advantage:
            weights_N = states.share_N * batch.extra["advantage"][rows.row_N]
            total = weighted_nll(self.student, states.hidden_ND, states.tokens_N, weights_N, **spent)
            terms["reward"] = Term(total, count, self.advantage, unit=self.average)
        if "reward" in batch.extra:
            metrics["reward"] = Term.over(batch.extra["reward"])
        if self.cross_entropy:
            total = weighted_nll(self.student, states.hidden_ND, states.tokens_N, states.share_N)
            terms["cross_entropy"] = Term(total, count, self.cross_entropy, unit=self.average)
        for extra in self.extras:
            terms[extra.name] = extra(states)
        return Loss(terms, metrics, positions)

    def _states(self, batch: TokenBatch) -> TokenStates:
        rows, tokens_N = Rows.of(batch.counted_BT), batch.tokens_counted
        hidden_ND = self.student.counted_hidden(batch)
        share_N, count = average_of(rows, self.average)
        return TokenStates(
            self.student, batch, rows, tokens_N, hidden_ND, share_N, count, self.average, self.shared,
            signal=None if self.teacher is None else self._signal(self.teacher, batch),
        )  # fmt: skip

    def _divergence(self, states: TokenStates, step: int) -> Tensor:
        """The weighted sum over positions. Fills what is seen of them, and their weights.

        Weights that wait for the comparison take a first pass without gradient over all positions; the second one looks
        only at those that count.
        """
        compare = lambda weights_N: self._compare(
            self.teacher, states.hidden_ND, states.batch, states.tokens_N, weights_N
        )
        if self._waits:
            with torch.no_grad():
                _, states.seen = compare(None)
        states.weights_BR = self.weighting(self._positions(states, step))
        total, seen = compare(states.share_N * states.rows.gather(states.weights_BR))
        states.seen = states.seen or seen
        return total

    def _positions(self, states: TokenStates, step: int) -> Positions:
        """What the weighting reads."""
        group = self.rollouts.samples_per_prompt if self.rollouts is not None else 1
        key = keyed.key(self.seed, "selection", step)
        return positions_of(states.batch, states.rows, states.seen, self.weighting.needs, key, group=group)

    @property
    def _also(self) -> dict[str, Any]:
        """The other divergences to look at: one for the metrics, the rest for weighting and extras, and what is clipped."""
        asked = {name.removesuffix("_BR") for name in self.weighting.needs}.union(*(x.needs for x in self.extras))
        found: dict[str, Any] = {name: ALSO[name] for name in ALSO if name == "reverse_kl" or name in asked}
        part = getattr(self.estimator, "divergence", None)
        return found | ({"clip_fraction": ClippedShare(part)} if isinstance(part, Clipped) else {})

    def _signal(self, teacher: Any, batch: TokenBatch) -> Signal:
        return signal_of(teacher, batch, self.estimator.needs)

    def _compare(
        self, teacher: Any, hidden_ND: Tensor, batch: TokenBatch, tokens_N: Tensor, weights_N: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of one teacher's comparison, and what is seen of the positions, detached [N] each."""
        signal = self._signal(teacher, batch)
        if isinstance(signal, SpanLogp):
            return self._from_spans(signal, hidden_ND, batch, tokens_N, weights_N)
        if isinstance(signal, TokenLogp):
            return self._from_token_logp(signal, hidden_ND, batch, tokens_N, weights_N)
        if not self.student.has_linear_head:
            return self._from_logits(teacher, signal, hidden_ND, batch, tokens_N, weights_N)
        head, also = self.student.with_head(hidden_ND), self._also
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
            also=list(also.values()),
        )
        # Logits of hidden states are finite; those that are given need a look, for which an accelerator has to wait.
        if isinstance(signal, FullLogits) and not out.values.isfinite().all() and (signal.logits == -math.inf).any():
            raise _impossible(teacher)
        assert out.also is not None
        seen = dict(zip(also, out.also.unbind(-1), strict=True))
        found = {"student_entropy": out.student_entropy, "teacher_entropy": out.teacher_entropy}
        if out.teacher_logp is not None and out.student_logp is not None:
            found["log_ratio"] = out.teacher_logp - out.student_logp
        return out.total, seen | {name: x for name, x in found.items() if x is not None}

    def _from_token_logp(
        self, signal: TokenLogp, hidden_ND: Tensor, batch: TokenBatch, tokens_N: Tensor, weights_N: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same where nothing but the sampled tokens' log-probabilities are known of the teacher."""
        logp_N = token_logp(self.student, hidden_ND, tokens_N, temperature=self.temperature, vocabulary=self.shared)
        theirs_N = signal.logp_N.to(logp_N)
        values_N = self.estimator.per_position(theirs_N, logp_N, tokens_N, self._sampled(batch))
        total = values_N.sum() if weights_N is None else (values_N * weights_N).sum()
        return total, {"log_ratio": (theirs_N - logp_N).detach()}

    def _from_spans(
        self, signal: SpanLogp, hidden_ND: Tensor, batch: TokenBatch, tokens_N: Tensor, weights_N: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same where the teacher has other tokens: a span counts at its last one, with that one's weight.

        Exact divergences compare each span with everything else, and whole rows where a span is one token on both sides.
        """
        logp_N = token_logp(self.student, hidden_ND, tokens_N)
        own_S, theirs_S = span_logp(batch.placed(logp_N), signal.ranges_S2, signal.row_S), signal.logp_S.to(logp_N)
        last_S = batch.numbers_BT[signal.row_S, signal.ranges_S2[:, 1] - 1]
        if isinstance(self.estimator, Exact):
            part, single_S = self.estimator.divergence, torch.zeros_like(signal.row_S, dtype=torch.bool)
            values_S = logp_N.new_zeros(len(own_S))
            if signal.single_S is not None and signal.rows is not None and signal.student_K is not None:
                single_S, rows, ids_K = signal.single_S, signal.rows, signal.student_K
                compared = lambda some, where: part(
                    teacher_logp=rows(where).to(logp_N), student_logp=shared_rows(log_probs(some), ids_K)
                )
                logits_MV = self.student.head(hidden_ND[last_S[single_S]])
                values_S = values_S.index_put((single_S,), by_rows(compared, logits_MV))
            events = event_divergence(part, teacher_logp=theirs_S[~single_S], student_logp=own_S[~single_S])
            values_S = values_S.index_put((~single_S,), events)
        else:
            values_S = self.estimator.per_position(theirs_S, own_S, tokens_N[last_S], None)
        weighed_S = values_S if weights_N is None else values_S * weights_N[last_S]
        ratio_N = torch.zeros_like(logp_N.detach()).index_put((last_S,), (theirs_S - own_S).detach())
        return weighed_S.sum(), {"log_ratio": ratio_N}

    def _from_logits(
        self, teacher: Any, signal: Signal, hidden_ND: Tensor, batch: TokenBatch, tokens_N: Tensor,
        weights_N: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """The same where the student's output layer is no single weight, from whole logits."""
        if not isinstance(signal, FullLogits | HiddenAndHead):
            raise SignalError(
                f"{self.student.name} has an adapted output layer, which needs the teacher's whole logits, and "
                f"{teacher.name} gives {type(signal).__name__}. Adapt other layers (student.lora.targets)."
            )
        logits_NV = self.student.head(hidden_ND)
        given = signal.logits() if isinstance(signal, HiddenAndHead) else signal.logits
        teacher_logits = given.to(logits_NV.device)
        sampled_N = self._sampled(batch)
        also = self._also
        names = (*also, "student_entropy", "teacher_entropy", "log_ratio")
        dtype = torch.promote_types(logits_NV.dtype, torch.float32)
        seen = {name: logits_NV.new_empty(len(logits_NV), dtype=dtype) for name in names}

        def values(rows_MV: Tensor, where: slice) -> Tensor:
            log_q = log_probs(rows_MV[:, : self.shared], self.temperature)
            log_p = log_probs(teacher_logits[where, : self.shared], self.temperature)
            chosen = tokens_N[where]
            with torch.no_grad():
                for name, divergence in also.items():
                    seen[name][where] = divergence(teacher_logp=log_p, student_logp=log_q)
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
                raise _impossible(teacher)
            return value

        values_N = by_rows(values, logits_NV)
        if weights_N is None:
            return values_N.sum(), seen
        return torch.where(weights_N != 0, values_N * weights_N, 0.0).sum(), seen

    def after_step(self, player: str, step: int) -> None:
        if self.ema is not None:
            self.ema.update(self.student)
        if self.teacher_state is not None:
            cast(Any, self.teacher).after_step(self.student, step)

    def _sampled(self, batch: TokenBatch) -> Tensor | None:
        """What another policy gave its tokens; the student's own samples of this step need no reweighting."""
        if self.policy is None or batch.sampled_logp_BT is None:
            return None
        return batch.sampled_logp_BT[batch.counted_BT]


def _impossible(teacher: Any) -> NonFiniteError:
    return NonFiniteError(
        f"{getattr(teacher, 'name', 'The teacher')} gives probability 0 to tokens that the student can say, where "
        "this divergence is infinite. Take one that stays finite (ForwardKL, JensenShannon), or SampledReverseKL with "
        "baseline 'none' and a clip."
    )


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

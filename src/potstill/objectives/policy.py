"""Policy gradients on rollouts: clipped-ratio surrogate with token advantages of a task's reward, a teacher, or both.

    A_t = task A_group + teacher w_t (log p(y_t) - log q_old(y_t))        once per rollout, from rollout-time log-probs
    loss = -mean_t min( rho_t A_t, clip(rho_t, 1 - low, 1 + high) A_t ),   rho_t = q(y_t) / q_old(y_t)

p the teacher, q the student, q_old the student that sampled; A and w are never differentiated. At rho = 1 the gradient is
REINFORCE's, -A_t grad log q(y_t), and with the teacher alone that of the sampled reverse KL. Sources: PPO, arXiv 1707.06347;
GRPO, arXiv 2402.03300; asymmetric clip, DAPO, arXiv 2503.14476; dual clip, arXiv 1912.09729.
B rows (rollouts), T tokens, N counted positions (the tokens that the student wrote), R positions of a row, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import load, save
from torch import Tensor

from potstill.contracts import keyed
from potstill.contracts.batch import Batch, PromptBatch, TokenBatch
from potstill.contracts.errors import DataError, NonFiniteError, RecipeError, SignalError
from potstill.contracts.players import Objective, OptimizerSpec, Player
from potstill.contracts.signals import FullLogits, HiddenAndHead, TokenLogp
from potstill.contracts.spec import Spec
from potstill.contracts.terms import Loss, Term
from potstill.divergences import Estimator, Exact, FDivergence, ReverseKL, entropy, linear_divergence, log_probs
from potstill.models.causal import evaluating
from potstill.objectives.states import (
    CHUNK,
    Rows,
    TokenStates,
    TokenTerm,
    average_of,
    by_rows,
    coupling,
    positions_of,
    scored,
    signal_of,
    teacher_logp,
    token_logp,
)
from potstill.objectives.tokens import ALSO, RolloutSpec
from potstill.rollouts.groups import Baseline, group_advantages
from potstill.rollouts.local import completions_of, sample
from potstill.teachers.local import check_vocabulary
from potstill.weighting import Positions, Uniform, Weighting
from potstill.weighting.steps import StepPositions, runs_of

Coefficient = float | Callable[[int], float]  # a number, or its schedule over steps
Average = Literal["token", "sequence", "constant"]
LARGEST = 20.0  # |log rho| beyond which a ratio stands still: e^20 is no policy's business


class Clip(Spec):
    """Where a ratio stops counting: outside [1 - low, 1 + high], and above `dual` where the advantage is negative."""

    low: float = Field(0.2, gt=0, le=1)
    high: float = Field(0.2, gt=0)
    dual: float | None = Field(None, gt=1)


def clipped(log_ratio_N: Tensor, advantage_N: Tensor, clip: Clip | None = Clip()) -> tuple[Tensor, Tensor]:
    """(values to minimise [N], whether the clip has stopped their gradient [N]); log_ratio is log q - log q_old.

    A > 0 stops above 1 + high; A < 0 below 1 - low, and above `dual`. Without a clip the plain -rho A.
    """
    ratio = log_ratio_N.clamp(-LARGEST, LARGEST).exp()
    gain = ratio * advantage_N
    if clip is None:
        return -gain, torch.zeros_like(gain, dtype=torch.bool)
    gain = torch.minimum(gain, ratio.clamp(1 - clip.low, 1 + clip.high) * advantage_N)
    up, down = advantage_N > 0, advantage_N < 0
    stopped = (up & (ratio > 1 + clip.high)) | (down & (ratio < 1 - clip.low))
    if clip.dual is not None:
        gain = torch.where(down, torch.maximum(gain, clip.dual * advantage_N), gain)
        stopped = stopped | (down & (ratio > clip.dual))
    return -gain, stopped.detach()


class PolicyGradient(Objective):
    """Improve a language model on its own rollouts, by a reward, by a teacher, or by both at once.

    student: a CausalLM; teacher: whoever gives log-probabilities of tokens, or None.
    rollouts: how prompts are continued, `samples_per_prompt` at a time. Or `rollout(batch, step)`: the caller's own
        sampler (episodes of an environment, a served policy), which gives a TokenBatch whose counted tokens the student
        said, `group` rows of one prompt side by side. It may hold `sampled_logp_BT` (else they are computed), and in
        `extra`: "reward" [B], "segment_BT" (the turn of each token; else runs of counted tokens), "first_error" [B] (the
        turn that failed, or -1), "version_B" (the step whose student sampled).
    reward: of a prompt's row and the completion's text, a float; not asked where `extra["reward"]` is there already.
    task_coefficient, teacher_coefficient: numbers, or functions of the step, of the two parts of an advantage.
    baseline, normalise: see `group_advantages`; normalise=False is Dr. GRPO's (with average "constant").
    weighting: w_t, of the teacher's part alone. What it reads is known at rollout time.
    clip: `Clip(low, high, dual)`, None for the plain ratio.
    average: "token" divides by counted tokens, "sequence" averages over each sequence first, "constant" divides every
        sequence by `length` (max_new_tokens unless given), so that no length is preferred.
    reference: a frozen teacher to stay near; reference_kl its coefficient, and the estimator, as a loss on samples of q:
        "k3" r - 1 - log r with r = reference / q, whose mean is KL(q || reference) but whose mean gradient is that of
        KL(reference || q); "k2" (log r)^2 / 2, whose mean gradient is that of KL(q || reference).
    entropy: coefficient of the student's entropy, which is raised.
    updates_per_rollout: updates before the next rollout; prompts of the steps in between are not looked at. minibatches
        cuts a rollout's rows in so many parts, one an update. The rollouts are part of the objective's state, so that a
        killed run goes on with them. max_staleness: rows that an older student sampled (so many steps ago) do not count.
    extras: further terms on the same states.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any | None = None,
        *,
        optimizer: OptimizerSpec,
        seed: int,
        rollouts: RolloutSpec | None = None,
        rollout: Callable[[Batch, int], TokenBatch] | None = None,
        group: int = 1,
        reward: Callable[[Mapping[str, Any], str], float] | None = None,
        task_coefficient: Coefficient = 1.0,
        teacher_coefficient: Coefficient = 1.0,
        baseline: Baseline = "mean",
        normalise: bool = True,
        eps: float = 1e-4,
        weighting: Weighting = Uniform(),
        clip: Clip | None = Clip(),
        average: Average = "token",
        length: int | None = None,
        temperature: float = 1.0,
        reference: Any | None = None,
        reference_kl: float = 0.0,
        reference_estimator: Literal["k2", "k3"] = "k3",
        entropy: float = 0.0,
        updates_per_rollout: int = 1,
        minibatches: int = 1,
        max_staleness: int | None = None,
        extras: Sequence[TokenTerm] = (),
    ) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.optimizer, self.seed = optimizer, seed
        self.rollouts, self.rollout = rollouts, rollout
        self.group = rollouts.samples_per_prompt if rollouts is not None else group
        self.reward, self.baseline, self.normalise, self.eps = reward, baseline, normalise, eps
        self.task_coefficient, self.teacher_coefficient = task_coefficient, teacher_coefficient
        self.weighting, self.clip, self.temperature = weighting, clip, temperature
        self.average = average
        self.length = length or (rollouts.max_new_tokens if rollouts is not None else None)
        self.reference, self.reference_kl, self.reference_estimator = reference, reference_kl, reference_estimator
        self.entropy = entropy
        self.updates_per_rollout, self.minibatches = updates_per_rollout, minibatches
        self.max_staleness, self.extras = max_staleness, tuple(extras)
        self.shared: int | None = None  # outcomes that student and teacher both know
        self._kept: list[TokenBatch] = []  # the rollouts of the micro-batches of a step, while they are in use
        self._at = (-1, -1)  # step and micro-batch that were collected last
        self._check()
        self.server = rollouts.served(student) if rollouts is not None else None

    def _check(self) -> None:
        """Refuse, before any work, what cannot be meant."""
        if (self.rollouts is None) == (self.rollout is None):
            raise RecipeError(
                "PolicyGradient needs either rollouts (how prompts are continued) or a rollout of its own."
            )
        if self.rollouts is not None:
            spec = self.rollouts
            if spec.top_p < 1 or spec.top_k or spec.temperature != self.temperature:
                raise RecipeError(
                    "A policy gradient needs untruncated samples at the scored temperature: set rollouts.top_p 1, "
                    f"rollouts.top_k 0 and rollouts.temperature {self.temperature}."
                )
        if self.reward is not None and self.task_coefficient and self.group < 2:
            raise RecipeError("A reward is compared within a group: set rollouts.samples_per_prompt to 2 or more.")
        if self.teacher is None and not self.task_coefficient:
            raise RecipeError("Without a teacher and without a task's reward nothing is left to learn.")
        if self.average == "constant" and self.length is None:
            raise RecipeError("average 'constant' divides by a length: give it (length), since no rollouts say it.")
        if self.minibatches < 1 or self.updates_per_rollout % self.minibatches:
            raise RecipeError(
                f"updates_per_rollout {self.updates_per_rollout} must be a multiple of minibatches {self.minibatches}, so that "
                "every rollout is used equally often."
            )
        if self.max_staleness is not None and self.max_staleness < self.updates_per_rollout - 1:
            raise RecipeError(
                f"The last of {self.updates_per_rollout} updates uses rollouts {self.updates_per_rollout - 1} steps old, and "
                f"max_staleness is {self.max_staleness}. Raise it, or lower updates_per_rollout."
            )
        for other in (self.teacher, self.reference):
            if other is None:
                continue
            shared = check_vocabulary(self.student, other)
            self.shared = shared if other is self.teacher else self.shared
            if not other.gives & {FullLogits, HiddenAndHead} and (
                TokenLogp not in other.gives or getattr(other, "temperature", 1.0) != self.temperature
            ):
                raise SignalError(
                    f"PolicyGradient needs TokenLogp at temperature {self.temperature}, which {other.name} does not give. "
                    "Use a live teacher (a model folder or id), or its own temperature."
                )
        for extra in self.extras:
            if missing := set(extra.needs) - {"student_entropy", "log_ratio"}:
                raise RecipeError(f"{type(extra).__name__} needs {', '.join(missing)}, unknown to a policy gradient.")

    @property
    def couples(self) -> Literal["position", "group", "batch"]:  # type: ignore[override]
        return coupling(self.weighting, *self.extras)

    @property
    def players(self) -> dict[str, Player]:
        return {"student": Player([self.student], self.optimizer)}

    # ---------------------------------------------------------------- rollouts and their advantages, once

    def collect(self, batch: Batch, step: int) -> TokenBatch:
        """Rollouts with their advantages: new ones every `updates_per_rollout` steps, else a part of those that are kept."""
        if self.updates_per_rollout == 1:
            return self._current(self.judged(self.rolled(batch, step), step), step)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise RecipeError("updates_per_rollout above 1 keeps rollouts in the checkpoint, for one process alone.")
        use = step % self.updates_per_rollout
        place = self._at[1] + 1 if self._at[0] == step else 0
        self._at = (step, place)
        if use == 0 or place >= len(self._kept):  # the latter where a loop begins in between
            self._kept[place:] = [replace(self.judged(self.rolled(batch, step), step), memo={})]
        kept = self._kept[place]
        part = torch.arange(len(kept)).tensor_split(self.minibatches)[use % self.minibatches]
        return self._current(picked(kept, part), step)

    def rolled(self, batch: Batch, step: int) -> TokenBatch:
        """The student's rollouts, with their rewards where there are any."""
        if self.rollout is not None:
            out = self.rollout(batch, step)
        else:
            if not isinstance(batch, PromptBatch):
                raise DataError("A policy gradient needs prompts to continue, and this data gives finished text.")
            assert self.rollouts is not None
            how = {**self.rollouts.sampling, "seed": keyed.key(self.seed, "rollout", step)}
            if self.server is not None:
                out = self.server.sample(batch, step=step, **how)
            else:
                out = sample(self.student, batch, **how)
        extra = dict(out.extra)
        if "reward" not in extra and self.reward is not None:
            texts = self.student.tokenizer.batch_decode(completions_of(out), skip_special_tokens=True)
            extra["reward"] = [self.reward(row, text) for row, text in zip(extra["rows"], texts, strict=True)]
        if "reward" in extra:
            extra["reward"] = torch.as_tensor(extra["reward"], dtype=torch.float32).to(out.tokens_BT.device)
            if not extra["reward"].isfinite().all():
                raise DataError("A reward is not a finite number. Mend the reward function.")
        extra.setdefault("version_B", torch.full_like(out.ids_B, step))
        return replace(out, extra=extra)

    @torch.no_grad()
    def judged(self, batch: TokenBatch, step: int) -> TokenBatch:
        """The rollouts with the old policy's log-probabilities, what teacher and reference say of them, and advantages."""
        batch = replace(batch, extra={"segment_BT": runs_of(batch.counted_BT), **batch.extra})
        if batch.sampled_logp_BT is None:
            with evaluating(self.student):
                old_N = self._logp_of(self.student, self.student.counted_hidden(batch), batch)
            batch = replace(batch, sampled_logp_BT=_placed(batch, old_N))
        assert batch.sampled_logp_BT is not None
        rows = Rows.of(batch.counted_BT)
        if self.teacher is not None:
            log_ratio_N = teacher_logp(self.teacher, batch, self.temperature) - batch.sampled_logp_BT[batch.counted_BT]
            if not log_ratio_N.isfinite().all():
                raise NonFiniteError(
                    f"{self.teacher.name} gives probability 0 to a token that the student has said, or NaN. Use a teacher "
                    "with whole support."
                )
            batch.extra["log_ratio_BT"] = _placed(batch, log_ratio_N)
        if self.reference is not None:
            batch.extra["reference_logp_BT"] = _placed(batch, teacher_logp(self.reference, batch, self.temperature))
        batch.extra["advantage_BT"] = _placed(batch, self.advantages(batch, rows, step))
        return batch

    def advantages(self, batch: TokenBatch, rows: Rows, step: int) -> Tensor:
        """A of every counted token, [N], from `extra`: "reward" [B] and "log_ratio_BT", log p - log q_old."""
        advantage_N = rows.mask_BR.new_zeros(len(rows.row_N), dtype=torch.float32)
        if task := _now(self.task_coefficient, step):
            if "reward" not in batch.extra:
                raise DataError(
                    "A task's advantage needs rewards: give reward(row, text), put them into the rollouts' "
                    'extra["reward"], or set task_coefficient to 0.'
                )
            group_B = group_advantages(
                batch.extra["reward"], self.group, baseline=self.baseline, normalise=self.normalise, eps=self.eps
            )
            advantage_N = advantage_N + task * group_B[rows.row_N]
        if self.teacher is not None and (teacher := _now(self.teacher_coefficient, step)):
            weights_BR = self.weighting(self._positions(batch, rows, step))
            log_ratio_N = batch.extra["log_ratio_BT"][batch.counted_BT]
            batch.extra["weight_BT"] = _placed(batch, rows.gather(weights_BR))
            advantage_N = advantage_N + teacher * rows.gather(weights_BR) * log_ratio_N
        return advantage_N

    def _positions(self, batch: TokenBatch, rows: Rows, step: int) -> Positions:
        """What the weighting reads."""
        seen = {}
        if "log_ratio_BT" in batch.extra:
            seen["log_ratio"] = batch.extra["log_ratio_BT"][batch.counted_BT]
        if set(self.weighting.needs) & {f"{name}_BR" for name in (*ALSO, "student_entropy", "teacher_entropy")}:
            seen |= self._compared(batch, rows)
        key, errors_B = keyed.key(self.seed, "selection", step), batch.extra.get("first_error")
        more: dict[str, Any] = {"of": StepPositions, "group": self.group, "first_error_B": errors_B}
        return positions_of(batch, rows, seen, self.weighting.needs, key, **more)

    def _compared(self, batch: TokenBatch, rows: Rows) -> dict[str, Tensor]:
        """Divergences and entropies of whole rows of teacher and student, [N] each, a piece of the positions at a time."""
        with evaluating(self.student):
            hidden_ND = self.student.counted_hidden(batch)
        states = self._states(batch, rows, hidden_ND, teacher=True)
        found: dict[str, list[Tensor]] = {name: [] for name in (*ALSO, "student_entropy", "teacher_entropy")}
        places = torch.arange(len(hidden_ND), device=hidden_ND.device)
        for where in places.split(max(1, CHUNK // self.student.vocabulary)):
            log_q = log_probs(states.student_logits(where), self.temperature)
            log_p = log_probs(states.teacher_logits(where), self.temperature)
            for name, divergence in ALSO.items():
                found[name].append(divergence(teacher_logp=log_p, student_logp=log_q))
            found["student_entropy"].append(entropy(log_q))
            found["teacher_entropy"].append(entropy(log_p))
        return {name: torch.cat(values) for name, values in found.items()}

    def _logp_of(self, model: Any, hidden_ND: Tensor, batch: TokenBatch) -> Tensor:
        return token_logp(model, hidden_ND, batch.tokens_counted, temperature=self.temperature)

    def _current(self, batch: TokenBatch, step: int) -> TokenBatch:
        """Without the tokens of rows that are too old."""
        if self.max_staleness is None:
            return batch
        fresh_B = step - batch.extra["version_B"] <= self.max_staleness
        return replace(batch, counted_BT=batch.counted_BT & fresh_B[:, None], memo={})

    # ---------------------------------------------------------------- the loss of one update

    def loss(self, player: str, batch: Batch, step: int) -> Loss:
        assert isinstance(batch, TokenBatch) and batch.sampled_logp_BT is not None
        counted, rows = batch.counted_BT, Rows.of(batch.counted_BT)
        hidden_ND = self.student.counted_hidden(batch)
        states = self._states(batch, rows, hidden_ND, teacher=self.teacher is not None and bool(self.extras))
        logp_N, entropy_N = scored(
            self.student, hidden_ND, states.tokens_N, temperature=self.temperature, entropy_graph=bool(self.entropy)
        )
        values_N, stopped_N = clipped(
            logp_N - batch.sampled_logp_BT[counted], batch.extra["advantage_BT"][counted], self.clip
        )
        averaged = lambda x_N, coefficient=1.0: Term(
            (states.share_N * x_N).sum(), states.count, coefficient, states.unit
        )
        terms = {"policy": averaged(values_N)}
        ratio_N = (logp_N - batch.sampled_logp_BT[counted]).detach().clamp(-LARGEST, LARGEST).exp()
        metrics = {
            "ratio": Term.over(ratio_N),
            "clip_fraction": Term.over(stopped_N.float()),
            "entropy": Term.over(entropy_N.detach()),
            "length": Term.over(rows.mask_BR.sum(1).float()),
        }
        if "reward" in batch.extra:
            metrics["reward"] = Term.over(batch.extra["reward"])
        if "log_ratio_BT" in batch.extra:  # its mean is KL(q_old || p) at the visited states
            metrics["sampled_reverse_kl"] = Term.over(-batch.extra["log_ratio_BT"][counted])
        if self.reference is not None:
            log_ratio_N = batch.extra["reference_logp_BT"][counted] - logp_N
            terms["reference_kl"] = averaged(estimated_kl(log_ratio_N, self.reference_estimator), self.reference_kl)
        if self.entropy:
            terms["entropy"] = averaged(-entropy_N, self.entropy)
        states.seen = {"student_entropy": entropy_N.detach()}
        if "log_ratio_BT" in batch.extra:
            states.seen = {**states.seen, "log_ratio": batch.extra["log_ratio_BT"][counted]}
        for extra in self.extras:
            terms[extra.name] = extra(states)
        kept = {"advantages": "advantage_BT", "log_ratio": "log_ratio_BT", "weights": "weight_BT"}
        positions = {name: rows.spread(batch.extra[key][counted]) for name, key in kept.items() if key in batch.extra}
        return Loss(terms, metrics, positions)

    def _states(self, batch: TokenBatch, rows: Rows, hidden_ND: Tensor, teacher: bool = False) -> TokenStates:
        share_N, count = average_of(rows, self.average, self.length)
        unit = "token" if self.average == "token" else "sequence"
        return TokenStates(
            self.student, batch, rows, batch.tokens_counted, hidden_ND, share_N, count, unit, self.shared,
            signal=signal_of(self.teacher, batch) if teacher else None,
        )  # fmt: skip

    # ---------------------------------------------------------------- what a killed run goes on with

    def get_extra_state(self) -> Tensor:
        """The kept rollouts, as bytes of safetensors."""
        tensors: dict[str, Tensor] = {}
        for i, batch in enumerate(self._kept):
            fields = {name: getattr(batch, name) for name in FIELDS}
            tensors |= {f"{i}/{name}": value for name, value in fields.items()}
            tensors |= {f"{i}/extra/{name}": x for name, x in batch.extra.items() if isinstance(x, Tensor)}
        whole = save({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()})
        return torch.frombuffer(bytearray(whole), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        tensors = load(state.cpu().numpy().tobytes())
        self._kept, self._at = [], (-1, -1)
        for i in range(len({name.partition("/")[0] for name in tensors})):
            own = {n.removeprefix(f"{i}/"): x.to(state.device) for n, x in tensors.items() if n.startswith(f"{i}/")}
            extra = {name.removeprefix("extra/"): x for name, x in own.items() if name.startswith("extra/")}
            fields: dict[str, Any] = {name: own[name] for name in FIELDS}
            self._kept.append(TokenBatch(**fields, extra=extra))


@dataclass(frozen=True)
class DivergenceTerm(TokenTerm):
    """A divergence of whole rows at the states of the rollouts, differentiated there: of no sample, and without a ratio.

    weights: the name of weights [B, T] in `batch.extra`, such as importance ratios.
    """

    name = "divergence"
    coefficient: float = 1.0
    estimator: FDivergence | Estimator = field(default_factory=ReverseKL)
    temperature: float = 1.0
    weights: str | None = None

    def __call__(self, states: TokenStates) -> Term:
        weights_N = states.share_N
        if self.weights is not None:
            weights_N = weights_N * states.batch.extra[self.weights][states.batch.counted_BT]
        part = Exact(self.estimator) if isinstance(self.estimator, FDivergence) else self.estimator
        if states.student.has_linear_head and states.signal is not None:
            head = states.student.with_head(states.hidden_ND)
            total = linear_divergence(
                part,
                states.hidden_ND,
                head.head_VD,
                teacher=states.signal,
                weights=weights_N,
                tokens=states.tokens_N,
                temperature=self.temperature,
                student_bias=head.bias_V,
                student_scale=head.scale,
                student_softcap=head.softcap,
                vocabulary=states.vocabulary,
                compiled=states.student.compiled,
            ).total
        else:
            log_p = log_probs(states.teacher_logits(), self.temperature)
            rows = lambda some, where: part.per_position(
                log_p[where], log_probs(some, self.temperature), states.tokens_N[where]
            )
            total = (weights_N * by_rows(rows, states.student_logits())).sum()
        return Term(total, states.count, self.coefficient, unit=states.unit)


FIELDS = ("ids_B", "tokens_BT", "attention_BT", "counted_BT", "sampled_logp_BT")


def estimated_kl(log_ratio_N: Tensor, kind: Literal["k2", "k3"]) -> Tensor:
    """k2 = x^2 / 2 or k3 = e^x - 1 - x of x = log reference - log q at tokens of q, [N]; see `PolicyGradient`."""
    return log_ratio_N.square() / 2 if kind == "k2" else torch.expm1(log_ratio_N) - log_ratio_N


def picked(batch: TokenBatch, rows: Tensor) -> TokenBatch:
    """Some rows of a batch, with those of everything in `extra` that has one a row."""
    rows = rows.to(batch.tokens_BT.device)
    size = len(batch)

    def part(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[rows] if value.dim() and len(value) == size else value
        return [value[i] for i in rows.tolist()] if isinstance(value, list) and len(value) == size else value

    fields = {name: part(getattr(batch, name)) for name in FIELDS}
    return TokenBatch(**fields, extra={name: part(value) for name, value in batch.extra.items()})


def _placed(batch: TokenBatch, values_N: Tensor) -> Tensor:
    """[N] -> [B, T], zero where nothing counts."""
    return values_N.new_zeros(batch.tokens_BT.shape).masked_scatter(batch.counted_BT, values_N)


def _now(coefficient: Coefficient, step: int) -> float:
    return coefficient(step) if callable(coefficient) else coefficient

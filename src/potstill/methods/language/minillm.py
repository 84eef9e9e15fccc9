"""MiniLLM: the reverse KL of whole sequences by policy gradient, tamed in three ways.

    L = KL(q || p) of sequences,   r_t = log p(y_t) - log q(y_t),   R_t = sum_{s >= t} r_s                   (Eqs. 1-2)
    grad L = -E sum_t [ grad E_{y_t ~ q} r_t  +  R_{t+1} grad log q(y_t) ]           single step + long      (Eq. 3)
    y ~ m = alpha p + (1 - alpha) q token by token,   w_t = q(y_t) / m(y_t)          teacher-mixed sampling  (Eqs. 4-5)
    R_{t+1} / (T - t)                                                                length normalisation    (Eq. 6)
    + L_PT, the next-token loss on pre-training text                                                    (Algorithm 1)

p is the teacher, q the student. The first expectation is exact over the vocabulary: its gradient is that of the mean reverse
KL at the visited states, weighed by w_t (`DivergenceTerm`). The second is a policy gradient with the clipped ratio to the
student that sampled, whose rollouts serve several updates. Ablations: `single_step` false (then R_t with the immediate reward
takes its place), `teacher_mixed` 0, `length_norm` false, `pretraining` 0.

variant "paper": as above, w outside of the clip. "code": microsoft/LMOps differs in that the long part has R_t, immediate
reward included, discounted by 0.95, divided by T - t + 1 and whitened over the batch; the exact part has no w; w is inside of
the clip, so that a token beyond it has no gradient; rewards are doubled (scaling 0.5) and bounded by 100; and L_PT is half
next-token loss, half cross-entropy to p on that text (the KL less p's entropy, of the same gradient). Default: the paper, whose
gradient is that of the objective it states.

Source: arXiv 2306.08543, section 2, and microsoft/LMOps: alpha 0.2, clip 0.2, temperature 1; AdamW with betas 0.9 and 0.95, lr
5e-6 (constant after 100 steps of warm-up), weight decay 1e-6; 5,000 steps; 256 rollouts used for 4 epochs; prompts of 256
tokens, with their answers and texts of 512; L_PT's weight 1. A batch has 64 rollouts in the paper, hence 16 updates of them;
the code's scripts have 64 or 256.
Departs: Eq. 6 prints T - t - 1; we divide by how many rewards are summed, T - t, and the last token has no long part. w_t of
Eq. 5 is a product over the tokens so far; as the paper in practice, we take its last factor alone. The "code" variant whitens
the counted tokens, LMOps the padding too. `updates_per_rollout` and `minibatches` say how rollouts are used; their order is
not shuffled between epochs. L_PT's text is the source's own unless the data brings another; `warm_start` is the paper's first
stage, next-token prediction on the data.
"""

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from potstill.contracts import keyed
from potstill.contracts.batch import Batch, PromptBatch, TokenBatch
from potstill.contracts.errors import DataError, RecipeError
from potstill.contracts.spec import MethodConfig
from potstill.contracts.terms import Loss, Term
from potstill.methods import method
from potstill.methods.language.comparison import compared, start_of
from potstill.methods.language.graded import warm_start
from potstill.objectives.policy import Clip, DivergenceTerm, PolicyGradient
from potstill.objectives.states import Rows
from potstill.objectives.tokens import RolloutSpec, TokenDistillation
from potstill.rollouts.local import sample
from potstill.rollouts.mixed import Mixed
from potstill.run import Result, Run


class MiniLLM(MethodConfig):
    variant: Literal["paper", "code"] = "paper"
    rollouts: RolloutSpec = RolloutSpec(max_new_tokens=256)
    teacher_mixed: float = Field(0.2, ge=0, lt=1)  # alpha
    single_step: bool = True
    length_norm: bool = True
    clip: Clip | None = Clip()
    pretraining: float = Field(1.0, ge=0)  # weight of L_PT
    updates_per_rollout: int = Field(16, ge=1)  # 4 epochs of 4 batches
    minibatches: int = Field(4, ge=1)
    warm_start: int = Field(0, ge=0)
    warm_start_lr: float | None = Field(None, gt=0)


class SequenceReverseKL(PolicyGradient):
    """MiniLLM's gradient. text: token rows of L_PT, drawn with replacement, keyed by step and sample."""

    def __init__(
        self, *parts: Any, variant: str, teacher_mixed: float, single_step: bool, length_norm: bool,
        pretraining: float = 0.0, text: Any | None = None, **options: Any,
    ) -> None:  # fmt: skip
        exact = DivergenceTerm(
            temperature=options.get("temperature", 1.0), weights="importance_BT" if variant == "paper" else None
        )
        super().__init__(*parts, task_coefficient=0.0, extras=(exact,) if single_step else (), **options)
        self.variant, self.teacher_mixed = variant, teacher_mixed
        self.single_step, self.length_norm = single_step, length_norm
        if self.rollouts is None:
            raise RecipeError("MiniLLM continues prompts: give rollouts.")
        if self.rollouts.server is not None and teacher_mixed:
            raise RecipeError(
                "A server samples the student alone. Set method.teacher_mixed to 0, or leave rollouts.server out."
            )
        if pretraining and text is None:
            raise RecipeError("MiniLLM's pre-training loss needs text, or pretraining 0.")
        self.pretraining, self.text = pretraining, text
        reads = self.teacher if variant == "code" else None
        self._reader = (  # in a tuple: its student is ours already
            TokenDistillation(
                self.student, reads, distillation=0.5, cross_entropy=0.5 if reads else 1.0,
                optimizer=self.optimizer, seed=self.seed,
            ),
        )  # fmt: skip

    @property
    def couples(self) -> Literal["position", "group", "batch"]:  # type: ignore[override]
        return "batch" if self.variant == "code" else "position"  # whitening

    def rolled(self, batch: Batch, step: int) -> TokenBatch:
        if not self.teacher_mixed:
            return super().rolled(batch, step)
        if not isinstance(batch, PromptBatch):
            raise DataError("MiniLLM needs prompts to continue, and this data gives finished text.")
        assert self.rollouts is not None and self.teacher is not None
        out = sample(
            Mixed(self.student, self.teacher.model, self.teacher_mixed, self.temperature),  # type: ignore[arg-type]
            batch,
            max_new_tokens=self.rollouts.max_new_tokens,
            samples_per_prompt=self.group,
            seed=keyed.key(self.seed, "rollout", step),
        )
        extra = {**out.extra, "mixed_logp_BT": out.sampled_logp_BT, "version_B": torch.full_like(out.ids_B, step)}
        return replace(out, sampled_logp_BT=None, extra=extra)

    def advantages(self, batch: TokenBatch, rows: Rows, step: int) -> Tensor:
        assert batch.sampled_logp_BT is not None
        counted = batch.counted_BT
        w_BT = torch.ones_like(batch.sampled_logp_BT)
        if "mixed_logp_BT" in batch.extra:
            w_BT = (batch.sampled_logp_BT - batch.extra["mixed_logp_BT"]).exp()
        reward_BR = rows.spread(batch.extra["log_ratio_BT"][counted])
        if self.variant == "paper":
            batch.extra["importance_BT"] = w_BT
            long_BR = to_go(reward_BR, rows.mask_BR, self.length_norm, later=self.single_step)
            return w_BT[counted] * rows.gather(long_BR)
        reward_BR = (reward_BR / 0.5).clamp(-100, 100)
        long_N = rows.gather(to_go(reward_BR, rows.mask_BR, self.length_norm, gamma=0.95))
        return (long_N - long_N.mean()) * (long_N.var() + 1e-8).rsqrt() if len(long_N) > 1 else long_N

    def judged(self, batch: TokenBatch, step: int) -> TokenBatch:
        batch = super().judged(batch, step)
        if self.variant == "code" and "mixed_logp_BT" in batch.extra:  # w inside of the clip: rho w = q / m
            batch = replace(batch, sampled_logp_BT=batch.extra["mixed_logp_BT"])
        return batch

    def loss(self, player: str, batch: Batch, step: int) -> Loss:
        loss = super().loss(player, batch, step)
        if not self.pretraining:
            return loss
        assert self.text is not None
        draws = keyed.uniform(keyed.key(self.seed, "pre-training", step), batch.ids_B.cpu())
        read = self._reader[0].loss(
            player, self.text.batch((draws * len(self.text)).long()).to(batch.ids_B.device), step
        )
        more = {
            f"pretraining_{name}": Term(t.total, t.count, self.pretraining * t.coefficient, unit="text token")
            for name, t in read.terms.items()
        }
        return Loss({**loss.terms, **more}, loss.metrics, loss.positions)


def to_go(reward_BR: Tensor, mask_BR: Tensor, mean: bool, *, later: bool = False, gamma: float = 1.0) -> Tensor:
    """sum_{s >= t} gamma^(s-t) r_s, or from s = t + 1 (`later`), over how many there are if `mean`; 0 where none is."""
    left_BR = mask_BR.to(reward_BR.dtype).flip(1).cumsum(1).flip(1)
    reward_BR = reward_BR.masked_fill(~mask_BR, 0.0)
    total, sums = reward_BR.new_zeros(len(reward_BR)), []
    for column in reversed(reward_BR.unbind(1)):
        total = column + gamma * total
        sums.append(total)
    out = torch.stack(sums[::-1], 1) if sums else reward_BR
    if later:
        out, left_BR = (torch.nn.functional.pad(x[:, 1:], (0, 1)) for x in (out, left_BR))
    return out / left_BR.clamp_min(1) if mean else out


@method("minillm", student="causal_lm", teacher="causal_lm", data=("prompts", "text", "chat"))
def minillm(run: Run, config: MiniLLM) -> Result:
    student, teacher = run.student(), run.teacher()
    warm_start(run, student, config.warm_start, config.warm_start_lr)
    before = start_of(student)
    objective = SequenceReverseKL(
        student,
        teacher,
        optimizer=run.train.optimizer_spec(),
        seed=run.seed,
        rollouts=config.rollouts,
        temperature=config.rollouts.temperature,
        clip=config.clip,
        text=run.tokens() if config.pretraining else None,
        **config.model_dump(exclude={"rollouts", "clip", "warm_start", "warm_start_lr"}),
    )
    run.fit(objective, run.prompts())
    return compared(run, before=before)

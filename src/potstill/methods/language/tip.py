"""TIP: which tokens of the student's own samples are worth learning from.

    L    = (1 / m) sum_t KL(q || p)(c_t),  c_t = (x, y_<t),  y ~ q                                     (Eq. 1)
    h_t  = H(q(. | c_t)) / log V                                                                        (Eq. 2)
    d_t  = KL(q || p)(c_t)                                                                              (Eq. 3)
    s_t  = h^ + d^ - h^ d^ = 1 - (1 - h^)(1 - d^)                                                       (Eq. 7)
    T    = the floor(rho m) positions of the response with the largest s_t                              (Eq. 8)
    L    = (1 / |T|) sum_{t in T} KL(q || p)(c_t)                                                       (Eq. 9)

p the teacher, q the student, V the vocabulary, h^ the entropy clipped at the batch's 98th percentile and brought to [0, 1],
d^ the divergence brought to [0, 1]. Entropy alone cannot tell q's confident errors (Q3: h low, d high) from what it
masters (Q4: both low). `weighting` is the paper's axis, each part one of its rules:
    Uniform: all · EntropyTop: the rule of the entropy · SoftOR, with lowest: the bottom · DivergenceTop
    Overconfident: Q3 alone, ranked by KL(p || q)(1 - h^) · SampledShare: entropy or product sampling; alpha 0: random
and PerResponse(...) around it is the mean of Eq. 9 over the kept positions of each response; without it the unkept count as
zeros, and the step shrinks with rho. A rule that reads the comparison takes a first pass without gradient; the second
makes the vocabulary's rows, and their gradient, at kept positions alone.

Source: TIP, arXiv 2604.14084 (v4). Its code trains on all tokens and never calls the sampler that it has; the rules here
are the paper's. Defaults of its script: 256 prompts a step, one completion of 8,192 tokens at temperature 1 without
truncation, lr 1e-6 (AdamW, weight decay 0.1, clip 1, no warm-up). The paper means over responses; `average: token` over tokens.
Chosen where the paper is silent: high is above the batch's mean in the quadrants' shares; `warm_start` stands for the
pretrained student, and `warm_start_on` names another field of the rows to learn first, so that it is sure and wrong in
known places. `corrected` is the share of held-out tokens that the student then had wrong at a probability of 0.9 or more
(and the teacher right) which it has right at the end.
"""

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from potstill.contracts.batch import Batch
from potstill.contracts.spec import MethodConfig, Part
from potstill.contracts.terms import Loss, Term
from potstill.divergences import FDivergence, ReverseKL, log_probs
from potstill.methods import method
from potstill.methods.language.comparison import compared, start_of
from potstill.methods.language.graded import warm_start
from potstill.models.causal import evaluating
from potstill.objectives.states import TokenStates
from potstill.objectives.tokens import COMPARED, RolloutSpec, TokenDistillation
from potstill.run import Result, Run
from potstill.weighting import PerResponse, Quadrants, SoftOR, Weighting

SURE = 0.9  # the probability of a confident error


class TIP(MethodConfig):
    weighting: Part(Weighting) = PerResponse(SoftOR(0.5))  # type: ignore[valid-type]
    divergence: Part(FDivergence) = ReverseKL()  # type: ignore[valid-type]
    average: Literal["sequence", "token"] = "sequence"
    rollouts: RolloutSpec = RolloutSpec(max_new_tokens=8192)
    temperature: float = Field(1.0, gt=0)
    warm_start: int = Field(0, ge=0)  # steps of next-token prediction before
    warm_start_lr: float | None = Field(None, gt=0)
    warm_start_on: str | None = None  # a field of the rows, in the completion's place


class TokenImportance(TokenDistillation):
    """Token distillation that also watches which share of the positions is kept, and which belongs to each quadrant."""

    def _divergence(self, states: TokenStates, step: int) -> Tensor:
        total = super()._divergence(states, step)
        values, kept_BR = self._positions(states, step), states.weights_BR
        assert kept_BR is not None
        kinds = {"kept": kept_BR != 0}
        if {"student_entropy", "reverse_kl"} <= states.seen.keys():
            everywhere = {name.removesuffix("_BR") for name in self.weighting.needs} & COMPARED
            looked_at = values.mask_BR if everywhere else values.mask_BR & kinds["kept"]
            kinds |= Quadrants.of(replace(values, mask_BR=looked_at))
        self.watched = {name: Term.over(kind[values.mask_BR].float()) for name, kind in kinds.items()}
        return total

    def loss(self, player: str, batch: Batch, step: int) -> Loss:
        loss = super().loss(player, batch, step)
        return replace(loss, metrics={**loss.metrics, **self.watched})


@method("tip", student="causal_lm", teacher="causal_lm", data=("prompts", "text", "chat"))
def tip(run: Run, config: TIP) -> Result:
    student, teacher = run.student(), run.teacher()
    warm_start(run, student, config.warm_start, config.warm_start_lr, config.warm_start_on)
    before = start_of(student)
    objective = TokenImportance(
        student,
        teacher,
        config.divergence,
        optimizer=run.train.optimizer_spec(),
        seed=run.seed,
        rollouts=config.rollouts,
        weighting=config.weighting,
        average=config.average,
        temperature=config.temperature,
    )
    run.fit(objective, run.prompts())
    result = compared(run, before=before, weighed=(objective, run.prompts()))
    metrics = run.stage("confident errors", confident_errors, run, before, student, teacher.model)
    return Result(result.student, {**result.metrics, **metrics})


@torch.no_grad()
def confident_errors(run: Run, before: Any, student: Any, teacher: Any) -> dict[str, float]:
    """Held-out tokens that `before` had wrong and was sure of, the teacher not: how many, and the share now right."""
    rows = run.tokens("test")
    errors, corrected = 0, 0
    with evaluating(before, student, teacher):
        for some in torch.arange(min(len(rows), run.plan.eval.limit or len(rows))).split(run.plan.eval.batch):
            batch = rows.batch(some).to(run.device)
            tokens_N = batch.tokens_counted
            sure, said = log_probs(before.counted_logits(batch)).max(-1)
            wrong = (said != tokens_N) & (sure.exp() >= SURE) & (teacher.counted_logits(batch).argmax(-1) == tokens_N)
            errors += int(wrong.sum())
            corrected += int((wrong & (student.counted_logits(batch).argmax(-1) == tokens_N)).sum())
    return {"confident_errors": float(errors)} | ({"corrected": corrected / errors} if errors else {})

"""On-policy distillation as one formula (survey, arXiv 2604.00626): a divergence on states of a mixture of policies.

    L = E_{y ~ mix} sum_t D_f( p(. | x, y_<t), q(. | x, y_<t) ),   mix = lambda q + (1 - lambda) data        (Eq. 8)
    D_f(p, q) = E_{v ~ q} f(p_v / q_v)                                                                       (Eq. 9)
    J = E_{y ~ q} sum_t [ alpha log(p(y_t) / ref(y_t)) - KL(q || ref) ]                                      (Eq. 14)

p the teacher, q the student. A survey has no trainer: this is the base that the others fill in, every axis an option.
`prefixes` says who writes the states: the student in a share `on_policy` of the steps and the data in the others, or the
teacher. Eq. 14 needs no code of its own: sum_t of it is -KL(q || p*) + const with p* = ref^(1 - alpha) p^alpha / Z, so
alpha != 1 only exchanges the teacher for a product of experts, of which ref, the start, has the weight 1 - alpha.
alpha = 1 is the teacher, whatever ref is; alpha > 1 goes beyond it, until it falls off a cliff that depends on the task.

The survey sums over tokens and its methods average; `average` is "token" here. Its JSD is f = r log r - (r + 1) log((r +
1) / 2), twice ours. Diagnostics are measured with the student's own samples: NLL of them under the teacher by their
length (compounding errors), overlap of the k likeliest tokens (whether teacher and student think alike), both entropies,
the divergence by place, the share of different n-grams.
"""

from typing import Any, Literal

from pydantic import Field

from potstill.contracts.spec import MethodConfig, Part
from potstill.divergences import Estimator, Exact, FDivergence, Full, ReverseKL, SampledReverseKL, Support
from potstill.methods import method
from potstill.methods.language.comparison import compared, start_of
from potstill.methods.language.graded import warm_start
from potstill.objectives.tokens import RolloutSpec, TokenDistillation
from potstill.run import Result, Run
from potstill.teachers import FrozenStart, Panel


class OPDSurvey(MethodConfig):
    divergence: Part(FDivergence) = ReverseKL()  # type: ignore[valid-type]
    support: Part(Support) = Full()  # type: ignore[valid-type]
    estimator: Literal["exact", "sampled"] = "exact"  # sampled: the reverse KL's gradient from the tokens alone
    prefixes: Literal["student", "teacher"] = "student"
    on_policy: float = Field(1.0, ge=0, le=1)  # lambda; the rest of the steps takes the data's text
    alpha: float = Field(1.0, gt=0)  # beyond the teacher above 1
    rollouts: RolloutSpec = RolloutSpec()
    temperature: float = Field(1.0, gt=0)
    average: Literal["token", "sequence"] = "token"
    warm_start: int = Field(0, ge=0)  # steps of next-token prediction on the data before
    warm_start_lr: float | None = Field(None, gt=0)
    lengths: tuple[int, ...] = (16, 64, 128)  # of the samples whose NLL under the teacher is measured

    def part(self) -> Estimator:
        return SampledReverseKL() if self.estimator == "sampled" else Exact(self.divergence, self.support)


@method("opd_survey", student="causal_lm", teacher="causal_lm", data=("prompts", "text", "chat"))
def opd_survey(run: Run, config: OPDSurvey) -> Result:
    student, teacher = run.student(), run.teacher()
    warm_start(run, student, config.warm_start, config.warm_start_lr)
    before = start_of(student)
    beyond: Any = teacher
    if config.alpha != 1:
        beyond = Panel([FrozenStart(student), teacher], (1 - config.alpha, config.alpha), "product")
    objective = TokenDistillation(
        student,
        beyond,
        config.part(),
        optimizer=run.train.optimizer_spec(),
        seed=run.seed,
        rollouts=config.rollouts,
        on_policy=config.on_policy,
        policy=teacher if config.prefixes == "teacher" else None,
        temperature=config.temperature,
        average=config.average,
    )
    run.fit(objective, run.prompts())
    return compared(run, before=before, lengths=config.lengths)

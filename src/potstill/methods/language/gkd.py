"""GKD: on-policy distillation with any divergence, given and self-generated text mixed (arXiv 2306.13649, Algorithm 1).

    with probability lambda:  y ~ q(. | x)    else:  y from the data
    L = mean over y's tokens of D( p(. | x, y_<t), q(. | x, y_<t) )

D is the Jensen-Shannon divergence JSD(beta), beta the teacher's share; no gradient flows through the sampling. GKD starts
from a student that can already write: `warm_start` trains it first on the data's text with the forward KL (`token_kd`).

Departs from the paper: the coin of lambda is drawn once a step, as in its Algorithm 1, but keyed by (seed, step), so that
processes and resumed runs agree. `control` also trains the same start on the same text without a teacher, for as long as
the distillation took: what the teacher is worth.
"""

from pydantic import Field

from potstill.contracts.spec import MethodConfig, Part
from potstill.divergences import FDivergence, ForwardKL, JensenShannon
from potstill.methods import method
from potstill.methods.language.comparison import compared, control, start_of
from potstill.objectives.tokens import RolloutSpec, TokenDistillation
from potstill.run import Result, Run


class GKD(MethodConfig):
    divergence: Part(FDivergence) = JensenShannon(0.5)  # type: ignore[valid-type]
    on_policy: float = Field(0.5, ge=0, le=1)  # lambda; the paper's best results have 1 after supervised training
    rollouts: RolloutSpec = RolloutSpec()
    temperature: float = Field(1.0, gt=0)
    warm_start: int = Field(0, ge=0)  # steps of token_kd before
    warm_start_batch: int | None = Field(None, gt=0)
    control: bool = False


@method("gkd", student="causal_lm", teacher="causal_lm", data=("text", "chat", "prompts"))
def gkd(run: Run, config: GKD) -> Result:
    student, teacher = run.student(), run.teacher()
    before = start_of(student)
    optimizer = run.train.optimizer_spec()
    if config.warm_start:
        warm = TokenDistillation(student, teacher, ForwardKL(), optimizer=optimizer, seed=run.seed)
        batch = config.warm_start_batch or run.train.batch
        run.fit(warm, run.tokens(), stage="token_kd", steps=config.warm_start, batch=batch)
    objective = TokenDistillation(
        student,
        teacher,
        config.divergence,
        optimizer=optimizer,
        seed=run.seed,
        rollouts=config.rollouts,
        on_policy=config.on_policy,
        temperature=config.temperature,
    )
    run.fit(objective, run.prompts(), stage="gkd")
    return compared(run, before=before, control=control(run, before) if config.control else None)

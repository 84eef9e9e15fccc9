"""Token-level distillation on given text (Hinton et al., arXiv 1503.02531, at every token of a language model).

    L = (1 - a) T^2 mean_t D( p(. | y_<t) || q(. | y_<t) ) + a mean_t [ -log q(y_t | y_<t) ]

p the teacher and q the student, both at temperature T; y is text of the data set, so the student is taught on states
that it did not choose. D is the forward KL unless said otherwise. T^2 keeps the gradient's size (Hinton's section 2.1).
"""

from typing import Literal

from pydantic import Field

from potstill.contracts.spec import MethodConfig, Part
from potstill.divergences import Exact, FDivergence, ForwardKL, Full, Support
from potstill.methods import method
from potstill.methods.language.comparison import compared, start_of
from potstill.objectives.tokens import TokenDistillation
from potstill.run import Result, Run
from potstill.weighting import Uniform, Weighting


class TokenKD(MethodConfig):
    divergence: Part(FDivergence) = ForwardKL()  # type: ignore[valid-type]
    support: Part(Support) = Full()  # type: ignore[valid-type]
    weighting: Part(Weighting) = Uniform()  # type: ignore[valid-type]
    temperature: float = Field(1.0, gt=0)
    cross_entropy: float = Field(0.0, ge=0, le=1)  # a: share of the loss on the text's own tokens
    average: Literal["token", "sequence"] = "token"


@method("token_kd", student="causal_lm", teacher="causal_lm", data=("text", "chat", "prompts"))
def token_kd(run: Run, config: TokenKD) -> Result:
    student = run.student()
    before = start_of(student)
    objective = TokenDistillation(
        student,
        run.teacher(),
        Exact(config.divergence, config.support),
        optimizer=run.train.optimizer_spec(),
        seed=run.seed,
        weighting=config.weighting,
        distillation=1 - config.cross_entropy,
        cross_entropy=config.cross_entropy,
        temperature=config.temperature,
        temperature_squared=True,
        average=config.average,
    )
    run.fit(objective, run.tokens())
    return compared(run, before=before, weighed=(objective, run.tokens()))

"""OPSD: one model in two contexts; it learns, on its own answers, what it would say if it had seen a solution.

    p = p_theta'(. | x, y*, y_<n),   q = p_theta(. | x, y_<n),   y ~ q
    L = E mean_n sum_v min( p_v log(p_v / q_v), tau )                                        (Eqs. 6, 8; clip: section 3)
    or, from the sampled tokens, -mean_n sg(log p(y_n) - log q(y_n)) log q(y_n)              (Eq. 9)

The teacher reads the problem with its solution y* and never writes; its weights theta' are the start's ("initial"), their
moving average ("ema"), or the student's own ("live"). Other divergences: JensenShannon(b) is the paper's Eq. 7.

Source: arXiv 2601.18734 v3 and its code: forward KL over the whole vocabulary, tau 0.05, LoRA r 64 alpha 128, lr 5e-6,
batch 32, about 100 steps of 1,024 new tokens at temperature 1.1, top-p 0.95, top-k 20. Both models are read at the
sampling temperature, without T^2, and the average is over the batch's tokens, as in the code; `average: sequence` is
Eq. 6 to the letter.
`clipping` "raw" (the code) bounds the signed entries p log(p / q), which is no divergence: its minimum can lie away from
p, and it works because q starts near. "non-negative" bounds p log(p / q) + q - p, whose sum is the same and whose minimum
is at p. The default is the paper's, since its numbers rest on it. `top_k` keeps the teacher's likeliest tokens,
renormalised in both. `reason_first`: the start writes an analysis of the solution, which the teacher reads too.
Departs: the instruction's words are our own, and the student's prompt keeps its chat template.
"""

from typing import Any, Literal

from pydantic import Field

from potstill.contracts.spec import MethodConfig, Part
from potstill.divergences import Clipped, Estimator, Exact, FDivergence, ForwardKL, Full, SampledReverseKL, TopK
from potstill.methods import method
from potstill.methods.language.comparison import compared, start_of
from potstill.methods.language.graded import accuracy, begun
from potstill.methods.language.writing import written
from potstill.objectives.tokens import RolloutSpec, TokenDistillation
from potstill.run import Result, Run
from potstill.tasks.tokens import Prompts
from potstill.teachers import EMATeacher, FrozenStart, LiveTeacher, LocalTeacher, PrivilegedTeacher
from potstill.teachers.privileged import PrivilegedContext, Solution


class OPSD(MethodConfig):
    divergence: Part(FDivergence) = ForwardKL()  # type: ignore[valid-type]
    clip: float | None = Field(0.05, gt=0)  # tau, nats an outcome; None: unclipped
    clipping: Literal["raw", "non-negative"] = "raw"
    estimator: Literal["full", "sampled"] = "full"
    top_k: int | None = Field(None, ge=1)  # the code's script has 50
    teacher_weights: Literal["initial", "ema", "live"] = "initial"
    ema_decay: float = Field(0.999, ge=0, lt=1)
    solution: Solution = Solution()
    reason_first: int = Field(0, ge=0)  # tokens of the analysis that the start writes first; 0: none
    context: int = Field(2048, gt=0)  # the longest prompt of the teacher, in tokens
    rollouts: RolloutSpec = RolloutSpec(max_new_tokens=1024, temperature=1.1, top_p=0.95, top_k=20)
    temperature: float = Field(1.1, gt=0)  # of both models where they are compared
    average: Literal["token", "sequence"] = "token"
    samples: int = Field(4, ge=1)  # of each held-out prompt, for the accuracy at the rollouts' temperature
    known: dict[str, Any] | str | None = None  # a data section that a packaged student has learnt before

    def part(self) -> Estimator:
        if self.estimator == "sampled":
            return SampledReverseKL()
        divergence = self.divergence
        if self.clip is not None:
            divergence = Clipped(divergence, self.clip, raw=self.clipping == "raw")
        return Exact(divergence, TopK(self.top_k, tail="renormalize") if self.top_k else Full())


@method("opsd", student="causal_lm", data=("prompts", "chat"))
def opsd(run: Run, config: OPSD) -> Result:
    student = begun(run, config.known)
    before = start_of(student)
    teacher: LocalTeacher = {
        "initial": lambda: FrozenStart(student),
        "ema": lambda: EMATeacher(student, config.ema_decay, ramp=False),
        "live": lambda: LiveTeacher(student),
    }[config.teacher_weights]()
    prompts = run.prompts()
    write: Any = config.solution
    if config.reason_first:
        asked = [config.solution(row, "") for _, _, row in prompts.rows]
        reading = Prompts([{"prompt": text} for text in asked], student.tokenizer, config.context, 1)
        answers = written(run, before, reading, "reasons", max_new_tokens=config.reason_first)
        said = [student.tokenizer.decode(answer[0], skip_special_tokens=True) for answer in answers]
        reasons = dict(zip(asked, said, strict=True))
        write = lambda row, completion: (
            f"{reasons[config.solution(row, completion)]}\n{config.solution(row, completion)}"
        )
    context = PrivilegedContext(student.tokenizer, write, config.context)
    objective = TokenDistillation(
        student,
        PrivilegedTeacher(teacher, context),
        config.part(),
        optimizer=run.train.optimizer_spec(),
        seed=run.seed,
        rollouts=config.rollouts,
        temperature=config.temperature,
        average=config.average,
    )
    run.fit(objective, prompts)
    result = compared(run, before=before, teacher=before)
    if run.source.grade is None:
        return result
    models = {"sampled_accuracy": student, "before_sampled_accuracy": before}
    rates = {
        name: run.stage(name, accuracy, run, model, config.rollouts, config.samples) for name, model in models.items()
    }
    return Result(result.student, {**result.metrics, **rates})

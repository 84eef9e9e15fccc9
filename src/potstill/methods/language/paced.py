"""PACED: problems weighed by how often the student solves them, most at the frontier of what it can.

    p^(x) = (1 / K) sum_k c_k(x)     c_k = 1 where the student's k-th answer to problem x is right
    w(p)  = p^alpha (1 - p)^beta     peak at alpha / (alpha + beta); by default p (1 - p)
    L     = E_x[ w(p^(x)) D_x ]      D_x the mean over its answers' tokens of D(p_t, q_t), whole vocabulary, p detached

p_t the teacher, q_t the student, at the states of the student's own answers. What is mastered or out of reach gets
nothing: there the gradient's signal over its noise across problems goes to zero, like a power, and the kernel is the
weight that is optimal for such a law (to a loss of delta^2 where the law is wrong by factors within 1 +- delta).

`weighting` is the paper's axis: BetaKernel, or the baselines Uniform, HardBand, RewardSoftmax (the released code's: it
favours right answers). `divergences`, one a stage, with equal shares of `train.steps`: (ForwardKL, ReverseKL) is the
paper's best, first cover then consolidate; `Adaptive` is the baseline AKL. `teacher: self` is self-distillation: the
student's own start, which reads the solution before the problem. `refresh`: p^ of each step's own rollouts, or
of `estimate` answers to every problem before each stage, frozen for it. `snr` problems' gradients are compared by pass rate
before training: the paper's diagnostic.

Source: PACED, arXiv 2603.11178 (v3), whose released code has no pass-rate weight: K = 8, lr 1e-6 (AdamW, weight decay 0.1,
clip 1), 256 prompts a step, completions of 8,192 tokens at temperature 1 without truncation are its defaults elsewhere.
Chosen where it is silent: K; weights divided by their mean over the step's answers (`mean_one`, as the code divides
its per-sample weights), because raw ones, at most 1/4, shrink the step (that couples the batch: to accumulate, leave
`mean_one` out, or freeze the rates by stage); the hard band [0.2, 0.8]; no prior. Frozen weights are the weighting's own
for the whole data set. `signal over noise` of a bin is |E g|^2 / Var g across its problems, both unbiased.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from potstill.contracts.batch import Batch, TokenBatch
from potstill.contracts.errors import RecipeError
from potstill.contracts.spec import MethodConfig, Part
from potstill.divergences import FDivergence, ForwardKL
from potstill.methods import Role, method
from potstill.methods.language.comparison import compared, start_of
from potstill.methods.language.graded import accuracy, grades, warm_start
from potstill.objectives.tokens import RolloutSpec, TokenDistillation
from potstill.run import Result, Run
from potstill.teachers import FrozenStart, PrivilegedTeacher
from potstill.teachers.privileged import PrivilegedContext, Solution
from potstill.training.probes import GradientNoise, gradient_noise_by
from potstill.weighting import BetaKernel, Positions, RewardItself, Weighting

SAMPLES = 4  # answers to a held-out prompt, of which `pass_rate` is the mean


class PACED(MethodConfig):
    weighting: Part(Weighting) = BetaKernel(mean_one=True)  # type: ignore[valid-type]
    divergences: tuple[Part(FDivergence), ...] = Field((ForwardKL(),), min_length=1)  # type: ignore[valid-type]
    teacher: Literal["model", "self"] = "model"
    solution: str = "completion"  # of `teacher: self`: the rows' field that its context shows
    context_length: int = Field(2048, gt=0)  # of that context, tokens
    refresh: Literal["step", "stage"] = "step"
    estimate: int = Field(8, ge=1)  # K of refresh: stage
    rollouts: RolloutSpec = RolloutSpec(max_new_tokens=8192, samples_per_prompt=8)
    snr: int = Field(0, ge=0)  # problems whose gradients are compared before training
    warm_start: int = Field(0, ge=0)  # steps of next-token prediction before
    warm_start_lr: float | None = Field(None, gt=0)
    warm_start_on: str | None = None  # a field of the rows, in the completion's place


class Frozen(TokenDistillation):
    """Token distillation with a weight for each problem of the data set, made before."""

    weights_P: Tensor

    def collect(self, batch: Batch, step: int) -> TokenBatch:
        out = super().collect(batch, step)
        assert self.rollouts is not None
        problem_B = out.ids_B // self.rollouts.samples_per_prompt % len(self.weights_P)
        out.extra["reward"] = self.weights_P.to(out.ids_B.device)[problem_B]
        return out


@method("paced", student="causal_lm", teacher=Role("causal_lm", optional=True), data="prompts")
def paced(run: Run, config: PACED) -> Result:
    if run.source.grade is None:
        raise RecipeError(
            f"paced weighs problems by how often they are solved, and {run.source.name} grades no answers."
        )
    if config.refresh == "stage":
        weights_of(config.weighting, torch.tensor([[1.0, 0.0, 0.0]]))  # refuses what cannot be frozen, before any work
    student, prompts = run.student(), run.prompts()
    warm_start(run, student, config.warm_start, config.warm_start_lr, config.warm_start_on)
    before = start_of(student)
    alone = config.teacher == "self"
    teacher: Any = PrivilegedTeacher(
        FrozenStart(student), PrivilegedContext(student.tokenizer, Solution(config.solution), config.context_length)
    ) if alone else run.teacher()  # fmt: skip
    how: dict[str, Any] = {
        "optimizer": run.train.optimizer_spec(), "seed": run.seed, "rollouts": config.rollouts, "average": "sequence",
    }  # fmt: skip
    graded: dict[str, Any] = {"reward": run.source.grade, "advantage": 0.0}
    solved = lambda: accuracy(run, student, config.rollouts, SAMPLES)
    metrics = {"before_pass_rate": run.stage("pass rate before", solved)}
    if config.snr:
        plain = TokenDistillation(student, teacher, config.divergences[0], **how, **graded)
        bins = run.stage("snr", signal_over_noise, plain.to(run.device), _single(run, prompts, config.snr))
        run.record(
            "5-snr", "curves", "Signal over noise of the gradient across problems, by pass rate",
            series=[{"label": "|E g|² / Var g", "x": [b["rate"] for b in bins], "y": [b["snr"] for b in bins]}],
            x_label="pass rate of the student", y_label="signal over noise",
        )  # fmt: skip
    for i, divergence in enumerate(config.divergences):
        stage = "distil" if len(config.divergences) == 1 else f"distil-{i + 1}"
        if config.refresh == "step":
            objective = TokenDistillation(student, teacher, divergence, weighting=config.weighting, **how, **graded)
        else:
            objective = Frozen(student, teacher, divergence, weighting=RewardItself(), **how)
            objective.weights_P = run.stage(f"{stage}-weights", frozen_weights, run, config, student, prompts, i)
        run.fit(objective, prompts, stage=stage, steps=-(-run.train.steps // len(config.divergences)))
    metrics["pass_rate"] = run.stage("pass rate", solved)
    result = compared(run, before=before, teacher=before if alone else None, weighed=(objective, prompts))
    return Result(result.student, {**result.metrics, **metrics})


def frozen_weights(run: Run, config: PACED, student: Any, prompts: Any, stage: int) -> Tensor:
    """The weight of every problem, by `estimate` answers of the student as it is now. [P]."""
    assert run.source.grade is not None
    how: dict[str, Any] = {"samples": config.estimate, "seed": run.seed + stage}
    reward_PK = grades(student, prompts, run.source.grade, config.rollouts, **how)
    return weights_of(config.weighting, reward_PK)


def weights_of(weighting: Weighting, reward_PK: Tensor) -> Tensor:
    """What a weighting of problems gives for the grades of their answers, [P, K] -> [P]."""
    mask = torch.ones(reward_PK.numel(), 1, dtype=torch.bool)
    weights_PK = weighting(Positions(mask, reward_B=reward_PK.flatten(), group=reward_PK.shape[1])).view(
        reward_PK.shape
    )
    if not (weights_PK == weights_PK[:, :1]).all():
        raise RecipeError(
            f"{type(weighting).__name__} weighs answers, not problems, so that it cannot be frozen. Set method.refresh: step."
        )
    return weights_PK[:, 0].clone()


def _single(run: Run, prompts: Any, problems: int) -> Iterator[tuple[Batch, int]]:
    for row in range(min(problems, len(prompts))):
        yield prompts.batch(torch.tensor([row])).to(run.device), -1


def signal_over_noise(objective: TokenDistillation, problems: Iterator[tuple[Batch, int]]) -> list[dict[str, float]]:
    """For each pass rate that occurs: how many problems have it, and |E g|^2 / Var g across their gradients."""
    rate = lambda batch: float(batch.extra["reward"].mean())
    noise: dict[Any, GradientNoise] = dict(gradient_noise_by(objective, "student", problems, rate))
    return [
        {"rate": rate, "problems": float(n.repeats), "snr": n.squared_mean / max(n.variance, 1e-30)}
        for rate, n in sorted(noise.items())
    ]

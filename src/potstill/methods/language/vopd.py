"""vOPD: on-policy distillation from one sampled token a state, with the state's closed-form value as control variate.

    J = E_{y ~ q} sum_t r_t,   r_t = log p(y_t | c_t) - log q(y_t | c_t),   c_t = (x, y_<t)
    V(c_t) = E_{v ~ q}[log p(v) - log q(v)] = -KL(q || p)(c_t)                                        (Eq. 9)
    a_t = sg(r_t - b_t),   L = -mean_t a_t log q(y_t | c_t)
    b_t = V(c_t), or of both rows renormalised on the student's k likeliest tokens                    (Eqs. 14-15)

p is the teacher, q the student; only the immediate reward counts (discount 0). Any b_t that does not look at y_t leaves
the gradient unbiased. It is the gradient of the mean reverse KL at the student's own states, nothing flowing through the
sampling. `estimator` is the paper's axis:
    sampled: b = 0 · value: b = V · topk_value: b of the top k · clipped: b = 0 and r_t >= log(clip) / (1 - clip)
    full: KL(q || p) over the vocabulary, no variance · student_topk: the same on the student's top k, renormalised (biased)

Source: "KL for a KL", arXiv 2605.07865, and its code's defaults: lr 1e-5, cosine, no warm-up, no weight decay, 64 prompts
a step, prompts of 1,024 tokens and completions of 2,048, temperature 1 without truncation, bfloat16, and LoRA on all
linear layers: `student.lora: {r: 64, alpha: 128, dropout: 0.05}` (train, data and student sections of a recipe).
Departs: plain policy gradient instead of the clipped-ratio surrogate, the same with one update a rollout; the sampled
token's log-probability comes from whole rows. `clip` is unsourced. Rewards (`task_reward`) are normalised in their group,
advantages of the teacher are not. `warm_start` stands for the pretrained student that the paper starts from: steps of
next-token prediction on the data. The variance probe (`probe`) repeats the rollouts of one batch at fixed weights.
"""

from typing import Literal

import torch
from pydantic import Field

from potstill.contracts.errors import RecipeError
from potstill.contracts.spec import MethodConfig
from potstill.divergences import Estimator, Exact, ReverseKL, SampledReverseKL, TopK
from potstill.methods import method
from potstill.methods.language.comparison import compared, start_of
from potstill.methods.language.graded import warm_start
from potstill.objectives.tokens import RolloutSpec, TokenDistillation
from potstill.run import Result, Run
from potstill.training.checkpoint import checkpoints
from potstill.training.probes import adam_variance, gradient_noise


class VOPD(MethodConfig):
    estimator: Literal["sampled", "value", "topk_value", "clipped", "full", "student_topk"] = "value"
    k: int = Field(100, ge=1)  # of topk_value and student_topk; the released config's kl_top_k
    clip: float = Field(0.1, gt=0, lt=1)  # lambda of clipped; unsourced
    rollouts: RolloutSpec = RolloutSpec(max_new_tokens=2048)
    temperature: float = Field(1.0, gt=0)  # of both models and of the rollouts
    task_reward: bool = False  # add the group advantages of the data's own score, where it has one
    warm_start: int = Field(0, ge=0)  # steps of next-token prediction before
    warm_start_lr: float | None = Field(None, gt=0)
    probe: int = Field(0, ge=0)  # repeated rollouts that measure the gradient's variance, before and after; 0: none
    probe_batch: int = Field(16, gt=0)  # prompts of the probe

    def part(self) -> Estimator:
        return {
            "sampled": SampledReverseKL(),
            "value": SampledReverseKL(baseline="full"),
            "topk_value": SampledReverseKL(baseline="topk", k=self.k),
            "clipped": SampledReverseKL(clip=self.clip),
            "full": Exact(ReverseKL()),
            "student_topk": Exact(ReverseKL(), TopK(self.k, of="student", tail="renormalize")),
        }[self.estimator]


@method("vopd", student="causal_lm", teacher="causal_lm", data=("prompts", "text", "chat"))
def vopd(run: Run, config: VOPD) -> Result:
    if config.task_reward and run.source.grade is None:
        raise RecipeError(f"method.task_reward: {run.source.name} has no score of its own. Set it to false.")
    student, teacher = run.student(), run.teacher()
    warm_start(run, student, config.warm_start, config.warm_start_lr)
    before = start_of(student)
    objective = TokenDistillation(
        student,
        teacher,
        config.part(),
        optimizer=run.train.optimizer_spec(),
        seed=run.seed,
        rollouts=config.rollouts,
        temperature=config.temperature,
        reward=run.source.grade if config.task_reward else None,
    )
    prompts = run.prompts()
    metrics: dict[str, float] = {}

    def noise() -> float:
        objective.to(run.device)
        rows = torch.arange(min(config.probe_batch, len(prompts)))
        return gradient_noise(objective, "student", prompts.batch(rows).to(run.device), config.probe).variance

    if config.probe:
        metrics["gradient_variance"] = run.stage("probe-before", noise)
    run.fit(objective, prompts)
    if config.probe:
        metrics["gradient_variance_after"] = run.stage("probe-after", noise)
    if run.train.optimizer in ("adam", "adamw"):
        newest = lambda: adam_variance(
            checkpoints(run.folder / "checkpoints" / "distil")[-1], "student", run.train.betas
        )
        metrics["adam_variance"] = run.stage("adam-variance", newest)
    result = compared(run, before=before)
    return Result(result.student, {**result.metrics, **metrics})

"""GRPO: reinforcement learning from a verifiable reward, with the other samples of a prompt as the baseline.

    A_i = (r_i - mean r) / std r          over the G samples of a prompt
    J = mean_i mean_t [ min(rho_it A_i, clip(rho_it, 1 - low, 1 + high) A_i) - beta k3(pi_ref / q) ],  rho = q / q_old
    k3(r) = r - 1 - log r

q is the student, q_old the student that sampled, pi_ref the student's start; no teacher takes part. The reward is the data's
own score. Of its siblings, by option:
    DAPO: clip {low: 0.2, high: 0.28}, average "token", reference_kl 0
    Dr. GRPO: normalise false, average "constant", reference_kl 0
    online_rft: A_i = r_i, so that right answers are imitated and wrong ones ignored (online rejection fine-tuning)

Source: DeepSeekMath, arXiv 2402.03300, Eqs. 3-4 and 20-21, section 4.2 (64 samples a question, beta 0.04, lr 1e-6, one update
a rollout, 1,024 tokens); DAPO, arXiv 2503.14476; Dr. GRPO, arXiv 2503.20783. The clip's range is unsourced there; 0.2 is PPO's.
Departs: the reference is the start throughout (the paper renews it a few times in its iterative variant); the reward is a
scorer, not a trained reward model; one reward a completion, none a step. The standard deviation is the unbiased one, plus
1e-4. The mean of k3 is KL(q || pi_ref), but its gradient, since it is differentiated as a loss, that of KL(pi_ref || q);
`reference_estimator: k2` has the other. `warm_start` stands for the supervised model that the paper starts from.
"""

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from potstill.contracts.batch import TokenBatch
from potstill.contracts.errors import RecipeError
from potstill.contracts.spec import MethodConfig
from potstill.methods import method
from potstill.methods.language.comparison import compared, start_of
from potstill.methods.language.graded import accuracy, warm_start
from potstill.objectives.policy import Average, Clip, PolicyGradient
from potstill.objectives.states import Rows
from potstill.objectives.tokens import RolloutSpec
from potstill.rollouts.groups import Baseline
from potstill.run import Result, Run
from potstill.teachers import FrozenStart


class GRPO(MethodConfig):
    signal: Literal["grpo", "online_rft"] = "grpo"
    rollouts: RolloutSpec = RolloutSpec(max_new_tokens=1024, samples_per_prompt=64)
    clip: Clip | None = Clip()
    average: Average = "sequence"
    normalise: bool = True
    baseline: Baseline = "mean"
    reference_kl: float = Field(0.04, ge=0)
    reference_estimator: Literal["k2", "k3"] = "k3"
    entropy: float = Field(0.0, ge=0)
    updates_per_rollout: int = Field(1, ge=1)
    minibatches: int = Field(1, ge=1)
    warm_start: int = Field(0, ge=0)  # steps of next-token prediction on the data before
    warm_start_lr: float | None = Field(None, gt=0)
    samples: int = Field(4, ge=1)  # of each held-out prompt, for the accuracy at temperature 1


class OnlineRFT(PolicyGradient):
    """Every token of a completion weighs its reward: nothing is compared, and nothing unlearnt."""

    def advantages(self, batch: TokenBatch, rows: Rows, step: int) -> Tensor:
        reward_B: Tensor = batch.extra["reward"]
        return reward_B[rows.row_N]


@method("grpo", student="causal_lm", data=("prompts", "chat"))
def grpo(run: Run, config: GRPO) -> Result:
    if run.source.grade is None:
        raise RecipeError(f"grpo: {run.source.name} has no score of its own. Take arithmetic or reasoning_gym.")
    student = run.student()
    warm_start(run, student, config.warm_start, config.warm_start_lr)
    before = start_of(student)
    options: dict[str, Any] = config.model_dump(
        include={
            "average",
            "normalise",
            "baseline",
            "reference_estimator",
            "entropy",
            "updates_per_rollout",
            "minibatches",
        }
    )
    if config.reference_kl:
        options |= {"reference": FrozenStart(before), "reference_kl": config.reference_kl}
    objective = (PolicyGradient if config.signal == "grpo" else OnlineRFT)(
        student,
        optimizer=run.train.optimizer_spec(),
        seed=run.seed,
        rollouts=config.rollouts,
        reward=run.source.grade,
        clip=config.clip,
        temperature=config.rollouts.temperature,
        **options,
    )
    run.fit(objective, run.prompts(), stage="grpo")
    after = run.stage("sampled", accuracy, run, student, config.rollouts, config.samples)
    start = run.stage("sampled-before", accuracy, run, before, config.rollouts, config.samples)
    result = compared(run, before=before, teacher=before)
    sampled = {"sampled_accuracy": after, "before_sampled_accuracy": start, "sampled_gain": after - start}
    return Result(result.student, {**result.metrics, **sampled})

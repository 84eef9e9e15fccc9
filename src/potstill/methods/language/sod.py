"""SOD: step-wise on-policy distillation of agents, whose steps weigh less where the student has drifted off.

    tau = (x, y_1, o_1, ..., y_K, o_K, y_{K+1}),   I_k the tokens of step y_k                                   (Eq. 1)
    A_i = (r_i - mean r) / std r,   clipped surrogate with 1 - 0.2 and 1 + 0.28, token mean                (Eqs. 2-3)
    d_k = mean over I_k of | log q(y_t) - log p(y_t) |                                                          (Eq. 6)
    w_1 = 1,  w_k = min( prod_{u < k} (d_u + e) / (d_{u+1} + e), 1 + delta )                                    (Eq. 7)
    A_t = A_i + c w_k(t) ( log p(y_t) - log q_old(y_t) ),   one clipped update of L_GRPO + L_step            (Eqs. 8-10)

p is the teacher, q the student. Tools' answers are read and never count; d and w are of the student that sampled. The product
telescopes (`StepRatio`). The paper's comparisons are options:
    weighting Uniform: every step alike · {name: ErrorDecay, gamma: 0.9}: decay after the first tool error · gamma 0: the hard
    mask · {name: StepRatio, delta: null}: no bound · {name: AdvantageGate}: the code's older mode
    task_coefficient 0: without GRPO (with Uniform: plain on-policy distillation) · teacher_coefficient 0: GRPO alone

Source: arXiv 2605.07725 and YoungZ365/SOD: e 1e-6, delta 0.2 (the code's dataclass says 0.5), c 1, lr 1e-6, 16 samples a prompt,
batches of 64 in 4 mini-batches, 16 turns, prompts of 2,560 and responses of 20,480 tokens, no reference KL, temperature 1.
Departs: the penalty on overlong responses is left out; the mean KL of a step (Eq. 5), which the paper does not train with
either, is not computed. A step is a turn, also where the environment answers nothing in between. The teacher, GRPO-trained in
the paper, is one that has learnt the source's clean transcripts. `warm_start` on `warm_rows` transcripts is the SFT cold start.
"""

from typing import Any

from pydantic import Field
from torch.nn.functional import pad

from potstill.contracts import keyed
from potstill.contracts.batch import Batch, PromptBatch, TokenBatch
from potstill.contracts.spec import MethodConfig, Part
from potstill.contracts.terms import Loss, Term
from potstill.methods import method
from potstill.methods.language.comparison import compared, start_of
from potstill.methods.language.playing import COLUMNS, cold_start, held_out, reported
from potstill.objectives.policy import Average, Clip, PolicyGradient
from potstill.rollouts.episodes import episodes
from potstill.run import Result, Run
from potstill.tasks.agents import environment_of, played
from potstill.training.tracking import read_journal
from potstill.weighting import Weighting
from potstill.weighting.steps import StepRatio, step_means


class SOD(MethodConfig):
    weighting: Part(Weighting) = StepRatio()  # type: ignore[valid-type]
    task_coefficient: float = Field(1.0, ge=0)
    teacher_coefficient: float = Field(1.0, ge=0)  # opd_coef
    samples: int = Field(16, ge=1)  # episodes of a prompt, which are compared
    max_turns: int = Field(16, ge=1)
    max_new_tokens: int = Field(1280, ge=1)  # of one action
    temperature: float = Field(1.0, gt=0)
    clip: Clip = Clip(low=0.2, high=0.28)
    average: Average = "token"
    updates_per_rollout: int = Field(4, ge=1)
    minibatches: int = Field(4, ge=1)
    warm_start: int = Field(0, ge=0)
    warm_start_lr: float | None = Field(None, gt=0)
    warm_start_batch: int | None = Field(None, gt=0)
    warm_rows: int | None = Field(None, ge=1)  # transcripts of the cold start; None: all
    evaluations: int = Field(4, ge=1)  # episodes of each held-out task; the paper has 32


class SteppedGradient(PolicyGradient):
    """The fused surrogate, with d_k and w_k of each step among its metrics."""

    shown = 16  # steps, whether a batch reaches them or not

    def loss(self, player: str, batch: Batch, step: int) -> Loss:
        loss = super().loss(player, batch, step)
        assert isinstance(batch, TokenBatch)
        metrics = dict(loss.metrics)
        for letter, key in (("d", "log_ratio_BT"), ("w", "weight_BT")):
            if key in batch.extra:
                found = step_means(batch.extra[key].abs(), batch.extra["segment_BT"], batch.counted_BT)
                mean_BK, there_BK = (pad(x, (0, self.shown))[:, : self.shown] for x in found)
                metrics |= {f"{letter}_{k + 1}": Term.over(mean_BK[:, k], there_BK[:, k]) for k in range(self.shown)}
        return Loss(loss.terms, metrics, loss.positions)


@method("sod", student="causal_lm", teacher="causal_lm", data="prompts")
def sod(run: Run, config: SOD) -> Result:
    make = environment_of(run.source, "sod")
    student, teacher = run.student(), run.teacher()
    cold_start(run, make, config.warm_start, config.warm_start_lr, rows=config.warm_rows, batch=config.warm_start_batch)
    before = start_of(student)
    playing: dict[str, Any] = {
        "max_turns": config.max_turns, "max_new_tokens": config.max_new_tokens, "length": run.plan.data.length,
        "temperature": config.temperature,
    }  # fmt: skip

    def rollout(batch: Batch, step: int) -> TokenBatch:
        assert isinstance(batch, PromptBatch)
        seed = keyed.key(run.seed, "episodes", step)
        return episodes(student, make, batch, samples_per_prompt=config.samples, seed=seed, **playing)

    objective = SteppedGradient(
        student,
        teacher,
        optimizer=run.train.optimizer_spec(),
        seed=run.seed,
        rollout=rollout,
        group=config.samples,
        weighting=config.weighting,
        clip=config.clip,
        **config.model_dump(include=SHARED),
    )
    objective.shown = min(SteppedGradient.shown, config.max_turns)
    run.fit(objective, run.prompts())
    models = {"teacher": run.model("teacher"), "student before": before, "student after": student}

    def measured() -> dict[str, Any]:
        tests = held_out(run)
        play = lambda model, i: played(model, teacher, make, tests, seed=keyed.key(run.seed, "played", i), **playing)
        found = {name: [play(model, i) for i in range(config.evaluations)] for name, model in models.items()}
        return {
            name: {key: sum(game[key] for game in games) / len(games) for key in COLUMNS} | {"texts": games[0]["texts"]}
            for name, games in found.items()
        }

    found = run.stage("episodes", measured)
    result = compared(run, before=before, weighed=(objective, run.prompts()))
    found = {name: found[name] for name in models}
    return Result(result.student, {**result.metrics, **reported(run, found), **_drift(run)})


SHARED = {
    "task_coefficient", "teacher_coefficient", "temperature", "average", "updates_per_rollout", "minibatches",
}  # fmt: skip


def _drift(run: Run) -> dict[str, float]:
    """d and w by the number of the step, in the first and the last third of training: curves, and how d has grown."""
    journal = [row for row in read_journal(run.folder / "metrics.jsonl") if row["stage"] == "distil"]
    late = journal[-max(1, len(journal) // 3) :]
    steps: dict[str, list[float]] = {}
    for letter, title in (("d", "Mean |log q - log p| of a step"), ("w", "Weight of a step")):
        curves = []
        for label, rows in (("first third", journal[: max(1, len(journal) // 3)]), ("last third", late)):
            names = [f"student/{letter}_{k + 1}" for k in range(SteppedGradient.shown)]
            known = [[row[name] for row in rows if row.get(name)] for name in names]
            steps[letter] = [sum(values) / len(values) for values in known if values]
            curves.append({"label": label, "x": list(range(1, len(steps[letter]) + 1)), "y": steps[letter]})
        run.record(f"5-{letter}", "curves", f"{title}, by its number", series=curves, x_label="step", y_label=letter)
    later = steps["d"][1:]
    growth = sum(later) / len(later) / steps["d"][0] if later and steps["d"][0] else 1.0
    return {"drift": growth}  # d of the later steps over that of the first, in the last third of training

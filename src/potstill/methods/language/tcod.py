"""TCOD: on-policy distillation of agents, whose students are taken deeper into their episodes as training goes on.

    h_t = (o_0, a_0, ..., a_{t-1}, o_t)                                                                     (Eq. 1)
    L_OPD = E_{tau ~ q} sum_t KL( a_t | h_t )  over the student's turns                                     (Eq. 2)
    k(n) = k_start + floor(n / eta)                                                                         (Eq. 4)
    f2b: the student plays turns 0..k-1 from the start, k <= T_max                             (Eq. 3, Algorithm 1)
    b2f: of a successful trajectory of the teacher, L turns long, the first L - k actions are replayed, then the student
         plays on to the end or T_max, k <= L                                                  (Eq. 5, Algorithm 2)
    A_t = coefficient (log p(y_t) - log q_old(y_t)),  loss = -mean_t min(rho_t A_t, clip(rho_t) A_t)   (released code)

p is the teacher, q the student, both over tokens; a turn's KL is summed over its tokens, a trajectory's over its turns.
Only the student's tokens count: prompts, observations and replayed actions are read. `curriculum: none` is vanilla
multi-turn distillation, `signal: sft` imitates the teacher's successful trajectories instead. Eq. 2 writes KL(p || q),
the code steps along the sampled KL(q || p): `signal: forward` or (default, as the results are the code's) `sampled`.
`indices` says how the off-by-ones of equations, listings and code are read (`rollouts.episodes.Curriculum`); "code" is
the default, the one reading in which k = L leaves no prefix and the last stage is the test's distribution.

Source: arXiv 2604.24005 and kokolerk/TCOD: lr 1e-6, clip 1.0, 16 tasks a step, one episode each, 250 steps, temperature 1
(0.4 in evaluation), responses of 512 tokens, T_max 30 (WebShop 15), ratio clip 0.2 and dual clip 3, k_start 1, eta 2 in
the text and 4 to 6 in its configs, teacher trajectories from pass@10, token mean (ALFWorld's F2B: sequence mean).
Departs: a row is a whole episode with its whole history, not a turn with a window of two: the same terms while nothing
is forgotten. Rollouts are synchronous, so none is stale unless `updates_per_rollout` says so; n counts training steps,
the code's its explorer batches. b2f trains on the tasks that the teacher has solved. `warm_start`, steps of next-token
prediction on the source's own transcripts, stands for the pretrained student. Evaluation goes on the held-out tasks.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field

from potstill.contracts import keyed
from potstill.contracts.batch import Batch, PromptBatch, TokenBatch
from potstill.contracts.errors import DataError
from potstill.contracts.spec import MethodConfig
from potstill.contracts.terms import Loss, Term
from potstill.divergences import ForwardKL
from potstill.methods import method
from potstill.methods.language.comparison import compared, start_of
from potstill.methods.language.playing import cold_start, held_out, imitation, reported, written
from potstill.objectives.policy import Clip, PolicyGradient
from potstill.objectives.tokens import TokenDistillation
from potstill.rollouts.episodes import Curriculum, by_turn, episodes
from potstill.run import Result, Run
from potstill.tasks.agents import environment_of, played
from potstill.tasks.tokens import Prompts
from potstill.training.tracking import read_journal


class TCOD(MethodConfig):
    curriculum: Literal["none", "f2b", "b2f"] = "f2b"
    k_start: int = Field(1, ge=1)
    eta: int = Field(2, ge=1)  # steps that a depth lasts; 2 in the text, 4 to 6 in the released configs
    indices: Literal["code", "paper"] = "code"
    max_turns: int = Field(30, ge=1)  # T_max
    max_new_tokens: int = Field(512, ge=1)  # of one action
    samples: int = Field(1, ge=1)  # episodes of a task in a step
    temperature: float = Field(1.0, gt=0)  # of the rollouts, and of both models there
    signal: Literal["sampled", "forward", "sft"] = "sampled"
    coefficient: float = Field(1.0, gt=0)  # kl_coef
    clip: Clip = Clip(low=0.2, high=0.2, dual=3.0)
    average: Literal["token", "sequence"] = "token"
    updates_per_rollout: int = Field(1, ge=1)
    max_staleness: int | None = Field(2, ge=0)  # steps after which a rollout no longer counts
    attempts: int = Field(10, ge=1)  # episodes of the teacher, in search of a success, of each task
    tasks: int | None = Field(None, ge=1)  # training tasks whose trajectories are sought; None: all
    eval_temperature: float = Field(0.4, gt=0)  # at which success is measured
    warm_start: int = Field(0, ge=0)
    warm_start_lr: float | None = Field(None, gt=0)


class _Watched:
    """Mixed into an objective on episodes: how far from the teacher they were, and how deep they went."""

    def loss(self, player: str, batch: Batch, step: int) -> Loss:
        loss: Loss = super().loss(player, batch, step)  # type: ignore[misc]
        assert isinstance(batch, TokenBatch)
        seen, acted_B = loss.positions, batch.counted_BT.any(1)
        away_BR = seen["reverse_kl"] if "reverse_kl" in seen else -seen["log_ratio"]
        turns_B = (by_turn(batch.counted_BT.float(), batch.extra["segment_BT"]) > 0).sum(1).float()
        found = {"trajectory_kl": Term.over(away_BR.sum(1), acted_B), "turns": Term.over(turns_B, acted_B)}
        return replace(loss, metrics={**loss.metrics, **found})


class EpisodeGradient(_Watched, PolicyGradient):
    """The clipped surrogate on episodes."""


class EpisodeDivergence(_Watched, TokenDistillation):
    """An exact divergence at the states of episodes."""

    def __init__(self, rollout: Callable[[Any, int], TokenBatch], *parts: Any, **options: Any) -> None:
        super().__init__(*parts, **options)
        self.rollout = rollout

    def collect(self, batch: Batch, step: int) -> TokenBatch:
        return self.rollout(batch, step)


@method("tcod", student="causal_lm", teacher="causal_lm", data="prompts")
def tcod(run: Run, config: TCOD) -> Result:
    make = environment_of(run.source, "tcod")
    student, teacher = run.student(), run.teacher()
    cold_start(run, make, config.warm_start, config.warm_start_lr)
    before = start_of(student)
    playing: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "length": run.plan.data.length}
    prompts, curriculum = run.prompts(), Curriculum(config.curriculum, config.k_start, config.eta, config.indices)
    if config.curriculum == "b2f" or config.signal == "sft":
        found = run.stage("trajectories", trajectories, run, config, prompts, playing)
        prompts = solved(run, prompts, found)

    def rollout(batch: Batch, step: int) -> TokenBatch:
        assert isinstance(batch, PromptBatch)
        known = [row["actions"] for row in batch.extra["rows"]]
        return episodes(
            student,
            make,
            batch,
            max_turns=curriculum.max_turns(step, config.max_turns),
            prefixes=[actions[: curriculum.replayed(step, len(actions))] for actions in known],
            samples_per_prompt=config.samples,
            temperature=config.temperature,
            seed=keyed.key(run.seed, "episodes", step),
            **playing,
        )

    data: Any = prompts
    parts: dict[str, Any] = {"optimizer": run.train.optimizer_spec(), "seed": run.seed, "average": config.average}
    parts["temperature"] = config.temperature
    if config.signal == "sft":
        objective, data = imitation(run), written(run, make, [row for _, _, row in prompts.rows])
    elif config.signal == "forward":
        objective = EpisodeDivergence(rollout, student, teacher, ForwardKL(), distillation=config.coefficient, **parts)
    else:
        objective = EpisodeGradient(
            student,
            teacher,
            rollout=rollout,
            group=config.samples,
            task_coefficient=0.0,
            teacher_coefficient=config.coefficient,
            clip=config.clip,
            updates_per_rollout=config.updates_per_rollout,
            max_staleness=config.max_staleness,
            **parts,
        )
    tests = held_out(run)
    play = lambda model, temperature=1.0: played(
        model, teacher, make, tests, max_turns=config.max_turns, temperature=temperature, seed=run.seed, **playing
    )
    run.fit(objective, data, evaluate=lambda step: {k: play(student)[k] for k in ("success", "trajectory_kl")})
    models = {"teacher": run.model("teacher"), "student before": before, "student after": student}
    cool = lambda model: {"success": play(model, config.eval_temperature)["success"]}
    measured = run.stage("episodes", lambda: {name: {**play(model), **cool(model)} for name, model in models.items()})
    result = compared(run, before=before)
    measured = {name: measured[name] for name in models}
    return Result(
        result.student, {**result.metrics, **reported(run, measured), **depths(run, measured, config.samples)}
    )


def trajectories(run: Run, config: TCOD, prompts: Prompts, playing: Mapping[str, Any]) -> dict[str, list[str]]:
    """The actions of the teacher's first success at each training task, by the task's number; others have none."""
    found: dict[str, list[str]] = {}
    tasks = range(min(config.tasks or len(prompts), len(prompts)))
    for attempt in range(config.attempts):
        open_ = [i for i in tasks if str(i) not in found]
        if not open_:
            break
        for rows in torch.tensor(open_).split(run.plan.eval.batch):
            out = episodes(
                run.model("teacher"),
                environment_of(run.source, "tcod"),
                prompts.batch(rows).to(run.device),
                max_turns=config.max_turns,
                seed=keyed.key(run.seed, "teacher", attempt),
                **playing,
            )
            for i, reward, turns in zip(rows.tolist(), out.extra["reward"].tolist(), out.extra["turns"]):
                if reward >= 1:
                    found[str(i)] = [turn["action"] for turn in turns]
    return found


def solved(run: Run, prompts: Prompts, found: Mapping[str, list[str]]) -> Prompts:
    """The tasks that the teacher has solved, with its actions."""
    if not found:
        raise DataError(
            "The teacher has solved none of the tasks, so there is no trajectory to begin from. Train it longer."
        )
    rows = [{**prompts.rows[int(i)][2], "actions": actions} for i, actions in found.items()]
    return Prompts(rows, run.context["tokenizer"], run.plan.data.prompt_length, run.plan.data.length)


def depths(run: Run, measured: Mapping[str, Mapping[str, Any]], samples: int) -> dict[str, float]:
    """The KL by turn, at the end and on the way, for the report; what the training episodes were like, as numbers."""
    students = {name: found["turn_kl"] for name, found in measured.items() if name != "teacher"}
    run.record(
        "5-turns",
        "curves",
        "KL(q || p) of a turn, by its depth, over the episodes that reach it",
        series=[{"label": name, "x": list(range(len(kl))), "y": kl} for name, kl in students.items()],
        x_label="turn",
        y_label="nats",
    )
    journal = read_journal(run.folder / "metrics.jsonl")
    rows = [row for row in journal if row["stage"] == "distil" and "student/trajectory_kl" in row]
    if not rows:  # imitation plays no episodes
        return {}
    lines = {name: [row[f"student/{name}"] for row in rows] for name in ("trajectory_kl", "turns")}
    run.record(
        "6-training",
        "curves",
        "Trajectory KL(q || p) and depth of the training episodes",
        series=[{"label": name, "x": [row["step"] for row in rows], "y": y} for name, y in lines.items()],
        x_label="step",
        y_label="nats; turns",
    )
    early = lines["trajectory_kl"][: max(1, len(rows) // 3)]
    return {
        "early_trajectory_kl": sum(early) / len(early),
        "turns_played": sum(lines["turns"]) * run.train.batch * samples,
    }

"""What the methods of agents share: a cold start on transcripts, held-out tasks, and what is reported of episodes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from potstill.contracts.batch import PromptBatch
from potstill.contracts.players import Objective
from potstill.objectives.tokens import TokenDistillation
from potstill.rollouts.environments import Env
from potstill.run import Run
from potstill.tasks.agents import transcripts
from potstill.tasks.tokens import TokenRows

COLUMNS = ("success", "finished", "errors", "turns", "trajectory_kl")


def imitation(run: Run, lr: float | None = None) -> Objective:
    """Next-token prediction for the student."""
    optimizer = run.train.optimizer_spec(**({"lr": lr} if lr else {}))
    return TokenDistillation(run.student(), None, cross_entropy=1.0, optimizer=optimizer, seed=run.seed)


def written(run: Run, make: Callable[[], Env], rows: Sequence[Mapping[str, Any]]) -> TokenRows:
    """The transcripts of rows' actions, in which the actions count."""
    return transcripts(rows, make, run.context["tokenizer"], run.plan.data.length)


def cold_start(
    run: Run, make: Callable[[], Env], steps: int, lr: float | None = None, rows: int | None = None,
    batch: int | None = None,
) -> None:  # fmt: skip
    """Steps of imitation of the source's own transcripts (of the first `rows`): the stage "warm start"."""
    if steps:
        changes: dict[str, Any] = {"steps": steps, "lr": lr or run.train.lr, "batch": batch or run.train.batch}
        run.fit(imitation(run, lr), written(run, make, run.source.train[:rows]), stage="warm start", **changes)


def held_out(run: Run) -> list[PromptBatch]:
    """The test tasks, as many as `eval` says."""
    prompts = run.prompts("test")
    numbers = torch.arange(min(run.plan.eval.limit or len(prompts), len(prompts)))
    return [prompts.batch(rows).to(run.device) for rows in numbers.split(run.plan.eval.batch)]


def reported(run: Run, measured: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Table and texts of the models' episodes (`tasks.agents.played` of each) for the report; numbers for the run."""
    run.record(
        "4-episodes",
        "table",
        "Held-out tasks from their start",
        columns=["model", *COLUMNS],
        rows=[[name, *(found[column] for column in COLUMNS)] for name, found in measured.items()],
        note="success: mean reward. errors: share of episodes with an action that could not be carried out. trajectory_kl: "
        "sum over an episode's own tokens of log q - log p (p teacher, q the model), nats.",
    )
    shown = [{"prompt": text["prompt"]} for text in next(iter(measured.values()))["texts"]]
    for name, found in measured.items():
        for row, text in zip(shown, found["texts"]):
            turns = [f"{turn['action']} -> {turn['observation']}" for turn in text["turns"]]
            row[name] = " / ".join([*turns, f"({text['ending']})"])
    run.record("7-episodes", "texts", "Episodes of held-out tasks", columns=list(measured), rows=shown)
    return {
        **{f"{name.replace('student ', '')}_success": found["success"] for name, found in measured.items()},
        **{column: measured["student after"][column] for column in COLUMNS},
        "before_trajectory_kl": measured["student before"]["trajectory_kl"],
    }

"""What a model writes before training begins: a teacher's answers, analyses of solutions. Written once, and kept."""

from typing import Any

import torch

from potstill.contracts import keyed
from potstill.evaluation.text import watched
from potstill.rollouts.local import completions_of, sample
from potstill.run import Run
from potstill.tasks.tokens import Prompts


def written(
    run: Run, model: Any, prompts: Prompts, name: str, *, max_new_tokens: int, samples: int = 1,
    temperature: float | None = None,
) -> list[list[list[int]]]:  # fmt: skip
    """A model's answers to every prompt as tokens, `samples` each; greedy without a temperature. A stage of the run."""

    def write() -> list[list[list[int]]]:
        answers: list[list[int]] = []
        for i, rows in enumerate(watched(torch.arange(len(prompts)).split(run.plan.eval.batch), name)):
            out = sample(
                model, prompts.batch(rows).to(run.device), max_new_tokens=max_new_tokens, greedy=temperature is None,
                temperature=temperature or 1.0, samples_per_prompt=samples, seed=keyed.key(run.seed, name, i),
            )  # fmt: skip
            answers += completions_of(out)
        return [answers[i : i + samples] for i in range(0, len(answers), samples)]

    return run.stage(name, write)

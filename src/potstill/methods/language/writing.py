"""What a model writes before training begins: a teacher's answers, analyses of solutions. Written once, and kept."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from potstill.contracts import keyed
from potstill.contracts.batch import TokenBatch
from potstill.evaluation.text import watched
from potstill.rollouts.local import completions_of, sample
from potstill.run import Run
from potstill.tasks.tokens import Prompts


def written(
    run: Run, model: Any, prompts: Prompts, name: str, *, max_new_tokens: int, samples: int = 1,
    temperature: float | None = None,
) -> list[list[list[int]]]:  # fmt: skip
    """A model's answers to every prompt as tokens, `samples` each; greedy without a temperature. A stage of the run."""
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "samples_per_prompt": samples}
    how |= {"greedy": True} if temperature is None else {"temperature": temperature}

    def write() -> list[list[list[int]]]:
        out = answers(run, model, prompts, torch.arange(len(prompts)), name, **how)
        said = [tokens for batch in out for tokens in completions_of(batch)]
        return [said[i : i + samples] for i in range(0, len(said), samples)]

    return run.stage(name, write)


def answers(
    run: Run, model: Any, prompts: Prompts, numbers: Tensor, name: str, **sampling: Any
) -> Iterator[TokenBatch]:
    """A model's answers to the prompts of these numbers, in batches that change nothing."""
    for rows in watched(numbers.split(run.plan.eval.batch) if len(numbers) else (), name):
        yield sample(model, prompts.batch(rows).to(run.device), seed=keyed.key(run.seed, name), **sampling)

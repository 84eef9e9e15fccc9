"""What methods with a grader share: a student that has learnt something before, and how often a model is right."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from potstill.contracts import keyed
from potstill.contracts.errors import RecipeError
from potstill.evaluation.text import answered
from potstill.models.build import is_packaged
from potstill.models.spec import ModelSpec
from potstill.objectives.tokens import RolloutSpec, TokenDistillation
from potstill.run import Run, trained
from potstill.tasks.sources import load, validate
from potstill.tasks.tokens import token_rows

Grade = Callable[[Mapping[str, Any], str], float]


def warm_start(run: Run, student: Any, steps: int, lr: float | None = None, field: str | None = None) -> None:
    """Steps of next-token prediction on the data, or on another `field` of its rows in the completions' place."""
    if not steps:
        return
    lr = lr or run.train.lr
    objective = TokenDistillation(
        student, None, cross_entropy=1.0, optimizer=run.train.optimizer_spec(lr=lr), seed=run.seed
    )
    run.fit(objective, run.tokens() if field is None else _rows_of(run, field), stage="warm start", steps=steps, lr=lr)


def begun(run: Run, known: dict[str, Any] | str | None) -> Any:
    """The student; a packaged one has the weights of the same network trained on other data (`known`, a data section),
    which stands for what a pretrained model knows. That training is done once, and cached."""
    student, spec = run.student(), run.spec("student")
    assert isinstance(spec, ModelSpec)
    if known is not None and is_packaged("causal_lm", spec):
        if spec.lora is not None:
            raise RecipeError("student.lora: a packaged student is small enough to train whole. Leave lora out.")
        data = validate(known)
        base = trained("causal_lm", spec, load(data), run.context, data, run.seed, run.train.device, "student")
        student.network.load_state_dict(base.network.state_dict())
    return student


def _rows_of(run: Run, field: str) -> Any:
    rows = run.source.train
    first = rows[0]
    if not isinstance(first, Mapping) or field not in first:
        has = ", ".join(sorted(first)) if isinstance(first, Mapping) else "text alone"
        raise RecipeError(f"method.warm_start_on: rows of {run.source.name} have no {field}, they have {has}.")
    rows = [{"prompt": row["prompt"], "completion": row[field]} for row in rows]
    return token_rows("prompts", rows, run.context["tokenizer"], run.plan.data.length)


def grades(
    model: Any, prompts: Any, grade: Grade, rollouts: RolloutSpec, *, samples: int, seed: int, limit: int | None = None,
    batch: int = 256,
) -> Tensor:  # fmt: skip
    """Grades of `samples` completions of each prompt (or of the first `limit`), [P, samples]."""
    numbers = torch.arange(min(len(prompts), limit or len(prompts)))
    batches = [prompts.batch(rows) for rows in numbers.split(max(1, batch // samples))]
    how = {**rollouts.sampling, "samples_per_prompt": samples, "seed": keyed.key(seed, "grades")}
    found = [mark for marks, _ in answered(model, batches, grade, **how) for mark in marks]
    return torch.tensor(found).view(-1, samples)


def accuracy(run: Run, model: Any, rollouts: RolloutSpec, samples: int = 1) -> float:
    """The mean grade of the model's samples on held-out prompts."""
    assert run.source.grade is not None
    how: dict[str, Any] = {"samples": samples, "seed": run.seed, "limit": run.plan.eval.limit}
    return float(grades(model, run.prompts("test"), run.source.grade, rollouts, **how).mean())

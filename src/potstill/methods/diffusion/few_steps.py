"""What consistency methods report: the student after one call and after all of its calls, beside teacher and start."""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from potstill.contracts.errors import RecipeError
from potstill.methods.diffusion.comparison import HEUN_STEPS, record_samples, sample_metrics
from potstill.models.denoisers import OneStep, labels_in_turn
from potstill.noise.gaussian import karras_grid
from potstill.run import Result, Run


def generator_of(run: Run, sigma_init: float, steps: list[float]) -> OneStep:
    """The student as a generator whose first call is at sigma_init, the others at `steps`."""
    levels = [sigma_init, *steps]
    if any(b >= a for a, b in pairwise(levels)) or levels[-1] <= 0:
        raise RecipeError(f"method.steps must fall from sigma_init {sigma_init:g} and be positive, got {steps}.")
    return OneStep(run.student(), sigma_init, steps)


def reported(run: Run, objective: Any, before: OneStep, teacher: Any, samples: int = 1000) -> Result:
    """The finished student (its average where there is one) with metrics.

    Unprefixed: all of its calls; `one_` its first call alone; `before_` its start, with all calls; `teacher_` the
    teacher by Heun's method, 35 network calls. See `comparison` for the metrics.
    """
    student: OneStep = (objective.ema.average if objective.ema is not None else objective.generator).eval()
    single = OneStep(student.denoiser, student.sigma_init)
    ids_B = torch.arange(min(samples, run.plan.eval.limit or samples), device=run.device)
    condition = labels_in_turn(student.denoiser, ids_B)
    sigmas = karras_grid(HEUN_STEPS)
    draw: dict[str, tuple[int, Callable[[], Tensor]]] = {
        "teacher_": (2 * HEUN_STEPS - 1, lambda: teacher.sample(ids_B, condition=condition, sigmas=sigmas)),
        "before_": (len(before.levels), lambda: before.sample(ids_B, condition=condition)),
        "one_": (1, lambda: single.sample(ids_B, condition=condition)),
        "": (len(student.levels), lambda: student.sample(ids_B, condition=condition)),
    }
    measure = sample_metrics(run)
    metrics: dict[str, float] = {"calls": float(len(student.levels))}
    rows: list[list[Any]] = []
    drawn: dict[str, Tensor] = {}
    captions: dict[str, str] = {}
    for prefix, (calls, function) in draw.items():
        name = prefix.rstrip("_") or "student"
        drawn[name], captions[name] = function().cpu(), f"{name}, network calls: {calls}"
        numbers = measure(drawn[name])
        metrics |= {prefix + key: value for key, value in numbers.items()}
        rows.append([name, calls, *numbers.values()])
    run.record(
        "comparison", "table", "Student, its start, and the teacher by Heun's method",
        columns=["samples of", "network calls", *numbers], rows=rows,
    )  # fmt: skip
    if run.source.kind == "images" and run.accelerator.is_main_process:
        record_samples(run, drawn, captions)
    return Result(student, metrics)


def distilled(run: Run, config: Any, objective_of: Callable[..., Any]) -> Result:
    """Teacher and generator, the objective of a config, its training, and the numbers at the end."""
    teacher = run.model("teacher")
    generator = generator_of(run, config.sigma_init, config.steps)
    before = copy.deepcopy(generator).eval()
    objective = objective_of(config, generator, teacher, run.train.optimizer_spec(), run.seed)
    run.fit(objective, run.source.train)
    return reported(run, objective, before, teacher)

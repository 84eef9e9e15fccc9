"""What consistency methods report: the student after one call and after all of its calls, beside teacher and start."""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from potstill.contracts.errors import RecipeError
from potstill.evaluation.pictures import save_grid
from potstill.methods.diffusion.comparison import HEUN_STEPS, SHOWN, sample_metrics
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
    rows, files, columns = [], [], []
    for prefix, (calls, function) in draw.items():
        name, drawn = prefix.rstrip("_") or "student", function().cpu()
        numbers = measure(drawn)
        metrics |= {prefix + key: value for key, value in numbers.items()}
        rows.append([name, calls, *numbers.values()])
        columns = ["samples of", "network calls", *numbers]
        if run.source.kind == "images" and run.accelerator.is_main_process:
            path = save_grid(drawn[:SHOWN], run.folder / "records" / f"samples-{name}.png", columns=10)
            files.append({"path": str(path.relative_to(run.folder)), "caption": f"{name}, network calls: {calls}"})
    run.record(
        "comparison", "table", "Student, its start, and the teacher by Heun's method", columns=columns, rows=rows
    )
    if files:
        run.record("samples", "images", "Samples of the same noise and labels", files=files)
    return Result(student, metrics)


def start_of(generator: OneStep) -> OneStep:
    return copy.deepcopy(generator).eval()

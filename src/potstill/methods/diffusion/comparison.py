"""What every one-step diffusion method reports: the student beside its teacher and beside its own start, in numbers and
in pictures."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from potstill.evaluation.images import classifier_features
from potstill.evaluation.pictures import save_grid
from potstill.evaluation.samples import density_coverage, energy_distance, frechet_distance, precision_recall
from potstill.models.denoisers import OneStep, labels_in_turn
from potstill.models.spec import ModelSpec
from potstill.noise.gaussian import karras_grid
from potstill.objectives.matching import DistributionMatching
from potstill.run import Result, Run, trained

HEUN_STEPS = 18
JUDGE = ModelSpec.model_validate("resnet-s")
SHOWN = 60


def compared(run: Run, objective: DistributionMatching, before: OneStep, samples: int = 1000) -> Result:
    """The finished student (its average where there is one) with metrics, a table, and pictures as records.

    fid_own: Frechet distance on the features of this source's own classifier, NOT Inception's FID; with precision,
    recall, density and coverage there. Points: what the source measures, the energy distance, and `width`, the standard
    deviation along the widest axis. Unprefixed numbers are the student's; `teacher_` is the teacher by Heun's method
    (35 network calls), `before_` the student's start, `data_` other real samples.
    """
    student: Any = (objective.ema.average if objective.ema is not None else objective.generator).eval()
    teacher = objective.teacher
    ids_B = torch.arange(min(samples, run.plan.eval.limit or samples), device=run.device)
    condition = labels_in_turn(objective.fake, ids_B)
    sigmas = karras_grid(HEUN_STEPS)
    draw: dict[str, Callable[[], Tensor]] = {
        "teacher": lambda: teacher.sample(ids_B, condition=condition, sigmas=sigmas),
        "before": lambda: before.sample(ids_B, condition=condition),
        "student": lambda: student.sample(ids_B, condition=condition),
    }
    calls = {"teacher": 2 * HEUN_STEPS - 1, "before": len(before.levels), "student": len(student.levels)}
    measure = sample_metrics(run)
    drawn: dict[str, Tensor] = {}
    rows: list[list[Any]] = []
    metrics: dict[str, float] = {}
    for name, function in draw.items():
        began = time.perf_counter()
        drawn[name] = function().cpu()
        numbers = measure(drawn[name])
        metrics |= {(key if name == "student" else f"{name}_{key}"): value for key, value in numbers.items()}
        speed = len(ids_B) / (time.perf_counter() - began)
        rows.append([name, calls[name], speed, *numbers.values()])
        if name == "student":
            metrics |= {"calls": float(calls[name]), "samples_per_second": speed}
    run.record(
        "comparison", "table", "Student, its start, and the teacher by Heun's method",
        columns=["samples of", "network calls", "samples per second", *numbers], rows=rows,
    )  # fmt: skip
    if run.source.kind == "images":
        _pictures(run, objective, student, drawn)
    return Result(student, metrics)


def record_samples(run: Run, drawn: Mapping[str, Tensor], captions: Mapping[str, str]) -> None:
    """Grids of images by name, for the report."""
    files = []
    for name, caption in captions.items():
        path = save_grid(drawn[name][:SHOWN], run.folder / "records" / f"samples-{name}.png", columns=10)
        files.append({"path": str(path.relative_to(run.folder)), "caption": caption})
    run.record("samples", "images", "Samples of the same noise and labels", files=files)


def sample_metrics(run: Run) -> Callable[[Tensor], dict[str, float]]:
    """What measures samples of the run's source: images [N, C, H, W] or points [N, D] -> metrics."""
    return _image_metrics(run) if run.source.kind == "images" else _point_metrics(run)


def _image_metrics(run: Run) -> Callable[[Tensor], dict[str, float]]:
    """Distances to test images on features of a classifier trained on this source, once, and cached."""
    data = run.plan.data
    judge = trained("image_classifier", JUDGE, run.source, run.context, data, run.seed, run.train.device, "judge")
    judge = judge.to(run.device)
    real = run.source.test.batch(torch.arange(min(1000, len(run.source.test)))).images
    real_ND = classifier_features(judge, real)

    def measure(images: Tensor) -> dict[str, float]:
        fake_ND = classifier_features(judge, images.clamp(-1, 1))
        precision, recall = precision_recall(real_ND, fake_ND)
        density, coverage = density_coverage(real_ND, fake_ND)
        return {
            "fid_own": frechet_distance(real_ND, fake_ND), "precision": precision, "recall": recall,
            "density": density, "coverage": coverage,
        }  # fmt: skip

    return measure


def _point_metrics(run: Run) -> Callable[[Tensor], dict[str, float]]:
    real = run.source.test.batch(torch.arange(min(1000, len(run.source.test)))).points_BD

    def measure(points: Tensor) -> dict[str, float]:
        own = run.source.score(points) if run.source.score is not None else {}
        width = torch.linalg.eigvalsh(points.double().T.cov().view(points.shape[1], -1))[-1].sqrt().item()
        return {**own, "energy_distance": energy_distance(real, points), "width": width}

    return measure


def _pictures(run: Run, objective: DistributionMatching, student: Any, drawn: dict[str, Tensor]) -> None:
    if not run.accelerator.is_main_process:
        return
    folder, count = run.folder / "records", len(student.levels)
    captions = {
        "teacher": f"Teacher, Heun's method, {2 * HEUN_STEPS - 1} network calls",
        "before": "The student's start: the teacher asked once",
        "student": f"Student, {count} network call{'s' * (count > 1)}",
    }
    record_samples(run, drawn, captions)
    files = []
    ids_B = torch.arange(10, device=run.device)
    condition = labels_in_turn(objective.fake, ids_B)
    x = drawn["student"][:10].to(run.device)
    for sigma in (0.2, 0.8, 2.5, 10.0):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
        x_t = x + sigma * noise
        with torch.no_grad():
            answers = [model(x_t, sigma, condition) for model in (objective.fake, objective.teacher)]
        strip = torch.cat([x, x_t / (1 + sigma), *answers])
        path = save_grid(strip, folder / f"predictions-{sigma:g}.png", columns=10)
        files.append({"path": str(path.relative_to(run.folder)), "caption": f"sigma {sigma:g}"})
    title = "Why a run collapses: rows are the student's samples, noised, the fake score's answer, the teacher's answer"
    run.record("predictions", "images", title, files=files)

"""What the classification methods share: options, one training stage, and what they report of teacher, student, control."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from potstill.contracts import keyed
from potstill.contracts.errors import DataError, ModelError
from potstill.contracts.spec import MethodConfig, Part
from potstill.objectives.feature_terms import FeatureTerm
from potstill.objectives.logits import LogitDistillation, LogitLoss, LogitTransform, SampleWeight, Supervised
from potstill.run import Result, Run
from potstill.teachers import LocalTeacher


class ClassifierConfig(MethodConfig):
    """Options of every method that distils classifiers."""

    rows: int | None = Field(None, gt=0)  # training rows that the student sees; the teacher was trained on all
    control: bool = False  # also train the same start on labels alone, for as many steps


class LogitConfig(ClassifierConfig):
    """Options of every method that compares logits."""

    teacher_scale: float = Field(1.0, gt=0)  # factor on the teacher's logits, before all else
    weights: list[Part(SampleWeight)] = []  # type: ignore[valid-type]  # of samples in the logit loss, multiplied


# Feature terms of (student, teacher, a few images), which tell the shapes.
Features = Callable[[Any, LocalTeacher, Tensor], Sequence[FeatureTerm]]


@dataclass(frozen=True)
class ScaleTeacher(LogitTransform):
    """The teacher's logits times a factor."""

    factor: float = 1.0

    def __call__(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        return student, self.factor * teacher


def distilled(
    run: Run,
    config: LogitConfig,
    loss: LogitLoss,
    *,
    cross_entropy: float,
    distillation: float,
    transforms: Sequence[LogitTransform] = (),
    warmup: float = 0.0,
    label_smoothing: float = 0.0,
    features: Features | None = None,
    measure: Callable[[Any], dict[str, float]] | None = None,
) -> Result:
    """Distil the student from the teacher's logits and measure it. `warmup` is a share of the steps; `measure` gives
    further numbers of a finished model."""
    student, teacher = run.student(), run.teacher()
    check_classes(run, {"teacher": teacher.model, "student": student})
    rows = training_rows(run, config.rows)
    control = copy.deepcopy(student) if config.control else None
    scaled = [ScaleTeacher(config.teacher_scale)] if config.teacher_scale != 1 else []
    objective = LogitDistillation(
        student,
        teacher,
        loss,
        optimizer=run.train.optimizer_spec(),
        cross_entropy=cross_entropy,
        distillation=distillation,
        transforms=[*scaled, *transforms],
        weights=config.weights,
        warmup=round(warmup * run.train.steps),
        label_smoothing=label_smoothing,
        features=feature_terms(run, features, rows) if features else (),
    )
    run.fit(objective, rows, evaluate=lambda step: run.evaluate(student))
    if control is not None:
        run.fit(Supervised(control, optimizer=run.train.optimizer_spec()), rows, stage="control")
    return compared(run, student, teacher, control, measure)


def feature_terms(run: Run, features: Features, rows: Any) -> Sequence[FeatureTerm]:
    """The terms, what they own drawn from the run's seed."""
    images = rows.batch(torch.arange(min(2, len(rows)))).images.to(run.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed.key(run.seed, "init", "features") & (2**63 - 1))
        terms = features(run.student(), run.teacher(), images)
    return [term.to(run.device) for term in terms]


def check_classes(run: Run, models: Mapping[str, Any]) -> None:
    """Refuse models whose head knows other classes than the data, before any training."""
    classes = run.source.context["classes"]
    for role, model in models.items():
        if model.classes != classes:
            raise ModelError(
                f"{role} {model.name} knows {model.classes} classes, but {run.source.name} has {classes}. "
                f"Give a {role} with a head for these classes."
            )


def training_rows(run: Run, rows: int | None) -> Any:
    """The first `rows` training rows, or all."""
    size = len(run.source.train)
    if rows is not None and rows > size:
        raise DataError(f"method.rows must lie in 1..{size} for {run.source.name}, got {rows}.")
    return run.source.subset(rows).train


def compared(
    run: Run,
    student: Any,
    teacher: LocalTeacher,
    control: Any | None = None,
    measure: Callable[[Any], dict[str, float]] | None = None,
) -> Result:
    """Measure teacher, student and control on the test rows, keep the table, and hand back the student."""
    models = {"teacher": teacher.model, "student": student, "control": control}
    models = {name: model for name, model in models.items() if model is not None}
    values = run.stage("comparison", _measure, run, models, teacher, measure)
    run.record(
        "1-comparison",
        "table",
        "Teacher, student and control" if control is not None else "Teacher and student",
        columns=["model", "accuracy", "nll", "ece", "agreement with the teacher", "KL(p || q)", "parameters"],
        rows=[
            [
                name,
                *(values[name][k] for k in ("accuracy", "nll", "ece", "teacher_agreement", "teacher_kl", "parameters")),
            ]
            for name in models
        ],
        note="On held-out images; p is the teacher, q the row's model, nats an image. "
        + ("The control is the same start trained on labels alone for as many steps." if control is not None else ""),
    )
    metrics = dict(values["student"])
    for name in models:
        if name != "student":
            further = [key for key in values[name] if not key.startswith("teacher_")]  # agreement is the student's
            metrics |= {f"{name}_{key}": values[name][key] for key in further}
    return Result(student=student, metrics=metrics)


def _measure(
    run: Run,
    models: Mapping[str, Any],
    teacher: LocalTeacher,
    measure: Callable[[Any], dict[str, float]] | None = None,
) -> dict[str, dict[str, float]]:
    count = lambda model: sum(p.numel() for p in model.parameters())
    return {
        name: {
            **run.evaluate(model, teacher=teacher),
            "parameters": count(model),
            **(measure(model) if measure else {}),
        }
        for name, model in models.items()
    }

"""What the classification methods share: options, one training stage, and what they report of teacher, student, control."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field
from torch import Tensor

from potstill.contracts.errors import DataError, ModelError
from potstill.contracts.spec import MethodConfig
from potstill.objectives.logits import LogitDistillation, LogitLoss, LogitTransform, Supervised
from potstill.run import Result, Run
from potstill.teachers import LocalTeacher


class LogitConfig(MethodConfig):
    """Options of every method that compares logits."""

    teacher_scale: float = Field(1.0, gt=0)  # factor on the teacher's logits, before all else
    rows: int | None = Field(None, gt=0)  # training rows that the student sees; the teacher was trained on all
    control: bool = False  # also train the same start on labels alone, for as many steps


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
) -> Result:
    """Distil the student from the teacher's logits and measure it. `warmup` is a share of the steps."""
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
        warmup=round(warmup * run.train.steps),
    )
    run.fit(objective, rows, evaluate=lambda step: run.evaluate(student))
    if control is not None:
        run.fit(Supervised(control, optimizer=run.train.optimizer_spec()), rows, stage="control")
    return compared(run, student, teacher, control)


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


def compared(run: Run, student: Any, teacher: LocalTeacher, control: Any | None = None) -> Result:
    """Measure teacher, student and control on the test rows, keep the table, and hand back the student."""
    models = {"teacher": teacher.model, "student": student, "control": control}
    models = {name: model for name, model in models.items() if model is not None}
    values = run.stage("comparison", _measure, run, models, teacher)
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
            metrics |= {f"{name}_{key}": values[name][key] for key in ("accuracy", "nll", "ece", "parameters")}
    return Result(student=student, metrics=metrics)


def _measure(run: Run, models: Mapping[str, Any], teacher: LocalTeacher) -> dict[str, dict[str, float]]:
    count = lambda model: sum(p.numel() for p in model.parameters())
    return {
        name: {**run.evaluate(model, teacher=teacher), "parameters": count(model)} for name, model in models.items()
    }

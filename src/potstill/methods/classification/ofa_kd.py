"""OFA-KD: a student of any architecture learns from its teacher's logits at exits on all its stages (arXiv 2310.19444).

    L   = a_gt CE(z, y) + a_kd L_OFA(z; gamma_last) + a_ofa sum_k L_OFA(z_k; gamma_k)
    L_OFA(z; gamma) = -sum_v [ (p_v + m_v)^gamma - m_v ] log softmax(z / tau)_v,    p = softmax(v / tau), m = one-hot(y)

z_k = branch_k(stage k of the student) are logits, so that features of unlike networks need not be compared; the teacher's own
features are never used. Branches learn with the student and are dropped at export. With a_gt = a_kd = 1 the head's label
weighs (1 + p_y)^gamma: the -m is there because the cross-entropy supplies it. gamma 1 is cross-entropy with the teacher.

Source: the official code (distiller, projectors, configs); the paper's own equation was not read. `form: paper` raises the
label's weight alone and keeps the 1; use it with cross_entropy 0. The code's defaults are gamma 1, all weights 1; its README
has gamma 1.5 for DeiT-T -> ResNet18 on ImageNet, and the authors' CIFAR-100 run a_ofa 0.1. Stages that a network names are
taken (four at most; of 12 blocks those after 2, 4, 10, 12), or those in `layers`. Departures: networks of other than four
stages; an exit for flat features; log_softmax in the place of log(softmax). `similarity` keeps a table of the linear CKA of
teacher and student stages: the paper's motive, not a part of the training.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from potstill.contracts.errors import RecipeError
from potstill.divergences import cka
from potstill.methods import method
from potstill.methods.classification.comparison import LogitConfig, distilled
from potstill.objectives.feature_terms import Exits, Stage, exit_branch, features_at, penultimate, stages_of
from potstill.objectives.logits import SoftTarget
from potstill.objectives.targets import Powered
from potstill.run import Result, Run
from potstill.teachers import LocalTeacher


class OFA(LogitConfig):
    gamma: float | list[float] = 1.0  # one, or one a stage and one for the head
    temperature: float = Field(1.0, gt=0)  # tau
    form: Literal["code", "paper"] = "code"
    stages: list[int] | None = None  # which have an exit, from 1; null: all
    layers: list[str] | None = None  # module names of the student's stages; null: found
    cross_entropy: float = Field(1.0, ge=0)  # a_gt
    distillation: float = Field(1.0, ge=0)  # a_kd
    exits: float = Field(1.0, ge=0)  # a_ofa
    label_smoothing: float = Field(0.0, ge=0, lt=1)  # 0.1 in the authors' CNN configs
    similarity: bool = False  # keep a table of CKA

    @field_validator("gamma")
    @classmethod
    def _positive(cls, value: float | list[float]) -> float | list[float]:
        if not value or min(value if isinstance(value, list) else [value]) <= 0:
            raise ValueError("gamma must be positive")
        return value

    def loss(self, gamma: float) -> SoftTarget:
        return SoftTarget(Powered(gamma, self.temperature, self.form), self.temperature)


def powers(gamma: float | list[float], exits: int) -> list[float]:
    """One gamma an exit, and the head's."""
    if isinstance(gamma, list) and len(gamma) != exits + 1:
        raise RecipeError(f"method.gamma has {len(gamma)} values; {exits} exits and the head need {exits + 1}, or one.")
    return gamma if isinstance(gamma, list) else [gamma] * (exits + 1)


def exits_of(config: OFA, student: Any, teacher: LocalTeacher, images: Tensor) -> tuple[list[Stage], int]:
    """The student's stages that get an exit, and the width of the exits' last features."""
    stages = stages_of(student, images, config.layers)
    chosen = config.stages if config.stages is not None else [s.index for s in stages]
    if not chosen or not set(chosen) <= {s.index for s in stages} or len(set(chosen)) < len(chosen):
        raise RecipeError(f"method.stages must name some of the student's stages 1..{len(stages)}, got {chosen}.")
    own, theirs = penultimate(student, images).width, penultimate(teacher.model, images).width
    return [s for s in stages if s.index in chosen], own if stages[0].kind == "tokens" else max(own, theirs)


@method("ofa_kd", student="image_classifier", teacher="image_classifier", data="images")
def ofa_kd(run: Run, config: OFA) -> Result:
    student, teacher = run.student(), run.teacher()
    images = run.source.train.batch(torch.arange(2)).images.to(run.device)
    stages, width = exits_of(config, student, teacher, images)
    *gammas, last = powers(config.gamma, len(stages))

    def features(student: Any, teacher: LocalTeacher, images: Tensor) -> Sequence[Exits]:
        branches = [exit_branch(stage, width, student.classes) for stage in stages]
        return [Exits(stages, branches, [config.loss(gamma) for gamma in gammas], config.exits)]

    result = distilled(
        run,
        config,
        config.loss(last),
        cross_entropy=config.cross_entropy,
        distillation=config.distillation,
        label_smoothing=config.label_smoothing,
        features=features if config.exits else None,
    )
    if config.similarity:
        _keep_similarity(run, student, teacher)
    return result


@torch.no_grad()
def _keep_similarity(run: Run, student: Any, teacher: LocalTeacher, most: int = 512) -> None:
    """Linear CKA (unbiased) of every stage of the teacher with every one of the student, on test images."""
    test = run.source.test
    images = test.batch(torch.arange(min(most, len(test)))).images.to(run.device)
    views = []
    for model in (teacher.model, student.eval()):
        stages = stages_of(model, images[:2])
        with features_at(model, stages) as seen:
            model(images)
        views.append({s.layer: x.flatten(1).double() for s, x in zip(stages, seen.of(stages))})
    run.record(
        "2-similarity",
        "table",
        "Linear CKA of the teacher's stages (rows) and the student's",
        columns=["teacher", *views[1]],
        rows=[
            [name, *(cka(teacher=a, student=b, unbiased=True).item() for b in views[1].values())]
            for name, a in views[0].items()
        ],
        note=f"On {len(images)} held-out images; 1 for features equal up to rotation and scale.",
    )

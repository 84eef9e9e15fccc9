"""FitNets: a hint from a middle layer of the teacher, then distillation (arXiv 1412.6550).

    stage 1, up to the guided layer:  L = mean | r(g(x)) - h(x) |^2                               Eq. 3, but for a factor
    stage 2, the whole student:       L = CE(z, y) + l CE( softmax(v / T), softmax(z / T) )        Eqs. 1-2

g and h are the student's guided and the teacher's hint layer (by default the middle stages), r a regressor that is learnt
in stage 1 and dropped. l falls linearly from 4 to 1 and T = 3 in the paper's experiments, as far as known at second hand;
no T^2 stands before it. `joint: true` is the form of later comparisons (CRD, arXiv 1910.10699): one stage, the label's
cross-entropy and `hint` times the hint, 100 there.

Departures: r is a 1x1 convolution after an average pooling where the student's map is larger (a linear map for tokens and
vectors), not a convolution whose kernel makes up the difference in size; stage 1 lasts `hint_share` of train.steps,
where the paper stops on a validation set; the hint is a mean over features, where Eq. 3 has half of the sum.
"""

import copy
from typing import Any

from pydantic import Field

from potstill.methods import method
from potstill.methods.classification.comparison import (
    ClassifierConfig,
    check_classes,
    compared,
    feature_terms,
    training_rows,
)
from potstill.objectives.feature_terms import Hint, stages_of
from potstill.objectives.logits import LogitDistillation, SoftTarget, Supervised
from potstill.objectives.targets import TeacherProbabilities
from potstill.run import Result, Run


class FitNet(ClassifierConfig):
    student_layer: str | None = None  # guided layer, a module's name; null: the middle stage
    teacher_layer: str | None = None  # hint layer
    hint_share: float = Field(0.5, gt=0)  # length of stage 1 over that of stage 2
    temperature: float = Field(3.0, gt=0)  # T
    start: float = Field(4.0, ge=0)  # l at the first step of stage 2
    end: float = Field(1.0, ge=0)  # and at the last
    joint: bool = False  # one stage, hint and labels together
    hint: float = Field(100.0, ge=0)  # weight of the hint where joint


class Annealed(LogitDistillation):
    """The distillation's weight moves linearly from `start` to `end` over so many steps."""

    def __init__(self, *args: Any, start: float, end: float, over: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self.start, self.end, self.over = start, end, over

    def weight(self, step: int) -> float:
        return self.start + (self.end - self.start) * min(step / self.over, 1.0)


@method("fitnet", student="image_classifier", teacher="image_classifier", data="images")
def fitnet(run: Run, config: FitNet) -> Result:
    student, teacher = run.student(), run.teacher()
    check_classes(run, {"teacher": teacher.model, "student": student})
    rows, optimizer = training_rows(run, config.rows), run.train.optimizer_spec()
    control = copy.deepcopy(student) if config.control else None

    def hint(student: Any, teacher: Any, images: Any) -> list[Hint]:
        middle = lambda model: (found := stages_of(model, images))[(len(found) - 1) // 2].layer
        layers = config.student_layer or middle(student), config.teacher_layer or middle(teacher.model)
        return [Hint(student, teacher, images, *layers, coefficient=config.hint if config.joint else 1.0)]

    features = feature_terms(run, hint, rows)
    loss = SoftTarget(TeacherProbabilities(config.temperature), config.temperature)
    evaluate = lambda step: run.evaluate(student)
    alone = LogitDistillation(
        student,
        teacher,
        loss,
        optimizer=optimizer,
        cross_entropy=float(config.joint),
        distillation=0.0,
        features=features,
    )
    if config.joint:
        run.fit(alone, rows, evaluate=evaluate)
    else:
        run.fit(alone, rows, stage="hint", steps=max(1, round(config.hint_share * run.train.steps)))
        second = Annealed(
            student,
            teacher,
            loss,
            optimizer=optimizer,
            cross_entropy=1.0,
            start=config.start,
            end=config.end,
            over=max(1, run.train.steps - 1),
        )
        run.fit(second, rows, evaluate=evaluate)
    if control is not None:
        run.fit(Supervised(control, optimizer=optimizer), rows, stage="control")
    return compared(run, student, teacher, control)

"""ND loss (KD++): a student's penultimate feature points to its class's mean and is as long as the teacher's (2305.17007).

    L_ND = 1 - <f_s, e_y> / max(|f_s|, |f_t|),   e_k = c_k / |c_k|,   c_k the teacher's mean feature of class k
    L    = a CE(z, y) + b w(step) T^2 KL( softmax(v / T) || softmax(z / T) ) + g L_ND

f_s and f_t are what enters the last linear layer. A shorter student grows along e_y (gradient -e_y / |f_t|), a longer one only
turns. w grows from 0 to 1 over `warmup`; the ND term is not warmed up. Where the widths differ, BatchNorm, Dropout(0.5) and
a linear map bring the student's feature to the teacher's for this term alone; they are dropped at export. Class means are
those of the teacher in evaluation mode over one pass of the training rows, augmented as in training.

`base` is the logit loss beside it (KD++, DKD++, DIST++). a, b, g and T are those of ResNet56 -> ResNet20 on CIFAR-100; the
authors tune b and g by pair, so keep b where arms are compared. `mode` holds the ablations: "direction" is 1 - cos(f_s, e_y),
"norm" (|f_s| - |f_t|)^2, one of the two forms that the paper tries. `directions: classifier` takes the rows of the teacher's
last layer for c_k. Departures: w grows by step, not by epoch (the first epoch is not without KD); means are not rounded to
four decimals, nor kept in a file. Source: the official code.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from potstill.contracts.errors import DataError
from potstill.contracts.spec import Part
from potstill.divergences import cosine_distance, norm_and_direction
from potstill.methods import method
from potstill.methods.classification.comparison import LogitConfig, distilled, training_rows
from potstill.objectives.feature_terms import FeatureTerm, Scored, features_at, penultimate
from potstill.objectives.logits import KD, LogitLoss
from potstill.run import Result, Run

Mode = Literal["nd", "direction", "norm"]


class NormAndDirection(FeatureTerm):
    """The ND loss of the penultimate features, or one of its halves. directions [V, D]: c_k, a buffer."""

    name = "nd"
    directions: Tensor

    def __init__(
        self,
        student: Any,
        teacher: Any,
        images: Tensor,
        directions_VD: Tensor,
        mode: Mode = "nd",
        coefficient: float = 1.0,
    ) -> None:
        mine, theirs = penultimate(student, images), penultimate(teacher.model, images)
        super().__init__([mine], [theirs], coefficient)
        self.mode = mode
        self.register_buffer("directions", directions_VD.clone())
        same = mine.width == theirs.width
        self.transform = (
            nn.Identity()
            if same
            else nn.Sequential(nn.BatchNorm1d(mine.width), nn.Dropout(0.5), nn.Linear(mine.width, theirs.width))
        )

    def forward(self, student: list[Tensor], teacher: list[Tensor], scored: Scored) -> Tensor:  # type: ignore[override]
        own, theirs, e = self.transform(student[0]), teacher[0].detach(), self.directions[scored.labels_B]
        match self.mode:
            case "nd":
                return norm_and_direction(teacher=theirs, student=own, direction=e)
            case "direction":
                return cosine_distance(teacher=e.expand_as(own), student=own)
            case "norm":
                return (own.norm(dim=-1) - theirs.norm(dim=-1)).square()


@torch.no_grad()
def class_means(model: Any, rows: Any, classes: int, device: Any, batch: int = 512) -> Tensor:
    """Mean penultimate feature of every class over one pass, in evaluation mode. [V, D]. Raises DataError for a class
    without rows."""
    stage = penultimate(model, rows.batch(torch.arange(1)).images.to(device))
    total, count = torch.zeros(classes, stage.width, device=device), torch.zeros(classes, device=device)
    for index in torch.arange(len(rows)).split(batch):
        here = rows.batch(index).to(device)
        with features_at(model.eval(), [stage]) as seen:
            model(here.images)
        features = seen.of([stage])[0].float()
        total.index_add_(0, here.labels_B, features)
        count.index_add_(0, here.labels_B, torch.ones(len(features), device=device))
    if (count == 0).any():
        raise DataError(f"Class {int((count == 0).nonzero()[0])} has no training row, and so no mean. Use more rows.")
    return total / count[:, None]


class ND(LogitConfig):
    base: Part(LogitLoss) = KD(4.0)  # type: ignore[valid-type]
    mode: Mode = "nd"
    directions: Literal["means", "classifier"] = "means"
    cross_entropy: float = Field(1.0, ge=0)  # a
    distillation: float = Field(1.0, ge=0)  # b
    nd: float = Field(2.0, ge=0)  # g
    warmup: float = Field(20 / 240, ge=0, le=1)  # share of the steps


@method("nd_loss", student="image_classifier", teacher="image_classifier", data="images")
def nd_loss(run: Run, config: ND) -> Result:
    teacher = run.teacher()
    rows, model, classes = training_rows(run, config.rows), teacher.model, run.student().classes
    means = run.stage("class_means", class_means, model, rows, classes, run.device).to(run.device)
    directions = (
        means if config.directions == "means" else dict(model.named_parameters())[f"{model.head_name}.weight"].detach()
    )

    @torch.no_grad()
    def geometry(measured: Any) -> dict[str, float]:
        """How a model's features lie on the test images: cosine with their class's mean (one width), and length."""
        test = run.source.test
        stage = penultimate(measured.eval(), test.batch(torch.arange(2)).images.to(run.device))
        found = []
        for index in torch.arange(len(test)).split(512):
            batch = test.batch(index).to(run.device)
            with features_at(measured, [stage]) as seen:
                measured(batch.images)
            f = seen.of([stage])[0]
            e = means[batch.labels_B]
            cosine = 1 - cosine_distance(teacher=e, student=f) if f.shape == e.shape else f.new_zeros(len(f))
            found.append(torch.stack([cosine, f.norm(dim=-1)]))
        cosine_, norm = torch.cat(found, 1).double().mean(1).tolist()
        return {"feature_norm": norm} | ({"direction_cosine": cosine_} if stage.width == means.shape[1] else {})

    return distilled(
        run,
        config,
        config.base,
        cross_entropy=config.cross_entropy,
        distillation=config.distillation,
        warmup=config.warmup,
        features=lambda student, teacher, images: (
            [NormAndDirection(student, teacher, images, directions, config.mode, config.nd)] if config.nd else []
        ),
        measure=geometry,
    )

"""Logit distillation of classifiers: one position a sample, the teacher's whole distribution over classes.

    L = cross_entropy * CE(z, y) + distillation * w(step) * D(v', z'),   w(step) = min(step / warmup, 1)

z student and v teacher logits, z' and v' the same after the transforms. CE always sees the raw z. A paper is a choice
of the logit loss D, the transforms before it and the two coefficients. B samples, V classes, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from potstill.contracts.batch import Batch, ImageBatch
from potstill.contracts.errors import DataError, ModelError, RecipeError
from potstill.contracts.players import Objective, OptimizerSpec, Player
from potstill.contracts.signals import FullLogits, Teacher, check_signals
from potstill.contracts.spec import Part
from potstill.contracts.terms import Loss, Term
from potstill.divergences import FDivergence, ForwardKL, log_probs
from potstill.divergences.logits import dist_terms, dkd_terms, standardize
from potstill.models.taps import batch_statistics, tap
from potstill.objectives.blocks import Projector


@dataclass(frozen=True)
class LogitTransform:
    """What happens to both logits [B, V] before they are compared; cross-entropy does not see it."""

    def __call__(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


@dataclass(frozen=True)
class Standardize(LogitTransform):
    """Z-score of each row: zero mean, unit standard deviation (LSKD, arXiv 2403.01427). The temperature comes after.

    of: which logits. unbiased: divide by V - 1, as the paper's code. detach: no gradient through mean and deviation.
    """

    of: Literal["both", "teacher", "student"] = "both"
    unbiased: bool = True
    detach: bool = False

    def __post_init__(self) -> None:
        if self.of not in ("both", "teacher", "student"):
            raise RecipeError(f"Standardize.of must be both, teacher or student, got {self.of!r}.")

    def __call__(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        z = lambda x: standardize(x, unbiased=self.unbiased, detach=self.detach)
        return (
            student if self.of == "teacher" else z(student),
            teacher if self.of == "student" else z(teacher),
        )


@dataclass(frozen=True)
class LogitLoss:
    """How far apart student and teacher logits are: named parts, one value a sample each, already weighed."""

    couples: ClassVar[Literal["position", "batch"]] = "position"

    def __call__(self, student: Tensor, teacher: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
        """[B, V], [B, V], [B] -> {name: [B]}."""
        raise NotImplementedError


@dataclass(frozen=True)
class KD(LogitLoss):
    """T^2 D(softmax(v / T), softmax(z / T)), D = KL(p || q) by default (Hinton et al., arXiv 1503.02531).

    temperature_squared keeps the gradient's size as T grows. It belongs to the KLs, whose gradient falls as 1 / T^2;
    CV-DD (arXiv 2501.07575) trains without it.
    """

    temperature: float = 4.0
    divergence: Part(FDivergence) = field(default_factory=ForwardKL)  # type: ignore[valid-type]
    temperature_squared: bool = True

    def __post_init__(self) -> None:
        _positive(self, "temperature")

    def __call__(self, student: Tensor, teacher: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
        values_B = self.divergence(
            teacher_logp=log_probs(teacher, self.temperature), student_logp=log_probs(student, self.temperature)
        )
        return {"kd": values_B * (self.temperature**2 if self.temperature_squared else 1.0)}


@dataclass(frozen=True)
class DKD(LogitLoss):
    """T^2 (alpha TCKD + beta NCKD): target against the rest, and the rest among themselves (arXiv 2203.08679).

    With alpha = 1 and beta = 1 - p_target(teacher) it would be KD; a constant beta frees the second part.
    """

    alpha: float = 1.0
    beta: float = 8.0
    temperature: float = 4.0

    def __post_init__(self) -> None:
        _positive(self, "temperature")

    def __call__(self, student: Tensor, teacher: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
        tckd_B, nckd_B = dkd_terms(student, teacher, labels_B, self.temperature)
        squared = self.temperature**2
        return {"tckd": self.alpha * squared * tckd_B, "nckd": self.beta * squared * nckd_B}


@dataclass(frozen=True)
class DIST(LogitLoss):
    """T^2 (beta inter + gamma intra): one minus Pearson correlations of the probabilities, over the classes of each
    sample and over the samples of each class (arXiv 2205.10536). The second couples the batch."""

    beta: float = 1.0
    gamma: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "temperature")

    @property
    def couples(self) -> Literal["position", "batch"]:  # type: ignore[override]
        return "batch" if self.gamma else "position"

    def __call__(self, student: Tensor, teacher: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
        squared = self.temperature**2
        inter_B, intra_V = dist_terms(student, teacher, self.temperature)
        parts = {"inter": self.beta * squared * inter_B}
        if self.gamma:  # the mean over classes, given to every sample alike
            parts["intra"] = (self.gamma * squared * intra_V.mean()).expand(len(student))
        return parts


def _positive(part: Any, name: str) -> None:
    if getattr(part, name) <= 0:
        raise RecipeError(f"{type(part).__name__}.{name} must be positive, got {getattr(part, name)}.")


Part(LogitLoss)
Part(LogitTransform)


class Hint(nn.Module):
    """A feature term: mean squared error between a student's layer, projected, and a teacher's (FitNets, 1412.6550).

    Made on a few images, which tell the shapes. Layers are module names of the two adapters.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        images: Tensor,
        student_layer: str,
        teacher_layer: str,
        coefficient: float = 1.0,
    ) -> None:
        super().__init__()
        self.student_layer, self.teacher_layer, self.coefficient = student_layer, teacher_layer, coefficient
        shapes = []
        for model, layer in ((student, student_layer), (teacher.model, teacher_layer)):
            with torch.no_grad(), batch_statistics(model), tap(model, [layer]) as taps:  # leaves the model as it was
                model(images)
            shapes.append(taps.outputs[layer].shape)
        self.projector = Projector(*shapes)

    def forward(self, student_features: Tensor, teacher_features: Tensor) -> Tensor:
        """One value a sample. [B]."""
        return (self.projector(student_features) - teacher_features.detach()).square().flatten(1).mean(1)


class Supervised(Objective):
    """Cross-entropy on the labels: how teachers and controls are trained.

    student: an ImageClassifier, or any module from a batch (its images, where it has some) to logits [B, V].
    label_smoothing: share of the target spread evenly over all classes.
    """

    def __init__(self, student: nn.Module, *, optimizer: OptimizerSpec, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise RecipeError(f"label_smoothing must lie in 0 <= s < 1, got {label_smoothing}.")
        self.student, self.optimizer, self.label_smoothing = student, optimizer, label_smoothing

    @property
    def players(self) -> dict[str, Player]:
        return {"student": Player([self.student], self.optimizer)}

    def logits(self, batch: Any) -> Tensor:
        """The student's logits, in float32 or better. [B, V]. Raises DataError for labels it does not know."""
        logits_BV = self.student(batch.images if isinstance(batch, ImageBatch) else batch)
        _check_labels(batch.labels_B, logits_BV.shape[1])
        return logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))

    def loss(self, player: str, batch: Any, step: int) -> Loss:
        logits_BV = self.logits(batch)
        return Loss(
            {"ce": self._cross_entropy(logits_BV, batch.labels_B, 1.0)}, self._metrics(logits_BV, batch.labels_B)
        )

    def _cross_entropy(self, logits_BV: Tensor, labels_B: Tensor, coefficient: float) -> Term:
        values_B = F.cross_entropy(logits_BV, labels_B, reduction="none", label_smoothing=self.label_smoothing)
        return Term.over(values_B, coefficient=coefficient, unit="sample")

    def _metrics(self, logits_BV: Tensor, labels_B: Tensor) -> dict[str, Term]:
        return {"accuracy": Term.over((logits_BV.argmax(-1) == labels_B).float(), unit="sample")}


class LogitDistillation(Supervised):
    """Distil a classifier from its teacher's logits, with labels and feature terms where wanted.

    teacher: gives FullLogits. logit_loss: a LogitLoss, or an FDivergence (at temperature 1). transforms: before the
    loss, in order. warmup: steps over which the loss's weight grows from 0 to `distillation`.
    hints: feature terms, for teachers in this process.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        logit_loss: LogitLoss | FDivergence = KD(),
        *,
        optimizer: OptimizerSpec,
        cross_entropy: float = 0.1,
        distillation: float = 0.9,
        transforms: Sequence[LogitTransform] = (),
        warmup: int = 0,
        label_smoothing: float = 0.0,
        hints: Sequence[Hint] = (),
    ) -> None:
        super().__init__(student, optimizer=optimizer, label_smoothing=label_smoothing)
        check_signals(type(self).__name__, FullLogits, teacher)
        if hints and not hasattr(teacher, "model"):
            raise ModelError(f"Feature terms need a teacher in this process, and {teacher.name} gives logits alone.")
        self.teacher = teacher
        loss = KD(1.0, logit_loss) if isinstance(logit_loss, FDivergence) else logit_loss
        self.logit_loss, self.couples = loss, loss.couples
        self.cross_entropy, self.distillation, self.warmup = cross_entropy, distillation, warmup
        self.transforms = list(transforms)
        self.hints = nn.ModuleList(hints)

    @property
    def players(self) -> dict[str, Player]:
        return {"student": Player([self.student, *self.hints], self.optimizer)}

    def weight(self, step: int) -> float:
        """The distillation coefficient at a step."""
        return self.distillation * (min(step / self.warmup, 1.0) if self.warmup else 1.0)

    def compared(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Both logits [B, V] after the transforms, the teacher's without gradient."""
        teacher = teacher.detach().to(student.dtype)
        if teacher.shape != student.shape:
            raise ModelError(
                f"Student logits are {list(student.shape)}, those of teacher {self.teacher.name} {list(teacher.shape)}: "
                f"both must know the same classes."
            )
        for transform in self.transforms:
            student, teacher = transform(student, teacher)
        return student, teacher

    def loss(self, player: str, batch: Any, step: int) -> Loss:
        hints: list[Any] = list(self.hints)
        with tap(self.student, [h.student_layer for h in hints]) as mine:
            logits_BV = self.logits(batch)
        signal, theirs = self._scored(batch, [h.teacher_layer for h in hints])
        parts = self.logit_loss(*self.compared(logits_BV, signal), batch.labels_B)
        terms = {}
        if self.cross_entropy:
            terms["ce"] = self._cross_entropy(logits_BV, batch.labels_B, self.cross_entropy)
        weight = self.weight(step)
        terms |= {name: Term.over(values_B, coefficient=weight, unit="sample") for name, values_B in parts.items()}
        for i, hint in enumerate(hints):
            values_B = hint(mine.outputs[hint.student_layer], theirs[hint.teacher_layer])
            terms[f"hint_{i}"] = Term.over(values_B, coefficient=hint.coefficient, unit="sample")
        whole_B = torch.stack(list(parts.values())).sum(0).detach()
        agree_B = (logits_BV.argmax(-1) == signal.argmax(-1)).float()
        metrics = self._metrics(logits_BV, batch.labels_B) | {
            "distance": Term.over(whole_B, unit="sample"),
            "agreement": Term.over(agree_B, unit="sample"),
        }
        return Loss(terms, metrics, {"distance": whole_B})

    def _scored(self, batch: Batch, layers: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The teacher's logits and its tapped layers, in one pass without gradient."""
        teacher: Any = self.teacher
        with torch.no_grad():
            if not layers:
                return teacher.score(batch, FullLogits).logits, {}
            with tap(teacher.model, layers) as taps:
                return teacher.score(batch, FullLogits).logits, taps.outputs


def _check_labels(labels_B: Tensor, classes: int) -> None:
    if len(labels_B) == 0:
        raise DataError("A batch holds no samples.")
    low, high = int(labels_B.min()), int(labels_B.max())
    if low < 0 or high >= classes:
        raise DataError(f"Labels lie in {low}..{high}, but the student knows the classes 0..{classes - 1}.")

"""Logit distillation of classifiers: one position a sample, the teacher's whole distribution over classes.

    L = cross_entropy * CE(z, y) + distillation * w(step) * c D(v', z') + feature terms,   w(step) = min(step / warmup, 1)

z student and v teacher logits, z' and v' the same after the transforms; c weighs samples. CE always sees the raw z. A paper
is a choice of the logit loss D, the transforms before it, the weights and the coefficients. B samples, V classes.
"""

import math
from collections.abc import Mapping, Sequence
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
from potstill.divergences import FDivergence, ForwardKL, entropy, log_probs
from potstill.divergences.family import one_of
from potstill.divergences.logits import dist_terms, dkd_terms, standardize
from potstill.objectives.feature_terms import FeaturesAt, FeatureTerm, Scored, Stage, features_at
from potstill.objectives.targets import Target, TeacherProbabilities


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
class Tempered(LogitTransform):
    """Logits over a temperature of their own. With the same one on both sides, a loss sees what it would at that one."""

    student: float = 1.0
    teacher: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "student")
        _positive(self, "teacher")

    def __call__(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        return student / self.student, teacher / self.teacher


@dataclass(frozen=True)
class Softened(LogitTransform):
    """log((1 - share) p + share / V) in the place of the teacher's logits: part of its mass spread evenly."""

    share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise RecipeError(f"Softened.share must lie in 0 <= share < 1, got {self.share}.")

    def __call__(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        if self.share == 0:
            return student, teacher
        classes = teacher.shape[-1]
        even = torch.full_like(teacher, math.log(self.share / classes))
        return student, torch.logaddexp(log_probs(teacher) + math.log1p(-self.share), even)


@dataclass(frozen=True)
class SampleWeight:
    """How much a sample counts in the logit loss: (student [B, V], teacher [B, V], labels [B]) -> [B], no gradient.

    It sees the raw logits. A term is divided by all samples, not by the weights' sum.
    """

    def __call__(self, student: Tensor, teacher: Tensor, labels_B: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Confident(SampleWeight):
    """1 where a model's likeliest class is the label, else 0: confident instances (MDCS, arXiv 2308.09922)."""

    of: Literal["teacher", "student"] = "teacher"

    def __post_init__(self) -> None:
        one_of(self, "of", self.of, ("teacher", "student"))

    @torch.no_grad()
    def __call__(self, student: Tensor, teacher: Tensor, labels_B: Tensor) -> Tensor:
        logits = teacher if self.of == "teacher" else student
        return (logits.argmax(-1) == labels_B).to(student.dtype)


@dataclass(frozen=True)
class AboveThreshold(SampleWeight):
    """1 where the teacher's largest probability is above a threshold, else 0: one for all classes, or one a class, which is
    that of its likeliest class (`class_thresholds`)."""

    threshold: float | tuple[float, ...] = 0.95

    def __post_init__(self) -> None:
        given = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
        if not given or not all(0 <= t < 1 for t in given):
            raise RecipeError(f"AboveThreshold.threshold must lie in 0 <= t < 1, got {self.threshold}.")

    @torch.no_grad()
    def __call__(self, student: Tensor, teacher: Tensor, labels_B: Tensor) -> Tensor:
        confidence, predicted = log_probs(teacher).exp().max(-1)
        if not isinstance(self.threshold, tuple):
            return (confidence > self.threshold).to(student.dtype)
        if len(self.threshold) != teacher.shape[-1]:
            raise RecipeError(
                f"AboveThreshold has {len(self.threshold)} thresholds, but the teacher knows {teacher.shape[-1]} classes."
            )
        return (confidence > confidence.new_tensor(self.threshold)[predicted]).to(student.dtype)


def class_thresholds(predicted_N: Tensor, classes: int, top: float = 0.95) -> Tensor:
    """top * r / (2 - r) a class, r = N_c / max N the share of predictions that fall on it: rare classes pass more easily.

    [N] int64 -> [V]. Source: KD3, arXiv 2307.11469; a class that is never predicted gets 0.
    """
    counts = predicted_N.bincount(minlength=classes).double()
    r = counts / counts.max().clamp_min(1)
    return top * r / (2 - r)


@dataclass(frozen=True)
class EntropyGate(SampleWeight):
    """`high` where the named model's distribution has the larger entropy, strictly, else 1 (BD-KD, arXiv 2212.12965).

    temperature: at which entropies are taken.
    """

    of: Literal["teacher", "student"] = "teacher"
    high: float = 2.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        one_of(self, "of", self.of, ("teacher", "student"))
        _positive(self, "high")
        _positive(self, "temperature")

    @torch.no_grad()
    def __call__(self, student: Tensor, teacher: Tensor, labels_B: Tensor) -> Tensor:
        theirs, own = (entropy(log_probs(x, self.temperature)) for x in (teacher, student))
        higher = theirs > own if self.of == "teacher" else own > theirs
        return torch.where(higher, self.high, 1.0).to(student.dtype)


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


@dataclass(frozen=True)
class SoftTarget(LogitLoss):
    """-sum_v w_v log q_v with a target w of teacher and label, q the student's at a temperature; no T^2, and no entropy of
    the target taken off."""

    target: Part(Target) = field(default_factory=TeacherProbabilities)  # type: ignore[valid-type]
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "temperature")

    def __call__(self, student: Tensor, teacher: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
        w, log_q = self.target(teacher, labels_B), log_probs(student, self.temperature)
        return {"target": -torch.where(w > 0, w * log_q, 0.0).sum(-1)}


def _positive(part: Any, name: str) -> None:
    if getattr(part, name) <= 0:
        raise RecipeError(f"{type(part).__name__}.{name} must be positive, got {getattr(part, name)}.")


Part(LogitLoss)
Part(LogitTransform)
Part(SampleWeight)


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
    loss, in order. weights: of samples, multiplied. warmup: steps over which the loss's weight grows from 0 to
    `distillation`; feature terms are not warmed up. Those that read the teacher's features need it in this process.
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
        weights: Sequence[SampleWeight] = (),
        warmup: int = 0,
        label_smoothing: float = 0.0,
        features: Sequence[FeatureTerm] = (),
    ) -> None:
        super().__init__(student, optimizer=optimizer, label_smoothing=label_smoothing)
        check_signals(type(self).__name__, FullLogits, teacher)
        if any(term.teacher_stages for term in features) and not hasattr(teacher, "model"):
            raise ModelError(f"Feature terms need a teacher in this process, and {teacher.name} gives logits alone.")
        self.teacher = teacher
        loss = KD(1.0, logit_loss) if isinstance(logit_loss, FDivergence) else logit_loss
        self.logit_loss = loss
        self.couples = "batch" if "batch" in (loss.couples, *(term.couples for term in features)) else "position"
        self.cross_entropy, self.distillation, self.warmup = cross_entropy, distillation, warmup
        self.transforms, self.weights = list(transforms), list(weights)
        self.features = nn.ModuleList(features)

    @property
    def players(self) -> dict[str, Player]:
        return {"student": Player([self.student, *self.features], self.optimizer)}

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
        terms_of: list[Any] = list(self.features)
        with features_at(self.student, [s for term in terms_of for s in term.student_stages]) as mine:
            logits_BV = self.logits(batch)
        signal, theirs = self._scored(batch, [s for term in terms_of for s in term.teacher_stages])
        parts = self.logit_loss(*self.compared(logits_BV, signal), batch.labels_B)
        for weight in self.weights:
            weight_B = weight(logits_BV.detach(), signal.to(logits_BV.dtype), batch.labels_B)
            parts = {name: values_B * weight_B for name, values_B in parts.items()}
        terms = {}
        if self.cross_entropy:
            terms["ce"] = self._cross_entropy(logits_BV, batch.labels_B, self.cross_entropy)
        share = self.weight(step)
        terms |= {name: Term.over(values_B, coefficient=share, unit="sample") for name, values_B in parts.items()}
        scored = Scored(logits_BV, signal.detach().to(logits_BV.dtype), batch.labels_B)
        for i, term in enumerate(terms_of):
            values_B = term(mine.of(term.student_stages), theirs.of(term.teacher_stages), scored)
            name = term.name if [t.name for t in terms_of].count(term.name) == 1 else f"{term.name}_{i}"
            terms[name] = Term.over(values_B, coefficient=term.coefficient, unit="sample")
        whole_B = torch.stack(list(parts.values())).sum(0).detach()
        agree_B = (logits_BV.argmax(-1) == signal.argmax(-1)).float()
        metrics = self._metrics(logits_BV, batch.labels_B) | {
            "distance": Term.over(whole_B, unit="sample"),
            "agreement": Term.over(agree_B, unit="sample"),
        }
        return Loss(terms, metrics, {"distance": whole_B})

    def _scored(self, batch: Batch, stages: Sequence[Stage]) -> tuple[Tensor, FeaturesAt]:
        """The teacher's logits and its features at some stages, in one pass without gradient."""
        teacher: Any = self.teacher
        with torch.no_grad(), features_at(getattr(teacher, "model", None), stages) as seen:
            return teacher.score(batch, FullLogits).logits, seen


class MutualDistillation(Objective):
    """Classifiers that learn together, each from the labels and from the others' logits, which are constants to it.

        L_i = cross_entropy * CE(z_i, y) + mean over its peers j of D_i(z_j, z_i)

    networks: by name, the student among them. losses: D_i by the network's name; one that has none learns from labels
    alone. One player holds all: as no gradient passes between networks, it is one optimizer for each, but for the gradient
    norm, which train.clip bounds for all together. Source: deep mutual learning, arXiv 1706.00384.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        losses: Mapping[str, LogitLoss],
        *,
        optimizer: OptimizerSpec,
        cross_entropy: float = 1.0,
    ) -> None:
        super().__init__()
        if len(networks) < 2:
            raise ModelError(f"Mutual distillation needs at least two networks, got {len(networks)}.")
        for name in losses:
            if name not in networks:
                raise RecipeError(f"A loss is given for {name}, but the networks are {', '.join(networks)}.")
        self.networks, self.losses = nn.ModuleDict(networks), dict(losses)
        self.optimizer, self.cross_entropy = optimizer, cross_entropy
        self.couples = "batch" if any(loss.couples == "batch" for loss in losses.values()) else "position"

    @property
    def players(self) -> dict[str, Player]:
        return {"networks": Player([self.networks], self.optimizer)}

    def loss(self, player: str, batch: Any, step: int) -> Loss:
        labels_B, logits = batch.labels_B, {name: network(batch.images) for name, network in self.networks.items()}
        logits = {name: z.to(torch.promote_types(z.dtype, torch.float32)) for name, z in logits.items()}
        shapes = {name: list(z.shape) for name, z in logits.items()}
        if len({tuple(shape) for shape in shapes.values()}) > 1:
            raise ModelError(f"Networks that learn together must know the same classes; their logits are {shapes}.")
        _check_labels(labels_B, next(iter(logits.values())).shape[1])
        terms, metrics = {}, {}
        for name, z in logits.items():
            ce_B = F.cross_entropy(z, labels_B, reduction="none")
            terms[f"{name}_ce"] = Term.over(ce_B, coefficient=self.cross_entropy, unit="sample")
            metrics[f"{name}_accuracy"] = Term.over((z.argmax(-1) == labels_B).float(), unit="sample")
            if name not in self.losses:
                continue
            peers = [self.losses[name](z, other.detach(), labels_B) for peer, other in logits.items() if peer != name]
            for part in peers[0]:
                values_B = torch.stack([values[part] for values in peers]).mean(0)
                terms[f"{name}_{part}"] = Term.over(values_B, unit="sample")
        return Loss(terms, metrics)


def _check_labels(labels_B: Tensor, classes: int) -> None:
    if len(labels_B) == 0:
        raise DataError("A batch holds no samples.")
    low, high = int(labels_B.min()), int(labels_B.max())
    if low < 0 or high >= classes:
        raise DataError(f"Labels lie in {low}..{high}, but the student knows the classes 0..{classes - 1}.")

"""What a classifier learns from its teacher's logits: targets over classes, and an order of classes with weights.

Everything here is detached. B samples, V classes; p is the teacher's distribution, m the label as a one-hot row.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from potstill.contracts.errors import ModelError, RecipeError
from potstill.contracts.spec import Part
from potstill.divergences import PlaceWeights, TeacherSoftmax, exit_weights, log_probs, teacher_order
from potstill.divergences.family import one_of, promoted


class Target:
    """Base: weights w [B, V] of the loss -sum_v w_v log q_v, from the teacher's logits [B, V] and labels [B].

    They are not negative, and need no sum of 1.
    """

    @torch.no_grad()
    def __call__(self, teacher: Tensor, labels_B: Tensor) -> Tensor:
        if teacher.dim() != 2 or labels_B.shape != teacher.shape[:1]:
            raise ModelError(
                f"A target takes teacher logits [B, V] and one label a row, got {list(teacher.shape)} and labels "
                f"{list(labels_B.shape)}. Give the likeliest class of a soft label."
            )
        return self.weights(promoted(teacher), labels_B)

    def weights(self, teacher: Tensor, labels_B: Tensor) -> Tensor:
        raise NotImplementedError


Part(Target)


@dataclass(frozen=True)
class TeacherProbabilities(Target):
    """p at a temperature: the loss is KL(p || q) + H(p)."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise RecipeError(f"TeacherProbabilities.temperature must be positive, got {self.temperature}.")

    def weights(self, teacher: Tensor, labels_B: Tensor) -> Tensor:
        return log_probs(teacher, self.temperature).exp()


@dataclass(frozen=True)
class Powered(Target):
    """OFA's target (arXiv 2310.19444 and its code).

        code:  (1 + p_y)^gamma - 1 at the label, p_v^gamma elsewhere
        paper: (1 + p_y)^gamma at the label, p_v elsewhere

    The 1 that the code's form takes off is the cross-entropy with the label, which a network's own head has beside it and
    its exits have not. The paper's form was not read at the source. gamma 1: p, and p + m.
    """

    gamma: float = 1.0
    temperature: float = 1.0
    form: Literal["code", "paper"] = "code"

    def __post_init__(self) -> None:
        one_of(self, "form", self.form, ("code", "paper"))
        for name in ("gamma", "temperature"):
            if not getattr(self, name) > 0:
                raise RecipeError(f"Powered.{name} must be positive, got {getattr(self, name)}.")

    def weights(self, teacher: Tensor, labels_B: Tensor) -> Tensor:
        return exit_weights(teacher, labels_B, self.gamma, self.temperature, self.form)


@dataclass(frozen=True)
class GroundTruthMix(Target):
    """share * m + (1 - share) * another target: what the label holds against the teacher (arXiv 2102.13088, alpha).

    At temperature 1 it is share * CE + (1 - share) * the other loss, in one.
    """

    share: float = 0.5
    target: Part(Target) = field(default_factory=TeacherProbabilities)  # type: ignore[valid-type]

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise RecipeError(f"GroundTruthMix.share must lie in 0 <= share <= 1, got {self.share}.")

    def weights(self, teacher: Tensor, labels_B: Tensor) -> Tensor:
        w = self.target(teacher, labels_B)
        return self.share * F.one_hot(labels_B, w.shape[-1]).to(w) + (1 - self.share) * w


@torch.no_grad()
def ranking(
    teacher: Tensor,
    labels_B: Tensor | None,
    places: PlaceWeights = TeacherSoftmax(),
    normalised: bool = False,
) -> tuple[Tensor, Tensor]:
    """The order of classes that a student is to reproduce and the weight of each place, (order, weights) [B, V].

    The label first, the others by falling logit of the teacher (PLD, arXiv 2506.12542); without labels the teacher's own
    order, which is not in the paper. normalised: weights of a row sum to 1, whatever `places` gives.
    """
    order = teacher_order(teacher, labels_B)
    weights = places(promoted(teacher).gather(-1, order))
    if normalised:
        weights = weights / weights.sum(-1, keepdim=True)
    return order, weights

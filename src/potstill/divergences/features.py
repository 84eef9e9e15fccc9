"""Losses between features, relations and binary heads. One value a position, or a sample; those that compare the samples
of a batch with one another say that they couple it. B samples, N positions, D features. Nothing is detached.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from potstill.contracts.errors import ModelError


def bernoulli_kl(*, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """KL(sigma(t) || sigma(s)) of binary heads, elementwise, [*P] and [*P] -> [*P], nats.

    p (log sigma(t) - log sigma(s)) + (1 - p) (log sigma(-t) - log sigma(-s)), with no probability ever rounded to 1.
    """
    _same("bernoulli_kl", teacher_logits, student_logits)
    dtype = torch.promote_types(torch.promote_types(teacher_logits.dtype, student_logits.dtype), torch.float32)
    t, s = teacher_logits.to(dtype), student_logits.to(dtype)
    return t.sigmoid() * (softplus(-s) - softplus(-t)) + (-t).sigmoid() * (softplus(s) - softplus(t))


def cosine_distance(*, teacher: Tensor, student: Tensor, eps: float = 1e-8) -> Tensor:
    """1 - cos(student, teacher) over the last axis, [*P, D] -> [*P], between 0 and 2; 1 where either is 0."""
    _same("cosine_distance", teacher, student)
    return 1 - (_unit(student, eps) * _unit(teacher, eps)).sum(-1)


def normalized_mse(*, teacher: Tensor, student: Tensor, eps: float = 1e-8) -> Tensor:
    """|student / |student| - teacher / |teacher||^2, [*P, D] -> [*P]: twice the cosine distance, where neither is 0."""
    _same("normalized_mse", teacher, student)
    return (_unit(student, eps) - _unit(teacher, eps)).square().sum(-1)


def attention_transfer(*, teacher: Tensor, student: Tensor) -> Tensor:
    """Squared distance of normalised attention maps, features [B, D, H, W] of any two widths -> [B].

    A map is the mean over channels of the squared features, as one vector of length 1. Source: arXiv 1612.03928.
    """
    if (
        teacher.dim() != 4
        or student.dim() != 4
        or teacher.shape[::2] + teacher.shape[3:] != student.shape[::2] + student.shape[3:]
    ):
        raise ModelError(
            f"attention_transfer compares features [B, D, H, W] of one height and width, got teacher {list(teacher.shape)} "
            f"and student {list(student.shape)}. Resize one first."
        )
    maps = [x.square().mean(1).flatten(1) for x in (teacher, student)]
    return normalized_mse(teacher=maps[0], student=maps[1])


def relation_distances(*, teacher: Tensor, student: Tensor, delta: float = 1.0) -> Tensor:
    """RKD-D: Huber loss of the distances within the batch, each divided by their mean. [B, Dt] and [B, Ds] -> [B].

    Couples the batch: a sample's value is the mean over its pairs. Coincident rows have gradient 0.
    Source: arXiv 1904.05068, Eqs. 7 to 9.
    """
    theirs, own = (_distances(x) for x in _batches("relation_distances", teacher, student))
    return _over_others(torch.nn.functional.huber_loss(own, theirs, reduction="none", delta=delta))


def relation_angles(*, teacher: Tensor, student: Tensor, delta: float = 1.0) -> Tensor:
    """RKD-A: Huber loss of the cosines of the angles that all triplets make. [B, Dt] and [B, Ds] -> [B], by the apex.

    Couples the batch. Source: arXiv 1904.05068, Eqs. 10 and 11.
    """
    theirs, own = (_angles(x) for x in _batches("relation_angles", teacher, student))
    return torch.nn.functional.huber_loss(own, theirs, reduction="none", delta=delta).mean((1, 2))


def similarity_preserving(*, teacher: Tensor, student: Tensor) -> Tensor:
    """|G_s - G_t|^2 by row, G the Gram matrix of the batch with rows of length 1. [B, ...] and [B, ...] -> [B].

    Couples the batch; the mean over B, divided by B once more, is the paper's. Source: arXiv 1907.09682, Eqs. 1 to 4.
    """
    theirs, own = _batches("similarity_preserving", teacher, student)
    grams = [_unit(x @ x.T, 1e-12) for x in (theirs, own)]
    return (grams[1] - grams[0]).square().sum(-1)


def _unit(x: Tensor, eps: float) -> Tensor:
    """x / |x| over the last axis; rows of length 0 stay 0, with a finite gradient."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x / (x.square().sum(-1, keepdim=True) + eps**2).sqrt()


def _distances(x: Tensor) -> Tensor:
    """Pairwise Euclidean distances over their mean, [B, B]; 0 on the diagonal and where rows coincide."""
    squared = (x.unsqueeze(1) - x.unsqueeze(0)).square().sum(-1)
    same = squared == 0  # the root's gradient there is infinite
    distance = squared.masked_fill(same, 1.0).sqrt().masked_fill(same, 0.0)
    count = (~same).sum().clamp_min(1)
    return distance / (distance.sum() / count).clamp_min(torch.finfo(x.dtype).tiny)


def _angles(x: Tensor) -> Tensor:
    """cos of the angle at i between j and k, [B, B, B]."""
    arms = x.unsqueeze(0) - x.unsqueeze(1)  # from i to j
    squared = arms.square().sum(-1, keepdim=True)
    same = squared == 0
    unit = arms / squared.masked_fill(same, 1.0).sqrt()
    return unit @ unit.mT


def _over_others(values_BB: Tensor) -> Tensor:
    return values_BB.sum(1) / max(1, len(values_BB) - 1)


def _batches(name: str, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    if len(teacher) != len(student) or teacher.dim() < 2 or student.dim() < 2:
        raise ModelError(
            f"{name} compares two batches of equal size [B, ...], got teacher {list(teacher.shape)} and student "
            f"{list(student.shape)}."
        )
    dtype = torch.promote_types(torch.promote_types(teacher.dtype, student.dtype), torch.float32)
    return teacher.flatten(1).to(dtype), student.flatten(1).to(dtype)


def _same(name: str, teacher: Tensor, student: Tensor) -> None:
    if teacher.shape != student.shape:
        raise ModelError(
            f"{name} compares equal shapes, got teacher {list(teacher.shape)} and student {list(student.shape)}. "
            "Project one to the width of the other first."
        )

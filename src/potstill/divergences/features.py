"""Losses between features, relations and binary heads. One value a position, or a sample; those that compare the samples
of a batch with one another say that they couple it. B samples, N positions, D features, G groups (any leading shape).
Nothing is detached but what says so. Float32 or better, under autocast too.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import huber_loss, logsigmoid, smooth_l1_loss

from potstill.contracts.errors import ModelError, RecipeError
from potstill.divergences.family import kl, promoted
from potstill.divergences.kernels import inner
from potstill.divergences.logits import standardize
from potstill.divergences.supports import log_probs
from potstill.divergences.transport import pairwise_cost


def bernoulli_kl(*, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """KL(sigma(t) || sigma(s)) of binary heads, elementwise, [*P] and [*P] -> [*P], nats.

    p (log sigma(t) - log sigma(s)) + (1 - p) (log sigma(-t) - log sigma(-s)), with no probability ever rounded to 1.
    Infinite logits are certain heads. Gradient sigma(s) - sigma(t).
    """
    _same("bernoulli_kl", teacher_logits, student_logits)
    return kl(binary_log_probs(teacher_logits), binary_log_probs(student_logits))


def binary_log_probs(logits: Tensor) -> Tensor:
    """(log sigma(x), log sigma(-x)) of binary heads, [*P] -> [*P, 2]: two outcomes, for any divergence."""
    x = promoted(logits)
    return torch.stack([logsigmoid(x), logsigmoid(-x)], -1)


def cosine_distance(*, teacher: Tensor, student: Tensor, eps: float = 1e-8) -> Tensor:
    """1 - cos(student, teacher) over the last axis, [*P, D] -> [*P], between 0 and 2.

    1, without a gradient, where either is no longer than eps: it has no direction.
    """
    _same("cosine_distance", teacher, student)
    return 1 - (_unit(student, eps) * _unit(teacher, eps)).sum(-1)


def normalized_mse(*, teacher: Tensor, student: Tensor, eps: float = 1e-8) -> Tensor:
    """|student / |student| - teacher / |teacher||^2, [*P, D] -> [*P]: twice the cosine distance, where neither is 0.

    PKD's loss of hidden states (Distiller, arXiv 2109.11105). A row no longer than eps counts as 0 and has no gradient.
    """
    _same("normalized_mse", teacher, student)
    return (_unit(student, eps) - _unit(teacher, eps)).square().sum(-1)


def norm_and_direction(*, teacher: Tensor, student: Tensor, direction: Tensor) -> Tensor:
    """1 - <student, e> / max(|student|, |teacher|), e = direction / |direction|: [*P, D] each -> [*P], between 0 and 2.

    direction: the mean teacher feature of the sample's class. A student shorter than the teacher grows along e (gradient
    -e / |teacher|); a longer one only turns. 1 where both features, or the direction, are 0.
    Source: the ND loss, arXiv 2305.17007, as its code has it: the larger norm is not detached.
    """
    _same("norm_and_direction", teacher, student)
    _same("norm_and_direction", direction, student)
    student, teacher = promoted(student), promoted(teacher)
    norm = torch.maximum(_norm(student), _norm(teacher))
    norm = norm.masked_fill(norm == 0, 1.0)
    return 1 - ((student * _unit(direction, 0.0)).sum(-1, keepdim=True) / norm).squeeze(-1)


def whitened_smooth_l1(*, teacher: Tensor, student: Tensor, beta: float = 2.0) -> Tensor:
    """Mean over the features of smooth-L1(student, whitened teacher), [*P, D] -> [*P].

    Whitened: mean 0 and deviation 1 over the features of each row (a LayerNorm without weights), the teacher's alone; a
    learnt linear map comes before on the student's side. smooth-L1 is x^2 / (2 beta) up to beta, then |x| - beta / 2.
    Source: feature distillation as Hybrid Distill uses it (arXiv 2306.15876); form and beta assumed.
    """
    _same("whitened_smooth_l1", teacher, student)
    if not beta > 0:
        raise RecipeError(f"whitened_smooth_l1's beta must be positive, got {beta}.")
    target = standardize(teacher, unbiased=False)
    return smooth_l1_loss(promoted(student), target, reduction="none", beta=beta).mean(-1)


def exit_weights(
    teacher_logits: Tensor, labels: Tensor, gamma: float = 1.0, temperature: float = 1.0, form: str = "code"
) -> Tensor:
    """The weights w of `exit_loss`, [*P, V] and labels [*P] -> [*P, V]."""
    p, at = log_probs(teacher_logits, temperature).exp(), labels.unsqueeze(-1)
    others, less = (p**gamma, 1.0) if form == "code" else (p, 0.0)
    return others.scatter(-1, at, (1 + p.gather(-1, at)) ** gamma - less)


def exit_loss(
    *,
    teacher_logits: Tensor,
    student_logits: Tensor,
    labels: Tensor,
    gamma: float = 1.0,
    temperature: float = 1.0,
    form: Literal["code", "paper"] = "code",
) -> Tensor:
    """OFA's loss of a stage's features projected to logits, [*P, V] and labels [*P] -> [*P], nats; the teacher is detached.

        code:  -sum_v w_v log q_v,  w_y = (1 + p_y)^gamma - 1 at the label, w_v = p_v^gamma elsewhere
        paper: -(1 + p_y)^gamma log q_y - sum_{v != y} p_v log q_v

    At gamma 1 the code's is KL(p || q) plus the teacher's entropy. The paper's form has one more -log q_y, the
    cross-entropy with the label that the code adds at the last head alone, and leaves the other classes as they are; it
    was not read at the source. No T^2; weights have no sum of 1 for other gammas. Source: arXiv 2310.19444 and its code.
    """
    _same("exit_loss", teacher_logits, student_logits)
    if labels.shape != student_logits.shape[:-1]:
        raise ModelError(
            f"exit_loss needs one label a position, {list(student_logits.shape[:-1])}, got {list(labels.shape)}. "
            "Give the likeliest class of a soft label."
        )
    if form not in ("code", "paper"):
        raise RecipeError(f"exit_loss's form must be 'code' or 'paper', got {form!r}.")
    if not gamma > 0:
        raise RecipeError(f"exit_loss's gamma must be positive, got {gamma}.")
    weight = exit_weights(teacher_logits.detach(), labels, gamma, temperature, form)
    log_q = log_probs(student_logits, temperature)
    return -torch.where(weight > 0, weight * log_q, 0.0).sum(-1)


def attention_transfer(*, teacher: Tensor, student: Tensor) -> Tensor:
    """Squared distance of normalised attention maps, features [B, D, H, W] of any two widths -> [B].

    A map is the mean over channels of the squared features, as one vector of length 1. Source: arXiv 1612.03928.
    """
    if not teacher.dim() == student.dim() == 4 or teacher[:, 0].shape != student[:, 0].shape:
        raise ModelError(
            f"attention_transfer compares features [B, D, H, W] of one height and width, got teacher {list(teacher.shape)} "
            f"and student {list(student.shape)}. Resize one first."
        )
    maps = [promoted(x).square().mean(1).flatten(1) for x in (teacher, student)]
    return normalized_mse(teacher=maps[0], student=maps[1])


def relation_distances(*, teacher: Tensor, student: Tensor, delta: float = 1.0) -> Tensor:
    """RKD-D: Huber loss of the distances within the batch, each divided by their mean. [B, Dt] and [B, Ds] -> [B].

    Couples the batch: a sample's value is the mean over its pairs. The mean distance is that of the pairs apart, as in the
    authors' code, and has a gradient. Coincident rows have gradient 0. Once differentiable. Source: arXiv 1904.05068.
    """
    theirs, own = (_distances(x) for x in _batches("relation_distances", teacher, student))
    return huber_loss(own, theirs, reduction="none", delta=delta).sum(1) / max(1, len(own) - 1)


def relation_angles(*, teacher: Tensor, student: Tensor, delta: float = 1.0) -> Tensor:
    """RKD-A: Huber loss of the cosines of the angles that all triplets make. [B, Dt] and [B, Ds] -> [B], by the apex.

    Couples the batch, with B^2 (B + D) numbers. The mean is over all B^2 pairs of arms, those of length 0 (cosine 0) and
    those of an arm with itself among them, as in the authors' code. Source: arXiv 1904.05068.
    """
    theirs, own = (_angles(x) for x in _batches("relation_angles", teacher, student))
    return huber_loss(own, theirs, reduction="none", delta=delta).mean((1, 2))


def similarity_preserving(*, teacher: Tensor, student: Tensor) -> Tensor:
    """|G_s - G_t|^2 by row, G the Gram matrix of the batch with rows of length 1. [B, ...] and [B, ...] -> [B].

    Couples the batch; the mean over B, divided by B once more, is the paper's. Source: arXiv 1907.09682.
    """
    theirs, own = (_unit(_gram(x), 0.0) for x in _batches("similarity_preserving", teacher, student))
    return (own - theirs).square().sum(-1)


def gram_cosine(*, teacher: Tensor, student: Tensor) -> Tensor:
    """1 - cos(G_s, G_t), G = Y Y^T of a group's rows as one vector: [*G, N, Dt] and [*G, N, Ds] -> [*G], between 0 and 1.

    Couples the rows of a group, such as the image tokens of a sample: LLaVA-KD's relation loss on their logits
    (arXiv 2410.16236). Free of a rotation and a scale of the features, not of an offset. 1 where a group is 0.
    """
    if min(teacher.dim(), student.dim()) < 2 or teacher.shape[:-1] != student.shape[:-1]:
        raise ModelError(
            f"gram_cosine compares groups of as many rows, [*G, N, D] of any two widths, got teacher "
            f"{list(teacher.shape)} and student {list(student.shape)}."
        )
    return cosine_distance(teacher=_gram(teacher).flatten(-2), student=_gram(student).flatten(-2), eps=0.0)


def relation_kl(
    *,
    teacher_queries: Tensor,
    teacher_keys: Tensor,
    student_queries: Tensor,
    student_keys: Tensor,
    keep: Tensor | None = None,
) -> Tensor:
    """KL(A_t || A_s) of the rows of A = softmax(Q K^T / sqrt(D)), [*G, N, D] each -> [*G, N], nats: attention maps.

    Couples the tokens of a sequence. Heads are groups: teacher and student need as many, of any two widths. With values
    for queries and keys it compares value relations; free of a rotation of a head's basis. keep [*G, N] bool: keys that
    count, so that the others, padding or dropped tokens, have no probability; their rows are the caller's to leave out.
    Source: TinyMIM's form as Hybrid Distill uses it (arXiv 2306.15876).
    """
    rows = [teacher_queries, teacher_keys, student_queries, student_keys]
    if min(x.dim() for x in rows) < 2 or len({x.shape[:-1] for x in rows}) > 1:
        raise ModelError(
            "relation_kl compares heads of as many tokens, [*G, N, D], got queries and keys of teacher "
            f"{list(teacher_queries.shape)} and {list(teacher_keys.shape)}, of student {list(student_queries.shape)} and "
            f"{list(student_keys.shape)}. Both models need the same heads and tokens."
        )
    logits = [inner(promoted(q), promoted(k)) / math.sqrt(q.shape[-1]) for q, k in (rows[:2], rows[2:])]
    if keep is not None:
        unseen = ~keep.unsqueeze(-2) & keep.any(-1)[..., None, None]
        logits = [x.masked_fill(unseen, -math.inf) for x in logits]
    return kl(*(log_probs(x) for x in logits))


def _norm(x: Tensor) -> Tensor:
    """|x| over the last axis, [*P, D] -> [*P, 1], with gradient 0 at 0, where that of the root is infinite."""
    squared = x.square().sum(-1, keepdim=True)
    none = squared == 0
    return squared.masked_fill(none, 1.0).sqrt().masked_fill(none, 0.0)


def _unit(x: Tensor, eps: float) -> Tensor:
    """x / |x| over the last axis; rows no longer than eps have no direction: 0, with gradient 0."""
    x = promoted(x)
    norm = _norm(x)
    short = norm <= eps
    return (x / norm.masked_fill(short, 1.0)).masked_fill(short, 0.0)


def _gram(x: Tensor) -> Tensor:
    return inner(promoted(x), promoted(x))


def _distances(x: Tensor) -> Tensor:
    """Pairwise Euclidean distances over their mean, [B, B]; 0 on the diagonal and where rows coincide."""
    distance = pairwise_cost(student=x, teacher=x, norm=2.0)
    apart = (distance > 0).sum()
    mean = distance.sum() / apart.clamp_min(1)
    return distance / mean.masked_fill(apart == 0, 1.0)


def _angles(x: Tensor) -> Tensor:
    """cos of the angle at i between j and k, [B, B, B]."""
    return _gram(_unit(x.unsqueeze(0) - x.unsqueeze(1), 0.0))


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

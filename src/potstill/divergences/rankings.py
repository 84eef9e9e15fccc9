"""Losses between scores and an order: which outcome, document or answer comes first.

Scores go in, one value in nats a list comes out. B lists (any leading shape), N entries of a list; a mask [B, N] says which
entries exist, and what the others hold reaches neither value nor gradient. Nothing is detached but what says so.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from potstill.contracts.errors import ModelError
from potstill.divergences.family import kl
from potstill.divergences.supports import log_probs

INF = math.inf


def plackett_luce(scores: Tensor, order: Tensor, weights: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """sum_k w_k (logsumexp_{l >= k} s_{order_l} - s_{order_k}), [*B, N] -> [*B], nats: the order's negative log-likelihood.

    Entries are drawn one after the other, each among those left with the softmax of their scores. order [*B, N] int64, the
    first first; entries that do not exist come last. weights [*B, N] belong to places (1 where not given: ListMLE, and
    exp(-value) is then a probability over orders). With (1, 0, ...) it is the cross-entropy with the first entry.
    Convex in the scores; adding a constant to a list changes nothing. Source: PLD, arXiv 2506.12542.
    """
    _same("plackett_luce", scores, order, mask)
    s = scores.to(torch.promote_types(scores.dtype, torch.float32)).gather(-1, order)
    here = torch.ones_like(order, dtype=torch.bool) if mask is None else mask.gather(-1, order)
    s = s.masked_fill(~here, -INF)
    # From the last place up; an absent tail is lifted to a place of its own, since -inf less -inf has no gradient.
    left = torch.logcumsumexp(s.flip(-1), -1).flip(-1)
    terms = left.masked_fill(~here, 0.0) - s.masked_fill(~here, 0.0)
    if weights is not None:
        terms = terms * weights.masked_fill(~here, 0.0)
    return terms.sum(-1)


def list_mle(scores: Tensor, order: Tensor, mask: Tensor | None = None) -> Tensor:
    """-log of the Plackett-Luce probability of an order, [*B, N] -> [*B], nats."""
    return plackett_luce(scores, order, mask=mask)


def teacher_order(teacher: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Entries by falling score of the teacher, the label before all others, absent ones last, [*B, N] int64. Ties keep
    their order."""
    keyed = teacher.detach().to(torch.promote_types(teacher.dtype, torch.float32))
    if mask is not None:
        keyed = keyed.masked_fill(~mask, -INF)
    order = keyed.sort(dim=-1, descending=True, stable=True).indices
    if labels is None:
        return order
    if labels.shape != teacher.shape[:-1]:
        raise ModelError(f"teacher_order: labels have shape {list(labels.shape)}, the lists are {list(teacher.shape)}.")
    others = order[order != labels.unsqueeze(-1)].view(*order.shape[:-1], -1)
    return torch.cat([labels.unsqueeze(-1), others], -1)


def pld(student: Tensor, teacher: Tensor, labels: Tensor, teacher_temperature: float = 1.0) -> Tensor:
    """Plackett-Luce distillation, logits [B, V], labels [B] -> [B], nats.

    The order is the label, then the other classes by the teacher's logits; a place weighs the probability that the teacher
    gives its class at `teacher_temperature`, which changes no order. The student is never tempered. No cross-entropy is
    added: the first place is one. Source: arXiv 2506.12542.
    """
    order = teacher_order(teacher, labels)
    wide = teacher.detach().to(torch.promote_types(teacher.dtype, torch.float32))
    return plackett_luce(student, order, (wide / teacher_temperature).softmax(-1).gather(-1, order))


def ranknet(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over pairs i < j of BCE(sigma(s_i - s_j), sigma(y_i - y_j)), [*B, N] -> [*B], nats.

    teacher: its scores, or binary labels, whose targets are then soft: 0.73 for a positive before a negative, 0.5 among
    equals. Least, but not 0, where the differences agree. Lists of one entry have no pair and give 0.
    Source: DeAR, arXiv 2508.16998 (RankNet, Burges et al. 2005).
    """
    _same("ranknet", student, teacher, mask)
    student = student.to(torch.promote_types(student.dtype, torch.float32))
    target = _gaps(teacher.detach().to(student.dtype), mask).sigmoid()
    gap = _gaps(student, mask)
    values = target * softplus(-gap) + (1 - target) * softplus(gap)
    return _mean_over_pairs(values, mask)


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: float = 0.0) -> Tensor:
    """-log sigma(chosen - rejected - margin), [*P] and [*P] -> [*P], nats: a pairwise preference."""
    if chosen.shape != rejected.shape:
        raise ModelError(
            f"bradley_terry compares pairs, got {list(chosen.shape)} chosen and {list(rejected.shape)} rejected scores."
        )
    dtype = torch.promote_types(chosen.dtype, torch.float32)
    return -logsigmoid(chosen.to(dtype) - rejected.to(dtype) - margin)


def listwise_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """KL(softmax(y / T) || softmax(s / T)) over the entries of a list, [*B, N] -> [*B], nats: ListNet, and the
    distillation part of DeAR (arXiv 2508.16998). No T^2: objectives multiply, by name."""
    _same("listwise_kl", student, teacher, mask)
    if mask is not None:
        student, teacher = student.masked_fill(~mask, -INF), teacher.masked_fill(~mask, -INF)
    return kl(log_probs(teacher.detach(), temperature), log_probs(student, temperature))


def _gaps(scores: Tensor, mask: Tensor | None) -> Tensor:
    """s_i - s_j, [*B, N, N]; absent entries are 0 first, so that nothing of theirs passes."""
    scores = scores if mask is None else scores.masked_fill(~mask, 0.0)
    return scores.unsqueeze(-1) - scores.unsqueeze(-2)


def _mean_over_pairs(values: Tensor, mask: Tensor | None) -> Tensor:
    size = values.shape[-1]
    pairs = torch.ones(size, size, dtype=torch.bool, device=values.device).triu(1).expand_as(values)
    if mask is not None:
        pairs = pairs & mask.unsqueeze(-1) & mask.unsqueeze(-2)
    count = pairs.sum((-2, -1))
    return values.masked_fill(~pairs, 0.0).sum((-2, -1)) / count.clamp_min(1)


def _same(name: str, scores: Tensor, other: Tensor, mask: Tensor | None) -> None:
    if scores.shape != other.shape or (mask is not None and mask.shape != scores.shape):
        shown = "" if mask is None else f" and a mask {list(mask.shape)}"
        raise ModelError(
            f"{name} compares lists of one shape [*B, N], got {list(scores.shape)} and {list(other.shape)}{shown}."
        )

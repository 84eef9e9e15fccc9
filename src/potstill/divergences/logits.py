"""Losses between the logits of classifiers: one value per sample, nothing averaged, no T^2 (objectives multiply, by name).

B samples, V classes; the student comes first. Nothing is detached but what says so.
"""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from potstill.contracts.errors import DataError, ModelError
from potstill.divergences.family import kl, promoted
from potstill.divergences.supports import log_mass, log_probs

INF = float("inf")


def standardize(logits: Tensor, eps: float = 1e-7, unbiased: bool = True, detach: bool = False) -> Tensor:
    """(x - mean) / (std + eps) over the classes of each row, [*P, V]; divide by the temperature afterwards.

    unbiased: the standard deviation divides by V - 1 (the paper's). detach: no gradient through mean and deviation.
    A constant row becomes 0, as if its deviation were 1, so that its gradient stays small. Source: arXiv 2403.01427, Algorithm 1.
    """
    logits = promoted(logits)
    source = logits.detach() if detach else logits
    centred = source - source.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / (logits.shape[-1] - int(unbiased))
    constant = variance == 0  # the root's gradient there is infinite, and 0 * inf is NaN
    std = variance.masked_fill(constant, 1.0).sqrt()
    return (logits - source.mean(-1, keepdim=True)) / (std + eps)


def kd(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Forward KL(teacher || student) of the softened rows, [B, V] -> [B], nats. Source: Hinton et al., arXiv 1503.02531."""
    return kl(log_probs(teacher, temperature), log_probs(student, temperature))


def dkd_terms(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Decoupled KD: (tckd [B], nckd [B]) in nats, with kd = tckd + (1 - p_target) nckd, p_target the teacher's.

    tckd: KL of (target, the rest) as two outcomes. nckd: KL among the other classes, renormalised without the target.
    labels [B] int64. Source: arXiv 2203.08679, Eqs. 2-7; the paper's loss is T^2 (alpha tckd + beta nckd).
    """
    if student.shape != teacher.shape or labels.shape != student.shape[:-1]:
        raise ModelError(
            f"dkd_terms compares logits [B, V] with labels [B], got student {list(student.shape)}, teacher "
            f"{list(teacher.shape)} and labels {list(labels.shape)}."
        )
    if student.shape[-1] < 2:
        raise DataError("dkd_terms needs at least two classes: with one there is nothing beside the target.")
    target = labels.unsqueeze(-1)
    binary, others = [], []
    for logits in (teacher, student):
        logp = log_probs(logits, temperature)
        rest = logp.scatter(-1, target, -INF)
        mass = log_mass(rest)
        binary.append(torch.cat([logp.gather(-1, target), mass.unsqueeze(-1)], -1))
        others.append(rest - mass.masked_fill(mass == -INF, 0.0).unsqueeze(-1))
    return kl(*binary), kl(*others)


def dist_terms(student: Tensor, teacher: Tensor, temperature: float = 1.0, eps: float = 1e-8) -> tuple[Tensor, Tensor]:
    """DIST: (inter [B], intra [V]), each 1 - Pearson correlation of softened probabilities, in 0 to 2.

    inter: over the classes of each sample. intra: over the samples of each class, so it couples the batch and changes with
    its size; one sample alone has no correlation (value 1, no gradient). eps bounds each norm from below.
    Source: arXiv 2205.10536, Eqs. 6-10; the paper's loss is T^2 (beta mean(inter) + gamma mean(intra)).
    """
    q, p = log_probs(student, temperature).exp(), log_probs(teacher, temperature).exp()

    def uncorrelated(dim: int) -> Tensor:
        return 1 - cosine_similarity(q - q.mean(dim, keepdim=True), p - p.mean(dim, keepdim=True), dim=dim, eps=eps)

    return uncorrelated(-1), uncorrelated(0)

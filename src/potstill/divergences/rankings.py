"""Losses between scores and an order: which outcome, document or answer comes first.

Scores go in, one value in nats a list comes out. B lists (any leading shape), N entries of a list; a mask [B, N] says which
entries exist, and what the others hold reaches neither value nor gradient; a list without entries gives 0. An order may
meet a score of -inf, an entry never drawn, and costs +inf where it asks for one; pairs need finite scores. Nothing is
detached but what says so.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from potstill.contracts.errors import ModelError, RecipeError
from potstill.contracts.spec import Part
from potstill.divergences.family import kl, promoted
from potstill.divergences.supports import log_probs

INF = math.inf


def plackett_luce(
    scores: Tensor,
    order: Tensor,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    tied_by: Tensor | None = None,
) -> Tensor:
    """sum_k w_k (logsumexp_{l >= k} s_{order_l} - s_{order_k}), [*B, N] -> [*B], nats: the order's negative log-likelihood.

    Entries are drawn one after the other, each among those left with the softmax of their scores. order [*B, N] int64, the
    first first; entries that do not exist come last. weights [*B, N] belong to places (1 where not given: ListMLE, and
    exp(-value) is then a probability over orders). With (1, 0, ...) it is the cross-entropy with the first entry.
    Convex in the scores; adding a constant to a list changes nothing. Source: PLD, arXiv 2506.12542.

    tied_by: scores [*B, N] that made the order. Neighbours in it of equal score are then drawn each among all their equals
    and those after them (Breslow's way with ties), so that the value does not depend on how a list was shuffled. A label
    put first stays alone if its score is set to +inf.
    """
    _same("plackett_luce", scores, order, mask)
    s = promoted(scores).gather(-1, order)
    here = torch.ones_like(order, dtype=torch.bool) if mask is None else mask.gather(-1, order)
    lowest = torch.finfo(s.dtype).min  # -inf less -inf is NaN, and so is its gradient
    never = here & (s == -INF)
    s = s.masked_fill(never | ~here, lowest)
    left = torch.logcumsumexp(s.flip(-1), -1).flip(-1)
    if tied_by is not None:
        left = left.gather(-1, _first_of_equals(tied_by.gather(-1, order)))
    terms = (left.masked_fill(~here, 0.0) - s.masked_fill(~here, 0.0)).masked_fill(never & (left > lowest), INF)
    if weights is not None:
        terms = torch.where(here & (weights != 0), terms * weights.masked_fill(~here, 0.0), 0.0)
    return terms.sum(-1)


def list_mle(scores: Tensor, order: Tensor, mask: Tensor | None = None) -> Tensor:
    """-log of the Plackett-Luce probability of an order, [*B, N] -> [*B], nats."""
    return plackett_luce(scores, order, mask=mask)


def teacher_order(teacher: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Entries by falling score of the teacher, the label before all others, absent ones last, [*B, N] int64. Ties keep
    their order. A negative label is none."""
    keyed = promoted(teacher.detach())
    if mask is not None:
        keyed = keyed.masked_fill(~mask, -INF)
    order = keyed.sort(dim=-1, descending=True, stable=True).indices
    if labels is None:
        return order
    if labels.shape != teacher.shape[:-1]:
        raise ModelError(f"teacher_order: labels have shape {list(labels.shape)}, the lists are {list(teacher.shape)}.")
    behind = (order != labels.unsqueeze(-1)).byte()
    return order.gather(-1, behind.sort(dim=-1, stable=True).indices)


class PlaceWeights:
    """Base: how much each place of the teacher's order counts. `part(teacher)` gives weights [*B, N] from the teacher's
    scores in that order, best place first; scores of -inf have no place."""

    def __call__(self, ordered: Tensor) -> Tensor:
        raise NotImplementedError


Part(PlaceWeights)


@dataclass(frozen=True)
class TeacherSoftmax(PlaceWeights):
    """softmax(teacher / temperature) of the entry at the place, sum 1: PLD's. The temperature changes no order."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0.0:
            raise RecipeError(f"TeacherSoftmax.temperature must be positive, got {self.temperature}.")

    def __call__(self, ordered: Tensor) -> Tensor:
        return log_probs(ordered, self.temperature).exp()


@dataclass(frozen=True)
class FirstPlaces(PlaceWeights):
    """1 at each of the first `count` places, or at all: ListMLE. count = 1 is the cross-entropy with the first entry."""

    count: int | None = None

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise RecipeError(f"FirstPlaces.count must be at least 1, got {self.count}. Leave it out for all places.")

    def __call__(self, ordered: Tensor) -> Tensor:
        places = torch.arange(ordered.shape[-1], device=ordered.device)
        counted = places < (len(places) if self.count is None else self.count)
        return counted.to(ordered.dtype).expand_as(ordered)


@dataclass(frozen=True)
class Decreasing(PlaceWeights):
    """(2^(n - k) - 1) / (2^n - 1 - n) at place k = 1 ... n of n, sum 1: position-aware ListMLE (p-ListMLE).

    PLD's paper names 2^(n - k) - 1 as an example; divided by the sum here, because it overflows beyond 127 entries.
    """

    def __call__(self, ordered: Tensor) -> Tensor:
        n = (ordered != -INF).sum(-1, keepdim=True).double()
        k = torch.arange(1, ordered.shape[-1] + 1, dtype=n.dtype, device=n.device)
        sum_ = (1 - (1 + n) * torch.exp2(-n)).masked_fill(n < 2, 1.0)
        return ((torch.exp2(-k) - torch.exp2(-n)) / sum_).clamp_min(0.0).to(ordered.dtype)


def pld(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    teacher_temperature: float = 1.0,
    *,
    weights: PlaceWeights | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Plackett-Luce distillation, logits [*B, V], labels [*B] -> [*B], nats.

    The order is the label, then the other classes by the teacher's logits; a place weighs the probability that the teacher
    gives its class at `teacher_temperature`, which changes no order. The student is never tempered. No cross-entropy is
    added: the first place is one. Source: arXiv 2506.12542.

    weights: another way to weigh the places, in place of the teacher's softmax. A negative label is an ignored place and
    gives 0. Without labels the order is the teacher's alone (not in the paper).
    """
    _same("pld", student, teacher, mask)
    if weights is not None and teacher_temperature != 1.0:
        raise RecipeError(
            "pld takes teacher_temperature or weights, not both: write weights=TeacherSoftmax(temperature)."
        )
    order = teacher_order(teacher, labels, mask)
    wide = promoted(teacher.detach())
    ordered = _absent_never(wide, mask).gather(-1, order)
    value = plackett_luce(student, order, (weights or TeacherSoftmax(teacher_temperature))(ordered), mask)
    return value if labels is None else value.masked_fill(labels < 0, 0.0)


def ranknet(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over pairs i < j of BCE(sigma(s_i - s_j), sigma(y_i - y_j)), [*B, N] -> [*B], nats.

    teacher: its scores, or binary labels, whose targets are then soft: 0.73 for a positive before a negative, 0.5 among
    equals. Least, but not 0, where the differences agree. Lists of one entry have no pair and give 0.
    Source: DeAR, arXiv 2508.16998 (RankNet, Burges et al. 2005).
    """
    _same("ranknet", student, teacher, mask)
    student = promoted(student)
    target = _gaps(teacher.detach().to(student.dtype), mask).sigmoid()
    gap = _gaps(student, mask)
    values = target * softplus(-gap) + (1 - target) * softplus(gap)
    return _mean_over_pairs(values, mask)


def lambda_rank(student: Tensor, grades: Tensor, cutoff: int = 5, mask: Tensor | None = None) -> Tensor:
    """-log sigma(s_i - s_j) over pairs with grades y_i > y_j, weighed by what their swap would change of NDCG. [*B, N] -> [*B].

        |(2^y_i - 2^y_j) (D_i - D_j)| / IDCG@cutoff,  D = 1 / log2(1 + rank), ranks 1, 2 ... by the student's scores now

    The sum over the number of all pairs. Grades are not negative; weights have no gradient. Source: an option of DeAR
    (arXiv 2508.16998), whose code counts ranks from 2 and does not ask which grade is higher.
    """
    _same("lambda_rank", student, grades, mask)
    if cutoff < 1:
        raise RecipeError(f"lambda_rank's cutoff must be at least 1, got {cutoff}.")
    student = promoted(student)
    gain = grades.detach().to(student.dtype).exp2() - 1
    gain = gain if mask is None else gain.masked_fill(~mask, 0.0)
    discount = 1 / torch.arange(2, gain.shape[-1] + 2, dtype=gain.dtype, device=gain.device).log2()
    ideal = (gain.sort(dim=-1, descending=True).values * discount)[..., :cutoff].sum(-1)[..., None, None]
    place = teacher_order(student, mask=mask).argsort(-1)
    weight = (_gaps(gain, mask) * _gaps(discount[place], mask)).abs() / ideal.masked_fill(ideal <= 0, INF)
    values = weight * softplus(-_gaps(student, mask) * _gaps(gain, mask).sign())
    return _mean_over_pairs(values, mask)


def kendall_tau(scores: Tensor, other: Tensor, mask: Tensor | None = None) -> Tensor:
    """Pairs that both scores order alike, less those they order oppositely, over all pairs, [*B, N] -> [*B], in -1 to 1.

    A metric: it has no gradient. A tie in either counts 0 (tau-a); lists of one entry have no pair and give 0.
    """
    _same("kendall_tau", scores, other, mask)
    signs = _gaps(promoted(scores.detach()), mask).sign() * _gaps(promoted(other.detach()), mask).sign()
    return _mean_over_pairs(signs, mask)


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: float | Tensor = 0.0) -> Tensor:
    """-log sigma(chosen - rejected - margin), [*P] and [*P] -> [*P], nats: a pairwise preference."""
    if chosen.shape != rejected.shape:
        raise ModelError(
            f"bradley_terry compares pairs, got {list(chosen.shape)} chosen and {list(rejected.shape)} rejected scores."
        )
    dtype = torch.promote_types(chosen.dtype, torch.float32)
    return -logsigmoid(chosen.to(dtype) - rejected.to(dtype) - margin)


class Preference:
    """Base: the student should prefer the chosen of two answers, by more than its teacher (the reference) does.

    `part(teacher_chosen=..., teacher_rejected=..., student_chosen=..., student_rejected=...)`, log-probabilities of whole
    answers (summed over tokens, not averaged) [*P] -> [*P]. A log-ratio is student - teacher; the teacher is detached.
    """

    beta: float

    def __post_init__(self) -> None:
        if not self.beta > 0.0:
            raise RecipeError(f"{type(self).__name__}.beta must be positive, got {self.beta}.")

    def __call__(
        self, *, teacher_chosen: Tensor, teacher_rejected: Tensor, student_chosen: Tensor, student_rejected: Tensor
    ) -> Tensor:
        answers = (student_chosen, student_rejected, teacher_chosen, teacher_rejected)
        if len({x.shape for x in answers}) > 1:
            raise ModelError(
                f"{type(self).__name__} takes one log-probability an answer, got student "
                f"{list(student_chosen.shape)} and {list(student_rejected.shape)}, teacher {list(teacher_chosen.shape)} "
                f"and {list(teacher_rejected.shape)}. Sum those of the tokens first."
            )
        dtype = torch.promote_types(student_chosen.dtype, torch.float32)
        c, r, t_c, t_r = (x.to(dtype) for x in answers)
        return self._of(c - t_c.detach(), r - t_r.detach())

    def _of(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """From the log-ratios of both answers, [*P]."""
        raise NotImplementedError


Part(Preference)


@dataclass(frozen=True)
class DPO(Preference):
    """-log sigma(beta (chosen - rejected)), nats: Bradley and Terry's. Source: arXiv 2305.18290."""

    beta: float = 0.1

    def _of(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return bradley_terry(self.beta * chosen, self.beta * rejected)


@dataclass(frozen=True)
class Hinge(Preference):
    """max(0, 1 - beta (chosen - rejected)): no gradient beyond the margin 1 / beta. Source: SLiC-HF, arXiv 2305.10425."""

    beta: float = 0.1

    def _of(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return (1 - self.beta * (chosen - rejected)).relu()


@dataclass(frozen=True)
class IPO(Preference):
    """(chosen - rejected - 1 / (2 beta))^2, nats squared: a margin to reach and not to exceed. Source: arXiv 2310.12036."""

    beta: float = 0.1

    def _of(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return (chosen - rejected - 1 / (2 * self.beta)).square()


@dataclass(frozen=True)
class KTOPair(Preference):
    """Mean of 1 - sigma(beta (chosen - z_r)) and 1 - sigma(beta (z_c - rejected)), z = max(mean log-ratio, 0).

    z_c and z_r are means over all chosen and all rejected answers: it couples the batch. They carry a gradient, as in
    LLaVA-MoD's code (arXiv 2408.15881), unless `detach`, as in KTO (arXiv 2402.01306).
    """

    beta: float = 0.1
    detach: bool = False

    def _of(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        z_c, z_r = (x.mean().clamp_min(0.0) for x in (chosen, rejected))
        if self.detach:
            z_c, z_r = z_c.detach(), z_r.detach()
        return ((self.beta * (z_r - chosen)).sigmoid() + (self.beta * (rejected - z_c)).sigmoid()) / 2


def listwise_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """KL(softmax(y / T) || softmax(s / T)) over the entries of a list, [*B, N] -> [*B], nats: ListNet, and the
    distillation part of DeAR (arXiv 2508.16998). No T^2: objectives multiply, by name."""
    _same("listwise_kl", student, teacher, mask)
    student, teacher = _absent_never(student, mask), _absent_never(teacher.detach(), mask)
    return kl(log_probs(teacher, temperature), log_probs(student, temperature))


def _absent_never(scores: Tensor, mask: Tensor | None) -> Tensor:
    """-inf where nothing is, so that a softmax sees the entries alone; zeros for a list without entries."""
    if mask is None:
        return scores
    scores = scores.masked_fill(~mask, 0.0)
    return scores.masked_fill(~mask & mask.any(-1, keepdim=True), -INF)


def _first_of_equals(ordered: Tensor) -> Tensor:
    """The place at which each place's run of equal scores begins, [*B, N] int64."""
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    places = torch.arange(ordered.shape[-1], device=ordered.device)
    return (places * begins).cummax(-1).values


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

"""Further terms of token distillation: the teacher's ranking of the student's candidates, entropy, and transport.

p teacher, q student. N counted positions, M of them selected, K candidates, V vocabulary, S rows of a transport problem.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from potstill.contracts import keyed
from potstill.contracts.errors import ModelError, RecipeError
from potstill.contracts.terms import Term
from potstill.divergences import Sinkhorn, entropy, list_mle, log_probs, teacher_order
from potstill.divergences.family import one_of
from potstill.objectives.states import Rows, TokenStates, TokenTerm, by_rows, positions_of
from potstill.weighting import EntropyTop, Uniform, Weighting


@dataclass(frozen=True)
class SelectedTerm(TokenTerm):
    """Base: the weighted mean of a value over the positions that a weighting gives more than 0; `count` is how many.

    Random selections are keyed by sample and position alone, and samples have another id every epoch.
    """

    coefficient: float = 1.0
    selection: Weighting = field(default_factory=Uniform)

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(name.removesuffix("_BR") for name in self.selection.needs)

    @property
    def couples(self) -> Literal["row", "batch"]:  # type: ignore[override]
        return self.selection.couples

    def values(self, states: TokenStates, where_M: Tensor) -> Tensor:
        """One value a selected position, with its graph. [M]."""
        raise NotImplementedError

    def __call__(self, states: TokenStates) -> Term:
        rows = states.rows
        seen = positions_of(states.batch, rows, states.seen, self.selection.needs, keyed.key(self.name))
        weights_N = rows.gather(self.selection(seen))
        where_M = weights_N.nonzero()[:, 0]
        values_M = self.values(states, where_M)
        count = torch.tensor(float(len(where_M)), device=values_M.device)
        return Term((values_M * weights_N[where_M]).sum(), count, self.coefficient, unit=f"{self.name} position")


@dataclass(frozen=True)
class RankingTerm(SelectedTerm):
    """-log of the Plackett-Luce probability, under the student's logits of its own K likeliest tokens, of the order in
    which the teacher puts them (TSD-KD, arXiv 2603.13260). Of the teacher only the order counts.

    variant: "code" divides each place by what was drawn up to it (the prefix of the order) instead of what is left (the
    suffix), as the authors' code does. That is the loss of the reversed order: it drives the student away from the teacher.
    """

    name = "ranking"
    coefficient: float = 0.1
    k: int = 10
    variant: Literal["paper", "code"] = "paper"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise RecipeError(f"RankingTerm.k must be at least 1, got {self.k}.")
        one_of(self, "variant", self.variant, ("paper", "code"))

    def values(self, states: TokenStates, where_M: Tensor) -> Tensor:
        student_MV = states.student_logits(where_M)
        candidates_MK = student_MV.detach().topk(min(self.k, student_MV.shape[-1])).indices
        order_MK = teacher_order(states.teacher_logits(where_M).to(student_MV.device).gather(-1, candidates_MK))
        return list_mle(student_MV.gather(-1, candidates_MK), order_MK.flip(-1) if self.variant == "code" else order_MK)


@dataclass(frozen=True)
class EntropyTerm(SelectedTerm):
    """The student's entropy where it is least certain, to be lowered (TSD-KD, arXiv 2603.13260). Nats."""

    name = "entropy"
    selection: Weighting = field(default_factory=lambda: EntropyTop(0.1))

    def values(self, states: TokenStates, where_M: Tensor) -> Tensor:
        return by_rows(lambda some_MV, _: entropy(log_probs(some_MV)), states.student_logits(where_M))


@dataclass(frozen=True)
class RowTransport:
    """Sinkhorn distances between a batch of student rows and a batch of teacher rows of logits (SinKD, arXiv 2402.17110).

    over: "batch" moves the rows of a batch onto one another; "classes" the outcomes of each row alone (sample-wise, V^2 a
    row). size: S rows at most to one transport problem over a batch, a row to every ceil(N / S)-th problem, so that
    neighbours are in different ones; None takes all rows together, 1 compares each row with its own: |q - p|.
    """

    temperature: float = 2.0
    sinkhorn: Sinkhorn = field(default_factory=Sinkhorn)
    over: Literal["batch", "classes"] = "batch"
    size: int | None = None

    def __post_init__(self) -> None:
        one_of(self, "over", self.over, ("batch", "classes"))
        if self.size is not None and self.size < 1:
            raise RecipeError(f"RowTransport.size must be at least 1 row to a transport problem, got {self.size}.")
        if not self.temperature > 0:
            raise RecipeError(f"RowTransport.temperature must be positive, got {self.temperature}.")

    def probabilities(self, logits: Tensor) -> Tensor:
        return log_probs(logits, self.temperature).exp()

    def __call__(self, *, teacher: Tensor, student: Tensor) -> tuple[Tensor, int]:
        """From probabilities [N, V]: what moving the student's row costs, [N], and in how many problems."""
        if teacher.shape != student.shape:
            raise ModelError(
                f"Transport compares as many student as teacher rows over the same outcomes, got {list(student.shape)} "
                f"and {list(teacher.shape)}."
            )
        teacher, rows = teacher.detach(), len(student)
        if not rows:
            return student.sum(-1), 0
        if self.over == "classes":
            return self.sinkhorn(teacher=teacher.unsqueeze(-1), student=student.unsqueeze(-1)).sum(-1), rows
        cost_N = student.new_zeros(rows)
        groups = problems(rows, self.size or rows)
        for index_GS in groups:
            cost_GS = self.sinkhorn(teacher=teacher[index_GS], student=student[index_GS])
            cost_N = cost_N.index_put((index_GS,), cost_GS)
        return cost_N, sum(map(len, groups))


def problems(rows: int, size: int) -> list[Tensor]:
    """Row numbers by transport problem, [G, S] for those of one size: ceil(rows / size) problems, sizes at most 1 apart."""
    count = -(-rows // size)
    least, longer = divmod(rows, count)
    index_GS = torch.arange(least * count).view(least, count).T
    last = torch.arange(least * count, rows)[:, None]
    return [part for part in (torch.cat([index_GS[:longer], last], 1), index_GS[longer:]) if part.numel()]


@dataclass(frozen=True)
class SinkhornTerm(TokenTerm):
    """sum_ij P_ij |q_i - p_j| of a transport problem, over the counted positions or over whole sequences.

    of: "sequences" averages the probabilities of each sequence first. The count is the number of transport problems, so
    that `coefficient` weighs one, whose mass is its rows with marginals "ones". It looks at the whole batch.
    """

    name = "sinkhorn"
    couples: ClassVar[Literal["row", "batch"]] = "batch"
    coefficient: float = 0.0008
    transport: RowTransport = field(default_factory=RowTransport)
    of: Literal["positions", "sequences"] = "positions"

    def __post_init__(self) -> None:
        one_of(self, "of", self.of, ("positions", "sequences"))

    def __call__(self, states: TokenStates) -> Term:
        student, teacher = map(self.transport.probabilities, (states.student_logits(), states.teacher_logits()))
        if self.of == "sequences":
            student, teacher = (sequence_means(x, states.rows) for x in (student, teacher.to(student.device)))
        cost, count = self.transport(teacher=teacher.to(student), student=student)
        return Term(cost.sum(), cost.new_tensor(float(count)), self.coefficient, unit="transport problem")


def sequence_means(values_NV: Tensor, rows: Rows) -> Tensor:
    """The mean over each row's positions, without the rows that have none. [B', V]."""
    length_B = rows.mask_BR.sum(1)
    sums_BV = values_NV.new_zeros(len(length_B), values_NV.shape[-1]).index_add(0, rows.row_N, values_NV)
    some_B = length_B > 0
    return sums_BV[some_B] / length_B[some_B, None]

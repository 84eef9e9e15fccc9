"""The counted positions of a batch of tokens, as rows and as what a step knows of them.

N counted positions of a batch, in rows [B, R] where they are wanted by response, R the longest; V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from potstill.contracts import keyed
from potstill.contracts.batch import TokenBatch
from potstill.contracts.errors import SignalError
from potstill.contracts.signals import FullLogits, HiddenAndHead, Signal, SpanLogp, TokenLogp, TopKLogp
from potstill.contracts.terms import Term
from potstill.divergences import ForwardKL, LinearDivergence, TopK, entropy, linear_divergence, log_probs
from potstill.weighting import Positions

CHUNK = 2**20  # logits that go through the row-wise work at once


@dataclass(frozen=True)
class Rows:
    """Where the N counted positions of a batch lie in rows: [N] <-> [B, R], R the longest row."""

    row_N: Tensor
    order_N: Tensor
    mask_BR: Tensor

    @staticmethod
    def of(counted_BT: Tensor) -> "Rows":
        order_BT = counted_BT.cumsum(1) - 1
        row_N = torch.arange(len(counted_BT), device=counted_BT.device)[:, None].expand_as(counted_BT)[counted_BT]
        length_B = counted_BT.sum(1)
        longest = int(length_B.max()) if len(length_B) else 0
        return Rows(
            row_N, order_BT[counted_BT], torch.arange(longest, device=counted_BT.device)[None] < length_B[:, None]
        )

    def spread(self, values_N: Tensor) -> Tensor:
        """[N] -> [B, R], zero beyond a row's end."""
        out = values_N.new_zeros(self.mask_BR.shape)
        return out.index_put((self.row_N, self.order_N), values_N)

    def gather(self, values_BR: Tensor) -> Tensor:
        return values_BR[self.row_N, self.order_N]


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, function: Callable[[Tensor, slice], Tensor]) -> Tensor:
        size = max(1, CHUNK // logits_NV.shape[-1])
        gradient = torch.empty_like(logits_NV) if ctx.needs_input_grad[0] else None
        values = []
        for start in range(0, len(logits_NV), size):
            where = slice(start, start + size)
            with torch.set_grad_enabled(gradient is not None):
                rows = logits_NV[where].detach().requires_grad_(gradient is not None)
                value = function(rows, where)
                if gradient is not None:
                    gradient[where] = torch.autograd.grad(value.sum(), rows)[0]
            values.append(value.detach())
        ctx.save_for_backward(*([gradient] if gradient is not None else []))
        return torch.cat(values) if values else logits_NV.new_zeros(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradient_N[:, None].to(gradient.dtype), None


def by_rows(function: Callable[[Tensor, slice], Tensor], logits_NV: Tensor) -> Tensor:
    """`function(some rows of logits, which) -> a value each`, over all rows. [N, V] -> [N].

    A value may depend on its own row alone. The rows go through in pieces that fit a cache, and each piece's gradient is
    made at once, so that one [N, V] tensor is kept for the backward pass and not one for every operation.
    """
    return cast(Tensor, _ByRows.apply(logits_NV, function))


def token_logp(
    student: Any, hidden_ND: Tensor, tokens_N: Tensor, *, temperature: float = 1.0, vocabulary: int | None = None
) -> Tensor:
    """log q of tokens from the hidden states before them, differentiable, [N]; no [N, V] is kept for a linear head."""
    if student.has_linear_head:
        return -_linear_nll(student, hidden_ND, tokens_N, None, temperature, vocabulary, True).values
    pick = lambda logits_MV, where: -nll(logits_MV[:, :vocabulary], tokens_N[where], temperature)
    return by_rows(pick, student.head(hidden_ND))


def weighted_nll(
    student: Any,
    hidden_ND: Tensor,
    tokens_N: Tensor,
    weights_N: Tensor,
    *,
    temperature: float = 1.0,
    vocabulary: int | None = None,
) -> Tensor:
    """sum_n w_n (-log q(token_n)), a scalar; weights may be negative (advantages) and are not differentiated."""
    if student.has_linear_head:
        return _linear_nll(student, hidden_ND, tokens_N, weights_N.detach(), temperature, vocabulary, False).total
    logp_N = token_logp(student, hidden_ND, tokens_N, temperature=temperature, vocabulary=vocabulary)
    return -(weights_N.detach() * logp_N).sum()


def _linear_nll(
    student: Any, hidden_ND: Tensor, tokens_N: Tensor, weights_N: Tensor | None, temperature: float,
    vocabulary: int | None, differentiable: bool,
) -> LinearDivergence:  # fmt: skip
    """The forward KL from a teacher that is sure of the token: -log q of it."""
    head = student.with_head(hidden_ND)
    return linear_divergence(
        ForwardKL(),
        hidden_ND,
        head.head_VD,
        teacher=TopKLogp(torch.zeros_like(tokens_N, dtype=torch.float32)[:, None], tokens_N[:, None]),
        support=TopK(1, tail="drop"),
        weights=weights_N,
        temperature=temperature,
        student_bias=head.bias_V,
        student_scale=head.scale,
        student_softcap=head.softcap,
        vocabulary=vocabulary,
        compiled=student.compiled,
        differentiable_values=differentiable,
    )


def nll(logits_MV: Tensor, tokens_M: Tensor, temperature: float = 1.0) -> Tensor:
    """-log q of tokens from whole logits, [M]."""
    return -log_probs(logits_MV, temperature).gather(-1, tokens_M[:, None])[:, 0]


def scored(
    student: Any, hidden_ND: Tensor, tokens_N: Tensor, *, temperature: float = 1.0, entropy_graph: bool = False
) -> tuple[Tensor, Tensor]:
    """log q of tokens, differentiable, and the student's entropy there, detached unless `entropy_graph`. [N] each."""
    if student.has_linear_head and not entropy_graph:
        out = _linear_nll(student, hidden_ND, tokens_N, None, temperature, None, True)
        assert out.student_entropy is not None
        return -out.values, out.student_entropy
    logits_NV = student.head(hidden_ND)
    logp_N = by_rows(lambda some, where: -nll(some, tokens_N[where], temperature), logits_NV)
    return logp_N, by_rows(lambda some, where: entropy(log_probs(some, temperature)), logits_NV)


def average_of(rows: Rows, average: str, length: int | None = None) -> tuple[Tensor, Tensor]:
    """What each position counts for in an average [N], and what the sum is divided by.

    "token" divides by all counted positions, "sequence" averages over each row first, "constant" divides every row by one
    `length`.
    """
    length_N = rows.mask_BR.sum(1)[rows.row_N].float()
    if average == "token":
        return torch.ones_like(length_N), length_N.new_tensor(float(len(length_N)))
    share_N = 1 / length_N if average == "sequence" else torch.full_like(length_N, 1 / (length or 1))
    return share_N, rows.mask_BR.any(1).sum().float()


def positions_of(
    batch: TokenBatch, rows: Rows, seen: Mapping[str, Tensor], needs: Sequence[str], key: int, *,
    of: type[Positions] = Positions, **more: Any,
) -> Positions:  # fmt: skip
    """What a weighting that has these needs may read: what was `seen` [N], and what the batch carries.

    key: of random selections, which are a function of it, the sample and the place. of, more: a larger kind of Positions.
    """
    weighable = {name: values for name, values in seen.items() if hasattr(of, f"{name}_BR")}
    known: dict[str, Any] = {f"{name}_BR": rows.spread(values) for name, values in weighable.items()}
    if "segment_BT" in batch.extra:
        known["segment_BR"] = rows.spread(batch.extra["segment_BT"][batch.counted_BT])
    if "context_logp_KBT" in batch.extra:
        known["context_logp_KBR"] = torch.stack(
            [rows.spread(logp_BT[batch.counted_BT]) for logp_BT in batch.extra["context_logp_KBT"]]
        )
    if "noise_BR" in needs:
        place_1R = torch.arange(rows.mask_BR.shape[1], device=rows.mask_BR.device)[None]
        known["noise_BR"] = keyed.uniform(key, batch.ids_B[:, None], place_1R)
    return of(rows.mask_BR, reward_B=batch.extra.get("reward"), **known, **more)


def coupling(*parts: Any) -> Literal["position", "batch"]:
    """How far an objective looks with these weightings and terms."""
    return "batch" if any(part.couples == "batch" for part in parts) else "position"


def signal_of(teacher: Any, batch: TokenBatch, estimator_needs: type[Signal] = FullLogits) -> Signal:
    """What a teacher says of the batch's positions, asked once a batch: the most that costs least."""
    if HiddenAndHead in teacher.gives and getattr(teacher.model, "has_linear_head", False):
        need: type[Signal] = HiddenAndHead
    elif FullLogits in teacher.gives:
        need = FullLogits
    elif SpanLogp in teacher.gives:
        need = SpanLogp
    elif TokenLogp in teacher.gives and estimator_needs is TokenLogp:
        need = TokenLogp
    else:
        need = TopKLogp
    return cast(Signal, batch.remember(("signal", id(teacher), need), lambda: teacher.score(batch, need)))


@torch.no_grad()
def teacher_logp(teacher: Any, batch: TokenBatch, temperature: float = 1.0, vocabulary: int | None = None) -> Tensor:
    """log p of the batch's counted tokens, from the least that a teacher gives. [N]."""
    signal, tokens_N = signal_of(teacher, batch, TokenLogp), batch.tokens_counted
    if isinstance(signal, HiddenAndHead):
        return token_logp(teacher.model, signal.hidden_ND, tokens_N, temperature=temperature, vocabulary=vocabulary)
    if isinstance(signal, FullLogits):
        pick = lambda some, where: -nll(some[:, :vocabulary], tokens_N[where], temperature)
        return by_rows(pick, signal.logits)
    known = getattr(teacher, "temperature", 1.0)
    if not isinstance(signal, TokenLogp) or known != temperature:
        raise SignalError(
            f"{teacher.name} gives {type(signal).__name__} at temperature {known}, and the tokens' log-probabilities at "
            f"{temperature} are asked. Use a live teacher (a model folder or id)."
        )
    return signal.logp_N


@dataclass
class TokenStates:
    """What a step knows of the N counted positions of one batch."""

    student: Any
    batch: TokenBatch
    rows: Rows
    tokens_N: Tensor
    hidden_ND: Tensor  # the student's, with its graph
    share_N: Tensor  # what a position counts for in the average
    count: Tensor  # what sums are divided by
    unit: str  # of that count
    vocabulary: int | None  # the outcomes that student and teacher share; None where no teacher is
    signal: Signal | None = None  # the teacher's, at the same positions
    seen: Mapping[str, Tensor] = field(default_factory=dict)  # detached [N]: student_entropy, log_ratio, reverse_kl ...
    weights_BR: Tensor | None = None  # what the weighting gave

    def student_logits(self, where: Tensor | None = None) -> Tensor:
        """Logits of all positions, or of those picked by a mask or by numbers, with their graph. [M, V]."""
        hidden = self.hidden_ND if where is None else self.hidden_ND[where]
        return cast(Tensor, self.student.head(hidden))[:, : self.vocabulary]

    def teacher_logits(self, where: Tensor | None = None) -> Tensor:
        """The teacher's logits there, detached. [M, V]."""
        if not isinstance(self.signal, HiddenAndHead | FullLogits):
            raise SignalError(
                f"This term needs the teacher's whole logits, and it gives {type(self.signal).__name__}. "
                "Use a live teacher (a model folder or id)."
            )
        if isinstance(self.signal, HiddenAndHead):
            return self.signal.logits(where)[:, : self.vocabulary].detach()
        logits = self.signal.logits if where is None else self.signal.logits[where]
        return logits[:, : self.vocabulary].detach()

    def student_logp(self, temperature: float = 1.0) -> Tensor:
        """log q of the batch's own tokens, with its graph. [N]."""
        return token_logp(
            self.student, self.hidden_ND, self.tokens_N, temperature=temperature, vocabulary=self.vocabulary
        )


class TokenTerm:
    """Base of a further term of token distillation, on the same states: ranking, entropy, features, contrast ...

    A subclass is a small frozen dataclass with a `coefficient`; `needs` names what it reads of `TokenStates.seen`, and
    `couples` says how far it looks: within a row, or over the whole batch, which then must not be cut.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    couples: ClassVar[Literal["row", "batch"]] = "row"
    coefficient: float = 1.0

    def __call__(self, states: TokenStates) -> Term:
        raise NotImplementedError

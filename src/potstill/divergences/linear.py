"""A divergence straight from hidden states and output heads, never holding logits [N, V].

Positions go through in chunks. A chunk's logits of student and teacher are made, replaced in place by the gradient of
the loss in the student's logits, and multiplied on to the gradients of hidden states and head: the student's head is
multiplied three times and the teacher's once, which is the least there is. N positions (any leading shape), V
vocabulary, D widths (student's and teacher's may differ), K support size.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from potstill.contracts.errors import ModelError, RecipeError
from potstill.contracts.signals import FullLogits, HiddenAndHead, Signal, TopKLogp
from potstill.divergences.estimators import Estimator, Exact
from potstill.divergences.family import FDivergence, entropy, promoted
from potstill.divergences.operands import (
    autocast,
    bend_of,
    check_width,
    direct,
    fast_in_low,
    flat_teacher,
    gathered,
    known_support,
    per_position,
    vocabulary_of,
)
from potstill.divergences.supports import Full, Support, TopK, log_mass, log_probs, tail_logp

CHUNK_BYTES = 160 * 10**6  # of one buffer of logits; two are held
CHUNK_ROWS = 512  # above it the products gain nothing, far below it they wait for the heads to be read again
GPU_ROWS = 128  # rows of one pass of row-wise work on an accelerator
BLOCK = 2**20  # logits in one pass of row-wise work: enough rows for all threads, few enough for the caches
RECOMPUTE = {"realize_opcount_threshold": 1000, "realize_reads_threshold": 1000}  # fuse rather than write to memory
TILE = 2**22  # entries of a head that are converted at once where the processor multiplies its type slowly


class RowStatistics(NamedTuple):
    """What is known of positions when their row has been seen, detached, [*P] each, nats, at the temperature compared.

    The token log-probabilities are there when tokens were given, the teacher's unless it gives its top k alone, the
    student's entropy unless only its kept logits were made. With a teacher's top k, its entropy counts the tail as one.
    `also` is [*P, A], the A other divergences that were asked.
    """

    value: Tensor
    student_entropy: Tensor | None = None
    teacher_entropy: Tensor | None = None
    student_logp: Tensor | None = None
    teacher_logp: Tensor | None = None
    also: Tensor | None = None


@dataclass(frozen=True)
class LinearDivergence:
    """Result of `linear_divergence`: `total` is the weighted sum over positions, a scalar, and carries the gradient;
    `count` the sum of the weights, `values` [*P] the divergences, the rest is of `RowStatistics`, detached."""

    total: Tensor
    count: Tensor
    values: Tensor
    student_entropy: Tensor | None
    teacher_entropy: Tensor | None
    student_logp: Tensor | None
    teacher_logp: Tensor | None
    also: Tensor | None


def linear_divergence(
    divergence: FDivergence | Estimator,
    student_hidden: Tensor,
    student_head: Tensor,
    *,
    teacher: Signal,
    weights: Tensor | Callable[[RowStatistics], Tensor] | None = None,
    tokens: Tensor | None = None,
    sampled_logp: Tensor | None = None,
    support: Support = Full(),
    temperature: float = 1.0,
    student_bias: Tensor | None = None,
    student_scale: float = 1.0,
    student_softcap: float | None = None,
    vocabulary: int | None = None,
    chunk: int | None = None,
    compiled: bool = False,
    differentiable_values: bool = False,
    grad_scale: float | None = None,
    also: Sequence[FDivergence] = (),
) -> LinearDivergence:
    """sum_n w_n D(p_n, q_n) with log q = log softmax(bend(hidden @ head.T + bias) / temperature), p likewise.

    student_hidden [*P, Ds], student_head [V, Ds] (an embedding, where tied), bias [V]; bend(z) multiplies by
        `student_scale` (Cohere), then soft-caps, c tanh(z / c), c = `student_softcap` (Gemma).
    teacher: HiddenAndHead (with its own width, bias and bend), FullLogits [*P, V], or TopKLogp [*P, K] (log-probs at
        this temperature; how its tail counts is `support.tail`, default the bucket; of more than `support.k` the likeliest
        k are compared). It gets no gradient.
    divergence: any FDivergence over `support`, or an Estimator, whose values are then its surrogate's.
    weights: [*P], or a function of the RowStatistics of some rows; never differentiated. Positions of weight 0 given
        beforehand are not looked at: their values are 0. Weights that need whole sequences need a first pass, under
        `torch.no_grad()`.
    tokens [*P] int64: adds their log-probabilities to the result; estimators look at them. sampled_logp: see Estimator.
    vocabulary: how many outcomes exist. Rows of a head beyond it are padding, which nobody can emit; needed where the
        two heads differ.
    compiled: fuse the row-wise work by torch.compile, 2 to 10 s for each divergence and shape, then about a third to a
        half of the time of the call; without a compiler it says so and goes on.
    differentiable_values: `values` carry the gradient as well as `total`, for losses that transform them; the products
        are made again in the backward pass.
    grad_scale: the factor that `total` will have in the loss. Where known beforehand, and `student_head.grad` exists,
        the head's gradient is added there during the forward pass, with no buffer of its own.
    also: other divergences to look at on the way, over all that the teacher gives; never differentiated.

    The gradient is made in the forward pass, once: a second backward pass through the same call is refused, and so is
    differentiating twice. Computed in float32 or better, also under autocast; bfloat16 heads are multiplied in float32
    where the processor is slower in bfloat16. Sharded heads (DTensor) are gathered once.
    """
    hidden, head, bias = (gathered(x) for x in (student_hidden, student_head, student_bias))
    assert hidden is not None and head is not None
    places = hidden.shape[:-1]
    part = Exact(divergence, support) if isinstance(divergence, FDivergence) else divergence
    if isinstance(divergence, Estimator) and support != Full():
        raise RecipeError("An estimator has its own support: give `support` to Exact, not to linear_divergence.")
    if not temperature > 0.0:
        raise RecipeError(f"temperature must be positive, got {temperature}.")
    check_width("student", hidden, head, bias)
    flat = flat_teacher(teacher, places)
    if isinstance(flat, TopKLogp) and isinstance(part, Exact):
        flat = known_support(flat, part.support)
    size = vocabulary_of(vocabulary, head, flat)
    whole = size == len(head)
    own = autocast(
        hidden.flatten(0, -2), head if whole else head[:size], bias if whole or bias is None else bias[:size]
    )
    given = [per_position(name, x, places) for name, x in (("tokens", tokens), ("sampled_logp", sampled_logp))]
    weigh = weights if callable(weights) else None
    weights_N = None if weights is None or weigh else per_position("weights", cast(Tensor, weights), places)
    if differentiable_values and weigh:
        raise RecipeError(
            "differentiable_values makes the products again in the backward pass, with the weights that autograd finds; "
            "a function of the row cannot be one of them. Multiply the values by your weights yourself."
        )
    kept_only = isinstance(flat, TopKLogp) and isinstance(part, Exact) and _tail(part.support) == "renormalize"
    rows = _Rows(part, temperature, (student_scale, student_softcap), bend_of(flat), weigh, tuple(also), kept_only)
    engine = _Engine(rows, flat, given[0], given[1], size, chunk, compiled, torch.is_grad_enabled())
    if differentiable_values:
        out = cast(tuple[Tensor | None, ...], _Again.apply(*own, engine, weights_N))
        value = cast(Tensor, out[0])
        w = torch.ones_like(value) if weights_N is None else weights_N.to(value.dtype)
        total, count = (w * value).sum(), w.sum()
    else:
        into = direct(head, cast(Tensor, own[1]), grad_scale)
        total, count, *out = cast(Any, _Once.apply(*own, engine, weights_N, into))
    shaped = [None if x is None else x.unflatten(0, places) if len(places) != 1 else x for x in out]
    return LinearDivergence(total, count.detach(), cast(Tensor, shaped[0]), *shaped[1:])


@dataclass(frozen=True)
class _Rows:
    """The row-wise work: student logits [M, V] in, their gradient out in their place, and the statistics."""

    part: Estimator
    temperature: float
    student_bend: tuple[float, float | None]
    teacher_bend: tuple[float, float | None]
    weigh: Callable[[RowStatistics], Tensor] | None
    also: tuple[FDivergence, ...]
    kept_only: bool = False  # the columns are a support's, so that nothing is known of the others

    def __call__(
        self,
        student_MV: Tensor,
        teacher_MV: Tensor,
        ids_MK: Tensor | None,
        weights_M: Tensor,
        tokens_M: Tensor | None,
        sampled_M: Tensor | None,
        gradient: bool,
    ) -> tuple[Tensor, RowStatistics]:
        """Weights [M] and statistics; with `gradient`, the student's logits become weight x gradient."""
        teacher_logp: Tensor | None = None
        logits, slope = _bent(student_MV, self.student_bend, gradient)
        log_q = log_probs(logits, self.temperature)
        compared: Callable[..., Tensor]
        if ids_MK is not None:
            known = teacher_MV.to(log_q.dtype)
            compared = lambda log_q, part=None: self._on_known(known, ids_MK, log_q, part)
            tail = known if self.kept_only else torch.cat([known, tail_logp(known)[:, None]], -1)
            teacher_entropy = entropy(tail)
        else:
            z = _bent(teacher_MV, self.teacher_bend, False)[0]
            log_p = log_probs(z, self.temperature)
            compared = lambda log_q, part=None: self._on_rows(log_p, log_q, tokens_M, sampled_M, part)
            teacher_entropy = entropy(log_p)
            if tokens_M is not None:
                teacher_logp = log_p.gather(-1, tokens_M[:, None])[:, 0]
        if gradient and ids_MK is None and (whole := self._whole) is not None:
            value, pulled = whole.entries_and_pull(teacher_logp=log_p, student_logp=log_q)
        elif gradient:
            value, pull = cast(Any, torch.func.vjp(compared, log_q))
            (pulled,) = pull(torch.ones_like(value))
        else:
            value = compared(log_q)
        if value.dim() == 2:  # the contributions of single outcomes
            value = value.sum(-1)
        stats = RowStatistics(value, None if self.kept_only else entropy(log_q), teacher_entropy)
        if tokens_M is not None and not self.kept_only:
            stats = stats._replace(student_logp=log_q.gather(-1, tokens_M[:, None])[:, 0], teacher_logp=teacher_logp)
        if self.also:
            stats = stats._replace(also=torch.stack([compared(log_q, part).sum(-1) for part in self.also], -1))
        weights_M = weights_M if self.weigh is None else self.weigh(stats).to(weights_M.dtype)
        if gradient:
            inner = pulled - log_q.exp() * pulled.sum(-1, keepdim=True)  # back through the normalisation
            scaled = weights_M[:, None] / self.temperature * inner
            student_MV.copy_(scaled if slope is None else scaled * slope)
        return weights_M, stats

    @property
    def _whole(self) -> FDivergence | None:
        """The divergence, where it compares whole rows."""
        return self.part.divergence if isinstance(self.part, Exact) and isinstance(self.part.support, Full) else None

    def _on_rows(
        self,
        log_p: Tensor,
        log_q: Tensor,
        tokens_M: Tensor | None,
        sampled_M: Tensor | None,
        also: FDivergence | None,
    ) -> Tensor:
        if also is not None:
            return also.entries(teacher_logp=log_p, student_logp=log_q)
        if (whole := self._whole) is not None:
            return whole.entries(teacher_logp=log_p, student_logp=log_q)
        return self.part.per_position(log_p, log_q, cast(Tensor, tokens_M), sampled_M)

    def _on_known(self, known: Tensor, ids_MK: Tensor, log_q: Tensor, also: FDivergence | None) -> Tensor:
        """The divergence on the k outcomes that the teacher gave, with its tail."""
        part = cast(Exact, self.part)
        tail = _tail(part.support)
        kept = log_q if self.kept_only else log_q.gather(-1, ids_MK)
        if tail == "renormalize":
            known, kept = log_probs(known), log_probs(kept)
        if tail == "bucket" and ids_MK.shape[-1] < log_q.shape[-1]:  # else there is no rest, and rounding makes one
            rest = log_mass(log_q.scatter(-1, ids_MK, -math.inf))
            known, kept = torch.cat([known, tail_logp(known)[:, None]], -1), torch.cat([kept, rest[:, None]], -1)
        return (also or part.divergence).entries(teacher_logp=known, student_logp=kept)


@dataclass
class _Engine:
    """The chunks of one call."""

    rows: _Rows
    teacher: Signal
    tokens_N: Tensor | None
    sampled_N: Tensor | None
    vocabulary: int
    chunk: int | None
    compiled: bool
    gradient: bool  # whether autograd was recording when the call was made

    @torch.no_grad()
    def __call__(
        self, student: HiddenAndHead, weights_N: Tensor | None, wanted: tuple[bool, bool, bool], into: Tensor | None
    ) -> tuple[Tensor, RowStatistics, list[Tensor | None]]:
        """Weights [N], statistics [N], and the gradients of hidden states, head and bias, where wanted."""
        hidden_ND, head_VD, bias_V = student.hidden_ND, student.head_VD, student.bias_V
        total, device = len(hidden_ND), hidden_ND.device
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        weights = torch.ones(total, dtype=dtype, device=device) if weights_N is None else weights_N.detach().to(dtype)
        where = torch.arange(total, device=device) if weights_N is None else weights.nonzero()[:, 0]
        used = torch.zeros_like(weights)
        found: list[Tensor | None] | None = None
        wide = torch.promote_types(head_VD.dtype, torch.float32)  # sums over chunks are kept in it
        gradients = [
            torch.zeros_like(hidden_ND) if wanted[0] else None,
            into if into is not None else torch.zeros_like(head_VD, dtype=wide) if wanted[1] else None,
            torch.zeros_like(cast(Tensor, bias_V), dtype=dtype) if wanted[2] else None,
        ]
        with torch.autocast(device.type, enabled=False):
            size, block = self._sizes(len(where), head_VD)
            chunk = (_KeptColumns if self.rows.kept_only else _AllColumns)(student, self.teacher, self.vocabulary, size)
            for picked in _blocks(len(where), size):
                positions = where[picked]
                some = positions if len(positions) < total else slice(None)
                logits_MV, teacher_MV, ids_MK = chunk.logits(some)
                for rows in _blocks(len(positions), block):
                    at = positions[rows]
                    used[at], seen = _row_function(self.rows, self.compiled and len(at) == block)(
                        logits_MV[rows],
                        teacher_MV[rows],
                        None if ids_MK is None else ids_MK[rows],
                        weights[at],
                        None if self.tokens_N is None else self.tokens_N[at],
                        None if self.sampled_N is None else self.sampled_N[at],
                        any(wanted),
                    )
                    # Written into place: small results that stay would break up the memory between large ones.
                    found = found or [None if x is None else x.new_zeros(total, *x.shape[1:]) for x in seen]
                    for column, x in zip(found, seen, strict=True):
                        if column is not None and x is not None:
                            column[at] = x
                chunk.back(some, logits_MV, gradients)
        if into is None and gradients[1] is not None:
            gradients[1] = gradients[1].to(head_VD.dtype)
        if gradients[2] is not None:
            gradients[2] = gradients[2].to(cast(Tensor, bias_V).dtype)
        return used, RowStatistics(*cast(Any, found or self._nothing(weights))), gradients

    def _nothing(self, like_N: Tensor) -> list[Tensor]:
        """The statistics where no position was looked at."""
        return [torch.zeros_like(like_N)] * 5 + [like_N.new_zeros(len(like_N), len(self.rows.also))]

    def _sizes(self, positions: int, head_VD: Tensor) -> tuple[int, int]:
        """How many positions make a chunk, and how many rows a block of row-wise work."""
        width = (
            cast(TopKLogp, self.teacher).indices_NK.shape[1] * head_VD.shape[1]
            if self.rows.kept_only
            else self.vocabulary
        )
        size = self.chunk or min(CHUNK_ROWS, max(1, CHUNK_BYTES // (4 * width)))
        size = max(1, math.ceil(positions / max(1, math.ceil(positions / size))))  # chunks of about one size
        wanted = GPU_ROWS if head_VD.device.type != "cpu" else max(torch.get_num_threads(), BLOCK // self.vocabulary)
        block = size if self.rows.kept_only else min(size, wanted)
        return size + -size % block if positions > size else size, block


class _AllColumns:
    """Logits of whole rows, in buffers made once a call, and their gradient's way back."""

    def __init__(self, student: HiddenAndHead, teacher: Signal, vocabulary: int, size: int) -> None:
        self.hidden, self.teacher, self.vocabulary = student.hidden_ND, teacher, vocabulary
        self.own = _Product(student.head_VD, student.bias_V)
        self.buffer = torch.empty(size, vocabulary, dtype=self.own.dtype, device=student.hidden_ND.device)
        if isinstance(teacher, HiddenAndHead):
            bias_V = None if teacher.bias_V is None else teacher.bias_V[:vocabulary]
            self.theirs = _Product(teacher.head_VD[:vocabulary], bias_V)
            self.teacher_buffer = torch.empty(size, vocabulary, dtype=self.theirs.dtype, device=self.buffer.device)

    def logits(self, some: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        hidden = self.hidden[some]
        student_MV = self.own.logits(hidden, self.buffer[: len(hidden)])
        if isinstance(self.teacher, HiddenAndHead):
            theirs = self.teacher.hidden_ND[some]
            return student_MV, self.theirs.logits(theirs, self.teacher_buffer[: len(theirs)]), None
        if isinstance(self.teacher, FullLogits):
            return student_MV, self.teacher.logits[some][:, : self.vocabulary], None
        known = cast(TopKLogp, self.teacher)
        return student_MV, known.logp_NK[some], known.indices_NK[some]

    def back(self, some: Any, inner_MV: Tensor, gradients: list[Tensor | None]) -> None:
        hidden, head, bias = gradients
        if hidden is not None:
            hidden[some] = self.own.back(inner_MV).to(hidden.dtype)
        if head is not None:
            self.own.accumulate(head, inner_MV, self.hidden[some])
        if bias is not None:
            bias += inner_MV.sum(0, dtype=bias.dtype)


class _KeptColumns:
    """Logits of the outcomes that the teacher names alone, [M, K]: the rest of the head is not touched."""

    def __init__(self, student: HiddenAndHead, teacher: Signal, vocabulary: int, size: int) -> None:
        self.student, self.teacher = student, cast(TopKLogp, teacher)

    def logits(self, some: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        self.ids_MK = self.teacher.indices_NK[some]
        self.head_MKD = self.student.head_VD[self.ids_MK]
        hidden_MD = self.student.hidden_ND[some].to(self.head_MKD.dtype)
        logits_MK = torch.einsum("md,mkd->mk", hidden_MD, self.head_MKD)
        if self.student.bias_V is not None:
            logits_MK = logits_MK + self.student.bias_V[self.ids_MK]
        return logits_MK, self.teacher.logp_NK[some], self.ids_MK

    def back(self, some: Any, inner_MK: Tensor, gradients: list[Tensor | None]) -> None:
        hidden, head, bias = gradients
        if hidden is not None:
            hidden[some] = torch.einsum("mk,mkd->md", inner_MK, self.head_MKD.to(inner_MK.dtype)).to(hidden.dtype)
        if head is not None:
            outer_MKD = inner_MK[..., None] * self.student.hidden_ND[some][:, None].to(inner_MK.dtype)
            head.index_add_(0, self.ids_MK.flatten(), outer_MKD.flatten(0, 1).to(head.dtype))
        if bias is not None:
            bias.index_add_(0, self.ids_MK.flatten(), inner_MK.flatten().to(bias.dtype))


class _Product:
    """The three products of a head [V, D], by tiles of float32 where the processor is slow in the head's type."""

    def __init__(self, head_VD: Tensor, bias_V: Tensor | None) -> None:
        self.head, self.bias = head_VD, bias_V
        slow = head_VD.device.type == "cpu" and head_VD.dtype in (torch.bfloat16, torch.float16) and not fast_in_low()
        self.dtype = torch.float32 if slow else head_VD.dtype
        tile = max(1, TILE // head_VD.shape[1]) if slow else len(head_VD)
        self.tiles = list(_blocks(len(head_VD), tile))

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        hidden = hidden.to(self.dtype)
        for tile in self.tiles:
            head = self.head[tile].to(self.dtype).T
            if self.bias is None:
                torch.mm(hidden, head, out=out[:, tile]) if len(self.tiles) == 1 else out[:, tile].copy_(hidden @ head)
            else:
                out[:, tile] = torch.addmm(self.bias[tile].to(self.dtype), hidden, head)
        return out

    def back(self, gradient_MV: Tensor) -> Tensor:
        out = gradient_MV.new_zeros(len(gradient_MV), self.head.shape[1])
        for tile in self.tiles:
            out.addmm_(gradient_MV[:, tile], self.head[tile].to(self.dtype))
        return out

    def accumulate(self, into_VD: Tensor, gradient_MV: Tensor, hidden: Tensor) -> None:
        hidden = hidden.to(self.dtype)
        if into_VD.dtype == self.dtype:
            into_VD.addmm_(gradient_MV.T, hidden)
        else:
            into_VD += (gradient_MV.T @ hidden).to(into_VD.dtype)


class _Once(torch.autograd.Function):
    """Gradients made in the forward pass, scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, bias: Tensor | None, engine: _Engine, weights_N: Tensor | None,
        into: tuple[Tensor, float] | None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        wanted = cast(Any, tuple(need and engine.gradient for need in ctx.needs_input_grad[:3]))
        direct = into[0] if into is not None and wanted[1] else None
        scale = 1.0 if direct is None or into is None else into[1]
        if direct is not None:  # the gradient in the logits must carry the factor before it reaches the head's
            weights_N = (hidden.new_ones(len(hidden), dtype=torch.float32) if weights_N is None else weights_N) * scale
        used, stats, gradients = engine(HiddenAndHead(hidden, head, bias), weights_N, wanted, direct)
        used = used / scale
        if direct is not None:
            gradients[1] = None
        ctx.gradients, ctx.expected = gradients, None if direct is None else scale
        # A position of weight 0 counts nothing, whatever its value is.
        total = torch.where(used != 0, used * stats.value, 0.0).sum()
        result = (total, used.sum(), *stats)
        ctx.mark_non_differentiable(*(x for x in result[1:] if x is not None))
        ctx.set_materialize_grads(False)
        return result

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        _check_once()
        if grad_total is None:
            return (None,) * 6
        if ctx.gradients is None:
            raise ModelError(
                "linear_divergence makes its gradient once, and it has been used: a second backward pass needs a second "
                "call, or differentiable_values=True."
            )
        gradients, ctx.gradients = ctx.gradients, None
        factor = grad_total
        if ctx.expected is not None:
            if not math.isclose(float(grad_total), ctx.expected, rel_tol=1e-5):
                raise ModelError(
                    f"linear_divergence was told that its total would have the factor {ctx.expected} in the loss, and it "
                    f"has {float(grad_total)}: the head's gradient is wrong now. Give grad_scale that factor, or leave it out."
                )
            factor = torch.ones_like(grad_total)
        if factor.device.type != "cpu" or float(factor) != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(factor.to(gradient.dtype))
        return (*gradients, None, None, None)


class _Again(torch.autograd.Function):
    """Values that are differentiable; the backward pass makes the products again, with their gradients as weights."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, bias: Tensor | None, engine: _Engine, weights_N: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        _, stats, _ = engine(HiddenAndHead(hidden, head, bias), weights_N, (False, False, False), None)
        ctx.engine = engine
        ctx.save_for_backward(hidden, head, bias)
        ctx.mark_non_differentiable(*(x for x in stats[1:] if x is not None))
        ctx.set_materialize_grads(False)
        return tuple(stats)

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        _check_once()
        if grad_values is None:
            return (None,) * 5
        wanted = tuple(ctx.needs_input_grad[:3])
        _, _, gradients = ctx.engine(HiddenAndHead(*ctx.saved_tensors), grad_values, wanted, None)
        return (*gradients, None, None)


@lru_cache(maxsize=64)
def _row_function(rows: _Rows, compiled: bool) -> Callable[..., tuple[Tensor, RowStatistics]]:
    if not compiled:
        return rows.__call__
    fused = cast(Any, torch.compile)(
        rows.__call__, dynamic=False, fullgraph=True, isolate_recompiles=True, options=RECOMPUTE
    )
    fallback: list[Exception] = []

    def call(*inputs: Any) -> tuple[Tensor, RowStatistics]:
        if not fallback:
            try:
                return fused(*inputs)
            except Exception as cause:  # no compiler, or an operation that it does not know: many kinds
                fallback.append(cause)
                warnings.warn(
                    f"linear_divergence goes on without torch.compile: {str(cause).strip().splitlines()[0][:200]}",
                    stacklevel=2,
                )
        return rows(*inputs)

    return call


def _check_once() -> None:
    if torch.is_grad_enabled():  # silence would leave this part out of the second derivative
        raise ModelError(
            "linear_divergence cannot be differentiated twice (create_graph=True). Compute the divergence from logits there."
        )


def _bent(logits: Tensor, bend: tuple[float, float | None], gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Scaled and soft-capped logits in float32 or better, and their slope in the raw ones (None: 1)."""
    scale, cap = bend
    logits = promoted(logits)
    if scale == 1.0 and not cap:
        return logits, None
    if not cap:
        return logits * scale, torch.full_like(logits[:1], scale)
    inner = torch.tanh(logits * (scale / cap))
    return cap * inner, scale * (1 - inner.square()) if gradient else None


def _blocks(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, max(size, 1)))


def _tail(support: Support) -> str:
    return support.tail if isinstance(support, TopK) else "bucket"

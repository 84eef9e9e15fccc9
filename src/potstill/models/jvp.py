"""Directional derivatives of networks by forward-mode differentiation or finite differences, and attention that has one.

    jvp(f, x, v) = (f(x), df/dx . v)

Consistency training needs the derivative of a network along its teacher's trajectory: one pass with tangents, no graph.
torch has no forward-mode rule for its fused attention, and its rule for group norm stops at some memory layouts. Within
`forward_mode()` both are replaced, for every caller of `scaled_dot_product_attention` (diffusers' and transformers' own
attention included), so that a network need not be changed:

    O = P V, P = softmax(S)  =>  tO = P tV + H V - rowsum(H) O,  H = P * tS                  (rCM, arXiv 2510.08431)

block by block with a running maximum, each block's tangents riding along: nothing of size [queries, keys] is held.

B batch, H heads, Q queries, K keys, D features of a head.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from potstill.contracts.errors import ModelError, RecipeError

Derivative = Literal["exact", "semi", "backward", "central"]
BLOCK = 512


def jvp(
    function: Callable[..., Tensor],
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor],
    derivative: Derivative = "exact",
    *,
    h: float = 1e-3,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor]:
    """(f(primals), derivative of f along the tangents), both detached.

    derivative:
        exact: one forward-mode pass, with attention in blocks of `block`
        semi: forward mode along all arguments but the last (the time), a backward difference along that one
        backward: (f(x) - f(x - h v)) / h, error O(h)
        central: (f(x + h v) - f(x - h v)) / 2h, error O(h^2); three calls with the value itself
    `h` is the step along the tangents, and errors of float32 grow as 1 / h. Parameters are held fixed.
    """
    if derivative not in ("exact", "semi", "backward", "central"):
        raise RecipeError(f"A derivative is one of exact, semi, backward and central, got {derivative!r}.")
    if not h > 0:
        raise RecipeError(f"The step h of a finite difference must be positive, got {h}.")
    moved = lambda by: function(*(x + by * v for x, v in zip(primals, tangents)))
    with torch.no_grad():
        if derivative == "exact":
            return _forward_mode(function, primals, tangents, block)
        if derivative == "central":
            return function(*primals), (moved(h) - moved(-h)) / (2 * h)
        if derivative == "backward":
            value = function(*primals)
            return value, (value - moved(-h)) / h
        *space, time = primals
        value, along = _forward_mode(lambda *x: function(*x, time), space, tangents[:-1], block)
        return value, along + (value - function(*space, time - h * tangents[-1])) / h


def _forward_mode(
    function: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor], block: int
) -> tuple[Tensor, Tensor]:
    try:
        with forward_mode(block):
            value, tangent = torch.func.jvp(function, tuple(primals), tuple(tangents))[:2]
    except NotImplementedError as cause:
        raise ModelError(
            f"This network has a layer without a forward-mode derivative ({str(cause).split('.')[0]}). "
            "Take finite differences instead: derivative: central."
        ) from cause
    return value.detach(), tangent.detach()


class forward_mode(TorchFunctionMode):
    """Within it, attention and group norm are computed by operations that have forward-mode derivatives."""

    def __init__(self, block: int = BLOCK) -> None:
        super().__init__()
        if block < 1:
            raise RecipeError(f"Attention needs blocks of at least one position, got {block}.")
        self.block = block

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return attention(*args, **kwargs, block=self.block)
        if function is F.group_norm:  # its rule takes a view of the tangent, whose layout may be another
            return function(args[0].clone(memory_format=torch.contiguous_format), *args[1:], **kwargs)
        return function(*args, **kwargs)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    block: int = BLOCK,
) -> Tensor:
    """torch's `scaled_dot_product_attention`, by blocks of `block` queries and keys. [B, H, Q, D].

    Exact up to rounding; sums in float32 or better. A row that may see no key is zero. Without a graph, what it holds
    beside inputs and output is of size block x block, with tangents too.
    """
    if dropout_p:
        raise ModelError(
            f"A derivative through attention needs dropout 0, got {dropout_p}: put the network in eval mode."
        )
    if enable_gqa:
        share = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(share, -3), value.repeat_interleave(share, -3)
    dtype, wide = query.dtype, torch.promote_types(query.dtype, torch.float32)
    queries, keys = query.shape[-2], key.shape[-2]
    query = query.to(wide) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*attn_mask.shape[:-2], queries, keys)
    rows = [
        _rows(query[..., i : i + block, :], key, value, attn_mask, is_causal, i, block).to(dtype)
        for i in range(0, queries, block)
    ]
    return torch.cat(rows, -2)


def _rows(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, start: int, block: int
) -> Tensor:
    """Attention of one block of queries, which begins at position `start`."""
    rows = query.shape[-2]
    top = total = output = None
    for j in range(0, key.shape[-2], block):
        if causal and j > start:
            break
        scores = query @ key[..., j : j + block, :].to(query.dtype).mT
        if mask is not None:
            part = mask[..., start : start + rows, j : j + block]
            scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part
        if causal:
            ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(start - j + 1)
            scores = scores.masked_fill(ahead, -torch.inf)
        highest = scores.detach().amax(-1, keepdim=True)  # a mere shift: it needs no derivative
        new = highest if top is None else torch.maximum(top, highest)
        shift = new.masked_fill(new == -torch.inf, 0.0)
        weights = (scores - shift).exp()
        sums, parts = weights.sum(-1, keepdim=True), weights @ value[..., j : j + block, :].to(query.dtype)
        if top is None or total is None or output is None:
            total, output = sums, parts
        else:
            decay = (top - shift).exp()
            total, output = total * decay + sums, output * decay + parts
        top = new
    assert total is not None and output is not None
    return output / total.masked_fill(total == 0, 1.0)

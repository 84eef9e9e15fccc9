"""What `linear_divergence` makes of its arguments: checked, flat, whole, in the types that are multiplied.

N positions (any leading shape *P), V vocabulary, D widths.
"""

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from potstill.contracts.errors import ModelError, SignalError
from potstill.contracts.signals import FullLogits, HiddenAndHead, Signal, TopKLogp
from potstill.divergences.supports import Support, TopK


def gathered(tensor: Tensor | None) -> Tensor | None:
    """A sharded tensor whole; its gradient goes back to the shards."""
    if tensor is None or not hasattr(tensor, "full_tensor"):
        return tensor
    from torch.distributed.tensor import Partial

    whole = cast(Any, tensor)
    return cast(Tensor, whole.full_tensor(grad_placements=[Partial()] * whole.device_mesh.ndim))


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """What autocast would have made of the operands of a matrix product."""
    device = cast(Tensor, tensors[0]).device.type
    if not torch.is_autocast_enabled(device) or (device == "cpu" and not fast_in_low()):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [None if x is None else x.to(dtype) for x in tensors]


def check_width(who: str, hidden: Tensor, head: Tensor, bias: Tensor | None) -> None:
    if head.dim() != 2 or hidden.shape[-1] != head.shape[1]:
        raise ModelError(
            f"linear_divergence: the {who}'s hidden states {list(hidden.shape)} do not fit its head {list(head.shape)}. "
            "Give hidden states [*P, D] and a head [V, D], as nn.Linear.weight is."
        )
    if bias is not None and bias.shape != head.shape[:1]:
        raise ModelError(
            f"linear_divergence: the {who}'s bias {list(bias.shape)} does not fit its head {list(head.shape)}. "
            "Give one number an outcome."
        )


def flat_teacher(teacher: Signal, places: torch.Size) -> Signal:
    """The teacher's signal, detached, with one axis of positions."""
    first: Tensor
    if isinstance(teacher, HiddenAndHead):
        hidden, head, bias = (gathered(x) for x in (teacher.hidden_ND, teacher.head_VD, teacher.bias_V))
        assert hidden is not None and head is not None
        check_width("teacher", hidden, head, bias)
        first, hidden = hidden, hidden.detach().flatten(0, -2)
        hidden, head, bias = cast(Any, autocast(hidden, head.detach(), None if bias is None else bias.detach()))
        flat: Signal = HiddenAndHead(hidden, head, bias, teacher.scale, teacher.softcap)
    elif isinstance(teacher, FullLogits):
        first, flat = teacher.logits, FullLogits(teacher.logits.detach().flatten(0, -2))
    elif isinstance(teacher, TopKLogp):
        first = teacher.logp_NK
        if teacher.indices_NK.shape != first.shape:
            raise ModelError(
                f"linear_divergence: the teacher's top-k log-probabilities {list(first.shape)} and their indices "
                f"{list(teacher.indices_NK.shape)} differ in shape."
            )
        flat = TopKLogp(first.detach().flatten(0, -2), teacher.indices_NK.flatten(0, -2))
    else:
        raise SignalError(
            f"linear_divergence needs HiddenAndHead, FullLogits or TopKLogp of the teacher, got {type(teacher).__name__}."
        )
    if first.shape[:-1] != places:
        raise ModelError(
            f"linear_divergence: the student has positions {list(places)}, the teacher {list(first.shape[:-1])}. "
            "Bring both to the same positions first."
        )
    return flat


def known_support(known: TopKLogp, support: Support) -> TopKLogp:
    """The likeliest k of the outcomes that the teacher gave, where the support asks for fewer."""
    if not isinstance(support, TopK):
        return known
    if support.of != "teacher":
        raise SignalError(
            f"linear_divergence: this teacher gives its own top k alone, and TopK.of is {support.of!r}. Use of='teacher', "
            "or a teacher that gives whole rows."
        )
    if support.k >= known.indices_NK.shape[-1]:
        return known
    logp, place = known.logp_NK.topk(support.k, -1)
    return TopKLogp(logp, known.indices_NK.gather(-1, place))


def vocabulary_of(asked: int | None, head_VD: Tensor, teacher: Signal) -> int:
    """How many outcomes exist, checked against both."""
    own = len(head_VD)
    theirs = own
    if isinstance(teacher, HiddenAndHead):
        theirs = len(teacher.head_VD)
    elif isinstance(teacher, FullLogits):
        theirs = teacher.logits.shape[-1]
    if asked is None and own != theirs:
        raise ModelError(
            f"linear_divergence: the student's head has {own} rows, the teacher's {theirs}. If one is padded, say how many "
            "tokens exist with vocabulary=len(tokenizer); with different tokenizers, compare aligned spans."
        )
    if asked is not None and not 1 <= asked <= min(own, theirs):
        raise ModelError(
            f"linear_divergence: vocabulary {asked} does not lie between 1 and the heads' {min(own, theirs)} rows."
        )
    return own if asked is None else asked


def per_position(name: str, tensor: Tensor | None, places: torch.Size) -> Tensor | None:
    if tensor is None:
        return None
    if tensor.shape != places:
        raise ModelError(
            f"linear_divergence: {name} has shape {list(tensor.shape)}, but the positions are {list(places)}. "
            "Give one a position."
        )
    return tensor.detach().flatten()


def bend_of(teacher: Signal) -> tuple[float, float | None]:
    return (teacher.scale, teacher.softcap) if isinstance(teacher, HiddenAndHead) else (1.0, None)


def direct(head: Tensor, used: Tensor, grad_scale: float | None) -> tuple[Tensor, float] | None:
    """Where the head's gradient may go at once: a leaf that holds one already, multiplied in its own type."""
    if grad_scale is None or not head.is_leaf or head.grad is None or used.dtype != head.dtype:
        return None
    return head.grad[: len(used)], grad_scale


@cache
def fast_in_low() -> bool:
    """Whether this processor has matrix units for bfloat16; vector instructions alone are slower than float32."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())

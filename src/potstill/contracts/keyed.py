"""Keyed randomness: every random number is a pure function of named integers, never of a stream's position.

A counter-based generator in plain integer tensor operations: the same (seed, step, sample, position) gives the same
number on every device, for every batch layout, worker count and process count, and after a resume. Nothing has to be
checkpointed. The mixer is the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) applied to each word in turn.
"""

import hashlib
import math

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def key(*parts: int | str) -> int:
    """A signed 64-bit key of any names and numbers: `key(seed, "rollout", step)`."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical, not arithmetic


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def bits(seed: int, *index: Tensor) -> Tensor:
    """Uniform 64-bit integers at the broadcast of the integer tensors `index`."""
    state = torch.full((), seed, dtype=torch.int64, device=index[0].device)
    for part in index:
        state = _mix((state ^ _mix(part.long() + _GOLDEN)) + _GOLDEN)
    return state


def uniform(seed: int, *index: Tensor) -> Tensor:
    """Uniform float64 in the open interval (0, 1) at the broadcast of `index`."""
    return (_shift_right(bits(seed, *index), 12).double() + 0.5) * 2.0**-52


def normal(seed: int, *index: Tensor) -> Tensor:
    """Standard normal float32 at the broadcast of `index` (Box-Muller)."""
    word = bits(seed, *index)
    radius = (-2.0 * ((_shift_right(word, 12).double() + 0.5) * 2.0**-52).log()).sqrt()
    angle = (2.0 * math.pi) * ((_shift_right(_mix(word + _GOLDEN), 12).double() + 0.5) * 2.0**-52)
    return (radius * angle.cos()).float()


def gumbel(seed: int, *index: Tensor) -> Tensor:
    """Standard Gumbel float32 at the broadcast of `index`: argmax(logits + gumbel) samples the softmax exactly."""
    return -(-uniform(seed, *index).log()).log().float()


def normal_like(seed: int, ids_B: Tensor, like: Tensor) -> Tensor:
    """Standard normal noise shaped like `like` [B, ...], row b a function of `ids_B[b]` alone. [B, ...]."""
    inner = torch.arange(math.prod(like.shape[1:]), device=like.device)
    flat = normal(seed, ids_B.to(like.device)[:, None], inner[None, :])
    return flat.view(like.shape).to(like.dtype)


def permutation(seed: int, size: int) -> Tensor:
    """A random order of range(size), a function of the seed alone. [size], on the CPU."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed & (2**63 - 1)))

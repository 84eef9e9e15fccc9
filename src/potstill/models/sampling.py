"""The law that tokens are sampled from. V vocabulary."""

import math

import torch
from torch import Tensor

from potstill.divergences.family import promoted


def truncated(logits: Tensor, temperature: float | Tensor, top_p: float | Tensor, top_k: int | Tensor) -> Tensor:
    """Log-probs of logits [..., V], tempered, cut and renormalised, in float32 or better; -inf outside.

    Settings are numbers for all rows, or [..., 1] of each. First the `top_k` likeliest are kept (0: all), then the
    smallest set of likeliest tokens whose mass reaches `top_p`.
    """
    logp = (promoted(logits) / temperature).log_softmax(-1)
    size = logp.shape[-1]
    few, nucleus = torch.as_tensor((top_k > 0) & (top_k < size)), torch.as_tensor(top_p < 1)
    if not few.any() and not nucleus.any():
        return logp
    ranked, order = logp.sort(dim=-1, descending=True, stable=True)
    if few.any():
        after = torch.arange(size, device=logp.device) >= top_k
        ranked = ranked.masked_fill(after & few.to(logp.device), -math.inf).log_softmax(-1)
    if nucleus.any():
        mass_before = ranked.exp().cumsum(-1) - ranked.exp()
        ranked = ranked.masked_fill((mass_before >= top_p) & nucleus.to(logp.device), -math.inf).log_softmax(-1)
    return torch.full_like(logp, -math.inf).scatter(-1, order, ranked)

"""A policy mixed of two at every token, with the face of a CausalLM that `rollouts.local.sample` needs.

m(v) = share p(v) + (1 - share) q(v),   p the guide, q the model, both at `temperature`
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from potstill.contracts.errors import RecipeError
from potstill.divergences.supports import log_probs
from potstill.models.causal import CausalLM, shared_vocabulary


class Mixed(nn.Module):
    """share: of the guide. Its `head` gives log m, so sample at temperature 1; the two caches are kept side by side."""

    def __init__(self, model: CausalLM, guide: CausalLM, share: float, temperature: float = 1.0) -> None:
        super().__init__()
        if not 0.0 < share < 1.0:
            raise RecipeError(f"A policy is mixed with a share strictly between 0 and 1, got {share}.")
        self.parts = nn.ModuleList((model, guide))
        self.share, self.temperature = share, temperature
        self.vocabulary = shared_vocabulary(model, guide)
        self.network, self.tokenizer, self.name = model.network, model.tokenizer, f"{model.name} with {guide.name}"
        self.device, self.pad_id, self.stop_ids = model.device, model.pad_id, model.stop_ids

    def new_cache(self) -> "_Pair":
        return _Pair(*(cast(CausalLM, part).new_cache() for part in self.parts))

    def hidden(self, tokens_BS: Tensor, attention_BT: Tensor | None = None, cache: "_Pair | None" = None) -> Tensor:
        """Last hidden states of both, one after the other. [B, S, D + D']."""
        caches = cache.caches if cache is not None else (None, None)
        both = [
            cast(Any, part).hidden(tokens_BS, attention_BT, own) for part, own in zip(self.parts, caches, strict=True)
        ]
        self.width = both[0].shape[-1]
        return torch.cat(both, -1)

    def head(self, hidden: Tensor) -> Tensor:
        """log m, [..., V]."""
        halves = hidden.tensor_split([self.width], -1)
        q, p = (
            log_probs(cast(Any, part).head(half)[..., : self.vocabulary], self.temperature)
            for part, half in zip(self.parts, halves, strict=True)
        )
        return torch.logaddexp(q + math.log1p(-self.share), p + math.log(self.share))


class _Pair:
    """Two caches that are told alike."""

    def __init__(self, *caches: Any) -> None:
        self.caches = caches

    def reorder_cache(self, rows: Tensor) -> None:
        for cache in self.caches:
            cache.reorder_cache(rows)

"""Completions sampled from a local model: batched, cached, and keyed, so that batch layout and padding change nothing.

B prompts, G samples a prompt, T tokens, V vocabulary. Token v at position t of sample i is drawn as
argmax_v log q(v) + g(seed, i, t, v) with standard Gumbel g (Gumbel-max): an exact sample of q, and a function of
named integers alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from potstill.contracts import keyed
from potstill.contracts.batch import PromptBatch, TokenBatch
from potstill.contracts.errors import DataError
from potstill.models.causal import CausalLM, evaluating
from potstill.models.sampling import truncated


def sampling_logp(logits: Tensor, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """Log-probabilities of the distribution that is sampled from: tempered, truncated, renormalised. [..., V], float32.

    First `top_k` (0 keeps all), then the smallest set of most likely tokens whose mass reaches `top_p`. -inf outside.
    """
    if temperature <= 0 or not 0 < top_p <= 1 or top_k < 0:
        raise DataError(
            f"Sampling needs temperature > 0, 0 < top_p <= 1 and top_k >= 0, got {temperature}, {top_p} and {top_k}. "
            "For the most likely token write greedy."
        )
    return truncated(logits, temperature, top_p, top_k)


def draw(logp_BV: Tensor, seed: int, ids_B: Tensor, position: Tensor | int) -> Tensor:
    """One exact sample a row, keyed by (seed, sample, position, vocabulary index). [B]."""
    ids_B1 = ids_B.to(logp_BV.device)[:, None]
    position_B1 = torch.as_tensor(position, device=logp_BV.device).expand(len(logp_BV))[:, None]
    words_1V = torch.arange(logp_BV.shape[-1], device=logp_BV.device)[None, :]
    return (logp_BV + keyed.gumbel(seed, ids_B1, position_B1, words_1V)).argmax(-1)


def joined(
    prompts: PromptBatch,
    completions: Sequence[Sequence[int]],
    pad_id: int,
    *,
    ids_B: Tensor | None = None,
    logps: Sequence[Sequence[float]] | None = None,
    extra: dict[str, Any] | None = None,
) -> TokenBatch:
    """Prompts and one completion each as one batch: padded on the left before, on the right after, completions count.

    `logps` are the completions' log-probs under the policy that wrote them.
    """
    device = prompts.tokens_BT.device
    width = max((len(c) for c in completions), default=0)

    def padded(rows: Sequence[Sequence[Any]], fill: float, dtype: torch.dtype) -> Tensor:
        values = [[*row, *[fill] * (width - len(row))] for row in rows]
        return torch.tensor(values, dtype=dtype, device=device).reshape(len(rows), width)

    counted = padded([[True] * len(c) for c in completions], False, torch.bool)
    sampled_logp = None
    if logps is not None:
        before = torch.zeros(prompts.tokens_BT.shape, device=device)
        sampled_logp = torch.cat([before, padded(logps, 0.0, torch.float32)], 1)
    return TokenBatch(
        prompts.ids_B if ids_B is None else ids_B,
        torch.cat([prompts.tokens_BT, padded(completions, pad_id, torch.int64)], 1),
        torch.cat([prompts.attention_BT, counted], 1),
        torch.cat([torch.zeros_like(prompts.attention_BT), counted], 1),
        sampled_logp,
        extra=dict(prompts.extra) if extra is None else extra,
    )


def completions_of(batch: TokenBatch) -> list[list[int]]:
    """The counted tokens of each row."""
    return [row[counted].tolist() for row, counted in zip(batch.tokens_BT, batch.counted_BT, strict=True)]


def left_padded(prompts: PromptBatch) -> PromptBatch:
    """The same prompts with their padding on the left, wherever it was."""
    if (~prompts.attention_BT.any(1)).any():
        raise DataError("A prompt is empty, so nothing predicts its first token. Start it with a token (BOS).")
    order = prompts.attention_BT.long().argsort(dim=1, stable=True)
    return PromptBatch(
        prompts.ids_B,
        prompts.tokens_BT.gather(1, order),
        prompts.attention_BT.gather(1, order),
        prompts.completions,
        prompts.extra,
    )


def repeated(prompts: PromptBatch, samples: int) -> PromptBatch:
    """Each prompt `samples` times, one after the other; sample g of prompt i gets the id i * samples + g."""
    ids_BG = prompts.ids_B[:, None] * samples + torch.arange(samples, device=prompts.ids_B.device)
    size = len(prompts)
    extra = {
        name: [v for v in values for _ in range(samples)]
        if isinstance(values, list) and len(values) == size
        else values
        for name, values in prompts.extra.items()
    }
    return PromptBatch(
        ids_BG.flatten(),
        prompts.tokens_BT.repeat_interleave(samples, 0),
        prompts.attention_BT.repeat_interleave(samples, 0),
        None if prompts.completions is None else [c for c in prompts.completions for _ in range(samples)],
        extra,
    )


@torch.no_grad()
def sample(
    model: CausalLM,
    prompts: PromptBatch,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    greedy: bool = False,
    seed: int = 0,
    samples_per_prompt: int = 1,
    stop_ids: Sequence[int] | None = None,
) -> TokenBatch:
    """Continue every prompt `samples_per_prompt` times until a stop token (kept, and counted) or `max_new_tokens`.

    Returns [B * G] rows, group members side by side, prompts padded on the left and completions on the right.
    `sampled_logp_BT` holds the log-probs of the sampled tokens under the distribution they were sampled from; with
    `greedy` those of the whole softmax at `temperature`. `extra["finished"]` says which rows met a stop token.
    """
    if max_new_tokens < 1 or samples_per_prompt < 1:
        raise DataError(
            f"max_new_tokens and samples_per_prompt must be positive: {max_new_tokens}, {samples_per_prompt}."
        )
    stops = torch.tensor(
        model.stop_ids if stop_ids is None else tuple(stop_ids), dtype=torch.int64, device=model.device
    )
    truncation: dict[str, Any] = {} if greedy else {"top_p": top_p, "top_k": top_k}
    prompts = left_padded(prompts.to(model.device))
    _check_room(model, prompts, max_new_tokens)
    rows = repeated(prompts, samples_per_prompt)
    B = len(rows)
    tokens_BL = torch.full((B, max_new_tokens), model.pad_id, device=model.device)
    logp_BL = torch.zeros(B, max_new_tokens, device=model.device)
    length_B = torch.full((B,), max_new_tokens, device=model.device)
    finished_B = torch.zeros(B, dtype=torch.bool, device=model.device)

    active = torch.arange(B, device=model.device)  # the rows that still grow: only they stay in the cache
    attention = rows.attention_BT
    with evaluating(model):
        cache: Any = model.new_cache()
        hidden = model.hidden(prompts.tokens_BT, prompts.attention_BT, cache)[:, -1]
        if samples_per_prompt > 1:  # each prompt is read once for its whole group
            copies = torch.arange(len(prompts), device=model.device).repeat_interleave(samples_per_prompt)
            cache.reorder_cache(copies)
            hidden = hidden[copies]
        for position in range(max_new_tokens):
            logp = sampling_logp(model.head(hidden), temperature=temperature, **truncation)
            chosen = logp.argmax(-1) if greedy else draw(logp, seed, rows.ids_B[active], position)
            tokens_BL[active, position] = chosen
            logp_BL[active, position] = logp.gather(1, chosen[:, None])[:, 0].float()
            stopped = torch.isin(chosen, stops)
            if stopped.any():
                finished_B[active[stopped]] = True
                length_B[active[stopped]] = position + 1
                going = (~stopped).nonzero()[:, 0]
                active, attention, chosen = active[going], attention[going], chosen[going]
                if len(active):
                    cache.reorder_cache(going)
            if not len(active) or position + 1 == max_new_tokens:
                break
            attention = torch.cat([attention, attention.new_ones(len(active), 1)], 1)
            hidden = model.hidden(chosen[:, None], attention, cache)[:, -1]

    lengths = length_B.tolist()
    return joined(
        rows,
        [row[:n] for row, n in zip(tokens_BL.tolist(), lengths, strict=True)],
        model.pad_id,
        logps=[row[:n] for row, n in zip(logp_BL.tolist(), lengths, strict=True)],
        extra=rows.extra | {"finished": finished_B.tolist()},
    )


def _check_room(model: CausalLM, prompts: PromptBatch, max_new_tokens: int) -> None:
    room = getattr(model.network.config, "max_position_embeddings", None)
    longest = int(prompts.attention_BT.sum(1).max())
    if room and longest + max_new_tokens > room:
        raise DataError(
            f"A prompt of {longest} tokens and {max_new_tokens} new ones exceed the {room} positions of {model.name}. "
            "Lower max_new_tokens or shorten the prompts."
        )

"""What the states are like that a student brings itself into, and how a teacher sees them.

B samples, R places (the r-th token of a sample), N tokens in all, V vocabulary; p teacher, q student; nats.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from potstill.contracts.batch import TokenBatch
from potstill.contracts.errors import DataError
from potstill.divergences import ReverseKL, entropy, log_probs
from potstill.models.causal import CausalLM, evaluating, shared_vocabulary
from potstill.rollouts.local import completions_of


@torch.no_grad()
def own_states(
    student: CausalLM,
    teacher: CausalLM,
    rollouts: Iterable[TokenBatch],
    *,
    max_new_tokens: int,
    k: int = 16,
    lengths: Sequence[int] = (),
) -> dict[str, Any]:
    """Means over the tokens of the student's own samples at temperature 1, of at most `max_new_tokens`, and how they run
    along a sample.

    top_overlap: share of the k likeliest tokens that both name. student_entropy, teacher_entropy. distinct_1 and
    distinct_2: different n-grams over all n-grams, of all samples together. sample_tokens: mean length.
    by_place: KL(q || p) at the r-th token, a list (None where no sample is that long). teacher_nll_n, for n in
    `lengths`: -log p a token over the first n tokens of the samples, the sign of errors that compound.
    """
    if max_new_tokens < max(lengths, default=1):
        raise DataError(
            f"The samples have {max_new_tokens} tokens, and lengths up to {max(lengths)} are asked. Raise data.length."
        )
    words = shared_vocabulary(student, teacher)
    k = min(k, words)
    sums = dict.fromkeys(("top_overlap", "student_entropy", "teacher_entropy"), 0.0)
    kl_R, nll_R, count_R = (torch.zeros(max_new_tokens, dtype=torch.float64) for _ in range(3))
    samples: list[list[int]] = []
    with evaluating(student, teacher):
        for out in rollouts:
            samples += completions_of(out)
            log_q = log_probs(student.counted_logits(out)[:, :words])
            log_p = log_probs(teacher.counted_logits(out.to(teacher.device))[:, :words]).to(log_q.device)
            place_N = (out.counted_BT.cumsum(1) - 1)[out.counted_BT].cpu()
            chosen = out.tokens_counted[:, None]
            sums["top_overlap"] += float(_shared(log_p, log_q, k).sum())
            sums["student_entropy"] += float(entropy(log_q).sum())
            sums["teacher_entropy"] += float(entropy(log_p).sum())
            kl_R.index_add_(0, place_N, ReverseKL()(teacher_logp=log_p, student_logp=log_q).double().cpu())
            nll_R.index_add_(0, place_N, -log_p.gather(1, chosen)[:, 0].double().cpu())
            count_R.index_add_(0, place_N, torch.ones(len(place_N), dtype=torch.float64))
    total = int(count_R.sum())
    if not total:
        raise DataError("The student's samples are all empty: nothing can be said of its own states.")
    means: dict[str, Any] = {name: value / total for name, value in sums.items()}
    means |= {f"distinct_{n}": distinct(samples, n) for n in (1, 2)}
    means["sample_tokens"] = total / len(samples)
    means["by_place"] = [float(a / b) if b else None for a, b in zip(kl_R, count_R, strict=True)]
    means |= {f"teacher_nll_{n}": float(nll_R[:n].sum() / count_R[:n].sum()) for n in lengths}
    return means


def distinct(samples: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams over all n-grams of some token sequences; NaN where none is that long."""
    grams = [tuple(row[i : i + n]) for row in samples for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def _shared(log_p: Tensor, log_q: Tensor, k: int) -> Tensor:
    """Share of the k likeliest outcomes that both rows name, [N]."""
    theirs, own = (
        torch.zeros_like(x, dtype=torch.bool).scatter_(1, x.topk(k, 1).indices, True) for x in (log_p, log_q)
    )
    return (theirs & own).sum(1) / k

"""How good a masked diffusion model is: the bound on held-out text, and how its samples read.

Samples are judged from outside, by an n-gram model of text that neither model has seen, together with their entropy:
dull text is likely text, so that one number without the other says nothing.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from potstill.contracts import keyed
from potstill.contracts.errors import DataError, NonFiniteError
from potstill.noise.masked import LogLinear, MaskSchedule, corrupt, masked_nll


@torch.no_grad()
def evaluate_masked_model(
    model: Any, dataset: Any, *, batch: int, times: int = 8, schedule: MaskSchedule = LogLinear(), seed: int = 0
) -> dict[str, float]:
    """The continuous-time bound on a dataset of TokenBatch, every token that is no padding counted.

    nll_bound in nats per token, perplexity_bound its exponential, accuracy: how often the most probable token at a
    masked position is right. Each row is seen at `times` stratified times, so that the numbers are steady.
    """
    if len(dataset) == 0:
        raise DataError("There is no text to evaluate on.")
    training = model.training
    model.eval()
    total, tokens, right, masked = 0.0, 0, 0, 0
    for rows in torch.arange(len(dataset)).split(batch):
        given = dataset.batch(rows).to(model.device)
        u_B = keyed.uniform(keyed.key(seed, "evaluate"), given.ids_B)
        for k in range(times):
            t_B = (k + u_B) / times
            here = keyed.key(seed, "evaluate", k)
            noisy_BL = corrupt(
                given.tokens_BT, schedule.alpha(t_B), model.mask_id, here, given.ids_B, given.attention_BT
            )
            log_p_BLV = model.log_probs(noisy_BL, given.attention_BT)
            nll_BL = masked_nll(log_p_BLV, given.tokens_BT, noisy_BL, model.mask_id)
            total += float((schedule.weight(t_B)[:, None] * nll_BL)[given.attention_BT].sum()) / times
            where_BL = (noisy_BL == model.mask_id) & given.attention_BT
            right += int((log_p_BLV.argmax(-1) == given.tokens_BT)[where_BL].sum())
            masked += int(where_BL.sum())
        tokens += int(given.attention_BT.sum())
    model.train(training)
    nll = total / tokens
    if math.isnan(nll):
        raise NonFiniteError(f"The log-likelihoods of {model.name} are NaN: its weights are broken.")
    perplexity = math.exp(nll) if nll < 700 else math.inf
    return {
        "nll_bound": nll,
        "perplexity_bound": perplexity,
        "accuracy": right / max(masked, 1),
        "tokens": float(tokens),
    }


class NGram:
    """An n-gram model of token rows with Witten-Bell smoothing: each order backs off to the next shorter one.

        p(w | h) = (c(h w) + n(h) p(w | h')) / (c(h) + n(h)),  n(h) the number of different tokens seen after h,

    h' is h without its oldest token; below the unigram stands the uniform distribution. Rows start without context.
    Source: Chen and Goodman, "An empirical study of smoothing techniques for language modeling", 1998, section 2.6.
    """

    def __init__(self, rows: Sequence[Sequence[int]], vocabulary: int, order: int = 5) -> None:
        self.vocabulary, self.order = vocabulary, order
        self.counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for row in rows:
            for i, token in enumerate(row):
                for n in range(min(order - 1, i) + 1):
                    self.counts[tuple(row[i - n : i])][token] += 1
        if not self.counts:
            raise DataError("An n-gram model needs text: no token was found.")
        self.totals = {context: sum(after.values()) for context, after in self.counts.items()}

    def probability(self, token: int, context: Sequence[int]) -> float:
        """p(token | the last order - 1 tokens of the context)."""
        p = 1.0 / self.vocabulary
        for n in range(min(self.order - 1, len(context)) + 1):
            history = tuple(context[len(context) - n :])
            after = self.counts.get(history)
            if after is None:
                break
            p = (after[token] + len(after) * p) / (self.totals[history] + len(after))
        return p

    def nll(self, rows: Sequence[Sequence[int]]) -> float:
        """Mean negative log-likelihood per token, in nats."""
        logs = [
            math.log(self.probability(row[i], row[max(0, i - self.order + 1) : i]))
            for row in rows
            for i in range(len(row))
        ]
        if not logs:
            raise DataError("There is no sample to judge.")
        return -math.fsum(logs) / len(logs)


def row_entropy(tokens_BL: Tensor) -> float:
    """Entropy of a row's own token frequencies, in nats, averaged over rows: low where samples repeat themselves."""
    entropy = []
    for row in tokens_BL:
        share = torch.unique(row, return_counts=True)[1].double() / len(row)
        entropy.append(float(-(share * share.log()).sum()))
    return math.fsum(entropy) / len(entropy)


def distinct(tokens_BL: Tensor, order: int = 4) -> float:
    """Share of different n-grams among those of all rows: low where samples repeat one another."""
    grams = [tuple(row[i : i + order]) for row in tokens_BL.tolist() for i in range(len(row) - order + 1)]
    return len(set(grams)) / max(len(grams), 1)

"""Lower bounds of mutual information from a critic's scores: MI-alpha and its ends, InfoNCE and NWJ.

K paired rows give scores [*G, K, K]: scores[i, j] = f(x_j, y_i) with x the teacher's row j and y the student's row i, so
pairs stand on the diagonal and row i holds its negatives. Higher is more alike; a loss is minus the bound. One value in
nats for each student row [*G, K], whose mean over K is the bound; each depends on the whole batch, which may not be cut
into micro-batches. Nothing is detached: detach the teacher's rows before the critic. G groups (any leading shape).
"""

import math

import torch
from torch import Tensor

from potstill.contracts.errors import DataError, ModelError, RecipeError
from potstill.divergences.family import promoted
from potstill.divergences.supports import log_mass


def mi_alpha(scores: Tensor, log_baseline: Tensor | float = 0.0, alpha: float = 0.5) -> Tensor:
    """Poole's interpolated bound of I(X; Y), [*G, K, K] -> [*G, K], Distiller's MI-alpha (arXiv 2109.11105).

        1 + mean_{j != i} [ s_ii - log d_ij ] - mean_{j != i} exp(s_ij) / d_ii,
        d_ij = alpha mean_{k != j} exp(s_ik) + (1 - alpha) q_i

    Every mean is over K - 1: the drawn entry is in the denominator, one negative (first mean) or the positive (second) is
    left out. log_baseline: log q(y_i), [*G, K] or a number; with 0 the best critic is log p(y | x) / p(y) for all alpha.
    alpha 1: InfoNCE on K - 1 rows, at most log(K - 1). alpha 0: TUBA, unbiased at the best critic, and with q = e NWJ.
    Between, less variance and more bias as alpha grows; never above I(X; Y) on average. Source: arXiv 1905.06922.
    """
    scores = _scores("mi_alpha", scores)
    if not 0.0 <= alpha <= 1.0:
        raise RecipeError(f"mi_alpha's alpha must lie between 0 (NWJ) and 1 (InfoNCE), got {alpha}.")
    log_q = torch.as_tensor(log_baseline, dtype=scores.dtype, device=scores.device)
    if log_q.dim() and log_q.shape != scores.shape[:-1]:
        raise ModelError(
            f"mi_alpha needs one log_baseline for each student row, {list(scores.shape[:-1])}, got {list(log_q.shape)}."
        )
    K = scores.shape[-1]
    log_d = log_q.unsqueeze(-1).expand_as(scores)
    if alpha == 1.0:
        log_d = _log_mean_without(scores)
    elif alpha > 0.0:
        log_d = torch.logaddexp(_log_mean_without(scores) + math.log(alpha), log_d + math.log1p(-alpha))
    pairs, own = scores.diagonal(dim1=-2, dim2=-1), log_d.diagonal(dim1=-2, dim2=-1)
    joint = pairs - (log_d.sum(-1) - own) / (K - 1)
    ratio = (scores - own[..., None]).masked_fill(torch.eye(K, dtype=torch.bool, device=scores.device), -math.inf)
    return 1 + joint - ratio.exp().sum(-1) / (K - 1)


def info_nce(scores: Tensor) -> Tensor:
    """s_ii - log mean_k exp(s_ik) over all K, [*G, K, K] -> [*G, K]: at most log K. Source: CPC, arXiv 1807.03748."""
    scores = _scores("info_nce", scores)
    return scores.diagonal(dim1=-2, dim2=-1) - scores.logsumexp(-1) + math.log(scores.shape[-1])


def nwj(scores: Tensor) -> Tensor:
    """s_ii - mean_{j != i} exp(s_ij - 1), [*G, K, K] -> [*G, K]: MI-alpha at alpha 0 with q = e.

    Unbounded and of high variance; unbiased at its best critic, 1 + log p(y | x) / p(y). Source: arXiv 0809.0853.
    """
    return mi_alpha(scores, log_baseline=1.0, alpha=0.0)


def _scores(name: str, scores: Tensor) -> Tensor:
    if scores.dim() < 2 or scores.shape[-1] != scores.shape[-2]:
        raise ModelError(
            f"{name} takes the scores of all pairs of K rows, [*G, K, K] with the student's rows first, got "
            f"{list(scores.shape)}."
        )
    if scores.shape[-1] < 2:
        raise DataError(
            f"{name} needs at least two rows, got {scores.shape[-1]}: without a negative nothing is compared."
        )
    return promoted(scores)


def _log_mean_without(scores: Tensor) -> Tensor:
    """log of the mean of exp over the rest of the row, for each entry: [*G, K, K] -> [*G, K, K].

    The largest entry of a row is masked out, the others subtracted: they are at most half of the sum, so little cancels.
    """
    total = log_mass(scores).unsqueeze(-1)
    top = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.argmax(-1, keepdim=True), True)
    without_top = log_mass(scores.masked_fill(top, -math.inf)).unsqueeze(-1)
    share = (scores - total).masked_fill(top, -math.inf).exp()
    rest = torch.where(top, without_top, total + torch.log1p(-share))
    return rest - math.log(scores.shape[-1] - 1)

"""Absorbing (masked) diffusion over tokens: corruption, the SUBS parameterisation, jumps, the ELBO's weight, samplers.

A token survives to time t with probability alpha(t), falling from alpha(0) = 1; else it is the mask. A jump from time a
to an earlier time b (alpha_b > alpha_a) draws, at each masked position independently,

    P[stay masked] = (1 - alpha_b) / (1 - alpha_a),   P[v] = (alpha_b - alpha_a) / (1 - alpha_a) p(v | x_a)

Sources: MDLM (Sahoo et al., arXiv 2406.07524) for schedules, SUBS and the continuous-time bound; DiDi-Instruct (arXiv
2509.25035) for jumps and their log-probabilities; MaskGIT (arXiv 2202.04200) and LLaDA (arXiv 2502.09992) for unmasking
by confidence. B batch, L length, V vocabulary with the mask in it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import scipy.special
import torch
from torch import Tensor

from potstill.contracts import keyed
from potstill.contracts.errors import RecipeError

Predict = Callable[[Tensor], Tensor]  # tokens_BL -> SUBS log-probabilities [B, L, V]


class MaskSchedule:
    """alpha(t), the share of tokens still visible at time t in [0, 1], and its derivative."""

    def alpha(self, t: Tensor | float) -> Tensor:
        raise NotImplementedError

    def slope(self, t: Tensor | float) -> Tensor:
        """d alpha / dt, never positive."""
        raise NotImplementedError

    def weight(self, t: Tensor | float) -> Tensor:
        """-alpha' / (1 - alpha): for t ~ U(0, 1), -log p(x) <= E[weight(t) sum over masked i of -log p(x_i | x_t)]."""
        return -self.slope(t) / (1.0 - self.alpha(t))


def _double(t: Tensor | float) -> Tensor:
    return torch.as_tensor(t, dtype=torch.float64) if not isinstance(t, Tensor) else t.double()


@dataclass(frozen=True)
class LogLinear(MaskSchedule):
    """alpha = 1 - (1 - rest) t: masks come at a constant rate."""

    rest: float = 1e-3  # visible at t = 1

    def alpha(self, t: Tensor | float) -> Tensor:
        return 1.0 - (1.0 - self.rest) * _double(t)

    def slope(self, t: Tensor | float) -> Tensor:
        return torch.full_like(_double(t), self.rest - 1.0)


@dataclass(frozen=True)
class Cosine(MaskSchedule):
    """alpha = 1 - (1 - rest) cos(pi (1 - t) / 2)."""

    rest: float = 1e-3

    def alpha(self, t: Tensor | float) -> Tensor:
        return 1.0 - (1.0 - self.rest) * (math.pi / 2 * (1.0 - _double(t))).cos()

    def slope(self, t: Tensor | float) -> Tensor:
        return -(1.0 - self.rest) * (math.pi / 2) * (math.pi / 2 * (1.0 - _double(t))).sin()


class TimeSampler:
    """A distribution of times in (0, 1). A time is a function of (seed, id) alone."""

    def __call__(self, seed: int, ids_B: Tensor) -> Tensor:
        """t_B, float64."""
        return self.of_uniform(keyed.uniform(keyed.key(seed, "time"), ids_B))

    def of_uniform(self, u: Tensor) -> Tensor:
        raise NotImplementedError

    def log_density(self, t: Tensor) -> Tensor:
        """Of the distribution before clamping, for importance weights 1 / pi(t)."""
        raise NotImplementedError


@dataclass(frozen=True)
class UniformTime(TimeSampler):
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise RecipeError(f"UniformTime needs 0 <= low < high <= 1, got low={self.low} and high={self.high}.")

    def of_uniform(self, u: Tensor) -> Tensor:
        return self.low + u * (self.high - self.low)

    def log_density(self, t: Tensor) -> Tensor:
        return torch.full_like(_double(t), -math.log(self.high - self.low))


@dataclass(frozen=True)
class BetaTime(TimeSampler):
    """t ~ Beta(a, b), clamped to [low, high]."""

    a: float = 1.0
    b: float = 1.0
    low: float = 0.02
    high: float = 0.98

    def __post_init__(self) -> None:
        if not (self.a > 0 and self.b > 0 and 0 <= self.low < self.high <= 1):
            raise RecipeError(f"BetaTime needs a, b > 0 and 0 <= low < high <= 1, got {self}.")

    def of_uniform(self, u: Tensor) -> Tensor:
        drawn = scipy.special.betaincinv(self.a, self.b, u.cpu().numpy())
        return torch.as_tensor(drawn, dtype=torch.float64, device=u.device).clamp(self.low, self.high)

    def log_density(self, t: Tensor) -> Tensor:
        t = _double(t)
        return (self.a - 1) * t.log() + (self.b - 1) * torch.log1p(-t) - float(scipy.special.betaln(self.a, self.b))


def _positions(tokens_BL: Tensor) -> Tensor:
    return torch.arange(tokens_BL.shape[1], device=tokens_BL.device)[None]


def _rows(alpha: Tensor | float, tokens_BL: Tensor) -> Tensor:
    """[B] or a number -> float64 [B, 1]."""
    return torch.as_tensor(alpha, dtype=torch.float64, device=tokens_BL.device).expand(len(tokens_BL))[:, None]


def corrupt(
    tokens_BL: Tensor, alpha: Tensor | float, mask_id: int, seed: int, ids_B: Tensor, free_BL: Tensor | None = None
) -> Tensor:
    """Mask each token with probability 1 - alpha (a number or [B]); positions where `free_BL` is false are kept.

    One uniform per (seed, id, position): at a smaller alpha the same seed masks a superset. [B, L].
    """
    u_BL = keyed.uniform(keyed.key(seed, "corrupt"), ids_B.to(tokens_BL.device)[:, None], _positions(tokens_BL))
    masked_BL = u_BL > _rows(alpha, tokens_BL)
    if free_BL is not None:
        masked_BL = masked_BL & free_BL
    return tokens_BL.masked_fill(masked_BL, mask_id)


def subs_log_probs(logits_BLV: Tensor, tokens_BL: Tensor, mask_id: int) -> Tensor:
    """SUBS: the mask is never predicted, and a visible position is its own token with probability 1. [B, L, V].

    Float32 or better. Visible rows carry no gradient.
    """
    wide = logits_BLV.to(torch.promote_types(logits_BLV.dtype, torch.float32))
    never_V = torch.arange(wide.shape[-1], device=wide.device) == mask_id
    log_p_BLV = wide.masked_fill(never_V, -math.inf).log_softmax(-1)
    copied_BLV = torch.full_like(log_p_BLV, -math.inf).scatter(-1, tokens_BL[..., None], 0.0)
    return torch.where((tokens_BL == mask_id)[..., None], log_p_BLV, copied_BLV)


def masked_nll(log_p_BLV: Tensor, tokens_BL: Tensor, noisy_BL: Tensor, mask_id: int) -> Tensor:
    """-log p(token) where `noisy_BL` is masked, else 0: times `weight(t)` and summed, a draw of the bound. [B, L]."""
    nll_BL = -log_p_BLV.gather(-1, tokens_BL[..., None]).squeeze(-1)
    return torch.where(noisy_BL == mask_id, nll_BL, 0.0)


def draw(log_p_BLV: Tensor, seed: int, ids_B: Tensor, where_BL: Tensor, temperature: float = 1.0) -> Tensor:
    """One token per position where `where_BL`, by Gumbel noise keyed (seed, id, position, token); 0 elsewhere. [B, L].

    Temperature 0 takes the most probable token.
    """
    row_N, position_N = where_BL.nonzero(as_tuple=True)
    log_p_NV = log_p_BLV.detach()[row_N, position_N]
    if temperature > 0:
        vocabulary_V = torch.arange(log_p_BLV.shape[-1], device=log_p_BLV.device)
        ids_N = ids_B.to(log_p_BLV.device)[row_N]
        noise_NV = keyed.gumbel(keyed.key(seed, "draw"), ids_N[:, None], position_N[:, None], vocabulary_V[None])
        log_p_NV = log_p_NV + temperature * noise_NV
    tokens_BL = torch.zeros_like(where_BL, dtype=torch.long)
    tokens_BL[row_N, position_N] = log_p_NV.argmax(-1)
    return tokens_BL


def jump(
    log_p_BLV: Tensor,
    tokens_BL: Tensor,
    alpha_from: Tensor | float,
    alpha_to: Tensor | float,
    mask_id: int,
    seed: int,
    ids_B: Tensor,
) -> Tensor:
    """One reverse step from visible share alpha_from to the larger alpha_to; what is visible is copied. [B, L]."""
    masked_BL = tokens_BL == mask_id
    stay_B1 = (1.0 - _rows(alpha_to, tokens_BL)) / (1.0 - _rows(alpha_from, tokens_BL))
    u_BL = keyed.uniform(keyed.key(seed, "jump"), ids_B.to(tokens_BL.device)[:, None], _positions(tokens_BL))
    reveal_BL = masked_BL & (u_BL > stay_B1)
    return torch.where(reveal_BL, draw(log_p_BLV, seed, ids_B, reveal_BL), tokens_BL)


def jump_logp(
    log_p_BLV: Tensor,
    before_BL: Tensor,
    after_BL: Tensor,
    alpha_from: Tensor | float,
    alpha_to: Tensor | float,
    mask_id: int,
) -> Tensor:
    """Exact log-probability of a jump, position by position. [B, L], in the dtype of log_p.

    Its gradient is that of log p(token) at the positions just revealed, and 0 elsewhere: staying masked and being
    visible already do not depend on p.
    """
    a_B1, b_B1 = _rows(alpha_from, before_BL), _rows(alpha_to, before_BL)
    stay_B1 = ((1.0 - b_B1) / (1.0 - a_B1)).log().to(log_p_BLV.dtype)
    reveal_B1 = ((b_B1 - a_B1) / (1.0 - a_B1)).log().to(log_p_BLV.dtype)
    masked_BL = before_BL == mask_id
    still_BL = after_BL == mask_id
    token_BL = log_p_BLV.gather(-1, after_BL.masked_fill(still_BL | ~masked_BL, 0)[..., None]).squeeze(-1)
    revealed_BL = reveal_B1 + torch.where(masked_BL & ~still_BL, token_BL, 0.0)
    copied_BL = torch.zeros_like(token_BL).masked_fill(before_BL != after_BL, -math.inf)
    return torch.where(masked_BL, torch.where(still_BL, stay_B1, revealed_BL), copied_BL)


@torch.no_grad()
def ancestral(
    predict: Predict,
    tokens_BL: Tensor,
    mask_id: int,
    *,
    steps: int,
    seed: int,
    ids_B: Tensor,
    schedule: MaskSchedule = LogLinear(),
) -> Tensor:
    """Fill the masks of tokens_BL in `steps` jumps on a uniform grid of times from 1 to 0; the last leaves no mask."""
    if steps < 1:
        raise RecipeError(f"Sampling needs at least one step, got {steps}.")
    times = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    for step, (t, after) in enumerate(pairwise(times.tolist())):
        log_p_BLV = predict(tokens_BL)
        step_seed = keyed.key(seed, "ancestral", step)
        tokens_BL = jump(log_p_BLV, tokens_BL, schedule.alpha(t), schedule.alpha(after), mask_id, step_seed, ids_B)
    return tokens_BL


@torch.no_grad()
def confident(
    predict: Predict,
    tokens_BL: Tensor,
    mask_id: int,
    *,
    steps: int,
    seed: int,
    ids_B: Tensor,
    temperature: float = 1.0,
    choice_temperature: float = 0.0,
    schedule: MaskSchedule = LogLinear(rest=0.0),
) -> Tensor:
    """At each of `steps`, draw every masked token and keep the most confident draws; floor(n (1 - alpha)) stay masked.

    n is the row's count of masks at the start and alpha the schedule's at the step's end. `choice_temperature` adds
    Gumbel noise to the log-confidences, annealed linearly to 0 (MaskGIT); 0 is LLaDA's low-confidence remasking.
    """
    if steps < 1:
        raise RecipeError(f"Sampling needs at least one step, got {steps}.")
    total_B1 = (tokens_BL == mask_id).sum(1, keepdim=True)
    for step in range(steps):
        masked_BL = tokens_BL == mask_id
        log_p_BLV, step_seed = predict(tokens_BL), keyed.key(seed, "confident", step)
        drawn_BL = draw(log_p_BLV, step_seed, ids_B, masked_BL, temperature)
        confidence_BL = log_p_BLV.gather(-1, drawn_BL[..., None]).squeeze(-1)
        if choice_temperature > 0:
            noise_BL = keyed.gumbel(
                keyed.key(step_seed, "choice"), ids_B.to(tokens_BL.device)[:, None], _positions(tokens_BL)
            )
            confidence_BL = confidence_BL + choice_temperature * (1.0 - (step + 1) / steps) * noise_BL
        share = 0.0 if step + 1 == steps else float(1.0 - schedule.alpha(1.0 - (step + 1) / steps))
        keep_masked_B1 = (total_B1 * share).floor().long()
        # a rank among the masked positions, the least confident first; visible positions come last
        order_BL = confidence_BL.masked_fill(~masked_BL, math.inf).argsort(dim=1, stable=True)
        rank_BL = torch.empty_like(order_BL).scatter(1, order_BL, _positions(tokens_BL).expand_as(order_BL))
        tokens_BL = torch.where(masked_BL & (rank_BL >= keep_masked_B1), drawn_BL, tokens_BL)
    return tokens_BL

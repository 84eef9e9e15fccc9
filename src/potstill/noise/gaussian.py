"""Gaussian noise: schedules, conversions between what networks predict, preconditioning, and noise-level samplers.

    x_t = alpha(t) x0 + sigma(t) eps,   eps ~ N(0, I)

The common currency is the denoiser D(x; sigma) = E[x0 | x0 + sigma eps = x] of the variance-exploding process. Any
other schedule is matched by its noise-to-signal ratio: E[x0 | x_t] = D(x_t / alpha; sigma / alpha). Score, noise and
velocity follow from D by linear algebra, so each conversion is written once.

Sources: EDM (Karras et al., arXiv 2206.00364), TrigFlow (Lu and Song, arXiv 2410.11081), v-prediction (Salimans and Ho,
arXiv 2202.00512), rectified flow (Liu et al., arXiv 2209.03003). Levels and coefficients are computed in float64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from potstill.contracts import keyed
from potstill.contracts.errors import RecipeError
from potstill.contracts.spec import Part

Prediction = Literal["x0", "eps", "v", "score"]
Denoise = Callable[[Tensor, Tensor], Tensor]  # (x [B, ...], sigma_B) -> x0 [B, ...]


def levels(level: Tensor | float, like: Tensor) -> Tensor:
    """A noise level as float64 [B] beside `like` [B, ...]: a number or a [B] tensor."""
    level_B = torch.as_tensor(level, dtype=torch.float64, device=like.device)
    if level_B.ndim > 1 or (level_B.ndim == 1 and len(level_B) not in (1, len(like))):
        raise ValueError(f"A noise level must be a number or have shape [{len(like)}], got {list(level_B.shape)}.")
    return level_B.expand(len(like))


def spread(values_B: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...] in the dtype of `like` [B, ...]."""
    return values_B.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def _double(t: Tensor | float) -> Tensor:
    return torch.as_tensor(t, dtype=torch.float64) if not isinstance(t, Tensor) else t.double()


class Schedule:
    """alpha(t) and sigma(t) of x_t = alpha x0 + sigma eps, and the time of a noise-to-signal ratio."""

    def alpha(self, t: Tensor | float) -> Tensor:
        raise NotImplementedError

    def sigma(self, t: Tensor | float) -> Tensor:
        raise NotImplementedError

    def time(self, ratio: Tensor | float) -> Tensor:
        """The t at which sigma(t) / alpha(t) = ratio."""
        raise NotImplementedError

    def velocity(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """(a, b) of the v-prediction v = a x0 + b eps that is usual with this schedule."""
        raise NotImplementedError

    def ratio(self, t: Tensor | float) -> Tensor:
        return self.sigma(t) / self.alpha(t)

    def mix(self, x0: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
        """x_t [B, ...] from data and unit noise [B, ...] at times [B]."""
        t_B = levels(t, x0)
        return spread(self.alpha(t_B), x0) * x0 + spread(self.sigma(t_B), x0) * eps

    def target(self, kind: Prediction, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """(a, b) such that the prediction is a x0 + b eps."""
        t = _double(t)
        zero, one = torch.zeros_like(t), torch.ones_like(t)
        if kind == "x0":
            return one, zero
        if kind == "eps":
            return zero, one
        if kind == "score":
            return zero, -1.0 / self.sigma(t)
        if kind == "v":
            return self.velocity(t)
        raise RecipeError(f"A prediction is one of x0, eps, v and score, got {kind!r}.")

    def to_x0(self, kind: Prediction, prediction: Tensor, x_t: Tensor, t: Tensor | float) -> Tensor:
        """The x0 that a prediction of x0, eps, v or score at (x_t, t) implies. [B, ...]."""
        t_B = levels(t, x_t)
        alpha, sigma, (a, b) = self.alpha(t_B), self.sigma(t_B), self.target(kind, t_B)
        below = alpha * b - sigma * a
        return spread(b / below, x_t) * x_t - spread(sigma / below, x_t) * prediction

    def from_x0(self, kind: Prediction, x0: Tensor, x_t: Tensor, t: Tensor | float) -> Tensor:
        """The prediction that an x0 at (x_t, t) implies; the score is (alpha x0 - x_t) / sigma^2. [B, ...]."""
        t_B = levels(t, x_t)
        alpha, sigma, (a, b) = self.alpha(t_B), self.sigma(t_B), self.target(kind, t_B)
        return spread(a - b * alpha / sigma, x_t) * x0 + spread(b / sigma, x_t) * x_t

    def denoise(self, denoiser: Denoise, x_t: Tensor, t: Tensor | float) -> Tensor:
        """E[x0 | x_t] of this process, from a variance-exploding denoiser at the same noise-to-signal ratio."""
        t_B = levels(t, x_t)
        return denoiser(x_t / spread(self.alpha(t_B), x_t), self.ratio(t_B))


Part(Schedule)  # nests in the preconditioning of a saved denoiser


@dataclass(frozen=True)
class VE(Schedule):
    """EDM's own: alpha = 1, sigma = t. Its velocity dx/dt is eps."""

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.ones_like(_double(t))

    def sigma(self, t: Tensor | float) -> Tensor:
        return _double(t)

    def time(self, ratio: Tensor | float) -> Tensor:
        return _double(ratio)

    def velocity(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        t = _double(t)
        return torch.zeros_like(t), torch.ones_like(t)


@dataclass(frozen=True)
class RectifiedFlow(Schedule):
    """alpha = 1 - t, sigma = t, v = eps - x0, t in [0, 1]."""

    def alpha(self, t: Tensor | float) -> Tensor:
        return 1.0 - _double(t)

    def sigma(self, t: Tensor | float) -> Tensor:
        return _double(t)

    def time(self, ratio: Tensor | float) -> Tensor:
        ratio = _double(ratio)
        return ratio / (1.0 + ratio)

    def velocity(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(_double(t))
        return -one, one


@dataclass(frozen=True)
class TrigFlow(Schedule):
    """alpha = cos t, sigma = sigma_data sin t, t in [0, pi/2]; v = dx/dt = cos t sigma_data eps - sin t x0."""

    sigma_data: float = 1.0

    def alpha(self, t: Tensor | float) -> Tensor:
        return _double(t).cos()

    def sigma(self, t: Tensor | float) -> Tensor:
        return self.sigma_data * _double(t).sin()

    def time(self, ratio: Tensor | float) -> Tensor:
        return (_double(ratio) / self.sigma_data).atan()

    def velocity(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        t = _double(t)
        return -t.sin(), self.sigma_data * t.cos()


class _VariancePreserving(Schedule):
    """alpha^2 + sigma^2 = 1; v = alpha eps - sigma x0, the derivative with respect to the angle atan(sigma / alpha)."""

    def log_alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def alpha(self, t: Tensor | float) -> Tensor:
        return self.log_alpha(_double(t)).exp()

    def sigma(self, t: Tensor | float) -> Tensor:
        return (-torch.expm1(2.0 * self.log_alpha(_double(t)))).sqrt()

    def velocity(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        return -self.sigma(t), self.alpha(t)


@dataclass(frozen=True)
class VP(_VariancePreserving):
    """Continuous variance-preserving noise, beta(t) linear, t in [0, 1]: log alpha = -t^2 (b1 - b0) / 4 - t b0 / 2."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def time(self, ratio: Tensor | float) -> Tensor:
        log = torch.log1p(_double(ratio) ** 2)  # = -2 log alpha
        # the root of t^2 (b1 - b0) / 2 + t b0 - log, in the form that loses no digits
        return 2.0 * log / (self.beta_min + (self.beta_min**2 + 2.0 * (self.beta_max - self.beta_min) * log).sqrt())


@dataclass(frozen=True)
class DiscreteVP(_VariancePreserving):
    """The variance-preserving table of diffusers' DDPM schedulers: t is its (fractional) index, 0 to steps - 1.

    Between two entries log(sigma / alpha) is linear in t. Ratios beyond the table are clamped to its ends.
    """

    steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"  # linear, scaled_linear or squaredcos_cap_v2

    def __post_init__(self) -> None:
        if self.beta_schedule not in ("linear", "scaled_linear", "squaredcos_cap_v2"):
            raise RecipeError(
                "DiscreteVP.beta_schedule must be linear, scaled_linear or squaredcos_cap_v2, "
                f"got {self.beta_schedule!r}."
            )

    def _log_ratios(self, device: torch.device) -> Tensor:
        return _discrete_log_ratios(self.steps, self.beta_start, self.beta_end, self.beta_schedule).to(device)

    def log_alpha(self, t: Tensor) -> Tensor:
        table = self._log_ratios(t.device)
        below = t.detach().floor().clamp(0, self.steps - 2).long()
        log_ratio = torch.lerp(table[below], table[below + 1], (t - below).clamp(0.0, 1.0))
        return -0.5 * torch.nn.functional.softplus(2.0 * log_ratio)  # alpha^2 = 1 / (1 + ratio^2)

    def time(self, ratio: Tensor | float) -> Tensor:
        log_ratio = _double(ratio).log()
        table = self._log_ratios(log_ratio.device)
        below = (torch.searchsorted(table, log_ratio.detach().contiguous()) - 1).clamp(0, self.steps - 2)
        return below + ((log_ratio - table[below]) / (table[below + 1] - table[below])).clamp(0.0, 1.0)


@lru_cache
def _discrete_log_ratios(steps: int, start: float, end: float, kind: str) -> Tensor:
    if kind == "linear":
        beta = torch.linspace(start, end, steps, dtype=torch.float64)
    elif kind == "scaled_linear":
        beta = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    else:
        edges = torch.arange(steps + 1, dtype=torch.float64) / steps
        bar = ((edges + 0.008) / 1.008 * (math.pi / 2)).cos() ** 2
        beta = (1.0 - bar[1:] / bar[:-1]).clamp(max=0.999)
    log_bar = torch.log1p(-beta).cumsum(0)
    return 0.5 * ((-torch.expm1(log_bar)).log() - log_bar)


class Preconditioning:
    """How a network F makes a denoiser: D(x; sigma) = c_skip x + c_out F(c_in x, c_noise)."""

    def coefficients(self, sigma_B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(c_skip, c_out, c_in, c_noise), each float64 [B]."""
        raise NotImplementedError


@dataclass(frozen=True)
class EDMPreconditioning(Preconditioning):
    """EDM, table 1: unit variance of input and target of F at every level; c_noise = time_scale ln(sigma) / 4.

    `time_scale` 1 is the paper's; more suits time embeddings made for timesteps of 0 to 1000.
    """

    sigma_data: float = 0.5
    time_scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.sigma_data > 0:
            raise RecipeError(f"EDMPreconditioning.sigma_data must be positive, got {self.sigma_data}.")

    def coefficients(self, sigma_B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sigma, data = sigma_B.double(), self.sigma_data
        size = (sigma**2 + data**2).sqrt()
        return data**2 / size**2, sigma * data / size, 1.0 / size, self.time_scale * sigma.log() / 4.0


@dataclass(frozen=True)
class MatchedPreconditioning(Preconditioning):
    """A network that predicts x0, eps or v at (x_t, t) of a schedule, called at the t of equal noise-to-signal ratio.

    `time_scale` multiplies t (1000 for diffusers' flow models); `scale` is the sigma_data by which the network divides
    its input and its output (TrigFlow's F(x / sigma_data, t)).
    """

    schedule: Schedule
    prediction: str = "eps"
    time_scale: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.prediction not in ("x0", "eps", "v"):
            raise RecipeError(f"MatchedPreconditioning.prediction must be x0, eps or v, got {self.prediction!r}.")

    def coefficients(self, sigma_B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        t = self.schedule.time(sigma_B)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        a, b = self.schedule.target(self.prediction, t)  # type: ignore[arg-type]
        below = alpha * b - sigma * a
        return alpha * b / below, -self.scale * sigma / below, alpha / self.scale, self.time_scale * t


def edm_weight(sigma_B: Tensor, sigma_data: float) -> Tensor:
    """EDM's weight of |D - x0|^2, 1 / sigma^2 + 1 / sigma_data^2: unit weight on the network's own target. [B]."""
    return 1.0 / sigma_B**2 + 1.0 / sigma_data**2


def karras(u: Tensor, smin: float = 0.002, smax: float = 80.0, rho: float = 7.0) -> Tensor:
    """Karras' levels at u in [0, 1]: u = 0 is smin, u = 1 is smax (the noisiest)."""
    low, high = smin ** (1 / rho), smax ** (1 / rho)
    return (low + u.double() * (high - low)) ** rho


def karras_grid(steps: int, smin: float = 0.002, smax: float = 80.0, rho: float = 7.0, end: bool = True) -> Tensor:
    """`steps` falling levels smax ... smin, then 0 if `end`. Float64, on the CPU. [steps + end]."""
    if steps < 1:
        raise RecipeError(f"A noise grid needs at least one step, got {steps}.")
    grid = karras(torch.linspace(1.0, 0.0, steps, dtype=torch.float64), smin, smax, rho)
    return torch.cat([grid, grid.new_zeros(1)]) if end else grid


class LevelSampler:
    """A distribution of noise levels. A level is a function of (seed, id) alone."""

    def of_uniform(self, u: Tensor) -> Tensor:
        """The level at quantile u in (0, 1); rises with u."""
        raise NotImplementedError

    def __call__(self, seed: int, ids_B: Tensor) -> Tensor:
        """sigma_B, float32."""
        return self.of_uniform(keyed.uniform(keyed.key(seed, "level"), ids_B)).float()


def _check_levels(sampler: "KarrasIndex | KarrasUniform | LogUniform") -> None:
    if not 0 < sampler.smin < sampler.smax:
        name = type(sampler).__name__
        raise RecipeError(f"{name} needs 0 < smin < smax, got smin={sampler.smin} and smax={sampler.smax}.")


@dataclass(frozen=True)
class LogNormal(LevelSampler):
    """ln sigma ~ N(mean, std^2). EDM's training distribution by default."""

    mean: float = -1.2
    std: float = 1.2

    def of_uniform(self, u: Tensor) -> Tensor:
        return (self.mean + self.std * torch.special.ndtri(u)).exp()


@dataclass(frozen=True)
class LogUniform(LevelSampler):
    smin: float = 0.002
    smax: float = 80.0

    def __post_init__(self) -> None:
        _check_levels(self)

    def of_uniform(self, u: Tensor) -> Tensor:
        return (math.log(self.smin) + u * math.log(self.smax / self.smin)).exp()


@dataclass(frozen=True)
class KarrasIndex(LevelSampler):
    """An entry of the Karras grid of `steps` levels, uniformly from `low` to `high` inclusive; `high` = -1 is the last.

    Index 0 is the least noisy here. DMD2 draws from 20 to 980 of 1000.
    """

    smin: float = 0.002
    smax: float = 80.0
    rho: float = 7.0
    steps: int = 1000
    low: int = 0
    high: int = -1

    def __post_init__(self) -> None:
        _check_levels(self)
        if not 0 <= self.low <= self._last < self.steps or self.steps < 2:
            raise RecipeError(
                f"KarrasIndex needs 0 <= low <= high < steps, got low={self.low}, high={self.high}, steps={self.steps}."
            )

    @property
    def _last(self) -> int:
        return self.high % self.steps if self.high < 0 else self.high

    def of_uniform(self, u: Tensor) -> Tensor:
        index = self.low + (u * (self._last - self.low + 1)).floor()
        return karras(index / (self.steps - 1), self.smin, self.smax, self.rho)


@dataclass(frozen=True)
class KarrasUniform(LevelSampler):
    """Karras' levels at u ~ U(low, high), u = 1 the noisiest. SiD's generator draws up to high = 0.8."""

    smin: float = 0.002
    smax: float = 80.0
    rho: float = 7.0
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        _check_levels(self)
        if not 0 <= self.low < self.high <= 1:
            raise RecipeError(f"KarrasUniform needs 0 <= low < high <= 1, got low={self.low} and high={self.high}.")

    def of_uniform(self, u: Tensor) -> Tensor:
        return karras(self.low + u * (self.high - self.low), self.smin, self.smax, self.rho)


@dataclass(frozen=True)
class ShiftedUniform(LevelSampler):
    """Rectified-flow times t = shift u / (1 + (shift - 1) u), u ~ U(low, high), as levels t / (1 - t)."""

    shift: float = 1.0
    low: float = 0.001
    high: float = 0.999

    def __post_init__(self) -> None:
        if not (self.shift > 0 and 0 < self.low < self.high < 1):
            raise RecipeError(
                f"ShiftedUniform needs shift > 0 and 0 < low < high < 1, got {self.shift}, {self.low}, {self.high}."
            )

    def of_uniform(self, u: Tensor) -> Tensor:
        u = self.low + u * (self.high - self.low)
        return self.shift * u / (1.0 - u)

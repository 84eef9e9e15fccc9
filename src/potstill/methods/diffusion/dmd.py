"""DMD: the reverse KL by a fake score, held in place by a regression on the teacher's own noise-to-sample pairs.

    grad L_KL = E[ w_t (s_S - s_T)(x_t)^T alpha_t dG / dtheta ],  w_t = (sigma_t^2 / alpha_t) n / |x - D_T(x_t)|_1   (8)
    which in denoisers is the field v = (D_S - D_T) / mean |x - D_T|;  n elements a sample
    L_G = L_KL + lambda mean d(G(z), y),  (z, y): y the teacher's deterministic sample from the noise z             (9)
    L_S = denoising of sg[G(z)];  noise levels between 2 % and 98 % of the teacher's

The pairs are drawn once, before training, and remembered in the run folder.

Source: "One-step Diffusion with Distribution Matching Distillation", arXiv 2311.18828, read in tables and through
DMD2's code; lambda = 0.25 is quoted from there and was not found again in the paper's text; learning rates were not
found and are Diff-Instruct's.
Departures: d is the mean squared difference instead of LPIPS, whose network belongs to natural images; pairs are made
by Heun's method on EDM's levels; 1e-6 is added below the fraction; the number of pairs is ours.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from potstill.contracts import keyed
from potstill.contracts.batch import Batch
from potstill.contracts.players import OptimizerSpec
from potstill.contracts.spec import Part
from potstill.contracts.terms import Loss, Term
from potstill.methods import Role, method
from potstill.methods.diffusion.fake_score import FakeScoreConfig, distilled, options
from potstill.models.denoisers import Condition, OneStep, rows
from potstill.noise import samplers
from potstill.noise.gaussian import KarrasIndex, LevelSampler, karras_grid
from potstill.objectives.matching import DistributionMatching, condition_of, per_sample
from potstill.run import Result, Run


class DMD(FakeScoreConfig):
    levels: Part(LevelSampler) = KarrasIndex(low=20, high=980)  # type: ignore[valid-type]
    fake_levels: Part(LevelSampler) = KarrasIndex()  # type: ignore[valid-type]
    sigma_init: float = Field(80.0, gt=0)
    ema: float = Field(0.0, ge=0, lt=1)
    regression: float = Field(0.25, ge=0)  # lambda; at 0 no pairs are made
    pairs: int = Field(10000, ge=1)
    pair_steps: int = Field(18, ge=1)  # of Heun's method, 2 n - 1 calls of the teacher


@dataclass
class Pairs:
    """Unit noise z, the teacher's sample y from it, and what it was told. Each [N, ...]."""

    z: Tensor
    y: Tensor
    condition: Condition = None


class PairedMatching(DistributionMatching):
    """Distribution matching and a regression on pairs."""

    def __init__(
        self, generator: OneStep, teacher: Any, *, pairs: Pairs | None, regression: float, **given: Any
    ) -> None:
        super().__init__(generator, teacher, **given)
        self.pairs, self.regression = pairs, regression

    def pair_error(self, batch: Batch, step: int) -> Tensor:
        """mean |G(z) - y|^2 of as many pairs as the batch has samples, drawn by the samples' ids. [B]"""
        assert self.pairs is not None
        u_B = keyed.uniform(keyed.key(self.seed, "pair", step), batch.ids_B)
        index_B = (u_B * len(self.pairs.z)).long().to(self.pairs.z.device)
        condition = rows(self.pairs.condition, index_B)
        x, y = self.generator(self.pairs.z[index_B], condition), self.pairs.y[index_B]
        return per_sample((x - y) ** 2)

    def generator_loss(self, batch: Batch, step: int) -> Loss:
        loss = super().generator_loss(batch, step)
        if self.pairs is not None and self.regression > 0:
            values_B = self.pair_error(batch, step)
            loss.terms["regression"] = Term.over(values_B, None, self.regression, unit="sample")
        return loss


def draw_pairs(teacher: Any, z: Tensor, condition: Condition, sigma: float, steps: int, size: int = 256) -> Tensor:
    """The teacher's samples from the noise sigma z, by Heun's method. [N, ...]"""
    found = []
    for i in range(0, len(z), size):
        part = rows(condition, slice(i, i + size))
        denoise = lambda x, level, part=part: teacher(x, level, part)
        with torch.no_grad():
            found.append(samplers.heun(denoise, sigma * z[i : i + size], karras_grid(steps, smax=sigma)))
    return torch.cat(found)


def objective_of(
    config: DMD,
    generator: OneStep,
    teacher: Any,
    optimizer: OptimizerSpec,
    seed: int,
    condition: Condition = None,
    pairs: Pairs | None = None,
) -> PairedMatching:
    given = options(config, generator, teacher, optimizer, seed)
    return PairedMatching(generator, pairs=pairs, regression=config.regression, **given)


@method("dmd", student=Role("denoiser", ready=False), teacher="denoiser", data=("images", "points"))
def dmd(run: Run, config: DMD) -> Result:
    pairs = None
    if config.regression > 0:
        teacher, train = run.model("teacher"), run.source.train
        ids = torch.arange(config.pairs, device=run.device)
        condition = condition_of(train.batch(torch.arange(config.pairs) % len(train)).to(run.device), teacher)
        z = samplers.start(teacher.shape, 1.0, keyed.key(run.seed, "pairs"), ids)
        y = run.stage("pairs", draw_pairs, teacher, z, condition, config.sigma_init, config.pair_steps)
        pairs = Pairs(z, y.to(run.device), condition)
    return distilled(run, config, partial(objective_of, pairs=pairs))

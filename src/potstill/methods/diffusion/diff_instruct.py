"""Diff-Instruct: the integral Kullback-Leibler divergence between the noised student and the noised teacher.

    IKL(q || p) = int w(t) E_{x_t ~ q_t}[log q_t(x_t) - log p_t(x_t)] dt;  p teacher, q student: reverse KL          (1)
    grad IKL = int w(t) E_{z, eps}[ (s_S - s_T)(x_t)^T dx_t / dtheta ] dt                                            (2)
    L_G = sum_elements sg[D_S(x_t) - D_T(x_t)] x,  ln sigma ~ N(-1.2, 1.2^2);  L_S = denoising of sg[G(z)]

D_S - D_T = sigma^2 (s_S - s_T), so that w(t) = sigma^2. In every step the fake score moves first, then the generator.

Source: "Diff-Instruct: A Universal Approach for Transferring Knowledge From Pre-trained Diffusion Models", arXiv
2305.18455; the authors' code and its CIFAR-10 command.
Departures: no augmentation labels; a gradient that is not finite stops the run with a sentence instead of being
replaced by +-1e5; the ramp of the moving average is (1 + n) / (10 + n) after n updates, not 5 % of the images seen.
`normaliser` is ours: TeacherError makes the field DMD's.
"""

from typing import Any, Literal

from pydantic import Field

from potstill.contracts.players import OptimizerSpec
from potstill.contracts.spec import Part
from potstill.methods import Role, method
from potstill.methods.diffusion.fake_score import FakeScoreConfig, distilled, options
from potstill.models.denoisers import Condition, OneStep
from potstill.objectives.matching import Bare, DistributionMatching, Normaliser
from potstill.run import Result, Run


class DiffInstruct(FakeScoreConfig):
    sigma_init: float = Field(1.0, gt=0)
    ema: float = Field(0.99982, ge=0, lt=1)  # half-life 0.5 million images at batch 128
    normaliser: Part(Normaliser) = Bare()  # type: ignore[valid-type]
    elements: Literal["mean", "sum"] = "sum"  # of a sample's loss: the learning rate of 1e-5 belongs to the sum


def objective_of(
    config: DiffInstruct,
    generator: OneStep,
    teacher: Any,
    optimizer: OptimizerSpec,
    seed: int,
    condition: Condition = None,
) -> DistributionMatching:
    return DistributionMatching(
        generator,
        normaliser=config.normaliser,
        elements=config.elements,
        fake_first=True,
        **options(config, generator, teacher, optimizer, seed),
    )


@method("diff_instruct", student=Role("denoiser", ready=False), teacher="denoiser", data=("images", "points"))
def diff_instruct(run: Run, config: DiffInstruct) -> Result:
    return distilled(run, config, objective_of)

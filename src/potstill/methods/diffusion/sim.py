"""SIM: score implicit matching, any distance between the score of the noised student and that of the teacher.

    D(q, p) = int w(t) E_{x_t ~ pi_t}[ d(y_t) ] dt,  y_t = s_S(x_t) - s_T(x_t),  pi_t the student's law, held fixed  (1)
    grad D = grad int w(t) E[ -d'(y_t)^T (s_S(x_t) - grad log q(x_t | x)) ] dt,  s_S and s_T frozen as functions     (2)
    pseudo-Huber: d(y) = sqrt(|y|^2 + c^2) - c,  d'(y) = y / sqrt(|y|^2 + c^2);  |y| over all elements of a sample
    L_S = denoising of sg[G(z)]; one step each

p teacher, q student. Gradients run through x_t into both networks, also inside d'(y_t). In denoisers
s_S - grad log q(x_t | x) = (D_S - x) / sigma^2 and y_t = (D_S - D_T) / sigma^2. The squared distance is twice SiD at
alpha = 1. The divergence's own gradient has one part more, from pi_t, which the paper leaves out on purpose.

`space: denoiser` (default) takes y = (D_S - D_T) / sqrt(n), n elements a sample, so that c is a root mean square over
elements, in the unit of the data, the same for every size of image and level of noise. `space: score` is (1) literally:
c has the unit of a score, and w(t) is chosen by `normaliser` (NoisePower(-2) is w = sigma^2).

Source: "One-Step Diffusion Distillation through Score Implicit Matching", arXiv 2410.16794, parts of the paper's text;
no training code is public. Unsourced are c, w(t), the learning rate and the levels: here c = 0.03, our choice, and the
rest SiD's, whose code the authors build on. Their later code has the squared distance with SiD's normaliser
(`distance: SquaredScore`, `normaliser: {name: TeacherError, eps: 0, least: 1.0e-5}`).
"""

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from potstill.contracts.players import OptimizerSpec
from potstill.contracts.spec import Part
from potstill.divergences import PseudoHuber, ScoreDistance, score_implicit
from potstill.methods import Role, method
from potstill.methods.diffusion.fake_score import FakeScoreConfig, distilled, options
from potstill.models.denoisers import Condition, OneStep
from potstill.noise.gaussian import KarrasUniform, LevelSampler, spread
from potstill.objectives.matching import Bare, Comparison, Normaliser, ScoreSurrogate
from potstill.run import Result, Run

Space = Literal["denoiser", "score"]


class SIM(FakeScoreConfig):
    distance: Part(ScoreDistance) = PseudoHuber(0.03)  # type: ignore[valid-type]
    space: Space = "denoiser"
    levels: Part(LevelSampler) = KarrasUniform(high=0.8)  # type: ignore[valid-type]
    normaliser: Part(Normaliser) = Bare()  # type: ignore[valid-type]
    elements: Literal["mean", "sum"] = "sum"
    scale: float = Field(1.0, gt=0)


class ScoreImplicit(ScoreSurrogate):
    def __init__(
        self, generator: OneStep, teacher: Any, *, distance: ScoreDistance, space: Space = "denoiser", **given: Any
    ) -> None:
        super().__init__(generator, teacher, **given)
        self.distance, self.space = distance, space

    def surrogate(self, at: Comparison, step: int) -> Tensor:
        n = at.x[0].numel()
        unit = spread(at.sigma_B**2, at.x) if self.space == "score" else n**0.5
        value_B = score_implicit(
            self.distance, teacher_score=at.teacher / unit, student_score=at.fake / unit, conditional_score=at.x / unit
        )
        return value_B if self.space == "score" else n * value_B


def objective_of(
    config: SIM, generator: OneStep, teacher: Any, optimizer: OptimizerSpec, seed: int, condition: Condition = None
) -> ScoreImplicit:
    return ScoreImplicit(
        generator,
        distance=config.distance,
        space=config.space,
        normaliser=config.normaliser,
        elements=config.elements,
        scale=config.scale,
        fake_first=True,
        **options(config, generator, teacher, optimizer, seed),
    )


@method("sim", student=Role("denoiser", ready=False), teacher="denoiser", data=("images", "points"))
def sim(run: Run, config: SIM) -> Result:
    return distilled(run, config, objective_of)

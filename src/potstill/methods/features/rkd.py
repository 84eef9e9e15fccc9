"""RKD: the student's samples lie to one another as the teacher's do (arXiv 1904.05068).

    L = CE(z, y) + l_D mean_i sum_j huber( d_ij / mean d (student), the teacher's ) / (B - 1)
                 + l_A mean over triplets of huber( cos of the angle at i between j and k (student), the teacher's )

d_ij = |f_i - f_j| of the penultimate features f [B, D], of any two widths: no projector. Both relations couple the batch, so
a batch cannot be cut. l_D = 25, l_A = 50 are said to be the paper's for classification (second-hand). The mean distance
is that of the pairs apart and has a gradient, as in the authors' code; their mean over all B^2 pairs, those of a sample
with itself among them, would weigh (B - 1) / B as much. `distillation` adds KD at `temperature` (the paper's table of
combinations).
"""

from pydantic import Field

from potstill.methods import method
from potstill.methods.classification.comparison import LogitConfig, distilled
from potstill.objectives.feature_terms import Relations
from potstill.objectives.logits import KD
from potstill.run import Result, Run


class RKD(LogitConfig):
    distance: float = Field(25.0, ge=0)  # l_D
    angle: float = Field(50.0, ge=0)  # l_A
    cross_entropy: float = Field(1.0, ge=0)
    distillation: float = Field(0.0, ge=0)  # of KD beside it
    temperature: float = Field(4.0, gt=0)  # KD's


@method("rkd", student="image_classifier", teacher="image_classifier", data="images")
def rkd(run: Run, config: RKD) -> Result:
    weights = {"distance": config.distance, "angle": config.angle}
    return distilled(
        run,
        config,
        KD(config.temperature),
        cross_entropy=config.cross_entropy,
        distillation=config.distillation,
        features=lambda student, teacher, images: [
            Relations(student, teacher, images, kind, weight)  # type: ignore[arg-type]
            for kind, weight in weights.items()
            if weight
        ],
    )

"""PLD: the student learns one order of the classes, weighed by its teacher's probabilities (arXiv 2506.12542).

    pi = (y, then the other classes by falling teacher logit),   a_k = softmax(v / tau)_{pi_k}
    L  = sum_k a_k [ logsumexp_{l >= k} z_{pi_l} - z_{pi_k} ]

z student and v teacher logits: a weighted Plackett-Luce likelihood, convex in z, free of an offset but not of a scale. It
stands for cross-entropy and divergence alike, so no weight between the two is tuned: the first place is a cross-entropy,
weighed by what the teacher gives the label. tau changes weights, never the order; the student is not tempered.

`places` are the ablations: `TeacherSoftmax(temperature)` (the paper's 1 on ImageNet, 4 on CIFAR-100), `FirstPlaces(1)` (plain
cross-entropy), `FirstPlaces` (ListMLE), `Decreasing` (p-ListMLE: the paper's own description of that ablation equals PLD,
and a fixed decreasing sequence, which it names elsewhere, is taken). `labelled: false` orders by the teacher alone; that is
not in the paper.
"""

from dataclasses import dataclass, field

from pydantic import Field
from torch import Tensor

from potstill.contracts.spec import Part
from potstill.divergences import PlaceWeights, TeacherSoftmax, plackett_luce
from potstill.methods import method
from potstill.methods.classification.comparison import LogitConfig, distilled
from potstill.objectives.logits import LogitLoss
from potstill.objectives.targets import ranking
from potstill.run import Result, Run


@dataclass(frozen=True)
class PLD(LogitLoss):
    """Weighted negative log-likelihood of the teacher's order, the label first."""

    places: Part(PlaceWeights) = field(default_factory=TeacherSoftmax)  # type: ignore[valid-type]
    normalised: bool = False
    labelled: bool = True

    def __call__(self, student: Tensor, teacher: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
        order, weights = ranking(teacher, labels_B if self.labelled else None, self.places, self.normalised)
        return {"pld": plackett_luce(student, order, weights)}


class PLDConfig(LogitConfig):
    places: Part(PlaceWeights) = TeacherSoftmax()  # type: ignore[valid-type]
    normalised: bool = False  # weights of a sample sum to 1, which the teacher's softmax does by itself
    labelled: bool = True  # False: the teacher's own order
    cross_entropy: float = Field(0.0, ge=0)  # further weight of the label, which the paper does without
    distillation: float = Field(1.0, ge=0)


@method("pld", student="image_classifier", teacher="image_classifier", data="images")
def pld(run: Run, config: PLDConfig) -> Result:
    return distilled(
        run,
        config,
        PLD(config.places, config.normalised, config.labelled),
        cross_entropy=config.cross_entropy,
        distillation=config.distillation,
    )

"""Knowledge distillation of classifiers (Hinton et al., arXiv 1503.02531).

    L = a CE(z, y) + b T^2 KL( softmax(v / T) || softmax(z / T) )

z student and v teacher logits; T^2 keeps the gradient's size as T grows (section 2.1). T = 4, a = 0.1 and b = 0.9 are
those of the CIFAR-100 protocol that later papers compare under (CRD, arXiv 1910.10699, and DKD's code); Hinton's own
weights are not stated. `standardize` compares Z-scores instead (logit_std, arXiv 2403.01427).
"""

from pydantic import Field

from potstill.contracts.spec import Part
from potstill.divergences import FDivergence, ForwardKL
from potstill.methods import method
from potstill.methods.classification.comparison import LogitConfig, distilled
from potstill.objectives.logits import KD, Standardize
from potstill.run import Result, Run


class KDConfig(LogitConfig):
    temperature: float = Field(4.0, gt=0)
    divergence: Part(FDivergence) = ForwardKL()  # type: ignore[valid-type]
    cross_entropy: float = Field(0.1, ge=0)  # a
    distillation: float = Field(0.9, ge=0)  # b
    standardize: bool = False


@method("kd", student="image_classifier", teacher="image_classifier", data="images")
def kd(run: Run, config: KDConfig) -> Result:
    return distilled(
        run,
        config,
        KD(config.temperature, config.divergence),
        cross_entropy=config.cross_entropy,
        distillation=config.distillation,
        transforms=[Standardize()] if config.standardize else [],
    )

"""DIST: distillation from a stronger teacher by correlation instead of equality (arXiv 2205.10536).

    L = CE(z, y) + T^2 ( beta mean_b [1 - corr(p_b., q_b.)] + gamma mean_v [1 - corr(p_.v, q_.v)] )

p and q [B, V] are probabilities at temperature T; corr is Pearson's, over the classes of a sample (inter) and over the
samples of a class (intra). The second couples the batch, so a batch cannot be cut. beta = gamma = 1, T = 1 are those of
ImageNet; the paper's CIFAR-100 runs take 2, 2 and T = 4. `standardize` takes Z-scores of the logits first (logit_std).
"""

from pydantic import Field

from potstill.methods import method
from potstill.methods.classification.comparison import LogitConfig, distilled
from potstill.objectives.logits import DIST, Standardize
from potstill.run import Result, Run


class DISTConfig(LogitConfig):
    beta: float = Field(1.0, ge=0)  # weight of inter
    gamma: float = Field(1.0, ge=0)  # weight of intra
    temperature: float = Field(1.0, gt=0)
    cross_entropy: float = Field(1.0, ge=0)
    distillation: float = Field(1.0, ge=0)
    standardize: bool = False


@method("dist", student="image_classifier", teacher="image_classifier", data="images")
def dist(run: Run, config: DISTConfig) -> Result:
    return distilled(
        run,
        config,
        DIST(config.beta, config.gamma, config.temperature),
        cross_entropy=config.cross_entropy,
        distillation=config.distillation,
        transforms=[Standardize()] if config.standardize else [],
    )

"""DKD: decoupled knowledge distillation (arXiv 2203.08679).

    L = CE(z, y) + w T^2 ( alpha TCKD + beta NCKD )
    TCKD = KL of the binary distributions (target, rest);  NCKD = KL among the classes that are not the target

p and q at temperature T. KD is alpha = 1, beta = 1 - p(target): its second part fades where the teacher is certain, and a
constant beta frees it. w grows from 0 to 1 over `warmup` of the training (the paper's code: 20 of 240 epochs).
beta depends on the teacher in the paper (1 to 10 on CIFAR-100); 8 is that of ResNet32x4 -> ResNet8x4.
`standardize` compares Z-scores instead (logit_std, arXiv 2403.01427).
"""

from pydantic import Field

from potstill.methods import method
from potstill.methods.classification.comparison import LogitConfig, distilled
from potstill.objectives.logits import DKD, Standardize
from potstill.run import Result, Run


class DKDConfig(LogitConfig):
    alpha: float = Field(1.0, ge=0)  # weight of TCKD
    beta: float = Field(8.0, ge=0)  # weight of NCKD
    temperature: float = Field(4.0, gt=0)
    cross_entropy: float = Field(1.0, ge=0)
    distillation: float = Field(1.0, ge=0)
    warmup: float = Field(20 / 240, ge=0, le=1)  # share of the steps
    standardize: bool = False


@method("dkd", student="image_classifier", teacher="image_classifier", data="images")
def dkd(run: Run, config: DKDConfig) -> Result:
    return distilled(
        run,
        config,
        DKD(config.alpha, config.beta, config.temperature),
        cross_entropy=config.cross_entropy,
        distillation=config.distillation,
        transforms=[Standardize()] if config.standardize else [],
        warmup=config.warmup,
    )

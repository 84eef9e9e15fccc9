"""Logit standardization: each logit vector's own deviation is its temperature (LSKD, arXiv 2403.01427).

    Z(x) = (x - mean(x)) / (std(x) + eps)                                     over the V classes of a sample
    L = lambda_CE CE(z, y) + lambda_KD tau^2 KL( softmax(Z(v) / tau) || softmax(Z(z) / tau) )

z student and v teacher logits; cross-entropy sees the raw z. softmax(Z(a x + b)) = softmax(Z(x)) for a > 0, so the student
need not match the teacher's scale: its gradient is orthogonal to z - mean(z). A plug-in: `base` is the loss behind it,
KD here as in the paper's equation, DKD as in its table 3 (both parts times lambda_KD, CE weight 1, warm-up), or DIST,
which the paper does not try. std divides by V - 1, as the official code does.

`of`, `unbiased` and `detach` are the ablations. Where the labels weigh little, the student's own scale is set by them
alone: its probabilities are badly under-confident (compare accuracies, or fit a temperature afterwards).
"""

from typing import Literal

from pydantic import Field, model_validator

from potstill.methods import method
from potstill.methods.classification.comparison import LogitConfig, distilled
from potstill.objectives.logits import DIST, DKD, KD, LogitLoss, Standardize
from potstill.run import Result, Run


class LogitStd(LogitConfig):
    base: Literal["kd", "dkd", "dist"] = "kd"
    temperature: float = Field(2.0, gt=0)  # tau; 2 or 3 in the paper
    cross_entropy: float | None = Field(None, ge=0)  # lambda_CE; null: 0.1, and 1 with dkd
    distillation: float = Field(9.0, ge=0)  # lambda_KD; the authors search 3, 6, 9, 12, 15
    warmup: float | None = Field(None, ge=0, le=1)  # share of the steps; null: 0, and 20 of 240 epochs with dkd
    alpha: float = Field(1.0, ge=0)  # dkd only: weight of TCKD
    beta: float = Field(8.0, ge=0)  # dkd only: weight of NCKD; 2 or 8 in the paper
    of: Literal["both", "teacher", "student"] = "both"  # whose logits are standardised
    unbiased: bool = True  # False: population deviation
    detach: bool = False  # True: no gradient through mean and deviation

    @model_validator(mode="after")
    def _own_options(self) -> "LogitStd":
        if self.base != "dkd" and (self.alpha, self.beta) != (1.0, 8.0):
            raise ValueError(f"alpha and beta belong to base: dkd, and base is {self.base}")
        return self

    def loss(self) -> LogitLoss:
        """The base loss at temperature tau."""
        match self.base:
            case "kd":
                return KD(self.temperature)
            case "dkd":
                return DKD(self.alpha, self.beta, self.temperature)
            case "dist":
                return DIST(temperature=self.temperature)


@method("logit_std", student="image_classifier", teacher="image_classifier", data="images")
def logit_std(run: Run, config: LogitStd) -> Result:
    decoupled = config.base == "dkd"
    default = lambda value, usual, dkd: value if value is not None else dkd if decoupled else usual
    return distilled(
        run,
        config,
        config.loss(),
        cross_entropy=default(config.cross_entropy, 0.1, 1.0),
        distillation=config.distillation,
        transforms=[Standardize(config.of, config.unbiased, config.detach)],
        warmup=default(config.warmup, 0.0, 20 / 240),
    )

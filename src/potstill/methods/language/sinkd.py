"""SinKD: the batch of predictions is moved onto the teacher's batch by optimal transport (arXiv 2402.17110).

    s_i = softmax(z_i / tau), t_j = softmax(v_j / tau)       student z and teacher v logits of the b samples of a batch
    D_ij = |s_i - t_j|_p,   K = exp(-D / lambda),   n times: rows of K to sum 1, then columns;   P = K
    L = a_CE CE + a_KL KL(softmax(v / T) || softmax(z / T)) + a_SD sum_ij P_ij D_ij

No T^2 anywhere; the KL is the paper's soft-label cross-entropy less the teacher's entropy, which has no gradient. The
defaults are the code's: tau 2, lambda 0.1, n 20, p 1, a_SD = beta c = 0.8 * 0.001 (c hides in its Sinkhorn module). Masses
are 1 a sample, so the last term grows with b. It is unchanged when the teacher's rows are permuted, so alone it cannot bind
student i to teacher i; and it is above 0 for equal batches, since the plan is entropic. `anneal`: T falls to 1.

The paper distils classifiers [b, d] (BERT on GLUE) and language models (T0, GPT-Neo); the data decides here. Images make
student and teacher image classifiers: a_CE = 1 - a_KL, a_KL = 0.9, T = 2 (the paper's SST-2; others have 0.8 to 1 and 1 to
4). Text makes them causal language models at every counted token: a_CE = 1, a_KL = 0.1, T = 1.

Departs from the code: `kd+sinkhorn` there builds the term and never adds it (only its flag `saliency` does); the term is
always added here. Its language models take the softmax over positions and normalise over the batch axis; here the counted
positions are the rows of [N, V]. One problem of all N costs N^2 V: `size` rows to a problem bound it, and the mean over
problems keeps a_SD what it is; `of: sequences` compares sequences' mean probabilities instead. T falls with the steps, not
the epochs. Iterations run in the log domain, equal to the ratios where those do not underflow. `over: classes` is the
sample-wise variant, transport among the classes of each sample; `size: 1` compares each sample with itself, |s_i - t_i|.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from potstill.contracts.batch import Batch
from potstill.contracts.errors import RecipeError
from potstill.contracts.spec import MethodConfig, Part
from potstill.contracts.terms import Loss
from potstill.divergences import FDivergence, ForwardKL, Sinkhorn
from potstill.methods import Kind, Role, method
from potstill.methods.classification import comparison as classifiers
from potstill.methods.language.comparison import compared, start_of
from potstill.objectives.logits import KD, LogitDistillation, LogitLoss
from potstill.objectives.token_terms import RowTransport, SinkhornTerm
from potstill.objectives.tokens import TokenDistillation
from potstill.run import Result, Run


class SinKD(MethodConfig):
    cross_entropy: float | None = Field(None, ge=0)  # a_CE; null: 1 - a_KL for classifiers, 1 for language models
    kl: float | None = Field(None, ge=0)  # a_KL; null: 0.9, and 0.1 for language models
    temperature: float | None = Field(None, gt=0)  # T, of the KL; null: 2, and 1 for language models
    anneal: bool = False  # T falls linearly to 1
    divergence: Part(FDivergence) = ForwardKL()  # type: ignore[valid-type]  # in place of the KL
    sinkhorn: float = Field(0.0008, ge=0)  # a_SD
    sinkhorn_temperature: float = Field(2.0, gt=0)  # tau
    epsilon: float = Field(0.1, gt=0)  # lambda
    iterations: int = Field(20, ge=1)  # n
    norm: float = Field(1.0, ge=1)  # p
    marginals: Literal["ones", "uniform"] = "ones"  # mass 1 a sample, or 1 / b
    gradient: Literal["unrolled", "implicit", "detached"] = "unrolled"  # through the plan
    over: Literal["batch", "classes"] = "batch"
    size: int | None = Field(None, ge=1)  # rows to a transport problem; null: the whole batch
    of: Literal["positions", "sequences"] = "positions"  # language models only
    rows: int | None = Field(None, gt=0)  # classifiers only: training rows of the student

    def transport(self) -> RowTransport:
        moved = Sinkhorn(
            self.epsilon, self.iterations, gradient=self.gradient, marginals=self.marginals, norm=self.norm
        )
        return RowTransport(self.sinkhorn_temperature, moved, self.over, self.size)


def temperature_at(step: int, start: float, steps: int) -> float:
    """From `start` at the first of `steps` steps to 1 at the last; 0 steps: always `start`."""
    return start + (1 - start) * min(step / max(steps - 1, 1), 1.0) if steps else start


@dataclass(frozen=True)
class SinkhornKD(LogitLoss):
    """kl D(v / T, z / T) and sinkhorn times the transport cost of a batch (its sum; the mean of several problems)."""

    kl: float = 0.9
    temperature: float = 2.0
    divergence: FDivergence = field(default_factory=ForwardKL)
    sinkhorn: float = 0.0008
    transport: RowTransport = field(default_factory=RowTransport)

    @property
    def couples(self) -> Literal["position", "batch"]:  # type: ignore[override]
        return "batch" if self.sinkhorn else "position"

    def __call__(self, student: Tensor, teacher: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
        near = KD(self.temperature, self.divergence, temperature_squared=False)(student, teacher, labels_B)
        parts = {"kd": self.kl * near["kd"]}
        if self.sinkhorn:
            made = self.transport.probabilities
            cost_B, problems = self.transport(teacher=made(teacher), student=made(student))
            parts["sinkhorn"] = self.sinkhorn * len(student) / problems * cost_B  # the trainer divides by the samples
        return parts


class Classifiers(LogitDistillation):
    """Logit distillation whose temperature falls to 1 over `anneal` steps."""

    def __init__(self, *args: Any, anneal: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self.start, self.anneal = self.logit_loss, anneal

    def loss(self, player: str, batch: Any, step: int) -> Loss:
        assert isinstance(self.start, SinkhornKD)
        self.logit_loss = replace(self.start, temperature=temperature_at(step, self.start.temperature, self.anneal))
        return super().loss(player, batch, step)


class LanguageModels(TokenDistillation):
    """Token distillation whose temperature falls to 1 over `anneal` steps."""

    def __init__(self, *args: Any, anneal: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self.start, self.anneal = self.temperature, anneal

    def loss(self, player: str, batch: Batch, step: int) -> Loss:
        self.temperature = temperature_at(step, self.start, self.anneal)
        return super().loss(player, batch, step)


IMAGES: dict[str, Kind] = {"images": "image_classifier"}


@method(
    "sinkd",
    student=Role("causal_lm", ready=False, by_data=IMAGES),
    teacher=Role("causal_lm", by_data=IMAGES),
    data=("text", "chat", "prompts", "images"),
)
def sinkd(run: Run, config: SinKD) -> Result:
    images = run.source.kind == "images"
    kl = config.kl if config.kl is not None else 0.9 if images else 0.1
    usual = max(0.0, 1 - kl) if images else 1.0
    weights = {"kl": kl, "cross_entropy": usual if config.cross_entropy is None else config.cross_entropy}
    if not any((*weights.values(), config.sinkhorn)):
        raise RecipeError(
            "method.cross_entropy, method.kl and method.sinkhorn are all 0, so nothing is learnt: raise one."
        )
    temperature = config.temperature or (2.0 if images else 1.0)
    return (_classifiers if images else _language_models)(run, config, temperature, **weights)


def _language_models(run: Run, config: SinKD, temperature: float, *, kl: float, cross_entropy: float) -> Result:
    if config.rows is not None:
        raise RecipeError(f"method.rows belongs to images, and {run.source.name} gives {run.source.kind}.")
    student = run.student()
    before = start_of(student)
    term = SinkhornTerm(config.sinkhorn, config.transport(), config.of)
    objective = LanguageModels(
        student,
        run.teacher(),
        config.divergence,
        optimizer=run.train.optimizer_spec(),
        seed=run.seed,
        distillation=kl,
        cross_entropy=cross_entropy,
        temperature=temperature,
        extras=(term,) if config.sinkhorn else (),
        anneal=run.train.steps if config.anneal else 0,
    )
    run.fit(objective, run.tokens())
    return compared(run, before=before)


def _classifiers(run: Run, config: SinKD, temperature: float, *, kl: float, cross_entropy: float) -> Result:
    if config.of != "positions":
        raise RecipeError(f"method.of: sequences belongs to text, and {run.source.name} gives images.")
    student, teacher = run.student(), run.teacher()
    classifiers.check_classes(run, {"teacher": teacher.model, "student": student})
    objective = Classifiers(
        student,
        teacher,
        SinkhornKD(kl, temperature, config.divergence, config.sinkhorn, config.transport()),
        optimizer=run.train.optimizer_spec(),
        cross_entropy=cross_entropy,
        distillation=1.0,
        anneal=run.train.steps if config.anneal else 0,
    )
    run.fit(objective, classifiers.training_rows(run, config.rows))
    return classifiers.compared(run, student, teacher)

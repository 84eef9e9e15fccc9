"""BD-KD: online distillation whose student balances both KL divergences by who is surer (arXiv 2212.12965).

A large network (here "teacher") and a small one learn together from scratch; each takes the other's logits as constants.

    L_s = CE(z_s, y) + T^2 ( w_f KL(p_t || p_s) + w_r KL(p_s || p_t) )
    w_f = nu where H(p_t) > H(p_s), else 1;   w_r = nu where H(p_s) > H(p_t), else 1        per sample, without gradient
    L_t = CE(z_t, y) + mu T^2 KL(p_s || p_t)

An over-confident student is pulled by the forward KL, which covers; an unsure one by the reverse KL, which seeks. The
student's loss is 1 + nu times that of deep mutual learning (DML, arXiv 1706.00384, `mode: forward`), so `mode: sum` is the
fair control of the gate.

Source and doubts: the paper's body was not at hand. The dual KL of the student guided by the entropy gap and the teacher's
KL(p_s || p_t) come from its abstracts and a summary; the gate's direction, its two levels and the plain sum of the pair from
a re-implementation for language models (ABKD's code, there with nu 3). T, nu and all coefficients are ours: T = 1, as in
DML, nu = 2, the rest 1. Ablations: `mode`, `regulariser` of the teacher, `tempered` (entropies at T instead of at 1),
`average` (half of the pair's sum). With several teachers a network's term is the mean over its peers, which is assumed.
One optimizer holds all networks; as none sees another's gradient, that is one for each.
"""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from potstill.contracts import keyed
from potstill.contracts.errors import RecipeError
from potstill.divergences import ForwardKL, ReverseKL
from potstill.divergences.family import one_of
from potstill.methods import Role, method
from potstill.methods.classification.comparison import ClassifierConfig, check_classes, compared, training_rows
from potstill.objectives.logits import KD, EntropyGate, LogitLoss, MutualDistillation, Supervised
from potstill.run import Result, Run
from potstill.tasks.base import Images
from potstill.teachers import LocalTeacher

Mode = Literal["gated", "swapped", "sum", "forward", "reverse"]


@dataclass(frozen=True)
class Balanced(LogitLoss):
    """T^2 (w_f KL(peer || own) + w_r KL(own || peer)), all times `coefficient`.

    mode: "gated" as above; "swapped" the other way round; "sum" without a gate; "forward" or "reverse" that KL alone.
    """

    nu: float = 2.0
    mode: Mode = "gated"
    temperature: float = 1.0
    tempered: bool = False  # entropies at the temperature, not at 1
    average: bool = False  # half of the pair
    coefficient: float = 1.0

    def __post_init__(self) -> None:
        one_of(self, "mode", self.mode, ("gated", "swapped", "sum", "forward", "reverse"))
        if self.nu < 1:
            raise RecipeError(f"Balanced.nu must be at least 1, got {self.nu}. mode: swapped turns the gate round.")

    def __call__(self, student: Tensor, teacher: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
        parts = {}
        for name, divergence, surer in (("forward", ForwardKL(), "teacher"), ("reverse", ReverseKL(), "student")):
            if self.mode in (name, "gated", "swapped", "sum"):
                values_B = self.coefficient * KD(self.temperature, divergence)(student, teacher, labels_B)["kd"]
                if self.mode in ("gated", "swapped"):
                    of: Any = surer if self.mode == "gated" else {"teacher": "student", "student": "teacher"}[surer]
                    gate = EntropyGate(of, self.nu, self.temperature if self.tempered else 1.0)
                    values_B = values_B * gate(student, teacher, labels_B)
                parts[name] = values_B * (0.5 if self.average else 1.0)
        return parts


class BDKD(ClassifierConfig):
    nu: float = Field(2.0, ge=1)
    mode: Mode = "gated"
    temperature: float = Field(1.0, gt=0)  # T
    tempered: bool = False
    average: bool = False
    regulariser: Literal["none", "kl_s_t", "kl_t_s", "gated"] = "kl_s_t"  # of the teacher; kl_s_t is KL(p_s || p_t)
    cross_entropy: float = Field(1.0, ge=0)
    distillation: float = Field(
        1.0, ge=0
    )  # of the student's divergences; 0 with regulariser none: independent networks
    teacher_distillation: float = Field(1.0, ge=0)  # mu
    label_noise: float = Field(0.0, ge=0, le=1)  # share of the training labels replaced by another class, keyed

    def losses(self) -> dict[str, LogitLoss]:
        """The student's loss, and the teachers': in theirs "own" is the teacher and the peer is the student."""
        made: dict[str, LogitLoss] = {}
        if self.distillation:
            made["student"] = Balanced(
                self.nu, self.mode, self.temperature, self.tempered, self.average, self.distillation
            )
        modes: dict[str, Mode] = {"kl_s_t": "forward", "kl_t_s": "reverse", "gated": "gated"}
        if self.teacher_distillation and self.regulariser != "none":
            mode = modes[self.regulariser]
            made["teacher"] = Balanced(
                self.nu, mode, self.temperature, self.tempered, coefficient=self.teacher_distillation
            )
        return made


def noisy(rows: Images, share: float, classes: int, seed: int) -> Images:
    """The same images with a share of the labels moved to another class, uniformly."""
    index, key = torch.arange(len(rows)), keyed.key(seed, "label noise")
    shift = 1 + (keyed.uniform(keyed.key(key, "to"), index) * (classes - 1)).long().clamp_max(classes - 2)
    wrong = keyed.uniform(keyed.key(key, "whether"), index) < share
    return Images(rows.images, torch.where(wrong, (rows.labels + shift) % classes, rows.labels), rows.augment)


@method("bd_kd", student="image_classifier", teacher=Role("image_classifier", ready=False, many=True), data="images")
def bd_kd(run: Run, config: BDKD) -> Result:
    student, teachers = run.student(), run.models("teacher")
    names = ["teacher"] if len(teachers) == 1 else [f"teacher_{i}" for i in range(len(teachers))]
    networks = {"student": student, **dict(zip(names, teachers))}
    check_classes(run, networks)
    rows = training_rows(run, config.rows)
    if config.label_noise:
        rows = noisy(rows, config.label_noise, student.classes, run.seed)
    control = copy.deepcopy(student) if config.control else None
    made, optimizer = config.losses(), run.train.optimizer_spec()
    losses = {name: made[role] for name in networks if (role := name.partition("_")[0]) in made}
    objective = MutualDistillation(networks, losses, optimizer=optimizer, cross_entropy=config.cross_entropy)
    run.fit(objective, rows, evaluate=lambda step: run.evaluate(student))
    if control is not None:
        run.fit(Supervised(control, optimizer=optimizer), rows, stage="control")
    return compared(run, student, LocalTeacher(teachers[0]), control)

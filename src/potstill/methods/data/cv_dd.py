"""CV-DD: a committee of classifiers votes on synthetic images and on their soft labels (arXiv 2501.07575).

    recover   min over x~:  sum_j w_j [ CE(f_j(x'), y) + r_bn sum_l c_l ( |mu_l(x') - mu_jl| + |var_l(x') - var_jl| ) ]
              w = softmax(a / 5) over the N members of a slice, c_l = 10 at the first BatchNorm layer and 1 elsewhere
    relabel   s(x') = sum_j w'_j f_j(x'),  w' = softmax(a / 10) over all members, BatchNorm on the batch's own statistics
              (batch-specific soft labels, BSSL)
    validate  KL( softmax(s / T) || softmax(student(x') / T) ), T = 20, without T^2

a_j is a member's prior: the accuracy, in percent, of a student trained on what that member alone distils. x' is x~ cropped,
flipped, shifted (recover) or cropped, flipped and mixed by CutMix (relabel, validate: the same images, replayed by key).
One slice holds one image of every class. SRe2L++ is a committee of one.

Departs from the paper: members are trained without CutMix, as any packaged teacher here; mosaics of 2 x 2 shrunken images
of the class stand for the authors' supplied patches (of random candidates the median by committee loss, "medium").
Labels are those of the mixed image that the student sees (the released mixup path labels the unmixed one). Priors not
given are measured: a single-member pipeline each with `prior_steps` recover steps.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from potstill.contracts import keyed
from potstill.contracts.batch import Batch, ImageBatch
from potstill.contracts.errors import RecipeError
from potstill.contracts.files import save_tensors, whole_folder, write_json
from potstill.contracts.players import Objective, OptimizerSpec, Player
from potstill.contracts.signals import FullLogits, Signal
from potstill.contracts.spec import MethodConfig
from potstill.contracts.terms import Loss, Term
from potstill.evaluation.images import evaluate_classifier
from potstill.evaluation.pictures import save_grid
from potstill.methods import Role, method
from potstill.models.build import freeze
from potstill.models.spec import ModelSpec
from potstill.models.taps import batch_statistics, tap_batchnorm
from potstill.objectives.logits import KD, LogitDistillation
from potstill.run import Result, Run
from potstill.tasks.base import sample_ids
from potstill.training.trainer import data_order


class CVDD(MethodConfig):
    images_per_class: int = Field(10, ge=1)
    voters: int = Field(2, ge=1)  # members that shape one slice
    voting: Literal["prior", "equal", "random"] = "prior"
    priors: list[float] | None = None  # percent, one a member; None measures them
    prior_steps: int = Field(400, ge=1)
    recover_temperature: float = Field(5.0, gt=0)
    relabel_temperature: float = Field(10.0, gt=0)
    init: Literal["mosaic", "real", "noise"] = "mosaic"
    recover_steps: int = Field(4000, ge=0)  # 0 leaves the images as they start
    pixels: OptimizerSpec = OptimizerSpec(optimizer="adam", lr=0.25, betas=(0.5, 0.9), schedule="cosine")
    bn_weight: float = Field(0.01, ge=0)  # r_bn
    first_bn: float = Field(10.0, ge=0)  # c_l of the first layer
    jitter: int = Field(4, ge=0)  # pixels of the cyclic shift
    flip: bool = True
    crop: float = Field(0.08, gt=0, le=1)  # smallest area of a crop
    cutmix: bool = True
    bssl: bool = True  # False: labels by members in evaluation mode
    label_members: Literal["all", "first"] = "all"  # first: single-teacher labels
    temperature: float = Field(20.0, gt=0)
    epochs: int = Field(300, ge=1)  # of the student


def votes(priors: Sequence[float], temperature: float) -> list[float]:
    """softmax(a / T): equal voting as T grows, the best member alone as it falls."""
    return torch.tensor(priors, dtype=torch.float64).div(temperature).softmax(0).tolist()


def voters_of(slice_: int, priors: Sequence[float], config: CVDD, seed: int) -> list[int]:
    """The members that shape a slice: the best for one image a class, pairs in turn up to as many as there are, else drawn."""
    members = range(len(priors))
    groups = list(itertools.combinations(members, min(config.voters, len(priors))))
    if config.images_per_class == 1:
        return sorted(sorted(members, key=lambda j: -priors[j])[: config.voters])
    if config.images_per_class <= len(groups) or len(groups) == 1:
        return list(groups[slice_ % len(groups)])
    pick = keyed.uniform(keyed.key(seed, "voters"), torch.tensor([slice_])).item()
    return list(groups[int(pick * len(groups))])


def cropped(images: Tensor, seed: int, ids_B: Tensor, least: float, flip: bool) -> Tensor:
    """A random resized crop (area least..1, aspect 3/4..4/3; whole at 1) and flip of each image, keyed by its id. Shape kept."""
    draw = lambda what: keyed.uniform(keyed.key(seed, what), ids_B).to(images.device)
    area, aspect = least + (1 - least) * draw("area"), ((least < 1) * math.log(4 / 3) * (2 * draw("aspect") - 1)).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    x, y = (1 - width) * (2 * draw("x") - 1), (1 - height) * (2 * draw("y") - 1)
    mirrored = torch.where(draw("flip") < 0.5, -1.0, 1.0) if flip else torch.ones_like(width)
    zero = torch.zeros_like(width)
    theta = torch.stack([torch.stack([width * mirrored, zero, x], 1), torch.stack([zero, height, y], 1)], 1).float()
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def shifted(images: Tensor, seed: int, ids_B: Tensor, jitter: int) -> Tensor:
    """A cyclic shift by up to `jitter` pixels, one for the whole batch (keyed by its first id)."""
    if jitter == 0:
        return images
    dy, dx = (
        int(keyed.uniform(keyed.key(seed, axis), ids_B[:1]).item() * (2 * jitter + 1)) - jitter for axis in ("dy", "dx")
    )
    return images.roll((dy, dx), (2, 3))


def cutmix(images: Tensor, seed: int, ids_B: Tensor) -> Tensor:
    """One box of area 1 - lambda, lambda ~ U(0, 1), filled from the reversed batch (Beta(1, 1); keyed by the first id)."""
    cut, cy, cx = (keyed.uniform(keyed.key(seed, what), ids_B[:1]).item() for what in ("lambda", "y", "x"))
    height, width = images.shape[2:]
    h, w = round(height * math.sqrt(cut)), round(width * math.sqrt(cut))
    top, left = int(cy * (height + 1)) - h // 2, int(cx * (width + 1)) - w // 2
    box = (slice(None), slice(None), slice(max(top, 0), top + h), slice(max(left, 0), left + w))
    mixed = images.clone()
    mixed[box] = images.flip(0)[box]
    return mixed


class Recovery(Objective):
    """The synthetic images of one slice are the player. couples: BatchNorm statistics are those of the slice."""

    couples = "batch"

    def __init__(
        self, start: Tensor, members: Sequence[Any], weights: Sequence[float], config: CVDD, seed: int
    ) -> None:
        super().__init__()
        self.images = nn.ParameterList([nn.Parameter(start.clone())])  # one image of every class, in the classes' order
        self._members, self.weights, self.config, self.seed = tuple(members), weights, config, seed

    @property
    def players(self) -> dict[str, Player]:
        return {"images": Player([self.images], self.config.pixels)}

    def loss(self, player: str, batch: Batch, step: int) -> Loss:
        classes = torch.arange(len(self.images[0]), device=self.images[0].device)
        seed = keyed.key(self.seed, "recover", step)
        x = shifted(
            cropped(self.images[0], seed, classes, self.config.crop, self.config.flip),
            seed,
            classes,
            self.config.jitter,
        )
        ce, bn = torch.zeros((), device=x.device), torch.zeros((), device=x.device)
        for member, weight in zip(self._members, self.weights):
            with tap_batchnorm(member) as layers:
                ce = ce + weight * F.cross_entropy(member(x), classes)
            for i, layer in enumerate(layers.values()):
                gap = (layer.mean_C - layer.running_mean_C).norm() + (
                    layer.variance_C - layer.running_variance_C
                ).norm()
                bn = bn + weight * (self.config.first_bn if i == 0 else 1.0) * gap
        one = torch.ones((), device=x.device)
        return Loss({"ce": Term(ce, one, unit="slice"), "bn": Term(bn, one, self.config.bn_weight, unit="slice")})

    @torch.no_grad()
    def after_step(self, player: str, step: int) -> None:
        self.images[0].clamp_(-1, 1)


@dataclass
class SoftBatch(ImageBatch):
    soft_BV: Tensor | None = None


@dataclass
class Relabelled:
    """The distilled set as the student sees it: every epoch's images, replayed by key, with their stored labels.

    labels: [epochs * N, V] in the order of training, or None while they are being made.
    """

    images: Tensor
    classes: Tensor
    config: CVDD
    seed: int
    labels: Tensor | None = None
    order: dict[int, int] | None = None  # sample id -> row of labels

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: Tensor, epoch: int | Tensor = 0) -> SoftBatch:
        ids = sample_ids(rows, epoch, len(self))
        x = cropped(self.images[rows], keyed.key(self.seed, "replay"), ids, self.config.crop, self.config.flip)
        if self.config.cutmix:
            x = cutmix(x, keyed.key(self.seed, "cutmix"), ids)
        soft = None
        if self.labels is not None and self.order is not None:
            soft = self.labels[[self.order[i] for i in ids.tolist()]].float()
        return SoftBatch(ids, x, self.classes[rows], soft_BV=soft)


class StoredLabels:
    """A teacher that reads what the committee said."""

    name: str = "the committee's stored labels"
    gives: frozenset[type[Signal]] = frozenset({FullLogits})

    def score(self, batch: Batch, need: type[Signal]) -> Signal:
        assert isinstance(batch, SoftBatch) and batch.soft_BV is not None
        return FullLogits(batch.soft_BV)


@torch.no_grad()
def relabel(
    data: Relabelled, members: Sequence[Any], weights: Sequence[float], batch: int, stage: str
) -> dict[str, Tensor]:
    """Committee logits [E * N, V] (fp16) of every image of every epoch, in the student's own (micro-)batches: what is
    mixed by CutMix, and under `bssl` normalised, together here is so when the student trains."""
    size, total = len(data), data.config.epochs * len(data)
    device = next(members[0].parameters()).device
    soft, ids = [], []
    for start in range(0, total - total % batch, batch):
        here = data.batch(*data_order(data.seed, stage, size, torch.arange(start, start + batch)))
        soft.append(committee_logits(here.images.to(device), members, weights, data.config.bssl).cpu())
        ids.append(here.ids_B)
    return {"labels": torch.cat(soft).half(), "ids": torch.cat(ids)}


def committee_logits(x: Tensor, members: Sequence[Any], weights: Sequence[float], bssl: bool) -> Tensor:
    """sum_j w'_j f_j(x), with batch statistics under bssl. The members are left as they were."""
    total = torch.zeros((), device=x.device)
    for member, weight in zip(members, weights):
        if bssl:
            with batch_statistics(member):
                total = total + weight * member(x)
        else:
            total = total + weight * member(x)
    return total


@torch.no_grad()
def starting_images(run: Run, members: Sequence[Any], slice_: int, config: CVDD, seed: int) -> Tensor:
    """One image of every class to begin with. [V, C, H, W]"""
    data, classes = run.source.train, run.source.context["classes"]
    shape = data.images.shape[1:]
    if config.init == "noise":
        return keyed.normal_like(
            keyed.key(seed, "noise", slice_), torch.arange(classes), torch.empty(classes, *shape)
        ).clamp(-1, 1)
    tiles, candidates = (1, 1) if config.init == "real" else (2, 8)
    out = []
    for c in range(classes):
        rows = (data.labels == c).nonzero()[:, 0]
        pick = keyed.uniform(keyed.key(seed, "patch", slice_, c), torch.arange(candidates * tiles**2))
        chosen = data.images[rows[(pick * len(rows)).long()]].view(candidates, tiles**2, *shape)
        small = (
            F.interpolate(chosen.flatten(0, 1), scale_factor=1 / tiles, mode="area")
            if tiles > 1
            else chosen.flatten(0, 1)
        )
        small = small.view(candidates, tiles, tiles, *small.shape[1:])
        mosaic = torch.cat([torch.cat(list(small[:, r].unbind(1)), 3) for r in range(tiles)], 2)
        mosaic = F.interpolate(mosaic, shape[1:], mode="bilinear") if mosaic.shape[2:] != shape[1:] else mosaic
        loss = sum(
            F.cross_entropy(m(mosaic.to(run.device)), torch.full((candidates,), c, device=run.device), reduction="none")
            for m in members
        )
        out.append(mosaic[int(torch.as_tensor(loss).argsort()[candidates // 2])])
    return torch.stack(out)


def distil(run: Run, members: Sequence[Any], priors: Sequence[float], config: CVDD, name: str) -> Tensor:
    """Recover all slices. [IPC * V, C, H, W], slice by slice."""
    slices = []
    for i in range(config.images_per_class):
        chosen = voters_of(i, priors, config, run.seed)
        if config.voting == "prior":
            weights = votes([priors[j] for j in chosen], config.recover_temperature)
        else:
            draw = keyed.uniform(keyed.key(run.seed, "votes", i), torch.arange(len(chosen)))
            weights = (draw / draw.sum()).tolist() if config.voting == "random" else [1 / len(chosen)] * len(chosen)
        voting = [members[j] for j in chosen]
        start = starting_images(run, voting, i, config, run.seed).to(run.device)
        objective = Recovery(start, voting, weights, config, keyed.key(run.seed, name, i))
        if config.recover_steps:
            rows = run.source.train
            run.fit(
                objective,
                rows,
                stage=f"{name}-{i}",
                steps=config.recover_steps,
                batch=1,
                micro_batch=None,
                evaluate_every=None,
            )
        slices.append(objective.images[0].detach())
    return torch.cat(slices)


def student_on(
    run: Run, images: Tensor, members: Sequence[Any], priors: Sequence[float], config: CVDD, name: str
) -> tuple[Any, dict[str, Tensor]]:
    """Relabel distilled images and train a fresh student on them alone."""
    classes = torch.arange(run.source.context["classes"]).repeat(config.images_per_class)
    data = Relabelled(images.cpu(), classes, config, run.seed)
    using = members if config.label_members == "all" else members[:1]
    weights = votes(priors[: len(using)], config.relabel_temperature)
    stage, piece = f"{name}-student", run.train.micro_batch or run.train.batch
    stored = run.stage(f"{name}-labels", relabel, data, using, weights, piece, stage)
    data.labels, data.order = stored["labels"], {i: n for n, i in enumerate(stored["ids"].tolist())}
    spec = run.spec("student")
    assert isinstance(spec, ModelSpec)
    student = run.fresh("image_classifier", spec, "student")
    kd = KD(config.temperature, temperature_squared=False)
    objective = LogitDistillation(
        student, StoredLabels(), kd, optimizer=run.train.optimizer_spec(), cross_entropy=0.0, distillation=1.0
    )
    run.fit(objective, data, stage=stage, steps=max(1, config.epochs * len(data) // run.train.batch))
    return student, stored


def measured_priors(run: Run, members: Sequence[Any], config: CVDD) -> list[float]:
    """a_j in percent: what a student reaches on the data that member j alone distils and labels."""
    priors = []
    for j, member in enumerate(members):
        alone = config.model_copy(
            update={"recover_steps": config.prior_steps, "voters": 1, "epochs": max(1, config.epochs // 3)}
        )
        images = distil(run, [member], [0.0], alone, f"prior-{j}")
        student, _ = student_on(run, images, [member], [0.0], alone, f"prior-{j}")
        priors.append(100 * run.stage(f"prior-{j}", evaluate_classifier, student, run.source.test)["accuracy"])
    return priors


@method("cv_dd", student="image_classifier", committee=Role("image_classifier", many=True), data="images")
def cv_dd(run: Run, config: CVDD) -> Result:
    members = [freeze(m) for m in run.models("committee")]
    if config.priors is not None and len(config.priors) != len(members):
        raise RecipeError(
            f"method.priors has {len(config.priors)} entries for a committee of {len(members)}. Give one a member."
        )
    if config.priors is not None:
        priors = config.priors
    else:
        priors = (
            measured_priors(run, members, config)
            if len(members) > 1 and config.voting == "prior"
            else [0.0] * len(members)
        )
    images = distil(run, members, priors, config, "recover")
    student, stored = student_on(run, images, members, priors, config, "distil")
    metrics = evaluate_classifier(student, run.source.test)
    classes = run.source.context["classes"]
    if run.accelerator.is_main_process:
        folder = run.folder / "distilled"
        with whole_folder(folder) as part:
            labels = torch.arange(classes).repeat(config.images_per_class)
            save_tensors(
                part / "images.safetensors",
                {"images": images.cpu(), "labels": labels, **{f"soft_{k}": v for k, v in stored.items()}},
            )
            write_json(
                part / "README.json",
                {
                    "images": "[N, C, H, W] in [-1, 1]",
                    "labels": "class of each",
                    "soft_labels": "committee logits by epoch, in training order",
                },
            )
        picture = run.folder / "records" / "distilled.png"
        save_grid(images[: 10 * classes].cpu(), picture, columns=classes)
        run.record(
            "2-images",
            "images",
            "Distilled images, one slice a row",
            files=[{"path": "records/distilled.png", "caption": "a column a class"}],
        )
    table = [
        [f"member {j}: {m.name}", evaluate_classifier(m, run.source.test)["accuracy"], priors[j]]
        for j, m in enumerate(members)
    ]
    run.record(
        "1-committee",
        "table",
        "The committee and the student",
        columns=["model", "test accuracy", "prior (%)"],
        rows=[*table, ["student on distilled data alone", metrics["accuracy"], ""]],
    )
    stored_bytes = images.numel() * images.element_size()
    return Result(
        student,
        {**metrics, "images": len(images), "bytes": stored_bytes},
        {"distilled": Path(run.folder) / "distilled"},
    )

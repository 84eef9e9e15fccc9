"""Terms of a classifier's loss on what flows inside it: hints, relations of the batch, and exits.

A term names the stages that it reads of student and teacher and may own parameters, which ride with the student's player,
are saved and resumed with it, and are never exported. B samples, C H W maps, T tokens, D features, V classes.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from potstill.contracts.errors import ModelError, RecipeError
from potstill.divergences import relation_angles, relation_distances, similarity_preserving
from potstill.models.taps import Taps, batch_statistics, tap
from potstill.objectives.blocks import Projector

CONTAINERS = ("stages", "layers", "layer", "blocks")  # what networks call the list of their stages
DEPTHS = (2, 4, 10, 12)  # of 12 blocks: after which a network without stages is read, like a Swin of depths 2, 2, 6, 2


@dataclass(frozen=True)
class Stage:
    """A place where a network's features are read: what leaves a module of its adapter, or what enters it.

    shape: of one sample. index, of: the stage's number, from 1, and how many there are.
    """

    layer: str
    shape: tuple[int, ...]
    index: int = 1
    of: int = 1
    entering: bool = False

    @property
    def kind(self) -> Literal["vector", "tokens", "map"]:
        """[D], [T, D] or [C, H, W]."""
        kinds: dict[int, Literal["vector", "tokens", "map"]] = {1: "vector", 2: "tokens", 3: "map"}
        if len(self.shape) not in kinds:
            raise ModelError(
                f"{self.layer} passes {list(self.shape)} a sample: no vector [D], tokens [T, D] or map [C, H, W]. Name "
                f"another layer."
            )
        return kinds[len(self.shape)]

    @property
    def width(self) -> int:
        return self.shape[0] if self.kind == "map" else self.shape[-1]

    @property
    def grid(self) -> int:
        """The side of the square of patches that the tokens are."""
        return math.isqrt(self.shape[0])

    @property
    def class_tokens(self) -> int:
        """How many tokens stand before the patches."""
        left = self.shape[0] - self.grid**2
        if left > 2:
            raise ModelError(
                f"{self.layer} has {self.shape[0]} tokens: no square of patches with up to two class tokens before it. "
                f"Use square images."
            )
        return left


class FeaturesAt:
    """The features of a forward pass, by stage."""

    def __init__(self, taps: Taps) -> None:
        self.taps = taps

    def of(self, stages: Sequence[Stage]) -> list[Tensor]:
        return [(self.taps.inputs if s.entering else self.taps.outputs)[s.layer] for s in stages]


@contextmanager
def features_at(model: Any, stages: Sequence[Stage]) -> Iterator[FeaturesAt]:
    """`with features_at(model, stages) as seen: model(x)`, then `seen.of(stages)`. Without stages no model is needed."""
    if not stages:
        yield FeaturesAt(Taps())
        return
    names = [{s.layer for s in stages if s.entering == entering} for entering in (False, True)]
    with tap(model, *names) as taps:
        yield FeaturesAt(taps)


def stage_at(model: nn.Module, images: Tensor, layer: str, entering: bool = False) -> Stage:
    """The stage at a module, its shape told by a few images; the model is left as it was."""
    stage = Stage(layer, (), entering=entering)
    with torch.no_grad(), batch_statistics(model), features_at(model, [stage]) as seen:
        model(images)
    return Stage(layer, tuple(seen.of([stage])[0].shape[1:]), entering=entering)


def penultimate(model: Any, images: Tensor) -> Stage:
    """What enters the linear layer that makes the logits."""
    return stage_at(model, images, model.head_name, entering=True)


def stages_of(model: nn.Module, images: Tensor, layers: Sequence[str] | None = None, most: int = 4) -> list[Stage]:
    """The stages of a network: the named layers, or those that it has, at most `most`.

    A longer list of blocks is read after the 2nd, 4th, 10th and 12th of every 12. Where a stage ends with a down-sampling
    of its own (Swin), it is read before that.
    """
    if layers is None:
        layers = _found(model, most)
    read = [stage_at(model, images, name) for name in layers]
    return [Stage(s.layer, s.shape, i, len(read)) for i, s in enumerate(read, 1)]


def _found(model: nn.Module, most: int) -> list[str]:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and name.rpartition(".")[2] in CONTAINERS and len(module):
            places = list(range(len(module)))
            if len(module) > most:
                places = sorted({max(0, math.ceil(len(module) * d / 12) - 1) for d in DEPTHS[-most:]})
            stages: list[Any] = [(f"{name}.{i}", module[i]) for i in places]
            return [
                f"{at}.blocks.{len(stage.blocks) - 1}" if getattr(stage, "downsample", None) is not None else at
                for at, stage in stages
            ]
    raise ModelError(
        f"{getattr(model, 'name', type(model).__name__)} has no list of stages ({', '.join(CONTAINERS)}). Name the layers."
    )


# ---------------------------------------------------------------- terms


@dataclass(frozen=True)
class Scored:
    """What a term may look at beside the features."""

    student_logits_BV: Tensor
    teacher_logits_BV: Tensor  # without gradient
    labels_B: Tensor


class FeatureTerm(nn.Module):
    """Base: one value a sample from the features at the term's stages, in their order."""

    name: ClassVar[str] = "features"
    couples: ClassVar[Literal["position", "batch"]] = "position"

    def __init__(
        self, student_stages: Sequence[Stage], teacher_stages: Sequence[Stage] = (), coefficient: float = 1.0
    ) -> None:
        super().__init__()
        self.student_stages, self.teacher_stages = tuple(student_stages), tuple(teacher_stages)
        self.coefficient = coefficient

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], scored: Scored) -> Tensor:
        """[B]. The teacher's features have no gradient."""
        raise NotImplementedError


class Hint(FeatureTerm):
    """Mean squared error between a student's layer, projected, and a teacher's (FitNets, arXiv 1412.6550).

    Made on a few images, which tell the shapes. Layers are module names of the two adapters.
    """

    name = "hint"

    def __init__(
        self,
        student: Any,
        teacher: Any,
        images: Tensor,
        student_layer: str,
        teacher_layer: str,
        coefficient: float = 1.0,
    ) -> None:
        mine, theirs = stage_at(student, images, student_layer), stage_at(teacher.model, images, teacher_layer)
        super().__init__([mine], [theirs], coefficient)
        self.projector = Projector((len(images), *mine.shape), (len(images), *theirs.shape))

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], scored: Scored) -> Tensor:
        return (self.projector(student[0]) - teacher[0].detach()).square().flatten(1).mean(1)


RELATIONS: dict[str, Callable[..., Tensor]] = {
    "distance": relation_distances,
    "angle": relation_angles,
    "similarity": similarity_preserving,
}


class Relations(FeatureTerm):
    """How the samples of a batch lie to one another, in the penultimate features of both: no projector is needed.

    kind: "distance" and "angle" (RKD, arXiv 1904.05068), or "similarity" (arXiv 1907.09682). Couples the batch.
    """

    couples = "batch"

    def __init__(
        self,
        student: Any,
        teacher: Any,
        images: Tensor,
        kind: Literal["distance", "angle", "similarity"],
        coefficient: float = 1.0,
    ) -> None:
        if kind not in RELATIONS:
            raise RecipeError(f"Relations.kind must be one of {', '.join(RELATIONS)}, got {kind!r}.")
        super().__init__([penultimate(student, images)], [penultimate(teacher.model, images)], coefficient)
        self.name, self.relation = kind, RELATIONS[kind]  # type: ignore[misc]

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], scored: Scored) -> Tensor:
        return self.relation(teacher=teacher[0].detach(), student=student[0])


class Exits(FeatureTerm):
    """Exit branches on a student's stages: each projects its stage to logits, which learn from the teacher's last logits.

    branches: from a stage's features to logits [B, V] (`exit_branch`). losses: one a stage, (exit logits, teacher logits,
    labels) -> named parts [B]. The value is their sum over stages. The student is exported without them.
    """

    name = "exits"

    def __init__(
        self,
        stages: Sequence[Stage],
        branches: Sequence[nn.Module],
        losses: Sequence[Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]],
        coefficient: float = 1.0,
    ) -> None:
        if not len(stages) == len(branches) == len(losses) > 0:
            raise RecipeError(
                f"Exits need one branch and one loss a stage, got {len(stages)} stages, {len(branches)} branches and "
                f"{len(losses)} losses."
            )
        super().__init__(stages, (), coefficient)
        self.branches, self.losses = nn.ModuleList(branches), tuple(losses)

    def logits(self, student: Sequence[Tensor]) -> list[Tensor]:
        """Every exit's logits [B, V]."""
        return [branch(x) for branch, x in zip(self.branches, student, strict=True)]

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], scored: Scored) -> Tensor:
        parts = [
            value
            for loss, logits in zip(self.losses, self.logits(student))
            for value in loss(logits, scored.teacher_logits_BV, scored.labels_B).values()
        ]
        return torch.stack(parts).sum(0)


# ---------------------------------------------------------------- exit branches


def exit_branch(stage: Stage, width: int, classes: int, heads: int = 4) -> nn.Module:
    """A projector from a stage's features to logits, as OFA's code has them (arXiv 2310.19444). `width`: of its last features.

    Maps: one separable convolution for each stage that follows, each halving the side, else a 1x1 convolution; then the
    mean and a linear layer. Tokens: patches merged down to about 7 x 7, a transformer block for each stage that follows (at
    least one), then the class token, or the mean. Vectors, which the paper has not: one hidden layer.
    """
    make = {"map": _map_exit, "tokens": TokenExit, "vector": _vector_exit}[stage.kind]
    branch = make(stage, width, classes, heads)  # type: ignore[operator]
    return branch.apply(_start)


def _start(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _map_exit(stage: Stage, width: int, classes: int, heads: int) -> nn.Module:
    channels, layers, halvings = stage.width, [], stage.of - stage.index
    for i in range(halvings):
        out = width if i == halvings - 1 else 2 * channels
        layers += _separable(channels, channels, 2) + _separable(channels, out, 1)
        channels = out
    if not halvings:
        layers = [nn.Conv2d(channels, width, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def _separable(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    depthwise = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
    return [depthwise, nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def _vector_exit(stage: Stage, width: int, classes: int, heads: int) -> nn.Module:
    return nn.Sequential(nn.Linear(stage.width, width), nn.ReLU(), nn.Linear(width, classes))


class _PatchMerging(nn.Module):
    """Neighbouring 2 x 2 patches as one: [B, T, D] -> [B, T / 4, outputs]. An odd side is padded with zeros."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm, self.map = nn.LayerNorm(4 * inputs), nn.Linear(4 * inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        side = math.isqrt(x.shape[1])
        square = F.pad(x.unflatten(1, (side, side)), (0, 0, 0, side % 2, 0, side % 2))
        corners = [square[:, row::2, column::2] for row in (0, 1) for column in (0, 1)]
        return F.gelu(self.map(self.norm(torch.cat(corners, -1).flatten(1, 2))))


class TokenExit(nn.Module):
    """Tokens [B, T, D] -> logits [B, V]; class tokens go round the merging."""

    def __init__(self, stage: Stage, width: int, classes: int, heads: int = 4) -> None:
        super().__init__()
        self.before = stage.class_tokens
        merges = max(0, math.floor(math.log2(stage.grid / 7))) if stage.grid else 0
        carried = lambda: nn.Linear(stage.width, width) if stage.width != width else nn.Identity()
        self.carry = carried() if self.before else nn.Identity()
        sizes = [stage.width] + [width] * merges
        merging = [_PatchMerging(a, b) for a, b in itertools.pairwise(sizes)]
        self.merge = nn.Sequential(*merging) if merging else carried()
        heads = next(h for h in range(min(heads, width), 0, -1) if width % h == 0)
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
                )
                for _ in range(max(stage.of - stage.index, 1))
            )
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.merge(x[:, self.before :])
        x = self.blocks(torch.cat([self.carry(x[:, : self.before]), patches], 1) if self.before else patches)
        return self.head(x[:, 0] if self.before else x.mean(1))

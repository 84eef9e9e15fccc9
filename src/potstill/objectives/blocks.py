"""Parameters that a loss owns: projectors between feature spaces and discriminator heads on features.

They ride with a player (`Player([student, projector], ...)`), are saved and resumed, and never exported.
B batch, T tokens, C H W feature maps, D features, L logits of one sample.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d
from torch.nn.utils.parametrizations import spectral_norm

from potstill.contracts.errors import ModelError


class Projector(nn.Module):
    """Student features into the teacher's space: a linear map over D, or a 1x1 convolution over C.

    student, teacher: the shapes of one tapped batch of each, [B, C, H, W] or [B, ..., D]. Where the student's map is
    larger it is averaged down to the teacher's H x W; where it is smaller, the teacher's features have to be.
    Raises ModelError for a pair of other ranks.
    """

    def __init__(self, student: Sequence[int], teacher: Sequence[int]) -> None:
        super().__init__()
        maps = len(student) == 4
        if len(student) != len(teacher) or len(student) < 2:
            raise ModelError(
                f"A projector needs features of one rank, got student {list(student)} and teacher {list(teacher)}. Tap "
                f"two maps [B, C, H, W], two token sequences [B, T, D], or two vectors [B, D]."
            )
        if maps and (student[2] < teacher[2] or student[3] < teacher[3]):
            raise ModelError(
                f"The student's map {list(student)} is smaller than the teacher's {list(teacher)}: tap an earlier "
                f"stage of the student or a later one of the teacher."
            )
        if not maps and tuple(student[1:-1]) != tuple(teacher[1:-1]):
            raise ModelError(
                f"Student features {list(student)} and teacher features {list(teacher)} differ in positions."
            )
        self.size = (teacher[2], teacher[3]) if maps else None
        self.map = nn.Conv2d(student[1], teacher[1], 1) if maps else nn.Linear(student[-1], teacher[-1])

    def forward(self, features: Tensor) -> Tensor:
        if self.size is not None and tuple(features.shape[2:]) != self.size:
            features = adaptive_avg_pool2d(features, self.size)  # before the map, with which it commutes: cheaper
        return self.map(features)


class ConvHead(nn.Module):
    """Discriminator head on a feature map: strided 4x4 convolutions down to at most 4x4, then one logit a position.

    [B, C, H, W] -> [B, L]. Group norm, so that no sample of the batch sees another.
    """

    def __init__(self, channels: int, size: int, width: int | None = None) -> None:
        super().__init__()
        width = width or channels
        layers: list[nn.Module] = []
        while size > 4:
            layers += [nn.Conv2d(channels, width, 4, 2, 1), nn.GroupNorm(max(width // 8, 1), width), nn.SiLU()]
            channels, size = width, size // 2
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features).flatten(1)


class PooledHead(nn.Module):
    """Discriminator head on features averaged over their positions. [B, C, H, W], [B, T, D] or [B, D] -> [B, 1]."""

    def __init__(self, channels: int, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, features: Tensor) -> Tensor:
        if features.dim() == 4:
            features = features.mean((-2, -1))
        elif features.dim() == 3:
            features = features.mean(1)
        return self.layers(features)


class TokenHead(nn.Module):
    """Discriminator head on every token of a trunk, spectrally normalised. [..., D] -> [...].

    Linear(D, D), SiLU, Linear(D, 1), both with spectral norm (DiDi-Instruct, arXiv 2509.25035).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            spectral_norm(nn.Linear(width, width)), nn.SiLU(), spectral_norm(nn.Linear(width, 1))
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layers(hidden)[..., 0]


class Heads(nn.Module):
    """One head a tapped layer; all their logits side by side. {name: features} -> [B, L].

    heads: by the tapped module's name. The density ratio of a sample is exp of the mean over L.
    """

    def __init__(self, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.names = list(heads)  # module names hold dots, which a ModuleDict refuses
        self.heads = nn.ModuleList(heads.values())

    @staticmethod
    def on(features: Mapping[str, Tensor], pooled: bool = False, width: int | None = None) -> "Heads":
        """Heads that fit a sample of the tapped features: convolutional on maps, pooled on tokens and vectors."""
        made: dict[str, nn.Module] = {}
        for name, x in features.items():
            if x.dim() == 4 and not pooled:
                made[name] = ConvHead(x.shape[1], min(x.shape[2:]), width)
            else:
                made[name] = PooledHead(x.shape[1] if x.dim() == 4 else x.shape[-1], width or 64)
        return Heads(made)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([head(features[name]) for name, head in zip(self.names, self.heads)], dim=1)

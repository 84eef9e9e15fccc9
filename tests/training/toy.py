"""A two-player objective small enough to reason about: a line and a critic that pulls on it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from potstill.contracts import keyed
from potstill.contracts.batch import PointBatch
from potstill.contracts.players import Every, Objective, OptimizerSpec, Player
from potstill.contracts.terms import Loss, Term
from potstill.models.ema import EMA
from potstill.tasks.base import sample_ids


@dataclass
class Points:
    """y = 2 x - 1 with uneven numbers of counted entries a row, so that a mean of means would be wrong."""

    size: int = 24

    def __len__(self) -> int:
        return self.size

    def batch(self, rows: Tensor, epoch: int | Tensor = 0) -> PointBatch:
        x = torch.linspace(-1, 1, self.size)[rows]
        return PointBatch(sample_ids(rows, epoch, self.size), torch.stack([x, 2 * x - 1, (rows % 5).float()], 1))


class Toy(Objective):
    def __init__(self, dropout: float = 0.0, optimizer: OptimizerSpec = OptimizerSpec(lr=0.05), every: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line, self.critic = nn.Linear(1, 1), nn.Linear(1, 1)
        self.dropout = nn.Dropout(dropout)
        self.average = EMA(self.line, 0.9)
        self.register_buffer("seen", torch.zeros(()))
        self.optimizer, self.every = optimizer, every
        self.moves: list[tuple[str, int]] = []

    @property
    def players(self) -> dict[str, Player]:
        return {
            "critic": Player([self.critic], self.optimizer, ascend=True),
            "line": Player([self.line], self.optimizer, when=Every(self.every)),
        }

    def collect(self, batch: PointBatch, step: int) -> PointBatch:
        noise = keyed.normal_like(keyed.key("noise", step), batch.ids_B, batch.points_BD[:, :1])
        return PointBatch(batch.ids_B, torch.cat([batch.points_BD, noise], 1))

    def loss(self, player: str, batch: PointBatch, step: int) -> Loss:
        x, y, n, noise = batch.points_BD.split(1, dim=1)
        error = (self.line(self.dropout(x)) - y) ** 2
        counted = torch.arange(5) <= n  # 1 to 5 counted columns a row
        gap = self.critic(error + 0.1 * noise)
        if player == "critic":
            return Loss({"gap": Term.over((gap - 0.1 * gap**2)[:, 0])})
        return Loss(
            {
                "fit": Term.over(error.expand(-1, 5), counted, unit="column"),
                "critic": Term.over(gap[:, 0], None, 0.1, unit="row"),
            },
            {"noise": Term.over(noise)},
        )

    def after_step(self, player: str, step: int) -> None:
        self.moves.append((player, step))
        if player == "line":
            self.average.update(self.line)
            self.seen += 1

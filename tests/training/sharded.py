"""What `test_sharding` trains, in one process or in two: `torchrun sharded.py FOLDER`, where FOLDER holds tiny models."""

import copy
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from potstill.contracts.batch import Batch, PromptBatch, TokenBatch
from potstill.contracts.errors import RecipeError
from potstill.contracts.files import save_tensors, write_json
from potstill.contracts.players import Objective, OptimizerSpec, Player
from potstill.contracts.terms import Loss, Term
from potstill.divergences import ForwardKL, JensenShannon
from potstill.models.causal import CausalLM
from potstill.models.spec import LoraSpec
from potstill.objectives.tokens import RolloutSpec, TokenDistillation
from potstill.teachers import EMATeacher, LocalTeacher
from potstill.training.spec import TrainSpec
from potstill.training.trainer import Trainer

ADAM = OptimizerSpec(lr=3e-3, weight_decay=0.1, eps=1e-4, clip=0.05)  # every norm is above the clip


@dataclass
class Texts:
    """Token rows of uneven length and counts."""

    size: int = 16

    def __len__(self) -> int:
        return self.size

    def batch(self, rows: Tensor, epoch: int | Tensor = 0) -> TokenBatch:
        tokens_BT = torch.randint(3, 60, (self.size, 9), generator=torch.Generator().manual_seed(7))[rows]
        attention_BT = torch.arange(9) < 4 + rows[:, None] % 6
        counted_BT = attention_BT & (torch.arange(9) >= 1 + rows[:, None] % 3)
        return TokenBatch(rows + self.size * epoch, tokens_BT, attention_BT, counted_BT)


class Prompts(Texts):
    def batch(self, rows: Tensor, epoch: int | Tensor = 0) -> PromptBatch:
        texts = super().batch(rows, epoch)
        return PromptBatch(texts.ids_B, texts.tokens_BT[:, :3], texts.attention_BT[:, :3])


class Watched(TokenDistillation):
    """Notes the share of the weights that a process holds when a loss begins, and how long the rollouts are."""

    def collect(self, batch: Batch, step: int) -> TokenBatch:
        assert type(self.student) is CausalLM and not any(isinstance(p, DTensor) for p in self.student.parameters())
        out = super().collect(batch, step)
        self.__dict__.setdefault("lengths", []).append(out.tokens_BT.shape[1])
        return out

    def loss(self, player: str, batch: Batch, step: int) -> Loss:
        weights = list(self.student.parameters())
        held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in weights)
        self.__dict__.setdefault("shares", []).append(held / sum(p.numel() for p in weights))
        return super().loss(player, batch, step)


class TwoCounts(TokenDistillation):
    def loss(self, player: str, batch: Batch, step: int) -> Loss:
        loss = super().loss(player, batch, step)
        rows = Term(loss.terms["divergence"].total * 0.5, torch.tensor(float(len(batch))), unit="row")
        return Loss({**loss.terms, "rows": rows})


class Seesaw(Objective):
    """Two language models: a critic learns to score the student's words low, the student to please it."""

    def __init__(self, student: CausalLM, critic: CausalLM) -> None:
        super().__init__()
        self.student, self.critic, self.scale = student, critic, nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.scale.weight)

    @property
    def players(self) -> dict[str, Player]:
        sgd = OptimizerSpec(optimizer="sgd", lr=0.1, clip=0.05)
        return {
            "critic": Player([self.critic, self.scale], sgd, ascend=True),
            "student": Player([self.student], ADAM),
        }

    def loss(self, player: str, batch: TokenBatch, step: int) -> Loss:
        said = lambda model: model.head(model.hidden(batch.tokens_BT, batch.attention_BT)).log_softmax(-1)
        log_q, log_c = said(self.student), said(self.critic)
        gap = ((log_q.exp() * (log_q - log_c)).sum(-1) * batch.counted_BT).sum()
        return Loss({"gap": Term(self.scale(gap[None]).sum(), batch.counted_BT.sum().float())})


class Clamped(Seesaw):
    def after_step(self, player: str, step: int) -> None:
        with torch.no_grad():  # weights are whole here, and what is done to them stays
            self.student.network.get_output_embeddings().weight.clamp_(-0.6, 0.6)


def objective(case: str, models: Path) -> Objective:
    student = CausalLM.from_pretrained(models / ("tied" if case in ("rollouts", "moving") else "untied"))
    larger = CausalLM.from_pretrained(models / "teacher")
    teacher, known = LocalTeacher(larger), {"optimizer": ADAM, "seed": 3}
    match case:
        case "text" | "low":
            return Watched(student, teacher, cross_entropy=0.3, **known)
        case "recomputed":
            return Watched(student.checkpoint_activations(), teacher, cross_entropy=0.3, **known)
        case "rollouts":
            student.network.generation_config.eos_token_id = list(range(10, 30))  # so that texts end early
            return Watched(student, teacher, JensenShannon(0.3), rollouts=RolloutSpec(max_new_tokens=8), **known)
        case "moving":
            known["optimizer"] = ADAM.model_copy(update={"optimizer": "radam"})
            return Watched(student, EMATeacher(student, 0.5), ForwardKL(), cross_entropy=1.0, ema=0.7, **known)
        case "lora":  # one row, and none left for the second process
            return Watched(student.with_lora(LoraSpec(r=1)), teacher, **known)
        case "seesaw":
            return Clamped(student, larger.requires_grad_(True))
        case "low seesaw":
            return Seesaw(student, larger.requires_grad_(True))
        case "counts":
            return TwoCounts(student, teacher, **known)
        case "elsewhere":  # a weight with a second owner
            made = TokenDistillation(student, teacher, **known)
            made.second = nn.Linear(2, 2)
            made.second.weight = next(student.parameters())
            return made
        case _:  # nothing to split
            made = Seesaw(student, larger)
            made.student = made.critic = nn.Linear(2, 2)
            return made


def train(case: str, models: Path, out: Path, **changes: object) -> Objective:
    """One run; `out` gets the weights at its end beside what a run leaves."""
    options = {"steps": 4, "batch": 8, "micro_batch": 8, "trackers": [], "device": "cpu", "checkpoint_every": 2}
    made = objective(case, models)
    asked: list[int] = []

    def evaluate(step: int) -> Mapping[str, float]:
        for _ in range(1 + trainer.rank):  # processes need not do the same
            asked.append(step)
            with torch.no_grad():
                made.student.hidden(torch.tensor([[3, 4, 5]]))
        return {"norm": next(made.student.parameters()).norm().item()}

    if case.startswith("low"):
        options["precision"] = "bf16"
    spec = TrainSpec(**options | {"evaluate_every": 2} | changes)
    trainer = Trainer(spec, out, evaluate=evaluate)
    trainer.fit(made, Prompts() if case == "rollouts" else Texts())
    seen = {"world": trainer.world, **{k: getattr(made, k, None) for k in ("shares", "lengths")}}
    write_json(out / f"seen-{trainer.rank}.json", seen)
    if trainer.rank == 0:
        save_tensors(out / "end.safetensors", made.state_dict())
    return made


def main(models: Path) -> None:
    """All runs of two processes, so that they are started once."""
    for case in ("text", "rollouts", "recomputed", "moving", "seesaw", "lora", "low", "low seesaw"):
        train(case, models, models / "two" / case, micro_batch=4, sharded=True)
    for case in ("text", "rollouts"):
        train(case, models, models / "cut" / case, micro_batch=2, sharded=True)
    made = train("text", models, models / "plain" / "text", micro_batch=4)
    train("text", models, models / "half" / "text", micro_batch=4, sharded=True, steps=2)
    train("text", models, models / "resumed" / "text", micro_batch=4, sharded=True)

    # After training the models are plain: one process may save or copy them alone, and they may be sharded again.
    made = train("text", models, models / "again" / "text", micro_batch=4, sharded=True, steps=2)
    if torch.distributed.get_rank() == 0:
        made.student.save(models / "saved")
        copy.deepcopy(made.student).hidden(torch.tensor([[3, 4, 5]]))
    spec = TrainSpec(steps=1, batch=8, trackers=[], device="cpu", sharded=True)
    Trainer(spec).fit(made, Texts())
    assert made.shares[-1] < 0.51, made.shares

    refusals = {}
    for case in ("counts", "elsewhere", "nothing"):
        try:
            train(case, models, models / "refused" / case, micro_batch=2, sharded=True)
        except RecipeError as error:
            refusals[case] = str(error)
    (models / f"refusals-{torch.distributed.get_rank()}.json").write_text(json.dumps(refusals))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""The loop. It knows players and terms, and no method.

One step: every micro-batch is collected once, then each player whose turn it is computes its loss over all of them,
divides every term by its count over micro-batches and ranks, and moves. With `train.sharded`, what players train is whole
on a process only while it computes (`training.sharding`).
"""

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from potstill.contracts import keyed
from potstill.contracts.batch import Batch
from potstill.contracts.errors import DataError, NonFiniteError, RecipeError
from potstill.contracts.players import Objective, Player
from potstill.contracts.terms import Loss, Term
from potstill.models.taps import batchnorm_coupled
from potstill.training.checkpoint import checkpoints, load_optimizers, load_weights, save_checkpoint
from potstill.training.launch import accelerator
from potstill.training.optimizers import learning_rate, make_optimizer
from potstill.training.sharding import Shards, clip_gradients, fused, own_rows, shard
from potstill.training.spec import TrainSpec
from potstill.training.tracking import Journal

CHECKPOINT_SECONDS = 60.0
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@lru_cache(maxsize=4)
def _epoch_order(seed: int, stage: str, size: int, epoch: int) -> Tensor:
    return keyed.permutation(keyed.key(seed, "order", stage, epoch), size)


def data_order(seed: int, stage: str, size: int, position: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, epochs) of the samples at these places of a stage's endless stream: each epoch a permutation of its own."""
    epoch = position // size
    rows = torch.empty_like(position)
    for e in epoch.unique().tolist():
        here = epoch == e
        rows[here] = _epoch_order(seed, stage, size, e)[position[here] % size]
    return rows, epoch


class Trainer:
    """Trains one objective on one dataset: a stage of a run.

    folder: the run folder (checkpoints go below it, by stage), or None to keep nothing.
    evaluate: called every `spec.evaluate_every` steps with the step; returns metrics to log.
    """

    def __init__(
        self,
        spec: TrainSpec,
        folder: Path | None = None,
        stage: str = "distil",
        evaluate: Callable[[int], Mapping[str, float]] | None = None,
    ) -> None:
        self.spec, self.folder, self.stage, self.evaluate = spec, folder, stage, evaluate
        self.accelerator = accelerator(spec, folder)
        self.device, self.world, self.rank = (
            self.accelerator.device,
            self.accelerator.num_processes,
            self.accelerator.process_index,
        )
        share, left = divmod(spec.batch, self.world)
        self.micro = spec.micro_batch or share
        if left or share % self.micro:
            raise RecipeError(
                f"train.batch {spec.batch} does not divide into micro-batches of {self.micro} on {self.world} processes. "
                f"Choose train.batch as a multiple of {self.micro * self.world}."
            )
        self.pieces = share // self.micro
        self.shards: Shards | None = None  # of the objective that is trained

    # ---------------------------------------------------------------- data

    def rows(self, size: int, step: int) -> list[tuple[Tensor, Tensor]]:
        """(rows, epochs) of this process's micro-batches at a step: a function of seed and step alone."""
        first = step * self.spec.batch + self.rank * self.pieces * self.micro
        position = torch.arange(first, first + self.pieces * self.micro)
        return [data_order(self.spec.seed, self.stage, size, piece) for piece in position.split(self.micro)]

    # ---------------------------------------------------------------- the loop

    def fit(self, objective: Objective, dataset: Any) -> None:
        """Train from the last checkpoint, or from the start; ends with a checkpoint of the last step."""
        if len(dataset) == 0:
            raise DataError(f"The data of stage {self.stage} is empty.")
        objective.to(self.device)
        self._check_coupling(objective)
        players = objective.players
        moves = {name: sum(player.when(s) for s in range(self.spec.steps)) for name, player in players.items()}
        journal = Journal(self.folder, writes=self.accelerator.is_main_process) if self.folder else None
        step, updates, spent = 0, dict.fromkeys(players, 0), 0.0
        found = checkpoints(self.folder / "checkpoints" / self.stage) if self.folder else []
        if found:
            state = load_weights(found[-1], objective)
            step, updates, spent = state["step"], state["updates"], state["seconds"]
            if journal and step < self.spec.steps:
                journal.cut(state["metrics"])
        elif journal:
            journal.forget(self.stage)
        self._same_start(objective)
        if step >= self.spec.steps or self._out_of_time(spent):
            return
        if self.spec.sharded and self.world > 1:
            self.shards = shard(objective, players, self.device, AUTOCAST.get(self.spec.precision))
        optimizers = {name: make_optimizer(player.optimizer, player.parameters()) for name, player in players.items()}
        for optimizer in optimizers.values() if self.shards else []:
            fused(optimizer)
        if found:
            load_optimizers(found[-1], optimizers, self.device)
        if self.accelerator.log_with:
            self.accelerator.init_trackers("logs")
        every = self.spec.checkpoint_every or max(1, self.spec.steps // 10)
        saved = time.monotonic()
        with _bar(self.stage, self.spec.steps, step, self.accelerator.is_main_process) as advance:
            while step < self.spec.steps:
                began = time.monotonic()
                objective.train()
                batches = []
                with self._whole():
                    for rows, epochs in self.rows(len(dataset), step):
                        batch = dataset.batch(rows, epochs).to(self.device)
                        self._seed("collect", step, batch)
                        with torch.no_grad(), self.accelerator.autocast():
                            batches.append(objective.collect(batch, step))
                values: dict[str, float] = {}
                for name, player in players.items():
                    if player.when(step):
                        rate = learning_rate(player.optimizer, updates[name], moves[name])
                        values |= self._update(objective, name, player, optimizers[name], batches, step, rate)
                        updates[name] += 1
                step += 1
                spent += time.monotonic() - began
                last = step == self.spec.steps or self._out_of_time(spent)
                if journal:
                    journal.clock(self.stage, step, time.monotonic() - began, self.spec.batch)
                if self.evaluate and self.spec.evaluate_every and step % self.spec.evaluate_every == 0:
                    objective.eval()
                    with self._whole():
                        values |= {f"eval/{k}": v for k, v in self.evaluate(step).items()}
                if step % self.spec.log_every == 0 or last:
                    if journal:
                        journal.write(self.stage, step, values)
                    if self.accelerator.log_with:
                        self.accelerator.log({f"{self.stage}/{k}": v for k, v in values.items()}, step=step)
                advance(values)
                seconds = time.monotonic() - saved
                seconds = self._first(seconds) if self.shards else seconds  # what is sharded is gathered by all
                due = step % every == 0 or last or seconds > CHECKPOINT_SECONDS
                main = self.accelerator.is_main_process
                if self.folder and journal and (main or self.shards) and due:
                    saved = time.monotonic()
                    state = {"updates": updates, "metrics": journal.position(), "seconds": spent}
                    place = self.folder / "checkpoints" / self.stage
                    save_checkpoint(place, step, objective, optimizers, state, self.spec.keep, writes=main)
                if last:
                    break
        if self.shards:
            self.shards.end()
            self.shards = None
        if self.accelerator.log_with:
            self.accelerator.end_training()
        self.accelerator.wait_for_everyone()

    def _out_of_time(self, spent: float) -> bool:
        """Whether the stage's time is up, by the first process's clock."""
        return self.spec.seconds is not None and self._first(spent) >= self.spec.seconds

    def _first(self, seconds: float) -> float:
        """What the first process's clock says."""
        if self.world == 1:
            return seconds
        clock = torch.tensor(seconds, device=self.device)
        torch.distributed.broadcast(clock, 0)
        return clock.item()

    def _whole(self) -> AbstractContextManager[None]:
        """The objective's models as plain modules, where they are sharded."""
        return self.shards.whole() if self.shards else nullcontext()

    def _update(
        self,
        objective: Objective,
        name: str,
        player: Player,
        optimizer: torch.optim.Optimizer,
        batches: list[Batch],
        step: int,
        rate: float,
    ) -> dict[str, float]:
        """One update of one player over the micro-batches of a step. Returns the values to log."""
        parameters = list(player.parameters())
        others = [p for p in objective.parameters() if p.requires_grad]
        mine = {id(p) for p in parameters}
        held = [p for p in others if id(p) not in mine]
        for p in held:  # the other players are fixed functions of their inputs
            p.requires_grad_(False)
        optimizer.zero_grad(set_to_none=True)
        sign = -1.0 if player.ascend else 1.0
        totals: dict[str, Tensor] = {}
        buffers: dict[str, list[Tensor]] = {}
        sharded = any(isinstance(p, DTensor) for p in parameters)
        try:
            for batch in batches:
                self._seed(name, step, batch)
                with self.accelerator.autocast():
                    loss = objective.loss(name, batch, step)
                self._gather(totals, loss)
                if len(batches) == 1:  # counts are known before the backward pass: one pass serves all units
                    counts = self._counts({t.unit: t.count for t in loss.terms.values()})
                    whole = torch.stack(
                        [sign * t.coefficient * t.total.float() / counts[t.unit] for t in loss.terms.values()]
                    )
                    whole.sum().backward()
                elif sharded:  # each backward pass adds rows to .grad by itself
                    self._check_unit(objective, totals)
                    torch.stack([sign * t.coefficient * t.total.float() for t in loss.terms.values()]).sum().backward()
                else:
                    self._accumulate(buffers, loss, parameters, sign)
                del loss
        finally:
            for p in held:
                p.requires_grad_(True)
        if buffers:
            counts = self._counts({unit: totals[f"count/{unit}"] for unit in buffers})
            for i, p in enumerate(parameters):
                p.grad = torch.stack([buffers[unit][i] / counts[unit] for unit in buffers]).sum(0)
        self._sum_gradients(parameters)
        most = player.optimizer.clip or float("inf")
        if self.shards:  # what was whole while other players' weights were held must be gathered anew for theirs
            self.shards.reshard()
        if sharded:
            if len(batches) > 1:
                (count,) = self._counts({k: v for k, v in totals.items() if k.startswith("count/")}).values()
                torch._foreach_div_([own_rows(cast(Tensor, p.grad)) for p in parameters], count)
            norm = clip_gradients(parameters, most)
        else:
            norm = nn.utils.clip_grad_norm_(parameters, most, error_if_nonfinite=False)
        values = self._values(name, totals)
        values[f"{name}/gradient_norm"] = norm.item()
        self._check_finite(name, step, values)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with self._whole() if type(objective).after_step is not Objective.after_step else nullcontext():
            objective.after_step(name, step)
        values[f"{name}/lr"] = rate
        return values

    def _accumulate(
        self, buffers: dict[str, list[Tensor]], loss: Loss, parameters: list[nn.Parameter], sign: float
    ) -> None:
        """Add the undivided gradient of each unit's terms to that unit's buffer."""
        units: dict[str, list[Term]] = {}
        for term in loss.terms.values():
            units.setdefault(term.unit, []).append(term)
        for i, (unit, terms) in enumerate(units.items()):
            total = torch.stack([sign * t.coefficient * t.total.float() for t in terms]).sum()
            gradients = torch.autograd.grad(total, parameters, retain_graph=i + 1 < len(units), allow_unused=True)
            filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients)]
            if unit in buffers:
                torch._foreach_add_(buffers[unit], filled)
            else:
                buffers[unit] = filled

    def _check_unit(self, objective: Objective, totals: Mapping[str, Tensor]) -> None:
        units = [key.removeprefix("count/") for key in totals if key.startswith("count/")]
        if len(units) > 1:
            raise RecipeError(
                "train.sharded adds the gradients of micro-batches before they are divided, and the terms of "
                f"{type(objective).__name__} are divided by several counts ({', '.join(units)}). "
                f"Set train.micro_batch={self.micro * self.pieces}, or train.sharded=false."
            )

    # ---------------------------------------------------------------- sums over micro-batches and ranks

    @staticmethod
    def _gather(totals: dict[str, Tensor], loss: Loss) -> None:
        counts: dict[str, Tensor] = {}
        for name, term in loss.terms.items():
            known = counts.setdefault(term.unit, term.count)
            if known is not term.count and not torch.equal(known, term.count):
                raise ValueError(
                    f"terms that count {term.unit}s disagree on how many there are; give {name} a unit of its own"
                )
        for name, term in {**loss.terms, **{f"metric:{k}": v for k, v in loss.metrics.items()}}.items():
            for key, value in ((f"sum/{name}", term.coefficient * term.total), (f"number/{name}", term.count)):
                value = value.detach().double()
                totals[key] = totals[key] + value if key in totals else value
        for unit, count in counts.items():
            value = count.detach().double()
            totals[f"count/{unit}"] = totals[f"count/{unit}"] + value if f"count/{unit}" in totals else value

    def _counts(self, local: dict[str, Tensor]) -> dict[str, Tensor]:
        """Counts over all ranks; an empty step divides by one."""
        flat = torch.stack([c.detach().float() for c in local.values()])
        flat = self.accelerator.reduce(flat, "sum") if self.world > 1 else flat
        return {unit: torch.where(count > 0, count, 1.0) for unit, count in zip(local, flat)}

    def _sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """One all-reduce of the flat gradient: totals are sums, so gradients add. Sharded ones were added on the way."""
        for p in parameters:
            if isinstance(p, DTensor) and p.grad is None:
                p.grad = torch.zeros_like(p)
        parameters = [p for p in parameters if not isinstance(p, DTensor)]
        if self.world == 1 or not parameters:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = self.accelerator.reduce(torch.cat([g.flatten().float() for g in gradients]), "sum")
        for p, piece in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad = piece.view_as(p).to(p.dtype)

    def _values(self, name: str, totals: dict[str, Tensor]) -> dict[str, float]:
        keys = [k for k in totals if not k.startswith("count/")]
        flat = torch.stack([totals[k] for k in keys])
        flat = self.accelerator.reduce(flat, "sum") if self.world > 1 else flat
        whole = dict(zip(keys, flat.tolist()))
        values, loss = {}, 0.0
        for key in keys:
            if key.startswith("sum/"):
                term = key.removeprefix("sum/")
                number = whole[f"number/{term}"]
                mean = whole[key] / number if number else 0.0
                values[f"{name}/{term.removeprefix('metric:')}"] = mean
                loss += 0.0 if term.startswith("metric:") else mean
        return {f"{name}/loss": loss, **values}

    def _check_finite(self, name: str, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            if not torch.isfinite(torch.tensor(value)) and (key.endswith("/loss") or key.endswith("/gradient_norm")):
                bad = [k.partition("/")[2] for k, v in values.items() if v != v or v in (float("inf"), float("-inf"))]
                raise NonFiniteError(
                    f"Stage {self.stage}, step {step + 1}: {', '.join(bad)} of player {name} became {value}. "
                    "The last checkpoint is whole. Lower train.lr, set train.clip, or look at the data of this step."
                )

    # ---------------------------------------------------------------- the rest

    def _seed(self, purpose: str, step: int, batch: Batch) -> None:
        """Dropout and whatever else draws from torch's global generator: a function of step and first sample."""
        torch.manual_seed(keyed.key(self.spec.seed, purpose, step, int(batch.ids_B[0])) & (2**63 - 1))

    def _same_start(self, objective: nn.Module) -> None:
        if self.world > 1:
            for tensor in objective.state_dict().values():
                torch.distributed.broadcast(tensor, 0)

    def _check_coupling(self, objective: Objective) -> None:
        if self.pieces * self.world == 1:
            return
        if objective.couples == "batch":
            raise RecipeError(
                f"{type(objective).__name__} couples the samples of a batch, so a batch cannot be cut into "
                f"{self.pieces * self.world} pieces. Set train.micro_batch = train.batch and use one process."
            )
        if self.spec.batch_norm == "refuse" and batchnorm_coupled(objective.train()):
            raise RecipeError(
                "BatchNorm statistics couple the samples of a batch, so cutting it into "
                f"{self.pieces * self.world} pieces changes the result. Set train.batch_norm=local to accept statistics of "
                "each piece, use a network with GroupNorm, or train.micro_batch = train.batch on one process."
            )


class _bar:
    """Progress with rate and time left on a terminal; a line a tenth elsewhere."""

    def __init__(self, stage: str, steps: int, done: int, shown: bool) -> None:
        self.console = Console(stderr=True)
        self.stage, self.steps, self.step, self.first, self.shown = stage, steps, done, done, shown
        self.live = shown and self.console.is_terminal
        self.began = time.monotonic()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=self.console,
        )
        if self.live:
            self.task = self.progress.add_task(stage, total=steps, completed=done, rate="", loss="")

    def __enter__(self) -> Callable[[Mapping[str, float]], None]:
        if self.live:
            self.progress.start()
        return self.advance

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.progress.stop()

    def advance(self, values: Mapping[str, float]) -> None:
        self.step += 1
        rate = (self.step - self.first) / max(1e-9, time.monotonic() - self.began)
        loss = "  ".join(f"{k.partition('/')[0]} {v:.4f}" for k, v in values.items() if k.endswith("/loss"))
        if self.live:
            shown = f"{rate:.1f} step/s" if rate >= 1 else f"{1 / rate:.1f} s/step"
            self.progress.update(self.task, advance=1, rate=shown, loss=loss)
        elif self.shown and (self.step == self.steps or self.step % max(1, self.steps // 10) == 0):
            left = (self.steps - self.step) / max(rate, 1e-9)
            print(
                f"{self.stage} {self.step}/{self.steps}  {rate:.2f} step/s  {left:.0f} s left  {loss}",
                file=sys.stderr,
                flush=True,
            )

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from potstill.contracts.batch import PointBatch
from potstill.contracts.errors import DataError, NonFiniteError, RecipeError, RunError
from potstill.contracts.players import Always, Every, From, Objective, OptimizerSpec, Player, Unless
from potstill.contracts.terms import Loss, Term
from potstill.training.optimizers import learning_rate
from potstill.training.spec import TrainSpec
from potstill.training.tracking import read_journal
from potstill.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parent))
from toy import Points, Toy


def spec(**changes) -> TrainSpec:
    return TrainSpec(**{"steps": 12, "batch": 6, "trackers": [], "device": "cpu", **changes})


def trained(folder: Path | None = None, toy: Toy | None = None, **changes) -> Toy:
    toy = toy or Toy()
    Trainer(spec(**changes), folder).fit(toy, Points())
    return toy


def same(a: nn.Module, b: nn.Module, **tolerance) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values()):
        assert_close(x, y, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def close(x: dict, y: dict) -> None:
    """Two rows of metrics agree up to the order of summation."""
    assert x.keys() == y.keys()
    for name, value in x.items():
        assert y[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=1e-6)), name


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_micro_batches_change_nothing(micro, tmp_path):
    """Terms with two units, uneven counts, two players, keyed noise: any layout gives the same weights and losses."""
    whole, cut = trained(tmp_path / "a"), trained(tmp_path / "b", micro_batch=micro)
    same(whole, cut, rtol=1e-5, atol=1e-6)
    for x, y in zip(read_journal(tmp_path / "a/metrics.jsonl"), read_journal(tmp_path / "b/metrics.jsonl")):
        close(x, y)


def test_a_step_is_the_gradient_of_the_divided_loss():
    """One SGD step by hand: the line moves by -lr times the gradient of mean-per-column + 0.1 mean-per-row."""
    sgd = OptimizerSpec(optimizer="sgd", momentum=0.0, lr=0.1)
    toy, by_hand = Toy(optimizer=sgd), Toy(optimizer=sgd)
    trainer = Trainer(spec(steps=1))
    ((rows, epochs),) = trainer.rows(24, 0)
    batch = by_hand.collect(Points().batch(rows, epochs), 0)
    with torch.no_grad():  # the critic moves first and ascends
        critic = by_hand.critic
    gradient = torch.autograd.grad(by_hand.loss("critic", batch, 0).value(), list(critic.parameters()))
    with torch.no_grad():
        for p, g in zip(critic.parameters(), gradient):
            p += 0.1 * g
    x, y, n, noise = batch.points_BD.split(1, 1)
    error = (by_hand.line(x) - y) ** 2
    loss = (error * (n + 1)).sum() / (n + 1).sum() + 0.1 * critic(error + 0.1 * noise).mean()
    gradient = torch.autograd.grad(loss, list(by_hand.line.parameters()))
    with torch.no_grad():
        for p, g in zip(by_hand.line.parameters(), gradient):
            p -= 0.1 * g
    trainer.fit(toy, Points())
    same(toy.line, by_hand.line)
    same(toy.critic, by_hand.critic)


def test_players_move_when_it_is_their_turn():
    toy = trained(steps=5)
    assert toy.moves == [
        ("critic", 0),
        ("line", 0),
        ("critic", 1),
        ("critic", 2),
        ("line", 2),
        ("critic", 3),
        ("critic", 4),
        ("line", 4),
    ]


def test_rules_of_turns():
    assert [Every(3)(s) for s in range(5)] == [True, False, False, True, False]
    assert [Unless(Every(3))(s) for s in range(4)] == [False, True, True, False]
    assert [From(2, Every(2))(s) for s in range(5)] == [False, False, True, False, True]
    assert Always()(17)


def test_the_order_visits_every_sample_once_an_epoch():
    trainer = Trainer(spec(batch=5))
    seen = [int(r) for step in range(24) for rows, _ in trainer.rows(24, step) for r in rows]
    assert sorted(seen[:24]) == list(range(24)) and sorted(seen[24:48]) == list(range(24))
    assert seen[:24] != seen[24:48], "each epoch has an order of its own"


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_an_interrupted_run_ends_with_the_same_bits(stop, tmp_path):
    """Stopped anywhere between checkpoints, dropout and EMA included, the resumed run equals the undisturbed one."""

    class Stops(Toy):
        def collect(self, batch, step):
            if step == stop and not getattr(self, "resumed", False):
                raise KeyboardInterrupt
            return super().collect(batch, step)

    undisturbed = trained(tmp_path / "a", Toy(dropout=0.3), checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "b", Stops(dropout=0.3), checkpoint_every=2)
    again = Stops(dropout=0.3)
    again.resumed = True
    trained(tmp_path / "b", again, checkpoint_every=2)
    same(undisturbed, again, rtol=0, atol=0)
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()


def test_a_finished_stage_is_walked_past(tmp_path):
    first = trained(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    second = trained(tmp_path)
    same(first, second, rtol=0, atol=0)
    assert second.moves == [] and (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_longer_budget_goes_on_where_the_shorter_ended(tmp_path):
    trained(tmp_path, steps=6)
    same(trained(tmp_path, steps=12), trained(), rtol=0, atol=0)


def test_torchrun_with_two_processes_gives_the_losses_of_one(tmp_path):
    """World size asserted inside; one process with twice the micro-batch is the reference."""
    script = tmp_path / "two.py"
    script.write_text(
        "import sys, json, torch\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from toy import Points, Toy\n"
        "from potstill.training.spec import TrainSpec\n"
        "from potstill.training.trainer import Trainer\n"
        "from pathlib import Path\n"
        "spec = TrainSpec(steps=12, batch=6, micro_batch=3, trackers=[], device='cpu')\n"
        "trainer = Trainer(spec, Path(sys.argv[1]))\n"
        "assert trainer.world == 2 and torch.distributed.get_world_size() == 2\n"
        "trainer.fit(Toy(), Points())\n"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "29513",
        str(script),
        str(tmp_path / "b"),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    trained(tmp_path / "a", micro_batch=6)
    one, two = read_journal(tmp_path / "a/metrics.jsonl"), read_journal(tmp_path / "b/metrics.jsonl")
    assert len(one) == len(two) == 12
    for x, y in zip(one, two):
        close(x, y)


def test_learning_rate_schedules():
    cosine = OptimizerSpec(lr=1.0, schedule="cosine", warmup=2, end=0.1)
    assert [learning_rate(cosine, u, 12) for u in (0, 1, 2, 7, 12)] == pytest.approx([0.5, 1.0, 1.0, 0.55, 0.1])
    stretched = OptimizerSpec(lr=1.0, schedule="cosine", stretch=2)
    assert [learning_rate(stretched, u, 10) for u in (0, 10)] == pytest.approx([1.0, 0.5])
    linear = OptimizerSpec(lr=2.0, schedule="linear")
    assert learning_rate(linear, 5, 10) == 1.0 and learning_rate(OptimizerSpec(lr=3.0), 999, 10) == 3.0


def test_clipping_bounds_the_step():
    sgd = OptimizerSpec(optimizer="sgd", momentum=0.0, lr=1.0, clip=1e-3)
    toy, start = Toy(optimizer=sgd), Toy()
    Trainer(spec(steps=1)).fit(toy, Points())
    moved = torch.cat([(a - b).flatten() for a, b in zip(toy.line.parameters(), start.line.parameters())])
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-3)


class Plain(Objective):
    """One player whose loss is given."""

    def __init__(self, make) -> None:
        super().__init__()
        self.net, self.make = nn.Linear(1, 1), make

    @property
    def players(self):
        return {"student": Player([self.net])}

    def loss(self, player, batch: PointBatch, step):
        return self.make(self.net(batch.points_BD[:, :1]))


def test_a_loss_that_is_not_finite_names_player_term_and_step():
    bad = Plain(lambda y: Loss({"good": Term.over(y), "bad": Term.over(y / 0.0 * 0.0)}))
    with pytest.raises(NonFiniteError, match=r"step 1: .*bad.* of player student became nan.*Lower train.lr"):
        Trainer(spec()).fit(bad, Points())


def test_terms_that_share_a_unit_must_share_their_count():
    bad = Plain(lambda y: Loss({"a": Term.over(y[:, 0]), "b": Term.over(y[:2, 0])}))
    with pytest.raises(ValueError, match="unit of its own"):
        Trainer(spec()).fit(bad, Points())


def test_an_objective_that_couples_its_batch_refuses_to_be_cut():
    coupled = Plain(lambda y: Loss({"a": Term.over(y)}))
    coupled.couples = "batch"
    with pytest.raises(RecipeError, match=r"Plain couples the samples.*micro_batch = train.batch"):
        Trainer(spec(micro_batch=2)).fit(coupled, Points())


def test_batch_norm_refuses_to_be_cut_unless_told():
    def normed():
        objective = Plain(lambda y: Loss({"a": Term.over(y)}))
        objective.net = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2))
        return objective

    with pytest.raises(RecipeError, match="BatchNorm statistics couple.*batch_norm=local"):
        Trainer(spec(micro_batch=2)).fit(normed(), Points())
    Trainer(spec(micro_batch=2, steps=1, batch_norm="local")).fit(normed(), Points())


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(RecipeError, match="train.batch 6 does not divide into micro-batches of 4.*multiple of 4"):
        Trainer(spec(micro_batch=4))


def test_empty_data_is_refused():
    with pytest.raises(DataError, match="empty"):
        Trainer(spec()).fit(Toy(), Points(size=0))


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    trained(tmp_path, steps=2)
    other = Toy()
    other.line = nn.Linear(1, 3)
    with pytest.raises(RunError, match="does not belong to this recipe's models.*another output"):
        Trainer(spec(steps=4), tmp_path).fit(other, Points())


def test_a_full_disk_is_one_sentence_and_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    import errno

    from potstill.training import checkpoint

    trained(tmp_path, steps=4, checkpoint_every=2)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    with pytest.raises(RunError, match="disk is full.*potstill resume"):
        trained(tmp_path, steps=8, checkpoint_every=2)
    names = sorted(p.name for p in (tmp_path / "checkpoints/distil").iterdir())
    assert names == ["step-00000002", "step-00000004"], "nothing half-written stays behind"


def test_old_checkpoints_are_dropped(tmp_path):
    trained(tmp_path, checkpoint_every=2, keep=2)
    assert [p.name for p in sorted((tmp_path / "checkpoints/distil").iterdir())] == ["step-00000010", "step-00000012"]


def test_time_budget_stops_a_stage_and_a_resume_does_not_restart_it(tmp_path):
    first = trained(tmp_path, steps=1000, seconds=1e-6)
    assert [m for m in first.moves if m[0] == "critic"] == [("critic", 0)]
    assert trained(tmp_path, steps=1000, seconds=1e-6).moves == []


def test_evaluation_lands_in_the_metrics(tmp_path):
    Trainer(spec(steps=4, evaluate_every=2), tmp_path, evaluate=lambda step: {"double": 2.0 * step}).fit(
        Toy(), Points()
    )
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("eval/double") for row in rows] == [None, 4.0, None, 8.0]
    assert not {"seconds", "time", "at"} & set(rows[0]), "no wall clock among the metrics"


def test_tensorboard_gets_the_metrics(tmp_path):
    Trainer(spec(steps=2, trackers=["tensorboard"]), tmp_path).fit(Toy(), Points())
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_bfloat16_autocast_trains():
    toy = trained(precision="bf16", steps=3)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in toy.parameters())

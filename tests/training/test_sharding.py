"""Sharded training gives the numbers of training that is not, on two processes with gloo."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig

from potstill.models.causal import CausalLM
from potstill.training.sharding import blocks_of
from potstill.training.tracking import read_journal

sys.path.insert(0, str(Path(__file__).parent))
from sharded import train

CASES = ("text", "rollouts", "moving", "seesaw", "lora")
LOW = ("low", "low seesaw")


@pytest.fixture(scope="module")
def runs(tiny_lm, tmp_path_factory):
    """One process with twice the micro-batch (`one`), and all that two did (`sharded.main`)."""
    folder = tmp_path_factory.mktemp("sharding")
    for name, seed, tied, layers in (("untied", 0, False, 2), ("tied", 1, True, 2), ("teacher", 2, False, 3)):
        shape = {"intermediate_size": 47, "num_hidden_layers": layers}  # 47 rows do not divide by two
        made = tiny_lm(seed, LlamaConfig, tie_word_embeddings=tied, **shape)
        shutil.copytree(made, folder / name)
    for case in CASES:
        train(case, folder, folder / "one" / case, sharded=case == "seesaw")  # alone, there is nothing to split with
    for case in LOW:
        train(case, folder, folder / "one" / case)
    train("text", folder, folder / "resumed" / "text", steps=2)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [*start, str(Path(__file__).parent / "sharded.py"), str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return folder


def same(runs: Path, one: str, two: str, tolerance: float = 2e-5) -> None:
    """Losses, norms and what is measured at every step, and all weights at the end."""
    ours, theirs = (read_journal(runs / run / "metrics.jsonl") for run in (one, two))
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert b[name] == (value if isinstance(value, str) else pytest.approx(value, rel=tolerance, abs=1e-6)), name
    first, second = (load_file(runs / run / "end.safetensors") for run in (one, two))
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert_close(second[name], weight, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


def seen(runs: Path, run: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((runs / run).glob("seen-*.json"))]


@pytest.mark.parametrize("case", CASES)
def test_sharded_training_gives_the_numbers_of_one_process(runs, case):
    """Clipped Adam, RAdam and SGD; tied and untied heads; rollouts; averages that teach; two players; adapters."""
    same(runs, f"one/{case}", f"two/{case}")
    assert [x["world"] for x in seen(runs, f"two/{case}")] == [2, 2]


def test_it_gives_the_numbers_of_two_processes_that_each_hold_all(runs):
    same(runs, "plain/text", "two/text")
    assert {share for x in seen(runs, "plain/text") for share in x["shares"]} == {1.0}


def test_each_process_holds_half_of_the_weights_between_passes(runs):
    for x in seen(runs, "two/text"):
        assert max(x["shares"]) < 0.51


def test_rollouts_may_have_another_length_on_each_process(runs):
    first, second = (x["lengths"] for x in seen(runs, "two/rollouts"))
    assert first != second
    assert [len(x["lengths"]) for x in seen(runs, "cut/rollouts")] == [8, 8], "two micro-batches a step"


@pytest.mark.parametrize("case", ["text", "rollouts"])
def test_micro_batches_change_nothing(runs, case):
    same(runs, f"one/{case}", f"cut/{case}")


def test_recomputed_activations_change_nothing(runs):
    same(runs, "one/text", "two/recomputed")


@pytest.mark.parametrize("case", LOW)
def test_low_precision_is_that_of_the_passes_alone(runs, case):
    """Also where a player's weights are first used, and held still, in another's turn."""
    weights = load_file(runs / "two" / case / "end.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    for a, b in zip(*(read_journal(runs / run / case / "metrics.jsonl") for run in ("one", "two"))):
        for name in a.keys() - {"stage"}:
            assert b[name] == pytest.approx(a[name], rel=5e-2), name


def test_checkpoints_are_those_of_any_run(runs):
    """Names, shapes and numbers, of the optimizer too, so that either kind of run goes on where the other ended."""
    place = "text/checkpoints/distil/step-00000002"
    for file in ("model", "optimizers"):
        one, two = (load_file(runs / run / place / f"{file}.safetensors") for run in ("one", "two"))
        assert one.keys() == two.keys()
        for name in one:
            assert_close(two[name], one[name], rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")
    same(runs, "one/text", "resumed/text")  # one process, then two
    train("text", runs, runs / "half" / "text")  # two, then one
    same(runs, "one/text", "half/text")


def test_a_tied_weight_is_saved_once(runs):
    one, two = (
        json.loads((runs / run / "rollouts/checkpoints/distil/step-00000004/state.json").read_text())
        for run in ("one", "two")
    )
    assert two["aliases"] == one["aliases"] != {}


def test_the_student_is_exported_whole(runs):
    model = CausalLM.from_pretrained(runs / "saved")
    end = load_file(runs / "again/text/end.safetensors")
    for name, weight in model.state_dict().items():
        assert_close(weight, end[f"student.{name}"], rtol=0, atol=0)


def test_refusals(runs):
    first, second = (json.loads((runs / f"refusals-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert "divided by several counts (token, row). Set train.micro_batch=4, or train.sharded=false." in first["counts"]
    assert "cannot split student.network.model.embed_tokens.weight, which a module outside" in first["elsewhere"]
    assert "no repeated blocks in what critic, student trains. Set train.sharded=false" in first["nothing"]


def test_blocks_are_those_that_a_library_does_not_split_or_the_items_of_lists():
    layer = lambda: nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)]))
    model = nn.Module()
    model.layers, model.other = nn.ModuleList([layer(), layer()]), nn.Linear(2, 2)
    assert [id(b) for b in blocks_of(model)] == [id(b) for b in model.layers], "the outermost"
    model.layers[1][0].weight = model.other.weight
    assert [id(b) for b in blocks_of(model)] == [id(model.layers[0])], "a shared weight stays with the rest"
    model._no_split_modules = ["Linear"]
    assert [id(b) for b in blocks_of(model)] == [id(layer[1][0]) for layer in model.layers]

"""Two processes of one recipe give the losses of one process with twice the micro-batch."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from typer.testing import CliRunner

from potstill.cli import app


def on_two_processes(path, *overrides: str) -> None:
    """`potstill run` under torchrun; asserts the number of processes from inside."""
    script = path.parent / "launch.py"
    script.write_text(
        "from potstill.run import Run\n"
        "from potstill.cli import app\n"
        "made = Run.__init__\n"
        "def checked(self, *a, **k):\n"
        "    made(self, *a, **k)\n"
        "    assert self.accelerator.num_processes == 2, self.accelerator.num_processes\n"
        "Run.__init__ = checked\n"
        "app()\n"
    )
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [*start, str(script), "run", str(path), *overrides]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def test_rollouts_on_two_processes_are_those_of_one(tmp_path, tiny_lm):
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(f"Line {i} boils, rises, cools and drips into another cup." for i in range(40)))
    raw = {
        "method": {"name": "vopd", "rollouts": {"max_new_tokens": 5}, "warm_start": 2},
        "student": str(tiny_lm(1, spread=0.1)),
        "teacher": str(tiny_lm(2)),
        "data": {"text": str(lines), "length": 16, "prompt_length": 6},
        "train": {"steps": 3, "batch": 8, "lr": 1e-3, "trackers": [], "device": "cpu"},
        "eval": {"limit": 4, "batch": 4},
    }
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(raw))
    one = CliRunner().invoke(app, ["run", str(recipe), f"output={tmp_path}/one", "train.micro_batch=8"])
    assert one.exit_code == 0, one.exception
    on_two_processes(recipe, f"output={tmp_path}/two", "train.micro_batch=4")
    one, two = ([json.loads(line) for line in (tmp_path / n / "metrics.jsonl").open()] for n in ("one", "two"))
    assert len(one) == len(two) == 5
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        assert a["student/loss"] == pytest.approx(b["student/loss"], rel=1e-3, abs=1e-5)
        assert a["student/gradient_norm"] == pytest.approx(b["student/gradient_norm"], rel=1e-3)
    ends = [json.loads((tmp_path / n / "result.json").read_text())["metrics"] for n in ("one", "two")]
    assert ends[0]["rollout_reverse_kl"] == pytest.approx(ends[1]["rollout_reverse_kl"], rel=0.02)


SHARDED = """
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from potstill.contracts.signals import HiddenAndHead
from potstill.divergences import JensenShannon, linear_divergence

mesh = init_device_mesh("cpu", (2,))
assert mesh.size() == 2
draw = torch.Generator().manual_seed(0)
hidden, head, theirs, table = (torch.randn(*s, generator=draw) for s in ((6, 5), (12, 5), (6, 7), (12, 7)))

def fused(h, w, t):
    return linear_divergence(JensenShannon(), h, w, teacher=HiddenAndHead(theirs[mine], t)).total

mine = slice(None)
whole = head.clone().requires_grad_()
fused(hidden, whole, table).backward()
mine = slice(3 * mesh.get_rank(), 3 * mesh.get_rank() + 3)  # each process has half of the positions
sharded = distribute_tensor(head, mesh, [Shard(0)]).requires_grad_()
fused(hidden[mine], sharded, distribute_tensor(table, mesh, [Shard(0)])).backward()
assert sharded.grad.placements == (Shard(0),), sharded.grad.placements
torch.testing.assert_close(sharded.grad.full_tensor(), whole.grad)
torch.distributed.destroy_process_group()
"""


def test_a_sharded_head_gets_the_gradient_of_all_positions(tmp_path):
    """FSDP2's DTensor heads, on two processes: gathered once, and the gradients added up back to the shards."""
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(start, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]

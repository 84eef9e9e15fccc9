"""A run killed without warning and resumed ends with the bits of an undisturbed one: metrics and weights.

Another recipe joins with one line of CASES. `{folder}` in an override is a folder with the models that `prepare` saves.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from potstill.models.causal import CausalLM
from potstill.models.denoisers import mlp_denoiser
from potstill.models.images import mlp
from potstill.models.masked import mlm_tiny
from potstill.models.tokenizers import character_tokenizer


def _denoiser(folder: Path) -> None:
    torch.manual_seed(0)
    model = mlp_denoiser(width=16, depth=2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save(folder / "denoiser")


def _classifier(folder: Path) -> None:
    torch.manual_seed(0)
    mlp(size=8, width=16, depth=1).save(folder / "classifier")


def _masked_lm(folder: Path) -> None:
    text = "\n".join(f"row {i} of a text with words {i * 7 % 13}" for i in range(60))
    (folder / "text.txt").write_text(text)
    torch.manual_seed(0)
    mlm_tiny(tokenizer=character_tokenizer(text), length=12).save(folder / "masked")


def _causal_lm(folder: Path) -> None:
    text = "\n".join(f"row {i} of a text with words {i * 7 % 13}" for i in range(60))
    (folder / "text.txt").write_text(text)
    for seed, role in enumerate(("teacher", "student")):
        torch.manual_seed(seed)
        CausalLM.PACKAGED["llama-tiny"](tokenizer=character_tokenizer(text), layers=1, width=16, heads=2).save(
            folder / role
        )


CASES: dict[str, tuple[Callable[[Path], None], str, list[str]]] = {  # what to prepare, recipe, overrides
    "one stage and its control": (
        _classifier,
        "kd",
        ["data=digits", "teacher={folder}/classifier", "student=mlp", "student.options.width=8", "train.batch=16"],
    ),
    "three players": (_denoiser, "f_distill", ["data=mixture", "teacher={folder}/denoiser", "train.batch=16"]),
    "two players on trajectories": (
        _masked_lm,
        "didi_instruct",
        [
            "data={{text: {folder}/text.txt, length: 12}}",
            "teacher={folder}/masked",
            "train.batch=4",
            "method.eval_samples=4",
        ],
    ),
    "rollouts after a warm start": (
        _causal_lm,
        "vopd",
        [
            "data={{text: {folder}/text.txt, length: 12, prompt_length: 4}}",
            "teacher={folder}/teacher",
            "student={folder}/student",
            "train.batch=4",
            "method.warm_start=6",
            "method.rollouts.max_new_tokens=4",
            "method.probe=2",
            "eval.batch=16",
        ],
    ),
}
COMMON = ["train.steps=80", "train.checkpoint_every=6", "train.trackers=[]", "train.device=cpu", "eval.limit=20"]


def potstill(*arguments: str, wait: bool = True) -> "subprocess.Popen[str]":
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "potstill.cli", *arguments]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if wait:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-3000:]
    return process


def kill_in_the_middle(process: "subprocess.Popen[str]", run: Path, lines: int = 20) -> None:
    """SIGKILL once `lines` steps are logged: between two checkpoints, wherever the process happens to be."""
    end = time.monotonic() + 240
    journal = run / "metrics.jsonl"
    while process.poll() is None and time.monotonic() < end:
        if journal.is_file() and journal.read_bytes().count(b"\n") >= lines:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.001)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, output[-3000:]
    assert not (run / "result.json").exists(), "the run was over before it could be killed"


def weights(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted((run / "student").rglob("*.safetensors"))}


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_is_undisturbed_bit_for_bit(case, tmp_path):
    prepare, recipe, overrides = CASES[case]
    prepare(tmp_path)
    overrides = [o.format(folder=tmp_path) for o in overrides] + COMMON
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    potstill("run", recipe, *overrides, f"output={whole}")
    kill_in_the_middle(potstill("run", recipe, *overrides, f"output={killed}", wait=False), killed)
    potstill("resume", str(killed))
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert weights(killed) and weights(killed) == weights(whole)

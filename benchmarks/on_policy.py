"""Whole training steps of token distillation, beside TRL: tokens per second, peak memory, and where the time goes.

    pip install -e '.[bench]'
    OMP_WAIT_POLICY=PASSIVE python benchmarks/on_policy.py                  # everything, about ten minutes
    OMP_WAIT_POLICY=PASSIVE python benchmarks/on_policy.py --only gkd       # cases whose name holds a word

One small Llama pair over SmolLM2's vocabulary of 49,152 with random weights, the same conversations, sampling at
temperature 1 without truncation, AdamW, float32, no checkpointing of activations: JSD(0.5) at every completion token, on
the student's own completions (on-policy) or on the given ones (off-policy). opsd's teacher is the student's start, which
reads an answer of NEW words as well; no peer does that. Every case runs in a process of its own;
seconds a step are the median after two steps of warm-up, peak memory is the highest resident size of later steps above
that with both models loaded (gradients and Adam's moments, which both need, are in it). Results go to
benchmarks/results/on_policy.json, with versions and machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from divergences import machine, named

RESULTS = Path(__file__).parent / "results" / "on_policy.json"
CASES = [
    "potstill/gkd", "potstill/gkd-compiled", "trl-distillation/on-policy", "trl-gkd/on-policy", "potstill/opsd",
    "potstill/token_kd", "potstill/token_kd-compiled", "trl-gkd/off-policy",
]  # fmt: skip
BATCH, STEPS, WARMUP, PROMPT_WORDS, NEW = 16, 8, 2, 12, 48


def models(folder: Path) -> tuple[Path, Path, Any]:
    """Two folders of Llama models with random weights, and the tokenizer that both carry."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from potstill.models.pretrained import smollm2

    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    made = []
    for name, width, layers in (("teacher", 384, 6), ("student", 192, 4)):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
            num_attention_heads=width // 64, num_key_value_heads=width // 64, tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        network = LlamaForCausalLM(config)
        network.generation_config.eos_token_id = None  # completions of one length, whoever samples
        network.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        made.append(folder / name)
    return made[0], made[1], tokenizer


def conversations(tokenizer: Any) -> list[list[dict[str, str]]]:
    """One question and an answer of NEW tokens each."""
    import torch

    draw = torch.Generator().manual_seed(0)
    words = [w for w in (tokenizer.decode([i]) for i in range(1000, 20000)) if w.startswith(" ") and w[1:].isalpha()]
    text = lambda n: "".join(words[i] for i in torch.randint(len(words), (n,), generator=draw).tolist()).strip()
    return [
        [{"role": "user", "content": text(PROMPT_WORDS)}, {"role": "assistant", "content": text(NEW - 1)}]
        for _ in range(BATCH * (STEPS + WARMUP))
    ]


class Clock:
    """Time stamps at the ends of steps, and the highest resident size after the warm-up."""

    def __init__(self) -> None:
        self.stamps = [time.perf_counter()]
        self.before = self._status("VmRSS")

    @staticmethod
    def _status(key: str) -> int:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
        return int(line.split()[1]) * 1024

    def tick(self) -> None:
        self.stamps.append(time.perf_counter())
        if len(self.stamps) == 1 + WARMUP:
            Path("/proc/self/clear_refs").write_text("5")

    def result(self) -> dict[str, float]:
        steps = [b - a for a, b in zip(self.stamps, self.stamps[1:], strict=False)][WARMUP:]
        seconds = statistics.median(steps)
        return {
            "seconds": seconds,
            "tokens_per_second": BATCH * NEW / seconds,
            "peak_mb": (self._status("VmHWM") - self.before) / 2**20,
        }


def potstill(what: str, folder: Path) -> dict[str, Any]:
    from potstill.contracts.players import OptimizerSpec
    from potstill.divergences import JensenShannon
    from potstill.models.causal import CausalLM
    from potstill.objectives import tokens
    from potstill.objectives.tokens import RolloutSpec, TokenDistillation
    from potstill.tasks.tokens import ChatTokens, Prompts
    from potstill.teachers import LocalTeacher, PrivilegedTeacher
    from potstill.teachers.privileged import PrivilegedContext
    from potstill.training.spec import TrainSpec
    from potstill.training.trainer import Trainer

    teacher_folder, student_folder, tokenizer = models(folder)
    privileged = what == "opsd"
    student = CausalLM.from_pretrained(str(student_folder))
    teacher = CausalLM.from_pretrained(str(student_folder if privileged else teacher_folder))
    student.compiled = what.endswith("-compiled")
    rows = conversations(tokenizer)
    own = privileged or what.startswith("gkd")
    clock, spent = Clock(), {"sampling": 0.0, "teacher": 0.0, "loss": 0.0}

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            out = function(*args, **options)
            if len(clock.stamps) > WARMUP:
                spent[name] += time.perf_counter() - started
            return out

        return call

    class Timed(TokenDistillation):
        def after_step(self, player: str, step: int) -> None:
            super().after_step(player, step)
            clock.tick()

    tokens.sample = watched("sampling", tokens.sample)
    scorer: Any = LocalTeacher(teacher)
    if privileged:
        solution = " ".join(rows[0][1]["content"].split()[:NEW])
        scorer = PrivilegedTeacher(
            scorer, PrivilegedContext(tokenizer, lambda row, said: f"{row[0]['content']} {solution}")
        )
    scorer.score = watched("teacher", scorer.score)
    objective = Timed(
        student, scorer, JensenShannon(0.5), optimizer=OptimizerSpec(lr=1e-5), seed=0,
        rollouts=RolloutSpec(max_new_tokens=NEW) if own else None,
    )  # fmt: skip
    objective.loss = watched("loss", objective.loss)  # type: ignore[method-assign]
    data = Prompts(rows, tokenizer, 128, NEW) if own else ChatTokens(rows, tokenizer, 128 + NEW)
    Trainer(TrainSpec(steps=STEPS + WARMUP, batch=BATCH, lr=1e-5, trackers=[], device="cpu")).fit(objective, data)
    result = clock.result()
    shares = {name: value / STEPS / result["seconds"] for name, value in spent.items()}
    shares["student"] = shares.pop("loss") - shares["teacher"]  # forward pass and comparison, with its gradient
    shares["backward and optimizer"] = 1 - sum(shares.values())
    return result | {"shares": shares}


def trl(what: str, folder: Path, gkd: bool) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback

    teacher_folder, student_folder, tokenizer = models(folder)
    tokenizer.padding_side = "left"
    student, teacher = (AutoModelForCausalLM.from_pretrained(f) for f in (student_folder, teacher_folder))
    rows = conversations(tokenizer)
    clock = Clock()

    class Tick(TrainerCallback):
        def on_step_end(self, *args: Any, **options: Any) -> None:
            clock.tick()

    common: dict[str, Any] = {
        "output_dir": str(folder / "out"), "per_device_train_batch_size": BATCH, "max_steps": STEPS + WARMUP,
        "learning_rate": 1e-5, "report_to": [], "save_strategy": "no", "logging_steps": 1000, "bf16": False, "use_cpu": True,
        "gradient_checkpointing": False, "temperature": 1.0, "beta": 0.5, "disable_tqdm": True, "lr_scheduler_type": "constant",
    }  # fmt: skip
    if gkd:
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        args: Any = GKDConfig(
            **common, lmbda=float(what == "on-policy"), max_new_tokens=NEW, max_length=256, dataset_num_proc=None
        )
        made: Any = GKDTrainer
        data = Dataset.from_list([{"messages": row} for row in rows])
    else:
        from trl import DistillationConfig, DistillationTrainer

        args, made = DistillationConfig(**common, max_completion_length=NEW), DistillationTrainer
        data = Dataset.from_list([{"prompt": row[:1]} for row in rows])
    trainer = made(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[Tick()],
    )
    clock.stamps, clock.before = [time.perf_counter()], Clock._status("VmRSS")
    trainer.train()
    return clock.result()


def table_of(results: list[dict[str, Any]]) -> str:
    lines = ["| case | seconds a step | tokens a second | peak MB |", "|---|---|---|---|"]
    for r in results:
        if "error" in r:
            lines.append(f"| {r['case']} | {r['error']} | | |")
        else:
            lines.append(f"| {r['case']} | {r['seconds']:.2f} | {r['tokens_per_second']:.0f} | {r['peak_mb']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="measure cases whose name holds this")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as `potstill` does: large pages, for everybody
    if options.one:
        import torch

        torch.set_num_threads(options.threads)
        who, what = options.one.split("/")
        with tempfile.TemporaryDirectory() as place:
            found = potstill(what, Path(place)) if who == "potstill" else trl(what, Path(place), who == "trl-gkd")
        print(json.dumps({"case": options.one, **found}))
        return
    kept = json.loads(RESULTS.read_text())["results"] if RESULTS.is_file() and options.only else []
    results = {r["case"]: r for r in kept}
    for name in named(options.only, CASES):
        command = [sys.executable, __file__, "--one", name, "--threads", str(options.threads)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            results[name] = {"case": name, "error": (done.stderr.strip().splitlines() or ["no output"])[-1][:200]}
        else:
            results[name] = json.loads(done.stdout.strip().splitlines()[-1])
        print(table_of([results[name]]).splitlines()[-1], flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        content = {"machine": machine(options.threads), "results": list(results.values())}
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    print(table_of(list(results.values())))


if __name__ == "__main__":
    main()

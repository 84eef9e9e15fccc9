"""Using a finished student: measuring it on other data, sampling from it."""

from pathlib import Path
from typing import Any

import torch

from potstill import recipe as recipes
from potstill.contracts.batch import PromptBatch
from potstill.contracts.errors import DataError, RunError
from potstill.contracts.files import read_json
from potstill.models.build import adapter
from potstill.run import Run


def finished(folder: Path, overrides: list[str]) -> tuple[Run, Any]:
    """A finished run with other data or evaluation settings, and its student."""
    if not (folder / "result.json").is_file():
        state = "is not finished: potstill resume" if (folder / "recipe.yaml").is_file() else "is no run folder:"
        raise RunError(f"{folder} {state} {folder}")
    kind = read_json(folder / "result.json")["student_kind"]
    if kind is None:
        raise RunError(f"{folder} left no model to use; its artefacts are in {folder / 'result.json'}.")
    raw = recipes.read(str(folder), overrides)
    plan = recipes.resolve(raw, str(folder))
    # The student's own tokenizer and sizes hold, whatever role the recipe had drawn them from.
    if "student" in plan.method.roles:
        plan = recipes.resolve({**raw, "student": str(folder / "student")}, str(folder))
    run = Run(plan, folder)
    cls: Any = adapter(kind)
    return run, cls.from_pretrained(str(folder / "student")).to(run.device).eval()


def evaluate_run(folder: Path, overrides: list[str]) -> dict[str, float]:
    """The standard metrics of a finished student, on the recipe's test data or on `data=...`."""
    run, student = finished(folder, overrides)
    if student.kind == "one_step":
        from potstill.methods.diffusion.comparison import sample_metrics

        return sample_metrics(run)(student.generate(run.plan.eval.limit or 1000).cpu())
    return run.evaluate(student)


@torch.no_grad()
def generate_run(
    folder: Path, *, prompt: str | None, count: int, tokens: int, seed: int, output: Path | None
) -> list[str] | Path:
    """Sample from a finished student. Text is printed and returned; images go to a file, whose path is returned."""
    run, student = finished(folder, [])
    if student.kind == "causal_lm":
        return _text(run, student, prompt, count, tokens, seed)
    if hasattr(student, "generate"):
        # a masked model writes texts of a length it was trained on
        length = {"length": min(tokens, run.plan.data.length)} if student.kind == "masked_lm" else {}
        made = student.generate(count=count, seed=seed, **length)
        if isinstance(made, list):
            print("\n\n".join(made))
            return made
        from potstill.evaluation.pictures import save_grid

        target = output or folder / "samples.png"
        if output is not None and output.exists():
            raise RunError(f"{output} exists. Choose another file with --output.")
        save_grid(made, target)
        print(target)
        return target
    raise RunError(f"A {student.kind} does not generate; measure it with: potstill evaluate {folder}")


def _text(run: Run, student: Any, prompt: str | None, count: int, tokens: int, seed: int) -> list[str]:
    from potstill.rollouts.local import completions_of, sample

    tokenizer = student.tokenizer
    if prompt is None:
        batch = run.prompts("test").batch(torch.arange(min(count, len(run.prompts("test")))))
    else:
        if tokenizer.chat_template:
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
            )["input_ids"]
        else:
            ids = tokenizer(prompt)["input_ids"]
        if not ids:
            raise DataError("The prompt is empty.")
        row = torch.tensor(ids)[None].expand(count, -1)
        batch = PromptBatch(torch.arange(count), row, torch.ones_like(row, dtype=torch.bool))
    out = sample(student, batch.to(run.device), max_new_tokens=tokens, seed=seed)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in completions_of(out)]
    for row, attention, text in zip(batch.tokens_BT, batch.attention_BT, texts):
        print(f"{tokenizer.decode(row[attention], skip_special_tokens=True)} >>> {text}\n")
    return texts


def load_student(folder: Path) -> Any:
    """The finished student of a run, for a person's own program."""
    return finished(folder, [])[1]

"""The command line. Nothing here imports torch until a command needs it."""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from potstill.contracts.errors import PotstillError

# Two PyTorch processes that spin on shared cores slow each other down a hundredfold; waiting threads must sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages for large tensors: half the time in the kernel

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False,
    help="Distillation toolkit: small, fast or few-step models from large, slow ones.",
)  # fmt: skip
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key.path=value, as in train.steps=200 student=path/to/model")
]


def main() -> None:
    """Entry point: errors that the user can mend are one message, without a traceback."""
    with errors():
        app()


@contextlib.contextmanager
def errors():
    try:
        yield
    except PotstillError as error:
        print(f"potstill: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(
            "\npotstill: interrupted. What was checkpointed is whole; go on with: potstill resume RUN", file=sys.stderr
        )
        raise SystemExit(130) from None


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="a shipped recipe (potstill methods), a YAML file, or a finished run")],
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="resolve all, print parameters, memory and time")] = False,
    go_on: Annotated[
        bool, typer.Option("--resume", help="go on where the output folder holds this run, interrupted")
    ] = False,
) -> None:
    """Run a recipe. The output folder is runs/NAME unless output=PATH says otherwise."""
    from potstill import recipe as recipes

    overrides = list(overrides or [])
    more = [o for o in overrides if o.startswith("more.") or o.startswith("more=")]
    raw = recipes.read(recipe, [o for o in overrides if o not in more])
    if more:
        _go_on(Path(recipe), recipes.apply({}, more)["more"], raw)
        return
    plan = recipes.resolve(raw, recipe)
    if dry_run:
        from potstill.dry_run import describe

        describe(plan)
        return
    folder = Path(
        raw.get("output") or f"runs/{Path(recipe).stem if recipe.endswith(('.yaml', '.yml')) else plan.method.name}"
    )
    if go_on and (folder / "recipe.yaml").is_file() and not (folder / "result.json").is_file():
        if (folder / "recipe.yaml").read_text() != recipes.write(plan):
            from potstill.contracts.errors import RunError

            raise RunError(
                f"{folder} holds an interrupted run of another recipe. Choose another folder with output=PATH."
            )
        _execute(plan, folder, new=False)
    else:
        _execute(plan, folder, new=True)


@app.command()
def resume(folder: Annotated[Path, typer.Argument(help="the folder of an interrupted run")]) -> None:
    """Go on with an interrupted run; it ends with the numbers of an undisturbed one."""
    from potstill import recipe as recipes

    plan = recipes.resolve(recipes.read(str(folder)), str(folder / "recipe.yaml"))
    if (folder / "result.json").is_file():
        print(f"{folder} is finished. Its report: {folder / 'report.html'}")
        return
    _execute(plan, folder, new=False)


def _execute(plan, folder: Path, *, new: bool) -> None:
    from potstill.recipe import write
    from potstill.report import build_report
    from potstill.run import Run, open_folder

    current = Run(plan, folder)
    if new:
        if current.accelerator.is_main_process:
            open_folder(folder, write(plan))
        current.accelerator.wait_for_everyone()
    result = current.execute()
    if current.accelerator.is_main_process:
        build_report(folder)
        for name, value in result.metrics.items():
            print(f"{name}: {value:.6g}")
        print(f"Report: {folder / 'report.html'}")


def _go_on(finished: Path, more: dict, raw: dict) -> None:
    """`more.steps=N` on a finished run: a new folder that trains on from where the old one ended."""
    from potstill import recipe as recipes
    from potstill.contracts.errors import RecipeError
    from potstill.run import longer, open_folder

    if not (finished / "result.json").is_file():
        raise RecipeError(f"more goes on from a finished run, and {finished} is none.")
    if set(more) != {"steps"} or not isinstance(more["steps"], int) or more["steps"] < 1:
        raise RecipeError(f"more takes steps, a whole number above 0; got {more}.")
    before = recipes.resolve(raw, str(finished)).train.steps
    steps = before + more["steps"]
    plan = recipes.resolve(recipes.apply(raw, {"train.steps": steps}), str(finished))
    folder = Path(raw.get("output") or f"{str(finished).rstrip('/')}-{steps}")
    open_folder(folder, recipes.write(plan))
    longer(finished, folder, before)
    _execute(plan, folder, new=False)


@app.command()
def cache(
    recipe: Annotated[str, typer.Argument(help="a recipe, as for run: its teacher and its training rows are taken")],
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="folder of the cache; default caches/NAME")] = None,
    k: Annotated[int, typer.Option(help="likeliest outcomes kept a token")] = 64,
    bits: Annotated[int, typer.Option(help="bits of a kept log-probability, 2 to 16")] = 8,
    temperature: Annotated[float | None, typer.Option(help="of the answers; default the method's")] = None,
    batch: Annotated[int, typer.Option(help="rows that the teacher reads at once")] = 8,
    role: Annotated[str, typer.Option(help="which of the recipe's models")] = "teacher",
    rows: Annotated[
        str, typer.Option(help="tokens, or prompts: with their own completions, as gkd with on_policy 0 takes them")
    ] = "tokens",
) -> None:
    """Keep a teacher's answers to a recipe's rows; then teacher.cache=FOLDER trains without the teacher's weights."""
    from potstill import recipe as recipes
    from potstill.contracts.errors import RecipeError
    from potstill.run import Run
    from potstill.teachers.cached import described, write_cache

    plan = recipes.resolve(recipes.read(recipe, overrides or []), recipe)
    if rows not in ("tokens", "prompts"):
        raise RecipeError(f"--rows takes tokens or prompts, got {rows}.")
    folder = output or Path("caches") / (Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else plan.method.name)
    current = Run(plan, folder)
    teacher, spec = current.teacher(role), current.spec(role)
    assert not isinstance(spec, list)  # which teacher(role) refuses
    heat = getattr(plan.config, "temperature", 1.0) if temperature is None else temperature
    write_cache(
        folder, teacher, current.states(rows), kind=rows, k=k, bits=bits, batch=batch, temperature=heat,
        recipe=spec.identity(), source=current.source.name,
    )  # fmt: skip
    print(described(folder))


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(help="a finished run")],
    overrides: Overrides = None,
) -> None:
    """Measure a finished student again: potstill evaluate RUN data=jsonl:mine.jsonl"""
    from potstill.use import evaluate_run

    for name, value in evaluate_run(folder, list(overrides or [])).items():
        print(f"{name}: {value:.6g}")


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(help="a finished run")],
    prompt: Annotated[str | None, typer.Argument(help="text to continue, for language models")] = None,
    count: Annotated[int, typer.Option(help="how many samples")] = 4,
    tokens: Annotated[int, typer.Option(help="new tokens a sample")] = 64,
    seed: int = 0,
    output: Annotated[Path | None, typer.Option(help="where images go; default RUN/samples.png")] = None,
) -> None:
    """Sample from a finished student: text to the screen, images to a file."""
    from potstill.use import generate_run

    generate_run(folder, prompt=prompt, count=count, tokens=tokens, seed=seed, output=output)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="a run folder")]) -> None:
    """Write RUN/report.html anew."""
    from potstill.report import build_report

    print(build_report(folder))


@app.command()
def methods(as_json: Annotated[bool, typer.Option("--json", help="the whole list as JSON")] = False) -> None:
    """The 64 systems and their baselines: built or not, and what their claims came to."""
    from potstill.catalogue import systems

    if as_json:
        print(json.dumps([system.row() for system in systems().values()], indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("#", "name", "family", "built", "claim", "title", header_style="bold")
    for s in systems().values():
        table.add_row(str(s.number or ""), s.name, s.family, "yes" if s.built else "", s.verdict() or "", s.title)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


@app.command()
def show(name: Annotated[str, typer.Argument(help="a method, `models` or `parts`")]) -> None:
    """A method's paper, equations, options with defaults, parts, claim and verdict; or what there is to choose from."""
    from potstill.show import show_method, show_models, show_parts

    lists = {"models": show_models, "parts": show_parts}
    lists[name]() if name in lists else show_method(name)


@app.command()
def verify(
    name: Annotated[str, typer.Argument(help="a method with a claim")],
    seeds: Annotated[int | None, typer.Option(help="use only the first seeds")] = None,
    output: Annotated[Path | None, typer.Option(help="folder of the runs; default runs/verify/NAME")] = None,
) -> None:
    """Run a method's claim with paired seeds and record difference, confidence interval and verdict."""
    from potstill.verify import verify_claim

    verify_claim(name, seeds=seeds, output=output)


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="a model folder, a Hugging Face id, or a finished run")],
    host: Annotated[str, typer.Option(help="0.0.0.0 listens to other machines")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8000,
    name: Annotated[str | None, typer.Option(help="what clients call the model; default MODEL")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="choices that are worked on together")] = 32,
    wait: Annotated[float, typer.Option(min=0, help="seconds in which a batch collects")] = 0.005,
    max_logprobs: Annotated[int, typer.Option(min=0, help="the most log-probs a token that may be asked for")] = 1024,
    logprobs_mode: Annotated[
        str, typer.Option(help="raw_logprobs: before temperature and truncation; processed_logprobs: after")
    ] = "raw_logprobs",
    refresh_from: Annotated[
        Path | None, typer.Option(help="folder below which POST /v1/refresh may take new weights")
    ] = None,
) -> None:
    """Serve a causal language model: OpenAI's /v1/completions as vLLM speaks it. POTSTILL_API_KEY, if set, is asked for."""
    from potstill.serving.server import serve as start

    start(
        model, host=host, port=port, name=name, dtype=dtype, device=device, batch=batch, wait=wait,
        max_logprobs=max_logprobs, mode=logprobs_mode, refresh_from=refresh_from,
    )  # fmt: skip


if __name__ == "__main__":
    main()

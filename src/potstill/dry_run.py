"""`--dry-run`: everything resolved, models built without memory, and what the run will take."""

import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from potstill.contracts.batch import Batch, ImageBatch, PromptBatch, TokenBatch
from potstill.models.build import build
from potstill.models.spec import ModelSpec
from potstill.recipe import write
from potstill.run import Plan, Run


def describe(plan: Plan) -> dict[str, Any]:
    """Print the resolved recipe, parameters and memory by role, and a time estimate. Loads no weight."""
    console = Console()
    console.print(write(plan), markup=False, highlight=False)
    run = Run(plan, folder=None)  # type: ignore[arg-type]
    source = run.source
    console.print(f"data: {source.name}, {source.kind}, {len(source.train)} training and {len(source.test)} test rows")
    table = Table("role", "kind", "model", "parameters", "memory", header_style="bold")
    sizes: dict[str, int] = {}
    models: dict[str, Any] = {}
    for role, of in run.roles.items():
        if not run.has(role):
            continue
        specs = run.spec(role)
        for i, spec in enumerate(specs if isinstance(specs, list) else [specs]):
            name = f"{role}.{i}" if isinstance(specs, list) else role
            if not spec.loaded:
                table.add_row(name, of.kind, f"cache {spec.cache}" if spec.cache else f"server {spec.name}", "", "")
                continue
            model = on_meta(run, of.kind, spec, models, adapt=not of.ready)
            models[name] = model
            sizes[name] = sum(p.numel() for p in model.parameters())
            trains = role == "student"
            # weights, and for a trained model its gradient and two moments in float32
            width = {"float32": 4}.get(spec.dtype, 2)
            memory = sizes[name] * (width + (12 if trains else 0))
            table.add_row(
                name, of.kind, spec.name or f"from {spec.from_}", f"{sizes[name]:,}", f"{memory / 2**20:,.0f} MiB"
            )
    console.print(table)
    seconds = estimate(plan, run, models)
    if seconds is not None:
        console.print(
            f"time: about {seconds / 60:.1f} min for {plan.train.steps} steps here (estimated from operation counts)"
        )
    return {"parameters": sizes, "seconds": seconds}


def on_meta(run: Run, kind: str, spec: ModelSpec, models: dict[str, Any], adapt: bool = False) -> Any:
    """A role's model on the meta device: shapes without memory."""
    with torch.device("meta"):
        if spec.from_ is not None:
            origin = models.get(spec.from_) or on_meta(run, kind, run.spec(spec.from_), models)  # type: ignore[arg-type]
            return origin if spec.layers is None else origin.shortened(spec.layers)
        architecture = spec.model_copy(update={"pretrained": False, "compile": False, "checkpointing": False})
        return build(kind, architecture, context=run.context, seed=0, adapt=adapt)


def estimate(plan: Plan, run: Run, models: dict[str, Any]) -> float | None:
    """Seconds of the whole run: operations of one sample (student forward and backward, the others forward) over the
    speed of a matrix product here. Rollouts and data are not counted; None where a batch cannot be shaped."""
    batch = sample_batch(run)
    student = models.get("student")
    if batch is None or student is None:
        return None
    operations = 0.0
    for name, model in models.items():
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            forward(model, batch)
        operations += counter.get_total_flops() * (3 if name == "student" else 1)
    speed = measured_speed(run.device)
    return operations / len(batch) * plan.train.batch * plan.train.steps / speed


def sample_batch(run: Run) -> Batch | None:
    """Two rows of the run's data, without their values."""
    if run.source.kind == "images":
        rows = run.source.train.batch(torch.arange(2))
        return ImageBatch(rows.ids_B.to("meta"), rows.images.to("meta"), rows.labels_B.to("meta"))
    if run.source.kind in ("text", "prompts", "chat"):
        shape = (2, run.plan.data.length)
        ones = torch.ones(shape, dtype=torch.bool, device="meta")
        return TokenBatch(
            torch.zeros(2, dtype=torch.int64, device="meta"),
            torch.zeros(shape, dtype=torch.int64, device="meta"),
            ones,
            ones,
        )
    return None


def forward(model: Any, batch: Batch) -> None:
    if isinstance(batch, ImageBatch):
        model.network(pixel_values=batch.images)
    elif isinstance(batch, TokenBatch | PromptBatch):
        model.network(input_ids=batch.tokens_BT)


def measured_speed(device: torch.device) -> float:
    """Operations a second of a mid-sized float32 matrix product on this device."""
    a = torch.randn(512, 512, device=device)
    a @ a
    began, times = time.perf_counter(), 0
    while time.perf_counter() - began < 0.2:
        a @ a
        times += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 2 * 512**3 * times / (time.perf_counter() - began)

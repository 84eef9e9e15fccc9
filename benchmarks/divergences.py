"""How fast and how lean `linear_divergence` is, beside its peers and beside the matrix products that nobody can avoid.

    pip install -e '.[bench]'
    OMP_WAIT_POLICY=PASSIVE python benchmarks/divergences.py                 # everything, about half an hour
    OMP_WAIT_POLICY=PASSIVE python benchmarks/divergences.py --only jsd      # cases whose name holds a word

Every case runs in a process of its own, with the same inputs, threads and wait policy. It times the four products alone
(student's logits, teacher's logits, gradient of the hidden states, gradient of the head, in chunks of 512 tokens, in
float32) in turns with its own, and reports the best time over their best: a ratio that a busy machine changes little.
Extra memory is the highest resident size during the call above that before it; the gradients that a call must return are in it.
Results go to benchmarks/results/divergences.json, with versions and machine.
"""

import argparse
import ctypes
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "divergences.json"
SIZES = {
    "32k": {"positions": 2048, "vocabulary": 32768, "dtype": "float32"},
    "152k": {"positions": 512, "vocabulary": 151936, "dtype": "float32"},
    "32k-bf16": {"positions": 2048, "vocabulary": 32768, "dtype": "bfloat16"},
    "152k-bf16": {"positions": 512, "vocabulary": 151936, "dtype": "bfloat16"},
}
GROWING = {
    f"{n}x{v}": {"positions": n, "vocabulary": v, "dtype": "float32"}
    for n, v in ((1024, 32768), (4096, 32768), (2048, 65536))
}
MEMBERS = {
    "forward_kl": "ForwardKL",
    "reverse_kl": "ReverseKL",
    "jsd": "JensenShannon",
    "total_variation": "TotalVariation",
    "hellinger": "SquaredHellinger",
    "alpha": "Alpha",
    "skew_reverse_kl": "SkewReverseKL",
    "jeffreys": "Jeffreys",
    "pearson": "PearsonChi2",
    "softened_reverse_kl": "SoftenedReverseKL",
}
STUDENT_WIDTH, TEACHER_WIDTH, CHUNK = 512, 1024, 512


def cases() -> dict[str, str]:
    """Name -> size, of everything that is measured."""
    named: dict[str, str] = {}
    for size in SIZES:
        for member in MEMBERS if size == "32k" else list(MEMBERS)[:6]:
            named[f"potstill/{member}/compiled/{size}"] = size
        for member in ("forward_kl", "reverse_kl", "jsd") if size == "32k" else ("jsd",):
            named[f"potstill/{member}/eager/{size}"] = size
            named[f"plain/{member}/held/{size}"] = size
            named[f"trl-chunked/{member}/eager/{size}"] = size
        for peer in ("trl-gkd/jsd/held", "liger/jsd/eager", "liger/jsd/compiled"):
            named[f"{peer}/{size}"] = size
    for what in ("half_weights", "top64_bucket", "known64_bucket", "known64_renormalize"):
        named[f"potstill/jsd-{what}/compiled/32k"] = "32k"
    for size in GROWING:
        named[f"potstill/jsd/compiled/{size}"] = size
    return named


def measure(name: str, repeats: int) -> dict[str, Any]:
    """One case in this process."""
    import torch

    who, what, how, size = name.split("/")
    shape = (SIZES | GROWING)[size]
    n, v, dtype = shape["positions"], shape["vocabulary"], getattr(torch, shape["dtype"])
    draw = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(rows, columns, generator=draw).mul_(scale).to(dtype)
        for rows, columns, scale in (
            (n, STUDENT_WIDTH, 3 * STUDENT_WIDTH**-0.5), (v, STUDENT_WIDTH, 1.0),
            (n, TEACHER_WIDTH, 3 * TEACHER_WIDTH**-0.5), (v, TEACHER_WIDTH, 1.0),
        )
    ]  # fmt: skip
    leaves = [x.requires_grad_() for x in inputs[:2]]
    call = {"potstill": potstill, "plain": plain, "trl-chunked": trl_chunked, "trl-gkd": trl_gkd, "liger": liger}[who](
        what, how, *inputs
    )

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        call().backward()

    started = time.perf_counter()
    run()
    first = time.perf_counter() - started
    for leaf in leaves:
        leaf.grad = None
    extra = peak_above(run)
    products = products_alone([x.detach().float() for x in inputs])  # float32 is the faster type on these processors
    products()
    pairs = [(timed(products), timed(run)) for _ in range(repeats)]  # in turns: a machine's speed wanders
    reference, seconds = (min(times) for times in zip(*pairs, strict=True))
    return {
        "case": name, **shape, "seconds": seconds, "products": reference, "ratio": seconds / reference,
        "extra_mb": extra / 2**20, "head_gradient_mb": v * STUDENT_WIDTH * dtype.itemsize / 2**20, "first_call": first,
    }  # fmt: skip


def products_alone(inputs: list[Any]) -> Callable[[], None]:
    import torch

    hidden, head, theirs, table = inputs

    def run() -> None:
        gradient_h, gradient_w = torch.empty_like(hidden), torch.zeros_like(head)
        rows, rows_t = torch.empty(CHUNK, len(head)), torch.empty(CHUNK, len(head))
        for start in range(0, len(hidden), CHUNK):
            some = slice(start, start + CHUNK)
            torch.mm(hidden[some], head.T, out=rows)
            torch.mm(theirs[some], table.T, out=rows_t)
            torch.mm(rows, head, out=gradient_h[some])
            gradient_w.addmm_(rows.T, hidden[some])

    return run


def potstill(what: str, how: str, hidden: Any, head: Any, theirs: Any, table: Any) -> Callable[[], Any]:
    import torch

    import potstill.divergences as family
    from potstill.contracts.signals import HiddenAndHead, TopKLogp

    member, _, variant = what.partition("-")
    options: dict[str, Any] = {"teacher": HiddenAndHead(theirs, table), "compiled": how == "compiled"}
    if variant == "half_weights":
        options["weights"] = (torch.arange(len(hidden)) % 2).float()
    if variant == "top64_bucket":
        options["support"] = family.TopK(64)
    if variant.startswith("known64"):
        known = [torch.log_softmax((some @ table.T).float(), -1).topk(64) for some in theirs.split(256)]
        options["teacher"] = TopKLogp(torch.cat([k.values for k in known]), torch.cat([k.indices for k in known]))
        options["support"] = family.TopK(64, tail=variant.partition("_")[2])
    divergence = getattr(family, MEMBERS[member])()
    return lambda: family.linear_divergence(divergence, hidden, head, **options).total / len(hidden)


def plain(what: str, how: str, hidden: Any, head: Any, theirs: Any, table: Any) -> Callable[[], Any]:
    import torch

    import potstill.divergences as family

    divergence = getattr(family, MEMBERS[what])()

    def call() -> Any:
        with torch.no_grad():
            log_p = family.log_probs(theirs @ table.T)
        return divergence(teacher_logp=log_p, student_logp=family.log_probs(hidden @ head.T)).mean()

    return call


BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}


def trl_chunked(what: str, how: str, hidden: Any, head: Any, theirs: Any, table: Any) -> Callable[[], Any]:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    apply = ChunkedDivergenceFunction.apply
    return lambda: apply(hidden, head, None, theirs, table, None, BETA[what])[0].sum() / len(hidden)


def trl_gkd(what: str, how: str, hidden: Any, head: Any, theirs: Any, table: Any) -> Callable[[], Any]:
    import torch
    from trl.experimental.gkd import GKDTrainer

    def call() -> Any:
        with torch.no_grad():
            teacher = theirs @ table.T
        return GKDTrainer.generalized_jsd_loss((hidden @ head.T)[None], teacher[None], beta=BETA[what])

    return call


def liger(what: str, how: str, hidden: Any, head: Any, theirs: Any, table: Any) -> Callable[[], Any]:
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=how == "compiled")
    labels = torch.zeros(len(hidden), dtype=torch.int64)
    return lambda: loss(hidden, head, theirs, table, labels)


def timed(function: Callable[[], None]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def peak_above(function: Callable[[], None]) -> int:
    """Bytes of the highest resident size during a call above that before it (Linux)."""

    def status(key: str) -> int:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
        return int(line.split()[1]) * 1024

    ctypes.CDLL(None).malloc_trim(0)  # what was freed before counts as free
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    function()
    return max(0, status("VmHWM") - before)


def named(only: str, cases: Iterable[str]) -> list[str]:
    """The case of this name, else those whose name holds it."""
    cases = list(cases)
    return [only] if only in cases else [name for name in cases if only in name]


def machine(threads: int) -> dict[str, Any]:
    models = [
        x.partition(":")[2].strip()
        for x in Path("/proc/cpuinfo").read_text().splitlines()
        if x.startswith("model name")
    ]
    versions = {}
    for package in ("torch", "trl", "liger-kernel", "transformers", "POT", "geomloss"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "processor": models[0] if models else platform.processor(),
        "threads": threads,
        "python": platform.python_version(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        "large_pages": os.environ.get("THP_MEM_ALLOC_ENABLE", ""),
        "versions": versions,
    }


def table_of(results: list[dict[str, Any]]) -> str:
    lines = [
        "| case | seconds | against the products | extra memory, MB | head's gradient, MB |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['case']} | {r['seconds']:.2f} | {r['ratio']:.2f} | {r['extra_mb']:.0f} | {r['head_gradient_mb']:.0f} |"
        if "error" not in r
        else f"| {r['case']} | {r['error']} | | | |"
        for r in results
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="measure the case of this name, else those whose name holds it")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        import torch

        torch.set_num_threads(options.threads)
        print(json.dumps(measure(options.one, options.repeats)))
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as `potstill` does: large pages, for everybody
    kept = json.loads(RESULTS.read_text())["results"] if RESULTS.is_file() and options.only else []
    results = {r["case"]: r for r in kept}
    chosen = named(options.only, cases())
    for i, name in enumerate(chosen):
        command = [
            sys.executable,
            __file__,
            "--one",
            name,
            "--repeats",
            str(options.repeats),
            "--threads",
            str(options.threads),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            result = {"case": name, "error": (done.stderr.strip().splitlines() or ["no output"])[-1][:200]}
        else:
            result = json.loads(done.stdout.strip().splitlines()[-1])
        results[name] = result
        print(f"{i + 1}/{len(chosen)}", table_of([result]).splitlines()[-1], flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(
            json.dumps({"machine": machine(options.threads), "results": list(results.values())}, indent=1) + "\n"
        )
    print(table_of(list(results.values())))


if __name__ == "__main__":
    main()

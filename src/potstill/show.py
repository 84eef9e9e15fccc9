"""`potstill show`: a method, the packaged networks, or the named parts, as they stand in the code."""

import ast
import dataclasses
import inspect
import io
import sys
import textwrap
import tokenize
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from potstill.catalogue import System, find, load_method
from potstill.contracts.errors import MissingExtra
from potstill.contracts.spec import members, written

PLUMBING = ("contracts", "methods", "run", "catalogue", "training", "assets")  # what every method imports
FAMILIES = {  # of parts that a recipe writes by name
    "divergences: how far apart teacher and student are at a position": "potstill.divergences:FDivergence",
    "supports: the outcomes compared at a position": "potstill.divergences:Support",
    "estimators: a divergence's exact value, or a gradient from sampled tokens": "potstill.divergences:Estimator",
    "weightings: which positions count": "potstill.weighting:Weighting",
}


def show_method(name: str, console: Console | None = None) -> None:
    """Print a method: paper, equations, options, roles, parts, recipe, claim and verdict."""
    system, out = find(name), console or _console()
    out.print(Text(system.title, style="bold"))
    source = f"arXiv {system.arxiv}, https://arxiv.org/abs/{system.arxiv}" if system.arxiv else "no paper of its own"
    out.print(Text(f"{name} · {system.family} · {source}", style="dim"))
    if not system.built:
        out.print("\nIn the catalogue, but not built yet. `potstill methods` lists what is.", markup=False)
        return
    method = load_method(name)
    out.print()
    out.print(Padding(Text(method.doc), (0, 2)))
    _heading(out, "Options, with the paper's defaults")
    rows = list(options(method.config))
    _grid(out, ("option", "type", "default", "what it is"), rows) if rows else out.print("  none")
    _heading(out, "Takes")
    _grid(out, ("role", "kind", ""), [(role, _kind(of), _manner(of)) for role, of in method.roles.items()])
    out.print(f"  data: {' or '.join(method.data)}", markup=False)
    _heading(out, "Made of")
    for floor, names in parts_used(inspect.getsource(sys.modules[method.run.__module__])).items():
        out.print(Text(f"  {floor}: {', '.join(names)}"))
    _heading(out, "Recipe")
    out.print(f"  potstill run {system.recipe}" if system.recipe else "  none shipped yet", markup=False)
    _claim(out, system)


def show_models(console: Console | None = None) -> None:
    """Print the packaged networks by kind, with their options; `name: PATH_OR_ID` takes any other of the kind."""
    from potstill.models.build import ADAPTERS, adapter

    out = console or _console()
    for kind in ADAPTERS:
        _heading(out, kind)
        try:
            packaged = adapter(kind).PACKAGED  # type: ignore[attr-defined]
        except MissingExtra as missing:
            out.print(Text(f"  {missing}"))
            continue
        rows = [(name, *factory_options(make)) for name, make in packaged.items()]
        _grid(out, ("name", "options", "from the data"), rows) if rows else out.print("  none packaged")


def show_parts(console: Console | None = None) -> None:
    """Print the parts that a recipe writes by name, with their options."""
    out = console or _console()
    for title, place in FAMILIES.items():
        module, _, base = place.partition(":")
        _heading(out, title)
        rows = []
        for name, part in sorted(members(getattr(import_module(module), base)).items()):
            given = [f"{f.name}={_value(_default(f))}" for f in dataclasses.fields(part) if f.init]
            rows.append((name, ", ".join(given), (inspect.getdoc(part) or "").partition("\n")[0]))
        _grid(out, ("name", "options", ""), rows)


def options(config: type[BaseModel], prefix: str = "") -> list[tuple[str, str, str, str]]:
    """(name, type, default, comment) of every option; those of a nested section under dotted names."""
    from potstill.recipe import type_name

    comments, rows = field_comments(config), []
    for name, field in config.model_fields.items():
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            rows += options(type(default), f"{prefix}{name}.")
            continue
        shown = "required" if field.is_required() else _value(default)
        what = field.description or comments.get(name, "")
        rows.append((prefix + name, type_name(field.annotation) + _bounds(field), shown, what))
    return rows


def field_comments(config: type) -> dict[str, str]:
    """The comment beside each field in the source of a config class, its bases included."""
    found: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        if not (issubclass(cls, BaseModel) and cls.__module__.startswith("potstill.")):
            continue
        source = textwrap.dedent(inspect.getsource(cls))
        fields = [n for n in ast.parse(source).body[0].body if isinstance(n, ast.AnnAssign)]  # type: ignore[attr-defined]
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                said = [part.strip() for part in token.string.split("#")]
                text = " ".join(part for part in said if part and not part.startswith(("type:", "fmt:", "noqa")))
                for field in fields:
                    if text and field.lineno <= token.start[0] <= (field.end_lineno or field.lineno):
                        name = field.target.id  # type: ignore[union-attr]
                        found[name] = f"{found[name]} {text}" if name in found else text
    return found


def parts_used(source: str) -> dict[str, list[str]]:
    """What a method's source imports from the floors below it: floor -> names."""
    used: dict[str, list[str]] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("potstill."):
            floor = str(node.module).split(".")[1]
            if floor not in PLUMBING:
                used.setdefault(floor, []).extend(alias.name for alias in node.names)
    return {floor: sorted(names, key=str.lower) for floor, names in sorted(used.items())}


def factory_options(factory: Any) -> tuple[str, str]:
    """A packaged network's options with defaults, and what it must be told by the data source."""
    parameters = inspect.signature(factory).parameters
    own = [f"{n}={_value(p.default)}" for n, p in parameters.items() if p.default is not p.empty and n != "name"]
    return ", ".join(own), ", ".join(n for n, p in parameters.items() if p.default is p.empty)


def _claim(out: Console, system: System) -> None:
    from potstill.verify import load_claim, recorded

    _heading(out, "Claim")
    if not system.has_claim:
        out.print("  none written yet")
        return
    claim, outcome = load_claim(system.name), recorded(system.name)
    out.print(Padding(Text(f"{claim.statement}\n{claim.source}"), (0, 2)))
    if outcome is None:
        out.print(f"  not run yet: potstill verify {system.name}", markup=False)
        return
    out.print(Text(f"  {outcome['verdict']}", style="bold"))
    for c in outcome["comparisons"]:
        other = c["worse"] if c["worse"] is not None else f"{c['reference']:g}"
        gap = f"{c['difference']:+.4g} [{c['low']:+.4g}, {c['high']:+.4g}]"
        out.print(Text(f"  {c['better']} over {other} on {c['metric']}: {gap}, {c['pairs']} pairs: {c['verdict']}"))


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 130, highlight=False)


def _heading(out: Console, text: str) -> None:
    out.print()
    out.print(Text(text, style="bold"))


def _grid(out: Console, head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title in head:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    out.print(Padding(table, (0, 0, 0, 2)))


def _kind(role: Any) -> str:
    kinds = [role.kind, *(f"{kind} for {data}" for data, kind in role.by_data.items())]
    return f"list of {' or '.join(kinds)}" if role.many else " or ".join(kinds)


def _manner(role: Any) -> str:
    manner = "trained weights" if role.ready else "fresh weights, unless the recipe says otherwise"
    return f"optional; {manner}" if role.optional else manner


def _bounds(field: FieldInfo) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = [
        f"{s} {getattr(m, k):g}" for m in field.metadata for k, s in signs.items() if getattr(m, k, None) is not None
    ]
    return f" {', '.join(found)}" if found else ""


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return "required" if field.default is dataclasses.MISSING else field.default


def _value(value: Any) -> str:
    """A default as a recipe would write it, on one line."""
    value = written(value)
    if isinstance(value, tuple):
        value = list(value)
    if not isinstance(value, str | int | float | bool | list | Mapping | None):
        return getattr(value, "__name__", str(value))
    return (
        yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000)
        .removesuffix("\n")
        .removesuffix("\n...")
    )

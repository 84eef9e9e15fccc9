"""The catalogue: which systems exist in the field, which are built here, and what their claims came to. No torch."""

import json
import tomllib
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from potstill.contracts.errors import RecipeError, did_you_mean

HERE = Path(__file__).parent


@dataclass(frozen=True)
class System:
    """One row: a numbered system, or a baseline (number None)."""

    number: int | None
    name: str
    family: str
    title: str
    arxiv: str

    @property
    def module(self) -> str:
        return f"potstill.methods.{self.family}.{self.name}"

    @property
    def built(self) -> bool:
        return (HERE / "methods" / self.family / f"{self.name}.py").is_file()

    @property
    def recipe(self) -> str | None:
        return self.name if (HERE / "recipes" / f"{self.name}.yaml").is_file() else None

    @property
    def has_claim(self) -> bool:
        return (HERE / "claims" / f"{self.name}.yaml").is_file()

    def verdict(self) -> str | None:
        """reproduced, not reproduced or inconclusive; None while the claim has not been run."""
        result = HERE / "claims" / f"{self.name}.result.json"
        return json.loads(result.read_text())["verdict"] if result.is_file() else None

    def row(self) -> dict[str, Any]:
        """The row of `potstill methods --json`."""
        return {**asdict(self), "built": self.built, "recipe": self.recipe, "claim": {"verdict": self.verdict()}}


@cache
def systems() -> dict[str, System]:
    """Every system and baseline by name, in the catalogue's order."""
    table = tomllib.loads((HERE / "catalogue.toml").read_text())
    rows = [System(**row) for row in table["system"]] + [System(number=None, **row) for row in table["baseline"]]
    return {row.name: row for row in rows}


def find(name: str) -> System:
    """The system of a name, or one sentence with the nearest."""
    if name not in systems():
        raise RecipeError(f"{name} is no method.{did_you_mean(name, systems())} See: potstill methods")
    return systems()[name]


def load_method(name: str) -> "Any":
    """Import the one module that holds a method and return its registration (see potstill.methods.Method)."""
    system = find(name)
    if not system.built:
        built = ", ".join(s.name for s in systems().values() if s.built)
        raise RecipeError(f"{name} ({system.title}) is in the catalogue but not built yet. Built: {built}.")
    return import_module(system.module).METHOD

"""`data` of a recipe: a packaged task by name with its options, or the user's own files and data sets.

    data: fashion_mnist                          data: {task: fashion_mnist, size: 2000}
    data: jsonl:mine.jsonl                       data: {jsonl: mine.jsonl, length: 128}

The options of a source are its loader's own arguments, so a new loader is one line here.
"""

import inspect
import json
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

from pydantic import Field, ValidationError, create_model

from potstill.contracts.errors import DataError, RecipeError, did_you_mean
from potstill.contracts.spec import Spec
from potstill.tasks.base import Source

TASKS = {
    "fashion_mnist": "potstill.tasks.images:fashion_mnist",
    "mnist5k": "potstill.tasks.images:mnist5k",
    "digits": "potstill.tasks.images:digits",
    "english": "potstill.tasks.text:english",
    "bible": "potstill.tasks.text:bible",
    "reasoning_gym": "potstill.tasks.reasoning:reasoning_gym",
    "arithmetic": "potstill.tasks.arithmetic:arithmetic",
    "rewriting": "potstill.tasks.rewriting:rewriting",
    "debate": "potstill.tasks.debate:debate",
    "calculator": "potstill.tasks.agents:calculator",
    "jugs": "potstill.tasks.agents:jugs",
    "functions": "potstill.tasks.agents:functions",
    "facts": "potstill.tasks.facts:facts",
    "mixture": "potstill.tasks.mixture:mixture",
    "b3db": "potstill.tasks.molecules:b3db",
    "synthetic_rings": "potstill.tasks.molecules:synthetic_rings",
}
OWN = {
    "text": "potstill.tasks.text:text_files",
    "jsonl": "potstill.tasks.text:jsonl",
    "imagefolder": "potstill.tasks.images:imagefolder",
    "hf": "potstill.tasks.text:hub_rows",
}


class DataSpec(Spec):
    """Where the data is and how it is cut. Subclasses, one a loader, add the loader's options."""

    tag: ClassVar[str]  # the key that names the source: task, text, jsonl, imagefolder or hf
    loader: ClassVar[Callable[..., Source]]
    length: int = Field(64, ge=2)  # language only: tokens of a row
    prompt_length: int = Field(16, ge=1)  # language only: tokens of a prompt at most; the rest is for its completion

    def arguments(self) -> dict[str, Any]:
        """The loader's arguments. (Not `options`: a loader has an argument of that name.)"""
        own = set(DataSpec.model_fields) | {"task"}
        return {name: getattr(self, name) for name in type(self).model_fields if name not in own}


@cache
def spec_class(key: str, name: str) -> type[DataSpec]:
    """The schema of one source: its loader's signature. key is `task` or one of OWN."""
    module, _, function = (TASKS[name] if key == "task" else OWN[key]).partition(":")
    loader = getattr(import_module(module), function)
    hints = get_type_hints(loader)
    fields: dict[str, Any] = {"task": (str, name)} if key == "task" else {}
    for i, (option, parameter) in enumerate(inspect.signature(loader).parameters.items()):
        is_path = key != "task" and i == 0
        shown = key if is_path else option
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[shown] = (str if is_path else hints.get(option, Any), default)
    made = create_model(f"data {name or key}", __base__=DataSpec, **fields)
    made.tag, made.loader = key, staticmethod(loader)
    return made


def parse(text: str) -> dict[str, Any]:
    """The mapping that a string form stands for: a task's name, or `jsonl:/path`."""
    key, colon, rest = text.partition(":")
    if colon and key in OWN:
        return {key: rest}
    if colon:
        raise RecipeError(f"data: {key}: is no kind of source.{did_you_mean(key, OWN)}")
    return {"task": text}


def validate(data: Any) -> DataSpec:
    """A recipe's `data`, checked: the source exists, its options are known and typed, its files are there."""
    given = parse(data) if isinstance(data, str) else data
    if not isinstance(given, Mapping):
        raise RecipeError(f"data must be a name or a mapping, got {data!r}.")
    keys = [key for key in ("task", *OWN) if key in given]
    if len(keys) != 1:
        hints = [did_you_mean(str(key), ("task", *OWN)) for key in given] if not keys else []
        hint = next((hint for hint in hints if "Did you mean" in hint), "")
        raise RecipeError(
            f"data needs exactly one of {', '.join(('task', *OWN))}, got {', '.join(keys) or 'none'}.{hint}"
        )
    key, value = keys[0], given[keys[0]]
    if key == "task" and value not in TASKS:
        raise RecipeError(
            f"data: {value} is no packaged task.{did_you_mean(str(value), TASKS)} Own files: jsonl:PATH and others."
        )
    if key in ("text", "jsonl", "imagefolder") and not Path(str(value)).expanduser().exists():
        raise DataError(f"data: {value} does not exist.")
    cls = spec_class(key, str(value) if key == "task" else "")
    try:
        return cls.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(["data", *map(str, first["loc"])])
        if first["type"] == "extra_forbidden":
            known = [name for name in cls.model_fields if name != "task"]
            raise RecipeError(f"{where} is no option of {value}.{did_you_mean(str(first['loc'][-1]), known)}") from None
        message = first["msg"]
        raise RecipeError(f"{where}: {message[0].lower()}{message[1:]}, got {first['input']!r}.") from None


def load(spec: DataSpec) -> Source:
    """The source of a spec. Loaded once a process for equal specs."""
    return _loaded(type(spec), json.dumps(spec.arguments(), sort_keys=True))


@lru_cache(maxsize=4)
def _loaded(cls: type[DataSpec], options: str) -> Source:
    given = json.loads(options)
    if cls.tag == "task":
        return cls.loader(**given)
    return cls.loader(given.pop(cls.tag), **given)

"""Recipes: YAML and `key.path=value` overrides, validated against one schema into a `Plan`.

Whatever is wrong is said before any weight is loaded: the key's path, what was expected, and the nearest valid name.
"""

import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from potstill.catalogue import HERE, load_method
from potstill.contracts.errors import RecipeError, did_you_mean
from potstill.methods import Method
from potstill.models.spec import ModelSpec
from potstill.run import EvalSpec, Plan
from potstill.tasks.sources import parse, validate
from potstill.training.spec import TrainSpec

SECTIONS = ("method", "data", "train", "eval", "output")


def read(name: str, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The raw recipe of a shipped name, a YAML file or a run folder, with overrides applied."""
    path = Path(name)
    shipped = HERE / "recipes" / f"{name}.yaml"
    if path.is_dir() and (path / "recipe.yaml").is_file():
        path = path / "recipe.yaml"
    elif path.is_dir():
        raise RecipeError(f"{name} is a folder without a recipe.yaml: not a run.")
    elif shipped.is_file() and path.suffix not in (".yaml", ".yml"):
        path = shipped
    elif not path.is_file():
        known = sorted(p.stem for p in (HERE / "recipes").glob("*.yaml"))
        raise RecipeError(f"{name} is neither a shipped recipe nor a file.{did_you_mean(name, known)}")
    try:
        raw = yaml.safe_load(path.read_text())
    except yaml.YAMLError as cause:
        raise RecipeError(f"{path} is not valid YAML: {' '.join(str(cause).split())}") from cause
    if not isinstance(raw, dict) or "method" not in raw:
        raise RecipeError(f"{path} must be a mapping with a `method`.")
    return apply(raw, overrides)


def apply(raw: Mapping[str, Any], overrides: Iterable[str] | Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with `key.path=value` set (values are YAML). A part or model written as a name keeps it."""
    recipe = _copy(raw)
    pairs = overrides.items() if isinstance(overrides, Mapping) else [_pair(o) for o in overrides]
    for key, value in pairs:
        at = recipe
        *way, last = key.split(".")
        for i, step in enumerate(way):
            inner = at.get(step)
            if isinstance(inner, str):
                inner = parse(inner) if way[: i + 1] == ["data"] else {"name": inner}
            elif inner is None:
                inner = {}
            elif not isinstance(inner, dict):
                raise RecipeError(f"{key}: {'.'.join(way[: i + 1])} is {inner!r}, not a mapping.")
            at[step] = inner
            at = inner
        at[last] = value
    return recipe


def _pair(override: str) -> tuple[str, Any]:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"{override} is not of the form key.path=value.")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as cause:
        raise RecipeError(f"{override}: the value is not valid YAML. Quote it.") from cause


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value


def resolve(raw: Mapping[str, Any], where: str = "recipe") -> Plan:
    """Validate a raw recipe into a Plan."""
    named = raw["method"] if isinstance(raw["method"], dict) else {"name": raw["method"]}
    if not isinstance(named.get("name"), str):
        raise RecipeError(f"{where}: method needs a name.")
    method: Method = load_method(named["name"])
    for key in raw:
        if key not in SECTIONS and key not in method.roles:
            known = [*SECTIONS, *method.roles]
            raise RecipeError(
                f"{where}: {key} is neither a section nor a role of {method.name} (its roles: "
                f"{', '.join(method.roles) or 'none'}).{did_you_mean(key, known)}"
            )
    config = _validate(method.config, {k: v for k, v in named.items() if k != "name"}, f"{where}: method")
    models = {role: _model(raw[role], role, method, where) for role in method.roles if raw.get(role) is not None}
    if "data" not in raw:
        raise RecipeError(f"{where}: data is missing. {method.name} takes {' or '.join(method.data)}.")
    data = validate(raw["data"])
    train = _validate(TrainSpec, raw.get("train") or {}, f"{where}: train")
    evaluation = _validate(EvalSpec, raw.get("eval") or {}, f"{where}: eval")
    written = {
        "method": {"name": method.name, **config.model_dump(mode="json")},
        **{role: _dump(spec) for role, spec in models.items()},
        "data": {"task": data.model_dump()["task"]} | _dump(data) if data.tag == "task" else _dump(data),
        "train": train.model_dump(mode="json"),
        "eval": evaluation.model_dump(mode="json"),
    }
    return Plan(method, config, models, data, train, evaluation, written)


def _model(value: Any, role: str, method: Method, where: str) -> ModelSpec | list[ModelSpec]:
    many = method.roles[role].many
    if isinstance(value, list) != many:
        raise RecipeError(f"{where}: {role} of {method.name} takes {'a list of models' if many else 'one model'}.")
    values = value if many else [value]
    specs = [_validate(ModelSpec, v, f"{where}: {role}") for v in values]
    return specs if many else specs[0]


def _dump(spec: Any) -> Any:
    if isinstance(spec, list):
        return [_dump(s) for s in spec]
    return spec.model_dump(mode="json", exclude_defaults=True, by_alias=True)


def _validate(model: type[BaseModel], value: Any, where: str) -> Any:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise RecipeError(_sentence(error, where, model)) from None


def _sentence(error: ValidationError, where: str, model: type[BaseModel] | None) -> str:
    """The first error of pydantic, as a person would say it."""
    first = error.errors(include_url=False)[0]
    loc = [str(part) for part in first["loc"] if not str(part).startswith(("tagged-", "function-"))]
    path = ".".join([where, *loc]) if loc else where
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        owner = _owner(model, loc[:-1])
        known = {(f.alias or n): f for n, f in owner.model_fields.items()} if owner else {}
        hint = did_you_mean(loc[-1], known)
        guess = hint.removeprefix(" Did you mean ").removesuffix("?")
        if guess in known:
            hint = f" Did you mean {guess} ({_describe(known[guess])})?"
        return f"{path} is not a field{f' of {owner.__name__}' if owner else ''}.{hint}"
    if first["type"] == "missing":
        return f"{path} is missing."
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{path}: {message}"
    return f"{path}: {message[0].lower()}{message[1:]}, got {first['input']!r}."


def _owner(model: type[BaseModel] | None, loc: list[str]) -> type[BaseModel] | None:
    """The model that a path within another one leads to."""
    for step in loc:
        field = model.model_fields.get(step) if model else None
        inner = [field.annotation, *get_args(field.annotation)] if field else []
        model = next((a for a in inner if isinstance(a, type) and issubclass(a, BaseModel)), None)
    return model


def _describe(field: Any) -> str:
    default = "" if field.is_required() else f", default {field.get_default(call_default_factory=True)!r}"
    return f"{type_name(field.annotation)}{default}"


def type_name(annotation: Any) -> str:
    """A type as a person would write it."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(a) for a in get_args(annotation))
    if annotation is type(None):
        return "null"
    if origin is not None and str(origin).endswith("Literal"):
        return " | ".join(str(a) for a in get_args(annotation))
    if origin in (list, tuple, dict):
        return f"{origin.__name__} of {', '.join(type_name(a) for a in get_args(annotation))}"
    return getattr(annotation, "__name__", str(annotation))


def write(plan: Plan) -> str:
    """The resolved recipe as YAML: what stands in a run folder and can be run again."""
    return yaml.safe_dump(dict(plan.written), sort_keys=False, allow_unicode=True)


def shipped() -> list[str]:
    return sorted(p.stem for p in (HERE / "recipes").glob("*.yaml"))

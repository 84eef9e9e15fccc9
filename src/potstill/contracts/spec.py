"""Config models that refuse unknown keys, and parts written by name in a recipe.

A part is a frozen dataclass: `divergence: ReverseKL`, or `divergence: {name: JensenShannon, teacher_share: 0.1}`.
"""

import dataclasses
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, GetPydanticSchema, TypeAdapter, ValidationError
from pydantic_core import core_schema

from potstill.contracts.errors import did_you_mean


class Spec(BaseModel):
    """A piece of a recipe: frozen, with unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, arbitrary_types_allowed=True)


class MethodConfig(Spec):
    """Base of the methods' options. Field defaults are the paper's; the laptop's are in the recipe."""


def members(base: type) -> dict[str, type]:
    """Every concrete dataclass below `base`, by class name."""
    found: dict[str, type] = {}
    sub: type
    for sub in base.__subclasses__():
        if dataclasses.is_dataclass(sub):
            found[sub.__name__] = sub
        found.update(members(sub))
    return found


def _resolve(base: type, value: Any) -> Any:
    if isinstance(value, base):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict) or "name" not in value:
        raise ValueError(f"expected the name of a {base.__name__}, or a mapping with a name and its options")
    options = {k: v for k, v in value.items() if k != "name"}
    known = members(base)
    if value["name"] not in known:
        raise ValueError(f"{value['name']} is no {base.__name__}.{did_you_mean(str(value['name']), known)}")
    cls = known[value["name"]]
    fields = {f.name for f in dataclasses.fields(cls) if f.init}
    for option in options:
        if option not in fields:
            raise ValueError(f"{option} is not an option of {cls.__name__}.{did_you_mean(option, fields)}")
    hints = get_type_hints(cls)
    for option, given in options.items():
        if _plain(hints[option]):
            try:
                options[option] = TypeAdapter(hints[option]).validate_python(given)
            except ValidationError:
                kind = hints[option].__name__ if isinstance(hints[option], type) else str(hints[option])
                raise ValueError(f"{cls.__name__}.{option} must be {kind}, got {given!r}") from None
        elif (isinstance(given, dict) and "name" in given) or isinstance(given, str):
            for family in PARTS:  # a combinator's member is a part of its own
                if str(given["name"] if isinstance(given, dict) else given) in members(family):
                    options[option] = _resolve(family, given)
    return cls(**options)


def _plain(hint: Any) -> bool:
    """Numbers, words, and lists or alternatives of them: what a recipe can write without naming a part."""
    if hint in (int, float, bool, str, type(None), Ellipsis):
        return True
    return get_origin(hint) in (Union, UnionType, tuple, list) and all(map(_plain, get_args(hint)))


def written(part: Any) -> Any:
    """A part as the recipe writes it: its name, or a mapping when it has options."""
    if not dataclasses.is_dataclass(part):
        return part
    options = {f.name: written(getattr(part, f.name)) for f in dataclasses.fields(part) if f.init and f.repr}
    return {"name": type(part).__name__, **options} if options else type(part).__name__


PARTS: list[type] = []  # families of parts that may nest in one another


def Part(base: type) -> Any:
    """The pydantic type of a part: an instance of `base`, its name, or a mapping with name and options."""
    if base not in PARTS:
        PARTS.append(base)
    schema = core_schema.no_info_plain_validator_function(
        lambda value: _resolve(base, value),
        serialization=core_schema.plain_serializer_function_ser_schema(written),
    )
    return Annotated[base, GetPydanticSchema(lambda _source, _handler: schema)]

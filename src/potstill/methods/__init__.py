"""One file per paper: `methods/<family>/<name>.py`. This module holds the decorator that makes a function a method."""

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_type_hints

from potstill.catalogue import find
from potstill.contracts.spec import MethodConfig

Kind = Literal["causal_lm", "masked_lm", "image_classifier", "denoiser", "graph_classifier"]


@dataclass(frozen=True)
class Role:
    """What a method asks for. `ready`: the model must be trained; a packaged network is then trained on the task first."""

    kind: Kind
    ready: bool = True
    optional: bool = False
    many: bool = False  # the recipe gives a list
    by_data: Mapping[str, Kind] = field(default_factory=dict, hash=False)  # another kind of model, by kind of data

    def on(self, data: str) -> "Role":
        """The role where the data is of this kind."""
        return replace(self, kind=self.by_data.get(data, self.kind))


@dataclass(frozen=True)
class Method:
    """A registered method: the paper's algorithm, its options, the roles and the kinds of data that it takes."""

    name: str
    run: Callable[..., Any]
    config: type[MethodConfig]
    roles: dict[str, Role]
    data: tuple[str, ...] = field(default=())

    @property
    def doc(self) -> str:
        return inspect.getdoc(sys.modules[self.run.__module__]) or ""


def method(name: str, *, data: str | tuple[str, ...], **roles: Kind | Role) -> Callable[[Callable[..., Any]], Any]:
    """Register `function(run, config)` as the method `name`: title, arXiv id and family come from the catalogue.

    Roles are keyword arguments, by type: `student="causal_lm"` (fresh weights unless the recipe says otherwise),
    `teacher="causal_lm"` and any other name (trained weights), or a `Role` for the finer points.
    """
    find(name)
    of_type = {k: v if isinstance(v, Role) else Role(v, ready=k != "student") for k, v in roles.items()}

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        config = get_type_hints(function)["config"]
        kinds = (data,) if isinstance(data, str) else data
        sys.modules[function.__module__].METHOD = Method(name, function, config, of_type, kinds)  # type: ignore[attr-defined]
        return function

    return register

"""How a recipe names a model: packaged, from a Hugging Face folder or id, or cut from another role."""

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from potstill.contracts.spec import Spec


class LoraSpec(Spec):
    """Low-rank adapters through peft; merged when the student is exported."""

    r: int = Field(16, gt=0)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[str] | Literal["all-linear"] = "all-linear"


class ServedSpec(Spec):
    """How a model behind an address is asked; see `serving.client`."""

    model: str | None = None  # its name at the server; None where there is one only
    k: int = Field(64, gt=0)  # likeliest tokens that a teacher gives
    key: str = "POTSTILL_API_KEY"  # the environment variable that holds the key
    rows: int = Field(8, gt=0)  # prompts a request
    concurrency: int = Field(8, gt=0)  # requests at a time
    timeout: float = Field(120.0, gt=0)  # seconds an answer may take
    patience: float = Field(300.0, ge=0)  # seconds for which a failing request is asked again

    @field_validator("key")
    @classmethod
    def _a_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
            raise ValueError(
                "names an environment variable, and this is no name of one. Never write a key in a recipe."
            )
        return value


class ModelSpec(Spec):
    """One role's model. A plain string in the recipe is `name`.

    `name` is a packaged network (`potstill show models`) or else a Hugging Face folder or id; `from` takes another
    role's weights, whole or `layers` of it (a number spreads them evenly, a list names them). `cache` is a folder of a
    teacher's answers (`potstill cache`), which stand for its weights; a name beside it says whose they must be. A
    teacher's name may also be the address of a server, http://host:8000/v1.
    """

    name: str | None = None
    from_: str | None = Field(None, alias="from")
    layers: int | list[int] | None = None
    cache: str | None = None
    pretrained: bool = True  # false: the architecture of a folder or id with fresh weights
    lora: LoraSpec | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    checkpointing: bool = False  # recompute activations in the backward pass
    compile: bool = False
    options: dict[str, Any] = Field(default_factory=dict)  # of a packaged network: width, depth, ...
    served: ServedSpec = ServedSpec()  # of a teacher behind an address
    aligned: bool = False  # of a teacher with another tokenizer: compared by spans of text

    @model_validator(mode="before")
    @classmethod
    def _string_is_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_origin(self) -> "ModelSpec":
        if self.aligned and (self.name is None or self.cache is not None):
            raise ValueError("aligned is for a model with a tokenizer of its own: give the folder or id as name")
        if self.cache is not None and self.from_ is not None:
            raise ValueError("takes cache or from, not both: a cache has no weights")
        if self.cache is None and (self.name is None) == (self.from_ is None):
            raise ValueError(
                "needs exactly one of name (a packaged network, a folder or an id) and from (another role)"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """What the recipe says of the model itself, wherever its answers come from."""
        return self.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude={"cache"})

    @property
    def loaded(self) -> bool:
        """Whether the weights are loaded here."""
        return self.cache is None and self.address is None

    @model_validator(mode="after")
    def _here_or_there(self) -> "ModelSpec":
        given = self.model_fields_set - {"name", "served", "cache"}
        if self.address and given:
            raise ValueError(
                f"{self.name} is a server: {', '.join(sorted(given))} belong to a model that is loaded here"
            )
        if not self.address and "served" in self.model_fields_set:
            raise ValueError(f"served says how a server is asked, and {self.name} is none: name: http://host:8000/v1")
        return self

    @property
    def address(self) -> str | None:
        """Where the model is served; None where it is loaded here."""
        return self.name if self.name is not None and self.name.startswith(("http://", "https://")) else None

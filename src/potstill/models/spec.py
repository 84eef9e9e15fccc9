"""How a recipe names a model: packaged, from a Hugging Face folder or id, or cut from another role."""

from typing import Any, Literal

from pydantic import Field, model_validator

from potstill.contracts.spec import Spec


class LoraSpec(Spec):
    """Low-rank adapters through peft; merged when the student is exported."""

    r: int = Field(16, gt=0)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[str] | Literal["all-linear"] = "all-linear"


class ModelSpec(Spec):
    """One role's model. A plain string in the recipe is `name`.

    `name` is a packaged network (`potstill show models`) or else a Hugging Face folder or id; `from` takes another
    role's weights, whole or `layers` of it (a number spreads them evenly, a list names them). `cache` is a folder of a
    teacher's answers (`potstill cache`), which stand for its weights; a name beside it says whose they must be.
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

    @model_validator(mode="before")
    @classmethod
    def _string_is_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_origin(self) -> "ModelSpec":
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
        return self.cache is None

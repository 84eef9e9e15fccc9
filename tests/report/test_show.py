"""What `potstill show` prints is what the code says: options with their reasons, networks, parts, claim and verdict."""

import io
import sys
from typing import Literal

import pytest
from pydantic import Field
from rich.console import Console

from potstill import show
from potstill.catalogue import systems
from potstill.contracts.errors import MissingExtra, RecipeError
from potstill.contracts.spec import MethodConfig, Part, Spec, members
from potstill.divergences import FDivergence, JensenShannon
from potstill.models.build import ADAPTERS, adapter


class Inner(Spec):
    steps: int = 3  # of the judge


class Base(MethodConfig):
    temperature: float = Field(1.0, gt=0)  # tau


class Options(Base):
    needed: int
    divergence: Part(FDivergence) = JensenShannon(0.1)  # type: ignore[valid-type]
    mode: Literal["a", "b"] = "a"  # type: ignore  # which way
    wrapped: float | list[int] = (
        0.25  # a reason that the formatter
        # broke over two lines
    )
    described: str = Field("x # not a comment", description="by pydantic")
    inner: Inner = Inner()


@pytest.fixture(autouse=True)
def _ours(monkeypatch):
    for cls in (Inner, Base, Options):
        monkeypatch.setattr(cls, "__module__", "potstill.example")
    monkeypatch.setitem(sys.modules, "potstill.example", sys.modules[__name__])


def printed(function, *args):
    out = io.StringIO()
    function(*args, Console(file=out, width=150, highlight=False))
    return out.getvalue()


def test_options_have_type_default_and_reason():
    assert show.options(Options) == [
        ("temperature", "float > 0", "1.0", "tau"),
        ("needed", "int", "required", ""),
        ("divergence", "FDivergence", "{name: JensenShannon, teacher_share: 0.1}", ""),
        ("mode", "a | b", "a", "which way"),
        ("wrapped", "float or list of int", "0.25", "a reason that the formatter broke over two lines"),
        ("described", "str", "'x # not a comment'", "by pydantic"),
        ("inner.steps", "int", "3", "of the judge"),
    ]


def test_parts_used_are_what_the_source_imports():
    source = """
from pydantic import Field
from potstill.contracts.spec import Part
from potstill.divergences import ReverseKL, ForwardKL
from potstill.run import Run
def f():
    from potstill.weighting.members import Uniform
"""
    assert show.parts_used(source) == {"divergences": ["ForwardKL", "ReverseKL"], "weighting": ["Uniform"]}


def test_a_method_that_is_not_built_says_so():
    name = next(system.name for system in systems().values() if not system.built)
    text = printed(show.show_method, name)
    assert systems()[name].title in text.replace("\n", " ") and "not built yet" in text


def test_an_unknown_method_gets_the_nearest_name():
    with pytest.raises(RecipeError, match="Did you mean token_kd"):
        show.show_method("token_kdd")


def test_a_built_method(claims):
    text = printed(show.show_method, "gkd")
    for expected in (
        "arXiv 2306.13649",
        "no gradient flows through the sampling",
        "lambda; the paper's best results have",
        "{name: JensenShannon, teacher_share: 0.5}",
        "rollouts.max_new_tokens",
        "student  causal_lm  fresh weights",
        "teacher  causal_lm  trained weights",
        "data: text or chat or prompts",
        "objectives: RolloutSpec, TokenDistillation",
        "Sampling from the student beats the data's text.",
        "not run yet: potstill verify gkd",
    ):
        assert expected in text
    claims([-0.3, -0.2, -0.25])
    assert "own over given on reverse_kl: +0.25 [+0.1258, +0.3742], 3 pairs: reproduced" in printed(
        show.show_method, "gkd"
    )


def test_every_packaged_network_is_listed_and_a_missing_extra_is_named(monkeypatch):
    text = printed(show.show_models)
    for kind in ADAPTERS:
        assert kind in text
        assert all(name in text for name in adapter(kind).PACKAGED)
    assert "layers=2, width=64, heads=4" in text

    def missing(kind):
        if kind == "graph_classifier":
            raise MissingExtra("torch_geometric is not installed. Install it with: pip install 'potstill[graphs]'.")
        return adapter(kind)

    monkeypatch.setattr("potstill.models.build.adapter", missing)
    text = printed(show.show_models)
    assert "pip install 'potstill[graphs]'" in text and "llama-tiny" in text


def test_every_part_of_a_recipe_is_listed():
    text = printed(show.show_parts)
    assert all(name in text for name in members(FDivergence))
    assert "teacher_share=0.5" in text and "KL(q || p)" in text and "Uniform" in text and "SampledReverseKL" in text

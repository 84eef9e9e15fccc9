from dataclasses import dataclass

import pytest
from pydantic import ValidationError

from potstill.contracts.spec import Part, Spec, written


class Shape:
    pass


@dataclass(frozen=True)
class Dot(Shape):
    pass


@dataclass(frozen=True)
class Circle(Shape):
    radius: float = 1.0
    inner: Shape | None = None
    border: float | None = None


class Drawing(Spec):
    shape: Part(Shape) = Dot()  # type: ignore[valid-type]


def test_a_part_is_written_by_name_or_with_options():
    assert Drawing(shape="Dot").shape == Dot()
    assert Drawing(shape={"name": "Circle", "radius": 2}).shape == Circle(2.0)
    assert Drawing(shape={"name": "Circle", "border": "0.5"}).shape == Circle(border=0.5)
    assert Drawing(shape={"name": "Circle", "border": None}).shape == Circle()
    assert Drawing.model_validate({"shape": Circle(3.0)}).shape == Circle(3.0)


def test_a_part_nests_in_a_part():
    assert Drawing(shape={"name": "Circle", "inner": {"name": "Circle", "radius": 0.5}}).shape == Circle(
        inner=Circle(0.5)
    )


def test_a_part_is_dumped_as_it_is_written():
    drawing = Drawing(shape={"name": "Circle", "inner": "Dot"})
    assert Drawing.model_validate(drawing.model_dump(mode="json")) == drawing
    assert written(Dot()) == "Dot"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("Cirle", "Cirle is no Shape. Did you mean Circle?"),
        ({"name": "Circle", "radios": 1}, "radios is not an option of Circle. Did you mean radius?"),
        ({"name": "Circle", "radius": "wide"}, "Circle.radius must be float, got 'wide'"),
        ({"name": "Circle", "border": "thick"}, "Circle.border must be float | None, got 'thick'"),
        ({"radius": 1}, "expected the name of a Shape"),
        (3, "expected the name of a Shape"),
    ],
)
def test_what_is_wrong_is_said(value, message):
    with pytest.raises(ValidationError) as caught:
        Drawing(shape=value)
    assert message in str(caught.value)


def test_unknown_keys_are_refused():
    with pytest.raises(ValidationError, match="shap"):
        Drawing.model_validate({"shap": "Dot"})

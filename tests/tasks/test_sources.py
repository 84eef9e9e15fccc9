"""`data` of a recipe: every form it may be written in, and every refusal before anything is read."""

import json

import pytest
import torch

from potstill.contracts.errors import DataError, RecipeError
from potstill.tasks.base import Images
from potstill.tasks.sources import OWN, TASKS, DataSpec, load, parse, spec_class, validate


def test_string_form_stands_for_a_mapping():
    assert parse("digits") == {"task": "digits"}
    assert parse("jsonl:/a/b:c.jsonl") == {"jsonl": "/a/b:c.jsonl"}
    assert parse("hf:some/name") == {"hf": "some/name"}
    with pytest.raises(RecipeError, match="data: jsn: is no kind of source. Did you mean jsonl?"):
        parse("jsn:/a")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("digit", "data: digit is no packaged task. Did you mean digits?"),
        ({"task": "digits", "sise": 3}, "data.sise is no option of digits. Did you mean size?"),
        ({"task": "digits", "size": "many"}, "data.size: input should be a valid integer.*got 'many'"),
        ({"task": "digits", "length": 1}, "data.length: input should be greater than or equal to 2, got 1"),
        (
            {"tasks": "digits"},
            "data needs exactly one of task, text, jsonl, imagefolder, hf, got none. Did you mean task?",
        ),
        ({"task": "digits", "hf": "a"}, "got task, hf"),
        (5, "data must be a name or a mapping, got 5"),
    ],
)
def test_what_is_wrong_is_named(data, message):
    with pytest.raises(RecipeError, match=message):
        validate(data)


@pytest.mark.parametrize("key", ["text", "jsonl", "imagefolder"])
def test_path_that_is_not_there_is_refused(tmp_path, key):
    with pytest.raises(DataError, match="nowhere does not exist"):
        validate(f"{key}:{tmp_path / 'nowhere'}")


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_task_has_a_schema_that_writes_itself(name):
    spec = validate(name)
    assert isinstance(spec, DataSpec)
    written = spec.model_dump(mode="json")
    assert written["task"] == name
    assert validate(written).model_dump(mode="json") == written


@pytest.mark.parametrize("key", sorted(OWN))
def test_every_own_kind_needs_its_path(key):
    assert spec_class(key, "").model_fields[key].is_required()


def test_options_reach_the_loader(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(20)))
    spec = validate({"jsonl": str(tmp_path / "rows.jsonl"), "size": 4, "test": 0.25, "length": 9})
    source = load(spec)
    assert (source.kind, len(source.train), len(source.test), spec.length) == ("text", 4, 5, 9)
    assert load(spec) is source  # once a process


@pytest.mark.needs("sklearn")
def test_task_options_reach_the_loader():
    source = load(validate({"task": "digits", "size": 20, "side": 12}))
    assert isinstance(source.train, Images)
    assert source.train.images.shape == (20, 1, 12, 12)
    assert torch.equal(source.subset(5).train.labels, source.train.labels[:5])
    with pytest.raises(DataError, match=r"data.size must lie in 1..20 for digits, got 21"):
        source.subset(21)


NEEDS = {
    "b3db": ("rdkit", "torch_geometric"),
    "synthetic_rings": ("torch_geometric",),
    "reasoning_gym": ("reasoning_gym",),
}
QUICK = ("english", "b3db", "synthetic_rings", "mixture", "reasoning_gym", "mnist5k", "fashion_mnist")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.needs(*NEEDS.get(n, ()))) for n in QUICK])
def test_every_task_loads_small(name, asset_or_skip):
    """What each promises to the runner: as many rows as asked, rows to test on, and default models."""
    source = asset_or_skip(lambda: load(validate({"task": name, "size": 30})))
    assert len(source.train) == 30
    assert len(source.test) > 0
    assert {"teacher", "student"} <= set(source.models)


@pytest.mark.needs("reasoning_gym")
def test_options_of_a_task_reach_it():
    spec = validate({"task": "reasoning_gym", "size": 5, "test_size": 2, "options": {"min_terms": 2, "max_terms": 2}})
    assert all(row["entry"]["metadata"]["num_terms"] == 2 for row in load(spec).train)

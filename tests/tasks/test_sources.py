"""`data` of a recipe: its forms, its options, and what is refused before anything is loaded."""

import json

import pytest

from potstill.contracts.errors import DataError, RecipeError
from potstill.tasks import sources
from potstill.tasks.sources import load, parse, spec_class, validate


@pytest.mark.needs("sklearn")
def test_string_and_mapping_are_the_same_source():
    assert validate("digits") == validate({"task": "digits"})
    assert load(validate("digits")) is load(validate({"task": "digits"}))  # loaded once
    small = load(validate({"task": "digits", "size": 30}))
    assert len(small.train) == 30 and small.kind == "images"
    assert load(validate({"task": "digits", "size": 31})) is not small


def test_string_forms():
    assert parse("fashion_mnist") == {"task": "fashion_mnist"}
    assert parse("jsonl:/a/b.jsonl") == {"jsonl": "/a/b.jsonl"}
    assert parse("hf:owner/name:part") == {"hf": "owner/name:part"}
    with pytest.raises(RecipeError, match=r"data: jsonlines: is no kind of source\. Did you mean jsonl\?"):
        parse("jsonlines:/a")


def test_own_files_come_with_the_loaders_options(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"line number {i} of a small file"}) + "\n" for i in range(20)))
    spec = validate(f"jsonl:{rows}")
    assert (spec.tag, spec.jsonl, spec.length) == ("jsonl", str(rows), 64)
    source = load(spec)
    assert source.kind == "text" and len(source.train) + len(source.test) == 20


def test_what_is_refused(tmp_path):
    for data, error, match in (
        ("fashion_mnits", RecipeError, r"data: fashion_mnits is no packaged task\. Did you mean fashion_mnist\?"),
        ({"task": "digits", "sise": 3}, RecipeError, r"data\.sise is no option of digits\. Did you mean size\?"),
        ({"task": "digits", "size": "all"}, RecipeError, r"data\.size: input should be a valid integer.*got 'all'\."),
        (
            {"task": "digits", "length": 1},
            RecipeError,
            r"data\.length: input should be greater than or equal to 2, got 1\.",
        ),
        ({"size": 3}, RecipeError, r"data needs exactly one of task, text.*, got none\."),
        ({"task": "digits", "jsonl": "a"}, RecipeError, r"data needs exactly one of .*, got task, jsonl\."),
        (7, RecipeError, r"data must be a name or a mapping, got 7\."),
        (f"imagefolder:{tmp_path / 'no'}", DataError, r"data: .*no does not exist\."),
        (f"jsonl:{tmp_path / 'no.jsonl'}", DataError, r"data: .*no\.jsonl does not exist\."),
    ):
        with pytest.raises(error, match=match):
            validate(data)


@pytest.mark.parametrize("key, name", [("task", n) for n in sources.TASKS] + [(k, "") for k in sources.OWN])
def test_every_entry_is_a_loader_with_typed_options(key, name):
    spec = spec_class(key, name)
    assert callable(spec.loader) and spec.loader.__doc__
    assert all(field.annotation is not None for field in spec.model_fields.values())
    assert set(spec.model_fields) >= {"length", "prompt_length"} | ({"task"} if key == "task" else {key})

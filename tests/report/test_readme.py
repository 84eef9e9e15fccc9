"""The README says what is true: its table is today's, its examples run, its commands exist, its links lead somewhere."""

import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml

import potstill.methods
from potstill.catalogue import System, systems
from potstill.contracts.errors import RunError
from potstill.report.readme import BEGIN, END, table, updated

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_the_table_of_systems_is_today_s():
    assert updated(README) == README, (
        "README.md is stale. Write its table anew: python -m potstill.report.readme README.md"
    )


def test_the_table_shows_every_system_once_and_what_is_not_built(monkeypatch):
    lines = table().splitlines()
    assert len([line for line in lines if line.startswith("| ") and "`" in line]) == len(systems())
    assert {int(n) for n in re.findall(r"^\| (\d+) \|", "\n".join(lines), re.MULTILINE)} == set(range(1, 65))
    for name, system in systems().items():
        (line,) = [line for line in lines if f"| `{name}` |" in line]
        assert ("| yes |" in line, "| not yet |" in line) == (system.built, not system.built)
    monkeypatch.setattr(
        System, "verdict", lambda self: "reproduced" if self.name == "gkd" else "inconclusive" if self.number else None
    )
    again = table()
    assert "0 reproduced, 0 not reproduced, 64 inconclusive" in again  # baselines are not counted
    assert re.search(r"`gkd` .*\| reproduced \|", again)


def test_only_what_stands_between_the_marks_is_written():
    assert updated(f"before\n{BEGIN}\nold\n{END}\nafter") == f"before\n{BEGIN}\n{table()}\n{END}\nafter"
    with pytest.raises(RunError, match="lost the marks"):
        updated("a README without marks")


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_its_commands_are_those_of_the_command_line():
    from potstill.cli import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert set(re.findall(r"^\| `potstill (\w+)", README, re.MULTILINE)) == known
    assert set(re.findall(r"potstill (\w+)", " ".join(blocks("sh")))) <= known


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with what the examples name: a tiny teacher, and a file of texts."""
    from potstill.models.causal import CausalLM
    from potstill.models.tokenizers import character_tokenizer

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    texts = [f"The pot still number {i} is older than the column still, and slower." for i in range(40)]
    tokenizer = character_tokenizer(texts)
    CausalLM.PACKAGED["llama-tiny"](tokenizer=tokenizer, width=16, heads=2).save(tmp_path / "models" / "teacher")
    (tmp_path / "notes.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path


SMALL = {"train.steps": 2, "train.batch": 4, "train.trackers": [], "data.length": 48, "data.prompt_length": 16}


def python_block(mark):
    (block,) = [b for b in blocks("python") if mark in b]
    return block


def test_the_objective_in_an_own_loop_learns(place):
    scope = {}
    exec(python_block("torch.optim.AdamW"), scope)
    objective, batch = scope["objective"], scope["data"].batch(scope["torch"].arange(8), 0)
    after = objective.loss("student", batch, 0).value()
    objective.student = scope["teacher"].shortened(1)
    before = objective.loss("student", batch, 0).value()
    assert 0 < after < 0.9 * before


def test_the_recipe_runs_from_python(place):
    from potstill import recipe

    (text,) = blocks("yaml")
    (place / "mine.yaml").write_text(yaml.safe_dump(recipe.apply(yaml.safe_load(text), SMALL)))
    exec(python_block("recipe.resolve"), {})
    assert (place / "runs" / "mine-1" / "result.json").is_file()


def test_the_new_method_registers_and_runs(place, monkeypatch):
    monkeypatch.setattr(potstill.methods, "find", lambda name: None)
    module = types.ModuleType("early_tokens_of_the_readme")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(python_block("class EarlyTokens"), "README.md", "exec"), module.__dict__)
    assert module.METHOD.name == "early_tokens" and set(module.METHOD.roles) == {"student", "teacher"}
    monkeypatch.setattr("potstill.recipe.load_method", lambda name: module.METHOD)
    from potstill import recipe
    from potstill.run import Run

    raw = {
        "method": {"name": "early_tokens", "gamma": 1.0, "rollouts": {"max_new_tokens": 4}},
        "teacher": "models/teacher",
        "student": {"from": "teacher", "layers": 1},
        "data": "jsonl:notes.jsonl",
    }
    result = Run(recipe.resolve(recipe.apply(raw, SMALL)), place / "early").execute()
    assert result.metrics and (place / "early" / "metrics.jsonl").read_text().count("\n") == 2

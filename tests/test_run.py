"""Runs and their folders: what is remembered, what is never overwritten, and teachers that are trained once."""

import json

import pytest
import torch
from torch.testing import assert_close

from potstill import cli
from potstill import recipe as recipes
from potstill.contracts.errors import DataError, RecipeError, RunError
from potstill.contracts.files import read_json
from potstill.models.images import ImageClassifier
from potstill.run import Run, open_folder, trained
from potstill.tasks.sources import load, validate
from potstill.training import trainer as training

pytestmark = [pytest.mark.needs("sklearn"), pytest.mark.usefixtures("cache")]
SPEC = {
    "method": "kd",
    "data": {"task": "digits", "size": 120, "test_size": 40},
    "student": {"name": "mlp", "options": {"width": 8, "depth": 1}},
    "teacher": {"name": "mlp", "options": {"width": 16, "depth": 1}},
    "train": {"steps": 6, "batch": 16, "trackers": [], "device": "cpu"},
}


def run_in(folder, **changes) -> Run:
    plan = recipes.resolve(recipes.apply(SPEC, changes))
    open_folder(folder, recipes.write(plan))
    return Run(plan, folder)


def contents(folder) -> dict:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---------------------------------------------------------------- folders


def test_a_new_folder_holds_the_recipe_and_an_empty_one_is_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "deep/new"):
        open_folder(tmp_path / name, "method: kd\n")
        assert contents(tmp_path / name) == {"recipe.yaml": b"method: kd\n"}


def test_an_existing_folder_is_never_overwritten(tmp_path):
    run = tmp_path / "run"
    open_folder(run, "method: kd\n")
    before = contents(run)
    with pytest.raises(
        RunError,
        match=r"run holds a run that was interrupted\. Go on with: potstill resume .*run\. To run anew, .* output=PATH\.",
    ):
        open_folder(run, "method: dkd\n")
    (run / "result.json").write_text("{}")
    with pytest.raises(RunError, match=r"run holds a run that is finished\. Its report: .*report\.html\."):
        open_folder(run, "method: dkd\n")
    assert contents(run) == before | {"result.json": b"{}"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    (tmp_path / "file").write_text("words")
    for name in ("mine", "file"):
        with pytest.raises(RunError, match=rf"{name} exists and is no run folder\. Choose another with output=PATH\."):
            open_folder(tmp_path / name, "method: kd\n")
    assert contents(tmp_path / "mine") == {"thesis.txt": b"words"} and (tmp_path / "file").read_text() == "words"


# ---------------------------------------------------------------- stages


def test_a_stage_runs_once_and_its_value_comes_back_whole(tmp_path):
    calls = []
    shared = torch.arange(3.0)

    def work(scale):
        calls.append(scale)
        return {"number": 0.1, "none": None, "list": [1, {"deep": scale * shared}], "w": shared, "same": shared,
                "ids": torch.tensor([2**60]), "half": torch.ones(2).bfloat16(), "flag": torch.tensor(True)}  # fmt: skip

    run = run_in(tmp_path / "run")
    first = run.stage("work", work, 2.0)
    again = Run(run.plan, run.folder).stage("work", work, 5.0)
    assert calls == [2.0]
    for value in (first, again):
        assert value["number"] == 0.1 and value["none"] is None and value["list"][0] == 1
        assert_close(value["list"][1]["deep"], 2 * shared)
        assert_close(value["w"], shared) and assert_close(value["same"], shared)
        assert (
            value["ids"].tolist() == [2**60] and value["half"].dtype == torch.bfloat16 and value["flag"].item() is True
        )
    assert run.stage("other", work, 3.0)["list"][1]["deep"].tolist() == [0, 3, 6] and calls == [2.0, 3.0]


@pytest.mark.parametrize("value", [3, "text", None, [1.5], torch.ones(2, 2), {}, {"a": {}}], ids=repr)
def test_any_value_of_a_stage_is_the_same_fresh_and_remembered(tmp_path, value):
    run = run_in(tmp_path / "run")
    for _ in range(2):
        found = run.stage("value", lambda: value)
        assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value


def test_a_stage_that_fails_leaves_nothing_and_runs_again(tmp_path):
    run = run_in(tmp_path / "run")
    with pytest.raises(ZeroDivisionError):
        run.stage("work", lambda: 1 / 0)
    assert not (run.folder / "stages" / "work").exists()
    assert run.stage("work", lambda: 7) == 7


# ---------------------------------------------------------------- data and roles


def test_data_of_another_kind_is_refused_with_both_names(tmp_path):
    with pytest.raises(DataError, match=r"kd needs data of kind images, but mixture.* gives points\."):
        _ = run_in(tmp_path / "run", data="mixture").source


def test_roles_of_a_run(tmp_path):
    run = run_in(tmp_path / "run", student={"from": "teacher"})
    assert run.student() is run.student() and run.student() is not run.model("teacher")
    assert all(torch.equal(a, b) for a, b in zip(run.student().parameters(), run.model("teacher").parameters()))
    assert all(p.requires_grad for p in run.student().parameters())
    with pytest.raises(RunError, match="kd has no role judge"):
        run._role("judge")
    with pytest.raises(RecipeError, match=r"student\.from names judge, which is no role of kd\."):
        run_in(tmp_path / "judge", student={"from": "judge"}).student()
    with pytest.raises(RecipeError, match=r"student\.layers: a image_classifier cannot be cut in layers"):
        run_in(tmp_path / "cut", student={"from": "teacher", "layers": 1}).student()
    with pytest.raises(RecipeError, match=r"student\.options\.wdith is not an option\. Did you mean width\?"):
        run_in(tmp_path / "typo", student={"name": "mlp", "options": {"wdith": 3}}).student()


def test_students_of_different_seeds_differ_and_of_equal_ones_do_not(tmp_path):
    weights = [
        run_in(tmp_path / n, **{"train.seed": s}).student().network.head.weight
        for n, s in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


# ---------------------------------------------------------------- trained teachers


def test_a_teacher_is_trained_once_and_keyed_by_what_made_it(cache, monkeypatch):
    count = []
    fit = training.Trainer.fit
    monkeypatch.setattr(training.Trainer, "fit", lambda self, *a: (count.append(self.stage), fit(self, *a))[1])

    def teacher(seed=0, size=60, width=12):
        data = validate({"task": "digits", "size": size})
        source = load(data)
        spec = recipes.resolve(recipes.apply(SPEC, {"teacher.options.width": width})).models["teacher"]
        return trained("image_classifier", spec, source, source.context, data, seed, "cpu")

    first = teacher()
    assert count == ["train teacher"]
    again = teacher(seed=3)  # one teacher for all seeds of a claim
    assert len(count) == 1 and again is not first
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values()))
    teacher(size=61), teacher(width=13)
    assert len(count) == 3
    made = [p for p in (cache / "models").iterdir() if (p / "potstill-identity.json").is_file()]
    identity = lambda p: read_json(p / "potstill-identity.json")
    saved = [p for p in made if identity(p)["data"].get("size") == 60 and identity(p)["spec"]["options"]["width"] == 12]
    assert len(saved) == 1
    loaded = ImageClassifier.from_pretrained(saved[0])
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), loaded.state_dict().values()))


# ---------------------------------------------------------------- the command line's ways into a run


def recipe_file(tmp_path, **changes) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(recipes.apply(SPEC, changes)))
    return str(path)


def test_run_resume_and_more(tmp_path, capsys):
    """A finished run goes on with a larger budget in a folder of its own, as if it had had it from the start."""
    recipe, folder = recipe_file(tmp_path, **{"method": {"name": "kd", "control": True}}), tmp_path / "run"
    cli.run(recipe, [f"output={folder}"])
    shown = capsys.readouterr().out
    assert "accuracy: " in shown and str(folder / "report.html") in shown
    before = contents(folder)
    with pytest.raises(RunError, match="holds a run that is finished"):
        cli.run(recipe, [f"output={folder}"])
    cli.resume(folder)
    assert "is finished. Its report" in capsys.readouterr().out
    cli.run(str(folder), ["more.steps=14"])
    assert contents(folder) == before  # none of these touched it
    longer, whole = tmp_path / "run-20", tmp_path / "whole"
    cli.run(recipe, [f"output={whole}", "train.steps=20"])
    assert (longer / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for name in ("student/model.safetensors", "result.json"):
        assert (longer / name).read_bytes() == (whole / name).read_bytes(), name


def test_more_is_for_finished_runs_and_steps(tmp_path):
    recipe, folder = recipe_file(tmp_path), tmp_path / "run"
    with pytest.raises(RecipeError, match="more goes on from a finished run, and .*mine.yaml is none"):
        cli.run(recipe, ["more.steps=4"])
    cli.run(recipe, [f"output={folder}"])
    for wrong in ("more.epochs=4", "more.steps=0", "more.steps=many"):
        with pytest.raises(RecipeError, match="more takes steps, a whole number above 0"):
            cli.run(str(folder), [wrong])


def test_resume_option_takes_only_the_same_recipe(tmp_path):
    recipe, folder = recipe_file(tmp_path), tmp_path / "run"
    open_folder(folder, recipes.write(recipes.resolve(recipes.read(recipe))))
    with pytest.raises(RunError, match="holds an interrupted run of another recipe"):
        cli.run(recipe, [f"output={folder}", "train.steps=7"], go_on=True)
    cli.run(recipe, [f"output={folder}"], go_on=True)
    assert (folder / "result.json").is_file()

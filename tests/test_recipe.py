"""Recipes: what is written wrongly is said in a sentence with the way out; what is right survives being written and read."""

from pathlib import Path

import pytest
import yaml

from potstill import recipe as recipes
from potstill.catalogue import systems
from potstill.contracts.errors import RecipeError
from potstill.divergences import ReverseKL

pytestmark = pytest.mark.needs("sklearn")
KD = {"method": "kd", "data": "digits", "student": "resnet-xs", "teacher": "resnet-s"}


def refused(match: str, /, **changes):
    with pytest.raises(RecipeError, match=match):
        recipes.resolve(recipes.apply(KD, changes), "mine.yaml")


# ---------------------------------------------------------------- what is refused


def test_unknown_keys_name_the_nearest_with_its_type_and_default():
    refused(
        r"^mine\.yaml: method\.temprature is not a field of KDConfig\. Did you mean temperature \(float, default 4\.0\)\?$",
        **{"method.temprature": 2},
    )
    refused(
        r"mine\.yaml: train\.step is not a field of TrainSpec\. Did you mean steps \(int, default 1000\)\?",
        **{"train.step": 3},
    )
    refused(
        r"mine\.yaml: eval\.bach is not a field of EvalSpec\. Did you mean batch \(int, default 250\)\?",
        **{"eval.bach": 3},
    )
    refused(
        r"mine\.yaml: student\.pretraned is not a field of ModelSpec\. Did you mean pretrained \(bool, default True\)",
        **{"student.pretraned": False},
    )
    refused(r"student\.lora\.rank is not a field of LoraSpec\. Known: ", **{"student.lora.rank": 4})


def test_wrong_types_and_ranges_show_what_was_given():
    refused(r"mine\.yaml: train\.steps: input should be a valid integer.*, got 'many'\.", **{"train.steps": "many"})
    refused(r"mine\.yaml: train\.steps: input should be greater than 0, got 0\.", **{"train.steps": 0})
    refused(r"mine\.yaml: method\.temperature: input should be greater than 0, got -1\.", **{"method.temperature": -1})
    refused(
        r"mine\.yaml: train\.optimizer: input should be 'adamw', 'adam'.*, got 'lion'\.", **{"train.optimizer": "lion"}
    )
    refused(
        r"mine\.yaml: method\.standardize: input should be a valid boolean.*, got 'perhaps'\.",
        **{"method.standardize": "perhaps"},
    )


def test_parts_are_checked_by_name_and_option():
    refused(
        r"mine\.yaml: method\.divergence: ReversKL is no FDivergence\. Did you mean ReverseKL\?",
        **{"method.divergence": "ReversKL"},
    )
    refused(
        r"method\.divergence: teacher_shar is not an option of JensenShannon\. Did you mean teacher_share\?",
        **{"method.divergence": {"name": "JensenShannon", "teacher_shar": 0.2}},
    )
    refused(r"method\.divergence: expected the name of a FDivergence, or a mapping", **{"method.divergence": 3})


def test_sections_and_roles():
    refused(
        r"mine\.yaml: taecher is neither a section nor a role of kd \(its roles: student, teacher\)\. Did you mean teacher\?",
        taecher="resnet-s",
    )
    refused(r"mine\.yaml: judge is neither a section nor a role of kd", judge="mlp")
    refused(r"mine\.yaml: teacher of kd takes one model\.", teacher=["mlp", "resnet-s"])
    refused(r"mine\.yaml: student.*needs exactly one of name.*and from", student={"layers": 2})
    refused(r"mine\.yaml: student.*needs exactly one of name.*and from", student={"name": "mlp", "from": "teacher"})
    without = {k: v for k, v in KD.items() if k != "data"}
    with pytest.raises(RecipeError, match=r"mine\.yaml: data is missing\. kd takes images\."):
        recipes.resolve(without, "mine.yaml")
    with pytest.raises(RecipeError, match=r"mine\.yaml: method needs a name\."):
        recipes.resolve({**KD, "method": {"temperature": 3}}, "mine.yaml")


def test_methods_that_do_not_exist_or_are_not_built():
    refused(r"kdd is no method\. Did you mean kd\? See: potstill methods", method="kdd")
    waiting = next((s for s in systems().values() if not s.built), None)
    if waiting is not None:  # until all of the catalogue is built
        refused(rf"{waiting.name} \(.*\) is in the catalogue but not built yet\. Built: .*kd", method=waiting.name)


def test_names_and_files_that_are_no_recipe(tmp_path):
    with pytest.raises(
        RecipeError, match=r"logit_sdt is neither a shipped recipe nor a file\. Did you mean logit_std\?"
    ):
        recipes.read("logit_sdt")
    with pytest.raises(RecipeError, match=r"is a folder without a recipe\.yaml: not a run\."):
        recipes.read(str(tmp_path))
    for text, match in (
        ("method: [", "is not valid YAML"),
        ("- a", "must be a mapping with a `method`"),
        ("", "must be a mapping"),
    ):
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(RecipeError, match=match):
            recipes.read(str(tmp_path / "mine.yaml"))


# ---------------------------------------------------------------- overrides


def test_overrides_are_yaml_and_leave_the_original_alone():
    raw = {"method": {"name": "kd"}, "train": {"steps": 5}}
    made = recipes.apply(
        raw, ["train.steps=20", "train.lr=1e-3", "train.trackers=[]", "eval.limit=null", "a.b.c={x: 1}"]
    )
    assert made["train"] == {"steps": 20, "lr": "1e-3", "trackers": []} and made["eval"] == {"limit": None}
    assert made["a"] == {"b": {"c": {"x": 1}}}
    assert raw == {"method": {"name": "kd"}, "train": {"steps": 5}}
    # YAML reads 1e-3 as text; the schema makes it the number that was meant
    assert recipes.resolve(recipes.apply(KD, ["train.lr=1e-3"])).train.lr == 1e-3


def test_a_name_keeps_its_meaning_when_an_option_is_set_below_it():
    made = recipes.apply(
        KD, ["student.options.width=4", "data.size=50", "method.temperature=2", "method.divergence.name=ReverseKL"]
    )
    assert made["student"] == {"name": "resnet-xs", "options": {"width": 4}}
    assert made["data"] == {"task": "digits", "size": 50}
    assert made["method"] == {"name": "kd", "temperature": 2, "divergence": {"name": "ReverseKL"}}
    assert recipes.apply({"data": "imagefolder:/a"}, ["data.side=8"])["data"] == {"imagefolder": "/a", "side": 8}


def test_an_override_that_is_none():
    for wrong in ("train.steps", "=3"):
        with pytest.raises(RecipeError, match="is not of the form key.path=value"):
            recipes.apply(KD, [wrong])
    with pytest.raises(RecipeError, match="the value is not valid YAML. Quote it."):
        recipes.apply(KD, ["student=[a"])
    with pytest.raises(RecipeError, match=r"eval\.limit\.x: eval\.limit is 3, not a mapping"):
        recipes.apply({"eval": {"limit": 3}}, ["eval.limit.x=1"])


# ---------------------------------------------------------------- round trips


def same(a, b) -> bool:
    return (a.config, a.models, a.data, a.train, a.eval) == (b.config, b.models, b.data, b.train, b.eval)


def test_written_and_read_it_is_the_same_plan(tmp_path):
    plan = recipes.resolve(
        recipes.apply(KD, ["method.divergence=ReverseKL", "student.options.width=4", "data.size=50", "train.steps=7"])
    )
    assert plan.config.divergence == ReverseKL() and plan.train.steps == 7 and plan.data.size == 50
    text = recipes.write(plan)
    (tmp_path / "recipe.yaml").write_text(text)
    for where in (tmp_path, tmp_path / "recipe.yaml"):  # a run folder and a file
        again = recipes.resolve(recipes.read(str(where)))
        assert same(plan, again) and recipes.write(again) == text
    assert yaml.safe_load(text)["method"]["temperature"] == 4.0  # defaults are written out


def test_where_the_folder_lies_is_not_part_of_the_recipe():
    plain, placed = (recipes.write(recipes.resolve(raw)) for raw in (KD, {**KD, "output": "/tmp/x"}))
    assert plain == placed


SHIPPED = recipes.shipped()


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_resolves_and_survives_writing(name):
    plan = recipes.resolve(recipes.read(name), name)
    again = recipes.resolve(yaml.safe_load(recipes.write(plan)))
    assert same(plan, again)
    assert plan.method.name in systems() and Path(name).name == name

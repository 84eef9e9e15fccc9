"""The command line in one process: run, go on, evaluate, generate, on a person's own files and folders."""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from potstill.cli import app, errors
from potstill.contracts.errors import PotstillError, RecipeError, RunError

CHAT = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TINY = ["train.batch=4", "train.lr=0.001", "train.trackers=[]", "train.device=cpu", "eval.limit=4", "eval.batch=4"]


def potstill(*arguments: str) -> str:
    """What a command prints; its own errors come out as they are."""
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None:
        raise result.exception
    return result.stdout


def journal(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def models(tiny_lm):
    return tiny_lm(1, template=CHAT, spread=0.1), tiny_lm(2, template=CHAT)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "lines.jsonl"
    rows = [{"text": f"Row {i} says that whatever is distilled was once a wash."} for i in range(60)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def recipe(folder, method, models, data, steps=3, **options) -> str:
    student, teacher = models
    raw = {
        "method": {"name": method, **options},
        "student": str(student),
        "teacher": str(teacher),
        "data": {"jsonl": str(data), "length": 24, "prompt_length": 8},
        "train": {"steps": steps},
    }
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(raw))
    return str(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, models, texts):
    folder = tmp_path_factory.mktemp("finished")
    output = potstill("run", recipe(folder, "token_kd", models, texts), *TINY, f"output={folder}/run")
    assert "forward_kl" in output
    assert f"Report: {folder}/run/report.html" in output
    return folder / "run"


def test_a_run_leaves_a_student_that_transformers_loads_and_is_never_overwritten(finished):
    student = AutoModelForCausalLM.from_pretrained(finished / "student")
    assert student.num_parameters() == json.loads((finished / "result.json").read_text())["metrics"]["parameters"]
    assert AutoTokenizer.from_pretrained(finished / "student").eos_token
    assert "KL(p || q)" in (finished / "report.html").read_text()
    with pytest.raises(RunError, match=r"holds a run that is finished. Its report: .*report\.html"):
        potstill("run", str(finished), f"output={finished}")


def test_more_steps_go_on_where_a_run_ended(finished):
    before = (finished / "student" / "model.safetensors").read_bytes()
    potstill("run", str(finished), "more.steps=2")
    longer = finished.with_name("run-5")
    assert journal(longer)[:3] == journal(finished)
    assert [row["step"] for row in journal(longer)] == [1, 2, 3, 4, 5]
    assert (finished / "student" / "model.safetensors").read_bytes() == before
    assert (longer / "student" / "model.safetensors").read_bytes() != before
    metrics = [json.loads((run / "result.json").read_text())["metrics"] for run in (finished, longer)]
    assert metrics[0]["perplexity"] != metrics[1]["perplexity"], "the longer run is measured anew"
    with pytest.raises(RecipeError, match="more takes steps, a whole number above 0"):
        potstill("run", str(finished), "more.steps=-1")


def test_the_same_command_goes_on_with_an_interrupted_run_and_only_with_that(tmp_path, models, texts):
    path, run = recipe(tmp_path, "token_kd", models, texts, steps=2), tmp_path / "run"
    potstill("run", path, *TINY, f"output={run}")
    whole = (run / "result.json").read_text()
    (run / "result.json").unlink()  # as if it had been stopped before its last line
    with pytest.raises(RunError, match=r"was interrupted. Go on with: potstill resume"):
        potstill("run", path, *TINY, f"output={run}")
    with pytest.raises(RunError, match="holds an interrupted run of another recipe"):
        potstill("run", path, *TINY, "train.seed=1", f"output={run}", "--resume")
    potstill("run", path, *TINY, f"output={run}", "--resume")
    assert (run / "result.json").read_text() == whole
    assert len(journal(run)) == 2
    with pytest.raises(RunError, match=r"is finished\. Its report: .*report\.html"):
        potstill("run", path, *TINY, f"output={run}", "--resume")


def test_evaluate_measures_the_student_on_other_data(finished, tmp_path):
    other = tmp_path / "other.jsonl"
    rows = [{"text": f"Something else altogether, number {i}, and quite long enough to fill a row."} for i in range(40)]
    other.write_text("\n".join(map(json.dumps, rows)))
    own = dict(line.split(": ") for line in potstill("evaluate", str(finished)).splitlines() if ": " in line)
    there = potstill("evaluate", str(finished), f"data=jsonl:{other}")
    there = dict(line.split(": ") for line in there.splitlines() if ": " in line)
    assert own.keys() == there.keys() >= {"perplexity"}
    stored = json.loads((finished / "result.json").read_text())["metrics"]["perplexity"]
    assert float(own["perplexity"]) == pytest.approx(stored, rel=1e-4)
    assert float(there["perplexity"]) != pytest.approx(stored, rel=1e-4)
    with pytest.raises(RunError, match="is no run folder"):
        potstill("evaluate", str(tmp_path))


def test_generate_continues_a_prompt_the_same_way_for_the_same_seed(finished):
    once = potstill("generate", str(finished), "Row 1", "--tokens", "5", "--count", "2", "--seed", "3")
    assert once.count(">>>") == 2
    assert once == potstill("generate", str(finished), "Row 1", "--tokens", "5", "--count", "2", "--seed", "3")
    assert once != potstill("generate", str(finished), "Row 1", "--tokens", "5", "--count", "2", "--seed", "4")
    assert potstill("generate", str(finished), "--tokens", "2", "--count", "3").count(">>>") == 3


def test_chats_teach_what_the_assistant_says_and_nothing_else(tmp_path, models):
    chats = tmp_path / "chat.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"what is {i}"}, {"role": "assistant", "content": f"it is {i}"}]}
        for i in range(40)
    ]
    chats.write_text("\n".join(map(json.dumps, rows)))
    run = tmp_path / "run"
    path = recipe(tmp_path, "token_kd", models, chats, steps=2, cross_entropy=0.5)
    potstill("run", path, *TINY, "data.length=64", "data.prompt_length=40", f"output={run}")
    assert len(journal(run)) == 2

    from potstill.use import finished

    opened, student = finished(run, [])
    batch = opened.tokens().batch(torch.arange(3))
    said = [student.tokenizer.decode(row[counted]) for row, counted in zip(batch.tokens_BT, batch.counted_BT)]
    assert all(text.startswith("it is ") and text.endswith("<eos>") and "what" not in text for text in said)
    assert "<user>" in student.tokenizer.decode(batch.tokens_BT[0])
    gkd = recipe(tmp_path, "gkd", models, chats, steps=2, rollouts={"max_new_tokens": 4}, on_policy=1.0)
    output = potstill("run", gkd, *TINY, "data.length=64", "data.prompt_length=40", f"output={tmp_path}/gkd")
    assert "rollout_reverse_kl" in output


def test_gkd_with_warm_start_and_control_reports_all_three(tmp_path, models, texts):
    run = tmp_path / "run"
    options = {"warm_start": 2, "control": True, "rollouts": {"max_new_tokens": 4}}
    potstill("run", recipe(tmp_path, "gkd", models, texts, steps=2, **options), *TINY, f"output={run}")
    assert {row["stage"] for row in journal(run)} == {"token_kd", "gkd", "control"}
    table = json.loads((run / "records" / "1-comparison.json").read_text())
    assert [row[0] for row in table["rows"]] == ["teacher", "student before", "student after", "control"]
    before, after, control = table["rows"][1:]
    assert before[1:6] != after[1:6] != control[1:6]
    budget = json.loads((run / "stages" / "control-budget" / "value.json").read_text())["value"]
    state = max((run / "checkpoints" / "control").glob("step-*")) / "state.json"
    assert json.loads(state.read_text())["seconds"] >= budget


def test_mistakes_are_one_sentence_and_exit_code_1(capsys, models, texts, tmp_path):
    path = recipe(tmp_path, "token_kd", models, texts, temprature=2)
    with pytest.raises(SystemExit) as stop, errors():
        potstill("run", path, f"output={tmp_path}/run")
    assert stop.value.code == 1
    told = capsys.readouterr().err
    assert told.startswith("potstill: ") and "temperature" in told and told.count("\n") == 1
    assert not (tmp_path / "run").exists()
    with pytest.raises(PotstillError, match="neither a shipped recipe nor a file"):
        potstill("run", "quickstrat")

"""The recipes for machines with GPUs: resolved, and built on the meta device, with a Qwen3 of full size that has no weights."""

from pathlib import Path

import pytest
from transformers import Qwen3Config

import potstill
from potstill import recipe as recipes
from potstill.dry_run import describe
from potstill.models.tokenizers import character_tokenizer

FOLDER = Path(potstill.__file__).parent / "recipes" / "gpu"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
SIZES = {"Qwen/Qwen3-1.7B": (2048, 28, 16), "Qwen/Qwen3-8B": (4096, 36, 32), "Qwen/Qwen3-14B": (5120, 40, 40)}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """`qwen(id)`: a folder with the configuration of that size and a tokenizer, but no weights."""
    made = {}

    def folder(name: str) -> str:
        if name not in made:
            width, layers, heads = SIZES[name]
            place = tmp_path_factory.mktemp("qwen")
            tokenizer = character_tokenizer(["".join(map(chr, range(32, 127)))])
            Qwen3Config(
                vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                num_key_value_heads=8, head_dim=128, intermediate_size=3 * width, architectures=["Qwen3ForCausalLM"],
                max_position_embeddings=40960,
            ).save_pretrained(place)  # fmt: skip
            tokenizer.save_pretrained(place)
            made[name] = str(place)
        return made[name]

    return folder


def localised(value, qwen):
    if isinstance(value, dict):
        return {k: localised(v, qwen) for k, v in value.items()}
    if isinstance(value, list):
        return [localised(v, qwen) for v in value]
    return qwen(value) if value in SIZES else value


@pytest.mark.needs("reasoning_gym")
@pytest.mark.parametrize("name", NAMES)
def test_every_gpu_recipe_resolves_and_its_models_can_be_built(name, qwen, capsys):
    raw = localised(recipes.read(f"gpu/{name}"), qwen)
    if "hf" in raw["data"] or raw["data"].get("task") == "functions":  # not to be had without a network
        raw["data"] = {"task": "arithmetic", "length": 128, "prompt_length": 64}
    raw["data"] |= {"size": 20, "test_size": 4}
    found = describe(recipes.resolve(raw))
    assert found["parameters"]["student"] > 1e9
    assert "time: about" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_its_batch_is_for_the_processes_it_names_and_they_share_the_student(name):
    """All but those whose terms have several counts, which sharded micro-batches cannot have."""
    train, command = recipes.read(f"gpu/{name}")["train"], (FOLDER / f"{name}.yaml").read_text().splitlines()[0]
    several = "--nproc_per_node 8" in command
    assert several == (name not in {"paced", "sinkd", "sod", "tip", "unisd"})  # those weigh or compare a whole batch
    assert train["batch"] % (8 * train["micro_batch"]) == 0 if several else train["batch"] == train["micro_batch"]
    assert train.get("sharded", False) == (several and name not in {"minillm", "tsd_kd"})


def test_every_language_method_has_one():
    from potstill.catalogue import systems

    built = {row.name for row in systems().values() if row.family == "language" and row.built}
    assert built == set(NAMES)

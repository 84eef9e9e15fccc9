"""Denoisers D(x; sigma): one adapter around diffusers' networks, a small network for points, and exact mixtures.

Whatever a network was trained to predict, the adapter speaks the variance-exploding language of `noise.gaussian`:
x = x0 + sigma eps in, an estimate of x0 out. Folders are diffusers' own (`UNet2DModel.from_pretrained` reads them), with
the preconditioning in a small `potstill.json` beside. Only safetensors are read, and no code that comes with them.

B batch, C H W image, D features of a point. A condition is class labels [B] (integers), encoder states [B, T, D]
(floats), or a mapping of the network's own keyword arguments.
"""

import inspect
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from potstill.contracts.errors import ModelError, require
from potstill.contracts.spec import Part, written
from potstill.models.lora import add_lora, merged
from potstill.models.spec import LoraSpec
from potstill.noise import samplers
from potstill.noise.gaussian import (
    VE,
    DiscreteVP,
    EDMPreconditioning,
    MatchedPreconditioning,
    Preconditioning,
    RectifiedFlow,
    levels,
    spread,
)
from potstill.noise.mixture import GaussianMixture

Condition = Tensor | Mapping[str, Tensor] | None
SIDE_FILE = "potstill.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
_BLOCKS = ("down_blocks", "mid_block", "up_blocks", "transformer_blocks", "layers")
_PRECONDITIONING: TypeAdapter[Any] = TypeAdapter(Part(Preconditioning))


def rows(condition: Condition, index: Any) -> Condition:
    """The condition of some rows of a batch."""
    if isinstance(condition, Mapping):
        return {name: value[index] for name, value in condition.items()}
    return None if condition is None else condition[index]


class _Denoising(nn.Module):
    """What every denoiser shares. `shape` is that of one sample."""

    kind: ClassVar[str] = "denoiser"
    name: str
    shape: tuple[int, ...]

    @torch.no_grad()
    def sample(
        self,
        ids_B: Tensor,
        *,
        seed: int = 0,
        condition: Condition = None,
        sigmas: Tensor | Sequence[float] | None = None,
        solver: Callable[..., Tensor] = samplers.heun,
        batch: int = 256,
    ) -> Tensor:
        """Samples by a solver of `noise.samplers`, functions of (seed, id, condition) alone. [B, *shape]."""
        drawn = []
        for i in range(0, len(ids_B), batch):
            denoise = lambda x, sigma, part=rows(condition, slice(i, i + batch)): self(x, sigma, part)
            part = ids_B[i : i + batch]
            drawn.append(
                samplers.sample(denoise, self.shape, part, seed=seed, sigmas=sigmas, solver=solver, batch=batch)
            )
        return torch.cat(drawn)


class Denoiser(_Denoising):
    """A network with its preconditioning: D(x; sigma) = c_skip x + c_out F(c_in x, c_noise).

    Images whose sides the network cannot halve often enough are padded at the edge and cropped again. Without a
    condition a class-conditional network gets its label for "none".
    """

    PACKAGED: ClassVar[dict[str, Callable[..., "Denoiser | MixtureDenoiser"]]] = {}
    network: Any  # a diffusers model, or a network for points

    def __init__(
        self, network: Any, preconditioning: Preconditioning, shape: Sequence[int], name: str = "denoiser"
    ) -> None:
        super().__init__()
        self.network = network
        self.preconditioning = preconditioning
        self.shape = tuple(shape)
        self.name = name
        signature = inspect.signature(network.forward).parameters
        self._accepts = frozenset(signature)
        self._input = next(iter(signature))
        config = network.config
        self.null_label: int | None = None
        if type(network).__name__ == "DiTTransformer2DModel":
            self.null_label = config.num_embeds_ada_norm
            for module in network.modules():
                if type(module).__name__ == "LabelEmbedding":
                    module.dropout_prob = 0.0  # labels are dropped by whoever trains, never by an unkeyed draw
        elif getattr(network, "class_embedding", None) is not None and getattr(config, "num_class_embeds", None):
            self.null_label = config.num_class_embeds - 1
        halvings = len(network.down_blocks) - 1 if hasattr(network, "down_blocks") else 0
        self._multiple = getattr(config, "patch_size", None) or 2**halvings

    def forward(self, x: Tensor, sigma: Tensor | float, condition: Condition = None) -> Tensor:
        """The prediction of x0 from x [B, *shape] at noise levels sigma ([B] or a number). Shape and dtype of x."""
        c_skip, c_out, c_in, c_noise = self.preconditioning.coefficients(levels(sigma, x))
        predicted = self._predict(spread(c_in, x) * x, c_noise, condition)
        return spread(c_skip, x) * x + spread(c_out, x) * predicted

    def _predict(self, x: Tensor, c_noise_B: Tensor, condition: Condition) -> Tensor:
        dtype = next(self.network.parameters()).dtype
        size = x.shape[2:]
        missing = [-n % self._multiple for n in size]
        padded = F.pad(x, (0, missing[1], 0, missing[0]), mode="replicate") if any(missing) else x
        arguments: dict[str, Any] = {self._input: padded.to(dtype), "timestep": c_noise_B.to(dtype)}
        if "return_dict" in self._accepts:
            arguments["return_dict"] = False
        arguments |= self._condition(condition, x, dtype)
        output = self.network(**arguments)
        output = output[0] if isinstance(output, tuple) else output
        if output.ndim == 4:  # crop, and drop the learned variances of DDPM-style networks
            output = output[:, : x.shape[1], : size[0], : size[1]]
        return output.to(x.dtype)

    def _condition(self, condition: Condition, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        given: dict[str, Tensor] = {}
        if isinstance(condition, Mapping):
            given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in condition.items()}
        elif condition is not None and condition.is_floating_point():
            given = {"encoder_hidden_states": condition.to(dtype)}
        elif condition is not None:
            given = {"class_labels": condition}
        if self.null_label is not None and "class_labels" not in given:
            given["class_labels"] = torch.full((len(x),), self.null_label, device=x.device)
        unknown = sorted(set(given) - self._accepts)
        if unknown or ("class_labels" in given and self.null_label is None):
            wrong = ", ".join(unknown or ["class_labels"])
            raise ModelError(f"{self.name}: {type(self.network).__name__} takes no condition {wrong}.")
        needed = {"encoder_hidden_states", "pooled_projections"} & self._accepts - set(given)
        if needed and getattr(self.network.config, "encoder_hid_dim_type", None) is None:
            raise ModelError(
                f"{self.name}: {type(self.network).__name__} needs a condition ({', '.join(sorted(needed))})."
            )
        return given

    @property
    def taps(self) -> list[str]:
        """Names of the blocks whose activations `features` can give, from input to output."""
        names = []
        for group in _BLOCKS:
            module = getattr(self.network, group, None)
            if isinstance(module, nn.ModuleList):
                names += [f"{group}.{i}" for i in range(len(module))]
            elif isinstance(module, nn.Module):
                names.append(group)
        return names

    def with_features(
        self, x: Tensor, sigma: Tensor | float, condition: Condition = None, names: Sequence[str] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """D(x; sigma) and the activations of named blocks in one pass; None names all blocks but a U-Net's upward ones."""
        chosen = [n for n in self.taps if not n.startswith("up_blocks")] if names is None else list(names)
        for name in chosen:
            if name not in self.taps:
                raise ModelError(f"{self.name} has no block {name}. It has {', '.join(self.taps)}.")
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                if isinstance(output, tuple):  # U-Nets: (state, skips); two-stream transformers: (text, image)
                    output = output[-1] if isinstance(output[-1], Tensor) else output[0]
                found[name] = output

            return hook

        handles = [self.network.get_submodule(name).register_forward_hook(keep(name)) for name in chosen]
        try:
            x0 = self(x, sigma, condition)
        finally:
            for handle in handles:
                handle.remove()
        return x0, {name: found[name] for name in chosen}

    def features(
        self, x: Tensor, sigma: Tensor | float, condition: Condition = None, names: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Activations of named blocks at (x, sigma), for discriminators. See `with_features`."""
        return self.with_features(x, sigma, condition, names)[1]

    def with_lora(self, lora: LoraSpec) -> Self:
        """Freeze the weights and add low-rank adapters, in place; `save` merges them."""
        add_lora(self.network, lora, self.name)
        return self

    def checkpoint_activations(self, on: bool = True) -> Self:
        """Recompute activations in the backward pass (less memory, one more forward pass)."""
        if not hasattr(self.network, "enable_gradient_checkpointing"):
            raise ModelError(f"{self.name}: {type(self.network).__name__} cannot recompute its activations.")
        if on:
            self.network.enable_gradient_checkpointing()
        else:
            self.network.disable_gradient_checkpointing()
        return self

    def save(self, folder: Path, **facts: Any) -> None:
        """Write a folder that diffusers loads, with the preconditioning (and `facts`) in potstill.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        merged(self.network).save_pretrained(folder)
        about = {"kind": self.kind, "name": self.name, "shape": list(self.shape)}
        about |= {"preconditioning": written(self.preconditioning), **facts}
        (folder / SIDE_FILE).write_text(json.dumps(about, indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        pretrained: bool = True,
        preconditioning: Preconditioning | None = None,
    ) -> Self:
        """Load a diffusers model folder, a pipeline's folder, or a hub id; `pretrained=False` draws fresh weights.

        What the network predicts is read from potstill.json, else from the scheduler's config of the pipeline, unless
        `preconditioning` says it.
        """
        root = _folder(path)
        folder = next((root / part for part in ("unet", "transformer") if (root / part).is_dir()), root)
        config = _json(folder / "config.json")
        about = _json(root / SIDE_FILE) if (root / SIDE_FILE).is_file() else {}
        if preconditioning is None:
            preconditioning = _preconditioning(root, about)
        network = _network(folder, config, dtype, pretrained)
        size = network.config.sample_size if hasattr(network.config, "sample_size") else None
        size = [size, size] if isinstance(size, int) else list(size or [])
        shape = about.get("shape") or [network.config.in_channels, *size]
        return cls(network, preconditioning, shape, about.get("name") or Path(path).name)


def _folder(path: str | Path) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(path).startswith((".", "~")) or str(path).count("/") != 1:
        raise ModelError(f"There is no model folder {path}. Give a diffusers folder with config.json, or a hub id.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["config.json", SIDE_FILE, "scheduler_config.json", "scheduler/*.json", WEIGHTS.replace(".", "*.", 1)]
    wanted += [f"{part}/{end}" for part in ("unet", "transformer") for end in ("*.json", "diffusion*.safetensors*")]
    try:
        return Path(snapshot_download(str(path), allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as cause:
        raise ModelError(
            f"{path} is no folder here, and the Hugging Face hub or its cache does not have it."
        ) from cause


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(f"{path.parent} holds no {path.name}, so it is no diffusers model folder.") from None
    except json.JSONDecodeError as cause:
        raise ModelError(f"{path} is no JSON: {cause}") from cause


def _preconditioning(root: Path, about: Mapping[str, Any]) -> Preconditioning:
    if "preconditioning" in about:
        try:
            return _PRECONDITIONING.validate_python(about["preconditioning"])
        except ValidationError as cause:
            raise ModelError(f"{root / SIDE_FILE}: {cause.errors()[0]['msg']}") from cause
    places = (root / "scheduler" / "scheduler_config.json", root / "scheduler_config.json")
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ModelError(
            f"{root} does not say what its network predicts. Put the pipeline's scheduler/scheduler_config.json beside "
            f'it, or a {SIDE_FILE} such as {{"preconditioning": {{"name": "EDMPreconditioning", "sigma_data": 0.5}}}}.'
        )
    return scheduler_preconditioning(_json(found), str(found))


def scheduler_preconditioning(config: Mapping[str, Any], where: str = "scheduler") -> Preconditioning:
    """What a diffusers scheduler's config says of the network: flow matching, EDM, or a table of betas."""
    name = str(config.get("_class_name", ""))
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        return MatchedPreconditioning(RectifiedFlow(), "v", time_scale=float(config.get("num_train_timesteps", 1000)))
    if name.startswith("EDM"):
        return EDMPreconditioning(float(config.get("sigma_data", 0.5)))
    prediction = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}.get(config.get("prediction_type", "epsilon"))
    betas = config.get("beta_schedule", "linear")
    if (
        prediction is None
        or betas not in ("linear", "scaled_linear", "squaredcos_cap_v2")
        or config.get("trained_betas")
    ):
        raise ModelError(
            f"{where}: prediction {config.get('prediction_type')} with betas {betas} is not known. "
            f"Describe the network in {SIDE_FILE} instead."
        )
    steps = int(config.get("num_train_timesteps", 1000))
    table = DiscreteVP(steps, float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02)), betas)
    return MatchedPreconditioning(table, prediction)


def _network(folder: Path, config: Mapping[str, Any], dtype: torch.dtype, pretrained: bool) -> Any:
    name = str(config.get("_class_name", ""))
    own: dict[str, type[_PointNetwork]] = {"PointMLP": PointMLP, "PointAffine": PointAffine}
    if name in own:
        return own[name].from_pretrained(folder, pretrained).to(dtype)
    diffusers = require("diffusers", "diffusion")
    cls: Any = getattr(diffusers, name, None) if name else None
    is_model: bool = inspect.isclass(cls) and issubclass(cls, diffusers.ModelMixin)
    if not is_model:
        raise ModelError(f"{folder / 'config.json'} names the class {name or 'none'}, which is no diffusers model.")
    if not pretrained:
        return cls.from_config(dict(config)).to(dtype)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder} holds no safetensors weights (pickled ones are never read). Save it again with "
            "safe_serialization=True, or write pretrained: false for fresh weights."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network, report = cls.from_pretrained(
                str(folder), torch_dtype=dtype, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError) as cause:
        raise ModelError(f"{folder} cannot be loaded as a {name}: {str(cause).splitlines()[0]}") from cause
    if report["missing_keys"]:
        raise ModelError(f"{folder} lacks weights of {name}: {', '.join(sorted(report['missing_keys'])[:3])} ...")
    return network


class _PointNetwork(nn.Module):
    """What the networks for points share: a folder like those of diffusers."""

    config: "_Config"

    def save_pretrained(self, folder: Path) -> None:
        own = {k: v for k, v in self.config.items() if k != "in_channels"}
        about = {"_class_name": type(self).__name__, **own}
        (Path(folder) / "config.json").write_text(json.dumps(about, indent=2) + "\n")
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, str(Path(folder) / WEIGHTS))

    @classmethod
    def from_pretrained(cls, folder: Path, pretrained: bool = True) -> Self:
        config = _json(Path(folder) / "config.json")
        network = cls(**{k: v for k, v in config.items() if not k.startswith("_")})
        if pretrained:
            try:
                network.load_state_dict(load_file(str(Path(folder) / WEIGHTS)))
            except (OSError, RuntimeError) as cause:
                raise ModelError(
                    f"{folder} cannot be loaded as a {cls.__name__}: {str(cause).splitlines()[0]}"
                ) from cause
        return network


class PointAffine(_PointNetwork):
    """x -> shift + scale x along each axis, whatever the level: of unit noise, a Gaussian."""

    def __init__(self, dimension: int = 1, shift: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        self.config = _Config({"dimension": dimension, "in_channels": dimension})
        self.shift = nn.Parameter(torch.full((dimension,), float(shift)))
        self.scale = nn.Parameter(torch.full((dimension,), float(scale)))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.shift + self.scale * sample


class PointMLP(_PointNetwork):
    """A residual network for points [B, D] under noise, every block shifted and scaled by the level.

    The level enters as sines and cosines of `bands` frequencies; optional class labels as a learned vector, the last one
    for "none".
    """

    def __init__(
        self, dimension: int = 2, width: int = 128, depth: int = 3, bands: int = 16, num_class_embeds: int | None = None
    ) -> None:
        super().__init__()
        given = {"dimension": dimension, "width": width, "depth": depth, "bands": bands}
        self.config = _Config(given | {"num_class_embeds": num_class_embeds, "in_channels": dimension})
        self.register_buffer("frequencies", torch.linspace(0, math.log(8.0), bands).exp(), persistent=False)
        self.embed = nn.Sequential(nn.Linear(2 * bands, width), nn.SiLU(), nn.Linear(width, width))
        self.class_embedding = nn.Embedding(num_class_embeds, width) if num_class_embeds else None
        self.input = nn.Linear(dimension, width)
        self.layers = nn.ModuleList([_Block(width) for _ in range(depth)])
        self.output = nn.Linear(width, dimension)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        angle = timestep[:, None] * self.get_buffer("frequencies")
        level = self.embed(torch.cat([angle.sin(), angle.cos()], -1))
        if self.class_embedding is not None:
            level = level + self.class_embedding(class_labels)
        state = self.input(sample)
        for layer in self.layers:
            state = layer(state, level)
        return self.output(F.silu(state))


class _Config(dict[str, Any]):
    """A mapping whose entries read as attributes, as diffusers' configs do."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.inner = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, state: Tensor, level: Tensor) -> Tensor:
        scale, shift = self.modulation(F.silu(level)).chunk(2, -1)
        return state + self.inner(self.norm(state) * (1 + scale) + shift)


class MixtureDenoiser(_Denoising):
    """The optimal denoiser of a Gaussian mixture: an exact teacher without parameters."""

    def __init__(
        self, mixture: GaussianMixture, shape: Sequence[int] | None = None, name: str = "exact mixture"
    ) -> None:
        super().__init__()
        self.name = name
        self.shape = tuple(shape or [mixture.features])
        if math.prod(self.shape) != mixture.features:
            raise ModelError(f"{name}: points of {mixture.features} numbers cannot have shape {list(self.shape)}.")
        self._parts = list(vars(mixture))
        for part, value in vars(mixture).items():
            self.register_buffer(part, value.contiguous(), persistent=False)

    @property
    def mixture(self) -> GaussianMixture:
        """The mixture, on the device of this module."""
        own = object.__new__(GaussianMixture)
        vars(own).update({part: getattr(self, part) for part in self._parts})
        return own

    def forward(self, x: Tensor, sigma: Tensor | float, condition: Condition = None) -> Tensor:
        """E[x0 | x] at noise level sigma. [B, *shape]."""
        if condition is not None:
            raise ModelError(f"{self.name} takes no condition.")
        return self.mixture.denoise(x, sigma)

    def features(self, *_args: Any, **_options: Any) -> dict[str, Tensor]:
        raise ModelError(
            f"{self.name} is a formula and has no features. Take a denoiser with a network, or another critic."
        )


class Guided(_Denoising):
    """Classifier-free guidance: D(none) + scale (D(condition) - D(none)). Scale 1 is the conditional denoiser."""

    def __init__(self, denoiser: Denoiser, scale: float, none: Condition = None) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.scale = scale
        self.none = none  # what stands for no condition, for one row; None is the network's own
        self.name, self.shape = denoiser.name, denoiser.shape

    def forward(self, x: Tensor, sigma: Tensor | float, condition: Condition = None) -> Tensor:
        if condition is None or self.scale == 1.0:
            return self.denoiser(x, sigma, condition)
        one = torch.zeros(len(x), dtype=torch.long, device=x.device)
        free = self.denoiser(x, sigma, rows(self.none, one))
        return free + self.scale * (self.denoiser(x, sigma, condition) - free)

    @property
    def null_label(self) -> int | None:
        return self.denoiser.null_label


def guided(denoiser: Any, scale: float) -> Any:
    """The denoiser under guidance, or itself at scale 1."""
    return Guided(denoiser, scale) if scale > 1 else denoiser


class OneStep(nn.Module):
    """A one-step generator G(z) = D(sigma_init z; sigma_init) around a denoiser.

    then: further noise levels, falling, for a generator of several calls: what it made is noised to the next level and
    denoised again. `forward` is the first call alone, `sample` all of them.
    """

    kind: ClassVar[str] = "one_step"
    PACKAGED: ClassVar[dict[str, Callable[..., "OneStep"]]] = {}

    def __init__(self, denoiser: Denoiser, sigma_init: float = 2.5, then: Sequence[float] = ()) -> None:
        super().__init__()
        if not sigma_init > 0:
            raise ModelError(f"sigma_init must be positive, got {sigma_init}.")
        self.denoiser = denoiser
        self.sigma_init = float(sigma_init)
        self.then = tuple(map(float, then))

    @property
    def levels(self) -> list[float]:
        """The noise levels of all calls."""
        return [self.sigma_init, *self.then]

    @property
    def name(self) -> str:
        return self.denoiser.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.denoiser.shape

    def forward(self, z: Tensor, condition: Condition = None) -> Tensor:
        """Samples from unit noise z [B, *shape]."""
        return self.denoiser(self.sigma_init * z, self.sigma_init, condition)

    @torch.no_grad()
    def sample(self, ids_B: Tensor, *, seed: int = 0, condition: Condition = None, batch: int = 256) -> Tensor:
        """Samples, functions of (seed, id, condition) alone. [B, *shape]."""
        return self.denoiser.sample(
            ids_B, seed=seed, condition=condition, sigmas=[*self.levels, 0.0], solver=samplers.consistency, batch=batch
        )

    def generate(self, count: int, seed: int = 0) -> Tensor:
        """Samples 0 .. count - 1; a class-conditional generator takes its labels in turn. [count, *shape]."""
        ids_B = torch.arange(count, device=next(self.parameters()).device)
        return self.sample(ids_B, seed=seed, condition=labels_in_turn(self.denoiser, ids_B))

    def save(self, folder: Path) -> None:
        """The denoiser's folder, with sigma_init (and further levels) in its potstill.json."""
        more = {"then": list(self.then)} if self.then else {}
        self.denoiser.save(folder, sigma_init=self.sigma_init, kind=self.kind, **more)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, dtype: torch.dtype = torch.float32, pretrained: bool = True
    ) -> "OneStep":
        """Load what `save` wrote."""
        denoiser = Denoiser.from_pretrained(path, dtype=dtype, pretrained=pretrained)
        side = _folder(path) / SIDE_FILE
        about = _json(side) if side.is_file() else {}
        if "sigma_init" not in about:
            raise ModelError(f"{path} holds a denoiser, no one-step generator: its {SIDE_FILE} has no sigma_init.")
        return cls(denoiser, about["sigma_init"], about.get("then", ()))


def labels_in_turn(denoiser: Any, ids_B: Tensor) -> Tensor | None:
    """Labels 0, 1, ... over and over, by id; None for a denoiser without labels. [B]."""
    none = getattr(denoiser, "null_label", None)
    return ids_B % none if none else None


def _sides(size: int | Sequence[int]) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)


def _unet(
    name: str,
    channels: int,
    size: int | Sequence[int],
    classes: int | None,
    widths: Sequence[int],
    depth: int,
    sigma_data: float,
    attention: bool,
) -> Denoiser:
    models = require("diffusers", "diffusion")
    network = models.UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(widths),
        down_block_types=("DownBlock2D",) * len(widths),
        up_block_types=("UpBlock2D",) * len(widths),
        layers_per_block=depth,
        norm_num_groups=8,
        add_attention=attention,
        num_class_embeds=None if classes is None else classes + 1,
    )
    nn.init.zeros_(network.conv_out.weight)
    nn.init.zeros_(network.conv_out.bias)
    return Denoiser(network, EDMPreconditioning(sigma_data, time_scale=10.0), [channels, *_sides(size)], name)


def unet_small(
    *,
    channels: int,
    size: int,
    classes: int | None = None,
    conditional: bool = False,
    widths: Sequence[int] = (16, 32, 64),
    depth: int = 1,
    attention: bool = False,
    sigma_data: float = 0.5,
) -> Denoiser:
    """Some 600,000 parameters, for images of about 28 x 28. `conditional` needs `classes`; one more label is "none".

    `attention` in the middle block is off: torch's forward-mode derivatives, which consistency training takes, stop there.
    """
    labels = _labels("unet-small", classes, conditional)
    return _unet("unet-small", channels, size, labels, widths, depth, sigma_data, attention)


def unet_tiny(
    *,
    channels: int,
    size: int,
    classes: int | None = None,
    conditional: bool = False,
    widths: Sequence[int] = (8, 16),
    depth: int = 1,
    attention: bool = False,
    sigma_data: float = 0.5,
) -> Denoiser:
    """Some forty thousand parameters: for tests and 8 x 8 images."""
    labels = _labels("unet-tiny", classes, conditional)
    return _unet("unet-tiny", channels, size, labels, widths, depth, sigma_data, attention)


def mlp_denoiser(
    *,
    dimension: int = 2,
    classes: int | None = None,
    conditional: bool = False,
    width: int = 128,
    depth: int = 3,
    bands: int = 16,
    sigma_data: float = 0.5,
) -> Denoiser:
    """For points of low dimension."""
    labels = _labels("mlp-denoiser", classes, conditional)
    network = PointMLP(dimension, width, depth, bands, None if labels is None else labels + 1)
    return Denoiser(network, EDMPreconditioning(sigma_data), [dimension], "mlp-denoiser")


def affine(*, dimension: int = 1, shift: float = 0.0, scale: float = 1.0) -> Denoiser:
    """shift + scale x: as a one-step generator from unit noise, a Gaussian whose density is known."""
    preconditioning = MatchedPreconditioning(VE(), "x0")  # the bare network
    return Denoiser(PointAffine(dimension, shift, scale), preconditioning, [dimension], "affine")


def exact_mixture(*, mixture: GaussianMixture) -> MixtureDenoiser:
    """The data source's own density as a teacher that needs no training."""
    return MixtureDenoiser(mixture)


def dit_tiny(
    *,
    channels: int,
    size: int,
    classes: int | None = None,
    conditional: bool = False,
    patch: int = 4,
    layers: int = 2,
    heads: int = 4,
    width: int = 64,
    sigma_data: float = 0.5,
) -> Denoiser:
    """A small diffusion transformer (DiT) on square images whose side `patch` divides."""
    models = require("diffusers", "diffusion")
    if size % patch:
        raise ModelError(
            f"dit-tiny: patches of {patch} do not tile images of side {size}. Give a patch that divides it."
        )
    network = models.DiTTransformer2DModel(
        sample_size=size,
        patch_size=patch,
        in_channels=channels,
        out_channels=channels,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        num_embeds_ada_norm=_labels("dit-tiny", classes, conditional) or 1,
    )
    nn.init.zeros_(network.proj_out_2.weight)
    nn.init.zeros_(network.proj_out_2.bias)
    return Denoiser(network, EDMPreconditioning(sigma_data, time_scale=10.0), [channels, size, size], "dit-tiny")


def _labels(name: str, classes: int | None, conditional: bool) -> int | None:
    if conditional and classes is None:
        raise ModelError(f"{name}: conditional needs the number of classes, which this data source does not tell.")
    return classes if conditional else None


Denoiser.PACKAGED = {
    "unet-small": unet_small,
    "unet-tiny": unet_tiny,
    "mlp-denoiser": mlp_denoiser,
    "affine": affine,
    "exact-mixture": exact_mixture,
    "dit-tiny": dit_tiny,
}

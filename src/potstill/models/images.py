"""Image classifiers: one adapter over transformers, timm and the small reference networks of this file.

B batch, C H W images, V classes. The reference networks are transformers models with a config class of their own, so
`save_pretrained`, `from_pretrained` and `AutoModelForImageClassification` treat them as they treat any other.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PretrainedConfig, PreTrainedModel, ViTConfig
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from potstill.contracts.errors import ModelError, RecipeError, require

NORMS = ("batch", "group")
BLOCKS = ("plain", "residual", "separable")


class SmallConvConfig(PretrainedConfig):
    """A convolutional classifier of any image size: a stem, then stages of blocks of which each halves the resolution.

    widths: channels of each stage (the stem has the first's); depths: blocks of each stage; block: "plain" (3x3),
    "residual" (two 3x3 and a skip) or "separable" (3x3 depthwise, then 1x1); norm: "batch", or "group" (groups of 8
    channels, so that no sample sees another); stem_stride 2 starts at half the resolution.
    """

    model_type = "potstill_small_conv"

    def __init__(
        self,
        block: str = "residual",
        widths: Sequence[int] = (16, 32, 64),
        depths: Sequence[int] = (1, 1, 1),
        norm: str = "batch",
        stem_stride: int = 1,
        num_channels: int = 1,
        **kwargs: Any,
    ) -> None:
        self.block, self.norm, self.stem_stride, self.num_channels = block, norm, stem_stride, num_channels
        self.widths, self.depths = list(widths), list(depths)
        super().__init__(**kwargs)


class SmallMLPConfig(PretrainedConfig):
    """Flattened pixels, `depth` hidden layers of `width` rectified units, a linear head."""

    model_type = "potstill_small_mlp"

    def __init__(
        self, width: int = 256, depth: int = 2, num_channels: int = 1, image_size: int = 28, **kwargs: Any
    ) -> None:
        self.width, self.depth, self.num_channels, self.image_size = width, depth, num_channels, image_size
        super().__init__(**kwargs)


def _norm(kind: str, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(max(channels // 8, 1), channels)


def _conv(inputs: int, outputs: int, stride: int, norm: str, kernel: int = 3, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, _norm(norm, outputs)]


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, norm: str) -> None:
        super().__init__()
        first, second = _conv(inputs, outputs, stride, norm), _conv(outputs, outputs, 1, norm)
        self.body = nn.Sequential(*first, nn.ReLU(), *second)
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else nn.Sequential(*_conv(inputs, outputs, stride, norm, kernel=1))

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) + self.skip(x)).relu()


def _block(kind: str, inputs: int, outputs: int, stride: int, norm: str) -> nn.Module:
    if kind == "residual":
        return _Residual(inputs, outputs, stride, norm)
    if kind == "plain":
        return nn.Sequential(*_conv(inputs, outputs, stride, norm), nn.ReLU())
    depthwise, pointwise = _conv(inputs, inputs, stride, norm, groups=inputs), _conv(inputs, outputs, 1, norm, kernel=1)
    return nn.Sequential(*depthwise, nn.ReLU(), *pointwise, nn.ReLU())


class _SmallModel(PreTrainedModel):
    main_input_name = "pixel_values"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, a=5**0.5)
            nn.init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class SmallConvForImageClassification(_SmallModel):
    """`pixel_values` [B, C, H, W] -> logits [B, V]. Taps: "stem", "stages.0", ..., "head"."""

    config_class = SmallConvConfig
    base_model_prefix = "conv"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        widths = config.widths
        self.stem = nn.Sequential(*_conv(config.num_channels, widths[0], config.stem_stride, config.norm), nn.ReLU())
        stages = []
        for i, (width, depth) in enumerate(zip(widths, config.depths, strict=True)):
            before, stride = (widths[0], 1) if i == 0 else (widths[i - 1], 2)
            blocks = [_block(config.block, before, width, stride, config.norm)]
            blocks += [_block(config.block, width, width, 1, config.norm) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.head = nn.Linear(widths[-1], config.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> ImageClassifierOutputWithNoAttention:
        x = self.stem(pixel_values)
        for stage in self.stages:
            x = stage(x)
        return ImageClassifierOutputWithNoAttention(logits=self.head(x.mean((-2, -1))))


class SmallMLPForImageClassification(_SmallModel):
    """`pixel_values` [B, C, H, W] -> logits [B, V]. Taps: "layers.0", ..., "head"."""

    config_class = SmallMLPConfig
    base_model_prefix = "mlp"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        sizes = [config.num_channels * config.image_size**2] + [config.width] * config.depth
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(sizes))
        self.head = nn.Linear(sizes[-1], config.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> ImageClassifierOutputWithNoAttention:
        x = pixel_values.flatten(1)
        for layer in self.layers:
            x = layer(x)
        return ImageClassifierOutputWithNoAttention(logits=self.head(x))


for _config, _model in (
    (SmallConvConfig, SmallConvForImageClassification),
    (SmallMLPConfig, SmallMLPForImageClassification),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForImageClassification.register(_config, _model, exist_ok=True)


class ImageClassifier(nn.Module):
    """A network of `AutoModelForImageClassification` as a function from images [B, C, H, W] to logits [B, V]."""

    kind: ClassVar[str] = "image_classifier"
    PACKAGED: ClassVar[dict[str, Callable[..., "ImageClassifier"]]] = {}

    def __init__(self, network: PreTrainedModel, name: str = "") -> None:
        super().__init__()
        self.network = network
        self.name = name or network.config.model_type

    @property
    def classes(self) -> int:
        return int(self.network.config.num_labels or 0)

    @property
    def head_name(self) -> str:
        """The linear layer that makes the logits; what enters it are the classifier's last features."""
        linear = [(name, m) for name, m in self.network.named_modules() if isinstance(m, nn.Linear)]
        heads = [name for name, m in linear if m.out_features == self.classes]
        if not heads:
            raise ModelError(f"{self.name} has no linear layer of {self.classes} outputs to take for its head.")
        return f"network.{heads[-1]}"

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits [B, V]. Raises ModelError for images of another shape than the network takes."""
        if images_BCHW.ndim != 4:
            raise ModelError(f"{self.name} takes images [B, C, H, W], got {list(images_BCHW.shape)}.")
        config, (channels, *size) = self.network.config, images_BCHW.shape[1:]
        if (expected := getattr(config, "num_channels", channels)) != channels:
            raise ModelError(f"{self.name} takes {expected} channels, got images {list(images_BCHW.shape)}.")
        fixed = _fixed_size(config)
        if fixed is not None and fixed != tuple(size):
            raise ModelError(
                f"{self.name} takes images of {fixed[0]}x{fixed[1]}, got {size[0]}x{size[1]}. Resize the data, or "
                f"build the network for that size (pretrained: false)."
            )
        return self.network(pixel_values=images_BCHW).logits

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        pretrained: bool = True,
        classes: int | None = None,
        channels: int | None = None,
        size: int | None = None,
    ) -> Self:
        """From a Hugging Face folder or id (timm's are "timm/..."). Safetensors only; no code of the folder is run.

        `classes` gives weights of another task a fresh head. Without `pretrained` only the architecture is taken, with
        fresh weights, and `channels` and `size` are the task's.
        Raises ModelError where the folder, its weights or its architecture do not serve.
        """
        path = str(path)
        if path.startswith("timm/"):
            require("timm", "timm")
        try:
            config: Any = AutoConfig.from_pretrained(path, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as cause:
            raise ModelError(
                f"{path} is no model folder and no id that can be read: {_first_line(cause)} "
                f"Expected a folder with config.json and safetensors weights, a Hugging Face id, or one of: "
                f"{', '.join(cls.PACKAGED)}."
            ) from cause
        if type(config) not in AutoModelForImageClassification._model_mapping:
            raise ModelError(f"{path} holds a {config.model_type}, which transformers has no image classifier for.")
        if classes is not None and classes != config.num_labels:
            config.num_labels = classes
        if not pretrained:
            if channels is not None:
                config.num_channels = channels
            if size is not None and hasattr(config, "image_size"):
                config.image_size = size
            return cls(_build(config, path).to(dtype), path)  # type: ignore[arg-type]
        try:
            network, report = AutoModelForImageClassification.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=classes is not None,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError) as cause:
            raise ModelError(
                f"The weights of {path} cannot be loaded: {_first_line(cause)} Only safetensors are read; convert "
                f"other files with save_pretrained, or take fresh weights (pretrained: false)."
            ) from cause
        if (missing := sorted(report["missing_keys"])) and classes is None:
            raise ModelError(
                f"{path} lacks {len(missing)} of the classifier's weights ({', '.join(missing[:3])}). Give classes to "
                f"start from a fresh head, or take a model that was trained to classify."
            )
        model = cls(network, path)
        model.network.train()  # from_pretrained leaves evaluation mode, a fresh network training mode
        return model

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors, which `AutoModelForImageClassification.from_pretrained` reads.

        The reference networks need `import potstill.models.images` before.
        """
        self.network.save_pretrained(folder)


def _first_line(error: BaseException) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if line.endswith((".", "!", "?")) else f"{line}."


def _build(config: Any, name: str) -> PreTrainedModel:
    try:
        return AutoModelForImageClassification.from_config(config, trust_remote_code=False)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as cause:
        raise ModelError(f"{name} cannot be built: {_first_line(cause)}") from cause


def _fixed_size(config: Any) -> tuple[int, int] | None:
    """The only image size that a network takes, or None where it takes any (convolutions, shifted windows)."""
    if not (isinstance(config, SmallMLPConfig) or (hasattr(config, "patch_size") and config.model_type in _POSITIONAL)):
        return None
    size = config.image_size
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


_POSITIONAL = ("vit", "deit", "beit", "dinov2", "data2vec-vision", "ijepa", "vit_msn")


def _ints(value: int | Sequence[int], stages: int, option: str) -> list[int]:
    values = [value] * stages if isinstance(value, int) else list(value)
    if len(values) != stages or min(values) < 1:
        raise RecipeError(f"{option} must be one positive number or {stages} of them, one a stage, got {value}.")
    return values


def _one_of(value: str, known: Sequence[str], option: str) -> str:
    if value not in known:
        raise RecipeError(f"{option} must be one of {', '.join(known)}, got {value!r}.")
    return value


def conv_network(
    classes: int = 10,
    channels: int = 1,
    size: int = 28,
    *,
    name: str,
    block: str,
    width: int | Sequence[int],
    depth: int | Sequence[int],
    stages: int = 3,
    norm: str = "batch",
    stem_stride: int | None = None,
) -> ImageClassifier:
    """A convolutional reference network. `width` is the first stage's (each next one doubles) or one a stage.

    `stem_stride` defaults to 2 for images of more than 16 pixels, which costs a quarter of 1 and little accuracy on
    digits and clothes, and to 1 below.
    """
    stem_stride = stem_stride or (2 if size > 16 else 1)
    if isinstance(width, int):
        width = [width * 2**i for i in range(stages)]
    if size < (least := stem_stride * 2 ** (stages - 1)):
        raise RecipeError(f"{name} with {stages} stages needs images of at least {least} pixels, got {size}.")
    config = SmallConvConfig(
        _one_of(block, BLOCKS, "block"),
        _ints(width, stages, "width"),
        _ints(depth, stages, "depth"),
        _one_of(norm, NORMS, "norm"),
        stem_stride,
        channels,
        num_labels=classes,
    )
    return ImageClassifier(_build(config, name), name)


def mlp(
    classes: int = 10, channels: int = 1, size: int = 28, *, width: int = 256, depth: int = 2, name: str = "mlp"
) -> ImageClassifier:
    config = SmallMLPConfig(width, depth, channels, size, num_labels=classes)
    return ImageClassifier(_build(config, name), name)


def vit(
    classes: int = 10,
    channels: int = 1,
    size: int = 28,
    *,
    width: int = 48,
    depth: int = 3,
    heads: int = 4,
    patch: int | None = None,
    name: str = "vit-xs",
) -> ImageClassifier:
    """transformers' ViT. `patch` defaults to the smallest divisor of the size that makes at most 7 x 7 patches."""
    patch = patch or next(p for p in range(1, size + 1) if size % p == 0 and size // p <= 7)
    if size % patch or width % heads:
        raise RecipeError(
            f"{name} needs a patch that divides the image size and heads that divide the width, got patch {patch}, "
            f"size {size}, heads {heads}, width {width}."
        )
    config = ViTConfig(  # type: ignore[call-arg]
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=2 * width,
        image_size=size,
        patch_size=patch,
        num_channels=channels,
        num_labels=classes,
    )
    return ImageClassifier(_build(config, name), name)


def timm_network(
    classes: int = 10,
    channels: int = 1,
    size: int = 28,
    *,
    architecture: str,
    model_args: dict[str, Any] | None = None,
) -> ImageClassifier:
    """Any architecture of timm with fresh weights; `model_args` go to `timm.create_model`."""
    timm = require("timm", "timm")
    from transformers import TimmWrapperConfig

    if architecture not in timm.list_models():
        near = ", ".join(timm.list_models(f"*{architecture[:4]}*")[:5])
        raise RecipeError(f"timm has no architecture {architecture!r}. Near it: {near}.")
    # timm's positional networks take their size as img_size; its convolutional ones refuse the keyword.
    sized = {"img_size": size} if timm.get_pretrained_cfg(architecture).fixed_input_size else {}
    model_args = {"in_chans": channels, **sized, **(model_args or {})}
    config: Any = TimmWrapperConfig(architecture=architecture, model_args=model_args)
    config.num_labels = classes
    return ImageClassifier(_build(config, f"timm/{architecture}"), f"timm/{architecture}")


def _packaged(name: str, **defaults: Any) -> Callable[..., ImageClassifier]:
    return functools.partial(conv_network, name=name, **defaults)


ImageClassifier.PACKAGED = {
    "resnet-xs": _packaged("resnet-xs", block="residual", width=8, depth=1),
    "resnet-s": _packaged("resnet-s", block="residual", width=16, depth=1),
    "resnet-m": _packaged("resnet-m", block="residual", width=24, depth=2),
    "convnet": _packaged("convnet", block="plain", width=16, depth=1),
    "mobile-xs": _packaged("mobile-xs", block="separable", width=16, depth=1),
    "vit-xs": vit,
    "mlp": mlp,
    "timm": timm_network,
}

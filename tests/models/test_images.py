import importlib.util
import inspect

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    GPT2Config,
    MobileNetV2Config,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
    ViTModel,
)

from potstill.contracts.errors import MissingExtra, ModelError, RecipeError
from potstill.models.images import ImageClassifier
from potstill.models.taps import tap

OWN = [name for name in ImageClassifier.PACKAGED if name != "timm"]
FIELD = {
    "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    "vit": ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, patch_size=8),
    "convnext": ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
    "swin": SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2, patch_size=4),
    "mobilenet_v2": MobileNetV2Config(depth_multiplier=0.1, min_depth=4, finegrained_output=False),
}


def images(size=28, channels=1, batch=4, seed=0):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def tiny(name):
    torch.manual_seed(0)
    config = type(FIELD[name]).from_dict(FIELD[name].to_dict() | {"image_size": 32, "num_channels": 3})
    config.num_labels = 5
    return ImageClassifier(AutoModelForImageClassification.from_config(config))


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize(("size", "channels"), [(28, 1), (8, 1), (32, 3)])
def test_packaged_networks_take_the_tasks_images_and_learn(name, size, channels):
    torch.manual_seed(0)
    model = ImageClassifier.PACKAGED[name](classes=7, channels=channels, size=size)
    x, y = images(size, channels), torch.arange(4)
    before = cross_entropy(model(x), y)
    assert model(x).shape == (4, 7)
    assert model.classes == 7
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    before.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())  # every weight takes part
    for _ in range(20):
        optimizer.step()
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
    assert loss < 0.5 * before


@pytest.mark.parametrize("name", OWN)
def test_saved_networks_come_back_through_transformers(name, tmp_path):
    torch.manual_seed(0)
    model = ImageClassifier.PACKAGED[name](classes=3, size=8)
    model(images(8))  # moves the running statistics, which must be saved too
    model.eval().save(tmp_path)
    again = ImageClassifier.from_pretrained(tmp_path).eval()
    assert_close(again(images(8)), model(images(8)), rtol=0, atol=0)
    plain = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert_close(plain(pixel_values=images(8)).logits, model(images(8)), rtol=0, atol=0)


@pytest.mark.parametrize("name", FIELD)
def test_networks_of_the_field_go_through_the_same_adapter(name, tmp_path):
    model, x = tiny(name), images(32, 3)
    assert model(x).shape == (4, 5)
    assert model.head_name.startswith("network.classifier")
    model.eval().save(tmp_path)
    again = ImageClassifier.from_pretrained(tmp_path)
    assert again.network.training  # as a fresh network
    assert_close(again.eval()(x), model(x))
    fresh = ImageClassifier.from_pretrained(tmp_path, pretrained=False, classes=9, channels=1, size=64)
    assert fresh(images(64, 1)).shape == (4, 9)
    headed = ImageClassifier.from_pretrained(tmp_path, classes=9)
    assert headed(x).shape == (4, 9)
    assert_close(next(headed.parameters()), next(model.parameters()))  # all but the head is the checkpoint's


def test_group_norm_keeps_samples_apart_and_batch_norm_does_not():
    for norm, apart in (("group", True), ("batch", False)):
        torch.manual_seed(0)
        model = ImageClassifier.PACKAGED["resnet-xs"](norm=norm)
        alone, among = model(images(batch=2)), model(torch.cat([images(batch=2), 5 + images(batch=2, seed=1)]))[:2]
        assert torch.allclose(alone, among, atol=1e-5) == apart


def test_options_are_shapes():
    model = ImageClassifier.PACKAGED["convnet"](width=[4, 12], depth=[1, 2], stages=2)
    assert [len(stage) for stage in model.network.stages] == [1, 2]
    assert model.network.head.in_features == 12
    for stride in (1, 2):
        model = ImageClassifier.PACKAGED["convnet"](stem_stride=stride)
        with tap(model, [f"network.stages.{i}" for i in range(3)]) as taps:
            model(images())
        sizes = [tuple(x.shape[1:]) for x in taps.outputs.values()]
        assert sizes == [(16 * 2**i, s, s) for i, s in enumerate([[28, 14, 7], [14, 7, 4]][stride - 1])]
    assert "stem_stride" in inspect.signature(ImageClassifier.PACKAGED["resnet-m"]).parameters
    assert ImageClassifier.PACKAGED["vit-xs"](size=28).network.config.patch_size == 4
    assert ImageClassifier.PACKAGED["vit-xs"](size=8).network.config.patch_size == 2
    with pytest.raises(RecipeError, match="norm must be one of batch, group, got 'layer'"):
        ImageClassifier.PACKAGED["resnet-s"](norm="layer")
    with pytest.raises(RecipeError, match="width must be one positive number or 3 of them"):
        ImageClassifier.PACKAGED["resnet-s"](width=[4, 8])
    with pytest.raises(RecipeError, match="needs images of at least 4 pixels, got 2"):
        ImageClassifier.PACKAGED["resnet-s"](size=2)
    with pytest.raises(RecipeError, match="a patch that divides the image size"):
        ImageClassifier.PACKAGED["vit-xs"](size=28, patch=5)
    with pytest.raises(TypeError, match="widht"):
        ImageClassifier.PACKAGED["resnet-s"](widht=3)


def test_images_of_another_shape_are_refused():
    with pytest.raises(ModelError, match=r"takes 1 channels, got images \[4, 3, 28, 28\]"):
        ImageClassifier.PACKAGED["resnet-xs"]()(images(28, 3))
    with pytest.raises(ModelError, match=r"takes images of 28x28, got 32x32\. Resize the data"):
        ImageClassifier.PACKAGED["vit-xs"]()(images(32))
    with pytest.raises(ModelError, match=r"takes images of 28x28, got 8x8"):
        ImageClassifier.PACKAGED["mlp"]()(images(8))
    with pytest.raises(ModelError, match=r"takes images \[B, C, H, W\], got \[4, 784\]"):
        ImageClassifier.PACKAGED["mlp"]()(torch.zeros(4, 784))


def test_folders_that_do_not_serve_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no model folder and no id that can be read.*resnet-xs"):
        ImageClassifier.from_pretrained(tmp_path / "nothing")
    GPT2Config(n_layer=1).save_pretrained(tmp_path / "gpt")
    with pytest.raises(ModelError, match="holds a gpt2, which transformers has no image classifier for"):
        ImageClassifier.from_pretrained(tmp_path / "gpt")
    FIELD["vit"].save_pretrained(tmp_path / "empty")
    with pytest.raises(ModelError, match="cannot be loaded.*Only safetensors are read"):
        ImageClassifier.from_pretrained(tmp_path / "empty")
    model = tiny("vit")
    model.network.config.save_pretrained(tmp_path / "pickled")
    torch.save(model.network.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="Only safetensors are read"):
        ImageClassifier.from_pretrained(tmp_path / "pickled")
    ViTModel(model.network.config).save_pretrained(tmp_path / "trunk")
    with pytest.raises(ModelError, match=r"lacks 2 of the classifier's weights .*Give classes"):
        ImageClassifier.from_pretrained(tmp_path / "trunk")
    assert ImageClassifier.from_pretrained(tmp_path / "trunk", classes=5)(images(32, 3)).shape == (4, 5)


def test_timm_is_an_extra(tmp_path):
    if importlib.util.find_spec("timm") is None:
        for ask in (
            lambda: ImageClassifier.PACKAGED["timm"](architecture="resnet18"),
            lambda: ImageClassifier.from_pretrained("timm/resnet18.a1_in1k"),
        ):
            with pytest.raises(MissingExtra, match=r"pip install 'potstill\[timm\]'"):
                ask()
        pytest.skip("timm is not installed")
    model = ImageClassifier.PACKAGED["timm"](classes=4, channels=1, size=32, architecture="resnet18")
    assert model(images(32)).shape == (4, 4)
    model.eval().save(tmp_path)
    assert_close(ImageClassifier.from_pretrained(tmp_path).eval()(images(32)), model(images(32)))
    with pytest.raises(RecipeError, match="timm has no architecture 'resnet18x'"):
        ImageClassifier.PACKAGED["timm"](architecture="resnet18x")

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import ViTConfig, ViTForImageClassification

from potstill.contracts.errors import ModelError
from potstill.models.images import ImageClassifier
from potstill.models.taps import batch_statistics, batchnorm_coupled, tap, tap_batchnorm


def network(seed=0, **options):
    torch.manual_seed(seed)
    return ImageClassifier.PACKAGED["resnet-xs"](size=8, **options).double()


def images(seed=0):
    return torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_taps_are_what_flows():
    model = network().eval()
    names = ["network.stages.0", "network.stages.2"]
    with tap(model, names, inputs=["network.head", "network.stages.1"]) as taps:
        logits = model(images())
    assert list(taps.outputs) == names
    assert_close(taps.outputs["network.stages.0"], taps.inputs["network.stages.1"], rtol=0, atol=0)
    assert_close(model.network.head(taps.inputs["network.head"]), logits)
    assert_close(taps.outputs["network.stages.2"].mean((-2, -1)), taps.inputs["network.head"])
    assert hooks_of(model) == 0


def test_gradients_flow_through_taps_and_no_grad_is_respected():
    model = network()
    with tap(model, ["network.stages.0"]) as taps:
        model(images())
    taps.outputs["network.stages.0"].square().sum().backward()
    assert model.network.stem[0].weight.grad.abs().sum() > 0
    assert model.network.head.weight.grad is None
    with tap(model, ["network.stages.0"]) as taps, torch.no_grad():
        model(images())
    assert not taps.outputs["network.stages.0"].requires_grad


def test_hooks_go_even_when_the_forward_pass_or_a_name_fails():
    model = network()
    with pytest.raises(RuntimeError, match="by the user"), tap(model, ["network.stem"]):
        raise RuntimeError("stopped by the user")
    assert hooks_of(model) == 0
    wrong = pytest.raises(ModelError, match=r"has no module 'network\.haed'\. Did you mean network\.head\?")
    with wrong, tap(model, ["network.stem", "network.haed"]):
        pass
    assert hooks_of(model) == 0
    with tap(model, ["network.stem"]) as taps:
        pass
    with pytest.raises(ModelError, match="Nothing flowed through network.stem"):
        taps.outputs["network.stem"]


def test_two_networks_of_one_class_do_not_share_hooks():
    a, b = network(0), network(1)
    with tap(a, ["network.stem"]) as taps:
        b(images())
    assert not taps.outputs


def test_outputs_of_transformers_are_taken_apart():
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    model = ViTForImageClassification(config).eval()
    with tap(model, ["vit", "vit.layernorm"]) as taps:
        model(torch.randn(2, 3, 8, 8))
    assert taps.outputs["vit"].shape == (
        2,
        5,
        8,
    )  # the first of BaseModelOutputWithPooling: 4 patches and a class token
    assert_close(taps.outputs["vit"], taps.outputs["vit.layernorm"])


def test_batchnorm_statistics_are_mean_and_biased_variance_of_the_input():
    model = network().eval()
    first = "network.stem.1"
    with tap_batchnorm(model) as seen, tap(model, inputs=[first, "network.stages.2.0.skip.1"]) as taps:
        model(images())
    assert next(iter(seen)) == first
    assert len(seen) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    for name, x in taps.inputs.items():
        flat = x.transpose(0, 1).flatten(1)  # C, N H W
        assert_close(seen[name].mean_C, flat.sum(1) / flat.shape[1])
        assert_close(seen[name].variance_C, ((flat - flat.mean(1, keepdim=True)) ** 2).sum(1) / flat.shape[1])
    assert_close(seen[first].running_mean_C, torch.zeros(8).double())
    assert hooks_of(model) == 0


def test_matching_is_exact_where_the_running_statistics_are_the_batchs_and_ignores_the_order():
    """After a training pass with momentum 1 the running mean is the batch's, the running variance its unbiased."""
    model = network()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 1.0
    model(images())
    with tap_batchnorm(model) as seen:  # still in training mode: the layers' inputs are the same again
        model(images())
    with tap_batchnorm(model) as shuffled:
        model(images()[torch.tensor([3, 1, 5, 0, 2, 4])])
    for (name, s), t in zip(seen.items(), shuffled.values()):
        n = 6 * 64 if "stem" in name or "stages.0" in name else 6 * 16 if "stages.1" in name else 6 * 4
        assert_close(s.mean_C, s.running_mean_C)
        assert_close(s.variance_C * n / (n - 1), s.running_variance_C)
        assert_close(s.mean_C, t.mean_C)
        assert_close(s.variance_C, t.variance_C)


def test_statistics_reach_the_pixels():
    model, x = network().eval().requires_grad_(False), images().requires_grad_()
    with tap_batchnorm(model) as seen:
        model(x)
    loss = torch.stack([(s.mean_C - s.running_mean_C).norm() for s in seen.values()]).sum()
    assert torch.autograd.grad(loss, x)[0].abs().sum() > 0


def test_statistics_of_vectors_and_networks_without_any():
    layer = nn.BatchNorm1d(3).eval()
    x = torch.randn(5, 3)
    with tap_batchnorm(layer) as seen:
        layer(x)
    assert_close(seen[""].variance_C, x.var(0, correction=0))
    for model in (network(norm="group"), nn.BatchNorm1d(3, track_running_stats=False)):
        with pytest.raises(ModelError, match="no BatchNorm layers with running statistics"), tap_batchnorm(model):
            pass


def test_running_statistics_are_those_before_the_pass():
    layer = nn.BatchNorm1d(3)
    with tap_batchnorm(layer) as seen:
        layer(1 + torch.randn(5, 3))
    assert_close((seen[""].running_mean_C, seen[""].running_variance_C), (torch.zeros(3), torch.ones(3)))
    assert layer.running_mean.abs().sum() > 0  # the pass did move them


def test_coupled_is_training_mode_batchnorm():
    model = network()
    assert batchnorm_coupled(model)
    assert not batchnorm_coupled(model.eval())
    assert not batchnorm_coupled(network(norm="group"))
    assert batchnorm_coupled(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)).eval())


def test_batch_statistics_couple_the_batch_and_leave_no_trace():
    model = network().eval()
    model.network.stages[2].train()  # a mixed state, to be restored as it was
    state, modes = {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()]
    alone = lambda: model(images()[:3])
    among = lambda: model(torch.cat([images()[:3], 4 + images(1)]))[:3]
    with batch_statistics(model):
        assert all(m.training for m in model.modules())
        assert not torch.allclose(alone(), among())
    assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert [m.training for m in model.modules()] == modes
    model.eval()
    assert_close(alone(), among())

import json

import pytest
import torch
from torch.testing import assert_close

diffusers = pytest.importorskip("diffusers")

from potstill.contracts.errors import ModelError  # noqa: E402
from potstill.models.denoisers import (  # noqa: E402
    Denoiser,
    Guided,
    MixtureDenoiser,
    OneStep,
    dit_tiny,
    mlp_denoiser,
    scheduler_preconditioning,
    unet_small,
    unet_tiny,
)
from potstill.models.spec import LoraSpec  # noqa: E402
from potstill.noise.gaussian import (  # noqa: E402
    DiscreteVP,
    EDMPreconditioning,
    MatchedPreconditioning,
    RectifiedFlow,
    karras_grid,
)
from potstill.noise.mixture import GaussianMixture  # noqa: E402


def randomised(model):
    """Fresh weights without the zeros that some layers start from."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def conditioned_unet():
    network = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    table = DiscreteVP(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return Denoiser(network, MatchedPreconditioning(table, "eps"), [4, 8, 8], "sd"), torch.randn(2, 5, 12)


def sd3():
    network = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=8,
    )
    condition = {"encoder_hidden_states": torch.randn(2, 5, 12), "pooled_projections": torch.randn(2, 10)}
    return Denoiser(
        network, MatchedPreconditioning(RectifiedFlow(), "v", time_scale=1000.0), [4, 8, 8], "sd3"
    ), condition


def ddpm():
    """A DDPM-style U-Net with learned variances (twice the channels out)."""
    network = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=6,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    return Denoiser(network, MatchedPreconditioning(DiscreteVP(), "eps"), [3, 8, 8], "ddpm"), None


MODELS = {
    "unet-tiny": lambda: (unet_tiny(channels=1, size=8), None),
    "unet-tiny labels": lambda: (unet_tiny(channels=1, size=8, classes=3, conditional=True), torch.tensor([0, 2])),
    "unet odd size": lambda: (unet_tiny(channels=2, size=7), None),
    "mlp": lambda: (mlp_denoiser(), None),
    "mlp labels": lambda: (mlp_denoiser(classes=4, conditional=True), torch.tensor([0, 3])),
    "dit-tiny": lambda: (dit_tiny(channels=1, size=8), None),
    "dit labels": lambda: (dit_tiny(channels=1, size=8, classes=3, conditional=True), torch.tensor([0, 2])),
    "conditioned u-net": conditioned_unet,
    "sd3": sd3,
    "ddpm": ddpm,
}


def made(name):
    torch.manual_seed(0)
    model, condition = MODELS[name]()
    return randomised(model), condition, torch.randn(2, *model.shape)


@pytest.mark.parametrize("name", MODELS)
def test_denoises_saves_and_loads(name, tmp_path):
    model, condition, x = made(name)
    sigma = torch.tensor([0.02, 20.0])
    x0 = model(x, sigma, condition)
    assert x0.shape == x.shape
    assert x0.isfinite().all()
    model.save(tmp_path)
    again = Denoiser.from_pretrained(tmp_path).eval()
    assert (again.shape, again.name, again.preconditioning) == (model.shape, model.name, model.preconditioning)
    assert_close(again(x, sigma, condition), x0, rtol=0, atol=0)
    fresh = Denoiser.from_pretrained(tmp_path, pretrained=False).eval()
    assert not torch.allclose(fresh(x, sigma, condition), x0)
    half = Denoiser.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(x, sigma, condition).dtype == torch.float32
    assert_close(model(x, 0.5, condition), model(x, torch.tensor([0.5, 0.5]), condition))


@pytest.mark.parametrize("name", MODELS)
def test_features_are_the_blocks_activations(name):
    model, condition, x = made(name)
    x0, features = model.with_features(x, 1.0, condition)
    assert_close(x0, model(x, 1.0, condition))
    assert features.keys() == {tap for tap in model.taps if not tap.startswith("up_")}
    assert all(len(value) == 2 and value.isfinite().all() for value in features.values())
    only = model.features(x.requires_grad_(), 1.0, condition, names=[model.taps[1]])
    assert_close(only[model.taps[1]], features[model.taps[1]])
    assert torch.autograd.grad(only[model.taps[1]].sum(), x)[0].abs().sum() > 0
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ModelError, match="has no block nowhere"):
        model.features(x, 1.0, condition, names=["nowhere"])


def test_two_stream_features_are_the_images():
    model, condition, x = made("sd3")
    assert model.features(x, 1.0, condition)["transformer_blocks.0"].shape == (2, 16, 16)  # 4 x 4 patches, not 5 words


@pytest.mark.parametrize("name", ["unet-tiny labels", "mlp labels", "dit labels"])
def test_labels_matter_and_none_is_the_last_label(name):
    model, condition, x = made(name)
    x0 = model(x, 1.0, condition)
    assert not torch.allclose(model(x, 1.0, condition.flip(0)), x0)
    assert_close(model(x, 1.0), model(x, 1.0, torch.full((2,), model.null_label)))
    assert model.null_label == {"mlp labels": 4}.get(name, 3)
    assert_close(model.train()(x, 1.0, condition), x0)  # no unkeyed dropping of labels in training


def test_edm_preconditioning_is_edms():
    """D = c_skip x + c_out F(c_in x, c_noise), recomputed around the bare network; at low noise D is nearly x."""
    model, _, x = made("unet-tiny")
    sigma, data = 0.7, 0.5
    size = (sigma**2 + data**2) ** 0.5
    inner = model.network(x / size, torch.full((2,), 10 * torch.tensor(sigma).log() / 4)).sample
    assert_close(model(x, sigma), data**2 / size**2 * x + sigma * data / size * inner)
    assert_close(model(x, 1e-5), x, rtol=0, atol=1e-3)


def test_an_eps_network_is_called_at_equal_noise_to_signal():
    """DDPM: x_t = alpha x, D = (x_t - sigma_t eps) / alpha, at an index of the table."""
    model, _, x = made("ddpm")
    bar = diffusers.DDPMScheduler().alphas_cumprod[300]
    eps = model.network(x * bar.sqrt(), torch.tensor(300.0)).sample[:, :3]
    sigma = ((1 - bar) / bar).sqrt()
    assert_close(model(x, float(sigma)), x - sigma * eps, rtol=1e-3, atol=1e-3)


def test_odd_sizes_are_padded_at_the_edge():
    """The pixels of a 7 x 7 image are denoised as those of its 8 x 8 continuation."""
    model, _, x = made("unet odd size")
    padded = torch.nn.functional.pad(x, (0, 1, 0, 1), mode="replicate")
    assert_close(model(x, 1.0), model(padded, 1.0)[..., :7, :7])


def test_diffusers_loads_what_is_saved(tmp_path):
    model, _, x = made("unet-tiny")
    OneStep(model, 2.5).save(tmp_path)
    network = diffusers.UNet2DModel.from_pretrained(tmp_path).eval()
    assert_close(network(x, torch.ones(2)).sample, model.network(x, torch.ones(2)).sample)


def test_one_step_generator(tmp_path):
    model, condition, z = made("unet-tiny labels")
    generator = OneStep(model, 2.5)
    assert_close(generator(z, condition), model(2.5 * z, 2.5, condition))
    generator.save(tmp_path)
    again = OneStep.from_pretrained(tmp_path)
    assert again.sigma_init == 2.5
    again.eval()
    ids, labels = torch.tensor([4, 9, 2]), torch.tensor([1, 0, 2])
    drawn = generator.sample(ids, seed=3, condition=labels)
    assert_close(again.sample(ids.flip(0), seed=3, condition=labels.flip(0), batch=2).flip(0), drawn)
    assert drawn.shape == (3, 1, 8, 8)
    with pytest.raises(ModelError, match="must be positive"):
        OneStep(model, 0.0)
    model.save(tmp_path / "plain")
    with pytest.raises(ModelError, match="has no sigma_init"):
        OneStep.from_pretrained(tmp_path / "plain")


def test_exact_mixture_in_the_same_socket():
    """Heun on the exact denoiser of a ring lands on the ring; float64 where the mixture is."""
    mixture = GaussianMixture.ring(4, radius=1.0, std=0.05, dtype=torch.float64)
    exact = MixtureDenoiser(mixture)
    x = torch.randn(3, 2)
    assert exact(x, 0.5).dtype == torch.float32
    assert_close(exact(x.double(), 0.5), mixture.denoise(x.double(), 0.5))
    drawn = exact.sample(torch.arange(400), sigmas=karras_grid(40, 0.002, 20.0))
    nearest = torch.cdist(drawn.double(), mixture.means_KD).min(1)
    assert nearest.values.square().mean().sqrt().item() == pytest.approx(0.05 * 2**0.5, rel=0.15)
    assert nearest.indices.unique().numel() == 4
    assert MixtureDenoiser(GaussianMixture(torch.zeros(1, 12), 0.3), [3, 2, 2])(torch.randn(2, 3, 2, 2), 1.0).shape == (
        2,
        3,
        2,
        2,
    )
    with pytest.raises(ModelError, match="has no features"):
        exact.features(x, 1.0)
    with pytest.raises(ModelError, match="cannot have shape"):
        MixtureDenoiser(mixture, [3])


def test_guidance():
    model, condition, x = made("unet-tiny labels")
    free, held = model(x, 1.0), model(x, 1.0, condition)
    assert_close(Guided(model, 3.0)(x, 1.0, condition), free + 3.0 * (held - free))
    assert_close(Guided(model, 1.0)(x, 1.0, condition), held)
    text, condition, x = made("conditioned u-net")
    empty = torch.zeros(1, 5, 12)
    free, held = text(x, 1.0, empty.expand(2, 5, 12)), text(x, 1.0, condition)
    assert_close(Guided(text, 2.0, empty)(x, 1.0, condition), 2.0 * held - free)


@pytest.mark.parametrize("name", ["unet-tiny", "mlp", "unet-small", "dit-tiny"])
def test_forward_mode_derivatives_pass_through(name):
    """Consistency objectives need the JVP in x and sigma: equal to a central difference in float64."""
    torch.manual_seed(0)
    model = unet_small(channels=1, size=8, widths=(8, 16, 16)) if name == "unet-small" else MODELS[name]()[0]
    model = randomised(model).double()
    x, dx = torch.randn(2, *model.shape).double(), torch.randn(2, *model.shape).double()
    sigma, one = torch.tensor([0.5, 2.0]).double(), torch.ones(2).double()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, slope = torch.func.jvp(lambda x, s: model(x, s), (x, sigma), (dx, one))
    h = 1e-4
    with torch.no_grad():
        central = (model(x + h * dx, sigma + h) - model(x - h * dx, sigma - h)) / (2 * h)
    assert_close(slope, central, rtol=1e-3, atol=1e-3)


def test_lora_on_a_u_net_trains_adapters_and_merges(tmp_path):
    model, condition, x = made("conditioned u-net")
    before = model(x, 1.0, condition)
    model.with_lora(LoraSpec(r=2, alpha=4, targets=["to_q", "to_v"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == ("lora_" in name)
            if "lora_B" in name:
                parameter.add_(0.3)
    after = model(x, 1.0, condition)
    assert not torch.allclose(after, before)
    model.save(tmp_path)
    assert_close(Denoiser.from_pretrained(tmp_path).eval()(x, 1.0, condition), after, rtol=1e-4, atol=1e-5)


def test_recomputed_activations_change_no_gradient():
    model, _, x = made("unet-tiny")
    grads = []
    for on in (False, True):
        model.train().checkpoint_activations(on).zero_grad()
        model(x, 1.0).square().sum().backward()
        grads.append(model.network.conv_in.weight.grad.clone())
    assert_close(*grads)
    with pytest.raises(ModelError, match="cannot recompute"):
        mlp_denoiser().checkpoint_activations()


def test_a_pipelines_folder_tells_what_its_network_predicts(tmp_path):
    model, condition, x = made("conditioned u-net")
    model.network.save_pretrained(tmp_path / "unet")
    with pytest.raises(ModelError, match="does not say what its network predicts"):
        Denoiser.from_pretrained(tmp_path)
    diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        tmp_path / "scheduler"
    )
    again = Denoiser.from_pretrained(tmp_path).eval()
    assert again.preconditioning == model.preconditioning
    assert_close(again(x, 1.0, condition), model(x, 1.0, condition))


def test_scheduler_configs():
    flow = scheduler_preconditioning(
        dict(diffusers.FlowMatchEulerDiscreteScheduler().config, _class_name="FlowMatchEuler")
    )
    assert flow == MatchedPreconditioning(RectifiedFlow(), "v", time_scale=1000.0)
    v = scheduler_preconditioning(dict(diffusers.DDPMScheduler(prediction_type="v_prediction").config))
    assert v == MatchedPreconditioning(DiscreteVP(), "v")
    edm = scheduler_preconditioning({"_class_name": "EDMEulerScheduler", "sigma_data": 0.25})
    assert edm == EDMPreconditioning(0.25)
    with pytest.raises(ModelError, match="betas sigmoid is not known"):
        scheduler_preconditioning({"beta_schedule": "sigmoid"})


def test_what_cannot_be_loaded_says_so(tmp_path):
    with pytest.raises(ModelError, match="There is no model folder"):
        Denoiser.from_pretrained(tmp_path / "nothing")
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        Denoiser.from_pretrained(tmp_path, preconditioning=EDMPreconditioning())
    model, _, _ = made("unet-tiny")
    model.save(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").rename(tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled ones are never read"):
        Denoiser.from_pretrained(tmp_path)
    for wrong in ("StableDiffusionPipeline", "os", ""):
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": wrong}))
        with pytest.raises(ModelError, match="is no diffusers model"):
            Denoiser.from_pretrained(tmp_path)
    about = json.loads((tmp_path / "potstill.json").read_text())
    (tmp_path / "potstill.json").write_text(json.dumps(about | {"preconditioning": {"name": "EDM"}}))
    with pytest.raises(ModelError, match="EDM is no Preconditioning"):
        Denoiser.from_pretrained(tmp_path)


def test_wrong_conditions_are_refused():
    model, _, x = made("unet-tiny")
    with pytest.raises(ModelError, match="takes no condition class_labels"):
        model(x, 1.0, torch.tensor([0, 1]))
    text, _, x = made("conditioned u-net")
    with pytest.raises(ModelError, match="needs a condition"):
        text(x, 1.0)
    with pytest.raises(ModelError, match="needs the number of classes"):
        unet_small(channels=1, size=8, conditional=True)
    with pytest.raises(ModelError, match="do not tile"):
        dit_tiny(channels=1, size=10)

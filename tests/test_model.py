"""The network's arithmetic, and the loss, against closed forms."""

import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import sde
import train_score
from model import CNN3, NoiseEmbedding, ResidualBlock, ScoreModel, WindowAttention, load_checkpoint, load_model
from train_score import HiddenMuon, denoising_loss, make_optimizers, noise_law, typical_error
from utils import add_noise, find, psnr, read_images, read_patches, save_checkpoint

SMALL = {"network": "unet", "sigma_min": 0.01, "sigma_max": 1.0, "widths": (32, 32), "blocks": (1, 1), "attention": (0, 1)}
SHIPPED = find("checkpoints/score_cifar10.pt")


def small_model(seed=0, **changes):
    """A small U-Net with random weights everywhere, also where training starts from zero."""
    torch.manual_seed(seed)
    one_level = {"sigma_min": 0.1, "sigma_max": 0.1} if changes.get("network") == "cnn3" else {}
    model = ScoreModel(**SMALL | one_level | changes)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=rng)
    return model.eval().requires_grad_(False)


def images(*shape, seed=0, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_cnn3_is_the_network_of_the_recipe():
    shapes = [tuple(p.shape) for p in CNN3().parameters()]
    assert shapes == [(64, 3, 3, 3), (64,), (128, 64, 3, 3), (128,), (3, 128, 3, 3), (3,)]
    assert sum(isinstance(m, torch.nn.ReLU) for m in CNN3().modules()) == 2


@pytest.mark.parametrize("sigma", [0.01, 0.1, 0.25, 1.0])
def test_an_untrained_unet_is_a_wiener_estimate(sigma):
    # F = 0 leaves c_skip, and that is the posterior mean if the pixels are N(0.5, 0.25^2).
    x, c2 = images(2, 3, 8, 8), 0.25**2
    torch.testing.assert_close(ScoreModel(**SMALL)(x, sigma), 0.5 + c2 / (c2 + sigma**2) * (x - 0.5))


def test_a_new_block_is_the_identity_at_every_level():
    block, x, e = ResidualBlock(8, 4), images(2, 8, 6, 6), images(2, 4)
    assert torch.equal(block(x, e), x)
    torch.nn.init.ones_(block.conv2.weight)
    assert torch.equal(block(x, e), block(x, 7 * e)) and not torch.equal(block(x, e), x)  # no level is told apart yet


def test_a_residual_block_is_its_formula():
    block, x, e = ResidualBlock(8, 4), images(2, 8, 6, 6), images(2, 4)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    scale, shift = (e @ block.film.weight.T + block.film.bias)[:, :, None, None].chunk(2, dim=1)
    silu = lambda x: x * x.sigmoid()  # noqa: E731
    h = block.conv1(silu(x)) * (1 + scale) + shift
    torch.testing.assert_close(block(x, e), x + block.conv2(silu(h)), rtol=1e-4, atol=1e-4)


def test_sines_of_its_logarithm_embed_the_noise_level():
    layer, log_sigma = NoiseEmbedding(6), torch.tensor([-2.0, 0.3])
    angles = log_sigma[:, None] * 2 ** torch.linspace(-2, 2, 16)
    torch.testing.assert_close(layer(log_sigma), layer.layers(torch.cat([angles.cos(), angles.sin()], 1)))


def test_the_networks_target_has_unit_variance():
    # D = x0 solved for F must have variance 1 whatever sigma, if x0 has variance sigma_data^2 (Karras et al. 2022, B.6).
    rng = torch.Generator().manual_seed(0)
    for sigma in (0.01, 0.1, 1.0):
        model = ScoreModel(**SMALL)
        x0 = 0.5 + model.sigma_data * torch.randn(16, 3, 64, 64, generator=rng)
        x = x0 + sigma * torch.randn(x0.shape, generator=rng)
        seen = []
        model.net.forward = lambda scaled, log_sigma, seen=seen: (seen.append(scaled), torch.ones_like(scaled))[1]
        ones = model(x, sigma)
        model.net.forward = lambda scaled, log_sigma: torch.zeros_like(scaled)
        zeros = model(x, sigma)
        target = (x0 - zeros) / (ones - zeros)
        four_errors = 4 * (2 / x0.numel()) ** 0.5  # of a variance estimated from so many independent pixels
        assert abs(target.var().item() - 1) < four_errors
        assert abs(seen[0].var().item() - 1) < four_errors


@pytest.mark.parametrize("network", ["unet", "cnn3"])
def test_score_and_denoiser_obey_tweedie(network):
    model, x = small_model(network=network), images(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(x + 0.1**2 * model.score(x, 0.1), model(x, 0.1))


def test_cnn3_is_the_score_itself():
    model, x = small_model(network="cnn3", sigma_min=0.1, sigma_max=0.1), images(2, 3, 8, 8)
    torch.testing.assert_close(model.score(x, 0.1), model.net(x), rtol=1e-4, atol=1e-4)


def test_sigma_may_be_one_number_or_one_per_image():
    model, x = small_model(), images(3, 3, 8, 8)
    expected = model(x, 0.1)
    assert torch.equal(model(x, torch.tensor(0.1)), expected)
    assert torch.equal(model(x, torch.full((3,), 0.1)), expected)
    mixed = model(x, torch.tensor([0.1, 0.5, 0.1]))
    torch.testing.assert_close(mixed[0], expected[0])
    assert (mixed[1] - expected[1]).abs().max() > 1e-3
    for levels in ([0.1, 0.5, 0.1], np.array([0.1, 0.5, 0.1]), torch.tensor([[0.1], [0.5], [0.1]]).view(3, 1, 1, 1)):
        torch.testing.assert_close(model(x, levels), mixed)
    assert torch.equal(model(x, np.float32(0.1)), expected) and torch.equal(model(x, torch.full((3, 1), 0.1)), expected)
    with pytest.raises(ValueError, match="2 noise levels for 3 images"):
        model(x, [0.1, 0.2])


@pytest.mark.parametrize("sigma", [0.001, 5.0, 79.0])
def test_outside_its_range_the_network_stays_a_denoiser(sigma):
    # The network is asked as at the end of its range; c_skip, c_out and c_in keep to the level.
    model, x0 = load_model(SHIPPED), read_patches("samples")[:40] / 255
    y = x0 + sigma * torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    assert ((model(y, sigma) - x0) ** 2).mean() < min(2 * sigma**2, 0.1)
    seen = []
    model.net.forward = lambda scaled, log_sigma: seen.append(log_sigma) or torch.zeros_like(scaled)
    c2 = model.sigma_data**2
    torch.testing.assert_close(model(y, sigma), 0.5 + c2 / (c2 + sigma**2) * (y - 0.5))
    assert abs(seen[0][0].exp().item() / min(max(sigma, model.sigma_min), model.sigma_max) - 1) < 1e-5


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 7), (31, 33), (64, 48)])
@pytest.mark.parametrize("network", ["unet", "cnn3"])
def test_any_size_works_and_gradients_reach_the_image(network, size):
    model = small_model(network=network, widths=(32, 32, 32), blocks=(1, 1, 1), attention=(1, 1, 1))
    x = images(2, 3, *size).requires_grad_()
    denoised = model(x, 0.1)
    assert denoised.shape == x.shape
    (gradient,) = torch.autograd.grad(denoised.square().sum(), x)
    assert gradient.isfinite().all() and (gradient != 0).all()


def test_attention_is_softmax_attention_within_each_window():
    # Against the library's, window by window, at a size that is no multiple of the window.
    layer, x = WindowAttention(64, 4), images(2, 64, 6, 9)
    with torch.no_grad():
        layer.out.weight.copy_(torch.eye(64)[:, :, None, None])
        q, k, v = (t.unflatten(1, (2, 32)) for t in layer.qkv(x).chunk(3, dim=1))  # (B, heads, 32, H, W)
        q, k = (torch.nn.functional.normalize(t, dim=2) * factor for t, factor in ((q, 2 * math.sqrt(32)), (k, math.sqrt(32))))
        for top in (0, 4):
            for left in (0, 4, 8):
                here = (slice(None), slice(None), slice(None), slice(top, top + 4), slice(left, left + 4))
                parts = (t[here].flatten(3).transpose(2, 3) for t in (q, k, v))
                expected = torch.nn.functional.scaled_dot_product_attention(*parts).transpose(2, 3).flatten(1, 2)
                found = (layer(x, None) - x)[:, :, top : top + 4, left : left + 4].flatten(2)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_padding_keeps_the_image_in_place():
    model, x = small_model(), images(1, 3, 8, 8)
    padded = torch.nn.functional.pad(x[..., :7], (0, 1, 0, 0), mode="replicate")
    torch.testing.assert_close(model(x[..., :7], 0.1), model(padded, 0.1)[..., :7])


def test_the_state_keeps_its_precision():
    x = images(2, 3, 8, 8, dtype=torch.float64)
    for bfloat16 in (False, True):
        assert small_model(bfloat16=bfloat16)(x, 0.1).dtype == torch.float64
    # At a vanishing noise level D(x) = x to far more than the 3 digits of bfloat16.
    assert (small_model(bfloat16=True)(x, 1e-6) - x).abs().max() < 1e-4


def test_the_true_denoisers_loss_is_its_posterior_variance():
    # x0 ~ N(0.5, c^2): E (D - x0)^2 = c^2 s^2 / (c^2 + s^2), over what is typical of CIFAR-10.
    c, rng = 0.1, torch.Generator().manual_seed(1)
    model = ScoreModel(**SMALL)
    model.forward = lambda x, s: 0.5 + c**2 / (c**2 + s[:, None, None, None] ** 2) * (x - 0.5)
    x0 = 0.5 + c * torch.randn(256, 3, 32, 32, generator=rng)
    for s in (0.02, 0.1, 0.5):
        loss = denoising_loss(model, x0, torch.full((256,), s), torch.randn(x0.shape, generator=rng)).item()
        expected = c**2 * s**2 / (c**2 + s**2) / typical_error(s)
        assert abs(loss / expected - 1) < 4 * (2 / x0.numel()) ** 0.5


def test_score_matching_learns_the_score_of_a_gaussian():
    # Independent pixels N(0.5, c^2): the score at level s is (0.5 - x) / (c^2 + s^2).
    c, s, rng = 0.2, 0.1, torch.Generator().manual_seed(2)
    torch.manual_seed(2)
    model = ScoreModel("cnn3", s, s)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(1000):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / 1000)
        x0 = 0.5 + c * torch.randn(16, 3, 12, 12, generator=rng)
        denoising_loss(model, x0, torch.full((16,), s), torch.randn(x0.shape, generator=rng)).backward()
        optimizer.step()
        optimizer.zero_grad()
    x = 0.5 + (c**2 + s**2) ** 0.5 * torch.randn(64, 3, 12, 12, generator=rng)
    expected = (0.5 - x) / (c**2 + s**2)
    with torch.no_grad():
        error = (model.score(x, s) - expected).square().mean() / expected.square().mean()
    assert error < 0.02


def test_the_typical_error_is_that_of_the_shipped_network():
    levels = load_model(SHIPPED).info["test_psnr"]
    assert set(levels) == {0.02, 0.05, 0.1, 0.2, 0.5}
    for s, mean_psnr in levels.items():
        assert abs(10 * np.log10(typical_error(s)) + mean_psnr) < 1.2  # dB
    assert abs(typical_error(1e6) / 0.07 - 1) < 1e-3  # the variance of the pixels around their mean image


def test_noise_levels_are_log_uniform_in_three_parts():
    u = torch.linspace(0, 1, 2001, dtype=torch.float64)
    sigma = noise_law(u, 0.005, 20.0, 0.1)
    assert abs(sigma[0] / 0.005 - 1) < 1e-9 and abs(sigma[-1] / 20 - 1) < 1e-9
    for low, high, share in ((0.0, 0.015, 0.1), (0.015, 0.7, 0.8), (0.7, 30.0, 0.1)):
        part = sigma[(sigma > low) & (sigma < high)].log()
        assert abs(len(part) / 2001 - share) < 2e-3 and part.diff().std() < 1e-9
    torch.testing.assert_close(noise_law(u, 0.02, 0.5, 0.1), 0.02 * 25**u)
    torch.testing.assert_close(noise_law(u, 0.1, 0.1, 0.1), torch.full_like(u, 0.1))


def test_muon_has_the_hidden_convolutions_and_adam_the_rest():
    model = ScoreModel(**SMALL)
    adam, muon = make_optimizers(model, "muon", 0.1, 0.1)
    places = [p.data_ptr() for optimizer in (adam, muon) for p in optimizer.param_groups[0]["params"]]
    assert sorted(places) == sorted(p.data_ptr() for p in model.parameters())  # each once, in its own memory
    names = {name for name, p in model.named_parameters() if p.data_ptr() in places[-len(muon.weights) :]}
    assert all(re.search(r"conv\d|down|up|qkv|out", name) for name in names) and len(names) == 10
    (adam,) = make_optimizers(model, "adam", 0.1, 0.1)
    assert len(adam.param_groups[0]["params"]) == len(list(model.parameters()))


def test_a_lone_large_gradient_moves_no_weight_far():
    # Adam divides by the root of a running mean of squares: beside Muon's short one, a gradient a hundred times the usual
    # one counts for 1 - 0.95 of itself squared; with the usual 1 - 0.999 the step would be 2.5 times as long.
    model = ScoreModel(**SMALL)
    adam, _ = make_optimizers(model, "muon", 0.1, 0.1)
    bias = model.net.head.bias
    for step in range(400):
        before = bias.detach().clone()
        for p in adam.param_groups[0]["params"]:
            p.grad = torch.full_like(p, 100.0 if step == 399 else (-1.0) ** step)
        adam.step()
    far = (bias.detach() - before).abs().max().item() / 0.1
    assert 0.3 < far < 0.5  # (1 - 0.9) 100 / sqrt((1 - 0.95) 100^2) = 0.45


def test_muon_moves_a_convolution_by_an_orthogonal_matrix():
    # The update is -lr 0.2 sqrt(max(n, m)) U V^T for a gradient U S V^T (Liu et al. 2025, eq. 4); five Newton-Schulz
    # iterations bring singular values between 0.7 and 1.2 instead of 1 (Jordan et al. 2024).
    rng = torch.Generator().manual_seed(3)
    for shape in ((8, 16, 3, 3), (64, 8, 2, 2)):
        weight = torch.nn.Parameter(torch.randn(shape, generator=rng).to(memory_format=torch.channels_last))
        weight.grad = torch.randn(shape, generator=rng).to(memory_format=torch.channels_last)
        before = weight.detach().clone()
        HiddenMuon([weight], 0.01, weight_decay=20.0).step()  # first shrinks the weight by 1 - 0.01 * 20
        moved, gradient = (x.permute(0, 2, 3, 1).flatten(1) for x in (weight.detach() - 0.8 * before, weight.grad))
        scale = 0.01 * 0.2 * max(moved.shape) ** 0.5
        values = torch.linalg.svdvals(moved) / scale
        assert values.min() > 0.6 and values.max() < 1.3
        along = -(moved * gradient).sum() / scale / torch.linalg.svdvals(gradient).sum()  # 1 for U V^T exactly
        assert 0.7 < along < 1.2


def test_muon_moves_all_matrices_at_once_as_torch_moves_each():
    rng = torch.Generator().manual_seed(4)
    shapes = ((8, 16, 3, 3), (64, 8, 2, 2), (8, 16, 3, 3), (64, 32, 1, 1))
    weights = [torch.nn.Parameter(torch.randn(s, generator=rng).to(memory_format=torch.channels_last)) for s in shapes]
    matrices = [torch.nn.Parameter(HiddenMuon.as_matrix(w.detach()).clone()) for w in weights]
    ours = HiddenMuon(weights, 0.01, weight_decay=2.0)
    theirs = torch.optim.Muon(matrices, lr=0.01, weight_decay=2.0, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for weight, matrix in zip(weights, matrices):
            weight.grad = torch.randn(weight.shape, generator=rng).to(memory_format=torch.channels_last)
            matrix.grad = HiddenMuon.as_matrix(weight.grad).clone()
        ours.step()
        theirs.step()
    for weight, matrix in zip(weights, matrices):  # but for roundings of bfloat16, each 0.4 % of a step of some 0.01
        torch.testing.assert_close(HiddenMuon.as_matrix(weight), matrix, rtol=0, atol=3e-4)


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    model, x = small_model(), images(2, 3, 8, 8)
    path = tmp_path / "model.pt"
    save_checkpoint(path, {"config": model.config, "weights": model.state_dict(), "info": {"images_seen": 7}})
    loaded = load_model(path)
    assert torch.equal(loaded(x, 0.1), model(x, 0.1))
    assert (loaded.sigma_min, loaded.sigma_max, loaded.info) == (0.01, 1.0, {"images_seen": 7})
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_a_missing_or_damaged_checkpoint_is_named(tmp_path):
    path = tmp_path / "model.pt"
    with pytest.raises(FileNotFoundError, match="model.pt"):
        load_model(path)
    model = small_model()
    save_checkpoint(path, {"config": model.config, "weights": model.state_dict(), "info": {}})
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (whole[: len(whole) // 2], b"", b"not a checkpoint", bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="model.pt.*damaged"):
            load_model(path)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="not a file"):
            load_model(path)


class Command:
    """What would run a command when it is unpickled."""

    def __reduce__(self):
        return (Path("executed").touch, ())


def test_a_checkpoint_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"config": Command()}, "model.pt")
    for load in (load_model, load_checkpoint):
        with pytest.raises(ValueError, match="model.pt"):
            load("model.pt")
    assert not Path("executed").exists()


def test_a_checkpoint_that_is_none_of_ours_is_refused(tmp_path):
    path, model = tmp_path / "model.pt", small_model()
    good = {"config": model.config, "weights": model.state_dict(), "info": {}}
    name, value = next(iter(good["weights"].items()))
    for wrong in (
        {"config": {}},
        {"info": None},
        {"weights": {}},
        {"weights": good["weights"] | {name: value.double()}},
        {"weights": good["weights"] | {name: value[:-1]}},
        {"weights": good["weights"] | {name: value * math.nan}},
        {"config": model.config | {"blocks": (10_000_000, 1)}},
        {"config": model.config | {"widths": (2048, 2048), "blocks": (50, 50)}},  # as many weights as 30 GB
        {"config": model.config | {"sigma_max": math.inf}},
        {"config": model.config | {"sigma_min": 1e-300}},
    ):
        save_checkpoint(path, good | wrong)
        with pytest.raises(ValueError, match="model.pt"):
            load_model(path)


def test_wrong_configurations_are_refused():
    for wrong in (
        {"sigma_min": 0.0},
        {"sigma_max": 0.001},
        {"network": "transformer"},
        {"blocks": (1, 2, 3)},
        {"widths": (0, 0)},
        {"attention": (0, 2)},
        {"features": 0},
    ):
        with pytest.raises(ValueError, match=re.escape(str(next(iter(wrong.values()))))):
            ScoreModel(**SMALL | wrong)


def test_only_a_batch_of_float_images_is_taken():
    for wrong in (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, 4, 4), torch.zeros(1, 1, 4, 4)):
        with pytest.raises(ValueError, match=re.escape(str(tuple(wrong.shape)))):
            small_model()(wrong, 0.1)


# -----------------------------------------------------------------------------
# The checkpoints that ship
# -----------------------------------------------------------------------------


def one_step_psnr(model, sigma):
    names, x0 = zip(*read_images("samples"))
    y = torch.from_numpy(np.stack(add_noise(x0, sigma, 0))).permute(0, 3, 1, 2)
    return psnr(model(y, sigma), torch.from_numpy(np.stack(x0)).permute(0, 3, 1, 2)).mean().item()


def test_the_shipped_network_says_how_good_it_is():
    model = load_model(SHIPPED)
    assert sum(p.numel() for p in model.parameters()) < 2.1e6 and SHIPPED.stat().st_size < 10e6
    assert (model.sigma_min, model.sigma_max) == (0.005, 20.0)
    assert model.info["images_seen"] == 11_006_652 and not model.info["earlier"]  # from random weights, by one command
    options = {name.lower(): value for name, value in vars(train_score).items() if name.isupper()}
    given = {"data", "test", "name", "compile"}  # of the command in README, and where the images were
    assert {k: v for k, v in model.info["options"].items() if k not in given} == {k: options[k] for k in options.keys() - given}
    for sigma, floor in ((0.02, 39.03), (0.05, 33.44), (0.1, 29.50), (0.2, 25.81), (0.5, 21.43)):
        assert model.info["test_psnr"][sigma] > floor
    for sigma, floor in ((0.05, 32.0), (0.1, 30.9), (0.2, 25.0)):  # on photographs, not thumbnails of CIFAR-10
        assert one_step_psnr(model, sigma) > floor


def test_the_shipped_network_finds_the_noise_level():
    model, x0 = load_model(SHIPPED), read_patches("samples")[::60] / 255
    y = x0 + 0.1 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    assert (sde.estimate_sigma(model, y, model.sigma_min, 1.0) / 0.1 - 1).abs().max() < 0.08


def test_the_shipped_recipe_denoises_at_its_level():
    model = load_model(find("checkpoints/cnn3_cifar10.pt"))
    assert model.config == {"network": "cnn3", "sigma_min": 0.1, "sigma_max": 0.1}
    assert model.info["images_seen"] == 9_740_400 and model.info["epochs"] == 200 and not model.info["earlier"]
    assert model.info["test_psnr"][0.1] > 28.27 and one_step_psnr(model, 0.1) > 26.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("size", [(32, 32), (20, 36)])
def test_the_gpu_gives_what_the_cpu_gives(size):
    # In its own attention as well, with windows that the picture does not fill; and compiled.
    def with_gradient(denoiser, device):
        x = images(2, 3, *size).to(device).requires_grad_()
        denoised = denoiser(x, 0.1)
        return denoised.detach().cpu(), torch.autograd.grad(denoised.square().sum(), x)[0].cpu()

    expected, model = with_gradient(small_model(), "cpu"), small_model().cuda()
    for denoiser in (model, torch.compile(model, dynamic=False)):
        torch.testing.assert_close(with_gradient(denoiser, "cuda"), expected, rtol=1e-3, atol=1e-2)

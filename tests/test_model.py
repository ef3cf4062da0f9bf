"""The networks against their formulas, in other people's programs, and from their files."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_score
import utils
from model import ResidualBlock, ScoreModel, WindowAttention, load_checkpoint, load_model

ROOT = Path(__file__).resolve().parent.parent
ONE_LEVEL = {"network": "cnn3", "sigma_min": 0.1, "sigma_max": 0.1}
SMALL = {"network": "unet", "sigma_min": 0.01, "sigma_max": 1.0, "features": 8}
SMALL |= {"widths": (32, 32), "blocks": (1, 1), "attention": (0, 1)}


def small_model(**changes):
    """A small network with random weights everywhere, also where training starts from zero."""
    torch.manual_seed(0)
    model = ScoreModel(**(ONE_LEVEL if changes.get("network") == "cnn3" else SMALL) | changes)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=rng)
    return model.eval().requires_grad_(False)


def images(*shape, seed=0, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("size", [(6, 9), (8, 4), (3, 3)])
def test_attention_is_softmax_attention_within_each_window(size):
    # Windows of 4 x 4; those at the far edges hold what is left.
    layer, x = WindowAttention(64, 4), images(2, 64, *size)
    with torch.no_grad():
        layer.out.weight.copy_(torch.eye(64)[:, :, None, None])
        found = layer(x, None) - x
        q, k, v = (t.unflatten(1, (2, 32)) for t in layer.qkv(x).chunk(3, dim=1))
        q = F.normalize(q, dim=2) * math.sqrt(32)
        k = F.normalize(k, dim=2) * math.sqrt(32)
    for top in range(0, size[0], 4):
        for left in range(0, size[1], 4):
            rows, columns = slice(top, top + 4), slice(left, left + 4)
            parts = (t[..., rows, columns].flatten(3) for t in (q, k, v))  # (B, heads, 32, places)
            queries, keys, values = parts
            weights = (queries.mT @ keys / math.sqrt(8)).softmax(-1)
            expected = (values @ weights.mT).flatten(1, 2)
            there = found[:, :, rows, columns].flatten(2)
            torch.testing.assert_close(there, expected, rtol=1e-4, atol=1e-5)


def test_untrained_blocks_are_the_identity_and_the_unet_is_a_wiener_estimate():
    x = images(2, 32, 6, 6)
    assert torch.equal(ResidualBlock(32, 4)(x, images(2, 4)), x)
    assert torch.equal(WindowAttention(32, 4)(x, None), x)
    # The head starts at 0, which leaves c_skip: the posterior mean for pixels N(0.5, 0.25^2).
    x = images(2, 3, 8, 8)
    expected = 0.5 + 0.25**2 / (0.25**2 + 0.1**2) * (x - 0.5)
    torch.testing.assert_close(ScoreModel(**SMALL)(x, 0.1), expected)


def test_score_and_denoiser_obey_tweedie():
    model, x = small_model(), images(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(x + 0.1**2 * model.score(x, 0.1), model(x, 0.1))
    model = small_model(network="cnn3")  # is the score itself
    torch.testing.assert_close(model.score(x, 0.1), model.net(x.float()).double())


def test_sigma_may_be_one_number_or_one_per_image():
    model, x, levels = small_model(), images(3, 3, 8, 8), torch.tensor([0.1, 0.5, 0.1])
    expected = model(x, 0.1)
    for same in (np.float32(0.1), [0.1], torch.full((3,), 0.1)):
        assert torch.equal(model(x, same), expected)
    expected[1:2] = model(x[1:2], 0.5)
    for same in (levels.numpy(), levels.tolist(), levels.view(3, 1, 1, 1)):
        torch.testing.assert_close(model(x, same), expected)


@pytest.mark.parametrize("wrong", [-0.1, math.nan, math.inf])
def test_a_level_that_is_none_is_refused(wrong):
    model, x = small_model(), images(2, 3, 8, 8)
    for levels in (wrong, [0.1, wrong], torch.tensor([0.1, wrong])):
        with pytest.raises(ValueError, match="at least 0, not .*(-0.1|nan|inf)"):
            model(x, levels)


@pytest.mark.parametrize("sigma, nearest", [(0.001, 0.01), (0.1, 0.1), (5.0, 1.0)])
def test_outside_its_range_the_network_gets_the_nearest_level(sigma, nearest):
    # c_skip, c_out and c_in use the true level, so the result stays an image.
    model, y, variance = small_model(), images(2, 3, 8, 8), 0.25**2 + sigma**2
    model.net.forward = lambda scaled, log_sigma: scaled + log_sigma[:, None, None, None]
    network = (y - 0.5) / math.sqrt(variance) + math.log(nearest)
    expected = 0.5 + 0.25**2 / variance * (y - 0.5) + 0.25 * sigma / math.sqrt(variance) * network
    torch.testing.assert_close(model(y, sigma), expected)


@pytest.mark.parametrize("network", ["unet", "cnn3"])
def test_any_size_works_and_gradients_reach_the_image(network):
    shape = {"widths": (32, 32, 32), "blocks": (1, 1, 1), "attention": (1, 1, 1)}
    model = small_model(network=network, **shape)
    for size in ((1, 1), (1, 9), (31, 33)):
        x = images(2, 3, *size).requires_grad_()
        denoised = model(x, 0.1)
        assert denoised.shape == x.shape
        (gradient,) = torch.autograd.grad(denoised.square().sum(), x)
        assert gradient.isfinite().all() and (gradient != 0).all()
    narrow = images(1, 3, 8, 7)  # the padding, at its right, is cut off again
    padded = F.pad(narrow, (0, 1, 0, 0), mode="replicate")
    expected = small_model()(padded, 0.1)[..., :7]
    torch.testing.assert_close(small_model()(narrow, 0.1), expected)


def test_only_a_batch_of_float_images_is_taken():
    wrong = [torch.zeros(shape) for shape in ((3, 4, 4), (1, 1, 4, 4), (1, 3, 0, 4))]
    for x in (*wrong, torch.zeros(1, 3, 4, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=re.escape(f"not {tuple(x.shape)} of {x.dtype}")):
            small_model()(x, 0.1)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"sigma_min": 0.0}, "0.0 and 1.0"),
        ({"sigma_max": math.inf}, "0.01 and inf"),
        ({"network": "transformer"}, "must be 'unet', or 'cnn3' for one noise level, not 'transf"),
        ({"network": "cnn3"}, "not 'cnn3' for 0.01 to 1.0"),
        ({"blocks": (1, 2, 3)}, "as many blocks and attention, not (32, 32), (1, 2, 3), (0, 1)"),
        ({"widths": (32, 48)}, "attention needs widths that are multiples of 32, not (32, 48)"),
    ],
)
def test_networks_that_cannot_be_are_refused(change, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        ScoreModel(**SMALL | change)


def test_autocast_multiplies_in_bfloat16_and_keeps_the_state():
    x, kinds = images(2, 3, 8, 8, dtype=torch.float64), []
    for autocast, kind in ((False, torch.float32), (True, torch.bfloat16)):
        model = small_model()
        model.autocast = autocast
        model.net.stem.register_forward_hook(lambda module, seen, out: kinds.append(out.dtype))
        assert model(x, 0.1).dtype == torch.float64 and kinds.pop() == kind
        # At a vanishing noise level D(x) = x to far more than the 3 digits of bfloat16.
        assert (model(x, 1e-6) - x).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_images_and_levels_is_a_batch():
    model, x, sigma = small_model(), images(3, 3, 9, 8), torch.tensor([0.1, 0.2, 0.5])

    def one(image, level):
        return model(image[None], level)[0]

    torch.testing.assert_close(torch.func.vmap(one)(x, sigma), model(x, sigma))


def test_a_batch_of_any_size_can_be_exported():
    model = small_model(widths=(32,), blocks=(1,), attention=(1,))
    count = torch.export.Dim("count", min=1, max=64)
    x, sigma = images(2, 3, 9, 8), torch.tensor([0.1, 0.5])
    shapes = ({0: count}, {0: count})
    exported = torch.export.export(model, (x, sigma), dynamic_shapes=shapes).module()
    for number in (1, 5):
        x, sigma = images(number, 3, 9, 8, seed=number), images(number, seed=1)
        torch.testing.assert_close(exported(x, sigma), model(x, sigma))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("size", [(32, 32), (20, 36)])
def test_the_gpu_gives_what_the_cpu_gives(size):
    # With windows that the image does not fill, too; and compiled.
    def with_gradient(denoiser, device):
        x = images(2, 3, *size).to(device).requires_grad_()
        denoised = denoiser(x, 0.1)
        (gradient,) = torch.autograd.grad(denoised.square().sum(), x)
        return denoised.detach().cpu(), gradient.cpu()

    expected, model = with_gradient(small_model(), "cpu"), small_model().cuda()
    for denoiser in (model, torch.compile(model, dynamic=False)):
        found = with_gradient(denoiser, "cuda")
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)


def saved(path, **changes):
    model = small_model()
    good = {"config": model.config, "weights": model.state_dict(), "info": {"images_seen": 7}}
    utils.save_checkpoint(path, good | changes)
    return model


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    path, x = tmp_path / "model.pt", images(2, 3, 8, 8)
    model = saved(path)
    loaded = load_model(path)
    assert torch.equal(loaded(x, 0.1), model(x, 0.1))
    assert (loaded.sigma_min, loaded.sigma_max) == (0.01, 1.0)
    assert loaded.info == {"images_seen": 7} and not loaded.autocast
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert load_model(path, bfloat16=True).autocast


def test_what_ships_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "checkpoints/score_cifar10.pt"
    assert load_model(name).config == load_model(ROOT / name).config != SMALL
    saved(tmp_path / name)  # a file of one's own comes first
    assert load_model(name).info == {"images_seen": 7}


def test_a_missing_or_damaged_checkpoint_is_named(tmp_path):
    path = tmp_path / "model.pt"
    for missing in (path, tmp_path):
        with pytest.raises(FileNotFoundError, match="no checkpoint at"):
            load_model(missing)
    saved(path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (whole[: len(whole) // 2], b"not a checkpoint", bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="model.pt.*damaged"):
            load_model(path)


class Command:
    """What would run a command when it is unpickled."""

    def __reduce__(self):
        return (Path("executed").touch, ())


def test_a_checkpoint_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"config": Command()}, "model.pt")
    with pytest.raises(ValueError, match="model.pt"):
        load_checkpoint("model.pt")
    assert not Path("executed").exists()


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    path, good = tmp_path / "model.pt", small_model()
    weights, config = good.state_dict(), good.config
    name, value = next(iter(weights.items()))
    for wrong in (
        {"config": {}},
        {"config": config | {"depth": 3}},
        {"config": config | {"widths": (2048, 2048)}},  # refused before memory is taken for it
        {"info": None},
        {"weights": {}},
        {"weights": weights | {name: value[:-1]}},
        {"weights": weights | {name: value * math.nan}},
    ):
        saved(path, **wrong)
        with pytest.raises(ValueError, match="(?s)model.pt' is not a checkpoint of train_score.py"):
            load_model(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="model.pt' is not a checkpoint of train_score.py"):
        load_model(path)


def one_step_psnr(model, sigma):
    stack = np.stack([photograph for _, photograph in utils.sample_photographs(64)])
    x0 = torch.from_numpy(stack).permute(0, 3, 1, 2) / 255
    y = x0 + sigma * torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    return utils.psnr(model(y, sigma), x0).mean().item()


def test_the_shipped_network_says_how_good_it_is():
    path = ROOT / "checkpoints" / "score_cifar10.pt"
    model = load_model(path)
    assert sum(p.numel() for p in model.parameters()) < 2.1e6 and path.stat().st_size < 10e6
    assert (model.sigma_min, model.sigma_max) == train_score.SIGMAS
    assert model.info["images_seen"] == 11_006_652
    # Made by the constants of today; --data, --name and --test were where the images lay.
    now, made_with = utils.options(vars(train_score)), model.info["options"]
    for name in now.keys() & made_with.keys() - {"data", "name", "test", "compile"}:
        assert made_with[name] == now[name]
    for sigma, floor in ((0.02, 39.03), (0.05, 33.44), (0.1, 29.50), (0.2, 25.81), (0.5, 21.43)):
        assert model.info["test_psnr"][sigma] > floor
    for sigma, floor in ((0.02, 39.1), (0.05, 33.5), (0.1, 29.5), (0.2, 25.8)):
        assert one_step_psnr(model, sigma) > floor  # measured 0.06 dB higher


def test_the_shipped_recipe_denoises_at_its_level():
    model = load_model("checkpoints/cnn3_cifar10.pt")
    assert model.config == ONE_LEVEL and model.info["images_seen"] == 9_740_400
    assert model.info["test_psnr"][0.1] > 28.27 and one_step_psnr(model, 0.1) > 27.9

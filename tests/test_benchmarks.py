"""The statistics that certify draws, the comparisons, and that each table and figure can be made."""

import math
import re
import subprocess
import sys
from pathlib import Path

import benchmark
import certify
import mutations
import numpy as np
import pytest
import torch
from PIL import Image

import observations
import pictures
import utils
from model import ScoreModel, load_model

ROOT = Path(__file__).resolve().parent.parent


def normal(*shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_exact_draws_pass_their_certification():
    # Independent pixels N(0.5, c^2): draws from the known posterior, so every statistic is known, to 4 standard errors.
    c, sigma, n, shape = 0.3, 0.2, 19, (40, 3, 16, 16)
    x0 = 0.5 + c * normal(*shape, seed=0)
    y = x0 + sigma * normal(*shape, seed=1)
    mean, std = 0.5 + c**2 / (c**2 + sigma**2) * (y - 0.5), c * sigma / math.sqrt(c**2 + sigma**2)
    found = certify.statistics(mean + std * normal(n, *shape, seed=2), x0, y, mean, sigma)
    assert abs(found["error of a draw"] - 2) < 4 * found["±"] and found["±"] < 0.05
    assert abs(found["of the mean"] - 1) < 0.02
    pixels = x0.numel()
    assert abs(found["in 50%"] - 0.5) < 4 * 0.5 / math.sqrt(pixels) and abs(found["in 90%"] - 0.9) < 4 * 0.3 / math.sqrt(pixels)
    assert abs(found["(y - draw) / sigma"] - 1) < 0.01 and abs(found["its lag 1"]) < 4 / math.sqrt(pixels)
    narrow = certify.statistics(mean + 0.9 * std * normal(n, *shape, seed=2), x0, y, mean, sigma)
    assert narrow["error of a draw"] < 1.9 and narrow["in 90%"] < 0.89
    assert certify.coverage(normal(5, 2, 3, 4, 4, seed=0), normal(2, 3, 4, 4, seed=1), 0.9) is None  # of too few draws


def test_exact_states_hold_the_state_of_the_truth_as_often_as_they_should():
    # As above, in the middle of the way, where x_s given y is Gaussian, too. The truth itself has another law.
    c, sigma, s, shape = 0.3, 0.2, 0.14, (40, 3, 16, 16)
    x0 = 0.5 + c * normal(*shape, seed=0)
    y = x0 + sigma * normal(*shape, seed=1)
    share = (c**2 + s**2) / (c**2 + sigma**2)
    states = 0.5 + share * (y - 0.5) + math.sqrt(share * (sigma**2 - s**2)) * normal(19, *shape, seed=2)
    pixels = x0.numel()
    for size, error in ((0.5, 0.5), (0.9, 0.3)):
        held = certify.coverage(states, certify.state_of(x0, y, sigma, s, 3), size)
        assert abs(held - size) < 4 * error / math.sqrt(pixels) < abs(certify.coverage(states, x0, size) - size)


def test_the_ratios_standard_error_is_that_of_repetitions():
    a, b = 1 + 0.1 * normal(2000, 50, seed=3), 2 + 0.1 * normal(2000, 50, seed=4)
    values, errors = zip(*(certify.ratio(x, y) for x, y in zip(a, b)))
    assert abs(np.std(values) / np.mean(errors) - 1) < 0.1


def test_the_field_has_its_own_denoiser():
    # Of all linear denoisers the Wiener filter has the least error: scaled either way it has more.
    x0, denoiser = certify.gaussian_field((8, 3, 32, 32), 0, "cpu")
    y = x0 + 0.1 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    error = lambda sigma: ((denoiser(y, sigma) - x0) ** 2).mean()  # noqa: E731
    assert error(0.1) < error(0.08) and error(0.1) < error(0.125) and abs(x0.std() / 0.25 - 1) < 0.3


def test_the_wiener_filter_is_a_gaussians_posterior_mean():
    images = torch.randint(256, (1500, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[:, 1] = images[:, 0]  # two channels that always agree
    x = images.flatten(1).double().numpy() / 255
    y = np.random.default_rng(0).normal(0.5, 0.3, (7, 12))
    covariance = np.cov(x.T, bias=True)
    expected = x.mean(0) + (y - x.mean(0)) @ np.linalg.solve(covariance + 0.2**2 * np.eye(12), covariance)
    result = benchmark.wiener_filter(images)(torch.from_numpy(y).view(7, 3, 2, 2), 0.2)
    np.testing.assert_allclose(result.flatten(1), expected, atol=1e-5)


def test_the_mirror_image_is_turned_back():
    y = normal(2, 3, 5, 5, seed=0)
    torch.testing.assert_close(benchmark.mirrored(lambda x, sigma: x * sigma)(y, 0.5), y / 2)
    ramp = torch.arange(5.0)
    torch.testing.assert_close(benchmark.mirrored(lambda x, sigma: x + ramp)(y, 0.5), y + 2)


def test_operations_are_those_of_a_convolution():
    layer, x = torch.nn.Conv2d(8, 16, 3, padding=1), torch.zeros(2, 8, 5, 5)
    assert benchmark.operations(lambda: layer(x)) == 2 * 9 * 8 * 16 * 25 * 2


def test_splitting_weighs_what_is_seen_against_the_prior():
    # x = argmin |y - x|^2 / sigma_y^2 + strength |x - z|^2 / s^2 where seen, and z elsewhere; the network doubles.
    start = 0.5 + 0.1 * normal(2, 3, 8, 8, seed=0)
    A, y = observations.observe("half of the pixels", start, 0.1, 0)
    seen = A(torch.ones_like(start))
    weights = seen / 0.1**2, 0.23 / torch.ones_like(start)
    expected = 2 * (weights[0] * y + weights[1] * start) / sum(weights)
    found = observations.splitting(lambda x, sigma: 2 * x, start, A, y, 0.1, 0.23, steps=1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_classical_means_restore_a_smooth_picture_without_noise():
    wave = torch.linspace(0, 3, 32).sin()
    x0 = (0.5 + 0.3 * wave[:, None] * wave).expand(1, 3, 32, 32)
    for name in observations.OBSERVATIONS:
        _, y = observations.observe(name, x0, 1e-6, 0)
        for label, tried in observations.classical(name, y).items():
            assert max(utils.psnr(images, x0).item() for images in tried) > 40, label


def test_every_file_that_the_readme_names_is_there():
    named = re.findall(r"(?:figures|checkpoints|tests)/\w+\.\w+", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert "figures/langevin.png" in named
    for name in named:
        assert (ROOT / name).is_file(), name


def test_every_wrong_change_has_one_place_in_the_code():
    for change in mutations.changes():
        assert (ROOT / change.file).read_text(encoding="utf-8").count(change.right) == 1, change.what
        assert change.right != change.wrong


def test_grey_photographs_are_denoised_as_grey():
    (row,) = pictures.grey_rows(load_model(utils.find("checkpoints/score_cifar10.pt")), [0.1], 0, size=64)
    assert row["network, PSNR dB"] > row["as if it were coloured"] + 3 and row["gain dB"] > 0.7


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.2])
def test_lossy_files_cost_little_of_what_is_possible(monkeypatch, sigma):
    monkeypatch.setattr(pictures, "CODECS", {"JPEG 75": pictures.CODECS["JPEG 75"]})  # the one that smooths most
    (row,) = pictures.codec_rows(load_model(utils.find("checkpoints/score_cifar10.pt")), [sigma], 0, size=48)
    assert 0 <= row["mean loss dB"] < 0.3 and row["largest loss dB"] < 1
    assert row["best PSNR dB"] > {0.05: 30, 0.1: 27, 0.2: 23}[sigma]


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A folder with untrained networks and a few patches."""
    folder = tmp_path_factory.mktemp("networks")
    for name, model in (
        ("cnn3", ScoreModel("cnn3", 0.1, 0.1)),
        ("unet", ScoreModel("unet", 0.01, 1.0, (32, 32), (1, 1), (0, 1))),
    ):
        utils.save_checkpoint(folder / f"{name}.pt", {"config": model.config, "weights": model.state_dict(), "info": {}})
    np.save(folder / "patches.npy", utils.read_patches("samples")[:40].permute(0, 2, 3, 1).numpy())
    return folder


@pytest.mark.parametrize(
    "script, line, words, figures",
    [
        ("benchmark.py", "--study-count 2 --step-sizes 1e-3 1e-2 --steps 2", "means|200 steps|U-Net, one step", ["langevin"]),
        ("benchmark.py", "--table levels --levels 0.1 0.5 --train patches.npy", "0.1|0.5|float32, gain", ["levels"]),
        ("benchmark.py", "--table noise --noise-levels 0.1", "8 bit|within 4%", []),
        ("benchmark.py", "--table expected", "0.05|correlation|two maps", ["expected", "uncertainty", "components"]),
        ("benchmark.py", "--table observations --observed-steps 4", "splitting|biharmonic|Wiener|Lanczos", ["observations.jpg"]),
        ("benchmark.py", "--table speed --seconds 0.01 --batch 2 --steps 2", "training|network alone|within `adams`", []),
        (
            "certify.py",
            "--sigmas 0.1 --draws 3 --few-draws 2 --observed 2 --observed-steps 4",
            "exact|`adams`, 20|annealed_langevin|Gaussian random field|half size|error at 0.1",
            ["forgetting", "dial", "nothing"],
        ),
    ],
)
def test_every_table_and_figure_can_be_made(networks, tmp_path, script, line, words, figures):
    line = line.replace("patches.npy", str(networks / "patches.npy"))
    common = f"--input {networks / 'patches.npy'} --count 3 --checkpoint {networks / 'unet.pt'} --device cpu"
    common += f" --recipe {networks / 'cnn3.pt'}" if script == "benchmark.py" else ""
    command = [sys.executable, ROOT / "tests" / script, *common.split(), *line.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in words.split("|")), done.stdout
    for name in figures:
        assert Image.open(tmp_path / "figures" / (name if "." in name else f"{name}.png")).width > 500

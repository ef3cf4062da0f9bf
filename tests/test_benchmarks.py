"""The statistics that certify samples, the comparisons, and that every table can be made."""

import math
import re
from pathlib import Path

import benchmark
import certify
import numpy as np
import photographs
import pytest
import torch
from gaussian import normal

import observations
import sde
import utils
from model import ScoreModel

ROOT = Path(__file__).resolve().parent.parent
C, S = 0.3, 0.2  # deviation of the prior N(0.5, C^2) of each value, and the noise level


class White:
    """The posterior mean for independent values N(0.5, c^2), with the range of a network."""

    sigma_min, sigma_max = 0.005, 20.0

    def __init__(self, c=C):
        self.c = c

    def __call__(self, x, sigma):
        variance = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1, 1, 1) ** 2
        return 0.5 + self.c**2 / (self.c**2 + variance) * (x - 0.5)


def clean(count, size, c=C):
    return 0.5 + c * normal(count, 3, size, size, seed=0)


def clean_and_noisy(count, size):
    x0 = clean(count, size)
    return x0, x0 + S * normal(*x0.shape, seed=1)


@pytest.fixture
def figures(monkeypatch):
    """What is saved as a figure, or shown as images: {name of the file: figure or rows}."""
    saved = {}

    def keep(path, shown, *rest, **options):
        saved[path.stem] = shown

    for name in ("save_figure", "plot_images", "save_png"):
        monkeypatch.setattr(utils, name, keep)
    return saved


# -----------------------------------------------------------------------------
# What certifies samples
# -----------------------------------------------------------------------------


@pytest.mark.parametrize("s", [0.0, 0.14])
def test_exact_samples_and_states_hold_the_truth_as_often_as_they_say(s):
    # At every level x_s given y is Gaussian; at 0 it is the clean image.
    x0, y = clean_and_noisy(40, 16)
    share = (C**2 + s**2) / (C**2 + S**2)
    mean, deviation = 0.5 + share * (y - 0.5), math.sqrt(share * (S**2 - s**2))
    truth = certify.state_of(x0, y, S, s, 3)
    found = certify.intervals(mean + deviation * normal(19, *x0.shape, seed=2), truth, "")
    assert abs(found[" in 50%"] - 0.5) < 4 * 0.5 / x0.numel() ** 0.5
    assert abs(found[" in 90%"] - 0.9) < 4 * 0.3 / x0.numel() ** 0.5
    with pytest.raises(ValueError, match="5 samples"):
        certify.coverage(normal(5, *x0.shape, seed=2), x0, 0.9)


def test_the_ratios_standard_error_is_that_of_repetitions():
    a, b = 1 + 0.1 * normal(2000, 50, seed=3), 2 + 0.1 * normal(2000, 50, seed=4)
    values, errors = zip(*(certify.ratio(x, y) for x, y in zip(a, b)))
    assert abs(np.std(values) / np.mean(errors) - 1) < 0.1


def test_the_field_has_its_own_denoiser():
    # Of all linear denoisers the Wiener filter has the least error: scaled either way it has more.
    x0, denoiser = certify.gaussian_field((8, 3, 32, 32), 0, "cpu")
    y = x0 + 0.1 * certify.unit_noise(x0, 1)
    errors = [((denoiser(y, sigma) - x0) ** 2).mean() for sigma in (0.08, 0.1, 0.125)]
    assert errors[1] < min(errors[0], errors[2]) and abs(x0.std() / 0.25 - 1) < 0.3


def test_all_samplers_are_certified_on_a_white_prior(figures):
    x0, y = clean_and_noisy(10, 8)
    found = certify.certify(White(), y, x0, S, 0.005)
    exact = 2 - 0.005**2 / (1 / (1 / C**2 + 1 / S**2))
    assert [row["sampler"] for row in found] == ["*exact*", *certify.SAMPLERS]
    assert abs(found[0]["error"] - exact) < 1e-3
    assert all(abs(row["error"] - exact) < 0.15 for row in found), found
    inside = certify.certify_jacobian(White(), y, x0, S, 2)
    for row, label in ((found[1], "truth"), (found[1], "state"), (inside, "truth")):
        assert abs(row[f"{label} in 50%"] - 0.5) < 0.04 and abs(row[f"{label} in 90%"] - 0.9) < 0.03
    table = certify.summary({S: (found, found)})
    assert table[1]["error at 0.2"].startswith(f"{table[1]['of the field, 0.2']:.3f} ± ")
    certify.study_forgetting(Path("forgetting.png"), White(), y, x0, S)
    lines = {line.get_label(): line.get_xydata() for line in figures["forgetting"].axes[0].lines}
    assert lines["plain Langevin (the recipe)"][:, 0].tolist() == [20, 40, 80, 160, 320]
    assert abs(lines["corrections with the pull of y"][-1, 1] - 2) < 0.15
    assert lines["corrections by the score alone"][-1, 1] > 2.5


def test_samples_from_nothing_have_the_power_of_the_prior(figures):
    x0 = clean(16, 16)
    for row in certify.study_nothing(Path("nothing.png"), White(), x0, "cpu"):
        error = 4 / C / 3000**0.5 if row["calls"] == 1 else 8 / 3000**0.5  # of 3,000 values
        assert abs(row["brightness above"] - 1) < error, row
        assert abs(row["red - blue above"] - 1) < error, row
    assert figures["nothing"].shape == (3, 4 * 35, 4 * 137)  # 2 x 8 images with lines between
    pale = x0.mean(1, keepdim=True) + 0.5 * (x0 - x0.mean(1, keepdim=True))
    share = certify.spectrum(pale, pale) / certify.spectrum(x0, x0)
    torch.testing.assert_close(share, torch.tensor([[1.0] * 3, [0.25] * 3]).double())


def test_the_wiener_filter_is_a_gaussians_posterior_mean():
    images = torch.rand(1500, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    images[:, 1] = images[:, 0]  # two channels that always agree
    x = images.flatten(1).double().numpy()
    y = np.random.default_rng(0).normal(0.5, 0.3, (7, 12))
    covariance = np.cov(x.T, bias=True)
    pull = np.linalg.solve(covariance + 0.2**2 * np.eye(12), covariance)
    denoiser = benchmark.wiener_filter(images)
    result = denoiser(torch.from_numpy(y).view(7, 3, 2, 2), 0.2)
    np.testing.assert_allclose(result.flatten(1), x.mean(0) + (y - x.mean(0)) @ pull, atol=1e-5)
    with pytest.raises(ValueError, match="3, 4, 4"):
        denoiser(torch.zeros(1, 3, 4, 4), 0.2)


def test_bits_per_dimension_are_the_entropy_of_a_gaussian():
    c = C / 3
    x0 = (255 * clean(100, 16, c)).round() / 255
    levels = torch.tensor(benchmark.LEVELS).double()
    errors = (1 / (1 / c**2 + 1 / levels**2)).sqrt()[:, None, None, None, None] + 0 * x0
    curve = benchmark.bits_per_dimension(levels, errors, x0)[0]
    known = [math.log2(1 + c**2 / s**2) / 2 for s in (0.005, 20.0)]
    assert (curve - (known[0] - known[1])).abs().max() < 0.005
    errors[0] = White(c)(x0 + 0.005 * normal(*x0.shape, seed=1), 0.005) - x0
    _, rounding, start = benchmark.bits_per_dimension(levels, errors, x0).mean(1)
    assert abs(start - c**2 / 20**2 / 2 / math.log(2)) < 1e-6
    entropy = math.log2(255 * c * math.sqrt(2 * math.pi * math.e))
    assert -0.01 < curve.mean() + rounding + start - entropy < 0.03


def test_what_is_expected_of_a_gaussian_is_its_posterior_variance():
    x0, y = clean_and_noisy(7, 16)
    expected, true = benchmark.expected_errors(White(), y, x0, S, probes=2)
    known = -10 * math.log10(1 / (1 / C**2 + 1 / S**2))
    torch.testing.assert_close(expected, torch.full_like(expected, known), atol=1e-5, rtol=0)
    assert (true - known).abs().max() < 4 * 4.34 * math.sqrt(2 / x0[0].numel())


# -----------------------------------------------------------------------------
# Observations
# -----------------------------------------------------------------------------

SIGMA_Y = 0.05


@pytest.mark.parametrize("name", ["half of the pixels", "quarter size"])
def test_an_observation_has_its_noise_where_pixels_are_seen(name):
    x0, A = clean(20, 16), observations.OBSERVATIONS[name]
    y = observations.observe(A, x0, SIGMA_Y, 0)
    seen = A(torch.ones_like(x0)) > 0
    noise = (y - A(x0))[seen]
    assert abs(noise.std() / SIGMA_Y - 1) < 4 / (2 * len(noise)) ** 0.5
    assert (y == 0).equal(~seen)


def test_a_step_of_splitting_is_the_minimum_of_its_two_terms():
    A, strength = observations.OBSERVATIONS["hole of 12 x 12"], 0.5
    x0 = clean(2, 16)
    y = observations.observe(A, x0, SIGMA_Y, 0)
    filled = sde.fill(y, A, SIGMA_Y, x0)

    def same(z, s):
        return z

    found = observations.splitting(same, y, A, SIGMA_Y, x0, None, strength, steps=1)
    seen = (y / SIGMA_Y**2 + strength * filled) / (1 / SIGMA_Y**2 + strength)
    exact = torch.where(y == 0, filled, seen)  # solved to a hundredth
    assert (found - exact).norm() < 0.015 * (exact - filled).norm()
    assert (y == 0).sum() == 2 * 3 * 12 * 12 and (y[:, :, 2:-2, 2:-2] == 0).all()


def test_samples_of_an_observation_must_scatter_as_far_as_their_mean_is_off(monkeypatch):
    def draw(scale, y, A, sigma_y, like, noise):  # exact for the prior N(0.5, C^2) (Matheron)
        x = 0.5 + C * noise(like)
        gain = C**2 / (C**2 + 3 * sigma_y**2)
        return scale * (x + gain * (y - A(x) - sigma_y * noise(y)) - 0.5) + 0.5

    monkeypatch.setattr(observations, "TYPICAL", ("colour from grey",))
    monkeypatch.setattr(observations, "draw", draw)
    (row,) = certify.certify_observations(1.0, clean(64, 16))
    assert abs(row["spread / error"] - 1) < 4 * row["±"] < 0.05
    assert abs(row["truth in 60%"] - 0.6) < 4 * 0.49 / (64 * 3 * 16**2) ** 0.5
    (row,) = certify.certify_observations(0.9, clean(64, 16))
    assert row["spread / error"] < 0.95 and row["truth in 60%"] < 0.59


def test_methods_are_compared_on_the_same_images(monkeypatch):
    x0, name = clean(3, 16), "colour from grey"
    y = observations.observe(observations.OBSERVATIONS[name], x0, SIGMA_Y, 0)
    monkeypatch.setattr(observations, "STEPS", 3)
    monkeypatch.setattr(observations, "STRENGTHS", (0.5, 0.9, 0.8))

    def splitting(model, y, A, sigma_y, like, noise, strength):
        return 0.5 + strength * (x0 - 0.5)

    monkeypatch.setattr(observations, "splitting", splitting)
    rows, (panel,) = observations.compare(White(), x0, SIGMA_Y, 0, 2, (name,))
    psnr = utils.psnr(0.5 + 0.9 * (x0 - 0.5), x0)  # of the best strength
    _, best, sample, mean, pair = rows
    assert abs(best["PSNR dB"] - psnr.mean()) < 1e-6 and best["less splitting"] == 0
    assert [row["images"] for row in rows] == [3, 3, 2, 2, 3]
    assert [row["network calls"] for row in rows] == [0, 24, 3, 24, 24]
    assert abs(mean["less splitting"] - (mean["PSNR dB"] - psnr[:2].mean())) < 1e-6
    assert pair["PSNR dB"] > mean["PSNR dB"] > sample["PSNR dB"]
    titles = ["observation", "classical", "splitting", "one sample", "posterior mean"]
    assert [title for title, _, _ in panel] == [*titles, "clean image"] and panel[0][2] == name
    assert panel[0][1].equal(y[0]) and panel[-1][1].equal(x0[0])


def test_two_networks_are_compared_on_the_same_noise():
    models = {"first": lambda y, sigma: y, "second": lambda y, sigma: 0.5 + (y - 0.5) / 2}
    for channels in (3, 1):
        middle = [torch.full((channels, 24, 24), 0.5)] * 2
        (row,) = photographs.rows(photographs.network_rows, models, middle, [0.1], 0)
        assert abs(row["gain dB"] - 20 * math.log10(2)) < 1e-4 and row["±"] < 1e-4
        error = 4.34 * math.sqrt(2 / (2 * channels * 24 * 24))
        assert abs(row["first, PSNR dB"] - 20) < 4 * error
        # A derivative of 1/2 promises half of the noise's variance; a quarter of it is left.
        assert abs(row["expected less true"] + 10 * math.log10(2)) < 4 * error


def test_levels_found_are_those_added_and_lossless_files_lose_nothing(monkeypatch):
    images = [(0.5 + 0.1 * normal(3, 64, 64, seed=i)).float() for i in range(2)]
    for row in photographs.rows(photographs.level_rows, White(0.1), images, [0.05], 0):
        assert abs(row["median"] - 1) < 0.03 and row["within 4%"] == 1
    few = {name: photographs.FILES[name] for name in ("float", "PNG")}
    monkeypatch.setattr(photographs, "FILES", few)
    (row,) = photographs.rows(photographs.file_rows, White(0.1), images, [0.05], 0)
    assert abs(row["found / true"] - 1) < 0.03 and row["file"] == "PNG"
    assert 0 <= row["mean loss dB"] <= row["largest loss dB"] < 0.01


def test_grey_images_are_denoised_as_grey_and_beside_the_best_strength(monkeypatch):
    images = [0.5 + 0.2 * normal(1, 32, 32, seed=i) for i in range(2)]

    def scaled(y, sigma, strength):
        return 0.5 + strength * (y - 0.5)

    monkeypatch.setattr(photographs, "CLASSICAL", {"scaled": (scaled, (0.0, 0.5, 1.0))})
    (row,) = photographs.rows(photographs.classical_rows, White(0.2), images, [S], 0)
    psnrs = []
    for k in (0.25, 0.5):  # 0.2^2 / (0.2^2 + 3 S^2) by the network, and the best of the three
        psnrs.append(-10 * math.log10(0.2**2 * (1 - k) ** 2 + k**2 * S**2))
    error = 4 * 4.34 * math.sqrt(2 / (2 * 32 * 32))
    assert abs(row["network, PSNR dB"] - psnrs[0]) < error
    assert abs(row["scaled, PSNR dB"] - psnrs[1]) < error
    assert abs(row["gain dB"] - (row["network, PSNR dB"] - row["scaled, PSNR dB"])) < 1e-9


def test_images_come_whole_or_as_their_middle(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(3 * 6 * 8 * 3, dtype=np.uint8).reshape(3, 6, 8, 3))
    whole = photographs.read(tmp_path, 2)
    assert len(whole) == 2 and whole[1].shape == (3, 6, 8)
    assert benchmark.read_images(tmp_path, 2, 4)[1].equal(whole[1][:, 1:5, 2:6])


# -----------------------------------------------------------------------------
# Tables and figures
# -----------------------------------------------------------------------------


@pytest.fixture
def run(run_script, monkeypatch, tmp_path):
    """Return a function that runs a script with untrained networks on three small images."""
    networks = {"cnn3": ScoreModel("cnn3", 0.1, 0.1)}
    networks["unet"] = ScoreModel("unet", 0.005, 20.0, (8, 8), (1, 1), (0, 0))
    for name, model in networks.items():
        checkpoint = {"config": model.config, "weights": model.state_dict(), "info": {}}
        utils.save_checkpoint(tmp_path / f"{name}.pt", checkpoint)
    images = np.random.default_rng(0).integers(256, size=(40, 16, 16, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    monkeypatch.setattr(utils, "training_images", lambda source: images)
    usual = "--input images.npy --count 3 --checkpoint unet.pt --device cpu --figures ."

    def run(script, line):
        return run_script(script, f"{usual} {line}")[0]

    run.x0 = torch.from_numpy(images[:3]).permute(0, 3, 1, 2) / 255
    return run


def test_results_are_of_each_denoiser_and_langevin_runs_start_at_the_noisy_image(run, figures):
    out = run(benchmark, "--recipe cnn3.pt --study-count 2 --step-sizes 1e-3 1e-2 --steps 2")
    rows = re.findall(r"^\| (\S.*?) +\| +([\d.]+) ", out, re.MULTILINE)
    assert len(rows) == 9 and rows[0][0] == "noisy" and rows[-1][0] == "**U-Net, one step**"
    y = benchmark.noisy(run.x0, 0.1, 0)
    assert abs(float(rows[0][1]) - benchmark.mean_psnr(y, run.x0)) < 0.01
    line = figures["langevin"].axes[0].lines[0]
    assert abs(line.get_ydata()[0] - benchmark.mean_psnr(y[:2], run.x0[:2])) < 1e-4
    np.testing.assert_allclose(line.get_xdata(), 1e-3 * np.arange(40))


def test_levels_have_their_gains_and_bits(run, figures):
    out = run(benchmark, "--table levels --levels 0.05 0.1 0.5")
    table = np.array(re.findall(r"^\| (0\.\d+) +\| +(\S+) \| +(\S+) \| +(\S+) ", out, re.MULTILINE))
    sigma, _, wiener, one_step = table.astype(float).T
    line = figures["levels"].axes[0].lines[0]
    np.testing.assert_allclose(line.get_xdata(), sigma)
    np.testing.assert_allclose(line.get_ydata(), one_step - wiener, atol=0.011)
    assert "bits per dimension, at most: " in out


def test_what_is_expected_is_plotted_over_what_is_true(run, figures, monkeypatch):
    monkeypatch.setattr(benchmark.plot_uncertainty, "__defaults__", (3, 2))
    out = run(benchmark, "--table expected --steps 2")
    true = [float(value) for value in re.findall(r"^\| 0\.\d+ +\| +(\S+) ", out, re.MULTILINE)]
    for axes, mean in zip(figures["expected"].axes, true):
        assert abs(axes.lines[1].get_xdata().mean() - mean) < 0.01
    panels = figures["uncertainty"].axes
    assert len(panels) == 3 * 5 + 1  # the last is the colour bar
    error = panels[4].images[0].get_array()
    one_step = panels[1].images[0].get_array() / 255
    off = ((one_step - run.x0[0].permute(1, 2, 0).numpy()) ** 2).mean(2) ** 0.5
    assert np.corrcoef(error.ravel(), off.ravel())[0, 1] > 0.9
    row = {title: image for title, image, _ in figures["components"][1]}
    along = row["+2 sd"] - row["-2 sd"]
    variance = 1 / (1 / ScoreModel.sigma_data**2 + 1 / 0.6**2)  # an untrained network is White
    assert abs(along.norm() / variance**0.5 - 4) < 0.01
    assert row["one step"].allclose((row["+1 sd"] + row["-1 sd"]) / 2, atol=1e-5)


def test_one_step_a_sample_and_a_level_are_timed_at_each_size(run, monkeypatch):
    def calls(device, function, *arguments):
        if function is photographs.level_found:
            return 9.0
        counted = utils.Recorder(arguments[0], 0)
        function(counted, *arguments[1:])
        return float(counted.calls)

    monkeypatch.setattr(benchmark, "seconds_of", calls)
    out = run(benchmark, "--table speed --megapixels 0.01 0.02 --steps 3")
    assert re.findall(r"\d\.00", out) == ["1.00", "1.00", "3.00", "3.00", "9.00", "9.00"]


def test_the_typical_observations_are_compared_in_strong_noise_too(run, figures, monkeypatch):
    def restore(model, A, y, sigma_y, x0, *rest):
        return {"splitting": (0.9 * x0, 24)}

    monkeypatch.setattr(observations, "restore", restore)
    out = run(benchmark, "--table observations --sigma-y 0.03")
    weak, strong = out.split("noise of 0.1 in the observations")
    for name in observations.OBSERVATIONS:
        assert weak.count(f"| {name} ") == 1
        assert strong.count(f"| {name} ") == (name in observations.TYPICAL)


def test_certification_prints_its_tables(run, monkeypatch):
    studied = []
    few = {"`adams`, 10": certify.SAMPLERS["`adams`, 10"]}
    monkeypatch.setattr(certify, "SAMPLERS", few)
    monkeypatch.setattr(observations, "TYPICAL", ("half size",))
    monkeypatch.setattr(observations, "STEPS", 2)
    monkeypatch.setattr(certify, "study_forgetting", lambda *rest: studied.append(rest[-1]))
    monkeypatch.setattr(certify, "study_nothing", lambda *rest: [{"images": len(rest[2])}])
    out = run(certify, "--sigmas 0.1 0.2 --samples 3 --observed 2 --nothing 1")
    assert out.count("| `adams`, 10") == 5 and re.search("error at 0.1 .* error at 0.2", out)
    assert re.search(r"\| half size +\| ", out) and "|      1 |" in out and studied == [0.2]


def test_every_figure_is_shown_and_every_file_named_is_there():
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "tests/README.md")]
    named = set(re.findall(r"(?:figures|checkpoints|tests)/\w+\.\w+", " ".join(texts)))
    assert all((ROOT / name).is_file() for name in named), named
    for path in (ROOT / "figures").iterdir():
        assert path.name.endswith("_training.png") or f"figures/{path.name}" in named, path.name
    tables = set(re.findall(r"--table (\w+)", texts[1]))
    assert tables | {"results"} == set(benchmark.TABLES)

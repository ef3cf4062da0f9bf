"""The statistics that certify samples, the comparisons, and that every table can be made."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import benchmark
import certify
import numpy as np
import photographs
import pytest
import torch

import utils
from model import ScoreModel

ROOT = Path(__file__).resolve().parent.parent
C, S = 0.3, 0.2  # deviation of the prior N(0.5, C^2) of each value, and the noise level


def normal(*shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class White:
    """The posterior mean for independent values N(0.5, c^2), with the range of a network."""

    sigma_min, sigma_max = 0.005, 20.0

    def __init__(self, c=C):
        self.c = c

    def __call__(self, x, sigma):
        variance = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1, 1, 1) ** 2
        return 0.5 + self.c**2 / (self.c**2 + variance) * (x - 0.5)


class Pale(White):
    """A network that gives half of the contrast that it should."""

    def __call__(self, x, sigma):
        return 0.5 + (super().__call__(x, sigma) - 0.5) / 2


@pytest.fixture
def posterior():
    """Clean and noisy images, mean and deviation of p(x0 | y)."""
    x0 = 0.5 + C * normal(40, 3, 16, 16, seed=0)
    y = x0 + S * normal(40, 3, 16, 16, seed=1)
    return x0, y, 0.5 + C**2 / (C**2 + S**2) * (y - 0.5), C * S / math.hypot(C, S)


@pytest.fixture
def figures(monkeypatch):
    """What is saved as a figure, or shown as images: {name of the file: figure or rows}."""
    saved = {}

    def keep(path, shown, *rest, **options):
        saved[path.stem] = shown

    monkeypatch.setattr(utils, "save_figure", keep)
    monkeypatch.setattr(utils, "plot_images", keep)
    return saved


def test_exact_samples_pass_their_certification(posterior):
    x0, y, mean, deviation = posterior
    found = certify.statistics(mean + deviation * normal(19, *x0.shape, seed=2), x0, y, mean, S)
    assert abs(found["error"] - 2) < 4 * found["±"] and found["±"] < 0.05
    assert abs(found["of the mean"] - 1) < 0.02
    n = x0.numel()
    assert abs(found["in 50%"] - 0.5) < 4 * 0.5 / n**0.5
    assert abs(found["in 90%"] - 0.9) < 4 * 0.3 / n**0.5
    assert abs(found["(y - sample) / sigma"] - 1) < 0.01
    assert abs(found["its lag 1"]) < 4 / n**0.5
    narrow = mean + 0.9 * deviation * normal(19, *x0.shape, seed=2)
    found = certify.statistics(narrow, x0, y, mean, S)
    assert found["error"] < 1.9 and found["in 90%"] < 0.89


def test_exact_states_hold_the_state_of_the_truth_as_often_as_they_should(posterior):
    # In the middle of the way x_s given y is Gaussian, too. The truth itself has another law.
    x0, y, _, _ = posterior
    s = 0.14
    share = (C**2 + s**2) / (C**2 + S**2)
    deviation = math.sqrt(share * (S**2 - s**2))
    states = 0.5 + share * (y - 0.5) + deviation * normal(19, *x0.shape, seed=2)
    of_truth = certify.state_of(x0, y, S, s, 3)
    for size, error in ((0.5, 0.5), (0.9, 0.3)):
        held = certify.coverage(states, of_truth, size)
        assert abs(held - size) < 4 * error / x0.numel() ** 0.5
        assert abs(certify.coverage(states, x0, size) - size) > 0.01


def test_intervals_of_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="5 samples"):
        certify.coverage(normal(5, 2, 3, 4, 4, seed=0), normal(2, 3, 4, 4, seed=1), 0.9)


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


def test_all_samplers_are_certified_and_white_priors_have_white_samples(monkeypatch, figures):
    monkeypatch.setattr(certify, "SAMPLES", 19)
    monkeypatch.setattr(certify, "FEW_SAMPLES", 2)
    x0 = 0.5 + C * normal(10, 3, 8, 8, seed=0)
    y = x0 + S * normal(10, 3, 8, 8, seed=1)
    rows = {row["sampler"]: row for row in certify.certify(White(), y, x0, S, 0.005)}
    exact = 2 - 0.005**2 / (1 / (1 / C**2 + 1 / S**2))
    assert abs(rows["*exact*"]["error"] - exact) < 1e-3 and len(rows) == len(certify.SAMPLERS) + 2
    for label in certify.SAMPLERS:
        assert abs(rows[label]["error"] - exact) < 0.15, label
    assert abs(rows["its *state* before the last step"]["in 50%"] - 0.5) < 0.04
    inside = certify.certify_jacobian(White(), y, x0, S, 2)
    assert abs(inside["in 50%"] - 0.5) < 0.04 and abs(inside["in 90%"] - 0.9) < 0.03
    table = certify.summary({S: (list(rows.values()), list(rows.values()))})
    assert table[1]["error at 0.2"].startswith(f"{table[1]['of the field, 0.2']:.3f} ± ")
    certify.study_forgetting(Path("forgetting.png"), White(), y, x0, S)
    lines = {line.get_label(): line.get_xydata() for line in figures["forgetting"].axes[0].lines}
    assert lines["plain Langevin (the recipe)"][:, 0].tolist() == [20, 40, 80, 160, 320]
    assert (
        abs(lines["corrections with the pull of y"][-1, 1] - 2) < 0.15
        and lines["corrections by the score alone"][-1, 1] > 2.5
    )


def test_samples_from_nothing_have_the_power_of_the_prior(figures):
    x0 = 0.5 + C * normal(16, 3, 16, 16, seed=0)
    for row in certify.study_nothing(Path("nothing.png"), White(), x0, "cpu"):
        error = 4 / C / 3000**0.5 if row["calls"] == 1 else 8 / 3000**0.5  # of 3,000 values
        assert abs(row["brightness above"] - 1) < error, row
        assert abs(row["red - blue above"] - 1) < error, row
    pale = x0.mean(1, keepdim=True) + 0.5 * (x0 - x0.mean(1, keepdim=True))
    share = certify.spectrum(pale, pale) / certify.spectrum(x0, x0)
    torch.testing.assert_close(share, torch.tensor([[1.0] * 3, [0.25] * 3]).double())
    x0[:, 2] = x0[:, 0]
    assert certify.spectrum(x0, x0)[1].max() < 1e-9
    row = certify.study_nothing(Path("pale.png"), Pale(), x0, "cpu")[-1]
    assert abs(row["brightness above"] - 2) < 0.1  # one step needs twice its contrast
    assert len(np.unique(figures["nothing"].axes[0].images[0].get_array())) > 200


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
    x0 = (255 * (0.5 + C / 3 * normal(100, 3, 16, 16, seed=0))).round() / 255
    levels, c = torch.tensor(benchmark.LEVELS).double(), C / 3
    lowest = White(c)(x0 + 0.005 * normal(*x0.shape, seed=1), 0.005) - x0
    errors = (1 / (1 / c**2 + 1 / levels**2)).sqrt()[:, None, None, None, None] + 0 * x0
    curve = benchmark.bits_per_dimension(levels, errors, x0)[0]
    known = [math.log2(1 + c**2 / s**2) / 2 for s in (0.005, 20.0)]
    assert (curve - (known[0] - known[1])).abs().max() < 0.005
    errors[0] = lowest
    _, rounding, start = benchmark.bits_per_dimension(levels, errors, x0).mean(1)
    assert abs(start - c**2 / 20**2 / 2 / math.log(2)) < 1e-6
    entropy = math.log2(255 * c * math.sqrt(2 * math.pi * math.e))
    assert -0.01 < curve.mean() + rounding + start - entropy < 0.03


def test_what_is_expected_of_a_gaussian_is_its_posterior_variance():
    x0 = 0.5 + C * normal(7, 3, 16, 16, seed=0)
    y = x0 + S * normal(7, 3, 16, 16, seed=1)
    expected, true = benchmark.expected_errors(White(), y, x0, S, "cpu", probes=2)
    known = -10 * math.log10(1 / (1 / C**2 + 1 / S**2))
    torch.testing.assert_close(expected, torch.full_like(expected, known), atol=1e-5, rtol=0)
    assert (true - known).abs().max() < 4 * 4.34 * math.sqrt(2 / x0[0].numel())


def test_results_do_not_depend_on_the_batch(monkeypatch):
    y = normal(5, 3, 4, 4, seed=0)
    found = []
    for module, batch in ((benchmark, 2), (benchmark, 5), (certify, 5), (certify, 10)):
        monkeypatch.setattr(module, "BATCH", batch)
        if module is benchmark:
            found.append(benchmark.in_batches(lambda y, noise: y + noise(y), y, "cpu"))
        else:
            found.append(certify.posterior_samples(lambda y, noise: y + noise(y), y, 2))
    assert found[0].equal(found[1]) and found[2].equal(found[3]) and found[0].equal(found[2][0])
    assert not found[2][0].equal(found[2][1])


def test_a_time_is_the_shortest_after_the_first(monkeypatch):
    clock = iter([0, 1, 10, 14, 20, 23, 30, 35])  # calls of 1, 4, 3 and 5 seconds
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=clock.__next__))
    monkeypatch.setattr(benchmark, "SECONDS", 7.0)
    assert benchmark.seconds_of(torch.device("cpu"), lambda: None) == 3


# -----------------------------------------------------------------------------
# Photographs
# -----------------------------------------------------------------------------


def test_two_networks_are_compared_on_the_same_noise():
    middle = [torch.full((3, 24, 24), 0.5)] * 2
    models = {"first": lambda y, sigma: y, "second": lambda y, sigma: 0.5 + (y - 0.5) / 2}
    colour, grey = photographs.network_rows(models, middle, {"0.1": 0.1}, 0)
    for row in (colour, grey):
        assert abs(row["gain dB"] - 20 * math.log10(2)) < 1e-4 and row["±"] < 1e-4
    assert abs(colour["first, PSNR dB"] - 20) < 4 * 4.34 * math.sqrt(2 / (2 * 3 * 24 * 24))
    assert abs(grey["first, PSNR dB"] - 20) < 4 * 4.34 * math.sqrt(2 / (2 * 24 * 24))


def test_levels_found_are_those_added():
    images = [(0.5 + 0.1 * normal(3, 64, 64, seed=i)).float() for i in range(2)]
    for row in photographs.level_rows(White(0.1), images, (0.05,), 0):
        assert abs(row["median"] - 1) < 0.03 and row["within 8%"] == 1
        assert row["least"] <= row["median"] <= row["most"]


def test_files_in_memory_are_those_formats():
    y = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    errors = {}
    for name, (form, options) in photographs.CODECS.items():
        errors[name] = (photographs.through(y, form, options) - y).abs().mean().item()
    assert errors["PNG"] < 0.51 / 255 < 2 / 255 < errors["JPEG 95"] < errors["JPEG 75"]


def test_lossy_files_lose_little_where_the_level_is_found(monkeypatch):
    monkeypatch.setattr(photographs, "CODECS", {"PNG": photographs.CODECS["PNG"]})
    images = [(0.5 + 0.1 * normal(3, 64, 64, seed=i)).float() for i in range(2)]
    (row,) = photographs.codec_rows(White(0.1), images, [0.05], 0)
    known = 10 * math.log10(1 / 0.1**2 + 1 / 0.05**2)
    assert abs(row["found / true"] - 1) < 0.03 and abs(row["best PSNR dB"] - known) < 0.1
    assert 0 <= row["mean loss dB"] <= row["largest loss dB"] < 0.01


def test_grey_images_are_denoised_as_grey_and_beside_the_best_strength(monkeypatch):
    images = [(0.5 + 0.2 * normal(3, 32, 32, seed=i)).float() for i in range(2)]

    def scaled(y, sigma, strength):
        return 0.5 + strength * (y - 0.5)

    monkeypatch.setattr(photographs, "CLASSICAL", {scaled: (0.0, 0.5, 1.0)})
    (row,) = photographs.grey_rows(White(0.2), images, [S], 0)
    shares = {"network": 0.25, "as if in colour": 0.5}  # 0.2^2 / (0.2^2 + 3 S^2) and with S^2
    for name, share in shares.items():
        psnrs = []
        for i, x0 in enumerate(map(photographs.grey, images)):
            y = photographs.noisy(x0, S, i)
            psnrs.append(photographs.quality(scaled(y, S, share), x0))
        assert abs(row[f"{name}, PSNR dB"] - np.mean(psnrs)) < 1e-3
    tried = [-10 * math.log10((1 - k) ** 2 * 0.0179 + k**2 * S**2) for k in (0, 0.5, 1)]
    assert abs(row["scaled, PSNR dB"] - max(tried)) < 0.4
    assert abs(row["gain dB"] - (row["network, PSNR dB"] - row["scaled, PSNR dB"])) < 1e-9


def test_images_come_whole_or_as_their_middle(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(3 * 6 * 8 * 3, dtype=np.uint8).reshape(3, 6, 8, 3))
    whole = photographs.read(tmp_path, 2)
    assert len(whole) == 2 and whole[1].shape == (3, 6, 8)
    crops = benchmark.read_crops(tmp_path, 2, 4)
    assert crops[1].equal(whole[1][:, 1:5, 2:6])
    np.save(tmp_path / "b.npy", np.zeros((5, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="differ in size"):
        benchmark.read_crops(tmp_path, 9, 8)


# -----------------------------------------------------------------------------
# Tables and figures
# -----------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Return a function that runs a script with untrained networks on three small images."""
    networks = {"cnn3": ScoreModel("cnn3", 0.1, 0.1)}
    networks["unet"] = ScoreModel("unet", 0.005, 20.0, (8, 8), (1, 1), (0, 0))
    for name, model in networks.items():
        checkpoint = {"config": model.config, "weights": model.state_dict(), "info": {}}
        utils.save_checkpoint(tmp_path / f"{name}.pt", checkpoint)
    images = np.random.default_rng(0).integers(256, size=(40, 16, 16, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    monkeypatch.setattr(utils, "training_images", lambda source: images)

    def run(module, line):
        constants = vars(module)
        for name, value in utils.options(constants).items():
            monkeypatch.setattr(module, name.upper(), value)
        options = f"--input {tmp_path}/images.npy --count 3 --checkpoint {tmp_path}/unet.pt {line}"
        options = options.replace("TMP", str(tmp_path)) + f" --device cpu --figures {tmp_path}"
        utils.set_options(constants, options.split())
        module.main()
        return capsys.readouterr().out

    return run


def test_results_are_of_each_denoiser_and_langevin_runs_start_at_the_noisy_image(run, figures):
    out = run(benchmark, "--recipe TMP/cnn3.pt --study-count 2 --step-sizes 1e-3 1e-2 --steps 2")
    rows = re.findall(r"^\| (\S.*?) +\| +([\d.]+) ", out, re.MULTILINE)
    assert len(rows) == 9 and rows[0][0] == "noisy" and rows[-1][0] == "**U-Net, one step**"
    x0 = benchmark.crops()
    assert abs(float(rows[0][1]) - benchmark.mean_psnr(benchmark.noisy(x0, 0.1), x0)) < 0.01
    lines = figures["langevin"].axes[0].lines
    noisy = benchmark.mean_psnr(benchmark.noisy(x0, 0.1)[:2], x0[:2])
    for line in lines[:4]:
        assert abs(line.get_ydata()[0] - noisy) < 1e-4
    np.testing.assert_allclose(lines[0].get_xdata(), 1e-3 * np.arange(40))


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
        assert axes.get_xlim() == axes.get_ylim() and axes.get_box_aspect() == 1
    panels = figures["uncertainty"].axes
    assert len(panels) == 3 * 5 + 1  # the last is the colour bar
    error = panels[4].images[0].get_array()
    one_step = panels[1].images[0].get_array() / 255
    x0 = benchmark.crops()[0].permute(1, 2, 0).numpy()
    assert np.corrcoef(error.ravel(), ((one_step - x0) ** 2).mean(2).ravel() ** 0.5)[0, 1] > 0.9
    row = {title: image for title, image, _ in figures["components"][1]}
    along = row["+2 sd"] - row["-2 sd"]
    variance = 1 / (1 / ScoreModel.sigma_data**2 + 1 / 0.6**2)  # an untrained network is White
    assert abs(along.norm() / variance**0.5 - 4) < 0.01
    direction = row["direction"] - 0.5
    assert torch.corrcoef(torch.stack([along.flatten(), direction.flatten()]))[0, 1] > 0.999
    assert row["one step"].allclose((row["+1 sd"] + row["-1 sd"]) / 2, atol=1e-5)
    assert {note for _, _, note in figures["components"][1]} == {"", "direction 2"}


def test_times_are_printed_for_each_size(run, monkeypatch):
    monkeypatch.setattr(benchmark, "seconds_of", lambda device, function, *arguments: 1.5)
    out = run(benchmark, "--table speed --megapixels 0.01 0.02")
    assert out.count("1.50") == 5 and "1 of 0.02 megapixels" in out


def test_observations_have_a_labelled_row_of_the_figure_each(run, figures, monkeypatch):
    def restore(model, name, x0, A, y, *rest):
        return {"splitting": (0.9 * x0, 24), "one sample": (x0, 3)}

    monkeypatch.setattr(benchmark.observations, "restore", restore)
    out = run(benchmark, "--table observations --sigma-y 0.03")
    weak, strong = out.split("with noise of 0.1 instead of 0.03")
    for name in benchmark.observations.OBSERVATIONS:
        assert weak.count(f"| {name} ") == 2
        assert strong.count(f"| {name} ") == 2 * (name in benchmark.observations.TYPICAL)
    rows = figures["observations"]
    assert [row[0][2] for row in rows] == list(benchmark.observations.OBSERVATIONS)
    assert all(row[-1][1].equal(benchmark.crops()[0]) for row in rows)


def test_certification_prints_its_tables(run, monkeypatch):
    studied = []
    few = {"`adams`, 10": certify.SAMPLERS["`adams`, 10"]}
    monkeypatch.setattr(certify, "SAMPLERS", few)
    monkeypatch.setattr(certify.observations, "TYPICAL", ("half size",))
    monkeypatch.setattr(certify, "study_forgetting", lambda *rest: studied.append(rest[-1]))
    monkeypatch.setattr(certify, "study_nothing", lambda *rest: [{"images": len(rest[2])}])
    line = "--sigmas 0.1 0.2 --samples 3 --observed 2 --observed-steps 2 --nothing 1"
    out = run(certify, line)
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

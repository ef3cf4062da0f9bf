"""denoise.py as a user calls it: what it writes, what it prints, what it refuses.

The network of these tests predicts 0 (see conftest.py). So it is the exact denoiser of independent
pixels of variance 0.25^2 around 0.5: D = 0.5 + gain (y - 0.5), with error variance s^2 gain.
"""

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d

import denoise
import sde
import utils
from model import load_model

SCRIPT = Path(denoise.__file__)
LEVELS = sde.noise_levels(0.1, 0.01, 4)


def gain(sigma):
    return 0.25**2 / (0.25**2 + sigma**2)


def one_step(y, sigma=0.1):
    return 0.5 + gain(sigma) * (y - 0.5)


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).random(shape, np.float32)


def save(folder, **arrays):
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


def result(folder, name):
    return np.load(folder / "output" / f"{name}.npy")


def tensor(*arrays):  # (H, W, C) each -> (B, C, H, W)
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def table(out):
    """Return the table that was printed: a dictionary for each row."""
    lines = [line for line in out.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]


# -----------------------------------------------------------------------------
# The table, and every number in it
# -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photographs():
    """Return the first two of the built-in photographs, clean and with the noise of seed 0."""
    x0 = np.concatenate([image.pixels for image in utils.read_images("samples")][:2])
    return x0, x0 + 0.1 * np.random.default_rng(0).standard_normal(x0.shape)


def test_every_cell_of_the_table_is_what_it_says(tmp_path, run, bare, photographs):
    out, err = run("--count 2 --steps 3")  # two of the five photographs, together, two samples each
    rows = table(out)
    columns = "image, sigma, method, calls, PSNR dB, SSIM, expected PSNR"
    assert ", ".join(rows[0]) == columns and not err
    methods, names = ["noisy", "mmse", "sde", "mean of 2"], [*utils.SAMPLES[:2], "mean of 2"]
    kinds = [(row["image"], row["method"]) for row in rows]
    assert kinds == [(name, method) for name in names for method in methods]
    assert {row["sigma"] for row in rows} == {"0.1000"}
    assert [row["calls"] for row in rows] == 3 * ["0", "1", "3", "6"]
    expected = f"{-10 * np.log10(0.1**2 * gain(0.1)):.2f}"
    assert [row["expected PSNR"] for row in rows] == 3 * ["", expected, "", ""]

    (x0, y), found = photographs, {}
    for k, name in enumerate(names[:2]):
        saved = [tmp_path / "output" / f"{name}_{kind}.png" for kind in ("sde_1", "sde_2")]
        draws = [np.asarray(Image.open(path)) / 255 for path in saved]
        images = {"noisy": [y[k]], "mmse": [one_step(y[k])], "sde": draws}
        images["mean of 2"] = [sum(draws) / 2]
        for method, these in images.items():
            of = tensor(*(image.clip(0, 1) for image in these)), tensor(*[x0[k]] * len(these))
            found[name, method] = utils.psnr(*of).mean().item(), utils.ssim(*of).mean()
    for method in methods:
        found["mean of 2", method] = np.mean([found[name, method] for name in names[:2]], axis=0)
    for row in rows:
        psnr, ssim = found[row["image"], row["method"]]
        exact = row["method"] in ("noisy", "mmse")
        assert abs(float(row["PSNR dB"]) - psnr) < (0.006 if exact else 0.03)  # files are rounded
        assert abs(float(row["SSIM"]) - ssim) < (0.0006 if exact else 0.003)


def test_of_many_images_the_means_alone_are_shown():
    rows = []
    for k in range(40):
        for method in ("mmse", "sde"):
            rows.append({"image": str(k), "method": method, "PSNR dB": float(k)})
    means = denoise.summary(rows)
    assert [(row["image"], row["PSNR dB"]) for row in means] == 2 * [("mean of 40", 19.5)]
    assert denoise.summary(rows[:64])[:64] == rows[:64] and len(denoise.summary(rows[:64])) == 66
    assert denoise.summary(rows[:2]) == rows[:2]


METHODS = {  # network calls, and the sampler as one would call it oneself
    "mmse": (1, lambda model, y, noise: model(y, 0.1)),
    "sde": (4, functools.partial(sde.adams, levels=LEVELS)),
    "ode": (4, functools.partial(sde.adams, levels=LEVELS, eta=0.0)),
    "euler": (4, functools.partial(sde.reverse_sde, levels=LEVELS, sde=sde.VP())),
    "heun": (7, functools.partial(sde.probability_flow_ode, levels=LEVELS, sde=sde.VP())),
    "ancestral": (4, functools.partial(sde.ancestral, levels=LEVELS)),
    "pc": (7, functools.partial(sde.predictor_corrector, levels=LEVELS)),
    "annealed": (4, functools.partial(sde.annealed_langevin, levels=LEVELS)),
    "langevin": (3, functools.partial(sde.langevin, sigma=0.1, steps=3, step_size=2e-4)),
}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_is_its_sampler(method, tmp_path, run, bare, checkpoint):
    calls, sampler = METHODS[method]
    save(tmp_path, a=pixels(12, 14, 3))
    line = f"a.npy --sigma 0.1 --steps 4 --method {method} --sde vp --frames 0"
    out, _ = run(f"{line} --langevin-steps 3 --langevin-step-size 2e-4")
    y, model = tensor(pixels(12, 14, 3)), load_model(checkpoint)
    expected = sampler(model, y, noise=utils.seeded_noise(denoise.seeds_of(y, 0)))
    np.testing.assert_allclose(tensor(result(tmp_path, f"a_{method}")), expected, atol=1e-5)
    np.testing.assert_allclose(result(tmp_path, "a_mmse"), one_step(pixels(12, 14, 3)), atol=1e-6)
    assert {row["method"]: row["calls"] for row in table(out)}[method] == str(calls)


def test_a_method_has_its_levels_and_draws(monkeypatch):
    network, y = SimpleNamespace(sigma_min=0.01, sigma_max=1.0), torch.zeros(1, 3, 8, 8)
    expected = {"mmse": (1, 0), "sde": (20, 2), "ode": (20, 1), "euler": (100, 2), "heun": (20, 1)}
    expected |= {"ancestral": (100, 2), "pc": (50, 2), "annealed": (100, 2), "langevin": (1, 1)}
    for method, (count, draws) in expected.items():
        monkeypatch.setattr(denoise, "METHOD", method)
        _, levels, found = denoise.plan(network, y, None, 0.1, builtin=True)
        assert (len(levels), found) == (count, draws)
        assert (levels[0], levels[-1]) == (0.1, 0.01 if count > 1 else 0.1)
    monkeypatch.setattr(denoise, "METHOD", "sde")
    _, levels, draws = denoise.plan(network, y, abs, 0.01, builtin=False)  # of an observation
    torch.testing.assert_close(levels, torch.logspace(0, -2, 30, dtype=torch.float64))
    assert draws == 4
    network.sigma_max = 0.01
    with pytest.raises(ValueError, match="--method sde needs many noise levels.*only 0.01"):
        denoise.plan(network, y, None, 0.01, builtin=False)


def test_a_sample_depends_on_its_image_its_number_and_the_seed_alone(tmp_path, run, bare):
    first, second = pixels(12, 14, 3), pixels(12, 14, 3, seed=1)
    save(tmp_path, a=first, b=second, stack=np.stack([second, first]))
    line = "--sigma 0.1 --steps 3 --draws 2 --frames 0"
    run(f"a.npy b.npy stack.npy {line}")
    together = {name: result(tmp_path, name) for name in ("a_sde_1", "a_sde_2", "b_sde_1")}
    stack = result(tmp_path, "stack_sde_1")
    np.testing.assert_allclose(stack, [together["b_sde_1"], together["a_sde_1"]], atol=1e-5)
    run(f"a.npy {line}")
    for name in ("a_sde_1", "a_sde_2"):
        np.testing.assert_allclose(result(tmp_path, name), together[name], atol=1e-5)
    run(f"a.npy {line} --seed 1")
    for other in (together["a_sde_2"], result(tmp_path, "a_sde_1"), result(tmp_path, "a_sde_2")):
        assert np.abs(other - together["a_sde_1"]).mean() > 0.02


def test_a_batch_is_of_one_shape_and_kind_and_not_too_large(monkeypatch):
    kinds = [(8, 3, 1, False)] * 4 + [(8, 1, 1, False), (4, 3, 1, False), (4, 3, 2, False)]
    kinds += [(4, 3, 1, True), (4, 3, 1, True)]
    images = []
    for size, channels, count, builtin in kinds:
        images.append(utils.Image(np.zeros((count, size, 8, channels)), builtin=builtin))

    def grouped():
        numbers = {id(image): k for k, image in enumerate(images)}
        return [[numbers[id(x)] for x in batch] for batch in denoise.batches(images, pixels=3 * 64)]

    monkeypatch.setattr(denoise, "SIGMA", 0.1)
    assert grouped() == [[0, 1, 2], [3], [4], [5], [6], [7, 8]]
    monkeypatch.setattr(denoise, "SIGMA", None)  # each image has a level of its own
    assert grouped() == [[0], [1], [2], [3], [4], [5], [6], [7, 8]]


def test_a_grey_image_stays_grey_and_is_denoised_as_one(tmp_path, run, bare):
    grey = pixels(12, 14)
    save(tmp_path, a=grey, b=grey[..., None].repeat(3, 2))
    run("a.npy b.npy --sigma 0.1 --steps 2")
    found = result(tmp_path, "a_mmse")
    np.testing.assert_allclose(found, one_step(grey, 3**0.5 * 0.1), atol=1e-6)
    for kind in ("mmse", "sde"):
        one, three = result(tmp_path, f"a_{kind}"), result(tmp_path, f"b_{kind}")
        assert one.shape == (12, 14) and three.shape == (12, 14, 3)
        assert np.array_equal(three, one[..., None].repeat(3, 2))


# -----------------------------------------------------------------------------
# The noise level
# -----------------------------------------------------------------------------


def test_the_level_found_is_printed_and_used_unless_one_is_given(tmp_path, run, bare, monkeypatch):
    asked = []

    def image_level(network, y, low, high, black, white):
        asked.append((y.shape, low, high, black, white))
        return 0.2345, ["a note", "another"]

    monkeypatch.setattr(denoise, "image_level", image_level)
    save(tmp_path, a=pixels(12, 14, 3), b=pixels(10, 9))
    out, _ = run("a.npy b.npy --method mmse --white 2")
    first, second, *_ = out.splitlines()
    assert first.startswith("network: ") and first.endswith("net.pt")
    assert second == "a: noise level estimated at 0.2345, a note, another"
    low = 0.01 / 3**0.5  # the noise of a grey image counts three times
    assert asked == [((1, 3, 12, 14), 0.01, 1.0, 0, 2), ((1, 1, 10, 9), low, 1 / 3**0.5, 0, 2)]
    expected = 2 * one_step(pixels(12, 14, 3) / 2, 0.2345)
    np.testing.assert_allclose(result(tmp_path, "a_mmse"), expected, atol=1e-5)
    rows = table(out)
    assert list(rows[0]) == ["image", "sigma", "method", "calls", "expected PSNR"]  # no truth
    assert [(row["method"], row["sigma"]) for row in rows] == 2 * [("mmse", "0.2345")]
    out, _ = run("a.npy --method mmse --sigma 1/10")
    assert len(asked) == 2 and "estimated" not in out
    np.testing.assert_allclose(result(tmp_path, "a_mmse"), one_step(pixels(12, 14, 3)), atol=1e-6)


@pytest.mark.parametrize("method, channels", [("sde", 1), ("euler", 3), ("langevin", 3)])
def test_at_the_lowest_level_an_image_comes_back(method, channels, tmp_path, run, lowest):
    array = pixels(12, 14, channels) * 2 - 1
    save(tmp_path, a=array)
    out, _ = run(f"a.npy --method {method} --frames 0")
    for kind in {"mmse", method}:
        np.testing.assert_allclose(result(tmp_path, f"a_{kind}"), array, rtol=0, atol=1e-6)
    assert "expected PSNR" not in out and not list((tmp_path / "output").glob("*uncertainty*"))


def test_the_network_is_chosen_by_size(tmp_path, run, bare, checkpoint, monkeypatch):
    loaded = []
    model = load_model(checkpoint)
    monkeypatch.setattr(denoise, "load_model", lambda path, *rest: loaded.append(path) or model)
    save(tmp_path, a=pixels(64, 64, 3), b=pixels(4, 65, 3), c=pixels(65, 4, 3))
    run("a.npy b.npy c.npy --sigma 0.1 --method mmse --checkpoint auto")
    photographs, small = "checkpoints/score_photographs.pt", "checkpoints/score_cifar10.pt"
    assert loaded == [small, photographs]  # each once
    run("a.npy b.npy --sigma 0.1 --method mmse --checkpoint mine.pt")
    assert loaded[2:] == ["mine.pt"]


def test_the_uncertainty_of_white_images_is_their_posterior_deviation(tmp_path, run, bare):
    save(tmp_path, a=pixels(20, 30, 3))
    out, _ = run("a.npy --sigma 0.1 --method mmse")
    expected = 0.1 * gain(0.1) ** 0.5
    np.testing.assert_allclose(result(tmp_path, "a_uncertainty"), expected, rtol=1e-4)
    assert table(out)[0]["expected PSNR"] == f"{-20 * np.log10(expected):.2f}"
    shown = np.asarray(Image.open(tmp_path / "output" / "a_uncertainty.png"))
    assert shown.shape == (20, 30, 3) and np.all(shown >= 254)  # its largest value is white
    run("a.npy --enlarge 2 --method mmse")  # has none, so that of the former run must go
    assert not list((tmp_path / "output").glob("*uncertainty*"))


def test_frames_hold_every_state_and_estimate(tmp_path, run, bare, photographs):
    run("--count 1 --steps 4 --draws 2 --frames 1")  # of the first draw alone
    folder, (_, y) = tmp_path / "output" / "astronaut_sde_frames", photographs
    assert len(list(folder.iterdir())) == 8
    for k, sigma in enumerate(LEVELS.tolist()):
        state, estimate = (
            np.asarray(Image.open(folder / f"{k:03}_{kind}_{sigma:.4f}.png")) / 255
            for kind in ("state", "estimate")
        )
        inside = (state > 0) & (state < 1)
        assert np.abs(estimate - one_step(state, sigma))[inside].max() < 0.005
        assert k > 0 or np.abs(state - y[0].clip(0, 1)).max() < 0.003


def test_figure_and_animations_show_the_way_from_the_noisy_image(run, photographs, monkeypatch):
    (x0, y), figures, films = photographs, [], {}
    monkeypatch.setattr(utils, "plot_images", lambda *arguments: figures.append(arguments))
    monkeypatch.setattr(utils, "save_animation", lambda path, film: films.update({path.name: film}))
    run("--count 2 --steps 8 --frames 2")
    ((path, rows, truth),) = figures
    assert path == Path("output", "samples_sde.jpg") and truth and len(rows) == 2
    titles = ["noisy", "a state on the way", "mmse", "sde", "sde", "clean"]
    assert [title for title, _, _ in rows[1]] == titles
    noisy, state, estimate, first, second, clean = [x.permute(1, 2, 0) for _, x, _ in rows[1]]
    np.testing.assert_allclose(noisy, y[1], atol=1e-5)
    np.testing.assert_allclose(estimate, one_step(y[1]), atol=1e-5)
    np.testing.assert_allclose(clean, x0[1], atol=1e-6)
    assert (first - second).abs().mean() > 0.01
    film, levels = films["chelsea_sde.gif"], sde.noise_levels(0.1, 0.01, 8).tolist()
    assert [level for level, _, _ in film] == pytest.approx(levels)
    assert rows[1][1][2] == f"$\\sigma$ = {levels[2]:.2g}"
    for shown, filmed in ((noisy, film[0][1]), (state, film[2][1]), (first, film[-1][2])):
        torch.testing.assert_close(shown, filmed.permute(1, 2, 0))


def test_a_figure_of_images_without_truth_promises_no_psnr(tmp_path, run, monkeypatch):
    given = []
    monkeypatch.setattr(utils, "plot_images", lambda path, rows, truth: given.append((path, truth)))
    save(tmp_path, mine=pixels(12, 14, 3))
    run("samples mine.npy --count 6 --frames 6 --steps 2 --sigma 0.1")
    run(". --frames 1 --steps 2 --sigma 0.1")
    assert given[0][1] is False and given[1][0] == Path("output", f"{tmp_path.name[:45]}_sde.jpg")


# -----------------------------------------------------------------------------
# Observations
# -----------------------------------------------------------------------------

HIDDEN = (np.arange(8)[:, None] + np.arange(10)) % 2 == 0  # a chessboard


def seen(x, line):
    """Return what is seen of an image (H, W, 3), by other means than the script's."""
    if "enlarge" in line:
        return x.reshape(len(x) // 2, 2, x.shape[1] // 2, 2, 3).mean((1, 3))
    if "blur" in line:
        g = np.exp(-(np.arange(-2, 3) ** 2) / (2 * 0.5**2))
        padded = np.pad(x, ((2, 2), (2, 2), (0, 0)), mode="reflect")
        rows = sum(w * padded[k : len(x) + k] for k, w in enumerate(g / g.sum()))
        return sum(w * rows[:, k : x.shape[1] + k] for k, w in enumerate(g / g.sum()))
    return x * ~HIDDEN[..., None]


@pytest.mark.parametrize("line", ["--mask mask.npy", "--blur 0.5", "--enlarge 2"])
def test_an_observation_is_what_its_option_says(line, tmp_path, run, bare, monkeypatch):
    x, arguments = pixels(8, 10, 3), []
    monkeypatch.setattr(sde, "observed", lambda D, *given: arguments.append(given) or D)
    save(tmp_path, a=seen(x, line), mask=np.uint8(255 * HIDDEN))
    run(f"a.npy {line} --steps 2 --draws 1")
    ((y, A, sigma),) = arguments
    np.testing.assert_allclose(A(tensor(x)), tensor(seen(x, line)), atol=1e-5)
    np.testing.assert_allclose(y, tensor(seen(x, line)), atol=1e-6)
    assert sigma == 0.02


def test_of_an_observation_come_the_mean_the_samples_and_their_spread(tmp_path, run):
    x = 0.5 + pixels(4, 5, 4) / 10
    save(tmp_path, a=x)
    out, _ = run("a.npy --enlarge 2 --sigma 0.03 --draws 2 --steps 2 --frames 0")
    rows = table(out)
    assert [row["method"] for row in rows] == ["mean", "sde"] and rows[0]["sigma"] == "0.0300"
    assert "expected PSNR" not in rows[0]
    mean, *draws = [result(tmp_path, f"a_{kind}") for kind in ("mean", "sde_1", "sde_2")]
    for image in (mean, *draws):
        assert image.shape == (8, 10, 4)
        assert np.array_equal(image[..., 3], x[..., 3].repeat(2, 0).repeat(2, 1))  # alpha
        off = seen(image[..., :3], "enlarge") - x[..., :3]
        assert np.sqrt((off**2).mean()) < 2 * 0.03
    assert np.abs(draws[0] - draws[1]).mean() > 0.01
    spread = torch.from_numpy(np.var(draws, axis=0, ddof=1)).permute(2, 0, 1)[None, :3]
    spread = avg_pool2d(spread, 5, 1, 2, count_include_pad=False)[0].sqrt()
    found = result(tmp_path, "a_uncertainty")
    np.testing.assert_allclose(found, spread.permute(1, 2, 0), atol=1e-5)
    shown = np.asarray(Image.open(tmp_path / "output" / "a_uncertainty.png"))[..., 0] / 255
    expected = spread.square().mean(0).sqrt()
    np.testing.assert_allclose(shown, expected / expected.max(), atol=0.003)


def test_a_mask_says_how_much_it_hides(tmp_path, run, bare):
    save(tmp_path, a=pixels(8, 10, 3) / 2 + 0.25)
    grey = np.uint8(255 * HIDDEN)
    grey[0, :4] = (100, 127, 128, 200)
    Image.fromarray(grey).save(tmp_path / "mask.png")
    out, _ = run("a.npy --method mmse --mask mask.png")
    assert "mask: 5.00% of the pixels are neither black nor white: what is brighter" in out
    assert f"mask: {(grey > 127).mean():.0%} of the pixels are missing" in out
    hidden = np.isclose(result(tmp_path, "a_mean"), one_step(0, 0.02))
    assert np.array_equal(hidden.all(2), grey > 127)  # what is missing is 0, whatever the file has
    for word in ("1", "nan", "a.npy", "nowhere.png", ""):
        run(["a.npy", "--method", "mmse", "--mask", word], code=2)


def test_a_share_is_missing_in_all_channels(monkeypatch):
    found, said = [], []
    for seed in (0, 1):
        monkeypatch.setattr(denoise, "MASK", "0.3")
        monkeypatch.setattr(denoise, "SEED", seed)
        found.append(denoise.observation((200, 300), said.append)(torch.ones(1, 3, 200, 300)))
    assert abs(found[0].mean().item() - 0.7) < 4 * (0.21 / 60000) ** 0.5
    assert torch.equal(found[0][0, 0], found[0][0, 2]) and not torch.equal(*found)
    assert said == 2 * ["mask: 30% of the pixels are missing"]


def test_a_clean_image_is_observed_with_noise_and_measured(tmp_path, run, bare):
    out, _ = run("--count 1 --enlarge 3 --method mmse")
    rows = table(out)
    assert [row["method"] for row in rows] == ["observation", "mean"]
    assert all(row["sigma"] == "0.0200" and float(row["PSNR dB"]) > 10 for row in rows)
    size = Image.open(tmp_path / "output" / "astronaut_mean.png").size
    assert size == (126, 126)  # 42 x 3 are left of 128 pixels


# -----------------------------------------------------------------------------
# What is left out, what is refused, how it ends
# -----------------------------------------------------------------------------


def test_what_does_not_fit_is_left_out_and_named(tmp_path, run, bare):
    save(tmp_path, a=pixels(4, 4, 3), b=pixels(4, 4, 3, seed=1), c=pixels(30, 30, 3))
    line = "--blur 2 --sigma 0.02 --steps 2 --draws 1"
    out, _ = run(f"a.npy b.npy c.npy {line}", code=1)
    assert "left out a, b: --blur must be narrow in an image of 4 x 4 pixels" in out
    assert [row["image"] for row in table(out)] == ["c", "c"]
    _, err = run(f"a.npy b.npy {line}", code=2)
    assert err == "denoise.py: error: nothing was denoised of a.npy b.npy\n"
    out, _ = run("a.npy b.npy c.npy --sigma 0.1 --method mmse --count 2")
    assert "only the first 2 images were denoised" in out and len(table(out)) == 2


@pytest.mark.parametrize(
    "line, words",
    [
        ("--mask 0.5 --blur 1", "one of --mask, --blur and --enlarge at a time"),
        ("--mask other.npy", "--mask must have the 12 x 9 pixels of the image, not (8, 8)"),
        ("--mask 0", "--mask must hide some pixels, and not all"),
        ("--sigma 2", "noise level 2 is outside the range 0.01 to 1"),
        ("--method langevin --langevin-step-size 1e9 --langevin-steps 9", "diverged"),
    ],
)
def test_what_suits_no_image_is_said_of_each(line, words, tmp_path, run, bare):
    save(tmp_path, a=pixels(9, 12, 3), other=HIDDEN[:, :8] * np.uint8(255))
    out, err = run(f"a.npy {line}" + " --sigma 0.1" * ("sigma" not in line), code=2)
    assert words in out and "left out a: " in out and "nothing was denoised of a.npy" in err


@pytest.mark.parametrize(
    "line, words",
    [
        ("--blur -1", "--blur must be"),
        ("--checkpoint nowhere.pt", "no checkpoint at 'nowhere.pt'"),
        ("--sigma 0", "--sigma must be positive, for pixels in [0, 1], as 25/255, not 0"),
        ("--method magic", "--method must be one of mmse, sde, ode"),
        ("--sde ito", "--sde must be one of ve, vp, subvp, not ito"),
        ("--steps 2.5", "--steps must be a whole number from 1 on, not 2.5"),
        ("--device tpu", "device 'tpu' cannot be used"),
        ("--output=", "--output must name a folder"),
    ],
)
def test_a_wrong_value_is_one_line_before_any_work(line, words, tmp_path, run):
    save(tmp_path, a=pixels(9, 12, 3))
    out, err = run(f"a.npy {line}" + " --sigma 0.1" * ("sigma" not in line), code=2)
    assert not out and words in err and len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


def test_a_program_of_its_own_loads_only_what_it_needs_and_warns_of_nothing(tmp_path, checkpoint):
    save(tmp_path, a=pixels(9, 12, 3))
    program = f"import runpy, sys; runpy.run_path({str(SCRIPT)!r}, run_name='__main__'); "
    program += "print(*sys.modules)"
    line = f"a.npy --sigma 0.1 --method mmse --device cpu --checkpoint {checkpoint}".split()
    environment = os.environ | {"PYTHONWARNINGS": "error", "PYTHONPATH": str(SCRIPT.parent)}
    command = [sys.executable, "-c", program, *line]
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    process = subprocess.run(command, **options)
    assert process.returncode == 0 and not process.stderr, process.stderr
    loaded = process.stdout.splitlines()[-1].split()
    assert not {"matplotlib", "skimage", "torchvision", "OpenImageIO"} & set(loaded)


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C cannot be sent to one process there")
@pytest.mark.parametrize("script", ["denoise.py", "train_score.py"])
def test_ctrl_c_while_modules_load_ends_without_a_word(script, tmp_path):
    (tmp_path / "numpy.py").write_text("import time\nprint('now', flush=True)\ntime.sleep(60)")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, str(SCRIPT.with_name(script))]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)
    assert process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == -signal.SIGINT

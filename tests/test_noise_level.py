"""The noise level of an image, against closed forms in float64 and with the shipped network.

For a white Gaussian prior N(MU, C^2 I) the most likely level is s^2 = mean (y - MU)^2 - C^2. Where
the clean image is known, D = x0 whatever y, it is s^2 = mean (y - x0)^2.
"""

import math

import pytest
import torch
from gaussian import MU, normal, white
from skimage import data
from torchvision.transforms.functional import gaussian_blur

import denoise
import sde
from model import load_model

C = 0.3
white_denoiser = white(C)


def known(x0):
    return lambda x, sigma: x0 + 0 * x


def level_of(n, dim=None):
    return (n**2).mean(dim).sqrt()


@pytest.fixture(scope="module")
def network():
    return load_model("checkpoints/score_cifar10.pt")


def photograph(size, top=0, left=150):
    """Return a part of the astronaut, (1, 3, size, size): a face, cloth and a flag."""
    part = data.astronaut()[top : top + size, left : left + size]
    return torch.from_numpy(part / 255).permute(2, 0, 1)[None].float()


def test_the_estimate_is_the_most_likely_level():
    # The derivative of log p_s(y) is 0 at the exact root. Hutchinson's trace has a variance of
    # 2 sum_offdiagonal (I - J)^2 / probes; over the slope of the equation, an error of log s.
    basis = torch.linalg.qr(normal(48, 48))[0]
    eigenvalues = 0.1 * 0.8 ** torch.arange(48, dtype=torch.float64)

    def denoiser(x, s):
        gain = eigenvalues / (eigenvalues + s.view(-1, 1) ** 2)
        return MU + ((x - MU).flatten(1) @ basis * gain @ basis.T).view_as(x)

    for seed, level in enumerate((0.02, 0.05, 0.2)):
        z = (eigenvalues + level**2).sqrt() * normal(48, seed=seed)
        y = MU + (basis @ z).view(1, 3, 4, 4)
        low, high = 1e-3, 1.0
        for _ in range(60):  # the exact root, by halving
            s = math.sqrt(low * high)
            v = eigenvalues + s**2
            rises = ((z**2 / v - 1) / v).sum() > 0
            low, high = (s, high) if rises else (low, s)
        found = sde.estimate_sigma(denoiser, y, 1e-3, 1.0, probes=300, tolerance=1e-6).item()
        rest = basis * (s**2 / v) @ basis.T
        off_diagonal = (rest**2).sum() - (rest.diag() ** 2).sum()
        error = math.sqrt(2 * off_diagonal / 300) / (2 * (s**2 / v) ** 2).sum().item()
        assert abs(math.log(found / s)) < 4 * error


def steep(y, roots, powers):
    """Return a denoiser with residuals s (root / s)^power: from power 2 on, scoring overshoots."""
    return lambda x, s: y - (s * (roots / s) ** powers).view(-1, 1, 1, 1)


@pytest.mark.parametrize("power", [0.5, 10.0])
def test_the_bracket_finds_any_root(power):
    roots, y = torch.logspace(-2.9, -0.1, 9, dtype=torch.float64), normal(9, 3, 4, 4)
    found = sde.estimate_sigma(steep(y, roots, power), y, 0.001, 1.0, 1, False, 40, 1e-6)
    torch.testing.assert_close(found, roots, rtol=1e-5, atol=0)


def test_a_level_outside_the_range_becomes_its_end():
    scale = torch.tensor([1e-4, 30.0], dtype=torch.float64).view(-1, 1, 1, 1)
    y = 0.5 + scale * normal(2, 3, 8, 8)
    found = sde.estimate_sigma(known(torch.full_like(y, 0.5)), y, 0.01, 2.0)
    assert found.tolist() == [0.01, 2.0]
    with pytest.raises(ValueError, match="0.3, 0.2"):
        sde.estimate_sigma(white_denoiser, y, 0.3, 0.2)


def test_an_estimate_depends_on_its_image_alone():
    # They take 2 to 10 iterations: the first must stay where they are while the others go on.
    y, roots = 0.1 * normal(6, 3, 8, 8), torch.logspace(-2, -0.3, 6, dtype=torch.float64)
    powers = torch.tensor([1.0, 1.5, 0.5, 1.0, 0.6, 1.2], dtype=torch.float64)
    together = sde.estimate_sigma(steep(y, roots, powers), y, 0.001, 1.0)
    torch.testing.assert_close(together, roots, rtol=1e-2, atol=0)
    for k in range(6):
        one = slice(k, k + 1)
        alone = sde.estimate_sigma(steep(y[one], roots[one], powers[one]), y[one], 0.001, 1.0)
        torch.testing.assert_close(alone, together[one], rtol=1e-12, atol=0)


def test_a_search_from_the_lower_end_is_over_at_once_where_the_level_is_below():
    x0, calls = 0.5 + 0.3 * normal(1, 3, 16, 16), []  # its differences look like noise of 0.3
    y = x0 + 0.01 * normal(1, 3, 16, 16, seed=1)

    def counted(x, s):
        calls.append(s)
        return known(x0)(x, s)

    for start, most in ((0.05, 2), (None, 4)):
        calls.clear()
        assert sde.estimate_sigma(counted, y, 0.05, 1.0, 1, start=start).item() == 0.05
        assert len(calls) == most
    found = sde.estimate_sigma(known(x0), y, 0.001, 1.0, start=0.001)
    torch.testing.assert_close(found[0], level_of(y - x0), rtol=5e-3, atol=0)


def test_tiles_of_one_image_share_their_level():
    y = MU + torch.tensor([0.4, 0.5, 0.6, 0.7]).view(-1, 1, 1, 1) * normal(4, 3, 8, 8)
    found = sde.estimate_sigma(white_denoiser, y, 0.001, 2.0, together=True)
    torch.testing.assert_close(found, (level_of(y - MU) ** 2 - C**2).sqrt().expand(4))


@pytest.mark.parametrize("hot", [0.9, 10.0, -1e6])
def test_a_hot_pixel_is_left_out(hot):
    y = 0.5 + 0.05 * normal(1, 3, 16, 16)
    n = (y - 0.5).flatten()[1:]
    y[0, 0, 0, 0] = hot
    found = sde.estimate_sigma(known(torch.full_like(y, 0.5)), y, 0.001, 1.0, tolerance=1e-9)
    torch.testing.assert_close(found[0], level_of(n))


def test_a_hot_pixel_does_not_disturb_the_network(network):
    y = photograph(32) + 0.05 * normal(1, 3, 32, 32).float()
    plain = sde.estimate_sigma(network, y, 0.005, 1.0)
    y[:, :, 12, 20] = 100.0
    assert abs(sde.estimate_sigma(network, y, 0.005, 1.0) / plain - 1) < 0.05


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.2])
def test_clipping_does_not_lower_the_level(sigma):
    # A value 1.5 sigma from an end has lost 11 % of its variance. Those kept have lost 5 % on
    # average at sigma 0.2, which is 2.5 % of sigma. Without the rule it is 2 to 9 %.
    x0 = torch.linspace(0, 1, 64, dtype=torch.float64).expand(1, 3, 64, 64)
    y = ((x0 + sigma * normal(1, 3, 64, 64)).clamp(0, 1) * 255).round() / 255
    found = sde.estimate_sigma(known(x0), y, 0.001, 2.0).item()
    kept = 0.4 * y.numel()
    assert abs(found / sigma - 1) < 0.025 + 4 / math.sqrt(2 * kept)
    assert level_of(y - x0) < 0.98 * sigma


def test_all_values_count_where_none_is_clipped():
    x0 = torch.linspace(0, 1, 64, dtype=torch.float64).expand(1, 3, 64, 64)
    y = x0 + 0.1 * normal(1, 3, 64, 64)
    found = sde.estimate_sigma(known(x0), y, 0.001, 2.0, tolerance=1e-9)
    torch.testing.assert_close(found[0], level_of(y - x0))


def test_an_image_that_is_clipped_everywhere_has_no_noise():
    y = (-0.5 + 0.01 * normal(1, 3, 8, 8)).clamp(0, 1)
    assert sde.estimate_sigma(known(torch.zeros_like(y)), y, 0.005, 1.0).item() == 0.005


def flat(x, sigma):
    """The denoiser of images that are 0.5 everywhere: all else is noise."""
    return 0.5 + 0 * x


def test_white_noise_has_its_level_and_no_note():
    n = 0.1 * normal(1, 3, 100, 100)
    sigma, notes = denoise.image_level(flat, 0.5 + n, 0.01, 1.0)
    assert sigma == pytest.approx(level_of(n).item(), rel=0.02) and notes == []


def test_noise_of_brightness_alone_is_that_of_a_lossy_file():
    # White noise of level s leaves s / sqrt(3) in the mean of the channels; here it is all there.
    n = 0.1 * normal(1, 1, 96, 96).expand(-1, 3, -1, -1)
    sigma, notes = denoise.image_level(flat, 0.5 + n, 0.01, 1.0)
    assert sigma == pytest.approx(math.sqrt(3) * level_of(n).item(), rel=1e-3)
    assert notes == [denoise._LOSSY[0][2]]


@pytest.mark.parametrize("channels", [1, 3])
def test_noise_that_is_white_at_half_the_size_is_judged_there(channels):
    n = 0.05 * normal(1, channels, 96, 96)
    blocks = n.repeat_interleave(2, 2).repeat_interleave(2, 3)
    sigma, notes = denoise.image_level(flat, 0.5 + blocks, 0.01, 1.0)
    exact = 2 * math.sqrt(channels) * level_of(n.mean(1)).item()
    assert sigma == pytest.approx(exact, rel=1e-3) and notes == [denoise._LOSSY[1][2]]


def test_texture_is_not_taken_for_noise():
    # Blocks of 4 x 4 pixels have the same mean at full, half and quarter size: 4 times the level.
    blocks = 0.02 * normal(1, 3, 48, 48).repeat_interleave(4, 2).repeat_interleave(4, 3)
    sigma, notes = denoise.image_level(flat, 0.5 + blocks, 0.01, 1.0)
    half = 2 * math.sqrt(3) * level_of(blocks.mean(1)).item()
    assert sigma == pytest.approx(level_of(blocks).item(), rel=0.05)
    assert notes == [f"{denoise._CORRELATED} {half:.2g}"]


@pytest.mark.parametrize(
    "scale, low, high, words",
    [
        (0.05, 0.06, 1.0, "above 6.0% of white"),
        (0.12, 0.01, 0.1, "as high as is searched"),
        (0.4, 0.01, 1.0, "% of the values are clipped"),
        (0.8, 0.01, 1.0, "% of the values are clipped: give --sigma"),
        (0.05, 0.1, 0.1, "the only level"),
    ],
)
def test_the_owner_is_told_what_is_uncertain(scale, low, high, words):
    y = (0.5 + scale * normal(1, 3, 48, 48)).clamp(0, 1)
    sigma, notes = denoise.image_level(flat, y, low, high)
    assert low <= sigma <= high and (sigma == low) == (scale < low)
    share = ((y == 0) | (y == 1)).double().mean().item()
    words = f"{share:.0%}{words[1:]}" if words.startswith("%") else words
    assert len(notes) == 1 and words in notes[0]
    assert ("give --sigma" in notes[0]) == (share > 0.3 or sigma == high > low)


def test_outliers_are_counted():
    y = 0.5 + 0.05 * normal(1, 3, 32, 32)
    y[0, 1, 5, [7, 30]] = 60.0
    notes = denoise.image_level(flat, y, 0.01, 1.0)[1]
    assert notes == ["0.065% of the values are outliers and left out"]


@pytest.mark.parametrize("white, end", [(1, "0.011"), (65535, "720.9")])
def test_a_small_part_of_the_range_is_told(white, end):
    y = 0.011 * torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
    sigma, notes = denoise.image_level(known(0), y, 0.05, 1.0, 0, white)
    assert sigma == 0.05
    assert notes[1] == f"the values use only 1.1% of the range: give --black 0 --white {end}"
    assert len(denoise.image_level(known(0), 50 * y, 0.5, 0.7)[1]) == 1


def test_a_photograph_is_judged_by_up_to_nine_tiles_of_it():
    y = torch.arange(200.0 * 70).view(1, 1, 200, 70)
    tiles = denoise.spread_tiles(y)
    assert tiles.shape == (9, 1, 32, 32)
    assert torch.equal(tiles[0], y[0, :, :32, :32]) and torch.equal(tiles[8], y[0, :, 168:, 38:])
    assert torch.equal(tiles[3], y[0, :, 84:116, :32])
    assert torch.equal(denoise.spread_tiles(y[..., :30, :20]), y[..., :30, :20])
    assert len(denoise.spread_tiles(torch.zeros(2, 3, 200, 200))) == 9


@pytest.mark.parametrize("kind", ["white", "correlated"])
def test_the_network_tells_white_noise_from_correlated(network, kind):
    n = normal(1, 3, 64, 64, seed=1).float()
    n = gaussian_blur(n, 7, 0.7) if kind == "correlated" else n
    n = 0.1 * n / n.std()
    sigma, notes = denoise.image_level(network, photograph(64) + n, 0.005, 1.0)
    if kind == "white":
        assert notes == [] and abs(sigma / 0.1 - 1) < 0.04
    else:
        assert notes[0].startswith(denoise._CORRELATED)

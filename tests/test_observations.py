"""Observations y = A(x0) + sigma_y n against Gaussian priors, whose posteriors are known.

For x0 ~ N(MU, K) all is affine. What is found is compared with dense linear algebra, in float64.
"""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from gaussian import MU, Gaussian, normal, stream
from scipy.fft import dctn

import sde

SIGMA_Y, SIZE = 0.02, 8
KEPT = torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(1)) < 0.5


def mask(x):
    return KEPT * x


def blur(x):
    kernel = torch.tensor([0.25, 0.5, 0.25]).to(x)
    weight = (kernel[:, None] * kernel).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), weight, groups=x.shape[1])


def shrink(x):  # affine
    return F.avg_pool2d(x, 2) - 0.1


def means(x):  # no image: (B, C)
    return x.mean((2, 3))


everywhere = pytest.mark.parametrize("A", [mask, blur, shrink])
exactly = {"resolution": 0, "tolerance": 1e-6, "iterations": 60}


def natural(channels):
    """Return the prior of `natural_power`: independent cosines of these variances."""
    power = sde.natural_power(normal(1, channels, SIZE, SIZE))
    units = torch.eye(power.numel(), dtype=torch.float64).view(-1, *power.shape)
    cosines = torch.from_numpy(dctn(units.numpy(), axes=(1, 2, 3), norm="ortho")).flatten(1)
    return Gaussian(cosines * power.flatten() @ cosines.T)


def uneven():
    """Return the natural prior with a contrast of 0.5 to 1.5 over the image."""
    wave = (torch.arange(SIZE, dtype=torch.float64) * math.pi / SIZE).cos()
    contrast = (1 + wave[:, None] * wave / 2).expand(3, SIZE, SIZE).flatten()
    return Gaussian(contrast[:, None] * NATURAL.K * contrast)


NATURAL = natural(3)
UNEVEN = uneven()


def problem(A, s, prior=NATURAL):
    """Return x0, x = x0 + s n, and y, for 4 images."""
    x0 = MU + (normal(4, 3 * SIZE**2) @ torch.linalg.cholesky(prior.K).T).view(4, 3, SIZE, SIZE)
    y = A(x0)
    noise = torch.where(y == 0, 0, normal(*y.shape, seed=1))  # a masked pixel has none
    return x0, x0 + s * normal(*x0.shape, seed=5), y + SIGMA_Y * noise


def change(D, V, y, A, sigma_y=SIGMA_Y):
    """Return E[x0 | y] - D for x0 ~ N(D, V)."""
    units = torch.eye(len(V), dtype=torch.float64).view(-1, *D.shape[1:])
    H = (A(units) - A(0 * units)).flatten(1).T
    M = H @ V @ H.T + sigma_y**2 * torch.eye(len(H), dtype=torch.float64)
    return (torch.linalg.solve(M, (y - A(D)).flatten(1).T).T @ H @ V).view_as(D)


def relative_error(found, D, exact):
    return ((found - D - exact).norm() / exact.norm()).item()


def test_the_prior_has_the_spectrum_of_cifar_10():
    # The geometric means of the powers of its training images' cosines: all, and the high ones.
    power = sde.natural_power(normal(1, 3, 32, 32))
    for low, measured, within in (
        (0, [8.68e-3, 2.45e-4, 8.84e-5], 0.05),
        (16, [1.02e-3, 2.01e-5, 9.17e-6], 0.25),
    ):
        found = power[:, low:, low:].log().mean((1, 2)).exp()
        torch.testing.assert_close(found, torch.tensor(measured).double(), rtol=within, atol=0)


@pytest.mark.parametrize("size", [32, 256])
def test_the_prior_has_the_law_of_photographs_at_any_size(size):
    # 1 / f^2, softened below the first cosine. Of grey images it is that of the channel mean: the
    # first cosine over three channels is sqrt(3) times their mean.
    colour, grey = (sde.natural_power(normal(1, channels, size, size)) for channels in (3, 1))
    assert colour[0, 0, 2] / colour[0, 0, 4] == pytest.approx(4, rel=0.06)
    assert colour[0, 0, 0] / colour[0, 0, 1] == pytest.approx(4.6, rel=0.02)
    torch.testing.assert_close(grey[0], colour[0] / 3)


@pytest.mark.parametrize("A", [mask, blur, shrink, means])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_fill_is_the_posterior_mean_of_its_prior(A, channels):
    middle = torch.full((2, channels, SIZE, SIZE), 0.5, dtype=torch.float64)
    y = A(MU + 0.2 * normal(*middle.shape))
    exact = change(middle, natural(channels).K, y, A)
    assert relative_error(sde.fill(y, A, SIGMA_Y, middle), middle, exact) < 0.01


@pytest.mark.parametrize("side", [12, 60])
def test_the_fill_of_a_hole_goes_on_what_is_around_it(side):
    # The prior's mean, 0.5, is far away. A noise of 0.02 is averaged over the rim.
    kept = torch.ones(100, 100)
    kept[20 : 20 + side, 30 : 30 + side] = 0
    x0 = torch.tensor([0.05, 0.1, 0.9]).view(1, 3, 1, 1).expand(1, 3, 100, 100)
    y = kept * (x0 + 0.02 * normal(*x0.shape).float())
    error = sde.fill(y, lambda x: kept * x, 0.02, x0) - x0
    assert error[..., kept == 0].square().mean().sqrt() < 0.02


def test_the_fill_of_a_large_smooth_image_is_below_the_noise():
    # Interpolation between many noisy pixels, a tenth of all, averages their noise of 0.02.
    wave = torch.linspace(0, 3, 250).sin()
    x0 = (0.3 + 0.4 * wave[:, None] * wave).expand(1, 3, 250, 250)
    rng = torch.Generator().manual_seed(0)
    kept = torch.rand(250, 250, generator=rng) > 0.9
    y = kept * (x0 + 0.02 * torch.randn(x0.shape, generator=rng))
    error = (sde.fill(y, lambda x: kept * x, 0.02, x0) - x0).square().mean().sqrt()
    assert error < 0.015


@everywhere
@pytest.mark.parametrize("s, prior", [(0.01, UNEVEN), (0.1, NATURAL), (1.0, UNEVEN), (20, NATURAL)])
def test_the_posterior_denoiser_is_the_closed_form(A, s, prior):
    _, x, y = problem(A, s, prior)
    D = prior(x, s)
    found = sde.observed(prior, y, A, SIGMA_Y, **exactly)(x, s)
    assert relative_error(found, D, change(D, prior.covariance(s)[0], y, A)) < 1e-4


@everywhere
def test_what_a_jacobian_does_not_resolve_does_no_harm(A):
    # The network's eigenvalues are off by -1e-3 at s = 1, where many true ones are smaller.
    _, x, y = problem(A, 1.0)
    D = NATURAL(x, 1.0)
    exact = change(D, NATURAL.covariance(1.0)[0], y, A)

    def wrong(x, s):
        return NATURAL(x, s) - 1e-3 * (x - MU)

    solve = functools.partial(sde.observed, wrong, y, A, SIGMA_Y, tolerance=1e-5)
    errors = [relative_error(solve(resolution=r)(x, 1.0), D, exact) for r in (0.03, 0.0)]
    assert errors[0] < 0.01 and errors[0] < errors[1] / 5


def test_another_observation_is_linearised_at_the_denoised_image():
    def curved(x):
        return (2 * x).exp()

    def tangent(x):
        return 2 * curved(D) * (x - D) + curved(D)

    _, x, y = problem(curved, 0.1)
    D = NATURAL(x, 0.1)
    found = [sde.observed(NATURAL, y, A, SIGMA_Y)(x, 0.1) for A in (curved, tangent)]
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)


def test_each_image_is_solved_as_if_alone():
    s = torch.tensor([0.05, 0.2, 0.5, 1.0], dtype=torch.float64)
    _, x, y = problem(shrink, s[:, None, None, None])
    together = sde.observed(NATURAL, y, shrink, SIGMA_Y)(x, s)
    for i in range(4):
        one = slice(i, i + 1)
        alone = sde.observed(NATURAL, y[one], shrink, SIGMA_Y)(x[one], s[i].item())
        torch.testing.assert_close(alone, together[one], rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_may_be_switched_off(mode):
    _, x, y = problem(blur, 0.1)
    expected = sde.observed(NATURAL, y, blur, SIGMA_Y)(x, 0.1)
    with mode():
        found = sde.observed(NATURAL, y.clone(), blur, SIGMA_Y)(x.clone(), 0.1)
    torch.testing.assert_close(found, expected)


def test_an_impossible_observation_is_refused():
    _, x, y = problem(blur, 0.1)
    with pytest.raises(ValueError, match="noise level 0.1 .* units"):
        sde.observed(NATURAL, 255 * y, blur, SIGMA_Y)(x, 0.1)
    with pytest.raises(ValueError, match="not nan"):
        sde.observed(NATURAL, y, blur, SIGMA_Y)(math.nan * x, 0.1)
    with pytest.raises(ValueError, match="not 0"):
        sde.observed(NATURAL, y, blur, 0)


@everywhere
@pytest.mark.parametrize("sigma_y", [0.02, 0.2])
def test_the_posterior_mean_is_that_of_a_gaussian_prior_in_24_calls(A, sigma_y):
    # The fill has another prior, by up to a factor of 3 in contrast, and its mean is 0.5. The
    # factors that make up for a network's errors add some here.
    x0, _, _ = problem(A, 0, UNEVEN)
    y = A(x0)
    exact = change(torch.full_like(x0, MU), UNEVEN.K, y, A, sigma_y)
    images, levels = [], []

    def denoiser(x, s):
        images.append(len(x))
        levels.append(float(s))
        return UNEVEN(x, s)

    with torch.inference_mode():
        found = sde.posterior_mean(denoiser, y, A, sigma_y, x0, noise=stream(0))
    errors = [relative_error(v, MU, exact) for v in (found, sde.fill(y, A, sigma_y, x0))]
    assert errors[0] < 0.06 and errors[0] < 0.6 * errors[1]
    assert sum(images) == 24 * len(x0) and not found.requires_grad
    assert levels[0] == (2.0 if A is mask else 0.5)

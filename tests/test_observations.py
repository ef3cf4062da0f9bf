"""Observations y = A(x0) + sigma_y n against Gaussian priors, whose posteriors are known.

For x0 ~ N(MU, C) all is affine: the denoiser given x and y, and what a sampler makes of its noise.
Matrices come from the code's own functions, applied to the identity; what they are compared with is
dense linear algebra, in float64.
"""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from scipy import fft

import sde

MU, SIGMA_Y, SIZE = 0.4, 0.02, 8
KEPT = torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(1)) < 0.5


def mask(x):
    return KEPT[: x.shape[2], : x.shape[3]].to(x) * x


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


def normal(count=4, channels=3, size=SIZE, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, size, size, dtype=torch.float64, generator=rng)


def matrix(linear, size=SIZE, channels=3):
    """Return the matrix of a function of images (B, channels, size, size), affine in each."""
    one = torch.eye(channels * size**2, dtype=torch.float64).view(-1, channels, size, size)
    return (linear(one) - linear(torch.zeros_like(one))).flatten(1).T


@functools.cache
def covariance(kind="natural", size=SIZE, channels=3):
    """Return C: of natural_power, or "uneven": with a contrast of 0.5 to 1.5 over the image."""
    power = sde.natural_power(normal(1, channels, size))
    C = matrix(functools.partial(sde._filter, gain=power), size, channels)
    if kind == "uneven":
        wave = (torch.arange(size, dtype=torch.float64) * math.pi / size).cos()
        contrast = (1 + wave[:, None] * wave / 2).expand(channels, size, size).flatten()
        C = contrast[:, None] * C * contrast
    return C


def gaussian_denoiser(x, s, C=None, error=0.0):
    """E[x0 | x] for x0 ~ N(MU, C), s a float; `error` is added to the Jacobian's eigenvalues."""
    C = covariance() if C is None else C
    eye = torch.eye(len(C), dtype=torch.float64)
    gain = torch.linalg.solve(C + s**2 * eye, C) + error * eye
    return MU + ((x - MU).flatten(1) @ gain).view_as(x)


def image_and_observation(A, s, C=None):
    """Return x0, x = x0 + s n, and y."""
    C = covariance() if C is None else C
    x0 = MU + (normal().flatten(1) @ torch.linalg.cholesky(C).T).view(-1, 3, SIZE, SIZE)
    y = A(x0)
    noise = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    noise = torch.where(y == 0, 0, noise)  # a masked pixel has none
    return x0, x0 + s * normal(seed=5), y + SIGMA_Y * noise


def gain_of(V, A, size=SIZE, channels=3):
    """Return V A^T (sigma_y^2 + A V A^T)^-1, and A as a matrix."""
    H = matrix(A, size, channels)
    M = SIGMA_Y**2 * torch.eye(len(H), dtype=torch.float64) + H @ V @ H.T
    return torch.linalg.solve(M, H @ V).T, H


def closed_form(A, y, x, s, C=None):
    """Return E[x0 | x] and the change that y makes to it, by dense linear algebra."""
    C = covariance() if C is None else C
    D = gaussian_denoiser(x, s, C)
    V = C - C @ torch.linalg.solve(C + s**2 * torch.eye(len(C), dtype=torch.float64), C)
    return D, ((y - A(D)).flatten(1) @ gain_of(V, A)[0].T).view_as(x)


def relative_error(found, D, change):
    return ((found - D - change).norm() / change.norm()).item()


# -----------------------------------------------------------------------------
# The Gaussian prior
# -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 3, 6, 7), (2, 1, 5, 8)])
def test_a_filter_multiplies_the_discrete_cosines(shape):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gain = torch.rand(shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cosines, filtered = (
        torch.from_numpy(fft.dctn(v.numpy(), axes=(1, 2, 3), norm="ortho"))
        for v in (x, sde._filter(x, gain))
    )
    torch.testing.assert_close(filtered, gain * cosines)


@pytest.mark.parametrize("size", [8, 32, 256])
def test_natural_images_have_a_pixel_variance_like_photographs(size):
    variance = sde.natural_power(normal(1, 3, size)).sum().item() / (3 * size**2)
    assert 0.05 < variance < 0.15  # CIFAR-10's around middle grey: 0.064; it grows slowly with size


def test_the_prior_of_grey_images_is_that_of_the_channel_mean():
    # The first cosine over three channels is their sum over sqrt(3): sqrt(3) times their mean.
    grey, colour = (sde.natural_power(normal(1, channels)) for channels in (1, 3))
    torch.testing.assert_close(grey[0], colour[0] / 3)


@pytest.mark.parametrize("A", [mask, blur, shrink, means])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_fill_is_the_posterior_mean_of_its_prior(A, channels):
    like = normal(2, channels)
    y = A(MU + 0.2 * normal(2, channels, seed=3))
    middle = torch.full_like(like, 0.5)
    gain, _ = gain_of(covariance(channels=channels), A, channels=channels)
    exact = 0.5 + ((y - A(middle)).flatten(1) @ gain.T).view_as(like)
    assert relative_error(sde.fill(y, A, SIGMA_Y, like), 0.5, exact - 0.5) < 0.01


# -----------------------------------------------------------------------------
# The posterior denoiser
# -----------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize(
    "s, kind", [(0.01, "uneven"), (0.1, "natural"), (1.0, "uneven"), (20.0, "natural")]
)
def test_the_posterior_denoiser_is_the_closed_form(A, s, kind):
    C = covariance(kind)
    _, x, y = image_and_observation(A, s, C)
    denoiser = functools.partial(gaussian_denoiser, C=C)
    found = sde.observed(denoiser, y, A, SIGMA_Y, **exactly)(x, s)
    assert relative_error(found, *closed_form(A, y, x, s, C)) < 1e-4


@pytest.mark.parametrize("s", [0.05, 0.5, 20.0])
def test_a_second_noisy_image_is_averaged_with_the_first(s):
    # x and y are then one image, weighted by 1 / s^2 and 1 / sigma_y^2, whose level has the sum.
    _, x, y = image_and_observation(lambda x: x, s)
    of_x, of_y = s**-2, SIGMA_Y**-2
    both = (of_x * x + of_y * y) / (of_x + of_y)
    expected = gaussian_denoiser(both, (of_x + of_y) ** -0.5)
    found = sde.observed(gaussian_denoiser, y, lambda x: x, SIGMA_Y, **exactly)(x, s)
    D = gaussian_denoiser(x, s)
    assert relative_error(found, D, expected - D) < 1e-4


@everywhere
@pytest.mark.parametrize("s", [0.1, 1.0])
def test_each_iteration_takes_most_of_the_error_away(A, s):
    # The preconditioner is the equation's own under this prior, solved to 0.1, or in 20 steps.
    _, x, y = image_and_observation(A, s)
    D, change = closed_form(A, y, x, s)

    solve = functools.partial(sde.observed, gaussian_denoiser, y, A, SIGMA_Y, tolerance=0)
    errors = [relative_error(solve(iterations=k)(x, s), D, change) for k in (1, 2, 3)]
    assert errors[1] < 0.4 * errors[0] and errors[2] < 0.4 * errors[1]


@pytest.mark.parametrize("s", [0.2, 1.0])
def test_no_single_variance_stands_for_the_covariance(s):
    # Score-based Data Assimilation: D + V A^T (y - A D) / (sigma_y^2 + gamma s^2), gamma the best.
    _, x, y = image_and_observation(mask, s)
    D, change = closed_form(mask, y, x, s)
    _, multiply = sde.posterior_covariance(gaussian_denoiser, x, s)
    V = multiply(mask(y - mask(D)))  # a mask is its own transpose
    gammas = torch.logspace(-4, 1, 60).tolist()
    errors = [relative_error(D + V / (SIGMA_Y**2 + g * s**2), D, change) for g in gammas]
    assert min(errors) > 0.2


def test_another_observation_is_linearised_at_the_denoised_image():
    def curved(x):
        return (2 * x).exp()

    def tangent(x):
        return 2 * curved(D) * (x - D) + curved(D)

    x0, x, _ = image_and_observation(lambda x: x, 0.1)
    D = gaussian_denoiser(x, 0.1)
    found = [
        sde.observed(gaussian_denoiser, curved(x0), A, SIGMA_Y, **exactly)(x, 0.1)
        for A in (curved, tangent)
    ]
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)


def test_each_image_is_solved_as_if_alone():
    def each(x, s):
        denoised = [gaussian_denoiser(one[None], level.item()) for one, level in zip(x, s)]
        return torch.cat(denoised)

    levels = torch.tensor([0.05, 0.2, 0.5, 1.0], dtype=torch.float64)
    _, x, y = image_and_observation(shrink, levels[:, None, None, None])
    with torch.no_grad():
        together = sde.observed(each, y, shrink, SIGMA_Y)(x, levels)
    assert not together.requires_grad
    for i, s in enumerate(levels.tolist()):
        alone = sde.observed(gaussian_denoiser, y[i : i + 1], shrink, SIGMA_Y)(x[i : i + 1], s)
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=1e-12)


@everywhere
def test_what_a_jacobian_does_not_resolve_does_no_harm(A):
    # The network's eigenvalues are off by -1e-3 at s = 1, where many true ones are smaller.
    _, x, y = image_and_observation(A, 1.0)
    D, change = closed_form(A, y, x, 1.0)
    wrong = functools.partial(gaussian_denoiser, error=-1e-3)
    solve = functools.partial(sde.observed, wrong, y, A, SIGMA_Y, tolerance=1e-5)
    errors = [relative_error(solve(resolution=r)(x, 1.0), D, change) for r in (0.03, 0.0)]
    assert errors[0] < 0.01 and errors[0] < errors[1] / 5


def test_no_matrix_makes_the_residual_grow():
    # Neither symmetric nor positive, and preconditioned by another of that kind.
    rng = torch.Generator().manual_seed(0)
    M, P = torch.randn(2, 20, 20, dtype=torch.float64, generator=rng)
    b = torch.randn(3, 20, dtype=torch.float64, generator=rng)

    def respond(residual):
        step = residual @ P
        return step[..., None, None], step @ M

    solutions = [sde._conjugate_residuals(respond, b, k, 0)[..., 0, 0] for k in range(1, 21)]
    sizes = torch.stack([(b - solution @ M).norm(dim=1) for solution in solutions])
    assert (sizes.diff(dim=0) <= 0).all()
    assert (sizes[0] < b.norm(dim=1)).all() and (sizes[-1] < 1e-6).all()


def test_an_impossible_observation_is_refused():
    _, x, y = image_and_observation(blur, 0.1)
    with pytest.raises(ValueError, match="noise level 0.1 .* units"):
        sde.observed(gaussian_denoiser, 255 * y, blur, SIGMA_Y)(x, 0.1)
    with pytest.raises(ValueError, match="not nan"):
        sde.observed(gaussian_denoiser, y, blur, SIGMA_Y)(math.nan * x, 0.1)
    with pytest.raises(ValueError, match="not 0"):
        sde.observed(gaussian_denoiser, y, blur, 0)


# -----------------------------------------------------------------------------
# Samples
# -----------------------------------------------------------------------------


def law_of_samples(denoiser, start, spread, levels):
    """Return the mean and covariance of sde.adams' results from N(start, spread^2).

    They are exact, by an impulse in each number that the sampler draws.
    """
    n = start.numel()
    count, step = n * len(levels), 0

    def impulses(x):
        nonlocal step
        step += 1
        z = torch.zeros(1 + count, n)
        z[1 + n * step : 1 + n * (step + 1)] = torch.eye(n)
        return z.view_as(x).to(x)

    first = torch.zeros(1 + count, n)
    first[1 : 1 + n] = torch.eye(n)
    x = start.flatten() + spread * first.to(start)
    out = sde.adams(denoiser, x.view(-1, *start.shape), levels, noise=impulses).flatten(1)
    return out[0], (out[1:] - out[0]).T @ (out[1:] - out[0])


@everywhere
def test_samples_from_pure_noise_have_the_posterior_law(A):
    # Grey images of 4 x 4, from MU + 100 n on. The covariance is of second order in the step.
    size = 4
    C, middle = covariance("natural", size, 1), torch.full((1, 1, size, size), MU).double()
    gain, H = gain_of(C, A, size, 1)
    y = A(MU + 0.2 * normal(1, 1, size))
    mean, scatter = MU + gain @ (y - A(middle)).flatten(), C - gain @ H @ C
    errors = []
    for steps in (12, 24):
        levels = torch.logspace(2, -3, steps, dtype=torch.float64).tolist()
        many = y.expand(1 + middle.numel() * steps, *y.shape[1:])
        prior = functools.partial(gaussian_denoiser, C=C)
        denoiser = sde.observed(prior, many, A, SIGMA_Y, resolution=0, tolerance=1e-4)
        m, v = law_of_samples(denoiser, middle[0], levels[0], levels)
        assert (m - mean).norm() < 1e-4 * scatter.trace().sqrt()
        errors.append(((v - scatter).norm() / scatter.norm()).item())
    assert errors[1] < 0.2 and errors[0] / errors[1] > 3


@everywhere
@pytest.mark.parametrize("sigma_y", [0.02, 0.2])
def test_the_posterior_mean_is_that_of_a_gaussian_prior(A, sigma_y):
    # The fill has another prior, by up to a factor of 3 in contrast, and its mean is 0.5.
    C = covariance("uneven")
    x0, _, _ = image_and_observation(A, 1.0, C)
    y = A(x0)
    H = matrix(A)
    M = sigma_y**2 * torch.eye(len(H), dtype=torch.float64) + H @ C @ H.T
    exact = (torch.linalg.solve(M, (y - A(MU + 0 * x0)).flatten(1).T).T @ H @ C).view_as(x0)
    denoiser = functools.partial(gaussian_denoiser, C=C)
    found = sde.posterior_mean(denoiser, y, A, sigma_y, x0)
    errors = [relative_error(v, MU, exact) for v in (found, sde.fill(y, A, sigma_y, x0))]
    assert errors[0] < 0.05 and errors[0] < errors[1] / 2


def test_the_posterior_mean_takes_24_network_calls():
    calls = []

    def denoiser(x, s):
        calls.append(len(x))
        return gaussian_denoiser(x, float(s))

    _, x, y = image_and_observation(mask, 0.1)
    with torch.inference_mode():
        found = sde.posterior_mean(denoiser, y, mask, SIGMA_Y, x)
    assert sum(calls) == 24 * len(x) and found.shape == x.shape and not found.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_may_be_switched_off(mode):
    _, x, y = image_and_observation(blur, 0.1)
    expected = sde.observed(gaussian_denoiser, y, blur, SIGMA_Y)(x, 0.1)
    with mode():
        found = sde.observed(gaussian_denoiser, y.clone(), blur, SIGMA_Y)(x.clone(), 0.1)
        filled = sde.fill(y.clone(), blur, SIGMA_Y, x.clone())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(filled, sde.fill(y, blur, SIGMA_Y, x))


# -----------------------------------------------------------------------------
# Large images
# -----------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_the_fill_of_a_large_smooth_image_is_below_the_noise(share):
    # Interpolation between many noisy pixels of a smooth image averages their noise of 0.02.
    wave = torch.linspace(0, 3, 300).sin()
    x0 = (0.3 + 0.4 * wave[:, None] * wave).expand(1, 3, 300, 300)
    rng = torch.Generator().manual_seed(0)
    kept = torch.rand(300, 300, generator=rng) > share
    y = kept * (x0 + 0.02 * torch.randn(x0.shape, generator=rng))
    error = (sde.fill(y, lambda x: kept * x, 0.02, x0) - x0).square().mean().sqrt()
    assert error < 0.015

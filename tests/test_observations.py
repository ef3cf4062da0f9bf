"""Observations y = A(x0) + sigma_y n against Gaussian priors, whose posteriors are known, in float64.

For x0 ~ N(MU, C) all is affine: the denoiser given x and y, and what a sampler makes of its noise. Matrices come from
the code's own functions, applied to the identity; what they are compared with is dense linear algebra.
"""

import functools
import math

import pytest
import torch
import torch.nn.functional as F

import sde

MU, SIGMA_Y, SIZE = 0.4, 0.02, 8
MASK = torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(1)) < 0.5


def blur(x):
    kernel = torch.tensor([0.25, 0.5, 0.25]).to(x)
    weight = (kernel[:, None] * kernel).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), weight, groups=x.shape[1])


OPERATORS = {
    "mask": lambda x: MASK[: x.shape[2], : x.shape[3]].to(x) * x,
    "blur": blur,
    "shrink": lambda x: F.avg_pool2d(x, 2) - 0.1,  # affine
}
everywhere = pytest.mark.parametrize("A", OPERATORS.values(), ids=OPERATORS)


def images(count=4, size=SIZE, seed=0):
    return torch.randn(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def matrix(linear, size=SIZE, channels=3):
    """Return the matrix of a function of images (B, channels, size, size) that is affine in each."""
    one = torch.eye(channels * size**2, dtype=torch.float64).view(-1, channels, size, size)
    return (linear(one) - linear(torch.zeros_like(one))).flatten(1).T


@functools.cache
def covariance(kind="natural"):
    """C of the prior: that of natural_power, or "uneven", where contrast varies over the picture by a factor of 3."""
    C = matrix(functools.partial(sde._filter, gain=sde.natural_power(images(1))))
    if kind == "uneven":
        wave = (torch.arange(SIZE, dtype=torch.float64) * math.pi / SIZE).cos()
        contrast = (1 + wave[:, None] * wave / 2).expand(3, SIZE, SIZE).flatten()
        C = contrast[:, None] * C * contrast
    return C


def gaussian_denoiser(x, s, C=None, error=0.0):
    """E[x0 | x] for x0 ~ N(MU, C), s a float; `error` is added to all eigenvalues of its Jacobian."""
    C = covariance() if C is None else C
    eye = torch.eye(len(C), dtype=torch.float64)
    return MU + ((x - MU).flatten(1) @ (torch.linalg.solve(C + s**2 * eye, C) + error * eye)).view_as(x)


def picture_and_observation(A, s, C=None):
    """Return x0, x = x0 + s n, and y."""
    C = covariance() if C is None else C
    x0 = MU + (images().flatten(1) @ torch.linalg.cholesky(C).T).view(-1, 3, SIZE, SIZE)
    y = A(x0)
    noise = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    return x0, x0 + s * images(seed=5), y + SIGMA_Y * torch.where(y == 0, 0, noise)  # a masked pixel has no noise


def closed_form(A, y, x, s, C=None):
    """Return E[x0 | x] and the change that y makes to it, by dense linear algebra."""
    C, H = covariance() if C is None else C, matrix(A)
    D = gaussian_denoiser(x, s, C)
    V = C - C @ torch.linalg.solve(C + s**2 * torch.eye(len(C), dtype=torch.float64), C)
    M = SIGMA_Y**2 * torch.eye(len(H), dtype=torch.float64) + H @ V @ H.T
    return D, (torch.linalg.solve(M, (y - A(D)).flatten(1).T).T @ H @ V).view_as(x)


def relative_error(found, D, change):
    return ((found - D - change).norm() / change.norm()).item()


# -----------------------------------------------------------------------------
# The posterior denoiser
# -----------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("s, iterations", [(0.01, 3), (0.1, 3), (1.0, 5), (20.0, 10)])
def test_the_posterior_denoiser_is_the_closed_form(A, s, iterations):
    # The preconditioner is solved to 1e-2, or in 50 steps; so each iteration takes two digits off the error, fewer from 1 on.
    _, x, y = picture_and_observation(A, s)
    found = sde.observed(gaussian_denoiser, y, A, SIGMA_Y, iterations=iterations)(x, s)
    assert relative_error(found, *closed_form(A, y, x, s)) < 1e-5


@everywhere
@pytest.mark.parametrize("s", [0.01, 0.1, 1.0])
def test_it_is_exact_unlike_the_preconditioner(A, s):
    C = covariance("uneven")
    (_, x, y), denoiser = picture_and_observation(A, s, C), functools.partial(gaussian_denoiser, C=C)
    found = sde.observed(denoiser, y, A, SIGMA_Y, iterations=60, resolution=0)(x, s)
    assert relative_error(found, *closed_form(A, y, x, s, C)) < 1e-5


@pytest.mark.parametrize("s", [0.05, 0.5, 20.0])
def test_a_second_noisy_picture_is_averaged_with_the_first(s):
    # x and y are then one picture, weighted by 1 / s^2 and 1 / sigma_y^2, at the level whose 1 / level^2 is the sum.
    (_, x, y), weights = picture_and_observation(lambda x: x, s), (s**-2, SIGMA_Y**-2)
    expected = gaussian_denoiser((weights[0] * x + weights[1] * y) / sum(weights), sum(weights) ** -0.5)
    found = sde.observed(gaussian_denoiser, y, lambda x: x, SIGMA_Y)(x, s)
    D = gaussian_denoiser(x, s)
    assert relative_error(found, D, expected - D) < 1e-5


def test_every_iteration_takes_two_digits_off_the_error():
    A, s = OPERATORS["mask"], 0.3
    _, x, y = picture_and_observation(A, s)
    exact = closed_form(A, y, x, s)
    errors = [relative_error(sde.observed(gaussian_denoiser, y, A, SIGMA_Y, iterations=k)(x, s), *exact) for k in (1, 2, 3)]
    assert errors[0] < 2e-2 and errors[1] < 2e-2 * errors[0] and errors[2] < 2e-2 * errors[1]


@pytest.mark.parametrize("s", [0.2, 1.0])
def test_no_single_variance_stands_for_the_covariance(s):
    # Score-based Data Assimilation: D + V A^T (y - A D) / (sigma_y^2 + gamma s^2), with the best gamma there is.
    A = OPERATORS["mask"]
    _, x, y = picture_and_observation(A, s)
    D, change = closed_form(A, y, x, s)
    V = sde.posterior_covariance(gaussian_denoiser, x, s)[1](A(y - A(D)))  # A is its own transpose
    errors = [relative_error(D + V / (SIGMA_Y**2 + g * s**2), D, change) for g in torch.logspace(-4, 1, 60).tolist()]
    assert min(errors) > 0.2


def test_another_observation_is_linearised_at_the_denoised_picture():
    A, s = lambda x: (2 * x).exp(), 0.1
    x0, x, _ = picture_and_observation(lambda x: x, s)
    y, D = A(x0), gaussian_denoiser(x, s)
    slope = 2 * A(D)
    tangent = lambda x: slope * (x - D) + A(D)  # noqa: E731
    found = [sde.observed(gaussian_denoiser, y, B, SIGMA_Y)(x, s) for B in (A, tangent)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)


# -----------------------------------------------------------------------------
# Draws
# -----------------------------------------------------------------------------


def law_of_draws(denoiser, start, spread, levels):
    """Return the mean and covariance of sde.adams' results from N(start, spread^2), by an impulse in each number it draws."""
    n, count = start.numel(), start.numel() * len(levels)
    step = 0

    def impulses(x):
        nonlocal step
        step += 1
        return torch.cat([torch.zeros(1 + n * step, n), torch.eye(n), torch.zeros(count - n * (step + 1), n)]).view_as(x).to(x)

    x = start.flatten() + spread * torch.cat([torch.zeros(1, n), torch.eye(n), torch.zeros(count - n, n)]).to(start)
    out = sde.adams(denoiser, x.view(-1, *start.shape), levels, noise=impulses).flatten(1)
    return out[0], (out[1:] - out[0]).T @ (out[1:] - out[0])


@everywhere
def test_draws_from_pure_noise_have_the_posterior_law(A):
    # Grey pictures of 4 x 4, from MU + 100 n on. The covariance is right to second order in the step.
    size = 4
    C = matrix(functools.partial(sde._filter, gain=sde.natural_power(images(1, size)[:, :1])), size, 1)
    H, middle = matrix(A, size, 1), torch.full((1, 1, size, size), MU, dtype=torch.float64)
    gain = torch.linalg.solve(H @ C @ H.T + SIGMA_Y**2 * torch.eye(len(H), dtype=torch.float64), H @ C).T
    y = A(MU + 0.2 * images(1, size)[:, :1])
    mean, scatter = MU + gain @ (y - A(middle)).flatten(), C - gain @ H @ C
    errors = []
    for steps in (20, 40):
        levels = torch.logspace(2, -3, steps, dtype=torch.float64).tolist()
        many = y.expand(1 + middle.numel() * steps, *y.shape[1:])
        denoiser = sde.observed(functools.partial(gaussian_denoiser, C=C), many, A, SIGMA_Y)
        m, v = law_of_draws(denoiser, middle[0], levels[0], levels)
        errors.append([((m - mean).norm() / scatter.trace().sqrt()).item(), ((v - scatter).norm() / scatter.norm()).item()])
    assert all(mean < 1e-4 for mean, _ in errors)
    assert errors[1][1] < 0.04 and errors[0][1] / errors[1][1] > 4


# -----------------------------------------------------------------------------
# What cannot be solved
# -----------------------------------------------------------------------------


@everywhere
def test_what_a_jacobian_does_not_resolve_does_no_harm(A):
    # The network's eigenvalues are off by -1e-3 at s = 1, where many true ones are smaller: they turn negative.
    _, x, y = picture_and_observation(A, 1.0)
    D, change = closed_form(A, y, x, 1.0)
    wrong = functools.partial(gaussian_denoiser, error=-1e-3)
    errors = [relative_error(sde.observed(wrong, y, A, SIGMA_Y, resolution=r)(x, 1.0), D, change) for r in (0.01, 0.0)]
    assert errors[0] < 0.01 and errors[0] < errors[1] / 5


def test_no_matrix_makes_the_residual_grow():
    # Neither symmetric nor positive, and preconditioned by another of that kind.
    rng = torch.Generator().manual_seed(0)
    M, P = torch.randn(2, 20, 20, dtype=torch.float64, generator=rng)
    b = torch.randn(3, 20, dtype=torch.float64, generator=rng)
    respond = lambda r: ((r @ P)[..., None, None], r @ P @ M)  # noqa: E731
    solve = lambda k: sde._conjugate_residuals(respond, b, k)[..., 0, 0] @ M  # noqa: E731
    sizes = torch.stack([(b - solve(k)).norm(dim=1) for k in range(1, 21)])
    assert (sizes.diff(dim=0) <= 0).all() and (sizes[0] < b.norm(dim=1)).all() and (sizes[-1] < 1e-6).all()


def test_an_impossible_observation_is_refused():
    A = OPERATORS["blur"]
    _, x, y = picture_and_observation(A, 0.1)
    with pytest.raises(ValueError, match="noise level 0.1 .* units"):
        sde.observed(gaussian_denoiser, 255 * y, A, SIGMA_Y)(x, 0.1)
    with pytest.raises(ValueError, match="change by nan"):
        sde.observed(gaussian_denoiser, y, A, SIGMA_Y)(math.nan * x, 0.1)
    with pytest.raises(ValueError, match="not 0"):
        sde.observed(gaussian_denoiser, y, A, 0)


def test_each_image_is_solved_as_if_alone():
    A, levels = OPERATORS["shrink"], torch.tensor([0.05, 0.2, 0.5, 1.0], dtype=torch.float64)
    _, x, y = picture_and_observation(A, levels[:, None, None, None])
    each = lambda x, s: torch.cat([gaussian_denoiser(x[i : i + 1], float(s[i])) for i in range(len(x))])  # noqa: E731
    with torch.no_grad():
        together = sde.observed(each, y, A, SIGMA_Y)(x, levels)
    assert not together.requires_grad
    for i, s in enumerate(levels.tolist()):
        alone = sde.observed(gaussian_denoiser, y[i : i + 1], A, SIGMA_Y)(x[i : i + 1], s)
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [8, 32, 256])
def test_natural_pictures_have_a_pixel_variance_like_photographs(size):
    variance = sde.natural_power(images(1, size)).sum().item() / (3 * size**2)
    assert 0.05 < variance < 0.15  # CIFAR-10's training images: 0.064 around middle grey; it grows slowly with size

"""What a denoiser says of the posterior, and grey images, against closed forms in float64.

For a Gaussian prior x0 ~ N(MU, K) everything is known: D is linear and Cov[x0 | y] =
s^2 K (K + s^2)^-1. For a white prior, K = C^2 I, the variance is s^2 C^2 / (C^2 + s^2).
"""

import math

import pytest
import torch

import sde

MU, C, SIGMA = 0.4, 0.3, 0.2


def prior(shape, seed=0, decay=0.8):
    """Return K (d, d), of eigenvalues 0.1 decay^i in random directions, and its denoiser."""
    d = math.prod(shape)
    rng = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=rng))[0]
    K = basis * (0.1 * decay ** torch.arange(d, dtype=torch.float64)) @ basis.T

    def denoiser(x, sigma):
        s = torch.as_tensor(sigma, dtype=x.dtype).expand(len(x))
        variance = K + s[:, None, None] ** 2 * torch.eye(d, dtype=x.dtype)
        gain = torch.linalg.solve(variance, K)  # K and its resolvent commute
        return MU + (gain @ (x - MU).reshape(len(x), d, 1)).reshape(x.shape)

    return K, denoiser


def covariance(K, sigma):
    return sigma**2 * torch.linalg.solve(K + sigma**2 * torch.eye(len(K), dtype=K.dtype), K)


def white_denoiser(x, sigma):
    s = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1, 1, 1)
    return MU + C**2 / (C**2 + s**2) * (x - MU)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def stream(seed):
    rng = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=rng, dtype=x.dtype)


def hadamard(shape):
    """Return a `noise` that gives the columns of Sylvester's Hadamard matrix in turn.

    With all d of them Hutchinson's sum is exact.
    """
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < math.prod(shape):
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    columns = iter(H)
    return lambda y: next(columns).reshape(shape).expand_as(y)


# -----------------------------------------------------------------------------
# Covariance, error and directions
# -----------------------------------------------------------------------------


def test_the_jacobian_gives_the_covariance_of_the_posterior():
    K, denoiser = prior((3, 2, 2))
    sigmas = torch.tensor([0.05, 0.2], dtype=torch.float64)
    y = normal(2, 3, 2, 2)
    with torch.no_grad():
        denoised, multiply = sde.posterior_covariance(denoiser, y, sigmas)
        units = torch.eye(12).double().view(12, 1, 3, 2, 2)
        columns = torch.stack([multiply(e.expand_as(y)).flatten(1) for e in units], dim=2)
    torch.testing.assert_close(denoised, denoiser(y, sigmas))
    assert not denoised.requires_grad and not y.requires_grad
    torch.testing.assert_close(columns, torch.stack([covariance(K, 0.05), covariance(K, 0.2)]))
    torch.testing.assert_close(columns, columns.mT)


def test_expected_error_is_the_variance_of_every_value():
    K, denoiser = prior((1, 4, 4))
    y = normal(2, 1, 4, 4)
    probes = hadamard((1, 4, 4))
    denoised, variance = sde.expected_error(denoiser, y, SIGMA, probes=16, noise=probes)
    torch.testing.assert_close(denoised, denoiser(y, SIGMA))
    torch.testing.assert_close(variance[1].flatten(), covariance(K, SIGMA).diag())


def test_a_few_probes_give_the_expected_error():
    # The variance of v^T C v, v signs, is twice the sum of squares off the diagonal.
    K, denoiser = prior((3, 4, 4))
    cov = covariance(K, SIGMA)
    y = normal(200, 3, 4, 4)
    _, variance = sde.expected_error(denoiser, y, SIGMA, probes=8, noise=stream(1))
    off = cov**2 - torch.diag(cov.diag() ** 2)
    error = variance.sum().item() / 200 - cov.trace().item()
    assert abs(error) < 4 * math.sqrt(2 * off.sum().item() / (200 * 8))
    errors = (variance.mean(0).flatten() - cov.diag()).abs()
    assert (errors < 4.5 * (off.sum(1) / (200 * 8)).sqrt()).all()  # of 48 values


def test_the_spread_of_draws_is_the_expected_error():
    # Of Adams' samples, to 4 standard errors of a variance, and of the Jacobian.
    _, denoiser = prior((1, 4, 4))
    y, n, levels = normal(1, 1, 4, 4), 4000, sde.noise_levels(SIGMA, 1e-3, 60)
    draws = sde.adams(denoiser, y.expand(n, -1, -1, -1), levels, noise=stream(2))
    _, variance = sde.expected_error(denoiser, y, SIGMA, probes=16, noise=hadamard((1, 4, 4)))
    assert ((draws.var(0) / variance[0] - 1).abs() < 4 * math.sqrt(2 / n) + 0.01).all()


def test_principal_components_are_the_leading_eigenvectors():
    # Eigenvalues of the posterior fall by 0.93 to 0.85 each: after 300 iterations 4 are exact.
    K, denoiser = prior((3, 4, 4))
    exact, vectors = torch.linalg.eigh(covariance(K, SIGMA))
    y = normal(2, 3, 4, 4)
    variances, directions = sde.principal_components(denoiser, y, SIGMA, 4, iterations=300)
    assert variances.shape == (2, 4) and directions.shape == (2, 4, 3, 4, 4)
    torch.testing.assert_close(variances, exact.flip(0)[:4].expand(2, 4))
    overlap = directions.flatten(2) @ vectors.flip(1)[:, :4]
    expected = torch.eye(4, dtype=torch.float64).expand(2, 4, 4)
    torch.testing.assert_close(overlap.abs(), expected, atol=1e-5, rtol=0)


def test_all_components_together_are_the_whole_covariance():
    K, denoiser = prior((3, 2, 2))
    y = normal(1, 3, 2, 2)
    variances, directions = sde.principal_components(denoiser, y, SIGMA, 12, iterations=1)
    rebuilt = directions[0].flatten(1).T * variances[0] @ directions[0].flatten(1)
    torch.testing.assert_close(rebuilt, covariance(K, SIGMA))


@pytest.mark.parametrize("count", [0, 13])
def test_an_impossible_number_of_components_is_refused(count):
    with pytest.raises(ValueError, match=str(count)):
        sde.principal_components(white_denoiser, normal(1, 3, 2, 2), SIGMA, count)


# -----------------------------------------------------------------------------
# Grey images
# -----------------------------------------------------------------------------


def luma_chroma_denoiser(L, chroma):
    """Return E[x0 | x] for white images whose mean over channels, of variance L, is independent."""

    def denoiser(x, sigma):
        s = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1, 1, 1)
        mean = x.mean(1, keepdim=True)  # of noise s^2 / 3
        return MU + L / (L + s**2 / 3) * (mean - MU) + chroma / (chroma + s**2) * (x - mean)

    return denoiser


def test_complemented_grey_noise_is_white():
    # The covariance from n pixels has standard errors sqrt(2 / n) on the diagonal, less off it.
    seen = []
    x0, n = torch.full((1, 1, 200, 200), 0.5, dtype=torch.float64), 200 * 200
    y = x0 + SIGMA * normal(1, 1, 200, 200)
    e = normal(1, 3, 200, 200, seed=1)
    result = sde.grey(lambda x, s: seen.append((x, s)) or x, e)(y, SIGMA)
    x, s = seen[0]
    assert s == pytest.approx(math.sqrt(3) * SIGMA)
    noise = (x - x0).flatten(2)[0]
    assert ((noise @ noise.T / n / s**2 - torch.eye(3).double()).abs() < 4 * math.sqrt(2 / n)).all()
    torch.testing.assert_close(x.mean(1, keepdim=True), y)  # nothing of the grey image is lost
    torch.testing.assert_close(result, y)


@pytest.mark.parametrize("sigma", [SIGMA, torch.tensor([0.1, 0.3], dtype=torch.float64)])
def test_the_grey_denoiser_is_exact_where_luma_is_independent(sigma):
    # So every sampler draws from the posterior of the grey image.
    L = C**2
    denoiser = sde.grey(luma_chroma_denoiser(L, chroma=0.01), normal(2, 3, 4, 4, seed=1))
    y = MU + normal(2, 1, 4, 4)
    gain = L / (L + torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1, 1, 1) ** 2)
    denoised, variance = sde.expected_error(denoiser, y, sigma, probes=1)
    torch.testing.assert_close(denoised, MU + gain * (y - MU))
    exact = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1, 1, 1) ** 2 * gain
    torch.testing.assert_close(variance, exact.expand_as(y))

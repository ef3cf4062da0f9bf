"""What a denoiser says of the posterior, and grey images, against closed forms in float64."""

import math

import pytest
import torch
from gaussian import MU, Gaussian, normal, white
from scipy.linalg import hadamard

import sde

SIGMA = 0.2


def prior(values):
    """Return the prior of eigenvalues 0.1 0.8^i in random directions."""
    basis = torch.linalg.qr(normal(values, values))[0]
    eigenvalues = 0.1 * 0.8 ** torch.arange(values, dtype=torch.float64)
    return Gaussian(basis * eigenvalues @ basis.T)


def test_the_jacobian_gives_the_covariance_of_the_posterior():
    denoiser, y = prior(12), normal(2, 3, 2, 2)
    sigma = torch.tensor([0.05, 0.2], dtype=torch.float64)
    with torch.no_grad():
        denoised, multiply = sde.posterior_covariance(denoiser, y, sigma)
        units = torch.eye(12, dtype=torch.float64).view(12, 1, 3, 2, 2)
        columns = torch.stack([multiply(e.expand_as(y)).flatten(1) for e in units], dim=2)
    torch.testing.assert_close(denoised, denoiser(y, sigma))
    torch.testing.assert_close(columns, denoiser.covariance(sigma))
    assert not denoised.requires_grad and not y.requires_grad


def test_expected_error_is_the_variance_of_every_value():
    # Hutchinson's sum is exact over the columns of a Hadamard matrix, orthogonal signs. The noise
    # has these signs.
    denoiser, y = prior(16), normal(2, 1, 4, 4)
    columns = iter(torch.from_numpy(hadamard(16)) * normal(16, 16).abs())
    denoised, variance = sde.expected_error(
        denoiser, y, SIGMA, probes=16, noise=lambda y: next(columns).view(1, 4, 4).expand_as(y)
    )
    torch.testing.assert_close(denoised, denoiser(y, SIGMA))
    exact = denoiser.covariance(SIGMA)[0].diag().view(1, 4, 4)
    torch.testing.assert_close(variance, exact.expand_as(y))


@pytest.mark.parametrize("count, iterations", [(4, 200), (12, 1)])
def test_principal_components_are_the_leading_eigenvectors(count, iterations):
    # Eigenvalues of the posterior fall by 0.93 to 0.85 each; all 12 together need no iteration.
    denoiser, y = prior(12), normal(2, 3, 2, 2)
    covariance = denoiser.covariance(SIGMA)[0]
    exact = torch.linalg.eigvalsh(covariance).flip(0)[:count]
    variances, directions = sde.principal_components(denoiser, y, SIGMA, count, iterations)
    assert directions.shape == (2, count, 3, 2, 2)
    torch.testing.assert_close(variances, exact.expand(2, count))
    vectors = directions.flatten(2)
    identity = torch.eye(count, dtype=torch.float64).expand(2, count, count)
    torch.testing.assert_close(vectors @ vectors.mT, identity)
    torch.testing.assert_close(vectors @ covariance @ vectors.mT, exact * identity)


@pytest.mark.parametrize("count", [0, 1.5, 13])
def test_an_impossible_number_of_components_is_refused(count):
    with pytest.raises(ValueError, match=str(count)):
        sde.principal_components(white(0.3), normal(1, 3, 2, 2), SIGMA, count)


def luma_chroma_denoiser(luma, chroma):
    """Return E[x0 | x] for white images whose mean over channels, of variance luma, is independent.

    The noise of that mean has the variance s^2 / 3.
    """

    def denoiser(x, sigma):
        s = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1, 1, 1)
        mean = x.mean(1, keepdim=True)
        return MU + luma / (luma + s**2 / 3) * (mean - MU) + chroma / (chroma + s**2) * (x - mean)

    return denoiser


def test_complemented_grey_noise_is_white():
    # The covariance from n pixels has standard errors sqrt(2 / n) on the diagonal, less off it.
    seen = []
    n, y = 200 * 200, 0.5 + SIGMA * normal(1, 1, 200, 200)
    sde.grey(lambda x, s: seen.append((x, s)) or x, normal(1, 3, 200, 200, seed=1))(y, SIGMA)
    x, s = seen[0]
    assert s == pytest.approx(math.sqrt(3) * SIGMA)
    noise = (x - 0.5).flatten(2)[0]
    assert ((noise @ noise.T / n / s**2 - torch.eye(3)).abs() < 4 * math.sqrt(2 / n)).all()
    torch.testing.assert_close(x.mean(1, keepdim=True), y)  # nothing of the grey image is lost


@pytest.mark.parametrize("sigma", [SIGMA, torch.tensor([0.1, 0.3], dtype=torch.float64)])
def test_the_grey_denoiser_is_exact_where_luma_is_independent(sigma):
    # So every sampler draws from the posterior of the grey image.
    luma, s = 0.09, torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1, 1, 1)
    denoiser = sde.grey(luma_chroma_denoiser(luma, chroma=0.01), normal(2, 3, 4, 4, seed=1))
    y = MU + normal(2, 1, 4, 4)
    gain = luma / (luma + s**2)
    denoised, variance = sde.expected_error(denoiser, y, sigma, probes=1)
    torch.testing.assert_close(denoised, MU + gain * (y - MU))
    torch.testing.assert_close(variance, (s**2 * gain).expand_as(y))

"""What a denoiser says of the posterior, against closed forms in float64.

For a Gaussian prior x0 ~ N(MU, K) everything is known: D is linear, Cov[x0 | y] = s^2 K (K + s^2)^-1, and y ~ N(MU, K + s^2),
so the most likely level is the root of an equation in the eigenvalues of K. For a white prior, K = C^2 I, it is plainly
s^2 = mean (y - MU)^2 - C^2. A picture that is known exactly, D = x0 whatever y, has s^2 = mean (y - x0)^2.
"""

import math

import pytest
import torch

import denoise
import sde

MU, C, SIGMA = 0.4, 0.3, 0.2


def prior(shape, seed=0, decay=0.8):
    """Return K (d, d) with the eigenvalues 0.1 decay^i in random directions, and its denoiser for images (B, *shape)."""
    d = math.prod(shape)
    basis = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))[0]
    K = basis * (0.1 * decay ** torch.arange(d, dtype=torch.float64)) @ basis.T

    def denoiser(x, sigma):
        s = torch.as_tensor(sigma, dtype=x.dtype).expand(len(x))
        gain = torch.linalg.solve(K + s[:, None, None] ** 2 * torch.eye(d, dtype=x.dtype), K)  # K and its resolvent commute
        return MU + (gain @ (x - MU).reshape(len(x), d, 1)).reshape(x.shape)

    return K, denoiser


def covariance(K, sigma):
    return sigma**2 * torch.linalg.solve(K + sigma**2 * torch.eye(len(K), dtype=K.dtype), K)


def white_denoiser(x, sigma):
    s = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1, 1, 1)
    return MU + C**2 / (C**2 + s**2) * (x - MU)


def known(x0):
    return lambda x, sigma: x0 + 0 * x


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def hadamard(shape):
    """A `noise` that gives the columns of Sylvester's Hadamard matrix in turn: with all d of them Hutchinson's sum is exact."""
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
        columns = torch.stack([multiply(e.reshape(1, 3, 2, 2).expand_as(y)).flatten(1) for e in torch.eye(12).double()], dim=2)
    torch.testing.assert_close(denoised, denoiser(y, sigmas))
    assert not denoised.requires_grad and not y.requires_grad
    torch.testing.assert_close(columns, torch.stack([covariance(K, 0.05), covariance(K, 0.2)]))
    torch.testing.assert_close(columns, columns.mT)


def test_expected_error_is_the_variance_of_every_value():
    K, denoiser = prior((1, 4, 4))
    y = normal(2, 1, 4, 4)
    denoised, variance = sde.expected_error(denoiser, y, SIGMA, probes=16, noise=hadamard((1, 4, 4)))
    torch.testing.assert_close(denoised, denoiser(y, SIGMA))
    torch.testing.assert_close(variance[1].flatten(), covariance(K, SIGMA).diag())


def test_a_few_probes_give_the_expected_error():
    # A product of signs has variance 1, so v^T C v has twice the sum of the squares off the diagonal.
    K, denoiser = prior((3, 4, 4))
    cov, rng = covariance(K, SIGMA), torch.Generator().manual_seed(1)
    noise = lambda y: torch.randn(y.shape, generator=rng, dtype=y.dtype)  # noqa: E731
    _, variance = sde.expected_error(denoiser, normal(200, 3, 4, 4), SIGMA, probes=8, noise=noise)
    off = cov**2 - torch.diag(cov.diag() ** 2)
    assert abs(variance.sum().item() / 200 - cov.trace().item()) < 4 * math.sqrt(2 * off.sum().item() / (200 * 8))
    errors = (variance.mean(0).flatten() - cov.diag()).abs()
    assert (errors < 4.5 * (off.sum(1) / (200 * 8)).sqrt()).all()  # of 48 values


def test_the_spread_of_draws_is_the_expected_error():
    # Two maps of uncertainty from one denoiser: of Adams' draws, to 4 standard errors of a variance, and of the Jacobian.
    _, denoiser = prior((1, 4, 4))
    y, n, rng = normal(1, 1, 4, 4), 4000, torch.Generator().manual_seed(2)
    noise = lambda x: torch.randn(x.shape, generator=rng, dtype=x.dtype)  # noqa: E731
    draws = sde.adams(denoiser, y.expand(n, -1, -1, -1), sde.noise_levels(SIGMA, 1e-3, 60), noise=noise)
    _, variance = sde.expected_error(denoiser, y, SIGMA, probes=16, noise=hadamard((1, 4, 4)))
    assert ((draws.var(0) / variance[0] - 1).abs() < 4 * math.sqrt(2 / n) + 0.01).all()


def test_principal_components_are_the_leading_eigenvectors():
    # Eigenvalues of the posterior fall by 0.93 to 0.85 each, so 4 of them are known to 0.8^200 after 200 iterations.
    K, denoiser = prior((3, 4, 4))
    exact, vectors = torch.linalg.eigh(covariance(K, SIGMA))
    variances, directions = sde.principal_components(denoiser, normal(2, 3, 4, 4), SIGMA, 4, iterations=300)
    assert variances.shape == (2, 4) and directions.shape == (2, 4, 3, 4, 4)
    torch.testing.assert_close(variances, exact.flip(0)[:4].expand(2, 4))
    overlap = directions.flatten(2) @ vectors.flip(1)[:, :4]
    torch.testing.assert_close(overlap.abs(), torch.eye(4, dtype=torch.float64).expand(2, 4, 4), atol=1e-5, rtol=0)


def test_all_components_together_are_the_whole_covariance():
    K, denoiser = prior((3, 2, 2))
    variances, directions = sde.principal_components(denoiser, normal(1, 3, 2, 2), SIGMA, 12, iterations=1)
    rebuilt = directions[0].flatten(1).T * variances[0] @ directions[0].flatten(1)
    torch.testing.assert_close(rebuilt, covariance(K, SIGMA))


@pytest.mark.parametrize("count", [0, 13])
def test_an_impossible_number_of_components_is_refused(count):
    with pytest.raises(ValueError, match=str(count)):
        sde.principal_components(white_denoiser, normal(1, 3, 2, 2), SIGMA, count)


# -----------------------------------------------------------------------------
# The noise level
# -----------------------------------------------------------------------------


def test_the_level_of_a_white_prior_is_found_exactly():
    levels = torch.tensor([0.02, 0.1, 0.5], dtype=torch.float64)
    y = MU + (C**2 + levels[:, None, None, None] ** 2).sqrt() * normal(3, 3, 16, 16)
    y = MU + (y - MU) * ((C**2 + levels**2) / ((y - MU) ** 2).mean((1, 2, 3))).sqrt()[:, None, None, None]  # to the last digit
    torch.testing.assert_close(sde.estimate_sigma(white_denoiser, y, 0.001, 2.0, tolerance=1e-9), levels)


def test_the_estimate_is_the_most_likely_level():
    # With all its traces exact, log p_s(y) has no slope there: the sum of (z^2 / (k + s^2) - 1) / (k + s^2) is zero.
    K, denoiser = prior((3, 4, 4))
    eigenvalues, vectors = torch.linalg.eigh(K)
    for seed, level in enumerate((0.02, 0.05, 0.2)):
        y = MU + (torch.linalg.cholesky(K + level**2 * torch.eye(48).double()) @ normal(48, seed=seed)).reshape(1, 3, 4, 4)
        z = vectors.T @ (y - MU).flatten()
        low, high = 1e-3, 1.0
        for _ in range(60):  # the exact root, by halving
            s = math.sqrt(low * high)
            v = eigenvalues + s**2
            low, high = (s, high) if ((z**2 / v - 1) / v).sum() > 0 else (low, s)
        found = sde.estimate_sigma(denoiser, y, 1e-3, 1.0, probes=2000, tolerance=1e-6).item()
        # What is left is the error of Hutchinson's trace, 2 sum_offdiagonal (I - J)^2 / probes, over its slope in log s.
        v = eigenvalues + s**2
        rest = vectors * (s**2 / v) @ vectors.T
        trace_error = math.sqrt(2 * ((rest**2).sum() - (rest.diag() ** 2).sum()).item() / 2000)
        slope = 2 * ((s**2 / v) ** 2).sum().item()
        assert abs(math.log(found / s)) < 4 * trace_error / slope


@pytest.mark.parametrize("power", [0.5, 1.0, 4.0, 10.0])
def test_the_root_finder_finds_any_root(power):
    # Residuals of size s (root / s)^power, whatever y is: scoring alone overshoots, from power 2 on without end.
    roots = torch.logspace(-2.9, -0.1, 9, dtype=torch.float64)
    calls = []

    def denoiser(x, s):
        calls.append(s)
        return (x - (s * (roots / s) ** power)[:, None, None, None]).detach() + 0 * x

    found = sde.estimate_sigma(denoiser, normal(9, 3, 4, 4), 0.001, 1.0, iterations=40, tolerance=1e-6)
    torch.testing.assert_close(found, roots, rtol=1e-5, atol=0)
    assert len(calls) <= 30


def test_a_level_outside_the_range_becomes_its_end():
    y = 0.5 + torch.tensor([1e-4, 30.0], dtype=torch.float64)[:, None, None, None] * normal(2, 3, 8, 8)
    found = sde.estimate_sigma(known(torch.full_like(y, 0.5)), y, 0.01, 2.0)
    assert found.tolist() == [0.01, 2.0]
    with pytest.raises(ValueError, match="0.3, 0.2"):
        sde.estimate_sigma(white_denoiser, y, 0.3, 0.2)


def test_an_estimate_depends_on_its_own_image_alone():
    _, denoiser = prior((3, 4, 4))
    y = MU + 0.3 * normal(4, 3, 4, 4)
    together = sde.estimate_sigma(denoiser, y, 0.001, 1.0)
    torch.testing.assert_close(sde.estimate_sigma(denoiser, y[2:3], 0.001, 1.0), together[2:3], rtol=2e-3, atol=0)
    assert torch.equal(sde.estimate_sigma(denoiser, y, 0.001, 1.0), together)


def test_tiles_of_one_picture_share_their_level():
    y = MU + 0.5 * normal(4, 3, 8, 8)
    found = sde.estimate_sigma(white_denoiser, y, 0.001, 2.0, together=True, tolerance=1e-9)
    pooled = (((y - MU) ** 2).mean() - C**2).sqrt()
    torch.testing.assert_close(found, pooled.expand(4))


def test_a_part_alone_decides_the_level():
    y = MU + 0.5 * normal(1, 3, 8, 8)
    y[..., 4:] += 100.0
    left = lambda v, *_: v * (torch.arange(8) < 4)  # noqa: E731
    exact = (((y[..., :4] - MU) ** 2).mean() - C**2).sqrt()
    torch.testing.assert_close(sde.estimate_sigma(white_denoiser, y, 0.001, 2.0, part=left, tolerance=1e-9), exact[None])


@pytest.mark.parametrize("block", [1, 2])
def test_the_level_of_luma_is_the_channel_means(block):
    # Over k values of which one is kept, the squared mean of signs has a variance below 2: the error of the trace.
    x0, n = torch.full((1, 3, 16, 16), 0.5, dtype=torch.float64), normal(1, 3, 16, 16)
    means = torch.nn.functional.avg_pool2d(n.mean(1, keepdim=True), block)
    exact = 0.05 * block * math.sqrt(3) * (means**2).mean().sqrt()
    part = lambda v, D, s: denoise.luma(v, D, s, block)  # noqa: E731
    found = sde.estimate_sigma(known(x0), x0 + 0.05 * n, 0.001, 2.0, probes=100, part=part, tolerance=1e-9)
    assert abs((found / exact).log().item()) < 4 * math.sqrt(2 / (100 * means.numel())) / 2


def test_a_lossy_picture_is_judged_by_its_finest_brightness():
    # Half of the noise is shared by 2 x 2 pixels, as texture is: their means would say 1.58 times as much.
    x0, blocks = torch.full((1, 3, 64, 64), 0.5, dtype=torch.float64), normal(1, 1, 32, 32, seed=1)
    n = 0.05 * (normal(1, 1, 64, 64) + blocks.repeat_interleave(2, 2).repeat_interleave(2, 3)) / math.sqrt(2)
    seen = []
    denoiser = lambda x, s: seen.append((x - x0, s)) or known(x0)(x, s)  # noqa: E731
    found, note = denoise.picture_level(denoiser, x0 + n, 0.001, 2.0)
    exact = math.sqrt(3) * n.square().mean().sqrt().item()
    assert abs(math.log(found / exact)) < 4 * math.sqrt(2 / (4 * n.numel())) / 2 and "brightness" in note
    noise, s = seen[-1][0].flatten(2)[0], seen[-1][1].item()  # the network is shown white noise: errors as in sde.grey's test
    assert ((noise @ noise.T / n.numel() / s**2 - torch.eye(3).double()).abs() < 4 * math.sqrt(2 / n.numel())).all()


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.2])
def test_clipping_does_not_lower_the_level(sigma):
    # A value 1.5 sigma from an end has lost 11 % of its variance, those kept 5 % on average at sigma 0.2: 2.5 % of sigma.
    x0 = torch.linspace(0, 1, 64, dtype=torch.float64).expand(1, 3, 64, 64)
    y = ((x0 + sigma * normal(1, 3, 64, 64)).clamp(0, 1) * 255).round() / 255
    parts = (None, denoise.unclipped)
    naive, careful = (sde.estimate_sigma(known(x0), y, 0.001, 2.0, part=part).item() / sigma for part in parts)
    assert naive < careful and abs(careful - 1) < 0.025 + 4 / math.sqrt(2 * 0.4 * y.numel())


def test_a_picture_that_is_clipped_everywhere_has_no_noise():
    y = (-0.5 + 0.01 * normal(1, 3, 8, 8)).clamp(0, 1)
    assert sde.estimate_sigma(known(torch.zeros_like(y)), y, 0.005, 1.0, part=denoise.unclipped).item() == 0.005


def test_the_noise_map_follows_noise_that_varies():
    # For a white prior it is exactly the mean of (y - MU)^2 over the window, less C^2, from whatever level it starts.
    scale = torch.linspace(0.2, 0.8, 64, dtype=torch.float64)
    y = MU + (C**2 + scale**2).sqrt() * normal(1, 3, 64, 64)
    found = sde.noise_map(white_denoiser, y, 0.4, window=8)
    assert found.shape == (1, 1, 64, 64)
    exact = (((y[:, :, 20:29, 30:39] - MU) ** 2).mean() - C**2).sqrt()
    torch.testing.assert_close(found[0, 0, 24, 34], exact)


def test_noise_that_varies_is_told():
    scale = torch.linspace(0.05, 0.2, 192, dtype=torch.float64)
    x0 = torch.full((1, 3, 192, 192), 0.5, dtype=torch.float64)
    x0[:, :, :70, :70] = 1.0  # a white sky, where clipping leaves nothing to judge by
    y = (x0 + scale * normal(1, 3, 192, 192)).clamp(0, 1)
    said = denoise.remarks(known(denoise.spread_tiles(x0)), denoise.spread_tiles(y), 0.1, 0.005, 2.0, denoise.unclipped)
    assert "not the same everywhere" in said and "left" in said and "right" in said


@pytest.mark.parametrize(
    "low, high, words", [(0.09, 1, "nothing"), (0.01, 0.1, "give --sigma"), (0.1, 0.1, "only"), (0.01, 1, "")]
)
def test_a_level_at_an_end_of_the_range_is_told(low, high, words):
    x0 = torch.full((1, 3, 64, 64), 0.5, dtype=torch.float64)
    sigma, note = denoise.picture_level(known(x0), x0 + 0.12 * normal(1, 3, 64, 64), low if words != "nothing" else 0.119, high)
    assert low <= sigma <= high and words in note and bool(words) == bool(note)


def test_salt_and_pepper_is_told_from_what_else_is_black_or_white():
    x0 = torch.linspace(0, 1, 64, dtype=torch.float64).expand(1, 3, 64, 64)
    noisy = lambda sigma: (x0 + sigma * normal(1, 3, 64, 64)).clamp(0, 1)  # noqa: E731
    u = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    speckled = torch.where(u < 0.02, 0.0, torch.where(u > 0.98, 1.0, noisy(0.03)))  # 4 % of the pixels
    drawn = noisy(0.03).index_fill(3, torch.arange(9, 60, 9), 1.0)  # lines of one pixel
    assert 0.02 < denoise.impulses(speckled.numpy(), 0.03) < 0.04
    for plain, sigma in ((noisy(0.03), 0.03), (noisy(0.3), 0.3), (drawn, 0.03)):
        assert denoise.impulses(plain.numpy(), sigma) < 1e-3
    assert "salt and pepper" in denoise.picture_level(known(x0), speckled, 0.01, 1.0)[1]


@pytest.mark.parametrize("clipped", [True, False])
def test_clipping_is_seen_in_the_values_whatever_their_kind(clipped):
    x0 = torch.linspace(0, 1, 64, dtype=torch.float64).expand(1, 3, 64, 64)
    y = x0 + 0.2 * normal(1, 3, 64, 64)
    found, note = denoise.picture_level(known(x0), y.clamp(0, 1) if clipped else y, 0.001, 2.0)
    assert ("clipped" in note) == clipped and abs(found / 0.2 - 1) < 0.05


# -----------------------------------------------------------------------------
# Grey images
# -----------------------------------------------------------------------------


def luma_chroma_denoiser(L, chroma):
    """E[x0 | x] where the channel mean (variance L) and what is left of each channel are independent, and white in space."""

    def denoiser(x, sigma):
        s = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1, 1, 1)
        mean = x.mean(1, keepdim=True)  # of noise s^2 / 3
        return MU + L / (L + s**2 / 3) * (mean - MU) + chroma / (chroma + s**2) * (x - mean)

    return denoiser


def test_complemented_grey_noise_is_white():
    # The covariance of 3 channels from n pixels: standard errors sqrt(2 / n) on the diagonal, 1 / sqrt(n) off it.
    seen = []
    x0, n = torch.full((1, 1, 200, 200), 0.5, dtype=torch.float64), 200 * 200
    y = x0 + SIGMA * normal(1, 1, 200, 200)
    result = sde.grey(lambda x, s: seen.append((x, s)) or x, normal(1, 3, 200, 200, seed=1))(y, SIGMA)
    x, s = seen[0]
    assert s == pytest.approx(math.sqrt(3) * SIGMA)
    noise = (x - x0).flatten(2)[0]
    assert ((noise @ noise.T / n / s**2 - torch.eye(3).double()).abs() < 4 * math.sqrt(2 / n)).all()
    torch.testing.assert_close(x.mean(1, keepdim=True), y)  # nothing of the grey image is lost
    torch.testing.assert_close(result, y)


@pytest.mark.parametrize("sigma", [SIGMA, torch.tensor([0.1, 0.3], dtype=torch.float64)])
def test_the_grey_denoiser_is_exact_where_luma_is_independent(sigma):
    # So it is the denoiser of N(MU, L) at every level, and every sampler draws from the posterior of the grey image.
    L = C**2
    denoiser = sde.grey(luma_chroma_denoiser(L, chroma=0.01), normal(2, 3, 4, 4, seed=1))
    y = MU + normal(2, 1, 4, 4)
    gain = L / (L + torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1, 1, 1) ** 2)
    denoised, variance = sde.expected_error(denoiser, y, sigma, probes=1)
    torch.testing.assert_close(denoised, MU + gain * (y - MU))
    exact = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1, 1, 1) ** 2 * gain
    torch.testing.assert_close(variance, exact.expand_as(y))


def test_the_level_of_a_grey_image_is_found():
    y = MU + 0.5 * normal(1, 1, 16, 16)
    denoiser = sde.grey(luma_chroma_denoiser(C**2, chroma=0.01), normal(1, 3, 16, 16, seed=1))
    exact = (((y - MU) ** 2).mean() - C**2).sqrt()
    torch.testing.assert_close(sde.estimate_sigma(denoiser, y, 0.001, 1.0, tolerance=1e-9), exact[None])

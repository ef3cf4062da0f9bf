"""The SDEs against their published formulas, and every sampler against closed forms, in float64.

For a Gaussian prior x0 ~ N(MU, C^2), independent per pixel, the denoiser is linear, so a sampler's
result is an affine function of y and of the noise it draws. Its exact mean is the result without
noise; its exact variance is the sum of squares of its responses to a unit impulse in each draw.
Both come from the sampler's own code, given that `noise`, and are free of sampling noise: what
remains against the posterior is the error of discretisation, whose order is measured.
"""

import functools
import inspect
import itertools
import math
import re

import pytest
import torch
from gaussian import MU, normal, stream, white

import sde
import utils
from sde import VE, VP, SubVP, noise_levels

C, SIGMA, Y = 0.3, 0.5, 1.3  # of the prior, of the noise, and a noisy pixel
DENOISER = white(C)
SDES = [VE(), VP(), SubVP()]
POSTERIOR_SAMPLERS = [
    sde.reverse_sde,
    sde.ancestral,
    sde.adams,
    sde.predictor_corrector,
    sde.annealed_langevin,
]
EVERY_SAMPLER = [*POSTERIOR_SAMPLERS, sde.probability_flow_ode]


def exact_law(sampler, levels, y=Y, denoiser=DENOISER):
    """Return the mean and standard deviation of what sampler(denoiser, y, levels, ...) gives.

    Image 0 gets no noise, image k a one in the k-th draw alone, of at most 1,100.
    """
    draws = itertools.count(1)

    def impulses(x):
        z = torch.zeros_like(x)
        z[next(draws)] = 1
        return z

    images = torch.full((1101, 1, 1, 1), y, dtype=torch.float64)
    result = sampler(denoiser, images, levels, noise=impulses)
    return result[0].item(), (result - result[0]).norm().item()


def posterior(stop, c=C):
    """Return the mean and standard deviation of E[x0 | x_stop] given Y; stop 0: of x0 given Y."""
    left = c**2 * stop**2 / (c**2 + stop**2)  # Var[x0 | x_stop]
    variance = c**2 * SIGMA**2 / (c**2 + SIGMA**2) - left
    return MU + c**2 / (c**2 + SIGMA**2) * (Y - MU), math.sqrt(variance)


def flow(stop):
    """Return E[x0 | x_stop] where dx/dsigma = sigma (x - MU) / (C^2 + sigma^2) leads from Y."""
    return MU + C**2 / math.sqrt((C**2 + stop**2) * (C**2 + SIGMA**2)) * (Y - MU), 0.0


T = torch.linspace(0.01, 1, 5, dtype=torch.float64)
BETA, DECAY = 0.1 + 19.9 * T, torch.exp(-(0.1 * T + 9.95 * T**2))  # beta and e^-B


@pytest.mark.parametrize(
    "process, alpha, std, drift, diffusion",
    [
        (VE(), T**0, 0.01 * 5000**T, 0 * T, 0.01 * 5000**T * math.sqrt(2 * math.log(5000))),
        (VP(), DECAY.sqrt(), (1 - DECAY).sqrt(), -BETA / 2, BETA.sqrt()),
        (SubVP(), DECAY.sqrt(), 1 - DECAY, -BETA / 2, (BETA * (1 - DECAY**2)).sqrt()),
    ],
)
def test_sdes_have_the_published_coefficients(process, alpha, std, drift, diffusion):
    # Song et al. 2021, app. C; std is the standard deviation of x_t given x0.
    torch.testing.assert_close(process.alpha(T), alpha)
    torch.testing.assert_close(process.alpha(T) * process.sigma(T), std)
    torch.testing.assert_close(process.drift(T), drift)
    torch.testing.assert_close(process.diffusion(T), diffusion)
    torch.testing.assert_close(process.times(process.sigma(T).flip(0)), T.flip(0))


def test_noise_levels_fall_evenly_in_the_chosen_power():
    levels = noise_levels(0.5, 0.01, 9, rho=3.0)
    assert levels[0] == 0.5 and levels[-1] == 0.01
    even = torch.full((8,), (0.01 ** (1 / 3) - 0.5 ** (1 / 3)) / 8, dtype=torch.float64)
    torch.testing.assert_close((levels ** (1 / 3)).diff(), even)
    geometric = noise_levels(0.5, 0.01, 9, rho=math.inf)
    even = torch.full((8,), math.log(0.02) / 8, dtype=torch.float64)
    torch.testing.assert_close(geometric.log().diff(), even)
    assert noise_levels(0.5, 0.01, 1).tolist() == [0.5]
    assert noise_levels(0.005, 0.01, 9).tolist() == [0.005]


def given(sampler, levels):
    return functools.partial(sampler, DENOISER, normal(1, 3, 4, 4), levels)


five_levels = functools.partial(noise_levels, sigma=SIGMA, sigma_min=0.01, steps=5)


@pytest.mark.parametrize(
    "function, name, values",
    [
        (five_levels, "sigma", [0.0, 1e-320, math.nan, math.inf]),
        (five_levels, "sigma_min", [1e-320]),
        (five_levels, "steps", [0, 2.5]),
        (five_levels, "rho", [0.0, 1e-4, 1e17]),
        (given(sde.ancestral, [SIGMA, 0.1]), "eta", [-0.1, math.nan]),
        (given(sde.adams, [SIGMA, 0.1]), "eta", [-0.1, math.nan]),
        (given(sde.predictor_corrector, [SIGMA, 0.1]), "delta", [0.0, 2.0]),
        (given(sde.annealed_langevin, [SIGMA, 0.1]), "delta", [0.0, 2.0]),
        (given(sde.langevin, SIGMA), "steps", [0, 2.5]),
        (given(sde.langevin, SIGMA), "step_size", [-1.0, math.nan]),
    ],
)
def test_a_number_that_cannot_be_is_refused(function, name, values):
    for value in values:
        with pytest.raises(ValueError, match=re.escape(f"{value}")):
            function(**{name: value})


@pytest.mark.parametrize("sampler", EVERY_SAMPLER)
@pytest.mark.parametrize("levels", [[], [0.1, 0.5], [0.5, 0.0], [0.5, -0.1], [math.nan, 0.1]])
def test_samplers_refuse_levels_that_do_not_fall(sampler, levels):
    with pytest.raises(ValueError, match="falling"):
        sampler(DENOISER, normal(1, 3, 4, 4), levels)


@pytest.mark.parametrize("sampler", POSTERIOR_SAMPLERS)
def test_one_seed_an_image_frees_it_of_its_batch(sampler):
    y, levels = normal(3, 3, 8, 8), noise_levels(SIGMA, 0.01, 5)
    together = sampler(DENOISER, y, levels, noise=utils.seeded_noise([7, 8, 9]))
    alone = sampler(DENOISER, y[1:2], levels, noise=utils.seeded_noise([8]))
    assert torch.equal(alone, together[1:2])


@pytest.mark.parametrize("sampler", EVERY_SAMPLER)
def test_the_network_is_called_as_often_as_said(sampler):
    asked = []

    def denoiser(x, s):
        asked.append(round(float(s), 9))
        return DENOISER(x, s)

    levels = noise_levels(SIGMA, 0.01, 6)
    sampler(denoiser, normal(2, 3, 4, 4), levels)
    twice_a_step = sampler in (sde.predictor_corrector, sde.probability_flow_ode)
    assert len(asked) == (11 if twice_a_step else 6)
    assert set(asked) == {round(s, 9) for s in levels.tolist()}


def test_noise_is_unit_gaussian_unless_given():
    others = [sde.langevin, sde.expected_error, sde.principal_components, sde.posterior_mean]
    for function in POSTERIOR_SAMPLERS + others:
        assert inspect.signature(function).parameters["noise"].default is torch.randn_like


@pytest.mark.parametrize("sampler", EVERY_SAMPLER)
def test_with_one_level_samplers_give_the_posterior_mean(sampler):
    y = normal(2, 3, 4, 4)
    torch.testing.assert_close(sampler(DENOISER, y, [SIGMA]), DENOISER(y, SIGMA))


def weaker(denoiser, y, levels, noise):  # the corrector is exact for small delta
    return sde.predictor_corrector(denoiser, y, levels, delta=4 / len(levels), noise=noise)


def uneven(sigma, sigma_min, steps):
    """Return levels with log-steps of h and 2 h in turn: one for the other is of first order."""
    ramp = torch.tensor([1.0, 2.0], dtype=torch.float64).repeat(steps // 2).cumsum(0)
    return [sigma, *(sigma * (sigma_min / sigma) ** (ramp / ramp[-1])).tolist()]


@pytest.mark.parametrize("spacing", [noise_levels, uneven])
@pytest.mark.parametrize(
    "sampler, law, order",
    [(functools.partial(sde.reverse_sde, sde=process), posterior, 1) for process in SDES]
    + [(functools.partial(sde.probability_flow_ode, sde=process), flow, 2) for process in SDES]
    + [
        (sde.ancestral, posterior, 1),
        (functools.partial(sde.ancestral, eta=0.0), flow, 1),
        (sde.adams, posterior, 2),
        (functools.partial(sde.adams, eta=0.0), flow, 2),
        (weaker, posterior, 1),
        (sde.annealed_langevin, posterior, 1),
    ],
)
def test_samplers_converge_with_their_order(sampler, law, order, spacing):
    mean, std = law(stop=0.01)
    errors = []
    for steps in (60, 120):
        m, s = exact_law(sampler, spacing(SIGMA, 0.01, steps))
        errors.append(math.hypot(m - mean, s - std))
    assert errors[1] < {1: 0.05, 2: 2e-4}[order] * posterior(stop=0.01)[1]
    assert math.log2(errors[0] / errors[1]) > order - 0.3


@pytest.mark.parametrize("sampler", [sde.ancestral, sde.adams])
@pytest.mark.parametrize("eta", [0.3, 0.7])
def test_any_eta_keeps_the_marginal_law(sampler, eta):
    # y ~ N(MU, C^2 + SIGMA^2) ends as N(MU, C^2): the response to y and the sampler's own noise
    # carry the prior's variance together.
    run, levels = functools.partial(sampler, eta=eta), noise_levels(SIGMA, 1e-4, 500)
    mean, std = exact_law(run, levels, MU)
    response = exact_law(run, levels, MU + 1)[0] - mean
    assert abs((response**2 * (C**2 + SIGMA**2) + std**2) / C**2 - 1) < 0.01
    assert response > 1.05 * C**2 / (C**2 + SIGMA**2)  # more than in p(x0 | y)


@pytest.mark.parametrize("sampler", POSTERIOR_SAMPLERS)
def test_samples_fall_into_a_mixtures_modes_by_weight(sampler):
    # x0 is near one of two modes. The weights of the posterior are known; 4 standard errors.
    modes, scatter, y, n = torch.tensor([0.2, 0.8], dtype=torch.float64), 0.05, 0.45, 4000

    def denoiser(x, sigma):
        v = scatter**2 + sigma**2
        weights = torch.softmax(-((x[..., None] - modes) ** 2) / (2 * v), dim=-1)
        return (weights * (modes + scatter**2 / v * (x[..., None] - modes))).sum(-1)

    exact = torch.softmax(-((y - modes) ** 2) / (2 * (scatter**2 + SIGMA**2)), dim=0)[1].item()
    levels = noise_levels(SIGMA, 0.01, 50 if sampler is sde.adams else 200)
    many = torch.full((n, 1, 1, 1), y, dtype=torch.float64)
    samples = sampler(denoiser, many, levels, noise=stream(0))
    share = (samples > 0.5).double().mean().item()
    assert abs(share - exact) < 4 * math.sqrt(exact * (1 - exact) / n)
    for mode in modes:
        near = samples[(samples - mode).abs() < 0.3]
        conditional = mode + scatter**2 / (scatter**2 + SIGMA**2) * (y - mode)
        std = scatter * SIGMA / math.sqrt(scatter**2 + SIGMA**2)
        assert abs(near.mean().item() - conditional.item()) < 0.1 * std  # 4 standard errors
        assert abs(near.std().item() / std - 1) < 0.1


def test_only_a_corrector_that_observes_keeps_the_observation():
    mean, std = posterior(stop=0)

    def corrected(n, observe):
        sampler = functools.partial(sde.predictor_corrector, corrections=n, observe=observe)
        return exact_law(sampler, noise_levels(SIGMA, 1e-3, 40))[0]

    assert max(abs(corrected(n, True) - mean) for n in (1, 8)) < 1e-6 * std
    assert MU < corrected(8, False) < corrected(1, False) < mean


@pytest.mark.parametrize("delta", [0.1, 1.0])
@pytest.mark.parametrize("observe", [True, False])
def test_corrections_keep_the_variance_around_a_known_image(delta, observe):
    # With x0 all but known, x_s has the variance s^2, and s^2 (1 - s^2 / SIGMA^2) given y. The
    # denoiser passes on a little of it.
    c, s, options = 1e-4, 0.2, {"delta": delta, "observe": observe}
    variance = s**2 * (1 - (s / SIGMA) ** 2 if observe else 1)
    sampler = functools.partial(sde.predictor_corrector, corrections=200, **options)
    _, found = exact_law(sampler, [SIGMA, s], denoiser=white(c))
    assert abs((found * (1 + s**2 / c**2)) ** 2 / variance - 1) < 1e-5


@pytest.mark.parametrize("delta", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("c", [1e-4, C, 10.0])
def test_annealed_langevin_at_one_level_has_the_exact_law(c, delta):
    # On levels that all but stand still the state must have the law of p(x_s | y).
    s = 0.2
    levels = [SIGMA, *(s * (1 + 1e-9) ** -k for k in range(1000))]
    sampler = functools.partial(sde.annealed_langevin, delta=delta)
    (mean, std), (m, found) = posterior(s, c), exact_law(sampler, levels, denoiser=white(c))
    assert abs(m - mean) < 1e-4 * std and abs(found / std - 1) < 5e-5


@pytest.mark.parametrize("steps", [2, 3, 6])
@pytest.mark.parametrize("delta", [0.1, 1.0])
def test_annealed_langevin_around_a_known_image_is_exact(steps, delta):
    # From the first level below SIGMA on, and however few there are: nothing has to relax.
    c, s = 1e-4, 0.2
    sampler = functools.partial(sde.annealed_langevin, delta=delta)
    m, found = exact_law(sampler, noise_levels(SIGMA, s, steps), denoiser=white(c))
    unshrunk = 1 + s**2 / c**2  # the denoiser passes on this fraction of the state
    assert abs((m - MU) * unshrunk / ((s / SIGMA) ** 2 * (Y - MU)) - 1) < 1e-4
    assert abs((found * unshrunk) ** 2 / (s**2 * (1 - (s / SIGMA) ** 2)) - 1) < 1e-4


@pytest.mark.parametrize("options", [{}, {"steps": 300, "step_size": 0.02}, {"temperature": 1.0}])
def test_langevin_follows_its_recursion(options):
    # x - MU shrinks by a = 1 - step_size / (C^2 + SIGMA^2) an update; the noise is a geometric sum.
    recipe = {"steps": 100, "step_size": 1e-4, "temperature": SIGMA**2} | options
    steps, step_size, temperature = recipe.values()
    a = 1 - step_size / (C**2 + SIGMA**2)
    mean, std = exact_law(functools.partial(sde.langevin, **options), SIGMA)
    assert abs(mean - (MU + a**steps * (Y - MU))) < 1e-12
    assert abs(std**2 - 2 * step_size * temperature * (1 - a ** (2 * steps)) / (1 - a**2)) < 1e-12


def test_the_mean_of_an_antithetic_pair_is_the_posterior_mean():
    # Adams' mean is exact for a Gaussian prior, on however few levels.
    y, levels, noise = normal(3, 2, 4, 4), [SIGMA, 0.1], sde.antithetic(stream(1))
    first, second = sde.adams(DENOISER, torch.cat([y, y]), levels, noise=noise).chunk(2)
    torch.testing.assert_close(first, sde.adams(DENOISER, y, levels, noise=stream(1)))
    torch.testing.assert_close((first + second) / 2, DENOISER(y, SIGMA))
    with pytest.raises(ValueError, match="not 3"):
        noise(y)


def published_ddpm(denoiser, y, levels, noise):
    """Ho et al. 2020, algorithm 2, with alpha_bar = 1 / (1 + sigma^2) and their beta-tilde."""
    bar = [1 / (1 + s**2) for s in levels]
    x = math.sqrt(bar[0]) * y
    for a, b, s in zip(bar, bar[1:], levels):
        eps = (x / math.sqrt(a) - denoiser(x / math.sqrt(a), s)) / s
        alpha, beta = a / b, 1 - a / b
        mean = (x - beta / math.sqrt(1 - a) * eps) / math.sqrt(alpha)
        x = mean + math.sqrt((1 - b) / (1 - a) * beta) * noise(x)
    return denoiser(x / math.sqrt(bar[-1]), levels[-1])


def test_ancestral_sampling_is_the_published_one():
    y, levels = normal(2, 3, 4, 4), noise_levels(SIGMA, 0.01, 8).tolist()

    def denoiser(x, s):
        return DENOISER(x, s) + 0.05 * torch.sin(5 * x) * s

    found = sde.ancestral(denoiser, y, levels, noise=stream(0))
    published = published_ddpm(denoiser, y, levels, noise=stream(0))
    torch.testing.assert_close(found, published, rtol=1e-9, atol=1e-9)

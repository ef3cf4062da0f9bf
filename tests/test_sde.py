"""The SDEs against their published formulas, and every sampler against closed forms, in float64.

For a Gaussian prior x0 ~ N(MU, c^2), independent per pixel, the denoiser is linear, so a sampler's
result is an affine function of y and of the noise it draws. Its exact mean is the result without
noise; its exact variance is the sum of squares of its responses to a unit impulse in each draw.
Both come from the sampler's own code, given that `noise`, and are free of sampling noise: what
remains against the posterior is the error of discretisation, whose order is measured.
"""

import functools
import math
import re

import numpy as np
import pytest
import torch

import sde
import utils
from model import load_model
from sde import VE, VP, SubVP, noise_levels

MU, C, SIGMA = 0.4, 0.3, 0.5
SDES = [VE(), VP(), SubVP()]
POSTERIOR_SAMPLERS = [
    sde.reverse_sde,
    sde.ancestral,
    sde.adams,
    sde.predictor_corrector,
    sde.annealed_langevin,
]
ODE_SOLVERS = [
    sde.probability_flow_ode,
    functools.partial(sde.ancestral, eta=0.0),
    functools.partial(sde.adams, eta=0.0),
]
EVERY_SAMPLER = [*POSTERIOR_SAMPLERS, *ODE_SOLVERS]


def gaussian(c=C):
    return lambda x, sigma: MU + c**2 / (c**2 + sigma**2) * (x - MU)


def posterior(y, c=C):
    """Mean and standard deviation of p(x0 | y)."""
    return gaussian(c)(y, SIGMA), c * SIGMA / math.sqrt(c**2 + SIGMA**2)


class Impulses:
    """Noise that is zero in image 0, and one in image k + 1 in the k-th draw alone."""

    def __init__(self):
        self.draws = 0

    def __call__(self, x):
        z = torch.zeros_like(x)
        z[1 + self.draws] = 1
        self.draws += 1
        return z


def exact_mean_and_std(sampler, y, levels, denoiser=None):
    """Return the mean and standard deviation of what sampler(denoiser, y, levels, ...) gives."""
    noise = Impulses()
    images = torch.full((4 * len(levels) + 2000, 1, 1, 1), y, dtype=torch.float64)
    result = sampler(denoiser or gaussian(), images, levels, noise=noise)
    return result[0].item(), (result[1 : 1 + noise.draws] - result[0]).norm().item()


def order_of(errors):
    """Slope of log error against log step, from errors at steps doubled each time."""
    return math.log2(errors[-2] / errors[-1])


def one(y):
    return torch.full((1, 1, 1, 1), y, dtype=torch.float64)


def end_of_flow(y):
    """Return where dx/dsigma = sigma (x - MU) / (C^2 + sigma^2) carries y from SIGMA to 0."""
    return MU + (y - MU) * C / math.sqrt(C**2 + SIGMA**2)


def seeded(seed):
    rng = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, dtype=x.dtype, generator=rng)


def recipe(steps, step_size, temperature=None):
    """Return sde.langevin, called as the other samplers are."""

    def sampler(denoiser, y, levels, noise):
        return sde.langevin(denoiser, y, levels[0], steps, step_size, temperature, noise)

    return sampler


# -----------------------------------------------------------------------------
# SDEs
# -----------------------------------------------------------------------------


@pytest.mark.parametrize("process", SDES, ids=lambda s: type(s).__name__)
def test_time_is_the_inverse_of_sigma(process):
    sigma = torch.logspace(1.5, -3, 50, dtype=torch.float64)
    torch.testing.assert_close(process.sigma(process.times(sigma)), sigma, rtol=1e-9, atol=0)


def test_ve_has_the_published_coefficients():
    # Song et al. 2021, app. C: g = a (b / a)^t sqrt(2 log(b / a)), a = sigma_min, b = sigma_max.
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    assert torch.equal(VE().drift(t), torch.zeros_like(t))
    assert torch.equal(VE().alpha(t), torch.ones_like(t))
    g = 0.01 * 5000**t * math.sqrt(2 * math.log(5000))
    torch.testing.assert_close(VE(0.01, 50).diffusion(t), g)


def test_vp_has_the_published_coefficients():
    # Song et al. 2021, app. C: f = -beta / 2, g = sqrt(beta); the variances sum to one.
    t = torch.linspace(0.01, 1, 5, dtype=torch.float64)
    beta, process = 0.1 + 19.9 * t, VP(0.1, 20)
    torch.testing.assert_close(process.drift(t), -beta / 2)
    torch.testing.assert_close(process.diffusion(t), beta.sqrt())
    variance = process.alpha(t) ** 2 * (1 + process.sigma(t) ** 2)
    torch.testing.assert_close(variance, torch.ones_like(t))


def test_sub_vp_has_the_published_coefficients():
    # Song et al. 2021, app. C: f = -beta / 2, g^2 = beta (1 - e^(-2 B)), and noise of standard
    # deviation 1 - e^(-B), with B the integral of beta.
    t = torch.linspace(0.01, 1, 5, dtype=torch.float64)
    process = SubVP(0.1, 20)
    beta, decay = 0.1 + 19.9 * t, torch.exp(-(0.1 * t + 9.95 * t**2))
    torch.testing.assert_close(process.drift(t), -beta / 2)
    torch.testing.assert_close(process.diffusion(t) ** 2, beta * (1 - decay**2))
    torch.testing.assert_close(process.alpha(t) * process.sigma(t), 1 - decay)


@pytest.mark.parametrize("process", SDES, ids=lambda s: type(s).__name__)
def test_the_score_of_a_gaussian_is_exact(process):
    t = torch.tensor(0.3, dtype=torch.float64)
    alpha, sigma = process.alpha(t), process.sigma(t)
    x_t = torch.linspace(-2, 2, 100, dtype=torch.float64)
    score = -(x_t - alpha * MU) / (alpha**2 * (C**2 + sigma**2))
    torch.testing.assert_close(process.score(gaussian(), x_t, t), score)
    flow = process.drift(t) * x_t - process.diffusion(t) ** 2 / 2 * score
    torch.testing.assert_close(process.flow(gaussian(), x_t, t), flow)


# -----------------------------------------------------------------------------
# What a sampler is given
# -----------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "wrong",
    [
        {"sigma": 0.0},
        {"sigma": 1e-320},
        {"sigma_min": 1e-320},
        {"sigma": math.nan},
        {"sigma": math.inf},
    ]
    + [{"steps": 0}, {"steps": 2.5}, {"rho": 0.0}, {"rho": 1e-4}, {"rho": 1e17}],
)
def test_levels_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=re.escape(str(next(iter(wrong.values()))))):
        noise_levels(**{"sigma": SIGMA, "sigma_min": 0.01, "steps": 5} | wrong)


@pytest.mark.parametrize("sampler", EVERY_SAMPLER)
@pytest.mark.parametrize(
    "levels",
    [[], [0.1, 0.5], [0.5, 0.5], [0.5, 0.0], [0.5, -0.1], [math.nan, 0.1], [math.inf, 0.1]],
)
def test_samplers_refuse_levels_that_do_not_fall(sampler, levels):
    with pytest.raises(ValueError, match="falling"):
        sampler(gaussian(), torch.rand(1, 3, 4, 4), levels)


@pytest.mark.parametrize("sampler", POSTERIOR_SAMPLERS)
def test_one_seed_an_image_frees_it_of_its_batch(sampler):
    y = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    levels = noise_levels(SIGMA, 0.01, 5)

    def sample(y, seeds):
        return sampler(gaussian(), y, levels, noise=utils.seeded_noise(seeds))

    together = sample(y, [7, 8, 9])
    assert torch.equal(sample(y[1:2], [8]), together[1:2])
    assert torch.equal(sample(y.flip(0), [9, 8, 7]), together.flip(0))
    assert not torch.equal(sample(y, [1, 2, 3]), together)
    with pytest.raises(ValueError, match="2 seeds for 3 images"):
        sample(y, [1, 2])


# -----------------------------------------------------------------------------
# Samplers
# -----------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", EVERY_SAMPLER)
def test_with_one_level_samplers_give_the_posterior_mean(sampler):
    y = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(sampler(gaussian(), y, [SIGMA]), posterior(y)[0])


@pytest.mark.parametrize("process", SDES, ids=lambda s: type(s).__name__)
def test_reverse_sde_converges_with_order_one(process):
    mean, std = posterior(1.3)
    mean_errors, std_errors = [], []
    for steps in (50, 100, 200):
        sampler = functools.partial(sde.reverse_sde, sde=process)
        m, s = exact_mean_and_std(sampler, 1.3, noise_levels(SIGMA, 1e-3, steps))
        mean_errors.append(abs(m - mean))
        std_errors.append(abs(s - std))
    assert mean_errors[-1] < 0.04 * std and std_errors[-1] < 0.04 * std
    assert abs(order_of(mean_errors) - 1) < 0.1 and abs(order_of(std_errors) - 1) < 0.1


def test_samples_have_the_law_that_their_impulses_predict():
    levels = noise_levels(SIGMA, 0.01, 20)
    mean, std = exact_mean_and_std(sde.reverse_sde, 1.3, levels)
    y = torch.full((10, 1, 50, 50), 1.3, dtype=torch.float64)
    samples = sde.reverse_sde(gaussian(), y, levels, noise=seeded(0))
    assert abs(samples.mean().item() - mean) < 4 * std / math.sqrt(samples.numel())
    assert abs(samples.var().item() / std**2 - 1) < 4 * math.sqrt(2 / samples.numel())


@pytest.mark.parametrize("process", SDES, ids=lambda s: type(s).__name__)
def test_probability_flow_converges_with_order_two(process):
    errors = []
    for steps in (20, 40, 80):
        levels = noise_levels(SIGMA, 1e-4, steps)
        found = sde.probability_flow_ode(gaussian(), one(1.3), levels, process).item()
        errors.append(abs(found - end_of_flow(1.3)))
    assert errors[-1] < 1e-4
    assert abs(order_of(errors) - 2) < 0.2


@pytest.mark.parametrize(
    "sampler, order",
    [(sde.ancestral, 1), (sde.predictor_corrector, 1), (sde.annealed_langevin, 1), (sde.adams, 2)],
    ids=lambda v: getattr(v, "__name__", ""),
)
@pytest.mark.parametrize("rho", [3.0, 7.0, math.inf])
def test_posterior_samplers_converge_with_their_order(sampler, order, rho):
    mean, std = posterior(1.3)
    errors = []
    for steps in (20, 40, 80):
        run = sampler
        if sampler is sde.predictor_corrector:  # its corrector is exact for small delta
            run = functools.partial(sampler, delta=4 / steps)
        m, s = exact_mean_and_std(run, 1.3, noise_levels(SIGMA, 1e-3, steps, rho))
        errors.append(math.hypot(m - mean, s - std))
    assert errors[-1] < 0.2 * std
    assert order_of(errors) > order - 0.15


def test_adams_is_of_second_order_on_uneven_levels():
    # Steps of h and 2 h in turn: taking one step for the other is of first order here.
    mean, std = posterior(1.3)
    errors = []
    for pairs in (10, 20, 40):
        steps = torch.tensor([0.0] + [1.0, 2.0] * pairs, dtype=torch.float64)
        levels = SIGMA * (1e-2 / SIGMA) ** (steps.cumsum(0) / (3 * pairs))
        m, s = exact_mean_and_std(sde.adams, 1.3, levels)
        left = C**2 * 1e-4 / (C**2 + 1e-4)  # what the last step takes away
        errors.append(math.hypot(m - mean, s - math.sqrt(std**2 - left)))
    assert order_of(errors) > 1.8


def test_adams_with_40_calls_beats_first_order_400():
    mean, std = posterior(1.3)
    errors = {}
    for sampler, steps in ((sde.adams, 40), (sde.ancestral, 400), (sde.reverse_sde, 400)):
        m, s = exact_mean_and_std(sampler, 1.3, noise_levels(SIGMA, 1e-3, steps))
        errors[sampler] = math.hypot(m - mean, s - std)
    assert errors[sde.adams] < errors[sde.ancestral] and errors[sde.adams] < errors[sde.reverse_sde]


@pytest.mark.parametrize("sampler, order", [(sde.ancestral, 1), (sde.adams, 2)])
def test_without_noise_they_solve_the_probability_flow(sampler, order):
    errors = []
    for steps in (160, 320, 640):
        levels = noise_levels(SIGMA, 1e-5, steps)
        found = sampler(gaussian(), one(1.3), levels, eta=0.0).item()
        errors.append(abs(found - end_of_flow(1.3)))
    assert abs(order_of(errors) - order) < 0.3 and errors[-1] < 0.01


@pytest.mark.parametrize("sampler", [sde.ancestral, sde.adams])
def test_any_eta_keeps_the_marginal_law(sampler):
    # y ~ N(MU, C^2 + SIGMA^2) ends as N(MU, C^2): the response to y and the sampler's own noise
    # carry the prior's variance together.
    levels = noise_levels(SIGMA, 1e-4, 500)
    for eta in (0.3, 0.7):
        run = functools.partial(sampler, eta=eta)
        mean, std = exact_mean_and_std(run, MU, levels)
        response = exact_mean_and_std(run, MU + 1, levels)[0] - mean
        assert abs((response**2 * (C**2 + SIGMA**2) + std**2) / C**2 - 1) < 0.01
        assert response > 1.05 * C**2 / (C**2 + SIGMA**2)  # more than in p(x0 | y)


def test_only_a_corrector_that_observes_keeps_the_observation():
    mean, std = posterior(1.3)
    levels = noise_levels(SIGMA, 1e-3, 40)
    observing, forgetting = (
        [
            exact_mean_and_std(
                functools.partial(sde.predictor_corrector, corrections=n, observe=observe),
                1.3,
                levels,
            )[0]
            for n in (1, 8)
        ]
        for observe in (True, False)
    )
    assert max(abs(m - mean) for m in observing) < 1e-6 * std
    assert MU < forgetting[1] < forgetting[0] < mean
    assert forgetting[1] - MU < 0.5 * (mean - MU)


def test_the_pull_of_y_in_the_sde_counts_twice():
    # score + (y - x) / (SIGMA^2 - t^2) in Euler-Maruyama, as in published code.
    mean, std = posterior(1.3)

    def pulled(denoiser, y, levels, noise):
        x = y
        for t, s in sde.falling(levels):
            score = (denoiser(x, t) - x) / t**2
            if t < SIGMA:
                score = score + (y - x) / (SIGMA**2 - t**2)
            x = x + (t**2 - s**2) * score + math.sqrt(t**2 - s**2) * noise(x)
        return denoiser(x, s)

    m, s = exact_mean_and_std(pulled, 1.3, noise_levels(SIGMA, 1e-3, 400))
    assert m > mean + 0.5 * std and s < 0.8 * std


@pytest.mark.parametrize("stop", [0.3, 0.1, 0.03])
def test_an_sde_stopped_early_is_between_mean_and_sample(stop):
    # D(x_s, s) is E[x0 | x_s]: its variance given y is Var[x0 | y] - Var[x0 | x_s].
    mean, std = posterior(1.3)
    m, s = exact_mean_and_std(sde.adams, 1.3, noise_levels(SIGMA, stop, 100))
    assert abs(m - mean) < 1e-6 * std
    assert abs(s**2 / (std**2 - C**2 * stop**2 / (C**2 + stop**2)) - 1) < 0.01


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
    samples = sampler(denoiser, many, levels, noise=seeded(0))
    share = (samples > 0.5).double().mean().item()
    assert abs(share - exact) < 4 * math.sqrt(exact * (1 - exact) / n)
    for mode in modes:
        near = samples[(samples - mode).abs() < 0.3]
        conditional = mode + scatter**2 / (scatter**2 + SIGMA**2) * (y - mode)
        std = scatter * SIGMA / math.sqrt(scatter**2 + SIGMA**2)
        assert abs(near.mean().item() - conditional.item()) < 0.1 * std  # 4 standard errors
        assert abs(near.std().item() / std - 1) < 0.1


@pytest.mark.parametrize("delta", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("c", [1e-4, C, 10.0])
def test_annealed_langevin_at_one_level_has_the_exact_law(c, delta):
    # On levels that all but stand still the state must have the law of p(x_s | y).
    s, (mean, std) = 0.2, posterior(1.3, c)
    variance = std**2 - c**2 * s**2 / (c**2 + s**2)  # of E[x0 | x_s] given y
    levels = [SIGMA, *(s * (1 + 1e-9) ** -k for k in range(1000))]
    sampler = functools.partial(sde.annealed_langevin, delta=delta)
    m, found = exact_mean_and_std(sampler, 1.3, levels, gaussian(c))
    assert abs(m - mean) < 1e-4 * math.sqrt(variance) and abs(found**2 / variance - 1) < 1e-4


@pytest.mark.parametrize("delta", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("observe", [True, False])
def test_corrections_keep_the_variance_around_a_known_image(delta, observe):
    # With x0 all but known, x_s has the variance s^2, and s^2 (1 - s^2 / SIGMA^2) given y. The
    # denoiser passes on a little of it.
    c, s = 1e-4, 0.2
    variance = s**2 * (1 - (s / SIGMA) ** 2 if observe else 1)
    sampler = functools.partial(
        sde.predictor_corrector, corrections=200, delta=delta, observe=observe
    )
    _, found = exact_mean_and_std(sampler, 1.3, [SIGMA, s], gaussian(c))
    assert abs((found * (1 + s**2 / c**2)) ** 2 / variance - 1) < 1e-5


@pytest.mark.parametrize("steps", [2, 3, 6])
@pytest.mark.parametrize("delta", [0.1, 1.0])
def test_annealed_langevin_around_a_known_image_is_exact(steps, delta):
    # From the first level below SIGMA on, and however few there are: nothing has to relax.
    c, s = 1e-4, 0.2
    sampler = functools.partial(sde.annealed_langevin, delta=delta)
    m, found = exact_mean_and_std(sampler, 1.3, noise_levels(SIGMA, s, steps), gaussian(c))
    unshrunk = 1 + s**2 / c**2  # the denoiser passes on this fraction of the state
    assert abs((m - MU) * unshrunk / ((s / SIGMA) ** 2 * (1.3 - MU)) - 1) < 1e-4
    assert abs((found * unshrunk) ** 2 / (s**2 * (1 - (s / SIGMA) ** 2)) - 1) < 1e-4


@pytest.mark.parametrize("sampler", [sde.predictor_corrector, sde.annealed_langevin])
@pytest.mark.parametrize("delta", [0.0, 2.0, 2.5])
def test_a_langevin_step_that_diverges_is_refused(sampler, delta):
    with pytest.raises(ValueError, match=str(delta)):
        sampler(gaussian(), torch.rand(1, 3, 4, 4), [SIGMA, 0.1], delta=delta)


@pytest.mark.parametrize("sampler", [sde.ancestral, sde.adams])
@pytest.mark.parametrize("eta", [-0.1, 1.5, math.nan])
def test_an_eta_beyond_zero_to_one_is_refused(sampler, eta):
    with pytest.raises(ValueError, match=f"eta .* not {eta}"):
        sampler(gaussian(), torch.rand(1, 3, 4, 4), [SIGMA, 0.1], eta=eta)


@pytest.mark.parametrize("sampler", ODE_SOLVERS)
def test_flows_do_not_depend_on_the_noise(sampler):
    y = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    results = [
        sampler(gaussian(), y, [SIGMA, 0.2, 0.1], noise=utils.seeded_noise([seed, 3]))
        for seed in (1, 2)
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("sampler", [*POSTERIOR_SAMPLERS, sde.probability_flow_ode])
def test_the_network_is_called_as_often_as_said(sampler):
    asked = []

    def denoiser(x, s):
        asked.append(round(float(s), 9))
        return gaussian()(x, s)

    levels = noise_levels(SIGMA, 0.01, 6)
    sampler(denoiser, torch.rand(2, 3, 4, 4), levels)
    twice_a_step = sampler in (sde.predictor_corrector, sde.probability_flow_ode)
    assert len(asked) == (11 if twice_a_step else 6)
    assert set(asked) == {round(s, 9) for s in levels.tolist()}


# -----------------------------------------------------------------------------
# Antithetic pairs
# -----------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [*POSTERIOR_SAMPLERS, recipe(20, 0.01)])
def test_the_mean_of_an_antithetic_pair_is_free_of_the_noise(sampler):
    # All these updates are linear for a Gaussian prior, so it is the sampler's own mean.
    y = torch.rand(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    levels = noise_levels(SIGMA, 0.01, 5)
    pairs = sampler(gaussian(), torch.cat([y, y]), levels, noise=sde.antithetic(seeded(1)))
    silent = sampler(gaussian(), y, levels, noise=torch.zeros_like)
    torch.testing.assert_close((pairs[:3] + pairs[3:]) / 2, silent)
    assert (pairs[:3] - pairs[3:]).abs().mean() > 0.1


def test_the_mean_of_an_antithetic_pair_is_the_posterior_mean():
    # Adams' mean is exact for a Gaussian prior, on however few levels.
    y = torch.rand(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pairs = sde.adams(gaussian(), torch.cat([y, y]), [SIGMA, 0.1], noise=sde.antithetic(seeded(1)))
    torch.testing.assert_close((pairs[:3] + pairs[3:]) / 2, posterior(y)[0])


def test_on_the_network_a_pair_is_worth_many_samples():
    # On 24 images of CIFAR-10 its mean is 0.14 dB below the one-step estimate; that of two
    # independent samples is 1.58 dB below, by theory 1.76.
    photographs = np.stack([array for _, array in utils.sample_photographs(32)])
    x0 = torch.from_numpy(photographs).permute(0, 3, 1, 2) / 255
    y = x0 + 0.1 * seeded(0)(x0)
    model = load_model("checkpoints/score_cifar10.pt")
    with torch.no_grad():
        one_step = utils.psnr(model(y, 0.1), x0)
        pairs = sde.adams(
            model, torch.cat([y, y]), noise_levels(0.1, 0.01, 10), noise=sde.antithetic(seeded(1))
        )
    first, second = pairs.chunk(2)
    assert abs((utils.psnr((first + second) / 2, x0) - one_step).mean()) < 0.4
    assert (utils.psnr(first, x0) - one_step).mean() < -2


def test_antithetic_noise_is_unit_gaussian_and_needs_two_halves():
    z = sde.antithetic(seeded(0))(torch.zeros(20, 3, 50, 50))
    assert torch.equal(z[:10], -z[10:])
    assert abs(z.var().item() - 1) < 4 * math.sqrt(2 / z[:10].numel())
    with pytest.raises(ValueError, match="not 3"):
        sde.antithetic(seeded(0))(torch.zeros(3, 1, 2, 2))


# -----------------------------------------------------------------------------
# Published samplers, from their papers' formulas
# -----------------------------------------------------------------------------


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


def published_ddim(denoiser, y, levels, noise):
    """Song, Meng, Ermon 2021, eq. 13: Euler's method for d(x / sqrt(alpha_bar)) = eps d(sigma)."""
    x = y
    for t, s in zip(levels, levels[1:]):
        x = x + (s - t) * (x - denoiser(x, t)) / t
    return denoiser(x, levels[-1])


def published_edm(denoiser, y, levels, noise):
    """Karras et al. 2022, algorithm 1: Heun's method; sigma is the time, as in the SDE below."""
    x = y
    for t, s in zip(levels, levels[1:]):
        d = (x - denoiser(x, t)) / t
        x_s = x + (s - t) * d
        x = x + (s - t) * (d + (x_s - denoiser(x_s, s)) / s) / 2
    return denoiser(x, levels[-1])


def sigma_is_time():  # the process of Karras et al. 2022: x_t = x0 + t n
    return sde.LinearSDE(lambda t: 0 * t, lambda t: t, lambda s: s)


@pytest.mark.parametrize(
    "ours, published",
    [
        (sde.ancestral, published_ddpm),
        (functools.partial(sde.ancestral, eta=0.0), published_ddim),
        (functools.partial(sde.probability_flow_ode, sde=sigma_is_time()), published_edm),
    ],
    ids=["ddpm", "ddim", "edm"],
)
def test_samplers_equal_the_published_ones(ours, published):
    y = torch.rand(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    levels = noise_levels(SIGMA, 0.01, 8).tolist()

    def denoiser(x, s):
        return gaussian()(x, s) + 0.05 * torch.sin(5 * x) * s

    results = [
        sampler(denoiser, y, levels, noise=utils.seeded_noise([1, 2]))
        for sampler in (ours, published)
    ]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


# -----------------------------------------------------------------------------
# The recipe
# -----------------------------------------------------------------------------


def test_langevin_follows_its_recursion_and_forgets_the_observation():
    # x - MU shrinks by a = 1 - step_size / (C^2 + SIGMA^2) an update; the noise is a geometric sum.
    step_size, steps = 0.02, 300
    a, v = 1 - step_size / (C**2 + SIGMA**2), 2 * step_size * SIGMA**2
    mean, std = exact_mean_and_std(recipe(steps, step_size), 1.3, [SIGMA])
    assert abs(mean - (MU + a**steps * (1.3 - MU))) < 1e-12
    assert abs(std**2 - v * (1 - a ** (2 * steps)) / (1 - a**2)) < 1e-12
    assert abs(mean - MU) < 1e-6 < abs(posterior(1.3)[0] - MU)


def test_langevin_at_temperature_one_samples_p_sigma():
    # Its stationary variance is that of p_sigma, C^2 + SIGMA^2, to first order in the step.
    errors = []
    for step_size in (0.02, 0.01):
        _, std = exact_mean_and_std(recipe(round(10 / step_size), step_size, 1.0), 1.3, [SIGMA])
        errors.append(abs(std**2 - (C**2 + SIGMA**2)))
    assert errors[-1] < 0.02 * (C**2 + SIGMA**2) and abs(order_of(errors) - 1) < 0.1


@pytest.mark.parametrize(
    "wrong",
    [{"sigma": 0.0}, {"step_size": -1.0}, {"steps": 0}, {"steps": 2.5}, {"step_size": math.nan}],
)
def test_langevin_refuses_numbers_that_are_not_positive(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        sde.langevin(gaussian(), torch.rand(1, 3, 4, 4), **{"sigma": SIGMA, "steps": 2} | wrong)

"""The SDEs against their published formulas, and every sampler against closed forms, in float64.

For a Gaussian prior x0 ~ N(MU, C^2), independent per pixel, the denoiser is linear, so a sampler's result is an affine
function of y and of the noise it draws. Its exact mean is the result without noise; its exact variance is the sum of
squares of its responses to a unit impulse in each draw. Both come from the sampler's own code, with the noise source
replaced, and are free of sampling noise: what remains against the posterior is the error of discretisation, whose
order is measured.
"""

import math

import pytest
import torch

import sde
from sde import VE, VP, CosineVP, SubVP

MU, C, SIGMA = 0.4, 0.3, 0.5
SDES = [VE(), VP(), SubVP(), CosineVP()]
POSTERIOR_SAMPLERS = [sde.reverse_sde, sde.ddim, sde.adams, sde.edm, sde.predictor_corrector, sde.annealed_langevin]


def gaussian_denoiser(x, sigma):
    return MU + C**2 / (C**2 + sigma**2) * (x - MU)


def posterior(y):
    """Mean and standard deviation of p(x0 | y)."""
    return gaussian_denoiser(y, SIGMA), C * SIGMA / math.sqrt(C**2 + SIGMA**2)


def exact_mean_and_std(monkeypatch, sampler, y, draws, **options):
    """Return what `sampler` gives on average, and its standard deviation, from `draws` impulses in one batch."""
    step = 0

    def impulses():
        nonlocal step
        z = torch.zeros(draws + 1, 1, 1, 1, dtype=torch.float64)
        if step < draws:
            z[step + 1] = 1
        step += 1
        return z

    with monkeypatch.context() as patch:
        patch.setattr(sde, "_noise_source", lambda y, generator: impulses)
        result = sampler(gaussian_denoiser, torch.full((draws + 1, 1, 1, 1), y, dtype=torch.float64), SIGMA, **options)
    assert step == draws, "the sampler drew another number of times than the test assumed"
    return result[0].item(), (result[1:] - result[0]).norm().item()


def order_of(errors):
    """Slope of log error against log step, from errors at steps doubled each time."""
    return math.log2(errors[-2] / errors[-1])


# -----------------------------------------------------------------------------
# SDEs
# -----------------------------------------------------------------------------


@pytest.mark.parametrize("process", SDES, ids=lambda s: type(s).__name__)
def test_time_is_the_inverse_of_sigma(process):
    sigma = torch.logspace(-3, 1.5, 50, dtype=torch.float64)
    torch.testing.assert_close(process.sigma(process.time(sigma)), sigma, rtol=1e-9, atol=0)


@pytest.mark.parametrize("process", SDES, ids=lambda s: type(s).__name__)
def test_drift_and_diffusion_carry_the_variance_that_alpha_and_sigma_state(process):
    # Var x_t = alpha^2 (C^2 + sigma^2) must solve v' = 2 f v + g^2; the derivative here is a central difference.
    t, h = torch.linspace(0.1, 0.9, 9, dtype=torch.float64), 1e-5
    variance = lambda t: process.alpha(t) ** 2 * (C**2 + process.sigma(t) ** 2)  # noqa: E731
    slope = (variance(t + h) - variance(t - h)) / (2 * h)
    torch.testing.assert_close(slope, 2 * process.drift(t) * variance(t) + process.diffusion(t) ** 2, rtol=1e-6, atol=1e-8)


def test_ve_has_the_published_coefficients():
    # Song et al. 2021, app. C: g = sigma_min (sigma_max / sigma_min)^t sqrt(2 log(sigma_max / sigma_min)).
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    assert torch.equal(VE().drift(t), torch.zeros_like(t)) and torch.equal(VE().alpha(t), torch.ones_like(t))
    torch.testing.assert_close(VE(0.01, 50).diffusion(t), 0.01 * 5000**t * math.sqrt(2 * math.log(5000)))


def test_vp_has_the_published_coefficients():
    # Song et al. 2021, app. C: f = -beta / 2, g = sqrt(beta), and signal and noise variances add up to one.
    t = torch.linspace(0.01, 1, 5, dtype=torch.float64)
    beta, process = 0.1 + 19.9 * t, VP(0.1, 20)
    torch.testing.assert_close(process.drift(t), -beta / 2)
    torch.testing.assert_close(process.diffusion(t), beta.sqrt())
    torch.testing.assert_close(process.alpha(t) ** 2 * (1 + process.sigma(t) ** 2), torch.ones_like(t))


def test_sub_vp_has_the_published_coefficients():
    # Song et al. 2021, app. C: f = -beta / 2, g^2 = beta (1 - e^(-2 B)) and noise of standard deviation 1 - e^(-B), B = int beta.
    t = torch.linspace(0.01, 1, 5, dtype=torch.float64)
    beta, decay, process = 0.1 + 19.9 * t, torch.exp(-(0.1 * t + 9.95 * t**2)), SubVP(0.1, 20)
    torch.testing.assert_close(process.drift(t), -beta / 2)
    torch.testing.assert_close(process.diffusion(t) ** 2, beta * (1 - decay**2))
    torch.testing.assert_close(process.alpha(t) * process.sigma(t), 1 - decay)


def test_cosine_vp_is_the_vp_process_of_its_alpha():
    # alpha = cos(pi t / 2), and beta = -2 (log alpha)' = pi tan(pi t / 2), so that f = -beta / 2 and g^2 = beta.
    t = torch.linspace(0.01, 0.95, 5, dtype=torch.float64)
    beta, process = math.pi * (math.pi / 2 * t).tan(), CosineVP()
    torch.testing.assert_close(process.drift(t), -beta / 2)
    torch.testing.assert_close(process.diffusion(t) ** 2, beta)
    torch.testing.assert_close(process.alpha(t) ** 2 * (1 + process.sigma(t) ** 2), torch.ones_like(t))


@pytest.mark.parametrize("process", SDES, ids=lambda s: type(s).__name__)
def test_the_score_of_a_gaussian_is_exact_at_every_time(process):
    t, rng = torch.tensor(0.3, dtype=torch.float64), torch.Generator().manual_seed(0)
    alpha, sigma = process.alpha(t), process.sigma(t)
    x_t = process.perturb(MU, t, torch.randn(100, dtype=torch.float64, generator=rng))
    torch.testing.assert_close(process.score(gaussian_denoiser, x_t, t), -(x_t - alpha * MU) / (alpha**2 * (C**2 + sigma**2)))


def test_noise_levels_fall_evenly_in_the_chosen_power():
    levels = sde.noise_levels(0.5, 0.01, 9, rho=3.0)
    assert levels[0] == 0.5 and levels[-1] == 0.01
    torch.testing.assert_close(
        (levels ** (1 / 3)).diff(), torch.full((8,), (0.01 ** (1 / 3) - 0.5 ** (1 / 3)) / 8, dtype=torch.float64)
    )
    geometric = sde.noise_levels(0.5, 0.01, 9, rho=math.inf)
    torch.testing.assert_close(geometric.log().diff(), torch.full((8,), math.log(0.02) / 8, dtype=torch.float64))
    assert sde.noise_levels(0.5, 0.01, 1).tolist() == [0.5] and sde.noise_levels(0.005, 0.01, 9).tolist() == [0.005]


# -----------------------------------------------------------------------------
# Samplers
# -----------------------------------------------------------------------------


def test_tweedie_is_the_posterior_mean():
    y = torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sde.tweedie(gaussian_denoiser, y, SIGMA), posterior(y)[0])


@pytest.mark.parametrize("process", SDES, ids=lambda s: type(s).__name__)
def test_reverse_sde_converges_to_the_gaussian_posterior_with_order_one(monkeypatch, process):
    mean, std = posterior(1.3)
    mean_errors, std_errors = [], []
    for steps in (50, 100, 200, 400):
        m, s = exact_mean_and_std(monkeypatch, sde.reverse_sde, 1.3, steps - 1, steps=steps, sde=process, sigma_min=1e-3)
        mean_errors.append(abs(m - mean))
        std_errors.append(abs(s - std))
    assert mean_errors[-1] < 0.02 * std and std_errors[-1] < 0.02 * std
    assert abs(order_of(mean_errors) - 1) < 0.1 and abs(order_of(std_errors) - 1) < 0.1


def test_reverse_sde_draws_have_the_law_that_its_impulses_predict(monkeypatch):
    mean, std = exact_mean_and_std(monkeypatch, sde.reverse_sde, 1.3, 19, steps=20)
    y = torch.full((10, 1, 50, 50), 1.3, dtype=torch.float64)
    draws = sde.reverse_sde(gaussian_denoiser, y, SIGMA, steps=20, generator=torch.Generator().manual_seed(0))
    assert abs(draws.mean().item() - mean) < 4 * std / math.sqrt(draws.numel())
    assert abs(draws.var().item() / std**2 - 1) < 4 * math.sqrt(2 / draws.numel())


@pytest.mark.parametrize("process", SDES, ids=lambda s: type(s).__name__)
def test_probability_flow_converges_to_its_closed_form_with_order_two(process):
    # dx/dsigma = sigma (x - MU) / (C^2 + sigma^2) carries y to MU + (y - MU) C / sqrt(C^2 + SIGMA^2) at sigma = 0.
    y = torch.full((1, 1, 1, 1), 1.3, dtype=torch.float64)
    exact = MU + (1.3 - MU) * C / math.sqrt(C**2 + SIGMA**2)
    run = lambda steps: sde.probability_flow_ode(gaussian_denoiser, y, SIGMA, steps, process, sigma_min=1e-4).item()  # noqa: E731
    errors = [abs(run(steps) - exact) for steps in (20, 40, 80, 160)]
    assert errors[-1] < 1e-4
    assert abs(order_of(errors) - 2) < 0.1


@pytest.mark.parametrize(
    "sampler, draws, order",
    [
        (sde.ddim, lambda n: n - 1, 1),
        (sde.edm, lambda n: n - 1, 1),
        (sde.predictor_corrector, lambda n: 2 * (n - 1), 1),
        (sde.annealed_langevin, lambda n: n, 1),
        (sde.adams, lambda n: n - 1, 2),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
@pytest.mark.parametrize("rho", [7.0, math.inf])
def test_posterior_samplers_converge_to_the_gaussian_posterior_with_their_order(monkeypatch, sampler, draws, order, rho):
    mean, std = posterior(1.3)
    errors = []
    for steps in (20, 40, 80):
        shrink = {"delta": 4 / steps} if sampler is sde.predictor_corrector else {}  # its corrector is exact for small delta
        m, s = exact_mean_and_std(monkeypatch, sampler, 1.3, draws(steps), steps=steps, sigma_min=1e-3, rho=rho, **shrink)
        errors.append(math.hypot(m - mean, s - std))
    assert errors[-1] < 0.2 * std
    assert order_of(errors) > order - 0.15


def test_the_few_step_solver_with_40_calls_beats_first_order_ones_with_400(monkeypatch):
    mean, std = posterior(1.3)
    errors = {}
    for name, sampler, steps in (("adams", sde.adams, 40), ("ddim", sde.ddim, 400), ("sde", sde.reverse_sde, 400)):
        m, s = exact_mean_and_std(monkeypatch, sampler, 1.3, steps - 1, steps=steps, sigma_min=1e-3)
        errors[name] = math.hypot(m - mean, s - std)
    assert errors["adams"] < errors["ddim"] and errors["adams"] < errors["sde"]


@pytest.mark.parametrize("sampler, order", [(sde.ddim, 1), (sde.adams, 2)])
def test_without_noise_they_solve_the_probability_flow(sampler, order):
    y = torch.full((1, 1, 1, 1), 1.3, dtype=torch.float64)
    exact = MU + (1.3 - MU) * C / math.sqrt(C**2 + SIGMA**2)
    errors = [
        abs(sampler(gaussian_denoiser, y, SIGMA, steps, eta=0.0, sigma_min=1e-5).item() - exact) for steps in (160, 320, 640)
    ]
    assert abs(order_of(errors) - order) < 0.3 and errors[-1] < 0.01


def test_only_the_churn_of_the_reverse_sde_keeps_the_observation(monkeypatch):
    # Any churn keeps the marginal law of x0; the posterior mean given y is kept by churn 1 alone.
    mean, std = posterior(1.3)
    means = {
        c: exact_mean_and_std(monkeypatch, sde.edm, 1.3, 199, steps=200, churn=c, sigma_min=1e-3)[0] for c in (0.5, 1.0, 2.0)
    }
    assert abs(means[1.0] - mean) < 0.02 * std
    assert means[0.5] > mean + 0.1 * std and means[2.0] < mean - 0.1 * std


def test_only_a_corrector_that_observes_keeps_the_observation(monkeypatch):
    mean, std = posterior(1.3)
    means = {}
    for observe in (True, False):
        for corrections in (1, 8):
            options = {"steps": 40, "corrections": corrections, "delta": 0.1, "observe": observe, "sigma_min": 1e-3}
            draws = 39 * (1 + corrections)
            means[observe, corrections], _ = exact_mean_and_std(monkeypatch, sde.predictor_corrector, 1.3, draws, **options)
    assert abs(means[True, 1] - mean) < 1e-6 * std and abs(means[True, 8] - mean) < 1e-6 * std
    assert MU < means[False, 8] < means[False, 1] < mean and means[False, 8] - MU < 0.5 * (mean - MU)


@pytest.mark.parametrize("stop", [0.3, 0.1, 0.03])
def test_an_sde_stopped_early_lies_between_the_mean_and_a_draw(monkeypatch, stop):
    # D(x_s, s) is E[x0 | x_s]: its variance given y is what x_s knows of x0 beyond y, Var[x0 | y] - Var[x0 | x_s].
    mean, std = posterior(1.3)
    m, s = exact_mean_and_std(monkeypatch, sde.adams, 1.3, 99, steps=100, sigma_min=stop)
    assert abs(m - mean) < 1e-6 * std
    assert abs(s**2 / (std**2 - C**2 * stop**2 / (C**2 + stop**2)) - 1) < 0.01


def test_draws_fall_into_the_modes_of_a_mixture_with_the_posterior_weights():
    # x0 is a or b with scatter C: the weights of the posterior given y are known, and 4 standard errors are allowed.
    modes, scatter, y, n = torch.tensor([0.2, 0.8], dtype=torch.float64), 0.05, 0.45, 4000

    def denoiser(x, sigma):
        v = scatter**2 + sigma**2
        weights = torch.softmax(-((x[..., None] - modes) ** 2) / (2 * v), dim=-1)
        return (weights * (modes + scatter**2 / v * (x[..., None] - modes))).sum(-1)

    exact = torch.softmax(-((y - modes) ** 2) / (2 * (scatter**2 + SIGMA**2)), dim=0)[1].item()
    for sampler, options in (
        (sde.reverse_sde, {"steps": 200}),
        (sde.ddim, {"steps": 200}),
        (sde.edm, {"steps": 100}),
        (sde.adams, {"steps": 50}),
        (sde.predictor_corrector, {"steps": 100}),
        (sde.annealed_langevin, {"steps": 100}),
    ):
        rng = torch.Generator().manual_seed(0)
        draws = sampler(denoiser, torch.full((n, 1, 1, 1), y, dtype=torch.float64), SIGMA, generator=rng, **options)
        share = (draws > 0.5).double().mean().item()
        assert abs(share - exact) < 4 * math.sqrt(exact * (1 - exact) / n), sampler.__name__
        for mode in modes:
            near = draws[(draws - mode).abs() < 0.3]
            conditional = mode + scatter**2 / (scatter**2 + SIGMA**2) * (y - mode)
            std = scatter * SIGMA / math.sqrt(scatter**2 + SIGMA**2)
            assert abs(near.mean().item() - conditional.item()) < 0.1 * std, sampler.__name__  # 4 standard errors
            assert abs(near.std().item() / std - 1) < 0.1, sampler.__name__


@pytest.mark.parametrize("delta", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("scatter", [1e-4, C, 10.0])
def test_annealed_langevin_at_one_level_has_the_exact_law_of_the_state_for_any_delta(monkeypatch, scatter, delta):
    monkeypatch.setitem(globals(), "C", scatter)
    s, (mean, std) = 0.2, posterior(1.3)
    variance = std**2 - scatter**2 * s**2 / (scatter**2 + s**2)  # of E[x0 | x_s] given y
    monkeypatch.setattr(sde, "noise_levels", lambda *_: torch.tensor([SIGMA] + [s] * 1000, dtype=torch.float64))
    m, found = exact_mean_and_std(monkeypatch, sde.annealed_langevin, 1.3, 1001, delta=delta)
    assert abs(m - mean) < 1e-5 * math.sqrt(variance) and abs(found**2 / variance - 1) < 1e-5


@pytest.mark.parametrize("delta", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("observe", [True, False])
def test_corrections_keep_the_variance_of_the_state_around_a_known_image(monkeypatch, delta, observe):
    # With x0 all but known, x_s has the variance s^2, and given y s^2 (1 - s^2 / SIGMA^2); the denoiser passes on a little of it.
    monkeypatch.setitem(globals(), "C", 1e-4)
    s = 0.2
    variance = s**2 * (1 - (s / SIGMA) ** 2 if observe else 1)
    options = {"steps": 2, "corrections": 200, "delta": delta, "observe": observe, "sigma_min": s}
    _, found = exact_mean_and_std(monkeypatch, sde.predictor_corrector, 1.3, 201, **options)
    assert abs((found * (1 + s**2 / C**2)) ** 2 / variance - 1) < 1e-5


@pytest.mark.parametrize("steps", [2, 3, 6])
@pytest.mark.parametrize("delta", [0.1, 1.0])
def test_annealed_langevin_around_a_known_image_has_the_exact_law_at_every_level(monkeypatch, steps, delta):
    # From the first level below SIGMA on, and however few there are: nothing has to relax.
    monkeypatch.setitem(globals(), "C", 1e-4)
    s = 0.2
    m, found = exact_mean_and_std(monkeypatch, sde.annealed_langevin, 1.3, steps, steps=steps, delta=delta, sigma_min=s)
    unshrunk = 1 + s**2 / C**2  # the denoiser passes on this fraction of the state
    assert abs((m - MU) * unshrunk / ((s / SIGMA) ** 2 * (1.3 - MU)) - 1) < 1e-4
    assert abs((found * unshrunk) ** 2 / (s**2 * (1 - (s / SIGMA) ** 2)) - 1) < 1e-4


@pytest.mark.parametrize("sampler", [sde.predictor_corrector, sde.annealed_langevin])
@pytest.mark.parametrize("delta", [0.0, 2.0, 2.5])
def test_a_langevin_step_that_stands_still_or_diverges_is_refused(sampler, delta):
    with pytest.raises(ValueError, match=str(delta)):
        sampler(gaussian_denoiser, torch.rand(1, 3, 4, 4), SIGMA, delta=delta)


def test_langevin_follows_its_recursion_and_forgets_the_observation(monkeypatch):
    # x - MU shrinks by a = 1 - step_size / (C^2 + SIGMA^2) an update; the noise adds up as a geometric sum.
    step_size, steps = 0.02, 300
    a, v = 1 - step_size / (C**2 + SIGMA**2), 2 * step_size * SIGMA**2
    mean, std = exact_mean_and_std(monkeypatch, sde.langevin, 1.3, steps, steps=steps, step_size=step_size)
    assert abs(mean - (MU + a**steps * (1.3 - MU))) < 1e-12
    assert abs(std**2 - v * (1 - a ** (2 * steps)) / (1 - a**2)) < 1e-12
    assert abs(mean - MU) < 1e-6 < abs(posterior(1.3)[0] - MU)


def test_langevin_at_temperature_one_samples_p_sigma(monkeypatch):
    # Its stationary variance is that of p_sigma, C^2 + SIGMA^2, to first order in the step.
    errors = []
    for step_size in (0.02, 0.01):
        steps = round(10 / step_size)
        _, std = exact_mean_and_std(monkeypatch, sde.langevin, 1.3, steps, steps=steps, step_size=step_size, temperature=1.0)
        errors.append(abs(std**2 - (C**2 + SIGMA**2)))
    assert errors[-1] < 0.02 * (C**2 + SIGMA**2) and abs(order_of(errors) - 1) < 0.1


@pytest.mark.parametrize("sampler", [*POSTERIOR_SAMPLERS, sde.langevin])
def test_one_seed_per_image_makes_a_draw_independent_of_its_batch(sampler):
    y = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    together = sampler(gaussian_denoiser, y, SIGMA, steps=5, generator=[7, 8, 9])
    assert torch.equal(sampler(gaussian_denoiser, y[1:2], SIGMA, steps=5, generator=[8]), together[1:2])
    assert torch.equal(sampler(gaussian_denoiser, y.flip(0), SIGMA, steps=5, generator=[9, 8, 7]), together.flip(0))
    assert not torch.equal(sampler(gaussian_denoiser, y, SIGMA, steps=5, generator=[1, 2, 3]), together)
    with pytest.raises(ValueError, match="2 seeds for 3 images"):
        sampler(gaussian_denoiser, y, SIGMA, steps=5, generator=[1, 2])


@pytest.mark.parametrize(
    "sampler, options",
    [(sde.probability_flow_ode, {}), (sde.ddim, {"eta": 0.0}), (sde.adams, {"eta": 0.0}), (sde.edm, {"churn": 0.0})],
)
def test_without_fresh_noise_they_are_deterministic(sampler, options):
    y = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    first, second = (sampler(gaussian_denoiser, y, SIGMA, 5, generator=[seed, 3], **options) for seed in (1, 2))
    assert torch.equal(first, second)
    if options:
        noisy = [sampler(gaussian_denoiser, y, SIGMA, 5, generator=[seed, 3]) for seed in (1, 2)]
        assert not torch.equal(noisy[0][0], noisy[1][0]) and torch.equal(noisy[0][1], noisy[1][1])


def test_an_eta_that_is_no_share_of_the_noise_is_refused():
    with pytest.raises(ValueError, match="1.5"):
        sde.ddim(gaussian_denoiser, torch.rand(1, 3, 4, 4), SIGMA, eta=1.5)


@pytest.mark.parametrize("process", SDES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("sampler, calls", [(sde.reverse_sde, 6), (sde.probability_flow_ode, 11)])
def test_the_callback_sees_the_state_and_its_estimate_at_every_level(sampler, calls, process):
    y, seen, counted = torch.rand(2, 3, 4, 4), [], []

    def denoiser(x, sigma):
        counted.append(sigma)
        return gaussian_denoiser(x, sigma)

    result = sampler(denoiser, y, SIGMA, steps=6, sde=process, callback=lambda *frame: seen.append(frame))
    assert [frame[0] for frame in seen] == list(range(6)) and len(counted) == calls
    assert [frame[3] for frame in seen] == sde.noise_levels(SIGMA, 0.01, 6).tolist()
    torch.testing.assert_close(seen[0][1], y)
    for _, x_t, denoised, sigma in seen:
        torch.testing.assert_close(denoised, gaussian_denoiser(x_t, sigma))
    assert torch.equal(result, seen[-1][2])


@pytest.mark.parametrize("sampler", [*POSTERIOR_SAMPLERS, sde.probability_flow_ode])
def test_with_no_level_between_the_image_and_the_lowest_they_give_the_posterior_mean(sampler):
    y = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(sampler(gaussian_denoiser, y, SIGMA, sigma_min=SIGMA), posterior(y)[0])
    torch.testing.assert_close(sampler(gaussian_denoiser, y, SIGMA, steps=1), posterior(y)[0])


@pytest.mark.parametrize("sampler", [*POSTERIOR_SAMPLERS, sde.probability_flow_ode, sde.langevin])
@pytest.mark.parametrize("wrong", [{"sigma": 0.0}, {"sigma": -0.1}, {"sigma": math.nan}, {"steps": 0}])
def test_impossible_arguments_are_refused(sampler, wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        sampler(gaussian_denoiser, torch.rand(1, 3, 4, 4), **{"sigma": SIGMA, "steps": 5} | wrong)

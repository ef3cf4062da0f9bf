"""Linear SDEs, and the samplers that run them backwards from a noisy image.

A noisy image y = x0 + sigma n is a state of the SDE, at the time when the noise-to-signal ratio is sigma. So the
reverse-time SDE started there draws from p(x0 | y), and nothing has to be generated from pure noise.

Every sampler takes a `denoiser`, any callable (x, sigma) -> E[x0 | x], and (the one-step `tweedie` only what it needs)
    y          (B, 3, H, W), the noisy images, neither clipped nor rounded
    sigma      their noise level, a float in the units of y
    steps      the number of noise levels visited (or of Langevin updates), at least 1
    generator  a torch.Generator for the whole batch, or a sequence of B integer seeds, one per image, which makes
               the noise of an image independent of the batch it is in; None uses torch's global generator
    callback   called as callback(step, x_t, denoised, sigma) at every level, before the state moves on; x_t is the
               state divided by its signal scale, (B, 3, H, W), and denoised the estimate of x0 from it
and returns (B, 3, H, W), not clipped, in the precision of y, which is also the precision of the state.
"""

import math

import torch

# -----------------------------------------------------------------------------
# Linear SDEs
# -----------------------------------------------------------------------------


class LinearSDE:
    """dx = f(t) x dt + g(t) dw, given by two functions of t: x_t = alpha(t) (x0 + sigma(t) n).

    alpha is the signal scale and sigma the noise-to-signal ratio; `time` is the inverse of sigma. All three map
    tensors to tensors; everything else follows from them and is written once, here.
    """

    def drift(self, t):
        """f(t) = (log alpha)'(t)."""
        return _derivative(lambda t: self.alpha(t).log(), t)

    def diffusion(self, t):
        """g(t) = alpha(t) sqrt((sigma^2)'(t))  (Karras et al. 2022, app. B)."""
        return self.alpha(t) * _derivative(lambda t: self.sigma(t) ** 2, t).sqrt()

    def perturb(self, x0, t, noise):
        """Return x_t = alpha(t) (x0 + sigma(t) noise), a draw from p(x_t | x0) if noise is unit Gaussian."""
        return self.alpha(t) * (x0 + self.sigma(t) * noise)

    def score(self, denoiser, x_t, t):
        """Return grad log p_t(x_t) = score(x_t / alpha, sigma) / alpha, from a denoiser; the shape of x_t."""
        alpha, sigma = self.alpha(t), self.sigma(t)
        return _score(x_t, denoiser(x_t / alpha, sigma), alpha, sigma)


class VE(LinearSDE):
    """Variance exploding (Song et al. 2021, eq. 9): alpha = 1 and sigma geometric in t."""

    def __init__(self, sigma_min=0.01, sigma_max=50.0):
        self.sigma_min, self.log_ratio = sigma_min, math.log(sigma_max / sigma_min)

    def alpha(self, t):
        return (0 * t).exp()  # one, as a function of t that can be differentiated

    def sigma(self, t):
        return self.sigma_min * (self.log_ratio * t).exp()

    def time(self, sigma):
        return (sigma / self.sigma_min).log() / self.log_ratio


class VP(LinearSDE):
    """Variance preserving (Song et al. 2021, eq. 11): beta linear in t, alpha = exp(-B/2) with B the integral of beta."""

    def __init__(self, beta_min=0.1, beta_max=20.0):
        self.beta_min, self.slope = beta_min, beta_max - beta_min

    def alpha(self, t):
        return (-self._integral(t) / 2).exp()

    def sigma(self, t):
        return self._integral(t).expm1().sqrt()  # alpha = (1 + sigma^2)^(-1/2)

    def time(self, sigma):
        return self._time_of_integral((sigma**2).log1p())

    def _integral(self, t):
        return self.beta_min * t + self.slope * t**2 / 2

    def _time_of_integral(self, b):
        return 2 * b / (self.beta_min + (self.beta_min**2 + 2 * self.slope * b).sqrt())


class SubVP(VP):
    """Sub-VP (Song et al. 2021, eq. 12): the alpha of VP, with noise of standard deviation 1 - alpha^2."""

    def sigma(self, t):
        b = self._integral(t)
        return -torch.expm1(-b) * (b / 2).exp()  # (1 - alpha^2) / alpha

    def time(self, sigma):
        # alpha solves alpha^2 + sigma alpha - 1 = 0, so 1 / alpha = sigma / 2 + sqrt(1 + sigma^2 / 4) and B = 2 asinh(sigma / 2)
        return self._time_of_integral(2 * (sigma / 2).asinh())


class CosineVP(LinearSDE):
    """Variance preserving with alpha = cos(pi t / 2) (Nichol and Dhariwal 2021, eq. 17, without their offset)."""

    def alpha(self, t):
        return (math.pi / 2 * t).cos()

    def sigma(self, t):
        return (math.pi / 2 * t).tan()

    def time(self, sigma):
        return 2 / math.pi * sigma.atan()


def _derivative(function, t):
    with torch.enable_grad():
        t = t.detach().requires_grad_()
        return torch.autograd.grad(function(t).sum(), t)[0]


def noise_levels(sigma, sigma_min, steps, rho=7.0):
    """Return `steps` falling noise levels from sigma to sigma_min, float64 (Karras et al. 2022, eq. 5).

    rho spaces them evenly in sigma^(1/rho); math.inf spaces them evenly in log sigma. With one step, or where sigma
    is not above sigma_min, there is nothing between the image and its estimate: the only level is sigma.
    Raises ValueError unless sigma > 0, sigma_min > 0 and steps >= 1.
    """
    if not (sigma > 0 and sigma_min > 0 and math.isfinite(sigma)):
        raise ValueError(f"noise levels must be positive and finite, not sigma {sigma} and sigma_min {sigma_min}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if steps == 1 or sigma <= sigma_min:
        return torch.tensor([sigma], dtype=torch.float64)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    if math.isinf(rho):
        levels = sigma * (sigma_min / sigma) ** ramp
    else:
        levels = (sigma ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma ** (1 / rho))) ** rho
    levels[0], levels[-1] = sigma, sigma_min  # exactly, not to rounding
    return levels


# -----------------------------------------------------------------------------
# Samplers
# -----------------------------------------------------------------------------


def tweedie(denoiser, y, sigma, callback=None):
    """Return E[x0 | y] = y + sigma^2 score(y, sigma), the estimate of least mean squared error, in one network call."""
    return _run(denoiser, y, [1.0], [sigma], None, callback)


def reverse_sde(denoiser, y, sigma, steps=100, sde=None, sigma_min=0.01, rho=7.0, generator=None, callback=None):
    """Draw from p(x0 | y): Euler-Maruyama on the reverse-time SDE (Anderson 1982; Song et al. 2021, eq. 6)

        dx = (f x - g^2 score) dt + g dw,  t falling,

    from the time of the noisy image to that of sigma_min, where one Tweedie step removes what is left. One network
    call a step. The law of the result is right to first order in the step. sde: VE() unless given.
    """
    t, alpha, levels, f, g = _path(sde or VE(), sigma, sigma_min, steps, rho)
    draw = _noise_source(y, generator)

    def update(i, x, denoised):
        dt = t[i] - t[i + 1]
        drift = f[i] * x - g[i] ** 2 * _score(x, denoised, alpha[i], levels[i])
        return x - drift * dt + g[i] * math.sqrt(dt) * draw()

    return _run(denoiser, alpha[0] * y, alpha, levels, update, callback)


def probability_flow_ode(denoiser, y, sigma, steps=10, sde=None, sigma_min=0.01, rho=7.0, generator=None, callback=None):
    """Follow the flow that has the marginals of the SDE without its noise, by Heun's method (Song et al. 2021, eq. 13)

        dx = (f x - g^2 score / 2) dt,  t falling,

    from the noisy image to sigma_min, where one Tweedie step removes what is left. Two network calls a step and one
    at the last level; second order in the step. The result is deterministic, sharper than E[x0 | y] with a larger
    error, and no draw from p(x0 | y). generator is taken as everywhere, and not used.
    """
    t, alpha, levels, f, g = _path(sde or VE(), sigma, sigma_min, steps, rho)

    def slope(i, x, denoised):
        return f[i] * x - g[i] ** 2 * _score(x, denoised, alpha[i], levels[i]) / 2

    def update(i, x, denoised):
        dt = t[i] - t[i + 1]
        first = slope(i, x, denoised)
        euler = x - first * dt
        second = slope(i + 1, euler, denoiser(euler / alpha[i + 1], levels[i + 1]))
        return x - (first + second) * dt / 2

    return _run(denoiser, alpha[0] * y, alpha, levels, update, callback)


def ddim(denoiser, y, sigma, steps=100, eta=1.0, sigma_min=0.01, rho=7.0, generator=None, callback=None):
    """Step between noise levels with x0 held at its estimate (Song, Meng, Ermon 2021, eq. 12 and 16, for any linear SDE):

        x_s = D + sqrt(s^2 - v^2) / t (x_t - D) + v z,  v = eta s sqrt(1 - s^2 / t^2),  from level t to level s.

    eta = 1 is ancestral sampling (Ho et al. 2020), a first-order solver of the reverse SDE: it draws from p(x0 | y).
    eta = 0 is DDIM, a first-order solver of the probability-flow ODE. What is between has the right marginals but is
    no draw from p(x0 | y): only the reverse SDE keeps the joint law of y and x0. One network call a step.
    Raises ValueError unless 0 <= eta <= 1.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie between 0 and 1, not {eta}")
    levels = noise_levels(sigma, sigma_min, steps, rho).tolist()
    draw = _noise_source(y, generator)

    def update(i, x, denoised):
        t, s = levels[i], levels[i + 1]
        fresh = eta * s * math.sqrt(1 - (s / t) ** 2)
        x = denoised + math.sqrt(s**2 - fresh**2) / t * (x - denoised)
        return x + fresh * draw() if eta else x

    return _run(denoiser, y, [1.0] * len(levels), levels, update, callback)


def adams(denoiser, y, sigma, steps=10, eta=1.0, sigma_min=0.01, rho=7.0, generator=None, callback=None):
    """Solve the reverse SDE (eta 1) or the probability-flow ODE (eta 0) with a two-step Adams predictor and corrector.

    Between the levels t and s, with h = log(t / s) and k = 1 + eta^2, the linear part and the noise are exact and D is a
    line in log sigma (SA-Solver, Xue et al. 2023, predicting data with tau = eta; the predictor at eta 0 is, but for terms
    of third order in h, DPM-Solver++(2M), Lu et al. 2022):

        x_s = e^(-k h) x_t + (1 - e^(-k h) - b) D_t + b D_s + s sqrt(1 - e^(-2 eta^2 h)) z,  b = 1 - (1 - e^(-k h)) / (k h).

    The predictor extrapolates D_s from the last two estimates; the corrector puts in the estimate at the predicted
    point, made with the same z, which is what carries the noise to second order. One network call a step. As with
    ddim, what lies between eta 0 and 1 is no draw from p(x0 | y).
    """
    levels = noise_levels(sigma, sigma_min, steps, rho).tolist()
    draw, k = _noise_source(y, generator), 1 + eta**2
    last = None  # of the step before: its start without D, its weights, its D and h

    def update(i, x, denoised):
        nonlocal last
        if last:
            rest, a, b, before, h_before = last
            x = rest + a * before + b * denoised  # the corrector of the step that led here
        t, s = levels[i], levels[i + 1]
        h = math.log(t / s)
        b = 1 + math.expm1(-k * h) / (k * h)
        a = -math.expm1(-k * h) - b
        rest = math.exp(-k * h) * x
        if eta:
            rest = rest + s * math.sqrt(-math.expm1(-2 * eta**2 * h)) * draw()
        ahead = denoised + (denoised - before) * h / h_before if last else denoised
        last = rest, a, b, denoised, h
        return rest + a * denoised + b * ahead

    return _run(denoiser, y, [1.0] * len(levels), levels, update, callback)


def langevin(denoiser, y, sigma, steps=100, step_size=1e-4, temperature=None, generator=None, callback=None):
    """Run plain Langevin updates at the fixed level sigma, the recipe this project starts from:

        x <- x + step_size score(x, sigma) + sqrt(2 step_size temperature) z,  temperature sigma^2 unless given.

    One network call a step. Nothing in it remembers y: for small steps its stationary law is proportional to
    p_sigma^(1/temperature), and neither p(x0 | y) nor p(x0). It denoises only as long as it is stopped in time.
    """
    if not (sigma > 0 and step_size > 0 and steps >= 1):
        raise ValueError(f"sigma {sigma}, step_size {step_size} and steps {steps} must be positive")
    noise = math.sqrt(2 * step_size * (sigma**2 if temperature is None else temperature))
    draw = _noise_source(y, generator)

    def update(i, x, denoised):
        return x + step_size * _score(x, denoised, 1.0, sigma) + noise * draw()

    return _run(denoiser, y, [1.0] * steps, [sigma] * steps, update, callback, to_the_end=False)


def edm(denoiser, y, sigma, steps=50, churn=1.0, sigma_min=0.01, rho=7.0, generator=None, callback=None):
    """Alternate fresh noise and Heun steps of the probability-flow ODE (Karras et al. 2022, algorithm 2).

    Before the step from level t to s the noise is raised to t_hat^2 = t^2 + churn (t^2 - s^2). Their gamma is a free
    number, since any churn keeps the marginals. Only churn = 1 keeps the joint law of y and x0 as well: then as much
    noise is added and taken away as in the reverse SDE, and the result is a draw from p(x0 | y), to first order in the
    step. churn = 0 is the ODE, more than 1 forgets y. Two network calls a step, one at the last level. The network is asked
    about the raised levels, the first of which lies above sigma.
    """
    levels = noise_levels(sigma, sigma_min, steps, rho).tolist()
    raised = [math.sqrt(t**2 + churn * (t**2 - s**2)) for t, s in zip(levels, levels[1:])] + levels[-1:]
    draw = _noise_source(y, generator)

    def raise_noise(i, x):
        return x + math.sqrt(raised[i] ** 2 - levels[i] ** 2) * draw() if raised[i] > levels[i] else x

    def update(i, x, denoised):
        t, s = raised[i], levels[i + 1]
        first = (x - denoised) / t
        euler = x + (s - t) * first
        second = (euler - denoiser(euler, s)) / s
        return raise_noise(i + 1, x + (s - t) * (first + second) / 2)

    return _run(denoiser, raise_noise(0, y), [1.0] * len(levels), raised, update, callback)


def predictor_corrector(
    denoiser,
    y,
    sigma,
    steps=50,
    corrections=1,
    delta=0.1,
    observe=True,
    sigma_min=0.01,
    rho=7.0,
    generator=None,
    callback=None,
):
    """Follow each step of the discrete reverse SDE by Langevin corrections (Song et al. 2021, algorithm 2) that keep y:

        x <- x + (1 - s^2 / t^2) (D - x) + sqrt(t^2 - s^2) z,  then, `corrections` times, the step of `annealed_langevin`.

    As published, `observe` False, the corrector uses the score alone: it samples p_sigma, and forgets y the more it
    corrects. With `observe` it samples p(x_s | y), to first order in delta. The predictor leaves no noise to carry over, so
    that of a correction has the variance 2 - delta in place of Langevin's 2: this keeps the variance of x_s around a known
    x0 for any delta. One network call a step, and `corrections` more at every level but the first.
    """
    _check_delta(delta)
    levels = noise_levels(sigma, sigma_min, steps, rho).tolist()
    levels = levels[:1] + [s for s in levels[1:] for _ in range(1 + corrections)]
    draw = _noise_source(y, generator)

    def update(i, x, denoised):
        t, s = levels[i], levels[i + 1]
        if s == t:
            return _correct(x, denoised, y if observe else None, t, sigma, delta, math.sqrt(2 - delta) * draw())
        return x + (1 - (s / t) ** 2) * (denoised - x) + math.sqrt(t**2 - s**2) * draw()

    return _run(denoiser, y, [1.0] * len(levels), levels, update, callback)


def annealed_langevin(denoiser, y, sigma, steps=100, delta=0.1, sigma_min=0.01, rho=7.0, generator=None, callback=None):
    """Anneal Langevin updates with the pull of the observation (after Kawar et al. 2021, algorithm 1), from level t to s:

        x <- x + e [score(x, t) + (y - x) / (sigma^2 - t^2)] + sqrt(e / 2) (z_before + z),  e = delta v_t,
        x <- m_s + sqrt(v_s / v_t) (x - m_t),  m_t = D + t^2 / sigma^2 (y - D),  v_t = t^2 (1 - t^2 / sigma^2).

    The first line samples p(x_t | y), since y = x_t + sqrt(sigma^2 - t^2) n. Each noise enters half here and half in the next
    update (Leimkuhler and Matthews 2013): at a fixed level the variance is then exact for any Gaussian prior and any delta,
    not in the limit of small delta alone. The second line moves the state to the next level along the probability flow
    given y; D is the estimate before the first line, m and v are the mean and variance of p(x_t | x0 = D, y). As published,
    the state only relaxes to the next level, always a little too noisy for it, and the network takes the excess for
    picture. First order in the step. One network call a step.
    """
    _check_delta(delta)
    levels = noise_levels(sigma, sigma_min, steps, rho).tolist()
    spread = [s * math.sqrt(1 - (s / sigma) ** 2) for s in levels]
    draw = _noise_source(y, generator)
    before = None

    def update(i, x, denoised):
        nonlocal before
        now, centre = draw(), lambda s: denoised + (s / sigma) ** 2 * (y - denoised)
        if before is None:  # y itself is m at level sigma, where nothing is spread around it
            before = now
            return centre(levels[1]) + spread[1] * (math.sqrt(delta / 2) * now + math.sqrt(1 - delta / 2) * draw())
        x = _correct(x, denoised, y, levels[i], sigma, delta, (before + now) / math.sqrt(2))
        before = now
        return centre(levels[i + 1]) + spread[i + 1] / spread[i] * (x - centre(levels[i]))

    return _run(denoiser, y, [1.0] * len(levels), levels, update, callback)


def _check_delta(delta):
    if not 0 < delta < 2:
        raise ValueError(f"delta must lie between 0 and 2, not {delta}")


def _correct(x, denoised, y, s, sigma, delta, noise):
    """One Langevin update at level s towards p(x_s | y), or towards p_s where y is None; its noise is that of unit size."""
    size, score = delta * s**2, (denoised - x) / s**2
    if y is not None:
        size, score = size * (1 - s**2 / sigma**2), score + (y - x) / (sigma**2 - s**2)
    return x + size * score + math.sqrt(size) * noise


def _run(denoiser, x, alpha, levels, update, callback, to_the_end=True):
    """The loop of every sampler: estimate x0 from the state x_t = alpha (x0 + sigma n), report it, move on.

    To the end means that at the last level nothing is left to do but to return the estimate.
    """
    for i, sigma in enumerate(levels):
        scaled = x if alpha[i] == 1 else x / alpha[i]
        denoised = denoiser(scaled, sigma)
        if callback:
            callback(i, scaled, denoised, sigma)
        if to_the_end and i + 1 == len(levels):
            return denoised
        x = update(i, x, denoised)
    return x


def _score(x_t, denoised, alpha, sigma):
    return (denoised - x_t / alpha) / (alpha * sigma**2)


def _path(sde, sigma, sigma_min, steps, rho):
    """Return t, alpha, sigma, f and g along the noise levels, as lists of floats: the loop computes none of them."""
    levels = noise_levels(sigma, sigma_min, steps, rho)
    t = sde.time(levels)
    return [v.tolist() for v in (t, sde.alpha(t), levels, sde.drift(t), sde.diffusion(t))]


def _noise_source(y, generator):
    """Return a function that draws unit Gaussian noise like y, from one generator or from one seed per image."""
    like = {"device": y.device, "dtype": y.dtype}
    if generator is None or isinstance(generator, torch.Generator):
        return lambda: torch.randn(y.shape, generator=generator, **like)
    if len(generator) != len(y):
        raise ValueError(f"{len(generator)} seeds for {len(y)} images: give one seed per image")
    generators = [torch.Generator(y.device).manual_seed(seed) for seed in generator]
    return lambda: torch.stack([torch.randn(y.shape[1:], generator=g, **like) for g in generators])

"""Linear SDEs, and the samplers that run them backwards from a noisy image.

A noisy image y = x0 + sigma n is, up to a scale, a state of the SDE, at the time when the
noise-to-signal ratio is sigma. So the reverse-time SDE started there draws from p(x0 | y), and
nothing has to be generated from pure noise.

A sampler is a function (denoiser, y, levels, ..., noise) -> images, with
    denoiser   any callable (x, sigma) -> E[x0 | x]: a network, a closed form, a wrapper
    y          (B, C, H, W), the noisy images, neither clipped nor rounded
    levels     falling noise levels in the units of y, as from `noise_levels`; the first is that
               of y. A sampler ends with the estimate E[x0 | x] at the last one, so with one level
               it is the one-step estimate of least error
    noise      a callable that returns unit Gaussian noise like its argument
and it returns (B, C, H, W), not clipped, in the precision of y, which is also the precision of the
state. In every loop t is the level (or time) now and s < t the next one. A sampler raises
ValueError if the levels do not fall. `langevin`, which has one level, takes sigma in their place,
and returns its state.
"""

import functools
from itertools import pairwise
from math import exp, expm1, inf, log, pi, sqrt
from numbers import Integral

import torch
from torch.nn.functional import avg_pool2d, interpolate

LOWEST = 1e-100  # noise levels lie above it: smaller ones have no squares
UNSEEN = 1e-6  # A^T A 1 lies above it where a pixel is observed

# -----------------------------------------------------------------------------
# Linear SDEs and noise levels
# -----------------------------------------------------------------------------


class LinearSDE:
    """The SDE dx = f(t) x dt + g(t) dw whose states are x_t = alpha(t) (x0 + sigma(t) n).

    log_alpha: logarithm of the signal scale; sigma: the noise-to-signal ratio; time: the inverse of
    sigma; tensors to tensors. Everything else follows from these.
    """

    def __init__(self, log_alpha, sigma, time):
        self.log_alpha, self.sigma, self.time = log_alpha, sigma, time

    def alpha(self, t):
        return self.log_alpha(t).exp()

    def times(self, levels):
        """Return the times at which sigma(t) is each of the falling noise levels."""
        falling(levels)  # checks them
        return self.time(torch.as_tensor(levels, dtype=torch.float64))

    def drift(self, t):
        """f(t) = (log alpha)'(t)."""
        return _derivative(self.log_alpha, t)

    def diffusion(self, t):
        """g(t) = alpha(t) sqrt((sigma^2)'(t))  (Karras et al. 2022, app. B)."""
        return self.alpha(t) * _derivative(lambda t: self.sigma(t) ** 2, t).sqrt()

    def score(self, denoiser, x_t, t):
        """grad log p_t(x_t) = score(x_t / alpha, sigma) / alpha, of the shape of x_t."""
        alpha, sigma = self.alpha(t), float(self.sigma(t))
        return (denoiser(x_t / alpha, sigma) - x_t / alpha) / (alpha * sigma**2)

    def flow(self, denoiser, x_t, t):
        """dx/dt = f x - g^2 score / 2: the SDE's marginals without noise (Song 2021, eq. 13)."""
        return self.drift(t) * x_t - self.diffusion(t) ** 2 / 2 * self.score(denoiser, x_t, t)


def VE(sigma_min=0.01, sigma_max=50.0):
    """Variance exploding (Song et al. 2021, eq. 9): alpha = 1 and sigma geometric in t."""
    rate = log(sigma_max / sigma_min)
    return LinearSDE(
        log_alpha=lambda t: 0 * t,
        sigma=lambda t: sigma_min * (rate * t).exp(),
        time=lambda s: (s / sigma_min).log() / rate,
    )


def VP(beta_min=0.1, beta_max=20.0):
    """Variance preserving (Song et al. 2021, eq. 11): alpha = e^(-B/2), sigma^2 = e^B - 1.

    B is the integral of beta, which is linear in t.
    """
    B, inverse = _linear_beta(beta_min, beta_max)
    return LinearSDE(
        log_alpha=lambda t: -B(t) / 2,
        sigma=lambda t: B(t).expm1().sqrt(),
        time=lambda s: inverse((s**2).log1p()),
    )


def SubVP(beta_min=0.1, beta_max=20.0):
    """Sub-VP (Song et al. 2021, eq. 12): VP's alpha, noise 1 - alpha^2, so sigma = 2 sinh(B/2)."""
    B, inverse = _linear_beta(beta_min, beta_max)
    return LinearSDE(
        log_alpha=lambda t: -B(t) / 2,
        sigma=lambda t: 2 * (B(t) / 2).sinh(),
        time=lambda s: inverse(2 * (s / 2).asinh()),
    )


def _linear_beta(a, b):  # -> the integral of beta from 0 to t, and its inverse
    slope = b - a
    return (
        lambda t: a * t + slope * t**2 / 2,
        lambda B: 2 * B / (a + (a**2 + 2 * slope * B).sqrt()),
    )


def _derivative(function, t):
    return torch.func.grad(lambda t: function(t).sum())(t.detach())


def noise_levels(sigma, sigma_min, steps, rho=7.0):
    """Return `steps` noise levels falling from sigma to sigma_min (Karras et al. 2022, eq. 5).

    rho spaces them evenly in sigma^(1/rho); inf spaces them evenly in log sigma. They are float64.
    With one step, or where sigma is not above sigma_min, there is nothing between the image and its
    estimate: the only level is sigma. Raises ValueError unless sigma and sigma_min are above
    LOWEST, steps is a whole number from 1 on, and rho is such that the levels fall.
    """
    proper = LOWEST < sigma < inf and sigma_min > LOWEST and _is_count(steps) and rho > 0
    given = f"sigma {sigma}, sigma_min {sigma_min}, steps {steps}, rho {rho}"
    _check(proper, "noise levels need positive numbers and whole steps", given)
    if steps == 1 or sigma <= sigma_min:
        return torch.tensor([sigma], dtype=torch.float64)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    if rho == inf:
        levels = sigma * (sigma_min / sigma) ** ramp
    else:
        a, b = (torch.tensor(s, dtype=torch.float64) ** (1 / rho) for s in (sigma, sigma_min))
        levels = (a + ramp * (b - a)) ** rho
    levels[0], levels[-1] = sigma, sigma_min  # exactly, not to rounding
    _check((levels.diff() < 0).all(), "rho must be less extreme: the levels do not fall", given)
    return levels


def falling(levels):
    """Return the pairs (t, s) of neighbouring levels; raises ValueError unless they fall."""
    levels = [float(s) for s in levels]
    proper = levels and all(t > s > LOWEST for t, s in pairwise([inf, *levels]))
    _check(proper, "noise levels must be finite, positive and falling", levels)
    return list(pairwise(levels))


# -----------------------------------------------------------------------------
# Samplers of the posterior p(x0 | y)
# -----------------------------------------------------------------------------


def reverse_sde(denoiser, y, levels, sde=None, noise=torch.randn_like):
    """Draw from p(x0 | y): Euler-Maruyama on the reverse-time SDE

        dx = (f x - g^2 score) dt + g dw,  t falling,  (Anderson 1982; Song et al. 2021, eq. 6)

    from the time of the noisy image to that of the last level. sde: any LinearSDE, VE() unless
    given. One network call a level. The law of the result is right to first order in the step.
    """
    sde = sde or VE()
    times = sde.times(levels)
    x = sde.alpha(times[0]) * y
    for t, s in pairwise(times):
        f, g = sde.drift(t), sde.diffusion(t)
        x = x - (f * x - g**2 * sde.score(denoiser, x, t)) * (t - s) + g * (t - s).sqrt() * noise(x)
    return denoiser(x / sde.alpha(times[-1]), levels[-1])


def probability_flow_ode(denoiser, y, levels, sde=None, noise=None):
    """Follow the flow that has the marginals of the SDE without its noise, by Heun's method

        dx = (f x - g^2 score / 2) dt,  t falling,  (Song et al. 2021, eq. 13)

    as `reverse_sde` does, in second order, with two network calls a step and one at the last level.
    The result is deterministic (noise is not used), sharper than E[x0 | y] with a larger error, and
    no draw from p(x0 | y).
    """
    sde = sde or VE()
    times = sde.times(levels)
    x = sde.alpha(times[0]) * y
    for t, s in pairwise(times):
        slope = sde.flow(denoiser, x, t)
        slope_s = sde.flow(denoiser, x - slope * (t - s), s)
        x = x - (slope + slope_s) / 2 * (t - s)
    return denoiser(x / sde.alpha(times[-1]), levels[-1])


def ancestral(denoiser, y, levels, eta=1.0, noise=torch.randn_like):
    """Step between noise levels with x0 held at its estimate:

        x_s = D + sqrt(s^2 - v^2) / t (x_t - D) + v z,  v = eta s sqrt(1 - s^2 / t^2)

    (Song, Meng, Ermon 2021, eq. 12 and 16, for any linear SDE). eta = 1 is ancestral sampling (Ho
    et al. 2020), a first-order solver of the reverse SDE: it draws from p(x0 | y). eta = 0 is DDIM,
    a first-order solver of the probability-flow ODE. What is between has the right marginals but is
    no draw from p(x0 | y): only the reverse SDE keeps the joint law of y and x0. One network call a
    level. Raises ValueError unless 0 <= eta <= 1.
    """
    _check(0 <= eta <= 1, "eta must lie between 0 and 1", eta)
    x = y
    for t, s in falling(levels):
        D = denoiser(x, t)
        v = eta * s * sqrt(1 - (s / t) ** 2)
        x = D + sqrt(s**2 - v**2) / t * (x - D) + v * noise(x)
    return denoiser(x, levels[-1])


def adams(denoiser, y, levels, eta=1.0, noise=torch.randn_like):
    """Solve the reverse SDE (eta 1) or the probability-flow ODE (eta 0) by two-step Adams methods.

    Between the levels t and s, with h = log(t / s) and k = 1 + eta^2, the linear part and the noise
    are exact and D is a line in log sigma (SA-Solver, Xue et al. 2023, predicting data with tau =
    eta; the predictor at eta 0 is, but for terms of third order in h, DPM-Solver++(2M), Lu et al.
    2022):

        x_s = e^(-k h) x_t + (1 - e^(-k h) - b) D_t + b D_s + s sqrt(1 - e^(-2 eta^2 h)) z,
        b = 1 - (1 - e^(-k h)) / (k h).

    The predictor extrapolates D_s along the last slope; the corrector puts in the estimate at the
    predicted point, made with the same z, which carries the noise to second order, in law. One
    network call a level. eta: as in `ancestral`.
    """
    _check(0 <= eta <= 1, "eta must lie between 0 and 1", eta)
    steps, k, x, D, slope = falling(levels), 1 + eta**2, y, denoiser(y, levels[0]), 0.0
    for t, s in steps:
        h = log(t / s)
        keep = exp(-k * h)
        b = 1 - (1 - keep) / (k * h)
        base = keep * x + (1 - keep) * D + s * sqrt(-expm1(-2 * eta**2 * h)) * noise(x)
        D_s = denoiser(base + b * h * slope, s)  # predict
        x, slope, D = base + b * (D_s - D), (D_s - D) / h, D_s  # correct
    return D


def predictor_corrector(
    denoiser, y, levels, corrections=1, delta=0.1, observe=True, noise=torch.randn_like
):
    """Follow each step of the discrete reverse SDE by Langevin corrections that keep y:

        x <- x + (1 - s^2 / t^2) (D - x) + sqrt(t^2 - s^2) z,  then, `corrections` times,
        x <- x + e [score(x, s) + (y - x) / (sigma^2 - s^2)] + sqrt((2 - delta) e) z,
        e = delta s^2 (1 - s^2 / sigma^2)

    (after Song et al. 2021, algorithm 2). With the pull of y (Kawar et al. 2021) a correction
    samples p(x_s | y), since y = x_s + sqrt(sigma^2 - s^2) n, to first order in delta. With
    `observe` False it uses the score alone, with e = delta s^2, as published but for step and
    noise: it samples p_s, and forgets y the more it corrects. The noise of variance 2 - delta, not
    Langevin's 2, keeps the variance of x_s around a known x0 for any delta. One network call a
    step, `corrections` more at every level but the first, and one at the end. Raises ValueError
    unless 0 < delta < 2.
    """
    _check(0 < delta < 2, "delta must lie between 0 and 2", delta)
    steps, sigma, x = falling(levels), float(levels[0]), y
    for t, s in steps:
        x = x + (1 - (s / t) ** 2) * (denoiser(x, t) - x) + sqrt(t**2 - s**2) * noise(x)
        pull = 1 / (sigma**2 - s**2) if observe else 0.0
        e = delta / (1 / s**2 + pull)
        for _ in range(corrections):
            score = (denoiser(x, s) - x) / s**2
            x = x + e * (score + pull * (y - x)) + sqrt((2 - delta) * e) * noise(x)
    return denoiser(x, levels[-1])


def annealed_langevin(denoiser, y, levels, delta=0.1, noise=torch.randn_like):
    """Anneal Langevin updates with the pull of the observation, from level t to s:

        x <- x + e [score(x, t) + (y - x) / (sigma^2 - t^2)] + sqrt(e / 2) (z_before + z),
        x <- m_s + sqrt(v_s / v_t) (x - m_t),
        e = delta v_t,  m_t = D + t^2 / sigma^2 (y - D),  v_t = t^2 (1 - t^2 / sigma^2)

    (after Kawar et al. 2021, algorithm 1). The first line samples p(x_t | y), since y = x_t +
    sqrt(sigma^2 - t^2) n. Each noise enters half here and half in the next update (Leimkuhler and
    Matthews 2013): at a fixed level the variance is then exact for any Gaussian prior and any
    delta. The second line moves the state to the next level along the probability flow given y; m
    and v are the mean and variance of p(x_t | x0 = D, y). As published, the state only relaxes to
    the next level, always a little too noisy for it, and the network takes the excess for image.
    First order in the step; one network call a level. Raises ValueError unless 0 < delta < 2.
    """
    _check(0 < delta < 2, "delta must lie between 0 and 2", delta)
    steps, sigma, x, z = falling(levels), float(levels[0]), y, noise(y)
    for t, s in steps:
        D = denoiser(x, t)
        m_t, m_s = (D + (u / sigma) ** 2 * (y - D) for u in (t, s))
        v_t, v_s = (u**2 * (1 - (u / sigma) ** 2) for u in (t, s))
        if t < sigma:
            z_before, z, e = z, noise(x), delta * v_t
            score = (D - x) / t**2
            pull = (y - x) / (sigma**2 - t**2)
            x = x + e * (score + pull) + sqrt(e / 2) * (z_before + z)
            unit = (x - m_t) / sqrt(v_t)
        else:  # y itself has no spread: draw from p(x_s | x0 = D, y); z is half the noise before
            unit = sqrt(delta / 2) * z + sqrt(1 - delta / 2) * noise(x)
        x = m_s + sqrt(v_s) * unit
    return denoiser(x, levels[-1])


def langevin(
    denoiser, y, sigma, steps=100, step_size=1e-4, temperature=None, noise=torch.randn_like
):
    """Run plain Langevin updates at the fixed level sigma, the recipe this project starts from:

        x <- x + step_size score(x, sigma) + sqrt(2 step_size temperature) z.

    The temperature is sigma^2 unless given. One network call a step. Nothing in it remembers y: for
    small steps its stationary law is proportional to p_sigma^(1/temperature), and neither p(x0 | y)
    nor p(x0). It denoises only as long as it is stopped in time. Raises ValueError unless sigma and
    step_size are positive, and steps is a whole number from 1 on.
    """
    temperature = sigma**2 if temperature is None else temperature
    proper = sigma > 0 and step_size > 0 and temperature >= 0 and _is_count(steps)
    given = (sigma, step_size, temperature, steps)
    _check(proper, "sigma, step_size and steps must be positive, temperature at least 0", given)
    x = y
    for _ in range(steps):
        score = (denoiser(x, sigma) - x) / sigma**2
        x = x + step_size * score + sqrt(2 * step_size * temperature) * noise(x)
    return x


def _check(condition, words, value):
    if not condition:
        raise ValueError(f"{words}, not {value}")


def _is_count(n):
    return isinstance(n, Integral) and n >= 1


# -----------------------------------------------------------------------------
# What a denoiser says of the posterior
# -----------------------------------------------------------------------------


def posterior_covariance(denoiser, x, sigma):
    """Return D = E[x0 | x] and `multiply`, v -> Cov[x0 | x] v = sigma^2 (dD/dx)^T v, v like x.

    (Manor and Michaeli 2024, eq. 3.) One network call; each product is one backward pass through
    its graph, which lives as long as `multiply` does. Works under torch.no_grad() and
    torch.inference_mode(), too. sigma: a float or (B,). The covariance is symmetric as far as the
    score (D - x) / sigma^2 is the gradient it should be.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()  # clones, since inference tensors have no gradient
        denoised = denoiser(x, sigma.clone() if torch.is_tensor(sigma) else sigma)
    variance = _per_image(sigma, x) ** 2

    def multiply(v):
        return variance * torch.autograd.grad(denoised, x, v, retain_graph=True)[0]

    return denoised.detach(), multiply


def expected_error(denoiser, y, sigma, probes=8, noise=torch.randn_like):
    """Return E[x0 | y] and the variance of every value of x0 given y, both like y.

    The mean of the variances is the expected squared error. They are the diagonal of Cov[x0 | y],
    as the mean of v * Cov v over vectors v of random signs (Hutchinson 1990; Bekas et al. 2007). It
    is unbiased; a mean over many pixels is precise, a single value rough, and may be negative.
    """
    denoised, multiply = posterior_covariance(denoiser, y, sigma)
    signs = (noise(y).sign() for _ in range(probes))
    return denoised, sum(v * multiply(v) for v in signs) / probes


def principal_components(denoiser, y, sigma, count, iterations=20, noise=torch.randn_like):
    """Return the K largest variances of p(x0 | y), (B, K), and their directions, (B, K, 3, H, W).

    The variances fall; the directions have norm 1. Subspace iteration on products with Cov[x0 | y]
    (Manor and Michaeli 2024, algorithm 1), ended by the eigenvectors within the subspace. An
    iteration takes K products and shrinks the error of a direction by the ratio of variance K + 1
    to its own. Raises ValueError unless 1 <= count <= the values of an image, and iterations >= 1.
    """
    most = y[0].numel()
    proper = _is_count(count) and count <= most and _is_count(iterations)
    _check(proper, f"give 1 to {most} components and 1 iteration or more", (count, iterations))
    _, multiply = posterior_covariance(denoiser, y, sigma)
    spread = torch.stack([noise(y) for _ in range(count)], dim=1)  # (B, K, 3, H, W)
    for _ in range(iterations):
        basis = torch.linalg.qr(spread.flatten(2).mT)[0].mT.reshape(spread.shape)
        spread = torch.stack([multiply(v) for v in basis.unbind(1)], dim=1)
    inner = basis.flatten(2) @ spread.flatten(2).mT
    variances, rotation = torch.linalg.eigh((inner + inner.mT) / 2)  # rising
    return variances.flip(1), (rotation.mT @ basis.flatten(2)).reshape(basis.shape).flip(1)


@torch.no_grad()
def estimate_sigma(
    denoiser, y, low, high, probes=4, together=False, iterations=16, tolerance=2e-3, start=None
):
    """Return the noise level, (B,), in [low, high], that makes each y most likely under p_s.

    With J = dD/dy, d log p_s(y) / ds = 0 is  |y - D|^2 = s^2 tr(I - J).  Fisher's scoring finds s:

        s^2 <- s^2 + (|y - D|^2 - s^2 tr(I - J)) / tr((I - J)^2),

    in one step where the prior is white. A step out of the bracket of known levels goes to the
    bracket's geometric middle. The search begins at `start` or, without it, at the level of a flat
    image with such differences of neighbours. Traces are means over `probes` fixed random vectors v
    of signs, and J v is a difference of two network calls (Ramani, Blu, Unser 2008): 1 + probes
    calls an iteration, and 1 to 10 iterations. Up to the tolerance an estimate depends on its image
    alone.

    Values that do not show the noise as it was are left out of all sums:
        outliers   y - D beyond 6 s, in less than a tenth of an image; see also `cut_extremes`
        clipping   D within 1.5 s of 0 or 1, if over 1 in 1000 values of y are exactly 0 or 1
    Where nothing is left, low comes back.

    together: all images share one level (tiles of one image). The standard error of s is, but for
    the probes, s / sqrt(2 tr((I - J)^2)). Raises ValueError unless 0 < low <= high.
    """
    _check(0 < low <= high, "the levels to search must be 0 < low <= high", (low, high))

    def mean(v):  # of each image, or of all: (B, C, H, W) -> (B,)
        means = v.flatten(1).mean(1)
        return means.mean().expand(len(y)) if together else means

    clipped = mean(((y == 0) | (y == 1)).to(y)) > 1e-3
    y = cut_extremes(y)
    differences = y.diff(dim=2).diff(dim=3) / 2
    s = mean(differences**2).sqrt().nan_to_num(low)  # none in a single row
    s = (s if start is None else torch.full_like(s, start)).clamp(low, high)
    below, above = torch.zeros_like(s), torch.full_like(s, inf)
    searching = torch.ones_like(clipped)
    for _ in range(iterations):
        excess, information = map(mean, _scoring(denoiser, y, s, clipped, probes))
        below, above = torch.where(excess > 0, s, below), torch.where(excess > 0, above, s)
        new = s * (1 + excess / information / s**2).clamp(min=0).sqrt()
        inside = (below <= new) & (new <= above)
        new = torch.where(inside, new, (below * above).sqrt()).clamp(low, high)
        new = torch.where(searching, new, s)
        searching, s = (new / s).log().abs() > tolerance, new
        if not searching.any():
            break
    return s


def cut_extremes(y):
    """Limit the values of each image: beyond the middle 98 % by at most the width of these.

    A network that sees a hot pixel of a hundred times white has no use of the pixels around it.
    """
    values = y.flatten(1)
    n, k = values.shape[1], 1 + values.shape[1] // 100
    first, last = (values.kthvalue(i).values.view(-1, 1, 1, 1) for i in (k, n + 1 - k))
    return y.clamp(2 * first - last, 2 * last - first)


def _scoring(denoiser, y, s, clipped, probes):
    """Return (y - D)^2 - s^2 (I - J)_ii, zero on average at the true level, and ((I - J)^2)_ii.

    Both are like y, and 0 where a value is left out; s and clipped are (B,).
    """
    denoised, sigma, step = denoiser(y, s), _per_image(s, y), 0.05 * _per_image(s, y)
    near_an_end = (denoised < 1.5 * sigma) | (denoised > 1 - 1.5 * sigma)
    outlier = (y - denoised).abs() > 6 * sigma
    rare = outlier.double().mean((1, 2, 3), keepdim=True) < 0.1  # else s is too low
    kept = ~(outlier & rare | near_an_end & clipped.view(-1, 1, 1, 1))
    excess, information = (kept * (y - denoised)) ** 2, 0.0
    rng = torch.Generator().manual_seed(0)
    for _ in range(probes):
        v = kept * torch.randn(y.shape[1:], generator=rng).sign().to(y)
        rest = kept * (v - (denoiser(y + step * v, s) - denoised) / step)
        excess = excess - sigma**2 * v * rest / probes
        information = information + rest**2 / probes
    return excess, information


def grey(denoiser, e):
    """Return a denoiser of grey images, (B, 1, H, W), from one of colour images.

    It is (x, sigma) -> E[x0 | x], the mean over its channels. The noise n of a grey image is the
    same in all channels. Zero-sum noise makes it white: with e unit Gaussian, sigma n + sqrt(3)
    sigma (e_c - mean e) is independent between channels, of standard deviation sqrt(3) sigma and
    mean sigma n. e, (1 or B, 3, H, W), is kept fixed, so that this is one differentiable
    function and everything above and every sampler work with it. Exact where luma and chroma are
    independent under the prior; the range of levels is that of the network over sqrt(3). In a
    sampler the network sees a grey image with white noise at every level, so what is drawn is grey;
    where luma and chroma depend on each other, its law is p(x0 | y) for grey x0 only as far as the
    network's is.
    """
    zero_sum = sqrt(3) * (e - e.mean(1, keepdim=True))

    def of_grey(x, sigma):
        white = x + _per_image(sigma, x) * zero_sum
        return denoiser(white, sqrt(3) * sigma).mean(1, keepdim=True)

    return of_grey


def _per_image(sigma, x):  # -> (1 or B, 1, 1, 1) like x
    return torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1, 1, 1)


# -----------------------------------------------------------------------------
# Observations
# -----------------------------------------------------------------------------


def natural_power(x):
    """Return the variances (C, H, W) of the discrete cosines of natural images like x, C 3 or 1.

        c exp(-10.6 (f^2 + g^2)) / ((f + g)^2 + 0.07 / (H W)),  f and g in cycles a pixel,

    photographs' 1 / f^2 at any size, softened, with one number c each for grey, red - blue and
    green - the rest. Within a factor of 1.3 (rms) of the power of CIFAR-10's training images.
    """
    f, g = (torch.arange(n, dtype=x.dtype, device=x.device) / (2 * n) for n in x.shape[2:])
    f = f[:, None]
    c = [8.6e-3 / 3]  # of the mean of the channels; below, of their sum over sqrt(3)
    if x.shape[1] == 3:
        c = [8.6e-3, 2.4e-4, 9e-5]
    shape = torch.exp(-10.6 * (f**2 + g**2)) / ((f + g) ** 2 + 0.07 / x[0, 0].numel())
    return torch.tensor(c).to(x)[:, None, None] * shape


def antithetic(noise):
    """Return noise for a batch of two halves: z and -z (Hammersley and Morton 1956).

    A sampler then draws antithetic pairs, sample k and sample k + B / 2 of the batch; both halves
    must have the same y. In the mean of a pair all that is linear in the noise cancels. For a
    Gaussian prior that is all of it: a pair has the mean of all samples, with `adams` and eta 1
    E[x0 | y]. Raises ValueError for a batch of odd size.
    """

    def pairs(x):
        _check(len(x) % 2 == 0, "the batch must have two equal halves", len(x))
        z = noise(x[: len(x) // 2])
        return torch.cat([z, -z])

    return pairs


def fill(y, A, sigma_y, like):
    """Return a classical estimate of x0 from y = A(x0) + sigma_y n, without a network.

    It is the posterior mean for the Gaussian prior N(m, P), m = 0.5, P of `natural_power`:

        m + w,  (A^T A + sigma_y^2 P^-1) w = A^T (y - A(m)),

    where an A that is not linear is linearised at m. The search for w begins at A^T (y - A(m)) over
    A^T A 1, and where a pixel is not observed at all at what is around it. like: (B, C, H, W),
    images of the shape, type and device wanted. For the rest see `observed`.
    """
    middle = torch.full_like(like, 0.5)
    near = _Tangent(A, middle)
    roughness = sigma_y**2 / natural_power(middle)
    response = _power(near.both_ways, middle).sqrt()

    def system(w):
        return near.both_ways(w) + _filter(w, roughness)

    def precondition(r):
        return _filter(r, 1 / (response + roughness))

    b = near.backwards(y - near.value)
    start = _interpolated(b, near.both_ways(torch.ones_like(middle)))
    rest = b - system(start)
    w = start + _conjugate_gradients(system, rest, precondition, steps=300, tolerance=1e-5)
    return middle + w


def _interpolated(values, weights):
    """Return values / weights or, where a weight is 0, that of a coarser image."""
    known = weights > UNSEEN
    mean = torch.where(known, values / weights, 0)
    if known.all() or mean[0, 0].numel() == 1:
        return mean
    coarse = (avg_pool2d(known * v, 2, ceil_mode=True) for v in (values, weights))
    return torch.where(known, mean, interpolate(_interpolated(*coarse), mean.shape[2:]))


def observed(
    denoiser, y, A, sigma_y, power=natural_power, resolution=0.03, tolerance=0.1, iterations=8
):
    """Return a denoiser given y = A(x0) + sigma_y n as well: (x, sigma) -> E[x0 | x, y].

        E[x0 | x, y] = D + V A^T u,  (sigma_y^2 + A V A^T) u = y - A(D),
        V = Cov[x0 | x] = sigma^2 (dD/dx)^T

    (moment matching, Rozet et al. 2024), exact where x0 given x is Gaussian and A affine. Another A
    is linearised at D. Where it is not linear over the spread of x0 given x, as with clipping,
    samples scatter too little or too much.

    Every sampler takes this denoiser. Its first argument is then not y but a start: an image such
    as that of `fill`, plus noise of the first level. `predictor_corrector` and `annealed_langevin`
    also pull towards that start at every level.

    y        the observations, (B, ...), one for each image of x
    A        a differentiable function, (B, C, H, W) -> (B, ...), in which images do not mix
    sigma_y  the standard deviation of its noise, in the units of y, above 0
    power    x -> variances (C, H, W), above 0, of the discrete cosines of clean images like x

    A network's dD/dx has eigenvalues from 0 to 1, and an error of about 0.01: of smaller ones not
    even the sign is right. What it cannot resolve comes from a Gaussian prior of variances
    power(x) (our addition):

        V = F sigma^2 (dD/dx)^T F + (1 - F^2) G,  F^2 = r / (r + resolution),

    where r = power / (power + sigma^2), one number for each cosine, are the eigenvalues of dD/dx
    under that prior, and G = sigma^2 r is its covariance.

    The equation is solved by generalised conjugate residuals, until the residual is `tolerance` of
    y - A(D) or after so many iterations, of one backward pass through the network each. Two to
    eight are usual, since the preconditioner solves the same equation with G for V. For an exact
    solution give resolution 0, a small tolerance and more iterations.

    The result carries no gradient. Raises ValueError unless sigma_y > 0; and where V A^T u reaches
    10 or is NaN: the units are wrong, or the sampling has diverged.
    """
    _check(sigma_y > 0, "sigma_y must be positive (rounding to 8 bits alone is 0.3 / 255)", sigma_y)

    def posterior(x, sigma):
        denoised, network_covariance = posterior_covariance(denoiser, x, sigma)
        variance, prior = _per_image(sigma, x) ** 2, power(x)
        r = prior / (prior + variance)  # the eigenvalues of dD/dx under the Gaussian prior
        gaussian = variance * r  # and those of its covariance, G
        trust = r / (r + resolution)  # F^2

        def covariance(v):
            resolved = _filter(network_covariance(_filter(v, trust.sqrt())), trust.sqrt())
            return resolved + _filter(v, (1 - trust) * gaussian)

        near = _Tangent(A, denoised)
        precondition = _gaussian_solver(near, gaussian, sigma_y)

        def respond(residual):
            u = precondition(residual)
            step = covariance(near.backwards(u))
            return step, sigma_y**2 * u + near.forwards(step)

        change = _conjugate_residuals(respond, y - near.value, iterations, tolerance)
        largest = change.abs().max().item()
        _check(
            largest < 10,  # False for NaN, too
            f"at noise level {sigma} y must ask for a change below 10 (check the units of y and A, "
            "pixels from 0 to 1, and the first level of the sampler)",
            f"{largest:.3g}",
        )
        return denoised + change

    return posterior


def posterior_mean(denoiser, y, A, sigma_y, like, noise=torch.randn_like):
    """Return an estimate of E[x0 | y] from y = A(x0) + sigma_y n, in 24 network calls an image.

    It is the mean of an antithetic pair of samples. The first pair starts from a classical fill
    plus noise, of level 0.5 or, if a pixel is not observed at all, 2: in a hole a fill may be far
    off. Two more start from the mean of the pair before.

    Such a mean is smoother than images are, so the network underestimates the variances V there.
    Two factors, chosen on images, make up for that: each pair starts with 0.85 of the noise of its
    first level, and sigma_y is multiplied by 0.8.

    like: as in `fill`. noise: for images like it. A must take B and 2 B images. For the rest see
    `observed`.
    """
    posterior = observed(denoiser, torch.cat([y, y]), A, 0.8 * sigma_y)
    noise = antithetic(noise)
    mean = fill(y, A, sigma_y, like)
    has_holes = (_Tangent(A, mean).both_ways(torch.ones_like(mean)) <= UNSEEN).any()
    for high, low in ((2.0 if has_holes else 0.5, 0.1), (0.3, 0.06), (0.15, 0.06)):
        start = torch.cat([mean, mean])
        start = start + 0.85 * high * noise(start)
        pair = adams(posterior, start, noise_levels(high, low, 4), noise=noise)
        mean = pair.unflatten(0, (2, len(y))).mean(0)
    return mean


class _Tangent:
    """The observation A near the images x: its value there, and products with its derivative A'."""

    def __init__(self, A, x):
        with torch.inference_mode(False):
            self.x = x.clone()
            self.value, self.transpose = torch.func.vjp(A, self.x)
            zero = torch.zeros_like(self.value)
            _, self.transpose_of_transpose = torch.func.vjp(lambda u: self.transpose(u)[0], zero)

    def forwards(self, v):  # A' v, from images to observations
        return self.transpose_of_transpose(v)[0]

    def backwards(self, u):  # A'^T u, from observations to images
        return self.transpose(u)[0]

    def both_ways(self, v):  # A'^T A' v
        return self.backwards(self.forwards(v))


def _gaussian_solver(near, gain, sigma_y):
    """Return r -> (sigma_y^2 + A G A^T)^-1 r, roughly, where G has the variances `gain` in cosines.

    Where y is an image, A G A^T is preconditioned by its diagonal in cosines.
    """

    def system(u):
        return sigma_y**2 * u + near.forwards(_filter(near.backwards(u), gain))

    precondition = torch.clone
    if near.value.ndim == 4:
        signal = _power(lambda v: near.forwards(_filter(v, gain.sqrt())), near.x)
        precondition = functools.partial(_filter, gain=1 / (signal + sigma_y**2))
    return lambda r: _conjugate_gradients(system, r, precondition, steps=20, tolerance=0.1)


def _power(linear, like, probes=8):
    """Return the variances of the cosines of linear(v), v white noise like the images `like`.

    They are means over a few fixed random images.
    """
    rng = torch.Generator().manual_seed(0)
    squares = 0.0
    for _ in range(probes):
        white = torch.randn(like.shape[1:], generator=rng).to(like).expand_as(like)
        squares = squares + _cosines(linear(white)) ** 2 / probes
    return squares.clamp(min=1e-8)


def _conjugate_residuals(respond, b, iterations, tolerance):
    """Return the sum of steps, (B, C, H, W), whose responses add up to b, (B, ...), or nearly.

    respond(residual) -> a step and its response. The residual never grows, whatever the responses
    are (GCR, Eisenstat, Elman, Schultz 1983). An image is done at `tolerance` of b.
    """
    solution, residual, before = torch.zeros(()).to(b), b, []
    for _ in range(iterations):
        going = ~(_dot(residual, residual) <= tolerance**2 * _dot(b, b))  # NaN goes on
        if not going.any():
            break
        step, response = respond(residual)
        for other, direction in before:
            share = _dot(response, direction)
            step = step - share.view(-1, 1, 1, 1) * other
            response = response - share * direction
        size = _dot(response, response).sqrt().clamp_min(1e-30)  # 0 for an image that is solved
        step, response = step / size.view(-1, 1, 1, 1), response / size
        before.append((step, response))
        share = torch.where(going, _dot(residual, response), 0)
        solution = solution + share.view(-1, 1, 1, 1) * step
        residual = residual - share * response
    return solution


def _conjugate_gradients(system, b, precondition, steps, tolerance):
    """Return u, system(u) = b (Hestenes and Stiefel 1952), to a residual of `tolerance` of b."""
    u, residual, direction, size = torch.zeros_like(b), b, 0.0, 1.0
    for _ in range(steps):
        going = ~(_dot(residual, residual) <= tolerance**2 * _dot(b, b))  # NaN goes on
        if not going.any():
            break
        z = precondition(residual)
        size, before = _dot(residual, z), size
        direction = z + torch.where(going, size / before, 0) * direction
        response = system(direction)
        share = torch.where(going, size / _dot(direction, response), 0)
        u = u + share * direction
        residual = residual - share * response
    return u


def _dot(a, b):  # of each image, in a shape that multiplies images
    return (a * b).sum(dim=tuple(range(1, a.ndim)), keepdim=True)


@torch.no_grad()
def _filter(x, gain):
    """Multiply the discrete cosines of images (B, C, H, W) by gain, (C, H, W) or one for each."""
    return _cosines(gain * _cosines(x), inverse=True)


def _cosines(x, inverse=False):
    """Return the orthogonal cosine transform over all axes of each image (B, C, H, W)."""
    bases = [_cosine_basis(n, x.dtype, x.device) for n in x.shape[1:]]
    C, H, W = (basis.T for basis in bases) if inverse else bases
    return torch.einsum("cd,bdhw->bchw", C, H @ x @ W.T)


@functools.cache
def _cosine_basis(n, dtype, device):  # its rows are the cosines
    k = torch.arange(n, dtype=torch.float64)
    basis = sqrt(2 / n) * (k[:, None] * (k + 0.5) * pi / n).cos()
    basis[0] /= sqrt(2)
    return basis.to(device, dtype)

"""Linear SDEs, and the samplers that run them backwards from a noisy image.

A noisy image y = x0 + sigma n is a state of the SDE, at the time when the noise-to-signal ratio is sigma. So the
reverse-time SDE started there draws from p(x0 | y), and nothing has to be generated from pure noise.

Every sampler takes a `denoiser`, any callable (x, sigma) -> E[x0 | x], and
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
        """g(t) = alpha(t) sqrt((sigma^2)'(t))  (Karras et al. 2022, eq. 13 and 14)."""
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
        b = (sigma**2).log1p()  # solve beta_min t + slope t^2 / 2 = b
        return 2 * b / (self.beta_min + (self.beta_min**2 + 2 * self.slope * b).sqrt())

    def _integral(self, t):
        return self.beta_min * t + self.slope * t**2 / 2


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
    return _run(denoiser, y, [1.0], [sigma], lambda i, x, denoised: denoised, callback)


def reverse_sde(denoiser, y, sigma, steps=100, sde=None, sigma_min=0.01, rho=7.0, generator=None, callback=None):
    """Draw from p(x0 | y): Euler-Maruyama on the reverse-time SDE (Anderson 1982; Song et al. 2021, eq. 6)

        dx = (f x - g^2 score) dt + g dw,  t falling,

    from the time of the noisy image to that of sigma_min, where one Tweedie step removes what is left. One network
    call a step. The law of the result is right to first order in the step. sde: VE() unless given.
    """
    t, alpha, levels, f, g = _path(sde or VE(), sigma, sigma_min, steps, rho)
    draw = _noise_source(y, generator)

    def update(i, x, denoised):
        if i + 1 == len(t):
            return denoised
        dt = t[i] - t[i + 1]
        drift = f[i] * x - g[i] ** 2 * _score(x, denoised, alpha[i], levels[i])
        return x - drift * dt + g[i] * math.sqrt(dt) * draw()

    return _run(denoiser, alpha[0] * y, alpha, levels, update, callback)


def probability_flow_ode(denoiser, y, sigma, steps=10, sde=None, sigma_min=0.01, rho=7.0, callback=None):
    """Follow the flow that has the marginals of the SDE without its noise, by Heun's method (Song et al. 2021, eq. 13)

        dx = (f x - g^2 score / 2) dt,  t falling,

    from the noisy image to sigma_min, where one Tweedie step removes what is left. Two network calls a step and one
    at the last level; second order in the step. The result is deterministic, sharper than E[x0 | y] with a larger
    error, and no draw from p(x0 | y).
    """
    t, alpha, levels, f, g = _path(sde or VE(), sigma, sigma_min, steps, rho)

    def slope(i, x, denoised):
        return f[i] * x - g[i] ** 2 * _score(x, denoised, alpha[i], levels[i]) / 2

    def update(i, x, denoised):
        if i + 1 == len(t):
            return denoised
        dt = t[i] - t[i + 1]
        first = slope(i, x, denoised)
        euler = x - first * dt
        second = slope(i + 1, euler, denoiser(euler / alpha[i + 1], levels[i + 1]))
        return x - (first + second) * dt / 2

    return _run(denoiser, alpha[0] * y, alpha, levels, update, callback)


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

    return _run(denoiser, y, [1.0] * steps, [sigma] * steps, update, callback)


def _run(denoiser, x, alpha, levels, update, callback):
    """The loop of every sampler: estimate x0 from the state x_t = alpha (x0 + sigma n), report it, move on."""
    for i, sigma in enumerate(levels):
        scaled = x / alpha[i]
        denoised = denoiser(scaled, sigma)
        if callback:
            callback(i, scaled, denoised, sigma)
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

"""Gaussian priors of images, whose denoisers and posteriors are known, and fixed noise, in float64.

For x0 ~ N(MU, K) and x = x0 + s n: E[x0 | x] = MU + K (K + s^2)^-1 (x - MU), and Cov[x0 | x] =
s^2 K (K + s^2)^-1.
"""

import torch

MU = 0.4


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def stream(seed):
    """Return a `noise` that draws from one fixed generator."""
    rng = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, dtype=x.dtype, generator=rng)


def white(c):
    """Return the denoiser for K = c^2: (x, sigma) -> E[x0 | x], sigma a number or (B,)."""

    def denoiser(x, sigma):
        s = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1, 1, 1)
        return MU + c**2 / (c**2 + s**2) * (x - MU)

    return denoiser


class Gaussian:
    """The denoiser for any K, (d, d) with d the values of an image; sigma is a number or (B,)."""

    def __init__(self, K):
        self.K = K

    def __call__(self, x, sigma):
        return MU + (self.gain(sigma) @ (x - MU).flatten(1)[..., None]).view_as(x)

    def gain(self, sigma):  # of E[x0 | x], (1 or B, d, d)
        variance = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1, 1) ** 2
        eye = torch.eye(len(self.K), dtype=torch.float64)
        return self.K @ torch.linalg.inv(self.K + variance * eye)

    def covariance(self, sigma):  # Cov[x0 | x], (1 or B, d, d)
        return torch.as_tensor(sigma).reshape(-1, 1, 1) ** 2 * self.gain(sigma)

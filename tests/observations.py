"""The table of observations: incomplete images, and ways to restore them.

An observation of the images x0, (B, 3, H, W), H and W multiples of 4, is y = A(x0) plus noise of
standard deviation sigma_y. Where a mask hides a pixel, y is 0.
"""

import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import gaussian_blur

import sde
import utils

BATCH = 200  # images that go through a network together
STEPS = 30  # network calls of a sample
DRAWS = 8  # samples in a mean of samples
STRENGTHS = (0.01, 0.05, 0.1, 0.23, 0.5)  # of splitting's prior; the best of them counts


def in_batches(function, y, seed):
    """Return function(part, noise) of all parts of y, on the CPU; image i has the seed seed + i."""
    results = []
    for first in range(0, len(y), BATCH):
        part = y[first : first + BATCH]
        seeds = range(seed + first, seed + first + len(part))
        results.append(function(part, utils.seeded_noise(seeds, y.device)).cpu())
    return torch.cat(results)


def samples(sampler, y, seed, count):
    """Return `count` results of sampler(y, noise) for each image: (count, B, C, H, W)."""
    return in_batches(sampler, torch.cat([y] * count), seed).unflatten(0, (count, len(y)))


# -----------------------------------------------------------------------------
# Observations
# -----------------------------------------------------------------------------


def hide(x, share):
    """Return x, and 0 where a pixel is missing: each with probability `share`, always the same."""
    kept = np.random.default_rng(0).random(x.shape[2:]) >= share
    return torch.from_numpy(kept).to(x) * x


def hole(x, side):
    """Return x, and 0 in a square in the middle."""
    kept = torch.ones_like(x)
    utils.crop(kept, side).zero_()
    return kept * x


OBSERVATIONS = {  # name: A
    "half of the pixels": partial(hide, share=0.5),
    "10 % of the pixels": partial(hide, share=0.9),
    "hole of 12 x 12": partial(hole, side=12),
    "blur of 1 pixel": partial(gaussian_blur, kernel_size=9, sigma=1.0),
    "blur of 2 pixels": partial(gaussian_blur, kernel_size=17, sigma=2.0),
    "half size": partial(F.avg_pool2d, kernel_size=2),
    "quarter size": partial(F.avg_pool2d, kernel_size=4),
    "colour from grey": lambda x: x.mean(1, keepdim=True),
}
TYPICAL = ("half of the pixels", "blur of 1 pixel", "half size", "colour from grey")


def observe(A, x0, sigma_y, seed):
    """Return y; a pixel that is missing has no noise."""
    y = A(x0)
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed + 1)).to(y)
    return y + sigma_y * noise * (A(torch.ones_like(x0)) > 0)


# -----------------------------------------------------------------------------
# Ways to restore images
# -----------------------------------------------------------------------------


def splitting(model, y, A, sigma_y, like, noise, strength, steps=24):
    """Return half-quadratic splitting (Zhang et al. 2022, DPIR, eq. 6) from a fill at level 1.

    Its step towards the data, x = argmin |y - A x|^2 / sigma_y^2 + strength |x - z|^2 / s^2, is
    `observed` with a denoiser that gives z itself: a prior to which all images are alike.
    """
    flat = partial(torch.full_like, fill_value=1e9)
    options = {"resolution": 0, "tolerance": 1e-2, "iterations": 20}
    data = sde.observed(lambda z, s: 1 * z, y, A, sigma_y, lambda x: flat(x[0]), **options)
    z = sde.fill(y, A, sigma_y, like)
    for s in sde.noise_levels(1.0, sigma_y, steps, math.inf):
        z = model(data(z, float(s) / math.sqrt(strength)), s)
    return z


def draw(model, y, A, sigma_y, like, noise):
    """Return samples from p(x0 | y), from a fill plus noise of the highest level of the model."""
    levels = sde.noise_levels(model.sigma_max, model.sigma_min, STEPS, math.inf)
    start = sde.fill(y, A, sigma_y, like) + model.sigma_max * noise(like)
    return sde.adams(sde.observed(model, y, A, sigma_y), start, levels, noise=noise)


def applied(method, model, A, sigma_y, x0, **options):
    """Return (y, noise) -> images of one of these methods; of x0 only the shape is used."""

    def restore(y, noise):
        like = y.new_zeros(len(y), *x0.shape[1:])
        return method(model, y, A, sigma_y, like, noise=noise, **options)

    return restore


def restore(model, A, y, sigma_y, x0, seed, drawn):
    """Return {method: (images, network calls)}; samples are of the first `drawn` images only.

    Splitting has the strength that is best for these images. The classical method is the posterior
    mean for a Gaussian prior, which is better than biharmonic inpainting, Wiener deconvolution and
    bicubic interpolation.
    """
    place = model, A, sigma_y, x0
    tried = []
    for strength in STRENGTHS:
        tried.append(in_batches(applied(splitting, *place, strength=strength), y, seed))
    best = max(tried, key=lambda images: utils.psnr(images, x0.cpu()).mean())
    found = {"classical": (sde.fill(y, A, sigma_y, x0).cpu(), 0), "splitting": (best, 24)}
    if drawn:
        many = samples(applied(draw, *place), y[:drawn], seed, DRAWS)
        found["one sample"] = many[0], STEPS
        found[f"mean of {DRAWS} samples"] = many.mean(0), DRAWS * STEPS
    mean = in_batches(applied(sde.posterior_mean, *place), y, seed)
    return found | {"posterior mean": (mean, 24)}


# -----------------------------------------------------------------------------
# The table
# -----------------------------------------------------------------------------


def compare(model, x0, sigma_y, seed, drawn, names=OBSERVATIONS):
    """Return a row for each observation and method, and rows of the figure, as utils.plot_images.

    "less splitting" is the mean difference in dB on the same images. Samples are drawn for the
    first `drawn` images; the figure shows the first image and the TYPICAL observations.
    """
    rows, panels, clean = [], [], x0.cpu()
    for name in names:
        A = OBSERVATIONS[name]
        y = observe(A, x0, sigma_y, seed)
        found = restore(model, A, y, sigma_y, x0, seed, drawn)
        panel = [("observation", F.interpolate(y[:1].cpu(), x0.shape[2:])[0], name)]
        reference = utils.psnr(found["splitting"][0], clean)
        for method, (images, calls) in found.items():
            count = len(images)
            psnr = utils.psnr(images, clean[:count])
            row = {"observation": name, "method": method, "network calls": calls, "images": count}
            row["PSNR dB"], row["±"] = mean_and_error(psnr)
            row["less splitting"], row[" ±"] = mean_and_error(psnr - reference[:count])
            rows.append(row)
            if not method.startswith("mean of"):
                panel.append((method, images[0], ""))
        if name in TYPICAL:
            panels.append([*panel, ("clean image", clean[0], "")])
    return rows, panels


def mean_and_error(values):
    """Return the mean of values (B,) and its standard error."""
    return values.mean().item(), values.std().item() / math.sqrt(len(values))

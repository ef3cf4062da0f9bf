"""What the table of observations is made of: incomplete images, and ways to restore them.

Images x0 are (B, 3, H, W), H and W multiples of 4. An observation is y = A(x0) plus noise of
standard deviation sigma_y; where A is a mask, y is 0 where a pixel is missing.
"""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from skimage.restoration import inpaint_biharmonic, wiener
from torchvision.transforms.functional import gaussian_blur

import sde
import utils

STRENGTHS = (0.05, 0.1, 0.23, 0.5, 1.0)  # of splitting's prior; the best of them counts


# -----------------------------------------------------------------------------
# Observations
# -----------------------------------------------------------------------------


def hidden(size, share, seed):
    """Return which of the pixels (H, W) are missing: each with probability `share`."""
    return torch.from_numpy(np.random.default_rng(seed).random(size) < share)


def hole(size, side, seed):
    """Return which of the pixels (H, W) are missing: a square in the middle."""
    missing = torch.zeros(size, dtype=bool)
    top, left = ((n - side) // 2 for n in size)
    missing[top : top + side, left : left + side] = True
    return missing


OBSERVATIONS = {  # name: kind, and its number
    "half of the pixels": (hidden, 0.5),
    "10 % of the pixels": (hidden, 0.9),
    "hole of 12 x 12": (hole, 12),
    "blur of 1 pixel": (gaussian_blur, 1.0),
    "blur of 2 pixels": (gaussian_blur, 2.0),
    "half size": (F.avg_pool2d, 2),
    "quarter size": (F.avg_pool2d, 4),
}
TYPICAL = ("half of the pixels", "blur of 1 pixel", "half size")  # also in stronger noise


def operator(name, size, seed):
    """Return A of the observation of this name, for images of size (H, W)."""
    kind, number = OBSERVATIONS[name]
    if kind is gaussian_blur:
        return functools.partial(kind, kernel_size=2 * math.ceil(4 * number) + 1, sigma=number)
    if kind is F.avg_pool2d:
        return functools.partial(kind, kernel_size=number)
    kept = ~kind(size, number, seed)
    return lambda x: kept.to(x) * x


def observe(name, x0, sigma_y, seed):
    """Return A and y; the same pixels are missing in all images."""
    A = operator(name, x0.shape[2:], seed)
    y = A(x0)
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed + 1)).to(x0)
    y = y + sigma_y * noise
    return A, (A(y) if OBSERVATIONS[name][0] in (hidden, hole) else y)


# -----------------------------------------------------------------------------
# Ways to restore an image
# -----------------------------------------------------------------------------


def classical(name, y):
    """Return {label: [images, ...]} of established methods, of every strength to choose from."""
    kind, number = OBSERVATIONS[name]
    if kind is gaussian_blur:
        balances = np.geomspace(1e-4, 1, 17)
        tried = [each(functools.partial(deconvolve, sigma=number, balance=b), y) for b in balances]
        return {"Wiener deconvolution": tried}
    if kind is F.avg_pool2d:
        bicubic = F.interpolate(y, scale_factor=number, mode="bicubic", align_corners=False)
        return {"bicubic": [bicubic]}
    missing = (y == 0).all(0).all(0).cpu().numpy()
    return {"biharmonic inpainting": [each(lambda v: inpaint_biharmonic(v, missing), y)]}


def deconvolve(channel, sigma, balance):
    reach = math.ceil(4 * sigma)
    point = np.zeros((2 * reach + 1, 2 * reach + 1))
    point[reach, reach] = 1
    padded = np.pad(channel, 2 * reach, mode="reflect")
    restored = wiener(padded, ndimage.gaussian_filter(point, sigma), balance, clip=False)
    return restored[2 * reach : -2 * reach, 2 * reach : -2 * reach]


def each(function, y):
    """Apply a function of one float64 array (H, W) to every channel of every image."""
    results = [function(channel) for channel in y.flatten(0, 1).double().cpu().numpy()]
    return torch.from_numpy(np.stack(results)).unflatten(0, y.shape[:2]).to(y)


def splitting(model, start, A, y, sigma_y, strength, steps=24):
    """Return the images of half-quadratic splitting (Zhang et al. 2022, DPIR, eq. 6) from level 1.

    Its step towards the data, x = argmin |y - A x|^2 / sigma_y^2 + strength |x - z|^2 / s^2, is
    `observed` with a denoiser that gives z itself: a prior to which all images are alike.
    """
    flat = functools.partial(torch.full_like, fill_value=1e9)
    options = {"resolution": 0, "tolerance": 1e-4, "iterations": 20}
    data = sde.observed(lambda z, s: 1 * z, y, A, sigma_y, lambda x: flat(x[0]), **options)
    z = start
    for s in sde.noise_levels(1.0, sigma_y, steps, math.inf):
        z = model(data(z, float(s) / math.sqrt(strength)), s)
    return z


def draws(model, x0, A, y, sigma_y, steps, count, batch, seed):
    """Return samples from p(x0 | y), (count, B, 3, H, W) on the CPU, in `steps` calls each.

    They start from noise of the highest level that the model knows. Of x0 only the shape is used.
    """
    levels = sde.noise_levels(model.sigma_max, model.sigma_min, steps, math.inf)
    filled, found, together = sde.fill(y, A, sigma_y, x0), [], max(1, batch // len(y))
    for first in range(0, count, together):
        n = min(together, count - first)
        seeds = range(seed + first * len(y), seed + (first + n) * len(y))
        noise = utils.seeded_noise(seeds, y.device)
        posterior = sde.observed(model, torch.cat([y] * n), A, sigma_y)
        start = torch.cat([filled] * n)
        start = start + model.sigma_max * noise(start)
        samples = sde.adams(posterior, start, levels, noise=noise)
        found.append(samples.unflatten(0, (n, len(y))).cpu())
    return torch.cat(found)


def restore(model, name, x0, A, y, sigma_y, seed, batch, steps, count):
    """Return {method: (images, network calls)}; strengths are those that suit these images best."""
    best = functools.partial(max, key=lambda images: utils.psnr(images, x0).mean().item())
    filled = sde.fill(y, A, sigma_y, x0)
    tried = [filled] + [images for some in classical(name, y).values() for images in some]
    found = {"classical, the best": (best(tried), 0)}
    tried = [splitting(model, filled, A, y, sigma_y, strength) for strength in STRENGTHS]
    found["splitting"] = best(tried), 24
    if count:
        samples = draws(model, x0, A, y, sigma_y, steps, count, batch, seed).to(x0)
        found["one sample"] = samples[0], steps
        found[f"mean of {count} samples"] = samples.mean(0), steps * count
    noise = utils.seeded_noise(range(seed, seed + len(y)), y.device)
    mean = sde.posterior_mean(model, y, A, sigma_y, x0, noise=noise)
    return found | {"posterior mean, by pairs": (mean, 24)}


# -----------------------------------------------------------------------------
# The table
# -----------------------------------------------------------------------------


def compare(model, x0, sigma_y, seed, batch, steps, count=8, names=OBSERVATIONS):
    """Return a row for each observation and method, and panels of the first image.

    steps: network calls of a sample; count: samples in a mean, 0: none; batch: images of one
    network call. The row of a method tells how far it is from splitting, image by image, with
    standard errors.
    """
    rows, panels = [], []
    for name in names:
        A, y = observe(name, x0, sigma_y, seed)
        found = restore(model, name, x0, A, y, sigma_y, seed, batch, steps, count)
        reference = utils.psnr(found["splitting"][0], x0)
        for method, (images, calls) in found.items():
            psnr = utils.psnr(images, x0)
            row = {"observation": name, "method": method, "network calls": calls}
            row["PSNR dB"], row["±"] = mean_and_error(psnr)
            row["less splitting"], row[" ±"] = mean_and_error(psnr - reference)
            rows.append(row)
        panels.append([("observation", F.interpolate(y[:1], x0.shape[2:])[0].cpu(), name)])
        panels[-1] += [(method, images[0].cpu(), "") for method, (images, _) in found.items()]
        panels[-1].append(("clean image", x0[0].cpu(), ""))
    return rows, panels


def mean_and_error(values):
    return values.mean().item(), values.std().item() / math.sqrt(len(values))

"""What the tables of observations are made of: half of the pixels, a blurred picture, a smaller one, and ways to undo it.

x0 is (B, 3, H, W) with even H and W. y is A(x0) plus noise of sigma_y; where A is a mask, y is 0 where nothing is seen.
"""

import math
from functools import partial

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from skimage.restoration import inpaint_biharmonic, wiener
from torch.nn.functional import interpolate

import denoise
import pictures
import sde
import utils

OBSERVATIONS = {"half of the pixels": {"mask": "0.5"}, "blur of 1 pixel": {"blur": 1.0}, "half size": {"enlarge": 2}}


def observe(name, x0, sigma_y, seed):
    """Return A and y; the same pixels are missing in all images."""
    A = denoise.observation(x0.shape[2:], **OBSERVATIONS[name], seed=seed)
    y = A(x0) + sigma_y * torch.randn(A(x0).shape, generator=torch.Generator().manual_seed(seed + 1)).to(x0)
    return A, A(y) if "mask" in OBSERVATIONS[name] else y


def draws(model, x0, A, y, sigma_y, steps, count, batch, seed):
    """Return draws from p(x0 | y), (count, B, 3, H, W), in `steps` calls from pure noise; of x0 only the shape is used."""
    levels = sde.noise_levels(model.sigma_max, model.sigma_min, steps, math.inf)

    def sampler(like, noise):
        posterior = sde.observed(model, y.repeat(len(like) // len(y), 1, 1, 1), A, sigma_y)
        start = denoise.fill(y, A, sigma_y, like[: len(y)]).repeat(len(like) // len(y), 1, 1, 1)
        return sde.adams(posterior, start + model.sigma_max * noise(like), levels, noise=noise)

    return pictures.posterior_draws(sampler, torch.zeros_like(x0), count, batch, seed)


def classical(name, y):
    """Return {label: images} by established means; a strength is to be chosen from each list by what fits the truth best."""
    if name == "half of the pixels":
        hidden = (y == 0).all(0).all(0).cpu().numpy()
        return {"biharmonic inpainting": [each(partial(inpaint_biharmonic, mask=hidden), y)]}
    if name == "half size":
        kernels = {"bicubic": Image.Resampling.BICUBIC, "Lanczos": Image.Resampling.LANCZOS}
        return {label: [each(partial(enlarge, kernel=kernel), y)] for label, kernel in kernels.items()}
    return {"Wiener deconvolution": [each(partial(deconvolve, balance=b), y) for b in np.geomspace(1e-4, 1, 17)]}


def enlarge(channel, kernel):
    size = tuple(2 * n for n in channel.T.shape)
    return np.asarray(Image.fromarray(channel.astype(np.float32)).resize(size, kernel))


def deconvolve(channel, balance, reach=8):
    point = np.zeros((9, 9))
    point[4, 4] = 1
    padded = np.pad(channel, reach, mode="reflect")
    return wiener(padded, ndimage.gaussian_filter(point, 1), balance, clip=False)[reach:-reach, reach:-reach]


def each(function, y):
    """Apply a function of one float64 array (H, W) to every channel of every image."""
    results = [function(channel) for channel in y.flatten(0, 1).double().cpu().numpy()]
    return torch.from_numpy(np.stack(results)).unflatten(0, y.shape[:2]).to(y)


def splitting(model, start, A, y, sigma_y, strength, steps=24):
    """Return the images of half-quadratic splitting with this network (Zhang et al. 2022, DPIR, eq. 6), from noise level 1.

    x = argmin |y - A x|^2 / sigma_y^2 + strength |x - z|^2 / s^2 is what `observed` makes of a denoiser that gives z itself, as
    it would where every picture is as likely as any other.
    """
    data = sde.observed(lambda x, sigma: 1 * x, y, A, sigma_y, power=lambda x: torch.full_like(x[0], 1e9), resolution=0)
    z = start
    for s in sde.noise_levels(1.0, sigma_y, steps, math.inf):
        z = model(data(z, float(s) / math.sqrt(strength)), s)
    return z


def compare(model, x0, sigma_y, seed, batch, calls, count=8):
    """Return a row for each observation and way to undo it, its strength the best for these images, and panels of the first."""
    rows, panels, best = [], [], partial(max, key=lambda images: utils.psnr(images, x0).mean().item())
    for name in OBSERVATIONS:
        A, y = observe(name, x0, sigma_y, seed)
        found = draws(model, x0, A, y, sigma_y, calls, count, batch, seed)
        seen = interpolate(y[:1].cpu(), x0.shape[2:], mode="nearest")[0]
        panels.append(denoise.panels_of_draws(seen, sigma_y, found[:, 0], x0[0].cpu()))
        found = found.to(x0)
        others = {label: best(tried) for label, tried in classical(name, y).items()}
        ours = {"one draw": (found[0], calls), f"mean of {count}": (found.mean(0), calls * count)}
        tried = [splitting(model, best(others.values()), A, y, sigma_y, strength) for strength in (0.1, 0.23, 0.5, 1.0)]
        ways = ours | {"splitting": (best(tried), 24)} | {label: (images, 0) for label, images in others.items()}
        for label, (images, forwards) in ways.items():
            psnr = utils.psnr(images, x0)
            row = {"observation": name, "method": label, "PSNR dB": psnr.mean().item()}
            row |= {"±": psnr.std().item() / math.sqrt(len(psnr)), "SSIM": utils.ssim(images, x0).mean()}
            rows.append(row | {"network calls": forwards, "backwards": 3 * forwards * (label in ours)})
    return rows, panels

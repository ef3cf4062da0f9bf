"""What the tables of pictures are made of: noise levels found, lossy files, grey pictures, errors expected without the truth."""

import functools
import io
import itertools

import numpy as np
import torch
from PIL import Image
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle, denoise_wavelet
from torch.nn.functional import avg_pool2d

import denoise
import sde
import utils

CODECS = {
    "PNG": ("PNG", {}),
    "JPEG 95": ("JPEG", {"quality": 95, "subsampling": 2}),
    "JPEG 75": ("JPEG", {"quality": 75, "subsampling": 2}),
    "WebP 80": ("WEBP", {"quality": 80}),
    "AVIF 75": ("AVIF", {"quality": 75}),
}
CLASSICAL = {  # of grey pictures, each with the strengths to choose the best from, as multiples of sigma
    "non-local means": (lambda y, s, k: denoise_nl_means(y, 5, 6, h=k * s, sigma=s, fast_mode=True), (0.4, 0.6, 0.8, 1.0)),
    "total variation": (lambda y, s, k: denoise_tv_chambolle(y, k * s), (0.6, 0.8, 1.0, 1.2, 1.5, 1.8, 2.2)),
    "wavelets": (lambda y, s, k: denoise_wavelet(y, sigma=k * s, rescale_sigma=False), (0.7, 0.85, 1.0, 1.2)),
}


def photographs(size, device="cpu"):
    """Return the middle size x size pixels of the photographs that scikit-image installs: {name: (1, 3, H, W)}."""
    return {
        name: utils.crop(torch.from_numpy(array.astype(np.float32) / 255).permute(2, 0, 1)[None], size).to(device)
        for name, array in utils.sample_photographs()
    }


def noisy(x0, sigma, seed):
    return x0 + sigma * torch.from_numpy(np.random.default_rng(seed).standard_normal(x0.shape)).to(x0)


def posterior_draws(sampler, y, count, batch, seed):
    """Return `count` draws of sampler(y, noise) for each image, (count, B, 3, H, W) on the CPU; every draw has its own seed."""
    stack, per_batch = [], max(1, batch // len(y))
    for first in range(0, count, per_batch):
        n = min(per_batch, count - first)
        noise = utils.seeded_noise([seed + first * len(y) + i for i in range(n * len(y))], y.device)
        stack.append(sampler(y.repeat(n, 1, 1, 1), noise).unflatten(0, (n, len(y))).cpu())
    return torch.cat(stack)


def eight_bits(x):
    return (x.clamp(0, 1) * 255).round() / 255


def through(x, form, options):
    """Write an image (1, 3, H, W) to a file in memory, and read it again."""
    file = io.BytesIO()
    Image.fromarray(utils.to_array(x[0])).save(file, form, **options)
    return torch.from_numpy(np.asarray(Image.open(file).convert("RGB")).astype(np.float32) / 255).permute(2, 0, 1)[None].to(x)


def level_rows(model, x0, sigmas, seed, low, high, batch=50):
    """Return a row for each level and kind of input: how near the estimates of single pictures (N, 3, 32, 32) come."""
    rows = []
    for sigma in sigmas:
        for kind, part in (("float", None), ("8 bit", denoise.unclipped)):
            y = noisy(x0, sigma, seed) if kind == "float" else eight_bits(noisy(x0, sigma, seed))
            ratio = torch.cat([sde.estimate_sigma(model, images, low, high, part=part) for images in y.split(batch)]) / sigma
            row = {"sigma": f"{sigma:g}", "input": kind, "median of found / true": ratio.median().item()}
            row |= {"least": ratio.min().item(), "most": ratio.max().item()}
            within = {f"within {share:.0%}": ((ratio - 1).abs() < share).float().mean().item() for share in (0.04, 0.08)}
            rows.append(row | within)
    return rows


def photograph_rows(model, sigmas, seed, device="cpu"):
    """Return a row for each level and kind of input: how near the estimates of whole photographs come, from a few tiles.

    Photographs have grain of their own, which adds to the noise; where 4 x 4 pixels are averaged, a quarter of it is left.
    """
    rows = []
    for sigma, size, kind in itertools.product(sigmas, ("whole", "quarter size"), ("float", "8 bit")):
        ratios = []
        for x0 in photographs(10_000, device).values():
            y = noisy(x0 if size == "whole" else avg_pool2d(x0, 4), sigma, seed)
            y = y if kind == "float" else eight_bits(y)
            ratios.append(denoise.picture_level(model, y, model.sigma_min, 1.0)[0] / sigma)
        row = {"sigma": f"{sigma:g}", "input": f"photographs, {size}, {kind}", "median of found / true": float(np.median(ratios))}
        rows.append(row | {"least": min(ratios), "most": max(ratios)})
    return rows


def codec_rows(model, sigmas, seed, size=128, device="cpu"):
    """Return a row for each level and file format: PSNR with the level found, beside the best that any level gives."""
    rows = []
    for sigma in sigmas:
        for codec, (form, options) in CODECS.items():
            ratios, best, losses = [], [], []
            for x0 in photographs(size, device).values():
                y = through(noisy(x0, sigma, seed), form, options)
                found, _ = denoise.picture_level(model, y, model.sigma_min, 1.0)
                quality = {s: utils.psnr(model(y, s), x0).item() for s in (found, *(sigma * np.geomspace(0.3, 1.7, 14)))}
                ratios.append(found / sigma)
                best.append(max(quality.values()))
                losses.append(best[-1] - quality[found])
            ratio, reached, loss = (float(np.mean(values)) for values in (ratios, best, losses))
            row = {"sigma": f"{sigma:g}", "file": codec, "found / true": ratio, "best PSNR dB": reached}
            rows.append(row | {"mean loss dB": loss, "largest loss dB": max(losses)})
    return rows


def grey_rows(model, sigmas, seed, size=256, device="cpu"):
    """Return a row for each level: mean PSNR on grey photographs, of the network and of classical denoisers at their best."""
    clean = [x0.mean(1, keepdim=True) for x0 in photographs(size, device).values()]
    rows = []
    for sigma in sigmas:
        pairs = [(noisy(x0, sigma, seed + i), x0) for i, x0 in enumerate(clean)]
        row = {"sigma": f"{sigma:g}"}
        row["network, PSNR dB"] = mean_psnr(pairs, functools.partial(denoise.of_any_kind(model), sigma=sigma))
        row["as if it were coloured"] = mean_psnr(pairs, functools.partial(in_three_channels, model=model, sigma=sigma))
        for name, (method, strengths) in CLASSICAL.items():
            runs = [functools.partial(in_one_channel, method=method, sigma=sigma, strength=k) for k in strengths]
            row[f"{name}, PSNR dB"] = max(mean_psnr(pairs, run) for run in runs)
        best = max(row[f"{name}, PSNR dB"] for name in CLASSICAL)
        rows.append(row | {"gain dB": row["network, PSNR dB"] - best})
    return rows


def mean_psnr(pairs, denoiser):
    return float(np.mean([utils.psnr(denoiser(y), x0).item() for y, x0 in pairs]))


def in_three_channels(y, model, sigma):
    return model(y.expand(-1, 3, -1, -1), sigma).mean(1, keepdim=True)


def in_one_channel(y, method, sigma, strength):
    return torch.from_numpy(method(y[0, 0].double().cpu().numpy(), sigma, strength))[None, None].to(y.device)


def expected_errors(model, x0, sigma, seed, probes=8, batch=50):
    """Return the PSNR expected without the truth and the true one, of the unclipped estimate: two tensors (N,)."""
    expected, true = [], []
    for images, y in zip(x0.split(batch), noisy(x0, sigma, seed).split(batch)):
        noise = utils.seeded_noise(range(seed, seed + len(y)), y.device)
        denoised, variance = sde.expected_error(model, y, sigma, probes, noise)
        expected.append(-10 * variance.mean((1, 2, 3)).log10())
        true.append(-10 * ((denoised - images) ** 2).mean((1, 2, 3)).log10())
    return torch.cat(expected), torch.cat(true)


def expected_row(expected, true, sigma):
    """Return how the expected PSNR compares with the true one."""
    off, correlation = expected - true, torch.corrcoef(torch.stack([expected, true]))[0, 1].item()
    row = {"sigma": f"{sigma:g}", "true PSNR dB": true.mean().item(), "expected less true": off.mean().item()}
    return row | {"its deviation": off.std().item(), "correlation": correlation}

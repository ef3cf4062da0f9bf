"""The tables of photographs: noise levels found, lossy files, grey images, and two networks.

Images are lists of clean ones, (3, H, W) or grey (1, H, W) each, in [0, 1].
"""

import io

import numpy as np
import torch
from PIL import Image
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle

import denoise
import sde
import utils

FILES = {  # name: how Pillow writes it; "float" is no file
    "float": None,
    "PNG": {"format": "PNG"},
    "JPEG 95": {"format": "JPEG", "quality": 95, "subsampling": 2},
    "JPEG 75": {"format": "JPEG", "quality": 75, "subsampling": 2},
    "WebP 80": {"format": "WEBP", "quality": 80},
}


def non_local_means(y, sigma, strength):
    patches = {"patch_size": 5, "patch_distance": 5, "fast_mode": False}
    return denoise_nl_means(y, h=strength * sigma, sigma=sigma, channel_axis=0, **patches)


def total_variation(y, sigma, strength):
    return denoise_tv_chambolle(y, strength * sigma, channel_axis=0)


CLASSICAL = {  # label: method of an array (C, H, W), and the strengths of which the best is shown
    "non-local means": (non_local_means, (0.4, 0.6, 0.8, 1.0)),
    "total variation": (total_variation, (0.6, 0.8, 1.0, 1.2, 1.5, 1.8, 2.2)),
}


def read(source, count, size=None):
    """Return the first `count` images of a source, or their middle size x size pixels.

    source: "photographs" (scikit-image's five), or as in utils.read_images.
    """
    if source == "photographs":
        arrays = (array[None] / np.float32(255) for _, array in utils.sample_photographs())
    else:
        arrays = (image.pixels for image in utils.read_images(source))
    images = []
    for array in arrays:
        images.extend(torch.from_numpy(array).permute(0, 3, 1, 2).expand(-1, 3, -1, -1))
        if len(images) >= count:
            break
    return [utils.crop(image, size) if size else image for image in images[:count]]


def grey(x0):  # brightness, ITU-R BT.601, as in grey test sets
    return (x0 * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True)


def through(y, name):
    """Write an image (1, 3, H, W) to a file in memory, and read it again."""
    if FILES[name] is None:
        return y
    file = io.BytesIO()
    Image.fromarray(utils.to_array(y[0])).save(file, **FILES[name])
    array = np.asarray(Image.open(file).convert("RGB"), np.float32) / 255
    return torch.from_numpy(array).permute(2, 0, 1)[None].to(y)


def level_found(model, y):
    """Return the noise level that denoise.py finds in an image (1, C, H, W)."""
    low, high = denoise.level_range(model, y)
    return denoise.image_level(model, y, low, min(high, 1.0))[0]


def in_one_step(model, y, sigma):
    """Return E[x0 | y] as denoise.py does, in tiles, and for one channel as a grey image."""
    return denoise.grey(utils.tiled(model), y)(y, sigma).cpu()


def expected_psnr(model, y, sigma):
    """Return the PSNR that denoise.py expects of a large image (1, C, H, W), by one probe."""
    noise = utils.seeded_noise([0], y.device)
    variance = sde.expected_error(denoise.grey(utils.tiled(model), y), y, sigma, 1, noise)[1]
    return -10 * variance.mean().log10().item()


def each(method, y, sigma, strength):
    """Return the results of a method of arrays (C, H, W) for all images of y."""
    images = [method(array, sigma, strength) for array in y.double().cpu().numpy()]
    return torch.from_numpy(np.stack(images))


def qualities(denoiser, method, pairs, *arguments):
    """Return the PSNR of denoiser(method, y, ...) for each pair (y, x0)."""
    images = (denoiser(method, y, *arguments) for y, _ in pairs)
    return np.array([utils.psnr(image, x0).item() for image, (_, x0) in zip(images, pairs)])


# -----------------------------------------------------------------------------
# Tables
# -----------------------------------------------------------------------------


def rows(function, model, images, sigmas, seed, device="cpu"):
    """Return the rows that function(model, pairs, sigma) finds at each noise level.

    pairs: of a noisy image y on the device and a clean one x0, (1, C, H, W); image i gets the noise
    of seed + i.
    """
    found = []
    for sigma in sigmas:
        pairs = []
        for i, x0 in enumerate(images):
            y = denoise.add_noise(x0[None], sigma, np.random.default_rng(seed + i))
            pairs.append((y.to(device), x0[None]))
        found.extend({"sigma": f"{sigma:.3g}"} | row for row in function(model, pairs, sigma))
    return found


def level_rows(model, pairs, sigma):
    """Yield a row for floats and 8 bits: the levels found over the true one."""
    for kind in ("float", "PNG"):
        ratios = np.array([level_found(model, through(y, kind)) / sigma for y, _ in pairs])
        within = (abs(ratios - 1) < 0.04).mean().item()
        yield {"file": kind, "median": float(np.median(ratios)), "within 4%": within}


def file_rows(model, pairs, sigma):
    """Yield a row for each format: what the level found costs in PSNR, against the best of 15."""
    for name in list(FILES)[1:]:
        ratios, losses = [], []
        for y, x0 in pairs:
            y = through(y, name)
            found = level_found(model, y)
            tried = [found, *sigma * np.geomspace(0.3, 1.7, 14)]
            psnrs = [qualities(in_one_step, model, [(y, x0)], s).item() for s in tried]
            ratios.append(found / sigma)
            losses.append(max(psnrs) - psnrs[0])
        row = {"file": name, "found / true": float(np.mean(ratios))}
        yield row | {"mean loss dB": float(np.mean(losses)), "largest loss dB": max(losses)}


def classical_rows(model, pairs, sigma):
    """Yield a row: mean PSNR of the network, and of classical denoisers at their best strengths."""
    row = {"network, PSNR dB": qualities(in_one_step, model, pairs, sigma).mean()}
    for label, (method, strengths) in CLASSICAL.items():
        tried = [qualities(each, method, pairs, sigma, k).mean() for k in strengths]
        row[f"{label}, PSNR dB"] = max(tried)
    network, *classical = row.values()
    yield row | {"gain dB": network - max(classical)}


def network_rows(models, pairs, sigma):
    """Yield a row: one-step PSNR of two networks, {label: network}, and the gain of the second.

    "expected less true" is the PSNR that the second expects without the truth, less its true one.
    """
    first, second = (qualities(in_one_step, model, pairs, sigma) for model in models.values())
    row = {f"{label}, PSNR dB": psnr.mean() for label, psnr in zip(models, (first, second))}
    error = (second - first).std(ddof=1) / len(pairs) ** 0.5
    row |= {"gain dB": (second - first).mean(), "±": error}
    (_, model), off = models.values(), -second
    off += [expected_psnr(model, y, sigma) for y, _ in pairs]
    yield row | {"expected less true": off.mean(), "its deviation": off.std(ddof=1)}

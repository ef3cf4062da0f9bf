"""The tables of photographs: noise levels found, lossy files, grey images, and two networks.

Images are lists of clean ones, whole, (3, H, W) each in [0, 1]. Image i gets the noise of seed + i.
"""

import io

import numpy as np
import torch
from PIL import Image
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle

import denoise
import utils

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601, as in grey test sets
CODECS = {
    "PNG": ("PNG", {}),
    "JPEG 95": ("JPEG", {"quality": 95, "subsampling": 2}),
    "JPEG 75": ("JPEG", {"quality": 75, "subsampling": 2}),
    "WebP 80": ("WEBP", {"quality": 80}),
}


def non_local_means(y, sigma, strength):
    return denoise_nl_means(y, 5, 6, h=strength * sigma, sigma=sigma, fast_mode=True)


def total_variation(y, sigma, strength):
    return denoise_tv_chambolle(y, strength * sigma)


CLASSICAL = {  # each with the strengths of which the best is shown
    non_local_means: (0.4, 0.6, 0.8, 1.0),
    total_variation: (0.6, 0.8, 1.0, 1.2, 1.5, 1.8, 2.2),
}


def read(source, count):
    """Return the first `count` images of a source; "photographs": scikit-image's, whole."""
    if source == "photographs":
        arrays = [array for _, array in utils.sample_photographs()]
        return [torch.from_numpy(array / np.float32(255)).permute(2, 0, 1) for array in arrays]
    found = []
    for image in utils.read_images(source):
        found.extend(torch.from_numpy(image.pixels).permute(0, 3, 1, 2).expand(-1, 3, -1, -1))
        if len(found) >= count:
            break
    return found[:count]


def grey(x0):
    return (x0 * torch.tensor(LUMA).view(3, 1, 1)).sum(0, keepdim=True)


def noisy(x0, sigma, seed, device="cpu"):  # (C, H, W) -> (1, C, H, W)
    return denoise.add_noise(x0[None], sigma, np.random.default_rng(seed)).to(device)


def through(y, form, options):
    """Write an image (1, 3, H, W) to a file in memory, and read it again."""
    file = io.BytesIO()
    Image.fromarray(utils.to_array(y[0])).save(file, form, **options)
    array = np.asarray(Image.open(file).convert("RGB"), np.float32) / 255
    return torch.from_numpy(array).permute(2, 0, 1)[None].to(y)


def level_found(model, y):
    """Return the noise level that denoise.py finds in an image (1, C, H, W)."""
    low, high = denoise.level_range(model, y)
    return denoise.image_level(model, y, low, min(high, 1.0))[0]


def in_one_step(model, y, sigma):
    """Return E[x0 | y] as denoise.py does, in tiles, and for one channel as a grey image."""
    denoiser = utils.tiled(model)
    if y.shape[1] == 1:
        denoiser = denoise.grey(denoiser, y)
    return denoiser(y, sigma)


def quality(images, x0):  # (1, C, H, W), (C, H, W) -> dB
    return utils.psnr(images.cpu(), x0[None]).item()


# -----------------------------------------------------------------------------
# Tables
# -----------------------------------------------------------------------------


def level_rows(model, images, sigmas, seed, device="cpu"):
    """Return a row for each noise level and type of file: the levels found over the true one."""
    rows = []
    for sigma in sigmas:
        for kind, form in (("float", None), ("8 bits", CODECS["PNG"])):
            ratios = []
            for i, x0 in enumerate(images):
                y = noisy(x0, sigma, seed + i, device)
                ratios.append(level_found(model, through(y, *form) if form else y) / sigma)
            ratios = np.array(ratios)
            row = {"sigma": f"{sigma:g}", "file": kind, "median": float(np.median(ratios))}
            row |= {"least": ratios.min().item(), "most": ratios.max().item()}
            for share in (0.04, 0.08):
                row[f"within {share:.0%}"] = (abs(ratios - 1) < share).mean().item()
            rows.append(row)
    return rows


def codec_rows(model, images, sigmas, seed, device="cpu"):
    """Return a row for each level and file format: PSNR with the level found, and with the best."""
    rows = []
    for sigma in sigmas:
        for codec, (form, options) in CODECS.items():
            ratios, best, losses = [], [], []
            for i, x0 in enumerate(images):
                y = through(noisy(x0, sigma, seed + i, device), form, options)
                found = level_found(model, y)
                reached = quality(in_one_step(model, y, found), x0)
                tried = [in_one_step(model, y, s) for s in sigma * np.geomspace(0.3, 1.7, 14)]
                best.append(max(reached, *(quality(images, x0) for images in tried)))
                ratios.append(found / sigma)
                losses.append(best[-1] - reached)
            row = {"sigma": f"{sigma:g}", "file": codec, "found / true": float(np.mean(ratios))}
            row |= {"best PSNR dB": float(np.mean(best)), "mean loss dB": float(np.mean(losses))}
            rows.append(row | {"largest loss dB": max(losses)})
    return rows


def grey_rows(model, images, sigmas, seed, device="cpu"):
    """Return a row for each level: mean PSNR of the network and of classical denoisers."""
    rows = []
    for sigma in sigmas:
        pairs = []
        for i, x0 in enumerate(map(grey, images)):
            pairs.append((noisy(x0, sigma, seed + i, device), x0))
        row = {"sigma": f"{sigma:g}"}
        row["network, PSNR dB"] = mean_quality(in_one_step, pairs, model, sigma)
        row["as if in colour, PSNR dB"] = mean_quality(in_three_channels, pairs, model, sigma)
        classical = {}
        for method, strengths in CLASSICAL.items():
            tried = [mean_quality(in_one_channel, pairs, method, sigma, k) for k in strengths]
            classical[f"{method.__name__.replace('_', ' ')}, PSNR dB"] = max(tried)
        gain = row["network, PSNR dB"] - max(classical.values())
        rows.append(row | classical | {"gain dB": gain})
    return rows


def mean_quality(denoiser, pairs, method, *arguments):
    return float(np.mean([quality(denoiser(method, y, *arguments), x0) for y, x0 in pairs]))


def in_three_channels(model, y, sigma):
    return model(y.expand(-1, 3, -1, -1), sigma).mean(1, keepdim=True)


def in_one_channel(method, y, sigma, strength):
    return torch.from_numpy(method(y[0, 0].double().cpu().numpy(), sigma, strength))[None, None]


def network_rows(models, images, sigmas, seed, device="cpu"):
    """Return a row for each noise level, in colour and grey: one-step PSNR of both networks.

    models: {label: network}, two. The gain is that of the second, with its standard error.
    """
    rows = []
    for kind, clean in (("colour", images), ("grey", [grey(x0) for x0 in images])):
        for name, sigma in sigmas.items():
            psnrs = {label: [] for label in models}
            for i, x0 in enumerate(clean):
                y = noisy(x0, sigma, seed + i, device)
                for label, model in models.items():
                    psnrs[label].append(quality(in_one_step(model, y, sigma), x0))
            first, second = map(np.array, psnrs.values())
            row = {"images": f"{len(clean)}, {kind}", "sigma": name}
            row |= {f"{label}, PSNR dB": float(np.mean(found)) for label, found in psnrs.items()}
            error = (second - first).std(ddof=1) / len(clean) ** 0.5
            rows.append(row | {"gain dB": (second - first).mean(), "±": error})
    return rows

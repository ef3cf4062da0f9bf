"""Denoise images with a trained score network: in one step, or along the reverse-time SDE.

    python denoise.py                               # five photographs with added noise
    python denoise.py photo.jpg scans/              # your own noisy images, noise level estimated
    python denoise.py photo.jpg --sigma 25/255      # or known: standard deviation, pixels in [0, 1]
    python denoise.py cifar10 --count 1000 --method mmse
    python denoise.py photo.png --mask holes.png    # fill in what is white; also --blur, --enlarge
    python denoise.py --help                        # every constant below is an option

Noise is added to the built-in images alone; yours are taken to be noisy. In output/, NAME_mmse has
the smallest mean squared error, NAME_sde is a sample: sharp, its finest texture invented.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends quietly while the modules load

import functools
import itertools
import math
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import avg_pool2d, interpolate
from tqdm import tqdm

import sde
import utils
from model import load_model

# -----------------------------------------------------------------------------
# images
INPUT = ("samples",)  # "samples" (five photographs), "cifar10" (its test images), files, folders
COUNT = 1000  # at most so many images
DATA_DIR = "data"  # folder that holds CIFAR-10, or gets it
OUTPUT = "output"  # folder for all results
BLACK = None  # the files' value of black; none: 0
WHITE = None  # the files' value of white; none: the largest of an integer type, 1 for floats
# noise and observation, for pixels in [0, 1]
SIGMA = None  # noise level; none: estimated, but 0.1 for built-in images and 0.02 for observations
MASK = "none"  # file of a mask, white where the image is missing; or the share missing, as 0.5
BLUR = 0.0  # standard deviation, in pixels, of a Gaussian blur to undo
ENLARGE = 1  # how many times larger to make the image, both ways
# method
CHECKPOINT = "auto"  # of train_score.py; "auto": for photographs above 64 pixels, else CIFAR-10
METHOD = "sde"  # "mmse" (one call), "sde" (sample), "ode", or another name in methods() below
STEPS = None  # noise levels on the way down; none: as many as the method needs
DRAWS = None  # samples of each image; none: 2 of built-in images, 1 of yours, 4 of observations
SDE = "ve"  # the process of "euler" and "heun": "ve", "vp" or "subvp"
LANGEVIN_STEPS = 100  # updates of "langevin", the recipe this project starts from
LANGEVIN_STEP_SIZE = 1e-4  # of each, made for sigma 0.1; the temperature is sigma^2
# run
FRAMES = 2  # so many images are shown in a figure and an animation, with every state on the way
SEED = 0  # of the noise that is added and, with the image itself, of the samples
DEVICE = "auto"  # "auto" (GPU if there is one), "cpu", "cuda", "cuda:1"
PRECISION = "auto"  # "bfloat16", "float32", or "auto" (bfloat16 where the hardware has it)
# -----------------------------------------------------------------------------


class Method(NamedTuple):
    sampler: Callable
    steps: int  # noise levels that it needs for the right law
    calls: int  # network calls at each level
    draws: bool  # whether its result is a sample from p(x0 | y)


def langevin(denoiser, y, levels, noise):
    """Run the recipe's updates; they stay at the first level."""
    sigma = float(levels[0])
    return sde.langevin(denoiser, y, sigma, LANGEVIN_STEPS, LANGEVIN_STEP_SIZE, noise=noise)


def euler(denoiser, y, levels, noise):
    return sde.reverse_sde(denoiser, y, levels, _PROCESSES[SDE](), noise)


def heun(denoiser, y, levels, noise):
    return sde.probability_flow_ode(denoiser, y, levels, _PROCESSES[SDE]())


_PROCESSES = {"ve": sde.VE, "vp": sde.VP, "subvp": sde.SubVP}


def methods():
    return {
        "mmse": Method(sde.adams, 1, 1, False),  # one level is one step: E[x0 | y]
        "sde": Method(sde.adams, 20, 1, True),  # the reverse-time SDE, second order
        "ode": Method(functools.partial(sde.adams, eta=0.0), 20, 1, False),  # probability flow
        "euler": Method(euler, 100, 1, True),  # the reverse-time SDE, as in textbooks
        "heun": Method(heun, 20, 2, False),  # its probability-flow ODE
        "ancestral": Method(sde.ancestral, 100, 1, True),
        "pc": Method(sde.predictor_corrector, 50, 2, True),
        "annealed": Method(sde.annealed_langevin, 100, 1, True),
        "langevin": Method(langevin, 1, LANGEVIN_STEPS, False),  # the recipe
    }


# -----------------------------------------------------------------------------
# The noisy image, its noise level, the network
# -----------------------------------------------------------------------------


def batches(images, pixels=2**20):
    """Yield lists of consecutive Images of one size that have one noise level."""
    batch = []
    for image in images:
        alike = batch and image.pixels.shape[1:] == batch[0].pixels.shape[1:]
        alike = alike and image.builtin == batch[0].builtin
        full = sum(other.pixels[..., 0].size for other in batch) >= pixels
        if batch and (full or not alike):
            yield batch
            batch = []
        batch.append(image)
        if not (image.builtin or SIGMA or MASK != "none" or BLUR or ENLARGE > 1):
            yield batch  # its level is found from itself alone, before the next image is read
            batch = []
    if batch:
        yield batch


@functools.cache
def load(checkpoint, device):
    return load_model(checkpoint, device, utils.pick_bfloat16(PRECISION, device))


def checkpoint_for(image):
    """Return the network's path: that for photographs above 64 pixels, but for built-in images."""
    if CHECKPOINT != "auto":
        return CHECKPOINT
    large = max(image.pixels.shape[1:3]) > 64 and not image.builtin
    return f"checkpoints/score_{'photographs' if large else 'cifar10'}.pt"


def observation(size, mask="none", blur=0.0, enlarge=1, seed=0, notify=print):
    """Return A, what was done to images (B, C, *size), or None if nothing was.

    notify gets a line on how much a mask hides. Raises ValueError for more than one of them, or
    one that does not suit the size.
    """
    if (mask != "none") + (blur > 0) + (enlarge > 1) > 1:
        raise ValueError("give one of --mask, --blur and --enlarge at a time")
    if mask != "none":
        missing = missing_pixels(mask, size, seed, notify)
        return lambda x: torch.from_numpy(~missing).to(x.device) * x
    if blur:
        from torchvision.transforms.functional import gaussian_blur  # here, since it takes 160 MB

        words = f"must be narrow in an image of {size[1]} x {size[0]} pixels"
        utils.check(0 < 4 * blur <= min(size) - 1, "BLUR", blur, words)
        reach = math.ceil(4 * blur)
        return functools.partial(gaussian_blur, kernel_size=2 * reach + 1, sigma=blur)
    utils.check(enlarge >= 1, "ENLARGE", enlarge, "must be a whole number from 1 on")
    return functools.partial(avg_pool2d, kernel_size=enlarge) if enlarge > 1 else None


def missing_pixels(mask, size, seed, notify):
    """Return which pixels a mask hides, bool (H, W): a random share, or what is white in a file."""
    try:
        missing = np.random.default_rng(seed).random(size) < float(mask)
    except ValueError:
        utils.check(Path(mask).is_file(), "MASK", repr(mask), "must be a file or a share, as 0.5")
        white = next(utils.read_images(mask)).pixels[0].mean(axis=2)
        missing = white > 0.5
        between = ((white > 0) & (white < 1)).mean()
        if between:
            words = "neither black nor white: what is brighter than middle grey is missing"
            notify(f"mask: {between:.2%} of the pixels are {words}")
    words = f"must have the {size[1]} x {size[0]} pixels of the image"
    utils.check(missing.shape == tuple(size), "MASK", missing.shape[::-1], words)
    utils.check(0 < missing.mean() < 1, "MASK", mask, "must hide some pixels, and not all")
    notify(f"mask: {missing.mean():.0%} of the pixels are missing")
    return missing


def add_noise(x, sigma, rng):
    """Return images (B, C, H, W) with noise of a numpy generator, drawn in the order B, H, W, C."""
    noise = rng.standard_normal((len(x), *x.shape[2:], x.shape[1]))
    return (x + sigma * torch.from_numpy(noise).permute(0, 3, 1, 2)).to(x.dtype)


def prepare(batch, rng, device, notify):
    """Return y, the noisy images; x0, the clean ones or None; A or None; and sigma or None.

    y: (B, C, h, w) on the device, where B counts the frames of all Images of the batch.
    """
    x = torch.from_numpy(np.concatenate([image.pixels for image in batch])).permute(0, 3, 1, 2)
    builtin = batch[0].builtin
    size = [n // ENLARGE * ENLARGE if builtin else n * ENLARGE for n in x.shape[2:]]
    A = observation(size, MASK, BLUR, ENLARGE, SEED, notify)
    if builtin:
        x0 = x[:, :, : size[0], : size[1]]
        sigma = SIGMA or (0.02 if A else 0.1)
        y = add_noise(A(x0) if A else x0, sigma, rng)
    else:
        x0, y, sigma = None, x, SIGMA or (0.02 if A else None)
    if MASK != "none":
        y = A(y)  # what a mask hides is 0, whatever the file has there
    return y.to(device), x0, A, sigma


_LOSSY = "higher in brightness than in colour, as in a lossy file: judged by brightness"
_STRONGLY_LOSSY = "smoothed between neighbours, as in a lossy file: judged at half the size"
_CORRELATED = "fine texture, or noise that neighbouring pixels share; if noise, give --sigma"


def spread_tiles(y, size=48, most=3):
    """Return up to most x most tiles of an image (1, C, H, W), spread evenly.

    Of a stack (B, C, H, W) the tiles are of different frames.
    """
    sides = [min(size, n) for n in y.shape[2:]]
    tops, lefts = (
        np.linspace(0, n - side, min(most, math.ceil(n / side))).astype(int)
        for n, side in zip(y.shape[2:], sides)
    )
    corners = [(top, left) for top in tops for left in lefts]
    frames = [y[k * len(y) // len(corners)] for k in range(len(corners))]
    return torch.stack(
        [x[:, t : t + sides[0], k : k + sides[1]] for x, (t, k) in zip(frames, corners)]
    )


def tile_level(network, y, low, high):
    """Return the noise level of an image, the tiles it was found on, and their denoiser."""
    tiles = spread_tiles(y)
    denoiser = grey(network, tiles) if y.shape[1] == 1 else network
    probes = 1 if len(tiles) > 1 else 4
    sigma = sde.estimate_sigma(denoiser, tiles, low, high, probes, together=True)[0].item()
    return sigma, tiles, denoiser


def brightness_level(network, y, shrink, low, high):
    """Return the level that the mean of the channels, over shrink x shrink pixels, has, or low.

    It is the level of white noise with such a mean: of colour, sqrt(3) * shrink times the mean's.
    """
    if low >= high or min(y.shape[2:]) < 48:
        return low
    unit = shrink * math.sqrt(y.shape[1])
    brightness = avg_pool2d(y.mean(1, keepdim=True), shrink)
    found = unit * tile_level(network, brightness, low / unit, high / unit)[0]
    return low if found < 1.01 * low else min(found, high)


def image_level(network, y, low, high, black=0.0, white=1.0):
    """Return the noise level of one image (1, C, H, W) and notes on it; the lowest is exactly low.

    Lossy files smooth the noise of colour, and strong compression the finest of brightness, too. So
    brightness decides, at full size or at half the size, where its level is clearly higher: above
    0.02 and 0.038, since fine texture reads as less. Coarse texture reads as more, and at a quarter
    of the size as still more, which noise does not unless its pixels share it. These are not told
    apart: the owner is. black, white: what 0 and 1 are in the file.
    """
    sigma, tiles, denoiser = tile_level(network, y, low, high)
    notes = []
    least = max(1.5 * sigma, 0.02)
    full = brightness_level(network, y, 1, least, high) if y.shape[1] == 3 else least
    if full > least:
        sigma, notes = full, [_LOSSY]
    least = max(1.5 * sigma, 0.038)
    half = brightness_level(network, y, 2, least, high)
    if half > least:
        if brightness_level(network, y, 4, 1.1 * half, high) > 1.1 * half:
            notes.append(f"{_CORRELATED} {half:.2g}")
        else:
            sigma, notes = half, [_STRONGLY_LOSSY]
    if low == high:
        return low, ["the only level that the network knows"]
    if sigma < 1.05 * low:
        notes.insert(0, f"no white noise above {low:.1%} of white")
        if min(y.shape[2:]) < 48:
            notes.append("too small to look for the noise of a lossy file: then give --sigma")
        return low, notes + unused_range(y, black, white)
    if sigma > 0.99 * high:
        notes.append("as high as is searched: give --sigma")
    clipped = ((tiles == 0) | (tiles == 1)).float().mean().item()
    if clipped > 0.05:
        advice = ": give --sigma" if clipped > 0.3 else ""
        notes.append(f"{clipped:.0%} of the values are clipped{advice}")
    tiles = sde.cut_extremes(tiles)
    outliers = ((tiles - denoiser(tiles, sigma)).abs() > 6 * sigma).sum().item()
    if outliers:
        notes.append(f"{outliers} of {tiles.numel()} values are outliers and left out")
    return sigma, notes


def unused_range(y, black, white):
    """Return in a list what to do if the values of an image use little of the range."""
    values = sde.cut_extremes(y)
    first, last = values.min().item(), values.max().item()
    if last - first > 0.25:
        return []
    ends = [f"{black + v * (white - black):.4g}" for v in (first, last)]
    use = f"the values use only {last - first:.1%} of the range"
    return [f"{use}: give --black {ends[0]} --white {ends[1]}"]


def level_range(model, y):
    """Return the lowest and the highest noise level that the network knows for images like y."""
    factor = math.sqrt(3) if y.shape[1] == 1 else 1.0  # see sde.grey
    return model.sigma_min / factor, model.sigma_max / factor


def levels_for(sigma, low, high, A):
    """Return the falling noise levels of METHOD; raises ValueError where the network lacks them."""
    if A is None and not low <= sigma <= high:
        trained = f"the range {low:.2g} to {high:.2g} that the network was trained on"
        raise ValueError(f"noise level {sigma:g} is outside {trained}")
    steps = methods()[METHOD].steps
    if steps == 1:
        return sde.noise_levels(sigma, low, 1)
    if low == high:
        raise ValueError(f"--method {METHOD} needs many noise levels, the network knows only {low}")
    if A is None:
        return sde.noise_levels(sigma, low, STEPS or steps)
    return sde.noise_levels(high, low, STEPS or max(30, steps), math.inf)


def number_of_draws(image, A):
    if METHOD == "mmse":
        return 0
    usual = 4 if A else 2 if image.builtin else 1
    return (DRAWS or usual) if methods()[METHOD].draws else 1


def seeds_of(y, draw):
    """Return a seed for each image: of its noisy pixels, SEED and the draw's number."""
    word = f"{SEED} {draw}".encode()
    return [zlib.crc32(word, zlib.crc32(image.cpu().contiguous().numpy())) for image in y]


def grey(denoiser, y):
    """Return a denoiser of grey images like y, (B, 1, H, W)."""
    noise = utils.seeded_noise([2**31], y.device)  # a seed that no sample has
    return sde.grey(denoiser, noise(y[:1].expand(1, 3, -1, -1)))


def unchanged(y, sigma):
    return y


def find_level(network, y, low, high, image, notify):
    """Return the noise level of an image, and say what is known of it."""
    sigma, notes = image_level(network, y, low, high, image.black, image.white)
    notify(", ".join([f"{image.name}: noise level estimated at {sigma:.4f}", *notes]))
    return sigma


def canvas(y):
    """Return zeros in the size of the images of which y is the observation."""
    return y.new_zeros(*y.shape[:2], *(n * ENLARGE for n in y.shape[2:]))


def posterior_mean(denoiser, y, A, sigma):
    noise = utils.seeded_noise(seeds_of(y, "mean"), y.device)
    return sde.posterior_mean(denoiser, y, A, sigma, canvas(y), noise=noise)


def pure_noise(y, A, sigma, level, noise):
    """Return where samples given an observation start: a classical fill plus noise."""
    return sde.fill(y, A, sigma, canvas(y)) + level * noise(canvas(y))


def uncertainty(denoiser, y, sigma, A, results):
    """Return the variance of every pixel of x0 given y, (B, C, H, W), or None if there is none.

    By the Jacobian of the denoiser or, given an observation, as the spread of the samples.
    """
    if A is not None:
        draws = [draw.images for draw in results.get(METHOD, [])]
        return torch.stack(draws).var(0) if len(draws) > 1 else None
    if denoiser is unchanged or len(y) > 64:
        return None
    probes = max(1, min(8, 2**21 // y[0, 0].numel()))  # of a large image, one says enough
    noise = utils.seeded_noise(seeds_of(y, 0), y.device)
    return sde.expected_error(denoiser, y, sigma, probes, noise)[1].cpu()


class Result(NamedTuple):
    images: torch.Tensor  # (B, C, H, W), on the CPU
    calls: int  # of the denoiser
    seconds: float  # for each image
    frames: list  # (sigma, states, estimates) of every call, of the images that are recorded


def measured(function, denoiser, *arguments, record=0, **keywords):
    """Return the Result of function(denoiser, ...); raises ValueError if it diverges."""
    recorder, began = utils.Recorder(denoiser, max(0, record)), time.perf_counter()
    images = function(recorder, *arguments, **keywords).cpu()
    if not images.isfinite().all():
        raise ValueError(f"--method {METHOD} diverged: choose a smaller step size, or more steps")
    seconds = (time.perf_counter() - began) / len(images)
    return Result(images, recorder.calls, seconds, recorder.frames)


# -----------------------------------------------------------------------------
# What is saved and printed
# -----------------------------------------------------------------------------


def each_of(batch, results, *others):
    """Yield for each Image: the Image, its part of the results, and its part of the others.

    results: {kind: [Result, ...]}. others: tensors (B, ...) or None.
    """
    first = 0
    for image in batch:
        mine = slice(first, first + len(image.pixels))
        parts = {kind: [part(draw, mine) for draw in draws] for kind, draws in results.items()}
        yield image, parts, *(None if other is None else other[mine] for other in others)
        first = mine.stop


def part(result, mine):
    """Return the Result of some images; its frames are then [(sigma, state, estimate), ...]."""
    k, frames = mine.start, result.frames
    frames = [(sigma, x[k], D[k]) for sigma, x, D in frames if k < len(x)]
    return result._replace(images=result.images[mine], frames=frames)


def save(image, results, variance):
    """Write NAME_KIND of every result, and NAME_uncertainty; return the paths."""
    paths = []
    for kind, draws in results.items():
        for k, draw in enumerate(draws):
            number = f"_{k + 1}" if len(draws) > 1 else ""
            paths.append(Path(OUTPUT, f"{image.name}_{kind}{number}{image.suffix}"))
            utils.write_image(paths[-1], image, draw.images.permute(0, 2, 3, 1).numpy())
    if variance is not None:
        paths.append(Path(OUTPUT, f"{image.name}_uncertainty.png"))
        title = f"uncertainty of {image.name}: standard deviation of a pixel"
        utils.save_map(paths[-1].with_suffix(""), variance[0], title)
    return paths


def table_rows(image, sigma, x0, results, variance):
    """Return a row of the table for each kind of result, a mean over its draws."""
    rows, samples = [], results.get(METHOD, [])
    if x0 is not None and len(samples) > 1:
        mean = torch.stack([draw.images for draw in samples]).mean(0)
        calls, seconds = sum(draw.calls for draw in samples), sum(draw.seconds for draw in samples)
        results = results | {f"mean of {len(samples)}": [Result(mean, calls, seconds, [])]}
    for kind, draws in results.items():
        row = {"image": image.name, "sigma": sigma, "method": kind}
        if x0 is not None:
            images, truth = (
                torch.cat([draw.images for draw in draws]),
                x0.repeat(len(draws), 1, 1, 1),
            )
            row["PSNR dB"] = utils.psnr(images, truth).mean().item()
            row["SSIM"] = utils.ssim(images, truth).mean().item()
        if variance is not None:
            expected = -10 * math.log10(max(variance.mean().item(), 1e-10))
            row["expected PSNR"] = expected if kind == "mmse" else ""
        row["calls"] = draws[0].calls
        row["seconds"] = sum(draw.seconds for draw in draws) / len(draws)
        rows.append(row)
    return rows


def save_frames(image, frames, x0):
    """Write every state and estimate on the way as a PNG, and their PSNR as a table.

    frames: [(sigma, state, estimate)], images (C, H, W). x0: (N, C, H, W) or None.
    """
    rows = []
    with utils.replacing(Path(OUTPUT, f"{image.name}_{METHOD}_frames")) as folder:
        folder.mkdir()
        for call, (sigma, *pair) in enumerate(frames):
            rows.append({"call": call, "sigma": f"{sigma:.6g}"})
            for kind, shown in zip(("state", "estimate"), pair):
                utils.save_png(folder / f"{call:03}_{kind}_{sigma:.4f}.png", shown)
                if x0 is not None:
                    quality = utils.psnr(shown[None], utils.crop(x0[:1], 256)).item()
                    rows[-1][f"PSNR of the {kind}"] = f"{quality:.4f}"
        utils.save_csv(folder / "psnr.csv", rows)


def panels(y, sigma, x0, results):
    """Return what the figure shows of an image: a row as in utils.plot_images."""
    frames = results[METHOD][0].frames
    level, state, _ = frames[len(frames) // 4]
    given = interpolate(y[:1].cpu(), results[METHOD][0].images.shape[2:])[0]
    row = [("observation" if "mean" in results else "noisy", given, f"$\\sigma$ = {sigma:.3g}")]
    row.append(("a state on the way", state, f"$\\sigma$ = {level:.2g}"))
    titles = {"mmse": "one step", "mean": "posterior mean", "langevin": "Langevin", "ode": "ODE"}
    for kind, draws in results.items():
        row.extend((titles.get(kind, "a sample"), draw.images[0], "") for draw in draws[:2])
    if x0 is not None:
        row.append(("clean", x0[0], ""))
    return [(title, utils.crop(image, 256), note) for title, image, note in row]


def save_figure(recorded):
    """Write a figure of the recorded images and an animation of their frames; return the paths.

    recorded: (panels, whether the last is the clean image, frames) for each image.
    """
    path = Path(OUTPUT, f"{Path(INPUT[0]).resolve().stem[:45]}_{METHOD}.jpg")
    truth = all(known for _, known, _ in recorded)
    utils.plot_images(path, [row for row, _, _ in recorded], truth)
    utils.save_animation(path.with_suffix(".gif"), [frames for _, _, frames in recorded])
    return path, path.with_suffix(".gif")


def summary(rows):
    """Return the lines of the table: all of few images and, where the truth is known, the means."""
    means = utils.means(rows, "method", "image") if "PSNR dB" in rows[0] else []
    if not means or len(means) == len(rows):
        return rows
    return (rows if len(rows) <= 64 else []) + means


# -----------------------------------------------------------------------------


def check_constants():
    utils.check(METHOD in methods(), "METHOD", METHOD, f"must be one of {', '.join(methods())}")
    utils.check(SDE in _PROCESSES, "SDE", SDE, f"must be one of {', '.join(_PROCESSES)}")
    named = OUTPUT and not Path(OUTPUT).suffix
    utils.check(named, "OUTPUT", repr(OUTPUT), "must name a folder, without a suffix")
    utils.check(MASK, "MASK", repr(MASK), "must be a file or a share, as 0.5")
    for name in ("COUNT", "STEPS", "DRAWS", "ENLARGE", "LANGEVIN_STEPS"):
        value = globals()[name]
        whole = value is None or (isinstance(value, int) and 1 <= value < 2**31)
        utils.check(whole, name, value, "must be a whole number from 1 on")
    positive = SIGMA is None or 0 < SIGMA < math.inf
    utils.check(positive, "SIGMA", SIGMA, "must be positive, for pixels in [0, 1], as 25/255")
    utils.check(0 <= BLUR < math.inf, "BLUR", BLUR, "must be a number of pixels")
    utils.check(ENLARGE <= 16, "ENLARGE", ENLARGE, "must be at most 16")
    utils.check(SEED >= 0, "SEED", SEED, "must not be negative")


def main():
    check_constants()
    device, rng = utils.pick_device(DEVICE), np.random.default_rng(SEED)
    method, rows, failures, recorded = methods()[METHOD], [], [], []
    with tqdm(desc=METHOD, unit=" calls", disable=None, leave=False) as bar:
        keywords = {"notify": bar.write, "failures": failures, "output": OUTPUT, "skip": [MASK]}
        images = utils.read_images(INPUT, DATA_DIR, BLACK, WHITE, **keywords)
        for batch in batches(itertools.islice(images, COUNT)):
            model = load(checkpoint_for(batch[0]), device)
            try:
                # The noisy images, the network, and their noise level.
                y, x0, A, sigma = prepare(batch, rng, device, bar.write)
                network = utils.tiled(model, update=bar.update)
                denoiser = grey(network, y) if y.shape[1] == 1 else network
                low, high = level_range(model, y)
                if sigma is None:
                    sigma = find_level(network, y, low, min(high, 1.0), batch[0], bar.write)
                    denoiser = unchanged if sigma <= low < high else denoiser
                levels = levels_for(sigma, low, high, A)

                # The estimate of smallest error: one step or, of an observation, a few.
                if A is None:
                    results = {"mmse": [measured(sde.adams, denoiser, y, levels[:1])]}
                else:
                    results = {"mean": [measured(posterior_mean, denoiser, y, A, sigma)]}
                    denoiser = sde.observed(denoiser, y, A, sigma)

                # Samples, or the one result of a method that does not draw.
                sampler = sde.adams if denoiser is unchanged else method.sampler
                for draw in range(number_of_draws(batch[0], A)):
                    noise = utils.seeded_noise(seeds_of(y, draw), device)
                    start = y if A is None else pure_noise(y, A, sigma, levels[0], noise)
                    record = FRAMES - len(recorded) if draw == 0 else 0
                    options = {"levels": levels, "noise": noise, "record": record}
                    sample = measured(sampler, denoiser, start, **options)
                    results.setdefault(METHOD, []).append(sample)
                variance = uncertainty(denoiser, y, sigma, A, results)
            except ValueError as error:
                failures += batch
                for image in batch:
                    bar.write(f"'{image.name}' is left out: {error}")
                continue

            for image, mine, noisy, truth, spread in each_of(batch, results, y, x0, variance):
                paths = save(image, mine, spread)
                rows += table_rows(image, sigma, truth, mine, spread)
                if METHOD in mine and mine[METHOD][0].frames:
                    save_frames(image, mine[METHOD][0].frames, truth)
                    row = panels(noisy, sigma, truth, mine)
                    recorded.append((row, truth is not None, mine[METHOD][0].frames))
                if not image.builtin:
                    used = Path(checkpoint_for(image)).name
                    bar.write(f"wrote {' '.join(map(str, paths))} with {used}")
        more = next(images, None)
        if more and not more.builtin:
            bar.write(f"only the first {COUNT} images were denoised: --count sets how many")
    if not rows:
        raise ValueError(f"nothing was denoised of {' '.join(INPUT)}")
    print(utils.table(summary(rows)))
    figures = " and ".join(map(str, save_figure(recorded))) if recorded else ""
    print(f"wrote the results to '{OUTPUT}'" + f", with {figures}" * bool(figures))
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    with torch.no_grad():
        utils.run_script(main, globals(), positional="INPUT")

"""Denoise images with a trained score network: in one step, or along the reverse-time SDE.

    python denoise.py                               # five photographs with added noise
    python denoise.py photo.jpg scans/              # your own noisy images, noise level estimated
    python denoise.py photo.jpg --sigma 25/255      # or known: standard deviation, pixels in [0, 1]
    python denoise.py cifar10 --count 1000 --method mmse
    python denoise.py photo.png --mask holes.png    # fill in what is white; also --blur, --enlarge
    python denoise.py --help                        # every constant below is an option

Noise is added to the built-in images alone; yours are taken to be noisy. In output/, NAME_mmse (of
an observation NAME_mean) has the smallest mean squared error. NAME_sde is a sample, of several
NAME_sde_1, NAME_sde_2, ...: sharp, its finest texture invented.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends quietly while the modules load

import contextlib
import functools
import itertools
import math
import sys
import zlib
from pathlib import Path

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
OUTPUT = "output"  # folder for all results
BLACK = None  # the files' value of black; none: 0
WHITE = None  # the files' value of white; none: the largest of an integer type, 1 for floats
# noise and observation, for pixels in [0, 1]
SIGMA = None  # noise level; none: estimated, but 0.1 for built-in images and 0.02 for observations
MASK = "none"  # file of a mask, white where the image is missing; or the share missing, as 0.5
BLUR = 0.0  # standard deviation, in pixels, of a Gaussian blur to undo
ENLARGE = 1  # how many times larger to make the image, both ways
# method
CHECKPOINT = "auto"  # of train_score.py; "auto": that for photographs for yours above 64 pixels
METHOD = "sde"  # "mmse" (one call), "sde" (sample), "ode", or another name in methods() below
STEPS = None  # noise levels of METHOD, not of an observation's mean; none: as many as it needs
DRAWS = None  # samples of each image; none: 2 of built-in images, 1 of yours, 4 of observations
SDE = "ve"  # the process of "euler" and "heun": "ve", "vp" or "subvp"
LANGEVIN_STEPS = 100  # updates of "langevin", the recipe this project starts from
LANGEVIN_STEP_SIZE = 1e-4  # of each, made for sigma 0.1; the temperature is sigma^2
# run
FRAMES = 2  # so many images are shown in a figure and animations, with every state on the way
SEED = 0  # of the noise that is added and, with the image itself, of the samples
DEVICE = "auto"  # "auto" (GPU if there is one), "cpu", "cuda", "cuda:1"
PRECISION = "auto"  # "bfloat16", "float32", or "auto" (bfloat16 where the hardware has it)
# -----------------------------------------------------------------------------


def methods():
    """Return by name: a sampler, the noise levels it needs, whether it draws from p(x0 | y)."""
    process = {"ve": sde.VE, "vp": sde.VP, "subvp": sde.SubVP}[SDE]()
    return {
        "mmse": (sde.adams, 1, False),  # with one level a sampler returns E[x0 | y]
        "sde": (sde.adams, 20, True),  # the reverse-time SDE, second order
        "ode": (functools.partial(sde.adams, eta=0.0), 20, False),  # probability flow
        "euler": (functools.partial(sde.reverse_sde, sde=process), 100, True),  # as in textbooks
        "heun": (functools.partial(sde.probability_flow_ode, sde=process), 20, False),
        "ancestral": (sde.ancestral, 100, True),
        "pc": (sde.predictor_corrector, 50, True),
        "annealed": (sde.annealed_langevin, 100, True),
        "langevin": (langevin, 1, False),  # the recipe
    }


def langevin(denoiser, y, levels, noise):
    """Run the recipe's updates; they stay at the first level."""
    sigma = float(levels[0])
    return sde.langevin(denoiser, y, sigma, LANGEVIN_STEPS, LANGEVIN_STEP_SIZE, noise=noise)


# -----------------------------------------------------------------------------
# The noisy images, and the network for them
# -----------------------------------------------------------------------------


def batches(images, pixels=2**20):
    """Yield lists of consecutive Images of one shape whose noise has one level."""
    known = SIGMA or MASK != "none" or BLUR or ENLARGE > 1
    kinds = itertools.groupby(images, lambda image: (image.builtin, image.pixels.shape))
    for (builtin, (frames, height, width, _)), alike in kinds:
        size = frames * height * width * ENLARGE**2
        most = max(1, pixels // size) if builtin or known else 1
        while batch := list(itertools.islice(alike, most)):
            yield batch


@functools.cache
def load(checkpoint, device):
    model = load_model(checkpoint, device, utils.pick_bfloat16(PRECISION, device))
    tqdm.write(f"network: {checkpoint}")
    return model


def checkpoint_for(image):
    if CHECKPOINT != "auto":
        return CHECKPOINT
    large = ENLARGE * max(image.pixels.shape[1:3]) > 64 and not image.builtin
    return f"checkpoints/score_{'photographs' if large else 'cifar10'}.pt"


def noisy_images(batch, rng, device, notify):
    """Return y = A(x0) + sigma n, (B, C, h, w) on the device, and x0, A and sigma.

    B counts the frames of all Images. x0 and sigma are None if unknown, A if it is the identity.
    """
    x = torch.from_numpy(np.concatenate([image.pixels for image in batch])).permute(0, 3, 1, 2)
    x0, y, A, builtin = None, x, observation(x.shape[2:], notify), batch[0].builtin
    sigma = SIGMA or (0.02 if A else 0.1 if builtin else None)
    if builtin:
        most = min(x.shape[2:])
        utils.check(most >= ENLARGE, "ENLARGE", ENLARGE, f"must be at most {most} here")
        height, width = (n // ENLARGE * ENLARGE for n in x.shape[2:])
        x0 = x[:, :, :height, :width]
        y = add_noise(A(x0) if A else x0, sigma, rng)
    if MASK != "none":
        y = A(y)  # what a mask hides is 0, whatever the file has there
    return y.to(device), x0, A, sigma


def add_noise(x, sigma, rng):
    """Return images (B, C, H, W) with noise of a numpy generator, drawn in the order B, H, W, C."""
    noise = rng.standard_normal((len(x), *x.shape[2:], x.shape[1]))
    return (x + sigma * torch.from_numpy(noise).permute(0, 3, 1, 2)).to(x.dtype)


def observation(size, notify):
    """Return A, what MASK, BLUR or ENLARGE say was done to images of that size, or None.

    Raises ValueError for more than one of them, or one that does not suit the size.
    """
    if (MASK != "none") + (BLUR > 0) + (ENLARGE > 1) > 1:
        raise ValueError("give one of --mask, --blur and --enlarge at a time")
    if MASK != "none":
        missing = missing_pixels(size, notify)
        return lambda x: torch.from_numpy(~missing).to(x.device) * x
    if BLUR:
        from torchvision.transforms.functional import gaussian_blur  # here, since it takes 160 MB

        reach = math.ceil(4 * BLUR)
        words = f"must be narrow in an image of {size[1]} x {size[0]} pixels"
        utils.check(reach < min(size), "BLUR", BLUR, words)
        return functools.partial(gaussian_blur, kernel_size=2 * reach + 1, sigma=BLUR)
    return functools.partial(avg_pool2d, kernel_size=ENLARGE) if ENLARGE > 1 else None


def missing_pixels(size, notify):
    """Return which pixels MASK hides, bool (H, W): a random share, or what is white in a file."""
    try:
        missing = np.random.default_rng(SEED).random(size) < float(MASK)
    except ValueError:
        utils.check(Path(MASK).is_file(), "MASK", repr(MASK), "must be a file or a share, as 0.5")
        white = next(utils.read_images(MASK)).pixels[0].mean(axis=2)
        missing, between = white > 0.5, ((white > 0) & (white < 1)).mean()
        if between:
            words = "neither black nor white: what is brighter than middle grey is missing"
            notify(f"mask: {between:.2%} of the pixels are {words}")
    words = f"must have the {size[1]} x {size[0]} pixels of the image"
    utils.check(missing.shape == tuple(size), "MASK", missing.shape[::-1], words)
    utils.check(0 < missing.mean() < 1, "MASK", MASK, "must hide some pixels, and not all")
    notify(f"mask: {missing.mean():.0%} of the pixels are missing")
    return missing


# -----------------------------------------------------------------------------
# The noise level
# -----------------------------------------------------------------------------

_LOSSY = (  # pixels on a side that are averaged, the lowest level that is judged so, words
    (1, 0.02, "higher in brightness than in colour, as in a lossy file: judged by brightness"),
    (2, 0.038, "smoothed between neighbours, as in a lossy file: judged at half the size"),
)
_CORRELATED = "fine texture, or noise that neighbouring pixels share; if noise, give --sigma"


def image_level(network, y, low, high, black=0.0, white=1.0):
    """Return the noise level of one image (frames, C, H, W) and notes; the lowest is exactly low.

    Lossy files smooth the noise of colour, and strong compression the finest of brightness, too. So
    where brightness, the mean of the channels, has a clearly higher level, at full size or at half
    the size, it decides. If its level rises again at a quarter of the size, neighbouring pixels
    share it. black, white: what 0 and 1 are in the file.
    """
    if low == high:
        return low, ["the only level that the network knows"]
    sigma, notes = tile_level(network, y, low, high), []
    brightness, unit = y.mean(1, keepdim=True), math.sqrt(y.shape[1])  # of white noise, 1 / unit
    for shrink, least, words in _LOSSY:
        if min(y.shape[2:]) < 48 or shrink * unit == 1:  # too small, or nothing but brightness
            continue
        shrunk, quarter = avg_pool2d(brightness, shrink), avg_pool2d(brightness, 4)
        least = max(1.5 * sigma, least)
        found = tile_level(network, shrunk, least, high, shrink * unit)
        if found < 1.01 * least:
            continue
        if shrink == 2 and tile_level(network, quarter, 1.1 * found, high, 4 * unit) > 1.11 * found:
            notes.append(f"{_CORRELATED} {found:.2g}")
        else:
            sigma, notes = found, [words]
    sigma = sigma if sigma > 1.05 * low else low
    return sigma, notes + remarks(network, y, sigma, low, high, black, white)


def remarks(network, y, sigma, low, high, black, white):
    """Return notes on what may make an estimated noise level wrong."""
    if sigma == low:
        values, notes = sde.cut_extremes(y), [f"no white noise above {low:.1%} of white"]
        first, last = values.min().item(), values.max().item()
        if last - first < 0.25:
            ends = [f"{black + v * (white - black):.4g}" for v in (first, last)]
            use = f"the values use only {last - first:.1%} of the range"
            notes.append(f"{use}: give --black {ends[0]} --white {ends[1]}")
        return notes
    tiles, notes = spread_tiles(y), []
    if sigma > 0.99 * high:
        notes.append("as high as is searched: give --sigma")
    clipped = ((tiles == 0) | (tiles == 1)).float().mean().item()
    if clipped > 0.05:
        advice = ": give --sigma" if clipped > 0.3 else ""
        notes.append(f"{clipped:.0%} of the values are clipped{advice}")
    tiles = sde.cut_extremes(tiles)
    outliers = ((tiles - grey(network, tiles)(tiles, sigma)).abs() > 6 * sigma).double().mean()
    if outliers:
        notes.append(f"{100 * outliers:.2g}% of the values are outliers and left out")
    return notes


def tile_level(network, y, low, high, unit=1.0):
    """Return `unit` times the noise level of images y, within [low, high], by up to nine tiles."""
    if low >= high:
        return low
    tiles = spread_tiles(y)
    ends, probes = (low / unit, high / unit), 1 if len(tiles) > 1 else 4
    start = ends[0] if unit > 1 else None  # brightness seldom has a level above low: begin there
    level = sde.estimate_sigma(grey(network, tiles), tiles, *ends, probes, True, start=start)
    return min(unit * level[0].item(), high)  # rounding may exceed it


def spread_tiles(y, size=32, most=3):
    """Return up to most x most tiles, spread over the image and the frames of y, (B, C, H, W)."""
    tiles = y
    for axis in (2, 3):
        n = y.shape[axis]
        side = min(size, n)
        gaps = min(most, math.ceil(n / side)) - 1
        tiles = tiles.unfold(axis, side, (n - side) // gaps if gaps else n)
    tiles = tiles.permute(2, 3, 0, 1, 4, 5).flatten(0, 1)  # (tiles, B, C, side, side)
    numbers = torch.arange(len(tiles))
    return tiles[numbers, numbers * len(y) // len(tiles)]


def level_range(model, y):
    """Return the lowest and the highest noise level that the network knows for images like y."""
    factor = math.sqrt(3) if y.shape[1] == 1 else 1.0  # see sde.grey
    return model.sigma_min / factor, model.sigma_max / factor


def grey(denoiser, like):
    """Return the denoiser, made one of grey images if `like`, (B, 1 or 3, H, W), is grey."""
    if like.shape[1] == 3:
        return denoiser
    noise = utils.seeded_noise([2**32], like.device)  # above all seeds of samples
    return sde.grey(denoiser, noise(like[:1].expand(1, 3, -1, -1)))


def canvas(y):
    """Return zeros in the size of the images of which y are the observations."""
    return y.new_zeros(*y.shape[:2], *(n * ENLARGE for n in y.shape[2:]))


def unchanged(y, sigma):
    return y


def level_and_denoiser(model, network, y, sigma, image, notify):
    """Return the noise level, estimated if it is None, and the denoiser of images like y."""
    if sigma:
        return sigma, grey(network, canvas(y))
    low, high = level_range(model, y)
    sigma, notes = image_level(network, y, low, min(high, 1.0), image.black, image.white)
    found = "estimated at" if low < high else "taken to be"
    notify(", ".join([f"{image.name}: noise level {found} {sigma:.4f}", *notes]))
    return sigma, unchanged if sigma == low < high else grey(network, y)


def plan(model, y, A, sigma, builtin):
    """Return the sampler of METHOD, its falling noise levels, and how many results it gives.

    Raises ValueError where the network lacks such levels.
    """
    (sampler, steps, is_sample), (low, high) = methods()[METHOD], level_range(model, y)
    draws = DRAWS or (4 if A else 2 if builtin else 1)
    draws = 0 if METHOD == "mmse" else draws if is_sample else 1
    if low == high and (steps > 1 or A):
        what = "an observation" if A else f"--method {METHOD}"
        raise ValueError(f"{what} needs many noise levels, the network knows only {low}")
    if A:
        utils.check(
            METHOD != "langevin", "METHOD", METHOD, "must have many levels for observations"
        )
        return sampler, sde.noise_levels(high, low, STEPS or max(30, steps), math.inf), draws
    if not low <= sigma <= high:
        trained = f"the range {low:.2g} to {high:.2g} that the network was trained on"
        raise ValueError(f"noise level {sigma:g} is outside {trained}")
    if METHOD == "langevin" and sigma == low < high:
        sampler = sde.adams  # there is nothing for Langevin updates to remove
    return sampler, sde.noise_levels(sigma, low, 1 if steps == 1 else STEPS or steps), draws


def seeds_of(y, draw):
    """Return a seed for each image: of its noisy pixels, SEED and the draw's number."""
    word = f"{SEED} {draw}".encode()
    return [zlib.crc32(word, zlib.crc32(image.cpu().contiguous().numpy())) for image in y]


def posterior_mean(denoiser, y, A, sigma):
    noise = utils.seeded_noise(seeds_of(y, "mean"), y.device)
    return sde.posterior_mean(denoiser, y, A, sigma, canvas(y), noise=noise)


def uncertainty(denoiser, y, sigma, A, samples):
    """Return the variance of every pixel of x0 given y, (B, C, H, W), or None if there is none.

    By the Jacobian of the denoiser or, given an observation, as the spread of the samples. There is
    none for one sample, for an image without noise, and for more than 64 images at once.
    """
    if A is not None:
        return torch.stack(samples).var(0) if len(samples) > 1 else None
    if denoiser is unchanged or len(y) > 64:
        return None
    probes = max(1, min(8, 2**21 // y[0, 0].numel()))  # of a large image, one says enough
    noise = utils.seeded_noise(seeds_of(y, "probes"), y.device)
    return sde.expected_error(denoiser, y, sigma, probes, noise)[1].cpu()


# -----------------------------------------------------------------------------
# What is saved and printed
# -----------------------------------------------------------------------------


@contextlib.contextmanager
def leaving_out(batch, failures, notify):
    """Leave out the batch if what is done to it raises ValueError: say so, and go on."""
    try:
        yield
    except ValueError as error:
        failures += batch
        notify(f"left out {', '.join(image.name for image in batch)}: {error}")


def finite(images):
    if not images.isfinite().all():
        raise ValueError(f"--method {METHOD} diverged: choose a smaller step size, or more steps")
    return images.cpu()


def save(batch, results, variance):
    """Write NAME_KIND of every result but the first, and NAME_uncertainty.

    results: (kind, draws (B, C, H, W), network calls), from the noisy images to the samples. The
    uncertainty is the root of the variance's mean over 5 x 5 pixels, of the first frame: an array
    (H, W, C), and a PNG of the channels together, whose largest value is white.
    """
    for kind, draws, _ in results[1:]:
        for number, draw in enumerate(draws, 1):
            ending = f"{kind}_{number}" if len(draws) > 1 else kind
            for image, frames in zip(batch, draw.split(len(batch[0].pixels))):
                path = Path(OUTPUT, f"{image.name}_{ending}{image.suffix}")
                utils.write_image(path, image, frames.permute(0, 2, 3, 1).numpy())
    for k, image in enumerate(batch):
        png, npy = (Path(OUTPUT, f"{image.name}_uncertainty{end}") for end in (".png", ".npy"))
        if variance is None:  # then that of an earlier run must not lie beside these results
            png.unlink(missing_ok=True)
            npy.unlink(missing_ok=True)
            continue
        of_first_frame = variance[k * len(image.pixels)][None]
        averaged = avg_pool2d(of_first_frame, 5, 1, 2, count_include_pad=False)[0].clamp(min=1e-12)
        shown = averaged.mean(0, keepdim=True).sqrt()
        utils.save_png(png, shown / shown.max())
        with utils.replacing(npy) as temporary:
            np.save(temporary, averaged.sqrt().permute(1, 2, 0).numpy())


def table_rows(batch, sigma, results, x0, variance):
    """Return a row of the table for each Image and result, a mean over its draws."""
    rows, (_, samples, calls) = [], results[-1]
    if x0 is None:
        results = results[1:]
    elif len(samples) > 1:
        mean = torch.stack(samples).mean(0)
        results = [*results, (f"mean of {len(samples)}", [mean], calls)]
    for k, image in enumerate(batch):
        for kind, draws, calls in results:
            row = {"image": image.name, "sigma": sigma, "method": kind}
            row["calls"] = calls // len(draws)
            if x0 is not None:
                images = torch.stack([draw[k] for draw in draws])
                truth = x0[k].expand_as(images)
                row["PSNR dB"] = utils.psnr(images, truth).mean().item()
                row["SSIM"] = utils.ssim(images, truth).mean().item()
            if kind == "mmse" and variance is not None:
                error = variance.split(len(image.pixels))[k].mean().item()
                row["expected PSNR"] = -10 * math.log10(max(error, 1e-10))
            rows.append(row)
    return rows


def summary(rows):
    """Return the rows to print: all of few images and, where the truth is known, their means."""
    if "PSNR dB" not in rows[0] or rows[0]["image"] == rows[-1]["image"]:
        return rows
    return (rows if len(rows) <= 64 else []) + utils.means(rows, "method", "image")


def save_frames(batch, sigma, results, x0, frames):
    """Write every state and estimate, and an animation, of each Image that was recorded.

    frames: (sigma, states, estimates) of every call. Returns rows of panels for the figure.
    """
    rows = []
    for k, image in zip(itertools.count(0, len(batch[0].pixels)), batch):
        film = [(level, x[k], D[k]) for level, x, D in frames if k < len(x)]
        if not film:
            break
        with utils.replacing(Path(OUTPUT, f"{image.name}_{METHOD}_frames")) as folder:
            folder.mkdir()
            for call, (level, state, estimate) in enumerate(film):
                utils.save_png(folder / f"{call:03}_state_{level:.4f}.png", state)
                utils.save_png(folder / f"{call:03}_estimate_{level:.4f}.png", estimate)
        utils.save_animation(Path(OUTPUT, f"{image.name}_{METHOD}.gif"), film)
        level, state, _ = film[len(film) // 4]
        panels = [(kind, draw[k], "") for kind, draws, _ in results for draw in draws[:2]]
        panels[0] = (*panels[0][:2], f"$\\sigma$ = {sigma:.3g}")
        panels.insert(1, ("a state on the way", state, f"$\\sigma$ = {level:.2g}"))
        if x0 is not None:
            panels.append(("clean", x0[k], ""))
        rows.append([(title, utils.crop(shown, 256), note) for title, shown, note in panels])
    return rows


def save_figure(recorded):
    """Write a figure of the rows of panels; return its path."""
    path = Path(OUTPUT, f"{Path(INPUT[0]).resolve().stem[:45]}_{METHOD}.jpg")
    utils.plot_images(path, recorded, all(row[-1][0] == "clean" for row in recorded))
    return path


def check_constants():
    utils.check(SDE in ("ve", "vp", "subvp"), "SDE", SDE, "must be one of ve, vp, subvp")
    utils.check(METHOD in methods(), "METHOD", METHOD, f"must be one of {', '.join(methods())}")
    named = OUTPUT and not Path(OUTPUT).suffix
    utils.check(named, "OUTPUT", repr(OUTPUT), "must name a folder, without a suffix")
    for name, value in (("STEPS", STEPS), ("DRAWS", DRAWS), ("ENLARGE", ENLARGE)):
        whole = value is None or (isinstance(value, int) and value >= 1)
        utils.check(whole, name, value, "must be a whole number from 1 on")
    positive = SIGMA is None or 0 < SIGMA < math.inf
    utils.check(positive, "SIGMA", SIGMA, "must be positive, for pixels in [0, 1], as 25/255")
    utils.check(0 <= BLUR < math.inf, "BLUR", BLUR, "must be a number of pixels")


def main():
    check_constants()
    device, rng = utils.pick_device(DEVICE), np.random.default_rng(SEED)
    rows, recorded, failures = [], [], []
    with tqdm(desc=METHOD, unit=" calls", disable=None, leave=False) as bar:
        reading = {"notify": bar.write, "failures": failures, "output": OUTPUT, "skip": [MASK]}
        images = utils.read_images(INPUT, black=BLACK, white=WHITE, **reading)
        for batch in batches(itertools.islice(images, COUNT)):
            model = load(checkpoint_for(batch[0]), device)
            network = utils.tiled(model, update=bar.update)
            with leaving_out(batch, failures, bar.write):
                # The noisy images or observations, their noise level, and the denoiser for them.
                y, x0, A, known = noisy_images(batch, rng, device, bar.write)
                sigma, denoiser = level_and_denoiser(model, network, y, known, batch[0], bar.write)
                sampler, levels, draws = plan(model, y, A, sigma, batch[0].builtin)

                # The estimate of smallest squared error: in one call or, of an observation, in
                # 12 calls on pairs.
                one = utils.Recorder(denoiser, 0)
                best = one(y, sigma) if A is None else posterior_mean(one, y, A, sigma)

                # Samples of p(x0 | y), or the one result of a method that does not draw.
                posterior = denoiser if A is None else sde.observed(denoiser, y, A, sigma)
                recorder, samples = utils.Recorder(posterior, max(0, FRAMES - len(recorded))), []
                for draw in range(draws):
                    noise = utils.seeded_noise(seeds_of(y, draw), device)
                    start = y if A is None else best + levels[0] * noise(best)
                    samples.append(finite(sampler(recorder, start, levels=levels, noise=noise)))
                    recorder.count = 0  # the first one alone is recorded

                variance = uncertainty(denoiser, y, sigma, A, samples)
                given, first = ("noisy", "mmse") if A is None else ("observation", "mean")
                results = [(given, [interpolate(y, best.shape[2:]).cpu()], 0)]
                results.append((first, [best.cpu()], one.calls))
                if samples:
                    results.append((METHOD, samples, recorder.calls))
                save(batch, results, variance)
                rows += table_rows(batch, sigma, results, x0, variance)
                recorded += save_frames(batch, sigma, results, x0, recorder.frames)
        if next(images, None):
            bar.write(f"only the first {COUNT} images were denoised: --count sets how many")
    if not rows:
        raise ValueError(f"nothing was denoised of {' '.join(INPUT)}")
    print(utils.table(summary(rows)))
    figure = f", with {save_figure(recorded)}" if recorded else ""
    print(f"wrote the results to '{OUTPUT}'{figure}")
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    with torch.no_grad():
        utils.run_script(main, globals(), positional="INPUT")

"""Denoise pictures with a trained score network: in one step, or back along the reverse-time SDE.

    python denoise.py                                   # five photographs, made noisy, with the shipped network
    python denoise.py photo.jpg scans/                  # your own noisy pictures: their noise level is estimated
    python denoise.py photo.jpg --sigma 25/255          # or known: standard deviation, for pixels in [0, 1]
    python denoise.py cifar10 --count 1000 --method mmse
    python denoise.py photo.jpg --mask holes.png        # fill in what is white in the mask; --blur and --enlarge likewise
    python denoise.py --help                            # every constant below is an option

Prints a table and writes the denoised pictures: NAME_mmse has the least error, NAME_sde natural texture, of which the finest
is invented. For the built-in pictures it adds a figure, an animation, and the frames on the way; for yours with --figures yes.
"""

import functools
import itertools
import math
import re
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch.nn.functional import avg_pool2d, interpolate
from tqdm import tqdm

import sde
import utils
from model import load_model

# -----------------------------------------------------------------------------
# pictures
INPUT = ("samples",)  # "samples" (five photographs), "cifar10" (its test images), and paths of pictures, .npy arrays, folders
COUNT = 1000  # at most so many
LISTED = 16  # up to so many built-in ones have a line each in the table, and so many an expected PSNR; yours all do
DATA_DIR = "data"  # folder that holds CIFAR-10, or gets it
OUTPUT = "output"  # folder for all that is written; for one picture also a file
WHITE = None  # value of white in files of more than 8 bits; none: found, and said
# noise
SIGMA = None  # standard deviation for pixels in [0, 1]; none: 0.1 where noise is added, else estimated from the picture
ADD_NOISE = False  # do so, and what is below, to your own pictures too, as is always done to "samples" and "cifar10"
# what was seen, if it is not the whole picture: one of these at most; SIGMA is then the noise in it, 0.02 unless given
MASK = "none"  # file of a mask, white where the picture is missing; or a share of missing pixels, 0.5
BLUR = 0.0  # standard deviation, in pixels, of a Gaussian blur to undo
ENLARGE = 1  # how many times larger to make the picture, both ways
# method
CHECKPOINT = "checkpoints/score_cifar10.pt"  # written by train_score.py
METHOD = "sde"  # "mmse" (least error, one call), "sde" (a draw, natural texture), "ode" (no draw, sharp); see `methods` for more
STEPS = None  # noise levels from sigma down to the lowest trained one; none: what the method needs for the right law, or 30
RHO = None  # they are even in sigma^(1 / RHO), inf: in log sigma; none: 7, and inf for a picture not wholly seen
TEXTURE = 1.0  # 1 follows the SDE to its end; less stops early, at sigma^(1 - TEXTURE) lowest^TEXTURE; 0 is "mmse"
SDE = "ve"  # the process of "euler" and "heun": "ve", "vp" or "subvp"
LANGEVIN_STEPS = 100  # updates of "langevin", the recipe this project starts from
LANGEVIN_STEP_SIZE = 1e-4  # of each, made for sigma 0.1; the temperature is sigma^2
# how sure
DRAWS = None  # of each picture, by methods that draw; none: 2 of the built-in ones, 1 of yours, 4 of those not wholly seen
PROBES = None  # random vectors behind the expected PSNR and the map of uncertainty; none: 8, of large pictures fewer; 0: neither
COMPONENTS = 0  # main directions of doubt to show, of the middle 128 x 128 pixels
# run
SEED = 0  # of the noise that is added
DRAW_SEED = 0  # of the draws, with the noisy picture itself: the same picture gets the same draws in any company
DEVICE = "auto"  # "auto" (GPU if there is one), "cpu", "cuda", "cuda:1"
PRECISION = "auto"  # of the network: "bfloat16", "float32", or "auto" (bfloat16 where the hardware has it)
BATCH_PIXELS = 2**18  # pixels that go through the network at a time: many small pictures, or a tile of a large one
FIGURES = "auto"  # figure, animation, frames: "yes", "no", or "auto": of the built-in pictures
SHOWN = 2  # pictures in them
SAVE_FRAMES = True  # write states and estimates of these pictures as PNG, in a folder NAME_METHOD_frames
# -----------------------------------------------------------------------------
defaults = utils.options(globals())


class Method(NamedTuple):
    sampler: Callable
    steps: int  # noise levels that it needs for the right law
    calls: int  # of the network, a level
    draws: bool  # whether its result is a draw from p(x0 | y)


def methods():
    process = {"ve": sde.VE, "vp": sde.VP, "subvp": sde.SubVP}[SDE]()
    return {
        "mmse": Method(sde.adams, 1, 1, False),  # E[x0 | y]: one level is one step
        "sde": Method(sde.adams, 20, 1, True),  # the reverse-time SDE, second order
        "ode": Method(functools.partial(sde.adams, eta=0.0), 20, 1, False),  # the probability-flow ODE, second order
        "euler": Method(functools.partial(sde.reverse_sde, sde=process), 100, 1, True),  # the reverse-time SDE of the textbook
        "heun": Method(functools.partial(sde.probability_flow_ode, sde=process), 20, 2, False),  # and its probability-flow ODE
        "ancestral": Method(sde.ancestral, 100, 1, True),
        "pc": Method(sde.predictor_corrector, 50, 2, True),
        "annealed": Method(sde.annealed_langevin, 100, 1, True),
        "langevin": Method(langevin, 1, LANGEVIN_STEPS, False),  # the original recipe; forgets the picture if it runs on
    }


def langevin(denoiser, y, levels, noise):
    return sde.langevin(denoiser, y, float(levels[0]), LANGEVIN_STEPS, LANGEVIN_STEP_SIZE, noise=noise)


@dataclass
class Job:
    """What a picture goes through; images are (C, H, W), on the CPU, and not clipped. C is 1 for a grey picture, else 3."""

    picture: utils.Picture
    y: torch.Tensor  # the noisy picture
    x0: torch.Tensor | None  # the clean one, where it is known
    sigma: float  # the noise level of y
    levels: torch.Tensor  # falling noise levels, from where the sampler starts
    A: Callable | None = None  # (B, C, H, W) -> (B, C, h, w), of which y is the noisy result, if y is not the picture itself
    unsure: bool = False  # whether to tell its uncertainty
    results: dict = field(default_factory=dict)  # method: [images (draws, C, H, W) or, let go, (1, 0), network calls, seconds]
    error: float | None = None  # expected squared error of the one-step estimate: the mean variance of a value of x0 given y
    frames: list = field(default_factory=list)  # (sigma, state, estimate of x0) of every network call
    written: list = field(default_factory=list)  # paths of all that was

    def seed(self, draw):
        """Return the seed of a draw: of the noisy pixels, DRAW_SEED and the number of the draw, not of a place in a list."""
        pixels = functools.reduce(lambda crc, channel: zlib.crc32(channel.contiguous().numpy(), crc), self.y, 0)
        return zlib.crc32(f"{DRAW_SEED} {draw}".encode(), pixels)

    @functools.cached_property
    def owner(self):
        return owner_of(self.picture.source)

    @functools.cached_property
    def name(self):
        """A name under which none of what may be written of a job is there, or all is our own."""
        pictures = ["mmse", METHOD, "mean", *(f"{METHOD}_{k + 1}" for k in range(draws_of(self)))]
        endings = [f"_{kind}{suffix}" for kind in ("uncertainty", "spread") for suffix in (".npy", ".png")]
        endings += [f"_{kind}{self.picture.suffix}" for kind in pictures]
        endings += ["_components.png", f"_{METHOD}.csv", f"_{METHOD}_frames"]
        return utils.free_name(OUTPUT, self.picture.name, endings, self.owner)

    def path(self, ending):
        return Path(OUTPUT, self.name + ending)

    def wrote(self, path):
        """Note a file or folder that was written for this picture: it is ours."""
        utils.remember(path, self.owner)
        self.written.append(path)

    def seen(self):
        """Return y in the size of the result."""
        return interpolate(self.y[None], self.picture.shape[:2], mode="bicubic")[0]

    def rows(self):
        """Return rows of the table, one a method, as a mean over its draws, and one of the mean of the draws."""
        results = {} if self.x0 is None else {"as seen" if self.A else "noisy": [self.seen()[None], 0, 0.0]}
        results |= {method: self.results[method] for method in ("mmse", METHOD) if method in self.results}
        images, calls, seconds = results[METHOD]
        if len(images) > 1:
            results[f"mean of {len(images)}"] = [images.mean(0, keepdim=True), len(images) * calls, len(images) * seconds]
        rows = []
        for method, (images, calls, seconds) in results.items():
            row = {"picture": self.picture.name, "sigma": self.sigma, "method": method}
            if self.x0 is not None:
                x0 = self.x0.expand_as(images)
                row |= {"PSNR dB": utils.psnr(images, x0).mean().item(), "SSIM": utils.ssim(images, x0).mean()}
            if self.error is not None:
                row["expected PSNR"] = -10 * math.log10(max(self.error, 1e-10)) if method == "mmse" else ""
            rows.append(row | {"calls": calls, "seconds": seconds})
        return rows


# -----------------------------------------------------------------------------
# The noise level
# -----------------------------------------------------------------------------


def unclipped(v, denoised, sigma, margin=1.5):
    """Leave out, as a `part` of sde.estimate_sigma, what clipping to [0, 1] has touched: D within margin * sigma of an end."""
    reach = margin * sigma.view(-1, 1, 1, 1)
    return v * ((denoised > reach) & (denoised < 1 - reach))


def luma(v, denoised, sigma, block=1):
    """Keep of an image the mean of its channels over block x block pixels, where that is `unclipped`.

    Lossy files keep the noise of luma and smooth that of chroma; strong compression removes the finest luma, too.
    """
    mean = lambda a: interpolate(avg_pool2d(a.mean(1, keepdim=True), block), scale_factor=block)  # noqa: E731
    return unclipped(mean(v), mean(denoised), sigma).expand_as(v)


def spread_tiles(y, size=64, rows=3):
    """Return rows x rows tiles of one picture (1, C, H, W), spread evenly, of even sides, or a small picture itself."""
    height, width = (min(size, n) // 2 * 2 or 1 for n in y.shape[2:])
    tops, lefts = (sorted({(n - m) * k // (rows - 1) for k in range(rows)}) for n, m in zip(y.shape[2:], (height, width)))
    return torch.cat([y[:, :, t : t + height, k : k + width] for t in tops for k in lefts])


def picture_level(denoiser, y, low, high):
    """Return the noise level of one picture (1, C, H, W), on a few tiles, and what there is to say of its noise.

    Lossy files smooth the noise of chroma, and the finest of luma. Then all values together would show close to none, and luma
    says what is there, or, where that is smoothed as well, luma over pairs of pixels. Meanwhile chroma gets complementary noise,
    for the network to see white noise. Texture reads as up to 0.02 of luma.
    """
    clipped = y.min() >= 0 and y.max() <= 1 and ((y == 0) | (y == 1)).double().mean() > 1e-3
    tiles, part = spread_tiles(y), unclipped if clipped else None
    probes, brightness = 4 if len(tiles) == 1 else 1, 0.0
    level = lambda denoiser, part: sde.estimate_sigma(denoiser, tiles, low, high, probes, part, True)[0].item()  # noqa: E731
    sigma = level(denoiser, part)
    if y.shape[1] == 3 and min(tiles.shape[2:]) >= 32:
        e = utils.seeded_noise([2**31], tiles.device)(tiles[:1])  # a seed that the noise of no picture has
        whitened = lambda x, s: denoiser(x + s.view(-1, 1, 1, 1) * (e - e.mean(1, keepdim=True)), s)  # noqa: E731
        brightness = level(whitened, luma)
        if sigma < 2 * low and brightness < 0.05:  # stronger noise is not smoothed away
            brightness = max(brightness, level(whitened, functools.partial(luma, block=2)))
    if (lone := impulses(tiles.cpu().numpy(), max(sigma, brightness))) > 2e-3:
        return sigma, f"lone values of black or white ({lone:.1%}), as of salt and pepper: not Gaussian, some may stay"
    if brightness > max(1.5 * sigma, 0.02):
        note = "stronger in brightness than in colour, as in a lossy file: judged by brightness"
        return brightness, ", ".join([note, *places(denoiser, tiles, brightness, luma)])
    return sigma, remarks(denoiser, tiles, sigma, low, high, part)


def remarks(denoiser, tiles, sigma, low, high, part):
    """Return in words where the noise of a picture's tiles is not what the network was trained on."""
    inside, found = (tiles > 0) & (tiles < 1), []
    clipped = 1 - inside.double().mean().item() if part else 0.0
    if low == high:
        return "the only level that the network knows"
    if sigma < 1.1 * low:
        return "as low as the network knows: nothing to remove"
    if sigma > 0.99 * high:
        return "as high as is looked for: give --sigma"
    if clipped > 0.3:
        return f"clipped in {clipped:.0%} of the values: the level is a guess, give --sigma"
    rest = (tiles - denoiser(tiles, sigma))[inside]
    kurtosis = ((rest**4).mean() / (rest**2).mean() ** 2).item()
    if len(rest) > 1000 and not 2.5 < kurtosis < 4.6:
        found.append(f"not Gaussian (kurtosis {kurtosis:.1f} instead of 3)")
    if clipped > 0.05:
        found.append(f"clipped in {clipped:.0%} of the values")
    found += places(denoiser, tiles, sigma, part)
    if tiles[:, 0].numel() < 16**2:
        found.append("judged by few pixels")
    return ", ".join(found) + ": expect less of the result" * bool(found)


def impulses(values, sigma):
    """Return the share of values (B, C, H, W) that stand alone at 0 or 1, farther from those around than noise takes them."""
    ring = np.array([[[[1, 1, 1], [1, 0, 1], [1, 1, 1]]]])
    white = (values == 1) & (ndimage.maximum_filter(values, footprint=ring) < 1)
    black = (values == 0) & (ndimage.minimum_filter(values, footprint=ring) > 0)
    return ((white | black) & (abs(values - ndimage.median_filter(values, footprint=ring)) > max(0.3, 4 * sigma))).mean()


def places(denoiser, tiles, sigma, part):
    """Return in a list of words where the noise is weakest and strongest, if it varies; tiles: as spread_tiles cuts them."""
    if len(tiles) < 9:
        return []
    local = sde.noise_map(denoiser, tiles, sigma, part=part).flatten(1).nanmedian(1).values.nan_to_num(nan=sigma)
    names = [f"{row} {column}" for row in ("upper", "middle", "lower") for column in ("left", "centre", "right")]
    least, most = (f"{local[k]:.3f} in the {names[k]}" for k in (local.argmin(), local.argmax()))
    return [f"not the same everywhere, from {least} to {most}"] if local.max() > 1.3 * local.min() else []


def of_any_kind(denoiser, size=None, place=(0, 0)):
    """Return a denoiser of pictures with three channels or, through the complementary noise of `sde.grey`, with one.

    size, place: of a picture of which a part is denoised, see utils.seeded_noise.
    """

    def denoise_kind(x, sigma):
        if x.shape[1] == 3:
            return denoiser(x, sigma)
        e = utils.seeded_noise([2**31], size=size, place=place)(torch.empty(1, 3, *x.shape[2:]))
        return sde.grey(denoiser, e.to(x))(x, sigma)

    return denoise_kind


def observation(size, mask="none", blur=0.0, enlarge=1, seed=0):
    """Return A, what the constants of these names say was done to pictures (B, C, *size); None if nothing was.

    Raises ValueError for a mask of another size, or a blur as wide as the picture.
    """
    if mask != "none":
        share = re.fullmatch(r"0?\.\d+", mask)
        missing = np.random.default_rng(seed).random(size) < float(mask) if share else read_mask(mask)
        utils.check(missing.shape == size, "MASK", missing.shape, f"must have the {size} rows and columns of the picture")
        return lambda x: torch.from_numpy(~missing).to(x) * x
    if blur:
        from torchvision.transforms.functional import gaussian_blur  # here, since it takes 160 MB

        reach = math.ceil(4 * blur)
        utils.check(reach < min(size), "BLUR", blur, f"must be narrow in a picture of {tuple(size)} rows and columns")
        return lambda x: gaussian_blur(x, 2 * reach + 1, blur)
    return (lambda x: avg_pool2d(x, enlarge)) if enlarge > 1 else None


@functools.cache
def read_mask(path):
    """Return where a mask is white, and not transparent: (H, W). White is what is above half of its brightest value."""
    mask = next(utils.read_pictures(path))
    missing = (mask.pixels.mean(axis=2) > mask.pixels.max() / 2) & (mask.alpha is None or mask.alpha > 0)
    utils.check(0 < missing.mean() < 1, "MASK", f"'{path}'", "must be white where the picture is missing, and black elsewhere")
    return missing


def read_jobs(model, device, notify, failed, refused):
    """Yield a job for each picture; to the list `refused` go those that cannot be denoised, and why."""
    rng = np.random.default_rng(SEED)
    for k, picture in enumerate(utils.read_pictures(INPUT, DATA_DIR, WHITE, notify, failed)):
        if k == COUNT:
            if not picture.builtin:
                notify(f"the first {COUNT} pictures are taken: --count gives another number")
            break
        try:
            yield make_job(picture, model, device, rng, notify, k < LISTED or not picture.builtin)
        except ValueError as error:
            refused.append((picture.name, str(error)))  # not the picture, which may be large


def make_job(picture, model, device, rng, notify, listed):
    """Return the job of a picture, with its noise level: the one added, the one given, or an estimate. Raises ValueError."""
    made, y, x0 = ADD_NOISE or picture.builtin, torch.from_numpy(picture.pixels).permute(2, 0, 1), None
    height, width = (n // ENLARGE * ENLARGE if made else n * ENLARGE for n in y.shape[1:])
    utils.check(height and width, "ENLARGE", ENLARGE, f"must not exceed the sides of '{picture.name}'")
    A = observation((height, width), MASK, BLUR, ENLARGE, SEED)
    sigma = SIGMA or (0.02 if A else 0.1 if made else None)
    if made:
        x0 = y[:, :height, :width]
        (y,) = utils.add_noise([(A(x0[None])[0] if A else x0).permute(1, 2, 0).numpy()], sigma, rng)
        y = torch.from_numpy(y).permute(2, 0, 1)
    y = A(y) if MASK != "none" else y  # nothing where nothing is seen, in place of noise
    low, high = (level / math.sqrt(3 if len(y) == 1 else 1) for level in (model.sigma_min, model.sigma_max))  # see sde.grey
    if A:
        picture.resize(height, width)
    elif sigma is None:
        visible = utils.visible_part(y, picture.alpha)[None].to(device)
        sigma, note = picture_level(of_any_kind(model), visible, low, min(high, 1.0))
        sigma = min(max(sigma, low), high)  # not beyond them by rounding
        notify(f"{picture.name}: noise level estimated at {sigma:.4f}" + f", {note}" * bool(note))
    if not (A or low <= sigma <= high):
        trained = f"the range {low:.2g} to {high:.2g} that '{CHECKPOINT}' was trained on"
        raise ValueError(f"noise level {sigma:g} of '{picture.name}' is outside {trained}")
    values = utils.crop(y, 128).numel()
    utils.check(values >= COMPONENTS, "COMPONENTS", COMPONENTS, f"must be at most {values}, the values of '{picture.name}'")
    least = methods()[METHOD].steps
    steps = 1 if least == 1 else STEPS or (max(30, least) if A else least)
    start, rho = (high, math.inf) if A else (sigma, 7.0)  # a picture not wholly seen begins as pure noise
    levels = sde.noise_levels(start, start * (low / start) ** TEXTURE, steps, RHO or rho)
    return Job(picture, y, x0, sigma, levels, A, listed and not A)


# -----------------------------------------------------------------------------
# Denoising
# -----------------------------------------------------------------------------


def batches(jobs):
    """Yield lists of neighbouring jobs that are alike: in size, noise level and kind, at most BATCH_PIXELS pixels together."""
    kind = lambda job: (job.picture.shape[:2], (job.y.shape, job.sigma, job.picture.builtin))  # noqa: E731
    for (size, _), alike in itertools.groupby(jobs, kind):
        most = max(1, BATCH_PIXELS // math.prod(size))
        while batch := list(itertools.islice(alike, most)):  # full now, not when the next picture is in memory, too
            yield batch


def draws_of(job):
    usual = 1 if is_file(OUTPUT) else 4 if job.A else 2 if job.picture.builtin else 1
    return (DRAWS or usual) if methods()[METHOD].draws else 1


def probes_of(job):
    return max(1, min(8, 2**21 // job.y[0].numel())) if PROBES is None else PROBES  # of a large picture one says enough


def work(job):
    """Return about how many pixels go through the network for a picture, for the progress bar, and how many for `doubt`."""
    size = job.picture.shape[:2]
    calls = len(job.levels) * methods()[METHOD].calls * draws_of(job) + (METHOD != "mmse" and not job.A)
    products = (1 + 2 * probes_of(job)) * (PROBES != 0)  # a product counts as two calls
    return calls * utils.pixels_seen(*size, BATCH_PIXELS), products * utils.pixels_seen(*size, BATCH_PIXELS // 7, halo=32)


def denoise(model, jobs, device, filmed, bar=None):
    """Give each job its one-step estimate and its draws, and write them; keep the frames of a draw of `filmed` jobs.

    What is written of somebody's own picture is let go, since it may be large, unless it is needed again.
    """
    levels, draws = jobs[0].levels, draws_of(jobs[0])
    network = utils.tiled(model, BATCH_PIXELS, bar)
    passes = [(METHOD, methods()[METHOD].sampler, levels, draw) for draw in range(draws)]
    if METHOD != "mmse" and not jobs[0].A:
        passes.append(("mmse", sde.adams, levels[:1], 0))  # last, since it cannot diverge: nothing is written of what does
    for method, sampler, levels, draw in passes:
        first, last = filmed if method == METHOD and draw == 0 else 0, draw + 1 == (draws if method == METHOD else 1)
        began = time.perf_counter()
        images, film = sample(network, jobs, device, functools.partial(sampler, levels=levels), draw, first)
        seconds = (time.perf_counter() - began) / len(jobs)
        for job, image in zip(jobs, images):
            together = torch.cat([job.results[method][0], image[None]]) if method in job.results else image[None]
            job.results[method] = [together, film.calls, seconds]
        for k, job in enumerate(jobs[:first]):
            job.frames = [(sigma, x[k].cpu(), denoised[k].cpu()) for sigma, x, denoised in film.frames]
        del images, image, together  # which would stay in memory through the next pass
        for k, job in enumerate(jobs if last else []):
            write(job, method)
            if k >= filmed and job.x0 is None and len(job.results[method][0]) == 1 and not COMPONENTS:
                job.results[method][0] = torch.empty(1, 0)


def fill(y, A, sigma, like):
    """Return what y = A(x0) + sigma n makes most likely, like `like`, for a Gaussian prior with the spectrum of photographs."""
    return sde.observed(lambda x, sigma: 0.5 + 0 * x, y, A, sigma, resolution=1e6)(like, 1e6)  # a level that shows nothing


def sample(network, jobs, device, sampler, draw, filmed):
    """Return what a sampler makes of jobs, on the CPU, and its Film.

    A large picture goes through all of it tile by tile, with the noise of its place: then the states of all levels take the
    memory of one tile. Where it is filmed, or not wholly seen, it stays whole, and `network` works in tiles. What is not wholly
    seen starts from a classical fill and the strongest noise that the network knows: where that is strong, from pure noise.
    """
    A, size, films = jobs[0].A, jobs[0].picture.shape[:2], []
    y = (torch.stack([job.y for job in jobs]) if len(jobs) > 1 else jobs[0].y[None]).to(device)  # no copy of a large one
    seeds = [job.seed(draw) for job in jobs]

    def on_tile(part, place):
        denoiser, noise = of_any_kind(network, size, place), utils.seeded_noise(seeds, device, size, place)
        films.append(utils.Film(sde.observed(denoiser, y, A, jobs[0].sigma) if A else denoiser, filmed))
        start = fill(y, A, jobs[0].sigma, part) + jobs[0].levels[0] * noise(part) if A else part
        images = sampler(films[-1], start, noise=noise)
        if not images.isfinite().all():
            raise ValueError(f"--method {METHOD} diverged on '{jobs[0].picture.name}': take a smaller step size, or more steps")
        return images

    like, pixels = (y.new_zeros(*y.shape[:2], *size), math.inf) if A else (y, math.inf if filmed else BATCH_PIXELS)
    return utils.over_tiles(on_tile, like, pixels).cpu(), films[-1]


def carry_out(model, jobs, device, filmed, bar, refused):
    """Give jobs that are alike all that is asked for, and write it; yield them, but for those that go to `refused`, with why."""
    try:
        denoise(model, jobs, device, filmed, bar)
        for job in jobs:
            if job.unsure:
                doubt(model, job, device, bar)
    except ValueError as error:
        for job in jobs:
            job.results.clear(), job.frames.clear()
        if len(jobs) == 1:
            refused.append((jobs[0].picture.name, str(error)))
        else:  # because of one of them
            for k, job in enumerate(jobs):
                yield from carry_out(model, [job], device, int(k < filmed), bar, refused)
    else:
        yield from jobs


def doubt(model, job, device, bar=None):
    """Give a job its expected error; write its map of uncertainty and the main directions of doubt of its middle."""
    y, size = job.y[None].to(device), job.picture.shape[:2]
    noise = utils.seeded_noise([job.seed(0)], device)
    if probes := probes_of(job):
        error = lambda part, place: sde.expected_error(of_any_kind(model, size, place), part, job.sigma, probes, noise)[1]  # noqa: E731
        variance = utils.over_tiles(error, y, BATCH_PIXELS // 7, bar, 1 + 2 * probes, halo=32)[0].cpu()  # products take memory
        job.error = utils.visible_part(variance, job.picture.alpha).mean().item()
        write_map(job, "uncertainty", variance)
    if COMPONENTS:
        middle = utils.crop(y, 128)
        variances, directions = sde.principal_components(of_any_kind(model), middle, job.sigma, COMPONENTS, noise=noise)
        deviations, denoised = variances[0].clamp(min=0).sqrt().cpu(), job.results["mmse"][0][0]
        utils.save_components(job.path("_components.png"), utils.crop(denoised, 128), deviations, directions[0].cpu())
        job.wrote(job.path("_components.png"))


# -----------------------------------------------------------------------------
# What is written
# -----------------------------------------------------------------------------


def owner_of(source):
    """Return who writes a file: the source and the options, but for what they are applied to."""
    return f"{source} { ({k: v for k, v in utils.options(globals()).items() if k not in ('input', 'output', 'count')}) }"


def is_file(output):
    return Path(output).suffix.lower() in utils.SUFFIXES


def write(job, method):
    """Write what a method gave, in place of no file but our own: its images and, of draws, their mean, spread and frames."""
    picture, images = job.picture, job.results[method][0]
    save = lambda path, image: utils.write_picture(path, picture, image.permute(1, 2, 0).numpy(), job.owner)  # noqa: E731
    if is_file(OUTPUT):
        if method == METHOD:
            job.written.append(save(OUTPUT, images[0]))
        return
    named = {f"{method}_{k + 1}" if len(images) > 1 else method: image for k, image in enumerate(images)}
    asked = (DRAWS or job.A) and len(images) > 1
    named |= {"mean": images.mean(0)} if asked else {}
    job.written += [save(job.path(f"_{kind}{picture.suffix}"), image) for kind, image in named.items()]
    if asked:
        write_map(job, "spread", images.var(0))
    if method == METHOD and job.frames:
        write_frames(job)


def write_map(job, kind, variance):
    """Write the map of the standard deviation of every value, if the output is a folder."""
    if not is_file(OUTPUT):
        utils.save_map(job.path(f"_{kind}"), variance, f"{kind} of {job.name}: standard deviation of a pixel")
        for suffix in (".npy", ".png"):
            job.wrote(job.path(f"_{kind}{suffix}"))


def write_frames(job):
    """Write every state and estimate on the way as a picture, under names that sort, and their PSNR as a table."""
    rows = []
    for call, (sigma, state, estimate) in enumerate(job.frames):
        rows.append({"call": call, "sigma": f"{sigma:.6g}"})
        for kind, image in (("state", state), ("estimate", estimate)):
            if SAVE_FRAMES:
                path = job.path(f"_{METHOD}_frames") / f"{call:03}_{kind}_{sigma:.4f}.png"
                utils.save_image(path, image)
                utils.remember(path, job.owner)
            if job.x0 is not None:
                x0 = utils.crop(job.x0, 256)
                rows[-1][f"psnr_{kind}"] = f"{utils.psnr(image[None], x0[None]).item():.4f}"
    utils.save_csv(job.path(f"_{METHOD}.csv"), rows)
    for ending in [".csv"] + ["_frames"] * SAVE_FRAMES:
        job.wrote(job.path(f"_{METHOD}{ending}"))


def caption(image, x0):
    return "" if x0 is None else f"{utils.psnr(image[None], x0[None]).item():.2f} dB"


def panels_of_draws(seen, sigma, images, x0):
    """Return the panels of draws (N, C, H, W) of a picture not wholly seen: what was, two draws, their mean and deviation."""
    panels = [("as seen", seen, f"$\\sigma$ = {sigma:.3g}")]
    panels += [(title, image, caption(image, x0)) for title, image in zip(("a draw", "another draw"), images)]
    if len(images) > 1:
        mean, deviation = images.mean(0), images.var(0).mean(0).sqrt()
        white = deviation.flatten().kthvalue(math.ceil(0.99 * deviation.numel())).values
        panels.append((f"mean of {len(images)}", mean, caption(mean, x0)))
        panels.append(("deviation", utils.in_colour((deviation / white).clamp(max=1)), f"black 0, white {white:.2g}"))
    return panels + ([("clean", x0, "")] if x0 is not None else [])


def show(jobs, path):
    """Show each picture and its middle, enlarged: noisy, on the way, one step, the results, clean; and animate the frames."""
    grid = []
    for job in jobs:
        images, (sigma, state, _) = job.results[METHOD][0], job.frames[len(job.frames) // 2]
        if job.A:
            grid.append(panels_of_draws(job.seen(), job.sigma, images, job.x0))
            continue
        panels = [("noisy", job.y, f"$\\sigma$ = {job.sigma:.3g}"), ("a state on the way", state, f"$\\sigma$ = {sigma:.2g}")]
        panels += [("one step", image, caption(image, job.x0)) for image in job.results["mmse"][0] if METHOD != "mmse"]
        titles = ("a draw", "another draw") if len(images) > 1 else (METHOD,)
        panels += [(title, image, caption(image, job.x0)) for title, image in zip(titles, images)]
        grid.append(panels + ([("clean", job.x0, "")] if job.x0 is not None else []))
    utils.plot_pictures(path, grid)
    utils.save_animation(path.with_suffix(".gif"), [job.frames for job in jobs])


def check_output(jobs):
    """Raise ValueError unless OUTPUT is a file for what comes of one job."""
    utils.check(len(jobs) < 2, "OUTPUT", OUTPUT, "must be a folder for more than one picture")
    for job in jobs:
        mine = not Path(OUTPUT).exists() or utils.is_result(OUTPUT, job.owner)
        utils.check(mine, "OUTPUT", OUTPUT, "must be a file that is not there or that the same command wrote")
        utils.check_suffix(OUTPUT, job.picture)


def observed_by():
    given = {"--mask": MASK != "none", "--blur": BLUR > 0, "--enlarge": ENLARGE > 1}
    return [option for option, asked in given.items() if asked]


def check_constants(model):
    limits = {name: (1, 1e18) for name in ("COUNT", "LANGEVIN_STEPS", "BATCH_PIXELS")}
    limits |= {"ENLARGE": (1, 64), "BLUR": (0, 1e6), "WHITE": (1e-30, 1e30), "LANGEVIN_STEP_SIZE": (1e-30, 1e30)}
    limits |= {"STEPS": (1, 100_000), "DRAWS": (1, 100_000), "PROBES": (0, 100_000), "COMPONENTS": (0, 100_000)}
    limits |= {"SEED": (0, 2**32 - 1), "DRAW_SEED": (0, 2**32 - 1)}
    for name, (low, high) in limits.items():
        value = globals()[name]
        utils.check(value is None or low <= value <= high, name, value, f"must lie between {low} and {high}")
    for name in ("STEPS", "DRAWS", "PROBES"):
        utils.check(not isinstance(globals()[name], float), name, globals()[name], "must be a whole number")
    utils.check(RHO in (None, math.inf) or 1 <= RHO <= 1e9, "RHO", RHO, "must lie between 1 and 1e9, or be inf")
    if observed := observed_by():
        utils.check(len(observed) == 1, "MASK", " ".join(observed), "--blur and --enlarge are one at a time")
        draws = METHOD not in ("mmse", "langevin") and not COMPONENTS
        utils.check(draws, "METHOD", METHOD, f"must be one that draws, or ode, and --components 0, with {observed[0]}")
    if is_file(OUTPUT):
        many = FIGURES == "yes" or (DRAWS or 1) > 1 or COMPONENTS
        utils.check(not many, "OUTPUT", OUTPUT, "must be a folder for figures, draws and components")
    utils.check(SIGMA is None or 0 < SIGMA <= 2, "SIGMA", SIGMA, "is a standard deviation for pixels in [0, 1], as 25/255")
    utils.check(TEXTURE == 0 or 1e-6 <= TEXTURE <= 1, "TEXTURE", TEXTURE, "must be 0, or lie between 1e-6 and 1")
    utils.check(SDE in ("ve", "vp", "subvp"), "SDE", SDE, "must be ve, vp or subvp")
    utils.check(FIGURES in ("auto", "yes", "no"), "FIGURES", FIGURES, "must be auto, yes or no")
    utils.check(METHOD in methods(), "METHOD", METHOD, f"must be one of {', '.join(methods())}")
    walk = [name for name in methods() if name not in ("mmse", "langevin")]
    users = dict.fromkeys(("texture", "rho", "steps"), walk)
    users["draws"] = [name for name, method in methods().items() if method.draws]
    users |= {"sde": ["euler", "heun"], "langevin_steps": ["langevin"], "langevin_step_size": ["langevin"]}
    for name, known in users.items():
        if METHOD not in known and globals()[name.upper()] != defaults[name]:
            raise ValueError(f"--{name.replace('_', '-')} has no meaning for --method {METHOD}, only for {', '.join(known)}")
    if METHOD not in walk:
        return
    if model.sigma_min == model.sigma_max:
        level = f"'{CHECKPOINT}' knows only {model.sigma_min:g}"
        raise ValueError(f"--method {METHOD} needs many noise levels, and {level}: use mmse or langevin")
    sde.noise_levels(model.sigma_max, model.sigma_min, STEPS or 20, RHO or 7.0)  # raises where RHO is too extreme


def main():
    device = utils.pick_device(DEVICE)
    model = load_model(utils.find(CHECKPOINT), device, utils.pick_bfloat16(PRECISION, device))
    check_constants(model)
    rows, shown, failed, refused, count, own = [], [], [], [], 0, False
    with tqdm(desc=METHOD, unit="px", unit_scale=True, leave=False) as bar:
        jobs = read_jobs(model, device, bar.write, failed, refused)
        if is_file(OUTPUT):
            jobs = list(itertools.islice(jobs, 2))
            check_output(jobs)
        for batch in batches(jobs):
            asked = FIGURES == "yes" or (FIGURES == "auto" and batch[0].picture.builtin and not is_file(OUTPUT))
            filmed = max(0, min(SHOWN - len(shown), len(batch))) * asked
            bar.total = (bar.total or 0) + sum(np.multiply(work(batch[0]), (len(batch), sum(job.unsure for job in batch))))
            for job in carry_out(model, batch, device, filmed, bar, refused):
                own |= not job.picture.builtin
                if not job.picture.builtin:
                    bar.write(f"wrote {' '.join(map(str, job.written))}")
                rows, count = rows + job.rows(), count + 1
                if job.frames:
                    shown.append(job)
                else:
                    job.results.clear()  # before the next picture is read
    if refused and not rows:
        raise ValueError(refused[0][1])
    for name, error in refused:
        print(f"'{name}' is left out: {error}")
    print(utils.table((rows if own or count <= LISTED else []) + (utils.means(rows, "method", "picture") if count > 1 else [])))
    if shown:
        owner = owner_of(INPUT)
        path = Path(OUTPUT, utils.free_name(OUTPUT, f"{Path(INPUT[0]).stem[:45]}_{METHOD}", [".jpg", ".gif"], owner) + ".jpg")
        show(shown, path)
        for suffix in (".jpg", ".gif"):
            utils.remember(path.with_suffix(suffix), owner)
        print(f"wrote the results, '{path}' and '{path.with_suffix('.gif')}' to '{OUTPUT}'")
    if own and methods()[METHOD].draws:
        least = "what --method mmse gives" if is_file(OUTPUT) else "the mean of the draws" if observed_by() else "mmse"
        print(f"{least} has the least error, for measurements; a draw ({METHOD}) looks natural, its finest texture is invented")
    if failed or refused:
        sys.exit(1)


if __name__ == "__main__":
    utils.run_script(main, globals(), positional="INPUT")

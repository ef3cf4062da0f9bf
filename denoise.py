"""Denoise pictures with a trained score network: in one step, or back along the reverse-time SDE.

    python denoise.py                                   # five photographs, made noisy, with the shipped network
    python denoise.py --input photo.jpg                 # your own noisy picture: its noise level is estimated
    python denoise.py --input cifar10 --count 1000 --method mmse
    python denoise.py --help                            # every constant below is an option

Prints a table and writes the denoised pictures, a figure, an animation, and the frames on the way.
"""

import functools
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import sde
import utils
from model import load_model

# -----------------------------------------------------------------------------
# pictures
INPUT = "samples"  # "samples" (five photographs), "cifar10" (its test images), or a path: image, .npy, or folder of them
COUNT = 1000  # at most so many
DATA_DIR = "data"  # folder that holds CIFAR-10, or gets it
OUTPUT = "output"  # folder for all that is written
# noise
SIGMA = None  # standard deviation for pixels in [0, 1]; none: 0.1 where noise is added, else estimated from the picture
ADD_NOISE = False  # add noise to a path's pictures too, as is always done to "samples" and "cifar10"
# method
CHECKPOINT = "checkpoints/score_cifar10.pt"  # written by train_score.py
METHOD = "sde"  # "mmse" (least error, one call), "sde" (a draw, natural texture), "ode" (no draw, sharp); see METHODS for more
STEPS = None  # noise levels from sigma down to the lowest trained one; none: as many as the method needs for the right law
RHO = 7.0  # they are even in sigma^(1 / RHO); math.inf: in log sigma
TEXTURE = 1.0  # 1 follows the SDE to its end; less stops early, at sigma^(1 - TEXTURE) lowest^TEXTURE; 0 is "mmse"
SDE = "ve"  # the process of "euler" and "heun": "ve", "vp" or "subvp"
LANGEVIN_STEPS = 100  # updates of "langevin", the recipe this project starts from
LANGEVIN_STEP_SIZE = 1e-4  # of each, made for sigma 0.1; the temperature is sigma^2
# run
DRAWS = 2  # draws of each picture, by the methods that draw
SEED = 0  # of the noise that is added
DRAW_SEED = 0  # of the draws, with the noisy picture itself: the same picture gets the same draws in any company
DEVICE = "auto"  # "auto" (GPU if there is one), "cpu", "cuda", "cuda:1"
PRECISION = "auto"  # of the convolutions: "bfloat16", "float32", or "auto" (bfloat16 where the hardware has it)
BATCH_PIXELS = 2**18  # pixels that go through the network at a time: many small pictures, or a tile of a large one
SHOWN = 2  # pictures in the figure, the animation and the frames
SAVE_FRAMES = True  # write states and estimates of these pictures as PNG, in OUTPUT/frames
# -----------------------------------------------------------------------------


def methods():
    """Return by name: the sampler, the noise levels it needs for draws of the right law, its calls a level, whether it draws."""
    process = {"ve": sde.VE, "vp": sde.VP, "subvp": sde.SubVP}[SDE]()
    recipe = functools.partial(langevin, steps=LANGEVIN_STEPS, step_size=LANGEVIN_STEP_SIZE)
    return {
        "mmse": (sde.adams, 1, 1, False),  # E[x0 | y]: one level is one step
        "sde": (sde.adams, 20, 1, True),  # the reverse-time SDE, second order
        "ode": (functools.partial(sde.adams, eta=0.0), 20, 1, False),  # the probability-flow ODE, second order
        "euler": (functools.partial(sde.reverse_sde, sde=process), 100, 1, True),  # the reverse-time SDE of the textbook
        "heun": (functools.partial(sde.probability_flow_ode, sde=process), 20, 2, False),  # and its probability-flow ODE
        "ancestral": (sde.ancestral, 100, 1, True),
        "pc": (sde.predictor_corrector, 50, 2, True),
        "annealed": (sde.annealed_langevin, 100, 1, True),
        "langevin": (recipe, 1, LANGEVIN_STEPS, True),  # the original recipe; forgets the picture if it runs on
    }


def langevin(denoiser, y, levels, steps, step_size, noise):
    return sde.langevin(denoiser, y, levels[0], steps, step_size, noise=noise)


@dataclass
class Job:
    """What a picture goes through; images are (3, H, W), on the CPU, and not clipped."""

    name: str
    y: torch.Tensor  # the noisy picture
    x0: torch.Tensor | None  # the clean one, where it is known
    levels: torch.Tensor  # falling noise levels, from that of y
    results: dict = field(default_factory=dict)  # method: [image, network calls, seconds], an image for each draw (N, 3, H, W)
    frames: list = field(default_factory=list)  # (sigma, state, estimate of x0) of every network call

    @property
    def sigma(self):
        return self.levels[0].item()

    def seed(self, draw):
        """Return the seed of a draw: of the noisy pixels, DRAW_SEED and the number of the draw, not of a place in a list."""
        return zlib.crc32(self.y.permute(1, 2, 0).contiguous().numpy().tobytes(), (DRAW_SEED + draw) % 2**32)

    def rows(self):
        """Return the rows of the table: a method's mean over its draws, and the mean of the draws; no PSNR without the truth."""
        results = {"noisy": [self.y[None], 0, 0.0]} | self.results
        if DRAWS > 1 and len(results[METHOD][0]) > 1:
            images, calls, seconds = results[METHOD]
            results[f"mean of {DRAWS}"] = [images.mean(0, keepdim=True), DRAWS * calls, DRAWS * seconds]
        rows = []
        for method, (images, calls, seconds) in results.items():
            row = {"picture": self.name, "sigma": self.sigma, "method": method}
            if self.x0 is not None:
                x0 = self.x0.expand_as(images)
                row |= {"PSNR dB": utils.psnr(images, x0).mean().item(), "SSIM": utils.ssim(images, x0).mean()}
            rows.append(row | {"calls": calls, "seconds": seconds})
        return rows


def read_jobs(model):
    """Return a job for each picture, with its noise level: the one added, the one given, or an estimate."""
    found = utils.read_images(INPUT, DATA_DIR)
    names, images = zip(*found[:COUNT])
    added = (SIGMA or 0.1) if ADD_NOISE or INPUT in ("samples", "cifar10") else None
    noisy = utils.add_noise(images, added, SEED) if added else images
    words = f"noise of standard deviation {added:g} added" if added else "noise already in them"
    print(f"{len(images)} of {len(found)} pictures from {INPUT}, {words}; {METHOD} with {CHECKPOINT}")
    jobs = []
    for name, image, y in zip(names, images, noisy):
        sigma = added or SIGMA
        if sigma is None:
            sigma = utils.estimate_sigma(y)
            print(
                f"{name}: noise level estimated at {sigma:.4f}"
                + f", taken as the lowest trained, {model.sigma_min:g}" * (sigma < model.sigma_min)
            )
            sigma = max(sigma, model.sigma_min)
        if not model.sigma_min <= sigma <= model.sigma_max:
            trained = f"the range {model.sigma_min:g} to {model.sigma_max:g} that '{CHECKPOINT}' was trained on"
            raise ValueError(f"noise level {sigma:g} of '{name}' is outside {trained}")
        y, x0 = (torch.from_numpy(array).permute(2, 0, 1) for array in (y, image))
        levels = sde.noise_levels(sigma, sigma * (model.sigma_min / sigma) ** TEXTURE, STEPS or methods()[METHOD][1], RHO)
        jobs.append(Job(name, y, x0 if added else None, levels))
    return jobs


def batches(jobs):
    """Yield lists of jobs that share their size and noise level, at most BATCH_PIXELS pixels together."""
    groups = {}
    for job in jobs:
        groups.setdefault((job.y.shape, job.sigma), []).append(job)
    for (shape, _), group in groups.items():
        size = max(1, BATCH_PIXELS // (shape[1] * shape[2]))
        yield from (group[k : k + size] for k in range(0, len(group), size))


def denoise(model, jobs, device, shown, bar):
    """Give each job its one-step estimate and its draws; keep the frames of the first draw of the first `shown` jobs."""
    y, levels = torch.stack([job.y for job in jobs]).to(device), jobs[0].levels
    sampler, _, _, draws = methods()[METHOD]
    passes = [("mmse", sde.adams, levels[:1], 0)] * (METHOD != "mmse")
    passes += [(METHOD, sampler, levels, draw) for draw in range(DRAWS if draws else 1)]
    for method, sampler, levels, draw in passes:
        filmed = shown if method == METHOD and draw == 0 else 0
        film = utils.Film(utils.tiled(model, BATCH_PIXELS, bar), filmed)
        start = time.perf_counter()
        images = sampler(film, y, levels, noise=sde.seeded_noise([job.seed(draw) for job in jobs], device)).cpu()
        seconds = (time.perf_counter() - start) / len(jobs)
        for job, image in zip(jobs, images):
            before = job.results.get(method, [image[:0], 0, 0.0])[0]
            job.results[method] = [torch.cat([before.view(-1, *image.shape), image[None]]), film.calls, seconds]
        for k, job in enumerate(jobs[:filmed]):
            job.frames = [(sigma, x[k].cpu(), denoised[k].cpu()) for sigma, x, denoised in film.frames]


def write(job):
    """Write the denoised picture, every draw of it; of a job with frames also these, as pictures and as a table of PSNR."""
    for method, (images, *_) in job.results.items():
        for k, image in enumerate(images):
            number = f"_{k + 1}" if len(images) > 1 else ""
            utils.save_image(Path(OUTPUT, f"{job.name}_{method}{number}.png"), image)
    rows = []
    for call, (sigma, state, estimate) in enumerate(job.frames):
        rows.append({"call": call, "sigma": f"{sigma:.6g}"})
        for name, image in (("state", state), ("estimate", estimate)):
            if SAVE_FRAMES:
                utils.save_image(Path(OUTPUT, "frames", f"{job.name}_{METHOD}", f"{call:03}_{name}_{sigma:.4f}.png"), image)
            if job.x0 is not None:
                rows[-1][f"psnr_{name}"] = f"{utils.psnr(image[None], job.x0[None]).item():.4f}"
    if rows:
        utils.save_csv(Path(OUTPUT, f"{job.name}_{METHOD}.csv"), rows)


def show(jobs, path):
    """Draw each picture and its middle, enlarged: noisy, on the way, one step, the results, clean; and animate the frames."""
    grid = []
    for job in jobs:
        images, caption = job.results[METHOD][0], lambda image, job=job: "" if job.x0 is None else f"{psnr_of(image, job):.2f} dB"
        sigma, state, _ = job.frames[len(job.frames) // 2]
        panels = [("noisy", job.y, f"$\\sigma$ = {job.sigma:.3g}"), ("a state on the way", state, f"$\\sigma$ = {sigma:.2g}")]
        panels += [("one step", job.results["mmse"][0][0], caption(job.results["mmse"][0][0]))] * (METHOD != "mmse")
        titles = ("a draw", "another draw") if len(images) > 1 else (METHOD,)
        panels += [(title, image, caption(image)) for title, image in zip(titles, images)]
        grid.append(panels + ([("clean", job.x0, "")] if job.x0 is not None else []))
    utils.plot_pictures(path, grid)
    utils.save_animation(path.with_suffix(".gif"), [job.frames for job in jobs])


def psnr_of(image, job):
    return utils.psnr(image[None], job.x0[None]).item()


def check_constants(model):
    for name in ("COUNT", "RHO", "LANGEVIN_STEPS", "LANGEVIN_STEP_SIZE", "DRAWS", "BATCH_PIXELS"):
        utils.check(globals()[name] > 0, name, globals()[name], "must be positive")
    utils.check(STEPS is None or STEPS >= 1, "STEPS", STEPS, "must be at least 1")
    utils.check(SIGMA is None or SIGMA > 0, "SIGMA", SIGMA, "must be positive")
    utils.check(0 <= TEXTURE <= 1, "TEXTURE", TEXTURE, "must lie between 0 and 1")
    utils.check(SDE in ("ve", "vp", "subvp"), "SDE", SDE, "must be ve, vp or subvp")
    utils.check(METHOD in methods(), "METHOD", METHOD, f"must be one of {', '.join(methods())}")
    if METHOD not in ("mmse", "langevin") and model.sigma_min == model.sigma_max:
        level = f"'{CHECKPOINT}' knows only {model.sigma_min:g}"
        raise ValueError(f"--method {METHOD} needs many noise levels, and {level}: use mmse or langevin")


def main():
    device = utils.pick_device(DEVICE)
    model = load_model(utils.find(CHECKPOINT), device, utils.pick_bfloat16(PRECISION, device))
    check_constants(model)
    jobs = read_jobs(model)
    _, steps, calls, draws = methods()[METHOD]
    calls = (STEPS or steps) * calls * (DRAWS if draws else 1) + (METHOD != "mmse")
    with tqdm(total=calls * sum(job.y[0].numel() for job in jobs), desc=METHOD, unit="px", unit_scale=True, leave=False) as bar:
        for batch in batches(jobs):
            denoise(model, batch, device, sum(job in jobs[:SHOWN] for job in batch), bar)
            for job in batch:
                write(job)
    rows = [row for job in jobs for row in job.rows()]
    if len(jobs) > 1:
        rows = rows * (len(jobs) <= 16) + utils.means(rows, "method", picture=f"mean of {len(jobs)}")
    print(utils.table(rows))
    path = Path(OUTPUT, f"{Path(INPUT).stem}_{METHOD}.jpg")
    show(jobs[:SHOWN], path)
    print(f"wrote the results, '{path}' and '{path.with_suffix('.gif')}' to '{OUTPUT}'")


if __name__ == "__main__":
    utils.run_script(main, globals())

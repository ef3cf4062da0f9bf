"""Print the tables of tests/README.md and make their figures.

python tests/benchmark.py                       # classical denoisers, the recipe, the U-Net
python tests/benchmark.py --table levels        # every noise level, and bits per dimension
python tests/benchmark.py --table noise         # noise levels found
python tests/benchmark.py --table files         # images that went through lossy files
python tests/benchmark.py --table grey          # grey images, beside classical denoisers
python tests/benchmark.py --table expected      # PSNR expected without the truth
python tests/benchmark.py --table observations  # incomplete images, beside other methods
python tests/benchmark.py --table photographs   # both networks, in colour and grey
python tests/benchmark.py --table speed         # of one step, a sample, a noise level
python tests/benchmark.py --help                # every constant below is an option
"""

import math
import sys
import time
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import photographs

import denoise
import observations
import sde
import utils
from model import load_model
from observations import in_batches, mean_and_error, samples

# -----------------------------------------------------------------------------
TABLE = "results"  # one of those above
INPUT = "auto"  # "cifar10" (test images), "photographs" (scikit-image's), a path; "auto": of TABLE
COUNT = 1000  # so many images of INPUT
CROP = 128  # side in pixels of the middle of each image, in all tables but noise and photographs
TRAIN = "cifar10"  # images whose mean and covariance make the Wiener filter, or their path
CHECKPOINT = "checkpoints/score_cifar10.pt"  # the network for all noise levels
RECIPE = "checkpoints/cnn3_cifar10.pt"  # the recipe's network, trained at SIGMA
SECOND = "checkpoints/score_photographs.pt"  # the table photographs compares it with CHECKPOINT
SIGMA = 0.1  # noise level of the results, pixels in [0, 1]
STEPS = 20  # network calls of the reverse SDE and of the probability-flow ODE
STEP_SIZES = (1e-4, 5e-4, 2e-3)  # of the Langevin runs in the figure; the first is the recipe's
STUDY_COUNT = 50  # images of the figure of Langevin runs
LEVELS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0, 20.0)  # of the table levels
SIGMA_Y = 0.02  # noise level of the observations
OBSERVED_DRAWS = 100  # images of each observation for which samples are drawn, 248 calls; 0: none
MEGAPIXELS = (0.15, 1.0)  # sizes of the images in the table speed
FIGURES = "figures"  # folder of the figures
SEED = 0  # of the noise (numpy's default_rng) and, plus the image's number, of the samples
DEVICE = "auto"  # "auto" (GPU if there is one), "cpu", "cuda", "cuda:1"
PRECISION = "auto"  # "bfloat16", "float32", or "auto" (bfloat16 where the hardware has it)
# -----------------------------------------------------------------------------


def read_model(path, device, precision, sigmas=()):
    """Return a network and say on what it runs; raises ValueError unless it knows the levels."""
    bfloat16 = utils.pick_bfloat16(precision, device)
    model = load_model(path, device, bfloat16)
    print(f"{path} on {utils.hardware(device)} in {'bfloat16' if bfloat16 else 'float32'}")
    if any(not model.sigma_min <= sigma <= model.sigma_max for sigma in sigmas):
        trained = f"from {model.sigma_min:g} to {model.sigma_max:g}"
        raise ValueError(f"'{path}' was trained {trained}, not at all of {sigmas}")
    return model


def read_images(source, count, size):
    """Return the middle of images, (B, 3, H, W); raises ValueError if their sizes differ."""
    images = photographs.read(source, count, size)
    if len({image.shape for image in images}) > 1:
        raise ValueError(f"the images of '{source}' differ in size: give a smaller --crop")
    return torch.stack(images)


def noisy(x0, sigma, seed, device="cpu"):
    return denoise.add_noise(x0, sigma, np.random.default_rng(seed)).to(device)


def mean_psnr(images, x0):
    return utils.psnr(images.cpu(), x0.cpu()).mean().item()


def new_axes(title, xlabel, ylabel):
    figure, ((axes,),) = utils.new_figure(7.5, 4)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    return figure, axes


# -----------------------------------------------------------------------------
# Results
# -----------------------------------------------------------------------------


def results_table(device):
    """Print a row for each denoiser at SIGMA; the classical ones have their best strengths."""
    recipe = read_model(RECIPE, device, PRECISION, (SIGMA,))
    model = read_model(CHECKPOINT, device, PRECISION, (SIGMA,))
    x0 = read_images(INPUT, COUNT, CROP)
    y = noisy(x0, SIGMA, SEED, device)
    levels = sde.noise_levels(SIGMA, model.sigma_min, STEPS)

    def classical(method, strength):
        return lambda y, noise: photographs.each(method, y, SIGMA, strength)

    def langevin(steps):
        return lambda y, noise: sde.langevin(recipe, y, SIGMA, steps, STEP_SIZES[0], noise=noise)

    denoisers = [
        ("noisy", 0, lambda y, noise: y),
        ("total variation", 0, classical(photographs.total_variation, 0.7)),
        ("non-local means", 0, classical(photographs.non_local_means, 0.9)),
        ("recipe: three layers, Langevin, 100 steps", 100, langevin(100)),
        ("recipe: three layers, Langevin, 200 steps", 200, langevin(200)),
        ("three layers, one step", 1, lambda y, noise: recipe(y, SIGMA)),
        ("U-Net, reverse SDE, one sample", STEPS, lambda y, z: sde.adams(model, y, levels, 1.0, z)),
        ("U-Net, probability-flow ODE", STEPS, lambda y, z: sde.adams(model, y, levels, 0.0)),
        ("**U-Net, one step**", 1, lambda y, noise: model(y, SIGMA)),
    ]
    rows = []
    for label, calls, denoiser in tqdm(denoisers, leave=False, disable=None):
        images = in_batches(denoiser, y, SEED)
        mean, error = mean_and_error(utils.psnr(images, x0))
        row = {"denoiser": label, "PSNR dB": mean, "±": error}
        rows.append(row | {"SSIM": utils.ssim(images, x0).mean(), "network calls": calls})
    print(utils.table(rows))
    path = Path(FIGURES, "langevin.png")
    plot_langevin(path, recipe, model, y[:STUDY_COUNT], x0[:STUDY_COUNT].to(device))


def plot_langevin(path, recipe, model, y, x0, end=0.04):
    """Plot PSNR against step size times updates, where runs of all step sizes fall on one curve."""
    title = f"Plain Langevin denoises, then forgets ($\\sigma$ = {SIGMA:g}, {len(y)} images)"
    figure, axes = new_axes(title, "step size × updates", "PSNR, dB")
    runs = [(f"step size {size:g}", recipe, size, None) for size in STEP_SIZES]
    runs.append((f"step size {STEP_SIZES[0]:g}, no noise added", recipe, STEP_SIZES[0], 0.0))
    runs.append((f"step size {STEP_SIZES[0]:g}, U-Net", model, STEP_SIZES[0], None))
    styles = cycle([("tab:blue", "-", 4), ("tab:orange", "--", 2.5), ("black", ":", 1.5)])
    styles = [next(styles) for _ in STEP_SIZES] + [("tab:pink", "-", 1.5), ("tab:green", "-.", 1.5)]
    for run, (color, line, width) in zip(tqdm(runs, leave=False, disable=None), styles):
        label, network, size, temperature = run
        x, psnrs = y, []
        noise = utils.seeded_noise(range(SEED, SEED + len(y)), y.device)
        for _ in range(round(end / size)):
            psnrs.append(mean_psnr(x, x0))
            x = sde.langevin(network, x, SIGMA, 1, size, temperature, noise)
        label = f"{label}: best {max(psnrs):.2f} dB, after {np.argmax(psnrs)} updates"
        updates = size * np.arange(len(psnrs))
        axes.plot(updates, psnrs, line, color=color, linewidth=width, label=label)
    for label, network in (("three layers in one step", recipe), ("U-Net in one step", model)):
        value = mean_psnr(network(y, SIGMA), x0)
        axes.axhline(value, color="grey", linewidth=1)
        axes.text(end, value - 0.05, f"{label}: {value:.2f} dB", ha="right", va="top", fontsize=8)
    axes.legend(fontsize=8, loc="lower center")
    utils.save_figure(path, figure)


# -----------------------------------------------------------------------------
# Every noise level
# -----------------------------------------------------------------------------


def wiener_filter(images):
    """Return (y, sigma) -> E[x0 | y] for a Gaussian prior with the moments of images (N, C, H, W).

    The denoiser raises ValueError for images of another size.
    """
    values = images.flatten(1)
    mean = values.mean(0)
    covariance = ((values - mean).T @ (values - mean) / len(values)).double()
    unit = torch.eye(len(covariance), dtype=torch.float64)

    def denoiser(y, sigma):
        if y.shape[1:] != images.shape[1:]:
            sizes = f"{tuple(y.shape[1:])}, not {tuple(images.shape[1:])} as those trained on"
            raise ValueError(f"the images are {sizes}")
        factor = torch.linalg.cholesky(covariance + sigma**2 * unit)
        pull = torch.cholesky_solve((y.flatten(1) - mean).double().T, factor).T
        return (y - sigma**2 * pull.view_as(y)).to(y)

    return denoiser


def bits_per_dimension(levels, errors, x0):
    """Return a bound on -log2 p(x0) for each value of 8-bit images, in three parts: (3, B).

    The curve of errors, rounding at the lowest level, and the start at the highest:
        1/2 int |D - x0|^2 d(1/s^2) - log p(x0 | D) + KL(N(x0, s^2) | N(0.5, s^2))
    (Kingma et al. 2021, the bound in continuous time). Here p(x0 | D) is a Gaussian around D,
    integrated over bins of 1/255.
    levels: (L,), rising. errors: D - x0 at each, (L, B, C, H, W), float64 as x0 (B, C, H, W).
    """
    squared = (errors**2).mean((2, 3, 4))
    logs = CubicSpline(levels.log().numpy(), (squared / levels[:, None] ** 2).log().numpy())
    log_s = np.linspace(*levels[[0, -1]].log().tolist(), 1000)
    curve = torch.from_numpy(np.trapezoid(np.exp(logs(log_s)), log_s, axis=0))
    scale, far = (errors[0] ** 2).mean().sqrt(), errors[0].abs()
    lower, upper = (-far - 0.5 / 255) / scale, (-far + 0.5 / 255) / scale
    inside = torch.special.ndtr(upper) - torch.special.ndtr(lower)
    rounding = -inside.clamp(min=1e-300).log().mean((1, 2, 3))
    start = ((x0 - 0.5) ** 2).mean((1, 2, 3)) / (2 * levels[-1] ** 2)
    return torch.stack([curve, rounding, start]) / math.log(2)


def levels_table(device):
    """Print a row for each noise level, and bits per dimension, which follow from the errors."""
    model = read_model(CHECKPOINT, device, "float32", LEVELS)
    train = torch.from_numpy(np.stack(utils.training_images(TRAIN)))
    wiener = wiener_filter(train.permute(0, 3, 1, 2) / 255)
    x0, rows, errors = read_images(INPUT, COUNT, CROP), [], []
    for sigma in tqdm(LEVELS, leave=False, disable=None):
        y = noisy(x0, sigma, SEED)
        one_step = in_batches(lambda y, noise, s=sigma: model(y, s), y.to(device), SEED)
        errors.append((one_step - x0).double())
        row = {"sigma": f"{sigma:g}", "noisy, PSNR dB": mean_psnr(y, x0)}
        row["Wiener filter, PSNR dB"] = mean_psnr(wiener(y, sigma), x0)
        row["one step, PSNR dB"] = mean_psnr(one_step, x0)
        rows.append(row | {"SSIM": utils.ssim(one_step, x0).mean()})
    print(utils.table(rows))
    bits = bits_per_dimension(torch.tensor(LEVELS).double(), torch.stack(errors), x0.double())
    parts = " + ".join(f"{part:.3f}" for part in bits.mean(1))
    mean, error = mean_and_error(bits.sum(0))
    print(f"\nbits per dimension, at most: {mean:.3f} ± {error:.3f}", end=" ")
    print(f"(curve of errors + rounding + start: {parts})")
    plot_levels(Path(FIGURES, "levels.png"), rows, len(x0))


def plot_levels(path, rows, count):
    title = f"The U-Net in one step against the best for a Gaussian prior ({count} images)"
    labels = "noise level $\\sigma$, pixels in [0, 1]", "gain over the Wiener filter, dB"
    figure, axes = new_axes(title, *labels)
    sigmas = [float(row["sigma"]) for row in rows]
    gains = [row["one step, PSNR dB"] - row["Wiener filter, PSNR dB"] for row in rows]
    axes.semilogx(sigmas, gains, marker="o", color="tab:blue")
    axes.axhline(0, color="black", linewidth=1)
    axes.set_xticks(sigmas, [row["sigma"] for row in rows])
    axes.minorticks_off()
    utils.save_figure(path, figure)


# -----------------------------------------------------------------------------
# What the network expects of its error
# -----------------------------------------------------------------------------


def expected_errors(model, y, x0, sigma, probes=8):
    """Return the PSNR expected without the truth and the true one, unclipped: (2, B)."""

    def both(pair, noise):
        denoised, variance = sde.expected_error(model, pair[:, 0], sigma, probes, noise)
        errors = torch.stack([variance, (denoised - pair[:, 1]) ** 2], 1)
        return -10 * errors.mean((2, 3, 4)).log10()

    return in_batches(both, torch.stack([y, x0], 1), SEED).T


def expected_table(device):
    """Print a row for each noise level: the expected PSNR less the true one; plot both."""
    model, rows = read_model(CHECKPOINT, device, PRECISION), []
    x0 = read_images(INPUT, COUNT, CROP).to(device)
    figure, (panels,) = utils.new_figure(9, 3.4, 1, 3)
    for axes, sigma in zip(panels, (0.05, 0.1, 0.3)):
        found, true = expected_errors(model, noisy(x0.cpu(), sigma, SEED, device), x0, sigma)
        off = found - true
        row = {"sigma": f"{sigma:g}", "true PSNR dB": true.mean().item()}
        row |= {"expected less true": off.mean().item(), "its deviation": off.std().item()}
        row["correlation"] = torch.corrcoef(torch.stack([found, true]))[0, 1].item()
        rows.append(row)
        ends = min(found.min(), true.min()) - 0.5, max(found.max(), true.max()) + 0.5
        axes.plot(ends, ends, color="black", linewidth=1)
        axes.plot(true, found, ".", color="tab:blue", markersize=4)
        axes.set(xlim=ends, ylim=ends, box_aspect=1)
        axes.set(xlabel="true PSNR, dB", ylabel="expected PSNR, dB", title=f"$\\sigma$ = {sigma:g}")
        axes.grid(alpha=0.3)
    print(utils.table(rows))
    utils.save_figure(Path(FIGURES, "expected.png"), figure)
    plot_uncertainty(Path(FIGURES, "uncertainty.png"), model, x0[:4])
    plot_components(Path(FIGURES, "components.png"), model, x0[:1])


def plot_uncertainty(path, model, x0, count=64, probes=256):
    """Show where images are uncertain: by the Jacobian, by the spread of samples, and the error."""
    y = noisy(x0.cpu(), SIGMA, SEED, x0.device)
    noise = utils.seeded_noise(range(SEED, SEED + len(x0)), x0.device)
    denoised, variance = sde.expected_error(model, y, SIGMA, probes, noise)
    levels = sde.noise_levels(SIGMA, model.sigma_min, STEPS)
    drawn = samples(lambda y, z: sde.adams(model, y, levels, noise=z), y, SEED, count)
    squares = variance.clamp(min=0).cpu(), drawn.var(0), ((denoised - x0) ** 2).cpu()
    maps = [square.mean(1).sqrt() for square in squares]
    names = "noisy", "one step", "deviation, Jacobian", f"of {count} samples", "error of one step"
    figure, axes = utils.new_figure(8.4, 1.5 * len(x0) + 0.2, len(x0), len(names))
    for k, line in enumerate(axes):
        shown = [utils.to_array(y[k]), utils.to_array(denoised[k]), *(image[k] for image in maps)]
        for panel, image, name in zip(line, shown, names):
            top = maps[0].quantile(0.995).item()
            heatmap = panel.imshow(image, cmap="magma", vmin=0, vmax=top, interpolation="nearest")
            panel.set_axis_off()
            panel.set_title("" if k else name, fontsize=9)
    figure.colorbar(heatmap, ax=axes, shrink=0.6, extend="max")
    utils.save_figure(path, figure)


def plot_components(path, model, x0, sigma=0.6, count=3):
    """Show the main directions of uncertainty, from -2 to 2 standard deviations, one a row.

    At the level sigma much of an image is uncertain.
    """
    y = noisy(x0.cpu(), sigma, SEED, x0.device)
    noise = utils.seeded_noise([SEED], x0.device)
    variances, directions = sde.principal_components(model, y, sigma, count, noise=noise)
    middle, rows = model(y, sigma)[0], []
    for k, direction in enumerate(directions[0]):
        deviation = variances[0, k].clamp(min=0).sqrt()
        row = [(f"{t:+d} sd", middle + t * deviation * direction, "") for t in (-2, -1, 0, 1, 2)]
        row[2] = ("one step", middle, f"direction {k + 1}")
        rows.append([*row, ("direction", 0.5 + direction / direction.abs().max() / 2, "")])
    utils.plot_images(path, rows, detail=0)


# -----------------------------------------------------------------------------
# Photographs, observations, speed
# -----------------------------------------------------------------------------


def print_rows(function, model, images, sigmas, device):
    print(utils.table(photographs.rows(function, model, images, sigmas, SEED, device)))


def noise_table(device):
    model, images = read_model(CHECKPOINT, device, PRECISION), photographs.read(INPUT, COUNT)
    print_rows(photographs.level_rows, model, images, (0.01, 0.02, 0.1, 0.3), device)


def files_table(device):
    model, images = read_model(CHECKPOINT, device, PRECISION), photographs.read(INPUT, COUNT, CROP)
    print_rows(photographs.file_rows, model, images, (0.05, 0.1, 0.2), device)


def grey_table(device):
    model, images = read_model(CHECKPOINT, device, PRECISION), photographs.read(INPUT, COUNT, CROP)
    images = [photographs.grey(x0) for x0 in images]
    print_rows(photographs.classical_rows, model, images, (0.02, 0.05, 0.1, 0.2), device)


def photographs_table(device):
    models = {Path(p).stem: read_model(p, device, PRECISION) for p in (CHECKPOINT, SECOND)}
    colour = photographs.read(INPUT, COUNT)
    grey = [photographs.grey(x0) for x0 in colour]
    for kind, images in (("colour", colour), ("grey", grey)):
        print(f"\n{len(images)} photographs, {kind}")
        sigmas = (0.02, 0.05, 15 / 255, 25 / 255, 0.1, 50 / 255, 0.5)
        print_rows(photographs.network_rows, models, images, sigmas, device)


def observations_table(device):
    model = read_model(CHECKPOINT, device, PRECISION)
    x0 = read_images(INPUT, COUNT, CROP).to(device)
    for sigma_y, names in ((SIGMA_Y, observations.OBSERVATIONS), (0.1, observations.TYPICAL)):
        rows, panels = observations.compare(model, x0, sigma_y, SEED, OBSERVED_DRAWS, names)
        print(f"\nnoise of {sigma_y:g} in the observations\n{utils.table(rows)}", flush=True)
        if names is observations.OBSERVATIONS:
            utils.plot_images(Path(FIGURES, "observations.png"), panels, truth=True, detail=0)


def seconds_of(device, function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def speed_table(device):
    """Print how long one step, a sample, and finding the noise level of a photograph take."""
    model = read_model(CHECKPOINT, device, PRECISION)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    levels = sde.noise_levels(SIGMA, model.sigma_min, STEPS)
    photograph = photographs.read("photographs", 1)[0].tile(1, 10, 1)[:, :1000]
    names = "one step", f"a sample, {STEPS} calls", "its noise level"
    rows = [{"of one image": name} for name in names]
    photographs.in_one_step(model, photograph[None, :, :32].to(device), SIGMA)  # takes longer
    for size in MEGAPIXELS:
        width = round(1000 * size)
        wide = photograph.tile(1, 1, 1 + width // photograph.shape[2])[None, ..., :width]
        y = noisy(wide, SIGMA, SEED, device)
        calls = (
            (photographs.in_one_step, model, y, SIGMA),
            (sde.adams, utils.tiled(model), y, levels),
            (photographs.level_found, model, y),
        )
        for row, call in zip(rows, calls):
            row[f"seconds at {size:g} megapixels"] = seconds_of(device, *call)
    print(utils.table(rows))


# -----------------------------------------------------------------------------

TABLES = {  # and the images that each takes unless told otherwise
    "results": (results_table, "cifar10"),
    "levels": (levels_table, "cifar10"),
    "noise": (noise_table, "cifar10"),
    "files": (files_table, "photographs"),
    "grey": (grey_table, "photographs"),
    "expected": (expected_table, "cifar10"),
    "observations": (observations_table, "cifar10"),
    "photographs": (photographs_table, "photographs"),
    "speed": (speed_table, "cifar10"),
}


@torch.no_grad()
def main():
    global INPUT
    utils.check(TABLE in TABLES, "TABLE", TABLE, f"must be one of {', '.join(TABLES)}")
    table, usual = TABLES[TABLE]
    INPUT = usual if INPUT == "auto" else INPUT
    table(utils.pick_device(DEVICE))


if __name__ == "__main__":
    utils.run_script(main, globals())

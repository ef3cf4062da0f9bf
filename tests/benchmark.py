"""Print the tables of tests/README.md and make their figures.

python tests/benchmark.py                       # classical denoisers, the recipe, the U-Net
python tests/benchmark.py --table levels        # every noise level, and bits per dimension
python tests/benchmark.py --table noise         # noise levels found
python tests/benchmark.py --table files         # images that went through lossy files
python tests/benchmark.py --table grey          # grey images, beside classical denoisers
python tests/benchmark.py --table expected      # PSNR expected without the truth
python tests/benchmark.py --table observations  # incomplete images, beside other methods
python tests/benchmark.py --table photographs   # both networks, in colour and grey
python tests/benchmark.py --table speed         # of one network call, and of finding a level
python tests/benchmark.py --help                # every constant below is an option
"""

import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import photographs

import denoise
import observations
import sde
import utils
from model import load_model

# -----------------------------------------------------------------------------
TABLE = "results"  # one of those above
INPUT = (
    "auto"  # "cifar10" (test images), "photographs" (scikit-image's), a path; "auto": one of these
)
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
NOISE_LEVELS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)  # of the table noise
SIGMA_Y = 0.02  # noise level of the observations
OBSERVED_STEPS = 30  # network calls of a sample from an observation
OBSERVED_DRAWS = 8  # samples of each observation; 0: only the methods that give one image
MEGAPIXELS = (0.15, 1.0)  # sizes of the photographs in the table speed
SECONDS = 5.0  # for which a call is repeated, at least, where its time is measured
FIGURES = "figures"  # folder of the figures
SEED = 0  # of the noise (numpy's default_rng) and, plus the image's number, of the samples
DEVICE = "auto"  # "auto" (GPU if there is one), "cpu", "cuda", "cuda:1"
PRECISION = "auto"  # "bfloat16", "float32", or "auto" (bfloat16 where the hardware has it)
BATCH = 200  # images that go through a network together
# -----------------------------------------------------------------------------

BLUE, ORANGE, GREEN, RED, PINK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"


def read_crops(source, count, size):
    """Return the middle of images, (B, 3, H, W); raises ValueError if their sizes differ."""
    crops = [utils.crop(x0, size) for x0 in photographs.read(source, count)]
    shapes = {tuple(crop.shape[1:]) for crop in crops}
    if len(shapes) > 1:
        raise ValueError(
            f"the images of '{source}' differ in size: {shapes}; give a smaller --crop"
        )
    return torch.stack(crops)


def crops(count=None):
    return read_crops(INPUT, count or COUNT, CROP)


def read_model(path, device, precision, sigmas=()):
    """Return a network and say on what it runs; raises ValueError unless it knows the levels."""
    bfloat16 = utils.pick_bfloat16(precision, device)
    model = load_model(path, device, bfloat16)
    print(f"{path} on {utils.hardware(device)} in {'bfloat16' if bfloat16 else 'float32'}")
    if any(not model.sigma_min <= sigma <= model.sigma_max for sigma in sigmas):
        trained = f"from {model.sigma_min:g} to {model.sigma_max:g}"
        raise ValueError(f"'{path}' was trained {trained}, not at all of {sigmas}")
    return model


def noisy(x0, sigma):
    return denoise.add_noise(x0, sigma, np.random.default_rng(SEED))


def in_batches(function, y, device):
    """Return function(part, noise) of all parts of y, on the CPU; a seed for each image."""
    results = []
    for first in range(0, len(y), BATCH):
        part = y[first : first + BATCH].to(device)
        seeds = range(SEED + first, SEED + first + len(part))
        results.append(function(part, utils.seeded_noise(seeds, device)).cpu())
    return torch.cat(results)


def watched(denoiser, note):
    """Return the denoiser, which first calls note(x) with its input."""

    def asked(x, sigma):
        note(x)
        return denoiser(x, sigma)

    return asked


def new_axes(title, xlabel, ylabel):
    figure, ((axes,),) = utils.new_figure(7.5, 4)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    return figure, axes


# -----------------------------------------------------------------------------
# Results
# -----------------------------------------------------------------------------


def one_by_one(function, **options):
    """Return (y, noise) -> images (B, 3, H, W) from a function of one array (H, W, 3)."""

    def denoiser(y, noise):
        arrays = y.permute(0, 2, 3, 1).double().cpu().numpy()
        images = [function(array, channel_axis=-1, **options) for array in arrays]
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

    return denoiser


def recipe_of(network, steps):
    return lambda y, noise: sde.langevin(network, y, SIGMA, steps, STEP_SIZES[0], noise=noise)


def results_table(device):
    """Print a row for each denoiser at SIGMA; scikit-image's have their best strengths."""
    recipe = read_model(RECIPE, device, PRECISION, (SIGMA,))
    model = read_model(CHECKPOINT, device, PRECISION, (SIGMA,))
    x0 = crops()
    y = noisy(x0, SIGMA)
    levels = sde.noise_levels(SIGMA, model.sigma_min, STEPS)
    patches = {"patch_size": 5, "patch_distance": 5, "fast_mode": False}
    nl_means = one_by_one(denoise_nl_means, h=0.9 * SIGMA, sigma=SIGMA, **patches)
    denoisers = [
        ("noisy", 0, lambda y, noise: y),
        ("total variation", 0, one_by_one(denoise_tv_chambolle, weight=0.7 * SIGMA)),
        ("non-local means", 0, nl_means),
        ("recipe: three layers, Langevin, 100 steps", 100, recipe_of(recipe, 100)),
        ("recipe: three layers, Langevin, 200 steps", 200, recipe_of(recipe, 200)),
        ("three layers, one step", 1, lambda y, noise: recipe(y, SIGMA)),
        ("U-Net, reverse SDE, one sample", STEPS, lambda y, z: sde.adams(model, y, levels, 1.0, z)),
        ("U-Net, probability-flow ODE", STEPS, lambda y, z: sde.adams(model, y, levels, 0.0)),
        ("**U-Net, one step**", 1, lambda y, noise: model(y, SIGMA)),
    ]
    rows = []
    for label, calls, denoiser in tqdm(denoisers, leave=False, disable=None):
        images = in_batches(denoiser, y, device)
        psnr = utils.psnr(images, x0)
        row = {"denoiser": label, "PSNR dB": psnr.mean().item(), "±": standard_error(psnr)}
        rows.append(row | {"SSIM": utils.ssim(images, x0).mean(), "network calls": calls})
    print(utils.table(rows))
    few = [images[:STUDY_COUNT].to(device) for images in (y, x0)]
    plot_langevin(Path(FIGURES, "langevin.png"), recipe, model, *few)


def standard_error(values):
    return values.std().item() / math.sqrt(len(values))


def plot_langevin(path, recipe, model, y, x0, end=0.04):
    """Plot PSNR against step size times updates, where runs of all step sizes fall on one curve."""
    title = (
        f"Plain Langevin denoises, then forgets the image ($\\sigma$ = {SIGMA:g}, {len(y)} images)"
    )
    figure, axes = new_axes(title, "step size × updates", "PSNR, dB")
    runs = []
    for k, size in enumerate(STEP_SIZES):
        style = {"color": (BLUE, ORANGE, "black")[k % 3], "linestyle": ("-", "--", ":")[k % 3]}
        style["linewidth"] = (4, 2.5, 1.5)[k % 3]
        runs.append((f"step size {size:g}", recipe, size, None, style))
    first = f"step size {STEP_SIZES[0]:g}"
    runs.append((f"{first}, no noise added", recipe, STEP_SIZES[0], 0.0, {"color": PINK}))
    style = {"color": GREEN, "linestyle": "-."}
    runs.append((f"{first}, U-Net", model, STEP_SIZES[0], None, style))
    for label, network, size, temperature, style in tqdm(runs, leave=False, disable=None):
        states = []
        denoiser = watched(network, lambda x, states=states: states.append(mean_psnr(x, x0)))
        noise = utils.seeded_noise(range(SEED, SEED + len(y)), y.device)
        sde.langevin(denoiser, y, SIGMA, max(2, round(end / size)), size, temperature, noise)
        best = f"best {max(states):.2f} dB, after {np.argmax(states)} updates"
        axes.plot(size * np.arange(len(states)), states, label=f"{label}: {best}", **style)
    for label, network in (("three layers in one step", recipe), ("U-Net in one step", model)):
        value = mean_psnr(network(y, SIGMA), x0)
        axes.axhline(value, color="grey", linewidth=1)
        place = {"xytext": (0, -11), "textcoords": "offset points", "ha": "right", "fontsize": 8}
        axes.annotate(f"{label}: {value:.2f} dB", (end, value), **place)
    axes.legend(fontsize=8, loc="lower center")
    utils.save_figure(path, figure)


def mean_psnr(images, x0):
    return utils.psnr(images, x0).mean().item()


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
    model = read_model(CHECKPOINT, device, PRECISION, LEVELS)
    exact = load_model(CHECKPOINT, device)
    train = torch.from_numpy(np.stack(utils.training_images(TRAIN)))
    wiener = wiener_filter(train.permute(0, 3, 1, 2) / 255)
    x0, rows, errors = crops(), [], []
    for sigma in tqdm(LEVELS, leave=False, disable=None):
        y = noisy(x0, sigma)
        one_step = in_batches(lambda y, noise, s=sigma: model(y, s), y, device)
        float32 = in_batches(lambda y, noise, s=sigma: exact(y, s), y, device)
        errors.append((float32 - x0).double())
        psnr = mean_psnr(one_step, x0)
        row = {"sigma": f"{sigma:g}", "noisy, PSNR dB": mean_psnr(y, x0)}
        row |= {"Wiener filter, PSNR dB": mean_psnr(wiener(y, sigma), x0)}
        row |= {"one step, PSNR dB": psnr, "SSIM": utils.ssim(one_step, x0).mean()}
        rows.append(row | {"float32, gain": mean_psnr(float32, x0) - psnr})
    print(utils.table(rows))
    bits = bits_per_dimension(torch.tensor(LEVELS).double(), torch.stack(errors), x0.double())
    parts = " + ".join(f"{part:.3f}" for part in bits.mean(1))
    total = f"{bits.sum(0).mean():.3f} ± {standard_error(bits.sum(0)):.3f}"
    print(f"\nbits per dimension, at most: {total} (curve of errors + rounding + start: {parts})")
    plot_levels(Path(FIGURES, "levels.png"), rows, len(x0))


def plot_levels(path, rows, count):
    title = f"The U-Net in one step against the best for a Gaussian prior ({count} images)"
    labels = "noise level $\\sigma$, pixels in [0, 1]", "gain over the Wiener filter, dB"
    figure, axes = new_axes(title, *labels)
    sigmas = [float(row["sigma"]) for row in rows]
    gains = [row["one step, PSNR dB"] - row["Wiener filter, PSNR dB"] for row in rows]
    axes.plot(sigmas, gains, marker="o", color=BLUE)
    axes.axhline(0, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks(sigmas, [row["sigma"] for row in rows])
    axes.minorticks_off()
    utils.save_figure(path, figure)


# -----------------------------------------------------------------------------
# What the network expects of its error
# -----------------------------------------------------------------------------


def expected_errors(model, y, x0, sigma, device, probes=8):
    """Return the PSNR expected without the truth and the true one, unclipped: (2, B)."""

    def both(pair, noise):
        denoised, variance = sde.expected_error(model, pair[:, 0], sigma, probes, noise)
        errors = variance, (denoised - pair[:, 1]) ** 2
        return torch.stack([-10 * error.mean((1, 2, 3)).log10() for error in errors], 1)

    return in_batches(both, torch.stack([y, x0], 1), device).T


def expected_table(device):
    """Print a row for each noise level: the expected PSNR less the true one; plot both."""
    model, x0, rows = read_model(CHECKPOINT, device, PRECISION), crops(), []
    figure, (panels,) = utils.new_figure(9, 3.4, 1, 3)
    for axes, sigma in zip(panels, (0.05, 0.1, 0.3)):
        found, true = expected_errors(model, noisy(x0, sigma), x0, sigma, device)
        off = found - true
        row = {"sigma": f"{sigma:g}", "true PSNR dB": true.mean().item()}
        row |= {"expected less true": off.mean().item(), "its deviation": off.std().item()}
        row["correlation"] = torch.corrcoef(torch.stack([found, true]))[0, 1].item()
        rows.append(row)
        ends = min(found.min(), true.min()) - 0.5, max(found.max(), true.max()) + 0.5
        axes.plot(ends, ends, color="black", linewidth=1)
        axes.plot(true, found, ".", color=BLUE, markersize=4)
        axes.set(xlim=ends, ylim=ends, box_aspect=1)
        axes.set(xlabel="true PSNR, dB", ylabel="expected PSNR, dB", title=f"$\\sigma$ = {sigma:g}")
        axes.grid(alpha=0.3)
    print(utils.table(rows))
    utils.save_figure(Path(FIGURES, "expected.png"), figure)
    plot_uncertainty(Path(FIGURES, "uncertainty.png"), model, x0[:4], device)
    plot_components(Path(FIGURES, "components.png"), model, x0[:1], device)


def plot_uncertainty(path, model, x0, device, samples=64, probes=256):
    """Show where images are uncertain: by the Jacobian, by the spread of samples, and the error."""
    y = noisy(x0, SIGMA).to(device)
    noise = utils.seeded_noise(range(len(x0)), device)
    denoised, variance = sde.expected_error(model, y, SIGMA, probes, noise)
    levels = sde.noise_levels(SIGMA, model.sigma_min, STEPS)
    noise = utils.seeded_noise(range(len(x0) * samples), device)
    drawn = sde.adams(model, y.repeat(samples, 1, 1, 1), levels, noise=noise)
    spread = drawn.unflatten(0, (samples, len(x0))).var(0)
    squares = variance.clamp(min=0), spread, (denoised - x0.to(device)) ** 2
    maps = [square.mean(1).sqrt().cpu() for square in squares]
    names = "noisy", "one step", "deviation, Jacobian", f"of {samples} samples", "error of one step"
    figure, axes = utils.new_figure(8.4, 1.5 * len(x0) + 0.2, len(x0), len(names))
    top = maps[0].quantile(0.995).item()
    for k, line in enumerate(axes):
        for panel, image in zip(line, (y[k], denoised[k])):
            panel.imshow(utils.to_array(image), interpolation="nearest")
        for panel, image in zip(line[2:], maps):
            heatmap = panel.imshow(
                image[k], cmap="magma", vmin=0, vmax=top, interpolation="nearest"
            )
        for panel in line:
            panel.set_axis_off()
    for panel, name in zip(axes[0], names):
        panel.set_title(name, fontsize=9)
    figure.colorbar(heatmap, ax=axes, shrink=0.6, extend="max")
    correlation = torch.corrcoef(torch.stack([maps[0].flatten(), maps[1].flatten()]))[0, 1]
    means = f"means {maps[0].mean():.4f} and {maps[1].mean():.4f}"
    print(f"\nthe two maps of deviation: correlation {correlation:.3f}, {means}")
    utils.save_figure(path, figure)


def plot_components(path, model, x0, device, sigma=0.6, count=3):
    """Show the main directions of uncertainty, from -2 to 2 standard deviations, one a row.

    At the level sigma much of an image is uncertain.
    """
    y = noisy(x0, sigma).to(device)
    noise = utils.seeded_noise([SEED], device)
    variances, directions = sde.principal_components(model, y, sigma, count, noise=noise)
    middle, rows = model(y, sigma)[0], []
    for k, direction in enumerate(directions[0]):
        deviation = variances[0, k].clamp(min=0).sqrt()
        note, row = f"direction {k + 1}", []
        for t in (-2, -1, 0, 1, 2):
            title = f"{t:+d} sd" if t else "one step"
            row.append((title, middle + t * deviation * direction, "" if t else note))
        rows.append([*row, ("direction", 0.5 + direction / direction.abs().max() / 2, "")])
    utils.plot_images(path, rows, detail=0)


# -----------------------------------------------------------------------------
# Photographs, observations, speed
# -----------------------------------------------------------------------------


def noise_table(device):
    model, images = read_model(CHECKPOINT, device, PRECISION), read_whole()
    print(utils.table(photographs.level_rows(model, images, NOISE_LEVELS, SEED, device)))


def files_table(device):
    model = read_model(CHECKPOINT, device, PRECISION)
    print(utils.table(photographs.codec_rows(model, crops(), (0.05, 0.1, 0.2), SEED, device)))


def grey_table(device):
    model = read_model(CHECKPOINT, device, PRECISION)
    print(utils.table(photographs.grey_rows(model, crops(), (0.02, 0.05, 0.1, 0.2), SEED, device)))


def photographs_table(device):
    paths = CHECKPOINT, SECOND
    models = {Path(path).stem: read_model(path, device, PRECISION) for path in paths}
    sigmas = {f"{n}/255": n / 255 for n in (15, 25, 50)} | {f"{s:g}": s for s in (0.05, 0.1, 0.2)}
    print(utils.table(photographs.network_rows(models, read_whole(), sigmas, SEED, device)))


def read_whole():
    return photographs.read(INPUT, COUNT)


def observations_table(device):
    model, x0 = read_model(CHECKPOINT, device, PRECISION), crops().to(device)
    rows, panels = observations.compare(
        model, x0, SIGMA_Y, SEED, BATCH, OBSERVED_STEPS, OBSERVED_DRAWS
    )
    print(utils.table(rows))
    options = {"count": OBSERVED_DRAWS, "names": observations.TYPICAL}
    rows, _ = observations.compare(model, x0, 0.1, SEED, BATCH, OBSERVED_STEPS, **options)
    print(f"\nwith noise of 0.1 instead of {SIGMA_Y:g}\n{utils.table(rows)}")
    utils.plot_images(Path(FIGURES, "observations.png"), panels, True, detail=0)


def seconds_of(device, function, *arguments):
    """Return the shortest time of a call, repeated for at least SECONDS after a first one."""
    times = []
    while len(times) < 2 or sum(times[1:]) < SECONDS:
        start = time.perf_counter()
        function(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def speed_table(device):
    """Print how long one network call takes, and how long it takes to find a noise level."""
    model, rows = read_model(CHECKPOINT, device, PRECISION), []
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    shapes = {f"{BATCH} of 32 x 32": (BATCH, 3, 32, 32)}
    shapes |= {f"1 of {size:g} megapixels": (1, 3, 1000, round(1000 * size)) for size in MEGAPIXELS}
    for label, shape in shapes.items():
        y = noisy(torch.full(shape, 0.5), SIGMA).to(device)
        call = seconds_of(device, photographs.in_one_step, model, y, SIGMA)
        level = seconds_of(device, photographs.level_found, model, y) if len(y) == 1 else ""
        rows.append({"images": label, "one step, seconds": call, "noise level, seconds": level})
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

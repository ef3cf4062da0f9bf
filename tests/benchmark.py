"""Print the tables of the README and make its figures.

    python tests/benchmark.py                       # the recipe this project starts from, classical denoisers, the U-Net
    python tests/benchmark.py --table levels        # the U-Net at every noise level, beside a Gaussian's bound
    python tests/benchmark.py --table noise         # noise levels found in pictures
    python tests/benchmark.py --table files         # pictures that went through lossy files
    python tests/benchmark.py --table grey          # grey photographs, beside classical denoisers
    python tests/benchmark.py --table expected      # PSNR expected without the truth, beside the true one
    python tests/benchmark.py --table observations --count 100    # incomplete pictures, beside classical ways to complete them
    python tests/benchmark.py --table speed         # of training and sampling
    python tests/benchmark.py --help                # every constant below is an option

"results" also plots PSNR along Langevin runs (figures/langevin.png), "levels" the gain over the Wiener filter
(figures/levels.png), "expected" both PSNRs and what is uncertain (figures/expected.png, uncertainty.png, components.png),
"observations" draws (figures/observations.jpg).
"""

import functools
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import observations  # noqa: E402
import pictures  # noqa: E402
import sde  # noqa: E402
import train_score  # noqa: E402
import utils  # noqa: E402
from model import ScoreModel, load_model  # noqa: E402

# -----------------------------------------------------------------------------
TABLE = "results"  # "results", "levels", "noise", "files", "grey", "expected", "observations" or "speed"
INPUT = "cifar10"  # "cifar10" (its test images), "samples", or a path; all images of one size
DATA_DIR = "data"  # folder that holds CIFAR-10, or gets it
TRAIN = "cifar10"  # images whose mean and covariance make the Wiener filter: "cifar10", or a path
COUNT = 1000  # images of a table
STUDY_COUNT = 50  # images of the figure of Langevin runs
SIGMA = 0.1  # noise level of the results, pixels in [0, 1]
SIGMA_Y = 0.02  # of the observations
OBSERVED_STEPS = 30  # network calls of a draw from an observation
NOISE_LEVELS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)  # those to be found in pictures
LEVELS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0, 20.0)  # those of the table of noise levels
RECIPE = "checkpoints/cnn3_cifar10.pt"  # the recipe's network, trained at SIGMA
CHECKPOINT = "checkpoints/score_cifar10.pt"  # the network for all noise levels
STEP_SIZES = (1e-4, 5e-4, 2e-3)  # of the Langevin runs in the figure; the first is the recipe's
STEPS = 20  # network calls of the reverse SDE and of the probability-flow ODE
SEED = 0  # of the noise (numpy's default_rng) and, plus the image's number, of the draws
DEVICE = "auto"  # "auto" (GPU if there is one), "cpu", "cuda", "cuda:1"
PRECISION = "auto"  # of the network: "bfloat16", "float32", or "auto" (bfloat16 where the hardware has it)
BATCH = 200  # images that go through a network together
SECONDS = 5.0  # for which work is repeated, at least, where its speed is measured
# -----------------------------------------------------------------------------


def read_noisy(source, data_dir, count, sigma, seed, device):
    """Return y and x0, (B, 3, H, W), of the first `count` images of a source of images of one size."""
    images = [image for _, image in utils.read_images(source, data_dir)[:count]]
    noisy = utils.add_noise(images, sigma, seed)
    return tuple(torch.from_numpy(np.stack(part)).permute(0, 3, 1, 2).to(device) for part in (noisy, images))


def read_model(path, device, precision, sigmas=()):
    """Return the network of a checkpoint, and say on what it runs; raises ValueError unless it was trained at these levels."""
    bfloat16 = utils.pick_bfloat16(precision, device)
    model = load_model(utils.find(path), device, bfloat16)
    print(f"{path} on {utils.hardware(device)} in {'bfloat16' if bfloat16 else 'float32'}")
    if any(not model.sigma_min <= sigma <= model.sigma_max for sigma in sigmas):
        raise ValueError(f"'{path}' was trained from {model.sigma_min:g} to {model.sigma_max:g}, not at all of {sigmas}")
    return model


def quality(images, x0):
    """Return the mean PSNR with its standard error, and the mean SSIM, as columns of a table."""
    psnr = utils.psnr(images.cpu(), x0.cpu())
    return {"PSNR dB": psnr.mean().item(), "±": psnr.std().item() / math.sqrt(len(psnr)), "SSIM": utils.ssim(images, x0).mean()}


def watched(denoiser, note):
    """Return a denoiser that first calls note(x) with what it is asked about."""

    def asked(x, sigma):
        note(x)
        return denoiser(x, sigma)

    return asked


# -----------------------------------------------------------------------------
# Results
# -----------------------------------------------------------------------------


def one_by_one(denoiser):
    """Return (y, noise) -> images, (B, 3, H, W), from a denoiser of one (H, W, 3) array."""
    arrays = lambda y: y.permute(0, 2, 3, 1).double().cpu().numpy()  # noqa: E731
    return lambda y, noise: torch.from_numpy(np.stack([denoiser(array) for array in arrays(y)])).permute(0, 3, 1, 2)


def results_table(device):
    """Return a row for each denoiser at SIGMA on the same noisy images; scikit-image's have the strengths that are best here."""
    recipe, model = (read_model(path, device, PRECISION, (SIGMA,)) for path in (RECIPE, CHECKPOINT))
    y, x0 = read_noisy(INPUT, DATA_DIR, COUNT, SIGMA, SEED, device)
    levels = sde.noise_levels(SIGMA, model.sigma_min, STEPS)
    langevin = lambda steps: lambda y, noise: sde.langevin(recipe, y, SIGMA, steps, STEP_SIZES[0], noise=noise)  # noqa: E731
    nl_means = {"patch_size": 5, "patch_distance": 5, "h": 0.9 * SIGMA, "sigma": SIGMA, "fast_mode": False, "channel_axis": -1}
    rows = [
        ("noisy", 0, lambda y, noise: y),
        ("total variation", 0, one_by_one(lambda array: denoise_tv_chambolle(array, 0.7 * SIGMA, channel_axis=-1))),
        ("non-local means", 0, one_by_one(lambda array: denoise_nl_means(array, **nl_means))),
        ("recipe: three layers, Langevin, 100 steps", 100, langevin(100)),
        ("recipe: three layers, Langevin, 200 steps", 200, langevin(200)),
        ("three layers, one step", 1, lambda y, noise: recipe(y, SIGMA)),
        ("U-Net, reverse SDE, one draw", STEPS, lambda y, noise: sde.adams(model, y, levels, noise=noise)),
        ("U-Net, probability-flow ODE", STEPS, lambda y, noise: sde.adams(model, y, levels, eta=0.0)),
        ("**U-Net, one step**", 1, lambda y, noise: model(y, SIGMA)),
    ]
    table = []
    for label, calls, denoiser in tqdm(rows, leave=False):
        parts = []
        for k in range(0, len(y), BATCH):
            noise = utils.seeded_noise([SEED + i for i in range(k, min(k + BATCH, len(y)))], device)
            parts.append(denoiser(y[k : k + BATCH], noise).cpu())
        table.append({"denoiser": label, **quality(torch.cat(parts), x0), "network calls": calls})
    plot_langevin(Path("figures", "langevin.png"), recipe, model, y[:STUDY_COUNT], x0[:STUDY_COUNT])
    return table


def plot_langevin(path, recipe, model, y, x0, end=0.04):
    """Plot PSNR against step size times updates, up to `end`, where the curves of all step sizes fall on each other."""
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    styles = {"color": ["#0072B2", "#E69F00", "#000000"], "linestyle": ["-", "--", ":"], "linewidth": [4, 2.5, 1.5]}
    lines = [
        (f"step size {size:g}", recipe, size, None, {k: v[i % 3] for k, v in styles.items()}) for i, size in enumerate(STEP_SIZES)
    ]
    lines.append((f"step size {STEP_SIZES[0]:g}, no noise added", recipe, STEP_SIZES[0], 0.0, {"color": "#CC79A7"}))
    lines.append((f"step size {STEP_SIZES[0]:g}, U-Net", model, STEP_SIZES[0], None, {"color": "#009E73", "linestyle": "-."}))
    for label, network, size, temperature, style in tqdm(lines, leave=False):
        curve = []
        denoiser = watched(network, lambda x, curve=curve: curve.append(utils.psnr(x, x0).mean().item()))
        noise = utils.seeded_noise([SEED + i for i in range(len(y))], y.device)
        sde.langevin(denoiser, y, SIGMA, max(2, round(end / size)), size, temperature, noise)
        best = f"best {max(curve):.2f} dB, after {np.argmax(curve)} updates"
        axes.plot(size * np.arange(len(curve)), curve, label=f"{label}: {best}", **style)
    for label, network in (("three layers in one step", recipe), ("U-Net in one step", model)):
        value = utils.psnr(network(y, SIGMA), x0).mean().item()
        axes.axhline(value, color="grey", linewidth=1)
        axes.annotate(f"{label}: {value:.2f} dB", (end, value), (0, -11), textcoords="offset points", ha="right", fontsize=8)
    axes.set(xlabel="step size × updates", ylabel="PSNR, dB")
    title = f"Plain Langevin first denoises, then forgets the picture ($\\sigma$ = {SIGMA:g}, {len(y)} images)"
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower center")
    utils.save_figure(path, figure)


# -----------------------------------------------------------------------------
# Every noise level
# -----------------------------------------------------------------------------


def wiener_filter(images):
    """Return (y, sigma) -> E[x0 | y] for a Gaussian prior with the mean and covariance of uint8 images (N, 3, H, W).

    The denoiser raises ValueError for images of another size.
    """
    pixels = images.flatten(1)
    mean = torch.stack([part.double().sum(0) for part in pixels.split(1000)]).sum(0) / len(pixels) / 255
    centred = ((part / 255 - mean.float()) for part in pixels.split(1000))
    covariance = sum((part.T @ part).double() for part in centred) / len(pixels)

    def denoiser(y, sigma):
        if y.shape[1:] != images.shape[1:]:
            raise ValueError(f"images of {tuple(y.shape[1:])} do not match the training images of {tuple(images.shape[1:])}")
        noisy = covariance + sigma**2 * torch.eye(len(covariance), dtype=torch.float64, device=covariance.device)
        pull = torch.cholesky_solve((y.flatten(1) - mean).T, torch.linalg.cholesky(noisy)).T
        return (y - sigma**2 * pull.view_as(y)).float()

    return denoiser


def mirrored(denoiser):
    """Return the mean of a denoiser over an image and its mirror image, turned back."""
    return lambda y, sigma: (denoiser(y, sigma) + denoiser(y.flip(3), sigma).flip(3)) / 2


def levels_table(device):
    """Return a row for each noise level: the noise, the Wiener filter, and what precision and a mirror image change."""
    model = read_model(CHECKPOINT, device, PRECISION, LEVELS)
    exact = load_model(utils.find(CHECKPOINT), device)
    wiener = wiener_filter(utils.read_patches(TRAIN, DATA_DIR).to(device))
    rows = []
    for sigma in tqdm(LEVELS, leave=False):
        y, x0 = read_noisy(INPUT, DATA_DIR, COUNT, sigma, SEED, device)
        run = lambda network: torch.cat([network(part, sigma).cpu() for part in y.split(BATCH)])  # noqa: B023, E731
        found = {"noisy": y.cpu(), "Wiener filter": wiener(y, sigma).cpu(), "one step": run(model)}
        found |= {"float32": run(exact), "mirrored": run(mirrored(model))}
        means = {name: utils.psnr(images, x0.cpu()).mean().item() for name, images in found.items()}
        gains = {f"{name}, gain": means.pop(name) - means["one step"] for name in ("float32", "mirrored")}
        psnr = {f"{name}, PSNR dB": value for name, value in means.items()}
        rows.append({"sigma": f"{sigma:g}", **psnr, "one step, SSIM": utils.ssim(found["one step"], x0).mean(), **gains})
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")  # how many dB the network gains on the Wiener filter
    axes = figure.subplots()
    gains = [row["one step, PSNR dB"] - row["Wiener filter, PSNR dB"] for row in rows]
    axes.plot([float(row["sigma"]) for row in rows], gains, marker="o", color="#0072B2")
    axes.axhline(0, color="black", linewidth=1)
    axes.set(xscale="log", xlabel="noise level $\\sigma$, pixels in [0, 1]", ylabel="gain over the Wiener filter, dB")
    axes.set_xticks([float(row["sigma"]) for row in rows], [row["sigma"] for row in rows])
    axes.minorticks_off()
    axes.set_title(f"The U-Net in one step against the best for a Gaussian prior ({len(x0)} images)", fontsize=10)
    axes.grid(alpha=0.3)
    utils.save_figure(Path("figures", "levels.png"), figure)
    return rows


# -----------------------------------------------------------------------------
# Pictures
# -----------------------------------------------------------------------------


def first_images(device):
    return read_noisy(INPUT, DATA_DIR, COUNT, SIGMA, SEED, device)[1]


def noise_table(device):
    """Return rows of estimates over true levels: of single CIFAR-10 images, and of photographs."""
    model, x0 = read_model(CHECKPOINT, device, PRECISION), first_images(device)[:200]
    single = pictures.level_rows(model, x0, NOISE_LEVELS, SEED, model.sigma_min, 2 * max(NOISE_LEVELS))
    return single + pictures.photograph_rows(model, NOISE_LEVELS, SEED, device)


def files_table(device):
    return pictures.codec_rows(read_model(CHECKPOINT, device, PRECISION), (0.05, 0.1, 0.2), SEED, device=device)


def grey_table(device):
    return pictures.grey_rows(read_model(CHECKPOINT, device, PRECISION), (0.02, 0.05, 0.1, 0.2), SEED, device=device)


def expected_table(device):
    """Return a row for each noise level, and plot the expected PSNR over the true one."""
    model, x0, rows = read_model(CHECKPOINT, device, PRECISION), first_images(device), []
    figure = Figure(figsize=(7.5, 3), layout="constrained")
    for axes, sigma in zip(figure.subplots(1, 3), (0.05, 0.1, 0.3)):
        found, true = (psnr.cpu() for psnr in pictures.expected_errors(model, x0, sigma, SEED))
        rows.append(pictures.expected_row(found, true, sigma))
        axes.plot(true, found, ".", color="#0072B2", markersize=4)
        axes.axline((true.mean(), true.mean()), slope=1, color="black", linewidth=1)
        axes.set_title(f"$\\sigma$ = {sigma:g}", fontsize=10)
        axes.set(xlabel="true PSNR, dB", ylabel="expected PSNR, dB" if sigma == 0.05 else "", aspect="equal")
        axes.grid(alpha=0.3)
    utils.save_figure(Path("figures", "expected.png"), figure)
    plot_uncertainty(Path("figures", "uncertainty.png"), model, x0[:4])
    y = pictures.noisy(x0[:1], 0.6, SEED)  # a level at which much of an image is uncertain
    variances, directions = sde.principal_components(model, y, 0.6, 3, noise=utils.seeded_noise([SEED], device))
    utils.save_components(Path("figures", "components.png"), model(y, 0.6)[0], variances[0].clamp(min=0).sqrt(), directions[0])
    return rows


def observations_table(device):
    model, x0 = read_model(CHECKPOINT, device, PRECISION), first_images(device)
    rows, panels = observations.compare(model, x0, SIGMA_Y, SEED, BATCH, OBSERVED_STEPS)
    utils.plot_pictures(Path("output" if INPUT == "samples" else "figures", "observations.jpg"), panels, detail=0)
    return rows


def plot_uncertainty(path, model, x0, draws=64, probes=256):
    """Show for each image where it is uncertain: by the Jacobian, by the spread of draws, and the true error."""
    noise = utils.seeded_noise(range(len(x0) * draws), x0.device)
    y = pictures.noisy(x0, SIGMA, SEED)
    denoised, variance = sde.expected_error(model, y, SIGMA, probes, utils.seeded_noise(range(len(x0)), x0.device))
    levels = sde.noise_levels(SIGMA, model.sigma_min, STEPS)
    spread = sde.adams(model, y.repeat(draws, 1, 1, 1), levels, noise=noise).unflatten(0, (draws, len(x0))).std(0)
    figure = Figure(figsize=(7.5, 1.5 * len(x0) + 0.2), layout="constrained")
    names = ("noisy", "one step", "deviation, Jacobian", f"of {draws} draws", "error of one step")
    maps = [(v**2).mean(1).sqrt().cpu() for v in (variance.clamp(min=0).sqrt(), spread, denoised - x0)]
    for k, axes in enumerate(figure.subplots(len(x0), 5, squeeze=False)):
        for panel, name, image in zip(axes, names, (y[k], denoised[k], *(m[k] for m in maps))):
            options = {} if image.ndim == 3 else {"cmap": "magma", "vmin": 0, "vmax": maps[0][k].max().item()}
            panel.imshow(utils.to_array(image) if image.ndim == 3 else image, interpolation="nearest", **options)
            panel.set_title(name if k == 0 else "", fontsize=9)
            panel.set_axis_off()
    agreement = torch.corrcoef(torch.stack([maps[0].flatten(), maps[1].flatten()]))[0, 1]
    print(f"the two maps of deviation: correlation {agreement:.3f}, mean {maps[0].mean():.4f} and {maps[1].mean():.4f}")
    utils.save_figure(path, figure)


# -----------------------------------------------------------------------------
# Speed
# -----------------------------------------------------------------------------


def seconds_of(work, device, least):
    """Return the time of one call of `work`: the best of calls repeated for at least so many seconds, after a first one."""
    times = []
    while len(times) < 2 or sum(times) < least:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def operations(work):
    """Return the number of additions and multiplications in the convolutions and matrix products of one call."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def speed_table(device):
    """Return rows of images and operations a second: training (on a GPU compiled, too), network calls, and those of a sampler."""
    model = read_model(CHECKPOINT, device, PRECISION)
    y, t = torch.rand(BATCH, 3, 32, 32, device=device), train_score
    noise, grid = utils.seeded_noise(range(BATCH), device), sde.noise_levels(SIGMA, model.sigma_min, STEPS)
    images = torch.randint(256, (BATCH, 3, 32, 32), dtype=torch.uint8, device=device)
    law = functools.partial(t.noise_law, sigma_min=model.sigma_min, sigma_max=model.sigma_max, tails=t.TAILS)

    def training(compiled):
        trained = ScoreModel(**model.config, bfloat16=model.bfloat16).to(device)
        optimizers = t.make_optimizers(trained, t.OPTIMIZER, t.LR, t.WEIGHT_DECAY)
        run = t.Training("speed", trained, optimizers, len(images), BATCH, {}, compiled)
        return torch.enable_grad()(lambda: run.learn(t.make_batch(images, 0, BATCH, t.FLIP, law, SEED), 1.0, 1e-6, t.CLIP, t.EMA))

    works = [
        ("training", training(False), BATCH),
        ("network alone", lambda: [model(y, SIGMA) for _ in range(STEPS)], STEPS * BATCH),
        ("within `adams`", lambda: sde.adams(model, y, grid, noise=noise), STEPS * BATCH),
    ]
    each = {label: operations(work) / count / 1e9 for label, work, count in works}
    if device.type == "cuda":
        works.insert(1, ("training, compiled", training(True), BATCH))
        each["training, compiled"] = each["training"]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    rates = {label: count / seconds_of(work, device, SECONDS) for label, work, count in works}
    row = lambda label: {"work": label, "images/s": rates[label], "G operations an image": each[label]}  # noqa: E731
    return [row(label) | {"GFLOP/s": rates[label] * each[label]} for label in rates]


@torch.no_grad()
def main():
    every = (results_table, levels_table, noise_table, files_table, grey_table, expected_table, observations_table, speed_table)
    tables = {table.__name__.removesuffix("_table"): table for table in every}
    utils.check(TABLE in tables, "TABLE", TABLE, f"must be one of {', '.join(tables)}")
    print(utils.table(tables[TABLE](utils.pick_device(DEVICE))))


if __name__ == "__main__":
    utils.run_script(main, globals())

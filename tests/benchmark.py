"""Print the tables of the README and draw the figures of the studies.

    python tests/benchmark.py --input cifar10                   # the recipe this project starts from, and successors
    python tests/benchmark.py --input cifar10 --table levels    # the U-Net at every noise level, and a Gaussian's bound
    python tests/benchmark.py --input cifar10 --table cost      # speed and quality beside classical denoisers
    python tests/benchmark.py --help                            # every constant below is an option

"recipe" measures the original Langevin recipe with its three-layer network, and the U-Net in one step and along the
reverse-time SDE, on the same noisy images; then it draws two studies of the recipe: PSNR against the number of updates
(figures/langevin_steps.png), and against their step size (figures/langevin_step_size.png).

"levels" measures one step of the U-Net from the lowest noise level to the highest, beside the best that a Gaussian prior
can do: the Wiener filter of the mean and covariance of the training images (figures/levels.png).

"cost" relates the U-Net's quality, time, parameters and operations to those of denoisers from public packages, training
to the fastest convolution that this machine runs, and the samplers' loop to the bare network.
"""

import functools
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle, denoise_wavelet
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sde  # noqa: E402
import train_score  # noqa: E402
import utils  # noqa: E402
from model import ScoreModel, load_model  # noqa: E402

# -----------------------------------------------------------------------------
TABLE = "recipe"  # "recipe", "levels" or "cost"
INPUT = "cifar10"  # "cifar10" (its test images), "samples", or a path; all images of one size
DATA_DIR = "data"  # folder that holds CIFAR-10, or gets it
TRAIN = "cifar10"  # images whose mean and covariance make the Wiener filter: "cifar10", or a path
COUNT = 1000  # images of the tables of the recipe and of the noise levels
COST_COUNT = 50  # images of the table of costs
STUDY_COUNT = 50  # images of the recipe's two studies
SIGMA = 0.1  # noise level, pixels in [0, 1]
LEVELS = (0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)  # those of the table of noise levels
RECIPE = "checkpoints/cnn3_cifar10.pt"  # the recipe's network, trained at SIGMA
CHECKPOINT = "checkpoints/score_cifar10.pt"  # the network for all noise levels
STEP_SIZE = 1e-4  # of the recipe
STEP_SIZES = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3)  # of the study
STUDY_STEPS = 400  # Langevin updates followed in the studies
SDE_STEPS = 20  # network calls of the reverse SDE and of the probability-flow ODE
SEED = 0  # of the noise (numpy's default_rng) and, plus the image's number, of the draws
DEVICE = "auto"  # "auto" (GPU if there is one), "cpu", "cuda", "cuda:1"
PRECISION = "auto"  # of the convolutions: "bfloat16", "float32", or "auto" (bfloat16 where the hardware has it)
BATCH = 200  # images that go through a network together
SECONDS = 5.0  # for which the work is repeated, at least, where its speed is measured; a tenth for each convolution
# -----------------------------------------------------------------------------


def check_level(model, path, sigma):
    low, high = model.sigma_min, model.sigma_max
    if not low <= sigma <= high:
        raise ValueError(f"'{path}' was trained from {low:g} to {high:g}, not at sigma {sigma:g}")


def noisy_pairs(images, sigma, device, o):
    """Return y and x0, (B, 3, H, W), of a list of (H, W, 3) images."""
    noisy = utils.add_noise(images, sigma, o.seed)
    return tuple(torch.from_numpy(np.stack(part)).permute(0, 3, 1, 2).to(device) for part in (noisy, images))


def prepare(o, count):
    """Return the network, the first `count` images, the device and whether it runs in bfloat16; print all of this."""
    device = utils.pick_device(o.device)
    bfloat16 = utils.pick_bfloat16(o.precision, device)
    model = load_model(o.checkpoint, device, bfloat16)
    check_level(model, o.checkpoint, o.sigma)
    images = [image for _, image in utils.read_images(o.input, o.data_dir)[:count]]
    precision = "bfloat16" if bfloat16 else "float32"
    print(f"{len(images)} images of {o.input}, seed {o.seed}; {device} with {torch.get_num_threads()} threads, {precision}")
    return model, images, device, bfloat16


def batches(y, x0, o):
    """Yield parts of the noisy and clean images, and a seed for each image."""
    for k in range(0, len(y), o.batch):
        part = y[k : k + o.batch]
        yield part, x0[k : k + o.batch], [o.seed + k + i for i in range(len(part))]


def measure(label, calls, sampler, y, x0, o):
    """Print the mean PSNR of sampler(y, seeds) with its standard error, the mean SSIM, calls and time."""
    quality, seconds = [], 0.0
    for part, truth, seeds in tqdm(list(batches(y, x0, o)), desc=label, leave=False):
        start = time.perf_counter()
        result = sampler(part, seeds).cpu()  # waits for the GPU
        seconds += time.perf_counter() - start
        quality += zip(utils.psnr(result, truth.cpu()).tolist(), utils.ssim(result, truth))
    (psnr, ssim), error = np.mean(quality, axis=0), np.std(quality, axis=0)[0] / math.sqrt(len(y))
    print(f"{label:44}  {psnr:6.2f} +- {error:4.2f}  {ssim:5.3f}  {calls:5d}  {1000 * seconds / len(y):9.2f}")


def langevin_curve(model, y, x0, o, step_size, temperature=None):
    """Return the mean PSNR after 0, 1, ..., STUDY_STEPS Langevin updates, as an array."""
    total = torch.zeros(o.study_steps + 1, dtype=torch.float64, device=y.device)
    for part, truth, seeds in tqdm(list(batches(y, x0, o)), desc=f"Langevin, step size {step_size:g}", leave=False):
        curve = []
        callback = lambda step, x_t, *_, curve=curve, truth=truth: curve.append(utils.psnr(x_t, truth).sum())  # noqa: E731
        result = sde.langevin(model, part, o.sigma, o.study_steps, step_size, temperature, seeds, callback)
        total += torch.stack([*curve, utils.psnr(result, truth).sum()])
    return (total / len(y)).cpu().numpy()


def plot_steps(path, curves, levels, count, o):
    """Draw PSNR against the number of Langevin updates. curves: {label: array}; levels: {label: PSNR}."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, curve in curves.items():
        best = curve.argmax()
        axes.plot(curve, label=f"{label}; best {curve[best]:.2f} dB after {best}")
    for (label, level), style in zip(levels.items(), ("--", ":")):
        axes.axhline(level, color="black", linestyle=style, linewidth=1, label=f"{label}: {level:.2f} dB")
    axes.set(xlabel=f"Langevin updates of step size {o.step_size:g}", ylabel="PSNR, dB, mean over images")
    axes.set_title(f"Plain Langevin first denoises, then forgets the image ($\\sigma$ = {o.sigma:g}, {count} images)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    utils.save_figure(path, figure)


def plot_step_sizes(path, curves, levels, count, o):
    """Draw PSNR against the step size, for fixed numbers of updates and for the best. curves: {step size: array}."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    sizes = list(curves)
    for steps in [k for k in (50, 100, 200) if k <= o.study_steps]:
        axes.plot(sizes, [curves[size][steps] for size in sizes], marker=".", label=f"after {steps} updates")
    best = [curves[size].argmax() for size in sizes]
    axes.plot(
        sizes, [curves[size][k] for size, k in zip(sizes, best)], "k.--", label="after the best number of updates, written beside"
    )
    for size, k in zip(sizes, best):
        axes.annotate(str(k), (size, curves[size][k]), (0, 5), textcoords="offset points", ha="center", fontsize=8)
    for (label, level), style in zip(levels.items(), ("-.", ":")):
        axes.axhline(level, color="grey", linestyle=style, linewidth=1, label=f"{label}: {level:.2f} dB")
    axes.set(
        xscale="log", xlabel="step size", ylabel="PSNR, dB, mean over images", xticks=sizes, xticklabels=[f"{s:g}" for s in sizes]
    )
    axes.set_title(f"Plain Langevin: step size and number of updates ($\\sigma$ = {o.sigma:g}, {count} images)")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    utils.save_figure(path, figure)


def compare_recipe(model, y, x0, device, bfloat16, o):
    """Print the table of the recipe and its successors, and draw the two studies."""
    recipe = load_model(o.recipe, device, bfloat16)
    check_level(recipe, o.recipe, o.sigma)
    print(f"{f'sigma {o.sigma:g}':44}  {'PSNR dB':>14}  {'SSIM':>5}  {'calls':>5}  {'ms/image':>9}")
    measure("noisy", 0, lambda y, seeds: y, y, x0, o)
    for steps in (100, 200):
        run = functools.partial(sde.langevin, recipe, sigma=o.sigma, steps=steps, step_size=o.step_size)
        label = f"three layers, original Langevin, {steps} steps"
        measure(label, steps, lambda y, seeds, run=run: run(y=y, generator=seeds), y, x0, o)
    measure("three layers, one step", 1, lambda y, seeds: recipe(y, o.sigma), y, x0, o)

    def along(eta):
        return lambda y, seeds: sde.adams(model, y, o.sigma, o.sde_steps, eta, model.sigma_min, generator=seeds)

    measure("U-Net, reverse SDE, one draw", o.sde_steps, along(1.0), y, x0, o)
    measure("U-Net, probability-flow ODE", o.sde_steps, along(0.0), y, x0, o)
    measure("U-Net, one step", 1, lambda y, seeds: model(y, o.sigma), y, x0, o)

    y, x0 = y[: o.study_count], x0[: o.study_count]
    levels = {"three layers in one step": recipe, "U-Net in one step": model}
    levels = {label: utils.psnr(network(y, o.sigma), x0).mean().item() for label, network in levels.items()}
    curves = {size: langevin_curve(recipe, y, x0, o, size) for size in sorted({o.step_size, *o.step_sizes})}
    print(f"\nstep size, best PSNR, after how many of {o.study_steps} updates ({len(y)} images)")
    for size, curve in curves.items():
        print(f"{size:9g}  {curve.max():6.2f} dB  {curve.argmax():4d}")
    steps_curves = {
        "three layers, temperature $\\sigma^2$ (the recipe)": curves[o.step_size],
        "three layers, temperature 0 (no noise added)": langevin_curve(recipe, y, x0, o, o.step_size, 0.0),
        "U-Net, temperature $\\sigma^2$": langevin_curve(model, y, x0, o, o.step_size),
    }
    plot_steps(Path("figures", "langevin_steps.png"), steps_curves, levels, len(y), o)
    plot_step_sizes(Path("figures", "langevin_step_size.png"), curves, levels, len(y), o)
    print("wrote 'figures/langevin_steps.png' and 'figures/langevin_step_size.png'")


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


def self_ensemble(model, y, sigma, rotations=4):
    """Return the mean of the denoiser over an image and its mirror image, in so many rotations by 90 degrees, turned back."""
    total = 0
    for k in range(rotations):
        turned = y.rot90(k, (2, 3))
        total = total + (model(turned, sigma) + model(turned.flip(3), sigma).flip(3)).rot90(-k, (2, 3))
    return total / (2 * rotations)


def compare_levels(images, device, bfloat16, o):
    """Print PSNR and SSIM at every noise level, of the noise, the Wiener filter and the network; draw PSNR against sigma."""
    model, exact = (load_model(o.checkpoint, device, precision) for precision in (bfloat16, False))
    wiener = wiener_filter(utils.read_patches(o.train, o.data_dir).to(device))
    print(f"{'':6}  {'noisy':>13}  {'Wiener':>13}  {'one step':>13}  {'float32':>9}  {'2 flips':>9}  {'8 turns':>9}")
    print(f"{'sigma':>6}" + f"  {'PSNR dB  SSIM':>13}" * 3 + "  PSNR against one step, dB".rjust(33))
    curves = {name: [] for name in ("noisy, clipped", "Wiener filter, the best for a Gaussian prior", "U-Net, one step")}
    for sigma in o.levels:
        check_level(model, o.checkpoint, sigma)
        y, x0 = noisy_pairs(images, sigma, device, o)
        run = lambda network: torch.cat([network(part, sigma).cpu() for part in y.split(o.batch)])  # noqa: B023, E731
        noisy, gaussian, one_step = y.cpu(), wiener(y, sigma).cpu(), run(model)
        cells, truth = [], x0.cpu()
        for curve, result in zip(curves.values(), (noisy, gaussian, one_step)):
            curve.append(utils.psnr(result, truth).mean().item())
            cells.append(f"{curve[-1]:7.2f}  {utils.ssim(result, truth).mean():.3f} ")
        views = [functools.partial(self_ensemble, model, rotations=rotations) for rotations in (1, 4)]
        others = [run(network) for network in (exact, *views)]
        gains = [utils.psnr(other, truth).mean().item() - curves["U-Net, one step"][-1] for other in others]
        print(f"{sigma:6g}  " + " ".join(f"{cell:>14}" for cell in cells) + "".join(f"  {gain:+9.3f}" for gain in gains))
    noise, gaussian, network = (np.array(curve) for curve in curves.values())
    margin = network - np.maximum(noise, gaussian)
    print(f"the network lies above both by {margin.min():.2f} dB or more, least at sigma {o.levels[margin.argmin()]:g}")

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for (label, curve), style in zip(curves.items(), ("k:", "C0--", "C1-")):
        axes.plot(o.levels, curve, style, marker=".", label=label)
    axes.set(xscale="log", xlabel="noise level $\\sigma$, pixels in [0, 1]", ylabel="PSNR, dB, mean over images")
    axes.set_xticks(o.levels, [f"{s:g}" for s in o.levels])
    axes.minorticks_off()
    axes.set_title(f"One network from $\\sigma$ = {min(o.levels):g} to {max(o.levels):g}, {len(images)} images")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    path = Path("figures", "levels.png")
    utils.save_figure(path, figure)
    print(f"wrote '{path}'")


# -----------------------------------------------------------------------------
# What it costs
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


def classical(sigma):
    """Return {name: denoiser of one noisy (H, W, 3) array}, of scikit-image and, where it is installed, of bm3d.

    Their weights and patch sizes are those that gave the highest PSNR at sigma 0.1 on CIFAR-10's first test images.
    """
    options = {"channel_axis": -1}
    found = {
        "wavelet, BayesShrink": lambda y: denoise_wavelet(y, sigma, convert2ycbcr=True, method="BayesShrink", **options),
        "total variation": lambda y: denoise_tv_chambolle(y, weight=0.7 * sigma, max_num_iter=200, **options),
        "non-local means": lambda y: denoise_nl_means(
            y, 5, 5, h=0.9 * sigma, sigma=sigma, fast_mode=False, **options
        ),
    }  # fmt: skip
    try:
        import bm3d
    except ImportError:
        print("(no CBM3D: pip install bm3d adds it to the table)")
    else:
        found["CBM3D"] = lambda y: bm3d.bm3d_rgb(y, sigma)
    return found


def compare_cost(model, y, x0, device, bfloat16, o):
    """Print quality against time, parameters and operations; the speed of training; and that of the samplers' loop."""
    print(f"{f'sigma {o.sigma:g}':24}  {'PSNR dB':>7}  {'SSIM':>5}  {'ms/image':>8}  {'parameters':>10}  {'operations':>10}")

    def row(label, result, seconds, parameters, operations):
        quality = f"{utils.psnr(result, x0.cpu()).mean():7.2f}  {utils.ssim(result, x0).mean():.3f}"
        print(f"{label:24}  {quality}  {1000 * seconds / len(y):8.2f}  {parameters:>10}  {operations:>10}")

    for label, denoiser in classical(o.sigma).items():
        noisy = y.permute(0, 2, 3, 1).double().cpu().numpy()
        denoiser(noisy[0])  # so that no import is timed
        start = time.perf_counter()
        results = [torch.from_numpy(denoiser(image)).permute(2, 0, 1) for image in tqdm(noisy, desc=label, leave=False)]
        row(label, torch.stack(results), time.perf_counter() - start, "", "")
    for precision in sorted({False, bfloat16}):
        model = load_model(o.checkpoint, device, precision)
        parameters = f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M"
        each = f"{operations(lambda: model(y[:1], o.sigma)) / 1e9:.2f} G"  # noqa: B023
        seconds = seconds_of(lambda: model(y, o.sigma), device, o.seconds)  # noqa: B023
        row(f"U-Net, {'bfloat16' if precision else 'float32'}", model(y, o.sigma).cpu(), seconds, parameters, each)

    bare = seconds_of(lambda: [model(y, o.sigma) for _ in range(o.sde_steps)], device, o.seconds)
    bar = tqdm(leave=False)
    options = {"sigma_min": model.sigma_min, "generator": range(len(y)), "callback": lambda *_: bar.update()}
    seconds = seconds_of(lambda: sde.adams(model, y, o.sigma, o.sde_steps, **options), device, o.seconds)
    bar.close()
    print(
        f"\nthe samplers' loop, with a seed for each image and a progress bar, makes {o.sde_steps / seconds:.2f} network calls a "
        f"second of {len(y)} images; the bare network {o.sde_steps / bare:.2f}: {bare / seconds:.1%}"
    )
    training_speed(device, bfloat16, o)


@torch.enable_grad()
def training_speed(device, bfloat16, o):
    """Print how fast a step of train_score.py's defaults is (with Muon, without EMA), and the machine's fastest convolution."""
    t = utils.parse_options(vars(train_score), [])

    def convolution(channels, size):  # -> operations a second, forward and backward, nothing converted
        dtype = torch.bfloat16 if bfloat16 else torch.float32
        layer = torch.nn.Conv2d(channels, channels, 3, padding=1).to(device, dtype, memory_format=torch.channels_last)
        x = torch.randn(t.batch_size, channels, size, size, device=device).to(dtype, memory_format=torch.channels_last)
        inputs = (x.requires_grad_(), layer.weight, layer.bias)

        def work():
            out = layer(x)
            torch.autograd.grad(out, inputs, out.detach())

        return 6 * 9 * channels**2 * size**2 * t.batch_size / seconds_of(work, device, o.seconds / 10)

    rates = {shape: convolution(*shape) for shape in ((32, 32), (64, 32), (96, 16), (128, 16), (128, 8), (256, 8))}
    (channels, size), best = max(rates.items(), key=lambda item: item[1])

    model = ScoreModel(t.network, t.sigma_min, t.sigma_max, t.widths, t.blocks, bfloat16).to(device)
    optimizers = train_score.make_optimizers(model, t)
    images = torch.randint(256, (t.batch_size, 3, 32, 32), dtype=torch.uint8, device=device)

    def step():
        model.zero_grad()
        train_score.denoising_loss(model, *train_score.draw_batch(images, 0, t)).backward()
        for optimizer in optimizers:
            optimizer.step()

    per_image = operations(step) / t.batch_size
    speed = t.batch_size / seconds_of(step, device, o.seconds)
    print(
        f"training: {speed:.0f} images/s of {per_image / 1e9:.2f} G operations each, {speed * per_image / 1e9:.0f} GFLOP/s; "
        f"the fastest 3x3 convolution here, of {channels} channels at {size} x {size}, forward and backward: "
        f"{best / 1e9:.0f} GFLOP/s; fraction {speed * per_image / best:.0%}"
    )


@torch.no_grad()
def main(o):
    counts = {"recipe": o.count, "levels": o.count, "cost": o.cost_count}
    if o.table not in counts:
        raise ValueError(f"--table must be one of {', '.join(counts)}, not '{o.table}'")
    model, images, device, bfloat16 = prepare(o, counts[o.table])
    if o.table == "levels":
        compare_levels(images, device, bfloat16, o)
    else:
        compare = compare_recipe if o.table == "recipe" else compare_cost
        compare(model, *noisy_pairs(images, o.sigma, device, o), device, bfloat16, o)


if __name__ == "__main__":
    utils.run_script(main, globals())

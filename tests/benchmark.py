"""Print the tables of the README and draw the figures of the studies.

    python tests/benchmark.py --input cifar10                   # the recipe this project starts from, and successors
    python tests/benchmark.py --input cifar10 --table samplers  # whether each sampler's draws are posterior draws
    python tests/benchmark.py --help                            # every constant below is an option

"recipe" measures the original Langevin recipe with its three-layer network, and the U-Net in one step and along the
reverse-time SDE, on the same noisy images; then it draws two studies of the recipe: PSNR against the number of updates
(figures/langevin_steps.png), and against their step size (figures/langevin_step_size.png).

"samplers" holds the draws against what is true of any draw from p(x0 | y): its squared error is twice that of the one-step
estimate, the mean of n draws has 1 + 1/n times that error, the truth lies in a 50 % interval of the draws half of the
time, and y minus the draw is white with standard deviation sigma. It does so for the network, and again for a Gaussian
random field, whose denoiser is exact: what misses there is the sampler's fault, what misses only above the network's. Two
figures follow: what forgets y as its updates grow in number (figures/forgetting.png), and what texture costs
(figures/dial.png).
"""

import functools
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sde  # noqa: E402
import utils  # noqa: E402
from model import load_model  # noqa: E402

# -----------------------------------------------------------------------------
TABLE = "recipe"  # "recipe" or "samplers"
INPUT = "cifar10"  # "cifar10" (its test images), "samples", or a path; all images of one size
DATA_DIR = "data"  # folder that holds CIFAR-10, or gets it
COUNT = 1000  # images of the recipe's table
STUDY_COUNT = 100  # images of its two studies
SAMPLERS_COUNT = 8  # images of the samplers' table
DRAWS = 64  # draws an image of the samplers' table
SIGMA = 0.1  # noise level, pixels in [0, 1]
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
# -----------------------------------------------------------------------------


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
    check_level(recipe, o.recipe, o)
    print(f"{'':44}  {'PSNR dB':>14}  {'SSIM':>5}  {'calls':>5}  {'ms/image':>9}")
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
# Are the draws posterior draws?
# -----------------------------------------------------------------------------


def gaussian_field(shape, seed, device):
    """Return images (B, 3, H, W) of a Gaussian random field with a spectrum like that of photographs, and its denoiser."""
    frequency = torch.hypot(torch.fft.fftfreq(shape[2])[:, None], torch.fft.fftfreq(shape[3])[None]).to(device)
    power = 1 / (frequency**2 + 0.02**2)
    power = 0.25**2 * power / power.mean()  # variance of each Fourier coefficient, of each pixel 0.25^2
    white = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    x0 = 0.5 + torch.fft.ifft2(torch.fft.fft2(white) * power.sqrt()).real

    def denoiser(x, sigma):
        return 0.5 + torch.fft.ifft2(torch.fft.fft2(x - 0.5) * power / (power + sigma**2)).real

    return x0, denoiser


def draw(sampler, y, o):
    """Return DRAWS draws for each image: (DRAWS, B, 3, H, W) on the CPU; every draw has its own seed."""
    stack, per_batch = [], max(1, o.batch // len(y))
    for first in range(0, o.draws, per_batch):
        count = min(per_batch, o.draws - first)
        seeds = [o.seed + first * len(y) + i for i in range(count * len(y))]
        stack.append(sampler(y.repeat(count, 1, 1, 1), seeds).unflatten(0, (count, len(y))).cpu())
    return torch.cat(stack)


def certify(title, denoiser, y, x0, sigma_min, o):
    """Print how the draws of each sampler compare with what holds for posterior draws; the first row says what that is."""
    one_step = denoiser(y, o.sigma).cpu()
    error = ((one_step - x0.cpu()) ** 2).mean().item()
    few = max(1, o.draws // 4)
    print(f"\n{title}: {len(y)} images, {o.draws} draws each; one step {utils.psnr(one_step, x0.cpu()).mean():.2f} dB")
    widths = (18, 5, 9, 9, 9, 6, 6, 7, 7, 8, 8, 8)

    def line(*cells):
        return "  ".join(f"{c:{'<' if k == 0 else '>'}{w}}" for k, (c, w) in enumerate(zip(cells, widths)))

    counted = ("one draw", f"mean {few}", f"mean {o.draws}")
    print(line("", "", "error /", "error of", "one step", "cover", "", "y-draw", "", "PSNR dB", "", ""))
    print(line("sampler", "calls", *counted, "50 %", "90 %", "std/s", "lag 1", *counted))
    print(
        line(
            "(posterior draws)",
            "",
            "2.000",
            f"{1 + 1 / few:.3f}",
            f"{1 + 1 / o.draws:.3f}",
            "0.500",
            "0.900",
            "1.000",
            "0.000",
            "",
            "",
            "",
        )
    )
    grid = {"sigma_min": sigma_min}
    rows = [
        ("adams", 10, functools.partial(sde.adams, steps=10, **grid)),
        ("adams", 20, functools.partial(sde.adams, steps=20, **grid)),
        ("ddim, eta 1", 10, functools.partial(sde.ddim, steps=10, **grid)),
        ("ddim, eta 1", 100, functools.partial(sde.ddim, steps=100, **grid)),
        ("Euler-Maruyama", 100, functools.partial(sde.reverse_sde, steps=100, **grid)),
        ("edm", 51, functools.partial(sde.edm, steps=26, **grid)),
        ("pred.-corrector", 99, functools.partial(sde.predictor_corrector, steps=50, **grid)),
        ("annealed Langevin", 101, functools.partial(sde.annealed_langevin, steps=25, **grid)),
        ("plain Langevin", 100, functools.partial(sde.langevin, steps=100, step_size=o.step_size)),
    ]
    for label, calls, sampler in tqdm(rows, desc=title, leave=False):
        draws = draw(lambda y, seeds, sampler=sampler: sampler(denoiser, y, o.sigma, generator=seeds), y, o)
        truth, observed = x0.cpu(), y.cpu()
        means = [draws, draws[:few].mean(0), draws.mean(0)]
        ratios = [((mean - truth) ** 2).mean().item() / error for mean in means]
        coverage = []
        for share in (0.5, 0.9):
            # Truth and n draws are exchangeable: n - 1 gaps between the draws hold the truth with probability 1 / (n + 1) each.
            width = share * (o.draws + 1) / (o.draws - 1)
            low, high = torch.quantile(draws, torch.tensor([0.5 - width / 2, 0.5 + width / 2]), dim=0)
            coverage.append(((truth >= low) & (truth <= high)).double().mean().item())
        noise = observed - draws
        lag = (noise[..., 1:] * noise[..., :-1]).mean().item() / (noise**2).mean().item()
        residual = [(noise**2).mean().sqrt().item() / o.sigma, lag]
        psnr = [torch.stack([utils.psnr(one, truth).mean() for one in draws]).mean().item()]
        psnr += [utils.psnr(mean, truth).mean().item() for mean in means[1:]]
        cells = [f"{v:.3f}" for v in ratios + coverage + residual] + [f"{v:.2f}" for v in psnr]
        tqdm.write(line(label, calls, *cells))


def study_forgetting(path, model, y, x0, o):
    """Draw the squared error of a result, over that of one step, as plain and exact Langevin updates grow in number."""
    error = ((model(y, o.sigma) - x0) ** 2).mean()
    ratio = lambda x: (((x - x0) ** 2).mean() / error).item()  # noqa: E731
    common = {"sigma": o.sigma, "steps": 20, "sigma_min": model.sigma_min, "generator": range(o.seed, o.seed + len(y))}
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()

    plain = []
    options = {"steps": o.study_steps, "step_size": o.step_size, "generator": common["generator"]}
    sde.langevin(model, y, o.sigma, callback=lambda step, x_t, *_: plain.append(ratio(x_t)), **options)
    axes.plot(plain, color="tab:red", linestyle="--", label="plain Langevin (the recipe)")
    repeats = (1, 2, 4, 8, 16)
    for label, style, observe in (("naive", "r.-", False), ("exact", "b.-", True)):
        results = [sde.predictor_corrector(model, y, corrections=c, observe=observe, **common) for c in (0, *repeats)]
        axes.plot([20 + 19 * c for c in (0, *repeats)], [ratio(x) for x in results], style, label=f"{label} predictor-corrector")
    results = [sde.annealed_langevin(model, y, repeats=c, **common) for c in repeats]
    axes.plot([20 * c + 1 for c in repeats], [ratio(x) for x in results], "g.-", label="annealed Langevin with the pull of y")
    axes.axhline(2, color="black", linewidth=1, linestyle=":", label="a draw from the posterior")
    axes.axhline(1, color="black", linewidth=1, label="one step")
    axes.set(
        xlabel="network calls", ylabel="squared error / that of one step", yscale="log", xlim=(0, o.study_steps), ylim=(0.9, None)
    )
    axes.set_yticks([1, 2, 3, 4, 6, 8], [1, 2, 3, 4, 6, 8])
    axes.set_title(f"What forgets the observation and what keeps it ($\\sigma$ = {o.sigma:g}, {len(y)} images)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    utils.save_figure(path, figure)


def study_dial(path, model, y, x0, o):
    """Draw high-frequency power, against that of the clean images, over the squared error: the price of texture."""
    frequency = torch.hypot(torch.fft.fftfreq(y.shape[2])[:, None], torch.fft.fftfreq(y.shape[3])[None]).to(y.device)
    power = lambda x: (torch.fft.fft2(x - 0.5).abs() ** 2 * (frequency > 0.25)).sum().item()  # noqa: E731
    one_step = model(y, o.sigma)
    error, clean = ((one_step - x0) ** 2).mean(), power(x0)
    place = lambda x: (((x - x0) ** 2).mean().item() / error.item(), power(x) / clean)  # noqa: E731

    stopped = []
    for texture in (0, 0.2, 0.4, 0.6, 0.8, 1):
        stop = o.sigma * (model.sigma_min / o.sigma) ** texture
        seeds = range(o.seed, o.seed + len(y))
        stopped.append((f"{texture:g}", place(sde.adams(model, y, o.sigma, o.sde_steps, sigma_min=stop, generator=seeds))))
    run = functools.partial(sde.adams, model, sigma=o.sigma, steps=o.sde_steps, sigma_min=model.sigma_min)
    draws = draw(lambda y, seeds: run(y=y, generator=seeds), y, o).to(y.device)
    averaged = [(str(n), place(draws[:n].mean(0))) for n in (1, 2, 4, 8, 16, 32, 64) if n <= o.draws]

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for points, label, side in (
        (stopped, "SDE stopped early, at this texture", (6, -10)),
        (averaged, "mean of so many draws", (-6, 6)),
    ):
        axes.plot(*zip(*[xy for _, xy in points]), marker="o", label=label)
        for text, xy in points:
            axes.annotate(text, xy, side, textcoords="offset points", ha="center", fontsize=8)
    axes.plot(*place(run(y=y, eta=0.0)), "k^", label="probability-flow ODE")
    axes.axhline(1, color="black", linewidth=1, linestyle=":", label="clean images")
    axes.set(xlabel="squared error / that of one step", ylabel="high-frequency power / that of clean images")
    axes.set_title(f"From least error to natural texture ($\\sigma$ = {o.sigma:g}, {len(y)} images)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    utils.save_figure(path, figure)


def check_level(model, path, o):
    low, high = model.sigma_min, model.sigma_max
    if not low <= o.sigma <= high:
        raise ValueError(f"'{path}' was trained from {low:g} to {high:g}, not at --sigma {o.sigma:g}")


@torch.no_grad()
def main(o):
    if o.draws < 20:
        raise ValueError(f"--draws {o.draws} are too few for an interval that holds the truth with 90 %: at least 20")
    if o.table not in ("recipe", "samplers"):
        raise ValueError(f"--table must be recipe or samplers, not '{o.table}'")
    device = utils.pick_device(o.device)
    bfloat16 = utils.pick_bfloat16(o.precision, device)
    model = load_model(o.checkpoint, device, bfloat16)
    check_level(model, o.checkpoint, o)
    count = o.count if o.table == "recipe" else o.samplers_count
    images = [image for _, image in utils.read_images(o.input, o.data_dir)[:count]]
    noisy = utils.add_noise(images, o.sigma, o.seed)
    x0, y = (torch.from_numpy(np.stack(part)).permute(0, 3, 1, 2).to(device) for part in (images, noisy))

    precision = "bfloat16" if bfloat16 else "float32"
    machine = f"{device} with {torch.get_num_threads()} threads"
    print(f"{len(y)} images of {o.input}, sigma {o.sigma:g}, seed {o.seed}; {machine}, {precision}")
    if o.table == "recipe":
        compare_recipe(model, y, x0, device, bfloat16, o)
    else:
        certify("the network", model, y, x0, model.sigma_min, o)
        study_forgetting(Path("figures", "forgetting.png"), model, y, x0, o)
        study_dial(Path("figures", "dial.png"), model, y, x0, o)
        x0, denoiser = gaussian_field(y.shape, o.seed, device)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(o.seed + 1)).to(device)
        certify("Gaussian random field", denoiser, x0 + o.sigma * noise, x0, model.sigma_min, o)
        print("\nwrote 'figures/forgetting.png' and 'figures/dial.png'")


if __name__ == "__main__":
    utils.run_script(main, globals())

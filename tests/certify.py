"""Certify the samplers: print how the draws of each compare with what is true of any draw from p(x0 | y).

    python tests/certify.py --input cifar10     # the table of the README, and its figures
    python tests/certify.py --help              # every constant below is an option

For a draw from the posterior: its squared error is twice that of the one-step estimate, the mean of n draws has 1 + 1/n
times that error, the truth lies in a 50 % interval of the draws half of the time, and y minus the draw is white with
standard deviation sigma. A sampler ends with one step from the lowest level s, which takes MMSE(s) away: a second row says
what is true of E[x0 | x_s] for an exact draw x_s. The table holds for the network, and again for a Gaussian random field,
whose denoiser is exact: what misses there is the sampler's fault, what misses only above the network's. Two figures follow:
what forgets y as its updates grow in number (figures/forgetting.png), and what texture costs (figures/dial.png).
"""

import functools
from pathlib import Path

import torch
from benchmark import noisy_pairs, prepare  # first: it also puts the project on the path
from matplotlib.figure import Figure
from tqdm import tqdm

import sde
import utils

# -----------------------------------------------------------------------------
INPUT = "cifar10"  # "cifar10" (its test images), "samples", or a path; all images of one size
DATA_DIR = "data"  # folder that holds CIFAR-10, or gets it
COUNT = 8  # images
DRAWS = 64  # draws an image
SIGMA = 0.1  # noise level, pixels in [0, 1]
CHECKPOINT = "checkpoints/score_cifar10.pt"  # the network
STEP_SIZE = 1e-4  # of plain Langevin
STUDY_STEPS = 400  # Langevin updates followed in the figure of forgetting
SDE_STEPS = 20  # network calls of the reverse SDE and of the probability-flow ODE in the figures
SEED = 0  # of the noise (numpy's default_rng) and, plus a number each, of the draws
DEVICE = "auto"  # "auto" (GPU if there is one), "cpu", "cuda", "cuda:1"
PRECISION = "auto"  # of the convolutions: "bfloat16", "float32", or "auto" (bfloat16 where the hardware has it)
BATCH = 200  # images that go through a network together
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
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(o.seed + 2)).to(x0)
    left = ((denoiser(x0 + sigma_min * noise, sigma_min) - x0) ** 2).mean().item()  # MMSE at the last level
    print(f"\n{title}: {len(y)} images, {o.draws} draws each; one step {utils.psnr(one_step, x0.cpu()).mean():.2f} dB")
    widths = (18, 5, 9, 9, 9, 6, 6, 7, 7, 8, 8, 8)

    def line(*cells):
        return "  ".join(f"{c:{'<' if k == 0 else '>'}{w}}" for k, (c, w) in enumerate(zip(cells, widths)))

    counted = ("one draw", f"mean {few}", f"mean {o.draws}")
    print(line("", "", "error /", "error of", "one step", "cover", "", "y-draw", "", "PSNR dB", "", ""))
    print(line("sampler", "calls", *counted, "50 %", "90 %", "std/s", "lag 1", *counted))
    for label, end in (("(posterior draws)", 0.0), ("(ended by a step)", left)):
        scatter = 1 - end / error
        expected = [f"{1 + scatter / n:.3f}" for n in (1, few, o.draws)]
        intervals = [""] * 2 if end else ["0.500", "0.900"]
        print(line(label, "", *expected, *intervals, f"{(1 - end / o.sigma**2) ** 0.5:.3f}", "" if end else "0.000", "", "", ""))
    grid = {"sigma_min": sigma_min}
    rows = [
        ("adams", 10, functools.partial(sde.adams, steps=10, **grid)),
        ("adams", 20, functools.partial(sde.adams, steps=20, **grid)),
        ("ddim, eta 1", 10, functools.partial(sde.ddim, steps=10, **grid)),
        ("ddim, eta 1", 100, functools.partial(sde.ddim, steps=100, **grid)),
        ("Euler-Maruyama", 100, functools.partial(sde.reverse_sde, steps=100, **grid)),
        ("edm", 51, functools.partial(sde.edm, steps=26, **grid)),
        ("pred.-corrector", 99, functools.partial(sde.predictor_corrector, steps=50, **grid)),
        ("annealed Langevin", 100, functools.partial(sde.annealed_langevin, steps=100, **grid)),
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
    results = [sde.annealed_langevin(model, y, **common | {"steps": 20 * c}) for c in repeats]
    axes.plot([20 * c for c in repeats], [ratio(x) for x in results], "g.-", label="annealed Langevin with the pull of y")
    axes.axhline(2, color="black", linewidth=1, linestyle=":", label="a draw from the posterior")
    axes.axhline(1, color="black", linewidth=1, label="one step")
    axes.set(
        xlabel="network calls", ylabel="squared error / that of one step", yscale="log", xlim=(0, o.study_steps), ylim=(0.9, 16)
    )
    axes.set_yticks([1, 2, 3, 4, 6, 8], [1, 2, 3, 4, 6, 8])
    axes.set_title(f"What forgets the observation and what keeps it ($\\sigma$ = {o.sigma:g}, {len(y)} images)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper right", ncols=2)
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


def study_batches(model, y, o):
    """Print how far the draw of an image in a batch is from the one with the same seed alone, in both precisions."""
    chosen, seeds = model.bfloat16, [o.seed + i for i in range(len(y))]
    run = functools.partial(sde.adams, model, sigma=o.sigma, steps=o.sde_steps, sigma_min=model.sigma_min)
    for precision in ("bfloat16", "float32"):
        model.bfloat16 = precision == "bfloat16"
        alone = torch.cat([run(y=y[i : i + 1], generator=seeds[i : i + 1]) for i in range(len(y))])
        difference = (alone - run(y=y, generator=seeds)).abs().max().item()
        print(f"{precision}: a draw alone and the same draw in a batch of {len(y)} differ by at most {difference:.1g}")
    model.bfloat16 = chosen


@torch.no_grad()
def main(o):
    if o.draws < 20:
        raise ValueError(f"--draws {o.draws} are too few for an interval that holds the truth with 90 %: at least 20")
    model, images, device, _ = prepare(o, o.count)
    y, x0 = noisy_pairs(images, o.sigma, device, o)
    study_batches(model, y, o)
    certify("the network", model, y, x0, model.sigma_min, o)
    study_forgetting(Path("figures", "forgetting.png"), model, y, x0, o)
    study_dial(Path("figures", "dial.png"), model, y, x0, o)
    x0, denoiser = gaussian_field(y.shape, o.seed, device)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(o.seed + 1)).to(device)
    certify("Gaussian random field", denoiser, x0 + o.sigma * noise, x0, model.sigma_min, o)
    print("\nwrote 'figures/forgetting.png' and 'figures/dial.png'")


if __name__ == "__main__":
    utils.run_script(main, globals())

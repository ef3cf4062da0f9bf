"""Certify the samplers: print how the draws of each compare with what is true of any draw from p(x0 | y).

    python tests/certify.py                     # the table of the README, and its figures
    python tests/certify.py --help              # every constant below is an option

For a draw from the posterior: its squared error is twice that of the one-step estimate, the mean of n draws has 1 + 1/n
times that error, the truth lies in a 50 % interval of the draws half of the time, and y minus the draw is white with
standard deviation sigma. A sampler ends with one step from the lowest level s, which takes MMSE(s) away: the row "exact"
says what is then true, 2 - MMSE(s) / MMSE(sigma). That step also narrows the intervals, the more the lower sigma is: the row
"state" holds those of the state before it, for the state of the truth. The same holds for a Gaussian random field, whose
denoiser is exact: what misses there is the sampler's fault, what misses only above it the network's. Three figures follow: what
forgets y as its updates grow in number (figures/forgetting.png), what texture costs (figures/dial.png), and pictures made from
nothing (figures/nothing.png).
"""

import itertools
import math
from pathlib import Path

import numpy as np
import torch
from benchmark import read_model, read_noisy, watched  # first: it also puts the project on the path
from matplotlib.figure import Figure
from scipy import fft
from torchvision.utils import make_grid
from tqdm import tqdm

import observations
import pictures
import sde
import utils

# -----------------------------------------------------------------------------
INPUT = "cifar10"  # "cifar10" (its test images), "samples", or a path; all images of one size
DATA_DIR = "data"  # folder that holds CIFAR-10, or gets it
COUNT = 50  # images
DRAWS = 19  # draws an image, of samplers with at most FEW_CALLS; 19 make intervals of 50 and 90 % exact
FEW_CALLS = 20  # network calls of a sampler that can be had often
FEW_DRAWS = 5  # draws an image of the others
SIGMAS = (0.05, 0.1, 0.3)  # noise levels, pixels in [0, 1]; the figures are made at the middle one
OBSERVED = 50  # images of which half the pixels, a blurred and a smaller picture are observed, with noise of SIGMA_Y; 0: none
SIGMA_Y = 0.02  # noise level of these observations
OBSERVED_STEPS = 30  # network calls of a draw from them
CHECKPOINT = "checkpoints/score_cifar10.pt"  # the network
SEED = 0  # of the noise (numpy's default_rng) and, plus a number each, of the draws
DEVICE = "auto"  # "auto" (GPU if there is one), "cpu", "cuda", "cuda:1"
PRECISION = "auto"  # of the network: "bfloat16", "float32", or "auto" (bfloat16 where the hardware has it)
BATCH = 200  # images that go through a network together
# -----------------------------------------------------------------------------


def double_loop(denoiser, y, levels, repeats=5, delta=0.2, noise=torch.randn_like):
    """Anneal as published (Kawar et al. 2021, algorithm 1): updates at each level, and no move of the state to the next."""
    x, sigma = y, float(levels[0])
    for _, s in sde.falling(levels):
        for _ in range(repeats):
            score = (denoiser(x, s) - x) / s**2
            x = x + delta * s**2 * (score + (y - x) / (sigma**2 - s**2)) + (2 * delta) ** 0.5 * s * noise(x)
    return denoiser(x, levels[-1])


samplers = {  # label: sampler, noise levels, network calls
    "`adams`, 10 (`sde`)": (sde.adams, 10, 10),
    "`adams`, 20 (`sde`)": (sde.adams, 20, 20),
    "`reverse_sde`, 100 (`euler`)": (sde.reverse_sde, 100, 100),
    "`ancestral`, 100": (sde.ancestral, 100, 100),
    "`predictor_corrector`, 99 (`pc`)": (sde.predictor_corrector, 50, 99),
    "`annealed_langevin`, 100 (`annealed`)": (sde.annealed_langevin, 100, 100),
    "the double loop as published, 101": (double_loop, 21, 101),
}


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


def ratio(errors, references):
    """Return the ratio of two means over images, and its standard error (the delta method)."""
    value = errors.mean() / references.mean()
    return value.item(), ((errors - value * references).std() / references.mean() / len(errors) ** 0.5).item()


def coverage(draws, x0, share):
    """Return how often the truth lies in an interval of n draws that holds a further draw with probability `share`.

    The interval from the k-th smallest to the k-th largest draw does so with (n + 1 - 2 k) / (n + 1); None if no k fits.
    """
    k = (1 - share) * (len(draws) + 1) / 2
    if abs(k - round(k)) > 1e-6 or k < 0.5:
        return None
    low, high = draws.kthvalue(round(k), dim=0).values, draws.kthvalue(len(draws) + 1 - round(k), dim=0).values
    return ((x0 >= low) & (x0 <= high)).double().mean().item()


def statistics(draws, x0, y, one_step, sigma):
    """Return what is known of posterior draws, as columns of a table; draws (N, B, 3, H, W), the others (B, 3, H, W).

    "error of a draw" is that over the error of one_step, with its standard error over images; "of the mean" is the error of
    the mean of the N draws over (1 + 1/N) times that of one_step, 1 for any posterior.
    """
    error = lambda images: ((images - x0) ** 2).mean(dim=(-3, -2, -1))  # noqa: E731
    value, uncertainty = ratio(error(draws).mean(0), error(one_step))
    noise = y - draws
    found = {"error of a draw": value, "±": uncertainty}
    found["of the mean"] = ratio(error(draws.mean(0)), error(one_step) * (1 + 1 / len(draws)))[0]
    found |= {f"in {share:.0%}": c for share in (0.5, 0.9) if (c := coverage(draws, x0, share)) is not None}
    found["(y - draw) / sigma"] = (noise**2).mean().sqrt().item() / sigma
    found["its lag 1"] = ((noise[..., 1:] * noise[..., :-1]).mean() / (noise**2).mean()).item()
    return found | {"PSNR dB": utils.psnr(draws.flatten(0, 1), x0.repeat(len(draws), 1, 1, 1)).mean().item()}


def certify(denoiser, y, x0, sigma, sigma_min):
    """Return a row for each sampler, and before them what must be."""
    truth, observed, one_step = x0.cpu(), y.cpu(), denoiser(y, sigma).cpu()
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(SEED + 2)).to(x0)
    left = ((denoiser(x0 + sigma_min * noise, sigma_min) - x0) ** 2).mean() / ((one_step - truth) ** 2).mean().to(x0)
    rows = [{"sampler, network calls": "*exact*", "error of a draw": 2 - left.item(), "±": "", "of the mean": 1.0}]
    for label, (sampler, steps, calls) in tqdm(samplers.items(), leave=False):
        levels, asked_about, kept = sde.noise_levels(sigma, sigma_min, steps), [], label.startswith("`adams`, 20")
        count = DRAWS if calls <= FEW_CALLS else FEW_DRAWS
        asked = watched(denoiser, lambda x, last=asked_about: last.append(x.cpu())) if kept else denoiser
        draws = pictures.posterior_draws(lambda y, noise: sampler(asked, y, levels, noise=noise), y, count, BATCH, SEED)  # noqa: B023
        rows.append({"sampler, network calls": label, **statistics(draws, truth, observed, one_step, sigma)})
        if kept:  # what it asked last is its state at the lowest level
            states = torch.cat([x.unflatten(0, (-1, len(y))) for x in asked_about[calls - 1 :: calls]])
            of_truth = state_of(truth, observed, sigma, sigma_min, SEED + 3)
            shares = {f"in {share:.0%}": coverage(states, of_truth, share) for share in (0.5, 0.9)}
            rows.append({"sampler, network calls": "its *state* before the last step"} | {k: v for k, v in shares.items() if v})
    return rows


def state_of(x0, y, sigma, s, seed):
    """Return a state at level s on the way from y to x0: N(x0 + r (y - x0), s^2 (1 - r)) with r = s^2 / sigma^2.

    If x0 is a draw from p(x0 | y), and the truth is, this is one from p(x_s | y).
    """
    r, noise = (s / sigma) ** 2, torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed))
    return x0 + r * (y - x0) + s * (1 - r) ** 0.5 * noise


def certify_jacobian(model, y, x0, sigma, probes=64):
    """Return how often the truth lies within the intervals of a Gaussian with the variances of `expected_error`."""
    denoised, variance = sde.expected_error(model, y, sigma, probes, utils.seeded_noise(range(SEED, SEED + len(y)), y.device))
    distance = (x0 - denoised).abs() / variance.clamp(min=1e-12).sqrt()
    inside = {f"in {share:.0%}": (distance < width).double().mean().item() for share, width in ((0.5, 0.6745), (0.9, 1.6449))}
    return {"sampler, network calls": f"`expected_error`, {probes} probes"} | inside


def summary(found):
    """Return a row for each sampler from {sigma: (rows of the network, rows of the field)}: the table of the README."""
    middle, table = list(found)[len(found) // 2], []
    for k, first in enumerate(next(iter(found.values()))[0]):
        if "error of a draw" in first:
            row = {"sampler, network calls": first["sampler, network calls"]}
            for sigma, (network, _) in found.items():
                error, uncertainty = network[k]["error of a draw"], network[k]["±"]
                row[f"error at {sigma:g}"] = f"{error:.3f} ± {uncertainty:.3f}" if uncertainty else f"{error:.3f}"
            table.append(row | {f"of the field, {middle:g}": found[middle][1][k]["error of a draw"]})
    return table


def natural_field(shape):
    """Return the denoiser of a Gaussian prior whose discrete cosines have the variances that `observed` expects by default."""
    gain = sde.natural_power(torch.zeros(shape)).double().numpy()
    cosines = fft.dctn(np.eye(gain.size).reshape(-1, *gain.shape), axes=(1, 2, 3), norm="ortho").reshape(gain.size, -1)
    basis, gain = torch.from_numpy(cosines), torch.from_numpy(gain).flatten()
    return lambda x, s: 0.5 + (((x - 0.5).flatten(1) @ basis) * (gain / (gain + s**2)) @ basis.T).view_as(x)


def certify_exactness(sigma_y, iterations=(1, 2, 3, 5, 10)):
    """Return a row for each prior, observation and level: the error of `observed` over what y changes, by iterations.

    The posterior mean is known: with V = Cov[x0 | x] and A as matrices, D + V A^T (sigma_y^2 + A V A^T)^-1 (y - A D).
    """
    x0, field = gaussian_field((1, 3, 16, 16), SEED, "cpu")
    x0, unit, rows = x0.double(), torch.eye(x0.numel(), dtype=torch.float64).view(-1, *x0.shape[1:]), []
    matrix = lambda linear: (linear(unit) - linear(torch.zeros_like(unit[:1]))).flatten(1).T  # noqa: E731
    for prior, denoiser in (("like natural pictures", natural_field(x0.shape)), ("with independent colours", field)):
        for name, s in itertools.product(observations.OBSERVATIONS, (0.2, 1.0)):
            A, y = observations.observe(name, x0, sigma_y, SEED)
            x = x0 + s * torch.randn(x0.shape, generator=torch.Generator().manual_seed(SEED + 2)).double()
            D, H, V = denoiser(x, s), matrix(A), s**2 * matrix(lambda v, f=denoiser, s=s: f(v, s))
            system = H @ V @ H.T + sigma_y**2 * torch.eye(len(H), dtype=torch.float64)
            due = (V @ H.T @ torch.linalg.solve(system, (y - A(D)).flatten())).view_as(x)
            row = {"a Gaussian prior": prior, "observation": name, "level": f"{s:g}"}
            for k in iterations:
                found = sde.observed(denoiser, y, A, sigma_y, iterations=k, resolution=0)(x, s)
                row[f"after {k}"] = f"{((found - D - due).norm() / due.norm()).item():.0e}"
            rows.append(row)
    return rows


def certify_observations(model, x0, sigma_y, count=9):
    """Return a row for each observation: draws spread as far as their mean is off, and intervals hold the truth, or not."""
    rows = []
    for name in tqdm(observations.OBSERVATIONS, leave=False):
        A, y = observations.observe(name, x0, sigma_y, SEED)
        found, truth = observations.draws(model, x0, A, y, sigma_y, OBSERVED_STEPS, count, BATCH, SEED), x0.cpu()
        error = lambda images: ((images - truth) ** 2).mean(dim=(-3, -2, -1))  # noqa: B023, E731
        of_mean, variance = error(found.mean(0)), (1 + 1 / count) * found.var(0).mean(dim=(-3, -2, -1))
        squared, uncertainty = ratio(variance, of_mean)
        row = {"observation": name, "spread / error": squared**0.5, "±": uncertainty / (2 * squared**0.5)}
        value, uncertainty = ratio(error(found).mean(0), of_mean)
        row |= {"draw / mean": value, " ±": uncertainty, "due": 2 * count / (count + 1), "in 80%": coverage(found, truth, 0.8)}
        row["PSNR dB, draw"] = torch.stack([utils.psnr(one, truth).mean() for one in found]).mean().item()
        rows.append(row | {f"mean of {count}": utils.psnr(found.mean(0), truth).mean().item()})
    return rows


def study_forgetting(path, model, y, x0, sigma):
    """Plot the squared error of a result, over that of one step, as plain and exact Langevin updates grow in number."""
    error, levels = ((model(y, sigma) - x0) ** 2).mean(), sde.noise_levels(sigma, model.sigma_min, 20)
    relative = lambda x: (((x - x0) ** 2).mean() / error).item()  # noqa: E731
    noise = lambda: utils.seeded_noise(range(SEED, SEED + len(y)), y.device)  # noqa: E731
    plain, repeats = [], (0, 1, 2, 4, 8, 16)
    sde.langevin(watched(model, lambda x: plain.append(relative(x))), y, sigma, 400, noise=noise())
    lines = [("plain Langevin (the recipe)", range(len(plain)), plain, {"color": "#D55E00", "linestyle": "--"}, (406, 2.75))]
    for label, observe, style, place in (
        ("corrections as published", False, {"color": "#CC79A7", "marker": "s"}, (332, 5.8)),
        ("corrections with the pull of y", True, {"color": "#0072B2", "marker": "o"}, (332, 1.74)),
    ):
        results = [sde.predictor_corrector(model, y, levels, c, observe=observe, noise=noise()) for c in repeats]
        lines.append((label, [20 + 19 * c for c in repeats], [relative(x) for x in results], style, place))
    calls = [20 * c for c in repeats[1:]]
    results = [sde.annealed_langevin(model, y, sde.noise_levels(sigma, model.sigma_min, n), noise=noise()) for n in calls]
    style = {"color": "#009E73", "marker": "^"}
    lines.append(("annealed Langevin with the pull of y", calls, [relative(x) for x in results], style, (332, 1.48)))
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for label, x, values, style, place in lines:
        axes.plot(x, values, markersize=4, **style)
        axes.annotate(label, place, color=style["color"], fontsize=8)
    axes.axhline(2, color="black", linewidth=1, linestyle=":")
    axes.axhline(1, color="black", linewidth=1)
    axes.annotate("one step", (406, 1.03), fontsize=8)
    label = "squared error / that of one step\n(2: a posterior draw; less: too little scatter)"
    axes.set(xlabel="network calls", ylabel=label, yscale="log", xlim=(0, 540), ylim=(0.9, 16))
    axes.set_yticks([1, 2, 4, 8, 16], [1, 2, 4, 8, 16])
    axes.minorticks_off()
    axes.set_title(f"What forgets the observation and what keeps it ($\\sigma$ = {sigma:g}, {len(y)} images)", fontsize=10)
    axes.grid(alpha=0.3)
    utils.save_figure(path, figure)


def study_dial(path, model, y, x0, sigma):
    """Plot high-frequency power, against that of the clean images, over the squared error: the price of texture."""
    frequency = torch.hypot(torch.fft.fftfreq(y.shape[2])[:, None], torch.fft.fftfreq(y.shape[3])[None]).to(y.device)
    power = lambda x: (torch.fft.fft2(x - 0.5).abs() ** 2 * (frequency > 0.25)).sum().item()  # noqa: E731
    error, clean = ((model(y, sigma) - x0) ** 2).mean().item(), power(x0)
    place = lambda x: (((x - x0) ** 2).mean().item() / error, power(x) / clean)  # noqa: E731
    levels = lambda texture: sde.noise_levels(sigma, sigma * (model.sigma_min / sigma) ** texture, 20)  # noqa: E731
    noise = utils.seeded_noise(range(SEED, SEED + len(y)), y.device)
    stopped = [(f"{t:g}", place(sde.adams(model, y, levels(t), noise=noise))) for t in (0, 0.2, 0.4, 0.6, 1)]
    whole = lambda y, noise: sde.adams(model, y, levels(1), noise=noise)  # noqa: E731
    draws = pictures.posterior_draws(whole, y, 16, BATCH, SEED).to(y.device)
    averaged = [(str(n), place(draws[:n].mean(0))) for n in (2, 4, 16)]
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for points, style, color, label, offset in (
        (stopped, "o-", "#0072B2", "reverse SDE stopped early, at this --texture", (0, 7)),
        (averaged, "s--", "#E69F00", "mean of so many draws", (0, -14)),
        ([("probability-flow ODE", place(sde.adams(model, y, levels(1), eta=0.0)))], "^", "#000000", None, (0, 8)),
    ):
        axes.plot(*zip(*(xy for _, xy in points)), style, label=label, color=color)
        for text, xy in points:
            axes.annotate(text, xy, offset, textcoords="offset points", ha="center", fontsize=8)
    axes.axhline(1, color="grey", linewidth=1)
    axes.annotate("clean images", (1.5, 1), (0, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="squared error / that of one step", ylabel="high-frequency power / that of clean images", ylim=(None, 1.12))
    axes.set_title(f"From least error to natural texture ($\\sigma$ = {sigma:g}, {len(y)} images)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    utils.save_figure(path, figure)


def study_nothing(path, model, count=32):
    """Show pictures made from pure noise alone: what the network takes for a picture."""
    noise = utils.seeded_noise(range(SEED, SEED + count), next(model.parameters()).device)
    start = 0.5 + model.sigma_max * noise(torch.zeros(count, 3, 32, 32, device=next(model.parameters()).device))
    images = sde.adams(model, start, sde.noise_levels(model.sigma_max, model.sigma_min, 40, math.inf), noise=noise)
    figure = Figure(figsize=(7.5, 3.9), layout="constrained")
    axes = figure.subplots()
    axes.imshow(utils.to_array(make_grid(images.clamp(0, 1), 8, padding=1, pad_value=1)), interpolation="nearest")
    title = f"Draws from pure noise, $\\sigma$ = {model.sigma_max:g} to {model.sigma_min:g} in 40 calls, none left out"
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()
    utils.save_figure(path, figure)


@torch.no_grad()
def main():
    utils.check(DRAWS >= 2 and FEW_DRAWS >= 2, "DRAWS", (DRAWS, FEW_DRAWS), "must be at least 2")
    device = utils.pick_device(DEVICE)
    model = read_model(CHECKPOINT, device, PRECISION, SIGMAS)
    found = {}
    for sigma in SIGMAS:
        y, x0 = read_noisy(INPUT, DATA_DIR, COUNT, sigma, SEED, device)
        field, denoiser = gaussian_field(y.shape, SEED, device)
        noise = torch.randn(field.shape, generator=torch.Generator().manual_seed(SEED + 1)).to(device)
        print(f"\n{len(y)} images at sigma {sigma:g}, {DRAWS} draws each ({FEW_DRAWS} with more than {FEW_CALLS} calls)")
        rows = certify(model, y, x0, sigma, model.sigma_min) + [certify_jacobian(model, y, x0, sigma)]
        print(utils.table(rows), flush=True)
        print(f"\na Gaussian random field at sigma {sigma:g}")
        found[sigma] = rows, certify(denoiser, field + sigma * noise, field, sigma, model.sigma_min)
        print(utils.table(found[sigma][1]), flush=True)
    print(f"\nall of it in short\n{utils.table(summary(found))}", flush=True)
    print(f"\nhow exact `observed` is on a Gaussian prior\n{utils.table(certify_exactness(SIGMA_Y))}", flush=True)
    if OBSERVED:
        _, x0 = read_noisy(INPUT, DATA_DIR, OBSERVED, SIGMA_Y, SEED, device)
        print(f"\n{OBSERVED} images observed with noise of {SIGMA_Y:g}, from pure noise in {OBSERVED_STEPS} levels")
        print(utils.table(certify_observations(model, x0, SIGMA_Y)), flush=True)
    sigma = SIGMAS[len(SIGMAS) // 2]
    y, x0 = read_noisy(INPUT, DATA_DIR, COUNT, sigma, SEED, device)
    study_forgetting(Path("figures", "forgetting.png"), model, y, x0, sigma)
    study_dial(Path("figures", "dial.png"), model, y, x0, sigma)
    study_nothing(Path("figures", "nothing.png"), model)


if __name__ == "__main__":
    utils.run_script(main, globals())

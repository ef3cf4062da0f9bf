"""Certify the samplers: print how their samples compare with what is true of any posterior sample.

    python tests/certify.py                     # the tables, and two figures
    python tests/certify.py --input FOLDER --checkpoint checkpoints/score_photographs.pt
    python tests/certify.py --help              # every constant below is an option

The squared error of a sample from p(x0 | y) is twice that of the one-step estimate, and the truth
lies in a 50 % interval of samples half of the time. A sampler ends with one step from the lowest
level s, which takes MMSE(s) away: the row "exact" says what is then true, 2 - MMSE(s) / MMSE of y.
That step narrows the intervals, so those of the state before it are shown, too. A Gaussian random
field has an exact denoiser: a deviation there comes from the sampler. Samples from an observation
must scatter as far as their mean is off.
"""

from collections import deque
from functools import partial
from pathlib import Path

import benchmark  # first: it also puts the project on the path
import torch
import torch.nn.functional as F
from torchvision.utils import make_grid
from tqdm import tqdm

import observations
import sde
import utils

# -----------------------------------------------------------------------------
INPUT = "cifar10"  # "cifar10" (its test images), or the path of others
COUNT = 50  # images by which samplers are certified; 0: none
CROP = 32  # side in pixels of the middle of each image
SIGMAS = (0.05, 0.1, 0.3)  # noise levels, pixels in [0, 1]; the figure is made at the middle one
SAMPLES = 19  # of each image, by samplers of at most 20 calls; 19 make 50 and 90 % exact
FEW_SAMPLES = 5  # of each image, by the other samplers
OBSERVED = 50  # images of which observations are certified; 0: none
SIGMA_Y = 0.02  # noise level of these observations
NOTHING = 32  # samples from pure noise; 256 measure their colours to a few per cent; 0: none
CHECKPOINT = "checkpoints/score_cifar10.pt"  # the network
FIGURES = "figures"  # folder of the figures
SEED = 0  # of the noise (numpy's default_rng) and, plus a number each, of the samples
DEVICE = "auto"  # "auto" (GPU if there is one), "cpu", "cuda", "cuda:1"
PRECISION = "auto"  # "bfloat16", "float32", or "auto" (bfloat16 where the hardware has it)
# -----------------------------------------------------------------------------


def double_loop(denoiser, y, levels, repeats=5, delta=0.2, noise=torch.randn_like):
    """Anneal as published (Kawar et al. 2021, algorithm 1): no state moves to the next level."""
    x, sigma = y, float(levels[0])
    for _, s in sde.falling(levels):
        for _ in range(repeats):
            score = (denoiser(x, s) - x) / s**2
            pull = (y - x) / (sigma**2 - s**2)
            x = x + delta * s**2 * (score + pull) + (2 * delta) ** 0.5 * s * noise(x)
    return denoiser(x, levels[-1])


SAMPLERS = {  # label: sampler, noise levels, network calls
    "`adams`, 10": (sde.adams, 10, 10),
    "`adams`, 20 (`sde`)": (sde.adams, 20, 20),
    "`reverse_sde`, 100 (`euler`)": (sde.reverse_sde, 100, 100),
    "`ancestral`, 100": (sde.ancestral, 100, 100),
    "`predictor_corrector`, 99 (`pc`)": (sde.predictor_corrector, 50, 99),
    "`annealed_langevin`, 100 (`annealed`)": (sde.annealed_langevin, 100, 100),
    "the double loop as published, 101": (double_loop, 21, 101),
}


def unit_noise(x, seed):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, dtype=x.dtype, generator=rng).to(x.device)


def gaussian_field(shape, seed, device):
    """Return a Gaussian random field (B, C, H, W), spectrum as of photographs, and its denoiser."""
    f, g = (torch.fft.fftfreq(n, device=device) for n in shape[2:])
    power = 1 / (f[:, None] ** 2 + g**2 + 0.02**2)
    power = 0.25**2 * power / power.mean()  # of each coefficient; each pixel has variance 0.25^2
    white = unit_noise(torch.zeros(shape, device=device), seed)
    x0 = 0.5 + torch.fft.ifft2(torch.fft.fft2(white) * power.sqrt()).real

    def denoiser(x, sigma):
        return 0.5 + torch.fft.ifft2(torch.fft.fft2(x - 0.5) * power / (power + sigma**2)).real

    return x0, denoiser


# -----------------------------------------------------------------------------
# What is true of posterior samples
# -----------------------------------------------------------------------------


def squared_error(images, x0):  # of each image: (..., C, H, W) -> (...)
    return ((images - x0) ** 2).mean(dim=(-3, -2, -1))


def ratio(errors, references):
    """Return the ratio of two means over images, and its standard error (the delta method)."""
    value = errors.mean() / references.mean()
    deviation = (errors - value * references).std() / references.mean()
    return value.item(), deviation.item() / len(errors) ** 0.5


def coverage(samples, x0, share):
    """Return how often the truth lies in an interval that holds a further sample with `share`.

    The interval from the k-th smallest to the k-th largest of n samples does so with probability
    (n + 1 - 2 k) / (n + 1). Raises ValueError if no k fits.
    """
    k = (1 - share) * (len(samples) + 1) / 2
    if abs(k - round(k)) > 1e-6 or k < 0.5:
        raise ValueError(f"no interval of {len(samples)} samples holds {share:.0%}")
    low = samples.kthvalue(round(k), dim=0).values
    high = samples.kthvalue(len(samples) + 1 - round(k), dim=0).values
    return ((x0 >= low) & (x0 <= high)).double().mean().item()


def intervals(samples, x0, label):
    """Return the columns of 50 and 90 % intervals, of 19 samples or as many as make them exact."""
    if (len(samples) + 1) % 20:
        return {}
    return {f"{label} in {share:.0%}": coverage(samples, x0, share) for share in (0.5, 0.9)}


def state_of(x0, y, sigma, s, seed):
    """Return a state at level s from y to x0: N(x0 + r (y - x0), s^2 (1 - r)), r = s^2 / sigma^2.

    If x0 is a sample from p(x0 | y), and the truth is, this is one from p(x_s | y).
    """
    r = (s / sigma) ** 2
    return x0 + r * (y - x0) + s * (1 - r) ** 0.5 * unit_noise(x0, seed)


def samples_and_states(sampler, denoiser, y, levels, count):
    """Return samples, and their states before the last step: (count, B, C, H, W) each."""
    inputs = deque(maxlen=1)  # of the last call

    def watched(x, s):
        inputs.append(x)
        return denoiser(x, s)

    def run(y, noise):
        images = sampler(watched, y, levels, noise=noise)
        return torch.stack([images, inputs[0]], 1)

    return observations.samples(run, y, SEED, count).unbind(2)


def certify(denoiser, y, x0, sigma, lowest):
    """Return a row for each sampler, and before them what must be.

    "error": that of a sample over that of one step, with its standard error over images.
    """
    truth, one_step = x0.cpu(), squared_error(denoiser(y, sigma), x0).cpu()
    last = squared_error(denoiser(x0 + lowest * unit_noise(x0, SEED + 2), lowest), x0)
    exact = 2 - last.mean().item() / one_step.mean().item()
    rows = [{"sampler": "*exact*", "error": exact, "±": ""}]
    state_of_truth = state_of(truth, y.cpu(), sigma, lowest, SEED + 3)
    for label, (sampler, steps, calls) in tqdm(SAMPLERS.items(), leave=False, disable=None):
        levels = sde.noise_levels(sigma, lowest, steps)
        count = SAMPLES if calls <= 20 else FEW_SAMPLES
        samples, states = samples_and_states(sampler, denoiser, y, levels, count)
        error, uncertainty = ratio(squared_error(samples, truth).mean(0), one_step)
        row = {"sampler": label, "error": error, "±": uncertainty}
        row |= intervals(samples, truth, "truth")
        rows.append(row | intervals(states, state_of_truth, "state"))
    return rows


def certify_jacobian(model, y, x0, sigma, probes=64):
    """Return how often the truth lies in intervals of a Gaussian with the variances expected."""
    noise = utils.seeded_noise(range(SEED, SEED + len(y)), y.device)
    denoised, variance = sde.expected_error(model, y, sigma, probes, noise)
    distance = (x0 - denoised).abs() / variance.clamp(min=1e-12).sqrt()
    row = {"sampler": f"`expected_error`, {probes} probes"}
    for share, width in ((0.5, 0.6745), (0.9, 1.6449)):
        row[f"truth in {share:.0%}"] = (distance < width).double().mean().item()
    return row


def summary(found):
    """Return a row for each sampler from {sigma: (rows of the network, rows of the field)}."""
    middle, table = list(found)[len(found) // 2], []
    for k, field in enumerate(found[middle][1]):
        row = {"sampler, network calls": field["sampler"]}
        for sigma, (network, _) in found.items():
            uncertainty = network[k]["±"]
            after = f" ± {uncertainty:.3f}" if uncertainty else ""
            row[f"error at {sigma:g}"] = f"{network[k]['error']:.3f}{after}"
        table.append(row | {f"of the field, {middle:g}": field["error"]})
    return table


def certify_observations(model, x0, count=4):
    """Return a row for each observation: whether samples scatter as far as their mean is off.

    The squared error of the mean of n samples is 1 + 1/n times their variance, and the truth lies
    among them, below the largest and above the smallest, with probability (n - 1) / (n + 1).
    """
    rows, truth, share = [], x0.cpu(), (count - 1) / (count + 1)
    for name in tqdm(observations.TYPICAL, leave=False, disable=None):
        A = observations.OBSERVATIONS[name]
        y = observations.observe(A, x0, SIGMA_Y, SEED)
        draw = observations.applied(observations.draw, model, A, SIGMA_Y, x0)
        samples = observations.samples(draw, y, SEED, count)
        variance = (1 + 1 / count) * samples.var(0).mean(dim=(-3, -2, -1))
        squared, uncertainty = ratio(variance, squared_error(samples.mean(0), truth))
        row = {"observation": name, "spread / error": squared**0.5}
        row["±"] = uncertainty / (2 * squared**0.5)
        rows.append(row | {f"truth in {share:.0%}": coverage(samples, truth, share)})
    return rows


# -----------------------------------------------------------------------------
# What Langevin updates forget
# -----------------------------------------------------------------------------


def plain(denoiser, y, levels, noise):
    return sde.langevin(denoiser, y, float(levels[0]), len(levels), noise=noise)


def corrected(denoiser, y, levels, noise, observe):
    corrections = len(levels) // 20 - 1
    levels = sde.noise_levels(float(levels[0]), float(levels[-1]), 20)
    return sde.predictor_corrector(denoiser, y, levels, corrections, 0.1, observe, noise)


FORGETTING = {  # label: sampler, color and marker
    "plain Langevin (the recipe)": (plain, "tab:red", "v"),
    "corrections by the score alone": (partial(corrected, observe=False), "tab:pink", "s"),
    "corrections with the pull of y": (partial(corrected, observe=True), "tab:blue", "o"),
    "annealed Langevin with the pull of y": (sde.annealed_langevin, "tab:green", "^"),
}


def study_forgetting(path, model, y, x0, sigma):
    """Plot the squared error, over that of one step, as Langevin updates grow in number."""
    error = squared_error(model(y, sigma), x0).mean()
    title = f"What forgets the observation ($\\sigma$ = {sigma:g}, {len(y)} images)"
    label = "squared error / that of one step\n(2: a posterior sample)"
    figure, axes = benchmark.new_axes(title, "network calls", label)
    for label, (sampler, color, marker) in FORGETTING.items():
        calls, errors = [], []
        for n in (20, 40, 80, 160, 320):
            counted = utils.Recorder(model, 0)
            noise = utils.seeded_noise(range(SEED, SEED + len(y)), y.device)
            levels = sde.noise_levels(sigma, model.sigma_min, n)
            images = sampler(counted, y, levels, noise=noise)
            errors.append((squared_error(images, x0).mean() / error).item())
            calls.append(counted.calls)
        axes.semilogy(calls, errors, color=color, marker=marker, markersize=4, label=label)
    axes.axhline(2, color="black", linewidth=1, linestyle=":")
    axes.axhline(1, color="black", linewidth=1, label="one step")
    axes.set(ylim=(0.9, 16))
    axes.set_yticks([1, 2, 4, 8, 16], [1, 2, 4, 8, 16])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    utils.save_figure(path, figure)


# -----------------------------------------------------------------------------
# Samples from pure noise
# -----------------------------------------------------------------------------


def spectrum(a, b):
    """Return the products of a and b, brightness and red - blue, in three bands: (2, 3).

    The bands are up to 0.05, 0.25 and 1 cycle a pixel. a, b: (B, 3, H, W).
    """
    transforms = []
    for images in (a, b):
        red, green, blue = images.double().unbind(1)
        planes = torch.stack([(red + green + blue) / 3, red - blue])
        transforms.append(torch.fft.fft2(planes - planes.mean((1, 2, 3), keepdim=True)))
    products = (transforms[0] * transforms[1].conj()).real.mean(1)
    f, g = (torch.fft.fftfreq(n, device=a.device) for n in a.shape[2:])
    frequency = (f[:, None] ** 2 + g**2).sqrt()
    bands = ((0.0, 0.05), (0.05, 0.25), (0.25, 1.0))
    inside = [(low <= frequency) & (frequency < high) for low, high in bands]
    return torch.stack([(products * band).sum((1, 2)) for band in inside], 1)


def study_nothing(path, model, x0, device):
    """Return rows of the power of samples of p(x0) over that of clean images, x0; show 32 samples.

    Those from pure noise and, by way of noisy images x0 + s n, from any level s on, should have 1.
    Those from lower levels show which levels are at fault, more calls whether the sampler is. The
    last rows are <x0, D> / <D, D> of one step D at a level, 1 for a posterior mean: the network.
    """
    rows, high = [], model.sigma_max
    starts = [(high, 40), (high, 160), (5, 40), (1, 40), (0.3, 40)]
    for start, calls in [*starts, (1, 1), (0.3, 1), (0.1, 1)]:
        levels = sde.noise_levels(start, model.sigma_min, calls)
        middle = torch.full_like(x0, 0.5) if start == high else x0

        def run(middle, noise, start=start, levels=levels):
            return sde.adams(model, middle + start * noise(middle), levels, noise=noise)

        images = observations.in_batches(run, middle.to(device), SEED)
        if not rows:
            grid = make_grid(images[:32].clamp(0, 1), 8, padding=1, pad_value=1)
            utils.save_png(path, F.interpolate(grid[None], scale_factor=4)[0])
        among = spectrum(images, images)
        power = spectrum(x0, images) / among if calls == 1 else among / spectrum(x0, x0)
        row = {"start": "pure noise" if start == high else f"x0 + {start:g} n", "calls": calls}
        for name, values in zip(("brightness", "red - blue"), power.tolist()):
            for band, value in zip(("below 0.05", "to 0.25", "above"), values):
                row[f"{name} {band}"] = value
        rows.append(row)
    return rows


# -----------------------------------------------------------------------------


def certify_all(model, clean, device):
    """Print the tables of all SIGMAS, for images and a Gaussian random field, and a short one."""
    x0, found, observed = clean.to(device), {}, {}
    for sigma in SIGMAS:
        y = observed[sigma] = benchmark.noisy(clean, sigma, SEED, device)
        field, denoiser = gaussian_field(x0.shape, SEED, device)
        field_y = field + sigma * unit_noise(field, SEED + 1)
        print(f"\n{len(x0)} images at sigma {sigma:g}, and a Gaussian random field")
        rows = certify(model, y, x0, sigma, model.sigma_min)
        rows.append(certify_jacobian(model, y, x0, sigma))
        found[sigma] = rows, certify(denoiser, field_y, field, sigma, model.sigma_min)
        for table in found[sigma]:
            print(f"{utils.table(table)}\n", flush=True)
    print(f"all of it in short\n{utils.table(summary(found))}", flush=True)
    middle = SIGMAS[len(SIGMAS) // 2]
    study_forgetting(Path(FIGURES, "forgetting.png"), model, observed[middle], x0, middle)


@torch.no_grad()
def main():
    device = utils.pick_device(DEVICE)
    model = benchmark.read_model(CHECKPOINT, device, PRECISION, SIGMAS)
    clean = benchmark.read_images(INPUT, max(COUNT, OBSERVED, NOTHING), CROP)
    if COUNT:
        certify_all(model, clean[:COUNT], device)
    if OBSERVED:
        print(f"\n{OBSERVED} images observed with noise of {SIGMA_Y:g}")
        print(utils.table(certify_observations(model, clean[:OBSERVED].to(device))), flush=True)
    if NOTHING:
        rows = study_nothing(Path(FIGURES, "nothing.png"), model, clean[:NOTHING], device)
        print(f"\nsamples from pure noise\n{utils.table(rows)}")


if __name__ == "__main__":
    utils.run_script(main, globals())

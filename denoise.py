"""Denoise images with a trained score network: one step, or back along the reverse-time SDE.

    python denoise.py                                   # five photographs, made noisy, with the shipped network
    python denoise.py --input photo.jpg                 # your own noisy picture: its noise level is estimated
    python denoise.py --input cifar10 --count 1000 --method mmse
    python denoise.py --help                            # every constant below is an option

Prints a table and writes the denoised images, a figure of the frames on the way, and an animation.
"""

import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import sde
import utils
from model import load_model

# -----------------------------------------------------------------------------
# images
INPUT = "samples"  # "samples" (five photographs), "cifar10" (its test images), or a path: image, .npy, or folder of them
COUNT = 16  # of "cifar10", a folder or an array, at most so many images
DATA_DIR = "data"  # folder that holds CIFAR-10, or gets it
OUTPUT = "output"  # folder for the denoised images
# noise
SIGMA = None  # standard deviation for pixels in [0, 1]; none: 0.1 where noise is added, else estimated from the image
ADD_NOISE = False  # add noise to a path's images too, as is always done to "samples" and "cifar10"
# method
CHECKPOINT = "checkpoints/score_cifar10.pt"  # written by train_score.py
METHOD = "sde"  # "mmse" (least error, one call), "sde" (a draw, natural texture), "ode" (between), "langevin" (the start)
STEPS = 50  # noise levels from sigma down to the lowest trained one ("sde", "ode"), or Langevin updates
LANGEVIN_STEP = 1e-4  # step size of "langevin"; its temperature is sigma^2
# run
SEED = 0  # of the noise added and of the draws; image i draws with seed SEED + i
DEVICE = "auto"  # "auto" (GPU if there is one), "cpu", "cuda", "cuda:1"
PRECISION = "auto"  # of the convolutions: "bfloat16", "float32", or "auto" (bfloat16 where the hardware has it)
BATCH_PIXELS = 2**18  # images of one size and noise level go through the network together, up to so many pixels
SHOWN = 3  # images in the figure and the animation
FRAMES = 3  # intermediate states in the figure
# -----------------------------------------------------------------------------


def denoise(method, model, y, sigma, seeds, callback, o):
    """Return the denoised images and the network calls this took; y (B, 3, H, W), sigma a float, one seed per image."""
    calls = 0

    def denoiser(x, s):
        nonlocal calls
        calls += 1
        return model(x, s)

    path = {"steps": o.steps, "sigma_min": model.sigma_min, "callback": callback}
    if method == "mmse":
        denoised = sde.tweedie(denoiser, y, sigma, callback=callback)
    elif method == "sde":
        denoised = sde.reverse_sde(denoiser, y, sigma, generator=seeds, **path)
    elif method == "ode":
        denoised = sde.probability_flow_ode(denoiser, y, sigma, **path)
    else:
        denoised = sde.langevin(denoiser, y, sigma, o.steps, o.langevin_step, generator=seeds, callback=callback)
    return denoised, calls


def choose_sigmas(names, noisy, added, model, o):
    """Return the noise level of each image: the one added, the one given, or an estimate. Raises ValueError."""
    low, high = model.sigma_min, model.sigma_max
    sigmas = []
    for name, y in zip(names, noisy):
        sigma = added or o.sigma
        if sigma is None:
            sigma = utils.estimate_sigma(y)
            print(f"{name}: noise level estimated at {sigma:.4f}" + (f", taken as the lowest trained, {low:g}" if sigma < low else ""))
            sigma = max(sigma, low)
        if not low <= sigma <= high:
            raise ValueError(f"noise level {sigma:g} of '{name}' is outside the range {low:g} to {high:g} that '{o.checkpoint}' was trained on")
        sigmas.append(sigma)
    return sigmas


def batches(noisy, sigmas, pixels):
    """Yield lists of indices of images that share their size and noise level, at most `pixels` pixels together."""
    groups = {}
    for i, (y, sigma) in enumerate(zip(noisy, sigmas)):
        groups.setdefault((y.shape, sigma), []).append(i)
    for (shape, _), indices in groups.items():
        size = max(1, pixels // (shape[0] * shape[1]))
        yield from (indices[k : k + size] for k in range(0, len(indices), size))


def main(o):
    for name in ("count", "steps", "batch_pixels", "langevin_step", "shown", "frames"):
        if not getattr(o, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, not {getattr(o, name)}")
    if o.sigma is not None and not o.sigma > 0:
        raise ValueError(f"--sigma must be positive, not {o.sigma}")
    if o.method not in ("mmse", "sde", "ode", "langevin"):
        raise ValueError(f"--method must be mmse, sde, ode or langevin, not '{o.method}'")
    device = utils.pick_device(o.device)
    bfloat16 = utils.pick_bfloat16(o.precision, device)
    model = load_model(o.checkpoint, device, bfloat16)
    if o.method in ("sde", "ode") and model.sigma_min == model.sigma_max:
        raise ValueError(f"--method {o.method} needs many noise levels, and '{o.checkpoint}' knows only {model.sigma_min:g}: use mmse or langevin")

    names, images = zip(*utils.read_images(o.input, o.data_dir)[: o.count])
    adds_noise = o.add_noise or o.input in ("samples", "cifar10")
    added = (o.sigma or 0.1) if adds_noise else None
    noisy = utils.add_noise(images, added, o.seed) if added else images
    sigmas = choose_sigmas(names, noisy, added, model, o)
    print(
        f"{len(images)} image{'s' * (len(images) > 1)} from {o.input}, noise "
        + (f"of standard deviation {added:g} added" if added else "already in them")
        + f"; {o.method} with {o.checkpoint} on {device} in {'bfloat16' if bfloat16 else 'float32'}"
    )

    frames = {i: [] for i in range(min(o.shown, len(images)))}  # (sigma, state, estimate of x0) at every level
    rows = [None] * len(images)  # {method: (image, network calls, seconds)}
    bar = tqdm(total=len(images) * (1 if o.method == "mmse" else o.steps), desc=o.method, unit="step", leave=False)
    for indices in batches(noisy, sigmas, o.batch_pixels):
        y = torch.from_numpy(np.stack([noisy[i] for i in indices])).permute(0, 3, 1, 2).to(device)
        one_step = []

        def callback(step, x_t, estimate, sigma):
            if step == 0:
                one_step.append(estimate)
            for k, i in enumerate(indices):
                if i in frames:
                    frames[i].append((sigma, utils.crop(to_array(x_t[k])), utils.crop(to_array(estimate[k]))))
            bar.update(len(indices))

        start = time.perf_counter()
        result, calls = denoise(o.method, model, y, sigmas[indices[0]], [o.seed + i for i in indices], callback, o)
        result = [to_array(x) for x in result]
        seconds = (time.perf_counter() - start) / len(indices)
        for k, i in enumerate(indices):
            rows[i] = {"noisy": (noisy[i], 0, 0.0), "mmse": (to_array(one_step[0][k]), 1, seconds / calls)}
            rows[i][o.method] = (result[k], calls, seconds)
    bar.close()

    clean = images if added else None
    print_table(names, sigmas, rows, clean)
    write_results(o, names, rows)
    draw(o, names, sigmas, noisy, frames, rows, clean)


def to_array(x):  # (3, H, W) tensor -> (H, W, 3) array
    return x.permute(1, 2, 0).cpu().numpy()


def print_table(names, sigmas, rows, clean):
    """Print a line per image and method, and the means; of many images the means alone. PSNR only if clean is known."""
    width = max(9, *(len(name) for name in names))
    print(f"{'image':{width}}  {'noise':>6}  {'method':8}  {'PSNR dB':>7}  {'SSIM':>5}  {'calls':>5}  {'seconds':>8}")
    means = {}
    for i, (name, sigma) in enumerate(zip(names, sigmas)):
        for method, (image, calls, seconds) in rows[i].items():
            quality = (utils.psnr(image, clean[i]), utils.ssim(image, clean[i])) if clean else (None, None)
            line = (sigma, *quality, calls, seconds)
            means.setdefault(method, []).append(line)
            if len(names) <= 16:
                print_line(name, width, method, line)
    if len(names) > 1:
        for method, lines in means.items():
            columns = zip(*lines)
            print_line(f"mean of {len(lines)}", width, method, [None if c[0] is None else float(np.mean(c)) for c in columns])


def print_line(name, width, method, line):
    sigma, psnr, ssim, calls, seconds = line
    quality = f"{'-':>7}  {'-':>5}" if psnr is None else f"{psnr:7.2f}  {ssim:5.3f}"
    print(f"{name:{width}}  {sigma:6.4f}  {method:8}  {quality}  {calls:5.0f}  {seconds:8.4f}")


def write_results(o, names, rows):
    for name, row in zip(names, rows):
        utils.save_image(Path(o.output, f"{name}_{o.method}.png"), row[o.method][0])
    print(f"wrote {len(names)} image{'s' * (len(names) > 1)} to '{o.output}'")


def draw(o, names, sigmas, noisy, frames, rows, clean):
    """Write the figure (noisy, states on the way, one step, result, clean) and the animation (states and estimates)."""
    grid, strips = [], []
    for i, levels in frames.items():

        def scored(title, image, i=i):
            return title, utils.crop(image), f"{utils.psnr(image, clean[i]):.2f} dB" if clean else ""

        picked = sorted({round(k * (len(levels) - 1) / (o.frames + 1)) for k in range(1, o.frames + 1)} - {0})
        states = [(f"step {k}", levels[k][1], f"$\\sigma$ = {levels[k][0]:.3g}") for k in picked]
        results = [scored("one step" if m == "mmse" else m, image) for m, (image, _, _) in rows[i].items() if m != "noisy"]
        truth = [("clean", utils.crop(clean[i]), "")] if clean else []
        grid.append([("noisy", utils.crop(noisy[i]), f"$\\sigma$ = {sigmas[i]:.3g}"), *states, *results, *truth])
        strips.append([*levels, (0.0, utils.crop(rows[i][o.method][0]), utils.crop(rows[i][o.method][0]))])
    path = Path("figures", f"denoise_{Path(o.input).stem}_{o.method}.jpg")
    utils.plot_grid(path, grid)
    utils.save_animation(path.with_suffix(".gif"), strips)
    print(f"wrote '{path}' and '{path.with_suffix('.gif')}'")


if __name__ == "__main__":
    utils.run_script(main, globals())

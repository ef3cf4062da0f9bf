"""Denoise images with a trained score network: one step, or back along the reverse-time SDE.

    python denoise.py                                   # five photographs, made noisy, with the shipped network
    python denoise.py --input photo.jpg                 # your own noisy picture: its noise level is estimated
    python denoise.py --input cifar10 --count 1000 --method mmse
    python denoise.py --help                            # every constant below is an option

Prints a table and writes the denoised images, a figure of the frames on the way, and an animation.
"""

import functools
import math
import time
import zlib
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
COUNT = 1000  # at most so many images
DATA_DIR = "data"  # folder that holds CIFAR-10, or gets it
OUTPUT = "output"  # folder for the denoised images, the figure and the animation
# noise
SIGMA = None  # standard deviation for pixels in [0, 1]; none: 0.1 where noise is added, else estimated from the image
ADD_NOISE = False  # add noise to a path's images too, as is always done to "samples" and "cifar10"
# method
CHECKPOINT = "checkpoints/score_cifar10.pt"  # written by train_score.py
METHOD = "sde"  # "mmse" (least error, one call), "sde" (a draw, natural texture), "ode" (no draw, sharp); see `samplers` for more
STEPS = 20  # noise levels from sigma down to the lowest trained one
RHO = 7.0  # they are even in sigma^(1 / RHO); math.inf: in log sigma
TEXTURE = 1.0  # 1 follows the SDE to its end; less stops early, at sigma^(1 - TEXTURE) lowest^TEXTURE; 0 is "mmse"
LANGEVIN_STEPS = 100  # updates of "langevin", the recipe this project starts from
LANGEVIN_STEP_SIZE = 1e-4  # of each, made for sigma 0.1; the temperature is sigma^2
# run
SEED = 0  # of the noise added and, with the noisy image itself, of its draw: the same image gets the same draw in any company
DEVICE = "auto"  # "auto" (GPU if there is one), "cpu", "cuda", "cuda:1"
PRECISION = "auto"  # of the convolutions: "bfloat16", "float32", or "auto" (bfloat16 where the hardware has it)
BATCH_PIXELS = 2**18  # pixels that go through the network at a time: many small images, or a tile of a large one
SHOWN = 3  # images in the figure and the animation
FRAMES = 3  # intermediate states in the figure
# -----------------------------------------------------------------------------


samplers = {
    "mmse": sde.tweedie,  # E[x0 | y]
    "sde": sde.adams,  # the reverse-time SDE, second order
    "ode": functools.partial(sde.adams, eta=0.0),  # the probability-flow ODE, second order
    "euler": sde.reverse_sde,  # the reverse-time SDE, first order, as in the textbook
    "heun": sde.probability_flow_ode,  # the probability-flow ODE, as in the textbook
    "ddim": sde.ddim,  # ancestral sampling
    "edm": sde.edm,
    "pc": sde.predictor_corrector,
    "annealed": sde.annealed_langevin,
    "langevin": sde.langevin,  # the original recipe; forgets the image if it runs on
}


def tiled(model, x, sigma, pixels, halo=64):
    """Return model(x, sigma), computed in tiles of about `pixels` pixels where x (B, 3, H, W) has more.

    Each tile sees `halo` pixels around it, more than the network's reach, and starts on its coarsest grid, so the seams
    differ from the whole by rounding alone.
    """
    height, width = x.shape[2:]
    size = max(64, math.isqrt(pixels) - 2 * halo) // 16 * 16
    if height * width <= pixels:
        return model(x, sigma)
    out = torch.empty_like(x)
    for top in range(0, height, size):
        for left in range(0, width, size):
            up, back = min(top, halo), min(left, halo)
            part = x[:, :, top - up : top + size + halo, left - back : left + size + halo]
            out[:, :, top : top + size, left : left + size] = model(part, sigma)[:, :, up : up + size, back : back + size]
    return out


def denoise(model, y, sigma, seeds, callback, o):
    """Return the denoised images and the network calls this took; y (B, 3, H, W), sigma a float, one seed per image."""
    calls = 0

    def denoiser(x, s):
        nonlocal calls
        calls += 1
        return tiled(model, x, s, o.batch_pixels)

    stop = sigma * (model.sigma_min / sigma) ** o.texture
    options = {"steps": o.steps, "rho": o.rho, "sigma_min": stop, "generator": seeds}
    if o.method == "mmse":
        options = {}
    elif o.method == "langevin":
        options = {"steps": o.langevin_steps, "step_size": o.langevin_step_size, "generator": seeds}
    return samplers[o.method](denoiser, y, sigma, callback=callback, **options), calls


def image_seed(y, seed):
    """Return the seed of the draw of a noisy image, an array (H, W, 3): of its pixels and `seed`, not of its place in a list."""
    return zlib.crc32(y.tobytes(), seed % 2**32)


def choose_sigmas(names, noisy, added, model, o):
    """Return the noise level of each image: the one added, the one given, or an estimate. Raises ValueError."""
    low, high = model.sigma_min, model.sigma_max
    sigmas = []
    for name, y in zip(names, noisy):
        sigma = added or o.sigma
        if sigma is None:
            sigma = utils.estimate_sigma(y)
            note = f", taken as the lowest trained, {low:g}" if sigma < low else ""
            print(f"{name}: noise level estimated at {sigma:.4f}{note}")
            sigma = max(sigma, low)
        if not low <= sigma <= high:
            trained = f"the range {low:g} to {high:g} that '{o.checkpoint}' was trained on"
            raise ValueError(f"noise level {sigma:g} of '{name}' is outside {trained}")
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


def watch(indices, x0, count, bar):
    """Return a sampler's callback, which moves the bar, and what it keeps of the batch of images with these indices.

    frames: {index: [(sigma, state, estimate of x0) at every level]} of images below `count`, the middle of each; curves: the
    same for [step, sigma, PSNR of the state, of the estimate], the PSNR None where x0 is None. All stays on its device: the
    loop waits for nothing.
    """
    frames, curves = {i: [] for i in indices if i < count}, {i: [] for i in indices if i < count}

    def callback(step, x_t, estimate, sigma):
        for k, i in enumerate(indices):
            if i in frames:
                frames[i].append((sigma, utils.middle(x_t[k]), utils.middle(estimate[k])))
                pair = (x_t[k : k + 1], estimate[k : k + 1])
                quality = [None, None] if x0 is None else [utils.psnr(x, x0[k : k + 1]) for x in pair]
                curves[i].append([step, sigma, *quality])
        bar.update(len(indices))

    return callback, frames, curves


def main(o):
    for name in ("count", "steps", "rho", "langevin_steps", "langevin_step_size", "batch_pixels", "shown", "frames"):
        if not getattr(o, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, not {getattr(o, name)}")
    if o.sigma is not None and not o.sigma > 0:
        raise ValueError(f"--sigma must be positive, not {o.sigma}")
    if not 0 <= o.texture <= 1:
        raise ValueError(f"--texture must lie between 0 and 1, not {o.texture}")
    if o.method not in samplers:
        raise ValueError(f"--method must be one of {', '.join(samplers)}, not '{o.method}'")
    device = utils.pick_device(o.device)
    bfloat16 = utils.pick_bfloat16(o.precision, device)
    model = load_model(o.checkpoint, device, bfloat16)
    if o.method not in ("mmse", "langevin") and model.sigma_min == model.sigma_max:
        level = f"'{o.checkpoint}' knows only {model.sigma_min:g}"
        raise ValueError(f"--method {o.method} needs many noise levels, and {level}: use mmse or langevin")

    found = utils.read_images(o.input, o.data_dir)
    names, images = zip(*found[: o.count])
    adds_noise = o.add_noise or o.input in ("samples", "cifar10")
    added = (o.sigma or 0.1) if adds_noise else None
    noisy = utils.add_noise(images, added, o.seed) if added else images
    sigmas = choose_sigmas(names, noisy, added, model, o)
    print(
        f"{len(images)} of {len(found)} images from {o.input}, noise "
        + (f"of standard deviation {added:g} added" if added else "already in them")
        + f"; {o.method} with {o.checkpoint} on {device} in {'bfloat16' if bfloat16 else 'float32'}"
    )

    rows = [None] * len(images)  # {method: (PSNR, SSIM, network calls, seconds)}
    shown = {}  # of the first images, as thumbnails: (sigma, noisy, frames of `watch`, one step, result, clean)
    levels = {"mmse": 1, "langevin": o.langevin_steps, "pc": 2 * o.steps - 1}.get(o.method, o.steps)
    bar = tqdm(total=len(images) * levels, desc=o.method, unit="step", leave=False)
    for indices in batches(noisy, sigmas, o.batch_pixels):
        y, x0 = (to_tensor([stack[i] for i in indices], device) for stack in (noisy, images))
        callback, frames, curves = watch(indices, x0 if added else None, o.shown, bar)
        sigma, seeds = sigmas[indices[0]], [image_seed(noisy[i], o.seed) for i in indices]
        start = time.perf_counter()
        result, calls = denoise(model, y, sigma, seeds, callback, o)
        result = result.cpu()  # waits for the GPU
        seconds = (time.perf_counter() - start) / len(indices)
        one_step, one_step_seconds = result, seconds
        if o.method != "mmse":
            start = time.perf_counter()
            one_step = tiled(model, y, sigma, o.batch_pixels).cpu()
            one_step_seconds = (time.perf_counter() - start) / len(indices)

        x0, y = x0.cpu(), y.cpu()
        steps = {"noisy": (y, 0, 0.0), "mmse": (one_step, 1, one_step_seconds), o.method: (result, calls, seconds)}
        for method, (batch, calls, seconds) in steps.items():
            quality = zip(utils.psnr(batch, x0).tolist(), utils.ssim(batch, x0)) if added else [(None, None)] * len(indices)
            for i, (psnr, ssim) in zip(indices, quality):
                rows[i] = (rows[i] or {}) | {method: (psnr, ssim, calls, seconds)}
        for k, i in enumerate(indices):
            utils.save_image(Path(o.output, f"{names[i]}_{o.method}.png"), result[k])
            if i in frames:
                noisy_i, estimate, final, clean = (utils.thumbnail(batch[k]) for batch in (y, one_step, result, x0))
                strip = [(s, utils.thumbnail(state), utils.thumbnail(guess)) for s, state, guess in frames[i]]
                shown[i] = sigma, noisy_i, strip, estimate, final, clean
                table = [["step", "sigma", "psnr_state", "psnr_estimate"]]
                for step, s, *pair in curves[i]:
                    table.append([step, f"{s:.6g}", *("" if psnr is None else f"{psnr.item():.4f}" for psnr in pair)])
                utils.save_csv(Path(o.output, f"{names[i]}_{o.method}.csv"), table)
    bar.close()

    print_table(names, sigmas, rows)
    print(f"wrote {len(names)} image{'s' * (len(names) > 1)} to '{o.output}'")
    draw([shown[i] for i in sorted(shown)], [rows[i] for i in sorted(shown)], added, o)


def to_tensor(images, device):  # list of (H, W, 3) arrays -> (B, 3, H, W)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device)


def print_table(names, sigmas, rows):
    """Print a line per image and method, and the means; of many images the means alone. No PSNR where the truth is unknown."""
    width = max(12, *(len(name) for name in names))
    print(f"{'image':{width}}  {'noise':>6}  {'method':8}  {'PSNR dB':>7}  {'SSIM':>5}  {'calls':>5}  {'seconds':>8}")
    lines = [(name, method, (sigma, *row[method])) for name, sigma, row in zip(names, sigmas, rows) for method in row]
    if len(names) > 1:
        for method in rows[0]:
            columns = zip(*[values for _, m, values in lines if m == method])
            means = [None if column[0] is None else float(np.mean(column)) for column in columns]
            lines.append((f"mean of {len(names)}", method, means))
    for name, method, (sigma, psnr, ssim, calls, seconds) in lines if len(names) <= 16 else lines[-len(rows[0]) :]:
        quality = f"{'-':>7}  {'-':>5}" if psnr is None else f"{psnr:7.2f}  {ssim:5.3f}"
        print(f"{name:{width}}  {sigma:6.4f}  {method:8}  {quality}  {calls:5.0f}  {seconds:8.4f}")


def draw(shown, rows, added, o):
    """Write the figure (noisy, states on the way, one step, result, clean) and the animation (states and estimates)."""
    grid = []
    for (sigma, noisy, frames, one_step, result, clean), row in zip(shown, rows):
        scores = {method: "" if psnr is None else f"{psnr:.2f} dB" for method, (psnr, *_) in row.items()}
        columns = [("noisy", noisy, f"$\\sigma$ = {sigma:.3g}")]
        if o.method != "mmse":
            for k in range(1, o.frames + 1):
                step = round(k * (len(frames) - 1) / (o.frames + 1))
                columns.append((f"step {step}", frames[step][1], f"$\\sigma$ = {frames[step][0]:.3g}"))
            columns.append(("one step", one_step, scores["mmse"]))
        columns.append((o.method, result, scores[o.method]))
        grid.append(columns + ([("clean", clean, "")] if added else []))
    path = Path(o.output, f"{Path(o.input).stem}_{o.method}_frames.jpg")
    utils.plot_grid(path, grid)
    utils.save_animation(path.with_suffix(".gif"), [[*frames, (0.0, result, result)] for _, _, frames, _, result, _ in shown])
    print(f"wrote '{path}' and '{path.with_suffix('.gif')}'")


if __name__ == "__main__":
    utils.run_script(main, globals())

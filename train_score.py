"""Train a score network on noised images with the denoising score-matching loss (Vincent 2011).

    python train_score.py                               # CIFAR-10, the network in checkpoints/
    python train_score.py --data PATH --name mine       # any folder of images and .npy arrays
    python train_score.py --network cnn3 --sigmas 0.1 --optimizer adam --lr 1e-4 --decay 0 \\
        --ema 0 --clip inf --batch-size 64 --epochs 200 --name cnn3       # the recipe
    python train_score.py --help                        # every constant below is an option

For clean images x0 and x = x0 + sigma n, the loss is the mean over images and noise levels of

    lambda(sigma) |score(x, sigma) - (x0 - x) / sigma^2|^2
        = lambda(sigma) / sigma^4 |D(x, sigma) - x0|^2.

Ctrl-C saves and stops; a crash loses the time since the last save. The same command goes on as if
it had not stopped (on a GPU, to rounding), and with more --epochs beyond the end. `torchrun
--nproc-per-node=N train_score.py` shares each batch among N processes, a GPU for each where there
are any, with the result of one to rounding.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends quietly while the modules load

import atexit
import contextlib
import copy
import math
import re
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import utils
from model import ScoreModel, load_checkpoint, load_model

# -----------------------------------------------------------------------------
# data
DATA = "cifar10"  # "cifar10" (downloaded on first use), "samples" (photographs), or a path
TEST = "none"  # "cifar10" (its test images) or a path: the first 1,000 are measured at the end
VAL_IMAGES = 500  # the last images of the data are never trained on, and validate
CROP = 32  # side in pixels of a random crop of each image; smaller images are left out
VIEWS = 2  # 1: each crop as it is; 2: or mirrored; 8: and turned, which helps where images are few
SHRINK = 1  # shrink images up to so many times before the crop, at random: shows more scales
# network
NETWORK = "unet"  # "unet" (all noise levels) or "cnn3" (three convolutions, one noise level)
WIDTHS = (64, 96, 128)  # unet: channels per resolution, finest first; multiples of 32 are fastest
BLOCKS = (1, 3, 2)  # unet: residual blocks per resolution
ATTENTION = (0, 1, 1)  # unet: 1 where a resolution has an attention layer, on the way up
INIT = "none"  # checkpoint to start from, to fine-tune it on other images; "none": random weights
# noise
SIGMAS = (0.005, 20.0)  # lowest and highest noise level, for pixels in [0, 1]; or a single one
TAILS = 0.05  # share of the levels below 0.015, and of those above 0.7; log-uniform in each part
# optimiser
OPTIMIZER = "muon"  # "muon" (for the hidden convolutions, Adam for the rest) or "adam" (for all)
EPOCHS = 226  # passes over the data; on a CPU: 26, in batches of 32 at a rate of 3e-3
BATCH_SIZE = 512  # images per step
LR = 4e-3  # learning rate: Muon moves a weight by 0.2 LR a step, Adam by about as much
DECAY = 0.8  # last fraction of the steps, over which the rate falls to 0; 0: constant throughout
CLIP = 5.0  # largest norm of a gradient; twice the usual: a rare outlier would steer Muon for long
EMA = 0.999  # decay per step of the averaged weights, which are the ones kept; 0 keeps the last
# run
NAME = "score"  # of checkpoints/NAME.pt and figures/NAME_training.png
SEED = 0  # decides weights, order, crops and noise
DEVICE = "auto"  # "auto" (GPU if there is one), "cpu", "cuda", "cuda:1"
PRECISION = "auto"  # of the network: "bfloat16", "float32"; "auto": bfloat16 if the hardware has it
COMPILE = False  # takes a minute and a C compiler; a GPU then trains almost three times as fast
SAVE_MINUTES = 5.0  # minutes between saves
# -----------------------------------------------------------------------------


def denoising_loss(model, x0, sigma, noise):
    """Return the score-matching loss with lambda = sigma^4 / typical_error(sigma).

    The gradient is then about that of the mean over noise levels of log MSE, so of PSNR, which
    gives every noise level about the same weight. x0, noise: (B, 3, H, W). sigma: (B,).
    """
    s = sigma[:, None, None, None]
    x = x0 + s * noise
    return ((model(x, sigma) - x0) ** 2 / typical_error(s)).mean()


def typical_error(sigma):
    """Return about the mean squared error of a good denoiser on CIFAR-10, by a fitted formula."""
    return sigma**2 / (1 + sigma / 0.014 + sigma**2 / 0.07)


def noise_law(u, low, high, tails):
    """Return the noise levels, from low to high, at the quantiles u in [0, 1].

    A share `tails` lies below 0.015 and as many above 0.7, and they are log-uniform in each part.
    """
    utils.check(0 < tails < 0.5, "TAILS", tails, "must lie between 0 and 0.5")
    law = [(0, low), (tails, 0.015), (1 - tails, 0.7), (1, high)]
    inner = [(v, s) for v, s in law[1:3] if low < s < high]
    quantiles, sigmas = zip(law[0], *inner, law[3])
    return np.exp(np.interp(u, quantiles, np.log(sigmas)))


# -----------------------------------------------------------------------------
# Batches
# -----------------------------------------------------------------------------


def make_batch(images, step, rank=0, world=1, device="cpu"):
    """Return this process's share of x0, sigma and noise of one step.

    The whole batch depends on SEED and step alone. images: uint8 (H, W, 3), sides at least CROP.
    """
    rng = np.random.default_rng([SEED, 1, step])
    index = images_of_step(len(images), step, BATCH_SIZE, SEED)
    x0 = random_crops([images[k] for k in index], CROP, VIEWS, SHRINK, rng).to(device) / 255
    # One quantile from each of B equal slices: the same law as independent ones, less variance.
    u = (np.arange(BATCH_SIZE) + rng.random(BATCH_SIZE)) / BATCH_SIZE
    sigma = torch.tensor(noise_law(u, SIGMAS[0], SIGMAS[-1], TAILS), dtype=torch.float32).to(device)
    noise_rng = torch.Generator(device).manual_seed(int(rng.integers(2**32)))
    noise = torch.randn(x0.shape, generator=noise_rng, device=device)
    return x0[rank::world], sigma[rank::world], noise[rank::world]


def images_of_step(count, step, batch_size, seed):
    """Return which of `count` images a step takes.

    They are the next B of an endless stream, in which each pass over the images has its own order.
    """
    first = step * batch_size
    passes = range(first // count, (first + batch_size - 1) // count + 1)
    stream = [np.random.default_rng([seed, 0, number]).permutation(count) for number in passes]
    return np.concatenate(stream)[first % count :][:batch_size]


def random_crops(images, size, views, shrink, rng):
    """Return a random crop of each of these B images: uint8 (B, 3, size, size).

    views: 1: as it is; 2: mirrored with probability 1/2; 8: also turned by quarter turns. shrink:
    the pixels are means of k x k, k = floor(1/u) for u uniform in [1/(shrink + 1), 1], or the most
    that the image is large enough for.
    """
    utils.check(shrink >= 1, "SHRINK", shrink, "must be at least 1")
    count, crops = len(images), []
    shares = rng.uniform(1 / (shrink + 1), 1, count)
    draws = zip(images, shares, rng.random((count, 2)), rng.integers(views, size=count))
    for image, share, place, view in draws:
        height, width = image.shape[:2]
        k = min(int(1 / share), shrink, height // size, width // size)
        side = k * size
        top, left = int(place[0] * (height - side + 1)), int(place[1] * (width - side + 1))
        crop = image[top : top + side, left : left + side]
        if k > 1:
            crop = crop.reshape(size, k, size, k, 3).mean((1, 3)).round().astype(np.uint8)
        crop = np.rot90(crop, view // 2)
        crops.append(crop[:, ::-1] if view % 2 else crop)
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)  # in channels_last


# -----------------------------------------------------------------------------
# The optimisers
# -----------------------------------------------------------------------------


def learning_rate(step, steps, lr, decay):
    """Return the rate of a step: it rises over 500 steps, at most a tenth of all, to lr.

    Over the last fraction `decay` of the steps it falls to 0; with decay 0 it is lr throughout.
    """
    if decay == 0:
        return lr
    rise = (step + 1) / min(500, steps / 10)
    fall = (1 - step / steps) / decay
    return lr * min(1, rise, fall)


def make_optimizers(model, optimizer, lr):
    """Return the optimisers that together train the model, by their names.

    Muon trains the convolutions but the first and the last, which meet the pixels. Adam trains the
    rest. Its average of squares is then as short as Muon's momentum, so that it notices a lone
    image at a high noise level, whose gradient is a hundred times the usual one.
    """
    utils.check(optimizer in ("muon", "adam"), "OPTIMIZER", optimizer, "must be muon or adam")
    if optimizer == "adam":
        return {"adam": torch.optim.Adam(model.parameters(), lr=lr, fused=True)}
    hidden = [p for p in model.parameters() if p.ndim == 4][1:-1]
    rest = [p for p in model.parameters() if all(p is not weight for weight in hidden)]
    adam = torch.optim.Adam(rest, lr=lr, betas=(0.9, 0.95), fused=True)
    dtype = torch.bfloat16 if model.autocast else torch.float32
    return {"adam": adam, "muon": Muon(hidden, lr, dtype)}


class Muon(torch.optim.Optimizer):
    """Move each weight along the orthogonal matrix nearest to its momentum (Jordan et al. 2024).

    So all its directions learn at one pace. A convolution (out, in, h, w) is a matrix (out, in * h
    * w), which torch.optim.Muon does not take. The momentum is 0.95, the length of a step Adam's
    and the weight decay 0.1 (Liu et al. 2025, eq. 4). dtype: of the matrix products.
    """

    def __init__(self, weights, lr, dtype=torch.float32):
        super().__init__(weights, {"lr": lr})
        self.dtype = dtype
        for weight in weights:
            self.state[weight]["mean"] = torch.zeros_like(weight)

    @torch.no_grad()
    def step(self):
        lr = self.param_groups[0]["lr"]
        for weight in self.param_groups[0]["params"]:
            mean = self.state[weight]["mean"].lerp_(weight.grad, 0.05)
            update = weight.grad.lerp(mean, 0.95).flatten(1)  # Nesterov's look-ahead
            length = lr * 0.2 * max(update.shape) ** 0.5
            update = orthogonal(update.to(self.dtype))
            weight.mul_(1 - 0.1 * lr).sub_(update.view_as(weight), alpha=length)


def orthogonal(x):
    """Return nearly the nearest orthogonal matrix to x: singular values from 0.7 to 1.2."""
    if x.shape[0] > x.shape[1]:
        return orthogonal(x.T).T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):  # Newton-Schulz iterations
        gram = x @ x.T
        factor = torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.addmm(x, factor, x, beta=3.4445)  # a s + b s^3 + c s^5 of each singular value s
    return x


@torch.no_grad()
def update_average(average, model, step, ema):
    """Move the averaged weights towards the model's, at first faster, to forget the start."""
    decay = min(ema, (step + 1) / (step + 10))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


# -----------------------------------------------------------------------------
# What is measured and kept
# -----------------------------------------------------------------------------


@torch.no_grad()
def validate(model, images, step, kind="val"):
    """Return and say {noise level: mean over images of the one-step PSNR in dB}.

    images: uint8 (N, 3, H, W). The noise is the same every time, one field for all levels.
    """
    x0, denoiser, usual = images / 255, utils.tiled(model), (0.02, 0.05, 0.1, 0.2, 0.5)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0.device)
    sigmas = [s for s in usual if model.sigma_min <= s <= model.sigma_max] or [model.sigma_max]
    means, words = {}, f"step {step}: {kind} PSNR"
    for sigma in sigmas:
        denoised = denoiser(x0 + sigma * noise, sigma)
        means[sigma] = utils.psnr(denoised.cpu(), x0.cpu()).mean().item()
        words += f"  {means[sigma]:.2f} dB at {sigma:g}"
    say(words)
    return means


def mean_loss(run):
    return sum(map(float, run["recent"])) / max(1, len(run["recent"]))


def check_divergence(run, model):
    """Raise ValueError if the loss or a weight shows that the training diverged."""
    finite = all(weight.isfinite().all() for weight in model.parameters())
    if not (mean_loss(run) < 1e4 and finite):  # an untrained network's is about 10, a good one's 1
        words = "what was saved is kept, lower --lr"
        raise ValueError(f"the training diverged before step {run['step']}: {words}")


def files_of(name):
    """Return the files of a training: the network, what it goes on from, and its curves."""
    words = "must be up to 100 letters, digits, '.', '-' and '_'"
    utils.check(re.fullmatch(r"\w[\w.-]{0,99}", name), "NAME", repr(name), words)
    folder = Path("checkpoints")
    return folder / f"{name}.pt", folder / f"{name}_resume.pt", Path(f"figures/{name}_training.png")


def save(run, parts, network, resume, figure):
    """Write what the training goes on from, then the network and its curves."""
    check_divergence(run, parts["model"])
    run["hours_saved"] = run["hours"]
    states = {name: part.state_dict() for name, part in parts.items()}
    utils.save_checkpoint(resume, states | {"run": run})
    config = parts["model"].config
    utils.save_checkpoint(network, {"config": config, "weights": states["average"], "info": run})
    utils.plot_training(figure, run["losses"], run["psnrs"])


def start_or_resume(images, hardware, parts, network, resume):
    """Return the numbers of a training: new ones or, with the states of its parts, the saved ones.

    losses: [[images seen, mean loss], ...]. recent: the losses since. psnrs: [[images seen, {noise
    level: PSNR in dB}], ...]. Raises ValueError if another training was saved there.
    """
    now = {"options": utils.options(globals()), "hardware": hardware}
    now |= {"torch": str(torch.__version__)}
    checksum = 0
    for image in images:
        checksum = zlib.crc32(image.tobytes(), checksum)
    if not resume.exists():
        if network.exists():
            raise ValueError(f"'{network}' exists, but not '{resume.name}': choose another --name")
        run = {"step": 0, "images_seen": 0, "hours": 0.0, "hours_saved": 0.0}
        run |= {"recent": [], "losses": [], "psnrs": [], "test_psnr": {}}
        return run | {"training_images": len(images), "checksum": checksum} | now
    kept = load_checkpoint(resume)
    run = kept.get("run", {"options": {}})
    free = "epochs", "lr", "data", "test", "name", "device", "precision", "compile", "save_minutes"
    for name, value in now["options"].items():
        was = run["options"].get(name)
        words = f"was {was} in '{resume}' (choose another --name)"
        utils.check(name in free or was == value, name, value, words)
    if run["checksum"] != checksum:
        raise ValueError(f"'{resume}' was trained on other images: choose another --name")
    for name, part in parts.items():
        part.load_state_dict(kept[name])
    return run | now


# -----------------------------------------------------------------------------
# The training
# -----------------------------------------------------------------------------


def join_processes():
    """Return the number of this process, from 0, and how many torchrun has started."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    dist.init_process_group()
    atexit.register(dist.destroy_process_group)  # else its threads may abort the process's end
    return dist.get_rank(), dist.get_world_size()


def total(number):
    """Return the sum over all processes, which wait here for each other."""
    number = torch.as_tensor(number, dtype=torch.float32)
    if dist.is_initialized():
        dist.all_reduce(number)
    return number


def note_signals():
    """Return a list of the signals that come from now on: so Ctrl-C cuts no step in half."""
    received = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: received.append(number))
    return received


def say(text):
    if not dist.is_initialized() or dist.get_rank() == 0:  # the first process speaks for all
        tqdm.write(text)


def check_options(world):
    """Raise ValueError for what nothing below would notice."""
    words = f"must be a positive multiple of the number of processes, {world}"
    utils.check(BATCH_SIZE > 0 and BATCH_SIZE % world == 0, "BATCH_SIZE", BATCH_SIZE, words)
    utils.check(len(SIGMAS) <= 2, "SIGMAS", SIGMAS, "must be the lowest and the highest, or one")
    utils.check(CLIP > 0, "CLIP", CLIP, "must be positive")
    utils.check(EPOCHS > 0, "EPOCHS", EPOCHS, "must be positive")
    utils.check(0 <= DECAY <= 1, "DECAY", DECAY, "must lie between 0 and 1")
    utils.check(0 <= EMA < 1, "EMA", EMA, "must lie between 0 and 1")
    utils.check(VIEWS in (1, 2, 8), "VIEWS", VIEWS, "must be 1, 2 or 8")


def build_model(device):
    """Return the network, random or from INIT, and the same compiled and for several processes."""
    torch.manual_seed(SEED)
    torch.backends.cudnn.benchmark = True  # a GPU tries which convolution is fastest
    model = ScoreModel(NETWORK, SIGMAS[0], SIGMAS[-1], WIDTHS, BLOCKS, ATTENTION).to(device)
    model.autocast = utils.pick_bfloat16(PRECISION, device)
    if INIT != "none":
        init = load_model(INIT)
        if init.config != model.config:
            raise ValueError(f"--init '{INIT}' is another network: {init.config}")
        model.load_state_dict(init.state_dict())
    network = torch.compile(model, dynamic=False, mode="reduce-overhead") if COMPILE else model
    if dist.is_initialized():
        network = DistributedDataParallel(network)  # averages the gradients over the processes
    return model, network


def read_data(rank, device):
    """Return the images to train on, and uint8 (N, 3, CROP, CROP) to validate and to test."""
    if rank > 0:
        dist.barrier()  # the first process reads before the others: it may have to download
    images, tests = utils.training_images(DATA, smallest=CROP, notify=say), []
    if TEST != "none":
        tests = utils.training_images(TEST, train=False, smallest=CROP, notify=say)[:1000]
    if rank == 0 and dist.is_initialized():
        dist.barrier()
    words = f"must leave some of the {len(images)} images of '{DATA}' to train on"
    utils.check(0 < VAL_IMAGES < len(images), "VAL_IMAGES", VAL_IMAGES, words)
    return images[:-VAL_IMAGES], middle(images[-VAL_IMAGES:], device), middle(tests, device)


def middle(images, device):
    crops = [utils.crop(torch.tensor(image).permute(2, 0, 1), CROP) for image in images]
    return torch.stack(crops).to(device) if crops else []


def progress_bar(run, model, steps, rank):
    """Say what is trained, and return a bar for its images."""
    count = sum(p.numel() for p in model.parameters())
    say(f"{NETWORK}, {count:,} parameters, on {run['hardware']}")
    say(f"{run['training_images']:,} training images, {steps:,} steps, from step {run['step']:,}")
    hidden = rank > 0 or None  # None: where stderr is no terminal
    images = steps * BATCH_SIZE
    return tqdm(total=images, initial=run["images_seen"], unit="img", disable=hidden)


def say_end(run, steps, network):
    if run["step"] < steps:
        say(f"stopped after step {run['step']} of {steps}, saved: the same command goes on")
        sys.exit(130)
    say(f"{run['images_seen']:,} images seen, wrote '{network}' and its curves")


def main():
    rank, world = join_processes()
    check_options(world)
    device, files = utils.pick_device(DEVICE), files_of(NAME)
    images, val, test = read_data(rank, device)
    model, network = build_model(device)
    average, optimizers = copy.deepcopy(model), make_optimizers(model, OPTIMIZER, LR)
    parts = {"model": model, "average": average, **optimizers}
    steps = math.ceil(EPOCHS * len(images) / BATCH_SIZE)
    log_steps, val_steps = max(1, min(100, steps // 10)), max(1, steps // 20)

    with utils.locked(*files) if rank == 0 else contextlib.nullcontext():
        run = start_or_resume(images, utils.hardware(device, world), parts, *files[:2])
        bar, signals = progress_bar(run, model, steps, rank), note_signals()
        began = time.perf_counter() - 3600 * run["hours"]
        for step in range(run["step"], steps):
            x0, sigma, noise = make_batch(images, step, rank, world, device)
            loss = denoising_loss(network, x0, sigma, noise)
            model.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            for optimizer in optimizers.values():
                optimizer.param_groups[0]["lr"] = learning_rate(step, steps, LR, DECAY)
                optimizer.step()
            update_average(average, model, step, EMA)

            run["step"], run["images_seen"] = step + 1, (step + 1) * BATCH_SIZE
            run["hours"] = (time.perf_counter() - began) / 3600
            run["recent"].append(total(loss.detach()) / world)
            bar.update(BATCH_SIZE)
            if run["step"] % log_steps == 0:
                check_divergence(run, model)
                run["losses"].append([run["images_seen"], mean_loss(run)])
                run["recent"] = []
                bar.set_postfix(loss=f"{run['losses'][-1][1]:.4f}")
            if rank == 0 and (steps - run["step"]) % val_steps == 0:
                run["psnrs"].append([run["images_seen"], validate(average, val, step + 1)])
            if rank == 0 and run["hours"] - run["hours_saved"] > SAVE_MINUTES / 60:
                save(run, parts, *files)
            if total(len(signals)):  # to any of the processes
                break
        if rank == 0 and run["step"] >= steps and len(test):
            run["test_psnr"] = validate(average, test, run["step"], "test")
        if rank == 0:
            save(run, parts, *files)
    say_end(run, steps, files[0])


if __name__ == "__main__":
    utils.run_script(main, globals())

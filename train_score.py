"""Train a score network on noised images with the denoising score-matching loss (Vincent 2011).

    python train_score.py                               # CIFAR-10, the network in checkpoints/
    python train_score.py --data PATH --name mine       # any folder of images and .npy arrays
    python train_score.py --network cnn3 --sigmas 0.1 --optimizer adam --lr 1e-4 --decay 0 \\
        --ema 0 --clip inf --batch-size 64 --epochs 200 --name cnn3       # the recipe
    python train_score.py --help                        # every constant below is an option

For clean images x0 and x = x0 + sigma n, the loss is the mean over images and noise levels of

    lambda(sigma) |score(x, sigma) - (x0 - x) / sigma^2|^2
        = lambda(sigma) / sigma^4 |D(x, sigma) - x0|^2.

Ctrl-C saves and stops; a crash loses the time since the last save. The same command goes on, with
the same result as if it had not stopped (on a GPU, to rounding); with more --epochs it goes on
beyond. `torchrun --nproc-per-node=N train_score.py` shares each batch among N processes, a GPU for
each where there are any, with the result of one to rounding.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends quietly while the modules load

import atexit
import contextlib
import copy
import functools
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
FLIP = True  # mirror each crop with probability 1/2
TURN = False  # turn each crop by a random number of quarter turns: helps where images are few
SHRINK = 1  # shrink up to so many times before the crop, at random: shows more scales; 1: never
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
    """Return about the mean squared error of a good denoiser on CIFAR-10: sigma^2, at most 0.07."""
    return sigma**2 / (1 + sigma / 0.014 + sigma**2 / 0.07)


def noise_law(u, low, high, tails):
    """Return the noise levels at the quantiles u in [0, 1].

    They lie from low to high: a share `tails` below 0.015, as many above 0.7, and log-uniform in
    each of the three parts; in one part if neither 0.015 nor 0.7 lies between low and high.
    """
    utils.check(0 < tails < 0.5, "TAILS", tails, "must lie between 0 and 0.5")
    inner = [(v, s) for v, s in ((tails, 0.015), (1 - tails, 0.7)) if low < s < high]
    quantiles, sigmas = zip((0, low), *inner, (1, high))
    return np.exp(np.interp(u, quantiles, np.log(sigmas)))


# -----------------------------------------------------------------------------
# Batches
# -----------------------------------------------------------------------------


class Crops:
    """Random crops of images of any sizes.

    images: uint8 (H, W, 3) each, H, W >= size. size: side of a crop in pixels. flip: mirror half of
    the crops. turn: turn them by a random number of quarter turns. shrink: before the crop, shrink
    them by a whole number that is at most this, and k with a probability of about 1 / k (k + 1).
    """

    def __init__(self, images, size, flip=False, turn=False, shrink=1):
        self.images, self.size = images, size
        self.flip, self.turn, self.shrink = flip, turn, shrink

    def __len__(self):
        return len(self.images)

    def checksum(self):
        found = 0
        for image in self.images:
            found = zlib.crc32(image.tobytes(), found)
        return found

    def draw(self, index, rng):
        """Return a random crop of each of these B images: uint8 (B, 3, size, size)."""
        sides = np.array([self.images[k].shape[:2] for k in index])
        factors = (1 / rng.uniform(1 / self.shrink, 1, len(index))).astype(int)
        factors = np.minimum(factors, sides.min(axis=1) // self.size)
        spans = factors * self.size
        corners = rng.integers(sides - spans[:, None] + 1)
        views = rng.integers((2, 4), size=(len(index), 2))
        crops = []
        draws = zip(index, factors, spans, corners, views)
        for k, factor, span, (top, left), (mirrored, quarters) in draws:
            crop = self.images[k][top : top + span, left : left + span]
            if factor > 1:
                blocks = crop.reshape(self.size, factor, self.size, factor, 3)
                crop = blocks.mean((1, 3)).round().astype(np.uint8)
            if self.flip and mirrored:
                crop = crop[:, ::-1]
            if self.turn:
                crop = np.rot90(crop, quarters)
            crops.append(crop)
        return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)  # in channels_last


def make_batch(crops, step, batch_size, low, high, tails, seed, device="cpu"):
    """Return x0, sigma and noise of one step, which depend on the seed and the step alone."""
    rng = np.random.default_rng([seed, 1, step])
    x0 = crops.draw(images_of_step(len(crops), step, batch_size, seed), rng).to(device) / 255
    # One quantile from each of B equal slices: the same law as independent ones, less variance.
    u = (np.arange(batch_size) + rng.random(batch_size)) / batch_size
    sigma = torch.tensor(noise_law(u, low, high, tails), dtype=torch.float32, device=device)
    noise_rng = torch.Generator(device).manual_seed(int(rng.integers(2**32)))
    return x0, sigma, torch.randn(x0.shape, generator=noise_rng, device=device)


def images_of_step(count, step, batch_size, seed):
    """Return which of `count` images a step takes.

    They stand at step * B to step * B + B - 1 of an endless stream, in which each pass over the
    images has an order of its own.
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [order_of_pass(count, p // count, seed)[p % count] for p in positions]


@functools.lru_cache(maxsize=2)
def order_of_pass(count, number, seed):
    return np.random.default_rng([seed, 0, number]).permutation(count)


# -----------------------------------------------------------------------------
# The optimisers
# -----------------------------------------------------------------------------


def learning_rate(step, steps, lr, decay):
    """Return the rate of a step: it rises over 500 steps, at most a tenth of all, and falls to 0.

    decay: the last fraction of the steps over which it falls; 0: the rate is lr throughout.
    """
    if decay == 0:
        return lr
    rise = (step + 1) / min(500, steps / 10)
    fall = (1 - step / steps) / decay
    return lr * min(1, rise, fall)


def make_optimizers(model, optimizer, lr):
    """Return the optimisers that together train the model.

    Muon (Jordan et al. 2024, scaled as in Liu et al. 2025) replaces the update of a matrix by the
    nearest orthogonal one, so that all its directions learn at one pace. A convolution is a matrix
    from the patch it sees to its output channels. Adam trains the first and the last convolution,
    which meet the pixels, the biases, and what embeds the noise level. Its average of squares is
    as short as Muon's momentum, so that it notices a lone image at a high noise level, whose
    gradient is a hundred times the usual one.
    """
    utils.check(optimizer in ("muon", "adam"), "OPTIMIZER", optimizer, "must be muon or adam")
    if optimizer == "adam":
        return [torch.optim.Adam(model.parameters(), lr=lr, fused=True)]
    hidden = [p for p in model.parameters() if p.ndim == 4][1:-1]
    rest = [p for p in model.parameters() if all(p is not weight for weight in hidden)]
    adam = torch.optim.Adam(rest, lr=lr, betas=(0.9, 0.95), fused=True)
    return [adam, HiddenMuon(hidden, lr, dtype=torch.bfloat16 if model.autocast else torch.float32)]


class HiddenMuon(torch.optim.Muon):
    """torch's Muon for convolutions in channels_last: those of one shape all at once.

    torch's own step takes the matrices one by one, in some thirty small operations each, between
    which a GPU waits for the CPU. dtype: of the products that make matrices orthogonal.
    """

    def __init__(self, weights, lr, weight_decay=0.1, dtype=torch.float32):
        self.weights, self.dtype = weights, dtype
        matrices = [nn.Parameter(self.as_matrix(weight.detach())) for weight in weights]
        super().__init__(matrices, lr=lr, weight_decay=weight_decay)
        for matrix in matrices:
            self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)

    @staticmethod
    def as_matrix(weight):  # (out, in, h, w) -> (out, h * w * in); `view` refuses to copy
        return weight.permute(0, 2, 3, 1).view(len(weight), -1)

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        matrices, momentum = group["params"], group["momentum"]
        gradients = [self.as_matrix(weight.grad) for weight in self.weights]
        means = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        torch._foreach_lerp_(means, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, means, momentum)  # Nesterov
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        for shape in dict.fromkeys(matrix.shape for matrix in matrices):
            alike = [i for i, matrix in enumerate(matrices) if matrix.shape == shape]
            updates = torch.stack([ahead[i] for i in alike]).to(self.dtype)
            moves = orthogonal(updates, group["ns_coefficients"], group["ns_steps"])
            length = group["lr"] * 0.2 * max(shape) ** 0.5  # as Adam's (Liu et al. 2025, eq. 4)
            torch._foreach_add_([matrices[i] for i in alike], moves.unbind(), alpha=-length)


def orthogonal(matrices, coefficients, steps):
    """Return about the nearest orthogonal matrix to each, by Newton-Schulz iterations.

    matrices: (N, rows, columns). A singular value ends between 0.7 and 1.2, unless it is close to 0
    (Jordan et al. 2024).
    """
    a, b, c = coefficients
    high = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if high else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if high else x


@torch.no_grad()
def update_average(average, model, step, ema):
    """Move the averaged weights towards the model's, at first faster, to forget the start."""
    decay = min(ema, (step + 1) / (step + 10))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


# -----------------------------------------------------------------------------
# What is measured and kept
# -----------------------------------------------------------------------------


@torch.no_grad()
def validate(model, images, sigmas):
    """Return {noise level: mean over images of the one-step PSNR in dB}.

    images: uint8 (N, 3, H, W). The noise is the same every time, one field for all levels.
    """
    x0, denoiser = images / 255, utils.tiled(model)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0.device)
    means = {}
    for sigma in sigmas:
        denoised = denoiser(x0 + sigma * noise, sigma)
        means[sigma] = utils.psnr(denoised.cpu(), x0.cpu()).mean().item()
    return means


def log_loss(run, bar):
    """Add the mean loss since the last one logged to the curve, and show it."""
    check_divergence(run)
    loss = float(run["loss_sum"]) / run["loss_steps"]
    run["losses"].append([run["images_seen"], loss])
    run["loss_sum"], run["loss_steps"] = 0.0, 0
    bar.set_postfix(loss=f"{loss:.4f}")
    if bar.disable:
        say(f"step {run['step']}: loss {loss:.4f}")


def check_divergence(run):
    """Raise ValueError if the loss or a weight shows that the training diverged."""
    loss = float(run["loss_sum"]) / max(1, run["loss_steps"])
    finite = all(weight.isfinite().all() for weight in run["model"].parameters())
    if not (loss < 1e4 and finite):  # an untrained network's is about 10, a good one's about 1
        words = "what was saved is kept, lower --lr"
        raise ValueError(f"the training diverged before step {run['step']}: {words}")


def measure(run, kind, images):
    """Note and say the PSNR of the averaged weights on images of that kind, "val" or "test"."""
    model, usual = run["average"], (0.02, 0.05, 0.1, 0.2, 0.5)
    sigmas = [s for s in usual if model.sigma_min <= s <= model.sigma_max] or [model.sigma_max]
    run[f"{kind}_psnr"] = validate(model, images, sigmas)
    words = [f"{value:.2f} dB at {sigma:g}" for sigma, value in run[f"{kind}_psnr"].items()]
    say(f"step {run['step']}: {kind} PSNR {'  '.join(words)}")


def new_run(model, optimizers, train, earlier, hardware):
    """Return all that a training keeps between steps, and in its file, before the first of them."""
    run = {
        "model": model,
        "average": copy.deepcopy(model),
        "step": 0,
        "images_seen": 0,
        "hours": 0.0,
        "losses": [],  # [images seen, mean loss since the one before], ...
        "loss_sum": 0.0,  # since the last of them, over
        "loss_steps": 0,  # so many steps
        "psnrs": [],  # [images seen, {noise level: PSNR in dB of the average}], ...
        "val_psnr": {},  # the last of them
        "test_psnr": {},
        "training_images": len(train),
        "checksum": train.checksum(),
        "options": utils.options(globals()),
        "earlier": earlier,  # the images and hours that made the checkpoint it started from
        "hardware": hardware,
        "torch": str(torch.__version__),
    }
    return run | {f"optimizer {i}": optimizer for i, optimizer in enumerate(optimizers)}


def files_of(name):
    """Return what a training writes: network, what it goes on from, figure and numbers of it."""
    checkpoints = [Path("checkpoints", f"{name}{suffix}") for suffix in (".pt", "_resume.pt")]
    return checkpoints + [Path("figures", f"{name}_training{end}") for end in (".png", ".csv")]


def save(run, network, resume, figure, table):
    """Write all of `run`, from which the training goes on, then the network and its curves."""
    check_divergence(run)
    states = {k: v.state_dict() for k, v in run.items() if hasattr(v, "state_dict")}
    info = {k: v for k, v in run.items() if k not in states}
    utils.save_checkpoint(resume, info | states)
    config = run["model"].config
    utils.save_checkpoint(network, {"config": config, "weights": states["average"], "info": info})
    rows = {images: {"images": images, "loss": loss} for images, loss in run["losses"]}
    for images, psnr in run["psnrs"]:
        row = rows.setdefault(images, {"images": images})
        row |= {f"PSNR at {sigma:g}": value for sigma, value in psnr.items()}
    utils.save_csv(table, [rows[images] for images in sorted(rows)])
    utils.plot_training(figure, run["losses"], run["psnrs"])


def load(run, network, resume):
    """Go on from what `save` wrote, if it did; raises ValueError if that is another training."""
    if not resume.exists():
        if network.exists():
            words = f"'{network}' exists, without '{resume.name}' to go on from"
            raise ValueError(f"{words}: choose another --name")
        return
    free = "epochs", "lr", "data", "test", "name", "device", "precision", "compile", "save_minutes"
    kept = load_checkpoint(resume)
    try:
        for name, value in run["options"].items():
            was = kept["options"].get(name)
            if was != value and name not in free:
                raise ValueError(f"--{name.replace('_', '-')} was {was}, not {value}")
        if kept["checksum"] != run["checksum"]:
            raise ValueError("it was trained on other images")
        for name in run.keys() - {"options"}:
            if hasattr(run[name], "load_state_dict"):
                run[name].load_state_dict(kept[name])
            else:
                run[name] = kept[name]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}; choose another --name, or delete it"
        raise ValueError(f"cannot go on from '{resume}': {reason}") from None


# -----------------------------------------------------------------------------
# More than one process
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


# -----------------------------------------------------------------------------


def check_options(world):
    """Raise ValueError for what nothing below would notice."""
    words = "must be up to 100 letters, digits, '.', '-' and '_'"
    utils.check(re.fullmatch(r"\w[\w.-]{0,99}", NAME), "NAME", repr(NAME), words)
    words = f"must be a positive multiple of the number of processes, {world}"
    utils.check(BATCH_SIZE > 0 and BATCH_SIZE % world == 0, "BATCH_SIZE", BATCH_SIZE, words)
    utils.check(len(SIGMAS) <= 2, "SIGMAS", SIGMAS, "must be the lowest and the highest, or one")
    utils.check(SEED >= 0, "SEED", SEED, "must not be negative")
    utils.check(CLIP > 0, "CLIP", CLIP, "must be positive")


def build_model(low, high, device):
    """Return the network, and how many images and hours made the checkpoint it starts from."""
    torch.manual_seed(SEED)
    torch.backends.cudnn.benchmark = True  # a GPU tries which convolution is fastest
    bfloat16 = utils.pick_bfloat16(PRECISION, device)
    model = ScoreModel(NETWORK, low, high, WIDTHS, BLOCKS, ATTENTION, autocast=bfloat16).to(device)
    if INIT == "none":
        return model, {}
    init = load_model(INIT)
    if init.config != model.config:
        raise ValueError(f"--init '{INIT}' is another network: {init.config}, not {model.config}")
    model.load_state_dict(init.state_dict())
    earlier = init.info.get("earlier", {})
    return model, {k: init.info.get(k, 0) + earlier.get(k, 0) for k in ("images_seen", "hours")}


def read_data(rank, device):
    """Return the crops to train on, and images uint8 (N, 3, CROP, CROP) to validate and to test."""
    if rank > 0:
        total(0)  # the first process reads before the others: it may have to download
    images, tests = utils.training_images(DATA, smallest=CROP, notify=say), []
    if TEST != "none":
        tests = utils.training_images(TEST, train=False, smallest=CROP, notify=say)[:1000]
    if rank == 0:
        total(0)
    words = f"must leave some of the {len(images)} images of '{DATA}' to train on"
    utils.check(0 < VAL_IMAGES < len(images), "VAL_IMAGES", VAL_IMAGES, words)
    train = Crops(images[:-VAL_IMAGES], CROP, FLIP, TURN, SHRINK)
    return train, middle(images[-VAL_IMAGES:], device), middle(tests, device)


def middle(images, device):
    crops = [utils.crop(torch.tensor(image).permute(2, 0, 1), CROP) for image in images]
    return torch.stack(crops).to(device) if crops else []


def main():
    rank, world = join_processes()
    check_options(world)
    device = utils.pick_device(DEVICE)
    low, high = SIGMAS[0], SIGMAS[-1]
    model, earlier = build_model(low, high, device)
    optimizers = make_optimizers(model, OPTIMIZER, LR)
    train, val, test = read_data(rank, device)
    steps = math.ceil(EPOCHS * len(train) / BATCH_SIZE)
    log_steps, val_steps = max(1, min(100, steps // 10)), max(1, steps // 20)
    here = utils.hardware(device, world)
    run = new_run(model, optimizers, train, earlier, here)
    files = files_of(NAME)

    with utils.locked(*files) if rank == 0 else contextlib.nullcontext():
        load(run, *files[:2])
        if not run["hardware"].endswith(here):
            run["hardware"] += f", then {here}"
        network = torch.compile(model, dynamic=False, mode="reduce-overhead") if COMPILE else model
        if world > 1:
            network = DistributedDataParallel(network)  # averages the gradients over processes
        say(f"{NETWORK}, {sum(p.numel() for p in model.parameters()):,} parameters, on {here}")
        say(f"{len(train):,} training images, {steps:,} steps, from step {run['step']:,}")
        hidden = rank > 0 or None  # None: where stderr is no terminal
        bar = tqdm(total=steps * BATCH_SIZE, initial=run["images_seen"], unit="img", disable=hidden)
        signals = note_signals()
        began = time.perf_counter() - 3600 * run["hours"]
        saved = run["hours"]

        for step in range(run["step"], steps):
            x0, sigma, noise = make_batch(train, step, BATCH_SIZE, low, high, TAILS, SEED, device)
            mine = slice(rank, None, world)
            loss = denoising_loss(network, x0[mine], sigma[mine], noise[mine])
            model.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = learning_rate(step, steps, LR, DECAY)
                optimizer.step()
            update_average(run["average"], model, step, EMA)

            run["loss_sum"] += total(loss.detach()) / world
            run["loss_steps"] += 1
            run["step"], run["images_seen"] = step + 1, (step + 1) * BATCH_SIZE
            run["hours"] = (time.perf_counter() - began) / 3600
            bar.update(BATCH_SIZE)
            if run["step"] % log_steps == 0:
                log_loss(run, bar)
            if rank == 0 and (steps - run["step"]) % val_steps == 0:
                measure(run, "val", val)
                run["psnrs"].append([run["images_seen"], run["val_psnr"]])
            if rank == 0 and run["hours"] - saved > SAVE_MINUTES / 60:
                save(run, *files)
                saved = run["hours"]
            if total(len(signals)):  # to any of the processes
                break

        bar.close()
        if rank == 0:
            if run["step"] >= steps and len(test):
                measure(run, "test", test)
            save(run, *files)
        if run["step"] < steps:
            say(f"stopped after step {run['step']} of {steps}, saved: the same command goes on")
            sys.exit(130)
    say(f"{run['images_seen']:,} images seen, wrote '{files[0]}' and '{files[2]}'")


if __name__ == "__main__":
    utils.run_script(main, globals())

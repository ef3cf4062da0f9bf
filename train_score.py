"""Train a score network on noised images with the denoising score-matching loss.

    python train_score.py                               # CIFAR-10, the network that ships in checkpoints/
    python train_score.py --data PATH --name mine       # any folder of images and .npy arrays
    python train_score.py --help                        # every constant below is an option

The loss (Vincent 2011), for clean images x0 and x = x0 + sigma n, is

    E lambda(sigma) |score(x, sigma) - (x0 - x) / sigma^2|^2  =  E lambda(sigma) / sigma^4 |D(x, sigma) - x0|^2.

Ctrl-C saves and stops; a crash loses the time since the last save. Run the same command again to go on, with the
same result as if it had not stopped (on a GPU, to rounding); with more --epochs it goes on beyond. `torchrun
--nproc-per-node=N train_score.py` shares each batch among N processes, a GPU for each where there are any, with the
result of one to rounding.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends quietly while the modules below load

import copy
import functools
import math
import re
import sys
import time
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import utils
from model import ScoreModel, load_checkpoint, load_model, restore, restore_optimizer

# -----------------------------------------------------------------------------
# data
DATA = "cifar10"  # "cifar10" (downloaded on first use), "samples" (photographs, no network), or a path
DATA_DIR = "data"  # folder that holds CIFAR-10, or gets it
VAL_IMAGES = 500  # the last images of the data are never trained on
TEST = "none"  # measured once at the end, on the first 1,000: "cifar10" (its test images), a path, or "none"
FLIP = True  # flip each image left to right with probability 1/2
# network
NETWORK = "unet"  # "unet" (all noise levels) or "cnn3" (three convolutions, one noise level)
WIDTHS = (64, 96, 128)  # unet: channels per resolution, finest first; multiples of 32 run fastest
BLOCKS = (1, 3, 2)  # unet: residual blocks per resolution
ATTENTION = (0, 1, 1)  # unet: 1 where a resolution has an attention layer, on the way up
FEATURES = 48  # unet: features that tell each block the noise level
INIT = "none"  # checkpoint to start from, to fine-tune it on other images; "none": random weights
# noise, in units of [0, 1] pixels
SIGMA_MIN = 0.005  # lowest noise level
SIGMA_MAX = 20.0  # highest noise level; equal for one level
TAILS = 0.05  # share of the levels below 0.015, and another of those above 0.7; log-uniform there and between
# optimiser
OPTIMIZER = "muon"  # "muon" (for the hidden convolutions, with Adam for the rest) or "adam" (for all)
EPOCHS = 226  # passes over the data; for a CPU, or few images: 26, in batches of 32 at a rate of 3e-3
BATCH_SIZE = 512  # images per step
LR = 4e-3  # learning rate of both optimisers; Muon moves a weight by 0.2 LR a step, Adam by about as much
WEIGHT_DECAY = 0.1  # Muon's weights shrink by this times the learning rate in each step
WARMUP = 500  # steps over which the learning rate rises from zero
DECAY = 0.8  # last fraction of the training over which it falls linearly to zero; 0 keeps it constant
CLIP = 5.0  # largest norm of a gradient; twice the usual one of 32 images: a rare outlier would steer Muon for many steps
EMA = 0.999  # decay per step of the averaged weights, which are the ones kept; 0 keeps the last
# run
NAME = "score"  # of checkpoints/NAME.pt and figures/NAME_training.png
SEED = 0  # decides weights, order, flips and noise
DEVICE = "auto"  # "auto" (GPU if there is one), "cpu", "cuda", "cuda:1"
PRECISION = "auto"  # of the network: "bfloat16", "float32", or "auto" (bfloat16 where the hardware has it)
COMPILE = False  # compile the network first: takes a minute, and a C compiler; a GPU then trains almost three times as fast
SAVE_MINUTES = 5.0  # minutes between saves
LOG_STEPS = 100  # steps per point of the loss curve
VAL_SIGMAS = (0.02, 0.05, 0.1, 0.2, 0.5)  # noise levels of the validation; those outside the range are left out
# -----------------------------------------------------------------------------


def denoising_loss(model, x0, sigma, noise):
    """Return the score-matching loss with lambda = sigma^4 / typical_error(sigma): the error over what it can be.

    The gradient is then about that of the mean over noise levels of log MSE, so of PSNR: one dB counts the same at
    every level. x0, noise: (B, 3, H, W). sigma: (B,).
    """
    s = sigma[:, None, None, None]
    x = x0 + s * noise
    return ((model(x, sigma) - x0) ** 2 / typical_error(s)).mean()


def typical_error(sigma):
    """Return about the mean squared error of a good denoiser on CIFAR-10: sigma^2 at low levels, and at most 0.07."""
    return sigma**2 / (1 + sigma / 0.014 + sigma**2 / 0.07)


def noise_law(u, sigma_min, sigma_max, tails):
    """Return the noise levels at the quantiles u in [0, 1]: log-uniform below 0.015, from 0.015 to 0.7, and above 0.7."""
    corners = [(0.0, sigma_min), (tails, 0.015), (1 - tails, 0.7), (1.0, sigma_max)]
    corners = corners[:1] + [(v, s) for v, s in corners[1:3] if sigma_min < s < sigma_max] + corners[3:]
    log_sigma = math.log(sigma_min)
    for (v, s), (v_next, s_next) in pairwise(corners):
        log_sigma = log_sigma + (u.clamp(v, v_next) - v) / (v_next - v) * math.log(s_next / s)
    return log_sigma.exp()


def make_batch(images, step, batch_size, flip, law, seed):
    """Return x0, sigma and noise of one step; they depend on the seed and the step alone, so a run can be resumed.

    images: uint8 (N, 3, H, W). law: from quantiles in [0, 1] to noise levels.
    """
    epoch, position = divmod(step, math.ceil(len(images) / batch_size))
    index = epoch_order(len(images), seed, epoch)[position * batch_size : (position + 1) * batch_size]
    x0 = images[index.to(images.device)].float() / 255  # (B, 3, H, W)

    rng = generator(seed, 1, step, images.device)
    if flip:
        flipped = torch.rand(len(x0), device=x0.device, generator=rng) < 0.5
        x0 = torch.where(flipped[:, None, None, None], x0.flip(3), x0)
    # One quantile from each of B equal slices: the same law as independent ones, less variance of the loss.
    u = (torch.arange(len(x0), device=x0.device) + torch.rand(len(x0), device=x0.device, generator=rng)) / len(x0)
    return x0, law(u), torch.randn(x0.shape, device=x0.device, generator=rng)


@functools.lru_cache(maxsize=1)
def epoch_order(count, seed, epoch):
    return torch.randperm(count, generator=generator(seed, 0, epoch, "cpu"))


def generator(seed, purpose, count, device):
    # SeedSequence mixes the three numbers; torch's own CPU generator reads only 32 bits of a seed.
    state = np.random.SeedSequence([seed, purpose, count]).generate_state(1)
    return torch.Generator(device).manual_seed(int(state[0]))


def learning_rate(step, steps, lr, warmup, decay):
    rise = min(1, (step + 1) / warmup) if warmup else 1
    fall = min(1, (1 - step / steps) / decay) if decay else 1
    return lr * rise * fall


def make_optimizers(model, optimizer, lr, weight_decay):
    """Return the optimisers that together train the model.

    Muon (Jordan et al. 2024; scaled as in Liu et al. 2025, so that it takes Adam's learning rates) replaces the update
    of a matrix by the nearest orthogonal one, so that all its directions learn at one pace. A convolution is a matrix
    from the patch it sees to its output channels, a transposed one from its input channels to the patch it makes. The
    first and the last convolution, which meet the pixels, the biases and what embeds the noise level are left to Adam,
    whose average of squares is then as short as Muon's momentum: over a longer one, a lone image at a high noise level,
    with a gradient a hundred times the usual one, is hardly noticed, and the step is as much too large.
    """
    convolutions = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    hidden = [m.weight for m in convolutions[1:-1]] if optimizer == "muon" else []
    taken, betas = {id(weight) for weight in hidden}, (0.9, 0.95 if hidden else 0.999)
    adam = torch.optim.Adam([p for p in model.parameters() if id(p) not in taken], lr=lr, betas=betas, fused=True)
    return [adam, HiddenMuon(hidden, lr, weight_decay)] if hidden else [adam]


class HiddenMuon(torch.optim.Muon):
    """torch's Muon for convolutions in channels_last: their weights, seen as matrices, those of one shape all at once.

    torch's own step takes the matrices one by one, in some thirty small operations each, between which a GPU waits for the CPU.
    """

    def __init__(self, weights, lr, weight_decay):
        self.weights = weights
        super().__init__([nn.Parameter(self.as_matrix(w.detach())) for w in weights], lr=lr, weight_decay=weight_decay)
        for matrix in self.param_groups[0]["params"]:
            self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)

    @staticmethod
    def as_matrix(weight):  # (out, in, height, width) -> (out, height * width * in); `view` refuses to copy
        return weight.permute(0, 2, 3, 1).view(len(weight), -1)

    @torch.no_grad()
    def step(self):
        group, by_shape = self.param_groups[0], {}
        matrices, momentum = group["params"], group["momentum"]
        where = [weight.data_ptr() for weight in self.weights]
        assert where == [m.data_ptr() for m in matrices], "the weights have moved in memory since the optimiser was made"
        gradients = [self.as_matrix(weight.grad) for weight in self.weights]
        means = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        torch._foreach_lerp_(means, gradients, 1 - momentum)
        for matrix, ahead in zip(matrices, torch._foreach_lerp(gradients, means, momentum)):
            by_shape.setdefault(matrix.shape, []).append((matrix, ahead))
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        for shape, pairs in by_shape.items():
            some, ahead = zip(*pairs)
            moves = orthogonal(torch.stack(ahead), group["ns_coefficients"], group["ns_steps"])
            length = group["lr"] * 0.2 * max(shape) ** 0.5  # as long as a step of Adam's (Liu et al. 2025, eq. 4)
            torch._foreach_add_(some, moves.unbind(), alpha=-length)


def orthogonal(matrices, coefficients, steps):
    """Return about the nearest orthogonal matrix to each, by Newton-Schulz iterations in bfloat16 (Jordan et al. 2024).

    matrices: (N, rows, columns). A singular value ends between 0.7 and 1.2, unless it is close to 0.
    """
    a, b, c = coefficients
    high = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if high else matrices).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if high else x


@torch.no_grad()
def validate(model, images, sigmas):
    """Return {noise level: mean over images of the one-step PSNR in dB}.

    images: uint8 (N, 3, H, W). The noise is the same every time, one field for all levels.
    """
    shape = (len(images), *images.shape[2:], 3)
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal(shape).astype(np.float32)).permute(0, 3, 1, 2)
    means = {}
    for sigma in sigmas:
        pairs = ((x.float() / 255, z.to(x.device)) for x, z in zip(images.split(100), noise.split(100)))
        means[sigma] = torch.cat([utils.psnr(model(x0 + sigma * z, sigma).cpu(), x0.cpu()) for x0, z in pairs]).mean().item()
    return means


# -----------------------------------------------------------------------------
# What is kept between steps
# -----------------------------------------------------------------------------


class Training:
    """What a training keeps between steps, in files of that name: one that was saved and loaded ends as if it had not stopped.

    images: how many there are in an epoch. made_with: options and other plain values that must not change on the way.
    compiled: whether batches go through the network compiled, but for a shorter last one of an epoch.
    """

    def __init__(self, name, model, optimizers, images, batch_size, made_with, compiled=False):
        self.network, self.resume = Path(f"checkpoints/{name}.pt"), Path(f"checkpoints/{name}_resume.pt")
        self.figure, self.table = Path(f"figures/{name}_training.png"), Path(f"figures/{name}_training.csv")
        self.files = self.network, self.resume, self.figure, self.table
        self.model, self.averaged, self.optimizers = model, copy.deepcopy(model), optimizers
        self.fast = torch.compile(model, dynamic=False, mode="reduce-overhead") if compiled else model
        self.images, self.batch_size, self.epoch_steps = images, batch_size, math.ceil(images / batch_size)
        self.made_with, self.step, self.loss_sum = made_with, 0, torch.zeros((), device=next(model.parameters()).device)
        self.hardware = []  # what it ran on, in words, piece after piece
        self.losses, self.psnrs = [], []  # [step, mean loss since the one before], [step, {level: PSNR}]
        self.began = self.saved = time.perf_counter()

    def images_at(self, step):
        return step // self.epoch_steps * self.images + step % self.epoch_steps * self.batch_size

    @property
    def images_seen(self):
        return self.images_at(self.step)

    def learn(self, batch, weight, lr, clip, ema):
        """Make a step: loss, gradient, weights, and their average, which is short at first to forget the start.

        batch: this process's share of x0, sigma and noise; weight: that of its mean in the mean over the batch.
        """
        parameters, averages = list(self.model.parameters()), list(self.averaged.parameters())
        whole = self.images_at(self.step + 1) - self.images_seen == min(self.batch_size, self.images)
        self.model.zero_grad()
        loss = weight * denoising_loss(self.fast if whole else self.model, *batch)
        loss.backward()
        with torch.no_grad():
            utils.sum_over_processes(loss, *(p.grad for p in parameters))
            nn.utils.clip_grad_norm_(parameters, clip)
            for optimizer in self.optimizers:
                optimizer.param_groups[0]["lr"] = lr
                optimizer.step()
            self.step, self.loss_sum = self.step + 1, self.loss_sum + loss
            torch._foreach_lerp_(averages, parameters, 1 - min(ema, self.step / (self.step + 9)))

    def mean_loss(self):
        """Return the mean loss since the last one logged; raises ValueError where it, or a weight, shows a divergence."""
        steps = self.step - (self.losses[-1][0] if self.losses else 0)
        loss, few = self.loss_sum.item() / max(1, steps), steps * self.batch_size < 32  # of which one may weigh a hundred times
        lowest = math.inf if few else min((value for _, value in self.losses), default=math.inf)
        if not (math.isfinite(loss) and loss <= 10 * lowest and all(p.isfinite().all() for p in self.model.parameters())):
            what = f"a loss of {loss:.3g} after one of {lowest:.3g}, or a weight that is not finite"
            raise ValueError(f"the training diverged before step {self.step}: {what}; what was saved is kept, lower --lr")
        return loss

    def log_loss(self):
        self.losses.append([self.step, self.mean_loss()])
        self.loss_sum.zero_()
        return self.losses[-1][1]

    def save(self, info):
        """Write what the training goes on from, then the network and its curves, which the next start can make again."""
        self.mean_loss()
        self.seconds = time.perf_counter() - self.began
        kept = {name: getattr(self, name) for name in ("made_with", "step", "seconds", "hardware", "losses", "psnrs", "loss_sum")}
        kept |= {"model": self.model.state_dict(), "averaged": self.averaged.state_dict()}
        utils.save_checkpoint(self.resume, kept | {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]})
        info |= {"images_seen": self.images_seen, "epochs": self.step / self.epoch_steps, "hours": self.seconds / 3600}
        info |= {"hardware": ", then ".join(self.hardware), "val_psnr": self.psnrs[-1][1] if self.psnrs else {}}
        utils.save_checkpoint(self.network, {"config": self.model.config, "weights": self.averaged.state_dict(), "info": info})
        utils.save_curves(self.table, self.losses, self.psnrs, self.images_at)
        utils.plot_training(self.figure, self.losses, self.psnrs, self.images_at)
        self.saved = time.perf_counter()

    def load(self):
        """Go on from what `save` wrote, if it did; raises ValueError where that is another training, or damaged."""
        if not self.resume.exists():
            if self.network.exists():
                raise ValueError(f"'{self.network}' exists and has no '{self.resume.name}' to go on from: choose another --name")
            return
        kept = load_checkpoint(self.resume)
        try:
            was, now = kept["made_with"], self.made_with
            for name in was | now:
                if was.get(name) != now.get(name):
                    raise ValueError(f"it was made with {name} {was.get(name)}, not {now.get(name)}")
            if not (kept["step"] >= 0 and kept["seconds"] >= 0):
                raise ValueError(f"it made {kept['step']} steps in {kept['seconds']} seconds")
            self.step, self.began = int(kept["step"]), self.saved - float(kept["seconds"])
            self.hardware = [str(name) for name in kept["hardware"]]
            self.losses = [[int(step), float(loss)] for step, loss in kept["losses"]]
            self.psnrs = [[int(step), {float(s): float(v) for s, v in psnr.items()}] for step, psnr in kept["psnrs"]]
            self.loss_sum.copy_(kept["loss_sum"])
            restore(self.model, kept["model"])
            restore(self.averaged, kept["averaged"])
            for optimizer, saved in zip(self.optimizers, kept["optimizers"], strict=True):
                adam = {"step", "exp_avg", "exp_avg_sq"} if self.step else set()
                restore_optimizer(optimizer, saved["state"], {"momentum_buffer"} if isinstance(optimizer, HiddenMuon) else adam)
            self.mean_loss()
        except Exception as error:  # whatever wrong parts can raise
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"cannot go on from '{self.resume}' ({reason}): choose another --name, or delete it") from None


# -----------------------------------------------------------------------------


def check_constants():
    limits = {name: (1, 1e9) for name in ("EPOCHS", "BATCH_SIZE", "VAL_IMAGES", "LOG_STEPS")}
    limits |= {"LR": (1e-12, 100), "WARMUP": (0, 1e9), "DECAY": (0, 1), "EMA": (0, 1), "TAILS": (1e-6, 0.499)}
    limits |= {"CLIP": (1e-9, math.inf), "SAVE_MINUTES": (0, math.inf), "WEIGHT_DECAY": (0, 100)}
    limits |= {"SEED": (0, 2**32 - 1)}  # torch reads 32 bits of it: from 2^32 on, a seed starts from the weights of another
    limits |= {"SIGMA_MIN": (1e-6, 1e6), "SIGMA_MAX": (SIGMA_MIN, 1e6)}
    for name, (low, high) in limits.items():
        utils.check(low <= globals()[name] <= high, name, globals()[name], f"must lie between {low} and {high}")
    utils.check(re.fullmatch(r"\w[\w.-]{0,99}", NAME), "NAME", repr(NAME), "must be up to 100 letters, digits, '.', '-' and '_'")
    utils.check(OPTIMIZER in ("muon", "adam"), "OPTIMIZER", OPTIMIZER, "must be muon or adam")
    words = f"must be positive, at least one from {SIGMA_MIN} to {SIGMA_MAX}"
    utils.check(all(0 < sigma < math.inf for sigma in VAL_SIGMAS) and known_sigmas(), "VAL_SIGMAS", VAL_SIGMAS, words)


def known_sigmas():
    return [sigma for sigma in VAL_SIGMAS if SIGMA_MIN <= sigma <= SIGMA_MAX]


def read_data(device):
    """Return the images to train on, to validate with, and to test with at the end: uint8 (N, 3, 32, 32) each, or None."""
    images = utils.read_patches(DATA, DATA_DIR).to(device)  # all of CIFAR-10 is 150 MB, so a batch is one indexing operation
    if len(images) <= VAL_IMAGES:
        raise ValueError(f"--val-images {VAL_IMAGES} leaves none of the {len(images)} images of '{DATA}' to train on")
    test = utils.read_patches(TEST, DATA_DIR, train=False)[:1000].to(device) if TEST != "none" else None
    return images[:-VAL_IMAGES], images[-VAL_IMAGES:], test


def fixed_options(train):
    """Return by name what a training must not change when it goes on."""
    free = ("epochs", "lr", "save_minutes", "device", "precision", "compile", "data", "data_dir", "test", "name")
    fixed = {f"--{name.replace('_', '-')}": value for name, value in utils.options(globals()).items() if name not in free}
    return fixed | {"images of the checksum": zlib.crc32(train.cpu().numpy())}


def initial_weights(model, path):
    """Give the model the weights of a checkpoint, if one is named; return how many images, in how many hours, made them."""
    if path == "none":
        return {}
    init = load_model(utils.find(path))
    if init.config != model.config:
        raise ValueError(f"--init '{path}' is another network: {init.config}, not {model.config}")
    model.load_state_dict(init.state_dict())
    try:
        return {name: init.info[name] + init.info.get("earlier", {}).get(name, 0) for name in ("images_seen", "hours")}
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"--init '{path}' does not say how long it was trained") from None


def in_words(psnr):
    return "PSNR " + "  ".join(f"{value:.2f} dB at {sigma:g}" for sigma, value in psnr.items())


def main():
    check_constants()
    device, (rank, world) = utils.pick_device(DEVICE), utils.join_processes()
    here = utils.hardware(device, world)
    utils.check(world <= BATCH_SIZE, "BATCH_SIZE", BATCH_SIZE, f"must be at least {world}, an image for each process")
    torch.manual_seed(SEED)
    torch.backends.cudnn.benchmark = True  # a GPU tries which convolution is fastest for each of the few sizes of a batch
    bfloat16 = utils.pick_bfloat16(PRECISION, device)
    model = ScoreModel(NETWORK, SIGMA_MIN, SIGMA_MAX, WIDTHS, BLOCKS, ATTENTION, FEATURES, bfloat16).to(device)
    info = {"earlier": initial_weights(model, INIT), "torch": str(torch.__version__)}
    train, val, test = utils.first_alone(rank, lambda: read_data(device))
    optimizers = make_optimizers(model, OPTIMIZER, LR, WEIGHT_DECAY)
    training = Training(NAME, model, optimizers, len(train), BATCH_SIZE, fixed_options(train), COMPILE)
    steps, epoch_steps = EPOCHS * training.epoch_steps, training.epoch_steps
    validated = epoch_steps * math.ceil(EPOCHS / 100)  # steps between validations
    law = functools.partial(noise_law, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, tails=TAILS)
    info |= {"data": DATA, "training_images": len(train), "options": utils.options(globals()), "test_psnr": {}}
    say = tqdm.write if rank == 0 else lambda text: None  # the first process speaks, measures and writes

    with utils.only_process(*training.files * (rank == 0)), utils.stop_signals() as stop:
        training.load()
        if training.step < steps and training.hardware[-1:] != [here]:
            training.hardware.append(here)
        words = "must name a training that all processes find: put checkpoints/ where all machines see it"
        utils.check(not utils.differs(training.step), "NAME", NAME, words)
        say(f"{NETWORK}, {sum(p.numel() for p in model.parameters()):,} parameters, on {here}")
        say(f"{len(train):,} training images, {EPOCHS} epochs of {epoch_steps} steps, from step {training.step}")
        with tqdm(total=EPOCHS * len(train), unit="img", unit_scale=True, disable=rank > 0 or None) as bar:  # on a terminal
            bar.initial = bar.n = training.images_seen
            while training.step < steps and not utils.any_process(stop):
                batch, weight = utils.share(make_batch(train, training.step, BATCH_SIZE, FLIP, law, SEED), rank, world)
                training.learn(batch, weight, learning_rate(training.step, steps, LR, WARMUP, DECAY), CLIP, EMA)
                bar.update(training.images_seen - bar.n)
                if training.step % LOG_STEPS == 0:
                    bar.set_postfix(loss=f"{training.log_loss():.4f}")
                    if bar.disable:
                        say(f"step {training.step} of {steps}: loss {training.losses[-1][1]:.4f}")
                if (training.step % validated == 0 or training.step == steps) and rank == 0:
                    training.psnrs.append([training.step, psnr := validate(training.averaged, val, known_sigmas())])
                    say(f"epoch {training.step // epoch_steps}: validation {in_words(psnr)}")
                if time.perf_counter() - training.saved > 60 * SAVE_MINUTES and rank == 0:
                    training.save(info)
            if training.step >= steps and test is not None and rank == 0:
                info["test_psnr"] = validate(training.averaged, test, known_sigmas())
                say(f"test {in_words(info['test_psnr'])}")
            if rank == 0:
                training.save(info)
            if training.step < steps:  # said while signals are but noted: torchrun ends every process when one has ended
                say(f"stopped after step {training.step} of {steps}, saved in '{training.resume}': run the same command to go on")
    utils.leave_processes()
    if training.step < steps:
        sys.exit(130)
    say(f"{training.images_seen:,} images seen; wrote '{training.network}' and '{training.figure}'; more --epochs go on")


if __name__ == "__main__":
    utils.run_script(main, globals())

"""Train a score network on noised images with the denoising score-matching loss.

    python train_score.py                               # CIFAR-10, the network that ships in checkpoints/
    python train_score.py --data PATH --name mine       # any folder of images and .npy arrays
    python train_score.py --help                        # every constant below is an option

The loss (Vincent 2011), for clean images x0 and x = x0 + sigma n, is

    E lambda(sigma) |score(x, sigma) - (x0 - x) / sigma^2|^2  =  E lambda(sigma) / sigma^4 |D(x, sigma) - x0|^2.

Ctrl-C saves and stops; a crash loses the time since the last save. Run the same command again to go on, with the
same result as if it had not stopped; with more --epochs it goes on beyond.
"""

import functools
import math
import platform
import signal
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import utils
from model import ScoreModel, load_model

# -----------------------------------------------------------------------------
# data
DATA = "cifar10"  # "cifar10" (downloaded on first use), "samples" (photographs, no network), or a path
DATA_DIR = "data"  # folder that holds CIFAR-10, or gets it
VAL_IMAGES = 500  # the last images of the data are never trained on
TEST = "none"  # measured once at the end, on the first 1,000: "cifar10" (its test images), a path, or "none"
FLIP = True  # flip each image left to right with probability 1/2
# network
NETWORK = "unet"  # "unet" (all noise levels) or "cnn3" (three convolutions, one noise level)
WIDTHS = (32, 96, 128)  # unet: channels per resolution, finest first; multiples of 32 run fastest
BLOCKS = (2, 3, 2)  # unet: residual blocks per resolution
INIT = "none"  # checkpoint to start from, to train it further or fine-tune it on other images; "none": random weights
# noise, in units of [0, 1] pixels
SIGMA_MIN = 0.01  # lowest noise level; levels are log-uniform from here
SIGMA_MAX = 1.0  # to here; equal for one level
# optimiser
OPTIMIZER = "muon"  # "muon" (for the hidden convolutions, with Adam for the rest) or "adam" (for all)
EPOCHS = 11  # passes over the data
BATCH_SIZE = 32  # images per step
LR = 3e-3  # learning rate of both optimisers; Muon moves a weight by 0.2 LR a step, Adam by about as much
WARMUP = 500  # steps over which the learning rate rises from zero
DECAY = 0.5  # last fraction of the training over which it falls linearly to zero; 0 keeps it constant
EMA = 0.999  # decay per step of the averaged weights, which are the ones kept; 0 keeps the last
# run
NAME = "score"  # of checkpoints/NAME.pt and figures/NAME_training.png
SEED = 0  # decides weights, order, flips and noise
DEVICE = "auto"  # "auto" (GPU if there is one), "cpu", "cuda", "cuda:1"
PRECISION = "auto"  # of the convolutions: "bfloat16", "float32", or "auto" (bfloat16 where the hardware has it)
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
    return ((model(x0 + s * noise, sigma) - x0) ** 2 / typical_error(s)).mean()


def typical_error(sigma):
    """Return about the mean squared error of a good denoiser on CIFAR-10: sigma^2 / (1 + sigma / 0.014), sigma 0.01 to 1."""
    return sigma**2 / (1 + sigma / 0.014)


def make_optimizers(model, o):
    """Return the optimisers that together train the model.

    Muon (Jordan et al. 2024; scaled as in Liu et al. 2025, so that it takes Adam's learning rates) replaces the update
    of a matrix by the nearest orthogonal one, so that all its directions learn at one pace. A convolution is a matrix
    from the patch it sees to its output channels, a transposed one from its input channels to the patch it makes. The
    layers that meet the pixels, the biases and what embeds the noise level are left to Adam.
    """
    groups = {True: [], False: []}
    for weight in model.parameters():
        groups[o.optimizer == "muon" and weight.ndim == 4 and 3 not in weight.shape[:2]].append(weight)
    optimizers = [torch.optim.Adam(groups[False], lr=o.lr, fused=True)]
    return [*optimizers, HiddenMuon(groups[True], lr=o.lr)] if groups[True] else optimizers


class HiddenMuon(torch.optim.Muon):
    """torch's Muon, which takes matrices alone, for convolutions in channels_last: their weights, seen as matrices."""

    def __init__(self, weights, lr):
        self.weights = weights
        matrices = [torch.nn.Parameter(self.as_matrix(w.detach())) for w in weights]
        super().__init__(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    @staticmethod
    def as_matrix(weight):  # (out, in, height, width) -> (out, height * width * in), in the same memory
        return weight.permute(0, 2, 3, 1).view(len(weight), -1)

    def step(self):
        for matrix, weight in zip(self.param_groups[0]["params"], self.weights):
            matrix.grad = self.as_matrix(weight.grad)
        super().step()


def draw_batch(images, step, o):
    """Return x0, sigma and noise of one step; they depend on the seed and the step alone, so a run can be resumed."""
    epoch, position = divmod(step, math.ceil(len(images) / o.batch_size))
    index = epoch_order(len(images), o.seed, epoch)[position * o.batch_size : (position + 1) * o.batch_size]
    x0 = images[index.to(images.device)].float() / 255  # (B, 3, H, W)

    rng = generator(o.seed, 1, step, images.device)
    if o.flip:
        flipped = torch.rand(len(x0), device=x0.device, generator=rng) < 0.5
        x0 = torch.where(flipped[:, None, None, None], x0.flip(3), x0)
    # One level from each of B equal slices of log sigma: the same law as independent ones, less variance of the loss.
    u = (torch.arange(len(x0), device=x0.device) + torch.rand(len(x0), device=x0.device, generator=rng)) / len(x0)
    sigma = o.sigma_min * (o.sigma_max / o.sigma_min) ** u
    return x0, sigma, torch.randn(x0.shape, device=x0.device, generator=rng)


@functools.lru_cache(maxsize=1)
def epoch_order(count, seed, epoch):
    return torch.randperm(count, generator=generator(seed, 0, epoch, "cpu"))


def generator(seed, purpose, count, device):
    # SeedSequence mixes the three numbers; torch's own CPU generator reads only 32 bits of a seed.
    state = np.random.SeedSequence([seed, purpose, count]).generate_state(1)
    return torch.Generator(device).manual_seed(int(state[0]))


def learning_rate(step, steps, o):
    rise = min(1, (step + 1) / o.warmup) if o.warmup else 1
    fall = min(1, (1 - step / steps) / o.decay) if o.decay else 1
    return o.lr * rise * fall


@torch.no_grad()
def validate(model, images, sigmas):
    """Return for each noise level the mean over images of the one-step PSNR in dB.

    images: uint8 (N, 3, H, W). The noise is the same every time, one field for all levels.
    """
    n, _, height, width = images.shape
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((n, height, width, 3))).permute(0, 3, 1, 2)
    means = []
    for sigma in sigmas:
        quality = []
        for batch, z in zip(images.split(100), noise.split(100)):
            x0 = batch.float() / 255
            y = x0 + sigma * z.to(x0.device, torch.float32)
            quality.append(utils.psnr(model(y, sigma), x0))
        means.append(torch.cat(quality).mean().item())
    return means


def check_options(o):
    for name in ("epochs", "batch_size", "lr", "val_images", "log_steps", "save_minutes"):
        if not getattr(o, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, not {getattr(o, name)}")
    if o.warmup < 0:
        raise ValueError(f"--warmup must not be negative, not {o.warmup}")
    if o.optimizer not in ("muon", "adam"):
        raise ValueError(f"--optimizer must be muon or adam, not '{o.optimizer}'")
    for name in ("decay", "ema"):
        if not 0 <= getattr(o, name) <= 1:
            raise ValueError(f"--{name} must lie between 0 and 1, not {getattr(o, name)}")


def check_resumable(state, o, fingerprint, path):
    """Raise ValueError where going on from `state` would mix two different trainings."""
    if not {"options", "fingerprint", "step", "optimizers"} <= state.keys():
        raise ValueError(f"'{path}' is not what a training goes on from: delete it, or choose another --name")
    free = ("epochs", "lr", "save_minutes", "device", "precision", "data", "data_dir", "test", "name")
    for name, old in state["options"].items():
        if name not in free and getattr(o, name) != old:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"'{path}' was made with {option} {old}, not {getattr(o, name)}: choose another --name, or delete it"
            )
    if state["fingerprint"] != fingerprint:
        raise ValueError(f"'{path}' was made with other images than those of '{o.data}': choose another --name, or delete it")


def main(o):
    check_options(o)
    sigmas = [s for s in o.val_sigmas if o.sigma_min <= s <= o.sigma_max] or [o.sigma_max]

    device = utils.pick_device(o.device)
    bfloat16 = utils.pick_bfloat16(o.precision, device)
    torch.manual_seed(o.seed)
    model = ScoreModel(o.network, o.sigma_min, o.sigma_max, o.widths, o.blocks, bfloat16).to(device)
    earlier = {"images_seen": 0, "hours": 0.0}  # by the trainings that led to the weights this one starts from
    if o.init != "none":
        init = load_model(o.init)
        if init.config != model.config:
            raise ValueError(f"--init '{o.init}' is another network: {init.config}, not {model.config}")
        model.load_state_dict(init.state_dict())
        earlier = {name: init.info[name] + init.info.get("earlier", earlier)[name] for name in earlier}
    averaged = ScoreModel(**model.config, bfloat16=bfloat16).to(device)
    averaged.load_state_dict(model.state_dict())
    optimizers = make_optimizers(model, o)

    path, resume_path = Path("checkpoints", f"{o.name}.pt"), Path("checkpoints", f"{o.name}_resume.pt")
    if path.exists() and not resume_path.exists():
        raise ValueError(f"'{path}' exists and has no '{resume_path.name}' to go on from: choose another --name")
    images = utils.read_patches(o.data, o.data_dir)
    if o.val_images >= len(images):
        raise ValueError(f"--val-images {o.val_images} leaves none of the {len(images)} images of '{o.data}' to train on")
    test = None if o.test == "none" else utils.read_patches(o.test, o.data_dir, train=False)[:1000].to(device)
    fingerprint = zlib.crc32(images.numpy())
    images = images.to(device)  # as uint8 all of CIFAR-10 is 150 MB, so a batch is one indexing operation
    train, val = images[: -o.val_images], images[-o.val_images :]

    figure_path = Path("figures", f"{o.name}_training.png")
    start, seconds, loss_sum = 0, 0.0, torch.zeros((), device=device)
    history = {"sigmas": sigmas, "steps": [], "loss": [], "psnr_steps": [], "psnr": []}
    if resume_path.exists():
        state = utils.load_checkpoint(resume_path)
        check_resumable(state, o, fingerprint, resume_path)
        model.load_state_dict(state["model"])
        averaged.load_state_dict(state["averaged"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        start, seconds, history = state["step"], state["seconds"], state["history"]
        loss_sum += state["loss_sum"]

    steps_per_epoch = math.ceil(len(train) / o.batch_size)
    steps = o.epochs * steps_per_epoch
    if start >= steps:
        raise ValueError(f"'{path}' is trained for {o.epochs} epochs already: give more --epochs to go on")
    parameters = sum(p.numel() for p in model.parameters())
    hardware = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    print(
        f"{o.network}, {parameters:,} parameters, on {hardware} in {'bfloat16' if bfloat16 else 'float32'}; "
        f"{len(train):,} training images, {o.epochs} epochs of {steps_per_epoch} steps"
        + (f"; going on from step {start}" if start else "")
    )

    def seen(step):
        return step // steps_per_epoch * len(train) + step % steps_per_epoch * o.batch_size

    def finite(loss, step):
        if not (math.isfinite(loss.item()) and all(p.isfinite().all() for p in model.parameters())):
            bar.close()
            raise ValueError(
                f"the loss or a weight is not finite at step {step}; the checkpoint is as last saved: lower --lr {o.lr}"
            )
        return loss.item()

    def save(step):
        state = {"loss_sum": finite(loss_sum, step), "step": step, "seconds": seconds + time.perf_counter() - started}
        state |= {"history": history, "options": vars(o), "fingerprint": fingerprint}
        state |= {"model": model.state_dict(), "averaged": averaged.state_dict()}
        state |= {"optimizers": [optimizer.state_dict() for optimizer in optimizers]}
        utils.save_checkpoint(resume_path, state)
        info = {
            "data": o.data, "training_images": len(train), "images_seen": seen(step), "epochs": step / steps_per_epoch,
            "hours": state["seconds"] / 3600, "earlier": earlier, "hardware": hardware, "torch": str(torch.__version__),
            "options": vars(o), "val_psnr": dict(zip(sigmas, history["psnr"][-1])) if history["psnr"] else {},
            "test_psnr": test_psnr,
        }  # fmt: skip
        utils.save_checkpoint(path, {"config": model.config, "weights": averaged.state_dict(), "info": info})
        if history["psnr"]:
            utils.plot_training(figure_path, history, len(train) / steps_per_epoch)

    stop = []  # a signal only notes itself here, so that no step is cut in half
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stop.append(number))
    started = last_save = time.perf_counter()
    test_psnr = {}
    bar = tqdm(total=seen(steps), initial=seen(start), unit="img", unit_scale=True, smoothing=0.05)
    for step in range(start + 1, steps + 1):
        x0, sigma, noise = draw_batch(train, step - 1, o)
        loss = denoising_loss(model, x0, sigma, noise)
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(step - 1, steps, o)
            optimizer.step()
        with torch.no_grad():
            decay = min(o.ema, step / (step + 9))  # the first averages are short, to forget the start
            torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)
        loss_sum += loss.detach()
        bar.update(len(x0))

        if step % o.log_steps == 0:
            history["steps"].append(step)
            history["loss"].append(finite(loss_sum, step) / o.log_steps)
            check_falling(history["loss"], step, o)
            loss_sum.zero_()
            bar.set_postfix(loss=f"{history['loss'][-1]:.4f}")
        if step % steps_per_epoch == 0:
            history["psnr_steps"].append(step)
            history["psnr"].append(validate(averaged, val, sigmas))
            bar.write(f"epoch {step // steps_per_epoch}: validation PSNR {in_words(sigmas, history['psnr'][-1])}")
        if step == steps and test is not None:
            test_psnr = dict(zip(sigmas, validate(averaged, test, sigmas)))
            bar.write(f"test PSNR {in_words(sigmas, test_psnr.values())}")
        if step == steps or stop or time.perf_counter() - last_save > 60 * o.save_minutes:
            save(step)
            last_save = time.perf_counter()
        if stop and step < steps:
            bar.close()
            print(f"stopped after step {step} of {steps}, saved in '{resume_path}': run the same command to go on")
            sys.exit(130)
    bar.close()
    print(f"{seen(steps):,} images seen; wrote '{path}' and '{figure_path}'")


def check_falling(losses, step, o):
    """Raise ValueError where the last of the averaged losses is above ten times the lowest of them: a divergence."""
    if losses[-1] > 10 * min(losses):
        rise = f"from {min(losses):.3g} to {losses[-1]:.3g} at step {step}"
        raise ValueError(f"the loss rose {rise}; the checkpoint is as last saved: lower --lr {o.lr}")


def in_words(sigmas, values):
    return "  ".join(f"{value:.2f} dB at {sigma:g}" for sigma, value in zip(sigmas, values))


if __name__ == "__main__":
    utils.run_script(main, globals())

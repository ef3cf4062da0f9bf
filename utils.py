"""Everything around the mathematics: options, images in and out, metrics, safe files, figures."""

import argparse
import contextlib
import csv
import fcntl
import math
import os
import platform
import re
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
import skimage
import torch
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from skimage.metrics import structural_similarity
from torchvision.datasets import CIFAR10

# -----------------------------------------------------------------------------
# Constants to options
# -----------------------------------------------------------------------------


def options(constants):
    """Return the upper-case constants of a script, its globals(), under the names of their options but for the dashes."""
    return {name.lower(): value for name, value in constants.items() if re.fullmatch(r"[A-Z][A-Z0-9_]*", name)}


def set_options(constants, arguments=None):
    """Set the upper-case constants of a script, its globals(), to what the command line gives.

    `BATCH_SIZE = 64  # images per step` becomes `--batch-size`, of the constant's type, with the comment as its
    help. A tuple takes one or more values, a bool becomes --flag and --no-flag, and a constant that is None takes
    a number or "none". A wrong option prints one line and exits with code 2.
    """
    source = Path(constants["__file__"]).read_text(encoding="utf-8")
    comments = dict(re.findall(r"^([A-Z][A-Z0-9_]*) = .*?  # (.*)$", source, re.MULTILINE))
    parser = argparse.ArgumentParser(
        description=constants["__doc__"], formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = lambda message: _fail(parser.prog, f"{message}; see --help")  # without the usage of 30 options
    for name, value in options(constants).items():
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value).lower() if value is None else value
        option = {"default": value, "help": f"{comments.get(name.upper(), '')} [{shown}]".replace("%", "%%")}
        if isinstance(value, bool):
            option["action"] = argparse.BooleanOptionalAction
        elif value is None:
            option.update(type=_number_or_none, metavar="NUMBER")
        else:
            example = value[0] if isinstance(value, tuple) else value
            metavar = {int: "INT", float: "NUMBER", str: "TEXT"}[type(example)]
            option.update(type=type(example), metavar=metavar, nargs="+" if isinstance(value, tuple) else None)
        parser.add_argument("--" + name.replace("_", "-"), **option)
    for name, value in vars(parser.parse_args(arguments)).items():
        constants[name.upper()] = tuple(value) if isinstance(value, list) else value


def _number_or_none(text):
    try:
        return None if text.lower() == "none" else int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"neither a number nor none: '{text}'") from None


def check(condition, name, value, words):
    """Raise ValueError, in the words of the option, unless the condition on the constant of that name holds."""
    if not condition:
        raise ValueError(f"--{name.lower().replace('_', '-')} {words}, not {value}")


def run_script(main, constants):
    """Set the constants of a script and run its main(): bad input is one line on stderr and exit code 2, Ctrl-C is code 130."""
    script = Path(constants["__file__"]).name
    try:
        set_options(constants)
        main()
    except (ValueError, OSError) as error:
        _fail(script, error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        _fail(script, "out of memory: take fewer or smaller images at a time, or a smaller network (see the options)")
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(script, message):
    print(f"{script}: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def pick_device(name):
    """Return the torch device of that name; "auto" is the GPU where there is one. Raises ValueError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).cpu()  # "meta" has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device '{name}' cannot be used: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def pick_bfloat16(precision, device):
    """Whether to run convolutions in bfloat16: as asked, or, with "auto", where the hardware multiplies it. Raises ValueError."""
    check(precision in ("auto", "bfloat16", "float32"), "PRECISION", precision, "must be auto, bfloat16 or float32")
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def hardware(device):
    """Return in words what a script runs on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type.upper()}, {torch.get_num_threads()} threads"


def find(path):
    """Return the path, or that in the project's folder, where only this one exists: scripts find what ships from any folder."""
    shipped = Path(__file__).resolve().parent / path
    return shipped if shipped.exists() and not Path(path).exists() else Path(path)


@contextlib.contextmanager
def stop_signals():
    """Within the block Ctrl-C and SIGTERM only note themselves, in the list it yields, so that no step is cut in half."""
    received = []
    before = {
        number: signal.signal(number, lambda number, _: received.append(number)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -----------------------------------------------------------------------------
# Images
# -----------------------------------------------------------------------------

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
SAMPLES = ("astronaut", "chelsea", "coffee", "motorcycle_left", "rocket")  # come with scikit-image


def read_images(source, data_dir="data"):
    """Read images to denoise: a list of (name, array), every name once, each array float32 (H, W, 3) in [0, 1].

    source: "samples" (five photographs that scikit-image installs, as thumbnails of 128 x 128 pixels), "cifar10"
    (its test images), or a path: an image file, a .npy array, or a folder of them. An array is uint8, or floats in
    [0, 1] plus noise, which are neither clipped nor rounded; (H, W, 3) or (N, H, W, 3).
    Raises FileNotFoundError, or ValueError naming the file that cannot be read.
    """
    if source == "samples":
        return [(name, _to_float(_thumbnail(photograph, 128))) for name, photograph in _sample_photographs()]
    if source == "cifar10":
        return [(f"cifar10_{i:05d}", _to_float(x)) for i, x in enumerate(_cifar10(data_dir, train=False))]
    images = []
    for path, array in _read_path(source):
        if array.ndim == 3:
            images.append((path.stem, _to_float(array)))
        else:
            images += [(f"{path.stem}_{i:05d}", _to_float(x)) for i, x in enumerate(array)]
    taken = set()  # names that stand twice (a.png and a.jpg, or in two folders) are told apart by a number
    for k, (name, image) in enumerate(images):
        number, unique = 1, name
        while unique in taken:
            number, unique = number + 1, f"{name}_{number + 1}"
        taken.add(unique)
        images[k] = (unique, image)
    return images


def read_patches(source, data_dir="data", train=True, size=32):
    """Read images to train on: a uint8 tensor (N, 3, size, size).

    source: "cifar10" (its training images, or its test images if not train), "samples" (the five photographs),
    or a path as in read_images. Whatever is larger is cut into patches side by side; a smaller image is refused.
    """
    if source == "cifar10":
        stacks = [_cifar10(data_dir, train)]
    elif source == "samples":
        stacks = [photograph[None] for _, photograph in _sample_photographs()]
    else:
        stacks = []
        for path, array in _read_path(source):
            if min(array.shape[-3:-1]) < size:
                raise ValueError(f"'{path}' is {array.shape[-2]} x {array.shape[-3]} pixels, smaller than {size} x {size}")
            stacks.append(array if array.ndim == 4 else array[None])
    return torch.from_numpy(np.concatenate([_cut(_to_uint8(x), size) for x in stacks])).permute(0, 3, 1, 2).contiguous()


def _cut(images, size):  # (N, H, W, 3) -> (N * rows * columns, size, size, 3)
    n, height, width, _ = images.shape
    rows, columns = height // size, width // size
    grid = images[:, : rows * size, : columns * size].reshape(n, rows, size, columns, size, 3)
    return grid.swapaxes(2, 3).reshape(-1, size, size, 3)


def _to_float(array):
    return array.astype(np.float32) / 255 if array.dtype == np.uint8 else array.astype(np.float32)


def _to_uint8(array):
    return array if array.dtype == np.uint8 else (array.clip(0, 1) * 255).round().astype(np.uint8)


def _sample_photographs():
    folder = Path(skimage.__file__).parent / "data"
    return [
        (name, np.asarray(Image.open(folder / f"{name}.{'jpg' if name == 'rocket' else 'png'}").convert("RGB")))
        for name in SAMPLES
    ]


def _thumbnail(photograph, size):
    return np.asarray(ImageOps.fit(Image.fromarray(photograph), (size, size), Image.Resampling.LANCZOS))


def _cifar10(data_dir, train):  # -> uint8 (N, 32, 32, 3)
    try:
        return CIFAR10(data_dir, train=train, download=True).data
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"CIFAR-10 is neither in '{data_dir}' nor could it be downloaded ({error}): connect to the network, "
            f"put cifar-10-python.tar.gz into '{data_dir}', or name a folder of images instead"
        ) from None


def _read_path(source):
    """Return (path, array) of an image or array file, or of every such file in a folder, in the order of names."""
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: '{source}' (and not 'samples' or 'cifar10')")
    if path.is_file():
        return [(path, _read_file(path))]
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in (*IMAGE_SUFFIXES, ".npy") and p.is_file())
    if not files:
        raise ValueError(f"no image ({' '.join(IMAGE_SUFFIXES)}) and no .npy array in the folder '{source}'")
    return [(p, _read_file(p)) for p in files]


def _read_file(path):
    if path.suffix.lower() != ".npy":
        try:
            with Image.open(path) as image:
                image = ImageOps.exif_transpose(image)
                if image.mode[0] in "IF":  # 16-bit or float greys, which convert("RGB") would clip
                    grey = np.asarray(image, dtype=np.float32) / (1 if image.mode == "F" else 65535)
                    return np.repeat(grey[:, :, None], 3, axis=2)
                return np.asarray(image.convert("RGB"))
        except Exception as error:  # whatever damaged pixels, headers or tags can raise
            raise ValueError(f"'{path}' cannot be read as an image ({type(error).__name__})") from None
    try:
        array = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("an archive of arrays")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"'{path}' cannot be read as a .npy array ({type(error).__name__})") from None
    if array.ndim not in (3, 4) or array.shape[-1] != 3 or 0 in array.shape:
        raise ValueError(f"'{path}' has shape {array.shape}; expected (H, W, 3) or (N, H, W, 3)")
    if array.dtype != np.uint8 and not (array.dtype.kind == "f" and -0.5 <= array.mean() <= 1.5):
        mean = f" of mean {array.mean():.3g}" if array.dtype.kind in "fiu" else ""
        raise ValueError(f"'{path}' holds {array.dtype}{mean}; expected uint8, or floats in [0, 1] plus noise")
    return array


def add_noise(images, sigma, seed):
    """Return each image plus sigma times unit Gaussian noise, neither clipped nor rounded.

    The noise of all images is one stream of numpy's default generator, so image i gets the same noise whatever
    comes after it, and images of one size (N, H, W, 3) get default_rng(seed).standard_normal((N, H, W, 3)).
    """
    rng = np.random.default_rng(seed)
    return [(x + sigma * rng.standard_normal(x.shape)).astype(np.float32) for x in images]


# -----------------------------------------------------------------------------
# Metrics
# -----------------------------------------------------------------------------


def psnr(images, x0):
    """Peak signal-to-noise ratio in dB of each image, clipped to [0, 1]; (B, 3, H, W) tensors -> (B,)."""
    return -10 * ((images.clamp(0, 1).double() - x0) ** 2).mean(dim=(1, 2, 3)).log10()


def ssim(images, x0):
    """Structural similarity (Wang et al. 2004, Gaussian window) of each image, clipped to [0, 1].

    (B, 3, H, W) tensors -> (B,) array; nan for images below 11 x 11 pixels, the size of the window.
    """
    if min(x0.shape[2:]) < 11:
        return np.full(len(x0), np.nan)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    pairs = zip(images.clamp(0, 1).double().cpu().numpy(), x0.double().cpu().numpy())
    return np.array([structural_similarity(a, b, channel_axis=0, data_range=1, **options) for a, b in pairs])


def estimate_sigma(image):
    """Estimate the noise level of one (H, W, 3) image by its finest diagonal wavelets (Donoho and Johnstone 1994, sec. 4.2).

    Their median absolute value is 0.6745 sigma if they hold noise alone; fine texture makes the estimate too high.
    """
    import pywt  # here, since only pictures of unknown noise need it

    _, (_, _, diagonal) = pywt.dwt2(image.astype(np.float64), "db2", axes=(0, 1))
    return float(np.median(np.abs(diagonal), axis=(0, 1)).mean() / 0.6745)


# -----------------------------------------------------------------------------
# Around a denoiser
# -----------------------------------------------------------------------------


def tiled(denoiser, pixels, bar=None, halo=96):
    """Return a denoiser that works in tiles of about `pixels` pixels where x (B, 3, H, W) has more, and moves a progress bar.

    Each tile sees `halo` pixels around it, about the network's reach, and starts on the grid of its attention windows, so
    the seams differ from the whole by little more than rounding.
    """

    def in_tiles(x, sigma):
        height, width = x.shape[2:]
        size = max(64, math.isqrt(pixels) - 2 * halo) // 32 * 32 if height * width > pixels else max(height, width)
        out = torch.empty_like(x)
        for top in range(0, height, size):
            for left in range(0, width, size):
                up, back = min(top, halo), min(left, halo)
                tile = out[:, :, top : top + size, left : left + size]
                part = x[:, :, top - up : top + size + halo, left - back : left + size + halo]
                tile[:] = denoiser(part, sigma)[:, :, up : up + size, back : back + size]
                if bar is not None:
                    bar.update(tile[:, 0].numel())
        return out

    return in_tiles


class Film:
    """A denoiser that counts its calls and keeps, of the first `count` images, what it was asked and what it said.

    So any sampler can be filmed. frames: [(sigma, x, denoised)], the middle of each image at most, on the device of x.
    """

    def __init__(self, denoiser, count, size=256):
        self.denoiser, self.count, self.size = denoiser, count, size
        self.calls, self.frames = 0, []

    def __call__(self, x, sigma):
        denoised = self.denoiser(x, sigma)
        self.calls += 1
        if self.count:
            self.frames.append((float(sigma), *(crop(z[: self.count], self.size).clone() for z in (x, denoised))))
        return denoised


# -----------------------------------------------------------------------------
# Files
# -----------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path`, and move it into place only if the block ends without an exception.

    Raises OSError, also where a library says in its own way that it could not write.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}_", suffix=path.suffix)
    os.close(handle)
    try:
        yield temporary
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise OSError(f"'{path}' cannot be written ({error}); what was there before is unchanged") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


@contextlib.contextmanager
def only_process(*paths):
    """Make sure, before any work, that these files can be written, and by one process at a time; remove what a crash left.

    Raises OSError if a folder is not writable, and ValueError if another process holds the first path.
    """
    for path in paths:
        with replacing(path.parent / f"{path.stem}.tmp"):
            pass
        (path.parent / f"{path.stem}.tmp").unlink()
    with open(paths[0].parent / f".{paths[0].stem}.lock", "w", encoding="utf-8") as lock:  # held while the process lives
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another process is writing '{paths[0]}': wait for it, or choose another name") from None
        for path in paths:
            for leftover in path.parent.glob(f".{path.stem}_????????{path.suffix}"):
                leftover.unlink()
        yield


def save_checkpoint(path, checkpoint):
    """Write a dictionary of tensors and plain values, whole or not at all."""
    with replacing(path) as temporary:
        torch.save(checkpoint, temporary)


def save_image(path, x):
    """Write a (3, H, W) image in [0, 1], clipped and rounded, as 8-bit PNG."""
    with replacing(path) as temporary:
        Image.fromarray(to_array(x)).save(temporary, "PNG")


def save_csv(path, rows):
    """Write rows, dictionaries by column, as comma-separated text."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def save_figure(path, figure):
    """Write a matplotlib figure, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, pil_kwargs={"quality": 85, "subsampling": 0} if Path(path).suffix == ".jpg" else {})


# -----------------------------------------------------------------------------
# Tables
# -----------------------------------------------------------------------------


def table(rows):
    """Return rows, dictionaries by column, as an aligned Markdown table; a column that a row lacks is empty there."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    digits = {"PSNR": 2, "SSIM": 3, "sigma": 4, "seconds": 4}

    def cell(column, value):
        places = next((n for word, n in digits.items() if word in column), 3)
        return f"{value:.{places}f}" if isinstance(value, float) else str(value)

    cells = [columns, *([cell(column, row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    left = [all(isinstance(row.get(column, ""), str) for row in rows) for column in columns]
    lines = [[c.ljust(w) if text else c.rjust(w) for c, w, text in zip(line, widths, left)] for line in cells]
    lines.insert(1, ["-" * w if text else "-" * (w - 1) + ":" for w, text in zip(widths, left)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def means(rows, key, **labels):
    """Return for each value of rows[key] one row: the labels, and the mean of every column of numbers."""
    groups = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return [
        {c: labels.get(c, v if isinstance(v, str) else float(np.mean([row[c] for row in group]))) for c, v in group[0].items()}
        for group in groups.values()
    ]


# -----------------------------------------------------------------------------
# Figures
# -----------------------------------------------------------------------------


def plot_training(path, losses, psnrs, images_per_step):
    """Draw the loss, and the validation PSNR, against the images seen.

    losses: [[step, loss], ...]. psnrs: [[step, {noise level: PSNR}], ...].
    """
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    axes = figure.subplots(1, 2)
    if losses:
        steps, values = np.array(losses).T
        axes[0].plot(steps * images_per_step / 1e6, values, color="black", linewidth=0.8)
        axes[0].set(ylim=(min(values) * 0.98, np.median(values) * 1.5))
    for sigma in psnrs[-1][1] if psnrs else []:
        curve = np.array([[step, psnr[sigma]] for step, psnr in psnrs])
        axes[1].plot(curve[:, 0] * images_per_step / 1e6, curve[:, 1], marker=".")
        axes[1].annotate(
            f" $\\sigma$ {sigma:g}: {curve[-1, 1]:.2f}", (curve[-1, 0] * images_per_step / 1e6, curve[-1, 1]), fontsize=8
        )
    axes[0].set(title="training loss", ylabel="error / typical error of its noise level")
    axes[1].set(title="validation", ylabel="PSNR of one step, dB")
    axes[1].margins(x=0.2)
    for panel in axes:
        panel.set(xlabel="images seen, millions")
        panel.grid(alpha=0.3)
    save_figure(path, figure)


def plot_pictures(path, rows, detail=40):
    """Draw rows of (title, (3, H, W) image, caption); below pictures larger than 64 pixels stands their middle, enlarged."""
    grid = []
    for row in rows:
        grid.append([(title, crop(image, 256), caption) for title, image, caption in row])
        if max(row[0][1].shape[1:]) > 64:
            grid.append([("", crop(image, detail), "") for _, image, _ in row])
    columns = max(map(len, grid))
    figure = Figure(figsize=(1.6 * columns, 1.75 * len(grid) + 0.2), layout="constrained")
    for axes, panels in zip(figure.subplots(len(grid), columns, squeeze=False), grid):
        for panel, (title, image, caption) in zip(axes, panels):
            panel.imshow(to_array(image), interpolation="nearest")
            panel.set_title(title if panels is grid[0] else "", fontsize=9)
            panel.set_xlabel(caption, fontsize=8)
            panel.set(xticks=[], yticks=[])
        for panel in axes[len(panels) :]:
            panel.set_axis_off()
    save_figure(path, figure)


def save_animation(path, films, most=30):
    """Write a GIF of the states (above) and the estimates of x0 from them (below), a column for each picture.

    films: per picture a list of (sigma, state, estimate), images (3, H, W); at most `most` of them are shown.
    """
    longest = max(map(len, films))
    figure = Figure(figsize=(1.8 * len(films), 4.2), layout="constrained")
    axes = figure.subplots(2, len(films), squeeze=False)
    writer = PillowWriter(fps=8)
    with replacing(path) as temporary, writer.saving(figure, temporary, dpi=80):
        for k in [*np.unique(np.linspace(0, longest - 1, min(most, longest)).round().astype(int)), *[longest - 1] * 10]:
            for column, film in zip(axes.T, films):
                sigma, *images = film[min(k, len(film) - 1)]
                for panel, image, title in zip(column, images, (f"state, $\\sigma$ = {sigma:.3f}", "estimate")):
                    panel.clear()
                    panel.imshow(to_array(crop(image, 256)), interpolation="nearest")
                    panel.set_title(title, fontsize=9)
                    panel.set_axis_off()
            writer.grab_frame()


def crop(x, size):
    """Return the middle of images (..., H, W), at most size x size."""
    top, left = max(0, x.shape[-2] - size) // 2, max(0, x.shape[-1] - size) // 2
    return x[..., top : top + size, left : left + size]


def to_array(x):
    """Return a (3, H, W) image in [0, 1], clipped and rounded, as uint8 (H, W, 3)."""
    return (x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()

"""Everything around the mathematics: options, images in and out, metrics, safe files, figures."""

import argparse
import contextlib
import csv
import os
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import skimage
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
from skimage.metrics import structural_similarity
from torchvision.datasets import CIFAR10

# -----------------------------------------------------------------------------
# Constants to options
# -----------------------------------------------------------------------------


def parse_options(constants, arguments=None):
    """Make every upper-case constant of a script an option of the same name, and read the command line.

    `BATCH_SIZE = 64  # images per step` becomes `--batch-size`, of the constant's type, with the comment as its
    help. A tuple takes one or more values, a bool becomes --flag and --no-flag, and a constant that is None takes
    a number or "none". constants: the script's globals(). Returns a namespace with lower-case names; a wrong
    option prints one line and exits with code 2.
    """
    source = Path(constants["__file__"]).read_text(encoding="utf-8")
    comments = dict(re.findall(r"^([A-Z][A-Z0-9_]*) = .*?  # (.*)$", source, re.MULTILINE))
    parser = argparse.ArgumentParser(
        description=constants["__doc__"], formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = lambda message: _fail(parser.prog, f"{message}; see --help")  # without the usage of 30 options
    for name, value in constants.items():
        if not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
            continue
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value).lower() if value is None else value
        option = {"default": value, "help": f"{comments.get(name, '')} [{shown}]".replace("%", "%%")}
        if isinstance(value, bool):
            option["action"] = argparse.BooleanOptionalAction
        elif value is None:
            option.update(type=_number_or_none, metavar="NUMBER")
        else:
            example = value[0] if isinstance(value, tuple) else value
            metavar = {int: "INT", float: "NUMBER", str: "TEXT"}[type(example)]
            option.update(type=type(example), metavar=metavar, nargs="+" if isinstance(value, tuple) else None)
        parser.add_argument("--" + name.lower().replace("_", "-"), **option)
    options = parser.parse_args(arguments)
    return argparse.Namespace(**{k: tuple(v) if isinstance(v, list) else v for k, v in vars(options).items()})


def _number_or_none(text):
    try:
        return None if text.lower() == "none" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"neither a number nor none: '{text}'") from None


def run_script(main, constants):
    """Run main(options) of a script: bad input is one line on stderr and exit code 2, Ctrl-C is exit code 130."""
    try:
        main(parse_options(constants))
    except (ValueError, OSError) as error:
        _fail(Path(constants["__file__"]).name, error)
    except (MemoryError, torch.OutOfMemoryError):
        _fail(Path(constants["__file__"]).name, "out of memory: take fewer or smaller images at a time (see the batch option)")
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
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device '{name}' cannot be used: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def pick_bfloat16(precision, device):
    """Whether to run convolutions in bfloat16: as asked, or, with "auto", where the hardware multiplies it. Raises ValueError."""
    if precision not in ("auto", "bfloat16", "float32"):
        raise ValueError(f"--precision must be auto, bfloat16 or float32, not '{precision}'")
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


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
# Files
# -----------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path`, and move it into place only if the block ends without an exception."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}_", suffix=path.suffix)
    os.close(handle)
    try:
        yield temporary
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def save_checkpoint(path, checkpoint):
    """Write a dictionary of tensors and plain values, whole or not at all."""
    with replacing(path) as temporary:
        torch.save(checkpoint, temporary)


def load_checkpoint(path):
    """Read what save_checkpoint wrote; raises ValueError if the file is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged archive or pickle can raise
        raise ValueError(f"'{path}' is damaged ({type(error).__name__}): delete it, or choose another name") from None


def save_image(path, x):
    """Write a (3, H, W) image in [0, 1], clipped and rounded, as 8-bit PNG."""
    with replacing(path) as temporary:
        Image.fromarray(_to_uint8(x.permute(1, 2, 0).cpu().numpy())).save(temporary, "PNG")


def save_csv(path, rows):
    """Write rows of values as comma-separated text."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def save_figure(path, figure):
    """Write a matplotlib figure, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, pil_kwargs={"quality": 85, "subsampling": 0} if Path(path).suffix == ".jpg" else {})


# -----------------------------------------------------------------------------
# Figures
# -----------------------------------------------------------------------------


def plot_training(path, history, images_per_step):
    """Draw the loss, and the validation PSNR per noise level relative to the end, against the images seen.

    history: {"steps": [...], "loss": [...], "psnr_steps": [...], "psnr": [[one value per level], ...], "sigmas": [...]}.
    """
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(np.array(history["steps"]) * images_per_step / 1e6, history["loss"], color="black", linewidth=0.8)
    left.set(title="training loss", ylabel="weighted denoising error", yscale="log")
    left.yaxis.set_major_formatter("{x:.3g}")
    left.yaxis.set_minor_formatter("{x:.3g}")
    curves = np.array(history["psnr"])
    for sigma, curve in zip(history["sigmas"], curves.T):
        label = f"$\\sigma$ = {sigma:g}: {curve[-1]:.2f} dB"
        right.plot(np.array(history["psnr_steps"]) * images_per_step / 1e6, curve - curve[-1], marker=".", label=label)
    right.set(title="validation, one step", ylabel="PSNR relative to the last, dB")
    right.legend(title="noise level: last value", fontsize=8)
    for axes in (left, right):
        axes.set(xlabel="images seen, millions")
        axes.grid(alpha=0.3)
    save_figure(path, figure)


def middle(x, size=256):
    """Return a copy of the middle of a (3, H, W) image, at most size x size: what a figure has room for."""
    top, left = max(0, x.shape[1] - size) // 2, max(0, x.shape[2] - size) // 2
    return x[:, top : top + size, left : left + size].clone()


def thumbnail(x):
    """Return the middle of a (3, H, W) image as a uint8 (H, W, 3) array."""
    return _to_uint8(middle(x).permute(1, 2, 0).cpu().numpy())


def plot_grid(path, rows, tile=128):
    """Draw rows of (title, uint8 image, caption), each image pixel a whole number of screen pixels; titles of the first row."""
    height, width = (max(image.shape[axis] for row in rows for _, image, _ in row) for axis in (0, 1))
    scale = max(1, round(tile / max(height, width)))
    columns, gap, text = max(map(len, rows)), 6, 18
    pixels = (columns * (width * scale + gap) + gap, len(rows) * (height * scale + text) + text + gap)
    figure = Figure(figsize=(pixels[0] / 100, pixels[1] / 100), dpi=100)
    for r, row in enumerate(rows):
        for c, (title, image, caption) in enumerate(row):
            h, w = image.shape[0] * scale, image.shape[1] * scale
            x, y = gap + c * (width * scale + gap), text + gap + r * (height * scale + text)
            axes = figure.add_axes([x / pixels[0], 1 - (y + h) / pixels[1], w / pixels[0], h / pixels[1]])
            axes.imshow(image, interpolation="nearest", aspect="auto")
            axes.set_axis_off()
            middle = (x + w / 2) / pixels[0]
            figure.text(middle, 1 - (y + h + text / 2) / pixels[1], caption, ha="center", va="center", fontsize=8)
            if r == 0:
                figure.text(middle, 1 - (text + gap) / 2 / pixels[1], title, ha="center", va="center", fontsize=9)
    save_figure(path, figure)


def save_animation(path, strips, tile=128, most=30):
    """Write a GIF of the states x_t (above) and the estimates of x0 from them (below), one column per image.

    strips: per image a list of (sigma, state, estimate), uint8 (H, W, 3) each; at most `most` of them are shown.
    """
    longest = max(map(len, strips))
    picked = np.unique(np.linspace(0, longest - 1, min(most, longest)).round().astype(int))
    height, width = (max(strip[0][1].shape[axis] for strip in strips) for axis in (0, 1))
    scale, gap, text = max(1, round(tile / max(height, width))), 4, 20
    font, frames = ImageFont.load_default(13), []
    for k in picked:
        page = Image.new("RGB", (len(strips) * (width * scale + gap) + gap, 2 * (height * scale + gap + text)), "white")
        draw = ImageDraw.Draw(page)
        levels = sorted({f"{strip[min(k, len(strip) - 1)][0]:.3f}" for strip in strips})
        draw.text((gap, 2), f"state, noise level {' to '.join(levels[:: max(1, len(levels) - 1)])}", "black", font)
        draw.text((gap, 2 + height * scale + gap + text), "estimate of the clean image", "black", font)
        for c, strip in enumerate(strips):
            for r, image in enumerate(strip[min(k, len(strip) - 1)][1:]):
                tile_image = Image.fromarray(image)
                tile_image = tile_image.resize((tile_image.width * scale, tile_image.height * scale), Image.Resampling.NEAREST)
                page.paste(tile_image, (gap + c * (width * scale + gap), text + r * (height * scale + gap + text)))
        frames.append(page)
    with replacing(path) as temporary:
        frames[0].save(temporary, save_all=True, append_images=frames[1:], duration=[100] * (len(frames) - 1) + [2000], loop=0)

"""Everything around the mathematics: options, devices, images, metrics, files, tables, figures."""

import argparse
import contextlib
import functools
import math
import os
import platform
import re
import shutil
import signal
import sys
import warnings
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import filelock
import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch.utils.checkpoint import checkpoint

# -----------------------------------------------------------------------------
# Constants to options
# -----------------------------------------------------------------------------


def options(constants):
    """Return the upper-case constants of a script, its globals(), by the names of their options.

    A dictionary is none, and no name that starts with an underscore.
    """
    upper = [name for name in constants if name.isupper() and not name.startswith("_")]
    plain = [name for name in upper if not isinstance(constants[name], dict)]
    return {name.lower(): constants[name] for name in plain}


def set_options(constants, arguments=None, positional=None):
    """Set the upper-case constants of a script, its globals(), to what the command line gives.

    `BATCH_SIZE = 64  # images per step` becomes `--batch-size`, of the constant's type, with the
    comment as its help. A constant that is None takes a number or "none"; a number may be a
    fraction, 25/255. The constant `positional` also takes the words that belong to no option.
    """
    source = Path(constants["__file__"]).read_text(encoding="utf-8")
    comments = dict(re.findall(r"^([A-Z][A-Z0-9_]*) = .*?  # (.*)$", source, re.MULTILINE))
    parser = argparse.ArgumentParser(description=constants["__doc__"], allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # keeps the docstring's lines
    parser.error = functools.partial(_fail, parser.prog)  # without the usage of 20 options
    for name, value in options(constants).items():
        words = f"{comments.get(name.upper(), '')} [{value}]".replace("%", "%%")
        option = {"default": value, "help": words}
        if isinstance(value, bool):
            option["action"] = argparse.BooleanOptionalAction
        else:
            first = value[0] if isinstance(value, tuple) else value
            option["type"] = {int: int, str: str, float: _number}.get(type(first), _number_or_none)
            option["nargs"] = "+" if isinstance(value, tuple) else None
        parser.add_argument("--" + name.replace("_", "-"), **option)
    if positional:
        parser.add_argument(positional.lower(), nargs="*", default=argparse.SUPPRESS)
    for name, value in vars(parser.parse_intermixed_args(arguments)).items():
        constants[name.upper()] = tuple(value) if isinstance(value, list) else value


def _number(text):
    above, _, below = text.partition("/")
    try:
        return float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"not a number: '{text}'") from None


def _number_or_none(text):
    if text.lower() == "none":
        return None
    return int(text) if text.isdecimal() else _number(text)


def check(condition, name, value, words):
    """Raise ValueError, in the words of the option, unless the condition on that constant holds."""
    if not condition:
        raise ValueError(f"--{name.lower().replace('_', '-')} {words}, not {value}")


def run_script(main, constants, positional=None):
    """Run a script with its options; wrong input is one line and exit code 2, Ctrl-C code 130."""
    script = Path(constants["__file__"]).name
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # into a log, too
        set_options(constants, positional=positional)
        main()
    except (ValueError, OSError) as error:
        _fail(script, error)
    except (MemoryError, torch.OutOfMemoryError):
        _fail(script, "out of memory: use smaller images, smaller batches or a smaller network")
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(script, message):
    print(f"{script}: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


# -----------------------------------------------------------------------------
# Devices
# -----------------------------------------------------------------------------


def pick_device(name):
    """Return a torch device, "auto" a GPU if there is one; ValueError if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # one GPU for each process of torchrun
    try:
        torch.zeros(1, device=name).cpu()  # fails on "meta", which holds no values
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device '{name}' cannot be used: {error}") from None
    return torch.device(name)


def pick_bfloat16(precision, device):
    """Whether to run the network in bfloat16; for "auto", whether the hardware multiplies it."""
    words = "must be auto, bfloat16 or float32"
    check(precision in ("auto", "bfloat16", "float32"), "PRECISION", precision, words)
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def hardware(device, processes=1):
    """Return in words what a script runs on."""
    name = f"{platform.machine()} {device.type.upper()}, threads: {torch.get_num_threads()}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{processes} x {name}" if processes > 1 else name


# -----------------------------------------------------------------------------
# Images in and out
# -----------------------------------------------------------------------------

BUILTIN = ("samples", "cifar10")
SAMPLES = ("astronaut", "chelsea", "coffee", "motorcycle_left", "rocket")  # ship with scikit-image
SUFFIXES = (  # of the files that are read from a folder
    *(".bmp", ".exr", ".gif", ".jp2", ".jpeg", ".jpg", ".npy", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)
LACKING = {2: (0, 3), 3: (0,), 4: ()}  # axes that an array of so many lacks, to be (N, H, W, C)


@dataclass
class Image:
    """The frames of one file, all of one size, and what it takes to write others like them."""

    pixels: np.ndarray  # float32 (N, H, W, 3), or (N, H, W, 1) if grey; [0, 1] plus noise, upright
    name: str = ""  # of its results: the file's, with sub-folders, unique in a run
    builtin: bool = False  # one of "samples" or "cifar10"
    values: np.ndarray = None  # of the file, upright: (N, H, W, C), of .npy in its own shape
    black: float = 0.0  # the file's value of 0
    white: float = 255.0  # the file's value of 1
    suffix: str = ".png"  # of its results
    spec: object = None  # OpenImageIO's description of the file: profile, EXIF data, resolution


def read_images(sources, black=None, white=None, notify=print, failures=None, output=None, skip=()):
    """Yield the Images of all sources, one after another, so that memory holds one at a time.

    sources: one or more of "samples" (five photographs that scikit-image installs, as thumbnails),
    "cifar10" (its test images), files, and folders with their sub-folders. black, white: the file's
    values of 0 and 1; without, 0 and the largest value of its type, or 1 for floats. notify gets a
    line for every file that is left out, and the list `failures` its path. output: the folder of
    the results, which is not read. skip: paths that are no images to denoise.
    Raises FileNotFoundError for a source that is not there, and ValueError if nothing can be read
    or a file that is named lies in the output folder.
    """
    unread, taken = [], set()
    sources = [sources] if isinstance(sources, (str, Path)) else sources
    files = _find_files(sources, notify, output and Path(output).resolve(), skip)
    for path, name in files:
        try:
            own = path not in BUILTIN
            images = [_read(path, name, black, white, notify)] if own else _builtin(path)
            for image in images:
                name, number = image.name, 2
                while image.name.casefold() in taken:
                    image.name, number = f"{name}_{number}", number + 1
                taken.add(image.name.casefold())
                yield image
        except ValueError as error:
            if len(files) == 1:
                raise
            unread.append(path)
            if failures is not None:
                failures.append(path)
            notify(str(error))
    if unread:
        notify(f"{len(unread)} of {len(files)} files cannot be read and are left out")
    if not taken:
        raise ValueError(f"no image can be read in {' '.join(map(str, sources))}")


def _find_files(sources, notify, output, skip):
    """Return [(path, name of its results)]; the path of built-in images is their source."""
    files, skip = [], [Path(path).resolve() for path in skip]
    for source in sources:
        path = Path(source)
        if source in BUILTIN:
            files.append((source, source))
        elif path.is_dir():
            files += _files_below(path, notify, output)
        elif not path.exists():
            raise FileNotFoundError(f"no such file or folder: '{source}'")
        elif output in path.resolve().parents:
            words = "a result could overwrite it: choose another --output"
            raise ValueError(f"'{source}' lies in the output folder, {words}")
        else:
            files.append((path, path.stem))
    return [(path, name) for path, name in files if Path(path).resolve() not in skip]


def _files_below(folder, notify, output):
    files, others = [], []
    for path in sorted(folder.rglob("*")):
        below = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in below.parts)
        if hidden or path.is_dir() or output in path.resolve().parents:
            continue
        if path.suffix.lower() in SUFFIXES:
            files.append((path, below.with_suffix("").as_posix()))
        else:
            others.append(path.suffix)
    if others:
        notify(f"{len(others)} other files are not read: {' '.join(sorted(set(others)))}")
    return files


def _builtin(source):
    named = sample_photographs(128)
    if source == "cifar10":
        named = ((f"cifar10_{k:05d}", x) for k, x in enumerate(_cifar10(train=False)))
    for name, x in named:
        yield Image(x[None] / np.float32(255), name, builtin=True, values=x[None])


def _read(path, name, black, white, notify):
    """Return the Image of a file; raises ValueError that names it and says what is wrong."""
    suffix = path.suffix.lower()
    try:
        if not path.is_file():
            raise ValueError("not a regular file")  # to open a pipe would wait for ever
        if suffix == ".npy":
            values, spec = np.load(path, allow_pickle=False), None
            if values.ndim > 2 and values.shape[-1] == 2:
                raise ValueError("2 channels; save it as grey or RGB")
        else:
            values, spec = _read_oiio(path, notify)
        frames = np.expand_dims(values, LACKING.get(values.ndim, ()))
        usable = values.dtype.kind in "uif" and values.size > 0
        if not usable or frames.ndim != 4 or frames.shape[3] > 4:
            ways = "(H, W), (H, W, 3) or, for a stack, (N, H, W, 3)"
            found = f"{values.dtype} values of shape {values.shape}"
            raise ValueError(f"{found}; expected numbers, channels last: {ways}")
        black = 0 if black is None else black
        if white is None:
            white = 1 if values.dtype.kind == "f" else np.iinfo(values.dtype).max
        if not black < white < math.inf:
            raise ValueError(f"--white {white:g} must be above --black {black:g}")
        pixels = _pixels(frames[..., : 1 if frames.shape[3] < 3 else 3], black, white)
    except Exception as error:  # whatever damaged pixels or headers can raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"'{path}' cannot be read: {reason}") from None
    if suffix != ".npy":
        is_tiff = values.dtype.kind == "f" or suffix in (".tif", ".tiff")
        suffix = ".tif" if is_tiff else ".png"
    return Image(pixels, name, False, values, black, white, suffix, spec)


def _read_oiio(path, notify):
    """Return values (N, H, W, C), where N > 1 for TIFF stacks alone, and their description."""
    import OpenImageIO as oiio  # here: a machine that only trains on CIFAR-10 can do without

    asked = oiio.ImageSpec()
    asked.attribute("oiio:UnassociatedAlpha", 1)  # colours are not multiplied by alpha
    file = oiio.ImageInput.open(str(path), asked)
    if file is None:
        raise ValueError(oiio.geterror() or "not an image")
    spec, frames, count = file.spec(), [], 0
    if spec.nchannels in (2, 4) and spec.alpha_channel < 0:
        raise ValueError(f"{spec.nchannels} channels without alpha; save it as grey or RGB")
    while file.seek_subimage(count, 0):
        page = file.spec()
        alike = page.roi == spec.roi and page.format == spec.format
        if count == 0 or (alike and path.suffix.lower() in (".tif", ".tiff")):
            frame = file.read_image(count, 0, 0, page.nchannels, oiio.UNKNOWN)
            if frame is None:
                raise ValueError(file.geterror())
            upright = oiio.ImageBuf(frame)
            upright.specmod().attribute("Orientation", spec.get_int_attribute("Orientation", 1))
            frames.append(oiio.ImageBufAlgo.reorient(upright).get_pixels(page.format))
        count += 1
    if count > len(frames):
        kinds = "further frames are left out; only TIFF pages of one size and type are a stack"
        notify(f"'{path}': {count - len(frames)} {kinds}")
    of_a_stack = r'\bimages=(\d+)|"shape": \[(\d+),.*"truncated": true'  # of ImageJ or tifffile
    stack = re.search(of_a_stack, spec.get_string_attribute("ImageDescription"))
    if stack and int(stack[1] or stack[2]) > count:
        raise ValueError("several images behind one page header; save it with a page for each")
    values = np.stack(frames)
    white_is_zero = spec.get_int_attribute("tiff:PhotometricInterpretation", 1) == 0
    if white_is_zero and values.dtype in (np.uint16, np.uint32):  # of 8 bits, it is read as black
        values = ~values
    return values, spec


def _pixels(values, black, white):
    with np.errstate(over="ignore", invalid="ignore"):
        pixels = ((values.astype(np.float64) - black) / (white - black)).astype(np.float32)
    if not np.isfinite(pixels).all():
        raise ValueError("values that are not numbers")
    grey = (pixels[..., 1:] == pixels[..., :1]).all()
    return pixels[..., :1] if grey else pixels


def write_image(path, image, pixels):
    """Write pixels (N, H, W, 1 or 3) in the form of the Image's file, with its alpha and profile.

    Integers are clipped and rounded, floats are neither.
    """
    like = np.expand_dims(image.values, LACKING[image.values.ndim])
    values = pixels.astype(np.float64) * (image.white - image.black) + image.black
    if like.dtype.kind != "f":
        ends = np.iinfo(like.dtype)
        values = np.rint(values).clip(ends.min, ends.max)
    channels = 1 if like.shape[3] < 3 else 3
    values = np.broadcast_to(values, (*values.shape[:3], channels)).astype(like.dtype)
    if channels < like.shape[3]:
        factor = values.shape[1] // like.shape[1]  # of an enlarged image
        alpha = like[..., -1:].repeat(factor, 1).repeat(factor, 2)
        values = np.concatenate([values, alpha], axis=3)
    with replacing(path) as temporary:
        if image.suffix == ".npy":
            np.save(temporary, np.squeeze(values, LACKING[image.values.ndim]))
        else:
            _write_oiio(temporary, values, image.spec)


def _write_oiio(path, values, old):
    import OpenImageIO as oiio

    form = old.format if old else "uint8"
    spec = oiio.ImageSpec(values.shape[2], values.shape[1], values.shape[3], form)
    if old:
        spec.channelnames, spec.alpha_channel = old.channelnames, old.alpha_channel
        spec.extra_attribs = old.extra_attribs
        inks = old.get_string_attribute("ICCProfile:color_space") == "CMYK"  # are RGB now
        of_the_file = ("tiff:", "jpeg:", "planarconfig", "Orientation") + ("ICCProfile",) * inks
        for attribute in old.extra_attribs:
            if attribute.name.startswith(of_the_file):
                spec.erase_attribute(attribute.name)
    spec.attribute("oiio:UnassociatedAlpha", 1)
    compression = "none" if path.suffix == ".tif" else "zip"  # TIFF that every program can read
    spec.attribute("compression", compression)
    file = oiio.ImageOutput.create(str(path))
    written = file.open(str(path), (spec,) * len(values))
    for k, frame in enumerate(values):
        written = written and (k == 0 or file.open(str(path), spec, "AppendSubimage"))
        written = written and file.write_image(np.ascontiguousarray(frame))
    if not (file.close() and written):
        raise OSError(file.geterror() or "OpenImageIO cannot write it")


def training_images(source, train=True, smallest=32, notify=print):
    """Return the images to train on, uint8 (H, W, 3) each, in a list or an array.

    source: "cifar10" (its training images, or its test images if not train), "samples" (five
    photographs), or a path as in read_images. What is smaller than `smallest` pixels on a side or
    cannot be read is left out, named and counted. Raises ValueError if nothing is left.
    """
    if source == "cifar10" and smallest <= 32:
        return _cifar10(train)
    if source == "samples":
        return [photograph for _, photograph in sample_photographs()]
    found, small = [], []
    for image in read_images(source, notify=notify):
        if min(image.pixels.shape[1:3]) < smallest:
            small.append(image.name)
            continue
        eight_bits = np.rint(image.pixels.clip(0, 1) * 255).astype(np.uint8)
        found.extend(np.broadcast_to(eight_bits, (*eight_bits.shape[:3], 3)))
    size = f"{smallest} x {smallest} pixels"
    if small:
        notify(f"{len(small)} images are smaller than {size} and left out: {', '.join(small)}")
    if not found:
        raise ValueError(f"no image of '{source}' has {size}")
    return found


def sample_photographs(size=None):
    """Return scikit-image's photographs, [(name, uint8 (H, W, 3))], whole or size x size."""
    import skimage

    photographs = []
    for name in SAMPLES:
        (path,) = Path(skimage.__file__).with_name("data").glob(f"{name}.*")
        photograph = PIL.Image.open(path).convert("RGB")
        if size:
            photograph = PIL.ImageOps.fit(photograph, (size, size), PIL.Image.Resampling.LANCZOS)
        photographs.append((name, np.asarray(photograph)))
    return photographs


def _cifar10(train):  # -> uint8 (N, 32, 32, 3)
    from torchvision.datasets import CIFAR10  # here, since it takes 160 MB

    try:
        return CIFAR10("data", train=train, download=True).data
    except (OSError, RuntimeError) as error:
        ways = "put cifar-10-python.tar.gz there, or name a folder of images"
        what = "CIFAR-10 is neither in 'data' nor could it be downloaded"
        raise OSError(f"{what} ({error}): {ways}") from None


# -----------------------------------------------------------------------------
# Metrics and tables
# -----------------------------------------------------------------------------


def psnr(images, x0):
    """Peak signal-to-noise ratio in dB of each image, clipped to [0, 1]; (B, C, H, W) -> (B,)."""
    return -10 * ((images.clamp(0, 1).double() - x0) ** 2).mean(dim=(1, 2, 3)).log10()


def ssim(images, x0):
    """Structural similarity (Wang et al. 2004) of each image, clipped; (B, C, H, W) -> (B,).

    Images must have at least 11 x 11 pixels, the size of its Gaussian window.
    """
    from skimage.metrics import structural_similarity

    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    similarity = functools.partial(structural_similarity, channel_axis=0, data_range=1, **window)
    images, x0 = images.clamp(0, 1).double().cpu().numpy(), x0.double().cpu().numpy()
    return np.array(list(map(similarity, images, x0)))


def table(rows):
    """Return rows, dictionaries by column, as an aligned Markdown table."""
    lines = [""] * (len(rows) + 2)
    for column in dict.fromkeys(column for row in rows for column in row):
        values = [row.get(column, "") for row in rows]
        text = all(isinstance(value, str) for value in values)
        cells = [column] + [_cell(column, value) for value in values]
        width = max(map(len, cells))
        cells.insert(1, "-" * width if text else "-" * (width - 1) + ":")
        for k, cell in enumerate(cells):
            lines[k] += f"| {cell.ljust(width) if text else cell.rjust(width)} "
    return "\n".join(f"{line}|" for line in lines)


def _cell(column, value):
    digits = {"PSNR": 2, "SSIM": 3, "sigma": 4, "seconds": 2}
    places = next((n for word, n in digits.items() if word in column), 3)
    return f"{value:.{places}f}" if isinstance(value, float) else str(value)


def means(rows, key, name):
    """Return a row for each value of rows[key], with the means of the columns that all have.

    In the column `name` it says "mean of n". What differs and is no number is left empty.
    """
    found = []
    for kind in dict.fromkeys(row[key] for row in rows):
        group, mean = [row for row in rows if row[key] == kind], {}
        for column in group[0]:
            values = [row.get(column, "") for row in group]
            if column == name:
                mean[column] = f"mean of {len(group)}"
            elif len(set(values)) == 1:
                mean[column] = values[0]
            elif all(isinstance(value, (int, float)) for value in values):
                mean[column] = float(np.mean(values))
        found.append(mean)
    return found


# -----------------------------------------------------------------------------
# Around a denoiser
# -----------------------------------------------------------------------------


def tiled(denoiser, pixels=2**18, halo=64, update=None):
    """Return the denoiser, working on at most about `pixels` pixels at a time.

    A batch (B, C, H, W) is split into smaller ones, a large image into tiles. Each tile sees `halo`
    pixels around it, about the network's reach, so the seams differ from the whole image by little
    more than rounding; tiles start on the grid of 32 pixels that the network's attention has. sigma
    is a number or a tensor. For a gradient each of several parts is computed again, to keep memory
    small.
    update: called with the share of a whole call that is done, for a progress bar.
    """

    def denoise_parts(x, sigma):
        count, _, height, width = x.shape
        most, side = max(1, pixels // (height * width)), max(height, width)
        if height * width > pixels:
            side = max(64, math.isqrt(pixels) - 2 * halo) // 32 * 32
        parts = list(product(range(0, count, most), range(0, height, side), range(0, width, side)))
        one = denoiser
        if torch.is_grad_enabled() and len(parts) > 1:
            one = functools.partial(checkpoint, denoiser, use_reentrant=False)
        out = torch.empty_like(x)
        for first, row, column in parts:
            images = slice(first, first + most)
            top, left = max(row - halo, 0), max(column - halo, 0)
            seen = x[images, :, top : row + side + halo, left : column + side + halo]
            level = sigma[images] if torch.is_tensor(sigma) and sigma.numel() > 1 else sigma
            denoised = one(seen, level)[:, :, row - top :, column - left :]
            tile = out[images, :, row : row + side, column : column + side]
            tile.copy_(denoised[:, :, : tile.shape[2], : tile.shape[3]])
            if update is not None:
                update(1 / len(parts))
        return out

    return denoise_parts


def seeded_noise(seeds, device="cpu"):
    """Return a `noise` that draws for each image from a generator of its own.

    So a sample is the same in any batch. seeds: one integer for each image, else ValueError.
    """
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def noise(x):
        like = {"size": x.shape[1:], "dtype": x.dtype, "device": x.device}
        pairs = zip(generators, x, strict=True)
        return torch.stack([torch.randn(generator=generator, **like) for generator, _ in pairs])

    return noise


class Recorder:
    """A denoiser that counts its calls and keeps states and estimates of the first `count` images.

    So any sampler can be recorded. frames: [(sigma, x, denoised)], on the CPU, the middle of each
    image, at most size x size.
    """

    def __init__(self, denoiser, count, size=256):
        self.denoiser, self.count, self.size = denoiser, count, size
        self.calls, self.frames = 0, []

    def __call__(self, x, sigma):
        denoised = self.denoiser(x, sigma)
        self.calls += 1
        if self.count:
            pair = [crop(image[: self.count], self.size).cpu().clone() for image in (x, denoised)]
            self.frames.append((float(sigma), *pair))
        return denoised


def crop(x, size):
    """Return the middle of images (..., H, W), at most size x size."""
    top, left = max(0, x.shape[-2] - size) // 2, max(0, x.shape[-1] - size) // 2
    return x[..., top : top + size, left : left + size]


# -----------------------------------------------------------------------------
# Files
# -----------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path):
    """Yield a path for a new file or folder, which replaces `path` if the block does not fail."""
    path = Path(path)
    temporary = path.with_name(f".part_{path.name}")  # one name, so a crash leaves at most one file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        yield temporary
        if temporary.is_dir():
            _remove(path)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise OSError(f"'{path}' cannot be written ({error})") from error
    finally:
        _remove(temporary)


def _remove(path):
    shutil.rmtree(path, ignore_errors=True)  # a folder
    with contextlib.suppress(OSError):
        path.unlink()  # a file


@contextlib.contextmanager
def locked(*paths):
    """Make the folders of files; ValueError if another process is writing the first of them."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(paths[0].with_name(f".{paths[0].stem}.lock"), blocking=False):
            yield
    except filelock.Timeout:
        ways = "wait for it, or choose another name"
        raise ValueError(f"another process is writing '{paths[0]}': {ways}") from None


def save_checkpoint(path, checkpoint):
    """Write a dictionary of tensors and plain values, whole or not at all."""
    with replacing(path) as temporary:
        torch.save(checkpoint, temporary)


def save_png(path, x):
    """Write an image (1 or 3, H, W) in [0, 1], clipped and rounded, as 8-bit PNG."""
    with replacing(path) as temporary:
        PIL.Image.fromarray(to_array(x)).save(temporary)


# -----------------------------------------------------------------------------
# Figures
# -----------------------------------------------------------------------------


def new_figure(width, height, rows=1, columns=1):
    """Return a matplotlib figure of that size in inches, and its axes, an array (rows, columns)."""
    from matplotlib.figure import Figure  # here: to load it takes a second

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_figure(path, figure):
    """Write a matplotlib figure, whole or not at all."""
    with replacing(path) as temporary, warnings.catch_warnings(action="ignore"):  # missing letters
        figure.savefig(temporary, dpi=150)


def plot_training(path, losses, psnrs):
    """Plot the loss, and what the validation PSNR of each noise level gained, over the images seen.

    losses: [[images seen, loss], ...]. psnrs: [[images seen, {noise level: PSNR}], ...].
    """
    if not (losses and psnrs):  # a training that was stopped at once
        return
    figure, ((left, right),) = new_figure(9, 3.4, 1, 2)
    images, values = np.array(losses).T
    left.plot(images / 1e6, values, color="#0072B2", linewidth=1)
    left.set_ylim(values.min() * 0.98, np.median(values) * 1.3)
    left.set_title("training loss: squared error / typical error", fontsize=10)
    for sigma, last in psnrs[-1][1].items():
        gains = [psnr[sigma] - last for _, psnr in psnrs]
        label = f"$\\sigma$ = {sigma:g}, ends at {last:.2f} dB"
        right.plot([images / 1e6 for images, _ in psnrs], gains, ".-", linewidth=1, label=label)
    right.set_ylim(-1, 0.1)
    right.legend(fontsize=8)
    right.set_title("validation PSNR less that at the end, dB", fontsize=10)
    for axes in (left, right):
        axes.set_xlabel("images seen, millions")
        axes.grid(alpha=0.3)
    save_figure(path, figure)


def plot_images(path, rows, truth=False, detail=40):
    """Show rows of (title, image (C, H, W), note), and below large images their middle, enlarged.

    truth: the last image of a row is the clean one; under the others then stands their PSNR, after
    the note. Titles are those of the first row.
    """
    from matplotlib.patches import Rectangle

    grid = []
    for row in rows:
        grid.append(row)
        if detail and max(row[0][1].shape[1:]) > 64:
            grid.append([("", crop(image, detail), "") for _, image, _ in row])
    columns = max(map(len, grid))
    figure, axes = new_figure(1.6 * columns, 1.85 * len(grid) + 0.2, len(grid), columns)
    for line, row in zip(axes, grid):
        for panel, (title, image, note) in zip(line, row):
            panel.imshow(to_array(image), interpolation="nearest")
            if truth and panel is not line[len(row) - 1]:
                quality = f"{psnr(image[None], row[-1][1][None]).item():.2f} dB"
                note = f"{note}, {quality}" if note else quality
            panel.set_title(title if row is grid[0] else "", fontsize=9)
            panel.set_xlabel(note, fontsize=8)
            panel.set(xticks=[], yticks=[])
            if detail and max(image.shape[1:]) > 64:
                corner = [max(0, n - detail) // 2 - 0.5 for n in (image.shape[2], image.shape[1])]
                panel.add_patch(Rectangle(corner, detail, detail, fill=False, edgecolor="white"))
        for panel in line[len(row) :]:
            panel.set_axis_off()
    save_figure(path, figure)


def save_animation(path, frames, most=30):
    """Write a GIF of one image: the states on the left, the estimates of x0 on the right.

    frames: [(sigma, state, estimate), ...], images (C, H, W), of which at most `most` are shown.
    """
    pages = []
    for k in np.linspace(0, len(frames) - 1, min(most, len(frames))).round().astype(int):
        page = to_array(torch.cat(frames[k][1:], dim=2))
        scale = max(1, 160 // page.shape[0])  # small images are enlarged
        pages.append(PIL.Image.fromarray(page.repeat(scale, 0).repeat(scale, 1)))
    durations = [125] * (len(pages) - 1) + [1500]  # milliseconds; the last one stays
    with replacing(path) as temporary:
        options = {"append_images": pages[1:], "duration": durations, "loop": 0}
        pages[0].save(temporary, save_all=True, **options)


def to_array(x):
    """Return an image (1 or 3, H, W) in [0, 1], clipped and rounded, as uint8 (H, W, 3)."""
    eight_bits = (x.clamp(0, 1) * 255).round().byte()
    return eight_bits.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()

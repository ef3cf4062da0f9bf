"""Everything around the mathematics: options, devices, images, metrics, files, tables, figures."""

import argparse
import contextlib
import csv
import functools
import math
import os
import platform
import re
import shutil
import signal
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

# -----------------------------------------------------------------------------
# Constants to options
# -----------------------------------------------------------------------------


def options(constants):
    """Return the upper-case constants of a script, its globals(), by the names of their options."""
    named = re.compile(r"[A-Z][A-Z0-9_]*")
    return {name.lower(): value for name, value in constants.items() if named.fullmatch(name)}


def set_options(constants, arguments=None, positional=None):
    """Set the upper-case constants of a script, its globals(), to what the command line gives.

    `BATCH_SIZE = 64  # images per step` becomes `--batch-size`, of the constant's type, with the
    comment as its help. A tuple takes one or more values, a bool becomes --flag and --no-flag, and
    a constant that is None takes a number or "none". A number may be a fraction, 25/255. The
    constant `positional` also takes what stands before the first option. A wrong option prints one
    line and exits with code 2.
    """
    source = Path(constants["__file__"]).read_text(encoding="utf-8")
    comments = dict(re.findall(r"^([A-Z][A-Z0-9_]*) = .*?  # (.*)$", source, re.MULTILINE))
    parser = argparse.ArgumentParser(
        description=constants["__doc__"],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = functools.partial(
        _fail, parser.prog
    )  # one line, without the usage of 20 options
    for name, value in options(constants).items():
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        words = f"{comments.get(name.upper(), '')} [{shown}]".replace("%", "%%")
        kind = {"default": value, "help": words}
        if isinstance(value, bool):
            kind["action"] = argparse.BooleanOptionalAction
        else:
            first = value[0] if isinstance(value, tuple) else value
            kind["type"] = {int: int, str: str, float: _number}.get(type(first), _number_or_none)
            kind["metavar"] = {int: "INT", str: "TEXT"}.get(type(first), "NUMBER")
            kind["nargs"] = "+" if isinstance(value, tuple) else None
        parser.add_argument("--" + name.replace("_", "-"), **kind)
    if positional:
        parser.add_argument("first", nargs="*", metavar=positional)
    given = vars(parser.parse_intermixed_args(arguments))
    if first := given.pop("first", None):
        given[positional.lower()] = first
    for name, value in given.items():
        constants[name.upper()] = tuple(value) if isinstance(value, list) else value


def _number(text):
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ArithmeticError):
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
    """Set the constants of a script and run its main().

    Wrong input is one line on stderr and exit code 2; Ctrl-C is code 130.
    """
    script = Path(constants["__file__"]).name
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError):  # a notebook's streams cannot be changed
                stream.reconfigure(line_buffering=True, errors="backslashreplace")
        set_options(constants, positional=positional)
        main()
    except (ValueError, OSError) as error:
        _fail(script, error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
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
    """Return the torch device of that name; "auto" is the GPU where there is one.

    Raises ValueError if it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # one GPU for each process of torchrun
    try:
        with warnings.catch_warnings(action="ignore"):
            torch.zeros(1, device=name).cpu()  # fails on "meta", which holds no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device '{name}' cannot be used: {reason}") from None
    return torch.device(name)


def pick_bfloat16(precision, device):
    """Whether to run the network in bfloat16: "auto" does where the hardware multiplies it.

    Raises ValueError for any other word than "auto", "bfloat16" and "float32".
    """
    words = "must be auto, bfloat16 or float32"
    check(precision in ("auto", "bfloat16", "float32"), "PRECISION", precision, words)
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and cpu


def hardware(device, processes=1):
    """Return in words what a script runs on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        name = f"{platform.machine()} {device.type.upper()}, {threads} thread{'s' * (threads > 1)}"
    return f"{processes} x {name}" if processes > 1 else name


# -----------------------------------------------------------------------------
# Images in and out
# -----------------------------------------------------------------------------

SAMPLES = ("astronaut", "chelsea", "coffee", "motorcycle_left", "rocket")  # ship with scikit-image
SUFFIXES = (  # of the files that are read from a folder
    *(".bmp", ".exr", ".gif", ".jp2", ".jpeg", ".jpg", ".npy", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)


@dataclass
class Image:
    """The frames of one file, all of one size, and what it takes to write others like them."""

    pixels: np.ndarray  # float32 (N, H, W, 3), or (N, H, W, 1) if grey; [0, 1] plus noise, upright
    name: str = ""  # of its results: the file's, with sub-folders, unique in a run
    builtin: bool = False  # one of "samples" or "cifar10"
    dtype: np.dtype = np.dtype(np.uint8)  # of the file's values
    channels: int = 3  # in the file, without alpha
    alpha: np.ndarray | None = None  # (N, H, W, 1), the file's values
    black: float = 0.0  # the file's value of 0
    white: float = 255.0  # the file's value of 1
    suffix: str = ".png"  # of its results
    shape: tuple = ()  # of a .npy file's array
    spec: object = None  # OpenImageIO's description of the file: profile, EXIF data, resolution


def read_images(
    sources,
    data_dir="data",
    black=None,
    white=None,
    notify=print,
    failures=None,
    output=None,
    skip=(),
):
    """Yield the Images of all sources, one after another, so that memory holds one at a time.

    sources: one or more of "samples" (five photographs that scikit-image installs, as thumbnails),
    "cifar10" (its test images), files, and folders with their sub-folders. black, white: the file's
    values of 0 and 1; without, 0 and the largest value of its type, or 1 for floats. notify gets a
    line for every file that is left out, and the list `failures` its path. output: the folder of
    the results, which is not read. skip: paths that are no images to denoise.
    Raises FileNotFoundError for a source that is not there, and ValueError if nothing can be read
    or a result would overwrite an input.
    """
    failures, taken = [] if failures is None else failures, set()
    sources = [sources] if isinstance(sources, (str, Path)) else sources
    files = _find_files(sources, notify, output, skip)
    for name, path in files:
        try:
            if path in ("samples", "cifar10"):
                images = _builtin(path, data_dir)
            else:
                images = [_read_file(path, name, black, white, notify)]
            for image in images:
                image.name = _unique(image.name, taken)
                yield image
        except ValueError as error:
            if len(files) == 1:
                raise
            failures.append(path)
            notify(str(error))
    if failures:
        notify(f"{len(failures)} of {len(files)} files cannot be read and are left out")
    if not taken:
        raise ValueError(f"no image can be read in {' '.join(map(str, sources))}")


def _find_files(sources, notify, output, skip):  # -> [(name, path)]; both "samples" for these
    files, others = [], Counter()
    output, skip = output and Path(output).resolve(), [Path(path).resolve() for path in skip]
    for source in sources:
        path = Path(source)
        if source in ("samples", "cifar10"):
            files.append((source, source))
        elif path.is_dir():
            for found in sorted(path.rglob("*")):
                below = found.relative_to(path)
                hidden = any(part[0] == "." for part in below.parts)
                if hidden or found.is_dir() or (output and output in found.resolve().parents):
                    continue
                if found.suffix.lower() in SUFFIXES:
                    files.append((below.with_suffix("").as_posix(), found))
                else:
                    others[found.suffix.lower() or "without suffix"] += 1
        elif path.exists():
            files.append((path.stem, path))
        else:
            words = "(and not 'samples' or 'cifar10')"
            raise FileNotFoundError(f"no such file or folder: '{source}' {words}")
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common())
        notify(f"{others.total()} other files are not read: {kinds}")
    files = [(name, path) for name, path in files if Path(path).resolve() not in skip]
    if output:
        _check_results([Path(source).resolve().stem for source in sources], files, output)
    return files


def _check_results(names, files, output):
    """Raise ValueError if a result, NAME_kind in the output folder, could overwrite an input.

    names: those of results of all files together.
    """
    inside = [Path(path).resolve() for _, path in files]
    inside = [path for path in inside if output in path.parents]
    for name in [*names, *(name for name, _ in files)]:
        result = (output / name).resolve()
        for path in inside:
            if path.parent == result.parent and path.name.startswith(result.name + "_"):
                words = "choose another --output"
                raise ValueError(
                    f"a result of '{name}' could overwrite the input '{path}': {words}"
                )


def _unique(name, taken):
    name = name.encode()[:180].decode(
        errors="ignore"
    )  # file systems take 255 bytes, endings included
    number, free = 2, name
    while free.casefold() in taken:
        free, number = f"{name}_{number}", number + 1
    taken.add(free.casefold())
    return free


def _builtin(source, data_dir):
    if source == "cifar10":
        arrays = ((f"cifar10_{i:05d}", x) for i, x in enumerate(_cifar10(data_dir, train=False)))
    else:
        arrays = sample_photographs(128)
    for name, array in arrays:
        yield Image(_pixels(array[None], 0, 255), name, builtin=True)


def _read_file(path, name, black, white, notify):
    """Return the Image of a file; raises ValueError that names it and says what is wrong."""
    try:
        if not path.is_file():
            raise ValueError("not a regular file")  # to open a pipe would wait for ever
        if str(path).encode(errors="replace").decode() != str(path):
            raise ValueError("its name is not UTF-8; rename it")
        npy = path.suffix.lower() == ".npy"
        animation = _read_animation(path)
        if animation is not None:
            values, spec, shape = animation, None, ()
        else:
            values, spec, shape = _read_npy(path) if npy else _read_oiio(path, notify)
        dtype, channels, alpha = values.dtype, values.shape[3], None
        if dtype.kind not in "uif" or channels not in (1, 2, 3, 4) or 0 in values.shape:
            raise ValueError(f"{dtype} values in {channels} channels; save it as grey or RGB")
        if channels in (2, 4):
            values, alpha = values[..., :-1], values[..., -1:]
        black = 0 if black is None else black
        if white is None:
            white = 1 if dtype.kind == "f" else np.iinfo(dtype).max
        if not black < white < math.inf:
            raise ValueError(f"--white {white:g} must be above --black {black:g}")
        pixels = _pixels(values, black, white)
    except Exception as error:  # whatever damaged pixels or headers can raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"'{path}' cannot be read: {reason}") from None
    is_tiff = dtype.kind == "f" or len(values) > 1 or path.suffix.lower() in (".tif", ".tiff")
    suffix = ".npy" if npy else ".tif" if is_tiff else ".png"
    channels = values.shape[3]
    return Image(pixels, name, False, dtype, channels, alpha, black, white, suffix, shape, spec)


def _read_npy(path):  # -> (N, H, W, C), nothing, shape of the array
    array = np.load(path, allow_pickle=False)
    frames = (
        array if array.ndim == 4 else array[None, ..., None] if array.ndim == 2 else array[None]
    )
    if frames.ndim != 4 or frames.shape[3] not in (1, 2, 3, 4):
        ways = "channels last: (H, W), (H, W, 3), or (N, H, W, 3) for a stack"
        raise ValueError(f"an array of shape {array.shape}; expected {ways}")
    return np.asarray(frames, array.dtype.newbyteorder("=")), None, array.shape


def _read_animation(path):  # -> (N, H, W, 4), or None where there are no several frames
    """Read the frames of a GIF, WebP or PNG, which OpenImageIO does not put together."""
    from PIL import Image as PIL
    from PIL import ImageSequence

    if path.suffix.lower() not in (".gif", ".png", ".webp"):
        return None
    with PIL.open(path) as file:
        if getattr(file, "n_frames", 1) == 1:
            return None
        return np.stack([frame.convert("RGBA") for frame in ImageSequence.Iterator(file)])


def _read_oiio(path, notify):  # -> (N, H, W, C), its description, nothing
    import OpenImageIO as oiio  # here: a machine that only trains on CIFAR-10 can do without

    asked = oiio.ImageSpec()
    asked.attribute("oiio:UnassociatedAlpha", 1)  # colours are not multiplied by alpha
    file = oiio.ImageInput.open(str(path), asked)
    if file is None:
        raise ValueError(oiio.geterror() or "not an image")
    spec, frames, others = file.spec(), [], 0
    if spec.nchannels in (2, 4) and spec.alpha_channel < 0:
        raise ValueError(f"{spec.nchannels} channels without alpha; save it as grey or RGB")
    while file.seek_subimage(len(frames) + others, 0):
        found = file.spec()
        frame = file.read_image(len(frames) + others, 0, 0, found.nchannels, oiio.UNKNOWN)
        if frame is None:
            raise ValueError(file.geterror())
        alike = frame.shape == (spec.height, spec.width, spec.nchannels)
        if alike and found.format == spec.format:
            upright = oiio.ImageBuf(frame)
            upright.specmod().attribute("Orientation", spec.get_int_attribute("Orientation", 1))
            frames.append(oiio.ImageBufAlgo.reorient(upright).get_pixels(found.format))
        else:
            others += 1
    if others:
        kinds = "frames of another size or type, such as thumbnails, are left out"
        notify(f"'{path}': {others} {kinds}")
    described = spec.get_string_attribute("ImageDescription")
    stack = re.search(r"\bimages=(\d+)", described)  # ImageJ's and tifffile's way to say so
    stack = stack or re.search(r'"shape": \[(\d+),.*"truncated": true', described)
    if stack and int(stack[1]) > len(frames) + others:
        raise ValueError(f"{stack[1]} images behind one page header; save it with a page for each")
    values = np.stack(frames)
    white_is_zero = spec.get_int_attribute("tiff:PhotometricInterpretation", 1) == 0
    if white_is_zero and values.dtype in (np.uint16, np.uint32):  # of 8 bits, it is read as black
        values = ~values
    return values, spec, ()


def _pixels(values, black, white):
    with np.errstate(over="ignore", invalid="ignore"):
        pixels = (values.astype(np.float32) - np.float32(black)) / np.float32(white - black)
    if not np.isfinite(pixels).all():
        raise ValueError("values that are not numbers")
    grey = (pixels[..., 1:] == pixels[..., :1]).all()
    return pixels[..., :1] if grey else pixels


def write_image(path, image, pixels):
    """Write pixels (N, H, W, 1 or 3), in place of those of the Image, as its file was.

    Integers are clipped and rounded, floats are neither. Type, channels, alpha, colour profile and
    EXIF data are the Image's.
    """
    values = pixels.astype(np.float64 if image.dtype.itemsize > 2 else np.float32)
    values = values * (image.white - image.black) + image.black
    if image.dtype.kind != "f":
        ends = np.iinfo(image.dtype)
        values = np.rint(values).clip(ends.min, ends.max)
    values = np.broadcast_to(values, (*values.shape[:3], image.channels)).astype(image.dtype)
    if image.alpha is not None:
        factor = values.shape[1] // image.alpha.shape[1]  # of an enlarged image
        alpha = image.alpha.repeat(factor, 1).repeat(factor, 2)
        values = np.concatenate([values, alpha], axis=3)
    with replacing(path) as temporary:
        if image.suffix != ".npy":
            _write_oiio(temporary, image, values)
            return
        if len(image.shape) < 4:
            values = values[0]
        with open(temporary, "wb") as file:
            np.save(file, values[..., 0] if len(image.shape) == 2 else values)


def _write_oiio(path, image, values):
    import OpenImageIO as oiio

    spec = oiio.ImageSpec(*values.shape[2:0:-1], values.shape[3], str(values.dtype))
    spec.attribute("oiio:UnassociatedAlpha", 1)
    if image.spec:
        spec = image.spec.copy()
    spec.width, spec.height = spec.full_width, spec.full_height = values.shape[2], values.shape[1]
    spec.x = spec.y = spec.full_x = spec.full_y = spec.tile_width = spec.tile_height = 0
    spec.attribute("compression", "none")  # which every program can read
    for attribute in list(spec.extra_attribs):
        if attribute.name.startswith(("tiff:", "jpeg:", "planarconfig", "Orientation")):
            spec.erase_attribute(attribute.name)  # of how that file was written, not of the image
        if spec.get_string_attribute("ICCProfile:color_space") == "CMYK":
            spec.erase_attribute("ICCProfile")  # these colours are RGB now
    file = oiio.ImageOutput.create(str(path))
    written = file.open(str(path), (spec,) * len(values))
    for k, frame in enumerate(values):
        written = written and (k == 0 or file.open(str(path), spec, "AppendSubimage"))
        written = written and file.write_image(np.ascontiguousarray(frame))
    if not (file.close() and written):
        raise OSError(file.geterror() or "OpenImageIO cannot write it")


def training_images(source, data_dir="data", train=True, smallest=32, notify=print):
    """Return the images to train on, uint8 (H, W, 3) each, in a list or an array.

    source: "cifar10" (its training images, or its test images if not train), "samples" (five
    photographs), or a path as in read_images. What is smaller than `smallest` pixels on a side or
    cannot be read is left out, named and counted. Raises ValueError if nothing is left.
    """
    if source == "cifar10":
        return _cifar10(data_dir, train)
    if source == "samples":
        return [photograph for _, photograph in sample_photographs()]
    found, small = [], 0
    for image in read_images([source], data_dir, notify=notify):
        if min(image.pixels.shape[1:3]) < smallest:
            small += 1
            height, width = image.pixels.shape[1:3]
            words = f"smaller than {smallest} x {smallest}, is left out"
            notify(f"'{image.name}', {width} x {height} pixels, {words}")
            continue
        eight_bits = np.rint(image.pixels.clip(0, 1) * 255).astype(np.uint8)
        found.extend(np.broadcast_to(eight_bits, (*eight_bits.shape[:3], 3)))
    if small:
        notify(f"{small} images are too small and left out")
    if not found:
        raise ValueError(f"no image of '{source}' has {smallest} x {smallest} pixels")
    return found


def sample_photographs(size=None):
    """Return scikit-image's photographs, [(name, uint8 (H, W, 3))], whole or size x size."""
    import skimage
    from PIL import Image as PIL
    from PIL import ImageOps

    photographs = []
    for name in SAMPLES:
        suffix = "jpg" if name == "rocket" else "png"
        photograph = PIL.open(Path(skimage.__file__).parent / "data" / f"{name}.{suffix}")
        photograph = photograph.convert("RGB")
        if size:
            photograph = ImageOps.fit(photograph, (size, size), PIL.Resampling.LANCZOS)
        photographs.append((name, np.asarray(photograph)))
    return photographs


def _cifar10(data_dir, train):  # -> uint8 (N, 32, 32, 3)
    from torchvision.datasets import CIFAR10  # here, since it takes 160 MB

    try:
        return CIFAR10(data_dir, train=train, download=True).data
    except (OSError, RuntimeError) as error:
        what = f"CIFAR-10 is neither in '{data_dir}' nor could it be downloaded ({error})"
        ways = (
            "put cifar-10-python.tar.gz there, connect to the network, or name a folder of images"
        )
        raise OSError(f"{what}: {ways}") from None


# -----------------------------------------------------------------------------
# Metrics
# -----------------------------------------------------------------------------


def psnr(images, x0):
    """Peak signal-to-noise ratio in dB of each image, clipped to [0, 1]; (B, C, H, W) -> (B,)."""
    return -10 * ((images.clamp(0, 1).double() - x0) ** 2).mean(dim=(1, 2, 3)).log10()


def ssim(images, x0):
    """Structural similarity (Wang et al. 2004, Gaussian window) of each image, clipped to [0, 1].

    (B, C, H, W) tensors -> (B,) array; nan below 11 x 11 pixels, the size of the window.
    """
    from skimage.metrics import structural_similarity

    if min(x0.shape[2:]) < 11:
        return np.full(len(x0), np.nan)
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    pairs = zip(images.clamp(0, 1).double().cpu().numpy(), x0.double().cpu().numpy())
    return np.array(
        [structural_similarity(a, b, channel_axis=0, data_range=1, **window) for a, b in pairs]
    )


# -----------------------------------------------------------------------------
# Around a denoiser
# -----------------------------------------------------------------------------


def tiled(denoiser, pixels=2**18, halo=64, update=None):
    """Return the denoiser, working on at most about `pixels` pixels at a time.

    A batch (B, C, H, W) is split into smaller ones, a large image into tiles. Each tile sees `halo`
    pixels around it, about the network's reach, so the seams differ from the whole image by little
    more than rounding; tiles start on the grid of 32 pixels that the network's attention has. For
    a gradient every part is computed again, to keep memory small.
    update: called with the share of a whole call that is done, for a progress bar.
    """

    def denoise_parts(x, sigma):
        parts = _parts(x.shape, pixels, halo)
        one = denoiser
        if torch.is_grad_enabled() and len(parts) > 1:
            one = functools.partial(checkpoint, denoiser, use_reentrant=False)
        out = torch.empty_like(x)
        for some, (rows, seen_rows), (columns, seen_columns) in parts:
            per_image = torch.is_tensor(sigma) and sigma.ndim > 0 and len(sigma) == len(x)
            level = sigma[some] if per_image else sigma
            denoised = one(x[some, :, seen_rows, seen_columns], level)
            top, left = rows.start - seen_rows.start, columns.start - seen_columns.start
            height, width = rows.stop - rows.start, columns.stop - columns.start
            out[some, :, rows, columns] = denoised[:, :, top : top + height, left : left + width]
            if update is not None:
                update(1 / len(parts))
        return out

    return denoise_parts


def _parts(shape, pixels, halo):
    """Return slices (images, (rows, rows seen), (columns, columns seen)) that cover a batch."""
    count, _, height, width = shape
    most = max(1, pixels // (height * width))
    images = [slice(start, start + most) for start in range(0, count, most)]
    size = max(height, width)
    if height * width > pixels:
        size = max(64, math.isqrt(pixels) - 2 * halo) // 32 * 32
    sides = []
    for n in (height, width):
        starts = [(start, min(start + size, n)) for start in range(0, n, size)]
        sides.append([(slice(a, b), slice(max(a - halo, 0), min(b + halo, n))) for a, b in starts])
    return list(product(images, *sides))


def seeded_noise(seeds, device="cpu"):
    """Return a `noise` that draws for each image from a generator of its own.

    So a sample is the same in any batch. seeds: one integer for each image. The noise raises
    ValueError for another number of images.
    """
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def noise(x):
        if len(x) != len(generators):
            raise ValueError(f"{len(generators)} seeds for {len(x)} images: give one for each")
        options = {"dtype": x.dtype, "device": x.device}
        return torch.stack([torch.randn(x.shape[1:], generator=g, **options) for g in generators])

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
    """Yield a temporary path beside `path`, moved into place if the block ends without exception.

    What is made there may be a file or a folder. Raises OSError, also where a library fails to
    write in a way of its own.
    """
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
        kept = "what was there before is unchanged"
        raise OSError(f"'{path}' cannot be written ({error}); {kept}") from error
    finally:
        _remove(temporary)


def _remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def locked(*paths):
    """Let one process at a time write these files; before any work, make sure that it can.

    Raises OSError if one cannot be written, ValueError if another process holds the first.
    """
    import filelock

    for path in paths:
        with replacing(path.with_name(f".test_{path.name}")) as temporary:
            temporary.touch()
        path.with_name(f".test_{path.name}").unlink()
        if path.is_dir():
            raise OSError(f"'{path}' cannot be written: it is a folder")
    try:
        with filelock.FileLock(paths[0].parent / f".{paths[0].stem}.lock", blocking=False):
            yield
    except filelock.Timeout:
        ways = "wait for it, or choose another name"
        raise ValueError(f"another process is writing '{paths[0]}': {ways}") from None


def save_checkpoint(path, checkpoint):
    """Write a dictionary of tensors and plain values, whole or not at all."""
    with replacing(path) as temporary:
        torch.save(checkpoint, temporary)


def save_csv(path, rows):
    """Write rows, dictionaries by column, as comma-separated text; what a row lacks is empty."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def save_png(path, x):
    """Write an image (1 or 3, H, W) in [0, 1], clipped and rounded, as 8-bit PNG."""
    from PIL import Image as PIL

    with replacing(path) as temporary:
        PIL.fromarray(to_array(x)).save(temporary)


# -----------------------------------------------------------------------------
# Tables
# -----------------------------------------------------------------------------


def table(rows):
    """Return rows, dictionaries by column, as an aligned Markdown table."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [columns]
    for row in rows:
        cells.append([_cell(column, row.get(column, "")) for column in columns])
    widths = [max(map(len, column)) for column in zip(*cells)]
    text = [all(isinstance(row.get(column, ""), str) for row in rows) for column in columns]
    lines = []
    for line in cells:
        padded = [c.ljust(w) if t else c.rjust(w) for c, w, t in zip(line, widths, text)]
        lines.append(f"| {' | '.join(padded)} |")
    rule = ["-" * w if t else "-" * (w - 1) + ":" for w, t in zip(widths, text)]
    return "\n".join([lines[0], f"| {' | '.join(rule)} |", *lines[1:]])


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
        group = [row for row in rows if row[key] == kind]
        mean = {name: f"mean of {len(group)}"}
        for column in [column for column in group[0] if column != name]:
            values = [row.get(column, "") for row in group]
            if all(value == values[0] for value in values):
                mean[column] = values[0]
            elif all(isinstance(value, (int, float)) for value in values):
                mean[column] = float(np.mean(values))
        found.append(mean)
    return found


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
    options = {"pil_kwargs": {"quality": 65}} if Path(path).suffix == ".jpg" else {}
    with replacing(path) as temporary, warnings.catch_warnings(action="ignore"):  # missing letters
        figure.savefig(temporary, dpi=150, **options)


def plot_training(path, losses, psnrs):
    """Plot the loss, and what the validation PSNR of each noise level gained, over the images seen.

    losses: [[images seen, loss], ...]. psnrs: [[images seen, {noise level: PSNR}], ...].
    """
    figure, ((left, right),) = new_figure(9, 3.4, 1, 2)
    if losses:
        images, values = np.array(losses).T
        left.plot(images / 1e6, values, color="#0072B2", linewidth=1)
        left.set_ylim(values.min() * 0.98, np.median(values) * 1.3)
    left.set_title("training loss: squared error / typical error", fontsize=10)
    for sigma, last in psnrs[-1][1].items() if psnrs else ():
        gains = [psnr[sigma] - last for _, psnr in psnrs]
        label = f"$\\sigma$ = {sigma:g}, ends at {last:.2f} dB"
        right.plot([images / 1e6 for images, _ in psnrs], gains, ".-", linewidth=1, label=label)
    if psnrs:
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
    grid = []
    for row in rows:
        grid.append([(image, note) for _, image, note in row])
        if detail and max(row[0][1].shape[1:]) > 64:
            grid.append([(crop(image, detail), "") for _, image, _ in row])
    columns = max(map(len, grid))
    figure, axes = new_figure(1.6 * columns, 1.85 * len(grid) + 0.2, len(grid), columns)
    for line, shown in zip(axes, grid):
        for panel, (image, note) in zip(line, shown):
            panel.imshow(to_array(image), interpolation="nearest")
            if truth and panel is not line[len(shown) - 1]:
                x0 = shown[-1][0]
                quality = f"{psnr(image[None], x0[None]).item():.2f} dB"
                note = f"{note}, {quality}" if note else quality
            panel.set_xlabel(note, fontsize=8)
            panel.set(xticks=[], yticks=[])
            if detail and max(image.shape[1:]) > 64:
                corner = [max(0, n - detail) // 2 - 0.5 for n in (image.shape[2], image.shape[1])]
                panel.add_patch(_square(corner, detail))
        for panel in line[len(shown) :]:
            panel.set_axis_off()
    for panel, (title, _, _) in zip(axes[0], rows[0]):
        panel.set_title(title, fontsize=9)
    save_figure(path, figure)


def _square(corner, side):
    from matplotlib.patches import Rectangle

    return Rectangle(corner, side, side, fill=False, edgecolor="white")


def save_animation(path, films, most=30, size=160):
    """Write a GIF of the states (above) and the estimates of x0 (below), a column for each image.

    films: for each image [(sigma, state, estimate), ...], images (C, H, W).
    """
    from PIL import Image as PIL

    pages, longest = [], max(map(len, films))
    for k in np.linspace(0, longest - 1, min(most, longest)).round().astype(int):
        page = PIL.new("RGB", (size * len(films), 2 * size))
        for column, film in enumerate(films):
            for row, shown in enumerate(film[min(k, len(film) - 1)][1:]):
                image = PIL.fromarray(to_array(shown))
                scale = size / max(image.size)
                sides = (round(image.width * scale), round(image.height * scale))
                page.paste(image.resize(sides), (column * size, row * size))
        pages.append(page)
    durations = [125] * (len(pages) - 1) + [1500]  # milliseconds; the last one stays
    with replacing(path) as temporary:
        options = {"append_images": pages[1:], "duration": durations, "loop": 0}
        pages[0].save(temporary, save_all=True, **options)


def to_array(x):
    """Return an image (1 or 3, H, W) in [0, 1], clipped and rounded, as uint8 (H, W, 3)."""
    eight_bits = (x.clamp(0, 1) * 255).round().byte()
    return eight_bits.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()


def save_map(path, variance, title):
    """Write the square root of a variance map (C, H, W), averaged over 5 x 5 pixels.

    To path.npy goes an array (H, W, C), to path.png a figure of the mean over channels.
    """
    averaged = torch.nn.functional.avg_pool2d(
        variance[None].float(), 5, 1, 2, count_include_pad=False
    )[0]
    averaged = averaged.clamp(min=0)
    with replacing(f"{path}.npy") as temporary:
        np.save(temporary, averaged.sqrt().permute(1, 2, 0).numpy())
    step = max(1, max(variance.shape[1:]) // 1500)  # more does not show
    image = averaged[:, ::step, ::step].mean(0).sqrt().numpy()
    height = min(12, 0.6 + 5.5 * image.shape[0] / image.shape[1])
    figure, ((axes,),) = new_figure(6.5, height)
    top = np.quantile(image, 0.99)
    heatmap = axes.imshow(image, cmap="magma", vmin=0, vmax=top, interpolation="nearest")
    figure.colorbar(heatmap, shrink=0.8)
    plain = title.encode("utf-8", "replace").decode()
    axes.set_title(plain, fontsize=9, parse_math=False)  # with the name of somebody's file
    axes.set_axis_off()
    save_figure(f"{path}.png", figure)

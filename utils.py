"""Everything around the mathematics: options, images in and out, metrics, safe files, figures."""

import argparse
import contextlib
import csv
import functools
import itertools
import json
import math
import os
import platform
import re
import signal
import sys
import tempfile
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import imagecodecs
import matplotlib
import numpy as np
import skimage
import tifffile
import torch
import torch.distributed as dist
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from scipy import ndimage
from skimage.metrics import structural_similarity
from torch.utils.checkpoint import checkpoint

# -----------------------------------------------------------------------------
# Constants to options
# -----------------------------------------------------------------------------


def options(constants):
    """Return the upper-case constants of a script, its globals(), under the names of their options but for the dashes."""
    return {name.lower(): value for name, value in constants.items() if re.fullmatch(r"[A-Z][A-Z0-9_]*", name)}


def set_options(constants, arguments=None, positional=None):
    """Set the upper-case constants of a script, its globals(), to what the command line gives.

    `BATCH_SIZE = 64  # images per step` becomes `--batch-size`, of the constant's type, with the comment as its
    help. A tuple takes one or more values, a bool becomes --flag and --no-flag, and a constant that is None takes
    a number or "none". A number may be a fraction. The constant `positional` also takes what has no option before it.
    A wrong option prints one line and exits with code 2.
    """
    source = Path(constants["__file__"]).read_text(encoding="utf-8")
    comments = dict(re.findall(r"^([A-Z][A-Z0-9_]*) = .*?  # (.*)$", source, re.MULTILINE))
    parser = argparse.ArgumentParser(
        description=constants["__doc__"], formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = lambda message: _fail(parser.prog, f"{message}; see --help")  # without the usage of 30 options
    kinds = {int: (int, "INT"), float: (_number, "NUMBER"), str: (str, "TEXT"), type(None): (_number_or_none, "NUMBER")}
    for name, value in options(constants).items():
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value).lower() if value is None else value
        option = {"default": value, "help": f"{comments.get(name.upper(), '')} [{shown}]".replace("%", "%%")}
        if isinstance(value, bool):
            option["action"] = argparse.BooleanOptionalAction
        else:
            option["type"], option["metavar"] = kinds[type(value[0] if isinstance(value, tuple) else value)]
            option["nargs"] = "+" if isinstance(value, tuple) else None
        parser.add_argument("--" + name.replace("_", "-"), **option)
    if positional:
        parser.add_argument("first", nargs="*", metavar=positional)
    given = vars(parser.parse_intermixed_args(arguments))
    if first := given.pop("first", None):  # and what the option names, if it does
        more = given[positional.lower()]
        given[positional.lower()] = first + (more if isinstance(more, list) else [])
    for name, value in given.items():
        constants[name.upper()] = tuple(value) if isinstance(value, list) else value


def _number_or_none(text):
    return None if text.lower() == "none" else int(text) if text.isdecimal() else _number(text)


def _number(text):
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ArithmeticError):
        raise argparse.ArgumentTypeError(f"not a number: '{text}'") from None


def check(condition, name, value, words):
    """Raise ValueError, in the words of the option, unless the condition on the constant of that name holds."""
    if not condition:
        raise ValueError(f"--{name.lower().replace('_', '-')} {words}, not {value}")


def run_script(main, constants, positional=None):
    """Set the constants of a script and run its main(): bad input is one line on stderr and exit code 2, Ctrl-C is code 130."""
    script = Path(constants["__file__"]).name
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the script may have let Ctrl-C end it while it loaded
        with contextlib.suppress(AttributeError):  # a notebook's has no such thing
            # A file then shows a line when it is made, and a name that it cannot hold is no error.
            sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
        set_options(constants, positional=positional)
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
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name  # a GPU for each process
    try:
        with warnings.catch_warnings(action="ignore"):  # of devices that are going out of use
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


def hardware(device, processes=1):
    """Return in words what a script runs on."""
    cpu = f"{platform.machine()} {device.type.upper()}, {torch.get_num_threads()} threads"
    return f"{processes} x " * (processes > 1) + (torch.cuda.get_device_name(device) if device.type == "cuda" else cpu)


def find(path):
    """Return the path, or that in the project's folder, where only this one exists: scripts find what ships from any folder."""
    shipped = Path(__file__).resolve().parent / path
    return shipped if shipped.exists() and not Path(path).exists() else Path(path)


@contextlib.contextmanager
def stop_signals():
    """Within the block Ctrl-C and SIGTERM only note themselves, in the list it yields, so that no step is cut in half."""
    received = []
    before = {number: signal.signal(number, lambda n, _: received.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -----------------------------------------------------------------------------
# More than one process
# -----------------------------------------------------------------------------


def join_processes():
    """Join those that torchrun has started: return the number of this process, from 0, and how many there are."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    dist.init_process_group()
    return dist.get_rank(), dist.get_world_size()


def leave_processes():
    """End what join_processes began: a process that keeps its threads of communication to the end now and then aborts."""
    if dist.is_initialized():
        dist.destroy_process_group()


@torch.no_grad()
def sum_over_processes(*tensors):
    """Replace tensors of one device by their sums over all processes; raises OSError where one of these has ended."""
    if dist.is_initialized():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        try:
            dist.all_reduce(flat)
        except RuntimeError:
            raise OSError("another process of this training has ended") from None
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view_as(tensor))


def any_process(condition):
    """Whether the condition holds in any process; all wait here for each other."""
    sum_over_processes(flag := torch.tensor(float(bool(condition))))
    return flag.item() > 0


def differs(number):
    """Whether the processes have other numbers than each other; all wait here for each other."""
    sum_over_processes(total := torch.tensor([number, 1], dtype=torch.float64))
    return any_process(number != total[0] / total[1])


def share(batch, rank, world):
    """Return a process's part of the tensors of a batch, and the weight of its mean in that of the batch.

    Where nothing is left for a process, it gets an image of another's, with weight zero.
    """
    count = len(batch[0])
    mine = slice(rank, None, world) if rank < count else slice(1)
    return [part[mine] for part in batch], len(range(rank, count, world)) / count


def first_alone(rank, work):
    """Return work(), which the first process does before the others: it may have to download."""
    if rank > 0:
        any_process(False)
    done = work()
    if rank == 0:
        any_process(False)
    return done


# -----------------------------------------------------------------------------
# Pictures
# -----------------------------------------------------------------------------

SAMPLES = ("astronaut", "chelsea", "coffee", "motorcycle_left", "rocket")  # come with scikit-image
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF", "AVIF", "PPM", "JPEG2000")  # none that runs another program
SUFFIXES = {".npy"} | {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
MODES = {"1": "L", "P": "RGB", "PA": "RGBA", "La": "LA", "RGBa": "RGBA", "YCbCr": "RGB", "RGBX": "RGB"}  # read as
os.umask(UMASK := os.umask(0o022))  # there is no other way to read it
Image.MAX_IMAGE_PIXELS = None  # large pictures are welcome
RESULTS = ".denoise"  # hidden list in each folder of results: a line [name, owner, mtime, size] for every file written


@dataclass
class Picture:
    """One picture, and what it takes to write another one like it."""

    pixels: np.ndarray  # float32 (H, W, 3), or (H, W, 1) if grey; [0, 1] plus noise, never clipped; upright
    shape: tuple  # of the file's array, upright: (H, W) or (H, W, channels)
    dtype: np.dtype  # of the file's values
    alpha: np.ndarray | None = None  # (H, W), the file's values
    inks: np.ndarray | None = None  # (H, W, 4), the file's values, if they are cyan, magenta, yellow and black
    suffix: str = ".png"  # of its result
    info: dict = field(default_factory=dict)  # colour profile, EXIF data, resolution, by their names in Pillow's save
    note: str = ""  # what is not kept of it
    black: float = 0.0  # the file's value of 0
    white: float = 255.0  # the file's value of 1
    name: str = ""  # unique in its run, with sub-folders: "holiday/beach"
    source: str = ""  # where it is from: the whole path, and the frame

    def resize(self, height, width):
        """Make it the record of a picture of another size: what it holds of each pixel is repeated, or cut."""
        factor = max(1, height // self.shape[0])
        for name in ("alpha", "inks"):
            if (values := getattr(self, name)) is not None:
                setattr(self, name, values.repeat(factor, 0).repeat(factor, 1)[:height, :width])
        self.shape = (height, width, *self.shape[2:])

    @property
    def builtin(self):
        return self.source.startswith(("samples#", "cifar10#"))


def read_pictures(sources, data_dir="data", white=None, notify=print, failed=None):
    """Yield the Pictures of all sources, every frame of every file, one after another, so that memory holds one at a time.

    sources: one or more of "samples" (five photographs that scikit-image installs, as thumbnails), "cifar10" (its test
    images), files, and folders, with their sub-folders but without hidden files and our own results.
    white: the value of white in files that are not 8-bit; None: found, and said where it is not plain. notify gets a line
    for all that a user must know, the list `failed` the path of each file that cannot be read; the rest goes on.
    Raises FileNotFoundError for a source that is not there, ValueError if there is nothing to read.
    """
    failed, taken = [] if failed is None else failed, set()
    sources = [sources] if isinstance(sources, (str, Path)) else sources
    files = _find_files(sources, notify, failed)
    for name, path in files:
        try:
            for picture in _builtin(path, data_dir) if path in ("samples", "cifar10") else _read_file(path, name, white, notify):
                while len(os.fsencode(Path(picture.name).name)) > 180:  # file systems take 255 bytes, with what is appended
                    picture.name = picture.name[:-1]
                picture.name = next(n for n in _numbered(picture.name) if n.casefold() not in taken)  # a.png beside a.jpg
                taken.add(picture.name.casefold())
                yield picture
        except ValueError as error:
            if len(files) == 1 and not taken:
                raise
            failed.append(path)
            notify(str(error))
    if not taken:
        what = f"none of {len(failed)} files can be read" if failed else f"no picture ({' '.join(sorted(SUFFIXES))})"
        raise ValueError(f"{what} in {' '.join(map(str, sources))}")


def _find_files(sources, notify, failed):  # -> [(name, path)], of which both may also be "samples" or "cifar10"
    files, others = [], Counter()
    for source in sources:
        path = Path(source)
        if source in ("samples", "cifar10"):
            files.append((source, source))
        elif not os.path.lexists(path):
            missing = f"no such file or folder: '{source}' (and not 'samples' or 'cifar10')"
            if len(sources) == 1:
                raise FileNotFoundError(missing)
            failed.append(source)
            notify(missing)
        elif not path.is_dir():
            files.append((path.stem, path))
        else:
            visited = {os.path.realpath(path)}  # a link may lead back
            tell = lambda error: (failed.append(error.filename), notify(str(error)))  # noqa: E731
            for folder, below, names in os.walk(path, onerror=tell, followlinks=True):
                real = {name: os.path.realpath(Path(folder, name)) for name in sorted(below) if name[0] != "."}
                below[:] = [name for name in real if real[name] not in visited]
                visited |= set(real.values())
                for found in (Path(folder, name) for name in sorted(names) if name[0] != "."):
                    if found.suffix.lower() in SUFFIXES:
                        files.append((found.relative_to(path).with_suffix("").as_posix(), found))
                    else:
                        others[found.suffix.lower() or "without suffix"] += 1
    if others:
        notify(f"{others.total()} other files are not read: {', '.join(f'{n} {suffix}' for suffix, n in others.most_common())}")
    pictures = [(name, path) for name, path in files if not is_result(path)]
    if len(pictures) < len(files):
        notify(f"{len(files) - len(pictures)} results of earlier runs are not read; to denoise one again, copy it")
    return pictures


def _builtin(source, data_dir):
    if source == "samples":
        images = [(name, Image.fromarray(photograph)) for name, photograph in sample_photographs()]
        arrays = [(name, np.asarray(ImageOps.fit(image, (128, 128), Image.Resampling.LANCZOS))) for name, image in images]
    else:
        arrays = ((f"cifar10_{i:05d}", x) for i, x in enumerate(_cifar10(data_dir, train=False)))
    for name, array in arrays:
        yield _finished(_raw(array), name, f"{source}#{name}", 0, 255)


def _read_file(path, name, white, notify):
    try:
        some = list(itertools.islice(_frames(path), 2))  # most files have one frame, and are read once; others twice
        if not some:
            raise ValueError("no pictures in it")
        several = len(some) > 1
        black, white, found = _value_range((p.pixels for p in (_frames(path) if several else some)), white)
        for line in filter(None, (found, some[0].note, "several frames, each a picture of its own" * several)):
            notify(f"'{path}': {line}")
        for k, picture in enumerate(_frames(path) if several else some):
            number, frame = (f"_{k:05d}", f"#{k}") if several else ("", "")
            if picture.pixels.dtype != some[0].pixels.dtype:
                raise ValueError(f"frames of {some[0].pixels.dtype} and of {picture.pixels.dtype} values")
            yield _finished(picture, name + number, f"{path.resolve()}{frame}", black, white)
    except Exception as error:  # whatever damaged pixels, headers or tags can raise
        reason = "not a picture" if isinstance(error, UnidentifiedImageError) else (str(error).splitlines() or [""])[0]
        raise ValueError(f"'{path}' cannot be read: {reason or type(error).__name__}") from None


def _frames(path):
    """Yield every frame of a file as a Picture whose pixels are still the file's values, upright."""
    if path.exists() and not path.is_file():
        raise ValueError("not a regular file")  # to open a pipe would wait for ever
    with open(path, "rb") as file:
        head = file.read(2**20)  # a profile may stand before what tells the depth
    if path.suffix.lower() == ".npy":
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        stack = array.ndim == 4 or (array.ndim == 3 and array.shape[2] not in (1, 2, 3, 4) and array.shape[0] not in (1, 3, 4))
        yield from (_raw(frame, suffix=".npy") for frame in (array if stack else array[None]))
        return
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        with tifffile.TiffFile(path) as tiff:
            pages = [page for page in tiff.pages if not page.is_reduced]  # no thumbnails
            if max((page.bitspersample for page in pages), default=0) > 8:
                yield from map(_deep_tiff, pages)
                return
    with warnings.catch_warnings(action="ignore"):  # of odd tags
        image = Image.open(path, formats=FORMATS)
    with image:
        for k in range(1 if image.format == "MPO" else getattr(image, "n_frames", 1)):
            image.seek(k)
            if image.format != "TIFF" or not image.tag_v2.get(254, 0) & 1:  # no thumbnail
                orientation, deep = image.getexif().get(0x0112, 1), _deep(path, image, head, k)
                frame = ImageOps.exif_transpose(image)
                mode = MODES.get(frame.mode, frame.mode)
                mode += "A" if frame.has_transparency_data and mode in ("L", "RGB") else ""
                if mode == "LAB":
                    raise ValueError("Lab colours: save it as RGB first")
                note = {"1": "1 bit, written as 8-bit grey"}.get(frame.mode, "")
                if image.format == "MPO":  # the second is a map of brightness or a preview
                    note = f"{image.n_frames} pictures, of which the first is read"
                info = {key: frame.info[key] for key in ("icc_profile", "exif", "dpi") if frame.info.get(key)}
                info |= _jpeg2000_profile(head) if image.format == "JPEG2000" else {}
                if not all(0 < dots < 1e5 for dots in info.get("dpi", ())):
                    del info["dpi"]
                suffix = ".tif" if image.format == "TIFF" or mode in ("F", "CMYK") else ".png"
                array = np.asarray(frame.convert(mode)) if deep is None else _upright(deep, orientation)
                if mode == "I;16" and "transparency" in image.info:  # the one level of grey that is clear
                    opaque = (array != image.info["transparency"]) * np.uint16(65535)
                    array = np.dstack([array, opaque])
                if image.format == "WEBP" and np.ptp(array[..., :3], axis=2).max() <= 1:  # it has no grey: rounded apart
                    array = array[..., [1, 1, 1, 3][: array.shape[2]]]
                yield _raw(array, mode == "CMYK", suffix=suffix, info=info, note=note)


def _deep(path, image, head, k):
    """Return the values of a frame of which Pillow keeps 8 bits though it has more, stretched to 16; else None."""
    if image.format == "PNG" and head[24] == 16 and head[25] and not image.is_animated:  # of grey Pillow keeps all
        array, most = imagecodecs.png_decode(path.read_bytes()), 65535
    elif image.format == "JPEG2000" and image.mode[0] != "I" and head[(size := head.find(b"\xffO\xffQ") + 42)] & 127 > 7:
        array, most = imagecodecs.jpeg2k_decode(path.read_bytes()), 2 ** (1 + (head[size] & 127)) - 1
    elif image.format == "AVIF" and (flags := head[head.find(b"av1C") + 6]) & 64:
        array, most = imagecodecs.avif_decode(path.read_bytes()), 4095 if flags & 32 else 1023
        array = array[k] if array.ndim == 4 else array  # its own argument `index` crashes the interpreter (2026.3.6)
    elif image.format == "PPM" and image.mode == "RGB" and image.tile[0].codec_name == "ppm" and image.tile[0].args[1] > 255:
        array, most = np.fromfile(path, ">u2", 3 * image.width * image.height, offset=image.tile[0].offset), image.tile[0].args[1]
        array = array.reshape(image.height, image.width, 3)
    else:
        return None
    return array if most == 65535 else np.rint(array * np.float32(65535 / most)).astype(np.uint16)


def _jpeg2000_profile(head):  # from the box that says what its colours are, which Pillow does not read
    start = head.find(b"colr\2") + 7
    profile = head[start : start - 11 + int.from_bytes(head[start - 11 : start - 7], "big")] if start > 10 else b""
    return {"icc_profile": profile} if profile[36:40] == b"acsp" else {}


def _deep_tiff(page):
    channels = {0: (1, 2), 1: (1, 2, 3), 2: (3, 4), 5: (4,)}.get(int(page.photometric), ())
    if page.samplesperpixel not in channels or 1 in page.extrasamples:
        what = f"{page.samplesperpixel} channels of {page.photometric.name} {page.dtype}"
        raise ValueError(f"{what}, or premultiplied alpha: save it as plain RGB first")
    array = np.moveaxis(page.asarray(), 0, -1) if page.axes == "SYX" else page.asarray()
    if page.photometric == 0:  # 0 is white, but not transparent
        if array.dtype.kind != "u":
            raise ValueError(f"{array.dtype} values of which 0 is white: save it as plain grey first")
        array = array.copy()
        colour = array[..., 0] if page.samplesperpixel > 1 else array
        np.subtract(2**page.bitspersample - 1, colour, out=colour, casting="unsafe")
    info = {"icc_profile": page.tags.valueof(34675)} if page.tags.valueof(34675) else {}
    return _raw(_upright(array, page.tags.valueof(274, 1)), page.photometric == 5, suffix=".tif", info=info)


def _upright(array, orientation):  # the eight of EXIF
    array = array.swapaxes(0, 1) if orientation >= 5 else array
    array = array[:, ::-1] if orientation in (2, 3, 6, 7) else array
    return array[::-1] if orientation in (3, 4, 7, 8) else array


def _raw(array, cmyk=False, **rest):
    channels, alpha = array.shape[2] if array.ndim == 3 else 1, None
    if array.ndim not in (2, 3) or channels not in (1, 2, 3, 4) or array.dtype.kind not in "buif" or 0 in array.shape:
        raise ValueError(f"{array.dtype} of shape {array.shape}; expected (H, W), (H, W, 1, 3 or 4) or a stack of these")
    values = np.asarray(array, array.dtype.newbyteorder("=")).reshape(*array.shape[:2], channels)
    if channels in (2, 4) and not cmyk:
        alpha, values = values[..., -1].copy(), _filled(values[..., :-1], values[..., -1] > 0)
    return Picture(values, array.shape, values.dtype, alpha, **rest)


def _filled(values, visible):
    """Give hidden pixels the colours of visible ones, mirrored at the nearest: what lies under alpha 0 reaches no neighbour."""
    if visible.all() or not visible.any():
        return values
    near = ndimage.distance_transform_edt(~visible, return_distances=False, return_indices=True)
    mirrored = 2 * near
    mirrored -= np.indices(visible.shape, np.int32)
    for axis, size in enumerate(visible.shape):
        mirrored[axis].clip(0, size - 1, out=mirrored[axis])
    return values[tuple(np.where(visible[tuple(mirrored)], mirrored, near))]


def visible_part(y, alpha):
    """Return of y (C, H, W) the smallest rectangle that holds all that alpha (H, W) shows; y itself if there is no alpha."""
    if alpha is None or not alpha.any():
        return y
    rows, columns = (np.flatnonzero((alpha > 0).any(axis)) for axis in (1, 0))
    return y[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _value_range(arrays, white):
    """Return black and white of a file's values, and a line that says so where it is not plain."""
    low, high, dark, bright, dtype = np.inf, -np.inf, np.inf, -np.inf, None
    for values in arrays:
        if dtype is not None and values.dtype != dtype:
            raise ValueError(f"frames of {dtype} and of {values.dtype} values")
        dtype = values.dtype
        if dtype in (np.bool_, np.uint8) or white is not None:
            return 0, {np.bool_: 1, np.uint8: 255}.get(dtype.type, white), ""
        low, high = float(np.minimum(low, values.min())), float(np.maximum(high, values.max()))  # which keep what is no number
        means = ndimage.uniform_filter(values.astype(np.float32), (16, 16, 1)) if dtype.kind == "f" else values
        dark, bright = min(dark, float(means.min())), max(bright, float(means.max()))  # without the noise, which has no bounds
    if not np.isfinite([low, high]).all():
        raise ValueError("values that are not numbers")
    slack = 0.25 if dtype.kind == "f" else 0
    ranges = [(0, 2**bits - 1) for bits in (8, 10, 12, 14, 15 if dtype == np.int16 else 16) if not slack or bright > 2**bits / 8]
    ranges = [*([(0, 1)] + [(-1, 1)] * (dark < -0.1) if slack else []), *ranges, (low, max(high, low + 1))]
    black, white = next((a, b) for a, b in ranges if a - slack * (b - a) <= dark and bright <= b + slack * (b - a))
    plain = (dtype == np.uint16 and white == 65535) or (black == 0 <= low and high <= 1 == white)
    said = f"{dtype} values from {low:.6g} to {high:.6g}, read as {black:.6g} (black) to {white:.6g} (white)"
    return black, white, "" if plain else said


def _finished(picture, name, source, black, white):
    values = picture.pixels
    pixels = np.array(values, np.float32)
    pixels -= np.float32(black)
    pixels /= np.float32(white - black)
    if not np.isfinite(pixels).all():
        raise ValueError("values that are not numbers")
    if values.shape[2] == 4:
        picture.inks, pixels = values, (1 - pixels[..., :3]) * (1 - pixels[..., 3:])
    if (pixels[..., 1:] == pixels[..., :1]).all():
        pixels = pixels[..., :1].copy()
    picture.pixels, picture.name, picture.source, picture.black, picture.white = pixels, name, source, black, white
    return picture


def check_suffix(path, picture):
    """Raise ValueError if a file of this suffix cannot hold the picture."""
    inks, alpha = {".tif", ".tiff"}, {".npy", ".tif", ".tiff", ".png", ".webp", ".avif", ".jp2"}
    for what, held, suffixes in (("four inks", picture.inks, inks), ("alpha", picture.alpha, alpha)):
        if held is not None and Path(path).suffix.lower() not in suffixes:
            raise ValueError(f"'{path}' cannot hold the {what} of '{picture.name}': choose {' '.join(sorted(suffixes))}")


def write_picture(path, picture, pixels, owner):
    """Write pixels (H, W, 1 or 3), in place of those of the picture, to a path whose suffix says how.

    .npy: floats in the file's own range, unclipped. .tif: as the file was. Others: clipped and rounded to 8 bits, .png to
    16 where there are more. Size, channels, alpha, profile are the picture's. owner: see free_name. Raises ValueError.
    """
    check_suffix(path, picture)
    path, suffix = Path(path), Path(path).suffix.lower()
    dtype, black, white, alpha = picture.dtype, picture.black, picture.white, picture.alpha
    most, is_tiff = np.dtype(np.uint16 if suffix == ".png" else np.uint8), suffix in (".tif", ".tiff")
    if suffix == ".npy":
        dtype = np.result_type(dtype, np.float32)
    elif dtype == np.bool_ or (not is_tiff and dtype not in (np.uint8, most)):
        dtype, black, white = most, 0, np.iinfo(most).max
        if alpha is not None:
            alpha = np.rint(alpha / (np.iinfo(alpha.dtype).max if alpha.dtype.kind in "iu" else 1) * white)
    if picture.inks is None:
        channels = 1 if len(picture.shape) == 2 else picture.shape[2]
        values = np.broadcast_to(pixels, (*pixels.shape[:2], channels - (alpha is not None)))
    else:
        values = _separated(pixels, (picture.inks - np.float32(black)) / np.float32(white - black))
    exact = np.float32 if dtype.itemsize < 4 else np.float64
    ends = (black, min(white, np.iinfo(dtype).max)) if dtype.kind in "iu" else ()
    scaled = np.empty(values.shape, dtype)
    for rows in (slice(k, k + 256) for k in range(0, len(values), 256)):  # a large picture is large in floats
        part = values[rows] * exact(white - black) + exact(black)
        scaled[rows] = np.rint(part).clip(*ends) if dtype.kind in "iu" else part
    values = scaled
    if alpha is not None:
        values = np.concatenate([values, alpha[..., None].astype(dtype)], axis=2)
    values = values.reshape(picture.shape) if suffix == ".npy" or values.shape[2] > 1 else values[..., 0]
    with replacing(path) as temporary:
        if suffix == ".npy":
            with open(temporary, "wb") as file:  # to a name, it would add a suffix to .NPY
                np.save(file, values)
        elif is_tiff:
            kind = "minisblack" if values.ndim == 2 or values.shape[2] == 2 else "rgb" if picture.inks is None else "separated"
            extra, profile = None if alpha is None else ["unassalpha"], picture.info.get("icc_profile")
            tifffile.imwrite(temporary, values, photometric=kind, extrasamples=extra, iccprofile=profile, metadata=None)
        elif dtype == np.uint16:
            _write_png16(temporary, values, picture.info)
        else:
            subsampling = {"subsampling": 0} if suffix in (".jpg", ".jpeg", ".jpe", ".jfif") else {}
            Image.fromarray(values).save(temporary, quality=95, **subsampling, **picture.info)
    remember(path, owner)
    return path


def _separated(rgb, inks):  # the given inks, changed until (1 - cmy) * (1 - k) is rgb
    k = np.minimum(inks[..., 3:], 1 - rgb.max(axis=2, keepdims=True)).clip(0, 1)
    paper = np.divide(rgb, 1 - k, out=1 - inks[..., :3], where=k < 1)
    return np.concatenate([1 - paper, k], axis=2)


def _write_png16(path, values, info):
    data = imagecodecs.png_encode(np.ascontiguousarray(values), level=1, strategy=3, filter=16)  # noise packs no better
    with open(path, "wb") as file:
        file.write(data[:33])  # up to the end of the header
        if "icc_profile" in info:
            PngImagePlugin.putchunk(file, b"iCCP", b"ICC profile\0\0" + zlib.compress(info["icc_profile"]))
        if "exif" in info:
            PngImagePlugin.putchunk(file, b"eXIf", info["exif"].removeprefix(b"Exif\0\0"))
        file.write(data[33:])


# Whose file is it? Each folder of results holds a hidden list of what we wrote there. A file of that list that has been
# neither changed nor replaced since is ours: it is not read, and whoever wrote it may write it again.


@functools.cache  # read once, then kept up by remember(); what another process adds meanwhile counts as a stranger's
def _results(folder):
    found = {}
    with contextlib.suppress(OSError):
        for line in Path(folder, RESULTS).read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError):  # a line that a crash cut off
                name, *found[name] = json.loads(line)
    return found


def is_result(path, owner=None):
    """Whether the file was written by us (by that owner, if one is named) and nobody has touched it since."""
    try:
        path = Path(path)
        writer, *stamp = _results(path.parent.resolve())[path.name]
        return owner in (None, writer) and stamp == [path.stat().st_mtime_ns, path.stat().st_size]
    except (KeyError, OSError):
        return False


def remember(path, owner):
    """Note that we wrote this file: see free_name."""
    entry = [owner, path.stat().st_mtime_ns, path.stat().st_size]
    _results(path.parent.resolve())[path.name] = entry
    with open(path.parent / RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps([path.name, *entry]) + "\n")


def free_name(folder, name, endings, owner):
    """Return name, or name_2, name_3, ...: the first one with which no file of these endings is overwritten.

    owner: a text that says who writes, from which source and with which options; what this very owner wrote before, and
    nobody has touched since, is overwritten.
    """
    for free in _numbered(name):
        paths = [Path(folder, free + ending) for ending in endings]
        if all(is_result(path, owner) or not os.path.lexists(path) for path in paths):
            return free


def _numbered(name):  # name, name_2, name_3, ...
    return itertools.chain([name], (f"{name}_{k}" for k in itertools.count(2)))


def read_patches(source, data_dir="data", train=True, size=32):
    """Read images to train on: a uint8 tensor (N, 3, size, size).

    source: "cifar10" (its training images, or its test images if not train), "samples" (the five photographs),
    or a path as in read_pictures. Whatever is larger is cut into patches side by side; a smaller image is refused.
    """
    if source == "cifar10":
        stacks = [_cifar10(data_dir, train)]
    elif source == "samples":
        stacks = [photograph[None] for _, photograph in sample_photographs()]
    else:
        stacks = []
        for picture in read_pictures(source):
            height, width, _ = picture.pixels.shape
            if min(height, width) < size:
                raise ValueError(f"'{picture.source}' is {width} x {height} pixels, smaller than {size} x {size}")
            pixels = np.rint(picture.pixels.clip(0, 1) * 255).astype(np.uint8)
            stacks.append(np.broadcast_to(pixels, (height, width, 3))[None])
    windows = [np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))[:, ::size, ::size] for x in stacks]
    return torch.from_numpy(np.concatenate([patches.reshape(-1, 3, size, size) for patches in windows])).contiguous()


def read_images(source, data_dir="data"):
    """Read all pictures of a source at once, in colour: a list of (name, float32 (H, W, 3))."""
    return [(p.name, np.repeat(p.pixels, 4 - p.pixels.shape[2], axis=2)[..., :3]) for p in read_pictures(source, data_dir)]


def sample_photographs():
    folder = Path(skimage.__file__).parent / "data"
    paths = [folder / f"{name}.{'jpg' if name == 'rocket' else 'png'}" for name in SAMPLES]
    return [(path.stem, np.asarray(Image.open(path).convert("RGB"))) for path in paths]


def _cifar10(data_dir, train):  # -> uint8 (N, 32, 32, 3)
    from torchvision.datasets import CIFAR10  # here, since it takes 160 MB

    try:
        return CIFAR10(data_dir, train=train, download=True).data
    except (OSError, RuntimeError) as error:
        what = f"CIFAR-10 is neither in '{data_dir}' nor could it be downloaded ({error})"
        raise OSError(f"{what}: connect to the network, put cifar-10-python.tar.gz there, or name a folder of images") from None


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
    """Peak signal-to-noise ratio in dB of each image, clipped to [0, 1]; (B, C, H, W) tensors -> (B,)."""
    return -10 * ((images.clamp(0, 1).double() - x0) ** 2).mean(dim=(1, 2, 3)).log10()


def ssim(images, x0):
    """Structural similarity (Wang et al. 2004, Gaussian window) of each image, clipped to [0, 1].

    (B, C, H, W) tensors -> (B,) array; nan for images below 11 x 11 pixels, the size of the window.
    """
    if min(x0.shape[2:]) < 11:
        return np.full(len(x0), np.nan)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    pairs = zip(images.clamp(0, 1).double().cpu().numpy(), x0.double().cpu().numpy())
    return np.array([structural_similarity(a, b, channel_axis=0, data_range=1, **options) for a, b in pairs])


# -----------------------------------------------------------------------------
# Around a denoiser
# -----------------------------------------------------------------------------


def tiles(height, width, pixels, halo=64):
    """Return what covers a picture of more than `pixels` pixels: pairs, for the rows and for the columns, of pairs of slices.

    The first of two slices is that of the tile, the second has `halo` pixels more on both sides, where there are any. Tiles start
    on the grid of 32 pixels that the network's attention has.
    """
    size = max(64, math.isqrt(pixels) - 2 * halo) // 32 * 32 if height * width > pixels else max(height, width)
    ends = lambda start, n: (slice(start, min(start + size, n)), slice(max(start - halo, 0), min(start + size + halo, n)))  # noqa: E731
    return list(itertools.product(*([ends(start, n) for start in range(0, n, size)] for n in (height, width))))


def pixels_seen(height, width, pixels, halo=64):
    """Return how many pixels the tiles of a picture have together, with what they see around them."""
    covered = [(rows, columns) for (_, rows), (_, columns) in tiles(height, width, pixels, halo)]
    return sum((rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in covered)


def over_tiles(function, x, pixels, bar=None, calls=1, halo=64):
    """Return function(x), computed in tiles of about `pixels` pixels where x (B, C, H, W) has more, and move a progress bar.

    function: from a part of x, (B, C, h, w), and the row and column where it begins, to (B, any, h, w). Each tile sees `halo`
    pixels around it, about the network's reach, so the seams differ from the whole by little more than rounding.
    calls: the bar moves by so many times the pixels of each tile and around it.
    """
    out = None
    for (rows, seen_rows), (columns, seen_columns) in tiles(*x.shape[2:], pixels, halo):
        seen = x[:, :, seen_rows, seen_columns]
        top, left = seen_rows.start, seen_columns.start
        part = function(seen, (top, left))
        out = x.new_empty(len(x), part.shape[1], *x.shape[2:]) if out is None else out
        out[:, :, rows, columns] = part[:, :, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
        if bar is not None:
            bar.update(calls * seen[:, 0].numel())
    return out


def tiled(denoiser, pixels, bar=None, halo=64):
    """Return a denoiser that works in tiles, see over_tiles; for a gradient each tile is computed again, to keep memory small."""

    def denoise_tiles(x, sigma):
        again = torch.is_grad_enabled() and x[:, 0].numel() > pixels
        one = functools.partial(checkpoint, denoiser, use_reentrant=False) if again else denoiser
        return over_tiles(lambda part, _: one(part, sigma), x, pixels, bar, halo=halo)

    return denoise_tiles


def seeded_noise(seeds, device="cpu", size=None, place=(0, 0), block=512):
    """Return a `noise` that draws for each image from generators of its own: its draw is the same in any batch, and in tiles.

    seeds: one integer per image. size, place: the height and width of the images, and the row and column in them at which the
    part begins that the noise is for; without, it is for all of them. Parts that overlap get the same noise there at the same
    call, since every block of block x block pixels has a generator: the first that of the seed, the others of seed and block.
    The noise raises ValueError for another number of images.
    """

    @functools.cache
    def generator(k, top, left):
        seed = zlib.crc32(f"{seeds[k]} {top} {left}".encode()) if top or left else seeds[k]
        return torch.Generator(device).manual_seed(seed)

    def noise(x):
        if len(seeds) != len(x):
            raise ValueError(f"{len(seeds)} seeds for {len(x)} images: give one seed per image")
        (channels, *part), whole = x.shape[1:], size or x.shape[2:]
        tops, lefts = (range(start // block * block, start + n, block) for start, n in zip(place, part))

        def of_block(k, top, left):
            shape = (channels, *(min(block, n - start) for n, start in zip(whole, (top, left))))
            return torch.randn(shape, generator=generator(k, top, left), dtype=x.dtype, device=x.device)

        rows = [[torch.cat([of_block(k, t, left) for left in lefts], 2) for t in tops] for k in range(len(x))]
        (top, left), (height, width) = (start % block for start in place), part
        return torch.stack([torch.cat(image, 1)[:, top : top + height, left : left + width] for image in rows])

    return noise


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
def beside(path):
    """Yield the path of a temporary file beside `path`. Raises OSError, also where a library fails to write in its own way."""
    path, temporary = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}_", suffix=path.suffix)
        os.close(handle)
        yield temporary
    except (OSError, RuntimeError) as error:
        raise OSError(f"'{path}' cannot be written ({error}); what was there before is unchanged") from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path`, and move it into place only if the block ends without an exception."""
    with beside(path) as temporary:
        yield temporary
        with contextlib.suppress(OSError):  # of a disk that knows no owners
            os.chmod(temporary, 0o666 & ~UMASK)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)


@contextlib.contextmanager
def only_process(*paths):
    """Make sure, before any work, that these files can be written, and by one process at a time; remove what a crash left.

    Raises OSError if one cannot be written, and ValueError if another process holds the first.
    """
    with contextlib.ExitStack() as held:
        for path in paths:
            with beside(path):
                if path.exists() and not path.is_file():
                    raise OSError("it is not a file")
        if paths:
            try:
                import fcntl
            except ImportError:
                raise OSError("training needs file locks, which Windows lacks: train under Linux or macOS, or in WSL") from None
            lock = held.enter_context(open(paths[0].parent / f".{paths[0].stem}.lock", "w", encoding="utf-8"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held while the process lives
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
    """Write rows, dictionaries by column, as comma-separated text; a column that a row lacks is empty there."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(column for row in rows for column in row)))
        writer.writeheader()
        writer.writerows(rows)


def save_curves(path, losses, psnrs, images_at):
    """Write the loss and the validation PSNR of a training as comma-separated text, a line for each step that has one.

    losses: [[step, loss], ...]. psnrs: [[step, {noise level: PSNR}], ...]. images_at: from a step to the images seen until then.
    """
    found = [(step, {"loss": loss}) for step, loss in losses]
    found += [(step, {f"PSNR at {s}": value for s, value in psnr.items()}) for step, psnr in psnrs]
    lines = {step: {"step": step, "images": images_at(step)} for step, _ in sorted(found, key=lambda row: row[0])}
    for step, values in found:
        lines[step] |= values
    save_csv(path, lines.values())


def save_figure(path, figure):
    """Write a matplotlib figure, whole or not at all."""
    with replacing(path) as temporary, warnings.catch_warnings(action="ignore"):  # of letters that the font lacks
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


def means(rows, key, name):
    """Return a row for each value of rows[key]: "mean of n" in the column `name`, and the means of the columns that all have."""
    found = []
    for kind in dict.fromkeys(row[key] for row in rows):
        group = [row for row in rows if row[key] == kind]
        found.append({name: f"mean of {len(group)}"})
        for column, value in group[0].items():
            values = [row.get(column) for row in group]
            if column != name and all(type(v) is type(value) for v in values):
                same = isinstance(value, str) or len(set(values)) == 1
                found[-1][column] = value if same else float(np.mean(values))
    return found


# -----------------------------------------------------------------------------
# Figures
# -----------------------------------------------------------------------------


def plot_training(path, losses, psnrs, images_at):
    """Plot the loss, and the validation PSNR of each noise level, against the images seen, all as in save_curves."""
    levels = list(psnrs[-1][1]) if psnrs else []
    rows = math.ceil((1 + len(levels)) / 3)
    figure = Figure(figsize=(10, 2.4 * rows), layout="constrained")
    panels = list(figure.subplots(rows, 3, squeeze=False).flat)
    steps, values = np.array(losses).T if losses else ([], [])
    curves = [(steps, values, "training loss over the typical error")]
    curves += [(*np.array([[n, psnr[s]] for n, psnr in psnrs]).T, f"validation at $\\sigma$ = {s:g}, dB") for s in levels]
    for panel, (steps, values, title) in zip(panels, curves):
        millions = [images_at(int(step)) / 1e6 for step in steps]
        panel.plot(millions, values, "-" if len(values) > 50 else ".-", color="#0072B2", linewidth=1)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("images seen, millions", fontsize=8)
        panel.grid(alpha=0.3)
    if len(losses) > 10:
        panels[0].set_ylim(min(curves[0][1]) * 0.98, np.median(curves[0][1]) * 1.3)
    for panel in panels[len(curves) :]:
        panel.set_axis_off()
    save_figure(path, figure)


def plot_pictures(path, rows, detail=40):
    """Show rows of (title, (3, H, W) image, caption); below pictures larger than 64 pixels stands their middle, enlarged."""
    grid = []
    for row in rows:
        grid.append([(title, crop(image, 256), caption) for title, image, caption in row])
        if detail and max(row[0][1].shape[1:]) > 64:
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
    """Return an image (1 or 3, H, W) in [0, 1], clipped and rounded, as uint8 (H, W, 3)."""
    return (x.clamp(0, 1) * 255).round().byte().expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()


def in_colour(values):
    """Return values (H, W) from 0 to 1 as an image (3, H, W), from black over red to white."""
    return torch.from_numpy(matplotlib.colormaps["magma"](values.numpy())[..., :3]).permute(2, 0, 1)


def save_map(path, variance, title):
    """Write the root of a variance map (C, H, W), averaged over 5 x 5 pixels, to path.npy, and over channels to path.png.

    The variance is overwritten: that of a large picture is large.
    """
    smooth = variance.numpy()
    ndimage.uniform_filter(smooth, (1, 5, 5), output=smooth)
    smooth.clip(0, out=smooth)
    height, width = variance.shape[1:]
    step = max(1, max(height, width) // 1500)  # more does not show
    image = np.sqrt(smooth[:, ::step, ::step].mean(0))
    with replacing(f"{path}.npy") as temporary:
        np.save(temporary, np.sqrt(smooth, out=smooth).transpose(1, 2, 0))
    figure = Figure(figsize=(6.5, min(12, 0.6 + 5.5 * height / width)), layout="constrained")
    axes = figure.subplots()
    heatmap = axes.imshow(image, cmap="magma", vmin=0, vmax=np.quantile(image, 0.99), interpolation="nearest")
    figure.colorbar(heatmap, shrink=0.8)
    axes.set_title(title.encode("utf-8", "replace").decode(), fontsize=9, parse_math=False)  # with the name of somebody's file
    axes.set_axis_off()
    save_figure(f"{path}.png", figure)


def save_components(path, middle, deviations, directions):
    """Draw, for each direction (C, H, W) of norm 1, what lies -2 to 2 standard deviations from the estimate along it."""
    rows = []
    for k, (deviation, direction) in enumerate(zip(deviations, directions)):
        along = [(t, middle + t * deviation * direction) for t in (-2, -1, 0, 1, 2)]
        rows.append([(f"{t:+d} sd" if t else "one step", image, "" if t else f"direction {k + 1}") for t, image in along])
        rows[-1].append(("direction", 0.5 + direction / direction.abs().max() / 2, ""))
    plot_pictures(path, rows, detail=0)

"""Files in and out, through denoise.py: what an image holds comes back, and bad files are named."""

import faulthandler
import functools
import os
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np
import OpenImageIO as oiio
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

import denoise
import utils

HEIGHT, WIDTH = 12, 14
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def values(dtype, channels=3, count=None, seed=0):
    """Return (H, W, C) or, of `count` frames, (N, H, W, C): the whole range of the type, at random.

    Floats lie between 0 and 1.
    """
    shape = (HEIGHT, WIDTH, channels) if count is None else (count, HEIGHT, WIDTH, channels)
    found = np.random.default_rng(seed).random(shape)
    found[..., 0, 0, :] = 0
    found[..., 0, 1, :] = 1
    dtype = np.dtype(dtype)
    return (found * (np.iinfo(dtype).max if dtype.kind in "iu" else 1)).astype(dtype)


def flat(dtype, channels, number):  # of one value
    return np.full((HEIGHT, WIDTH, channels), number, dtype)


# -----------------------------------------------------------------------------
# Files that other libraries write: each function returns one that writes "a.suffix" to a folder
# -----------------------------------------------------------------------------


def pillow(suffix, array, mode=None, **options):
    def write(folder):
        image = Image.fromarray(array.squeeze())
        (image.convert(mode) if mode else image).save(folder / f"a{suffix}", **options)

    return write


def palette(folder):
    palette_image().save(folder / "a.png")


def palette_image():
    return Image.fromarray(values("u1")).quantize(64)


def tiff(array, **options):
    return lambda folder: tifffile.imwrite(folder / "a.tif", array, **options)


def pages(array):
    def write(folder):
        with tifffile.TiffWriter(folder / "a.tif") as file:
            for page in array:
                file.write(page, photometric="rgb")

    return write


def npy(array):
    return lambda folder: np.save(folder / "a.npy", array)


def openimageio(suffix, array, kind):
    def write(folder):
        spec = oiio.ImageSpec(WIDTH, HEIGHT, array.shape[2], kind)
        spec.attribute("oiio:UnassociatedAlpha", 1)
        file = oiio.ImageOutput.create(str(folder / f"a{suffix}"))
        assert file.open(str(folder / f"a{suffix}"), spec) and file.write_image(array)
        file.close()

    return write


def raw(suffix, content):
    return lambda folder: (folder / f"a{suffix}").write_bytes(content)


def bare_tiff(next_page):
    """Return a grey TIFF of 8 x 8 pixels; next_page is where it says that its next page stands."""
    numbers = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: 64}
    entries = [struct.pack("<HHII", tag, 4, 1, number) for tag, number in numbers.items()]
    page = struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<I", next_page)
    return struct.pack("<2sHI", b"II", 42, 72) + bytes(range(64)) + page


def stored(path):
    """Return what another library finds in the file, with axes for channels and frames."""
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".tif":
        with tifffile.TiffFile(path) as file:
            found = np.stack([page.asarray() for page in file.pages])
            found = found if found.ndim == 4 else found[..., None]
            return found if len(found) > 1 else found[0]
    asked = oiio.ImageSpec()
    asked.attribute("oiio:UnassociatedAlpha", 1)
    found = oiio.ImageInput.open(str(path), asked).read_image("unknown")
    if found.dtype == np.uint8:  # of 16 bits in colour Pillow reads 8
        found = np.asarray(Image.open(path))
    return found if found.ndim == 3 else found[..., None]


# -----------------------------------------------------------------------------
# What goes in comes out
# -----------------------------------------------------------------------------

G8, LA8, RGB8, RGBA8 = (values("u1", channels) for channels in (1, 2, 3, 4))
G16, LA16, RGB16, RGBA16 = (values("u2", channels) for channels in (1, 2, 3, 4))
HALF, FLOAT, DOUBLE = (values(dtype) for dtype in ("f2", "f4", "f8"))
PAGES = values("u2", count=3)
BITS = np.where(G8 > 127, 255, 0).astype(np.uint8)
PALETTE = np.asarray(palette_image().convert("RGB"))
LA = {"photometric": "minisblack", "planarconfig": "contig", "extrasamples": ["unassalpha"]}
RGB = {"photometric": "rgb"}
RGBA = RGB | {"extrasamples": ["unassalpha"]}
PLANES = RGB | {"planarconfig": "separate"}
NEGATIVE = {"photometric": "miniswhite"}

# kind: (how it is written, the values that it stands for, suffix of the result)
KINDS = {
    "grey PNG": (pillow(".png", G8), G8, ".png"),
    "PNG of 1 bit": (pillow(".png", BITS, "1"), BITS, ".png"),
    "grey PNG with alpha": (pillow(".png", LA8), LA8, ".png"),
    "RGB PNG": (pillow(".png", RGB8), RGB8, ".png"),
    "grey PNG of three channels": (pillow(".png", G8.repeat(3, 2)), G8.repeat(3, 2), ".png"),
    "RGB PNG with alpha": (pillow(".png", RGBA8), RGBA8, ".png"),
    "PNG with a palette": (palette, PALETTE, ".png"),
    "grey PNG of 16 bits": (pillow(".png", G16), G16, ".png"),
    "RGB PNG of 16 bits": (openimageio(".png", RGB16, "uint16"), RGB16, ".png"),
    "RGBA PNG of 16 bits": (openimageio(".png", RGBA16, "uint16"), RGBA16, ".png"),
    "BMP": (pillow(".bmp", RGB8), RGB8, ".png"),
    "PPM": (pillow(".ppm", RGB8), RGB8, ".png"),
    "PGM of 16 bits": (openimageio(".pgm", G16, "uint16"), G16, ".png"),
    "WebP": (pillow(".webp", RGB8, lossless=True), RGB8, ".png"),
    "WebP with alpha": (pillow(".webp", RGBA8, lossless=True, exact=True), RGBA8, ".png"),
    "JPEG 2000": (pillow(".jp2", RGB8, irreversible=False), RGB8, ".png"),
    "JPEG 2000 of 16 bits": (pillow(".jp2", G16, irreversible=False), G16, ".png"),
    "half EXR": (openimageio(".exr", HALF, "half"), HALF.astype("f4"), ".tif"),
    "float EXR": (openimageio(".exr", FLOAT, "float"), FLOAT, ".tif"),
    "grey TIFF": (tiff(G8[..., 0]), G8, ".tif"),
    "TIFF, white is zero": (tiff(255 - G8[..., 0], **NEGATIVE), G8, ".tif"),
    "TIFF of 16 bits, white is zero": (tiff(65535 - G16[..., 0], **NEGATIVE), G16, ".tif"),
    "RGB TIFF, packed": (pillow(".tif", RGB8, compression="tiff_lzw"), RGB8, ".tif"),
    "RGB TIFF of 16 bits": (tiff(RGB16, **RGB), RGB16, ".tif"),
    "big-endian TIFF": (tiff(RGB16, byteorder=">", **RGB), RGB16, ".tif"),
    "RGB TIFF in planes": (tiff(RGB16.transpose(2, 0, 1), **PLANES), RGB16, ".tif"),
    "TIFF of signed values": (tiff(values("i2")[..., 0] - 99), values("i2")[..., :1] - 99, ".tif"),
    "grey TIFF with alpha": (tiff(LA16, **LA), LA16, ".tif"),
    "RGB TIFF with alpha": (tiff(RGBA16, **RGBA), RGBA16, ".tif"),
    "float TIFF": (tiff(FLOAT, **RGB), FLOAT, ".tif"),
    "float TIFF beyond [0, 1]": (tiff(4 * FLOAT - 2, **RGB), 4 * FLOAT - 2, ".tif"),
    "TIFF of doubles": (tiff(DOUBLE, **RGB), DOUBLE, ".tif"),
    "half TIFF": (tiff(HALF, **RGB), HALF.astype("f4"), ".tif"),
    "TIFF of pages": (pages(PAGES), PAGES, ".tif"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back_as_it_went_in(kind, tmp_path, run, lowest):
    write, expected, suffix = KINDS[kind]
    write(tmp_path)
    (path,) = tmp_path.iterdir()
    (image,) = utils.read_images(path)
    shown = expected if expected.shape[-1] in (1, 3) else expected[..., :-1]
    white = np.iinfo(expected.dtype).max if expected.dtype.kind in "iu" else 1
    shown = np.broadcast_to(shown / white, (*image.pixels.shape[:3], shown.shape[-1]))
    np.testing.assert_allclose(np.broadcast_to(image.pixels, shown.shape), shown, atol=1e-6)

    run([path.name, "--method", "mmse"])
    found = stored(tmp_path / "output" / f"a_mmse{suffix}")
    assert found.dtype == expected.dtype and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7 * (expected.dtype == "f8"))


@pytest.mark.parametrize("dtype", ["u1", "u2", ">u2", "i2", "f2", "f4", "f8"])
def test_an_array_comes_back_in_its_type(dtype, tmp_path, run, lowest):
    array = values(dtype)
    npy(array)(tmp_path)
    run("a.npy --method mmse")
    found = np.load(tmp_path / "output" / "a_mmse.npy")
    assert found.dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_allclose(found, array, rtol=0, atol=1e-7 * (dtype == "f8"))


@pytest.mark.parametrize("channels", ["", "1", "2", "3", "4", "5 x 1", "5 x 2", "5 x 3", "5 x 4"])
def test_an_array_comes_back_in_its_shape(channels, tmp_path, run, lowest):
    count, _, last = channels.rpartition(" x ")
    shape = [int(n) for n in (count, HEIGHT, WIDTH, last) if n]
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    npy(array)(tmp_path)
    run("a.npy --method mmse")
    assert np.array_equal(np.load(tmp_path / "output" / "a_mmse.npy"), array)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_frames_of_an_animation_come_back_as_pages(suffix, tmp_path, run, lowest):
    frames = np.stack([RGB8] * 3)
    frames[1, 3:6], frames[2, 5:9] = 200, 10  # such files hold what changes
    options = {".webp": {"lossless": True}, ".gif": {"disposal": 1}}.get(suffix, {})
    first, *others = [Image.fromarray(frame).quantize(64) for frame in frames]
    if suffix != ".gif":
        first, *others = map(Image.fromarray, frames)
    first.save(tmp_path / f"a{suffix}", save_all=True, append_images=others, **options)
    run(f"a{suffix} --method mmse")
    found = stored(tmp_path / "output" / "a_mmse.tif")
    expected = [np.asarray(image.convert("RGB")) for image in (first, *others)]
    assert np.array_equal(found[..., :3], expected) and (found[..., 3] == 255).all()
    with tifffile.TiffFile(tmp_path / "output" / "a_mmse.tif") as file:
        assert file.pages[0].extrasamples[0].name == "UNASSALPHA"


def test_inks_are_read_as_the_colours_that_they_print(tmp_path, run, lowest):
    inks = values("u1", 4)
    of_inks = PROFILE[:16] + b"CMYK" + PROFILE[20:]
    tiff(inks, photometric="separated", iccprofile=of_inks)(tmp_path)
    run("a.tif --method mmse")
    found = stored(tmp_path / "output" / "a_mmse.tif") / 255
    assert "icc_profile" not in Image.open(tmp_path / "output" / "a_mmse.tif").info  # of inks
    printed = (1 - inks[..., :3] / 255) * (1 - inks[..., 3:] / 255)
    assert np.abs(found - printed).max() <= 1 / 255
    pillow(".jpg", flat("u1", 3, (200, 100, 50)), "CMYK")(tmp_path)
    run("a.jpg --method mmse")
    found = stored(tmp_path / "output" / "a_mmse.png")
    assert np.abs(found.astype(int) - (200, 100, 50)).max() <= 3


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_an_image_comes_out_upright_with_its_profile_and_exif(suffix, tmp_path, run, lowest):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"  # to be turned by 90 degrees
    options = {} if suffix in (".png", ".tif") else {"quality": 95}
    pillow(suffix, RGB8, exif=exif, icc_profile=PROFILE, **options)(tmp_path)
    run(f"a{suffix} --method mmse")
    with Image.open(tmp_path / f"a{suffix}") as image:
        expected = np.asarray(ImageOps.exif_transpose(image)).astype(int)
    with Image.open(*(tmp_path / "output").glob("a_mmse.*")) as image:
        assert image.size == (HEIGHT, WIDTH)
        assert np.abs(np.asarray(image) - expected).max() <= (3 if options else 0)
        assert image.info["icc_profile"] == PROFILE
        assert image.getexif().get(0x0112, 1) == 1 and image.getexif()[0x010F] == "maker"


def test_integers_are_clipped_and_rounded_and_floats_are_not(tmp_path):
    pixels = np.array([-0.5, 0.3004, 0.5, 1.5], np.float32).reshape(1, 1, 4, 1)
    for dtype, expected in (("u1", [0, 77, 128, 255]), ("u2", [0, 19687, 32768, 65535])):
        npy(np.zeros((1, 4), dtype))(tmp_path)
        (image,) = utils.read_images(tmp_path / "a.npy")
        utils.write_image(tmp_path / "b.npy", image, pixels)
        assert np.load(tmp_path / "b.npy").tolist() == [expected]
    npy(np.zeros((1, 4), "f4"))(tmp_path)
    (image,) = utils.read_images(tmp_path / "a.npy")
    utils.write_image(tmp_path / "b.npy", image, pixels)
    assert np.array_equal(np.load(tmp_path / "b.npy"), pixels[0, ..., 0])


def test_black_and_white_give_the_files_values_of_0_and_1(tmp_path, run, bare):
    gain = 0.25**2 / (0.25**2 + 3 * 0.1**2)  # a grey image is denoised at sqrt(3) sigma
    for dtype, black, white in (("u2", 100, 4095), ("u1", 10, 90), ("f4", 0.25, 0.75)):
        array = np.linspace(black, white, 64).reshape(8, 8).astype(dtype)
        npy(array)(tmp_path)
        run(f"a.npy --method mmse --sigma 0.1 --black {black} --white {white}")
        found = np.load(tmp_path / "output" / "a_mmse.npy").astype(float)
        middle = (black + white) / 2
        expected = middle + gain * (array - middle)
        assert np.abs(found - expected).max() <= (1e-6 if dtype == "f4" else 0.51)
    for white in ("5", "-1", "nan", "inf"):
        _, err = run(f"a.npy --black 5 --white {white}", code=2)
        assert f"--white {white} must be above --black 5" in err


# -----------------------------------------------------------------------------
# What cannot be read is named
# -----------------------------------------------------------------------------


@functools.cache
def whole(suffix):
    """Return the bytes of an image in that format."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"a{suffix}")
        if suffix == ".npy":
            np.save(path, RGB8)
        else:
            Image.fromarray(RGB8).save(path)
        return path.read_bytes()


def fifo(folder):
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no pipes in folders")
    os.mkfifo(folder / "a.png")


def not_a_number():
    array = values("f4")
    array[3, 4, 1] = np.nan
    return array


IMAGEJ = {"metadata": None, "description": "ImageJ=1.53\nimages=3\nslices=3\n"}
SAMPLES = {"photometric": "minisblack", "planarconfig": "contig"}
BROKEN = {  # kind: (how it is written, words of the message)
    "AVIF": (raw(".png", b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miaf" + bytes(99)), ""),
    "text": (raw(".png", b"not an image"), ""),
    "nothing": (raw(".tif", b""), ""),
    "a cut PNG": (raw(".png", whole(".png")[:-200]), ""),
    "a cut JPEG": (raw(".jpg", whole(".jpg")[:-200]), ""),
    "a cut TIFF": (raw(".tif", bare_tiff(0)[:60]), ""),
    "a cut array": (raw(".npy", b"\x93NUMPY\x01\0"), ""),
    "a pipe": (fifo, "not a regular file"),
    "a missing number": (npy(not_a_number()), "values that are not numbers"),
    "a missing number in a TIFF": (tiff(not_a_number(), **RGB), "not numbers"),
    "an infinite number": (npy(values("f8") * 1e300), "values that are not numbers"),
    "five channels": (tiff(values("u1", 5), **SAMPLES), "5 channels"),
    "four that are no colours": (tiff(RGBA8, **SAMPLES), "4 channels without alpha"),
    "channels first": (npy(values("u1").transpose(2, 0, 1)), "(3, 12, 14); expected channels last"),
    "channels last, five": (npy(values("u1", 5)), "(12, 14, 5); expected channels last: (H, W)"),
    "grey frames": (npy(values("u1", 1, 5)[..., 0]), "(5, 12, 14)"),
    "no pixels": (npy(np.zeros((0, 5, 3), "u1")), ""),
    "truth values": (npy(G8 > 127), "bool"),
    "complex numbers": (npy(values("f4") * 1j), "complex64"),
    "objects": (npy(np.array([[None]])), ""),
    "ImageJ's stack": (tiff(G16[..., 0], **IMAGEJ), "3 images behind one page header"),
    "tifffile's stack": (tiff(PAGES, truncate=True, **RGB), "3 images behind one page header"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_cannot_be_read_is_one_line_that_names_it(kind, tmp_path, run):
    write, words = BROKEN[kind]
    write(tmp_path)
    (path,) = tmp_path.iterdir()
    out, err = run(path.name, code=2)
    assert len(err.splitlines()) == 1 and not out, out + err
    assert err.startswith(f"denoise.py: error: '{path.name}' cannot be read: ") and words in err
    assert list(tmp_path.iterdir()) == [path]


def test_one_broken_file_does_not_stop_the_others(tmp_path, run, lowest):
    for k, (write, _) in enumerate(BROKEN.values()):
        (tmp_path / "in" / str(k)).mkdir(parents=True)
        write(tmp_path / "in" / str(k))
    (tmp_path / "in" / "z.png").mkdir()  # a folder, whatever its name
    pillow(".png", RGB8)(tmp_path / "in")
    out, err = run("in --method mmse", code=1)
    assert not err and out.count("' cannot be read: ") == len(BROKEN)
    count = len(BROKEN)
    assert f"{count} of {count + 1} files cannot be read and are left out" in out
    assert [path.name for path in (tmp_path / "output").rglob("*.*")] == ["a_mmse.png"]


def test_what_is_not_there_is_refused(tmp_path, run):
    (tmp_path / "empty").mkdir()
    for words, reason in (("nowhere.png", "no such file"), ("empty", "no image can be read")):
        _, err = run(words, code=2)
        assert reason in err and words in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("pages", [1, 2])
def test_a_tiff_whose_pages_form_a_ring_ends(pages, tmp_path):
    ring = bare_tiff(72)
    if pages == 2:
        start = len(ring)
        second = ring[72:-4] + struct.pack("<I", 72)
        ring = ring[:-4] + struct.pack("<I", start) + second
    (tmp_path / "a.tif").write_bytes(ring)
    faulthandler.dump_traceback_later(60, exit=True)
    (image,) = utils.read_images(tmp_path / "a.tif")
    faulthandler.cancel_dump_traceback_later()
    assert len(image.pixels) <= pages


def test_frames_unlike_the_first_are_said_to_be_left_out(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for page in (RGB8, RGB8[::2, ::2].copy(), RGB16):
            file.write(page, photometric="rgb")
    said = []
    (image,) = utils.read_images(tmp_path / "a.tif", notify=said.append)
    np.testing.assert_allclose(image.pixels, RGB8[None] / 255, atol=1e-6)
    assert len(said) == 1 and "a.tif': 2 frames of another size or type" in said[0]


# -----------------------------------------------------------------------------
# Which files are read, and what results are called
# -----------------------------------------------------------------------------


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RGB8).save(folder / name, "PNG")


def test_a_folder_is_read_without_what_is_hidden_or_no_image(tmp_path):
    put(tmp_path, "a.png", "sub/b.PNG", ".c.png", ".cache/d.png", "e.txt", "f.mov", "g.TXT", "h")
    said = []
    images = utils.read_images(tmp_path, notify=said.append)
    assert [image.name for image in images] == ["a", "sub/b"]
    assert said == ["4 other files are not read: 2 .txt, 1 .mov, 1 without suffix"]


def test_results_and_the_mask_are_not_read(tmp_path, run, bare):
    put(tmp_path, "a.png", "sub/b.png")
    Image.fromarray(np.where(G8[..., 0] > 99, 255, 0).astype("u1")).save(tmp_path / "mask.png")
    line = ". --mask mask.png --method mmse"
    for _ in range(2):
        run(line)
        found = [path.relative_to(tmp_path / "output") for path in tmp_path.rglob("*_mean.png")]
        assert sorted(map(str, found)) == ["a_mean.png", str(Path("sub", "b_mean.png"))]


def test_results_are_overwritten(tmp_path, run, bare):
    put(tmp_path, "a.png")
    line = "a.png --method ode --sigma"
    run(f"{line} 0.1")
    first = stored(tmp_path / "output" / "a_ode.png")
    run(f"{line} 0.3")
    assert not np.array_equal(stored(tmp_path / "output" / "a_ode.png"), first)


def test_two_inputs_of_one_name_get_numbers(tmp_path):
    put(tmp_path, "a.png", "A.bmp", "a.v2.png", "sub/a.png")
    sources = [tmp_path / "sub" / "a.png", tmp_path, "samples"]
    names = [image.name for image in utils.read_images(sources)]
    assert names == ["a", "A_2", "a_3", "a.v2", "sub/a", *utils.SAMPLES]


@pytest.mark.parametrize(
    "words", ["a.png out/a_mmse.png", "out/a.png out/a_x.png", "a out/a_sde.jpg"]
)
def test_an_input_is_never_overwritten(words, tmp_path, run):
    put(tmp_path, "a.png", "a/b.png", "out/a.png", "out/a_mmse.png", "out/a_x.png", "out/a_sde.jpg")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    _, err = run(f"{words} --output out --sigma 0.1 --steps 2", code=2)
    assert "could overwrite the input" in err and "choose another --output" in err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_an_input_may_lie_in_the_output_folder(tmp_path, run, bare):
    put(tmp_path, "out/a.png")
    run("out/a.png --output out --sigma 0.1 --method mmse")
    assert np.array_equal(stored(tmp_path / "out" / "a.png"), RGB8)
    assert (tmp_path / "out" / "a_mmse.png").exists()


def test_an_output_with_a_suffix_is_refused(tmp_path, run):
    put(tmp_path, "a.png")
    _, err = run("a.png --output x.png", code=2)
    assert "--output must name a folder" in err and "x.png" in err


NAMES = ["x" * 249, 83 * "\N{CJK UNIFIED IDEOGRAPH-65E5}", "a$5_2_3$ é", "%s {0}\\n"]


@pytest.mark.parametrize("name", NAMES, ids=["long", "long in UTF-8", "signs", "formats"])
def test_no_name_is_too_odd(name, tmp_path, run):
    put(tmp_path, f"{name}.png")
    out, err = run([f"{name}.png", "--sigma", "0.1", "--steps", "2"])
    found = [path.name for path in (tmp_path / "output").glob("*_sde.png")]
    assert len(found) == 1 and name.startswith(found[0].removesuffix("_sde.png")) and not err
    assert found[0] in out


@pytest.mark.skipif(sys.platform != "linux", reason="names are Unicode elsewhere")
def test_a_name_that_is_no_text_is_refused(tmp_path, run):
    name = os.fsdecode(b"caf\xe9")
    put(tmp_path, f"{name}.png")
    _, err = run([f"{name}.png", "--sigma", "0.1"], code=2)
    assert "its name is not UTF-8; rename it" in err and len(err.splitlines()) == 1


# -----------------------------------------------------------------------------
# Whatever comes: a result or one line
# -----------------------------------------------------------------------------

fuzz = settings(
    max_examples=40,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
SUFFIXES = [".png", ".jpg", ".tif", ".bmp", ".gif", ".webp", ".npy"]


def damaged(data, content):
    """Return the bytes cut, with a bit turned, with a stretch of zeros, or with more at the end."""
    place = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["cut", "turn", "zero", "more"]))
    if kind == "turn":
        changed = content[place] ^ 1 << data.draw(st.integers(0, 7))
        return content[:place] + bytes([changed]) + content[place + 1 :]
    stretch = data.draw(st.integers(1, 60))
    if kind == "cut":
        return content[:place]
    if kind == "more":
        return content + bytes(stretch)
    zeros = bytes(len(content[place : place + stretch]))
    return content[:place] + zeros + content[place + stretch :]


@fuzz
@given(data=st.data())
def test_a_damaged_file_is_read_or_named(data, tmp_path):
    suffix = data.draw(st.sampled_from(SUFFIXES))
    path = tmp_path / f"a{suffix}"
    path.write_bytes(damaged(data, whole(suffix)))
    try:
        for image in utils.read_images(path, notify=lambda line: None):
            assert np.isfinite(image.pixels).all() and image.pixels.shape[3] in (1, 3)
    except ValueError as error:
        assert path.name in str(error)


NUMBERS = ["0", "-1", "1", "2.5", "nan", "inf", "-inf", "1e308", "1e-320", str(10**30), "1/0"]
WORDS = ["", "none", "None", "auto", "é", "x" * 300, "a/b", "%s", "..", "-", "\ud800"]


@fuzz
@given(data=st.data())
def test_any_option_ends_in_a_result_or_one_line(data, tmp_path, run, bare):
    put(tmp_path, "in/a.png")
    names = sorted(utils.options(vars(denoise)).keys() - {"input", "data_dir", "checkpoint"})
    words = ["in", "--langevin-steps", "2", "--method", "langevin", "--frames", "0"]
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)):
        value = data.draw(st.sampled_from(NUMBERS + WORDS))
        words += [f"--{name.replace('_', '-')}", value]
    _, err = run(words, code=(0, 2))
    assert len(err.splitlines()) <= 1 and "Traceback" not in err

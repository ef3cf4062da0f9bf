"""Files in and out: what an image holds comes back, and files that cannot be read are named."""

import faulthandler
import io
import os
import struct
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


def values(dtype, channels=3, *count):
    """Return (*count, H, W, C) random values of the whole range of the type; floats of [0, 1]."""
    found = np.random.default_rng(0).random((*count, HEIGHT, WIDTH, channels))
    found[..., 0, 0, :] = 0
    found[..., 0, 1, :] = 1
    dtype = np.dtype(dtype)
    return (found * (np.iinfo(dtype).max if dtype.kind in "iu" else 1)).astype(dtype)


# -----------------------------------------------------------------------------
# Files that other libraries write: each function returns one that writes "a.suffix" to a folder
# -----------------------------------------------------------------------------


def pillow(suffix, array, mode=None, **options):
    image = Image.fromarray(array.squeeze())
    image = image.convert(mode) if mode else image
    return lambda folder: image.save(folder / f"a{suffix}", **options)


def tiff(array, **options):
    return lambda folder: tifffile.imwrite(folder / "a.tif", array, **options)


def pages(*arrays):
    def write(folder):
        for k, page in enumerate(arrays):
            tifffile.imwrite(folder / "a.tif", page, photometric="rgb", append=k > 0)

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


def read(folder, **options):
    """Return the Image of the only file in a folder."""
    (image,) = utils.read_images(list(folder.iterdir()), **options)
    return image


# -----------------------------------------------------------------------------
# What goes in comes out
# -----------------------------------------------------------------------------

G8, LA8, RGB8, RGBA8 = (values("u1", channels) for channels in (1, 2, 3, 4))
G16, LA16, RGB16, RGBA16 = (values("u2", channels) for channels in (1, 2, 3, 4))
HALF, FLOAT, DOUBLE = (values(dtype) for dtype in ("f2", "f4", "f8"))
PAGES = values("u2", 3, 3)
BITS = np.where(G8 > 127, 255, 0).astype(np.uint8)
PALETTE = Image.fromarray(RGB8).quantize(64)
COLOURS = np.asarray(PALETTE.convert("RGB"))
RGB = {"photometric": "rgb"}
LA = {"photometric": "minisblack", "planarconfig": "contig", "extrasamples": ["unassalpha"]}
PLANES = RGB | {"planarconfig": "separate"}
NEGATIVE = {"photometric": "miniswhite"}

# kind: (how it is written, the values that it stands for, suffix of the result)
KINDS = {
    "PNG of 1 bit": (pillow(".png", BITS, "1"), BITS, ".png"),
    "grey PNG with alpha": (pillow(".png", LA8), LA8, ".png"),
    "grey PNG of three channels": (pillow(".png", G8.repeat(3, 2)), G8.repeat(3, 2), ".png"),
    "RGB PNG with alpha": (pillow(".png", RGBA8), RGBA8, ".png"),
    "PNG with a palette": (lambda folder: PALETTE.save(folder / "a.png"), COLOURS, ".png"),
    "grey PNG of 16 bits": (pillow(".png", G16), G16, ".png"),
    "RGBA PNG of 16 bits": (openimageio(".png", RGBA16, "uint16"), RGBA16, ".png"),
    "WebP with alpha": (pillow(".webp", RGBA8, lossless=True, exact=True), RGBA8, ".png"),
    "JPEG 2000 of 16 bits": (pillow(".jp2", G16, irreversible=False), G16, ".png"),
    "half EXR": (openimageio(".exr", HALF, "half"), HALF.astype("f4"), ".tif"),
    "TIFF, white is zero": (tiff(255 - G8[..., 0], **NEGATIVE), G8, ".tif"),
    "TIFF of 16 bits, white is zero": (tiff(65535 - G16[..., 0], **NEGATIVE), G16, ".tif"),
    "RGB TIFF in planes": (tiff(RGB16.transpose(2, 0, 1), **PLANES), RGB16, ".tif"),
    "TIFF of signed values": (tiff(values("i2")[..., 0] - 99), values("i2")[..., :1] - 99, ".tif"),
    "grey TIFF with alpha": (tiff(LA16, **LA), LA16, ".tif"),
    "float TIFF beyond [0, 1]": (tiff(4 * FLOAT - 2, **RGB), 4 * FLOAT - 2, ".tif"),
    "TIFF of doubles": (tiff(DOUBLE, **RGB), DOUBLE, ".tif"),
    "TIFF of pages": (pages(*PAGES), PAGES, ".tif"),
}
ARRAYS = [values(dtype) for dtype in ("u1", ">u2", "i2", "f2", "f4", "f8")]
ARRAYS += [G8[..., 0], G8, RGBA8, *(values("u1", channels, 5) for channels in (1, 3, 4))]
KINDS |= {f"array of {x.dtype.str}, {x.shape}": (npy(x), x, ".npy") for x in ARRAYS}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back_as_it_went_in(kind, tmp_path):
    write, expected, suffix = KINDS[kind]
    write(tmp_path)
    image = read(tmp_path)
    np.testing.assert_array_equal(image.values.reshape(expected.shape), expected)
    white = 1 if expected.dtype.kind == "f" else np.iinfo(expected.dtype).max
    frames = np.expand_dims(expected, utils.LACKING[expected.ndim])
    shown = frames[..., :-1] if frames.shape[3] in (2, 4) else frames
    assert image.pixels.shape[3] == 1 or (shown[..., 0] != shown[..., 1]).any()
    np.testing.assert_allclose(np.broadcast_to(image.pixels, shown.shape), shown / white, atol=1e-6)

    out = tmp_path / "output"
    utils.write_image(out / f"b{image.suffix}", image, image.pixels)
    found = read(out).values
    assert image.suffix == suffix and found.dtype == expected.dtype
    tolerance = 1e-7 * (expected.dtype == "f8")
    np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=0, atol=tolerance)


def test_at_the_lowest_noise_level_a_file_comes_back_as_it_was(tmp_path, run, lowest):
    openimageio(".png", RGBA16, "uint16")(tmp_path)
    run("a.png --method mmse")
    (found,) = utils.read_images(tmp_path / "output" / "a_mmse.png")
    assert np.array_equal(found.values[0], RGBA16)


def test_frames_unlike_the_first_are_left_out_and_counted(tmp_path):
    pages(RGB8, RGB8[::2, ::2].copy(), RGB16, RGB8 // 2)(tmp_path)
    others = [Image.fromarray(RGB8[::-1]).quantize(64), Image.fromarray(RGB8 // 2).quantize(64)]
    PALETTE.save(tmp_path / "b.gif", save_all=True, append_images=others)
    told = []
    stack, animation = utils.read_images(tmp_path, notify=told.append)
    assert np.array_equal(stack.values, [RGB8, RGB8 // 2])
    assert np.array_equal(animation.values[..., :3], COLOURS[None]) and animation.suffix == ".png"
    assert len(told) == 2
    assert "a.tif': 2 further frames are left out" in told[0]
    assert "b.gif': 2 further frames are left out" in told[1]


def test_inks_are_read_as_the_colours_that_they_print(tmp_path):
    inks = values("u1", 4)
    of_inks = PROFILE[:16] + b"CMYK" + PROFILE[20:]
    tiff(inks, photometric="separated", iccprofile=of_inks)(tmp_path)
    image = read(tmp_path)
    printed = (1 - inks[..., :3] / 255) * (1 - inks[..., 3:] / 255)
    assert np.abs(image.pixels - printed).max() <= 1 / 255
    utils.write_image(tmp_path / "b.tif", image, image.pixels)
    with Image.open(tmp_path / "b.tif") as file:
        assert file.mode == "RGB" and "icc_profile" not in file.info  # it was that of the inks


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_an_image_comes_out_upright_with_its_profile_and_exif(suffix, tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"  # to be turned by 90 degrees
    exif[0x010E] = exif[0x013B] = b"Andr\xe9"  # description and artist, in Latin-1
    options = {} if suffix in (".png", ".tif") else {"quality": 95}
    pillow(suffix, RGB8, exif=exif, icc_profile=PROFILE, **options)(tmp_path)
    image = read(tmp_path)
    utils.write_image(tmp_path / f"b{image.suffix}", image, image.pixels)
    with Image.open(tmp_path / f"a{suffix}") as file:
        expected = np.asarray(ImageOps.exif_transpose(file)).astype(int)
    with Image.open(tmp_path / f"b{image.suffix}") as file:
        assert file.size == (HEIGHT, WIDTH)
        assert np.abs(np.asarray(file) - expected).max() <= (3 if options else 0)
        assert file.info["icc_profile"] == PROFILE
        assert file.getexif().get(0x0112, 1) == 1 and file.getexif()[0x010F] == "maker"


def test_integers_are_clipped_and_rounded_and_floats_are_not(tmp_path):
    pixels = np.array([-0.5, 0.3004, 0.5, 1.5], np.float32).reshape(1, 1, 4, 1)
    expected = {"u1": [0, 77, 128, 255], "u2": [0, 19687, 32768, 65535], "f4": pixels.ravel()}
    for dtype, numbers in expected.items():
        npy(np.zeros((1, 4), dtype))(tmp_path)
        (image,) = utils.read_images(tmp_path / "a.npy")
        utils.write_image(tmp_path / "b.npy", image, pixels)
        assert np.array_equal(np.load(tmp_path / "b.npy"), [numbers])


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


def encoded(form):
    """Return the bytes of an image in that format."""
    file = io.BytesIO()
    np.save(file, RGB8) if form == "npy" else Image.fromarray(RGB8).save(file, form)
    return file.getvalue()


def fifo(folder):
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no pipes in folders")
    os.mkfifo(folder / "a.png")


def not_a_number():
    array = values("f4")
    array[3, 4, 1] = np.nan
    return array


IMAGEJ = {"metadata": None, "description": "ImageJ=1.53\nimages=3\nslices=3\n"}
UNKNOWN = {"photometric": "minisblack", "planarconfig": "contig"}
BROKEN = {  # kind: (how it is written, words of the message)
    "AVIF": (raw(".png", b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miaf" + bytes(99)), ""),
    "nothing": (raw(".tif", b""), ""),
    "a cut PNG": (raw(".png", encoded("png")[:-200]), ""),
    "a cut JPEG": (raw(".jpg", encoded("jpeg")[:-200]), ""),
    "a cut array": (raw(".npy", b"\x93NUMPY\x01\0"), ""),
    "a pipe": (fifo, "not a regular file"),
    "a missing number": (npy(not_a_number()), "values that are not numbers"),
    "an infinite number": (npy(values("f8") * 1e300), "values that are not numbers"),
    "five channels": (tiff(values("u1", 5), **UNKNOWN), "12, 14, 5); expected numbers, channels"),
    "four that are no colours": (tiff(RGBA8, **UNKNOWN), "4 channels without alpha"),
    "channels first": (npy(RGB8.transpose(2, 0, 1)), "(3, 12, 14); expected numbers, channels"),
    "no pixels": (npy(np.zeros((0, 5, 3), "u1")), ""),
    "truth values": (npy(G8 > 127), "bool"),
    "objects": (npy(np.array([[None]])), ""),
    "ImageJ's stack": (tiff(G16[..., 0], **IMAGEJ), "images behind one page header"),
    "tifffile's stack": (tiff(PAGES, truncate=True, **RGB), "images behind one page header"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_cannot_be_read_is_named(kind, tmp_path):
    write, words = BROKEN[kind]
    write(tmp_path)
    (path,) = tmp_path.iterdir()
    with pytest.raises(ValueError) as refusal:
        read(tmp_path)
    assert str(refusal.value).startswith(f"'{path}' cannot be read: ")
    assert words in str(refusal.value)


def test_a_broken_file_does_not_stop_the_others_and_is_counted(tmp_path):
    for k, (write, _) in enumerate(BROKEN.values()):
        (tmp_path / str(k)).mkdir(parents=True)
        write(tmp_path / str(k))
    (tmp_path / "z.png").mkdir()  # a folder, whatever its name
    pillow(".png", RGB8)(tmp_path)
    told, failures, count = [], ["of the caller"], len(BROKEN)
    images = utils.read_images(tmp_path, notify=told.append, failures=failures)
    assert [image.name for image in images] == ["a"]
    assert sum("' cannot be read: " in line for line in told) == count == len(failures) - 1
    assert told[-1] == f"{count} of {count + 1} files cannot be read and are left out"


def test_one_input_that_cannot_be_read_is_one_line(tmp_path, run):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("text")
    reasons = {"text.png": "cannot be read", "nowhere": "no such file", "empty": "no image"}
    for word, reason in reasons.items():
        out, err = run(word, code=2)
        assert not out and reason in err and word in err and len(err.splitlines()) == 1


def test_a_tiff_whose_pages_form_a_ring_ends(tmp_path):
    ring = bare_tiff(72)
    second = ring[72:-4] + struct.pack("<I", 72)
    raw(".tif", ring[:-4] + struct.pack("<I", len(ring)) + second)(tmp_path)
    faulthandler.dump_traceback_later(60, exit=True)
    image = read(tmp_path)
    faulthandler.cancel_dump_traceback_later()
    assert len(image.pixels) <= 2


# -----------------------------------------------------------------------------
# Which files are read, and what results are called
# -----------------------------------------------------------------------------


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RGB8).save(folder / name, "PNG")


def test_a_folder_is_read_without_what_is_hidden_or_no_image(tmp_path):
    put(tmp_path, "a.png", "sub/b.PNG", ".c.png", ".cache/d.png", "e.txt", "f.mov", "g.txt")
    told = []
    images = utils.read_images(tmp_path, notify=told.append)
    assert [image.name for image in images] == ["a", "sub/b"]
    assert told == ["3 other files are not read: .mov .txt"]


def test_results_and_the_mask_are_not_read_and_results_are_overwritten(tmp_path, run, bare):
    put(tmp_path, "a.png", "sub/b.png")
    Image.fromarray(np.where(G8[..., 0] > 99, 255, 0).astype("u1")).save(tmp_path / "mask.png")
    contents = []
    for level in (0.1, 0.3):
        run(f". --mask mask.png --method mmse --sigma {level}")
        found = [path.relative_to(tmp_path / "output") for path in tmp_path.rglob("*_mean.png")]
        assert sorted(map(str, found)) == ["a_mean.png", str(Path("sub", "b_mean.png"))]
        contents.append((tmp_path / "output" / "a_mean.png").read_bytes())
    assert contents[0] != contents[1]


def test_two_inputs_of_one_name_get_numbers(tmp_path):
    put(tmp_path, "a.png", "A.bmp", "a.v2.png", "sub/a.png")
    sources = [tmp_path / "sub" / "a.png", tmp_path, "samples"]
    names = [image.name for image in utils.read_images(sources)]
    assert names == ["a", "A_2", "a_3", "a.v2", "sub/a", *utils.SAMPLES]


@pytest.mark.parametrize("words", ["a.png out/b.png", "out/sub/c.png", "out/../out/b.png"])
def test_an_input_in_the_output_folder_is_refused(words, tmp_path, run):
    put(tmp_path, "a.png", "out/b.png", "out/sub/c.png")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    _, err = run(f"{words} --output out --sigma 0.1", code=2)
    assert "lies in the output folder" in err and "choose another --output" in err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_no_name_is_too_odd(tmp_path, run):
    name = "a$5_2_3$ é %s {0}"
    put(tmp_path, f"{name}.png")
    out, err = run([f"{name}.png", "--sigma", "0.1", "--steps", "2"])
    assert (tmp_path / "output" / f"{name}_sde.png").exists() and not err
    assert name in out


options = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
fuzz = settings(max_examples=40, derandomize=True, **options)


@fuzz
@given(data=st.data())
def test_a_damaged_file_is_read_or_named(data, tmp_path):
    form = data.draw(st.sampled_from(["png", "jpeg", "tiff", "bmp", "gif", "webp", "npy"]))
    path, content = tmp_path / f"a.{form}", bytearray(encoded(form))
    place = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["cut", "turn", "zero"]))
    if kind == "cut":
        del content[place:]
    elif kind == "turn":
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        content[place : place + 30] = bytes(30)
    path.write_bytes(content)
    try:
        for image in utils.read_images(path, notify=str):
            assert np.isfinite(image.pixels).all() and image.pixels.shape[3] in (1, 3)
    except ValueError as error:
        assert path.name in str(error)


NUMBERS = ["0", "-1", "1", "2.5", "nan", "inf", "-inf", "1e308", "1e-320", str(10**30), "1/0"]
WORDS = ["", "none", "None", "auto", "é", "x" * 300, "a/b", "%s", "..", "-", "\ud800"]


@fuzz
@given(data=st.data())
def test_any_option_ends_in_a_result_or_one_line(data, tmp_path, run, bare):
    put(tmp_path, "in/a.png")
    names = sorted(utils.options(vars(denoise)).keys() - {"input", "checkpoint"})
    words = ["in", "--langevin-steps", "2", "--method", "langevin", "--frames", "0"]
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)):
        value = data.draw(st.sampled_from(NUMBERS + WORDS))
        words += [f"--{name.replace('_', '-')}", value]
    _, err = run(words, code=(0, 2))
    assert len(err.splitlines()) <= 1 and "Traceback" not in err

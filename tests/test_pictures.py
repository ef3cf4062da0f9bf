"""Pictures in and out: what goes in comes out, whatever the file holds."""

import os
from unittest import mock

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageCms, TiffImagePlugin

import denoise
import utils

HEIGHT, WIDTH, SIGMA = 24, 34, 0.05
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def smooth(channels=3):
    wave = np.sin(np.linspace(0, 5, HEIGHT))[:, None, None] * np.cos(np.linspace(0, 4, WIDTH))[:, None] * np.ones(channels)
    return 0.5 + 0.3 * wave * [1.0, 0.8, 0.6, 1.0][:channels]


def scene(channels=3, low=0, high=255, dtype=np.uint8, seed=0):
    """A smooth picture with noise, with a value of exactly low and one of exactly high."""
    wave = smooth(channels)
    wave = wave + np.random.default_rng(seed).normal(0, SIGMA, wave.shape)
    wave = wave.clip(0, 1)
    wave[0, 0], wave[0, 1] = 0, 1
    return (low + wave * (high - low)).round(0 if np.dtype(dtype).kind in "iu" else 9).astype(dtype)


def grey(**options):
    return scene(1, **options)[:, :, 0]


def alpha(channels=3, dtype=np.uint8):
    """Colours with an alpha channel: hidden at the left, half seen below, seen elsewhere."""
    most = np.iinfo(dtype).max
    mask = np.full((HEIGHT, WIDTH, 1), most, dtype)
    mask[-5:], mask[:, :7] = most // 3, 0
    return np.dstack([scene(channels, high=most, dtype=dtype), mask])


def pillow(name, array, mode=None, **options):
    def make(folder):
        image = Image.fromarray(array)
        (image.convert(mode) if mode else image).save(folder / name, **options)
        return folder / name

    return make


def tiff(array, **options):
    return lambda folder: tifffile.imwrite(folder / "a.tif", array, **options) or folder / "a.tif"


def npy(array):
    return lambda folder: np.save(folder / "a.npy", array) or folder / "a.npy"


def png16(array):
    return lambda folder: (folder / "a.png").write_bytes(imagecodecs.png_encode(array)) and folder / "a.png"


def coded(name, encode, array, **options):
    return lambda folder: (folder / name).write_bytes(encode(array, **options)) and folder / name


def ppm16(folder):
    array = scene(high=65535, dtype=np.uint16)
    (folder / "a.ppm").write_bytes(b"P6\n# dcraw\n%d %d\n65535\n" % (WIDTH, HEIGHT) + array.astype(">u2").tobytes())
    return folder / "a.ppm"


def palette(folder):
    Image.fromarray(scene()).quantize(64).save(folder / "a.png", transparency=3)
    return folder / "a.png"


DEEP = scene(high=65535, dtype=np.uint16)
CLEAR = int(DEEP[5, 5, 0])
LA = {"planarconfig": "contig", "extrasamples": [2]}
PLANES = DEEP.transpose(2, 0, 1)
FLOAT = scene(low=0.01, high=0.99, dtype=np.float32)
INKS = np.dstack([scene(), grey(high=200, seed=1)])
INKS[5, 5] = (60, 40, 40, 255)  # rich black
LOSSY = np.dstack([scene()[:, :, 0]] * 3)

# kind: (how it is made, its colours for the denoiser, suffix, shape and type of what comes out, what is said)
KINDS = {
    "RGB PNG": (pillow("a.png", scene()), 3, ".png", (3,), "uint8", ""),
    "grey PNG": (pillow("a.png", grey()), 1, ".png", (), "uint8", ""),
    "grey in three channels": (pillow("a.png", LOSSY), 1, ".png", (3,), "uint8", ""),
    "1-bit PNG": (pillow("a.png", grey(), "1"), 1, ".png", (), "uint8", "1 bit"),
    "palette PNG with alpha": (palette, 3, ".png", (4,), "uint8", ""),
    "grey PNG with alpha": (pillow("a.png", alpha(1)), 1, ".png", (2,), "uint8", ""),
    "RGB PNG with alpha": (pillow("a.png", alpha()), 3, ".png", (4,), "uint8", ""),
    "RGB PNG with a clear colour": (pillow("a.png", scene(), transparency=(0, 0, 0)), 3, ".png", (4,), "uint8", ""),
    "16-bit grey PNG": (pillow("a.png", grey(high=65535, dtype=np.uint16)), 1, ".png", (), "uint16", ""),
    "16-bit grey PNG with alpha": (png16(alpha(1, np.uint16)), 1, ".png", (2,), "uint16", ""),
    "16-bit grey PNG with a clear level": (pillow("a.png", DEEP[:, :, 0], transparency=CLEAR), 1, ".png", (2,), "uint16", ""),
    "16-bit RGB PNG": (png16(DEEP), 3, ".png", (3,), "uint16", ""),
    "16-bit RGB PNG with alpha": (png16(alpha(3, np.uint16)), 3, ".png", (4,), "uint16", ""),
    "12 bit in 16-bit PNG": (png16(scene(high=4095, dtype=np.uint16)), 3, ".png", (3,), "uint16", "4095 (white)"),
    "JPEG": (pillow("a.jpg", scene()), 3, ".png", (3,), "uint8", ""),
    "grey JPEG": (pillow("a.jpg", grey()), 1, ".png", (), "uint8", ""),
    "CMYK JPEG": (pillow("a.jpg", scene(), "CMYK"), 3, ".tif", (4,), "uint8", ""),
    "WebP": (pillow("a.webp", scene()), 3, ".png", (3,), "uint8", ""),
    "grey WebP": (pillow("a.webp", LOSSY), 1, ".png", (3,), "uint8", ""),
    "WebP with alpha": (pillow("a.webp", alpha(), lossless=True, exact=True), 3, ".png", (4,), "uint8", ""),
    "AVIF": (pillow("a.avif", scene()), 3, ".png", (3,), "uint8", ""),
    "BMP": (pillow("a.bmp", scene()), 3, ".png", (3,), "uint8", ""),
    "GIF": (pillow("a.gif", scene()), 3, ".png", (3,), "uint8", ""),
    "PPM": (pillow("a.ppm", scene()), 3, ".png", (3,), "uint8", ""),
    "16-bit PPM": (ppm16, 3, ".png", (3,), "uint16", ""),
    "JPEG 2000": (pillow("a.jp2", scene()), 3, ".png", (3,), "uint8", ""),
    "16-bit grey JPEG 2000": (pillow("a.jp2", grey(high=65535, dtype=np.uint16)), 1, ".png", (), "uint16", ""),
    "RGB TIFF": (tiff(scene(), photometric="rgb"), 3, ".tif", (3,), "uint8", ""),
    "LZW TIFF": (pillow("a.tif", scene(), compression="tiff_lzw"), 3, ".tif", (3,), "uint8", ""),
    "RGB TIFF with alpha": (tiff(alpha(), photometric="rgb", extrasamples=["unassalpha"]), 3, ".tif", (4,), "uint8", ""),
    "CMYK TIFF": (tiff(INKS, photometric="separated"), 3, ".tif", (4,), "uint8", ""),
    "16-bit CMYK TIFF": (tiff(INKS.astype(np.uint16) * 257, photometric="separated"), 3, ".tif", (4,), "uint16", ""),
    "16-bit grey TIFF": (tiff(DEEP[:, :, 0]), 1, ".tif", (), "uint16", ""),
    "16-bit RGB JPEG 2000": (coded("a.jp2", imagecodecs.jpeg2k_encode, DEEP, level=0), 3, ".png", (3,), "uint16", ""),
    "10-bit AVIF": (coded("a.avif", imagecodecs.avif_encode, DEEP >> 6, bitspersample=10), 3, ".png", (3,), "uint16", ""),
    "16-bit RGB LZW TIFF": (tiff(DEEP, photometric="rgb", compression="lzw", predictor=True), 3, ".tif", (3,), "uint16", ""),
    "16-bit white-is-zero TIFF": (tiff(DEEP[:, :, 0], photometric="miniswhite"), 1, ".tif", (), "uint16", ""),
    "16-bit big-endian TIFF": (tiff(DEEP[:, :, 0], byteorder=">"), 1, ".tif", (), "uint16", ""),
    "16-bit RGB TIFF": (tiff(DEEP, photometric="rgb"), 3, ".tif", (3,), "uint16", ""),
    "16-bit RGB zlib TIFF": (tiff(DEEP, photometric="rgb", compression="zlib", predictor=True), 3, ".tif", (3,), "uint16", ""),
    "16-bit RGB TIFF in planes": (tiff(PLANES, photometric="rgb", planarconfig="separate"), 3, ".tif", (3,), "uint16", ""),
    "16-bit grey TIFF with alpha": (tiff(alpha(1, np.uint16), photometric="minisblack", **LA), 1, ".tif", (2,), "uint16", ""),
    "16-bit RGBA TIFF": (tiff(alpha(3, np.uint16), photometric="rgb", extrasamples=[2]), 3, ".tif", (4,), "uint16", ""),
    "12 bit in 16-bit TIFF": (tiff(grey(high=4095, dtype=np.uint16)), 1, ".tif", (), "uint16", "4095 (white)"),
    "int16 TIFF": (tiff(grey(low=-1000, high=2000, dtype=np.int16)), 1, ".tif", (), "int16", "-1000 (black) to 2000 (white)"),
    "int16 TIFF of 15 bits": (tiff(grey(high=32767, dtype=np.int16)), 1, ".tif", (), "int16", "32767 (white)"),
    "float TIFF": (tiff(FLOAT[:, :, 0]), 1, ".tif", (), "float32", ""),
    "float RGB TIFF": (tiff(FLOAT, photometric="rgb"), 3, ".tif", (3,), "float32", ""),
    "double RGB TIFF": (tiff(FLOAT.astype(float), photometric="rgb"), 3, ".tif", (3,), "float64", ""),
    "bytes in .npy": (npy(scene()), 3, ".npy", (3,), "float32", ""),
    "grey .npy": (npy(FLOAT[:, :, 0]), 1, ".npy", (), "float32", ""),
    "grey .npy of one channel": (npy(FLOAT[:, :, :1]), 1, ".npy", (1,), "float32", ""),
    "grey .npy with alpha": (npy(alpha(1)), 1, ".npy", (2,), "float32", ""),
    "RGB .npy with alpha": (npy(alpha()), 3, ".npy", (4,), "float32", ""),
    "bool .npy": (npy(grey() > 128), 1, ".npy", (), "float32", ""),
    "float .npy beyond [0, 1]": (npy(2 * FLOAT - 0.5), 3, ".npy", (3,), "float32", "0 (black) to 1 (white)"),
    "float .npy in [-1, 1]": (npy(2 * FLOAT - 1), 3, ".npy", (3,), "float32", "-1 (black) to 1 (white)"),
    "float .npy in [0, 255]": (npy(255.0 * FLOAT), 3, ".npy", (3,), "float32", "0 (black) to 255 (white)"),
    "float .npy of any range": (npy(7 * FLOAT + 3), 3, ".npy", (3,), "float32", "3.07 (black) to 9.93 (white)"),
    "int16 .npy of 12 bits": (npy(scene(high=4000, dtype=np.int16)), 3, ".npy", (3,), "float32", "4095 (white)"),
    "int64 .npy": (npy(scene(high=10**6, dtype=np.int64)), 3, ".npy", (3,), "float64", "1e+06 (white)"),
}


def read(path, **options):
    said = []
    return list(utils.read_pictures(path, notify=said.append, **options)), [str(line) for line in said]


def stored(path):
    """What another library finds in the file."""
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".tif":
        return tifffile.imread(path)
    return imagecodecs.png_decode(path.read_bytes())


def quantum(picture):
    return 1 / (picture.white - picture.black) if picture.dtype.kind in "iu" and picture.suffix != ".npy" else 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_out_as_it_went_in(tmp_path, kind):
    make, colours, suffix, channels, dtype, words = KINDS[kind]
    (picture,), said = read(make(tmp_path))
    assert picture.pixels.shape == (HEIGHT, WIDTH, colours) and picture.pixels.dtype == np.float32
    assert picture.pixels.max() > 0.7 and picture.pixels.std() > 0.1  # neither black nor flat
    assert len(said) == bool(words) and all(words in line for line in said), said

    path = utils.write_picture(tmp_path / f"out{suffix}", picture, picture.pixels, "me")
    found = stored(path)
    assert picture.suffix == suffix and found.shape == (HEIGHT, WIDTH, *channels) and found.dtype == dtype
    path.rename(tmp_path / f"copy{suffix}")
    (again,), _ = read(tmp_path / f"copy{suffix}", white=picture.white if picture.black == 0 and dtype == "uint16" else None)
    if dtype != "int16":
        assert np.abs(again.pixels - picture.pixels).max() <= 0.501 * quantum(picture)
    if picture.alpha is not None:
        assert np.array_equal(found[..., -1], picture.alpha) and np.ptp(picture.alpha) > 0
        assert suffix != ".tif" or tifffile.TiffFile(tmp_path / f"copy{suffix}").pages[0].extrasamples == (2,)

    # A denoiser's result, beyond the range: rounded once, clipped where the file is of whole numbers.
    result = picture.pixels * 1.2 - 0.1 + 0.3 * quantum(picture)
    found = stored(utils.write_picture(tmp_path / f"result{suffix}", picture, result, "me")).astype(float)
    found = (found.reshape(HEIGHT, WIDTH, -1) - picture.black) / (picture.white - picture.black)
    expected = result if suffix == ".npy" or picture.dtype.kind == "f" else result.clip(0, 1)
    if picture.inks is not None:
        found = (1 - found[..., :3]) * (1 - found[..., 3:])
    if picture.alpha is not None:
        found = found[..., :-1]
    error = np.abs(found - expected)
    assert error.max() <= (2 if picture.inks is not None else 0.51) * quantum(picture)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("1-bit PNG", "bool .npy")])
def test_every_kind_is_denoised(tmp_path, monkeypatch, kind):
    make, colours, suffix, *_ = KINDS[kind]
    sigma = 2 * SIGMA if "beyond" in kind else SIGMA  # of twice the contrast
    given = {"INPUT": (str(make(tmp_path)),), "OUTPUT": str(tmp_path / "out"), "SIGMA": sigma, "METHOD": "mmse", "PROBES": 0}
    for name, value in given.items():
        monkeypatch.setattr(denoise, name, value)
    denoise.main()
    truth = smooth(colours)
    if "CMYK TIFF" in kind:  # what colours and black leave
        truth = (1 - smooth()) * (1 - smooth(1) * 200 / 255)

    def decibels(path):
        (picture,), _ = read(path)
        seen = np.ones((HEIGHT, WIDTH), bool) if picture.alpha is None else picture.alpha > 0
        seen[0, :2] = False  # black and white, exactly
        slope, start = np.polyfit(truth[seen].ravel(), picture.pixels[seen].ravel(), 1)  # a file has a range of its own
        return -10 * np.log10((((picture.pixels[seen] - start) / slope - truth[seen]) ** 2).mean())

    (tmp_path / "out" / f"a_mmse{suffix}").rename(tmp_path / f"copy{suffix}")  # results are not read
    before, after = decibels(given["INPUT"][0]), decibels(tmp_path / f"copy{suffix}")
    print(f"{kind}: {before:.2f} dB in, {after:.2f} dB out")  # a table of them: pytest -s -k denoised
    assert before < 31 and after > 35, (before, after)


def test_kinds_without_loss_hold_the_files_own_values(tmp_path):
    for make, expected in (
        (pillow("a.png", scene()), scene() / 255),
        (png16(DEEP), DEEP / 65535),
        (ppm16, DEEP / 65535),
        (tiff(DEEP, photometric="rgb"), DEEP / 65535),
        (tiff(DEEP[..., :1], photometric="miniswhite"), 1 - DEEP[..., :1] / 65535),
        (npy(2 * FLOAT - 1), FLOAT),
        (tiff(INKS, photometric="separated"), (1 - INKS[..., :3] / 255) * (1 - INKS[..., 3:] / 255)),
    ):
        (picture,), _ = read(make(tmp_path))
        np.testing.assert_allclose(picture.pixels, expected, atol=1e-6)


def test_inks_written_back_unchanged_are_the_files(tmp_path):
    (picture,), _ = read(tiff(INKS, photometric="separated")(tmp_path))
    assert np.array_equal(stored(utils.write_picture(tmp_path / "b.tif", picture, picture.pixels, "me")), INKS)
    bright = np.full_like(picture.pixels, 0.9)  # brighter than the file's black ink alone
    found = stored(utils.write_picture(tmp_path / "b.tif", picture, bright, "me")) / 255
    assert np.abs((1 - found[..., :3]) * (1 - found[..., 3:]) - 0.9).max() <= 1 / 255


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.avif", "a.tif"])
def test_the_profile_is_kept_and_the_picture_upright(tmp_path, name):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"  # rotate by 90 degrees to view
    pillow(name, scene(), exif=exif, icc_profile=PROFILE)(tmp_path)
    (picture,), _ = read(tmp_path / name)
    assert np.abs(picture.pixels - np.rot90(scene(), -1) / 255).mean() < (0.05 if name in ("a.jpg", "a.webp", "a.avif") else 1e-6)
    path = utils.write_picture(tmp_path / f"out{picture.suffix}", picture, picture.pixels, "me")
    with Image.open(path) as image:
        assert image.size == (HEIGHT, WIDTH) and image.info["icc_profile"] == PROFILE
        assert image.getexif().get(0x0112, 1) == 1
        assert name == "a.tif" or image.getexif()[0x010F] == "maker"


def test_the_profile_of_jpeg_2000_is_kept(tmp_path):
    pillow("a.jp2", scene())(tmp_path)
    plain = (tmp_path / "a.jp2").read_bytes()
    colours, length = plain.index(b"colr") - 4, lambda data: (len(data) + 4).to_bytes(4, "big")
    assert plain[colours - 22 - 8 + 4 : colours - 22] == b"jp2h" and plain[colours : colours + 4] == b"\0\0\0\x0f"
    box = b"colr\2\0\0" + PROFILE  # ISO 15444-1, I.5.3.3: method 2 is a restricted profile
    inside = plain[colours - 22 : colours] + length(box) + box
    header = b"jp2h" + inside
    (tmp_path / "a.jp2").write_bytes(plain[: colours - 30] + length(header) + header + plain[colours + 15 :])
    (picture,), said = read(tmp_path / "a.jp2")
    assert not said and picture.info["icc_profile"] == PROFILE and picture.shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_kinds_are_turned_as_shallow_ones(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pillow("a.png", scene(), exif=exif)(tmp_path)
    utils._write_png16(tmp_path / "b.png", scene().astype(np.uint16) * 257, {"exif": exif.tobytes(), "icc_profile": PROFILE})
    tags = {"iccprofile": PROFILE, "extratags": [(274, 3, 1, orientation, True)]}
    tiff(scene().astype(np.uint16) * 257, photometric="rgb", **tags)(tmp_path)
    found, said = read(tmp_path)
    assert len(found) == 3 and not said
    for picture in found:
        np.testing.assert_allclose(picture.pixels, found[0].pixels, atol=1e-6)
    for k, picture in enumerate(found[1:]):
        path = utils.write_picture(tmp_path / f"out{k}{picture.suffix}", picture, picture.pixels, "me")
        profile = Image.open(path).info["icc_profile"] if k else tifffile.TiffFile(path).pages[0].tags[34675].value
        assert profile == PROFILE and stored(path).shape == picture.shape


def test_what_is_hidden_reaches_no_visible_pixel(tmp_path):
    picture = alpha()
    loud = picture.copy()
    loud[picture[..., 3] == 0, :3] = (255, 0, 255)
    first, second = (read(pillow("a.png", array)(tmp_path))[0][0].pixels for array in (picture, loud))
    assert np.array_equal(first, second)
    seen = picture[..., 3] > 0
    np.testing.assert_allclose(first[seen], picture[seen][:, :3] / 255, atol=1e-6)
    np.testing.assert_allclose(first[:, :7], first[:, 14:7:-1])  # mirrored at the border: same noise, no edge


def test_only_what_is_visible_tells_the_noise_level(tmp_path):
    (picture,), _ = read(pillow("a.png", alpha())(tmp_path))
    y = torch.from_numpy(picture.pixels).permute(2, 0, 1)
    assert torch.equal(utils.visible_part(y, picture.alpha), y[:, :, 7:]) and utils.visible_part(y, None) is y


def test_grey_in_four_inks_is_grey(tmp_path):
    inks = np.dstack([scene(1), scene(1), scene(1), grey(high=200, seed=1)])
    (picture,), _ = read(tiff(inks, photometric="separated")(tmp_path))
    assert picture.pixels.shape == (HEIGHT, WIDTH, 1)
    assert np.array_equal(stored(utils.write_picture(tmp_path / "b.tif", picture, picture.pixels, "me")), inks)


def test_a_nearly_grey_png_keeps_its_colours(tmp_path):
    nearly = LOSSY // 2 + np.uint8([0, 0, 1])
    (picture,), _ = read(pillow("a.png", nearly)(tmp_path))
    assert np.array_equal(np.rint(picture.pixels * 255), nearly)


@pytest.mark.parametrize("pages", [(scene(), DEEP), (DEEP, scene())])
def test_pages_of_two_types_are_told(tmp_path, pages):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for page in pages:
            file.write(page, photometric="rgb")
    pillow("b.png", scene())(tmp_path)
    found, said = read(tmp_path)
    assert f"frames of {pages[0].dtype} and of {pages[1].dtype} values" in said[-1]
    assert all(picture.white == 255 for picture in found) and found[-1].name == "b"  # none is read by the other's range


@pytest.mark.parametrize("most, white", [(2**32 - 1, None), (2**31 - 1, None), (65535, 70000.0)])
def test_white_stays_white(tmp_path, most, white):
    dtype = {2**32 - 1: np.uint32, 2**31 - 1: np.int32, 65535: np.uint16}[most]
    (picture,), _ = read(tiff(grey(high=most, dtype=dtype))(tmp_path), white=white)
    written = stored(utils.write_picture(tmp_path / "b.tif", picture, picture.pixels + 1, "me"))
    assert (written == most).all()


def test_where_zero_is_white_alpha_is_not(tmp_path):
    array = alpha(1, np.uint16) // 16  # of 12 bits
    (picture,), _ = read(tiff(array, photometric="miniswhite", extrasamples=["unassalpha"])(tmp_path))
    assert np.array_equal(picture.alpha, array[..., 1])
    colour = np.rint(picture.pixels[..., 0] * picture.white)
    assert np.array_equal(colour[:, 7:], 65535 - array[:, 7:, 0].astype(float))


def test_channels_that_may_be_no_colours_are_refused(tmp_path):
    with pytest.raises(ValueError, match="4 channels of"):
        read(tiff(alpha(3, np.uint16), planarconfig="contig", photometric="minisblack")(tmp_path))


@pytest.mark.parametrize("dots, kept", [(300, (300, 300)), (2**32 - 1, None)])
def test_an_absurd_resolution_is_dropped(tmp_path, dots, kept):
    exif = Image.Exif()
    exif[0x011A], exif[0x0128] = TiffImagePlugin.IFDRational(dots, 1), 2  # dots, per inch
    (picture,), _ = read(pillow("a.jpg", scene(), exif=exif)(tmp_path))
    assert picture.info.get("dpi") == kept
    assert Image.open(utils.write_picture(tmp_path / "b.png", picture, picture.pixels, "me")).size == (WIDTH, HEIGHT)


@pytest.mark.parametrize("frame, white", [(1, None), (0, 1.0)])
def test_a_missing_number_is_an_error(tmp_path, frame, white):
    stack = np.stack([FLOAT, FLOAT, FLOAT])
    stack[frame, 3, 4] = np.nan
    with pytest.raises(ValueError, match="not numbers"):
        read(npy(stack)(tmp_path), white=white)


def test_masked_values_do_not_set_the_range(tmp_path):
    array = alpha(3, np.uint16)
    array[..., :3] //= 16
    array[array[..., 3] == 0, :3] = 65535
    (picture,), said = read(png16(array)(tmp_path))
    assert picture.white == 4095 and "4095" in said[0]


def test_white_can_be_given(tmp_path):
    array = scene(high=4095, dtype=np.uint16)
    (picture,), said = read(png16(array)(tmp_path), white=65535)
    assert not said
    np.testing.assert_allclose(picture.pixels, array / 65535, atol=1e-6)


@pytest.mark.parametrize("sigma", [0.1, 0.5])
def test_strong_noise_does_not_change_the_range(tmp_path, sigma):
    for low, high in ((0, 1), (-1, 1), (0, 255)):
        clean = scene(low=low, high=high, dtype=float)
        noisy = clean + (high - low) * sigma * np.random.default_rng(1).standard_normal(clean.shape)
        (picture,), said = read(npy(noisy)(tmp_path))
        assert (picture.black, picture.white) == (low, high) and len(said) == 1


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.avif", "a.tif"])
def test_every_frame_is_a_picture(tmp_path, name):
    frames = [Image.fromarray(scene(seed=k)) for k in range(3)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    found, said = read(tmp_path / name)
    assert [p.name for p in found] == ["a_00000", "a_00001", "a_00002"] and len({p.source for p in found}) == 3
    assert len(said) == 1 and "several frames" in said[0]
    for k, picture in enumerate(found):
        assert np.abs(picture.pixels - scene(seed=k) / 255).mean() < 0.05


def test_stacks_share_one_range(tmp_path):
    stack = np.stack([scene(high=high, dtype=np.uint16) for high in (300, 4000)])
    np.save(tmp_path / "a.npy", stack)
    np.save(tmp_path / "b.npy", stack[..., 0])  # greys
    tifffile.imwrite(tmp_path / "c.tif", stack, photometric="rgb")
    found, said = read(tmp_path)
    assert [p.name for p in found] == [f"{name}_0000{k}" for name in "abc" for k in (0, 1)] and len(said) == 6
    for k, picture in enumerate(found):
        assert picture.white == 4095 and picture.pixels.shape[2] == (1 if picture.name[0] == "b" else 3)
        np.testing.assert_allclose(picture.pixels, stack[k % 2, ..., : picture.pixels.shape[2]] / 4095, atol=1e-6)


def test_thumbnails_in_a_tiff_are_no_pages(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(scene(), photometric="rgb")
        file.write(scene()[::2, ::2], photometric="rgb", subfiletype=1)
    (picture,), said = read(tmp_path / "a.tif")
    assert picture.name == "a" and not said


def test_further_kinds_of_a_photograph_are_said(tmp_path):
    frames = [Image.fromarray(scene(seed=k)) for k in range(2)]
    frames[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=frames[1:])
    (_,), said = read(tmp_path / "a.jpg")
    assert len(said) == 1 and "2 pictures, of which the first" in said[0]


@pytest.mark.parametrize("kind", ["a.jp2", "a.j2k", "a.avif", "a.ppm"])
def test_twelve_bits_that_the_file_declares_become_sixteen(tmp_path, kind):
    array = scene(high=4095, dtype=np.uint16)
    if kind == "a.avif":
        coded(kind, imagecodecs.avif_encode, array, level=100, bitspersample=12)(tmp_path)
    elif kind == "a.ppm":
        (tmp_path / kind).write_bytes(b"P6 %d %d 4095 " % (WIDTH, HEIGHT) + array.astype(">u2").tobytes())
    else:
        coded(kind, imagecodecs.jpeg2k_encode, array, level=0, bitspersample=12, codecformat=kind[2:])(tmp_path)
    (picture,), said = read(tmp_path / kind)
    assert picture.white == 65535 and not said
    np.testing.assert_allclose(picture.pixels, array / 4095, atol=0.003 if kind == "a.avif" else 1e-5)


# -----------------------------------------------------------------------------
# Files that are no pictures
# -----------------------------------------------------------------------------


def spoil(folder):
    """Write every wrong file; return their names."""
    pillow("whole.png", scene())(folder)
    whole = (folder / "whole.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("not a picture")
    (folder / "text.npy").write_text("not an array")
    (folder / "sub.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "broken.png").symlink_to("nowhere")
    png16(DEEP)(folder)
    (folder / "cut16.png").write_bytes((folder / "a.png").read_bytes()[:2000])
    (folder / "cut16.ppm").write_bytes(b"P6 34 24 65535\n" + bytes(100))
    (folder / "cut.tif").write_bytes(tiff(DEEP, photometric="rgb")(folder).read_bytes()[:1500])
    pillow("lab.tif", scene())(folder)
    Image.new("LAB", (8, 8)).save(folder / "lab.tif")
    for name, array in {
        "shape": np.zeros((3, 8, 8)),
        "words": np.full((4, 4, 3), "word"),
        "nan": np.full((4, 4, 3), np.nan),
        "none": np.zeros((0, 4, 3)),
        "stack": np.zeros((0, 8, 8, 3), np.uint8),
        "complex": np.zeros((4, 4), complex),
    }.items():
        np.save(folder / f"{name}.npy", array)
    np.save(folder / "object.npy", np.array([{}]), allow_pickle=True)
    np.savez(folder / "archive", np.zeros((4, 4, 3)))
    (folder / "archive.npz").rename(folder / "archive.npy")
    for name in ("a.png", "a.tif"):
        (folder / name).unlink()
    return sorted(p.name for p in folder.iterdir() if p.name not in ("whole.png", "sub.png"))


def test_bad_files_are_named_and_the_rest_goes_on(tmp_path):
    bad, failed = spoil(tmp_path), []
    found, said = read(tmp_path, failed=failed)
    assert [p.name for p in found] == ["whole"] and sorted(p.name for p in failed) == bad
    assert len(said) == len(bad) and all(len(line.splitlines()) == 1 for line in said)
    for name in bad:
        assert sum(f"{name}' cannot be read: " in line for line in said) == 1


def test_one_bad_file_alone_is_an_error(tmp_path):
    for name in spoil(tmp_path):
        with pytest.raises(ValueError, match=f"{name}' cannot be read: ..."):
            read(tmp_path / name)


def test_forbidden_files_are_named(tmp_path, monkeypatch):
    pillow("a.png", scene())(tmp_path), pillow("b.png", scene())(tmp_path)
    real = open

    def guarded(path, *rest, **options):
        if str(path).endswith("a.png"):
            raise PermissionError(13, "Permission denied")
        return real(path, *rest, **options)

    monkeypatch.setattr(utils, "open", guarded, raising=False)  # tests may run as root, whom nothing is forbidden
    found, said = read(tmp_path)
    assert len(found) == 1 and "a.png" in said[0] and "Permission denied" in said[0]


def test_missing_files_and_empty_folders_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no picture"):
        read(tmp_path)
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_text("text")
    with pytest.raises(ValueError, match="none of 2 files"):
        read(tmp_path)
    np.save(tmp_path / "c.npy", FLOAT)
    failed = []
    found, said = read([tmp_path / "nowhere", tmp_path / "c.npy"], failed=failed)
    assert len(found) == 1 and failed == [tmp_path / "nowhere"] and "no such file" in said[0]


def test_bright_floats_are_no_range_around_zero(tmp_path):
    (picture,), said = read(npy(1.4 * FLOAT)(tmp_path))
    assert picture.black >= 0 and len(said) == 1


# -----------------------------------------------------------------------------
# Names, and whose files they are
# -----------------------------------------------------------------------------


def test_names_mirror_folders_and_are_unique(tmp_path):
    kinds = ["a.png", "A.bmp", "a.v2.png", "holiday/a.png", "holiday/.b.png", ".cache/c.png"]
    for name in (*kinds, "notes.txt", "film.mov", "x.TXT"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(scene()).save(tmp_path / name, "PNG")
    found, said = read([tmp_path / "holiday" / "a.png", tmp_path, "samples"])
    assert [p.name for p in found[:5]] == ["a", "A_2", "a_3", "a.v2", "holiday/a"] and len(found) == 10
    assert said == ["3 other files are not read: 2 .txt, 1 .mov"]


def test_our_results_are_not_read(tmp_path):
    pillow("a.png", scene())(tmp_path)
    ((picture,), _) = read(tmp_path)
    path = utils.write_picture(tmp_path / "deep" / "a_mmse.png", picture, picture.pixels, "me")
    for source in (tmp_path, [tmp_path / "a.png", path]):
        found, said = read(source)
        assert len(found) == 1 and len(said) == 1 and "1 results" in said[0]
    os.utime(path, (1, 1))  # somebody has touched it: now it is theirs
    assert len(read(tmp_path)[0]) == 2


def result(folder, picture, owner, value=0.5):
    """What denoise.py does: choose a name, write."""
    name = utils.free_name(folder, picture.name, ["_mmse.png", "_sde.png"], owner)
    utils.write_picture(folder / f"{name}_mmse.png", picture, np.full_like(picture.pixels, value), owner)
    return name


@pytest.mark.parametrize("process", ["this", "another"])
def test_only_its_own_results_are_overwritten(tmp_path, process):
    pillow("a.png", scene())(tmp_path)
    ((picture,), _), folder = read(tmp_path), tmp_path / "out"

    def name(owner):
        if process == "another":
            utils._results.cache_clear()
        return result(folder, picture, owner)

    assert [name(owner) for owner in ("a", "a", "b", "a", "b")] == ["a", "a", "a_2", "a", "a_2"]
    (folder / "a_sde.png").write_text("a stranger's")
    assert [name("a"), name("a"), name("b")] == ["a_3", "a_3", "a_2"]
    (folder / "a_3_mmse.png").write_text("changed by hand")
    assert name("a") == "a_4" and (folder / "a_3_mmse.png").read_text() == "changed by hand"
    assert {p.name for p in folder.glob("*.png")} == {f"a{end}.png" for end in ("_sde", "_mmse", "_2_mmse", "_3_mmse", "_4_mmse")}


@pytest.mark.parametrize("mode, text, name", [("w", "{", "a_2"), ("a", '["b.png", "m\n', "a")])
def test_a_damaged_list_of_results_loses_what_is_damaged_alone(tmp_path, mode, text, name):
    (picture,), _ = read(pillow("a.png", scene())(tmp_path))
    result(tmp_path / "out", picture, "me")
    with open(tmp_path / "out" / utils.RESULTS, mode) as file:
        file.write(text)
    utils._results.cache_clear()
    assert result(tmp_path / "out", picture, "me") == name


def test_a_write_that_fails_leaves_nothing(tmp_path):
    (picture,), _ = read(npy(FLOAT)(tmp_path))
    with mock.patch.object(np, "save", side_effect=OSError), pytest.raises(OSError):
        utils.write_picture(tmp_path / "out" / "a.npy", picture, picture.pixels, "me")
    with pytest.raises((ValueError, OSError)):
        utils.write_picture(tmp_path / "out" / "a.xyz", picture, picture.pixels, "me")
    assert not list((tmp_path / "out").iterdir())


def test_another_suffix_is_another_format(tmp_path):
    (picture,), _ = read(npy(FLOAT)(tmp_path))
    for suffix, tolerance in ((".png", 0.51 / 65535), (".bmp", 0.51 / 255), (".jpg", 0.1), (".webp", 0.3), (".tif", 0)):
        utils.write_picture(tmp_path / f"b{suffix}", picture, picture.pixels, "me").rename(tmp_path / f"c{suffix}")
        ((again,), _) = read(tmp_path / f"c{suffix}")
        assert np.abs(again.pixels - picture.pixels).max() <= tolerance + 1e-7
    for name in ("b.jpg", "b.ppm", "b.bmp"):
        with pytest.raises(ValueError, match="alpha of 'a'.*png"):
            utils.check_suffix(name, read(npy(alpha())(tmp_path))[0][0])
    (truths,), _ = read(npy(grey() > 128)(tmp_path))
    path = utils.write_picture(tmp_path / "b.tif", truths, truths.pixels, "me")
    assert np.array_equal(stored(path), 255 * np.uint8(grey() > 128))
    assert np.array_equal(np.load(utils.write_picture(tmp_path / "b.NPY", truths, truths.pixels, "me")), grey() > 128)
    (deep,), _ = read(png16(alpha(3, np.uint16))(tmp_path))
    utils.write_picture(tmp_path / "b.webp", deep, deep.pixels, "me")
    assert np.abs(np.asarray(Image.open(tmp_path / "b.webp"))[..., 3] - deep.alpha / 257).max() < 0.51


# -----------------------------------------------------------------------------
# Built-in pictures and training
# -----------------------------------------------------------------------------


def test_deep_png_is_as_the_specification_says(tmp_path):
    utils._write_png16(tmp_path / "a.png", DEEP[:, :, 0], {"icc_profile": PROFILE})
    with Image.open(tmp_path / "a.png") as image:
        image.verify()  # every checksum
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(image, DEEP[:, :, 0]) and image.info["icc_profile"] == PROFILE

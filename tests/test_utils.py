"""Options, images in and out, metrics and safe files."""

import functools
import hashlib
import http.server
import pickle
import signal
import tarfile
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

import utils


def gradient(height, width, channels=3):
    """A uint8 image in which every pixel is different from its neighbours."""
    return (np.arange(height * width * channels) * 7 % 256).astype(np.uint8).reshape(height, width, channels)


# -----------------------------------------------------------------------------
# Options
# -----------------------------------------------------------------------------

SCRIPT = '''"""What it does."""
BATCH_SIZE = 64  # images per step
LR = 1e-3  # learning rate, 100 % of it
FLIP = True  # flip images
WIDTHS = (32, 64)  # channels
SIGMA = None  # noise level
NAME = "score"  # of the files
lower = 1
'''


@pytest.fixture
def constants(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    constants = {"__file__": str(path), "__doc__": "What it does."}
    exec(SCRIPT, constants)
    return constants


def test_without_options_the_constants_stay(constants):
    before = dict(constants)
    for arguments in ([], ["--sigma", "none"]):
        utils.set_options(constants, arguments)
        assert constants == before
    expected = {"batch_size": 64, "lr": 1e-3, "flip": True, "widths": (32, 64), "sigma": None, "name": "score"}
    assert utils.options(constants) == expected


def test_options_set_the_constants_in_their_types(constants):
    line = "--batch-size 8 --lr 2e-4 --no-flip --widths 16 32 48 --sigma 0.1 --name mine"
    utils.set_options(constants, line.split())
    expected = {"batch_size": 8, "lr": 2e-4, "flip": False, "widths": (16, 32, 48), "sigma": 0.1, "name": "mine"}
    assert utils.options(constants) == expected and constants["lower"] == 1


def test_help_lists_every_constant_with_its_comment(constants, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "130")
    with pytest.raises(SystemExit) as stop:
        utils.set_options(constants, ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for part in ("--batch-size", "images per step [64]", "100 % of it", "--no-flip", "[32 64]", "--sigma", "What it does."):
        assert part in text


@pytest.mark.parametrize("line", ["--batch 8", "--batch-size x", "--batch-size 1.5", "--unknown 1", "--sigma big", "--lower 2"])
def test_a_wrong_option_is_one_line_and_code_two(constants, capsys, line):
    with pytest.raises(SystemExit) as stop:
        utils.set_options(constants, line.split())
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


# -----------------------------------------------------------------------------
# Images
# -----------------------------------------------------------------------------


def test_the_samples_come_without_a_network():
    names, images = zip(*utils.read_images("samples"))
    assert names == utils.SAMPLES and all(x.shape == (128, 128, 3) and 0 <= x.min() < x.max() <= 1 for x in images)
    patches = utils.read_patches("samples")
    assert patches.dtype == torch.uint8 and patches.shape[1:] == (3, 32, 32) and len(patches) > 1000


def test_patches_tile_the_image(tmp_path):
    image = gradient(70, 100)
    Image.fromarray(image).save(tmp_path / "a.png")
    np.save(tmp_path / "b.npy", np.stack([gradient(32, 32)] * 3))
    np.save(tmp_path / "c.npy", np.full((32, 32), 0.5))
    patches = utils.read_patches(tmp_path).permute(0, 2, 3, 1).numpy()
    assert len(patches) == 2 * 3 + 3 + 1 and patches.dtype == np.uint8
    for k in range(6):
        row, column = divmod(k, 3)
        assert np.array_equal(patches[k], image[32 * row : 32 * row + 32, 32 * column : 32 * column + 32])
    assert np.array_equal(patches[6], gradient(32, 32)) and (patches[9] == 128).all()
    np.save(tmp_path / "d.npy", np.zeros((31, 40), np.uint8))
    with pytest.raises(ValueError, match="d.npy.*40 x 31"):
        utils.read_patches(tmp_path)


@pytest.fixture
def cifar_archive(tmp_path, monkeypatch):
    """Serve a stand-in for CIFAR-10's archive, of 3 images a batch, where torchvision looks for it; yield its arrays."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "remote" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    arrays, lists = {}, {}
    for name in [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch", "batches.meta"]:
        arrays[name] = np.random.default_rng(len(arrays)).integers(0, 256, (3, 3072), dtype=np.uint8)
        content = {"label_names": ["a"]} if name == "batches.meta" else {"data": arrays[name], "labels": [0, 0, 0]}
        (folder / name).write_bytes(pickle.dumps(content))
        lists[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    archive = tmp_path / "remote" / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=archive.parent)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "train_list", [[f"data_batch_{k}", lists[f"data_batch_{k}"]] for k in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", lists["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": lists["batches.meta"]})
    yield arrays
    server.shutdown()
    server.server_close()


def test_cifar10_is_downloaded_once_and_read_in_its_order(cifar_archive, tmp_path, monkeypatch):
    data_dir = str(tmp_path / "data")
    expected = np.concatenate([cifar_archive[f"data_batch_{k}"] for k in range(1, 6)]).reshape(-1, 3, 32, 32)
    assert np.array_equal(utils.read_patches("cifar10", data_dir).numpy(), expected)
    monkeypatch.setattr(CIFAR10, "url", "file:///nowhere/cifar-10-python.tar.gz")  # the second time nothing is downloaded
    test = cifar_archive["test_batch"].reshape(-1, 3, 32, 32)
    assert np.array_equal(utils.read_patches("cifar10", data_dir, train=False).numpy(), test)
    names, images = zip(*utils.read_images("cifar10", data_dir))
    assert names[2] == "cifar10_00002"
    np.testing.assert_allclose(images[2], test[2].transpose(1, 2, 0) / 255, atol=1e-6)


# -----------------------------------------------------------------------------
# Noise and metrics
# -----------------------------------------------------------------------------


def test_the_noise_is_one_stream_neither_clipped_nor_rounded():
    images = [np.full((32, 32, 3), 0.5, np.float32)] * 4
    noise = np.random.default_rng(3).standard_normal((4, 32, 32, 3))
    noisy = utils.add_noise(images, 0.4, seed=3)
    np.testing.assert_allclose(noisy, 0.5 + 0.4 * noise, atol=1e-6)
    assert np.array_equal(utils.add_noise(images[:2], 0.4, seed=3), noisy[:2])
    assert np.min(noisy) < 0 and np.max(noisy) > 1


def test_psnr_of_a_known_error():
    x0 = torch.full((2, 3, 8, 8), 0.5)
    images = torch.stack([x0[0] + 0.1, x0[1] + 7])  # the second is clipped to 1
    torch.testing.assert_close(utils.psnr(images, x0), torch.tensor([20, -10 * np.log10(0.25)]).double(), rtol=1e-6, atol=0)
    assert utils.psnr(x0, x0).tolist() == [float("inf")] * 2


def test_ssim_is_the_formula_of_its_authors():
    # Wang et al. 2004, eq. 13: Gaussian weights of 1.5 pixels in windows of 11 x 11, K1 = 0.01, K2 = 0.03; a mean over channels.
    x, y = torch.rand(2, 3, 20, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    g = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = (g[:, None] * g / g.sum() ** 2)[None, None]
    mean = lambda a: torch.nn.functional.conv2d(a[:, None], window)  # noqa: E731
    covariance = lambda a, b: mean(a * b) - mean(a) * mean(b)  # noqa: E731
    parts = (2 * mean(x) * mean(y) + 0.01**2) * (2 * covariance(x, y) + 0.03**2)
    parts /= (mean(x) ** 2 + mean(y) ** 2 + 0.01**2) * (covariance(x, x) + covariance(y, y) + 0.03**2)
    assert abs(utils.ssim(x[None], y[None])[0] - parts.mean().item()) < 1e-6
    assert np.isnan(utils.ssim(x[None, :, :8, :8], y[None, :, :8, :8])).all()


# -----------------------------------------------------------------------------
# Tables and films
# -----------------------------------------------------------------------------


def test_a_table_is_aligned_markdown():
    rows = [{"name": "a", "PSNR dB": 1.234}, {"name": "long", "PSNR dB": 20.0, "calls": 3}]
    assert utils.table(rows).splitlines() == [
        "| name | PSNR dB | calls |",
        "| ---- | ------: | ----: |",
        "| a    |    1.23 |       |",
        "| long |   20.00 |     3 |",
    ]
    (mean,) = utils.means([{"m": "x", "v": 1, "n": 2, "who": "a"}, {"m": "x", "v": 2, "n": 2, "who": "b"}], "m", "who")
    assert mean == {"m": "x", "v": 1.5, "n": 2, "who": "mean of 2"}


def test_a_film_keeps_question_and_answer():
    film = utils.Film(lambda x, sigma: x * sigma, count=1, size=4)
    x = torch.arange(2 * 3 * 6 * 8.0).view(2, 3, 6, 8)
    assert torch.equal(film(film(x, 0.5), torch.tensor(0.25)), x / 8)
    (_, *first), (sigma, *second) = film.frames
    middle = x[:1, :, 1:5, 2:6]
    assert film.calls == 2 and sigma == 0.25
    assert all(torch.equal(a, b) for a, b in zip(first + second, (middle, middle / 2, middle / 2, middle / 8)))


@pytest.mark.parametrize("side", [64, 150])  # the second would leave tiles of 86 pixels, off the grid
@pytest.mark.parametrize("size", [(100, 131), (64, 64), (200, 170)])
def test_tiles_cover_the_picture_once(size, side):
    x, bar = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)), types.SimpleNamespace(n=0)
    bar.update = lambda n: setattr(bar, "n", bar.n + n)
    # A mean over the neighbours, and windows of 32 pixels that a tile must not cut.
    corner = lambda x: x[..., ::32, ::32].repeat_interleave(32, 2).repeat_interleave(32, 3)[..., : x.shape[2], : x.shape[3]]  # noqa: E731
    denoiser = lambda x, sigma: sigma * torch.nn.functional.avg_pool2d(x, 5, 1, 2) + corner(x)  # noqa: E731
    whole = denoiser(x, 0.5)
    inside = utils.tiled(denoiser, side**2, bar, halo=32)(x, 0.5)
    torch.testing.assert_close(inside, whole)
    assert bar.n == 2 * utils.pixels_seen(*size, side**2, halo=32) >= 2 * size[0] * size[1]


# -----------------------------------------------------------------------------
# Files
# -----------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="kept.txt"), utils.replacing(path) as temporary:
        Path(temporary).write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with utils.replacing(path) as temporary:
        Path(temporary).write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o666 & ~utils.UMASK  # others may read it, as all that is written


def test_a_saved_image_is_clipped_and_rounded_once(tmp_path):
    image = gradient(5, 7) / 255
    image[0, 0] = (-0.5, 1.5, 0.5)
    utils.save_image(tmp_path / "image.png", torch.from_numpy(image).permute(2, 0, 1))
    saved = np.asarray(Image.open(tmp_path / "image.png"))
    assert saved[0, 0].tolist() == [0, 255, 128]
    assert np.array_equal(saved[1:], gradient(5, 7)[1:])


def test_one_process_at_a_time_writes_a_name(tmp_path):
    path = tmp_path / "folder" / "net.pt"
    with utils.only_process(path):
        with pytest.raises(ValueError, match="another process"), utils.only_process(path):
            pass
        (path.parent / ".net_12345678.pt").touch()
        (path.parent / ".net_resume_12345678.pt").touch()
    with utils.only_process(path):
        assert {p.name for p in path.parent.iterdir()} == {".net.lock", ".net_resume_12345678.pt"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_is_noted_and_nothing_is_cut(number):
    before = signal.getsignal(number)
    with utils.stop_signals() as stop:
        signal.raise_signal(number)
        assert stop == [number]
    assert signal.getsignal(number) is before

"""Options, metrics, what wraps a denoiser, safe files, tables and figures."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch.nn.functional import avg_pool2d, conv2d
from torchvision import datasets

import utils


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -----------------------------------------------------------------------------
# Options and devices
# -----------------------------------------------------------------------------

SCRIPT = '''"""What it does."""
BATCH_SIZE = 64  # images per step
LR = 1e-3  # learning rate, 100 % of it
FLIP = True  # flip images
WIDTHS = (32, 64)  # channels
NOISE = (0.1, 0.5)  # levels
SIGMA = None  # noise level
NAME = "score"  # of the files
NAMES = ("x",)  # of others
lower = 1
'''


@pytest.fixture
def constants(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    found = {"__file__": str(path)}
    exec(SCRIPT, found)
    return found


@pytest.mark.parametrize(
    "line, changes",
    [
        ("--sigma None", {}),
        ("--batch-size 8 --name mine", {"BATCH_SIZE": 8, "NAME": "mine"}),
        ("--lr 2e-4 --no-flip", {"LR": 2e-4, "FLIP": False}),
        ("--widths 16 32 48", {"WIDTHS": (16, 32, 48)}),
        ("--noise 25/255 2", {"NOISE": (25 / 255, 2.0)}),
        ("--sigma 25/255", {"SIGMA": 25 / 255}),
        ("--sigma 3 --names c", {"SIGMA": 3, "NAMES": ("c",)}),
        ("a --lr 1 b", {"LR": 1.0, "NAMES": ("a", "b")}),
    ],
)
def test_an_option_sets_its_constant_in_its_type(line, changes, constants):
    expected = constants | changes
    utils.set_options(constants, line.split(), positional="NAMES")
    assert constants == expected
    assert all(type(constants[name]) is type(value) for name, value in changes.items())


def test_help_lists_every_constant_with_its_comment(constants, capsys):
    with pytest.raises(SystemExit):
        utils.set_options(constants, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in ("What it does.", "images per step [64]", "100 % of it [0.001]", "--no-flip"):
        assert part in text


@pytest.mark.parametrize(
    "line",
    ["--batch 8", "--batch-size 1.5", "--lower 2", "--sigma 1/0", "--lr none", "stray"],
)
def test_a_wrong_option_is_one_line_and_code_two(line, constants, capsys):
    with pytest.raises(SystemExit) as stop:
        utils.set_options(constants, line.split())
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "error, code, line",
    [
        (ValueError("--sigma must be\npositive"), 2, "script.py: error: --sigma must be positive"),
        (OSError(13, "Permission denied"), 2, "script.py: error: [Errno 13] Permission denied"),
        (torch.OutOfMemoryError("of 2 GiB"), 2, "script.py: error: out of memory: use smaller im"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes(error, code, line, constants, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", "--batch-size", "5"])

    def main():
        assert constants["BATCH_SIZE"] == 5
        raise error

    with pytest.raises(SystemExit) as stop:
        utils.run_script(main, constants)
    err = capsys.readouterr().err
    assert stop.value.code == code
    assert err.startswith(line) and len(err.splitlines()) == bool(line)


def test_a_device_that_cannot_be_used_is_refused(monkeypatch):
    assert utils.pick_device("cpu") == torch.device("cpu")
    for name in ("tpu", "meta", "cuda:99", ""):
        with pytest.raises(ValueError, match=f"device '{name}' cannot be used"):
            utils.pick_device(name)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: torch.empty(0))
    for available, expected in ((False, "cpu"), (True, "cuda:3")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert utils.pick_device("auto") == torch.device(expected)


def test_bfloat16_is_used_where_the_hardware_has_it_or_when_asked(monkeypatch):
    cpu = torch.device("cpu")
    assert utils.pick_bfloat16("bfloat16", cpu) and not utils.pick_bfloat16("float32", cpu)
    for has in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        assert utils.pick_bfloat16("auto", cpu) == has
    with pytest.raises(ValueError, match="--precision must be auto, bfloat16 or float32, not half"):
        utils.pick_bfloat16("half", cpu)


# -----------------------------------------------------------------------------
# Built-in images and images to train on
# -----------------------------------------------------------------------------


def test_the_samples_are_photographs_of_128_pixels():
    images = list(utils.read_images("samples"))
    assert tuple(image.name for image in images) == utils.SAMPLES
    for image in images:
        assert image.builtin and image.pixels.shape == (1, 128, 128, 3)
        assert 0 <= image.pixels.min() < 0.2 < 0.7 < image.pixels.max() <= 1
    assert min(image.shape[0] for image in utils.training_images("samples")) >= 300


def test_small_and_broken_images_are_left_out_of_a_training_and_named(tmp_path):
    rgb, frames = utils.to_array(uniform(3, 40, 50)), uniform(2, 32, 33, 3).numpy()
    Image.fromarray(rgb).save(tmp_path / "a.png")
    Image.fromarray(rgb[:31]).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"broken")
    np.save(tmp_path / "d.npy", frames)
    np.save(tmp_path / "e.npy", np.full((32, 32), 0.5001))
    told = []
    found = utils.training_images(tmp_path, notify=told.append)
    assert [image.shape for image in found] == [(40, 50, 3), *[(32, 33, 3)] * 2, (32, 32, 3)]
    assert np.array_equal(found[0], rgb) and found[0].dtype == np.uint8
    assert np.array_equal(found[2], np.rint(frames[1] * 255)) and (found[3] == 128).all()
    assert "c.png' cannot be read" in told[0] and "1 of 5 files cannot be read" in told[1]
    assert told[2:] == ["1 images are smaller than 32 x 32 pixels and left out: b"]
    with pytest.raises(ValueError, match="no image of .*b.png' has 32 x 32 pixels"):
        utils.training_images(tmp_path / "b.png", notify=told.append)


def test_cifar10_is_read_in_its_order_from_the_folder_data(monkeypatch):
    arrays = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32, 3), dtype=np.uint8)

    def downloaded(folder, train, download):
        assert folder == "data" and download
        return SimpleNamespace(data=arrays[int(train)])

    monkeypatch.setattr(datasets, "CIFAR10", downloaded)
    assert np.array_equal(utils.training_images("cifar10"), arrays[1])
    assert np.array_equal(utils.training_images("cifar10", train=False), arrays[0])
    images = list(utils.read_images("cifar10"))
    assert [image.name for image in images] == [f"cifar10_{k:05d}" for k in range(3)]
    for image, x in zip(images, arrays[0]):
        assert image.builtin and np.allclose(image.pixels[0], x / 255, atol=1e-6)


def test_cifar10_that_cannot_be_had_is_one_line(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.CIFAR10, "url", "file:///nowhere/cifar-10-python.tar.gz")
    with pytest.raises(OSError, match="neither in 'data' nor could it be downloaded"):
        utils.training_images("cifar10")


# -----------------------------------------------------------------------------
# Metrics and tables
# -----------------------------------------------------------------------------


def test_psnr_of_a_known_error():
    x0 = torch.full((2, 3, 8, 8), 0.5)
    images = torch.stack([x0[0] + 0.1, x0[1] + 7])  # the second is clipped to 1
    expected = torch.tensor([20, -10 * np.log10(0.25)]).double()
    torch.testing.assert_close(utils.psnr(images, x0), expected, rtol=1e-6, atol=0)
    assert utils.psnr(x0, x0).tolist() == [float("inf")] * 2


def test_ssim_is_the_formula_of_its_authors():
    # Wang et al. 2004, eq. 13: Gaussian weights of 1.5 pixels in windows of 11 x 11, K1 = 0.01,
    # K2 = 0.03, and the mean over the channels.
    x, y = uniform(2, 3, 20, 17)
    g = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = (g[:, None] * g / g.sum() ** 2)[None, None]

    def mean(a):
        return conv2d(a[:, None], window)

    def covariance(a, b):
        return mean(a * b) - mean(a) * mean(b)

    parts = (2 * mean(x) * mean(y) + 0.01**2) * (2 * covariance(x, y) + 0.03**2)
    parts /= mean(x) ** 2 + mean(y) ** 2 + 0.01**2
    parts /= covariance(x, x) + covariance(y, y) + 0.03**2
    found = utils.ssim(torch.stack([y, x]), torch.stack([x, x]))
    np.testing.assert_allclose(found, [parts.mean().item(), 1], atol=1e-6)


def test_a_table_is_aligned_markdown_with_the_digits_of_each_column():
    rows = [
        {"name": "a", "sigma": 0.05, "PSNR dB": 1.235, "SSIM": 0.5},
        {"name": "long", "PSNR dB": 20.0, "expected PSNR": "", "calls": 3, "seconds": 0.128},
    ]
    assert utils.table(rows).splitlines() == [
        "| name |  sigma | PSNR dB |  SSIM | expected PSNR | calls | seconds |",
        "| ---- | -----: | ------: | ----: | ------------- | ----: | ------: |",
        "| a    | 0.0500 |    1.24 | 0.500 |               |       |         |",
        "| long |        |   20.00 |       |               |     3 |    0.13 |",
    ]


def test_means_are_of_the_rows_of_one_kind():
    rows = [
        {"who": "a", "m": "x", "v": 1, "note": "p"},
        {"who": "b", "m": "y", "v": 9.0, "note": "p"},
        {"who": "c", "m": "x", "v": 2, "note": "q"},
    ]
    assert utils.means(rows, "m", "who") == [
        {"who": "mean of 2", "m": "x", "v": 1.5},
        {"who": "mean of 1", "m": "y", "v": 9.0, "note": "p"},
    ]


# -----------------------------------------------------------------------------
# Around a denoiser
# -----------------------------------------------------------------------------


def local(x, sigma):
    """A denoiser that sees 4 pixels around each, and where in windows of 32 pixels it stands."""
    sigma = torch.as_tensor(sigma).reshape(-1, 1, 1, 1)
    corner = x[..., ::32, ::32].repeat_interleave(32, 2).repeat_interleave(32, 3)
    return sigma * avg_pool2d(x, 9, 1, 4) ** 2 + corner[..., : x.shape[2], : x.shape[3]]


@pytest.mark.parametrize("side", [64, 150])  # the second would leave tiles of 86, off the grid
@pytest.mark.parametrize("size", [(200, 170), (64, 64), (200, 40)])
def test_tiles_give_the_image_whole_and_its_gradient(size, side):
    x, v, moves, seen = uniform(2, 3, *size), uniform(2, 3, *size, seed=1), [], []

    def denoiser(x, sigma):
        seen.append(x.shape)
        return local(x, sigma)

    tiled = utils.tiled(denoiser, side**2, halo=32, update=moves.append)
    for sigma in (0.5, torch.tensor([0.2, 0.7]).view(2, 1, 1, 1)):
        torch.testing.assert_close(tiled(x, sigma), local(x, sigma), rtol=1e-12, atol=1e-12)
    assert abs(sum(moves) - 2) < 1e-9  # one a call
    assert all(height * width <= 128**2 for _, _, height, width in seen)
    assert (len(seen) > 4) == (size[0] * size[1] > side**2)  # else one or two for two calls
    gradients = []
    for one in (local, tiled):
        point = x.clone().requires_grad_()
        gradients += torch.autograd.grad((one(point, 0.5) * v).sum(), point)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_noise_of_an_image_depends_on_its_own_seed_alone():
    x = torch.zeros(3, 1, 20, 20)
    first, again = utils.seeded_noise([5, 6, 5]), utils.seeded_noise([6])
    z = first(x)
    assert torch.equal(z[0], z[2]) and not torch.equal(z[0], z[1])
    assert torch.equal(z[1:2], again(x[:1])) and not torch.equal(first(x), z)
    assert abs(z[:2].std() - 1) < 4 / (2 * 800) ** 0.5
    with pytest.raises(ValueError):
        first(x[:2])


def test_a_recorder_counts_calls_and_keeps_states_and_estimates():
    recorder = utils.Recorder(lambda x, sigma: x * sigma, count=1, size=4)
    x = torch.arange(2 * 3 * 6 * 8.0).view(2, 3, 6, 8)
    assert torch.equal(recorder(recorder(x, 0.5), torch.tensor(0.25)), x / 8)
    (level, *first), (sigma, *second) = recorder.frames
    middle = x[:1, :, 1:5, 2:6]
    expected = (middle, middle / 2, middle / 2, middle / 8)
    assert recorder.calls == 2 and (level, sigma) == (0.5, 0.25)
    assert all(torch.equal(a, b) for a, b in zip(first + second, expected, strict=True))


# -----------------------------------------------------------------------------
# Files
# -----------------------------------------------------------------------------


def write_file(path, text):
    path.write_text(text)


def write_folder(path, text):
    path.mkdir()
    (path / "a").write_text(text)


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_a_write_that_fails_leaves_what_was_there(write, tmp_path):
    path = tmp_path / "kept"
    write(path, "old")

    def found():
        assert list(tmp_path.iterdir()) == [path]
        return (path / "a" if path.is_dir() else path).read_text()

    refusal = pytest.raises(OSError, match="kept' cannot be written .*full")
    with refusal, utils.replacing(path) as temporary:
        write(temporary, "half")
        raise RuntimeError("disk full")
    assert found() == "old"
    with pytest.raises(KeyboardInterrupt), utils.replacing(path) as temporary:
        write(temporary, "half")
        raise KeyboardInterrupt
    assert found() == "old"
    (tmp_path / ".part_kept").mkdir()  # left over by a run that was killed
    with utils.replacing(path) as temporary:
        write(temporary, "new")
    assert found() == "new"


def test_one_process_at_a_time_writes_a_name(tmp_path):
    path = tmp_path / "folder" / "net.pt"
    other = "import sys, pathlib, utils\nwith utils.locked(pathlib.Path(sys.argv[1])):\n    pass"
    command = [sys.executable, "-c", other, str(path)]
    root = Path(utils.__file__).parent
    with utils.locked(path, tmp_path / "figures" / "b.png"):
        process = subprocess.run(command, cwd=root, capture_output=True, text=True)
        assert f"another process is writing '{path}'" in process.stderr
        assert (tmp_path / "figures").is_dir()
    with utils.locked(path):
        assert {found.name for found in path.parent.iterdir()} <= {".net.lock"}


def test_a_saved_png_is_clipped_and_rounded(tmp_path):
    image = torch.tensor([-0.5, 0.2, 0.5, 1.5]).expand(3, 2, 4) * torch.tensor([1, 2]).view(2, 1)
    utils.save_png(tmp_path / "image.png", image)
    saved = np.asarray(Image.open(tmp_path / "image.png"))
    expected = np.array([[0, 51, 128, 255], [0, 102, 255, 255]])
    assert np.array_equal(saved, expected[..., None].repeat(3, 2))
    utils.save_png(tmp_path / "grey.png", image[:1])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grey.png")), saved)


# -----------------------------------------------------------------------------
# Figures: what is in them
# -----------------------------------------------------------------------------


@pytest.fixture
def figure(monkeypatch):
    """Keep what is saved as a figure: figure.axes are its axes, in order."""
    kept = SimpleNamespace(axes=[])
    real = Figure.savefig

    def savefig(self, *arguments, **options):
        kept.axes = self.axes
        real(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return kept


def test_images_stand_in_order_with_their_psnr_and_their_middle_below(figure, tmp_path):
    x0 = uniform(3, 80, 100)
    rows = [[("noisy", x0 * 0.5, "s"), ("half", x0 * 0.9, ""), ("clean", x0, "")]]
    rows.append([("other", uniform(1, 30, 30), "t"), ("and", uniform(1, 30, 30, seed=1), "")])
    utils.plot_images(tmp_path / "a.png", rows, truth=True, detail=40)
    grid = np.reshape(figure.axes, (3, 3))  # two images; the middle of the first stands below it
    for axes, below, (title, image, _) in zip(grid[0], grid[1], rows[0]):
        assert axes.get_title() == title
        assert np.array_equal(axes.images[0].get_array(), utils.to_array(image))
        middle = utils.to_array(image[:, 20:60, 30:70])
        assert np.array_equal(below.images[0].get_array(), middle)

    def quality(image, truth):
        return f"{utils.psnr(image[None], truth[None]).item():.2f} dB"

    middle = x0[:, 20:60, 30:70]
    assert grid[0, 0].get_xlabel() == f"s, {quality(x0 * 0.5, x0)}"
    assert grid[0, 2].get_xlabel() == ""
    assert grid[1, 1].get_xlabel() == quality(middle * 0.9, middle)
    assert grid[2, 0].get_xlabel() == f"t, {quality(rows[1][0][1], rows[1][1][1])}"


def test_a_training_is_plotted_over_millions_of_images(figure, tmp_path):
    losses = [[1e6, 2.0], [2e6, 1.5], [3e6, 1.2]]
    psnrs = [[1.5e6, {0.1: 28.0, 0.5: 20.0}], [3e6, {0.1: 28.5, 0.5: 20.25}]]
    utils.plot_training(tmp_path / "a.png", losses, psnrs)
    left, right = figure.axes
    assert left.lines[0].get_xydata().tolist() == [[1, 2.0], [2, 1.5], [3, 1.2]]
    curves = [line.get_xydata().tolist() for line in right.lines]
    assert curves == [[[1.5, -0.5], [3, 0]], [[1.5, -0.25], [3, 0]]]
    assert "$\\sigma$ = 0.1, ends at 28.50 dB" in right.get_legend().get_texts()[0].get_text()
    utils.plot_training(tmp_path / "b.png", [], [])  # of a training that was stopped at once
    assert not (tmp_path / "b.png").exists()


def test_an_animation_runs_from_the_first_state_to_the_last(tmp_path):
    shades = torch.linspace(0, 1, 50)
    frames = [(1.0, s.expand(3, 80, 60), 1 - s.expand(3, 80, 60)) for s in shades]
    utils.save_animation(tmp_path / "a.gif", frames, most=10)
    with Image.open(tmp_path / "a.gif") as file:
        assert file.n_frames == 10 and file.size == (240, 160)
        for k, shade in enumerate(shades[np.linspace(0, 49, 10).round().astype(int)]):
            file.seek(k)
            page = np.asarray(file.convert("RGB")) / 255
            assert abs(page[:, :120].mean() - shade) < 0.02
            assert abs(page[:, 120:].mean() - (1 - shade)) < 0.02

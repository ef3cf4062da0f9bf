"""train_score.py: its loss, batches and optimisers against closed forms, and whole trainings."""

import contextlib
import copy
import functools
import io
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from gaussian import MU, white
from tqdm import tqdm

import train_score
import utils
from model import ScoreModel, load_checkpoint, load_model
from train_score import denoising_loss, learning_rate, make_batch, noise_law, random_crops

SCRIPT = Path(__file__).resolve().parent.parent / "train_score.py"
LINE = (  # of 40 images: 24 to train on, 12 steps
    "--widths 8 --blocks 1 --attention 0 --sigmas 0.01 1 --batch-size 4 --epochs 2 --crop 8 "
    "--val-images 16 --device cpu --precision float32"
)
SMALL = {"WIDTHS": (8,), "BLOCKS": (1,), "ATTENTION": (0,), "SIGMAS": (0.01, 1.0), "CROP": 8}
SMALL |= {"BATCH_SIZE": 4, "EPOCHS": 2, "VAL_IMAGES": 16, "DEVICE": "cpu", "PRECISION": "float32"}


def pixels(count, height, width, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def train(folder, **constants):
    """Run main() of train_score.py in a folder, with these constants; return what it printed."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    constants = mock.patch.multiple(train_score, **SMALL | constants)
    no_figure = mock.patch.object(utils, "plot_training")  # it takes longer than these trainings
    out = io.StringIO()
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(out), no_figure, constants:
            train_score.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return out.getvalue()


def stopped(folder, steps, number, **constants):
    """As `train`, but in the middle of that step, from 1, comes a signal, or a crash if None."""
    made = iter(range(1, steps + 1))

    def update(bar, images):
        if next(made) == steps:
            if number is None:
                raise RuntimeError("crash")
            signal.raise_signal(number)

    end = pytest.raises(RuntimeError) if number is None else pytest.raises(SystemExit, match="130")
    with mock.patch.object(tqdm, "update", update), end:
        train(folder, **constants)


@pytest.fixture
def run(run_script, monkeypatch):
    """Run train_score.py with these words, without figures; signals stay as they are."""
    monkeypatch.setattr(utils, "plot_training", mock.Mock())
    monkeypatch.setattr(train_score, "note_signals", list)
    return functools.partial(run_script, train_score)


def state_of(folder, name="score"):
    return load_checkpoint(Path(folder, "checkpoints", f"{name}_resume.pt"))


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def same_training(first, second):
    some = {"hours": 0, "hours_saved": 0, "options": 0}
    first, second = (kept | {"run": kept["run"] | some} for kept in (first, second))
    return equal(first, second)


def contents(folder):
    files = (path for path in Path(folder).rglob("*") if path.is_file() and path.suffix != ".lock")
    return {path: path.read_bytes() for path in files}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with 40 images to train on and 20 to test on."""
    folder = tmp_path_factory.mktemp("data")
    np.save(folder / "images.npy", pixels(40, 8, 8, seed=1))
    np.save(folder / "test.npy", pixels(20, 8, 8, seed=2))
    return folder


@pytest.fixture
def images(data):
    return str(data / "images.npy")


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """A folder in which a small network was trained, what was printed, and what is kept."""
    folder = tmp_path_factory.mktemp("trained")
    out = train(folder, DATA=str(data / "images.npy"), TEST=str(data / "test.npy"))
    return SimpleNamespace(folder=folder, out=out, state=state_of(folder))


# -----------------------------------------------------------------------------
# Loss and noise levels
# -----------------------------------------------------------------------------


def test_the_true_denoisers_loss_is_its_posterior_variance():
    # x0 ~ N(MU, c^2): E (D - x0)^2 = c^2 s^2 / (c^2 + s^2), over the typical error.
    c, rng = 0.1, torch.Generator().manual_seed(1)
    x0 = MU + c * torch.randn(64, 3, 32, 32, generator=rng)
    for s in (0.02, 0.1, 0.5):
        noise = torch.randn(x0.shape, generator=rng)
        loss = denoising_loss(white(c), x0, torch.full((64,), s), noise).item()
        expected = c**2 * s**2 / (c**2 + s**2) / train_score.typical_error(s)
        assert abs(loss / expected - 1) < 4 * (2 / x0.numel()) ** 0.5


def test_the_typical_error_is_that_of_the_shipped_network():
    levels = load_model("checkpoints/score_cifar10.pt").info["test_psnr"]
    assert set(levels) == {0.02, 0.05, 0.1, 0.2, 0.5}
    for s, psnr in levels.items():
        assert abs(10 * np.log10(train_score.typical_error(s)) + psnr) < 1.2  # dB


def test_noise_levels_are_log_uniform_in_three_parts():
    u = np.linspace(0, 1, 2001)
    sigma = noise_law(u, 0.005, 20.0, 0.1)
    assert abs(sigma[0] / 0.005 - 1) < 1e-9 and abs(sigma[-1] / 20 - 1) < 1e-9
    for low, high, share in ((0.0, 0.015, 0.1), (0.015, 0.7, 0.8), (0.7, 30.0, 0.1)):
        part = np.log(sigma[(sigma > low) & (sigma < high)])
        assert abs(len(part) / 2001 - share) < 2e-3 and np.diff(part).std() < 1e-9
    np.testing.assert_allclose(noise_law(u, 0.02, 0.5, 0.1), 0.02 * 25**u)
    np.testing.assert_allclose(noise_law(u, 0.1, 0.1, 0.1), 0.1)


def test_the_learning_rate_rises_holds_and_falls():
    # Over 10,000 steps: up during 500, down during the last 80 %.
    for step, share in ((0, 1 / 500), (249, 0.5), (499, 1), (2000, 1), (6000, 0.5), (9000, 0.125)):
        assert abs(learning_rate(step, 10_000, 4e-3, 0.8) / 4e-3 - share) < 1e-9
    # Of fewer steps, the rise takes a tenth.
    assert [learning_rate(step, 50, 1.0, 0.5) for step in range(6)] == [0.2, 0.4, 0.6, 0.8, 1, 1]
    assert learning_rate(0, 3, 1.0, 0.8) == 1
    assert {learning_rate(step, 50, 0.1, 0) for step in range(50)} == {0.1}


# -----------------------------------------------------------------------------
# Batches
# -----------------------------------------------------------------------------


@pytest.mark.parametrize("count, batch", [(10, 4), (3, 8)])
def test_batches_are_full_and_each_pass_shows_every_image_once(count, batch):
    streams = []
    for seed in (0, 1):
        steps = range(math.ceil(40 * count / batch))
        drawn = [train_score.images_of_step(count, step, batch, seed) for step in steps]
        assert {len(index) for index in drawn} == {batch}
        streams.append(np.concatenate(drawn)[: 40 * count].reshape(40, count))
    assert (np.sort(streams) == np.arange(count)).all()
    assert len(np.unique(streams[0], axis=0)) >= min(math.factorial(count), 30)
    assert (streams[0] != streams[1]).any()


def coordinates(sizes):
    """Images of these sizes, whose pixels say (image, row, column)."""
    images = []
    for k, (height, width) in enumerate(sizes):
        rows, columns = np.mgrid[:height, :width]
        images.append(np.stack([np.full_like(rows, k), rows, columns], axis=2).astype(np.uint8))
    return images


@pytest.mark.parametrize("views", [1, 2, 8])
def test_crops_are_windows_of_their_image_mirrored_and_turned(views):
    sizes = [(5, 5), (5, 9), (12, 6), (7, 7)]
    crops = random_crops(coordinates(sizes) * 100, 5, views, 1, np.random.default_rng(3))
    numbers, rows, columns = crops.unbind(1)
    assert (numbers == torch.arange(4).repeat(100)[:, None, None]).all()
    # Each crop is one of the eight views of its window, and all that may be are as frequent.
    rows, columns = rows - rows.amin((1, 2), True), columns - columns.amin((1, 2), True)
    window, seen = torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij"), {}
    for mirrored, quarters in product((0, 1), range(4)):
        view = [part.flip(1) if mirrored else part for part in window]
        view = [part.rot90(quarters) for part in view]
        same = (rows == view[0]).all((1, 2)) & (columns == view[1]).all((1, 2))
        seen[mirrored, quarters] = same.double().mean().item()
    assert sum(seen.values()) == 1
    kinds = {1: [(0, 0)], 2: [(0, 0), (1, 0)], 8: list(seen)}[views]
    four_errors = 4 * (1 / views * (1 - 1 / views) / 400) ** 0.5
    for kind, frequency in seen.items():
        assert abs(frequency - (kind in kinds) / views) <= four_errors


@pytest.mark.parametrize("shrink", [1, 2, 6])
def test_shrunk_crops_are_means_of_blocks_of_a_window(shrink):
    # Values are 2 i + 1, so the mean of a block of k is a whole number: twice its first i, plus k.
    (image,), size, count = coordinates([(40, 16)]), 5, 2000
    rng = np.random.default_rng(4)
    crops = random_crops([2 * image + 1] * count, size, 1, shrink, rng).long()
    factors = (crops[:, 1, 1, 0] - crops[:, 1, 0, 0]) // 2
    for axis, end in ((0, 40), (1, 16)):
        blocks = crops[:, 1 + axis].movedim(1 + axis, 2) - factors[:, None, None]
        first = blocks[:, :1, :1] // 2
        assert (blocks == 2 * (first + factors[:, None, None] * torch.arange(size))).all()
        starts = first[:, 0, 0]
        assert starts.min() == 0 and (starts + size * factors).max() == end
    lowest = 1 / (shrink + 1)
    for factor in range(2, 8):  # floor(1 / u) is at least that; u in [lowest, 1]
        share = (1 / factor - lowest) / (1 - lowest) if factor <= min(3, shrink) else 0.0
        found = (factors >= factor).double().mean().item()
        assert abs(found - share) <= 4 * (share * (1 - share) / count) ** 0.5


def test_shrunk_pixels_are_rounded():
    rows, columns = np.mgrid[:14, :14]
    image = np.stack([rows % 2 | columns % 2] * 3, 2).astype(np.uint8)  # a block means 0.75
    crops = random_crops([image] * 50, 5, 1, 3, np.random.default_rng(5))
    assert crops.amin((1, 2, 3)).unique().tolist() == [0, 1]  # as they are, and shrunk by 2


def batch(step=0, seed=0, size=8, **share):
    images = coordinates([(5, 5), (5, 9), (12, 6), (7, 7)])
    constants = {"BATCH_SIZE": size, "SEED": seed, "CROP": 5, "VIEWS": 8, "SHRINK": 1}
    with mock.patch.multiple(train_score, SIGMAS=(0.01, 1.0), TAILS=0.2, **constants):
        return make_batch(images, step, **share)


def test_a_batch_depends_on_seed_and_step_alone():
    first = batch(step=3, seed=7)
    torch.manual_seed(99)
    batch(step=4, seed=8)
    assert equal(first, batch(step=3, seed=7))
    for other in (batch(step=4, seed=7), batch(step=3, seed=8)):
        assert not any(torch.equal(a, b) for a, b in zip(first, other))
    for rank in (0, 1):  # of two processes
        assert equal([part[rank::2] for part in first], batch(3, 7, rank=rank, world=2))


def test_a_batch_has_one_noise_level_from_each_slice_and_unit_noise():
    for step in range(3):
        x0, sigma, noise = batch(step, size=64)
        edges = noise_law(np.arange(65) / 64, 0.01, 1.0, 0.2)
        found = sigma.double().numpy()
        assert (found >= edges[:-1] - 1e-7).all() and (found <= edges[1:] + 1e-7).all()
        four_errors = 4 * (2 / noise.numel()) ** 0.5
        assert noise.shape == x0.shape and abs(noise.square().mean() - 1) < four_errors
        assert x0.dtype == sigma.dtype == noise.dtype == torch.float32
        assert torch.equal(x0[:, 0].unique(), torch.arange(4) / 255)  # of 255 to [0, 1]


def test_muon_has_the_hidden_convolutions_and_adam_the_rest():
    model = ScoreModel("unet", 0.01, 1.0, (32, 32), (1, 1), (0, 1), 16)
    optimizers = train_score.make_optimizers(model, "muon", 0.1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    (adam,), (muon,) = optimizers["adam"].param_groups, optimizers["muon"].param_groups
    hidden = [names.pop(weight) for weight in muon["params"]]
    assert len(hidden) == 10
    assert all(re.search(r"(conv1|conv2|down\.0|up\.0|qkv|out)\.weight", name) for name in hidden)
    assert set(adam["params"]) == set(names) and len(adam["params"]) == len(names)
    assert adam["betas"] == (0.9, 0.95)  # a lone large gradient counts in both
    optimizers = train_score.make_optimizers(model, "adam", 0.1)
    (group,) = optimizers["adam"].param_groups
    assert len(group["params"]) == len(list(model.parameters())) and len(optimizers) == 1


@pytest.mark.parametrize("shape", [(8, 16, 3, 3), (64, 8, 2, 2)])
def test_muon_moves_a_convolution_as_torch_moves_its_matrix(shape):
    rng = torch.Generator().manual_seed(4)
    weight = torch.randn(shape, generator=rng).to(memory_format=torch.channels_last)
    weight, matrix = torch.nn.Parameter(weight), torch.nn.Parameter(weight.flatten(1))
    ours = train_score.Muon([weight], 1.0, torch.bfloat16)
    theirs = torch.optim.Muon([matrix], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    ours.param_groups[0]["lr"] = 0.01
    for _ in range(3):
        weight.grad = torch.randn(shape, generator=rng).to(memory_format=torch.channels_last)
        matrix.grad = weight.grad.flatten(1)
        ours.step()
        theirs.step()
    # They differ by roundings to bfloat16: 0.4 % of steps of some 0.01.
    torch.testing.assert_close(weight.flatten(1), matrix, rtol=0, atol=1e-4)


# -----------------------------------------------------------------------------
# A training
# -----------------------------------------------------------------------------


def test_a_training_is_its_recipe(tmp_path):
    # The same three steps by hand, with every number another than its default.
    images = [*pixels(6, 9, 7, seed=7), *pixels(6, 6, 6, seed=8), *pixels(3, 8, 8, seed=9)]
    numbers = {"EPOCHS": 1, "BATCH_SIZE": 4, "LR": 0.02, "DECAY": 0.5, "CLIP": 0.1, "EMA": 0.3}
    numbers |= {"SIGMAS": (0.02, 2.0), "TAILS": 0.1, "SEED": 5, "VAL_IMAGES": 3, "CROP": 6}
    numbers |= {"WIDTHS": (32, 32), "BLOCKS": (1, 1), "ATTENTION": (0, 1), "VIEWS": 8}
    with mock.patch.object(utils, "training_images", lambda source, **how: images):
        train(tmp_path, **numbers)

    torch.manual_seed(5)
    model = ScoreModel("unet", 0.02, 2.0, (32, 32), (1, 1), (0, 1))
    optimizers = train_score.make_optimizers(model, "muon", 1.0).values()
    averaged, losses = copy.deepcopy(model), []
    for step, (lr, decay) in enumerate(((0.02, 0.1), (0.02, 2 / 11), (0.02 * 2 / 3, 0.25))):
        with mock.patch.multiple(train_score, **numbers):
            loss = denoising_loss(model, *make_batch(images[:12], step))
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        for average, weight in zip(averaged.parameters(), model.parameters()):
            average.data = decay * average + (1 - decay) * weight.data
        losses.append(loss.item())

    state = state_of(tmp_path)
    assert equal(state["model"], dict(model.state_dict()))
    for name, average in averaged.state_dict().items():
        torch.testing.assert_close(state["average"][name], average)
    expected = [[4 * (k + 1), loss] for k, loss in enumerate(losses)]
    np.testing.assert_allclose(state["run"]["losses"], expected, rtol=1e-6)


def test_a_training_tells_its_story(trained):
    info = load_model(trained.folder / "checkpoints" / "score.pt").info
    assert info["training_images"] == 24 and info["images_seen"] == 48 and info["step"] == 12
    assert info["hardware"] == utils.hardware(torch.device("cpu")) and 0 < info["hours"] < 0.1
    assert info["options"]["lr"] == train_score.LR and info["options"]["sigmas"] == (0.01, 1.0)
    first, second, *_, validation, test, end = trained.out.splitlines()
    count = sum(weight.numel() for weight in trained.state["model"].values()) - 16  # frequencies
    assert first == f"unet, {count:,} parameters, on {info['hardware']}"
    assert second == "24 training images, 12 steps, from step 0"
    for line, kind, psnr in (
        (validation, "val", info["psnrs"][-1][1]),
        (test, "test", info["test_psnr"]),
    ):
        told = "  ".join(f"{value:.2f} dB at {sigma:g}" for sigma, value in psnr.items())
        assert line == f"step 12: {kind} PSNR  {told}"
    assert end.startswith("48 images seen")


def test_a_psnr_is_of_its_images_and_of_the_averaged_weights(trained, data):
    network = load_checkpoint(trained.folder / "checkpoints" / "score.pt")
    assert equal(network["weights"], trained.state["average"])
    model, run = ScoreModel(**network["config"]), trained.state["run"]
    images, tests = (np.load(data / f"{name}.npy") for name in ("images", "test"))
    for told, seen in ((run["psnrs"][-1][1], images[-16:]), (run["test_psnr"], tests)):
        assert list(told) == [0.02, 0.05, 0.1, 0.2, 0.5]
        seen = torch.from_numpy(seen).permute(0, 3, 1, 2)
        for kind, same in (("average", True), ("model", False)):
            model.load_state_dict(trained.state[kind])
            measured = train_score.validate(model, seen, 12)
            assert all((abs(told[s] - measured[s]) < 1e-6) == same for s in told)


def test_what_is_trained_on_and_measured_is_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, tests = pixels(9, 7, 8, seed=10), pixels(1003, 5, 6, seed=11)
    np.save("images.npy", images)
    np.save("tests.npy", tests)
    numbers = {"DATA": "images.npy", "TEST": "tests.npy", "VAL_IMAGES": 2, "CROP": 4}
    with mock.patch.multiple(train_score, **numbers):
        trained_on, val, test = train_score.read_data(0, "cpu")
    assert np.array_equal(trained_on, images[:7])
    assert np.array_equal(val.permute(0, 2, 3, 1), images[7:, 1:5, 2:6])
    assert np.array_equal(test.permute(0, 2, 3, 1), tests[:1000, :4, 1:5])


def test_validation_measures_the_noise_that_it_adds():
    identity = mock.Mock(side_effect=lambda x, sigma: x, sigma_min=0.03, sigma_max=0.15)
    images = torch.full((150, 3, 8, 8), 128, dtype=torch.uint8)
    z = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    found = train_score.validate(identity, images, 1)
    assert list(found) == [0.05, 0.1]  # of the usual levels
    for sigma, value in found.items():
        errors = (sigma * z).square().mean((1, 2, 3))
        assert abs(value - (-10 * errors.log10()).mean()) < 1e-3


def test_the_recipe_of_the_docstring_runs(tmp_path, images, run):
    command = re.search(r"train_score\.py (--network cnn3 (?:.*\\\n)?.*?)  +#", train_score.__doc__)
    line = command[1].replace("\\\n", " ") + f" --data {images} --epochs 2 --crop 8"
    _, err = run(line + " --val-images 16 --device cpu --batch-size 8")
    state = state_of(tmp_path, "cnn3")
    assert equal(state["model"], state["average"])  # no average
    assert list(state["run"]["psnrs"][-1][1]) == [0.1]  # the level that it was trained for
    assert state["adam"]["param_groups"][0]["lr"] == 1e-4  # not fallen at the end
    model = load_model(tmp_path / "checkpoints" / "cnn3.pt")
    assert model.config == {"network": "cnn3", "sigma_min": 0.1, "sigma_max": 0.1}
    assert err == ""  # the bar is for terminals


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_network_has_the_precision_and_compiler_asked_for(images, tmp_path, precision):
    kinds, sizes = set(), []

    def seen(module, inputs, out):
        kinds.update({out.dtype} if isinstance(module, torch.nn.Conv2d) else ())

    def compiled(model, **how):  # a stand-in, since torch.compile needs a compiler at hand
        return lambda *inputs: sizes.append(len(inputs[0])) or model(*inputs)

    hook = torch.nn.modules.module.register_module_forward_hook(seen)
    muon = mock.patch.object(train_score, "orthogonal", wraps=train_score.orthogonal)
    with hook, mock.patch("torch.compile", compiled), muon as orthogonal:
        train(tmp_path, DATA=images, EPOCHS=1, PRECISION=precision, COMPILE=True)
    assert kinds == {getattr(torch, precision)} and sizes == [4] * 6
    assert {call.args[0].dtype for call in orthogonal.call_args_list} == kinds


def test_cifar10_is_trained_on_without_libraries_for_images(tmp_path, images, monkeypatch):
    for library in ("OpenImageIO", "skimage"):
        monkeypatch.setitem(sys.modules, library, None)
    array = np.load(images)
    monkeypatch.setattr(utils, "_cifar10", lambda train: array if train else array[:7])
    out = train(tmp_path, DATA="cifar10", TEST="cifar10", EPOCHS=1)
    assert "24 training images" in out and "test PSNR" in out


# -----------------------------------------------------------------------------
# Going on
# -----------------------------------------------------------------------------


def test_a_training_saves_every_some_minutes(tmp_path, images):
    clock, saved = iter(range(0, 1000, 30)), []  # each step takes 30 seconds
    really = train_score.save

    def save(run, *rest):
        saved.append((run["step"], round(3600 * run["hours"])))
        really(run, *rest)

    time = mock.patch.object(train_score, "time", mock.Mock(perf_counter=clock.__next__))
    with mock.patch.object(train_score, "save", save), time:
        train(tmp_path, DATA=images, SAVE_MINUTES=1.25)
    assert saved == [(step, 30 * step) for step in (3, 6, 9, 12, 12)]


def test_a_training_that_stops_or_crashes_ends_the_same(trained, images, data, tmp_path):
    here = {"DATA": images, "TEST": str(data / "test.npy")}
    for steps, number in ((1, signal.SIGINT), (4, signal.SIGTERM), (2, signal.SIGINT)):
        stopped(tmp_path, steps, number, **here)
    state, path = state_of(tmp_path), tmp_path / "checkpoints" / "score_resume.pt"
    assert state["run"]["step"] == 7 and state["run"]["images_seen"] == 28
    assert state["run"]["test_psnr"] == {}  # measured at the end alone
    state["run"] |= {"hours": 5.0, "hours_saved": 5.0, "hardware": "a GPU"}
    utils.save_checkpoint(path, state)
    stopped(tmp_path, 4, None, SAVE_MINUTES=0, **here)  # as step 11 ends
    assert state_of(tmp_path)["run"]["step"] == 10
    train(tmp_path, **here)
    ended = state_of(tmp_path)
    assert same_training(ended, trained.state) and 5 < ended["run"]["hours"] < 5.1


def test_only_more_epochs_go_on_beyond_the_end(images, tmp_path):
    here = {"DATA": images, "EPOCHS": 1}
    train(tmp_path, **here)
    first, network = state_of(tmp_path), tmp_path / "checkpoints" / "score.pt"
    network.write_bytes(b"cut short")  # by a crash: it is written again
    assert "from step 6" in train(tmp_path, **here)
    assert same_training(state_of(tmp_path), first)
    assert load_model(network).info["images_seen"] == 24
    assert "12 steps, from step 6" in train(tmp_path, **here | {"EPOCHS": 2})
    assert load_model(network).info["images_seen"] == 48


def test_what_a_training_cannot_go_on_from_is_refused(images, data, tmp_path):
    here = {"DATA": images, "EPOCHS": 1}
    train(tmp_path, **here)
    before, resume = contents(tmp_path), tmp_path / "checkpoints" / "score_resume.pt"
    for other, words in (
        ({"WIDTHS": (16,)}, r"--widths was \(8,\) in .*score_resume.pt.*--name.*, not \(16,\)"),
        ({"BATCH_SIZE": 2}, "--batch-size was 4"),
        ({"DATA": str(data / "test.npy")}, "score_resume.pt' was trained on other images"),
    ):
        with pytest.raises(ValueError, match=words):
            train(tmp_path, **here | other)
    assert contents(tmp_path) == before
    utils.save_checkpoint(resume, {"model": {}})  # of another version
    with pytest.raises(ValueError, match="was None in .*score_resume.pt.*--name"):
        train(tmp_path, **here)
    resume.write_bytes(before[resume][:-100])
    with pytest.raises(ValueError, match="score_resume.pt.*damaged"):
        train(tmp_path, **here)
    resume.unlink()
    with pytest.raises(ValueError, match="score.pt' exists.*--name"):
        train(tmp_path, **here)


def test_a_training_starts_from_a_checkpoint(trained, images, tmp_path):
    first = trained.folder / "checkpoints" / "score.pt"
    here = {"DATA": images, "INIT": str(first), "EPOCHS": 1, "LR": 1e-9}
    train(tmp_path, **here)
    after = load_model(tmp_path / "checkpoints" / "score.pt")
    for name, weight in load_checkpoint(first)["weights"].items():
        torch.testing.assert_close(after.state_dict()[name], weight, rtol=0, atol=1e-6)
    assert after.info["images_seen"] == 24
    with pytest.raises(ValueError, match=r"--init '.*score.pt' is another network.*\(1,\)"):
        train(tmp_path, **here, BLOCKS=(2,), NAME="other")


def test_a_divergence_keeps_the_last_state(images, tmp_path):
    here = {"DATA": images, "NETWORK": "cnn3", "SIGMAS": (0.1,)}
    here |= {"OPTIMIZER": "adam", "DECAY": 0, "BATCH_SIZE": 24}
    train(tmp_path, **here, LR=1e-4, EPOCHS=1)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="the training diverged before step .*kept, lower --lr"):
        train(tmp_path, **here, LR=100.0, EPOCHS=50)
    assert contents(tmp_path) == before


def test_a_loss_or_weight_that_is_no_number_is_a_divergence():
    model, broken = ScoreModel("cnn3", 0.1, 0.1), ScoreModel("cnn3", 0.1, 0.1)
    broken.net.layers[0].bias.data[0] = math.inf
    for part, recent in ((model, [1e6]), (model, [1.0, math.nan]), (broken, [])):
        with pytest.raises(ValueError, match="diverged before step 30"):
            train_score.save({"step": 30, "recent": recent}, {"model": part}, *"abc")


def test_one_training_at_a_time_has_a_name(images, tmp_path):
    with (
        contextlib.chdir(tmp_path),
        utils.locked(*train_score.files_of("score")),
        pytest.raises(ValueError, match="another process.*score.pt"),
    ):
        train(tmp_path, DATA=images)


@pytest.mark.parametrize(
    "wrong, words",
    [
        ("--data nowhere", "nowhere"),
        ("--init nowhere.pt", "no checkpoint at 'nowhere.pt'"),
        ("--val-images 40", "--val-images must leave some of the 40 images"),
        ("--crop 33", "33 x 33"),
        ("--shrink 0", "--shrink must be at least 1, not 0"),
        ("--sigmas 0.1 0.2 0.3", "--sigmas must be"),
        ("--tails 0.7", "--tails must lie between 0 and 0.5, not 0.7"),
        ("--optimizer sgd", "--optimizer must be muon or adam, not sgd"),
        ("--batch-size 0", "--batch-size must be a positive multiple"),
        ("--name ../other", "--name must be up to 100 letters"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(images, tmp_path, run, wrong, words):
    _, err = run(f"--data {images} {LINE} {wrong}", code=2)
    assert err.startswith("train_score.py: error: ") and err.count("\n") == 1 and words in err
    assert not contents(tmp_path)


# -----------------------------------------------------------------------------
# More than one process
# -----------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
def test_two_processes_equal_one_and_a_signal_to_one_stops_both(images, tmp_path):
    # Adam, since the signs of Muon's small singular values tell roundings apart.
    torchrun = "-m torch.distributed.run --standalone --local-addr=127.0.0.1 --nproc-per-node=2"
    line = f"--data {images} {LINE} --optimizer adam --save-minutes 0 --epochs 20"
    command = [sys.executable, *torchrun.split(), str(SCRIPT), *shlex.split(line)]
    pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=tmp_path, **pipes)
    resume = tmp_path / "checkpoints" / "score_resume.pt"
    while not resume.exists() and process.poll() is None:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    two = state_of(tmp_path)
    assert f"stopped after step {two['run']['step']} of 120" in out, out + err
    assert out.count("120 steps, from step 0") == 1  # the first process speaks
    assert two["run"]["hardware"].startswith("2 x ") and "abort" not in err.lower()

    (tmp_path / "one").mkdir()
    here = {"DATA": images, "OPTIMIZER": "adam", "EPOCHS": 20}
    stopped(tmp_path / "one", two["run"]["step"], signal.SIGINT, **here)
    one = state_of(tmp_path / "one")
    torch.manual_seed(train_score.SEED)
    first = ScoreModel("unet", 0.01, 1.0, (8,), (1,), (0,)).state_dict()
    for name, weight in one["model"].items():
        moved = (weight - first[name]).norm()
        assert (two["model"][name] - weight).norm() <= 1e-3 * moved
    for curve in ("losses", "recent"):
        np.testing.assert_allclose(two["run"][curve], one["run"][curve], rtol=1e-4)


@pytest.mark.parametrize("rank, order", [(0, ["reads", "waits"]), (1, ["waits", "reads"])])
def test_the_first_process_downloads_before_the_others_read(monkeypatch, rank, order):
    events = []
    reads = mock.Mock(side_effect=lambda *a, **k: events.append("reads") or [*pixels(9, 8, 8, 1)])
    monkeypatch.setattr(utils, "training_images", reads)
    monkeypatch.setattr(train_score.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(train_score.dist, "barrier", lambda: events.append("waits"))
    with mock.patch.multiple(train_score, VAL_IMAGES=2, CROP=8):
        train_score.read_data(rank, "cpu")
    assert events == order


def test_processes_share_a_batch_equally():
    train_score.check_options(512)
    with pytest.raises(ValueError, match="multiple of the number of processes, 5, not 512"):
        train_score.check_options(5)

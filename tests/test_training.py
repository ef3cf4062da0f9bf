"""train_score.py: its loss, batches and optimisers against closed forms, and whole trainings."""

import contextlib
import copy
import csv
import io
import math
import os
import re
import runpy
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
from PIL import Image
from torchvision.datasets import CIFAR10
from tqdm import tqdm

import train_score
import utils
from model import ScoreModel, load_checkpoint, load_model
from train_score import Crops, HiddenMuon, denoising_loss, learning_rate, make_batch, noise_law

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_score.py"
NETWORK = {"WIDTHS": (8,), "BLOCKS": (1,), "ATTENTION": (0,), "SIGMAS": (0.01, 1.0)}
RUN = {"BATCH_SIZE": 4, "EPOCHS": 2, "VAL_IMAGES": 16, "DEVICE": "cpu", "PRECISION": "float32"}
SMALL = NETWORK | RUN  # of 40 images: 24 to train on, 12 steps
LINE = (
    "--widths 8 --blocks 1 --attention 0 --sigmas 0.01 1 --batch-size 4 --epochs 2 "
    "--val-images 16 --device cpu --precision float32"
)


def pixels(count, height, width, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def train(folder, **constants):
    """Run main() of train_score.py in a folder, with these constants; return what it printed."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    out = io.StringIO()
    try:
        with (
            contextlib.chdir(folder),
            contextlib.redirect_stdout(out),
            mock.patch.multiple(train_score, **SMALL | constants),
            mock.patch.object(utils, "plot_training"),  # it takes longer than these trainings
        ):
            train_score.main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return out.getvalue()


def stopped(folder, steps, number=signal.SIGINT, **constants):
    """As `train`, but with a signal in the middle of a step, the first of them or later."""
    made = iter(range(1, steps + 1))

    def update(bar, images):
        if next(made) == steps:
            signal.raise_signal(number)

    with mock.patch.object(tqdm, "update", update), pytest.raises(SystemExit) as stop:
        train(folder, **constants)
    assert stop.value.code == 130


def state_of(folder, name="score"):
    return load_checkpoint(Path(folder, "checkpoints", f"{name}_resume.pt"))


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def same_training(first, second):
    return equal(first | {"hours": 0, "options": 0}, second | {"hours": 0, "options": 0})


def contents(folder):
    files = (path for path in Path(folder).rglob("*") if path.is_file() and path.suffix != ".lock")
    return {path: path.read_bytes() for path in files}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with 40 images to train on and 20 to test on."""
    folder = tmp_path_factory.mktemp("data")
    np.save(folder / "images.npy", pixels(40, 32, 32, seed=1))
    np.save(folder / "test.npy", pixels(20, 32, 32, seed=2))
    return folder


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """A folder in which a user has trained a small network, and what was printed."""
    folder = tmp_path_factory.mktemp("trained")
    line = f"--data {data / 'images.npy'} --test {data / 'test.npy'} {LINE}"
    process = start(folder, line)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return SimpleNamespace(folder=folder, out=out, err=err)


def start(folder, line, launcher=(), script=SCRIPT, **environment):
    command = [sys.executable, *launcher, str(script), *shlex.split(line)]
    pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=os.environ | environment, **pipes)


# -----------------------------------------------------------------------------
# Loss and noise levels
# -----------------------------------------------------------------------------


def test_the_true_denoisers_loss_is_its_posterior_variance():
    # x0 ~ N(0.5, c^2): E (D - x0)^2 = c^2 s^2 / (c^2 + s^2), over the typical error.
    c, rng = 0.1, torch.Generator().manual_seed(1)

    def denoiser(x, sigma):
        return 0.5 + c**2 / (c**2 + sigma[:, None, None, None] ** 2) * (x - 0.5)

    x0 = 0.5 + c * torch.randn(64, 3, 32, 32, generator=rng)
    for s in (0.02, 0.1, 0.5):
        noise = torch.randn(x0.shape, generator=rng)
        loss = denoising_loss(denoiser, x0, torch.full((64,), s), noise).item()
        expected = c**2 * s**2 / (c**2 + s**2) / train_score.typical_error(s)
        assert abs(loss / expected - 1) < 4 * (2 / x0.numel()) ** 0.5


def test_the_loss_is_least_for_the_true_score():
    # D = x + s^2 score, with the score w (0.5 - x) / (c^2 + s^2), is the posterior mean of pixels
    # N(0.5, c^2) for w = 1. The loss is a parabola in w: three values give its lowest point.
    c, s, rng = 0.2, 0.1, torch.Generator().manual_seed(2)
    x0 = 0.5 + c * torch.randn(64, 3, 32, 32, generator=rng, dtype=torch.float64)
    noise = torch.randn(x0.shape, generator=rng, dtype=torch.float64)
    losses = []
    for w in (0.0, 1.0, 2.0):

        def denoiser(x, sigma, w=w):
            return x + s**2 * w * (0.5 - x) / (c**2 + s**2)

        losses.append(denoising_loss(denoiser, x0, torch.full((64,), s), noise).item())
    left, middle, right = losses
    lowest = 1 + (left - right) / 2 / (left - 2 * middle + right)
    four_errors = 4 * (1 + (c / s) ** 2) ** 0.5 / x0.numel() ** 0.5
    assert abs(lowest - 1) < four_errors


def test_the_typical_error_is_that_of_the_shipped_network():
    levels = load_model("checkpoints/score_cifar10.pt").info["test_psnr"]
    assert set(levels) == {0.02, 0.05, 0.1, 0.2, 0.5}
    for s, psnr in levels.items():
        assert abs(10 * np.log10(train_score.typical_error(s)) + psnr) < 1.2  # dB
    limit = 0.07  # the variance of CIFAR-10's pixels around their mean image
    assert abs(train_score.typical_error(1e6) / limit - 1) < 1e-3


def test_noise_levels_are_log_uniform_in_three_parts():
    u = torch.linspace(0, 1, 2001, dtype=torch.float64)
    sigma = noise_law(u, 0.005, 20.0, 0.1)
    assert abs(sigma[0] / 0.005 - 1) < 1e-9 and abs(sigma[-1] / 20 - 1) < 1e-9
    for low, high, share in ((0.0, 0.015, 0.1), (0.015, 0.7, 0.8), (0.7, 30.0, 0.1)):
        part = sigma[(sigma > low) & (sigma < high)].log()
        assert abs(len(part) / 2001 - share) < 2e-3 and part.diff().std() < 1e-9
    torch.testing.assert_close(noise_law(u, 0.02, 0.5, 0.1), 0.02 * 25**u)
    torch.testing.assert_close(noise_law(u, 0.1, 0.1, 0.1), torch.full_like(u, 0.1))


def test_the_learning_rate_rises_holds_and_falls():
    # Over 10,000 steps: up during 500, down during the last 80 %.
    for step, share in ((0, 1 / 500), (249, 0.5), (499, 1), (2000, 1), (6000, 0.5), (9000, 0.125)):
        assert abs(learning_rate(step, 10_000, 4e-3, 0.8) / 4e-3 - share) < 1e-9
    assert [learning_rate(step, 50, 1.0, 0.5) for step in range(6)] == [0.2, 0.4, 0.6, 0.8, 1, 1]
    assert learning_rate(0, 3, 1.0, 0.8) == 1  # a tenth of three steps is less than one
    assert {learning_rate(step, 50, 0.1, 0) for step in range(50)} == {0.1}


# -----------------------------------------------------------------------------
# Batches
# -----------------------------------------------------------------------------


@pytest.mark.parametrize("count, batch", [(10, 4), (3, 8), (1, 2), (6, 6)])
def test_batches_are_full_and_each_pass_shows_every_image_once(count, batch):
    steps = range(math.ceil(40 * count / batch))
    drawn = [train_score.images_of_step(count, step, batch, 0) for step in steps]
    assert {len(index) for index in drawn} == {batch}
    stream = torch.cat(drawn)[: 40 * count].reshape(40, count)
    assert (stream.sort().values == torch.arange(count)).all()
    orders = {tuple(order.tolist()) for order in stream}
    assert len(orders) >= min(math.factorial(count), 30)
    other_seed = torch.cat([train_score.images_of_step(count, step, batch, 1) for step in steps])
    assert count == 1 or not torch.equal(other_seed[: 40 * count].reshape(40, count), stream)


SIZES = [(5, 5), (5, 9), (12, 6), (7, 7)]


def coordinates():
    """Images of a mixture of sizes, whose pixels say (image, row, column)."""
    images = []
    for k, (height, width) in enumerate(SIZES):
        rows, columns = np.mgrid[:height, :width]
        images.append(np.stack([np.full_like(rows, k), rows, columns], axis=2).astype(np.uint8))
    return images


def view_of(crop):
    """Return where a crop of `coordinates` comes from: image, top, left, and which of 8 views."""
    number, rows, columns = (crop * 255).round().int()
    assert (number == number[0, 0]).all()
    top, left = rows.min().item(), columns.min().item()
    window = torch.meshgrid(torch.arange(5) + top, torch.arange(5) + left, indexing="ij")
    for mirrored, quarters in product((0, 1), range(4)):
        seen = [part.flip(1) if mirrored else part for part in window]
        seen = [part.rot90(quarters) for part in seen]
        if torch.equal(seen[0], rows) and torch.equal(seen[1], columns):
            return number[0, 0].item(), top, left, (mirrored, quarters)
    raise AssertionError("this crop is no window of an image")


@pytest.mark.parametrize("flip, turn", list(product((False, True), (False, True))))
def test_crops_are_windows_of_their_image_mirrored_and_turned(flip, turn):
    crops, rng = Crops(coordinates(), 5, flip, turn), torch.Generator().manual_seed(3)
    index = torch.arange(400) % 4
    found = [view_of(crop) for crop in crops.draw(index, rng)]
    assert [image for image, *_ in found] == index.tolist()
    for k, (height, width) in enumerate(SIZES):  # every place of every image
        places = {(top, left) for image, top, left, _ in found if image == k}
        assert places == set(product(range(height - 4), range(width - 4)))
    views = [view for *_, view in found]
    kinds = set(product((0, 1) if flip else (0,), range(4) if turn else (0,)))
    assert set(views) == kinds
    share = 1 / len(kinds)
    four_errors = 4 * (share * (1 - share) / 400) ** 0.5
    for kind in kinds:
        assert abs(views.count(kind) / 400 - share) <= four_errors


def test_images_of_the_crops_size_come_whole_and_exact():
    images = pixels(4, 8, 8, seed=5)  # an array, as CIFAR-10 is
    crops = Crops(images, 8, flip=False, turn=False)
    x0 = crops.draw(torch.tensor([2, 0]), torch.Generator())
    assert torch.equal(x0, torch.from_numpy(images[[2, 0]]).permute(0, 3, 1, 2) / 255)
    assert x0.is_contiguous(memory_format=torch.channels_last)


def batch(step=0, seed=0, size=8):
    crops = Crops(coordinates(), 5, True, True)
    return make_batch(crops, step, size, 0.01, 1.0, 0.2, seed)


def test_a_batch_depends_on_seed_and_step_alone():
    first = batch(step=3, seed=7)
    torch.manual_seed(99)
    batch(step=4, seed=8)
    assert equal(first, batch(step=3, seed=7))
    for other in (batch(step=4, seed=7), batch(step=3, seed=8)):
        assert not any(torch.equal(a, b) for a, b in zip(first, other))


def test_a_batch_has_one_noise_level_from_each_slice_and_unit_noise():
    for step in range(3):
        x0, sigma, noise = batch(step, size=64)
        edges = noise_law(torch.arange(65) / 64, 0.01, 1.0, 0.2)
        assert (sigma >= edges[:-1] - 1e-7).all() and (sigma <= edges[1:] + 1e-7).all()
        four_errors = 4 * (2 / noise.numel()) ** 0.5
        assert noise.shape == x0.shape and abs(noise.square().mean() - 1) < four_errors


# -----------------------------------------------------------------------------
# Optimisers
# -----------------------------------------------------------------------------


def unet():
    return ScoreModel("unet", 0.01, 1.0, (32, 32), (1, 1), (0, 1), 16)


def test_muon_has_the_hidden_convolutions_and_adam_the_rest():
    model = unet()
    adam, muon = train_score.make_optimizers(model, "muon", 0.1)
    hidden = {name for name, p in model.named_parameters() if any(p is w for w in muon.weights)}
    assert len(hidden) == 10
    assert all(re.search(r"(conv1|conv2|down\.0|up\.0|qkv|out)\.weight", name) for name in hidden)
    places = []
    for optimizer in (adam, muon):
        places += [p.data_ptr() for p in optimizer.param_groups[0]["params"]]
    assert sorted(places) == sorted(p.data_ptr() for p in model.parameters())  # each once
    assert adam.param_groups[0]["betas"] == (0.9, 0.95)  # a lone large gradient counts in both
    (adam,) = train_score.make_optimizers(model, "adam", 0.1)
    assert len(adam.param_groups[0]["params"]) == len(list(model.parameters()))
    assert adam.param_groups[0]["betas"] == (0.9, 0.999)  # the usual ones


def random_weight(shape, rng):
    return torch.randn(shape, generator=rng).to(memory_format=torch.channels_last)


def test_muon_moves_a_convolution_by_an_orthogonal_matrix():
    # The update is -lr 0.2 sqrt(max(n, m)) U V^T for a gradient U S V^T (Liu et al. 2025, eq. 4);
    # five Newton-Schulz iterations bring singular values between 0.7 and 1.2 instead of 1.
    rng = torch.Generator().manual_seed(3)
    for shape in ((8, 16, 3, 3), (64, 8, 2, 2)):
        weight = torch.nn.Parameter(random_weight(shape, rng))
        weight.grad = random_weight(shape, rng)
        before = weight.detach().clone()
        HiddenMuon([weight], 0.01, weight_decay=20.0).step()  # first shrinks by 1 - 0.01 * 20
        moved = HiddenMuon.as_matrix(weight.detach() - 0.8 * before)
        gradient = HiddenMuon.as_matrix(weight.grad)
        scale = 0.01 * 0.2 * max(moved.shape) ** 0.5
        values = torch.linalg.svdvals(moved) / scale
        assert values.min() > 0.6 and values.max() < 1.3
        along = -(moved * gradient).sum() / scale / torch.linalg.svdvals(gradient).sum()
        assert 0.7 < along < 1.2  # 1 for U V^T exactly


def test_muon_moves_all_matrices_at_once_as_torch_moves_each():
    rng = torch.Generator().manual_seed(4)
    shapes = ((8, 16, 3, 3), (64, 8, 2, 2), (8, 16, 3, 3), (64, 32, 1, 1))
    weights = [torch.nn.Parameter(random_weight(shape, rng)) for shape in shapes]
    matrices = [torch.nn.Parameter(HiddenMuon.as_matrix(w.detach()).clone()) for w in weights]
    ours = HiddenMuon(weights, 0.01)
    kind = {"weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    theirs = torch.optim.Muon(matrices, lr=0.01, **kind)
    for _ in range(3):
        for weight, matrix in zip(weights, matrices):
            weight.grad = random_weight(weight.shape, rng)
            matrix.grad = HiddenMuon.as_matrix(weight.grad).clone()
        ours.step()
        theirs.step()
    for weight, matrix in zip(weights, matrices):  # but for bfloat16: 0.4 % of steps of some 0.01
        torch.testing.assert_close(HiddenMuon.as_matrix(weight), matrix, rtol=0, atol=3e-4)


# -----------------------------------------------------------------------------
# A training
# -----------------------------------------------------------------------------


def test_a_training_is_its_recipe(tmp_path):
    # The same three steps by hand, with every number another than its default.
    images = [*pixels(6, 9, 7, seed=7), *pixels(6, 6, 6, seed=8), *pixels(3, 8, 8, seed=9)]
    numbers = {"EPOCHS": 1, "BATCH_SIZE": 4, "LR": 0.02, "DECAY": 0.5, "CLIP": 0.1, "EMA": 0.3}
    numbers |= {"SIGMAS": (0.02, 2.0), "TAILS": 0.1, "SEED": 5, "VAL_IMAGES": 3, "CROP": 6}
    numbers |= {"FLIP": False, "TURN": True, "WIDTHS": (32, 32), "BLOCKS": (1, 1)}
    numbers |= {"ATTENTION": (0, 1), "DATA": "theirs"}
    with mock.patch.object(utils, "training_images", lambda source, **how: images):
        train(tmp_path, **numbers)

    crops = Crops(images[:12], 6, flip=False, turn=True)
    torch.manual_seed(5)
    model = ScoreModel("unet", 0.02, 2.0, (32, 32), (1, 1), (0, 1))
    optimizers = train_score.make_optimizers(model, "muon", 1.0)
    averaged, losses = copy.deepcopy(model), []
    for step, (lr, decay) in enumerate(((0.02, 0.1), (0.02, 2 / 11), (0.02 * 2 / 3, 0.25))):
        loss = denoising_loss(model, *make_batch(crops, step, 4, 0.02, 2.0, 0.1, 5))
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
    assert [images_seen for images_seen, _ in state["losses"]] == [4, 8, 12]
    np.testing.assert_allclose([loss for _, loss in state["losses"]], losses, rtol=1e-6)


def test_a_short_training_moves_its_weights(tmp_path, data):
    # Adam's first step moves each weight by the learning rate, also when it is the only step: the
    # warm-up is at most a tenth. The first average keeps a tenth of the start.
    recipe = {"NETWORK": "cnn3", "SIGMAS": (0.1,), "OPTIMIZER": "adam", "LR": 1e-3}
    train(tmp_path, DATA=str(data / "images.npy"), **recipe, EPOCHS=1, BATCH_SIZE=24, CROP=8)
    torch.manual_seed(train_score.SEED)
    before, state = ScoreModel("cnn3", 0.1, 0.1).state_dict(), state_of(tmp_path)
    for name, weight in before.items():
        move = state["model"][name] - weight
        assert abs(move.abs().median() / 1e-3 - 1) < 1e-3
        torch.testing.assert_close(state["average"][name] - weight, 0.9 * move, rtol=0, atol=1e-7)


def test_a_training_tells_its_story(trained):
    info = load_model(trained.folder / "checkpoints" / "score.pt").info
    assert info["training_images"] == 24 and info["images_seen"] == 48 and info["step"] == 12
    assert info["hardware"] == utils.hardware(torch.device("cpu")) and 0 < info["hours"] < 0.1
    assert info["options"]["lr"] == train_score.LR and info["options"]["sigmas"] == (0.01, 1.0)
    assert info["torch"] == torch.__version__ and info["earlier"] == {}
    lines = trained.out.splitlines()
    assert "24 training images, 12 steps, from step 0" in lines[1]
    test_line, end = lines[-2:]
    for line, psnr in ((lines[-3], info["val_psnr"]), (test_line, info["test_psnr"])):
        for sigma, value in psnr.items():
            assert f"{value:.2f} dB at {sigma:g}" in line
    assert "step 12: validation PSNR" in lines[-3] and "test PSNR" in test_line
    assert end.startswith("48 images seen; wrote ") and "score_training.png" in end
    assert trained.err == ""  # the bar is for terminals
    assert Image.open(trained.folder / "figures" / "score_training.png").width > 500


def test_a_psnr_is_of_its_images_and_of_the_averaged_weights(trained, data):
    state, levels = state_of(trained.folder), (0.02, 0.05, 0.1, 0.2, 0.5)
    network = load_checkpoint(trained.folder / "checkpoints" / "score.pt")
    assert equal(network["weights"], state["average"])
    model = ScoreModel(**network["config"])
    images, tests = (np.load(data / f"{name}.npy") for name in ("images", "test"))
    for name, seen in (("val_psnr", images[-16:]), ("test_psnr", tests)):
        model.load_state_dict(state["average"])
        expected = train_score.validate(model, torch.from_numpy(seen).permute(0, 3, 1, 2), levels)
        model.load_state_dict(state["model"])
        last = train_score.validate(model, torch.from_numpy(seen).permute(0, 3, 1, 2), levels)
        for sigma in levels:
            assert abs(state[name][sigma] - expected[sigma]) < 1e-6
            assert abs(state[name][sigma] - last[sigma]) > 1e-4


def test_what_is_trained_on_and_measured_is_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, tests = pixels(9, 7, 8, seed=10), pixels(1003, 5, 6, seed=11)
    np.save("images.npy", images)
    np.save("tests.npy", tests)
    for name, value in {"DATA": "images.npy", "TEST": "tests.npy", "VAL_IMAGES": 2}.items():
        monkeypatch.setattr(train_score, name, value)
    monkeypatch.setattr(train_score, "CROP", 4)
    crops, val, test = train_score.read_data("cpu")
    assert len(crops) == 7 and np.array_equal(crops.pixels, images[:7].reshape(-1, 3))
    assert np.array_equal(val.permute(0, 2, 3, 1), images[7:, 1:5, 2:6])
    assert np.array_equal(test.permute(0, 2, 3, 1), tests[:1000, :4, 1:5])


def test_validation_measures_the_noise_that_it_adds():
    images, sigmas = torch.full((150, 3, 8, 8), 128, dtype=torch.uint8), (0.02, 0.1)
    z = np.random.default_rng(0).standard_normal((150, 8, 8, 3))
    for sigma, value in train_score.validate(lambda x, sigma: x, images, sigmas).items():
        errors = ((sigma * z) ** 2).mean(axis=(1, 2, 3))
        assert abs(value - np.mean(-10 * np.log10(errors))) < 1e-3
    exact = train_score.validate(lambda x, sigma: torch.full_like(x, 128 / 255), images, (0.1,))
    assert exact[0.1] > 100


@pytest.mark.parametrize("levels, validated", [((0.1,), [0.1]), ((0.04, 0.3), [0.05, 0.1, 0.2])])
def test_validation_keeps_to_the_trained_levels(tmp_path, data, levels, validated):
    train(tmp_path, DATA=str(data / "images.npy"), SIGMAS=levels, EPOCHS=1, CROP=4)
    assert list(state_of(tmp_path)["val_psnr"]) == validated


@pytest.mark.parametrize(
    "images, epochs, logged, validated",
    [
        (24, 2, range(1, 13), range(1, 13)),
        (24, 5, range(3, 31, 3), range(3, 31, 3)),  # at least ten of each
        (26, 4, range(2, 27, 2), range(2, 27, 2)),  # 26 steps
        (4, 226, range(22, 221, 22), range(2, 227, 2)),  # and some hundred for the longest
    ],
)
def test_curves_have_points_enough(tmp_path, data, images, epochs, logged, validated):
    count = {"VAL_IMAGES": 40 - images, "EPOCHS": epochs}
    constant = {0.1: 20.0}
    with mock.patch.object(train_score, "validate", lambda *of: constant) as validate:
        train(tmp_path, DATA=str(data / "images.npy"), CROP=4, **count)
    state = state_of(tmp_path)
    assert [seen // 4 for seen, _ in state["losses"]] == list(logged)
    assert [seen // 4 for seen, _ in state["psnrs"]] == list(validated)
    assert validate(0) is constant


def test_the_curves_are_a_table_too(trained):
    state = state_of(trained.folder)
    with open(trained.folder / "figures" / "score_training.csv", encoding="utf-8") as file:
        rows = {int(row["images"]): row for row in csv.DictReader(file)}
    assert list(rows) == list(range(4, 49, 4))
    assert [[seen, float(row["loss"])] for seen, row in rows.items()] == state["losses"]
    for seen, psnr in state["psnrs"]:
        assert {s: float(rows[seen][f"PSNR at {s:g}"]) for s in psnr} == psnr


def test_the_recipe_of_the_docstring_runs(tmp_path, data):
    command = re.search(r"train_score\.py (--network cnn3 (?:.*\\\n)?.*?)  +#", train_score.__doc__)
    line = command[1].replace("\\\n", " ") + f" --data {data / 'images.npy'} --epochs 2 --crop 8"
    run(tmp_path, line + " --val-images 16 --device cpu --batch-size 8")
    state = state_of(tmp_path, "cnn3")
    assert equal(state["model"], state["average"])  # no average
    assert state["optimizer 0"]["param_groups"][0]["lr"] == 1e-4  # not fallen at the end
    model = load_model(tmp_path / "checkpoints" / "cnn3.pt")
    assert model.config == {"network": "cnn3", "sigma_min": 0.1, "sigma_max": 0.1}


def test_compiled_is_what_learns_when_asked(tmp_path, data):
    # A stand-in for torch.compile, which needs a compiler at hand.
    sizes = []

    def compiled(model, **how):
        return lambda *inputs: sizes.append(len(inputs[0])) or model(*inputs)

    images = str(data / "images.npy")
    train(tmp_path, DATA=images, NAME="plain", CROP=8)
    with mock.patch("torch.compile", compiled):
        train(tmp_path, DATA=images, NAME="fused", CROP=8, COMPILE=True)
    plain, fused = state_of(tmp_path, "plain"), state_of(tmp_path, "fused")
    assert sizes == [4] * 12 and equal(plain["model"], fused["model"])


def test_bfloat16_is_used_when_asked(tmp_path, data):
    here, kinds = {"DATA": str(data / "images.npy"), "EPOCHS": 1, "CROP": 4}, set()

    def seen(module, inputs, out):
        kinds.update({out.dtype} if isinstance(module, torch.nn.Conv2d) else ())

    with torch.nn.modules.module.register_module_forward_hook(seen):
        for precision in ("float32", "bfloat16"):
            train(tmp_path, **here, NAME=precision, PRECISION=precision)
            assert kinds == {getattr(torch, precision)}
            kinds.clear()


def test_hardware_is_named_piece_after_piece(tmp_path, data):
    images, pieces = str(data / "images.npy"), ("a GPU", "a CPU", "a CPU", "2 x a CPU", "a CPU")
    for epochs, here in enumerate(pieces, start=1):
        with mock.patch.object(utils, "hardware", lambda device, world, here=here: here):
            out = train(tmp_path, DATA=images, EPOCHS=epochs, CROP=4)
            again = train(tmp_path, DATA=images, EPOCHS=epochs, CROP=4)
        assert f"parameters, on {here}\n" in out and f"from step {6 * epochs}" in again
    named = load_model(tmp_path / "checkpoints" / "score.pt").info["hardware"]
    assert named == "a GPU, then a CPU, then 2 x a CPU, then a CPU"


def test_a_training_saves_every_some_minutes(tmp_path, data):
    clock = SimpleNamespace(seconds=0)

    def perf_counter():  # each step takes 30 seconds
        clock.seconds += 30
        return clock.seconds

    saved = []

    def save(run, *files):
        saved.append((run["step"], round(3600 * run["hours"])))

    with (
        mock.patch.object(train_score, "save", save),
        mock.patch.object(train_score, "time", SimpleNamespace(perf_counter=perf_counter)),
    ):
        train(tmp_path, DATA=str(data / "images.npy"), SAVE_MINUTES=1.25, CROP=4, EPOCHS=2)
    assert saved == [(step, 30 * step) for step in (3, 6, 9, 12, 12)]


def test_a_folder_loses_what_is_small_or_broken(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for name, size in (("a", (40, 33)), ("b", (33, 50)), ("small", (40, 31)), ("z", (32, 32))):
        Image.fromarray(pixels(1, *size, seed=12)[0]).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:500])
    out = train(tmp_path, DATA="photographs", VAL_IMAGES=1)
    assert "small" in out and "broken" in out
    assert "3 training images" not in out and "2 training images, 1 steps" in out


def test_cifar10_is_trained_on_without_libraries_for_images(tmp_path, data, monkeypatch):
    for library in ("OpenImageIO", "skimage"):
        monkeypatch.setitem(sys.modules, library, None)
    images = np.load(data / "images.npy")
    monkeypatch.setattr(utils, "_cifar10", lambda folder, train: images if train else images[:7])
    out = train(tmp_path, DATA="cifar10", TEST="cifar10", CROP=32, EPOCHS=1)
    assert "24 training images" in out and "test PSNR" in out


# -----------------------------------------------------------------------------
# Going on
# -----------------------------------------------------------------------------


def test_a_training_stopped_between_any_steps_ends_the_same(trained, data, tmp_path):
    # The steps of two epochs of 24 images, in batches of 4, with points of the curves between them.
    here = {"DATA": str(data / "images.npy"), "TEST": str(data / "test.npy")}
    for steps, number in ((1, signal.SIGINT), (4, signal.SIGTERM), (2, signal.SIGINT)):
        stopped(tmp_path, steps, number, **here)
    state = state_of(tmp_path)
    assert state["step"] == 7 and state["images_seen"] == 28
    path = tmp_path / "checkpoints" / "score_resume.pt"
    utils.save_checkpoint(path, state | {"hours": 5.0})
    train(tmp_path, **here)
    ended, straight = state_of(tmp_path), state_of(trained.folder)
    assert same_training(ended, straight)
    assert 5 < ended["hours"] < 5.1


@pytest.mark.skipif(sys.platform == "win32", reason="there, signals end a process at once")
def test_a_training_killed_while_it_runs_goes_on(trained, data, tmp_path):
    line = f"--data {data / 'images.npy'} --test {data / 'test.npy'} {LINE} --save-minutes 0"
    resume = tmp_path / "checkpoints" / "score_resume.pt"
    for number in (signal.SIGKILL, signal.SIGINT):
        before = resume.stat().st_mtime_ns if resume.exists() else None
        process = start(tmp_path, line)
        while not resume.exists() or resume.stat().st_mtime_ns == before:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "the same command goes on" in out and err == ""
    train(tmp_path, DATA=str(data / "images.npy"), TEST=str(data / "test.npy"))
    assert same_training(state_of(tmp_path), state_of(trained.folder))
    assert {path.name for path in contents(tmp_path)} == {
        path.name for path in train_score.files_of("score")
    }


def test_only_more_epochs_go_on_beyond_the_end(data, tmp_path):
    here = {"DATA": str(data / "images.npy"), "CROP": 8, "EPOCHS": 1}
    train(tmp_path, **here)
    first = state_of(tmp_path)
    assert "from step 6" in train(tmp_path, **here)
    assert same_training(state_of(tmp_path), first)
    network = tmp_path / "checkpoints" / "score.pt"
    network.write_bytes(b"cut short")  # by a crash: it is written again
    train(tmp_path, **here)
    assert load_model(network).info["images_seen"] == 24
    assert "12 steps, from step 6" in train(tmp_path, **here | {"EPOCHS": 2})
    assert load_model(network).info["images_seen"] == 48


def test_another_training_is_not_gone_on_with(data, tmp_path):
    here = {"DATA": str(data / "images.npy"), "CROP": 8, "EPOCHS": 1}
    train(tmp_path, **here)
    before = contents(tmp_path)
    for other, word in (
        ({"WIDTHS": (16,)}, r"--widths was \(8,\), not \(16,\)"),
        ({"EMA": 0.5}, "--ema was 0.999, not 0.5"),
        ({"FLIP": False}, "--flip"),
        ({"BATCH_SIZE": 2}, "--batch-size"),
        ({"SEED": 1}, "--seed"),
        ({"DATA": str(data / "test.npy"), "VAL_IMAGES": 16}, "other images"),
    ):
        with pytest.raises(ValueError, match=f"score_resume.pt.*{word}.*--name"):
            train(tmp_path, **here | other)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "change",
    [
        {"model": {}},
        {"average": {"net.head.bias": torch.zeros(2)}},
        {"optimizer 0": {}},
        {"options": {}},
    ],
)
def test_what_no_training_can_go_on_from_is_refused(data, tmp_path, change):
    here = {"DATA": str(data / "images.npy"), "CROP": 8, "EPOCHS": 1}
    train(tmp_path, **here)
    path = tmp_path / "checkpoints" / "score_resume.pt"
    utils.save_checkpoint(path, load_checkpoint(path) | change)
    with pytest.raises(ValueError, match="(?s)score_resume.pt.*--name"):
        train(tmp_path, **here | {"EPOCHS": 2})


def test_a_damaged_or_missing_state_is_named(data, tmp_path):
    here = {"DATA": str(data / "images.npy"), "CROP": 8, "EPOCHS": 1}
    train(tmp_path, **here)
    path = tmp_path / "checkpoints" / "score_resume.pt"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="score_resume.pt.*damaged"):
        train(tmp_path, **here)
    path.unlink()
    with pytest.raises(ValueError, match="score.pt.*--name"):
        train(tmp_path, **here)


def test_a_training_starts_from_a_checkpoint(trained, data, tmp_path):
    kept = load_checkpoint(trained.folder / "checkpoints" / "score.pt")
    kept["info"]["earlier"] = {"images_seen": 1000, "hours": 2.0}
    utils.save_checkpoint(tmp_path / "first.pt", kept)
    here = {"DATA": str(data / "images.npy"), "INIT": "first.pt", "CROP": 8, "EPOCHS": 1}
    train(tmp_path, **here, LR=1e-9)
    after = load_model(tmp_path / "checkpoints" / "score.pt")
    for name, weight in kept["weights"].items():
        torch.testing.assert_close(after.state_dict()[name], weight, rtol=0, atol=1e-6)
    assert after.info["images_seen"] == 24 and after.info["earlier"]["images_seen"] == 1048
    assert abs(after.info["earlier"]["hours"] - 2 - kept["info"]["hours"]) < 1e-9
    with pytest.raises(ValueError, match=r"--init 'first.pt' is another network.*\(1,\).*\(2,\)"):
        train(tmp_path, **here, BLOCKS=(2,), NAME="other")


# -----------------------------------------------------------------------------
# What goes wrong
# -----------------------------------------------------------------------------


def test_a_divergence_keeps_the_last_state(data, tmp_path):
    here = {"DATA": str(data / "images.npy"), "NETWORK": "cnn3", "SIGMAS": (0.1,), "CROP": 8}
    here |= {"OPTIMIZER": "adam", "DECAY": 0, "BATCH_SIZE": 24}
    train(tmp_path, **here, LR=1e-4, EPOCHS=1)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="the training diverged.*kept, lower --lr"):
        train(tmp_path, **here, LR=100.0, EPOCHS=50)
    assert contents(tmp_path) == before


def test_a_loss_that_climbs_or_is_not_finite_is_a_divergence():
    model, losses = ScoreModel("cnn3", 0.1, 0.1), [[10, 3.0], [20, 0.3]]
    train_score.check_divergence(30, 2.9, losses, model)
    for loss in (3.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="diverged before step 30.*after one of 0.3.*--lr"):
            train_score.check_divergence(30, loss, losses, model)
    with torch.no_grad():
        model.net.layers[0].bias[0] = math.inf
    with pytest.raises(ValueError, match="diverged"):
        train_score.check_divergence(30, 0.3, losses, model)
    # Of few images one alone, at a high level, can weigh as much: that is no divergence.
    model = ScoreModel("cnn3", 0.1, 0.1)
    bar = SimpleNamespace(set_postfix=lambda loss: None, disable=False)
    run = {"step": 3, "loss_sum": 9.3, "loss_steps": 3, "losses": losses, "model": model}
    train_score.log_loss(run | {"losses": list(losses)}, 10, bar)
    with pytest.raises(ValueError, match="a loss of 3.1"):
        train_score.log_loss(run | {"losses": list(losses)}, 11, bar)


@pytest.mark.parametrize(
    "where", ["checkpoints", "figures", "figures/score_training.png", "figures/score_training.csv"]
)
def test_a_place_that_cannot_be_written_is_found_before_training(data, tmp_path, where):
    path = tmp_path / where
    if path.suffix:
        path.mkdir(parents=True)
    else:
        path.write_text("a file")
    with (
        mock.patch.object(train_score, "make_batch", None),
        pytest.raises(OSError, match=f"{path.name}.*cannot be written"),
    ):
        train(tmp_path, DATA=str(data / "images.npy"))


def test_a_disk_that_fills_up_leaves_the_old_files(data, tmp_path):
    resource = pytest.importorskip("resource")
    here = {"DATA": str(data / "images.npy"), "CROP": 8}
    train(tmp_path, **here, EPOCHS=1)
    before, (soft, hard) = contents(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # less than the weights
    try:
        with pytest.raises(OSError, match="score_resume.pt.*unchanged"):
            train(tmp_path, **here, EPOCHS=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == before


def test_one_training_at_a_time_has_a_name(data, tmp_path):
    with (
        contextlib.chdir(tmp_path),
        utils.locked(*train_score.files_of("score")),
        pytest.raises(ValueError, match="another process.*score.pt"),
    ):
        train(tmp_path, DATA=str(data / "images.npy"))


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot be sent Ctrl-C there")
def test_ctrl_c_while_modules_load_ends_without_a_word(tmp_path):
    slow = "import time\nprint('loading', flush=True)\ntime.sleep(60)"
    (tmp_path / "tqdm.py").write_text(slow)
    process = start(tmp_path, "--data samples", PYTHONPATH=str(tmp_path))
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "") and process.returncode == -signal.SIGINT


def run(folder, line, code=0):
    """Run the script as from a shell, but in this process; return what it wrote to stderr."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    out, err, found = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["train_score.py", *shlex.split(line)]),
        mock.patch.object(utils, "plot_training"),
    ):
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stop:
            found = stop.code
    for number, handler in before.items():
        signal.signal(number, handler)
    assert found == code, out.getvalue() + err.getvalue()
    return err.getvalue()


@pytest.mark.parametrize(
    "wrong, words",
    [
        ("--data nowhere", "nowhere"),
        ("--test nowhere", "nowhere"),
        ("--init nowhere.pt", "no checkpoint at 'nowhere.pt'"),
        ("--val-images 40", "--val-images must leave some of the 40 images"),
        ("--val-images 0", "--val-images must leave some of the 40 images"),
        ("--crop 33", "33 x 33"),
        ("--crop 0", "--crop must be positive, not 0"),
        ("--network transformer", "unknown network 'transformer'"),
        ("--network cnn3", "'cnn3' is trained for one noise level, not 0.01 to 1.0"),
        ("--widths 8 8", "as many blocks and attention"),
        ("--blocks 0", "integers from 1 to 2048"),
        ("--attention 1", "multiple of 32"),
        ("--sigmas 0 1", "not 0.0 and 1.0"),
        ("--sigmas 1 0.1", "not 1.0 and 0.1"),
        ("--sigmas 0.1 0.2 0.3", "--sigmas must be"),
        ("--tails 0.7", "--tails must lie between 0 and 0.5, not 0.7"),
        ("--optimizer sgd", "--optimizer must be muon or adam, not sgd"),
        ("--batch-size 0", "--batch-size must be a positive multiple"),
        ("--lr -1", "learning rate: -1"),
        ("--lr nan", "learning rate: nan"),
        ("--decay 1.5", "--decay must lie between 0 and 1, not 1.5"),
        ("--clip 0", "--clip must be positive, not 0"),
        ("--ema 1", "--ema must be"),
        ("--name ../other", "--name must be up to 100 letters"),
        ("--name .hidden", "--name must be up to 100 letters"),
        ("--name " + "x" * 101, "--name must be up to 100 letters"),
        ("--seed -1", "--seed must lie between 0"),
        ("--device tpu", "device 'tpu' cannot be used"),
        ("--precision half", "--precision must be auto, bfloat16 or float32, not half"),
        ("--epoch 3", "--epoch"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(data, tmp_path, wrong, words):
    # All of them but for these: without them the training runs, as the fixture `trained` shows.
    err = run(tmp_path, f"--data {data / 'images.npy'} {LINE} {wrong}", code=2)
    assert err.startswith("train_score.py: error: ") and err.count("\n") == 1 and words in err
    assert not contents(tmp_path)


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_the_first_and_the_last_seed_are_taken(data, tmp_path, seed):
    train(tmp_path, DATA=str(data / "images.npy"), SEED=seed, CROP=4, EPOCHS=1)


def test_cifar10_without_network_or_data_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", "file:///nowhere/cifar-10-python.tar.gz")
    with pytest.raises(OSError, match="connect to the network"):
        train(tmp_path, DATA="cifar10")


# -----------------------------------------------------------------------------
# More than one process
# -----------------------------------------------------------------------------

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1")
TORCHRUN += ("--nproc-per-node=2",)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
def test_two_processes_equal_one_and_a_signal_to_one_stops_both(data, tmp_path):
    # Adam, since Muon's own arithmetic is in bfloat16, and tells roundings apart by 1e-2.
    line = f"--data {data / 'images.npy'} {LINE} --optimizer adam --save-minutes 0 --epochs 20"
    process = start(tmp_path, line, TORCHRUN)
    resume = tmp_path / "checkpoints" / "score_resume.pt"
    while not resume.exists() and process.poll() is None:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    two = state_of(tmp_path)
    assert f"stopped after step {two['step']} of 120" in out, out + err
    assert two["hardware"].startswith("2 x ") and out.count("validation") == two["step"] // 6

    one = tmp_path / "one"
    one.mkdir()
    here = {"DATA": str(data / "images.npy"), "OPTIMIZER": "adam", "EPOCHS": 20}
    stopped(one, two["step"], **here)
    state = state_of(one)
    torch.manual_seed(train_score.SEED)
    first = ScoreModel("unet", 0.01, 1.0, (8,), (1,), (0,)).state_dict()
    assert apart(two["model"], state["model"]) < 1e-4 * apart(first, state["model"])
    assert abs(float(two["loss_sum"]) - float(state["loss_sum"])) < 1e-3
    np.testing.assert_allclose(two["losses"], state["losses"], rtol=1e-4)
    train(tmp_path, **here | {"EPOCHS": math.ceil((two["step"] + 1) / 6)})  # and one goes on


def apart(first, second):
    return sum((first[name] - second[name]).square().sum() for name in first).sqrt().item()


TOGETHER = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import numpy as np, torch
import train_score, utils
from train_score import largest, mean_over_processes, place, processes

for name, value in {SMALL!r}.items():
    setattr(train_score, name, value)

def refusal(function, *arguments):
    try:
        return function(*arguments)
    except ValueError as error:
        return str(error)

@processes()
def together():
    rank, world = place()
    print(rank, "of", world, largest(rank), largest(-rank), flush=True)
    print("mean", mean_over_processes(torch.tensor(1.0 + rank)).item(), flush=True)
    train_score.BATCH_SIZE = 3
    print(refusal(train_score.check_options, world), flush=True)
    train_score.BATCH_SIZE = 4

    def training_images(source, **how):  # the first takes a while: it downloads
        time.sleep(0.5 * (rank == 0))
        print(rank, "has read", flush=True)
        return list(np.zeros((40, 32, 32, 3), np.uint8))

    utils.training_images = training_images
    train_score.load = lambda run, *files: run.update(step=rank)  # only one has found a file
    print(refusal(train_score.main.__wrapped__), flush=True)
    largest(0)
    if rank == 0:
        largest(0)  # the other has ended

utils.run_script(together, {{"__file__": __file__, "__doc__": ""}})
"""


def test_processes_wait_for_each_other_and_agree(tmp_path):
    (tmp_path / "together.py").write_text(TOGETHER)
    process = start(tmp_path, "", TORCHRUN, tmp_path / "together.py")
    out, err = process.communicate(timeout=300)
    for line in ("0 of 2 1.0 0.0", "1 of 2 1.0 0.0", "mean 1.5", "0 has read\n1 has read"):
        assert line in out, out + err
    assert out.count("multiple of the number of processes, 2, not 3") == 2
    assert out.count("--name must name a training that all processes find") == 2
    lost = [line for line in err.splitlines() if line.startswith("together.py: error: ")]
    assert len(lost) == 1 and "another process of this training has ended" in lost[0], err


def test_a_process_that_has_ended_has_left_the_others(monkeypatch):
    # Otherwise its threads of communication abort it, now and then, when all is done.
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0, "RANK": 0, "WORLD_SIZE": 1}
    for name, value in (place | {"TORCHELASTIC_RUN_ID": 1}).items():
        monkeypatch.setenv(name, str(value))
    with train_score.processes():
        assert torch.distributed.is_initialized() and train_score.place() == (0, 1)
    assert not torch.distributed.is_initialized()

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
from tqdm import tqdm

import train_score
import utils
from model import ScoreModel, load_checkpoint, load_model
from train_score import Crops, HiddenMuon, denoising_loss, learning_rate, make_batch, noise_law

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


@contextlib.contextmanager
def inside(folder):
    """In that folder, with what is printed returned, signals left as they were, and no figures."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    out = io.StringIO()
    try:
        with (
            contextlib.chdir(folder),
            contextlib.redirect_stdout(out),
            mock.patch.object(utils, "plot_training"),  # it takes longer than these trainings
        ):
            yield out
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(folder, **constants):
    """Run main() of train_score.py in a folder, with these constants; return what it printed."""
    with inside(folder) as out, mock.patch.multiple(train_score, **SMALL | constants):
        train_score.main()
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


def run(folder, line, code=0):
    """Run the script as from a shell, but in this process; return stdout and stderr."""
    err, found = io.StringIO(), 0
    argv = mock.patch.object(sys, "argv", ["train_score.py", *shlex.split(line)])
    with inside(folder) as out, contextlib.redirect_stderr(err), argv:
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stop:
            found = stop.code
    assert found == code, out.getvalue() + err.getvalue()
    return out.getvalue(), err.getvalue()


def start(folder, line, launcher=(), **environment):
    """Start the script in a process of its own."""
    command = [sys.executable, *launcher, str(SCRIPT), *shlex.split(line)]
    pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=os.environ | environment, **pipes)


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
    np.save(folder / "images.npy", pixels(40, 8, 8, seed=1))
    np.save(folder / "test.npy", pixels(20, 8, 8, seed=2))
    return folder


@pytest.fixture
def images(data):
    return str(data / "images.npy")


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """A folder in which a user has trained a small network, and what was printed."""
    folder = tmp_path_factory.mktemp("trained")
    line = f"--data {data / 'images.npy'} --test {data / 'test.npy'} {LINE}"
    out, err = run(folder, line)
    return SimpleNamespace(folder=folder, line=line, out=out, err=err, state=state_of(folder))


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


@pytest.mark.parametrize("count, batch", [(10, 4), (3, 8), (1, 2), (6, 6)])
def test_batches_are_full_and_each_pass_shows_every_image_once(count, batch):
    steps = range(math.ceil(40 * count / batch))
    drawn = [train_score.images_of_step(count, step, batch, 0) for step in steps]
    assert {len(index) for index in drawn} == {batch}
    stream = np.concatenate(drawn)[: 40 * count].reshape(40, count)
    assert (np.sort(stream) == np.arange(count)).all()
    assert len(np.unique(stream, axis=0)) >= min(math.factorial(count), 30)
    other = np.concatenate([train_score.images_of_step(count, step, batch, 1) for step in steps])
    assert count == 1 or (other[: 40 * count].reshape(40, count) != stream).any()


SIZES = [(5, 5), (5, 9), (12, 6), (7, 7)]


def coordinates():
    """Images of a mixture of sizes, whose pixels say (image, row, column)."""
    images = []
    for k, (height, width) in enumerate(SIZES):
        rows, columns = np.mgrid[:height, :width]
        images.append(np.stack([np.full_like(rows, k), rows, columns], axis=2).astype(np.uint8))
    return images


@pytest.mark.parametrize("flip, turn", list(product((False, True), (False, True))))
def test_crops_are_windows_of_their_image_mirrored_and_turned(flip, turn):
    crops, rng = Crops(coordinates(), 5, flip, turn), np.random.default_rng(3)
    index = [0, 1, 2, 3] * 100
    numbers, rows, columns = crops.draw(index, rng).unbind(1)
    assert (numbers == torch.tensor(index)[:, None, None]).all()
    top, left = rows.amin((1, 2)), columns.amin((1, 2))
    for k, (height, width) in enumerate(SIZES):  # every place of every image
        places = set(zip(top[k::4].tolist(), left[k::4].tolist()))
        assert places == set(product(range(height - 4), range(width - 4)))
    # Each crop is one of the eight views of its window, and all that may be are as frequent.
    rows, columns = rows - top[:, None, None], columns - left[:, None, None]
    window, seen = torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij"), {}
    for mirrored, quarters in product((0, 1), range(4)):
        view = [part.flip(1) if mirrored else part for part in window]
        view = [part.rot90(quarters) for part in view]
        same = (rows == view[0]).all((1, 2)) & (columns == view[1]).all((1, 2))
        seen[mirrored, quarters] = same.double().mean().item()
    assert sum(seen.values()) == 1
    kinds = set(product((0, 1) if flip else (0,), range(4) if turn else (0,)))
    share = 1 / len(kinds)
    four_errors = 4 * (share * (1 - share) / 400) ** 0.5
    for kind, frequency in seen.items():
        assert abs(frequency - share * (kind in kinds)) <= four_errors


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
        edges = noise_law(np.arange(65) / 64, 0.01, 1.0, 0.2)
        found = sigma.double().numpy()
        assert (found >= edges[:-1] - 1e-7).all() and (found <= edges[1:] + 1e-7).all()
        four_errors = 4 * (2 / noise.numel()) ** 0.5
        assert noise.shape == x0.shape and abs(noise.square().mean() - 1) < four_errors
        assert x0.dtype == sigma.dtype == noise.dtype == torch.float32
        assert torch.equal(x0[:, 0].unique(), torch.arange(4) / 255)  # of 255 to [0, 1]


# -----------------------------------------------------------------------------
# Optimisers
# -----------------------------------------------------------------------------


def test_muon_has_the_hidden_convolutions_and_adam_the_rest():
    model = ScoreModel("unet", 0.01, 1.0, (32, 32), (1, 1), (0, 1), 16)
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


@pytest.mark.parametrize("dtype, digits", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_newton_schulz_iterations_change_the_singular_values_alone(dtype, digits):
    # U S V^T becomes U p(S / |S|) V^T, where an iteration of p is a s + b s^3 + c s^5.
    rng, (a, b, c) = torch.Generator().manual_seed(3), (3.4445, -4.775, 2.0315)
    for shape in ((2, 8, 24), (2, 24, 8)):
        matrices = torch.randn(shape, generator=rng, dtype=torch.float64)
        u, s, v = torch.linalg.svd(matrices, full_matrices=False)
        s = s / s.norm(dim=1, keepdim=True)
        for _ in range(5):
            s = a * s + b * s**3 + c * s**5
        found = train_score.orthogonal(matrices.to(dtype), (a, b, c), 5)
        assert found.dtype == dtype and s.min() > 0.6 and s.max() < 1.3
        torch.testing.assert_close(found.double(), u * s[:, None] @ v, rtol=0, atol=digits)


def random_weight(shape, rng):
    return torch.randn(shape, generator=rng).to(memory_format=torch.channels_last)


def test_muon_moves_all_matrices_at_once_as_torch_moves_each():
    rng = torch.Generator().manual_seed(4)
    shapes = ((8, 16, 3, 3), (64, 8, 2, 2), (8, 16, 3, 3), (64, 32, 1, 1))
    weights = [torch.nn.Parameter(random_weight(shape, rng)) for shape in shapes]
    matrices = [torch.nn.Parameter(HiddenMuon.as_matrix(w.detach()).clone()) for w in weights]
    ours = HiddenMuon(weights, 0.01, dtype=torch.bfloat16)
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


def test_a_training_tells_its_story(trained):
    info = load_model(trained.folder / "checkpoints" / "score.pt").info
    assert info["training_images"] == 24 and info["images_seen"] == 48 and info["step"] == 12
    assert info["hardware"] == utils.hardware(torch.device("cpu")) and 0 < info["hours"] < 0.1
    assert info["options"]["lr"] == train_score.LR and info["options"]["sigmas"] == (0.01, 1.0)
    assert info["torch"] == torch.__version__ and info["earlier"] == {}
    first, second, *_, validation, test, end = trained.out.splitlines()
    model = ScoreModel("unet", 0.01, 1.0, (8,), (1,), (0,))
    count = sum(p.numel() for p in model.parameters())
    assert first == f"unet, {count:,} parameters, on {info['hardware']}"
    assert second == "24 training images, 12 steps, from step 0"
    assert validation.startswith("step 12: val PSNR") and test.startswith("step 12: test PSNR")
    for line, psnr in ((validation, info["val_psnr"]), (test, info["test_psnr"])):
        for sigma, value in psnr.items():
            assert f"{value:.2f} dB at {sigma:g}" in line
    assert end.startswith("48 images seen") and "score_training.png" in end
    assert trained.err == ""  # the bar is for terminals


def test_a_psnr_is_of_its_images_and_of_the_averaged_weights(trained, data):
    network = load_checkpoint(trained.folder / "checkpoints" / "score.pt")
    assert equal(network["weights"], trained.state["average"])
    model, levels = ScoreModel(**network["config"]), (0.02, 0.05, 0.1, 0.2, 0.5)
    images, tests = (np.load(data / f"{name}.npy") for name in ("images", "test"))
    for name, seen in (("val_psnr", images[-16:]), ("test_psnr", tests)):
        measured = {}
        for kind in ("average", "model"):
            model.load_state_dict(trained.state[kind])
            seen_as = torch.from_numpy(seen).permute(0, 3, 1, 2)
            measured[kind] = train_score.validate(model, seen_as, levels)
        for sigma, psnr in trained.state[name].items():
            assert abs(psnr - measured["average"][sigma]) < 1e-6
            assert abs(psnr - measured["model"][sigma]) > 1e-5


def test_what_is_trained_on_and_measured_is_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, tests = pixels(9, 7, 8, seed=10), pixels(1003, 5, 6, seed=11)
    np.save("images.npy", images)
    np.save("tests.npy", tests)
    numbers = {"DATA": "images.npy", "TEST": "tests.npy", "VAL_IMAGES": 2, "CROP": 4}
    with mock.patch.multiple(train_score, **numbers):
        crops, val, test = train_score.read_data(0, "cpu")
    assert np.array_equal(crops.images, images[:7])
    assert np.array_equal(val.permute(0, 2, 3, 1), images[7:, 1:5, 2:6])
    assert np.array_equal(test.permute(0, 2, 3, 1), tests[:1000, :4, 1:5])


def test_validation_measures_the_noise_that_it_adds():
    images, sigmas = torch.full((150, 3, 8, 8), 128, dtype=torch.uint8), (0.02, 0.1)
    z = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    for sigma, value in train_score.validate(lambda x, sigma: x, images, sigmas).items():
        errors = (sigma * z).square().mean((1, 2, 3))
        assert abs(value - (-10 * errors.log10()).mean()) < 1e-3
    exact = train_score.validate(lambda x, sigma: torch.full_like(x, 128 / 255), images, (0.1,))
    assert exact[0.1] > 100


@pytest.mark.parametrize(
    "epochs, logged, validated",  # in steps, six and a quarter an epoch
    [
        (1, range(1, 8), range(1, 8)),
        (5, range(3, 32, 3), range(1, 33)),  # at least ten of each
        (9, range(5, 58, 5), range(1, 58, 2)),  # of 57, the last too
    ],
)
def test_curves_have_points_enough(tmp_path, images, epochs, logged, validated):
    with mock.patch.object(train_score, "validate", lambda *of: {0.1: 20.0}):
        train(tmp_path, DATA=images, EPOCHS=epochs, VAL_IMAGES=15)
    state = state_of(tmp_path)
    assert [seen // 4 for seen, _ in state["losses"]] == list(logged)
    assert [seen // 4 for seen, _ in state["psnrs"]] == list(validated)


def test_the_curves_are_a_table_too(trained):
    path = trained.folder / "figures" / "score_training.csv"
    rows = {int(row["images"]): row for row in csv.DictReader(path.read_text().splitlines())}
    assert list(rows) == list(range(4, 49, 4))
    assert [[seen, float(row["loss"])] for seen, row in rows.items()] == trained.state["losses"]
    for seen, psnr in trained.state["psnrs"]:
        assert {s: float(rows[seen][f"PSNR at {s:g}"]) for s in psnr} == psnr


def test_the_recipe_of_the_docstring_runs(tmp_path, images):
    command = re.search(r"train_score\.py (--network cnn3 (?:.*\\\n)?.*?)  +#", train_score.__doc__)
    line = command[1].replace("\\\n", " ") + f" --data {images} --epochs 2 --crop 8"
    run(tmp_path, line + " --val-images 16 --device cpu --batch-size 8")
    state = state_of(tmp_path, "cnn3")
    assert equal(state["model"], state["average"])  # no average
    assert list(state["val_psnr"]) == [0.1]  # the level that it was trained for
    assert state["optimizer 0"]["param_groups"][0]["lr"] == 1e-4  # not fallen at the end
    model = load_model(tmp_path / "checkpoints" / "cnn3.pt")
    assert model.config == {"network": "cnn3", "sigma_min": 0.1, "sigma_max": 0.1}


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


def test_a_training_saves_every_some_minutes(tmp_path, images):
    clock, saved = iter(range(0, 1000, 30)), []  # each step takes 30 seconds

    def save(run, *files):
        saved.append((run["step"], round(3600 * run["hours"])))

    with (
        mock.patch.object(train_score, "save", save),
        mock.patch.object(train_score, "time", SimpleNamespace(perf_counter=clock.__next__)),
    ):
        train(tmp_path, DATA=images, SAVE_MINUTES=1.25)
    assert saved == [(step, 30 * step) for step in (3, 6, 9, 12, 12)]


def test_a_folder_loses_what_is_small_or_broken(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for name, size in (("a", (40, 33)), ("b", (33, 50)), ("small", (40, 31)), ("z", (32, 32))):
        Image.fromarray(pixels(1, *size, seed=12)[0]).save(folder / f"{name}.png")
    Image.fromarray(pixels(1, 32, 40, seed=13)[0, :, :, 0]).save(folder / "grey.png")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:500])
    out = train(tmp_path, DATA="photographs", VAL_IMAGES=1, CROP=32)
    assert "small" in out and "broken" in out
    assert "3 training images, 2 steps" in out


def test_cifar10_is_trained_on_without_libraries_for_images(tmp_path, images, monkeypatch):
    for library in ("OpenImageIO", "skimage"):
        monkeypatch.setitem(sys.modules, library, None)
    array = np.load(images)
    monkeypatch.setattr(utils, "_cifar10", lambda folder, train: array if train else array[:7])
    out = train(tmp_path, DATA="cifar10", TEST="cifar10", EPOCHS=1)
    assert "24 training images" in out and "test PSNR" in out


# -----------------------------------------------------------------------------
# Going on
# -----------------------------------------------------------------------------


def test_a_training_stopped_between_any_steps_ends_the_same(trained, images, data, tmp_path):
    here = {"DATA": images, "TEST": str(data / "test.npy")}
    for steps, number in ((1, signal.SIGINT), (4, signal.SIGTERM), (2, signal.SIGINT)):
        stopped(tmp_path, steps, number, **here)
    state = state_of(tmp_path)
    assert state["step"] == 7 and state["images_seen"] == 28
    path = tmp_path / "checkpoints" / "score_resume.pt"
    utils.save_checkpoint(path, state | {"hours": 5.0, "hardware": "a GPU"})
    train(tmp_path, **here)
    ended, named = state_of(tmp_path), f"a GPU, then {trained.state['hardware']}"
    assert same_training(ended, trained.state | {"hardware": named})
    assert 5 < ended["hours"] < 5.1


@pytest.mark.skipif(sys.platform == "win32", reason="there, signals end a process at once")
def test_a_training_killed_while_it_runs_goes_on(trained, tmp_path):
    process = start(tmp_path, f"{trained.line} --save-minutes 0")
    while not (tmp_path / "checkpoints" / "score_resume.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert state_of(tmp_path)["step"] > 0
    out, _ = run(tmp_path, trained.line)
    assert "from step 0" not in out and same_training(state_of(tmp_path), trained.state)
    names = {path.name for path in train_score.files_of("score")} - {"score_training.png"}
    assert {path.name for path in contents(tmp_path)} - {"score_training.png"} == names


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
    for other, word in (
        ({"WIDTHS": (16,)}, r"--widths was \(8,\), not \(16,\)"),
        ({"EMA": 0.5}, "--ema was 0.999, not 0.5"),
        ({"FLIP": False}, "--flip"),
        ({"BATCH_SIZE": 2}, "--batch-size"),
        ({"SEED": 1}, "--seed"),
        ({"DATA": str(data / "test.npy")}, "other images"),
    ):
        with pytest.raises(ValueError, match=f"score_resume.pt.*{word}.*--name"):
            train(tmp_path, **here | other)
    assert contents(tmp_path) == before
    state, short = load_checkpoint(resume), {"net.head.bias": torch.zeros(2)}
    for change in ({"model": {}}, {"average": short}, {"optimizer 0": {}}, {"options": {}}):
        utils.save_checkpoint(resume, state | change)
        with pytest.raises(ValueError, match="(?s)score_resume.pt.*--name"):
            train(tmp_path, **here | {"EPOCHS": 2})
    resume.write_bytes(before[resume][:-100])
    with pytest.raises(ValueError, match="score_resume.pt.*damaged"):
        train(tmp_path, **here)
    resume.unlink()
    with pytest.raises(ValueError, match="score.pt.*--name"):
        train(tmp_path, **here)


def test_a_training_starts_from_a_checkpoint(trained, images, tmp_path):
    kept = load_checkpoint(trained.folder / "checkpoints" / "score.pt")
    kept["info"]["earlier"] = {"images_seen": 1000, "hours": 2.0}
    utils.save_checkpoint(tmp_path / "first.pt", kept)
    here = {"DATA": images, "INIT": "first.pt", "EPOCHS": 1}
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


def test_a_divergence_keeps_the_last_state(images, tmp_path):
    here = {"DATA": images, "NETWORK": "cnn3", "SIGMAS": (0.1,)}
    here |= {"OPTIMIZER": "adam", "DECAY": 0, "BATCH_SIZE": 24}
    train(tmp_path, **here, LR=1e-4, EPOCHS=1)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="the training diverged before step .*kept, lower --lr"):
        train(tmp_path, **here, LR=100.0, EPOCHS=50)
    assert contents(tmp_path) == before


def test_a_loss_or_weight_that_is_no_number_is_a_divergence():
    run = {"step": 30, "loss_sum": 40.0, "loss_steps": 4, "model": ScoreModel("cnn3", 0.1, 0.1)}
    train_score.check_divergence(run)
    broken = ScoreModel("cnn3", 0.1, 0.1)
    broken.net.layers[0].bias.data[0] = math.inf
    for change in ({"loss_sum": 1e6}, {"loss_sum": math.nan}, {"model": broken}):
        with pytest.raises(ValueError, match="diverged before step 30"):
            train_score.check_divergence(run | change)


def test_a_place_that_cannot_be_written_is_found_before_training(images, tmp_path):
    (tmp_path / "figures" / "score_training.csv").mkdir(parents=True)
    no_training = mock.patch.object(train_score, "make_batch", None)
    with no_training, pytest.raises(OSError, match="score_training.csv.*cannot be written"):
        train(tmp_path, DATA=images)


def test_one_training_at_a_time_has_a_name(images, tmp_path):
    with (
        contextlib.chdir(tmp_path),
        utils.locked(*train_score.files_of("score")),
        pytest.raises(ValueError, match="another process.*score.pt"),
    ):
        train(tmp_path, DATA=images)


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot be sent Ctrl-C there")
def test_ctrl_c_while_modules_load_ends_without_a_word(tmp_path):
    slow = "import time\nprint('loading', flush=True)\ntime.sleep(60)"
    (tmp_path / "numpy.py").write_text(slow)
    process = start(tmp_path, "--data samples", PYTHONPATH=str(tmp_path))
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "") and process.returncode == -signal.SIGINT


@pytest.mark.parametrize(
    "wrong, words",
    [
        ("--data nowhere", "nowhere"),
        ("--test nowhere", "nowhere"),
        ("--init nowhere.pt", "no checkpoint at 'nowhere.pt'"),
        ("--val-images 40", "--val-images must leave some of the 40 images"),
        ("--val-images 0", "--val-images must leave some of the 40 images"),
        ("--crop 33", "33 x 33"),
        ("--sigmas 0.1 0.2 0.3", "--sigmas must be"),
        ("--tails 0.7", "--tails must lie between 0 and 0.5, not 0.7"),
        ("--optimizer sgd", "--optimizer must be muon or adam, not sgd"),
        ("--batch-size 0", "--batch-size must be a positive multiple"),
        ("--clip 0", "--clip must be positive, not 0"),
        ("--name ../other", "--name must be up to 100 letters"),
        ("--seed -1", "--seed must not be negative"),
        ("--epoch 3", "--epoch"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(images, tmp_path, wrong, words):
    # All of them but for these: without them the training runs, as the fixture `trained` shows.
    _, err = run(tmp_path, f"--data {images} {LINE} {wrong}", code=2)
    assert err.startswith("train_score.py: error: ") and err.count("\n") == 1 and words in err
    assert not contents(tmp_path)


# -----------------------------------------------------------------------------
# More than one process
# -----------------------------------------------------------------------------

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1")
TORCHRUN += ("--nproc-per-node=2",)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
def test_two_processes_equal_one_and_a_signal_to_one_stops_both(images, tmp_path):
    # Adam, since the signs of Muon's small singular values tell roundings apart.
    line = f"--data {images} {LINE} --optimizer adam --save-minutes 0 --epochs 20"
    process = start(tmp_path, line, TORCHRUN)
    resume = tmp_path / "checkpoints" / "score_resume.pt"
    while not resume.exists() and process.poll() is None:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    two = state_of(tmp_path)
    assert f"stopped after step {two['step']} of 120" in out, out + err
    assert out.count("120 steps, from step 0") == 1  # the first process speaks
    assert two["hardware"].startswith("2 x ") and "abort" not in err.lower()

    one = tmp_path / "one"
    one.mkdir()
    stopped(one, two["step"], DATA=images, OPTIMIZER="adam", EPOCHS=20)
    state = state_of(one)
    torch.manual_seed(train_score.SEED)
    first = ScoreModel("unet", 0.01, 1.0, (8,), (1,), (0,)).state_dict()
    for name, weight in state["model"].items():
        moved = (weight - first[name]).norm()
        assert (two["model"][name] - weight).norm() <= 1e-3 * moved
    assert abs(float(two["loss_sum"]) - float(state["loss_sum"])) < 1e-3
    np.testing.assert_allclose(two["losses"], state["losses"], rtol=1e-4)


@pytest.mark.parametrize("rank, order", [(0, ["reads", "waits"]), (1, ["waits", "reads"])])
def test_the_first_process_downloads_before_the_others_read(monkeypatch, rank, order):
    events = []
    reads = mock.Mock(side_effect=lambda *a, **k: events.append("reads") or [*pixels(9, 8, 8, 1)])
    monkeypatch.setattr(utils, "training_images", reads)
    monkeypatch.setattr(train_score, "total", lambda number: events.append("waits"))
    with mock.patch.multiple(train_score, VAL_IMAGES=2, CROP=8):
        train_score.read_data(rank, "cpu")
    assert events == order


def test_processes_share_a_batch_equally():
    with mock.patch.object(train_score, "BATCH_SIZE", 3):
        train_score.check_options(1)
        with pytest.raises(ValueError, match="multiple of the number of processes, 2, not 3"):
            train_score.check_options(2)

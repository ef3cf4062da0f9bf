"""Each script as a user calls it: small, in an empty folder, and once in a process of its own."""

import contextlib
import csv
import functools
import io
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import fft, ndimage
from torchvision.datasets import CIFAR10

import denoise
import sde
import train_score
import utils
from model import ScoreModel, load_model

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "--widths 32 32 --blocks 1 1 --attention 0 1 --features 96 --sigma-min 0.01 --sigma-max 1 --batch-size 4 --epochs 2 "
    "--warmup 5 --val-images 64 --log-steps 5 --device cpu"
)


def start(folder, script, line):
    command = [sys.executable, ROOT / script, *line.split()]
    return subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def call(folder, script, line, code=0):
    """Run a script in a process of its own; return what it wrote to stdout and stderr."""
    process = start(folder, script, line)
    out, err = process.communicate(timeout=900)
    assert process.returncode == code, out + err
    return out, err


def run(folder, script, line, code=0):
    """As `call`, but in this process, which has loaded its modules already."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    before, found = signal.getsignal(signal.SIGINT), 0
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with mock.patch.object(sys, "argv", [script, *(line.split() if isinstance(line, str) else line)]):
                runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stop:
            found = stop.code
    signal.signal(signal.SIGINT, before)
    out, err = (stream.buffer.getvalue().decode() for stream in (out, err))
    assert found == code, out + err
    return out, err


@pytest.fixture
def refuses(monkeypatch, capsys):
    """Run a script in this process; it must stop with code 2 and one line that says what is wrong, and write nothing."""

    def check(folder, script, line, *words):
        before = contents(folder)
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [script, *line.split()])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        err = capsys.readouterr().err.split("\r")[-1]  # after the progress bar, if there was one
        assert stop.value.code == 2 and len(err.strip().splitlines()) == 1 and err.startswith(f"{script}: error: "), err
        for word in words:
            assert word in err
        assert contents(folder) == before

    return check


def contents(folder):
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file() and p.suffix != ".lock"}


@pytest.fixture(scope="session")
def patches(tmp_path_factory):
    """The path of 300 patches of the samples."""
    path = tmp_path_factory.mktemp("patches") / "patches.npy"
    np.save(path, utils.read_patches("samples")[:300].permute(0, 2, 3, 1).numpy())
    return path


@pytest.fixture(scope="session")
def trained(patches, tmp_path_factory):
    """A folder in which a small network was trained on the patches, and those patches."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copy(patches, folder)
    out, err = call(folder, "train_score.py", f"--data patches.npy --test patches.npy {SMALL}")
    assert "step 115 of 118: loss" in out and "epoch 2: validation PSNR" in out and "dB at 0.1" in out and "img/s" not in err
    return folder


# -----------------------------------------------------------------------------
# denoise.py
# -----------------------------------------------------------------------------


def seeded(y):
    return utils.seeded_noise([denoise.Job(None, image, None, 0.1, LEVELS).seed(0) for image in y])


def read_jobs(model):
    return list(denoise.read_jobs(model, "cpu", print, [], []))


LEVELS = sde.noise_levels(0.1, 0.01, 4)
METHODS = {  # calls, and the sampler as it would be called directly
    "mmse": (1, lambda model, y, noise: model(y, 0.1)),
    "sde": (4, functools.partial(sde.adams, levels=LEVELS)),
    "ode": (4, functools.partial(sde.adams, levels=LEVELS, eta=0.0)),
    "euler": (4, functools.partial(sde.reverse_sde, levels=LEVELS, sde=sde.VP())),
    "heun": (7, functools.partial(sde.probability_flow_ode, levels=LEVELS, sde=sde.VP())),
    "ancestral": (4, functools.partial(sde.ancestral, levels=LEVELS)),
    "pc": (7, functools.partial(sde.predictor_corrector, levels=LEVELS)),
    "annealed": (4, functools.partial(sde.annealed_langevin, levels=LEVELS)),
    "langevin": (3, functools.partial(sde.langevin, sigma=0.1, steps=3, step_size=2e-4)),
}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_is_its_sampler(trained, tmp_path, monkeypatch, method):
    calls, sampler = METHODS[method]
    values = {"METHOD": method, "SDE": "vp", "LANGEVIN_STEPS": 3, "LANGEVIN_STEP_SIZE": 2e-4, "OUTPUT": str(tmp_path)}
    for name, value in values.items():
        monkeypatch.setattr(denoise, name, value)
    monkeypatch.setattr(denoise, "STEPS", None if method in ("mmse", "langevin") else 4)
    model = load_model(trained / "checkpoints" / "score.pt")
    jobs = read_jobs(model)[:2]
    denoise.denoise(model, jobs, "cpu", 1, None)
    y = torch.stack([job.y for job in jobs])
    expected = sampler(model, y=y, noise=seeded(y)) if method != "mmse" else sampler(model, y, None)
    torch.testing.assert_close(torch.stack([job.results[method][0][0] for job in jobs]), expected)
    assert jobs[0].results[method][1] == calls == len(jobs[0].frames) and jobs[1].frames == []
    torch.testing.assert_close(torch.stack([job.results["mmse"][0][0] for job in jobs]), model(y, 0.1))
    sigma, state, estimate = jobs[0].frames[0]
    assert abs(sigma / 0.1 - 1) < 1e-6
    torch.testing.assert_close(state, utils.crop(y[0], 256), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(estimate, model(y, 0.1)[0], rtol=1e-3, atol=1e-3)


def test_a_batch_is_of_one_kind(monkeypatch):
    monkeypatch.setattr(denoise, "BATCH_PIXELS", 3 * 64)
    kinds = [(8, 0.1, False)] * 4 + [(8, 0.2, False), (4, 0.2, False), (4, 0.2, False), (4, 0.2, True), (8, 0.1, True)]
    pictures = [utils.Picture(None, (size, 8), None, source="samples#1" * builtin) for size, _, builtin in kinds]
    jobs = [denoise.Job(p, torch.zeros(3, size, 8), None, level, LEVELS) for p, (size, level, _) in zip(pictures, kinds)]
    found = [[next(k for k, other in enumerate(jobs) if other is job) for job in batch] for batch in denoise.batches(jobs)]
    assert found == [[0, 1, 2], [3], [4], [5, 6], [7], [8]]


def printed(out):
    """The table that a script printed, a dictionary a row."""
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_a_run_writes_what_it_did(trained, tmp_path):
    checkpoint = trained / "checkpoints" / "score.pt"
    out, _ = run(tmp_path, "denoise.py", f"--checkpoint {checkpoint} --steps 4 --device cpu")
    rows = printed(out)
    assert list(rows[0]) == ["picture", "sigma", "method", "PSNR dB", "SSIM", "expected PSNR", "calls", "seconds"]
    draws, mean = ([float(row["PSNR dB"]) for row in rows if row["method"] == label] for label in ("sde", "mean of 2"))
    assert len(draws) == len(mean) == 6 and all(m > d + 0.3 for d, m in zip(draws, mean))
    assert abs(np.mean(draws[:5]) - draws[5]) < 0.01
    assert {row["method"]: row["calls"] for row in rows} == {"noisy": "0", "mmse": "1", "sde": "4", "mean of 2": "8"}
    for name in utils.SAMPLES:
        for ending in ("mmse", "sde_1", "sde_2"):
            assert Image.open(tmp_path / "output" / f"{name}_{ending}.png").size == (128, 128)
    assert Image.open(tmp_path / "output" / "samples_sde.jpg").width > 500
    assert Image.open(tmp_path / "output" / "samples_sde.gif").n_frames > 3
    frames = sorted(p.name for p in (tmp_path / "output" / "astronaut_sde_frames").glob("*.png"))
    assert frames[0] == "000_estimate_0.1000.png" and frames[-1] == "003_state_0.0100.png" and len(frames) == 8
    with open(tmp_path / "output" / "astronaut_sde.csv", encoding="utf-8") as file:
        curve = list(csv.DictReader(file))
    saved = np.asarray(Image.open(tmp_path / "output" / "astronaut_sde_frames" / "003_estimate_0.0100.png")) / 255
    x0 = dict(utils.read_images("samples"))["astronaut"]
    assert abs(-10 * np.log10(((saved - x0) ** 2).mean()) - float(curve[3]["psnr_estimate"])) < 0.05
    run(tmp_path, "denoise.py", f"--checkpoint {checkpoint} --method mmse --device cpu --no-save-frames --output bare")
    assert not list((tmp_path / "bare").glob("*_frames"))


def test_a_draws_seed_is_of_pixels_and_number():
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    jobs = [denoise.Job(None, image, None, 0.1, LEVELS) for image in (*images, images[0].clone())]
    assert jobs[0].seed(0) == jobs[2].seed(0) and len({job.seed(draw) for job in jobs[:2] for draw in (0, 1)}) == 4


def test_the_noise_can_be_held_while_the_draw_changes(trained, monkeypatch):
    model = load_model(trained / "checkpoints" / "score.pt")

    def seeds_and_noise(seed, draw_seed):
        monkeypatch.setattr(denoise, "SEED", seed)
        monkeypatch.setattr(denoise, "DRAW_SEED", draw_seed)
        job = read_jobs(model)[0]
        return job.y, (job.seed(0), job.seed(1))

    (y, seeds), (y_same, others), (y_other, of_others) = (seeds_and_noise(*pair) for pair in ((0, 0), (0, 7), (1, 0)))
    assert torch.equal(y, y_same) and not torch.equal(y, y_other)
    assert len({*seeds, *others, *of_others}) == 6


@pytest.mark.parametrize("draws, kept", [(1, [0, 0]), (2, [0, 1])])
def test_what_is_written_of_an_own_picture_is_let_go(trained, monkeypatch, tmp_path, draws, kept):
    # Of a large one each image is hundreds of megabytes; draws are kept together, for their mean and spread.
    utils.save_image(tmp_path / "mine.png", torch.rand(3, 16, 20))
    values = {"INPUT": (str(tmp_path / "mine.png"),), "OUTPUT": str(tmp_path / "out"), "SIGMA": 0.1, "STEPS": 2, "DRAWS": draws}
    for name, value in values.items():
        monkeypatch.setattr(denoise, name, value)
    model = load_model(trained / "checkpoints" / "score.pt")
    (job,) = read_jobs(model)
    denoise.denoise(model, [job], "cpu", 0)
    assert [int(job.results[method][0].numel() > 0) for method in ("mmse", "sde")] == kept
    assert len(job.written) == 2 + 4 * (draws > 1) and all(path.exists() for path in job.written)


def test_a_white_priors_doubt_is_its_posterior_variance(monkeypatch, tmp_path):
    # An untrained U-Net is the Wiener estimate for independent pixels of variance c^2: all have c^2 s^2 / (c^2 + s^2) given y.
    monkeypatch.setattr(denoise, "METHOD", "mmse")
    monkeypatch.setattr(denoise, "COMPONENTS", 2)
    model, y, variance = ScoreModel("unet", 0.01, 1.0, (32,), (1,)), torch.rand(3, 20, 30), 0.25**2 * 0.1**2 / (0.25**2 + 0.1**2)
    picture = mock.Mock(shape=(20, 30, 3), alpha=None, source="white", suffix=".png")
    picture.name = "white"
    job = denoise.Job(picture, y, None, 0.1, LEVELS, results={"mmse": [y[None], 1, 0.0]})
    maps = {}
    monkeypatch.setattr(denoise, "write_map", lambda job, kind, variance: maps.update({kind: variance}))
    monkeypatch.setattr(denoise, "OUTPUT", str(tmp_path))
    with mock.patch.object(utils, "save_components", lambda path, middle, *found: path.touch() or maps.update(found=found)):
        denoise.doubt(model, job, "cpu")
    torch.testing.assert_close(maps["uncertainty"], torch.full_like(y, variance))
    torch.testing.assert_close(maps["found"][0], torch.full((2,), variance**0.5))
    assert job.written == [tmp_path / "white_components.png"]
    assert abs(job.rows()[0]["expected PSNR"] + 10 * math.log10(variance)) < 1e-4


def test_levels_follow_texture_and_rho(trained, monkeypatch):
    for name, value in {"SIGMA": 0.2, "TEXTURE": 0.5, "RHO": 3.0, "STEPS": 6, "COUNT": 2}.items():
        monkeypatch.setattr(denoise, name, value)
    jobs = read_jobs(load_model(trained / "checkpoints" / "score.pt"))
    assert [job.picture.name for job in jobs] == list(utils.SAMPLES[:2])
    for job in jobs:
        torch.testing.assert_close(job.levels, sde.noise_levels(0.2, (0.2 * 0.01) ** 0.5, 6, 3.0))


def test_what_is_not_wholly_seen_starts_from_the_top(trained, monkeypatch):
    for name, value in {"MASK": "0.5", "COUNT": 1}.items():
        monkeypatch.setattr(denoise, name, value)
    (job,) = read_jobs(load_model(trained / "checkpoints" / "score.pt"))
    torch.testing.assert_close(job.levels, sde.noise_levels(1.0, 0.01, 30, math.inf))
    assert job.sigma == 0.02


def test_a_picture_in_tiles_is_the_picture_whole(trained):
    model = load_model(trained / "checkpoints" / "score.pt")
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(1, 3, 250, 303, generator=rng)
    torch.manual_seed(0)
    shape = (train_score.WIDTHS, train_score.BLOCKS, train_score.ATTENTION, train_score.FEATURES)
    deep = ScoreModel("unet", 0.01, 1.0, *shape).eval().requires_grad_(False)
    for parameter in deep.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=rng)
    for network in (model, deep):
        torch.testing.assert_close(utils.tiled(network, 256 * 256)(x, 0.1), network(x, 0.1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [3, 1])
def test_a_draw_in_tiles_is_the_draw_whole(monkeypatch, channels):
    model = load_model(utils.find("checkpoints/score_cifar10.pt"))
    y = torch.rand(channels, 300, 64, generator=torch.Generator().manual_seed(0)) / 2
    picture = utils.Picture(None, (300, 64, channels), np.dtype(np.float32))

    def run(pixels):
        monkeypatch.setattr(denoise, "BATCH_PIXELS", pixels)
        job, moves = denoise.Job(picture, y, y, 0.1, LEVELS), []  # where the truth is known, results are kept
        with mock.patch.object(denoise, "write"):
            denoise.denoise(model, [job], "cpu", 0, mock.Mock(update=moves.append))
        in_all, of_doubt = denoise.work(job)
        assert sum(moves) == in_all  # the bar ends where it should
        bar = mock.Mock()
        with mock.patch.object(denoise, "write_map"):
            denoise.doubt(model, job, "cpu", bar)
        assert sum(call.args[0] for call in bar.update.call_args_list) == of_doubt
        return job.results, moves

    (whole, calls), (tiled, steps) = run(300 * 64), run(130**2)
    assert len(calls) == 5 and len(steps) == 5 * 5  # of the tiles
    for method in ("mmse", "sde"):
        assert whole[method][1] == tiled[method][1] and whole[method][0].shape == (1, *y.shape)
        torch.testing.assert_close(tiled[method][0], whole[method][0], rtol=0, atol=1e-3)


def test_pictures_of_several_sizes_and_levels_go_together(trained, tmp_path):
    checkpoint = trained / "checkpoints" / "score.pt"
    (tmp_path / "mixed").mkdir()
    for k, (name, image) in enumerate(utils.read_images("samples")[:3]):
        clean = torch.from_numpy(image[: 40 + k, : 50 + 2 * k]).permute(2, 0, 1)
        noise = 0.1 * k * torch.randn(clean.shape, generator=torch.Generator().manual_seed(k))
        utils.save_image(tmp_path / "mixed" / f"{name}.png", clean * 0.01 + 0.5 + noise)  # the first is all but flat
    out, _ = run(tmp_path, "denoise.py", f"mixed --checkpoint {checkpoint} --steps 3 --device cpu --figures yes")
    assert out.count("noise level estimated") == 3 and "astronaut: noise level estimated at 0.0100, as low as" in out
    assert Image.open(tmp_path / "output" / "coffee_sde.png").size == (54, 42)
    assert (tmp_path / "output" / "mixed_sde.jpg").exists() and (tmp_path / "output" / "mixed_sde.gif").exists()


def test_an_own_picture_gets_no_invented_psnr(trained, tmp_path):
    ((_, x0),) = utils.read_images("samples")[1:2]
    (noisy,) = utils.add_noise([x0[:50, :70]], 0.1, 0)
    utils.save_image(tmp_path / "mine.png", torch.from_numpy(noisy).permute(2, 0, 1))
    line = f"--checkpoint {trained / 'checkpoints' / 'score.pt'} --input mine.png --method mmse --device cpu --precision float32"
    out, _ = run(tmp_path, "denoise.py", line)
    assert "mine: noise level estimated at" in out and "PSNR dB" not in out
    assert [(row["picture"], row["method"]) for row in printed(out)] == [("mine", "mmse")]
    # The file is the network's estimate at the estimated level, and nothing else.
    y = torch.from_numpy(np.asarray(Image.open(tmp_path / "mine.png")) / np.float32(255)).permute(2, 0, 1)[None]
    model = load_model(trained / "checkpoints" / "score.pt")
    sigma, _ = denoise.picture_level(model, y, model.sigma_min, model.sigma_max)
    expected = model(y, sigma)[0].permute(1, 2, 0).clamp(0, 1) * 255
    saved = np.asarray(Image.open(tmp_path / "output" / "mine_mmse.png"))
    assert np.abs(saved - expected.numpy()).max() < 0.51
    out, _ = run(tmp_path, "denoise.py", line + " --add-noise --sigma 1/5")
    assert "| 0.2000 |" in out and "PSNR dB" in out
    assert np.array_equal(np.asarray(Image.open(tmp_path / "output" / "mine_mmse.png")), saved)  # other options, another name
    assert (tmp_path / "output" / "mine_2_mmse.png").exists()


def test_a_folder_loses_only_what_is_unreadable(trained, tmp_path):
    checkpoint = trained / "checkpoints" / "score.pt"
    (tmp_path / "in" / "sub").mkdir(parents=True)
    patches = np.load(trained / "patches.npy")
    for name, patch in (("a.png", patches[0]), ("a.bmp", patches[1]), ("sub/a.png", patches[2])):
        Image.fromarray(patch).save(tmp_path / "in" / name)
    (tmp_path / "in" / "broken.png").write_bytes((tmp_path / "in" / "a.png").read_bytes()[:60])
    line = f"in --checkpoint {checkpoint} --sigma 0.1 --steps 2 --device cpu --components 1"
    for _ in range(2):  # the second time the same files are written, and none of them read
        out, _ = run(tmp_path, "denoise.py", line, code=1)
        assert "broken.png' cannot be read" in out
        found = {p.relative_to(tmp_path / "output").as_posix() for p in (tmp_path / "output").rglob("*_sde.png")}
        assert found == {"a_sde.png", "a_2_sde.png", "sub/a_sde.png"}
    run(tmp_path, "denoise.py", f"in/a.png --output one.png --checkpoint {checkpoint} --sigma 0.1 --steps 2 --device cpu")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "output" / "a_2_sde.png").read_bytes()
    for line, word in (("in --sigma 0.1", "more than one"), ("in/sub/a.png --sigma 0.1 --steps 2", "same command")):
        _, err = run(tmp_path, "denoise.py", f"{line} --output one.png --checkpoint {checkpoint} --device cpu", code=2)
        assert "--output" in err and word in err


def test_a_picture_that_fits_no_option_is_left_out(trained, tmp_path):
    for name, size in (("large.npy", 32), ("small.npy", 8)):
        np.save(tmp_path / name, np.load(trained / "patches.npy")[0, :size, :size])
    line = f"small.npy large.npy --blur 5 --steps 2 --draws 1 --checkpoint {trained / 'checkpoints' / 'score.pt'} --device cpu"
    out, _ = run(tmp_path, "denoise.py", line, code=1)
    few = line.replace("large.npy --blur 5", "large.npy nowhere.png --blur 0.5 --count 1")
    out, _ = run(tmp_path, "denoise.py", few, code=1)
    assert "nowhere.png" in out and "the first 1 pictures" in out and "large" not in out.split("first 1")[1]
    out, _ = run(tmp_path, "denoise.py", line, code=1)
    assert "'small' is left out: --blur must be narrow" in out and (tmp_path / "output" / "large_sde.npy").exists()


def test_a_picture_that_cannot_be_denoised_is_left_out(trained, tmp_path):
    # One value in a thousand is far beyond the range that the others show; --blur cannot be undone there.
    for name, value in (("a", 0.5), ("hot", 1e4), ("z", 0.5)):
        patch = np.load(trained / "patches.npy")[0] / np.float32(255)
        patch[16, 16] = value
        np.save(tmp_path / f"{name}.npy", patch)
    line = f"--blur 1 --white 1 --steps 2 --draws 1 --checkpoint {trained / 'checkpoints' / 'score.pt'} --device cpu"
    out, _ = run(tmp_path, "denoise.py", f"a.npy hot.npy z.npy {line}", code=1)
    assert "'hot' is left out: at noise level" in out and out.count("wrote ") == 2 and "mean of 2" in out
    _, err = run(tmp_path, "denoise.py", f"hot.npy {line}", code=2)
    assert "error: at noise level" in err.splitlines()[-1]


def test_no_name_is_too_odd(trained, tmp_path):
    (tmp_path / "in" / "below").mkdir(parents=True)
    (tmp_path / "in" / "below" / "loop").symlink_to("..")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in" / "link").symlink_to("../elsewhere")
    names = ["in/a$5_2_3$", "in/$x^$", "in/" + 80 * "\N{CJK UNIFIED IDEOGRAPH-65E5}", os.fsdecode(b"in/caf\xe9"), "elsewhere/b"]
    for name in names:
        with open(tmp_path / f"{name}.npy", "wb") as file:
            np.save(file, np.load(trained / "patches.npy")[0])
    line = f"in --sigma 0.1 --steps 2 --checkpoint {trained / 'checkpoints' / 'score.pt'} --device cpu"
    out, _ = run(tmp_path, "denoise.py", line)
    assert out.count("wrote ") == 5 and "left out" not in out and (tmp_path / "output" / "link" / "b_sde.npy").exists()
    assert len(list((tmp_path / "output").rglob("*_uncertainty.png"))) == 5


@pytest.mark.parametrize("name", ["a", 83 * "\N{CJK UNIFIED IDEOGRAPH-65E5}"], ids=["short", "249 bytes"])
def test_all_that_is_written_is_named(trained, tmp_path, name):
    with open(tmp_path / f"{name}.npy", "wb") as file:
        np.save(file, np.load(trained / "patches.npy")[0])
    line = f"{name}.npy --sigma 0.1 --steps 2 --draws 2 --components 1 --checkpoint {trained / 'checkpoints' / 'score.pt'}"
    out, _ = run(tmp_path, "denoise.py", f"{line} --figures yes --device cpu")
    named = {Path(path).name for path in re.findall(r"output/[\w.]+", out)}
    assert named == {path.name for path in (tmp_path / "output").iterdir() if path.name[0] != "."}


def test_a_draw_does_not_depend_on_its_neighbours(trained, tmp_path):
    common = f"--checkpoint {trained / 'checkpoints' / 'score.pt'} --sigma 0.1 --steps 3 --device cpu --draws 2"
    patches = np.load(trained / "patches.npy")[:4]
    for name, part, batch in (("together", patches, 2**18), ("apart", patches[::-1], 1024)):
        np.save(tmp_path / f"{name}.npy", part)
        run(tmp_path, "denoise.py", f"{common} --input {name}.npy --output {name} --batch-pixels {batch}")
    for k in range(4):
        together = np.load(tmp_path / "together" / f"together_{k:05d}_sde_2.npy")
        apart = np.load(tmp_path / "apart" / f"apart_{3 - k:05d}_sde_2.npy")
        assert np.abs(together - apart).max() <= 0.01 * 255  # the same draw; the network's sums may round differently


# -----------------------------------------------------------------------------
# Observations
# -----------------------------------------------------------------------------

HALF = (np.arange(16)[:, None] + np.arange(20)) % 2 == 0  # pixels of a chessboard
SEEN = {  # what is done to a picture, by other means than the script's
    "--mask mask.png": lambda x: x * ~HALF,
    "--blur 0.8": lambda x: ndimage.gaussian_filter(x, (0, 0.8, 0.8), mode="mirror"),
    "--enlarge 2": lambda x: x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2).mean((2, 4)),
}


def test_only_opaque_white_is_missing(tmp_path):
    layer = np.full((16, 20, 4), 255, np.uint8)  # white paint on a transparent layer
    layer[..., 3] = 255 * HALF
    Image.fromarray(layer).save(tmp_path / "layer.png")
    np.save(tmp_path / "label.npy", np.uint8(HALF))  # 0 and 1 of 255
    for name in ("layer.png", "label.npy"):
        assert np.array_equal(denoise.read_mask(str(tmp_path / name)), HALF)
    for value in (0, 255):
        np.save(tmp_path / f"{value}.npy", np.full((16, 20), value, np.uint8))
        with pytest.raises(ValueError, match="--mask must be white where"):
            denoise.read_mask(str(tmp_path / f"{value}.npy"))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("line", SEEN)
def test_what_is_made_of_an_observation_agrees_with_it(trained, tmp_path, line, channels):
    # Whatever the network believes: of every draw the script must see what it was given, to the noise of 0.02.
    rng = np.random.default_rng(0)
    Image.fromarray(np.uint8(255 * HALF)).save(tmp_path / "mask.png")
    x0 = ndimage.gaussian_filter(rng.random((channels, 16, 20)), (0, 2, 2)).astype(np.float32)
    x0 = 0.2 + 0.6 * (x0 - x0.min()) / np.ptp(x0)
    seen = SEEN[line](x0) + 0.02 * rng.standard_normal(SEEN[line](x0).shape)
    np.save(tmp_path / "seen.npy", seen.transpose(1, 2, 0).astype(np.float32))
    checkpoint = trained / "checkpoints" / "score.pt"
    out, _ = run(tmp_path, "denoise.py", f"seen.npy {line} --checkpoint {checkpoint} --steps 12 --device cpu --draws 3")
    assert "PSNR" not in out and "mean of the draws" in out
    draws = [np.load(tmp_path / "output" / f"seen_sde_{k}.npy").transpose(2, 0, 1) for k in (1, 2, 3)]
    for draw in draws:
        assert draw.shape == x0.shape
        off = SEEN[line](draw) - (seen * ~HALF if "mask" in line else seen)
        assert np.sqrt((off**2).mean()) < 0.03
    assert np.abs(draws[0] - draws[1]).max() > 0.05
    np.testing.assert_allclose(np.load(tmp_path / "output" / "seen_mean.npy").transpose(2, 0, 1), sum(draws) / 3, atol=1e-6)
    spread = ndimage.uniform_filter(np.var(draws, axis=0, ddof=1), (1, 5, 5)) ** 0.5
    np.testing.assert_allclose(np.load(tmp_path / "output" / "seen_spread.npy").transpose(2, 0, 1), spread, atol=1e-5)


def test_a_clean_picture_is_observed_with_noise_and_measured(trained, tmp_path):
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "clean.npy", np.load(trained / "patches.npy")[:2, :31])  # 31 rows: one is left over
    checkpoint = trained / "checkpoints" / "score.pt"
    line = f"in --add-noise --enlarge 2 --checkpoint {checkpoint} --steps 4 --device cpu --figures yes"
    out, _ = run(tmp_path, "denoise.py", line)
    assert out.count("| as seen") == 3 and out.count("| mean of 4") == 3 and "| 0.0200 |" in out and "expected" not in out
    assert np.load(tmp_path / "output" / "clean_00001_mean.npy").shape == (30, 32, 3)
    assert Image.open(tmp_path / "output" / "in_sde.jpg").width > 900  # seen, two draws, mean, deviation, clean


def test_a_share_is_missing_of_every_picture():
    seen = denoise.observation((200, 300), mask="0.3")(torch.ones(1, 3, 200, 300))
    assert abs(seen.mean().item() - 0.7) < 0.006 and torch.equal(seen[0, 0], seen[0, 1])  # 3 standard deviations


def test_the_fill_is_a_gaussians_posterior_mean():
    y = torch.rand(2, 3, 16, 20, generator=torch.Generator().manual_seed(0))
    power = sde.natural_power(y).numpy()
    transform = {"axes": (1, 2, 3), "norm": "ortho"}
    expected = 0.5 + fft.idctn(power / (power + 0.1**2) * fft.dctn(y.numpy() - 0.5, **transform), **transform)
    np.testing.assert_allclose(denoise.fill(y, lambda x: x, 0.1, torch.zeros_like(y)), expected, atol=1e-4)


def test_what_is_not_wholly_seen_starts_from_noise():
    y, levels, starts = torch.linspace(0, 1, 6000).view(3, 40, 50), sde.noise_levels(20.0, 0.01, 3), []
    for A in (lambda x: x, None):
        job = denoise.Job(utils.Picture(None, (40, 50, 3), None), y, None, 0.1, levels, A)
        starts.append(denoise.sample(None, [job], "cpu", lambda denoiser, start, noise: start, 0, 0)[0][0])
    assert abs(starts[0].std().item() - 20) < 0.8 and abs(starts[0].mean().item() - 0.5) < 1.1  # 4 standard deviations
    torch.testing.assert_close(starts[1], y)


def test_alpha_grows_with_the_picture(trained, tmp_path):
    image = np.dstack([np.load(trained / "patches.npy")[0, :8, :6], np.arange(48, dtype=np.uint8).reshape(8, 6)])
    Image.fromarray(image).save(tmp_path / "small.png")
    line = f"small.png --enlarge 3 --checkpoint {trained / 'checkpoints' / 'score.pt'} --steps 3 --draws 1 --device cpu"
    run(tmp_path, "denoise.py", line + " --output large.png")
    large = np.asarray(Image.open(tmp_path / "large.png"))
    assert np.array_equal(large[..., 3], image[..., 3].repeat(3, 0).repeat(3, 1))


def test_a_gradient_through_tiles_is_that_of_the_whole(trained):
    model = load_model(trained / "checkpoints" / "score.pt")
    x = torch.rand(1, 3, 180, 200, generator=torch.Generator().manual_seed(0))
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    whole, tiled = (sde.posterior_covariance(f, x, 0.1)[1](v) for f in (model, utils.tiled(model, 150 * 150)))
    torch.testing.assert_close(tiled, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "line, words",
    [
        ("--mask 0.5 --blur 1", ["--mask", "at a time"]),
        ("--mask text.png", ["text.png"]),
        ("--mask small.png --input small.npy", ["--mask", "(8, 9)"]),
        ("--blur 3 --input small.npy", ["--blur", "narrow"]),
        ("--blur -1", ["--blur"]),
        ("--enlarge 0", ["--enlarge"]),
        ("--enlarge 64 --add-noise --input small.npy", ["--enlarge", "sides"]),
        ("--enlarge 200", ["--enlarge", "64"]),
        ("--enlarge 2 --method mmse", ["--method", "--enlarge"]),
        ("--enlarge 2 --components 2", ["--components"]),
        ("--checkpoint nowhere.pt", ["nowhere.pt"]),
        ("--checkpoint damaged.pt", ["damaged.pt", "damaged"]),
        ("--input nowhere.png", ["nowhere.png"]),
        ("--input text.png", ["text.png"]),
        ("--input empty", ["empty"]),
        ("--sigma 0", ["--sigma", "0"]),
        ("--sigma -0.1", ["--sigma", "-0.1"]),
        ("--sigma 25", ["--sigma", "25/255"]),
        ("--sigma 0.001", ["0.001", "0.01 to 1"]),
        ("--sigma 1/0", ["1/0"]),
        ("--seed -1", ["--seed"]),
        ("--seed 4294967296", ["--seed", "4294967295"]),
        ("--draw-seed -1", ["--draw-seed"]),
        ("--draw-seed 4294967296", ["--draw-seed", "4294967295"]),
        ("--blur 1e308", ["--blur"]),
        (f"--rho {10**30}", ["--rho"]),
        (f"--sigma {10**400}/1", ["--sigma"]),
        (f"--batch-pixels {10**30}", ["--batch-pixels"]),
        ("--method mmse --texture 0.5", ["--method mmse", "--texture"]),
        ("--method langevin --rho 3", ["--method langevin", "--rho"]),
        ("--method mmse --steps 3", ["--method mmse", "--steps"]),
        ("--method ode --draws 3", ["--method ode", "--draws", "sde, euler"]),
        ("--method sde --sde vp", ["--method sde", "--sde", "euler, heun"]),
        ("--method sde --langevin-steps 3", ["--langevin-steps"]),
        ("--method sde --langevin-step-size 1e-3", ["--langevin-step-size"]),
        ("--method langevin --langevin-step-size 1e6 --count 1 --probes 0", ["langevin", "diverged"]),
        ("--sigma nan", ["nan"]),
        ("--method magic", ["magic"]),
        ("--steps 0", ["--steps"]),
        ("--steps 2.5", ["--steps"]),
        ("--output x.png", ["--output"]),
        ("--texture 2", ["--texture"]),
        ("--rho 1e-4", ["rho"]),
        ("--sde ito", ["--sde", "ito"]),
        ("--sigmas 0.1", ["--sigmas"]),
        ("--precision half", ["half"]),
    ],
)
def test_denoising_refuses_bad_input_in_one_line(trained, tmp_path, refuses, line, words):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "score_cifar10.pt").write_bytes((trained / "checkpoints" / "score.pt").read_bytes())
    (tmp_path / "damaged.pt").write_bytes((trained / "checkpoints" / "score.pt").read_bytes()[:1000])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty").mkdir()
    Image.fromarray(np.uint8(255 * HALF[:8, :9])).save(tmp_path / "small.png")
    np.save(tmp_path / "small.npy", np.zeros((8, 8), np.uint8))
    refuses(tmp_path, "denoise.py", line, *words)


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_the_first_and_the_last_seed_are_taken(trained, tmp_path, refuses, seed):
    # They come to the data, which are not there.
    line = f"nowhere --seed {seed} --draw-seed {seed} --checkpoint {trained / 'checkpoints' / 'score.pt'}"
    refuses(tmp_path, "denoise.py", line, "nowhere")


def test_cifar10_without_network_or_data_says_what_to_do(trained, tmp_path, refuses, monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", "file:///nowhere/cifar-10-python.tar.gz")
    (tmp_path / "data").mkdir()
    line = f"--input cifar10 --checkpoint {trained / 'checkpoints' / 'score.pt'}"
    refuses(tmp_path, "denoise.py", line, "connect to the network")

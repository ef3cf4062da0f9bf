"""Each script as a user calls it: small, in a subprocess, in an empty folder."""

import csv
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import benchmark
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

import denoise
import sde
import train_score
import utils
from model import ScoreModel, load_model

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--widths 32 32 --blocks 1 1 --batch-size 4 --epochs 2 --warmup 5 --val-images 64 --log-steps 5 --device cpu"


def start(folder, script, line):
    command = [sys.executable, ROOT / script, *line.split()]
    return subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(folder, script, line, code=0):
    process = start(folder, script, line)
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, out + err
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
        err = capsys.readouterr().err
        assert stop.value.code == 2 and len(err.strip().splitlines()) == 1 and err.startswith(f"{script}: error: "), err
        for word in words:
            assert word in err
        assert contents(folder) == before

    return check


def contents(folder):
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder in which a small network was trained on 300 patches of the samples, and those patches as patches.npy."""
    folder = tmp_path_factory.mktemp("trained")
    np.save(folder / "patches.npy", utils.read_patches("samples")[:300].permute(0, 2, 3, 1).numpy())
    out, err = run(folder, "train_score.py", f"--data patches.npy --test patches.npy {SMALL}")
    assert "epoch 2: validation PSNR" in out and "dB at 0.1" in out and "img/s" in err
    return folder


# -----------------------------------------------------------------------------
# train_score.py
# -----------------------------------------------------------------------------


def test_training_writes_a_checkpoint_that_tells_its_story(trained):
    model = load_model(trained / "checkpoints" / "score.pt")
    info = model.info
    assert (model.sigma_min, model.sigma_max) == (0.01, 1.0)
    assert info["training_images"] == 236 and info["images_seen"] == 2 * 236 and info["epochs"] == 2
    assert info["data"] == "patches.npy" and info["options"]["lr"] == train_score.LR
    assert set(info["test_psnr"]) == set(info["val_psnr"]) == {0.02, 0.05, 0.1, 0.2, 0.5}
    noisy = -10 * np.log10(0.1**2)
    assert noisy < info["test_psnr"][0.1] < 40
    assert Image.open(trained / "figures" / "score_training.png").width > 500


def test_training_interrupted_and_resumed_gives_the_same_weights(trained, tmp_path):
    line = f"--data {trained / 'patches.npy'} {SMALL} --save-minutes 0.0001"
    process = start(tmp_path, "train_score.py", line)
    resume = tmp_path / "checkpoints" / "score_resume.pt"
    while process.poll() is None and not (resume.exists() and utils.load_checkpoint(resume)["step"] > 60):  # in epoch 2
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 130 and "run the same command to go on" in out, out + err
    step = utils.load_checkpoint(resume)["step"]
    assert 60 < step < 118
    out, _ = run(tmp_path, "train_score.py", line)
    assert f"going on from step {step}" in out
    resumed, straight = (torch.load(f / "checkpoints" / "score.pt", weights_only=True) for f in (tmp_path, trained))
    assert all(torch.equal(resumed["weights"][k], straight["weights"][k]) for k in straight["weights"])
    assert resumed["info"]["val_psnr"] == straight["info"]["val_psnr"]


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own():
    numbers = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
    o = SimpleNamespace(batch_size=4, seed=0, flip=True, sigma_min=0.01, sigma_max=1.0)
    drawn = [train_score.draw_batch(numbers, step, o)[0][:, 0, 0, 0] * 255 for step in range(6)]
    first, second = (torch.cat(drawn[k : k + 3]).round().int().tolist() for k in (0, 3))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


def test_the_first_step_is_one_learning_rate_of_adam_and_most_of_it_enters_the_average(trained, tmp_path):
    # Adam's first step moves each weight by the learning rate, here at a quarter of its rise and not fallen yet;
    # the first average keeps a tenth of the start.
    line = "--network cnn3 --sigma-min 0.1 --sigma-max 0.1 --optimizer adam --lr 1e-3 --warmup 4 --decay 1 --epochs 1"
    run(tmp_path, "train_score.py", f"--data {trained / 'patches.npy'} {line} --batch-size 236 --val-images 64 --device cpu")
    torch.manual_seed(train_score.SEED)
    before = ScoreModel("cnn3", 0.1, 0.1).state_dict()
    state = utils.load_checkpoint(tmp_path / "checkpoints" / "score_resume.pt")
    for name, weight in before.items():
        move = state["model"][name] - weight
        assert abs(move.abs().median() / (1e-3 / 4) - 1) < 1e-3
        torch.testing.assert_close(state["averaged"][name] - weight, 0.9 * move, rtol=0, atol=1e-7)


def test_training_goes_on_beyond_its_end_only_with_more_epochs(trained, tmp_path, refuses):
    for name, content in contents(trained).items():
        path = tmp_path / name.relative_to(trained)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    line = f"--data patches.npy {SMALL}"
    refuses(tmp_path, "train_score.py", line, "--epochs")
    out, _ = run(tmp_path, "train_score.py", line.replace("--epochs 2", "--epochs 3"))
    assert "going on from step 118" in out and load_model(tmp_path / "checkpoints" / "score.pt").info["epochs"] == 3
    refuses(tmp_path, "train_score.py", line.replace("--widths 32 32", "--widths 32 64"), "score_resume.pt", "--widths", "--name")
    refuses(tmp_path, "train_score.py", line + " --ema 0.5", "score_resume.pt", "--ema", "--name")
    refuses(tmp_path, "train_score.py", "--data samples " + SMALL, "score_resume.pt", "images", "--name")
    (tmp_path / "checkpoints" / "score_resume.pt").write_text("damaged")
    refuses(tmp_path, "train_score.py", line, "score_resume.pt", "damaged")
    (tmp_path / "checkpoints" / "score_resume.pt").unlink()
    refuses(tmp_path, "train_score.py", line, "score.pt", "--name")


def test_training_starts_from_a_checkpoint(trained, tmp_path, refuses):
    start_from = f"--data {trained / 'patches.npy'} {SMALL} --init {trained / 'checkpoints' / 'score.pt'}"
    run(tmp_path, "train_score.py", start_from + " --epochs 1 --lr 1e-9")
    before, after = (load_model(folder / "checkpoints" / "score.pt") for folder in (trained, tmp_path))
    for old, new in zip(before.parameters(), after.parameters()):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-6)
    assert after.info["earlier"]["images_seen"] == before.info["images_seen"] == 2 * after.info["images_seen"]
    refuses(tmp_path, "train_score.py", start_from.replace("--blocks 1 1", "--blocks 1 2") + " --name other", "--init", "(1, 2)")


def test_the_recipe_is_reachable_by_options_and_a_divergence_keeps_the_last_good_state(trained, tmp_path):
    recipe = (
        f"--data {trained / 'patches.npy'} --network cnn3 --sigma-min 0.1 --sigma-max 0.1 --optimizer adam --warmup 0 "
        "--decay 0 --ema 0 --batch-size 64 --val-images 64 --log-steps 1 --device cpu --name cnn3"
    )
    run(tmp_path, "train_score.py", recipe + " --lr 1e-4 --epochs 1")
    model = load_model(tmp_path / "checkpoints" / "cnn3.pt")
    assert model.sigma_min == model.sigma_max == 0.1 and set(model.info["val_psnr"]) == {0.1}
    state = utils.load_checkpoint(tmp_path / "checkpoints" / "cnn3_resume.pt")
    assert all(torch.equal(state["model"][k], state["averaged"][k]) for k in state["model"])  # no averaging
    before = contents(tmp_path)
    _, err = run(tmp_path, "train_score.py", recipe + " --lr 1e30 --epochs 50", code=2)
    assert "not finite at step" in err.splitlines()[-1] and contents(tmp_path) == before


def test_a_loss_that_climbs_is_a_divergence_before_it_is_infinite():
    o = SimpleNamespace(lr=0.1)
    train_score.check_falling([3.0, 0.3, 2.9], 30, o)
    with pytest.raises(ValueError, match="rose from 0.3 to 3.1 at step 30.* --lr 0.1"):
        train_score.check_falling([3.0, 0.3, 3.1], 30, o)


@pytest.mark.parametrize(
    "line, words",
    [
        ("--data nowhere", ["nowhere"]),
        ("--data samples --sigma-min 0", ["0 <"]),
        ("--data samples --sigma-max 0.001", ["0.001"]),
        ("--data samples --network transformer", ["transformer"]),
        ("--data samples --blocks 1 2", ["(1, 2)"]),
        ("--data samples --warmup -5", ["--warmup"]),
        ("--data samples --optimizer sgd", ["--optimizer", "sgd"]),
        ("--data samples --val-images 100000", ["--val-images 100000"]),
        ("--data samples --lr -1", ["--lr", "-1"]),
        ("--data samples --device tpu", ["tpu"]),
        ("--data samples --precision half", ["half"]),
        ("--epoch 3", ["--epoch"]),
    ],
)
def test_training_refuses_bad_input_in_one_line(tmp_path, refuses, line, words):
    refuses(tmp_path, "train_score.py", line, *words)


# -----------------------------------------------------------------------------
# denoise.py
# -----------------------------------------------------------------------------


DIRECT = {
    "mmse": (1, lambda model, y: sde.tweedie(model, y, 0.1)),
    "sde": (4, lambda model, y: sde.adams(model, y, 0.1, 4, generator=seeds(y))),
    "ode": (4, lambda model, y: sde.adams(model, y, 0.1, 4, eta=0.0)),
    "heun": (7, lambda model, y: sde.probability_flow_ode(model, y, 0.1, 4)),
    "edm": (7, lambda model, y: sde.edm(model, y, 0.1, 4, generator=seeds(y))),
    "pc": (7, lambda model, y: sde.predictor_corrector(model, y, 0.1, 4, generator=seeds(y))),
    "annealed": (4, lambda model, y: sde.annealed_langevin(model, y, 0.1, 4, generator=seeds(y))),
    "langevin": (4, lambda model, y: sde.langevin(model, y, 0.1, 4, 2e-4, generator=seeds(y))),
}


def seeds(y):
    return [denoise.image_seed(image, 0) for image in y.permute(0, 2, 3, 1).numpy()]


@pytest.mark.parametrize("method", DIRECT)
def test_each_method_is_its_sampler_and_shows_what_it_did(trained, tmp_path, method):
    checkpoint = trained / "checkpoints" / "score.pt"
    options = "--steps 4 --langevin-steps 4 --langevin-step-size 2e-4 --device cpu --precision float32"
    out, err = run(tmp_path, "denoise.py", f"--checkpoint {checkpoint} --method {method} {options}")
    calls, sampler = DIRECT[method]
    x0 = [image for _, image in utils.read_images("samples")]
    y, x0 = (torch.from_numpy(np.stack(part)).permute(0, 3, 1, 2) for part in (utils.add_noise(x0, 0.1, 0), x0))
    expected = sampler(load_model(checkpoint), y)
    for name, image in zip(utils.SAMPLES, expected):
        saved = np.asarray(Image.open(tmp_path / "output" / f"{name}_{method}.png"))
        assert np.abs(saved - image.permute(1, 2, 0).clamp(0, 1).numpy() * 255).max() < 0.6
    (mean,) = [line.split() for line in out.splitlines() if line.startswith("mean of 5") and line.split()[4] == method]
    assert abs(float(mean[5]) - utils.psnr(expected, x0).mean().item()) < 0.01 and int(mean[7]) == calls
    assert Image.open(tmp_path / "output" / f"samples_{method}_frames.jpg").width > 300
    assert Image.open(tmp_path / "output" / f"samples_{method}_frames.gif").n_frames == {"mmse": 2, "pc": 8}.get(method, 5)
    assert method in err  # the progress bar
    with open(tmp_path / "output" / f"chelsea_{method}.csv", encoding="utf-8") as file:
        curve = list(csv.DictReader(file))
    quality = [utils.psnr(x[1:2], x0[1:2]).item() for x in (y, sde.tweedie(load_model(checkpoint), y, 0.1))]
    assert [row["step"] for row in curve] == [str(k) for k in range({"heun": 4, "edm": 4}.get(method, calls))]
    if method != "edm":  # which adds noise first
        assert np.allclose([float(curve[0]["psnr_state"]), float(curve[0]["psnr_estimate"])], quality, atol=0.01)
        assert float(curve[0]["sigma"]) == 0.1
    assert float(curve[-1]["sigma"]) == (0.1 if method in ("mmse", "langevin") else 0.01)


def test_a_large_picture_in_tiles_is_the_picture_in_one_piece(trained):
    model = load_model(trained / "checkpoints" / "score.pt")
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(1, 3, 150, 203, generator=rng)
    torch.manual_seed(0)
    deep = ScoreModel("unet", 0.01, 1.0, train_score.WIDTHS, train_score.BLOCKS).eval().requires_grad_(False)
    for parameter in deep.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=rng)
    for network in (model, deep):
        torch.testing.assert_close(denoise.tiled(network, x, 0.1, 64 * 64), network(x, 0.1), rtol=1e-4, atol=1e-4)


def test_pictures_of_several_sizes_and_levels_go_together(trained, tmp_path):
    (tmp_path / "mixed").mkdir()
    for k, (name, image) in enumerate(utils.read_images("samples")[:3]):
        clean = torch.from_numpy(image[: 40 + k, : 50 + 2 * k]).permute(2, 0, 1)
        noise = 0.1 * k * torch.randn(clean.shape, generator=torch.Generator().manual_seed(k))
        utils.save_image(tmp_path / "mixed" / f"{name}.png", clean * 0.01 + 0.5 + noise)  # the first is all but flat
    out, _ = run(
        tmp_path, "denoise.py", f"--checkpoint {trained / 'checkpoints' / 'score.pt'} --input mixed --steps 3 --device cpu"
    )
    assert "3 of 3 images" in out and "taken as the lowest trained, 0.01" in out
    assert Image.open(tmp_path / "output" / "coffee_sde.png").size == (54, 42)
    assert (tmp_path / "output" / "mixed_sde_frames.jpg").exists() and (tmp_path / "output" / "mixed_sde_frames.gif").exists()


def test_an_own_picture_gets_no_noise_and_no_invented_psnr(trained, tmp_path):
    ((_, x0),) = utils.read_images("samples")[1:2]
    (noisy,) = utils.add_noise([x0[:50, :70]], 0.1, 0)
    utils.save_image(tmp_path / "mine.png", torch.from_numpy(noisy).permute(2, 0, 1))
    line = f"--checkpoint {trained / 'checkpoints' / 'score.pt'} --input mine.png --method mmse --device cpu --precision float32"
    out, _ = run(tmp_path, "denoise.py", line)
    assert "noise level estimated at" in out and "already in them" in out and "dB" not in out.replace("PSNR dB", "")
    rows = [row.split() for row in out.splitlines() if row.startswith("mine ")]
    assert [row[2:5] for row in rows] == [["noisy", "-", "-"], ["mmse", "-", "-"]]
    # The file is the network's estimate at the estimated level, and nothing else.
    y = torch.from_numpy(np.asarray(Image.open(tmp_path / "mine.png")) / np.float32(255)).permute(2, 0, 1)[None]
    model = load_model(trained / "checkpoints" / "score.pt")
    expected = model(y, utils.estimate_sigma(y[0].permute(1, 2, 0).numpy()))[0].permute(1, 2, 0).clamp(0, 1) * 255
    saved = np.asarray(Image.open(tmp_path / "output" / "mine_mmse.png"))
    assert np.abs(saved - expected.numpy()).max() < 0.51
    out, _ = run(tmp_path, "denoise.py", line + " --add-noise --sigma 0.2")
    assert "0.2 added" in out and " - " not in out


def test_a_draw_of_an_image_does_not_depend_on_the_images_beside_it_or_their_order(trained, tmp_path):
    common = f"--checkpoint {trained / 'checkpoints' / 'score.pt'} --sigma 0.1 --steps 3 --device cpu"
    patches = np.load(trained / "patches.npy")[:4]
    for name, part, batch in (("together", patches, 2**18), ("apart", patches[::-1], 1024)):
        np.save(tmp_path / f"{name}.npy", part)
        run(tmp_path, "denoise.py", f"{common} --input {name}.npy --output {name} --batch-pixels {batch}")
    for k in range(4):
        together = np.asarray(Image.open(tmp_path / "together" / f"together_{k:05d}_sde.png")).astype(int)
        apart = np.asarray(Image.open(tmp_path / "apart" / f"apart_{3 - k:05d}_sde.png")).astype(int)
        assert np.abs(together - apart).max() <= 1  # the same draw; the network's sums may round differently


@pytest.mark.parametrize(
    "line, words",
    [
        ("--checkpoint nowhere.pt", ["nowhere.pt"]),
        ("--checkpoint damaged.pt", ["damaged.pt", "damaged"]),
        ("--input nowhere.png", ["nowhere.png"]),
        ("--input text.png", ["text.png"]),
        ("--input empty", ["empty"]),
        ("--sigma 0", ["--sigma", "0"]),
        ("--sigma -0.1", ["--sigma", "-0.1"]),
        ("--sigma 3", ["3", "0.01 to 1"]),
        ("--sigma nan", ["nan"]),
        ("--method magic", ["magic"]),
        ("--steps 0", ["--steps"]),
        ("--texture 2", ["--texture"]),
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
    refuses(tmp_path, "denoise.py", line, *words)


def test_cifar10_without_network_or_data_says_what_to_do(trained, tmp_path, refuses, monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/nowhere")  # nobody listens there
    (tmp_path / "data").mkdir()
    refuses(tmp_path, "train_score.py", "--data cifar10", "connect to the network")
    refuses(
        tmp_path, "denoise.py", f"--input cifar10 --checkpoint {trained / 'checkpoints' / 'score.pt'}", "connect to the network"
    )


# -----------------------------------------------------------------------------
# benchmark.py
# -----------------------------------------------------------------------------


def test_the_benchmark_prints_its_table_and_draws_the_two_studies(trained, tmp_path):
    recipe = ScoreModel("cnn3", 0.1, 0.1)
    utils.save_checkpoint(tmp_path / "cnn3.pt", {"config": recipe.config, "weights": recipe.state_dict(), "info": {}})
    out, _ = run(
        tmp_path,
        "tests/benchmark.py",
        f"--input {trained / 'patches.npy'} --count 3 --study-count 2 --study-steps 4 --sde-steps 4 --device cpu "
        f"--recipe cnn3.pt --checkpoint {trained / 'checkpoints' / 'score.pt'}",
    )
    rows = [line for line in out.splitlines() if "+-" in line]
    assert len(rows) == 7 and 19 < float(rows[0].split()[1]) < 22  # the noisy images: 20 dB and what clipping gains
    for name in ("langevin_steps.png", "langevin_step_size.png"):
        assert Image.open(tmp_path / "figures" / name).width > 500


def test_the_levels_are_measured_beside_the_wiener_filter(trained, tmp_path):
    patches = trained / "patches.npy"
    line = f"--table levels --levels 0.1 0.5 --input {patches} --train {patches} --count 3 --device cpu --precision float32"
    out, _ = run(tmp_path, "tests/benchmark.py", f"{line} --checkpoint {trained / 'checkpoints' / 'score.pt'}")
    rows = [line.split() for line in out.splitlines() if re.match(r" *0\.[15] ", line)]
    assert [row[0] for row in rows] == ["0.1", "0.5"] and all(row[7] == "+0.000" for row in rows)  # float32 against itself
    assert float(rows[0][1]) < float(rows[0][3])  # the Wiener filter takes noise away
    assert Image.open(tmp_path / "figures" / "levels.png").width > 500


def test_the_wiener_filter_is_the_posterior_mean_of_a_gaussian():
    images = torch.randint(256, (1500, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[:, 1] = images[:, 0]  # two channels that always agree
    x = images.flatten(1).double().numpy() / 255
    y = np.random.default_rng(0).normal(0.5, 0.3, (7, 12))
    covariance = np.cov(x.T, bias=True)
    expected = x.mean(0) + (y - x.mean(0)) @ np.linalg.solve(covariance + 0.2**2 * np.eye(12), covariance)
    result = benchmark.wiener_filter(images)(torch.from_numpy(y).view(7, 3, 2, 2), 0.2)
    np.testing.assert_allclose(result.flatten(1), expected, atol=1e-5)


def test_the_self_ensemble_turns_every_view_back():
    y = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(benchmark.self_ensemble(lambda x, sigma: x * sigma, y, 0.5), y / 2)
    for rotations in (1, 4):
        seen = []
        benchmark.self_ensemble(lambda x, sigma, seen=seen: seen.append(x) or x, y, 0.5, rotations)
        assert len({view.numpy().tobytes() for view in seen}) == 2 * rotations


def test_the_table_of_costs_has_a_row_for_every_denoiser(trained, tmp_path):
    line = f"--table cost --input {trained / 'patches.npy'} --cost-count 2 --sde-steps 2 --seconds 0.01 --device cpu"
    out, _ = run(tmp_path, "tests/benchmark.py", f"{line} --checkpoint {trained / 'checkpoints' / 'score.pt'}")
    for name in ("wavelet", "total variation", "non-local means", "U-Net, float32"):
        assert f"\n{name}" in out
    assert "the samplers' loop" in out and re.search(r"training: [1-9]\d* images/s.* fraction [1-9]\d*%", out)


def test_operations_are_those_of_a_convolution():
    layer, x = torch.nn.Conv2d(8, 16, 3, padding=1), torch.zeros(2, 8, 5, 5)
    assert benchmark.operations(lambda: layer(x)) == 2 * 9 * 8 * 16 * 25 * 2


def test_the_certification_prints_a_row_for_each_sampler(trained, tmp_path):
    checkpoint = trained / "checkpoints" / "score.pt"
    options = "--count 2 --draws 20 --study-steps 4 --device cpu"
    out, _ = run(tmp_path, "tests/certify.py", f"--input {trained / 'patches.npy'} --checkpoint {checkpoint} {options}")
    network, field = out.split("Gaussian random field")
    for name in ("adams", "ddim", "Euler-Maruyama", "edm", "pred.-corrector", "annealed Langevin", "plain Langevin"):
        assert f"\n{name}" in network and f"\n{name}" in field
    (row,) = [line.split() for line in field.splitlines() if line.startswith("adams   ") and line.split()[1] == "20"]
    assert abs(float(row[2]) - 2) < 0.25  # 2 images of 3,072 pixels, 20 draws: some 4 standard errors
    assert (tmp_path / "figures" / "forgetting.png").exists() and (tmp_path / "figures" / "dial.png").exists()

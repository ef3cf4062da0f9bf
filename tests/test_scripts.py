"""Each script as a user calls it: small, in an empty folder, and once in a process of its own."""

import contextlib
import copy
import csv
import functools
import io
import math
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
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
from model import ScoreModel, load_checkpoint, load_model

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


def test_the_curves_are_a_table_too(trained):
    state = load_checkpoint(trained / "checkpoints" / "score_resume.pt")
    with open(trained / "figures" / "score_training.csv", encoding="utf-8") as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file)}
    assert [[step, float(rows[step]["loss"])] for step, _ in state["losses"]] == state["losses"] != []
    for step, psnr in state["psnrs"]:
        assert {float(s): float(rows[step][f"PSNR at {s}"]) for s in psnr} == psnr
    assert list(rows) == sorted(rows) and rows[118]["images"] == "472" and rows[118]["loss"] == ""


def test_a_training_killed_at_any_moment_goes_on(trained, patches, tmp_path):
    # FUZZ=130 ends it 43 times. It saves some times a second; the moments reach from the loading of modules to its end.
    line, rng = f"--data {patches} {SMALL} --save-minutes 0.005", random.Random(0)
    for k in range(int(os.environ.get("FUZZ", 9)) // 3):
        process = start(tmp_path, "train_score.py", line)  # a fork would inherit the threads of torch, and hang
        time.sleep(rng.uniform(2, 7))
        process.send_signal((signal.SIGTERM, signal.SIGKILL, signal.SIGINT)[k % 3])
        process.communicate(timeout=900)
    run(tmp_path, "train_score.py", line)
    assert same_weights(tmp_path, trained)
    names = {path.name for folder in ("checkpoints", "figures") for path in (tmp_path / folder).iterdir()}
    assert names == {".score.lock", "score.pt", "score_resume.pt", "score_training.png", "score_training.csv"}


def same_weights(*folders):
    first, second = (load_checkpoint(folder / "checkpoints" / "score.pt")["weights"] for folder in folders)
    return all(torch.equal(first[name], second[name]) for name in first | second)


@pytest.fixture
def stopping(monkeypatch):
    """Make a training in this process stop before a step, as a signal would."""

    def stop(step):
        calls = iter(range(10**9))
        monkeypatch.setattr(utils, "any_process", lambda condition: condition == [] and next(calls) >= step)

    return stop


def test_a_training_stopped_twice_ends_the_same(trained, patches, tmp_path, stopping):
    line = f"--data {patches} {SMALL}"
    for steps, total in ((7, 7), (0, 7), (56, 63)):  # between two losses that are logged, and four steps into epoch 2
        stopping(steps)
        out, _ = run(tmp_path, "train_score.py", line, code=130)
        assert f"stopped after step {total} of 118" in out and "run the same command to go on" in out
    path = tmp_path / "checkpoints" / "score_resume.pt"
    utils.save_checkpoint(path, load_checkpoint(path) | {"seconds": 1000.0})
    stopping(10**9)
    run(tmp_path, "train_score.py", line)
    ended, straight = (load_checkpoint(folder / "checkpoints" / "score_resume.pt") for folder in (tmp_path, trained))
    assert ended.pop("seconds") > 1000 > straight.pop("seconds") > 0
    assert equal(ended, straight)


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_a_training_is_its_recipe(patches, tmp_path):
    # The same three steps by hand, with every number another than its default.
    line = "--widths 32 32 --blocks 1 1 --attention 0 1 --features 16 --sigma-min 0.02 --sigma-max 2 --tails 0.1 "
    line += "--batch-size 4 --epochs 1 --lr 0.02 --weight-decay 3 --warmup 2 --decay 0.5 --clip 0.1 --ema 0.3 --seed 5 "
    line += "--val-images 288 --val-sigmas 0.1 --log-steps 2 "
    with mock.patch.object(utils, "plot_training") as drawn:
        run(tmp_path, "train_score.py", f"--data {patches} {line} --device cpu --precision float32")
    assert drawn.call_count == 1  # at the end
    images = torch.from_numpy(np.load(patches)[:12]).permute(0, 3, 1, 2)
    torch.manual_seed(5)
    model = ScoreModel("unet", 0.02, 2.0, (32, 32), (1, 1), (0, 1), 16)
    optimizers, averaged, losses = train_score.make_optimizers(model, "muon", 1.0, 3.0), copy.deepcopy(model), []
    for step, (lr, decay) in enumerate(((0.01, 0.1), (0.02, 2 / 11), (0.02 * 2 / 3, 0.25))):
        x0, sigma, noise = train_score.make_batch(images, step, 4, True, lambda u: train_score.noise_law(u, 0.02, 2.0, 0.1), 5)
        loss = train_score.denoising_loss(model, x0, sigma, noise)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        for average, weight in zip(averaged.parameters(), model.parameters()):
            average.data = decay * average + (1 - decay) * weight.data
        losses.append(loss.item())
    state = load_checkpoint(tmp_path / "checkpoints" / "score_resume.pt")
    assert equal(state["model"], dict(model.state_dict())) and abs(state["loss_sum"] / losses[2] - 1) < 1e-6
    for name, average in averaged.state_dict().items():
        torch.testing.assert_close(state["averaged"][name], average)
    assert state["losses"][0][0] == 2 and abs(state["losses"][0][1] / np.mean(losses[:2]) - 1) < 1e-6
    val = torch.from_numpy(np.load(patches)[12:]).permute(0, 3, 1, 2)
    expected = train_score.validate(load_model(tmp_path / "checkpoints" / "score.pt"), val, (0.1,))
    assert abs(state["psnrs"][0][1][0.1] - expected[0.1]) < 1e-4


def test_whole_batches_are_compiled_when_asked(patches, tmp_path):
    # What torch.compile returns is what learns; without a compiler at hand, a stand-in that gives the same.
    line, whole = f"--data {patches} {SMALL} --epochs 1 --val-images 290 --precision float32 --device cpu", []
    for name in ("plain", "fused"):
        fused = mock.patch("torch.compile", lambda model, **how: lambda *batch: whole.append(len(batch[0])) or model(*batch))
        with fused if name == "fused" else contextlib.nullcontext():
            run(tmp_path, "train_score.py", f"{line} --name {name} {'--compile' * (name == 'fused')}")
    plain, fused = (load_checkpoint(tmp_path / "checkpoints" / f"{name}.pt")["weights"] for name in ("plain", "fused"))
    assert whole == [4, 4] and equal(plain, fused)


def test_a_checkpoint_names_all_the_hardware_that_made_it(patches, tmp_path):
    line = f"--data {patches} {SMALL} --val-images 292"  # 8 images, so 2 steps an epoch
    for epochs, here in ((1, "a GPU"), (2, "a CPU"), (2, "idle"), (3, "a CPU"), (4, "a GPU")):
        with mock.patch.object(utils, "hardware", lambda device, world, here=here: here):
            out, _ = run(tmp_path, "train_score.py", f"{line} --epochs {epochs}")
        assert f"parameters, on {here}\n" in out
    assert load_model(tmp_path / "checkpoints" / "score.pt").info["hardware"] == "a GPU, then a CPU, then a GPU"


def test_a_hundred_validations_and_one_of_the_last_weights(patches, tmp_path):
    line = f"--data {patches} --network cnn3 --sigma-min 0.1 --sigma-max 0.1 --optimizer adam --val-images 299 --val-sigmas 0.1"
    for epochs, expected in ((3, [1, 2, 3]), (202, [*range(3, 202, 3), 202])):  # one image, so a step an epoch
        run(tmp_path, "train_score.py", f"{line} --epochs {epochs} --lr 1e-6 --device cpu --name {epochs}")
        state = load_checkpoint(tmp_path / "checkpoints" / f"{epochs}_resume.pt")
        assert [step for step, _ in state["psnrs"]] == expected


def test_validation_measures_the_noise_that_it_adds():
    images, sigmas = torch.full((250, 3, 8, 8), 128, dtype=torch.uint8), (0.02, 0.1)
    z = np.random.default_rng(0).standard_normal((250, 8, 8, 3))
    for sigma, value in train_score.validate(lambda x, sigma: x, images, sigmas).items():
        assert abs(value - np.mean(-10 * np.log10(((sigma * z) ** 2).mean((1, 2, 3))))) < 1e-3
    assert train_score.validate(lambda x, sigma: torch.full_like(x, 128 / 255), images, sigmas)[0.1] > 100


# -----------------------------------------------------------------------------
# More than one process
# -----------------------------------------------------------------------------

TWO = f"{SMALL} --batch-size 5 --decay 0 --val-images 274 --log-steps 4 --precision float32 --val-sigmas 0.1"


def torchrun(folder, line, script=ROOT / "train_score.py"):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]
    command += [script, *line.split()]
    return subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_two_processes_equal_one_that_goes_on(patches, tmp_path):
    # 26 images in batches of 5, so of 3 and 2 to a process, and one image in the last.
    # Adam, since Muon's own arithmetic is in bfloat16, and tells roundings apart by 1e-2.
    line = f"--data {patches} {TWO} --optimizer adam --epochs 4"
    process = torchrun(tmp_path, line)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0 and out.count("epoch 4: validation") == 1, out + err
    (tmp_path / "one").mkdir()
    run(tmp_path / "one", "train_score.py", line)
    assert far_apart(tmp_path, tmp_path / "one") < 1e-5
    for folder in (tmp_path, tmp_path / "one"):
        run(folder, "train_score.py", line.replace("--epochs 4", "--epochs 5"))
    assert far_apart(tmp_path, tmp_path / "one") < 1e-5


def far_apart(*folders):
    first, second = (load_checkpoint(folder / "checkpoints" / "score_resume.pt") for folder in folders)
    torch.manual_seed(0)
    start = ScoreModel("unet", 0.01, 1.0, (32, 32), (1, 1), (0, 1)).state_dict()
    apart, moved = (sum((first["model"][k] - other[k]).square().sum() for k in start) for other in (second["model"], start))
    assert first["step"] == second["step"] >= 20 and moved > 0
    return (apart / moved).sqrt().item()


def test_processes_that_found_another_training_stop(patches, tmp_path):
    # Two machines without a common disk: only the first has what was saved.
    line = f"--data {patches} {TWO} --optimizer adam"
    run(tmp_path, "train_score.py", f"{line} --epochs 1")
    (tmp_path / "elsewhere").mkdir()
    script, command = tmp_path / "second.py", [sys.executable, str(ROOT / "train_score.py"), *line.split(), "--epochs", "2"]
    go = "if os.environ['RANK'] == '1':\n    os.chdir('elsewhere')\n"
    script.write_text(f"import os\n{go}os.execv({command[0]!r}, {command})\n")
    out, err = torchrun(tmp_path, "", script).communicate(timeout=900)
    assert "--name must name a training that all processes find" in err, out + err


def test_a_signal_to_one_process_stops_both(patches, tmp_path):
    process = torchrun(tmp_path, f"--data {patches} {TWO} --epochs 10000 --save-minutes 0.0001")
    resume = tmp_path / "checkpoints" / "score_resume.pt"
    while process.poll() is None and not resume.exists():
        time.sleep(0.05)
    children = [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(children[-1], signal.SIGTERM)
    out, err = process.communicate(timeout=900)
    assert "stopped after step" in out and load_checkpoint(resume)["step"] > 0, out + err


def test_a_process_that_has_ended_has_left_the_others(patches, tmp_path, monkeypatch):
    # Otherwise its threads of communication abort it, now and then, when all is done.
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0, "RANK": 0, "WORLD_SIZE": 1, "TORCHELASTIC_RUN_ID": 1}  # a free port
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    joined = []
    monkeypatch.setattr(utils, "join_processes", lambda join=utils.join_processes: joined.append(join()) or joined[0])
    run(tmp_path, "train_score.py", f"--data {patches} {SMALL} --epochs 1")
    assert joined == [(0, 1)] and not torch.distributed.is_initialized()


def test_shares_weigh_as_much_as_they_hold():
    batch = [torch.arange(5.0) ** 2, torch.arange(5.0)]
    for world in (1, 2, 3, 5, 7):
        shares = [utils.share(batch, rank, world) for rank in range(world)]
        assert abs(sum(weight * parts[0].mean() for parts, weight in shares) - batch[0].mean()) < 1e-6
        assert all(torch.equal(parts[0], parts[1] ** 2) and len(parts[0]) for parts, _ in shares)
        assert max(len(parts[0]) for parts, _ in shares) == math.ceil(5 / world)


# -----------------------------------------------------------------------------
# Every step, and what it is made of
# -----------------------------------------------------------------------------


def drawn(images, step, flip=True, seed=0):
    return train_score.make_batch(images, step, 4, flip, lambda u: 0.01 * 100**u, seed)


def test_an_epoch_shows_every_image_once():
    numbers = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
    seen = [drawn(numbers, step)[0][:, 0, 0, 0] * 255 for step in range(6)]
    first, second = (torch.cat(seen[k : k + 3]).round().int().tolist() for k in (0, 3))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


def test_a_batch_has_one_noise_level_from_each_slice():
    _, sigma, noise = drawn(torch.zeros(10, 3, 4, 4, dtype=torch.uint8), 1)
    slices = (sigma / 0.01).log() / np.log(100) * 4
    assert slices.floor().tolist() == [0, 1, 2, 3] and noise.std() > 0.8


def test_half_of_the_images_are_flipped_left_to_right():
    images = torch.arange(4 * 3 * 4 * 4).view(4, 3, 4, 4).byte()
    flipped = 0
    for step in range(200):
        found, order = drawn(images, step)[0] * 255, train_score.epoch_order(4, 0, step)
        for image, k in zip(found.round().byte(), order):
            assert torch.equal(image, images[k]) or torch.equal(image, images[k].flip(2))
            flipped += torch.equal(image, images[k].flip(2))
    assert abs(flipped / 800 - 0.5) < 4 * 0.5 / 800**0.5
    assert all(torch.equal(drawn(images, s, flip=False)[0], images[train_score.epoch_order(4, 0, s)] / 255) for s in range(9))


def test_every_seed_has_its_own_batches():
    images = torch.arange(64, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
    for first, second in zip(drawn(images, 5, seed=0), drawn(images, 5, seed=1)):
        assert not torch.equal(first, second)
    alike = torch.arange(16).byte().view(1, 1, 4, 4).expand(64, 3, -1, -1)  # so that flips alone tell batches apart
    assert len({drawn(alike, 5, seed=seed)[0].numpy().tobytes() for seed in range(9)}) > 3
    for first, second in zip(drawn(images, 5), drawn(images, 5)):
        assert torch.equal(first, second)


def test_the_first_step_is_adams_and_enters_the_average(patches, tmp_path):
    # Adam's first step moves each weight by the learning rate, here at a quarter of its rise and not fallen yet;
    # the first average keeps a tenth of the start.
    line = "--network cnn3 --sigma-min 0.1 --sigma-max 0.1 --optimizer adam --lr 1e-3 --warmup 4 --decay 1 --epochs 1"
    run(tmp_path, "train_score.py", f"--data {patches} {line} --batch-size 236 --val-images 64 --device cpu")
    torch.manual_seed(train_score.SEED)
    before = ScoreModel("cnn3", 0.1, 0.1).state_dict()
    state = load_checkpoint(tmp_path / "checkpoints" / "score_resume.pt")
    for name, weight in before.items():
        move = state["model"][name] - weight
        assert abs(move.abs().median() / (1e-3 / 4) - 1) < 1e-3
        torch.testing.assert_close(state["averaged"][name] - weight, 0.9 * move, rtol=0, atol=1e-7)


def test_only_more_epochs_go_on_beyond_the_end(trained, tmp_path, refuses):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    line = f"--data patches.npy {SMALL}"
    out, _ = run(tmp_path, "train_score.py", line)
    assert "from step 118" in out and "more --epochs" in out and same_weights(tmp_path, trained)
    out, _ = run(tmp_path, "train_score.py", line.replace("--epochs 2", "--epochs 3"))
    assert "from step 118" in out and load_model(tmp_path / "checkpoints" / "score.pt").info["epochs"] == 3
    refuses(tmp_path, "train_score.py", line.replace("--widths 32 32", "--widths 32 64"), "score_resume.pt", "--widths", "--name")
    refuses(tmp_path, "train_score.py", line + " --ema 0.5", "score_resume.pt", "--ema", "--name")
    refuses(tmp_path, "train_score.py", "--data samples " + SMALL, "score_resume.pt", "images", "--name")
    (tmp_path / "checkpoints" / "score_resume.pt").write_text("damaged")
    refuses(tmp_path, "train_score.py", line, "score_resume.pt", "damaged")
    (tmp_path / "checkpoints" / "score_resume.pt").unlink()
    refuses(tmp_path, "train_score.py", line, "score.pt", "--name")


def test_an_end_cut_short_is_completed_next_time(trained, patches, tmp_path):
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    network = tmp_path / "checkpoints" / "score.pt"
    for old in (None, b"cut short"):
        network.unlink() if old is None else network.write_bytes(old)
        out, _ = run(tmp_path, "train_score.py", f"--data {patches} {SMALL}")
        assert "from step 118" in out and same_weights(tmp_path, trained)


def test_the_network_that_is_kept_is_the_average(trained):
    state, kept = (load_checkpoint(trained / "checkpoints" / f"{name}.pt") for name in ("score_resume", "score"))
    assert all(torch.equal(state["averaged"][k], kept["weights"][k]) for k in kept["weights"])
    assert any(not torch.equal(state["model"][k], kept["weights"][k]) for k in kept["weights"])


@pytest.mark.parametrize(
    "path, value",
    [
        (["optimizers"], []),
        (["optimizers", 0, "state"], {}),
        (["optimizers", 0, "state", 3, "exp_avg"], torch.zeros(7)),
        (["optimizers", 0, "state", 3], {"step": torch.tensor(3.0)}),
        (["optimizers", 1, "state", 0, "momentum_buffer"], torch.tensor(math.nan)),
        (["model"], {}),
        (["averaged", "net.head.bias"], torch.full((3,), math.nan)),
        (["losses"], None),
        (["psnrs"], [[59, ["words"]]]),
        (["step"], math.inf),
        (["step"], -1),
        (["seconds"], None),
        (["hardware"], None),
        (["seconds"], math.nan),
        (["loss_sum"], torch.zeros(2)),
        (["made_with"], {}),
        (["made_with", "--of-another-version"], 1),
    ],
)
def test_what_no_training_can_go_on_from_is_refused(trained, patches, tmp_path, refuses, path, value):
    state = load_checkpoint(trained / "checkpoints" / "score_resume.pt")
    part = state
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    utils.save_checkpoint(tmp_path / "checkpoints" / "score_resume.pt", state)
    (tmp_path / "figures").mkdir()
    refuses(tmp_path, "train_score.py", f"--data {patches} {SMALL} --epochs 3", "score_resume.pt", "--name")


@pytest.mark.parametrize("where", ["checkpoints", "figures", "figures/score_training.png", "figures/score_training.csv"])
def test_an_unwritable_file_is_found_before_training(patches, tmp_path, refuses, where):
    path = tmp_path / where
    if path.suffix:
        path.mkdir(parents=True)
    else:
        path.write_text("a file")
    refuses(tmp_path, "train_score.py", f"--data {patches} {SMALL}", where, "cannot be written")


def test_a_disk_that_fills_up_leaves_the_old_files(trained, tmp_path, refuses):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # less than half of the weights
    try:
        line = f"--data patches.npy {SMALL} --epochs 3 --save-minutes 0"
        refuses(tmp_path, "train_score.py", line, "score_resume.pt", "unchanged")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_one_training_at_a_time_has_a_name(patches, tmp_path, refuses):
    with utils.only_process(tmp_path / "checkpoints" / "score.pt", tmp_path / "figures" / "score_training.png"):
        refuses(tmp_path, "train_score.py", f"--data {patches} {SMALL}", "another process", "score.pt")


def test_ctrl_c_while_modules_load_ends_without_a_word(tmp_path, monkeypatch):
    (tmp_path / "imagecodecs.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(60)")  # takes long to load
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    process = start(tmp_path, "train_score.py", "--data samples")
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "") and process.returncode == -signal.SIGINT


def test_training_starts_from_a_checkpoint(trained, patches, tmp_path, refuses):
    kept = load_checkpoint(trained / "checkpoints" / "score.pt")
    kept["info"]["earlier"] = {"images_seen": 1000, "hours": 2.0}
    utils.save_checkpoint(tmp_path / "first.pt", kept)
    start_from = f"--data {patches} {SMALL} --init {tmp_path / 'first.pt'}"
    run(tmp_path, "train_score.py", start_from + " --epochs 1 --lr 1e-9")
    before, after = (load_model(folder / "checkpoints" / "score.pt") for folder in (trained, tmp_path))
    for old, new in zip(before.parameters(), after.parameters()):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-6)
    assert after.info["earlier"]["images_seen"] - 1000 == before.info["images_seen"] == 2 * after.info["images_seen"]
    assert abs(after.info["earlier"]["hours"] - 2 - before.info["hours"]) < 1e-9
    refuses(tmp_path, "train_score.py", start_from.replace("--blocks 1 1", "--blocks 1 2") + " --name other", "--init", "(1, 2)")


def test_images_seen_count_the_short_batches_too():
    training = train_score.Training("any", ScoreModel("cnn3", 0.1, 0.1), [], 26, 5, {})  # 5 steps of 5 images, and one of 1
    for training.step, seen in ((0, 0), (1, 5), (5, 25), (6, 26), (7, 31), (13, 57)):
        assert training.images_seen == seen


@pytest.mark.parametrize("info", [{}, {"images_seen": "many", "hours": 1.0}, {"images_seen": 1, "hours": 1.0, "earlier": 5}])
def test_a_checkpoint_without_its_story_starts_no_training(tmp_path, refuses, info):
    model = ScoreModel("unet", 0.01, 1.0, (32, 32), (1, 1), (0, 1))
    utils.save_checkpoint(tmp_path / "net.pt", {"config": model.config, "weights": model.state_dict(), "info": info})
    refuses(tmp_path, "train_score.py", f"--data samples {SMALL} --init net.pt", "--init", "net.pt", "how long it was trained")


def test_a_divergence_of_the_recipe_keeps_its_last_state(patches, tmp_path):
    recipe = (
        f"--data {patches} --network cnn3 --sigma-min 0.1 --sigma-max 0.1 --optimizer adam --warmup 0 "
        "--decay 0 --ema 0 --batch-size 64 --val-images 64 --log-steps 1 --device cpu --name cnn3"
    )
    run(tmp_path, "train_score.py", recipe + " --lr 1e-4 --epochs 1")
    model = load_model(tmp_path / "checkpoints" / "cnn3.pt")
    assert model.sigma_min == model.sigma_max == 0.1 and set(model.info["val_psnr"]) == {0.1}
    state = load_checkpoint(tmp_path / "checkpoints" / "cnn3_resume.pt")
    assert all(torch.equal(state["model"][k], state["averaged"][k]) for k in state["model"])  # no averaging
    before = contents(tmp_path)
    _, err = run(tmp_path, "train_score.py", recipe + " --lr 100 --epochs 50", code=2)
    assert err.splitlines()[-1].startswith("train_score.py: error: the training diverged") and contents(tmp_path) == before


def test_a_loss_that_climbs_is_a_divergence():
    training = train_score.Training("any", ScoreModel("cnn3", 0.1, 0.1), [], 100, 10, {})
    training.losses, training.step = [[10, 3.0], [20, 0.3]], 30
    training.loss_sum.fill_(29.0)
    assert abs(training.mean_loss() - 2.9) < 1e-6
    training.loss_sum.fill_(31.0)
    with pytest.raises(ValueError, match="diverged before step 30.*3.1 after one of 0.3.*--lr"):
        training.mean_loss()
    training.batch_size = 3  # of 30 images one alone, at a high level, can weigh as much
    assert abs(training.mean_loss() - 3.1) < 1e-6


@pytest.mark.parametrize(
    "line, words",
    [
        ("--data nowhere", ["nowhere"]),
        ("--data samples --sigma-min 0", ["--sigma-min", "1e-06"]),
        ("--data samples --sigma-max 0.001", ["--sigma-max", "0.005", "0.001"]),
        ("--data samples --sigma-max inf", ["--sigma-max", "inf"]),
        ("--data samples --network cnn3", ["cnn3", "one noise level"]),
        ("--data samples --val-sigmas 0.1 nan", ["--val-sigmas", "nan"]),
        ("--data samples --val-sigmas 30", ["--val-sigmas", "30"]),
        ("--data samples --seed -1", ["--seed", "-1"]),
        ("--data samples --seed 4294967296", ["--seed", "4294967295"]),
        ("--data samples --lr 1e308", ["--lr", "1e+308"]),
        ("--data samples --lr nan", ["--lr", "nan"]),
        ("--data samples --device mkldnn", ["mkldnn"]),
        ("--data samples --widths 2048 2048 2048 --blocks 100 100 100", ["2048", "5e8"]),
        ("--data samples --name ..", ["--name"]),
        ("--data samples --name " + "x" * 101, ["--name"]),
        ("--data samples --name " + "\u4e2d" * 100, ["too long"]),
        ("--data samples --init nowhere.pt", ["nowhere.pt"]),
        ("--data samples --network transformer", ["transformer"]),
        ("--data samples --blocks 1 2", ["1, 2"]),
        ("--data samples --name a/b", ["--name", "a/b"]),
        ("--data samples --tails 0.7", ["--tails"]),
        ("--data samples --device meta", ["meta"]),
        ("--data samples --warmup -5", ["--warmup"]),
        ("--data samples --features 0", ["features 0"]),
        ("--data samples --weight-decay -1", ["--weight-decay", "-1"]),
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
def test_both_scripts_take_the_first_and_the_last_seed(trained, tmp_path, refuses, seed):
    # They come to the data, which are not there.
    refuses(tmp_path, "train_score.py", f"--data nowhere --seed {seed} {SMALL}", "nowhere")
    line = f"nowhere --seed {seed} --draw-seed {seed} --checkpoint {trained / 'checkpoints' / 'score.pt'}"
    refuses(tmp_path, "denoise.py", line, "nowhere")


def test_cifar10_without_network_or_data_says_what_to_do(trained, tmp_path, refuses, monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", "file:///nowhere/cifar-10-python.tar.gz")
    (tmp_path / "data").mkdir()
    refuses(tmp_path, "train_score.py", "--data cifar10", "connect to the network")
    line = f"--input cifar10 --checkpoint {trained / 'checkpoints' / 'score.pt'}"
    refuses(tmp_path, "denoise.py", line, "connect to the network")

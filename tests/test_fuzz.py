"""Whatever comes in: a right result or one line that says what is wrong, never a traceback, a hang or a silent wrong result.

python -m pytest tests/test_fuzz.py                                                # some 100 cases, always the same
FUZZ=130 python -m pytest tests/test_fuzz.py --hypothesis-show-statistics          # 130 of each kind, new every time
"""

import io
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_scripts import run

import sde
import train_score
import utils
from model import ScoreModel, load_model

CASES = int(os.environ.get("FUZZ", 13))
fuzz = settings(
    max_examples=CASES,
    deadline=None,
    database=None,
    derandomize="FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
EXTREME = [0.0, -0.0, 1e-320, 1e-300, 1e-16, 1e-3, 0.1, 1.0, 20.0, 1e6, 1e17, 1e300, -1.0, -1e300, math.inf, -math.inf, math.nan]
numbers = st.sampled_from(EXTREME) | st.floats()
integers = st.sampled_from([0, 1, -1, 2, 31, 2**31, 2**32, 2**63, 2**64 - 1, 2**64, -(2**63), 10**30]) | st.integers(-5, 70)
words = st.text(max_size=8) | st.sampled_from(
    ["", ".", "..", "/", "a/b", "none", "nan", "auto", "x" * 300, "\0", "-", "--", "é", "%s"]
)
anything = st.recursive(
    st.none()
    | st.booleans()
    | numbers
    | integers
    | words
    | numbers.map(lambda fill: torch.full((2,), fill, dtype=torch.float64).float()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=2),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a small network as net.pt."""
    folder = tmp_path_factory.mktemp("fuzz")
    torch.manual_seed(0)
    model = ScoreModel("unet", 0.01, 1.0, (32, 32), (1, 1), (0, 1))
    info = {"images_seen": 1, "hours": 1.0}
    utils.save_checkpoint(folder / "net.pt", {"config": model.config, "weights": model.state_dict(), "info": info})
    return folder


def damaged(data, whole):
    """Bytes that were cut, in which one bit is flipped, or a stretch is zero, or in which nothing is."""
    place = data.draw(st.integers(0, len(whole) - 1))
    kind = data.draw(st.sampled_from(["cut", "flip", "zero", "more", "empty"]))
    if kind == "flip":
        return whole[:place] + bytes([whole[place] ^ 1 << data.draw(st.integers(0, 7))]) + whole[place + 1 :]
    stretch = data.draw(st.integers(1, 100))
    return {
        "cut": whole[:place],
        "zero": whole[:place] + bytes(len(whole[place : place + stretch])) + whole[place + stretch :],
        "more": whole + bytes(stretch),
        "empty": b"",
    }[kind]


def refused(folder, script, arguments):
    _, err = run(folder, script, arguments, code=2)
    assert len(err.strip().splitlines()) == 1 and err.startswith(f"{script}: error: "), err


TRAINING = {name: value for name, value in utils.options(vars(train_score)).items() if name not in ("data", "data_dir", "test")}


@fuzz
@given(data=st.data())
def test_options_of_a_training_are_right_or_refused(folder, data):
    # What is right comes to the data, which are not there.
    arguments = ["--data", "nowhere", "--widths", "32", "--blocks", "1", "--attention", "0"]
    for name in data.draw(st.lists(st.sampled_from(sorted(TRAINING)), min_size=1, max_size=3, unique=True)):
        example = TRAINING[name][0] if isinstance(TRAINING[name], tuple) else TRAINING[name]
        kind = {bool: st.just(""), int: integers, float: numbers, str: words}[type(example)] | words
        values = data.draw(st.lists(kind, min_size=1, max_size=5)) if isinstance(TRAINING[name], tuple) else [data.draw(kind)]
        arguments += [f"--{name.replace('_', '-')}", *map(str, values)]
    refused(folder, "train_score.py", arguments)
    assert {path.name for path in folder.iterdir()} == {"net.pt"}


@fuzz
@given(data=st.data())
def test_options_of_a_denoising_are_right_or_refused(folder, data):
    options = ["count", "sigma", "steps", "rho", "texture", "langevin-steps", "langevin-step-size", "draws", "seed", "draw-seed"]
    options += ["batch-pixels", "shown", "method", "sde", "device", "precision"]
    arguments = ["--input", "nowhere", "--checkpoint", "net.pt", "--device", "cpu"]
    for name in data.draw(st.lists(st.sampled_from(options), min_size=1, max_size=3, unique=True)):
        arguments += [f"--{name}", str(data.draw(numbers | integers | words))]
    refused(folder, "denoise.py", arguments)


@fuzz
@given(data=st.data())
def test_a_damaged_network_is_refused_or_unharmed(folder, tmp_path, data):
    path = tmp_path / "net.pt"
    path.write_bytes(damaged(data, (folder / "net.pt").read_bytes()))
    try:
        loaded, before = load_model(path), load_model(folder / "net.pt")
    except ValueError as error:
        assert "net.pt" in str(error)
    else:
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), before.parameters()))


@fuzz
@given(data=st.data())
def test_a_checkpoint_with_wrong_parts_is_refused_or_works(folder, tmp_path, data):
    checkpoint = torch.load(folder / "net.pt", weights_only=True)
    part = data.draw(st.sampled_from([checkpoint, checkpoint["config"], checkpoint["weights"], checkpoint["info"]]))
    part[data.draw(st.sampled_from(sorted(part)) | words)] = data.draw(anything)
    torch.save(checkpoint, tmp_path / "net.pt")
    try:
        assert load_model(tmp_path / "net.pt")(torch.zeros(1, 3, 8, 8), 0.1).isfinite().all()
    except ValueError as error:
        assert "net.pt" in str(error)


@fuzz
@given(
    shape=st.lists(st.integers(0, 9), max_size=5)
    | st.tuples(st.integers(0, 3), st.just(3), st.integers(0, 40), st.integers(0, 40)),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.uint8, torch.int64, torch.complex64, torch.bool]),
    sigma=numbers | st.lists(numbers, max_size=4),
    fill=numbers,
)
def test_any_tensor_is_denoised_or_refused(folder, shape, dtype, sigma, fill):
    model = load_model(folder / "net.pt")
    x = torch.full(shape, fill, dtype=torch.float64).to(dtype)
    try:
        denoised = model(x, sigma)
    except ValueError:
        return
    levels = [sigma] if isinstance(sigma, float) else sigma
    assert denoised.shape == x.shape and denoised.dtype == x.dtype
    assert denoised.isfinite().all() or not abs(fill) < 1e9 or not all(0 < abs(s) < 1e9 for s in levels)


@fuzz
@given(sigma=numbers, sigma_min=numbers, steps=integers.filter(lambda n: n < 1000), rho=numbers)
def test_levels_fall_from_end_to_end_or_are_refused(sigma, sigma_min, steps, rho):
    try:
        levels = sde.noise_levels(sigma, sigma_min, steps, rho).tolist()
    except ValueError:
        return
    assert levels[0] == sigma and len(levels) == (steps if sigma > sigma_min else 1)
    assert len(levels) == 1 or levels[-1] == sigma_min
    assert all(0 < b < a < math.inf for a, b in zip(levels, levels[1:])) and len(sde.falling(levels)) == len(levels) - 1


SAMPLERS = [sde.reverse_sde, sde.probability_flow_ode, sde.ancestral, sde.adams, sde.predictor_corrector, sde.annealed_langevin]


@fuzz
@given(sampler=st.sampled_from(SAMPLERS), levels=st.lists(numbers, max_size=6), ordered=st.booleans())
def test_samplers_end_within_the_prior_or_refuse(sampler, levels, ordered):
    # Pixels of the prior are known but for 1e-3, so whatever the levels, the estimate is there.
    levels = sorted((s for s in levels if s > 0), reverse=True) if ordered else levels
    assume(not any(1e100 < abs(s) < math.inf for s in levels))
    denoiser = lambda x, s: 0.5 + 1e-6 / (1e-6 + float(s) ** 2) * (x - 0.5)  # noqa: E731
    try:
        x = sampler(denoiser, torch.rand(2, 3, 4, 4, dtype=torch.float64), levels)
    except ValueError:
        return
    assert x.isfinite().all() or not all(1e-4 < s < 1e4 for s in levels), levels


@fuzz
@given(data=st.data())
def test_a_damaged_picture_is_refused_or_read(tmp_path, data):
    array = (np.arange(12 * 14 * 3) * 7 % 256).astype(np.uint8).reshape(12, 14, 3)
    suffix = data.draw(st.sampled_from([".png", ".jpg", ".tif", ".bmp", ".gif", ".webp", ".npy"]))
    file = io.BytesIO()
    if suffix == ".npy":
        np.save(file, array)
    else:
        Image.fromarray(array).save(file, {".jpg": "JPEG", ".tif": "TIFF"}.get(suffix, suffix[1:]))
    path = tmp_path / f"a{suffix}"
    path.write_bytes(damaged(data, file.getvalue()))
    try:
        for _, image in utils.read_images(path):
            assert np.isfinite(image).all() and image.ndim == 3
    except ValueError as error:
        assert path.name in str(error)


@fuzz
@given(x=st.lists(numbers, min_size=12, max_size=12))
def test_metrics_and_files_bear_any_pixel(tmp_path, x):
    image = torch.tensor(x, dtype=torch.float64).view(1, 3, 2, 2)
    assert (utils.psnr(image, torch.zeros_like(image)) >= 0).all() or image.isnan().any()
    utils.save_image(tmp_path / "image.png", image[0].nan_to_num())
    saved = np.asarray(Image.open(tmp_path / "image.png")) / 255
    assert np.abs(saved - image[0].nan_to_num().clamp(0, 1).permute(1, 2, 0).numpy()).max() <= 0.51 / 255

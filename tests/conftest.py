"""denoise.py as a user runs it, in this process, with a network that is known in closed form."""

import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

import denoise
import sde
import utils
from model import ScoreModel


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The path of an untrained network. It predicts 0, so D(y, s) = 0.5 + gain(s) (y - 0.5)."""
    model = ScoreModel("unet", 0.01, 1.0, (4,), (1,), (0,), 4)
    path = tmp_path_factory.mktemp("network") / "net.pt"
    content = {"config": model.config, "weights": model.state_dict(), "info": {}}
    utils.save_checkpoint(path, content)
    return path


@pytest.fixture
def run_script(tmp_path, monkeypatch, capfd):
    """Run main() of a script in tmp_path with these words; return what it wrote to stdout, stderr.

    constants: those that are not as in the script unless the words say otherwise.
    """
    monkeypatch.chdir(tmp_path)

    def run_once(script, words, code=0, positional=None, **constants):
        words = words.split() if isinstance(words, str) else words
        monkeypatch.setattr(sys, "argv", [Path(script.__file__).name, *words])
        capfd.readouterr()
        found = 0
        with mock.patch.dict(vars(script), constants):  # and as they were, afterwards
            try:
                utils.run_script(script.main, vars(script), positional)
            except SystemExit as stop:
                found = stop.code
        out, err = capfd.readouterr()
        err = "".join(line for line in err.splitlines(True) if not line.startswith("libpng "))
        assert found == code or found in np.atleast_1d(code), out + err
        return out, err

    return run_once


@pytest.fixture
def run(run_script, checkpoint):
    """Run denoise.py, with `checkpoint` in float32 on the CPU, unless the words say otherwise."""
    denoise.load.cache_clear()
    constants = {"CHECKPOINT": str(checkpoint), "DEVICE": "cpu", "PRECISION": "float32"}

    def run_once(words, code=0):
        with torch.no_grad():
            return run_script(denoise, words, code, "INPUT", **constants)

    return run_once


@pytest.fixture
def lowest(monkeypatch):
    """Let the lowest noise level be found in every image."""
    monkeypatch.setattr(denoise, "image_level", lambda network, y, low, *rest: (low, []))


@pytest.fixture
def bare(monkeypatch):
    """Leave out what takes long: figures, and the samplers' part of an observation."""
    monkeypatch.setattr(denoise, "save_figure", lambda recorded: ())
    monkeypatch.setattr(denoise, "posterior_mean", one_step)
    monkeypatch.setattr(sde, "fill", lambda y, A, sigma, like: like)
    monkeypatch.setattr(sde, "observed", lambda denoiser, y, A, sigma: denoiser)


def one_step(denoiser, y, A, sigma):
    return interpolate(denoiser(y, sigma), scale_factor=denoise.ENLARGE)

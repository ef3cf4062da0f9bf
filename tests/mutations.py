"""Put small wrong changes into the code, one at a time, and count those that the tests notice.

    python tests/mutations.py               # all of them, some 20 minutes
    python tests/mutations.py --only eta    # those with this word in their description

Each line below a file's name is: what is wrong ¦ the right text, which the file holds once ¦ the wrong text ¦ the tests that
must pass without it and fail with it (a group, or a file of tests and pytest's -k). ⏎ stands for the end of a line.
"""

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

project = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(project))

import utils  # noqa: E402

# -----------------------------------------------------------------------------
ONLY = ""  # a word; changes without it in their description are left out
# -----------------------------------------------------------------------------

groups = {
    "training": "scripts: epoch_shows or noise_level_from or flipped or every_seed or validation_measures or shares or climbs or "
    "its_recipe or first_step or stopped_twice or tells_its_story or are_a_table or that_is_kept or unwritable or divergence or "
    "starts_from or go_on_from",
    "denoising": "scripts: each_method or noise_can_be or writes_what or in_tiles or several_sizes or own_picture or "
    "does_not_depend or denoising_refuses or texture or pixels or a_folder or of_one_kind or observ or "
    "alpha_grows or starts_from_noise or share_is",
}
listed = """
train_score.py
    processes at different steps ¦ not utils.differs(training.step) ¦ True ¦ scripts: processes_that_found
    threads of communication kept to the end ¦ utils.leave_processes() ¦ pass ¦ scripts: has_left
    last weights kept ¦ "weights": self.averaged.state_dict() ¦ "weights": self.model.state_dict() ¦ training
    levels from the lowest slice ¦ u = (torch.arange(len(x0), device=x0.device) + torch.rand ¦ u = (0 + torch.rand ¦ training
    noise ignores seed ¦ torch.randn(x0.shape, device=x0.device, generator=rng) ¦ torch.randn(x0.shape, device=x0.device, generator=generator(0, 2, step, x0.device)) ¦ training
    order ignores seed ¦ generator=generator(seed, 0, epoch ¦ generator=generator(0, 0, epoch ¦ training
    flips ignore seed ¦ flipped = torch.rand(len(x0), device=x0.device, generator=rng) ¦ flipped = torch.rand(len(x0), device=x0.device, generator=generator(0, 3, step, x0.device)) ¦ training
    initial weights ignore seed ¦ torch.manual_seed(SEED) ¦ torch.manual_seed(0) ¦ training
    main's batches ignore seed ¦ FLIP, law, SEED) ¦ FLIP, law, 0) ¦ training
    flips never ¦     if flip: ¦     if flip and False: ¦ training
    flips upside down ¦ x0.flip(3) ¦ x0.flip(2) ¦ training
    Muon's rate never updated ¦ for optimizer in self.optimizers:⏎                optimizer.param_groups[0]["lr"] = lr⏎ ¦ for optimizer in self.optimizers:⏎                self.optimizers[0].param_groups[0]["lr"] = lr⏎ ¦ training
    resume drops seconds ¦ self.saved - float(kept["seconds"]) ¦ self.saved ¦ training
    resume drops loss sum ¦             self.loss_sum.copy_(kept["loss_sum"])⏎ ¦  ¦ training
    resume drops losses ¦ for step, loss in kept["losses"]] ¦ for step, loss in []] ¦ training
    earlier not added up ¦ init.info[name] + init.info.get("earlier", {}).get(name, 0) ¦ init.info[name] ¦ training
    validation with twice the noise ¦ model(x0 + sigma * z, sigma) ¦ model(x0 + 2 * sigma * z, sigma) ¦ training
    training levels even in sigma ¦     return log_sigma.exp() ¦     return sigma_min + u * (sigma_max - sigma_min) ¦ model: log_uniform
    typical error at high levels ¦ sigma**2 / 0.07 ¦ sigma**2 / 0.1 ¦ model: typical or loss
    tails of another width ¦ (1 - tails, 0.7) ¦ (1 - 2 * tails, 0.7) ¦ model: log_uniform
    images over 256 ¦ .float() / 255  # (B ¦ .float() / 256  # (B ¦ training
    warmup from zero ¦ (step + 1) / warmup ¦ step / warmup ¦ training
    decay inverted ¦ (1 - step / steps) / decay ¦ (1 - step / steps) * decay ¦ training
    Muon for the last convolution ¦ convolutions[1:-1] ¦ convolutions[1:] ¦ model: muon
    Adam's long memory beside Muon ¦ 0.95 if hidden ¦ 0.999 if hidden ¦ model: lone
    no weight decay in Muon ¦ weight_decay=weight_decay ¦ weight_decay=0.0 ¦ model: muon
    weight decay forgotten ¦ OPTIMIZER, LR, WEIGHT_DECAY) ¦ OPTIMIZER, LR) ¦ training
    Muon's other scale ¦ 0.2 * max(shape) ** 0.5 ¦ max(1, shape[0] / shape[1]) ** 0.5 ¦ model: muon
    Muon's momentum not looked ahead ¦ zip(matrices, torch._foreach_lerp(gradients, means, momentum)) ¦ zip(matrices, means) ¦ model: muon
    average starts slower ¦ self.step / (self.step + 9) ¦ self.step / (self.step + 99) ¦ training
    no clipping ¦             nn.utils.clip_grad_norm_(parameters, clip)⏎ ¦  ¦ training
    divergence later ¦ loss <= 10 * lowest ¦ loss <= 1000 * lowest ¦ training
    trained on validation images ¦ return images[:-VAL_IMAGES], images ¦ return images, images ¦ training
    ema may change on the way ¦ free = ("epochs",  ¦ free = ("ema", "epochs",  ¦ scripts: go_on_beyond
    optimiser's memory not restored ¦                 restore_optimizer(optimizer, saved["state"], {"momentum_buffer"} if isinstance(optimizer, HiddenMuon) else adam)⏎ ¦                 adam⏎ ¦ training
    average not restored ¦             restore(self.averaged, kept["averaged"])⏎ ¦  ¦ training
    no figure of the training ¦         utils.plot_training(self.figure, self.losses, self.psnrs, self.images_at)⏎ ¦  ¦ training
    compiled in vain ¦ self.fast if whole ¦ self.model if whole ¦ scripts: compiled
    short batches compiled ¦ self.fast if whole else self.model ¦ self.fast ¦ scripts: compiled
    last weights not validated ¦ (training.step % validated == 0 or training.step == steps) ¦ training.step % validated == 0 ¦ scripts: hundred
    resume drops hardware ¦             self.hardware = [str(name) for name in kept["hardware"]]⏎ ¦  ¦ scripts: hardware
    features ignored by main ¦ ATTENTION, FEATURES, bfloat16 ¦ ATTENTION, 96, bfloat16 ¦ training
model.py
    weights_only False ¦ weights_only=True ¦ weights_only=False ¦ model: runs_no_code
    sigma_data 0.3 ¦ sigma_data = 0.25 ¦ sigma_data = 0.3 ¦ model: untrained or unit_variance or shipped or outside
    film not zero at the start ¦ for parameter in (self.film.weight, self.film.bias, self.conv2.weight ¦ for parameter in (self.conv2.weight ¦ model
    checksum not checked ¦ if archive.testzip(): ¦ if False: ¦ model: damaged
    embedding's range ¦ torch.logspace(-2, 2, ¦ torch.logspace(-2, 3, ¦ model
    attention sees the padding ¦ there if any(padding) else None ¦ None ¦ model: attention
    attention's temperature ¦ / 8**0.5 ¦ / 8 ¦ model: attention
    no skips ¦ h = self.up[i](h) + skips[i] ¦ h = self.up[i](h) ¦ model
    pads with zeros ¦ mode="replicate" ¦ mode="constant" ¦ model: padding or size
    level not clamped ¦ .clamp(self.sigma_min, self.sigma_max).log() ¦ .log() ¦ model: outside
    film shift forgotten ¦ torch.addcmul(h + shift, h, scale) ¦ torch.addcmul(h, h, scale) ¦ model
    not finite weights pass ¦         if not value.isfinite().all(): ¦         if False: ¦ model: none_of_ours
    network left in training mode ¦ return model.eval().requires_grad_(False) ¦ return model.requires_grad_(False) ¦ model: bit_for_bit
denoise.py
    a transparent layer masks all ¦  & (mask.alpha is None or mask.alpha > 0) ¦  ¦ scripts: opaque
    impulses beside their like ¦ (values == 1) & (ndimage.maximum_filter(values, footprint=ring) < 1) ¦ (values == 1) ¦ uncertainty: salt
    strong lossy noise taken for impulses ¦ max(sigma, brightness))) > 2e-3 ¦ sigma)) > 2e-3 ¦ benchmarks: lossy
    chroma left without noise ¦ denoiser(x + s.view(-1, 1, 1, 1) * (e - e.mean(1, keepdim=True)), s) ¦ denoiser(x, s) ¦ uncertainty: lossy
    pairs of pixels never asked ¦ max(brightness, level(whitened, functools.partial(luma, block=2))) ¦ brightness ¦ benchmarks: lossy
    written pictures kept in memory ¦ job.results[method][0] = torch.empty(1, 0) ¦ pass ¦ scripts: let_go
    one picture stops those beside it ¦ if len(jobs) == 1: ¦ if jobs: ¦ scripts: cannot_be_denoised
    added noise ignores seed ¦ default_rng(SEED) ¦ default_rng(0) ¦ denoising
    draw ignores draw-seed ¦ f"{DRAW_SEED} {draw}" ¦ f"{draw}" ¦ denoising
    draw ignores pixels ¦ zlib.crc32(channel.contiguous().numpy(), crc) ¦ 0 ¦ denoising
    texture ignored ¦ ) ** TEXTURE, ¦ ), ¦ denoising
    rho ignored ¦ steps, RHO or rho) ¦ steps, rho) ¦ denoising
    count ignored ¦ if k == COUNT: ¦ if k == -1: ¦ denoising
    one step holds the method's result ¦ ("mmse", sde.adams, levels[:1], 0) ¦ ("mmse", sampler, levels, 0) ¦ denoising
    batches of several levels ¦ (job.y.shape, job.sigma, job.picture.builtin) ¦ (job.y.shape, job.picture.builtin) ¦ denoising
    batches of several kinds ¦ (job.y.shape, job.sigma, job.picture.builtin) ¦ (job.y.shape, job.sigma) ¦ denoising
    all draws alike ¦ [job.seed(draw) for job in jobs] ¦ [job.seed(0) for job in jobs] ¦ denoising
    mean of draws is the first ¦ [images.mean(0, keepdim=True), len ¦ [images[:1], len ¦ denoising
    texture taken for noise ¦ if sigma < 2 * low and brightness < 0.05: ¦ if True: ¦ uncertainty
    mask inverted ¦ from_numpy(~missing) ¦ from_numpy(missing) ¦ denoising
    observation from the noisy start ¦ + jobs[0].levels[0] * noise(part) if A else part ¦ + 0.5 * noise(part) if A else part ¦ denoising
    levels of an observation from its noise ¦ (high, math.inf) if A ¦ (sigma, math.inf) if A ¦ scripts: wholly_seen
    own picture cut, not enlarged ¦ n // ENLARGE * ENLARGE if made else n * ENLARGE ¦ n // ENLARGE * ENLARGE ¦ denoising
utils.py
    white above the type wraps ¦ min(white, np.iinfo(dtype).max) ¦ white ¦ pictures: white
    large whole numbers in float32 ¦ np.float32 if dtype.itemsize < 4 else np.float64 ¦ np.float32 ¦ pictures: white
    SIGINT not handled ¦ for number in (signal.SIGINT, signal.SIGTERM) ¦ for number in (signal.SIGTERM,) ¦ utils: signal
    grey that lost a step is colour ¦ axis=2).max() <= 1 ¦ axis=2).max() <= 0 ¦ pictures: kind
    all that is nearly grey is grey ¦ image.format == "WEBP" and ¦ mode == "RGB" and ¦ pictures: nearly
    ssim window ¦ "sigma": 1.5 ¦ "sigma": 3.0 ¦ utils: ssim
    ssim without Gaussian weights ¦ "gaussian_weights": True ¦ "gaussian_weights": False ¦ utils: ssim
    tiles off the grid ¦ // 32 * 32 if height ¦ if height ¦ utils scripts: tiles
    shares weigh alike ¦ len(range(rank, count, world)) / count ¦ 1 / world ¦ training
    psnr not clipped ¦ images.clamp(0, 1).double() - x0 ¦ images.double() - x0 ¦ utils: psnr
    readable by the owner alone ¦             os.chmod(temporary, 0o666 & ~UMASK)  # mkstemp makes files that only their owner can read⏎ ¦             pass⏎ ¦ utils pictures
    halo forgotten ¦ slice(max(start - halo, 0), min(start + size + halo, n)) ¦ slice(start, min(start + size, n)) ¦ utils scripts: tiles
    the lock is shared ¦ fcntl.LOCK_EX |  ¦ fcntl.LOCK_SH |  ¦ utils: process
    each image the same noise ¦ rng = np.random.default_rng(seed)⏎    return ¦ return ¦ utils: noise
    pictures truncated, not rounded ¦ (x.clamp(0, 1) * 255).round().byte() ¦ (x.clamp(0, 1) * 255).byte() ¦ utils: saved
sde.py
    levels even in sigma ¦ levels = (a + ramp * (b - a)) ** rho ¦ levels = sigma + ramp * (sigma_min - sigma) ¦ sde: fall_evenly
    Adams extrapolates by the wrong step ¦ (D_s - D) / h, D_s  # correct ¦ (D_s - D), D_s  # correct ¦ sde: adams or orders or order
    Adams' k between eta 0 and 1 ¦ falling(levels), 1 + eta**2, y ¦ falling(levels), 1 + eta, y ¦ sde: eta or adams
    Adams' noise ¦ sqrt(-expm1(-2 * eta**2 * h)) ¦ sqrt(-expm1(-(eta**2) * h)) ¦ sde: adams or order
    ancestral noise ¦ v = eta * s * sqrt(1 - (s / t) ** 2) ¦ v = eta * s * sqrt(1 - s / t) ¦ sde: order or published
    corrector's noise ¦ sqrt((2 - delta) * e) ¦ sqrt(2 * e) ¦ sde: correct
    annealed noise ¦ + sqrt(e / 2) * (z_before ¦ + sqrt(e) * (z_before ¦ sde: annealed or order
    Langevin's noise ¦ sqrt(2 * step_size * temperature) ¦ sqrt(step_size * temperature) ¦ sde: angevin
    last division by alpha ¦     return denoiser(x / sde.alpha(times[-1]), levels[-1])⏎⏎⏎def probability ¦     return denoiser(x, levels[-1])⏎⏎⏎def probability ¦ sde: reverse or draws
    signs become Gaussians ¦ signs = (noise(y).sign() for ¦ signs = (noise(y) for ¦ uncertainty
    components rise ¦ return variances.flip(1),  ¦ return variances,  ¦ uncertainty
    grey noise too weak ¦ zero_sum = sqrt(3) * ¦ zero_sum = sqrt(2) * ¦ uncertainty
    all of what is unresolved is trusted ¦ map(_filter, (trust.sqrt(), ¦ map(_filter, (trust, ¦ observations
    noise of what was seen not squared ¦ return lifted.flatten(1), sigma_y**2 * u ¦ return lifted.flatten(1), sigma_y * u ¦ observations
    directions not made orthogonal ¦             lifted, q = lifted - share * before[0], q - share * before[1]⏎ ¦             q = q - share * before[1]⏎ ¦ observations
    a level judged by all of a picture ¦ return project(y - denoised) ** 2 ¦ return (y - denoised) ** 2 ¦ uncertainty
    noise level's bracket upside down ¦ torch.where(excess > 0, s, below), torch.where(excess > 0, above, s) ¦ torch.where(excess > 0, below, s), torch.where(excess > 0, s, above) ¦ uncertainty
"""  # noqa: E501


@dataclass
class Change:
    what: str
    file: str
    right: str
    wrong: str
    tests: str


def changes():
    """Return all listed changes."""
    found, file = [], None
    for line in filter(None, listed.splitlines()):
        if line[0] != " ":
            file = line
            continue
        what, right, wrong, tests = line.removeprefix("    ").split(" ¦ ")
        found.append(Change(what, file, right.replace("⏎", "\n"), wrong.replace("⏎", "\n"), groups.get(tests, tests)))
    return found


def fail(tests, change=None):
    """Whether the tests fail on a copy of the project, with the change if there is one; raises ValueError if none can be run."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        ignored = shutil.ignore_patterns(".*", "__pycache__", "data", "output", "*_resume.pt")
        shutil.copytree(project, copy, ignore=ignored)
        if change:
            text = (copy / change.file).read_text(encoding="utf-8")
            if text.count(change.right) != 1:
                raise ValueError(f"{change.file} holds {text.count(change.right)} times what '{change.what}' changes")
            (copy / change.file).write_text(text.replace(change.right, change.wrong), encoding="utf-8")
        files, _, words = tests.partition(": ")
        paths = [f"tests/test_{name}.py" for name in files.split()]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *paths]
        code = subprocess.run(command + ["-k", words] * bool(words), cwd=copy, capture_output=True).returncode
        if code > 2:  # 2: ended by a signal, as a wrong change can make it
            raise ValueError(f"the tests '{tests}' could not be run: pytest ended with {code}")
        return code > 0


def main():
    chosen, rows = [change for change in changes() if ONLY in change.what], []
    utils.check(chosen, "ONLY", ONLY, "must be in a description")
    files = dict.fromkeys(name for change in chosen for name in change.tests.partition(":")[0].split())
    if fail(" ".join(files)):
        raise ValueError("the tests fail without a change, so they tell nothing of one")
    for change in tqdm(chosen):
        noticed = "yes" if fail(change.tests, change) else "NO"
        rows.append({"file": change.file, "what is wrong": change.what, "noticed": noticed})
    print(utils.table(rows))
    print(f"{sum(row['noticed'] == 'yes' for row in rows)} of {len(rows)} wrong changes noticed")


if __name__ == "__main__":
    utils.run_script(main, globals())

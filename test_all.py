"""The executable specification: closed forms, optimal denoisers, other people's numbers, real runs.

    python test_all.py              all tests: no network, some minutes on two cores
    python test_all.py mask cache   those with one of these words in their names
    python test_all.py --long       50 kills instead of 6, 1,000 hostile images instead of 100
    pytest test_all.py              the same functions

Every script runs on the CPU here, also beside a GPU: only there are two equal runs equal bit by
bit. Tests against ../shared/vectors (outputs of the authors' code and of scikit-image) are skipped
if that folder is not there. A comment beside an expected value says where it comes from.
"""
import argparse
import contextlib
import copy
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unicodedata
import unittest
import warnings
import zlib
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from unittest import mock

import vmae                                 # before torch, see there
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin, features

import evaluate
import ldm
import sample
import train_ldm
import train_vmae
from vmae import VMAE, Cache, Faces, Gaussian, ImageFolder, InputError

HERE = Path(__file__).absolute().parent
VECTORS = HERE.parent / "shared" / "vectors"
FOLDER = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)           # goes when Python ends
# Weights of VGG and Inception that this machine may have are not used: others have none.
os.environ["TORCH_HOME"] = os.path.join(FOLDER.name, "weights")
LONG = "--long" in sys.argv
CPU = torch.device("cpu")
CUDA = torch.device("cuda")                 # a name, which needs no GPU

TINY_VMAE = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, latent_dim=4)
TINY_VMAE_ROW = {name: value for name, value in TINY_VMAE.items() if name != "img_size"}
TINY_DIT = dict(patch_size=1, hidden_size=32, depth=2, num_heads=4)
ldm.sizes["tiny"] = TINY_DIT                # a tenth of the time
# Two steps of stage one. Of an option that is given twice, the second one counts.
TINY_RUN = "--data data --size 16 --steps 2 --batch 4 --lambda-p 0 --precision float32"
# Two steps of stage two, after trained().
TINY_LDM = "--steps 2 --batch 8 --precision float32"

# How much the tests of chance try: with --long for a quarter of an hour, otherwise for a minute.
EFFORT = dict(kills=6, saves=6, least_kills=3, least_between=1, images=100, batch=8)
if LONG:
    EFFORT = dict(kills=50, saves=100, least_kills=40, least_between=12, images=1000, batch=40)

patch = mock.patch.object
load = functools.partial(torch.load, weights_only=True)

# ---- Helpers ----------------------------------------------------------------------------------

def setup_function():
    """Before each test, here and in pytest, which knows this name: seed 0, and an empty folder."""
    torch.manual_seed(0)
    os.chdir(HERE)
    shutil.rmtree(FOLDER.name)
    os.mkdir(FOLDER.name)
    os.chdir(FOLDER.name)                                  # so that files need only their names
    signal.signal(signal.SIGINT, signal.default_int_handler)   # a training run has changed them
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

def vector(name):
    """A recorded output of the original code, or a skip."""
    path = VECTORS / name
    if not path.exists():
        raise unittest.SkipTest(f"{path} is not here")
    if path.suffix == ".npz":
        return np.load(path)
    return load(path)

def source(name):
    """The text of one of our files."""
    return (HERE / name).read_text(encoding="utf-8")

def close(a, b, tolerance):
    """Fail with the largest difference rather than with two tensors."""
    a = torch.as_tensor(a, dtype=torch.float64).detach()
    b = torch.as_tensor(b, dtype=torch.float64).detach()
    difference = (a - b).abs().max().item()
    assert difference <= tolerance, f"differs by {difference:.3g}, more than {tolerance:.3g}"

def same(a, b, tolerance=0):
    """Assert that two checkpoints are equal, tensor by tensor, but for where they were made."""
    if torch.is_tensor(a):
        close(a, b, tolerance)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"train_args", "path"}:
            same(a[key], b[key], tolerance)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for of_a, of_b in zip(a, b):
            same(of_a, of_b, tolerance)
    else:
        assert a == b

def equal_weights(a, b):
    """Whether two models have the same weights, bit by bit."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)

def all_differ(a, b):
    """Whether two models share no weight matrix: what was changed reached all of their layers."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return not any(torch.equal(p, q) for p, q in pairs if p.ndim > 1)

def close_weights(a, b, tolerance):
    """Fail if a weight of two models differs by more."""
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        close(p, q, tolerance)

def raises(kind, function, *args, **options):
    """The message of the expected exception."""
    with unittest.TestCase().assertRaises(kind) as caught:
        function(*args, **options)
    return str(caught.exception)

def warned(function, *args):
    """-> what a function returns, and the text of its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*args)
    return result, "\n".join(str(warning.message) for warning in caught)

def printed(function, *args):
    """What a function prints."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        function(*args)
    return text.getvalue()

def moments_of(q):
    """mu and logvar of a Gaussian side by side, as published code returns them: (B, 2d, ...)."""
    return torch.cat([q.mu, q.logvar], 1)

def random_images(B=2, size=16, seed=0):
    """(B, 3, size, size) in [-1, 1], the same every time."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(B, 3, size, size, generator=generator) - 1

def random_pixels(shape, seed=0):
    """uint8 of this shape, the same every time."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)

def save_images(folder, count, size=20, seed=0):
    """Photographs of noise, different from each other -> their pixels, uint8 (count, H, W, 3)."""
    pixels = random_pixels((count, size, size, 3), seed)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(Path(folder, f"{i:03d}.png"))
    return pixels

def runs(main, line="", status=0):
    """Run a script's main in this process, on the CPU, with the options of this line, to this exit
    status -> what it said."""
    words = ["script.py", *line.split()]
    if "--device" not in words:
        words += ["--device", "cpu"]
    text = io.StringIO()
    got = 0
    with (patch(sys, "argv", words), warnings.catch_warnings(),
          contextlib.redirect_stdout(text), contextlib.redirect_stderr(text)):
        warnings.simplefilter("always", UserWarning)       # not only the first time
        try:
            vmae.cli(main)
        except SystemExit as stop:
            got = stop.code or 0
            if isinstance(stop.code, str):                 # Python prints it, and exits with 1
                print(stop.code)
                got = 1
    assert got == status, text.getvalue()
    return text.getvalue()

def refuses(main, table, start=""):
    """Run commands with the options in `table`, each of which has to stop with one line that holds
    the words beside it, and to write nothing."""
    news = r"\s*$|device:|pixels of|skipped|learning rate:|.*(tensors read|%\|)"  # %|: bars
    before = set(Path().rglob("*"))
    for options, words in table.items():
        text = runs(main, f"{start} {options}", status=1)
        errors = [line for line in text.splitlines() if not re.match(news, line)]
        assert len(errors) == 1, text
        assert words in errors[0], text
        assert set(Path().rglob("*")) == before

def trained(options="", out="runs/vmae"):
    """Two steps of stage one on the images in data/ -> the autoencoder that they leave in `out`."""
    shutil.rmtree(out, ignore_errors=True)                 # a run is never overwritten
    runs(train_vmae.main, f"{TINY_RUN} --out {out} {options}")
    return vmae.load_vmae(out)

def save_two_classes(one="left", other="right"):
    """data/ with two sub-folders of 12 images each."""
    save_images(f"data/{one}", 12)
    save_images(f"data/{other}", 12, seed=1)

def both_stages():
    """data/ with two classes, and two steps of each stage on it, in runs/vmae and runs/ldm."""
    save_two_classes()
    trained()
    runs(train_ldm.main, TINY_LDM)

def options_of(script, line=""):
    """The options of a trainer: what its command line and its run folder decide."""
    with patch(sys, "argv", ["script.py", *line.split()]):
        args, _, _ = script.read_options()
    return args

def log_of(run):
    """The lines of a run's log.jsonl."""
    lines = Path(run, "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]

def logged(run, name):
    """What each line of a run's log has under this name, None without it."""
    return [line.get(name) for line in log_of(run)]

def names_of_calls(spy):
    """The functions of a mock.Mock in the order in which they were called."""
    return [call[0] for call in spy.mock_calls]

def measured(name, options="", *words):
    """Run a sub-command of evaluate.py, which has to say these words -> the rows of its table,
    which are also its JSON's."""
    text = runs(evaluate.main, f"{name} {options} --out out")
    for word in ("|---|", *words):
        assert word in text, text
    return json.loads(Path("out", f"{name}.json").read_text())["rows"]

def no_constant(name):
    """For strict_json: JSON has neither NaN nor Infinity, which Python's reader accepts."""
    raise ValueError(name)

def strict_json(text):
    """As json.loads, but refuses what other parsers refuse."""
    return json.loads(text, parse_constant=no_constant)

class TinyLpips(torch.nn.Module):
    """Stands in for LPIPS with VGG: its features are the pixels, and the means of 2 x 2 of them."""

    def __init__(self):
        super().__init__()
        self.scaling_layer = torch.nn.Identity()
        self.distances = torch.nn.ModuleList()
        w = torch.ones(1, 3, 1, 1)
        for _ in range(2):
            self.distances.append(vmae.LayerDistance(w))

    def net(self, x):
        return [x, F.avg_pool2d(x, 2)]

@contextlib.contextmanager
def files_up_to(size):
    """The system refuses to make a file larger than this, as if the disk were full. What is printed
    meanwhile is dropped, because it may go to a file as well."""
    import resource                                        # Windows has none
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

# ---- Threads ----------------------------------------------------------------------------------

def test_waiting_threads_spin_little_unless_the_user_decides():
    head = source("vmae.py").split("\nimport numpy")[0]
    cases = [({}, "3000"),
             ({"GOMP_SPINCOUNT": "7"}, "7"),
             ({"OMP_WAIT_POLICY": "active"}, None)]
    for given, spin in cases:
        with mock.patch.dict(os.environ, given, clear=True):
            exec(head, {})
            assert os.environ.get("GOMP_SPINCOUNT") == spin

# ---- Patches and masks ------------------------------------------------------------------------

def test_patchify_cuts_into_patches_and_unpatchify_is_its_exact_inverse():
    x = torch.randn(2, 3, 24, 16)
    patches = vmae.patchify(x, 4)
    assert patches.shape == (2, 24, 48)                    # 6 x 4 patches of 4 x 4 x 3
    patch_5 = patches[0, 5].view(4, 4, 3).permute(2, 0, 1)
    assert torch.equal(patch_5, x[0, :, 4:8, 4:8])         # row 1, column 1
    assert torch.equal(vmae.unpatchify(patches, 4, 24, 16), x)
    raises(ValueError, vmae.patchify, x, 5)                # divides neither 24 nor 16

def test_random_mask_shows_exactly_the_floor():
    for h, w in ((2, 5), (4, 4), (8, 8), (32, 32)):
        for percent in (0, 10, 25, 30, 60, 75, 90):
            keep, mask = vmae.random_mask(3, h, w, percent / 100)
            V = h * w * (100 - percent) // 100             # in whole numbers nothing is rounded
            assert keep.shape == (3, V)
            assert mask.sum(1).tolist() == [h * w - V] * 3
            assert mask.gather(1, keep).sum() == 0         # 1 is masked
    for ratio in (1.0, -0.1, 0.99):                        # these leave none, or more than all
        raises(ValueError, vmae.random_mask, 1, 4, 4, ratio)

def test_random_mask_repeats_by_generator_and_favours_no_patch():
    keep, _ = vmae.random_mask(64, 8, 8, 0.6, vmae.seeded(1))
    again, _ = vmae.random_mask(64, 8, 8, 0.6, vmae.seeded(1))
    assert torch.equal(keep, again)
    assert len(keep.unique(dim=0)) == 64                   # no two images have the same mask
    share = keep.flatten().bincount(minlength=64) / 64     # in how many images a patch is visible
    assert 0.1 < share.min() and share.max() < 0.7         # expected: 25 / 64 = .39

def test_masked_patches_cost_no_work():
    model = VMAE(**TINY_VMAE)
    tokens = []

    def count(module, inputs, output):
        tokens.append(output.shape[1])

    for module in [model.patch_embed, *model.blocks, model.norm, model.to_latent]:
        module.register_forward_hook(count)
    model(random_images(), 0.6)
    assert tokens == [6] * 5                               # floor(16 * .4) in each of the five

def test_masked_patches_cannot_influence_the_latents():
    x = random_images().requires_grad_()
    _, q, mask = VMAE(**TINY_VMAE)(x, 0.6)
    moments_of(q).square().sum().backward()
    influence = vmae.patchify(x.grad, 4).abs().amax(-1)    # (B, N)
    assert influence[mask == 1].max() == 0
    assert influence[mask == 0].min() > 0

def test_attention_is_fused():
    block = VMAE(**TINY_VMAE).blocks[0]
    with torch.profiler.profile() as log, torch.no_grad():
        block.attn(torch.randn(1, 1024, 32))
    names = {event.key for event in log.key_averages()}
    assert any("flash" in name for name in names)
    assert "aten::softmax" not in names

# ---- Gaussians and losses ---------------------------------------------------------------------

def test_kl_of_gaussians_is_that_of_torch():
    mu = torch.randn(3, 4, 5)                              # 4 channels of 5 tokens
    logvar = torch.randn(3, 4, 5)
    q = torch.distributions.Normal(mu, (logvar / 2).exp())
    centres = {"zero": torch.zeros_like(mu), "free": mu}
    for mean, centre in centres.items():
        prior = torch.distributions.Normal(centre, 1.0)
        kl = torch.distributions.kl_divergence(q, prior).sum(1)            # (B, V), per token
        close(Gaussian(mu, logvar).kl(mean), kl.mean(), 1e-5)

def test_samples_have_the_gaussians_moments_and_repeat_by_generator():
    mu = torch.full((100000,), 3.0)
    logvar = torch.full((100000,), math.log(4.0))
    q = Gaussian(mu, logvar)
    z = q.sample(vmae.seeded(0))
    close(z.mean(), 3, 0.02)
    close(z.std(), 2, 0.02)                                # sqrt(4)
    assert torch.equal(z, q.sample(vmae.seeded(0)))
    assert torch.equal(q.mode(), q.mu)
    huge = Gaussian(torch.zeros(1), torch.tensor([1e9]))
    assert huge.sample().isfinite()                        # because logvar is clamped

def test_nll_is_a_gaussians_over_the_patches_that_count():
    x = random_images()
    x_hat = random_images(seed=1)
    _, mask = vmae.random_mask(2, 4, 4, 0.6)
    for logvar in (0.0, -2.0):                             # sigma = 1, as in the paper; another
        p = Gaussian(x_hat, torch.tensor(logvar))
        by_torch = torch.distributions.Normal(x_hat, math.exp(logvar / 2))
        nll = vmae.patchify(-by_torch.log_prob(x), 4)      # (B, N, P*P*C)
        visible = nll[mask == 0]
        masked = nll[mask == 1]
        close(vmae.loss_R(p, x, mask, 4), visible.mean(), 1e-6)
        close(vmae.loss_M(p, x, mask, 4), masked.mean(), 1e-6)
    nothing = torch.zeros_like(mask)
    assert vmae.loss_M(p, x, nothing, 4) == 0              # not 0 / 0

def test_sigma_of_the_likelihood_can_be_learned():
    model = VMAE(**TINY_VMAE)
    assert "logvar_x" not in model.state_dict()            # published weights have none
    model.logvar_x = torch.nn.Parameter(torch.zeros(()))   # all that it takes
    assert "logvar_x" in model.state_dict()
    x = random_images()
    p, q, mask = model(x, 0.6)
    loss, _ = vmae.loss_VMAE(x, p, q, mask, 4, lambda_M=0.1)
    loss.backward()
    error = vmae.patchify((x - p.mode()) ** 2, 4)                          # (B, N, P*P*C)
    # d NLL / d logvar = 1/2 (1 - error / sigma^2); the masked patches have the weight .1.
    of_visible = 0.5 * (1 - error[mask == 0].mean())
    of_masked = 0.5 * (1 - error[mask == 1].mean())
    close(model.logvar_x.grad, of_visible + 0.1 * of_masked, 1e-5)

def test_loss_VMAE_is_the_weighted_sum_of_section_4_4():
    x = random_images()
    net = TinyLpips()
    p, q, mask = VMAE(**TINY_VMAE)(x, 0.6)
    L_R = vmae.loss_R(p, x, mask, 4)
    L_M = vmae.loss_M(p, x, mask, 4)
    L_P = vmae.loss_P(net, x, p.mode())
    L_reg = q.kl("zero")
    total, terms = vmae.loss_VMAE(x, p, q, mask, 4, lambda_M=2.0, lambda_P=3.0, lambda_reg=5.0,
                                  kl_mean="zero", lpips_net=net)
    close(total, L_R + 2 * L_M + 3 * L_P + 5 * L_reg, 1e-4)
    assert list(terms) == ["L_R", "L_M", "L_P", "L_reg"]   # the paper's names
    before_weighting = torch.stack(list(terms.values()))
    close(before_weighting, torch.stack([L_R, L_M, L_P, L_reg]), 1e-6)

def test_a_loss_without_weight_is_not_computed():
    x = random_images()
    p, q, mask = VMAE(**TINY_VMAE)(x, 0.6)
    total, terms = vmae.loss_VMAE(x, p, q, mask, 4, lambda_M=0.0, lambda_P=0.0, lambda_reg=0.0)
    assert total == terms["L_R"]
    assert list(terms) == ["L_R"]

# ---- LPIPS ------------------------------------------------------------------------------------

# VGG's weights are a download of half a gigabyte. Random ones of the same shapes show that they are
# read and compared as in the lpips package; elsewhere TinyLpips is enough.

def random_vgg():
    """Random weights under the names of torchvision's VGG-16, whose layers of numbers like these
    are convolutions of widths like these."""
    layers = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    weights = {}
    for layer, c_in, c_out in zip(layers, widths, widths[1:]):
        std = math.sqrt(2 / (9 * c_in))                    # He 2015: no layer fades out
        weights[f"features.{layer}.weight"] = std * torch.randn(c_out, c_in, 3, 3)
        weights[f"features.{layer}.bias"] = torch.zeros(c_out)
    return weights

def test_lpips_reads_vgg_from_a_file_is_frozen_and_equals_its_package():
    weights = random_vgg()
    torch.save(weights, "vgg.pth")
    net = vmae.load_lpips("vgg.pth")
    assert torch.equal(net.net.slice5[-2].weight, weights["features.28.weight"])
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())
    x = random_images(2, 32).requires_grad_()
    of_package = net(x, -x).mean()
    close(vmae.loss_P(net, x, -x), of_package, 1e-6)
    close(vmae.lpips(net, x, -x), net(x, -x).flatten(), 1e-6)      # of each image, as evaluate.py's
    assert vmae.loss_P(net, x, x) == 0
    with torch.autocast("cpu", torch.bfloat16):            # features in bfloat16, distance not
        low = vmae.loss_P(net, x, -x)
    assert low.dtype == torch.float32
    assert 0 < (low / of_package - 1).abs() < 0.02
    other = random_images(2, 32, seed=1)
    vmae.loss_P(net, other, x).backward()
    assert x.grad.abs().max() > 0                          # frozen, but not cut off

def test_the_distance_of_lpips_is_in_float32_beside_bfloat16():
    distance = TinyLpips().distances[0]
    psi = torch.randn(2, 3, 8, 8).bfloat16()
    psi_hat = torch.randn(2, 3, 8, 8).bfloat16()
    expected = distance(psi.float(), psi_hat.float())
    with torch.autocast("cpu", torch.bfloat16):
        close(distance(psi, psi_hat), expected, 1e-6)

def test_missing_vgg_weights_are_one_message_with_url_path_and_option():
    message = raises(InputError, vmae.load_lpips, "/nowhere/vgg.pth")
    for word in ("/nowhere/vgg.pth", vmae.VGG_URL, "--vgg-weights"):
        assert word in message
    assert "\n" not in message

def test_other_vggs_are_not_taken_for_vgg_16():
    convolutions_of_19 = (0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34)
    torch.save({f"features.{i}.weight": torch.zeros(1) for i in convolutions_of_19}, "vgg19.pth")
    assert "it has no features.26" in raises(InputError, vmae.load_lpips, "vgg19.pth")

@patch(vmae, "load_lpips", return_value=TinyLpips())
def test_weight_of_L_P_reaches_the_loss(load_lpips):
    save_images("data", 8)
    one = trained("--lambda-p 1 --vgg-weights vgg.pth", "one")
    assert load_lpips.call_args.args == ("vgg.pth",)
    two = trained("--lambda-p 2", "two")
    assert all_differ(one, two)
    assert "L_P" in log_of("one")[-1]

def test_a_run_goes_on_without_L_P_unless_it_was_asked_for():
    trouble = patch(vmae, "load_lpips", side_effect=InputError("no VGG"))
    args = SimpleNamespace(lambda_p=0.5, vgg_weights=None)
    with trouble:
        text = printed(train_vmae.load_perceptual, args, {}, CPU)
    assert "training without L_P" in text and "no VGG" in text
    assert args.lambda_p == 0
    args.lambda_p = 0.5
    with trouble:
        raises(InputError, train_vmae.load_perceptual, args, {"lambda_p": 0.5}, CPU)
        args.vgg_weights = "vgg.pth"
        raises(InputError, train_vmae.load_perceptual, args, {}, CPU)

def test_what_process_0_lacks_counts_for_all():
    args = SimpleNamespace(lambda_p=0.5, vgg_weights=None)
    with (patch(train_vmae, "RANK", 1),
          patch(vmae, "load_lpips", return_value=TinyLpips()),
          patch(vmae, "from_first", return_value="no VGG there")):
        assert train_vmae.load_perceptual(args, {}, CPU) is None
    assert args.lambda_p == 0

# ---- VMAE -------------------------------------------------------------------------------------

# vmae_official.pt holds weights, inputs and outputs of the authors' code.

def published_vmae():
    """Recorded outputs of the authors' VMAE, and its weights under the names of its checkpoint,
    with one tensor that only training uses."""
    v = vector("vmae_official.pt")
    weights = {f"module.{name}": value for name, value in v["state_dict"].items()}
    weights["module.perceptual.scale"] = torch.zeros(1)
    return v, weights

def test_vmae_equals_the_authors_on_whole_images():
    v, weights = published_vmae()
    args = argparse.Namespace(lr=1)                        # theirs hold one
    torch.save({"model": weights, "epoch": 3, "args": args}, "vmae.pth")
    model = vmae.load_vmae("vmae.pth", v["model_args"]["num_heads"])
    q = model.encode(v["x"])
    close(moments_of(q), v["moments"], 1e-4)
    close(model.decode(q.mode()), v["recon"], 1e-4)
    ours = VMAE(**v["model_args"])
    close(ours.pos_embed, v["state_dict"]["pos_embed"], 1e-6)

def test_vmae_equals_the_authors_on_masked_images():
    v = vector("vmae_official.pt")
    model = VMAE(**v["model_args"])
    model.load_state_dict(v["state_dict"])
    mask = v["mask"]
    V = int((1 - mask[0]).sum())
    keep = mask.argsort(dim=1, stable=True)[:, :V]         # the visible patches in rising order
    x = v["x"]
    z = model.encode_tokens(x, keep).mode()
    x_hat = model.decode_tokens(z, keep)
    close(x_hat, v["pred_img"], 1e-4)
    p = Gaussian(x_hat, model.logvar_x)
    constant = 0.5 * math.log(2 * math.pi)                 # our NLL is half their squared error
    L_R = vmae.loss_R(p, x, mask, 8) - constant
    L_M = vmae.loss_M(p, x, mask, 8) - constant
    close(2 * L_R, v["vis_mse"], 1e-4)
    close(2 * L_M, v["masked_mse"], 1e-4)

def test_published_weights_load_with_a_report_and_can_be_trained_on():
    _, weights = published_vmae()
    del weights["module.mask_token"]                       # training alone needs it
    torch.save({"model": weights}, "vmae.pth")
    line = "--init vmae.pth --steps 1 --lambda-p 0 --batch 2 --precision float32 --out run"
    text = runs(train_vmae.main, line)
    assert "missing: mask_token; ignored: perceptual.scale" in text
    assert load("run/last.pt")["model_args"]["depth"] == 2

def test_resized_positions_are_those_the_authors_interpolate():
    table = vmae.sincos_positions(192, torch.arange(16))
    image = table.view(1, 16, 16, 192).permute(0, 3, 1, 2)                 # (1, 192, 16, 16)
    bilinear = F.interpolate(image, size=(32, 32), mode="bilinear")        # (1, 192, 32, 32)
    bilinear = bilinear.flatten(2).transpose(1, 2)                         # (1, 1024, 192)
    model = VMAE(**{**TINY_VMAE, "img_size": 128, "embed_dim": 192})        # of 32 x 32 patches
    finer = vmae.resize_positions({"pos_embed": table}, model)["pos_embed"]    # (1, 1024, 192)
    close(finer[..., 12:48], bilinear[..., 12:48], 0.03)   # slow waves
    assert (finer - bilinear).square().mean().sqrt() < 0.03
    close(finer[0, [0, -1]], table[0, [0, -1]], 1e-6)      # corners lie on the old ones, not beyond
    not_resized = vmae.sincos_positions(192, torch.arange(32))
    assert (not_resized - bilinear).square().mean().sqrt() > 0.3

# ---- Both bodies: the transformer and the convolutions ----------------------------------------

def both_bodies():
    """A VMAE and a ConvAutoencoder for 16 pixels, both f4d4."""
    return VMAE(**TINY_VMAE), vmae.ConvAutoencoder(16, (8, 8, 16), 4)

def test_both_bodies_encode_and_decode_the_whole_grid():
    x = random_images()
    for model in both_bodies():
        q = model.encode(x)
        assert q.mu.shape == (2, 4, 4, 4)
        assert q.logvar.shape == (2, 4, 4, 4)
        assert model.decode(q.mode()).shape == x.shape
        assert (model.patch_size, model.grid, model.latent_dim) == (4, 4, 4)
    raises(ValueError, VMAE, 30, 4)                        # 30 pixels hold no whole patches
    raises(ValueError, vmae.ConvAutoencoder, 30)

def test_both_bodies_train_without_a_mask_as_they_are_used():
    x = random_images()
    for model in both_bodies():
        p, q, mask = model(x, 0.0)
        assert p.mu.shape == x.shape
        assert mask.shape == (2, 16)
        assert mask.sum() == 0
        used = model.encode(x)
        close(q.mu.flatten(), used.mu.flatten(), 1e-6)
        one, _, _ = model(x, 0.0, vmae.seeded(1))
        again, _, _ = model(x, 0.0, vmae.seeded(1))
        other, _, _ = model(x, 0.0, vmae.seeded(2))
        assert torch.equal(one.mode(), again.mode())
        assert not torch.equal(one.mode(), other.mode())   # z is drawn from q

def test_last_layer_makes_the_colours_in_both_bodies():
    for model in both_bodies():
        weight_before_last_bias = list(model.parameters())[-2]
        assert model.last_layer is weight_before_last_bias
        assert len(model.last_layer) == 3

def test_both_bodies_come_in_the_same_sizes():
    assert vmae.sizes.keys() == vmae.conv_sizes.keys()     # base's numbers: test_efficiency
    for name in vmae.sizes:
        f = 2 ** (len(vmae.conv_sizes[name]["channels"]) - 1)
        assert f == vmae.sizes[name]["patch_size"]
        assert vmae.conv_sizes[name]["latent_dim"] == vmae.sizes[name]["latent_dim"]

def test_conv_autoencoder_equals_diffusers():
    v = vector("sd3vae_diffusers.pt")
    torch.save(v["state_dict"], "vae.bin")
    model = vmae.load_vmae("vae.bin")
    assert isinstance(model, vmae.ConvAutoencoder)
    assert model.latent_dim == 16
    q = model.encode(v["x"])
    close(moments_of(q), v["moments"], 1e-4)
    close(model.decode(q.mode()), v["recon"], 1e-4)

def header_of_safetensors(header, data):
    """The bytes of a file with this header, a dict, before these numbers."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data

def safetensors(weights):
    """The bytes of a .safetensors file of these tensors, in float32."""
    header = {"__metadata__": {"format": "pt"}}            # as SD3 and FLUX.1 are published
    data = b""
    for name, value in weights.items():
        numbers = value.float().numpy().tobytes()
        offsets = [len(data), len(data) + len(numbers)]
        header[name] = dict(dtype="F32", shape=value.shape, data_offsets=offsets)
        data += numbers
    return header_of_safetensors(header, data)

def test_safetensors_of_every_type_that_torch_has_are_read():
    numbers = bytes(range(16))
    for kind, name in vmae.SAFETENSORS.items():
        dtype = getattr(torch, name, None)
        if dtype is None:                                  # a torch before 2.7
            continue
        shape = [16 // dtype.itemsize]
        header = {"a": dict(dtype=kind, shape=shape, data_offsets=[0, 16]),
                  "nothing": dict(dtype=kind, shape=[0, 3], data_offsets=[16, 16]),
                  "number": dict(dtype=kind, shape=[], data_offsets=[16, 16 + dtype.itemsize])}
        data = numbers + numbers[:dtype.itemsize]
        Path("a.SAFETENSORS").write_bytes(header_of_safetensors(header, data))
        weights = vmae.read_safetensors("a.SAFETENSORS")
        assert weights["a"].dtype == dtype
        assert weights["a"].view(torch.uint8).numpy().tobytes() == numbers
        assert weights["nothing"].shape == (0, 3) and weights["number"].shape == ()
    # The number 1, as the standards of these types write it.
    for kind, one in (("F16", "003c"), ("BF16", "803f"), ("F32", "0000803f"), ("F8_E4M3", "38")):
        data = bytes.fromhex(one)
        header = {"a": dict(dtype=kind, shape=[], data_offsets=[0, len(data)])}
        Path("a.safetensors").write_bytes(header_of_safetensors(header, data))
        assert vmae.read_safetensors("a.safetensors")["a"].float() == 1
    for kind in ("F4", "F6_E2M3"):
        header = {"a": dict(dtype=kind, shape=[16], data_offsets=[0, 8])}
        Path("a.safetensors").write_bytes(header_of_safetensors(header, bytes(8)))
        message = raises(InputError, vmae.read_checkpoint, "a.safetensors")
        assert f"a is of the type {kind}, which torch" in message

def test_safetensors_with_holes_overlaps_or_trailing_bytes_are_damaged():
    def two(first, second, size=8):
        header = {"b": dict(dtype="U8", shape=[4], data_offsets=second),
                  "a": dict(dtype="U8", shape=[4], data_offsets=first)}
        Path("a.safetensors").write_bytes(header_of_safetensors(header, bytes(range(size))))
        return vmae.read_checkpoint("a.safetensors")

    assert two([0, 4], [4, 8])["b"].tolist() == [4, 5, 6, 7]
    for first, second, size in (([0, 4], [5, 9], 9), ([0, 4], [2, 6], 6), ([0, 4], [4, 8], 9),
                                ([0, 4], [4, 8], 7), ([1, 5], [5, 9], 9), ([0, 4], [4, 9], 9)):
        assert "damaged" in raises(InputError, two, first, second, size)

# ---- Images: the built-in faces ---------------------------------------------------------------

def test_a_face_depends_on_its_number_and_the_seed_alone():
    faces = Faces(32)
    three = faces.render([5, 900, 17])
    for alone, beside_others in zip(faces.render([900]), three, strict=True):
        close(alone[0], beside_others[1], 1e-6)
    x, kind, _, part = three
    assert x.shape == (3, 3, 32, 32)
    assert part.shape == (3, 32, 32)
    assert -1 <= x.min() < x.max() <= 1
    assert x.std() > 0.2
    image, label = faces[17]
    close(image, x[2], 0.5 / 127.5 + 1e-6)                 # rounded to 8 bits
    assert label == kind[2]
    other, _, _, _ = Faces(32, seed=1).render([5])
    assert not torch.equal(other[0], x[0])

def test_faces_are_those_of_the_numbers_in_the_readme_and_have_all_levels():
    x, kind, pattern, part = Faces(32).render(range(64))
    close(x.mean(), 0.26472, 1e-4)                         # measured when README was written
    close(x.std(), 0.42470, 1e-4)
    assert kind.unique().tolist() == [0, 1, 2, 3]
    assert pattern.unique().tolist() == [0, 1, 2]
    for face in part:
        assert face.unique().tolist() == [0, 1, 2, 3, 4]

def test_each_face_is_rendered_once_while_all_of_them_fit_in_memory():
    faces = Faces(32)
    x, kind, _, _ = faces.render([5, 17, 900])
    x = vmae.to_uint8(x)
    with patch(faces, "render", wraps=faces.render) as render:
        first, _ = faces.batch([5, 17])
        second, y = faces.batch(torch.tensor([900, 17]))
    close(first, x[:2], 0)
    close(second, x[[2, 1]], 0)
    assert y.tolist() == kind[[2, 1]].tolist()
    rendered = [call.args[0].tolist() for call in render.mock_calls]
    assert rendered == [[5, 17], [900]]

def test_faces_that_do_not_fit_in_memory_are_rendered_each_time():
    assert Faces(73).keeps                                 # 16384 * 3 * 73^2 is just below 256 MB
    large = Faces(74)
    with patch(large, "render", wraps=large.render) as render:
        first, _ = large.batch([5])
        again, _ = large.batch([5])
    close(first, again, 0)
    assert render.call_count == 2

def test_held_out_faces_are_others():
    train = Faces(8, "train")
    val = Faces(8, "val")
    assert train.first + len(train) <= val.first
    assert len(val) >= 256
    one, _, _, _ = train.render([0])
    other, _, _, _ = val.render([0])
    assert not torch.equal(one, other)
    with patch(val, "count", 3):
        assert len(list(val)) == 3                         # a loop ends, and meets no other face

# ---- Images: a folder -------------------------------------------------------------------------

def images_by_name(size):
    """All images below the current folder, as {name without its ending: x}."""
    data = ImageFolder(".", size)
    images = {}
    for i, path in enumerate(data.paths):
        x, _ = data[i]
        images[Path(path).stem] = x
    return images

def test_folder_reads_every_mode():
    red = Image.new("RGB", (40, 30), "red")
    for mode in ("1", "L", "P", "CMYK"):
        red.convert(mode).save(f"{mode}.TIFF")
    transparent_red = (255, 0, 0, 0)
    Image.new("RGBA", (40, 30), transparent_red).save("RGBA.PNG")
    Image.new("LA", (40, 30), (0, 0)).save("LA.png")
    x = images_by_name(20)
    assert len(x) == 6
    for image in x.values():
        assert image.shape == (3, 20, 20)
    close(x["RGBA"], 1, 0)                                 # transparent is white
    close(x["LA"], 1, 0)
    for mode in ("P", "CMYK"):
        colour = x[mode].mean((1, 2))
        close(colour, [1, -1, -1], 0.05)                   # red

def test_folder_crops_the_centre_and_turns_by_exif():
    wide = np.zeros((20, 60), np.uint8)
    wide[:, 20:40] = 255                                   # white in the middle third
    Image.fromarray(wide).save("wide.png")
    phone = np.zeros((32, 32), np.uint8)
    phone[:, :16] = 255                                    # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6                                       # turned by 90 degrees it is the top
    Image.fromarray(phone).save("phone.jpg", exif=exif, quality=95)
    x = images_by_name(20)
    close(x["wide"], 1, 0.01)
    assert x["phone"][:, :8].mean() > 0.9
    assert x["phone"][:, 12:].mean() < -0.9

def test_pixels_survive_the_way_to_floats_and_back():
    pixels = save_images("data", 8)
    x, _ = ImageFolder("data", 20)[7]
    expected = pixels[7].transpose(2, 0, 1)                # (3, H, W)
    close(vmae.to_uint8(x), expected, 0)
    floats = torch.tensor([-9, -1, 0.1, 0.999, 9])
    assert vmae.to_uint8(floats).tolist() == [0, 0, 140, 255, 255]         # 127.5 * 1.1 = 140.25

def test_sub_folders_are_classes_and_hidden_files_are_left_out():
    for name in ("dog/deep", ".hidden", "Cat/deep"):
        save_images(name, 40)
    Path("dog", "._000.png").write_bytes(b"Apple")
    Path("dog", "notes.txt").write_text("no image")
    os.symlink("..", "dog/loop")                           # each file once, whatever links to it
    data = ImageFolder(".", 20)
    assert data.classes == ["Cat", "dog"]
    assert len(data) == 80
    _, y = data.batch([0, 79])
    assert y.tolist() == [0, 1]
    Image.new("RGB", (20, 20)).save("beside.png")
    assert ImageFolder(".", 20).classes == []

# Of two classes that linked to one folder one once vanished.
def test_only_a_folder_inside_itself_is_a_loop():
    save_images("store/shared", 20)
    save_images("data/ant", 20, seed=1)
    for name in ("bee", "cat"):
        os.symlink("../store/shared", f"data/{name}")
    os.symlink("../../data", "store/shared/around")           # data/bee/around is data
    data = ImageFolder("data", 20)
    assert data.classes == ["ant", "bee", "cat"]
    assert torch.bincount(data.labels).tolist() == [20, 20, 20]
    assert len(ImageFolder("data/bee/around", 20)) == 60   # unless it is asked for

def test_folders_of_systems_are_left_out_by_name_even_if_they_are_closed():
    for place in ("flat", "classes/cat", "classes/dog"):
        save_images(place, 20)
        for name in ("@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information"):
            save_images(f"{place}/{name}/000.jpg", 2, size=10)
    save_images("classes/__MACOSX/cat", 2)
    os.mkdir("classes/lost+found", 0)
    with without_the_rights_of_root():
        data = ImageFolder("classes", 16)
        flat = ImageFolder("flat", 16)
    assert data.classes == ["cat", "dog"]
    assert len(data) == 40 and len(flat) == 20
    text = described("classes")
    [left_out] = re.findall("^left out: (.*)$", text, re.MULTILINE)
    for words in ("@eaDir/ 2", "#recycle/ 2", "__MACOSX/ 1", "lost+found/ 1"):
        assert words in left_out.split(", ")

def test_the_path_of_an_image_decides_whether_it_is_held_out():
    save_images("dog", 40)
    save_images("cat", 40)
    train = ImageFolder(".", 20, "train")
    val = ImageFolder(".", 20, "val")
    assert sorted(train.paths + val.paths) == ImageFolder(".", 20).paths
    assert 1 <= len(val) <= 10                             # about one in twenty
    save_images("bat", 7, seed=1)
    assert set(val.paths) <= set(ImageFolder(".", 20, "val").paths)        # none has moved

def test_folders_of_training_and_held_out_images_may_not_overlap():
    save_images("data/inner", 4)
    pairs = [("data", "data/inner"), ("data/inner", "data"), ("data", "data")]
    for data, val in pairs:
        message = raises(InputError, vmae.open_images, data, 16, val)
        assert "trained on" in message

def cut_off(path):
    """Leave of an image what ends early, with a sound header."""
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[:600])

def test_a_few_broken_files_are_skipped_by_name():
    save_images("data", 200)
    cut_off("data/100.png")
    Path("data/text.jpg").write_text("not an image")
    data, text = warned(ImageFolder, "data", 16)
    assert len(data) == 200
    assert "text.jpg: unreadable" in text and "1 so far" in text
    x, text = warned(data.batch, [100, 101, 100])
    close(x[0][0], x[0][1], 0)                             # its neighbour takes its place
    assert text.count("100.png: unreadable") == 1          # each is named once
    assert "2 so far" in text

def test_more_than_one_percent_of_broken_files_end_the_run():
    save_images("data", 198)
    Path("data/empty.jpg").write_text("")
    Path("data/text.jpg").write_text("not an image")
    data, _ = warned(ImageFolder, "data", 16)              # 2 of 200 are 1 %
    cut_off("data/100.png")
    message = raises(InputError, data.batch, [99, 100])
    assert "3 of 200 files are unreadable, over 1 %" in message
    assert "; remove them: 100.png (" in message
    Image.new("RGB", (1, 1)).save("data/pixel.png")        # 3 of 201, all seen in the headers
    assert "over 1 %" in raises(InputError, warned, ImageFolder, "data", 16)

# With one message per file, ten damaged ones once took four rounds of decoding and removing.
def test_all_images_are_decoded_before_one_message_names_those_that_are_unreadable():
    save_images("data", 200)
    for i in range(0, 200, 15):                            # 14 of them
        cut_off(f"data/{i:03d}.png")
    message = raises(InputError, warned, ImageFolder("data", 16).keep_pixels, "run")
    assert "data: 14 of 200 files are unreadable, over 1 % of the folder; remove them" in message
    assert "000.png (" in message and "135.png (" in message and "150.png" not in message
    assert message.endswith(", and 4 more")
    assert os.listdir("run") == []

def test_a_part_of_which_all_files_are_broken_ends_in_one_line():
    save_images("data", 300)
    val = ImageFolder("data", 16, "val")
    val.paths = val.paths[:2]                              # not yet 1 % of the folder
    with patch(vmae, "read_image", side_effect=OSError("damaged")):
        message = raises(InputError, warned, val.batch, [0, 1])
    assert "unreadable are" in message and "or all that are held out" in message

def failing(number):
    """Stands in for Pillow's Image.open, which meets this error of the system."""
    return patch(vmae.Image, "open", side_effect=OSError(number, os.strerror(number)))

# A lost network is no fault of the files: below 1 % they were once replaced, without a word.
def test_errors_of_the_system_stop_a_run_in_its_words():
    save_images("data", 200)
    for number in (errno.EIO, errno.ESTALE, errno.EMFILE):
        with failing(number):
            text = runs(train_vmae.main, TINY_RUN, status=1)
            assert re.search(rf"^error: .*data/\d+.png: {os.strerror(number)}$", text, re.MULTILINE)
        data = ImageFolder("data", 16)
        with failing(number):
            assert os.strerror(number) in raises(OSError, data.batch, [0])
        assert not data.folder.unreadable

def test_no_memory_and_no_threads_are_no_fault_of_a_file():
    save_images("data", 200)
    data = ImageFolder("data", 16)
    for error in (MemoryError(), OSError("out of memory error when reading image file")):
        with patch(vmae.Image, "open", side_effect=error):
            message = raises(InputError, data.batch, [0])
            assert "000.png: out of memory while it is read" in message
    assert not data.folder.unreadable
    with patch(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
        assert "the system starts no more threads" in raises(InputError, data.batch, [0])

def test_threads_are_as_many_as_cpus_may_be_used():
    machine = SimpleNamespace(cpu_count=lambda: 64)
    container = SimpleNamespace(cpu_count=lambda: 64, sched_getaffinity=lambda process: range(8))
    for system, of_torch, expected in (
            (machine, 99, 64),
            (container, 99, 8),
            (container, 3, 3),
            (container, 1, 8)):                            # as torchrun asks of each process
        with patch(vmae, "os", system), patch(torch, "get_num_threads", return_value=of_torch):
            assert vmae.cpus() == expected

def test_threads_decode_a_limited_number_of_pixels_at_once():
    save_images("data", 12)                                # 400 pixels each
    most = 0
    now = 0
    lock = threading.Lock()

    def on_white(image):
        nonlocal most, now
        with lock:
            now += image.width * image.height
            most = max(most, now)
        time.sleep(0.01)
        with lock:
            now -= image.width * image.height
        return original(image)

    original = vmae.on_white
    data = ImageFolder("data", 16)
    for limit, expected in ((1000, 800), (100, 400)):      # one that is too large is decoded alone
        most = 0
        with (patch(vmae, "PIXELS_AT_ONCE", limit), patch(vmae, "cpus", return_value=8),
              patch(vmae, "on_white", on_white)):
            data.batch(range(12))
        assert most == expected

def test_damaged_exif_stops_nothing():
    pixels = save_images("data", 1, 16)
    exif = Image.Exif()
    exif[0x0112] = 3
    exif[0x010F] = "maker"
    exif[0x8769] = {0x9003: "2026:11:24", 0x829A: 0.01}
    Image.fromarray(pixels[0]).save("a.jpg", exif=exif)
    whole = Path("a.jpg").read_bytes()
    start = whole.index(b"Exif") + 4
    end = whole.index(b"Exif") + len(exif.tobytes())
    rng = np.random.default_rng(0)
    for _ in range(4000):
        data = bytearray(whole)
        for at in rng.integers(start, end, rng.integers(1, 6)):
            data[at] = rng.integers(256)
        Path("a.jpg").write_bytes(data)
        assert vmae.read_image("a.jpg", 16).shape == (3, 16, 16)

def test_a_draft_is_hardly_another_picture():
    blobs = Image.fromarray(random_pixels((9, 9, 3)))
    blobs = blobs.resize((256, 256), Image.Resampling.BICUBIC)
    blobs.save("a.jpg", quality=95)
    whole = vmae.read_image("a.jpg", 32)[None]
    draft = vmae.read_image("a.jpg", 32, draft=True)[None]
    assert 40 < vmae.psnr(whole, draft) < math.inf         # in dB; equal would be infinite
    with patch(vmae, "on_white", wraps=vmae.on_white) as decoded:
        vmae.read_image("a.jpg", 32, draft=True)
    assert decoded.call_args.args[0].size == (64, 64)      # still twice as large as wanted

# A draft of 1001 pixels at 1/8 has 126, of which the last shows an eighth of a pixel: it was once
# stretched over the whole square, 31 dB.
def test_a_draft_of_sides_that_its_scale_does_not_divide_is_not_stretched():
    blobs = Image.fromarray(random_pixels((9, 9, 3)))
    for size in ((1001, 601), (601, 1001)):
        for orientation in (1, 3, 5, 8):
            exif = Image.Exif()
            exif[0x0112] = orientation
            resized = blobs.resize(size, Image.Resampling.BICUBIC)
            resized.save("a.jpg", quality=95, exif=exif)
            whole = vmae.read_image("a.jpg", 64)[None]
            draft = vmae.read_image("a.jpg", 64, draft=True)[None]
            assert vmae.psnr(whole, draft) > 48

def test_headers_are_read_once_for_training_and_held_out_images():
    save_images("data", 30)
    with patch(vmae.Image, "open", side_effect=Image.open) as opened:
        train, val = vmae.open_images("data", 16)
    assert len(train) + len(val) == 30
    assert opened.call_count == 30

def described(data, val=None, size=16):
    """What the start of a training says of its images."""
    return printed(vmae.describe, *vmae.open_images(data, size, val))

# ---- The cache of pixels ----------------------------------------------------------------------

# A cache has its name only when it is whole, and the name changes with all that it is made of. So
# nothing half-written and nothing stale can be read.

def cache_of_nine():
    """A Cache in run/ of nine rows with 2 x 3 numbers each."""
    return Cache("run", "images", "what they are made of", 9, (2, 3), np.uint8)

def nine_rows(stop=9):
    """The nine rows in parts of four: row i is full of i and has the class i % 3. The part that
    begins at `stop` is interrupted."""
    for part in torch.arange(9).split(4):
        if part[0] == stop:
            raise KeyboardInterrupt
        x = part.view(-1, 1, 1).expand(-1, 2, 3)
        yield x.byte(), part % 3

def holds_nine_rows(cache):
    """Assert that a cache holds the nine rows."""
    x, y = cache.batch([7, 0, 8])
    assert x.dtype == torch.uint8
    assert x.shape == (3, 2, 3)
    assert x[:, 1, 2].tolist() == [7, 0, 8]
    assert y.tolist() == [1, 0, 2]
    assert os.listdir("run") == [cache.path.name]          # and leaves nothing else there

def test_a_cache_is_one_file_that_is_made_once_and_that_numpy_reads_alone():
    holds_nine_rows(cache_of_nine().open("counting", nine_rows()))
    holds_nine_rows(cache_of_nine().open("counting", None))              # found, not made
    [path] = Path("run").iterdir()
    rows = np.load(path)
    assert rows["x"].shape == (9, 2, 3)
    assert rows["y"].tolist() == [0, 1, 2] * 3

def test_a_cache_that_was_interrupted_begins_again_and_nothing_half_written_is_read():
    raises(KeyboardInterrupt, cache_of_nine().open, "counting", nine_rows(stop=4))
    assert os.listdir("run") == []
    Path(f"{cache_of_nine().path}.tmp").write_bytes(b"half")               # a kill leaves this
    holds_nine_rows(cache_of_nine().open("counting", nine_rows()))

def test_a_cache_without_room_on_the_disk_is_not_begun():
    with patch(shutil, "disk_usage", return_value=SimpleNamespace(free=100)):     # it has 126 bytes
        assert "make room" in raises(InputError, cache_of_nine().open, "counting", nine_rows())
    assert os.listdir("run") == []

def test_a_damaged_cache_is_named():
    path = cache_of_nine().open("counting", nine_rows()).path
    whole = path.read_bytes()
    cut_off = [whole[:length] for length in (0, 5, 60, -1)]
    for damaged in (*cut_off, b"no array at all"):
        path.write_bytes(damaged)
        message = raises(InputError, cache_of_nine().open, "counting", nine_rows())
        assert f"{path}: damaged, delete it" in message

def test_a_cache_deletes_those_of_other_data_and_nobody_else_s_file():
    os.mkdir("run")
    hash_of_another = "0123456789abcdef"
    theirs = {"images_000.npy", "images_backup.zip", f"images_{hash_of_another}.npy.bak",
              f"moments_{hash_of_another}.npy", f"my_images_{hash_of_another}.npy"}
    for name in theirs:
        Path("run", name).touch()
    Path("run", f"images_{hash_of_another}.npy").touch()
    Path("run", f"images_{hash_of_another}.npy.tmp").touch()
    cache = cache_of_nine().open("counting", nine_rows())
    assert set(os.listdir("run")) == theirs | {cache.path.name}

def test_a_cache_of_pixels_belongs_to_one_folder_its_files_and_one_size():
    save_images("data/a", 30)
    save_images("data/b", 30)
    save_images("other/a", 30, seed=1)
    shutil.copytree("data/b", "other/b")
    for path in Path().rglob("*.png"):                     # of equal names, sizes and times
        path.write_bytes(path.read_bytes().ljust(2000, b"\0"))
        os.utime(path, (1, 1))
    before = ImageFolder("data", 16, "train").made_of()
    assert before == ImageFolder("data", 16, "train").made_of()
    assert before != ImageFolder("data", 20, "train").made_of()
    assert before != ImageFolder("other", 16, "train").made_of()
    os.utime("data/a/000.png", (2, 2))
    assert before != ImageFolder("data", 16, "train").made_of()

def test_a_cache_of_pixels_belongs_to_its_labels():
    save_images("data/a", 30)
    save_images("data/b", 30, seed=1)
    train = ImageFolder("data", 16, "train")
    for i in range(99):                                    # find a name that is held out
        name = f"{i}.png"
        if zlib.crc32(name.encode()) % 20 == 0:
            break
    shutil.copy("data/a/000.png", f"data/{name}")          # beside the classes, so they are none
    other = ImageFolder("data", 16, "train")
    assert other.paths == train.paths
    assert other.made_of() != train.made_of()

def test_a_folder_is_decoded_once_and_again_when_a_file_changes():
    save_images("data", 30)
    data = ImageFolder("data", 16, "train")
    every = range(len(data))
    x, y = data.batch(every)
    data.keep_pixels("run")
    for kept in (data, ImageFolder("data", 16, "train")):  # that of the next run is the second
        with patch(vmae, "read_image", side_effect=AssertionError):        # nothing is decoded
            kept.keep_pixels("run")
            again, labels = kept.batch(every)
        assert torch.equal(x, again)
        assert torch.equal(y, labels)
    [before] = os.listdir("run")
    os.utime(Path("data", data.paths[0]), (1, 1))
    ImageFolder("data", 16, "train").keep_pixels("run")
    [after] = os.listdir("run")                            # the file of before is gone
    assert after != before

def test_what_stage_one_has_decoded_is_not_decoded_again():
    save_images("data", 60)
    trained()
    held_out = set(ImageFolder("data", 16, "val").paths)
    for main, line in ((train_ldm.main, TINY_LDM), (evaluate.main, "neighbours --n 2")):
        with patch(vmae, "read_image", wraps=vmae.read_image) as read:
            text = runs(main, line)
        assert "where they are decoded" in text
        assert {Path(call.args[0]).name for call in read.call_args_list} <= held_out
    shutil.copy("runs/vmae/last.pt", "stage_one.pt")
    shutil.rmtree("runs/vmae")                             # then they are decoded
    text = runs(train_ldm.main, f"{TINY_LDM} --vmae stage_one.pt --out again")
    assert "where they are decoded" not in text
    same(load("runs/ldm/last.pt")["ema"], load("again/last.pt")["ema"])

def test_without_a_cache_images_are_decoded_as_drafts():
    save_images("data", 10)
    data = ImageFolder("data", 16)
    data.keep_pixels("run", allowed=False)
    assert data.draft
    assert data.cache is None
    data = ImageFolder("data", 16)
    almost_full = SimpleNamespace(free=10)
    with patch(shutil, "disk_usage", return_value=almost_full):
        data.keep_pixels("run")
    assert data.draft
    assert data.cache is None
    assert os.listdir("run") == []

def test_copies_are_counted_while_images_are_decoded():
    save_images("data", 60)
    for i in range(60):
        shutil.copy(f"data/{i:03d}.png", f"data/{i:03d} (1).png")
    Path("data/broken.png").touch()                        # is no copy less
    train, val = vmae.open_images("data", 16)
    pixels = [x.numpy().tobytes() for x, _ in train]
    copies = len(pixels) - len(set(pixels))
    known = sum(x.numpy().tobytes() in pixels for x, _ in val)
    assert copies > 0 and known > 0
    text = printed(train.keep_pixels, "run", True, val)
    assert f"exact copies: {copies} of the {len(train)} images are copies of another one" in text
    assert f"warning: {known} of the {len(val)} held-out images are copies of some" in text
    assert "copies" in runs(train_vmae.main, TINY_RUN)
    save_images("other", 40)
    train, val = vmae.open_images("other", 16)
    assert "copies" not in printed(train.keep_pixels, "run", True, val)

def test_prefetch_prepares_the_next_batch_while_this_one_is_used():
    begun = [threading.Event() for _ in range(3)]

    def batches():
        for i in range(3):
            begun[i].set()
            yield i

    ahead = vmae.prefetch(batches())
    assert next(ahead) == 0
    assert begun[1].wait(timeout=60)                       # in another thread
    assert not begun[2].is_set()
    assert list(ahead) == [1, 2]

def test_errors_in_a_prefetched_batch_reach_the_run():
    def batches():
        yield 0
        raise OSError("the disk is gone")

    ahead = vmae.prefetch(batches())
    assert next(ahead) == 0
    assert "the disk is gone" in raises(OSError, next, ahead)

# ---- Noise schedule and loss ------------------------------------------------------------------

def test_schedules_fall_from_signal_to_noise():
    for kind in ("linear", "cosine"):
        for T in (100, 1000):
            bar = ldm.Schedule(kind, T).alpha_bar
            assert (bar[1:] <= bar[:-1]).all()
            assert bar[0] > 0.99
            assert 3e-5 < bar[-1] < 1e-3
    raises(ValueError, ldm.Schedule, "quadratic")          # there is none
    raises(ValueError, ldm.Schedule, "cosine", 1000, "x")
    raises(ValueError, ldm.Schedule, "cosine", 1000, "flow")       # has a path of its own

def test_schedules_are_those_of_ho_and_of_nichol():
    bar = ldm.Schedule("linear").alpha_bar
    close(bar[0], 1 - 1e-4, 1e-12)
    close(bar[1] / bar[0], 1 - 1e-4 - 0.0199 / 999, 1e-9)  # beta rises evenly from 1e-4 to .02
    bar = ldm.Schedule("cosine").alpha_bar
    f_0 = math.cos(0.008 / 1.008 * math.pi / 2) ** 2       # Nichol 2021, Eq. 17
    f_500 = math.cos(0.508 / 1.008 * math.pi / 2) ** 2
    close(bar[499], f_500 / f_0, 1e-9)                     # after 500 of the 1000 steps

def test_a_sampler_s_steps_end_on_clean_latents_for_every_number_of_steps():
    schedule = ldm.Schedule()
    for S in (1, 2, 3, 7, 50, 250, 333, 999, 1000):
        ts, bars, nexts = zip(*schedule.steps(S))
        assert len(set(ts)) == S
        assert ts[0] == 999 and min(ts) >= 0
        assert nexts == (*bars[1:], 1.0)                   # each begins where the last one ended
    raises(ValueError, schedule.steps, 1001)               # of T = 1000

def test_first_t_is_the_first_with_no_more_signal():
    schedule = ldm.Schedule()
    t = torch.tensor([0, 1, 499, 990])
    bar = schedule.alpha_bar_at(t).flatten()
    assert torch.equal(schedule.first_t(bar), t)
    assert torch.equal(schedule.first_t(bar + 1e-7), t)
    assert torch.equal(schedule.first_t(bar - 1e-7), t + 1)
    assert schedule.first_t(torch.tensor([1e-9])) == 999   # no t has as little

def test_z_0_and_eps_are_recovered_from_what_the_network_should_answer():
    z_0 = torch.randn(4, 2, 3, 3)
    eps = torch.randn(4, 2, 3, 3)
    for objective in ("eps", "v"):
        schedule = ldm.Schedule(objective=objective)
        for t in (0, 300, 900):
            ts = torch.full((4,), t)
            z_t = schedule.q_sample(z_0, ts, eps)
            answer = schedule.target(z_0, ts, eps)
            bar = schedule.alpha_bar[t].item()
            found_z_0, found_eps = schedule.z0_eps(z_t, answer, bar)
            close(found_z_0, z_0, 1e-4)
            close(found_eps, eps, 2e-3)                    # at t = 0 eps is divided by .006

def test_clipping_keeps_z_t():
    schedule = ldm.Schedule()
    z_t = torch.randn(4, 2, 3, 3)
    output = torch.randn(4, 2, 3, 3)
    for t in (0, 300, 900):
        bar = schedule.alpha_bar[t].item()
        z_0, eps = schedule.z0_eps(z_t, output, bar, clip=0.5)
        assert z_0.abs().max() <= 0.5
        together = math.sqrt(bar) * z_0 + math.sqrt(1 - bar) * eps         # Ho 2020, Eq. 4
        close(together, z_t, 1e-5)

def optimal(path, m, s):
    """The best possible network for latents ~ N(m, s^2): E[z_0 | z_t] in closed form."""
    def model(z_t, t, y):
        """On a path z_t = a z_0 + b eps. Both are read off from what becomes of 1 and 0."""
        one = torch.ones(len(z_t), 1, 1, 1, dtype=z_t.dtype)
        a = path.q_sample(one, t, 0 * one)
        b = path.q_sample(0 * one, t, one)
        variance = a**2 * s**2 + b**2                      # of z_t
        z_0 = m + a * s**2 / variance * (z_t - a * m)
        return path.target(z_0, t, (z_t - a * z_0) / b)

    return model

def silent(z_t, t, y):
    """A network that always answers 0."""
    return torch.zeros_like(z_t)

def test_loss_of_the_true_answer_is_zero_and_of_silence_one():
    z_0 = torch.full((64, 2, 4, 4), 0.7)
    for objective in ("eps", "v", "flow"):
        path = ldm.make_path(objective)
        model = optimal(path, 0.7, 0)
        close(ldm.loss_LDM(model, path, z_0), 0, 1e-3)
    close(ldm.loss_LDM(silent, ldm.Schedule(objective="eps"), z_0), 1, 0.1)    # E eps^2
    close(ldm.loss_LDM(silent, ldm.Flow(), z_0), 1 + 0.7**2, 0.1)  # E (z_0 - eps)^2

def test_loss_of_the_best_flow_is_the_variance_it_cannot_know():
    m = 0.7
    s = 0.5
    flow = ldm.Flow()
    z_0 = m + s * torch.randn(20000, 1, 1, 1)
    t = torch.randn(200000).sigmoid()                      # Esser 2024
    unknown = s**2 / (t**2 * s**2 + (1 - t) ** 2)          # the variance of z_0 - eps, given z_t
    loss = ldm.loss_LDM(optimal(flow, m, s), flow, z_0)
    close(loss, unknown.mean(), 0.03)

def times_drawn(kind, objective):
    """40,000 of the times that are trained, sorted."""
    schedule = ldm.Schedule(kind, objective=objective)
    t = schedule.times(torch.zeros(40000, 1, 1, 1), vmae.seeded(0)).sort().values
    assert 0 <= t[0] and t[-1] < 1000
    return t

def test_every_path_has_the_same_verbs():
    z_0 = torch.randn(5, 2, 3, 3)
    eps = torch.randn(5, 2, 3, 3)
    for objective in ("eps", "v", "flow"):
        path = ldm.make_path(objective)
        assert path.objective == objective
        t = path.times(z_0)
        assert t.shape == (5,)
        z_t = path.q_sample(z_0, t, eps)
        assert z_t.shape == path.target(z_0, t, eps).shape == z_0.shape
        assert len(path.steps(7)) == 7
        for S in (0, -1):
            raises(ValueError, path.steps, S)
        assert set(path.samplers) <= set(ldm.SAMPLERS)

def test_the_loss_trains_the_times_of_its_path():
    for path in (ldm.Schedule(objective="eps"), ldm.Schedule(), ldm.Flow()):
        drawn = []

        def model(z_t, t, y):
            drawn.append(t)
            return z_t

        z_0 = torch.randn(9, 2, 3, 3)
        ldm.loss_LDM(model, path, z_0, None, vmae.seeded(0))
        assert torch.equal(drawn[0], path.times(z_0, vmae.seeded(0)))

def test_times_are_uniform_for_eps():
    for kind in ("linear", "cosine"):
        t = times_drawn(kind, "eps")
        close(t / 1000, torch.linspace(0, 1, 40000), 0.03)

def test_times_are_in_the_middle_for_v_with_as_much_noise_under_any_schedule():
    quantiles = (torch.arange(40000) + 0.5) / 40000
    expected = (torch.special.ndtri(quantiles) * 0.7 + 0.4).sigmoid()      # of N(.4, .7^2)
    cosine = times_drawn("cosine", "v")
    linear = times_drawn("linear", "v")
    close(cosine / 1000, expected, 0.03)
    bar_of_cosine = ldm.Schedule("cosine").alpha_bar[cosine]
    bar_of_linear = ldm.Schedule("linear").alpha_bar[linear]
    close(bar_of_cosine, bar_of_linear, 0.01)

# ---- Samplers ---------------------------------------------------------------------------------

# With the best possible network for a Gaussian, a sampler has to land on that Gaussian, up to an
# error that falls as 1 / S with the number of steps S.

def test_samplers_land_on_a_gaussian():
    z_T = torch.randn(64, 4, 16, 16)
    m = 0.7
    s = 0.5
    for kind, objective in itertools.product(("linear", "cosine"), ("eps", "v")):
        schedule = ldm.Schedule(kind, objective=objective)
        model = optimal(schedule, m, s)
        for S in (20, 50, 250):                            # first order in 1 / S, and 65,536 draws
            z = ldm.ddim_sample(model, schedule, z_T, steps=S)
            close(z.mean(), m, 0.006)
            close(z.std(), s, 1.5 / S + 0.006)
            z = ldm.ddpm_sample(model, schedule, z_T, steps=S)
            close(z.mean(), m, 0.006)
            close(z.std(), s, 3 / S + 0.006)

def test_a_thousand_steps_and_a_single_one_land_where_they_can():
    z_T = torch.randn(64, 4, 16, 16)
    schedule = ldm.Schedule()
    model = optimal(schedule, 0.7, 0.5)
    for sampler in (ldm.ddim_sample, ldm.ddpm_sample):
        z = sampler(model, schedule, z_T, steps=1000)
        close(z.mean(), 0.7, 0.006)
        close(z.std(), 0.5, 0.006 + 0.0015)
    z = ldm.ddim_sample(model, schedule, z_T, steps=1)
    close(z.mean(), 0.7, 0.01)
    close(z.std(), 0, 0.01)                                # one step can only give the mean

def test_small_errors_of_the_network_stay_small():
    z_T = torch.randn(32, 16, 8, 8)
    for objective in ("eps", "v"):
        schedule = ldm.Schedule(objective=objective)
        model = optimal(schedule, 0.0, 1.0)

        def noisy(*args):
            return model(*args) + 0.01 * torch.randn_like(z_T)

        def rounded(*args):
            return model(*args).bfloat16().float()

        for wrong in (noisy, rounded):
            for S in (20, 50, 250):
                z = ldm.ddim_sample(wrong, schedule, z_T, steps=S)
                close(z.std(), 1, 0.1)
            z = ldm.ddpm_sample(wrong, schedule, z_T, steps=1000)
            close(z.std(), 1, 0.1)

def test_ddim_with_eta_one_is_ddpm():
    schedule = ldm.Schedule("linear")
    model = optimal(schedule, 0.3, 0.8)
    z_T = torch.randn(2, 3, 4, 4)
    for S in (1, 10, 200, 1000):
        torch.manual_seed(0)                               # both draw the same noise
        ddpm = ldm.ddpm_sample(model, schedule, z_T, steps=S)
        torch.manual_seed(0)
        ddim = ldm.ddim_sample(model, schedule, z_T, steps=S, eta=1.0)
        close(ddpm, ddim, 1e-3)

def test_samplers_record_the_estimate_of_z_0_at_each_step():
    z_T = torch.randn(2, 3, 4, 4)
    for objective in ("eps", "v", "flow"):
        path = ldm.make_path(objective)
        model = optimal(path, 0.3, 0.8)
        for name in path.samplers:
            record = []
            z = ldm.SAMPLERS[name](model, path, z_T, steps=7, record=record)
            assert len(record) == 7
            close(record[0], 0.3, 0.05)                    # of pure noise: hardly but the mean
            close(record[-1], z, 1e-5)                     # the last estimate is the result
    record = []
    ldm.ddpm_sample(silent, ldm.Schedule(), z_T, record=record)
    assert len(record) == 1000                             # by default all T, as in Ho 2020

def test_clip_bounds_the_estimates_of_ddim_and_ddpm():
    schedule = ldm.Schedule()
    model = optimal(schedule, 5.0, 1.0)                    # most of z_0 is above 2
    z_T = torch.randn(2, 3, 4, 4)
    for name in schedule.samplers:
        record = []
        ldm.SAMPLERS[name](model, schedule, z_T, steps=5, record=record, clip=2.0)
        assert torch.stack(record).abs().max() == 2

def test_euler_is_first_order_on_a_gaussian():
    m = 0.7
    s = 0.5
    flow = ldm.Flow()
    velocity = optimal(flow, m, s)
    z_T = torch.randn(4, 2, 8, 8).double()
    for shift in (1.0, 0.3):                               # .3 is LightningDiT's
        errors = []
        for S in (50, 100, 200):
            z = ldm.euler_sample(velocity, flow, z_T, steps=S, shift=shift)
            error = z - (m + s * z_T)                      # where the exact path ends
            errors.append(error.abs().max().item())
        assert 1.7 < errors[0] / errors[1] < 2.3, errors   # halved
        assert 1.7 < errors[1] / errors[2] < 2.3, errors

def test_euler_makes_as_many_steps_as_asked_for_at_shifted_times():
    middles = {1.0: 0.5, 0.3: 0.3 * 0.5 / (1 - 0.7 * 0.5)}
    for shift, middle in middles.items():
        times = []

        def velocity(z, t, y):
            times.append(t[0].item())
            return torch.zeros_like(z)

        z_T = torch.zeros(1, 2, 2, 2)
        ldm.euler_sample(velocity, ldm.Flow(), z_T, steps=250, shift=shift)
        assert len(times) == 250
        assert times[0] == 0 and times == sorted(times)
        close(times[125], middle, 1e-6)

def test_each_path_has_its_samplers_and_each_sampler_its_options():
    diffusion = drawable(ldm.Schedule())
    flow = drawable(ldm.Flow())
    assert diffusion.plan() == dict(cfg=1.5, sampler="ddim", steps=50)     # with classes
    assert flow.plan(1, shift=0.3) == dict(cfg=1, sampler="euler", steps=50, shift=0.3)
    assert diffusion.plan(2, "ddpm", 9, clip=3, eta=None) == dict(cfg=2, sampler="ddpm", steps=9,
                                                                  clip=3)
    assert drawable(ldm.Flow(), classes=()).plan()["cfg"] == 1
    for drawn_from, said, options in (
            (diffusion, "choose from ddim, ddpm", dict(sampler="euler")),
            (flow, "choose from euler", dict(sampler="ddim")),
            (diffusion, "the sampler ddpm has no such option", dict(sampler="ddpm", eta=1)),
            (diffusion, "at most the 1000", dict(steps=1001)),
            (flow, "at least 1", dict(steps=0)),
            (drawable(ldm.Flow(), classes=()), "unconditional", dict(cfg=2))):
        assert said in raises(InputError, drawn_from.plan, **options)
        assert said in raises(InputError, drawn_from.draw, range(2), **options)

# ---- Diffusion transformer, guidance, EMA, normalisation --------------------------------------

def tiny_dit(num_classes=0, patch_size=1):
    """A DiT with random weights everywhere, because adaLN-zero begins by answering zero."""
    torch.manual_seed(0)
    model = ldm.DiT(4, patch_size, 4, 32, 2, 4, num_classes)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model.eval().requires_grad_(False)

def drawable(path, classes=("left", "right", "front")):
    """What images are drawn from: random networks of both stages on this path."""
    ae = VMAE(**TINY_VMAE).eval().requires_grad_(False)    # its latents are 4 x 4 x 4
    return ldm.LDM(tiny_dit(len(classes)), path, torch.zeros(4), torch.ones(4), ae, list(classes))

def test_dit_starts_at_zero():
    model = ldm.DiT(4, 2, 4, 32, 1, 4, 2)
    z_t = torch.randn(2, 4, 4, 4)
    t = torch.tensor([0, 9])
    y = torch.tensor([0, 2])
    output = model(z_t, t, y)
    assert output.abs().max() == 0

def test_dit_puts_its_patches_where_they_belong():
    z_t = torch.randn(2, 4, 4, 4)
    t = torch.tensor([0, 9])
    for P in (1, 4):
        assert tiny_dit(patch_size=P)(z_t, t).shape == z_t.shape
    model = tiny_dit(patch_size=2)
    numbers = torch.arange(16.0)
    model.final_layer.linear.weight.zero_()
    model.final_layer.linear.bias.copy_(numbers)           # every patch answers 0 to 15
    patch_of_numbers = numbers.view(2, 2, 4).permute(2, 0, 1)              # channels innermost
    output = model(z_t, t)
    close(output[0], patch_of_numbers.repeat(1, 2, 2), 0)
    raises(ValueError, ldm.DiT, 4, 3)                      # patches of 3 in a grid of 4

def test_dit_comes_in_the_published_sizes():
    base = ldm.DiT(**ldm.sizes["base"])
    millions = sum(p.numel() for p in base.parameters()) / 1e6
    assert abs(millions - 130) < 1                         # Peebles 2023, Table 1: DiT-B, 130 M
    patch_sizes = {8: 1, 16: 1, 32: 2, 33: 1}              # S/2 where patches of 2 save something
    for grid, P in patch_sizes.items():
        assert ldm.dit_args("small", grid, 16, 3)["patch_size"] == P

def test_rope_is_a_rotation_on_the_cpu_and_elsewhere():
    rope = ldm.Rope(8, 4)
    q = torch.randn(2, 16, 8)
    elsewhere = mock.MagicMock(wraps=q, device=torch.device("meta"), dtype=q.dtype)
    elsewhere.__mul__ = lambda self, other: q * other
    with patch(torch, "view_as_complex", side_effect=AssertionError):      # compilers know none
        real = ldm.Rope.forward(rope, elsewhere)
    turned = rope(q)
    close(real, turned, 1e-6)
    close(turned.norm(dim=-1), q.norm(dim=-1), 1e-5)

def test_guidance_of_one_is_none_and_more_reaches_every_channel():
    model = tiny_dit(num_classes=3)
    z_t = torch.randn(2, 4, 4, 4)
    t = torch.full((2,), 500)
    y = torch.tensor([0, 2])
    plain = model(z_t, t, y)
    null = model(z_t, t, torch.tensor([3, 3]))             # after the classes 0, 1 and 2
    assert torch.equal(model(z_t, t), null)                # no label is the null label
    assert torch.equal(ldm.guided(model, z_t, 500, y, 1.0), plain)
    more = ldm.guided(model, z_t, 500, y, 4.0)
    close(more, null + 4 * (plain - null), 1e-4)
    change = (more - plain).abs().amax((0, 2, 3))          # (d,)
    assert change.min() > 0

def test_euler_guides_from_its_interval_on():
    model = tiny_dit(num_classes=3)
    batches = []

    def count(module, inputs, output):
        batches.append(len(output))

    model.register_forward_hook(count)
    z_T = torch.randn(2, 4, 4, 4)
    y = torch.tensor([0, 2])
    ldm.euler_sample(model, ldm.Flow(), z_T, y, steps=4, cfg=2.0, interval=0.5)
    assert batches == [2, 2, 4, 4]                         # two passes in one from t = 1/2 on

def test_labels_are_dropped_at_the_share_asked_for():
    labels = torch.zeros(20000, dtype=torch.long)
    y = ldm.LabelEmbed(7, 8).drop(labels, 0.1)
    assert set(y.tolist()) == {0, 7}                       # 7 is the null class
    close((y == 7).float().mean(), 0.1, 0.02)
    both_stages()
    with patch(ldm, "loss_LDM", wraps=ldm.loss_LDM) as loss:
        runs(train_ldm.main, f"{TINY_LDM} --drop 1 --out dropped")
    labels = loss.mock_calls[0].args[3]                    # of the first step
    assert (labels == 2).all()                             # after left and right

def test_normalise_is_per_channel_and_inverts():
    z = torch.randn(8, 3, 4, 4) * 5 + 2
    mean = torch.tensor([1.0, 2, 3])
    std = torch.tensor([5.0, 4, 3])
    normal = ldm.normalise(z, mean, std)
    second_channel = (z[:, 1] - 2) / 4
    close(normal[:, 1], second_channel, 1e-6)
    close(ldm.denormalise(normal, mean, std), z, 1e-5)

def test_ema_warms_up_and_copies_buffers():
    model = torch.nn.BatchNorm1d(1)
    expected = 1.0                                         # its weight to begin with
    ema = ldm.EMA(model, decay=0.5)
    model.weight.data.fill_(2.0)
    model.running_mean.fill_(7.0)
    for n in range(20):
        ema.update(model)
        decay = min(0.5, (1 + n) / (10 + n))               # the warm-up, then .5
        expected = decay * expected + (1 - decay) * 2.0
        close(ema.model.weight, expected, 1e-6)
    assert ema.model.running_mean == 7
    assert model.weight == 2                               # it is left alone

# ---- The cache of moments ---------------------------------------------------------------------

# Stage two reads mu and logvar of each image and of its mirror image, rows 2i and 2i + 1. They are
# encoded once.

def moments_cache(model, precision=contextlib.nullcontext):
    """Stage two's cache of the images in data/, kept in run/."""
    args = SimpleNamespace(out="run", flip=True)
    return train_ldm.cache_moments(model, ImageFolder("data", 16), args, CPU, precision)

def test_moments_are_those_of_a_fresh_encoding_of_image_and_mirror_image():
    save_images("data/a", 9)
    save_images("data/b", 8, seed=1)
    model = VMAE(**TINY_VMAE)
    data = ImageFolder("data", 16)
    cache = moments_cache(model)
    assert len(cache) == 34
    for i in (0, 8, 16):
        x, _ = data[i]
        q = model.encode(torch.stack([x, x.flip(-1)]))
        kept, _ = cache.batch([2 * i, 2 * i + 1])
        assert kept.dtype == torch.float16
        close(kept, moments_of(q), 0.01)
    _, y = cache.batch(range(34))
    assert y.tolist() == [0] * 18 + [1] * 16

def test_statistics_are_those_of_many_samples():
    save_images("data", 17)
    cache = moments_cache(VMAE(**TINY_VMAE))
    mean, std = train_ldm.statistics(cache)
    every, _ = cache.batch(range(len(cache)))
    mu, logvar = every.float().chunk(2, 1)
    z = torch.cat([Gaussian(mu, logvar).sample() for _ in range(200)])
    close(mean, z.mean((0, 2, 3)), 0.05)
    close(std, z.std((0, 2, 3)), 0.05)

def test_moments_are_made_once_and_never_stale():
    save_images("data", 8)
    model = VMAE(**TINY_VMAE)
    first = moments_cache(model)
    with patch(model, "encode", side_effect=AssertionError):               # found, not made
        assert moments_cache(model).path == first.path
    model.to_latent.bias.data[0] += 1                      # other weights
    second = moments_cache(model)
    assert second.path != first.path
    assert os.listdir("run") == [second.path.name]
    save_images("data", 8, seed=1)                         # other images
    third = moments_cache(model)
    assert third.path != second.path
    assert os.listdir("run") == [third.path.name]

def test_moments_are_encoded_in_the_run_s_precision():
    save_images("data", 8)
    model = VMAE(**TINY_VMAE)
    seen = set()

    def note(module, inputs, output):
        seen.add(output.dtype)

    model.to_latent.register_forward_hook(note)
    moments_cache(model, functools.partial(torch.autocast, "cpu", torch.bfloat16))
    assert seen == {torch.bfloat16}

def test_a_resumed_run_keeps_its_statistics():
    both_stages()
    ckpt = load("runs/ldm/last.pt")
    ckpt["latent_mean"] += 1                               # as if the latents had changed since
    torch.save(ckpt, "runs/ldm/last.pt")
    runs(train_ldm.main, "--steps 3 --resume")
    close(load("runs/ldm/last.pt")["latent_mean"], ckpt["latent_mean"], 0)

# ---- Batches, micro-batches, optimiser --------------------------------------------------------

# All that is random in a step depends on --seed, the step and the number of the micro-batch alone.
# So one process with two micro-batches, two with one each and a resumed run are the same run.

def batches_of(count, start=0, parts=(0,), batch=1, micro=1, seed=3):
    """The first `count` micro-batches of ten images, from a step on."""
    args = SimpleNamespace(seed=seed, batch=batch, micro=micro)
    return list(itertools.islice(train_vmae.index_batches(10, args, start, parts), count))

def test_every_epoch_is_a_new_order_of_all_images():
    order = sum(batches_of(40), [])
    for first in (0, 10, 20, 30):
        assert sorted(order[first:first + 10]) == list(range(10))
    assert order[:10] != order[10:20]
    assert order != sum(batches_of(40, seed=4), [])

def test_a_resumed_run_goes_on_in_the_same_order():
    order = sum(batches_of(40), [])
    assert sum(batches_of(20, start=17), []) == order[17:37]

def test_a_batch_is_shared_out_in_sorted_micro_batches():
    order = sum(batches_of(40), [])
    step_3 = order[21:28]                                  # of seven images per step
    of_one_process = batches_of(6, 3, range(3), batch=7, micro=3)
    assert of_one_process[0] == sorted(step_3[:3])
    assert of_one_process[1] == sorted(step_3[3:6])
    assert of_one_process[2] == step_3[6:]
    for number in range(3):                                # of three processes: steps 3 and 4
        of_this_process = batches_of(2, 3, [number], batch=7, micro=3)
        assert of_this_process == [of_one_process[number], of_one_process[3 + number]]

def test_seeds_of_different_numbers_have_nothing_in_common():
    numbers = list(itertools.product(range(3), repeat=3))  # of --seed, step, micro-batch
    assert len({vmae.seed_of(*of) for of in numbers}) == 27
    draws = [torch.randn(1000, generator=vmae.seeded(*of)) for of in numbers]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(27)
    assert correlation.abs().max() < 0.15                  # of independent ones: about .03 each
    again = torch.randn(1000, generator=vmae.seeded(0, 0, 1))
    assert torch.equal(draws[1], again)

def test_learning_rate_rises_and_falls_in_straight_lines():
    rates = [train_vmae.learning_rate(step, 1000, 1.0) for step in range(1000)]
    assert rates[0] < 0.1
    assert max(rates) == rates[19] > 0.98                  # after 2 % of the run
    close(torch.tensor(rates[20:]).diff(), torch.full((979,), -0.001), 1e-6)
    assert rates[-1] < 0.0011

MUON = SimpleNamespace(optimizer="muon", precision="float32")
ADAMW = SimpleNamespace(optimizer="adamw", precision="float32")

def names_by_group(model, args):
    """The names of the parameters that go to Muon, to AdamW with weight decay, and without."""
    names = {id(p): name for name, p in model.named_parameters()}
    opts = train_vmae.optimisers(model, args)
    decays, does_not = opts["opt"].param_groups
    assert (decays["weight_decay"], does_not["weight_decay"]) == (0.05, 0)
    muon = opts["muon"].param_groups if "muon" in opts else []
    groups = []
    for params in (sum([group["params"] for group in muon], []), decays["params"],
                   does_not["params"]):
        groups.append({names[id(p)] for p in params})
    return groups

def test_weight_decay_spares_norms_biases_and_the_frozen_encoder():
    model = VMAE(**TINY_VMAE)
    model.blocks.requires_grad_(False)
    for args in (MUON, ADAMW):
        muon, decays, does_not = names_by_group(model, args)
        assert "to_latent.weight" in decays
        assert does_not >= {"to_latent.bias", "norm.weight", "decoder_blocks.0.norm1.weight"}
        assert "mask_token" in does_not                    # (1, 1, D): one side is 1
        assert "blocks.0.mlp.fc1.weight" not in muon | decays | does_not

def test_muon_takes_the_matrices_of_the_blocks_and_adamw_all_else():
    of_a_block = {"attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"}
    muon, decays, _ = names_by_group(VMAE(**TINY_VMAE), MUON)
    assert muon == {f"{part}.{i}.{name}" for part in ("blocks", "decoder_blocks")
                    for i in range(2) for name in of_a_block}
    assert "patch_embed.proj.weight" in decays and "decoder_pred.linear_pred.weight" in decays
    model = ldm.DiT(input_size=4, in_channels=4, num_classes=2, **TINY_DIT)
    muon, decays, _ = names_by_group(model, MUON)
    of_a_block = {"attn.qkv.weight", "attn.proj.weight", "mlp.w12.weight", "mlp.w3.weight"}
    assert muon == {f"blocks.{i}.{name}" for i in range(2) for name in of_a_block}
    assert "blocks.0.adaLN_modulation.1.weight" in decays
    muon, decays, _ = names_by_group(model, ADAMW)
    assert not muon and "blocks.0.mlp.w3.weight" in decays
    muon, decays, _ = names_by_group(vmae.ConvAutoencoder(32, (32, 64), 4), MUON)
    assert "decoder.conv_in.weight" in decays
    assert "encoder.down_blocks.1.resnets.0.conv1.weight" in muon

def test_what_decays_is_what_decayed_in_earlier_runs_which_could_not_go_on_otherwise():
    model = ldm.DiT(input_size=4, in_channels=4, num_classes=2, **TINY_DIT)
    for args in (MUON, ADAMW):
        _, _, does_not = names_by_group(model, args)
        assert "x_embedder.proj.weight" in does_not        # a kernel of 1 x 1

def test_orthogonalise_makes_all_singular_values_about_one():
    for shape in ((3, 8, 8), (2, 8, 20), (2, 20, 8)):
        M = torch.randn(shape, dtype=torch.float64)
        U, S, V = torch.linalg.svd(M, full_matrices=False)
        # The same polynomial, five times on each singular value, which the norm has scaled.
        s = S / S.square().sum(1, keepdim=True).sqrt()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        close(train_vmae.orthogonalise(M), U @ torch.diag_embed(s) @ V, 1e-9)
        assert 0.6 < s[S > 0.01 * S.amax()].min() and s.max() < 1.3
    assert train_vmae.orthogonalise(torch.zeros(1, 3, 4)).abs().max() == 0

def test_a_step_of_muon_is_that_of_its_equations():
    W = [torch.randn(6, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)]
    before = [w.detach().clone() for w in W]
    opt = train_vmae.Muon(W, decay=0.5, dtype=torch.float32)
    opt.param_groups[0]["lr"] = 0.1
    opt.found_inf = torch.zeros(())
    M = torch.zeros(2, 6, 4)
    for _ in range(3):
        g = torch.randn(2, 6, 4)
        for w, its in zip(W, g):
            w.grad = its
        opt.step()
        M = 0.9 * M + 0.1 * g
        direction = train_vmae.orthogonalise(0.9 * M + 0.1 * g)
        for i in range(2):
            before[i] = (1 - 0.5 * 0.1) * before[i] - 0.6 * 0.1 * 6**0.5 * direction[i]
            close(W[i], before[i], 1e-5)

def test_muon_sees_a_kernel_as_a_matrix():
    kernel = torch.randn(6, 2, 3, 3, requires_grad=True)
    matrix = kernel.detach().flatten(1).requires_grad_()
    kernel.grad = torch.randn(6, 2, 3, 3)
    matrix.grad = kernel.grad.flatten(1)
    for w in (kernel, matrix):
        opt = train_vmae.Muon([w], decay=0.0, dtype=torch.float32)
        opt.param_groups[0]["lr"] = 0.1
        opt.found_inf = torch.zeros(())
        opt.step()
    close(kernel.flatten(1), matrix, 1e-6)

def test_parts_are_equal_and_as_few_as_fit():
    equal_parts = train_vmae.equal_parts
    assert equal_parts(16, fits=99) == 16
    assert equal_parts(16, fits=15) == 8
    assert equal_parts(16, fits=7) == 4
    assert equal_parts(128, fits=100) == 64
    assert equal_parts(9, fits=5) == 3                     # three equal parts, rather than 5 + 4
    assert equal_parts(7, fits=3) == 1                     # rather than 3 + 3 + 1

def test_parts_are_shared_out_over_all_processes():
    for world, batch, fits, part in [(2, 8, 8, 4), (2, 8, 3, 2), (7, 16, 16, 2), (8, 8, 8, 1)]:
        with patch(train_vmae, "WORLD", world):
            assert train_vmae.equal_parts(batch, fits) == part

def nothing_to_try(n):
    """In place of largest_part, where no GPU is there to try it."""
    raise AssertionError

def micro_chosen(batch, micro=None, device=CPU, largest_part=nothing_to_try, at_once=99):
    """What choose_micro chooses: --micro, and the numbers of this process's parts."""
    args = SimpleNamespace(batch=batch, micro=micro)
    given = {}
    if micro is not None:
        given["micro"] = micro
    with patch(torch.cuda, "empty_cache"):                 # which needs a GPU
        args.micro = train_vmae.choose_micro(args, given, device, largest_part, {}, at_once)
    return args.micro, list(train_vmae.parts_of_this_process(args))

@patch(train_vmae, "WORLD", 2)
@patch(train_vmae, "RANK", 1)
def test_each_of_two_processes_takes_every_second_part():
    assert micro_chosen(batch=8, micro=2) == (2, [1, 3])   # of the parts 0 to 3
    assert "give --micro 4" in raises(InputError, micro_chosen, batch=8, micro=8)
    assert "give a larger --batch" in raises(InputError, micro_chosen, batch=1, micro=1)

def test_without_a_gpu_a_constant_number_of_images_is_worked_on_at_once():
    assert micro_chosen(batch=64, at_once=20) == (16, [0, 1, 2, 3])

def test_micro_is_halved_until_a_step_fits_a_small_card_with_a_tenth_to_spare():
    tried = []

    def largest_part(n):
        tried.append(n)
        if n > 20:
            raise torch.OutOfMemoryError

    micro, numbers = micro_chosen(batch=64, device=CUDA, largest_part=largest_part)
    assert tried == [71, 36, 18]                           # 1.1 times 64, 32, 16, rounded up
    assert micro == 16
    assert numbers == [0, 1, 2, 3]
    micro, _ = micro_chosen(batch=64, micro=32, device=CUDA)
    assert micro == 32                                     # what is given is not tried

def a_small_network():
    """-> a network of two layers, of which Muon takes one, and its optimisers."""
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.add_module("block", torch.nn.Linear(3, 3))
    model.add_module("last", torch.nn.Linear(3, 2))
    opts = train_vmae.optimisers(model, MUON)
    assert list(opts) == ["opt", "muon"]
    return model, opts

def states_of(model, opts):
    """The weights and the moments of all optimisers."""
    return [model.state_dict(), *[opt.state_dict() for opt in opts.values()]]

def steps_of_a_small_network(tries=0):
    """Two optimiser steps; before each of them, this many trials of a step, of which every second
    one runs out of memory after its gradients -> weights and moments."""
    model, opts = a_small_network()

    def largest_part(n):
        model(torch.ones(n, 3)).sum().backward()
        if n % 2 == 1:
            raise torch.OutOfMemoryError

    for _ in range(2):
        for n in range(tries):
            with patch(torch.cuda, "empty_cache"):
                fits = train_vmae.step_fits(n, largest_part, {"model": model, **opts})
            assert fits == (n % 2 == 0)
        model(torch.randn(4, 3)).square().sum().backward()
        assert train_vmae.optimiser_step(opts.values(), model, lr=0.1)
    return states_of(model, opts)

def test_a_trial_leaves_weights_and_moments_as_if_nothing_had_been_tried():
    same(steps_of_a_small_network(), steps_of_a_small_network(tries=4))

def with_a_trial():
    """Patch: before it begins, a trainer tries out three images at once, as it does on CUDA."""
    choose_micro = train_vmae.choose_micro

    def trial_first(args, given, device, largest_part, states, at_once):
        with patch(torch.cuda, "empty_cache"):
            assert train_vmae.step_fits(3, largest_part, states)
        return choose_micro(args, given, device, largest_part, states, at_once)

    return patch(train_vmae, "choose_micro", trial_first)

def test_a_trial_sees_whole_images_and_every_loss_and_changes_nothing_of_a_run():
    save_images("data", 8)
    losses_of = {"vmae": ["loss_VMAE"], "sdvae": ["loss_VMAE", "loss_G", "loss_D"]}
    for preset, losses in losses_of.items():
        trained(f"--preset {preset}", "plain")
        spy = mock.Mock(wraps=vmae)
        with (patch(vmae, "loss_VMAE", spy.loss_VMAE),
              patch(vmae, "loss_G", spy.loss_G),
              patch(vmae, "loss_D", spy.loss_D),
              with_a_trial()):
            trained(f"--preset {preset}", "tried")
        assert names_of_calls(spy)[:len(losses)] == losses
        mask = spy.mock_calls[0].args[3]                   # of loss_VMAE
        assert len(mask) == 3
        assert mask.sum() == 0
        same(load("plain/last.pt"), load("tried/last.pt"))

def test_a_trial_changes_nothing_of_stage_two():
    both_stages()
    with with_a_trial():
        runs(train_ldm.main, f"{TINY_LDM} --out tried")
    same(load("runs/ldm/last.pt"), load("tried/last.pt"))

def test_two_micro_batches_equal_one():
    # Each part draws its own flips. So images are equal to their mirror images here, and ae draws
    # nothing else.
    os.mkdir("data")
    for i, left in enumerate(random_pixels((12, 16, 8, 3))):
        right = left[:, ::-1]
        image = np.concatenate([left, right], 1)
        Image.fromarray(image).save(f"data/{i}.png")
    go = "--preset ae --batch 8 --lr 1 --micro"

    def sgd(model, args):                                  # AdamW would magnify rounding errors
        return {"opt": torch.optim.SGD(model.parameters(), fused=True)}

    with patch(train_vmae, "optimisers", sgd):
        one = trained(f"{go} 8", "one")
        two = trained(f"{go} 3", "two")                    # 3 + 3 + 2 images
        less = trained(f"{go} 8 --steps 1", "less")
    close_weights(one, two, 1e-6)
    assert all_differ(one, less)
    assert load("two/last.pt")["train_args"]["micro"] == 3

def test_whole_images_are_spread_evenly_over_the_steps():
    steps = range(1000)
    half = [train_vmae.sees_whole_images(step, 0.5) for step in steps]
    assert half == [False, True] * 500
    quarter = [train_vmae.sees_whole_images(step, 0.25) for step in steps]
    assert quarter == [False, False, False, True] * 250
    assert not any(train_vmae.sees_whole_images(step, 0) for step in steps)
    assert all(train_vmae.sees_whole_images(step, 1) for step in steps)

def test_every_other_step_of_a_run_sees_whole_images():
    save_images("data", 8)
    with patch(vmae, "loss_VMAE", wraps=vmae.loss_VMAE) as loss:
        trained("--steps 4 --whole 0.5")
    masks = [call.args[3] for call in loss.mock_calls]     # (4, 16) each
    assert [mask.sum().item() for mask in masks] == [40, 0, 40, 0]         # 16 - 6 of 4 images

# ---- Precision --------------------------------------------------------------------------------

def test_a_card_is_asked_for_bfloat16():
    answers = {(7, 5): False, (8, 0): True, (9, 0): True}  # T4, A100, H200
    for capability, answer in answers.items():
        with patch(torch.cuda, "get_device_capability", return_value=capability):
            assert vmae.has_bfloat16(CUDA) is answer
    assert not vmae.has_bfloat16(torch.device("meta"))     # neither a GPU nor a CPU

def test_bfloat16_is_measured_on_a_cpu():
    for slow, answer in ((torch.bfloat16, False), (torch.float32, True)):
        seconds = {torch.bfloat16: 0.001, torch.float32: 0.001, slow: 0.002}
        products = set()

        def product(a, b):
            products.add(a.dtype)
            time.sleep(seconds[a.dtype])

        with patch(torch.Tensor, "__matmul__", product):
            assert vmae.has_bfloat16(CPU) is answer
        assert products == {torch.float32, torch.bfloat16}

def test_precision_is_chosen_once_and_then_used():
    for fast, precision in ((True, "bfloat16"), (False, "float32")):
        args = SimpleNamespace(precision="auto")
        with patch(vmae, "has_bfloat16", return_value=fast):
            autocast = train_vmae.matmul_precision(args, CPU)
        assert args.precision == precision                    # which the checkpoint keeps
        with autocast():
            assert torch.is_autocast_enabled("cpu") == fast

# ---- Steps that are left out ------------------------------------------------------------------

# A step whose gradient is not finite changes nothing and is counted. More than ten of them since
# the last line of the log end the run before it saves.

def test_a_step_with_an_infinite_gradient_changes_nothing():
    model, opts = a_small_network()
    model(torch.ones(4, 3)).sum().backward()
    assert train_vmae.optimiser_step(opts.values(), model, lr=0.1)
    before = copy.deepcopy(states_of(model, opts))
    for bad in (math.inf, math.nan):
        loss = bad * model(torch.ones(4, 3)).sum()
        loss.backward()
        assert not train_vmae.optimiser_step(opts.values(), model, lr=0.1)
        same(states_of(model, opts), before)
        for p in model.parameters():
            assert p.grad.abs().max() == 0                 # the next step begins anew

def test_gradients_are_clipped_at_norm_one():
    moved = []
    for scale in (1, 1000):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        before = model.weight.detach().clone()
        loss = scale * model(torch.ones(4, 3)).sum()
        loss.backward()
        opt = torch.optim.SGD(model.parameters(), fused=True)
        train_vmae.optimiser_step([opt], model, lr=1.0)
        moved.append((model.weight - before).detach())
    close(moved[0], moved[1], 1e-5)
    assert moved[0].norm() < 1                             # of weight and bias together: 1

def nan_in(bad, module=vmae, name="loss_M"):
    """Patch: this loss is NaN in the calls whose numbers are in `bad`. With --whole 0, loss_M is
    called once per micro-batch."""
    sound = getattr(module, name)
    calls = itertools.count()

    def loss(*args):
        if next(calls) in bad:
            return math.nan * sound(*args)
        return sound(*args)

    return patch(module, name, loss)

BAD_RUN = f"{TINY_RUN} --whole 0 --steps 60 --save-every 20"
no_preview = patch(train_vmae, "validate", return_value={})

@no_preview
def test_ten_bad_steps_are_left_out_and_counted(validate):
    save_images("data", 12)
    with nan_in(range(25, 35)):
        runs(train_vmae.main, BAD_RUN)
    assert logged("runs/vmae", "step") == [20, 40, 50, 60]
    assert logged("runs/vmae", "skipped") == [None, 10, None, None]
    assert all(math.isfinite(L_M) for L_M in logged("runs/vmae", "L_M"))
    for p in vmae.load_vmae("runs/vmae").parameters():
        assert p.isfinite().all()

@no_preview
def test_more_than_ten_bad_steps_end_the_run_before_the_save_and_name_the_term(validate):
    save_images("data", 12)
    with nan_in({19, *range(20, 40, 2), 39}):              # 19 is the last call before a line
        text = runs(train_vmae.main, BAD_RUN, status=1)
    message = text[text.index("error"):]
    assert "step 40: L_M infinite or NaN, in 11 of the last 20 steps" in message
    assert "L_R" not in message
    assert load("runs/vmae/last.pt")["step"] == 20         # as it was
    assert logged("runs/vmae", "step") == [20]
    assert validate.call_count == 1

@no_preview
def test_a_resumed_run_is_not_stopped_by_one_bad_batch_that_it_meets_again(validate):
    save_images("data", 12)
    with nan_in(range(20, 31)):
        runs(train_vmae.main, BAD_RUN, status=1)           # after the save at step 20
    with nan_in({5}):
        runs(train_vmae.main, f"{BAD_RUN} --resume")
    assert load("runs/vmae/last.pt")["step"] == 60
    assert logged("runs/vmae", "skipped") == [None, 1, None, None]

@no_preview
def test_a_bad_gradient_of_sound_losses_is_named_as_that(validate):
    save_images("data", 12)
    infinite = patch(torch.nn.utils, "clip_grad_norm_", return_value=torch.tensor(math.inf))
    with infinite:
        text = runs(train_vmae.main, f"{TINY_RUN} --steps 11", status=1)
    assert "step 11: the gradient infinite or NaN, in 11 of the last 11 steps" in text

@no_preview
def test_bad_steps_of_the_discriminator_count_as_well(validate):
    save_images("data", 12)
    with nan_in(range(99), vmae, "loss_D"):                # it begins at half of the steps
        text = runs(train_vmae.main, f"{TINY_RUN} --preset sdvae --steps 22", status=1)
    assert "step 22: L_D infinite or NaN, in 11 of the last 22 steps" in text

def test_bad_steps_of_stage_two_count_as_well():
    both_stages()
    before = Path("runs/ldm/last.pt").read_bytes()
    with nan_in(range(99), ldm, "loss_LDM"):
        text = runs(train_ldm.main, "--steps 13 --resume", status=1)
    assert "step 13: L_v infinite or NaN, in 11 of the last 11 steps" in text
    assert Path("runs/ldm/last.pt").read_bytes() == before

# ---- The log ----------------------------------------------------------------------------------

class Clock:
    """A clock that shows what the test says."""

    def __init__(self):
        self.now = 0.0

    def takes(self, seconds, function):
        """A function that does the same and takes this long."""
        def slow(*args, **options):
            self.now += seconds
            return function(*args, **options)

        return slow

def measures_nothing(*args, **options):
    """In place of what measures or saves."""
    return {}

def test_speed_in_the_log_leaves_saves_and_measuring_out():
    both_stages()
    clock = Clock()
    for script, line, measure in (
            (train_vmae, f"{TINY_RUN} --out one", "validate"),
            (train_ldm, f"{TINY_LDM} --batch 4 --out two", "measure")):
        step = clock.takes(2, train_vmae.optimiser_step)
        with (patch(time, "perf_counter", lambda: clock.now),
              patch(train_vmae, "optimiser_step", step),
              patch(script, measure, clock.takes(50, measures_nothing)),
              patch(vmae, "save_checkpoint", clock.takes(100, measures_nothing))):
            runs(script.main, f"{line} --steps 6 --save-every 2")
    for run in ("one", "two"):
        assert logged(run, "images_per_s") == [2.0, 2.0, 2.0]              # 4 images in 2 s

def log_after(*parts):
    """The means in the log after one step, of which each part is (share of the batch, losses)."""
    log = train_vmae.Run(SimpleNamespace(out=".", batch=4), {}, 0, CPU)
    for share, losses in parts:
        terms = {name: torch.tensor(value) for name, value in losses.items()}
        log.add(terms, share)
    return log.means(1)

def test_means_in_the_log_weigh_parts_of_a_batch_by_their_images():
    means = log_after((0.75, {"L_R": 1.0}), (0.25, {"L_R": 5.0}))
    assert means["L_R"] == 2                               # .75 + 1.25

def test_means_in_the_log_are_of_the_steps_that_have_the_term():
    means = log_after((0.5, {"L_R": 1.0, "L_M": 3.0}), (0.5, {"L_R": 2.0}))
    assert means["L_R"] == 1.5
    assert means["L_M"] == 3                               # whole images have none

def test_means_in_the_log_are_of_what_is_finite():
    means = log_after((0.5, {"L_R": 1.0}), (0.5, {"L_R": math.nan}))
    assert means["L_R"] == 1
    means = log_after((1.0, {"L_R": math.inf}))
    assert math.isnan(means["L_R"])
    assert vmae.to_json(means["L_R"]) == "null"            # JSON knows neither NaN nor infinity

def test_a_resumed_log_drops_damaged_lines_and_steps_that_run_again():
    save_images("data", 12)
    runs(train_vmae.main, f"{TINY_RUN} --save-every 1")
    with open("runs/vmae/log.jsonl", "ab") as log:         # what a power cut or an editor may leave
        log.write(b'{"step": 3, "lr\n\xff\xfe\n{"step": 2, "lr": 0{"step": 2, "lr": 1}\n{"step": 9')
        log.write(b', "lr": 0}\n{"step": 3')
    runs(train_vmae.main, f"{TINY_RUN} --steps 3 --resume")
    assert logged("runs/vmae", "step") == [1, 2, 2, 3]

# ---- Interruptions and resume -----------------------------------------------------------------

# A run that ends between two saves loses the steps since the last one, and nothing else.

def interrupted_by(number):
    """Patch: the run gets this signal in the middle of its first step."""
    random_flip = vmae.random_flip
    signals = [number]

    def interrupted(x, generator):
        if signals:
            os.kill(os.getpid(), signals.pop())
        return random_flip(x, generator)

    return patch(vmae, "random_flip", interrupted)

def test_a_run_that_is_interrupted_and_resumed_ends_in_the_same_weights():
    save_images("data", 12)
    go = f"{TINY_RUN} --steps 4 --save-every 2 --out"
    runs(train_vmae.main, f"{go} whole")
    text = ""
    for step, number in ((1, signal.SIGTERM), (2, signal.SIGINT)):
        with interrupted_by(number):
            text += runs(train_vmae.main, f"{go} parts --resume", status=1)
        assert f"stopped after step {step}, which is saved" in text
        assert load("parts/last.pt")["step"] == step
    assert text.count("no checkpoint yet, so the run begins") == 1
    runs(train_vmae.main, "--out parts --resume")          # with the options that it had
    same(load("whole/last.pt"), load("parts/last.pt"))     # no random state is stored
    assert logged("whole", "step") == [2, 4]
    assert logged("parts", "step") == [1, 2, 4]
    before = Path("parts/last.pt").read_bytes()
    assert "complete, at step 4 of 4" in runs(train_vmae.main, f"{go} parts --resume")
    assert Path("parts/last.pt").read_bytes() == before

def test_stage_two_resumes_as_if_it_had_not_been_interrupted():
    both_stages()
    go = f"{TINY_LDM} --steps 4 --out"
    with patch(train_ldm, "measure", return_value={}):
        runs(train_ldm.main, f"{go} whole")
        random_seed = vmae.seed_of

        def interrupted(*numbers):
            if numbers == (0, 1, 0):                       # the second step
                os.kill(os.getpid(), signal.SIGTERM)
            return random_seed(*numbers)

        with patch(vmae, "seed_of", interrupted):
            text = runs(train_ldm.main, f"{go} parts", status=1)
        assert "stopped after step 2" in text
        runs(train_ldm.main, "--out parts --resume")
    same(load("whole/last.pt"), load("parts/last.pt"))     # with the EMA and its warm-up

def test_a_second_ctrl_c_ends_a_run_at_once():
    stop = train_vmae.Stop()
    assert not stop.received
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.received
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL

def test_a_closed_terminal_saves_first_unless_nohup_asks_to_go_on():
    before = signal.getsignal(signal.SIGHUP)
    try:
        stop = train_vmae.Stop()
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop = train_vmae.Stop()
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.received
    finally:
        signal.signal(signal.SIGHUP, before)

def test_a_run_that_gets_more_steps_says_what_its_learning_rate_does():
    save_images("data", 12)
    trained()
    text = runs(train_vmae.main, "--resume --steps 4 --lr 0.01 --precision float32")
    assert "learning rate: 0.002 in the last step of the run; it goes on from 0.005" in text
    assert "learning rate" not in runs(train_vmae.main, "--resume --steps 4")      # complete

# A run that fell along a cosine would otherwise go on with up to four times its rate, unsaid.
def test_a_run_of_another_learning_rate_says_so_and_the_same_does_not():
    save_images("data", 12)
    for curve, words in ((lambda step, steps, peak: peak / 7, True), (None, False)):
        with patch(train_vmae, "learning_rate", curve or train_vmae.learning_rate):
            shutil.rmtree("run", ignore_errors=True)
            runs(train_vmae.main, f"{TINY_RUN} --steps 4 --save-every 2 --keep --out run")
        shutil.copy("run/step_000002.pt", "run/last.pt")
        text = runs(train_vmae.main, "--resume --out run")
        assert ("learning rate:" in text) == words

def test_held_out_classes_meet_those_of_training_by_name():
    save_two_classes("b", "c")
    save_images("val/a", 3, seed=2)
    save_images("val/b", 3, seed=3)
    trained("--val val")
    with patch(ldm, "loss_LDM", wraps=ldm.loss_LDM) as loss:
        text = runs(train_ldm.main, TINY_LDM)
    assert "held out: images of a, which training does not know" in text
    labels = loss.call_args.args[3]                        # of the last call, which measures
    assert sorted(labels.tolist()) == [0, 0, 0, 2, 2, 2]   # of b; the null class

@patch(train_vmae, "WORLD", 2)
def test_under_torchrun_every_signal_is_only_noted():
    stop = train_vmae.Stop()
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.received

def test_processes_wait_until_process_0_has_saved():
    save_images("data", 12)
    spy = mock.Mock(wraps=vmae)
    with (patch(vmae, "save_checkpoint", spy.save_checkpoint),
          patch(vmae, "wait_for_all", spy.wait_for_all)):
        runs(train_vmae.main, TINY_RUN)
    assert names_of_calls(spy)[-2:] == ["save_checkpoint", "wait_for_all"]

def test_processes_that_see_another_checkpoint_are_told():
    with patch(vmae, "from_first", return_value=5):
        message = raises(InputError, train_vmae.load_states, SimpleNamespace(out="run"), None, {})
    assert "process 0 finds step 5" in message and "finds 0" in message

# ---- Options: defaults, then the preset, then the checkpoint, then what is given --------------

# Each layer covers the one before. What a help text says of a default is compared with what the
# trainers then use, for each preset and on each kind of device.

def save_run(script, **train_args):
    """A checkpoint in run/ of a run of this trainer with these options."""
    args = vars(options_of(script, "--out elsewhere"))
    args.update({"lr": 0.1, **train_args})
    opt = dict(param_groups=[dict(lr=0.1)])
    entries = dict(step=1, model_args={}, model={}, train_args=args, opt=opt)
    if script is train_ldm:
        entries["vmae"] = {}
    vmae.save_checkpoint("run/last.pt", **entries)

def test_each_layer_of_options_covers_the_one_before():
    os.mkdir("run")
    save_run(train_vmae, preset="dae", noise=0.3, batch=8, micro=4, steps=9, lr=0.5)
    for line, noise in (
            ("", 0.0),                                     # the default
            ("--preset dae", 0.2),                         # over it the preset
            ("--preset dae --out run --resume", 0.3),      # over that the checkpoint
            ("--preset dae --noise 0.4", 0.4)):            # and over all what is given
        assert options_of(train_vmae, line).noise == noise, line
    assert options_of(train_vmae, "--out run --resume").steps == 9
    assert options_of(train_vmae, "--out run --resume --steps 12").steps == 12
    assert options_of(train_vmae, "--out run --resume").preset == "dae"

def test_each_layer_of_options_of_stage_two_covers_the_one_before():
    os.mkdir("run")
    save_run(train_ldm, drop=0.3, batch=8, micro=4, steps=9, lr=0.5)
    assert options_of(train_ldm).drop == 0.1
    assert options_of(train_ldm, "--drop 0.2").drop == 0.2
    assert options_of(train_ldm, "--out run --resume").drop == 0.3
    assert options_of(train_ldm, "--out run --resume").lr == 0.5
    assert options_of(train_ldm, "--out run --resume --lr 2").lr == 2

def test_tuning_covers_the_preset():
    args = options_of(train_vmae, "--tune decoder --init some.pt")
    assert (args.mask, args.out) == (0, "runs/tuned")
    assert options_of(train_vmae, "--tune decoder --init some.pt --mask 0.3").mask == 0.3
    assert options_of(train_vmae, "--preset mae").out == "runs/mae"

def test_a_resumed_run_may_change_some_options_and_is_asked_for_others_anew():
    os.mkdir("run")
    save_run(train_vmae, preset="mae", data="elsewhere", mask=0.5, flip=True, batch=8, micro=4,
             steps=9, device="cuda", compile=True)
    free = "--data a --val ./b/../c --micro 2 --lr 1 --save-every 3 --precision float32"
    args = options_of(train_vmae, f"--out run --resume {free}")
    assert (args.data, args.val) == (os.path.abspath("a"), os.path.abspath("c"))
    assert (args.micro, args.lr, args.save_every, args.precision) == (2, 1, 3, "float32")
    assert (args.device, args.compile) == ("auto", None)   # of this machine, not of the last one
    assert options_of(train_vmae, "--out run --resume --mask 0.5").mask == 0.5     # the same
    for line in ("--mask 0.6", "--seed 1", "--batch 16", "--preset vmae", "--optimizer muon",
                 "--no-flip"):
        option = line.split()[0]
        message = raises(InputError, options_of, train_vmae, f"--out run --resume {line}")
        assert message.startswith(option.replace("--no-", "--")) and "the run in run has" in message

# Who had tried the built-in faces was told that a run on photographs was complete.
def test_a_run_on_the_built_in_faces_does_not_go_on_with_a_folder():
    os.mkdir("run")
    save_images("photographs", 4)
    save_run(train_vmae, data=None, batch=8, micro=8, steps=1)             # complete
    message = raises(InputError, options_of, train_vmae, "--out run --resume --data photographs")
    assert "photographs" in message and "built-in faces; begin another with --out" in message
    save_run(train_vmae, data="elsewhere", batch=8, micro=8, steps=9)      # moved meanwhile
    args = options_of(train_vmae, "--out run --resume --data photographs")
    assert args.data == os.path.abspath("photographs")

def test_a_run_from_before_muon_goes_on_with_adamw():
    save_images("data", 12)
    trained("--optimizer adamw")
    ckpt = load("runs/vmae/last.pt")
    del ckpt["train_args"]["optimizer"]
    torch.save(ckpt, "runs/vmae/last.pt")
    runs(train_vmae.main, "--resume --steps 3 --precision float32")
    ckpt = load("runs/vmae/last.pt")
    assert (ckpt["step"], ckpt["train_args"]["optimizer"]) == (3, "adamw")
    assert "muon" not in ckpt

def test_micro_is_kept_by_a_resumed_run_while_it_suffices():
    os.mkdir("run")
    save_run(train_vmae, batch=8, micro=4, steps=9)
    args = options_of(train_vmae, "--out run --resume")
    for world, micro in ((1, 4), (2, 4), (3, 2)):          # 2: chosen anew
        with patch(train_vmae, "WORLD", world):
            assert train_vmae.choose_micro(args, {}, CPU, nothing_to_try, {}, 99) == micro

def help_of(script):
    """{option: what its help says of the default}."""
    with mock.patch.dict(os.environ, COLUMNS="1000"):
        text = runs(script.main, "--help")
    text = re.sub(r"\n {10,}", " ", text)                  # long options have their help below
    return dict(re.findall(r"^  --([\w-]+).*\(default: (.*)\)$", text, re.MULTILINE))

def of_preset(text, preset):
    """The value for a preset in "vmae and mae 0.6, others 0", for example."""
    for clause in text.split(", "):
        *names, value = clause.replace(" and ", " ").split()
        if preset in names or names == ["others"]:
            return value

def test_defaults_in_the_help_are_those_of_each_preset():
    help_text = help_of(train_vmae)
    for preset in train_vmae.PRESETS:
        args = vars(options_of(train_vmae, f"--preset {preset}"))
        for name in ("arch", "mask", "noise", "lambda-reg", "lambda-adv", "kl-mean"):
            real = args[name.replace("-", "_")]
            said = of_preset(help_text[name], preset)
            assert type(real)(said) == real, (preset, name)
        assert args["out"] == f"runs/{preset}"

def test_defaults_in_the_help_are_the_real_ones():
    of_both = ["save-every", "seed", "precision"]
    for script, names in ((train_vmae, ["preset", "whole", "lambda-m", *of_both]),
                          (train_ldm, ["drop", *of_both])):
        help_text = help_of(script)
        args = vars(options_of(script))
        for name in names:
            real = args[name.replace("-", "_")]
            assert help_text[name] == str(real), name
        assert help_text["out"] == "stage one: runs/PRESET; stage two: runs/ldm"
        for name in ("batch", "steps", "optimizer", "lr"):
            assert help_text[name] == "see RECIPES" and args[name] is None
    assert options_of(train_ldm).out == "runs/ldm"
    assert options_of(train_ldm).vmae == os.path.abspath(help_of(train_ldm)["vmae"])

def filled_in(line, device=CPU, known=None):
    """All options of stage one, when the device and the checkpoint of --init are known."""
    args = options_of(train_vmae, line)
    train_vmae.fill_in(args, {}, device, known)
    return args

def test_size_and_model_in_the_help_depend_on_the_device_as_it_says():
    help_text = help_of(train_vmae)
    assert help_text["size"] == "that of --init; faces 32; folders 256 on CUDA, else 64"
    words = "stage one: tiny to 32 px; above, base on CUDA, else small"
    assert help_text["model"] == f"{words}; stage two: small on CUDA, else tiny"
    for line, device, size, model in (
            ("", CPU, 32, "tiny"),
            ("", CUDA, 32, "tiny"),
            ("--size 33", CPU, 33, "small"),
            ("--data x", CPU, 64, "small"),
            ("--data x", CUDA, 256, "base"),
            ("--data x --size 32", CUDA, 32, "tiny"),
            ("--model base", CPU, 32, "base")):
        args = filled_in(line, device)
        assert (args.size, args.model) == (size, model), line

def test_weight_of_L_P_in_the_help_depends_on_the_data_as_it_says():
    words = "vmae and sdvae 0.5 on a folder if VGG's weights can be had, otherwise 0"
    assert help_of(train_vmae)["lambda-p"] == words        # its last part: see the LPIPS tests
    for preset in train_vmae.PRESETS:
        expected = 0.5 if preset in ("vmae", "sdvae") else 0
        assert filled_in(f"--preset {preset} --data x").lambda_p == expected
        assert filled_in(f"--preset {preset}").lambda_p == 0               # on the faces
    assert filled_in("--tune decoder --init some.pt").lambda_p == 10       # the authors' last stage

def test_compiling_in_the_help_depends_on_the_device_as_it_says():
    words = "on CUDA yes, with blocks from size small on; elsewhere no"    # sizes: see below
    for script in (train_vmae, train_ldm):
        assert help_of(script)["compile"] == words
    assert filled_in("", CUDA).compile is True
    assert filled_in("", CPU).compile is False
    assert filled_in("--no-compile", CUDA).compile is False
    assert filled_in("--compile", CPU).compile is True

def test_auto_takes_the_gpu_if_there_is_one():
    assert help_of(train_vmae)["device"] == "cuda if there is one"
    with patch(torch.cuda, "is_available", return_value=False):
        assert vmae.start("auto") == CPU
    with (patch(torch.cuda, "is_available", return_value=True),
          patch(torch, "zeros", side_effect=RuntimeError)):
        text = raises(InputError, vmae.start, "auto")      # nobody has given --device
        assert text.startswith("torch cannot use the device cuda (") and "--device cpu" in text
    for given, said in (("auto", "device: cpu, as torch finds no GPU"), ("cpu", "device: cpu\n")):
        with patch(torch.cuda, "is_available", return_value=False):
            assert printed(vmae.start, given).startswith(said)

def recipe_of(args):
    """The options that recipes are made of."""
    return dict(optimizer=args.optimizer, batch=args.batch, steps=args.steps, lr=args.lr)

def test_every_recipe_of_stage_one_is_used_unless_something_else_is_given():
    kinds = itertools.product(vmae.sizes, ("vit", "conv"), ("cpu", "cuda"))
    assert set(train_vmae.RECIPES) == set(kinds)
    for (model, arch, kind), recipe in train_vmae.RECIPES.items():
        line = f"--preset ae --arch {arch} --model {model}"
        args = filled_in(line, torch.device(kind))
        assert recipe_of(args) == recipe
        args = filled_in(f"{line} --batch 3 --lr 7", torch.device(kind))
        assert recipe_of(args) == {**recipe, "batch": 3, "lr": 7}
    base = train_vmae.RECIPES["base", "vit", "cuda"]       # a convolution is 22 times the work
    assert train_vmae.RECIPES["base", "conv", "cuda"]["batch"] < base["batch"]

def test_a_model_to_start_from_brings_its_size_its_body_and_the_recipe_of_its_row():
    for model, arch, table in (("tiny", "vit", vmae.sizes), ("small", "conv", vmae.conv_sizes)):
        known = dict(model_args=dict(table[model], img_size=96))
        args = filled_in("--init some.pt --mask 0", known=known)
        assert (args.size, args.model, args.arch) == (96, model, arch)
        assert args.lr == train_vmae.RECIPES[model, arch, "cpu"]["lr"]
    assert filled_in("--init some.pt --mask 0 --size 64", known=known).size == 64
    known = dict(model_args=TINY_VMAE)                     # no row of the table
    assert filled_in("--init some.pt", known=known).model == "tiny"        # as from 16 pixels

def test_every_recipe_of_stage_two_is_used():
    faces = {"data": None, "val": None}
    photographs = {"data": "/photographs", "val": None}
    for model, device, theirs, key in (
            ("tiny", CPU, faces, ("tiny", "cpu")),
            ("tiny", CUDA, faces, ("tiny", "cuda")),
            ("small", CPU, faces, ("small", "cpu")),
            ("small", CUDA, photographs, ("small", "cuda")),
            ("small", CUDA, faces, ("small", "cuda, faces")),
            ("base", CPU, photographs, ("base", "cpu")),
            ("base", CUDA, photographs, ("base", "cuda"))):
        args = options_of(train_ldm, f"--model {model}")
        train_ldm.fill_in(args, {}, device, theirs, None)
        assert recipe_of(args) == train_ldm.RECIPES[key], key

def test_size_and_compiling_of_stage_two_are_those_of_the_device_as_its_help_says():
    assert help_of(train_ldm)["model"].endswith("stage two: small on CUDA, else tiny")
    for device, model, compiles in ((CPU, "tiny", False), (CUDA, "small", True)):
        args = options_of(train_ldm)
        train_ldm.fill_in(args, {}, device, {"data": None, "val": None}, None)
        assert args.model == model
        assert args.compile is compiles

def test_stage_two_trains_on_the_folders_of_stage_one_unless_others_are_given():
    help_text = help_of(train_ldm)
    assert help_text["data"].endswith("stage two: that of stage one")
    assert help_text["val"].endswith("stage two: that of stage one")
    theirs = {"data": "/photographs", "val": "/held_out"}
    for line, data, val in (
            ("", "/photographs", "/held_out"),
            ("--data /photographs", "/photographs", "/held_out"),
            ("--data /others", "/others", None),
            ("--val /mine", "/photographs", "/mine")):
        args = options_of(train_ldm, line)
        train_ldm.fill_in(args, {}, CPU, theirs, None)
        assert (args.data, args.val) == (data, val), line

def test_objective_and_schedule_are_those_of_init_otherwise_v_and_cosine():
    help_text = help_of(train_ldm)
    assert help_text["objective"] == "that of --init, otherwise v"
    assert help_text["schedule"] == "that of --init, otherwise cosine"
    ae = SimpleNamespace(grid=4, latent_dim=4)
    known = dict(model_args=ldm.dit_args("tiny", 4, 4, 0),
                 schedule=dict(kind="linear", objective="eps"))
    for line, objective, kind in (
            ("", "v", "cosine"),
            ("--objective flow", "flow", "cosine"),
            ("--init some.pt", "eps", "linear"),
            ("--init some.pt --objective v", "v", "linear")):
        args = options_of(train_ldm, line)
        args.model = "tiny"
        init = known if args.init else None
        with patch(train_ldm, "adapted", return_value=known):
            _, schedule, entries = train_ldm.new_model(args, ae, [], None, init)
        assert schedule.objective == args.objective == objective
        assert entries["schedule"] == dict(kind=kind, objective=objective)

# ---- Measured at each save --------------------------------------------------------------------

# Measuring draws from generators of its own, so a run is the same however often it is measured.

def test_measuring_held_out_images_leaves_stage_one_alone():
    save_images("data", 24)
    often = trained("--save-every 1", "often")
    once = trained("", "once")
    assert equal_weights(often, once)
    assert logged("often", "step") == [1, 2]               # a line at each save
    for name in ("PSNR_val", "PSNR_m_val"):
        first, last = logged("often", name)
        assert first != last
        assert logged("once", name) == [last]              # the same images, masks and noise

def test_PSNR_in_the_log_is_of_whole_and_of_masked_held_out_images():
    save_images("data", 24)
    model = trained()
    x = train_vmae.held_out_images(ImageFolder("data", 16, "val"), CPU)
    assert len(x) < 8                                      # few enough for one batch
    line = log_of("runs/vmae")[-1]
    x_hat = model.decode(model.encode(x).mode())           # as in use
    psnr = vmae.psnr(vmae.to_uint8(x), vmae.to_uint8(x_hat))
    close(line["PSNR_val"], psnr.mean(), 0.01)
    generator = torch.Generator().manual_seed(0)
    torch.randn(x.shape, generator=generator)              # noise, of weight 0 here
    p, _, mask = model(x, 0.6, generator)                  # as in training
    error = vmae.to_uint8(x).float() - vmae.to_uint8(p.mode()).float()
    error = vmae.patchify(error**2, 4)                                     # (B, N, P*P*C)
    of_masked = [e[m == 1].mean().item() for e, m in zip(error, mask)]
    psnr = [10 * math.log10(255**2 / mse) for mse in of_masked]
    close(line["PSNR_m_val"], np.mean(psnr), 0.01)

def test_without_a_mask_there_is_no_PSNR_of_masked_patches():
    save_images("data", 24)
    trained("--preset ae")
    line = log_of("runs/vmae")[-1]
    assert "PSNR_val" in line
    assert "PSNR_m_val" not in line

real_draw = ldm.LDM.draw

def quick_draw(*args, **options):
    """LDM.draw in two steps instead of 50."""
    options["steps"] = 2
    return real_draw(*args, **options)

@patch(ldm.LDM, "draw", quick_draw)
def test_measuring_held_out_images_leaves_stage_two_alone():
    both_stages()
    for objective in ("eps", "v", "flow"):
        for out, every in (("often", 1), ("once", 2)):
            runs(train_ldm.main, f"{TINY_LDM} --objective {objective} --out {objective}_{out} "
                                 f"--save-every {every}")
        same(load(f"{objective}_often/last.pt"), load(f"{objective}_once/last.pt"))
        often = log_of(f"{objective}_often")[-1]
        once = log_of(f"{objective}_once")[-1]
        assert f"L_{objective}" in often
        assert often.keys() == once.keys()
        for name in ("step", "lr", f"L_{objective}_val"):  # the others are means over other steps
            assert often[name] == once[name]

# ---- Compiling --------------------------------------------------------------------------------

# The backend "eager" traces as the others do, but compiles nothing, which would take minutes here.

eager = patch(torch, "compile", functools.partial(torch.compile, backend="eager"))

def test_blocks_and_the_distance_of_LPIPS_are_compiled_in_one_piece():
    model = VMAE(**TINY_VMAE)
    dit = tiny_dit()
    tokens = torch.randn(2, 16, 32)
    c = torch.randn(2, 32)
    x = random_images()
    for module, inputs in (
            (model.blocks[0], [tokens]),
            (dit.blocks[0], [tokens, c, dit.feat_rope]),
            (TinyLpips().distances[0], [x, -x])):
        expected = module(*inputs)
        module.compile(fullgraph=True, backend="eager")    # an error if there are two pieces
        close(module(*inputs), expected, 1e-5)

@eager
def test_a_compiled_run_trains_alike():
    save_images("data", 8)
    with patch(vmae, "compile_blocks", wraps=vmae.compile_blocks) as compiles:
        plain = trained("", "plain")
        assert compiles.call_count == 0
        compiled = trained("--compile", "compiled")        # masked and whole steps
        blocks, asked_for = compiles.call_args.args
    assert asked_for is True
    assert [type(block) for block in blocks] == [vmae.Block] * 4           # of both halves
    close_weights(plain, compiled, 1e-4)
    assert plain.state_dict().keys() == compiled.state_dict().keys()

@eager
def test_a_compiled_run_of_stage_two_trains_alike():
    both_stages()
    with (patch(train_ldm, "measure", return_value={}),
          patch(vmae, "compile_blocks", wraps=vmae.compile_blocks) as compiles):
        runs(train_ldm.main, f"{TINY_LDM} --compile --out compiled")
    blocks, _ = compiles.call_args.args
    assert [type(block) for block in blocks] == [ldm.Block] * 2
    same(load("runs/ldm/last.pt"), load("compiled/last.pt"), 1e-4)

def test_without_a_compiler_a_line_says_so_unless_it_was_asked_for():
    blocks = VMAE(**TINY_VMAE).blocks
    x = torch.randn(1, 16, 32)
    before = blocks[0](x)
    with patch(torch, "compile", side_effect=RuntimeError("no C++ compiler. Then\nmany lines")):
        text = printed(vmae.compile_blocks, blocks)
        assert text.splitlines() == ["torch.compile does not work here (no C++ compiler), so the "
                                     "network is slower"]
        message = raises(InputError, vmae.compile_blocks, blocks, True)
        assert "--compile: torch.compile does not work here (no C++ compiler)" in message
        assert "\n" not in message
    assert torch.equal(blocks[0](x), before)

def test_blocks_are_compiled_from_size_small_on_or_when_asked_for():
    generator = torch.Generator()
    blocks = list(VMAE(**TINY_VMAE).blocks)
    net = TinyLpips()
    of_net = [net.net, *net.distances]
    for model, compile, given, lpips_net, compiled in (
            ("tiny", True, {}, None, None),
            ("tiny", True, {"compile": True}, None, blocks),
            ("tiny", True, {}, net, of_net),
            ("small", True, {}, None, blocks),
            ("base", True, {}, net, blocks + of_net),
            ("base", False, {}, net, None)):
        args = SimpleNamespace(compile=compile, model=model)
        with patch(vmae, "compile_blocks") as compiles:
            step = train_vmae.make_fast(print, args, given, generator, blocks, lpips_net)
        assert step is print                               # on a CPU it stays as it is
        if compiled is None:
            assert compiles.call_count == 0
        else:
            compiles.assert_called_once_with(compiled, given.get("compile"))

# ---- What is trained: presets, losses, tuning -------------------------------------------------

# Two steps on images of noise teach nothing, but they show whether an option reaches the weights.

def losses_logged(run):
    """The losses in the last line of a run's log, sorted."""
    return sorted(name for name in log_of(run)[-1] if name.startswith("L_"))

def test_every_preset_has_its_losses_and_its_body():
    save_images("data", 24)
    losses_of = {"ae": ["L_R"],
                 "dae": ["L_R"],
                 "vae": ["L_R", "L_reg"],
                 "sdvae": ["L_D", "L_G", "L_R", "L_reg"],
                 "mae": ["L_M", "L_R"],
                 "vmae": ["L_M", "L_R", "L_reg"]}
    assert losses_of.keys() == train_vmae.PRESETS.keys()
    for preset, losses in losses_of.items():
        model = trained(f"--preset {preset}", preset)
        assert losses_logged(preset) == losses
        assert isinstance(model, VMAE) == (preset in ("mae", "vmae"))
        has_variance = "L_reg" in losses
        logvar = model.encode(random_images()).logvar
        assert (logvar == -30).all() == (not has_variance), preset         # clamped there

def test_every_option_of_every_preset_changes_what_is_learnt():
    save_images("data", 24)
    lines = {"ae": ["--preset dae", "--preset vae", "--lambda-reg 1"],
             "dae": ["--noise 9"],
             "vae": ["--lambda-reg 1", "--kl-mean free"],
             "mae": ["--lambda-m 9"],
             "sdvae": ["--lambda-adv 9"],
             "vmae": ["--lambda-m 0", "--mask 0.3", "--lambda-reg 0", "--lambda-reg 1",
                      "--whole 1", "--seed 1"]}
    assert lines.keys() == train_vmae.PRESETS.keys()
    for preset, options in lines.items():
        usual = trained(f"--preset {preset}", "usual")
        for option in options:
            other = trained(f"--preset {preset} {option}", "other")
            assert all_differ(usual, other), (preset, option)

def test_the_same_line_twice_learns_the_same():
    save_images("data", 24)
    for preset in ("vmae", "sdvae"):                       # masks; noise on z, and two optimisers
        one = trained(f"--preset {preset}", "one")
        again = trained(f"--preset {preset}", "again")
        assert equal_weights(one, again), preset

def test_noise_is_in_the_input_and_not_in_the_target():
    save_images("data", 24)
    trained("--preset dae --noise 9")
    assert log_of("runs/vmae")[-1]["L_R"] < 5              # 40 if the noise were in the target

def test_bodies_are_compared_like_for_like():
    save_images("data", 24)
    assert isinstance(trained("--preset ae --arch vit"), VMAE)
    refuses(train_vmae.main, {"--arch conv --out new": "convolutions cannot skip patches"})

def test_adversarial_loss_begins_at_half_of_the_run_and_stays_there_when_it_is_resumed():
    save_images("data", 8)
    go = f"{TINY_RUN} --preset sdvae --save-every 4"
    with patch(vmae, "loss_G", wraps=vmae.loss_G) as loss_G:
        runs(train_vmae.main, f"{go} --steps 8")
    assert loss_G.call_count == 4
    last_layer = loss_G.call_args.args[2]
    assert last_layer.shape == (3, 16, 3, 3)
    before, after = log_of("runs/sdvae")                   # steps 1 to 4, 5 to 8
    assert "L_G" not in before and "L_D" not in before
    assert math.isfinite(after["L_G"]) and math.isfinite(after["L_D"])
    runs(train_vmae.main, f"{go} --steps 12 --resume")     # with the discriminator's part
    assert load("runs/sdvae/last.pt")["train_args"]["adv_start"] == 4

def test_adversarial_loss_of_the_discriminator_is_the_hinge_loss():
    real = torch.tensor([2.0, 0.5])                        # max(0, 1 - D): 0 and .5
    fake = torch.tensor([-3.0, 0.0])                       # max(0, 1 + D): 0 and 1
    close(vmae.loss_D(real, fake), 0.5 * (0.25 + 0.5), 1e-6)

def test_adversarial_loss_has_a_gradient_as_long_as_that_of_the_others():
    last = torch.nn.Linear(4, 4)
    x_hat = last(torch.randn(3, 4))
    reconstruction = 7 * x_hat.square().mean()
    fake = 0.01 * x_hat.sum(1)
    adversarial = vmae.loss_G(fake, reconstruction, last.weight)
    lengths = []
    for loss in (reconstruction, adversarial):
        [gradient] = torch.autograd.grad(loss, last.weight, retain_graph=True)
        lengths.append(gradient.norm())
    close(lengths[0] / lengths[1], 1, 0.01)

# The number of scores per side follows from the strides; 70, 34 and 16 are Isola's way to count.
def test_discriminator_looks_at_fewer_pixels_in_small_images():
    sides = {64: 6, 32: 6, 8: 2}                           # patches of 70, 34 and 16 pixels
    for size, side in sides.items():
        scores = vmae.discriminator(size)(random_images(2, size))
        assert scores.shape == (2, 1, side, side)

def test_tuning_the_decoder_leaves_the_encoder_alone():
    save_images("data", 8)
    for preset in ("vmae", "vae"):                         # a transformer, a convolutional body
        before = trained(f"--preset {preset}", preset)
        tuned = trained(f"--init {preset} --tune decoder --size 32", "runs/tuned")
        q = tuned.encode(random_images(1, 32))
        assert q.mu.shape[-1] == 2 * before.grid
        moved = []
        for (name, p), q in zip(before.named_parameters(), tuned.parameters(), strict=True):
            if not torch.equal(p, q):
                moved.append(name)
        assert len(moved) > 10
        for name in moved:
            assert name.startswith(("decoder", "from_latent")), name
    refuses(train_vmae.main, {"--tune decoder --out new": "name its checkpoint with --init"})

def test_a_posterior_that_had_a_variance_loses_it_without_L_reg():
    save_images("data", 8)
    trained()
    ae = trained("--preset ae --init runs/vmae", "ae")
    assert (ae.encode(random_images()).logvar == -30).all()

# ---- The authors' generator -------------------------------------------------------------------

# vectors/lightningdit_official.pt holds weights, inputs and outputs of the authors' code.

LATENT_MEAN = torch.arange(16.0).view(1, 16, 1, 1)         # as the authors' files hold them
LATENT_STD = torch.full((1, 16, 1, 1), 2.0)

def published_dit():
    """Recorded outputs of the authors' LightningDiT; its weights as published in dit.pt, with
    statistics in stats.pt."""
    v = vector("lightningdit_official.pt")
    weights = {f"module.{name}": value for name, value in v["state_dict"].items()}
    torch.save({"model": {}, "ema": weights}, "dit.pt")
    torch.save({"mean": LATENT_MEAN, "std": LATENT_STD}, "stats.pt")
    return v

def test_dit_equals_the_authors():
    v = published_dit()
    model, ckpt = ldm.read_stage_two("dit.pt", "stats.pt")
    close(model(v["x"], v["t"], v["y"]), v["out"], 1e-4)
    assert ckpt["schedule"]["objective"] == "flow"
    assert model.y_embedder.num_classes == 3
    close(ckpt["latent_mean"], LATENT_MEAN.flatten(), 0)
    close(ckpt["latent_std"], LATENT_STD.flatten(), 0)

def test_dit_has_the_positions_of_the_authors():
    v = vector("lightningdit_official.pt")
    ours = ldm.DiT(**v["model_args"]).state_dict()
    for name in ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"):
        close(ours[name], v["state_dict"][name], 1e-6)

def test_a_published_generator_draws_images():
    published_dit()
    save_images("data", 8)
    trained(out="first")                                   # its latents are 16 x 4 x 4, as theirs
    known = "--ckpt dit.pt --stats stats.pt --vmae first"
    text = runs(sample.main, f"{known} --n 2 --steps 3 --shift 0.3 --interval 0.1 --cfg 2")
    assert "drawing 3 classes in turn, guidance 2" in text
    assert Image.open("samples/sample_000001.png").size == (16, 16)

def test_a_published_generator_needs_its_statistics_and_a_stage_one():
    published_dit()
    refuses(sample.main, {"": "--stats", "--stats stats.pt": "name it with --vmae"},
            "--ckpt dit.pt --n 2")

def test_a_published_generator_can_be_trained_on():
    v = published_dit()
    save_images("data", 8)
    trained(out="first")
    known = "--init dit.pt --stats stats.pt --vmae first"
    text = runs(train_ldm.main, f"{known} --steps 1 --batch 2 --lr 1e-9")
    assert "its 3 classes are not the 0 here" in text      # data/ has none
    found = ldm.load_ldm("runs/ldm")
    name = "blocks.0.attn.qkv.weight"
    close(found.model.state_dict()[name], v["state_dict"][name], 1e-6)
    assert found.path.objective == "flow"
    assert found.std.tolist() == [2.0] * 16

# A network with more weights than ours computes something else, without any error.
def test_a_published_generator_with_other_weights_is_refused():
    published_dit()
    ckpt = load("dit.pt")
    for name in ("module.extra.weight", "module.blocks.0.attn.q_norm.weight"):
        weights = {**ckpt["ema"], name: torch.ones(8)}
        torch.save({"ema": weights}, "other.pt")
        message = raises(InputError, ldm.load_ldm, "other.pt", "stats.pt")
        assert f"such as {name.removeprefix('module.')}, so it is another one" in message
    del ckpt["ema"]["module.blocks.1.mlp.w3.bias"]
    torch.save(ckpt, "other.pt")
    message = raises(InputError, ldm.load_ldm, "other.pt", "stats.pt")
    assert "lacks 1 weights of this model, such as blocks.1.mlp.w3.bias" in message

# ---- Evaluation: metrics ----------------------------------------------------------------------

# vectors/metrics_reference.npz holds two images with scikit-image's PSNR and SSIM of them,
# fid_reference.npz features with pytorch-fid's distances, inception_fid.pt features of its network.

def as_tensor(pixels):
    """uint8 (H, W, 3) of numpy -> (1, 3, H, W)."""
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]

def test_psnr_is_that_of_the_formula_and_of_scikit_image():
    a = torch.randint(0, 250, (2, 3, 16, 16), dtype=torch.uint8)
    close(evaluate.psnr(a, a + 5), 20 * math.log10(255 / 5), 1e-9)         # MSE is 25
    v = vector("metrics_reference.npz")
    close(evaluate.psnr(as_tensor(v["a"]), as_tensor(v["b"])), v["psnr"], 1e-6)

def test_ssim_is_that_of_the_formula_and_of_scikit_image():
    a = torch.randint(0, 250, (2, 3, 16, 16), dtype=torch.uint8)
    close(evaluate.ssim(a, a), 1, 1e-12)
    flat = torch.full((1, 3, 16, 16), 100.0)               # variance 0 leaves one factor
    c1 = (0.01 * 255) ** 2
    close(evaluate.ssim(flat, flat + 20), (2 * 100 * 120 + c1) / (100**2 + 120**2 + c1), 1e-9)
    v = vector("metrics_reference.npz")
    x = as_tensor(v["a"])
    y = as_tensor(v["b"])
    close(evaluate.ssim(torch.cat([x, x]), torch.cat([y, x])), [v["ssim"].item(), 1], 1e-6)
    raises(InputError, evaluate.ssim, a[..., :8], a[..., :8])              # the window has 11

def made_up_inception():
    """A state dict by the rule of vectors/inception_fid.pt, which says it in words."""
    weights = {}
    for name, value in evaluate.InceptionV3().state_dict().items():
        if value.dtype == torch.long:
            continue                                       # counters: a file may lack them
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        w = torch.randn(value.shape, generator=generator)
        if name.endswith("running_var"):
            w = w.abs() + 0.5
        elif name.endswith("bn.weight"):
            w = 1 + 0.1 * w
        elif w.dim() == 1:
            w = 0.1 * w
        else:
            w = w * (2 / w[0].numel()) ** 0.5
        weights[name] = w
    return weights

def test_inception_equals_pytorch_fid():
    v = vector("inception_fid.pt")
    torch.save(made_up_inception(), "made_up.pth")
    net = evaluate.load_inception("made_up.pth")
    shapes = {name: tuple(w.shape) for name, w in net.state_dict().items()}
    assert shapes == v["shapes"]
    largest = v["features"].abs().max()
    close(net(v["images"]) / largest, v["features"] / largest, 1e-4)
    net.fast = True                                        # bfloat16: the same to two digits
    close(net(v["images"][:1]) / largest, v["features"][:1] / largest, 0.03)
    of_the_file = hashlib.sha256(Path("made_up.pth").read_bytes()).hexdigest()
    assert net.hash == of_the_file[:8]                     # which stands beside each FID

def test_inception_gives_sFID_and_IS_what_they_need():
    net = evaluate.InceptionV3()
    net.load_state_dict(made_up_inception())
    seen = []

    def look(module, inputs, output):
        seen.append(output)

    net.Mixed_6d.branch1x1.register_forward_hook(look)
    images = torch.from_numpy(random_pixels((1, 3, 32, 32)))
    features, spatial, logits = net.outputs(images)
    first_channels = seen[0][0, :7].permute(1, 2, 0)                       # (17, 17, 7)
    close(spatial.view(17, 17, 7), first_channels, 0)      # ADM's order
    assert logits.shape == (1, 1008)
    close(logits, features @ net.fc.weight.T, 1e-3)        # without the bias

def test_inception_weights_of_another_network_are_refused_with_the_reason():
    torch.save({"fc.bias": torch.zeros(1000)}, "google.pth")
    torch.save({"fc.bias": torch.zeros(1008)}, "other.pth")
    for path, words in {
            "google.pth": ["torchvision", "1000", "2015"],
            "other.pth": ["not FID's"],
            "none.pth": [evaluate.INCEPTION_URL, "--inception-weights", "none.pth"]}.items():
        message = raises(InputError, evaluate.load_inception, path)
        assert "\n" not in message
        for word in words:
            assert word in message

def test_clean_resize_is_pillows_antialiased_bicubic():
    net = evaluate.InceptionV3("clean")
    x = torch.from_numpy(random_pixels((1, 3, 400, 400)))
    seen = []

    def stop(module, inputs):                              # the first layer is far enough
        seen.append(inputs[0])
        raise InterruptedError

    net.Conv2d_1a_3x3.register_forward_pre_hook(stop)
    raises(InterruptedError, net, x)
    plane = Image.fromarray(x[0, 0].numpy().astype(np.float32))            # mode F: not rounded
    expected = np.asarray(plane.resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255)
    close(seen[0][0, 0], (expected - 128) / 128, 1e-4)

def mean_and_covariance(rows):
    """Mean and covariance of rows (N, D), by numpy."""
    return rows.mean(0), np.cov(rows, rowvar=False)

def test_running_statistics_are_those_of_numpy():
    for offset, digits in ((0, 1e-12), (1e7, 1e-7)):       # whose squares leave no digit
        rows = torch.randn(1000, 8, dtype=torch.float64) + offset
        running = evaluate.Statistics()
        for part in rows.split(300):                       # the last one is short
            running.add(part)
        mean, covariance = running.moments()
        expected_mean, expected_covariance = mean_and_covariance(rows.numpy())
        close(mean, expected_mean, digits)
        close(covariance, expected_covariance, digits)

def test_running_statistics_do_not_grow():
    running = evaluate.Statistics()
    for _ in range(3):
        running.add(torch.randn(300, 8))
    numbers = 0
    for value in vars(running).values():
        if torch.is_tensor(value):
            numbers += value.numel()
    assert numbers == 8 + 8 + 64                           # shift, total, outer products

def test_frechet_distance_of_gaussians_is_that_of_the_formula():
    rng = np.random.default_rng(0)
    s1, s2, mu = rng.random((3, 32))
    expected = (mu**2).sum() + ((s1 - s2) ** 2).sum()      # of diagonal covariances
    turn, _ = np.linalg.qr(rng.normal(size=(32, 32)))
    for q in (np.eye(32), turn):                           # turning changes nothing
        sigma1 = q @ np.diag(s1**2) @ q.T
        sigma2 = torch.from_numpy(q @ np.diag(s2**2) @ q.T)
        close(evaluate.frechet_distance(0 * mu, sigma1, q @ mu, sigma2), expected, 1e-10)

def test_frechet_distance_of_few_images_is_that_of_pytorch_fid():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(300, 512)) @ rng.normal(size=(512, 512))       # singular: 300 < 512
    mu, sigma = mean_and_covariance(rows)
    close(evaluate.frechet_distance(mu, sigma, mu, sigma), 0, 1e-6 * np.trace(sigma))
    v = vector("fid_reference.npz")
    for name in ("full", "singular"):
        of_a = mean_and_covariance(v[f"{name}_a"])
        of_b = mean_and_covariance(v[f"{name}_b"])
        distance = evaluate.frechet_distance(*of_a, *of_b)
        close(distance / v[f"{name}_fid"], 1, 1e-6)

# Statistics come from files, and so may be anything.
def test_frechet_distance_refuses_what_is_no_covariance():
    mu = np.zeros(2)
    eye = np.eye(2)
    not_definite = np.array([[1, 2], [2, 1.0]])
    no_variance = np.array([[0, 1], [1, 0.0]])
    for bad in (not_definite, no_variance, eye * np.nan):
        message = raises(ValueError, evaluate.frechet_distance, mu, bad, mu, eye)
        assert "not a covariance" in message
    message = raises(ValueError, evaluate.frechet_distance, mu, eye, np.zeros(3), np.eye(3))
    assert "do not compare" in message

def test_kid_is_the_mean_over_pairs():
    a = torch.randn(6, 4)
    b = torch.randn(5, 4) + 1

    def k(x, y):                                           # Binkowski 2018
        return (x @ y.T / 4 + 1) ** 3                      # (N, M)

    def within(x):                                         # no image is paired with itself
        others = ~torch.eye(len(x), dtype=torch.bool)
        return k(x, x)[others].mean()

    close(evaluate.kid(a, b), within(a) + within(b) - 2 * k(a, b).mean(), 1e-4)

def test_kid_is_unbiased():
    draws = [evaluate.kid(torch.randn(16, 4), torch.randn(16, 4)) for _ in range(400)]
    standard_error = np.std(draws) / math.sqrt(400)
    close(np.mean(draws), 0, 4 * standard_error)           # of one distribution: 0 on average
    assert min(draws) < 0                                  # it is not clamped

def test_precision_and_recall_by_hand():
    real = torch.tensor([[0.0], [1], [2], [3], [10]])      # to the third neighbour: 3 2 2 3 9
    fake = torch.tensor([[2.5], [5.5], [19.5], [-2.5], [2.6]])  # all inside but for 19.5, 9.5 away
    close(evaluate.precision_recall(real, fake), [0.8, 1.0], 1e-6)

def test_precision_is_of_the_fakes_and_recall_of_the_real():
    real = torch.randn(50, 8)
    assert evaluate.precision_recall(real, real) == (1, 1)
    assert evaluate.precision_recall(real, real + 100) == (0, 0)
    all_alike = real[:1] + 0.01 * torch.randn(50, 8)
    precision, recall = evaluate.precision_recall(real, all_alike)
    assert precision == 1
    assert recall <= 0.02                                  # of 50 the one that they resemble

# Distances by products in float32 leave no digits so far from the origin, where both shares were 1.
def test_precision_and_recall_do_not_depend_on_the_origin():
    real = torch.randn(400, 64)
    fake = 1.2 * torch.randn(400, 64)
    expected = evaluate.precision_recall(real, fake)
    close(evaluate.precision_recall(real + 3000, fake + 3000), expected, 0.02)

def test_nearest_searches_all_batches():
    rows = torch.randn(50, 8)
    distances, index = evaluate.nearest(rows[20:23], rows.split(7), 2)
    assert index[:, 0].tolist() == [20, 21, 22]            # themselves
    close(distances[:, 0], 0, 0.01)
    of_all = torch.cdist(rows[20:23], rows).sort().values
    close(distances[:, 1], of_all[:, 1], 1e-4)

class TinyNet(torch.nn.Module):
    """Stands in for Inception: its features are means of colours."""

    hash = "tiny"
    fast = False

    def __init__(self, resize="pytorch-fid"):
        super().__init__()
        self.resize = resize

    def outputs(self, images):
        x = images.float().mean((2, 3))                    # (N, 3)
        return x, x[:, :2], x / 10

    def forward(self, images):
        features, _, _ = self.outputs(images)
        return features

def tiny_net(path, resize, fast):
    """In place of evaluate.load_inception."""
    return TinyNet(resize)

tiny_inception = patch(evaluate, "load_inception", tiny_net)

def ten_pairs():
    """-> images a and b, (10, 3, 16, 16) each, and an iterator over batches of both."""
    a = torch.from_numpy(random_pixels((10, 3, 16, 16)))
    b = torch.from_numpy(random_pixels((10, 3, 16, 16), seed=1))
    return a, b, zip(a.split(4), b.split(4))               # the last batch has two

def test_scores_are_means_over_images():
    a, b, pairs = ten_pairs()
    row = evaluate.scores(pairs, "cpu", TinyLpips())
    error = (a.double() - b.double()).abs()                # (10, 3, 16, 16)
    close(row["L1"], error.mean() / 255, 1e-9)
    close(row["PSNR"], evaluate.psnr(a, b).mean(), 1e-9)
    close(row["SSIM"], evaluate.ssim(a, b).mean(), 1e-9)
    of_all = vmae.loss_P(TinyLpips(), vmae.to_float(a), vmae.to_float(b))
    close(row["LPIPS"], of_all, 1e-6)
    assert "rFID" not in row                               # without Inception

def test_scores_have_the_FID_of_all_reconstructions_against_all_originals():
    a, b, pairs = ten_pairs()
    real = evaluate.Features(TinyNet())
    real.see(10, a.split(4))
    row = evaluate.scores(pairs, "cpu", real=real)
    of_a = mean_and_covariance(a.double().mean((2, 3)).numpy())            # colours, as TinyNet
    of_b = mean_and_covariance(b.double().mean((2, 3)).numpy())
    expected = evaluate.frechet_distance(*of_a, *of_b)
    close(row["rFID"], expected, 1e-4)

def features_of(images, sharpness, pairs=0):
    """What evaluate.Features keeps of images, (N, D), which are their own features; the logits are
    `sharpness` times these."""
    def outputs(x):
        return x, x, sharpness * x

    net = SimpleNamespace(outputs=outputs)
    found = evaluate.Features(net, pairs)
    for part in images.split(3):
        found.add(part)
    return found

def test_inception_score_counts_the_classes_that_are_told_apart():
    images = torch.eye(4).repeat(2, 1)                     # four classes, twice
    sure = features_of(images, sharpness=100)
    close(sure.inception_score(), 4, 1e-6)
    blind = features_of(images, sharpness=0)
    close(blind.inception_score(), 1, 1e-6)

def test_features_are_kept_of_as_many_images_as_asked_for():
    images = torch.randn(8, 4)
    kept = features_of(images, sharpness=1, pairs=5).kept
    assert torch.equal(torch.cat(kept), images[:5])
    assert features_of(images, sharpness=1).kept == []     # not even an empty slice of a batch

def test_separation_of_known_tokens():
    group = torch.arange(4000) % 2
    image = torch.arange(4000) // 20
    z = torch.randn(4000, 3)
    mixed = evaluate.separation(z, group, image)           # no order at all
    close(mixed["sigma^2"], 1, 0.01)
    close(mixed["probe"], 0.5, 0.05)
    assert mixed["rho"] < 0.1
    assert mixed["chance"] == 0.5
    z[:, 0] += 6 * group                                   # variance 1 within, 9 between: 1 + 9
    apart = evaluate.separation(z, group, image)
    within = 0.1 + 1 + 1                                   # of the three channels, when scaled
    close(apart["sigma^2"], within / 3, 0.01)
    close(apart["rho"], 6 / math.sqrt(10) / math.sqrt(within), 0.03)
    assert apart["probe"] > 0.99
    units = torch.tensor([9, 1, 0.1])
    scaled = evaluate.separation(z * units + 5, group, image)
    close(scaled["rho"], apart["rho"], 1e-4)               # units of a channel do not matter

def test_levels_of_the_faces_are_what_was_drawn():
    def encode(x):                                         # z is the colour of a patch
        return F.avg_pool2d(x.float(), 4)

    ae = SimpleNamespace(args=SimpleNamespace(n=24, batch=10), encode=encode,
                         model=SimpleNamespace(img_size=32, patch_size=4))
    levels = evaluate.face_levels(ae)
    assert list(levels) == ["object", "part", "pattern"]   # the paper's
    of_head, kind, image = levels["object"]
    z, part, _ = levels["part"]
    of_skin, _, _ = levels["pattern"]
    _, kinds, _, _ = Faces(32, "val").render(range(24))
    assert torch.equal(kinds[image], kind)
    assert set(part.tolist()) == {0, 1, 2, 3, 4}
    assert len(of_skin) == (part == 2).sum()
    assert len(of_head) == (part != 0).sum()
    assert z.shape[1] == 3
    assert evaluate.separation(*levels["part"])["rho"] > 0.5               # parts have colours

def test_noise_on_the_latent_has_the_scale_of_its_channel():
    spread = torch.tensor([1.0, 5, 20]).view(1, 3, 1, 1)
    z = spread * torch.randn(64, 3, 8, 8)
    noise = evaluate.perturb(z, 0.1) - z
    close(noise.std((0, 2, 3)), 0.1 * z.std((0, 2, 3)), 0.05)
    close(evaluate.perturb(z, 0.2) - z, 2 * noise, 1e-4)   # the same noise, larger
    assert torch.equal(evaluate.perturb(z, 0), z)

# With an autoencoder that does nothing, PSNR is that of the noise alone, which is known.
class PixelsAsLatents:
    """An Autoencoder whose latent is the image, scaled to [-1, 1]."""

    def __init__(self, path, args):
        self.path = path

    def encode(self, images):
        return vmae.to_float(images)

    def decode(self, latents):
        return vmae.to_uint8(latents)

def test_noise_on_the_latent_reaches_the_table_of_smoothness():
    x = torch.randint(96, 161, (40, 3, 16, 16), dtype=torch.uint8)
    Path("pixels").touch()
    held_out = mock.MagicMock(size=16)
    held_out.whole.return_value = (x, None)
    held_out.features.return_value = None                  # there is no Inception
    with (patch(evaluate, "Autoencoder", PixelsAsLatents),
          patch(evaluate, "HeldOut", return_value=held_out)):
        rows = measured("smoothness", "--ckpt pixels --eps 0.2 0.5")
    assert [row["eps"] for row in rows] == [0.2, 0.5]
    for row in rows:
        of_noise = (row["eps"] * x.float().std().item()) ** 2
        of_rounding = 1 / 12
        close(row["PSNR"], 10 * math.log10(255**2 / (of_noise + of_rounding)), 0.1)

# ---- Evaluation: commands ---------------------------------------------------------------------

# The numbers of Table 3 are the paper's, or follow from its architectures.

def test_efficiency_is_the_papers_table_3():
    numbers = ("319.7", "42.69", "13.4%",                  # MB of SD-VAE, of VMAE, ratio
               "17,331.3", "701.4", "4.0%",                # GFLOPs, in the same order
               "703.9", "4.1%",                            # with norms
               "895.2", "41.33", "4.6%",                   # of encoder and decoder
               "11,191,604", "83,819,683")                 # parameters
    rows = measured("efficiency", "", *(f"| {number} |" for number in numbers))
    assert [row["model"] for row in rows] == ["SD-VAE", "VMAE", "ratio"]

def test_efficiency_counts_multiply_adds_of_layers_and_of_attention():
    with torch.device("meta"):
        layer = torch.nn.Linear(3, 5)
        rows = torch.zeros(2, 3)
        q = torch.zeros(1, 4, 8)                           # 4 queries of 8 numbers
        k = torch.zeros(1, 6, 8)                           # 6 keys, 6 values
    _, in_layers, in_attention = evaluate.multiply_adds(layer, rows)
    assert (in_layers, in_attention) == (2 * 3 * 5, 0)
    attend = F.scaled_dot_product_attention
    _, in_layers, in_attention = evaluate.multiply_adds(attend, q, k, k)
    assert (in_layers, in_attention) == (0, 2 * 4 * 6 * 8)

def test_efficiency_measures_seconds_if_asked_to():
    small = dict(base=TINY_VMAE_ROW)
    small_conv = dict(base=dict(channels=(16, 16, 32, 32), latent_dim=4))
    with (mock.patch.dict(vmae.sizes, small), mock.patch.dict(vmae.conv_sizes, small_conv)):
        rows = measured("efficiency", "--time --size 16 --batch 2")
        assert "encode s" not in measured("efficiency", "--size 16")[0]
    for row in rows[:2]:
        for name in ("encode s", "decode s", "train s"):
            assert row[name] > 0
    assert rows[2]["train s"].endswith("%")

# A transformer and convolutions, because each command has to take both.
def two_autoencoders():
    """data/ with two classes, and two runs of stage one on it: a transformer in runs/vmae, a
    convolutional body in runs/ae."""
    save_two_classes()
    for name in ("vmae", "ae"):
        trained(f"--preset {name}", f"runs/{name}")

def all_figures():
    """What `python evaluate.py` says, which takes no options, not even --device."""
    with (patch(sys, "argv", ["evaluate.py"]),
          patch(torch.cuda, "is_available", return_value=False),
          warnings.catch_warnings()):
        return printed(vmae.cli, evaluate.main)

FIGURES = "reconstruct smoothness separability efficiency neighbours compare".split()

def test_every_figure_is_made_without_options_and_without_downloads():
    two_autoencoders()
    runs(train_ldm.main, TINY_LDM)
    text = all_figures()
    for name in FIGURES:
        assert list(Path("runs").rglob(f"{name}.json")), name
        if name != "efficiency":
            assert list(Path("runs").rglob(f"{name}*.png")), name
    for words in ("skipped LPIPS", "skipped fid", "skipped faces", "skipped times",
                  "skipped generation"):
        assert words in text
    assert "Inception weights" not in text

def test_every_figure_of_stage_one_is_made_before_there_is_a_stage_two():
    save_images("data", 12)
    trained()
    text = all_figures()
    assert "skipped neighbours: there is no runs/ldm/last.pt" in text
    assert "skipped compare: Fig. 2 needs two runs" in text
    assert "| PSNR |" in text

OF_TWO = "--ckpt runs/vmae runs/ae --data data --n 20 --batch 8"

def test_smoothness_begins_at_the_reconstruction_of_table_1():
    two_autoencoders()
    exact = measured("reconstruct", OF_TWO)
    noisy = measured("smoothness", f"{OF_TWO} --eps 0 0.5 2")
    assert len(noisy) == 6
    for i, row in enumerate(noisy):
        of_this_run = exact[i // 3]
        assert row["checkpoint"] == of_this_run["checkpoint"]
        close(row["lost"], of_this_run["PSNR"] - row["PSNR"], 1e-9)
    assert noisy[0]["lost"] == noisy[3]["lost"] == 0       # no noise

def test_images_of_one_command_are_read_by_all_its_runs():
    two_autoencoders()
    with patch(vmae, "Folder", wraps=vmae.Folder) as reads:
        measured("reconstruct", OF_TWO)
    assert reads.call_count == 1

def test_separability_adds_the_classes_of_a_folder():
    two_autoencoders()
    rows = measured("separability", OF_TWO)
    levels = ["faces, object", "faces, part", "faces, pattern", "classes, object"]
    assert [row["level"] for row in rows] == 2 * levels
    shutil.rmtree("data/right")
    rows = measured("separability", OF_TWO, "skipped the classes of data: fewer than two")
    assert [row["level"] for row in rows] == 2 * levels[:3]

def test_compare_places_the_best_run_outside_and_the_worst_inside():
    two_autoencoders()
    rows = measured("compare", "runs/vmae runs/ae/last.pt --data data --n 20 --batch 8")
    assert [row["run"] for row in rows] == ["runs/vmae", "runs/ae/last.pt"]
    places = json.loads(Path("out/compare.json").read_text())["rescaled"]
    one = places["runs/vmae"]
    other = places["runs/ae/last.pt"]
    assert len(one) == 4
    for a, b in zip(one, other, strict=True):
        assert {a, b} in ({0, 1}, {0})                     # a tie is 0
    axes = ["smoothness, dB", "compression, sigma^2", "pixels, dB", "perception, SSIM"]
    for i, axis in enumerate(axes):
        better = rows[0][axis] > rows[1][axis]
        if axis.endswith("sigma^2"):                       # low is good there
            better = rows[0][axis] < rows[1][axis]
        if rows[0][axis] != rows[1][axis]:
            assert (one[i] == 1) == better, axis

FEW = "--n 5 --batch 4 --inception-weights tiny.pth"

@tiny_inception
def test_compare_has_the_gFID_of_generators_of_photographs():
    both_stages()
    runs(train_ldm.main, f"{TINY_LDM} --objective flow --out runs/flow")
    [drawn] = measured("fid", f"--fake runs/ldm {FEW}", "weights tiny")
    assert drawn["real"] == os.path.abspath("data")        # as in training
    assert drawn["N fake"] == 5
    one, other = measured("compare", f"runs/ldm runs/flow {FEW}")
    close(one["generation, gFID"], drawn["gFID"], 1e-6)
    assert other["generation, gFID"] > 0                   # rectified flow has its own sampler

@tiny_inception
def test_neighbours_are_searched_in_pixels_and_in_features():
    both_stages()
    rows = measured("neighbours", f"--ckpt runs/ldm {FEW}")
    assert [row["space"] for row in rows] == ["pixels", "Inception"]
    assert rows[0]["samples"] != rows[1]["samples"]
    for row in rows:
        assert row["ratio"] == row["samples"] / row["held-out"]

def test_neighbours_says_why_held_out_images_are_trained_on():
    for copy in range(8):
        save_images(f"data/copy {copy}", 4, size=32)
    trained("--size 32")
    runs(train_ldm.main, TINY_LDM)
    said = "held-out 0 in pixels: most held-out images are also trained on"
    [row] = measured("neighbours", "--ckpt runs/ldm --n 5 --batch 4", said)
    assert row["held-out"] == 0 and row["ratio"] is None

def sampling_options(**others):
    """What evaluate.draw_samples asks of the command line."""
    return SimpleNamespace(n=9, batch=4, device=CPU, sampler=None, steps=50, **others)

def test_samples_that_are_measured_are_those_of_sample_py():
    both_stages()
    first = next(evaluate.draw_samples(ldm.load_ldm("runs/ldm"), sampling_options(), 1.0))
    runs(sample.main, "--n 4 --cfg 1 --npz")
    of_sample_py = np.load("samples/samples.npz")["arr_0"].transpose(0, 3, 1, 2)
    close(first, of_sample_py.astype(float), 1)            # rounding of another batch

def test_samples_that_are_measured_are_of_all_classes_in_turn_with_the_guidance_asked_for():
    both_stages()
    labels = []

    def sampler(model, schedule, z, y, cfg, steps, **options):
        labels.extend(y.tolist())
        assert (cfg, steps) == (3.0, 50)
        return z

    args = sampling_options()
    args.sampler = "ddpm"
    with mock.patch.dict(ldm.SAMPLERS, ddpm=sampler):
        list(evaluate.draw_samples(ldm.load_ldm("runs/ldm"), args, 3.0))
    assert labels == [0, 1, 0, 1, 0, 1, 0, 1, 0]

# ---- Evaluation: the judge of the built-in faces ----------------------------------------------

class PerfectAutoencoder:
    """An Autoencoder that loses nothing."""

    def __init__(self, path, args):
        self.model = SimpleNamespace(img_size=32)

    def reconstruct(self, images):
        return images

def judged(drawn, options="", classes=vmae.OBJECTS):
    """The rows of `evaluate.py faces` if the samples of the checkpoints are `drawn`, {name: images
    (64, 3, 32, 32)}."""
    for name in drawn:
        Path(name).touch()

    def load_generator(path, args):
        return SimpleNamespace(classes=list(classes), images=drawn[path])

    def draw_samples(generator, args, cfg):
        return generator.images.split(32)

    with (patch(evaluate, "Autoencoder", PerfectAutoencoder),
          patch(evaluate, "load_generator", load_generator),
          patch(evaluate, "draw_samples", draw_samples),
          patch(evaluate, "stage_and_data", return_value=(2, None))):
        return measured("faces", f"--ckpt {' '.join(drawn)} --n 64 {options}")

def faces_in_turn():
    """64 held-out faces, of which each kind takes its turn."""
    val = Faces(32, "val")
    _, kind, _, _ = val.render(range(400, 800))
    numbers = []
    for k in range(4):
        numbers.append(400 + torch.where(kind == k)[0][:16])
    x, _ = val.batch(torch.stack(numbers, 1).flatten())
    return x

# A generator may be perfect, may draw noise, or may always draw the same face: requested, distance,
# precision and recall tell these apart.
@patch(evaluate, "JUDGED", 1024)
def test_the_judge_tells_a_perfect_generator_from_a_blind_and_a_repeating_one():
    with patch(Faces, "__len__", return_value=1536):       # a tenth of its training is enough here
        evaluate.load_judge()
    perfect = faces_in_turn()
    drawn = {"perfect": perfect,
             "blind": torch.from_numpy(random_pixels((64, 3, 32, 32))),
             "same": perfect[:1].expand(64, -1, -1, -1)}
    with patch(torch.optim, "AdamW", side_effect=AssertionError):          # not trained again
        rows = judged(drawn, "--cfg 1")
    names = ["held out", "reconstructed", "samples, w = 1.0"]
    assert [row["images"] for row in rows] == 3 * names
    held_out, _, perfect, _, _, blind, _, _, same_face = rows
    assert held_out["requested"] > 0.9
    assert perfect["requested"] > 0.9
    assert blind["requested"] < 0.6
    assert same_face["requested"] == 0.25                  # right in one turn of four
    assert held_out["distance"] < 0.2 * blind["distance"]
    assert perfect["distance"] < 0.2 * blind["distance"]
    assert perfect["distance"] < 0.3 * same_face["distance"]
    assert perfect["recall"] > 0.5
    assert blind["precision"] == 0
    assert same_face["recall"] < 0.2

class ReadsParts(torch.nn.Module):
    """In place of the Judge: a pixel of value k shows part k."""

    real = torch.arange(192.0).reshape(64, 3)

    def forward(self, images):
        grey = images[:, 0]                                                # (B, 32, 32)
        part = F.one_hot(grey.long().clamp(max=4), 5).permute(0, 3, 1, 2)  # (B, 5, 32, 32)
        return images.float().mean((2, 3)), grey[:, :4, 0], grey[:, :3, 0], part

def test_a_face_is_complete_if_it_shows_three_pixels_of_each_part():
    few = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    few[:, :, :2] = torch.arange(32).clamp(max=4)          # two rows: two pixels of part 1
    many = few.clone()
    many[:, :, 2] = few[:, :, 0]
    with (patch(evaluate, "load_judge", ReadsParts),
          patch(evaluate, "frechet_distance", return_value=0.0)):
        rows = judged({"few": few, "many": many}, "--cfg 1", classes=[])
    of_samples = [row for row in rows if row["images"].startswith("samples")]
    assert [row["complete"] for row in of_samples] == [0, 1]
    assert "requested" not in of_samples[0]                # without classes nothing is

def untrained_judge():
    """In place of evaluate.load_judge."""
    torch.manual_seed(0)
    return evaluate.Judge().eval().requires_grad_(False)

few_faces = patch(Faces, "__len__", new=mock.Mock(return_value=64))

@few_faces
@patch(evaluate, "JUDGED", 64)
@patch(evaluate, "load_judge", untrained_judge)
def test_generators_of_the_faces_are_compared_by_the_judge():
    runs(train_vmae.main, "--steps 2 --batch 4 --size 16 --out runs/one")
    for seed in (0, 1):
        line = f"{TINY_LDM} --vmae runs/one --seed {seed} --out runs/two{seed}"
        runs(train_ldm.main, line)
    few = "--n 16 --batch 8"
    rows = measured("faces", f"--ckpt runs/two0 runs/two1 {few} --cfg 1 2")
    distances = {row["distance"] for row in rows}
    assert len(distances) == 2 + 2 + 2                     # of one stage one, of two generators
    other_sampler = measured("faces", f"--ckpt runs/two0 {few} --cfg 1 --steps 3 --sampler ddpm")
    assert other_sampler[2]["distance"] not in distances
    table = measured("compare", f"runs/two0 runs/two1 {few}")
    assert [row["generation, distance"] for row in table] == [rows[2]["distance"],
                                                              rows[6]["distance"]]
    places = json.loads(Path("out/compare.json").read_text())["rescaled"]
    nearer = 0
    if table[1]["generation, distance"] < table[0]["generation, distance"]:
        nearer = 1
    assert places[f"runs/two{nearer}"][4] == 1             # a small distance is the outer ring
    refuses(evaluate.main, {"--sampler euler": "choose from ddim, ddpm",
                            "--steps 1001": "at most the 1000"}, "faces --ckpt runs/two0 --n 8")

# To train the judge takes half a minute.
def test_generators_of_photographs_are_refused_before_the_judge_is_trained():
    both_stages()
    with patch(evaluate, "load_judge", side_effect=AssertionError):
        refuses(evaluate.main, {"": "not on the faces", "--ckpt runs/vmae": "not on the faces"},
                "faces")

# ---- Evaluation: FID --------------------------------------------------------------------------

def fid_row(options):
    """The row of `evaluate.py fid`, beside which stands what a FID has to be read with."""
    with tiny_inception:
        [row] = measured("fid", f"{options} --batch 8", "under 2,048", "resize pytorch-fid",
                         "weights tiny")
    return row

def real_and_fake():
    """20 images in real/, 21 in fake/ -> their pixels."""
    return save_images("real", 20, 16), save_images("fake", 21, 16, seed=1)

def test_fid_of_two_folders_leaves_overviews_out():
    real, fake = real_and_fake()
    Image.new("RGB", (99, 99)).save("fake/grid.png")       # sample.py's
    row = fid_row("--real real --fake fake")
    of_real = mean_and_covariance(real.mean((1, 2)))
    of_fake = mean_and_covariance(fake.mean((1, 2)))
    close(row["FID"], evaluate.frechet_distance(*of_real, *of_fake), 1e-4)
    assert (row["N real"], row["N fake"]) == (20, 21)
    assert {"sFID", "IS", "KID x 1e3", "precision", "recall"} <= row.keys()
    close(fid_row("--real real --fake real")["FID"], 0, 1e-3)

# pytorch-fid squashes pictures, so that its FID of wide ones is another.
def test_fid_says_how_many_pictures_were_cropped_or_put_on_white():
    save_images("real", 8, 16)
    save_images("fake", 6, 16)
    Image.new("RGB", (20, 16)).save("fake/wide.png")
    Image.new("RGBA", (16, 16)).save("fake/clear.png")
    fid_row("--real real --fake fake")
    title = json.loads(Path("out/fid.json").read_text())["title"]
    counts = "{} of 8 cropped to the square in the middle, {} with transparency, on white"
    assert f"fake: {counts.format(1, 1)}" in title and f"real: {counts.format(0, 0)}" in title

def test_fid_is_the_same_from_adms_images_and_from_saved_statistics():
    real, fake = real_and_fake()
    np.savez("fake.npz", arr_0=fake)                       # as ADM's
    row = fid_row("--real real --fake fake --save-stats new/stats")
    mu, sigma = mean_and_covariance(real.mean((1, 2)))
    stats = np.load("new/stats.npz")
    close(stats["mu"], mu, 1e-3)
    close(stats["sigma"], sigma, 1e-3)
    for source in ("real", "new/stats.npz"):
        again = fid_row(f"--real {source} --fake fake.npz")
        close(again["FID"], row["FID"], 1e-6)
        close(again["sFID"], row["sFID"], 1e-6)
        assert again["N real"] == 20
    assert "KID x 1e3" not in again                        # statistics hold no pairs

def test_fid_reads_statistics_of_pytorch_fid():
    real_and_fake()
    row = fid_row("--real real --fake fake --save-stats stats.npz")
    stats = np.load("stats.npz")
    np.savez("plain.npz", mu=stats["mu"], sigma=stats["sigma"])
    plain = fid_row("--real plain.npz --fake fake")
    close(plain["FID"], row["FID"], 1e-6)
    assert "sFID" not in plain
    assert plain["N real"] == "unknown"

def test_fid_takes_the_built_in_faces():
    save_images("fake", 21, 16)
    assert fid_row("--real faces --fake fake --n 12")["N real"] == 12

@tiny_inception
def test_fid_refuses_what_it_cannot_compare():
    save_images("fake", 21, 16)
    save_images("none", 0)
    Image.new("RGB", (99, 99)).save("none/grid.png")
    np.savez("odd.npz", mu=np.zeros(9), sigma=np.eye(9))
    runs(evaluate.main, "fid --real fake --fake fake --save-stats stats.npz --out out")
    refuses(evaluate.main, {
        "--fake none --real faces": "no images",
        "--fake fake": "--real",
        "--fake no.pt": "no such",
        "--fake fake --real faces --n 1": "one image has no",
        "--fake fake --real no": "no such",
        "--fake fake --real no.npz": "no.npz",
        "--fake stats.npz --real faces": "arr_0",
        "--fake fake --real odd.npz": "odd.npz: mu and sigma",
        "--fake fake --real stats.npz --resize clean": "was made with resize pytorch-fid",
        "--fake fake --real stats.npz --size 20": "was made with size 16",
        "--fake fake --real faces --n 0": "--n"}, "fid --out nowhere")

# A small file that came first by its name once decided the size of all images.
@tiny_inception
def test_fid_of_mixed_sizes_needs_a_size_which_stands_in_the_title():
    save_images("real", 12, 16)
    save_images("fake", 12, 16, seed=1)
    Image.new("RGB", (12, 12)).save("fake/a.png")          # sorts first
    refuses(evaluate.main, {"--real real --fake fake": "fake: holds images of 12 to 16 pixels"},
            "fid --out new")
    text = runs(evaluate.main, "fid --real real --fake fake --size 16 --out out")
    assert "Generated images at 16 px" in text
    text = runs(evaluate.main, "fid --real fake --fake real --out out")    # the size of the fakes
    assert "Generated images at 16 px" in text
    text = runs(evaluate.main, "fid --real faces --fake real --size 24 --n 9 --out out")
    assert "Generated images at 24 px" in text

# A size that was given was once ignored here.
@tiny_inception
def test_fid_of_a_checkpoint_has_the_size_of_its_images():
    both_stages()
    refuses(evaluate.main, {"--size 64": "draws images of 16 pixels; leave --size out"},
            "fid --out new")
    text = runs(evaluate.main, "fid --size 16 --n 9 --cfg 2 --out out")
    assert "Generated images at 16 px" in text

# ---- Tables, pictures, curves -----------------------------------------------------------------

def has_colours(path, colours, least=60):
    """Assert that a picture shows each of these colours above its names, in pixels at least."""
    pixels = np.array(Image.open(path))[:330].reshape(-1, 3)               # (N, 3)
    for colour in colours:
        rgb = [int(colour[i:i + 2], 16) for i in (1, 3, 5)]
        alike = (abs(pixels - rgb) < 12).all(1)
        assert alike.sum() > least, (path, colour)

def test_curves_and_shapes_have_a_colour_each():
    vmae.plot("plot.png", {"one": [(0, 1), (1, 3)], "two": [(0, 2), (1, 2)]}, "x", "y")
    has_colours("plot.png", vmae.COLOURS[:2])
    evaluate.radar("radar.png", ["a", "b", "c"], {"one": [0, 1, 0.5], "two": [1, 0, 1]})
    has_colours("radar.png", vmae.COLOURS[:2])

def test_a_plot_of_one_value_with_a_long_name_is_drawn():
    vmae.plot("one.png", {"a/" * 99: [(0.2, 31.0)]}, "x", "y")
    has_colours("one.png", vmae.COLOURS[:1], least=30)     # one dot of 8 pixels

def test_tables_are_saved_as_json_without_what_json_does_not_have():
    args = SimpleNamespace(out="out", command="fid")
    text = printed(evaluate.report, args, "title", [{"a": math.nan, "b": 1.0}, {"b": 12345}])
    assert "| a | b |" in text
    assert "|  | 12,345 |" in text                         # a row that lacks a column
    rows = strict_json(Path("out/fid.json").read_text())["rows"]
    assert rows == [{"a": None, "b": 1.0}, {"b": 12345}]

def test_curves_of_several_runs_are_drawn_in_one_picture():
    both_stages()
    text = runs(evaluate.main, "curves runs/vmae runs/ldm --out out")
    assert "the curves of runs/vmae, runs/ldm are in out/curves.png" in text
    assert len(Image.open("out/curves.png").getcolors(10**6)) > 99
    with patch(vmae, "draw_plot", wraps=vmae.draw_plot) as draws:
        runs(evaluate.main, "curves runs/vmae runs/vmae/../ldm --out out")
    titles = [call.args[2] for call in draws.mock_calls]
    assert titles == ["L_R", "L_M", "L_reg", "PSNR of held-out images, dB", "L_v"]
    names = list(draws.mock_calls[-1].args[0])
    assert names == ["L_v, runs/vmae/../ldm", "L_v_val, runs/vmae/../ldm"]
    os.mkdir("begun")
    Path("begun/log.jsonl").touch()
    refuses(evaluate.main, {"data": "data/log.jsonl: no such file; name the folder of a run",
                            "begun": "begun: nothing was logged yet",
                            "nowhere": "nowhere: no such",
                            "": "runs"}, "curves --out new")

# ---- Many processes, kills --------------------------------------------------------------------

# These start Python anew, which takes seconds each time; the other tests call main by itself.

def in_child(code, *args, torchrun=0, status=0):
    """Run Python code in a fresh process, or in several, to this exit status -> what it said. One
    thread, 5 minutes."""
    Path("child.py").write_text(f"import sys\nsys.path.insert(0, {str(HERE)!r})\n{code}")
    launch = []
    if torchrun > 0:
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(torchrun)]
    return in_process(*launch, "child.py", *args, status=status)

def in_process(*words, status=0):
    """Run Python with these words on its command line, to this exit status -> what it said."""
    ran = subprocess.run([sys.executable, *map(str, words)], text=True, timeout=300,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == status, ran.stdout
    return ran.stdout

# What children share: main(script, line) runs a script on the CPU, without previews of stage two.
SCRIPTS = f"""
import os, random, time
from pathlib import Path
import train_vmae, train_ldm, ldm, sample, vmae

train_ldm.measure = lambda *args: {{}}
ldm.sizes["tiny"] = {TINY_DIT}

def main(script, line):
    sys.argv = ["script.py", *line.split(), "--device", "cpu"]
    script.main()
"""

def chain(out):
    """The lines of three scripts, into folders that begin with `out`, for two micro-batches."""
    go = "--data data --precision float32 --batch 8 --micro 4 --steps 8"
    return {"train_vmae.py": f"{go} --size 16 --lambda-p 0 --save-every 4 --out {out}_vmae",
            "train_ldm.py": f"{go} --vmae {out}_vmae --out {out}_ldm",
            "sample.py": f"--ckpt {out}_ldm --n 10 --batch 4 --steps 2 --out {out}_samples"}

@contextlib.contextmanager
def one_thread():
    """As in a child, because sums depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

MAINS = {"train_vmae.py": train_vmae.main, "train_ldm.py": train_ldm.main,
         "sample.py": sample.main, "evaluate.py": evaluate.main}
LAUNCHER = "-m torch.distributed.run --standalone --nproc-per-node 2 --".split()

def same_runs(one, two):
    """Assert that two runs have equal weights and equal logs, but for rounding."""
    same(load(f"{one}/last.pt"), load(f"{two}/last.pt"), 1e-5)
    for line, other in zip(log_of(one), log_of(two), strict=True):
        assert line.keys() == other.keys()
        for name in line.keys() - {"images_per_s"}:        # means over all processes
            close(line[name], other[name], 1e-4)

# A line of README with torchrun once did not start, as the tests ran it without torchrun.
def test_the_real_launcher_starts_each_script_and_two_processes_are_one_run():
    save_images("data", 60, 16)
    real_tiny = runpy.run_path(str(HERE / "ldm.py"))["sizes"]["tiny"]
    with one_thread(), mock.patch.dict(ldm.sizes, tiny=real_tiny):
        for script, line in chain("one").items():
            runs(MAINS[script], line)
    for script, line in chain("two").items():
        in_process(*LAUNCHER, HERE / script, *line.split(), "--device", "cpu")
    same_runs("one_vmae", "two_vmae")
    same_runs("one_ldm", "two_ldm")
    files = [*Path().glob("one_*/*.npy"), *Path("one_samples").glob("sample_*.png")]
    assert len(files) == 1 + 1 + 10                        # pixels, moments, images
    for file in files:
        of_two = Path(str(file).replace("one", "two", 1))
        assert file.read_bytes() == of_two.read_bytes(), file

# Two processes would write the same table at once.
def test_the_real_launcher_is_told_that_evaluate_py_is_one_process():
    text = in_process(*LAUNCHER, HERE / "evaluate.py", "efficiency", status=1)
    assert "error: evaluate.py measures in one process; start it without torchrun" in text

def test_two_processes_are_one_run_of_every_kind_of_training():
    save_images("data/left", 60, 16)
    save_images("data/right", 40, 16, seed=1)
    trained(out="start")
    go = "--data data --precision float32 --batch 8 --micro 4 --steps 8 --save-every 4"
    stage_one = f"{go} --lambda-p 0"
    lines = {"sdvae": (train_vmae, f"{stage_one} --size 16 --preset sdvae"),
             "tuned": (train_vmae, f"{stage_one} --size 32 --init start --tune decoder"),
             "classes": (train_ldm, f"{go} --vmae start")}
    # The runs share one group of processes: a second one in the same process may fail to connect.
    code = f"{SCRIPTS}\nclose = vmae.end_together\nvmae.end_together = vmae.wait_for_all\n"
    code += "def all_of_them():\n"
    for name, (script, line) in lines.items():
        with one_thread(), patch(train_ldm, "measure", return_value={}):
            runs(script.main, f"{line} --out one_{name}")
        code += f"    main({script.__name__}, '{line} --out two_{name}')\n"
    code += "    close()\n"
    in_child(f"{code}\nvmae.cli(all_of_them)", torchrun=2)
    for name in lines:
        same(load(f"one_{name}/last.pt"), load(f"two_{name}/last.pt"), 1e-5)

# A process that ended with gloo's group open aborted in 3 of 40 runs on a busy machine, after all
# was saved.
def test_two_processes_close_their_group_before_they_end():
    both_stages()
    stopped = """
def stop_after_this_step(x, generator):
    os.kill(os.getpid(), 15)
    return x

vmae.random_flip = stop_after_this_step
"""
    for how, script, line, status in (
            ("", "sample", "--n 2 --steps 2 --batch 1", 0),
            (stopped, "train_vmae", f"{TINY_RUN} --micro 2 --out stopped", 1)):
        code = f"""{SCRIPTS}{how}
import atexit
def say_whether_open():                         # in one piece, as two processes do so at once
    os.write(1, f"open at the end: {torch.distributed.is_initialized()}\\n".encode())
atexit.register(say_whether_open)
import torch.distributed
vmae.cli(lambda: main({script}, '{line}'))"""
        text = in_child(code, torchrun=2, status=status)
        assert text.count("open at the end: False") == 2, text
        assert ("stopped after step 1" in text) == (how == stopped)

# Otherwise they would wait for it without end.
def test_if_one_process_fails_the_others_end_as_well():
    save_images("data", 40, 16)
    fail = """
def no_flip(x, generator):
    if vmae.RANK == 1:
        open("no such")
    return x

vmae.random_flip = no_flip
"""
    line = f"{TINY_RUN} --micro 2"
    code = f"{SCRIPTS}{fail}vmae.cli(lambda: main(train_vmae, '{line}'))"
    text = raises(AssertionError, in_child, code, torchrun=2)
    assert "error: no such: No such file" in text
    assert "process 0 stops, because another one did" in text

# Kills the runs of two lines at random moments, and goes on with each until it is complete.
KILLS = """
import torch._dynamo                            # AdamW does, which takes seconds in each fork

def fork(script, line, seconds=None):           # nothing has run here yet, so a fork is safe
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        vmae.cli(lambda: main(script, line))
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, 9)
    return os.waitpid(child, 0)[1]

n, saves = map(int, sys.argv[1:])
kills = 0
between = 0                                     # after the first save, before the last
for script, line in ((train_vmae, LINES[0]), (train_ldm, LINES[1])):
    start = time.time()
    assert fork(script, line.replace("PLACE", "whole")) == 0
    longest = time.time() - start
    moment = random.Random(0)
    for _ in range(n // 2):
        after = moment.uniform(0, 4 * longest / n)
        kills += fork(script, line.replace("PLACE", "parts"), after) == 9
        log = Path(line.replace("PLACE", "parts").split()[-1], "log.jsonl")
        between += log.exists() and 0 < log.read_text().count("\\n") < saves
    assert fork(script, line.replace("PLACE", "parts")) == 0
print(kills, between)
"""

def test_killed_at_any_moment_the_same_line_ends_in_the_same_weights():
    save_images("data", 600, 16)
    n = EFFORT["kills"]
    saves = EFFORT["saves"]                                # enough for most kills to find one
    go = f"--data data --precision float32 --batch 4 --resume --save-every 4 --steps {4 * saves}"
    lines = [f"{go} --size 16 --preset sdvae --lambda-p 0 --out PLACE/sdvae",
             f"{go} --vmae PLACE/sdvae --out PLACE/ldm"]
    text = in_child(f"{SCRIPTS}LINES = {lines}\n{KILLS}", n, saves)
    kills, between = map(int, text.split()[-2:])
    assert kills >= EFFORT["least_kills"], text
    assert between >= EFFORT["least_between"], text        # most do not hit the first moments
    for run in ("sdvae", "ldm"):
        same(load(f"whole/{run}/last.pt"), load(f"parts/{run}/last.pt"))   # bit by bit
        assert logged(f"parts/{run}", "step") == logged(f"whole/{run}", "step")

def test_a_second_job_in_the_same_folder_is_refused_until_the_first_one_ends():
    both_stages()
    before = Path("runs/ldm/last.pt").read_bytes()
    lines = {train_vmae.main: f"{TINY_RUN} --out runs/new", sample.main: "--n 2 --steps 1",
             train_ldm.main: "--resume --steps 4"}
    folders = ("runs/new", "samples", "runs/ldm")
    for folder in folders:
        vmae.hold(folder)
    held = list(vmae.HELD)
    vmae.HELD.clear()                                      # cli would let go of them
    for (main, line), folder in zip(lines.items(), folders):
        text = last_line_of(main, line)
        assert text.startswith(f"error: --out {folder}: another job writes into it"), text
    assert Path("runs/ldm/last.pt").read_bytes() == before
    assert os.listdir("runs/new") == os.listdir("samples") == [".lock"]
    for lock in held:
        lock.close()                                       # as the system does after a kill
    runs(sample.main, lines[sample.main])

# ---- A full disk ------------------------------------------------------------------------------

# The sizes below are chosen between those of two files that a script writes one after the other, so
# that the one named is the first that does not fit.

def last_line_of(main, line):
    """Run a script to exit status 1 -> the last line of what it says."""
    text = runs(main, line, status=1)
    assert "Traceback" not in text
    return text.splitlines()[-1].split("\r")[-1]           # bars of progress end in \r

def is_full(main, line, size, word):
    """Assert that a script, if no file may be larger than `size` bytes, ends with one line, which
    names the file that it could not write, and leaves no unfinished file."""
    with files_up_to(size):
        last = last_line_of(main, line)
    assert word in last and "File too large" in last, last
    assert not list(Path().rglob("*.tmp")), line

def test_a_full_disk_is_one_line_and_loses_nothing():
    both_stages()
    before = {path: path.read_bytes() for path in Path("runs").rglob("*.pt")}
    assert len(before) == 2
    with patch(train_ldm, "measure", return_value={}):
        is_full(train_vmae.main, f"{TINY_RUN} --steps 4 --resume", 100000, "last.pt")
        is_full(train_ldm.main, "--out two", 20000, "moments_")
    for path, content in before.items():
        assert path.read_bytes() == content
    is_full(sample.main, "--n 200 --batch 200 --steps 1 --npz", 120000, "samples.npz")
    is_full(evaluate.main, "reconstruct --out table", 9, "reconstruct.json")

def test_a_folder_that_cannot_be_made_is_named_before_the_work():
    both_stages()
    Path("file").touch()                                   # nothing can be written below a file
    scripts = {train_vmae.main: TINY_RUN, train_ldm.main: "", sample.main: "",
               evaluate.main: "reconstruct"}
    for main, line in scripts.items():
        text = runs(main, f"{line} --out file/run", status=1)
        last = text.splitlines()[-1]
        assert last.startswith("error: ") and "file" in last, text
        for work in ("sampling", "encoding", "decoding", "|---"):
            assert work not in text

# ---- Hostile images and files -----------------------------------------------------------------

# What a folder from the internet may hold: nothing of it may be executed, and one line or one
# warning names the file.

def damaged(data, i, rng):
    """The bytes of a file, which somebody damaged in one of five ways, or not at all."""
    data = bytearray(data)
    how = i // 6 % 5
    if how == 1:                                           # cut off
        return data[:rng.integers(len(data))]
    if how == 2:                                           # some bits are flipped
        for at in rng.integers(0, len(data), 8):
            data[at] ^= 1 << rng.integers(8)
    elif how == 3:
        return (b"", b"no image", data[::-1])[i % 3]
    return data

def save_hostile_images(folder, count):
    """Write `count` images, of which many are damaged -> {name: pixels} of some that are sound."""
    rng = np.random.default_rng(0)
    sound = {}
    Path(folder).mkdir()
    for i in range(count):
        kind = ("jpeg", "png", "webp", "gif", "tiff", "bmp")[i % 6]
        name = f"{i:04d}.{kind}"
        if i % 9 == 0:
            name = f"{i:04d} ä\n.{kind}"
        pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        options = dict(icc_profile=rng.bytes(60))          # no profile at all
        if kind == "tiff":
            image = image.convert(("RGB", "L", "CMYK", "1", "P", "LA")[i // 6 % 6])
        else:
            options["exif"] = b"Exif\0\0II*\0\b\0\0\0" + rng.bytes(60)
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        data = damaged(buffer.getvalue(), i, rng)
        Path(folder, name).write_bytes(data)
        if kind in ("png", "bmp") and data == buffer.getvalue():
            sound[name] = pixels
    return sound

def save_other_hostile_files(folder):
    """Write what looks like an image by its name."""
    side = (60000).to_bytes(4, "little")                   # 60,000 x 60,000 pixels, it says
    header = (54).to_bytes(4, "little") + (40).to_bytes(4, "little") + side + side
    Path(folder, "bomb.bmp").write_bytes(b"BM" + bytes(8) + header + bytes(40))
    Path(folder, "folder.jpg").mkdir()
    os.symlink("..", Path(folder, "folder.jpg", "loop"))
    os.symlink("nowhere", Path(folder, "broken.png"))

@patch(vmae, "MAX_UNREADABLE", 0.9)
def test_hostile_images_are_named_once_and_harm_nothing():
    sound = save_hostile_images("data", EFFORT["images"])
    save_other_hostile_files("data")
    # 30 batches are more than an epoch, so that each image is read.
    go = f"{TINY_RUN} --size 20 --batch {EFFORT['batch']} --steps 30 --save-every 99 --out"
    named = {}
    for options in ("kept", "read --no-cache"):
        text = runs(train_vmae.main, f"{go} {options}")
        lines = re.findall(r"warning: skipped (.*): unreadable", text)
        names = {Path(line.strip("'")).name for line in lines}
        assert len(names) == len(lines)                    # each file once
        assert f"{len(names)} so far" in text
        assert f"{len(names) + 1} so far" not in text
        named[options] = names
    assert named["kept"] == named["read --no-cache"]
    assert {"bomb.bmp", "broken.png"} <= names
    assert len(names) > 25
    for name, pixels in sound.items():
        assert ascii(name).strip("'") not in names
        close(vmae.read_image(f"data/{name}", 20), pixels.transpose(2, 0, 1), 0)

class Payload:
    """Code inside a pickle: whoever unpickles it makes this folder."""

    def __reduce__(self):
        return os.mkdir, ("pwned",)

def save_bad_checkpoints():
    """Damage the checkpoint of stage one in many ways -> {file: what should be said of it}."""
    ours = load("runs/vmae/last.pt")
    nan = {}
    for name, value in ours["model"].items():
        nan[name] = value * math.nan
    more = {**ours["model"], "extra": torch.zeros(1)}
    less = dict(ours["model"])
    del less["norm.weight"]
    wide = dict(ours["model_args"], embed_dim=64)
    bad = {"payload": (Payload(), "not a checkpoint"),
           "list": ([1], "it holds a list"),
           "tensor": ({"model": torch.zeros(3)}, "its model is no dict"),
           "number": ({"vmae": 3}, "its vmae is no dict"),
           "none": ({**ours, "train_args": None}, "its train_args is no dict"),
           "half": ({"model_args": ours["model_args"]},
                    "neither stage one, nor a published VMAE or VAE of Stable Diffusion ('patch"),
           "nan": ({**ours, "model": nan}, "infinite or NaN"),
           "less": ({**ours, "model": less}, "do not fit"),
           "more": ({**ours, "model": more}, "do not fit"),
           "wide": ({**ours, "model_args": wide}, "do not fit")}
    words = {}
    for name, (content, said) in bad.items():
        torch.save(content, f"{name}.pt")
        words[f"{name}.pt"] = said
    return words

def save_bad_bytes():
    """Files that are cut off, or lie about their lengths -> their names."""
    whole = Path("runs/vmae/last.pt").read_bytes()
    header = b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 99]}}  '
    files = {"cut.pt": whole[:-999],
             "empty.pt": b"",
             "lie.safetensors": (2**60).to_bytes(8, "little") + b"{}",
             "lie2.safetensors": len(header).to_bytes(8, "little") + header}
    for name, content in files.items():
        Path(name).write_bytes(content)
    return list(files)

def test_hostile_checkpoints_of_stage_one_are_one_line_and_execute_nothing():
    both_stages()
    words = save_bad_checkpoints()
    words.update(dict.fromkeys(save_bad_bytes(), "not a checkpoint, or a damaged one"))
    refuses(train_ldm.main, words, "--out new --vmae")
    refuses(sample.main, {name: name for name in words}, "--out new --ckpt")
    for name in ("cut", "payload", "nan", "less", "wide", "half", "none"):
        os.mkdir(f"run_{name}")                            # as the run to go on with
        shutil.copy(f"{name}.pt", f"run_{name}/last.pt")
        refuses(train_vmae.main, {"": f"run_{name}/last.pt"},
                f"--resume --steps 9 --out run_{name}")
    assert not os.path.exists("pwned")

def test_hostile_checkpoints_of_stage_two_are_one_line():
    both_stages()
    ours = load("runs/ldm/last.pt")
    nan = {name: value * math.nan for name, value in ours["ema"].items()}
    inner = dict(ours["vmae"])
    inner["model"] = dict(inner["model"])
    inner["model"]["norm.weight"] = torch.full((128,), math.inf)
    deep = dict(ours["model_args"], depth=9)
    bad = {"nan.pt": ({**ours, "ema": nan}, "has weights that are infinite or NaN"),
           "inner.pt": ({**ours, "vmae": inner}, "has weights that are infinite or NaN"),
           "deep.pt": ({**ours, "model_args": deep}, "its weights do not fit its model_args")}
    for name, (content, said) in bad.items():
        torch.save(content, name)
        refuses(sample.main, {name: f"{name}: {said}"}, "--out new --ckpt")

@tiny_inception
def test_hostile_npz_are_one_line_and_execute_nothing():
    arrays = {"objects": np.array([Payload()]),
              "floats": np.zeros((2, 8, 8, 3)),
              "number": np.zeros((), np.uint8),
              "square": np.zeros((2, 8, 8, 3), np.uint8),
              "oblong": np.zeros((2, 8, 9, 3), np.uint8)}
    for name, images in arrays.items():
        np.savez(f"{name}.npz", arr_0=images)
    refuses(evaluate.main, {
        "objects.npz": "objects.npz: not a .npz that can be used",
        "floats.npz": "must be uint8",
        "number.npz": "must be uint8 (N, H, H, 3)",
        "oblong.npz": "must be uint8 (N, 8, 8, 3)",
        "faces --real square.npz": "must be uint8 (N, 32, 32, 3)"},
        "fid --real faces --out new --fake")
    assert not os.path.exists("pwned")

# ---- What the data are: pixels ----------------------------------------------------------------

# Floats and integers of 32 bits were once decoded as black, without a word: 49.8 dB, exit 0.

def grey_of(path):
    """The mean of an image of 20 x 20 pixels, from 0 to 255."""
    return vmae.read_image(path, 20).float().mean().item()

UNSIGNED = 1                                               # sample formats of TIFF
SIGNED = 2

def save_tiff(path, pixels, bits, sample_format=UNSIGNED, photometric=1):
    """Write a TIFF by hand, little-endian without compression, of a kind that Pillow reads but does
    not write. pixels: bytes of 40 x 30 grey values."""
    tags = [(256, 40), (257, 30), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1),
            (278, 30), (279, len(pixels)), (339, sample_format)]
    entries = b""
    for tag, value in tags:
        entries += struct.pack("<HHII", tag, 4, 1, value)  # 4: the value is a long
    head = struct.pack("<2sHI", b"II", 42, 8 + len(pixels))
    Path(path).write_bytes(head + pixels + struct.pack("<H", len(tags)) + entries + bytes(4))

def test_pixels_of_16_bits_are_scaled_in_every_format():
    for level in (0, 1, 128, 255):
        grey = np.full((30, 40), 257 * level, np.uint16)   # of 65,535, as `level` is of 255
        big_endian = grey.astype(">u2")
        Image.fromarray(grey).save("little.tif")
        Image.fromarray(big_endian).save("big.tif")
        Image.fromarray(grey).save("grey.png")
        Path("grey.pgm").write_bytes(b"P5 40 30 65535\n" + big_endian.tobytes())
        of_12_bits = (grey / 65535 * 4095).round().astype(">u2")           # as the header says
        Path("grey12.pgm").write_bytes(b"P5 40 30 4095\n" + of_12_bits.tobytes())
        colours = np.repeat(big_endian[..., None], 3, axis=2)
        Path("colour.ppm").write_bytes(b"P6 40 30 65535\n" + colours.tobytes())
        if features.check("jpg_2000"):
            Image.fromarray(grey).save("grey.jp2")
        for path in Path().iterdir():
            assert grey_of(path) == level, path

def test_pixels_whose_range_a_file_does_not_tell_are_refused_by_name():
    grey = np.full((30, 40), 128)
    Image.fromarray((grey / 255).astype(np.float32)).save("float.tif")
    Image.fromarray((grey / 255).astype(np.float32)).save("float.pfm")
    Image.fromarray(grey.astype(np.int32)).save("int32.tif")
    save_tiff("signed.tif", grey.astype("<i2").tobytes(), 16, SIGNED)
    save_tiff("signed8.tif", grey.astype("i1").tobytes(), 8, SIGNED)
    save_tiff("unsigned32.tif", grey.astype("<u4").tobytes(), 32)
    for path in list(Path().iterdir()):
        message = raises(OSError, vmae.read_image, path, 20)
        assert "a file does not tell their range; convert it to 8 or 16 bits" in message
    save_tiff("twelve.tif", bytes(40 * 30 * 12 // 8), 12)  # Pillow would make them too dark
    assert "12 bits; convert it to 8" in raises(OSError, vmae.read_image, "twelve.tif", 20)

WHITE_IS_ZERO = 0
BLACK_IS_ZERO = 1

def test_a_tiff_whose_white_is_zero_is_not_inverted():
    for bits, kind in ((8, "u1"), (16, "<u2")):
        dark = np.full((30, 40), 100, kind)                # of 255
        if bits == 16:
            dark = dark * np.uint16(257)
        for photometric, expected in ((WHITE_IS_ZERO, 155), (BLACK_IS_ZERO, 100)):
            save_tiff("a.tif", dark.tobytes(), bits, photometric=photometric)
            assert grey_of("a.tif") == expected

def save_grey_png(path, bits, transparent=None, colour_type=0, samples=1):
    """Write a PNG of 24 x 24 pixels, of which each sample has the level 1 in this many bits, or 300
    in 16, in the left half, and 0 in the right. transparent: the level that is, in all samples."""
    def chunk(kind, data):
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    level = 300 if bits == 16 else 1
    digits = f"{level:0{bits}b}" * 12 * samples + "0" * bits * 12 * samples
    row = b"\0" + int(digits, 2).to_bytes(len(digits) // 8, "big")
    data = b"\x89PNG\r\n\x1a\n"
    data += chunk(b"IHDR", struct.pack(">IIBBBBB", 24, 24, bits, colour_type, 0, 0, 0))
    if transparent is not None:
        data += chunk(b"tRNS", struct.pack(">H", transparent) * samples)
    Path(path).write_bytes(data + chunk(b"IDAT", zlib.compress(row * 24)) + chunk(b"IEND", b""))

def test_a_transparent_level_is_white_whatever_its_number_of_bits():
    for bits in (1, 2, 4, 8, 16):
        level = 300 if bits == 16 else 1
        save_grey_png("a.png", bits, transparent=level)
        x = vmae.read_image("a.png", 24)
        assert (x[:, :, :12] == 255).all() and (x[:, :, 12:] == 0).all(), bits
        save_grey_png("a.png", bits, transparent=0)
        x = vmae.read_image("a.png", 24)
        assert (x[:, :, 12:] == 255).all() and (x[:, :, 0] != 0).all(), bits
    save_grey_png("a.png", 16, transparent=300, colour_type=2, samples=3)
    assert (vmae.read_image("a.png", 24)[:, :, :12] == 255).all()

def xyz(*numbers):
    """A tag of an ICC profile: a colour of XYZ."""
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(number * 65536) for number in numbers))

def power(exponent):
    """A tag of an ICC profile: light = level ** exponent."""
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(exponent * 256))

def icc_profile(space, pcs=b"XYZ ", **tags):
    """The bytes of an ICC profile, version 2, of these tags, whose white is D50."""
    tags["wtpt"] = xyz(0.9642, 1, 0.8249)
    table = struct.pack(">I", len(tags))
    data = b""
    for name, tag in tags.items():
        at = 132 + 12 * len(tags) + len(data)
        table += name.encode() + struct.pack(">II", at, len(tag))
        data += tag + bytes(-len(tag) % 4)
    length = 128 + len(table) + len(data)
    head = struct.pack(">I4xI4s4s4s12x4s28x3i", length, 0x02100000, b"mntr", space, pcs, b"acsp",
                       63190, 65536, 54061)
    return head.ljust(128, b"\0") + table + data

ADOBE_RGB = icc_profile(                                   # its published primaries, as of D50
    b"RGB ", rXYZ=xyz(0.60974, 0.31111, 0.01947), gXYZ=xyz(0.20528, 0.62567, 0.06087),
    bXYZ=xyz(0.14919, 0.06322, 0.74457), rTRC=power(2.2), gTRC=power(2.2), bTRC=power(2.2))
LINEAR_GREY = icc_profile(b"GRAY", kTRC=power(1))

def profile_of_inks():
    """A profile of CMYK by a table of the 16 corners, in which the black ink alone counts."""
    head = struct.pack(">4s4xBBBx9i", b"mft1", 4, 3, 2, 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    ramp = bytes(range(256))
    white_and_black = bytes([255, 128, 128, 0, 128, 128])  # L, a, b of each
    tag = head + 4 * ramp + 8 * white_and_black + 3 * ramp
    return icc_profile(b"CMYK", b"Lab ", A2B0=tag)

def test_colours_become_those_of_sRGB():
    Image.new("RGB", (30, 30), (200, 100, 50)).save("rgb.png", icc_profile=ADOBE_RGB)
    Image.new("RGBA", (30, 30), (200, 100, 50, 255)).save("rgba.png", icc_profile=ADOBE_RGB)
    Image.new("RGB", (30, 30), (200, 100, 50)).save("rgb.jpg", icc_profile=ADOBE_RGB, quality=100)
    expected = [227, 100, 42]                              # by the formulas of both spaces
    for path in ("rgb.png", "rgba.png", "rgb.jpg"):
        for draft in (True, False):
            colour = vmae.read_image(path, 20, draft).float().mean((1, 2))
            close(colour, expected, 2)
    for grey in (Image.new("L", (30, 30), 55), Image.new("LA", (30, 30), (55, 255))):
        grey.save("grey.png", icc_profile=LINEAR_GREY)
        close(grey_of("grey.png"), 127, 2)                 # 55 / 255 of the light
        grey.save("grey.png", icc_profile=ADOBE_RGB)
        close(grey_of("grey.png"), 52, 3)
    Image.new("CMYK", (30, 30), (9, 99, 199, 128)).save("inks.tif", icc_profile=profile_of_inks())
    close(grey_of("inks.tif"), 119, 2)                     # L = 50

def test_a_profile_that_is_sRGB_or_does_not_fit_or_is_broken_changes_nothing():
    pixels = random_pixels((20, 20, 3))
    srgb = vmae.ImageCms.ImageCmsProfile(vmae.ImageCms.createProfile("sRGB")).tobytes()
    broken = random_pixels(99).tobytes()
    for profile in (srgb, LINEAR_GREY, profile_of_inks(), ADOBE_RGB[:150], broken):
        Image.fromarray(pixels).save("a.png", icc_profile=profile)
        close(vmae.read_image("a.png", 20), pixels.transpose(2, 0, 1), 0)
    assert vmae.srgb_transform(srgb, "RGB") is None        # nor does it cost time

# Drawing programs and generators of images write megabytes of text into a PNG.
def test_a_png_with_much_text_is_read_and_pillow_s_limit_stays_the_user_s():
    pixels = random_pixels((20, 20, 3))
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * (2 << 20), zip=True)
    os.mkdir("data")
    for i in range(6):
        Image.fromarray(pixels).save(f"data/{i}.png", pnginfo=text, icc_profile=bytes(2 << 20))
    limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    x, _ = ImageFolder("data", 20).batch(range(6))         # in threads
    for image in x:
        close(image, pixels.transpose(2, 0, 1), 0)
    assert (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY) == limits

def test_images_that_are_nearly_constant_are_said():
    save_images("data", 20)
    assert "nearly constant" not in described("data")
    for i in range(20):
        Image.new("RGB", (20, 20)).save(f"data/{i:03d}.png")
    train, _ = vmae.open_images("data", 16)
    n = len(train)
    words = f"{n} of the {n} images that were looked at are nearly constant, such as all black"
    assert words in described("data")

# With Pillow's limit switched off every file was once unreadable ("'>' not supported").
def test_the_limit_of_pixels_is_our_own():
    save_images("data", 3)
    save_images("bomb", 1)                                 # 400 pixels
    with patch(Image, "MAX_IMAGE_PIXELS", None):           # as some notebooks set it
        assert len(ImageFolder("data", 16)) == 3
        with patch(vmae, "MAX_PIXELS", 399):
            message = raises(InputError, ImageFolder, "bomb", 16)
    assert "20x20 pixels; at most 399 are read" in message

# ---- What the data are: what the start says ---------------------------------------------------

def test_the_start_counts_images_classes_and_what_was_left_out():
    for i in range(12):
        save_images(f"data/class {i:02d}", i + 5)
    Path("data/class 00/notes.txt").write_text("no image")
    Path("data/class 00/film.MP4").write_bytes(b"no image")
    Path("data/class 00/readme").write_text("no image")
    text = described("data")
    train = ImageFolder("data", 16, "train")
    held_out = ImageFolder("data", 16, "val")
    head = f"images: {len(train)} to train on, {len(held_out)} held out, 16 x 16 pixels"
    assert text.splitlines()[0] == head
    Image.new("RGB", (20, 30)).save("data/class 00/high.png")
    Image.new("RGBA", (20, 20)).save("data/class 00/clear.png")
    again = described("data").splitlines()
    assert again[1].endswith(f"data; cropped to the square in the middle: 1 of 128")
    assert again[2] == "transparency: 1 of them may have some, which becomes white"
    [classes] = re.findall("^classes: (.*)$", text, re.MULTILINE)
    counts = re.findall(r"class \d\d (\d+)", classes)
    assert len(counts) == 10 and classes.endswith(", and 2 more")
    assert int(counts[3]) == sum(path.startswith("class 03/") for path in train.paths)
    [left_out] = re.findall("^left out: (.*)$", text, re.MULTILINE)
    assert set(left_out.split(", ")) == {".txt 1", ".mp4 1", "without extension 1"}

def test_the_start_says_how_many_images_are_enlarged_or_unreadable():
    save_images("data", 200)
    save_images("data/small", 2, 12)
    Path("data/broken.png").write_text("no image")
    text, _ = warned(described, "data")
    assert "enlarged: 2 of 202; the smallest has 12 pixels" in text
    assert "left out, unreadable: 1" in text
    assert "classes: none, as 200 images lie beside the sub-folders" in text
    save_images("deep/only", 30)
    text = described("deep")
    assert "classes: none, as there is only one sub-folder" in text
    assert "name that one with --data" in text
    for words in ("enlarged", "left out"):
        assert words not in text

def test_the_start_of_the_built_in_faces_names_their_classes():
    text = described(None, size=8)
    assert text.splitlines() == ["images: 16384 to train on, 1024 held out, 8 x 8 pixels",
                                 "classes: bear, cat, human, robot"]

# Two of three classes once vanished, because their files were .avif and .jp2.
def test_all_that_pillow_reads_is_read_whatever_the_case_of_its_extension():
    save_images("data/jpg", 1)
    for kind in ("webp", "avif", "jp2", "GIF", "TIF", "PPM", "QOI", "MPO"):
        folder = Path("data", kind)
        folder.mkdir()
        try:
            Image.new("RGB", (20, 20), "red").save(folder / f"a.{kind}")
        except (OSError, KeyError, ValueError):            # this Pillow does not write it
            Image.new("RGB", (20, 20), "red").save(folder / "a.png")
    data = ImageFolder("data", 16)
    assert len(data.classes) == len(data) == 9
    x, _ = data.batch(range(9))
    red = x.float()[data.classes.index("TIF")].mean((1, 2))
    close(red, [255, 0, 0], 0)
    for extension in (".jpg", ".png", ".webp", ".tif", ".bmp", ".gif"):
        assert extension in vmae.EXTENSIONS
    for extension in (".eps", ".wmf", ".mpg", ".h5", ".pdf"):              # see NOT_PICTURES
        assert extension not in vmae.EXTENSIONS

def test_files_that_hold_more_than_one_picture_are_counted():
    pixels = save_images("data", 20)
    many = [Image.fromarray(image) for image in pixels[:3]]
    for kind in ("tif", "gif", "webp", "png"):
        many[0].save(f"data/many.{kind}", save_all=True, append_images=many[1:])
        many[0].save(f"data/one.{kind}")
    many[0].save("data/phone.jpg", "mpo", save_all=True, append_images=many[1:])
    text = described("data")
    assert "more than one picture: in 4 files, such as many.gif; the first is used" in text
    close(vmae.read_image("data/many.tif", 20), pixels[0].transpose(2, 0, 1), 0)

def test_archives_and_tables_are_said_to_be_what_they_are():
    Path("a.zip").write_bytes(b"PK")
    for name in ("shards/0.tar", "tables/0.parquet"):
        Path(name).parent.mkdir()
        Path(name).touch()
    np.savez("a.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    refuses(train_vmae.main, {
        "--data a.zip": "a.zip: a file; give a folder of images; unpack it, and name the folder",
        "--data a.npz": "save its images as .png, or read it with a Python file",
        "--data shards": "it holds .tar 1; unpack it",
        "--data tables": "it holds .parquet 1; save its images as .png"}, "--size 16")
    with tiny_inception:
        refuses(evaluate.main, {"--fake a.zip": "a.zip: a file; unpack it",
                                "--fake faces --real a.zip": "a.zip: a file; unpack it"},
                "fid --real faces --n 8")

def test_an_empty_folder_says_what_is_in_it():
    os.mkdir("data")
    assert "it holds no files" in raises(InputError, ImageFolder, "data", 16)
    Path("data/a.txt").touch()
    assert "it holds .txt 1" in raises(InputError, ImageFolder, "data", 16)

def splits_said():
    """-> the folders that the start names as --data and --val, because classes look like splits."""
    [options] = re.findall(r"give --data (\S+) --val (\S+)$", described("data"), re.MULTILINE)
    return options

# A folder that holds train, val and test was once a data set with these classes.
def test_classes_that_look_like_splits_are_said_with_the_line_to_type():
    for names in (["train", "val", "test"], ["Train", "TEST"], ["training", "validation"]):
        shutil.rmtree("data", ignore_errors=True)
        for name in names:
            save_images(f"data/{name}/cat", 9)
            save_images(f"data/{name}/dog", 9, seed=1)
        data, val = splits_said()
        assert Path(data).name == names[0]
        assert Path(val).name in names[1:]
        text = described(data, val)
        assert "classes: cat 9, dog 9" in text
        assert "look like parts" not in text

def test_classes_that_hold_the_name_of_a_split_look_like_splits():
    for names, chosen in ((["seg_train", "seg_test", "seg_pred"], "seg_train seg_test"),
                          (["trainA", "trainB", "testA", "testB"], "trainA testA"),
                          (["train2017", "val2017"], "train2017 val2017"),
                          (["DIV2K_valid_HR", "DIV2K_train_HR"], "DIV2K_train_HR DIV2K_valid_HR"),
                          (["training_set", "test_set"], "training_set test_set")):
        shutil.rmtree("data", ignore_errors=True)
        for name in names:
            save_images(f"data/{name}", 9)
        data, val = splits_said()
        assert f"{Path(data).name} {Path(val).name}" == chosen

def test_classes_of_which_some_are_no_splits_are_classes():
    for names in (("train", "car", "boat"), ("test positive", "test negative")):
        for name in names:
            save_images(f"data/{name}", 9)
        assert "look like parts" not in described("data")
        shutil.rmtree("data")

def test_folders_with_the_same_names_look_like_pairs():
    for names in (("img001", "img001"), ("7", "00007_hair"), ("2007_000032", "2007_000032")):
        shutil.rmtree("data", ignore_errors=True)
        save_images("data/photographs", 12)
        for i in range(12):
            photograph = Path(f"data/photographs/{i:03d}.png")
            photograph.rename(photograph.with_name(f"{names[0]}{i}.png"))
            mask = Path(f"data/masks/{i}/{names[1].replace('7_', f'7{i}_')}.png")
            mask.parent.mkdir(parents=True)
            if not names[1].endswith("hair"):
                mask = mask.with_name(f"{names[1]}{i}.png")
            Image.new("L", (20, 20)).save(mask)
        text = described("data")
        assert "the files in masks and photographs have the same names, as images and" in text
        assert re.search(r"if they are pairs, give --data \S+photographs$", text, re.MULTILINE)
    for cats, dogs in ((12, 20), (12, 12)):                # each class counts from 0
        save_images("other/cat", cats)
        save_images("other/dog", dogs, seed=1)
        assert "same names" not in described("other")
        shutil.rmtree("other")
    save_images("pairs/small", 12, size=10)
    save_images("pairs/large", 12)
    assert "give --data" in described("pairs")

# A data set that is handed out in thousands once became classes of thousands.
def test_sub_folders_that_look_like_slices_are_said_to_be_that():
    for names in (("00000", "00001"), ("00000", "01000", "02000"), ("shard-0000", "shard-0001")):
        shutil.rmtree("data", ignore_errors=True)
        for i, name in enumerate(names):
            save_images(f"data/{name}", 9, seed=i)
        text = described("data")
        assert f"the sub-folders {names[0]}, {names[1]} look like slices of one data set" in text
    for name in ("1998", "1999"):
        save_images(f"years/{name}", 9)
    assert "slices" not in described("years")

def save_as_edm(folder, labels):
    """Write 24 images as the tools of EDM and StyleGAN do, with these labels."""
    for i in (0, 1):
        save_images(f"{folder}/0000{i}", 12, seed=i)
    Path(folder, "dataset.json").write_text(json.dumps({"labels": labels}))

def test_labels_are_those_of_dataset_json():
    labels = []
    for i in (0, 1):
        for j in range(12):
            labels.append([f"0000{i}/{j:03d}.png", j % 3 * 5])             # 0, 5, 10
    save_as_edm("data", labels)
    data = ImageFolder("data", 16)
    assert data.classes == ["0", "5", "10"]
    assert data.labels.tolist() == [0, 1, 2] * 8
    text = described("data")
    assert "classes, 3 by dataset.json: 0 " in text
    assert "slices" not in text
    before = data.made_of()
    labels[0][1] = 10
    save_as_edm("data", labels)
    assert ImageFolder("data", 16).made_of() != before
    trained()
    runs(train_ldm.main, TINY_LDM)
    assert "drawing the class 5" in runs(sample.main, "--n 1 --steps 1 --class 5")

def test_a_dataset_json_without_labels_means_that_there_are_no_classes():
    save_as_edm("data", None)
    assert ImageFolder("data", 16).classes == []
    text = described("data")
    assert "classes: none, as dataset.json says" in text
    assert "slices" not in text
    Path("data/dataset.json").write_text("[]")             # somebody else's file of this name
    assert ImageFolder("data", 16).classes == ["00000", "00001"]

def test_labels_that_cannot_be_used_are_one_line():
    for labels, said in (([["00000/000.png", 1]], "has no label for 23 of the images, such as"),
                         ([["00000/000.png", [0, 1]]], "its labels are no numbers of classes")):
        save_as_edm("data", labels)
        assert said in raises(InputError, ImageFolder, "data", 16)

# A class whose only image was held out had random weights as its label.
def test_a_class_of_one_image_is_trained_on():
    for i in range(40):                                    # some of these paths would be held out
        save_images(f"data/class {i:02d}", 1)
    save_images("data/many", 40)
    train, val = vmae.open_images("data", 16)
    assert train.labels.unique().tolist() == list(range(41))
    assert len(val) > 0 and len(train) + len(val) == 80
    assert not set(train.paths) & set(val.paths)

def test_if_nothing_can_be_held_out_a_line_says_that_training_images_are_measured():
    for i in range(12):
        save_images(f"data/class {i:02d}", 1)
    train, val = vmae.open_images("data", 16)
    assert train.paths == val.paths
    assert "too few images to hold any out" in described("data")
    trained()                                              # and it trains
    said = "warning: nothing was held out, so images are measured that were trained on"
    [row] = measured("reconstruct", "", said)
    assert row["N"] == 12
    save_images("data/many", 40)
    assert "too few" not in described("data")

def test_a_folder_never_holds_our_own_output():
    both_stages()
    shutil.move("runs", "data/runs")
    os.mkdir("data/samples")
    Path("data/samples/samples.npz").touch()               # somebody else's
    runs(sample.main, "--ckpt data/runs/ldm --n 2 --steps 1 --out data/samples")
    assert os.path.exists("data/samples/samples.npz")
    text = printed(ImageFolder, "data", 16)
    for name in ("samples", "runs/vmae", "runs/ldm"):
        assert f"data/{name}: left out, as our scripts wrote it" in text
    data = ImageFolder("data", 16)
    assert len(data) == 24
    assert data.classes == ["left", "right"]
    assert len(ImageFolder("data/samples", 16)) == 2       # asked for by name they are data

# ---- Names of classes -------------------------------------------------------------------------

# --class 1 once drew the class "02", and --class 3 of three classes the null class, silently.

def test_a_number_is_a_name_if_all_names_are_numbers():
    cases = [(["01", "02", "03"], {"1": 0, "01": 0, "3": 2, "003": 2}),
             (["1", "2", "3", "10"], {"1": 0, "3": 2, "10": 3, "02": 1}),
             (["1", "01", "2"], {"1": 0, "01": 1, "2": 2})]
    for names, labels in cases:
        for text, label in labels.items():
            assert sample.pick_labels(text, names) == [label], (text, names)
    for text, names in (("0", ["01", "02"]), ("4", ["1", "2", "3"]), ("001", ["1", "01"])):
        assert "unknown; choose from" in raises(InputError, sample.pick_labels, text, names)

def test_a_number_is_a_place_if_names_are_no_numbers():
    names = ["left", "right", "7"]
    for text, label in (("left", 0), ("1", 1), ("7", 2)):  # "7" is a name, too
        assert sample.pick_labels(text, names) == [label]
    for text in ("3", "-1", "up", "LEFT"):
        message = raises(InputError, sample.pick_labels, text, names)
        assert f"--class {text}: unknown; choose from left, right, 7, a number below 3" in message

def test_the_null_class_has_a_word_of_its_own():
    assert sample.pick_labels("null", ["left", "right"]) == [2]
    assert sample.pick_labels("null", ["1", "2"]) == [2]
    assert sample.pick_labels("null", ["left", "null"]) == [1]             # a folder of this name
    assert sample.pick_labels(None, ["left", "right"]) == [0, 1]
    assert "unconditional" in raises(InputError, sample.pick_labels, "null", [])

def test_a_wrong_class_among_thousands_is_a_short_message():
    names = [f"class {i}" for i in range(3000)]
    message = raises(InputError, sample.pick_labels, "x", names)
    assert "class 9 and 2990 more" in message
    assert len(message) < 250

def test_accents_are_compared_in_one_form():
    composed = "café"
    decomposed = unicodedata.normalize("NFD", composed)    # as macOS stores it
    assert composed != decomposed
    for typed in (composed, decomposed):
        for stored in (composed, decomposed):
            assert sample.pick_labels(typed, ["bar", stored]) == [1]

def test_a_run_goes_on_after_its_folders_were_copied_with_accents_in_another_form():
    save_two_classes("bar", unicodedata.normalize("NFD", "café"))
    trained()
    runs(train_ldm.main, TINY_LDM)
    for folder in list(Path("data").iterdir()):
        folder.rename(f"data/{unicodedata.normalize('NFC', folder.name)}")
    runs(train_ldm.main, "--resume --steps 3")
    text = runs(train_ldm.main, f"{TINY_LDM} --init runs/ldm --out new")
    assert "starts anew" not in text
    text = runs(sample.main, "--n 1 --steps 1 --class café")
    assert "number 1" in text

def test_what_is_drawn_is_always_said_by_its_name():
    save_two_classes("01", "02")
    trained()
    runs(train_ldm.main, TINY_LDM)
    runs(train_ldm.main, f"{TINY_LDM} --no-classes --out runs/flat")
    for options, said in (
            ("--class 1", "drawing the class 01, number 0, guidance 1.5"),
            ("--class null --cfg 1", "drawing the null class, guidance 1"),
            ("", "drawing 2 classes in turn, guidance 1.5"),
            ("--ckpt runs/flat", "drawing without classes, guidance 1")):
        text = runs(sample.main, f"--n 1 --steps 1 {options}")
        assert said in text.splitlines()

# ---- Networks beside the model, memory, compilers ---------------------------------------------

# Each of these once ended in a traceback: VGG halves 8 pixels to nothing, only CUDA's lack of
# memory has a class of its own, and torch's compiler logs a hundred lines.

def test_small_images_are_trained_without_the_networks_that_need_larger_ones():
    save_images("data", 12)
    go = "--data data --steps 2 --batch 4 --precision float32"
    with patch(vmae, "load_lpips", side_effect=AssertionError):            # not even looked for
        text = runs(train_vmae.main, f"{go} --size 8 --out eight")
        assert "training without LPIPS: LPIPS needs images of 16 pixels, and --size is 8" in text
        text = runs(train_vmae.main, f"{go} --size 4 --preset sdvae --out four")
    assert "training without the discriminator: the discriminator needs images of 8" in text
    assert losses_logged("four") == ["L_R", "L_reg"]
    runs(train_vmae.main, f"{go} --size 8 --preset sdvae --out enough")
    assert "L_D" in losses_logged("enough")                # 8 pixels are enough for it
    refuses(train_vmae.main, {
        "--size 8 --lambda-p .5": "--lambda-p: LPIPS needs images of 16 pixels",
        "--size 4 --preset sdvae --lambda-p 0 --lambda-adv 1": "--lambda-adv: the discriminator"},
        f"{go} --out new")

def test_small_images_are_measured_without_LPIPS():
    save_images("data", 24)
    trained("--size 12")
    trained("--size 12 --seed 1", "runs/other")
    both = "runs/vmae runs/other"
    lines = {"reconstruct": f"--ckpt {both}",
             "smoothness": f"--ckpt {both} --eps 0 1",
             "compare": both}
    with patch(evaluate, "can_load", lambda what, *others: what == "VGG-16"):  # as from a cache
        for name, line in lines.items():
            rows = measured(name, line, "skipped LPIPS: LPIPS needs images of 16 pixels, these")
            assert not any("LPIPS" in column for column in rows[0])
            asked_for = f"{name} {line} --vgg-weights vgg.pth --out new"
            refuses(evaluate.main, {asked_for: "--vgg-weights: LPIPS needs images of 16 pixels"})

def test_LPIPS_is_imported_beside_a_torchvision_of_another_torch():
    Path("torchvision").mkdir()                            # one that behaves like 0.25 does
    Path("torchvision/extension.py").write_text("HAS_OPS = False")
    Path("torchvision/__init__.py").write_text("""
from .extension import HAS_OPS
import torch, torchvision
torchvision.extension
torch.library.register_fake("torchvision::nms")(print)""")
    Path("lpips.py").write_text("import torchvision")
    assert "lpips.py" in in_child("import vmae; print(vmae.import_lpips().__file__)")

def test_LPIPS_takes_16_pixels_and_no_fewer():
    torch.save(random_vgg(), "vgg.pth")
    net = vmae.load_lpips("vgg.pth")
    x = random_images(1, vmae.LPIPS_MIN)
    assert vmae.loss_P(net, x, -x) > 0
    smaller = random_images(1, vmae.LPIPS_MIN - 1)
    assert "too small" in raises(RuntimeError, vmae.loss_P, net, smaller, -smaller)

def no_memory_for_this(*args, **options):
    """What torch does on a CPU that has no 4 PB."""
    return torch.empty(10**15)

def test_out_of_memory_is_one_line_wherever_it_happens():
    both_stages()
    of_numpy = patch(vmae.Cache, "batch", side_effect=MemoryError("Unable to allocate 5 GiB"))
    of_torch = patch(vmae, "loss_VMAE", no_memory_for_this)
    of_cuda = patch(vmae, "loss_R", side_effect=torch.OutOfMemoryError("CUDA"))
    of_mps = patch(ldm, "loss_LDM", side_effect=RuntimeError("MPS backend out of memory"))
    of_drawing = patch(ldm.LDM, "draw", no_memory_for_this)
    of_measuring = patch(evaluate, "scores", no_memory_for_this)
    for trouble, main, line in (
            (of_numpy, train_vmae.main, f"{TINY_RUN} --out one"),
            (of_torch, train_vmae.main, f"{TINY_RUN} --out two"),
            (of_cuda, train_vmae.main, f"{TINY_RUN} --out three"),
            (of_mps, train_ldm.main, f"{TINY_LDM} --out four"),
            (of_drawing, sample.main, "--n 2"),
            (of_measuring, evaluate.main, "reconstruct")):
        with trouble:
            last = last_line_of(main, line)
        assert "error: out of memory; give a smaller --micro, --batch or --size" in last

def test_other_errors_of_torch_are_not_taken_for_the_user_s():
    save_images("data", 8)
    with patch(vmae, "loss_VMAE", side_effect=RuntimeError("shapes differ")):
        assert raises(RuntimeError, runs, train_vmae.main, TINY_RUN) == "shapes differ"

# A process that believes to be number 1 of 1 would train for hours and save nothing.
def test_a_leftover_of_a_launcher_is_one_line():
    for rank, world, said in ((1, 1, "RANK=1 is set, but there are 1 processes; unset RANK"),
                              (0, 2, "WORLD_SIZE=2 is set, but MASTER_ADDR is not")):
        with (patch(vmae, "RANK", rank), patch(vmae, "WORLD", world), mock.patch.dict(os.environ)):
            os.environ.pop("MASTER_ADDR", None)
            assert said in raises(InputError, vmae.start, "cpu")
    for name, value in (("RANK", ""), ("WORLD_SIZE", "two"), ("MASTER_PORT", "")):
        with mock.patch.dict(os.environ, {name: value}):
            assert vmae.from_launcher(name, 7) == 7        # no traceback while vmae.py is imported
            assert f"{name}={value} is set, which is no" in raises(InputError, vmae.start, "cpu")

def test_processes_that_cannot_meet_are_one_line_and_those_that_wait_say_so():
    place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", LOCAL_RANK="0")
    taken = RuntimeError("The port is taken. Then\nmany lines")
    with (patch(vmae, "WORLD", 2), mock.patch.dict(os.environ, place),
          patch(torch.distributed, "init_process_group", side_effect=taken)):
        text = raises(InputError, vmae.start, "cpu")
    assert "cannot meet the others at 127.0.0.1:1 (The port is taken)" in text
    with (patch(vmae, "WORLD", 2), mock.patch.dict(os.environ, place),
          patch(threading, "Timer") as timer,
          patch(torch.distributed, "init_process_group")):
        vmae.start("cpu")
    _, _, [text] = timer.call_args.args
    assert text == "process 0 waits at 127.0.0.1:1 for the others of 2 processes"
    assert names_of_calls(timer.return_value) == ["start", "cancel"]

# ---- Other people's checkpoints ---------------------------------------------------------------

# A VAE of Stable Diffusion 1 once lost two convolutions on the way, with a line about weights that
# were left over; the training on wrong latents ended with exit 0.

def sd_vae():
    """A small VAE under the names that diffusers gives to those of Stable Diffusion."""
    torch.manual_seed(0)
    return vmae.ConvAutoencoder(32, (16, 16, 32), 4)

def quant_convs():
    """The two 1x1 convolutions of Stable Diffusion 1 and 2, random."""
    convs = {}
    for name, channels in (("quant_conv", 8), ("post_quant_conv", 4)):
        convs[f"{name}.weight"] = torch.randn(channels, channels, 1, 1)
        convs[f"{name}.bias"] = torch.randn(channels)
    return convs

def names_of_2022(weights):
    """The same weights, but the parts of attention have their earlier names, and two of them are
    1x1 convolutions, as in some files."""
    earlier = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.",
               ".to_out.0.": ".proj_attn."}
    renamed = {}
    for name, value in weights.items():
        for now, then in earlier.items():
            if now in name and "attentions" in name:
                name = name.replace(now, then)
                if then in (".query.", ".key.") and value.ndim == 2:
                    value = value[..., None, None]         # (C, C) -> (C, C, 1, 1)
        renamed[name] = value
    return renamed

def test_a_vae_of_stable_diffusion_1_encodes_and_decodes_with_its_two_convolutions():
    body = sd_vae()
    convs = quant_convs()
    x = random_images(2, 32)
    moments = F.conv2d(body.encoder(x), convs["quant_conv.weight"], convs["quant_conv.bias"])
    mu, logvar = moments.chunk(2, 1)                                       # (B, d, h, w) each
    z = F.conv2d(mu, convs["post_quant_conv.weight"], convs["post_quant_conv.bias"])
    x_hat = body.decoder(z)
    weights = {**body.state_dict(), **convs}
    for names, content in (("today", weights), ("2022", names_of_2022(weights))):
        torch.save(content, f"{names}.bin")
        ours = vmae.load_vmae(f"{names}.bin")
        q = ours.encode(x)
        close(q.mu, mu, 1e-5)
        close(q.logvar, logvar, 1e-5)
        close(ours.decode(q.mode()), x_hat, 1e-5)
    assert "to_q" not in "".join(names_of_2022(weights))

def test_a_vae_of_stable_diffusion_1_can_be_trained_on_measured_and_tuned():
    save_images("data", 12)
    convs = quant_convs()
    torch.save({**sd_vae().state_dict(), **convs}, "sd1.bin")
    go = f"{TINY_RUN} --size 32 --mask 0 --init sd1.bin"
    runs(train_vmae.main, f"{go} --out on")
    assert not torch.equal(vmae.load_vmae("on").quant_conv.weight, convs["quant_conv.weight"])
    runs(train_vmae.main, f"{go} --lambda-reg 0 --out point")
    point = vmae.load_vmae("point")
    assert (point.encode(random_images(1, 32)).logvar == -30).all()
    runs(train_vmae.main, f"{go} --tune decoder --out tuned")
    tuned = vmae.load_vmae("tuned")
    assert torch.equal(tuned.quant_conv.weight, convs["quant_conv.weight"])
    runs(train_ldm.main, f"{TINY_LDM} --vmae on")
    rows = measured("reconstruct", "--ckpt on point tuned --n 2")
    assert len(rows) == 3

def test_weights_that_are_left_over_and_matter_are_refused():
    weights = sd_vae().state_dict()
    convs = quant_convs()
    cases = [({**weights, "encoder.extra.weight": torch.ones(3)},
              "1 of its weights have no place in this model, such as encoder.extra.weight"),
             ({**weights, "post_quant_conv.weight": convs["post_quant_conv.weight"]},
              "such as post_quant_conv.weight, so it is another one"),
             ({**weights, "quant_conv.weight": convs["quant_conv.weight"],
               "quant_conv.bias": convs["quant_conv.bias"]},
              "lacks 2 weights of this model, such as post_quant_conv.bias")]
    for content, said in cases:
        torch.save(content, "other.pt")
        assert said in raises(InputError, vmae.load_vmae, "other.pt")

def save_as_diffusers(folder, weights, **config):
    """Write a model as diffusers' save_pretrained does."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = Path(folder, "diffusion_pytorch_model.safetensors")
    file.write_bytes(safetensors(weights))
    Path(folder, "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", **config}))

# With 16 groups instead of 32 the latents of a VAE were once wrong by .67 of .83, without a word.
def test_what_the_shapes_of_a_vae_do_not_tell_stands_in_config_json():
    weights = vmae.ConvAutoencoder(32, (32, 32, 64), 4).state_dict()
    go = vmae.load_vmae
    unchecked = "no config.json beside it; that its norms have 32 groups"
    for config in (dict(norm_num_groups=32, act_fn="silu"), dict(act_fn="swish"), {}):
        save_as_diffusers("vae", weights, **config)
        assert unchecked not in printed(go, "vae")
    for config, said in ((dict(norm_num_groups=16), "its norms have 16 groups, by config.json"),
                         (dict(act_fn="relu"), "its activation is relu, by config.json"),
                         (dict(_class_name="AutoencoderDC"), "the autoencoder of AutoencoderDC")):
        save_as_diffusers("vae", weights, **config)
        assert said in raises(InputError, go, "vae")
    Path("vae/config.json").write_text('{"model_type": "clip"}')           # another program's
    assert unchecked in printed(go, "vae")
    Path("vae/config.json").unlink()
    assert unchecked in printed(go, "vae")

def test_a_folder_of_diffusers_is_taken_wherever_a_checkpoint_is():
    save_images("data", 12)
    body = vmae.ConvAutoencoder(32, (32, 32, 64), 4)
    save_as_diffusers("pipeline/vae", body.state_dict())
    for path in ("pipeline", "pipeline/vae"):
        assert equal_weights(vmae.load_vmae(path), body)
    runs(train_vmae.main, f"{TINY_RUN} --size 32 --mask 0 --init pipeline/vae")
    weights = f"pipeline/vae/{vmae.DIFFUSERS[0]}"          # for the options of the other scripts
    assert options_of(train_ldm, "--vmae pipeline").vmae == os.path.abspath(weights)
    assert vmae.checkpoint_path("pipeline") == evaluate.checkpoint("pipeline") == weights

def test_a_vae_of_flux_2_loads_without_the_statistics_of_its_generator():
    weights = vmae.ConvAutoencoder(32, (32, 32, 64), 4, quant=True).state_dict()
    statistics = {"bn.running_mean": torch.ones(16), "bn.running_var": torch.ones(16),
                  "bn.num_batches_tracked": torch.tensor(3)}
    torch.save({**weights, **statistics}, "flux2.bin")
    text = printed(vmae.load_vmae, "flux2.bin")
    assert f"ignored: {', '.join(statistics)}" in text
    torch.save({**weights, "bn.weight": torch.ones(16)}, "other.bin")
    assert "no place in this model" in raises(InputError, vmae.load_vmae, "other.bin")

# "Tuple index out of range", and advice for another model, were once said of these.
def test_autoencoders_of_other_kinds_are_refused_by_their_name():
    shape = {"encoder.conv_in.weight": torch.zeros(96, 3, 3, 3, 3)}
    for name, said in (("encoder.down_blocks.0.norm1.gamma", "Qwen-Image or Wan"),
                       ("encoder.down_blocks.0.norm1.weight", "HunyuanImage"),
                       ("encoder.down_blocks.0.0.conv1.weight", "DC-AE"),
                       ("decoder.decoder_embed.weight", "RAE"),
                       ("encoder.layers.0.weight", "TAESD"),
                       ("quantize.embedding.weight", "VQGAN")):
        torch.save({**shape, name: torch.zeros(3)}, "other.pt")
        message = raises(InputError, vmae.load_vmae, "other.pt")
        assert f"is the autoencoder of {said}, which is none of those" in message
    kvae = {"encoder.down.0.block.0.norm1.weight": torch.zeros(3),
            "decoder.mid.block_1.norm1.conv_y.weight": torch.zeros(3)}
    torch.save({**shape, **kvae}, "other.pt")
    assert "the autoencoder of KVAE" in raises(InputError, vmae.load_vmae, "other.pt")

def test_tensors_of_odd_kinds_in_a_checkpoint_are_one_line():
    weights = sd_vae().state_dict()
    name = "encoder.conv_in.bias"
    odd = {"sparse": torch.eye(3).to_sparse(), "rows": torch.eye(3).to_sparse_csr(),
           "meta": torch.zeros(3, device="meta")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                    # torch will drop them
        odd["quantised"] = torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8)
    for value in odd.values():
        torch.save({**weights, name: value}, "odd.pt")
        message = raises(InputError, vmae.load_vmae, "odd.pt")
        assert f"{name} is sparse, quantised or otherwise no tensor to compute with" in message
    small = {key: value.to(torch.float8_e4m3fn) for key, value in weights.items()}
    torch.save(small, "small.pt")
    close(vmae.load_vmae("small.pt").encoder.conv_in.bias, small[name].float(), 0)
    small[name] = torch.full((16,), math.nan).to(torch.float8_e4m3fn)
    torch.save(small, "small.pt")
    assert "infinite or NaN" in raises(InputError, vmae.load_vmae, "small.pt")

def test_weights_of_a_training_that_are_left_over_are_named_and_ignored():
    weights = sd_vae().state_dict()
    torch.save({**weights, "loss.logvar": torch.ones(1), "discriminator.0.bias": torch.ones(1)},
               "vae.pt")
    text = printed(vmae.load_vmae, "vae.pt")
    count = len(weights)
    assert text.endswith(f"vae.pt: {count} tensors read; missing: none; ignored: loss.logvar, "
                         "discriminator.0.bias\n")

def test_names_of_the_first_latent_diffusion_code_are_recognised():
    weights = {"encoder.conv_in.weight": torch.zeros(128, 3, 3, 3),
               "encoder.down.0.block.0.norm1.weight": torch.zeros(128),
               "decoder.conv_in.weight": torch.zeros(512, 4, 3, 3)}
    whole = {f"first_stage_model.{name}": value for name, value in weights.items()}
    for content in (weights, {"state_dict": weights}, {"state_dict": whole}):
        torch.save(content, "first.ckpt")
        message = raises(InputError, vmae.load_vmae, "first.ckpt")
        assert "names of the first latent diffusion code" in message
        assert "AutoencoderKL.from_single_file" in message

# "A damaged file" was once said of files that are whole, but hold a number of numpy's.
def test_python_objects_inside_a_checkpoint_are_named():
    weights = {"state_dict": sd_vae().state_dict()}
    objects = {"numpy._core.multiarray.scalar": np.float64(1.5),
               "pathlib.PurePosixPath": PurePosixPath("/x"),
               "types.SimpleNamespace": SimpleNamespace(a=1)}
    for name, value in objects.items():
        for new_format in (True, False):                   # False: as torch 1.5 wrote it
            torch.save({**weights, "extra": value}, "bad.pt",
                       _use_new_zipfile_serialization=new_format)
            message = raises(InputError, vmae.load_vmae, "bad.pt")
            assert "it holds Python objects (" in message
            assert name in message
            assert "save its state_dict by itself" in message

def test_a_file_that_is_no_checkpoint_by_its_name_is_told_what_is_one():
    np.save("array.npy", np.zeros(3))
    Path("archive.zip").write_bytes(b"PK\x03\x04")
    save_images("data", 1)
    for path in ("array.npy", "archive.zip", "data/000.png"):
        message = raises(InputError, vmae.load_vmae, path)
        assert message.startswith(f"{path}: not a checkpoint; give a file in .pt, .pth, .bin")
    Path("cut.PT").write_bytes(b"PK\x03\x04")              # by its name it is one
    assert "not a checkpoint, or a damaged one" in raises(InputError, vmae.load_vmae, "cut.PT")

@contextlib.contextmanager
def without_the_rights_of_root():
    """As the user nobody, because root may read every file. A skip where there is no such thing."""
    if not hasattr(os, "seteuid"):
        raise unittest.SkipTest("this system has no users as Unix has them")
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)

def test_what_may_not_be_read_is_said_to_be_that():
    save_images("data/open", 3)
    os.mkdir("data/closed")
    torch.save(sd_vae().state_dict(), "closed.pt")
    os.chmod("closed.pt", 0)
    os.chmod("data/closed", 0)
    with without_the_rights_of_root():
        text = runs(sample.main, "--ckpt closed.pt", status=1)
        assert text == "error: closed.pt: Permission denied\n"
        text = runs(train_vmae.main, "--data data --out /tmp/nowhere", status=1)
        assert text.endswith("data/closed: Permission denied\n")
    os.chmod("data/closed", 0o700)

# ---- Black images -----------------------------------------------------------------------------

# Two equal images have an infinite PSNR, and JSON has no such number.

def save_black_run():
    """data/ with black images, and a checkpoint in black.pt whose model makes everything black, so
    that its PSNR is infinite."""
    os.mkdir("data")
    for i in range(24):
        Image.new("RGB", (20, 20)).save(f"data/{i:02d}.png")
    trained()
    ckpt = load("runs/vmae/last.pt")
    ckpt["model"]["decoder_pred.conv_smoother.weight"] *= 0
    ckpt["model"]["decoder_pred.conv_smoother.bias"][:] = -1.5
    torch.save(ckpt, "black.pt")

def test_a_log_of_black_images_is_json():
    save_black_run()
    runs(train_vmae.main, f"{TINY_RUN} --init black.pt --lr 1e-9 --save-every 1 --out black")
    lines = Path("black/log.jsonl").read_text().splitlines()
    for line in lines:
        numbers = strict_json(line)
        assert numbers["PSNR_val"] is None                 # infinite
        assert numbers["L_R"] > 0
    assert len(lines) == 2
    assert Path("black/curves.png").exists()               # which leave such points out

def test_tables_of_black_images_are_json():
    save_black_run()
    torch.save(load("black.pt"), "other.pt")
    lines = {"reconstruct": "--ckpt black.pt runs/vmae",
             "smoothness": "--ckpt black.pt --eps 0 1",
             "compare": "black.pt other.pt runs/vmae"}
    for name, line in lines.items():
        runs(evaluate.main, f"{name} {line} --out out")
        strict_json(Path(f"out/{name}.json").read_text())
    rows = strict_json(Path("out/reconstruct.json").read_text())["rows"]
    assert [row["PSNR"] is None for row in rows] == [True, False]

# ---- Flips, and saves that are kept -----------------------------------------------------------

# Letters, digits and organs have a left and a right: mirrored ones were once among the samples.

def save_letters(folder, count):
    """Images that are white on their left half and noise on the right, so that no mirror image
    looks like one of them."""
    Path(folder).mkdir(parents=True)
    for i, pixels in enumerate(random_pixels((count, 16, 16, 3))):
        pixels[:, :8] = 255
        Image.fromarray(pixels // 2 + pixels // 4).save(Path(folder, f"{i:02d}.png"))

def images_seen(options):
    """All images that two steps of stage one train on, (8, 3, 16, 16)."""
    seen = []
    loss_VMAE = vmae.loss_VMAE

    def look(x, *args):
        seen.append(x)
        return loss_VMAE(x, *args)

    with patch(vmae, "loss_VMAE", look):
        trained(options)
    return torch.cat(seen)

def moments_file(run):
    """The only cache of moments in a run folder."""
    [file] = Path(run).glob("moments_*.npy")
    return file

def test_no_image_is_mirrored_with_no_flip():
    save_letters("data", 24)
    left = images_seen("")[..., :8].mean((1, 2, 3))                        # (8,)
    assert 0 < (left < 0.4).sum() < 8                      # where the noise is, if mirrored
    left = images_seen("--no-flip")[..., :8].mean((1, 2, 3))
    assert (left > 0.4).all()

def test_stage_two_mirrors_images_as_stage_one_did_unless_told_otherwise():
    save_letters("data", 24)
    n = len(ImageFolder("data", 16, "train"))
    trained(out="flip")
    trained("--no-flip", out="no_flip")
    for line, rows in (("--vmae flip", 2 * n),
                       ("--vmae no_flip", n),
                       ("--vmae no_flip --flip", 2 * n),
                       ("--vmae flip --no-flip", n)):
        shutil.rmtree("run", ignore_errors=True)
        runs(train_ldm.main, f"{TINY_LDM} {line} --out run")
        assert len(np.load(moments_file("run"))) == rows, line
        assert load("run/last.pt")["train_args"]["flip"] == (rows == 2 * n)

def test_the_cache_of_moments_belongs_to_its_flips():
    save_letters("data", 24)
    trained()
    runs(train_ldm.main, f"{TINY_LDM} --out run")
    before = moments_file("run")
    os.remove("run/last.pt")
    runs(train_ldm.main, f"{TINY_LDM} --no-flip --out run")
    assert before != moments_file("run")                   # the other one went

def test_saves_are_kept_if_asked_for_and_can_be_measured():
    save_images("data", 24)
    trained("--save-every 1 --keep")
    runs(train_vmae.main, f"{TINY_RUN} --save-every 1 --steps 3 --resume")
    kept = sorted(path.name for path in Path("runs/vmae").glob("*.pt"))
    assert kept == ["last.pt", "step_000001.pt", "step_000002.pt", "step_000003.pt"]
    assert load("runs/vmae/step_000001.pt")["step"] == 1
    last = Path("runs/vmae/last.pt").read_bytes()
    assert Path("runs/vmae/step_000003.pt").read_bytes() == last
    names = " ".join(f"runs/vmae/{name}" for name in kept[1:])
    rows = measured("reconstruct", f"--ckpt {names} --n 2")
    assert len({row["PSNR"] for row in rows}) == 3
    runs(train_ldm.main, f"{TINY_LDM} --save-every 1 --keep")
    runs(sample.main, "--ckpt runs/ldm/step_000001.pt --n 1 --steps 1")
    trained(out="usual")
    assert list(Path("usual").glob("*.pt")) == [Path("usual/last.pt")]

# ---- A data set of one's own, a notebook ------------------------------------------------------

# The file is a program. It runs if the user names it, and not because a checkpoint does.

OWN_IMAGES = '''
import torch, vmae

class Squares(vmae.Images):
    classes = ["dark", "light"]
    def __init__(self, size, first, count):
        self.size, self.first, self.count = size, first, count
    def __len__(self):
        return self.count
    def batch(self, indices):
        number = torch.as_tensor(indices) + self.first
        pixel = torch.arange(3 * self.size**2).view(3, self.size, self.size)
        return (number.view(-1, 1, 1, 1) * pixel % 251).byte(), number % 2
    def made_of(self):
        return f"squares {self.first} {self.count}"

def open_images(size):
    return Squares(size, 0, 24), Squares(size, 24, 8)
'''

def own_images():
    """images.py, a Python file with a data set, and both stages trained on it."""
    Path("images.py").write_text(OWN_IMAGES)
    runs(train_vmae.main, f"{TINY_RUN} --data images.py --out runs/vmae")
    return runs(train_ldm.main, f"{TINY_LDM} --data images.py")

def test_a_data_set_of_one_s_own_trains_both_stages():
    text = own_images()
    assert "images: 24 to train on, 8 held out, 16 x 16 pixels" in text
    assert "classes: dark, light" in text
    assert len(np.load(moments_file("runs/ldm"))) == 48
    text = runs(sample.main, "--n 2 --steps 1 --class light")
    assert "drawing the class light" in text

def test_a_data_set_of_one_s_own_is_measured_if_it_is_named_again():
    own_images()
    rows = measured("reconstruct", "--data images.py")
    assert rows[0]["N"] == 8                               # those that it holds out
    rows = measured("separability", "--data images.py --n 8")
    assert rows[-1]["level"] == "classes, object"
    save_images("real", 12, 16)
    with tiny_inception:
        assert measured("fid", "--real real --n 8")[0]["N fake"] == 8
        line = "runs/ldm runs/ldm/last.pt --data images.py --inception-weights tiny.pth"
        measured("compare", line, "skipped generation")    # which images.py does not hold

def test_a_program_that_only_a_checkpoint_names_is_not_run():
    own_images()
    Path("images.py").write_text("raise SystemExit('it ran')")
    refuses(train_ldm.main, {"--out new": "a program; name it again with --data",
                             "--resume --steps 3": "a program; name it again with --data"})
    refuses(train_vmae.main, {"--resume --steps 3": "a program; name it again with --data"})
    with tiny_inception:
        refuses(evaluate.main, {
            "reconstruct": "a program; name it again with --data",
            "separability": "a program; name it again with --data",
            "neighbours": "a program; neighbours measures folders",
            "fid": "a program; name images to compare with by --real",
            "faces": "not on the faces"})

def test_a_python_file_without_open_images_is_one_line():
    Path("empty.py").touch()
    refuses(train_vmae.main, {
        "--data empty.py": "empty.py: defines no function open_images(size); see vmae.Images",
        "--data none.py": "none.py: no such file",
        "--data empty.py --val data": "leave --val out"}, "--size 16")

def test_a_picture_file_becomes_a_picture_in_five_lines():
    save_images("data", 12, 40)
    trained()
    lines = """
from vmae import load_vmae, read_image, to_float, picture
vmae = load_vmae("runs/vmae")
x = to_float(read_image("data/000.png", vmae.img_size))[None]
z = vmae.encode(x).mode()
shown = picture([x, vmae.decode(z)])
"""
    notebook = {}
    exec(lines, notebook)
    assert isinstance(notebook["shown"], Image.Image)
    assert notebook["shown"].size == (4 * 16, 4 * (16 + 2 + 16))           # enlarged 4 times
    upper = np.array(notebook["shown"])[:64:4, ::4]
    expected = vmae.read_image("data/000.png", 16).permute(1, 2, 0)
    close(upper, expected, 0)

def test_pictures_of_pixels_and_of_floats_are_the_same():
    rows = torch.from_numpy(random_pixels((3, 3, 16, 16))).split(2)
    of_floats = vmae.picture([vmae.to_float(row) for row in rows])
    assert np.array_equal(np.array(vmae.picture(rows)), np.array(of_floats))

def test_wrong_shapes_types_and_ranges_are_named_by_encode():
    pixels = torch.from_numpy(random_pixels((2, 3, 16, 16)))
    x = vmae.to_float(pixels)
    cases = [(Image.new("RGB", (16, 16)), "x is a Image: give a tensor"),
             (pixels, "x is uint8: give to_float(x)"),
             (x[0], "x has the shape (3, 16, 16): give a batch, for one image x[None]"),
             (x[:, :1], "give (B, 3, H, W), with 3 colours"),
             (x.permute(0, 2, 3, 1), "give (B, 3, H, W), with 3 colours"),
             (pixels.float(), "images are in [-1, 1]; give to_float(x)")]
    for model in both_bodies():
        model.encode(5 * x)                                # noise may reach so far
        for wrong, said in cases:
            assert said in raises(InputError, model.encode, wrong)
    message = raises(InputError, VMAE(**TINY_VMAE).encode, random_images(1, 32))
    assert message == "this model encodes 16x16 pixels, not 32x32"

def test_run_folders_stand_for_their_last_checkpoint():
    both_stages()
    same(vmae.load_vmae("runs/vmae").state_dict(), vmae.load_vmae("runs/vmae/last.pt").state_dict())
    same(vmae.load_vmae("runs/ldm").state_dict(), vmae.load_vmae("runs/vmae").state_dict())
    found = ldm.load_ldm("runs/ldm")
    same(found.ae.state_dict(), vmae.load_vmae("runs/vmae").state_dict())
    assert found.path.T == 1000
    assert found.classes == ["left", "right"]
    assert (found.data, found.val) == (os.path.abspath("data"), None)
    assert "no such checkpoint" in raises(InputError, vmae.load_vmae, "data")
    os.chdir("runs/ldm")
    vmae.load_vmae(".")

# ---- The scripts, as a user types them --------------------------------------------------------

def test_the_whole_chain_leaves_what_readme_says():
    save_images("data/left", 20)
    save_images("data/right", 20)
    runs(train_vmae.main, f"{TINY_RUN} --steps 3 --save-every 2")
    runs(train_ldm.main, f"{TINY_LDM} --steps 3")
    runs(sample.main, "--n 9 --steps 4 --npz --trajectory")
    assert "| PSNR |" in all_figures()                     # the first table
    pictures = {path.name for path in Path("runs/vmae").glob("*.png")}
    assert {"preview_000002.png", "preview_000003.png", "curves.png", "reconstruct.png"} <= pictures
    last = log_of("runs/vmae")[-1]
    assert last["step"] == 3
    assert {"L_R", "L_M", "L_reg", "lr", "images_per_s", "PSNR_val", "PSNR_m_val"} <= last.keys()
    ckpt = load("runs/ldm/last.pt")
    assert ckpt["classes"] == ["left", "right"]            # the names of the folders
    assert Path("runs/ldm/preview_000003.png").exists()

def test_samples_are_the_same_as_png_as_npz_and_in_the_overview():
    both_stages()
    line = "--n 9 --steps 4 --npz --trajectory"
    runs(sample.main, line)
    images = np.load("samples/samples.npz")["arr_0"]
    assert images.shape == (9, 16, 16, 3)
    assert images.dtype == np.uint8
    for i in range(9):
        assert np.array_equal(np.array(Image.open(f"samples/sample_{i:06d}.png")), images[i])
    grid = np.array(Image.open("samples/grid.png"))        # eight per row, enlarged four times
    assert np.array_equal(grid[72:136:4, :64:4], images[8])
    assert (grid[72:, 64:] == 255).all()
    assert Image.open("samples/trajectory.png").size == (4 * (4 * 18 - 2), 4 * (8 * 18 - 2))
    runs(sample.main, line)                                # now all PNGs are there
    assert np.array_equal(np.load("samples/samples.npz")["arr_0"], images)
    assert np.array_equal(np.array(Image.open("samples/grid.png")), grid)

def test_a_notebook_draws_the_images_of_sample_py():
    both_stages()
    x = ldm.load_ldm("runs/ldm").draw(range(8), steps=3)
    runs(sample.main, "--n 8 --steps 3")
    for i, image in enumerate(x.permute(0, 2, 3, 1).numpy()):
        assert np.array_equal(np.array(Image.open(f"samples/sample_{i:06d}.png")), image)

def test_the_average_of_the_weights_is_what_samples():
    both_stages()
    model = ldm.load_ldm("runs/ldm").model
    ckpt = load("runs/ldm/last.pt")
    assert model.y_embedder.num_classes == 2
    name = "final_layer.linear.weight"
    assert torch.equal(model.state_dict()[name], ckpt["ema"][name])
    assert not torch.equal(ckpt["model"][name], ckpt["ema"][name])
    assert ckpt["ema"][name].abs().max() > 0               # where both started

# ---- README -----------------------------------------------------------------------------------

def code_blocks(language):
    """README's code blocks of this language."""
    text = source("README.md")
    assert not re.search("```(bash|shell|console|py)\n", text)             # sh and python are run
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)

def readme_commands():
    """The lines of README's code blocks as bash would run them, loops unrolled: "train_vmae.py
    --mask 0" for example. Of lines that differ in numbers alone, the first."""
    if not shutil.which("bash"):
        raise unittest.SkipTest("no bash to read README's code blocks")
    echo = 'pip() { :; }; python() { echo "$*"; }; torchrun() { echo "$*"; }'
    script = "\n".join([echo, *code_blocks("sh")])
    ran = subprocess.run(["bash", "-ec", script], capture_output=True, text=True)
    assert ran.returncode == 0 and not ran.stderr, ran.stderr
    commands = {}
    for line in re.findall(r"\w+\.py.*", ran.stdout):      # without torchrun's own options
        commands.setdefault(re.sub(r"\d[\d.e-]*", "0", line), line)
    return list(commands.values())

def published_files():
    """What README downloads and names: photographs, and the authors' weights, but smaller."""
    save_images("path/left", 12)
    save_images("path/right", 12)
    save_images("CelebAMask-HQ/CelebA-HQ-img", 24)
    torch.save(VMAE(16, 4, 48, 1, 12, latent_dim=4).state_dict(), "vmae.pth")
    torch.save({"ema": ldm.DiT(4, **TINY_DIT, in_channels=4).state_dict()}, "lightningdit.pt")
    torch.save(dict(mean=torch.zeros(4), std=torch.ones(4)), "latents_stats.pt")

# The scripts run in this process: only the words behind their names are README's.
# What makes each command short. Of an option that is given twice, the second one counts.
SHORTER = {"train_vmae.py": "--steps 2 --batch 4 --size 16 --lambda-p 0 --precision float32",
           "train_ldm.py": "--steps 2 --batch 8 --precision float32",
           "sample.py": "--n 4 --steps 3",
           "evaluate.py": "--n 9 --batch 8",
           "evaluate.py faces": "--n 16 --steps 3",
           "evaluate.py separability": "--n 16",
           "evaluate.py efficiency": "--size 16",
           "evaluate.py curves": ""}

def value_of(option, words, default):
    """What stands behind an option in the words of a command."""
    if option in words:
        return words[words.index(option) + 1]
    return default

def run_folder(script, words):
    """The run folder of a training."""
    usual = "runs/ldm"
    if script == "train_vmae.py":
        usual = f"runs/{value_of('--preset', words, 'vmae')}"
    if "--tune" in words:
        usual = "runs/tuned"
    return value_of("--out", words, usual)

def with_files(words):
    """The words of a command, with a few of the files that a * stands for."""
    found = []
    for word in words:
        if "*" in word:
            found.extend(sorted(map(str, Path().glob(word)))[:2])
        else:
            found.append(word)
    return found

@tiny_inception
@few_faces
@patch(evaluate, "JUDGED", 64)
@patch(ldm.LDM, "draw", quick_draw)
@mock.patch.dict(ldm.sizes, small=TINY_DIT, base=TINY_DIT)
def test_every_command_of_the_readme_runs():
    published_files()
    ran = set()
    for line in readme_commands():
        script, *words = line.split()
        if script == "test_all.py":                        # this one
            continue
        words = with_files(words)
        command = script
        if script.startswith("train") and "--resume" not in words:
            shutil.rmtree(run_folder(script, words), ignore_errors=True)   # another section's
        if script == "evaluate.py" and words:
            command = f"{script} {words[0]}"
        if command == "evaluate.py":
            all_figures()
        else:
            shorter = SHORTER.get(command, SHORTER[script])
            runs(MAINS[script], f"{' '.join(words)} {shorter}")
        ran.add(command)
    assert {"train_vmae.py", "train_ldm.py", "sample.py", "evaluate.py", "evaluate.py fid",
            "evaluate.py faces", "evaluate.py compare", "evaluate.py smoothness"} <= ran

def test_every_python_block_of_the_readme_runs():
    both_stages()
    blocks = code_blocks("python")
    assert blocks
    for block in blocks:
        for path in re.findall(r'"([^"]+\.(?:png|jpe?g))"', block):        # pictures of the reader
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40)).save(path)
        exec(block, {})

# torchrun takes --n for a prefix of its own --nnodes, unless -- stands before the script.
def test_every_torchrun_line_with_n_ends_torchrun_s_own_options_before_the_script():
    lines = []
    for file in ("README.md", *MAINS):
        lines.extend(re.findall(r"\btorchrun .*\.py.*", source(file)))
    assert len(lines) >= 3
    for line in lines:
        before_script = re.split(r"\w+\.py", line)[0]
        if re.search(r" --n\b", line):                     # torchrun would take it for --nnodes
            assert before_script.endswith(" -- "), line

def options_that_exist():
    """All options of all scripts and commands, without their dashes."""
    texts = [runs(main, "--help") for main in (train_vmae.main, train_ldm.main, sample.main)]
    commands = re.findall(r"^ {4}(\w+)", runs(evaluate.main, "--help"), re.MULTILINE)
    assert len(commands) == 9
    for command in commands:
        texts.append(runs(evaluate.main, f"{command} --help"))
    return set(re.findall(r"--([a-z][a-z-]*)", "\n".join(texts)))

OPTIONS_OF_TORCHRUN = {"nproc-per-node", "nnodes", "rdzv-backend", "rdzv-endpoint"}

def test_every_option_in_the_readme_exists():
    text = re.sub(r"```text.*?```", "", source("README.md"), flags=re.DOTALL)   # arrows are none
    named = set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", text))
    assert len(named) > 20
    unknown = named - options_that_exist() - OPTIONS_OF_TORCHRUN - {"long"}    # of test_all.py
    assert not unknown

MODULES = dict(vmae=vmae, ldm=ldm, train_vmae=train_vmae, train_ldm=train_ldm, sample=sample,
               evaluate=evaluate)

def test_every_name_in_the_readme_exists():
    text = source("README.md")
    names = set(re.findall(rf"`((?:{'|'.join(MODULES)})(?:\.\w+)+)", text))
    names = {name for name in names if not name.endswith(".py")}
    assert len(names) > 30
    assert {"vmae.loss_VMAE", "ldm.LabelEmbed"} <= names
    for name in names:
        module, *path = name.split(".")
        functools.reduce(getattr, path, MODULES[module])   # AttributeError if it is not there

def test_every_file_in_the_readme_exists():
    text = source("README.md")
    files = re.findall(r"`(\.?[\w/.]+\.(?:py|png|txt))`", text)
    files += re.findall(r"\]\((\.github/[^)]+)\)", text)
    files += re.findall(r"^\| `(\w+/)` ", text, re.MULTILINE)              # a folder's row
    assert {"vmae.py", "test_all.py", "findings/"} <= set(files)
    for file in files:
        written_by_a_run = file.startswith(("runs/", "samples/", "curves.png"))
        assert written_by_a_run or (HERE / file).exists(), file

def rows_of_tables(text):
    """The rows of all Markdown tables, each as {name of the column: cell}."""
    rows = []
    columns = None                                         # of the table that this line is in
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if not line.startswith("|"):
            columns = None
        elif columns is None:
            columns = cells
        elif set(line) - set("|-: "):                      # not the rule below the head
            rows.append(dict(zip(columns, cells)))
    return rows

def test_every_word_for_tests_in_the_readme_names_a_test():
    tests = [name for name in globals() if name.startswith("test_")]
    text = source("README.md")
    rows = [row for row in rows_of_tables(text) if "tests" in row]
    assert len(rows) > 20
    words = re.findall(r"test_all\.py ([a-z]\w+)", text)
    for row in rows:                                       # each equation, figure, table is tested
        assert "`" in row["in the code"], row
        of_this_row = re.findall(r"`(\w+)`", row["tests"])
        assert of_this_row, row
        words.extend(of_this_row)
    for word in words:
        assert any(word in name for name in tests), word

# ---- Sampling ---------------------------------------------------------------------------------

def drawn(options):
    """The images that sample.py stores, as integers."""
    runs(sample.main, f"--n 5 --steps 4 --npz {options}")
    return np.load("samples/samples.npz")["arr_0"].astype(int)

def test_an_image_depends_on_the_seed_and_its_number_alone():
    both_stages()
    for options in ("", "--sampler ddpm", "--eta 0.5", "--clip 3"):        # also if noise is added
        one = drawn(f"{options} --batch 5")
        two = drawn(f"{options} --batch 2")
        assert abs(one - two).max() <= 1                   # rounding
        assert len(np.unique(one, axis=0)) == 5
        assert abs(drawn(f"{options} --seed 1") - one).max() > 1

def test_every_option_of_a_sampler_reaches_it():
    both_stages()
    runs(train_ldm.main, f"{TINY_LDM} --objective flow --out flow")
    lines = {"--sampler ddpm --steps 3 --clip 2": dict(sampler="ddpm", steps=3, clip=2),
             "--cfg 3 --eta 0.5 --seed 7": dict(sampler="ddim", cfg=3, eta=0.5, seed=7),
             "--ckpt flow --shift 0.3 --interval 0.9": dict(shift=0.3, interval=0.9)}
    for line, how in lines.items():
        with patch(ldm.LDM, "draw", autospec=True, side_effect=ldm.LDM.draw) as draws:
            runs(sample.main, f"--n 2 {line}")
        assert how.items() <= draws.call_args.kwargs.items(), line

def interrupted_after(batches):
    """Patch: sample.py is killed when it has drawn so many batches."""
    limit = iter(range(batches))
    draw = ldm.LDM.draw

    def draw_a_few(*args, **options):
        if next(limit, None) is None:
            sys.exit("killed")
        return draw(*args, **options)

    return patch(ldm.LDM, "draw", draw_a_few)

def test_an_interrupted_command_goes_on_and_another_one_begins_anew():
    both_stages()
    go = "--n 6 --steps 2 --batch 2"
    with interrupted_after(2):
        runs(sample.main, f"{go} --out parts", status=1)
    before = {path: path.stat().st_mtime_ns for path in Path("parts").glob("sample_*.png")}
    assert len(before) == 4
    runs(sample.main, f"{go} --out parts")
    for path, time_of_writing in before.items():
        assert path.stat().st_mtime_ns == time_of_writing  # kept
    runs(sample.main, f"{go} --out whole")
    for i in range(6):
        name = f"sample_{i:06d}.png"
        assert Path("parts", name).read_bytes() == Path("whole", name).read_bytes()
    text = runs(sample.main, f"{go} --out parts --seed 1")
    assert "parts: 6 images of another command are deleted" in text
    assert Path("parts", name).read_bytes() != Path("whole", name).read_bytes()

def test_sample_py_deletes_what_it_drew_itself_alone():
    both_stages()
    runs(sample.main, "--n 5 --steps 1")
    Path("samples/sample_2026.png").write_text("the user's")
    runs(sample.main, "--n 2 --steps 2")
    pictures = {path.name for path in Path("samples").glob("*.png")}
    assert pictures == {"sample_000000.png", "sample_000001.png", "grid.png", "sample_2026.png"}

# Who had drawn 50,000 images over night lost them to a glance at 16.
def test_fewer_images_delete_nothing_and_other_settings_no_more_than_64():
    both_stages()
    runs(sample.main, "--n 65 --steps 1")
    before = {path: path.read_bytes() for path in Path("samples").glob("sample_*.png")}
    assert len(before) == 65
    assert "deleted" not in runs(sample.main, "--n 2 --steps 1")
    text = runs(sample.main, "--n 2 --steps 2", status=1)
    assert text.splitlines()[-1].startswith("error: --out samples: holds 65 images of other set")
    for path, content in before.items():
        assert path.read_bytes() == content

def test_a_damaged_png_is_drawn_again():
    both_stages()
    runs(sample.main, "--n 2 --steps 1")
    whole = Path("samples/sample_000001.png").read_bytes()
    for damage in (b"", whole[:90]):                       # a power cut may leave these
        Path("samples/sample_000001.png").write_bytes(damage)
        runs(sample.main, "--n 2 --steps 1")
        assert Path("samples/sample_000001.png").read_bytes() == whole

def test_the_overview_waits_until_all_processes_have_drawn():
    both_stages()
    spy = mock.Mock(wraps=vmae)
    with (patch(vmae, "wait_for_all", spy.wait_for_all), patch(vmae, "save_grid", spy.save_grid)):
        runs(sample.main, "--n 2 --steps 1")
    assert names_of_calls(spy) == ["wait_for_all", "save_grid"]

def test_sample_py_refuses_what_does_not_fit_its_checkpoint():
    both_stages()
    runs(train_ldm.main, f"{TINY_LDM} --no-classes --objective eps --out flat")
    refuses(sample.main, {
        "--ckpt flat --cfg 2": "unconditional",
        "--ckpt flat --steps 1001": "at most the 1000",
        "--ckpt runs/vmae": "neither a stage-two checkpoint",
        "--sampler euler": "choose from ddim, ddpm",
        "--sampler ddpm --eta 1": "ddpm has no such option",
        "--shift 0.3": "ddim has no such option",
        "--eta 2": "--eta",
        "--cfg nan": "--cfg",
        "--n 0": "--n",
        f"--seed {10**20}": "--seed"})

def test_a_decoder_that_was_tuned_takes_the_place_of_that_in_the_checkpoint():
    both_stages()
    trained("--init runs/vmae --tune decoder", "runs/tuned")
    trained("--seed 1", "runs/other")
    trained("--size 24", "runs/large")
    usual = drawn("")
    assert abs(drawn("--vmae runs/tuned") - usual).max() > 0
    refuses(sample.main, {"--vmae runs/other": "has another encoder",
                          "--vmae runs/large": "its latents have 16 channels on a side of 6"},
            "--out new")
    refuses(train_ldm.main, {"--vmae runs/other": "has another encoder"},
            "--init runs/ldm --out new")

# ---- Nothing that was given is ignored, nothing that was trained is overwritten ---------------

def test_the_same_line_again_overwrites_nothing():
    both_stages()
    before = Path("runs/vmae/last.pt").read_bytes()
    refuses(train_vmae.main, {
        TINY_RUN: "runs/vmae/last.pt holds step 2 of a run; go on with --resume",
        "--data data/left --size 16 --init runs/vmae --out runs/vmae": "holds step 2",
        "--resume --out runs/ldm": "the other stage",
        "--out data --data data": "is the folder of the images"})
    refuses(train_ldm.main, {
        "": "holds step 2",
        "--resume --steps 9 --vmae runs/ldm": "--vmae",
        "--resume --steps 9 --no-classes": "the run in runs/ldm has False"})
    assert Path("runs/vmae/last.pt").read_bytes() == before

def test_options_that_contradict_each_other_are_refused():
    both_stages()
    torch.save({"mean": "abc", "std": "abc"}, "words.pt")
    runs(train_ldm.main, f"{TINY_LDM} --no-classes --schedule linear --out flat")
    refuses(train_vmae.main, {
        "--val data": "leave --val out",                   # beside the built-in faces
        "--init runs/vmae --model base": "--init decides the shape",
        "--init runs/vmae --arch conv": "--init decides the shape",
        "--vgg-weights vgg.pth": "give --lambda-p as well"}, "--size 16 --out new")
    refuses(train_ldm.main, {
        "--init flat --model base": "leave --model out",
        "--init flat --stats words.pt": "words.pt: holds no mean",
        "--init flat --schedule cosine": "--init has linear",
        "--stats words.pt": "belongs to published weights"}, "--no-classes --out new")

def test_options_without_an_effect_are_named():
    both_stages()
    idle = "--kl-mean free --whole 0.2 --lambda-m 1 --no-cache --compile"
    text = runs(train_vmae.main, f"--preset ae {idle} --size 16 --steps 1 --batch 2 --out idle")
    for option in ("kl-mean", "whole", "lambda-m", "no-cache", "compile"):
        assert f"--{option}: has no effect beside the other options" in text
    busy = "--kl-mean free --whole 0.2 --lambda-m 1 --no-cache"
    text = runs(train_vmae.main, f"{TINY_RUN} {busy} --out busy")
    assert "has no effect" not in text
    text = runs(train_ldm.main, f"{TINY_LDM} --no-classes --drop 0.2 --out flat")
    assert "--drop: has no effect" in text

def test_a_run_of_stage_two_goes_on_without_the_file_of_its_stage_one():
    both_stages()
    runs(train_ldm.main, f"{TINY_LDM} --objective eps --schedule linear --no-classes --out flat")
    shutil.rmtree("runs/vmae")
    runs(train_ldm.main, "--out flat --resume --steps 3")
    assert load("flat/last.pt")["schedule"] == dict(kind="linear", objective="eps")
    runs(sample.main, "--ckpt flat --n 2 --steps 2")

# A label is a number in the table of the checkpoint, and only the order of names says which.
def test_labels_keep_their_meaning_when_a_run_goes_on():
    both_stages()
    os.rename("data/right", "data/front")
    refuses(train_ldm.main, {"": "name them as they were"}, "--resume --steps 9")
    os.rename("data/front", "data/right")
    text = runs(train_ldm.main, f"{TINY_LDM} --init runs/ldm --out same")
    assert "starts anew" not in text
    os.rename("data/left", "data/west")
    text = runs(train_ldm.main, f"{TINY_LDM} --init runs/ldm --out other")
    assert "its 2 classes are not the 2 here; the table of labels starts anew" in text

def test_runs_that_do_not_compare_are_refused():
    both_stages()
    trained("--size 24", "runs/large")
    refuses(evaluate.main, {
        "reconstruct --ckpt runs/vmae runs/large": "do not compare",
        "compare runs/vmae runs/large": "do not compare",
        "compare runs/vmae runs/gone": "runs/gone: no such",
        "compare runs/vmae runs/vmae": "needs two runs"})

# ---- Bad input is one line --------------------------------------------------------------------

def test_bad_folders_of_images_are_one_line():
    save_images("pixel", 1, size=1)
    refuses(train_vmae.main, {
        "--data nowhere": "nowhere: no such folder",
        "--data pixel": "1 of 1 files are unreadable, over 1 % of the folder; remove them: 000.png "
                        "(1x1 pixels"}, "--size 16")

def test_options_out_of_range_are_one_line():
    save_images("data", 4)
    refuses(train_vmae.main, {
        "--mask 1.1": "mask: must be at least 0 and at most 1, not 1.1",
        "--mask -1": "--mask",
        "--mask 1.0": "leaves 0 of 16",
        "--mask 0.99": "leaves 0 of 16",
        "--size 18": "multiple of the patch",
        "--steps 0": "--steps: must be at least 1, not 0",
        "--steps two": "'two' is no number",
        "--lr nan": "--lr",
        "--lr inf": "--lr",
        "--whole 7": "--whole",
        "--lambda-m -1": "--lambda-m",
        "--device abacus": "--device abacus: torch cannot use the device abacus (Expected one of",
        "--device meta": "--device meta",
        "--nonsense": "--nonsense"}, "--data data --size 16")
    refuses(evaluate.main, {
        "efficiency --size 60": "--size 60: must be a multiple of 8",
        "smoothness --eps nan": "--eps",
        "faces --sampler x": "--sampler",
        "nonsense": "nonsense",
        "reconstruct --nonsense": "--nonsense"})

def test_files_that_are_not_what_an_option_names_are_one_line():
    save_images("data", 4)
    Path("a.jpg").write_text("not an image")
    torch.save({"weight": torch.zeros(1)}, "other.pth")    # weights, but not VGG's
    refuses(train_vmae.main, {
        "--vgg-weights a.jpg": "a.jpg cannot be read (Weights only load failed)",
        "--vgg-weights other.pth": "other.pth cannot be read (it has no features"},
        "--data data --size 16")
    unfit = {"no.pt": "no.pt: no such", "a.jpg": "a.jpg: not a checkpoint"}
    refuses(train_ldm.main, unfit, "--vmae")
    refuses(evaluate.main, unfit, "reconstruct --ckpt")
    refuses(evaluate.main, {"reconstruct": "runs/vmae/last.pt: no such"})

# ---- On a GPU: skipped elsewhere, by name -----------------------------------------------------

# A few steps of stage one on the images in data/, on the GPU.
GPU_RUN = "--data data --size 32 --batch 8 --lambda-p 0 --save-every 100 --device cuda"
GPU_LDM = "--batch 8 --save-every 100 --device cuda"       # of stage two

def on_cuda(test):
    """A test of this group. Afterwards the card and the compiler are as they were."""
    @functools.wraps(test)
    def run_or_skip():
        if not torch.cuda.is_available():
            raise unittest.SkipTest("there is no CUDA GPU here")
        try:
            test()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.compiler.reset()
            torch.cuda.empty_cache()

    return run_or_skip

def losses_of(run):
    """The losses in the last line of a run's log, by name."""
    line = log_of(run)[-1]
    return {name: line[name] for name in line if re.fullmatch(r"L_[A-Za-z]+", name)}

def alike(a, b, but=()):
    """Fail if a loss of two runs differs by more than 1 %."""
    assert a.keys() == b.keys()
    for name in a.keys() - set(but):
        assert abs(a[name] / b[name] - 1) < 0.01, (name, a, b)

@contextlib.contextmanager
def random_numbers_of_the_cpu():
    """torch.rand, randn and randint draw for a CUDA generator what they would draw on the CPU."""
    twin = torch.Generator()

    def on_the_cpu(function):
        def draw(*shape, generator=None, device="cpu", **options):
            if generator is not None and generator.device.type == "cuda":
                if twin.initial_seed() != generator.initial_seed():        # a new micro-batch
                    twin.manual_seed(generator.initial_seed())
                generator = twin
            return function(*shape, generator=generator, **options).to(device)

        return draw

    with (patch(torch, "rand", on_the_cpu(torch.rand)),
          patch(torch, "randn", on_the_cpu(torch.randn)),
          patch(torch, "randint", on_the_cpu(torch.randint))):
        yield

@contextlib.contextmanager
def nearly_full_card(gigabytes):
    """Leave only so much memory of the GPU."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(free - int(gigabytes * 2**30), dtype=torch.uint8, device="cuda")
    yield
    del taken
    torch.cuda.empty_cache()

@on_cuda
def test_cuda_both_stages_train_in_bfloat16_and_go_on():
    save_images("data", 80)
    for steps in (12, 20):
        runs(train_vmae.main, f"{GPU_RUN} --steps {steps} --resume")
        runs(train_ldm.main, f"{GPU_LDM} --model tiny --steps {steps} --resume")
    for run in ("runs/vmae", "runs/ldm"):
        ckpt = load(f"{run}/last.pt")
        assert ckpt["step"] == 20
        assert ckpt["train_args"]["precision"] == "bfloat16"
        assert logged(run, "step") == [12, 20]

@on_cuda
def test_cuda_ten_steps_of_stage_one_lose_what_they_lose_on_the_cpu():
    save_images("data", 80, 32)
    line = f"{GPU_RUN} --steps 10 --lr 1e-3 --micro 8 --no-compile"
    for preset in ("vmae", "sdvae"):
        with random_numbers_of_the_cpu():
            for device in ("cpu", "cuda"):
                runs(train_vmae.main, f"{line} --preset {preset} --device {device} "
                                      f"--out {preset}_{device}")
    alike(losses_of("vmae_cpu"), losses_of("vmae_cuda"))
    # The adversary begins at step 5; it magnifies what bfloat16 rounds.
    alike(losses_of("sdvae_cpu"), losses_of("sdvae_cuda"), but=("L_G", "L_D"))

@on_cuda
def test_cuda_ten_steps_of_stage_two_lose_what_they_lose_on_the_cpu():
    save_images("data", 80, 32)
    runs(train_vmae.main, f"{GPU_RUN} --steps 2 --device cpu")
    line = f"{GPU_LDM} --model tiny --steps 10 --micro 8 --no-compile"
    with random_numbers_of_the_cpu():
        for device in ("cpu", "cuda"):
            runs(train_ldm.main, f"{line} --device {device} --out {device}")
    alike(losses_of("cpu"), losses_of("cuda"))

@on_cuda
def test_cuda_compiled_and_replayed_steps_learn_the_same():
    save_images("data", 80, 32)
    record = train_vmae.Replay.record
    with patch(train_vmae.Replay, "record", autospec=True, side_effect=record) as records:
        for how in ("--compile", "--no-compile"):
            runs(train_vmae.main, f"{GPU_RUN} --model small --steps 20 --lr 1e-3 --micro 4 {how} "
                                  f"--out vmae{how}")
        assert records.call_count == 2                     # masked and whole images
        records.reset_mock()
        for how in ("--compile", "--no-compile"):
            runs(train_ldm.main, f"{GPU_LDM} --vmae vmae--compile --model tiny --steps 20 {how} "
                                 f"--out ldm{how}")
        assert records.call_count == 1
    for stage in ("vmae", "ldm"):
        alike(losses_of(f"{stage}--compile"), losses_of(f"{stage}--no-compile"))
    compiled = ldm.load_ldm("ldm--compile").model
    eager = ldm.load_ldm("ldm--no-compile").model
    close_weights(compiled, eager, 0.01)                   # 20 steps of up to 3e-3 change .03

@on_cuda
def test_cuda_a_step_that_reads_a_tensor_is_not_replayed():
    save_images("data", 80, 32)
    sound = vmae.loss_R

    def curious(p, x, mask, P):
        loss = sound(p, x, mask, P)
        loss.item()                         # waits for the GPU, which no graph can record
        return loss

    with patch(vmae, "loss_R", curious):
        text = runs(train_vmae.main, f"{GPU_RUN} --steps 8")
    assert "cannot be replayed" in text
    assert log_of("runs/vmae")[-1]["step"] == 8

@on_cuda
def test_cuda_nothing_in_a_step_waits_for_the_gpu():
    save_images("data", 80, 32)
    seed_of = vmae.seed_of
    check_skipped = train_vmae.Run.check_skipped
    steps = []

    def strict(*numbers):                   # each micro-batch begins with (seed, step, number)
        if len(numbers) == 3:
            steps.append(numbers[1])
            if numbers[1] >= 16:            # by then all is compiled and recorded
                torch.cuda.set_sync_debug_mode("error")
        return seed_of(*numbers)

    def relaxed(log, step):                 # here the loop begins to write a line of the log
        torch.cuda.set_sync_debug_mode("default")
        check_skipped(log, step)

    with (patch(vmae, "seed_of", strict),
          patch(train_vmae.Run, "check_skipped", relaxed)):
        for how in ("--no-compile", "--compile"):
            for preset in ("vmae", "sdvae"):
                runs(train_vmae.main, f"{GPU_RUN} --preset {preset} --steps 32 {how} "
                                      f"--out {preset}{how}")
            runs(train_ldm.main, f"{GPU_LDM} --vmae vmae{how} --model tiny --steps 32 {how} "
                                 f"--out ldm{how}")
    assert steps == list(range(32)) * 6

@on_cuda
def test_cuda_samples_are_those_of_the_cpu_but_for_rounding():
    save_images("data", 80)
    runs(train_vmae.main, f"{GPU_RUN} --steps 20")
    runs(train_ldm.main, f"{GPU_LDM} --model tiny --steps 20")
    images = []
    for device in ("cpu", "cuda"):
        runs(sample.main, f"--device {device} --n 8 --steps 10 --npz --out {device}")
        images.append(np.load(f"{device}/samples.npz")["arr_0"].astype(float))
    assert abs(images[0] - images[1]).mean() < 3           # grey levels of 255

@on_cuda
def test_cuda_micro_is_found_on_a_full_card_and_out_of_memory_is_one_line():
    save_images("data", 80)
    line = f"{GPU_RUN} --size 64 --model small --batch 2048 --steps 2 --no-compile"
    with nearly_full_card(2.0):
        runs(train_vmae.main, f"{line} --out found")
        text = runs(train_vmae.main, f"{line} --micro 2048 --out none", status=1)
    micro = load("found/last.pt")["train_args"]["micro"]
    assert micro < 2048 and 2048 % micro == 0              # parts of equal size
    last = text.splitlines()[-1]
    assert "out of memory" in last and "--micro" in last

@on_cuda
def test_cuda_lpips_tuning_and_evaluation_run():
    save_images("data", 80, 64)
    torch.save(random_vgg(), "vgg.pth")
    runs(train_vmae.main, "--data data --size 64 --model small --batch 8 --steps 12 --device cuda "
                          "--vgg-weights vgg.pth --lambda-p 0.5")
    assert math.isfinite(log_of("runs/vmae")[-1]["L_P"])
    runs(train_vmae.main, "--data data --init runs/vmae --tune decoder --batch 8 --steps 4 "
                          "--device cuda --vgg-weights vgg.pth --no-compile")
    runs(train_ldm.main, f"{GPU_LDM} --model tiny --steps 12")
    for command in ("reconstruct --vgg-weights vgg.pth", "smoothness", "separability"):
        measured(command.split()[0], f"{command.partition(' ')[2]} --device cuda --n 16")

# ---- The runner -------------------------------------------------------------------------------

def run():
    """Run the tests whose names hold one of the words given, or all of them -> exit status 1 if
    one fails."""
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    tests = [name for name in globals() if name.startswith("test_")]
    if words:
        sys.exit(run_each(name for name in tests if any(word in name for word in words)))
    cuda = [name for name in tests if name.startswith("test_cuda_")]
    parcels = [[name] for name in tests if name not in cuda]
    parcels.append(cuda)                    # one process takes them all, as there is one GPU
    if "--shared" in sys.argv:              # one of the two processes of share_out
        numbers = numbers_from_pipe()
        sys.exit(run_each(name for number in numbers for name in parcels[number]))
    sys.exit(share_out(len(parcels)))

def share_out(count):
    """Run this many parcels of tests in two processes -> the exit status. With one thread each they
    are faster than one with two. Each reads the number of its next parcel from a pipe: the last
    comes first, because those that take longest stand at the end."""
    reading, writing = os.pipe()
    for number in reversed(range(count)):
        os.write(writing, number.to_bytes(2, "big"))
    os.close(writing)
    command = [sys.executable, __file__, "--shared", *sys.argv[1:]]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = []
    for _ in range(2):
        processes.append(subprocess.Popen(command, env=one_thread, stdin=reading))
    return max(abs(process.wait()) for process in processes)

def numbers_from_pipe():
    """Yield the numbers of the parcels that this process takes, until none is left."""
    while True:
        number = os.read(0, 2)
        if not number:
            return
        yield int.from_bytes(number, "big")

def run_each(names):
    """Run tests, print how each of them ends, and what it printed if it did not pass -> the exit
    status."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for name in names:
        start = time.perf_counter()
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            outcome = outcome_of(globals()[name])
        counts[outcome] += 1
        if outcome != "passed":
            print(text.getvalue())
        print(f"{outcome:8}{time.perf_counter() - start:6.1f} s  {name[5:]}", flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return int(counts["failed"] > 0 or counts["passed"] == 0)

def outcome_of(test):
    """Run one test -> "passed", "failed" or "skipped". Ctrl-C ends them all."""
    try:
        setup_function()
        test()
    except unittest.SkipTest as reason:
        print(reason)
        return "skipped"
    except (Exception, SystemExit):
        traceback.print_exc()
        return "failed"
    return "passed"

if __name__ == "__main__":
    run()

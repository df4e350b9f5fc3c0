"""The executable specification: closed forms, optimal denoisers, other people's numbers, real runs.

    python test_all.py              all of it, CPU only, no network, under two minutes on two cores
    python test_all.py mask cache   the tests with these words in their names
    python test_all.py --long       50 kills instead of 6, 1,000 hostile images instead of 100
    pytest test_all.py              the same functions

Tests against ../shared/vectors (outputs of the authors' code and of scikit-image) skip without it.
A comment behind an expected value says where it comes from.
"""
import argparse
import contextlib
import functools
import inspect
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import unittest
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import vmae                                 # before torch, see there
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

import evaluate
import ldm
import sample
import train_ldm
import train_vmae
from vmae import VMAE, Faces, Gaussian, ImageFolder, InputError

HERE = Path(__file__).absolute().parent
VECTORS = HERE.parent / "shared" / "vectors"
TINY_VMAE = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, latent_dim=4)
TINY_RUN = ("--data data --size 16 --steps 2 --batch 4 --lambda-p 0 "
            "--precision float32")  # the last one given wins
FOLDER = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)           # goes when Python ends
REAL, small = ldm.sizes["tiny"], dict(patch_size=1, hidden_size=32, depth=2, num_heads=4)
ldm.sizes["tiny"] = small                                  # a tenth of the time
LONG = "--long" in sys.argv                                # 50 kills, 1,000 hostile images
patch, load = mock.patch.object, functools.partial(torch.load, weights_only=True)

def setup_function():
    """Before each test, here and in pytest, which knows this name: seed 0, and an empty folder."""
    torch.manual_seed(0)
    os.chdir(HERE)
    shutil.rmtree(FOLDER.name)
    os.mkdir(FOLDER.name)
    os.chdir(FOLDER.name)                                  # so that files need only their names

def vector(name):
    """A recorded output of the original code, or a skip."""
    if not (path := VECTORS / name).exists():
        raise unittest.SkipTest(f"{path} is not here")
    return np.load(path) if name.endswith(".npz") else load(path)

def close(a, b, tolerance):
    """Fail with the largest difference rather than with two tensors."""
    a, b = (torch.as_tensor(v, dtype=torch.float64).detach() for v in (a, b))
    difference = (a - b).abs().max().item()
    assert difference <= tolerance, f"differs by {difference:.3g}, more than {tolerance:.3g}"

def raises(kind, function, *args, **kwargs):
    """The message of the expected exception."""
    with unittest.TestCase().assertRaises(kind) as caught:
        function(*args, **kwargs)
    return str(caught.exception)

def random_images(B=2, size=16, seed=0):
    """(B, 3, size, size) in [-1, 1], the same every time."""
    return torch.rand(B, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1

def save_images(folder, count, size=20, seed=0):
    """Photographs of noise, different from each other -> their pixels, uint8 (count, H, W, 3)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(Path(folder, f"{i:03d}.png"))
    return pixels

def runs(main, line="", status=0):
    """Run a script's main in this process, with these options, to this status -> what it said."""
    said, got = io.StringIO(), 0
    with (patch(sys, "argv", ["script.py", *line.split()]), warnings.catch_warnings(),
          contextlib.redirect_stdout(said), contextlib.redirect_stderr(said)):
        warnings.simplefilter("always", UserWarning)       # not only the first time
        try:
            vmae.cli(main)
        except SystemExit as stop:
            message = stop.code if isinstance(stop.code, str) else ""
            print(message)
            got = 1 if message else stop.code or 0         # as in a shell
    assert got == status, said.getvalue()
    return said.getvalue()

def refuses(main, table, start=""):
    """Run commands with the options in `table`, each of which has to stop with one line that holds
    the words beside it, and to write nothing."""
    before = set(Path().rglob("*"))
    for options, words in table.items():
        text = runs(main, f"{start} {options}", status=1)
        news = r"\s*$|skipped|.*(tensors read|%\|)"        # the last are bars of progress
        lines = [line for line in text.splitlines() if not re.match(news, line)]
        assert len(lines) == 1 and words in lines[0], text
        assert set(Path().rglob("*")) == before

def trained(options="", out="runs/vmae"):
    """Two steps of stage one on the images in data/ -> the autoencoder that they leave in `out`."""
    shutil.rmtree(out, ignore_errors=True)                 # a run is never overwritten
    runs(train_vmae.main, f"{TINY_RUN} --out {out} {options}")
    return vmae.load_vmae(f"{out}/last.pt")

def all_differ(a, b):
    """Whether two models share no weight matrix: what was changed reached all of their layers."""
    return not any(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True)
                   if p.ndim > 1)

def both_stages():
    """data/ with two classes, and two steps of each stage on it, in runs/vmae and runs/ldm."""
    save_images("data/left", 12), save_images("data/right", 12, seed=1)
    trained()
    runs(train_ldm.main, "--steps 2 --batch 8")

def log_of(run):
    """The lines of a run's log.jsonl."""
    return [json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()]

def measured(name, options="", *words):
    """Run a sub-command of evaluate.py -> the rows of its table, which are also its JSON's."""
    text = runs(evaluate.main, f"{name} {options} --out out")
    assert all(word in text for word in ("|---|", *words)), text
    return json.loads(Path("out", f"{name}.json").read_text())["rows"]


# ---- What a reader relies on ------------------------------------------------------------------

def test_the_method_comes_first():
    def ends(thing):
        lines, first = inspect.getsourcelines(thing)
        return first + len(lines) - 1
    assert inspect.getsourcelines(vmae.random_mask)[1] <= 100 and ends(vmae.loss_VMAE) <= 200
    assert ends(VMAE) <= 400                               # then what surrounds the method
    order = (vmae.patchify, vmae.random_mask, Gaussian, vmae.loss_R, vmae.loss_M, vmae.loss_P,
             vmae.loss_VMAE, VMAE, InputError, vmae.load_vmae, ImageFolder, Faces, vmae.load_lpips,
             vmae.cli, vmae.ConvAutoencoder, vmae.discriminator)
    assert sorted(order, key=ends) == list(order)

def test_waiting_threads_spin_little_unless_the_user_decides():
    head = (HERE / "vmae.py").read_text().split("\nimport numpy")[0]
    cases = ({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)
    for given, spin in cases:
        with mock.patch.dict(os.environ, given, clear=True):
            exec(head, {})
            assert os.environ.get("GOMP_SPINCOUNT") == spin
    for name in ("train_vmae", "train_ldm", "sample", "evaluate"):         # before torch reads it
        assert re.search(r"^import (\w+) .*before|^import torch", (HERE / f"{name}.py").read_text(),
                         re.MULTILINE)[1] == "vmae"

def test_readme_names_what_exists():
    text, modules = (HERE / "README.md").read_text(), dict(
        vmae=vmae, ldm=ldm, train_vmae=train_vmae, train_ldm=train_ldm, evaluate=evaluate)
    names = set(re.findall(r"`((?:vmae|ldm|train_vmae|train_ldm|evaluate)(?:\.\w+)+)", text))
    names = {name for name in names if not name.endswith(".py")}
    assert len(names) > 30 and {"vmae.loss_VMAE", "ldm.LabelEmbed"} <= names
    for name in names:
        first, *path = name.split(".")
        functools.reduce(getattr, path, modules[first])    # AttributeError if it is not there
    options = "".join((HERE / f"{name}.py").read_text() for name in (*modules, "sample"))
    for option in set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", text)) - {
            "help", "nproc-per-node", "nnodes", "rdzv-backend", "rdzv-endpoint"}:  # torchrun's
        assert f'"--{option}"' in options or f'"{option}":' in options or \
            option in sample.SAMPLER_OPTIONS or option in evaluate.HELP, option
    for file in re.findall(r"`(\.?[\w/.]+\.(?:py|png|txt))`|\]\((\.github/[^)]+)\)", text):
        file = "".join(file)                               # but for what a run writes
        assert (HERE / file).exists() or file.startswith(("runs/", "samples/")), file
    table = text.split("## From the paper to the code")[1].split("\n## ")[0]
    rows = [row.split("|") for row in table.splitlines() if row.startswith("|")][2:]
    tests = [name for name in globals() if name.startswith("test_")]
    assert len(rows) > 25
    for _, _, code, words, _, _ in rows:    # the tests that pin an equation, a figure, a table
        assert "`" in code and re.findall(r"`(\w+)`", words), code
        for word in re.findall(r"`(\w+)`", words):
            assert any(word in name for name in tests), word


# ---- Patches, masks, posterior, losses --------------------------------------------------------

def test_patchify_round_trip_is_exact():
    x = torch.randn(2, 3, 24, 16)
    patches = vmae.patchify(x, 4)
    assert patches.shape == (2, 24, 48)                    # 6 x 4 patches of 4 x 4 x 3
    assert torch.equal(vmae.unpatchify(patches, 4, 24, 16), x)
    assert torch.equal(patches[0, 5].view(4, 4, 3).permute(2, 0, 1), x[0, :, 4:8, 4:8])
    raises(ValueError, vmae.patchify, x, 5)                # divides neither 24 nor 16

def test_random_mask_shows_exactly_the_floor_and_repeats_by_generator():
    for h, w in ((2, 5), (4, 4), (8, 8), (32, 32)):
        N = h * w
        for percent in (0, 10, 25, 30, 60, 75, 90):
            keep, mask = vmae.random_mask(3, h, w, percent / 100)
            V = N * (100 - percent) // 100                 # whole numbers: .1 has no rounding
            assert keep.shape == (3, V) and mask.sum(1).tolist() == [N - V] * 3
            assert mask.gather(1, keep).sum() == 0         # 1 = masked
    for ratio in (1.0, -0.1, 0.99):
        raises(ValueError, vmae.random_mask, 1, 4, 4, ratio)   # each leaves none, or more than all
    a, b = (vmae.random_mask(64, 8, 8, 0.6, torch.Generator().manual_seed(1))[0] for _ in range(2))
    assert torch.equal(a, b) and len(a.unique(dim=0)) == 64                # no two samples alike
    share = a.flatten().bincount(minlength=64) / 64
    assert share.min() > 0.1 and share.max() < 0.7         # no patch is favoured; expected .39

def test_masked_patches_cost_no_work_and_cannot_influence_the_latents():
    model, x, seen = VMAE(**TINY_VMAE), random_images().requires_grad_(), []
    for module in [model.patch_embed, *model.blocks, model.norm, model.to_latent]:
        module.register_forward_hook(lambda m, inputs, output: seen.append(output.shape[1]))
    _, q, mask = model(x, 0.6)
    assert seen == [6] * 5                                 # floor(16 * .4), in all that multiplies
    (q.mu.square().sum() + q.logvar.square().sum()).backward()
    grad = vmae.patchify(x.grad, 4).abs().amax(-1)         # (B, N)
    assert grad[mask == 1].max() == 0 and grad[mask == 0].min() > 0

def test_attention_is_fused():
    with torch.profiler.profile() as log, torch.no_grad():
        VMAE(**TINY_VMAE).blocks[0].attn(torch.randn(1, 1024, 32))
    names = {event.key for event in log.key_averages()}
    assert any("flash" in name for name in names) and "aten::softmax" not in names

def test_gaussian_has_the_kl_of_torch_and_samples_with_its_moments():
    mu, logvar = torch.randn(3, 4, 5), torch.randn(3, 4, 5)                # 4 channels of 5 tokens
    q = torch.distributions.Normal(mu, (logvar / 2).exp())
    for mean, target in (("zero", 0 * mu), ("free", mu)):
        prior = torch.distributions.Normal(target, 1.0)
        expected = torch.distributions.kl_divergence(q, prior).sum(1).mean()  # sum over channels
        close(Gaussian(mu, logvar).kl(mean), expected, 1e-5)
    q = Gaussian(torch.full((100000,), 3.0), torch.full((100000,), math.log(4.0)))
    z = q.sample(torch.Generator().manual_seed(0))
    close(z.mean(), 3, 0.02), close(z.std(), 2, 0.02)      # sqrt(4)
    assert torch.equal(z, q.sample(torch.Generator().manual_seed(0)))
    assert torch.equal(q.mode(), q.mu)
    assert Gaussian(torch.zeros(1), torch.tensor([1e9])).sample().isfinite()  # clamped

def test_nll_is_a_gaussians_over_the_patches_that_count_and_can_learn_sigma():
    x, x_hat = random_images(), random_images(seed=1)
    _, mask = vmae.random_mask(2, 4, 4, 0.6)
    for logvar in (0.0, -2.0):                             # sigma fixed at 1, and another
        p = Gaussian(x_hat, torch.tensor(logvar))
        expected = torch.distributions.Normal(vmae.patchify(x_hat, 4), math.exp(logvar / 2))
        nll = -expected.log_prob(vmae.patchify(x, 4))      # (B, N, P*P*C)
        close(vmae.loss_R(p, x, mask, 4), nll[mask == 0].mean(), 1e-6)
        close(vmae.loss_M(p, x, mask, 4), nll[mask == 1].mean(), 1e-6)
    assert vmae.loss_M(p, x, 0 * mask, 4) == 0             # not 0 / 0
    model = VMAE(**TINY_VMAE)
    assert "logvar_x" not in model.state_dict()            # published weights have none
    model.logvar_x = torch.nn.Parameter(torch.zeros(()))   # all that a learned sigma needs
    assert "logvar_x" in model.state_dict()
    p, q, mask = model(x, 0.6)
    vmae.loss_VMAE(x, p, q, mask, 4)[0].backward()
    error = vmae.patchify((x - p.mode()) ** 2, 4).mean(-1)                 # (B, N)
    visible, masked = ((error * m).sum() / m.sum() for m in (1 - mask, mask))
    close(model.logvar_x.grad, 0.5 * (1 - visible) + 0.05 * (1 - masked), 1e-5)  # d NLL / d logvar

@patch(vmae, "loss_P", lambda net, x, x_hat: (x - x_hat).abs().mean())
def test_loss_VMAE_is_the_weighted_sum_of_section_4_4():
    x, model = random_images(), VMAE(**TINY_VMAE)
    p, q, mask = model(x, 0.6)
    alone = {"L_R": vmae.loss_R(p, x, mask, 4), "L_M": vmae.loss_M(p, x, mask, 4),
             "L_P": (x - p.mode()).abs().mean(), "L_reg": q.kl("zero")}
    total, terms = vmae.loss_VMAE(x, p, q, mask, 4, lambda_M=2.0, lambda_P=3.0, lambda_reg=5.0,
                                  kl_mean="zero")
    assert list(terms) == list(alone)                      # before weighting, by the paper's names
    close(torch.stack([*terms.values()]), torch.stack([*alone.values()]), 1e-6)
    close(total, alone["L_R"] + 2 * alone["L_M"] + 3 * alone["L_P"] + 5 * alone["L_reg"], 1e-4)
    total, terms = vmae.loss_VMAE(x, p, q, mask, 4, lambda_M=0.0, lambda_reg=0.0)
    assert total == terms["L_R"] and len(terms) == 1       # what has no weight is not computed

def test_lpips_is_frozen_and_reads_vgg_from_a_file():
    widths, weights = [3, 64, 64, 128, 128, *[256] * 3, *[512] * 6], {}
    layers = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]  # numbers of VGG-16's convolutions
    for i, c_in, c_out in zip(layers, widths, widths[1:]):
        std = math.sqrt(2 / (9 * c_in))                    # He 2015: no layer fades out
        weights[f"features.{i}.weight"] = std * torch.randn(c_out, c_in, 3, 3)
        weights[f"features.{i}.bias"] = torch.zeros(c_out)
    torch.save(weights, "vgg.pth")
    net, x = vmae.load_lpips("vgg.pth"), random_images(2, 32).requires_grad_()
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert torch.equal(net.net.slice5[-2].weight, weights["features.28.weight"])
    assert vmae.loss_P(net, x, x) == 0
    close(vmae.loss_P(net, x, -x), net(x, -x).mean(), 1e-6)                # the lpips package's
    with torch.autocast("cpu", torch.bfloat16):            # features in bfloat16, distance not
        low = vmae.loss_P(net, x, -x)
    assert low.dtype == torch.float32 and 0 < (low / net(x, -x).mean() - 1).abs() < 0.02
    vmae.loss_P(net, random_images(2, 32, 1), x).backward()
    assert x.grad.abs().max() > 0                          # frozen, but not cut off
    message = raises(InputError, vmae.load_lpips, "/nowhere/vgg.pth")
    assert "/nowhere/vgg.pth" in message and vmae.VGG_URL in message and "--vgg-weights" in message
    save_images("data", 8)
    one, two = (trained(f"--vgg-weights vgg.pth --lambda-p {n}", f"{n}") for n in (1, 2))
    assert all_differ(one, two) and "L_P" in log_of("1")[-1]
    runs(train_vmae.main, "--init 1/last.pt --tune decoder --vgg-weights vgg.pth --data data "
         "--steps 1 --batch 2")
    tuned = load("runs/tuned/last.pt")["train_args"]
    assert (tuned["lambda_p"], tuned["mask"]) == (10, 0)   # the authors' stage 3


# ---- VMAE, and the convolutional body beside it -----------------------------------------------

def test_vmae_equals_the_authors_and_loads_with_a_report():
    v = vector("vmae_official.pt")
    x, mask = v["x"], v["mask"]
    close(VMAE(**v["model_args"]).pos_embed, v["state_dict"]["pos_embed"], 1e-6)
    weights = {f"module.{k}": w for k, w in v["state_dict"].items()}
    weights["module.perceptual.scale"] = torch.zeros(1)
    torch.save({"model": weights, "epoch": 3, "args": argparse.Namespace(lr=1)}, "vmae.pth")
    model = vmae.load_vmae("vmae.pth", v["model_args"]["num_heads"])
    q = model.encode(x)
    close(torch.cat([q.mu, q.logvar], 1), v["moments"], 1e-4)
    close(model.decode(q.mode()), v["recon"], 1e-4)
    keep = mask.argsort(dim=1, stable=True)[:, :int((1 - mask[0]).sum())]  # the visible
    x_hat = model.decode_tokens(model.encode_tokens(x, keep).mode(), keep)
    close(x_hat, v["pred_img"], 1e-4)
    constant = 0.5 * math.log(2 * math.pi)                 # our NLL is half their squared error
    p = Gaussian(x_hat, model.logvar_x)
    close(2 * (vmae.loss_R(p, x, mask, 8) - constant), v["vis_mse"], 1e-4)
    close(2 * (vmae.loss_M(p, x, mask, 8) - constant), v["masked_mse"], 1e-4)
    del weights["module.mask_token"]                       # training alone needs it
    torch.save({"model": weights}, "vmae.pth")
    text = runs(train_vmae.main, "--init vmae.pth --steps 1 --lambda-p 0 --batch 2 --out run")
    assert "missing: mask_token; left over: perceptual.scale" in text
    assert load("run/last.pt")["model_args"]["depth"] == 2
    del weights["module.norm.weight"]
    half, zero = {"model_args": {}}, torch.zeros(1)        # half of one of our checkpoints
    for content, words in (({"model": weights}, "norm.weight"), ({"weight": zero}, "patch_embed"),
                           (half, "patch_embed"), (zero, "not a checkpoint")):
        torch.save(content, "bad.pth")
        assert words in raises(InputError, vmae.load_vmae, "bad.pth")

def test_conv_autoencoder_equals_diffusers():
    v = vector("sd3vae_diffusers.pt")
    torch.save(v["state_dict"], "vae.bin")
    model = vmae.load_vmae("vae.bin")
    assert isinstance(model, vmae.ConvAutoencoder) and model.latent_dim == 16
    q = model.encode(v["x"])
    close(torch.cat([q.mu, q.logvar], 1), v["moments"], 1e-4)
    close(model.decode(q.mode()), v["recon"], 1e-4)
    header, data = {"__metadata__": {"format": "pt"}}, b""  # as SD3 and FLUX.1 are published
    for name, value in v["state_dict"].items():
        half = value.to(torch.float32 if "weight" in name else torch.bfloat16)
        header[name] = dict(dtype="F32" if "weight" in name else "BF16", shape=list(half.shape),
                            data_offsets=[len(data), len(data) + half.nbytes])
        data += half.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    text = json.dumps(header).encode()
    Path("vae.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    other = vmae.load_vmae("vae.safetensors")
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(q, p if "weight" in name else p.bfloat16().float())
    Path("cut.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[:-9])
    assert "damaged" in raises(InputError, vmae.load_vmae, "cut.safetensors")

def test_norms_of_the_convolutions_are_in_float32_beside_bfloat16():
    norm, x = vmae.GroupNorm(4), 100 + torch.randn(2, 4, 8, 8)     # 100: bfloat16 has 3 digits
    with torch.autocast("cpu", torch.bfloat16):
        close(norm(x), F.group_norm(x, 4, eps=1e-6), 1e-4)
        assert vmae.conv3(4, 4)(x).dtype == torch.bfloat16 and norm(x.bfloat16()).dtype == x.dtype
    assert all(isinstance(m, vmae.GroupNorm) for m in vmae.ConvAutoencoder(
        32, **vmae.conv_sizes["tiny"]).modules() if isinstance(m, torch.nn.GroupNorm))

def test_both_bodies_encode_and_decode_the_whole_grid_and_come_in_the_same_sizes():
    x = random_images()
    for model in (VMAE(**TINY_VMAE), vmae.ConvAutoencoder(16, (8, 8, 16), 4)):  # both f4d4
        q = model.encode(x)
        assert q.mu.shape == q.logvar.shape == (2, 4, 4, 4)
        assert (model.patch_size, model.grid, model.latent_dim) == (4, 4, 4)
        p, q_v, mask = model(x, 0.0)                       # mask 0 is the use-time path
        assert p.mu.shape == model.decode(q.mode()).shape == x.shape and mask.sum() == 0
        last = list(model.named_parameters())[-2][1]       # before its bias, in both
        assert model.last_layer is last and model.last_layer.shape[0] == 3     # makes the colours
        close(q_v.mu.view(2, 4, 4, 4), q.mu, 1e-6)
        draws = [model(x, 0.0, torch.Generator().manual_seed(i))[0].mode() for i in (0, 1, 1)]
        assert torch.equal(draws[1], draws[2]) and not torch.equal(draws[0], draws[1])  # z ~ q
    raises(ValueError, VMAE(**TINY_VMAE).encode, random_images(1, 32))     # made for 16
    raises(ValueError, VMAE, 30, 4)                        # 30 pixels hold no whole patches
    raises(ValueError, vmae.ConvAutoencoder, 30)
    for name, vit in vmae.sizes.items():                   # test_efficiency has base's numbers
        channels, latent_dim = (vmae.conv_sizes[name][key] for key in ("channels", "latent_dim"))
        assert (2 ** (len(channels) - 1), latent_dim) == (vit["patch_size"], vit["latent_dim"])
    args = SimpleNamespace(arch="conv", model="base", size=256, mask=0, data=None, batch=None,
                           steps=None, lr=None, adv_start=None)
    train_vmae.fill_in(args, False, None)                  # not on CUDA
    assert args.batch < train_vmae.RECIPES["base"]["batch"]                # 22 times the work

def test_resized_positions_are_those_the_authors_interpolate():
    table = vmae.sincos_positions(192, 16)
    bilinear = F.interpolate(table.view(1, 16, 16, 192).permute(0, 3, 1, 2), size=(32, 32),
                             mode="bilinear").flatten(2).transpose(1, 2)   # (1, 1024, 192)
    finer = vmae.sincos_positions(192, 32, 16)
    close(finer[..., 12:48], bilinear[..., 12:48], 0.03)   # slow waves
    assert (finer - bilinear).square().mean().sqrt() < 0.03
    assert (vmae.sincos_positions(192, 32) - bilinear).square().mean().sqrt() > 0.3  # not resized
    close(vmae.sincos_positions(192, 16, 16), table, 0)


# ---- Images -----------------------------------------------------------------------------------

def test_faces_repeat_whatever_the_batch_and_have_all_levels():
    faces = Faces(32)
    x, kind, pattern, part = three = faces.render([5, 900, 17])
    assert x.shape == (3, 3, 32, 32) and part.shape == (3, 32, 32)
    assert x.min() >= -1 and x.max() <= 1 and x.std() > 0.2
    for one, of_three in zip(faces.render([900]), three, strict=True):
        close(one[0], of_three[1], 1e-6)
    image, label = faces[17]
    close(image, x[2], 0.5 / 127.5 + 1e-6), close(label, kind[2], 0)       # rounded to 8 bits
    assert not torch.equal(Faces(32, seed=1).render([5])[0][0], x[0])
    drawn = vmae.to_uint8(x)
    with patch(faces, "render", wraps=faces.render) as render:             # each is rendered once
        close(faces.batch([5, 17, 5])[0], drawn[[0, 2, 0]], 0), close(faces[900][1], kind[1], 0)
        close(faces.batch(torch.tensor([900, 5]))[0], drawn[[1, 0]], 0)
        assert [call.args[0] for call in render.mock_calls] == [[5, 5], [900]]     # 17: above
        with patch(faces, "kept", dict.fromkeys(range(10**5))):            # of 32 px, too many
            close(faces.batch([17])[0], drawn[[2]], 0)
    x, kind, pattern, part = faces.render(range(64))
    close(x.mean(), 0.26472, 1e-4), close(x.std(), 0.42470, 1e-4)  # the faces of README's numbers
    assert kind.unique().tolist() == [0, 1, 2, 3] and pattern.unique().tolist() == [0, 1, 2]
    assert all(face.unique().tolist() == [0, 1, 2, 3, 4] for face in part)  # has every part
    train, val = Faces(8, "train"), Faces(8, "val")        # which share no face
    assert train.first + len(train) <= val.first and len(val) >= 256
    assert not torch.equal(val.render([0])[0], train.render([0])[0])
    with patch(val, "count", 3):
        assert len(list(val)) == 3                         # a loop ends, and meets no other face

def test_folder_reads_every_mode_crops_the_centre_and_turns_by_exif():
    for mode in ("1", "L", "P", "CMYK"):
        Image.new("RGB", (40, 30), (255, 0, 0)).convert(mode).save(f"{mode}.TIFF")
    Image.new("RGBA", (40, 30), (255, 0, 0, 0)).save("RGBA.PNG")
    Image.new("LA", (40, 30), (0, 0)).save("LA.png")
    Image.fromarray(np.full((30, 40), 32896, np.uint16)).save("I16.png")
    wide, phone, exif = np.zeros((20, 60), np.uint8), np.zeros((32, 32), np.uint8), Image.Exif()
    wide[:, 20:40] = 255                                   # white in the middle third
    Image.fromarray(wide).save("wide.png")
    phone[:, :16] = 255                                    # left half white: upright, the top
    exif[0x0112] = 6                                       # turn by 90 degrees to view
    Image.fromarray(phone).save("phone.jpg", exif=exif, quality=95)
    data = ImageFolder(".", 20)
    x = {Path(path).stem: data[i][0] for i, path in enumerate(data.paths)}
    assert len(x) == 9 and all(v.shape == (3, 20, 20) for v in x.values())
    close(x["RGBA"], 1, 0), close(x["LA"], 1, 0)           # transparent is white
    close(x["I16"], 32896 / 65535 * 2 - 1, 0.005)          # half of 16 bits is half
    for mode in ("P", "CMYK"):
        close(x[mode].mean((1, 2)), [1, -1, -1], 0.05)     # red
    close(x["wide"], 1, 0.01)
    assert x["phone"][:, :8].mean() > 0.9 and x["phone"][:, 12:].mean() < -0.9

def test_folder_classes_hidden_files_and_hold_out():
    for name in ("dog/deep", ".hidden", "Cat/deep"):
        pixels = save_images(name, 40)
    Path("dog", "._000.png").write_bytes(b"Apple")
    Path("dog", "notes.txt").write_text("no image")
    os.symlink("..", "dog/loop")                           # each file once, whatever links to it
    whole, train, val = (ImageFolder(".", 20, split) for split in ("all", "train", "val"))
    assert whole.classes == ["Cat", "dog"] and len(whole) == 80
    assert [whole[i][1] for i in (0, 79)] == [0, 1]
    close(vmae.to_uint8(whole[7][0]), pixels[7].transpose(2, 0, 1), 0)     # there and back is exact
    assert vmae.to_uint8(torch.tensor([-9, -1, 0.1, 0.999, 9])).tolist() == [0, 0, 140, 255, 255]
    assert sorted(train.paths + val.paths) == whole.paths and 1 <= len(val) <= 10
    save_images("Bat", 7, seed=1)                          # adding files moves none across
    assert set(val.paths) <= set((new := ImageFolder(".", 20, "val")).paths)
    os.utime(new.paths[0], (1, 1))
    assert ImageFolder(".", 20, "val").fingerprint() != new.fingerprint()
    Image.new("RGB", (20, 20)).save("beside.png")
    assert ImageFolder(".", 20).classes == []

def test_caches_belong_to_one_folder_with_its_labels_and_size():
    save_images("data/a", 30), save_images("data/b", 30), save_images("other/a", 30, seed=1)
    shutil.copytree("data/b", "other/b")
    for path in Path().rglob("*.png"):
        path.write_bytes(path.read_bytes().ljust(2000, b"\0"))
        os.utime(path, (1, 1))                             # of equal names, sizes and times
    def prints(root="data", size=16):
        return ImageFolder(root, size, "train").fingerprint()
    assert len({prints(), prints("other"), prints(size=20), prints()}) == 3
    os.mkdir("run")
    seen = [vmae.open_images(root, 16, run="run")[0] for root in ("data", "other", "data")]
    for data in seen:
        rows, plain = data.keep_pixels("run"), ImageFolder(data.folder.root, 16, "train")
        assert torch.equal(rows.batch([0, 9])[0], plain.batch([0, 9])[0])
    labels = prints()
    beside = next(f"{i}.png" for i in range(99) if zlib.crc32(f"{i}.png".encode()) % 20 == 0)
    shutil.copy("data/a/000.png", f"data/{beside}")        # held out, but there are no classes now
    assert prints() != labels

def test_nobody_else_s_file_is_deleted():
    save_images("data", 30)
    os.mkdir("run")
    theirs = ["images_000.png", "images_backup.zip", f"images_{'a' * 16}.pt", "moments_0.pt"]
    for name in theirs:
        Path("run", name).touch()
    Path("run", f"images_{'a' * 16}_0.pt").touch()         # ours, of other data
    vmae.open_images("data", 16, run="run")[0].keep_pixels("run")
    names = os.listdir("run")
    assert set(theirs) < set(names) and len(names) == len(theirs) + 3
    assert "of the images" in raises(InputError, vmae.open_images, "data", 16, None, "data")
    os.rename("run", "data/run")
    for pair in (("data", "data/run"), ("data/run", "data"), ("data", "data")):
        assert "trained on" in raises(InputError, vmae.open_images, pair[0], 16, pair[1])

def test_folder_skips_a_few_broken_files_and_stops_at_many():
    save_images("data", 200)
    cut = Path("data/100.png")
    cut.write_bytes(cut.read_bytes()[:600])                # sound header, no end
    Path("data/text.jpg").write_text("not an image")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = ImageFolder("data", 16)
        assert len(data) == 200 and any("text.jpg" in str(w.message) for w in caught)
        x, _ = data[data.paths.index("100.png")]
        close(x, data[data.paths.index("101.png")][0], 0)  # its neighbour stands in
        assert any("100.png" in str(w.message) for w in caught)
        Path("data/more.jpg").write_text("")
        Image.new("RGB", (1, 1)).save("data/pixel.png")
        assert "over 1 %" in raises(InputError, ImageFolder, "data", 16)   # 3 of 203
    save_images("bomb", 1)                                 # 400 pixels
    with patch(Image, "MAX_IMAGE_PIXELS", 300):
        assert "over 1 %" in raises(InputError, ImageFolder, "bomb", 16)

def test_the_limit_of_broken_files_holds_over_restarts_and_mended_files_count_again():
    save_images("data", 200)
    os.mkdir("run")
    whole = {name: Path("data", name).read_bytes() for name in ("050.png", "120.png", "199.png")}

    def start():
        """-> the names listed after all images were read."""
        data = ImageFolder("data", 16, folder=vmae.Folder("data", "run"))
        data.folder.keep("run")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x, _ = data.batch(range(200))
        assert torch.equal(x[199], x[0]) == ("199.png" in broken)      # the first follows the last
        return set(map(json.loads, Path("run/unreadable.jsonl").read_text().splitlines()))
    broken = ["050.png", "199.png"]                        # exactly 1 %: no reason to stop
    for name in broken:
        Path("data", name).write_bytes(whole[name][:600])
    assert start() == start() == set(broken)
    Path("data/120.png").write_bytes(whole["120.png"][:600])
    for _ in range(3):                                     # every start stops
        assert "over 1 %" in raises(InputError, start)
    for name in ("050.png", "120.png"):
        Path("data", name).write_bytes(whole[name])
    broken = ["199.png"]
    assert start() == set(broken)
    Path("data/199.png").write_bytes(whole["199.png"])
    broken = []
    assert start() == set()

def test_damaged_exif_stops_nothing_and_a_draft_is_close():
    exif, rng = Image.Exif(), np.random.default_rng(0)
    exif[0x0112], exif[0x010F], exif[0x8769] = 3, "maker", {0x9003: "2026:11:24", 0x829A: 0.01}
    Image.fromarray(save_images("data", 1, 16)[0]).save("a.jpg", exif=exif)
    whole = Path("a.jpg").read_bytes()
    start, end = whole.index(b"Exif") + 4, whole.index(b"Exif") + len(exif.tobytes())
    for _ in range(4000):                                  # none of these raises
        data = bytearray(whole)
        for at in rng.integers(start, end, rng.integers(1, 6)):
            data[at] = rng.integers(256)
        Path("a.jpg").write_bytes(data)
        assert vmae.read_image("a.jpg", 16).shape == (3, 16, 16)
    smooth = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize((256, 256), 3)
    smooth.save("b.jpg", quality=95)
    a, b = (vmae.read_image("b.jpg", 32, draft=draft)[None] for draft in (False, True))
    assert 40 < vmae.psnr(a, b) < math.inf                 # another way to shrink, hardly seen

def test_folder_is_decoded_once_and_its_headers_are_read_once():
    save_images("data", 30)
    with patch(vmae.Image, "open", side_effect=Image.open) as opened:
        train, val = vmae.open_images("data", 16, run="run")
        os.mkdir("run")
        assert opened.call_count == 30                     # once for both
        train.keep_pixels("run")
        opened.reset_mock()
        again, _ = vmae.open_images("data", 16, run="run")
        rows = again.keep_pixels("run")
        x, y = rows.batch(range(len(again)))
        assert opened.call_count == 0 and x.dtype == torch.uint8
        os.utime("data/007.png", (1, 1))                   # an edited file is read again
        changed, _ = vmae.open_images("data", 16, run="run")
        assert opened.call_count == 1
    with contextlib.redirect_stdout(io.StringIO()) as said:
        vmae.open_images("data", 32)
    assert "30 of 30 images are smaller than 32 pixels" in said.getvalue()
    fresh = ImageFolder("data", 16, "train")
    for i in range(len(fresh)):
        close(vmae.to_float(x[i]), fresh[i][0], 0)
    [cache] = Path("run").glob("images_*.pt")
    changed.keep_pixels("run")                             # replaces it
    assert not cache.exists() and len(list(Path("run").glob("images_*.pt"))) == 1
    assert changed.keep_pixels("run", False) is changed    # --no-cache, even if there is one
    assert changed.draft
    for allowed, free in ((False, 10**9), (True, 10)):     # --no-cache, or a full disk
        with patch(shutil, "disk_usage", return_value=SimpleNamespace(free=free)):
            other = ImageFolder("data", 20)
            assert other.keep_pixels("run", allowed) is other and other.draft
            if allowed:
                rows = vmae.Rows("run", "images", b"key", 9, 192)
                assert "make room" in raises(InputError, rows.build, "decoding", None)
    with patch(vmae, "read_image", side_effect=OSError("damaged")):
        assert "over 1 %" in raises(InputError, changed.read, 0)

def test_rows_are_kept_in_files_that_are_whole_and_go_on():
    made = []
    def make(first, last):
        """Row i is full of i; one file fails halfway."""
        made.append(first)
        half = (first + last) // 2
        yield torch.arange(first, half).view(-1, 1), torch.arange(first, half) % 10
        if first == stop:
            raise KeyboardInterrupt
        yield torch.arange(half, last).view(-1, 1), torch.arange(half, last) % 10
    def rows():
        return vmae.Rows(".", "images", b"key", 9, 2**21)  # 8 rows in 16 MB
    Path("images_0123456789abcdef_0.pt").touch()
    stop = 8
    raises(KeyboardInterrupt, rows().build, "counting", make)
    assert len(os.listdir()) == 1 and rows().missing == 2**21  # not even the old one
    stop = None
    x, y = rows().build("counting", make).batch([0, 7, 8])
    assert made == [0, 8, 8]                               # what was whole is not made again
    assert x.tolist() == [[0], [7], [8]] and y.tolist() == [0, 7, 8]
    first, _ = sorted(Path().glob("images_*.pt"))
    first.write_bytes(first.read_bytes()[:500])
    assert first.name in raises(InputError, rows().build, "counting", make)


# ---- Noise schedule, loss, samplers -----------------------------------------------------------

def test_schedule_runs_from_signal_to_noise_and_its_steps_end_on_clean_latents():
    for kind, T in itertools.product(("linear", "cosine"), (100, 1000)):
        bar = ldm.Schedule(kind, T).alpha_bar
        assert (bar[1:] <= bar[:-1]).all() and bar[0] > 0.99 and 3e-5 < bar[-1] < 1e-3
    linear = ldm.Schedule("linear").alpha_bar
    close(linear[0], 1 - 1e-4, 1e-12), close(linear[1] / linear[0], 1 - 1e-4 - 0.0199 / 999, 1e-9)
    middle = math.cos(0.508 / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)
    close(ldm.Schedule("cosine").alpha_bar[499], middle**2, 1e-9)          # 500 of 1000 steps done
    raises(ValueError, ldm.Schedule, "quadratic")          # there is none
    schedule = ldm.Schedule()
    for S in (1, 2, 3, 7, 50, 250, 333, 999, 1000):
        ts, bars, nexts = zip(*schedule.steps(S))
        assert len(ts) == len(set(ts)) == S and ts[0] == 999 and min(ts) >= 0
        assert nexts == (*bars[1:], 1.0)                   # each step begins where the last ended
    for S in (0, 1001):
        raises(ValueError, schedule.steps, S)              # of T = 1000

def test_objectives_invert_and_clipping_keeps_z_t():
    z_0, eps = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    for objective, t in itertools.product(("eps", "v"), (0, 300, 900)):
        schedule = ldm.Schedule(objective=objective)
        ts, bar = torch.full((4,), t), schedule.alpha_bar[t].item()
        z_t, output = schedule.q_sample(z_0, ts, eps), schedule.target(z_0, ts, eps)
        a, b = schedule.z0_eps(z_t, output, bar)
        close(a, z_0, 1e-4), close(b, eps, 2e-3)           # at t = 0 eps is divided by .006
        a, b = schedule.z0_eps(z_t, output, bar, clip=0.5)
        assert a.abs().max() <= 0.5
        close(math.sqrt(bar) * a + math.sqrt(1 - bar) * b, z_t, 1e-5)      # Ho 2020, Eq. 4

def optimal(schedule, m, s):
    """The best possible network for latents ~ N(m, s^2): E[z_0 | z_t] in closed form."""
    def model(z_t, t, y):
        """On the path z_t = a z_0 + b eps, which is straight in rectified flow."""
        if schedule.objective == "flow":
            a, b = t.view(-1, 1, 1, 1), 1 - t.view(-1, 1, 1, 1)
        else:
            bar = schedule.alpha_bar[t].float().view(-1, 1, 1, 1)
            a, b = bar.sqrt(), (1 - bar).sqrt()
        z_0 = m + a * s**2 / (a**2 * s**2 + b**2) * (z_t - a * m)
        eps = (z_t - a * z_0) / b
        return {"eps": eps, "v": a * eps - b * z_0, "flow": z_0 - eps}[schedule.objective]
    return model

def test_loss_of_the_true_noise_is_zero_and_of_silence_one():
    z_0 = torch.full((64, 2, 4, 4), 0.7)
    for objective in ("v", "flow", "eps"):
        schedule = ldm.Schedule(objective=objective)
        close(ldm.loss_LDM(optimal(schedule, 0.7, 0), schedule, z_0), 0, 1e-3)
    close(ldm.loss_LDM(lambda z_t, t, y: 0 * z_t, schedule, z_0), 1, 0.1)  # E eps^2

def test_times_are_uniform_for_eps_and_in_the_middle_for_v_under_any_schedule():
    z_0, drawn = torch.zeros(40000, 1, 1, 1), []
    for kind, objective in (("cosine", "eps"), ("linear", "eps"), ("cosine", "v"), ("linear", "v")):
        schedule = ldm.Schedule(kind, objective=objective)
        ldm.loss_LDM(lambda z_t, t, y: drawn.append(t) or z_t, schedule, z_0, None,
                     vmae.seeded(0))
        assert 0 <= drawn[-1].min() and drawn[-1].max() < 1000
    uniform, _, cosine, linear = (t.sort().values.float() for t in drawn)
    close(uniform / 1000, torch.linspace(0, 1, 40000), 0.03)
    expected = torch.special.ndtri((torch.arange(40000) + 0.5) / 40000) * 0.7 + 0.4
    close(cosine / 1000, expected.sigmoid(), 0.03)
    bars = [ldm.Schedule(kind).alpha_bar[t.long()]
            for kind, t in (("cosine", cosine), ("linear", linear))]
    close(*bars, 0.01)                                     # as much noise under both

def test_samplers_land_on_a_gaussian_and_small_errors_of_the_network_stay_small():
    z_T, m, s = torch.randn(64, 4, 16, 16), 0.7, 0.5
    for kind, objective in itertools.product(("linear", "cosine"), ("eps", "v")):
        schedule = ldm.Schedule(kind, objective=objective)
        model = optimal(schedule, m, s)
        for S in (20, 50, 250, 1000):                      # first order in 1 / S, plus 65,536 draws
            for sampler, order in ((ldm.ddim_sample, 1.5), (ldm.ddpm_sample, 3)):
                z = sampler(model, schedule, z_T, steps=S)
                close(z.mean(), m, 0.006), close(z.std(), s, order / S + 0.006)
    one = ldm.ddim_sample(model, schedule, z_T, steps=1)   # one step can only give the mean
    close(one.mean(), m, 0.01), close(one.std(), 0, 0.01)
    z_T = torch.randn(32, 16, 8, 8)                        # off by .01, or rounded to bfloat16
    for objective in ("eps", "v"):
        schedule = ldm.Schedule(objective=objective)
        model = optimal(schedule, 0.0, 1.0)
        for wrong in (lambda *a: model(*a) + 0.01 * torch.randn_like(z_T),
                      lambda *a: model(*a).bfloat16().float()):
            for sampler, S in ((ldm.ddim_sample, 20), (ldm.ddim_sample, 50),
                               (ldm.ddim_sample, 250), (ldm.ddpm_sample, 1000)):
                close(sampler(wrong, schedule, z_T, steps=S).std(), 1, 0.1)

def test_ddim_with_eta_one_is_ddpm():
    schedule = ldm.Schedule("linear")
    model, z_T = optimal(schedule, 0.3, 0.8), torch.randn(2, 3, 4, 4)
    for S in (1, 10, 200, 1000):
        torch.manual_seed(0)                               # both draw the same noise
        ddpm = ldm.ddpm_sample(model, schedule, z_T, steps=S)
        torch.manual_seed(0)
        ddim = ldm.ddim_sample(model, schedule, z_T, steps=S, eta=1.0, record=(record := []))
        close(ddpm, ddim, 1e-3)
        assert len(record) == S
    ldm.ddpm_sample(lambda z, t, y: 0 * z, schedule, z_T, record=(record := []))
    assert len(record) == schedule.T                       # by default, as in Ho 2020

def test_euler_is_first_order_on_a_gaussian():
    m, s, schedule = 0.7, 0.5, ldm.Schedule(objective="flow")
    z_T, velocity = torch.randn(4, 2, 8, 8).double(), optimal(schedule, m, s)
    for shift, middle in ((1.0, 0.5), (0.3, 0.3 * 0.5 / (1 - 0.7 * 0.5))):  # LightningDiT's
        errors = [(ldm.euler_sample(velocity, schedule, z_T, steps=S, shift=shift)
                   - (m + s * z_T)).abs().max().item() for S in (50, 100, 200)]
        assert all(1.7 < a / b < 2.3 for a, b in zip(errors, errors[1:])), errors  # halved
        ts = []
        ldm.euler_sample(lambda z, t, y: ts.append(t[0].item()) or 0 * z, schedule, z_T, steps=250,
                         shift=shift)
        assert len(ts) == 250 and ts[0] == 0 and ts == sorted(ts)
        close(ts[125], middle, 1e-6)
    raises(ValueError, ldm.euler_sample, velocity, ldm.Schedule(), z_T)
    raises(ValueError, ldm.ddim_sample, velocity, schedule, z_T)
    # The best velocity's loss is the variance it cannot know, mean of s^2 / (t^2 s^2 + (1-t)^2).
    z_0, t = m + s * torch.randn(20000, 1, 1, 1), torch.randn(200000).sigmoid()
    close(ldm.loss_LDM(velocity, schedule, z_0), (s**2 / (t**2 * s**2 + (1 - t) ** 2)).mean(), 0.03)


# ---- Diffusion transformer, guidance, EMA, normalisation --------------------------------------

def tiny_dit(num_classes=0, patch_size=1):
    """With random weights everywhere, as adaLN-zero starts by answering zero."""
    torch.manual_seed(0)
    model = ldm.DiT(4, patch_size, 4, 32, 2, 4, num_classes)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model.eval().requires_grad_(False)

def test_dit_starts_at_zero_and_takes_patches():
    z_t, t, y = torch.randn(2, 4, 4, 4), torch.tensor([0, 9]), torch.tensor([0, 2])
    assert ldm.DiT(4, 2, 4, 32, 1, 4, 2)(z_t, t, y).abs().max() == 0
    assert all(tiny_dit(patch_size=P)(z_t, t).shape == z_t.shape for P in (1, 4))
    model, numbers = tiny_dit(patch_size=2), torch.arange(16.0)  # each piece answers 0 to 15
    model.final_layer.linear.weight.zero_(), model.final_layer.linear.bias.copy_(numbers)
    piece = numbers.view(2, 2, 4).permute(2, 0, 1)         # rows, columns, channels innermost
    close(model(z_t, t)[0], piece.repeat(1, 2, 2), 0)
    raises(ValueError, ldm.DiT, 4, 3)                      # pieces of 3 in a grid of 4
    base = ldm.DiT(**ldm.sizes["base"])
    assert abs(sum(p.numel() for p in base.parameters()) / 1e6 - 130) < 1  # B/1, 130 M
    patches = [ldm.dit_args("small", grid, 16, 3)["patch_size"] for grid in (8, 16, 32)]
    assert patches == [1, 1, 2]                            # S/2 from 32 x 32 on

def test_guidance_of_one_is_none_reaches_every_channel_and_spares_the_noise():
    model, widths = tiny_dit(num_classes=3), []
    z_t, t, y = torch.randn(2, 4, 4, 4), torch.full((2,), 500), torch.tensor([0, 2])
    plain, null = model(z_t, t, y), model(z_t, t, torch.tensor([3, 3]))    # of 0, 1, 2 and none
    assert torch.equal(ldm.guided(model, z_t, 500, y, 1.0), plain)
    assert torch.equal(model(z_t, t), null)                # no label is the null label
    close(ldm.guided(model, z_t, 500, y, 4.0), null + 4 * (plain - null), 1e-4)
    assert (plain - null).abs().amax((0, 2, 3)).min() > 0
    model.register_forward_hook(lambda m, inputs, output: widths.append(len(output)))
    ldm.euler_sample(model, ldm.Schedule(objective="flow"), z_t, y, steps=4, w=2.0, interval=0.5)
    assert widths == [2, 2, 4, 4]                          # two passes in one from t = 1/2 on
    y = ldm.LabelEmbed(7, 8).drop(torch.zeros(20000, dtype=torch.long), 0.1)
    assert set(y.unique().tolist()) == {0, 7}
    close((y == 7).float().mean(), 0.1, 0.02)

def test_normalise_inverts():
    z = torch.randn(8, 3, 4, 4) * 5 + 2
    mean, std = torch.tensor([1.0, 2, 3]), torch.tensor([5.0, 4, 3])
    close(ldm.denormalise(ldm.normalise(z, mean, std), mean, std), z, 1e-5)
    close(ldm.normalise(z, mean, std)[:, 1], (z[:, 1] - 2) / 4, 1e-6)  # the second channel's own

def test_ema_warms_up_and_copies_buffers():
    model, expected = torch.nn.BatchNorm1d(1), 1.0         # its weight to begin with
    ema = ldm.EMA(model, decay=0.5)
    model.weight.data.fill_(2.0), model.running_mean.fill_(7.0)
    for n in range(20):
        ema.update(model)
        decay = min(0.5, (1 + n) / (10 + n))               # the warm-up, then 0.5
        expected = decay * expected + (1 - decay) * 2.0
        close(ema.model.weight, expected, 1e-6)
    assert ema.model.running_mean == 7 and model.weight == 2               # copied; left alone


# ---- Cache, plumbing, checkpoints -------------------------------------------------------------

def test_cache_equals_fresh_encoding_and_is_never_stale():
    save_images("data/a", 9), save_images("data/b", 8, seed=1)
    model = VMAE(**TINY_VMAE)
    def moments():
        """The cache of what is in data/ now."""
        return train_ldm.cache_moments(model, ImageFolder("data", 16), ".", "cpu", precision)
    precision, seen = contextlib.nullcontext, []           # of stage two's matrix products
    rows, data = moments(), ImageFolder("data", 16)
    for i in (0, 8, 16):
        q = model.encode(torch.stack([data[i][0], data[i][0].flip(-1)]))   # image, mirror
        close(rows.batch([2 * i, 2 * i + 1])[0], torch.cat([q.mu, q.logvar], 1), 0.01)  # float16
    every, y = rows.batch(range(len(rows)))
    assert every.dtype == torch.float16 and y.tolist() == [0] * 18 + [1] * 16
    draws = torch.cat([Gaussian(*every.float().chunk(2, 1)).sample() for _ in range(200)])
    mean, std = train_ldm.statistics(rows)
    close(mean, draws.mean((0, 2, 3)), 0.05), close(std, draws.std((0, 2, 3)), 0.05)
    [path] = rows.files.values()
    stamp = os.stat(path).st_mtime_ns
    assert os.stat(*moments().files.values()).st_mtime_ns == stamp         # found, not made
    model.to_latent.bias.data[0] += 1
    [other] = moments().files.values()
    assert other != path and not os.path.exists(path)
    save_images("data/b", 8, seed=2)
    precision = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    model.to_latent.register_forward_hook(lambda *of: seen.append(of[2].dtype))
    assert list(moments().files.values()) != [other] and set(seen) == {torch.bfloat16}
    save_images("data/b", 8, seed=3)
    with patch(model, "encode", side_effect=OSError("full")), patch(model.norm, "eps", 1e-5):
        raises(OSError, moments)                           # a failure leaves nothing behind
    assert not list(Path().glob("moments_*"))

def test_order_is_endless_resumable_and_shared_out():
    def first(count, start=0, parts=(0,), batch=1, micro=1, seed=3):  # of ten images
        args = SimpleNamespace(seed=seed, batch=batch, micro=micro)
        return list(itertools.islice(train_vmae.shares(10, args, start, parts), count))
    whole = sum(first(40), [])
    assert all(sorted(whole[i:i + 10]) == list(range(10)) for i in (0, 10, 20, 30))
    assert whole[:10] != whole[10:20]                      # shuffled anew
    assert whole != sum(first(40, seed=4), [])
    assert sum(first(20, start=17), []) == whole[17:37]
    a, b = (torch.rand(4, generator=vmae.seeded(*pair)) for pair in ((0, 1), (1, 0)))
    assert not torch.equal(a, b)                           # seeds do not overlap
    parts = [first(2, 3, [i], 7, 3) for i in range(3)]     # of 7 images in parts of 3, 3 and 1
    assert parts[2][0] == [whole[27]] and parts[1][1] == sorted(whole[31:34])
    assert first(6, 3, range(3), 7, 3) == [p[i] for i in (0, 1) for p in parts]

def test_batches_fit_the_memory_of_common_cards():
    """Saved bytes in bfloat16, counted without computing. A margin of a third is for the rest."""
    def micro(card, saved):
        """The default of --micro -> GiB in use: what is saved, weights, gradients, AdamW, EMA."""
        args = SimpleNamespace(batch=2048, micro=None)
        with (patch(train_vmae, "free_memory", lambda device: (card - weights) * 2**30),
              patch(train_vmae, "saved_bytes", lambda forward: saved[forward()])):
            train_vmae.micro_batches(args, torch.device("cpu"), model, lambda n: n)
        return args.micro * (saved[2] - saved[1]) / 2**30 + 5 * weights

    def dit_loss(n, model):
        return ldm.loss_LDM(model, ldm.Schedule(), torch.zeros(n, 16, 32, 32))

    fused = F.scaled_dot_product_attention                 # on a CPU ours is in float32
    with (patch(vmae, "fused_attention", fused), patch(ldm, "fused_attention", fused),
          FakeTensorMode(), warnings.catch_warnings(), mock.patch.dict(ldm.sizes, tiny=REAL)):
        warnings.simplefilter("ignore")
        net = vmae.import_lpips().LPIPS(pretrained=False, pnet_rand=True, net="vgg", verbose=False)
        net.requires_grad_(False).eval()
        cases = [(ldm.DiT(**ldm.dit_args(size, 32, 16, 0)), dit_loss) for size in ldm.sizes]
        args = SimpleNamespace(lambda_p=0.5)
        for rows, disc in ((vmae.sizes, None), (vmae.conv_sizes, vmae.discriminator(256))):
            loss = functools.partial(train_vmae.trial_loss, args=args, net=net, disc=disc)
            cases += [(vmae.build(dict(row, img_size=256)), loss) for row in rows.values()]
        for model, loss in cases:
            with torch.autocast("cpu", torch.bfloat16):    # as on CUDA
                saved = {n: train_vmae.saved_bytes(lambda: loss(n, model=model)) for n in (1, 2)}
            weights = sum(p.numel() for p in model.parameters()) * 4 / 2**30
            assert 5 < micro(24, saved) < 20 and 2 < micro(12, saved) < 9

def test_learning_rate_warms_up_and_decays():
    rates = [train_vmae.learning_rate(s, 1000, 1.0) for s in range(1000)]
    assert rates[0] < 0.1 and max(rates) == max(rates[15:30]) > 0.99 and rates[-1] < 1e-4  # 2 % up

def test_bad_batches_are_skipped_and_ten_in_a_row_stop_the_run():
    save_images("data", 12)
    sound, calls = vmae.loss_M, itertools.count()
    def broken(*args):
        """L_M, NaN at the given calls; with --whole 0 there is one per step."""
        return sound(*args) * (math.nan if next(calls) in bad else 1)
    go = f"{TINY_RUN} --whole 0 --steps 60 --save-every 20"
    with patch(vmae, "loss_M", broken), patch(train_vmae, "validate", lambda *_: {}):
        bad = {3, *range(25, 34)}                          # nine in a row
        runs(train_vmae.main, go)
        assert log_of("runs/vmae")[-1]["skipped"] == 10
        assert all(p.isfinite().all() for p in vmae.load_vmae("runs/vmae/last.pt").parameters())
        bad, calls = set(range(25, 35)), itertools.count()
        text = runs(train_vmae.main, f"{go} --out stops", status=1)
    assert "step 40: L_M infinite or NaN" in text and "L_R" not in text.split("error")[1]
    assert load("stops/last.pt")["step"] == 20           # the last good one

def test_speed_in_the_log_leaves_saves_out():
    args, fine = SimpleNamespace(steps=20, batch=4, save_every=10, out="."), torch.tensor(True)
    with (patch(train_vmae.time, "perf_counter", side_effect=[0, 5, 100, 110, 120]),
          train_vmae.Log(args, 0, "cpu") as log):          # begins at 0 s
        for step in range(1, 21):                          # at 5 s, then a save until 100 s; 110 s
            log.add({"L_R": torch.ones(())}, 1)
            log.step(step, fine, 0.1, lambda path: {"PSNR_val": 30.0}, {})
    assert [line["images_per_s"] for line in log_of(".")] == [10 * 4 / 5, 10 * 4 / 10]
    assert load("last.pt")["step"] == 20

def test_two_micro_batches_equal_one_and_memory_is_named():
    half = np.random.default_rng(0).integers(0, 256, (12, 16, 8, 3), dtype=np.uint8)
    Path("data").mkdir()
    for i, left in enumerate(half):                        # equal to their mirror images, so that
        Image.fromarray(np.concatenate([left, left[:, ::-1]], 1)).save(f"data/{i}.png")
    go = "--precision float32 --lr 1 --preset ae --batch 8 --micro"        # ae has no other chance
    with patch(train_vmae, "optimiser", lambda m: torch.optim.SGD(m.parameters(), fused=True)):
        one, two = trained(f"{go} 8", "one"), trained(f"{go} 3", "two")    # 3 + 3 + 2 images
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        close(p, q, 1e-6)                                  # AdamW would magnify rounding errors
    assert all_differ(one, trained(f"{go} 8 --steps 1", "less"))
    assert load("two/last.pt")["train_args"]["micro"] == 3
    with patch(vmae, "loss_R", side_effect=torch.OutOfMemoryError("CUDA")):
        text = runs(train_vmae.main, f"{TINY_RUN} --micro 4 --out none", status=1)
    assert "give --micro 2" in text.splitlines()[-1]
    args = SimpleNamespace(batch=8, micro=8)
    with patch(train_vmae, "WORLD", 2):
        assert "--micro 4" in raises(InputError, train_vmae.micro_batches, args, "cpu", 0, 0)
        args = SimpleNamespace(batch=1, micro=1)
        assert "larger --batch" in raises(InputError, train_vmae.micro_batches, args, "cpu", 0, 0)
    model = VMAE(**TINY_VMAE)
    with patch(model, "encode_tokens", wraps=model.encode_tokens) as encode:   # whole: the most
        train_vmae.trial_loss(2, model, SimpleNamespace(lambda_p=0), None, None)
    assert encode.call_args.args[1].shape == (2, 16)
    model, cpu = torch.nn.Linear(4, 4), torch.device("cpu")
    for world, batch, micro in ((2, 8, 4), (7, 16, 2), (1, 16, 16)):       # with lots of memory
        args = SimpleNamespace(batch=batch, micro=None)
        with patch(train_vmae, "WORLD", world):
            train_vmae.micro_batches(args, cpu, model, lambda n: model(torch.ones(n, 4)).sum())
        assert args.micro == micro

def test_precision_is_measured_or_asked_of_the_card():
    for capability, answer in (((7, 5), False), ((8, 0), True), ((9, 0), True)):   # T4, A100, H200
        with patch(torch.cuda, "get_device_capability", lambda _, c=capability: c):
            assert vmae.has_bfloat16(torch.device("cuda")) is answer
    assert not vmae.has_bfloat16(torch.device("meta"))     # neither of the two
    products = []
    for slow, answer in ((torch.bfloat16, False), (torch.float32, True)):
        def product(a, b):
            products.append(a.dtype)
            time.sleep(0.002 if a.dtype == slow else 0.001)
        with patch(torch.Tensor, "__matmul__", product):
            assert vmae.has_bfloat16(torch.device("cpu")) is answer
    assert set(products) == {torch.float32, torch.bfloat16}

def test_an_interrupted_save_leaves_the_last_one_and_resume_continues_the_same_run():
    model, x = VMAE(**TINY_VMAE), random_images()
    vmae.save_checkpoint("last.pt", model_args=TINY_VMAE, model=model.state_dict())
    unwritable = (i for i in "ab")                         # stops pickle halfway, like a power cut
    raises(TypeError, vmae.save_checkpoint, "last.pt", model=unwritable)
    close(vmae.load_vmae("last.pt").encode(x).mode(), model.encode(x).mode(), 0)
    assert os.listdir() == ["last.pt"]
    save_images("data", 12)
    go = f"{TINY_RUN} --steps 4 --save-every 2 --resume --out"
    assert "no checkpoint yet" in runs(train_vmae.main, f"{go} whole")
    flip = vmae.random_flip
    for number in (signal.SIGTERM, signal.SIGINT):         # during a step
        def interrupted(x, generator):
            os.kill(os.getpid(), number)
            return flip(x, generator)
        both = mock.Mock(wraps=vmae)
        with (patch(vmae, "random_flip", interrupted), patch(vmae, "agree", both.agree),
              patch(vmae, "save_checkpoint", both.save_checkpoint)):
            text = runs(train_vmae.main, f"{go} parts", status=1)
        assert [call[0] for call in both.mock_calls][-2:] == ["save_checkpoint", "agree"]
        assert f"after step {load('parts/last.pt')['step']}, which is saved" in text
    runs(train_vmae.main, "--out parts --resume")          # with the options that it had
    assert "complete, at step 4" in runs(train_vmae.main, f"{go} parts")
    a, b = (load(f"{name}/last.pt") for name in ("whole", "parts"))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])  # no random state
    steps = [line["step"] for line in log_of("parts")]
    assert steps == [1, 2, 4] and [line["step"] for line in log_of("whole")] == [2, 4]
    with open("parts/log.jsonl", "ab") as log:             # what a power cut or an editor may leave
        log.write(b'{"step": 3, "lr\n\xff\xfe\n{"step": 3, "lr": 0{"step": 4, "lr": 1}\n{"step": 3')
    runs(train_vmae.main, f"{go} parts --steps 5")
    assert [line["step"] for line in log_of("parts")] == [1, 2, 4, 4, 5]   # whole lines are kept

def test_what_one_process_lacks_and_what_a_checkpoint_holds_count_for_all():
    args = SimpleNamespace(lambda_p=None, vgg_weights=None, tune=None, data="data")
    with (patch(vmae, "load_lpips", lambda path: torch.nn.Identity()),
          patch(vmae, "agree", lambda value: type(value)(0))):     # another one has no VGG
        assert train_vmae.perceptual(args, torch.device("cpu")) is None and args.lambda_p == 0
    save_images("data", 12), trained()
    runs(train_ldm.main, "--steps 2 --batch 8")
    ckpt = load("runs/ldm/last.pt")
    ckpt["latent_mean"] += 1                               # the latents may have changed since
    torch.save(ckpt, "runs/ldm/last.pt")
    runs(train_ldm.main, "--steps 3 --resume")
    close(load("runs/ldm/last.pt")["latent_mean"], ckpt["latent_mean"], 0)

def test_measuring_held_out_images_leaves_the_run_alone():
    save_images("data/left", 24), save_images("data/right", 24, seed=1)
    often, once = trained("--save-every 1"), trained(out="once")
    assert all(map(torch.equal, often.parameters(), once.parameters()))
    first, last = log_of("runs/vmae")                      # a line at each save
    assert first["step"] == 1 and last["step"] == 2 and first["PSNR_val"] != last["PSNR_val"]
    x = torch.stack([x for x, _ in ImageFolder("data", 16, "val")])
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    x_hat = often.decode(often.encode(x).mode())           # whole images, as in use
    close(last["PSNR_val"], vmae.psnr(vmae.to_uint8(x), vmae.to_uint8(x_hat)).mean(), 0.01)
    generator = torch.Generator().manual_seed(0)
    torch.randn(x.shape, generator=generator)              # noise, of weight 0 here
    p, _, mask = often(x, 0.6, generator)                  # masked patches, as in training
    error = vmae.patchify((vmae.to_uint8(x).float() - vmae.to_uint8(p.mode()).float()) ** 2, 4)
    mse = torch.stack([e[m == 1].mean() for e, m in zip(error, mask)])
    close(last["PSNR_m_val"], (10 * torch.log10(255**2 / mse)).mean(), 0.01)
    trained("--preset ae", "ae")
    assert "PSNR_m_val" not in log_of("ae")[-1]            # which masks nothing
    for objective in ("eps", "v", "flow"):
        go = f"--steps 2 --batch 8 --objective {objective} --out"
        draws = objective == "v" and sample.draw or mock.Mock(return_value=torch.zeros(32, 3, 8, 8))
        with patch(sample, "draw", draws):                 # 32 samples take time
            for out, every in (("often", 1), ("rarely", 2)):
                shutil.rmtree(out, ignore_errors=True)
                runs(train_ldm.main, f"{go} {out} --save-every {every}")
        a, b = (load(f"{run}/last.pt") for run in ("often", "rarely"))
        assert all(torch.equal(a["ema"][k], b["ema"][k]) for k in a["ema"])
        line = log_of("often")[-1]
        assert {f"L_{objective}", f"L_{objective}_val"} <= set(line), line
        differ = {k: line[k] for k in ("images_per_s", f"L_{objective}")}  # means over other steps
        assert line == log_of("rarely")[-1] | differ

def test_compiled_networks_are_in_one_piece_and_train_alike():
    whole = functools.partial(torch.compile, fullgraph=True, backend="eager")
    model, dit, x, z_t = VMAE(**TINY_VMAE), tiny_dit(2), random_images(), torch.randn(2, 4, 4, 4)
    keep, _ = vmae.random_mask(2, 4, 4, 0.6)
    for function, *args in ((model.encode_tokens, x, keep), (model.decode, z_t),
                            (dit, z_t, torch.tensor([1, 5]), torch.tensor([0, 2]))):
        a, b = (f(*args) for f in (function, whole(function)))
        close(getattr(a, "mu", a), getattr(b, "mu", b), 1e-5)
    rope, q = dit.feat_rope, torch.randn(2, 16, 8)         # elsewhere than on a CPU RoPE is real
    elsewhere = mock.MagicMock(wraps=q, device=torch.device("meta"), dtype=q.dtype)
    elsewhere.__mul__ = lambda _, other: q * other
    with patch(torch, "view_as_complex", side_effect=AssertionError):
        real = ldm.Rope.forward(rope, elsewhere)
    close(real, rope(q), 1e-6)
    save_images("data", 8)                                 # masked and whole steps of training
    with patch(torch, "compile", functools.partial(torch.compile, backend="eager")):
        a, b = trained(), trained("--compile", "compiled")
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        close(p, q, 1e-4)


# ---- What is trained: presets, losses, published weights, decoder tuning ----------------------

def test_every_preset_and_option_changes_what_is_learnt():
    save_images("data", 24)
    models = {name: trained(f"--preset {name}", name) for name in train_vmae.PRESETS}
    again = trained("--preset vmae")
    assert all(map(torch.equal, models["vmae"].parameters(), again.parameters()))  # the same seed
    terms = {name: sorted(k for k in log_of(name)[-1] if k.startswith("L_")) for name in models}
    assert terms == dict(ae=["L_R"], dae=["L_R"], vae=["L_R", "L_reg"], mae=["L_M", "L_R"],
                         sdvae=["L_D", "L_G", "L_R", "L_reg"], vmae=["L_M", "L_R", "L_reg"])
    for name, model in models.items():
        point = name in ("ae", "dae", "mae")               # no variance: clamped, and so left
        assert (model.encode(random_images()).logvar == -30).all() == point, name
        assert isinstance(model, VMAE) == (name in ("mae", "vmae")), name
    assert all_differ(models["ae"], models["dae"]) and all_differ(models["ae"], models["vae"])
    for line in ("ae --lambda-reg 1", "dae --noise 9", "vae --lambda-reg 1", "vae --kl-mean free",
                 "mae --lambda-m 9", "sdvae --lambda-adv 9", "vmae --lambda-m 0", "vmae --mask 0.3",
                 "vmae --lambda-reg 0", "vmae --lambda-reg 1", "vmae --whole 1", "vmae --seed 1"):
        assert all_differ(models[line.split()[0]], trained(f"--preset {line}")), line
        assert log_of("runs/vmae")[-1]["L_R"] < 5          # 40 if the noise were in the target
    assert isinstance(trained("--preset ae --arch vit"), VMAE)             # like for like
    refuses(train_vmae.main, {"--arch conv --out new": "--mask"})          # it sees what is hidden

def test_adversarial_loss_waits_and_is_weighed_on_the_last_layer():
    save_images("data", 8)
    go = f"{TINY_RUN} --preset sdvae --steps 100 --batch 2 --save-every 50"
    with patch(vmae, "loss_G", wraps=vmae.loss_G) as spy:
        runs(train_vmae.main, go)
    assert spy.call_count == 50 and spy.call_args.args[2].shape == (3, 16, 3, 3)  # the last layer
    before, after = log_of("runs/sdvae")                   # steps 1 to 50, 51 to 100
    assert "L_G" not in before and "L_D" not in before
    assert all(math.isfinite(after[k]) for k in ("L_R", "L_G", "L_D"))
    runs(train_vmae.main, f"{go} --steps 102 --resume")    # with the discriminator's part
    assert load("runs/sdvae/last.pt")["train_args"]["adv_start"] == 50  # --steps moved it no more
    close(vmae.loss_D(torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])), 0.375, 1e-6)  # 3 / 8
    last = torch.nn.Linear(4, 4)
    x_hat = last(torch.randn(3, 4))
    reconstruction, fake = 7 * x_hat.square().mean(), 0.01 * x_hat.sum(1)
    a, b = (torch.autograd.grad(loss, last.weight, retain_graph=True)[0].norm()
            for loss in (reconstruction, vmae.loss_G(fake, reconstruction, last.weight)))
    close(a / b, 1, 0.01)                                  # gradients of equal length
    for size, side in ((64, 6), (32, 6), (8, 2)):          # patches of 70, 34 and 16 pixels
        assert vmae.discriminator(size)(random_images(2, size)).shape == (2, 1, side, side)

def test_tuning_the_decoder_leaves_the_encoder_alone():
    save_images("data", 8)
    for preset in ("vmae", "vae"):                         # a transformer, a convolutional body
        a = trained(f"--preset {preset}", preset)
        b = trained(f"--init {preset}/last.pt --tune decoder --size 32", "runs/tuned")
        assert b.img_size == 32 and b.encode(random_images(1, 32)).mu.shape[-1] == 2 * a.grid
        moved = [name for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True)
                 if not torch.equal(p, q)]
        assert moved and all(n.startswith(("decoder", "from_latent")) for n in moved), moved
    refuses(train_vmae.main, {
        "--tune decoder --out new": "--init", "--preset sdvae --compile": "--compile",
        "--init vae/last.pt --arch vit": "decides the shape"})

def test_dit_equals_the_authors_and_samples():
    v = vector("lightningdit_official.pt")
    for name in ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"):
        close(ldm.DiT(**v["model_args"]).state_dict()[name], v["state_dict"][name], 1e-6)
    weights = {f"module.{k}": w for k, w in v["state_dict"].items()}
    torch.save({"model": {}, "ema": weights}, "dit.pt")
    mean, std = torch.arange(16.0).view(1, 16, 1, 1), torch.full((1, 16, 1, 1), 2.0)
    torch.save({"mean": mean, "std": std}, "stats.pt")
    model, schedule, ckpt = ldm.load_ldm("dit.pt", "stats.pt")
    close(model(v["x"], v["t"], v["y"]), v["out"], 1e-4)
    close(ckpt["latent_mean"], mean.flatten(), 0)
    assert schedule.objective == "flow" and model.y_embedder.num_classes == 3
    save_images("data", 8)
    trained(out="first")                                   # 16 channels, 4 x 4, as theirs
    draw, known = "--ckpt dit.pt --n 2 --steps 3", "--stats stats.pt --vmae first/last.pt"
    refuses(sample.main, {"": "--stats", "--stats stats.pt": "--vmae", f"{known} --eta 1": "--eta",
                          "--stats dit.pt --vmae first/last.pt": "no mean",
                          f"{known} --sampler ddim": "--sampler ddim"}, draw)
    runs(sample.main, f"{draw} {known} --shift 0.3 --interval 0.1 --cfg 2 --trajectory")
    assert os.path.exists("samples/sample_000001.png")
    text = runs(train_ldm.main, f"--init dit.pt {known} --steps 1 --batch 2 --lr 1e-9")
    assert "its 3 classes are not the 0 here" in text                   # theirs, and those of data/
    model, schedule, ckpt = ldm.load_ldm("runs/ldm/last.pt")
    close(model.blocks[0].attn.qkv.weight, v["state_dict"]["blocks.0.attn.qkv.weight"], 1e-6)
    assert schedule.objective == "flow" and ckpt["latent_std"].tolist() == [2.0] * 16


# ---- Evaluation: metrics ----------------------------------------------------------------------

def test_psnr_and_ssim_by_hand_and_by_scikit_image():
    a = torch.randint(0, 250, (2, 3, 16, 16), dtype=torch.uint8)
    close(evaluate.psnr(a, a + 5), 20 * math.log10(255 / 5), 1e-9)         # MSE is 25
    close(evaluate.ssim(a, a), 1, 1e-12)
    flat, c1 = torch.full((1, 3, 16, 16), 100.0), (0.01 * 255) ** 2  # variance 0: one factor
    close(evaluate.ssim(flat, flat + 20), (2 * 100 * 120 + c1) / (100**2 + 120**2 + c1), 1e-9)
    raises(InputError, evaluate.ssim, a[..., :8], a[..., :8])              # the window has 11
    v = vector("metrics_reference.npz")
    a, b = (torch.from_numpy(v[k]).permute(2, 0, 1)[None] for k in ("a", "b"))
    close(evaluate.psnr(a, b), v["psnr"], 1e-6), close(evaluate.ssim(a, b), v["ssim"], 1e-6)

def made_up_inception():
    """A state dict by the rule of vectors/inception_fid.pt, which says it in words."""
    weights = {}
    for key, value in evaluate.InceptionV3().state_dict().items():
        if value.dtype == torch.long:
            continue                                       # counters: a file may lack them
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        w = torch.randn(value.shape, generator=generator)
        weights[key] = (w.abs() + 0.5 if key.endswith("running_var") else
                        1 + 0.1 * w if key.endswith("bn.weight") else
                        0.1 * w if w.dim() == 1 else w * (2 / w[0].numel()) ** 0.5)
    return weights

def test_inception_equals_pytorch_fid_and_other_weights_are_refused_with_the_reason():
    torch.save({"fc.bias": torch.zeros(1000)}, "google.pth")
    torch.save({"fc.bias": torch.zeros(1008)}, "other.pth")
    for path, *words in (("google.pth", "torchvision", "1000", "2015"), ("other.pth", "not FID's"),
                         ("none.pth", evaluate.INCEPTION_URL, "--inception-weights", "none.pth")):
        message = raises(InputError, evaluate.load_inception, path)
        assert all(word in message for word in words) and "\n" not in message, message
    v, seen = vector("inception_fid.pt"), []
    torch.save(made_up_inception(), "made_up.pth")
    net = evaluate.load_inception("made_up.pth")
    assert {k: tuple(w.shape) for k, w in net.state_dict().items()} == v["shapes"]
    assert len(net.hash) == 8                              # which stands beside each FID
    size = v["features"].abs().max()
    close(net(v["images"]) / size, v["features"] / size, 1e-4)
    net.Mixed_6d.branch1x1.register_forward_hook(lambda m, x, y: seen.append(y))
    features, spatial, logits = net.outputs(v["images"][:1])
    close(spatial.view(17, 17, 7), seen[0][0, :7].permute(1, 2, 0), 0)     # sFID: ADM's order
    close(logits, features @ net.fc.weight.T, 1e-3)        # IS: 1,008 of them, without the bias
    assert logits.shape == (1, 1008)
    net.fast = True                                        # bfloat16: the same to two digits
    close(net(v["images"][:1]) / size, v["features"][:1] / size, 0.03)

def test_clean_resize_is_pillows_antialiased_bicubic():
    net, x, seen = evaluate.InceptionV3("clean"), (random_images(1, 400) * 127.5 + 127.5).byte(), []
    net.Conv2d_1a_3x3.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]) or 1 / 0)
    raises(ZeroDivisionError, net, x)                      # the first layer is far enough
    plane = Image.fromarray(x[0, 0].numpy().astype(np.float32))            # mode F: not rounded
    expected = np.asarray(plane.resize((299, 299), Image.BICUBIC)).clip(0, 255)
    close(seen[0][0, 0], (expected - 128) / 128, 1e-4)

def moments(rows):
    """Mean and covariance of rows (N, D), by numpy."""
    return rows.mean(0), np.cov(rows, rowvar=False)

def test_running_statistics_are_numpys_and_do_not_grow():
    for offset, digits in ((0, 1e-12), (1e7, 1e-7)):       # whose squares would cancel
        rows, running = torch.randn(1000, 8, dtype=torch.float64) + offset, evaluate.Statistics()
        for part in rows.split(300):                       # the last one is short
            running.add(part)
        for ours, numpys in zip(running.moments(), moments(rows.numpy()), strict=True):
            close(ours, numpys, digits)
    assert sum(v.numel() for v in vars(running).values() if torch.is_tensor(v)) == 8 + 8 + 64

def test_frechet_distance_by_hand_and_by_pytorch_fid():
    rng, distance = np.random.default_rng(0), evaluate.frechet_distance
    s1, s2, mu = rng.random((3, 32))
    expected = (mu**2).sum() + ((s1 - s2) ** 2).sum()      # Gaussians with diagonal covariances
    for q in (np.eye(32), np.linalg.qr(rng.normal(size=(32, 32)))[0]):     # turning changes nothing
        sigma1, sigma2 = (q @ np.diag(s**2) @ q.T for s in (s1, s2))
        close(distance(0 * mu, sigma1, q @ mu, torch.from_numpy(sigma2)), expected, 1e-10)
    mu, sigma = moments(rng.normal(size=(300, 512)) @ rng.normal(size=(512, 512)))
    close(distance(mu, sigma, mu, sigma), 0, 1e-6 * np.trace(sigma))       # singular
    mu, eye = np.zeros(2), np.eye(2)
    for bad, word in (([[1, 2], [2, 1.0]], "covariance"), ([[0, 1], [1, 0.0]], "covariance"),
                      (eye * np.nan, "NaN")):
        assert word in raises(ValueError, distance, mu, np.array(bad), mu, eye)
    assert "do not compare" in raises(ValueError, distance, mu, eye, np.zeros(3), np.eye(3))
    v = vector("fid_reference.npz")
    for name in ("full", "singular"):
        ours = distance(*moments(v[f"{name}_a"]), *moments(v[f"{name}_b"]))
        close(ours / v[f"{name}_fid"], 1, 1e-6)

def test_kid_is_the_mean_over_pairs_and_unbiased():
    a, b = torch.randn(6, 4), torch.randn(5, 4) + 1
    def k(x, y):
        return (x @ y.T / 4 + 1) ** 3                      # (N, M), pair by pair
    def within(x):                                         # no image is paired with itself
        return k(x, x)[~torch.eye(len(x), dtype=torch.bool)].mean()
    close(evaluate.kid(a, b), within(a) + within(b) - 2 * k(a, b).mean(), 1e-4)
    draws = [evaluate.kid(torch.randn(16, 4), torch.randn(16, 4)) for _ in range(400)]
    close(np.mean(draws), 0, 4 * np.std(draws) / 20)       # of one distribution: 0 on average
    assert min(draws) < 0                                  # unbiased is not clamped

def test_precision_and_recall_by_hand():
    real = torch.tensor([[0.0], [1], [2], [3], [10]])      # to the third neighbour: 3 2 2 3 9
    fake = torch.tensor([[2.5], [5.5], [19.5], [-2.5], [2.6]])  # all inside but for 19.5, 9.5 away
    close(evaluate.precision_recall(real, fake), [0.8, 1.0], 1e-6)
    same = torch.randn(50, 8)
    assert evaluate.precision_recall(same, same) == (1, 1)
    assert evaluate.precision_recall(same, same + 100) == (0, 0)
    one_mode = same[:1] + 0.01 * torch.randn(50, 8)        # fakes all alike: precise, not varied
    precision, recall = evaluate.precision_recall(same, one_mode)
    assert precision == 1 and recall <= 0.02
    d, index = evaluate.nearest(same[20:23], same.split(7), 2)             # over several batches
    assert index[:, 0].tolist() == [20, 21, 22] and (d[:, 0] < 0.01).all()
    close(d[:, 1], torch.cdist(same[20:23], same).sort().values[:, 1], 1e-4)

class TinyNet(torch.nn.Module):
    """Stands in for Inception: features are means of colours, in a moment."""
    hash, resize, fast = "tiny", "pytorch-fid", False

    def outputs(self, images):
        x = images.float().mean((2, 3))                    # (N, 3)
        return x, x[:, :2], x / 10

    def forward(self, images):
        return self.outputs(images)[0]

def tiny_net(path, resize, fast):
    """In place of evaluate.load_inception."""
    net = TinyNet()
    net.resize = resize
    return net

tiny_inception = patch(evaluate, "load_inception", tiny_net)

def test_scores_are_means_over_images_and_rfid_is_of_sets():
    a, b = (torch.randint(0, 256, (10, 3, 16, 16), dtype=torch.uint8) for _ in range(2))
    args = SimpleNamespace(device="cpu", nets=(
        lambda x, y: (x - y).abs().amax((1, 2, 3), keepdim=True), TinyNet()))  # takes [-1, 1]
    row, real = evaluate.scores(zip(a.split(4), b.split(4)), args)         # the last has two
    error = (a.double() - b.double()).abs()                # (10, 3, 16, 16)
    close(row["L1"], error.mean() / 255, 1e-9), close(row["PSNR"], evaluate.psnr(a, b).mean(), 1e-9)
    close(row["SSIM"], evaluate.ssim(a, b).mean(), 1e-9)
    close(row["LPIPS"], error.amax((1, 2, 3)).mean() / 127.5, 1e-5)
    colours = [x.double().mean((2, 3)).numpy() for x in (a, b)]
    close(row["rFID"], evaluate.frechet_distance(*moments(colours[0]), *moments(colours[1])), 1e-4)
    close(evaluate.scores([(a, b)], args, real)[0]["rFID"], row["rFID"], 1e-4)  # real ones reused

def test_inception_score_and_kept_features():
    sure = evaluate.Features(SimpleNamespace(outputs=lambda x: (x, x, 100 * x)), pairs=5)
    for part in torch.eye(4).repeat(2, 1).split(3):        # four classes, no doubt: IS = 4
        sure.add(part)
    close(sure.inception_score(), 4, 1e-6)
    assert torch.equal(torch.cat(sure.kept), torch.eye(4).repeat(2, 1)[:5])
    flat = evaluate.Features(SimpleNamespace(outputs=lambda x: (x, x, 0 * x)))
    flat.add(torch.eye(4))                                 # says nothing of any image: IS = 1
    close(flat.inception_score(), 1, 1e-6)
    assert flat.kept == []                                 # not even an empty slice of a batch

def test_separation_of_known_tokens():
    group, image, z = torch.arange(4000) % 2, torch.arange(4000) // 20, torch.randn(4000, 3)
    mixed = evaluate.separation(z, group, image)           # no order at all
    close(mixed["sigma^2"], 1, 0.01), close(mixed["probe"], 0.5, 0.05)
    assert mixed["rho"] < 0.1 and mixed["chance"] == 0.5
    z[:, 0] += 6 * group                                   # variance 1 within, 9 between: 1 + 9
    apart = evaluate.separation(z, group, image)
    close(apart["sigma^2"], (0.1 + 1 + 1) / 3, 0.01)
    close(apart["rho"], 6 / math.sqrt(10) / math.sqrt(0.1 + 1 + 1), 0.03)
    assert apart["probe"] > 0.99
    scaled = evaluate.separation(z * torch.tensor([9, 1, 0.1]) + 5, group, image)
    close(scaled["rho"], apart["rho"], 1e-4)               # units of a channel do not matter

def test_face_levels_are_what_was_drawn():
    run = SimpleNamespace(args=SimpleNamespace(n=24, batch=10),
                          model=SimpleNamespace(img_size=32, patch_size=4),
                          encode=lambda x: F.avg_pool2d(x.float(), 4))     # z is a patch's colour
    levels = evaluate.face_levels(run)
    assert list(levels) == ["object", "part", "pattern"]   # the paper's
    (_, kind, image), (z, part, _), (skin, _, _) = levels.values()
    kinds = Faces(32, "val").render(range(24))[1]
    assert torch.equal(kinds[image], kind) and set(part.tolist()) <= set(range(5))
    assert len(skin) == (part == 2).sum() and z.shape[1] == 3 and 0 < len(kind) < len(part)
    assert evaluate.separation(*levels["part"])["rho"] > 0.5               # parts have colours

def test_noise_on_the_latent_has_the_channels_scale():
    z = torch.randn(64, 3, 8, 8) * torch.tensor([1.0, 5, 20]).view(1, 3, 1, 1)
    noise = evaluate.perturb(z, 0.1) - z
    close(noise.std((0, 2, 3)), 0.1 * z.std((0, 2, 3)), 0.05)
    close(evaluate.perturb(z, 0.2) - z, 2 * noise, 1e-4)   # the same noise, larger
    assert torch.equal(evaluate.perturb(z, 0), z)
    x = torch.randint(96, 161, (40, 3, 16, 16), dtype=torch.uint8)
    run = SimpleNamespace(path="pixels", encode=lambda x: x / 127.5 - 1, decode=vmae.to_uint8,
                          held_out=lambda: (40, ((part, None) for part in x.split(16))))
    Path("pixels").touch()
    with patch(evaluate, "Run", lambda path, args: run):   # the image is the latent
        rows = measured("smoothness", "--ckpt pixels --eps 0.2 0.5")
    for row in rows:  # the PSNR of the noise alone; 1/12: rounding
        noise = (row["eps"] * x.float().std().item()) ** 2 + 1 / 12
        close(row["PSNR"], 10 * math.log10(255**2 / noise), 0.1)


# ---- Evaluation: commands ---------------------------------------------------------------------

def test_efficiency_is_the_papers_table_3():
    numbers = ("319.7", "42.69", "13.4%", "17,331.3", "701.4", "4.0%", "703.9", "4.1%", "895.2",
               "41.33", "4.6%", "11,191,604", "83,819,683")
    assert len(measured("efficiency", "", *(f"| {number} |" for number in numbers))) == 3
    with torch.device("meta"):                             # 2 x 3 -> 5; 4 queries, 6 keys of 8
        layer, rows = torch.nn.Linear(3, 5), torch.zeros(2, 3)
        qkv = [torch.zeros(1, n, 8) for n in (4, 6, 6)]
    assert evaluate.multiply_adds(layer, rows)[1:] == (30, 0)
    assert evaluate.multiply_adds(F.scaled_dot_product_attention, *qkv)[1:] == (0, 2 * 4 * 6 * 8)
    args = SimpleNamespace(size=16, batch=2, device=torch.device("cpu"))
    row = evaluate.seconds(VMAE(**TINY_VMAE), args)        # --time
    assert list(row) == ["encode s", "decode s", "train s"] and min(row.values()) > 0

def test_every_figure_of_two_runs():
    save_images("data/left", 12), save_images("data/right", 12, seed=1)
    for name in ("vmae", "ae"):                            # a transformer, a convolutional body
        trained(f"--preset {name}", f"runs/{name}")
    text = runs(evaluate.main)                             # as a user types it, before stage two
    assert "skipped neighbours" in text and "(Fig. 2)" in text, text
    runs(train_ldm.main, "--steps 2 --batch 8")
    text = runs(evaluate.main)                             # and after it
    for name in "reconstruct smoothness separability efficiency neighbours compare".split():
        assert list(Path("runs").rglob(f"{name}.json")), name
        assert name == "efficiency" or list(Path("runs").rglob(f"{name}*.png")), name
    for words in ("skipped LPIPS", "skipped fid", "skipped times", "skipped generation"):
        assert words in text and "Inception weights" not in text
    data = "--data data --n 20 --batch 8 --device cpu"
    both = f"--ckpt runs/vmae/last.pt runs/ae/last.pt {data}"
    exact, noisy = measured("reconstruct", both), measured("smoothness", f"{both} --eps 0 0.5 2")
    assert noisy[0]["lost"] == noisy[3]["lost"] == 0       # no noise: as in Table 1
    for i, row in enumerate(noisy):
        close(row["lost"], exact[i // 3]["PSNR"] - row["PSNR"], 1e-9)
    levels = [row["level"] for row in measured("separability", data)]
    assert levels[-1] == "classes, object" and len(levels) == 4  # after three of the faces
    table = measured("compare", f"runs/vmae runs/ae/last.pt {data}")
    shapes = json.loads(Path("out/compare.json").read_text())["rescaled"]
    assert [row["run"] for row in table] == ["runs/vmae", "runs/ae/last.pt"]
    assert all({a, b} in ({0, 1}, {0}) for a, b in zip(*shapes.values(), strict=True))  # a tie is 0
    assert len(shapes["runs/vmae"]) == 4
    best = max(table, key=lambda row: row["pixels, dB"])["run"]
    dense = min(table, key=lambda row: row["compression, sigma^2"])["run"]
    assert shapes[best][2] == shapes[dense][1] == 1        # high is good, and low

@tiny_inception
def test_what_inception_adds_to_the_figures():
    both_stages()
    runs(train_ldm.main, "--steps 2 --batch 8 --objective flow --out runs/flow")
    few, ckpt = "--n 5 --batch 4 --inception-weights tiny.pth", "runs/ldm/last.pt"
    [drawn] = measured("fid", f"--fake {ckpt} {few}", "weights tiny")
    assert drawn["real"] == os.path.abspath("data") and drawn["N fake"] == 5   # as in training
    table = measured("compare", f"runs/ldm runs/flow {few}")
    close(table[0]["generation, gFID"], drawn["gFID"], 1e-6)
    assert table[1]["generation, gFID"] > 0                # rectified flow has its own sampler
    near = measured("neighbours", f"--ckpt {ckpt} {few}")
    assert [row["space"] for row in near] == ["pixels", "Inception"]
    assert all(row["ratio"] == row["samples"] / row["held-out"] for row in near)
    measured("fid", "--n 9 --cfg 2", "weights tiny")       # all defaults but these
    args = SimpleNamespace(n=9, batch=4, device="cpu", sampler=None, steps=50)
    first = next(evaluate.draw_samples(ckpt, args, 1.0))
    runs(sample.main, "--n 4 --cfg 1 --npz")
    same = np.load("samples/samples.npz")["arr_0"].transpose(0, 3, 1, 2)
    close(first, same.astype(float), 1)                    # the images of sample.py
    labels, weights = [], set()
    def sampler(model, schedule, z, y, w, steps, **options):
        labels.extend(y.tolist()), weights.add((w, steps))
        return z
    with mock.patch.dict(ldm.SAMPLERS, ddpm=(sampler, ("v",), {})):
        args.sampler = "ddpm"
        list(evaluate.draw_samples(ckpt, args, 3.0))
    assert labels == [0, 1, 0, 1, 0, 1, 0, 1, 0] and weights == {(3.0, 50)}    # classes in turn

@patch(evaluate, "JUDGED", 1024)
def test_the_judge_tells_a_perfect_generator_from_a_blind_and_a_repeating_one():
    with patch(Faces, "__len__", lambda self: 1536):       # a tenth of its training is enough here
        evaluate.load_judge()
    [kept] = Path("runs").glob("judge_*.pt")
    stamp, val = kept.stat().st_mtime_ns, Faces(32, "val")
    kind = val.render(range(400, 800))[1]
    turns = torch.stack([torch.where(kind == k)[0][:16] for k in range(4)], 1).flatten() + 400
    drawn = {"perfect": val.batch(turns)[0],               # fresh faces, the kinds in turn
             "blind": torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8),
             "same": val.batch(turns[:1])[0].expand(64, -1, -1, -1)}
    run = SimpleNamespace(trained={"data": None}, model=SimpleNamespace(img_size=32),
                          again=lambda x: x)
    for name in drawn:
        Path(name).touch()
    with (patch(evaluate, "Run", lambda path, args: run),
          patch(evaluate, "draw_samples", lambda path, args, w: drawn[path].split(32)),
          patch(vmae, "read_checkpoint", lambda path: {"classes": list(vmae.OBJECTS)})):
        rows = measured("faces", f"--ckpt {' '.join(drawn)} --n 64")
    assert kept.stat().st_mtime_ns == stamp                # read, not trained again
    assert [row["images"] for row in rows[:4]] == ["held out", "reconstructed", "samples, w = 1.0",
                                                   "samples, w = 1.5"]
    held_out, perfect, blind, same_face = rows[0], rows[2], rows[6], rows[10]
    assert min(held_out["requested"], perfect["requested"]) > 0.9 and blind["requested"] < 0.6
    assert same_face["requested"] == 0.25                  # right in one turn of four
    assert max(held_out["distance"], perfect["distance"]) < 0.2 * blind["distance"]
    assert perfect["distance"] < 0.3 * same_face["distance"]
    assert perfect["recall"] > 0.5 and blind["precision"] == 0 and same_face["recall"] < 0.2
    with (patch(evaluate, "Run", lambda path, args: run),
          patch(vmae, "read_checkpoint", lambda path: {"train_args": {"data": "photographs"}})):
        refuses(evaluate.main, {"faces --ckpt perfect --n 64": "not on the faces"})
    stripes = torch.arange(32).repeat(64, 3, 32, 1)
    drawn["few"], drawn["many"] = (stripes.where(stripes < 5, 0).byte() for stripes in (
        stripes - 32 * (torch.arange(32).view(-1, 1) > 1), stripes))       # 2 or 32 pixels of each
    class Judge(torch.nn.Module):
        """Sees part k where a pixel is k."""
        def forward(self, x):
            return x.float().mean((2, 3)), x[:, 0, :2, 0], x[:, 0, 0], F.one_hot(
                x[:, 0].long().clamp(max=4), 5).permute(0, 3, 1, 2)
    Path("few").touch(), Path("many").touch()
    with (patch(evaluate, "Run", lambda path, args: run), patch(evaluate, "load_judge", Judge),
          patch(evaluate, "draw_samples", lambda path, args, w: drawn[path].split(32)),
          patch(evaluate, "frechet_distance", lambda *args: 0.0),
          patch(vmae, "read_checkpoint", lambda path: {"classes": []})):
        rows = measured("faces", "--ckpt few many --n 64")
    assert [row["complete"] for row in rows if "samples" in row["images"]] == [0, 1]

def test_generators_of_the_faces_are_compared_by_the_judge():
    both, few = "runs/two0 runs/two1", "--n 16 --batch 8"
    judge = evaluate.Judge().eval().requires_grad_(False)  # an untrained one will do
    with (patch(Faces, "__len__", lambda self: 64), patch(evaluate, "load_judge", lambda: judge),
          patch(evaluate, "JUDGED", 64)):
        runs(train_vmae.main, "--steps 2 --batch 4 --size 16 --out runs/one")
        for seed in (0, 1):
            runs(train_ldm.main, f"--steps 2 --vmae runs/one --seed {seed} --out runs/two{seed}")
        rows = measured("faces", f"--ckpt {both} {few} --cfg 1 2")
        others = measured("faces", f"--ckpt runs/two0 {few} --cfg 1 --steps 3 --sampler ddpm")
        table = measured("compare", f"{both} {few}")
        refuses(evaluate.main, {"--sampler euler": "choose from ddim, ddpm",
                                "--steps 1001": "at most the 1000"}, "faces --ckpt runs/two0 --n 8")
    at = {(row["checkpoint"][:9], row["images"]): row["distance"] for row in rows}
    axis = {row["run"]: row["generation, distance"] for row in table}
    assert axis["runs/two0"] == at["runs/two0", "samples, w = 1.0"] != axis["runs/two1"]
    assert len({*at.values(), others[2]["distance"]}) == 7     # 2 + 2 + 2 of one stage one, and 1
    shapes = json.loads(Path("out/compare.json").read_text())["rescaled"]
    assert shapes[min(axis, key=axis.get)][4] == 1         # a small distance is the outer ring

@tiny_inception
def test_fid_from_every_source():
    real, fake = save_images("real", 20, 16), save_images("fake", 21, 16, seed=1)
    Image.new("RGB", (99, 99)).save("fake/grid.png")       # sample.py's overview
    np.savez("fake.npz", arr_0=fake)
    def fid(options):
        """The row of the table; beside it, what a FID has to be read with."""
        return measured("fid", f"{options} --batch 8", "under 2,048", "tiny", "pytorch-fid")[0]
    row = fid("--real real --fake fake --save-stats new/stats")
    mu, sigma = moments(real.mean((1, 2)))
    close(row["FID"], evaluate.frechet_distance(mu, sigma, *moments(fake.mean((1, 2)))), 1e-4)
    assert (row["N real"], row["N fake"]) == (20, 21)      # without grid.png
    assert {"sFID", "IS", "KID x 1e3", "precision", "recall"} <= set(row)
    stats = np.load("new/stats.npz")
    close(stats["mu"], mu, 1e-3), close(stats["sigma"], sigma, 1e-3)
    # The same numbers from ADM's .npz of images, and from pytorch-fid's of statistics.
    for source in ("real", "new/stats.npz"):
        again = fid(f"--real {source} --fake fake.npz")
        close(again["FID"], row["FID"], 1e-6), close(again["sFID"], row["sFID"], 1e-6)
    assert "KID x 1e3" not in again and again["N real"] == 20  # statistics hold no pairs
    np.savez("plain.npz", mu=stats["mu"], sigma=stats["sigma"])
    plain = fid("--real plain.npz --fake fake.npz")
    assert "sFID" not in plain                             # nor pytorch-fid's any sFID
    close(plain["FID"], row["FID"], 1e-6)
    assert fid("--real faces --fake fake --n 12")["N real"] == 12
    close(fid("--real real --fake real")["FID"], 0, 1e-3)  # of a set from itself
    np.savez("odd.npz", mu=np.zeros(9), sigma=np.eye(9))
    save_images("none", 0), Image.new("RGB", (99, 99)).save("none/grid.png")
    refuses(evaluate.main, {
        "--fake none --real faces": "no images", "--fake fake": "--real", "--fake no.pt": "no such",
        "--fake fake --real faces --n 1": "one image has no", "--fake fake --real no": "no such",
        "--fake fake --real no.npz": "no.npz", "--fake new/stats.npz --real faces": "arr_0",
        "--fake fake --real odd.npz": "odd.npz: mu and sigma",
        "--fake fake --real new/stats.npz --resize clean": "was made with resize pytorch-fid",
        "--fake fake --real faces --n 0": "--n"}, "fid --out nowhere")

def test_pictures_are_drawn():
    evaluate.plot("a.png", {"one": [(0, 1), (1, 3)], "two": [(0, 2), (1, 2)]}, "x", "y")
    evaluate.plot("one.png", {"a/" * 99: [(0.2, 31.0)]}, "x", "y")         # one value, a long name
    args = SimpleNamespace(out="out", nets=(None, None), function=evaluate.fid)
    evaluate.report(args, "title", [{"a": math.nan, "b": 1.0}])
    assert json.loads(Path("out/fid.json").read_text())["rows"] == [{"a": None, "b": 1.0}]
    evaluate.radar("b.png", ["a", "b", "c"], {"one": [0, 1, 0.5], "two": [1, 0, 1]})
    for name in ("a.png", "b.png"):
        picture = np.array(Image.open(name))[:330].reshape(-1, 3)          # above the names
        for colour in evaluate.COLOURS[:2]:                # one a curve
            rgb = [int(colour[i:i + 2], 16) for i in (1, 3, 5)]
            assert (abs(picture - rgb) < 12).all(1).sum() > 60, (name, colour)


# ---- Kills, many processes, hostile files -----------------------------------------------------

def in_child(code, *args, torchrun=0):
    """Run Python code in a fresh process, or in several -> what it said. One thread, 5 minutes."""
    Path("child.py").write_text(f"import sys\nsys.path.insert(0, {str(HERE)!r})\n{code}")
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(torchrun)] if torchrun else []
    ran = subprocess.run([sys.executable, *launch, "child.py", *map(str, args)], text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stdout
    return ran.stdout

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
        for pair in zip(a, b):
            same(*pair, tolerance)
    else:
        assert a == b

CHAIN = f"""
import os, random, time
from pathlib import Path
import train_vmae, train_ldm, ldm, sample, vmae
train_ldm.measure, ldm.sizes["tiny"] = lambda *args: {{}}, {small}
def main(script, line):
    sys.argv = ["script.py", *line.split()]
    script.main()
"""

def test_two_processes_are_one_run():
    save_images("data/left", 300, 16), save_images("data/right", 40, 16, seed=1)
    go = "--data data --precision float32 --batch 8 --micro 4 --steps 20 --save-every 10 --out"
    lines = [(train_vmae, f"{go} vmae --size 16 --lambda-p 0"),
             (train_vmae, f"{go} sdvae --size 16 --preset sdvae --lambda-p 0"),  # adversary from 10
             (train_vmae, f"{go} tuned --size 32 --init vmae --tune decoder --lambda-p 0"),
             (train_ldm, f"{go} ldm --vmae vmae"),
             (sample, "--ckpt other --n 10 --batch 4 --steps 2")]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                               # sums depend on their number
    for script, line in (lines[0], (train_ldm, f"{go} other --vmae vmae"), *lines[1:]):
        with patch(train_ldm, "measure", return_value={}):
            runs(script.main, line)
    torch.set_num_threads(threads)
    names = [path for path in Path().rglob("*") if path.suffix in (".pt", ".png")
             and "preview" not in path.name and path.parts[0] not in ("data", "other")]
    for name in {name.parts[0] for name in names}:
        os.rename(name, f"one_{name}")
    code = "".join(f"    main({script.__name__}, {line!r})\n" for script, line in lines)
    in_child(f"{CHAIN}def everything():\n{code}vmae.cli(everything)", torchrun=2)
    assert len(names) == 4 + 11 + 4, names              # of runs, of images, of the caches
    for name in names:                                     # weights, images, and the two caches
        one = Path(f"one_{name}")
        if name.suffix == ".pt":
            same(load(one), load(name), 1e-5)
        else:
            assert one.read_bytes() == name.read_bytes(), name
    for run in ("vmae", "ldm"):                            # means over all processes
        for a, b in zip(log_of(f"one_{run}"), log_of(run), strict=True):
            assert a.keys() == b.keys()
            for key in a.keys() - {"images_per_s"}:
                close(a[key], b[key], 1e-4)
    fail = "vmae.random_flip = lambda x, g: open('no such') if vmae.RANK == 1 else x\n"
    line = f"vmae.cli(lambda: main(train_vmae, '{go} none --size 16 --lambda-p 0'))"
    text = raises(AssertionError, in_child, CHAIN + fail + line, torchrun=2)   # no hang
    assert "process 0 stops, because" in text and "error: no such: No such file" in text, text

def test_killed_at_any_moment_the_same_line_ends_in_the_same_weights():
    save_images("data", 600, 16)
    saves = 100 if LONG else 6                             # enough for most kills to find one
    go = f"--data data --precision float32 --batch 4 --resume --save-every 4 --steps {4 * saves}"
    lines = (f"{go} --size 16 --preset sdvae --lambda-p 0 --out PLACE/sdvae",
             f"{go} --vmae PLACE/sdvae --out PLACE/ldm")
    said = in_child(CHAIN + f"""
import torch._dynamo                            # AdamW does, which takes seconds in each fork
def fork(script, line, seconds=None):           # nothing has run here yet, so a fork is safe
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        vmae.cli(lambda: main(script, line))
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, 9)
    return os.waitpid(child, 0)[1]

kills = between = 0                             # between: after the first save, before the last
for script, line in zip((train_vmae, train_ldm), {lines}):
    start = time.time()
    assert fork(script, line.replace("PLACE", "whole")) == 0
    longest, moment = time.time() - start, random.Random(0)
    for _ in range(n := int(sys.argv[1]) // 2):
        after = moment.uniform(0, 2 * longest / n)
        kills += fork(script, line.replace("PLACE", "parts"), after) == 9
        log = Path(line.replace("PLACE", "parts").split()[-1], "log.jsonl")
        between += log.exists() and 0 < log.read_text().count("\\n") < {saves}
    assert fork(script, line.replace("PLACE", "parts")) == 0
print(kills, between)
""", 50 if LONG else 6)
    kills, between = map(int, said.split()[-2:])
    assert kills >= (40 if LONG else 3) and between >= (12 if LONG else 1), said
    for run in ("sdvae", "ldm"):
        same(load(f"whole/{run}/last.pt"), load(f"parts/{run}/last.pt"))   # bit by bit
        steps = [s for s in range(1, 4 * saves + 1) if s % 4 == 0 or s % 50 == 0]  # that are logged
        assert [line["step"] for line in log_of(f"parts/{run}")] == steps

def hostile(folder, count):
    """Write `count` images that somebody damaged -> {name: pixels} of those that are sound."""
    rng, good = np.random.default_rng(0), {}
    Path(folder).mkdir()
    for i in range(count):
        pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
        kind = ("jpeg", "png", "webp", "gif", "tiff", "bmp")[i % 6]
        name, buffer = f"{i:04d} ä\n.{kind}" if i % 9 == 0 else f"{i:04d}.{kind}", io.BytesIO()
        image = Image.fromarray(pixels).convert(("RGB", "L", "CMYK", "1", "P", "LA")[i // 6 % 6]
                                                if kind == "tiff" else "RGB")
        exif = {} if kind == "tiff" else dict(exif=b"Exif\0\0II*\0\b\0\0\0" + rng.bytes(60))
        image.save(buffer, kind, icc_profile=rng.bytes(60), **exif)
        data, how = bytearray(buffer.getvalue()), i // 6 % 5
        if how == 1:                                       # cut off
            data = data[:rng.integers(len(data))]
        elif how == 2:                                     # some bits flipped
            for at in rng.integers(0, len(data), 8):
                data[at] ^= 1 << rng.integers(8)
        elif how == 3:
            data = (b"", b"no image", data[::-1])[i % 3]
        elif kind in ("png", "bmp"):
            good[name] = pixels
        Path(folder, name).write_bytes(data)
    bomb = b"BM" + bytes(8) + (54).to_bytes(4, "little") + (40).to_bytes(4, "little")
    Path(folder, "bomb.bmp").write_bytes(bomb + (60000).to_bytes(4, "little") * 2 + bytes(40))
    Image.fromarray(np.full((20, 20), 999, np.uint16)).save(Path(folder, "i16.png"))
    Path(folder, "folder.jpg").mkdir(), os.symlink("..", Path(folder, "folder.jpg", "loop"))
    os.symlink("nowhere", Path(folder, "broken.png"))
    return good

def test_hostile_images_are_named_once_and_harm_nothing():
    good = hostile("data", 1000 if LONG else 100)
    code = CHAIN + "vmae.MAX_UNREADABLE = 0.9\n"
    code += "vmae.cli(lambda line=sys.argv[1]: main(train_vmae, line))"
    go = f"{TINY_RUN} --steps 30 --batch {40 if LONG else 8} --save-every 99 --size 20 --out"
    said = [in_child(code, f"{go} kept"),                  # two processes, which share the list
            in_child(code, f"{go} read --no-cache --micro 4", torchrun=2)]
    kept, read = ({json.loads(line) for line in open(f"{run}/unreadable.jsonl")}
                  for run in ("kept", "read"))             # two threads may both enter a name
    for text, names in zip(said, (kept, read)):
        assert len(names) == text.count("warning: skipped"), text
        assert f"{len(names)} so far" in text and f"{len(names) + 1} so far" not in text
    assert kept == read and {"bomb.bmp", "broken.png"} <= kept and len(kept) > 25
    assert not kept & good.keys()
    for name, pixels in good.items():
        close(vmae.read_image(f"data/{name}", 20), pixels.transpose(2, 0, 1), 0)

def test_hostile_files_are_one_line_and_execute_nothing():
    both_stages()
    ours, theirs = load("runs/vmae/last.pt"), load("runs/ldm/last.pt")
    class Payload:
        def __reduce__(self):
            return os.mkdir, ("pwned",)
    def changed(**entries):
        return {**ours, **entries}
    nan = {k: v * math.nan if v.is_floating_point() else v for k, v in ours["model"].items()}
    less, more = dict(list(ours["model"].items())[1:]), {**ours["model"], "extra": torch.zeros(1)}
    wide = dict(ours["model_args"], embed_dim=64)
    bad = {"payload": (Payload(), "not a checkpoint"), "list": ([1], "not a checkpoint"),
           "nan": (changed(model=nan), "NaN"), "less": (changed(model=less), "do not fit"),
           "more": (changed(model=more), "do not fit"),
           "wide": (changed(model_args=wide), "do not fit"),
           "half": ({"model_args": ours["model_args"]}, "neither stage one"),
           "tensor": ({"model": torch.zeros(3)}, "not a checkpoint"),
           "number": ({"vmae": 3}, "neither stage one"),
           "none": (changed(train_args=None), "not a checkpoint")}
    for name, (content, _) in bad.items():
        torch.save(content, f"{name}.pt")
    whole = Path("runs/vmae/last.pt").read_bytes()
    for name, data in (("cut.pt", whole[:-999]), ("empty.pt", b""),
                       ("lie.safetensors", (2**60).to_bytes(8, "little") + b"{}"),
                       ("lie2.safetensors", (60).to_bytes(8, "little") + b'{"a": {"dtype": "F32", '
                        b'"shape": [9], "data_offsets": [0, 99]}}  ')):
        Path(name).write_bytes(data)
    words = {f"{name}.pt": what for name, (_, what) in bad.items()}
    words |= dict.fromkeys(("cut.pt", "empty.pt", "lie.safetensors", "lie2.safetensors"),
                           "not a checkpoint")
    refuses(train_ldm.main, words, "--out new --vmae")
    refuses(sample.main, {f"--ckpt {name}": name for name in words} | {
        "--ckpt runs/vmae": "stage-two checkpoint"}, "--out new")
    for name, entries in (("nan", dict(ema={k: v * math.nan for k, v in theirs["ema"].items()})),
                          ("inner", dict(vmae={**theirs["vmae"], "model": nan})),
                          ("other", dict(model_args=dict(theirs["model_args"], depth=9)))):
        torch.save({**theirs, **entries}, f"{name}.pt")
        refuses(sample.main, {f"--ckpt {name}.pt": "NaN" if name == "inner" else name}, "--out new")
    for name in ("cut", "payload", "nan", "less", "wide", "half", "none"):  # as the run to resume
        os.makedirs(f"run_{name}"), shutil.copy(f"{name}.pt", f"run_{name}/last.pt")
        refuses(train_vmae.main, {f"--resume --steps 9 --out run_{name}": f"run_{name}/last.pt"})
    np.savez("objects.npz", arr_0=np.array([Payload()]))
    for name, images in (("floats", np.zeros((2, 8, 8, 3))), ("number", np.zeros((), "u1")),
                         ("square", np.zeros((2, 8, 8, 3), "u1")),
                         ("oblong", np.zeros((2, 8, 9, 3), "u1"))):
        np.savez(f"{name}.npz", arr_0=images)
    with tiny_inception:
        refuses(evaluate.main, {"objects.npz": "objects.npz", "floats.npz": "must be uint8",
                                "number.npz": "uint8 (N, H, H, 3)", "oblong.npz": "(N, 8, 8, 3)",
                                "faces --real square.npz": "must be uint8 (N, 32, 32, 3)"},
                "fid --real faces --out new --fake")
    assert not os.path.exists("pwned")

@contextlib.contextmanager
def files_up_to(size):
    """The system refuses to make a file larger than this, as if the disk were full."""
    import resource
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

def test_a_full_disk_is_one_line_at_every_write_and_loses_nothing():
    both_stages()
    before = {path: path.read_bytes() for path in Path("runs").rglob("*.pt")}
    both = "--steps 4 --resume"
    cases = [(train_vmae, f"{TINY_RUN} {both}", 9, "images.json"),
             (train_vmae, f"{TINY_RUN} {both}", 2000, "preview_000004.png"),
             (train_vmae, f"{TINY_RUN} {both}", 50000, "last.pt"),
             (train_vmae, f"{TINY_RUN} --out new", 9000, "images_"),
             (train_ldm, f"{both}", 100000, "last.pt"), (train_ldm, "--out two", 20000, "moments_"),
             (sample, "--n 2 --steps 1", 9, "samples.json"),
             (sample, "--n 2 --steps 1", 300, "samples/"),
             (sample, "--n 200 --steps 1 --npz", 120000, "samples.npz"),
             (evaluate, "reconstruct --out table", 9, "reconstruct.json"),
             (evaluate, "reconstruct --out table", 500, "reconstruct.png")]
    for script, line, size, word in cases:
        with files_up_to(size), patch(train_ldm, "measure", return_value={}):
            text = runs(script.main, line, status=1)
        last = text.splitlines()[-1].split("\r")[-1]
        assert word in last and "File too large" in last and "Traceback" not in text, text
        assert not list(Path().rglob("*.tmp")), line
    assert before == {path: path.read_bytes() for path in before}
    Path("file").touch()                                   # nothing can be written below a file
    for script, line in ((train_vmae, f"{TINY_RUN} --out file/run"), (train_ldm, "--out file/run"),
                         (sample, "--out file/run"), (evaluate, "reconstruct --out file/run")):
        assert "file" in (text := runs(script.main, line, status=1)).splitlines()[-1], text
        assert "sampling" not in text and "|---" not in text   # before the work


# ---- The scripts, as a user types them --------------------------------------------------------

def test_the_whole_chain():
    save_images("data/left", 20), save_images("data/right", 20)
    for line in (f"train_vmae.py {TINY_RUN} --steps 3 --save-every 2", "train_ldm.py --steps 3",
                 "sample.py --n 9 --steps 4 --npz --trajectory", "evaluate.py"):
        script, *args = line.split()
        ran = subprocess.run([sys.executable, HERE / script, *args], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
    assert "| PSNR |" in ran.stdout                        # evaluate.py's first table
    pictures = {path.name for path in Path("runs/vmae").glob("*.png")}
    assert pictures >= {"preview_000002.png", "preview_000003.png", "reconstruct.png"}
    log = log_of("runs/vmae")[-1]
    assert log["step"] == 3 and {"L_R", "L_M", "L_reg", "lr", "images_per_s"} <= set(log)
    ckpt = load("runs/ldm/last.pt")
    assert ckpt["classes"] == ["left", "right"]            # the names of the folders
    images = np.load("samples/samples.npz")["arr_0"]
    assert images.shape == (9, 16, 16, 3) and images.dtype == np.uint8
    assert np.array_equal(np.array(Image.open("samples/sample_000004.png")), images[4])
    grid = np.array(Image.open("samples/grid.png"))        # 8 a row, enlarged 4 times: the ninth
    assert np.array_equal(grid[72:136:4, :64:4], images[8]) and (grid[72:, 64:] == 255).all()
    assert Image.open("samples/trajectory.png").width > 16
    model, schedule, _ = ldm.load_ldm("runs/ldm/last.pt")
    assert schedule.T == 1000 and model.y_embedder.num_classes == 2
    name = "final_layer.linear.weight"                     # it is the average that samples
    assert torch.equal(model.state_dict()[name], ckpt["ema"][name])
    assert not torch.equal(ckpt["model"][name], ckpt["ema"][name])
    assert ckpt["ema"][name].abs().max() > 0               # where both started

def readme_commands():
    """Lines of README's code blocks as bash would run them, loops unrolled: "train_vmae.py --mask
    0" for example. Of lines that differ in numbers alone, the first."""
    if not shutil.which("bash"):
        raise unittest.SkipTest("no bash to read README's code blocks")
    text = (HERE / "README.md").read_text()
    script = 'pip() { :; }; python() { echo "$*"; }; torchrun() { echo "$*"; }\n'
    script += "\n".join(re.findall("```sh\n(.*?)```", text, re.DOTALL))
    ran = subprocess.run(["bash", "-ec", script], capture_output=True, text=True)
    assert ran.returncode == 0 and not ran.stderr, ran.stderr
    lines = re.findall(r"\w+\.py.*", ran.stdout)          # without torchrun's own options
    alike = {re.sub(r"\d[\d.e-]*", "0", line): line for line in lines[::-1]}
    return list(alike.values())[::-1]

@tiny_inception
@patch(Faces, "__len__", lambda self: 64)
@patch(evaluate, "JUDGED", 64)
@mock.patch.dict(ldm.sizes, small=small, base=small)
def test_every_command_of_the_readme_runs():
    save_images("path/left", 12), save_images("path/right", 12)
    save_images("CelebAMask-HQ/CelebA-HQ-img", 24)
    model = VMAE(16, 4, 48, 1, 12, latent_dim=4)           # the published files, but smaller
    torch.save(model.state_dict(), "vmae.pth")
    torch.save({"ema": ldm.DiT(4, **small, in_channels=4).state_dict()}, "lightningdit.pt")
    torch.save(dict(mean=torch.zeros(1, 4, 1, 1), std=torch.ones(1, 4, 1, 1)), "latents_stats.pt")
    tiny = {"train_vmae.py": "--steps 2 --batch 4 --size 16 --lambda-p 0 --precision float32",
            "train_ldm.py": "--steps 2 --batch 8", "sample.py": "--n 4 --steps 3",
            "evaluate.py faces": "--n 16 --steps 3", "evaluate.py efficiency": "--size 16",
            "evaluate.py": "", "evaluate.py separability": "--n 16"}
    ran = set()
    for line in readme_commands():
        script, *words = line.split()
        if script == "test_all.py":         # this one
            continue
        words = sum((sorted(map(str, Path().glob(w)))[:2] if "*" in w else [w] for w in words), [])
        if script == "evaluate.py" and words:              # a sub-command
            script += f" {words.pop(0)}"
        options = tiny.get(script, "--n 9 --batch 8")
        name, main = script.split(".py")[0], evaluate.main
        if name.startswith("train"):
            main = {"train_vmae": train_vmae, "train_ldm": train_ldm}[name].main
            preset = words[words.index("--preset") + 1] if "--preset" in words else "vmae"
            usual = "ldm" if name == "train_ldm" else "tuned" if "--tune" in words else preset
            out = words[words.index("--out") + 1] if "--out" in words else f"runs/{usual}"
            if "--resume" not in words:     # another section's run
                shutil.rmtree(out, ignore_errors=True)
        elif name == "sample":
            main = sample.main
        runs(main, f"{script.partition(' ')[2]} {' '.join(words)} {options}")      # to status 0
        ran.add(script)
    assert {*(f"evaluate.py{name}" for name in ("", " faces", " fid", " compare", " smoothness")),
            "train_vmae.py", "train_ldm.py", "sample.py"} <= ran

def test_sampling_depends_on_the_seed_alone_and_refuses_what_does_not_fit():
    both_stages()
    def drawn(options):
        """The images that sample.py stores, as integers."""
        runs(sample.main, f"--n 5 --steps 4 --npz {options}")
        return np.load("samples/samples.npz")["arr_0"].astype(int)
    for extra in ("", "--sampler ddpm", "--eta 0.5", "--clip 3"):  # also where noise is added
        one, two = drawn(f"{extra} --batch 5"), drawn(f"{extra} --batch 2")
        assert abs(one - two).max() <= 1 and len(np.unique(one, axis=0)) == 5
    Path("samples/sample_2026.png").write_text("the user's")
    go, limit = "--n 6 --steps 2 --batch 2", iter(range(2))
    with patch(sample, "draw", lambda *a, f=sample.draw, **k: f(*a, **k) if
               next(limit, None) is not None else sys.exit("killed")):
        runs(sample.main, f"{go} --out parts", status=1)
    assert len(stamps := [p.stat().st_mtime_ns for p in sorted(Path("parts").glob("s*.png"))]) == 4
    runs(sample.main, f"{go} --out parts")
    both = mock.Mock(wraps=vmae)
    with patch(vmae, "agree", both.agree), patch(vmae, "save_grid", both.save_grid):
        runs(sample.main, f"{go} --out whole")
    assert [call[0] for call in both.mock_calls][-2:] == ["agree", "save_grid"]    # all have drawn
    for i in range(6):                                     # four were kept, two drawn
        a, b = Path(f"parts/sample_{i:06d}.png"), Path(f"whole/sample_{i:06d}.png")
        assert a.read_bytes() == b.read_bytes() and (i > 3 or a.stat().st_mtime_ns == stamps[i])
    runs(sample.main, f"{go} --out parts --seed 1")        # another command keeps none
    assert a.read_bytes() != b.read_bytes()
    runs(sample.main, "--n 2 --steps 1")
    os.remove("samples/sample_2026.png")                   # which was left alone
    assert len(list(Path("samples").glob("sample_*.png"))) == 2            # three older ones gone
    text = runs(train_ldm.main, "--data data --no-classes --objective eps --schedule linear "
                "--steps 1 --batch 4 --out flat --drop 0.2")
    assert "--drop: has no effect" in text
    # Still on eps, linear, without classes; and with the stage one that its last.pt holds.
    os.rename("runs/vmae", "gone")
    runs(train_ldm.main, "--steps 2 --out flat --resume")
    os.rename("gone", "runs/vmae")
    runs(sample.main, "--ckpt flat/last.pt --n 2 --steps 2")
    runs(sample.main, "--n 2 --steps 2 --class 2")         # 0, 1, and neither: the null class
    refuses(sample.main, {
        "--ckpt flat/last.pt --class left": "unconditional", "--class up": "left, right",
        "--ckpt flat/last.pt --cfg 2": "unconditional", "--class 3": "left, right",
        "--ckpt flat/last.pt --steps 1001": "1000", f"--seed {10**20}": "--seed",
        "--ckpt runs/vmae/last.pt": "stage-two", "--ckpt nothing.pt": "no such checkpoint",
        "--sampler euler": "choose from ddim, ddpm", "--sampler ddpm --eta 1": "ddpm has no such",
        "--eta 2": "--eta", "--cfg nan": "--cfg"})
    go = "--init flat/last.pt --no-classes --batch 4 --out on --steps"
    runs(train_ldm.main, f"{go} 1"), runs(train_ldm.main, f"{go} 2 --resume")
    torch.save({"mean": "abc", "std": "abc"}, "words.pt")
    refuses(train_ldm.main, {
        "--init flat/last.pt --model base --no-classes --out new": "leave --model out",
        "--init flat/last.pt --stats words.pt --no-classes --out new": "words.pt: holds no mean",
        "--init flat/last.pt --schedule cosine --no-classes --out new": "linear",
        "--steps 3 --out flat --resume --objective v": "the run in flat has eps",
        f"{go} 3 --resume --schedule cosine": "the run in on has linear"})
    assert load("on/last.pt")["schedule"]["kind"] == "linear"  # --init's

def test_nothing_given_is_ignored_and_nothing_trained_is_overwritten():
    both_stages(), save_images("extra", 2)
    new, go = "--out new --size 16 --steps 9", "--steps 9 --resume"
    refuses(train_vmae.main, {                             # the same line again, or another one
        "--data data --size 16": "holds step 2",
        f"{go} --preset vmae --arch conv": "--arch conv: the",
        f"{go} --lambda-adv 0.1": "the run in runs/vmae has 0.0", f"{go} --seed 1": "--seed 1",
        f"{new} --val data": "leave --val out",
        f"{new} --init runs/vmae --model base": "--init",
        f"{new} --init runs/vmae/last.pt --arch conv": "decides the shape",
        "--data data/left --out runs/vmae --init runs/vmae --size 16": "holds step 2"})
    refuses(train_vmae.main, {
        "--resume --out runs/ldm": "the other stage", "--out data --data data": "of the images",
        f"{new} --vgg-weights vgg.pth": "--lambda-p"})
    words = "--kl-mean: has no effect|--whole: has no effect|--no-cache: has no effect".split("|")
    line = "--kl-mean free --whole 0.2 --no-cache --size 16 --steps 1 --batch 2"
    text = runs(train_vmae.main, f"--preset ae --model tiny {line} --out idle")
    assert all(word in text for word in words)
    text = runs(train_vmae.main, f"{line} --data data --lambda-p 0 --out busy")
    assert not any(word in text for word in words)
    runs(train_vmae.main, "--resume --save-every 7 --device auto --micro 2 --lr 1e-4 --steps 3 "
                          "--out busy --val ./data/../extra --data data/left")
    with patch(sys, "argv", "train_vmae.py --resume --steps 9 --out busy".split()):
        assert train_vmae.options()[0].micro == 2          # kept, as what is drawn depends on it
        with patch(train_vmae, "WORLD", 2):                # but one part is not enough for two
            assert train_vmae.options()[0].micro is None
    refuses(train_ldm.main, {"": "holds step 2", f"{go} --vmae runs/ldm": "--vmae",
                             f"{go} --no-classes": "the run in runs/ldm has False"})
    assert Path(load("runs/ldm/last.pt")["train_args"]["data"]) == Path("data").resolve()
    os.rename("data/right", "data/front")                  # labels would change their meaning
    refuses(train_ldm.main, {go: "name them as they were"})
    os.rename("data/front", "data/right")
    text = runs(train_ldm.main, "--init runs/ldm --data data --steps 1 --batch 4 --out same")
    os.rename("data/left", "data/west")
    other = runs(train_ldm.main, "--init runs/ldm --data data --steps 1 --batch 4 --out other")
    assert "starts anew" not in text and "starts anew" in other
    trained("--seed 1", "runs/other"), trained("--size 24", "runs/large")
    trained("--init runs/vmae --tune decoder", "runs/tuned")
    refuses(sample.main, {"--vmae runs/other": "has another encoder"}, "--out new")
    refuses(train_ldm.main, {"--init runs/ldm --vmae runs/other": "has another encoder"},
            "--out new")
    line = "--vmae runs/tuned --ckpt runs/ldm --n 2 --steps 1"              # the same encoder
    text = [runs(sample.main, f"{line} --seed {seed}") for seed in (0, 0, 1)]
    assert ["2 images of another command are deleted" in t for t in text] == [False, False, True]
    refuses(evaluate.main, {
        "reconstruct --ckpt runs/vmae runs/large": "do not compare",
        "compare runs/vmae runs/gone": "runs/gone: no such",
        "compare runs/vmae runs/vmae": "needs two runs",
        "compare runs/vmae runs/large": "do not compare",
        "fid --fake gone --real faces": "gone: no such"})
    ae = trained("--preset ae --init runs/vmae", "ae")     # a point, whatever it began as
    assert (ae.encode(random_images()).logvar == -30).all()

def test_a_folder_says_what_surprises_and_never_holds_our_own_output():
    both_stages()
    shutil.move("runs", "data/runs")
    os.mkdir("data/samples"), Path("data/samples/samples.npz").touch()     # somebody else's
    runs(sample.main, "--ckpt data/runs/ldm --n 2 --steps 1 --out data/samples")
    assert os.path.exists("data/samples/samples.npz")
    data = ImageFolder("data", 16)
    assert len(data) == 24 and data.classes == ["left", "right"]
    assert len(ImageFolder("data/samples", 16)) == 2       # asked for by name they are data
    with patch(vmae, "Folder", wraps=vmae.Folder) as reads:
        measured("reconstruct", "--data data --ckpt data/runs/vmae data/runs/ldm")
    assert reads.call_count == 1
    said = {}
    os.makedirs("deep"), shutil.copytree("data", "deep/data", symlinks=True)
    Image.new("RGB", (20, 20)).save("data/beside.jfif")
    for root in ("data", "deep", "deep/data"):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            vmae.open_images(root, 16)
        said[root] = out.getvalue()
    assert "24 images lie beside" not in said["data"] and "1 images lie beside" in said["data"]
    assert "name that one with --data" in said["deep"] and "classes" not in said["deep/data"]
    for name in ("samples", "runs/vmae", "runs/ldm"):
        assert f"deep/data/{name}: left out, as our scripts wrote it" in said["deep/data"]

def test_bad_input_is_one_line():
    save_images("data", 4), save_images("empty", 0), save_images("pixel", 1, size=1)
    save_images("text", 0), Path("text/a.jpg").write_text("not an image")
    torch.save({"weight": torch.zeros(1)}, "other.pth")    # weights, but not VGG's
    refuses(train_vmae.main, {
        "--data nowhere": "nowhere: no such folder", "--data empty": ".jpg",
        "--data text": "a.jpg: unreadable", "--data pixel": "1x1 pixels",
        "--mask 1.0": "--mask", "--mask -1": "--mask", "--mask 0.99": "leaves 0 of 16",
        "--size 18": "multiple of the patch", "--steps 0": "--steps", "--lr nan": "--lr",
        "--whole 7": "--whole", "--lambda-m -1": "--lambda-m", "--lr inf": "--lr",
        "--device abacus": "--device", "--device meta": "--device meta",
        "--vgg-weights text/a.jpg": "a.jpg cannot be read (Weights only load failed)",
        "--lambda-p 1 --vgg-weights no.pth": "no.pth cannot be read",
        "--vgg-weights other.pth": "other.pth cannot be read"}, "--data data --size 16")
    refuses(evaluate.main, {"": "runs/vmae/last.pt: no such", "efficiency --size 60": "--size",
                            "compare": "needs two runs", "smoothness --eps nan": "--eps"})
    unfit = {"no.pt": "no.pt: no such", "text/a.jpg": "text/a.jpg: not a check"}
    refuses(train_ldm.main, unfit, "--vmae"), refuses(evaluate.main, unfit, "reconstruct --ckpt")


# ---------------------------------------------------------------------------------------------

def run():
    """Run the tests whose names hold one of the words given; exit status 1 if any fails. All of
    them are shared out over two processes with one thread each, faster than two threads: each
    reads the number of its next test from a pipe."""
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    tests = [name for name in globals() if name.startswith("test_")
             and any(word in name for word in words or [""])]
    shared = "--shared" in sys.argv
    if not words and not shared:
        numbers, fill = os.pipe()
        os.write(fill, bytes(range(len(tests)))), os.close(fill)
        both = [subprocess.Popen([sys.executable, __file__, "--shared", *sys.argv[1:]],
                                 env={**os.environ, "OMP_NUM_THREADS": "1"}, stdin=numbers)
                for _ in range(2)]
        sys.exit(max(abs(process.wait()) for process in both))
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for name in (tests[n[0]] for n in iter(lambda: os.read(0, 1), b"")) if shared else tests:
        start, outcome = time.perf_counter(), "passed"
        try:
            setup_function()
            globals()[name]()
        except unittest.SkipTest as reason:
            outcome = "skipped"
            print(f"        {reason}")
        except BaseException:
            outcome = "failed"
            traceback.print_exc()
        counts[outcome] += 1
        print(f"{outcome:8}{time.perf_counter() - start:6.1f} s  {name[5:]}", flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    sys.exit(counts["failed"] > 0 or counts["passed"] == 0)

if __name__ == "__main__":
    run()

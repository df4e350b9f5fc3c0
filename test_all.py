"""The executable specification: closed forms, optimal denoisers, other people's numbers, real runs.

    python test_all.py              all of it, CPU only, no network, under two minutes on two cores
    python test_all.py mask cache   the tests with these words in their names
    pytest test_all.py              the same functions

Tests against ../shared/vectors (outputs of the authors' code and of scikit-image) skip without it.
"""
import argparse
import contextlib
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
import unittest
import warnings
import zlib
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
import ldm
import sample
import train_ldm
import train_vmae
import vmae
from vmae import VMAE, Faces, Gaussian, ImageFolder, InputError

HERE = Path(__file__).parent
VECTORS = HERE.parent / "shared" / "vectors"


def vector(name):
    """A recorded output of the original code, or a skip."""
    if not (VECTORS / name).exists():
        raise unittest.SkipTest(f"{VECTORS / name} is not here")
    if name.endswith(".npz"):
        return np.load(VECTORS / name)
    return torch.load(VECTORS / name, weights_only=True)


def close(a, b, tolerance):
    """Fail with the largest difference rather than with two tensors."""
    a, b = (v.detach().double() if torch.is_tensor(v) else torch.tensor(v, dtype=torch.float64)
            for v in (a, b))
    difference = (a - b).abs().max().item()
    assert difference <= tolerance, f"differs by {difference:.3g}, more than {tolerance:.3g}"


def raises(kind, function, *args, **kwargs):
    """The message of the expected exception."""
    try:
        function(*args, **kwargs)
    except kind as error:
        return str(error)
    raise AssertionError(f"{kind.__name__} was not raised")


def tiny_vmae(size=16, seed=0):
    torch.manual_seed(seed)
    return VMAE(img_size=size, patch_size=4, embed_dim=32, depth=2, num_heads=4, latent_dim=4)


def random_images(B=2, size=16, seed=0):
    return torch.rand(B, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def command(main, *argv):
    """Run a script's main in this process -> (exit status, what it printed)."""
    printed, old = io.StringIO(), (sys.argv, warnings.showwarning)
    sys.argv = ["script.py", *map(str, argv)]
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            vmae.cli(main)
        status = 0
    except SystemExit as stop:
        status = 0 if stop.code is None else stop.code if isinstance(stop.code, int) else 1
        printed.write(stop.code if isinstance(stop.code, str) else "")
    finally:
        sys.argv, warnings.showwarning = old
    return status, printed.getvalue()


def runs(main, *argv):
    """Run a command that has to succeed -> what it printed."""
    status, text = command(main, *argv)
    assert status == 0, text
    return text


def refuses(words, main, *argv):
    """Run a command that has to stop, with one line that holds `words` -> that line."""
    status, text = command(main, *argv)
    lines = [line for line in text.strip().splitlines() if "tensors read" not in line]
    assert status == 1 and len(lines) == 1 and words in lines[0], text
    return lines[0]


def save_images(folder, count, size=20, seed=0):
    """Photographs of noise, different from each other."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for i in range(count):
        pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(Path(folder, f"{i:03d}.png"))


# ---- Patches and masks ------------------------------------------------------------------------

def test_patchify_round_trip_is_exact():
    x = torch.randn(2, 3, 24, 16)
    patches = vmae.patchify(x, 4)
    assert patches.shape == (2, 24, 48)
    assert torch.equal(vmae.unpatchify(patches, 4, 24, 16), x)
    assert torch.equal(patches[0, 5].view(4, 4, 3).permute(2, 0, 1), x[0, :, 4:8, 4:8])
    raises(ValueError, vmae.patchify, x, 5)


def test_random_mask_shows_exactly_the_floor():
    for N in (10, 16, 64, 1024):
        for percent in (0, 10, 25, 30, 60, 75, 90):
            keep, mask = vmae.random_mask(3, N, percent / 100)
            V = math.floor(N * (1 - Fraction(percent, 100)))
            assert keep.shape == (3, V) and mask.sum(1).tolist() == [N - V] * 3
            assert mask.gather(1, keep).sum() == 0
    for ratio in (1.0, -0.1, 0.99):
        raises(ValueError, vmae.random_mask, 1, 16, ratio)


def test_random_mask_differs_by_sample_and_repeats_by_generator():
    a, _ = vmae.random_mask(64, 64, 0.6, torch.Generator().manual_seed(1))
    b, _ = vmae.random_mask(64, 64, 0.6, torch.Generator().manual_seed(1))
    assert torch.equal(a, b) and len(a.unique(dim=0)) == 64
    share = torch.zeros(64).scatter_add(0, a.flatten(), torch.ones(a.numel())) / 64
    assert share.min() > 0.1 and share.max() < 0.7         # no patch is favoured; expected .39


def test_masked_pixels_cannot_influence_the_latents():
    model, x = tiny_vmae(), random_images().requires_grad_()
    keep, mask = vmae.random_mask(2, 16, 0.6)
    q = model.encode_tokens(x, keep)
    (q.mu.square().sum() + q.logvar.square().sum()).backward()
    grad = vmae.patchify(x.grad, 4).abs().amax(-1)         # (B, N)
    assert grad[mask == 1].max() == 0 and grad[mask == 0].min() > 0


def test_encoder_works_on_visible_tokens_only():
    model, seen = tiny_vmae(), []
    for module in [model.patch_embed, model.norm, *model.blocks]:
        module.register_forward_hook(lambda m, inputs, output: seen.append(output.shape[1]))
    model(random_images(), 0.6)
    assert seen == [6] * 4                                 # floor(16 * .4)


def test_masking_saves_the_encoders_work_and_attention_is_fused():
    from torch.profiler import profile
    from torch.utils.flop_counter import FlopCounterMode
    model, x, work = VMAE(256, **vmae.sizes["base"]), random_images(1, 256), {}
    for ratio in (0.0, 0.6):
        keep, _ = vmae.random_mask(1, 1024, ratio)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.encode_tokens(x, keep)
        work[ratio] = counter.get_total_flops()
    assert work[0.6] <= 0.4 * work[0.0]                    # 409 of 1,024 patches, at most
    with profile() as log, torch.no_grad():
        model.blocks[0].attn(torch.randn(1, 1024, 192))
    names = {event.key for event in log.key_averages()}
    assert any("flash" in name for name in names) and "aten::softmax" not in names


# ---- Posterior and losses ---------------------------------------------------------------------

def test_kl_equals_torch_distributions():
    mu, logvar = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    q = torch.distributions.Normal(mu, (logvar / 2).exp())
    for mean, prior in (("zero", torch.distributions.Normal(0.0, 1.0)),
                        ("free", torch.distributions.Normal(mu, 1.0))):
        expected = torch.distributions.kl_divergence(q, prior).sum(1).mean()
        close(Gaussian(mu, logvar).kl(mean), expected, 1e-5)


def test_gaussian_samples_have_its_moments():
    q = Gaussian(torch.full((100000,), 3.0), torch.full((100000,), math.log(4.0)))
    z = q.sample(torch.Generator().manual_seed(0))
    close(z.mean(), 3, 0.02), close(z.std(), 2, 0.02)
    assert torch.equal(z, q.sample(torch.Generator().manual_seed(0)))
    assert torch.equal(q.mode(), q.mu)
    assert Gaussian(torch.zeros(1), torch.tensor([1e9])).sample().isfinite()


def test_nll_by_hand():
    # One image of two 1 x 1 patches, 3 colours. Errors: patch 0: 1, 2, 0; patch 1: 0, 0, 3.
    x = torch.tensor([1.0, 0, 2.0, 0, 0, 3.0]).view(1, 3, 1, 2)
    mask = torch.tensor([[0.0, 1.0]])
    constant = 0.5 * math.log(2 * math.pi)
    close(vmae.loss_R(x, 0 * x, mask, 1), 0.5 * (1 + 4 + 0) / 3 + constant, 1e-6)
    close(vmae.loss_M(x, 0 * x, mask, 1), 0.5 * (0 + 0 + 9) / 3 + constant, 1e-6)
    target, mean = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    log_prob = torch.distributions.Normal(mean, 1.0).log_prob(target)
    close(vmae.gaussian_nll(target, mean, torch.ones(2, 3)), -log_prob.mean(), 1e-6)
    assert vmae.gaussian_nll(target, mean, torch.zeros(2, 3)) == 0


def test_lpips_is_frozen_and_reads_vgg_from_a_file():
    generator = torch.Generator().manual_seed(0)
    widths, weights = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512], {}
    layers = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]  # numbers of VGG-16's convolutions
    for i, c_in, c_out in zip(layers, widths, widths[1:]):
        std = math.sqrt(2 / (9 * c_in))
        weights[f"features.{i}.weight"] = torch.randn(c_out, c_in, 3, 3, generator=generator) * std
        weights[f"features.{i}.bias"] = torch.zeros(c_out)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "vgg.pth")
        torch.save(weights, path)
        net = vmae.load_lpips(path)
        save_images(f"{folder}/data", 8)
        learnt = []
        for weight in (0, 1):
            runs(train_vmae.main, "--data", f"{folder}/data", "--size", 16, "--steps", 2, "--batch",
                 4, "--vgg-weights", path, "--lambda-p", weight, "--out", f"{folder}/{weight}")
            learnt.append(vmae.load_vmae(f"{folder}/{weight}/last.pt").to_latent.weight)
        tune = ["--init", f"{folder}/0/last.pt", "--tune", "decoder", "--vgg-weights", path,
                "--data", f"{folder}/data", "--steps", 1, "--batch", 2, "--out", f"{folder}/tuned"]
        assert command(train_vmae.main, *tune)[0] == 0
        tuned = torch.load(f"{folder}/tuned/last.pt", weights_only=True)["train_args"]
        assert (tuned["lambda_p"], tuned["mask"]) == (10, 0)               # the authors' stage 3
        assert not torch.equal(*learnt)
        assert "L_P" in Path(folder, "1", "log.jsonl").read_text()
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert torch.equal(net.net.slice5[-2].weight, weights["features.28.weight"])
    x = random_images(2, 32).requires_grad_()
    assert vmae.loss_P(net, x, x) == 0
    assert vmae.loss_P(net, x, -x) > vmae.loss_P(net, x, 0.9 * x) > 0
    vmae.loss_P(net, random_images(2, 32, 1), x).backward()
    assert x.grad.abs().max() > 0
    message = raises(InputError, vmae.load_lpips, "/nowhere/vgg.pth")
    assert "/nowhere/vgg.pth" in message and vmae.VGG_URL in message and "--vgg-weights" in message


def test_every_loss_weight_changes_what_is_learnt():
    with tempfile.TemporaryDirectory() as folder:
        save_images(f"{folder}/data", 24)

        def weights(*options):
            runs(train_vmae.main, "--data", f"{folder}/data", "--size", 16, "--steps", 2, "--batch",
                 4, "--lambda-p", 0, "--out", folder, *options)
            return vmae.load_vmae(f"{folder}/last.pt").to_latent.weight

        base = weights()
        close(base, weights(), 0)                          # the same seed, the same run
        for options in (["--lambda-m", 0], ["--lambda-reg", 1], ["--mask", 0.3], ["--whole", 1],
                        ["--seed", 1], ["--lambda-reg", 1, "--kl-mean", "zero"]):
            assert not torch.equal(base, weights(*options)), options
        assert not torch.equal(weights("--lambda-reg", 1),
                               weights("--lambda-reg", 1, "--kl-mean", "zero"))


# ---- VMAE -------------------------------------------------------------------------------------

def test_vmae_equals_the_authors():
    v = vector("vmae_official.pt")
    model = VMAE(**v["model_args"])
    close(model.pos_embed, v["state_dict"]["pos_embed"], 1e-6)
    model.load_state_dict(v["state_dict"])
    with torch.no_grad():
        q = model.encode(v["x"])
        close(torch.cat([q.mu, q.logvar], 1), v["moments"], 1e-4)
        close(model.decode(q.mode()), v["recon"], 1e-4)
        V = int((1 - v["mask"][0]).sum())
        keep = v["mask"].argsort(dim=1, stable=True)[:, :V]
        x_hat = model.decode_tokens(model.encode_tokens(v["x"], keep).mode(), keep)
    close(x_hat, v["pred_img"], 1e-4)
    constant = 0.5 * math.log(2 * math.pi)                 # our NLL is half their squared error
    close(2 * (vmae.loss_R(v["x"], x_hat, v["mask"], 8) - constant), v["vis_mse"], 1e-4)
    close(2 * (vmae.loss_M(v["x"], x_hat, v["mask"], 8) - constant), v["masked_mse"], 1e-4)


def test_base_is_the_papers_size():
    model = VMAE(256, **vmae.sizes["base"])
    assert sum(v.numel() for v in model.state_dict().values()) == 11_191_604   # 11.19 M, 42.7 MiB
    assert model.latent_dim == 16 and model.grid == 32                         # f8d16


def test_encode_and_decode_use_the_whole_grid():
    model, x = tiny_vmae(), random_images()
    q = model.encode(x)
    assert q.mu.shape == q.logvar.shape == (2, 4, 4, 4)
    assert model.decode(q.mode()).shape == x.shape
    x_hat, q_v, mask = model(x, 0.0)                       # mask 0 is the use-time path
    close(q_v.mu.view(2, 4, 4, 4), q.mu, 1e-6)
    assert mask.sum() == 0
    raises(ValueError, model.encode, random_images(1, 32))
    raises(ValueError, VMAE, img_size=30, patch_size=4)


# ---- Images -----------------------------------------------------------------------------------

def test_faces_repeat_whatever_the_batch():
    faces = Faces(32)
    x, kind, pattern, part = faces.render([5, 900, 17])
    assert x.shape == (3, 3, 32, 32) and part.shape == (3, 32, 32)
    assert x.min() >= -1 and x.max() <= 1 and x.std() > 0.2
    again = faces.render([900])
    close(again[0][0], x[1], 1e-6)
    assert again[1][0] == kind[1] and again[2][0] == pattern[1]
    assert torch.equal(again[3][0], part[1])
    assert not torch.equal(Faces(32, seed=1).render([5])[0][0], x[0])
    image, label = faces[17]
    close(image, x[2], 1e-6)
    assert label == kind[2]


def test_faces_have_all_levels_and_no_face_is_in_both_splits():
    train, val = Faces(8, "train"), Faces(8, "val")
    assert train.first + len(train) <= val.first and len(val) >= 256
    _, kind, pattern, part = Faces(32).render(range(64))
    assert kind.unique().tolist() == [0, 1, 2, 3] and pattern.unique().tolist() == [0, 1, 2]
    for face in part:
        assert face.unique().tolist() == [0, 1, 2, 3, 4]   # each part is seen on each face


def test_folder_reads_every_mode():
    with tempfile.TemporaryDirectory() as folder:
        colour = Image.new("RGB", (40, 30), (255, 0, 0))
        for mode in ("1", "L", "P", "CMYK"):
            colour.convert(mode).save(f"{folder}/{mode}.TIFF")
        Image.new("RGBA", (40, 30), (255, 0, 0, 0)).save(f"{folder}/RGBA.PNG")
        Image.new("LA", (40, 30), (0, 0)).save(f"{folder}/LA.png")
        Image.fromarray(np.full((30, 40), 32896, np.uint16)).save(f"{folder}/I16.png")
        data = ImageFolder(folder, 16)
        x = {Path(p).stem: data[i][0] for i, p in enumerate(data.paths)}
    assert len(x) == 7 and all(v.shape == (3, 16, 16) for v in x.values())
    close(x["RGBA"], 1, 0), close(x["LA"], 1, 0)           # transparent is white
    close(x["I16"], 32896 / 65535 * 2 - 1, 0.005)          # half of 16 bits is half
    close(x["P"].mean((1, 2)), torch.tensor([1.0, -1, -1]), 0.05)
    close(x["CMYK"].mean((1, 2)), torch.tensor([1.0, -1, -1]), 0.05)


def test_folder_crops_the_centre_and_turns_by_exif():
    with tempfile.TemporaryDirectory() as folder:
        pixels = np.zeros((20, 60, 3), np.uint8)
        pixels[:, 20:40] = 255                             # white in the middle third
        Image.fromarray(pixels).save(f"{folder}/wide.png")
        exif = Image.Exif()
        exif[0x0112] = 6                                   # turn by 90 degrees to view
        top = np.zeros((32, 32, 3), np.uint8)
        top[:, :16] = 255                                  # left half white: right way up, the top
        Image.fromarray(top).save(f"{folder}/phone.jpg", exif=exif, quality=95)
        data = ImageFolder(folder, 20)
        x = dict(zip(data.paths, (data[0][0], data[1][0])))
    close(x["wide.png"], 1, 0.01)
    assert x["phone.jpg"][:, :8].mean() > 0.9 and x["phone.jpg"][:, 12:].mean() < -0.9


def test_folder_classes_hidden_files_and_hold_out():
    with tempfile.TemporaryDirectory() as folder:
        for name in ("dog", "Cat"):
            save_images(f"{folder}/{name}/deep", 40)
        save_images(f"{folder}/.hidden", 3)
        Path(folder, "dog", "._000.png").write_bytes(b"Apple")
        Path(folder, "dog", "notes.txt").write_text("no image")
        whole = ImageFolder(folder, 16)
        assert whole.classes == ["Cat", "dog"] and len(whole) == 80
        assert [whole[i][1] for i in (0, 79)] == [0, 1]
        train, val = ImageFolder(folder, 16, "train"), ImageFolder(folder, 16, "val")
        assert sorted(train.paths + val.paths) == whole.paths and 1 <= len(val) <= 10
        save_images(f"{folder}/dog/more", 40, seed=1)      # adding files moves none across
        assert set(val.paths) <= set(ImageFolder(folder, 16, "val").paths)
        before = whole.fingerprint()
        os.utime(f"{folder}/dog/deep/000.png", (1, 1))
        assert whole.fingerprint() != before
        Image.new("RGB", (20, 20)).save(f"{folder}/beside.png")
        assert ImageFolder(folder, 16).classes == []


def test_folder_skips_a_few_broken_files_and_stops_at_many():
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save_images(folder, 200)
        cut = Path(folder, "100.png").read_bytes()
        Path(folder, "100.png").write_bytes(cut[:len(cut) // 2])   # sound header, no end
        Path(folder, "text.jpg").write_text("not an image")
        data = ImageFolder(folder, 16, keep=True)
        assert len(data) == 200 and any("text.jpg" in str(w.message) for w in caught)
        x, _ = data[data.paths.index("100.png")]
        close(x, data[data.paths.index("101.png")][0], 0)
        assert any("100.png" in str(w.message) for w in caught)
        Path(folder, "more.jpg").write_text("")
        Image.new("RGB", (1, 1)).save(f"{folder}/pixel.png")
        assert "over 1 %" in raises(InputError, ImageFolder, folder, 16)


def test_decompression_bomb_is_unreadable():
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 300
    try:
        with tempfile.TemporaryDirectory() as folder:
            save_images(folder, 1)                         # 400 pixels
            assert "over 1 %" in raises(InputError, ImageFolder, folder, 16)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


# ---- Schedule, loss, samplers -----------------------------------------------------------------

def test_schedule_runs_from_signal_to_noise():
    for kind in ("linear", "cosine"):
        for T in (100, 1000):
            bar = ldm.Schedule(kind, T).alpha_bar
            assert (bar[1:] < bar[:-1]).all() and bar[0] > 0.99 and bar[-1] < 1e-3
    linear = ldm.Schedule("linear").alpha_bar
    close(linear[0], 1 - 1e-4, 1e-12), close(linear[1] / linear[0], 1 - 1e-4 - 0.0199 / 999, 1e-9)
    middle = math.cos(0.508 / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)
    close(ldm.Schedule("cosine").alpha_bar[499], middle**2, 1e-9)          # 500 of 1000 steps done
    raises(ValueError, ldm.Schedule, "quadratic")


def test_steps_end_on_clean_latents():
    schedule = ldm.Schedule()
    for S in (1, 2, 3, 7, 50, 250, 333, 999, 1000):
        steps = schedule.steps(S)
        ts = [t for t, _, _ in steps]
        assert len(steps) == S and ts[0] == 999 and len(set(ts)) == S and min(ts) >= 0
        assert steps[-1][2] == 1.0
        assert all(a[2] == b[1] for a, b in zip(steps, steps[1:]))
    for S in (0, 1001):
        raises(ValueError, schedule.steps, S)


def test_objectives_invert_and_clipping_keeps_z_t():
    z_0, eps = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    for objective in ("eps", "v"):
        schedule = ldm.Schedule(objective=objective)
        for t in (0, 300, 900):
            ts = torch.full((4,), t)
            bar = schedule.alpha_bar[t].item()
            z_t = schedule.q_sample(z_0, ts, eps)
            a, b = schedule.z0_eps(z_t, schedule.target(z_0, ts, eps), bar)
            close(a, z_0, 1e-4), close(b, eps, 2e-3)
            a, b = schedule.z0_eps(z_t, schedule.target(z_0, ts, eps), bar, clip=0.5)
            assert a.abs().max() <= 0.5
            close(math.sqrt(bar) * a + math.sqrt(1 - bar) * b, z_t, 1e-5)


def test_loss_of_the_true_noise_is_zero_and_of_silence_one():
    z_0 = torch.randn(64, 2, 4, 4)
    schedule = ldm.Schedule(objective="eps")

    def knows(z_t, t, y):                                  # solves q_sample for eps
        bar = schedule.at(t, z_t)
        return (z_t - bar.sqrt() * z_0) / (1 - bar).sqrt()

    close(ldm.loss_LDM(knows, schedule, z_0), 0, 1e-3)
    close(ldm.loss_LDM(lambda z_t, t, y: 0 * z_t, schedule, z_0), 1, 0.1)


def optimal(schedule, m, s):
    """The best possible network for latents ~ N(m, s^2): E[z_0 | z_t] in closed form."""
    def model(z_t, t, y):
        bar = schedule.alpha_bar[t].float().view(-1, 1, 1, 1)
        z_0 = m + bar.sqrt() * s**2 / (bar * s**2 + 1 - bar) * (z_t - bar.sqrt() * m)
        eps = (z_t - bar.sqrt() * z_0) / (1 - bar).sqrt()
        if schedule.objective == "eps":
            return eps
        return bar.sqrt() * eps - (1 - bar).sqrt() * z_0
    return model


def test_samplers_land_on_a_gaussian():
    z_T = torch.randn(64, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    m, s = 0.7, 0.5
    for objective in ("eps", "v"):
        for kind in ("linear", "cosine"):
            schedule = ldm.Schedule(kind, objective=objective)
            model = optimal(schedule, m, s)
            for S in (20, 50, 250, 1000):                  # first order in 1 / S, plus 65,536 draws
                z = ldm.ddim_sample(model, schedule, z_T, steps=S)
                close(z.mean(), m, 0.006), close(z.std(), s, 1.5 / S + 0.006)
                z = ldm.ddpm_sample(model, schedule, z_T, steps=S)
                close(z.mean(), m, 0.006), close(z.std(), s, 3 / S + 0.006)
    one = ldm.ddim_sample(model, schedule, z_T, steps=1)   # one step can only give the mean
    close(one.mean(), m, 0.01), close(one.std(), 0, 0.01)


def test_ddim_with_eta_one_is_ddpm():
    schedule = ldm.Schedule("linear")
    model, z_T = optimal(schedule, 0.3, 0.8), torch.randn(2, 3, 4, 4)
    for S in (1, 10, 200, 1000):
        runs = []
        for sampler, extra in ((ldm.ddpm_sample, {}), (ldm.ddim_sample, {"eta": 1.0})):
            generator = torch.Generator().manual_seed(0)
            runs.append(sampler(model, schedule, z_T, steps=S, noise=lambda z: torch.randn(
                z.shape, generator=generator), **extra))
        close(runs[0], runs[1], 1e-3)
    record = []
    ldm.ddim_sample(model, schedule, z_T, steps=7, record=record)
    assert len(record) == 7


def test_guidance_of_one_is_none_and_reaches_every_channel():
    model = tiny_dit(num_classes=3)
    z_t, y = torch.randn(2, 4, 4, 4), torch.tensor([0, 2])
    t = torch.full((2,), 500)
    plain, null = model(z_t, t, y), model(z_t, t, torch.tensor([3, 3]))
    assert torch.equal(ldm.guided(model, z_t, 500, y, 1.0), plain)
    assert torch.equal(model(z_t, t), null)                # no label is the null label
    close(ldm.guided(model, z_t, 500, y, 4.0), null + 4 * (plain - null), 1e-4)
    assert (plain - null).abs().amax((0, 2, 3)).min() > 0


def test_drop_labels_makes_null_classes():
    y = ldm.drop_labels(torch.zeros(20000, dtype=torch.long), 7, 0.1)
    assert set(y.unique().tolist()) == {0, 7}
    close((y == 7).float().mean(), 0.1, 0.02)


# ---- DiT, EMA, normalisation ------------------------------------------------------------------

def tiny_dit(num_classes=0, **kwargs):
    """With random weights everywhere, as adaLN-zero starts by answering zero."""
    torch.manual_seed(0)
    model = ldm.DiT(**{**dict(input_size=4, patch_size=1, in_channels=4, hidden_size=32, depth=2,
                              num_heads=4, num_classes=num_classes), **kwargs})
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model.eval().requires_grad_(False)


def test_dit_equals_the_authors():
    v = vector("lightningdit_official.pt")
    model = ldm.DiT(**v["model_args"])
    for name in ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"):
        close(model.state_dict()[name], v["state_dict"][name], 1e-6)
    model.load_state_dict(v["state_dict"])
    close(model(v["x"], v["t"], v["y"]), v["out"], 1e-4)


def test_dit_starts_at_zero_and_takes_patches():
    model = ldm.DiT(4, 2, 3, 32, 1, 4, 2)
    z = torch.randn(2, 3, 4, 4)
    assert model(z, torch.tensor([0, 9]), torch.tensor([0, 2])).abs().max() == 0
    for P in (1, 2, 4):
        z_t = torch.randn(2, 4, 4, 4)
        assert tiny_dit(patch_size=P)(z_t, torch.tensor([1, 2])).shape == z_t.shape
    raises(ValueError, ldm.DiT, 4, 3)
    base = ldm.DiT(**ldm.sizes["base"])
    assert abs(sum(p.numel() for p in base.parameters()) / 1e6 - 130) < 1      # B/1, 130 M


def test_normalise_inverts():
    z = torch.randn(8, 3, 4, 4) * 5 + 2
    mean, std = torch.tensor([1.0, 2, 3]), torch.tensor([5.0, 4, 3])
    close(ldm.denormalise(ldm.normalise(z, mean, std), mean, std), z, 1e-5)
    close(ldm.normalise(z, mean, std)[:, 1], (z[:, 1] - 2) / 4, 1e-6)


def test_ema_warms_up_and_copies_buffers():
    model = torch.nn.BatchNorm1d(1)
    ema = ldm.EMA(model, decay=0.5)
    model.weight.data.fill_(2.0)
    model.running_mean.fill_(7.0)
    expected = 1.0
    for n in range(20):
        ema.update(model)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * 2.0
        close(ema.model.weight, expected, 1e-6)
    assert ema.model.running_mean == 7 and model.weight == 2


# ---- Cache, plumbing, checkpoints -------------------------------------------------------------

def test_cache_equals_fresh_encoding_and_is_never_stale():
    with tempfile.TemporaryDirectory() as folder:
        save_images(f"{folder}/data/a", 9)
        save_images(f"{folder}/data/b", 8, seed=1)
        data, model = ImageFolder(f"{folder}/data", 16), tiny_vmae()
        model.to_latent.bias.data[4:] -= 6                 # a confident posterior
        arguments = (data, folder, torch.device("cpu"), 4)
        cache = train_ldm.Moments(model, *arguments).open()
        for mirror in (0, 1):
            for i in (0, 8, 16):
                x = data[i][0][None]
                q = model.encode(x.flip(-1) if mirror else x)
                fresh = torch.cat([q.mu, q.logvar], 1)[0].detach()
                close(np.array(cache.moments[i, mirror]).astype(np.float32), fresh, 0.01)
        assert cache.labels.tolist() == [0] * 9 + [1] * 8
        z, y = cache.__getitems__([16, 3])
        assert z.shape == (2, 4, 4, 4) and y.tolist() == [0, 1]
        assert not torch.equal(z, cache.__getitems__([16, 3])[0])          # drawn anew

        draws = torch.cat([cache.__getitems__(range(17))[0] for _ in range(200)])
        mean, std = cache.statistics()
        close(mean, draws.mean((0, 2, 3)), 0.05), close(std, draws.std((0, 2, 3)), 0.05)

        stamp = os.stat(cache.path).st_mtime_ns
        assert os.stat(train_ldm.Moments(model, *arguments).path).st_mtime_ns == stamp
        model.to_latent.bias.data[0] += 1
        other = train_ldm.Moments(model, *arguments)
        assert other.path != cache.path and not os.path.exists(cache.path)
        save_images(f"{folder}/data/b", 8, seed=2)
        assert train_ldm.Moments(model, *arguments).path != other.path


def test_order_is_endless_resumable_and_shared_out():
    def first(count, start=0, rank=0, world=1):
        order = train_vmae.endless(10, 3, start, rank, world)
        return [next(order) for _ in range(count)]

    whole = first(40)
    assert all(sorted(whole[i:i + 10]) == list(range(10)) for i in (0, 10, 20, 30))
    assert whole[:10] != whole[10:20]
    assert first(20, start=17) == whole[17:37]
    assert first(20, rank=0, world=2) == whole[::2] and first(20, rank=1, world=2) == whole[1::2]


def test_learning_rate_warms_up_and_decays():
    rates = [train_vmae.learning_rate(s, 1000, 1.0) for s in range(1000)]
    assert rates[0] < 0.1 and max(rates) == max(rates[15:30]) > 0.99 and rates[-1] < 1e-4


def test_non_finite_loss_names_step_and_term():
    model = torch.nn.Linear(1, 1)
    before = model.weight.clone()
    opt = train_vmae.optimiser(model)
    out = model(torch.ones(1)).sum()
    terms = {"L_R": out, "L_M": out * float("nan")}
    message = raises(InputError, train_vmae.update, opt, model, sum(terms.values()), terms, 7, 0.1)
    assert "step 7" in message and "L_M" in message and "L_R" not in message
    assert torch.equal(model.weight, before)


def test_checkpoint_survives_an_interrupted_save():
    class Unwritable:
        def __reduce__(self):
            raise RuntimeError("power cut")

    with tempfile.TemporaryDirectory() as folder:
        path, model = f"{folder}/last.pt", tiny_vmae()
        model_args = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4,
                          latent_dim=4)
        vmae.save_checkpoint(path, model_args=model_args, model=model.state_dict())
        raises(RuntimeError, vmae.save_checkpoint, path, model=Unwritable())
        x = random_images()
        close(vmae.load_vmae(path).encode(x).mode(), model.encode(x).mode(), 0)
        assert os.listdir(folder) == ["last.pt"]


def test_resume_continues_the_same_run():
    with tempfile.TemporaryDirectory() as folder:
        save_images(f"{folder}/data", 12)
        common = ["--data", f"{folder}/data", "--size", 16, "--batch", 4, "--lambda-p", 0]
        go = [*common, "--steps", 4, "--save-every", 2]
        for name in ("whole", "parts"):
            assert command(train_vmae.main, *go, "--out", f"{folder}/{name}")[0] == 0
        # Pretend the second run was stopped after two steps: its checkpoint of then, made again.
        ckpt = {}
        save, vmae.save_checkpoint = vmae.save_checkpoint, lambda path, **kw: (
            ckpt.setdefault(kw["step"], path), save(f"{path}.{kw['step']}", **kw))
        try:
            assert command(train_vmae.main, *go, "--out", f"{folder}/parts")[0] == 0
        finally:
            vmae.save_checkpoint = save
        os.replace(f"{folder}/parts/last.pt.2", f"{folder}/parts/last.pt")
        assert command(train_vmae.main, *go, "--out", f"{folder}/parts", "--resume")[0] == 0
        a, b = (torch.load(f"{folder}/{n}/last.pt", weights_only=True) for n in ("whole", "parts"))
        assert b["step"] == 4
        for key, value in a["model"].items():
            close(value, b["model"][key], 1e-6)
        refuses("no such checkpoint", train_vmae.main, *go, "--out", f"{folder}/none", "--resume")


# ---- The other autoencoders, published weights, decoder tuning --------------------------------

def test_conv_autoencoder_equals_diffusers():
    v = vector("sd3vae_diffusers.pt")
    with tempfile.TemporaryDirectory() as folder:
        torch.save(v["state_dict"], f"{folder}/vae.bin")
        model = vmae.load_vmae(f"{folder}/vae.bin")
    assert isinstance(model, vmae.ConvAutoencoder) and model.latent_dim == 16
    q = model.encode(v["x"])
    close(torch.cat([q.mu, q.logvar], 1), v["moments"], 1e-4)
    close(model.decode(q.mode()), v["recon"], 1e-4)


def test_conv_autoencoder_is_sd3s_in_size_and_vmaes_in_use():
    with torch.device("meta"):
        base = vmae.ConvAutoencoder(**vmae.conv_sizes["base"])
    assert sum(p.numel() for p in base.parameters()) == 83_819_683         # 319.7 MiB
    assert base.patch_size == 8 and base.grid == 32
    for name in vmae.sizes:                                # the same latents, row by row
        conv, vit = vmae.conv_sizes[name], vmae.sizes[name]
        assert 2 ** (len(conv["channels"]) - 1) == vit["patch_size"]
        assert conv["latent_dim"] == vit["latent_dim"]
    model, x = vmae.ConvAutoencoder(16, (8, 16), 4), random_images()
    x_hat, q, mask = model(x, 0.0)
    assert x_hat.shape == x.shape and q.mu.shape == (2, 4, 8, 8) and mask.sum() == 0
    assert model.decode(model.encode(x).mode()).shape == x.shape
    raises(ValueError, vmae.ConvAutoencoder, 30)
    args = SimpleNamespace(arch="conv", model="base", size=256, mask=0, data=None, batch=None,
                           steps=None, lr=None, workers=None)
    train_vmae.fill_in(args, torch.device("cpu"), None)
    assert args.batch < train_vmae.RECIPES["base"]["batch"]                # ten times the memory


def test_published_vmae_loads_with_a_report():
    v = vector("vmae_official.pt")
    with tempfile.TemporaryDirectory() as folder:
        path, weights = f"{folder}/vmae.pth", dict(v["state_dict"])
        del weights["mask_token"]
        theirs = {"model": {f"module.{k}": w for k, w in weights.items()}, "epoch": 3,
                  "args": argparse.Namespace(lr=1)}
        theirs["model"]["module.perceptual.scale"] = torch.zeros(1)
        torch.save(theirs, path)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            model = vmae.load_vmae(path, num_heads=4)
        assert "missing: mask_token; left over: perceptual.scale" in printed.getvalue()
        q = model.encode(v["x"])
        close(torch.cat([q.mu, q.logvar], 1), v["moments"], 1e-4)
        close(model.decode(q.mode()), v["recon"], 1e-4)
        text = runs(train_vmae.main, "--init", path, "--steps", 1, "--lambda-p", 0, "--batch", 2,
                    "--out", f"{folder}/run")              # 12 heads of 4 channels
        assert "perceptual.scale" in text
        assert torch.load(f"{folder}/run/last.pt", weights_only=True)["model_args"]["depth"] == 2
        del theirs["model"]["module.norm.weight"]
        torch.save(theirs, path)
        assert "norm.weight" in raises(InputError, vmae.load_vmae, path)
        torch.save({"weight": torch.zeros(1)}, path)
        assert "patch_embed" in raises(InputError, vmae.load_vmae, path)
        torch.save({"model_args": {}}, path)               # half of one of ours
        assert "patch_embed" in raises(InputError, vmae.load_vmae, path)
        torch.save(torch.zeros(1), path)
        assert "not a checkpoint" in raises(InputError, vmae.load_vmae, path)


def test_published_lightningdit_loads_and_samples():
    v, stats = vector("lightningdit_official.pt"), {"mean": torch.arange(16.0).view(1, 16, 1, 1),
                                                    "std": torch.full((1, 16, 1, 1), 2.0)}
    with tempfile.TemporaryDirectory() as folder:
        path, numbers, first = (f"{folder}/{n}" for n in ("dit.pt", "stats.pt", "vmae.pt"))
        weights = {f"module.{k}": w for k, w in v["state_dict"].items()}
        torch.save({"model": {}, "ema": weights}, path)
        torch.save(stats, numbers)
        with contextlib.redirect_stdout(io.StringIO()):
            model, schedule, ckpt = ldm.load_ldm(path, numbers)
        close(model(v["x"], v["t"], v["y"]), v["out"], 1e-4)
        close(ckpt["latent_mean"], torch.arange(16.0), 0)
        assert schedule.objective == "flow" and model.num_classes == 3
        model_args = dict(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=4,
                          latent_dim=16)
        vmae.save_checkpoint(first, model_args=model_args, model=VMAE(**model_args).state_dict(),
                             train_args=dict(data=None, val=None, size=16))
        draw = ["--ckpt", path, "--n", 2, "--steps", 3, "--out", f"{folder}/samples"]
        for options, words in (([], "--stats"), (["--stats", numbers], "--vmae"),
                               (["--stats", path, "--vmae", first], "no mean"),
                               (["--stats", numbers, "--vmae", first, "--eta", 1], "--eta"),
                               (["--stats", numbers, "--vmae", first, "--sampler", "ddim"],
                                "--sampler ddim")):
            refuses(words, sample.main, *draw, *options)
        text = runs(sample.main, *draw, "--stats", numbers, "--vmae", first, "--shift", 0.3,
                    "--interval", 0.1, "--cfg", 2, "--trajectory")
        assert os.path.exists(f"{folder}/samples/sample_000001.png")
        save_images(f"{folder}/data", 8)
        text = runs(train_ldm.main, "--init", path, "--stats", numbers, "--vmae", first, "--data",
                    f"{folder}/data", "--steps", 1, "--batch", 2, "--lr", 1e-9, "--out",
                    f"{folder}/run")
        assert "3 classes, here 0" in text
        model, schedule, ckpt = ldm.load_ldm(f"{folder}/run/last.pt")
        close(model.blocks[0].attn.qkv.weight, v["state_dict"]["blocks.0.attn.qkv.weight"], 1e-6)
        assert schedule.objective == "flow" and ckpt["latent_std"].tolist() == [2.0] * 16


def test_presets_differ_in_what_they_learn_from():
    weights, terms = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        save_images(f"{folder}/data", 24)

        def train(name, *options):
            """The terms in the log of a run of 4 steps, and what it learnt."""
            out = f"{folder}/{name}"
            runs(train_vmae.main, "--preset", name, "--data", f"{folder}/data", "--size", 16,
                 "--steps", 4, "--batch", 4, "--lambda-p", 0, "--out", out, *options)
            log = json.loads(Path(out, "log.jsonl").read_text())
            return vmae.load_vmae(f"{out}/last.pt"), {k for k in log if k.startswith("L_")}

        models = {name: train(name) for name in train_vmae.PRESETS}
        assert {name: sorted(terms) for name, (_, terms) in models.items()} == {
            "ae": ["L_R"], "dae": ["L_R"], "vae": ["L_R", "L_reg"], "mae": ["L_M", "L_R"],
            "sdvae": ["L_D", "L_G", "L_R", "L_reg"], "vmae": ["L_M", "L_R", "L_reg"]}
        x = random_images()
        for name, (model, _) in models.items():
            point = name in ("ae", "dae", "mae")
            assert bool((model.encode(x).logvar == -30).all()) == point, name
            assert isinstance(model, VMAE) == (name in ("mae", "vmae"))
            weights[name] = next(model.parameters())
        assert not torch.equal(weights["ae"], weights["dae"])              # the noise is live
        assert not torch.equal(weights["ae"], weights["vae"])
        for name, options in (("ae", ["--lambda-reg", 1]), ("dae", ["--noise", 1]),
                              ("vae", ["--lambda-reg", 1]), ("vae", ["--kl-mean", "free"]),
                              ("mae", ["--lambda-m", 9]),
                              ("sdvae", ["--lambda-adv", 9]), ("vmae", ["--lambda-reg", 0])):
            assert not torch.equal(weights[name], next(train(name, *options)[0].parameters())), name
        assert isinstance(train("ae", "--arch", "vit")[0], VMAE)           # like for like
        refuses("--mask", train_vmae.main, "--arch", "conv", "--out", f"{folder}/none")
        assert not os.path.exists(f"{folder}/none")


def test_adversarial_loss_waits_and_is_weighed_on_the_last_layer():
    with tempfile.TemporaryDirectory() as folder:
        save_images(f"{folder}/data", 8)
        go = ["--preset", "sdvae", "--data", f"{folder}/data", "--size", 16, "--steps", 100,
              "--batch", 2, "--lambda-p", 0, "--out", folder, "--save-every", 50]
        runs(train_vmae.main, *go)
        before, after = (json.loads(line) for line in open(f"{folder}/log.jsonl"))
        assert "L_G" not in before and "L_D" not in before
        assert all(math.isfinite(after[k]) for k in ("L_R", "L_G", "L_D"))
        assert {"disc", "disc_opt"} <= set(torch.load(f"{folder}/last.pt", weights_only=True))
        go[go.index("--steps") + 1] = 102
        assert command(train_vmae.main, *go, "--resume")[0] == 0
    close(vmae.loss_D(torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])), 0.375, 1e-6)
    last = torch.nn.Linear(4, 4)
    x_hat = last(torch.randn(3, 4))
    reconstruction, fake = 7 * x_hat.square().mean(), 0.01 * x_hat.sum(1)
    a, b = (torch.autograd.grad(loss, last.weight, retain_graph=True)[0].norm()
            for loss in (reconstruction, vmae.loss_G(fake, reconstruction, last.weight)))
    close(a / b, 1, 0.01)
    scores = vmae.discriminator(64)(random_images(2, 64))
    assert scores.shape == (2, 1, 6, 6)                    # each of a patch of 70 pixels
    assert vmae.discriminator(8)(random_images(1, 8)).shape == (1, 1, 2, 2)


def test_tuning_the_decoder_leaves_the_encoder_alone():
    with tempfile.TemporaryDirectory() as folder:
        save_images(f"{folder}/data", 8)
        common = ["--data", f"{folder}/data", "--steps", 2, "--batch", 4, "--lambda-p", 0]
        for preset in ("vmae", "vae"):
            first, tuned = f"{folder}/{preset}", f"{folder}/runs/tuned"
            runs(train_vmae.main, *common, "--preset", preset, "--size", 16, "--out", first)
            os.chdir(folder)                               # --out is runs/tuned, not --init's
            runs(train_vmae.main, *common, "--init", f"{first}/last.pt", "--tune", "decoder",
                 "--size", 32)
            os.chdir(HERE)
            a, b = (vmae.load_vmae(f"{out}/last.pt") for out in (first, tuned))
            assert b.img_size == 32 and b.encode(random_images(1, 32)).mu.shape[-1] == 2 * a.grid
            state, moved = b.state_dict(), []
            for name, value in a.state_dict().items():
                if "pos_embed" not in name and not torch.equal(value, state[name]):
                    moved.append(name)
            assert moved and all(n.startswith(("decoder", "from_latent")) for n in moved), moved
        for options, words in ((["--tune", "decoder"], "--init"),
                               (["--preset", "sdvae", "--compile"], "--compile")):
            refuses(words, train_vmae.main, *options)


def test_resized_positions_are_those_the_authors_interpolate():
    table = vmae.sincos_positions(192, 16)
    bilinear = F.interpolate(table.view(1, 16, 16, 192).permute(0, 3, 1, 2), size=(32, 32),
                             mode="bilinear").flatten(2).transpose(1, 2)   # (1, 1024, 192)
    close(vmae.sincos_positions(192, 32, 16)[..., 12:48], bilinear[..., 12:48], 0.03)   # slow waves
    assert (vmae.sincos_positions(192, 32, 16) - bilinear).square().mean().sqrt() < 0.03
    assert (vmae.sincos_positions(192, 32) - bilinear).square().mean().sqrt() > 0.3
    close(vmae.sincos_positions(192, 16, 16), table, 0)


def test_euler_is_first_order_on_a_gaussian():
    m, s, schedule = 0.7, 0.5, ldm.Schedule(objective="flow")

    def velocity(z_t, t, y):                               # E[z_0 - eps | z_t], in closed form
        t = t.view(-1, 1, 1, 1)
        gain = (t * s**2 - (1 - t)) / (t**2 * s**2 + (1 - t) ** 2)
        return m + gain * (z_t - t * m)

    z_T = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    for shift in (1.0, 0.3):
        errors = [(ldm.euler_sample(velocity, schedule, z_T, steps=S, shift=shift)
                   - (m + s * z_T)).abs().max().item() for S in (50, 100, 200)]
        assert all(1.7 < a / b < 2.3 for a, b in zip(errors, errors[1:])), errors
    calls = []
    ldm.euler_sample(lambda z, t, y: calls.append(t[0].item()) or 0 * z, schedule, z_T, steps=250)
    assert len(calls) == 250 and calls[0] == 0 and calls == sorted(calls)
    shifted = []
    ldm.euler_sample(lambda z, t, y: shifted.append(t[0].item()) or 0 * z, schedule, z_T, steps=250,
                     shift=0.3)
    close(shifted[125], 0.3 * 0.5 / (1 - 0.7 * 0.5), 1e-6)
    raises(ValueError, ldm.euler_sample, velocity, ldm.Schedule(), z_T)
    raises(ValueError, ldm.ddim_sample, velocity, schedule, z_T)
    # The best velocity's loss is the variance it cannot know, mean of s^2 / (t^2 s^2 + (1-t)^2).
    z_0 = m + s * torch.randn(20000, 1, 1, 1)
    t = torch.randn(200000).sigmoid()
    close(ldm.loss_LDM(velocity, schedule, z_0), (s**2 / (t**2 * s**2 + (1 - t) ** 2)).mean(), 0.03)


def test_guidance_interval_spares_the_noise():
    model, widths = tiny_dit(num_classes=3), []
    model.register_forward_hook(lambda m, inputs, output: widths.append(len(output)))
    ldm.euler_sample(model, ldm.Schedule(objective="flow"), torch.randn(2, 4, 4, 4),
                     torch.tensor([0, 1]), steps=4, w=2.0, interval=0.5)
    assert widths == [2, 2, 4, 4]                          # two passes in one from t = 1/2 on


# ---- Evaluation -------------------------------------------------------------------------------

def test_psnr_and_ssim_equal_scikit_image():
    v = vector("metrics_reference.npz")
    a, b = (torch.from_numpy(v[k]).permute(2, 0, 1)[None] for k in ("a", "b"))
    close(evaluate.psnr(a, b), v["psnr"], 1e-6), close(evaluate.ssim(a, b), v["ssim"], 1e-6)


def test_psnr_and_ssim_by_hand():
    a = torch.randint(0, 250, (2, 3, 16, 16), dtype=torch.uint8)
    close(evaluate.psnr(a, a + 5), 20 * math.log10(255 / 5), 1e-9)
    close(evaluate.ssim(a, a), 1, 1e-12)
    flat = torch.full((1, 3, 16, 16), 100.0)               # no variance: only the first factor
    c1 = (0.01 * 255) ** 2
    close(evaluate.ssim(flat, flat + 20), (2 * 100 * 120 + c1) / (100**2 + 120**2 + c1), 1e-9)
    raises(ValueError, evaluate.ssim, a[..., :8], a[..., :8])


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


def test_inception_equals_pytorch_fid():
    v = vector("inception_fid.pt")
    net = evaluate.InceptionV3()
    assert {k: tuple(w.shape) for k, w in net.state_dict().items()} == {
        k: tuple(shape) for k, shape in v["shapes"].items()}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(made_up_inception(), f"{folder}/made_up.pth")
        net = evaluate.load_inception(f"{folder}/made_up.pth")
        assert len(net.hash) == 8
        size = v["features"].abs().max()
        close(net(v["images"]) / size, v["features"] / size, 1e-4)
        seen = []
        net.Mixed_6d.branch1x1.register_forward_hook(lambda m, x, y: seen.append(y))
        features, spatial, logits = net.outputs(v["images"][:1])
        close(spatial.view(17, 17, 7), seen[0][0, :7].permute(1, 2, 0), 0)     # sFID: ADM's order
        close(logits, features @ net.fc.weight.T, 1e-3)    # IS: 1,008 of them, without the bias
        assert logits.shape == (1, 1008)
        net.fast = True                                    # bfloat16: the same to two digits
        close(net(v["images"][:1]) / size, v["features"][:1] / size, 0.03)


def test_weights_that_are_not_fids_are_refused_with_the_reason():
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"fc.bias": torch.zeros(1000)}, f"{folder}/google.pth")
        torch.save({"fc.bias": torch.zeros(1008)}, f"{folder}/other.pth")
        for name, words in (("google", ("torchvision", "1000", "2015")),
                            ("other", ("not FID's",)),
                            ("none", (evaluate.INCEPTION_URL, "--inception-weights", "none.pth"))):
            message = raises(InputError, evaluate.load_inception, f"{folder}/{name}.pth")
            assert all(word in message for word in words) and "\n" not in message, message


def test_clean_resize_is_pillows_antialiased_bicubic():
    net, x, seen = evaluate.InceptionV3("clean"), (random_images(1, 400) * 127.5 + 127.5).byte(), []
    net.Conv2d_1a_3x3.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]) or 1 / 0)
    raises(ZeroDivisionError, net, x)                      # the first layer is far enough
    plane = Image.fromarray(x[0, 0].numpy().astype(np.float32))            # mode F: not rounded
    expected = np.asarray(plane.resize((299, 299), Image.BICUBIC)).clip(0, 255)
    close(seen[0][0, 0], (expected - 128) / 128, 1e-4)


def test_frechet_distance_equals_pytorch_fid():
    v = vector("fid_reference.npz")
    for name in ("full", "singular"):
        statistics = []
        for side in "ab":
            running = evaluate.Statistics()
            for part in torch.from_numpy(v[f"{name}_{side}"]).split(64):   # the last one is short
                running.add(part)
            mu, sigma = running.moments()
            close(mu, v[f"{name}_{side}"].mean(0), 1e-12)
            close(sigma, np.cov(v[f"{name}_{side}"], rowvar=False), 1e-10)
            statistics += [mu, sigma]
        expected = float(v[f"{name}_fid"])
        close(evaluate.frechet_distance(*statistics), expected, 1e-6 * expected)


def test_frechet_distance_by_hand():
    rng = np.random.default_rng(0)
    s1, s2, mu = rng.random(32), rng.random(32), rng.random(32)
    expected = (mu**2).sum() + ((s1 - s2) ** 2).sum()      # Gaussians with diagonal covariances
    got = evaluate.frechet_distance(0 * mu, np.diag(s1**2), mu, torch.from_numpy(np.diag(s2**2)))
    close(got, expected, 1e-10)
    q, _ = np.linalg.qr(rng.normal(size=(32, 32)))         # turning both changes nothing
    close(evaluate.frechet_distance(0 * mu, q @ np.diag(s1**2) @ q.T, q @ mu,
                                    q @ np.diag(s2**2) @ q.T), expected, 1e-10)
    few = rng.normal(size=(300, 512)) @ rng.normal(size=(512, 512))
    mu, sigma = few.mean(0), np.cov(few, rowvar=False)     # 300 images, 512 dimensions: singular
    close(evaluate.frechet_distance(mu, sigma, mu, sigma), 0, 1e-6 * np.trace(sigma))
    for bad in (np.array([[1, 2], [2, 1.0]]), np.array([[0, 1], [1, 0.0]]), np.eye(2) * np.nan):
        message = raises(ValueError, evaluate.frechet_distance, np.zeros(2), bad, np.zeros(2),
                         np.eye(2))
        assert "covariance" in message
    raises(ValueError, evaluate.frechet_distance, np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))


def test_statistics_do_not_cancel_and_do_not_grow():
    rows = torch.randn(1000, 8, dtype=torch.float64) + 1e7
    running = evaluate.Statistics()
    for part in rows.split(300):
        running.add(part)
    close(running.moments()[1], np.cov(rows.numpy(), rowvar=False), 1e-7)
    assert sum(v.numel() for v in vars(running).values() if torch.is_tensor(v)) == 8 + 8 + 64


def test_kid_is_the_mean_over_pairs_and_unbiased():
    a, b = torch.randn(6, 4), torch.randn(5, 4) + 1

    def k(x, y):
        return (x @ y / 4 + 1) ** 3

    def mean(values):
        values = list(values)
        return sum(values) / len(values)

    expected = (mean(k(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j)
                + mean(k(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j)
                - 2 * mean(k(x, y) for x in a for y in b))
    close(evaluate.kid(a, b), expected, 1e-4)
    draws = [evaluate.kid(torch.randn(16, 4), torch.randn(16, 4)) for _ in range(400)]
    close(mean(draws), 0, 4 * np.std(draws) / 20)          # of one distribution: 0 on average
    assert min(draws) < 0


def test_precision_and_recall_by_hand():
    real = torch.tensor([[0.0], [1], [2], [3], [10]])      # to the third neighbour: 3 2 2 3 9
    fake = torch.tensor([[2.5], [5.5], [19.5], [-4], [2.6]])   # inside; inside; no: 9.5; no; inside
    close(torch.tensor(evaluate.precision_recall(real, fake)), [0.6, 1.0], 1e-6)
    same = torch.randn(50, 8)
    assert evaluate.precision_recall(same, same) == (1, 1)
    assert evaluate.precision_recall(same, same + 100) == (0, 0)
    one_mode = same[:1] + 0.01 * torch.randn(50, 8)        # fakes all alike: precise, not varied
    precision, recall = evaluate.precision_recall(same, one_mode)
    assert precision == 1 and recall <= 0.02
    d, index = evaluate.nearest(same[:3], same.split(7), 2)                # over several batches
    assert index[:, 0].tolist() == [0, 1, 2] and (d[:, 0] < 0.01).all()
    close(d[:, 1], torch.cdist(same[:3], same).sort().values[:, 1], 1e-4)


class TinyNet:
    """Stands in for Inception: features are means of colours, in a moment."""
    hash, resize, fast = "tiny", "pytorch-fid", False

    def outputs(self, images):
        x = images.float().mean((2, 3))                                    # (N, 3)
        return x, x[:, :2], x / 10

    def __call__(self, images):
        return self.outputs(images)[0]

    def to(self, device):
        return self


def test_scores_are_means_over_images_and_rfid_is_of_sets():
    a, b = (torch.randint(0, 256, (10, 3, 16, 16), dtype=torch.uint8) for _ in range(2))

    def lpips_net(x, y):                                   # takes [-1, 1]
        return (x - y).abs().amax((1, 2, 3), keepdim=True)

    args = SimpleNamespace(nets=(lpips_net, TinyNet()), device="cpu")
    row, real = evaluate.scores(zip(a.split(4), b.split(4)), args)         # the last has two
    close(row["L1"], (a.double() - b.double()).abs().mean() / 255, 1e-9)
    close(row["PSNR"], evaluate.psnr(a, b).mean(), 1e-9)
    close(row["SSIM"], evaluate.ssim(a, b).mean(), 1e-9)
    close(row["LPIPS"], (a.double() - b.double()).abs().amax((1, 2, 3)).mean() / 127.5, 1e-5)
    means = [x.double().mean((2, 3)).numpy() for x in (a, b)]
    moments = [v for m in means for v in (m.mean(0), np.cov(m, rowvar=False))]
    close(row["rFID"], evaluate.frechet_distance(*moments), 1e-4)
    close(evaluate.scores([(a, b)], args, real)[0]["rFID"], row["rFID"], 1e-4)


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
    generator = torch.Generator().manual_seed(0)
    group, image = torch.arange(4000) % 2, torch.arange(4000) // 20
    z = torch.randn(4000, 3, generator=generator)
    mixed = evaluate.separation(z, group, image)           # no order at all
    close(mixed["sigma^2"], 1, 0.01), close(mixed["probe"], 0.5, 0.05)
    assert mixed["rho"] < 0.1 and mixed["chance"] == 0.5
    z[:, 0] += 6 * group                                   # variance 1 within, 9 between: 1 + 9
    apart = evaluate.separation(z, group, image)
    close(apart["sigma^2"], (0.1 + 1 + 1) / 3, 0.01)
    close(apart["rho"], 6 / math.sqrt(10) / math.sqrt(0.1 + 1 + 1), 0.03)
    assert apart["probe"] > 0.99
    close(evaluate.separation(z * torch.tensor([9, 1, 0.1]) + 5, group, image)["rho"],
          apart["rho"], 1e-4)                              # units of a channel do not matter


def test_noise_on_the_latent_has_the_channels_scale():
    z = torch.randn(64, 3, 8, 8) * torch.tensor([1.0, 5, 20]).view(1, 3, 1, 1)
    noise = evaluate.perturb(z, 0.1) - z
    close(noise.std((0, 2, 3)), 0.1 * z.std((0, 2, 3)), 0.05)
    close(evaluate.perturb(z, 0.2) - z, 2 * noise, 1e-4)   # the same noise, larger
    assert torch.equal(evaluate.perturb(z, 0), z)

    class Pixels:                                          # an autoencoder with the image as latent
        x = torch.randint(96, 161, (40, 3, 16, 16), dtype=torch.uint8)

        def __init__(self, path, args):
            self.path = path

        def held_out(self):
            return 40, ((x, None) for x in self.x.split(16))

        def encode(self, x):
            return x / 127.5 - 1

        def decode(self, z):
            return vmae.to_uint8(z)

    run, evaluate.Run = evaluate.Run, Pixels
    try:
        with tempfile.TemporaryDirectory() as folder:
            runs(evaluate.main, "smoothness", "--ckpt", "pixels", "--eps", 0.2, 0.5, "--out",
                 folder)
            rows = json.load(open(f"{folder}/smoothness.json"))["rows"]
    finally:
        evaluate.Run = run
    for row in rows:                                       # then PSNR is that of the noise alone
        sigma = row["eps"] * Pixels.x.float().std().item()
        close(row["PSNR"], 10 * math.log10(255**2 / (sigma**2 + 1 / 12)), 0.1)
    close(rows[1]["lost"], rows[0]["PSNR"] - rows[1]["PSNR"], 1e-9)


def test_face_levels_are_what_was_drawn():
    class Colours:                                         # a latent that is the patch's colour
        model = SimpleNamespace(img_size=32, patch_size=4)
        args = SimpleNamespace(n=24, batch=10)

        def encode(self, images):
            return F.avg_pool2d(images.float(), 4)

    levels = evaluate.face_levels(Colours())
    assert list(levels) == ["object", "part", "pattern"]
    (_, kind, image), (z, part, _), (skin, _, _) = levels.values()
    kinds = Faces(32, "val").render(range(24))[1]
    assert torch.equal(kinds[image], kind) and set(part.tolist()) <= set(range(5))
    assert len(skin) == (part == 2).sum() and z.shape[1] == 3 and 0 < len(kind) < len(part)
    assert evaluate.separation(*levels["part"])["rho"] > 0.5               # parts have colours


def test_efficiency_is_the_papers_table_3():
    with tempfile.TemporaryDirectory() as folder:
        text = runs(evaluate.main, "efficiency", "--out", folder)
        for number in ("319.7", "42.69", "13.4%", "17,331.3", "701.4", "4.0%", "703.9", "4.1%",
                       "895.2", "41.33", "4.6%", "11,191,604", "83,819,683"):
            assert f"| {number} |" in text, number
        assert len(json.load(open(f"{folder}/efficiency.json"))["rows"]) == 3
    with evaluate.Work() as work:                          # 2 x 3 -> 5; 4 queries, 6 keys of 8
        torch.nn.Linear(3, 5)(torch.zeros(2, 3))
        F.scaled_dot_product_attention(*(torch.zeros(1, n, 8) for n in (4, 6, 6)))
    assert work.count == {"body": 30, "attention": 2 * 4 * 6 * 8}
    bodies, evaluate.BODIES = evaluate.BODIES, {"VMAE": (VMAE, dict(
        patch_size=4, embed_dim=32, depth=1, num_heads=4, latent_dim=4))}
    try:                                                   # --time: every number is a cost
        row = evaluate.measure("VMAE", 16, 2, "cpu")
    finally:
        evaluate.BODIES = bodies
    assert list(row) == ["encode s", "decode s", "train s", "peak MiB"]
    assert min(list(row.values())[:3]) > 0 and row["peak MiB"] >= 0


def test_every_figure_of_two_runs():
    with tempfile.TemporaryDirectory() as folder:
        save_images(f"{folder}/data/a", 12, 16), save_images(f"{folder}/data/b", 12, 16, seed=1)
        for name in ("vmae", "ae"):                        # a transformer, a convolutional body
            runs(train_vmae.main, "--data", f"{folder}/data", "--size", 16, "--steps", 2, "--batch",
                 8, "--lambda-p", 0, "--preset", name, "--out", f"{folder}/runs/{name}")
        vmaes = [f"{folder}/runs/{name}/last.pt" for name in ("vmae", "ae")]
        os.chdir(folder)                                   # as a user types it, before stage two
        text = runs(evaluate.main)
        os.chdir(HERE)
        assert "skipped neighbours" in text and "(Fig. 2)" in text, text
        ldms = [f"{folder}/runs/ldm", f"{folder}/runs/flow"]
        for out, objective in zip(ldms, ("v", "flow")):
            runs(train_ldm.main, "--vmae", vmaes[0], "--steps", 2, "--batch", 8, "--objective",
                 objective, "--out", out)
        data = ["--data", f"{folder}/data", "--n", 20, "--batch", 8, "--device", "cpu"]

        # As a user types it: no arguments, in the folder of the runs.
        os.chdir(folder)
        text = runs(evaluate.main)
        os.chdir(HERE)
        for name in ("reconstruct", "smoothness", "separability", "efficiency", "neighbours",
                     "compare"):
            assert list(Path(folder, "runs").rglob(f"{name}.json")), name
            assert name == "efficiency" or list(Path(folder, "runs").rglob(f"{name}*.png")), name
        for words in ("skipped LPIPS", "skipped fid", "skipped times", "skipped generation"):
            assert words in text and "Inception weights" not in text

        def rows(name, *options):
            """The JSON of a sub-command, whose numbers are those of the table."""
            text = runs(evaluate.main, name, *options, "--out", f"{folder}/out")
            assert "|---|" in text
            return json.load(open(f"{folder}/out/{name}.json"))["rows"]

        exact = rows("reconstruct", "--ckpt", *vmaes, *data)
        noisy = rows("smoothness", "--ckpt", *vmaes, *data, "--eps", 0, 0.5, 2)
        for i in (0, 1):
            close(noisy[3 * i]["PSNR"], exact[i]["PSNR"], 1e-9)            # no noise: Table 1
            assert noisy[3 * i]["lost"] == 0
            close(noisy[3 * i + 2]["lost"], exact[i]["PSNR"] - noisy[3 * i + 2]["PSNR"], 1e-9)
        levels = [row["level"] for row in rows("separability", "--ckpt", vmaes[0], *data)]
        assert levels[-1] == "classes, object" and len(levels) == 4
        table = rows("compare", f"{folder}/runs/vmae", vmaes[1], *data)
        shapes = json.load(open(f"{folder}/out/compare.json"))["rescaled"]
        assert [row["run"] for row in table] == [f"{folder}/runs/vmae", vmaes[1]]
        assert all({a, b} in ({0, 1}, {0}) for a, b in zip(*shapes.values(), strict=True))
        assert len(shapes[vmaes[1]]) == 4
        best = max(table, key=lambda row: row["pixels, dB"])["run"]
        assert shapes[best][2] == 1

        # What Inception adds, with a stand-in for it.
        load, evaluate.load_inception = evaluate.load_inception, lambda *_: TinyNet()
        try:
            few = ["--n", 5, "--batch", 4, "--inception-weights", "tiny.pth"]
            drawn = rows("fid", "--fake", f"{ldms[0]}/last.pt", *few)[0]
            assert drawn["real"] == f"{folder}/data" and drawn["N fake"] == 5
            table = rows("compare", *ldms, *few)
            close(table[0]["generation, gFID"], drawn["gFID"], 1e-6)
            assert table[1]["generation, gFID"] > 0        # rectified flow has its own sampler
            near = rows("neighbours", "--ckpt", f"{ldms[0]}/last.pt", *few)
            assert [row["space"] for row in near] == ["pixels", "Inception"]
            assert all(row["ratio"] == row["samples"] / row["held-out"] for row in near)
            runs(evaluate.main, "fid", "--fake", f"{ldms[0]}/last.pt", "--n", 9, "--cfg", 2,
                 "--out", folder)
            assert "weights tiny" in json.load(open(f"{folder}/fid.json"))["title"]
            first = next(evaluate.draw_samples(f"{ldms[0]}/last.pt", SimpleNamespace(
                n=9, batch=4, cfg=1.0, device="cpu")))
            command(sample.main, "--ckpt", f"{ldms[0]}/last.pt", "--n", 4, "--cfg", 1, "--npz",
                    "--out", f"{folder}/samples")
            same = np.load(f"{folder}/samples/samples.npz")["arr_0"].transpose(0, 3, 1, 2)
            close(first, same.astype(float), 1)            # the images of sample.py
        finally:
            evaluate.load_inception = load


def test_fid_from_every_source():
    load, loaded = evaluate.load_inception, []
    evaluate.load_inception = lambda *arguments: loaded.append(arguments) or TinyNet()
    try:
        with tempfile.TemporaryDirectory() as folder:
            save_images(f"{folder}/real", 20, 16), save_images(f"{folder}/fake", 21, 16, seed=1)
            pixels = {name: np.stack([np.array(Image.open(p)) for p in sorted(
                Path(folder, name).glob("*.png"))]) for name in ("real", "fake")}
            np.savez(f"{folder}/fake.npz", arr_0=pixels["fake"])
            Image.new("RGB", (99, 99)).save(f"{folder}/fake/grid.png")     # sample.py's overview
            common = ["--batch", 8, "--out", f"{folder}/out"]

            def fid(*options):
                with warnings.catch_warnings():
                    warnings.simplefilter("always")        # not only the first time
                    text = runs(evaluate.main, "fid", *options, *common)
                assert "under 2,048" in text and "tiny" in text and "pytorch-fid" in text, text
                return json.load(open(f"{folder}/out/fid.json"))["rows"][0]

            row = fid("--real", f"{folder}/real", "--fake", f"{folder}/fake", "--save-stats",
                      f"{folder}/new/stats.npz")
            os.replace(f"{folder}/new/stats.npz", f"{folder}/stats.npz")
            means = [pixels[name].reshape(len(pixels[name]), -1, 3).mean(1) for name in
                     ("real", "fake")]
            moments = [v for m in means for v in (m.mean(0), np.cov(m, rowvar=False))]
            close(row["FID"], evaluate.frechet_distance(*moments), 1e-4)
            assert (row["N real"], row["N fake"]) == (20, 21)
            assert {"sFID", "IS", "KID x 1e3", "precision", "recall"} <= set(row)
            stats = np.load(f"{folder}/stats.npz")
            close(stats["mu"], moments[0], 1e-3), close(stats["sigma"], moments[1], 1e-3)

            # The same numbers from ADM's .npz of images, and from pytorch-fid's of statistics.
            for real in (f"{folder}/real", f"{folder}/stats.npz"):
                again = fid("--real", real, "--fake", f"{folder}/fake.npz")
                close(again["FID"], row["FID"], 1e-6), close(again["sFID"], row["sFID"], 1e-6)
            assert "KID x 1e3" not in again and again["N real"] == 20
            np.savez(f"{folder}/plain.npz", mu=stats["mu"], sigma=stats["sigma"])
            plain = fid("--real", f"{folder}/plain.npz", "--fake", f"{folder}/fake.npz")
            assert "sFID" not in plain
            close(plain["FID"], row["FID"], 1e-6)
            assert fid("--real", "faces", "--fake", f"{folder}/fake", "--n", 12)["N real"] == 12
            close(fid("--real", f"{folder}/real", "--fake", f"{folder}/real")["FID"], 0, 1e-3)

            np.savez(f"{folder}/odd.npz", mu=np.zeros(9), sigma=np.eye(9))
            status, text = command(evaluate.main, "fid", "--fake", f"{folder}/fake.npz", "--real",
                                   f"{folder}/odd.npz", "--out", f"{folder}/none")
            assert status == 1 and "odd.npz: mu and sigma" in text.splitlines()[-1], text
            for fake, options, words in (
                    ("fake", [], "--real"), ("no.pt", [], "no such"),
                    ("fake", ["--real", f"{folder}/no"], "no such"),
                    ("fake", ["--real", "no.npz"], "no.npz"),
                    ("stats.npz", ["--real", "faces"], "arr_0"),
                    ("fake", ["--real", "faces", "--n", 0], "--n")):
                refuses(words, evaluate.main, "fid", "--fake", f"{folder}/{fake}", *options,
                        "--out", f"{folder}/none")
            assert not os.path.exists(f"{folder}/none")
    finally:
        evaluate.load_inception = load


def test_pictures_are_drawn():
    with tempfile.TemporaryDirectory() as folder:
        curves = {"one": [(0, 1), (1, 3)], "two": [(0, 2), (1, 2)]}
        evaluate.plot(f"{folder}/a.png", curves, "x", "y")
        evaluate.radar(f"{folder}/b.png", ["a", "b", "c"], {"one": [0, 1, 0.5], "two": [1, 0, 1]})
        for name in "ab":
            picture = np.array(Image.open(f"{folder}/{name}.png")).reshape(-1, 3)
            for colour in evaluate.COLOURS[:2]:
                rgb = [int(colour[i:i + 2], 16) for i in (1, 3, 5)]
                assert (abs(picture - rgb) < 12).all(1).sum() > 60, (name, colour)


# ---- The scripts, as a user types them --------------------------------------------------------

def test_the_whole_chain():
    with tempfile.TemporaryDirectory() as folder:
        for name in ("left", "right"):
            save_images(f"{folder}/data/{name}", 20)
        steps = ["--data data --size 16 --mask 0.6 --lambda-p 0 --steps 3 --batch 8 --save-every 2",
                 "--steps 3 --batch 8", "--n 5 --steps 4 --npz --trajectory", ""]
        for script, options in zip(("train_vmae", "train_ldm", "sample", "evaluate"), steps):
            done = subprocess.run([sys.executable, HERE / f"{script}.py", *options.split()],
                                  cwd=folder, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        assert "| PSNR |" in done.stdout
        run = Path(folder, "runs")
        for picture in ("preview_000002.png", "preview_000003.png", "reconstruct.png"):
            assert (run / "vmae" / picture).exists()
        log = [json.loads(line) for line in open(run / "vmae" / "log.jsonl")]
        assert log[-1]["step"] == 3
        assert {"L_R", "L_M", "L_reg", "lr", "images_per_s"} <= set(log[-1])
        ckpt = torch.load(run / "ldm" / "last.pt", weights_only=True)
        assert {"model_args", "model", "ema", "opt", "step", "rng", "train_args", "latent_mean",
                "latent_std", "classes", "vmae"} <= set(ckpt)
        assert ckpt["classes"] == ["left", "right"]
        images = np.load(f"{folder}/samples/samples.npz")["arr_0"]
        assert images.shape == (5, 16, 16, 3) and images.dtype == np.uint8
        last = np.array(Image.open(f"{folder}/samples/sample_000004.png"))
        assert np.array_equal(last, images[4])
        assert Image.open(f"{folder}/samples/trajectory.png").size[0] > 16
        model, schedule, _ = ldm.load_ldm(run / "ldm" / "last.pt")
        assert schedule.T == 1000 and model.num_classes == 2
        name = "final_layer.linear.weight"                 # it is the average that samples
        assert torch.equal(model.state_dict()[name], ckpt["ema"][name])
        assert not torch.equal(ckpt["model"][name], ckpt["ema"][name])

        ckpt_of_run = ["--ckpt", run / "ldm/last.pt"]
        # The same seed gives the same images whatever the batch, also where noise is added.
        for extra in ([], ["--sampler", "ddpm"], ["--eta", "0.5"], ["--clip", "3"]):
            for batch, out in ((5, "one"), (2, "two")):
                runs(sample.main, *ckpt_of_run, "--n", 5, "--steps", 4, "--batch", batch, "--out",
                     f"{folder}/{out}", "--npz", *extra)
            one, two = (np.load(f"{folder}/{o}/samples.npz")["arr_0"].astype(int)
                        for o in ("one", "two"))
            assert abs(one - two).max() <= 1 and len(np.unique(one, axis=0)) == 5

        command(sample.main, *ckpt_of_run, "--n", 2, "--steps", 1, "--out", f"{folder}/one")
        assert len(list(Path(folder, "one").glob("sample_*.png"))) == 2    # three older ones gone

        # Unconditional on the same folders, eps instead of v; then bad input for stage two.
        base = ["--vmae", run / "vmae/last.pt", "--steps", 1, "--batch", 4,
                "--out", f"{folder}/flat"]
        data = ["--data", f"{folder}/data"]
        runs(train_ldm.main, *base, *data, "--no-classes", "--objective", "eps", "--schedule",
             "linear")
        flat = ["--ckpt", f"{folder}/flat/last.pt", "--n", 2, "--steps", 2,
                "--out", f"{folder}/none"]
        assert command(sample.main, *flat[:-1], f"{folder}/flat_samples")[0] == 0
        for arguments, words in ((flat + ["--class", "left"], "unconditional"),
                                 (flat + ["--cfg", 2], "unconditional"),
                                 (flat + ["--steps", 1001], "1000"),
                                 (ckpt_of_run + ["--class", "up"], "left, right"),
                                 (["--ckpt", run / "vmae/last.pt"], "stage-two"),
                                 (["--ckpt", f"{folder}/nothing.pt"], "no such checkpoint")):
            refuses(words, sample.main, *arguments, "--out", f"{folder}/none")
        refuses("--size", train_ldm.main, *base[:-1], f"{folder}/none", *data, "--size", 24)
        assert not os.path.exists(f"{folder}/none")


def test_bad_input_is_one_line():
    with tempfile.TemporaryDirectory() as folder:
        save_images(f"{folder}/good", 4)
        for name in ("empty", "text", "pixel"):
            os.mkdir(f"{folder}/{name}")
        Path(folder, "text", "a.jpg").write_text("not an image")
        Image.new("RGB", (1, 1)).save(f"{folder}/pixel/a.png")
        torch.save({"weight": torch.zeros(1)}, f"{folder}/other.pth")
        good = ["--data", f"{folder}/good", "--size", 16]
        for arguments, words in (
                (["--data", f"{folder}/nowhere"], "nowhere: no such folder"),
                (["--data", f"{folder}/empty"], ".jpg"),
                (["--data", f"{folder}/text"], "a.jpg: unreadable"),
                (["--data", f"{folder}/pixel"], "1x1 pixels"),
                (good + ["--mask", "1.0"], "--mask"), (good + ["--mask", "-1"], "--mask"),
                (good + ["--mask", "0.99"], "leaves 0 of 16"),
                (good + ["--size", 18], "multiple of the patch"),
                (good + ["--steps", 0], "--steps"), (good + ["--device", "abacus"], "--device"),
                (good + ["--lambda-p", 1, "--vgg-weights", "no.pth"], "no.pth cannot be read"),
                (good + ["--vgg-weights", f"{folder}/text/a.jpg"], "a.jpg cannot be read"),
                (good + ["--vgg-weights", f"{folder}/other.pth"], "other.pth cannot be read")):
            refuses(words, train_vmae.main, *arguments, "--out", f"{folder}/out")
        for main, option in ((train_ldm.main, "--vmae"), (evaluate.main, "--ckpt")):
            first = ["reconstruct"] if main is evaluate.main else []
            for path, words in ((f"{folder}/no.pt", "no such"),
                                (f"{folder}/text/a.jpg", "not a check")):
                status, text = command(main, *first, option, path, "--out", f"{folder}/out")
                assert status == 1 and words in text and path in text, text
        assert not os.path.exists(f"{folder}/out")


# ---------------------------------------------------------------------------------------------

def run():
    """Run the tests whose names hold one of the words given; exit status 1 if any fails."""
    words, counts = sys.argv[1:], {"passed": 0, "failed": 0, "skipped": 0}
    tests = [(n, f) for n, f in globals().items() if n.startswith("test_") and callable(f)]
    for name, test in tests:
        if words and not any(word in name for word in words):
            continue
        start, outcome = time.perf_counter(), "passed"
        torch.manual_seed(0)
        try:
            test()
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

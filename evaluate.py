"""Measure what the paper measures, one sub-command for each figure or table.

    python evaluate.py                                   on the default runs, without downloads
    python evaluate.py reconstruct --ckpt runs/vmae                       Table 1
    python evaluate.py fid --fake runs/ldm --real path                    Table 2: FID and others
    python evaluate.py smoothness --ckpt runs/ae runs/vmae                Figs. 3 and 6
    python evaluate.py separability                                       Figs. 4, 5 and 7
    python evaluate.py efficiency --time                                  Table 3
    python evaluate.py compare runs/ae runs/vae runs/vmae                 Fig. 2
    python evaluate.py faces                             generated built-in faces, without downloads
    python evaluate.py neighbours                                         did it memorise?
    python evaluate.py curves runs/vmae runs/ldm                          the losses

Each is a function whose docstring defines what it measures. All but `curves` print a Markdown table
and write it as JSON, and most draw a picture. All metrics take images as uint8, as they are saved.
"""
import argparse
import functools
import hashlib
import inspect
import math
import os
import sys
import time
import warnings
from pathlib import Path

import vmae                                 # before torch, see there
import numpy as np
import scipy.linalg
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ldm import SAMPLERS, load_ldm, stage_and_data
from vmae import InputError, psnr

# ---- Table 1: reconstruction ------------------------------------------------------------------

def reconstruct(args):
    """Table 1: held-out images x against x_hat = decode(z), where z is the mode of q(z|x) and
    nothing is masked. The metrics are those of `scores`."""
    autoencoders = [Autoencoder(path, args) for path in args.ckpt]
    held_out = HeldOut(autoencoders, args)
    lpips_net = find_lpips(args, held_out.size)            # None without its weights
    inception = find_inception(args)
    real = held_out.features(inception)                    # of the originals
    rows = []
    shown = []
    for ae in autoencoders:
        pairs = ((x, ae.reconstruct(x)) for x in held_out.batches())
        row = scores(pairs, args.device, lpips_net, real)
        rows.append({"checkpoint": ae.path, "N": len(held_out), **row})
        shown.append(ae.reconstruct(held_out.first(16)).cpu())
    title = "Reconstruction of held-out images (Table 1)"
    report(args, title + fid_note(inception, len(held_out)), rows)
    save_rows([held_out.first(16), *shown], ["originals", *args.ckpt],
              f"{args.out}/reconstruct.png")

def scores(pairs, device, lpips_net=None, real=None):
    """Batches of uint8 (x, x_hat), (B, 3, S, S) each -> the metrics of Table 1.

    L1 = mean |x - x_hat| with pixels in [0, 1], PSNR in dB, SSIM, and LPIPS (Zhang 2018, on VGG) if
    lpips_net is given: means over the images. rFID, if `real` is given, the Features of the
    originals: the FID of all x_hat against all x."""
    device = torch.device(device)
    fake = None
    if real is not None:
        fake = Features(real.net)
    values = {"L1": [], "PSNR": [], "SSIM": []}            # of each batch (B,), one per image
    if lpips_net is not None:
        values["LPIPS"] = []
    for x, x_hat in pairs:
        x = for_float64(on_device(x, device))
        x_hat = for_float64(on_device(x_hat, device))
        values["L1"].append((x.double() - x_hat.double()).abs().mean((1, 2, 3)) / 255)
        values["PSNR"].append(psnr(x, x_hat))
        values["SSIM"].append(ssim(x, x_hat))
        if lpips_net is not None:
            values["LPIPS"].append(vmae.lpips(lpips_net, vmae.to_float(x.to(device)),
                                              vmae.to_float(x_hat.to(device))))
        if fake is not None:
            fake.add(x_hat)
    row = {}
    for name, parts in values.items():
        row[name] = torch.cat(parts).cpu().double().mean().item()
    if fake is not None:
        row["rFID"] = frechet_distance(*real.pool.moments(), *fake.pool.moments())
    return row

# ---- Table 2: generation ----------------------------------------------------------------------

def fid(args):
    """Table 2: generated images against real ones. FID (`frechet_distance`), called gFID if the
    samples are drawn here; sFID, the same of Inception's spatial features; IS, the Inception Score
    of the generated images alone; and of the first --pairs images of both sides KID, precision and
    recall."""
    if args.save_stats is not None:         # now, so that a bad path stops us before the work
        os.makedirs(os.path.dirname(args.save_stats) or ".", exist_ok=True)
    inception = find_inception(args)
    row, real_stats, title = generation(args.fake, args.real, args, inception, args.pairs,
                                        args.size)
    if args.save_stats is not None:
        path = args.save_stats.removesuffix(".npz") + ".npz"
        with vmae.whole_file(path) as file:
            np.savez(file, **real_stats)
    smaller = row["N fake"]
    if row["N real"] != "unknown":
        smaller = min(smaller, row["N real"])
    report(args, title + fid_note(inception, smaller), [row])

def generation(fake, real, args, inception, pairs=0, size=None):
    """--fake and --real, as open_source takes them -> (a row of `fid`, the statistics of the real
    side, a title that says how the images were read). real may also be a .npz of statistics, see
    read_statistics, or None: what the checkpoint `fake` was trained on. size: by default that of
    the fakes."""
    drawn_here = os.path.isfile(fake) and not fake.endswith(".npz")
    if real is None and drawn_here:
        _, data = stage_and_data(fake)
        vmae.refuse_program(data, "name images to compare with by --real")
        real = data or "faces"
    if real is None:
        raise InputError('--real: name a folder, a .npz or "faces" to compare with')
    # Both sides are opened before the work begins, so that what cannot be read is named at once.
    size, n_fake, fake_batches, note = open_source(fake, args, size)
    title = f"Generated images at {size} px (Table 2){note}"
    made_with = {"resize": inception.resize, "weights": inception.hash, "size": size}
    real_stats = read_statistics(real, made_with)          # {} if they are not known
    if not real_stats:
        _, n_real, real_batches, note = open_source(real, args, size)
        title += note

    fakes = Features(inception, pairs)
    fakes.see(n_fake, fake_batches)
    fake_stats = fakes.statistics()
    reals = Features(inception, pairs)      # stays empty if the statistics are known
    if not real_stats:
        reals.see(n_real, real_batches)
        real_stats = {**reals.statistics(), **made_with}

    row = {"fake": fake, "real": real, "N fake": fake_stats["n"], "N real": "unknown"}
    if "n" in real_stats:                   # which other programs do not write
        row["N real"] = int(real_stats["n"])
    name = "gFID" if drawn_here else "FID"
    try:
        row[name] = frechet_distance(real_stats["mu"], real_stats["sigma"],
                                     fake_stats["mu"], fake_stats["sigma"])
        if "mu_s" in real_stats:
            row["sFID"] = frechet_distance(real_stats["mu_s"], real_stats["sigma_s"],
                                           fake_stats["mu_s"], fake_stats["sigma_s"])
    except (ValueError, KeyError) as error:                # of another program's .npz
        raise InputError(f"{real}: mu and sigma cannot be used, {error}") from None
    row["IS"] = fakes.inception_score()
    if min(pairs, fakes.pool.n, reals.pool.n) > 3:         # precision asks for 3 neighbours
        a = torch.cat(reals.kept)                          # (at most pairs, 2048)
        b = torch.cat(fakes.kept)
        row["KID x 1e3"] = 1e3 * kid(a, b)
        row["precision"], row["recall"] = precision_recall(a, b)
    return row, real_stats, title

def read_statistics(path, made_with):
    """The statistics in a .npz, as a dict: mu and sigma of the features that FID compares, as in
    pytorch-fid's files; mu_s and sigma_s of those of sFID, as in ADM's; and, in ours, n, the number
    of images, and how they were made. {} if `path` is something else, which holds images.
    InputError if they were made otherwise than made_with, because they would not compare."""
    if not path.endswith(".npz"):
        return {}
    found = read_npz(path, ["mu", "sigma", "mu_s", "sigma_s", "n", *made_with])
    if "mu" not in found:
        return {}
    for name, value in made_with.items():
        if name in found and str(found[name]) != str(value):
            raise InputError(f"{path}: was made with {name} {found[name]}, here it is {value}")
    return found

# ---- Figures 3 and 6: smoothness of the latent space ------------------------------------------

def smoothness(args):
    """Figs. 3, 6: is a small step in the latent space a small step in the image? The images are
    decoded from z' = `perturb`(z, eps) and compared with the originals, as in Table 1. `lost` is
    the PSNR, in dB, that they lose against the first --eps. The plot shows rFID, as the paper's, or
    PSNR without Inception's weights."""
    autoencoders = [Autoencoder(path, args) for path in args.ckpt]
    held_out = HeldOut(autoencoders, args)
    lpips_net = find_lpips(args, held_out.size)
    inception = find_inception(args)
    axis = "PSNR" if inception is None else "rFID"         # of the plot
    real = held_out.features(inception)                    # of the originals
    x, _ = held_out.whole()                                # (N, 3, S, S)
    rows = []
    shown = []
    plotted = {}
    for ae in autoencoders:
        z = ae.encode(x)                                   # (N, d, h, w)
        strip = [x[:1]]
        own_rows = []
        for eps in args.eps:
            x_hat = ae.decode(perturb(z, eps))             # (N, 3, S, S)
            pairs = zip(x.split(args.batch), x_hat.split(args.batch))
            row = scores(pairs, args.device, lpips_net, real)
            own_rows.append({"checkpoint": ae.path, "eps": eps, **row})
            strip.append(x_hat[:1])
        plotted[ae.path] = []
        for row in own_rows:
            row["lost"] = own_rows[0]["PSNR"] - row["PSNR"]
            plotted[ae.path].append((row["eps"], row[axis]))
        rows.extend(own_rows)
        shown.append(torch.cat(strip))
    title = f"Reconstruction from z + eps std N(0, 1), {len(held_out)} images (Fig. 6)"
    report(args, title + fid_note(inception, len(held_out)), rows)
    # In each row first the original, then one picture for each eps.
    save_rows(shown, args.ckpt, f"{args.out}/smoothness_strip.png")
    vmae.plot(f"{args.out}/smoothness.png", plotted, "eps, in standard deviations of a channel",
              axis)

def perturb(z, eps):
    """z' = z + eps s_c N(0, 1), where s_c is the standard deviation of channel c over all images
    and places. z, z': (N, d, h, w). The noise is the same for every eps, and for every model whose
    latent has this shape."""
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))  # on the CPU
    return z + eps * z.std((0, 2, 3), keepdim=True) * noise

# ---- Figures 4, 5 and 7: order of the latent space --------------------------------------------

def separability(args):
    """Figs. 4, 5, 7: are latent tokens ordered by the object, the part and the pattern that they
    show? `separation` defines the numbers sigma^2 and rho, and `face_levels` the groups of
    tokens of held-out built-in faces. A folder with classes, --data or that of training, adds its
    classes as objects. The picture shows two principal components of the tokens."""
    autoencoders = [Autoencoder(path, args) for path in args.ckpt]
    on_folders = [ae for ae in autoencoders if args.data or ae.data]
    if on_folders:
        x, y = HeldOut(on_folders, args).whole()           # (N, 3, S, S), (N,)
    rows = []
    clouds = []
    for ae in autoencoders:
        levels = face_levels(ae)
        for level, tokens in levels.items():
            rows.append({"checkpoint": ae.path, "level": f"faces, {level}", **separation(*tokens)})
        if ae in on_folders:
            if len(y.unique()) > 1:
                tokens = class_tokens(ae.encode(x), y)
                rows.append({"checkpoint": ae.path, "level": "classes, object",
                             **separation(*tokens)})
            else:
                print(f"skipped the classes of {args.data or ae.data}: fewer than two")
        z, part, _ = levels["part"]
        xy = principal_components(z)                       # (M, 2)
        clouds.append({name: xy[part == k][:1500].tolist() for k, name in enumerate(vmae.PARTS)})
    report(args, "Order in latent space, by our definition (Figs. 4, 7)", rows)
    for i, path in enumerate(args.ckpt):
        suffix = "" if i == 0 else i
        vmae.plot(f"{args.out}/separability{suffix}.png", clouds[i],
                  "first principal component of the tokens", f"second component; {path}",
                  lines=False)

def separation(z, group, image):
    """Latent tokens z (M, d), the group of each (M,), the number of its image (M,) -> a dict.

    The paper plots sigma^2 and rho without formulas; these definitions are ours. Every channel is
    first scaled to mean 0 and variance 1; mu_g is the mean of group g.
        sigma^2 = sum_i |z_i - mu_g(i)|^2 / sum_i |z_i|^2    the spread within groups, as a share
        rho = mean over pairs g < g' of |mu_g - mu_g'| / sqrt(mean_i |z_i - mu_g(i)|^2)
    probe: the accuracy of `linear_probe`; chance: that of a guess."""
    z = z.double()
    z = (z - z.mean(0)) / z.std(0, unbiased=False).clamp(min=1e-12)
    _, group, count = group.unique(return_inverse=True, return_counts=True)
    member = F.one_hot(group).double()                                     # (M, G)
    mu = member.T @ z / count[:, None]                                     # (G, d)
    within = (z - mu[group]).square().sum(1).mean()                        # a scalar
    return {"groups": len(count), "tokens": len(z),
            "sigma^2": (within / z.square().sum(1).mean()).item(),
            "rho": (torch.pdist(mu).mean() / within.sqrt()).item(),
            "probe": linear_probe(z, group, image),
            "chance": 1 / len(count)}

def linear_probe(z, group, image):
    """The accuracy, as a mean over groups, of a linear classifier: ridge regression on one-hot
    labels, groups weighted equally, fit on the tokens of images of even number, tried on the
    others. z (M, d) in float64; group (M,) counts from 0; image (M,)."""
    member = F.one_hot(group).double()                                     # (M, G)
    fit = image % 2 == 0                                                   # (M,)
    A = F.pad(z, (0, 1), value=1.0)                        # (M, d + 1): a column of ones
    # Each token counts 1 / (tokens of its group), so that each group counts 1.
    weighted = A[fit] / member[fit].sum(0)[group[fit], None]
    ridge = 1e-3 * torch.eye(A.shape[1]).double()          # (d + 1, d + 1), against large weights
    W = torch.linalg.solve(weighted.T @ A[fit] + ridge, weighted.T @ member[fit])  # (d + 1, G)
    hit = ((A[~fit] @ W).argmax(1) == group[~fit]).double()
    tried = member[~fit].sum(0)                            # (G,), 0 for a group not among them
    accuracy = member[~fit].T @ hit / tried                # (G,)
    return accuracy[tried > 0].mean().item()

def face_levels(ae):
    """Tokens of held-out built-in faces, grouped by the paper's levels: {level: (z (M, d), group
    (M,), image (M,))}, as `separation` takes them.

    A token belongs to the part that covers more than half of its patch; if there is none it is left
    out. object: the tokens of the head, by kind. part: all tokens, by part. pattern: the tokens of
    the skin, by pattern."""
    data = vmae.Faces(ae.model.img_size, "val")
    n = min(ae.args.n, len(data))
    found = {"z": [], "part": [], "kind": [], "pattern": [], "image": []}
    for indices in torch.arange(n).split(ae.args.batch):
        x, kind, pattern, part = data.render(indices)
        z = ae.encode(vmae.to_uint8(x)).permute(0, 2, 3, 1)                # (B, h, w, d)
        cover = F.one_hot(part, len(vmae.PARTS)).permute(0, 3, 1, 2).float()   # (B, 5, S, S)
        share, token_part = F.avg_pool2d(cover, ae.model.patch_size).max(1)    # (B, h, w) each
        clear = share > 0.5                 # the others show an edge
        found["z"].append(z[clear])
        found["part"].append(token_part[clear])
        for name, value in (("kind", kind), ("pattern", pattern), ("image", indices)):
            everywhere = value.view(-1, 1, 1).expand_as(clear)             # (B, h, w)
            found[name].append(everywhere[clear])
    z = torch.cat(found["z"])                                              # (M, d)
    part = torch.cat(found["part"])                                        # (M,), as what follows
    kind = torch.cat(found["kind"])
    pattern = torch.cat(found["pattern"])
    image = torch.cat(found["image"])
    head = part != vmae.PARTS.index("background")
    skin = part == vmae.PARTS.index("skin")
    return {"object": (z[head], kind[head], image[head]),
            "part": (z, part, image),
            "pattern": (z[skin], pattern[skin], image[skin])}

def class_tokens(z, y):
    """Latents (N, d, h, w) and the classes of their images (N,) -> z (M, d), the class of each
    token (M,), the number of its image (M,), as `separation` takes them. M = N h w."""
    tokens = z.permute(0, 2, 3, 1).flatten(0, 2)                           # (M, d)
    image = torch.arange(len(y)).repeat_interleave(len(tokens) // len(y))  # (M,)
    return tokens, y[image], image

def principal_components(z):
    """Tokens (M, d) -> the two components of largest variance (M, 2), after every channel has been
    scaled, as in `separation`."""
    z = (z - z.mean(0)) / z.std(0).clamp(min=1e-12)
    vectors = torch.linalg.eigh(z.T @ z).eigenvectors      # (d, d), the largest variance last
    return z @ vectors[:, -2:].flip(1)                                     # (M, 2)

# ---- Table 3: efficiency ----------------------------------------------------------------------

def efficiency(args):
    """Table 3: sizes, operations and times of SD-VAE and VMAE, both of size base. The paper reports
    13.4 % of the size, 4.1 % of the GFLOPs and 2.7x faster training.

    MB: of the state dict in float32, by 2^20 bytes as in the paper. GFLOPs: as in the paper,
    multiply-adds of the encoder without attention's products, batch 128. "+ norms": with four per
    element of a LayerNorm, which gives the paper's 703.9. all GFLOPs: encoder and decoder with
    attention, one image, two operations per multiply-add. --time: seconds of encode, decode, and of
    forward and backward with the squared error of whole images, without an optimiser."""
    if args.size % 8:
        raise InputError(f"--size {args.size}: must be a multiple of 8, as both models are f8")
    rows = []                               # of both models
    for name, sizes in (("SD-VAE", vmae.conv_sizes), ("VMAE", vmae.sizes)):
        model_args = dict(sizes["base"], img_size=args.size)
        row = {"model": name, **operations(model_args)}
        if args.time:
            row |= seconds(vmae.build(model_args).to(args.device), args)
        rows.append(row)
    sd_vae, ours = rows
    ratio = {"model": "ratio"}
    for column in ours:
        if column != "model":
            ratio[column] = f"{ours[column] / sd_vae[column]:.1%}"
    report(args, f"Efficiency at {args.size} px (Table 3)", [sd_vae, ours, ratio])
    if not args.time:
        print("skipped times: `evaluate.py efficiency --time`")

def operations(model_args):
    """Arguments of an autoencoder -> its sizes and operations, as `efficiency` defines them. They
    are counted on "meta", where tensors have a shape but no content."""
    S = model_args["img_size"]
    with torch.device("meta"), torch.no_grad():
        model = vmae.build(model_args)
        q, encoder, encoder_attention = multiply_adds(model.encode, torch.empty(1, 3, S, S))
        _, decoder, decoder_attention = multiply_adds(model.decode, q.mode())
    in_norms = 0                            # elements in the encoder's LayerNorms
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) and not name.startswith("decoder"):
            in_norms += module.normalized_shape[0] * model.grid**2         # each sees all tokens
    numbers = sum(v.numel() for v in model.state_dict().values())
    both = encoder + decoder + encoder_attention + decoder_attention
    return {"numbers": numbers, "MB": numbers * 4 / 2**20,
            "GFLOPs": encoder * 128 / 1e9, "+ norms": (encoder + 4 * in_norms) * 128 / 1e9,
            "encoder GMACs": encoder / 1e9, "decoder GMACs": decoder / 1e9,
            "all GFLOPs": 2 * both / 1e9}

def multiply_adds(function, *args):
    """Run function(*args), with tensors on "meta" -> (what it returns, its multiply-adds in linear
    maps and convolutions, those in attention's two products)."""
    with FlopCounterMode(display=False) as counter:        # counts two operations per multiply-add
        result = function(*args)
    counts = counter.get_flop_counts()["Global"]
    attention = counts.pop(torch.ops.aten.bmm, 0)          # on "meta" it is two such products
    return result, sum(counts.values()) / 2, attention / 2

def seconds(model, args):
    """Seconds of encode, decode, and forward with backward, of --batch images, the best of 4."""
    x = torch.rand(args.batch, 3, args.size, args.size, device=args.device)
    with torch.no_grad():
        z = model.encode(x).mode()

    def encode():
        with torch.no_grad():
            model.encode(x)

    def decode():
        with torch.no_grad():
            model.decode(z)

    def train():
        model.zero_grad()
        (model.decode(model.encode(x).sample()) - x).square().mean().backward()

    return {"encode s": best_of_4(encode, args.device), "decode s": best_of_4(decode, args.device),
            "train s": best_of_4(train, args.device)}

def best_of_4(work, device):
    """Seconds of the fastest of four calls of work()."""
    wait = getattr(torch, device.type).synchronize         # a GPU returns before it is done
    times = []
    for _ in range(4):
        wait()
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return min(times)

# ---- Figure 2: several runs on one radar ------------------------------------------------------

def compare(args):
    """Fig. 2: several runs on one radar. As in the paper, each axis runs from the worst run (inner
    ring) to the best (outer ring). Runs: by default those of stage one in runs/.

    smoothness   PSNR, in dB, between decode(z) and decode(z'), z' = `perturb`(z, .1)
    compression  sigma^2 of the built-in faces' tokens by part (`separation`); low is good
    pixels       PSNR of held-out images, in dB
    perception   their LPIPS, low is good; or SSIM without VGG's weights
    generation   of --n samples, if all runs are of stage two; low is good: on the built-in faces
                 the distance of `faces`, otherwise gFID, if Inception's weights can be had"""
    inception = find_inception(args)
    names = args.runs or runs_of_stage_one()
    if len(set(names)) < 2:
        raise InputError("Fig. 2 needs two runs; train a second preset, or name them")
    drawn = what_they_draw(names)
    autoencoders = [Autoencoder(vmae.checkpoint_path(name), args) for name in names]
    held_out = HeldOut(autoencoders, args)
    lpips_net = find_lpips(args, held_out.size)
    perception = "SSIM" if lpips_net is None else "LPIPS"
    if drawn == "faces":
        face_metrics = FaceMetrics(args.device)
    x, _ = held_out.whole()                                # (N, 3, S, S)
    rows = []
    for name, ae in zip(names, autoencoders):
        z = ae.encode(x)                                   # (N, d, h, w)
        x_hat = ae.decode(z)                               # (N, 3, S, S)
        moved = ae.decode(perturb(z, 0.1))
        pairs = zip(x.split(args.batch), x_hat.split(args.batch))
        metrics = scores(pairs, args.device, lpips_net)
        row = {"run": name, "smoothness, dB": psnr(x_hat, moved).mean().item(),
               "compression, sigma^2": separation(*face_levels(ae)["part"])["sigma^2"],
               "pixels, dB": metrics["PSNR"], f"perception, {perception}": metrics[perception]}
        if drawn == "faces":
            samples = draw_samples(load_generator(ae.path, args), args, args.cfg)
            row["generation, distance"] = face_metrics.row("samples", samples)["distance"]
        elif drawn == "photographs" and inception is not None:
            generated, _, _ = generation(ae.path, None, args, inception)
            row["generation, gFID"] = generated["gFID"]
        rows.append(row)
    axes = list(rows[0])[1:]                # without "run"
    rescaled = rescale(rows, axes)
    title = "Comparison (Fig. 2)"
    if axes[-1] == "generation, gFID":
        title += fid_note(inception, args.n)
    report(args, title, rows, rescaled=rescaled)
    radar(f"{args.out}/compare.png", axes, rescaled)
    if not axes[-1].startswith("generation"):
        print("skipped generation: takes runs of stage two, all on the faces, or all on folders "
              "and with Inception's weights")

def runs_of_stage_one():
    """The run folders in runs/ that hold a stage one, sorted."""
    found = []
    for path in sorted(Path("runs").glob("*/last.pt")):
        stage, _ = stage_and_data(path)
        if stage == 1:
            found.append(str(path.parent))
    return found

def what_they_draw(runs):
    """"faces" or "photographs" if all runs are of stage two, by what they were trained on;
    "nothing" if one of them is of stage one, or was trained on the images of a Python file."""
    folders = []
    for path in runs:
        stage, folder = stage_and_data(path)               # None for the built-in faces
        if stage == 1 or vmae.is_program(folder):
            return "nothing"
        folders.append(folder)
    if any(folders):
        return "photographs"
    return "faces"

def rescale(rows, axes):
    """The rows of `compare` -> {run: for each axis a value from 0, the worst run, to 1, the best},
    or 0 if all runs are equal."""
    places = {row["run"]: [] for row in rows}              # on each of the axes
    for axis in axes:
        column = np.array([row[axis] for row in rows])                     # (runs,)
        if axis.endswith(("sigma^2", "LPIPS", "gFID", "distance")):        # low is good
            column = -column
        column = column - column.min()
        column = column / max(column.max(), 1e-300)
        for row, value in zip(rows, column.tolist()):
            places[row["run"]].append(value)
    return places

def radar(path, axes, shapes):
    """Save a PNG of shapes, {name: a value for each of the axes, from 0, which lies on the inner
    ring, to 1, on the outer ring}. axes: their names."""
    n = len(axes)
    # Three rings, and a spoke from the middle for each axis.
    grid = [ring([value] * n) for value in (0, 0.5, 1)]
    for corner in ring([1] * n):
        grid.append([(640, 420), corner])
    texts = [((30, 36), "outside: the best run, inner ring: the worst", "lm")]
    for name, angle, place in zip(axes, angles(n), ring([1.12] * n)):
        side = {-1: "r", 0: "m", 1: "l"}[round(math.cos(angle))]           # away from the middle
        texts.append((place, name, side + "m"))
    rings = {name: ring(values) for name, values in shapes.items()}
    vmae.save_picture(vmae.draw_chart(880, grid, texts, rings), path)

def angles(n):
    """The directions of n axes, in radians, from the top on and clockwise, as y points down; the
    first comes again at the end: (n + 1,)."""
    return math.pi * np.linspace(-0.5, 1.5, n + 1)

def ring(values):
    """A value for each axis -> the corner of the shape on that axis, as a place (x, y) in pixels of
    vmae.draw_chart; the first comes again at the end, which closes the shape."""
    turn = angles(len(values))                                             # (n + 1,)
    r = 80 + 240 * np.append(values, values[0])                            # from the middle
    return list(zip(640 + r * np.cos(turn), 420 + r * np.sin(turn)))

# ---- Generated built-in faces -----------------------------------------------------------------

def faces(args):
    """Generated built-in faces, as the Judge sees them. Rows: held-out faces, the best there can
    be; their reconstructions by stage one, the best that stage two can reach; samples with each of
    the guidance weights --cfg, by --sampler in --steps.

    requested: the share recognised as the kind asked for. complete: the share that shows all five
    parts, each on 3 of 1,024 pixels or more. distance: the Frechet distance to 4,096 training
    faces. precision, recall: against as many of these as there are images. Each machine trains its
    own judge, and rounding sets these apart: the same samples were at 34.5 and at 37.1. Compare
    distances by one runs/judge_*.pt only."""
    stages = {}
    for path in args.ckpt:                  # before the judge is trained
        stages[path], data = stage_and_data(path)
        if data:                            # None for the built-in faces
            raise InputError(f"{path}: was trained on {data}, not on the faces")
    face_metrics = FaceMetrics(args.device)
    rows = []
    for path in args.ckpt:
        ae = Autoencoder(path, args)
        x, kinds = held_out_faces(ae.model.img_size, args.n)
        # What is judged: a name, batches of uint8 (B, 3, S, S), the kinds that should be in them.
        sets = [("held out", x.split(args.batch), kinds),
                ("reconstructed", map(ae.reconstruct, x.split(args.batch)), kinds)]
        if stages[path] == 2:
            sets += sampled_faces(load_generator(path, args), args)
        for name, batches, wanted in sets:
            rows.append({"checkpoint": path, **face_metrics.row(name, batches, wanted)})
    report(args, "Built-in faces, by the judge; no FID", rows)

def held_out_faces(size, n):
    """The first n held-out faces, or all, uint8 (n, 3, size, size), and their kinds (n,)."""
    data = vmae.Faces(size, "val")
    return data.batch(torch.arange(min(n, len(data))))

def sampled_faces(ldm, args):
    """The samples that `faces` judges: a list of (name, batches, the kinds that were asked for).
    What does not fit the checkpoint is refused here, before the first is drawn."""
    weights = args.cfg
    wanted = torch.arange(args.n) % len(vmae.OBJECTS)      # the classes in turn, as they are drawn
    if not ldm.classes:                     # then there is no guidance, and no kind is asked for
        weights = [1.0]
        wanted = None
    return [(f"samples, w = {w}", draw_samples(ldm, args, w), wanted) for w in weights]

# ---- Memorised images -------------------------------------------------------------------------

def neighbours(args):
    """Did the generator memorise? Picture: samples, each above its 5 nearest training images, in
    pixels and, if its weights are here, in Inception's features. Table: the median distance to the
    nearest training image, of the samples and of as many held-out images, and their ratio; samples
    that are much nearer than held-out images are copies. Distances of pixels are RMS differences, 0
    to 255."""
    inception = find_inception(args)
    ldm = load_generator(args.ckpt, args)
    vmae.refuse_program(ldm.data, "neighbours measures folders and the built-in faces only")
    samples = torch.cat(list(draw_samples(ldm, args, args.cfg)))           # (n, 3, S, S)
    train, val = vmae.open_images(ldm.data, samples.shape[-1], ldm.val)
    if isinstance(train, vmae.ImageFolder):
        train.take_pixels(ldm.run)
    fresh, _ = val.batch(val.some(args.n).tolist())                        # (at most n, 3, S, S)
    # One pass over the training images finds the neighbours of both.
    images = torch.cat([samples, fresh])                                   # (at most 2n, 3, S, S)
    spaces = {"pixels": None}               # the network of each space, see as_points
    if inception is not None:
        spaces["Inception"] = inception
    rows = []
    shown = [samples[:16]]
    names = ["samples"]
    for space, net in spaces.items():
        batches = images_of(train, torch.arange(len(train)), args.batch, args.device)
        bar = tqdm(batches, space, math.ceil(len(train) / args.batch), dynamic_ncols=True)
        training_points = (as_points(x, net, args.batch) for x in bar)
        d, index = nearest(as_points(images, net, args.batch), training_points, 5)
        near = d[:args.n, 0].median().item()               # d, index: (at most 2n, 5) each
        reference = d[args.n:, 0].median().item()
        ratio = math.nan
        if reference > 0:
            ratio = near / reference
        else:
            vmae.say(f"held-out 0 in {space}: most held-out images are also trained on, as exact "
                     f"copies or because there were too few to hold any out; so no ratio")
        rows.append({"space": space, "samples": near, "held-out": reference, "ratio": ratio})
        for k in range(index.shape[1]):
            x, _ = train.batch(index[:len(shown[0]), k].tolist())
            shown.append(x)
            names.append(f"nearest {k + 1} by {space}")
    report(args, f"Distance to the nearest of {len(train)} training images, median", rows)
    save_rows(shown, names, f"{args.out}/neighbours.png")

def as_points(images, net, B):
    """uint8 (N, 3, S, S) -> points (N, D) on the CPU, whose distances mean something: Inception's
    features; or, if net is None, pixels, scaled so that a distance is an RMS difference."""
    if net is None:
        return images.flatten(1).float() / math.sqrt(3 * images.shape[-1]**2)
    return torch.cat([net(x).cpu() for x in images.split(B)])

# ---- Curves -----------------------------------------------------------------------------------

def curves(args):
    """The losses and held-out numbers in the logs of one or several runs, in one picture."""
    logs = [vmae.read_log(run) for run in args.runs]       # an error leaves no --out
    if not any(logs):
        raise InputError(f"{', '.join(args.runs)}: nothing was logged yet")
    path = os.path.join(args.out, "curves.png")
    os.makedirs(args.out, exist_ok=True)
    vmae.save_curves(args.runs, path)
    print(f"the curves of {', '.join(args.runs)} are in {path}")

# ---- The runs, images and networks that the options name --------------------------------------

class Autoencoder:
    """The frozen autoencoder of a checkpoint of either stage, or of published weights. Takes and
    returns images as uint8 and works in batches, so that no whole set is in memory as floats.

    data, val: these options of its training, None for the built-in faces."""

    def __init__(self, path, args):
        ckpt = vmae.read_stage_one(path)
        self.path = path
        self.args = args
        self.data = ckpt["train_args"]["data"]
        self.val = ckpt["train_args"]["val"]
        self.model = vmae.build_vmae(ckpt).to(args.device)

    def encode(self, images):
        """uint8 (N, 3, S, S) -> the mode of the posterior (N, d, h, w), on the CPU."""
        latents = []
        for x in images.split(self.args.batch):
            x = vmae.to_float(on_device(x, self.args.device))
            latents.append(self.model.encode(x).mode().cpu())
        return torch.cat(latents)

    def decode(self, latents):
        """z (N, d, h, w) -> uint8 (N, 3, S, S), on the CPU."""
        images = []
        for z in latents.split(self.args.batch):
            z = on_device(z, self.args.device)
            images.append(vmae.to_uint8(self.model.decode(z)).cpu())
        return torch.cat(images)

    def reconstruct(self, images):
        """One batch of uint8 (B, 3, S, S), encoded and decoded -> the same, on the device."""
        x = vmae.to_float(on_device(images, self.args.device))
        z = self.model.encode(x).mode()                    # (B, d, h, w)
        return vmae.to_uint8(self.model.decode(z))

class HeldOut:
    """The images that all autoencoders of a command are measured on, always the same: --n images of
    --data, or of those that were held out in their training. InputError if these are others for one
    of the autoencoders, because its numbers would not compare."""

    def __init__(self, autoencoders, args):
        self.args = args
        first = autoencoders[0]
        for ae in autoencoders:
            if self.name_for(ae) != self.name_for(first):
                raise InputError(f"{ae.path}: would be measured on {self.name_for(ae)}, "
                                 f"{first.path} on {self.name_for(first)}; such numbers do not "
                                 f"compare")
        self.size = first.model.img_size
        self.images = self.opened(first.data, first.val)
        self.indices = self.images.some(args.n)            # (at most n,)

    def name_for(self, ae):
        """What an autoencoder is to be measured on."""
        folder = self.args.data or ae.val or ae.data or "the faces"
        return f"{folder} at {ae.model.img_size} px"

    def opened(self, data, val):
        """The data set: all images of the folder --data, or those held out of data and val."""
        named = self.args.data
        if named and not vmae.is_program(named):
            return vmae.ImageFolder(named, self.size)
        if not named:
            vmae.refuse_program(data, "name it again with --data, so that it may run")
        else:
            data = named
            val = None
        train, images = vmae.open_images(data, self.size, val)
        if vmae.nothing_held_out(train, images):
            warnings.warn("nothing was held out, so images are measured that were trained on")
        return images

    def __len__(self):
        return len(self.indices)

    def batches(self):
        """Iterate over batches of uint8 (B, 3, S, S)."""
        return images_of(self.images, self.indices, self.args.batch, self.args.device)

    def whole(self):
        """All images at once, uint8 (N, 3, S, S), and their classes (N,)."""
        images = []
        classes = []
        for x, y in self.images.batches(self.indices, self.args.batch):
            images.append(x)
            classes.append(y)
        return torch.cat(images), torch.cat(classes)

    def features(self, inception):
        """The Features of the images, None if inception is None."""
        if inception is None:
            return None
        found = Features(inception)
        found.see(len(self), self.batches())
        return found

    def first(self, n):
        """The first n of the images, for a picture: uint8 (n, 3, S, S)."""
        x, _ = self.images.batch(self.indices[:n].tolist())
        return x

def images_of(data, indices, B, device):
    """Iterate over the images of a data set that have these indices, without their labels, in
    batches of uint8 (B, 3, S, S)."""
    return prefetched((x for x, _ in data.batches(indices, B)), device)

def prefetched(batches, device):
    """Iterate over batches of images. For a GPU, a thread reads the next one while this one is
    computed, into memory that the GPU can copy from by itself (pinned)."""
    if device.type != "cuda":
        return batches
    return vmae.prefetch(x.pin_memory() for x in batches)

def on_device(x, device):
    """x, moved to the device. While a GPU copies it, the CPU goes on."""
    return x.to(device, non_blocking=device.type == "cuda")

def load_generator(path, args):
    """A checkpoint of stage two -> the LDM on the device, compiled where that pays."""
    ldm = load_ldm(path).to(args.device)
    ldm.compile_if_it_pays(args.n * args.steps)
    return ldm

def draw_samples(ldm, args, cfg):
    """-> an iterator over batches of uint8 (B, 3, S, S), --n images in all: those of sample.py with
    seed 0, --sampler, --steps and guidance cfg. InputError for what does not fit the checkpoint,
    before the first batch."""
    draw = functools.partial(ldm.draw, **ldm.plan(cfg, args.sampler, args.steps))
    return map(draw, torch.arange(args.n).split(args.batch))

def open_source(source, args, size=None):
    """--real or --fake -> (side, number of images, batches of uint8 (B, 3, side, side), a note for
    the title: how many of a folder were cropped, where other programs squash, or put on white).

    source: a folder; "faces", the built-in training faces; a .npz with arr_0, uint8 (N, H, W, 3),
    as ADM's; or a stage-two checkpoint, which is sampled. size: the side to give to the images of a
    folder (default: that of all its images) or the faces, and to ask of a .npz."""
    if source.endswith(".npz"):
        images = open_npz(source, size)[:args.n]           # (N, 3, side, side)
        batches = prefetched(images.split(args.batch), args.device)
        return images.shape[-1], len(images), batches, ""
    how_to_unpack = vmae.how_to_unpack([Path(source).suffix.lower()])
    if os.path.isfile(source) and how_to_unpack:
        raise InputError(f"{source}: a file{how_to_unpack}")
    if os.path.isfile(source):
        ldm = load_generator(source, args)
        drawn = ldm.ae.img_size
        if size not in (None, drawn):
            raise InputError(f"--size {size}: {source} draws images of {drawn} pixels; leave "
                             f"--size out")
        return drawn, args.n, draw_samples(ldm, args, args.cfg), ""
    if source == "faces":
        data = vmae.Faces(size or 32)
    else:
        folder = vmae.Folder(source)
        sides = {short_side for _, _, short_side in folder.files.values()}
        if size is None and len(sides) > 1:
            raise InputError(f"{source}: holds images of {min(sides)} to {max(sides)} pixels; give "
                             f"all one --size")
        data = vmae.ImageFolder(source, size or min(sides), folder=folder)
    indices = data.some(args.n)             # always the same
    note = ""
    if source != "faces":
        paths = {data.paths[i] for i in indices.tolist()}
        note = (f"; {source}: {len(paths & folder.cropped)} of {len(paths)} cropped to the square "
                f"in the middle, {len(paths & folder.transparent)} with transparency, on white")
    return data.size, len(indices), images_of(data, indices, args.batch, args.device), note

def open_npz(path, size):
    """arr_0 of a .npz -> uint8 (N, 3, H, H). size: the H that it must have, or None."""
    entries = read_npz(path, ["arr_0"])
    if "arr_0" not in entries:
        raise InputError(f"{path}: has no arr_0, which would hold images")
    images = entries["arr_0"]
    side = "H"
    if size is not None:
        side = size
    elif images.ndim == 4:
        side = images.shape[1]
    if images.dtype != np.uint8 or images.shape[1:] != (side, side, 3):
        raise InputError(f"{path}: arr_0 is {images.dtype} {images.shape}; it must be uint8 "
                         f"(N, {side}, {side}, 3); only the images of a folder are resized")
    return torch.from_numpy(images).permute(0, 3, 1, 2)

def read_npz(path, names):
    """Those of the named entries that a .npz has, {name: array}. The others are not read, as arr_0
    may be larger than the memory. InputError if the file cannot be read."""
    try:
        with np.load(path) as file:
            return {name: file[name] for name in names if name in file.files}
    except Exception as error:              # zipfile, pickle and numpy have errors of their own
        raise InputError(f"{path}: not a .npz that can be used here ({error})") from None

def find_lpips(args, size):
    """LPIPS on the device, or None, which a line then says, if VGG's weights are neither here nor
    may be downloaded, or if the images, size pixels per side, are too small for it. InputError for
    these if the user asked for it."""
    too_small = f"LPIPS needs images of {vmae.LPIPS_MIN} pixels, these have {size}"
    if size < vmae.LPIPS_MIN and args.vgg_weights is not None:
        raise InputError(f"--vgg-weights: {too_small}; leave it out")
    if not can_load("VGG-16", vmae.VGG_URL, args.vgg_weights, "--vgg-weights", args):
        return None
    if size < vmae.LPIPS_MIN:
        print(f"skipped LPIPS: {too_small}")
        return None
    return vmae.load_lpips(args.vgg_weights).to(args.device)

def find_inception(args):
    """InceptionV3 on the device, or None, likewise."""
    if not can_load("InceptionV3", INCEPTION_URL, args.inception_weights, "--inception-weights",
                    args):
        return None
    return load_inception(args.inception_weights, args.resize, args.fast).to(args.device)

def can_load(what, url, path, option, args):
    """Whether a network with published weights is to be used: the user has named a copy, or allows
    to download them, or torch hub has them from an earlier download. url: of the weights; path: the
    copy that `option` names, or None."""
    if not args.networks:                   # python evaluate.py does without, see run_all
        return False
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    if path is not None or args.download or cached.exists():
        return True
    print(f"skipped {what}: no weights; --download fetches {url}, {option} names a copy")
    return False

# ---- Metrics; psnr is in vmae.py --------------------------------------------------------------

def ssim(a, b):
    """Structural similarity (Wang 2004) -> (N,), 1 for equal images. a, b: (N, C, H, W) in 0..255.
    Of an image x of a and its counterpart y in b:

    SSIM = (2 mu_x mu_y + c1)(2 cov + c2) / ((mu_x^2 + mu_y^2 + c1)(var_x + var_y + c2)) under an
    11 x 11 Gaussian window of sigma 1.5, biased (co)variances, c1 = (.01 * 255)^2, c2 = (.03 *
    255)^2; the mean over channels and over the windows inside the image. InputError below 11 px."""
    side = min(a.shape[2:])
    if side < 11:
        raise InputError(f"images of {side} pixels are too small for SSIM; it needs 11")
    c1 = (0.01 * 255) ** 2
    c2 = (0.03 * 255) ** 2
    # On a CPU we take one image at a time: what we compute with then stays in the cache.
    at_once = 1
    if a.is_cuda:
        at_once = len(a)
    values = []
    for x, y in zip(a.split(at_once), b.split(at_once)):
        x = x.double()
        y = y.double()
        mu_x = blur(x)                                     # (n, C, H - 10, W - 10), as what follows
        mu_y = blur(y)
        var_x = blur(x * x) - mu_x**2
        var_y = blur(y * y) - mu_y**2
        cov = blur(x * y) - mu_x * mu_y
        of_windows = ((2 * mu_x * mu_y + c1) * (2 * cov + c2)
                      / ((mu_x**2 + mu_y**2 + c1) * (var_x + var_y + c2)))
        values.append(of_windows.mean((1, 2, 3)))
    return torch.cat(values)

def blur(x):
    """Weighted means under SSIM's window, by columns, then by rows: float64 (N, C, H, W) ->
    (N, C, H - 10, W - 10). Each is a weighted sum of eleven shifted copies, which on a CPU takes a
    seventh of the time of a grouped convolution in float64."""
    g = torch.exp(-torch.arange(-5, 6, dtype=torch.float64) ** 2 / (2 * 1.5**2))
    g = (g / g.sum()).tolist()                             # 11 weights
    h = x.shape[2] - 10
    w = x.shape[3] - 10
    columns = g[0] * x[:, :, :h]                           # (N, C, H - 10, W)
    for i in range(1, 11):
        columns.add_(x[:, :, i : i + h], alpha=g[i])
    rows = g[0] * columns[..., :w]                         # (N, C, H - 10, W - 10)
    for i in range(1, 11):
        rows.add_(columns[..., i : i + w], alpha=g[i])
    return rows

def for_float64(x):
    """x on a device that has float64, as metrics need it. On CUDA it stays where it is, because
    copying it would wait for the GPU; from elsewhere, such as MPS, it goes to the CPU."""
    if x.is_cuda:
        return x
    return x.cpu()

class Statistics:
    """Mean and covariance of rows from running sums in float64: D^2 numbers for any number of rows.
    The mean of the first batch is subtracted from all rows, so that the sums do not cancel."""

    def __init__(self):
        self.n = 0                          # rows so far
        self.total = 0.0                    # their sum (D,), without the shift
        self.outer = 0.0                    # the sum of their outer products (D, D)

    def add(self, rows):
        """rows: (B, D). -> self."""
        rows = for_float64(rows).double()
        if self.n == 0:
            self.shift = rows.mean(0)
        rows = rows - self.shift                           # (B, D)
        self.n += len(rows)
        self.total += rows.sum(0)
        self.outer += rows.T @ rows
        return self

    def moments(self):
        """-> mean (D,), covariance (D, D) divided by n - 1, as numpy.cov. InputError if n < 2."""
        if self.n < 2:
            raise InputError("FID: one image has no covariance; give two or more on both sides")
        mean = self.total / self.n                         # (D,), without the shift
        sigma = (self.outer - self.n * torch.outer(mean, mean)) / (self.n - 1)
        return (self.shift + mean).cpu().numpy(), sigma.cpu().numpy()

def cholesky(sigma):
    """Covariance (D, D) -> L (D, r) with sigma = L L^T, where r is the rank, at most N - 1 for N
    images. With pivoting (LAPACK's dpstrf) a singular sigma is no problem, and it takes a sixth
    to a sixteenth of the time of eigenvectors.
    ValueError if sigma is no covariance: NaN, or negative eigenvalues beyond rounding."""
    rounding = 1e-4 if sigma.dtype == np.float32 else 1e-8     # statistics may come as float32
    sigma = sigma.astype(np.float64)
    factor, order, r, _ = scipy.linalg.lapack.dpstrf(sigma, lower=1)
    L = np.zeros((len(sigma), r))                          # (D, r)
    L[order - 1] = np.tril(factor)[:, :r]                  # undo the pivoting of the rows
    if r < len(sigma):
        error = np.abs(sigma - L @ L.T).max()
        if not error <= rounding * np.abs(sigma).max():    # also if it is NaN
            raise ValueError("not a covariance: NaN, or negative eigenvalues beyond rounding")
    return L

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """FID = |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr sqrt(S1 S2). Heusel 2017, Eq. 6.

    tr sqrt(S1 S2) is the sum of the square roots of the eigenvalues of S1 S2. With S1 = A A^T and
    S2 = B B^T these are the squared singular values of A^T B; we sum the singular values. In
    float64. mu (D,), sigma (D, D), numpy or torch. ValueError for other shapes or no covariance.

    For 64 or 500 images with 2,048 features this is right to 4e-15 of the value, where pytorch-fid,
    clean-fid, torch-fidelity and torchmetrics, which work on S1 S2, are up to 2e-6 too low; with
    statistics in float32 the first two stop or are up to 2 % too low, and ours is off by 4e-6."""
    mu1 = np.asarray(mu1)
    mu2 = np.asarray(mu2)
    sigma1 = np.asarray(sigma1)
    sigma2 = np.asarray(sigma2)
    square = (mu1.size, mu1.size)
    if mu1.shape != mu2.shape or sigma1.shape != square or sigma2.shape != square:
        raise ValueError(f"statistics of {sigma1.shape} and {sigma2.shape} do not compare")
    A = cholesky(sigma1)                                   # (D, rank)
    B = cholesky(sigma2)
    trace_of_root = np.linalg.svd(A.T @ B, compute_uv=False).sum()
    difference = mu1.astype(np.float64) - mu2              # (D,)
    traces = np.trace(sigma1, dtype=float) + np.trace(sigma2, dtype=float)
    return max(float(difference @ difference + traces - 2 * trace_of_root), 0.0)

def kid(a, b):
    """KID = MMD^2 with the kernel k(x, y) = (x.y / D + 1)^3, unbiased for every N. Binkowski 2018.

    The mean of k over pairs within a (N, D), plus that within b (M, D), minus twice that between
    them; no image is paired with itself. Close to 0, on either side, for equal distributions."""
    a = a.double()
    b = b.double()
    between = kernel_sum(a, b) / (len(a) * len(b))
    return mean_within(a) + mean_within(b) - 2 * between

def kernel_sum(x, y):
    """The sum of k over all pairs of a row of x and a row of y, in blocks, to bound the memory."""
    total = 0.0
    for part in x.split(1024):
        total += ((part @ y.T / x.shape[1] + 1) ** 3).sum().item()
    return total

def mean_within(x):
    """The mean of k over pairs of different rows of x."""
    with_itself = ((x.square().mean(1) + 1) ** 3).sum().item()
    return (kernel_sum(x, x) - with_itself) / (len(x) * (len(x) - 1))

def nearest(rows, batches, k):
    """rows (Q, D), batches of (B, D) -> the k nearest members of all batches to each row: their
    Euclidean distances and their indices, (Q, k) each. Only one batch is in memory at a time."""
    best = rows.new_empty(len(rows), 0)     # the distances of the nearest so far
    index = torch.empty(len(rows), 0, dtype=torch.long, device=rows.device)    # their indices
    seen = 0
    for batch in batches:
        new = torch.arange(seen, seen + len(batch), device=rows.device)        # (B,)
        index = torch.cat([index, new.expand(len(rows), -1)], 1)           # (Q, k + B)
        best = torch.cat([best, torch.cdist(rows, batch)], 1)              # (Q, k + B)
        best, place = best.topk(min(k, best.shape[1]), largest=False)      # (Q, k) each
        index = index.gather(1, place)
        seen += len(batch)
    return best, index

def precision_recall(real, fake, k=3):
    """Kynkaanniemi 2019. The manifold of a set is the union of balls around its members, each as
    large as the distance to the k-th nearest other member. Precision: the share of the fakes on the
    manifold of the real. Recall: of the real on that of the fakes. (N, D), (M, D) -> two floats."""
    # torch.cdist takes |x|^2 + |y|^2 - 2 x.y, which loses its digits if all rows are far from 0:
    # both shares were 1 in 64 dimensions with a standard deviation of 1 and a mean of 3,000.
    mean = real.mean(0)
    real = real - mean
    fake = fake - mean
    return share_on_manifold(fake, real, k), share_on_manifold(real, fake, k)

def share_on_manifold(rows, members, k):
    """The share of rows (N, D) inside the ball of one of the members (M, D)."""
    distances, _ = nearest(members, members.split(512), k + 1)     # the nearest is itself
    radius = distances[:, -1]                                              # (M,)
    inside = []
    for block in rows.split(512):
        inside.append((torch.cdist(block, members) <= radius).any(1))
    return torch.cat(inside).double().mean().item()

class Features:
    """What we keep of a set of images that Inception has seen: running sums, for FID, sFID and IS;
    the features of the first `pairs` images, for the metrics that compare pairs. All of it stays on
    a CUDA device until it is asked for, because to read it sooner would be to wait for the GPU."""

    def __init__(self, net, pairs=0):
        self.net = net
        self.pairs = pairs
        self.kept = []
        self.pool = Statistics()
        self.spatial = Statistics()
        self.p = 0.0                        # sum of p(y|x), (1008,)
        self.entropy = 0.0                  # sum of H(y|x)

    def add(self, images):
        """images: uint8 (B, 3, H, W)."""
        features, spatial, logits = self.net.outputs(images)
        missing = self.pairs - self.pool.n
        if missing > 0:                     # once enough are kept, no more
            self.kept.append(for_float64(features[:missing]))
        self.pool.add(features)
        self.spatial.add(spatial)
        p = for_float64(logits).double().softmax(1)        # p(y|x), (B, 1008)
        self.p += p.sum(0)
        self.entropy += torch.special.entr(p).sum()        # entr(p) = -p log p

    def see(self, n, batches):
        """Add all of the batches, n images, under a progress bar."""
        with tqdm(total=n, desc="Inception", dynamic_ncols=True, mininterval=1) as bar:
            for images in batches:
                self.add(images)
                bar.update(len(images))

    def statistics(self):
        """-> the entries of a .npz: mu, sigma for FID; mu_s, sigma_s for sFID; n images."""
        mu, sigma = self.pool.moments()
        mu_s, sigma_s = self.spatial.moments()
        return dict(mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, n=self.pool.n)

    def inception_score(self):
        """IS = exp(E KL(p(y|x) || p(y))) = exp(H(y) - E H(y|x)), from 1 to 1,008. Salimans 2016.
        Over all images at once. Many papers average over parts of 5,000, which gives less."""
        p = self.p / self.pool.n                           # p(y), (1008,)
        return math.exp(torch.special.entr(p).sum().item() - self.entropy.item() / self.pool.n)

# ---- The judge of the built-in faces ----------------------------------------------------------

JUDGED = 4096          # training faces that samples are compared with

class Judge(nn.Module):
    """A small U-Net that learns what the renderer of the built-in faces knows: object, pattern, and
    the part at each pixel. Its features take the place of Inception's, without a download. They are
    no FID: they know only these faces, at 32 px, and distances in them compare with each other
    alone. Each feature is in standard deviations of the training faces."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([self.conv(3, 16), self.halve(16, 32), self.halve(32, 64),
                                   self.halve(64, 64)])
        # On the way up each layer sees the coarser level, enlarged, beside the one of its own size.
        self.up = nn.ModuleList([self.conv(64 + 64, 32), self.conv(32 + 32, 32),
                                 self.conv(32 + 16, 16)])
        self.object = nn.Linear(128, len(vmae.OBJECTS))
        self.pattern = nn.Linear(128, len(vmae.PATTERNS))
        self.part = nn.Conv2d(16, len(vmae.PARTS), 1)
        # Of each of the 128 + 32 + 32 + 16 features of the training faces, see train_judge.
        self.register_buffer("mean", torch.zeros(208))
        self.register_buffer("std", torch.ones(208))
        self.register_buffer("real", torch.zeros(JUDGED, 208))             # in units of std

    @staticmethod
    def conv(c_in, c_out, stride=1):
        """A 3 x 3 convolution, with norm and ReLU."""
        return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False),
                             nn.BatchNorm2d(c_out), nn.ReLU())

    @staticmethod
    def halve(c_in, c_out):
        """Two of them, of which the first halves the size."""
        return nn.Sequential(Judge.conv(c_in, c_out, 2), Judge.conv(c_out, c_out))

    def forward(self, images):
        """uint8 (N, 3, S, S) -> features (N, 208), logits of the object (N, 4), of the pattern (N,
        3), of the part (N, 5, 32, 32)."""
        x = vmae.to_float(F.interpolate(images.float(), (32, 32), mode="area"))
        x = x.contiguous(memory_format=torch.channels_last)
        levels = []
        for layer in self.down:
            x = layer(x)                    # 32, 16, 8, 4 pixels per side
            levels.append(x)
        whole = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)             # (N, 128)
        features = [whole]
        for layer, fine in zip(self.up, levels[2::-1]):
            x = F.interpolate(x, scale_factor=2)           # 8, 16, 32 pixels per side
            x = layer(torch.cat([x, fine], 1))
            features.append(x.mean((2, 3)))                # how much there is of each texture
        features = (torch.cat(features, 1) - self.mean) / self.std         # (N, 208)
        return features, self.object(whole), self.pattern(whole), self.part(x)

def load_judge(folder="runs"):
    """The Judge, frozen, in eval mode: from a file in `folder`, or trained now, and kept there. The
    file's name is a hash of what makes a judge, its code and the faces, so that after a change of
    these another one is trained."""
    data = vmae.Faces(32)
    made_of = inspect.getsource(Judge) + inspect.getsource(train_judge) + data.made_of()
    path = Path(folder, f"judge_{hashlib.sha256(made_of.encode()).hexdigest()[:8]}.pt")
    if path.exists():
        judge = Judge().to(memory_format=torch.channels_last)
        judge.load_state_dict(torch.load(path, weights_only=True))
        return judge.eval().requires_grad_(False)
    judge = train_judge(data)
    os.makedirs(folder, exist_ok=True)
    vmae.save_checkpoint(path, **judge.state_dict())
    return judge

def train_judge(data):
    """A Judge, trained on each of the faces once, with the sum of three cross-entropies. On the
    CPU, which takes half a minute, so that it depends on the GPU in no way."""
    torch.manual_seed(0)                    # the same weights to begin with
    judge = Judge().to(memory_format=torch.channels_last)
    opt = torch.optim.AdamW(judge.parameters(), weight_decay=0.01)
    parts = torch.arange(len(data)).split(32)
    plan = torch.optim.lr_scheduler.OneCycleLR(opt, 5e-3, len(parts))
    for indices in tqdm(parts, "training the judge", dynamic_ncols=True):
        x, kind, pattern, part = data.render(indices)
        _, kind_logits, pattern_logits, part_logits = judge(vmae.to_uint8(x))
        loss = F.cross_entropy(kind_logits, kind)
        loss = loss + F.cross_entropy(pattern_logits, pattern)
        loss = loss + F.cross_entropy(part_logits, part)
        loss.backward()
        opt.step()
        opt.zero_grad()
        plan.step()
    judge.eval().requires_grad_(False)
    # Scale each feature, so that none of them rules the distances.
    features = []
    for indices in parts[:JUDGED // 32]:
        x, _ = data.batch(indices)
        features.append(judge(x)[0])
    features = torch.cat(features)                         # (4096, 208)
    judge.mean = features.mean(0)
    judge.std = features.std(0).clamp(min=1e-6)
    judge.real = (features - judge.mean) / judge.std
    return judge

class FaceMetrics:
    """Compares images with the first JUDGED training faces, in the features of the Judge."""

    def __init__(self, device):
        self.device = device
        self.judge = load_judge().to(device)
        self.real = self.judge.real.cpu()                  # (JUDGED, 208)
        self.reference = Statistics().add(self.real).moments()     # mean (208,), covariance

    def see(self, batches):
        """Batches of uint8 (B, 3, S, S) -> what the Judge sees in all of them, on the CPU: features
        (N, 208), the kind of each face (N,), the pixels of each of its parts (N, 5)."""
        features = []
        kinds = []
        pixels = []
        for x in batches:
            feature, kind, _, part = self.judge(on_device(x, self.device))
            features.append(feature)
            kinds.append(kind.argmax(1))
            pixels.append(F.one_hot(part.argmax(1), len(vmae.PARTS)).sum((1, 2)))      # (B, 5)
        return torch.cat(features).cpu(), torch.cat(kinds).cpu(), torch.cat(pixels).cpu()

    def row(self, name, batches, wanted=None):
        """Batches of uint8 (B, 3, S, S), and the kinds (N,) that were asked for, if any were -> a
        row of `faces`."""
        features, kinds, pixels = self.see(tqdm(batches, name, dynamic_ncols=True))
        row = {"images": name, "N": len(features)}
        if wanted is not None:
            row["requested"] = (kinds == wanted).double().mean().item()
        row["complete"] = (pixels >= 3).all(1).double().mean().item()
        moments = Statistics().add(features).moments()
        row["distance"] = frechet_distance(*self.reference, *moments)
        row["precision"], row["recall"] = precision_recall(self.real[:len(features)], features)
        return row

# ---- InceptionV3 (Szegedy 2016) in the form FID is defined on: TensorFlow's weights of 2015 ---

class ConvBN(nn.Module):
    """Convolution with a kernel of height x width, batch norm with stored statistics, ReLU. Folding
    the norm into the convolution at each call is fast and keeps the published weights."""

    def __init__(self, c_in, c_out, height, width, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        scale = self.bn.weight / (self.bn.running_var + self.bn.eps).sqrt()  # (c_out,)
        weight = self.conv.weight * scale.view(-1, 1, 1, 1)                # (c_out, c_in, kh, kw)
        bias = self.bn.bias - self.bn.running_mean * scale                 # (c_out,)
        return F.relu_(F.conv2d(x, weight, bias, self.conv.stride, self.conv.padding))

class Mixed(nn.Module):
    """Branches that read the same input; their outputs are joined along the channels.

    branches: for each a list of convolutions that run one after the other, (published name,
    channels, kernel height, kernel width). One branch more is the pool, with a 1 x 1 convolution to
    c_pool channels, or alone if that is 0. stride: of the last convolution of each branch; 2 for a
    pool that halves the size."""

    def __init__(self, c_in, pool, c_pool, branches, stride=1):
        super().__init__()
        self.branches = []                  # of each branch the names of its convolutions
        for convolutions in branches:
            names = [name for name, _, _, _ in convolutions]
            c = c_in                        # channels of the next one's input
            for name, c_out, height, width in convolutions:
                if name == names[-1] and stride == 2:
                    conv = ConvBN(c, c_out, height, width, stride=2, padding="valid")
                else:
                    conv = ConvBN(c, c_out, height, width)
                self.add_module(name, conv)
                c = c_out
            self.branches.append(names)
        self.pool = pool
        self.branch_pool = nn.Identity()
        if c_pool > 0:
            self.branch_pool = ConvBN(c_in, c_pool, 1, 1)

    def forward(self, x):
        outputs = []
        for names in self.branches:
            h = x
            for name in names:
                h = self.get_submodule(name)(h)
            outputs.append(h)
        outputs.append(self.branch_pool(self.pool(x)))
        return torch.cat(outputs, 1)                       # (N, all channels, h, w)

class MixedFork(nn.Module):
    """Mixed_7b and 7c, on 8 x 8 places. Two branches end in a fork, a 1 x 3 and a 3 x 1 convolution
    that read the same input, and both of these are outputs."""

    def __init__(self, c_in, pool):
        super().__init__()
        self.pool = pool
        self.branch1x1 = ConvBN(c_in, 320, 1, 1)
        self.branch3x3_1 = ConvBN(c_in, 384, 1, 1)
        self.branch3x3_2a = ConvBN(384, 384, 1, 3)
        self.branch3x3_2b = ConvBN(384, 384, 3, 1)
        self.branch3x3dbl_1 = ConvBN(c_in, 448, 1, 1)
        self.branch3x3dbl_2 = ConvBN(448, 384, 3, 3)
        self.branch3x3dbl_3a = ConvBN(384, 384, 1, 3)
        self.branch3x3dbl_3b = ConvBN(384, 384, 3, 1)
        self.branch_pool = ConvBN(c_in, 192, 1, 1)

    def forward(self, x):
        h = self.branch3x3_1(x)                                            # (N, 384, 8, 8)
        h_dbl = self.branch3x3dbl_2(self.branch3x3dbl_1(x))                # (N, 384, 8, 8)
        outputs = [self.branch1x1(x), self.branch3x3_2a(h), self.branch3x3_2b(h),
                   self.branch3x3dbl_3a(h_dbl), self.branch3x3dbl_3b(h_dbl),
                   self.branch_pool(self.pool(x))]
        return torch.cat(outputs, 1)                                       # (N, 2048, 8, 8)

def mixed_5(c_in, pool, c_pool):
    """Mixed_5b, 5c and 5d, on 35 x 35 places. Two 3 x 3 convolutions see as far as one of 5 x 5."""
    return Mixed(c_in, pool, c_pool, [
        [("branch1x1", 64, 1, 1)],
        [("branch5x5_1", 48, 1, 1), ("branch5x5_2", 64, 5, 5)],
        [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 3), ("branch3x3dbl_3", 96, 3, 3)]])

def mixed_6(c, pool):
    """Mixed_6b to 6e, on 17 x 17 places. A 1 x 7 and a 7 x 1 convolution make one of 7 x 7."""
    return Mixed(768, pool, 192, [
        [("branch1x1", 192, 1, 1)],
        [("branch7x7_1", c, 1, 1), ("branch7x7_2", c, 1, 7), ("branch7x7_3", 192, 7, 1)],
        [("branch7x7dbl_1", c, 1, 1), ("branch7x7dbl_2", c, 7, 1), ("branch7x7dbl_3", c, 1, 7),
         ("branch7x7dbl_4", c, 7, 1), ("branch7x7dbl_5", 192, 1, 7)]])

class InceptionV3(nn.Module):
    """uint8 images (N, 3, H, W) -> the 2048-d features (N, 2048) that FID compares.

    resize, to 299 x 299: "pytorch-fid", bilinear, pixels to [-1, 1]; "clean", antialiased bicubic
    (Parmar 2022), pixels to (x - 128) / 128. fast: in bfloat16, which keeps 2 or 3 digits. The
    names of the weights are the published ones."""

    def __init__(self, resize="pytorch-fid", fast=False):
        super().__init__()
        self.resize = resize
        self.fast = fast
        self.hash = "none"                  # of the weights, see load_inception
        average = nn.AvgPool2d(3, 1, 1, count_include_pad=False)       # keeps the size
        halve = nn.MaxPool2d(3, 2)
        # forward calls the layers in this order. The input has 299 x 299 pixels.
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, 3, stride=2, padding="valid")
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3, 3, padding="valid")
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3, 3)
        self.maxpool1 = nn.MaxPool2d(3, 2)                 # 147 x 147 -> 73 x 73
        self.Conv2d_3b_1x1 = ConvBN(64, 80, 1, 1)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3, 3, padding="valid")
        # Another one, as `outputs` calls each module once.
        self.maxpool2 = nn.MaxPool2d(3, 2)                 # 71 x 71 -> 35 x 35
        self.Mixed_5b = mixed_5(192, average, 32)
        self.Mixed_5c = mixed_5(256, average, 64)
        self.Mixed_5d = mixed_5(288, average, 64)
        self.Mixed_6a = Mixed(288, halve, 0, [             # 35 x 35 -> 17 x 17
            [("branch3x3", 384, 3, 3)],
            [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 3),
             ("branch3x3dbl_3", 96, 3, 3)]], stride=2)
        self.Mixed_6b = mixed_6(128, average)
        self.Mixed_6c = mixed_6(160, average)
        self.Mixed_6d = mixed_6(160, average)
        self.Mixed_6e = mixed_6(192, average)
        self.Mixed_7a = Mixed(768, halve, 0, [             # 17 x 17 -> 8 x 8
            [("branch3x3_1", 192, 1, 1), ("branch3x3_2", 320, 3, 3)],
            [("branch7x7x3_1", 192, 1, 1), ("branch7x7x3_2", 192, 1, 7),
             ("branch7x7x3_3", 192, 7, 1), ("branch7x7x3_4", 192, 3, 3)]], stride=2)
        self.Mixed_7b = MixedFork(1280, average)
        self.Mixed_7c = MixedFork(2048, nn.MaxPool2d(3, 1, 1))     # a maximum, as in 2015
        self.fc = nn.Linear(2048, 1008)
        self.to(memory_format=torch.channels_last).eval().requires_grad_(False)

    def forward(self, images):
        features, _, _ = self.outputs(images)
        return features

    def outputs(self, images):
        """-> features (N, 2048), for FID; spatial (N, 2023), for sFID: the first 7 channels of
        Mixed_6d, at its 17 x 17 places, in the order of ADM's statistics (Nash 2021); logits (N,
        1008), for the Inception Score, without bias as in Salimans 2016."""
        x = self.resized(images)                           # (N, 3, 299, 299)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.fast):
            for name, layer in self.named_children():      # in the order above
                if name != "fc":
                    x = layer(x)
                if name == "Mixed_6d":
                    spatial = x[:, :7].permute(0, 2, 3, 1)                 # (N, 17, 17, 7)
        features = x.float().mean((2, 3))                  # (N, 2048, 8, 8) -> (N, 2048)
        return features, spatial.flatten(1).float(), features @ self.fc.weight.T

    def resized(self, images):
        """uint8 (N, 3, H, W) -> what the network expects, (N, 3, 299, 299) on its device."""
        device = self.fc.weight.device
        if self.resize == "clean" and device.type == "mps":
            x = images.cpu().float()        # older torch cannot antialias on MPS
        else:
            x = on_device(images, device).float()
        if self.resize == "clean":
            x = F.interpolate(x, (299, 299), mode="bicubic", antialias=True)
            x = (x.clamp(0, 255) - 128) / 128
        else:
            x = F.interpolate(x, (299, 299), mode="bilinear")
            x = x / 127.5 - 1
        return x.to(device, memory_format=torch.channels_last)             # 1.3x as fast

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")

def load_inception(path=None, resize="pytorch-fid", fast=False):
    """FID's weights, from where vmae.load_weights looks -> InceptionV3, whose `hash` is the
    beginning of the file's SHA-256. InputError if they cannot be had, or are of another network."""
    file, weights = vmae.load_weights("FID needs InceptionV3", INCEPTION_URL, path,
                                      "--inception-weights", "fc.bias")
    net = InceptionV3(resize, fast)
    try:
        net.load_state_dict(weights)        # a plain dict: some files lack the norms' counters
    except RuntimeError:
        raise InputError(f"{file}: not FID's InceptionV3 of 2015 (1,008 classes; torchvision's "
                         f"1000, this {len(weights['fc.bias'])}); take {INCEPTION_URL}") from None
    net.hash = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    return net

# ---- Tables and pictures ----------------------------------------------------------------------

def report(args, title, rows, **more):
    """Print rows, a list of dicts, as a Markdown table; a cell is empty if a row lacks its column.
    Write title, rows and `more` as JSON, into COMMAND.json in --out."""
    columns = []                            # each once, in order
    for row in rows:
        columns.extend(key for key in row if key not in columns)
    print(f"\n{title}\n")
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for row in rows:
        cells = [cell(row.get(key, "")) for key in columns]
        print(f"| {' | '.join(cells)} |")

    text = vmae.to_json(dict(title=title, rows=rows, **more), indent=1)
    os.makedirs(args.out, exist_ok=True)    # only now: a run that failed leaves no folder
    with vmae.whole_file(Path(args.out, f"{args.command}.json")) as file:
        file.write(text.encode())

def cell(value):
    """A value as text for a table: four digits, and large numbers with commas."""
    if isinstance(value, float) and abs(value) < 1000:
        return f"{value:.4g}"
    if isinstance(value, float):
        return f"{value:,.1f}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)

def fid_note(net, n):
    """What a FID has to be read with, for a title; nothing if there is none, as net is None. n:
    images on the smaller side. If they are few there is a warning, as FID falls when n grows."""
    if net is None:
        return ""
    few = None
    if n < 2048:
        few = "2,048"
    elif n < 10000:
        few = "10,000"
    if few is not None:
        warnings.warn(f"FID of {n} images, under {few}: compare it at equal numbers only, or use "
                      f"KID, which is unbiased")
    note = f"; FID: resize {net.resize}, Inception weights {net.hash}"
    if net.fast:
        note += ", bfloat16, so two or three digits count"
    return note

def save_rows(rows, names, path):
    """Save rows of uint8 images of one size as one PNG, and print the names of the rows."""
    vmae.save_grid(rows, path)
    print(f"\n{path}, the rows: {', '.join(names)}")

# ---- The command line -------------------------------------------------------------------------

# What the trainers write by default.
STAGE_ONE = "runs/vmae/last.pt"
STAGE_TWO = "runs/ldm/last.pt"

def main():
    if vmae.WORLD > 1:                      # the processes would write the same files
        raise InputError("evaluate.py measures in one process; start it without torchrun")
    parser = command_line()
    if len(sys.argv) == 1:
        run_all(parser)
        return
    args = parser.parse_args()
    fill_in(args)
    args.function(args)

def run_all(parser):
    """python evaluate.py: all commands but the slow ones, on the default runs, without LPIPS and
    Inception, whose weights would have to be downloaded."""
    for name in ("reconstruct", "smoothness", "separability", "efficiency", "compare",
                 "neighbours"):
        if name == "neighbours" and not os.path.exists(STAGE_TWO):
            print(f"skipped neighbours: there is no {STAGE_TWO}, which train_ldm.py writes")
            continue
        args = parser.parse_args([name])
        fill_in(args)
        args.networks = False
        try:
            args.function(args)
        except InputError as error:
            if name != "compare":
                raise
            # Not every user has two runs of stage one that can be compared.
            print(f"skipped compare: {error}")
    print("skipped LPIPS and rFID: `evaluate.py reconstruct --download` (weights: 528, 91 MB)\n"
          "skipped fid: `evaluate.py fid` draws samples and fetches Inception's 91 MB\n"
          "skipped faces: `evaluate.py faces` draws 1,024 samples, which takes minutes")

def fill_in(args):
    """Choose what depends on the device and on the other options. InputError if nothing can be
    written into --out: now, not after hours of work."""
    args.device = vmae.start(args.device)
    if args.batch is None:
        args.batch = 256 if args.device.type == "cuda" else 64
    if args.out is None:
        args.out = beside_the_checkpoint(args)
    # --out itself may not exist yet; then the nearest folder above it decides.
    folder = Path(args.out).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"--out {args.out}: nothing can be written into {folder}")

def beside_the_checkpoint(args):
    """The folder of the checkpoint that a command measures, or of the first one; otherwise runs."""
    measured = getattr(args, "fake", getattr(args, "ckpt", ""))
    if isinstance(measured, list):
        measured = measured[0]
    if os.path.isfile(measured):
        return os.path.dirname(measured) or "."
    return "runs"

def command_line():
    """-> the parser, with a sub-parser for each command, in the order of this file. What an option
    means stands in its help; what ranges it has, in its type."""
    parser = vmae.Parser(description=__doc__.split("\n")[0], usage="%(prog)s [command] [options]",
                         allow_abbrev=False)
    commands = parser.add_subparsers(metavar="command", dest="command", required=True,
                                     prog=parser.prog)

    command = add_command(commands, reconstruct, "Table 1: reconstruction of held-out images")
    add_ckpt(command)
    add_images(command, n=1000)
    add_inception(command)
    add_vgg(command)

    command = add_command(commands, fid, "Table 2: generated images against real ones")
    add = command.add_argument
    add("--fake", type=checkpoint, default=STAGE_TWO, help="a stage-two checkpoint, which is "
        "sampled; a folder; a .npz with arr_0; or the word faces (default: %(default)s)")
    add("--real", help="folder, .npz (mu and sigma, or arr_0), or the word faces (default: as in "
        "training)")
    add("--size", type=vmae.count_type, help="side that all images get, in pixels (default: that "
        "of the fakes)")
    add("--pairs", type=vmae.number_type(int, least=0), default=10000, help="images per side whose "
        "features are kept, 8 KB each, for KID, precision, recall (default: %(default)s)")
    add("--save-stats", metavar="FILE", help="write the real side's statistics to this .npz")
    add_batch(command, n=10000)
    add_cfg(command)
    add_inception(command)
    command.set_defaults(download=True)     # without its weights there is no FID

    command = add_command(commands, smoothness, "Figs. 3, 6: smoothness of the latent space")
    add_ckpt(command)
    add_images(command, n=256)
    command.add_argument("--eps", type=vmae.weight_type, nargs="+",
                         default=[0.0, .01, .05, .1, .2, .3], help="noise, in standard deviations "
                         "of a latent channel (default: 0 .01 .05 .1 .2 .3)")
    add_inception(command)
    add_vgg(command)

    command = add_command(commands, separability, "Figs. 4, 5, 7: order of the latent by object, "
                          "part and pattern")
    add_ckpt(command)
    add_images(command, n=512)

    command = add_command(commands, efficiency, "Table 3: sizes, operations and times of VMAE and "
                          "SD-VAE")
    add = command.add_argument
    add("--size", type=vmae.count_type, default=256, help="side of the images in pixels (default: "
        "%(default)s)")
    add("--time", action="store_true", help="also measure seconds")
    add("--batch", type=vmae.count_type, default=1, help="images at a time, for --time (default: "
        "%(default)s)")

    command = add_command(commands, compare, "Fig. 2: several runs on one radar")
    command.add_argument("runs", type=existing, nargs="*", help="run folders, or checkpoints "
                         "(default: those of stage one in runs/)")
    add_images(command, n=256)
    add_cfg(command)
    add_inception(command)
    add_vgg(command)

    command = add_command(commands, faces, "generated built-in faces, as a small network sees them")
    add = command.add_argument
    add("--ckpt", type=checkpoint, nargs="+", default=[STAGE_TWO], help="checkpoints of either "
        f"stage, trained on the faces (default: {STAGE_TWO})")
    add("--cfg", type=vmae.weight_type, nargs="+", default=[1.0, 1.5], help="guidance weights of "
        "samples, 1: none (default: 1 1.5)")
    add("--steps", type=vmae.count_type, default=50, help="network calls per image (default: "
        "%(default)s)")
    add("--sampler", choices=SAMPLERS, help="from noise to latents (default: as sample.py)")
    add_batch(command, n=512)

    command = add_command(commands, neighbours, "did the generator memorise?")
    command.add_argument("--ckpt", type=checkpoint, default=STAGE_TWO, help="a checkpoint of stage "
                         "two (default: %(default)s)")
    add_batch(command, n=16)
    add_cfg(command)
    add_inception(command)

    command = add_command(commands, curves, "losses and held-out numbers of runs, in one picture")
    command.add_argument("runs", type=existing, nargs="+", help="run folders")
    command.set_defaults(batch=1)           # fill_in reads it
    return parser

def existing(path):
    """The type of options that name a run or images. "faces" stands for the built-in ones."""
    if path != "faces" and not os.path.exists(path):
        raise argparse.ArgumentTypeError(f"{path}: no such file or folder")
    return path

def checkpoint(path):
    """The same, but a run folder stands for its last.pt."""
    return vmae.checkpoint_path(existing(path))

def add_command(commands, function, about):
    """-> the sub-parser of a command, with the options that all have."""
    command = commands.add_parser(function.__name__, help=about, description=about,
                                  allow_abbrev=False)
    command.set_defaults(function=function, networks=True)
    command.add_argument("--device", default="auto", help="cuda, cpu, mps... (default: cuda if "
                         "there is one)")
    command.add_argument("--out", metavar="FOLDER", help="folder of table and picture (default: "
                         "that of the checkpoint, otherwise runs)")
    return command

def add_ckpt(command):
    """What is measured, in the commands for autoencoders."""
    command.add_argument("--ckpt", type=checkpoint, nargs="+", default=[STAGE_ONE],
                         help="checkpoints of either stage, or published weights (default: "
                         f"{STAGE_ONE})")

def add_batch(command, n):
    """How many images, in all (by default n) and at a time."""
    command.add_argument("--n", type=vmae.count_type, default=n, help="images at most (default: "
                         "%(default)s)")
    command.add_argument("--batch", type=vmae.count_type, help="images at a time (default: 256 on "
                         "CUDA, else 64)")

def add_images(command, n):
    """Which held-out images, and how many of them."""
    command.add_argument("--data", metavar="FOLDER", help="folder of images, none of them trained "
                         "on (default: those held out in training)")
    add_batch(command, n)

def add_cfg(command):
    """How samples are drawn, in commands without options for the sampler and its steps."""
    command.add_argument("--cfg", type=vmae.weight_type, default=1.0, help="guidance weight of "
                         "samples, 1: none (default: %(default)s)")
    command.set_defaults(sampler=None, steps=50)

def add_inception(command):
    """How images get to InceptionV3, and where its weights come from."""
    add = command.add_argument
    add("--resize", choices=("pytorch-fid", "clean"), default="pytorch-fid", help="to Inception's "
        "299 pixels: pytorch-fid, or clean, antialiased as in clean-fid (default: %(default)s)")
    add("--fast", action="store_true", help="Inception in bfloat16: faster, but only two or three "
        "digits are right")
    add("--inception-weights", metavar="FILE", help="a copy of FID's InceptionV3 (default: torch "
        "hub's cache)")
    add("--download", action="store_true", help="fetch weights that are missing")

def add_vgg(command):
    """Where the weights inside LPIPS come from."""
    command.add_argument("--vgg-weights", metavar="FILE", help="a copy of VGG-16, for LPIPS "
                         "(default: torch hub's cache)")

if __name__ == "__main__":
    vmae.cli(main)

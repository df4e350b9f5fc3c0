"""Measure what the paper measures, one sub-command a figure or table.

    python evaluate.py                                    on the default runs, without downloads
    python evaluate.py reconstruct --ckpt runs/vmae/last.pt          Table 1
    python evaluate.py fid --fake runs/ldm/last.pt --real path       Table 2: FID and its kin
    python evaluate.py smoothness --ckpt a/last.pt b/last.pt         Fig. 6
    python evaluate.py separability                                  Figs. 4 and 7
    python evaluate.py efficiency --time                             Table 3
    python evaluate.py compare runs/ae runs/vae runs/vmae            Fig. 2
    python evaluate.py neighbours                                    did it memorise?

Each is a function whose docstring defines its quantities; it prints a Markdown table and writes
the same numbers as JSON, and a picture. Images meet every metric as uint8, as they leave a model.
"""
import argparse
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import resource
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import ldm
import vmae
from vmae import InputError

# ---------------------------------------------------------------------------------------------
# Pixel metrics
# ---------------------------------------------------------------------------------------------

def psnr(a, b):
    """Peak signal-to-noise ratio, 10 log10(255^2 / MSE), dB -> (N,); infinite for equal images.

    a, b: (N, C, H, W) in 0..255.
    """
    mse = ((a.double() - b.double()) ** 2).mean((1, 2, 3))
    return 10 * torch.log10(255**2 / mse)


def ssim(a, b):
    """Structural similarity (Wang 2004) -> (N,), 1 for equal images. a, b: (N, C, H, W) in 0..255.

    SSIM = (2 mu_a mu_b + c1)(2 cov + c2) / ((mu_a^2 + mu_b^2 + c1)(var_a + var_b + c2)) under an
    11 x 11 Gaussian window of sigma 1.5, biased (co)variances, c1 = (.01 * 255)^2, c2 = (.03 *
    255)^2; mean over channels and over the windows that lie inside. ValueError below 11 pixels.
    """
    if min(a.shape[2:]) < 11:
        raise ValueError(f"SSIM needs images of 11 pixels or more, not {min(a.shape[2:])}")
    C = a.shape[1]
    g = torch.exp(-torch.arange(-5, 6, dtype=torch.float64, device=a.device) ** 2 / (2 * 1.5**2))
    g = g / g.sum()

    def blur(x):                                           # (N, C, H, W) -> (N, C, H-10, W-10)
        x = F.conv2d(x, g.view(1, 1, 11, 1).expand(C, 1, 11, 1), groups=C)
        return F.conv2d(x, g.view(1, 1, 1, 11).expand(C, 1, 1, 11), groups=C)

    a, b = a.double(), b.double()
    mu_a, mu_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mu_a**2, blur(b * b) - mu_b**2, blur(a * b) - mu_a * mu_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    value = ((2 * mu_a * mu_b + c1) * (2 * cov + c2)
             / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2)))
    return value.mean((1, 2, 3))


# ---------------------------------------------------------------------------------------------
# InceptionV3 (Szegedy 2016) in the form FID is defined on: TensorFlow's weights of 2015
# ---------------------------------------------------------------------------------------------

class ConvBN(nn.Module):
    """Convolution, batch norm with its stored statistics, ReLU.

    The norm is folded into the convolution at each call: 22 M products, against 5.7 G for one
    image, spare three passes over every feature map and leave the state dict as published.
    """

    def __init__(self, c_in, c_out, kernel, stride=1, valid=False):
        super().__init__()
        padding = 0 if valid or stride == 2 else [k // 2 for k in kernel]  # keeps the grid, or not
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        scale = self.bn.weight / (self.bn.running_var + self.bn.eps).sqrt()
        weight = self.conv.weight * scale.view(-1, 1, 1, 1)
        bias = self.bn.bias - self.bn.running_mean * scale
        return F.relu_(F.conv2d(x, weight, bias, self.conv.stride, self.conv.padding))


class Mixed(nn.Module):
    """Branches side by side on one input, joined along the channels.

    branches: name -> its convolutions in order, each (channels, kernel height, kernel width); a
    list of two is a fork, both reading the same input. What is called branch_pool pools first.
    pool: "avg" of the pixels that are there (padding does not count), or "max". stride 2, in the
    last convolution of each branch and in the pool, halves the grid.
    """

    def __init__(self, c_in, branches, pool="avg", stride=1):
        super().__init__()
        self.pool, self.stride, self.paths, self.width = pool, stride, [], 0
        for branch, convs in branches.items():
            path, c = [], c_in
            for i, step in enumerate(convs):
                fork = step if isinstance(step, list) else [step]
                name = f"{branch}_{i + 1}" if len(convs) > 1 else branch
                path.append([name + letter for letter in "ab"] if len(fork) == 2 else [name])
                for key, (c_out, *kernel) in zip(path[-1], fork):
                    s = stride if i + 1 == len(convs) else 1
                    self.add_module(key, ConvBN(c, c_out, kernel, s))
                c = sum(c_out for c_out, *_ in fork)
            self.paths.append((branch == "branch_pool", path))
            self.width += c

    def forward(self, x):
        parts = []
        for pooled, path in self.paths:
            h = x
            if pooled and self.pool == "avg":
                h = F.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False)
            elif pooled:
                h = F.max_pool2d(x, 3, self.stride, padding=2 - self.stride)
            for names in path[:-1]:
                h = getattr(self, names[0])(h)
            parts += [getattr(self, name)(h) for name in path[-1]] if path else [h]
        return torch.cat(parts, 1)


def mixed_5(pool):
    """35 x 35: a 5 x 5, and two stacked 3 x 3 that see as far. pool: channels after pooling."""
    return dict(branch1x1=[(64, 1, 1)], branch5x5=[(48, 1, 1), (64, 5, 5)],
                branch3x3dbl=[(64, 1, 1), (96, 3, 3), (96, 3, 3)], branch_pool=[(pool, 1, 1)])


def mixed_6(c):
    """17 x 17: a 7 x 7 as a row and a column. c: channels inside the branches."""
    return dict(branch1x1=[(192, 1, 1)], branch7x7=[(c, 1, 1), (c, 1, 7), (192, 7, 1)],
                branch7x7dbl=[(c, 1, 1), (c, 7, 1), (c, 1, 7), (c, 7, 1), (192, 1, 7)],
                branch_pool=[(192, 1, 1)])


FORK = [(384, 1, 3), (384, 3, 1)]
MIXED_7 = dict(branch1x1=[(320, 1, 1)], branch3x3=[(384, 1, 1), FORK],     # 8 x 8
               branch3x3dbl=[(448, 1, 1), (384, 3, 3), FORK], branch_pool=[(192, 1, 1)])
MIXED = {  # name -> branches, pool, stride
    "Mixed_5b": (mixed_5(32),), "Mixed_5c": (mixed_5(64),), "Mixed_5d": (mixed_5(64),),
    "Mixed_6a": (dict(branch3x3=[(384, 3, 3)], branch3x3dbl=[(64, 1, 1), (96, 3, 3), (96, 3, 3)],
                      branch_pool=[]), "max", 2),
    "Mixed_6b": (mixed_6(128),), "Mixed_6c": (mixed_6(160),),
    "Mixed_6d": (mixed_6(160),), "Mixed_6e": (mixed_6(192),),
    "Mixed_7a": (dict(branch3x3=[(192, 1, 1), (320, 3, 3)], branch7x7x3=[
        (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3)], branch_pool=[]), "max", 2),
    "Mixed_7b": (MIXED_7,), "Mixed_7c": (MIXED_7, "max")}  # the last pools by max: a slip of 2015


class InceptionV3(nn.Module):
    """uint8 images (N, 3, H, W) -> 2048-d features (N, 2048), the input of FID.

    resize to 299 x 299: "pytorch-fid", bilinear without antialiasing, pixels to [-1, 1]; or
    "clean", bicubic with antialiasing and no rounding (Parmar 2022), pixels to (x - 128) / 128.
    fast: bfloat16, which keeps 2 to 3 digits.
    """

    def __init__(self, resize="pytorch-fid", fast=False):
        super().__init__()
        self.resize, self.fast, self.hash = resize, fast, "none"
        self.Conv2d_1a_3x3 = ConvBN(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = ConvBN(32, 32, (3, 3), valid=True)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = ConvBN(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = ConvBN(80, 192, (3, 3), valid=True)
        c = 192
        for name, arguments in MIXED.items():
            self.add_module(name, Mixed(c, *arguments))
            c = getattr(self, name).width
        self.fc = nn.Linear(c, 1008)
        self.to(memory_format=torch.channels_last).eval().requires_grad_(False)

    def forward(self, images):
        return self.outputs(images)[0]

    @torch.no_grad()
    def outputs(self, images):
        """-> features (N, 2048); spatial (N, 2023), the first 7 channels of Mixed_6d's first
        convolution, 17 x 17 (Nash 2021; TensorFlow's `mixed_6/conv`); logits (N, 1008), without
        the bias, as Salimans 2016 computed them."""
        x = images.to(self.fc.weight.device).float()
        if self.resize == "clean":
            x = F.interpolate(x, (299, 299), mode="bicubic", antialias=True).clamp(0, 255)
            x = (x - 128) / 128
        else:
            x = F.interpolate(x, (299, 299), mode="bilinear") / 127.5 - 1
        x = x.contiguous(memory_format=torch.channels_last)                # 1.4x as fast
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.fast):
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
            x = F.max_pool2d(x, 3, 2)                                      # (N, 64, 73, 73)
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
            x = F.max_pool2d(x, 3, 2)                                      # (N, 192, 35, 35)
            for name in MIXED:
                if name == "Mixed_6d":
                    spatial = self.Mixed_6d.branch1x1(x)[:, :7].flatten(1).float()
                x = getattr(self, name)(x)
        features = x.float().mean((2, 3))                  # (N, 2048, 8, 8) -> (N, 2048)
        return features, spatial, features @ self.fc.weight.T


INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")


def cached(url):
    """Where torch hub keeps, or would keep, the file of this address."""
    return Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])


def load_inception(path=None, resize="pytorch-fid", fast=False):
    """FID's weights -> InceptionV3; `.hash` is the beginning of the file's SHA-256.

    path: a local copy of INCEPTION_URL; otherwise torch hub's cache, otherwise the download, of
    which torch checks the hash. InputError names URL, path and flag, or the wrong network.
    """
    target = Path(path or cached(INCEPTION_URL))
    try:
        if path is None and not target.exists():
            torch.hub.load_state_dict_from_url(INCEPTION_URL, map_location="cpu", check_hash=True)
        weights = dict(torch.load(target, map_location="cpu", weights_only=True))
        classes = len(weights["fc.bias"])
    except Exception as error:
        why = (str(error) or repr(error)).splitlines()[0]
        raise InputError(f"FID needs InceptionV3: {target} cannot be read ({why}); download "
                         f"{INCEPTION_URL} to that path, or name a copy with --inception-weights"
                         ) from None
    if classes != 1008:
        raise InputError(f"{target}: torchvision's ImageNet network, {classes} classes; FID is "
                         f"defined on TensorFlow's of 2015 (other weights, other pools, 1,008 "
                         f"classes), and would compare with nobody's: take {INCEPTION_URL}")
    net = InceptionV3(resize, fast)
    for key, value in net.state_dict().items():            # a counter that some copies leave out
        if key.endswith("num_batches_tracked"):
            weights.setdefault(key, value)
    try:
        net.load_state_dict(weights)
    except RuntimeError:
        raise InputError(f"{target}: not FID's InceptionV3; take {INCEPTION_URL}") from None
    net.hash = hashlib.sha256(target.read_bytes()).hexdigest()[:8]
    return net


# ---------------------------------------------------------------------------------------------
# From features to numbers
# ---------------------------------------------------------------------------------------------

class Statistics:
    """Mean and covariance of rows by running sums in float64: D^2 numbers, however many rows.

    The first batch's mean is taken off everything, so that the sums of squares do not cancel.
    """

    def __init__(self):
        self.n = 0

    def add(self, rows):
        """rows: (B, D)."""
        rows = rows.double().cpu()
        if self.n == 0:
            self.shift, self.total = rows.mean(0), torch.zeros_like(rows[0])
            self.outer = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
        rows = rows - self.shift
        self.n += len(rows)
        self.total += rows.sum(0)
        self.outer.addmm_(rows.T, rows)

    def moments(self):
        """-> mean (D,), covariance (D, D) with n - 1 below, as numpy.cov."""
        mean = self.total / self.n
        sigma = (self.outer - self.n * torch.outer(mean, mean)) / max(self.n - 1, 1)
        return (self.shift + mean).numpy(), sigma.numpy()


def cholesky(sigma):
    """Covariance (D, D) -> L (D, r) with L L^T = sigma, r its rank: N images span N - 1
    dimensions at the most. Pivots below D times float precision are rounding, left out;
    ValueError if what is left out is more than rounding, as no covariance does that."""
    if not np.isfinite(sigma).all():
        raise ValueError("a covariance holds NaN or infinity")
    precision = 1e-4 if sigma.dtype == np.float32 else 1e-8
    sigma = sigma.astype(np.float64)
    L, order, r, _ = scipy.linalg.lapack.dpstrf(sigma, lower=1)            # pivoted
    factor = np.zeros((len(sigma), r))
    factor[order - 1] = np.tril(L)[:, :r]
    if r < len(sigma) and (np.abs(sigma - factor @ factor.T).max()
                           > precision * max(np.abs(sigma).max(), 1e-300)):
        raise ValueError("not a covariance: it has negative eigenvalues beyond rounding")
    return factor


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """FID = |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr sqrt(S1 S2). Heusel 2017, Eq. 6.

    With S1 = A A^T and S2 = B B^T, the eigenvalues of S1 S2 are the squared singular values of
    A^T B: tr sqrt(S1 S2) is their sum, real and not negative, and no matrix root is taken. In
    float64; A of rank 300 makes it a small problem. mu (D,), sigma (D, D), numpy or torch.
    ValueError if shapes differ or a sigma is no covariance.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(v) for v in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == 2 * mu1.shape:
        raise ValueError(f"statistics of {sigma1.shape} and {sigma2.shape} do not compare")
    M = cholesky(sigma1).T @ cholesky(sigma2)                              # (r1, r2)
    root = np.linalg.svd(M, compute_uv=False).sum()
    difference = mu1.astype(np.float64) - mu2
    distance = difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * root
    return max(float(distance), 0.0)        # below 0 by rounding alone


def kid(a, b):
    """KID = MMD^2 with k(x, y) = (x.y / D + 1)^3, unbiased at any N (Binkowski 2018).

    a (N, D), b (M, D): mean of k over pairs within a, plus within b, less twice between, no image
    being paired with itself. Close to 0, also below it, for samples of one distribution.
    """
    a, b = a.double(), b.double()

    def total(x, y):                                       # in blocks: N x M is never in memory
        return sum(((rows @ y.T / x.shape[1] + 1) ** 3).sum().item() for rows in x.split(1024))

    def within(x):
        itself = ((x.square().mean(1) + 1) ** 3).sum().item()
        return (total(x, x) - itself) / (len(x) * (len(x) - 1))

    return within(a) + within(b) - 2 * total(a, b) / (len(a) * len(b))


def nearest(rows, batches, k):
    """rows (Q, D), batches of (B, D) -> Euclidean distances to, and numbers of, the k nearest
    rows of all batches, (Q, k) each; the memory is that of one batch."""
    best = torch.empty(len(rows), 0)
    index, at = torch.empty(len(rows), 0, dtype=torch.long), 0
    for batch in batches:
        d = torch.cat([best, torch.cdist(rows, batch)], 1)                 # (Q, k + B)
        number = torch.arange(at, at + len(batch)).expand(len(rows), -1)
        best, place = d.topk(min(k, d.shape[1]), largest=False)
        index, at = torch.cat([index, number], 1).gather(1, place), at + len(batch)
    return best, index


def precision_recall(real, fake, k=3):
    """Kynkaanniemi 2019: a set's manifold is the union of balls around its members, each out to
    the k-th nearest other member. Precision = share of fakes on the manifold of the real,
    recall = share of the real on the manifold of the fakes. (N, D), (M, D) -> two floats.
    """
    def on_manifold(rows, members):
        radius = torch.cat([nearest(block, members.split(4096), k + 1)[0][:, -1]  # itself first
                            for block in members.split(4096)])
        inside = [(torch.cdist(block, members) <= radius).any(1) for block in rows.split(512)]
        return torch.cat(inside).double().mean().item()

    return on_manifold(fake, real), on_manifold(real, fake)


class Features:
    """What a set of images leaves behind once Inception has seen it; images are not kept.

    Running sums serve FID, sFID and the Inception Score; the features themselves, 8 KB an image,
    are kept only of the first `pairs` images, for the metrics that compare pairs.
    """

    def __init__(self, net, pairs=0):
        self.net, self.pairs, self.kept = net, pairs, []
        self.pool, self.spatial, self.entropy, self.p = Statistics(), Statistics(), 0.0, 0.0

    def add(self, images):
        """images: uint8 (B, 3, H, W)."""
        features, spatial, logits = (v.cpu() for v in self.net.outputs(images))
        room = self.pairs - sum(map(len, self.kept))
        self.kept += [features[:room]] if room > 0 else []
        self.pool.add(features)
        self.spatial.add(spatial)
        log_p = logits.double().log_softmax(1)
        self.p += log_p.exp().sum(0)                                       # (1008,)
        self.entropy -= (log_p.exp() * log_p).sum().item()

    def see(self, batches, n):
        """All of the batches, n images, with a progress bar -> self."""
        with tqdm(total=n, desc="Inception", dynamic_ncols=True, disable=None) as bar:
            for images in batches:
                self.add(images)
                bar.update(len(images))
        return self

    def inception_score(self):
        """IS = exp(E KL(p(y|x) || p(y))) = exp(H(y) - E H(y|x)), from 1 to 1,008. Salimans 2016.

        Over all images at once; many papers average over parts of 5,000, which comes out lower.
        """
        p = self.p / self.pool.n
        return math.exp(-torch.special.xlogy(p, p).sum().item() - self.entropy / self.pool.n)


# ---------------------------------------------------------------------------------------------
# Images, models and weights as the command line names them
# ---------------------------------------------------------------------------------------------

def optional_nets(args, lpips=True):
    """-> (LPIPS or None, InceptionV3 or None): those whose weights are here, or may be fetched;
    for the others a line that says what is left out and how to get it."""
    nets = []
    for name, size, url, path, load in (
            ("LPIPS", 528, vmae.VGG_URL, args.vgg_weights, vmae.load_lpips),
            ("FID", 91, INCEPTION_URL, args.inception_weights,
             lambda path: load_inception(path, args.resize, args.fast))):
        if path or args.download or cached(url).exists():
            nets.append(load(path).to(vmae.pick_device(args.device)))
        else:
            nets.append(None)
            flag = "--vgg-weights" if name == "LPIPS" else "--inception-weights"
            print(f"skipped {name}: --download fetches its weights ({size} MB), or {flag} PATH")
    return nets


def open_stage_one(path, args):
    """A checkpoint of either stage -> its autoencoder on --device, and how that was trained."""
    ckpt = vmae.read_checkpoint(path, "model_args", "model", "train_args")
    ckpt = ckpt.get("vmae", ckpt)           # a stage-two file holds its stage one
    return vmae.build_vmae(ckpt).to(vmae.pick_device(args.device)), ckpt["train_args"]


def held_out(model, trained, args):
    """At most --n images of --data, or of those held out in training -> their number, batches of
    (uint8 (B, 3, S, S), labels (B,))."""
    if args.data is not None:
        data = vmae.ImageFolder(args.data, model.img_size)
    else:
        data = vmae.open_images(trained["data"], model.img_size, "val", trained["val"])
    return shuffled(data, args)


def shuffled(data, args):
    """At most --n images of a dataset, a fixed draw that mixes classes, as `held_out` gives them."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:args.n].tolist()
    return len(order), ((vmae.to_uint8(x), y) for x, y in DataLoader(Subset(data, order), args.batch))


def pixels(images):
    """uint8 0..255 -> float [-1, 1], what models and LPIPS take."""
    return images / 127.5 - 1


@torch.no_grad()
def encode(model, images, args):
    """uint8 (N, 3, S, S) -> the posterior's mode (N, d, h, w), as at use time, on the CPU."""
    device = vmae.pick_device(args.device)
    return torch.cat([model.encode(pixels(x.to(device))).mode().cpu()
                      for x in images.split(args.batch)])


@torch.no_grad()
def decode(model, z, args):
    """z (N, d, h, w) -> uint8 (N, 3, S, S) on the CPU."""
    device = vmae.pick_device(args.device)
    return torch.cat([vmae.to_uint8(model.decode(part.to(device))).cpu()
                      for part in z.split(args.batch)])


def draw_samples(path, args):
    """A stage-two checkpoint -> batches of --n samples, uint8, those that sample.py --seed 0
    draws: the classes in turn, 50 steps, guidance --cfg."""
    model, schedule, ckpt = ldm.load_ldm(path)             # the EMA weights
    device = vmae.pick_device(args.device)
    model, first = model.to(device), vmae.build_vmae(ckpt["vmae"]).to(device)
    mean, std = ckpt["latent_mean"].to(device), ckpt["latent_std"].to(device)
    shape, K = (first.latent_dim, first.grid, first.grid), len(ckpt["classes"])
    if args.cfg != 1 and K == 0:
        raise InputError(f"--cfg {args.cfg}: {path} is unconditional, leave --cfg out")
    for start in range(0, args.n, args.batch):
        index = range(start, min(start + args.batch, args.n))
        z = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(i))
                         for i in index]).to(device)                       # (B, d, h, w)
        y = torch.tensor([i % K for i in index], device=device) if K else None
        with torch.no_grad():
            if schedule.objective == "flow":
                z = ldm.euler_sample(model, z, y, steps=50, w=args.cfg)
            else:
                z = ldm.ddim_sample(model, schedule, z, y, steps=50, w=args.cfg)
            yield vmae.to_uint8(first.decode(ldm.denormalise(z, mean, std))).cpu()


def open_source(source, args, size=None):
    """--real or --fake as typed -> (number, side, batches of uint8 (B, 3, side, side)).

    A folder or "faces" (the training ones, built in) at `size`, by default the first file's short
    side; a .npz with arr_0, uint8 (N, H, W, 3) as ADM's; a stage-two checkpoint, sampled.
    """
    if source.endswith(".npz"):
        images = torch.from_numpy(read_npz(source)["arr_0"])[:args.n].permute(0, 3, 1, 2)
        if size not in (None, images.shape[2]):
            raise InputError(f"{source}: images of {images.shape[2]} pixels, the others have "
                             f"{size}; give a folder, which is resized")
        return len(images), images.shape[2], images.split(args.batch)
    if os.path.isfile(source):
        size = ldm.load_ldm(source)[2]["vmae"]["model_args"]["img_size"]
        return args.n, size, draw_samples(source, args)
    if source != "faces" and size is None:
        paths = vmae.list_images(source)    # none: ImageFolder says so
        size = min(vmae.open_image(os.path.join(source, paths[0])).size) if paths else 32
    data = vmae.Faces(size or 32) if source == "faces" else vmae.ImageFolder(source, size)
    n, batches = shuffled(data, args)
    return n, data.size, (x for x, _ in batches)


def trained_on(path):
    """A stage-two checkpoint -> the --real it is compared with, its training data."""
    return ldm.load_ldm(path)[2]["train_args"]["data"] or "faces"


def read_npz(path):
    """A .npz as a dict. InputError unless it holds images, arr_0, or statistics, mu and sigma."""
    try:
        with np.load(path) as file:
            entries = dict(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a .npz ({error})") from None
    if not {"arr_0"} <= set(entries) and not {"mu", "sigma"} <= set(entries):
        raise InputError(f"{path}: neither images (arr_0) nor statistics (mu, sigma) in it")
    return entries


# ---------------------------------------------------------------------------------------------
# Tables and pictures
# ---------------------------------------------------------------------------------------------

def report(title, rows, path, **more):
    """Print rows, a list of dicts, as one Markdown table and write them, and `more`, as JSON."""
    def cell(value):
        if isinstance(value, float):
            return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.1f}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    columns = list(dict.fromkeys(key for row in rows for key in row))      # in order, once each
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for row in rows:
        print(f"| {' | '.join(cell(row.get(key, '')) for key in columns)} |")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(dict(title=title, rows=rows, **more), indent=1) + "\n")


def target(args, name):
    """Where a file goes: into --out, or beside what is measured; the folder is made."""
    folder = args.out or next((p if os.path.isdir(p) else os.path.dirname(p) or "." for p in
                               [*getattr(args, "ckpt", []), getattr(args, "fake", "")] if p), "runs")
    os.makedirs(folder, exist_ok=True)
    return os.path.join(folder, name)


def run_name(path):
    """runs/vmae/last.pt -> vmae: what the user called the run."""
    return Path(path).resolve().parent.name


def picture(rows, path):
    """Rows of uint8 images as one PNG, those of different sizes enlarged to the largest."""
    size, k = max(row.shape[-1] for row in rows), min(map(len, rows))
    vmae.save_grid([F.interpolate(pixels(row[:k]), size) for row in rows], path)


COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#999999")


def canvas(width, height, names):
    """-> (image, pen, font), names in their colours along the left edge. Drawn at twice the size
    it is saved at, which smooths every line."""
    image = Image.new("RGB", (2 * width, 2 * height), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(24)
    for i, name in enumerate(names):
        x, y = 40, 2 * height - 36 * (len(names) - i)
        pen.ellipse((x - 10, y - 10, x + 10, y + 10), fill=COLOURS[i % len(COLOURS)])
        pen.text((x + 24, y), name, "#333333", font, "lm")
    return image, pen, font


def plot(path, series, x_label, y_label, lines=True):
    """series: name -> [(x, y), ...], joined by lines or as a cloud of dots. Writes a PNG."""
    image, pen, font = canvas(560, 340 + 18 * len(series), series)
    points = np.array([p for curve in series.values() for p in curve])
    cut = (0, 100) if lines else (0.5, 99.5)               # a cloud's stragglers may leave
    low, high = np.percentile(points, cut, axis=0)
    span = np.where(high > low, high - low, 1)

    def place(p):                                          # y up
        return tuple((130, 560) + (np.array(p) - low) / span * (940, -500))

    for x in (sorted({x for x, _ in points}) if lines else np.linspace(low[0], high[0], 5)):
        pen.line([place((x, low[1])), place((x, high[1]))], "#dddddd", 2)
        pen.text((place((x, 0))[0], 585), f"{x:.3g}", "#333333", font, "mm")
    for y in np.linspace(low[1], high[1], 5):
        pen.line([place((low[0], y)), place((high[0], y))], "#dddddd", 2)
        pen.text((115, place((0, y))[1]), f"{y:.4g}", "#333333", font, "rm")
    r = 8 if lines else 3
    for curve, colour in zip(series.values(), itertools.cycle(COLOURS)):
        lines and pen.line([place(p) for p in curve], colour, 4)
        for x, y in (place(p) for p in curve):
            if 100 < x < 1100 and 30 < y < 590:
                pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    pen.text((600, 625), x_label, "#333333", font, "mm")
    pen.text((130, 26), y_label, "#333333", font, "lm")
    image.resize((image.width // 2, image.height // 2), Image.LANCZOS).save(path)


def radar(path, axes, shapes):
    """axes: names; shapes: name -> a value in [0, 1] for each, 0 on the inner ring, 1 outside."""
    image, pen, font = canvas(640, 440 + 18 * len(shapes), shapes)
    turn = [2 * math.pi * i / len(axes) - math.pi / 2 for i in range(len(axes))]

    def place(angle, value):
        r = 80 + 240 * value
        return 640 + r * math.cos(angle), 420 + r * math.sin(angle)

    for value in (0, 0.5, 1):
        pen.line([place(a, value) for a in turn + turn[:1]], "#bbbbbb", 2)
    for angle, name in zip(turn, axes):
        pen.line([place(angle, -1 / 3), place(angle, 1)], "#bbbbbb", 2)
        anchor = "lmr"[1 - round(math.cos(angle))] + "m"   # away from the middle
        pen.text(place(angle, 1.12), name, "#333333", font, anchor)
    for values, colour in zip(shapes.values(), itertools.cycle(COLOURS)):
        pen.line([place(*p) for p in zip(turn + turn[:1], values + values[:1])], colour, 6, "curve")
    image.resize((image.width // 2, image.height // 2), Image.LANCZOS).save(path)


# ---------------------------------------------------------------------------------------------
# Sub-commands
# ---------------------------------------------------------------------------------------------

def scores(pairs, nets, args, real=None):
    """Batches of uint8 (original, reconstruction) -> (the metrics of Table 1, Features of the
    originals, which a later call may reuse as `real`).

    L1 = mean |x - x_hat| with pixels in [0, 1]; PSNR, SSIM as above; LPIPS (Zhang 2018, VGG); of
    each the mean over images of its value for one. rFID: FID between originals and x_hat, as sets.
    """
    (lpips_net, inception), device = nets, vmae.pick_device(args.device)
    fake, given, values = inception and Features(inception), real, []
    real = real or inception and Features(inception)
    for a, b in pairs:
        l1 = (a.double() - b.double()).abs().mean((1, 2, 3)) / 255
        row = [l1, psnr(a, b), ssim(a, b)]                                 # (B,) each
        if lpips_net:
            with torch.no_grad():
                row += [lpips_net(pixels(a.to(device)), pixels(b.to(device))).flatten().cpu()]
        values.append(torch.stack([v.double() for v in row]))
        if inception:
            fake.add(b)
            given or real.add(a)
    row = dict(zip(("L1", "PSNR", "SSIM", "LPIPS"), torch.cat(values, 1).mean(1).tolist()))
    if inception:
        row["rFID"] = frechet_distance(*real.pool.moments(), *fake.pool.moments())
    return row, real


def reconstruct(args):
    """Table 1: how much of held-out images survives encode and decode, nothing masked. The
    metrics are defined in `scores`; z is the posterior's mode."""
    nets, rows, shown = optional_nets(args), [], []
    for path in args.ckpt:
        model, trained = open_stage_one(path, args)
        n, batches = held_out(model, trained, args)
        batches = ((x, decode(model, encode(model, x, args), args)) for x, _ in batches)
        first = next(batches)
        shown += [v[:16] for v in first]
        rows.append({"checkpoint": path, "N": n,
                     **scores(itertools.chain([first], batches), nets, args)[0]})
    picture(shown, target(args, "reconstruct.png"))
    report("Reconstruction of held-out images (Table 1)", rows, target(args, "reconstruct.json"),
           inception=nets[1] and nets[1].hash, picture="original above reconstruction")


def smoothness(args):
    """Fig. 6: does a small step in latent space stay a small step in the image?

        z' = z + eps * s_c * N(0, 1),  s_c the standard deviation of channel c over the images

    x_hat' = decode(z') is scored against the original; `lost` is the PSNR lost since eps = 0. The
    same noise for every eps, and for every model with a latent of that shape.
    """
    nets, rows, shown, curves = optional_nets(args), [], [], {}
    y = "rFID" if nets[1] else "PSNR"       # the paper's axis is rFID
    for path in args.ckpt:
        model, trained = open_stage_one(path, args)
        x = torch.cat([x for x, _ in held_out(model, trained, args)[1]])   # (N, 3, S, S)
        z, real, strip = encode(model, x, args), None, [x[:1]]
        for eps in args.eps:
            x_hat = decode(model, perturb(z, eps), args)
            row, real = scores(zip(x.split(args.batch), x_hat.split(args.batch)), nets, args, real)
            rows.append({"checkpoint": path, "eps": eps, **row})
            curves.setdefault(path, []).append((eps, row[y]))
            strip.append(x_hat[:1])
        for row in rows[-len(args.eps):]:
            row["lost"] = rows[-len(args.eps)]["PSNR"] - row["PSNR"]
        shown.append(torch.cat(strip))
    picture(shown, target(args, "smoothness_strip.png"))
    plot(target(args, "smoothness.png"), curves, "eps, in standard deviations of each channel", y)
    report(f"Smoothness: reconstruction from z + eps std N(0, 1), {len(x)} images (Fig. 6)", rows,
           target(args, "smoothness.json"))


def perturb(z, eps):
    """z (N, d, h, w) + eps times each channel's standard deviation times fixed N(0, 1) noise."""
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    return z + eps * z.std((0, 2, 3), keepdim=True) * noise


def separation(z, group, image):
    """Latent tokens z (M, d), the group of each (M,) and the image it is from (M,) -> numbers.

    The paper plots sigma^2 and rho without a formula; these are our definitions. With every
    channel scaled to mean 0 and variance 1, mu_g the mean of group g:
        sigma^2 = sum_i |z_i - mu_g(i)|^2 / sum_i |z_i|^2    spread within groups, share of total
        rho = mean over pairs g < g' of |mu_g - mu_g'| / sqrt(mean_i |z_i - mu_g(i)|^2)
    probe: a linear classifier (ridge regression on one-hot labels, groups weighted equally) fit on
    images of even number, its accuracy on the others, mean over groups; chance is 1 / groups.
    """
    z = (z.double() - z.double().mean(0)) / z.double().std(0, unbiased=False).clamp(min=1e-12)
    _, group, count = group.unique(return_inverse=True, return_counts=True)
    member = F.one_hot(group).double()                                     # (M, G)
    mu = member.T @ z / count[:, None]                                     # (G, d)
    within = (z - mu[group]).square().sum(1).mean()
    A, fit = F.pad(z, (0, 1), value=1.0), image % 2 == 0                   # a column of ones
    weight = (1 / member[fit].sum(0).clamp(min=1))[group[fit], None]
    W = torch.linalg.solve((A[fit] * weight).T @ A[fit] + 1e-3 * torch.eye(A.shape[1]).double(),
                           (A[fit] * weight).T @ member[fit])              # (d + 1, G)
    hit = ((A[~fit] @ W).argmax(1) == group[~fit]).double()
    tried = member[~fit].sum(0)
    return {"groups": len(count), "tokens": len(z),
            "sigma^2": (within / z.square().sum(1).mean()).item(),
            "rho": (torch.pdist(mu).mean() / within.sqrt()).item(),
            "probe": ((member[~fit].T @ hit) / tried)[tried > 0].mean().item(),
            "chance": 1 / len(count)}


def face_levels(model, args):
    """Tokens of held-out built-in faces on the paper's levels -> name: (z, group, image).

    A token belongs to the part that covers most of its patch, and is left out where none covers
    more than half. object: the tokens of the head by kind; part: all by part; pattern: the skin's.
    """
    faces, tokens = vmae.Faces(model.img_size, "val"), []
    for start in range(0, min(args.n, len(faces)), args.batch):            # bounded memory
        numbers = torch.arange(start, min(start + args.batch, args.n, len(faces)))
        x, kind, pattern, part = faces.render(numbers)
        z = encode(model, vmae.to_uint8(x), args).permute(0, 2, 3, 1)      # (B, h, w, d)
        cover = F.one_hot(part, len(vmae.PARTS)).permute(0, 3, 1, 2).float()
        share, part = F.avg_pool2d(cover, model.patch_size).max(1)         # (B, h, w) each
        whole = [v.view(-1, 1, 1).expand_as(part) for v in (kind, pattern, numbers)]
        clear = share > 0.5
        tokens.append([v[clear] for v in (z, part, *whole)])
    z, part, kind, pattern, image = map(torch.cat, zip(*tokens))           # (M, d), (M,)...
    levels = {"object": (part > 0, kind), "part": (part >= 0, part), "pattern": (part == 2, pattern)}
    return {name: (z[m], group[m], image[m]) for name, (m, group) in levels.items()}


def separability(args):
    """Figs. 4 and 7: is the latent ordered by object, by part, by pattern? `separation` defines
    the numbers, `face_levels` the groups. Class folders (--data, or those of training) give the
    object level, every token of an image belonging to its class; the built-in faces all three."""
    rows = []
    for path in args.ckpt:
        model, trained = open_stage_one(path, args)
        levels = {f"faces, {k}": v for k, v in face_levels(model, args).items()}
        if args.data or trained["data"]:
            _, batches = held_out(model, trained, args)
            z, y = zip(*((encode(model, x, args).permute(0, 2, 3, 1), y) for x, y in batches))
            z, y = torch.cat(z), torch.cat(y)                              # (N, h, w, d), (N,)
            owner = [v.view(-1, 1, 1).expand(z.shape[:3]).flatten() for v in (y, torch.arange(len(y)))]
            if len(y.unique()) > 1:
                levels["classes, object"] = z.flatten(0, 2), *owner
            else:
                print("skipped the classes of the data: it has one at the most")
        rows += [{"checkpoint": path, "level": k, **separation(*v)} for k, v in levels.items()]
        z, part, _ = levels["faces, part"]
        z = (z - z.mean(0)) / z.std(0).clamp(min=1e-12)
        axes = torch.linalg.eigh(z.T @ z).eigenvectors[:, -2:].flip(1)     # (d, 2)
        points, names = (z @ axes).tolist(), vmae.PARTS
        plot(target(args, f"separability.png" if len(args.ckpt) == 1 else
                    f"separability_{run_name(path)}.png"),
             {name: [p for p, g in zip(points, part) if g == i][:1500] for i, name in enumerate(names)},
             "first principal component", "second", lines=False)
    report("Order in latent space, our definition (Figs. 4, 7): low sigma^2 and high rho separate",
           rows, target(args, "separability.json"))


class Work(TorchFunctionMode):
    """Counts what runs inside it: multiply-adds of linear maps and convolutions ("body") and of
    attention's two products, q k^T and the sum over v; and the elements of LayerNorms."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in ("linear", "conv2d"):                   # each output is one row of the weight
            self.count["body"] += out.numel() * args[1][0].numel()
        elif name == "scaled_dot_product_attention":
            self.count["attention"] += (args[0].numel() + out.numel()) * args[1].shape[-2]
        elif name == "layer_norm":
            self.count["norm"] += out.numel()
        return out


BODIES = {"SD-VAE": (vmae.ConvAutoencoder, vmae.conv_sizes["base"]),
          "VMAE": (vmae.VMAE, vmae.sizes["base"])}


def efficiency(args):
    """Table 3: VMAE `base` against the SD-VAE at --size pixels, counted from the modules.

    MB: fp32 MiB of everything in the state dict. GFLOPs in the paper's convention are multiply-
    adds of the encoder without attention's products, for a batch of 128; its 703.9 appears once
    each element of a LayerNorm counts four. Last column: encoder and decoder with attention,
    one image, a multiply-add being two operations. Nothing is computed: tensors are `meta`.
    --time: seconds of encode, decode, training step (forward, backward); peak memory in MiB, of a
    process of its own on a CPU, of the allocator on CUDA.
    """
    rows = []
    for name, (body, kwargs) in BODIES.items():
        with torch.device("meta"), torch.no_grad():
            model = body(args.size, **kwargs)
            with Work() as encoder:
                z = model.encode(torch.empty(1, 3, args.size, args.size)).mode()
            with Work() as decoder:
                model.decode(z)
        numbers = sum(v.numel() for v in model.state_dict().values())
        e, d = encoder.count, decoder.count
        both = e + d
        rows.append({"model": name, "numbers": numbers, "MB": numbers * 4 / 2**20,
                     "GFLOPs, paper": e["body"] * 128 / 1e9,
                     "+ 4 a norm": (e["body"] + 4 * e["norm"]) * 128 / 1e9,
                     "encoder GMACs": e["body"] / 1e9, "decoder GMACs": d["body"] / 1e9,
                     "+ attention, GFLOPs": 2 * (both["body"] + both["attention"]) / 1e9})
        if args.time:
            with multiprocessing.get_context("spawn").Pool(1) as pool:     # memory of its own
                rows[-1].update(pool.apply(measure, (name, args.size, args.batch, args.device)))
    share = {k: f"{rows[1][k] / rows[0][k]:.1%}" for k in list(rows[0])[1:]}
    report(f"Efficiency at {args.size} px (Table 3)", rows + [{"model": "ratio", **share}],
           target(args, "efficiency.json"))
    args.time or print("skipped the clock: --time measures seconds and memory")


def measure(name, size, batch, device):
    """Best of 3 seconds and peak memory of one of BODIES; see `efficiency`."""
    body, kwargs = BODIES[name]
    device = vmae.pick_device(device)
    model, row = body(size, **kwargs).to(device), {}
    x = torch.rand(batch, 3, size, size, device=device) * 2 - 1

    def train():
        model.zero_grad()
        (model.decode(model.encode(x).sample()) - x).square().mean().backward()

    with torch.no_grad():
        z = model.encode(x).mode()
    for what, work in (("encode", lambda: model.encode(x)), ("decode", lambda: model.decode(z)),
                       ("train", train)):
        times = []
        for _ in range(4):                                 # the first warms up
            start = time.perf_counter()
            with torch.set_grad_enabled(what == "train"):
                work()
            torch.cuda.synchronize() if device.type == "cuda" else None
            times.append(time.perf_counter() - start)
        row[f"{what} s"] = min(times[1:])
    peak = (torch.cuda.max_memory_allocated() if device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return {**row, "peak MiB": peak / 2**20}


def compare(args):
    """Fig. 2: several runs on one radar, each axis rescaled from the worst run (inner ring) to the
    best (outer ring), as the paper does.

    smoothness    PSNR between decode(z) and decode(z + .1 std N(0, 1)), as in Fig. 6
    compression   sigma^2 of the built-in faces' tokens by part (`separation`), low is good
    pixels        PSNR of held-out images; perception: their LPIPS, or SSIM without VGG's weights
    generation    gFID of --n samples, if all the runs are stage two and Inception's weights are here
    """
    nets, rows = optional_nets(args), []
    paths = [os.path.join(run, "last.pt") if os.path.isdir(run) else run for run in args.runs]
    second = nets[1] and all("vmae" in vmae.read_checkpoint(path) for path in paths)
    for path in paths:
        model, trained = open_stage_one(path, args)
        x = torch.cat([x for x, _ in held_out(model, trained, args)[1]])
        z = encode(model, x, args)
        x_hat, moved = decode(model, z, args), decode(model, perturb(z, 0.1), args)
        row, _ = scores(zip(x.split(args.batch), x_hat.split(args.batch)), (nets[0], None), args)
        rows.append({"run": run_name(path), "smoothness, dB": psnr(x_hat, moved).mean().item(),
                     "compression, sigma^2": separation(*face_levels(model, args)["part"])["sigma^2"],
                     "pixels, dB": row["PSNR"],
                     **({"perception, LPIPS": row["LPIPS"]} if nets[0] else
                        {"perception, SSIM": row["SSIM"]})})
        if second:
            n, size, fakes = open_source(path, args)
            n_real, _, reals = open_source(trained_on(path), args, size)
            rows[-1]["generation, gFID"] = frechet_distance(
                *Features(nets[1]).see(reals, n_real).pool.moments(),
                *Features(nets[1]).see(fakes, n).pool.moments())
    shapes, axes = {row["run"]: [] for row in rows}, list(rows[0])[1:]
    for axis in axes:
        sign = -1 if axis.endswith(("sigma^2", "LPIPS", "gFID")) else 1    # up is good
        values = [sign * row[axis] for row in rows]
        span = max(values) - min(values) or 1
        for row, value in zip(rows, values):
            shapes[row["run"]].append((value - min(values)) / span)
    radar(target(args, "compare.png"), axes, shapes)
    report("Comparison (Fig. 2)", rows, target(args, "compare.json"), rescaled=shapes)
    second or print("skipped generation: it needs stage-two runs only, and Inception's weights")


def fid(args):
    """Table 2: generated images against real ones, from one pass of Inception over each.

    FID (gFID of a generator's samples), sFID = the same of the spatial features, IS of the fakes;
    and of the first --pairs images of each side, whose features stay in memory, KID, precision and
    recall. --fake and --real as in `open_source`, or --real a .npz of mu and sigma, as pytorch-fid
    and --save-stats write it. All are cropped and resized by the same code, to the fake's size.
    """
    if args.fake.endswith(".npz") or os.path.isdir(args.fake):
        name, source = "FID", args.real
    else:
        name, source = "gFID", args.real or trained_on(args.fake)
    if source is None:
        raise InputError('--real: name a folder, a .npz or "faces" to compare with')
    net = load_inception(args.inception_weights, args.resize, args.fast)
    net.to(vmae.pick_device(args.device))
    n, size, fakes = open_source(args.fake, args)
    real = read_npz(source) if source.endswith(".npz") else {}
    if "mu" not in real:                    # images, to be seen; a bad --real stops here
        n_real, _, reals = open_source(source, args, size)
    fake = Features(net, args.pairs).see(fakes, n)
    row = {"fake": args.fake, "real": source, "N fake": n, "IS": fake.inception_score()}
    if "mu" not in real:
        seen = Features(net, args.pairs).see(reals, n_real)
        real = dict(zip(("mu", "sigma", "mu_s", "sigma_s", "n"), (
            *seen.pool.moments(), *seen.spatial.moments(), n_real)))
        if min(n, n_real, args.pairs) > 3:
            a, b = torch.cat(seen.kept), torch.cat(fake.kept)
            p, r = precision_recall(a, b)
            row.update({"KID x 1e3": 1e3 * kid(a, b), "precision": p, "recall": r})
    row["N real"] = int(real.get("n", 0)) or "?"
    row[name] = frechet_distance(real["mu"], real["sigma"], *fake.pool.moments())
    if "mu_s" in real:
        row["sFID"] = frechet_distance(real["mu_s"], real["sigma_s"], *fake.spatial.moments())
    few = min(n, row["N real"] if real.get("n") else n)
    if few < 10000:
        warnings.warn(f"{few} images: " + ("under 2,048 the covariance is singular, KID says more"
                      if few < 2048 else "FID falls with N, compare at equal N only"))
    if args.save_stats:
        np.savez(args.save_stats, **real)
    report(f"{name} at {size} px, resize {args.resize}, Inception weights {net.hash}"
           + ", bfloat16: two or three digits" * args.fast, [row], target(args, "fid.json"),
           resize=args.resize, inception=net.hash, fast=args.fast)


def neighbours(args):
    """Did it memorise? Each of --n samples with its 5 nearest training images, in pixels and, with
    Inception's weights, in its features.

    The table has the median distance to the nearest training image, of the samples and of as many
    held-out images: samples much nearer than those are copies. Pixels: RMS difference, 0 to 255.
    """
    path = args.ckpt[0]
    _, trained = open_stage_one(path, args)
    samples = torch.cat(list(draw_samples(path, args)))                    # (n, 3, S, S)
    size = samples.shape[-1]
    fresh = torch.cat([x for x, _ in shuffled(
        vmae.open_images(trained["data"], size, "val", trained["val"]), args)[1]])
    train = vmae.open_images(trained["data"], size, "train", trained["val"])
    net, rows, shown = optional_nets(args, lpips=False)[1], [], []
    spaces = {"pixels": lambda x: x.flatten(1).float() / math.sqrt(3 * size**2)}
    if net:
        spaces["Inception"] = lambda x: net(x).cpu()
    for name, space in spaces.items():
        batches = (space(vmae.to_uint8(x)) for x, _ in DataLoader(train, 256))
        d, index = nearest(space(torch.cat([samples, fresh])), batches, 5)
        mine, theirs = d[:len(samples), 0].median().item(), d[len(samples):, 0].median().item()
        rows.append({"space": name, "samples": mine, "held-out": theirs, "ratio": mine / theirs})
        shown.append([torch.stack([vmae.to_uint8(train[j][0]) for j in js]) for js in index[:16]])
    picture([torch.cat([x[None], *near]) for x, *near in zip(samples, *shown)],
            target(args, "neighbours.png"))
    report(f"Distance to the nearest of {len(train)} training images, median", rows,
           target(args, "neighbours.json"))


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------

OPTIONS = {
    "runs": dict(nargs="+", help="run folders, each with a last.pt"),
    "--ckpt": dict(nargs="+", metavar="PATH", help="checkpoints (default: %(default)s)"),
    "--fake": dict(help="stage-two checkpoint to sample, folder, or .npz with arr_0 (default: "
                   "%(default)s)"),
    "--real": dict(help="folder, .npz with mu and sigma or arr_0, or faces, the built-in ones "
                   "(default: what the checkpoint was trained on)"),
    "--data": dict(help="folder of images, all of them used (default: those held out in training)"),
    "--n": dict(type=int, help="images at the most (default: %(default)s)"),
    "--pairs": dict(type=int, help="images of each side whose features are kept, for KID, "
                    "precision and recall; 0 leaves them out (default: %(default)s)"),
    "--eps": dict(type=float, nargs="+", help="noise (default: %(default)s)"),
    "--size": dict(type=int, help="pixels (default: %(default)s)"),
    "--cfg": dict(type=float, help="guidance weight of samples, 1: none (default: %(default)s)"),
    "--time": dict(action="store_true", help="also seconds and memory"),
    "--resize": dict(choices=("pytorch-fid", "clean"), help="to Inception's 299 pixels: bilinear "
                     "as pytorch-fid, or antialiased bicubic as clean-fid (default: %(default)s)"),
    "--fast": dict(action="store_true", help="Inception in bfloat16: faster, two or three digits"),
    "--inception-weights": dict(metavar="PATH", help="local copy of FID's InceptionV3"),
    "--vgg-weights": dict(metavar="PATH", help="local copy of VGG-16, for LPIPS"),
    "--download": dict(action="store_true", help="fetch weights that are missing"),
    "--save-stats": dict(metavar="PATH", help="write the real side's statistics to this .npz"),
    "--batch": dict(type=int, help="images at a time (default: %(default)s)"),
    "--device": dict(help="cuda, cpu, mps... (default: cuda if there is one)"),
    "--out": dict(help="folder of table and picture (default: beside what is measured)"),
}
DEFAULTS = dict(ckpt=["runs/vmae/last.pt"], fake="runs/ldm/last.pt", n=1000, batch=64, cfg=1.0,
                device="auto", resize="pytorch-fid", pairs=10000, size=256,
                eps=[0, 0.01, 0.05, 0.1, 0.2, 0.3])
NETS = "--resize --fast --inception-weights --vgg-weights --download"
COMMANDS = (  # function, what it is, options besides --batch, --device and --out, own defaults
    (reconstruct, "Table 1: L1, PSNR, SSIM, LPIPS, rFID", f"--ckpt --data --n {NETS}", {}),
    (smoothness, "Fig. 6: noise on the latent", f"--ckpt --data --n --eps {NETS}", dict(n=256)),
    (separability, "Figs. 4, 7: objects, parts, patterns in latent space", "--ckpt --data --n",
     dict(n=512)),
    (efficiency, "Table 3: sizes, operations, times", "--size --time", dict(batch=1)),
    (neighbours, "samples beside the nearest training images", f"--ckpt --n --cfg {NETS}",
     dict(ckpt=["runs/ldm/last.pt"], n=16)),
    (fid, "Table 2: FID, sFID, IS, KID, precision, recall", "--fake --real --n --pairs --cfg "
     "--save-stats --resize --fast --inception-weights", dict(n=10000)),
    (compare, "Fig. 2: several runs on one radar", f"runs --data --n --cfg {NETS}", dict(n=256)),
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s [command]")
    commands = parser.add_subparsers(dest="command", metavar="command")
    for function, about, options, own in COMMANDS:
        sub = commands.add_parser(function.__name__, help=about)
        for option in f"{options} --batch --device --out".split():
            sub.add_argument(option, **OPTIONS[option])
        sub.set_defaults(function=function, **{**DEFAULTS, **own})
    args = parser.parse_args()
    for name in ("n", "batch", "size"):
        if not getattr(args, name, 1) > 0:
            raise InputError(f"--{name} must be above 0, not {getattr(args, name)}")
    if args.command is not None:
        return args.function(args)
    for name in ("reconstruct", "smoothness", "separability", "efficiency", "neighbours"):
        run = parser.parse_args([name])     # no arguments: everything, with its defaults
        if name != "neighbours" or os.path.exists(run.ckpt[0]):
            run.function(run)
    runs = [str(path.parent) for path in sorted(Path("runs").glob("*/last.pt"))
            if "vmae" not in vmae.read_checkpoint(path)]
    if len(runs) > 1:
        compare(parser.parse_args(["compare", *runs]))
    print("skipped fid: `evaluate.py fid` fetches Inception's weights (91 MB) and samples")
    len(runs) > 1 or print("skipped compare: train a second preset, then `evaluate.py compare`")


if __name__ == "__main__":
    vmae.cli(main)

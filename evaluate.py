"""Measure what the paper measures, one sub-command a figure or table.

    python evaluate.py                                   on the default runs, nothing downloaded
    python evaluate.py reconstruct --ckpt runs/vmae/last.pt               Table 1
    python evaluate.py fid --fake runs/ldm/last.pt --real path            Table 2: FID and its kin
    python evaluate.py smoothness --ckpt a/last.pt b/last.pt              Fig. 6
    python evaluate.py separability                                       Figs. 4 and 7
    python evaluate.py efficiency --time                                  Table 3
    python evaluate.py compare runs/ae runs/vae runs/vmae                 Fig. 2
    python evaluate.py neighbours                                         did it memorise?

Each is a function whose docstring defines its quantities; it prints a Markdown table and writes
the same numbers as JSON, and a picture. Images meet every metric as uint8, as they leave a model.
"""
import argparse
import contextlib
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import sys
import timeit
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

# ---- Pixel metrics ----------------------------------------------------------------------------

def psnr(a, b):
    """Peak signal-to-noise ratio, 10 log10(255^2 / MSE), dB -> (N,); infinite for equal images.
    a, b: (N, C, H, W) in 0..255."""
    mse = ((a.double() - b.double()) ** 2).mean((1, 2, 3))
    return 10 * torch.log10(255**2 / mse)


def ssim(a, b):
    """Structural similarity (Wang 2004) -> (N,), 1 for equal images. a, b: (N, C, H, W) in 0..255.

    SSIM = (2 mu_a mu_b + c1)(2 cov + c2) / ((mu_a^2 + mu_b^2 + c1)(var_a + var_b + c2)) under an
    11 x 11 Gaussian window of sigma 1.5, biased (co)variances, c1 = (.01 * 255)^2, c2 = (.03 *
    255)^2; mean over channels and over the windows that lie inside. InputError below 11 pixels.
    """
    if min(a.shape[2:]) < 11:
        raise InputError(f"SSIM needs images of 11 pixels or more, not {min(a.shape[2:])}")
    g = torch.exp(-torch.arange(-5, 6, dtype=torch.float64, device=a.device) ** 2 / (2 * 1.5**2))
    g = (g / g.sum()).expand(a.shape[1], 1, 11)            # (C, 1, 11), the same for each channel

    def blur(x):                                           # (N, C, H, W) -> (N, C, H-10, W-10)
        return F.conv2d(F.conv2d(x, g[..., None], groups=len(g)), g[:, :, None], groups=len(g))

    a, b = a.double(), b.double()
    mu_a, mu_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mu_a**2, blur(b * b) - mu_b**2, blur(a * b) - mu_a * mu_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return ((2 * mu_a * mu_b + c1) * (2 * cov + c2)
            / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))).mean((1, 2, 3))


# ---- InceptionV3 (Szegedy 2016) in the form FID is defined on: TensorFlow's weights of 2015 ---

class ConvBN(nn.Module):
    """Convolution, batch norm with its stored statistics, ReLU. width: the height, if not given.

    The norm is folded into the convolution at every call: 22 M products, against 5.7 G for one
    image, spare three passes over each feature map and leave the state dict as published.
    """

    def __init__(self, c_in, c_out, height, width=None, stride=1, valid=False):
        super().__init__()
        padding = "valid" if valid or stride == 2 else "same"              # keeps the grid, or not
        self.conv = nn.Conv2d(c_in, c_out, (height, width or height), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        scale = self.bn.weight / (self.bn.running_var + self.bn.eps).sqrt()  # (c_out,)
        weight = self.conv.weight * scale.view(-1, 1, 1, 1)                # (c_out, c_in, kh, kw)
        bias = self.bn.bias - self.bn.running_mean * scale                 # (c_out,)
        return F.relu_(F.conv2d(x, weight, bias, self.conv.stride, self.conv.padding))


class Mixed(nn.Module):
    """Branches side by side on one input, joined along the channels.

    branches: name -> its convolutions in order, each (channels, kernel height, width if another).
    A dict of two, always the last, is a fork: both read the same input. branch_pool pools first.
    The last convolution of each branch has the stride of the pool; 2 halves the grid.
    """

    def __init__(self, c_in, pool, **branches):
        super().__init__()
        self.paths = []                     # of each branch its steps, each a list of one or two
        for branch, convs in branches.items():
            path, c = [[pool]] if branch == "branch_pool" else [], c_in
            for i, step in enumerate(convs, 1):
                name = f"{branch}_{i}" if len(convs) > 1 else branch
                stride = pool.stride if i == len(convs) else 1
                fork = step if isinstance(step, dict) else {"": step}
                path.append([ConvBN(c, *conv, stride=stride) for conv in fork.values()])
                for letter, conv in zip(fork, path[-1]):
                    self.add_module(name + letter, conv)
                c = path[-1][0].bn.num_features
            self.paths.append(path)

    def forward(self, x):
        parts = []
        for *chain, ends in self.paths:
            h = x
            for (step,) in chain:
                h = step(h)
            parts += [step(h) for step in ends]
        return torch.cat(parts, 1)                         # (N, all channels, h, w)


class InceptionV3(nn.Module):
    """uint8 images (N, 3, H, W) -> the 2048-d features (N, 2048) that FID compares.

    resize to 299 x 299: "pytorch-fid", bilinear without antialiasing, pixels to [-1, 1]; or
    "clean", bicubic with antialiasing, not rounded (Parmar 2022), pixels to (x - 128) / 128.
    fast: bfloat16, which keeps two or three digits.
    """

    def __init__(self, resize="pytorch-fid", fast=False):
        super().__init__()
        self.resize, self.fast, self.hash = resize, fast, "none"
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3, valid=True)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvBN(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3, valid=True)
        avg, halve = nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.MaxPool2d(3, 2)
        double = [(64, 1), (96, 3), (96, 3)]               # as far as a 5 x 5 sees, for less
        parts = dict(branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)], branch3x3dbl=double)
        self.Mixed_5b = Mixed(192, avg, **parts, branch_pool=[(32, 1)])    # 35 x 35
        self.Mixed_5c = Mixed(256, avg, **parts, branch_pool=[(64, 1)])
        self.Mixed_5d = Mixed(288, avg, **parts, branch_pool=[(64, 1)])
        self.Mixed_6a = Mixed(288, halve, branch3x3=[(384, 3)], branch3x3dbl=double, branch_pool=[])
        for name, c in zip("bcde", (128, 160, 160, 192)):  # 17 x 17; a 7 x 7 as a row and a column
            self.add_module(f"Mixed_6{name}", Mixed(
                768, avg, branch1x1=[(192, 1)], branch7x7=[(c, 1), (c, 1, 7), (192, 7, 1)],
                branch7x7dbl=[(c, 1), (c, 7, 1), (c, 1, 7), (c, 7, 1), (192, 1, 7)],
                branch_pool=[(192, 1)]))
        self.Mixed_7a = Mixed(
            768, halve, branch3x3=[(192, 1), (320, 3)],
            branch7x7x3=[(192, 1), (192, 1, 7), (192, 7, 1), (192, 3)], branch_pool=[])
        fork = dict(a=(384, 1, 3), b=(384, 3, 1))
        parts = dict(branch1x1=[(320, 1)], branch3x3=[(384, 1), fork],
                     branch3x3dbl=[(448, 1), (384, 3), fork], branch_pool=[(192, 1)])
        self.Mixed_7b = Mixed(1280, avg, **parts)                          # 8 x 8
        self.Mixed_7c = Mixed(2048, nn.MaxPool2d(3, 1, 1), **parts)        # max, as in 2015
        self.fc = nn.Linear(2048, 1008)
        self.to(memory_format=torch.channels_last).eval().requires_grad_(False)

    def forward(self, images):
        return self.outputs(images)[0]

    def outputs(self, images):
        """-> features (N, 2048); spatial (N, 2023), the first 7 channels of Mixed_6d's first
        convolution at its 17 x 17 places (Nash 2021; in TensorFlow `mixed_6/conv`, of which ADM
        stores statistics in this order); logits (N, 1008), without the bias, as Salimans 2016."""
        x = images.to(self.fc.weight.device).float()       # (N, 3, H, W) in 0..255
        clean = self.resize == "clean"
        x = F.interpolate(x, (299, 299), mode="bicubic" if clean else "bilinear", antialias=clean)
        x = (x.clamp(0, 255) - 128) / 128 if clean else x / 127.5 - 1
        x = x.contiguous(memory_format=torch.channels_last)                # 1.4x as fast
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.fast):
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
            x = F.max_pool2d(x, 3, 2)                                      # (N, 64, 73, 73)
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
            x = F.max_pool2d(x, 3, 2)                                      # (N, 192, 35, 35)
            for block in (b for b in self.children() if isinstance(b, Mixed)):
                if block is self.Mixed_6d:
                    spatial = block.branch1x1(x)[:, :7].permute(0, 2, 3, 1)
                x = block(x)
        features = x.float().mean((2, 3))                  # (N, 2048, 8, 8) -> (N, 2048)
        return features, spatial.flatten(1).float(), features @ self.fc.weight.T


INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")


def load_inception(path=None, resize="pytorch-fid", fast=False):
    """FID's weights -> InceptionV3; `.hash` is the beginning of the file's SHA-256.
    path: a local copy of INCEPTION_URL; otherwise torch hub's cache, otherwise the download, of
    which torch checks the hash. InputError names URL, path and flag, or the wrong network."""
    net = InceptionV3(resize, fast)
    target = Path(path or Path(torch.hub.get_dir(), "checkpoints", Path(INCEPTION_URL).name))
    try:
        if path is None and not target.exists():
            torch.hub.load_state_dict_from_url(INCEPTION_URL, map_location="cpu", check_hash=True)
        weights = dict(torch.load(target, map_location="cpu", weights_only=True))
        classes = len(weights["fc.bias"])
    except Exception as error:
        why = (str(error) or repr(error)).splitlines()[0]
        raise InputError(
            f"FID needs InceptionV3: {target} cannot be read ({why}); download {INCEPTION_URL} to "
            f"it, or name a copy with --inception-weights") from None
    if classes != 1008:
        raise InputError(f"{target}: torchvision's ImageNet network of {classes} classes; FID is "
                         f"defined on TensorFlow's of 2015 (other weights, other pools, 1,008 "
                         f"classes), no other compares: take {INCEPTION_URL}")
    try:
        net.load_state_dict(weights)        # of a plain dict: some copies lack the norms' counters
    except RuntimeError:
        raise InputError(f"{target}: not FID's InceptionV3; take {INCEPTION_URL}") from None
    net.hash = hashlib.sha256(target.read_bytes()).hexdigest()[:8]
    return net


# ---- From features to numbers -----------------------------------------------------------------

class Statistics:
    """Mean and covariance of rows by running sums in float64: D^2 numbers, however many rows.
    The first batch's mean is taken off everything, so that the sums of squares do not cancel."""

    def __init__(self):
        self.n = 0

    def add(self, rows):
        """rows: (B, D)."""
        rows = (rows if rows.is_cuda else rows.cpu()).double()             # mps has no float64
        if self.n == 0:
            self.shift, self.total, self.outer = rows.mean(0), 0, 0
        rows = rows - self.shift
        self.n, self.total = self.n + len(rows), self.total + rows.sum(0)
        self.outer += rows.T @ rows

    def moments(self):
        """-> mean (D,), covariance (D, D) with n - 1 below, as numpy.cov. InputError for a row."""
        if self.n < 2:
            raise InputError("FID: one image has no covariance; both sides take two or more")
        mean = self.total / self.n                         # less the shift, (D,)
        sigma = (self.outer - self.n * torch.outer(mean, mean)) / (self.n - 1)
        return (self.shift + mean).cpu().numpy(), sigma.cpu().numpy()


def cholesky(sigma):
    """Covariance (D, D) -> L (D, r) with L L^T = sigma, r its rank (N images: N - 1 at the most).
    Pivoted, so that it ends where the rest is rounding; ValueError if the rest is more than that,
    as of no covariance."""
    digits = 1e-4 if sigma.dtype == np.float32 else 1e-8
    sigma = sigma.astype(np.float64)
    L, order, r, _ = scipy.linalg.lapack.dpstrf(sigma, lower=1)
    factor = np.zeros((len(sigma), r))                     # rows in their own order again
    factor[order - 1] = np.tril(L)[:, :r]
    if r < len(sigma):
        rest = np.abs(sigma - factor @ factor.T).max()
        if not rest <= digits * max(np.abs(sigma).max(), 1e-300):          # NaN is refused too
            raise ValueError("not a covariance: NaN, or negative eigenvalues beyond rounding")
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
    root = np.linalg.svd(cholesky(sigma1).T @ cholesky(sigma2), compute_uv=False).sum()
    difference = mu1.astype(np.float64) - mu2              # (D,)
    traces = np.trace(sigma1, dtype=float) + np.trace(sigma2, dtype=float)
    return max(float(difference @ difference + traces - 2 * root), 0.0)    # below 0: rounding


def kid(a, b):
    """KID = MMD^2 with k(x, y) = (x.y / D + 1)^3, unbiased at any N. Binkowski 2018.
    a (N, D), b (M, D): mean of k over pairs within a, plus within b, less twice between, no image
    being paired with itself. Close to 0, also below it, for samples of one distribution."""
    def total(x, y):                                       # in blocks: N x M is never in memory
        return sum(((block.double() @ y.double().T / x.shape[1] + 1) ** 3).sum().item()
                   for block in x.split(1024))

    def within(x):
        itself = ((x.double().square().mean(1) + 1) ** 3).sum().item()
        return (total(x, x) - itself) / (len(x) * (len(x) - 1))

    return within(a) + within(b) - 2 * total(a, b) / (len(a) * len(b))


def nearest(rows, batches, k):
    """rows (Q, D), batches of (B, D) -> Euclidean distances to, and numbers of, the k nearest
    rows of all batches, (Q, k) each; the memory is that of one batch."""
    best, index, at = torch.empty(len(rows), 0), torch.empty(len(rows), 0, dtype=torch.long), 0
    for batch in batches:
        d = torch.cat([best, torch.cdist(rows, batch)], 1)                 # (Q, k + B)
        number = torch.arange(at, at + len(batch)).expand(len(rows), -1)
        best, place = d.topk(min(k, d.shape[1]), largest=False)
        index, at = torch.cat([index, number], 1).gather(1, place), at + len(batch)
    return best, index


def precision_recall(real, fake, k=3):
    """Kynkaanniemi 2019: a set's manifold is the union of balls around its members, each out to
    the k-th nearest other member. Precision = share of fakes on the manifold of the real,
    recall = share of the real on the manifold of the fakes. (N, D), (M, D) -> two floats."""
    def on_manifold(rows, members):
        """Share of rows that lie in at least one member's ball."""
        radius = torch.cat([nearest(block, members.split(4096), k + 1)[0][:, -1]  # itself is first
                            for block in members.split(4096)])
        inside = [(torch.cdist(block, members) <= radius).any(1) for block in rows.split(512)]
        return torch.cat(inside).double().mean().item()

    return on_manifold(fake, real), on_manifold(real, fake)


class Features:
    """What a set of images leaves behind once Inception has seen it: running sums, for FID, sFID
    and the Inception Score; and of the first `pairs` images the features themselves, 8 KB each,
    for the metrics that compare pairs. No image is kept."""

    def __init__(self, net, pairs=0):
        self.net, self.pairs, self.kept = net, pairs, []
        self.pool, self.spatial, self.entropy, self.p = Statistics(), Statistics(), 0.0, 0.0

    def add(self, images):
        """images: uint8 (B, 3, H, W)."""
        features, spatial, logits = self.net.outputs(images)
        if self.pairs > self.pool.n:        # even an empty slice would hold on to its batch
            self.kept.append(features[:self.pairs - self.pool.n].cpu())
        self.pool.add(features)
        self.spatial.add(spatial)
        log_p = logits.cpu().double().log_softmax(1)
        self.p += log_p.exp().sum(0)                                       # (1008,)
        self.entropy -= (log_p.exp() * log_p).sum().item()

    def see(self, n, batches):
        """Add all of the batches, n images, under a progress bar -> self."""
        with tqdm(total=n, desc="Inception", dynamic_ncols=True, mininterval=1) as bar:
            for images in batches:
                self.add(images)
                bar.update(len(images))
        return self

    def statistics(self):
        """-> what FID (mu, sigma) and sFID (mu_s, sigma_s) need, and n, for a .npz."""
        return dict(zip(("mu", "sigma", "mu_s", "sigma_s", "n"),
                        (*self.pool.moments(), *self.spatial.moments(), self.pool.n)))

    def inception_score(self):
        """IS = exp(E KL(p(y|x) || p(y))) = exp(H(y) - E H(y|x)), from 1 to 1,008. Salimans 2016.
        Over all images at once; many papers average over parts of 5,000, which comes out lower."""
        p = self.p / self.pool.n                           # p(y), (1008,)
        return math.exp(-torch.special.xlogy(p, p).sum().item() - self.entropy / self.pool.n)


# ---- Images, models and weights as the command line names them --------------------------------

def optional_nets(args):
    """-> [LPIPS, InceptionV3], each None where the sub-command has no use for it, or its weights
    are not here and not to be fetched, which a line then says."""
    nets = []
    for what, url, flag, load, options in (
            ("LPIPS", vmae.VGG_URL, "vgg-weights", vmae.load_lpips, ()),
            ("FID", INCEPTION_URL, "inception-weights", load_inception, (args.resize, args.fast))):
        used, path = flag in args.uses, getattr(args, flag.replace("-", "_")) or None
        kept = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
        here = used and (path or args.download or kept.exists())
        nets.append(load(path, *options).to(args.device) if here else None)
        if used and not here:
            print(f"skipped {what}: its weights are not here; --download fetches {url}, or name a "
                  f"copy with --{flag}")
    return nets


def shuffled(data, args):
    """At most --n images of a dataset, a fixed draw that mixes classes -> their number, batches
    of (uint8 (B, 3, S, S), labels (B,))."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:args.n].tolist()
    workers = 8 if args.device.type == "cuda" else 0       # JPEGs are slow to read
    loader = DataLoader(Subset(data, order), args.batch, num_workers=workers)
    return len(order), ((vmae.to_uint8(x), y) for x, y in loader)


class Run:
    """The autoencoder of a checkpoint of either stage, or of published weights; uint8 images in
    and out, in batches, so that no set is ever in memory as floats."""

    def __init__(self, path, args):
        ckpt = vmae.read_stage_one(path)    # of a stage-two file, the one inside
        self.path, self.args, self.trained = path, args, ckpt["train_args"]
        self.model = vmae.build_vmae(ckpt).to(args.device)                 # frozen

    def held_out(self):
        """--data, or what was held out in training, as `shuffled` gives it."""
        if self.args.data:
            return shuffled(vmae.ImageFolder(self.args.data, self.model.img_size), self.args)
        return shuffled(vmae.open_images(self.trained["data"], self.model.img_size, "val",
                                         self.trained["val"]), self.args)

    def encode(self, images):
        """uint8 (N, 3, S, S) -> the posterior's mode (N, d, h, w), as at use time, on the CPU."""
        return torch.cat([self.model.encode(x.to(self.args.device) / 127.5 - 1).mode().cpu()
                          for x in images.split(self.args.batch)])

    def decode(self, z):
        """z (N, d, h, w) -> uint8 (N, 3, S, S) on the CPU."""
        return torch.cat([vmae.to_uint8(self.model.decode(part.to(self.args.device))).cpu()
                          for part in z.split(self.args.batch)])


def draw_samples(path, args):
    """A stage-two checkpoint -> batches of --n samples, uint8, those that sample.py draws from
    seed 0: the classes in turn, 50 steps, guidance --cfg."""
    model, schedule, ckpt = ldm.load_ldm(path)             # the EMA weights
    model = model.to(args.device).requires_grad_(False)
    first = vmae.build_vmae(ckpt["vmae"]).to(args.device)
    mean, std = ckpt["latent_mean"].to(args.device), ckpt["latent_std"].to(args.device)
    shape, K = (first.latent_dim, first.grid, first.grid), len(ckpt["classes"])
    if args.cfg != 1 and K == 0:
        raise InputError(f"--cfg {args.cfg}: {path} is unconditional, leave --cfg out")
    for index in torch.arange(args.n).split(args.batch):
        z = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(i))
                         for i in index.tolist()]).to(args.device)         # (B, d, h, w)
        y = (index % K).to(args.device) if K else None
        z = ldm.sampler_for(schedule)(model, schedule, z, y, steps=50, w=args.cfg)
        yield vmae.to_uint8(first.decode(ldm.denormalise(z, mean, std))).cpu()


def open_source(source, args, size=None):
    """--real or --fake as typed -> (side, number, batches of uint8 (B, 3, side, side)). A folder or
    "faces" (the training ones, built in) at `size`, by default the first file's short side; a .npz
    with arr_0, uint8 (N, H, W, 3) as ADM's; a stage-two checkpoint, sampled."""
    if source.endswith(".npz"):
        images = torch.from_numpy(read_npz(source, "arr_0")["arr_0"])[:args.n].permute(0, 3, 1, 2)
        if size not in (None, images.shape[2]):
            raise InputError(f"{source}: images of {images.shape[2]} pixels, the others have "
                             f"{size}; give a folder, which is resized")
        return images.shape[2], len(images), images.split(args.batch)
    if os.path.isfile(source):
        size = ldm.load_ldm(source)[2]["vmae"]["model_args"]["img_size"]
        return size, args.n, draw_samples(source, args)
    if source == "faces":
        data = vmae.Faces(size or 32)
    else:
        data = vmae.ImageFolder(source, size)
        single = [i for i, path in enumerate(data.paths)   # sample.py's overviews lie beside them
                  if Path(path).name not in ("grid.png", "trajectory.png")]
        if not single:
            raise InputError(f"{source}: no images in it but sample.py's overviews")
        first = os.path.join(source, data.paths[single[0]])
        data.size = size = size or min(vmae.open_image(first).size)
        data = Subset(data, single)
    n, batches = shuffled(data, args)
    return size or 32, n, (x for x, _ in batches)


def read_npz(path, *needed):
    """A .npz as a dict. InputError if it cannot be read or lacks an entry."""
    try:
        with np.load(path) as file:         # ADM's hold statistics beside gigabytes of images
            entries = {k: file[k] for k in file.files if k in needed or k != "arr_0"}
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a .npz ({error})") from None
    if missing := set(needed) - set(entries):
        raise InputError(f"{path}: no {', '.join(sorted(missing))} in it; images are arr_0, "
                         f"statistics mu and sigma")
    return entries


# ---- Tables and pictures ----------------------------------------------------------------------

COLOURS = "#4477aa #ee6677 #228833 #ccbb44 #66ccee #aa3377 #999999 #222222 #ee7733 #009988".split()


def report(args, title, rows, n=None, **more):
    """Print rows, a list of dicts, as one Markdown table and write them, and `more`, as JSON.
    n: images on the smaller side of a FID. The title then says how it was made, and a small n is
    warned of, as FID falls when n grows, whatever the images."""
    def cell(value):
        if isinstance(value, float):
            return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.1f}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    net = args.nets[1] if n else None
    if net:
        title += (f"; FID: resize {net.resize}, Inception weights {net.hash}"
                  + ", bfloat16, so two or three digits count" * net.fast)
    if net and n < 2048:
        warnings.warn(f"FID of {n} images: under 2,048 the covariance is singular; KID is unbiased")
    elif net and n < 10000:
        warnings.warn(f"FID of {n} images, under 10,000: compare at equal numbers only")
    columns = list(dict.fromkeys(key for row in rows for key in row))      # in order, once each
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for row in rows:
        print(f"| {' | '.join(cell(row.get(key, '')) for key in columns)} |")
    os.makedirs(args.out, exist_ok=True)    # as late as this: after what may go wrong
    with open(f"{args.out}/{args.function.__name__}.json", "w") as file:
        json.dump(dict(title=title, rows=rows, **more), file, indent=1)


def picture(rows, path):
    """Rows of uint8 images as one PNG, those of different sizes enlarged to the largest."""
    size, k = max(row.shape[-1] for row in rows), min(map(len, rows))
    vmae.save_grid([F.interpolate(row[:k] / 127.5 - 1, size) for row in rows], path)


@contextlib.contextmanager
def canvas(path, width, height, names):
    """The pen to draw a PNG with, the names in their colours below. Drawn at twice the size it is
    saved at, which smooths every line."""
    image = Image.new("RGB", (2 * width, 2 * height + 36 * len(names)), "white")
    pen = ImageDraw.Draw(image)
    pen.font = ImageFont.load_default(24)
    for y, name, colour in zip(itertools.count(2 * height, 36), names, itertools.cycle(COLOURS)):
        pen.circle((40, y), 10, colour)
        pen.text((64, y), name, "#333333", anchor="lm")
    yield pen
    image.resize((image.width // 2, image.height // 2), Image.LANCZOS).save(path)


def plot(path, series, x_label, y_label, lines=True):
    """series: name -> [(x, y), ...], joined by lines or as a cloud of dots. Writes a PNG."""
    points = np.array([p for curve in series.values() for p in curve])     # (M, 2)
    cut, r = ((0, 100), 8) if lines else ((0.5, 99.5), 3)  # a cloud's stragglers are left out
    low, high = np.percentile(points, cut, axis=0)
    span = np.where(high > low, high - low, 1)             # a flat curve has none
    with canvas(path, 560, 340, series) as pen:
        for i in range(5):                  # a line of the grid each way, and its number
            x, y, value = 130 + 235 * i, 560 - 125 * i, low + span * i / 4
            pen.line((x, 60, x, 560), "#dddddd", 2)
            pen.line((130, y, 1070, y), "#dddddd", 2)
            pen.text((x, 585), f"{value[0]:.3g}", "#333333", anchor="mm")
            pen.text((115, y), f"{value[1]:.3g}", "#333333", anchor="rm")
        for curve, colour in zip(series.values(), itertools.cycle(COLOURS)):
            dots = [tuple((130, 560) + (p - low) / span * (940, -500)) for p in curve]     # y up
            if lines:
                pen.line(dots, colour, 4)
            for x, y in dots:
                if 129 < x < 1071 and 59 < y < 561:
                    pen.circle((x, y), r, colour)
        pen.text((600, 625), x_label, "#333333", anchor="mm")
        pen.text((130, 26), y_label, "#333333", anchor="lm")


def radar(path, axes, shapes):
    """axes: names; shapes: name -> a value in [0, 1] for each, 0 on the inner ring, 1 outside."""
    turn = [2 * math.pi * i / len(axes) - math.pi / 2 for i in range(len(axes))]

    def place(angle, value):
        r = 80 + 240 * value
        return 640 + r * math.cos(angle), 420 + r * math.sin(angle)

    with canvas(path, 640, 440, shapes) as pen:
        pen.text((30, 36), "outside: the best run, inner ring: the worst", "#333333", anchor="lm")
        for value in (0, 0.5, 1):
            pen.line([place(angle, value) for angle in turn + turn[:1]], "#bbbbbb", 2)
        for angle, name in zip(turn, axes):
            pen.line([(640, 420), place(angle, 1)], "#bbbbbb", 2)
            anchor = "lmr"[1 - round(math.cos(angle))] + "m"               # away from the middle
            pen.text(place(angle, 1.12), name, "#333333", anchor=anchor)
        for values, colour in zip(shapes.values(), itertools.cycle(COLOURS)):
            corners = [place(*p) for p in zip(turn, values)]
            pen.line(corners + corners[:1], colour, 6, "curve")


# ---- Sub-commands -----------------------------------------------------------------------------

def scores(pairs, args, real=None):
    """Batches of uint8 (original, reconstruction) -> (the metrics of Table 1, Features of the
    originals, which a later call may reuse as `real`). L1 = mean |x - x_hat| with pixels in [0, 1];
    PSNR, SSIM as above; LPIPS (Zhang 2018, VGG); of each the mean over images of its value for
    one. rFID: FID between the two sets."""
    (lpips_net, inception), values = args.nets, []
    fake, theirs = Features(inception), real or Features(inception)
    for a, b in pairs:
        row = [(a.double() - b.double()).abs().mean((1, 2, 3)) / 255, psnr(a, b), ssim(a, b)]
        if lpips_net:
            d = lpips_net(a.to(args.device) / 127.5 - 1, b.to(args.device) / 127.5 - 1)
            row.append(d.flatten().cpu().double())
        values.append(torch.stack(row))                                    # (3 or 4, B)
        if inception:
            fake.add(b)                                    # one pass, two sums
        if inception and not real:
            theirs.add(a)
    row = dict(zip(("L1", "PSNR", "SSIM", "LPIPS"), torch.cat(values, 1).mean(1).tolist()))
    if inception:
        row["rFID"] = frechet_distance(*theirs.pool.moments(), *fake.pool.moments())
    return row, theirs if inception else None


def reconstruct(args):
    """Table 1: how much of held-out images survives encode and decode, nothing masked. `scores`
    defines the metrics; z is the posterior's mode."""
    rows, shown = [], []
    for run in (Run(path, args) for path in args.ckpt):
        n, batches = run.held_out()
        pairs = ((x, run.decode(run.encode(x))) for x, _ in batches)
        first = next(pairs)
        if not (shown and torch.equal(shown[0], first[0][:16])):           # once, if the same
            shown.append(first[0][:16])
        shown.append(first[1][:16])
        row, _ = scores(itertools.chain([first], pairs), args)
        rows.append({"checkpoint": run.path, "N": n, **row})
    report(args, "Reconstruction of held-out images (Table 1)", rows, min(r["N"] for r in rows))
    picture(shown, f"{args.out}/reconstruct.png")          # originals above reconstructions


def perturb(z, eps):
    """z (N, d, h, w) + eps s_c N(0, 1), s_c the standard deviation of channel c over all images;
    the same noise for every eps, and for every model with a latent of this shape."""
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))  # on the CPU
    return z + eps * z.std((0, 2, 3), keepdim=True) * noise


def smoothness(args):
    """Fig. 6: does a small step in latent space (`perturb`) stay a small step in the image? The
    decoded z' is scored against the original, as in Table 1; `lost` is the PSNR that it lacks
    against the first --eps. The plot's axis is rFID, as the paper's, or PSNR without Inception."""
    rows, shown, curves = [], [], {}
    for run in (Run(path, args) for path in args.ckpt):
        x = torch.cat([x for x, _ in run.held_out()[1]])                   # (N, 3, S, S)
        z, real, start, strip = run.encode(x), None, len(rows), [x[:1]]
        for eps in args.eps:
            x_hat = run.decode(perturb(z, eps))
            row, real = scores(zip(x.split(args.batch), x_hat.split(args.batch)), args, real)
            rows.append({"checkpoint": run.path, "eps": eps, **row})
            rows[-1]["lost"] = rows[start]["PSNR"] - row["PSNR"]
            strip.append(x_hat[:1])
        axis = "rFID" if real else "PSNR"
        curves[run.path] = [(row["eps"], row[axis]) for row in rows[start:]]
        shown.append(torch.cat(strip))
    report(args, f"Reconstruction from z + eps std N(0, 1), {len(x)} images (Fig. 6)", rows, len(x))
    picture(shown, f"{args.out}/smoothness_strip.png")     # the original, then each eps
    plot(f"{args.out}/smoothness.png", curves, "eps, in standard deviations of a channel", axis)


def separation(z, group, image):
    """Latent tokens z (M, d), the group of each (M,) and the image it is from (M,) -> numbers.

    The paper plots sigma^2 and rho without a formula; these definitions are ours. With every
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
    weighted = A[fit] / member[fit].sum(0)[group[fit], None]
    W = torch.linalg.solve(weighted.T @ A[fit] + 1e-3 * torch.eye(A.shape[1]).double(),
                           weighted.T @ member[fit])                       # (d + 1, G)
    hit = ((A[~fit] @ W).argmax(1) == group[~fit]).double()
    tried = member[~fit].sum(0)                            # (G,), a group may be absent
    return {"groups": len(count), "tokens": len(z),
            "sigma^2": (within / z.square().sum(1).mean()).item(),
            "rho": (torch.pdist(mu).mean() / within.sqrt()).item(),
            "probe": (member[~fit].T @ hit / tried)[tried > 0].mean().item(),
            "chance": 1 / len(count)}


def face_levels(run):
    """Tokens of held-out built-in faces on the paper's levels -> name: (z, group, image). A token
    belongs to the part that covers more than half of its patch, and is left out where none does.
    object: tokens of the head by kind; part: all, by part; pattern: those of the skin."""
    faces, tokens = vmae.Faces(run.model.img_size, "val"), []
    for numbers in torch.arange(min(run.args.n, len(faces))).split(run.args.batch):
        x, kind, pattern, part = faces.render(numbers)
        z = run.encode(vmae.to_uint8(x)).permute(0, 2, 3, 1)               # (B, h, w, d)
        cover = F.one_hot(part, len(vmae.PARTS)).permute(0, 3, 1, 2).float()  # (B, 5, S, S)
        share, part = F.avg_pool2d(cover, run.model.patch_size).max(1)     # (B, h, w) each
        whole = [v.view(-1, 1, 1).expand_as(part) for v in (kind, pattern, numbers)]
        tokens.append([v[share > 0.5] for v in (z, part, *whole)])
    z, part, kind, pattern, image = map(torch.cat, zip(*tokens))           # (M, d), (M,)...
    head, skin = part > 0, part == 2
    return {"object": (z[head], kind[head], image[head]), "part": (z, part, image),
            "pattern": (z[skin], pattern[skin], image[skin])}


def separability(args):
    """Figs. 4 and 7: is the latent ordered by object, by part, by pattern? `separation` defines
    the numbers, `face_levels` the groups; class folders (--data, or those of training) add the
    object level, each token being of its image's class. The picture: two principal components."""
    rows, clouds = [], []
    for run in (Run(path, args) for path in args.ckpt):
        levels = {f"faces, {level}": tokens for level, tokens in face_levels(run).items()}
        if args.data or run.trained["data"]:
            x, y = map(torch.cat, zip(*run.held_out()[1]))                 # (N, 3, S, S), (N,)
            if len(y.unique()) > 1:
                z = run.encode(x).permute(0, 2, 3, 1).flatten(0, 2)        # (M, d)
                image = torch.arange(len(y)).repeat_interleave(len(z) // len(y))   # (M,)
                levels["classes, object"] = z, y[image], image
            else:
                print(f"skipped the classes of {args.data or run.trained['data']}: one at the most")
        rows += [{"checkpoint": run.path, "level": k, **separation(*v)} for k, v in levels.items()]
        z, part, _ = levels["faces, part"]
        z = (z - z.mean(0)) / z.std(0).clamp(min=1e-12)    # PCA of what `separation` sees
        xy = z @ torch.linalg.eigh(z.T @ z).eigenvectors[:, -2:].flip(1)   # (M, 2)
        clouds.append({name: xy[part == k][:1500].tolist() for k, name in enumerate(vmae.PARTS)})
    report(args, "Order in latent space, by our definition (Figs. 4, 7): a low sigma^2 and a high "
           "rho separate", rows)
    for i, (cloud, path) in enumerate(zip(clouds, args.ckpt)):
        plot(f"{args.out}/separability{i or ''}.png", cloud, "first principal component of the "
             "tokens", f"second; {path}", lines=False)


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
    """Table 3: VMAE `base` against the SD-VAE, counted from the modules; nothing is computed.

    MB: fp32 MiB of everything in the state dict. GFLOPs, in the paper's convention: multiply-adds
    of the encoder without attention's products, for a batch of 128; its 703.9 appears once each
    element of a LayerNorm counts four. Last: encoder and decoder with attention, one image, a
    multiply-add being two operations. --time: seconds of encode, decode and a training step
    (forward, backward); peak memory beyond torch's own, in a process for each.
    """
    rows = []
    if args.size % 8:
        raise InputError(f"--size {args.size}: has to be a multiple of 8, the f of both")
    for name, (body, kwargs) in BODIES.items():
        with torch.device("meta"), torch.no_grad():        # tensors with a shape and no content
            model = body(args.size, **kwargs)
            with Work() as work:
                z = model.encode(torch.empty(1, 3, args.size, args.size)).mode()
                e = work.count.copy()       # the encoder's
                model.decode(z)
        d, whole = work.count - e, work.count["body"] + work.count["attention"]
        numbers = sum(v.numel() for v in model.state_dict().values())
        rows.append({"model": name, "numbers": numbers, "MB": numbers * 4 / 2**20,
                     "GFLOPs": e["body"] * 128 / 1e9,
                     "+ norms": (e["body"] + 4 * e["norm"]) * 128 / 1e9,
                     "encoder GMACs": e["body"] / 1e9, "decoder GMACs": d["body"] / 1e9,
                     "all GFLOPs": 2 * whole / 1e9})
        if args.time:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows[-1].update(pool.apply(measure, (name, args.size, args.batch, args.device)))
    ratio = {key: f"{rows[1][key] / rows[0][key]:.1%}" for key in list(rows[0])[1:]}
    report(args, f"Efficiency at {args.size} px (Table 3)", [*rows, {"model": "ratio", **ratio}])
    if not args.time:
        print("skipped times and memory: `evaluate.py efficiency --time`")


def measure(name, size, batch, device):
    """Seconds, the best of 4, and peak memory of one of BODIES; see `efficiency`."""
    import resource                         # not on Windows, where all the rest works

    usage, (body, kwargs) = resource.RUSAGE_SELF, BODIES[name]
    device, before = torch.device(device), resource.getrusage(usage).ru_maxrss  # torch's own
    model, x = body(size, **kwargs).to(device), torch.rand(batch, 3, size, size, device=device)

    def train():
        model.zero_grad()
        (model.decode(model.encode(x).sample()) - x).square().mean().backward()

    def now():
        """Seconds; CUDA returns before it is done, unless asked to wait."""
        if device.type == "cuda":
            torch.cuda.synchronize()
        return timeit.default_timer()

    encode, decode = torch.no_grad()(model.encode), torch.no_grad()(model.decode)
    z = encode(x).mode()
    works = {"encode s": lambda: encode(x), "decode s": lambda: decode(z), "train s": train}
    row = {k: min(timeit.repeat(work, timer=now, repeat=4, number=1)) for k, work in works.items()}
    row["peak MiB"] = (torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else
                       (resource.getrusage(usage).ru_maxrss - before) / 2**10)   # KiB on Linux
    return row


def generation(fake, real, args):
    """--fake and --real as in `open_source`, or --real a .npz of mu and sigma as pytorch-fid's ->
    (a row of `fid`'s metrics, the real side's statistics). Both sides are cropped and resized by
    the same code, to the size of the fakes."""
    own = not fake.endswith(".npz") and not os.path.isdir(fake)            # our generator
    if not real and not own:
        raise InputError('--real: name a folder, a .npz or "faces" to compare with')
    real = real or ldm.load_ldm(fake)[2]["train_args"]["data"] or "faces"
    size, *fakes = open_source(fake, args)
    known = read_npz(real) if real.endswith(".npz") else {}
    reals = [] if "mu" in known else open_source(real, args, size)[1:]     # a bad --real stops here
    mine = Features(args.nets[1], args.pairs).see(*fakes)
    theirs = Features(args.nets[1], args.pairs).see(*reals) if reals else None
    known, stats = theirs.statistics() if reals else known, mine.statistics()
    row = {"fake": fake, "real": real, "N fake": stats["n"],
           "N real": int(known.get("n", 0)) or "unknown"}
    name = "gFID" if own else "FID"
    for metric, mu, sigma in ((name, "mu", "sigma"), ("sFID", "mu_s", "sigma_s")):
        try:
            if mu in known:
                row[metric] = frechet_distance(known[mu], known[sigma], stats[mu], stats[sigma])
        except (ValueError, KeyError) as error:            # somebody else's .npz
            raise InputError(f"{real}: {mu} and {sigma} cannot be used, {error}") from None
    row["IS"] = mine.inception_score()
    if theirs and min(args.pairs, mine.pool.n, theirs.pool.n) > 3:         # as they compare pairs
        a, b = torch.cat(theirs.kept), torch.cat(mine.kept)
        row["KID x 1e3"] = 1e3 * kid(a, b)
        row["precision"], row["recall"] = precision_recall(a, b)
    return row, known


def fid(args):
    """Table 2: generated images against real ones, from one pass of Inception over each: FID (gFID
    of our generator's samples), sFID = the same of the spatial features, IS of the fakes; and of
    the first --pairs images of each side, whose features stay in memory, KID, precision, recall."""
    if args.save_stats:                     # a place that cannot be written shows before the work
        os.makedirs(os.path.dirname(args.save_stats) or ".", exist_ok=True)
    row, known = generation(args.fake, args.real, args)          # the real side's statistics
    if args.save_stats:
        np.savez(args.save_stats, **known)
    n = min(row["N fake"], int(known.get("n", 10**9)))
    report(args, "Generated images (Table 2)", [row], n)


def compare(args):
    """Fig. 2: several runs on one radar, each axis rescaled from the worst run (inner ring) to the
    best (outer ring), as the paper does.

    smoothness   PSNR between decode(z) and decode(z'), z' = `perturb`(z, .1)
    compression  sigma^2 of the built-in faces' tokens by part (`separation`), low is good
    pixels       PSNR of held-out images; perception: their LPIPS, or SSIM without VGG's weights
    generation   gFID of --n samples, if all runs are of stage two and Inception's weights here
    """
    rows, (lpips_net, inception) = [], args.nets
    no_fid = argparse.Namespace(nets=(lpips_net, None), device=args.device)        # for `scores`
    runs = {run: f"{run}/last.pt" if os.path.isdir(run) else run for run in args.runs}
    second = inception and all("vmae" in vmae.read_checkpoint(path) for path in runs.values())
    perception = "LPIPS" if lpips_net else "SSIM"
    for name, run in ((name, Run(path, args)) for name, path in runs.items()):
        x = torch.cat([x for x, _ in run.held_out()[1]])                   # (N, 3, S, S)
        z = run.encode(x)                                  # (N, d, h, w)
        x_hat, moved = run.decode(z), run.decode(perturb(z, 0.1))
        row, _ = scores(zip(x.split(args.batch), x_hat.split(args.batch)), no_fid)
        rows.append({"run": name, "smoothness, dB": psnr(x_hat, moved).mean().item(),
                     "compression, sigma^2": separation(*face_levels(run)["part"])["sigma^2"],
                     "pixels, dB": row["PSNR"], f"perception, {perception}": row[perception]})
        if second:
            rows[-1]["generation, gFID"] = generation(run.path, None, args)[0]["gFID"]
    axes = list(rows[0])[1:]
    sign = [-1 if axis.endswith(("sigma^2", "LPIPS", "gFID")) else 1 for axis in axes]
    table = np.array([[row[axis] for axis in axes] for row in rows]) * sign        # up is good
    span = np.ptp(table, 0)                                # (axes,), 0 where all runs are equal
    rescaled = (table - table.min(0)) / np.where(span > 0, span, 1)        # (runs, axes)
    shapes = dict(zip(runs, rescaled.tolist()))
    report(args, "Comparison (Fig. 2)", rows, args.n if second else None, rescaled=shapes)
    radar(f"{args.out}/compare.png", axes, shapes)
    if not second:
        print("skipped generation: it takes stage-two runs, and Inception's weights")


def neighbours(args):
    """Did it memorise? Each sample (top row) above its 5 nearest training images, in pixels and,
    with Inception's weights, in its features. The table: the median distance to the nearest
    training image, of the samples and of as many held-out images; samples much nearer than those
    are copies. Pixels: RMS difference, 0 to 255."""
    trained = ldm.load_ldm(args.ckpt[0])[2]["train_args"]
    x = torch.cat(list(draw_samples(args.ckpt[0], args)))                  # (n, 3, S, S)
    (_, net), size, rows, shown = args.nets, x.shape[-1], [], [x[:16]]
    fresh = vmae.open_images(trained["data"], size, "val", trained["val"])
    both = torch.cat([x, *(batch for batch, _ in shuffled(fresh, args)[1])])
    train = vmae.open_images(trained["data"], size, "train", trained["val"])
    spaces = {"pixels": lambda x: x.flatten(1).float() / math.sqrt(3 * size**2)}
    if net:
        spaces["Inception"] = lambda x: torch.cat([net(part).cpu() for part in x.split(args.batch)])
    for name, space in spaces.items():
        batches = (space(vmae.to_uint8(y)) for y, _ in DataLoader(train, 256))
        d, index = nearest(space(both), tqdm(batches, name), 5)            # (2n, 5) each
        near, usual = d[:len(x), 0].median().item(), d[len(x):, 0].median().item()
        rows.append({"space": name, "samples": near, "held-out": usual,
                     "ratio": near / usual if usual else math.nan})        # 0: they are duplicates
        shown += [torch.stack([vmae.to_uint8(train[i][0]) for i in row.tolist()])
                  for row in index[:len(x)][:16].T]
    report(args, f"Distance to the nearest of {len(train)} training images, median", rows)
    picture(shown, f"{args.out}/neighbours.png")           # 6 rows, or 11


# ---- The command line -------------------------------------------------------------------------

OPTIONS = {  # name: default, whose type is the option's; help; choices
    "runs": (["runs/ae", "runs/vmae"], "run folders, or checkpoints"),
    "ckpt": (["runs/vmae/last.pt"], "checkpoints of either stage, or published weights"),
    "fake": ("runs/ldm/last.pt", "a stage-two checkpoint, sampled; a folder; a .npz with arr_0"),
    "real": ("", "folder; .npz with mu and sigma, or arr_0; faces, the built-in ones (default: "
             "what the checkpoint was trained on)"),
    "data": ("", "folder of images, all of them used (default: those held out in training)"),
    "n": (1000, "images at the most"),
    "pairs": (10000, "images of each side whose features are kept in memory, 8 KB each, for KID, "
              "precision and recall; 0: none"),
    "eps": ([0, 0.01, 0.05, 0.1, 0.2, 0.3], "noise, in standard deviations of a latent channel"),
    "size": (256, "pixels"),
    "cfg": (1.0, "guidance weight of samples, 1: none"),
    "time": (False, "also seconds and memory"),
    "resize": ("pytorch-fid", "to Inception's 299 pixels; clean: antialiased, as clean-fid",
               "pytorch-fid", "clean"),
    "fast": (False, "Inception in bfloat16: faster, two or three digits count"),
    "inception-weights": ("", "a copy of FID's InceptionV3 (default: torch hub's cache)"),
    "vgg-weights": ("", "a copy of VGG-16, for LPIPS (default: torch hub's cache)"),
    "download": (False, "fetch weights that are missing"),
    "save-stats": ("", "write the real side's statistics to this .npz"),
    "batch": (64, "images at a time"),
    "device": ("auto", "cuda, cpu, mps..."),
    "out": ("", "folder of table and picture (default: beside what is measured)"),
}
NET = "resize fast inception-weights download"
COMMANDS = (  # function, what it is, options besides batch, device and out, defaults of its own
    (reconstruct, "Table 1: L1, PSNR, SSIM, LPIPS, rFID", f"ckpt data n {NET} vgg-weights", {}),
    (smoothness, "Fig. 6: noise on the latent", f"ckpt data n eps {NET} vgg-weights", dict(n=256)),
    (separability, "Figs. 4, 7: order by object, part, pattern", "ckpt data n", dict(n=512)),
    (efficiency, "Table 3: sizes, operations, times", "size time", dict(batch=1)),
    (neighbours, "samples beside the nearest training images", f"ckpt n cfg {NET}",
     dict(ckpt=["runs/ldm/last.pt"], n=16)),
    (fid, "Table 2: FID, sFID, IS, KID, precision, recall", "fake real n pairs cfg save-stats "
     "resize fast inception-weights", dict(n=10000, download=True)),
    (compare, "Fig. 2: several runs on one radar", f"runs data n cfg {NET} vgg-weights",
     dict(n=256)),
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s [command]")
    parser.set_defaults(**{name.replace("-", "_"): row[0] for name, row in OPTIONS.items()})
    commands = parser.add_subparsers(metavar="command", prog=parser.prog)
    for function, about, names, own in COMMANDS:
        sub = commands.add_parser(function.__name__, help=about)
        for name in f"{names} batch device out".split():
            default, text, *choices = OPTIONS[name]
            kind = dict(type=type(default), choices=choices or None)
            if isinstance(default, list):
                kind = dict(type=type(default[-1]), nargs="+")
            elif default is False:
                kind = dict(action="store_true")
            sub.add_argument("runs" if name == "runs" else f"--{name}", default=default, **kind,
                             help=text + " (default: %(default)s)" * bool(default))
        sub.set_defaults(function=function, uses=names.split(), **own)
    lines = [sys.argv[1:]]
    if not sys.argv[1:]:                    # everything that needs no download, with its defaults
        lines = [["reconstruct"], ["smoothness"], ["separability"], ["efficiency"]]
        lines += [["neighbours"]] * Path("runs/ldm/last.pt").exists()
        runs = [str(path.parent) for path in sorted(Path("runs").glob("*/last.pt"))
                if "vmae" not in vmae.read_checkpoint(path)]               # those of stage one
        lines += [["compare", *runs]] * (len(runs) > 1)
    for line in lines:
        args = parser.parse_args(line)
        args.device = vmae.pick_device(args.device)
        for name, least in dict(n=1, batch=1, size=1, pairs=0, eps=0).items():
            if not np.min(getattr(args, name)) >= least:   # nor is NaN
                raise InputError(f"--{name} must be at least {least}, not {getattr(args, name)}")
        place = {fid: args.fake, efficiency: "runs/", compare: "runs/"}.get(args.function)
        place = place or args.ckpt[0]       # what is measured
        args.out = args.out or (place if os.path.isdir(place) else os.path.dirname(place) or ".")
        # With no arguments no nets, even if they are here: Inception takes minutes on a CPU.
        args.nets = optional_nets(args) if sys.argv[1:] else (None, None)
        args.function(args)
    if not sys.argv[1:]:
        print("skipped LPIPS and rFID: `evaluate.py reconstruct --download` fetches 528 and 91 MB\n"
              "skipped fid: `evaluate.py fid` samples, and fetches Inception's 91 MB")
        if ["neighbours"] not in lines:
            print("skipped neighbours: it needs a generator, `train_ldm.py`")
        if len(runs) < 2:
            print("skipped compare: train a second preset, then `evaluate.py compare` both")


if __name__ == "__main__":
    vmae.cli(main)

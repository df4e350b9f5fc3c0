"""Measure what the paper measures, one sub-command for each figure or table.

    python evaluate.py                                   on the default runs, without downloads
    python evaluate.py reconstruct --ckpt runs/vmae/last.pt               Table 1
    python evaluate.py fid --fake runs/ldm/last.pt --real path            Table 2: FID and others
    python evaluate.py smoothness --ckpt a/last.pt b/last.pt              Figs. 3 and 6
    python evaluate.py separability                                       Figs. 4, 5 and 7
    python evaluate.py efficiency --time                                  Table 3
    python evaluate.py compare runs/ae runs/vae runs/vmae                 Fig. 2
    python evaluate.py faces                             generated built-in faces, without downloads
    python evaluate.py neighbours                                         did it memorise?

Each is a function whose docstring defines what it measures. It prints a Markdown table, writes it
as JSON, and most draw a picture. All metrics take images as uint8, as they are saved."""
import argparse, hashlib, inspect, itertools, json, math, os, re, sys, timeit, warnings
from pathlib import Path

import vmae                                 # before torch, see there
import numpy as np
import scipy.linalg
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import ldm
import sample
from vmae import InputError, psnr

# ---- InceptionV3 (Szegedy 2016) in the form FID is defined on: TensorFlow's weights of 2015 ---

class ConvBN(nn.Module):
    """Convolution, batch norm with stored statistics, ReLU. width: of the kernel (default: height).
    Folding the norm into the convolution at each call is fast and keeps the published weights."""

    def __init__(self, c_in, c_out, height, width=None, stride=1, valid=False):
        super().__init__()
        padding = "valid" if valid or stride == 2 else "same"
        self.conv = nn.Conv2d(c_in, c_out, (height, width or height), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        scale = self.bn.weight / (self.bn.running_var + self.bn.eps).sqrt()  # (c_out,)
        weight = self.conv.weight * scale.view(-1, 1, 1, 1)                # (c_out, c_in, kh, kw)
        bias = self.bn.bias - self.bn.running_mean * scale                 # (c_out,)
        return F.relu_(F.conv2d(x, weight, bias, self.conv.stride, self.conv.padding))

class Mixed(nn.Module):
    """Branches that read the same input; their outputs are joined along the channels. branches:
    name -> list of convolutions, each (channels, kernel height[, kernel width]). The last entry may
    be a dict of two, {"a": ..., "b": ...}: both read what comes before, and both are outputs.
    branch_pool begins with the pool. The last convolution has the pool's stride."""

    def __init__(self, c_in, pool, **branches):
        super().__init__()
        self.branches = []                  # of each branch: (modules in a row, output modules)
        for branch, convs in branches.items():
            steps, c = [[pool]] if branch == "branch_pool" else [], c_in
            for i, entry in enumerate(convs, 1):
                name = f"{branch}_{i}" if len(convs) > 1 else branch       # as published
                stride = pool.stride if i == len(convs) else 1
                ends = entry if isinstance(entry, dict) else {"": entry}
                steps.append([ConvBN(c, *conv, stride=stride) for conv in ends.values()])
                for letter, conv in zip(ends, steps[-1]):
                    self.add_module(name + letter, conv)
                c = steps[-1][0].bn.num_features
            self.branches.append((nn.Sequential(*(step[0] for step in steps[:-1])), steps[-1]))

    def forward(self, x):
        outputs = []
        for row, ends in self.branches:
            h = row(x)
            outputs += [end(h) for end in ends]
        return torch.cat(outputs, 1)                       # (N, all channels, h, w)

class InceptionV3(nn.Module):
    """uint8 images (N, 3, H, W) -> the 2048-d features (N, 2048) that FID compares.
    resize, to 299 x 299: "pytorch-fid", bilinear, pixels to [-1, 1]; "clean", antialiased bicubic
    (Parmar 2022), pixels to (x - 128) / 128. fast: in bfloat16, which keeps 2 or 3 digits."""

    def __init__(self, resize="pytorch-fid", fast=False):
        super().__init__()
        self.resize, self.fast, self.hash = resize, fast, "none"
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3, valid=True)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3)
        self.maxpool1 = nn.MaxPool2d(3, 2)                 # 147 x 147 -> 73 x 73
        self.Conv2d_3b_1x1 = ConvBN(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3, valid=True)
        self.maxpool2 = nn.MaxPool2d(3, 2)                 # 71 x 71 -> 35 x 35
        avg, halve = nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.MaxPool2d(3, 2)
        double = [(64, 1), (96, 3), (96, 3)]               # two 3 x 3 see as far as a 5 x 5
        parts = dict(branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)], branch3x3dbl=double)
        self.Mixed_5b = Mixed(192, avg, **parts, branch_pool=[(32, 1)])    # 35 x 35
        self.Mixed_5c = Mixed(256, avg, **parts, branch_pool=[(64, 1)])
        self.Mixed_5d = Mixed(288, avg, **parts, branch_pool=[(64, 1)])
        self.Mixed_6a = Mixed(288, halve, branch3x3=[(384, 3)], branch3x3dbl=double, branch_pool=[])
        for name, c in zip("bcde", (128, 160, 160, 192)):  # 17 x 17; 1 x 7 and 7 x 1 make a 7 x 7
            self.add_module(f"Mixed_6{name}", Mixed(
                768, avg, branch1x1=[(192, 1)], branch7x7=[(c, 1), (c, 1, 7), (192, 7, 1)],
                branch7x7dbl=[(c, 1), (c, 7, 1), (c, 1, 7), (c, 7, 1), (192, 1, 7)],
                branch_pool=[(192, 1)]))
        self.Mixed_7a = Mixed(768, halve, branch3x3=[(192, 1), (320, 3)], branch7x7x3=[
            (192, 1), (192, 1, 7), (192, 7, 1), (192, 3)], branch_pool=[])
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
        """-> features (N, 2048), for FID; spatial (N, 2023), for sFID: the first 7 channels of
        Mixed_6d's first convolution at its 17 x 17 places, in the order of ADM's statistics (Nash
        2021); logits (N, 1008), for the Inception Score, without bias as in Salimans 2016."""
        clean, device = self.resize == "clean", self.fc.weight.device
        on_cpu = clean and device.type == "mps"            # where older torch cannot antialias
        x = images.to("cpu" if on_cpu else device).float()                 # (N, 3, H, W) in 0..255
        x = F.interpolate(x, (299, 299), mode="bicubic" if clean else "bilinear", antialias=clean)
        x = (x.clamp(0, 255) - 128) / 128 if clean else x / 127.5 - 1
        x = x.to(device, memory_format=torch.channels_last)                # 1.4x as fast
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.fast):
            for layer in list(self.children())[:-1]:       # in the order above, without fc
                if layer is self.Mixed_6d:
                    spatial = layer.branch1x1(x)[:, :7].permute(0, 2, 3, 1)    # (N, 17, 17, 7)
                x = layer(x)
        features = x.float().mean((2, 3))                  # (N, 2048, 8, 8) -> (N, 2048)
        return features, spatial.flatten(1).float(), features @ self.fc.weight.T

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

# ---- Metrics; psnr is in vmae.py --------------------------------------------------------------

def ssim(a, b):
    """Structural similarity (Wang 2004) -> (N,), 1 for equal images. a, b: (N, C, H, W) in 0..255.
    SSIM = (2 mu_a mu_b + c1)(2 cov + c2) / ((mu_a^2 + mu_b^2 + c1)(var_a + var_b + c2)) under an
    11 x 11 Gaussian window of sigma 1.5, biased (co)variances, c1 = (.01 * 255)^2, c2 = (.03 *
    255)^2; the mean over channels and over the windows inside the image. InputError below 11 px."""
    if min(a.shape[2:]) < 11:
        raise InputError(f"images of {min(a.shape[2:])} pixels are too small for SSIM; it needs 11")
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

class Statistics:
    """Mean and covariance of rows from running sums in float64: D^2 numbers for any number of rows.
    The mean of the first batch is subtracted from all rows, so that the sums do not cancel."""

    n = 0                                   # rows so far

    def add(self, rows):
        """rows: (B, D). -> self."""
        rows = (rows if rows.is_cuda else rows.cpu()).double()             # MPS has no float64
        if self.n == 0:
            self.shift, self.total, self.outer = rows.mean(0), 0, 0
        rows = rows - self.shift            # (B, D)
        self.n, self.total = self.n + len(rows), self.total + rows.sum(0)
        self.outer += rows.T @ rows         # (D, D)
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
    images. With pivoting: it stops where only rounding is left, six times as fast as eigenvectors.
    ValueError if sigma is no covariance: NaN, or negative eigenvalues beyond rounding."""
    rounding = 1e-4 if sigma.dtype == np.float32 else 1e-8     # statistics may come as float32
    sigma = sigma.astype(np.float64)
    factor, order, r, _ = scipy.linalg.lapack.dpstrf(sigma, lower=1)
    L = np.zeros((len(sigma), r))           # (D, r)
    L[order - 1] = np.tril(factor)[:, :r]                  # undo the pivoting of the rows
    if r < len(sigma) and not np.abs(sigma - L @ L.T).max() <= rounding * np.abs(sigma).max():
        raise ValueError("not a covariance: NaN, or negative eigenvalues beyond rounding")
    return L

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """FID = |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr sqrt(S1 S2). Heusel 2017, Eq. 6.
    tr sqrt(S1 S2) is the sum of the square roots of the eigenvalues of S1 S2. With S1 = A A^T and
    S2 = B B^T these are the squared singular values of A^T B; we sum the singular values. In
    float64. mu (D,), sigma (D, D), numpy or torch. ValueError for other shapes or no covariance."""
    mu1, sigma1, mu2, sigma2 = (np.asarray(v) for v in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or any(s.shape != (mu1.size, mu1.size) for s in (sigma1, sigma2)):
        raise ValueError(f"statistics of {sigma1.shape} and {sigma2.shape} do not compare")
    A, B = cholesky(sigma1), cholesky(sigma2)              # (D, rank) each
    trace_of_root = np.linalg.svd(A.T @ B, compute_uv=False).sum()
    difference = mu1.astype(np.float64) - mu2              # (D,)
    traces = np.trace(sigma1, dtype=float) + np.trace(sigma2, dtype=float)
    return max(float(difference @ difference + traces - 2 * trace_of_root), 0.0)

def kid(a, b):
    """KID = MMD^2 with the kernel k(x, y) = (x.y / D + 1)^3, unbiased for every N. Binkowski 2018.
    The mean of k over pairs within a (N, D), plus that within b (M, D), minus twice that between
    them; no image is paired with itself. Close to 0, on either side, for equal distributions."""
    def total(x, y):                                       # in blocks, to bound the memory
        return sum(((part @ y.T / x.shape[1] + 1) ** 3).sum().item() for part in x.split(1024))

    def within(x):
        itself = ((x.square().mean(1) + 1) ** 3).sum().item()
        return (total(x, x) - itself) / (len(x) * (len(x) - 1))

    a, b = a.double(), b.double()
    return within(a) + within(b) - 2 * total(a, b) / (len(a) * len(b))

def nearest(rows, batches, k):
    """rows (Q, D), batches of (B, D) -> the k nearest members of all batches to each row: their
    Euclidean distances and their numbers, (Q, k) each. Only one batch is in memory at a time."""
    best, index, at = torch.empty(len(rows), 0), torch.empty(len(rows), 0, dtype=torch.long), 0
    for batch in batches:
        d = torch.cat([best, torch.cdist(rows, batch)], 1)                 # (Q, k + B)
        number = torch.arange(at, at + len(batch)).expand(len(rows), -1)
        best, place = d.topk(min(k, d.shape[1]), largest=False)
        index, at = torch.cat([index, number], 1).gather(1, place), at + len(batch)
    return best, index

def precision_recall(real, fake, k=3):
    """Kynkaanniemi 2019. The manifold of a set is the union of balls around its members, each as
    large as the distance to the k-th nearest other member. Precision: the share of the fakes on the
    manifold of the real. Recall: of the real on that of the fakes. (N, D), (M, D) -> two floats."""
    def on_manifold(rows, members):
        """Share of rows inside a ball. The nearest member to a member is itself, hence k + 1."""
        radius = nearest(members, members.split(512), k + 1)[0][:, -1]     # (M,)
        inside = [(torch.cdist(block, members) <= radius).any(1) for block in rows.split(512)]
        return torch.cat(inside).double().mean().item()

    return on_manifold(fake, real), on_manifold(real, fake)

class Judge(nn.Module):
    """A small U-Net that learns what the renderer of the built-in faces knows: object, pattern, and
    the part at each pixel. Its features take the place of Inception's, without a download. They are
    no FID: they know only these faces, at 32 px, and distances in them compare with each other
    alone. Each feature is in standard deviations of the training faces."""

    def __init__(self):
        super().__init__()
        def conv(c_in, c_out, stride=1):
            return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False),
                                 nn.BatchNorm2d(c_out), nn.ReLU())

        def halve(c_in, c_out):
            return nn.Sequential(conv(c_in, c_out, 2), conv(c_out, c_out))

        self.down = nn.ModuleList([conv(3, 16), halve(16, 32), halve(32, 64), halve(64, 64)])
        self.up = nn.ModuleList([conv(64 + 64, 32), conv(32 + 32, 32), conv(32 + 16, 16)])
        self.object, self.pattern = nn.Linear(128, 4), nn.Linear(128, 3)
        self.part = nn.Conv2d(16, len(vmae.PARTS), 1)
        self.register_buffer("mean", torch.zeros(208)), self.register_buffer("std", torch.ones(208))

    def forward(self, images):
        """uint8 (N, 3, S, S) -> features (N, 208), logits of the object (N, 4), of the pattern (N,
        3), of the part (N, 5, 32, 32)."""
        x = vmae.to_float(F.interpolate(images.float(), (32, 32), mode="area"))
        x, levels = x.contiguous(memory_format=torch.channels_last), []
        for layer in self.down:
            levels.append(x := layer(x))    # 32, 16, 8, 4 pixels
        features = [x.mean((2, 3)), x.amax((2, 3))]
        whole = torch.cat(features, 1)                     # (N, 128)
        for layer, fine in zip(self.up, levels[2::-1]):    # 8, 16, 32 pixels
            x = layer(torch.cat([F.interpolate(x, scale_factor=2), fine], 1))
            features.append(x.mean((2, 3)))                # how much there is of each texture
        features = (torch.cat(features, 1) - self.mean) / self.std
        return features, self.object(whole), self.pattern(whole), self.part(x)

def load_judge(folder="runs"):
    """The Judge, from a file in `folder`; or trained now, on each training face once, and kept. The
    file's name is a hash of what makes it: its code and the faces."""
    faces, made_by = vmae.Faces(32), "".join(map(inspect.getsource, (Judge, load_judge)))
    key = hashlib.sha256(made_by.encode() + faces.fingerprint()).hexdigest()[:8]
    path = Path(folder, f"judge_{key}.pt")
    torch.manual_seed(0)                    # the same weights to begin with
    judge = Judge().to(memory_format=torch.channels_last)
    if path.exists():
        judge.load_state_dict(torch.load(path, weights_only=True))
        return judge.eval().requires_grad_(False)
    opt = torch.optim.AdamW(judge.parameters(), weight_decay=0.01)
    parts = torch.arange(len(faces)).split(32)
    plan = torch.optim.lr_scheduler.OneCycleLR(opt, 5e-3, len(parts))
    for part in tqdm(parts, "training the judge", dynamic_ncols=True):
        x, *truth = faces.render(part)
        answers = judge(vmae.to_uint8(x))[1:]
        sum(map(F.cross_entropy, answers, truth)).backward()
        opt.step(), opt.zero_grad(), plan.step()
    judge.eval().requires_grad_(False)
    features = torch.cat([judge(faces.batch(part)[0])[0] for part in parts[:128]])     # (4096, 208)
    judge.mean, judge.std = features.mean(0), features.std(0).clamp(min=1e-6)
    os.makedirs(folder, exist_ok=True)
    vmae.save_checkpoint(path, **judge.state_dict())
    return judge

JUDGED = 4096          # training faces that samples are compared with

def jury(device):
    """-> `judged`, a function that compares images with the first JUDGED training faces."""
    judge = load_judge().to(device)

    def see(batches):
        """What the Judge answers to all of the batches, on the CPU."""
        answers = zip(*(judge(x.to(device)) for x in batches))
        return [torch.cat(answer).cpu() for answer in answers]

    def judged(batches, wanted):
        """Batches of uint8, and the kinds (N,) that were asked for, or None -> a row of `faces`."""
        features, kind, _, part = see(batches)
        pixels = F.one_hot(part.argmax(1), len(vmae.PARTS)).sum((1, 2))    # (N, 5)
        right = None if wanted is None else kind.argmax(1) == wanted       # (N,)
        precision, recall = precision_recall(real[:len(features)], features)
        return {"N": len(features),
                "requested": "" if right is None else right.double().mean().item(),
                "complete": (pixels >= 3).all(1).double().mean().item(),
                "distance": frechet_distance(*usual, *Statistics().add(features).moments()),
                "precision": precision, "recall": recall}

    real = see(x for x, _ in vmae.Faces(32).batches(torch.arange(JUDGED)))[0]      # (JUDGED, 208)
    usual = Statistics().add(real).moments()               # mean (208,), covariance (208, 208)
    return judged

class Features:
    """What we keep of a set of images that Inception has seen: running sums, for FID, sFID and IS;
    the features of the first `pairs` images, for the metrics that compare pairs."""

    def __init__(self, net, pairs=0):
        self.net, self.pairs, self.kept = net, pairs, []
        self.pool, self.spatial, self.entropy, self.p = Statistics(), Statistics(), 0.0, 0.0

    def add(self, images):
        """images: uint8 (B, 3, H, W)."""
        features, spatial, logits = self.net.outputs(images)
        if self.pairs > self.pool.n:        # an empty slice would keep its whole batch in memory
            self.kept.append(features[:self.pairs - self.pool.n].cpu())
        self.pool.add(features)
        self.spatial.add(spatial)
        p = logits.cpu().double().softmax(1)               # p(y|x), (B, 1008)
        self.p += p.sum(0)                                 # (1008,)
        self.entropy += torch.special.entr(p).sum().item()                 # entr(p) = -p log p

    def see(self, n, batches):
        """Add all of the batches, n images, under a progress bar -> self."""
        with tqdm(total=n, desc="Inception", dynamic_ncols=True, mininterval=1) as bar:
            for images in batches:
                self.add(images)
                bar.update(len(images))
        return self

    def statistics(self):
        """-> the entries of a .npz: mu, sigma for FID; mu_s, sigma_s for sFID; n images."""
        (mu, sigma), (mu_s, sigma_s) = self.pool.moments(), self.spatial.moments()
        return dict(mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, n=self.pool.n)

    def inception_score(self):
        """IS = exp(E KL(p(y|x) || p(y))) = exp(H(y) - E H(y|x)), from 1 to 1,008. Salimans 2016.
        Over all images at once. Many papers average over parts of 5,000, which gives less."""
        p = self.p / self.pool.n                           # p(y), (1008,)
        return math.exp(torch.special.entr(p).sum().item() - self.entropy / self.pool.n)

# ---- The images, models and weights that the options name -------------------------------------

def optional_net(args, what, url, option, load):
    """-> the network with published weights, or None if the sub-command does not use it, or if
    there are no weights and none may be downloaded, which a line then says."""
    path = getattr(args, option.replace("-", "_"), None)   # None: no such option; "": not given
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(url).name).exists()
    if path or path == "" and (args.download or cached):
        return load(path).to(args.device)
    if path == "":
        print(f"skipped {what}: no weights; --download fetches {url}, --{option} names a copy")

class Run:
    """The autoencoder of a checkpoint of either stage, or of published weights. Takes and returns
    images as uint8 and works in batches, so that no whole set is in memory as floats."""

    def __init__(self, path, args):
        ckpt = vmae.read_stage_one(path)
        self.path, self.args, self.trained = path, args, ckpt["train_args"]
        self.model = vmae.build_vmae(ckpt).to(args.device)                 # frozen

    def held_out(self):
        """--n images of --data, or of those held out in training, always the same -> how many, and
        batches of uint8 (B, 3, S, S) and labels (B,). All runs of a command share one dataset."""
        args, size = self.args, self.model.img_size
        data, val = self.trained["data"], self.trained["val"]
        which = f"{args.data or val or data or 'the faces'} at {size} px"
        if "which" not in args:
            args.which, args.images = which, (vmae.ImageFolder(args.data, size) if args.data
                                              else vmae.open_images(data, size, val)[1])
        if args.which != which:
            raise InputError(f"{self.path}: would be measured on {which}, the runs before it on "
                             f"{args.which}; such numbers do not compare")
        numbers = args.images.some(args.n)
        return len(numbers), args.images.batches(numbers, args.batch)

    def encode(self, images):
        """uint8 (N, 3, S, S) -> the mode of the posterior (N, d, h, w), on the CPU."""
        return torch.cat([self.model.encode(vmae.to_float(x.to(self.args.device))).mode().cpu()
                          for x in images.split(self.args.batch)])

    def again(self, images):
        """Reconstruct images: uint8 (N, 3, S, S) -> the same."""
        return self.decode(self.encode(images))

    def decode(self, z):
        """z (N, d, h, w) -> uint8 (N, 3, S, S) on the CPU."""
        return torch.cat([vmae.to_uint8(self.model.decode(part.to(self.args.device))).cpu()
                          for part in z.split(self.args.batch)])

def draw_samples(path, args, cfg):
    """A stage-two checkpoint -> batches of uint8, --n images in all: those of sample.py with seed
    0, --sampler, --steps and guidance cfg. What does not fit is refused before the first batch."""
    model, schedule, ckpt = ldm.load_ldm(path)             # the EMA weights
    sampler, _ = sample.pick_sampler(args, schedule)
    model, ae = model.to(args.device), vmae.build_vmae(ckpt["vmae"]).to(args.device)
    labels, w = range(len(ckpt["classes"])), sample.guidance(cfg, ckpt["classes"])
    return (sample.draw(index, labels, model, ae, schedule, ckpt, sampler, steps=args.steps, w=w)
            for index in torch.arange(args.n).split(args.batch))

def open_source(source, args, size=None):
    """--real or --fake -> (side, number, batches of uint8 (B, 3, side, side)): a folder, "faces"
    (the built-in training faces), a .npz with arr_0, uint8 (N, H, W, 3), as ADM's, or a stage-two
    checkpoint, which is sampled. size: of a folder (default: that of its first image) or faces."""
    if source.endswith(".npz"):
        images = read_npz(source, "arr_0")["arr_0"]
        side = size or (images.shape[1] if images.ndim == 4 else "H")
        if images.dtype != np.uint8 or images.shape[1:] != (side, side, 3):
            raise InputError(f"{source}: arr_0 is {images.dtype} {images.shape}; it must be uint8 "
                             f"(N, {side}, {side}, 3); only the images of a folder are resized")
        images = torch.from_numpy(images[:args.n]).permute(0, 3, 1, 2)
        return side, len(images), images.split(args.batch)
    if os.path.isfile(source):
        size = ldm.load_ldm(source)[2]["vmae"]["model_args"]["img_size"]
        return size, args.n, draw_samples(source, args, args.cfg)
    data = vmae.Faces(size or 32) if source == "faces" else vmae.ImageFolder(source, size)
    data.size = data.size or data.files[data.paths[0]][2]
    numbers = data.some(args.n)             # always the same
    return data.size, len(numbers), (x for x, _ in data.batches(numbers, args.batch))

def read_npz(path, *needed):
    """The entries `needed` of a .npz as a dict (default: all but arr_0, which holds ADM's images).
    InputError if it cannot be read or lacks one."""
    try:
        with np.load(path) as file:
            return {name: file[name] for name in needed or set(file.files) - {"arr_0"}}
    except Exception as error:              # zipfile, pickle and numpy have errors of their own
        raise InputError(f"{path}: not a .npz that can be used here ({error})") from None

# ---- Tables and pictures ----------------------------------------------------------------------

COLOURS = "#4477aa #ee6677 #228833 #ccbb44 #66ccee #aa3377 #999999 #222222 #ee7733 #009988".split()

def report(args, title, rows, n=None, **more):
    """Print rows, a list of dicts, as a Markdown table; write them and `more` as JSON. n: images on
    the smaller side of a FID. If it is small there is a warning, as FID falls when n grows."""
    def cell(value):
        if isinstance(value, float):
            return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.1f}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    net = args.nets[1] if n else None
    if net:
        title += f"; FID: resize {net.resize}, Inception weights {net.hash}"
        title += ", bfloat16, so two or three digits count" if net.fast else ""
    if net and n < 10000:
        warnings.warn(f"FID of {n} images, under {2048 if n < 2048 else 10000:,}: compare it at "
                      f"equal numbers only, or use KID, which is unbiased")
    columns = list(dict.fromkeys(key for row in rows for key in row))      # each once, in order
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for row in rows:
        print(f"| {' | '.join(cell(row.get(key, '')) for key in columns)} |")
    rows = [{key: None if isinstance(value, float) and not math.isfinite(value) else value
             for key, value in row.items()} for row in rows]               # JSON has no NaN
    os.makedirs(args.out, exist_ok=True)    # only now: a run that failed leaves no folder
    with vmae.whole_file(Path(args.out, f"{args.function.__name__}.json")) as file:
        file.write(json.dumps(dict(title=title, rows=rows, **more), indent=1).encode())

def picture(rows, names, path):
    """Save rows of uint8 images of one size as one PNG, and print the names of the rows."""
    vmae.save_grid([vmae.to_float(row) for row in rows], path)
    print(f"\n{path}, the rows: {', '.join(names)}")

def chart(path, height, grid, texts, curves, lines=True):
    """Save a PNG, drawn at twice its size, which smooths the lines. grid: lists of places; texts:
    (place, text, anchor) each; curves: name -> places, joined by lines, or as a cloud of dots. The
    names of the curves stand below, from `height` on."""
    image = Image.new("RGB", (1280, height + 36 * len(curves)), "white")
    pen = ImageDraw.Draw(image)
    pen.font = ImageFont.load_default(24)
    for places in grid:
        pen.line(places, "#cccccc", 2)
    names = [((64, height + 36 * i), name, "lm") for i, name in enumerate(curves)]
    for place, text, anchor in texts + names:
        short = text if len(text) <= 80 else f"...{text[-77:]}"    # a path's end tells more
        pen.text(place, short, "#333333", anchor=anchor)
    for i, (colour, places) in enumerate(zip(itertools.cycle(COLOURS), curves.values())):
        pen.circle((40, height + 36 * i), 10, colour)
        if lines:
            pen.line(places, colour, 5, "curve")
        for place in places:
            pen.circle(place, 8 if lines else 3, colour)
    with vmae.whole_file(path) as file:
        image.resize((image.width // 2, image.height // 2), Image.LANCZOS).save(file, "png")

def plot(path, series, x_label, y_label, lines=True):
    """Save a PNG of series, name -> [(x, y), ...], joined by lines, or as dots without outliers."""
    points = np.array([p for curve in series.values() for p in curve])     # (M, 2)
    low, high = np.percentile(points, (0, 100) if lines else (0.5, 99.5), axis=0)      # (2,) each
    low, span = np.where(high > low, low, low - 0.5), np.where(high > low, high - low, 1)  # (2,)
    digits = [max(0, 1 - math.floor(math.log10(v / 4))) for v in span]     # enough to tell ticks
    grid, curves = [], {}
    texts = [((680, 625), x_label, "mm"), ((130, 26), y_label, "lm")]
    for i in range(5):                      # lines of the grid, with their numbers
        x, y, value = 130 + 275 * i, 560 - 125 * i, low + span * i / 4
        grid += [[(x, 60), (x, 560)], [(130, y), (1230, y)]]
        texts += [((x, 585), f"{value[0]:.{digits[0]}f}", "mm"),
                  ((115, y), f"{value[1]:.{digits[1]}f}", "rm")]
    for name, curve in series.items():
        share = (np.reshape(curve, (-1, 2)) - low) / span  # of the axes
        curves[name] = [(130 + 1100 * u, 560 - 500 * v) for u, v in share
                        if max(abs(u - 0.5), abs(v - 0.5)) < 0.501]
    chart(path, 680, grid, texts, curves, lines)

def radar(path, axes, shapes):
    """Save a PNG of shapes, name -> a value for each of the axes, from 0 (inner ring) to 1."""
    turn = math.pi * np.linspace(-0.5, 1.5, len(axes) + 1)                 # the last is the first

    def ring(values):                                      # -> the corners, and the first again
        r = 80 + 240 * np.append(values, values[0])
        return list(zip(640 + r * np.cos(turn), 420 + r * np.sin(turn)))

    grid = [ring([value] * len(axes)) for value in (0, 0.5, 1)]
    grid += [[(640, 420), corner] for corner in grid[-1]]
    texts = [((30, 36), "outside: the best run, inner ring: the worst", "lm")]
    for name, angle, place in zip(axes, turn, ring([1.12] * len(axes))):
        side = {-1: "r", 0: "m", 1: "l"}[round(math.cos(angle))]           # away from the middle
        texts.append((place, name, side + "m"))
    chart(path, 880, grid, texts, {name: ring(values) for name, values in shapes.items()})

# ---- Sub-commands -----------------------------------------------------------------------------

def scores(pairs, args, real=None, nets=None):
    """Batches of uint8 (original, reconstruction) -> (the metrics of Table 1, the originals'
    Features, as `real` of a later call). L1 = mean |x - x_hat| with pixels in [0, 1], PSNR, SSIM,
    LPIPS (Zhang 2018, VGG): means over the images. rFID: FID of the two. nets: see main."""
    (lpips_net, inception), values = nets or args.nets, []
    fakes, reals = Features(inception), real or Features(inception)
    where = "cpu" if torch.device(args.device).type == "mps" else args.device  # it has no float64
    for a, b in ((a.to(where), b.to(where)) for a, b in pairs):
        row = [(a.double() - b.double()).abs().mean((1, 2, 3)) / 255, psnr(a, b), ssim(a, b)]
        if lpips_net:
            row.append(lpips_net(*(vmae.to_float(x.to(args.device)) for x in (a, b))).flatten())
        values.append(torch.stack([v.cpu().double() for v in row]))        # (3 or 4, B)
        if inception:
            fakes.add(b)
        if inception and not real:
            reals.add(a)
    row = dict(zip(("L1", "PSNR", "SSIM", "LPIPS"), torch.cat(values, 1).mean(1).tolist()))
    if inception:
        row["rFID"] = frechet_distance(*reals.pool.moments(), *fakes.pool.moments())
    return row, (reals if inception else None)

def reconstruct(args):
    """Table 1: reconstruction of held-out images, with z the posterior's mode, see `scores`."""
    rows, shown = [], []
    for run in (Run(path, args) for path in args.ckpt):    # one in memory at a time
        n, batches = run.held_out()
        first = next(batches)               # the same images for all runs
        row, _ = scores(((x, run.again(x)) for x, _ in itertools.chain([first], batches)), args)
        shown.append(run.again(first[0][:16]))
        rows.append({"checkpoint": run.path, "N": n, **row})
    report(args, "Reconstruction of held-out images (Table 1)", rows, n)
    picture([first[0][:16], *shown], ["originals", *args.ckpt], f"{args.out}/reconstruct.png")

def perturb(z, eps):
    """z (N, d, h, w) + eps s_c N(0, 1), where s_c is the standard deviation of channel c over all
    images. The noise is the same for every eps, and for every model whose latent has this shape."""
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))  # on the CPU
    return z + eps * z.std((0, 2, 3), keepdim=True) * noise

def smoothness(args):
    """Figs. 3, 6: smoothness of the latent space. Is a small step in it (`perturb`) a small step in
    the image? The decoded z' is scored against the original, as in Table 1; `lost` is the PSNR that
    it loses against the first --eps. The plot shows rFID, as the paper's, or PSNR."""
    rows, shown, curves = [], [], {}
    for run in (Run(path, args) for path in args.ckpt):    # one in memory at a time
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
    picture(shown, args.ckpt, f"{args.out}/smoothness_strip.png")  # the original, then one per eps
    plot(f"{args.out}/smoothness.png", curves, "eps, in standard deviations of a channel", axis)

def separation(z, group, image):
    """Latent tokens z (M, d), the group of each (M,), the number of its image (M,) -> a dict.
    The paper plots sigma^2 and rho without formulas; these definitions are ours. Every channel is
    first scaled to mean 0 and variance 1; mu_g is the mean of group g.
        sigma^2 = sum_i |z_i - mu_g(i)|^2 / sum_i |z_i|^2    the spread within groups, as a share
        rho = mean over pairs g < g' of |mu_g - mu_g'| / sqrt(mean_i |z_i - mu_g(i)|^2)
    probe: the accuracy, as a mean over groups, of a linear classifier (ridge regression on one-hot
    labels, groups weighted equally), fit on images of even number, tried on the others."""
    z = (z.double() - z.double().mean(0)) / z.double().std(0, unbiased=False).clamp(min=1e-12)
    _, group, count = group.unique(return_inverse=True, return_counts=True)
    member = F.one_hot(group).double()                                     # (M, G)
    mu = member.T @ z / count[:, None]                                     # (G, d)
    within = (z - mu[group]).square().sum(1).mean()        # a scalar
    A, fit = F.pad(z, (0, 1), value=1.0), image % 2 == 0                   # a column of ones
    weighted = A[fit] / member[fit].sum(0)[group[fit], None]
    W = torch.linalg.solve(weighted.T @ A[fit] + 1e-3 * torch.eye(A.shape[1]).double(),
                           weighted.T @ member[fit])                       # (d + 1, G)
    hit = ((A[~fit] @ W).argmax(1) == group[~fit]).double()
    tried = member[~fit].sum(0)                            # (G,), 0 for a group not among them
    return {"groups": len(count), "tokens": len(z),
            "sigma^2": (within / z.square().sum(1).mean()).item(),
            "rho": (torch.pdist(mu).mean() / within.sqrt()).item(),
            "probe": (member[~fit].T @ hit / tried)[tried > 0].mean().item(),
            "chance": 1 / len(count)}

def face_levels(run):
    """Tokens of held-out built-in faces, grouped by the paper's levels -> name: (z, group, image).
    A token belongs to the part that covers more than half of its patch; if there is none it is left
    out. object: the tokens of the head, by kind. part: all, by part. pattern: those of the skin."""
    faces, tokens = vmae.Faces(run.model.img_size, "val"), []
    for numbers in torch.arange(min(run.args.n, len(faces))).split(run.args.batch):
        x, kind, pattern, part = faces.render(numbers)
        z = run.encode(vmae.to_uint8(x)).permute(0, 2, 3, 1)               # (B, h, w, d)
        cover = F.one_hot(part, len(vmae.PARTS)).permute(0, 3, 1, 2).float()  # (B, 5, S, S)
        share, part = F.avg_pool2d(cover, run.model.patch_size).max(1)     # (B, h, w) each
        whole = [v.view(-1, 1, 1).expand_as(part) for v in (kind, pattern, numbers)]
        tokens.append([v[share > 0.5] for v in (z, part, *whole)])
    z, part, kind, pattern, image = map(torch.cat, zip(*tokens))           # (M, d), (M,)...
    head, skin = part > 0, part == 2        # all but the background; the skin
    return {"object": (z[head], kind[head], image[head]), "part": (z, part, image),
            "pattern": (z[skin], pattern[skin], image[skin])}

def separability(args):
    """Figs. 4, 5, 7: order of the latent by object, part and pattern. `separation` defines the
    numbers and `face_levels` the groups. A folder with classes, --data or that of training, adds
    its classes as objects. The picture shows two principal components of the tokens."""
    rows, clouds = [], []
    for run in (Run(path, args) for path in args.ckpt):    # one in memory at a time
        levels = {f"faces, {level}": tokens for level, tokens in face_levels(run).items()}
        if args.data or run.trained["data"]:
            x, y = map(torch.cat, zip(*run.held_out()[1]))                 # (N, 3, S, S), (N,)
            if len(y.unique()) > 1:
                z = run.encode(x).permute(0, 2, 3, 1).flatten(0, 2)        # (M, d)
                image = torch.arange(len(y)).repeat_interleave(len(z) // len(y))   # (M,)
                levels["classes, object"] = z, y[image], image
            else:
                print(f"skipped the classes of {args.data or run.trained['data']}: fewer than two")
        rows += [{"checkpoint": run.path, "level": k, **separation(*v)} for k, v in levels.items()]
        z, part, _ = levels["faces, part"]
        z = (z - z.mean(0)) / z.std(0).clamp(min=1e-12)    # scaled as in `separation`
        xy = z @ torch.linalg.eigh(z.T @ z).eigenvectors[:, -2:].flip(1)   # (M, 2)
        clouds.append({name: xy[part == k][:1500].tolist() for k, name in enumerate(vmae.PARTS)})
    report(args, "Order in latent space, by our definition (Figs. 4, 7)", rows)
    for i, (cloud, path) in enumerate(zip(clouds, args.ckpt)):
        plot(f"{args.out}/separability{i if i > 0 else ''}.png", cloud,
             "first principal component of the tokens", f"second component; {path}", lines=False)

def multiply_adds(function, *args):
    """Run function(*args), with tensors on "meta" -> (what it returns, its multiply-adds in linear
    maps and convolutions, those in attention's two products)."""
    with FlopCounterMode(display=False) as counter:        # counts two operations per multiply-add
        result = function(*args)
    counts = counter.get_flop_counts()["Global"]
    attention = counts.pop(torch.ops.aten.bmm, 0)
    return result, sum(counts.values()) / 2, attention / 2

def efficiency(args):
    """Table 3: sizes, operations and times of VMAE `base` and SD-VAE. The paper reports 13.4 % of
    the size, 4.1 % of the GFLOPs and 2.7x faster training. We count from the modules.
    MB: float32 MiB of the state dict. GFLOPs: as in the paper, multiply-adds of the encoder without
    attention's products, batch 128. "+ norms": with four per element of a LayerNorm, which gives
    the paper's 703.9. all GFLOPs: encoder and decoder with attention, one image, two operations per
    multiply-add. --time: seconds of encode, decode and a training step (forward, backward)."""
    if args.size % 8:
        raise InputError(f"--size {args.size}: must be a multiple of 8, as both models are f8")
    rows, x = [], torch.empty(1, 3, args.size, args.size, device="meta")
    for name, row in (("SD-VAE", vmae.conv_sizes["base"]), ("VMAE", vmae.sizes["base"])):
        with torch.device("meta"), torch.no_grad():        # tensors have a shape but no content
            model = vmae.build(dict(row, img_size=args.size))
            q, encoder, attention = multiply_adds(model.encode, x)
            _, decoder, more = multiply_adds(model.decode, q.mode())
        widths = [module.normalized_shape[0] for name, module in model.named_modules()
                  if isinstance(module, nn.LayerNorm) and not name.startswith("decoder")]
        in_norms = sum(widths) * model.grid**2             # the encoder's; each sees all tokens
        numbers = sum(v.numel() for v in model.state_dict().values())
        rows.append({"model": name, "numbers": numbers, "MB": numbers * 4 / 2**20,
                     "GFLOPs": encoder * 128 / 1e9, "+ norms": (encoder + 4 * in_norms) * 128 / 1e9,
                     "encoder GMACs": encoder / 1e9, "decoder GMACs": decoder / 1e9,
                     "all GFLOPs": 2 * (encoder + decoder + attention + more) / 1e9})
        if args.time:
            rows[-1] |= seconds(vmae.build(dict(row, img_size=args.size)).to(args.device), args)
    ratio = {key: f"{rows[1][key] / rows[0][key]:.1%}" for key in list(rows[0])[1:]}
    report(args, f"Efficiency at {args.size} px (Table 3)", [*rows, {"model": "ratio", **ratio}])
    if not args.time:
        print("skipped times: `evaluate.py efficiency --time`")

def seconds(model, args):
    """Seconds of encode, decode and a training step of --batch images, each the best of 4."""
    x = torch.rand(args.batch, 3, args.size, args.size, device=args.device)

    def train():
        model.zero_grad()
        (model.decode(model.encode(x).sample()) - x).square().mean().backward()

    def now():
        getattr(torch, args.device.type).synchronize()     # a GPU returns before it is done
        return timeit.default_timer()

    encode, decode = torch.no_grad()(model.encode), torch.no_grad()(model.decode)
    z = encode(x).mode()
    works = {"encode s": lambda: encode(x), "decode s": lambda: decode(z), "train s": train}
    return {k: min(timeit.repeat(work, timer=now, repeat=4, number=1)) for k, work in works.items()}

def generation(fake, real, args, pairs=0):
    """--fake and --real, as open_source takes them -> (a row of `fid`'s metrics, the statistics of
    the real side). real may also be a .npz of mu and sigma, as pytorch-fid's. The real images are
    cropped and resized to the size of the fakes by the same code."""
    ours = os.path.isfile(fake) and not fake.endswith(".npz")              # sampled here
    if not real and not ours:
        raise InputError('--real: name a folder, a .npz or "faces" to compare with')
    real = real or ldm.load_ldm(fake)[2]["train_args"]["data"] or "faces"
    size, *fakes = open_source(fake, args)
    known = read_npz(real) if real.endswith(".npz") else {}
    reals = [] if "mu" in known else open_source(real, args, size)[1:]     # before the work begins
    how = {"resize": args.nets[1].resize, "weights": args.nets[1].hash, "size": size}
    for key in how.keys() & known.keys():
        if known[key] != how[key]:
            raise InputError(f"{real}: was made with {key} {known[key]}, here it is {how[key]}")
    mine = Features(args.nets[1], pairs).see(*fakes)
    theirs = Features(args.nets[1], pairs).see(*reals) if reals else None
    stats, known = mine.statistics(), ({**theirs.statistics(), **how} if theirs else known)
    row = {"fake": fake, "real": real, "N fake": stats["n"],
           "N real": int(known.get("n", 0)) or "unknown"}
    for key, mu, sigma in (("gFID" if ours else "FID", "mu", "sigma"), ("sFID", "mu_s", "sigma_s")):
        try:
            if mu in known:
                row[key] = frechet_distance(known[mu], known[sigma], stats[mu], stats[sigma])
        except (ValueError, KeyError) as error:            # of another program's .npz
            raise InputError(f"{real}: {mu} and {sigma} cannot be used, {error}") from None
    row["IS"] = mine.inception_score()      # of the fakes alone
    if theirs and min(pairs, mine.pool.n, theirs.pool.n) > 3:         # precision's k
        a, b = torch.cat(theirs.kept), torch.cat(mine.kept)
        row["KID x 1e3"] = 1e3 * kid(a, b)
        row["precision"], row["recall"] = precision_recall(a, b)
    return row, known

def fid(args):
    """Table 2: generated images against real ones. FID, called gFID if we draw the samples; sFID,
    the same of the spatial features; IS; and KID, precision, recall of the first --pairs images."""
    if args.save_stats:                     # now, so that a bad path stops us before the work
        os.makedirs(os.path.dirname(args.save_stats) or ".", exist_ok=True)
    row, known = generation(args.fake, args.real, args, args.pairs)
    if args.save_stats:
        with vmae.whole_file(f"{args.save_stats.removesuffix('.npz')}.npz") as file:
            np.savez(file, **known)
    report(args, "Generated images (Table 2)", [row], min(row["N fake"], known.get("n", 10**9)))

def compare(args):
    """Fig. 2: several runs on one radar. As in the paper, each axis runs from the worst run (inner
    ring) to the best (outer ring). Runs: by default those of stage one in runs/.

    smoothness   PSNR between decode(z) and decode(z'), z' = `perturb`(z, .1)
    compression  sigma^2 of the built-in faces' tokens by part (`separation`); low is good
    pixels       PSNR of held-out images; perception: their LPIPS, or SSIM without VGG's weights
    generation   of --n samples, if all runs are of stage two: on the built-in faces the distance of
                 `faces`, otherwise gFID, if Inception's weights can be had"""
    args.runs = args.runs or [str(path.parent) for path in sorted(Path("runs").glob("*/last.pt"))
                              if "vmae" not in vmae.read_checkpoint(path)]
    if len(set(args.runs)) < 2:
        raise FileNotFoundError("Fig. 2 needs two runs; train a second preset, or name them")
    rows, (vgg, inception) = [], args.nets
    runs = {run: vmae.checkpoint(run) for run in args.runs}
    found = map(vmae.read_checkpoint, runs.values())       # one in memory at a time
    # The folders that the runs of stage two were trained on, None for the faces.
    data = [ckpt.get("train_args", {}).get("data") for ckpt in found if "vmae" in ckpt]
    second = len(data) == len(runs)         # all of them
    judged = jury(args.device) if second and not any(data) else None
    perception = "LPIPS" if vgg else "SSIM"
    for name, path in runs.items():
        run = Run(path, args)
        x = torch.cat([x for x, _ in run.held_out()[1]])                   # (N, 3, S, S)
        z = run.encode(x)                                  # (N, d, h, w)
        x_hat, moved = run.decode(z), run.decode(perturb(z, 0.1))
        row, _ = scores(zip(x.split(args.batch), x_hat.split(args.batch)), args, nets=(vgg, None))
        rows.append({"run": name, "smoothness, dB": psnr(x_hat, moved).mean().item(),
                     "compression, sigma^2": separation(*face_levels(run)["part"])["sigma^2"],
                     "pixels, dB": row["PSNR"], f"perception, {perception}": row[perception]})
        if judged:
            samples = draw_samples(path, args, args.cfg)
            rows[-1]["generation, distance"] = judged(samples, None)["distance"]
        elif second and inception:
            rows[-1]["generation, gFID"] = generation(path, None, args)[0]["gFID"]
    axes = list(rows[0])[1:]
    low = ("sigma^2", "LPIPS", "gFID", "distance")         # the others: high is good
    sign = [-1 if axis.endswith(low) else 1 for axis in axes]
    table = np.array([[row[axis] for axis in axes] for row in rows]) * sign
    table -= table.min(0)                                  # (runs, axes), 0 if all runs are equal
    shapes = dict(zip(runs, (table / np.maximum(table.max(0), 1e-300)).tolist()))
    n = args.n if "generation, gFID" in axes else None
    report(args, "Comparison (Fig. 2)", rows, n, rescaled=shapes)
    radar(f"{args.out}/compare.png", axes, shapes)
    if not axes[-1].startswith("generation"):
        print("skipped generation: takes runs of stage two, and on photographs Inception's weights")

def faces(args):
    """Generated built-in faces, as the Judge sees them. Rows: held-out faces, the best there can
    be; their reconstructions by stage one, the best that stage two can reach; samples with each of
    the guidance weights --cfg, by --sampler in --steps.

    requested: the share recognised as the kind asked for. complete: the share that shows all five
    parts, each on 3 of 1,024 pixels or more. distance: the Frechet distance to 4,096 training
    faces. precision, recall: against as many of these as there are images. Each machine trains its
    own judge, and rounding sets these apart: the same samples were at 34.5 and at 37.1. Compare
    distances by one runs/judge_*.pt only."""
    judged, rows = jury(args.device), []
    for path in args.ckpt:
        run, ckpt = Run(path, args), vmae.read_checkpoint(path)
        if data := ckpt.get("train_args", {}).get("data"):     # None for the built-in faces
            raise InputError(f"{path}: was trained on {data}, not on the faces")
        x, y = zip(*vmae.Faces(run.model.img_size, "val").batches(torch.arange(args.n), args.batch))
        sets = {"held out": (x, torch.cat(y)), "reconstructed": (map(run.again, x), torch.cat(y))}
        weights = args.cfg if ckpt.get("classes") else [1.0]   # no classes, so no guidance
        kind = torch.arange(args.n) % 4 if ckpt.get("classes") else None
        for w in weights if "classes" in ckpt else []:     # a stage one draws no samples
            sets[f"samples, w = {w}"] = draw_samples(path, args, w), kind
        for name, (batches, wanted) in sets.items():
            batches = tqdm(batches, name, dynamic_ncols=True)
            rows.append({"checkpoint": path, "images": name, **judged(batches, wanted)})
    report(args, "Built-in faces, by the judge; no FID", rows)

def neighbours(args):
    """Did the generator memorise? Picture: samples, each above its 5 nearest training images, in
    pixels and, if its weights are here, in Inception's features. Table: the median distance to the
    nearest training image, of the samples and of as many held-out images; samples that are much
    nearer than these are copies. Distances of pixels are RMS differences, 0 to 255."""
    trained = ldm.load_ldm(args.ckpt)[2]["train_args"]
    x = torch.cat(list(draw_samples(args.ckpt, args, args.cfg)))           # (n, 3, S, S)
    (_, net), size, rows, shown = args.nets, x.shape[-1], [], [x[:16]]
    train, fresh = vmae.open_images(trained["data"], size, trained["val"])
    both = torch.cat([x, *(y for y, _ in fresh.batches(fresh.some(args.n), args.batch))])
    spaces = {"pixels": lambda x: x.flatten(1).float() / math.sqrt(3 * size**2)}
    if net:
        spaces["Inception"] = lambda x: torch.cat([net(part).cpu() for part in x.split(args.batch)])
    for name, space in spaces.items():
        batches = tqdm(train.batches(torch.arange(len(train)), args.batch), name)
        d, index = nearest(space(both), (space(y) for y, _ in batches), 5)     # (2n, 5) each
        near, usual = d[:len(x), 0].median().item(), d[len(x):, 0].median().item()
        rows.append({"space": name, "samples": near, "held-out": usual,
                     "ratio": near / usual if usual else math.nan})
        shown += [train.batch(row.tolist())[0] for row in index[:len(x)][:16].T]
    report(args, f"Distance to the nearest of {len(train)} training images, median", rows)
    names = [f"nearest {k} by {space}" for space in spaces for k in range(1, index.shape[1] + 1)]
    picture(shown, ["samples", *names], f"{args.out}/neighbours.png")

# ---- The command line -------------------------------------------------------------------------

HELP = {
    "ckpt": "checkpoints of either stage (neighbours: of stage two), or published weights",
    "runs": "run folders, or checkpoints", "steps": "network calls per image",
    "sampler": "ddim, ddpm or euler (default: as sample.py)", "time": "also measure seconds",
    "fake": "a stage-two checkpoint, which is sampled; a folder; a .npz with arr_0",
    "real": "folder, .npz (mu and sigma, or arr_0), or the word faces (default: as in training)",
    "data": "folder of images, none of them trained on (default: those held out in training)",
    "size": "side of the images in pixels", "batch": "images at a time", "n": "images at most",
    "pairs": "images per side whose features are kept, 8 KB each, for KID, precision, recall",
    "eps": "noise, in standard deviations of a latent channel", "device": "cuda, cpu, mps...",
    "resize": "to Inception's 299 pixels: pytorch-fid, or clean, antialiased as in clean-fid",
    "fast": "Inception in bfloat16: faster, but only two or three digits are right",
    "download": "fetch weights that are missing", "cfg": "guidance weight of samples, 1: none",
    "inception-weights": "a copy of FID's InceptionV3 (default: torch hub's cache)",
    "vgg-weights": "a copy of VGG-16, for LPIPS (default: torch hub's cache)",
    "save-stats": "write the real side's statistics to this .npz",
    "out": "folder of table and picture (default: that of the checkpoint, otherwise runs)"}
INCEPTION = {"resize": "pytorch-fid", "fast": False, "inception-weights": "", "download": False}
NETS, FIRST, SECOND = {**INCEPTION, "vgg-weights": ""}, ["runs/vmae/last.pt"], ["runs/ldm/last.pt"]
COMMANDS = {  # sub-command: its options, each with its default, which also gives its type
    reconstruct: {"ckpt": FIRST, "data": "", "n": 1000, **NETS},
    smoothness: {"ckpt": FIRST, "data": "", "n": 256, "eps": [0.0, .01, .05, .1, .2, .3], **NETS},
    separability: {"ckpt": FIRST, "data": "", "n": 512},
    efficiency: {"size": 256, "time": False, "batch": 1},
    faces: {"ckpt": SECOND, "n": 512, "cfg": [1.0, 1.5], "steps": 50, "sampler": ""},
    neighbours: {"ckpt": SECOND[0], "n": 16, "cfg": 1.0, **INCEPTION},
    compare: {"runs": [], "data": "", "n": 256, "cfg": 1.0, **NETS},
    fid: {**INCEPTION, "fake": SECOND[0], "real": "", "n": 10000, "pairs": 10000, "cfg": 1.0,
          "save-stats": "", "download": True}}

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s [command]")
    commands = parser.add_subparsers(metavar="command", prog=parser.prog)
    for function, own in COMMANDS.items():
        about = re.split(r"\.\s+(?=[A-Z`])|(?<=\?)\s", function.__doc__)[0]    # its first sentence
        command = commands.add_parser(function.__name__, help=about)
        command.set_defaults(function=function, sampler=None, steps=50)    # as sample.py's
        for name, default in {"batch": 64, "device": "auto", "out": "", **own}.items():
            choices = ("pytorch-fid", "clean") if name == "resize" else None
            flag, nargs = (name, "*") if name == "runs" else (f"--{name}", "+")
            of = type((default or [""])[0]) if isinstance(default, list) else type(default)
            kind = dict(type=vmae.checkpoint if name in ("ckpt", "fake") else of, choices=choices)
            if isinstance(default, list):
                kind["nargs"] = nargs
            elif isinstance(default, bool):
                kind = dict(action="store_true")
            note = " (default: %(default)s)" if default and default is not True else ""
            command.add_argument(flag, default=default, help=HELP[name] + note, **kind)
    everything = not sys.argv[1:]           # then run all commands but fid and faces, the slow ones
    names = [function.__name__ for function in COMMANDS if function not in (fid, faces)]
    for line in [[name] for name in names] if everything else [sys.argv[1:]]:
        args = vmae.check(parser.parse_args(line))
        args.device = vmae.start(args.device)
        paths = [getattr(args, name, []) for name in ("fake", "ckpt", "runs")]
        paths = sum(([p] if isinstance(p, str) else p for p in paths), [])     # what is measured
        for path in paths if not everything else ():       # not after hours of work on the others
            if not os.path.exists(path) and path != "faces":
                raise InputError(f"{path}: no such file or folder")
        beside = paths and line[0] != "compare" and os.path.isfile(paths[0])
        args.out = args.out or (os.path.dirname(paths[0]) if beside else "runs") or "."
        table = Path(args.out, "table.json").absolute()
        there = next(folder for folder in table.parents if folder.exists())
        if not (there.is_dir() and os.access(there, os.W_OK)):
            raise InputError(f"--out {args.out}: nothing can be written into {there}")
        args.nets = (None, None) if everything else (
            optional_net(args, "VGG-16", vmae.VGG_URL, "vgg-weights", vmae.load_lpips),
            optional_net(args, "InceptionV3", INCEPTION_URL, "inception-weights",
                         lambda path: load_inception(path, args.resize, args.fast)))
        try:
            args.function(args)
        except (FileNotFoundError, InputError) as error:   # no generator, or no runs to compare
            if not everything or isinstance(error, InputError) and args.function is not compare:
                raise
            print(f"skipped {line[0]}: {error}")
    if everything:
        print("skipped LPIPS and rFID: `evaluate.py reconstruct --download` (weights: 528, 91 MB)\n"
              "skipped fid: `evaluate.py fid` draws samples and fetches Inception's 91 MB\n"
              "skipped faces: `evaluate.py faces` draws 1,024 samples, which takes minutes")

if __name__ == "__main__":
    vmae.cli(main)

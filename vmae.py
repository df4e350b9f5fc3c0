"""Stage one of LDMAE (Latent Diffusion Models with Masked AutoEncoders, ICCV 2025).

Everything between a folder of images and a latent grid, in reading order: images, patches and
masks, the Gaussian posterior, the four losses of Section 4, the transformer, save and load; last
and to be skipped, the convolutional body of the autoencoders that the paper compares it with.

    x --patchify, mask--> x_v --encoder--> q(z|x_v) --sample--> z --decoder--> x_hat

    python train_vmae.py --data path --mask 0.6          trains what this file defines
    vmae = load_vmae("runs/vmae/last.pt")                then in a notebook:
    z = vmae.encode(x).mode(); x_hat = vmae.decode(z)    (B, 3, H, W) -> (B, d, h, w) -> back
"""
import argparse
import hashlib
import itertools
import math
import os
import sys
import warnings
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps

# ---------------------------------------------------------------------------------------------
# Glossary: the letters in every shape comment of this repository
#
#   B  images in a batch           P  side of a patch, pixels      D  width of the transformer
#   C  colour channels, always 3   N  patches (tokens) an image    d  latent channels a token
#   H W  pixels                    V  visible tokens, N(1 - mask)  h w  latent grid, H/P x W/P
#
#   x image in [-1, 1]   x_v, x_m its visible and masked patches   x_hat reconstruction
#   z latent   mu, logvar the posterior's mean and log variance    q(z|x_v) = N(mu, exp(logvar))
# ---------------------------------------------------------------------------------------------


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one sentence that says what to do."""


def cli(main):
    """Run a script's main; what the user got wrong ends as one line and exit status 1."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        main()
    except (InputError, OSError) as error:  # a DataLoader worker prefixes its whole traceback
        sys.exit(f"error: {str(error).strip().splitlines()[-1].removeprefix('vmae.InputError: ')}")
    except KeyboardInterrupt:
        sys.exit("stopped; a training run goes on from its last checkpoint with --resume")


def pick_device(name):
    """--device as typed -> torch.device; nothing here touches CUDA when the CPU is asked for."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {name}: torch finds no such device here") from None


# ---- Images: a folder -------------------------------------------------------------------------

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
MIN_SIDE = 8           # pixels; anything smaller is a tracking pixel or a placeholder, not a photo
MAX_UNREADABLE = 0.01  # a few broken files are normal in a scraped folder, one in a hundred is not
KEEP_BYTES = 2**30     # decoded images are kept in memory up to this size
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError,
              Image.DecompressionBombWarning)  # Pillow raises all of these for broken files


def open_image(path):
    """File -> PIL image, its header read and its pixels not yet; OSError below MIN_SIDE pixels."""
    with warnings.catch_warnings():         # a bomb is 90 million pixels or more: a warning, to PIL
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(path)
    if min(image.size) < MIN_SIDE:
        raise OSError(f"{image.width}x{image.height} pixels, too small")
    return image


def read_image(path, size):
    """File -> uint8 (3, size, size): any mode to RGB, short side resized, centre cropped.

    Transparency is laid over white, as such pictures are shown; EXIF rotation is applied, as phones
    store portraits lying down. Raises one of UNREADABLE."""
    with open_image(path) as file:
        image = ImageOps.exif_transpose(file)              # turned upright
    if image.mode.startswith("I"):          # 16 bits: Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def list_images(root):
    """Folder -> sorted paths below it, relative to it; hidden files and Apple's `._*` left out."""
    found, seen = [], set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)     # a link to a parent would otherwise never end
        subfolders[:] = [] if real in seen else [s for s in subfolders if not s.startswith(".")]
        seen.add(real)
        found += [Path(folder, f).relative_to(root).as_posix() for f in files
                  if f.lower().endswith(EXTENSIONS) and not f.startswith(".")]
    return sorted(found)


class ImageFolder(torch.utils.data.Dataset):
    """Images below `root`, recursively, as (x, y): x (3, size, size) in [-1, 1], y class index.

    Sub-folders of root are classes (`classes`, sorted by name; empty when there are fewer than
    two, or when images lie beside the sub-folders; then y = 0).
    split  "train" or "val" share the folder by file name: about one in twenty is held out, the
           same ones on every machine and however many files are added. "all": no hold-out.
    keep   keep decoded images in memory: right without workers, each of which would have a copy.
    Raises InputError for a missing or empty folder, or when over 1 % of the files are unreadable.
    """

    def __init__(self, root, size, split="all", keep=False):
        if not os.path.isdir(root):
            raise InputError(f"{root}: no such folder; --data and --val want folders of images")
        paths = list_images(root)
        if not paths:
            raise InputError(f"{root}: no images in it (looked for {' '.join(EXTENSIONS)})")
        self.root, self.size, self.split, self.bad = str(root), size, split, set()
        self.limit = MAX_UNREADABLE * len(paths)
        readable = [p for p in paths if self._header_ok(p)]  # all files: a split shares its limit

        tops = {p.split("/")[0] if "/" in p else "" for p in readable}     # "": beside the folders
        self.classes = sorted(tops) if len(tops) > 1 and "" not in tops else []
        rank = {p: zlib.crc32(p.encode()) for p in readable}  # by name: the same everywhere
        held_out = {p for p in readable if rank[p] % 20 == 0} or {min(readable, key=rank.get)}
        self.paths = [p for p in readable if split == "all" or (p in held_out) == (split == "val")]
        if not self.paths:
            raise InputError(f"{root}: one image is not enough, as one is always held out")
        number = {name: y for y, name in enumerate(self.classes)}
        self.labels = [number.get(p.split("/")[0], 0) for p in self.paths]
        self.kept = {} if keep and len(self.paths) * 3 * size * size < KEEP_BYTES else None

    def _header_ok(self, path):
        try:
            open_image(os.path.join(self.root, path)).close()
            return True
        except UNREADABLE as error:
            return self._unreadable(path, error)

    def _unreadable(self, path, error):
        self.bad.add(path)
        why = (str(error) or repr(error)).splitlines()[0]
        what = f"{os.path.join(self.root, path)}: unreadable ({why})"
        if len(self.bad) > self.limit:
            raise InputError(f"{what}, and with it over 1 % of the folder; remove or repair the "
                             f"broken files")
        warnings.warn(f"skipped {what}, {len(self.bad)} so far")
        return False

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        pixels = self.kept.get(i) if self.kept is not None else None
        while pixels is None:               # a file may be cut off behind a sound header
            try:
                pixels = read_image(os.path.join(self.root, self.paths[i]), self.size)
            except UNREADABLE as error:
                self._unreadable(self.paths[i], error)
                i = (i + 1) % len(self)     # its neighbour stands in, with the neighbour's label
        if self.kept is not None:
            self.kept[i] = pixels
        return pixels / 127.5 - 1, self.labels[i]

    def fingerprint(self):
        """A string that changes whenever a file is added, removed or edited."""
        stats = [(p, os.stat(os.path.join(self.root, p))) for p in self.paths]
        listing = repr([(p, s.st_size, s.st_mtime_ns) for p, s in stats])
        return hashlib.sha256(f"{self.size} {self.split} {listing}".encode()).hexdigest()


# ---- Images: the built-in faces, known down to the pixel on the paper's three levels ----------

OBJECTS = ("bear", "cat", "human", "robot")               # level 1: what it is, the class label
PARTS = ("background", "hair/ears", "skin", "eyes", "mouth")  # level 2: a map over the pixels
PATTERNS = ("plain", "stripes", "dots")                   # level 3: the texture of the skin
FACES_TRAIN, FACES_VAL = 16384, 1024


def hsv(h, s, v):
    """Hue, saturation, value in [0, 1], each (B, 1, 1) -> RGB in [0, 1], (B, 3, 1, 1)."""
    n = torch.tensor([5.0, 3.0, 1.0]).view(1, 3, 1, 1)     # red, green, blue on the colour wheel
    k = (n + 6 * h.unsqueeze(1)) % 6                       # (B, 3, 1, 1)
    s, v = s.unsqueeze(1), v.unsqueeze(1)                  # (B, 1, 1, 1)
    return v - v * s * torch.minimum(k, 4 - k).clamp(0, 1)


class Faces(torch.utils.data.Dataset):
    """Procedural faces as (x, y): x (3, size, size) in [-1, 1], y the index of its object.

    Face i of a seed is the same on every machine. Training faces are numbers 0 to FACES_TRAIN - 1,
    held-out ones follow them, so that none is ever both. `render` also gives pattern and parts.
    """

    def __init__(self, size, split="train", seed=0):
        self.size, self.seed, self.classes = size, seed, list(OBJECTS)
        self.first = FACES_TRAIN if split == "val" else 0
        self.count = {"train": FACES_TRAIN, "val": FACES_VAL, "all": FACES_TRAIN + FACES_VAL}[split]

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return self.__getitems__([i])[0]

    def __getitems__(self, indices):        # DataLoader asks for a batch at once if it can
        x, y, _, _ = self.render(indices)
        return list(zip(x, y.tolist()))

    def fingerprint(self):
        """A string that changes whenever the renderer, or what is asked of it, does."""
        pixels = self.render(range(8))[0].numpy().tobytes()
        return hashlib.sha256(pixels + f"{self.first} {self.count}".encode()).hexdigest()

    def render(self, indices):
        """B indices -> x (B, 3, S, S) in [-1, 1], object (B,), pattern (B,) and part (B, S, S),
        these three as indices into OBJECTS, PATTERNS and PARTS.

        Painted back to front with one brush, the superellipse |x/a|^n + |y/b|^n <= 1: n = 1 is a
        diamond (cat's ear), 2 an ellipse, 8 a rounded box (robot). Both ears, or both eyes, are
        one stroke on |x|. Edges fade over one pixel, which is what anti-aliasing is.
        """
        S, B = self.size, len(indices)
        u = np.stack([np.random.Generator(np.random.Philox(key=[self.seed, self.first + int(i)]))
                      .random(40, dtype=np.float32) for i in indices])
        draw = iter(torch.from_numpy(u).T.reshape(40, B, 1, 1))

        def uniform(low, high):
            return low + (high - low) * next(draw)

        kind = uniform(0, 4).long().clamp(max=3)                           # (B, 1, 1)
        pattern = uniform(0, 3).long().clamp(max=2)                        # (B, 1, 1)

        def by_kind(bear, cat, human, robot):  # one number an object, in the order of OBJECTS
            return torch.tensor([bear, cat, human, robot], dtype=torch.float32)[kind]

        # Coordinates: the picture is [-1, 1]^2, y down; the head is moved and tilted a little.
        axis = (torch.arange(S) + 0.5) * (2 / S) - 1                       # centres of pixels
        X, Y = axis.view(1, 1, S) - uniform(-.1, .1), axis.view(1, S, 1) - uniform(.05, .2)
        tilt = uniform(-.15, .15)                                          # radians
        X, Y = X * tilt.cos() + Y * tilt.sin(), Y * tilt.cos() - X * tilt.sin()  # (B, S, S)
        a = uniform(.54, .66)                                              # head, half width
        b = a * uniform(.95, 1.1) * by_kind(.95, .88, 1.12, 1.0)           # head, half height

        def ellipse(x, y, rx, ry, n=2.0):
            """Coverage in [0, 1] of each pixel; a radius of 0 draws nothing."""
            x, y = x / rx.clamp(min=1e-3), y / ry.clamp(min=1e-3)
            r = (x.abs() ** n + y.abs() ** n) ** (1 / n)                   # 1 on the edge
            return (0.5 + (1 - r) * torch.minimum(rx, ry) * (S / 2)).clamp(0, 1) * (rx > 0)

        ground, hue = uniform(0, 1), uniform(.2, .8)
        wall = hsv(ground, uniform(.15, .45), uniform(.75, 1.0))             # light
        skin = hsv((ground + hue) % 1, uniform(.35, .7), uniform(.65, .95))  # not the wall's hue
        hair = hsv(uniform(0, 1), uniform(.3, .8), uniform(.1, .35))         # dark
        dark, white = torch.tensor(.08), torch.tensor(.97)
        human = (kind == 2).unsqueeze(1)
        ears = torch.where(human, hair, skin * .7)
        image = wall * (1 + .12 * Y.unsqueeze(1))                          # (B, 3, S, S)
        part = torch.zeros(B, S, S, dtype=torch.long)

        def paint(cover, colour, label):
            nonlocal image, part
            image = image + cover.unsqueeze(1) * (colour - image)
            part = torch.where(cover > 0.5, label, part)

        # Ears, or long hair behind the head; then the head with its pattern.
        box = by_kind(2, 2, 2, 8)                                          # robots are angular
        ear = uniform(.9, 1.15)                                            # free size
        paint(ellipse(X.abs() - a * by_kind(.72, .58, .38, 1.0), Y + b * by_kind(.78, .82, .22, 0),
                      a * ear * by_kind(.36, .44, .75, .16), b * ear * by_kind(.36, .72, .92, .28),
                      by_kind(2, 1, 2, 8)), ears, 1)
        angle, pitch, phase = uniform(0, math.pi), uniform(.36, .5), uniform(0, 1)
        along, across = X * angle.cos() + Y * angle.sin(), Y * angle.cos() - X * angle.sin()
        wave = (2 * math.pi * (along / pitch + phase)).cos()               # stripes
        dots = wave * (2 * math.pi * across / pitch).cos()                 # stripes x stripes
        texture = torch.where(pattern == 1, wave, torch.where(pattern == 2, 2 * dots - .6, -1))
        mark = uniform(.25, .4) * (.5 + .5 * texture.clamp(-1, 1))         # (B, S, S)
        shade = 1 - mark - .12 * (X / a) ** 2                              # darker at the cheeks
        paint(ellipse(X, Y, a, b, box), skin * shade.unsqueeze(1), 2)

        # Fringe of a human, antenna of a robot; the light muzzle of bear and cat.
        paint(ellipse(X - a * uniform(-.35, .35) * (kind == 2), Y + b * by_kind(0, 0, .85, 1.22),
                      a * by_kind(0, 0, .80, .10), b * by_kind(0, 0, .36, .28), box), ears, 1)
        paint(ellipse(X, Y - b * .45, a * by_kind(.45, .42, 0, 0), b * by_kind(.38, .30, 0, 0)),
              skin + .55 * (1 - skin), 2)                                  # muzzle

        # Eyes: the pupils look somewhere; a cat's are slits, a robot's whole eyes are boxes.
        eye, apart, level = uniform(.9, 1.15), uniform(.9, 1.1), b * uniform(.12, .22)
        eye_x = a * apart * by_kind(.40, .44, .40, .44)                    # from the middle
        rx, ry = a * eye * by_kind(.21, .27, .25, .27), a * eye * by_kind(.21, .23, .19, .22)
        iris = hsv(uniform(0, 1), uniform(.4, .9), uniform(.75, 1.0))
        paint(ellipse(X.abs() - eye_x, Y + level, rx, ry, box),
              torch.where((kind % 2 == 1).unsqueeze(1), iris, white), 3)   # coloured or white
        gaze = a * uniform(-.06, .06)                                      # both look one way
        paint(ellipse((X - gaze).abs() - eye_x, Y + level - gaze.abs() / 2,
                      rx * by_kind(.62, .38, .58, .45), ry * by_kind(.62, .85, .72, .45), box),
              dark, 3)

        # Nose, and a mouth that smiles or not: a stroke along y = bend * x^2.
        paint(ellipse(X, Y - b * by_kind(.30, .30, .18, 0), a * by_kind(.17, .11, .09, 0),
                      b * by_kind(.11, .09, .14, 0), by_kind(2, 1, 2, 2)),
              torch.where(human, skin * .7, dark), 2)                      # nose
        wide, bend = a * uniform(.28, .40), uniform(-.2, .9)
        curve = Y - b * by_kind(.58, .54, .56, .58) + bend * X**2 / a - bend * wide**2 / (2 * a)
        lips = hsv(uniform(.95, 1.02) % 1, uniform(.6, .8), uniform(.45, .65))
        thick = a * by_kind(.09, .08, .11, .16)                            # half height
        paint(ellipse(X, curve, wide, thick, box * 2), torch.where(human, lips, dark), 4)  # mouth
        return image.clamp(0, 1) * 2 - 1, kind.flatten(), pattern.flatten(), part


def open_images(data, size, split, val=None, keep=False):
    """--data and --val as typed -> a dataset: a folder, or the built-in faces when data is None.
    With `val`, a folder of its own for validation, nothing of `data` is held out."""
    if data is None:
        return Faces(size, split)
    if val is not None:
        data, split = (val, "all") if split == "val" else (data, "all")
    return ImageFolder(data, size, split, keep)


def random_flip(x):
    """Mirror half of the batch, the one augmentation of stage one. (B, 3, H, W) -> the same."""
    return torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(-1), x)


def to_uint8(x):
    """[-1, 1] -> 0..255, rounded: the only way pixels leave this repository. Any shape."""
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def save_grid(rows, path, gap=2):
    """Rows of images in [-1, 1], each (K, 3, H, W) or shorter than the first, as one PNG with white
    lines between."""
    cells = [torch.cat([F.pad(to_uint8(x.cpu()), (0, gap, 0, gap), value=255) for x in row], 2)
             for row in rows]                              # each (3, H + gap, K(W + gap))
    cells = [F.pad(row, (0, cells[0].shape[2] - row.shape[2]), value=255) for row in cells]
    picture = Image.fromarray(torch.cat(cells, 1).permute(1, 2, 0).numpy()[:-gap, :-gap])
    scale = max(1, 64 // rows[0].shape[-1])                # 32 px is too small to look at
    picture.resize((picture.width * scale, picture.height * scale), Image.NEAREST).save(path)


# ---- Patches and masks ------------------------------------------------------------------------

def patchify(x, P):
    """(B, C, H, W) -> (B, N, P*P*C), rows first, colours innermost. ValueError unless P divides."""
    B, C, H, W = x.shape
    if H % P or W % P:
        raise ValueError(f"an image of {H}x{W} pixels does not divide into patches of {P}")
    x = x.reshape(B, C, H // P, P, W // P, P)              # (B, C, h, P, w, P)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, P * P * C)           # (B, N, P*P*C)


def unpatchify(patches, P, H, W):
    """The exact inverse of patchify: (B, N, P*P*C) -> (B, C, H, W)."""
    B, N, _ = patches.shape
    x = patches.reshape(B, H // P, W // P, P, P, -1)       # (B, h, w, P, P, C)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, H, W)                # (B, C, H, W)


def random_mask(B, N, mask_ratio, generator=None, device="cpu"):
    """A random subset of patches for each sample. Section 4.2.

    Returns keep (B, V), the visible patches' numbers in order, and mask (B, N), 1 = masked.
    V = N(1 - mask_ratio) rounded down; ValueError if that leaves nothing to see.
    """
    V = math.floor(N * (1 - mask_ratio) + 1e-9)            # 10 * (1 - 0.9) is 0.99999... in floats
    if not 0 < V <= N:
        raise ValueError(f"a mask ratio of {mask_ratio} leaves {max(V, 0)} of {N} patches visible; "
                         f"it must be at least 0 and leave one")
    noise = torch.rand(B, N, generator=generator, device=generator.device if generator else device)
    keep = noise.argsort(1)[:, :V].sort(1).values.to(device)               # (B, V)
    mask = torch.ones(B, N, device=device).scatter(1, keep, 0.0)           # (B, N)
    return keep, mask


# ---- The posterior q(z|x) and the four losses of Section 4 ------------------------------------

class Gaussian:
    """q(z|x) = N(mu, diag exp(logvar)); mu and logvar have any shape with the channels along 1.

    logvar is clamped to [-30, 20], so that exp neither vanishes nor overflows in float32.
    """

    def __init__(self, mu, logvar):
        self.mu, self.logvar = mu, logvar.clamp(-30.0, 20.0)

    def sample(self, generator=None):
        """z = mu + sigma * eps, eps ~ N(0, 1): the reparameterisation trick (Kingma 2014)."""
        device = generator.device if generator else self.mu.device
        eps = torch.randn(self.mu.shape, generator=generator, device=device).to(self.mu)
        return self.mu + (0.5 * self.logvar).exp() * eps                   # sigma = e^(logvar/2)

    def mode(self):
        """The most likely z, which for a Gaussian is mu."""
        return self.mu

    def kl(self, mean="free"):
        """L_reg = KL(q || p) = 1/2 sum_d (sigma^2 - 1 - log sigma^2 [+ mu^2]), nats a token.

        "zero": p = N(0, 1), the textbook KL of Eq. (1), with the term mu^2.
        "free": p = N(mu, 1): Section 4.4 pulls only the variance to 1 and lets the means spread.
        Sum over the channels of a token, mean over tokens and batch. Returns a scalar.
        """
        mu, logvar = self.mu.float(), self.logvar.float()
        kl = logvar.exp() - 1 - logvar + (mu**2 if mean == "zero" else 0)
        return 0.5 * kl.sum(1).mean()


def gaussian_nll(target, mean, weight):
    """-log N(target; mean, 1) = 1/2 (target - mean)^2 + 1/2 log(2 pi), averaged over patches.

    The likelihood's sigma is fixed at 1, so the gradient is that of half a squared error; the
    constant .919 changes nothing and is kept because L_R and L_M are likelihoods (4.2, 4.3).
    target, mean: (B, N, P*P*C); weight: (B, N), 1 for the patches that count. Returns nats a
    pixel value, a scalar, and 0 when no patch counts.
    """
    nll = 0.5 * (target.float() - mean.float()) ** 2 + 0.5 * math.log(2 * math.pi)
    return (nll.mean(-1) * weight).sum() / weight.sum().clamp(min=1)


def loss_R(x, x_hat, mask, P):
    """L_R = E[-log p(x_v | z)]: what was seen must be kept. Section 4.3."""
    return gaussian_nll(patchify(x, P), patchify(x_hat, P), 1 - mask)


def loss_M(x, x_hat, mask, P):
    """L_M = E[-log p(x_m | z)]: what was hidden must be inferred, so that z holds the object and
    its parts and not only their pixels (hierarchical compression). Section 4.2."""
    return gaussian_nll(patchify(x, P), patchify(x_hat, P), mask)


def loss_P(lpips_net, x, x_hat):
    """L_P = E[sum_l w_l ||psi_l(x) - psi_l(x_hat)||^2], LPIPS on VGG features. Section 4.3.

    x, x_hat: (B, 3, H, W) in [-1, 1], the whole image as in the authors' code, always in float32.
    """
    with torch.autocast(x.device.type, enabled=False):
        return lpips_net(x.float(), x_hat.float()).mean()


VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"


def load_lpips(vgg_weights=None):
    """The LPIPS distance of Zhang et al. 2018, frozen, in eval mode (its dropout stays off).

    vgg_weights: a local copy of VGG_URL; otherwise torch hub's cache, otherwise the download, of
    which torch checks the hash. Raises InputError naming URL, path and flag if there is none.
    """
    cached = Path(torch.hub.get_dir(), "checkpoints", VGG_URL.rsplit("/", 1)[1])
    path = Path(vgg_weights or cached)
    try:
        if not path.exists() and vgg_weights is None:
            torch.hub.load_state_dict_from_url(VGG_URL, map_location="cpu", check_hash=True)
        weights = torch.load(path, map_location="cpu", weights_only=True)
        weights["features.28.weight"]       # VGG-16's last convolution, unless it is another net
    except Exception as error:              # torch explains itself over many lines
        why = (str(error) or repr(error)).splitlines()[0]
        raise InputError(f"LPIPS needs VGG-16: {path} cannot be read ({why}); download {VGG_URL} "
                         f"to that path, or name a copy with --vgg-weights") from None
    lpips = import_lpips()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # lpips 0.1.4 uses argument names torchvision retired
        net = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    net.net.load_state_dict({name: weights["features." + name.split(".", 1)[1]]
                             for name in net.net.state_dict()})            # "slice3.10.bias" etc.
    return net.eval().requires_grad_(False)


def import_lpips():
    """The lpips package, even beside a torchvision that was built for another torch.

    Of torchvision lpips needs VGG's layout alone. Such a build cannot load its compiled operators
    and stops at import, while describing two of them to torch; nothing here calls those, so
    declaring their signatures is enough to get past.
    """
    try:
        import lpips
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_lpips.library = library      # the declarations live as long as this object
        import lpips
    return lpips


# ---- The transformer --------------------------------------------------------------------------

def sincos_positions(D, grid, trained_grid=None):
    """Fixed 2-D sin-cos positions (1, N, D): half of D for the column, half for the row.

    Frequencies 10000^(-k / (D/4)), sines before cosines (Vaswani 2017; MAE, He 2022). A model
    that was trained on another grid finds its own grid's range here, in finer or wider steps.
    """
    omega = 10000.0 ** -(torch.arange(D // 4, dtype=torch.float64) / (D // 4))
    old = trained_grid or grid              # centres of patches, in the patches trained with
    place = ((torch.arange(grid).double() + 0.5) * old / grid - 0.5).clamp(0, old - 1)
    row, column = torch.meshgrid(place, place, indexing="ij")
    angles = [place.reshape(-1, 1) * omega for place in (column, row)]     # 2 x (N, D/4)
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], 1).float()[None]


def fused_attention(q, k, v):
    """softmax(q k^T / sqrt(.)) v, each (B, heads, N, .), never forming the (N, N) matrix."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):             # 6x slower backwards in bfloat16
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float())


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani 2017)."""

    def __init__(self, D, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(D, 3 * D)                     # queries, keys, values in one product
        self.proj = nn.Linear(D, D)

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, -1)             # (B, N, 3, heads, .)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                               # (B, heads, N, .) each
        x = fused_attention(q, k, v)                                       # (B, heads, N, .)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))               # (B, N, D)


def named(**modules):
    """Modules run one after the other, under the names that published weights have."""
    return nn.Sequential(OrderedDict(modules))


class Block(nn.Module):
    """Pre-norm transformer block (Dosovitskiy 2021)."""

    def __init__(self, D, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(D, eps=1e-6)
        self.attn = Attention(D, num_heads)
        self.norm2 = nn.LayerNorm(D, eps=1e-6)
        self.mlp = named(fc1=nn.Linear(D, 4 * D), act=nn.GELU(), fc2=nn.Linear(4 * D, D))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))                   # (B, N, D)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Linear map of each patch. Stored as the P x P convolution that published weights hold, used
    as a matrix, because a convolution would have to visit the masked patches too."""

    def __init__(self, P, D):
        super().__init__()
        self.proj = nn.Conv2d(3, D, P, stride=P)           # only ever used through its weight

    def forward(self, patches):
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)           # (D, P*P*C), as patchify
        return F.linear(patches, weight, self.proj.bias)                   # (B, V, D)


class Head(nn.Module):
    """Tokens -> pixels: each patch on its own, then a 3x3 convolution that mends the seams."""

    def __init__(self, P, D):
        super().__init__()
        self.P = P
        self.linear_pred = nn.Linear(D, P * P * 3)
        self.conv_smoother = nn.Conv2d(3, 3, 3, padding=1)
        with torch.no_grad():               # start near the identity, not as a random blur
            self.conv_smoother.weight.mul_(0.1)
            self.conv_smoother.weight[range(3), range(3), 1, 1] += 1

    def forward(self, tokens, H, W):
        patches = self.linear_pred(tokens)                                 # (B, N, P*P*3)
        return self.conv_smoother(unpatchify(patches, self.P, H, W))       # (B, 3, H, W)


# ---- VMAE: the variational masked autoencoder -------------------------------------------------

class VMAE(nn.Module):
    """Section 4. An asymmetric masked autoencoder whose tokens are Gaussian latents.

    embed_dim D, depth blocks on each side, latent_dim d channels a token. No class token: the
    latent is a grid, (B, d, h, w). ValueError if the patch does not divide the image, or the
    number of heads the width.
    """

    def __init__(self, img_size=256, patch_size=8, embed_dim=192, depth=12, num_heads=12,
                 latent_dim=16):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"an image size of {img_size} is not a multiple of the patch, "
                             f"{patch_size}")
        if embed_dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide a width of {embed_dim}")
        self.img_size, self.patch_size, self.latent_dim = img_size, patch_size, latent_dim
        D, self.grid = embed_dim, img_size // patch_size
        self.register_buffer("pos_embed", sincos_positions(D, self.grid))
        self.patch_embed = PatchEmbed(patch_size, D)
        self.blocks = nn.ModuleList(Block(D, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.to_latent = nn.Linear(D, 2 * latent_dim)                      # mu | logvar

        self.register_buffer("decoder_pos_embed", self.pos_embed.clone())
        self.from_latent = nn.Linear(latent_dim, D)        # two layers and nothing in between, as
        self.decoder_embed = nn.Linear(D, D)               # in the authors' checkpoints
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, D))
        self.decoder_blocks = nn.ModuleList(Block(D, num_heads) for _ in range(depth))  # as deep
        self.decoder_norm = nn.LayerNorm(D, eps=1e-6)
        self.decoder_pred = Head(patch_size, D)
        self.apply(self._init)

    @staticmethod
    def _init(module):
        if isinstance(module, nn.Linear):                  # as MAE does
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(self, x, mask_ratio, generator=None):
        """Training. (B, 3, H, W) -> x_hat likewise, q over (B, d, V), mask (B, N), 1 = masked."""
        keep, mask = random_mask(len(x), self.grid**2, mask_ratio, generator, x.device)
        q = self.encode_tokens(x, keep)                    # q(z|x_v), never shown x_m
        z = q.sample(generator)                            # (B, d, V)
        return self.decode_tokens(z, keep), q, mask

    def encode_tokens(self, x, keep):
        """Patches `keep` (B, V) of x -> Gaussian over (B, d, V); all later work is on V tokens."""
        B, V, D = *keep.shape, self.pos_embed.shape[-1]
        x_v = patchify(x, self.patch_size)                                 # (B, N, P*P*C)
        x_v = x_v.gather(1, keep[..., None].expand(-1, -1, x_v.shape[-1]))  # (B, V, P*P*C)
        tokens = self.patch_embed(x_v) + self.pos_embed[0, keep]           # (B, V, D)
        for block in self.blocks:
            tokens = block(tokens)
        moments = self.to_latent(self.norm(tokens)).transpose(1, 2)        # (B, 2d, V)
        return Gaussian(*moments.float().chunk(2, 1))

    def decode_tokens(self, z, keep):
        """z (B, d, V) of patches `keep`, mask tokens for the others -> x_hat (B, 3, H, W)."""
        B, _, V = z.shape
        N, D, S = self.grid**2, self.pos_embed.shape[-1], self.img_size
        seen = self.decoder_embed(self.from_latent(z.transpose(1, 2)))     # (B, V, D)
        tokens = self.mask_token.to(seen.dtype).expand(B, N, D)
        tokens = tokens.scatter(1, keep[..., None].expand(B, V, D), seen)  # (B, N, D)
        tokens = tokens + self.decoder_pos_embed
        for block in self.decoder_blocks:
            tokens = block(tokens)
        return self.decoder_pred(self.decoder_norm(tokens), S, S).float()  # (B, 3, S, S)

    def encode(self, x):
        """Use: nothing masked. x (B, 3, H, W) in [-1, 1] -> Gaussian over (B, d, h, w)."""
        if x.shape[-2:] != (self.img_size, self.img_size):
            raise ValueError(f"this model encodes {self.img_size}x{self.img_size} pixels, "
                             f"not {x.shape[-2]}x{x.shape[-1]}")
        q = self.encode_tokens(x, self._all_patches(x))
        shape = (len(x), self.latent_dim, self.grid, self.grid)            # (B, d, h, w)
        return Gaussian(q.mu.reshape(shape), q.logvar.reshape(shape))

    def decode(self, z):
        """z (B, d, h, w) -> x_hat (B, 3, H, W), about [-1, 1] but not clamped."""
        return self.decode_tokens(z.flatten(2), self._all_patches(z))

    def _all_patches(self, x):
        return torch.arange(self.grid**2, device=x.device).expand(len(x), -1)


def resize_positions(weights, model):
    """Weights trained at another image size, with the positions of `model`'s grid.

    The sines and cosines themselves at the new places: what the authors' bilinear resize of the
    old table approximates. Faces at twice the training size, nothing tuned: 35.0 dB by either,
    and 23.6 dB with places counted on past the last one that the encoder has seen.
    """
    old = weights.get("pos_embed")
    if old is None or old.shape[1] == model.grid**2:       # a convolution has no positions
        return weights
    new = sincos_positions(old.shape[2], model.grid, math.isqrt(old.shape[1]))
    return {**weights, "pos_embed": new, "decoder_pos_embed": new}


def drop_variance(model):
    """AE, DAE, MAE: shrink q(z|x) to its mean, by a logvar far below Gaussian's clamp, where no
    gradient comes back; so that it stays there, and sampling is the identity to 7 digits."""
    last = model.to_latent if isinstance(model, VMAE) else model.encoder.conv_out
    last.weight.data[model.latent_dim:] = 0
    last.bias.data[model.latent_dim:] = -40                # the clamp is at -30


# Rows of keyword arguments; the image size is the data's.
sizes = {
    # the default chain, on a CPU: f4d16
    "tiny": dict(patch_size=4, embed_dim=128, depth=2, num_heads=4, latent_dim=16),
    # the paper's f8d16, shallow: small real images on a CPU
    "small": dict(patch_size=8, embed_dim=192, depth=3, num_heads=6, latent_dim=16),
    # the paper's f8d16, 11.19 M numbers of which 10.80 M are learned and the rest positions
    "base": dict(patch_size=8, embed_dim=192, depth=12, num_heads=12, latent_dim=16),
}


# ---- Save, load -------------------------------------------------------------------------------

def save_checkpoint(path, **entries):
    """Write one dict of tensors and plain values, whole or not at all: to a temporary name in the
    same folder, flushed, then renamed, so that a crash leaves the previous checkpoint."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(entries, file)
            file.flush()
            os.fsync(file.fileno())     # or a power cut could leave the new name empty
        os.replace(temporary, path)     # one step: there is always a whole file
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_checkpoint(path, *needed):
    """A checkpoint's dict, on the CPU. InputError if it is missing, damaged or lacks a key."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such checkpoint; training writes last.pt into its --out")
    torch.serialization.add_safe_globals([argparse.Namespace])  # MAE's descendants save options so
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        missing = set(needed) - ckpt.keys()
    except Exception:
        raise InputError(f"{path}: not a checkpoint, or a damaged one") from None
    if missing:
        raise InputError(f"{path}: lacks {', '.join(sorted(missing))}, so another script made it")
    return ckpt


def build(model_args):
    """Constructor's arguments -> the model that they belong to, with random weights."""
    return ConvAutoencoder(**model_args) if "channels" in model_args else VMAE(**model_args)


def build_vmae(ckpt):
    """The stage-one entries of either stage's checkpoint -> the model in eval mode."""
    model = build(ckpt["model_args"])
    model.load_state_dict(ckpt["model"])                   # all of it or an error
    return model.eval().requires_grad_(False)


def published(path, ckpt, num_heads):
    """A checkpoint of the authors' code, or of diffusers', in the form of ours.

    The constructor's arguments are read off the shapes, but for num_heads, which no shape tells.
    Says what was left over, and whether the mask token was missing, which training alone needs.
    InputError if it is neither model, or a part of one.
    """
    try:
        weights = ckpt.get("state_dict") or ckpt.get("model") or ckpt
        weights = {k.removeprefix("module."): v for k, v in weights.items()}  # DDP's
        if "encoder.conv_in.weight" in weights:
            top = "encoder.down_blocks.{}.resnets.1.conv2.bias".format
            levels = itertools.takewhile(lambda i: top(i) in weights, itertools.count())
            args = dict(img_size=256, channels=tuple(len(weights[top(i)]) for i in levels),
                        latent_dim=weights["decoder.conv_in.weight"].shape[1])
        else:
            D, _, P, _ = weights["patch_embed.proj.weight"].shape          # (D, 3, P, P)
            depth = len({k.split(".")[1] for k in weights if k.startswith("blocks.")})
            args = dict(img_size=P * math.isqrt(weights["pos_embed"].shape[1]), patch_size=P,
                        embed_dim=D, depth=depth, num_heads=num_heads,
                        latent_dim=weights["from_latent.weight"].shape[1])
        model = build(args)
        missing, left_over = model.load_state_dict(weights, strict=False)
    except (KeyError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(f"{path}: not a stage-one checkpoint, nor the weights of a VMAE or an "
                         f"SD3-style VAE ({str(error).splitlines()[-1].strip()})") from None
    if lost := set(missing) - {"mask_token"}:
        raise InputError(f"{path}: lacks {len(lost)} weights of its architecture, as {min(lost)}")
    print(f"{path}: {len(weights) - len(left_over)} tensors read; missing: "
          f"{', '.join(missing) or 'none'}; left over: {', '.join(left_over) or 'none'}")
    return dict(model_args=args, model=model.state_dict())


def read_stage_one(path, num_heads=12):
    """Stage one's entries (model_args, model, train_args) of a checkpoint of ours, of either
    stage, or of published weights. num_heads: of published VMAE weights, 12 in the authors'."""
    ckpt = read_checkpoint(path)
    ckpt = ckpt.get("vmae", ckpt)           # stage two's file holds its stage one
    if not {"model_args", "model"} <= ckpt.keys():
        ckpt = published(path, ckpt, num_heads)
    faces = dict(data=None, val=None, size=ckpt["model_args"]["img_size"])
    return {"train_args": faces, **ckpt}    # published ones do not say what they were trained on


def load_vmae(path, num_heads=12):
    """A checkpoint as read_stage_one takes it -> the model in eval mode."""
    return build_vmae(read_stage_one(path, num_heads))


# ---- Last: the other autoencoders' body and their discriminator. The paper's model is above ---

def conv3(c_in, c_out):
    """A 3x3 convolution that keeps the size."""
    return nn.Conv2d(c_in, c_out, 3, padding=1)


def group_norm(C):
    """GroupNorm (Wu & He 2018) in 32 groups, or one a channel where there are fewer."""
    return nn.GroupNorm(min(32, C), C, eps=1e-6)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), x itself through a 1x1 where the widths differ."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), conv3(c_in, c_out)
        self.norm2, self.conv2 = group_norm(c_out), conv3(c_out, c_out)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))                              # (B, c_out, h, w)
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))   # (B, c_out, h, w)


class MidBlock(nn.Module):
    """At the smallest size: a residual block, attention among all its pixels, another block."""

    def __init__(self, C):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(C, C), ResnetBlock(C, C)])
        self.attentions = nn.ModuleList([nn.ModuleDict(dict(
            group_norm=group_norm(C), to_q=nn.Linear(C, C), to_k=nn.Linear(C, C),
            to_v=nn.Linear(C, C), to_out=nn.Sequential(nn.Linear(C, C))))])

    def forward(self, x):
        x, attn = self.resnets[0](x), self.attentions[0]                   # (B, C, h, w)
        tokens = attn["group_norm"](x).flatten(2).transpose(1, 2)          # (B, h*w, C)
        q, k, v = (attn[name](tokens).unsqueeze(1) for name in ("to_q", "to_k", "to_v"))  # 1 head
        mixed = attn["to_out"](fused_attention(q, k, v).squeeze(1))        # (B, h*w, C), one head
        return self.resnets[1](x + mixed.transpose(1, 2).reshape(x.shape))  # (B, C, h, w)


def level(c_in, c_out, blocks, **resize):
    """Residual blocks at one size, then the step to the next: downsamplers, upsamplers or none."""
    resnets = [ResnetBlock(c_out if i else c_in, c_out) for i in range(blocks)]
    return named(resnets=nn.Sequential(*resnets), **resize)


def down(C):
    """Half the size. Padded below and on the right only, as published weights expect."""
    return nn.Sequential(named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(C, C, 3, stride=2)))


def up(C):
    """Twice the size: each pixel four times, then a convolution, which leaves no checkerboard."""
    return nn.Sequential(named(nearest=nn.Upsample(scale_factor=2), conv=conv3(C, C)))


class ConvAutoencoder(nn.Module):
    """SD-VAE's convolutional body, in the shape of SD3's: the paper's AE, DAE, VAE and SD-VAE.

    channels: width of each level; a level halves the size of the one before, so that four give
    f8. Attributes and methods as VMAE's. ValueError if f does not divide the image.
    """

    def __init__(self, img_size=256, channels=(128, 256, 512, 512), latent_dim=16):
        super().__init__()
        self.img_size, self.latent_dim = img_size, latent_dim
        self.patch_size = f = 2 ** (len(channels) - 1)     # pixels to a side of a latent cell
        if img_size % f:
            raise ValueError(f"an image size of {img_size} is not a multiple of {f}")
        self.grid, wide, narrow = img_size // f, channels[-1], channels[0]
        pairs = list(zip((narrow, *channels), channels))                   # (c_in, c_out) a level
        self.encoder = named(
            conv_in=conv3(3, narrow),   # (B, 128, H, W) in SD3
            down_blocks=nn.Sequential(
                *(level(*p, 2, downsamplers=down(p[1])) for p in pairs[:-1]), level(*pairs[-1], 2)),
            mid_block=MidBlock(wide), conv_norm_out=group_norm(wide), silu=nn.SiLU(),
            conv_out=conv3(wide, 2 * latent_dim))          # mu | logvar
        pairs = list(zip((wide, *channels[::-1]), channels[::-1]))
        self.decoder = named(
            conv_in=conv3(latent_dim, wide), mid_block=MidBlock(wide),     # (B, 512, h, w) in SD3
            up_blocks=nn.Sequential(
                *(level(*p, 3, upsamplers=up(p[1])) for p in pairs[:-1]), level(*pairs[-1], 3)),
            conv_norm_out=group_norm(narrow), silu=nn.SiLU(), conv_out=conv3(narrow, 3))

    def forward(self, x, mask_ratio=0.0, generator=None):
        """Training, as VMAE's; but a convolution visits every pixel, so nothing can be hidden."""
        q = self.encode(x)
        return self.decode(q.sample(generator)), q, x.new_zeros(len(x), self.grid**2)

    def encode(self, x):
        """x (B, 3, H, W) in [-1, 1] -> Gaussian over (B, d, h, w)."""
        return Gaussian(*self.encoder(x).float().chunk(2, 1))  # (B, 2d, h, w) -> mu, logvar

    def decode(self, z):
        """z (B, d, h, w) -> x_hat (B, 3, H, W), about [-1, 1] but not clamped."""
        return self.decoder(z).float()  # (B, 3, H, W)


conv_sizes = {                              # rows as in `sizes`, with the same latents
    "tiny": dict(channels=(16, 32, 64), latent_dim=16),
    "small": dict(channels=(32, 64, 128, 128), latent_dim=16),
    "base": dict(channels=(128, 256, 512, 512), latent_dim=16),            # SD3's, 83.82 M
}


def discriminator(img_size, width=64):
    """PatchGAN (Isola 2017): image -> (B, 1, h', w') scores, each of a patch, high for real ones.

    Its patches of 70 pixels, three halvings, shrink to 34 and 16 for images below 64 and 32. With
    GroupNorm for BatchNorm: a score then does not depend on the other images of the batch.
    """
    layers = max(1, min(3, img_size.bit_length() - 4))     # 32 -> 2, 64 and more -> 3
    widths = [width * 2**i for i in range(layers + 1)]
    net = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]  # no norm on pixels
    for i, (a, b) in enumerate(zip(widths, widths[1:]), 1):
        net += [nn.Conv2d(a, b, 4, stride=2 if i < layers else 1, padding=1), group_norm(b),
                nn.LeakyReLU(0.2)]
    return nn.Sequential(*net, nn.Conv2d(widths[-1], 1, 4, padding=1))     # (B, 1, h', w')


def loss_D(real, fake):
    """Hinge loss of the discriminator's scores, 1/2 E[max(0, 1 - real) + max(0, 1 + fake)]."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def loss_G(fake, reconstruction, last_layer):
    """Adversarial loss -E[D(x_hat)], scaled so that on the decoder's last layer its gradient is
    as long as that of the reconstruction's losses (Esser 2021, Eq. 7; Rombach 2022).

    fake: D's scores of x_hat; reconstruction: the scalar it competes with; last_layer: a weight.
    """
    adversarial = -fake.float().mean()  # a scalar
    a, b = (torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm()
            for loss in (reconstruction, adversarial))
    return (a / (b + 1e-4)).clamp(max=1e4).detach() * adversarial

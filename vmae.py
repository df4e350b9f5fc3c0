"""Stage one of LDMAE (Latent Diffusion Models with Masked AutoEncoders, ICCV 2025): the VMAE.

    x --patchify, mask--> x_v --encoder--> q(z|x_v) --sample--> z --decoder--> p(x|z)

The method of Section 4 comes first: patches and masks, the Gaussians q and p with L_reg, the losses
L_R, L_M, L_P and the sum L_VMAE, the transformer, the class VMAE. Then follows what surrounds it:
sizes and checkpoints, images, pictures, what the scripts share. The convolutional autoencoders
that the paper compares VMAE with come last; a reader of the method can leave them out.

    python train_vmae.py --data path --mask 0.6          trains what this file defines
    vmae = load_vmae("runs/vmae/last.pt")                loads it, in a notebook for instance
    z = vmae.encode(x).mode(); x_hat = vmae.decode(z)    (B, 3, H, W) -> (B, d, h, w) -> back
"""
import argparse, contextlib, hashlib, json, math, os, re, shutil, sys, timeit, warnings, zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

# torch's threads wait for each other in a busy loop, so long that a second training on the same
# cores slows both down 15 to 50 times. If they give up after 3,000 rounds, each of the two keeps
# 43 % of its speed, but one training alone loses 10 % (1,000 rounds: 59 % and 17 %; 2 Xeon cores).
# torch reads this number when it is loaded, so the scripts import this file first.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import default_collate
from tqdm import tqdm

# Glossary: the letters in shape comments (but in metrics N is images, in convolutions C a width)
#
#   B  images in a batch           P  side of a patch in pixels    D  width of the transformer
#   C  colour channels, always 3   N  patches (tokens) per image   d  latent channels per token
#   H W  pixels (S: H = W = S)     V  visible tokens per image     h w  latent grid, H/P x W/P
#
#   x image in [-1, 1]   x_v, x_m its visible and its masked patches   x_hat reconstruction
#   z latent             q(z|x_v) posterior, made by the encoder       p(x|z) likelihood of x

# ---- Patches and masks ------------------------------------------------------------------------

def patchify(x, P):
    """(B, C, H, W) -> (B, N, P*P*C), colours innermost. ValueError unless P divides H and W."""
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

def random_mask(B, h, w, mask_ratio, generator=None, device="cpu"):
    """Choose the patches of an h x w grid that stay visible, anew for each image. Section 4.2.

    Returns keep (B, V), the numbers of the visible patches in rising order, and mask (B, N), which
    is 1 where a patch is masked. V = N(1 - mask_ratio), rounded down; ValueError if V is 0.
    generator: on `device`, for repeatable masks."""
    N = h * w
    V = math.floor(N * (1 - mask_ratio) + 1e-9)            # in floats 10 * (1 - 0.9) is below 1
    if not 0 < V <= N:
        raise ValueError(f"a mask ratio of {mask_ratio} leaves {max(V, 0)} of {N} patches visible; "
                         f"it must be at least 0 and leave one patch visible")
    # One number per patch; the V smallest stay visible. To mask blocks, smooth `noise` over h, w.
    noise = torch.rand(B, h, w, generator=generator, device=device)        # (B, h, w)
    keep = noise.flatten(1).argsort(1)[:, :V].sort(1).values               # (B, V)
    mask = torch.ones(B, N, device=device).scatter(1, keep, 0.0)           # (B, N)
    return keep, mask

# ---- The Gaussians q(z|x_v) and p(x|z) --------------------------------------------------------

class Gaussian:
    """N(mu, sigma^2), independent in every element, with sigma^2 = exp(logvar).

    Two of them make the model: the posterior q(z|x_v), whose mu and logvar the encoder computes,
    and the likelihood p(x|z), whose mu the decoder computes and whose logvar is fixed at 0.
    logvar has mu's shape or one that broadcasts to it; it is clamped to [-30, 20], so that in
    float32 sigma is neither 0 nor infinite."""

    def __init__(self, mu, logvar):
        self.mu, self.logvar = mu, logvar.clamp(-30.0, 20.0)

    def sample(self, generator=None):
        """The reparameterisation trick (Kingma 2014): mu + sigma * eps with eps ~ N(0, 1), so that
        gradients reach mu and sigma. generator: on mu's device."""
        eps = torch.randn(self.mu.shape, generator=generator, device=self.mu.device)
        sigma = (0.5 * self.logvar).exp()
        return self.mu + sigma * eps.to(self.mu.dtype)

    def mode(self):
        """The most likely value, which for a Gaussian is mu."""
        return self.mu

    def nll(self, x):
        """-log N(x; mu, sigma^2) = 1/2 ((x - mu)^2 / sigma^2 + log sigma^2 + log 2 pi), in nats.
        x: of mu's shape. Returns one value per element, in float32."""
        mu, logvar = self.mu.float(), self.logvar.float()
        return 0.5 * ((x.float() - mu) ** 2 * (-logvar).exp() + logvar + math.log(2 * math.pi))

    def kl(self, mean="free"):
        """L_reg = E[KL(q(z|x_v) || p(z))], the loss that smooths the latent space. Section 4.1.

        mean="zero", Eq. (1): the prior is N(0, 1), so
            KL = 1/2 sum_d (mu^2 + sigma^2 - 1 - log sigma^2)
        mean="free", Section 4.4: the same without mu^2. Only the variance is pulled, towards 1.
            The means may lie anywhere, because stage two learns where they lie.

        Sum over the channels of a token, mean over tokens and batch: a scalar, in nats per token.
        This pulls sigma, the noise of one latent, not the spread of the means over the images: with
        lambda_reg = 1e-4 sigma ends near .1 of that spread. ldm.normalise then gives z unit
        variance. Table 4 in README shows what other lambda_reg do to both stages."""
        mu, logvar = self.mu.float(), self.logvar.float()
        kl = logvar.exp() - 1 - logvar + (mu**2 if mean == "zero" else 0)
        return 0.5 * kl.sum(1).mean()

# ---- The losses L_R, L_M and L_P, and the sum L_VMAE; L_reg is Gaussian.kl, above -------------

def mean_nll(p, x, weight, P):
    """Mean of -log p(x|z) over the patches whose weight (B, N) is 1 -> a scalar, in nats per pixel
    value, or 0 if there is no such patch.

    With sigma = 1 this is half the squared error plus 1/2 log(2 pi) = .919, a constant without a
    gradient, which hides progress; the PSNR in the log is easier to read."""
    nll = patchify(p.nll(x), P).mean(-1)                                   # (B, N)
    return (nll * weight).sum() / weight.sum().clamp(min=1)                # a scalar; 0, not 0 / 0

def loss_R(p, x, mask, P):
    """L_R = E[-log p(x_v|z)]: what the encoder saw must be reconstructed. Section 4.3."""
    return mean_nll(p, x, 1 - mask, P)

def loss_M(p, x, mask, P):
    """L_M = E[-log p(x_m|z)]: what the encoder did not see must be inferred. For this, z has to
    hold the object and its parts, not only pixels: hierarchical compression. Section 4.2."""
    return mean_nll(p, x, mask, P)

def loss_P(lpips_net, x, x_hat):
    """L_P = E[sum_l w_l ||psi_l(x) - psi_l(x_hat)||^2], LPIPS on VGG features. Section 4.3.

    x, x_hat: (B, 3, H, W) in [-1, 1]; whole images are compared, as in the authors' code. psi_l has
    unit length at each place. The features may be in bfloat16 (under autocast), the distance is in
    float32. lpips_net: from load_lpips."""
    psi = lpips_net.net(lpips_net.scaling_layer(x))        # the features of five layers
    psi_hat = lpips_net.net(lpips_net.scaling_layer(x_hat))
    with torch.autocast(x.device.type, enabled=False):
        unit = [F.normalize(v.float(), dim=1, eps=1e-10) for v in (*psi, *psi_hat)]
        return sum(w((a - b) ** 2).mean() for w, a, b in zip(lpips_net.lins, unit[:5], unit[5:]))

def loss_VMAE(x, p, q, mask, P, lambda_M=0.1, lambda_P=0.0, lambda_reg=1e-4, kl_mean="free",
              lpips_net=None):
    """L_VMAE = L_R + lambda_M L_M + lambda_P L_P + lambda_reg L_reg. Section 4.4.

    x: (B, 3, H, W); p, q, mask: what VMAE.forward returns. Returns the sum, a scalar, and a dict of
    its terms before weighting; a term whose weight is 0 is not computed and not in the dict."""
    terms = {"L_R": loss_R(p, x, mask, P)}
    loss = terms["L_R"]
    if lambda_M > 0:
        terms["L_M"] = loss_M(p, x, mask, P)
        loss = loss + lambda_M * terms["L_M"]
    if lambda_P > 0:
        terms["L_P"] = loss_P(lpips_net, x, p.mode())
        loss = loss + lambda_P * terms["L_P"]
    if lambda_reg > 0:
        terms["L_reg"] = q.kl(kl_mean)
        loss = loss + lambda_reg * terms["L_reg"]
    return loss, terms

# ---- The transformer --------------------------------------------------------------------------

def sincos_positions(D, grid, trained_grid=None):
    """Fixed 2-D sin-cos positions (1, N, D): half of D for the column, half for the row.

    Frequencies 10000^(-k / (D/4)), sines before cosines (Vaswani 2017; MAE, He 2022). If the model
    was trained on another grid, the new one is spread over the same range of coordinates."""
    omega = 10000.0 ** -(torch.arange(D // 4, dtype=torch.float64) / (D // 4))
    old = trained_grid or grid              # coordinates are counted in patches of the old grid
    centre = ((torch.arange(grid).double() + 0.5) * old / grid - 0.5).clamp(0, old - 1)  # (grid,)
    row, column = torch.meshgrid(centre, centre, indexing="ij")            # (grid, grid) each
    column, row = column.reshape(-1, 1) * omega, row.reshape(-1, 1) * omega    # (N, D/4) each
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], 1).float()[None]

def fused_attention(q, k, v):
    """softmax(q k^T / sqrt(D/heads)) v, each (B, heads, N, D/heads), without ever storing the N x N
    matrix. On a CPU in float32, because the CPU's kernel is 6x slower backwards in bfloat16."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float())

class Attention(nn.Module):
    """Multi-head self-attention (Vaswani 2017)."""

    def __init__(self, D, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(D, 3 * D)                     # queries, keys, values in one product
        self.proj = nn.Linear(D, D)         # joins the heads

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, -1)       # (B, N, 3, heads, D/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                         # (B, heads, N, D/heads) each
        x = fused_attention(q, k, v)                                       # (B, heads, N, D/heads)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))               # (B, N, D)

def named(**modules):
    """Modules that run one after the other, under the names that published weights have."""
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
    """The same linear map for each patch. It is stored as a P x P convolution, as in published
    weights, but used as a matrix: a convolution would have to visit the masked patches too."""

    def __init__(self, P, D):
        super().__init__()
        self.proj = nn.Conv2d(3, D, P, stride=P)           # only its weight and bias are used

    def forward(self, patches):
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)           # (D, P*P*C), as patchify
        return F.linear(patches, weight, self.proj.bias)                   # (B, V, D)

class Head(nn.Module):
    """Tokens -> pixels: each patch on its own, then a 3x3 convolution that smooths the seams."""

    def __init__(self, P, D):
        super().__init__()
        self.P = P
        self.linear_pred = nn.Linear(D, P * P * 3)         # the pixels of a patch
        self.conv_smoother = nn.Conv2d(3, 3, 3, padding=1)
        # A random 3x3 filter would blur the image; this one starts close to changing nothing.
        self.conv_smoother.weight.data *= 0.1
        for colour in range(3):
            self.conv_smoother.weight.data[colour, colour, 1, 1] += 1

    def forward(self, tokens, H, W):
        patches = self.linear_pred(tokens)                                 # (B, N, P*P*3)
        return self.conv_smoother(unpatchify(patches, self.P, H, W))       # (B, 3, H, W)

# ---- VMAE: the variational masked autoencoder -------------------------------------------------

class VMAE(nn.Module):
    """Section 4. A masked autoencoder: the encoder sees the visible patches alone, and its output
    tokens are Gaussian latents. There is no class token, as the latent is a grid, (B, d, h, w).

    embed_dim: D; depth: blocks in the encoder, and as many in the decoder; latent_dim: d.
    ValueError unless patch_size divides img_size and num_heads divides embed_dim."""

    def __init__(self, img_size=256, patch_size=8, embed_dim=192, depth=12, num_heads=12,
                 latent_dim=16):
        super().__init__()
        if img_size % patch_size or embed_dim % num_heads:
            raise ValueError(f"the image size, {img_size}, must be a multiple of the patch size, "
                             f"{patch_size}, and the width, {embed_dim}, of the heads, {num_heads}")
        self.img_size, self.patch_size, self.latent_dim = img_size, patch_size, latent_dim
        D, self.grid = embed_dim, img_size // patch_size
        self.register_buffer("pos_embed", sincos_positions(D, self.grid))
        self.patch_embed = PatchEmbed(patch_size, D)
        self.blocks = nn.ModuleList(Block(D, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.to_latent = nn.Linear(D, 2 * latent_dim)                      # mu and logvar

        self.register_buffer("decoder_pos_embed", self.pos_embed.clone())
        self.from_latent = nn.Linear(latent_dim, D)        # two linear layers in a row, because
        self.decoder_embed = nn.Linear(D, D)               # the authors' checkpoints have both
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, D))
        self.decoder_blocks = nn.ModuleList(Block(D, num_heads) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(D, eps=1e-6)
        self.decoder_pred = Head(patch_size, D)
        # log sigma^2 of p(x|z), fixed at sigma = 1. To learn it, make it an nn.Parameter.
        self.register_buffer("logvar_x", torch.zeros(()), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):              # as MAE does
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x, mask_ratio, generator=None):
        """Training: x (B, 3, H, W) -> p(x|z), q(z|x_v) over (B, d, V), mask (B, N), 1 = masked."""
        keep, mask = random_mask(len(x), self.grid, self.grid, mask_ratio, generator, x.device)
        q = self.encode_tokens(x, keep)                    # q(z|x_v), never shown x_m
        z = q.sample(generator)                            # (B, d, V)
        p = Gaussian(self.decode_tokens(z, keep), self.logvar_x)           # p(x|z)
        return p, q, mask

    def encode_tokens(self, x, keep):
        """The patches of x that `keep` (B, V) names -> q(z|x_v), a Gaussian over (B, d, V)."""
        patches = patchify(x, self.patch_size)                             # (B, N, P*P*C)
        index = keep[..., None].expand(-1, -1, patches.shape[-1])          # (B, V, P*P*C)
        x_v = patches.gather(1, index)                     # (B, V, P*P*C): x_m is left behind here
        tokens = self.patch_embed(x_v) + self.pos_embed[0, keep]           # (B, V, D)
        for block in self.blocks:
            tokens = block(tokens)
        moments = self.to_latent(self.norm(tokens)).transpose(1, 2)        # (B, 2d, V)
        return Gaussian(*moments.float().chunk(2, 1))

    def decode_tokens(self, z, keep):
        """z (B, d, V) -> x_hat (B, 3, S, S). Patches that are not in `keep` get the mask token."""
        B, _, V = z.shape
        N, D, S = self.grid**2, self.pos_embed.shape[-1], self.img_size
        visible = self.decoder_embed(self.from_latent(z.transpose(1, 2)))  # (B, V, D)
        tokens = self.mask_token.to(visible.dtype).expand(B, N, D)
        tokens = tokens.scatter(1, keep[..., None].expand(B, V, D), visible)   # (B, N, D)
        tokens = tokens + self.decoder_pos_embed           # now the masked ones know their place
        for block in self.decoder_blocks:
            tokens = block(tokens)
        return self.decoder_pred(self.decoder_norm(tokens), S, S).float()  # (B, 3, S, S)

    def encode(self, x):
        """After training: x (B, 3, H, W) in [-1, 1], nothing masked -> Gaussian over (B, d, h, w).
        ValueError for an image of another size than the model was built for."""
        if x.shape[-2:] != (self.img_size, self.img_size):
            raise ValueError(f"this model encodes {self.img_size}x{self.img_size} pixels, "
                             f"not {x.shape[-2]}x{x.shape[-1]}")
        q = self.encode_tokens(x, self._all_patches(x))
        shape = (len(x), self.latent_dim, self.grid, self.grid)            # (B, d, h, w)
        return Gaussian(q.mu.reshape(shape), q.logvar.reshape(shape))

    def decode(self, z):
        """z (B, d, h, w) -> x_hat (B, 3, H, W), the mode of p(x|z), about [-1, 1], not clamped."""
        return self.decode_tokens(z.flatten(2), self._all_patches(z))

    def _all_patches(self, x):
        return torch.arange(self.grid**2, device=x.device).expand(len(x), -1)

    @property
    def last_layer(self):
        """The weight nearest to the pixels, on which the adversarial loss is scaled."""
        return self.decoder_pred.conv_smoother.weight

# ---- Errors, processes ------------------------------------------------------------------------

class InputError(ValueError):
    """The user gave something that cannot be used. The message is one sentence that says what."""

# One process per GPU under torchrun, which sets these; otherwise process 0 of 1.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

def say(text):
    """Print, in process 0 only."""
    if RANK == 0:
        print(text)

def agree(value):
    """Wait for all processes -> the smallest of their values. They exchange them on the CPU, so
    that no process waits for its GPU."""
    smallest = torch.tensor(value, dtype=torch.float64)
    if WORLD > 1:
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
    return type(value)(smallest.item())

def from_first(function):
    """What function() returns in process 0, for all processes."""
    box = [function() if RANK == 0 else None]
    if WORLD > 1:
        dist.broadcast_object_list(box)
    return box[0]

# ---- Sizes, positions, checkpoints ------------------------------------------------------------

# Rows of VMAE's arguments, without img_size. tiny: the default run, 32 px on a CPU. small: small
# photographs on a CPU. base: the paper's f8d16 (patches of 8 pixels, d = 16); at 256 px it holds
# 11.19 M numbers, of which 10.80 M are learned and the rest are fixed positions.
sizes = {
    "tiny": dict(patch_size=4, embed_dim=128, depth=2, num_heads=4, latent_dim=16),
    "small": dict(patch_size=8, embed_dim=192, depth=3, num_heads=6, latent_dim=16),
    "base": dict(patch_size=8, embed_dim=192, depth=12, num_heads=12, latent_dim=16)}

def resize_positions(weights, model):
    """Weights trained at another image size -> the same with positions for `model`'s grid: sines at
    places spread over the trained grid, which the authors' bilinear resize approximates. On faces
    of twice the training size both reach 35.0 dB; places beyond the trained grid reach 23.6 dB."""
    old = weights.get("pos_embed")
    if old is None or old.shape[1] == model.grid**2:       # a convolution has no positions
        return weights
    new = sincos_positions(old.shape[2], model.grid, math.isqrt(old.shape[1]))
    return {**weights, "pos_embed": new, "decoder_pos_embed": new}

def drop_variance(model):
    """For lambda_reg = 0: shrink q(z|x) to its mean, sigma = 3e-7. Gaussian clamps a logvar of -40
    to -30; below the clamp the gradient is zero, so training leaves these weights alone (weight
    decay acts on the matrix, which is zero, and not on the bias)."""
    last = model.to_latent if isinstance(model, VMAE) else model.encoder.conv_out
    last.weight.data[model.latent_dim:] = 0
    last.bias.data[model.latent_dim:] = -40

@contextlib.contextmanager
def whole_file(path):
    """A file to write that appears whole or not at all: it has a temporary name until the block
    ends, so that a crash or a full disk leaves the previous file. An OSError names the path."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())         # otherwise a power cut could leave the new file empty
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:
            error.filename = error.filename or str(path)
        raise

def save_checkpoint(path, **entries):
    """Write one dict of tensors and plain values, whole or not at all."""
    with whole_file(path) as file:
        try:
            torch.save(entries, file)
        except RuntimeError as error:       # it hides the system's error, such as a full disk
            raise error.__context__ or error from None

def read_safetensors(path):
    """A .safetensors file -> {name: tensor}. It holds the length of its header in 8 bytes, the
    header as JSON, {name: {"dtype", "shape", "data_offsets"}}, and the numbers."""
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
             "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8}
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header, data = json.loads(file.read(length)), bytearray(file.read())
    header.pop("__metadata__", None)
    return {name: torch.frombuffer(data[slice(*e["data_offsets"])], dtype=kinds[e["dtype"]])
            .view(e["shape"]) for name, e in header.items()}

def read_checkpoint(path, *needed):
    """A checkpoint's dict, on the CPU. InputError if it is missing or damaged, lacks a key or holds
    NaN. Nothing in the file is executed."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such checkpoint; training writes last.pt into its --out")
    torch.serialization.add_safe_globals([argparse.Namespace])     # the authors' files hold one
    try:
        ckpt = (read_safetensors(path) if str(path).endswith(".safetensors") else
                torch.load(path, map_location="cpu", weights_only=True))
        missing = sorted(set(needed) - ckpt.keys())
        for name in ("model_args", "train_args"):
            dict(ckpt.get(name, {}))        # raises if it is something else
        groups = [ckpt, *(ckpt.get(name) or {} for name in ("model", "ema", "state_dict"))]
        weights = [v for group in groups for v in group.values() if torch.is_tensor(v)]
        nan = not all(v.isfinite().all() for v in weights)
    except Exception:
        raise InputError(f"{path}: not a checkpoint, or a damaged one") from None
    if missing or nan:
        raise InputError(f"{path}: " + ("has weights that are infinite or NaN" if nan else
                                        f"lacks {', '.join(missing)}; give another file or --out"))
    return ckpt

def reason(error):
    """The last line of an error of torch, whose explanations are long."""
    return (str(error).strip() or repr(error)).splitlines()[-1].strip()

def build(model_args):
    """Arguments of a constructor -> VMAE or ConvAutoencoder, with random weights."""
    return ConvAutoencoder(**model_args) if "channels" in model_args else VMAE(**model_args)

def build_vmae(ckpt):
    """What read_stage_one returns -> the model with its weights, frozen, in eval mode."""
    try:
        model = build(ckpt["model_args"])
        model.load_state_dict(ckpt["model"])
    except Exception as error:
        raise InputError(f"{ckpt.get('path', 'checkpoint')}: its weights do not fit its model_args "
                         f"({reason(error)})") from None
    if not all(v.isfinite().all() for v in model.state_dict().values()):
        raise InputError(f"{ckpt.get('path', 'checkpoint')}: its weights are infinite or NaN")
    return model.eval().requires_grad_(False)

def published(path, ckpt, num_heads):
    """A checkpoint of the authors' VMAE, or of an SD3-style VAE from diffusers -> model_args and
    model, as in ours. The shapes tell all arguments but num_heads. Prints what was left over, and
    whether the mask token, which only training needs, was missing. InputError for another model."""
    try:
        weights = ckpt.get("state_dict") or ckpt.get("model") or ckpt
        weights = {k.removeprefix("module."): v for k, v in weights.items()}   # DDP's prefix
        if "encoder.conv_in.weight" in weights:
            latent_dim, last = weights["decoder.conv_in.weight"].shape[1], "resnets.1.conv2.bias"
            channels = [len(weights[k]) for k in sorted(weights)           # width of each level
                        if k.startswith("encoder.down_blocks.") and k.endswith(last)]
            args = dict(img_size=256, channels=tuple(channels), latent_dim=latent_dim)
        else:
            D, _, P, _ = weights["patch_embed.proj.weight"].shape          # (D, 3, P, P)
            depth = len({k.split(".")[1] for k in weights if k.startswith("blocks.")})
            args = dict(img_size=P * math.isqrt(weights["pos_embed"].shape[1]), patch_size=P,
                        embed_dim=D, depth=depth, num_heads=num_heads,
                        latent_dim=weights["from_latent.weight"].shape[1])
        model = build(args)
        missing, left_over = model.load_state_dict(weights, strict=False)
    except Exception as error:
        raise InputError(f"{path}: holds neither stage one, nor a published VMAE or SD3-style VAE "
                         f"({reason(error)})") from None
    if lost := set(missing) - {"mask_token"}:
        raise InputError(f"{path}: lacks {len(lost)} weights of this model, such as {min(lost)}")
    say(f"{path}: {len(weights) - len(left_over)} tensors read; missing: "
        f"{', '.join(missing) or 'none'}; left over: {', '.join(left_over) or 'none'}")
    return dict(model_args=args, model=model.state_dict())

def read_stage_one(path, num_heads=12):
    """Any checkpoint -> a dict of stage one's model_args, model and train_args, and the path.
    num_heads: of published weights, which do not say it, nor what they were trained on."""
    ckpt = read_checkpoint(path)
    if isinstance(ckpt.get("vmae"), dict):  # a checkpoint of stage two holds its stage one
        ckpt = ckpt["vmae"]
    if not {"model_args", "model"} <= ckpt.keys():
        ckpt = published(path, ckpt, num_heads)
    trained = {"data": None, "val": None, **ckpt.get("train_args", {})}
    return dict(model_args=ckpt["model_args"], model=ckpt["model"], train_args=trained, path=path)

def load_vmae(path, num_heads=12):
    """A checkpoint of either stage, or published weights -> the autoencoder, in eval mode."""
    return build_vmae(read_stage_one(path, num_heads))

# ---- Images: a folder -------------------------------------------------------------------------

EXTENSIONS = tuple(".jpg .jpeg .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm".split())
SKIPPED = (".", "grid.png", "trajectory.png")          # hidden files, and sample.py's overviews
OUTPUT = {"log.jsonl", "samples.json", "reconstruct.json", "smoothness.json", "separability.json",
          "compare.json", "neighbours.json"}           # such a folder was written by our scripts
MIN_SIDE = 8           # pixels; anything smaller is a placeholder, not a photograph
MAX_UNREADABLE = 0.01  # share of the files; a collected folder often has a few broken ones
# Pillow warns of what we read, or refuse; torchvision of arguments that it renamed, by lpips.
warnings.filterwarnings("ignore", module="PIL|torchvision")

def shown(path):
    """A path for a message, in one line: with odd characters, such as a newline, escaped."""
    return path if path.isprintable() else ascii(path)

def read_image(path, size, draft=False):
    """File -> uint8 (3, size, size): turned upright as its EXIF says, any mode to RGB, transparent
    parts white, short side resized, centre cropped. draft: decode a JPEG at 1/2, 1/4 or 1/8 of its
    size if it is still twice as large as wanted: half the time, and 51 dB against the whole."""
    with Image.open(path) as image:
        if draft:
            image.draft(None, (2 * size, 2 * size))
        with contextlib.suppress(Exception):               # damaged EXIF, but a sound picture
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):      # 16 bits, which Pillow's own conversion clips at 255
            levels = np.asarray(image).clip(0, 65535) / 257
            image = Image.fromarray(levels.round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)

def list_images(root):
    """Folder -> sorted paths of the images below it, relative to it. Left out are the files in
    SKIPPED, and folders that our scripts wrote (OUTPUT). OSError for a folder closed to us."""
    def stop(error):
        raise error

    found, seen = [], set()
    for folder, subfolders, files in os.walk(root, onerror=stop, followlinks=True):
        real, ours = os.path.realpath(folder), folder != root and OUTPUT.intersection(files)
        if ours:
            say(f"{shown(folder)}: left out, as our scripts wrote it ({min(ours)} is in it)")
        if ours or real in seen:            # a link to a parent would never end
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
        found += [Path(folder, f).relative_to(root).as_posix() for f in files
                  if f.lower().endswith(EXTENSIONS) and not f.startswith(SKIPPED)]
    return sorted(found)

class Folder:
    """The images below `root`, and which of them cannot be read.

    files: {path: [bytes, time, short side in pixels]} of those whose header is sound, all read in
    threads. run: a run folder, where an earlier call may have kept these and a list of unreadable
    files; what has the same size and time is not opened again. classes: the sub-folders of root by
    name, or none if there are fewer than two or if images lie beside them. InputError for a missing
    or empty folder, or as soon as over 1 % of all files are unreadable."""

    def __init__(self, root, run=None):
        if not os.path.isdir(root):
            raise InputError(f"{root}: no such folder; give a folder of images")
        paths, known, listed = list_images(root), {}, []
        if not paths:
            raise InputError(f"{root}: no images in it (looked for {' '.join(EXTENSIONS)})")
        self.root, self.limit = os.path.abspath(root), MAX_UNREADABLE * len(paths)
        self.unreadable, self.list = {}, Path(os.devnull)  # {path: why}; no file before `keep`
        with contextlib.suppress(OSError, ValueError, TypeError):  # no such file, damaged, no run
            of, entries = json.loads(Path(run, "images.json").read_bytes())
            known = dict(entries) if of == self.root else {}
            listed = list(map(json.loads, Path(run, "unreadable.jsonl").read_text().splitlines()))

        def entry(path):
            """-> the entry of one file, or None if it is unreadable."""
            file = os.path.join(root, path)
            try:
                stamp = [os.stat(file).st_size, os.stat(file).st_mtime_ns]
                if known.get(path, [])[:2] == stamp:
                    return known[path]
                with Image.open(file) as image:            # reads the header only
                    width, height = image.size
                if min(width, height) < MIN_SIDE or width * height > Image.MAX_IMAGE_PIXELS:
                    raise OSError(f"{width}x{height} pixels, too small or too large")
                return [*stamp, min(width, height)]
            except Exception as error:      # Pillow raises anything for what it was not made for
                self.found_unreadable(path, error)

        with ThreadPoolExecutor(16) as pool:    # more than cores, for folders on a network
            bar = tqdm(pool.map(entry, paths), f"headers of {root}", len(paths), delay=2)
            self.files = {path: entry for path, entry in zip(paths, bar) if entry}
        for path in listed:                 # found damaged before, and not changed since
            if path in self.files and self.files[path] == known.get(path):
                self.found_unreadable(path, OSError(f"as {run}/unreadable.jsonl says"))
        tops = {p.split("/")[0] if "/" in p else "" for p in self.files}   # "": in root itself
        self.classes = sorted(tops) if len(tops) > 1 and "" not in tops else []

    def keep(self, run):
        """Keep the entries in a run folder, so that a later start opens new files only, and a list
        of the unreadable files, which all processes share."""
        self.list = Path(run, "unreadable.jsonl")
        kept = {"images.json": [(self.root, self.files)], self.list.name: self.unreadable}
        for name, lines in kept.items() if RANK == 0 else ():
            with whole_file(Path(run, name)) as file:
                file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
        agree(0)                            # from here on all processes read the list and add to it

    def found_unreadable(self, path, error):
        """Name and count a file, once whatever the number of processes, threads and epochs."""
        for line in self.list.read_text().splitlines():
            self.unreadable.setdefault(json.loads(line))   # what the other processes have found
        what = f"{shown(os.path.join(self.root, path))}: unreadable ({shown(reason(error))})"
        if self.unreadable.setdefault(path, what) is not what:     # of several threads, the first
            return
        with open(self.list, "a") as file:
            print(json.dumps(path), file=file)
        count = len(self.unreadable)
        if count > self.limit:
            raise InputError(f"{what}; {count} such files are over 1 % of the folder, remove them")
        warnings.warn(f"skipped {what}, {count} so far")

def to_float(x):
    """0..255 -> [-1, 1], any shape. Until they are on the device that computes with them, images
    are uint8, in memory and on their way to a GPU."""
    return x / 127.5 - 1

class Images:
    """What ImageFolder and Faces share. data[i] is (x, y): x (3, size, size) in [-1, 1], y its
    class. Training reads data.batch([i, j, ...]): x uint8 (B, 3, size, size), y (B,)."""

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)             # ends a loop over data
        x, y = self.batch([i])
        return to_float(x[0]), y.item()

    def batches(self, numbers, B=64):
        """Yield the batches x, y of the images with these numbers, a tensor."""
        yield from (self.batch(part.tolist()) for part in numbers.split(B))

    def some(self, n):
        """The numbers (n,) of n images, always the same."""
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:n]

class ImageFolder(Images):
    """Images below `root`, recursively, with Folder's classes; y = 0 if there are none.

    split: "train", "val" or "all". The path of an image alone decides whether it is in "val", as
    about one in twenty is, so that added files move none. folder: the Folder of root, if it has
    been read. InputError as Folder's."""

    def __init__(self, root, size, split="all", folder=None):
        self.size, self.folder = size, folder or Folder(root)
        self.files, self.classes = self.folder.files, self.folder.classes
        crc = {p: zlib.crc32(os.fsencode(p)) for p in self.files}  # a random-looking number each
        held_out = {p for p in crc if crc[p] % 20 == 0} or {min(crc, key=crc.get)}
        splits = {"all": crc.keys(), "val": held_out, "train": crc.keys() - held_out}
        self.paths = sorted(splits[split])
        if not self.paths:
            raise InputError(f"{root}: one image is not enough, as one is always held out")
        number = {name: y for y, name in enumerate(self.classes)}
        self.labels = torch.tensor([number.get(p.split("/")[0], 0) for p in self.paths])
        self.draft = False                  # how to decode, see read_image

    def __len__(self):
        return len(self.paths)

    def read(self, i):
        """-> pixels, uint8 (3, size, size), and label. If the file has a sound header but damage
        further on, the next image takes its place, with its own label."""
        while True:
            file = os.path.join(self.folder.root, self.paths[i])
            try:
                return read_image(file, self.size, self.draft), self.labels[i]
            except Exception as error:
                self.folder.found_unreadable(self.paths[i], error)
            i = (i + 1) % len(self)

    def batch(self, indices):
        """B indices -> x uint8 (B, 3, size, size), y (B,). Decoded in threads: Pillow releases
        Python's lock, and processes would need shared memory and copies."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return default_collate(list(pool.map(self.read, indices)))

    def keep_pixels(self, run, allowed=True):
        """Decode all images once and keep them in the run folder -> Rows. If that is not allowed,
        or takes over nine tenths of the free disk -> self, which decodes JPEGs as drafts now."""
        self.folder.keep(run)
        rows = Rows(run, "images", self.fingerprint(), len(self), 3 * self.size**2)
        free = shutil.disk_usage(run).free
        if agree(allowed and rows.missing <= 0.9 * free):
            return rows.build("decoding", lambda a, b: self.batches(torch.arange(a, b)))
        say(f"decoding images when they are needed; a copy of all {len(self)} would take "
            f"{rows.missing / 1e6:,.1f} MB, and {run} has {free / 1e6:,.1f} MB free")
        self.draft = True
        return self

    def fingerprint(self):
        """Bytes that change whenever a file is added, removed or edited, or a label changes."""
        listing = [(p, *self.files[p][:2]) for p in self.paths]
        return ascii((self.size, self.folder.root, self.classes, listing)).encode()

class Rows:
    """n rows x with labels y, computed once and kept in a run folder in files of 16 MB. Each file
    appears whole or not at all, so that after an interruption only the missing ones are computed.
    Under torchrun each process computes its share. made_of: bytes that change with what the rows
    come from; their hash is in the files' names; files of this kind with another are deleted."""

    def __init__(self, run, kind, made_of, n, row_bytes):
        key = hashlib.sha256(made_of).hexdigest()[:16]
        self.n, self.step = n, 2 * max(1, 2**23 // row_bytes)      # rows per file, even: mirrors
        self.files = {first: Path(run, f"{kind}_{key}_{first}.pt")
                      for first in range(0, n, self.step)}
        self.missing = row_bytes * sum(min(self.step, n - first) for first, file
                                       in self.files.items() if not file.exists())
        for file in list(Path(run).iterdir()):
            if re.fullmatch(rf"{kind}_(?!{key})[0-9a-f]{{16}}_\d+\.pt(\.tmp)?", file.name):
                file.unlink(missing_ok=True)               # another process may be faster

    def __len__(self):
        return self.n

    def batch(self, numbers):
        """B numbers of rows -> x (B, ...), y (B,)."""
        rows = [(self.maps[i // self.step], i % self.step) for i in numbers]
        return default_collate([(file["x"][i], file["y"][i]) for file, i in rows])

    def build(self, what, make):
        """Compute what is missing -> self. make(first, last) yields batches x, y of the rows from
        `first` to `last` - 1. InputError if the disk has no room."""
        folder = self.files[0].parent
        if self.missing > (free := shutil.disk_usage(folder).free):
            raise InputError(f"{folder}: needs {self.missing / 1e6:,.1f} MB, {free / 1e6:,.1f} MB "
                             f"are free; make room, or give another --out")
        if self.missing:
            say(f"{what} {self.n} images, kept in {folder}: {self.missing / 1e6:,.1f} MB")
        mine = [first for first in list(self.files)[RANK::WORLD] if not self.files[first].exists()]
        for first in tqdm(mine, what, dynamic_ncols=True, disable=not mine or RANK > 0):
            x, y = map(torch.cat, zip(*make(first, min(first + self.step, self.n))))
            save_checkpoint(self.files[first], x=x, y=y)
        agree(0)                            # waits for the other processes
        self.maps = []
        for file in self.files.values():
            try:
                self.maps.append(torch.load(file, weights_only=True, mmap=True))
            except Exception as error:
                raise InputError(f"{file}: damaged, delete it ({reason(error)})") from None
        return self

# ---- Images: the built-in faces ---------------------------------------------------------------

# The paper's three levels, which are known of each face:
OBJECTS = ("bear", "cat", "human", "robot")                    # 1. its kind, the class label
PARTS = ("background", "hair/ears", "skin", "eyes", "mouth")   # 2. the part at each pixel
PATTERNS = ("plain", "stripes", "dots")                        # 3. the texture of the skin
FACES_TRAIN, FACES_VAL = 16384, 1024

def hsv(h, s, v):
    """Hue, saturation, value in [0, 1], each (B, 1, 1) -> RGB in [0, 1], (B, 3, 1, 1)."""
    n = torch.tensor([5.0, 3.0, 1.0]).view(1, 3, 1, 1)     # red, green, blue on the colour wheel
    h, s, v = h.unsqueeze(1), s.unsqueeze(1), v.unsqueeze(1)               # (B, 1, 1, 1) each
    k = (n + 6 * h) % 6                                                    # (B, 3, 1, 1)
    return v - v * s * torch.minimum(k, 4 - k).clamp(0, 1)

class Faces(Images):
    """Procedural faces; the class is the object. Face number i of a seed is the same everywhere.
    The first FACES_TRAIN are for training, the next FACES_VAL are held out. `render` also returns
    pattern and parts."""

    def __init__(self, size, split="train", seed=0):
        self.size, self.seed, self.classes, self.kept = size, seed, list(OBJECTS), {}
        self.first, self.count = (0, FACES_TRAIN) if split == "train" else (FACES_TRAIN, FACES_VAL)

    def __len__(self):
        return self.count

    def batch(self, indices):
        """B indices -> x uint8 (B, 3, size, size), y (B,). Keeps what it renders, up to 256 MB, as
        rendering took a seventh of a training step."""
        if len(self.kept) * 3 * self.size**2 > 2**28:
            self.kept.clear()
        numbers = [int(i) for i in indices]
        if new := [i for i in numbers if i not in self.kept]:
            x, y, _, _ = self.render(new)
            self.kept.update(zip(new, zip(to_uint8(x), y)))
        return default_collate([self.kept[i] for i in numbers])

    def fingerprint(self):
        """Bytes that change whenever the rendered faces change."""
        return self.render(range(8))[0].numpy().tobytes() + f"{self.first} {self.count}".encode()

    def render(self, indices):
        """B indices -> x (B, 3, S, S) in [-1, 1], object (B,), pattern (B,), part (B, S, S).

        We paint from back to front with one brush, the superellipse |x/a|^n + |y/b|^n <= 1. n = 1
        is a diamond (a cat's ear), 2 an ellipse, 8 a rounded box (a robot). As a function of |x| it
        paints both ears, or both eyes, at once. Edges fade over one pixel, against aliasing."""
        S, B = self.size, len(indices)
        u = np.stack([np.random.Generator(np.random.Philox(key=[self.seed, self.first + int(i)]))
                      .random(40, dtype=np.float32) for i in indices])
        u = torch.from_numpy(u).T.reshape(40, B, 1, 1)     # 40 random numbers per face

        def uniform(k, low, high):          # random number k of each face, scaled to [low, high]
            return low + (high - low) * u[k]

        kind = uniform(0, 0, 4).long().clamp(max=3)        # (B, 1, 1), as all that follow
        pattern = uniform(1, 0, 3).long().clamp(max=2)

        def by_kind(bear, cat, human, robot):  # one number per kind, in the order of OBJECTS
            return torch.tensor([bear, cat, human, robot], dtype=torch.float32)[kind]

        # The image is [-1, 1] x [-1, 1], y points down; the head is moved and tilted a little.
        axis = (torch.arange(S) + 0.5) * (2 / S) - 1       # centres of the pixels, (S,)
        X, Y = axis.view(1, 1, S) - uniform(2, -.1, .1), axis.view(1, S, 1) - uniform(3, .05, .2)
        tilt = uniform(4, -.15, .15)                                       # radians
        X, Y = X * tilt.cos() + Y * tilt.sin(), Y * tilt.cos() - X * tilt.sin()    # (B, S, S)
        a = uniform(5, .54, .66)                                           # head, half width
        b = a * uniform(6, .95, 1.1) * by_kind(.95, .88, 1.12, 1.0)        # head, half height
        ground, hue = uniform(7, 0, 1), uniform(8, .2, .8)
        wall = hsv(ground, uniform(9, .15, .45), uniform(10, .75, 1.0))    # light
        skin = hsv((ground + hue) % 1, uniform(11, .35, .7), uniform(12, .65, .95))  # another hue
        hair = hsv(uniform(13, 0, 1), uniform(14, .3, .8), uniform(15, .1, .35))   # dark
        dark, white = torch.tensor(.08), torch.tensor(.97)
        human = (kind == 2).unsqueeze(1)                                   # (B, 1, 1, 1)
        image = wall * (1 + .12 * Y.unsqueeze(1))                          # (B, 3, S, S)
        part = torch.zeros(B, S, S, dtype=torch.long)      # background

        def paint(x, y, rx, ry, n, colour, label):
            """One stroke of the brush; a radius of 0 paints nothing."""
            nonlocal image, part
            x, y = x / rx.clamp(min=1e-3), y / ry.clamp(min=1e-3)
            r = (x.abs() ** n + y.abs() ** n) ** (1 / n)                   # 1 on the edge
            cover = (0.5 + (1 - r) * torch.minimum(rx, ry) * (S / 2)).clamp(0, 1) * (rx > 0)
            image = image + cover.unsqueeze(1) * (colour - image)          # over what is there
            part = torch.where(cover > 0.5, label, part)   # (B, S, S)

        # Ears, or long hair behind the head; then the head with its pattern.
        box, ears = by_kind(2, 2, 2, 8), torch.where(human, hair, skin * .7)   # robots are angular
        ear = uniform(16, .9, 1.15)
        rx, ry = a * ear * by_kind(.36, .44, .75, .16), b * ear * by_kind(.36, .72, .92, .28)
        paint(X.abs() - a * by_kind(.72, .58, .38, 1.0), Y + b * by_kind(.78, .82, .22, 0),
              rx, ry, by_kind(2, 1, 2, 8), ears, 1)
        angle, pitch, phase = uniform(17, 0, math.pi), uniform(18, .36, .5), uniform(19, 0, 1)
        along, across = X * angle.cos() + Y * angle.sin(), Y * angle.cos() - X * angle.sin()
        wave = (2 * math.pi * (along / pitch + phase)).cos()               # stripes
        dots = wave * (2 * math.pi * across / pitch).cos()                 # stripes x stripes
        texture = torch.where(pattern == 1, wave, torch.where(pattern == 2, 2 * dots - .6, -1))
        mark = uniform(20, .25, .4) * (.5 + .5 * texture.clamp(-1, 1))     # (B, S, S)
        shade = 1 - mark - .12 * (X / a) ** 2                              # darker at the cheeks
        paint(X, Y, a, b, box, skin * shade.unsqueeze(1), 2)

        # The fringe of a human or the antenna of a robot; the light muzzle of a bear or cat.
        shift = a * uniform(21, -.35, .35) * (kind == 2)
        paint(X - shift, Y + b * by_kind(0, 0, .85, 1.22), a * by_kind(0, 0, .80, .10),
              b * by_kind(0, 0, .36, .28), box, ears, 1)
        paint(X, Y - b * .45, a * by_kind(.45, .42, 0, 0), b * by_kind(.38, .30, 0, 0), 2.0,
              skin + .55 * (1 - skin), 2)

        # Eyes and pupils, which look left or right; a cat's pupils are slits.
        eye, apart, level = uniform(22, .9, 1.15), uniform(23, .9, 1.1), b * uniform(24, .12, .22)
        eye_x = a * apart * by_kind(.40, .44, .40, .44)                    # from the middle
        rx, ry = a * eye * by_kind(.21, .27, .25, .27), a * eye * by_kind(.21, .23, .19, .22)
        iris = hsv(uniform(25, 0, 1), uniform(26, .4, .9), uniform(27, .75, 1.0))
        coloured = (kind % 2 == 1).unsqueeze(1)                            # cats and robots
        paint(X.abs() - eye_x, Y + level, rx, ry, box, torch.where(coloured, iris, white), 3)
        gaze = a * uniform(28, -.06, .06)                                  # the same for both eyes
        paint((X - gaze).abs() - eye_x, Y + level - gaze.abs() / 2,
              rx * by_kind(.62, .38, .58, .45), ry * by_kind(.62, .85, .72, .45), box, dark, 3)

        # Nose, and a mouth that smiles or not: a stroke along y = bend * x^2.
        paint(X, Y - b * by_kind(.30, .30, .18, 0), a * by_kind(.17, .11, .09, 0),
              b * by_kind(.11, .09, .14, 0), by_kind(2, 1, 2, 2),
              torch.where(human, skin * .7, dark), 2)
        wide, bend = a * uniform(29, .28, .40), uniform(30, -.2, .9)
        curve = Y - b * by_kind(.58, .54, .56, .58) + bend * X**2 / a - bend * wide**2 / (2 * a)
        lips = hsv(uniform(31, .95, 1.02) % 1, uniform(32, .6, .8), uniform(33, .45, .65))
        paint(X, curve, wide, a * by_kind(.09, .08, .11, .16), box * 2,
              torch.where(human, lips, dark), 4)
        return image.clamp(0, 1) * 2 - 1, kind.flatten(), pattern.flatten(), part

# ---- Images of both kinds, and pictures -------------------------------------------------------

def open_images(data, size, val=None, run=None):
    """The options --data and --val -> the datasets (train, val): folders, or the built-in faces if
    data is None. If --val names a folder of its own, nothing of --data is held out. run: see
    Folder. Says what may surprise: images that are enlarged, sub-folders that are no classes."""
    if data is None and val is not None:
        raise InputError("--val: the built-in faces hold out their own; leave --val out")
    if data is None:
        return Faces(size, "train"), Faces(size, "val")
    here = Path(data).resolve()
    if run and Path(run).resolve() == here:
        raise InputError(f"--out {run}: is the folder of the images; give it one of its own")
    if val and (here.is_relative_to(there := Path(val).resolve()) or there.is_relative_to(here)):
        raise InputError(f"--val {val}: overlaps --data, which is trained on; keep them apart")
    folder = from_first(lambda: Folder(data, run))         # one process reads the headers
    sides = [side for _, _, side in folder.files.values()]
    if small := sum(side < size for side in sides):
        say(f"{data}: {small} of {len(sides)} images are smaller than {size} pixels and are "
            f"enlarged; the smallest has {min(sides)}")
    below = sum("/" in path for path in folder.files)
    if below and not folder.classes:
        say(f"{data}: no classes, because " + (
            f"{len(sides) - below} images lie beside its sub-folders" if below < len(sides) else
            "it has only one sub-folder; if the classes are in there, name that one with --data"))
    if val is None:
        return ImageFolder(data, size, "train", folder), ImageFolder(data, size, "val", folder)
    held_out = from_first(lambda: Folder(val))
    return ImageFolder(data, size, "all", folder), ImageFolder(val, size, "all", held_out)

def random_flip(x, generator=None):
    """Mirror half of the images, the only augmentation in stage one. (B, 3, H, W) -> the same."""
    mirrored = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) < 0.5
    return torch.where(mirrored, x.flip(-1), x)

def to_uint8(x):
    """[-1, 1] -> 0..255, rounded, any shape, for all images that are saved or measured."""
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)

def psnr(a, b):
    """PSNR = 10 log10(255^2 / MSE) in dB, (N,); infinite if equal. a, b: (N, C, H, W) in 0..255."""
    mse = ((a.double() - b.double()) ** 2).mean((1, 2, 3))
    return 10 * torch.log10(255**2 / mse)   # (N,)

def save_grid(rows, path):
    """Save rows of images in [-1, 1], each (K, 3, H, W), as one PNG; short rows end in white."""
    cells = nn.utils.rnn.pad_sequence(list(rows), True, 1.0)               # (R, K, 3, H, W)
    cells = to_uint8(F.pad(cells, (0, 2, 0, 2), value=1.0)).cpu()          # a white gap of 2
    grid = cells.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)        # (R(H+2), K(W+2), 3)
    picture = Image.fromarray(grid[:-2, :-2].numpy())
    with whole_file(path) as file:          # images below 64 px are enlarged
        ImageOps.scale(picture, max(1, 64 // rows[0].shape[-1]), Image.NEAREST).save(file, "png")

# ---- LPIPS, and where its weights come from ---------------------------------------------------

VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
VGG_LAST = "features.28.weight"             # its last convolution, by which we know the network

def load_weights(what, url, path, option, key):
    """Published weights -> (path, state dict): from the local copy `path`; without it from torch
    hub's cache; otherwise downloaded, with a check of the hash. InputError names URL, path and
    option if they cannot be had, or if they lack the entry `key`."""
    file = Path(path or Path(torch.hub.get_dir(), "checkpoints", Path(url).name))
    try:
        if not path and not file.exists():
            torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True)
        weights = dict(torch.load(file, map_location="cpu", weights_only=True))
        if key not in weights:
            raise ValueError(f"it has no {key}")
    except Exception as error:              # torch's errors are long: their first sentence
        why = (str(error) or repr(error)).splitlines()[0].split(". ")[0]
        raise InputError(f"{what}: {file} cannot be read ({why}); download {url} to that path, or "
                         f"name a copy with {option}") from None
    return file, weights

def load_lpips(vgg_weights=None):
    """The LPIPS distance of Zhang et al. 2018, frozen, in eval mode so that its dropout is off.
    vgg_weights: a local copy of VGG_URL (default: see load_weights)."""
    _, weights = load_weights("LPIPS needs VGG-16", VGG_URL, vgg_weights, "--vgg-weights", VGG_LAST)
    net = import_lpips().LPIPS(net="vgg", pnet_rand=True, verbose=False)
    net.net.load_state_dict({name: weights["features." + name.split(".", 1)[1]]
                             for name in net.net.state_dict()})            # "slice3.10.bias" etc.
    return net.eval().requires_grad_(False)

def import_lpips():
    """The lpips package, even beside a torchvision that was built for another torch. Such a
    torchvision has no compiled operators, and its import stops where it describes two of them to
    torch. lpips uses none, so it is enough to declare that these two exist."""
    try:
        import lpips
    except RuntimeError:
        for op in ("torchvision::nms", "torchvision::qnms"):
            torch.library.define(op, "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import lpips
    return lpips

# ---- What the scripts share -------------------------------------------------------------------

def cli(main):
    """Run a script's main. What the user got wrong ends as one line and exit status 1."""
    if hasattr(sys.stdout, "reconfigure"):  # it fails on odd names, which stderr escapes by itself
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        status = main()                     # None, for exit status 0
    except (InputError, OSError) as error:
        named = getattr(error, "filename", None)           # the system then says why in strerror
        status = f"error: {shown(str(named))}: {error.strerror}" if named else f"error: {error}"
    except torch.OutOfMemoryError:
        status = "error: the device is out of memory; give a smaller --size, --model or --batch"
    except KeyboardInterrupt:
        status = "stopped"
    except SystemExit as stop:
        status = stop.code
    except RuntimeError as error:
        if WORLD == 1 or not re.search("gloo|nccl|peer|store", str(error), re.IGNORECASE):
            raise
        gone = re.search("reset|closed|abort", str(error), re.IGNORECASE)  # that one says why
        status = f"process {RANK} stops, {'because another one did' if gone else reason(error)}"
    if WORLD > 1:                           # at once: the usual end may abort in gloo's threads
        if isinstance(status, str):
            print(status, file=sys.stderr)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(int(bool(status)))
    sys.exit(status)

def start(name):
    """--device -> torch.device. Nothing here touches CUDA if the user asks for the CPU. Under
    torchrun the process also joins its group, and takes one GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda:") and WORLD > 1:
        raise InputError(f"--device {name}: under torchrun each process takes a GPU; give cuda")
    if name == "cuda" and WORLD > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = (probe := torch.zeros(1, device=name)).device
        probe.item()                        # "meta" has tensors, but no numbers in them
    except (RuntimeError, AssertionError, ImportError):
        raise InputError(f"--device {name}: torch finds no such device, try cpu") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if WORLD > 1 and not dist.is_initialized():            # Windows has no NCCL
        nccl = device.type == "cuda" and dist.is_nccl_available()
        # If one process ends, torchrun ends all; until then they may wait for hours.
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=timedelta(days=7))
    return device

def checkpoint(path):
    """The type of options that name a checkpoint: a run folder stands for its last.pt."""
    last = os.path.join(path, "last.pt")
    return last if os.path.exists(last) else path

ABOVE_0 = ("size", "batch", "micro", "steps", "lr", "save_every", "n", "clip", "shift")
AT_MOST = dict(mask=1, whole=1, drop=1, eta=1, interval=1, seed=2**32 - 1)

def check(args):
    """Refuse numbers out of range, NaN and infinity -> args. In all scripts the options in ABOVE_0
    must be above 0, all others at least 0, and those in AT_MOST at most their value there."""
    for name, values in vars(args).items():
        allowed = "above 0" if name in ABOVE_0 else "at least 0"
        allowed += f" and at most {AT_MOST[name]}" if name in AT_MOST else ""
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, (int, float)) and not (
                    0 < value <= AT_MOST.get(name, 1e300) or value == 0 and name not in ABOVE_0):
                raise InputError(f"--{name.replace('_', '-')} must be {allowed}, not {value}")
    return args

def seeded(*numbers, device="cpu"):
    """A random generator that depends on these numbers alone, such as seed, step, micro-batch."""
    state = np.random.SeedSequence(numbers).generate_state(1)      # mixes them
    return torch.Generator(device).manual_seed(int(state[0]))

def has_bfloat16(device):
    """Whether matrix products are faster in bfloat16 than in float32. CUDA: from Ampere on; older
    cards only imitate it. CPU: measured, as a list of its features cannot tell. Others: no."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)

    def seconds(dtype):                     # the best of ten: others on this machine only add
        a = torch.ones(512, 512, dtype=dtype)
        return min(timeit.repeat(lambda: a @ a, number=1, repeat=10))

    return device.type == "cpu" and seconds(torch.bfloat16) < 0.8 * seconds(torch.float32)

# ---- The convolutional autoencoder of the paper's AE, DAE, VAE and SD-VAE, with a discriminator -

def conv3(c_in, c_out):
    """A 3x3 convolution that keeps the size."""
    return nn.Conv2d(c_in, c_out, 3, padding=1)

class GroupNorm(nn.GroupNorm):
    """GroupNorm (Wu & He 2018) in 32 groups, or in C if there are fewer channels. In float32 also
    beside products in bfloat16: autocast sees to that on a GPU, but not on a CPU, where the norm in
    bfloat16 would take two thirds of a training step."""

    def __init__(self, C):
        super().__init__(min(32, C), C, eps=1e-6)

    def forward(self, x):
        return super().forward(x.float())

class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); a 1x1 convolution adapts x to another width."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(c_in), conv3(c_in, c_out)
        self.norm2, self.conv2 = GroupNorm(c_out), conv3(c_out, c_out)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))                              # (B, c_out, h, w)
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))   # (B, c_out, h, w)

class MidBlock(nn.Module):
    """At the smallest size: a residual block, attention among all pixels, a residual block."""

    def __init__(self, C):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(C, C), ResnetBlock(C, C)])
        self.attentions = nn.ModuleList([nn.ModuleDict(dict(
            group_norm=GroupNorm(C), to_q=nn.Linear(C, C), to_k=nn.Linear(C, C),
            to_v=nn.Linear(C, C), to_out=nn.Sequential(nn.Linear(C, C))))])

    def forward(self, x):
        x, attn = self.resnets[0](x), self.attentions[0]                   # (B, C, h, w)
        tokens = attn["group_norm"](x).flatten(2).transpose(1, 2)          # (B, h*w, C)
        q, k, v = (attn[name](tokens).unsqueeze(1) for name in ("to_q", "to_k", "to_v"))
        mixed = attn["to_out"](fused_attention(q, k, v).squeeze(1))        # one head; (B, h*w, C)
        return self.resnets[1](x + mixed.transpose(1, 2).reshape(x.shape))  # (B, C, h, w)

def down(C):
    """Half the size. The padding is below and on the right only, as published weights expect."""
    return nn.Sequential(named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(C, C, 3, stride=2)))

def up(C):
    """Twice the size: each pixel is repeated four times, then a convolution smooths."""
    return nn.Sequential(named(nearest=nn.Upsample(scale_factor=2), conv=conv3(C, C)))

def levels(channels, blocks, name, step):
    """One level for each width in `channels`: `blocks` residual blocks, then, except in the last
    level, step(width). `step` is down or up; published weights call it `name`."""
    rows = []
    for c_in, c_out in zip((channels[0], *channels), channels):
        resize = {name: step(c_out)} if len(rows) < len(channels) - 1 else {}
        resnets = [ResnetBlock(c_out if j else c_in, c_out) for j in range(blocks)]
        rows.append(named(resnets=nn.Sequential(*resnets), **resize))
    return nn.Sequential(*rows)

class ConvAutoencoder(nn.Module):
    """The convolutional autoencoder of Stable Diffusion 3, with VMAE's attributes and methods.
    channels: the width of each level. Each level has half the size of the one before, so that four
    levels make f8. ValueError if f does not divide the image."""

    def __init__(self, img_size=256, channels=(128, 256, 512, 512), latent_dim=16):
        super().__init__()
        self.img_size, self.latent_dim = img_size, latent_dim
        self.patch_size = f = 2 ** (len(channels) - 1)     # pixels per side of a latent cell
        if img_size % f:
            raise ValueError(f"an image size of {img_size} is not a multiple of {f}")
        self.grid, wide, narrow = img_size // f, channels[-1], channels[0]
        self.encoder = named(               # (B, 128, H, W) after conv_in, in SD3
            conv_in=conv3(3, narrow), down_blocks=levels(channels, 2, "downsamplers", down),
            mid_block=MidBlock(wide), conv_norm_out=GroupNorm(wide), silu=nn.SiLU(),
            conv_out=conv3(wide, 2 * latent_dim))          # mu | logvar
        self.decoder = named(
            conv_in=conv3(latent_dim, wide), mid_block=MidBlock(wide),     # (B, 512, h, w) in SD3
            up_blocks=levels(channels[::-1], 3, "upsamplers", up),
            conv_norm_out=GroupNorm(narrow), silu=nn.SiLU(), conv_out=conv3(narrow, 3))
        self.register_buffer("logvar_x", torch.zeros(()), persistent=False)    # as in VMAE

    def forward(self, x, mask_ratio=0.0, generator=None):
        """As VMAE.forward, but nothing is masked, because a convolution visits every pixel."""
        q = self.encode(x)
        p = Gaussian(self.decode(q.sample(generator)), self.logvar_x)
        return p, q, x.new_zeros(len(x), self.grid**2)

    def encode(self, x):
        return Gaussian(*self.encoder(x).float().chunk(2, 1))  # (B, 2d, h, w) -> mu, logvar

    def decode(self, z):
        return self.decoder(z).float()                     # (B, 3, H, W)

    @property
    def last_layer(self):
        return self.decoder.conv_out.weight

conv_sizes = {                              # the rows of `sizes`, with the same latents
    "tiny": dict(channels=(16, 32, 64), latent_dim=16),
    "small": dict(channels=(32, 64, 128, 128), latent_dim=16),
    "base": dict(channels=(128, 256, 512, 512), latent_dim=16)}            # SD3's, 83.82 M

def discriminator(img_size):
    """PatchGAN (Isola 2017): image -> scores (B, 1, h', w'), one per patch of 70 pixels (34 below
    64 px, 16 below 32 px), high if it looks real. With GroupNorm in place of BatchNorm a score does
    not depend on the other images of the batch."""
    layers = 3 if img_size >= 64 else (2 if img_size >= 32 else 1)
    net = [nn.Conv2d(3, 64, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    for i, C in enumerate((64, 128, 256)[:layers], 1):
        conv = nn.Conv2d(C, 2 * C, 4, stride=2 if i < layers else 1, padding=1)
        net += [conv, GroupNorm(2 * C), nn.LeakyReLU(0.2)]
    return nn.Sequential(*net, nn.Conv2d(2 * C, 1, 4, padding=1))          # (B, 1, h', w')

def loss_D(real, fake):
    """Hinge loss of the scores of x and x_hat: 1/2 E[max(0, 1 - D(x)) + max(0, 1 + D(x_hat))]."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())  # a scalar

def loss_G(fake, reconstruction, last_layer):
    """L_G = -E[D(x_hat)], scaled so that its gradient on the model's last layer is as long as that
    of the other losses (Esser 2021, Eq. 7; Rombach 2022). fake: the discriminator's scores of
    x_hat; reconstruction: the sum of the other losses; last_layer: the model's weight."""
    adversarial = -fake.float().mean()                     # a scalar
    a = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)[0].norm()
    b = torch.autograd.grad(adversarial, last_layer, retain_graph=True)[0].norm()
    return (a / (b + 1e-4)).clamp(max=1e4).detach() * adversarial

"""Stage one of LDMAE (Latent Diffusion Models with Masked AutoEncoders, ICCV 2025): the VMAE.

    x --patchify, mask--> x_v --encoder--> q(z|x_v) --sample--> z --decoder--> p(x|z)

The method of Section 4 comes first: patches and masks, the Gaussians q and p with L_reg, the losses
L_R, L_M, L_P and their sum L_VMAE, the transformer, the class VMAE. Then comes what the paper
compares it with, the convolutional autoencoder with its discriminator, and LPIPS, the network
inside L_P. What all scripts share stands at the end: a reader of the method can leave it out.

    python train_vmae.py --data path --mask 0.6          trains what this file defines
    vmae = load_vmae("runs/vmae")                        loads it, in a notebook for instance
    z = vmae.encode(x).mode()                            (B, 3, H, W) in [-1, 1] -> (B, d, h, w)
    x_hat = vmae.decode(z)                               and back
"""
import argparse
import contextlib
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
import sys
import threading
import timeit
import warnings
import zlib
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

# Let torch's threads wait without keeping their cores busy, so that two trainings can share a CPU
# (README, "When something looks wrong"). torch reads this while it is imported, so it has to stand
# before that.
if "OMP_WAIT_POLICY" not in os.environ:     # unless the user has decided
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps, PngImagePlugin
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
    V = math.floor(N * (1 - mask_ratio) + 1e-9)            # 10 * (1 - 0.9) is .9999..., in floats
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
        self.mu = mu
        self.logvar = logvar.clamp(-30.0, 20.0)

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
        squared_error = (x.float() - self.mu.float()) ** 2
        logvar = self.logvar.float()
        return 0.5 * (squared_error * (-logvar).exp() + logvar + math.log(2 * math.pi))

    def kl(self, kl_mean="free"):
        """L_reg = E[KL(q(z|x_v) || p(z))], the loss that smooths the latent space. Section 4.1.

        kl_mean="zero", Eq. (1): the mean is pulled to 0, too; the prior is N(0, 1), so
            KL = 1/2 sum_d (mu^2 + sigma^2 - 1 - log sigma^2)
        kl_mean="free", Section 4.4: the same without mu^2. Only the variance is pulled, towards 1.
            The means may lie anywhere, because stage two learns where they lie.

        Sum over the channels of a token, mean over tokens and batch: a scalar, in nats per token.
        With a free mean L_reg acts on sigma, the noise around one latent, and does not limit the
        scale of mu over the data. ldm.normalise sets that scale, before stage two."""
        logvar = self.logvar.float()
        kl = logvar.exp() - 1 - logvar                                     # (B, d, ...)
        if kl_mean == "zero":
            kl = kl + self.mu.float() ** 2
        return 0.5 * kl.sum(1).mean()

# ---- The losses L_R, L_M and L_P, and the sum L_VMAE; L_reg is Gaussian.kl, above -------------

def mean_nll(p, x, weight, P):
    """Mean of -log p(x|z) over the patches whose weight (B, N) is 1 -> a scalar, in nats per pixel
    value, or 0 if there is no such patch.

    With sigma = 1 this is half the squared error plus 1/2 log(2 pi) = .919, a constant without a
    gradient, which hides progress; the PSNR in the log is easier to read."""
    nll = patchify(p.nll(x), P).mean(-1)                                   # (B, N)
    return (nll * weight).sum() / weight.sum().clamp(min=1)                # a scalar, never 0 / 0

def loss_R(p, x, mask, P):
    """L_R = E[-log p(x_v|z)]: what the encoder saw must be reconstructed. Section 4.3."""
    return mean_nll(p, x, 1 - mask, P)

def loss_M(p, x, mask, P):
    """L_M = E[-log p(x_m|z)]: what the encoder did not see must be inferred. For this, z has to
    hold the object and its parts, not only pixels: hierarchical compression. Section 4.2."""
    return mean_nll(p, x, mask, P)

def loss_P(lpips_net, x, x_hat):
    """L_P = E[sum_l w_l ||psi_l(x) - psi_l(x_hat)||^2], LPIPS on VGG features. Section 4.3.

    The mean of `lpips` over the images, a scalar. Whole images are compared, as in the authors'
    code."""
    return lpips(lpips_net, x, x_hat).mean()

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

def sincos_positions(D, coordinate):
    """Fixed 2-D sin-cos positions (1, N, D): half of D for the column, half for the row. coordinate
    (grid,): where the patches of a row, or of a column, lie, in patches: 0, 1, 2...

    Frequencies 10000^(-k / (D/4)), sines before cosines (Vaswani 2017; MAE, He 2022)."""
    omega = 10000.0 ** -(torch.arange(D // 4, dtype=torch.float64) / (D // 4))     # (D/4,)
    row, column = torch.meshgrid(coordinate, coordinate, indexing="ij")    # (grid, grid) each
    column = column.reshape(-1, 1) * omega                                 # (N, D/4)
    row = row.reshape(-1, 1) * omega                                       # (N, D/4)
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], 1).float()[None]

def fused_attention(q, k, v):
    """softmax(q k^T / sqrt(D/heads)) v, each (B, heads, N, D/heads), without ever storing the N x N
    matrix. On a CPU in float32, as in bfloat16 it takes 2 to 4 times as long with its backward."""
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
        self.proj = nn.Linear(D, D)                        # joins the heads

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
        D = embed_dim
        self.img_size = img_size
        self.patch_size = patch_size
        self.latent_dim = latent_dim
        self.grid = img_size // patch_size                 # h = w
        self.register_buffer("pos_embed", sincos_positions(D, torch.arange(self.grid)))
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
            if isinstance(module, nn.Linear):              # as MAE does with these
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
        _, N, D = self.pos_embed.shape
        S = self.img_size
        visible = self.decoder_embed(self.from_latent(z.transpose(1, 2)))  # (B, V, D)
        tokens = self.mask_token.to(visible.dtype).expand(B, N, D)
        tokens = tokens.scatter(1, keep[..., None].expand(B, V, D), visible)   # (B, N, D)
        tokens = tokens + self.decoder_pos_embed           # now the masked ones know their place
        for block in self.decoder_blocks:
            tokens = block(tokens)
        return self.decoder_pred(self.decoder_norm(tokens), S, S).float()  # (B, 3, S, S)

    def encode(self, x):
        """After training: x (B, 3, H, W) in [-1, 1], nothing masked -> Gaussian over (B, d, h, w).
        InputError, a ValueError that says what to do, for what is no such x or of another size."""
        check_images(x)
        if x.shape[-2:] != (self.img_size, self.img_size):
            raise InputError(f"this model encodes {self.img_size}x{self.img_size} pixels, "
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

# The arguments of VMAE for each --model, without img_size. tiny: for 32 px. small: for small
# photographs on a CPU. base: the paper's f8d16 (patches of 8 pixels, d = 16); at 256 px it holds
# 11.19 M values, of which 10.80 M are learned and the rest are fixed positions.
sizes = {
    "tiny": dict(patch_size=4, embed_dim=128, depth=2, num_heads=4, latent_dim=16),
    "small": dict(patch_size=8, embed_dim=192, depth=3, num_heads=6, latent_dim=16),
    "base": dict(patch_size=8, embed_dim=192, depth=12, num_heads=12, latent_dim=16)}

# ---- The convolutional autoencoder of the paper's AE, DAE, VAE and SD-VAE, with a discriminator -

def conv3(c_in, c_out):
    """A 3x3 convolution that keeps the size."""
    return nn.Conv2d(c_in, c_out, 3, padding=1)

def group_norm(C):
    """GroupNorm (Wu & He 2018) in 32 groups, or in C if there are fewer channels."""
    return nn.GroupNorm(min(32, C), C, eps=1e-6)

class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); a 1x1 convolution adapts x to another width."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = conv3(c_in, c_out)
        self.norm2 = group_norm(c_out)
        self.conv2 = conv3(c_out, c_out)
        self.conv_shortcut = nn.Identity()
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))                              # (B, c_out, h, w)
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))   # (B, c_out, h, w)

class MidBlock(nn.Module):
    """At the smallest size: a residual block, attention among all pixels, a residual block. The
    modules are nested so that they have the names of published weights."""

    def __init__(self, C):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(C, C), ResnetBlock(C, C)])
        self.attentions = nn.ModuleList([nn.ModuleDict(dict(
            group_norm=group_norm(C), to_q=nn.Linear(C, C), to_k=nn.Linear(C, C),
            to_v=nn.Linear(C, C), to_out=nn.Sequential(nn.Linear(C, C))))])

    def forward(self, x):
        attn = self.attentions[0]
        x = self.resnets[0](x)                                             # (B, C, h, w)
        tokens = attn["group_norm"](x).flatten(2).transpose(1, 2)          # (B, h*w, C)
        q = attn["to_q"](tokens).unsqueeze(1)              # (B, 1, h*w, C), as there is one head
        k = attn["to_k"](tokens).unsqueeze(1)
        v = attn["to_v"](tokens).unsqueeze(1)
        mixed = attn["to_out"](fused_attention(q, k, v).squeeze(1))        # (B, h*w, C)
        return self.resnets[1](x + mixed.transpose(1, 2).reshape(x.shape))  # (B, C, h, w)

def down(C):
    """Half the size. The padding is below and on the right only, as published weights expect. The
    outer module gives them their name, downsamplers.0.conv."""
    return nn.Sequential(named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(C, C, 3, stride=2)))

def up(C):
    """Twice the size: each pixel is repeated four times, then a convolution smooths."""
    return nn.Sequential(named(nearest=nn.Upsample(scale_factor=2), conv=conv3(C, C)))

def levels(channels, n_blocks, resize_name, make_resize):
    """One level for each width in `channels`: n_blocks residual blocks, then, except in the last
    level, make_resize(width), which is `down` or `up`. Published weights call it resize_name."""
    all_levels = []
    c_in = channels[0]
    for level, c_out in enumerate(channels):
        resize = {}
        if level < len(channels) - 1:
            resize[resize_name] = make_resize(c_out)
        resnets = []
        for _ in range(n_blocks):
            resnets.append(ResnetBlock(c_in, c_out))
            c_in = c_out
        all_levels.append(named(resnets=nn.Sequential(*resnets), **resize))
    return nn.Sequential(*all_levels)

class ConvAutoencoder(nn.Module):
    """The convolutional autoencoder of Stable Diffusion 3, which is used and trained as VMAE is.
    channels: the width of each level. Each level has half the size of the one before, so that four
    levels make f8. quant: with the 1x1 convolutions that Stable Diffusion 1 and 2 have before and
    after the latent. ValueError if f does not divide the image."""

    def __init__(self, img_size=256, channels=(128, 256, 512, 512), latent_dim=16, quant=False):
        super().__init__()
        f = 2 ** (len(channels) - 1)        # pixels per side of a latent cell
        if img_size % f:
            raise ValueError(f"an image size of {img_size} is not a multiple of {f}")
        self.img_size = img_size
        self.patch_size = f
        self.latent_dim = latent_dim
        self.grid = img_size // f
        narrow = channels[0]
        wide = channels[-1]
        self.encoder = named(
            conv_in=conv3(3, narrow),                      # (B, 128, H, W) in SD3
            down_blocks=levels(channels, 2, "downsamplers", down),
            mid_block=MidBlock(wide),                      # (B, 512, h, w) in SD3
            conv_norm_out=group_norm(wide),
            silu=nn.SiLU(),
            conv_out=conv3(wide, 2 * latent_dim))          # mu | logvar
        self.decoder = named(
            conv_in=conv3(latent_dim, wide),               # (B, 512, h, w) in SD3
            mid_block=MidBlock(wide),
            up_blocks=levels(channels[::-1], 3, "upsamplers", up),
            conv_norm_out=group_norm(narrow),
            silu=nn.SiLU(),
            conv_out=conv3(narrow, 3))                     # (B, 3, H, W)
        self.quant_conv = nn.Identity()
        self.post_quant_conv = nn.Identity()
        if quant:
            self.quant_conv = nn.Conv2d(2 * latent_dim, 2 * latent_dim, 1)
            self.post_quant_conv = nn.Conv2d(latent_dim, latent_dim, 1)
        self.register_buffer("logvar_x", torch.zeros(()), persistent=False)    # as in VMAE

    def forward(self, x, mask_ratio=0.0, generator=None):
        """As VMAE.forward, but nothing is masked, because a convolution visits every pixel."""
        q = self.posterior(x)
        p = Gaussian(self.decode(q.sample(generator)), self.logvar_x)
        return p, q, x.new_zeros(len(x), self.grid**2)

    def posterior(self, x):
        """x (B, 3, H, W) -> q(z|x), a Gaussian over (B, d, h, w)."""
        moments = self.quant_conv(self.encoder(x))         # (B, 2d, h, w)
        return Gaussian(*moments.float().chunk(2, 1))

    def encode(self, x):
        """As VMAE.encode, but of any size that f divides."""
        check_images(x)
        return self.posterior(x)

    def decode(self, z):
        """z (B, d, h, w) -> x_hat (B, 3, H, W), about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(z)).float()

    @property
    def last_layer(self):
        return self.decoder.conv_out.weight

conv_sizes = {                              # as `sizes`, with the same latents
    "tiny": dict(channels=(16, 32, 64), latent_dim=16),
    "small": dict(channels=(32, 64, 128, 128), latent_dim=16),
    "base": dict(channels=(128, 256, 512, 512), latent_dim=16)}            # SD3's, 83.82 M

def discriminator(img_size):
    """PatchGAN (Isola 2017): image -> scores (B, 1, h', w'), one per patch of 70 pixels (34 below
    64 px, 16 below 32 px), high if it looks real. With GroupNorm in place of BatchNorm a score does
    not depend on the other images of the batch."""
    if img_size >= 64:
        strides = (2, 2, 1)                 # of the layers between the first and the last
    elif img_size >= 32:
        strides = (2, 1)
    else:
        strides = (1,)
    C = 64
    net = [nn.Conv2d(3, C, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    for stride in strides:
        net.append(nn.Conv2d(C, 2 * C, 4, stride=stride, padding=1))
        net.append(group_norm(2 * C))
        net.append(nn.LeakyReLU(0.2))
        C = 2 * C
    net.append(nn.Conv2d(C, 1, 4, padding=1))                              # (B, 1, h', w')
    return nn.Sequential(*net)

DISCRIMINATOR_MIN = 8                       # pixels per side; below 6 no patch is left to judge

def loss_D(real, fake):
    """Hinge loss of the scores of x and x_hat: 1/2 E[max(0, 1 - D(x)) + max(0, 1 + D(x_hat))]."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())

def loss_G(fake, others, last_layer):
    """L_G = -E[D(x_hat)], scaled so that its gradient on the model's last layer is as long as that
    of the other losses (Esser 2021, Eq. 7; Rombach 2022). fake: the discriminator's scores of
    x_hat; others: the sum of the other losses; last_layer: the model's weight."""
    adversarial = -fake.float().mean()                     # a scalar
    grad_others = torch.autograd.grad(others, last_layer, retain_graph=True)[0].norm()
    grad_adv = torch.autograd.grad(adversarial, last_layer, retain_graph=True)[0].norm()
    scale = (grad_others / (grad_adv + 1e-4)).clamp(max=1e4)  # bounds as in Esser's code
    return scale.detach() * adversarial

# ---- LPIPS, the network inside L_P ------------------------------------------------------------

LPIPS_MIN = 16                              # pixels per side, as VGG halves them four times
VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
VGG_KEY = "features.26.weight"              # of a convolution that VGG-16 has, 13 and 19 have not

def lpips(lpips_net, x, x_hat):
    """LPIPS of each image, (B,), in float32, as the lpips package computes it: the sum over five
    layers of VGG of the means over all places of w_l ||psi_l(x) - psi_l(x_hat)||^2. Zhang 2018,
    Eq. 1.

    x, x_hat: (B, 3, H, W) in [-1, 1], at least LPIPS_MIN pixels per side; gradients reach x_hat
    alone. The features may be in bfloat16 (under autocast). lpips_net: from load_lpips."""
    with torch.no_grad():                                  # x is data, and VGG is frozen
        psi = lpips_net.net(lpips_net.scaling_layer(x))    # the features of five layers
    psi_hat = lpips_net.net(lpips_net.scaling_layer(x_hat))
    values = 0.0
    for layer, distance in enumerate(lpips_net.distances):
        values = values + distance(psi[layer], psi_hat[layer]).mean((1, 2))    # (B,)
    return values

class LayerDistance(nn.Module):
    """One layer's term of L_P: the features of two images have unit length at each place, and
    their squared difference is weighted by channel, w_l (Zhang 2018, Eq. 1)."""

    def __init__(self, w):
        super().__init__()
        self.register_buffer("w", w)                       # (1, C, 1, 1)

    def forward(self, psi, psi_hat):
        """(B, C, h, w) twice -> the distance at each place, (B, h, w), in float32."""
        psi = F.normalize(psi.float(), dim=1, eps=1e-10)
        psi_hat = F.normalize(psi_hat.float(), dim=1, eps=1e-10)
        return (self.w * (psi - psi_hat) ** 2).sum(1)

def load_lpips(vgg_weights=None):
    """The LPIPS distance of Zhang et al. 2018, frozen, in eval mode so that its dropout is off.
    vgg_weights: a local copy of VGG_URL (default: see load_weights)."""
    _, weights = load_weights("LPIPS needs VGG-16", VGG_URL, vgg_weights, "--vgg-weights", VGG_KEY)
    lpips_net = import_lpips().LPIPS(net="vgg", pnet_rand=True, verbose=False)
    vgg = {}
    for name in lpips_net.net.state_dict():                # "slice3.10.bias", for example
        vgg[name] = weights["features." + name.split(".", 1)[1]]
    lpips_net.net.load_state_dict(vgg)
    lpips_net.distances = nn.ModuleList(LayerDistance(lin.model[-1].weight.detach())
                                        for lin in lpips_net.lins)
    return lpips_net.eval().requires_grad_(False)

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
    except Exception as error:              # torch, urllib and pickle raise errors of many kinds
        raise InputError(f"{what}: {file} cannot be read ({first_sentence(error)}); download {url} "
                         f"to that path, or name a copy with {option}") from None
    return file, weights

def import_lpips():
    """The lpips package, even beside a torchvision that was built for another torch. Such a
    torchvision has no compiled operators, and its import stops where it describes two of them to
    torch. lpips uses none, so it is enough to declare that these two exist."""
    try:
        import lpips
    except RuntimeError:
        for op in ("torchvision::nms", "torchvision::qnms"):
            torch.library.define(op, "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in list(sys.modules):      # what is imported by half would stay so
            if name.split(".")[0] in ("lpips", "torchvision"):
                del sys.modules[name]
        import lpips
    return lpips

# ===============================================================================================
#
#   Shared by all scripts; skip on a first reading
#
# ===============================================================================================

# ---- Errors -----------------------------------------------------------------------------------

class InputError(ValueError):
    """The user gave something that cannot be used. The message is one sentence that says what."""

def first_sentence(error):
    """The first sentence of an error's message: those of torch go on for many lines."""
    text = str(error) or repr(error)
    return text.splitlines()[0].split(". ")[0]

def last_line(error):
    """The last line of an error's message: where it lists all that did not fit, one example."""
    text = str(error).strip() or repr(error)
    return text.splitlines()[-1].strip()

def printable(path):
    """A path for a message, in one line: odd characters, such as a newline, are escaped."""
    if path.isprintable():
        return path
    return ascii(path)

# ---- Processes: torchrun starts one per GPU, number RANK of WORLD; otherwise 0 of 1 -------------

def from_launcher(name, default):
    """A number that torchrun sets in the environment. `start` refuses what is none."""
    text = os.environ.get(name, "")
    if text.isdecimal():
        return int(text)
    return default

RANK = from_launcher("RANK", 0)
WORLD = from_launcher("WORLD_SIZE", 1)

def say(text):
    """Print, in process 0 only."""
    if RANK == 0:
        print(text)

@contextlib.contextmanager
def collective():
    """Around an operation of all processes. If one of them has ended, the others get a RuntimeError
    of the network, which becomes an InputError here."""
    try:
        yield
    except RuntimeError as error:
        raise InputError(f"process {RANK} stops, because another one did "
                         f"({first_sentence(error)})") from None

def smallest(value):
    """Wait for all processes -> the smallest of their values. They exchange them on the CPU, so
    that no process waits for its GPU."""
    if WORLD == 1:
        return value
    box = torch.tensor(value, dtype=torch.float64)
    with collective():
        dist.all_reduce(box, dist.ReduceOp.MIN)
    return type(value)(box.item())

def wait_for_all():
    """Wait until all processes are here."""
    smallest(0)

def any_process(flag):
    """Whether `flag` is true in one of the processes at least."""
    return not smallest(not flag)           # unless all say no

def end_together():
    """Wait until all processes are here, then close their group. A process that ended with gloo's
    group open sometimes aborted after its last save, and torchrun then ended the others."""
    wait_for_all()
    if dist.is_initialized():
        dist.destroy_process_group()

def from_first(function):
    """What function() returns in process 0, for all processes."""
    box = [None]
    if RANK == 0:
        box = [function()]
    if WORLD > 1:
        with collective():
            dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]

# ---- Models and their weights ------------------------------------------------------------------

def build(model_args):
    """Arguments of a constructor -> VMAE or ConvAutoencoder, with random weights."""
    if "channels" in model_args:
        return ConvAutoencoder(**model_args)
    return VMAE(**model_args)

def resize_positions(weights, model):
    """Weights trained at another image size -> the same with positions for `model`'s grid. They are
    measured in patches of the old grid and stay inside it, so that new patches lie between the
    places that the model knows. (On faces of twice the training size a VMAE trained with AdamW had
    35.0 dB, and 23.6 dB if coordinates went on beyond that range; one trained with Muon has 35.2
    both ways. The authors resize the old table bilinearly, which gives the same.)"""
    old = weights.get("pos_embed")
    if old is None or old.shape[1] == model.grid**2:       # a convolution has no positions
        return weights
    old_grid = math.isqrt(old.shape[1])
    spacing = old_grid / model.grid         # between two new patches
    coordinate = (torch.arange(model.grid, dtype=torch.float64) + 0.5) * spacing - 0.5     # (grid,)
    new = sincos_positions(old.shape[2], coordinate.clamp(0, old_grid - 1))
    return {**weights, "pos_embed": new, "decoder_pos_embed": new}

def drop_variance(model):
    """For lambda_reg = 0: shrink q(z|x) to its mean, sigma = 3e-7. Sets logvar to -40; Gaussian
    clamps it to -30, and outside the clamp its gradient is zero, so it stays."""
    if isinstance(model, VMAE):
        last = model.to_latent
    elif isinstance(model.quant_conv, nn.Conv2d):
        last = model.quant_conv
    else:
        last = model.encoder.conv_out
    last.weight.data[model.latent_dim:] = 0
    last.bias.data[model.latent_dim:] = -40

# ---- Files and checkpoints --------------------------------------------------------------------

@contextlib.contextmanager
def whole_file(path, to_disk=True):
    """A file to write that appears whole or not at all: it has a temporary name until the block
    ends, so that a crash or a full disk leaves the previous file. to_disk: wait until the disk has
    it, so that a power cut does not leave an empty file either. An OSError names the path."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            if to_disk:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:
            error.filename = error.filename or str(path)
        raise

HELD = []                                   # the locks of `hold`; cli lets go of them

def hold(folder):
    """Lock a folder: until this job ends, no other may write into it. Process 0 does it, and the
    system frees the lock however the process ends. InputError if another job has it."""
    if RANK > 0:
        return
    try:
        import fcntl
    except ImportError:                     # Windows has no such locks
        return
    os.makedirs(folder, exist_ok=True)
    file = open(Path(folder, ".lock"), "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(f"--out {folder}: another job writes into it at this moment; let it end, "
                         f"or give another --out") from None
    except OSError:                         # some network disks have no locks
        pass
    HELD.append(file)

def to_json(value, **options):
    """As json.dumps, but what is NaN or infinite becomes null, as JSON has no such numbers."""
    def finite(value):
        if isinstance(value, dict):
            return {name: finite(v) for name, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(v) for v in value]
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return value

    return json.dumps(finite(value), **options)

def save_checkpoint(path, **entries):
    """Write one dict of tensors and plain values, whole or not at all."""
    with whole_file(path) as file:
        try:
            torch.save(entries, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):     # a full disk, which torch's error hides
                raise error.__context__ from None
            raise

# What diffusers calls the weights in the folder of a model, by preference.
DIFFUSERS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin",
             "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.fp16.bin")

def checkpoint_path(path):
    """A run folder -> its last.pt; a folder of diffusers, of a VAE or of a pipeline with one -> its
    weights; any other path -> the same. For options, as argparse's type."""
    for name in ("last.pt", *DIFFUSERS, *(f"vae/{name}" for name in DIFFUSERS)):
        file = os.path.join(path, name)
        if os.path.exists(file):
            return file
    return path

def read_checkpoint(path):
    """The dict in a checkpoint, ours or published, on the CPU. path: a file, or a run folder.
    Nothing in the file is executed. InputError says why it cannot be used, for instance because a
    weight is NaN."""
    path = checkpoint_path(path)
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such checkpoint; training writes last.pt into its --out")
    torch.serialization.add_safe_globals([argparse.Namespace])     # the authors' files hold one
    try:
        if str(path).lower().endswith(".safetensors"):
            ckpt = read_safetensors(path)
        else:
            ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, InputError):           # such as a forbidden file: it keeps its own message
        raise
    except Exception as error:
        raise InputError(f"{path}: {why_unreadable(path, error)}") from None
    if not isinstance(ckpt, dict):
        raise InputError(f"{path}: not a checkpoint: it holds a {type(ckpt).__name__}, not a dict")
    for name in ("model_args", "train_args", "vmae", "model", "state_dict"):
        if not isinstance(ckpt.get(name, {}), dict):
            raise InputError(f"{path}: not a checkpoint, or a damaged one: its {name} is no dict")
    stage_one = ckpt.get("vmae", {})        # inside a checkpoint of stage two
    for weights in (ckpt, ckpt.get("model"), ckpt.get("ema"), ckpt.get("state_dict"),
                    stage_one.get("model")):
        if isinstance(weights, dict):
            check_numbers(path, weights)
    return ckpt

def why_unreadable(path, error):
    """Why torch, or read_safetensors, cannot read a checkpoint. error: what it raised."""
    if Path(path).suffix.lower() not in (".pt", ".pth", ".bin", ".ckpt", ".safetensors"):
        return "not a checkpoint; give a file in .pt, .pth, .bin, .ckpt or .safetensors"
    try:
        objects = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:                       # a file of torch 1.5 or older, or none of torch's
        objects = re.findall(r"Unsupported global: GLOBAL (\S+)", str(error))
    if objects:
        return (f"not a checkpoint of weights alone: it holds Python objects "
                f"({', '.join(objects[:3])}), which are not loaded, as they might run anything; "
                f"save its state_dict by itself")
    return "not a checkpoint, or a damaged one"

def check_numbers(path, weights):
    """InputError if a tensor of the dict holds what is not finite, or no numbers to compute with:
    sparse and quantised ones, and those whose numbers are elsewhere ("meta")."""
    for name, value in weights.items():
        if not torch.is_tensor(value):
            continue
        try:
            if value.element_size() == 1:
                value = value.float()       # some kinds of float8 cannot be asked
            finite = value.isfinite().all().item()
        except RuntimeError:
            raise InputError(f"{path}: {name} is sparse, quantised or otherwise no tensor to "
                             f"compute with; save dense ones, in float32") from None
        if not finite:
            raise InputError(f"{path}: has weights that are infinite or NaN")

# The types in a .safetensors file, and what torch calls them. Those of 4 and 6 bits are no numbers
# to it.
SAFETENSORS = {
    "BOOL": "bool", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64", "I8": "int8",
    "I16": "int16", "I32": "int32", "I64": "int64", "F16": "float16", "BF16": "bfloat16",
    "F32": "float32", "F64": "float64", "C64": "complex64", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz"}

def read_safetensors(path):
    """A .safetensors file -> {name: tensor}. It holds the length of its header in 8 bytes, the
    header as JSON, {name: {"dtype", "shape", "data_offsets"}}, and the numbers. ValueError unless
    these follow each other to the end. InputError for a type that torch does not have."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        data = bytearray(file.read())
    header.pop("__metadata__", None)
    weights = {}
    read = 0                                # bytes
    for name in sorted(header, key=lambda name: header[name]["data_offsets"]):
        kind = header[name]["dtype"]
        shape = header[name]["shape"]
        start, end = header[name]["data_offsets"]
        dtype = getattr(torch, SAFETENSORS.get(kind, ""), None)
        if dtype is None:
            raise InputError(f"{path}: {name} is of the type {kind}, which torch "
                             f"{torch.__version__} does not have; convert it to F32")
        if start != read or end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} is not where the one before it ends, or not of its length")
        values = torch.empty(0, dtype=dtype)               # frombuffer takes no empty buffer
        if end > start:
            values = torch.frombuffer(data[start:end], dtype=dtype)
        weights[name] = values.view(shape)
        read = end
    if read != len(data):
        raise ValueError("it goes on after the last tensor, or is cut off")
    return {name: weights[name] for name in header}

def read_stage_one(path, num_heads=12):
    """Any checkpoint -> a dict of stage one's model_args, model and train_args, and the path.
    num_heads is used for published weights only, because their files do not hold it. What these
    were trained on is not known either: data and val are None."""
    path = checkpoint_path(path)
    ckpt = read_checkpoint(path)
    if "vmae" in ckpt:                      # a checkpoint of stage two holds its stage one
        ckpt = ckpt["vmae"]
    if "model_args" not in ckpt or "model" not in ckpt:
        ckpt = published_vmae(path, ckpt, num_heads)
    trained = {"data": None, "val": None, **ckpt.get("train_args", {})}
    return dict(model_args=ckpt["model_args"], model=ckpt["model"], train_args=trained, path=path)

def build_vmae(ckpt):
    """What read_stage_one returns -> the model with its weights, frozen, in eval mode."""
    try:
        model = build(ckpt["model_args"])
        model.load_state_dict(ckpt["model"])
    except Exception as error:
        raise InputError(f"{ckpt.get('path', 'checkpoint')}: its weights do not fit its model_args "
                         f"({last_line(error)})") from None
    return model.eval().requires_grad_(False)

def load_vmae(path, num_heads=12):
    """A checkpoint of either stage, its run folder, or published weights -> the autoencoder, in
    eval mode. InputError as read_checkpoint's."""
    return build_vmae(read_stage_one(path, num_heads))

def published_vmae(path, ckpt, num_heads):
    """A checkpoint of the authors' VMAE, or of a VAE of Stable Diffusion 1, 2 or 3, FLUX.1 or 2
    under diffusers' names -> model_args and model, as in ours. The shapes tell all arguments but
    num_heads, and the size of a VAE's images, any of which it takes. Prints what was ignored, and
    whether the mask token, which only training needs, was missing. InputError for another model."""
    try:
        weights = {}
        for name, value in (ckpt.get("state_dict") or ckpt.get("model") or ckpt).items():
            weights[name.removeprefix("module.")] = value  # DDP's prefix
        refuse_other_models(path, weights)
        if any(name.endswith("encoder.down.0.block.0.norm1.weight") for name in weights):
            raise ValueError("it has the names of the first latent diffusion code; convert it with "
                             "diffusers' AutoencoderKL.from_single_file and save_pretrained")
        if "encoder.conv_in.weight" in weights:
            weights = todays_names(weights)
            model_args = conv_args(weights)
            check_config(path, model_args["channels"])
        else:
            model_args = vit_args(weights, num_heads)
        model = build(model_args)
        missing, left_over = model.load_state_dict(weights, strict=False)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: holds neither stage one, nor a published VMAE or VAE of Stable "
                         f"Diffusion ({last_line(error)})") from None
    check_weights(path, weights, missing, left_over)
    return dict(model_args=model_args, model=model.state_dict())

# Names of weights that only these autoencoders have.
OTHER_MODELS = {
    r"encoder\..*\.gamma": "Qwen-Image or Wan", r"encoder\.down_blocks\.0\.norm1\.": "HunyuanImage",
    r"encoder\.down_blocks\.0\.0\.": "DC-AE", r"decoder\..*\.conv_y\.": "KVAE",
    r"decoder\.decoder_embed\.": "RAE", r"encoder\.layers\.0\.": "TAESD",
    r"encoder\.conv_in\.conv\.": "a model of video", r"quantize\.embedding\.": "VQGAN"}

def refuse_other_models(path, weights):
    """InputError if the names of the weights are those of an autoencoder that is not ours, or if
    config.json says so."""
    model = diffusers_config(path).get("_class_name", "AutoencoderKL")
    if model in ("AutoencoderKL", "AutoencoderKLFlux2"):
        model = None
    for pattern, other in OTHER_MODELS.items():
        if model is None and any(re.match(pattern, name) for name in weights):
            model = other
    if model is not None:
        raise InputError(f"{path}: is the autoencoder of {model}, which is none of those that are "
                         f"computed here (README, Published weights)")

def diffusers_config(path):
    """What the config.json of diffusers beside these weights says, {} without one."""
    try:
        config = json.loads(Path(path).with_name("config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    if isinstance(config, dict) and "_class_name" in config:
        return config
    return {}                               # another program's

def check_config(path, channels):
    """What the shapes of a VAE do not tell: InputError if config.json says that it computes
    something else than ConvAutoencoder of these widths; a line if there is none."""
    config = diffusers_config(path)
    if not config:
        say(f"{path}: no config.json beside it; that its norms have 32 groups and its activation "
            f"is SiLU could not be checked")
    groups = config.get("norm_num_groups", 32)
    activation = config.get("act_fn", "silu")
    if config and any(groups != min(32, C) for C in channels):
        raise InputError(f"{path}: its norms have {groups} groups, by config.json; 32 are computed "
                         f"here, so it is another model")
    if activation not in ("silu", "swish"):
        raise InputError(f"{path}: its activation is {activation}, by config.json; SiLU is "
                         f"computed here, so it is another model")

# What published files may hold beside the model, by the beginning of the name, and what they may
# lack, because only training needs it. bn: FLUX.2's statistics of its latents for its generator.
IGNORED = ("perceptual", "lpips", "loss", "discriminator", "model_ema", "bn.running_",
           "bn.num_batches_tracked")
MAY_LACK = {"mask_token"}

def check_weights(path, weights, missing, left_over):
    """Print what was read from published weights, and what was ignored on purpose. missing,
    left_over: names, as load_state_dict returns them. InputError if a weight is missing, or if one
    has no place in our model, which would then compute something else."""
    needed = set(missing) - MAY_LACK
    if needed:
        raise InputError(f"{path}: lacks {len(needed)} weights of this model, such as "
                         f"{min(needed)}")
    unexpected = [name for name in left_over if not name.startswith(IGNORED)]
    if unexpected:
        raise InputError(f"{path}: {len(unexpected)} of its weights have no place in this model, "
                         f"such as {unexpected[0]}, so it is another one")
    say(f"{path}: {len(weights) - len(left_over)} tensors read; missing: "
        f"{', '.join(missing) or 'none'}; ignored: {', '.join(left_over) or 'none'}")

def todays_names(weights):
    """Weights of a VAE -> the same under diffusers' names of today: in 2022 the parts of attention
    had others, and its matrices were 1x1 convolutions in some files."""
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    renamed = {}
    for name, value in weights.items():
        before, _, part = name.partition(".attentions.0.")
        part, _, kind = part.rpartition(".")               # "query", "weight"
        if part in names:
            name = f"{before}.attentions.0.{names[part]}.{kind}"
        if part in (*names, *names.values()) and value.ndim == 4:
            value = value.flatten(1)                       # (C, C, 1, 1) -> (C, C)
        renamed[name] = value
    return renamed

def conv_args(weights):
    """Weights under diffusers' names -> the arguments of ConvAutoencoder."""
    channels = []                           # the width of each level
    for name in sorted(weights):
        if name.startswith("encoder.down_blocks.") and name.endswith("resnets.1.conv2.bias"):
            channels.append(len(weights[name]))
    model_args = dict(img_size=256, channels=tuple(channels),
                      latent_dim=weights["decoder.conv_in.weight"].shape[1])
    if "quant_conv.weight" in weights:
        model_args["quant"] = True
    return model_args

def vit_args(weights, num_heads):
    """Weights under the authors' names -> the arguments of VMAE."""
    D, _, P, _ = weights["patch_embed.proj.weight"].shape  # (D, 3, P, P)
    grid = math.isqrt(weights["pos_embed"].shape[1])
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    return dict(img_size=P * grid, patch_size=P, embed_dim=D, depth=depth, num_heads=num_heads,
                latent_dim=weights["from_latent.weight"].shape[1])

# ---- Images: what a data set is ---------------------------------------------------------------

def to_float(x):
    """0..255 -> [-1, 1], any shape. Until they are on the device that computes with them, images
    are uint8, in memory and on their way to a GPU."""
    return x / 127.5 - 1

def to_uint8(x):
    """[-1, 1] -> 0..255, rounded, any shape, for all images that are saved or measured."""
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)

def random_flip(x, generator=None):
    """Mirror half of the images, the only augmentation in stage one. (B, 3, H, W) -> the same."""
    mirrored = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) < 0.5
    return torch.where(mirrored, x.flip(-1), x)

def check_images(x):
    """ValueError, which says what to do, unless x is (B, 3, H, W) in about [-1, 1]."""
    if not torch.is_tensor(x):
        raise InputError(f"x is a {type(x).__name__}: give a tensor, for a file "
                         f"to_float(read_image(path, size))[None]")
    if not x.is_floating_point():
        raise InputError(f"x is {str(x.dtype).removeprefix('torch.')}: give to_float(x)")
    if x.ndim == 3:
        raise InputError(f"x has the shape {tuple(x.shape)}: give a batch, for one image x[None]")
    if x.ndim != 4 or x.shape[1] != 3:
        raise InputError(f"x has the shape {tuple(x.shape)}: give (B, 3, H, W), with 3 colours")
    if x.device.type != "meta" and x.abs().max() > 20:     # noise may reach some units
        raise InputError(f"x reaches {x.abs().max():.0f}: images are in [-1, 1]; give to_float(x) "
                         f"if it is in 0..255")

class Images:
    """A data set. ImageFolder and Faces are two; to make one of your own, derive a class that has

        size              pixels per side
        classes           names of the classes, or an empty list
        __len__()         the number of images
        batch(indices)    B indices, a list -> x uint8 (B, 3, size, size), y (B,), their classes
        made_of()         a text that changes whenever the images do: caches are named after it

    and put it into a Python file with a function open_images(size) that returns two of them, to
    train on and held out. The file's name is then given as --data, to both stages and evaluate.py.

    data[i] is one image, (x, y), with x in [-1, 1]."""

    classes = []

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)             # ends a loop over data
        x, y = self.batch([i])
        return to_float(x[0]), y.item()

    def batches(self, indices, B=64):
        """Yield the batches x, y of the images with these indices, a tensor."""
        for part in indices.split(B):
            yield self.batch(part.tolist())

    def some(self, n):
        """The indices (n,) of n images, always the same."""
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:n]

class Cache:
    """The rows x, y of a data set, computed once and kept in one file of the run folder.

    Process 0 writes the file from front to back, and it gets its name when it is whole: a run that
    is killed meanwhile begins it again. All processes then map it into memory and read from there.
    The file is numpy's .npy, with one record per row. Its name ends in a hash of `made_of`, a text
    that changes with what the rows come from; files of the same kind with another hash go. n rows,
    with x of this shape and dtype; kind: the beginning of the file's name."""

    def __init__(self, folder, kind, made_of, n, shape, dtype):
        self.n = n
        self.record = np.dtype([("x", dtype, shape), ("y", np.int64)])
        self.bytes = n * self.record.itemsize
        self.folder = folder
        self.kind = kind
        self.path = Path(folder, f"{kind}_{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.npy")

    def __len__(self):
        return self.n

    def fits(self, fraction=1.0):
        """Whether the file is there, or this fraction of the free disk has room for it."""
        os.makedirs(self.folder, exist_ok=True)
        return self.path.exists() or self.bytes <= fraction * shutil.disk_usage(self.folder).free

    def open(self, verb, batches):
        """-> self, ready to be read. batches: an iterator over the rows as x, y, which is used if
        the file is not there yet; verb: what that is called, for the bar. InputError if the disk
        has no room, or if the file is damaged."""
        if RANK == 0 and not self.path.exists():
            os.makedirs(self.folder, exist_ok=True)
            self.delete_others()
            self.write(verb, batches)
        wait_for_all()
        try:
            self.rows = np.load(self.path, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise InputError(f"{self.path}: damaged, delete it ({error})") from None
        return self

    def delete_others(self):
        """Delete the files of this kind that were made of something else, and unfinished ones."""
        for file in Path(self.folder).iterdir():
            if re.fullmatch(rf"{self.kind}_[0-9a-f]{{16}}\.npy(\.tmp)?", file.name):
                file.unlink()

    def write(self, verb, batches):
        """Write all rows."""
        if not self.fits():
            free = shutil.disk_usage(self.folder).free
            raise InputError(f"{self.folder}: needs {self.bytes / 1e6:,.1f} MB, {free / 1e6:,.1f} "
                             f"MB are free; make room, or give another --out")
        say(f"{verb} {self.n} images, kept in {self.folder}: {self.bytes / 1e6:,.1f} MB")
        header = dict(descr=self.record.descr, fortran_order=False, shape=(self.n,))
        bar = tqdm(total=self.n, desc=verb, dynamic_ncols=True)
        with whole_file(self.path) as file, bar:
            np.lib.format.write_array_header_2_0(file, header)
            for x, y in batches:
                rows = np.empty(len(x), self.record)
                rows["x"] = x.numpy()
                rows["y"] = y.numpy()
                file.write(rows.tobytes())
                bar.update(len(x))

    def batch(self, indices):
        """B indices of rows -> x (B, ...), y (B,)."""
        rows = self.rows[np.asarray(indices)]              # a copy, (B,) records
        x = torch.from_numpy(np.ascontiguousarray(rows["x"]))
        y = torch.from_numpy(np.ascontiguousarray(rows["y"]))
        return x, y

def prefetch(batches):
    """Iterate over `batches` while a thread prepares the next one, so that a GPU need not wait."""
    with threads(1) as pool:
        following = pool.submit(next, batches, None)
        while True:
            batch = following.result()
            if batch is None:
                return
            following = pool.submit(next, batches, None)
            yield batch

# ---- Images: a folder -------------------------------------------------------------------------

# Formats that Pillow knows and that we do not read: of some it reads only the header, for some it
# runs another program, and some hold measurements instead of pictures.
NOT_PICTURES = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
# The extensions of all the others that the installed Pillow can open. An MPO is a JPEG to it.
Image.init()
READERS = {"MPO", *Image.OPEN} - NOT_PICTURES
EXTENSIONS = tuple(extension for extension, kind in Image.registered_extensions().items()
                   if kind in READERS)
# Beginnings of the names of files that are left out: hidden ones, and sample.py's overviews.
SKIPPED = (".", "grid.png", "trajectory.png")
OUTPUT = {"log.jsonl", "samples.json", "reconstruct.json", "smoothness.json", "separability.json",
          "compare.json", "neighbours.json"}           # such a folder was written by our scripts
# Folders of systems, which hold thumbnails, or what was deleted; in lower case.
OF_THE_SYSTEM = {"@eadir", "#recycle", "#snapshot", "@recycle", "$recycle.bin", "recycler",
                 "system volume information", "lost+found", "__macosx"}
# Extensions of files that may hold images, but not one by one.
ARCHIVES = {".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar"}
TABLES = {".parquet", ".arrow", ".npz", ".npy", ".h5", ".hdf5", ".mat", ".pkl", ".pickle",
          ".tfrecord", ".tfrecords", ".lmdb", ".mdb", ".rec", ".csv"}
# Formats of Pillow in which more than one picture is none: layers, or other sizes of a photograph.
ONE_PICTURE = {"PSD", "MPO"}
# The system's errors that are about one file: a broken link, one that is closed to us. All others,
# such as those of a network, or too many open files, are not the file's fault.
OF_ONE_FILE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP,
               errno.EINVAL, errno.ENAMETOOLONG}
DECODING = 2           # changes with what read_image makes of a file: no older cache is used then
MIN_SIDE = 8           # pixels; anything smaller is a placeholder, not a photograph
MAX_PIXELS = 178_956_970   # a header may claim any size; Pillow's own limit can be switched off
MAX_TEXT = 2**26       # bytes of each text or profile in a PNG, see Reading
PIXELS_AT_ONCE = 2**27     # that all threads decode together: half a GB, in up to three copies
BITS_PER_SAMPLE = 258  # the numbers of three tags in a TIFF
PHOTOMETRIC = 262
SAMPLE_FORMAT = 339
MAX_UNREADABLE = 0.01  # share of the files; a collected folder often has a few broken ones
# Two warnings that tell the user nothing: Pillow's about odd files, which are read or named, and
# torchvision's about old names of arguments, which lpips uses.
warnings.filterwarnings("ignore", module="PIL|torchvision")

class Reading:
    """What the threads that read images share: the limits of text and of pixels."""

    def __init__(self):
        self.changed = threading.Condition()
        self.files = 0                      # that are open
        self.pixels = 0                     # that are being decoded

    @contextlib.contextmanager
    def open(self, path):
        """As Pillow's open, but texts and profiles beside the pixels of a PNG may have 64 MB each,
        as drawing programs and generators of images write long ones. Pillow takes 1 MB. It has one
        limit for the whole program; the user's part of it gets that back."""
        png = PngImagePlugin
        with self.changed:
            if self.files == 0:
                self.limits = png.MAX_TEXT_CHUNK, png.MAX_TEXT_MEMORY
                png.MAX_TEXT_CHUNK = max(MAX_TEXT, png.MAX_TEXT_CHUNK)
                png.MAX_TEXT_MEMORY = max(4 * MAX_TEXT, png.MAX_TEXT_MEMORY)
            self.files += 1
        try:
            with Image.open(path) as image:
                yield image
        finally:
            with self.changed:
                self.files -= 1
                if self.files == 0:
                    png.MAX_TEXT_CHUNK, png.MAX_TEXT_MEMORY = self.limits

    @contextlib.contextmanager
    def room_for(self, pixels):
        """Wait until PIXELS_AT_ONCE is kept, as 64 threads with a photograph of 24 megapixels each
        would need 18 GB. A larger image is decoded alone."""
        pixels = min(pixels, PIXELS_AT_ONCE)
        with self.changed:
            self.changed.wait_for(lambda: self.pixels + pixels <= PIXELS_AT_ONCE)
            self.pixels += pixels
        try:
            yield
        finally:
            with self.changed:
                self.pixels -= pixels
                self.changed.notify_all()

reading = Reading()

def read_image(path, size, draft=False):
    """File -> uint8 (3, size, size): any mode to RGB, transparent parts white, centre cropped,
    short side resized, colours to sRGB by the profile in the file, turned upright as its EXIF says.
    draft: decode a JPEG at 1/2, 1/4 or 1/8 of its size if it is still twice as large as wanted:
    half the time or less, and 51 dB against the whole.

    Pixels of 8 and 16 bits are scaled by the range of their type. OSError for floats and 32 bits,
    of which a file does not tell the range, and for 12, which Pillow passes for 16."""
    with reading.open(path) as image, reading.room_for(image.width * image.height):
        drafted = None
        if draft:
            drafted = image.draft(None, (2 * size, 2 * size))
        pixels = on_white(image)
        width, height = pixels.size
        if drafted is not None:             # the picture may end within the last row and column
            _, (_, _, width, height) = drafted
        side = min(width, height)
        left = (width - side) / 2
        top = (height - side) / 2
        square = pixels.resize((size, size), Image.Resampling.BICUBIC,
                               (left, top, left + side, top + side))
        square = to_srgb(square, image.info.get("icc_profile"))
        square.info = image.info
        with contextlib.suppress(Exception):               # damaged EXIF, but a sound picture
            square = ImageOps.exif_transpose(square)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)

def on_white(image):
    """What Pillow has opened -> the whole picture with transparent parts white, in mode L, RGB or
    CMYK. OSError as read_image's."""
    # Pillow makes 32 bits of PNG and PPM of 16; elsewhere mode I may hold any range.
    sixteen_bits = image.mode.startswith("I;16")
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        sixteen_bits = True
    tags = {}
    if image.format == "TIFF":
        tags = image.tag_v2
    signed = 2 in tags.get(SAMPLE_FORMAT, ())
    if image.mode == "F" or signed or (image.mode == "I" and not sixteen_bits):
        raise OSError("its pixels are floats, or integers of 32 bits or with a sign, and a file "
                      "does not tell their range; convert it to 8 or 16 bits")
    if 12 in tags.get(BITS_PER_SAMPLE, ()):
        raise OSError("its pixels have 12 bits; convert it to 8 or 16 bits")
    # Pillow scales pixels of 2, 4 and 16 bits to 8, but not the level that a PNG calls transparent.
    transparent = image.info.get("transparency")
    if image.format == "PNG" and transparent is not None:
        bits = image.tile[0][3]             # Pillow's name for the format of the pixels
        if bits in ("L;2", "L;4"):
            image.info["transparency"] = transparent * {"L;2": 85, "L;4": 17}[bits]
        elif bits == "RGB;16B":
            image.info["transparency"] = tuple(level // 256 for level in transparent)
    if sixteen_bits:                        # Pillow's own conversion clips at 255
        levels = np.asarray(image).clip(0, 65535)
        if image.format == "TIFF" and tags.get(PHOTOMETRIC, 0) == 0:
            levels = 65535 - levels         # 0 is white, which Pillow knows of 8 bits alone
        if transparent is not None:
            levels = np.where(levels == transparent, 65535, levels)
        return Image.fromarray((levels / 257).round().astype(np.uint8))
    is_grey = image.mode in ("1", "L", "LA", "La")
    if image.mode == "La":                  # Pillow makes no RGBA of it
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if is_grey:
        return image.convert("L")
    if image.mode != "CMYK":
        return image.convert("RGB")
    return image

def to_srgb(image, profile):
    """An image in mode L, RGB or CMYK, and the bytes of its ICC profile or None -> RGB, in the
    colours of sRGB. What has a broken profile, or one for another kind of pixels, stays as it is.

    Phones take photographs in Display P3, cameras in Adobe RGB; read as sRGB their colours would be
    pale. It costs 0.2 ms per image of 64 px and 2 ms at 256 px."""
    transform = None
    if profile is not None:
        transform = srgb_transform(profile, image.mode)
    if transform is None and image.mode == "L" and profile is not None:
        image = image.convert("RGB")        # grey pixels may have a profile of colours
        transform = srgb_transform(profile, "RGB")
    if transform is None:
        return image.convert("RGB")
    return transform.apply(image)

@functools.lru_cache(8)                     # to make one takes 5 ms
def srgb_transform(profile, mode):
    """Pillow's transform of pixels in this mode to sRGB; None if the profile does not fit them, or
    if it is sRGB, which the profile does not say, but 1,024 colours show."""
    try:
        transform = ImageCms.buildTransform(ImageCms.ImageCmsProfile(io.BytesIO(profile)),
                                            ImageCms.createProfile("sRGB"), mode, "RGB")
        ramp = Image.linear_gradient("L").resize((32, 32))
        levels = [ramp, ramp.rotate(90), Image.radial_gradient("L").resize((32, 32))]
        colours = Image.merge("RGB", levels).convert(mode)
        before = np.asarray(colours.convert("RGB"), np.int16)
        change = abs(np.asarray(transform.apply(colours)) - before).max()
    except Exception:                       # of Pillow, for all that is broken in a profile
        return None
    if change <= 2:                         # of 255
        return None
    return transform

def list_images(root):
    """Folder -> sorted paths of the images below it, relative to it, and how many other files there
    are by extension, and folders of the system by name. Left out are also the files in SKIPPED, and
    folders that our scripts wrote (OUTPUT). OSError for a folder closed to us."""
    def stop(error):
        raise error

    found = []
    others = Counter()
    for folder, subfolders, files in os.walk(root, onerror=stop, followlinks=True):
        around = Path(folder).relative_to(root).parents
        ours = OUTPUT.intersection(files)
        if os.path.realpath(folder) in [os.path.realpath(Path(root, part)) for part in around]:
            subfolders.clear()              # by a link it is inside itself, and would never end
        elif ours and folder != root:
            say(f"{printable(folder)}: left out, as our scripts wrote it ({min(ours)} is in it)")
            subfolders.clear()
        else:
            others.update(f"{name}/" for name in subfolders if name.lower() in OF_THE_SYSTEM)
            subfolders[:] = sorted(name for name in subfolders if not name.startswith(".")
                                   and name.lower() not in OF_THE_SYSTEM)
            for name in files:
                if name.startswith(SKIPPED):
                    continue
                if name.lower().endswith(EXTENSIONS):
                    found.append(Path(folder, name).relative_to(root).as_posix())
                else:
                    others[Path(name).suffix.lower() or "without extension"] += 1
    return sorted(found), others

def how_to_unpack(extensions):
    """What to do with files of these extensions, which may hold images: the end of a message."""
    if ARCHIVES.intersection(extensions):
        return "; unpack it, and name the folder of the images"
    if TABLES.intersection(extensions):
        return "; save its images as .png, or read it with a Python file, see vmae.Images"
    return ""

def read_labels(root):
    """The labels that the tools of EDM and StyleGAN write into dataset.json, beside the images ->
    {path: name of the class}; {} if it says that there are none; None without such a file."""
    path = os.path.join(root, "dataset.json")
    if not os.path.isfile(path):
        return None
    try:
        labels = json.loads(Path(path).read_bytes())["labels"]
    except (ValueError, KeyError, TypeError):              # somebody else's file of this name
        return None
    try:
        return {file: str(int(label)) for file, label in labels or ()}
    except (ValueError, TypeError):
        raise InputError(f"{path}: its labels are no numbers of classes; move it away to train "
                         f"without them") from None

def cpus():
    """How many CPUs this process may use. A machine may have more, of which a container or a job
    gets some. OMP_NUM_THREADS, which torch knows, may lower their number, but 1 does not: it is
    often meant for one of many processes."""
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    if torch.get_num_threads() > 1:
        count = min(count, torch.get_num_threads())
    return count

@contextlib.contextmanager
def threads(count):
    """A pool of threads. InputError if the system does not start so many."""
    try:
        with ThreadPoolExecutor(count) as pool:
            yield pool
    except RuntimeError as error:
        if "new thread" not in str(error):
            raise
        raise InputError("the system starts no more threads for this user; end other programs, or "
                         "raise the limit (ulimit -u)") from None

class Folder:
    """The images below `root`, and which of them cannot be read.

    files: {path: (bytes, time, short side in pixels)} of those whose header is sound. class_of:
    {path: name of its class}: what dataset.json says (see read_labels), otherwise the sub-folder of
    root; "" if there are fewer than two, or if images lie beside them. classes: these names.
    several: the paths of files that hold more than one picture; cropped: of those that are no
    squares; transparent: of those that may show what lies behind them. unreadable: {path: why}.
    InputError for a missing or empty folder, or if over 1 % of all files are unreadable."""

    def __init__(self, root):
        if os.path.isfile(root):
            raise InputError(f"{root}: a file; give a folder of images"
                             f"{how_to_unpack([Path(root).suffix.lower()])}")
        if not os.path.isdir(root):
            raise InputError(f"{root}: no such folder; give a folder of images")
        paths, self.others = list_images(root)
        if not paths:
            raise InputError(f"{root}: no images in it (looked for .jpg, .png and the other "
                             f"extensions that Pillow reads); it holds "
                             f"{in_words(self.others) or 'no files'}{how_to_unpack(self.others)}")
        self.root = os.path.abspath(root)
        self.count = len(paths)
        self.unreadable = {}
        self.several = set()
        self.cropped = set()
        self.transparent = set()
        self.files = {}
        with threads(16) as pool:           # more than cores, for folders on a network
            entries = pool.map(self.header, paths)
            for path in tqdm(paths, f"headers of {root}", delay=2, disable=RANK > 0):
                entry = next(entries)
                if entry is not None:
                    self.files[path] = entry
        self.check()
        self.find_classes(read_labels(root))

    def find_classes(self, labels):
        """Set classes and class_of. labels: what read_labels returns."""
        self.labelled = labels is not None
        self.class_of = dict.fromkeys(self.files, "")
        if labels:
            without = [path for path in self.files if path not in labels]
            if without:
                raise InputError(f"{self.root}/dataset.json: has no label for {len(without)} of "
                                 f"the images, such as {without[0]}; remove them")
            self.class_of = {path: labels[path] for path in self.files}
            self.classes = sorted(set(self.class_of.values()), key=int)
            return
        tops = {path: path.split("/")[0] if "/" in path else "" for path in self.files}
        self.classes = sorted(set(tops.values()))
        if self.labelled or len(self.classes) < 2 or "" in self.classes:   # "": in root itself
            self.classes = []
        else:
            self.class_of = tops

    def header(self, path):
        """-> the entry of one file, or None if it is unreadable."""
        file = os.path.join(self.root, path)
        try:
            with reading.open(file) as image:              # reads the header only
                width, height = image.size
                with contextlib.suppress(Exception):       # what is damaged is not its first one
                    if image.format not in ONE_PICTURE and getattr(image, "is_animated", False):
                        self.several.add(path)
                if width != height:
                    self.cropped.add(path)
                if image.has_transparency_data:
                    self.transparent.add(path)
            if min(width, height) < MIN_SIDE:
                raise OSError(f"{width}x{height} pixels; each side must have {MIN_SIDE}")
            if width * height > MAX_PIXELS:
                raise OSError(f"{width}x{height} pixels; at most {MAX_PIXELS:,} are read")
            stat = os.stat(file)
            return stat.st_size, stat.st_mtime_ns, min(width, height)
        except Exception as error:          # Pillow raises anything for what it was not made for
            self.found_unreadable(path, error)
            return None

    def found_unreadable(self, path, error):
        """Count a file, once, and name it: each process names what it finds. What is not the fault
        of the file is raised again."""
        file = os.path.join(self.root, path)
        if is_out_of_memory(error):
            raise InputError(f"{printable(file)}: out of memory while it is read; give the program "
                             f"more memory, or make the images smaller") from None
        if isinstance(error, OSError) and error.errno not in (None, *OF_ONE_FILE):
            error.filename = error.filename or file
            raise error
        if path in self.unreadable:
            return
        self.unreadable[path] = printable(last_line(error))
        if not self.too_many():
            warnings.warn(f"skipped {printable(file)}: unreadable ({self.unreadable[path]}), "
                          f"{len(self.unreadable)} so far")

    def too_many(self):
        """Whether over 1 % of all files are unreadable."""
        return len(self.unreadable) > MAX_UNREADABLE * self.count

    def check(self):
        """InputError if too many files are unreadable, with the first ten."""
        if not self.too_many():
            return
        named = [f"{printable(path)} ({self.unreadable[path]})" for path in sorted(self.unreadable)]
        if len(named) > 10:
            named[10:] = [f"and {len(named) - 10} more"]
        raise InputError(f"{self.root}: {len(self.unreadable)} of {self.count} files are "
                         f"unreadable, over 1 % of the folder; remove them: {', '.join(named)}")

class ImageFolder(Images):
    """Images below `root`, recursively, with Folder's classes; y = 0 if there are none.

    split: "train", "val" (see held_out) or "all". folder: the Folder of root, if it has been read.
    InputError as Folder's."""

    def __init__(self, root, size, split="all", folder=None):
        self.size = size
        self.folder = folder or Folder(root)
        self.classes = self.folder.classes
        self.draft = False                  # how to decode, see read_image
        self.cache = None                   # of the decoded images, see keep_pixels
        paths = set(self.folder.files)
        if split == "train":
            paths = paths - self.held_out()
        elif split == "val":
            paths = self.held_out() or paths    # `describe` says if nothing is held out
        self.paths = sorted(paths)
        label = {name: y for y, name in enumerate(self.classes)}
        class_of = self.folder.class_of
        self.labels = torch.tensor([label.get(class_of[path], 0) for path in self.paths])

    def held_out(self):
        """The paths that are not trained on: about one in twenty, by a hash of the path, and one at
        least, but never the whole of a class. But for these two rules, files that are added later
        move none of the others."""
        hashes = {path: zlib.crc32(os.fsencode(path)) for path in self.folder.files}
        held_out = {path for path in hashes if hashes[path] % 20 == 0}
        if not held_out:
            held_out = {min(hashes, key=hashes.get)}
        paths_of_class = {}
        for path in sorted(hashes):
            paths_of_class.setdefault(self.folder.class_of[path], []).append(path)
        for paths in paths_of_class.values():
            if held_out.issuperset(paths):
                held_out.remove(paths[0])
        return held_out

    def __len__(self):
        return len(self.paths)

    def read(self, i):
        """-> pixels, uint8 (3, size, size), and label. If the file has a sound header but damage
        further on, the next image takes its place, with its own label. If too many have, it is
        black, and `batch` ends the run."""
        for _ in range(len(self)):
            file = os.path.join(self.folder.root, self.paths[i])
            try:
                return read_image(file, self.size, self.draft), self.labels[i]
            except Exception as error:
                self.folder.found_unreadable(self.paths[i], error)
            if self.folder.too_many():
                return torch.zeros(3, self.size, self.size, dtype=torch.uint8), self.labels[i]
            i = (i + 1) % len(self)
        raise InputError(f"{self.folder.root}: unreadable are {self.paths[i]} and all "
                         f"{len(self)} others to train on, or all that are held out")

    def decode(self, indices):
        """B indices -> x uint8 (B, 3, size, size), y (B,), from the cache if there is one. If not,
        decoded in threads: Pillow releases Python's lock, and processes would need shared memory
        and copies."""
        if self.cache is not None:
            return self.cache.batch(indices)
        with threads(cpus()) as pool:
            images = list(pool.map(self.read, indices))
        x = torch.stack([pixels for pixels, _ in images])
        y = torch.stack([label for _, label in images])
        return x, y

    def batch(self, indices):
        """The same. InputError if too many files have turned out to be unreadable."""
        x, y = self.decode(indices)
        self.folder.check()
        return x, y

    def batches(self, indices, B=64):
        """As Images.batches, but unreadable files are told of at the end, all of them."""
        for part in indices.split(B):
            yield self.decode(part.tolist())
        self.folder.check()

    def made_of(self):
        """Changes whenever a file is added, removed or edited, or a label changes."""
        listing = [(path, *self.folder.files[path][:2]) for path in self.paths]
        return ascii((DECODING, self.size, self.folder.root, self.classes, self.labels.tolist(),
                      listing))

    def cache_in(self, run):
        """The Cache in a run folder that these images have there, or would have."""
        return Cache(run, "images", self.made_of(), len(self), (3, self.size, self.size), np.uint8)

    def take_pixels(self, run):
        """If an earlier run, such as stage one, has kept these very images, `batch` reads them from
        there now on, in place of decoding them again."""
        cache = self.cache_in(run)
        if from_first(cache.path.exists):
            say(f"pixels of the images: from {cache.path}, where they are decoded")
            self.cache = cache.open("decoding", None)

    def counted(self, found):
        """Yield all images in batches, and count equal ones in `found`."""
        for x, y in self.batches(torch.arange(len(self))):
            found.update(hash(image.numpy().tobytes()) for image in x)
            yield x, y

    def say_copies(self, found, val):
        """Say how many images are exact copies, and how many of those in val, which are held out,
        are trained on too. found: from `counted`; val: None if it is not known."""
        replaced = len(self.folder.unreadable.keys() & set(self.paths))    # see read
        copies = len(self) - len(found) - replaced
        if copies > 0:
            say(f"exact copies: {copies} of the {len(self)} images are copies of another one")
        if val is None or nothing_held_out(self, val):
            return
        held_out = Counter()
        for _ in val.counted(held_out):
            pass
        trained_on = sum(held_out[key] for key in held_out if key in found)
        if trained_on > 0:
            say(f"warning: {trained_on} of the {len(val)} held-out images are copies of some that "
                f"are trained on, so what is measured on them is too good")

    def keep_pixels(self, run, allowed=True, val=None):
        """Decode all images once, into a Cache in the run folder, which `batch` reads from now on.
        If that is not allowed, or would take over nine tenths of the free disk, `batch` goes on
        decoding, JPEGs as drafts. val: the images that are held out, see say_copies."""
        cache = self.cache_in(run)
        if allowed and from_first(lambda: cache.fits(0.9)):
            found = Counter()
            self.cache = cache.open("decoding", self.counted(found))
            if found:                       # now, by this process
                self.say_copies(found, val)
            return
        say(f"decoding images when they are needed; a copy of all {len(self)} would take "
            f"{cache.bytes / 1e6:,.1f} MB in {run}")
        self.draft = True

# ---- Images: the built-in faces ---------------------------------------------------------------

# The paper's three levels, which are known of each face:
OBJECTS = ("bear", "cat", "human", "robot")                    # 1. its kind, the class label
PARTS = ("background", "hair/ears", "skin", "eyes", "mouth")   # 2. the part at each pixel
PATTERNS = ("plain", "stripes", "dots")                        # 3. the texture of the skin
FACES_TRAIN, FACES_VAL = 16384, 1024

def hsv(h, s, v):
    """Hue, saturation, value in [0, 1], each (B, 1, 1) -> RGB in [0, 1], (B, 3, 1, 1)."""
    n = torch.tensor([5.0, 3.0, 1.0]).view(1, 3, 1, 1)     # red, green, blue on the colour wheel
    k = (n + 6 * h.unsqueeze(1)) % 6                                       # (B, 3, 1, 1)
    v = v.unsqueeze(1)                                                     # (B, 1, 1, 1)
    return v - v * s.unsqueeze(1) * torch.minimum(k, 4 - k).clamp(0, 1)

class Faces(Images):
    """Procedural faces; the class is the object. Face number i of a seed is the same everywhere.
    The first FACES_TRAIN are for training, the next FACES_VAL are held out. `render` also returns
    pattern and parts."""

    def __init__(self, size, split="train", seed=0):
        self.size = size
        self.seed = seed
        self.classes = list(OBJECTS)
        if split == "train":
            self.first = 0
            self.count = FACES_TRAIN
        else:
            self.first = FACES_TRAIN
            self.count = FACES_VAL
        # Each face is rendered once and kept: rendering would be a tenth of a training step. Above
        # 73 px all faces together would take more than 256 MB, so they are rendered each time.
        self.keeps = self.count * 3 * size**2 <= 2**28
        if self.keeps:
            self.x = torch.empty(self.count, 3, size, size, dtype=torch.uint8)
            self.y = torch.empty(self.count, dtype=torch.long)
            self.rendered = torch.zeros(self.count, dtype=torch.bool)

    def __len__(self):
        return self.count

    def batch(self, indices):
        """B indices -> x uint8 (B, 3, size, size), y (B,)."""
        indices = torch.as_tensor(indices)
        if not self.keeps:
            x, y, _, _ = self.render(indices)
            return to_uint8(x), y
        new = indices[~self.rendered[indices]]
        if len(new) > 0:
            x, y, _, _ = self.render(new)
            self.x[new] = to_uint8(x)
            self.y[new] = y
            self.rendered[new] = True
        return self.x[indices], self.y[indices]

    def made_of(self):
        """Changes whenever the rendered faces change."""
        some, _, _, _ = self.render(range(8))
        return f"{self.first} {self.count} {hashlib.sha256(some.numpy().tobytes()).hexdigest()}"

    def render(self, indices):
        """B indices -> x (B, 3, S, S) in [-1, 1], object (B,), pattern (B,), part (B, S, S).

        We paint from back to front with one brush, the superellipse |x/a|^n + |y/b|^n <= 1. n = 1
        is a diamond (a cat's ear), 2 an ellipse, 8 a rounded box (a robot). As a function of |x| it
        paints both ears, or both eyes, at once. Edges fade over one pixel, against aliasing."""
        B = len(indices)
        S = self.size
        rows = []
        for i in indices:                   # 40 random numbers per face, of which 34 are used
            philox = np.random.Philox(key=[self.seed, self.first + int(i)])
            rows.append(np.random.Generator(philox).random(40, dtype=np.float32))
        u = torch.from_numpy(np.stack(rows)).T.reshape(40, B, 1, 1)

        def uniform(k, low, high):          # random number k of each face, scaled to [low, high]
            return low + (high - low) * u[k]

        kind = uniform(0, 0, 4).long().clamp(max=3)        # (B, 1, 1), as all that follow
        pattern = uniform(1, 0, 3).long().clamp(max=2)

        def by_kind(bear, cat, human, robot):  # one number per kind, in the order of OBJECTS
            return torch.tensor([bear, cat, human, robot], dtype=torch.float32)[kind]

        # The image is [-1, 1] x [-1, 1], y points down; the head is moved and tilted a little.
        axis = (torch.arange(S) + 0.5) * (2 / S) - 1       # centres of the pixels, (S,)
        right = axis.view(1, 1, S) - uniform(2, -.1, .1)                   # (B, 1, S)
        down = axis.view(1, S, 1) - uniform(3, .05, .2)                    # (B, S, 1)
        tilt = uniform(4, -.15, .15)                                       # radians
        X = right * tilt.cos() + down * tilt.sin()                         # (B, S, S)
        Y = down * tilt.cos() - right * tilt.sin()                         # (B, S, S)
        a = uniform(5, .54, .66)                                           # head, half width
        b = a * uniform(6, .95, 1.1) * by_kind(.95, .88, 1.12, 1.0)        # head, half height
        hue = uniform(7, 0, 1)              # of the wall; that of the skin is another one
        wall = hsv(hue, uniform(9, .15, .45), uniform(10, .75, 1.0))       # light
        hue = (hue + uniform(8, .2, .8)) % 1
        skin = hsv(hue, uniform(11, .35, .7), uniform(12, .65, .95))
        hair = hsv(uniform(13, 0, 1), uniform(14, .3, .8), uniform(15, .1, .35))   # dark
        dark = torch.tensor(.08)
        white = torch.tensor(.97)
        human = (kind == 2).unsqueeze(1)                                   # (B, 1, 1, 1)
        image = wall * (1 + .12 * Y.unsqueeze(1))                          # (B, 3, S, S)
        part = torch.zeros(B, S, S, dtype=torch.long)      # background

        def paint(x, y, rx, ry, n, colour, label):
            """One stroke of the brush; a radius of 0 paints nothing."""
            nonlocal image, part
            x = x / rx.clamp(min=1e-3)
            y = y / ry.clamp(min=1e-3)
            r = (x.abs() ** n + y.abs() ** n) ** (1 / n)                   # 1 on the edge
            cover = (0.5 + (1 - r) * torch.minimum(rx, ry) * (S / 2)).clamp(0, 1) * (rx > 0)
            image = image + cover.unsqueeze(1) * (colour - image)          # over what is there
            part = torch.where(cover > 0.5, label, part)   # (B, S, S)

        # Ears, or long hair behind the head; then the head with its pattern.
        box = by_kind(2, 2, 2, 8)           # robots are angular
        ears = torch.where(human, hair, skin * .7)
        ear = uniform(16, .9, 1.15)
        rx = a * ear * by_kind(.36, .44, .75, .16)
        ry = b * ear * by_kind(.36, .72, .92, .28)
        paint(X.abs() - a * by_kind(.72, .58, .38, 1.0), Y + b * by_kind(.78, .82, .22, 0),
              rx, ry, by_kind(2, 1, 2, 8), ears, 1)
        angle = uniform(17, 0, math.pi)
        pitch = uniform(18, .36, .5)
        along = X * angle.cos() + Y * angle.sin()
        across = Y * angle.cos() - X * angle.sin()
        wave = (2 * math.pi * (along / pitch + uniform(19, 0, 1))).cos()   # stripes
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
        eye = uniform(22, .9, 1.15)
        eye_x = a * uniform(23, .9, 1.1) * by_kind(.40, .44, .40, .44)     # from the middle
        level = b * uniform(24, .12, .22)
        rx = a * eye * by_kind(.21, .27, .25, .27)
        ry = a * eye * by_kind(.21, .23, .19, .22)
        iris = hsv(uniform(25, 0, 1), uniform(26, .4, .9), uniform(27, .75, 1.0))
        coloured = (kind % 2 == 1).unsqueeze(1)                            # cats and robots
        paint(X.abs() - eye_x, Y + level, rx, ry, box, torch.where(coloured, iris, white), 3)
        gaze = a * uniform(28, -.06, .06)                                  # the same for both eyes
        paint((X - gaze).abs() - eye_x, Y + level - gaze.abs() / 2,
              rx * by_kind(.62, .38, .58, .45), ry * by_kind(.62, .85, .72, .45), box, dark, 3)

        # Nose, and a mouth: a stroke along a parabola, which smiles if bend > 0, as y points down.
        paint(X, Y - b * by_kind(.30, .30, .18, 0), a * by_kind(.17, .11, .09, 0),
              b * by_kind(.11, .09, .14, 0), by_kind(2, 1, 2, 2),
              torch.where(human, skin * .7, dark), 2)
        wide = a * uniform(29, .28, .40)
        bend = uniform(30, -.2, .9)
        curve = Y - b * by_kind(.58, .54, .56, .58) + bend * X**2 / a - bend * wide**2 / (2 * a)
        lips = hsv(uniform(31, .95, 1.02) % 1, uniform(32, .6, .8), uniform(33, .45, .65))
        paint(X, curve, wide, a * by_kind(.09, .08, .11, .16), box * 2,
              torch.where(human, lips, dark), 4)
        return image.clamp(0, 1) * 2 - 1, kind.flatten(), pattern.flatten(), part

# ---- Images of both kinds, and pictures -------------------------------------------------------

def open_images(data, size, val=None, run=None):
    """The options --data and --val -> the data sets (train, val): folders, the built-in faces if
    data is None, or what a Python file defines (see Images). If --val names a folder of its own,
    nothing of --data is held out. run: the run folder, which may not be the folder of the images.
    Process 0 reads the headers of a folder for all."""
    if data is None or is_program(data):
        if val is not None:
            raise InputError("--val: goes with a folder of images alone; leave --val out")
        if data is None:
            return Faces(size, "train"), Faces(size, "val")
        return own_images(data, size)
    here = Path(data).resolve()
    if run and Path(run).resolve() == here:
        raise InputError(f"--out {run}: is the folder of the images; give it one of its own")
    if val:
        there = Path(val).resolve()
        if here.is_relative_to(there) or there.is_relative_to(here):
            raise InputError(f"--val {val}: overlaps --data, which is trained on; keep them apart")
    folder = from_first(lambda: Folder(data))
    if val is None:
        return ImageFolder(data, size, "train", folder), ImageFolder(data, size, "val", folder)
    held_out = from_first(lambda: Folder(val))
    return ImageFolder(data, size, "all", folder), ImageFolder(val, size, "all", held_out)

def is_program(data):
    """Whether --data of a training was a Python file, see Images."""
    return data is not None and data.endswith(".py")

def refuse_program(data, what_to_do):
    """InputError if a checkpoint was trained on the images of a Python file: it is not run because
    a checkpoint names it."""
    if is_program(data):
        raise InputError(f"the checkpoint was trained on {data}, a program; {what_to_do}")

def own_images(path, size):
    """Run the Python file of the user -> its data sets (train, val)."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    program = runpy.run_path(path)
    if "open_images" not in program:
        raise InputError(f"{path}: defines no function open_images(size); see vmae.Images")
    return program["open_images"](size)

def in_words(counts, most=10):
    """{"cat": 9, "dog": 3} -> "cat 9, dog 3"; of more than `most`, how many more there are."""
    texts = [f"{printable(name)} {count}" for name, count in list(counts.items())[:most]]
    if len(counts) > most:
        texts.append(f"and {len(counts) - most} more")
    return ", ".join(texts)

def describe(train, val):
    """Print what the data are, in lines that a person reads at a glance before hours of training:
    numbers, size, classes, and of a folder what was left out and what may surprise."""
    if RANK > 0:
        return
    print(f"images: {len(train)} to train on, {len(val)} held out, {train.size} x {train.size} "
          f"pixels")
    if isinstance(train, ImageFolder):
        describe_folder(train, val)
    elif train.classes:
        print(f"classes: {', '.join(train.classes)}")

def describe_folder(train, val):
    """The lines of `describe` that only a folder has."""
    folder = train.folder
    sides = [side for _, _, side in folder.files.values()]
    print(f"from {printable(folder.root)}; cropped to the square in the middle: "
          f"{len(folder.cropped)} of {len(sides)}")
    if folder.transparent:
        print(f"transparency: {len(folder.transparent)} of them may have some, which becomes white")
    small = sum(side < train.size for side in sides)
    if small > 0:
        print(f"enlarged: {small} of {len(sides)}; the smallest has {min(sides)} pixels")
    counts = torch.bincount(train.labels, minlength=len(train.classes)).tolist()
    below = sum("/" in path for path in folder.files)
    by = ""
    if folder.labelled:
        by = f", {len(train.classes)} by dataset.json"
    if train.classes:
        print(f"classes{by}: {in_words(dict(zip(train.classes, counts)))}")
    elif folder.labelled:
        print("classes: none, as dataset.json says")
    elif below == len(sides):
        print("classes: none, as there is only one sub-folder; if the classes are in there, name "
              "that one with --data")
    elif below > 0:
        print(f"classes: none, as {len(sides) - below} images lie beside the sub-folders")
    if folder.others:
        print(f"left out: {in_words(folder.others)}")
    if folder.unreadable:
        print(f"left out, unreadable: {len(folder.unreadable)}")
    if folder.several:
        print(f"more than one picture: in {len(folder.several)} files, such as "
              f"{printable(min(folder.several))}; the first is used")
    if not folder.labelled:
        doubt = doubt_about_classes(folder)
        if doubt:
            print(f"warning: {doubt}")
    if nothing_held_out(train, val):
        print("warning: too few images to hold any out, so those trained on are measured")
    some, _ = train.decode(train.some(64).tolist())
    flat = int((some.float().std((1, 2, 3)) < 2).sum())    # of 255 grey levels
    if flat > 0 and not folder.too_many():
        print(f"warning: {flat} of the {len(some)} images that were looked at are nearly constant, "
              f"such as all black; is that what they show?")

SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "pred"}

def doubt_about_classes(folder):
    """Why the sub-folders may be no classes, and what to type then; None if nothing says so."""
    names = folder.classes
    splits = {}                             # "trainA" -> "train"
    rest = {}                               # "trainA" -> ["A"]
    for name in names:
        words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", name)
        rest[name] = [word for word in words if word.lower() not in SPLITS]
        splits[name] = "".join(word.lower() for word in words if word.lower() in SPLITS)
    if "" not in splits.values() and len(set(splits.values())) > 1:
        first = min(names, key=lambda name: not splits[name].startswith("train"))
        others = [name for name in names if splits[name] != splits[first]]
        alike = [name for name in others if rest[name] == rest[first]]
        return (f"these classes look like parts of one data set; if they are, give --data "
                f"{Path(folder.root, first)} --val {Path(folder.root, (alike or others)[-1])}")
    slices = [name for name in names if re.fullmatch(r"(part|shard|batch|chunk)?[-_]?\d{4,}", name)]
    if names and slices == names and re.search(r"\d", names[0])[0] == "0":
        return (f"the sub-folders {names[0]}, {names[1]} look like slices of one data set, not "
                f"like classes; if they are, give --no-classes to train_ldm.py")
    pair = pair_of(folder)
    if pair:
        return (f"the files in {pair[0]} and {pair[1]} have the same names, as images and their "
                f"masks do; if they are pairs, give --data {Path(folder.root, pair[1])}")
    return None

def pair_of(folder):
    """Two classes of a few whose files have the same names -> their names, the one with more bytes
    last, or None. 7.jpg and 00007_hair.png are called the same. Many data sets count from 1 in each
    class; so numbers say something only if both classes have nearly all of them, and if their files
    are of another kind or size, as those of masks and thumbnails are."""
    stems = {name: set() for name in folder.classes}
    kinds = {name: set() for name in folder.classes}
    sizes = dict.fromkeys(folder.classes, 0)               # in bytes
    for path, name in folder.class_of.items():
        if name:
            stem = re.sub(r"^0*(\d+)(_[a-z_]+)?$", r"\1", Path(path).stem)
            stems[name].add(stem)
            kinds[name].add(Path(path).suffix.lower())
            sizes[name] += folder.files[path][0]
    if len(stems) > 4:
        return None
    for pair in itertools.combinations(stems, 2):
        a, b = sorted(pair, key=sizes.get)
        common = stems[a] & stems[b]
        wanted = min(len(stems[a]), len(stems[b]))
        if all(stem.isdigit() for stem in common):
            wanted = max(len(stems[a]), len(stems[b]))
            if kinds[a] == kinds[b] and sizes[b] < 2 * sizes[a]:
                continue
        if len(common) >= 0.9 * wanted:
            return a, b
    return None

def nothing_held_out(train, val):
    """Whether a folder is so small that the images trained on are also those that are measured."""
    if not isinstance(train, ImageFolder):
        return False
    return val.folder is train.folder and val.paths == train.paths

def psnr(a, b):
    """PSNR = 10 log10(255^2 / MSE) in dB, (N,); infinite if equal. a, b: (N, C, H, W) in 0..255."""
    mse = ((a.double() - b.double()) ** 2).mean((1, 2, 3))
    return 10 * torch.log10(255**2 / mse)   # (N,)

def picture(rows):
    """Rows of images, uint8 or in [-1, 1], each (K, 3, H, W) -> one picture of Pillow's, which a
    notebook shows; short rows end in white, images below 64 px are enlarged."""
    pixels = []
    for row in rows:
        if row.is_floating_point():
            row = to_uint8(row)
        pixels.append(row.cpu())
    cells = nn.utils.rnn.pad_sequence(pixels, batch_first=True, padding_value=255)
    cells = F.pad(cells, (0, 2, 0, 2), value=255)          # a white gap of 2
    grid = cells.permute(0, 3, 1, 4, 2)                                    # (R, H+2, K, W+2, 3)
    grid = grid.flatten(2, 3).flatten(0, 1)                                # (R(H+2), K(W+2), 3)
    image = Image.fromarray(grid[:-2, :-2].numpy())        # without the last gaps
    return ImageOps.scale(image, max(1, 64 // pixels[0].shape[-1]), Image.NEAREST)

def save_grid(rows, path):
    """Save rows of images, as `picture` takes them, as one PNG."""
    save_picture(picture(rows), path)

def save_picture(image, path):
    """Save a picture of Pillow's as a PNG."""
    with whole_file(path) as file:
        image.save(file, "png")

# ---- Charts -----------------------------------------------------------------------------------

# Colours of the curves of a chart, in turn. The first six are Paul Tol's bright scheme, which
# colour-blind people can tell apart.
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#999999", "#222222",
           "#ee7733", "#009988")

def plot(path, series, x_label, y_label, lines=True):
    """Save the chart of draw_plot as a PNG."""
    save_picture(draw_plot(series, x_label, y_label, lines), path)

def draw_plot(series, x_label, y_label, lines=True):
    """Series of points, {name: [(x, y), ...]} -> a chart, whose axes span all points, as a picture
    of Pillow's. lines: join the points of a series, in their order; False: a cloud of dots, whose
    outliers are left out."""
    points = []
    for curve in series.values():
        points.extend(curve)
    limits = (0, 100) if lines else (0.5, 99.5)            # percentiles
    low, high = np.percentile(np.array(points), limits, axis=0)            # (2,) each, x and y
    span = np.where(high > low, high - low, 1)
    low = np.where(high > low, low, low - 0.5)             # equal points lie in the middle

    # The axes end at x = 130 and 1230 and at y = 560 and 60 pixels; y points down.
    grid = []
    texts = [((680, 625), x_label, "mm"), ((130, 26), y_label, "lm")]
    # So many digits that neighbouring ticks, a quarter of the span apart, look different.
    digits = [max(0, 1 - math.floor(math.log10(v / 4))) for v in span]
    for i in range(5):                      # lines of the grid, with their numbers
        x = 130 + 275 * i
        y = 560 - 125 * i
        tick = low + span * i / 4
        grid.append([(x, 60), (x, 560)])
        grid.append([(130, y), (1230, y)])
        texts.append(((x, 585), f"{tick[0]:.{digits[0]}f}", "mm"))
        texts.append(((115, y), f"{tick[1]:.{digits[1]}f}", "rm"))

    curves = {}
    for name, curve in series.items():
        curves[name] = []
        for point in curve:
            u, v = (np.array(point) - low) / span          # as shares of the axes
            if max(abs(u - 0.5), abs(v - 0.5)) < 0.501:    # no outlier: inside, up to rounding
                curves[name].append((130 + 1100 * u, 560 - 500 * v))
    return draw_chart(680, grid, texts, curves, lines)

def draw_chart(height, grid, texts, curves, lines=True):
    """Curves over a grid -> a picture of Pillow's. It is drawn at twice its size, which smooths the
    lines, and all places (x, y) are pixels of that drawing, which is 1280 wide.

    grid: lists of places, which grey lines join; texts: (place, text, anchor), with Pillow's
    anchors; curves: {name: places}, joined by lines, or as dots. The names of the curves stand
    below, from `height` on."""
    image = Image.new("RGB", (1280, height + 36 * len(curves)), "white")
    pen = ImageDraw.Draw(image)
    pen.font = ImageFont.load_default(24)
    for places in grid:
        pen.line(places, "#cccccc", 2)
    for place, text, anchor in texts:
        write_text(pen, place, text, anchor)
    radius = 8 if lines else 3
    for i, (name, places) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        y = height + 36 * i
        pen.circle((40, y), 10, colour)
        write_text(pen, (64, y), name, "lm")
        if lines:
            pen.line(places, colour, 5, "curve")
        for place in places:
            pen.circle(place, radius, colour)
    return image.resize((image.width // 2, image.height // 2), Image.LANCZOS)

def write_text(pen, place, text, anchor):
    """Write a text into a drawing. A long one loses its beginning: the end of a path tells more."""
    if len(text) > 80:
        text = f"...{text[-77:]}"
    pen.text(place, text, "#333333", anchor=anchor)

def read_log(run):
    """A run folder -> the lines of its log.jsonl, dicts. InputError if there is none."""
    path = Path(run, "log.jsonl")
    if not path.is_file():
        raise InputError(f"{path}: no such file; name the folder of a run")
    lines = []
    for text in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):              # a line cut off by a power cut
            lines.append(json.loads(text))
    return lines

def save_curves(runs, path):
    """Save the curves in the logs of these run folders as one PNG: a chart for each loss, together
    with its held-out value, and one for the held-out PSNRs; three charts side by side."""
    charts = {}                             # {title: {name of a curve: its points}}
    for run in runs:
        lines = read_log(run)
        last = max([line["step"] for line in lines], default=0)
        for line in lines:
            for name, value in line.items():
                if not name.startswith(("L_", "PSNR")) or value is None:
                    continue
                title = name.removesuffix("_val")
                if name.startswith("PSNR"):
                    title = "PSNR of held-out images, dB"
                elif line["step"] <= 0.03 * last:          # losses fall too far in the first steps
                    continue
                curve = name if len(runs) == 1 else f"{name}, {run}"
                points = charts.setdefault(title, {}).setdefault(curve, [])
                points.append((line["step"], value))
    if not charts:
        return
    pictures = [draw_plot(series, "step", title) for title, series in charts.items()]
    width = max(image.width for image in pictures)
    height = max(image.height for image in pictures)
    columns = min(3, len(pictures))
    sheet = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height),
                      "white")
    for i, image in enumerate(pictures):
        sheet.paste(image, (i % columns * width, i // columns * height))
    save_picture(sheet, path)

# ---- Devices, and the command line ------------------------------------------------------------

def start(name):
    """--device -> torch.device, which is tried out, and said. Nothing here touches CUDA if the user
    asks for the CPU. Under torchrun the process takes one GPU, and joins the group of all."""
    asked = name
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    check_launcher()
    if RANK >= WORLD:                       # such a process would write nothing
        raise InputError(f"RANK={RANK} is set, but there are {WORLD} processes; unset RANK, or "
                         f"start this with torchrun")
    if name.startswith("cuda:") and WORLD > 1:
        raise InputError(f"--device {name}: under torchrun each process takes a GPU; give cuda")
    if name == "cuda" and WORLD > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            raise InputError(f"--device cuda: there are {torch.cuda.device_count()} GPUs for more "
                             f"processes than that; give torchrun one process per GPU")
    try:
        probe = torch.zeros(1, device=name)
        probe.item()                        # "meta" has tensors, but no numbers in them
    except (RuntimeError, AssertionError, ImportError) as error:
        why = f"torch cannot use the device {name} ({first_sentence(error)})"
        if asked == "auto":
            raise InputError(f"{why}; give --device cpu to do without it") from None
        raise InputError(f"--device {name}: {why}; try cpu") from None
    device = probe.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
        say(f"device: {device}, {torch.cuda.get_device_name(device)}")
    elif asked == "auto":
        say(f"device: {device}, as torch finds no GPU of NVIDIA; {torch.get_num_threads()} threads")
    else:
        say(f"device: {device}")
    if WORLD > 1 and not dist.is_initialized():
        meet(device)
    return device

def check_launcher():
    """InputError for variables of a launcher that do not belong together, or are no numbers."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        value = os.environ.get(name, "0")
        if not value.isdecimal():
            raise InputError(f"{name}={value} is set, which is no number; unset it, or start this "
                             f"with torchrun")
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        if WORLD > 1 and name not in os.environ:
            raise InputError(f"WORLD_SIZE={WORLD} is set, but {name} is not, so torchrun did not "
                             f"start this process; unset WORLD_SIZE, or start it with torchrun")

def meet(device):
    """Join the group of all processes. Who waits for the others for long says so."""
    backend = "gloo"                        # Windows has no NCCL
    if device.type == "cuda" and dist.is_nccl_available():
        backend = "cpu:gloo,cuda:nccl"
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    text = f"process {RANK} waits at {place} for the others of {WORLD} processes"
    waiting = threading.Timer(15, print, [text])
    waiting.daemon = True
    waiting.start()
    try:                                    # if one ends, torchrun ends all; they may wait long
        dist.init_process_group(backend, timeout=timedelta(days=7))
    except (RuntimeError, ValueError) as error:
        raise InputError(f"process {RANK} cannot meet the others at {place} "
                         f"({first_sentence(error)}); see MASTER_ADDR, MASTER_PORT and "
                         f"GLOO_SOCKET_IFNAME") from None
    finally:
        waiting.cancel()

def seed_of(*numbers):
    """One seed from several numbers, such as --seed, the step and the index of the micro-batch.
    numpy mixes them, so that neighbours have nothing in common."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])

def seeded(*numbers, device="cpu"):
    """A random generator that depends on these numbers alone."""
    return torch.Generator(device).manual_seed(seed_of(*numbers))

def has_bfloat16(device):
    """Whether matrix products are faster in bfloat16 than in float32. CUDA: from Ampere on; older
    cards only imitate it. CPU: measured, as a list of its features cannot tell. Others: no."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False

    def seconds(dtype):                     # the best of ten: others on this machine only add
        a = torch.ones(512, 512, dtype=dtype)
        return min(timeit.repeat(lambda: a @ a, number=1, repeat=10))

    return seconds(torch.bfloat16) < 0.8 * seconds(torch.float32)

def compile_blocks(blocks, asked_for=False):
    """Compile each of these modules in place. Equal blocks are compiled once for all of them, when
    they are first called; names of weights do not change. Without a compiler for torch, a line says
    so; if the user has asked for it, that is an InputError."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=next(blocks[0].parameters()).device))
    except Exception as error:              # of many kinds: no C++ compiler, no Triton
        why = f"torch.compile does not work here ({first_sentence(error)})"
        if asked_for:
            raise InputError(f"--compile: {why}; leave it out") from None
        say(f"{why}, so the network is slower")
        return
    for block in blocks:
        block.compile(dynamic=False)        # one graph serves one shape

def number_type(kind, least=None, above=None, most=None):
    """-> argparse's type of an option that is a number: int or float, at least `least` or above
    `above`, and at most `most`; neither NaN nor infinite."""
    limits = []
    if least is not None:
        limits.append(f"at least {least}")
    if above is not None:
        limits.append(f"above {above}")
    if most is not None:
        limits.append(f"at most {most}")

    def parse(text):
        try:
            value = kind(text)
            fits = math.isfinite(value)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"{text[:20]!r} is no number to use here") from None
        if least is not None and value < least:
            fits = False
        if above is not None and value <= above:
            fits = False
        if most is not None and value > most:
            fits = False
        if not fits:
            raise argparse.ArgumentTypeError(f"must be {' and '.join(limits)}, not {text}")
        return value

    return parse

count_type = number_type(int, least=1)      # of images, steps, pixels
positive_type = number_type(float, above=0)
weight_type = number_type(float, least=0)
fraction_type = number_type(float, least=0, most=1)
seed_type = number_type(int, least=0, most=2**32 - 1)

class Parser(argparse.ArgumentParser):
    """argparse, but a wrong option is one line, as all errors here."""

    def error(self, message):
        raise InputError(f"{message.removeprefix('argument ')}; --help lists the options")

def is_out_of_memory(error):
    """Whether an error says so. Only those of a GPU, and of Python, have a class of their own."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return any(words in text for words in ("out of memory", "can't allocate memory",
                                           "not enough memory"))

def cli(main):
    """Run a script's main. What the user got wrong ends as one line and exit status 1."""
    if hasattr(sys.stdout, "reconfigure"):  # it fails on odd names, which stderr escapes by itself
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.filename is None:
            sys.exit(f"error: {error}")
        sys.exit(f"error: {printable(str(error.filename))}: {error.strerror}")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        sys.exit("error: out of memory; give a smaller --micro, --batch or --size")
    except KeyboardInterrupt:
        sys.exit("stopped")
    finally:
        while HELD:
            HELD.pop().close()
    if dist.is_initialized():               # a training has closed the group before, see finish
        end_together()

"""Stage two of LDMAE (Latent Diffusion Models with Masked AutoEncoders, ICCV 2025): diffusion.

    training:  z_0 --q_sample--> z_t --DiT--> eps_theta(z_t, t, tau_theta(y)), compared with eps
    sampling:  z_T --ddim_sample, which calls the DiT at each step--> z_0

Section 3.2, in this order: latent normalisation, noise schedule, rectified flow, the loss L_LDM,
guidance and samplers, the diffusion transformer with tau_theta, EMA, what images are drawn from,
checkpoints. By default the network predicts v in place of eps (Schedule). Pixel diffusion, L_DM,
would be the same code with an image x_0 in place of the latent z_0, without vmae.py and normalise.

The letters are those of vmae.py, but a patch is P x P latent cells, so N = hw / P^2. In addition: T
diffusion steps, t the time, alpha_bar the share of the signal in z_t's variance, y a class, cfg the
weight of classifier-free guidance. train_ldm.py trains what this file defines, and sample.py draws
from it.
"""
import copy
import math
import os
import re
import unicodedata

from vmae import (InputError, build_vmae, check_weights, compile_blocks, fused_attention,
                  has_bfloat16, last_line, load_vmae, read_checkpoint, seeded, sincos_positions,
                  to_uint8)
import torch                                # after vmae, see there
import torch.nn as nn
import torch.nn.functional as F

# ---- Latent normalisation ---------------------------------------------------------------------

def normalise(z, mean, std):
    """(z - mean) / std per channel. z (B, d, h, w); mean, std (d,), kept in the checkpoint.
    Diffusion ends on noise of variance 1 and expects data of the same scale. L_reg does not ensure
    this: with kl_mean="free" it acts on sigma alone, and with "zero" its weight is small."""
    return (z - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)

def denormalise(z, mean, std):
    """The inverse of normalise, before the decoder."""
    return z * std.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)

# ---- From latents to noise: two paths, and the loss -------------------------------------------

# Schedule and Flow have the same verbs: `times` draws the t that are trained, `q_sample` makes z_t,
# `target` is what the network should answer to it, `steps` is what a sampler walks through. Both
# name their objective, and the samplers that fit, the default first. `to` moves them to a device.

class Schedule(nn.Module):
    """The variance-preserving (VP) path from latents to noise, for t = 0..T-1, which are Ho's 1..T:

        q(z_t | z_0) = N(sqrt(alpha_bar_t) z_0, (1 - alpha_bar_t) I)            (Ho 2020, Eq. 4)

    If z_0 has unit variance, so has every z_t, because alpha_bar_t + (1 - alpha_bar_t) = 1.

    kind: "linear", where beta rises from 1e-4 to .02 (Ho 2020), or "cosine" (Nichol & Dhariwal
    2021, Eq. 17), which spends fewer steps where almost all is noise.
    objective: what the network predicts. "eps": the noise, as in the paper's L_LDM. "v":
    sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) z_0 (Salimans & Ho 2022). ValueError for other
    names."""

    samplers = ("ddim", "ddpm")

    def __init__(self, kind="cosine", T=1000, objective="v"):
        super().__init__()
        if kind not in ("linear", "cosine") or objective not in ("eps", "v"):
            raise ValueError(f"unknown schedule {kind!r} or objective {objective!r}")
        self.T = T
        self.objective = objective
        if kind == "linear":                # Ho's range is for T = 1000
            beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * (1000 / T)  # (T,)
        else:
            u = torch.linspace(0, 1, T + 1, dtype=torch.float64)           # Nichol's t / T
            f = ((u + 0.008) / 1.008 * math.pi / 2).cos() ** 2
            beta = 1 - f[1:] / f[:-1]       # so that alpha_bar = f / f[0], except for the clamp
        # Nichol's last alpha_bar is 2.4e-9. To recover z_0 one divides by its square root, and then
        # an error of .01 in eps becomes one of 200 in z_0. So none is below Ho's last, 4e-5, where
        # z_T is as good as N(0, 1) too; of 1,000 the last five are equal.
        self.alpha_bar = (1 - beta.clamp(max=0.999)).cumprod(0).clamp(min=4e-5)    # (T,), float64
        # A copy for training, on the device of the latents.
        self.register_buffer("table", self.alpha_bar.float())

    def alpha_bar_at(self, t):
        """alpha_bar_t of each sample, t (B,) -> (B, 1, 1, 1)."""
        return self.table[t].view(-1, 1, 1, 1)

    def first_t(self, alpha_bar):
        """alpha_bar (B,) in (0, 1) -> the smallest t with alpha_bar_t <= alpha_bar, (B,)."""
        rising = -self.table                # as searchsorted needs it
        return torch.searchsorted(rising, -alpha_bar).clamp(max=self.T - 1)

    def times(self, z_0, generator=None):
        """A time t for each latent, (B,): uniform for eps, as in the paper and in Ho 2020; mostly
        in the middle for v.

        For v most times are around .6 of the way to noise, because shapes and patterns are decided
        at medium noise. The distance of samples of the faces (evaluate.py faces) was 33 to 36 with
        five distributions like this one, and 46 with a uniform t. With eps it was 454 with this
        distribution and 78 with a uniform t (AdamW)."""
        if self.objective == "eps":
            return torch.randint(self.T, (len(z_0),), generator=generator, device=z_0.device)
        # u is the level of noise, on a path where alpha_bar = cos(u pi/2)^2.
        u = logit_normal(z_0, 0.4, 0.7, generator)         # (B,)
        return self.first_t((u * math.pi / 2).cos() ** 2)  # (B,), with as much noise

    def q_sample(self, z_0, t, eps):
        """z_t = sqrt(alpha_bar_t) z_0 + sqrt(1 - alpha_bar_t) eps, in one jump. Ho 2020, Eq. 4."""
        alpha_bar = self.alpha_bar_at(t)
        return alpha_bar.sqrt() * z_0 + (1 - alpha_bar).sqrt() * eps       # (B, d, h, w)

    def target(self, z_0, t, eps):
        """What the network should answer to z_t: eps or v."""
        if self.objective == "eps":
            return eps
        alpha_bar = self.alpha_bar_at(t)
        return alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * z_0

    def z0_eps(self, z_t, output, alpha_bar, clip=None):
        """The network's answer to z_t -> its estimates of z_0 and eps, both (B, d, h, w).

        clip: bound z_0 to [-clip, clip], in standard deviations of the latent. eps is computed from
        the bounded z_0, so that the two still add up to z_t."""
        a = math.sqrt(alpha_bar)
        b = math.sqrt(1 - alpha_bar)        # z_t = a z_0 + b eps
        if self.objective == "eps":
            z_0 = (z_t - b * output) / a
        else:
            z_0 = a * z_t - b * output
        if clip is not None:
            z_0 = z_0.clamp(-clip, clip)
        return z_0, (z_t - a * z_0) / b

    def steps(self, S):
        """S of the T steps, evenly spaced and falling: a list of (t, alpha_bar_t, alpha_bar_next).

        For S = 4 and T = 1000, t is 999, 749, 499, 249. The last alpha_bar_next is 1, so sampling
        ends on clean latents for every S. InputError, a ValueError, unless 1 <= S <= T."""
        if not 1 <= S <= self.T:
            raise InputError(f"--steps {S}: give at least 1, and at most the {self.T} of training")
        ts = [round(self.T - i * self.T / S) - 1 for i in range(S)]        # T-1 down
        bars = [self.alpha_bar[t].item() for t in ts] + [1.0]
        return list(zip(ts, bars[:-1], bars[1:]))

class Flow(nn.Module):
    """Rectified flow (Liu 2023): the straight path, on which the network predicts the velocity.

        z_t = t z_0 + (1 - t) eps,   dz_t / dt = z_0 - eps

    Section 3.2 gives L_LDM, but the paper's generator was trained with this. Time runs as in the
    authors' LightningDiT, so that its weights fit: t = 0 is noise and t = 1 the latent, the reverse
    of Schedule."""

    objective = "flow"
    samplers = ("euler",)

    def times(self, z_0, generator=None):
        """A time t in (0, 1) for each latent, (B,): t = sigmoid(N(0, 1))."""
        return logit_normal(z_0, 0, 1, generator)

    def q_sample(self, z_0, t, eps):
        """z_t = t z_0 + (1 - t) eps."""
        share = t.view(-1, 1, 1, 1)                                        # (B, 1, 1, 1)
        return share * z_0 + (1 - share) * eps                             # (B, d, h, w)

    def target(self, z_0, t, eps):
        """What the network should answer to z_t: the velocity, the same at all t."""
        return z_0 - eps

    def steps(self, S, shift=1.0):
        """S steps from noise at t = 0 to latents at t = 1: a list of (t, t_next).

            t_i = shift u / (1 + (shift - 1) u),   u = i / S

        shift: below 1, the steps near the noise are smaller. InputError unless S >= 1."""
        if S < 1:
            raise InputError(f"--steps {S}: give at least 1")
        u = torch.linspace(0, 1, S + 1, dtype=torch.float64)
        ts = (shift * u / (1 + (shift - 1) * u)).tolist()
        return list(zip(ts[:-1], ts[1:]))

def make_path(objective="v", kind="cosine"):
    """The path by the names of train_ldm.py's options --objective and --schedule, which are also
    the entry `schedule` of a checkpoint. kind has no meaning for a flow."""
    if objective == "flow":
        return Flow()
    return Schedule(kind, objective=objective)

def logit_normal(z_0, mean, std, generator=None):
    """A number in (0, 1) for each latent: sigmoid(N(mean, std^2)), (B,) (Esser 2024). Few are near
    0 or 1, where z_t is nearly z_0 or nearly noise."""
    return (mean + std * torch.randn(len(z_0), generator=generator, device=z_0.device)).sigmoid()

def loss_LDM(model, path, z_0, y=None, generator=None):
    """L_LDM = E || eps - eps_theta(z_t, t, tau_theta(y)) ||^2, Section 3.2; or the same with v, or
    with the velocity of a Flow, in place of eps.

    path: a Schedule or a Flow; z_0: normalised latents (B, d, h, w), on its device; y: classes (B,)
    or None. Returns the mean over everything, a scalar in float32. generator: on z_0's device, for
    a repeatable loss."""
    t = path.times(z_0, generator)                                         # (B,)
    eps = torch.randn(z_0.shape, generator=generator, device=z_0.device)   # (B, d, h, w)
    output = model(path.q_sample(z_0, t, eps), t, y).float()               # (B, d, h, w)
    return F.mse_loss(output, path.target(z_0, t, eps))

# ---- Guidance and samplers. model: (z_t, t, y) -> output; for cfg != 1 it needs a y_embedder --

def guided(model, z_t, t, y, cfg):
    """Classifier-free guidance: out = out_null + cfg (out_y - out_null), on every channel.

    cfg = 1 is the plain conditional model, in one pass. cfg > 1 favours what is typical of y, at
    the cost of variety. out_null is for the null class. Ho & Salimans 2022, Eq. 6; their weight is
    cfg - 1."""
    t = torch.full((len(z_t),), t, device=z_t.device)                      # (B,)
    if y is None or cfg == 1:
        return model(z_t, t, y).float()
    null = model.y_embedder.null(len(y), y.device)                         # (B,)
    both = model(torch.cat([z_t, z_t]), torch.cat([t, t]), torch.cat([y, null])).float()
    out_y, out_null = both.chunk(2)                                        # (B, d, h, w) each
    return out_null + cfg * (out_y - out_null)

@torch.no_grad()
def ddpm_sample(model, schedule, z_T, y=None, steps=None, cfg=1.0, noise=torch.randn_like,
                record=None, clip=None):
    """Ancestral sampling, Ho 2020, Algorithm 2 with Eq. 11. t' < t is the sampler's next step:

        z_t' = (z_t - beta / sqrt(1 - alpha_bar_t) eps) / sqrt(alpha) + sigma * noise
        alpha = alpha_bar_t / alpha_bar_t',  beta = 1 - alpha,
        sigma^2 = (1 - alpha_bar_t') / (1 - alpha_bar_t) beta   (the posterior's variance, Eq. 7)

    z_T (B, d, h, w) ~ N(0, 1); y (B,) or None; steps: 1 to T (default T); cfg: see guided; noise(z)
    draws N(0, 1) in z's shape; record: a list that receives the estimate of z_0 at each step; clip:
    see Schedule.z0_eps. Returns z_0. InputError for a wrong number of steps."""
    z = z_T
    for t, bar, bar_next in schedule.steps(schedule.T if steps is None else steps):
        z_0, eps = schedule.z0_eps(z, guided(model, z, t, y, cfg), bar, clip)
        alpha = bar / bar_next              # of this jump, 1 - beta
        sigma = math.sqrt((1 - bar_next) / (1 - bar) * (1 - alpha))        # 0 at the last step
        z = (z - (1 - alpha) / math.sqrt(1 - bar) * eps) / math.sqrt(alpha)
        if sigma > 0:
            z = z + sigma * noise(z)
        if record is not None:
            record.append(z_0)
    return z

@torch.no_grad()
def ddim_sample(model, schedule, z_T, y=None, steps=50, cfg=1.0, noise=torch.randn_like,
                record=None, clip=None, eta=0.0):
    """Song 2021, Eq. 12, with the sigma of Eq. 16. t' < t is the sampler's next step:

        z_t' = sqrt(alpha_bar_t') z_0 + sqrt(1 - alpha_bar_t' - sigma^2) eps + sigma * noise
        sigma^2 = eta^2 (1 - alpha_bar_t') / (1 - alpha_bar_t) (1 - alpha_bar_t / alpha_bar_t')

    eta = 0 is deterministic, an ODE solver's step; eta = 1 is DDPM. Others as ddpm_sample's."""
    z = z_T
    for t, bar, bar_next in schedule.steps(steps):
        z_0, eps = schedule.z0_eps(z, guided(model, z, t, y, cfg), bar, clip)
        sigma = eta * math.sqrt((1 - bar_next) / (1 - bar) * (1 - bar / bar_next))
        z = math.sqrt(bar_next) * z_0 + math.sqrt(max(0.0, 1 - bar_next - sigma**2)) * eps
        if sigma > 0:
            z = z + sigma * noise(z)
        if record is not None:
            record.append(z_0)
    return z

@torch.no_grad()
def euler_sample(model, flow, z_T, y=None, steps=50, cfg=1.0, noise=None, record=None,
                 shift=1.0, interval=0.0):
    """A Flow's sampler: dz/dt = v_theta(z, t, y) from noise at t = 0 to latents at t = 1. From each
    of the times of Flow.steps to the next, t',

        z <- z + (t' - t) v_theta(z, t, y)

    in `steps` evaluations (the authors' loop makes one fewer). Its error is of first order in
    1 / steps. shift: see Flow.steps. interval: guide from this t on only, because guidance near the
    noise costs variety (Kynkaanniemi 2024). noise: not used, the path is deterministic. Others as
    ddpm_sample's."""
    z = z_T
    for t, t_next in flow.steps(steps, shift):
        weight = cfg if t >= interval else 1.0
        v = guided(model, z, t, y, weight)                                 # (B, d, h, w)
        if record is not None:
            record.append(z + (1 - t) * v)  # where a straight path from here would end
        z = z + (t_next - t) * v            # Euler's step
    return z

# The samplers by name, and the names of the options that only some of them have.
SAMPLERS = {"ddim": ddim_sample, "ddpm": ddpm_sample, "euler": euler_sample}
OPTIONS = {"ddim": ("clip", "eta"), "ddpm": ("clip",), "euler": ("shift", "interval")}

# ---- Diffusion transformer: DiT (Peebles 2023) with the parts of LightningDiT (Yao 2025) ------

def modulate(x, shift, scale):
    """adaLN: x (1 + scale) + shift, both from the condition. x (B, N, D); shift, scale (B, D)."""
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))

class Rope(nn.Module):
    """2-D rotary positions (Su 2021). Each pair of channels is turned by an angle that grows with
    the row (first half of a head) or with the column (second half). Positions then enter the
    product of a query and a key only as the offset between their tokens."""

    def __init__(self, head_dim, size):
        super().__init__()
        half = head_dim // 2                # for the row; the other for the column
        omega = 10000.0 ** -(torch.arange(0, half, 2, dtype=torch.float64) / half)
        angles = (torch.arange(size)[:, None] * omega).repeat_interleave(2, 1)   # (size, half)
        row = angles[:, None].expand(size, size, half)     # of each place of the grid
        column = row.transpose(0, 1)
        angle = torch.cat([row, column], 2).flatten(0, 1).float()                # (N, head_dim)
        self.register_buffer("freqs_cos", angle.cos())
        self.register_buffer("freqs_sin", angle.sin())

    def forward(self, x):
        """x (..., N, head_dim) -> the same, where each pair of channels (a, b) has become
        (a cos - b sin, b cos + a sin).

        On a CPU this is written as a product of complex numbers, (a + ib)(cos + i sin), which takes
        .4 of the time there; torch.compile knows no complex numbers. On a CPU the result is in
        float32, as fused_attention needs it."""
        pairs = x.float().unflatten(-1, (-1, 2))           # (..., N, head_dim/2, 2)
        if x.device.type == "cpu":
            turn = torch.complex(self.freqs_cos[:, ::2], self.freqs_sin[:, ::2])
            return torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2)
        swapped = torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2)   # (-b, a)
        return torch.addcmul(x * self.freqs_cos, swapped, self.freqs_sin).to(x.dtype)

class Attention(nn.Module):
    """Multi-head self-attention on rotated queries and keys."""

    def __init__(self, D, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(D, 3 * D)      # queries, keys, values
        self.proj = nn.Linear(D, D)

    def forward(self, x, rope):
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, -1)       # (B, N, 3, heads, D/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                         # (B, heads, N, D/heads) each
        x = fused_attention(rope(q), rope(k), v)                           # (B, heads, N, D/heads)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))               # (B, N, D)

class SwiGLU(nn.Module):
    """(silu(x W1) * (x W2)) W3 (Shazeer 2020), two thirds as wide as an MLP of equal cost."""

    def __init__(self, D):
        super().__init__()
        hidden = int(2 / 3 * 4 * D)         # an MLP has 4 D
        self.w12 = nn.Linear(D, 2 * hidden)                # W1 and W2 side by side
        self.w3 = nn.Linear(hidden, D)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, -1)                                    # each (B, N, hidden)
        return self.w3(F.silu(a) * b)                                      # (B, N, D)

class Block(nn.Module):
    """adaLN-zero: the condition c gives six vectors. DiT lets the gates start at 0, so that at
    first a block changes nothing."""

    def __init__(self, D, num_heads):
        super().__init__()
        self.norm1 = nn.RMSNorm(D, eps=1e-6)
        self.attn = Attention(D, num_heads)
        self.norm2 = nn.RMSNorm(D, eps=1e-6)
        self.mlp = SwiGLU(D)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))

    def forward(self, x, c, rope):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, 1)
        update = self.attn(modulate(self.norm1(x), shift1, scale1), rope)  # (B, N, D)
        x = x + gate1.unsqueeze(1) * update
        update = self.mlp(modulate(self.norm2(x), shift2, scale2))         # (B, N, D)
        return x + gate2.unsqueeze(1) * update

class TimestepEmbed(nn.Module):
    """t -> 128 cosines and 128 sines of falling frequency -> MLP -> (B, D)."""

    def __init__(self, D):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))

    def forward(self, t):
        omega = torch.exp(-math.log(10000) / 128 * torch.arange(128, device=t.device))  # (128,)
        angle = t.float()[:, None] * omega                                 # (B, 128)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], 1))          # (B, 256) -> (B, D)

class LabelEmbed(nn.Module):
    """tau_theta(y) of Section 3.2: the condition y -> a vector (B, D), added to that of the time.

    Here y (B,) holds classes, and the table has one row per class. Its last row, num_classes, is
    the null class, which means "no class". What y is, and what stands for no y, is decided here; a
    change from classes to text begins here."""

    def __init__(self, num_classes, D):
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, D)            # the last: no class

    def null(self, B, device):
        """B times the null class, (B,)."""
        return torch.full((B,), self.num_classes, device=device)

    def drop(self, y, share, generator=None):
        """Replace a random share of y by the null class, so that one network also learns the
        unconditional answer that guidance needs (Ho & Salimans 2022). (B,) -> (B,)."""
        dropped = torch.rand(len(y), generator=generator, device=y.device) < share     # (B,)
        return torch.where(dropped, self.null(len(y), y.device), y)

    def forward(self, y):
        return self.embedding_table(y)                     # (B,) -> (B, D)

class FinalLayer(nn.Module):
    """Tokens -> P x P pieces of the output, modulated by the condition like a block."""

    def __init__(self, D, out):
        super().__init__()
        self.norm_final = nn.RMSNorm(D, eps=1e-6)
        self.linear = nn.Linear(D, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, 1)                # (B, D) each
        return self.linear(modulate(self.norm_final(x), shift, scale))     # (B, N, P*P*d)

class DiT(nn.Module):
    """eps_theta(z_t, t, tau_theta(y)), or v, or the velocity of a Flow, by the path's objective.
    num_classes = 0 makes an unconditional model.
    input_size: side of the latent grid; patch_size: side of a token in latent cells; in_channels:
    d. ValueError if the patch does not divide the grid."""

    def __init__(self, input_size=32, patch_size=1, in_channels=16, hidden_size=768, depth=12,
                 num_heads=12, num_classes=0):
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"a grid of {input_size} is not a multiple of patches of {patch_size}")
        D = hidden_size
        size = input_size // patch_size     # N = size * size
        self.patch_size = patch_size
        self.register_buffer("pos_embed", sincos_positions(D, torch.arange(size)))
        # A dict, so that its weight has the published name, x_embedder.proj.weight.
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(in_channels, D, patch_size, patch_size)})
        self.t_embedder = TimestepEmbed(D)
        self.y_embedder = LabelEmbed(num_classes, D)
        self.feat_rope = Rope(D // num_heads, size)
        self.blocks = nn.ModuleList(Block(D, num_heads) for _ in range(depth))
        self.final_layer = FinalLayer(D, patch_size**2 * in_channels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for block in self.blocks:           # gates start at zero
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)     # and so does the output

    def forward(self, z_t, t, y=None):
        """z_t (B, d, h, w), t (B,), y (B,) or None -> output, shaped like z_t. t is in 0..T-1, or
        in [0, 1] for rectified flow; y = None means the null class."""
        B, d, h, w = z_t.shape
        P = self.patch_size
        if y is None:
            y = self.y_embedder.null(B, z_t.device)
        c = self.t_embedder(t) + self.y_embedder(y)                        # (B, D)
        x = self.x_embedder["proj"](z_t).flatten(2).transpose(1, 2)        # (B, N, D)
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x, c, self.feat_rope)
        x = self.final_layer(x, c)                                         # (B, N, P*P*d)
        x = x.reshape(B, h // P, w // P, P, P, d).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(B, d, h, w)                       # from (B, d, h/P, P, w/P, P)

# The arguments of DiT for each --model; dit_args adds the others. tiny: the default run on a CPU;
# with patches of 2 and D = 192 their edges stay visible in samples (a distance of 37 instead of 31
# after as many seconds of AdamW, evaluate.py faces). With patches of 1 a width of 192 makes 1.8
# times the products and L_v_val .195 in place of .192 after 1,000 steps, but a distance of 33.4 in
# place of 35.5. small: DiT-S/2, for the 32 x 32 latents of CelebA-HQ on one consumer GPU. base: the
# paper's LightningDiT-B/1.
sizes = {
    "tiny": dict(patch_size=1, hidden_size=144, depth=5, num_heads=4),
    "small": dict(patch_size=2, hidden_size=384, depth=12, num_heads=6),
    "base": dict(patch_size=1, hidden_size=768, depth=12, num_heads=12)}

def dit_args(size, grid, latent_dim, num_classes):
    """A key of `sizes` -> all arguments of DiT for latents (latent_dim, grid, grid)."""
    args = dict(sizes[size], input_size=grid, in_channels=latent_dim, num_classes=num_classes)
    if grid <= 16 or grid % 2:              # patches of 2 would save little, or do not fit
        args["patch_size"] = 1
    return args

# ---- EMA --------------------------------------------------------------------------------------

class EMA:
    """Moving average of the weights in training; it samples better than the last weights. After n
    steps the decay is (1 + n) / (10 + n), until it reaches its final value. A short run thus
    averages over its last tenth and forgets the random start. Buffers are copied."""

    def __init__(self, model, decay=0.9999):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.n = 0

    @torch.no_grad()
    def update(self, model):
        """To be called after each optimiser step."""
        decay = min(self.decay, (1 + self.n) / (10 + self.n))
        self.n += 1
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
        for mine, theirs in zip(self.model.buffers(), model.buffers()):
            mine.copy_(theirs)

# ---- What images are drawn from ---------------------------------------------------------------

# Compiling takes some 15 s. It pays from about this many calls of the network for one image on.
WORTH_COMPILING = 100_000

class LDM(nn.Module):
    """All that images are drawn from, in training, by sample.py, by evaluate.py, in a notebook.

    model: a DiT with the EMA weights; path: the Schedule or Flow that it was trained on; mean, std
    (d,): see normalise; ae: the autoencoder of stage one; classes: their names, an empty list if
    there are none; data, val: the options of train_ldm.py, None for the built-in faces; run: the
    run folder of stage one. ldm.to(...) moves it to a device."""

    def __init__(self, model, path, mean, std, ae, classes, data=None, val=None, run="."):
        super().__init__()
        self.model = model
        self.path = path
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.ae = ae
        self.classes = classes
        self.data = data
        self.val = val
        self.run = run

    def plan(self, cfg=None, sampler=None, steps=50, **options):
        """What is asked for -> a dict of all options of `draw`, with the defaults in place of None.
        InputError for what does not fit.

        cfg: the weight of guidance. By default it is 1.5 with classes, as then nearly all samples
        show the class that was asked for, and colours still vary; otherwise 1, none. sampler: a key
        of SAMPLERS, by default DDIM, or Euler for a flow; steps: calls of the network per image;
        options: those of the sampler, see OPTIONS; its own defaults are left to it."""
        if cfg is None:
            cfg = 1.5 if self.classes else 1.0
        if cfg != 1 and not self.classes:
            raise InputError(f"--cfg {cfg}: this checkpoint is unconditional, leave --cfg out")
        fitting = self.path.samplers
        if sampler is None:
            sampler = fitting[0]
        if sampler not in fitting:
            raise InputError(f"--sampler {sampler}: this checkpoint was trained for the objective "
                             f"{self.path.objective}; choose from {', '.join(fitting)}")
        self.path.steps(steps)              # InputError if there are not so many
        how = dict(cfg=cfg, sampler=sampler, steps=steps)
        for name, value in options.items():
            if value is None:
                continue
            if name not in OPTIONS[sampler]:
                raise InputError(f"--{name}: the sampler {sampler} has no such option; leave it "
                                 f"out")
            how[name] = value
        return how

    @torch.no_grad()
    def draw(self, index, labels=None, seed=0, record=None, **options):
        """Images number index, B whole numbers -> uint8 (B, 3, H, W) on the CPU.

        An image depends on seed and on its number alone. labels: image i gets label number
        i % len(labels); by default all classes in turn, and none if the list is empty. record: see
        ddpm_sample; options: cfg, sampler, steps and others, see `plan`."""
        how = self.plan(**options)
        sampler = SAMPLERS[how.pop("sampler")]
        index = torch.as_tensor(index)
        device = self.mean.device
        if labels is None:
            labels = range(len(self.classes))
        y = None
        if len(labels) > 0:
            y = torch.tensor(labels)[index % len(labels)].to(device)       # (B,)
        # One generator per image, on the CPU: batch and device change an image by rounding only.
        generators = [seeded(seed, i) for i in index.tolist()]
        shape = (self.ae.latent_dim, self.ae.grid, self.ae.grid)

        def noise(_=None):                  # the samplers pass z, for its shape
            return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)

        # On a CPU in float32: the rounding of bfloat16 would make an image depend on its batch.
        low_precision = device.type == "cuda" and has_bfloat16(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=low_precision):
            z_0 = sampler(self.model, self.path, noise(), y, noise=noise, record=record, **how)
            return to_uint8(self.decode(z_0)).cpu()                        # (B, 3, H, W)

    def decode(self, z_0):
        """Normalised latents z_0 (B, d, h, w) -> images (B, 3, H, W), about [-1, 1]."""
        return self.ae.decode(denormalise(z_0, self.mean, self.std))

    def compile_if_it_pays(self, calls):
        """On CUDA, compile the blocks of the network, if this pays for so many calls: the number
        of images times that of steps."""
        if self.mean.device.type == "cuda" and calls >= WORTH_COMPILING:
            compile_blocks(self.model.blocks)

def composed(names):
    """Names of classes in one form: macOS stores an accent as a character of its own, others do
    not."""
    return [unicodedata.normalize("NFC", name) for name in names]

# ---- Checkpoints ------------------------------------------------------------------------------

def published_dit(path, ckpt):
    """A checkpoint of the authors' LightningDiT -> a dict as in ours, without latent_mean,
    latent_std and vmae. The shapes of the weights give DiT's arguments. Prints what was left over.
    InputError for another model, or a part of it."""
    try:
        weights = {}
        for name, value in (ckpt.get("ema") or ckpt.get("model") or ckpt).items():
            name = re.sub(r"^(module\.|_orig_mod\.)+", "", name)           # DDP's, the compiler's
            weights[name] = value
        D, d, P, _ = weights["x_embedder.proj.weight"].shape               # (D, d, P, P)
        num_classes = len(weights["y_embedder.embedding_table.weight"]) - 1    # the last is null
        depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        model_args = dict(
            input_size=P * math.isqrt(weights["pos_embed"].shape[1]), patch_size=P, in_channels=d,
            hidden_size=D, depth=depth, num_heads=D // weights["feat_rope.freqs_cos"].shape[1],
            num_classes=num_classes)
        model = DiT(**model_args)
        missing, left_over = model.load_state_dict(weights, strict=False)
    except Exception as error:
        raise InputError(f"{path}: neither a stage-two checkpoint, such as runs/ldm/last.pt, nor a "
                         f"LightningDiT ({last_line(error)})") from None
    check_weights(path, weights, missing, left_over)
    return dict(model_args=model_args, ema=model.state_dict(), schedule=dict(objective="flow"),
                classes=[str(i) for i in range(num_classes)])

def add_statistics(ckpt, stats):
    """Put the latent statistics in the authors' file `stats`, {"mean": d numbers, "std": d
    numbers}, into the dict of a checkpoint."""
    numbers = read_checkpoint(stats)
    d = ckpt["model_args"]["in_channels"]
    try:                                    # in the authors' files each has shape (1, d, 1, 1)
        for name in ("mean", "std"):
            ckpt[f"latent_{name}"] = torch.as_tensor(numbers[name]).float().reshape(d)
    except Exception:                       # of many kinds: no such entry, no numbers, too many
        raise InputError(f"{stats}: holds no mean and std of the {d} latent channels") from None

def read_stage_two(path, stats=None):
    """A stage-two checkpoint, ours or the authors', or a run folder -> (DiT with the EMA weights,
    frozen, in eval mode; the dict of the checkpoint).

    The dict holds model_args, ema, schedule (see make_path), latent_mean, latent_std, classes and,
    if it is ours, train_args and `vmae`, the whole stage one. stats: the authors' file of latent
    statistics, see add_statistics. InputError, in one sentence, for anything else."""
    ckpt = read_checkpoint(path)
    if not {"model_args", "ema", "latent_mean", "latent_std", "vmae"} <= set(ckpt):
        ckpt = published_dit(path, ckpt)
    if stats is not None:
        add_statistics(ckpt, stats)
    if "latent_mean" not in ckpt:
        raise InputError(f"{path}: published weights come with a file of latent statistics; name "
                         f"it with --stats of sample.py or train_ldm.py")
    try:
        model = DiT(**ckpt["model_args"])
        model.load_state_dict(ckpt["ema"])
        make_path(**ckpt["schedule"])
    except Exception as error:
        raise InputError(f"{path}: its weights do not fit its model_args "
                         f"({last_line(error)})") from None
    return model.eval().requires_grad_(False), ckpt

def load_ldm(path, stats=None, vmae=None):
    """A stage-two checkpoint, ours or the authors', or a run folder -> LDM, on the CPU.

    stats: the authors' file of latent statistics. vmae: a checkpoint of stage one, whose decoder
    takes the place of that in the checkpoint; published weights hold none, and need it. InputError,
    in one sentence, for anything else."""
    model, ckpt = read_stage_two(path, stats)
    if vmae is not None:
        ae = load_vmae(vmae)
        check_latents(path, ckpt, vmae, ae)
    elif "vmae" in ckpt:
        ae = build_vmae(ckpt["vmae"])
    else:
        raise InputError(f"{path}: published weights hold no stage one; name it with --vmae")
    trained = ckpt.get("train_args", {})    # published weights have none
    run = os.path.dirname(ckpt.get("vmae", {}).get("path", ""))
    return LDM(model, make_path(**ckpt["schedule"]), ckpt["latent_mean"], ckpt["latent_std"], ae,
               ckpt["classes"], trained.get("data"), trained.get("val"), run)

@torch.no_grad()
def check_latents(path, ckpt, vmae_path, ae):
    """InputError unless the latents of the autoencoder `ae` are those of the stage-two checkpoint:
    of the same shape and, if stage one is in the checkpoint, from an encoder that encodes alike.
    The decoder may be another."""
    d = ckpt["model_args"]["in_channels"]
    side = ckpt["model_args"]["input_size"]
    if (ae.latent_dim, ae.grid) != (d, side):
        raise InputError(f"--vmae {vmae_path}: its latents have {ae.latent_dim} channels on a "
                         f"side of {ae.grid}, those of {path} have {d} on {side}")
    if "vmae" not in ckpt:
        return
    device = ae.logvar_x.device
    inside = build_vmae(ckpt["vmae"]).to(device)
    # Both encode one image, a ramp of all grey levels; equal encoders differ by rounding only.
    x = torch.linspace(-1, 1, 3 * ae.img_size**2, device=device).view(1, 3, ae.img_size, -1)
    if not torch.allclose(ae.encode(x).mu, inside.encode(x).mu, atol=1e-3):
        raise InputError(f"--vmae {vmae_path}: has another encoder than the stage one inside "
                         f"{path}, and so other latents; name that one, or leave --vmae out")

def stage_and_data(path):
    """A checkpoint -> its stage, 1 or 2, and the option --data of its training, None for the
    built-in faces. Published weights count as stage 1, without data."""
    ckpt = read_checkpoint(path)
    data = ckpt.get("train_args", {}).get("data")
    if "vmae" in ckpt:
        return 2, data
    return 1, data

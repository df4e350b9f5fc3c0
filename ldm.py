"""Stage two of LDMAE (Latent Diffusion Models with Masked AutoEncoders, ICCV 2025).

Diffusion on the latents of vmae.py, in reading order: latent normalisation, noise schedule, the
loss L_LDM, rectified flow, the samplers with guidance, the transformer, EMA, load. Section 3.2.

    z_0 --q_sample--> z_t --DiT--> eps_theta(z_t, t, y) --ddim_sample--> z_0

    python train_ldm.py --vmae runs/vmae/last.pt         trains what this file defines
    python sample.py --ckpt runs/ldm/last.pt             draws from it

Letters are vmae.py's glossary; further: T diffusion steps in training, t in 0..T-1 one of them,
alpha_bar_t what is left of the signal's variance at t, y a class, w the guidance weight.
"""
import copy
import math
import os
import re

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---- Latent normalisation: diffusion starts from N(0, 1), so its data should have that scale --

def normalise(z, mean, std):
    """(z - mean) / std per channel. z (B, d, h, w); mean, std (d,), kept in the checkpoint."""
    return (z - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)


def denormalise(z, mean, std):
    """The inverse of normalise, on the way back to the decoder."""
    return z * std.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)


# ---- Noise schedule and the loss --------------------------------------------------------------

class Schedule:
    """q(z_t | z_0) = N(sqrt(alpha_bar_t) z_0, (1 - alpha_bar_t) I), t = 0..T-1. Ho 2020, Eq. 4.

    kind       "linear": beta from 1e-4 to .02, Ho 2020. "cosine": Nichol & Dhariwal 2021, Eq. 17,
               which spends fewer steps on latents that are already noise.
    objective  what the network predicts: "eps", the paper's L_LDM;
               "v" = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) z_0 (Salimans & Ho 2022);
               "flow", another path altogether, which needs nothing of this class: see loss_flow.
    Raises ValueError for a name that is none of these.
    """

    def __init__(self, kind="cosine", T=1000, objective="v"):
        if kind not in ("linear", "cosine") or objective not in ("eps", "v", "flow"):
            raise ValueError(f"unknown schedule {kind!r} or objective {objective!r}")
        self.T, self.objective = T, objective
        if kind == "linear":                # the published range is for 1000 steps
            beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * (1000 / T)
        else:
            s = torch.linspace(0, 1, T + 1, dtype=torch.float64)
            f = ((s + 0.008) / 1.008 * math.pi / 2).cos() ** 2
            beta = 1 - f[1:] / f[:-1]       # f is alpha_bar, up to the clamp at the last step
        self.alpha_bar = (1 - beta.clamp(max=0.999)).cumprod(0)            # (T,), float64

    def at(self, t, like):
        """alpha_bar_t of each sample, (B,) -> (B, 1, 1, 1), on the device of `like`."""
        return self.alpha_bar.float().to(like.device)[t].view(-1, 1, 1, 1)

    def q_sample(self, z_0, t, eps):
        """z_t = sqrt(alpha_bar_t) z_0 + sqrt(1 - alpha_bar_t) eps: noise in one jump. Ho Eq. 4."""
        alpha_bar = self.at(t, z_0)
        return alpha_bar.sqrt() * z_0 + (1 - alpha_bar).sqrt() * eps

    def target(self, z_0, t, eps):
        """What the network should say, given the noise that was added."""
        alpha_bar = self.at(t, z_0)
        if self.objective == "eps":
            return eps
        return alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * z_0       # v

    def z0_eps(self, z_t, output, alpha_bar, clip=None):
        """The network's output at z_t -> its estimates of z_0 and eps, both (B, d, h, w).

        clip: bound z_0 to [-clip, clip], in standard deviations of the latent (pixels would use
        1, but latents have tails); eps is recomputed, so that the pair still explains z_t.
        """
        a, s = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        z_0 = (z_t - s * output) / a if self.objective == "eps" else a * z_t - s * output
        if clip is not None:
            z_0 = z_0.clamp(-clip, clip)
        return z_0, (z_t - a * z_0) / s

    def steps(self, S):
        """S of the T steps, evenly spaced from T-1 down, as (t, alpha_bar_t, alpha_bar_next).

        The last alpha_bar_next is 1: sampling ends on clean latents, whatever S is.
        """
        if not 1 <= S <= self.T or self.objective == "flow":
            raise ValueError(f"no {S} steps of {self.T} on the path of {self.objective!r}")
        ts = [round(self.T - i * self.T / S) - 1 for i in range(S)]        # S = 1 asks at T-1
        bars = [self.alpha_bar[t].item() for t in ts] + [1.0]
        return list(zip(ts, bars[:-1], bars[1:]))


def drop_labels(y, num_classes, share):
    """A share of the labels becomes the null class, number num_classes, so that one network also
    learns the unconditional score that guidance needs (Ho & Salimans 2022). (B,) -> (B,)."""
    return torch.where(torch.rand(len(y), device=y.device) < share, num_classes, y)


def loss_LDM(model, schedule, z_0, y=None):
    """L_LDM = E || eps - eps_theta(z_t, t, y) ||^2, Section 3.2 (or the same with v for eps).

    z_0: normalised latents (B, d, h, w); y: classes (B,) or None. t is uniform. Mean over
    everything; returns a scalar in float32.
    """
    if schedule.objective == "flow":
        return loss_flow(model, z_0, y)
    t = torch.randint(schedule.T, (len(z_0),), device=z_0.device)          # (B,)
    eps = torch.randn_like(z_0)
    output = model(schedule.q_sample(z_0, t, eps), t, y).float()
    return F.mse_loss(output, schedule.target(z_0, t, eps))


def loss_flow(model, z_0, y=None):
    """Rectified flow, E || (z_0 - eps) - v_theta(z_t, t, y) ||^2 on the straight path

        z_t = t z_0 + (1 - t) eps,   t = sigmoid(N(0, 1))    (Liu 2023; logit-normal t: Esser 2024)

    The paper's generator was trained like this, and its generation figures come from here, while
    its Section 3.2 gives L_LDM. Time runs as in the authors' LightningDiT, whose weights thus fit:
    from noise at t = 0 to latents at t = 1, against DDPM's direction.
    """
    t = torch.randn(len(z_0), device=z_0.device).sigmoid()                 # (B,), in (0, 1)
    eps, s = torch.randn_like(z_0), t.view(-1, 1, 1, 1)
    velocity = model(s * z_0 + (1 - s) * eps, t, y).float()                # (B, d, h, w)
    return F.mse_loss(velocity, z_0 - eps)                 # a scalar


# ---- Samplers. `model` is any function (z_t, t, y) -> output ----------------------------------

def guided(model, z_t, t, y, w):
    """Classifier-free guidance: out = out_null + w (out_y - out_null), on every channel.

    w = 1 is the plain conditional model, in one pass; w > 1 favours what is typical of y, at the
    cost of variety. The null class is number num_classes. Ho & Salimans 2022, Eq. 6.
    """
    t = torch.full((len(z_t),), t, device=z_t.device)
    if y is None or w == 1:
        return model(z_t, t, y).float()
    null = torch.full_like(y, model.num_classes)           # (B,)
    both = model(torch.cat([z_t, z_t]), torch.cat([t, t]), torch.cat([y, null])).float()
    out_y, out_null = both.chunk(2)                                        # (B, d, h, w) each
    return out_null + w * (out_y - out_null)


@torch.no_grad()
def ddpm_sample(model, schedule, z_T, y=None, steps=None, w=1.0, clip=None, noise=torch.randn_like,
                record=None):
    """Ancestral sampling, Ho 2020, Algorithm 2 with Eq. 11; s is the step that follows t:

        z_s = (z_t - beta / sqrt(1 - alpha_bar_t) eps) / sqrt(alpha) + sigma * noise
        alpha = alpha_bar_t / alpha_bar_s,  beta = 1 - alpha,
        sigma^2 = (1 - alpha_bar_s) / (1 - alpha_bar_t) beta    (the posterior's variance, Eq. 7)

    z_T (B, d, h, w) ~ N(0, 1); y (B,) or None; steps from 1 to T (default T); noise(z) draws one
    N(0, 1) of z's shape; record, a list, receives each step's estimate of z_0. Returns z_0.
    """
    z = z_T
    for t, bar_t, bar_s in schedule.steps(steps or schedule.T):
        z_0, eps = schedule.z0_eps(z, guided(model, z, t, y, w), bar_t, clip)
        alpha = bar_t / bar_s                              # of this jump, 1 - beta
        sigma = math.sqrt((1 - bar_s) / (1 - bar_t) * (1 - alpha))         # 0 on the last
        z = (z - (1 - alpha) / math.sqrt(1 - bar_t) * eps) / math.sqrt(alpha)
        z = z + sigma * noise(z) if sigma > 0 else z
        if record is not None:
            record.append(z_0)
    return z


@torch.no_grad()
def ddim_sample(model, schedule, z_T, y=None, steps=50, w=1.0, clip=None, noise=torch.randn_like,
                record=None, eta=0.0):
    """Song 2021, Eq. 12 with the sigma of Eq. 16; s is the step that follows t:

        z_s = sqrt(alpha_bar_s) z_0 + sqrt(1 - alpha_bar_s - sigma^2) eps + sigma * noise
        sigma = eta sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_s)

    eta = 0 is deterministic, an ODE solver's step; eta = 1 is DDPM. Arguments as ddpm_sample's.
    """
    z = z_T
    for t, bar_t, bar_s in schedule.steps(steps):
        z_0, eps = schedule.z0_eps(z, guided(model, z, t, y, w), bar_t, clip)
        sigma = eta * math.sqrt((1 - bar_s) / (1 - bar_t) * (1 - bar_t / bar_s))
        z = math.sqrt(bar_s) * z_0 + math.sqrt(max(0.0, 1 - bar_s - sigma**2)) * eps
        z = z + sigma * noise(z) if sigma > 0 else z
        if record is not None:
            record.append(z_0)
    return z


@torch.no_grad()
def euler_sample(model, schedule, z_T, y=None, steps=50, w=1.0, record=None, shift=1.0,
                 interval=0.0):
    """Rectified flow's sampler: dz/dt = v_theta(z, t, y) from noise at t = 0 to latents at t = 1,

        z <- z + (t' - t) v_theta(z, t, y),    t_i = shift u / (1 + (shift - 1) u),  u = i / steps

    in `steps` evaluations (the authors' loop makes one fewer than it says). shift below 1: smaller
    steps near the noise. interval: guidance from this t on only, since near the noise it costs
    variety (Kynkaanniemi 2024). Other arguments as ddpm_sample's; first order in 1 / steps.
    """
    if schedule.objective != "flow" or steps < 1:
        raise ValueError(f"no Euler sampling of {schedule.objective!r} in {steps} steps")
    z, u = z_T, torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    ts = (shift * u / (1 + (shift - 1) * u)).tolist()
    for t, t_next in zip(ts, ts[1:]):
        v = guided(model, z, t, y, w if t >= interval else 1.0)            # (B, d, h, w)
        if record is not None:
            record.append(z + (1 - t) * v)  # where a straight path from here would end
        z = z + (t_next - t) * v
    return z


def sampler_for(schedule):
    """The sampler to use unless another is asked for: Euler for rectified flow, otherwise DDIM."""
    return euler_sample if schedule.objective == "flow" else ddim_sample


# ---- Diffusion transformer: DiT (Peebles 2023) with the parts of LightningDiT (Yao 2025) ------

def sincos_positions(D, size):
    """Fixed 2-D sin-cos positions (1, size*size, D), column half first, as in vmae.py."""
    omega = 10000.0 ** -(torch.arange(D // 4, dtype=torch.float64) / (D // 4))
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    angles = [place.reshape(-1, 1) * omega for place in (column, row)]     # 2 x (N, D/4)
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], 1).float()[None]


def modulate(x, shift, scale):
    """adaLN: the condition, not the norm, decides scale and shift. x (B, N, D), others (B, D)."""
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))


class Rope(nn.Module):
    """2-D rotary positions (Su 2021): pairs of channels turn by an angle that grows with the row
    (first half of a head) or the column (second half), so q.k depends on the offset alone."""

    def __init__(self, head_dim, size):
        super().__init__()
        half = head_dim // 2
        omega = 10000.0 ** -(torch.arange(0, half, 2, dtype=torch.float64) / half)
        angle = (torch.arange(size)[:, None] * omega).repeat_interleave(2, 1)    # (size, half)
        row = angle[:, None].expand(size, size, half)
        angle = torch.cat([row, row.transpose(0, 1)], 2).flatten(0, 1).float()   # (N, head_dim)
        self.register_buffer("freqs_cos", angle.cos())
        self.register_buffer("freqs_sin", angle.sin())

    def forward(self, x):
        """x (..., N, head_dim) -> the same; a pair is a complex number, to turn is to multiply."""
        turn = torch.complex(self.freqs_cos[:, ::2], self.freqs_sin[:, ::2])     # (N, head_dim/2)
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))    # (..., N, head_dim/2)
        return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention on rotated queries and keys, with the fused kernel."""

    def __init__(self, D, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D)

    def forward(self, x, rope):
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, -1)             # (B, N, 3, heads, .)
        qkv = qkv.permute(2, 0, 3, 1, 4)                                   # (3, B, heads, N, .)
        (q, k), v = rope(qkv[:2]), qkv[2]                                  # v holds no position
        if x.device.type == "cpu":
            with torch.autocast("cpu", enabled=False):                     # as in vmae.py
                x = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
        else:
            x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))               # (B, N, D)


class SwiGLU(nn.Module):
    """silu(x W1) * (x W2) W3 (Shazeer 2020), two thirds as wide as a plain MLP for equal cost."""

    def __init__(self, D):
        super().__init__()
        hidden = int(2 / 3 * 4 * D)
        self.w12 = nn.Linear(D, 2 * hidden)                # W1 and W2 side by side
        self.w3 = nn.Linear(hidden, D)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, -1)                                    # each (B, N, hidden)
        return self.w3(F.silu(a) * b)                                      # (B, N, D)


class Block(nn.Module):
    """adaLN-zero block: six vectors from the condition, the two gates starting at zero."""

    def __init__(self, D, num_heads):
        super().__init__()
        self.norm1 = nn.RMSNorm(D, eps=1e-6)
        self.attn = Attention(D, num_heads)
        self.norm2 = nn.RMSNorm(D, eps=1e-6)
        self.mlp = SwiGLU(D)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))

    def forward(self, x, c, rope):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, 1)
        h = self.attn(modulate(self.norm1(x), shift1, scale1), rope)       # (B, N, D)
        x = x + gate1.unsqueeze(1) * h                                     # zero at the start
        h = self.mlp(modulate(self.norm2(x), shift2, scale2))              # (B, N, D)
        return x + gate2.unsqueeze(1) * h


class PatchEmbed(nn.Module):
    """Linear map of each P x P piece of the latent; nothing is masked here, so a convolution."""

    def __init__(self, C, P, D):
        super().__init__()
        self.proj = nn.Conv2d(C, D, P, stride=P)

    def forward(self, z):
        return self.proj(z).flatten(2).transpose(1, 2)     # (B, d, h, w) -> (B, N, D)


class TimestepEmbed(nn.Module):
    """t -> 128 cosines and 128 sines of falling frequency -> MLP -> (B, D)."""

    def __init__(self, D):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))

    def forward(self, t):
        omega = torch.exp(-math.log(10000) / 128 * torch.arange(128, device=t.device))
        angle = t.float()[:, None] * omega                                 # (B, 128)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], 1))          # (B, 256) -> (B, D)


class LabelEmbed(nn.Module):
    """One row a class, and a last one for "no class" (the null class of guidance)."""

    def __init__(self, num_classes, D):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, D)

    def forward(self, y):
        return self.embedding_table(y)                     # (B,) -> (B, D)


class FinalLayer(nn.Module):
    """Tokens -> P x P pieces of the answer, under the condition once more."""

    def __init__(self, D, out):
        super().__init__()
        self.norm_final = nn.RMSNorm(D, eps=1e-6)
        self.linear = nn.Linear(D, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, 1)                # (B, D) each
        return self.linear(modulate(self.norm_final(x), shift, scale))     # (B, N, P*P*d)


class DiT(nn.Module):
    """eps_theta(z_t, t, y), or v_theta. num_classes = 0 is an unconditional model.

    input_size: side of the latent grid; patch_size: latent cells a token's side; in_channels: d.
    """

    def __init__(self, input_size=32, patch_size=1, in_channels=16, hidden_size=768, depth=12,
                 num_heads=12, num_classes=0):
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"a latent grid of {input_size} is not a multiple of the patch, "
                             f"{patch_size}")
        D, size = hidden_size, input_size // patch_size
        self.patch_size, self.num_classes = patch_size, num_classes
        self.register_buffer("pos_embed", sincos_positions(D, size))
        self.x_embedder = PatchEmbed(in_channels, patch_size, D)
        self.t_embedder = TimestepEmbed(D)
        self.y_embedder = LabelEmbed(num_classes, D)
        self.feat_rope = Rope(D // num_heads, size)
        self.blocks = nn.ModuleList(Block(D, num_heads) for _ in range(depth))
        self.final_layer = FinalLayer(D, patch_size**2 * in_channels)
        self.apply(self._init)
        for layer in [b.adaLN_modulation[1] for b in self.blocks] + [
                self.final_layer.adaLN_modulation[1], self.final_layer.linear]:
            nn.init.zeros_(layer.weight)    # each block starts as the identity, the output as zero

    @staticmethod
    def _init(module):
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, z_t, t, y=None):
        """z_t (B, d, h, w), t (B,) in 0..T-1, y (B,) classes or None -> output, shaped like z_t."""
        B, d, h, w, P = *z_t.shape, self.patch_size
        if y is None:
            y = torch.full((B,), self.num_classes, device=z_t.device)      # the null class
        c = self.t_embedder(t) + self.y_embedder(y)                        # (B, D)
        x = self.x_embedder(z_t) + self.pos_embed                          # (B, N, D)
        for block in self.blocks:
            x = block(x, c, self.feat_rope)
        x = self.final_layer(x, c).reshape(B, h // P, w // P, P, P, d)     # rows of pieces
        return x.permute(0, 5, 1, 3, 2, 4).reshape(B, d, h, w)             # side by side again


# Rows of keyword arguments; grid, channels and classes are derived from stage one and the data.
sizes = {
    # the default chain, on a CPU
    "tiny": dict(patch_size=1, hidden_size=144, depth=5, num_heads=4),
    # DiT-S/2: for CelebA-HQ's 32 x 32 latents on one consumer GPU; patch 1 up to 16 x 16
    "small": dict(patch_size=2, hidden_size=384, depth=12, num_heads=6),
    # the paper's LightningDiT-B/1
    "base": dict(patch_size=1, hidden_size=768, depth=12, num_heads=12),
}


# ---- EMA, load --------------------------------------------------------------------------------

class EMA:
    """Average of the weights over training, which samples better than the last weights.

    The decay starts at .1 and rises as (1 + n) / (10 + n) to its final value, so that a short run
    averages its last tenth and forgets the random start. Buffers are copied, not averaged.
    """

    def __init__(self, model, decay=0.9999):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.n = decay, 0

    @torch.no_grad()
    def update(self, model):
        """Call after each optimiser step."""
        decay = min(self.decay, (1 + self.n) / (10 + self.n))
        self.n += 1
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
        for mine, theirs in zip(self.model.buffers(), model.buffers()):
            mine.copy_(theirs)


def read(path):
    """torch.load of tensors and plain values alone; OSError, in one sentence, if that fails."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such checkpoint; train_ldm.py makes one")
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        return dict(ckpt)
    except Exception:
        raise OSError(f"{path}: not a checkpoint, or a damaged one") from None


def published(path, ckpt):
    """The authors' LightningDiT in the form of our checkpoints, but for statistics and stage one.

    Its weights lie in {"ema": ...} or {"model": ...}, under DDP's and torch.compile's prefixes;
    shapes tell the constructor's arguments, the rotary tables how many heads. Says what was left
    over; OSError if it is another model, or if anything of it is missing.
    """
    weights = ckpt.get("ema") or ckpt.get("model") or ckpt
    weights = {re.sub(r"^(module\.|_orig_mod\.)+", "", k): v for k, v in weights.items()}
    try:
        D, d, P, _ = weights["x_embedder.proj.weight"].shape               # (D, d, P, P)
        num_classes = len(weights["y_embedder.embedding_table.weight"]) - 1    # the last is null
        args = dict(
            input_size=P * math.isqrt(weights["pos_embed"].shape[1]), patch_size=P, in_channels=d,
            hidden_size=D, depth=len({k.split(".")[1] for k in weights if k[:7] == "blocks."}),
            num_heads=D // weights["feat_rope.freqs_cos"].shape[1], num_classes=num_classes)
        model = DiT(**args)
        missing, left_over = model.load_state_dict(weights, strict=False)
    except (KeyError, RuntimeError) as error:
        raise OSError(f"{path}: neither a stage-two checkpoint, such as runs/ldm/last.pt, nor a "
                      f"LightningDiT ({str(error).splitlines()[-1].strip()})") from None
    if missing:
        raise OSError(f"{path}: lacks {len(missing)} weights of a LightningDiT, as {missing[0]}")
    print(f"{path}: {len(weights) - len(left_over)} tensors read, none missing; left over: "
          f"{', '.join(left_over) or 'none'}")
    return dict(model_args=args, ema=model.state_dict(), schedule=dict(objective="flow"),
                classes=[str(i) for i in range(num_classes)])


def load_ldm(path, stats=None):
    """A stage-two checkpoint, ours or the authors' -> (DiT with the EMA weights, Schedule, dict).

    The dict also holds latent_mean, latent_std, classes and, in a checkpoint of ours, `vmae`, the
    whole stage-one model. stats: a file of {"mean": d numbers, "std": d numbers}, which the authors
    keep beside their weights. Raises OSError, in one sentence, for anything else.
    """
    ckpt = read(path)
    if not {"model_args", "ema", "latent_mean", "latent_std", "vmae"} <= set(ckpt):
        ckpt = published(path, ckpt)
    if stats is not None:
        numbers = read(stats)           # of any shape: (1, d, 1, 1) in theirs
        for name in ("mean", "std"):
            ckpt[f"latent_{name}"] = torch.as_tensor(numbers.get(name, ())).float().flatten()
            if len(ckpt[f"latent_{name}"]) != ckpt["model_args"]["in_channels"]:
                raise OSError(f"{stats}: holds no {name} of the latent's "
                              f"{ckpt['model_args']['in_channels']} channels")
    if "latent_mean" not in ckpt:
        raise OSError(f"{path}: published weights come with a file of latent statistics; name it "
                      f"with --stats of sample.py or train_ldm.py")
    model = DiT(**ckpt["model_args"])
    model.load_state_dict(ckpt["ema"])  # what samples best
    return model.eval(), Schedule(**ckpt["schedule"]), ckpt

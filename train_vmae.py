"""Train stage one: VMAE (Sections 4.1 to 4.4), or an autoencoder that the paper compares it with.

    python train_vmae.py                                the built-in faces, on a laptop
    python train_vmae.py --data path --mask 0.6         a folder of images
    python train_vmae.py --data path --resume           the same, as often as it is interrupted
    python train_vmae.py --preset sdvae                 another autoencoder, into runs/sdvae
    python train_vmae.py --init runs/vmae --tune decoder --size 256    into runs/tuned
    torchrun --nproc-per-node 4 train_vmae.py --data path    several GPUs

Writes into --out: last.pt; log.jsonl, one JSON object per line, and its curves.png; preview_*.png,
whose rows are the original, the input (masked or noisy) and the reconstruction; and, of a folder,
its decoded images, images_*.npy.
"""
import argparse
import collections
import functools
import itertools
import math
import os
import re
import signal
import sys
import time
import warnings
from pathlib import Path

import vmae                                 # before torch, see there
import torch
import torch.distributed as dist
from tqdm import tqdm

from vmae import RANK, WORLD, InputError

# ---- The autoencoders that the paper compares, and how they are trained -----------------------

# The plain autoencoder has the loss L_R only, and z is mu.
AE = dict(arch="conv", mask=0.0, noise=0.0, lambda_reg=0.0, kl_mean="zero", lambda_p=0.0,
          lambda_adv=0.0)
# Each preset says what its autoencoder changes. lambda_p = None: .5 on a folder, if the weights of
# the network of L_P can be had.
PRESETS = {
    "ae": {},
    "dae": dict(noise=0.2),
    "vae": dict(lambda_reg=3e-4),
    "sdvae": dict(lambda_reg=1e-5, lambda_p=None,
                  lambda_adv=0.1),          # with Esser's 0.5 the discriminator learnt nothing
    "mae": dict(arch="vit", mask=0.6),
    "vmae": dict(arch="vit", mask=0.6, kl_mean="free", lambda_p=None,
                 lambda_reg=1e-4)}          # with the authors' 1e-6 sigma was .016 of mu's spread,
                                            # with this one .12 (.09 with Muon), for .2 dB
TUNED = dict(mask=0.0, lambda_p=None, out="runs/tuned")    # with --tune decoder

# The other options of stage one; None means that fill_in chooses. The comments give the PSNR of
# held-out faces after 2,200 steps of AdamW at lr 1.5e-3 with a cosine down, 31.0 dB with these
# values.
DEFAULTS = dict(preset="vmae", size=None, init=None, tune=None, adv_start=None, vgg_weights=None,
                no_cache=False,
                whole=0.5,                  # 28.3 dB with 0: the encoder is used on whole images
                lambda_m=0.1)               # 28.6 dB with 1, as the authors': L_M dominates then

# Recipes, by size, body and device ("cpu" stands for all but CUDA): the optimiser, images per step,
# steps, peak learning rate. Muon is the default where it was tried and won; base, and large batches
# on a GPU, where it was not tried, have AdamW. What was tried on a CPU (AMD EPYC, float32, batch
# 16), held-out PSNR in dB:
#
#   tiny vit, 500 steps, lr 4e-3    momentum .95: 30.1, .9: 30.7, .85: 30.7. With .95: a step 5/3 as
#                                   long 30.0; all matrices but the last by Muon 29.9; a third of
#                                   the weight decay 30.0; four iterations in orthogonalise 29.3
#                                   (all with a cosine down; after 600 steps of .9 31.28, and 31.43
#                                   with today's line)
#   tiny conv (ae), 300 steps       lr 1.5e-3: Muon 21.6, AdamW 18.8; lr 4e-3: Muon 21.4, AdamW 17.1
#   small conv, photographs, 64 px  lr 1e-3, 80 steps: Muon 20.5, AdamW 18.2
#   small vit, photographs, 64 px   lr 1e-3: Muon 34.0 after 1,200 steps, AdamW 33.8 after 6,000
RECIPES = {
    ("tiny", "vit", "cpu"): dict(optimizer="muon", batch=16, steps=1100, lr=4e-3),
    ("tiny", "vit", "cuda"): dict(optimizer="adamw", batch=128, steps=6000, lr=4e-3),  # 35.7 dB
    ("tiny", "conv", "cpu"): dict(optimizer="muon", batch=16, steps=1100, lr=1.5e-3),
    ("tiny", "conv", "cuda"): dict(optimizer="adamw", batch=128, steps=3000, lr=4e-3),
    ("small", "vit", "cpu"): dict(optimizer="muon", batch=16, steps=2000, lr=1e-3),
    ("small", "vit", "cuda"): dict(optimizer="muon", batch=16, steps=2000, lr=1e-3),
    ("small", "conv", "cpu"): dict(optimizer="muon", batch=16, steps=2000, lr=1e-3),
    ("small", "conv", "cuda"): dict(optimizer="muon", batch=16, steps=2000, lr=1e-3),
    # The authors' learning rate of 8e-4 is for 2,048 images: this is sqrt(128 / 2048) of it.
    ("base", "vit", "cpu"): dict(optimizer="adamw", batch=128, steps=100_000, lr=2e-4),
    ("base", "vit", "cuda"): dict(optimizer="adamw", batch=128, steps=100_000, lr=2e-4),
    # An image takes 22 times the operations that it takes in VMAE.
    ("base", "conv", "cpu"): dict(optimizer="adamw", batch=16, steps=100_000, lr=2e-4),
    ("base", "conv", "cuda"): dict(optimizer="adamw", batch=16, steps=100_000, lr=2e-4)}
# Pixels at once on a CPU or Mac, see choose_micro. 8 images of 256 px take some 5 GB with VMAE base
# and LPIPS.
AT_ONCE = {"vit": 8 * 256**2, "conv": 2 * 256**2}

# ---- The training loop ------------------------------------------------------------------------

def main():
    args, given, resumed = read_options()   # resumed: the checkpoint to go on from, or None
    device = vmae.start(args.device)        # cuda, cpu or mps
    start_from = resumed
    if resumed is None and args.init:
        start_from = vmae.read_stage_one(args.init)
    fill_in(args, given, device, start_from)
    # Three options are not decided before they are tried: lambda_p, precision and micro, below.

    # What is trained, and what a checkpoint holds of it.
    torch.manual_seed(args.seed)            # the same weights in every process
    model, model_args = new_model(args, start_from)
    train, val = vmae.open_images(args.data, args.size, args.val, args.out)
    model.to(device, memory_format=layout(args))
    lpips_net = load_perceptual(args, given, device)       # without it lambda_p becomes 0
    autocast = matmul_precision(args, device)
    opts = optimisers(model, args)          # AdamW, and Muon beside it
    states = {"model": model, **opts}
    disc = None
    if args.lambda_adv > 0:                 # SD-VAE's discriminator
        disc = vmae.discriminator(args.size).to(device)
        states["disc"] = disc
        states["disc_opt"] = optimisers(disc, args)["opt"]
    start = load_states(args, resumed, states)             # the step to begin with
    resumed = start_from = None             # their memory is free again
    generator = torch.Generator(device)     # of all that is random in a micro-batch

    def micro_batch(x, mask_ratio, adversary):
        """The losses of a part of the batch, x uint8 (B, 3, H, W), by name. Their gradients are
        added to those of the other parts. On CUDA this is recorded and then replayed (Replay): what
        changes from step to step has to be an argument."""
        x = vmae.to_float(x)                                               # (B, 3, H, W)
        if args.flip:
            x = vmae.random_flip(x, generator)
        x_in = x
        if args.noise > 0:                  # dae
            x_in = x + args.noise * torch.randn(x.shape, generator=generator, device=device)
        lambda_M = args.lambda_m if mask_ratio > 0 else 0.0
        with autocast():
            p, q, mask = model(x_in, mask_ratio, generator)                # x_v -> q -> z -> p
            loss, terms = vmae.loss_VMAE(x, p, q, mask, model.patch_size, lambda_M, args.lambda_p,
                                         args.lambda_reg, args.kl_mean, lpips_net)
            if adversary:                   # sdvae: the autoencoder against the discriminator
                disc.requires_grad_(False)
                fake = disc(p.mode())                                      # (B, 1, h', w')
                terms["L_G"] = vmae.loss_G(fake, loss, model.last_layer)
                loss = loss + args.lambda_adv * terms["L_G"]
        share = len(x) / args.batch
        (share * loss).backward()
        if adversary:                       # and the discriminator on x and x_hat
            disc.requires_grad_(True)
            with autocast():
                real, fake = disc(torch.cat([x, p.mode().detach()])).chunk(2)
            terms["L_D"] = vmae.loss_D(real, fake)
            (share * terms["L_D"]).backward()
        return {name: term.detach() for name, term in terms.items()}       # scalars

    def largest_part(n):                    # whole images, every network
        grey = torch.zeros(n, 3, args.size, args.size, dtype=torch.uint8, device=device)
        micro_batch(grey, mask_ratio=0.0, adversary=disc is not None)

    # Each batch is worked through in micro-batches, of which this process takes its share.
    at_once = AT_ONCE[args.arch] // args.size**2           # without a GPU, which tries it out
    args.micro = choose_micro(args, given, device, largest_part, states, at_once)
    my_micro_batches = parts_of_this_process(args)         # their numbers
    vmae.hold(args.out)                     # against a second job in the same folder
    say_options(args, model)
    vmae.describe(train, val)
    if isinstance(train, vmae.ImageFolder):
        train.keep_pixels(args.out, not args.no_cache, val)
    batches = training_batches(train, args, start, my_micro_batches, device)
    x_val = held_out_images(val, device)                   # (64, 3, H, W)
    fast_micro_batch = make_fast(micro_batch, args, given, generator, blocks(args, model),
                                 lpips_net)

    run = Run(args, states, start, device)  # its log, its checkpoints, and when it ends
    for step in run.steps(range(start, args.steps)):
        lr = learning_rate(step, args.steps, args.lr)      # up, then down to 0
        mask_ratio = 0.0 if sees_whole_images(step, args.whole) else args.mask
        adversary = disc is not None and step >= args.adv_start
        for i in my_micro_batches:
            x, _ = next(batches)                           # uint8 (B, 3, H, W)
            generator.manual_seed(vmae.seed_of(args.seed, step, i))
            terms = fast_micro_batch(x, mask_ratio=mask_ratio, adversary=adversary)
            run.add(terms, len(x) / args.batch)
        is_finite = optimiser_step(opts.values(), model, lr)               # clip, step, zero
        if adversary:                       # each network changes if its own gradient is finite
            is_finite = is_finite & optimiser_step([states["disc_opt"]], disc, lr)
        run.skipped += ~is_finite
        run.end_step(step, lr, lambda preview: validate(model, x_val, args, preview),
                     model_args=model_args)

def sees_whole_images(step, share):
    """Whether this step sees whole images: every other one for 0.5, every fourth for 0.25. This
    spreads them evenly over the run."""
    return math.floor((step + 1) * share) > math.floor(step * share)

# ---- Measured at each save --------------------------------------------------------------------

def held_out_images(val, device):
    """64 held-out images, always the same, (64, 3, H, W); None outside of process 0, which
    measures."""
    if RANK > 0:
        return None
    x, _ = val.batch(val.some(64).tolist())
    return vmae.to_float(x.to(device))

@torch.no_grad()
@torch.compiler.set_stance("force_eager")   # these shapes are not worth compiling
def validate(model, x_val, args, path):
    """Held-out x_val (B, 3, H, W) -> {"PSNR_val": of whole images, "PSNR_m_val": of the masked
    patches, masked as in training}, in dB. Saves 8 as rows of original, input, reconstruction."""
    P = model.patch_size
    generator = torch.Generator(x_val.device).manual_seed(0)
    found = {"PSNR_val": [], "PSNR_m_val": []}
    picture = None
    for x in x_val.split(8):                                               # (8, 3, H, W)
        x_in = x + args.noise * torch.randn(x.shape, generator=generator, device=x.device)
        p, _, mask = model(x_in, args.mask, generator)     # as in training
        x_hat = model.decode(model.encode(x).mode())       # and as in use
        if picture is None:
            seen = vmae.patchify(x_in, P) * (1 - mask[..., None])          # grey where masked
            picture = [x, vmae.unpatchify(seen, P, *x.shape[2:]), p.mode()]
        real = vmae.to_uint8(x).cpu()                      # PSNR is in float64, unknown to MPS
        whole = vmae.to_uint8(x_hat).cpu()
        guess = vmae.to_uint8(p.mode()).cpu()
        found["PSNR_val"].append(vmae.psnr(real, whole))   # (8,)
        if args.mask > 0:                   # each image hides as many pixels, so they fit a tensor
            hidden = mask.cpu() == 1                                       # (8, N)
            hidden_real = vmae.patchify(real, P)[hidden].view(len(x), 1, 1, -1)
            hidden_guess = vmae.patchify(guess, P)[hidden].view(len(x), 1, 1, -1)
            found["PSNR_m_val"].append(vmae.psnr(hidden_real, hidden_guess))
    vmae.save_grid(picture, path)
    means = {}
    for name, values in found.items():
        if values:
            means[name] = round(torch.cat(values).mean().item(), 2)
    return means

# ---- The optimiser, shared with train_ldm.py --------------------------------------------------

def orthogonalise(M):
    """Matrices M = U S V^T, (K, m, n) -> about U V^T, where all directions of M count alike.

    X <- a X + b (X X^T) X + c (X X^T)^2 X changes nothing but the singular values, each from s to
    a s + b s^3 + c s^5, so no decomposition is needed (Bernstein & Newhouse 2024). With Jordan's a,
    b and c (Muon, 2024) five iterations bring all from .002 to 1 into .7 to 1.2, near enough to 1.
    """
    is_tall = M.shape[1] > M.shape[2]
    X = M.mT if is_tall else M                             # (K, m, n), from here on m <= n
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-20)
    for _ in range(5):
        A = X @ X.mT                                                       # (K, m, m)
        A = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)             # b A + c A^2
        X = torch.baddbmm(X, A, X, beta=3.4445)                            # a X + (b A + c A^2) X
    return X.mT if is_tall else X

class Muon(torch.optim.Optimizer):
    """Descent along the momentum, made orthogonal (Jordan 2024). For a matrix W (m, n) with the
    gradient g, or a convolution's kernel, which is a matrix C_out x (C_in k k):

        M <- .9 M + .1 g
        W <- (1 - decay lr) W - .6 lr sqrt(max(m, n)) orthogonalise(.9 M + .1 g)

    Jordan has .95 and .05; in runs as short as ours .9 learns faster, see RECIPES. With the root a
    weight moves by about .6 lr, whatever the size of its matrix. decay: of the weights; dtype: of
    the products inside orthogonalise.

    A step takes as long for one image as for a thousand. In the default run on two CPU cores, in
    float32, it is 31 ms beside 91 ms of forward and backward in stage one and 62 beside 181 in
    stage two, where AdamW alone takes 4 and 10. Tried: to orthogonalise in every second step only,
    and to move twice as far. It gains no time."""

    def __init__(self, matrices, decay, dtype):
        stacks = {}                         # equal matrices of all blocks are computed in one go
        for p in matrices:
            stacks.setdefault(p.flatten(1).shape, []).append(p)
        super().__init__([dict(params=stack) for stack in stacks.values()], dict(lr=0.0))
        self.decay = decay
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        """found_inf, a tensor, is 1 if a gradient is not finite: then nothing changes."""
        fine = 1 - self.found_inf
        for group in self.param_groups:
            stack = group["params"]
            g = torch.stack([p.grad.flatten(1) for p in stack])            # (K, m, n)
            g = torch.where(fine > 0, g, 0)
            state = self.state[stack[0]]
            if len(state) == 0:
                state["M"] = torch.zeros_like(g)
            M = state["M"]
            M.lerp_(g, 0.1 * fine)
            direction = orthogonalise(g.lerp(M, 0.9).to(self.dtype)).float()
            lr = group["lr"] * fine
            length = 0.6 * lr * math.sqrt(max(g.shape[1:]))
            torch._foreach_mul_(stack, 1 - self.decay * lr)
            torch._foreach_sub_(stack, [d.view_as(p) for d, p in zip(length * direction, stack)])

def optimisers(model, args):
    """-> {"opt": AdamW}, with betas (.9, .95) as in the authors' recipes. With --optimizer muon
    also "muon": Muon, for the matrices inside the blocks, kernels of convolutions among them. AdamW
    keeps what lies outside of the blocks, adaLN's matrices, and what is no matrix. Weights decay in
    matrices, not in norms, biases and what else has one side of 1, such as kernels of 1 x 1: these
    could be matrices, but then no run from before could go on, whose optimiser has other groups."""
    hidden = []
    matrices = []
    others = []
    for name, p in model.named_parameters():
        if not p.requires_grad:             # of a frozen encoder
            continue
        is_matrix = p.ndim > 1 and min(p.shape) > 1
        is_hidden = "block" in name and "adaLN" not in name
        if is_matrix and is_hidden and args.optimizer == "muon":
            hidden.append(p)
        elif is_matrix:
            matrices.append(p)
        else:
            others.append(p)
    groups = [dict(params=matrices, weight_decay=0.05), dict(params=others, weight_decay=0.0)]
    opts = {"opt": torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)}   # one kernel
    if hidden:
        opts["muon"] = Muon(hidden, decay=0.15, dtype=getattr(torch, args.precision))
    return opts

def optimiser_step(opts, model, lr):
    """One step of these optimisers with the gradients that all processes have summed, clipped at
    norm 1, and then zeroed -> whether they were finite, a tensor. If not, no weight and no momentum
    is changed: found_inf, as mixed-precision training uses it, leaves a step out, and the CPU need
    not wait for the GPU."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    if WORLD > 1:
        sum_over_processes([p.grad for p in parameters])
    is_finite = torch.nn.utils.clip_grad_norm_(parameters, 1.0).isfinite()
    for opt in opts:
        for group in opt.param_groups:
            group["lr"] = lr
        opt.found_inf = (~is_finite).float()
        opt.step()
        opt.zero_grad(set_to_none=False)    # the gradients stay where Replay has recorded them
    return is_finite

def leave_out_step(opt):
    """An optimiser step that changes no weight, see optimiser_step, but makes room for the
    moments."""
    parameter = opt.param_groups[0]["params"][0]
    opt.found_inf = torch.ones((), device=parameter.device)
    opt.step()

# ---- Options of stage one, and what they build ------------------------------------------------

def read_options():
    """The command line -> (all options, those that were given, the checkpoint to go on from or
    None). `fill_in` chooses the options that are still None."""
    parser = common_parser(__doc__)
    parser.add_argument("--size", type=vmae.count_type, help="side of the images in pixels "
                        "(default: that of --init; faces 32; folders 256 on CUDA, else 64)")
    parser.add_argument("--preset", choices=PRESETS, help="autoencoder of the paper; sets defaults "
                        "of options below (PRESETS), and --out to runs/PRESET (default: vmae)")
    parser.add_argument("--arch", choices=("vit", "conv"), help="body: VMAE's transformer or the "
                        "convolutions of SD-VAE (default: vmae and mae vit, others conv)")
    parser.add_argument("--init", type=absolute_checkpoint, metavar="CHECKPOINT", help="start from "
                        "this model: ours, a published VMAE or a VAE of Stable Diffusion")
    parser.add_argument("--tune", choices=("decoder",), help="train the decoder of --init and "
                        "leave its encoder as it is, without a mask and with LPIPS at 10: the "
                        "authors' last stage; into runs/tuned")
    group = parser.add_argument_group("the loss")
    group.add_argument("--mask", type=vmae.fraction_type, help="share of the patches that is "
                       "masked (default: vmae and mae 0.6, others 0)")
    group.add_argument("--whole", type=vmae.fraction_type, help="share of the steps that see whole "
                       "images (default: 0.5)")
    group.add_argument("--noise", type=vmae.weight_type, help="standard deviation of the noise on "
                       "x (default: dae 0.2, others 0)")
    group.add_argument("--lambda-m", type=vmae.weight_type, help="weight of L_M (default: 0.1)")
    group.add_argument("--lambda-reg", type=vmae.weight_type, help="weight of L_reg; with 0 z has "
                       "no variance (default: vmae 0.0001, vae 0.0003, sdvae 1e-05, others 0)")
    group.add_argument("--lambda-p", type=vmae.weight_type, help="weight of L_P, LPIPS (default: "
                       "vmae and sdvae 0.5 on a folder if VGG's weights can be had, otherwise 0)")
    group.add_argument("--lambda-adv", type=vmae.weight_type, help="weight of the adversarial "
                       "loss, which begins halfway through the run (default: sdvae 0.1, others 0)")
    group.add_argument("--kl-mean", choices=("free", "zero"), help="free: L_reg pulls only the "
                       "variance, to 1, Section 4.4; zero: the KL of Eq. (1) (default: vmae free, "
                       "others zero)")
    group.add_argument("--vgg-weights", metavar="FILE", help="local copy of torchvision's "
                       "vgg16-397923af.pth, for LPIPS")
    group = parser.add_argument_group("the images")
    group.add_argument("--no-cache", action="store_true", help="decode images in each epoch anew; "
                       "by default a folder's decoded images are kept in --out, 3 * size^2 bytes "
                       "each, if the disk has room")
    given = vars(parser.parse_args())

    preset = given.get("preset", DEFAULTS["preset"])
    defaults = {**DEFAULTS, **AE, "out": f"runs/{preset}", **PRESETS[preset]}
    if "tune" in given:
        defaults.update(TUNED)
    args, resumed = options_of_run(defaults, given, "stage one")
    if "init" in given and ("arch" in given or "model" in given):
        raise InputError("--arch, --model: --init decides the shape of the model; leave them out")
    if args.tune and not args.init:
        raise InputError("--tune decoder: needs a trained model; name its checkpoint with --init")
    idle = dict(lambda_m=args.mask == 0, whole=args.mask == 0, kl_mean=args.lambda_reg == 0,
                no_cache=args.data is None)
    say_idle(given, idle)
    return args, given, resumed

def fill_in(args, given, device, start_from):
    """Choose the options that are still None, but for those that have to be tried. given: those of
    the command line; start_from: the checkpoint of --resume or --init."""
    if start_from is not None:
        model_args = start_from["model_args"]
        args.size = args.size or model_args["img_size"]
        args.arch = "conv" if "channels" in model_args else "vit"
        args.model = args.model or name_of_size(model_args)
    if args.arch == "conv" and args.mask > 0 and ("mask" in given or "arch" in given):
        raise InputError(f"--mask {args.mask}: convolutions cannot skip patches; give --mask 0")
    if args.arch == "conv":                 # --init may be one, whatever the preset
        args.mask = 0.0
    on_cuda = device.type == "cuda"
    if args.compile is None:
        args.compile = on_cuda
    if args.flip is None:
        args.flip = True
    if args.size is None and args.data is None:
        args.size = 32
    elif args.size is None:
        args.size = 256 if on_cuda else 64
    if args.model is None and args.size <= 32:
        args.model = "tiny"
    elif args.model is None:
        args.model = "base" if on_cuda else "small"
    use_recipe(args, RECIPES[args.model, args.arch, "cuda" if on_cuda else "cpu"])
    if "data" not in given:
        vmae.refuse_program(args.data, "name it again with --data, so that it may run")
    if args.lambda_p is None and args.tune:
        args.lambda_p = 10.0
    elif args.lambda_p is None:             # on the small faces VGG would cost more than the rest
        args.lambda_p = 0.5 if args.data else 0.0
    if args.adv_start is None:              # late (Esser 2021): an early x_hat is too easy to tell
        args.adv_start = args.steps // 2
    too_small(args, given, "lambda_p", "LPIPS", vmae.LPIPS_MIN)
    too_small(args, given, "lambda_adv", "the discriminator", vmae.DISCRIMINATOR_MIN)

def too_small(args, given, name, network, least):
    """Switch a loss off, with a line, if its network needs larger images. InputError if the user
    asked for it."""
    if args.size >= least or getattr(args, name) == 0:
        return
    why = f"{network} needs images of {least} pixels, and --size is {args.size}"
    if given.get(name):
        raise InputError(f"--{name.replace('_', '-')}: {why}; give 0, or a larger --size")
    vmae.say(f"training without {network}: {why}")
    setattr(args, name, 0.0)

def name_of_size(model_args):
    """Arguments of a constructor -> the key of `sizes` or `conv_sizes` that has them, or None."""
    for table in (vmae.sizes, vmae.conv_sizes):
        for name, row in table.items():
            if all(model_args.get(key) == value for key, value in row.items()):
                return name
    return None

def new_model(args, start_from):
    """Options -> (model, arguments of its constructor), with the weights of start_from, see
    fill_in. InputError names --size and --mask if they do not fit the model."""
    if start_from is not None:
        model_args = dict(start_from["model_args"], img_size=args.size)
    elif args.arch == "vit":
        model_args = dict(vmae.sizes[args.model], img_size=args.size)
    else:
        model_args = dict(vmae.conv_sizes[args.model], img_size=args.size)
    try:
        model = vmae.build(model_args)
        vmae.random_mask(1, model.grid, model.grid, args.mask)     # only for its ValueError
    except ValueError as error:
        raise InputError(f"--size {args.size} --mask {args.mask}: {error}") from None
    if start_from is not None:
        weights = vmae.resize_positions(start_from["model"], model)
        model = vmae.build_vmae(dict(start_from, model_args=model_args, model=weights)).train()
    if args.lambda_reg == 0:
        vmae.drop_variance(model)
    decoder = ("decoder", "from_latent", "mask_token", "post_quant_conv")
    for name, p in model.named_parameters():               # a frozen encoder keeps its latents
        p.requires_grad_(not args.tune or name.startswith(decoder))
    return model, model_args

def layout(args):
    """How images lie in memory. Convolutions are faster if the channels of a pixel are together."""
    if args.arch == "conv":
        return torch.channels_last
    return torch.contiguous_format

def blocks(args, model):
    """The modules of the autoencoder that can be compiled: the convolutional body has none."""
    if args.arch == "conv":
        return []
    return [*model.blocks, *model.decoder_blocks]

def load_perceptual(args, given, device):
    """The network of L_P, or None if its weight is 0. Process 0 downloads VGG's weights for all. If
    they cannot be had, the run goes on without L_P, unless the user asked for it."""
    if args.vgg_weights and args.lambda_p == 0:
        raise InputError("--vgg-weights: L_P has weight 0 here; give --lambda-p as well")
    if args.lambda_p == 0:
        return None
    lpips_net = None
    trouble = None
    if RANK == 0:
        try:
            lpips_net = vmae.load_lpips(args.vgg_weights)
        except InputError as error:
            if "lambda_p" in given or args.vgg_weights:
                raise
            trouble = str(error)
    trouble = vmae.from_first(lambda: trouble)
    if trouble is not None:
        vmae.say(f"warning: training without L_P, so images will be blurred; {trouble}")
        args.lambda_p = 0.0
        return None
    if lpips_net is None:
        lpips_net = vmae.load_lpips(args.vgg_weights)
    if device.type == "cuda":               # its convolutions are faster so
        lpips_net.to(memory_format=torch.channels_last)
    return lpips_net.to(device)

# ---- Options, shared with train_ldm.py --------------------------------------------------------

# Options of both trainers; None means that they are chosen later.
COMMON = dict(data=None, val=None, flip=None, model=None, batch=None, micro=None, steps=None,
              optimizer=None, lr=None, save_every=1000, keep=False, seed=0, device="auto",
              precision="auto", resume=False, compile=None)
# A resumed run ignores what its checkpoint says of these options.
FRESH = ("resume", "out", "device", "compile")
# A resumed run keeps the values of all others, but accepts a new one for these.
FREE = "data val steps lr micro save_every keep precision no_cache vgg_weights".split()

def absolute_checkpoint(path):
    """For options, as argparse's type: as vmae.checkpoint_path, but absolute, because a resumed run
    may start in another folder."""
    return os.path.abspath(vmae.checkpoint_path(path))

def common_parser(doc):
    """-> a parser of the options of both trainers. What was not given is not in its result, so
    that it can be told from a default."""
    parser = vmae.Parser(description=doc.split("\n")[0], usage="%(prog)s [options]",
                         allow_abbrev=False, argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("--data", type=os.path.abspath, metavar="FOLDER", help="folder of images, whose "
        "sub-folders are classes (default: stage one: the built-in faces; stage two: that of stage "
        "one)")
    add("--val", type=os.path.abspath, metavar="FOLDER", help="folder of held-out images (default: "
        "stage one: one in twenty of --data, chosen by its path; stage two: that of stage one)")
    add("--flip", action=argparse.BooleanOptionalAction, help="mirror half of the images; not for "
        "letters, digits, or what has a left and a right (default: stage one: yes; stage two: as "
        "stage one)")
    add("--model", choices=vmae.sizes, help="size of the network (default: stage one: tiny to 32 "
        "px; above, base on CUDA, else small; stage two: small on CUDA, else tiny)")
    add("--batch", type=vmae.count_type, help="images per optimiser step (default: see RECIPES)")
    add("--micro", type=vmae.count_type, help="images at once, whose gradients are summed "
        "(default: as many as fit)")
    add("--steps", type=vmae.count_type, help="optimiser steps in all (default: see RECIPES)")
    add("--optimizer", choices=("muon", "adamw"), help="muon: Muon for the matrices of the blocks, "
        "AdamW for all else; adamw: AdamW alone (default: see RECIPES)")
    add("--lr", type=vmae.positive_type, help="peak learning rate (default: see RECIPES)")
    add("--save-every", type=vmae.count_type, help="steps between checkpoints (default: 1000)")
    add("--keep", action="store_true", help="keep each checkpoint, to measure it later, as "
        "step_000123.pt beside last.pt, and as large")
    add("--out", metavar="FOLDER", help="run folder (default: stage one: runs/PRESET; stage two: "
        "runs/ldm)")
    add("--seed", type=vmae.seed_type, help="sets weights, order, masks and noise (default: 0)")
    add("--device", help="cuda, cpu, mps... (default: cuda if there is one)")
    add("--precision", choices=("auto", "float32", "bfloat16"), help="of matrix products; auto: "
        "bfloat16 on CUDA from Ampere on, or if a CPU is faster with it; float32: as TF32 on CUDA "
        "(default: auto)")
    add("--resume", action="store_true", help="go on from last.pt in --out, or begin if there is "
        "none; the options that change the run stay as they were")
    add("--compile", action=argparse.BooleanOptionalAction, help="compile each transformer block "
        "and the network of LPIPS, and on CUDA replay each step as one launch (default: on CUDA "
        "yes, with blocks from size small on; elsewhere no)")
    return parser

def options_of_run(defaults, given, stage):
    """-> (all options, the checkpoint of the run that goes on, or None). Ends the script if that
    run is complete. defaults: those of this script alone; given: the options of the command line;
    stage: "stage one" or "stage two"."""
    defaults = {**COMMON, **defaults}
    resumed = run_to_resume(defaults, given, stage)
    args = resolve(defaults, given, resumed)
    end_if_complete(args, resumed)
    return args, resumed

def run_to_resume(defaults, given, stage):
    """The checkpoint in --out, to go on from, or None if there is none. InputError if --resume is
    missing, or if it is none of this stage."""
    last = os.path.join(given.get("out", defaults["out"]), "last.pt")
    if not os.path.exists(last):
        if "resume" in given:
            vmae.say(f"{last}: no checkpoint yet, so the run begins")
        return None
    ckpt = vmae.read_checkpoint(last)
    ckpt["path"] = last
    for entry in ("train_args", "step", "model_args", "model", "opt"):
        if entry not in ckpt:
            raise InputError(f"{last}: lacks {entry}; give another --out")
    if "resume" not in given:
        raise InputError(f"{last} holds step {ckpt['step']} of a run; go on with --resume, or "
                         f"begin another one with --out")
    if stage != ("stage two" if "vmae" in ckpt else "stage one"):
        raise InputError(f"{last}: a checkpoint of the other stage; give another --out")
    return ckpt

def resolve(defaults, given, ckpt):
    """Options in layers -> Namespace: defaults; those of the run that goes on, if ckpt is not None;
    those given on the command line. InputError if an option may not differ from that run's."""
    if ckpt is None:
        return argparse.Namespace(**{**defaults, **given})
    saved = {"optimizer": "adamw"}          # a run from before there was a choice
    for name, value in ckpt["train_args"].items():
        if name in defaults and name not in FRESH:
            saved[name] = value
    for name, value in given.items():
        if name in saved and name not in FREE and value != saved[name]:
            raise InputError(f"--{name.replace('_', '-')} {value}: the run in "
                             f"{os.path.dirname(ckpt['path'])} has {saved[name]}; leave it out, or "
                             f"begin another with --out")
    args = argparse.Namespace(**{**defaults, **saved, **given})
    if args.data and saved.get("data", args.data) is None:  # a folder may have moved; faces cannot
        raise InputError(f"--data {args.data}: the run in {args.out} was trained on the built-in "
                         f"faces; begin another with --out")
    return args

def end_if_complete(args, ckpt):
    """End the script if the run that is to go on has made all its steps. Say what becomes of its
    learning rate, if that will not go on as it began: with other --steps, with another --lr, or
    after a version of this file in which it fell along another curve."""
    if ckpt is None:
        return
    if ckpt["step"] >= args.steps:
        vmae.say(f"{ckpt['path']}: complete, at step {ckpt['step']} of {args.steps}")
        sys.exit()
    was = ckpt["opt"]["param_groups"][0]["lr"]             # in its last step
    if not math.isclose(was, learning_rate(ckpt["step"] - 1, args.steps, args.lr)):
        now = learning_rate(ckpt["step"], args.steps, args.lr)
        vmae.say(f"learning rate: {was:.2g} in the last step of the run; it goes on from "
                 f"{now:.2g}, as in a run of {args.steps} steps, and falls to 0 at the end")

def say_idle(given, idle):
    """Name the options that were given although they have no effect. idle: {name: whether}."""
    for name in given:
        if idle.get(name):
            vmae.say(f"--{name.replace('_', '-')}: has no effect beside the other options")

def use_recipe(args, recipe):
    """Give the options that are still None the recipe's values."""
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)

# ---- Plumbing, shared with train_ldm.py -------------------------------------------------------

def matmul_precision(args, device):
    """Choose --precision, if it is auto -> a function that makes the context in which matrix
    products have it. On CUDA it also lets torch choose fast kernels."""
    if args.precision == "auto":
        fast = vmae.smallest(vmae.has_bfloat16(device))    # the same in all processes
        args.precision = "bfloat16" if fast else "float32"
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True              # shapes repeat: try all algorithms once
        torch.set_float32_matmul_precision("high")         # what remains in float32: as TF32
    return lambda: torch.autocast(device.type, torch.bfloat16, args.precision == "bfloat16")

def choose_micro(args, given, device, largest_part, states, at_once):
    """-> --micro, how many images are worked on at once. That of the command line is kept; so is
    that of a run that goes on, if it gives every process a part.

    On CUDA a whole step is tried: largest_part(n) computes the gradients of n images, and the
    optimisers make room for their moments. While that does not fit, n is halved. Afterwards weights
    and moments are as if nothing had been tried. A tenth more images than will be used leave some
    room for what the trial does not know. Elsewhere: at_once images."""
    if "micro" in given:
        return args.micro
    if args.micro is not None and math.ceil(args.batch / args.micro) >= WORLD:
        return args.micro
    fits = at_once
    if device.type == "cuda":
        fits = math.ceil(args.batch / WORLD)
        while fits > 1 and not step_fits(math.ceil(1.1 * fits), largest_part, states):
            fits = math.ceil(fits / 2)
    return equal_parts(args.batch, vmae.smallest(fits))

def equal_parts(batch, fits):
    """The size of the micro-batches: the largest divisor of a process's share of the batch that is
    at most `fits`. They are equal because each shape is compiled and recorded by itself."""
    share = max(1, batch // WORLD)
    size = max(1, min(fits, share))
    while share % size > 0:
        size -= 1
    return size

def parts_of_this_process(args):
    """The numbers of the micro-batches that this process takes of each batch: every WORLD-th."""
    n_micro = math.ceil(args.batch / args.micro)           # the last one may be smaller
    if n_micro < WORLD:
        enough = "a larger --batch"
        if args.batch >= WORLD:
            enough = f"--micro {args.batch // WORLD}"
        raise InputError(f"--batch {args.batch} --micro {args.micro}: {n_micro} parts are too few "
                         f"for {WORLD} processes; give {enough}")
    return range(RANK, n_micro, WORLD)

def step_fits(n, largest_part, states):
    """Whether a step with n images at once fits the memory of the GPU."""
    opts = [part for part in states.values() if isinstance(part, torch.optim.Optimizer)]
    fits = True
    try:
        largest_part(n)
        for opt in opts:
            leave_out_step(opt)
    except torch.OutOfMemoryError:
        fits = False                        # its tensors are freed at the end of this block
    for opt in opts:
        opt.zero_grad(set_to_none=False)
    torch.cuda.empty_cache()
    return fits

class Replay:
    """A function of CUDA tensors whose kernels are launched all at once, as a CUDA graph.

    Python launches the hundreds of kernels of a training step one after another. A GPU that is done
    with each of them at once waits for Python most of the time. For each set of shapes and options:

        call 1    runs the function; libraries choose their kernels, blocks are compiled
        call 2    runs it, and watches whether it reads a tensor on the CPU (item(), print); if it
                  does, it cannot be recorded, and all calls run it
        call 3    records it, and replays the record, as do all later calls

    So the result may depend on nothing but the tensors, the options and the generator."""

    def __init__(self, function, generator):
        self.function = function
        self.generator = generator
        self.pool = torch.cuda.graph_pool_handle()         # all records use the same memory
        self.runs = collections.Counter()
        self.records = {}
        self.waits = False

    def __call__(self, *tensors, **options):
        key = (*[v.shape for v in tensors], *options.values())
        self.runs[key] += 1
        if self.runs[key] == 2:
            return self.watched(*tensors, **options)
        if self.runs[key] == 1 or self.waits:
            return self.function(*tensors, **options)
        if key not in self.records:
            self.records[key] = self.record(*tensors, **options)
        copies, graph, outputs = self.records[key]
        for copy, v in zip(copies, tensors):
            copy.copy_(v)
        graph.replay()
        return outputs

    def watched(self, *tensors, **options):
        """The function's outputs. Notes whether it waits for the GPU."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            outputs = self.function(*tensors, **options)
            torch.cuda.set_sync_debug_mode("default")
        for warning in caught:
            if "synchronizing CUDA operation" in str(warning.message):
                self.waits = True
        if self.waits:
            vmae.say("a step reads a tensor on the CPU (item(), print), so it cannot be replayed")
        return outputs

    def record(self, *tensors, **options):
        """-> the tensors that a replay reads, the graph, the outputs that it writes."""
        copies = [v.clone() for v in tensors]
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)     # a replay takes its seed from there
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            outputs = self.function(*copies, **options)
        return copies, graph, outputs

def make_fast(micro_batch, args, given, generator, blocks, lpips_net=None):
    """-> a faster function in place of micro_batch. With --compile, which is the default on CUDA,
    the blocks of all models but the tiny ones are compiled, and the network of L_P. On CUDA the
    function is also a Replay."""
    if not args.compile:
        return micro_batch
    modules = []
    if args.model != "tiny" or given.get("compile"):       # compiling tiny ones takes too long
        modules.extend(blocks)
    if lpips_net is not None:
        modules.extend([lpips_net.net, *lpips_net.distances])
    if modules:
        vmae.compile_blocks(modules, given.get("compile"))
    if generator.device.type == "cuda":
        return Replay(micro_batch, generator)
    say_idle(given, {"compile": not modules})
    return micro_batch

def index_batches(n, args, start, my_micro_batches):
    """Yield this process's parts of each batch, from step `start` on, without end: lists of indices
    below n. They are sorted, because reading a file front to back is faster and the order within a
    part does not matter. The batches are cut, one after the other, from the epochs in a row; each
    epoch is a new random order of all n indices."""
    @functools.lru_cache(2)
    def order(epoch):
        return torch.randperm(n, generator=vmae.seeded(args.seed, epoch)).tolist()

    for step in itertools.count(start):
        batch = []
        for place in range(step * args.batch, (step + 1) * args.batch):
            batch.append(order(place // n)[place % n])
        for i in my_micro_batches:
            yield sorted(batch[i * args.micro:(i + 1) * args.micro])

def training_batches(data, args, start, my_micro_batches, device):
    """Yield without end what this process trains on, x and y on `device`. For a GPU a thread reads
    the next part while this one is computed, into memory that the GPU can copy from by itself
    (pinned). Beside a training on the CPU the thread would only take cores from it."""
    batches = map(data.batch, index_batches(len(data), args, start, my_micro_batches))
    on_cuda = device.type == "cuda"
    if on_cuda:
        batches = vmae.prefetch((x.pin_memory(), y.pin_memory()) for x, y in batches)
    for x, y in batches:
        yield x.to(device, non_blocking=on_cuda), y.to(device, non_blocking=on_cuda)

def learning_rate(step, steps, peak):
    """Up over the first 2 % of the run, while the moments settle, then down to zero, both in a
    straight line (Defazio 2023). What other warm-ups and a cosine gave stands in train_ldm.py."""
    warm = min(1, (step + 1) / max(1, steps // 50))        # rises to 1
    return peak * warm * (1 - step / steps)

def sum_over_processes(gradients):
    """Replace each gradient by its sum over the processes: as one vector, in one go."""
    flat = torch.cat([g.flatten() for g in gradients])
    with vmae.collective():
        dist.all_reduce(flat)
    for g, part in zip(gradients, flat.split([g.numel() for g in gradients])):
        g.copy_(part.view_as(g))

def load_states(args, ckpt, states):
    """Load the states, by name, from the checkpoint `ckpt` -> its step, or 0 without one.
    InputError if they do not fit, or if the processes do not see the same checkpoint."""
    start = 0
    if ckpt is not None:
        start = ckpt["step"]
        for name, part in states.items():
            try:
                part.load_state_dict(ckpt[name])    # with AdamW's moments, or the loss would jump
            except (KeyError, ValueError, RuntimeError) as error:
                raise InputError(f"{args.out}/last.pt: its {name} does not fit these options "
                                 f"({vmae.last_line(error)}); give another --out") from None
    first = vmae.from_first(lambda: start)
    if vmae.any_process(first != start):
        raise InputError(f"--out {args.out}: process 0 finds step {first} there, process {RANK} "
                         f"finds {start}; all processes need the same folder")
    return start

def say_options(args, model):
    """Print all options and the size of the model, and make the run folder."""
    os.makedirs(args.out, exist_ok=True)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    options = " ".join(f"{name}={value}" for name, value in vars(args).items())
    vmae.say(f"options: {options}\nmodel: {count:.2f} M parameters")

class Stop:
    """Notes SIGTERM, Ctrl-C and a terminal that is closed, so that the run ends after a whole step.
    A second one ends it at once; under torchrun, torchrun does that."""

    def __init__(self):
        self.received = False
        signal.signal(signal.SIGINT, self.note)
        signal.signal(signal.SIGTERM, self.note)
        if hasattr(signal, "SIGHUP"):       # Windows has none
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:          # as under nohup
                signal.signal(signal.SIGHUP, self.note)

    def note(self, number, frame):
        self.received = True
        if WORLD == 1:
            signal.signal(number, signal.SIG_DFL)

class Run:
    """The steps of a training, and what they leave behind: the bar on the screen, log.jsonl,
    previews and checkpoints, all of process 0. Sums of losses stay on the device, and are read when
    a line is written.

    states: all that a checkpoint goes on from, by name; start: the first step."""

    def __init__(self, args, states, start, device):
        self.args = args
        self.states = states
        self.stopping = False
        self.logged = start                 # the step of the last line
        self.since = time.perf_counter()    # and when training went on from there
        self.device = device
        self.clear()
        self.held_out = {}
        self.path = Path(args.out, "log.jsonl")
        if RANK == 0:
            self.drop_lines_after(start)

    def clear(self):
        self.sums = {}                      # of each loss: see add
        self.skipped = torch.zeros((), dtype=torch.long, device=self.device)   # steps left out

    def drop_lines_after(self, start):
        """A run that goes on writes these steps again. Damaged lines are dropped too."""
        text = b""
        if start > 0 and self.path.exists():
            text = self.path.read_bytes()
        with vmae.whole_file(self.path) as file:
            for line, step in re.findall(rb'({"step": (\d+), [^{}\n]*}\r?\n)', text):
                if int(step) <= start:
                    file.write(line)

    def steps(self, steps):
        """Iterate over the steps, a range, under a bar; after a signal no more. Then end the run,
        and if steps are left, the script."""
        self.stop = Stop()
        self.bar = tqdm(steps, total=self.args.steps, initial=steps.start, dynamic_ncols=True,
                        mininterval=1, disable=RANK > 0)
        for step in self.bar:
            yield step
            if self.stopping:
                break
        vmae.end_together()
        done = step + 1
        if done < self.args.steps and RANK == 0:
            sys.exit(f"stopped after step {done}, which is saved; --resume goes on")
        if done < self.args.steps:
            sys.exit(1)

    def end_step(self, step, lr, measure, **entries):
        """After every 50th step write a line of the log. Save every --save-every steps, at the end
        and when the run is stopped: what measure(file) returns, which draws a preview into that
        file, belongs to the line then, and the checkpoint gets these entries."""
        done = step + 1
        self.stopping = vmae.any_process(self.stop.received)   # SIGTERM or Ctrl-C, in one of them
        saving = self.stopping or done % self.args.save_every == 0 or done == self.args.steps
        if saving or done % 50 == 0:
            self.check_skipped(done)        # ends a run that goes wrong
            line = {"step": done, "lr": lr, **self.means(done)}
            if saving and RANK == 0:
                line |= measure(f"{self.args.out}/preview_{done:06d}.png")
            self.write(line)
        if saving and RANK == 0:
            vmae.save_curves([self.args.out], Path(self.args.out, "curves.png"))
            self.save(done, entries)
        if saving:
            self.since = time.perf_counter()               # saves do not count as training

    def save(self, step, entries):
        """Write last.pt. The other processes need not wait."""
        last = Path(self.args.out, "last.pt")
        parts = {name: part.state_dict() for name, part in self.states.items()}
        vmae.save_checkpoint(last, step=step, train_args=vars(self.args), **entries, **parts)
        if self.args.keep:
            with vmae.whole_file(last.with_name(f"step_{step:06d}.pt")) as file:
                file.write(last.read_bytes())

    def add(self, terms, share):
        """Losses of this share of a batch; what is not finite is left out of their means."""
        for name, value in terms.items():
            good = value.isfinite()
            row = share * torch.stack([value.nan_to_num(0, 0, 0), good, ~good])        # (3,)
            self.sums[name] = self.sums.get(name, 0) + row

    def totals(self):
        """-> of each loss, by name: its sum, the share of good values, the share of bad ones."""
        found = {}
        for name, row in self.sums.items():
            row = row.clone()
            if WORLD > 1:
                with vmae.collective():
                    dist.all_reduce(row)
            found[name] = row.tolist()
        return found

    def check_skipped(self, step):
        """InputError, which names the loss, if more than ten steps since the last line had to be
        left out, because a gradient was infinite or NaN."""
        skipped = int(self.skipped)
        if skipped <= 10:
            return
        broken = [name for name, (_, _, bad) in self.totals().items() if bad > 0]
        raise InputError(f"step {step}: {' and '.join(broken) or 'the gradient'} infinite or NaN, "
                         f"in {skipped} of the last {step - self.logged} steps; go on with "
                         f"--resume and a lower --lr")

    def means(self, step):
        """-> {name: value} for the log: the speed, and the means of the losses, since the last
        line."""
        totals = self.totals()
        images = (step - self.logged) * self.args.batch
        means = {"images_per_s": round(images / (time.perf_counter() - self.since), 1)}
        for name, (total, good, _) in totals.items():
            means[name] = math.nan
            if good > 0:
                means[name] = round(total / good, 5)
        if self.skipped > 0:
            means["skipped"] = int(self.skipped)
        return means

    def write(self, line):
        """Write one line, a dict, and begin the next means."""
        if RANK == 0:
            with open(self.path, "a") as file:
                print(vmae.to_json(line), file=file)
        for name, value in line.items():
            if name.endswith("_val"):       # the bar keeps the last held-out numbers
                self.held_out[name] = value
        shown = {name: value for name, value in line.items() if name not in ("step", "lr")}
        self.bar.set_postfix({**shown, **self.held_out}, refresh=False)
        self.clear()
        self.logged = line["step"]
        self.since = time.perf_counter()

if __name__ == "__main__":
    vmae.cli(main)

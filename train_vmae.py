"""Train stage one, VMAE (Sections 4.1 to 4.4) or one of the autoencoders it is compared with.

    python train_vmae.py                                the built-in faces, on a laptop
    python train_vmae.py --data path --mask 0.6         a folder of images
    python train_vmae.py --data path --resume           go on from runs/vmae/last.pt
    python train_vmae.py --preset sdvae                 another autoencoder, into runs/sdvae
    python train_vmae.py --init runs/vmae/last.pt --tune decoder --size 256    into runs/tuned
    torchrun --nproc-per-node 4 train_vmae.py --data path    several GPUs

Writes into --out: last.pt, log.jsonl (one JSON object a line) and preview_*.png, whose rows are
original, input as masked or noisy, reconstruction from it. train_ldm.py borrows the plumbing.
"""
import argparse
import json
import math
import os
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import vmae
from vmae import InputError, loss_M, loss_P, loss_R

# ---- Plumbing, shared with train_ldm.py -------------------------------------------------------

def common_options(parser, out, recipes, default_model):
    """The options both trainers have, with the same names, order and meaning."""
    add, models = parser.add_argument, list(recipes)
    batch, steps, lr = (", ".join(f"{recipes[m][key]:,} {m}" for m in models)
                        for key in ("batch", "steps", "lr"))               # for the help
    add("--data", help="folder of images, sub-folders are classes (default: the built-in faces)")
    add("--val", help="folder of held-out images (default: one in twenty of --data, by name)")
    add("--size", type=int, help="pixels a side (default: faces 32, folder 256 on CUDA, else 64)")
    add("--model", choices=models, help=f"row of the sizes table (default: {default_model})")
    add("--batch", type=int, help=f"images a step, over all processes (default: {batch})")
    add("--steps", type=int, help=f"optimiser steps in all (default: {steps})")
    add("--lr", type=float, help=f"peak learning rate (default: {lr})")
    add("--save-every", type=int, default=1000, help="steps between checkpoints (default: 1000)")
    add("--out", default=out, help="run folder (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights, order, masks and noise (default: 0)")
    add("--device", default="auto", help="cuda, cpu, mps... (default: cuda if there is one)")
    add("--workers", type=int, help="image decoding processes (default: 8 on CUDA, elsewhere 0)")
    add("--resume", action="store_true", help="go on from last.pt in --out, with its options")
    add("--compile", action="store_true", help="torch.compile: faster after a slow first step")


def parse(parser):
    """The command line -> args. With --resume, what is not typed is as the run had it."""
    typed, _ = parser.parse_known_args()
    if typed.resume:                        # but for what belongs to the machine
        saved = vmae.read_checkpoint(os.path.join(typed.out, "last.pt"), "train_args")["train_args"]
        parser.set_defaults(**{k: v for k, v in saved.items() if k in vars(typed) and k not in (
            "resume", "out", "device", "workers", "compile")})
    return parser.parse_args()


def check(args):
    """Refuse numbers out of range, in one line with the option's name -> args."""
    above_0 = ("size", "batch", "steps", "lr", "save_every")
    below = dict(mask=1, drop=1, seed=2**32)               # times 1,000,003 it fits 64 bits
    for name, value in vars(args).items():
        if isinstance(value, (int, float)):                # the others are words, or chosen later
            low, high = "above" if name in above_0 else "at least", below.get(name, math.inf)
            if not (0 < value < high or value == 0 and name not in above_0):
                name = name.replace("_", "-")
                raise InputError(f"--{name} must be {low} 0 and below {high}, not {value}")
    return args


def start_processes(device, batch):
    """Join the group if torchrun started us -> (rank, processes, this process's device)."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return 0, 1, device
    if batch % world:
        raise InputError(f"--batch {batch} cannot be shared by {world} processes")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))       # one GPU each
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), world, device


def autocast(device):
    """bfloat16 for matrix products where the hardware has it: on CUDA, and on CPUs that say so in
    Linux's list of features (4 to 5 times float32's speed on one such); float32 elsewhere."""
    fast = device.type == "cuda"
    if device.type == "cpu" and os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            fast = "bf16" in file.read()    # avx512_bf16, amx_bf16, or Arm's plain bf16
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=fast)


def endless(n, seed, first, rank, world):
    """Indices below n for ever, shuffled anew each epoch; from any position on, for --resume, and
    for one of several processes. Stateless: position p is place p % n of epoch p // n."""
    p, epoch = first + rank, None
    while True:
        if p // n != epoch:
            epoch = p // n
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)    # 32 bits count
            order = torch.randperm(n, generator=generator).tolist()
        yield order[p % n]
        p += world                          # the other processes take the places between


def endless_loader(data, args, start, rank, world, **options):
    """Iterator over this process's share of the batches, from step `start` on. It has a generator
    of its own: DataLoader would draw from the one that --resume has just restored."""
    options["sampler"] = endless(len(data), args.seed, start * args.batch, rank, world)
    options["generator"] = torch.Generator().manual_seed(args.seed)
    return iter(torch.utils.data.DataLoader(data, args.batch // world, **options))


def learning_rate(step, steps, peak):
    """Linear warm-up over 2 % of the run, then a cosine down to zero."""
    warm = min(1, (step + 1) / max(1, steps // 50))        # AdamW's second moments have to settle
    return peak * warm * 0.5 * (1 + math.cos(math.pi * step / steps))


def optimiser(model):
    """AdamW as in the authors' recipes, betas (.9, .95); decay on matrices only, not on norms,
    biases and tokens, which have nothing to shrink towards."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrix = {p: p.ndim > 1 and min(p.shape) > 1 for p in trained}
    groups = [{"params": [p for p in matrix if matrix[p]], "weight_decay": 0.05},
              {"params": [p for p in matrix if not matrix[p]], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)        # fused: one pass


def update(opt, model, loss, terms, step, lr):
    """One optimiser step, with gradients clipped at norm 1. InputError names the term that is not
    finite before it can reach the weights, and so before it can be saved."""
    for group in opt.param_groups:
        group["lr"] = lr
    opt.zero_grad(set_to_none=True)         # nothing to fill, nothing to add to
    loss.backward()                         # DDP averages over the processes here
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if not math.isfinite(loss.item() + norm.item()):
        broken = [k for k, v in {**terms, "the gradient": norm}.items() if not v.isfinite()]
        raise InputError(f"step {step}: {', '.join(broken)} not finite; nothing was saved since "
                         f"the last checkpoint, try a lower --lr")
    opt.step()


def rng_state(device):
    """The random state that --resume needs; a run on the CPU never asks CUDA for anything."""
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def resume(path, model_args, model, opt, device, steps, extra={}):
    """Load weights, optimiser, random state and `extra` from last.pt -> the checkpoint's dict."""
    ckpt = vmae.read_checkpoint(path, "model_args", "model", "opt", "step", "rng", *extra)
    if ckpt["model_args"] != model_args:
        raise InputError(f"{path}: holds a model of {ckpt['model_args']}, not of {model_args}; "
                         f"leave out the options that --resume knows, or give another --out")
    if ckpt["step"] >= steps:
        raise InputError(f"{path}: is at step {ckpt['step']} already; give more --steps")
    for name, part in {"model": model, "opt": opt, **extra}.items():
        part.load_state_dict(ckpt[name])    # without AdamW's moments the loss would jump
    torch.set_rng_state(ckpt["rng"]["cpu"])
    if device.type == "cuda" and "cuda" in ckpt["rng"]:
        torch.cuda.set_rng_state(ckpt["rng"]["cuda"], device)
    return ckpt


def begin(args, model, what, start, rank):
    """Say what will run, make the run folder; not before all that was typed has proved usable."""
    if rank > 0:                            # the same weights as process 0, but other noise
        return torch.manual_seed(args.seed + 1000 * rank + start)
    os.makedirs(args.out, exist_ok=True)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{what}, {count:.2f} M parameters\n", *(f"{k}={v}" for k, v in vars(args).items()))


class Log:
    """The bar on the screen and log.jsonl in the run folder, from process 0 alone."""

    def __init__(self, out, start, args, rank):
        self.rank, self.steps, self.batch = rank, args.steps, args.batch
        if rank == 0:
            self.bar = tqdm(total=args.steps, initial=start, dynamic_ncols=True, mininterval=1)
            self.file = open(os.path.join(out, "log.jsonl"), "a" if start else "w")
        self.clock, self.last, self.seen = time.perf_counter(), start, {}

    def step(self, step, terms, lr):
        """After each step; every 50 the mean of each term, over the steps that had it, is told."""
        if self.rank > 0:
            return
        self.bar.update()
        for name, value in terms.items():
            total, count = self.seen.get(name, (0, 0))
            self.seen[name] = total + value.detach(), count + 1            # stays on the device
        if step % 50 == 0 or step == self.steps:
            now = time.perf_counter()
            speed = (step - self.last) * self.batch / (now - self.clock)   # images a second
            means = {k: round((total / n).item(), 5) for k, (total, n) in self.seen.items()}
            self.bar.set_postfix(img_s=f"{speed:.0f}", **means, refresh=False)
            line = {"step": step, "lr": lr, "images_per_s": round(speed, 1), **means}
            print(json.dumps(line), file=self.file, flush=True)            # a plot may follow it
            self.clock, self.last, self.seen = now, step, {}


# ---- Stage one --------------------------------------------------------------------------------

RECIPES = {                                 # what a run of each size wants by default
    "tiny": dict(batch=16, steps=5000, lr=1.5e-3),         # measured, 2 cores: 16 beat 32 and 64
    "small": dict(batch=16, steps=8000, lr=1e-3),
    "base": dict(batch=128, steps=100_000, lr=2e-4)}       # the authors' 8e-4 x sqrt(128 / 2048)

# The autoencoders that the paper compares: defaults of the options with these names, and what each
# of the others changes in AE's. lambda_reg 0: the latent is a point, without variance. lambda_p
# None: as the authors, if VGG can be had. 1e-4 for vmae: their 1e-6 gains .2 dB on the faces, but
# leaves sigma at .016 of mu's spread, which smooths little; this, at .12. lambda_adv: at Esser's
# 0.5 the discriminator never got off chance, L_D = 1, on the faces; at 0.1 it learns, to .77.
AE = dict(arch="conv", mask=0.0, noise=0.0, lambda_reg=0.0, kl_mean="zero", lambda_p=0.0,
          lambda_adv=0.0)
PRESETS = {
    "ae": {}, "dae": dict(noise=0.2), "vae": dict(lambda_reg=3e-4),
    "sdvae": dict(lambda_reg=1e-5, lambda_p=None, lambda_adv=0.1),
    "mae": dict(arch="vit", mask=0.6),
    "vmae": dict(arch="vit", mask=0.6, lambda_reg=1e-4, kl_mean="free", lambda_p=None)}


def options():
    """The command line -> checked options, None where main has to choose."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s [options]")
    common_options(parser, "runs/vmae", RECIPES, "tiny to 32 px; above, base on CUDA, else small")
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="vmae", help="an autoencoder of the paper: defaults "
        "for --out, runs/NAME, and for the options below (default: %(default)s)")
    add("--arch", choices=("vit", "conv"), help="VMAE's transformer, or SD-VAE's convolutions")
    add("--init", help="checkpoint to start from, ours or published: VMAE's or an SD3-style VAE's")
    add("--tune", choices=("decoder",), help="leave the encoder of --init as it is; no mask, and "
        "LPIPS weighs 10, as in the last stage of the authors' recipe; into runs/tuned")
    add("--mask", type=float, help="share of patches hidden (default: vmae, mae 0.6, else 0)")
    # Measured on held-out faces after 2,200 steps: 31.0 dB with these defaults. --whole 0: 28.3,
    # since the encoder then never meets the whole images that it is used on.
    add("--whole", type=float, default=0.5, help="share of steps without mask (default: 0.5)")
    add("--noise", type=float, help="deviation of noise on the input (default: dae 0.2, others 0)")
    # At 1, the authors' balance, 28.6: the hidden patches' large errors crowd out the visible.
    add("--lambda-m", type=float, default=0.1, help="weight of L_M (default: %(default)s)")
    add("--lambda-reg", type=float, help="weight of L_reg; 0: z without variance (default: vmae "
        "1e-4, vae 3e-4, sdvae 1e-5, others 0)")
    add("--lambda-p", type=float, help="weight of L_P, LPIPS (default for vmae and sdvae: the "
        "authors' 0.5 for a folder if VGG's weights are to be had, 0 for the built-in faces)")
    add("--lambda-adv", type=float, help="weight of the adversarial loss, which begins halfway "
        "(default: sdvae 0.1, others 0)")
    add("--kl-mean", choices=("free", "zero"), help="free: the variance alone is pulled to 1, "
        "Section 4.4; zero: the KL of Eq. (1) (default: vmae free, vae and sdvae zero)")
    add("--vgg-weights", help="local copy of torchvision's vgg16-397923af.pth, for LPIPS")
    typed, _ = parser.parse_known_args()  # a first look, for the name of the preset
    tuned = dict(mask=0.0, lambda_p=None) if typed.tune else {}
    parser.set_defaults(out=f"runs/{'tuned' if typed.tune else typed.preset}",     # what is typed
                        **{**AE, **PRESETS[typed.preset], **tuned})        # still comes first
    args = check(parse(parser))
    if args.tune and not args.init:
        raise InputError("--tune decoder: needs a trained model, named with --init")
    if args.compile and args.lambda_adv > 0:
        raise InputError("--compile: not with --lambda-adv, which goes back through the network "
                         "twice, as compiled code cannot")
    return args


def fill_in(args, device, init):
    """Choose what was not typed; the model's shape is that of --init, if there is one."""
    cuda = device.type == "cuda"
    if init is not None:
        args.size = args.size or init["model_args"]["img_size"]
        args.arch = "conv" if "channels" in init["model_args"] else "vit"  # as it was trained
    if args.arch == "conv" and args.mask > 0:
        raise InputError(f"--mask {args.mask}: convolutions visit every pixel and cannot leave "
                         f"patches out; give --mask 0 or --arch vit")
    args.size = args.size or (32 if args.data is None else 256 if cuda else 64)
    args.model = args.model or ("tiny" if args.size <= 32 else "base" if cuda else "small")
    if (args.arch, args.model) == ("conv", "base"):        # 2.5 GiB a step on one image in float32,
        args.batch = args.batch or 16       # ten times what VMAE takes
    for name, value in RECIPES[args.model].items():
        setattr(args, name, getattr(args, name) or value)
    args.workers = args.workers if args.workers is not None else 8 if cuda and args.data else 0


def new_model(args, init):
    """Options -> (model, its constructor's arguments), with the weights of --init if there is one.
    InputError names --size, --mask or --init where they do not go together."""
    rows = vmae.sizes if args.arch == "vit" else vmae.conv_sizes  # same names, same latents
    model_args = dict(init["model_args"] if init else rows[args.model], img_size=args.size)
    try:
        model = vmae.build(model_args)
        vmae.random_mask(1, model.grid**2, args.mask)
    except ValueError as error:
        raise InputError(f"--size {args.size} --mask {args.mask}: {error}") from None
    if init is not None:
        model.load_state_dict(vmae.resize_positions(init["model"], model))
    elif args.lambda_reg == 0:
        vmae.drop_variance(model)
    if args.tune == "decoder":              # a frozen encoder: the latents stay what they were
        for name, p in model.named_parameters():
            p.requires_grad_(name.startswith(("decoder", "from_latent", "mask_token")))
    return model, model_args


def perceptual(args, device):
    """The LPIPS network, or None when its weight is 0 or, by default, VGG cannot be had."""
    by_hand = args.lambda_p is not None or args.vgg_weights
    if args.lambda_p is None:               # at 32 px VGG would cost more than all the rest
        args.lambda_p = 10.0 if args.tune else 0.5 if args.data else 0.0
    if args.lambda_p == 0:
        return None
    try:
        return vmae.load_lpips(args.vgg_weights).to(device)
    except InputError as error:
        if by_hand:
            raise
        print(f"warning: training without L_P, which blurs; {error}")
        args.lambda_p = 0.0


def preview(model, x, args, path):
    """Rows: original, input (grey where masked, noisy for DAE), reconstruction from that input."""
    generator = torch.Generator().manual_seed(0)
    x_in = x + args.noise * torch.randn(x.shape, generator=generator).to(x.device)
    with torch.no_grad():
        if args.mask > 0:
            keep, mask = vmae.random_mask(len(x), model.grid**2, args.mask, generator, x.device)
            x_hat = model.decode_tokens(model.encode_tokens(x_in, keep).mode(), keep)  # as trained
            x_v = vmae.patchify(x_in, model.patch_size) * (1 - mask[..., None])    # hidden: 0, grey
            x_in = vmae.unpatchify(x_v, model.patch_size, *x.shape[2:])
        else:
            x_hat = model.decode(model.encode(x_in).mode())                # (8, 3, H, W)
    vmae.save_grid([x, x_in, x_hat], path)


def main():
    args = options()
    device = vmae.pick_device(args.device)
    init = vmae.read_stage_one(args.init) if args.init else None           # ours or published
    fill_in(args, device, init)         # args are complete from here on
    rank, world, device = start_processes(device, args.batch)              # 0, 1 without torchrun
    train = vmae.open_images(args.data, args.size, "train", args.val, keep=args.workers == 0)
    val = vmae.open_images(args.data, args.size, "val", args.val)
    torch.manual_seed(args.seed)            # the same weights on every process
    model, model_args = new_model(args, init)
    model, lpips_net = model.to(device), perceptual(args, device)          # None: no L_P
    opt, start, last = optimiser(model), 0, os.path.join(args.out, "last.pt")
    disc = vmae.discriminator(args.size).to(device) if args.lambda_adv > 0 else None
    disc_opt = optimiser(disc) if disc else None
    extra = {"disc": disc, "disc_opt": disc_opt} if disc else {}           # saved and resumed too
    adv_start = args.steps // 2             # late, as Esser 2021: noise is too easily told apart
    if args.resume:
        start = resume(last, model_args, model, opt, device, args.steps, extra)["step"]
    begin(args, model, f"{len(train)} images to train on, {len(val)} held out", start, rank)

    # Its weights are model's. Not dynamic: a graph for masked steps and another for whole images.
    net = torch.compile(model, dynamic=False) if args.compile else model
    net = DistributedDataParallel(net) if world > 1 else net               # averages gradients
    judge = DistributedDataParallel(disc) if disc and world > 1 else disc  # likewise
    loader = endless_loader(train, args, start, rank, world, num_workers=args.workers,
                            pin_memory=device.type == "cuda")
    shown = torch.randperm(len(val), generator=torch.Generator().manual_seed(0))[:8].tolist()
    x_val = torch.stack([val[i][0] for i in shown]).to(device)             # (8, 3, H, W)
    low_precision, log = autocast(device), Log(args.out, start, args, rank)

    # x -> x_v -> q(z|x_v) -> z -> x_hat, and L_VMAE = L_R + lambda_M L_M + lambda_reg L_reg +
    # lambda_P L_P (Section 4.4), term by term; the losses leave the low precision for float32.
    # SD-VAE adds lambda_adv L_G from adv_start on, and the discriminator's own step on L_D.
    for step in range(start, args.steps):
        lr = learning_rate(step, args.steps, args.lr)
        whole = int((step + 1) * args.whole) > int(step * args.whole)      # every other, at .5
        x = vmae.random_flip(next(loader)[0].to(device, non_blocking=True))    # (B, 3, H, W)
        x_in = x + args.noise * torch.randn_like(x) if args.noise > 0 else x  # DAE's
        with low_precision():
            x_hat, q, mask = net(x_in, 0.0 if whole else args.mask)        # mask (B, N), 1 = hidden
        terms = {"L_R": loss_R(x, x_hat, mask, model.patch_size)}
        loss = terms["L_R"]                                                # a scalar
        if args.lambda_reg > 0:             # otherwise q has no variance
            terms["L_reg"] = q.kl(args.kl_mean)
            loss = loss + args.lambda_reg * terms["L_reg"]
        if not whole and args.mask > 0:     # otherwise there is no x_m
            terms["L_M"] = loss_M(x, x_hat, mask, model.patch_size)
            loss = loss + args.lambda_m * terms["L_M"]
        if lpips_net is not None:
            terms["L_P"] = loss_P(lpips_net, x, x_hat)
            loss = loss + args.lambda_p * terms["L_P"]
        if disc is not None and step >= adv_start:
            disc.requires_grad_(False)      # its own step comes after the autoencoder's
            with low_precision():
                fake = disc(x_hat)                                         # (B, 1, h', w')
            last_layer = list(model.parameters())[-2]      # its weight; the bias is [-1]
            terms["L_G"] = vmae.loss_G(fake, loss, last_layer)
            loss = loss + args.lambda_adv * terms["L_G"]
        update(opt, model, loss, terms, step, lr)
        if disc is not None and step >= adv_start:
            disc.requires_grad_(True)   # now its own step
            with low_precision():
                real, fake = judge(torch.cat([x, x_hat.detach()])).chunk(2)  # one pass for both
            terms["L_D"] = vmae.loss_D(real, fake)
            update(disc_opt, disc, terms["L_D"], terms, step, lr)
        log.step(step + 1, terms, lr)
        if rank == 0 and ((step + 1) % args.save_every == 0 or step + 1 == args.steps):
            parts = {"model": model, "opt": opt, **extra}
            vmae.save_checkpoint(last, model_args=model_args, ema=None, step=step + 1,
                                 rng=rng_state(device), train_args=vars(args),
                                 **{name: part.state_dict() for name, part in parts.items()})
            preview(model, x_val, args, os.path.join(args.out, f"preview_{step + 1:06d}.png"))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    vmae.cli(main)

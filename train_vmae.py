"""Train stage one, the variational masked autoencoder of vmae.py (Sections 4.1 to 4.4).

    python train_vmae.py                                the built-in faces, on a laptop
    python train_vmae.py --data path --mask 0.6         a folder of images
    python train_vmae.py --data path --resume           go on from runs/vmae/last.pt
    torchrun --nproc-per-node 4 train_vmae.py --data path    several GPUs

Writes into --out: last.pt, log.jsonl (one JSON object a line) and preview_*.png, whose rows are
original, masked input, reconstruction from that masked input. train_ldm.py borrows the plumbing.
"""
import argparse
import json
import math
import os
import time
import timeit

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import vmae
from vmae import InputError, VMAE, loss_M, loss_P, loss_R

# ---------------------------------------------------------------------------------------------
# Plumbing, shared with train_ldm.py
# ---------------------------------------------------------------------------------------------

def common_options(parser, out, recipes, default_model):
    """The options both trainers have, with the same names, order and meaning."""
    add, models = parser.add_argument, list(recipes)
    batch, steps, lr = (", ".join(f"{recipes[m][key]:,} {m}" for m in models)
                        for key in ("batch", "steps", "lr"))
    add("--data", help="folder of images, sub-folders are classes (default: the built-in faces)")
    add("--val", help="folder of held-out images (default: one in twenty of --data, by name)")
    add("--size", type=int, help="side of the square images, pixels (default: 32 for the built-in "
        "faces; for a folder 256 on CUDA, 64 elsewhere)")
    add("--model", choices=models, help=f"row of the sizes table (default: {default_model})")
    add("--batch", type=int, help=f"images a step, over all processes (default: {batch})")
    add("--steps", type=int, help=f"optimiser steps in all (default: {steps})")
    add("--lr", type=float, help=f"peak learning rate (default: {lr})")
    add("--save-every", type=int, default=1000, help="steps between checkpoints and previews "
        "(default: %(default)s)")
    add("--out", default=out, help="run folder (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights, order, masks and noise (default: 0)")
    add("--device", default="auto", help="cuda, cpu, mps... (default: cuda if there is one)")
    add("--workers", type=int, help="processes that decode images (default: 8 on CUDA, elsewhere 0 "
        "and decoded images are kept in memory)")
    add("--resume", action="store_true", help="continue from last.pt in --out")
    add("--compile", action="store_true", help="torch.compile: faster after a slow first step")


def start_processes(device):
    """Join the group if torchrun started us -> (rank, processes, this process's device)."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def autocast(device):
    """bfloat16 for matrix products where that is faster: on CUDA, and on CPUs that have the
    instructions, which no public function tells. So it is timed, best of ten, in some 50 ms."""
    if device.type == "cpu":
        a = torch.ones(512, 512)
        full, half = (min(timeit.repeat(lambda: m @ m, number=1, repeat=10))
                      for m in (a, a.bfloat16()))
        fast = half < 0.6 * full
    else:
        fast = device.type == "cuda"
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=fast)


class Endless(torch.utils.data.Sampler):
    """Indices for ever, a new shuffle each epoch; from any step on, for --resume, and for one of
    several processes, all without state: position p is place p % n of epoch p // n."""

    def __init__(self, n, seed, first, rank, world):
        self.n, self.seed, self.positions = n, seed, (first + rank, world)

    def __iter__(self):
        p, world = self.positions
        epoch = None
        while True:
            if p // self.n != epoch:
                epoch = p // self.n
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order = torch.randperm(self.n, generator=generator).tolist()
            yield order[p % self.n]
            p += world


def endless_loader(data, args, start, rank, world, **options):
    """Iterator over this process's share of the batches, from step `start` on. It has a generator
    of its own: DataLoader would draw from the one that --resume has just restored."""
    sampler = Endless(len(data), args.seed, start * args.batch, rank, world)
    return iter(torch.utils.data.DataLoader(data, args.batch // world, sampler=sampler,
                                            generator=torch.Generator().manual_seed(args.seed),
                                            **options))


def learning_rate(step, steps, peak):
    """Linear warm-up over 2 % of the run, then a cosine down to zero."""
    warm = max(1, steps // 50)
    return peak * min(1, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))


def optimiser(model):
    """AdamW as in the authors' recipes, betas (.9, .95); decay on matrices only, not on norms,
    biases and tokens, which have nothing to shrink towards."""
    matrices = [p for p in model.parameters() if p.ndim > 1 and min(p.shape) > 1]
    others = [p for p in model.parameters() if not (p.ndim > 1 and min(p.shape) > 1)]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def update(opt, model, loss, terms, step, lr):
    """One optimiser step, with gradients clipped at norm 1. InputError names the term that is not
    finite before it can reach the weights, and so before it can be saved."""
    for group in opt.param_groups:
        group["lr"] = lr
    opt.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if not math.isfinite(loss.item() + norm.item()):
        broken = [k for k, v in {**terms, "the gradient": norm}.items() if not v.isfinite()]
        raise InputError(f"step {step}: {', '.join(broken)} not finite; nothing was saved since "
                         f"the last checkpoint, try a lower --lr")
    opt.step()


def rng_state(device):
    """The random state that --resume needs, as tensors."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def resume(path, model_args, model, opt, device):
    """Load weights, optimiser and random state from last.pt -> (step to go on from, the dict)."""
    ckpt = vmae.read_checkpoint(path, "model_args", "model", "opt", "step", "rng")
    if ckpt["model_args"] != model_args:
        raise InputError(f"{path}: holds a model of {ckpt['model_args']}, not of {model_args}; "
                         f"give the options it was trained with, or another --out")
    model.load_state_dict(ckpt["model"])
    opt.load_state_dict(ckpt["opt"])
    torch.set_rng_state(ckpt["rng"]["cpu"])
    if device.type == "cuda" and "cuda" in ckpt["rng"]:
        torch.cuda.set_rng_state(ckpt["rng"]["cuda"], device)
    return ckpt["step"], ckpt


def check(args, *positive):
    """Refuse counts below one with the option's name."""
    for name in positive:
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise InputError(f"--{name.replace('_', '-')} must be above 0, not {value}")


class Log:
    """The bar on the screen and log.jsonl in the run folder, from process 0 alone."""

    def __init__(self, out, start, args, rank):
        self.rank, self.steps, self.batch = rank, args.steps, args.batch
        if rank == 0:
            self.bar = tqdm(total=args.steps, initial=start, dynamic_ncols=True, mininterval=1)
            self.file = open(os.path.join(out, "log.jsonl"), "a" if start else "w")
        self.clock, self.last = time.perf_counter(), start

    def step(self, step, terms, lr):
        """After each step; every 50 steps, and at the end, the numbers are shown and written."""
        if self.rank > 0:
            return
        self.bar.update()
        if step % 50 == 0 or step == self.steps:
            now = time.perf_counter()
            speed = (step - self.last) * self.batch / (now - self.clock)
            values = {k: round(v.item() if torch.is_tensor(v) else v, 5) for k, v in terms.items()}
            self.bar.set_postfix(img_s=f"{speed:.0f}", **values, refresh=False)
            line = {"step": step, "lr": lr, "images_per_s": round(speed, 1), **values}
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
            self.clock, self.last = now, step


# ---------------------------------------------------------------------------------------------
# Stage one
# ---------------------------------------------------------------------------------------------

# What a run of each size wants by default. tiny: found by measuring on 2 CPU cores; at equal
# time, 16 images a step beat 32 and 64. base: the authors' 1e-4 * 2048/256 at batch 2048, scaled
# by the square root of the batch for one GPU.
RECIPES = {"tiny": dict(batch=16, steps=5000, lr=1.5e-3),
           "small": dict(batch=16, steps=8000, lr=1e-3),
           "base": dict(batch=128, steps=100_000, lr=2e-4)}


def options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s [options]")
    common_options(parser, "runs/vmae", RECIPES, "tiny up to 32 px; above, base on CUDA and small "
                   "elsewhere")
    add = parser.add_argument
    add("--mask", type=float, default=0.6, help="share of patches hidden (default: %(default)s)")
    add("--whole", type=float, default=0.5, help="share of the steps, evenly spread, that see "
        "whole images, as the model will be used; 0: never (default: %(default)s)")
    add("--lambda-m", type=float, default=0.1, help="weight of L_M (default: %(default)s)")
    add("--lambda-reg", type=float, default=1e-4, help="weight of L_reg (default: %(default)s)")
    add("--lambda-p", type=float, help="weight of L_P, LPIPS (default: the authors' 0.5 for a "
        "folder if VGG's weights can be had, 0 for the built-in faces)")
    add("--kl-mean", choices=("free", "zero"), default="free", help="free: only the variance is "
        "pulled to 1, Section 4.4; zero: the textbook KL of Eq. (1) (default: %(default)s)")
    add("--vgg-weights", help="local copy of torchvision's vgg16-397923af.pth, for LPIPS")
    args = parser.parse_args()
    check(args, "size", "batch", "steps", "lr", "save_every")
    if not 0 <= args.mask < 1:
        raise InputError(f"--mask must be at least 0 and below 1, not {args.mask}")
    if not 0 <= args.whole <= 1:
        raise InputError(f"--whole must be from 0 to 1, not {args.whole}")
    return args


def fill_in(args, device):
    """Choose what was not typed."""
    cuda = device.type == "cuda"
    args.size = args.size or (32 if args.data is None else 256 if cuda else 64)
    args.model = args.model or ("tiny" if args.size <= 32 else "base" if cuda else "small")
    for name, value in RECIPES[args.model].items():
        setattr(args, name, getattr(args, name) or value)
    if args.workers is None:
        args.workers = 8 if cuda and args.data else 0


def perceptual(args, device):
    """The LPIPS network, or None when its weight is 0 or, by default, VGG cannot be had."""
    wanted = args.lambda_p
    args.lambda_p = wanted if wanted is not None else 0.5 if args.data else 0.0
    if args.lambda_p == 0:
        return None
    try:
        return vmae.load_lpips(args.vgg_weights).to(device)
    except InputError as error:
        if wanted is not None or args.vgg_weights:
            raise
        print(f"warning: training without L_P, which blurs; {error}")
        args.lambda_p = 0.0


def preview(model, x, mask_ratio, path):
    """Rows: original, masked input (grey where hidden), reconstruction of everything from it."""
    P, H, W = model.patch_size, *x.shape[2:]
    with torch.no_grad():
        keep, mask = vmae.random_mask(len(x), model.grid**2, mask_ratio,
                                      torch.Generator().manual_seed(0), x.device)
        x_hat = model.decode_tokens(model.encode_tokens(x, keep).mode(), keep)
    masked = vmae.unpatchify(vmae.patchify(x, P) * (1 - mask[..., None]), P, H, W)
    vmae.save_grid([x, masked, x_hat], path)


def main():
    args = options()
    rank, world, device = start_processes(vmae.pick_device(args.device))
    fill_in(args, device)
    train = vmae.open_images(args.data, args.size, "train", args.val, keep=args.workers == 0)
    val = vmae.open_images(args.data, args.size, "val", args.val)
    torch.manual_seed(args.seed)
    model_args = dict(img_size=args.size, **vmae.sizes[args.model])
    try:
        model = VMAE(**model_args).to(device)
        vmae.random_mask(1, model.grid**2, args.mask)
    except ValueError as error:
        raise InputError(f"--size {args.size} --mask {args.mask}: {error}") from None
    lpips_net = perceptual(args, device)
    opt, start, last = optimiser(model), 0, os.path.join(args.out, "last.pt")
    torch.manual_seed(args.seed + 1000 * rank)             # other masks and noise on each process
    if args.resume:
        start, _ = resume(last, model_args, model, opt, device)
    if rank == 0:
        os.makedirs(args.out, exist_ok=True)
        count = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{len(train)} images to train on, {len(val)} held out, {count:.2f} M parameters, "
              f"{device}\n" + " ".join(f"{k}={v}" for k, v in vars(args).items()))

    net = torch.compile(model) if args.compile else model
    net = DistributedDataParallel(net) if world > 1 else net
    loader = endless_loader(train, args, start, rank, world, num_workers=args.workers,
                            pin_memory=device.type == "cuda")
    x_val = torch.stack([val[i][0] for i in range(min(8, len(val)))]).to(device)
    low_precision, log = autocast(device), Log(args.out, start, args, rank)

    for step in range(start, args.steps):
        lr = learning_rate(step, args.steps, args.lr)
        whole = int((step + 1) * args.whole) > int(step * args.whole)
        x = vmae.random_flip(next(loader)[0].to(device, non_blocking=True))
        with low_precision():
            x_hat, q, mask = net(x, 0.0 if whole else args.mask)
        terms = {"L_R": loss_R(x, x_hat, mask, model.patch_size),
                 "L_M": loss_M(x, x_hat, mask, model.patch_size),
                 "L_reg": q.kl(args.kl_mean)}
        loss = terms["L_R"] + args.lambda_m * terms["L_M"] + args.lambda_reg * terms["L_reg"]
        if lpips_net is not None:
            terms["L_P"] = loss_P(lpips_net, x, x_hat)
            loss = loss + args.lambda_p * terms["L_P"]
        update(opt, model, loss, terms, step, lr)
        log.step(step + 1, terms, lr)
        if rank == 0 and ((step + 1) % args.save_every == 0 or step + 1 == args.steps):
            vmae.save_checkpoint(last, model_args=model_args, model=model.state_dict(), ema=None,
                                 opt=opt.state_dict(), step=step + 1, rng=rng_state(device),
                                 train_args=vars(args))
            preview(model, x_val, args.mask, os.path.join(args.out, f"preview_{step + 1:06d}.png"))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    vmae.cli(main)

"""Train stage one: VMAE (Sections 4.1 to 4.4), or an autoencoder that the paper compares it with.

    python train_vmae.py                                the built-in faces, on a laptop
    python train_vmae.py --data path --mask 0.6         a folder of images
    python train_vmae.py --data path --resume           go on from runs/vmae/last.pt
    python train_vmae.py --preset sdvae                 another autoencoder, into runs/sdvae
    python train_vmae.py --init runs/vmae/last.pt --tune decoder --size 256    into runs/tuned
    torchrun --nproc-per-node 4 train_vmae.py --data path    several GPUs

Writes into --out: last.pt; log.jsonl, one JSON object per line; preview_*.png, whose rows are the
original, the input (masked or noisy) and the reconstruction. train_ldm.py shares the plumbing.
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
from vmae import InputError

# ---- Plumbing, shared with train_ldm.py -------------------------------------------------------

def default(table, key, *others):
    """What the rows of a table of defaults have for an option, for its help."""
    known = [f"{name} {row[key]}" for name, row in table.items() if key in row]
    return f"(default: {', '.join([*known, *others])})"

def common_options(parser, out, recipes, default_model, inherited="default: "):
    """The options of both trainers, with the same names, order and meaning."""
    add = parser.add_argument
    add("--data", help=f"folder of images, sub-folders are classes ({inherited}the built-in faces)")
    add("--val", help=f"folder of held-out images ({inherited}one in twenty of --data, by path)")
    add("--size", type=int, help=f"pixels ({inherited}faces 32; a folder 256 on CUDA, else 64)")
    add("--model", choices=recipes, help=f"row of the sizes table (default: {default_model})")
    add("--batch", type=int, help=f"images per optimiser step {default(recipes, 'batch')}")
    add("--steps", type=int, help=f"optimiser steps in all {default(recipes, 'steps')}")
    add("--lr", type=float, help=f"peak learning rate {default(recipes, 'lr')}")
    add("--save-every", type=int, default=1000, help="steps between checkpoints (default: 1000)")
    add("--out", default=out, help="run folder (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights, order, masks and noise (default: 0)")
    add("--device", default="auto", help="cuda, cpu, mps... (default: cuda if there is one)")
    add("--workers", type=int, help="processes that decode (default: a folder on CUDA 8, else 0)")
    add("--resume", action="store_true", help="go on from last.pt in --out, with its options")
    add("--compile", action="store_true", help="torch.compile: faster after a slow first step")

def parse(parser):
    """The command line -> checked options. With --resume, those that are not given are as the run
    had them, except for those that depend on the machine."""
    given, _ = parser.parse_known_args()
    if given.resume:
        saved = vmae.read_checkpoint(os.path.join(given.out, "last.pt"), "train_args")["train_args"]
        machine = ("resume", "out", "device", "workers", "compile")
        parser.set_defaults(**{k: saved[k] for k in saved if k in given and k not in machine})
    return vmae.check(parser.parse_args())

def use_recipe(args, recipes, cuda):
    """Choose --batch, --steps, --lr and --workers, if they were not given."""
    for name, value in recipes[args.model].items():
        setattr(args, name, getattr(args, name) or value)
    if args.workers is None:
        args.workers = 8 if cuda and args.data else 0

def start_processes(device, batch):
    """Join the group if torchrun started us -> (rank, number of processes, our device)."""
    world = int(os.environ.get("WORLD_SIZE", 1))           # set by torchrun
    if world == 1:
        return 0, 1, device
    if batch % world:
        raise InputError(f"--batch {batch}: give a multiple of {world}, the number of processes")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))       # one GPU each
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), world, device

def autocast(device):
    """A context in which matrix products run in bfloat16 if the hardware is made for it: on CUDA,
    and on CPUs for which Linux lists avx512_bf16, amx_bf16 or Arm's bf16. Elsewhere in float32."""
    fast = device.type == "cuda"
    if device.type == "cpu" and os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            fast = "bf16" in file.read()
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=fast)

def endless(n, seed, first, rank, world):
    """Numbers below n without end, shuffled anew in each epoch. Position p is place p % n of epoch
    p // n, so --resume can start anywhere, and each process takes every world-th position."""
    position, epoch = first + rank, None
    while True:
        if position // n != epoch:
            epoch = position // n
            order = torch.randperm(n, generator=vmae.seeded(seed, epoch)).tolist()
        yield order[position % n]
        position += world                   # the other processes take those between

def endless_loader(data, args, start, rank, world, **options):
    """Iterator over this process's share of the batches from step `start` on. Without a generator
    of its own DataLoader would draw from torch's, whose state --resume has restored."""
    options["sampler"] = endless(len(data), args.seed, start * args.batch, rank, world)
    options["generator"] = torch.Generator().manual_seed(args.seed)
    return iter(torch.utils.data.DataLoader(data, args.batch // world, **options))

def learning_rate(step, steps, peak):
    """Linear warm-up over 2 % of the run, while AdamW's moments settle; a cosine down to zero."""
    warm = min(1, (step + 1) / max(1, steps // 50))        # rises to 1
    return peak * warm * 0.5 * (1 + math.cos(math.pi * step / steps))

def optimiser(model):
    """AdamW as in the authors' recipes, with betas (.9, .95). Weight decay acts on matrices, not on
    norms, biases and what else has one side of 1, which have no reason to shrink."""
    trained = [p for p in model.parameters() if p.requires_grad]           # not a frozen encoder
    matrix = {p: p.ndim > 1 and min(p.shape) > 1 for p in trained}
    groups = [{"params": [p for p in matrix if matrix[p]], "weight_decay": 0.05},
              {"params": [p for p in matrix if not matrix[p]], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)        # one kernel per step

def update(opt, model, loss, terms, step, lr):
    """One optimiser step, with gradients clipped at norm 1. InputError names the term that is not
    finite, before it can reach the weights or a checkpoint."""
    for group in opt.param_groups:
        group["lr"] = lr
    opt.zero_grad()                         # those of the step before
    loss.backward()                         # DDP averages the gradients over the processes here
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if not math.isfinite(loss.item() + norm.item()):
        broken = [k for k, v in {**terms, "the gradient": norm}.items() if not v.isfinite()]
        raise InputError(f"step {step}: {' and '.join(broken)} became infinite or NaN; go on from "
                         f"the last checkpoint with --resume and a lower --lr")
    opt.step()

def rng_state(device):
    """The random state that --resume needs. A run on the CPU never asks CUDA for anything."""
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state(), **cuda}

def resume(path, model_args, parts, device, steps):
    """Load the state of `parts`, by name, and of the random generators from last.pt -> its dict."""
    ckpt = vmae.read_checkpoint(path, "model_args", "step", "rng", *parts)
    if ckpt["model_args"] != model_args:
        raise InputError(f"{path}: holds another model, {ckpt['model_args']}; leave out what "
                         f"changes the model, or give another --out")
    if ckpt["step"] >= steps:
        raise InputError(f"{path}: is at step {ckpt['step']} already; give a larger --steps")
    for name, part in parts.items():
        part.load_state_dict(ckpt[name])    # with AdamW's moments, without which the loss jumps
    torch.set_rng_state(ckpt["rng"]["cpu"])
    if device.type == "cuda" and "cuda" in ckpt["rng"]:
        torch.cuda.set_rng_state(ckpt["rng"]["cuda"], device)
    return ckpt

def begin(args, model, what, start, rank):
    """Process 0 makes the run folder and prints what will run; the others seed their own noise."""
    if rank > 0:
        torch.manual_seed(args.seed + 1000 * rank + start)
    else:
        os.makedirs(args.out, exist_ok=True)
        count = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{what}, {count:.2f} M parameters\n", *(f"{k}={v}" for k, v in vars(args).items()))

class Log:
    """The bar on the screen and log.jsonl in the run folder, written by process 0."""

    def __init__(self, out, start, args, rank):
        self.rank, self.steps, self.batch, self.paused = rank, args.steps, args.batch, None
        if rank == 0:
            self.bar = tqdm(total=args.steps, initial=start, dynamic_ncols=True, mininterval=1)
            self.file = open(os.path.join(out, "log.jsonl"), "a" if start else "w")
        self.clock, self.last, self.seen, self.held_out = time.perf_counter(), start, {}, {}

    def pause(self):                        # before a save, whose time does not count
        self.paused = time.perf_counter()

    def step(self, step, terms, lr, held_out):
        """To be called after each step; writes a line every 50 steps and at each save. terms: the
        losses, of which it writes the mean over the steps that had them. held_out: of a save."""
        if self.rank > 0:
            return
        self.bar.update()
        for name, value in terms.items():
            total, count = self.seen.get(name, (0, 0))
            self.seen[name] = total + value.detach(), count + 1            # stays on the device
        if step % 50 == 0 or held_out or step == self.steps:
            now = self.paused or time.perf_counter()
            speed = (step - self.last) * self.batch / (now - self.clock)   # images per second
            means = {k: round((total / n).item(), 5) for k, (total, n) in self.seen.items()}
            line = {"step": step, "lr": lr, "images_per_s": round(speed, 1), **means, **held_out}
            print(json.dumps(line), file=self.file, flush=True)            # a plot may follow it
            self.held_out = held_out or self.held_out      # the bar keeps the last ones
            self.bar.set_postfix(img_s=f"{speed:.0f}", **means, **self.held_out, refresh=False)
            self.clock, self.last, self.seen, self.paused = time.perf_counter(), step, {}, None


# ---- Stage one --------------------------------------------------------------------------------

# Defaults of --batch, --steps and --lr for each size. For tiny, batch 16 was the best of 16, 32 and
# 64 on 2 CPU cores. For base: the authors' learning rate of 8e-4, times sqrt(128 / 2048).
RECIPES = {"tiny": dict(batch=16, steps=5000, lr=1.5e-3),
           "small": dict(batch=16, steps=8000, lr=1e-3),
           "base": dict(batch=128, steps=100_000, lr=2e-4)}

# The autoencoders that the paper compares: defaults of the options below, AE's with the changes of
# a row in PRESETS. lambda_reg = 0 makes the latent a point. lambda_p = None: `perceptual` decides.
# Two values are ours. The authors' lambda_reg of 1e-6 leaves vmae's sigma at .016 of mu's spread;
# 1e-4 raises it to .12 and costs .2 dB. With Esser's lambda_adv of 0.5 sdvae's discriminator learnt
# nothing on the faces; with 0.1 it does.
AE = dict(arch="conv", mask=0.0, noise=0.0, lambda_reg=0.0, kl_mean="zero", lambda_p=0.0,
          lambda_adv=0.0)
PRESETS = {
    "ae": {}, "dae": dict(noise=0.2), "vae": dict(lambda_reg=3e-4),
    "sdvae": dict(lambda_reg=1e-5, lambda_p=None, lambda_adv=0.1),
    "mae": dict(arch="vit", mask=0.6),
    "vmae": dict(arch="vit", mask=0.6, lambda_reg=1e-4, kl_mean="free", lambda_p=None)}

def options():
    """The command line -> checked options; fill_in and perceptual choose those that are None."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s [options]")
    common_options(parser, "runs/vmae", RECIPES, "tiny to 32 px; above, base on CUDA, else small")
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="vmae", help="an autoencoder of the paper; sets the "
        "defaults of --out, to runs/NAME, and of the options below (default: %(default)s)")
    add("--arch", choices=("vit", "conv"), help="VMAE's transformer or SD-VAE's convolutions")
    add("--init", help="checkpoint to start from: ours, or a published VMAE or SD3-style VAE")
    add("--tune", choices=("decoder",), help="train the decoder of --init and leave its encoder as "
        "it is, without a mask and with LPIPS at 10: the authors' last stage; into runs/tuned")
    add("--mask", type=float, help=f"masked share of x {default(PRESETS, 'mask', 'others 0')}")
    # Held-out PSNR on the faces after 2,200 steps: 31.0 dB. With --whole 0 it is 28.3, because the
    # encoder is used on whole images. With --lambda-m 1, the authors' balance, it is 28.6, because
    # the masked patches have much larger errors than the visible ones and dominate the sum.
    add("--whole", type=float, default=0.5, help="share of steps without a mask (default: 0.5)")
    add("--noise", type=float, help=f"noise's deviation {default(PRESETS, 'noise', 'others 0')}")
    add("--lambda-m", type=float, default=0.1, help="weight of L_M (default: %(default)s)")
    add("--lambda-reg", type=float, help="weight of L_reg; with 0 z has no variance "
        f"{default(PRESETS, 'lambda_reg', 'others 0')}")
    add("--lambda-p", type=float, help="weight of L_P, LPIPS (default: vmae, sdvae 0.5 on a folder "
        "if VGG's weights can be had, otherwise 0)")
    add("--lambda-adv", type=float, help="weight of the adversarial loss, which begins halfway "
        f"through the run {default(PRESETS, 'lambda_adv', 'others 0')}")
    add("--kl-mean", choices=("free", "zero"), help="free: L_reg pulls only the variance, to 1, "
        f"Section 4.4; zero: the KL of Eq. (1) {default(PRESETS, 'kl_mean', 'others zero')}")
    add("--vgg-weights", help="local copy of torchvision's vgg16-397923af.pth, for LPIPS")
    given, _ = parser.parse_known_args()    # a first look, for --preset and --tune
    tuned = dict(mask=0.0, lambda_p=None) if given.tune else {}
    parser.set_defaults(out=f"runs/{'tuned' if given.tune else given.preset}",
                        **{**AE, **PRESETS[given.preset], **tuned})
    args = parse(parser)
    if args.tune and not args.init:
        raise InputError("--tune decoder: needs a trained model; name its checkpoint with --init")
    if args.compile and args.lambda_adv > 0:
        raise InputError("--compile: cannot be given with an adversarial loss (--lambda-adv)")
    return args

def fill_in(args, cuda, init):
    """Choose the options that were not given. The shape of the model is that of --init, if any."""
    if init is not None:
        args.size = args.size or init["model_args"]["img_size"]
        args.arch = "conv" if "channels" in init["model_args"] else "vit"
    if args.arch == "conv" and args.mask > 0:
        raise InputError(f"--mask {args.mask}: convolutions cannot skip patches; give --mask 0")
    args.size = args.size or (32 if args.data is None else 256 if cuda else 64)
    args.model = args.model or ("tiny" if args.size <= 32 else "base" if cuda else "small")
    if args.arch == "conv" and args.model == "base":       # 2.5 GiB per image, ten times VMAE's
        args.batch = args.batch or 16
    use_recipe(args, RECIPES, cuda)

def new_model(args, init):
    """Options -> (model, arguments of its constructor), with the weights of --init if it is given.
    InputError names --size and --mask if they do not fit the model."""
    rows = vmae.sizes if args.arch == "vit" else vmae.conv_sizes
    model_args = dict(init["model_args"] if init else rows[args.model], img_size=args.size)
    try:
        model = vmae.build(model_args)
        vmae.random_mask(1, model.grid, model.grid, args.mask)     # raises if nothing stays visible
    except ValueError as error:
        raise InputError(f"--size {args.size} --mask {args.mask}: {error}") from None
    if init is not None:
        model.load_state_dict(vmae.resize_positions(init["model"], model))
    elif args.lambda_reg == 0:
        vmae.drop_variance(model)
    if args.tune == "decoder":              # the encoder is frozen, so the latents stay as they are
        for name, p in model.named_parameters():
            p.requires_grad_(name.startswith(("decoder", "from_latent", "mask_token")))
    return model, model_args

def perceptual(args, device):
    """Set args.lambda_p, if it is None -> the LPIPS network, or None if that weight is 0."""
    asked_for = args.lambda_p is not None or args.vgg_weights
    if args.lambda_p is None:               # on the small faces VGG would cost more than the rest
        args.lambda_p = 10.0 if args.tune else (0.5 if args.data else 0.0)
    if args.lambda_p == 0:
        return None
    try:
        return vmae.load_lpips(args.vgg_weights).to(device)
    except InputError as error:
        if asked_for:
            raise
        print(f"warning: training without L_P, so images will be blurred; {error}")
        args.lambda_p = 0.0

def is_whole(step, share):
    """Whether this step sees whole images: every other one for 0.5, every fourth for 0.25."""
    return math.floor((step + 1) * share) > math.floor(step * share)

@torch.no_grad()
def validate(model, x_val, args, path):
    """Held-out x_val (B, 3, H, W) -> {"PSNR_val": of whole images, "PSNR_m_val": of the masked
    patches, masked as in training}, in dB. Saves 8 as rows of original, input, reconstruction."""
    device, P, whole, masked, rows = model.logvar_x.device, model.patch_size, [], [], []
    generator = torch.Generator(device).manual_seed(0)
    for x in (part.to(device) for part in x_val.split(8)):                 # (8, 3, H, W)
        a = vmae.to_uint8(x).cpu()                         # psnr is in float64, unknown to MPS
        whole.append(vmae.psnr(a, vmae.to_uint8(model.decode(model.encode(x).mode())).cpu()))
        if args.mask > 0 or not rows:
            x_in = x + args.noise * torch.randn(x.shape, generator=generator, device=device)
            p, _, mask = model(x_in, args.mask, generator)                 # as in training
            seen = vmae.patchify(x_in, P) * (1 - mask[..., None])          # grey where masked
            rows = rows or [x, vmae.unpatchify(seen, P, *x.shape[2:]), p.mode()]
        if mask.any():
            pair, hidden = (a, vmae.to_uint8(p.mode()).cpu()), mask.cpu() == 1
            pair = [vmae.patchify(v, P)[hidden].view(len(x), 1, 1, -1) for v in pair]
            masked.append(vmae.psnr(*pair))                # (B,)
    vmae.save_grid(rows, path)
    found = {"PSNR_val": whole, "PSNR_m_val": masked} if masked else {"PSNR_val": whole}
    return {name: round(torch.cat(values).mean().item(), 2) for name, values in found.items()}

def main():
    args = options()
    device = vmae.pick_device(args.device)  # cuda, cpu or mps
    init = vmae.read_stage_one(args.init) if args.init else None           # ours or published
    fill_in(args, device.type == "cuda", init)
    rank, world, device = start_processes(device, args.batch)      # without torchrun rank 0 of 1
    train = vmae.open_images(args.data, args.size, "train", args.val, keep=args.workers == 0)
    val = vmae.open_images(args.data, args.size, "val", args.val)          # never trained on
    torch.manual_seed(args.seed)            # the same weights on every process
    model, model_args = new_model(args, init)
    model, lpips_net = model.to(device), perceptual(args, device)          # also sets args.lambda_p
    parts = {"model": model, "opt": optimiser(model)}      # a checkpoint holds the state of each
    disc = vmae.discriminator(args.size).to(device) if args.lambda_adv > 0 else None
    if disc is not None:
        parts.update(disc=disc, disc_opt=optimiser(disc))  # and SD-VAE's discriminator
    adv_start = args.steps // 2             # late (Esser 2021): an early x_hat is too easy to tell
    start, last = 0, os.path.join(args.out, "last.pt")
    if args.resume:
        start = resume(last, model_args, parts, device, args.steps)["step"]
    begin(args, model, f"{len(train)} images to train on, {len(val)} held out", start, rank)

    # net shares model's weights, judge disc's. dynamic=False: one graph for masked, one for whole.
    net = torch.compile(model, dynamic=False) if args.compile else model
    net = DistributedDataParallel(net) if world > 1 else net
    judge = DistributedDataParallel(disc) if disc and world > 1 else disc
    loader = endless_loader(train, args, start, rank, world, num_workers=args.workers,
                            pin_memory=device.type == "cuda")
    shown = torch.randperm(len(val), generator=torch.Generator().manual_seed(0))[:64].tolist()
    x_val = torch.stack([val[i][0] for i in shown])                        # (64, 3, H, W)
    low_precision, log = autocast(device), Log(args.out, start, args, rank)

    # x -> x_v -> q(z|x_v) -> z -> p(x|z) -> L_VMAE. dae adds noise to x, sdvae an adversary.
    for step in range(start, args.steps):
        lr = learning_rate(step, args.steps, args.lr)      # up, then down a cosine
        mask_ratio = 0.0 if is_whole(step, args.whole) else args.mask      # whole: nothing masked
        x = vmae.random_flip(next(loader)[0].to(device, non_blocking=True))    # (B, 3, H, W)
        x_in = x + args.noise * torch.randn_like(x) if args.noise > 0 else x  # only for dae
        with low_precision():
            p, q, mask = net(x_in, mask_ratio)             # mask (B, N), 1 = masked
        loss, terms = vmae.loss_VMAE(       # a scalar, and {name: scalar}
            x, p, q, mask, model.patch_size, lambda_M=args.lambda_m if mask_ratio > 0 else 0.0,
            lambda_P=args.lambda_p, lambda_reg=args.lambda_reg, kl_mean=args.kl_mean,
            lpips_net=lpips_net)

        adversary = disc is not None and step >= adv_start
        if adversary:                       # SD-VAE's addition: the decoder against disc
            disc.requires_grad_(False)
            with low_precision():
                fake = disc(p.mode())                                      # (B, 1, h', w')
            terms["L_G"] = vmae.loss_G(fake, loss, model.last_layer)       # a scalar
            loss = loss + args.lambda_adv * terms["L_G"]
        update(parts["opt"], model, loss, terms, step, lr)                 # back, clip, step
        if adversary:                       # and disc's own step, on x and x_hat in one pass
            disc.requires_grad_(True)
            with low_precision():
                real, fake = judge(torch.cat([x, p.mode().detach()])).chunk(2)  # (B, 1, h', w')
            terms["L_D"] = vmae.loss_D(real, fake)
            update(parts["disc_opt"], disc, terms["L_D"], terms, step, lr)

        held_out, done = {}, step + 1
        if rank == 0 and (done % args.save_every == 0 or done == args.steps):
            log.pause()
            vmae.save_checkpoint(last, model_args=model_args, step=done, rng=rng_state(device),
                                 train_args=vars(args),
                                 **{name: part.state_dict() for name, part in parts.items()})
            picture = os.path.join(args.out, f"preview_{done:06d}.png")
            held_out = validate(model, x_val, args, picture)               # PSNR, in dB
        log.step(done, terms, lr, held_out)
    if world > 1:
        dist.destroy_process_group()

if __name__ == "__main__":
    vmae.cli(main)

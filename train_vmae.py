"""Train stage one: VMAE (Sections 4.1 to 4.4), or an autoencoder that the paper compares it with.

    python train_vmae.py                                the built-in faces, on a laptop
    python train_vmae.py --data path --mask 0.6         a folder of images
    python train_vmae.py --data path --resume           the same, as often as it is interrupted
    python train_vmae.py --preset sdvae                 another autoencoder, into runs/sdvae
    python train_vmae.py --init runs/vmae --tune decoder --size 256    into runs/tuned
    torchrun --nproc-per-node 4 train_vmae.py --data path    several GPUs

Writes into --out: last.pt; log.jsonl, one JSON object per line; preview_*.png, whose rows are the
original, the input (masked or noisy) and the reconstruction. Of a folder also: images.json, the
list of its files, unreadable.jsonl, and images_*.pt, its decoded images.
"""
import argparse, functools, itertools, json, math, os, re, signal, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import vmae                                 # before torch, see there
import torch
import torch.distributed as dist
from tqdm import tqdm

from vmae import RANK, WORLD, InputError

# ---- Plumbing, shared with train_ldm.py -------------------------------------------------------

def default(table, key, *others):
    """The text "(default: ...)" for the help of an option: what the rows of a table have for it."""
    known = [f"{name} {row[key]}" for name, row in table.items() if key in row]
    return f"(default: {', '.join([*known, *others])})"

def common_options(doc, out, recipes, model, data, val):
    """-> a parser of both trainers' options. model, data, val: defaults, in words for the help."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0], usage="%(prog)s [options]")
    add = parser.add_argument
    add("--data", help=f"folder of images, whose sub-folders are classes (default: {data})")
    add("--val", help=f"folder of held-out images (default: {val})")
    add("--model", choices=recipes, help=f"size of the network (default: {model})")
    add("--batch", type=int, help=f"images per optimiser step {default(recipes, 'batch')}")
    add("--micro", type=int, help="images at once, gradients summed (default: what memory holds)")
    add("--steps", type=int, help=f"optimiser steps in all {default(recipes, 'steps')}")
    add("--lr", type=float, help=f"peak learning rate {default(recipes, 'lr')}")
    add("--save-every", type=int, default=1000, help="steps between checkpoints (default: 1000)")
    add("--out", default=out, help="run folder (default: %(default)s)")
    add("--seed", type=int, default=0, help="sets weights, order, masks and noise (default: 0)")
    add("--device", default="auto", help="cuda, cpu, mps... (default: cuda if there is one)")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="of matrix "
        "products; auto: bfloat16 on CUDA from Ampere on, or if a CPU is faster with it; float32: "
        "as TF32 on CUDA")
    add("--resume", action="store_true", help="go on from last.pt in --out, or begin if there is "
        "none; the options that change the run stay as they were")
    add("--compile", action="store_true", help="torch.compile: faster after a slow first step")
    return parser

# Options that a resumed run does not take over from its checkpoint, and those that may change.
FRESH = ("resume", "out", "device", "compile")
FREE = "data val steps lr micro save_every precision no_cache vgg_weights".split()

def parse(parser):
    """The command line -> (checked options, the checkpoint to go on from, or None). Ends the script
    if that run is complete. InputError if an option contradicts it, or if --resume is missing."""
    args, saved, old = parser.parse_args(), None, {}
    last = os.path.join(args.out, "last.pt")
    if os.path.exists(last):
        saved = vmae.read_checkpoint(last, "train_args", "step", "model_args", "model")
        saved["path"] = last
        if not args.resume:
            raise InputError(f"{last} holds step {saved['step']} of a run; go on with --resume, or "
                             f"begin another one with --out")
        if ("vmae" in saved) != ("vmae" in args):          # stage two has this entry and option
            raise InputError(f"{last}: a checkpoint of the other stage; give another --out")
        old = {k: v for k, v in saved["train_args"].items() if k in args and k not in FRESH}
        if math.ceil((old.get("batch") or 1) / (old.get("micro") or 1)) < WORLD:
            old["micro"] = None             # chosen for fewer processes: micro_batches does it anew
        parser.set_defaults(**old)
    elif args.resume:
        vmae.say(f"{last}: no checkpoint yet, so the run begins")
    args = vmae.check(parser.parse_args())
    for name in {"data", "val", "init", "vmae"} & vars(args).keys():       # from any folder
        setattr(args, name, getattr(args, name) and os.path.abspath(getattr(args, name)))
    for name, value in old.items():         # they are the defaults now: what differs was given
        if name not in FREE and getattr(args, name) != value:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: the run in "
                             f"{args.out} has {value}; leave it out, or begin another with --out")
    if saved and saved["step"] >= args.steps:
        vmae.say(f"{last}: complete, at step {saved['step']} of {args.steps}")
        sys.exit()
    return args, saved

def use_recipe(args, recipes):
    """Choose --batch, --steps and --lr, if they were not given."""
    for name, value in recipes[args.model].items():
        setattr(args, name, getattr(args, name) or value)

def matmul_precision(args, device):
    """Choose --precision, if it is auto -> a function that makes a context for matrix products."""
    if args.precision == "auto":
        args.precision = "bfloat16" if vmae.agree(vmae.has_bfloat16(device)) else "float32"
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True              # shapes repeat: try all algorithms once
        torch.set_float32_matmul_precision("high")         # what remains in float32: as TF32
    return lambda: torch.autocast(device.type, torch.bfloat16, args.precision == "bfloat16")

def saved_bytes(function):
    """Run function(), a forward pass -> the bytes that it keeps for the backward pass."""
    storages = {}

    def keep(tensor):                       # several views may share one storage
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _loss = function()                  # holds its graph, so that no storage is used twice
    return sum(storages.values())

def free_memory(device):
    """Bytes that this process may use. On CUDA what is free; elsewhere half of what is built in."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not hasattr(os, "sysconf"):          # Windows
        return 8 * 2**30
    built_in = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return built_in // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))     # set by torchrun

def micro_batches(args, device, model, forward):
    """Choose --micro, if it was not given -> the numbers of this process's parts of each batch.

    forward(n): the loss of n images. What it keeps in memory grows with n, so two passes tell how
    much one image takes. Gradients and AdamW's two moments take three times the memory of the
    weights. A third of what is then free is left for short-lived tensors and fragmentation."""
    if args.micro is None:
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        free = free_memory(device) - 3 * weights
        image = saved_bytes(lambda: forward(2)) - saved_bytes(lambda: forward(1))
        fits = vmae.agree(max(1, int(2 / 3 * free / image)))
        passes = math.ceil(args.batch / WORLD / fits)      # of each process, in one step
        args.micro = min(math.ceil(args.batch / passes / WORLD), max(1, args.batch // WORLD))
    parts = math.ceil(args.batch / args.micro)             # the last one may be smaller
    if parts < WORLD:
        enough = f"--micro {args.batch // WORLD}" if args.batch >= WORLD else "a larger --batch"
        raise InputError(f"--batch {args.batch} --micro {args.micro}: {parts} parts are too few "
                         f"for {WORLD} processes; give {enough}")
    return range(RANK, parts, WORLD)

def shares(n, args, start, parts):
    """Yield this process's parts of each batch, from step `start` on, without end: sorted lists of
    numbers below n (a file is read faster from front to back). The batches are cut, one after the
    other, from the epochs in a row; each epoch is a new random order of all n numbers."""
    @functools.lru_cache(2)
    def order(epoch):
        return torch.randperm(n, generator=vmae.seeded(args.seed, epoch)).tolist()

    for step in itertools.count(start):
        batch = [order(p // n)[p % n] for p in range(step * args.batch, (step + 1) * args.batch)]
        for part in parts:
            yield sorted(batch[part * args.micro:(part + 1) * args.micro])

def ahead(data, args, start, parts, device):
    """Iterator without end over what this process trains on, data.batch(list) for each list of
    `shares`, on `device`. A thread draws the next batch while a GPU works on this one, into memory
    that a GPU can copy from by itself (pinned). On a CPU it would only take cores from training."""
    batches = map(data.batch, shares(len(data), args, start, parts))
    if device.type != "cuda":
        yield from ([v.to(device) for v in batch] for batch in batches)
    batches = ([v.pin_memory() for v in batch] for batch in batches)
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, batches)
        while True:
            batch, following = following.result(), pool.submit(next, batches)
            yield [v.to(device, non_blocking=True) for v in batch]

def learning_rate(step, steps, peak):
    """Linear warm-up over 2 % of the run, while AdamW's moments settle; a cosine down to zero."""
    warm = min(1, (step + 1) / max(1, steps // 50))        # rises to 1
    return peak * warm * 0.5 * (1 + math.cos(math.pi * step / steps))

def optimiser(model):
    """AdamW as in the authors' recipes, with betas (.9, .95). Weight decay acts on matrices, not on
    norms, biases and what else has one side of 1, which have no reason to shrink."""
    trained = [p for p in model.parameters() if p.requires_grad]           # not a frozen encoder
    matrices = [p for p in trained if p.ndim > 1 and min(p.shape) > 1]
    others = [p for p in trained if p.ndim < 2 or min(p.shape) == 1]
    groups = [dict(params=matrices, weight_decay=0.05), dict(params=others, weight_decay=0.0)]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)        # one kernel per step

def update(opt, model, lr):
    """One optimiser step with the gradients that all processes have summed, clipped at norm 1, and
    then zeroed -> whether they were finite, a tensor. If not, nothing is changed: AdamW's kernel
    leaves out a step if found_inf is 1, so that the CPU does not have to wait for the GPU."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if WORLD > 1:                           # as one vector, in one go
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)               # the sum over the processes
        for g, part in zip(grads, flat.split([g.numel() for g in grads])):
            g.copy_(part.view_as(g))
    fine = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite()
    for group in opt.param_groups:
        group["lr"] = lr
    opt.found_inf = (~fine).float()
    opt.step()
    opt.zero_grad()
    return fine

def resume(args, ckpt, parts):
    """Load the state of `parts`, by name, from the checkpoint `ckpt` -> step, 0 without one.
    InputError if it does not fit, or if the processes do not see the same checkpoint."""
    for name, part in parts.items() if ckpt else ():
        try:
            part.load_state_dict(ckpt[name])    # with AdamW's moments, without which the loss jumps
        except (KeyError, ValueError, RuntimeError) as error:
            raise InputError(f"{args.out}/last.pt: its {name} does not fit these options "
                             f"({vmae.reason(error)}); give another --out") from None
    start = ckpt["step"] if ckpt else 0
    if vmae.agree(start) != -vmae.agree(-start):           # the least and the greatest
        raise InputError(f"--out {args.out}: holds step {start} for process {RANK}, another step "
                         f"for another; all processes need the same folder")
    return start

def begin(args, model, what):
    """Make the run folder and print what will run."""
    os.makedirs(args.out, exist_ok=True)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    options = " ".join(f"{name}={value}" for name, value in vars(args).items())
    vmae.say(f"{what}, {count:.2f} M parameters\n{options}")

class Log:
    """The bar on the screen, log.jsonl and last.pt in the run folder, which process 0 writes. It
    also ends the run after a step that SIGTERM or Ctrl-C interrupts. All sums stay on the device,
    and are read every 50 steps and at each save only."""

    def __init__(self, args, start, device):
        self.args, self.logged, self.since = args, start, time.perf_counter()  # step, and when
        self.sums, self.held_out, self.signals = {}, {}, []
        # Bad batches in a row up to now, the longest such row, and all since the start.
        self.row = self.longest = self.skipped = torch.zeros((), device=device)
        path = Path(args.out, "log.jsonl")
        if RANK == 0:
            text = path.read_bytes() if start and path.exists() else b""
            with vmae.whole_file(path) as file:            # without damaged lines, and without
                for line, step in re.findall(rb'({"step": (\d+), [^{}\n]*}\r?\n)', text):
                    if int(step) <= start:                 # steps that will run again
                        file.write(line)
        self.file = open(path if RANK == 0 else os.devnull, "a")
        self.bar = tqdm(total=args.steps, initial=start, dynamic_ncols=True, mininterval=1,
                        disable=RANK > 0)

    def __enter__(self):
        def catch(number, _):
            self.signals.append(number)
            if WORLD == 1:                  # a second one stops at once; torchrun sees to that
                signal.signal(number, signal.SIG_DFL)

        self.usual = {n: signal.signal(n, catch) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind, error, trace):
        for number, handler in self.usual.items():
            signal.signal(number, handler)
        self.bar.close()
        self.file.close()
        if kind is torch.OutOfMemoryError:
            less = f"--micro {self.args.micro // 2}" if self.args.micro > 1 else "a smaller --size"
            raise InputError(f"out of memory with {self.args.micro} images at once; give {less}")

    def add(self, terms, share):
        """Losses of this share of a batch; what is not finite is left out of their means."""
        for name, value in terms.items():
            fine = value.detach().isfinite()
            row = torch.stack([value.detach().nan_to_num(0, 0, 0), fine, ~fine])
            self.sums[name] = self.sums.get(name, 0) + share * row         # sum, good, bad share

    def means(self, step):
        """-> what to log: speed, and means of the losses, since the last line. InputError if ten
        steps in a row were bad."""
        sums = torch.stack(list(self.sums.values()))       # (terms, 3)
        if WORLD > 1:
            dist.all_reduce(sums)
        sums = dict(zip(self.sums, sums.tolist()))
        if self.longest >= 10:
            broken = " and ".join(name for name, (_, _, bad) in sums.items() if bad > 0)
            raise InputError(f"step {step}: {broken or 'the gradient'} infinite or NaN, ten times "
                             f"in a row; go on with --resume and a lower --lr")
        speed = (step - self.logged) * self.args.batch / (time.perf_counter() - self.since)
        means = {"images_per_s": round(speed, 1)}
        for name, (total, good, _) in sums.items():
            means[name] = round(total / good, 5) if good else None
        if self.skipped > 0:
            means["skipped"] = int(self.skipped)
        return means

    def step(self, step, fine, lr, measure, parts, **entries):
        """To be called after each step. fine: whether the gradient was finite, a tensor. A save
        logs what measure(path of a picture) finds on held-out images, and then writes last.pt, from
        the state of `parts` and `entries`; a run that goes on from there has all lines up to it.
        Then an interrupted run ends."""
        self.row = (self.row + 1) * ~fine
        self.longest, self.skipped = self.longest.maximum(self.row), self.skipped + ~fine
        stopping = not vmae.agree(not self.signals) and step < self.args.steps     # one stops all
        saving = stopping or step % self.args.save_every == 0 or step == self.args.steps
        self.bar.update()
        if not saving and step % 50 > 0:
            return
        means, held_out = self.means(step), {}
        if saving and RANK == 0:
            held_out = measure(os.path.join(self.args.out, f"preview_{step:06d}.png"))
        print(json.dumps({"step": step, "lr": lr, **means, **held_out}), file=self.file, flush=True)
        self.held_out |= held_out           # the bar keeps the last ones
        self.bar.set_postfix(means | self.held_out, refresh=False)
        if saving and RANK == 0:
            states = {name: part.state_dict() for name, part in parts.items()}
            vmae.save_checkpoint(os.path.join(self.args.out, "last.pt"), step=step,
                                 train_args=vars(self.args), **entries, **states)
        self.logged, self.sums, self.since = step, {}, time.perf_counter()     # saves do not count
        if stopping:
            vmae.agree(0)                   # until process 0 has saved
            sys.exit(1 if RANK else f"stopped after step {step}, which is saved; --resume goes on")

# ---- Stage one --------------------------------------------------------------------------------

# Defaults of --batch, --steps and --lr for each size. For tiny, batch 16 was the best of 16, 32 and
# 64 on 2 CPU cores, and 3,200 steps at 4e-3 reach the 32.5 dB for which 1.5e-3 needs 5,000. For
# base: the authors' learning rate of 8e-4, times sqrt(128 / 2048).
RECIPES = {"tiny": dict(batch=16, steps=3200, lr=4e-3),
           "small": dict(batch=16, steps=8000, lr=1e-3),
           "base": dict(batch=128, steps=100_000, lr=2e-4)}
CONV_RECIPES = {                            # of the convolutional bodies
    **RECIPES, "tiny": dict(RECIPES["tiny"], lr=1.5e-3),   # 20.0 dB after 400 steps, not 18.2
    "base": dict(RECIPES["base"], batch=16)}               # 22 times the operations of VMAE

# The autoencoders that the paper compares. AE has defaults for the options below; each row of
# PRESETS says what its autoencoder changes. lambda_reg = 0: z is mu. lambda_p = None: `perceptual`
# chooses it. Two values are not the authors': their lambda_reg of 1e-6 leaves vmae's sigma at .016
# of mu's spread; ours, 1e-4, raises it to .12 and costs .2 dB. With Esser's lambda_adv of 0.5
# sdvae's discriminator learnt nothing on the faces; with our 0.1 it does. adv_start is no option:
# fill_in sets it, and --resume keeps it.
AE = dict(arch="conv", mask=0.0, noise=0.0, lambda_reg=0.0, kl_mean="zero", lambda_p=0.0,
          lambda_adv=0.0, adv_start=None)
PRESETS = {
    "ae": {}, "dae": dict(noise=0.2), "vae": dict(lambda_reg=3e-4),
    "sdvae": dict(lambda_reg=1e-5, lambda_p=None, lambda_adv=0.1),
    "mae": dict(arch="vit", mask=0.6),
    "vmae": dict(arch="vit", mask=0.6, lambda_reg=1e-4, kl_mean="free", lambda_p=None)}

def options():
    """The command line -> what parse returns. fill_in and perceptual choose options still None."""
    parser = common_options(
        __doc__, "runs/vmae", RECIPES, "tiny to 32 px; above, base on CUDA, else small",
        "the built-in faces", "one in twenty of --data, chosen by its path")
    add = parser.add_argument
    add("--size", type=int, help="image side (default: --init's; faces 32; 256 on CUDA, else 64)")
    add("--preset", choices=PRESETS, default="vmae", help="autoencoder of the paper; sets defaults "
        "of options below (PRESETS), and --out to runs/NAME (default: %(default)s)")
    add("--arch", choices=("vit", "conv"), help="VMAE's transformer or SD-VAE's convolutions, with "
        "other defaults of --lr (tiny) and --batch (base) (default: vmae, mae vit, others conv)")
    add("--init", type=vmae.checkpoint, help="start from ours, a published VMAE or SD3-style VAE")
    add("--tune", choices=("decoder",), help="train the decoder of --init and leave its encoder as "
        "it is, without a mask and with LPIPS at 10: the authors' last stage; into runs/tuned")
    add("--mask", type=float, help=f"masked share of x {default(PRESETS, 'mask', 'others 0')}")
    # With these defaults held-out PSNR on the faces is 31.0 dB after 2,200 steps at --lr 1.5e-3;
    # with --whole 0 it is 28.3, because the encoder is used on whole images; with --lambda-m 1, the
    # authors' balance, 28.6: the masked patches' errors are much larger and dominate the sum.
    add("--whole", type=float, default=0.5, help="share of steps without a mask (default: 0.5)")
    add("--noise", type=float, help=f"std of noise on x {default(PRESETS, 'noise', 'others 0')}")
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
    add("--no-cache", action="store_true", help="decode images in each epoch anew; by default a "
        "folder's decoded images are kept in --out, 3 * size^2 bytes each, if the disk has room")
    given, _ = parser.parse_known_args()    # a first look, for --preset and --tune
    parser.set_defaults(out=f"runs/{given.preset}", **AE | PRESETS[given.preset])
    if given.tune:
        parser.set_defaults(out="runs/tuned", mask=0.0, lambda_p=None)
    args, saved = parse(parser)
    if args.init and (given.arch or given.model):
        raise InputError("--arch, --model: --init decides the shape of the model; leave them out")
    if args.tune and not args.init:
        raise InputError("--tune decoder: needs a trained model; name its checkpoint with --init")
    idle = {"lambda_m": args.mask == 0, "whole": args.mask == 0, "kl_mean": args.lambda_reg == 0,
            "no_cache": not args.data}
    for name in [n for n in idle if idle[n] and getattr(args, n) != parser.get_default(n)]:
        vmae.say(f"--{name.replace('_', '-')}: has no effect beside the other options")
    if args.compile and args.lambda_adv > 0:
        raise InputError("--compile: cannot be given with an adversarial loss (--lambda-adv)")
    return args, saved

def fill_in(args, cuda, known):
    """Choose the options that were not given. known: the checkpoint of --resume or --init."""
    if known is not None:
        args.size = args.size or known["model_args"]["img_size"]
        args.arch = "conv" if "channels" in known["model_args"] else "vit"
    if args.arch == "conv" and args.mask > 0:
        raise InputError(f"--mask {args.mask}: convolutions cannot skip patches; give --mask 0")
    args.size = args.size or (32 if args.data is None else 256 if cuda else 64)
    args.model = args.model or ("tiny" if args.size <= 32 else "base" if cuda else "small")
    use_recipe(args, RECIPES if args.arch == "vit" else CONV_RECIPES)
    # Late (Esser 2021): an early x_hat is too easy to tell from x.
    args.adv_start = args.steps // 2 if args.adv_start is None else args.adv_start

def new_model(args, known):
    """Options -> (model, arguments of its constructor), with the weights of `known`, see fill_in.
    InputError names --size and --mask if they do not fit the model."""
    rows = vmae.sizes if args.arch == "vit" else vmae.conv_sizes
    model_args = dict(known["model_args"] if known else rows[args.model], img_size=args.size)
    try:
        model = vmae.build(model_args)
        vmae.random_mask(1, model.grid, model.grid, args.mask)     # raises if nothing stays visible
    except ValueError as error:
        raise InputError(f"--size {args.size} --mask {args.mask}: {error}") from None
    if known is not None:
        weights = vmae.resize_positions(known["model"], model)
        model = vmae.build_vmae(dict(known, model_args=model_args, model=weights)).train()
    if args.lambda_reg == 0:
        vmae.drop_variance(model)
    for name, p in model.named_parameters():               # a frozen encoder keeps its latents
        p.requires_grad_(not args.tune or name.startswith(("decoder", "from_latent", "mask_token")))
    return model, model_args

def perceptual(args, device):
    """Set args.lambda_p, if it is None -> the LPIPS network, or None if that weight is 0."""
    net, asked_for = None, args.lambda_p is not None or args.vgg_weights
    if args.lambda_p is None:               # on the small faces VGG would cost more than the rest
        args.lambda_p = 10.0 if args.tune else (0.5 if args.data else 0.0)
    if args.vgg_weights and args.lambda_p == 0:
        raise InputError("--vgg-weights: L_P has weight 0 here; give --lambda-p as well")
    try:
        if RANK == 0 and args.lambda_p > 0:                # process 0 downloads them for all
            net = vmae.load_lpips(args.vgg_weights)
    except InputError as error:
        if asked_for:
            raise
        print(f"warning: training without L_P, so images will be blurred; {error}")
        args.lambda_p = 0.0
    args.lambda_p = vmae.agree(args.lambda_p)              # the same loss in all processes
    return (net or vmae.load_lpips(args.vgg_weights)).to(device) if args.lambda_p > 0 else None

def is_whole(step, share):
    """Whether this step sees whole images: every other one for 0.5, every fourth for 0.25."""
    return math.floor((step + 1) * share) > math.floor(step * share)

@torch.no_grad()
def validate(model, x_val, args, path):
    """Held-out x_val (B, 3, H, W) -> {"PSNR_val": of whole images, "PSNR_m_val": of the masked
    patches, masked as in training}, in dB. Saves 8 as rows of original, input, reconstruction."""
    P, generator = model.patch_size, torch.Generator(x_val.device).manual_seed(0)
    found, rows = {"PSNR_val": [], "PSNR_m_val": []}, []
    for x in x_val.split(8):                                               # (8, 3, H, W)
        x_in = x + args.noise * torch.randn(x.shape, generator=generator, device=x.device)
        p, _, mask = model(x_in, args.mask, generator)     # as in training
        seen = vmae.patchify(x_in, P) * (1 - mask[..., None])              # grey where masked
        rows = rows or [x, vmae.unpatchify(seen, P, *x.shape[2:]), p.mode()]
        x_hat = model.decode(model.encode(x).mode())       # and as in use
        a, whole, guess = (vmae.to_uint8(v).cpu() for v in (x, x_hat, p.mode()))
        found["PSNR_val"].append(vmae.psnr(a, whole))      # (8,), in float64, unknown to MPS
        if args.mask > 0:                   # each image hides as many pixels, here in one row
            pair = [vmae.patchify(v, P)[mask.cpu() == 1].view(len(x), 1, 1, -1) for v in (a, guess)]
            found["PSNR_m_val"].append(vmae.psnr(*pair))
    vmae.save_grid(rows, path)
    return {name: round(torch.cat(v).mean().item(), 2) for name, v in found.items() if v}

def trial_loss(n, model, args, net, disc):
    """The loss of n grey images, with every part that the options switch on, for micro_batches."""
    x = torch.zeros(n, 3, model.img_size, model.img_size, device=model.logvar_x.device)
    p, q, mask = model(x, 0.0)              # whole images need more memory than masked ones
    loss, _ = vmae.loss_VMAE(x, p, q, mask, model.patch_size, lambda_P=args.lambda_p, lpips_net=net)
    return loss if disc is None else loss + disc(torch.cat([x, p.mode()])).float().mean()

def main():
    args, saved = options()
    device = vmae.start(args.device)        # cuda, cpu or mps
    known = saved or (vmae.read_stage_one(args.init) if args.init else None)
    fill_in(args, device.type == "cuda", known)            # args are complete from here on
    torch.manual_seed(args.seed)            # the same weights on every process
    model, model_args = new_model(args, known)
    train, val = vmae.open_images(args.data, args.size, args.val, args.out)
    # Convolutions are faster if the channels of a pixel lie side by side in memory.
    layout = torch.channels_last if args.arch == "conv" else torch.contiguous_format
    model = model.to(device, memory_format=layout)
    lpips = perceptual(args, device)        # also sets args.lambda_p
    parts = {"model": model, "opt": optimiser(model)}      # a checkpoint holds the state of each
    disc = vmae.discriminator(args.size).to(device) if args.lambda_adv > 0 else None
    if disc is not None:
        parts.update(disc=disc, disc_opt=optimiser(disc))  # and SD-VAE's discriminator
    start = resume(args, saved, parts)
    saved = known = None                    # their memory is free again
    low_precision = matmul_precision(args, device)
    with low_precision():
        mine = micro_batches(args, device, model, lambda n: trial_loss(n, model, args, lpips, disc))
    begin(args, model, f"{len(train)} images to train on, {len(val)} held out")
    if args.data:
        train = train.keep_pixels(args.out, not args.no_cache)
    if args.compile:                        # dynamic=False: one graph for masked, one for whole
        halves = ("encode_tokens", "decode_tokens") if args.arch == "vit" else ("encode", "decode")
        for half in halves:
            setattr(model, half, torch.compile(getattr(model, half), dynamic=False))
    batches = ahead(train, args, start, mine, device)
    if RANK == 0:                           # which alone measures them
        x_val = vmae.to_float(val.batch(val.some(64).tolist())[0].to(device))  # (64, 3, H, W)

    # x -> x_v -> q(z|x_v) -> z -> p(x|z) -> L_VMAE. dae adds noise to x, sdvae an adversary.
    with Log(args, start, device) as log:
        for step in range(start, args.steps):
            lr = learning_rate(step, args.steps, args.lr)  # up, then down a cosine
            mask_ratio = 0.0 if is_whole(step, args.whole) else args.mask  # whole: nothing masked
            adversary = disc is not None and step >= args.adv_start
            for number in mine:             # the micro-batches, whose gradients are summed
                generator = vmae.seeded(args.seed, step, number, device=device)
                x, _ = next(batches)        # uint8 (B, 3, H, W)
                x_in = x = vmae.random_flip(vmae.to_float(x), generator)
                share = len(x) / args.batch
                if args.noise > 0:          # only for dae
                    x_in = x + args.noise * torch.randn(x.shape, generator=generator, device=device)
                with low_precision():
                    p, q, mask = model(x_in, mask_ratio, generator)        # mask (B, N), 1 = masked
                    loss, terms = vmae.loss_VMAE(          # a scalar, and {name: scalar}
                        x, p, q, mask, model.patch_size, args.lambda_m if mask_ratio > 0 else 0.0,
                        args.lambda_p, args.lambda_reg, args.kl_mean, lpips)
                    if adversary:           # SD-VAE's addition: the decoder against disc
                        disc.requires_grad_(False)
                        fake = disc(p.mode())                              # (B, 1, h', w')
                        terms["L_G"] = vmae.loss_G(fake, loss, model.last_layer)   # a scalar
                        loss = loss + args.lambda_adv * terms["L_G"]
                (share * loss).backward()
                if adversary:               # and disc on x and x_hat, in one pass
                    disc.requires_grad_(True)
                    with low_precision():
                        real, fake = disc(torch.cat([x, p.mode().detach()])).chunk(2)
                    terms["L_D"] = vmae.loss_D(real, fake)
                    (share * terms["L_D"]).backward()
                log.add(terms, share)
            fine = update(parts["opt"], model, lr)         # clip, step, zero
            if adversary:
                fine = fine & update(parts["disc_opt"], disc, lr)

            log.step(step + 1, fine, lr, lambda path: validate(model, x_val, args, path), parts,
                     model_args=model_args)

if __name__ == "__main__":
    vmae.cli(main)

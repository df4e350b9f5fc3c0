"""Train stage two: diffusion on the latents of a trained stage one (Section 3.2).

    python train_ldm.py                                 after train_vmae.py, on the same data
    python train_ldm.py --vmae runs/mae                 on the latents of another autoencoder
    python train_ldm.py --no-classes                    unconditional, even if there are classes

Each image and its mirror image are encoded once, into moments_*.pt in --out, which training reads.
Also writes last.pt, log.jsonl and preview_*.png, samples of the EMA weights.
"""
import vmae                                 # before torch, see there
import numpy as np
import torch

import ldm
import sample
from train_vmae import (Log, ahead, begin, common_options, learning_rate, matmul_precision,
                        micro_batches, optimiser, parse, resume, update, use_recipe)
from vmae import RANK, InputError

# Defaults of --batch, --steps and --lr. For tiny, with patches of 2, batch 16 learnt more than 8 or
# 32 in the same time on a CPU. The learning rate of small and base is the authors'.
RECIPES = {"tiny": dict(batch=16, steps=2000, lr=3e-3),
           "small": dict(batch=256, steps=100_000, lr=2e-4),
           "base": dict(batch=256, steps=100_000, lr=2e-4)}
DROP = 0.1             # default of --drop; Ho & Salimans 2022 found 0.1 and 0.2 equally good

# ---- The cache of moments ---------------------------------------------------------------------

@torch.no_grad()
def cache_moments(model, data, run, device, low_precision):
    """-> vmae.Rows, kept in `run` and made anew if stage one's weights or the data change. Rows 2i
    and 2i + 1 hold q(z|x) of image i and of its mirror image: mu and logvar, (2d, h, w), float16.
    low_precision: makes the context; after the default run bfloat16 halves the time and moves mu by
    .4 % of its spread, of which sigma is 7 %."""
    def encode(first, last):
        """For vmae.Rows: the rows from `first` to `last` - 1."""
        for x, y in data.batches(torch.arange(first // 2, last // 2)):
            x = vmae.to_float(x.to(device))                                # (B, 3, H, W)
            with low_precision():
                q = model.encode(torch.stack([x, x.flip(-1)], 1).flatten(0, 1))    # (2B, d, h, w)
            yield torch.cat([q.mu, q.logvar], 1).half().cpu(), y.repeat_interleave(2)

    weights = b"".join(v.cpu().numpy().tobytes() for v in model.state_dict().values())
    row_bytes = 2 * 2 * model.latent_dim * model.grid**2   # mu and logvar, two bytes each
    rows = vmae.Rows(run, "moments", weights + data.fingerprint(), 2 * len(data), row_bytes)
    return rows.build("encoding, mirror images included,", encode)

def statistics(rows):
    """Mean and standard deviation of z per channel, (d,) each, for normalise, from 2,048 rows at
    equal distances. The variance of z is that of mu, plus the mean of sigma^2."""
    at = np.linspace(0, len(rows) - 1, min(2048, len(rows))).round().astype(int)
    mu, logvar = rows.batch(at.tolist())[0].float().chunk(2, 1)            # (2048, d, h, w) each
    variance = mu.var((0, 2, 3), unbiased=False) + logvar.exp().mean((0, 2, 3))
    return mu.mean((0, 2, 3)), variance.sqrt()

# ---- Stage two --------------------------------------------------------------------------------

def options():
    """The command line -> what parse returns. `main` chooses the options that are still None."""
    parser = common_options(
        __doc__, "runs/ldm", RECIPES, "small on CUDA for a folder, otherwise tiny",
        "that of stage one", "that of stage one")
    add = parser.add_argument
    add("--vmae", type=vmae.checkpoint, default="runs/vmae", help="stage one (default: runs/vmae)")
    add("--no-classes", action="store_true", help="ignore sub-folders, train unconditionally")
    add("--init", type=vmae.checkpoint, help="stage two to start from, ours or a LightningDiT's")
    add("--stats", help="file of latent statistics that comes with the authors' --init")
    add("--objective", choices=("eps", "v", "flow"), help="what the network predicts; eps is the "
        "paper's L_LDM, flow what its experiments used (default: that of --init, otherwise v)")
    add("--schedule", choices=("linear", "cosine"), help="how noise grows with time: linear, Ho "
        "2020; cosine, Nichol 2021 (default: that of --init, otherwise cosine)")
    add("--drop", type=float, default=DROP, help="share of labels replaced by the null class, "
        "which guidance needs (default: %(default)s)")
    args, saved = parse(parser)
    if args.stats and not args.init:
        raise InputError("--stats: belongs to published weights; name these with --init")
    if args.init and args.model and not saved:
        raise InputError("--model: --init decides the shape of the network; leave --model out")
    return args, saved

def read_init(args, ae, classes):
    """--init -> the dict of load_ldm, with the number of classes of this run's data. The shape of
    the network is that of --init. InputError if its latents or its schedule are others."""
    _, _, ckpt = ldm.load_ldm(args.init, args.stats)
    old = ckpt["model_args"]
    sample.check_latents(args.init, ckpt, args.vmae, ae)
    kind = ckpt["schedule"].get("kind", args.schedule)     # the authors' rectified flow has none
    if args.schedule not in (None, kind):
        raise InputError(f"--schedule {args.schedule}: --init has {kind}; leave --schedule out")
    if len(classes) != old["num_classes"] or ("vmae" in ckpt and ckpt["classes"] != classes):
        vmae.say(f"{args.init}: its {old['num_classes']} classes are not the {len(classes)} here; "
                 f"the table of labels starts anew")
        del ckpt["ema"]["y_embedder.embedding_table.weight"]
    return {**ckpt, "model_args": dict(old, num_classes=len(classes))}

def held_out_latents(val, classes, ae, mean, std):
    """64 held-out images, always the same -> z_0 (B, d, h, w), y (B,) or None. ae: stage one."""
    device, generator = mean.device, torch.Generator(mean.device).manual_seed(0)
    x, y = val.batch(val.some(64).tolist())                # uint8 (B, 3, H, W), (B,)
    z = torch.cat([ae.encode(vmae.to_float(part.to(device))).sample(generator)
                   for part in x.split(8)])
    known = classes and val.classes == classes             # the folder --val may have others
    return ldm.normalise(z, mean, std), y.to(device) if known else None

@torch.no_grad()
def measure(model, ae, schedule, ckpt, held_out, path):
    """-> {"L_..._val": the loss of the EMA weights on held-out latents, always with the same times
    and noise}. Saves a preview: the first 32 images that sample.py would draw, 8 per row."""
    generator = torch.Generator(held_out[0].device).manual_seed(0)
    loss = ldm.loss_LDM(model, schedule, *held_out, generator)
    x = sample.draw(torch.arange(32), range(len(ckpt["classes"])), model, ae, schedule, ckpt,
                    ldm.sampler_for(schedule), steps=50, w=sample.guidance(None, ckpt["classes"]))
    vmae.save_grid(vmae.to_float(x).split(8), path)
    return {f"L_{schedule.objective}_val": round(loss.item(), 5)}

def main():
    args, saved = options()
    device = vmae.start(args.device)
    stage_one = saved["vmae"] if saved else vmae.read_stage_one(args.vmae)
    # By default the folders are stage one's, so that what it held out is not trained on here.
    theirs = stage_one["train_args"]
    args.val = args.val or (theirs["val"] if args.data in (None, theirs["data"]) else None)
    args.data = args.data or theirs["data"]
    args.model = args.model or ("small" if device.type == "cuda" and args.data else "tiny")
    use_recipe(args, RECIPES)               # args are complete from here on
    ae = vmae.build_vmae(stage_one).to(device)             # the autoencoder, frozen
    data, val = vmae.open_images(args.data, ae.img_size, args.val, args.out)   # at its size
    classes = [] if args.no_classes else data.classes
    if not classes and args.drop != DROP:
        vmae.say("--drop: has no effect here, as there are no classes")
    if saved and saved["classes"] != classes:              # labels would change their meaning
        raise InputError(f"{args.data}: has the classes {classes}, the run in {args.out} has "
                         f"{saved['classes']}; name them as they were, or give another --out")

    torch.manual_seed(args.seed)            # the same weights on every process
    init = saved or (read_init(args, ae, classes) if args.init else {})
    model_args = init.get("model_args") or ldm.dit_args(args.model, ae.grid, ae.latent_dim,
                                                        len(classes))
    model = ldm.DiT(**model_args).to(device)
    if init:                                # strict=False: the table of labels may be missing
        model.load_state_dict(init["ema"], strict=False)
    schedule_args = {"kind": "cosine", "objective": "v", **init.get("schedule", {})}
    args.schedule = schedule_args["kind"] = args.schedule or schedule_args["kind"]
    args.objective = schedule_args["objective"] = args.objective or schedule_args["objective"]
    schedule, ema = ldm.Schedule(**schedule_args), ldm.EMA(model)
    parts = {"model": model, "ema": ema.model, "opt": optimiser(model)}
    start = resume(args, saved, parts)
    ema.n = start                           # its warm-up goes on, too
    low_precision = matmul_precision(args, device)
    with low_precision():
        mine = micro_batches(args, device, model, lambda n: ldm.loss_LDM(
            model, schedule, torch.zeros(n, ae.latent_dim, ae.grid, ae.grid, device=device)))
    begin(args, model, f"{len(data)} images, {len(classes) or 'no'} classes")
    if args.data:
        data.folder.keep(args.out)
    rows = cache_moments(ae, data, args.out, device, low_precision)
    mean, std = (init["latent_mean"], init["latent_std"]) if init else statistics(rows)
    mean, std = mean.to(device), std.to(device)            # (d,) each; those of --init are kept
    saved = init = None                     # their memory is free again
    net = torch.compile(model) if args.compile else model  # shares the weights of model
    batches = ahead(rows, args, start, mine, device)
    if RANK == 0:                           # which alone measures them
        held_out = held_out_latents(val, classes, ae, mean, std)           # z_0, y
    entries = dict(model_args=model_args, schedule=schedule_args, classes=classes,
                   latent_mean=mean.cpu(), latent_std=std.cpu(), vmae=stage_one)

    with Log(args, start, device) as log:
        for step in range(start, args.steps):
            lr = learning_rate(step, args.steps, args.lr)  # up, then down a cosine
            for number in mine:             # the micro-batches, whose gradients are summed
                generator = vmae.seeded(args.seed, step, number, device=device)
                moments, y = next(batches)  # (B, 2d, h, w), (B,)
                z = vmae.Gaussian(*moments.float().chunk(2, 1)).sample(generator)  # anew each time
                z_0 = ldm.normalise(z, mean, std)                          # (B, d, h, w)
                y = model.y_embedder.drop(y, args.drop, generator) if classes else None    # (B,)
                with low_precision():
                    loss = ldm.loss_LDM(net, schedule, z_0, y, generator)  # a scalar, float32
                share = len(z) / args.batch
                (share * loss).backward()
                log.add({f"L_{schedule.objective}": loss}, share)          # L_eps, L_v or L_flow
            fine = update(parts["opt"], model, lr)         # clip, step, zero
            ema.update(model)               # what is sampled, and what sample.py will load

            log.step(step + 1, fine, lr, lambda path: measure(
                ema.model, ae, schedule, entries, held_out, path), parts, **entries)

if __name__ == "__main__":
    vmae.cli(main)

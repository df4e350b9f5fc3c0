"""Train stage two: diffusion on the latents of a trained stage one (Section 3.2).

    python train_ldm.py                                 after train_vmae.py, on the same data
    python train_ldm.py --vmae runs/mae/last.pt         on the latents of another autoencoder
    python train_ldm.py --no-classes                    unconditional, even if there are classes

Each image and its mirror image are encoded once, into moments_*.npy in --out; training reads only
these. Also writes last.pt, log.jsonl and preview_*.png, samples of the EMA weights.
"""
import argparse, hashlib, os

import vmae                                 # before torch, see there
import numpy as np
import torch

import ldm
import sample
from train_vmae import (Log, ahead, autocast, begin, common_options, learning_rate, micro_batches,
                        optimiser, parse, resume, update, use_recipe)
from vmae import RANK, InputError

# Defaults of --batch, --steps and --lr. The learning rate of small and base is the authors'.
RECIPES = {"tiny": dict(batch=32, steps=3000, lr=1.5e-3),
           "small": dict(batch=256, steps=100_000, lr=2e-4),
           "base": dict(batch=256, steps=100_000, lr=2e-4)}

# ---- The cache of moments ---------------------------------------------------------------------

@torch.no_grad()
def cache_moments(model, data, run, device):
    """q(z|x) of each image, row 2i, and of its mirror image, row 2i + 1: mu and logvar, (2d, h, w)
    in float16, as vmae.Rows. Computed once. The key holds a hash of the stage-one weights and of
    the data, so that rows of anything else are never read."""
    weights = b"".join(v.cpu().numpy().tobytes() for v in model.state_dict().values())
    key = hashlib.sha256(weights + data.fingerprint().encode()).hexdigest()

    def encode(first, last):
        for x, y in data.in_order(first // 2, last // 2):
            x = vmae.to_float(x.to(device))                                # (B, 3, H, W)
            q = model.encode(torch.stack([x, x.flip(-1)], 1).flatten(0, 1))    # over (2B, d, h, w)
            yield torch.cat([q.mu, q.logvar], 1).half().cpu(), y.repeat_interleave(2)

    row_bytes = 2 * 2 * model.latent_dim * model.grid**2
    rows = vmae.Rows(run, "moments", key, 2 * len(data), row_bytes)
    return rows.build("encoding, with their mirror images,", encode)

def statistics(rows):
    """Mean and standard deviation of z per channel, (d,) each, for normalise, from 2,048 rows at
    equal distances. z's variance adds that of mu and the mean of sigma^2: E z^2 = E[mu^2 +
    sigma^2]."""
    at = np.linspace(0, len(rows) - 1, min(2048, len(rows))).round().astype(int)
    mu, logvar = rows[at.tolist()][0].float().chunk(2, 1)                  # (2048, d, h, w) each
    mean, square = mu.mean((0, 2, 3)), (mu**2 + logvar.exp()).mean((0, 2, 3))
    return mean, (square - mean**2).sqrt()

# ---- Stage two --------------------------------------------------------------------------------

def options():
    """The command line -> as parse; fill_in chooses the options that are still None."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s [options]")
    common_options(parser, "runs/ldm", RECIPES, "small on CUDA for a folder, otherwise tiny",
                   "default: that of stage one, as ")
    add = parser.add_argument
    add("--vmae", default="runs/vmae/last.pt", help="stage-one checkpoint (default: %(default)s)")
    add("--no-classes", action="store_true", help="ignore sub-folders, train unconditionally")
    add("--init", help="stage-two checkpoint to start from, ours or the authors' LightningDiT")
    add("--stats", help="file of latent statistics that comes with the authors' --init")
    add("--objective", choices=("eps", "v", "flow"), help="what the network predicts; eps is the "
        "paper's L_LDM, flow what its experiments used (default: that of --init, otherwise v)")
    add("--schedule", choices=("linear", "cosine"), help="of the noise: linear, Ho 2020; cosine, "
        "Nichol 2021 (default: that of --init, otherwise cosine)")
    add("--drop", type=float, default=0.1, help="share of labels replaced by the null class, which "
        "guidance needs (default: %(default)s)")
    args, saved = parse(parser)
    if args.stats and not args.init:
        raise InputError("--stats: are those of published weights; name these with --init")
    return args, saved

def fill_in(args, stage_one, cuda):
    """Choose the options that were not given. Data, held-out folder and size are those of stage
    one, so that what stage one held out is not trained on here."""
    for name in ("data", "val", "size"):
        if getattr(args, name) is None:
            setattr(args, name, stage_one["train_args"][name])
    if args.size != stage_one["model_args"]["img_size"]:
        size = stage_one["model_args"]["img_size"]
        raise InputError(f"--size {args.size}: {args.vmae} needs {size}; leave --size out")
    args.model = args.model or ("small" if cuda and args.data else "tiny")
    use_recipe(args, RECIPES)

def read_init(args, model_args, classes):
    """--init -> the dict of load_ldm, with the number of classes of this run's data. The shape of
    the network is that of --init. InputError if its latents or its schedule are others."""
    _, _, ckpt = ldm.load_ldm(args.init, args.stats)
    old = ckpt["model_args"]
    for name in ("input_size", "in_channels"):
        if old[name] != model_args[name]:
            raise InputError(f"{args.init}: {name} is {old[name]}, in the latents of --vmae it is "
                             f"{model_args[name]}; name the stage one of --init with --vmae")
    kind = ckpt["schedule"].get("kind", args.schedule)     # the authors' rectified flow has none
    if args.schedule not in (None, kind):
        raise InputError(f"--schedule {args.schedule}: --init has {kind}; leave --schedule out")
    if len(classes) != old["num_classes"] or "vmae" in ckpt and ckpt["classes"] != classes:
        print(f"{args.init}: its {old['num_classes']} classes are not the {len(classes)} here; the "
              f"table of labels starts anew")
        del ckpt["ema"]["y_embedder.embedding_table.weight"]
    return {**ckpt, "model_args": dict(old, num_classes=len(classes))}

def held_out_latents(val, classes, ae, mean, std):
    """64 held-out images, always the same -> z_0 (B, d, h, w), y (B,) or None. ae: stage one."""
    shown = torch.randperm(len(val), generator=torch.Generator().manual_seed(0))[:64].tolist()
    x, y = zip(*[val[i] for i in shown])
    device, generator = mean.device, torch.Generator(mean.device).manual_seed(0)
    x = torch.stack(x).split(8)                            # (8, 3, H, W) each
    z = torch.cat([ae.encode(part.to(device)).sample(generator) for part in x])
    if val.classes == classes:              # the folder --val may have other classes
        return ldm.normalise(z, mean, std), torch.tensor(y, device=device)
    return ldm.normalise(z, mean, std), None

def preview(model, ae, schedule, mean, std, classes, path):
    """Save the first 32 images that sample.py would draw, 8 per row."""
    index, K = torch.arange(32), len(classes)
    x = sample.draw(index, index % K if K else None, model, ae, schedule,
                    dict(latent_mean=mean, latent_std=std), ldm.sampler_for(schedule), steps=50,
                    w=1.5 if K else 1.0)                   # uint8 (32, 3, H, W)
    vmae.save_grid((x / 127.5 - 1).split(8), path)

def main():
    args, saved = options()
    device = vmae.start(args.device)
    stage_one = (saved or {}).get("vmae") or vmae.read_stage_one(args.vmae)    # last.pt contains it
    fill_in(args, stage_one, device.type == "cuda")        # args are complete from here on
    data, val = vmae.open_images(args.data, args.size, args.val, args.out)  # as stage one had them
    classes = [] if args.no_classes else data.classes
    ae = vmae.build_vmae(stage_one).to(device)             # the autoencoder, frozen

    torch.manual_seed(args.seed)            # the same weights on every process
    model_args = ldm.dit_args(args.model, ae.grid, ae.latent_dim, len(classes))
    init = saved or (read_init(args, model_args, classes) if args.init else {})
    if args.init:                           # the shape of the network is that of --init
        model_args = dict(init["model_args"], num_classes=len(classes))
    if saved and saved["classes"] != classes:              # labels would change their meaning
        raise InputError(f"{args.data}: has the classes {classes}, the run in {args.out} has "
                         f"{saved['classes']}; name them as they were, or give another --out")
    model = ldm.DiT(**model_args).to(device)
    if init:                                # strict=False: the table of labels may be missing
        model.load_state_dict(init["ema"], strict=False)
    old = {"kind": args.schedule or "cosine", "objective": "v", **init.get("schedule", {})}
    schedule_args = {**old, "objective": args.objective or old["objective"]}
    schedule, ema = ldm.Schedule(**schedule_args), ldm.EMA(model)
    args.objective, args.schedule = schedule.objective, schedule_args["kind"]
    parts = {"model": model, "ema": ema.model, "opt": optimiser(model)}
    start = ema.n = resume(args, saved, model_args, parts)                 # EMA's warm-up too
    low_precision = autocast(args, device)

    def trial(n):                           # for micro_batches
        z_0 = torch.zeros(n, ae.latent_dim, ae.grid, ae.grid, device=device)
        with low_precision():
            return ldm.loss_LDM(model, schedule, z_0)

    mine = micro_batches(args, device, model, trial)
    begin(args, model, f"{len(data)} images, {len(classes) or 'no'} classes")
    if args.data:
        data.folder.keep(args.out)
    rows = cache_moments(ae, data, args.out, device)
    known = [init.get(f"latent_{name}") for name in ("mean", "std")]       # that the weights expect
    mean, std = (v.to(device) for v in (statistics(rows) if None in known else known))  # (d,) each
    saved = init = None                     # their memory is free again
    net = torch.compile(model) if args.compile else model  # shares the weights of model
    batches = ahead(rows, args, start, mine, device)
    z_val, y_val = held_out_latents(val, classes, ae, mean, std)
    name = f"L_{schedule.objective}"        # the loss's name in the log: L_eps, L_v or L_flow

    with Log(args, start, device) as log:
        for step in range(start, args.steps):
            lr = learning_rate(step, args.steps, args.lr)  # up, then down a cosine
            for number in mine:             # the micro-batches, whose gradients are summed
                generator = vmae.seeded(args.seed, step, number, device=device)
                moments, y = (v.to(device, non_blocking=True) for v in next(batches))
                z = vmae.Gaussian(*moments.float().chunk(2, 1)).sample(generator)  # anew each time
                z_0 = ldm.normalise(z, mean, std)                          # (B, d, h, w)
                y = model.y_embedder.drop(y, args.drop, generator) if classes else None    # (B,)
                with low_precision():
                    loss = ldm.loss_LDM(net, schedule, z_0, y, generator)  # a scalar, float32
                share = len(z) / args.batch
                (share * loss).backward()
                log.add({name: loss}, share)
            fine = update(parts["opt"], model, lr)         # clip, step, zero
            ema.update(model)               # what is sampled, and what sample.py will load

            if log.step(step + 1, fine, lr):               # time to save
                held_out = {}
                if RANK == 0:
                    with torch.no_grad():   # the same images, times and noise at each save
                        generator = torch.Generator(device).manual_seed(0)
                        loss_val = ldm.loss_LDM(ema.model, schedule, z_val, y_val, generator)
                    held_out = {f"{name}_val": round(loss_val.item(), 5)}
                    picture = os.path.join(args.out, f"preview_{step + 1:06d}.png")
                    preview(ema.model, ae, schedule, mean, std, classes, picture)
                log.write(held_out)
                if RANK == 0:
                    vmae.save_checkpoint(
                        os.path.join(args.out, "last.pt"), model_args=model_args, step=step + 1,
                        train_args=vars(args), schedule=schedule_args, latent_mean=mean.cpu(),
                        latent_std=std.cpu(), classes=classes,
                        vmae={k: stage_one[k] for k in ("model_args", "model", "train_args")},
                        **{key: part.state_dict() for key, part in parts.items()})
                log.saved()

if __name__ == "__main__":
    vmae.cli(main)

"""Train stage two: diffusion on the latents of a trained stage one (Section 3.2).

    python train_ldm.py                                 after train_vmae.py, on the same data
    python train_ldm.py --vmae runs/mae/last.pt         on the latents of another autoencoder
    python train_ldm.py --no-classes                    unconditional, even if there are classes

Each image and its mirror image are encoded once, into moments_*.npy in --out; training reads only
these latents. Also writes last.pt, log.jsonl and preview_*.png, samples of the EMA weights.
"""
import argparse
import hashlib
import os

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import ldm
import sample
import vmae
from train_vmae import (Log, autocast, begin, common_options, endless_loader, learning_rate,
                        optimiser, parse, resume, rng_state, start_processes, update, use_recipe)
from vmae import InputError

# Defaults of --batch, --steps and --lr. The learning rate of small and base is the authors'.
RECIPES = {"tiny": dict(batch=32, steps=3000, lr=1.5e-3),
           "small": dict(batch=256, steps=100_000, lr=2e-4),
           "base": dict(batch=256, steps=100_000, lr=2e-4)}


# ---- The cache of moments ---------------------------------------------------------------------

class Moments(torch.utils.data.Dataset):
    """Draws of (z, y) with z ~ q(z|x), a new sample each time; x is mirrored half of the time.

    mu and logvar of each image and its mirror image lie in a memory-mapped float16 file of shape
    (n, 2, 2d, h, w). Its name holds a hash of the stage-one weights and of the data, so that a
    cache of anything else is never read; old caches are deleted."""

    def __init__(self, model, data, folder, device, batch=64, workers=0, build=True):
        weights = b"".join(v.cpu().numpy().tobytes() for v in model.state_dict().values())
        key = hashlib.sha256(weights + data.fingerprint().encode()).hexdigest()[:16]
        self.path = os.path.join(folder, f"moments_{key}.npy")
        if build and not os.path.exists(self.path):
            for old in os.listdir(folder):
                if old.startswith("moments_") and old.endswith((".npy", ".tmp")):
                    os.remove(os.path.join(folder, old))   # stale, or left by a crash
            self._encode(model, data, device, batch, workers)
        self.moments = None

    def _encode(self, model, data, device, batch, workers):
        shape = (len(data), 2, 2 * model.latent_dim, model.grid, model.grid)
        temporary, labels, at = self.path + ".tmp", [], 0
        file = np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
        loader = torch.utils.data.DataLoader(data, batch, num_workers=workers)
        for x, y in tqdm(loader, desc="encoding", dynamic_ncols=True, mininterval=1):
            x = x.to(device)                                               # (B, 3, H, W)
            for mirror, view in enumerate((x, x.flip(-1))):
                with torch.no_grad():
                    q = model.encode(view)                                 # over (B, d, h, w)
                file[at:at + len(x), mirror] = torch.cat([q.mu, q.logvar], 1).half().cpu().numpy()
            labels.append(y)                                               # (B,)
            at += len(x)
        file.flush()
        np.save(self.path[:-4] + "_labels.npy", torch.cat(labels).numpy())
        os.replace(temporary, self.path)    # at the end, so that a cache that exists is complete

    def open(self):
        """Map the files, once the cache is there -> self."""
        self.moments = np.load(self.path, mmap_mode="r")
        self.labels = torch.from_numpy(np.load(self.path[:-4] + "_labels.npy"))
        return self

    def __len__(self):
        return len(self.moments)

    def __getitems__(self, indices):
        """A whole batch, which needs no collating: z (B, d, h, w), not normalised, and y (B,)."""
        order = np.sort(indices)            # reading a file from front to back is faster
        mirror = torch.randint(2, (len(order),)).numpy()   # 0: the image itself
        moments = torch.from_numpy(self.moments[order, mirror].astype(np.float32))  # (B, 2d, h, w)
        z = vmae.Gaussian(*moments.chunk(2, 1)).sample()                   # (B, d, h, w)
        return z, self.labels[order]

    def statistics(self):
        """Mean and standard deviation of z per channel, (d,) each, over all draws, in float64. By
        the law of total variance, E z^2 = E[mu^2 + sigma^2]."""
        sums = 0
        for start in range(0, len(self), 1024):            # in parts, to bound the memory
            part = self.moments[start:start + 1024].astype(np.float64)
            mu, logvar = np.split(part, 2, axis=2)                         # (n, 2, d, h, w) each
            square = mu**2 + np.exp(logvar)
            sums = sums + np.stack([v.mean((1, 3, 4)).sum(0) for v in (mu, square)])   # (2, d)
        mean, square = sums / len(self)                                    # (d,) each
        std = np.sqrt(square - mean**2)
        return torch.from_numpy(mean).float(), torch.from_numpy(std).float()


# ---- Stage two --------------------------------------------------------------------------------

def options():
    """The command line -> checked options; fill_in chooses those that are still None."""
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
    return parse(parser)

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
    use_recipe(args, RECIPES, cuda)

def read_init(args, model_args):
    """--init -> the dict of load_ldm, with the number of classes of this run's data. The shape of
    the network is that of --init. InputError if its latents or its schedule are others."""
    _, _, ckpt = ldm.load_ldm(args.init, args.stats)
    old = ckpt["model_args"]
    for name in ("input_size", "in_channels"):
        if old[name] != model_args[name]:
            raise InputError(f"{args.init}: {name} is {old[name]}, in the latents of --vmae it is "
                             f"{model_args[name]}; name the stage one of --init with --vmae")
    kind = ckpt["schedule"].get("kind", args.schedule)     # the authors' rectified flow has none
    if args.schedule not in (None, kind) and not args.resume:
        raise InputError(f"--schedule {args.schedule}: --init has {kind}; leave --schedule out")
    if old["num_classes"] != model_args["num_classes"]:
        print(f"{args.init}: {old['num_classes']} classes, here {model_args['num_classes']}; the "
              f"table of labels starts anew")
        del ckpt["ema"]["y_embedder.embedding_table.weight"]
    return {**ckpt, "model_args": dict(old, num_classes=model_args["num_classes"])}

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
    args = options()
    last = os.path.join(args.out, "last.pt")
    stage_one = vmae.read_stage_one(last if args.resume else args.vmae)    # last.pt contains it
    device = vmae.pick_device(args.device)
    fill_in(args, stage_one, device.type == "cuda")        # args are complete from here on
    rank, world, device = start_processes(device, args.batch)      # without torchrun rank 0 of 1
    data = vmae.open_images(args.data, args.size, "train", args.val)       # as stage one had them
    val = vmae.open_images(args.data, args.size, "val", args.val)          # for the held-out loss
    classes = [] if args.no_classes else data.classes
    ae = vmae.build_vmae(stage_one).to(device)             # the autoencoder, frozen

    torch.manual_seed(args.seed)            # the same weights on every process
    model_args = ldm.dit_args(args.model, ae.grid, ae.latent_dim, len(classes))
    init = read_init(args, model_args) if args.init else {}
    model_args = init.get("model_args", model_args)
    model = ldm.DiT(**model_args).to(device)
    if init:                                # strict=False: the table of labels may be missing
        model.load_state_dict(init["ema"], strict=False)
    old = {"kind": args.schedule or "cosine", "objective": "v", **init.get("schedule", {})}
    schedule_args = {**old, "objective": args.objective or old["objective"]}
    schedule, ema = ldm.Schedule(**schedule_args), ldm.EMA(model)
    parts = {"model": model, "ema": ema.model, "opt": optimiser(model)}
    start = 0
    if args.resume:
        init = resume(last, model_args, parts, device, args.steps)
        if init["schedule"] != schedule_args:
            raise InputError(f"{last}: --resume keeps to {init['schedule']}; leave the options out")
        start = ema.n = init["step"]        # the decay's warm-up goes on as well
    begin(args, model, f"{len(data)} images, {len(classes) or 'no'} classes", start, rank)
    cache = Moments(ae, data, args.out, device, workers=args.workers, build=rank == 0)
    if world > 1:
        dist.barrier()                      # process 0 encodes; the others wait and then read
    cache.open()
    if init:                                # those that the weights of --init or last.pt know
        mean, std = init["latent_mean"].to(device), init["latent_std"].to(device)  # (d,) each
    else:
        mean, std = (v.to(device) for v in cache.statistics())

    net = torch.compile(model) if args.compile else model  # shares the weights of model
    net = DistributedDataParallel(net) if world > 1 else net               # averages gradients
    loader = endless_loader(cache, args, start, rank, world, collate_fn=lambda batch: batch)
    z_val, y_val = held_out_latents(val, classes, ae, mean, std)
    low_precision, log = autocast(device), Log(args.out, start, args, rank)
    name = f"L_{schedule.objective}"        # the loss's name in the log: L_eps, L_v or L_flow

    for step in range(start, args.steps):
        lr = learning_rate(step, args.steps, args.lr)      # up, then down a cosine
        z, y = (v.to(device, non_blocking=True) for v in next(loader))     # a new draw of q(z|x)
        z_0 = ldm.normalise(z, mean, std)                                  # (B, d, h, w)
        y = model.y_embedder.drop(y, args.drop) if classes else None       # (B,)
        with low_precision():
            loss = ldm.loss_LDM(net, schedule, z_0, y)     # a scalar, float32
        terms = {name: loss}
        update(parts["opt"], model, loss, terms, step, lr)                 # back, clip, step
        ema.update(model)                   # what is sampled, and what sample.py will load

        held_out, done = {}, step + 1
        if rank == 0 and (done % args.save_every == 0 or done == args.steps):
            log.pause()
            vmae.save_checkpoint(
                last, model_args=model_args, step=done, rng=rng_state(device),
                train_args=vars(args), schedule=schedule_args, latent_mean=mean.cpu(),
                latent_std=std.cpu(), classes=classes,
                vmae={k: stage_one[k] for k in ("model_args", "model", "train_args")},
                **{name: part.state_dict() for name, part in parts.items()})
            with torch.no_grad():           # the same images, times and noise at each save
                generator = torch.Generator(device).manual_seed(0)
                loss_val = ldm.loss_LDM(ema.model, schedule, z_val, y_val, generator)
            held_out = {f"{name}_val": round(loss_val.item(), 5)}
            picture = os.path.join(args.out, f"preview_{done:06d}.png")
            preview(ema.model, ae, schedule, mean, std, classes, picture)
        log.step(done, terms, lr, held_out)
    if world > 1:
        dist.destroy_process_group()

if __name__ == "__main__":
    vmae.cli(main)

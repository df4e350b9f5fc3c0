"""Train stage two, diffusion on the latents of a trained stage one (Section 3.2).

    python train_ldm.py                                 after train_vmae.py: data, size and classes
    python train_ldm.py --vmae runs/vmae/last.pt        come from its checkpoint
    python train_ldm.py --no-classes                    unconditional, whatever the folders say

The data is encoded once, each image and its mirror, into moments_*.npy in --out; training then
reads latents only. Writes last.pt, log.jsonl and preview_*.png, samples of the EMA weights.
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
import vmae
from train_vmae import (Log, autocast, begin, check, common_options, endless_loader, learning_rate,
                        optimiser, parse, resume, rng_state, start_processes, update)
from vmae import InputError

# What a run of each size wants by default. tiny: measured on 2 CPU cores. small, base: DiT's and
# the authors' rate (2e-4 at batch 1024) at a batch that one GPU holds.
RECIPES = {"tiny": dict(batch=32, steps=3000, lr=1.5e-3),
           "small": dict(batch=256, steps=100_000, lr=2e-4),
           "base": dict(batch=256, steps=100_000, lr=2e-4)}


# ---- The cache of moments ---------------------------------------------------------------------

class Moments(torch.utils.data.Dataset):
    """Draws of (z, y) with z ~ q(z|x), a new sample each time, x mirrored half of the time.

    Backed by a memory-mapped float16 file of shape (n, 2, 2d, h, w): image and mirror, mu and
    logvar. The file's name holds a hash of the stage-one weights and of the data, so that a cache
    of anything else is never read; older ones in the folder are deleted.
    """

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
        file = np.lib.format.open_memmap(temporary, "w+", np.float16, shape)   # pages, not memory
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
        os.replace(temporary, self.path)    # last, so that a cache that exists is complete

    def open(self):
        """Map the files; called when the cache is known to be there."""
        self.moments = np.load(self.path, mmap_mode="r")
        self.labels = torch.from_numpy(np.load(self.path[:-4] + "_labels.npy"))
        return self

    def __len__(self):
        return len(self.moments)

    def __getitems__(self, indices):
        """A batch at once: z (B, d, h, w), y (B,), not yet normalised."""
        order = np.sort(indices)            # a disk reads forward; the batch is a set
        mirror = torch.randint(2, (len(order),)).numpy()
        moments = torch.from_numpy(self.moments[order, mirror].astype(np.float32))  # (B, 2d, h, w)
        z = vmae.Gaussian(*moments.chunk(2, 1)).sample()                   # (B, d, h, w)
        return z, self.labels[order]

    def statistics(self):
        """Mean and standard deviation of z per channel, (d,) each, over all draws, in float64:
        var z = var mu + mean sigma^2, the law of total variance."""
        total = 0
        for start in range(0, len(self), 1024):
            part = self.moments[start:start + 1024].astype(np.float64)     # bounded memory
            mu, logvar = np.split(part, 2, axis=2)                         # (n, 2, d, h, w) each
            total = total + np.stack([v.mean((1, 3, 4)).sum(0)             # E z, E z^2
                                      for v in (mu, mu**2 + np.exp(logvar))])
        mean, square = total / len(self)                                   # (d,) each
        return (torch.from_numpy(mean).float(), torch.from_numpy(np.sqrt(square - mean**2)).float())


# ---- Stage two --------------------------------------------------------------------------------

def options():
    """The command line -> checked options, None where main has to choose."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s [options]")
    common_options(parser, "runs/ldm", RECIPES, "small on CUDA for a folder, otherwise tiny")
    add = parser.add_argument
    add("--vmae", default="runs/vmae/last.pt", help="stage-one checkpoint (default: %(default)s)")
    add("--no-classes", action="store_true", help="ignore sub-folders, train unconditionally")
    add("--init", help="stage-two checkpoint to start from, ours or the authors' LightningDiT")
    add("--stats", help="file of latent statistics that comes with the authors' --init")
    add("--objective", choices=("eps", "v", "flow"), help="what the network predicts: eps is the "
        "paper's L_LDM, flow what its experiments used (default: that of --init, else v, which "
        "trains better at this scale than eps)")
    add("--schedule", choices=("linear", "cosine"), default="cosine", help="of the noise: linear, "
        "Ho 2020; cosine, Nichol 2021 (default: %(default)s)")
    add("--drop", type=float, default=0.1, help="share of labels replaced by the null class, which "
        "guidance needs (default: %(default)s)")
    return check(parse(parser))


def fill_in(args, stage_one, device):
    """Choose what was not typed; data, held-out folder and size as stage one had them."""
    for name in ("data", "val", "size"):    # so that nothing held out in one stage leaks into the
        if getattr(args, name) is None:     # training of the other
            setattr(args, name, stage_one["train_args"][name])
    if args.size != stage_one["model_args"]["img_size"]:
        raise InputError(f"--size {args.size}: {args.vmae} was trained at "
                         f"{stage_one['model_args']['img_size']} pixels")
    args.model = args.model or ("small" if device.type == "cuda" and args.data else "tiny")
    for name, value in RECIPES[args.model].items():
        setattr(args, name, getattr(args, name) or value)
    if args.workers is None:
        args.workers = 8 if device.type == "cuda" and args.data else 0


def read_init(args, model_args):
    """--init -> its dict, as load_ldm gives it, with the number of classes of this run's data."""
    _, _, ckpt = ldm.load_ldm(args.init, args.stats)
    old = ckpt["model_args"]            # the network's shape, whatever --model says
    for name in ("input_size", "in_channels"):
        if old[name] != model_args[name]:
            raise InputError(f"{args.init}: made for latents with {name} {old[name]}, those of "
                             f"{args.vmae} have {model_args[name]}")
    if old["num_classes"] != model_args["num_classes"]:
        print(f"{args.init}: {old['num_classes']} classes, here {model_args['num_classes']}: the "
              f"table of labels starts afresh")
        del ckpt["ema"]["y_embedder.embedding_table.weight"]  # its rows mean other classes
    return {**ckpt, "model_args": dict(old, num_classes=model_args["num_classes"])}


def preview(model, first, schedule, mean, std, classes, path):
    """32 samples, 8 a row, the classes in turn: 50 steps, guidance 1.5 if there are any."""
    generator = torch.Generator().manual_seed(0)
    side, device = first.grid, mean.device
    z_T = torch.randn(32, first.latent_dim, side, side, generator=generator).to(device)
    y = torch.arange(32, device=device) % len(classes) if classes else None
    z = ldm.sampler_for(schedule)(model, schedule, z_T, y, w=1.5 if classes else 1.0)  # z_0
    x = first.decode(ldm.denormalise(z, mean, std))                        # (32, 3, H, W)
    vmae.save_grid(x.split(8), path)


def main():
    args = options()
    last = os.path.join(args.out, "last.pt")
    stage_one = vmae.read_stage_one(last if args.resume else args.vmae)    # last.pt holds its own
    device = vmae.pick_device(args.device)
    fill_in(args, stage_one, device)
    rank, world, device = start_processes(device, args.batch)
    data = vmae.open_images(args.data, args.size, "train", args.val)
    classes = [] if args.no_classes else data.classes
    first = vmae.build_vmae(stage_one).to(device)          # frozen: stage two never changes it

    torch.manual_seed(args.seed)            # the same weights on every process
    model_args = dict(ldm.sizes[args.model], input_size=first.grid, in_channels=first.latent_dim,
                      num_classes=len(classes))            # the null class is number num_classes
    if first.grid <= 16:                    # 256 tokens at most: merging latents saves nothing
        model_args["patch_size"] = 1
    init = read_init(args, model_args) if args.init else {}
    model_args = init.get("model_args", model_args)
    try:
        model = ldm.DiT(**model_args).to(device)
    except ValueError as error:
        raise InputError(f"--model {args.model}: {error}") from None
    if init:                                # all but, perhaps, the table of labels
        model.load_state_dict(init["ema"], strict=False)
    schedule_args = {"kind": args.schedule, "objective": "v", **init.get("schedule", {})}
    schedule_args["objective"] = args.objective or schedule_args["objective"]
    schedule, opt, ema = ldm.Schedule(**schedule_args), optimiser(model), ldm.EMA(model)
    start = 0
    if args.resume:
        init = resume(last, model_args, model, opt, device, args.steps)
        if init["schedule"] != schedule_args:              # the network knows no other
            raise InputError(f"{last}: trained with {init['schedule']}; --resume keeps to that")
        ema.model.load_state_dict(init["ema"])
        start = ema.n = init["step"]        # the decay's warm-up goes on where it was
    begin(args, model, f"{len(data)} images, {len(classes) or 'no'} classes", start, rank)
    cache = Moments(first, data, args.out, device, workers=args.workers, build=rank == 0)
    if world > 1:
        dist.barrier()                      # process 0 encodes, the others wait and then read
    mean, std = cache.open().statistics()   # (d,) each; or the scale that the weights know
    mean, std = (init.get(f"latent_{k}", s).to(device) for k, s in (("mean", mean), ("std", std)))

    net = torch.compile(model) if args.compile else model  # shares the weights of model
    net = DistributedDataParallel(net) if world > 1 else net               # averages gradients
    loader = endless_loader(cache, args, start, rank, world, collate_fn=lambda batch: batch)
    low_precision, log = autocast(device), Log(args.out, start, args, rank)

    for step in range(start, args.steps):
        lr = learning_rate(step, args.steps, args.lr)
        z, y = (v.to(device, non_blocking=True) for v in next(loader))     # a new draw of q(z|x)
        z_0 = ldm.normalise(z, mean, std)                                  # (B, d, h, w)
        y = ldm.drop_labels(y, len(classes), args.drop) if classes else None   # (B,)
        with low_precision():
            loss = ldm.loss_LDM(net, schedule, z_0, y)     # a scalar, float32
        update(opt, model, loss, {"L_LDM": loss}, step, lr)
        ema.update(model)                   # what is sampled, and what sample.py will load
        log.step(step + 1, {"L_LDM": loss}, lr)
        if rank == 0 and ((step + 1) % args.save_every == 0 or step + 1 == args.steps):
            vmae.save_checkpoint(
                last, model_args=model_args, model=model.state_dict(), ema=ema.model.state_dict(),
                opt=opt.state_dict(), step=step + 1, rng=rng_state(device), train_args=vars(args),
                schedule=schedule_args, latent_mean=mean.cpu(), latent_std=std.cpu(),
                classes=classes,
                vmae={k: stage_one[k] for k in ("model_args", "model", "train_args")})
            preview(ema.model, first, schedule, mean, std, classes,
                    os.path.join(args.out, f"preview_{step + 1:06d}.png"))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    vmae.cli(main)

"""Draw images from a stage-two checkpoint, which holds everything that sampling needs.

    python sample.py                                    64 images into samples/, and grid.png
    python sample.py --class cat --cfg 3 --n 16         one class, by name or number
    python sample.py --sampler ddpm --steps 1000        Ho 2020; the default is DDIM, 50 steps
    python sample.py --ckpt lightningdit.pt --vmae vmae.pth --stats latents_stats.pt --steps 250
    python sample.py --n 10000 --npz --trajectory       also samples.npz, trajectory.png
"""
import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import ldm
import vmae
from vmae import InputError

SAMPLERS = {                                # and the options that belong to each
    "ddpm": (ldm.ddpm_sample, ("clip",)), "ddim": (ldm.ddim_sample, ("clip", "eta")),
    "euler": (ldm.euler_sample, ("shift", "interval"))}


def options():
    """The command line -> checked options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s [options]")
    add = parser.add_argument
    add("--ckpt", default="runs/ldm/last.pt", help="stage-two checkpoint (default: %(default)s)")
    add("--n", type=int, default=64, help="images (default: %(default)s)")
    add("--vmae", help="stage-one checkpoint (default: the one inside --ckpt)")
    add("--stats", help="latent statistics beside the authors' weights (default: those in --ckpt)")
    add("--steps", type=int, default=50, help="network evaluations an image (default: %(default)s)")
    add("--sampler", choices=SAMPLERS, help="(default: euler for rectified flow, else ddim)")
    add("--eta", type=float, help="noise of ddim: 0 none, 1 as ddpm (default: 0)")
    add("--clip", type=float, help="ddpm, ddim: bound z_0 to this many deviations (default: none)")
    add("--shift", type=float, help="of euler's times; below 1: more of them on noise (default: 1)")
    add("--cfg", type=float, help="guidance weight w, 1: none (default: 1.5 with classes, else 1)")
    add("--interval", type=float, help="euler guides from this time on, 0 to 1 (default: 0)")
    add("--class", dest="label", help="name or number; K: none of K classes (default: all in turn)")
    add("--seed", type=int, default=0, help="its image i is the same in any batch (default: 0)")
    add("--batch", type=int, default=64, help="images at a time (default: %(default)s)")
    add("--device", default="auto", help="cuda, cpu, mps... (default: cuda if there is one)")
    add("--out", default="samples", help="folder (default: %(default)s)")
    add("--npz", action="store_true", help="also samples.npz: arr_0, uint8 (N, H, W, 3), as ADM's")
    add("--trajectory", action="store_true", help="also trajectory.png: x_0 as seen along the way")
    args = parser.parse_args()
    for name in ("n", "steps", "batch", "clip", "shift", "eta", "interval", "seed"):
        value, high = getattr(args, name), dict(eta=1, interval=1, seed=2**32).get(name)
        if value is not None and not (0 <= value <= high if high else value > 0):
            words = f"from 0 to {high}" if high else "above 0"
            raise InputError(f"--{name} must be {words}, not {value}")
    return args


def pick_labels(label, classes):
    """--class as typed -> the labels to draw in turn; len(classes) is that of the null class."""
    if label is None:
        return list(range(len(classes)))
    if not classes:
        raise InputError(f"--class {label}: this checkpoint is unconditional, it has no classes")
    if label in classes:
        return [classes.index(label)]
    if label.isdecimal() and int(label) <= len(classes):   # a name that is a number comes first
        return [int(label)]
    raise InputError(f"--class {label}: unknown; choose from {', '.join(classes)}, a number below "
                     f"{len(classes)}, or {len(classes)}, which is none of them")


def pick_sampler(args, schedule):
    """--sampler -> (function, its options as typed). InputError for one that does not fit."""
    name = args.sampler or ldm.sampler_for(schedule).__name__.removesuffix("_sample")
    if (name == "euler") != (schedule.objective == "flow"):
        raise InputError(f"--sampler {name}: does not go with the objective of this checkpoint, "
                         f"{schedule.objective}; leave it out")
    if args.steps > schedule.T and name != "euler":
        raise InputError(f"--steps {args.steps}: this model was trained with {schedule.T} steps")
    function, own = SAMPLERS[name]          # options that it knows
    typed = {o: getattr(args, o) for o in ("clip", "eta", "shift", "interval")
             if getattr(args, o) is not None}
    if strange := set(typed) - set(own):
        raise InputError(f"--{min(strange)}: the sampler {name} has no such option")
    return function, typed


def stage_one(args, ckpt):
    """The decoder of --vmae or of the checkpoint itself, if its latents are those of stage two."""
    if args.vmae is None and "vmae" not in ckpt:
        raise InputError(f"{args.ckpt}: published weights hold no stage one; name it with --vmae")
    first = vmae.load_vmae(args.vmae) if args.vmae else vmae.build_vmae(ckpt["vmae"])  # its own
    wanted = ckpt["model_args"]["in_channels"], ckpt["model_args"]["input_size"]  # d, h
    if (first.latent_dim, first.grid) != wanted:
        raise InputError(f"--vmae {args.vmae}: its latents have {first.latent_dim} channels on a "
                         f"side of {first.grid}, those of {args.ckpt} {wanted[0]} on {wanted[1]}")
    return first


def main():
    args = options()
    model, schedule, ckpt = ldm.load_ldm(args.ckpt, args.stats)            # the EMA weights
    sampler, extra = pick_sampler(args, schedule)          # and its own options
    classes, labels = ckpt["classes"], torch.tensor(pick_labels(args.label, ckpt["classes"]))
    if args.cfg not in (None, 1) and not classes:
        raise InputError(f"--cfg {args.cfg}: this checkpoint is unconditional, leave --cfg out")
    # Guidance of 1.5 is where the kinds become certain and the colours still vary.
    w = args.cfg if args.cfg is not None else 1.5 if classes else 1.0
    device = vmae.pick_device(args.device)
    model, first = model.to(device), stage_one(args, ckpt).to(device)
    mean, std = ckpt["latent_mean"].to(device), ckpt["latent_std"].to(device)  # (d,) each

    images, record = [], None               # uint8 (B, 3, H, W); the trajectory, 8 images a step
    shape = (first.latent_dim, first.grid, first.grid)                     # (d, h, w)
    for index in tqdm(torch.arange(args.n).split(args.batch), desc="sampling", dynamic_ncols=True):
        # One generator an image, so that an image does not depend on its neighbours in the batch.
        own = [torch.Generator().manual_seed(args.seed * 1_000_003 + i) for i in index.tolist()]

        def noise(_=None):                  # drawn on the CPU: the same images on any device
            return torch.stack([torch.randn(shape, generator=g) for g in own]).to(device)

        y = labels[index % len(labels)].to(device) if classes else None    # (B,)
        estimates = [] if args.trajectory and not images else None         # of z_0, a step each
        # float32 on a CPU: rounding in bfloat16 would make an image depend on its batch.
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, device.type == "cuda"):
            if sampler is not ldm.euler_sample:            # the others may add noise on the way
                extra["noise"] = noise
            z = sampler(model, schedule, noise(), y, steps=args.steps, w=w, record=estimates,
                        **extra)                                           # (B, d, h, w)
            images.append(vmae.to_uint8(first.decode(ldm.denormalise(z, mean, std))).cpu())
            if estimates is not None:       # ten of the steps, the first and the last among them
                at = np.linspace(0, args.steps - 1, min(10, args.steps)).round().astype(int)
                record = [first.decode(ldm.denormalise(estimates[k][:8], mean, std)) for k in at]

    out, images = Path(args.out), torch.cat(images)                        # (N, 3, H, W)
    pixels = images.permute(0, 2, 3, 1).numpy()                            # (N, H, W, 3)
    out.mkdir(parents=True, exist_ok=True)  # only now that there is all of it to write
    for old in out.glob(f"sample_{'[0-9]' * 6}.png"):      # leftovers would be counted as ours
        old.unlink()
    for i, image in enumerate(pixels):      # PNG loses nothing, which FID would notice
        Image.fromarray(image).save(out / f"sample_{i:06d}.png")
    vmae.save_grid((images[:64] / 127.5 - 1).split(8), out / "grid.png")   # an overview, 8 a row
    if args.npz:
        np.savez(out / "samples.npz", arr_0=pixels)
    if record is not None:                  # 8 images down, noise to image across
        vmae.save_grid(torch.stack(record, 1), out / "trajectory.png")
    print(f"{len(images)} images in {out}, an overview in {out}/grid.png")


if __name__ == "__main__":
    vmae.cli(main)

"""Draw images from a stage-two checkpoint, which holds everything that sampling needs.

    python sample.py                                    64 images into samples/, and grid.png
    python sample.py --class cat --cfg 3 --n 16         one class, by name or number
    python sample.py --sampler ddpm --steps 1000        Ho 2020; the default is DDIM, 50 steps
    python sample.py --ckpt lightningdit.pt --vmae vmae.pth --stats latents_stats.pt --steps 250
    python sample.py --n 10000 --npz --trajectory       also samples.npz, trajectory.png
    torchrun --nproc-per-node 4 sample.py --n 50000     the same images, from several GPUs

Each image is written when it is drawn; the same command again goes on after an interruption.
"""
import argparse, functools, json, os, re, zipfile
from pathlib import Path

import vmae                                 # before torch, see there
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import ldm
from vmae import RANK, WORLD, InputError

SAMPLER_OPTIONS = {name: text for _, _, own in ldm.SAMPLERS.values() for name, text in own.items()}

def options():
    """The command line -> checked options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s [options]")
    add = parser.add_argument
    add("--ckpt", type=vmae.checkpoint, default="runs/ldm", help="stage two (default: %(default)s)")
    add("--n", type=int, default=64, help="number of images (default: %(default)s)")
    add("--vmae", type=vmae.checkpoint, help="stage-one checkpoint (default: that inside --ckpt)")
    add("--stats", help="file of latent statistics that comes with the authors' weights")
    add("--steps", type=int, default=50, help="network calls per image (default: %(default)s)")
    usual = ", ".join(f"{o} {ldm.fitting_samplers(o)[0]}" for o in ("eps", "v", "flow"))
    add("--sampler", choices=ldm.SAMPLERS, help=f"from noise to latents (default: {usual})")
    add("--cfg", type=float, help="guidance weight w, 1: none (default: 1.5 with classes, else 1)")
    for name, text in SAMPLER_OPTIONS.items():
        users = ", ".join(s for s, (_, _, own) in ldm.SAMPLERS.items() if name in own)
        add(f"--{name}", type=float, help=f"{users}: {text}")
    add("--class", dest="label", help="name or number; the number after the last one is the null "
        "class (default: all classes in turn)")
    add("--seed", type=int, default=0, help="random seed, which fixes each image (default: 0)")
    add("--batch", type=int, default=64, help="images at a time (default: %(default)s)")
    add("--device", default="auto", help="cuda, cpu, mps... (default: cuda if there is one)")
    add("--out", default="samples", help="folder (default: %(default)s)")
    add("--npz", action="store_true", help="also samples.npz: arr_0, uint8 (N, H, W, 3), for ADM")
    add("--trajectory", action="store_true", help="also trajectory.png: estimates of x on the way")
    return vmae.check(parser.parse_args())

def pick_labels(label, classes):
    """--class -> the labels to draw in turn. The null class has the number len(classes)."""
    if label is None:
        return list(range(len(classes)))
    if not classes:
        raise InputError(f"--class {label}: this checkpoint is unconditional, it has no classes")
    if label in classes:                    # before numbers, as a name may be a number
        return [classes.index(label)]
    if label.isdecimal() and int(label) <= len(classes):
        return [int(label)]
    raise InputError(f"--class {label}: unknown; choose from {', '.join(classes)}, a number below "
                     f"{len(classes)}, or {len(classes)}, the null class")

def guidance(cfg, classes):
    """--cfg -> w. With 1.5 nearly all samples show the class that was asked for, and colours still
    vary. InputError for guidance without classes."""
    if cfg not in (None, 1) and not classes:
        raise InputError(f"--cfg {cfg}: this checkpoint is unconditional, leave --cfg out")
    return cfg if cfg is not None else (1.5 if classes else 1.0)

def pick_sampler(args, schedule):
    """--sampler -> (function, those of its own options that were given). InputError if the sampler
    does not fit the checkpoint's objective, or an option does not fit the sampler."""
    fitting = ldm.fitting_samplers(schedule.objective)
    name = args.sampler or fitting[0]       # the default comes first
    if name not in fitting:
        raise InputError(f"--sampler {name}: this checkpoint was trained for the objective "
                         f"{schedule.objective}; choose from {', '.join(fitting)}")
    if args.steps > schedule.T and schedule.objective != "flow":
        raise InputError(f"--steps {args.steps}: give at most the {schedule.T} of training")
    function, _, own = ldm.SAMPLERS[name]
    given = {o: getattr(args, o) for o in SAMPLER_OPTIONS if getattr(args, o, None) is not None}
    if wrong := sorted(given.keys() - own):
        raise InputError(f"--{wrong[0]}: the sampler {name} has no such option; leave it out")
    return function, given

def check_latents(path, ckpt, vmae_path, ae):
    """-> the autoencoder `ae`. InputError unless its latents are those of the stage-two checkpoint:
    of the same shape and, if stage one is in the checkpoint, from an encoder that encodes alike.
    The decoder may be another."""
    d, side = ckpt["model_args"]["in_channels"], ckpt["model_args"]["input_size"]
    if (ae.latent_dim, ae.grid) != (d, side):
        raise InputError(f"--vmae {vmae_path}: its latents have {ae.latent_dim} channels on a "
                         f"side of {ae.grid}, those of {path} have {d} on {side}")
    if "vmae" in ckpt:
        theirs = vmae.build_vmae(ckpt["vmae"]).to(ae.logvar_x.device)
        x = torch.linspace(-1, 1, 3 * ae.img_size**2).view(1, 3, ae.img_size, -1).to(ae.logvar_x)
        if not torch.allclose(ae.encode(x).mu, theirs.encode(x).mu, atol=1e-3):
            raise InputError(f"--vmae {vmae_path}: has another encoder than the stage one inside "
                             f"{path}, and so other latents; name that one, or leave --vmae out")
    return ae

def stage_one(args, ckpt):
    """The autoencoder of --vmae, or the one inside the checkpoint."""
    if args.vmae is None and "vmae" not in ckpt:
        raise InputError(f"{args.ckpt}: published weights hold no stage one; name it with --vmae")
    if args.vmae is None:
        return vmae.build_vmae(ckpt["vmae"])
    return check_latents(args.ckpt, ckpt, args.vmae, vmae.load_vmae(args.vmae))

def decode(z_0, ae, ckpt):
    """Normalised latents z_0 (B, d, h, w) -> images (B, 3, H, W), about [-1, 1]."""
    mean, std = ckpt["latent_mean"].to(z_0), ckpt["latent_std"].to(z_0)    # (d,) each
    return ae.decode(ldm.denormalise(z_0, mean, std))

@torch.no_grad()
def draw(index, labels, model, ae, schedule, ckpt, sampler, seed=0, w=1.0, **options):
    """Image numbers index (B,) -> uint8 (B, 3, H, W) on the CPU. labels: image i gets label number
    i % len(labels), none if empty. ae: the autoencoder; w: guidance; options: steps, sampler's."""
    shape, device = (ae.latent_dim, ae.grid, ae.grid), model.pos_embed.device
    # One generator per image, on the CPU: batch and device then change an image by rounding only.
    generators = [vmae.seeded(seed, i) for i in index.tolist()]
    y = torch.tensor(labels)[index % len(labels)].to(device) if labels else None           # (B,)

    def noise(_=None):                      # the samplers pass z, for its shape
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)

    # On a CPU in float32: the rounding of bfloat16 would make an image depend on its batch.
    fast = device.type == "cuda" and vmae.has_bfloat16(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=fast):
        z_0 = sampler(model, schedule, noise(), y, w=w, noise=noise, **options)    # (B, d, h, w)
        return vmae.to_uint8(decode(z_0, ae, ckpt)).cpu()                  # (B, 3, H, W)

def begin(out, args, settings, files):
    """Make the folder `out` -> those of `files` that this same command drew before it was
    interrupted. Images of another command are deleted, and so are the files made from them; but
    without a samples.json no file in the folder is ours."""
    for path in filter(None, (args.ckpt, args.vmae, args.stats)):
        settings[os.path.abspath(path)] = os.path.getsize(path), os.stat(path).st_mtime_ns
    settings |= {name: getattr(args, name) for name in ("seed", "steps", "batch", *SAMPLER_OPTIONS)}
    note, text = out / "samples.json", json.dumps(settings)
    before = note.read_text() if note.exists() else ""
    out.mkdir(parents=True, exist_ok=True)
    ours = list(out.iterdir()) if before else []
    found = {p for p in ours if re.fullmatch(r"sample_(\d{6}|[1-9]\d{6})\.png", p.name)}
    kept = found.intersection(files if before == text else ())
    made = {p for p in ours if p.name in ("grid.png", "samples.npz", "trajectory.png")}
    for path in (found - kept) | made:
        path.unlink()
    if found - kept:
        print(f"{out}: {len(found - kept)} images of another command are deleted")
    with vmae.whole_file(note) as file:
        file.write(text.encode())
    return kept

def save_npz(files, size, path):
    """The PNGs as arr_0, uint8 (N, H, W, 3), in a .npz. One image is in memory at a time."""
    header = dict(descr="|u1", fortran_order=False, shape=(len(files), size, size, 3))
    with (vmae.whole_file(path) as whole, zipfile.ZipFile(whole, "w") as archive,
          archive.open("arr_0.npy", "w", force_zip64=True) as array):
        np.lib.format.write_array_header_1_0(array, header)
        for file in files:
            array.write(Image.open(file).tobytes())

def main():
    args = options()
    model, schedule, ckpt = ldm.load_ldm(args.ckpt, args.stats)            # the EMA weights
    sampler, given = pick_sampler(args, schedule)          # by default DDIM, or Euler
    labels = pick_labels(args.label, ckpt["classes"])      # none without classes
    w = guidance(args.cfg, ckpt["classes"])
    device = vmae.start(args.device)
    model, ae = model.to(device), stage_one(args, ckpt).to(device)         # generator, autoencoder

    drawn = functools.partial(draw, labels=labels, model=model, ae=ae, schedule=schedule, ckpt=ckpt,
                              sampler=sampler, seed=args.seed, w=w, steps=args.steps, **given)
    out, settings = Path(args.out), dict(w=w, labels=labels, sampler=sampler.__name__)
    files = [out / f"sample_{i:06d}.png" for i in range(args.n)]
    done = vmae.from_first(lambda: begin(out, args, settings, files))
    # Whole batches, also after an interruption: rounding depends a little on how many images are
    # drawn at once, so the files are then the same for any number of processes.
    parts = [part for part in torch.arange(args.n).split(args.batch)
             if not done.issuperset(files[i] for i in part)][RANK::WORLD]
    for part in tqdm(parts, "sampling", dynamic_ncols=True, disable=RANK > 0):
        for i, image in zip(part, drawn(part).permute(0, 2, 3, 1).numpy()):    # (H, W, 3) each
            with vmae.whole_file(files[i]) as file:        # PNG: FID would notice JPEG's losses
                Image.fromarray(image).save(file, "png")
    vmae.agree(0)
    if RANK > 0:                            # process 0 does the rest
        return
    first = torch.from_numpy(np.stack([Image.open(file) for file in files[:64]]))  # (64, H, W, 3)
    vmae.save_grid(vmae.to_float(first.permute(0, 3, 1, 2)).split(8), out / "grid.png")
    if args.npz:                            # for evaluate.py fid, or ADM's
        save_npz(files, ae.img_size, out / "samples.npz")
    if args.trajectory:                     # the first 8 images, one per row, at ten of the steps
        record, at = [], np.linspace(0, args.steps - 1, min(10, args.steps)).round().astype(int)
        drawn(torch.arange(min(8, args.n)), record=record)
        estimates = [decode(record[k], ae, ckpt) for k in at]              # (8, 3, H, W) each
        vmae.save_grid(torch.stack(estimates, 1), out / "trajectory.png")  # (8, 10, 3, H, W)
    print(f"{args.n} images in {out}, an overview in {out}/grid.png")

if __name__ == "__main__":
    vmae.cli(main)

"""Draw images from a stage-two checkpoint, which holds everything that sampling needs.

    python sample.py                                    64 images into samples/, and grid.png
    python sample.py --class cat --cfg 3 --n 16         one class, by name or number
    python sample.py --sampler ddpm --steps 1000        Ho 2020; the default is DDIM, 50 steps
    python sample.py --ckpt lightningdit.pt --vmae vmae.pth --stats latents_stats.pt --steps 250
    python sample.py --n 10000 --npz --trajectory       also samples.npz, trajectory.png
    torchrun --nproc-per-node 4 -- sample.py --n 50000  the same images, from several GPUs

Each image is written as soon as it is drawn; the same command again goes on after an interruption.
"""
import functools
import json
import os
import re
import unicodedata
import zipfile
from pathlib import Path

import vmae                                 # before torch, see there
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import ldm
from vmae import RANK, WORLD, InputError

# Options that belong to some of the samplers.
OWN = {"ddim": ("clip", "eta"), "ddpm": ("clip",), "euler": ("shift", "interval")}
# Compiling takes some 15 s. It pays from about this many calls of the network for one image on.
WORTH_COMPILING = 100_000

def main():
    args = read_options()
    model, schedule, ckpt = ldm.load_ldm(args.ckpt, args.stats)            # the EMA weights
    sampler, own = pick_sampler(args, schedule)            # by default DDIM, or Euler
    labels = pick_labels(args.label, ckpt["classes"])      # none without classes
    cfg = guidance(args.cfg, ckpt["classes"])
    device = vmae.start(args.device)
    if args.batch is None:
        args.batch = 256 if device.type == "cuda" else 64
    model.to(device)
    ae = stage_one(args, ckpt).to(device)                  # the autoencoder
    say_what_is_drawn(labels, cfg, ckpt["classes"])
    if device.type == "cuda" and args.n * args.steps / WORLD >= WORTH_COMPILING:
        vmae.compile_blocks(model.blocks)

    draw_batch = functools.partial(draw, labels=labels, model=model, ae=ae, schedule=schedule,
                                   ckpt=ckpt, sampler=sampler, seed=args.seed, cfg=cfg,
                                   steps=args.steps, **own)
    out = Path(args.out)
    files = [out / f"sample_{i:06d}.png" for i in range(args.n)]
    settings = dict(cfg=cfg, labels=labels, sampler=sampler.__name__)
    finished = vmae.from_first(lambda: open_folder(out, args, settings, files))
    # Whole batches, also after an interruption: rounding depends a little on how many images are
    # drawn at once, so the files are then the same for any number of processes.
    parts = []
    for part in torch.arange(args.n).split(args.batch):
        if not finished.issuperset(files[i] for i in part):
            parts.append(part)
    with vmae.threads(vmae.cpus()) as pool:    # PNGs are written while the next batch is drawn
        written = []
        for part in tqdm(parts[RANK::WORLD], "sampling", dynamic_ncols=True, disable=RANK > 0):
            images = draw_batch(part).permute(0, 2, 3, 1).numpy()          # (B, H, W, 3)
            wait(written)                   # at most one batch is waiting to be written
            written = [pool.submit(write_png, files[i], image) for i, image in zip(part, images)]
        wait(written)
    vmae.wait_for_all()
    if RANK > 0:                            # process 0 does the rest
        return
    first = torch.from_numpy(np.stack([Image.open(file) for file in files[:64]]))  # (64, H, W, 3)
    vmae.save_grid(vmae.to_float(first.permute(0, 3, 1, 2)).split(8), out / "grid.png")
    if args.npz:                            # for evaluate.py fid, or ADM's
        save_npz(files, ae.img_size, out / "samples.npz")
    if args.trajectory:
        save_trajectory(draw_batch, args, ae, ckpt, out / "trajectory.png")
    print(f"{args.n} images in {out}, an overview in {out}/grid.png")

@torch.no_grad()
def draw(index, labels, model, ae, schedule, ckpt, sampler, seed=0, cfg=1.0, **options):
    """Image numbers index (B,) -> uint8 (B, 3, H, W) on the CPU. labels: image i gets label number
    i % len(labels), none if empty. ae: the autoencoder; options: steps, those of the sampler."""
    shape = (ae.latent_dim, ae.grid, ae.grid)
    device = model.pos_embed.device
    # One generator per image, on the CPU: batch and device then change an image by rounding only.
    generators = [vmae.seeded(seed, i) for i in index.tolist()]
    y = None
    if labels:
        y = torch.tensor(labels)[index % len(labels)].to(device)           # (B,)

    def noise(_=None):                      # the samplers pass z, for its shape
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)

    # On a CPU in float32: the rounding of bfloat16 would make an image depend on its batch.
    low_precision = device.type == "cuda" and vmae.has_bfloat16(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=low_precision):
        z_0 = sampler(model, schedule, noise(), y, cfg=cfg, noise=noise, **options)
        return vmae.to_uint8(decode(z_0, ae, ckpt)).cpu()                  # (B, 3, H, W)

def decode(z_0, ae, ckpt):
    """Normalised latents z_0 (B, d, h, w) -> images (B, 3, H, W), about [-1, 1]."""
    mean = ckpt["latent_mean"].to(z_0)                     # (d,)
    std = ckpt["latent_std"].to(z_0)                       # (d,)
    return ae.decode(ldm.denormalise(z_0, mean, std))

# ---- What is drawn ----------------------------------------------------------------------------

def read_options():
    """The command line -> options."""
    parser = vmae.Parser(description=__doc__.split("\n")[0], usage="%(prog)s [options]",
                         allow_abbrev=False)
    add = parser.add_argument
    add("--ckpt", type=vmae.checkpoint_path, default="runs/ldm", help="stage two (default: "
        "%(default)s)")
    add("--n", type=vmae.count_type, default=64, help="number of images (default: %(default)s)")
    add("--vmae", type=vmae.checkpoint_path, help="stage-one checkpoint (default: that inside "
        "--ckpt)")
    add("--stats", help="file of latent statistics that comes with the authors' weights")
    add("--steps", type=vmae.count_type, default=50, help="network calls per image (default: "
        "%(default)s)")
    add("--sampler", choices=ldm.SAMPLERS, help="from noise to latents (default: eps ddim, v ddim, "
        "flow euler)")
    add("--cfg", type=vmae.weight_type, help="weight of guidance, 1: none (default: 1.5 with "
        "classes, else 1)")
    add("--clip", type=vmae.positive_type, help="ddim, ddpm: bound z_0 to this many standard "
        "deviations (default: no bound)")
    add("--eta", type=vmae.fraction_type, help="ddim: share of DDPM's noise (default: 0)")
    add("--shift", type=vmae.positive_type, help="euler: spacing of times; below 1: smaller steps "
        "near the noise (default: 1)")
    add("--interval", type=vmae.fraction_type, help="euler: guide from this time on, 0 (noise) to "
        "1 (image) (default: 0)")
    add("--class", dest="label", help="name of a class, or its number, counted from 0, unless the "
        "names are numbers; null: the null class (default: all classes in turn)")
    add("--seed", type=vmae.seed_type, default=0, help="fixes each image (default: %(default)s)")
    add("--batch", type=vmae.count_type, help="images at a time (default: 256 on CUDA, else 64)")
    add("--device", default="auto", help="cuda, cpu, mps... (default: cuda if there is one)")
    add("--out", default="samples", help="folder (default: %(default)s)")
    add("--npz", action="store_true", help="also samples.npz: arr_0, uint8 (N, H, W, 3), for ADM")
    add("--trajectory", action="store_true", help="also trajectory.png: estimates of x on the way")
    return parser.parse_args()

def pick_labels(label, classes):
    """--class -> the labels to draw in turn. The null class has the number len(classes). A number
    means a name if all names are numbers, otherwise a place in the list. Accents may be typed in
    another form than the file system's."""
    if label is None:
        return list(range(len(classes)))
    if not classes:
        raise InputError(f"--class {label}: this checkpoint is unconditional, it has no classes")
    names = composed(classes)
    [wanted] = composed([label])
    if wanted in names:
        return [names.index(wanted)]
    if wanted == "null":
        return [len(classes)]
    are_numbers = all(name.isdecimal() for name in names)
    if wanted.isdecimal() and are_numbers:  # 1 means 01
        names = [int(name) for name in names]
        if names.count(int(wanted)) == 1:
            return [names.index(int(wanted))]
    elif wanted.isdecimal() and int(wanted) < len(classes):
        return [int(wanted)]
    some = ", ".join(classes[:10])
    if len(classes) > 10:
        some += f" and {len(classes) - 10} more"
    numbers = "" if are_numbers else f", a number below {len(classes)}"
    raise InputError(f"--class {label}: unknown; choose from {some}{numbers}, or null, the null "
                     f"class")

def composed(names):
    """Names in one form: macOS stores an accent as a character of its own, others do not."""
    return [unicodedata.normalize("NFC", name) for name in names]

def say_what_is_drawn(labels, cfg, classes):
    """Print the classes by name, and the weight of guidance."""
    if not classes:
        what = "without classes"
    elif len(labels) > 1:
        what = f"{len(labels)} classes in turn"
    elif labels == [len(classes)]:
        what = "the null class"
    else:
        what = f"the class {classes[labels[0]]}, number {labels[0]}"
    vmae.say(f"drawing {what}, guidance {cfg:g}")

def guidance(cfg, classes):
    """--cfg -> the weight of guidance. With 1.5 nearly all samples show the class that was asked
    for, and colours still vary. InputError for guidance without classes."""
    if cfg is None:
        return 1.5 if classes else 1.0
    if cfg != 1 and not classes:
        raise InputError(f"--cfg {cfg}: this checkpoint is unconditional, leave --cfg out")
    return cfg

def pick_sampler(args, schedule):
    """--sampler -> (function, those of its own options that were given). InputError if the sampler
    does not fit the checkpoint's objective, or an option does not fit the sampler."""
    fitting = ldm.FITTING[schedule.objective]              # the default comes first
    name = args.sampler or fitting[0]
    if name not in fitting:
        raise InputError(f"--sampler {name}: this checkpoint was trained for the objective "
                         f"{schedule.objective}; choose from {', '.join(fitting)}")
    if args.steps > schedule.T and schedule.objective != "flow":
        raise InputError(f"--steps {args.steps}: give at most the {schedule.T} of training")
    own = {}
    for option in ("clip", "eta", "shift", "interval"):
        value = getattr(args, option, None)                # evaluate.py has none of these
        if value is None:
            continue
        if option not in OWN[name]:
            raise InputError(f"--{option}: the sampler {name} has no such option; leave it out")
        own[option] = value
    return ldm.SAMPLERS[name], own

def stage_one(args, ckpt):
    """The autoencoder of --vmae, or the one inside the checkpoint."""
    if args.vmae is None and "vmae" not in ckpt:
        raise InputError(f"{args.ckpt}: published weights hold no stage one; name it with --vmae")
    if args.vmae is None:
        return vmae.build_vmae(ckpt["vmae"])
    ae = vmae.load_vmae(args.vmae)
    check_latents(args.ckpt, ckpt, args.vmae, ae)
    return ae

@torch.no_grad()
def check_latents(path, ckpt, vmae_path, ae):
    """InputError unless the latents of the autoencoder `ae` are those of the stage-two checkpoint:
    of the same shape and, if stage one is in the checkpoint, from an encoder that encodes alike.
    The decoder may be another."""
    d = ckpt["model_args"]["in_channels"]
    side = ckpt["model_args"]["input_size"]
    if (ae.latent_dim, ae.grid) != (d, side):
        raise InputError(f"--vmae {vmae_path}: its latents have {ae.latent_dim} channels on a "
                         f"side of {ae.grid}, those of {path} have {d} on {side}")
    if "vmae" not in ckpt:
        return
    device = ae.logvar_x.device
    inside = vmae.build_vmae(ckpt["vmae"]).to(device)
    # Both encode one image, a ramp of all grey levels; equal encoders differ by rounding only.
    x = torch.linspace(-1, 1, 3 * ae.img_size**2, device=device).view(1, 3, ae.img_size, -1)
    if not torch.allclose(ae.encode(x).mu, inside.encode(x).mu, atol=1e-3):
        raise InputError(f"--vmae {vmae_path}: has another encoder than the stage one inside "
                         f"{path}, and so other latents; name that one, or leave --vmae out")

# ---- What is written --------------------------------------------------------------------------

def open_folder(out, args, settings, files):
    """Make the folder `out` -> those of `files` that this same command drew before it was
    interrupted. Images of another command are deleted, and so are the files made from them. Only a
    folder with samples.json is cleared."""
    for path in (args.ckpt, args.vmae, args.stats):
        if path is not None:
            settings[os.path.abspath(path)] = os.path.getsize(path), os.stat(path).st_mtime_ns
    for name in ("seed", "steps", "batch", "clip", "eta", "shift", "interval"):
        settings[name] = getattr(args, name)
    note = out / "samples.json"
    settings = json.dumps(settings)
    kept = set()
    if note.exists():
        if note.read_text() == settings:
            kept = {file for file in files if is_readable(file)}
        deleted = 0
        for path in set(out.iterdir()) - kept:
            if re.fullmatch(r"sample_(\d{6}|[1-9]\d{6})\.png", path.name):
                path.unlink()
                deleted += 1
            elif path.name in ("grid.png", "samples.npz", "trajectory.png"):
                path.unlink()
        if deleted > 0:
            print(f"{out}: {deleted} images of another command are deleted")
    out.mkdir(parents=True, exist_ok=True)
    with vmae.whole_file(note) as file:
        file.write(settings.encode())
    return kept

def is_readable(path):
    """Whether a PNG is there and can be read: a power cut may leave an empty one."""
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError):          # Pillow's, for a damaged PNG
        return False
    return True

def write_png(path, image):
    """image: uint8 (H, W, 3). PNG, because FID would notice JPEG's losses."""
    with vmae.whole_file(path, to_disk=False) as file:
        Image.fromarray(image).save(file, "png")

def wait(written):
    """Wait for these writes; an error in one of them is raised here."""
    for future in written:
        future.result()

def save_npz(files, size, path):
    """The PNGs as arr_0, uint8 (N, H, W, 3), in a .npz. One image is in memory at a time."""
    header = dict(descr="|u1", fortran_order=False, shape=(len(files), size, size, 3))
    with (vmae.whole_file(path) as whole, zipfile.ZipFile(whole, "w") as archive,
          archive.open("arr_0.npy", "w", force_zip64=True) as array):
        np.lib.format.write_array_header_1_0(array, header)
        for file in files:
            array.write(Image.open(file).tobytes())

def save_trajectory(draw_batch, args, ae, ckpt, path):
    """The estimates of x at ten of the steps, for the first 8 images, one per row."""
    record = []
    draw_batch(torch.arange(min(8, args.n)), record=record)
    at = np.linspace(0, args.steps - 1, min(10, args.steps)).round().astype(int)
    estimates = [decode(record[k], ae, ckpt) for k in at]                  # (8, 3, H, W) each
    vmae.save_grid(torch.stack(estimates, 1), path)                        # (8, 10, 3, H, W)

if __name__ == "__main__":
    vmae.cli(main)

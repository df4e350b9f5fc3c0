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
import zipfile
from pathlib import Path

import vmae                                 # before torch, see there
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ldm import SAMPLERS, composed, load_ldm
from vmae import RANK, WORLD, InputError

def main():
    args = read_options()
    ldm = load_ldm(args.ckpt, args.stats, args.vmae)       # all that images are drawn from
    how = ldm.plan(args.cfg, args.sampler, args.steps, clip=args.clip, eta=args.eta,
                   shift=args.shift, interval=args.interval)
    labels = pick_labels(args.label, ldm.classes)          # none without classes
    device = vmae.start(args.device)
    if args.batch is None:
        args.batch = 256 if device.type == "cuda" else 64
    ldm.to(device)
    ldm.compile_if_it_pays(args.n * args.steps / WORLD)
    say_what_is_drawn(labels, how["cfg"], ldm.classes)

    draw = functools.partial(ldm.draw, labels=labels, seed=args.seed, **how)
    out = Path(args.out)
    files = [out / f"sample_{i:06d}.png" for i in range(args.n)]
    settings = dict(how, labels=labels, seed=args.seed, batch=args.batch)
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
            images = draw(part).permute(0, 2, 3, 1).numpy()                # (B, H, W, 3)
            wait(written)                   # at most one batch is waiting to be written
            written = [pool.submit(write_png, files[i], x) for i, x in zip(part, images)]
        wait(written)
    vmae.wait_for_all()
    if RANK > 0:                            # process 0 does the rest
        return
    first = torch.from_numpy(np.stack([read_png(file) for file in files[:64]]))
    vmae.save_grid(first.permute(0, 3, 1, 2).split(8), out / "grid.png")   # (at most 64, 3, H, W)
    if args.npz:                            # for evaluate.py fid, or ADM's
        save_npz(files, first.shape[1:], out / "samples.npz")
    if args.trajectory:
        save_trajectory(draw, args, ldm, out / "trajectory.png")
    print(f"{args.n} images in {out}, an overview in {out}/grid.png")

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
    add("--sampler", choices=SAMPLERS, help="from noise to latents (default: eps ddim, v ddim, "
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

# ---- What is written --------------------------------------------------------------------------

def open_folder(out, args, settings, files):
    """Make the folder `out` -> those of `files` that an earlier command with these settings drew,
    be it one that was interrupted, or that drew more. Images of other settings are deleted, and so
    are the files made from them; more than the default 64, which may have taken a night, are an
    InputError. Only a folder with samples.json is cleared. settings: what decides the images,
    beside the files of weights, which are added here."""
    vmae.hold(out)
    for path in (args.ckpt, args.vmae, args.stats):
        if path is not None:
            settings[os.path.abspath(path)] = os.path.getsize(path), os.stat(path).st_mtime_ns
    note = out / "samples.json"
    settings = json.dumps(settings)
    if note.exists() and note.read_text() == settings:
        return {file for file in files if is_readable(file)}
    if note.exists():
        old = [path for path in out.iterdir()
               if re.fullmatch(r"sample_(\d{6}|[1-9]\d{6})\.png", path.name)]
        if len(old) > 64:
            raise InputError(f"--out {out}: holds {len(old)} images of other settings; give "
                             f"another --out, or delete them")
        for path in old:
            path.unlink()
        for name in ("grid.png", "samples.npz", "trajectory.png"):
            (out / name).unlink(missing_ok=True)
        if old:
            print(f"{out}: {len(old)} images of another command are deleted")
    out.mkdir(parents=True, exist_ok=True)
    with vmae.whole_file(note) as file:
        file.write(settings.encode())
    return set()

def is_readable(path):
    """Whether a PNG is there and can be read: a power cut may leave an empty one."""
    try:
        read_png(path)
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

def read_png(path):
    """-> uint8 (H, W, 3)."""
    with Image.open(path) as image:
        return np.asarray(image)

def save_npz(files, shape, path):
    """All images as arr_0, uint8 (N, H, W, 3), in a .npz, one after the other, as they may be more
    than the memory holds. shape: (H, W, 3)."""
    header = dict(descr="|u1", fortran_order=False, shape=(len(files), *shape))
    with (vmae.whole_file(path) as whole, zipfile.ZipFile(whole, "w") as archive,
          archive.open("arr_0.npy", "w", force_zip64=True) as array):
        np.lib.format.write_array_header_1_0(array, header)
        for file in files:
            array.write(read_png(file).tobytes())

def save_trajectory(draw, args, ldm, path):
    """The estimates of x at ten of the steps, for the first 8 images, one per row."""
    record = []
    draw(range(min(8, args.n)), record=record)
    at = np.linspace(0, args.steps - 1, min(10, args.steps)).round().astype(int)
    estimates = [ldm.decode(record[k]) for k in at]                        # (8, 3, H, W) each
    vmae.save_grid(torch.stack(estimates, 1), path)                        # (8, 10, 3, H, W)

if __name__ == "__main__":
    vmae.cli(main)

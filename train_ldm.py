"""Train stage two: diffusion on the latents of a trained stage one (Section 3.2).

    python train_ldm.py                                 after train_vmae.py, on the same data
    python train_ldm.py --vmae runs/mae                 on the latents of another autoencoder
    python train_ldm.py --no-classes                    unconditional, even if there are classes

Each image and its mirror image are encoded once, into moments_*.npy in --out, which training reads.
Also writes last.pt, log.jsonl, curves.png and preview_*.png, samples of the EMA weights.
"""
import hashlib
import os

import vmae                                 # before torch, see there
import numpy as np
import torch

import ldm
import train_vmae                           # its parts "shared with train_ldm.py"
from vmae import RANK, InputError

# The options of stage two beside those of both trainers; None means that they are chosen later.
DEFAULTS = dict(vmae="runs/vmae", out="runs/ldm", no_classes=False, init=None, stats=None,
                objective=None, schedule=None, drop=0.1)   # Ho & Salimans 2022: 0.1, 0.2 are alike

# Recipes, by size and device ("cpu" stands for all but CUDA): the optimiser, images per step,
# steps, peak learning rate. That of 2e-4 is the authors'. Tried with tiny on a CPU, L_v of held-out
# faces after some 500 steps of 16:
#
#   cosine down, another stage one     Muon, lr 3e-3 .239, 6e-3 .232, 1e-2 .237; with a momentum of
#                                      .95 in place of .9 .244 and .239 for the first two
#   cosine down                        Muon .221; with a weight decay of .05 .224, of .4 .221 (.15
#                                      is the default); without a warm-up .228, with one over 10 %
#                                      of the run .230; AdamW, lr 3e-3 .265, 6e-3 .264
#   straight line down                 Muon .219, lr 9e-3 .223; AdamW, lr 6e-3 .255; Muon with an
#                                      EMA over the last twentieth, fortieth, or none .218
RECIPES = {
    ("tiny", "cpu"): dict(optimizer="muon", batch=16, steps=1000, lr=6e-3),
    ("tiny", "cuda"): dict(optimizer="adamw", batch=256, steps=2500, lr=3e-3),
    ("small", "cpu"): dict(optimizer="adamw", batch=256, steps=100_000, lr=2e-4),
    ("small", "cuda"): dict(optimizer="adamw", batch=256, steps=100_000, lr=2e-4),
    ("small", "cuda, faces"): dict(optimizer="adamw", batch=256, steps=2500, lr=1e-3),     # 8 x 8
    ("base", "cpu"): dict(optimizer="adamw", batch=256, steps=100_000, lr=2e-4),
    ("base", "cuda"): dict(optimizer="adamw", batch=256, steps=100_000, lr=2e-4)}
# Latents at once on a CPU or Mac, see choose_micro. 8 of 32 x 32 take some 8 GB with base.
AT_ONCE = {"tiny": 256, "small": 32, "base": 8}

# ---- The training loop ------------------------------------------------------------------------

def main():
    args, given, resumed = read_options()   # resumed: the checkpoint to go on from, or None
    device = vmae.start(args.device)        # cuda, cpu or mps
    stage_one = resumed["vmae"] if resumed else vmae.read_stage_one(args.vmae)
    init = None
    if args.init and resumed is None:
        _, init = ldm.read_stage_two(args.init, args.stats)
    fill_in(args, given, device, stage_one["train_args"], init)

    # What is trained, and what a checkpoint holds of it.
    ae = vmae.build_vmae(stage_one).to(device)             # the autoencoder, frozen
    data, val = vmae.open_images(args.data, ae.img_size, args.val, args.out)   # at its size
    if isinstance(data, vmae.ImageFolder):
        data.take_pixels(os.path.dirname(stage_one["path"]))
    classes = names_of_classes(args, given, data, resumed)
    torch.manual_seed(args.seed)            # the same weights in every process
    model, path, entries = new_model(args, ae, classes, resumed, init)
    model.to(device)
    path.to(device)
    ema = ldm.EMA(model)
    autocast = train_vmae.matmul_precision(args, device)
    opts = train_vmae.optimisers(model, args)              # AdamW, and Muon beside it
    states = {"model": model, "ema": ema.model, **opts}    # of a checkpoint
    start = train_vmae.load_states(args, resumed, states)  # the step to begin with
    ema.n = start                           # its warm-up goes on, too
    resumed = init = None                   # their memory is free again
    vmae.describe(data, val)

    # Latents are encoded once. A checkpoint also holds all that sample.py needs beside the network.
    vmae.hold(args.out)                     # against a second job in the same folder
    cache = cache_moments(ae, data, args, device, autocast)
    if "latent_mean" not in entries:        # those of a run that goes on, or of --init, are kept
        entries["latent_mean"], entries["latent_std"] = statistics(cache)
    entries["vmae"] = stage_one
    mean = entries["latent_mean"].to(device)               # (d,)
    std = entries["latent_std"].to(device)                 # (d,)
    averaged = ldm.LDM(ema.model, path, mean, std, ae, classes)    # what is sampled at each save
    generator = torch.Generator(device)     # of all that is random in a micro-batch

    def micro_batch(moments, y):
        """The loss of a part of the batch, by name. moments: mu and logvar of q(z|x), as (B, 2d, h,
        w); y: classes (B,). Its gradients are added to those of the other parts. On CUDA this is
        recorded and then replayed (Replay in train_vmae.py)."""
        z = vmae.Gaussian(*moments.float().chunk(2, 1)).sample(generator)  # anew each time
        z_0 = ldm.normalise(z, mean, std)                                  # (B, d, h, w)
        y = model.y_embedder.drop(y, args.drop, generator) if classes else None        # (B,)
        with autocast():
            loss = ldm.loss_LDM(model, path, z_0, y, generator)            # a scalar, float32
        share = len(z) / args.batch
        (share * loss).backward()
        return {f"L_{path.objective}": loss.detach()}      # L_eps, L_v or L_flow

    def largest_part(n):
        zeros = torch.zeros(n, 2 * ae.latent_dim, ae.grid, ae.grid, dtype=torch.half, device=device)
        micro_batch(zeros, torch.zeros(n, dtype=torch.long, device=device))

    # Each batch is worked through in micro-batches, of which this process takes its share.
    args.micro = train_vmae.choose_micro(args, given, device, largest_part, states,
                                         AT_ONCE[args.model])
    my_micro_batches = train_vmae.parts_of_this_process(args)              # their numbers
    train_vmae.say_options(args, model)
    batches = train_vmae.training_batches(cache, args, start, my_micro_batches, device)
    held_out = held_out_latents(val, classes, ae, mean, std)               # z_0, y
    fast_micro_batch = train_vmae.make_fast(micro_batch, args, given, generator, model.blocks)

    run = train_vmae.Run(args, states, start, device)      # its log, checkpoints, and when it ends
    for step in run.steps(range(start, args.steps)):
        lr = train_vmae.learning_rate(step, args.steps, args.lr)           # up, then down to 0
        for i in my_micro_batches:
            moments, y = next(batches)                     # (B, 2d, h, w), (B,)
            generator.manual_seed(vmae.seed_of(args.seed, step, i))
            terms = fast_micro_batch(moments, y)
            run.add(terms, len(y) / args.batch)
        is_finite = train_vmae.optimiser_step(opts.values(), model, lr)    # clip, step, zero
        run.skipped += ~is_finite                          # then no weight has changed
        ema.update(model)                                  # what is sampled, here and by sample.py
        run.end_step(step, lr, lambda preview: measure(averaged, held_out, preview), **entries)

# ---- The cache of moments ---------------------------------------------------------------------

@torch.no_grad()
def cache_moments(model, data, args, device, autocast):
    """-> vmae.Cache, kept in the run folder and made anew if stage one's weights or the data
    change. A row holds q(z|x) of an image: mu and logvar, (2d, h, w), float16. Unless args.flip is
    off, rows 2i and 2i + 1 are image i and its mirror image. In bfloat16 encoding takes half the
    time on a CPU. After the default run this changes mu by .6 % of its standard deviation, while
    sigma is 9 % of it."""
    views = 2 if args.flip else 1           # of each image

    def encoded():
        for x, y in data.batches(torch.arange(len(data))):
            x = vmae.to_float(x.to(device))                                # (B, 3, H, W)
            if args.flip:
                x = torch.stack([x, x.flip(-1)], 1).flatten(0, 1)          # (2B, 3, H, W)
            with autocast():
                q = model.encode(x)                                        # over (2B, d, h, w)
            yield torch.cat([q.mu, q.logvar], 1).half().cpu(), y.repeat_interleave(views)

    weights = hashlib.sha256()
    for value in model.state_dict().values():
        weights.update(value.cpu().numpy().tobytes())
    made_of = f"{views} {weights.hexdigest()} {data.made_of()}"
    shape = (2 * model.latent_dim, model.grid, model.grid)
    cache = vmae.Cache(args.out, "moments", made_of, views * len(data), shape, np.float16)
    return cache.open("encoding", encoded())

def statistics(cache):
    """Mean and standard deviation of z per channel, (d,) each, for normalise, from 2,048 rows at
    equal distances. The variance of z is that of mu, plus the mean of sigma^2."""
    rows = np.linspace(0, len(cache) - 1, min(2048, len(cache))).round().astype(int)
    moments, _ = cache.batch(rows)
    mu, logvar = moments.float().chunk(2, 1)               # (2048, d, h, w) each
    variance = mu.var((0, 2, 3), unbiased=False) + logvar.exp().mean((0, 2, 3))
    return mu.mean((0, 2, 3)), variance.sqrt()

# ---- Measured at each save --------------------------------------------------------------------

def held_out_latents(val, classes, ae, mean, std):
    """64 held-out images, always the same -> z_0 (B, d, h, w), y (B,) or None. ae: stage one. None
    outside of process 0, which measures."""
    if RANK > 0:
        return None
    device = mean.device
    generator = torch.Generator(device).manual_seed(0)
    x, y = val.batch(val.some(64).tolist())                # uint8 (B, 3, H, W), (B,)
    latents = []
    for part in x.split(8):
        latents.append(ae.encode(vmae.to_float(part.to(device))).sample(generator))
    z_0 = ldm.normalise(torch.cat(latents), mean, std)
    if not classes:
        return z_0, None
    # The folder --val may have other classes, or the same in another order: they meet by name.
    theirs = ldm.composed(val.classes)
    ours = ldm.composed(classes)
    strangers = [name for name in theirs if name not in ours]
    if strangers or not theirs:
        vmae.say(f"held out: images of {', '.join(strangers) or 'no class'}, which training does "
                 f"not know, are measured without a label")
    label_of = []
    for name in theirs or [""]:             # no classes: all have the null class
        label_of.append(ours.index(name) if name in ours else len(ours))   # the null class
    return z_0, torch.tensor(label_of)[y].to(device)

@torch.no_grad()
def measure(averaged, held_out, file):
    """-> {"L_..._val": the loss of the EMA weights on held-out latents, always with the same times
    and noise}. Saves a preview: the first 32 images that sample.py would draw, 8 per row. averaged:
    the LDM with the EMA weights."""
    z_0, y = held_out
    generator = torch.Generator(z_0.device).manual_seed(0)
    loss = ldm.loss_LDM(averaged.model, averaged.path, z_0, y, generator)
    x = averaged.draw(range(32))                           # uint8 (32, 3, H, W)
    vmae.save_grid(x.split(8), file)
    return {f"L_{averaged.path.objective}_val": round(loss.item(), 5)}

# ---- Options of stage two, and what they build ------------------------------------------------

def read_options():
    """The command line -> (all options, those that were given, the checkpoint to go on from or
    None). `fill_in` and `new_model` choose the options that are still None."""
    parser = train_vmae.common_parser(__doc__)
    add = parser.add_argument
    add("--vmae", type=train_vmae.absolute_checkpoint, metavar="CHECKPOINT", help="stage one "
        "(default: runs/vmae)")
    add("--no-classes", action="store_true", help="ignore sub-folders, train unconditionally")
    add("--init", type=train_vmae.absolute_checkpoint, metavar="CHECKPOINT", help="stage two to "
        "start from, ours or a LightningDiT's")
    add("--stats", metavar="FILE", help="latent statistics that come with the authors' --init")
    add("--objective", choices=("eps", "v", "flow"), help="what the network predicts; eps is the "
        "paper's L_LDM, flow what its experiments used (default: that of --init, otherwise v)")
    add("--schedule", choices=("linear", "cosine"), help="how noise grows with time: linear, Ho "
        "2020; cosine, Nichol 2021 (default: that of --init, otherwise cosine)")
    add("--drop", type=vmae.fraction_type, help="share of labels replaced by the null class, which "
        "guidance needs (default: 0.1)")
    given = vars(parser.parse_args())
    defaults = {**DEFAULTS, "vmae": train_vmae.absolute_checkpoint(DEFAULTS["vmae"])}
    args, resumed = train_vmae.options_of_run(defaults, given, "stage two")
    if args.stats and not args.init:
        raise InputError("--stats: belongs to published weights; name these with --init")
    if args.init and "model" in given and resumed is None:
        raise InputError("--model: --init decides the shape of the network; leave --model out")
    return args, given, resumed

def fill_in(args, given, device, theirs, init):
    """Choose the options that are still None, but for those that have to be tried. theirs: the
    options of stage one; init: the checkpoint of --init, or None. By default the folders are stage
    one's, so that what it held out is not trained on here."""
    if args.val is None and args.data in (None, theirs["data"]):
        args.val = theirs["val"]
    if args.data is None:
        args.data = theirs["data"]
    if "data" not in given:
        vmae.refuse_program(args.data, "name it again with --data, so that it may run")
    kind = "cpu"
    if device.type == "cuda":
        kind = "cuda"
    if args.model is None and init is not None:
        for name, row in ldm.sizes.items():
            if row["hidden_size"] == init["model_args"]["hidden_size"]:
                args.model = name
    if args.model is None:
        args.model = "small" if kind == "cuda" else "tiny"
    if kind == "cuda" and args.data is None and args.model == "small":
        kind = "cuda, faces"
    train_vmae.use_recipe(args, RECIPES[args.model, kind])
    if args.compile is None:
        args.compile = device.type == "cuda"
    if args.flip is None:
        args.flip = theirs.get("flip", True)

def names_of_classes(args, given, data, resumed):
    """The classes of the data by name, none with --no-classes. InputError if they are not those of
    the run that goes on, because labels would change their meaning."""
    classes = data.classes
    if args.no_classes:
        classes = []
    train_vmae.say_idle(given, {"drop": not classes})
    if resumed is not None and ldm.composed(resumed["classes"]) != ldm.composed(classes):
        raise InputError(f"{args.data}: has the classes {classes}, the run in {args.out} has "
                         f"{resumed['classes']}; name them as they were, or give another --out")
    return classes

def new_model(args, ae, classes, resumed, init):
    """-> (DiT, its path, a Schedule or a Flow, what a checkpoint holds beside their states). The
    weights are random, or those of --init; main loads those of the run that goes on, `resumed`."""
    start_from = resumed
    if init is not None:
        start_from = adapted(init, args, ae, classes)
    if start_from is None:
        start_from = dict(schedule={}, model_args=ldm.dit_args(args.model, ae.grid, ae.latent_dim,
                                                               len(classes)))
    model = ldm.DiT(**start_from["model_args"])
    if "ema" in start_from:                 # strict=False: the table of labels may be missing
        model.load_state_dict(start_from["ema"], strict=False)
    schedule = {"kind": "cosine", "objective": "v", **start_from["schedule"]}
    if args.schedule is not None:
        schedule["kind"] = args.schedule
    if args.objective is not None:
        schedule["objective"] = args.objective
    args.schedule = schedule["kind"]
    args.objective = schedule["objective"]
    entries = dict(model_args=start_from["model_args"], schedule=schedule, classes=classes)
    for name in ("latent_mean", "latent_std"):
        if name in start_from:
            entries[name] = start_from[name]
    return model, ldm.make_path(**schedule), entries

def adapted(ckpt, args, ae, classes):
    """The checkpoint of --init -> the same with the number of classes of this run's data.
    InputError if its latents or its schedule are others."""
    old = ckpt["model_args"]
    ldm.check_latents(args.init, ckpt, args.vmae, ae)
    kind = ckpt["schedule"].get("kind", args.schedule)     # the authors' rectified flow has none
    if args.schedule not in (None, kind):
        raise InputError(f"--schedule {args.schedule}: --init has {kind}; leave --schedule out")
    same_names = ldm.composed(ckpt["classes"]) == ldm.composed(classes)
    if len(classes) != old["num_classes"] or ("vmae" in ckpt and not same_names):
        vmae.say(f"{args.init}: its {old['num_classes']} classes are not the {len(classes)} here; "
                 f"the table of labels starts anew")
        del ckpt["ema"]["y_embedder.embedding_table.weight"]
    return {**ckpt, "model_args": dict(old, num_classes=len(classes))}

if __name__ == "__main__":
    vmae.cli(main)

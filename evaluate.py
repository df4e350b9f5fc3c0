"""Measure what the paper measures, one sub-command a figure or table.

    python evaluate.py                                  all of them, on the default runs
    python evaluate.py reconstruct --ckpt runs/vmae/last.pt --data path

Each sub-command is a function whose docstring defines its quantities; it prints a Markdown table.
"""
import argparse
import os

import torch
import torch.nn.functional as F

import vmae
from vmae import InputError

# ---------------------------------------------------------------------------------------------
# Pixel metrics. Images are compared as uint8, because that is what leaves a model.
# ---------------------------------------------------------------------------------------------

def psnr(a, b):
    """Peak signal-to-noise ratio, 10 log10(255^2 / MSE), dB -> (N,); infinite for equal images.

    a, b: (N, C, H, W) in 0..255.
    """
    mse = ((a.double() - b.double()) ** 2).mean((1, 2, 3))
    return 10 * torch.log10(255**2 / mse)


def ssim(a, b):
    """Structural similarity (Wang 2004) -> (N,), 1 for equal images. a, b: (N, C, H, W) in 0..255.

    SSIM = (2 mu_a mu_b + c1)(2 cov + c2) / ((mu_a^2 + mu_b^2 + c1)(var_a + var_b + c2)) under an
    11 x 11 Gaussian window of sigma 1.5, biased (co)variances, c1 = (.01 * 255)^2, c2 = (.03 *
    255)^2; mean over channels and over the windows that lie inside. ValueError below 11 pixels.
    """
    if min(a.shape[2:]) < 11:
        raise ValueError(f"SSIM needs images of 11 pixels or more, not {min(a.shape[2:])}")
    C = a.shape[1]
    g = torch.exp(-torch.arange(-5, 6, dtype=torch.float64, device=a.device) ** 2 / (2 * 1.5**2))
    g = g / g.sum()

    def blur(x):                                           # (N, C, H, W) -> (N, C, H-10, W-10)
        x = F.conv2d(x, g.view(1, 1, 11, 1).expand(C, 1, 11, 1), groups=C)
        return F.conv2d(x, g.view(1, 1, 1, 11).expand(C, 1, 1, 11), groups=C)

    a, b = a.double(), b.double()
    mu_a, mu_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mu_a**2, blur(b * b) - mu_b**2, blur(a * b) - mu_a * mu_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    value = ((2 * mu_a * mu_b + c1) * (2 * cov + c2)
             / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2)))
    return value.mean((1, 2, 3))


# ---------------------------------------------------------------------------------------------
# Sub-commands
# ---------------------------------------------------------------------------------------------

@torch.no_grad()
def reconstruct(args):
    """Table 1: how much of a held-out image survives encode and decode, nothing masked.

    L1 = mean |x - x_hat| with pixels in [0, 1]; PSNR and SSIM as defined above; each the mean
    over images of its value for one image. z is the posterior's mode, as at use time.
    """
    ckpt = vmae.read_checkpoint(args.ckpt, "model_args", "model", "train_args")
    ckpt = ckpt.get("vmae", ckpt)           # a stage-two file holds its stage one
    trained = ckpt["train_args"]
    device, size = vmae.pick_device(args.device), ckpt["model_args"]["img_size"]
    if args.data is not None:
        data = vmae.ImageFolder(args.data, size)
    else:
        data = vmae.open_images(trained["data"], size, "val", trained["val"])
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))  # mixes classes
    data = torch.utils.data.Subset(data, order[:args.n].tolist())
    model = vmae.build_vmae(ckpt).to(device)

    scores, shown = [], []
    for x, _ in torch.utils.data.DataLoader(data, args.batch):
        x_hat = model.decode(model.encode(x.to(device)).mode())
        a, b = vmae.to_uint8(x), vmae.to_uint8(x_hat.cpu())                # float64 follows
        l1 = (a.double() - b.double()).abs().mean((1, 2, 3)) / 255
        scores.append(torch.stack([l1, psnr(a, b), ssim(a, b)]))           # (3, B)
        shown = shown or [x[:16], x_hat[:16].cpu()]
    l1, db, structure = torch.cat(scores, 1).mean(1).tolist()
    picture = os.path.join(args.out or os.path.dirname(args.ckpt) or ".", "reconstruct.png")
    os.makedirs(os.path.dirname(picture) or ".", exist_ok=True)
    vmae.save_grid(shown, picture)
    print(f"\nReconstruction of {len(data)} held-out images of {size} px (Table 1); "
          f"original above reconstruction in {picture}\n\n"
          f"| checkpoint | L1 | PSNR | SSIM |\n|---|---|---|---|\n"
          f"| {args.ckpt} | {l1:.4f} | {db:.2f} | {structure:.3f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s [command]")
    commands = parser.add_subparsers(dest="command", metavar="reconstruct")
    sub = commands.add_parser("reconstruct", help="Table 1: L1, PSNR, SSIM")
    add = sub.add_argument
    add("--ckpt", default="runs/vmae/last.pt", help="stage-one checkpoint (default: %(default)s)")
    add("--data", help="folder of images, all of them used (default: those held out in training)")
    add("--n", type=int, default=1000, help="images at the most (default: %(default)s)")
    add("--batch", type=int, default=64, help="images at a time (default: %(default)s)")
    add("--device", default="auto", help="cuda, cpu, mps... (default: cuda if there is one)")
    add("--out", help="folder of the picture (default: beside the checkpoint)")
    args = parser.parse_args()
    if args.command is None:                # no arguments: everything, with its defaults
        args = parser.parse_args(["reconstruct"])
    for name in ("n", "batch"):
        if not getattr(args, name) > 0:
            raise InputError(f"--{name} must be above 0, not {getattr(args, name)}")
    reconstruct(args)


if __name__ == "__main__":
    vmae.cli(main)

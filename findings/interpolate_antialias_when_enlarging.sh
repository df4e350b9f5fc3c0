#!/usr/bin/env bash
# F.interpolate, bicubic: antialias=True changes enlarging too, because it is another cubic.
#
# Version: torch 2.13.0; pillow 13.0.0 for comparison.
# Guess: antialias widens the filter when shrinking and does nothing when enlarging, as for bilinear
#   (equal to 1e-6); the documentation speaks of "downsampling" only.
# Seen: 8 x 8 enlarged to 16 x 16 differs by up to .05 of the range: without antialias the cubic has
#   a = -.75, with it a = -.5. Pillow's bicubic is the second one, to 1e-5.
# Why it matters: low-resolution inputs, position tables and baselines of super-resolution are
#   enlarged this way. "Bicubic" is two methods in one function, and PSNR tables are not the same.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6 pillow==13.0.0
"$folder/bin/python" - <<'END'
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))

def enlarged(mode, antialias):
    return F.interpolate(x, size=(16, 16), mode=mode, antialias=antialias)

for mode in ("bilinear", "bicubic"):
    difference = (enlarged(mode, True) - enlarged(mode, False)).abs().max().item()
    print(f"{mode}: with and without antialias differ by {difference:.2g}")
    if mode == "bilinear":
        assert difference < 1e-6
    else:
        assert difference > 0.03
by_pillow = Image.fromarray(x[0, 0].numpy()).resize((16, 16), Image.Resampling.BICUBIC)
by_pillow = torch.from_numpy(np.array(by_pillow))
assert (enlarged("bicubic", True)[0, 0] - by_pillow).abs().max() < 1e-5
assert (enlarged("bicubic", False)[0, 0] - by_pillow).abs().max() > 0.03
END

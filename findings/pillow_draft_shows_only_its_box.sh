#!/usr/bin/env bash
# A JPEG that Pillow drafts is a little larger than the picture; the picture is the box.
#
# Version: pillow 13.0.0.
# Guess: after im.draft("RGB", size) the image is the whole picture at 1/2, 1/4 or 1/8, so that
#   im.resize(size) gives what resizing the full image gives, but faster.
# Seen: sides are rounded up, from 1,001 x 601 to 126 x 76 at 1/8, while the picture covers 125.125
#   x 75.125 of it. draft returns this box. Resizing without it shrinks the picture by .7 % towards
#   one corner: 22 dB of PSNR against the full resize, and 46 dB with the box.
# Why it matters: the fast way to load large photographs shifts training images by up to a pixel,
#   differently for each size of file. Image.thumbnail uses the box; one's own draft must too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile pillow==13.0.0 numpy==2.4.6
cd "$folder"
bin/python - <<'END'
import numpy as np
from PIL import Image

y, x = np.mgrid[:601, :1001]
pattern = 127 + 60 * np.sin(x / 12) + 60 * np.sin(y / 12)
Image.fromarray(pattern.astype(np.uint8)).convert("RGB").save("a.jpg", quality=98)
size = (100, 60)

def psnr(a, b):
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    return 10 * np.log10(255**2 / (difference**2).mean())

full = Image.open("a.jpg").convert("RGB").resize(size, Image.Resampling.LANCZOS)
drafted = Image.open("a.jpg")
mode, box = drafted.draft("RGB", size)
print("drafted:", drafted.size, "box:", box)
assert drafted.size == (126, 76)
assert box == (0, 0, 125.125, 75.125)
without = psnr(drafted.resize(size, Image.Resampling.LANCZOS), full)
with_box = psnr(drafted.resize(size, Image.Resampling.LANCZOS, box=box), full)
print(f"PSNR without the box {without:.1f} dB, with it {with_box:.1f} dB")
assert with_box > without + 15
END

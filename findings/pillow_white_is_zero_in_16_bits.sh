#!/usr/bin/env bash
# Pillow inverts a TIFF whose white is zero if it has 8 bits, but not if it has 16.
#
# Version: pillow 13.0.0; tifffile 2026.3.3 writes the files.
# Guess: the tag PhotometricInterpretation = 0 (white is zero) is honoured for every depth, so that
#   a large value in the array is a bright pixel.
# Seen: of 8 bits the array comes inverted, 0 -> 255; of 16 bits it comes as it is stored, 0 -> 0,
#   in the same mode "I;16" as a file whose black is zero. Nothing is reported.
# Why it matters: scans, X-rays and microscopy come this way, and a folder that mixes both kinds
#   trains on negatives beside positives. Look at im.tag_v2[262] before using 16 bits.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile pillow==13.0.0 tifffile==2026.3.3 numpy==2.4.6
cd "$folder"
bin/python - <<'END'
import numpy as np
import tifffile
from PIL import Image

stored = np.arange(256, dtype=np.uint16).reshape(16, 16)
for photometric in ("minisblack", "miniswhite"):
    tifffile.imwrite(f"8_{photometric}.tif", stored.astype(np.uint8), photometric=photometric)
    tifffile.imwrite(f"16_{photometric}.tif", stored * 257, photometric=photometric)

def read(name):
    image = Image.open(name)
    print(f"{name:20} mode {image.mode:5} first {np.asarray(image)[0, 0]}")
    return np.asarray(image).astype(int)

assert (read("8_minisblack.tif") == stored).all()
assert (read("8_miniswhite.tif") == 255 - stored.astype(int)).all()        # inverted, as it should
assert (read("16_minisblack.tif") == stored.astype(int) * 257).all()
assert (read("16_miniswhite.tif") == stored.astype(int) * 257).all()       # not inverted
assert Image.open("16_miniswhite.tif").tag_v2[262] == 0    # though Pillow has read the tag
END

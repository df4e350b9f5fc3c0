#!/usr/bin/env bash
# scipy's gaussian_filter makes uint8 images one level darker.
#
# Version: scipy 1.17.1.
# Guess: a blur keeps the mean; of a uint8 image the result is rounded, so it stays within half a
#   level of the float result and is right on average.
# Seen: each axis is filtered by itself, written as uint8 and cut off, not rounded. Two axes lose
#   half a level each: the mean of noise falls by 1.00 levels, single pixels by up to 1.8. A
#   constant image stays as it is, so the usual check does not show it.
# Why it matters: degraded inputs for denoising, deblurring or super-resolution get a brightness
#   that the model learns to undo, and 1 level of bias alone bounds PSNR at 48 dB. Filter float.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile scipy==1.17.1 numpy==2.4.6
"$folder/bin/python" - <<'END'
import numpy as np
from scipy.ndimage import gaussian_filter

image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
for sigma in (1, 2, 4):
    of_uint8 = gaussian_filter(image, (sigma, sigma, 0))
    of_float = gaussian_filter(image.astype(np.float64), (sigma, sigma, 0))
    error = of_uint8 - of_float
    print(f"sigma {sigma}: {error.mean():.3f} in the mean, {error.min():.2f} to {error.max():.2f}")
    assert -1.05 < error.mean() < -0.95
    assert error.max() < 0.01
    assert error.min() < -1.5
    assert abs(of_float.mean() - image.mean()) < 0.1       # a blur in float keeps the mean
constant = np.full((64, 64), 200, np.uint8)
assert (gaussian_filter(constant, 2) == 200).all()
END

#!/usr/bin/env bash
# The mean colour of 300 white images is .853, if numpy takes it over channels-last float32.
#
# Version: numpy 2.4.6.
# Guess: numpy sums pairwise, so float32 means are good to six digits on any axis.
# Seen: pairs are only used along the axis that is next to itself in memory. Over the others numpy
#   adds one row after another, and a float32 sum of ones stops at 2**24 = 16,777,216: of
#   300 x 256 x 256 pixels the mean is 16,777,216 / 19,660,800 = .8533. Channels first give 1.
# Why it matters: the mean and the standard deviation of a data set, or of latents, are computed
#   once and then used for ever. From 256 images of 256 px on they are quietly too small; of uniform
#   noise the standard deviation is 1.2 % too small. mean(..., dtype=np.float64) is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile numpy==2.4.6
"$folder/bin/python" - <<'END'
import numpy as np

white = np.ones((300, 256, 256, 3), np.float32)
print("channels last: ", white.mean((0, 1, 2)))
print("channels first:", white.reshape(300, 3, 256, 256).mean((0, 2, 3)))
assert np.allclose(white.mean((0, 1, 2)), 2**24 / white[..., 0].size, atol=1e-6)
assert np.allclose(white.reshape(300, 3, 256, 256).mean((0, 2, 3)), 1, atol=1e-6)
assert np.allclose(white.mean((0, 1, 2), dtype=np.float64), 1, atol=1e-12)
assert abs(white.mean() - 1) < 1e-6         # over all axes it is right

noise = np.random.default_rng(0).random((300, 256, 256, 3), np.float32)
ratio = noise.std((0, 1, 2)) / noise.std((0, 1, 2), dtype=np.float64)
print("standard deviation of noise, against float64:", ratio)
assert (ratio < 0.995).all()
END

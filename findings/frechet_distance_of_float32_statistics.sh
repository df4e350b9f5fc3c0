#!/usr/bin/env bash
# pytorch-fid and clean-fid, given statistics in float32 of fewer images than features, are wrong.
#
# Version: pytorch-fid 0.3.0, clean-fid 0.1.35, scipy 1.17.1.
# Guess: float32 has seven digits, so the distance has five or six; and rank below the number of
#   features is no matter, as both have a path for singular products.
# Seen: with 64 images of 512 features, X against 1.2 X, which has a closed form, the distance is
#   2.3 % too low (in float64 1e-6). The root of an eigenvalue of 0 that rounding moved to 1e-7 is
#   3e-4, and there are hundreds of them. With features 20 times as large a ValueError ends it,
#   as the check for imaginary parts has an absolute tolerance.
# Why it matters: statistics are kept in .npz files, and float32 halves them. FID of small sets,
#   for one class or in the course of training, then looks better than it is. Convert before use.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile scipy==1.17.1 numpy==2.4.6 pillow==13.0.0 \
    tqdm==4.70.1 requests==2.34.2
"$folder/bin/pip" install --quiet --no-compile --no-deps pytorch-fid==0.3.0 clean-fid==0.1.35
"$folder/bin/python" -W ignore - <<'END'
import sys
from unittest import mock
import numpy as np

# Both compute the distance by numpy and scipy alone; their networks, which want torch, stay out.
for name in ("torch", "torch.nn", "torch.nn.functional", "torch.utils", "torch.utils.data",
             "torchvision", "torchvision.transforms", "torchvision.models"):
    sys.modules[name] = mock.MagicMock()
sys.modules["pytorch_fid.inception"] = mock.MagicMock()
sys.modules["cleanfid.features"] = mock.MagicMock()
from cleanfid.fid import frechet_distance
from pytorch_fid.fid_score import calculate_frechet_distance

rng = np.random.default_rng(0)
mixing = 0.05 * rng.normal(size=(512, 512)) * np.exp(-np.arange(512) / 80)[:, None]
X = np.abs(rng.normal(size=(64, 512)) @ mixing)
for scale in (1, 20):
    a = scale * X
    b = 1.2 * a
    float64 = [a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False)]
    float32 = [s.astype(np.float32) for s in float64]
    exact = 0.2**2 * ((a.mean(0) ** 2).sum() + np.trace(float64[1]))
    for distance in (calculate_frechet_distance, frechet_distance):
        assert abs(distance(*float64) / exact - 1) < 1e-5
        try:
            error = distance(*float32) / exact - 1
            print(f"{distance.__module__}: {100 * error:.2f} %")
            assert scale == 1 and error < -0.005
        except ValueError as complaint:
            print(f"{distance.__module__}: {complaint}")
            assert scale == 20 and "Imaginary" in str(complaint)
END

#!/usr/bin/env bash
# torch-fidelity's precision and recall are both 1, the best, for features far from the origin.
#
# Version: torch-fidelity 0.4.0, prdc 0.2 for comparison, torch 2.13.0.
# Guess: precision and recall are made of distances, so adding a constant to all features changes
#   nothing that one would see.
# Seen: of 64 features with a standard deviation of 1, precision is .13 and recall .98. With 1,000
#   added to all, precision is .21; with 3,000 both are 1. torch.cdist computes x.x + y.y - 2 x.y in
#   float32, where nothing is left of the distances. prdc, by scikit-learn, works in float64 inside
#   and stays at .13 and .98.
# Why it matters: features of one's own network are not centred, and the fault gives the score of a
#   perfect generator. Subtract the mean of the real features from both sets.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6 scipy==1.17.1 \
    scikit-learn==1.9.1 pillow==13.0.0 tqdm==4.70.1
"$folder/bin/pip" install --quiet --no-compile --no-deps torch-fidelity==0.4.0 prdc==0.2
"$folder/bin/python" - <<'END'
import sys
from unittest import mock
import torch

# torch-fidelity imports torchvision for its networks, which are not needed here.
for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.models",
             "torchvision.transforms.functional"):
    sys.modules[name] = mock.MagicMock()
from prdc import compute_prdc
from torch_fidelity.metric_prc import calculate_precision_recall_full

torch.manual_seed(0)
real = torch.randn(400, 64)
fake = 1.2 * torch.randn(400, 64)
for offset in (0, 1000, 3000):
    a = real + offset
    b = fake + offset
    # Its first result is the share of the first argument inside the manifold of the second.
    recall, precision = (float(share) for share in calculate_precision_recall_full(a, b))
    other = compute_prdc(a.numpy(), b.numpy(), 3)
    print(f"+ {offset}: torch-fidelity {precision:.3f} {recall:.3f}, "
          f"prdc {other['precision']:.3f} {other['recall']:.3f}")
    assert abs(other["precision"] - 0.13) < 0.02 and abs(other["recall"] - 0.983) < 0.02
    if offset == 0:
        assert abs(precision - 0.13) < 0.02 and abs(recall - 0.983) < 0.02
    if offset == 3000:
        assert precision > 0.99 and recall > 0.99
END

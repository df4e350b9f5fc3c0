#!/usr/bin/env bash
# Muon's update for a gradient of rank 1 is mostly rounding noise, because it works in bfloat16.
#
# Version: torch 2.13.0, torch.optim.Muon, on a CPU.
# Guess: Muon replaces the gradient u s v^T by about u v^T; of a gradient of rank 1 the update has
#   rank 1 too, and points in its direction (cosine above .99).
# Seen: the cosine is .52 to .54 in square matrices of 64, 256 and 512. Each of the five
#   Newton-Schulz steps multiplies small singular values by 3.4, so the rounding of bfloat16 grows
#   480 times, and many directions that the gradient does not have end up half as large as u v^T.
#   The same polynomial in float64 gives rank 1.
# Why it matters: embeddings of few classes, conditioning layers at small batches, and batches of
#   few tokens have gradients of low rank. There Muon moves weights in random directions.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile torch==2.13.0
"$folder/bin/python" - <<'END'
import torch

def cosine(a, b):
    return ((a * b).sum() / (a.norm() * b.norm())).item()

def by_hand(g):                             # Muon's five steps, in the precision of g
    x = g / g.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x

for n in (64, 256, 512):
    torch.manual_seed(0)
    gradient = torch.randn(n, 1) @ torch.randn(1, n)
    w = torch.nn.Parameter(torch.zeros(n, n))
    w.grad = gradient.clone()
    torch.optim.Muon([w], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()
    of_muon = cosine(-w.detach(), gradient)
    of_float64 = cosine(by_hand(gradient.double()), gradient.double())
    print(f"{n}: cosine with the gradient {of_muon:.3f}, in float64 {of_float64:.6f}")
    assert 0.4 < of_muon < 0.7
    assert of_float64 > 0.9999
END

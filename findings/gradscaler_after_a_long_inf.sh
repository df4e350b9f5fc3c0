#!/usr/bin/env bash
# GradScaler's scale has no floor: after 166 bad steps it is 0, and then it writes NaN into weights.
#
# Version: torch 2.13.0, on a CPU.
# Guess: while gradients are infinite every step is skipped; when they are sound again the scale
#   grows back, and whatever happens, no step is taken with a gradient that is not finite.
# Seen: each bad step halves the scale, down to exactly 0. In the next sound step the scaled
#   gradient is 0, which passes for finite; unscaling multiplies it by 1 / 0, and the step is taken
#   with NaN. The scale stays 0 for ever.
# Why it matters: a loss that overflows for some minutes, as after a resume with a wrong learning
#   rate, ruins weights that were untouched until then, by the tool that should protect them. Stop
#   a run whose scale falls below 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile torch==2.13.0
"$folder/bin/python" - <<'END'
import torch

w = torch.nn.Parameter(torch.ones(1))
optimizer = torch.optim.SGD([w], lr=0.1)
scaler = torch.amp.GradScaler("cpu")

def train(n, x):
    for _ in range(n):
        optimizer.zero_grad()
        scaler.scale((w * x).sum()).backward()
        scaler.step(optimizer)
        scaler.update()

train(165, float("inf"))
assert 0 < scaler.get_scale() < 1e-44
train(1, float("inf"))
assert scaler.get_scale() == 0
assert w.item() == 1                        # so far every bad step was skipped
train(1, 1.0)                               # a sound step
print("scale:", scaler.get_scale(), "weight:", w.item())
assert w.isnan().all()
train(5000, 1.0)                            # longer than the 2,000 steps after which it grows
assert scaler.get_scale() == 0
END

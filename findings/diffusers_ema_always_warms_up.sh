#!/usr/bin/env bash
# diffusers' EMAModel warms up though use_ema_warmup=False, and takes 90,000 steps to reach .9999.
#
# Version: diffusers 0.42.1, torch 2.13.0.
# Guess: without the warm-up the decay is the one that was given, from the first step on.
# Seen: it is (1 + step) / (10 + step) until that passes the given decay: .18 in step 2, .991 after
#   1,000 steps, .9991 after 10,000. use_ema_warmup=True only chooses another curve.
# Why it matters: decays of .999 and .9999 give the same average for the first 9,000 steps, so a
#   comparison of decays in short runs compares nothing, and papers' "no warm-up" is not this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
"$folder/bin/python" -W ignore - <<'END'
import torch
from diffusers.training_utils import EMAModel

def average(decay, steps):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(()))
    ema = EMAModel([weight], decay=decay, use_ema_warmup=False)
    for _ in range(steps):
        with torch.no_grad():
            weight.add_(torch.randn(()))    # a random walk
        ema.step([weight])
    return ema.shadow_params[0].item(), ema.cur_decay_value

for decay in (0.999, 0.9999):
    print(f"decay {decay}: average and decay after 1,000 steps", average(decay, 1000))
a, decay_a = average(0.999, 1000)
b, decay_b = average(0.9999, 1000)
assert a == b and decay_a == decay_b        # the given decay has not been used yet
assert abs(decay_a - 1000 / 1009) < 1e-9
ema = EMAModel([torch.nn.Parameter(torch.zeros(()))], decay=0.9999, use_ema_warmup=False)
assert ema.get_decay(80_000) < 0.9999
assert ema.get_decay(100_000) == 0.9999
END

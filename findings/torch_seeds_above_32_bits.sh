#!/usr/bin/env bash
# torch.manual_seed takes 64 bits, but a CPU generator uses only the lower 32 of them.
#
# Version: torch 2.13.0, on a CPU.
# Guess: two different 64-bit seeds give two different streams, as in numpy's default_rng.
# Seen: seeds 7 and 2**32 + 7 give the same numbers, though initial_seed() keeps all 64 bits, so
#   that nothing in a log tells the two runs apart.
# Why it matters: whoever packs several numbers into one seed, as in (rank << 32) + step, gets the
#   same noise, masks and batches in every process, and "five seeds" can be one run five times.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6
"$folder/bin/python" - <<'END'
import numpy as np
import torch

def draws(seed):
    g = torch.Generator().manual_seed(seed)
    assert g.initial_seed() == seed         # the generator says that it has the whole seed
    return torch.randn(1000, generator=g), torch.randperm(50, generator=g)

noise, order = draws(7)
for rank in (1, 2, 1000):
    other_noise, other_order = draws((rank << 32) + 7)
    assert torch.equal(noise, other_noise)
    assert torch.equal(order, other_order)
assert not torch.equal(noise, draws(8)[0])  # the lower bits do count

a = np.random.default_rng(7).random()
b = np.random.default_rng(2**32 + 7).random()
assert a != b                               # numpy mixes all bits of a seed
print("as found: seeds that differ above bit 31 give the same numbers")
END

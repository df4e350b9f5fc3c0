#!/usr/bin/env bash
# Reading a DataLoader that shuffles nothing and has no workers changes torch's random numbers.
#
# Version: torch 2.13.0.
# Guess: with shuffle=False and num_workers=0 there is nothing random in a DataLoader, so it leaves
#   the global random state alone.
# Seen: each iter() draws one number, the seed of workers that it does not have, from the global
#   generator. With generator=torch.Generator() it draws from that one instead.
# Why it matters: validating more often, or asking next(iter(loader)) for a preview, changes all
#   noise, masks and dropout that follow: two runs of one seed differ by how they are watched.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile torch==2.13.0
"$folder/bin/python" -W ignore - <<'END'
import torch
from torch.utils.data import DataLoader, TensorDataset

data = TensorDataset(torch.arange(8.0))

def noise_after_reading(times, **options):
    torch.manual_seed(0)
    for _ in range(times):
        for _ in DataLoader(data, batch_size=4, shuffle=False, num_workers=0, **options):
            pass
    return torch.randn(4)

never = noise_after_reading(0)
once = noise_after_reading(1)
twice = noise_after_reading(2)
print(never, once, twice, sep="\n")
assert not torch.equal(never, once)
assert not torch.equal(once, twice)
assert torch.equal(never, noise_after_reading(2, generator=torch.Generator()))
END

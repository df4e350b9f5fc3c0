#!/usr/bin/env bash
# torch.randn from one seed: how the numbers begin depends on how many are asked for.
#
# Version: torch 2.13.0, on a CPU.
# Guess: randn(17) begins with the numbers with which randn(32) begins, as rand does and as numpy's
#   generators do; and randn_like(x) is randn(x.shape), whatever the memory format of x.
# Seen: they agree only if both counts are multiples of 16 or beyond the last 16 numbers. Below 16
#   another method is used, and of 17 numbers the last 16 are drawn a second time. randn_like of a
#   channels_last tensor gives other numbers altogether, not the same ones at other places.
# Why it matters: "the first image is the same for every batch size" fails for small latents, and a
#   run switched to channels_last is another run. Draw with a fixed shape, contiguous, and cut.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6
"$folder/bin/python" - <<'END'
import numpy as np
import torch

def seeded(draw, n):
    return draw(n, generator=torch.Generator().manual_seed(0))

print("randn(17):", seeded(torch.randn, 17)[:4].tolist())
print("randn(32):", seeded(torch.randn, 32)[:4].tolist())
of_32 = seeded(torch.randn, 32)
assert torch.allclose(of_32, seeded(torch.randn, 64)[:32])             # multiples of 16 agree
differ = (seeded(torch.randn, 17) - of_32[:17]).abs() > 1e-3
assert not differ[0] and differ[1:16].all()
assert ((seeded(torch.randn, 8) - of_32[:8]).abs() > 1e-3).all()
assert torch.equal(seeded(torch.rand, 17), seeded(torch.rand, 32)[:17])
first, longer = (np.random.default_rng(0).standard_normal(n) for n in (17, 32))
assert (first == longer[:17]).all()

x = torch.empty(2, 4, 8, 8)
torch.manual_seed(0)
plain = torch.randn_like(x)
torch.manual_seed(0)
last = torch.randn_like(x.to(memory_format=torch.channels_last))
assert not torch.allclose(plain, last)
in_memory = last.permute(0, 2, 3, 1).flatten()             # in the order of its memory
assert not torch.allclose(plain.flatten(), in_memory)
assert not torch.allclose(plain.flatten().sort().values, last.flatten().sort().values)
END

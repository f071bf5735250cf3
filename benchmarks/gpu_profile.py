"""A few calls of `sample` for Nsight Compute, which reads the counters of their kernels.

    ncu --profile-from-start off python benchmarks/gpu_profile.py [ADAPTOR]...

Each adaptor draws once from 64 rows of 128,256 logits, 3 x standard normal, after a warm-up.
"""

from __future__ import annotations

import sys

import torch

from cases import GPU_ADAPTORS, make_rows
from fastadapt import sample


def main() -> int:
    """Draw, with the profiler on."""
    wanted = sys.argv[1:] or ("T+k+p", "T+p")
    rows = make_rows("normal3", 128_256, 64, seed=0)[0].cuda()
    seeds = torch.arange(len(rows), device="cuda")
    for name in filter(wanted.__contains__, GPU_ADAPTORS):
        sample(rows, GPU_ADAPTORS[name], seeds=seeds)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        sample(rows, GPU_ADAPTORS[name], seeds=seeds)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())

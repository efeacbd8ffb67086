"""Achieved bandwidth against the number of elements, below the measured ceiling of a copy.

python -m benchmarks.roofline benchmarks/results/kernels.csv kernels.png
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.kernel_rows import KernelRow, read_rows


def draw(rows: Sequence[KernelRow], path: Path) -> None:
    """Draw one panel per dtype: lines for the cases of one tensor, points for the others.

    Raises:
        ValueError: no row has a bandwidth.
        ModuleNotFoundError: matplotlib is missing (extra "bench").
    """
    measured = [r for r in rows if r.gb_per_s is not None]
    if not measured:
        raise ValueError("no row has a bandwidth: there is nothing to draw")
    import matplotlib.pyplot as plt

    dtypes = sorted({r.dtype for r in measured}, reverse=True)  # float32 first
    peers = list(dict.fromkeys(r.peer for r in measured))
    figure, axes = plt.subplots(1, len(dtypes), figsize=(6.2 * len(dtypes), 4.6), sharey=True, squeeze=False)
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        mine = [r for r in measured if r.dtype == dtype]
        ceiling = max(r.copy_gb_per_s for r in mine)
        axis.axhline(ceiling, color="black", linestyle="--", linewidth=1)
        axis.annotate(
            f"copy: {ceiling:,.0f} GB/s", (0.02, ceiling), xycoords=("axes fraction", "data"), va="bottom", fontsize=8
        )
        for number, peer in enumerate(peers):
            color = f"C{number}"
            flat = sorted((r.elements, r.gb_per_s) for r in mine if r.peer == peer and r.tensors == 1)
            others = [(r.elements, r.gb_per_s) for r in mine if r.peer == peer and r.tensors > 1]
            if flat:
                axis.plot(*zip(*flat, strict=True), color=color, marker="o", markersize=4, label=peer)
            if others:
                label = None if flat else peer
                axis.scatter(*zip(*others, strict=True), color=color, marker="x", s=26, label=label)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_ylim(top=2 * ceiling)
        axis.set_title(f"{dtype} parameters")
        axis.set_xlabel("elements")
        axis.grid(alpha=0.3, which="both", linewidth=0.4)
    axes[0][0].set_ylabel("GB/s that the equations must move")
    axes[0][0].legend(fontsize=8, loc="lower right", title="lines: one tensor; crosses: adapters", title_fontsize=8)
    machine = ", ".join(sorted({r.machine for r in measured}))
    figure.suptitle(f"One optimizer step on {machine}")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    draw(read_rows(Path(sys.argv[1])), Path(sys.argv[2]))

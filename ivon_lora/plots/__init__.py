"""Pictures of ranks, signal-to-noise ratios, budgets and calibration, as matplotlib Axes.

Every function draws into the Axes that it is given, or into a new figure made without pyplot (no global state, no
display), and returns the Axes: ``plot_ranks(optimizer).figure.savefig("ranks.pdf")``. It needs matplotlib:
``pip install 'ivon-lora[plot]'``. Colours are told apart by colour-blind readers, and nothing is told by colour alone,
so that grey prints can be read.
"""

from ivon_lora.plots.heat_map import plot_ranks
from ivon_lora.plots.history import plot_rank_history
from ivon_lora.plots.reliability import plot_reliability
from ivon_lora.plots.snr import plot_snr

__all__ = ["plot_rank_history", "plot_ranks", "plot_reliability", "plot_snr"]

"""What the optimizer computed, bit for bit, when hashes.json was last written: see `trajectories`."""

from pathlib import Path

HASHES = Path(__file__).with_name("hashes.json")

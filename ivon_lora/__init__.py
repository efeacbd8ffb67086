"""IVON for LoRA: a PyTorch optimizer with a Gaussian posterior per parameter that prunes LoRA ranks in its own step."""

from ivon_lora.adapters import LoraAdapter, find_adapters
from ivon_lora.optimizer import IVON
from ivon_lora.pruning import RankPruner

__all__ = ["IVON", "LoraAdapter", "RankPruner", "find_adapters"]
__version__ = "0.1.0"

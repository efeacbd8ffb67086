"""IVON for LoRA: a PyTorch optimizer with a Gaussian posterior per parameter that prunes LoRA ranks in its own step."""

from ivon_lora.adapters import LoraAdapter, find_adapters
from ivon_lora.evaluation import ProbabilityScores, score_probabilities
from ivon_lora.export import ExportReport, export_lora, export_saved, merge_lora
from ivon_lora.gelora import GeloraRanks, gelora_ranks
from ivon_lora.intrinsic_dimension import IntrinsicDimension, intrinsic_dimension
from ivon_lora.optimizer import IVON
from ivon_lora.posterior_file import PosteriorFile, load_posterior, save_posterior, snapshot_posterior
from ivon_lora.predict import TemperatureCurve, choose_temperature, posterior_predict
from ivon_lora.pruning import RankPruner
from ivon_lora.weight_pruning import prune_weights

__version__ = "0.1.0"

__all__ = [
    "IVON",
    "ExportReport",
    "GeloraRanks",
    "IntrinsicDimension",
    "LoraAdapter",
    "PosteriorFile",
    "ProbabilityScores",
    "RankPruner",
    "TemperatureCurve",
    "choose_temperature",
    "export_lora",
    "export_saved",
    "find_adapters",
    "gelora_ranks",
    "intrinsic_dimension",
    "load_posterior",
    "merge_lora",
    "posterior_predict",
    "prune_weights",
    "save_posterior",
    "score_probabilities",
    "snapshot_posterior",
]

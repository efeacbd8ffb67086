"""IVON for LoRA: a PyTorch optimizer with a Gaussian posterior per parameter that prunes LoRA ranks in its own step."""

from ivon_lora.export.adapter import ExportReport, export_lora, export_samples, export_saved, merge_lora
from ivon_lora.integrations.trainer import attach_trainer
from ivon_lora.lora.adapters import LoraAdapter, find_adapters
from ivon_lora.lora.rank_pruner import RankPruner
from ivon_lora.optim.ivon import IVON
from ivon_lora.optim.vadam import VAdam
from ivon_lora.posterior.input_distance import InputDistance
from ivon_lora.posterior.metrics import ProbabilityScores, score_probabilities
from ivon_lora.posterior.posterior import PosteriorFile, load_posterior, save_posterior, snapshot_posterior
from ivon_lora.posterior.predict import TemperatureCurve, choose_temperature, posterior_predict
from ivon_lora.posterior.prune_weights import prune_weights
from ivon_lora.posterior.softmax_temperature import fit_temperature
from ivon_lora.posterior.tokens import TokenScores, choose_token_temperature, fit_token_temperature, token_nll
from ivon_lora.variants.gelora import GeloraRanks, gelora_ranks
from ivon_lora.variants.intrinsic_dimension import IntrinsicDimension, intrinsic_dimension

__version__ = "0.2.0"

__all__ = [
    "IVON",
    "ExportReport",
    "GeloraRanks",
    "InputDistance",
    "IntrinsicDimension",
    "LoraAdapter",
    "PosteriorFile",
    "ProbabilityScores",
    "RankPruner",
    "TemperatureCurve",
    "TokenScores",
    "VAdam",
    "attach_trainer",
    "choose_temperature",
    "choose_token_temperature",
    "export_lora",
    "export_samples",
    "export_saved",
    "find_adapters",
    "fit_temperature",
    "fit_token_temperature",
    "gelora_ranks",
    "intrinsic_dimension",
    "load_posterior",
    "merge_lora",
    "posterior_predict",
    "prune_weights",
    "save_posterior",
    "score_probabilities",
    "snapshot_posterior",
    "token_nll",
]

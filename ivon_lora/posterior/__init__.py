"""What a trained posterior is good for: prediction, calibration, pruning of weights, files."""

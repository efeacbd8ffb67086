"""IVON for LoRA: a PyTorch optimizer with a Gaussian posterior per parameter that prunes LoRA ranks in its own step."""

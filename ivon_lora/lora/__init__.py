"""LoRA adapters, their ranks, and which of them may stay."""

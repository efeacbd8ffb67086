"""Measurements of ivon-lora beside its peers: whole optimizer steps (`step`)."""

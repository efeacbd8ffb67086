"""Adjustments for the frameworks around: one file per framework, each importable without it."""

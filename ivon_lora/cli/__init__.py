"""The command line."""

from ivon_lora.cli.main import main

__all__ = ["main"]

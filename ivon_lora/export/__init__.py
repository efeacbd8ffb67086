"""Trained adapters as files that other libraries load."""

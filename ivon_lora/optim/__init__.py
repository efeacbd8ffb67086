"""The optimizers: state, samples, steps."""

"""Does the posterior mean something, and do the defaults train? The evidence, run by run, and the report on it."""

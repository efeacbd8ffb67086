"""The verbs of the command line that work on what a run has left behind."""

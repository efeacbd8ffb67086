"""Pure functions of numpy arrays and torch tensors: what the optimizer computes, beside the papers' letters."""

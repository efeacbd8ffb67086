"""Measurements of ivon-lora beside its peers.

Times: `step` (whole steps on a CPU), `gpu` (the kernels), `offline` (what compilers make of them). Studies: `posterior`
(the worth of the posterior), `related` (methods of choosing ranks), `language_model`, `foreign` (text from elsewhere).
"""

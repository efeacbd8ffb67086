"""The optimizers. What users call is `ivon` and `vadam`; the rest, in the order of a step:

- `param_groups`, `lr_limit`: hyperparameters, their bounds, and the scalars of one update.
- `parameters`: order and state of the parameters, and the batches that backends work on. `tied`: two over one memory.
- `sampling`: a sample in the parameters, or the mean; `samples`: the samples of one step; `closures` ask for them.
- `written`, `drivers`: who else writes the parameters, by hand or with another optimizer. `modes`: and in which mode.
- `model_hooks`, `examples`: hooks that draw samples for a plain loop, and count what its gradients average over.
- `step`, `rank_pruning`: the update. `advice`: what it tells the user.
- `sharding`, `replicas`: several processes. `wrappers`: what frameworks put around an optimizer.
- `posteriors`, `metrics`, `state_dict`: what is read, logged and saved.
"""

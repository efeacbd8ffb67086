"""The optimizers. What users call is `ivon` and `vadam`; the rest, in the order of a step:

- `param_groups`, `lr_limit`: hyperparameters, their bounds, and the scalars of one update.
- `parameters`: order and state of the parameters, and the batches that backends work on. `tied`: two over one memory.
- `sampling`: a sample in the parameters, or the mean; `step_samples`: those of one step; `closures` ask for them.
- `ownership`, `outside_writes`: who else steps or writes the parameters. `guards`: against autograd and tracing.
- `model_hooks`, `example_counter`: hooks that draw samples for a plain loop, and count what its gradients average over.
- `step`, `rank_pruning`: the update. `advice`: what it tells the user.
- `sharding`, `replicas`: several processes. `wrappers`: what frameworks put around an optimizer.
- `parameter_posterior`, `metrics`, `state_dict`: what is read, logged and saved.

Words that all of them use:

- a sample is *pending* while the gradients in ``p.grad`` are taken at it; *banked*, it is part of the step's sums.
- the *seal* of a parameter is autograd's count of writes and its address: where it has changed, somebody wrote there,
  and `settle` brings that to the mean.
- an optimizer is *superseded* for a parameter that a newer one steps.
- rank masks are *soft* while pruning anneals: a masked rank may come back. They are *hard* in its final phase.
- a step with lr 0 and no sample is a *rehearsal*: torch.distributed.checkpoint makes one to see the state.
"""

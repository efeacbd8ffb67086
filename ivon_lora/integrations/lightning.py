"""Lightning: a callback for samples, checkpoints, the number of examples in a step, and logs.

It is needed in automatic optimization with accumulation or fp16, where Lightning runs closures outside of
``optimizer.step(closure)``, hence at the mean. ``optimizer.attach(self.net)`` in ``configure_optimizers`` does the same
for a module whose training passes all go through ``self.net``.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from ivon_lora.optim.example_counter import examples_in
from ivon_lora.optim.wrappers import unwrap

if TYPE_CHECKING:
    from ivon_lora.optim.ivon import IVON
    from ivon_lora.optim.model_hooks import Attachment


def ivon_callback(prefix: str = "ivon/") -> Any:
    """A Lightning callback: sample at training batches, mean in validation and checkpoints, metrics in the logs.

    Args:
        prefix: put before the keys of :meth:`IVON.metrics`, which are logged every ``log_every_n_steps`` steps.

    Returns:
        for ``Trainer(callbacks=[...])`` of ``lightning`` or, where that is not installed, of ``pytorch_lightning``.

    Raises:
        ModuleNotFoundError: neither is installed.
    """
    base: Any
    try:
        from lightning.pytorch import Callback as base
    except ModuleNotFoundError:
        try:
            from pytorch_lightning import Callback as base
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("ivon_callback() needs Lightning: pip install 'ivon-lora[lightning]'") from error
    return type("IVONCallback", (_Callback, base), {})(prefix)


class _Callback:
    """What Lightning calls; made a ``Callback`` by :func:`ivon_callback`."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._attached: list[Attachment] = []
        self._logged = 0
        self._examples: Counter[IVON] = Counter()  # of the batches since an optimizer's last step

    def on_train_start(self, trainer: Any, module: Any) -> None:
        # Lightning reads the weights of a checkpoint before it calls on_save_checkpoint: only the hooks of the
        # module itself keep samples out of it.
        self._attached = [optimizer.attach(module) for optimizer in _optimizers(trainer)]

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, *_: Any) -> None:
        for optimizer in _optimizers(trainer):
            self._examples[optimizer] += examples_in(batch if isinstance(batch, list | tuple) else [batch], {})[0]
            optimizer.train()

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        ivon = unwrap(optimizer)
        if ivon is None:
            return
        examples = self._examples.pop(ivon, 0)
        if ivon.counted_examples is None:  # no forward pass of an attached module has counted them
            ivon.count_examples(examples)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        step, every = trainer.global_step, trainer.log_every_n_steps
        if not every or step % every or step == self._logged:
            return
        self._logged = step
        for optimizer in _optimizers(trainer):
            numbers = {self._prefix + name: value for name, value in optimizer.metrics().items()}
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=step)

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        for optimizer in _optimizers(trainer):
            optimizer.eval()

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.on_validation_start(trainer, module)
        for attachment in self._attached:
            attachment.remove()
        self._attached = []


def _optimizers(trainer: Any) -> list[IVON]:
    return [optimizer for optimizer in map(unwrap, trainer.optimizers) if optimizer is not None]

"""XGBLoRA: low-rank boosters for a few layers at a time (arXiv:2410.19694)."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ivon_lora.optim.param_groups import integer
from ivon_lora.optim.sharding import local
from ivon_lora.optim.vadam import VAdam
from ivon_lora.variants.blocks import block_of
from ivon_lora.variants.chain import Chain
from ivon_lora.variants.checks import choice, fraction
from ivon_lora.variants.links import Links
from ivon_lora.variants.resting import Ranks
from ivon_lora.variants.scores import gain_of

logger = logging.getLogger(__name__)

#: steps of a booster with all layers, before those of the largest gain are chosen
PROBE = 10


class XgbLora(Chain):
    r"""In the spirit of XGBLoRA (arXiv:2410.19694): gradient boosting, whose boosters are rank-1 LoRA of a few layers.

    ``F_t = F_(t-1) + shrinkage booster_t``. A booster trains ``booster_steps`` steps on a random share of the layers,
    is added to the model for good, and the next one starts anew on other layers. A layer is a transformer block (see
    `block_of`); an adapted module outside of all is one of its own. The penalty on the norms of A and B is the
    optimizer's: AdamW's weight decay, or the prior of IVON.

    The paper's text was not available: ``booster_steps``, the weight of its penalty and the start of a booster are our
    choice, and boosters stay beside the base instead of being merged into it (``store="base"``), which rounds.

    Under VAdam ``choose="gain"`` takes layers by what they would gain, as XGBoost splits leaves: a booster probes all
    for 10 steps, and draws its own with probabilities proportional to the `gain` of their B's, without replacement. The
    others go back to B = 0. Layers that are not chosen rest: no step and no noise moves them.

    Args:
        model: with PEFT LoRA layers of rank 1 (others work, with a warning in the log).
        booster_steps: optimizer steps of a booster.
        layers: share of the layers that a booster trains, at least one layer.
        choose: "random" or "gain".
        shrinkage: in (0, 1], of a finished booster.
        warmup: steps of each booster over which the learning rate grows to the scheduler's; the first has none.
        store: "adapter" or "base", see `links`.
        compress: largest rank of the finished boosters of a module, in the store "adapter"; beyond it they become the
            nearest update of that rank, and `history` has the relative error. None: all are kept.
        adapter_name, seed: see `Variant`.

    Raises:
        ValueError: an argument outside its bounds, a layer that takes no links.
    """

    saved = (*Chain.saved, "chosen")

    def __init__(
        self,
        model: nn.Module,
        *,
        booster_steps: int = 50,
        layers: float = 1 / 3,
        choose: str = "random",
        shrinkage: float = 1.0,
        warmup: int = 5,
        store: str = "adapter",
        compress: int | None = None,
        adapter_name: str = "default",
        seed: int = 0,
    ) -> None:
        super().__init__(model, store=store, warmup=warmup, adapter_name=adapter_name, seed=seed)
        self.choose = choice("choose", choose, ("random", "gain"))
        low = PROBE + 1 if choose == "gain" else 1
        self.booster_steps = integer("booster_steps", booster_steps, low=low)
        self.layers, self.shrinkage = fraction("layers", layers), fraction("shrinkage", shrinkage)
        self.compress = None if compress is None else integer("compress", compress)
        if any(adapter.rank > 1 for adapter in self.adapters):
            logger.warning("XGBLoRA's boosters have rank 1; take LoraConfig(r=1), and lora_alpha for their scale")
        self.blocks: dict[str, list[Links]] = {}
        for links in self.links:
            self.blocks.setdefault(block_of(model, links.name) or links.name, []).append(links)
        self.chosen = self._first_choice()

    def check(self, optimizer: Optimizer) -> None:
        """See `Variant.check`."""
        if self.choose == "gain" and not isinstance(optimizer, VAdam):
            raise ValueError("choose='gain' reads curvatures of the size of a batch; take VAdam, or choose='random'")

    def age(self) -> int:
        """See `Chain.age`."""
        return self.warmup if self.step < self.booster_steps else self.step % self.booster_steps

    def after_step(self) -> None:
        """Choose layers after the probe, and start the next booster after the last step of one."""
        super().after_step()
        if self.choose == "gain" and self.step % self.booster_steps == PROBE:
            self._choose_by_gain()
        if self.step % self.booster_steps == 0:
            self._finish()
            self.chosen = self._first_choice()

    # ---------------------------------------------------------------- boosters

    def _links(self, chosen: bool) -> list[Links]:
        return [links for name, inside in self.blocks.items() if (name in self.chosen) is chosen for links in inside]

    def at_rest(self) -> list[Ranks]:
        """See `Variant.at_rest`: layers that the booster does not train."""
        return [
            (p, d, torch.ones(k.rank, dtype=torch.bool)) for k in self._links(False) for d, p in enumerate(k.live())
        ]

    def _first_choice(self) -> list[str]:
        return self._largest(self.normals((len(self.blocks),))) if self.choose == "random" else list(self.blocks)

    def _largest(self, scores: Tensor) -> list[str]:
        count = max(1, round(self.layers * len(self.blocks)))
        best = set(scores.argsort(descending=True, stable=True)[:count].tolist())
        return [name for index, name in enumerate(self.blocks) if index in best]

    def _finish(self) -> None:
        lost = 0.0
        for index, links in enumerate(self._links(True)):
            lost = max(lost, links.finish(self.shrinkage))
            self.restart(*links.live(), index)
            if self.compress is not None and links.store == "adapter" and len(links.A) > self.compress:
                lost = max(lost, links.compress(self.compress))
        for links in self._links(False):
            self.forget(*links.live())
        self.history.append({"step": self.step, "layers": self.chosen, "lost": lost})

    def _choose_by_gain(self) -> None:
        gains = [sum(gain_of(self.optimizer, links.live()[1]) for links in inside) for inside in self.blocks.values()]
        logs = torch.tensor(gains, dtype=torch.float64).clamp(min=1e-30).log()
        gumbel = -(-torch.special.ndtr(self.normals((len(gains),)).double()).log()).log()  # draws without replacement
        self.chosen = self._largest(logs + gumbel)
        for links in self._links(False):
            local(links.live()[1]).detach().zero_()
            self.forget(*links.live())

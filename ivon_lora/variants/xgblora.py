"""XGBLoRA: low-rank boosters for a few layers at a time (arXiv:2410.19694)."""

from __future__ import annotations

import logging
from dataclasses import KW_ONLY, dataclass

import torch

from ivon_lora.optim.param_groups import integer as at_least
from ivon_lora.optim.sharding import local
from ivon_lora.optim.vadam import VAdam
from ivon_lora.variants.chain import Chain
from ivon_lora.variants.gradients import gain_of
from ivon_lora.variants.layers import best, block_of
from ivon_lora.variants.links import Links
from ivon_lora.variants.options import choice, fraction, integer, state
from ivon_lora.variants.resting import Ranks, all_ranks

logger = logging.getLogger(__name__)

#: steps of a booster with all layers, before those of the largest gain are chosen
PROBE = 10


@dataclass(eq=False, repr=False)
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
        model, adapter_name, seed: see `Variant`; warmup, store: see `Chain`. The log warns of other ranks than 1.
        booster_steps: optimizer steps of a booster.
        layers: share of the layers that a booster trains, at least one layer.
        choose: "random" or "gain".
        shrinkage: in (0, 1], of a finished booster.
        compress: largest rank of the finished boosters of a module, in the store "adapter"; beyond it they become the
            nearest update of that rank, and ``history`` has the relative error. 0: all are kept.
    """

    _: KW_ONLY
    booster_steps: int = integer(50)
    layers: float = fraction(1 / 3)
    choose: str = choice("random", needs={"gain": VAdam})
    shrinkage: float = fraction(1.0)
    compress: int = integer(0, low=0)
    warmup: int = integer(5, low=0)
    chosen: list[str] = state(list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.choose == "gain":
            at_least("booster_steps", self.booster_steps, low=PROBE + 1)
        if any(adapter.rank > 1 for adapter in self.adapters):
            logger.warning("XGBLoRA's boosters have rank 1; take LoraConfig(r=1), and lora_alpha for their scale")
        self._block = {links.name: block_of(self.model, links.name) or links.name for links in self.by_layer}
        self._start()

    def after_step(self) -> None:
        """Choose layers after the probe, and start the next booster after the last step of one."""
        super().after_step()
        if self.choose == "gain" and self.step % self.booster_steps == PROBE:
            self._choose_by_gain()
        if self.step % self.booster_steps == 0:
            lost = self.link(self._links(chosen=True), self.shrinkage)
            for links in self._links(chosen=True) if self.compress and self.store == "adapter" else ():
                lost = max(lost, links.compress(self.compress)) if len(links.A) > self.compress else lost
            self.history.append({"step": self.step, "layers": self.chosen, "lost": lost})
            for links in self._links(chosen=False):
                self.forget(*links.live())
            self._start()

    def at_rest(self) -> list[Ranks]:
        """Layers that the booster does not train."""
        return all_ranks(a for a in self.adapters if self._block[a.name] not in self.chosen)

    def _links(self, chosen: bool) -> list[Links]:
        return [links for links in self.by_layer if (self._block[links.name] in self.chosen) is chosen]

    def _start(self) -> None:
        blocks = list(dict.fromkeys(self._block.values()))
        draws = dict(zip(blocks, self.normals((len(blocks),)).tolist(), strict=True))
        self.chosen = best(draws, self.layers) if self.choose == "random" else blocks

    def _choose_by_gain(self) -> None:
        gains = dict.fromkeys(self._block.values(), 0.0)
        for links in self.by_layer:
            gains[self._block[links.name]] += gain_of(self.optimizer, links.live()[1])
        logs = torch.tensor(list(gains.values()), dtype=torch.float64).clamp(min=1e-30).log()
        gumbel = -(-torch.special.ndtr(self.normals((len(gains),)).double()).log()).log()  # draws without replacement
        self.chosen = best(dict(zip(gains, (logs + gumbel).tolist(), strict=True)), self.layers)
        for links in self._links(chosen=False):
            local(links.live()[1]).detach().zero_()
            self.forget(*links.live())

"""BeamLoRA: important ranks take the place of unimportant ones (arXiv:2502.13604)."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ivon_lora.lora.adapters import LoraAdapter
from ivon_lora.optim.ivon import IVON
from ivon_lora.optim.param_groups import integer
from ivon_lora.optim.sharding import local, part_of, whole
from ivon_lora.variants.checks import at_least, choice, fraction, steps
from ivon_lora.variants.gates import Gates, merged, softmax
from ivon_lora.variants.resting import whole_values, write_values
from ivon_lora.variants.scores import rank_snr
from ivon_lora.variants.variant import Variant

PARENTS, MERGES, SCORES = ("cached", "now"), ("average", "sum"), ("gate", "snr")


class BeamLora(Variant):
    r"""BeamLoRA (arXiv:2502.13604): ``dW = s B diag(w) A``, ``w = r softmax(g / temperature)``, g = 0 at the start.

    Every `interval` the importances w of all layers are pooled and sorted, and those beyond the head whose sum is at
    most ``P`` of the whole are pruned. ``1 - P`` falls from ``1 - top_p`` to 0 as a cosine until `until`. Each pruned
    rank is overwritten by one of the best of its layer, in random pairs: by its row of A and column of B, and their
    moments, as they were half an interval ago (which breaks the symmetry; the parent keeps its present ones); both
    gates become their average, and all moments of gates 0.

    Differs from the released code, whose copies of moments change a temporary tensor and are lost: here they are made.
    Parents are kept ranks only (again from the best, if they are fewer than the slots), ties go by index, and P = 1
    prunes nothing. Only the abstract and the code were at hand.

    Under IVON and VAdam ``parents="now"`` draws the child from the parent's posterior: no cache (three times the
    adapter), and the spread is as wide as the data allow. Its curvature goes with the square of its gate.
    ``merge="sum"`` shares the importance of the pair, which leaves that of all other ranks alone; the average of gates
    is the geometric mean, and changes them all. ``score="snr"`` needs no gates: a rank's SNR takes the place of w, and
    parent and child get half of the parent's column of B each.

    Args:
        model, total_steps: with PEFT LoRA layers; optimizer steps of the run.
        interval: between two allocations: a share of ``total_steps``, or steps (at least 2).
        top_p: P at the start, in (0, 1].
        until: share of ``total_steps``, or steps, after which nothing is pruned.
        temperature: of the softmax, greater than 0.
        parents, merge, score: "cached" or "now"; "average" or "sum"; "gate" or "snr".
        adapter_name, seed: see `Variant`; its ``history`` has rows with step, layer, slot and parent.

    Raises:
        ValueError: an argument outside its bounds, a layer that cannot have gates.
    """

    claims = frozenset({"gates", "masks"})
    saved = (*Variant.saved, "cache")

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        *,
        interval: int | float = 0.08,
        top_p: float = 0.95,
        until: int | float = 0.66,
        temperature: float = 0.05,
        parents: str = "cached",
        merge: str = "average",
        score: str = "gate",
        adapter_name: str = "default",
        seed: int = 0,
    ) -> None:
        super().__init__(model, adapter_name=adapter_name, seed=seed)
        self.total_steps = integer("total_steps", total_steps)
        self.interval = steps("interval", interval, total_steps, low=2)
        self.until = steps("until", until, total_steps, low=1)
        self.top_p, self.temperature = fraction("top_p", top_p), at_least("temperature", temperature, 1e-6)
        self.parents, self.merge = choice("parents", parents, PARENTS), choice("merge", merge, MERGES)
        self.score = choice("score", score, SCORES)
        self.cache: list[dict[str, dict[str, Tensor]]] = []
        link = functools.partial(softmax, temperature=temperature)
        if score == "gate":
            self.gates = Gates(model, adapter_name, [torch.zeros(a.rank) for a in self.adapters], link, temperature)

    def check(self, optimizer: Optimizer) -> None:
        """See `Variant.check`."""
        if not isinstance(optimizer, IVON) and (self.parents == "now" or self.score == "snr"):
            raise ValueError("parents='now' and score='snr' need a posterior; take IVON or VAdam, or leave them out")

    # ---------------------------------------------------------------- allocation

    def top_p_now(self) -> float:
        """P after this step."""
        share = min(self.step / self.until, 1.0)
        return 1.0 - (1.0 - self.top_p) * (1.0 + math.cos(math.pi * share)) / 2

    def importances(self) -> list[Tensor]:
        """Of each rank of each layer, as the weights are now: fp64 (r,)."""
        if self.gates is not None:
            return [self.gates.factor(i).double() for i in range(len(self.gates))]
        return [rank_snr(self.optimizer, adapter).double() for adapter in self.adapters]

    def after_step(self) -> None:
        """Allocate ranks when it is time, or remember them for the next allocation."""
        if self.step >= self.until:
            return
        into = self.step % self.interval
        if self.parents == "cached" and into == self.interval - self.interval // 2:
            self.cache = [{key: whole_values(self.optimizer, p) for key, p, _ in a.tensors()} for a in self.adapters]
        if into == 0 and self.step <= self.total_steps - self.interval:
            self._allocate()

    def _allocate(self) -> None:
        scores = self.importances()
        kept = head(torch.cat(scores), self.top_p_now()).split([len(s) for s in scores])
        for index, (adapter, score, mine) in enumerate(zip(self.adapters, scores, kept, strict=True)):
            slots = (~mine).nonzero().flatten().tolist()
            best = [k for k in score.argsort(descending=True, stable=True).tolist() if mine[k]]
            if not slots or not best:
                continue
            order = self.normals((len(slots),), index).argsort().tolist()
            for n, slot in zip(order, slots, strict=True):
                parent = best[n % len(best)]
                self._copy(index, adapter, slot, parent)
                self.history.append({"step": self.step, "layer": adapter.name, "slot": slot, "parent": parent})
            if self.gates is not None:
                values = whole_values(self.optimizer, self.gates[index])
                cleared = {n: torch.zeros_like(v) for n, v in values.items() if n not in ("", "hess", "mean")}
                write_values(self.optimizer, self.gates[index], cleared)

    def _copy(self, index: int, adapter: LoraAdapter, slot: int, parent: int) -> None:
        factor = self._merge_gates(index, slot, parent)
        for n, (key, p, dim) in enumerate(adapter.tensors()):
            now = whole_values(self.optimizer, p)
            source = self.cache[index][key] if self.parents == "cached" else now
            scale = factor if self.gates is not None else 0.5 if key == "A" else 1.0  # of the tensor's gradient
            for name, value in now.items():
                child = source.get(name, value).select(dim, parent).to(value.device).clone()
                if self.parents == "now":
                    if name in ("", "mean"):
                        std = whole(self.optimizer.posterior(p).stddev).select(dim, parent)
                        child = child + std * self.normals(tuple(child.shape), index, 1 + n + 3 * slot).to(std)
                    elif name == "hess":
                        child = value.select(dim, parent).mul_(scale**2).clone()
                    else:
                        child = torch.zeros_like(child)
                value.select(dim, slot).copy_(child)
                if self.gates is None and key == "B" and name in ("", "mean"):
                    value[:, [slot, parent]] *= 0.5
            write_values(self.optimizer, p, now)

    def _merge_gates(self, index: int, slot: int, parent: int) -> float:  # by what the parent's importance changes
        if self.gates is None:
            return 1.0
        before = self.gates.factor(index)[parent]
        gate = merged(whole(self.gates[index].detach()), slot, parent, self.merge, self.temperature)
        local(self.gates[index].detach()).copy_(part_of(self.gates[index], gate))
        return float(self.gates.factor(index)[parent] / before)


def head(scores: Tensor, share: float) -> Tensor:
    """Which scores are in the head whose sum is at most ``share`` of the whole; equal ones go by index."""
    ordered, order = scores.sort(descending=True, stable=True)
    within = ordered.cumsum(0) <= share * scores.sum() * (1 + 1e-12) if share < 1 else torch.ones_like(scores) > 0
    return torch.zeros_like(within).index_copy_(0, order, within)

"""BeamLoRA: important ranks take the place of unimportant ones (arXiv:2502.13604)."""

from __future__ import annotations

import functools
import math
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from ivon_lora.lora.adapters import LoraAdapter
from ivon_lora.optim.ivon import IVON
from ivon_lora.optim.sharding import local, part_of, whole
from ivon_lora.variants.gates import Gates
from ivon_lora.variants.gradients import rank_snr
from ivon_lora.variants.options import choice, fraction, integer, number, state, steps
from ivon_lora.variants.resting import whole_values, write_values
from ivon_lora.variants.variant import Variant


@dataclass(eq=False, repr=False)
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
        model, total_steps, adapter_name, seed: see `Variant`; ``history`` has rows with step, layer, slot and parent.
        interval: between two allocations: a share of ``total_steps``, or steps (at least 2).
        until: the same, after which nothing is pruned.
        top_p: P at the start, in (0, 1].
        temperature: of the softmax, greater than 0.
        parents, merge, score: "cached" or "now"; "average" or "sum"; "gate" or "snr".
    """

    claims = frozenset({"gates", "masks"})

    total_steps: int = integer()
    _: KW_ONLY
    interval: int | float = steps(0.08, low=2)
    top_p: float = fraction(0.95)
    until: int | float = steps(0.66, low=1)
    temperature: float = number(0.05, low=1e-6)
    parents: str = choice("cached", needs={"now": IVON})
    merge: str = choice("average", "sum")
    score: str = choice("gate", needs={"snr": IVON})
    cache: list[dict[str, dict[str, Tensor]]] = state(list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score == "gate":
            link = functools.partial(softmax, temperature=self.temperature)
            values = [torch.zeros(adapter.rank) for adapter in self.adapters]
            self.gates = Gates(self.model, self.adapter_name, values, link, self.temperature)

    def top_p_now(self) -> float:
        """P after this step."""
        share = min(self.step / self.until, 1.0)
        return 1.0 - (1.0 - self.top_p) * (1.0 + math.cos(math.pi * share)) / 2

    def importances(self) -> list[Tensor]:
        """Of each rank of each layer, as the weights are now: fp64 (r,)."""
        if self.gates is None:
            return [rank_snr(self.optimizer, adapter).double() for adapter in self.adapters]
        return [self.gates.factor(i).double() for i in range(len(self.gates))]

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
        importances = self.importances()
        kept = head(torch.cat(importances), self.top_p_now()).split([len(w) for w in importances])
        for index, (adapter, w, mine) in enumerate(zip(self.adapters, importances, kept, strict=True)):
            slots = (~mine).nonzero().flatten().tolist()
            best = [k for k in w.argsort(descending=True, stable=True).tolist() if mine[k]]
            if not slots or not best:
                continue
            order = self.normals((len(slots),), index).argsort().tolist()
            for n, slot in zip(order, slots, strict=True):
                parent = best[n % len(best)]
                self._copy(index, adapter, slot, parent)
                self.history.append({"step": self.step, "layer": adapter.name, "slot": slot, "parent": parent})
            if self.gates is not None:
                values = whole_values(self.optimizer, self.gates[index]).items()
                moments = {name: value.zero_() for name, value in values if name not in ("", "hess", "mean")}
                write_values(self.optimizer, self.gates[index], moments)

    def _copy(self, index: int, adapter: LoraAdapter, slot: int, parent: int) -> None:
        shared = 1.0 if self.gates is None else self._merge_gates(index, slot, parent)
        for n, (key, p, dim) in enumerate(adapter.tensors()):
            factor = 0.5 if self.gates is None and key == "A" else shared  # of the tensor's gradient
            now = whole_values(self.optimizer, p)
            source = self.cache[index][key] if self.parents == "cached" else now
            for name, value in now.items():
                child = source.get(name, value).select(dim, parent).to(value.device).clone()
                if self.parents == "now":
                    if name in ("", "mean"):
                        std = whole(self.optimizer.posterior(p).stddev).select(dim, parent)
                        child += std * self.normals(tuple(child.shape), index, 1 + n + 3 * slot).to(std)
                    elif name == "hess":
                        child = value.select(dim, parent).mul_(factor**2).clone()  # the parent's too
                    else:
                        child.zero_()
                value.select(dim, slot).copy_(child)
                if self.gates is None and key == "B" and name in ("", "mean"):
                    value[:, [slot, parent]] *= 0.5
            write_values(self.optimizer, p, now)

    def _merge_gates(self, index: int, slot: int, parent: int) -> float:
        """Give both ranks one gate. Returns the factor by which the parent's importance changes."""
        gates = self.gates
        assert gates is not None
        before = gates.factor(index)[parent]
        gate = whole(gates[index].detach()).clone()
        pair = gate[[slot, parent]]
        if self.merge == "sum":
            gate[[slot, parent]] = self.temperature * (torch.logsumexp(pair / self.temperature, 0) - math.log(2.0))
        else:
            gate[[slot, parent]] = pair.mean()
        local(gates[index].detach()).copy_(part_of(gates[index], gate))
        return float(gates.factor(index)[parent] / before)


def softmax(gate: Tensor, temperature: float) -> Tensor:
    """The importances r softmax(g / temperature): (r,) -> (r,), of mean 1."""
    return len(gate) * torch.softmax(gate / temperature, 0)


def head(scores: Tensor, share: float) -> Tensor:
    """Which scores are in the head whose sum is at most ``share`` of the whole; equal ones go by index."""
    ordered, order = scores.sort(descending=True, stable=True)
    within = ordered.cumsum(0) <= share * scores.sum() * (1 + 1e-12) if share < 1 else torch.ones_like(scores) > 0
    return torch.zeros_like(within).index_copy_(0, order, within)

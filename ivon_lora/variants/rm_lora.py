"""RM-LoRA: random ranks in each step, and a penalty that keeps ranks apart (arXiv:2407.12074)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from ivon_lora.lora.adapters import LoraAdapter
from ivon_lora.optim.ivon import IVON
from ivon_lora.optim.sharding import part_of, whole
from ivon_lora.variants.gradients import group_of, mean_gradients, step_sizes
from ivon_lora.variants.options import choice, integer, number
from ivon_lora.variants.resting import Ranks, zero_gradients
from ivon_lora.variants.variant import Variant


@dataclass(eq=False, repr=False)
class RmLora(Variant):
    r"""RM-LoRA (arXiv:2407.12074): in every step but the first only k of the r ranks of each layer train.

    The ranks are drawn anew in each step, uniformly, without replacement. The objective is
    ``L + c mean_M ||M M^T - I||_F``, M the ranks of A and of B as rows. Its aim is an update of higher entropy rank
    (see `entropy_rank`) at the same number of directions trained in a step.

    Differs from the released code, which from the second step on also sets the gradient of every other trained tensor
    to zero, that of a classification head among them, and draws from a generator without a seed. The penalty's gradient
    is added here, after clipping, and never to the loss. Only the abstract and the code were at hand; where they differ
    (the README draws once an epoch) this is the code.

    A gradient of zero does not stop AdamW, whose momentum moves a masked rank about 0.8 times as far as the others:
    ``exact=True`` puts it at rest. Under IVON and VAdam masked ranks always rest: they keep momentum, curvature and
    noise, since a gradient that was not used is missing, not zero. The penalty is a prior: the curvature does not see
    it, so by itself it moves no element by more than lr. ``choose="thompson"`` lets the ranks with the smallest
    ``||a_k|| ||b_k||`` of the posterior sample train, so weak and uncertain ranks get their turn.

    Args:
        model, adapter_name, seed: see `Variant`.
        ranks: k >= 1, ranks that train in a step; layers with no more than k train whole.
        orthogonality: c >= 0.
        share: A and B of a layer train the same ranks (the code's version 1); False draws for each (version 2).
        choose: "uniform" or "thompson".
        exact: masked ranks do not move at all, whatever the optimizer.
        on: the penalty is on "both", "A" or "B". It drives the columns of B to norm 1, which is large for LoRA.
    """

    claims = frozenset({"gradients", "masks"})

    _: KW_ONLY
    ranks: int = integer(2)
    orthogonality: float = number(0.1)
    share: bool = choice(True, False)
    choose: str = choice("uniform", needs={"thompson": IVON})
    exact: bool = choice(False, True)
    on: str = choice("both", "A", "B")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._held: list[Ranks] = []

    def before_step(self) -> None:
        """Add the penalty's gradient, and mask."""
        masked = self.masked()  # by the sample, which `mean_gradients` ends
        if self.orthogonality:
            self._add_penalty()
        self._held = masked if self.exact or isinstance(self.optimizer, IVON) else []
        if not self._held:
            zero_gradients(masked)

    def held(self) -> list[Ranks]:
        """Masked ranks, unless gradients of zero do."""
        return self._held

    def masked(self) -> list[Ranks]:
        """The ranks that do not train in the coming step: (tensor, rank dimension, bool (r,)) for each tensor."""
        if self.step == 0:
            return []
        found = []
        for index, adapter in enumerate(self.adapters):
            mine = self._masked_of(adapter, index, 0)
            others = mine if self.share else self._masked_of(adapter, index, 1)
            found += [(p, dim, mine if key == "A" else others) for key, p, dim in adapter.tensors()]
        return found

    def _masked_of(self, adapter: LoraAdapter, index: int, draw: int) -> Tensor:
        if self.choose == "uniform":
            order = self.normals((adapter.rank,), index, draw).argsort()
        else:
            order = rank_norms(adapter).argsort(stable=True)
        masked = torch.zeros(adapter.rank, dtype=torch.bool)
        masked[order[self.ranks :].cpu()] = True
        return masked

    def _add_penalty(self) -> None:
        if getattr(self.optimizer, "grad_scale", None) is not None:
            raise RuntimeError("the penalty would be added to scaled gradients: call scaler.unscale_(optimizer) before")
        keys = "AB" if self.on == "both" else self.on
        tensors = [(p, dim) for adapter in self.adapters for key, p, dim in adapter.tensors() if key in keys]
        with mean_gradients(self.optimizer, [p for p, _ in tensors]) as gradients:
            for p, dim in tensors:
                extra = penalty_gradient(whole(p.detach()), dim) * (self.orthogonality / len(tensors))
                if p in gradients:
                    gradients[p].add_(self._limited(p, part_of(p, extra)).to(gradients[p].dtype))

    def _limited(self, p: Tensor, gradient: Tensor) -> Tensor:
        if not isinstance(self.optimizer, IVON):  # Adam's own divisor sees it
            return gradient
        bound = float(group_of(self.optimizer, p)["lr"]) / step_sizes(self.optimizer, p)
        return gradient.minimum(bound).maximum(-bound)


def orthogonality_penalty(value: Tensor, dim: int) -> Tensor:
    """||M M^T - I||_F, (), M the ranks of a tensor, along ``dim``, as rows; AdaLoRA's too (arXiv:2303.10512)."""
    rows = value.movedim(dim, 0).flatten(1)
    return torch.linalg.norm(rows @ rows.mT - torch.eye(len(rows), device=rows.device, dtype=rows.dtype))


def penalty_gradient(value: Tensor, dim: int) -> Tensor:
    """Gradient of the penalty, in fp32 at least; 0 where the ranks are orthonormal."""
    wide = value.detach().to(torch.promote_types(value.dtype, torch.float32))
    gradient: Tensor = torch.func.grad(orthogonality_penalty)(wide, dim)
    return gradient


def entropy_rank(adapter: LoraAdapter) -> float:
    """exp(-sum p log p), p the normalised squared singular values of the update B diag(E) A.

    They are the eigenvalues of a product of r x r matrices. 0 for no update, or one that is not finite.
    """
    a, b = whole(adapter.A.detach()).double().flatten(1), whole(adapter.B.detach()).double().movedim(1, 0).flatten(1)
    if adapter.E is not None:
        b = b * whole(adapter.E.detach()).double().reshape(-1, 1)
    product = (b @ b.mT) @ (a @ a.mT)
    if not product.any() or not product.isfinite().all():
        return 0.0
    values = torch.linalg.eigvals(product).real.clamp(min=0)
    return float(torch.special.entr(values / values.sum()).sum().exp())


def rank_norms(adapter: LoraAdapter) -> Tensor:
    """||a_k|| ||b_k|| of every rank, as the parameters are now: (r,)."""
    norms = [whole(p.detach()).float().movedim(dim, 0).flatten(1).norm(dim=1) for _, p, dim in adapter.tensors()]
    return torch.stack(norms).prod(0)

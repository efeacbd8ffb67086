"""The eager backend: the equations of `functional` over blocks that fit the cache (CPU), or over whole tensors.

On CPU, small tensors are gathered into one block and large ones cut into several, so that hundreds of tensors cost a
handful of numpy passes, and large ones no large temporaries. On other devices a block is one tensor, and the arrays are
torch's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ivon_lora.backends.batch import Batch
from ivon_lora.backends.ranking import Ranking
from ivon_lora.functional._arrays import Array, library_of
from ivon_lora.functional.importance import (
    exact_sum,
    importance,
    rank_mean,
    settled_means,
    update_sensitivity,
)
from ivon_lora.functional.ivon import draw_sample, estimate_curvature, ivon_step, root_precision
from ivon_lora.functional.noise import NoiseKey, normal, normals_of_quads

#: elements of a block: its arrays (256 KiB) stay in the second-level cache
BLOCK = 1 << 16


class EagerBackend:
    """Runs on any device; methods as of `backends.Backend`."""

    name = "eager"

    def __init__(self) -> None:
        self._nonfinite: Tensor | int = 0

    def sample(self, batches: Sequence[Batch], key: NoiseKey) -> None:
        for block in _blocks(batches):
            written = block.read("param")
            mean = written
            if not block.is_exact:
                mean = library_of(mean).where(block.rounded("mean") == written, block.read("mean"), written)
            block.write("mean", mean)
            hyper = block.batch.hyper
            if hyper.is_noisy:
                eps = block.normals(key)
                active = block.active()
                eps = eps if active is None else eps * active
                mean = draw_sample(mean, block.read("hess"), eps, hyper.noise_ess, hyper.weight_decay)
            block.write("param", mean)

    def bank(self, batches: Sequence[Batch], key: NoiseKey) -> None:
        for block in _blocks(batches):
            grad = block.read("grad") * block.batch.hyper.grad_scale
            curvature = block.curvature(grad, key)
            block.write("banked_grad", block.read("banked_grad") + grad)
            block.write("banked_curvature", block.read("banked_curvature") + curvature)

    def step(
        self, batches: Sequence[Batch], key: NoiseKey | None, n_samples: int = 1, ranking: Ranking | None = None
    ) -> None:
        for block in _blocks(batches):
            observed = block.read("grad") * block.batch.hyper.grad_scale
            has_curvature = key is not None or not block.batch.hyper.needs_sample
            grad, curvature = observed, block.curvature(observed, key) if has_curvature else None
            if block.batch.banked_grad is not None:
                grad = (grad + block.read("banked_grad")) / n_samples
                curvature = None if curvature is None else (curvature + block.read("banked_curvature")) / n_samples
            active, state = block.active(), (block.read("mean"), block.read("momentum"), block.read("hess"))
            mean, momentum, hess, finite = ivon_step(*state, grad, curvature, block.batch.hyper, active)
            self._nonfinite = self._nonfinite + (~finite if active is None else ~finite & active).sum()
            for role, values in (("momentum", momentum), ("hess", hess), ("param", mean)):
                block.write(role, values)
            if not block.is_exact:
                block.write("mean", mean)
        for batch in batches:
            follow_sensitivity(batch)

    def rank_means(self, batches: Sequence[Batch], criterion: str) -> list[Tensor]:
        return [self._rank_mean(batch, n, criterion) for batch in batches for n in range(len(batch))]

    def _rank_mean(self, batch: Batch, n: int, criterion: str) -> Tensor:
        hess, dim = batch.hess[n], (batch.rank_dims or [])[n]
        assert dim is not None
        if hess.device.type != "cpu" or hess.dtype != torch.float32:
            return rank_mean(self.importances(batch, n, criterion), dim)
        ranks, inner = hess.shape[dim], hess.shape[dim + 1 :].numel()

        def pieces() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for start in range(0, hess.numel(), BLOCK):
                stop = min(start + BLOCK, hess.numel())
                block = _Block(batch, [(n, start, stop)])
                yield np.arange(start, stop) // inner % ranks, block.importance(criterion)

        sums = np.zeros(ranks)
        for owners, values in pieces():
            sums += np.bincount(owners, values, ranks)
        count = max(hess.numel(), 1) // max(ranks, 1)

        def total(rank: int) -> int:
            return sum(exact_sum(values[owners == rank]) for owners, values in pieces())

        return torch.from_numpy(settled_means(sums, count, total))

    def importances(self, batch: Batch, n: int, criterion: str) -> Tensor:
        """Importance of every element of the ``n``-th parameter, of its shape, in the state's dtype."""
        hess = batch.hess[n]
        values = _Block(batch, [(n, 0, hess.numel())]).importance(criterion)
        return (values if isinstance(values, Tensor) else torch.from_numpy(values)).view(hess.shape)

    def rank(self, batches: Sequence[Batch], ranking: Ranking) -> bool:
        return False

    def nonfinite_elements(self) -> Tensor | int:
        return self._nonfinite


@dataclass(frozen=True)
class _Block:
    """Elements ``start..stop-1`` of some parameters of a batch, as one array per role."""

    batch: Batch
    pieces: list[tuple[int, int, int]]  # number in the batch, start, stop

    @property
    def is_exact(self) -> bool:
        """Whether parameters have their state's dtype, and so are the mean in full."""
        return self.batch.param[0].dtype == self.batch.hess[0].dtype

    def _flat(self, role: str) -> list[Tensor]:
        tensors: list[Tensor] = getattr(self.batch, role)
        return [tensors[n].detach().view(-1)[start:stop] for n, start, stop in self.pieces]

    def _joined(self, pieces: list[Tensor]) -> Array:
        if self.batch.device.type != "cpu":  # where a block is one tensor
            return pieces[0]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).numpy()

    def read(self, role: str) -> Array:
        """The elements in the state's dtype: numpy on CPU."""
        dtype = self.batch.hess[0].dtype
        return self._joined([x.to(dtype) for x in self._flat(role)])

    def rounded(self, role: str) -> Array:
        """The elements of the state's dtype as the parameter's dtype rounds them."""
        dtype = self.batch.param[0].dtype
        return self._joined([x.to(dtype).to(x.dtype) for x in self._flat(role)])

    def write(self, role: str, values: Array) -> None:
        """Write the elements, rounded to the dtype of the tensors."""
        first = 0
        for flat in self._flat(role):
            piece = values[first : first + len(flat)]
            first += len(flat)
            if isinstance(piece, Tensor):
                flat.copy_(piece)
            elif flat.dtype in (torch.float32, torch.float64):
                flat.numpy()[...] = piece
            else:
                flat.copy_(torch.from_numpy(piece))

    def normals(self, key: NoiseKey) -> Array:
        """eps of the elements."""
        indices, offsets = self.batch.indices, self.batch.offsets
        if self.batch.device.type != "cpu":
            n, start, stop = self.pieces[0]
            eps = normal(key, indices[n], (stop - start,), self.batch.device, offsets[n] + start)
            return eps.to(self.batch.hess[n].dtype)
        spans = [(offsets[n] + start, offsets[n] + stop) for n, start, stop in self.pieces]
        quads = [np.arange(first >> 2, (last + 3) >> 2, dtype=np.uint64) for first, last in spans]
        owners = np.repeat(np.array([indices[n] for n, _, _ in self.pieces], np.uint64), [len(q) for q in quads])
        flat, found, begin = normals_of_quads(key, np.concatenate(quads), owners), [], 0
        for (first, last), quad in zip(spans, quads, strict=True):
            found.append(flat[begin + (first & 3) : begin + (first & 3) + last - first])
            begin += 4 * len(quad)
        return found[0] if len(found) == 1 else np.concatenate(found)

    def curvature(self, grad: Array, key: NoiseKey | None) -> Array:
        """f of the elements."""
        eps = self.normals(key) if key is not None and self.batch.hyper.needs_noise else None
        return estimate_curvature(grad, self.read("hess"), eps, self.batch.hyper)

    def importance(self, criterion: str) -> Array:
        """Importance of the elements."""
        if criterion == "sensitivity":
            return self.read("sensitivity") * self.read("uncertainty")
        mean, hess, hyper = self.read("mean"), self.read("hess"), self.batch.hyper
        with np.errstate(all="ignore"):
            return importance(criterion, mean, root_precision(hess, hyper.ess, hyper.weight_decay))

    def active(self) -> Array | None:
        """False where a pruned rank must not move; None where nothing is pruned."""
        if self.batch.rank_mask is None:
            return None
        masks, (_, _, offsets, ranks, inner) = self.batch.rank_mask, self.batch.numbers
        found = []
        for n, start, stop in self.pieces:
            mask = masks[n]
            if mask is None:
                found.append(torch.ones(stop - start, dtype=torch.bool, device=self.batch.device))
            else:
                first = int(offsets[n]) + start
                elements = torch.arange(first, first + stop - start, device=mask.device)
                found.append(mask[torch.div(elements, int(inner[n]), rounding_mode="floor") % int(ranks[n])])
        return self._joined(found)


def _blocks(batches: Sequence[Batch]) -> Iterator[_Block]:
    with np.errstate(all="ignore"):  # infinities and NaNs are what `ivon_step` looks for
        for batch in batches:
            for pieces in _pieces(batch):
                yield _Block(batch, pieces)


def _pieces(batch: Batch) -> Iterator[list[tuple[int, int, int]]]:
    """The parameters cut and gathered: pieces of at most `BLOCK` elements together, on CPU."""
    if batch.device.type != "cpu":
        yield from ([(n, 0, t.numel())] for n, t in enumerate(batch.hess))
        return
    pieces: list[tuple[int, int, int]] = []
    room = BLOCK
    for n, t in enumerate(batch.hess):
        for start in range(0, t.numel(), BLOCK):
            stop = min(start + BLOCK, t.numel())
            if stop - start > room:
                yield pieces
                pieces, room = [], BLOCK
            pieces.append((n, start, stop))
            room -= stop - start
    if pieces:
        yield pieces


def follow_sensitivity(batch: Batch) -> None:
    """Update the running means of AdaLoRA's criterion, where a parameter has them."""
    if batch.sensitivity is None or batch.uncertainty is None or batch.grad is None:
        return
    exact = batch.param[0].dtype == batch.hess[0].dtype
    for n, (sensitivity, uncertainty) in enumerate(zip(batch.sensitivity, batch.uncertainty, strict=True)):
        if sensitivity is None or uncertainty is None:
            continue
        mean = batch.param[n].detach() if exact else batch.mean[n]
        grad = batch.grad[n].to(mean.dtype)
        finite = torch.isfinite(grad)
        found = update_sensitivity(mean, grad, sensitivity, uncertainty)
        for old, new in zip((sensitivity, uncertainty), found, strict=True):
            old.copy_(torch.where(finite, new, old))

"""The CPU backend: `kernels.cpp`, called through ctypes with a table of addresses."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ivon_lora.backends.batch import Batch
from ivon_lora.backends.compiler import library
from ivon_lora.backends.eager import EagerBackend, follow_sensitivity
from ivon_lora.backends.ranking import Ranking
from ivon_lora.functional.importance import exact_sum, settled_means
from ivon_lora.functional.ivon import Hyper
from ivon_lora.functional.noise import NoiseKey

#: roles in the order of the enum `Row` of kernels.cpp, after the rows of numbers
ROLES = ("param", "mean", "momentum", "hess", "grad", "banked_grad", "banked_curvature", "rank_mask")

NUMEL, RANKS = 0, 3
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
CRITERIA = ("snr_abs", "snr", "magnitude", "inverse_std")
CURVATURES = {"price": 1, "gradsq": 2, "fisher": 3}


class CppBackend:
    """Runs fp32 and bf16 parameters on CPU; fp16, fp64 and the criterion "sensitivity" are left to the eager backend.

    Raises:
        ValueError: there is no C++ compiler, or it fails.
    """

    name = "cpp"

    def __init__(self) -> None:
        self._library = library()
        number, pointer = ctypes.c_int64, ctypes.c_void_p
        self._library.ivon_sample.argtypes = pointer, number, number, pointer, pointer
        self._library.ivon_step.argtypes = pointer, number, number, number, number, pointer, pointer
        self._library.ivon_step.restype = number
        self._library.ivon_rank_sums.argtypes = pointer, number, number, pointer, pointer
        self._eager = EagerBackend()
        self._nonfinite = 0

    def sample(self, batches: Sequence[Batch], key: NoiseKey) -> None:
        """See `Backend.sample`."""
        for batch in batches:
            if not _fits(batch):
                self._eager.sample([batch], key)
                continue
            table, dtype = _table(batch, ("param", "mean", "hess", "rank_mask")), DTYPES[batch.param[0].dtype]
            scalars, words = _scalars(batch.hyper), _words(key)
            self._library.ivon_sample(table.ctypes.data, len(batch), dtype, scalars, words)

    def bank(self, batches: Sequence[Batch], key: NoiseKey) -> None:
        """See `Backend.bank`."""
        for batch in batches:
            if _fits(batch):
                self._step(batch, key, 0)
            else:
                self._eager.bank([batch], key)

    def step(
        self, batches: Sequence[Batch], key: NoiseKey | None, n_samples: int = 1, ranking: Ranking | None = None
    ) -> None:
        """See `Backend.step`."""
        for batch in batches:
            if _fits(batch):
                self._nonfinite += self._step(batch, key, n_samples)
                follow_sensitivity(batch)
            else:
                self._eager.step([batch], key, n_samples)

    def _step(self, batch: Batch, key: NoiseKey | None, n_samples: int) -> int:
        """One step, or with 0 samples a sum over those so far; returns how many elements were skipped."""
        assert batch.grad is not None
        has_curvature = key is not None or not batch.hyper.needs_sample
        curvature = CURVATURES[batch.hyper.curvature] if has_curvature else 0
        table, dtypes = _table(batch, ROLES), (DTYPES[batch.param[0].dtype], DTYPES[batch.grad[0].dtype])
        scalars, words = _scalars(batch.hyper, n_samples), _words(key or NoiseKey(0, 0))
        return int(self._library.ivon_step(table.ctypes.data, len(batch), *dtypes, curvature, scalars, words))

    def rank_means(self, batches: Sequence[Batch], criterion: str) -> list[Tensor]:
        """See `Backend.rank_means`."""
        return [mean for batch in batches for mean in self._rank_means(batch, criterion)]

    def _rank_means(self, batch: Batch, criterion: str) -> list[Tensor]:
        if batch.hess[0].dtype != torch.float32 or criterion not in CRITERIA:
            return self._eager.rank_means([batch], criterion)
        table = _table(batch, ("mean", "hess"))
        ranks = table[RANKS].tolist()
        sums = np.zeros(sum(ranks))
        number, scalars = CRITERIA.index(criterion), _scalars(batch.hyper)
        self._library.ivon_rank_sums(table.ctypes.data, len(batch), number, scalars, sums.ctypes.data)
        counts = np.repeat(np.maximum(table[NUMEL], 1) // table[RANKS], ranks)
        owners, starts = np.repeat(np.arange(len(batch)), ranks), np.cumsum([0, *ranks])

        def total(position: int) -> int:
            n = int(owners[position])
            dim = (batch.rank_dims or [])[n]
            assert dim is not None
            values = self._eager.importances(batch, n, criterion)
            return exact_sum(values.select(dim, position - int(starts[n])).numpy())

        means = torch.from_numpy(settled_means(sums, counts, total))
        return list(means.split(ranks))

    def rank(self, batches: Sequence[Batch], ranking: Ranking) -> bool:
        """See `Backend.rank`."""
        return False

    def nonfinite_elements(self) -> Tensor | int:
        """See `Backend.nonfinite_elements`."""
        return self._nonfinite + self._eager.nonfinite_elements()


def _fits(batch: Batch) -> bool:
    return batch.param[0].dtype in DTYPES


def _table(batch: Batch, roles: Sequence[str]) -> np.ndarray:
    """int64 (13, n): `Batch.numbers`, then addresses of `ROLES`, 0 for those that are not asked for."""
    table = np.zeros((5 + len(ROLES), len(batch)), np.int64)
    table[:5] = batch.numbers
    for row, role in enumerate(ROLES, start=5):
        if role in roles and getattr(batch, role) is not None:
            table[row] = batch.addresses(role)
    return table


def _scalars(hyper: Hyper, n_samples: int = 1) -> bytes:
    """The struct `Hyper` of kernels.cpp."""
    return np.array(hyper.scalars(n_samples), np.float32).tobytes()


def _words(key: NoiseKey) -> bytes:
    """The struct `Key` of kernels.cpp."""
    return np.array([*key.philox_key, key.c1, key.step], np.uint32).tobytes()

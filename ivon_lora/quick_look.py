"""A quicker look at lists of tensors, for those who have a C++ compiler: the questions of `layout`, asked in C++.

PyTorch's own header says where a tensor's memory is, so a whole list is looked at by one loop: some 0.02 us per tensor
instead of 0.1 us for each of its attributes. Where that cannot be (no headers, a compiler that is too old, tensors that
are not ordinary ones), PyTorch is asked in Python as before, with the same answers.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from ctypes import c_int64, c_void_p, cast, pythonapi
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from ivon_lora.c_compiler import compile_function
from ivon_lora.layout import Gradients, Look, Objects, Tensors, Values, grad_of

logger = logging.getLogger(__name__)

TASKS = (
    "KEYS",
    "LAYOUT",
    "ADDRESSES",
    "PLACES",
    "TRAIN",
    "GRADIENTS",
    "RELEASE",
    "WRITTEN",
    "VERSIONS",
    "PUT",
    "VALUES",
    "ITEMS",
    "ENTRIES",
)

# An object of Python's type Tensor leads to PyTorch's TensorImpl by a word behind its header: the first, or in older
# versions the second. LAYOUT checks that it does, tensor by tensor. Its dispatch keys say what kind of tensor it is:
# anything but an ordinary one of the CPU, or of a GPU, is refused. Tensors are cold when they are looked at, and each
# leads from one place in memory to the next: hence the prefetches.
_SOURCE = r"""
#include <c10/core/TensorImpl.h>
#include <c10/util/intrusive_ptr.h>

using c10::TensorImpl;
enum { @TASKS@ };

// GCC takes a function that only prefetches for one that does nothing, and drops its calls
#define ALWAYS_INLINE static inline __attribute__((always_inline))

static TensorImpl *impl_of(int64_t object) { return ((TensorImpl **)object)[@WORD@]; }

// at::Tensor, which that header only declares, is a pointer to a TensorImpl
static TensorImpl *gradient_of(const TensorImpl &t) { return *(TensorImpl *const *)&t.grad(); }

ALWAYS_INLINE void prefetch_tensor(const void *p) {
    for (int line = 0; line < 3; ++line) __builtin_prefetch((const char *)p + 64 * line);
}

ALWAYS_INLINE void look_ahead(const int64_t *objects, int64_t i, int64_t n) {
    if (i + 12 < n) __builtin_prefetch((const void *)objects[i + 12]);
    if (i + 8 < n) prefetch_tensor(impl_of(objects[i + 8]));
    if (i + 4 < n) __builtin_prefetch(impl_of(objects[i + 4])->unsafe_storage().unsafeGetStorageImpl());
}

static bool is_usual(const TensorImpl &t, int64_t keys) { return (int64_t)t.key_set().raw_repr() == keys; }

// how many are contiguous and have the dtype of the first one
static int64_t addresses(const int64_t *objects, int64_t n, int64_t *out, int64_t keys) {
    int64_t plain = 0;
    for (int64_t i = 0; i < n; ++i) {
        look_ahead(objects, i, n);
        TensorImpl &t = *impl_of(objects[i]);
        if (!is_usual(t, keys)) return -1;
        plain += t.is_contiguous() && t.dtype() == impl_of(objects[0])->dtype();
        out[i] = (int64_t)t.mutable_data();
    }
    return plain;
}

// how many are contiguous, have the dtype of the first one, and are where they are thought to be
static int64_t stayed(const int64_t *objects, int64_t n, const int64_t *places, int64_t keys) {
    int64_t stay = 0;
    for (int64_t i = 0; i < n; ++i) {
        look_ahead(objects, i, n);
        TensorImpl &t = *impl_of(objects[i]);
        if (!is_usual(t, keys)) return -1;
        const bool plain = t.is_contiguous() && t.dtype() == impl_of(objects[0])->dtype();
        stay += plain && (int64_t)t.mutable_data() == places[i];
    }
    return stay;
}

// addresses of the gradients, then their TensorImpls, which are kept alive until they are released
static int64_t gradients(const int64_t *objects, int64_t n, int64_t *out, int64_t keys) {
    TensorImpl **const found = (TensorImpl **)out + n;
    for (int64_t i = 0; i < n; ++i) {
        look_ahead(objects, i, n);
        const TensorImpl &t = *impl_of(objects[i]);
        if (!is_usual(t, keys) || !t.requires_grad() || t.dtype() != impl_of(objects[0])->dtype()) return -1;
        found[i] = gradient_of(t);
    }
    for (int64_t i = 0; i < n; ++i) {
        if (i + 8 < n) prefetch_tensor(found[i + 8]);
        if (i + 4 < n) __builtin_prefetch(found[i + 4]->unsafe_storage().unsafeGetStorageImpl());
        TensorImpl &g = *found[i];
        if (!is_usual(g, keys) || !g.is_contiguous() || g.dtype() != impl_of(objects[0])->dtype()
            || g.numel() != impl_of(objects[i])->numel()) return -1;
        out[i] = (int64_t)g.mutable_data();
    }
    for (int64_t i = 0; i < n; ++i) c10::intrusive_ptr<TensorImpl>::reclaim_copy(found[i]).release();
    return n;
}

extern "C" int64_t run(int64_t task, const int64_t *objects, int64_t n, int64_t *out, int64_t keys, void *function) {
    try {
        switch (task) {
        case KEYS:
            return (int64_t)impl_of(objects[0])->key_set().raw_repr();
        case LAYOUT:
            for (int64_t i = 0; i < n; ++i)
                if ((int64_t)impl_of(objects[i]) != out[i]) return 0;
            return 1;
        case ADDRESSES:
            return addresses(objects, n, out, keys);
        case PLACES:
            return stayed(objects, n, out, keys);
        case TRAIN:
            for (int64_t i = 0; i < n; ++i) {
                look_ahead(objects, i, n);
                if (!is_usual(*impl_of(objects[i]), keys) || !impl_of(objects[i])->requires_grad()) return 0;
            }
            return 1;
        case GRADIENTS:
            return gradients(objects, n, out, keys);
        case RELEASE:
            for (int64_t i = 0; i < n; ++i) c10::intrusive_ptr<TensorImpl>::reclaim((TensorImpl *)objects[i]);
            return 0;
        case WRITTEN:
            for (int64_t i = 0; i < n; ++i) {
                look_ahead(objects, i, n);
                if (!is_usual(*impl_of(objects[i]), keys)) return i;
                impl_of(objects[i])->bump_version();
            }
            return n;
        case VERSIONS:
            for (int64_t i = 0; i < n; ++i) {
                look_ahead(objects, i, n);
                if (!is_usual(*impl_of(objects[i]), keys)) return -1;
                out[i] = impl_of(objects[i])->version_counter().current_version();
            }
            return n;
        case PUT:  // addresses, and the numbers for them
            for (int64_t i = 0; i < n; ++i) *(float *)objects[i] = ((const float *)out)[i];
            return n;
        case VALUES:  // dictionaries, what they had, and under which key
            for (int64_t i = 0; i < n; ++i) {
                if (i + 8 < n) prefetch_tensor((const void *)objects[i + 8]);
                if (((int64_t (*)(int64_t, int64_t))function)(objects[i], keys) != out[i]) return 0;
            }
            return 1;
        case ITEMS:  // of a list of this length
            for (int64_t i = 0; i < n; ++i)
                if (((int64_t (*)(int64_t, int64_t))function)(keys, i) != objects[i]) return 0;
            return 1;
        case ENTRIES: {  // of a dictionary of this length
            int64_t position = 0, key = 0, value = 0;
            for (int64_t i = 0; i < n; ++i)
                if (!((int (*)(int64_t, int64_t *, int64_t *, int64_t *))function)(keys, &position, &key, &value)
                    || value != objects[i]) return 0;
            return 1;
        }
        }
    } catch (...) {  // a tensor without memory
    }
    return -1;
}
""".replace("@TASKS@", ", ".join(TASKS))

KEYS, LAYOUT, ADDRESSES, PLACES, TRAIN, GRADIENTS, RELEASE, WRITTEN, VERSIONS, PUT, VALUES, ITEMS, ENTRIES = range(len(TASKS))

# these lend what they return: the objects themselves, which may be cold, are not touched
_GET_ITEM, _LIST_ITEM, _NEXT = (
    cast(function, c_void_p).value or 0
    for function in (pythonapi.PyDict_GetItem, pythonapi.PyList_GetItem, pythonapi.PyDict_Next)
)


def _word() -> int:
    """Which word of a tensor's object is the address of its TensorImpl.

    Raises:
        ValueError: none where it has been in any version so far.
    """
    tensor = torch.empty(0)
    words = Tensor.__basicsize__ // 8
    for word in range(2, min(4, words)):
        if c_int64.from_address(id(tensor) + 8 * word).value == tensor._cdata:
            return word
    raise ValueError(f"tensors of torch {torch.__version__} are laid out in a way that is not known here")


@functools.cache
def _run() -> Callable[..., int]:
    """The compiled function.

    Raises:
        ValueError: it cannot be compiled, or PyTorch is not one that it knows.
    """
    torch_folder = Path(torch.__file__).parent
    include, libraries = torch_folder / "include", torch_folder / "lib"
    if not (include / "c10" / "core" / "TensorImpl.h").exists():
        raise ValueError("PyTorch's headers are not installed")
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        raise ValueError("there is no interpreter lock")
    flags = [f"-I{include}", f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lc10", "-std=c++20"]
    flags.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    source = f"// for torch {torch.__version__}\n{_SOURCE.replace('@WORD@', str(_word()))}"
    return compile_function(source, "the look at lists of tensors", tuple(flags), holds_lock=True)


#: types of devices on which tensors have addresses
_DEVICES = ("cpu", "cuda")


@functools.cache
def _keys(device: str) -> int:
    """The dispatch keys of ordinary tensors on a type of device."""
    tensor = torch.empty(0, device=device)
    return _run()(KEYS, np.array([id(tensor)]).ctypes.data, 1, 0, 0, 0)


class _Ids:
    """Addresses of Python's objects, which others keep alive, and room for answers, one number each."""

    def __init__(self, objects: Sequence[Any]) -> None:
        self.size, self.out = len(objects), np.zeros(len(objects), np.int64)
        self._ids = np.fromiter(map(id, objects), np.int64, self.size)
        self._run, self._address, self._room = _run(), self._ids.ctypes.data, self.out.ctypes.data

    def ask(self, task: int, keys: int, function: int = 0, room: int = 0) -> int:
        return self._run(task, self._address, self.size, room or self._room, keys, function)


class QuickTensors(Tensors):
    """See `Tensors`."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__(tensors)
        self._ids: _Ids | None = None
        self._places, self._at = np.empty(0, np.int64), 0
        if tensors and set(map(type, tensors)) <= {Tensor, nn.Parameter} and tensors[0].device.type in _DEVICES:
            ids, self._keys = _Ids(tensors), _keys(tensors[0].device.type)
            ids.out[:] = [t._cdata for t in tensors]
            if ids.ask(LAYOUT, 0) == 1:
                self._ids = ids

    def addresses(self) -> np.ndarray:
        if self._ids is not None and self._ids.ask(ADDRESSES, self._keys) >= 0:
            return self._ids.out
        return super().addresses()

    def plain_addresses(self, dtype: torch.dtype) -> np.ndarray | None:
        if self._ids is not None and self._ids.ask(ADDRESSES, self._keys) == self._ids.size:
            return self._ids.out if self.list[0].dtype == dtype else None
        return super().plain_addresses(dtype)

    def lie_at(self, places: np.ndarray, dtype: torch.dtype) -> bool:
        if self._ids is None:
            return super().lie_at(places, dtype)
        if places is not self._places:
            self._places, self._at = places, places.ctypes.data
        stayed = self._ids.ask(PLACES, self._keys, room=self._at)
        return super().lie_at(places, dtype) if stayed < 0 else stayed == len(places) and self.list[0].dtype == dtype

    def all_train(self) -> bool:
        if self._ids is not None and self._ids.ask(TRAIN, self._keys) == 1:
            return True
        return super().all_train()

    def gradients(self) -> Gradients | None:
        if self._ids is None:
            return None
        found = np.empty((2, self._ids.size), np.int64)
        room = found.ctypes.data
        if self._ids.ask(GRADIENTS, self._keys, room=room) < 0:
            return None
        return Gradients(_Held(self.list, found, room + found[0].nbytes), found[0], self.list[0].dtype)

    def were_written(self) -> None:
        done = 0 if self._ids is None else self._ids.ask(WRITTEN, self._keys)
        if done < len(self.list):
            Tensors(self.list[done:]).were_written()

    def versions(self) -> np.ndarray:
        if self._ids is not None:
            found = np.empty(self._ids.size, np.int64)
            if self._ids.ask(VERSIONS, self._keys, room=found.ctypes.data) >= 0:
                return found
        return super().versions()


class _Held(Sequence[Tensor]):
    """Gradients that are kept alive as long as this is; as Python's objects only for those who ask.

    Args:
        params: whose they are.
        memory: where their TensorImpls are noted.
        address: the place in it.
    """

    def __init__(self, params: list[Tensor], memory: np.ndarray, address: int) -> None:
        self._params, self._memory, self._address, self._run = params, memory, address, _run()

    def __len__(self) -> int:
        return len(self._params)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        return list(self)[index]

    def __iter__(self) -> Iterator[Tensor]:
        return (gradient for gradient in map(grad_of, self._params) if gradient is not None)

    def __del__(self) -> None:
        self._run(RELEASE, self._address, len(self._params), 0, 0, 0)


class QuickValues(Values):
    """See `Values`."""

    def __init__(self, dictionaries: Sequence[dict[str, Any]], name: str) -> None:
        super().__init__(dictionaries, name)
        self._ids: _Ids | None = None
        if set(map(type, dictionaries)) <= {dict} and not any(value is None for value in self.known):
            self._ids = _Ids(dictionaries)
            self._ids.out[:] = list(map(id, self.known))

    def are_there(self) -> bool:
        return super().are_there() if self._ids is None else self._ids.ask(VALUES, id(self.name), _GET_ITEM) == 1


class QuickObjects(Objects):
    """See `Objects`."""

    def __init__(self, holder: list[Any] | dict[Any, Any]) -> None:
        super().__init__(holder)
        self._ids = _Ids(self.known)

    def are_in(self, holder: list[Any] | dict[Any, Any]) -> bool:
        if type(holder) in (list, dict, defaultdict):
            task, function = (ITEMS, _LIST_ITEM) if isinstance(holder, list) else (ENTRIES, _NEXT)
            return len(holder) == self._ids.size and self._ids.ask(task, id(holder), function) == 1
        return super().are_in(holder)


def quick_put(values: np.ndarray, places: np.ndarray) -> None:
    """See `put`."""
    _run()(PUT, places.ctypes.data, len(places), values.ctypes.data, 0, 0)


@functools.cache
def quicken() -> None:
    """Look at lists this way from now on, if that is possible; compiles the function, or finds it compiled."""
    try:
        _keys("cpu")
    except ValueError as error:
        logger.info("lists of tensors are looked at in Python: %s", error)
    else:
        Look.tensors, Look.values, Look.objects = QuickTensors, QuickValues, QuickObjects
        Look.put = staticmethod(quick_put)

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
from ivon_lora.layout import Gradients, Look, Objects, Seen, Tensors, Values, grad_of

logger = logging.getLogger(__name__)

TASKS = (
    "KEYS",
    "LAYOUT",
    "ADDRESSES",
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

template <int LINES> ALWAYS_INLINE void prefetch(const void *p) {
    for (int line = 0; line < LINES; ++line) __builtin_prefetch((const char *)p + 64 * line);
}

// where a tensor leads to
enum { MEMORY = 1, AUTOGRAD = 2, VERSION = 4 };

template <int WHERE> ALWAYS_INLINE void look_behind(const TensorImpl *t) {
    if (WHERE & MEMORY) prefetch<1>(t->unsafe_storage().unsafeGetStorageImpl());
    if (WHERE & AUTOGRAD) prefetch<3>(t->autograd_meta());
    if (WHERE & VERSION) prefetch<1>(*(void *const *)&t->version_counter());
}

template <int WHERE> ALWAYS_INLINE void look_ahead(const int64_t *objects, int64_t i, int64_t n) {
    if (i + 12 < n) prefetch<1>((const void *)objects[i + 12]);
    if (i + 8 < n) prefetch<3>(impl_of(objects[i + 8]));
    if (i + 4 < n) look_behind<WHERE>(impl_of(objects[i + 4]));
}

static bool is_usual(const TensorImpl &t, int64_t keys) { return (int64_t)t.key_set().raw_repr() == keys; }

// addresses, and what autograd keeps as gradients; how many are contiguous and have the dtype of the first one
template <int WHERE> static int64_t addresses(const int64_t *objects, int64_t n, int64_t *out, int64_t keys,
                                              TensorImpl **gradients = nullptr) {
    int64_t plain = 0;
    for (int64_t i = 0; i < n; ++i) {
        look_ahead<WHERE>(objects, i, n);
        TensorImpl &t = *impl_of(objects[i]);
        if (!is_usual(t, keys) || (WHERE & AUTOGRAD && !t.requires_grad())) return -1;
        plain += t.is_contiguous() && t.dtype() == impl_of(objects[0])->dtype();
        out[i] = (int64_t)t.mutable_data();
        if (gradients) gradients[i] = gradient_of(t);
    }
    return plain;
}

// the same of tensors that train; then addresses of their gradients, and the gradients, which are kept alive until they
// are released
static int64_t gradients(const int64_t *objects, int64_t n, int64_t *out, int64_t keys) {
    TensorImpl **const found = (TensorImpl **)out + 2 * n;
    const int64_t plain = addresses<MEMORY | AUTOGRAD>(objects, n, out, keys, found);
    if (plain < 0) return -1;
    const auto dtype = impl_of(objects[0])->dtype();
    for (int64_t i = 0; i < n; ++i) {
        if (i + 8 < n) prefetch<3>(found[i + 8]);
        if (i + 4 < n) look_behind<MEMORY>(found[i + 4]);
        TensorImpl &g = *found[i];
        const TensorImpl &t = *impl_of(objects[i]);
        if (!is_usual(g, keys) || !g.is_contiguous() || g.dtype() != dtype || t.dtype() != dtype
            || g.numel() != t.numel()) return -1;
        out[n + i] = (int64_t)g.mutable_data();
    }
    for (int64_t i = 0; i < n; ++i) c10::intrusive_ptr<TensorImpl>::reclaim_copy(found[i]).release();
    return plain;
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
            return addresses<MEMORY>(objects, n, out, keys);
        case TRAIN:
            return addresses<MEMORY | AUTOGRAD>(objects, n, out, keys);
        case GRADIENTS:
            return gradients(objects, n, out, keys);
        case RELEASE:
            for (int64_t i = 0; i < n; ++i) {
                if (i + 8 < n) prefetch<1>((const void *)objects[i + 8]);
                c10::intrusive_ptr<TensorImpl>::reclaim((TensorImpl *)objects[i]);
            }
            return 0;
        case WRITTEN:
            for (int64_t i = 0; i < n; ++i) {
                look_ahead<VERSION>(objects, i, n);
                if (!is_usual(*impl_of(objects[i]), keys)) return i;
                impl_of(objects[i])->bump_version();
            }
            return n;
        case VERSIONS:
            for (int64_t i = 0; i < n; ++i) {
                look_ahead<VERSION>(objects, i, n);
                if (!is_usual(*impl_of(objects[i]), keys)) return -1;
                out[i] = impl_of(objects[i])->version_counter().current_version();
            }
            return n;
        case PUT:  // addresses, and the numbers for them
            for (int64_t i = 0; i < n; ++i) *(float *)objects[i] = ((const float *)out)[i];
            return n;
        case VALUES: {  // dictionaries, what they had, and how many keys, then these
            const int64_t *const names = (const int64_t *)keys;
            for (int64_t i = 0; i < n; ++i) {
                if (i + 8 < n) prefetch<1>((const void *)objects[i + 8]);
                if (i + 4 < n) prefetch<3>(((const void *const *)objects[i + 4])[4]);  // its table, in all versions yet
                for (int64_t k = 1; k <= names[0]; ++k, ++out)
                    if (((int64_t (*)(int64_t, int64_t))function)(objects[i], names[k]) != *out) return 0;
            }
            return 1;
        }
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

KEYS, LAYOUT, ADDRESSES, TRAIN, GRADIENTS, RELEASE, WRITTEN, VERSIONS, PUT, VALUES, ITEMS, ENTRIES = range(len(TASKS))

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

    def all_train(self) -> tuple[bool, Seen | None]:
        plain = -1 if self._ids is None else self._ids.ask(TRAIN, self._keys)
        if self._ids is None or plain < 0:
            return super().all_train()
        return True, self._seen(self._ids.out, plain)

    def _seen(self, places: np.ndarray, plain: int) -> Seen | None:
        return Seen(self.list, places, self.list[0].dtype) if plain == len(self.list) else None

    def gradients(self) -> Gradients | None:
        if self._ids is None:
            return None
        found = np.empty((3, self._ids.size), np.int64)  # addresses of parameters and gradients, TensorImpls of these
        room = found.ctypes.data
        plain = self._ids.ask(GRADIENTS, self._keys, room=room)
        if plain < 0:
            return None
        held = _Held(self.list, found, room + found[:2].nbytes)
        return Gradients(held, found[1], self.list[0].dtype, self._seen(found[0], plain))

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

    def __init__(self, dictionaries: Sequence[dict[str, Any]], *names: str) -> None:
        super().__init__(dictionaries, *names)
        self._ids: _Ids | None = None
        if set(map(type, dictionaries)) <= {dict} and not any(value is None for value in self.known):
            self._ids, self._names = _Ids(dictionaries), np.array([len(names), *map(id, names)], np.int64)
            self._known = np.array(list(map(id, self.known)), np.int64)
            self._keys, self._room = self._names.ctypes.data, self._known.ctypes.data

    def are_there(self) -> bool:
        if self._ids is None:
            return super().are_there()
        return self._ids.ask(VALUES, self._keys, _GET_ITEM, self._room) == 1


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

"""Looking at lists of tensors in C++ gives the answers that PyTorch gives in Python, whatever the tensors are."""

from __future__ import annotations

import ctypes
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ivon_lora import IVON, quick_look
from ivon_lora.layout import Look, Objects, Tensors, Values, addresses, put
from ivon_lora.quick_look import QuickObjects, QuickTensors, QuickValues
from tests.compiler import needs_compiler

pytestmark = needs_compiler


@pytest.fixture(autouse=True)
def _looks() -> Iterator[None]:
    """Whatever a test makes of it, later ones find it as it was."""
    before = Look.tensors, Look.values, Look.objects, Look.put
    quick_look.quicken()
    yield
    Look.tensors, Look.values, Look.objects = before[:3]
    Look.put = staticmethod(before[3])


class Sub(Tensor):
    """A subclass that PyTorch treats as an ordinary tensor."""


def sub() -> Tensor:
    return torch.ones(3).as_subclass(Sub)


def inference() -> Tensor:
    with torch.inference_mode():
        return torch.ones(3)


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape, dtype=dtype))


LISTS: dict[str, Callable[[], list[Tensor]]] = {
    "none": list,
    "plain": lambda: [torch.ones(3), torch.ones(2, 5)],
    "parameters": lambda: [parameter(3), parameter(2, 5)],
    "a mixture": lambda: [parameter(3), torch.ones(2, 5), torch.ones(())],
    "frozen": lambda: [parameter(3), parameter(3).requires_grad_(False)],
    "views": lambda: list(torch.ones(12).view(3, 4)),
    "strided": lambda: [torch.ones(3), torch.ones(3, 4).t()],
    "empty": lambda: [torch.ones(0, 3), parameter(0)],
    "bf16": lambda: [parameter(3, dtype=torch.bfloat16), torch.ones(4, dtype=torch.bfloat16)],
    "two dtypes": lambda: [torch.ones(3), torch.ones(3, dtype=torch.float64)],
    "a subclass": lambda: [torch.ones(3), sub()],
    "inference": lambda: [torch.ones(3), inference()],
    "negated": lambda: [torch.ones(3), torch._neg_view(torch.ones(3))],
    "many": lambda: [torch.ones(i % 5) for i in range(50)],
}


@pytest.mark.parametrize("make", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_are_those_of_python(make: Callable[[], list[Tensor]], dtype: torch.dtype) -> None:
    tensors = make()
    quick, slow = QuickTensors(tensors), Tensors(tensors)
    assert np.array_equal(quick.addresses(), slow.addresses())
    found, expected = quick.plain_addresses(dtype), slow.plain_addresses(dtype)
    assert (found is None) == (expected is None)
    assert found is None or expected is None or np.array_equal(found, expected)
    compare_training(quick, slow)


def compare_training(quick: QuickTensors, slow: Tensors) -> None:
    """Whether all train, and where they lie if that was seen: only if they are contiguous and of one dtype."""
    (all_do, seen), (expected, _) = quick.all_train(), slow.all_train()
    assert all_do == expected
    plain = all(t.is_contiguous() for t in quick.list) and len({t.dtype for t in quick.list}) == 1
    assert (seen is not None) <= (all_do and plain)
    if seen is not None:
        assert seen.tensors is quick.list
        assert seen.dtype == quick.list[0].dtype
        assert np.array_equal(seen.places, slow.addresses())


def test_what_has_no_memory() -> None:
    tensors = [torch.ones(3), torch.ones(3).to_sparse()]
    quick = QuickTensors(tensors)
    assert quick.plain_addresses(torch.float32) is None
    with pytest.raises(RuntimeError):
        quick.addresses()


def test_tensors_may_change_after_the_first_look() -> None:
    tensors: list[Tensor] = [parameter(4), parameter(3, 4)]
    quick, slow = QuickTensors(tensors), Tensors(tensors)

    def compare() -> None:
        assert np.array_equal(quick.addresses(), slow.addresses())
        assert (quick.plain_addresses(torch.float32) is None) == (slow.plain_addresses(torch.float32) is None)
        compare_training(quick, slow)

    compare()
    tensors[1].data = torch.zeros(3, 4)
    compare()
    tensors[1].data = torch.zeros(4, 3).t()
    compare()
    tensors[1].data = torch.zeros(3, 4, dtype=torch.float64)
    compare()
    torch.utils.swap_tensors(tensors[0], nn.Parameter(torch.zeros(4)))
    compare()
    tensors[0].requires_grad_(False)
    compare()


def test_gradients() -> None:
    params = [parameter(4), parameter(2, 3)]
    quick = QuickTensors(list[Tensor](params))
    assert quick.gradients() is None
    params[0].grad = torch.arange(4.0)
    assert quick.gradients() is None
    params[1].grad = torch.ones(2, 3)
    found = quick.gradients()
    assert found is not None
    assert found.dtype == torch.float32
    assert [a is b for a, b in zip(found.tensors, (p.grad for p in params), strict=True)] == [True, True]
    assert found.tensors[1] is params[1].grad
    assert len(found.tensors) == 2
    assert found.places.tolist() == [p.grad.data_ptr() for p in params if p.grad is not None]
    assert found.params is not None
    assert found.params.tensors is quick.list
    assert found.params.places.tolist() == [p.data_ptr() for p in params]


def test_gradients_of_a_strided_parameter() -> None:
    """Its gradient can be used as it is, its own address cannot."""
    params = [parameter(2, 3), nn.Parameter(torch.ones(3, 2).t())]
    for p in params:
        p.grad = torch.ones(2, 3)
    found = QuickTensors(list[Tensor](params)).gradients()
    assert found is not None
    assert found.params is None
    assert found.places.tolist() == [p.grad.data_ptr() for p in params if p.grad is not None]


def test_gradients_live_as_long_as_they_are_held() -> None:
    p = parameter(4)
    p.grad = torch.arange(4.0)
    gradient = weakref.ref(p.grad)
    found = QuickTensors([p]).gradients()
    assert found is not None
    p.grad = None
    assert gradient() is not None
    assert np.ctypeslib.as_array((ctypes.c_float * 4).from_address(int(found.places[0]))).tolist() == [0, 1, 2, 3]
    del found
    assert gradient() is None


def strided(p: nn.Parameter) -> None:
    p.grad = torch.ones(3, 2).t()


def sparse(p: nn.Parameter) -> None:
    p.grad = torch.ones(2, 3).to_sparse()


def missing(p: nn.Parameter) -> None:
    p.grad = None


def frozen(p: nn.Parameter) -> None:
    p.requires_grad_(False)


def other_dtype(p: nn.Parameter) -> None:
    p.grad = torch.ones(2, 3)
    p.data = torch.ones(2, 3, dtype=torch.float64)


@pytest.mark.parametrize("change", [strided, sparse, missing, frozen, other_dtype])
def test_unusual_gradients_are_left_to_python(change: Callable[[nn.Parameter], None]) -> None:
    params = [parameter(2, 3), parameter(2, 3), parameter(2, 3)]
    for p in params:
        p.grad = torch.ones(2, 3)
    quick = QuickTensors(list[Tensor](params))
    assert quick.gradients() is not None
    change(params[1])
    kept = [weakref.ref(p.grad) for p in params if p.grad is not None]
    assert quick.gradients() is None
    for p in params:
        p.grad = None
    assert [ref() for ref in kept] == [None] * len(kept)  # nothing is held on the way


@pytest.mark.parametrize("name", ["plain", "parameters", "a mixture", "a subclass", "many"])
def test_versions_grow_by_one(name: str) -> None:
    tensors = LISTS[name]()
    before = [t._version for t in tensors]
    QuickTensors(tensors).were_written()
    assert [t._version for t in tensors] == [version + 1 for version in before]


@pytest.mark.parametrize("name", [name for name in LISTS if name != "inference"])
def test_versions_are_those_of_python(name: str) -> None:
    tensors = LISTS[name]()
    quick = QuickTensors(tensors)
    before = quick.versions()
    assert np.array_equal(before, Tensors(tensors).versions())
    for t in tensors[1::2]:
        t.detach().add_(1)
    assert np.array_equal(quick.versions(), [t._version for t in tensors])
    assert np.array_equal(before, Tensors(LISTS[name]()).versions()), "a look changes no answer given before"


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """Asked in C++: no answer is left to Python but where devices differ."""
    tensors: list[Tensor] = [nn.Parameter(torch.ones(n, 2, device="cuda")) for n in range(1, 30)]
    quick, slow = QuickTensors(tensors), Tensors(tensors)
    assert quick._ids is not None
    for task in (quick_look.ADDRESSES, quick_look.TRAIN, quick_look.VERSIONS):
        assert quick._ids.ask(task, quick._keys) > 0
    assert quick.gradients() is None
    for t in tensors:
        t.grad = torch.ones_like(t)
    found = quick.gradients()
    assert found is not None
    assert found.places.tolist() == [t.grad.data_ptr() for t in tensors if t.grad is not None]
    for changed in (False, True):
        if changed:
            tensors[3].data = torch.ones(4, 2)
            assert quick._ids.ask(quick_look.ADDRESSES, quick._keys) == -1
        quick.were_written()
        assert np.array_equal(quick.addresses(), slow.addresses())
        assert np.array_equal(quick.versions(), slow.versions())
        assert quick.all_train()[0]


@pytest.mark.parametrize("write", [quick_look.quick_put, put], ids=["quick", "slow"])
def test_numbers_are_written_where_they_belong(write: Callable[[np.ndarray, np.ndarray], None]) -> None:
    memory = torch.zeros(7)
    order = [5, 0, 3]
    write(np.array([1.5, -2.0, np.inf], np.float32), addresses([memory[i] for i in order]))
    assert memory.tolist() == [-2.0, 0.0, 0.0, np.inf, 0.0, 1.5, 0.0]
    write(np.empty(0, np.float32), np.empty(0, np.int64))


def test_values_of_dictionaries() -> None:
    first, second, name = torch.ones(2), torch.ones(2), "he"
    entries: list[dict[str, Any]] = [{"hess": first, "step": 1}, {"hess": second}]
    name += "ss"  # not the same string
    for kind in (QuickValues, Values):
        values = kind(entries, name)
        assert values.are_there()
        entries[1]["hess"] = torch.ones(2)
        assert not values.are_there()
        del entries[1]["hess"]
        assert not values.are_there()
        entries[1]["hess"] = second
        assert values.are_there()
        assert kind(entries, "step").are_there()
        entries[1]["step"] = 2
        assert kind(entries, "step").known == [1, 2]
        both = kind(entries, "step", "hess")
        assert both.known == [1, first, 2, second]
        assert both.are_there()
        entries[1]["hess"] = first
        assert not both.are_there()
        entries[1].update(hess=second, step=3)
        assert not both.are_there()
        del entries[1]["step"]


@pytest.mark.parametrize("kind", [QuickObjects, Objects])
def test_objects_in_lists_and_dictionaries(kind: type[Objects]) -> None:
    a, b, c = torch.ones(2), torch.ones(2), torch.ones(2)
    objects = kind([a, b])
    assert objects.known[1] is b
    entries: defaultdict[str, Tensor] = defaultdict(lambda: a, x=a, y=b)
    for good in ([a, b], {1: a, 2: b}, entries, OrderedDict(x=a, y=b)):
        assert objects.are_in(good)
    for bad in ([a], [a, b, c], [b, a], [a, c], {1: a}, {1: b, 2: a}, {1: a, 2: b, 3: c}, []):
        assert not objects.are_in(bad)
    del entries["x"]
    assert not objects.are_in(entries)
    entries["x"] = a  # behind the other now
    assert not objects.are_in(entries)
    assert kind({1: b}).are_in([b])
    assert kind([]).are_in({})


def trained(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 5), (7,), (4, 300))]
    optimizer = IVON(params, lr=0.1, ess=20, hess_init=0.5, backend="compile")
    for _ in range(3):
        optimizer.train()
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("without", ["headers", "compiler", "known layout"])
def test_without_it_python_looks(without: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits where PyTorch's headers are missing, the compiler does not take them, or tensors are others."""
    expected = trained(3)
    monkeypatch.setattr(Look, "tensors", Tensors)
    monkeypatch.setattr(Look, "values", Values)
    monkeypatch.setattr(Look, "objects", Objects)
    monkeypatch.setattr(Look, "put", staticmethod(put))
    if without == "headers":
        monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    elif without == "compiler":
        monkeypatch.setattr(quick_look, "_SOURCE", "#error too old")
    else:
        monkeypatch.setattr(quick_look, "c_int64", ctypes.c_int16)
    caches = quick_look._run, quick_look._keys, quick_look.quicken
    try:
        for cache in caches:
            cache.cache_clear()
        found = trained(3)
        assert Look.tensors is Tensors
    finally:
        for cache in caches:
            cache.cache_clear()
    assert all(map(torch.equal, found, expected))

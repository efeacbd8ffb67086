"""What hurts users of ivon-opt 0.1.3, one test each: the peer fails here and now, and we do not.

ivon-opt (GPL-3.0) is run as a black box. Its noise comes from the global generator, so equal seeds give equal noise.

Tests are numbered like the pains, ``test_01_...``; what else covers them is in brackets:

== =====================================================================================================
01 clipping has no effect: gradients are taken when the context ends        [test_trainer]
02 `GradScaler.unscale_` has no effect                                      [test_optimizer_gradients]
03 a parameter without a gradient: an error, and weights left perturbed     [test_hostile_gradients]
04 an exception inside the context leaves the weights perturbed             [test_optimizer_states]
05 `step()` without a context is an error                                   [test_optimizer_gradients]
06 accumulated gradients are weighted wrongly                               [test_optimizer_gradients]
07 `add_param_group` is an error                                            [test_optimizer_groups_dtypes]
08 dtypes and devices cannot be mixed                                       [test_optimizer_groups_dtypes]
09 state in the dtype of the parameter: bf16 loses the Hessian's updates    [test_optimizer_groups_dtypes]
10 parameters change their memory with every sample                         [test_optimizer_states]
11 state without entries per parameter: torch.distributed.checkpoint fails  [test_distributed_checkpoint]
12 the number of steps is not saved: bias correction starts again           [test_optimizer_checkpoints]
13 the global generator is used: other dropout, other order of the data     [test_optimizer_states]
14 replicas with other seeds diverge in silence                             [test_data_parallel]
15 FSDP2's parameters fail                                                  [test_sharding]
16 a parameter frozen later still decays and gets noise                     [test_optimizer_gradients]
17 no type hints, nothing fused                                             [test_packaging]
== =====================================================================================================
"""

from __future__ import annotations

import copy
import io
from importlib.resources import files
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_lora import IVON
from tests.optimizer_problem import equal, values

ivon = pytest.importorskip("ivon")

OPTIONS: dict[str, Any] = {"lr": 0.1, "ess": 100.0}
TARGET = torch.linspace(-1.0, 2.0, 8)


def make_param(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.full((8,), 0.5, dtype=dtype))


def loss_of(*params: Tensor) -> Tensor:
    return sum(0.5 * (p.float() - TARGET).square().sum() for p in params)  # type: ignore[return-value]


def context_step(optimizer: Any, params: list[nn.Parameter], between: Any = None, loss: Any = loss_of) -> None:
    """ivon-opt's loop."""
    with optimizer.sampled_params(train=True):
        optimizer.zero_grad()
        loss(*params).backward()
    if between is not None:
        between()
    optimizer.step()


def both(*args: Any, **options: Any) -> list[tuple[bool, Any, list[nn.Parameter]]]:
    """(is it ours, optimizer, its parameters) for the peer and for us, on equal parameters."""
    made = []
    for ours, kind in ((False, ivon.IVON), (True, IVON)):
        torch.manual_seed(0)
        params = [make_param(*args), make_param(*args)]
        made.append((ours, kind(params, **{**OPTIONS, **options}), params))
    return made


def test_01_clipping_after_the_context_has_its_effect():
    ends = {}
    for clip in (1e9, 1e-6):
        for ours, optimizer, params in both():
            context_step(optimizer, params, lambda p=params, c=clip: torch.nn.utils.clip_grad_norm_(p, c))
            ends[ours, clip] = values(params)
    assert equal(ends[False, 1e9], ends[False, 1e-6]), "the peer's gradients are those at the end of the context"
    start = make_param()
    assert all((p - start).abs().max() > 0.01 for p in ends[True, 1e9])
    assert all((p - start).abs().max() < 1e-4 for p in ends[True, 1e-6])  # what is left is the weight decay


def test_02_unscaling_has_its_effect():
    ends = {}
    for scale in (1.0, 2.0**16):
        for ours, optimizer, params in both():
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                scaler.scale(loss_of(*params)).backward()
            scaler.step(optimizer)  # unscales p.grad
            ends[ours, scale] = values(params)
    assert max((a - b).abs().max() for a, b in zip(ends[False, 1.0], ends[False, 2.0**16], strict=True)) > 1e3
    assert equal(ends[True, 1.0], ends[True, 2.0**16])


def test_03_a_parameter_without_gradient_is_skipped():
    for ours, optimizer, params in both():
        unused, used = params
        before = values(params)
        if ours:
            context_step(optimizer, [used])
            assert torch.equal(unused, before[0])
            assert not torch.equal(used, before[1])
        else:
            with pytest.raises(AttributeError, match="NoneType"):
                context_step(optimizer, [used])
            assert not torch.equal(used, before[1]), "no step was made, but the weights stay perturbed"


def test_04_an_exception_inside_the_context_restores_the_mean():
    for ours, optimizer, params in both():
        before = values(params)
        with pytest.raises(KeyboardInterrupt), optimizer.sampled_params(train=True):
            raise KeyboardInterrupt
        assert equal(params, before) == ours


def test_05_step_without_a_context_steps():
    for ours, optimizer, params in both():
        before = values(params)
        loss_of(*params).backward()
        if ours:
            with pytest.warns(UserWarning, match=r"step\(\) without a posterior sample"):
                optimizer.step()
            assert not equal(params, before)
            assert all(torch.equal(optimizer.state[p]["hess"], torch.ones(8)) for p in params), "nothing was learned"
        else:
            with pytest.raises(TypeError, match="NoneType"):
                optimizer.step()


def test_06_samples_accumulated_without_zero_grad_are_averaged():
    """Four contexts in a row: the gradient is their mean, not the mean of running sums (which is 2.5 times it)."""
    for ours, optimizer, params in both(ess=1e12, weight_decay=0.0):  # next to no noise
        for _ in range(4):
            with optimizer.sampled_params(train=True):
                loss_of(*params).backward()
        optimizer.step()
        if ours:
            momentum = torch.stack([optimizer.state[p]["momentum"] for p in params])
        else:
            momentum = optimizer.param_groups[0]["momentum"].view(2, 8)
        ratio = momentum / (0.1 * (make_param() - TARGET)).detach()
        torch.testing.assert_close(ratio, torch.full((2, 8), 1.0 if ours else 2.5), rtol=1e-4, atol=0)


def test_07_groups_can_be_added_later():
    for ours, optimizer, params in both():
        context_step(optimizer, params)
        new = make_param()
        optimizer.add_param_group({"params": [new], "weight_decay": 0.1})
        if ours:
            before = new.detach().clone()
            context_step(optimizer, [*params, new])
            assert not torch.equal(new, before)
            assert float(optimizer.state[params[0]]["step"]) == 2
        else:
            with pytest.raises(KeyError, match="numel"):
                context_step(optimizer, [*params, new])


def test_08_dtypes_may_be_mixed():
    params = [make_param(), make_param(torch.bfloat16), make_param(torch.float64)]
    with pytest.raises(ValueError, match="different dtypes"):
        ivon.IVON(params, **OPTIONS)
    optimizer = IVON(params, **OPTIONS)
    before = values(params)
    context_step(optimizer, params)
    assert not any(torch.equal(p.detach(), b) for p, b in zip(params, before, strict=True))
    assert [optimizer.state[p]["hess"].dtype for p in params] == [torch.float32, torch.float32, torch.float64]


def test_09_state_of_16_bit_parameters_is_fp32():
    """In bf16, 0.99999 h rounds back to h, and so does what is added to it: the Hessian never moves."""
    for ours, optimizer, params in both(torch.bfloat16):
        for _ in range(20):
            context_step(optimizer, params)
        hess = optimizer.state[params[0]]["hess"] if ours else optimizer.param_groups[0]["hess"]
        assert hess.dtype == (torch.float32 if ours else torch.bfloat16)
        assert bool((hess == 1).all()) != ours


def test_10_parameters_keep_their_memory():
    """What CUDA graphs, fused kernels and sharding rely on."""
    for ours, optimizer, params in both():
        pointers = [p.data_ptr() for p in params]
        for _ in range(3):
            context_step(optimizer, params)
        assert ([p.data_ptr() for p in params] == pointers) == ours


def test_11_state_has_entries_per_parameter():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    for ours, kind in ((False, ivon.IVON), (True, IVON)):
        model = nn.Linear(3, 2)
        optimizer = kind(model.parameters(), **OPTIONS)
        with optimizer.sampled_params(train=True):
            model(torch.ones(4, 3)).square().mean().backward()
        optimizer.step()
        if ours:
            saved = get_optimizer_state_dict(model, optimizer)
            assert saved["state"]["weight"]["hess"].shape == (2, 3)
            assert not any(isinstance(v, Tensor) for group in saved["param_groups"] for v in group.values())
        else:
            assert "count" in optimizer.state_dict()["state"]
            with pytest.raises(KeyError, match="count"):
                get_optimizer_state_dict(model, optimizer)


def test_12_a_resumed_run_goes_on_where_it_was():
    """The peer's step count is not saved: its debiasing starts again, with steps up to 10 times too long."""
    for ours, optimizer, params in both():
        kind = type(optimizer)
        for seed in range(5):
            torch.manual_seed(seed)
            context_step(optimizer, params)
        twins = [copy.deepcopy(p) for p in params]
        resumed = kind(twins, **OPTIONS)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        for seed in range(5, 10):
            for o, ps in ((optimizer, params), (resumed, twins)):
                torch.manual_seed(seed)
                context_step(o, ps)
        assert equal(params, twins) == ours


def test_13_the_global_generator_is_left_alone():
    for ours, optimizer, params in both():
        before = torch.get_rng_state()
        context_step(optimizer, params)
        assert torch.equal(torch.get_rng_state(), before) == ours


def test_14_replicas_stay_equal_whatever_their_seeds():
    """Two replicas as in DDP, each with its own global seed and its own noise, if it lets the seed matter.

    (In processes of their own, with gradients reduced by gloo, in the tests of data parallelism.)
    """
    for ours, kind in ((False, ivon.IVON), (True, IVON)):
        replicas = [[make_param()], [make_param()]]
        optimizers = [kind(params, **OPTIONS) for params in replicas]
        for step in range(5):
            for rank, (optimizer, params) in enumerate(zip(optimizers, replicas, strict=True)):
                torch.manual_seed(10 * rank + step)
                context = optimizer.sampled_params(train=True)
                context.__enter__()
                optimizer.zero_grad()
                loss_of(*params).backward()
                optimizers[rank].context = context
            mean = (replicas[0][0].grad + replicas[1][0].grad) / 2  # DDP's reduction ends with the backward pass
            for optimizer, params in zip(optimizers, replicas, strict=True):
                params[0].grad = mean.clone()
                optimizer.context.__exit__(None, None, None)
                optimizer.step()
        assert torch.equal(replicas[0][0], replicas[1][0]) == ours


@pytest.fixture
def one_process_mesh(tmp_path):
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_15_sharded_parameters_train(one_process_mesh):
    """FSDP2's parameters are DTensors, which no flat `torch.cat` with ordinary noise can hold."""
    from torch.distributed.fsdp import fully_shard

    for ours, kind in ((False, ivon.IVON), (True, IVON)):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        plain = copy.deepcopy(model)
        fully_shard(model, mesh=one_process_mesh)
        optimizer = kind(model.parameters(), **OPTIONS)

        def train(model, optimizer):
            optimizer.train()
            model(torch.ones(4, 3)).square().mean().backward()
            optimizer.step()

        if ours:
            train(model, optimizer)
            train(plain, kind(plain.parameters(), **OPTIONS))
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                assert torch.equal(p.full_tensor(), q)
        else:
            with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"), optimizer.sampled_params():
                pass


def test_16_a_parameter_frozen_later_stays():
    for ours, optimizer, params in both():
        trained, frozen = params
        context_step(optimizer, params)
        frozen.requires_grad_(False)
        before = frozen.detach().clone()
        with optimizer.sampled_params(train=True):
            sampled = not torch.equal(frozen, before)
            optimizer.zero_grad()
            loss_of(trained).backward()
        optimizer.step()
        assert sampled != ours
        assert torch.equal(frozen, before) == ours


def test_17_types_are_shipped():
    for name, ours in (("ivon", False), ("ivon_lora", True)):
        assert files(name).joinpath("py.typed").is_file() == ours

"""What every method of `ivon_lora.variants` must do, whatever its paper says."""

import copy
import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ivon_lora import RankPruner, VAdam, export_lora, find_adapters
from ivon_lora.variants import METHODS
from tests import variant_problem
from tests.optimizer_problem import differing
from tests.tiny_language_model import lora_config, make_base
from tests.two_processes import Pool
from tests.variant_problem import RANK, STEPS, Run, loss_of, make_data, make_model, make_variant, start, start_lora

every_method = pytest.mark.parametrize("method", sorted(METHODS))
every_optimizer = pytest.mark.parametrize("optimizer", variant_problem.OPTIMIZERS)
both = pytest.mark.parametrize("optimizer", ["adamw", "vadam"])


@every_method
@every_optimizer
def test_it_learns_a_planted_change(method: str, optimizer: str) -> None:
    steps = STEPS[method] * 3 // 5
    options: dict[str, Any] = {"share": 1.0} if method == "diffora" else {}
    run = start(method, optimizer, steps=steps, fast=1.6, **options)
    before = run.loss()
    run.train(steps)
    assert run.loss() < before / 10


@every_method
@both
def test_it_resumes_in_a_new_process_exactly(method: str, optimizer: str, tmp_path: Path, two_processes: Pool) -> None:
    run = start(method, optimizer)
    run.train(STEPS[method] // 2)
    run.save(tmp_path / "checkpoint")
    run.train(10)
    for resumed in two_processes(variant_problem.resume, method, optimizer, str(tmp_path / "checkpoint"), 10):
        assert differing(run.trained(), resumed) == []


@every_method
@both
def test_detached_it_is_a_plain_model_that_computes_the_same_also_exported(
    method: str, optimizer: str, tmp_path: Path
) -> None:
    from peft import PeftModel

    run, plain = start(method, optimizer), make_model()
    run.train(STEPS[method] // 2)
    loss_of(run.model).backward()  # in the middle of a step
    run.optimizer.zero_grad()
    logits = run.logits()
    assert torch.equal(run.logits(), logits)
    export_lora(run.model, run.optimizer, tmp_path / "attached")
    run.variant.detach()
    torch.testing.assert_close(run.logits(), logits, atol=1e-6, rtol=1e-6)
    assert [name for name, _ in run.model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert run.model.state_dict().keys() == plain.state_dict().keys()
    assert differing(run.frozen(), {n: p for n, p in plain.named_parameters() if not p.requires_grad}) == []
    export_lora(run.model, run.optimizer, tmp_path / "detached")
    for folder in ("attached", "detached"):
        consumer = PeftModel.from_pretrained(variant_problem.base(), str(tmp_path / folder)).eval()
        torch.testing.assert_close(consumer(make_data()[0]), logits, atol=1e-6, rtol=1e-6)
    steps = run.variant.step
    run.train(1)
    assert run.variant.step == steps


@pytest.mark.gpu
@every_method
@every_optimizer
def test_on_a_gpu_it_trains_as_on_the_cpu(method: str, optimizer: str) -> None:
    runs = [start(method, optimizer, steps=16, prepare=lambda m, d=d: m.to(d)) for d in ("cpu", "cuda")]  # type: ignore[misc]
    for _ in range(16):
        for run in runs:
            run.train(1)
        assert runs[1].loss() == pytest.approx(runs[0].loss(), rel=1e-2, abs=1e-4)
    runs[1].optimizer.load_state_dict(runs[1].optimizer.state_dict())
    before = runs[1].logits()
    runs[1].variant.detach()
    torch.testing.assert_close(runs[1].logits(), before, atol=1e-5, rtol=1e-4)


@every_method
@both
def test_two_micro_batches_are_one_batch(method: str, optimizer: str) -> None:
    whole, halves = start(method, optimizer), start(method, optimizer)
    whole.train(12)
    halves.train(12, micro_batches=2)
    for name, p in whole.trained().items():
        torch.testing.assert_close(halves.trained()[name], p, atol=1e-4, rtol=1e-3)
    assert whole.variant.step == halves.variant.step == 12


@every_method
@both
def test_two_processes_agree(method: str, optimizer: str, two_processes: Pool) -> None:
    first, second = two_processes(variant_problem.train_in_ddp, method, optimizer, 8)
    assert differing(first, second) == []


def train_a_copy(run: Run) -> None:
    twin = copy.deepcopy(run.model)
    loss_of(twin.train()).backward()
    assert run.variant.forwards == 0  # nobody was told
    torch.testing.assert_close(twin.eval()(make_data()[0]), run.logits())


def raise_in_a_forward(run: Run) -> None:
    with pytest.raises(RuntimeError):
        run.model(torch.zeros(3, 5))


def rehearse(run: Run) -> None:
    """torch.distributed.checkpoint steps a fresh optimizer with gradients of zero at lr 0."""
    run.optimizer.state.clear()
    rates = [group["lr"] for group in run.optimizer.param_groups]
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    run.optimizer.step()
    for group, rate in zip(run.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


@every_method
@both
@pytest.mark.parametrize("disturb", [train_a_copy, raise_in_a_forward, rehearse])
def test_what_happens_beside_the_training_changes_nothing(
    method: str, optimizer: str, disturb: Callable[[Run], None]
) -> None:
    run = start(method, optimizer)
    run.train(3)
    logits, weights, state = run.logits(), {**run.trained(), **run.frozen()}, repr(run.variant.state_dict())
    disturb(run)
    assert differing({**run.trained(), **run.frozen()}, weights) == []
    assert repr(run.variant.state_dict()) == state
    assert torch.equal(run.logits(), logits)


@every_method
def test_a_state_that_was_taken_stays_as_it_was(method: str) -> None:
    options: dict[str, Any] = {"interval": 10, "top_p": 0.7} if method == "beamlora" else {}
    run = start(method, "adamw", **options)
    run.train(5)
    kept = run.variant.state_dict()
    before = repr(kept)
    run.train(30)
    run.variant.load_state_dict(kept)
    run.train(10)
    assert repr(kept) == before


@every_method
def test_what_it_cannot_do_is_refused_before_anything_is_hooked(method: str) -> None:
    run = start(method, "adamw")
    with pytest.raises(ValueError, match="attached already"):
        run.variant.attach(run.optimizer)
    frozen = make_model()
    frozen.base_model.model.layers[0].requires_grad_(False)
    half = make_variant(method, frozen)
    with pytest.raises(ValueError, match=r"is not among .* requires_grad=False, so leave its layer out"):
        half.attach(torch.optim.AdamW(half.param_groups()))
    variant = make_variant(method, make_model())
    others = {
        "LBFGS evaluates many times": torch.optim.LBFGS([p for g in variant.param_groups() for p in g["params"]]),
        "maximize=True; negate": torch.optim.SGD(variant.param_groups(), lr=0.1, maximize=True),
        "not among the optimizer's parameters": torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]),
    }
    for message, optimizer in others.items():
        with pytest.raises(ValueError, match=message):
            variant.attach(optimizer)


#: by the type of an argument's default, what no argument may be
WRONG: dict[type, tuple[Any, ...]] = {str: ("?",), int: (-1,), float: (math.nan, "half"), bool: ("no", 1)}

#: method, arguments, and what the message must name
BAD: list[tuple[str, dict[str, Any], str]] = [
    (method, {name: wrong}, rf"^{name} must .*got {re.escape(repr(wrong))}")
    for method, variant in sorted(METHODS.items())
    for name, given in inspect.signature(variant).parameters.items()
    for wrong in WRONG.get(type(given.default), ())
    if name != "adapter_name"
]
BAD += [
    ("sora", {"total_steps": 0}, "total_steps must be an integer of at least 1, got 0"),
    ("sora", {"final": 1.5}, r"final must be a number in \[0, 1\], got 1.5"),
    ("beamlora", {"interval": 1}, "interval must be an integer of at least 2, got 1"),
    ("beamlora", {"top_p": 0.0}, r"top_p must be a number in \(0, 1\], got 0.0"),
    ("cola", {"links": 20}, "links must be at most total_steps=10, got 20"),
    ("cola", {"links": 3, "ranks": [4, 5, 1]}, r"ranks must be 3 numbers from 1 to 4, .*got \[4, 5, 1\]"),
    ("cola", {"links": 1, "ranks": 4}, "ranks must be 1 numbers from 1 to 4, .*got 4"),
    ("cola", {"links": 1, "ranks": ["a"]}, r"ranks must be 1 numbers from 1 to 4, .*got \['a'\]"),
    ("diffora", {"search": 1.0}, "search must be less than total_steps=10, got 10 steps"),
    ("xgblora", {"booster_steps": 10, "choose": "gain"}, "booster_steps must be an integer of at least 11, got 10"),
]


@pytest.mark.parametrize(("method", "options", "message"), BAD)
def test_a_bad_argument_is_refused_with_its_value_and_bound(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_variant(method, make_model(), 10, **options)


#: options under which a method does what LoRA does
LORA: list[tuple[str, dict[str, Any]]] = [
    ("flat-lora", {"rho": 0.0, "where": "weights"}),
    ("flat-lora", {"rho": 0.0, "where": "outputs"}),
    ("cola", {"links": 1}),
    ("rm-lora", {"ranks": RANK, "orthogonality": 0.0}),
    ("xgblora", {"rank": 1, "booster_steps": 100, "layers": 1.0}),
]


@pytest.mark.parametrize(("method", "options"), LORA, ids=str)
@both
def test_with_nothing_to_do_it_is_lora_bit_for_bit(method: str, options: dict[str, Any], optimizer: str) -> None:
    run, lora = start(method, optimizer, **options), start_lora(optimizer, options.get("rank", RANK))
    run.train(20)
    lora.train(20)
    run.optimizer.zero_grad()
    run.variant.detach()
    assert differing(run.trained(), lora.trained()) == []


@pytest.mark.parametrize("optimizer", ["vadam", "ivon"])
@pytest.mark.parametrize(("method", "options"), [("lora-pro", {}), ("rm-lora", {"ranks": RANK, "orthogonality": 5.0})])
def test_changed_gradients_move_the_mean_and_leave_the_curvature(
    method: str, options: dict[str, Any], optimizer: str
) -> None:
    run, lora = start(method, optimizer, **options), start_lora(optimizer)
    run.train(1)
    lora.train(1)
    states = [[one.optimizer.state[p] for g in one.optimizer.param_groups for p in g["params"]] for one in (run, lora)]
    pairs = list(zip(*states, strict=True))
    assert all(torch.equal(ours["hess"], theirs["hess"]) for ours, theirs in pairs)
    assert not all(torch.equal(ours["momentum"], theirs["momentum"]) for ours, theirs in pairs)


def test_variants_that_change_the_same_are_not_attached_together() -> None:
    run = start("cola", "adamw")
    with pytest.raises(ValueError, match="RmLora and Cola both change masks; attach one of them"):
        make_variant("rm-lora", run.model).attach(run.optimizer)
    model = make_model()
    pruner = RankPruner(find_adapters(model), 2, total_steps=10)
    optimizer = VAdam([p for p in model.parameters() if p.requires_grad], num_examples=100, batch_size=8, pruner=pruner)
    with pytest.raises(ValueError, match="both decide about ranks; take one of them"):
        make_variant("rm-lora", model).attach(optimizer)


#: what only a posterior makes possible, and the optimizer that has it
BAYESIAN: list[tuple[str, dict[str, Any], str]] = [
    ("beamlora", {"parents": "now"}, "IVON or VAdam, or parents='cached'"),
    ("beamlora", {"score": "snr"}, "IVON or VAdam, or score='gate'"),
    ("cola", {"carry": "curvature"}, "IVON or VAdam, or carry='nothing'"),
    ("diffora", {"score": "snr"}, "IVON or VAdam, or score='gate'"),
    ("diffora", {"score": "gain"}, "VAdam, or score='gate'"),
    ("flat-lora", {"top_up": True}, "IVON or VAdam, or top_up=False"),
    ("lora-pro", {"damping": "prior"}, "IVON or VAdam, or damping=0.0"),
    ("rm-lora", {"choose": "thompson"}, "IVON or VAdam, or choose='uniform'"),
    ("sora", {"strength": "auto"}, "IVON or VAdam, or strength=0.001"),
    ("xgblora", {"choose": "gain"}, "VAdam, or choose='random'"),
]


@pytest.mark.parametrize(("method", "options", "cure"), BAYESIAN)
def test_an_optimizer_without_what_it_needs_is_refused(method: str, options: dict[str, Any], cure: str) -> None:
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} reads what AdamW lacks: take {cure}")):
        start(method, "adamw", **options)
    if cure.startswith("VAdam"):
        with pytest.raises(ValueError, match=f"{name}={value!r} reads what IVON lacks"):
            start(method, "ivon", **options)


#: method, kind of layer, and what the message must name
LAYERS: list[tuple[str, str, str]] = [
    ("lora-pro", "dora", "has no such gradients: its update is not B A alone"),
    ("cola", "dora", "takes no links: its update is not B A alone"),
    ("sora", "dora", "cannot have gates: its update is not B A alone"),
    ("sora", "attention", "cannot have gates: PEFT merges A and B into nn.MultiheadAttention"),
    ("beamlora", "attention", "cannot have gates: PEFT merges"),
    ("flat-lora", "attention", "takes no noise: PEFT merges"),
]


@pytest.mark.parametrize(("method", "kind", "message"), LAYERS)
def test_layers_that_are_computed_otherwise_are_refused(method: str, kind: str, message: str) -> None:
    from peft import LoraConfig, get_peft_model

    net: Any = variant_problem.base()
    if kind == "attention":
        net.layers[0] = torch.nn.MultiheadAttention(8, 2)
    model = get_peft_model(net, LoraConfig(use_dora=kind == "dora", target_modules=["layers.0"]))
    with pytest.raises(ValueError, match=rf"layer '.*layers.0' {message}"):
        make_variant(method, model)


@pytest.mark.parametrize("optimizer", ["adamw", "ivon"])
def test_a_closure_is_evaluated_before_the_step_acts(optimizer: str) -> None:
    plain, closed = start("sora", optimizer), start("sora", optimizer)
    plain.train(3)

    def closure() -> torch.Tensor:
        closed.optimizer.zero_grad()
        loss = loss_of(closed.model)
        loss.backward()
        return loss

    for _ in range(3):
        closed.optimizer.step(closure)
    assert differing(plain.trained(), closed.trained()) == []
    assert closed.variant.step == 3


@pytest.mark.parametrize(
    ("method", "options"), [("diffora", {"score": "snr"}), ("sora", {"strength": 1.0}), ("xgblora", {})]
)
def test_the_posterior_has_no_spread_where_a_method_has_dropped_something(method: str, options: dict[str, Any]) -> None:
    """Else averages over its samples would move layers that nobody trained, and that are zero."""
    run = start(method, "vadam", **options)
    run.train(STEPS[method] - 5)
    found, names = run.variant.posterior(), {id(p): name for name, p in run.model.named_parameters()}
    assert any(ranks.any() for _, _, ranks in run.variant.at_rest())
    for p, dim, ranks in run.variant.at_rest():
        std = found.std[names[id(p)]].movedim(dim, 0)
        assert bool((std[~ranks] > 0).all())
        assert not bool(std[ranks].any())


def test_the_posterior_is_that_of_parameters_which_share_memory() -> None:
    from peft import get_peft_model

    lora = lora_config(target_modules=["q_proj", "embed_tokens", "lm_head"], ensure_weight_tying=True)
    model = get_peft_model(make_base(tie_word_embeddings=True), lora)
    variant = METHODS["rm-lora"](model)
    frozen = next(p for p in model.parameters() if not p.requires_grad)  # has none
    variant.attach(VAdam([*variant.param_groups(), {"params": [frozen]}], num_examples=8))
    found = variant.posterior()
    assert len(found.names) == len({p.data_ptr() for p in model.parameters() if p.requires_grad}) == 6

"""500 random adapters, exported and read back by PEFT: every update is the trained one, or there is a reason."""

import copy
import math
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_lora import export_lora, export_saved, find_adapters
from ivon_lora.lora.names import tensor_name
from ivon_lora.posterior.tensor_file import write_tensors
from tests.export_models import Named, peft

NAMES: tuple[str, ...] = ("q", "k.q", "layer1", "layer11", "1", "1.1", "lora_A", "lora_head", "module", "model.model")
NAMES += ("base_layer2", "a+b", "x[0]", "^q", "v*", "experts.0.w", "experts.1.w", "weight", "block.lora_B", "_orig")
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Random(Named):
    def __init__(self, dice: random.Random, dtype: torch.dtype) -> None:
        super().__init__(dice.sample(NAMES, dice.randint(2, 6)), lambda: _layer(dice))
        self.head = nn.Linear(4, 2)
        self.to(dtype)


def _layer(dice: random.Random) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    kinds: tuple[Callable[[], nn.Module], ...] = (
        lambda: nn.Linear(6, 5, bias=dice.random() < 0.5),
        lambda: nn.Linear(4, 4),
        lambda: nn.Embedding(7, 4),
        lambda: nn.Conv2d(3, 4, dice.choice((1, 2))),
        lambda: nn.Conv1d(3, 2, 3),
        lambda: Conv1D(5, 3),
    )
    return dice.choices(kinds, weights=(4, 4, 1, 1, 1, 1))[0]()


def _config(dice: random.Random, base: Random) -> Any:
    present = [path for path in base.names if type(base.get_submodule(path)) is not nn.Module]
    targets: Any = dice.sample(present, dice.randint(1, len(present)))
    linear = all(isinstance(base.get_submodule(path), nn.Linear) for path in targets)
    common = {"target_modules": targets, "lora_alpha": dice.choice((1, 4, 6.5, 7))}
    if linear and dice.random() < 0.25:
        return peft.AdaLoraConfig(init_r=dice.randint(1, 5), total_step=9, **common)
    some = dice.choice(targets)
    return peft.LoraConfig(
        r=dice.randint(1, 6),
        use_rslora=dice.random() < 0.3,
        use_dora=dice.random() < 0.25,
        bias=dice.choice(("none", "none", "none", "all", "lora_only")),
        modules_to_save=dice.choice((None, None, ["head"])),
        rank_pattern={some.replace(".", r"\."): dice.randint(1, 7)} if _is_plain(some) and dice.random() < 0.3 else {},
        alpha_pattern={some.replace(".", r"\."): dice.randint(1, 9)} if _is_plain(some) and dice.random() < 0.3 else {},
        **common,
    )


def _is_plain(path: str) -> bool:
    return path.replace(".", "").replace("_", "").isalnum()


def _train(dice: random.Random, model: Any) -> None:
    generator = torch.Generator().manual_seed(dice.randrange(1000))
    with torch.no_grad():
        for p in (p for n, p in model.named_parameters() if p.requires_grad and "ranknum" not in n):
            p.add_(torch.randn(p.shape, generator=generator).to(p.dtype) * 0.3)
        for adapter in find_adapters(model):
            dead = dice.sample(range(adapter.rank), dice.randint(0, adapter.rank))
            gate, dim = (adapter.B, 1) if adapter.E is None else (adapter.E, 0)
            gate.index_fill_(dim, torch.tensor(dead, dtype=torch.long), 0.0)


def _updates(model: Any) -> dict[str, Tensor]:
    """What every parameter of the base model has gained, and what stands in its place."""
    found = {}
    for path, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight") and "merged_adapters" in vars(module):
            found[path] = module.get_delta_weight("default").detach()
            if "default" in (getattr(module, "lora_magnitude_vector", None) or {}):
                found[f"{path} magnitude"] = module.lora_magnitude_vector["default"].weight.detach()
    for name, p in model.base_model.model.named_parameters():
        if ("bias" in name and "original_module" not in name) or "modules_to_save" in name:
            plain = name.replace("base_layer.", "").replace("modules_to_save.default.", "")
            found[plain] = p.detach()
    return found


def _source(dice: random.Random, model: Any, folder: Path, layout: str) -> None:
    """One of the ways to export."""
    way = dice.choice(("model", "model", "inside", "saved", "raw", "twice"))
    if way in ("model", "inside"):
        export_lora(model if way == "model" else nn.Sequential(model.base_model), None, folder, layout)
        return
    state = {key: tensor.clone() for key, tensor in peft.get_peft_model_state_dict(model).items()}
    weights = folder / "saved" / "adapter_model.safetensors"
    write_tensors(weights, state, {"format": "pt"})  # as save_pretrained does, but for the model card
    model.peft_config["default"].save_pretrained(folder / "saved")
    if way == "raw":
        state = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        if dice.random() < 0.3:
            state = {f"module.{name}": tensor for name, tensor in state.items()}
        write_tensors(weights, state, {"format": "pt"})
    first = folder / "first" if way == "twice" else folder
    export_saved(folder / "saved", first, dice.choice(("uniform", "compact")) if way == "twice" else layout)
    if way == "twice":
        export_saved(first, folder, layout)


def _poison(dice: random.Random, model: Any) -> bool:
    """Sometimes a number that is not finite, in any tensor that was trained."""
    if dice.random() > 0.1:
        return False
    p = dice.choice([p for n, p in model.named_parameters() if p.requires_grad and "lora_" in n])
    with torch.no_grad():
        p.view(-1)[dice.randrange(p.numel())] = dice.choice((math.nan, math.inf, -math.inf))
    return True


def _one(seed: int, folder: Path) -> str:
    dice = random.Random(seed)
    dtype = dice.choice(DTYPES)
    base = Random(dice, dtype)
    try:
        model = peft.get_peft_model(copy.deepcopy(base), _config(dice, base), autocast_adapter_dtype=False)
        adapters = find_adapters(model)
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError):  # a combination that PEFT does not build
        return "not built"
    _train(dice, model)
    poisoned = _poison(dice, model)
    wanted = _updates(model)
    dead = not any(bool(wanted[a.name.removeprefix("base_model.model.")].any()) for a in adapters)
    dead &= not any("magnitude" in name for name in wanted)  # those of DoRA act without ranks
    trained = [name for name, p in model.named_parameters() if p.requires_grad and "ranknum" not in name]
    dead &= all(tensor_name(name).part for name in trained)  # heads and biases go alone
    layout = dice.choice(("uniform", "compact"))
    if poisoned or dead:
        with pytest.raises(ValueError, match=r"^[^\n]*(not finite|no rank left)[^\n]*$"):
            _source(dice, model, folder, layout)
        return "refused"
    _source(dice, model, folder, layout)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, autocast_adapter_dtype=False)
    found = _updates(loaded)
    for name, tensor in wanted.items():
        got = found.get(name, torch.zeros(()))
        unit = torch.finfo(dtype).eps * (4 if dtype in (torch.bfloat16, torch.float16) else 8)
        error = float((got.double() - tensor.double()).abs().max())
        assert error <= unit * max(1.0, float(tensor.double().abs().max())), (
            f"seed {seed}: {name} differs by {error:.2g}"
        )
    assert not {name for name in found if name not in wanted and bool(found[name].any())}, f"seed {seed}"
    return "exact"


@pytest.mark.parametrize("block", range(10))
def test_random_adapters_are_exact_or_refused(block: int, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcomes = [_one(seed, tmp_path / str(seed)) for seed in range(50 * block, 50 * block + 50)]
    assert outcomes.count("exact") >= 30
    assert outcomes.count("refused") >= 1

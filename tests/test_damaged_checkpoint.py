"""Checkpoints of `ivon-lora finetune` that are damaged, cut or foreign: one clear line, and nothing has changed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from ivon_lora import IVON
from ivon_lora.finetune.checkpoint import checkpoint_path, read_checkpoint, restore, write_checkpoint
from ivon_lora.finetune.errors import InputError
from ivon_lora.finetune.history import History
from ivon_lora.finetune.methods import Method, make_method
from ivon_lora.finetune.model import load_base
from ivon_lora.finetune.settings import make_settings
from tests.tiny_classifier import make_model

SETTINGS = make_settings({"rank": 3, "target_rank": 2, "steps": 20})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("damaged") / "model"))


def new(model: str) -> Method:
    return make_method(load_base(model, 2, 0), SETTINGS, 50)


def photo(method: Method) -> list[torch.Tensor]:
    tensors = [p.detach().clone() for p in method.trainable().values()]
    states = [x.clone() for state in method.optimizer.state.values() for x in state.values()]
    return [*tensors, *states, torch.tensor(method.optimizer.param_groups[0].get("completed_steps", 0))]


def step(method: Method) -> None:
    method.begin_step()
    assert isinstance(method.optimizer, IVON)
    method.optimizer.count_examples(8)  # there is no forward pass that would
    for p in method.trainable().values():
        p.grad = torch.ones_like(p)
    method.finish_step(1)


@pytest.fixture(scope="module")
def folder(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with the checkpoint of one step."""
    out = tmp_path_factory.mktemp("run")
    method = new(model)
    step(method)
    write_checkpoint(out, SETTINGS, method, History(), 1, "mark", 2.0)
    return out


def test_a_sound_checkpoint_is_restored(model: str, folder: Path) -> None:
    before, method = new(model), new(model)
    step(before)
    restore(method, read_checkpoint(folder))
    assert all(torch.equal(a, b) for a, b in zip(photo(before), photo(method), strict=True))


def test_cut_or_flipped_bytes_never_pass_unnoticed(folder: Path, tmp_path: Path) -> None:
    """Either one InputError, or, where the damage lies in padding or names of no consequence, the same content."""
    sound = checkpoint_path(folder).read_bytes()
    expected = read_checkpoint(folder)
    draw = random.Random(0)
    path = checkpoint_path(tmp_path)
    path.parent.mkdir()
    messages = []
    for trial in range(60):
        damaged = bytearray(sound)
        if trial % 3 == 0:
            del damaged[draw.randrange(len(damaged)) :]
        else:
            for _ in range(draw.choice([1, 64])):
                damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            found = read_checkpoint(tmp_path)
        except InputError as error:
            messages.append(str(error))
        else:
            assert found.settings == expected.settings
            assert found.step == expected.step
            assert found.tensors["model"].keys() == expected.tensors["model"].keys()
            for name, value in expected.tensors["model"].items():
                assert torch.equal(found.tensors["model"][name], value)
    assert len(messages) > 50
    assert all("start again with --overwrite" in message and "\n" not in message for message in messages)


@pytest.mark.parametrize(
    "fault", ["no dict", "version", "missing", "settings", "names", "shape", "momentum", "foreign"]
)
def test_foreign_content_is_refused_and_changes_nothing(fault: str, model: str, folder: Path, tmp_path: Path) -> None:
    content = torch.load(checkpoint_path(folder), weights_only=True)
    tensors = content["tensors"]
    if fault == "no dict":
        content = [1, 2]
    elif fault == "version":
        content["format"] = 99
    elif fault == "missing":
        del content["history"]
    elif fault == "settings":
        content["settings"]["flavour"] = "sour"
    elif fault == "names":
        tensors["model"] = {name + "x": value for name, value in tensors["model"].items()}
    elif fault == "shape":
        tensors["model"] = {name: value[:1] for name, value in tensors["model"].items()}
    elif fault == "momentum":
        tensors["optimizer"]["state"][0]["momentum"] = torch.tensor([float("nan")])
    elif fault == "foreign":
        other = new(model)
        adamw = torch.optim.AdamW(other.trainable().values())
        tensors["optimizer"] = adamw.state_dict()
    path = checkpoint_path(tmp_path)
    path.parent.mkdir()
    torch.save(content, path)
    method = new(model)
    before = photo(method)
    with pytest.raises(InputError, match=r"start again with --overwrite|unknown settings") as caught:
        restore(method, read_checkpoint(tmp_path))
    assert "\n" not in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, photo(method), strict=True))

"""An adapter exported from its files alone is the one exported from the model; files of no use give one line."""

import copy
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_lora import (
    IVON,
    export_lora,
    export_samples,
    export_saved,
    load_posterior,
    save_posterior,
    snapshot_posterior,
)
from ivon_lora.cli.main import main
from ivon_lora.export.read_saved import read_adapter
from ivon_lora.posterior.tensor_file import write_tensors
from tests.export_models import (
    IDS,
    SIZES,
    Around,
    Layers,
    Named,
    adapted,
    config_of,
    distance,
    exported,
    llama,
    loaded,
    mixtral,
    output,
    peft,
    pruned,
    tensors_of,
)
from tests.test_export_consumers import KINDS, configuration

pytestmark = pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape")  # PEFT takes biases for factors


def same_files(one: Path, other: Path) -> None:
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    numbers = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora", "peft_type")
    selection = ("target_modules", "exclude_modules", "target_parameters")
    assert all(config_of(one)[k] == config_of(other)[k] for k in (*numbers, *selection))


SAVED: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    # but those where PEFT also saves what was not trained: the embeddings of the base
    **{kind: KINDS[kind] for kind in KINDS.keys() - {"embedding", "rows added to the vocabulary"}},
    "rsdora": (Layers, {"target_modules": ["embed", "linear", "conv3"], "use_rslora": True, "use_dora": True}),
    "parameters": (
        llama,
        {"target_modules": ["q_proj"], "target_parameters": ["embed_tokens.weight", "o_proj.weight"]},
    ),
    "experts that PEFT fused": (mixtral, {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
}


@pytest.mark.parametrize("layout", ["uniform", "compact"])
@pytest.mark.parametrize("case", sorted(SAVED))
def test_files_and_model_give_the_same_export(case: str, layout: str, tmp_path: Path) -> None:
    make, options = SAVED[case]
    model = adapted(make(), configuration(options))
    model.save_pretrained(tmp_path / "saved")
    export_lora(model, None, tmp_path / "model", layout)
    report = export_saved(tmp_path / "saved", tmp_path / "files", layout)
    assert report.max_abs_error <= 1e-6
    same_files(tmp_path / "model", tmp_path / "files")
    assert distance(loaded(make(), tmp_path / "files"), output(model)) < 1e-5
    # an export can be exported again, into the other layout and back
    export_saved(tmp_path / "files", tmp_path / "other", "compact" if layout == "uniform" else "uniform")
    export_saved(tmp_path / "other", tmp_path / "back", layout)
    same_files(tmp_path / "files", tmp_path / "back")


@pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape")  # of layers without ranks, as PEFT saves them
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
def test_an_adalora_adapter_that_peft_pruned(tmp_path: Path) -> None:
    base = Named(["one", "two", "three"])
    schedule = {"init_r": 4, "target_r": 1, "total_step": 12, "tinit": 1, "tfinal": 1, "deltaT": 1}
    config = peft.AdaLoraConfig(**schedule, lora_alpha=3, target_modules=base.names)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.base_model.peft_config["default"].orth_reg_weight = 0.1
    for step in range(1, 13):
        model.base_model.model(IDS).square().mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    wanted = output(model.eval())
    model.save_pretrained(tmp_path / "adalora")
    ranks = read_adapter(tmp_path / "adalora").ranks
    assert sum(ranks.values()) == 3
    report = export_saved(tmp_path / "adalora", tmp_path / "lora")
    assert ranks == report.ranks
    assert config_of(tmp_path / "lora")["peft_type"] == "LORA"
    assert distance(loaded(base, tmp_path / "lora"), wanted) < 1e-6


@pytest.mark.filterwarnings("ignore:pruning is not final:UserWarning")
@pytest.mark.parametrize("steps", [11, 20], ids=["annealing", "final"])
def test_a_posterior_brings_masks_and_means_to_files_that_hold_a_sample(steps: int, tmp_path: Path) -> None:
    """With 11 of 20 steps done, masked ranks go on learning. The head that was trained whole comes along."""
    model, optimizer = pruned(steps)
    export_lora(model, optimizer, tmp_path / "model")
    save_posterior(optimizer, tmp_path / "posterior.safetensors")
    optimizer.train()
    model.save_pretrained(tmp_path / "saved")  # of weights that are a sample: the files alone are not the mean
    posterior = load_posterior(tmp_path / "posterior.safetensors")
    report = export_saved(tmp_path / "saved", tmp_path / "files", posterior=posterior)
    same_files(tmp_path / "model", tmp_path / "files")
    assert sum(report.ranks.values()) == sum(row["live"] for row in optimizer.rank_table()) < 8
    without = export_saved(tmp_path / "saved", tmp_path / "without")
    assert sum(without.ranks.values()) == (8 if steps == 11 else sum(report.ranks.values()))


def test_samples_by_command_line_are_those_of_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = pruned(20)
    reports = export_samples(model, optimizer, tmp_path / "model", 2, "gguf")
    model.save_pretrained(tmp_path / "saved")
    command = ["export", str(tmp_path / "saved"), "--layout=gguf", "--samples=2", f"--out={tmp_path / 'files'}"]
    assert main(command) == 2
    assert "--samples needs a posterior" in capsys.readouterr().err
    save_posterior(optimizer, tmp_path / "saved" / "posterior.safetensors")
    assert main([*command, "--json"]) == 0
    assert [r["max_rank"] for r in json.loads(capsys.readouterr().out)] == [report.max_rank for report in reports]
    for name in ("sample-0", "sample-1"):
        same_files(tmp_path / "model" / name, tmp_path / "files" / name)


def test_a_posterior_of_something_else_is_refused(tmp_path: Path) -> None:
    model, optimizer = pruned(20)
    model.save_pretrained(tmp_path / "saved")
    export_lora(model, optimizer, tmp_path / "exported")
    posterior = snapshot_posterior(optimizer)
    with pytest.raises(ValueError, match="has lost its pruned ranks already"):
        export_saved(tmp_path / "exported", tmp_path / "out", posterior=posterior)
    other = IVON(nn.Linear(2, 2).named_parameters(), lr=0.1, ess=1)
    with pytest.raises(ValueError, match="no tensor in common"):
        export_saved(tmp_path / "saved", tmp_path / "out", posterior=snapshot_posterior(other))
    assert not (tmp_path / "out").exists()


def saved(folder: Path, config: Any = None) -> tuple[Path, Tensor]:
    """An adapter as PEFT saves it, and what it computes."""
    config = config or peft.LoraConfig(r=2, target_modules=["embed", "linear", "conv3"], modules_to_save=["head"])
    model = adapted(Layers(), config, live={})
    model.save_pretrained(folder)
    return folder, output(model)


def edited(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = {key: tensor.clone() for key, tensor in change(tensors_of(folder)).items()}
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})


def configured(folder: Path, **changes: Any) -> None:
    config = {name: value for name, value in {**config_of(folder), **changes}.items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(config))


P = "base_model.model."


def renamed(*pairs: tuple[str, str]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for old, new in pairs:
            tensors = {key.replace(old, new): tensor for key, tensor in tensors.items()}
        return tensors

    return change


def training(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    factors = [(f"lora_{part}", f"lora_{part}.{name}") for part in ("A", "B", "embedding_A", "embedding_B")]
    return renamed(*factors, ("head.", f"head.modules_to_save.{name}."))


NAMES: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "training": lambda t: training("default")(t) | {f"{P}head.original_module.weight": torch.ones(2, 16)},
    "another adapter's name": training("mine"),
    "default and another": lambda t: training("default")(t) | {k: v * 2 for k, v in training("mine")(t).items()},
    "no prefix": renamed((P, "")),
    "DDP of an injected model": renamed((P, "module.")),
    "compiled": renamed((P, f"_orig_mod.{P}"), ("linear.", "linear._orig_mod.")),
    "FSDP": renamed((P, f"_fsdp_wrapped_module.{P}_fsdp_wrapped_module.")),
    "PEFT twice": renamed((P, P + P)),
    "a trainer's module": renamed((P, f"model.{P}")),
}


@pytest.mark.parametrize("names", NAMES)
def test_the_names_of_a_training_state_become_those_that_peft_loads(names: str, tmp_path: Path) -> None:
    folder, wanted = saved(tmp_path / "saved")
    edited(folder, NAMES[names])
    export_saved(folder, tmp_path / "out")
    assert distance(loaded(Layers(), tmp_path / "out"), wanted) < 1e-6


def one(part: str, change: Callable[[Tensor], Any]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Changes tensors whose name has ``part`` in it; None takes them away."""

    def edit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {key: change(tensor) if part in key else tensor for key, tensor in tensors.items()}
        return {key: tensor for key, tensor in found.items() if tensor is not None}

    return edit


def torch_file(value: Any) -> bytes:
    torch.save(value, buffer := io.BytesIO())
    return buffer.getvalue()


SPARSE = {f"{P}q.lora_A.weight": torch.eye(2, 6).to_sparse(), f"{P}q.lora_B.weight": torch.zeros(6, 2)}
#: the message, and what was done to the tensors, the configuration, or a file
DAMAGED: list[tuple[str, Any]] = [
    ("layer 'linear' lacks lora_A: save the adapter again", one("linear.lora_A", lambda v: None)),
    ("the file of weights has no LoRA tensors", one("lora_", lambda v: None)),
    ("layer 'conv3' has lora_B that is empty, as a run with partitioned", one("lora_B", lambda v: v.flatten()[:0])),
    ("tensor 'head.weight' is empty, as a run with partitioned", one("head.weight", lambda v: v[:0])),
    (
        "layer 'linear' has rank 16, its configuration says 2: if its factors are transposed",
        one("linear.lora", lambda v: v.T),
    ),
    ("layer 'linear' has factors of different ranks", one("linear.lora_A", lambda v: v.T)),
    ("layer 'linear' is none of LoRA", one("linear.lora_A", lambda v: v[0, 0])),
    ("layer 'embed' has lora_embedding_A that is not finite", one("embedding_A", lambda v: v * torch.nan)),
    ("tensor 'head.bias' is not finite", one("head.bias", lambda v: v / 0)),
    ("tensor 'head.weight' is torch.strided of torch.int8", one("head.weight", lambda v: v.to(torch.int8))),
    ("layer 'linear' has lora_A that is torch.strided of torch.int64", one("linear.lora_A", lambda v: v.long())),
    ("several adapters, None, x, and none is called default", lambda t: t | renamed(("lora_A.", "lora_A.x."))(t)),
    ("is in the file twice, under different names", lambda t: t | renamed((P, f"_orig_mod.{P}"))(t)),
    ("has r=None, which no version of PEFT writes", {"r": ...}),
    ("layer 'conv3' has rank 2, its configuration says 9", {"r": 9}),
    ("has lora_alpha=None, which no version of PEFT", {"lora_alpha": ...}),
    (r"has rank_pattern=\{'\(': 2\}, which no version of PEFT writes", {"rank_pattern": {"(": 2}}),
    (r"has target_modules='\(', which no version of PEFT writes", {"target_modules": "("}),
    (r"has modules_to_save=\[3\], which no version", {"modules_to_save": [3]}),
    ("has bias=3, which no version of PEFT writes", {"bias": 3}),
    (r"has modules_to_save=\['\('\], which no version", {"modules_to_save": ["("]}),
    ("has use_rslora='no', which no version of PEFT writes", {"use_rslora": "no"}),
    ("lacks lora_magnitude_vector", {"use_dora": True}),
    ("layer 'conv3' lacks lora_E", {"peft_type": "ADALORA", "init_r": 2}),
    ("adapter of type IA3: LORA and ADALORA are supported", {"peft_type": "IA3"}),
    ("adapter_config.json is not JSON", ("adapter_config.json", b"{")),
    ("is truncated or not a safetensors", ("adapter_model.safetensors", b"version https://git-lfs")),
    ("is truncated or not a file of torch.save", ("adapter_model.bin", b"hello")),
    ("is truncated or not a file of torch.save", ("adapter_model.bin", pickle.dumps(slice(1)))),
    ("layer 'q' has lora_A that is torch.sparse_coo", ("adapter_model.bin", torch_file(SPARSE))),
]


@pytest.mark.parametrize(("message", "damage"), DAMAGED)
def test_files_that_cannot_be_used_give_one_line(
    message: str, damage: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = saved(tmp_path / "saved")
    if callable(damage):
        edited(folder, damage)
    elif isinstance(damage, dict):
        configured(folder, **damage)
    else:
        (folder / "adapter_model.safetensors").unlink()
        (folder / damage[0]).write_bytes(damage[1])
    with pytest.raises(ValueError, match=message) as caught:
        export_saved(folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    for verb in (["inspect", str(folder)], ["export", str(folder), "--out", str(tmp_path / "out")]):
        assert main(verb) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1


UNSAID: list[dict[str, Any]] = [{"init_lora_weights": "pissa"}, {"use_qalora": True}, {"kasa_config": {}}]
UNSAID += [{"modules_to_save": ["score"]}, {"trainable_token_indices": [1]}]


@pytest.mark.parametrize("options", UNSAID, ids=str)
def test_what_files_alone_do_not_say(options: dict[str, Any], tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "saved")
    configured(folder, **options)
    with pytest.raises(ValueError, match=f"{next(iter(options))}.* cannot be exported from its files alone"):
        export_saved(folder, tmp_path / "out")


def test_convolutions_that_need_the_model(tmp_path: Path) -> None:
    base = Around(nn.Conv2d(3, 4, 2), shape=(1, 3, 5, 5))
    config = peft.AdaLoraConfig(init_r=3, total_step=9, target_modules=["conv"])
    model = adapted(copy.deepcopy(base), config, live={"conv": 2})
    model.save_pretrained(tmp_path / "adalora")
    assert [report.ranks for report in exported(model, base, tmp_path)] == [{"conv": 2}] * 2
    with pytest.raises(ValueError, match=r"AdaLoRA on conv \(a convolution\?\) cannot be exported from its files"):
        export_saved(tmp_path / "adalora", tmp_path / "out")


def test_modules_that_a_library_has_moved_since(tmp_path: Path) -> None:
    """transformers renames the keys of an old file when it is loaded; the export of the file must allow the same."""
    import transformers

    def base() -> Any:
        torch.manual_seed(0)
        vision = transformers.CLIPVisionConfig(image_size=16, patch_size=8, **SIZES)
        text = transformers.LlamaConfig(vocab_size=60, num_key_value_heads=1, **SIZES)
        config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=59)
        return transformers.LlavaForConditionalGeneration(config).eval()

    targets = r".*language_model.*(q_proj|v_proj)"
    model = adapted(base(), peft.LoraConfig(r=3, target_modules=targets), live={"0.self_attn.q_proj": 0, "v_proj": 2})
    model.save_pretrained(tmp_path / "old")
    edited(tmp_path / "old", renamed((".model.model.language_model.", ".model.language_model.model.")))
    for layout in ("uniform", "compact"):
        export_saved(tmp_path / "old", tmp_path / layout, layout)
        assert distance(loaded(base(), tmp_path / layout), output(model)) < 1e-5


def test_weights_that_torch_saved(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "new")
    export_saved(folder, tmp_path / "from-new")
    torch.save(tensors_of(folder), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    export_saved(folder, tmp_path / "from-old")
    same_files(tmp_path / "from-new", tmp_path / "from-old")

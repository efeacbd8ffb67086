"""What `export_lora` writes, when it refuses, and what an error leaves behind; consumers have a file of their own."""

import copy
import math
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ivon_lora import (
    RankPruner,
    export_lora,
    export_samples,
    export_saved,
    find_adapters,
    merge_lora,
    posterior_predict,
    save_posterior,
    snapshot_posterior,
)
from ivon_lora.export.read_model import read_model
from ivon_lora.export.verify import check_update
from tests.export_models import (
    IDS,
    Around,
    Layers,
    Named,
    adapted,
    config_of,
    distance,
    exported,
    llama,
    loaded,
    output,
    peft,
    pruned,
    train,
    transformers,
    with_optimizer,
)

accelerate = pytest.importorskip("accelerate")


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def ranks_of(model: nn.Module) -> dict[str, int]:
    return {adapter.name.removeprefix("base_model.model."): adapter.rank for adapter in find_adapters(model)}


def small(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["q"], **options})
    return adapted(Named(["q", "k"]).to(dtype), config, live={})


def test_the_report_and_the_files(tmp_path: Path) -> None:
    model = adapted(Layers(), peft.LoraConfig(r=9, lora_alpha=7, target_modules=["embed", "linear", "w1"]))
    report = export_lora(model, None, tmp_path / "adapter", "compact")
    ranks = {"embed": 3, "linear": 2, "experts.0.w1": 1, "experts.1.w1": 0, "experts.2.w1": 3}
    assert report.ranks == ranks
    assert (report.max_rank, report.suggestion) == (3, "--max-lora-rank 8")
    assert report.notes == (
        "llama.cpp gives layers of this layout wrong scales, without a word: use 'gguf' or 'uniform'",
    )
    assert 0 <= report.max_abs_error <= 1e-6
    assert report.bytes == sum(len(content) for content in files(tmp_path).values())
    assert "compact, 9 ranks in 4 of 5 modules" in str(report)
    written = config_of(tmp_path / "adapter")
    assert (written["r"], written["lora_alpha"], written["use_rslora"]) == (3, 3, False)
    assert written["rank_pattern"] == written["alpha_pattern"] == {"linear": 2}
    assert ranks_of(loaded(Layers(), tmp_path / "adapter")) == {
        **ranks,
        **dict.fromkeys((n for n in ranks if "experts" in n), 3),
    }, "servers stack experts"
    export_lora(model, None, tmp_path / "again", "compact")
    assert files(tmp_path / "adapter") == files(tmp_path / "again")


@pytest.mark.parametrize(("rank", "flag"), [(8, "8"), (9, "16"), (321, "512"), (513, "513")])
def test_the_server_flag(rank: int, flag: str, tmp_path: Path) -> None:
    report = export_lora(small(r=rank), None, tmp_path / "adapter")
    assert report.suggestion == f"--max-lora-rank {flag}"
    assert any("vLLM serves ranks up to 512" in note for note in report.notes) == (rank > 512)


@pytest.mark.parametrize(
    "ranks",
    [
        {"a+b.q[0]": 3, "a+b.q(1)|x": 1, "a+b.^k$": 2, "a+b.v*": 0},  # characters with a meaning in a regex
        {"q": 3, "block.q": 1, "outer.block.q": 2},  # paths that end like other paths
        {"q": 1, "block.q": 0, "other.q": 2},  # a module without ranks that ends like one that is kept
        {f"layers.{i}.{kind}": (i + len(kind)) % 4 for i in range(12) for kind in ("q", "qv", "free.q")},
    ],
    ids=["regex", "ends", "dropped", "many"],  # from 20 targets on PEFT shortens the list when it loads
)
def test_names_reach_their_own_module_only(ranks: dict[str, int], tmp_path: Path) -> None:
    base = Named([*ranks, "free.x"])
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=list(ranks))
    model = adapted(copy.deepcopy(base), config, {f"base_model.model.{name}": rank for name, rank in ranks.items()})
    exported(model, base, tmp_path)
    kept = {name: rank for name, rank in ranks.items() if rank}
    assert ranks_of(loaded(copy.deepcopy(base), tmp_path / "compact")) == kept
    assert ranks_of(loaded(base, tmp_path / "uniform")) == dict.fromkeys(kept, max(kept.values()))


def test_two_adapters_are_exported_and_merged_one_by_one(tmp_path: Path) -> None:
    model: Any = peft.get_peft_model(Layers(), peft.LoraConfig(r=2, target_modules=["linear"]))
    model.add_adapter("wide", peft.LoraConfig(r=5, target_modules=["linear", "embed"], modules_to_save=["head"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.add_(torch.randn_like(p))
    for name, rank in (("default", 2), ("wide", 5)):
        model.set_adapter(name)
        wanted = output(model.eval())
        model.set_adapter("wide" if name == "default" else "default")  # the exported one need not be the active one
        assert export_lora(model, None, tmp_path / name, adapter_name=name).max_rank == rank
        assert distance(loaded(Layers(), tmp_path / name), wanted) < 1e-5
        assert distance(merge_lora(copy.deepcopy(model), None, name), wanted) < 1e-5
    with pytest.raises(ValueError, match="adapter_name='narrow' is not in the model; it has: default, wide"):
        export_lora(model, None, tmp_path / "narrow", adapter_name="narrow")


def test_the_check_refuses_what_rounding_does_not_explain() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        (layer,) = read_model(small(dtype), None, "default").layers
        exported = layer.plain()
        assert check_update(layer, exported) < (1e-6 if dtype == torch.float32 else 0.05)
        for wrong in ({"scaling": 1.02}, {"B": exported.B.flip(1)}, {"A": exported.A[:0], "B": exported.B[:, :0]}):
            with pytest.raises(ValueError, match="layer 'q': the exported update differs from the trained one by"):
                check_update(layer, replace(exported, **wrong))
        exported.B[0, 0] = math.nan
        with pytest.raises(ValueError, match="its update is not finite"):
            check_update(layer, exported)


POISON: dict[str, Any] = {
    "lora_A": peft.LoraConfig(r=3, target_modules=["q"]),
    "lora_B": peft.LoraConfig(r=3, target_modules=["q"]),
    "lora_E": peft.AdaLoraConfig(init_r=3, total_step=9, target_modules=["q"]),
    "lora_B.default.bias": peft.LoraConfig(r=3, target_modules=["q"], lora_bias=True),
    "magnitude": peft.LoraConfig(r=3, target_modules=["q"], use_dora=True),
    "modules_to_save": peft.LoraConfig(r=3, target_modules=["q"], modules_to_save=["k"]),
    "k.bias": peft.LoraConfig(r=3, target_modules=["q"], bias="all"),
}


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("part", POISON)
def test_a_number_that_is_not_finite_is_never_written(part: str, value: float, tmp_path: Path) -> None:
    model = adapted(Named(["q", "k"]), copy.deepcopy(POISON[part]), live={})
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if part in name and p.requires_grad).view(-1)[-1] = value
    optimizer = with_optimizer(model)
    for attempt in (
        lambda: export_lora(model, None, tmp_path / "out"),
        lambda: export_lora(model, optimizer, tmp_path / "out"),
        lambda: merge_lora(model),
        lambda: save_posterior(optimizer, tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match="not finite"):
            attempt()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("moment", ["writing", "verifying", "renaming"])
def test_a_crash_leaves_the_old_directory_intact(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapter" / "tokenizer").mkdir(parents=True)
    (tmp_path / "adapter" / "tokenizer" / "vocab.txt").write_text("files of others stay")
    export_lora(small(), None, tmp_path / "adapter")
    before, rename, calls = files(tmp_path), os.rename, []
    assert len(before) == 3

    def crash_while_writing(tensors: Any, path: Path, metadata: Any = None) -> None:
        Path(path).write_bytes(b"half a file")
        raise OSError("disk full")

    def crash_while_renaming(source: Any, target: Any) -> None:
        calls.append(source)
        rename(source, target if len(calls) != 2 else "/nonexistent/folder")

    place, crash = {
        "writing": ("safetensors.torch.save_file", crash_while_writing),
        "verifying": ("ivon_lora.export.adapter.verify", lambda *files: 1 / 0),
        "renaming": ("os.rename", crash_while_renaming),
    }[moment]
    monkeypatch.setattr(place, crash)
    model = small()
    with torch.no_grad():
        find_adapters(model)[0].A.mul_(2)
    with pytest.raises((OSError, ZeroDivisionError)):
        export_lora(model, None, tmp_path / "adapter")
    assert files(tmp_path) == before
    monkeypatch.undo()
    export_lora(model, None, tmp_path / "adapter")
    after = files(tmp_path)
    assert {name for name in after if after[name] != before[name]} == {"adapter/adapter_model.safetensors"}
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077])
def test_files_have_the_mode_of_the_umask(umask: int, tmp_path: Path) -> None:
    model = small()
    optimizer = with_optimizer(model)
    before = os.umask(umask)
    try:
        export_lora(model, optimizer, tmp_path / "adapter")
        save_posterior(optimizer, tmp_path / "adapter")
        tmp_path.chmod(0o700)
        modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "adapter").iterdir()}
        assert modes == {0o666 & ~umask}
        assert stat.S_IMODE((tmp_path / "adapter").stat().st_mode) == 0o777 & ~umask
        (tmp_path / "adapter").chmod(0o775)  # a directory that is there keeps its own
        export_lora(model, optimizer, tmp_path / "adapter")
        assert stat.S_IMODE((tmp_path / "adapter").stat().st_mode) == 0o775
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    ("path", "layout", "message"),
    [
        ("file", "uniform", "path='file' is a file: name a directory"),
        (".", "uniform", "holds the current working directory"),
        ("", "uniform", "path is empty"),
        ("adapter", "squeezed", "layout='squeezed' is unknown: use 'uniform' or 'compact' or 'gguf'"),
    ],
)
def test_what_cannot_be_written(
    path: str, layout: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        export_lora(small(), None, path, layout)
    assert files(tmp_path) == {"file": b"mine"}


def lora(base: nn.Module, **options: Any) -> Any:
    return adapted(base, peft.LoraConfig(r=2, **options))


def t5() -> Any:
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def dilated() -> Any:
    config = peft.AdaLoraConfig(init_r=3, total_step=10, target_modules=["conv"])
    return adapted(Around(nn.Conv2d(2, 4, 2, dilation=2), shape=(1, 2, 5, 5)), config, live={})


def padded() -> Any:
    return Around(nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), shape=(1, 2, 5, 5))


B = "base_model.model.q.lora_B.default.weight"
KASA = peft.tuners.lora.config.KasaConfig()
OLORA = peft.LoraConfig(r=2, init_lora_weights="olora", target_modules=["q"])
EXPORT, MERGE, BOTH = {"export"}, {"merge"}, {"export", "merge"}
#: another model, or a change of `small()`; who refuses it; in which words
REFUSED: list[tuple[Callable[[Any], Any], set[str], str]] = [
    (lambda _: Named(["q"]), BOTH, "Named has no LoRA layers"),
    (lambda m: m.get_parameter(B).data.zero_(), EXPORT, "no rank left in any of its 1 modules"),
    (lambda m: m.half().get_parameter(B).data.fill_(6e4), EXPORT, r"has lora_B that is not finite \(.* torch.float16"),
    (lambda m: setattr(m.get_parameter(B), "data", torch.zeros(0)), BOTH, "has lora_B that is empty, as a run"),
    (lambda m: accelerate.cpu_offload(m.base_model.model, "cpu"), BOTH, "on the meta device"),
    (lambda _: lora(Named(["q"]), target_modules=["q"], kasa_config=KASA), BOTH, "does not express KasaLinear"),
    (lambda _: dilated(), EXPORT, r"layer 'conv' cannot be exported: .* has \(2, 2\); merge_lora"),
    (lambda m: nn.ModuleDict({"text": m, "image": small()}), BOTH, "PEFT models inside ModuleDict: text, image;"),
    (lambda _: lora(t5(), target_modules=["shared"]), MERGE, "layer 'shared' adapts a weight that other modules"),
    (lambda m: m.merge_adapter(), MERGE, "layer 'q' is merged already: call model.unmerge_adapter"),
    (lambda _: lora(Layers(), target_modules=["grouped"]), MERGE, "cannot be merged: Conv1d has no weight"),
    (lambda _: lora(llama(), target_modules=["q_proj"], lora_bias=True), MERGE, "bias of LoRA, but its module has"),
    (lambda _: lora(padded(), target_modules=["conv"]), MERGE, "has padding_mode='circular', its update pads"),
    (lambda _: lora(llama(), task_type="CAUSAL_LM", alora_invocation_tokens=[3]), MERGE, "an aLoRA adapter acts from"),
    (lambda m: m.add_adapter("b", OLORA), EXPORT, "base="),
]


@pytest.mark.filterwarnings("ignore:.*lora_bias:UserWarning")
@pytest.mark.parametrize(("change", "who", "message"), REFUSED)
def test_what_is_refused_stays_as_it_was(change: Any, who: set[str], message: str, tmp_path: Path) -> None:
    model = small()
    other = change(model)
    model = other if isinstance(other, nn.Module) else model
    before = {name: p.clone() for name, p in model.named_parameters() if not p.is_meta}
    verbs = {"export": lambda: export_lora(model, None, tmp_path / "adapter"), "merge": lambda: merge_lora(model)}
    for verb in who:
        with pytest.raises(ValueError, match=message):
            verbs[verb]()
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if not p.is_meta)


@pytest.mark.parametrize("initialisation", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("pruned", [False, True])
def test_an_initialisation_that_changed_the_base(initialisation: str, pruned: bool, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["q", "k"], init_lora_weights=initialisation)
    model = adapted(Named(["q", "k"]), config, live={"q": 1} if pruned else {})
    wanted = output(model)
    with pytest.raises(ValueError, match=r"moved a part of the base model into an adapter.*base="):
        export_lora(model, None, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"base= has no layer 'q' like the model's"):
        export_lora(model, None, tmp_path / "adapter", base=nn.Linear(2, 2))
    other = Named(["q", "k"])
    nn.init.normal_(other.get_submodule("k").weight)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layer 'k', but for 2 ranks, differs from base= by up to"):
        export_lora(model, None, tmp_path / "adapter", base=other)
    report = export_lora(model, None, tmp_path / "adapter", base=Named(["q", "k"]))
    assert report.ranks == {"q": 3 if pruned else 4, "k": 4}
    assert config_of(tmp_path / "adapter")["init_lora_weights"] is True  # loading must not change weights again
    assert distance(loaded(Named(["q", "k"]), tmp_path / "adapter"), wanted) < 1e-5
    assert distance(merge_lora(model), wanted) < 1e-6


def test_a_base_that_another_adapter_changed(tmp_path: Path) -> None:
    model = small()
    model.add_adapter("one", peft.LoraConfig(r=3, target_modules=["q"], init_lora_weights="pissa"))
    wanted = output(model)  # of the first adapter, on what the second has left of the base model
    export_lora(model, None, tmp_path / "adapter", base=Named(["q", "k"]))
    assert distance(loaded(Named(["q", "k"]), tmp_path / "adapter"), wanted) < 1e-5
    model.add_adapter("two", peft.LoraConfig(r=3, target_modules=["k"], init_lora_weights="pissa"))
    with pytest.raises(ValueError, match=r"parameter 'k.weight' differs from base= by up to .* another adapter"):
        export_lora(model, None, tmp_path / "other", base=Named(["q", "k"]))


@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_the_means_of_the_ranks_that_live_are_exported_never_a_sample(kind: str, tmp_path: Path) -> None:
    model, optimizer = pruned(20, kind)
    wanted = output(model)
    for report in exported(model, Named(["q", "k", "last"]), tmp_path, optimizer):
        assert list(report.ranks.values()) == [row["live"] for row in optimizer.rank_table()]
        assert sum(report.ranks.values()) == 3  # 1.5 per adapter
        assert not any("final" in note for note in report.notes)
    optimizer.train()
    sample = [p.detach().clone() for p in model.parameters()]
    export_lora(model, optimizer, tmp_path / "again", "compact")
    assert files(tmp_path / "again") == files(tmp_path / "compact")
    assert all(torch.equal(p, s) for p, s in zip(model.parameters(), sample, strict=True))  # the sample is still live
    assert distance(merge_lora(model, optimizer), wanted) < 1e-6


@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_export_while_pruning_anneals_drops_what_is_masked_and_says_so(kind: str, tmp_path: Path) -> None:
    model, optimizer = pruned(11, kind)
    with pytest.warns(UserWarning, match="pruning is not final: masked ranks still made an update of up to"):
        report = export_lora(model, optimizer, tmp_path / "adapter")
    assert list(report.ranks.values()) == [row["live"] for row in optimizer.rank_table()]
    assert 0 < sum(report.ranks.values()) < 8
    assert "the model is that of step 11, and its ranks are at the target from step" in report.notes[-1]
    wanted = output(merge_lora(model, optimizer))  # merging drops the same ranks
    assert distance(loaded(Named(["q", "k", "last"]), tmp_path / "adapter"), wanted) < 1e-6


def test_ranks_that_the_pruner_keeps_are_exported_even_before_they_make_an_update(tmp_path: Path) -> None:
    model, optimizer = pruned(1)
    for adapter in find_adapters(model):
        adapter.B.data.zero_()
    ranks = export_lora(model, optimizer, tmp_path / "adapter").ranks
    assert list(ranks.values()) == [row["live"] for row in optimizer.rank_table()] == [4, 4]


def test_a_sample_is_never_taken_for_the_mean(tmp_path: Path) -> None:
    model = small()
    optimizer = with_optimizer(model)
    optimizer.train()
    for attempt in (lambda: export_lora(model, None, tmp_path / "adapter"), lambda: merge_lora(model)):
        with pytest.raises(ValueError, match="an IVON holds a sample in the weights"):
            attempt()
    optimizer.eval()
    export_lora(model, None, tmp_path / "adapter")


def test_wrapped_and_foreign_optimizers(tmp_path: Path) -> None:
    model, optimizer = pruned(20)
    wanted = output(model)
    wrapped = accelerate.Accelerator(cpu=True).prepare_optimizer(optimizer)  # which goes through load_state_dict
    for foreign in (wrapped, torch.optim.AdamW(model.parameters())):
        optimizer.train() if foreign is wrapped else optimizer.eval()
        export_lora(model, foreign, tmp_path)
        assert distance(loaded(Named(["q", "k", "last"]), tmp_path), wanted) < 1e-6


def test_samples_are_adapters_whose_mean_is_the_prediction(tmp_path: Path) -> None:
    """Ranks pruned for good stay out of samples too; the model holds the mean before and after."""
    model, optimizer = pruned(20)
    posterior = snapshot_posterior(optimizer)
    before = output(model)
    optimizer.train()
    reports = export_samples(model, optimizer, tmp_path / "ensemble", 3, "compact")
    assert torch.equal(output(model), before)
    assert [report.path.name for report in reports] == ["sample-0", "sample-1", "sample-2"]
    assert len({tuple(report.ranks.items()) for report in reports}) == 1
    assert sum(reports[0].ranks.values()) == 3
    base = Named(["q", "k", "last"])
    base.load_state_dict(model.unload().state_dict())
    answers = torch.stack([output(loaded(copy.deepcopy(base), report.path)).softmax(-1) for report in reports])
    wanted = posterior_predict(pruned(20)[0], posterior, output, 3)
    torch.testing.assert_close(answers.mean(0), wanted)
    assert not torch.allclose(answers[0], answers[1], rtol=1e-4)
    with pytest.raises(ValueError, match="n_samples must be at least 1, got 0"):
        export_samples(model, posterior, tmp_path, 0)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("rank", [1, 3])
def test_a_tied_adapter_is_one_parameter_in_the_export(rank: int, tmp_path: Path) -> None:
    """PEFT ties the adapter of the head to that of the embedding by transposed views over its memory."""
    config = peft.LoraConfig(r=rank, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    model = adapted(llama(tie_word_embeddings=True), config, live={})
    adapters = find_adapters(model)
    assert sum("embed" in a.name or "lm_head" in a.name for a in adapters) == 1
    optimizer = with_optimizer(model, RankPruner(adapters, 1, total_steps=4, warmup=0, final=1))
    train(optimizer, 4, lambda: model(input_ids=IDS, labels=IDS).loss)
    assert sum("hess" in state for state in optimizer.state.values()) == 2 * len(adapters)  # A and B, once
    wanted = output(model)
    optimizer.train()
    report = export_lora(model, optimizer, tmp_path / "adapter")
    assert report.ranks["lm_head"] == report.ranks["model.embed_tokens"]
    model.save_pretrained(tmp_path / "sampled")
    posterior = snapshot_posterior(optimizer)
    assert export_saved(tmp_path / "sampled", tmp_path / "files", posterior=posterior).ranks == report.ranks
    for name in ("adapter", "files"):
        assert distance(loaded(llama(tie_word_embeddings=True), tmp_path / name), wanted) < 1e-5
    sample = posterior.sample(optimizer.seed)
    assert not any("lm_head" in name for name in sample)
    with optimizer.sampled_params(train=False):
        for name, p in model.named_parameters():
            torch.testing.assert_close(p, sample.get(name, p))


def test_what_was_trained_whole_is_exported_without_any_rank(tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_modules": ["q"], "modules_to_save": ["k"]}
    model = adapted(Named(["q", "k"]), peft.LoraConfig(r=3, **options), live={"q": 0})
    assert [report.ranks for report in exported(model, Named(["q", "k"]), tmp_path)] == [{"q": 0}] * 2


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": r".*layers\.1.*(q_proj|gate_proj)"},
        {"target_modules": ["q_proj"], "layers_to_transform": 0},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    ],
)
def test_the_trained_selection_of_modules_is_kept(options: dict[str, Any], tmp_path: Path) -> None:
    """Suffixes and patterns hold where a library moves its modules; layers without ranks are excluded from them."""
    for name, live in {"all": {}, "some": {"0.self_attn.v_proj": 0, "1.self_attn.q_proj": 0}}.items():
        model = adapted(llama(), peft.LoraConfig(r=3, **options), live=live)
        exported(model, llama(), tmp_path / name)
        written = config_of(tmp_path / name / "compact")
        assert written["target_modules"] == options["target_modules"]
        assert name == "some" or {field: written[field] for field in options} == options


def test_full_paths_where_the_configuration_selects_more_than_there_is(tmp_path: Path) -> None:
    model = adapted(llama(), peft.LoraConfig(r=3, target_modules=["q_proj"]), live={})
    attention = model.base_model.model.model.layers[0].self_attn
    attention.q_proj = attention.q_proj.base_layer
    exported(model, llama(), tmp_path)
    assert config_of(tmp_path / "compact")["target_modules"] == ["model.layers.1.self_attn.q_proj"]

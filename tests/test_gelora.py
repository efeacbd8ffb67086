"""GeLoRA ranks: which hidden states are measured, the rule, and the way into PEFT, the pruner and the command line."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_lora import GeloraRanks, find_adapters, gelora_ranks, intrinsic_dimension
from ivon_lora.cli.main import main
from ivon_lora.variants.gelora import GeloraBlock
from tests.tiny_classifier import make_model, make_rows, write_csv

transformers = pytest.importorskip("transformers", reason="needs transformers")
peft = pytest.importorskip("peft", reason="needs peft")


class Lift(nn.Module):
    """A block whose output has ``d_out`` dimensions whatever comes in: it makes pseudo-random codes of its input."""

    def __init__(self, d_out: int) -> None:
        super().__init__()
        self.up, self.out_proj = nn.Linear(d_out, 12), nn.Linear(12, 12)
        self.mix = torch.randn(12, d_out, dtype=torch.float64)

    def forward(self, hidden_states: Tensor) -> Any:
        return self.up((1e4 * hidden_states.double() @ self.mix % 1).float())


class Stack(nn.Module):
    """Blocks of known dimension, in a list, on vectors given as ``x`` (batch, tokens, 12)."""

    def __init__(self, dimensions: tuple[int, ...]) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Lift(d) for d in dimensions), nn.Linear(12, 2)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Any:
        for block in self.blocks:
            x = block(hidden_states=x)
        return self.head(x)


def test_the_rule_on_blocks_of_known_dimension() -> None:
    plane = torch.randn(2, 12)
    found = gelora_ranks(Stack((5, 3, 4, 1)), [{"x": torch.rand(5, 100, 2) @ plane} for _ in range(4)])
    ends = [(block.d_in.estimate, block.d_out.estimate) for block in found.blocks]
    for measured, known in zip(ends, [(2, 5), (5, 3), (3, 4), (4, 1)], strict=True):
        assert measured == pytest.approx(known, rel=0.12)
    assert [(block.name, block.rank) for block in found.blocks] == [
        (f"blocks.{i}", r) for i, r in enumerate((4, 1, 2, 1))
    ]
    assert found.ranks == {f"blocks.{i}.{name}": r for i, r in enumerate([4, 1, 2, 1]) for name in ("up", "out_proj")}
    assert found.total == 16
    assert all(found.blocks[i].d_out is found.blocks[i + 1].d_in for i in range(3))


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24
    )
    return transformers.BertModel(config, add_pooling_layer=False)


def bert_batches(count: int = 6) -> list[dict[str, Tensor]]:
    """Sentences of 4 to 12 tokens, padded to 12."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(count):
        mask = (torch.arange(12) < torch.randint(4, 13, (8, 1), generator=generator)).long()
        ids = torch.randint(1, 60, (8, 12), generator=generator)
        batches.append({"input_ids": ids * mask, "attention_mask": mask})
    return batches


def counted(found: GeloraRanks) -> list[int]:
    """Tokens at the output of each block."""
    return [block.d_out.n_points + block.d_out.n_duplicates for block in found.blocks]


def test_masked_tokens_do_not_count(bert: nn.Module) -> None:
    batches = bert_batches()
    found = gelora_ranks(bert, batches)
    bert.eval()
    states = [
        [hidden[batch["attention_mask"] == 1] for hidden in bert(**batch, output_hidden_states=True).hidden_states]
        for batch in batches
    ]
    expected = [intrinsic_dimension(torch.cat(parts)) for parts in zip(*states, strict=True)]
    assert [block.d_in for block in found.blocks] == expected[:3]
    assert [block.d_out for block in found.blocks] == expected[1:]
    assert counted(found) == [sum(int(batch["attention_mask"].sum()) for batch in batches)] * 3


def test_the_sample_of_tokens(bert: nn.Module) -> None:
    batches = bert_batches()
    found = gelora_ranks(bert, batches, max_points=100)
    assert counted(found) == [100] * 3
    halves = [
        {key: value[part] for key, value in batch.items()} for batch in batches for part in (slice(3), slice(3, 8))
    ]
    again = gelora_ranks(bert, iter(halves), max_points=100)
    assert [b.d_out.estimate for b in again.blocks] == pytest.approx([b.d_out.estimate for b in found.blocks], rel=1e-4)
    other = gelora_ranks(bert, batches, max_points=100, seed=1)
    assert other.blocks[0].d_in != found.blocks[0].d_in
    assert counted(gelora_ranks(bert, [{"input_ids": batch["input_ids"]} for batch in batches])) == [6 * 8 * 12] * 3


def test_the_model_is_left_as_it_was(bert: nn.Module) -> None:
    def seen() -> list[Any]:
        modules = [(m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for m in bert.modules()]
        return [modules, {name: (p.sum().item(), p.grad) for name, p in bert.named_parameters()}]

    bert.train()
    bert.get_submodule("encoder.layer.1").eval()
    before = seen()
    first = gelora_ranks(bert, bert_batches())
    assert first == gelora_ranks(bert, bert_batches())  # no dropout
    assert seen() == before
    with pytest.raises(ValueError, match="input_ids"):  # the model's own
        gelora_ranks(bert, [{"words": torch.zeros(1, 4)}])
    assert seen() == before


def test_patterns_mean_one_layer_each() -> None:
    some = intrinsic_dimension(torch.rand(50, 2))
    blocks = (
        GeloraBlock("layers.0", some, some, 3, ("layers.0.fc",)),
        GeloraBlock("vision.layers.0", some, some, 5, ("vision.layers.0.fc",)),
        GeloraBlock("layersx0", some, some, 2, ("layersx0xfc",)),
    )
    found = GeloraRanks(blocks, alpha_over_rank=0.5)
    from peft.utils.other import get_pattern_key

    for module, rank in found.ranks.items():
        assert found.rank_pattern[get_pattern_key(list(found.rank_pattern), module)] == rank
        assert found.alpha_pattern[get_pattern_key(list(found.alpha_pattern), module)] == rank / 2
    assert re.escape("layers.0.fc") in found.rank_pattern


def test_target_modules_as_in_peft(bert: nn.Module) -> None:
    batches = bert_batches(count=2)
    by_end = gelora_ranks(bert, batches, target_modules=["query", "attention.self.value"])
    assert by_end.blocks[0].modules == ("encoder.layer.0.attention.self.query", "encoder.layer.0.attention.self.value")
    by_pattern = gelora_ranks(bert, batches, target_modules=r".*\.layer\.[02]\..*\.dense")
    assert [block.name for block in by_pattern.blocks] == ["encoder.layer.0", "encoder.layer.2"]
    assert len(by_pattern.ranks) == 6
    assert gelora_ranks(bert, batches, target_modules="all-linear") == gelora_ranks(bert, batches)


TINY: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CONVOLUTIONS = {"conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2}
POSITIONS = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}


def clip(image_size: int) -> nn.Module:
    text = {"vocab_size": 60, "max_position_embeddings": 20, "eos_token_id": 2, **TINY}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={"image_size": image_size, "patch_size": 4, **TINY}
    )
    return transformers.CLIPModel(config)


def longformer() -> nn.Module:
    config = transformers.LongformerConfig(vocab_size=60, max_position_embeddings=40, attention_window=[8, 8], **TINY)
    return transformers.LongformerModel(config)


def funnel() -> nn.Module:
    sizes = {"block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24}
    return transformers.FunnelModel(transformers.FunnelConfig(vocab_size=60, **sizes))


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=60, **sizes))


def wav2vec2() -> nn.Module:
    return transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**TINY, **CONVOLUTIONS, **POSITIONS))


def xlnet() -> nn.Module:
    return transformers.XLNetModel(transformers.XLNetConfig(vocab_size=60, d_model=16, n_layer=2, n_head=2, d_inner=24))


class TorchEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 16)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states: Tensor = self.encoder(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)
        return states


def mask(kept: int, length: int) -> Tensor:
    return (torch.arange(length) < kept).long().repeat(32, 1)


def text_and_images(size: int) -> dict[str, Tensor]:
    return {"attention_mask": mask(7, 10), "pixel_values": torch.randn(32, 3, size, size)}


#: model, batch of 32, and the vectors that count at the output of each block, by sentence
TOWERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], list[int]]] = {
    "text and images": (lambda: clip(16), text_and_images(16), [7, 7, 17, 17]),
    "images with as many patches as the text has tokens": (lambda: clip(12), text_and_images(12), [7, 7, 10, 10]),
    "padded to a window": (longformer, {"attention_mask": mask(7, 10)}, [7, 7]),
    "pooled between blocks": (funnel, {"attention_mask": mask(9, 16)}, [9, 5, 9]),
    "encoder and decoder": (
        t5,
        {"attention_mask": mask(7, 12), "labels": torch.where(mask(5, 9) == 1, torch.randint(1, 60, (32, 9)), -100)},
        [7, 7, 5, 5],
    ),
    "tokens before sentences": (xlnet, {"attention_mask": mask(7, 10)}, [7, 7]),
    "states without padding": (TorchEncoder, {"attention_mask": mask(7, 10)}, [7, 7]),
    "waves": (wav2vec2, {"input_values": torch.randn(32, 400), "attention_mask": mask(200, 400)}, [20, 20]),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("case", TOWERS)
def test_every_tower_takes_the_mask_of_its_shape(case: str) -> None:
    make, batch, counts = TOWERS[case]
    torch.manual_seed(0)
    if "input_values" not in batch:
        batch = {"input_ids": torch.randint(3, 60, (32, batch["attention_mask"].shape[1])), **batch}
    found = gelora_ranks(make(), [batch])
    assert counted(found) == [32 * count for count in counts]


def test_what_cannot_be_used(bert: nn.Module) -> None:
    batches: Any = bert_batches(count=1)
    adapted = peft.get_peft_model(transformers.BertModel(bert.config), peft.LoraConfig(target_modules=["query"]))
    nans, masked = (
        {"x": torch.full((1, 4, 12), torch.nan)},
        {"x": torch.rand(2, 4, 12), "attention_mask": mask(3, 3)[:2]},
    )
    cases: dict[str, tuple[nn.Module, Any, dict[str, Any]]] = {
        r"alpha_over_rank must be a number in \[1e-06, inf\), got 0": (bert, batches, {"alpha_over_rank": 0}),
        "max_points must be an integer of at least 3, got 2": (bert, batches, {"max_points": 2}),
        "input of 'encoder.layer.0': method='knn' is unknown": (bert, batches, {"method": "knn"}),
        r"match target_modules=\['q_proj'\]": (bert, batches, {"target_modules": ["q_proj"]}),
        "Linear has no ModuleList of blocks": (nn.Linear(2, 2), batches, {}),
        "input of 'encoder.layer.0': no vectors": (bert, [], {}),
        "batch 0 is a Tensor: give a mapping": (bert, [batches[0]["input_ids"]], {}),
        "'blocks.0': x has NaN": (Stack((1,)), [nans], {}),
        r"the batch has shape \(2, 3\), but the hidden states of 'blocks.0' are \(2, 4, 12\)": (
            Stack((1,)),
            [masked],
            {},
        ),
        "already has adapters: give the base model": (adapted, batches, {}),
    }
    for message, (model, given, options) in cases.items():
        with pytest.raises(ValueError, match=message):
            gelora_ranks(model, given, **options)


def test_the_command_prints_a_table_and_the_same_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_model(tmp_path / "model").parent
    write_csv(folder / "data.csv", [(text, text[-1]) for text, _ in make_rows(100)], ("words", "unused"))
    given = ["ranks", "--model", str(folder / "model"), "--data", str(folder / "data.csv"), "--text", "words"]
    capsys.readouterr()
    assert main(given) == 0
    table = capsys.readouterr().out
    assert main([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for block in found["blocks"]:
        row = next(line for line in table.splitlines() if line.startswith(block["name"]))
        for end in ("d_in", "d_out"):
            assert "{estimate:.1f} [{low:.1f}, {high:.1f}]".format(**block[end]) in row
        assert row.split()[-2:] == [str(block["rank"]), "6"]
    assert f"total rank {found['total']} in 12 layers; alpha / rank 32" in table
    arguments = {key: value for key, value in found.items() if key not in ("blocks", "total")}
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "model")
    model = peft.get_peft_model(base, peft.LoraConfig(**arguments))
    assert sum(adapter.rank for adapter in find_adapters(model)) == found["total"]
    assert main([*given[:-1], "body"]) == 2
    assert "no column 'body'; it has 'words'" in capsys.readouterr().err

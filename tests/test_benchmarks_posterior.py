"""The study of averaged predictions: what its kinds of weights are, a short run, and its table."""

import torch
from transformers import BertConfig, BertModel

from benchmarks import ledger, posterior
from benchmarks.data import Sentences
from ivon_lora import IVON, find_adapters

KEY = {"task": "small", "method": "vadam", "lr": 3e-3, "seed": 1, "steps": 3}


def test_upper_layers_are_the_end_of_the_encoder():
    torch.manual_seed(0)
    small = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24)
    encoder = BertModel(small, add_pooling_layer=False).eval()
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    with torch.no_grad():
        whole = encoder(torch.randint(5, 50, (2, 7)), attention_mask=mask, output_hidden_states=True)
        found = posterior.UpperLayers(encoder)(whole.hidden_states[-3], mask).last_hidden_state
    torch.testing.assert_close(found, whole.last_hidden_state)


class Adapted(torch.nn.Module):
    """A classifier of the last hidden state whose layer has LoRA of rank 6."""

    def __init__(self) -> None:
        super().__init__()
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        self.lora = get_peft_model(torch.nn.Sequential(torch.nn.Linear(5, 2)), LoraConfig(r=6, target_modules=["0"]))

    def forward(self, input_ids, attention_mask):
        return type("Output", (), {"logits": self.lora(input_ids[:, -1])})


def trained(temperature):
    """A model after some steps, its optimizer, and data."""
    data = Sentences([torch.randn(1, 5) for _ in range(40)], [i % 2 for i in range(40)])
    model = Adapted()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = IVON.from_adamw(params, lr=0.1, num_examples=40, batch_size=8, temperature=temperature)
    for _ in posterior.train(model, optimizer, data, steps=8, batch_size=8):
        pass
    return model, optimizer, data


def test_a_cut_keeps_the_best_third_and_gives_the_rest_back():
    model, optimizer, data = trained(1.0)
    (adapter,) = find_adapters(model.lora)
    before = adapter.B.detach().clone()
    magnitude = adapter.A.detach().abs().mean(1) + before.abs().mean(0)
    with posterior.best_third(model.lora, optimizer, "magnitude"):
        assert set(adapter.B.any(0).nonzero().flatten().tolist()) == set(magnitude.topk(2).indices.tolist())
    assert torch.equal(adapter.B, before)
    kinds = [name for name, _ in posterior.predictions(model, optimizer, data)]
    assert kinds == ["mean", "8 samples", "third by snr_abs", "third by magnitude"]


def test_a_short_run_of_each_method_gives_rows_for_the_table(tmp_path):
    bed = posterior.load_bed((("train", 12), ("test", 8), ("shifted", 4)))
    assert {name: (len(part), part.tokens[0].dtype) for name, part in bed.items()} == {
        "train": (12, torch.float16), "test": (8, torch.float16), "shifted": (4, torch.float16),
    }  # fmt: skip
    path = tmp_path / "rows.csv"
    for method in ("adamw", "vadam"):
        ledger.append(path, posterior.run({**KEY, "method": method}, bed))
    rows = ledger.read(path)
    assert len(rows) == 2 * (1 + 4)
    assert rows[["accuracy", "nll", "ece", "brier"]].notna().all().all()
    assert ledger.has(rows, **KEY)
    assert "| small | test | vadam 0.003, 8 samples minus adamw 0.003, mean | 1 |" in posterior.page(rows)

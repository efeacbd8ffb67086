"""The study of averaged predictions: what its kinds of weights are, a short run, and its table."""

import torch
from transformers import BertConfig, BertModel

from benchmarks import ledger, posterior

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

"""What a script may use alone: the packaged model, its pooling, its adapter; and whose the penalty is."""

import pytest
import torch
from torch import nn

from ivon_lora.cli.finetune.methods import adapt
from ivon_lora.cli.finetune.model import MeanPoolClassifier, load_base, load_tokenizer
from ivon_lora.cli.finetune.options import make_settings
from tests.tiny_classifier import make_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(make_model(tmp_path_factory.mktemp("tiny") / "model"))


def make(tiny, seed=0, **chosen):
    return adapt(load_base(tiny, 2, seed), make_settings({"steps": 20, "seed": seed, **chosen}), [])


def test_the_packaged_model_gets_lora_on_its_36_linear_layers():
    base = load_base()
    assert load_tokenizer("all-MiniLM-L6-v2", base)("a film")["input_ids"] == [101, 1037, 2143, 102]
    model = adapt(base, make_settings({"optimizer": "adamw"}), [])
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert len([name for name in trained if "lora_A" in name]) == 36
    assert sum(trained.values()) == 332_546
    assert sum(count for name, count in trained.items() if "classifier" in name) == 2 * 384 + 2


def test_mean_pooling_ignores_padding():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = type("Config", (), {"hidden_size": 3, "initializer_range": 1.0})()
            self.table = nn.Embedding(10, 3)

        def forward(self, input_ids, attention_mask):
            return type("Output", (), {"last_hidden_state": self.table(input_ids)})()

    model = MeanPoolClassifier(Encoder(), 2)
    ids = torch.tensor([[4, 5, 9]])
    output = model(input_ids=ids, attention_mask=torch.tensor([[1, 1, 0]]), labels=torch.tensor([1]))
    by_hand = model.classifier((model.encoder.table(torch.tensor(4)) + model.encoder.table(torch.tensor(5))) / 2)
    torch.testing.assert_close(output.logits[0], by_hand)
    torch.testing.assert_close(output.loss, -by_hand.log_softmax(-1)[1])


def test_the_same_seed_gives_the_same_model_and_the_base_leaves_torchs_generator_alone(tiny):
    before = torch.random.get_rng_state()
    load_base(tiny)
    assert torch.equal(torch.random.get_rng_state(), before)
    one, two, three = (make(tiny, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], three[name]) for name in one)


@pytest.mark.parametrize(("optimizer", "weight"), [("adalora", 0.1), ("ivon", 0.0)])
def test_the_orthogonality_penalty_is_adaloras_alone(tiny, optimizer, weight):
    model = make(tiny, optimizer=optimizer).eval()
    ids, labels = torch.randint(5, 20, (8, 6)), torch.arange(8) % 2
    penalty = []
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = p.detach() @ p.detach().T if "lora_A" in name else p.detach().T @ p.detach()
            penalty.append((gram - torch.eye(len(gram))).norm())
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    data_loss = nn.functional.cross_entropy(output.logits, labels)
    assert float(output.loss - data_loss) == pytest.approx(
        weight * float(torch.stack(penalty).mean()), rel=1e-4, abs=1e-6
    )


def test_defaults_suit_the_optimizer():
    adamw, adalora, ivon = (make_settings({"optimizer": name}) for name in ("adamw", "adalora", "ivon"))
    assert [(s.rank, s.target_rank, s.lr) for s in (adamw, adalora, ivon)] == [
        (8, 8, 3e-3),
        (12, 4, 1e-2),
        (12, 4, 1e-2),
    ]
    assert (adalora.optimizer, adalora.method, adamw.method, ivon.method) == ("adamw", "adalora", "lora", "adalora")
    columns, boosters = make_settings({"method": "lora"}), make_settings({"method": "xgblora"})
    assert [(s.rank, s.target_rank, s.lr) for s in (columns, boosters)] == [(12, 4, 3e-3), (1, 1, 3e-3)]
    published = [make_settings({"recipe": "published", "method": method}).lr for method in ("adalora", "lora", "sora")]
    assert published == [2.0, 1.0, 1.0]
    assert make_settings({"rank": 2}).target_rank == 2

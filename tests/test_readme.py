"""The README's Python blocks run as they are written."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def test_there_are_blocks():
    assert len(BLOCKS) == 2


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks transformers
@pytest.mark.parametrize("block", BLOCKS, ids=["plain loop", "ranks"])
def test_block_runs(block, tmp_path, monkeypatch, capsys):
    if "peft" in block:
        pytest.importorskip("peft")
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out
    if "export_lora" in block:
        assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()

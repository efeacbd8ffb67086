"""The pure parts of a run: batches, metrics, learning rate, settings, tables, files."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ivon_lora.finetune.batches import Encoded, TrainingOrder, evaluation_batches, pad
from ivon_lora.finetune.errors import InputError
from ivon_lora.finetune.files import replace_file, replace_folder
from ivon_lora.finetune.progress import Progress
from ivon_lora.finetune.runtime import step_seed
from ivon_lora.finetune.schedule import learning_rate
from ivon_lora.finetune.settings import Settings, as_steps, make_settings
from ivon_lora.finetune.text_table import text_table


@given(st.lists(st.integers(1, 50), min_size=1, max_size=300), st.integers(1, 40), st.integers(0, 5))
def test_every_epoch_has_every_sentence_once(lengths: list[int], batch_size: int, seed: int) -> None:
    order = TrainingOrder(lengths, batch_size, seed)
    count = order.batches_per_epoch
    for epoch in range(2):
        batches = [order.batch(epoch * count + i) for i in range(count)]
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        assert all(0 < len(batch) <= batch_size for batch in batches)


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    lengths = [5 + i % 30 for i in range(500)]
    one, other = TrainingOrder(lengths, 32, 3), TrainingOrder(lengths, 32, 3)
    forward = [one.batch(step) for step in range(40)]
    assert [other.batch(step) for step in reversed(range(40))][::-1] == forward
    assert [TrainingOrder(lengths, 32, 4).batch(step) for step in range(40)] != forward
    assert forward[:16] != forward[16:32]  # the next epoch is another order


def test_batches_hold_sentences_of_like_length_and_come_in_random_order() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 48, (2000,), generator=generator).tolist()
    order = TrainingOrder(lengths, 32, 0)
    batches = [order.batch(step) for step in range(order.batches_per_epoch)]
    padding = sum(max(lengths[i] for i in b) * len(b) - sum(lengths[i] for i in b) for b in batches)
    assert padding < 0.05 * sum(lengths)
    longest = [max(lengths[i] for i in batch) for batch in batches]
    assert longest != sorted(longest)


def test_padding_and_mask() -> None:
    data = Encoded(((7, 8, 9), (5,), (3, 4)), (1, 0, 1), pad_id=2)
    batch = pad(data, [1, 0], torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[5, 2, 2], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [0, 1]
    assert sorted(i for b in evaluation_batches(data, 2) for i in b) == [0, 1, 2]
    assert data.first(2) == Encoded(((7, 8, 9), (5,)), (1, 0), 2)


def test_the_seed_of_a_step_depends_on_both_numbers() -> None:
    seeds = {step_seed(seed, step) for seed in range(30) for step in range(300)}
    assert len(seeds) == 9000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_learning_rate_rises_and_falls() -> None:
    settings = Settings(lr=0.5, steps=100, lr_warmup=0.1)
    rates = [learning_rate(settings, step) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.05 * k for k in range(1, 11)])
    assert max(rates) == 0.5
    falls = [a - b for a, b in itertools.pairwise(rates[9:])]
    assert falls == pytest.approx([0.5 / 91] * 90)
    assert rates[-1] > 0
    assert learning_rate(Settings(lr=0.5, steps=10, lr_warmup=0), 1) == 0.5


def test_steps_and_shares() -> None:
    assert (as_steps(20, 200), as_steps(0.1, 200), as_steps(0.0, 200), as_steps(1, 200)) == (20, 20, 0, 1)


def test_defaults_suit_the_optimizer() -> None:
    assert make_settings({}) == Settings()
    adamw = make_settings({"optimizer": "adamw"})
    assert (adamw.rank, adamw.target_rank, adamw.lr) == (8, 8, 3e-3)
    assert make_settings({"optimizer": "adalora"}).lr == 1e-2
    assert (make_settings({}).lr, make_settings({"layers": "lora"}).lr) == (1e-2, 3e-3)
    published = make_settings({"recipe": "published"}), make_settings({"recipe": "published", "layers": "lora"})
    assert [s.lr for s in published] == [2.0, 1.0]
    assert make_settings({"rank": 2}).target_rank == 2
    assert Settings.from_dict(adamw.as_dict()) == adamw
    with pytest.raises(InputError, match="another version"):
        Settings.from_dict({"colour": 1})


def test_text_tables_are_aligned() -> None:
    assert text_table(["name", "n"], [["a", "100"], ["long name", "1"]]).split("\n") == [
        "name         n",
        "---------  ---",
        "a          100",
        "long name    1",
    ]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "a.txt"
    with replace_file(path) as scratch:
        scratch.write_text("old")
        assert not path.exists()
    with pytest.raises(FileNotFoundError), replace_file(path) as scratch:
        scratch.write_text((tmp_path / "absent").read_text())
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o444 == 0o444 & ~_umask()


def test_a_failed_folder_leaves_the_old_folder_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    for content in ("old", "new"):
        with replace_folder(path) as scratch:
            (scratch / content).touch()
    with pytest.raises(FileNotFoundError), replace_folder(path) as scratch:
        (scratch / "half" / "absent").touch()
    assert [file.name for file in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def test_progress_prints_lines_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Progress("training", 25, every=10)
    for step in range(1, 26):
        bar.update(step, "loss 1")
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["training 10/25", "training 20/25", "training 25/25"]


def _umask() -> int:
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask

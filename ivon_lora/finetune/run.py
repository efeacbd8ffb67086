"""One run from data to report: the plumbing between the parts."""

from __future__ import annotations

import hashlib
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ivon_lora.finetune.batches import Encoded, encode
from ivon_lora.finetune.checkpoint import Checkpoint, checkpoint_path, read_checkpoint, restore
from ivon_lora.finetune.corpus import Corpus
from ivon_lora.finetune.errors import InputError
from ivon_lora.finetune.evaluate import Result, evaluate
from ivon_lora.finetune.files import remove_scratch, replace_folder
from ivon_lora.finetune.history import History
from ivon_lora.finetune.interrupt import Interrupt, interrupts
from ivon_lora.finetune.methods import Method, make_method
from ivon_lora.finetune.model import fit_padding, load_base, load_tokenizer
from ivon_lora.finetune.plots import PICTURES, draw_pictures, require_matplotlib
from ivon_lora.finetune.progress import Progress
from ivon_lora.finetune.report import build_report, rank_text, result_text, write_report
from ivon_lora.finetune.reviews import load_reviews
from ivon_lora.finetune.runtime import Runtime
from ivon_lora.finetune.settings import FREE_ON_RESUME, Settings, make_settings, option
from ivon_lora.finetune.tables import load_table
from ivon_lora.finetune.train import Trained, train
from ivon_lora.posterior.posterior import load_posterior

__all__ = ["EXIT_INTERRUPTED", "finetune", "fingerprint"]

EXIT_INTERRUPTED = 130
OUTPUTS = ("report.json", "adapter", "posterior.safetensors", *(f"{name}.png" for name in PICTURES), "checkpoint")


def finetune(chosen: dict[str, Any], resume: bool = False, overwrite: bool = False) -> int:
    """Run `ivon-lora finetune`.

    Args:
        chosen: settings that were given, by name; the others get their defaults, or with ``resume`` those of the run.
        resume: go on from the checkpoint in ``chosen["out"]``.
        overwrite: replace the run that is there.

    Returns:
        exit status: 0, or 130 after Ctrl-C.

    Raises:
        InputError: input that cannot be used. Nothing has been written then.
    """
    out = Path(chosen.get("out", Settings.out))
    checkpoint = read_checkpoint(out) if resume else None
    settings = make_settings(chosen) if checkpoint is None else resumed(checkpoint.settings, chosen)
    if checkpoint is None:
        check_out(out, overwrite)
    require_matplotlib()
    corpus = load_reviews() if settings.data is None else load_table(Path(settings.data), settings.text, settings.label)
    mark = fingerprint(corpus)
    if checkpoint is not None and checkpoint.data != mark:
        raise InputError("--resume: the data is not what the run was started with; restore it, or use --overwrite")
    runtime = Runtime(settings.device, settings.precision, settings.threads)
    tokenizer = load_tokenizer(settings.model)
    base = load_base(settings.model, len(corpus.labels), settings.seed)
    fit_padding(base, tokenizer)
    method = make_method(base.to(runtime.device), settings, len(corpus.train))
    say_start(settings, corpus, method, runtime)
    if checkpoint is not None:
        restore(method, checkpoint)
    make_out(out, fresh=checkpoint is None)
    with interrupts() as interrupt:
        try:
            return _train_and_report(settings, runtime, corpus, mark, tokenizer, method, checkpoint, out, interrupt)
        except KeyboardInterrupt:
            print(f"interrupted; the checkpoint stays: {continue_with(out)}", file=sys.stderr)
            return EXIT_INTERRUPTED


def _train_and_report(
    settings: Settings,
    runtime: Runtime,
    corpus: Corpus,
    mark: str,
    tokenizer: Any,
    method: Method,
    checkpoint: Checkpoint | None,
    out: Path,
    interrupt: Interrupt,
) -> int:
    history = History() if checkpoint is None else checkpoint.history
    done, seconds = (0, 0.0) if checkpoint is None else (checkpoint.step, checkpoint.seconds)
    data = encode(corpus.train, tokenizer, settings.max_length)
    trained = train(method, data, settings, runtime, out, mark, interrupt, history, done, seconds)
    if trained.step < settings.steps:
        print(f"interrupted after step {trained.step} of {settings.steps}: {continue_with(out)}", file=sys.stderr)
        return EXIT_INTERRUPTED
    started = time.monotonic()
    results = _evaluate(settings, runtime, corpus, tokenizer, method, interrupt)
    times = {"training": trained.seconds, "evaluation": time.monotonic() - started}
    report = write_outputs(settings, runtime, corpus, mark, method, history, results, times, out)
    say_end(report, trained, out)
    return 0


def resumed(saved: Settings, chosen: dict[str, Any]) -> Settings:
    """The settings of the interrupted run with the given changes. InputError for one that would change its numbers."""
    for name, value in chosen.items():
        if name not in FREE_ON_RESUME and value != getattr(saved, name):
            raise InputError(
                f"--resume: {option(name)} {value} differs from the run's {getattr(saved, name)}; drop the option, or "
                "start a new run with another --out"
            )
    changes = {name: value for name, value in chosen.items() if name in FREE_ON_RESUME}
    settings = replace(saved, **changes)
    settings.check()
    return settings


def check_out(out: Path, overwrite: bool) -> None:
    """InputError if ``out`` is a file, or holds a run that may not be replaced."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: give a folder")
    if overwrite:
        return
    if (out / "report.json").exists():
        raise InputError(f"--out {out} holds a finished run: give another --out, or --overwrite to replace it")
    if checkpoint_path(out).exists():
        raise InputError(f"--out {out} holds an unfinished run: --resume goes on with it, --overwrite replaces it")


def make_out(out: Path, fresh: bool) -> None:
    """Create the folder; of a fresh run, remove what an earlier one left there (its own files, nothing else)."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in (*(out / name for name in OUTPUTS), checkpoint_path(out)):
            remove_scratch(path)
        for name in OUTPUTS if fresh else ():
            path = out / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror}); give another folder") from None


def fingerprint(corpus: Corpus) -> str:
    """sha256 of labels, texts and splits: equal for equal data."""
    digest = hashlib.sha256(repr(corpus.labels).encode())
    for split in (corpus.train, corpus.validation, corpus.test, corpus.shifted or ()):
        digest.update(repr([(row.text, row.label) for row in split]).encode())
    return digest.hexdigest()


def _evaluate(
    settings: Settings, runtime: Runtime, corpus: Corpus, tokenizer: Any, method: Method, interrupt: Interrupt
) -> list[Result]:
    sets: dict[str, Encoded] = {"test": encode(corpus.test, tokenizer, settings.max_length)}
    if corpus.shifted is not None:
        sets["shifted"] = encode(corpus.shifted, tokenizer, settings.max_length)
    bars: dict[str, Progress] = {}

    def progress(what: str, done: int, total: int) -> None:
        interrupt.check()
        if what not in bars:
            for bar in bars.values():
                bar.close()
            bars[what] = Progress(f"evaluating {what}", total, total)
        bars[what].update(done, "sentences")

    try:
        return evaluate(method, sets, runtime, settings.samples, settings.eval_limit, progress)
    finally:
        for bar in bars.values():
            bar.close()


def write_outputs(
    settings: Settings,
    runtime: Runtime,
    corpus: Corpus,
    mark: str,
    method: Method,
    history: History,
    results: list[Result],
    times: dict[str, float],
    out: Path,
) -> dict[str, Any]:
    """Write adapter, posterior, pictures and, last, the report, each as a whole; returns the report."""
    with replace_folder(out / "adapter") as folder:
        adapter = method.save_adapter(folder)
    if method.has_posterior:
        method.save_posterior(out / "posterior.safetensors")
    report = build_report(settings, runtime, corpus, mark, method, history, results, adapter, times)
    posterior = load_posterior(out / "posterior.safetensors") if method.has_posterior else None
    draw_pictures(report, posterior, out)
    write_report(report, out / "report.json")
    return report


def say_start(settings: Settings, corpus: Corpus, method: Method, runtime: Runtime) -> None:
    """Print what is going to happen."""
    shifted = "" if corpus.shifted is None else f", {len(corpus.shifted)} shifted test"
    print(f"data       {corpus.source}: {len(corpus.train)} training, {len(corpus.test)} test{shifted} texts")
    layers = len(method.kept_ranks())
    trained = sum(p.numel() for p in method.trainable().values())
    print(f"model      {settings.model}: LoRA of rank {settings.rank} on {layers} layers, {trained:,} trained numbers")
    pruning = "no pruning" if settings.optimizer == "adamw" else f"ranks pruned to {settings.target_rank} on average"
    work = f"{settings.steps} steps of {settings.batch_size} texts"
    print(f"optimizer  {settings.optimizer}, lr {settings.lr:g}, {work}, {pruning}")
    where = runtime.as_dict()
    print(f"computing  on {where['device']} in {where['precision']}, {where['threads']} threads", flush=True)


def say_end(report: dict[str, Any], trained: Trained, out: Path) -> None:
    """Print the tables and where everything is."""
    times: Callable[[str], str] = lambda name: f"{report['seconds'][name]:.0f} s"  # noqa: E731
    print(f"\n{result_text(report['results'])}\n")
    print(f"ranks kept: {report['live_ranks']}\n{rank_text(report['ranks'])}\n")
    print(f"training {times('training')}, evaluation {times('evaluation')}; everything is in {out}")


def continue_with(out: Path) -> str:
    """The command that resumes the run in ``out``."""
    import shlex

    return f"continue with `ivon-lora finetune --resume --out {shlex.quote(str(out))}`"

"""The verb `plot`: the pictures of a run or of an adapter."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ivon_lora.cli.arguments import add_folder, add_json, add_verb, print_json
from ivon_lora.cli.saved_run import SavedRun, read_run
from ivon_lora.finetune.errors import InputError, one_line
from ivon_lora.finetune.plots import KINDS, PICTURES, draw_pictures, require_matplotlib, save_figure
from ivon_lora.plots import plot_ranks, plot_snr

__all__ = ["register_plot"]

#: what a picture needs beside an adapter
NEEDS = {
    "training": "give the --out of a finished run",
    "reliability": "give the --out of a run of this version",
    "snr": "give a --posterior or --optimizer",
}

EXAMPLES = """\
ivon-lora plot runs/finetune                                  all pictures again, as PNG, into the run
ivon-lora plot runs/finetune --only ranks,snr --format pdf --out paper
ivon-lora plot my-adapter                                     ranks; with a posterior or optimizer beside it also snr
"""


def register_plot(verbs: Any) -> None:
    """Add the verb `plot`."""
    parser = add_verb(
        verbs,
        "plot",
        _run,
        summary="draw ranks, signal-to-noise ratios, training and calibration",
        description="Draw what the folder has: ranks (layer by module), training (loss, budget, signal-to-noise over "
        "the steps), reliability (accuracy against confidence), snr (certainty of the weights by module).",
        examples=EXAMPLES,
    )
    add_folder(parser)
    parser.add_argument(
        "--only", metavar="P,P", help=f"some of {', '.join(PICTURES)}, separated by commas (default: what there is)"
    )
    parser.add_argument("--format", default=KINDS[0], help=f"{', '.join(KINDS)} (default: {KINDS[0]})")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: the folder)")
    add_json(parser)


def _run(arguments: argparse.Namespace) -> int:
    names = PICTURES if arguments.only is None else tuple(arguments.only.split(","))
    unknown = [name for name in names if name not in PICTURES]
    if unknown:
        raise InputError(f"--only {unknown[0]!r} is unknown: choose {', '.join(PICTURES)}")
    if arguments.format not in KINDS:
        raise InputError(f"--format {arguments.format!r} is unknown: choose {', '.join(KINDS)}")
    if arguments.out is not None and arguments.out.exists() and not arguments.out.is_dir():
        raise InputError(f"--out {arguments.out} is a file: name a folder")
    require_matplotlib()
    run = read_run(arguments.folder, arguments.posterior, arguments.optimizer)
    there = available(run)
    missing = [name for name in names if name not in there]
    if missing and arguments.only is not None:
        raise InputError(f"--only {missing[0]}: {arguments.folder} has nothing to draw it from; {NEEDS[missing[0]]}")
    try:
        files = draw(run, arguments.out or arguments.folder, names, arguments.format)
    except ValueError as error:
        raise InputError(one_line(error, 300)) from error
    if arguments.json:
        print_json({"files": [str(file) for file in files]})
    else:
        print("\n".join(map(str, files)))
    return 0


def available(run: SavedRun) -> set[str]:
    """The pictures that can be drawn of what was found."""
    names = {"ranks"}
    if run.report is not None:
        names |= {"training"} | {"reliability" for row in run.report["results"] if "reliability" in row}
    return names | ({"snr"} if run.posterior is not None else set())


def draw(run: SavedRun, out: Path, names: tuple[str, ...], kind: str) -> list[Path]:
    """Draw what the folder has of ``names``; returns the files."""
    if run.report is not None:
        return draw_pictures(run.report, run.posterior, out, names, kind)
    figures: dict[str, Any] = {}
    if "ranks" in names:
        figures["ranks"] = plot_ranks(run.ranks()).figure
    if "snr" in names and run.posterior is not None:
        figures["snr"] = plot_snr(run.posterior).figure
    return [save_figure(figure, out / f"{name}.{kind}") for name, figure in figures.items()]

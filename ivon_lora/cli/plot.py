"""The verb `plot`: the pictures of a run or of an adapter."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ivon_lora.cli.arguments import add_folder, add_json, add_verb, print_json
from ivon_lora.cli.errors import InputError, input_errors
from ivon_lora.cli.pictures import KINDS, PICTURES, draw_pictures, require_matplotlib
from ivon_lora.cli.saved_run import read_run

__all__ = ["register_plot"]

#: what a picture needs beside an adapter
NEEDS = {
    "training": "give the --out of a finished run",
    "reliability": "give the --out of a finished run",
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
    parser.add_argument("--format", choices=KINDS, default=KINDS[0], help=f"(default: {KINDS[0]})")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: the folder)")
    add_json(parser)


def _run(arguments: argparse.Namespace) -> int:
    names = PICTURES if arguments.only is None else tuple(arguments.only.split(","))
    unknown = [name for name in names if name not in PICTURES]
    if unknown:
        raise InputError(f"--only {unknown[0]!r} is unknown: choose {', '.join(PICTURES)}")
    if arguments.out is not None and arguments.out.exists() and not arguments.out.is_dir():
        raise InputError(f"--out {arguments.out} is a file: name a folder")
    require_matplotlib()
    run = read_run(arguments.folder, arguments.posterior, arguments.optimizer)
    missing = [name for name in names if name in NEEDS and (run.posterior if name == "snr" else run.report) is None]
    if missing and arguments.only is not None:
        raise InputError(f"--only {missing[0]}: {arguments.folder} has nothing to draw it from; {NEEDS[missing[0]]}")
    with input_errors(f"{arguments.folder} is damaged"):
        report = {"ranks": run.ranks()} if run.report is None else run.report
        files = draw_pictures(report, run.posterior, arguments.out or arguments.folder, names, arguments.format)
    print_json({"files": list(map(str, files))}) if arguments.json else print("\n".join(map(str, files)))
    return 0

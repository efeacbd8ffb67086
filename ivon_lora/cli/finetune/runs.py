"""Several runs with other seeds, and their predictions as one: `ivon-lora finetune --runs 3`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ivon_lora.cli.finetune.evaluate import mixture
from ivon_lora.cli.finetune.options import Settings
from ivon_lora.cli.finetune.train import finetune
from ivon_lora.cli.tables import result_table


def finetune_runs(chosen: dict[str, Any], count: int, resume: bool = False, overwrite: bool = False) -> int:
    """Run into ``seed0``, ``seed1``, ... of the folder, and report the mean of their probabilities beside the first.

    Each predicts at its mean, with the softmax temperature that its validation texts chose; so does
    `posterior_predict` with the list of their posteriors. ``resume`` goes on with the run that was interrupted, and
    wants the same options again.

    Raises:
        InputError, TrainingError: as `finetune`.
    """
    out, seed = Path(chosen.get("out", Settings.out)), chosen.get("seed", Settings.seed)
    folders = [out / f"seed{seed + k}" for k in range(count)]
    for k, folder in enumerate(folders):
        if resume and (folder / "report.json").exists():
            continue
        again = resume and (folder / "settings.json").exists()
        own = {"out": str(folder)} if again else {**chosen, "seed": seed + k, "out": str(folder)}
        if status := finetune(own, again, overwrite):
            return status
    first = json.loads((folders[0] / "report.json").read_text(encoding="utf-8"))
    single = [{**row, "weights": f"{row['weights']}, 1 run"} for row in first["results"]]
    results = single + mixture([folder / "predictions.safetensors" for folder in folders])
    report = {"runs": list(map(str, folders)), "results": results}
    (out / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(f"\n{result_table(results)}\n\n{count} runs; everything is in {out}")
    return 0

"""Write hashes.json anew and say what changed: ``python -m tests.golden``. Commit a change only with its reason."""

import json

from tests.golden import HASHES
from tests.golden.trajectories import CASES, trajectory

old = json.loads(HASHES.read_text()) if HASHES.exists() else {}
new = {case: trajectory(case, "eager") for case in CASES}
for case in sorted(old.keys() | new.keys()):
    before, after = old.get(case, {}), new.get(case, {})
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        print(f"{case}: {', '.join(changed)}")
lines = [f" {json.dumps(case)}: {json.dumps(hashes)}" for case, hashes in new.items()]
HASHES.write_text("{\n" + ",\n".join(lines) + "\n}\n")

"""The evaluation of one run of a study, as a process of its own: `-m launch.study.score FILE`.

FILE is JSON: `jobs` (benchmark of the study: words of eval), `hash` (of the encoder), `target`. The
target gets the same with `rows` (benchmark of the study: result rows) and `failed` (benchmark of
the study: why). The rows tell where the predictions are.
"""

import json
import sys
import traceback
from pathlib import Path
from typing import Any

from lemon_muse.data.files import write_atomic
from lemon_muse.errors import RunError, UserError


def main(path: Path) -> int:
    """Evaluate; 1 where a benchmark failed: the others are done all the same."""
    from eval.run import run
    from eval.settings import Eval
    from lemon_muse.config import validate

    task = json.loads(path.read_text(encoding="utf-8"))
    rows: dict[str, list[dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    for name, words in task["jobs"].items():
        try:
            rows[name] = run(validate(Eval, words))
        except Exception as error:  # whatever one of them raises, the others are to be done
            if not isinstance(error, UserError | RunError | OSError):
                traceback.print_exc()
            failed[name] = str(error)
            print(f"lemon-muse: benchmark {name}: {error}", file=sys.stderr, flush=True)
    payload = json.dumps({**task, "rows": rows, "failed": failed}).encode()
    write_atomic(Path(task["target"]), payload)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

"""`lemon-muse JOB [CONFIG.yaml] [key=value …]`: a table of jobs, each loaded only when called."""

import importlib
import logging
import os
import sys
import traceback
from pathlib import Path

from lemon_muse import __version__
from lemon_muse.errors import RunError, UserError

# job: (module with the settings model and run(), name of the model, one line)
JOBS: dict[str, tuple[str, str, str]] = {
    "demo": (
        "launch.demo",
        "Demo",
        "prep, pretrain, probe, export and report, in minutes on two cores",
    ),
    "generate": ("launch.generate", "Generate", "labelled tissue, where no real data is at hand"),
    "prep all": ("data_prep.chain", "Chain", "slides to checked shards: the jobs below in a row"),
    "prep manifest": ("data_prep.manifest", "Manifest", "a table of slides: size, mpp, patient"),
    "prep nuclei": ("data_prep.nuclei", "Nuclei", "nuclei of slides: read from files, or detected"),
    "prep crops": ("data_prep.crops", "Crops", "crop shards from slides, or images, with nuclei"),
    "prep rois": ("data_prep.rois", "Rois", "ROI shards: regions with their nuclei"),
    "prep balance": (
        "data_prep.balance",
        "Balance",
        "weights that even out what training sees: looks, types, slides",
    ),
    "prep check": ("data_prep.check", "Check", "verify shards and draw a contact sheet"),
    "train": (
        "launch.training",
        "Train",
        "pretrain on crops or ROIs: MoCo v3 (LEMON), DINOv2, MUSE",
    ),
    "views": ("launch.views", "Views", "draw the views that a step of a run sees"),
    "eval": ("eval.run", "Eval", "probe a frozen encoder on a benchmark, beside the floors"),
    "export": ("lemon_muse.export.job", "Export", "an encoder in the form that its users load"),
    "embed": (
        "launch.embed",
        "Embed",
        "features of every nucleus of slides, as AnnData",
    ),
    "atlas": (
        "eval.atlas",
        "Atlas",
        "an interactive page of embedded nuclei: map, lasso",
    ),
    "report": ("eval.report", "Report", "one page with curves, tables, retrieval and map"),
    "study": ("launch.study", "Study", "recipes compared under an equal budget, with intervals"),
    "submit": ("launch.slurm", "Submit", "any of the above on a SLURM cluster; chains and sweeps"),
    "status": ("launch.status", "Status", "how submissions and runs stand: step, rate, time left"),
}
USAGE = "usage: lemon-muse JOB [CONFIG.yaml] [key=value …] [--help] [--print-config]"
# Jobs that take other words as well.
USAGES = {
    "submit": "usage: lemon-muse submit [CLUSTER.yaml] [key=value …] [--dry-run] "
    "-- [key=value …] JOB … [-- [key=value …] JOB …]",
    "status": "usage: lemon-muse status [FOLDER …] [key=value …]",
}


def main(argv: list[str] | None = None) -> int:
    """Run a job; returns the exit code: 0 done, 1 failed while running, 2 wrong words or files."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Two processes on the same cores must not spin for each other (5-25x CPU time, measured).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if not words or words[0] in ("--help", "-h", "help"):
        print(overview())
        return 0
    if words[0] == "--version":
        print(__version__)
        return 0
    try:
        return run_job(words)
    except UserError as error:
        return _complain(error, 2)
    except RunError as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        return _complain("interrupted; run the same words to go on.", 1)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()
        return 1
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        return _complain(f"{error.strerror or error}{where}; mend it, run the same words again.", 1)
    except Exception:
        traceback.print_exc()
        return _complain("this is a defect of lemon-muse, please report the lines above.", 1)


def overview() -> str:
    """The text of `lemon-muse --help`."""
    width = max(map(len, JOBS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, _, text) in JOBS.items()]
    return "\n".join(
        [
            f"lemon-muse {__version__}: pretraining of nucleus-level "
            "foundation models of H&E pathology",
            "",
            USAGE,
            "",
            *lines,
            "",
            "lemon-muse JOB --help lists a job's keys with unit, default and meaning.",
            "Exit codes: 0 done, 1 failed while running, 2 the words or files are wrong.",
        ]
    )


def run_job(words: list[str]) -> int:
    """Find the job, read its words, run it."""
    from lemon_muse.config import dump, help_text, read, validate

    name, rest = split_name(words)
    rest, after = _sections(name, rest)
    module_name, model_name, line = JOBS[name]
    module = importlib.import_module(module_name)
    model = getattr(module, model_name)
    if "--help" in rest or "-h" in rest:
        given = [w for w in rest if w not in ("--help", "-h")]
        keys = help_text(model.variant(read(model, given)))
        usage = USAGES.get(name, USAGE.replace("JOB", name))
        print(f"lemon-muse {name}: {line}\n\n{usage}\n\n{keys}")
        return 0
    tree = read(model, [w for w in rest if w != "--print-config"])
    config = validate(model, {**tree, **after})
    if "--print-config" in rest:
        print(dump(config), end="")
        return 0
    logging.basicConfig(
        format="%(levelname)s %(message)s", level=logging.WARNING, stream=sys.stderr
    )
    module.run(config)
    return 0


def _sections(name: str, words: list[str]) -> tuple[list[str], dict[str, object]]:
    """The job's own words, and what is not written as key=value: jobs after --, folders."""
    if name == "status":
        # A sweep's folders have a '=' in their names.
        bare = [w for w in words if not w.startswith("-") and ("=" not in w or Path(w).is_dir())]
        return [w for w in words if w not in bare], ({"runs": tuple(bare)} if bare else {})
    if name != "submit":
        return words, {}
    at = words.index("--") if "--" in words else len(words)
    early = [w for w in words[:at] if w in {job.split()[0] for job in JOBS}]
    if early:
        raise UserError(f"write -- before the job: lemon-muse submit … -- {early[0]} …")
    own = ["dry_run=true" if word == "--dry-run" else word for word in words[:at]]
    return own, {"job": tuple(words[at + 1 :])} if at < len(words) else {}


def split_name(words: list[str]) -> tuple[str, list[str]]:
    """The job that words begin with, and the rest of them.

    Raises:
        UserError: there is no such job.
    """
    for count in (2, 1):
        name = " ".join(words[:count])
        if name in JOBS:
            return name, words[count:]
    group = [n for n in JOBS if n.split()[0] == words[0]]
    if group:
        raise UserError(f"'{words[0]}' needs a second word; use one of: {', '.join(group)}.")
    import difflib

    near = difflib.get_close_matches(words[0], JOBS, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"use one of: {', '.join(JOBS)}."
    raise UserError(f"there is no job '{words[0]}'; {hint}")


def _complain(message: object, code: int) -> int:
    print(f"lemon-muse: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())

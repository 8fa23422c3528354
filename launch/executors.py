"""The settings of a stage as submitit's, and the sbatch script that they make."""

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lemon_muse.errors import UserError

if TYPE_CHECKING:
    from launch.slurm import Submit

# CPUs of a rank where the user says nothing: reading threads and one for the step.
CPUS_PER_GPU, CPUS = 8, 4
# Options of sbatch that submit sets, from its own keys or for itself.
OURS = (
    *("array", "dependency", "error", "open_mode", "output", "signal"),
    *("nodes", "ntasks_per_node", "cpus_per_task", "gpus_per_node", "time"),
)


def ranks(cfg: "Submit", job: str) -> tuple[int, int]:
    """(nodes, ranks a node) of a job.

    Raises:
        UserError: several nodes or ranks for a job that runs on one, or ranks that share a GPU.
    """
    from launch.stages import RANKED

    per_node = cfg.ranks or max(1, cfg.gpus)
    if job in RANKED:
        if cfg.gpus and per_node > cfg.gpus:
            raise UserError(
                f"ranks={per_node} is more than gpus={cfg.gpus}: NCCL needs a GPU for each rank."
            )
        return cfg.nodes, per_node
    if cfg.nodes > 1 or (cfg.ranks or 1) > 1:
        raise UserError(
            f"nodes={cfg.nodes}: {job} runs as one process; use tasks=N for prep, sweep.KEY=a,b "
            f"for several runs, and write its own settings after --, as in: -- nodes=1 {job} …"
        )
    return 1, 1


def cpus(cfg: "Submit") -> int:
    """CPUs of a rank."""
    return cfg.cpus or (CPUS_PER_GPU if cfg.gpus else CPUS)


def check(cfg: "Submit", job: str) -> None:
    """Refuse settings that the executor cannot have.

    Raises:
        UserError: what is wrong, and what to write instead.
    """
    nodes, per_node = ranks(cfg, job)
    if cfg.executor != "slurm" and nodes > 1:
        raise UserError(f"executor={cfg.executor} has one node; use nodes=1 or executor=slurm.")
    if cfg.executor == "debug" and per_node > 1:
        raise UserError(f"executor=debug has one rank, not {per_node}; use executor=local.")
    if round(cfg.hours * 60) * 60 < cfg.signal_s + 60:
        raise UserError(
            f"hours={cfg.hours:g} leaves no time before the signal, which comes {cfg.signal_s} s "
            f"(and up to 60 s more) before the end; give more hours or a smaller signal_s."
        )
    for key in extra_options(cfg):
        if key in OURS:
            raise UserError(f"extra.{key} cannot be set: submit sets that option by itself.")


def check_slurm() -> None:
    """Refuse a machine that cannot submit.

    Raises:
        UserError: no SLURM here.
    """
    if shutil.which("srun") is None or shutil.which("sbatch") is None:
        raise UserError(
            "there is no SLURM here (no sbatch); run on a login node, use executor=local, or "
            "--dry-run to see the script."
        )


def extra_options(cfg: "Submit") -> dict[str, Any]:
    """The options below extra., named as submitit names its own."""
    return {k.replace("-", "_"): v for k, v in cfg.extra.items()}


@contextmanager
def outside_of_jobs() -> Iterator[None]:
    """Hide the variables of a job that submit is called in: sbatch would hand them on."""
    inside = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_") if "SLURM_JOB_ID" in os.environ else ()
    names = [k for k in os.environ if k.startswith(inside) and k != "SLURM_CONF"] if inside else []
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)


def parameters(cfg: "Submit", job: str, *, code: Path | None, after: str) -> dict[str, Any]:
    """Keyword arguments of `AutoExecutor.update_parameters` for the executor slurm.

    Args:
        code: folder that goes before all others on PYTHONPATH: the snapshot.
        after: ids of jobs that must have succeeded, as '12:13'; '' = none.
    """
    nodes, per_node = ranks(cfg, job)
    minutes = round(cfg.hours * 60)
    # srun does not inherit --cpus-per-task from SLURM 22.05 to 23.02; a rank that dies must end
    # the others, which would wait for it in a collective.
    srun = ["--kill-on-bad-exit=1", f"--cpus-per-task={cpus(cfg)}", *cfg.srun]
    more: dict[str, Any] = {"requeue": True, **extra_options(cfg)}
    if after:
        more |= {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
    more = {key: value for key, value in more.items() if value is not False}
    given = {
        "name": cfg.name or job.replace(" ", "-"),
        "timeout_min": minutes,
        "nodes": nodes,
        "tasks_per_node": per_node,
        "cpus_per_task": cpus(cfg),
        "gpus_per_node": cfg.gpus or None,
        "mem_gb": cfg.mem_gb,
        "slurm_partition": cfg.partition,
        "slurm_account": cfg.account,
        "slurm_qos": cfg.qos,
        "slurm_constraint": cfg.constraint,
        "slurm_exclude": cfg.exclude,
        "slurm_nodelist": cfg.nodelist,
        "slurm_comment": cfg.comment,
        "slurm_signal_delay_s": cfg.signal_s,
        "slurm_array_parallelism": cfg.parallel,
        "slurm_srun_args": srun,
        "slurm_setup": setup_lines(cfg, code),
        "slurm_additional_parameters": more,
    }
    return {key: value for key, value in given.items() if value is not None}


def setup_lines(cfg: "Submit", code: Path | None) -> list[str]:
    """Shell lines before srun."""
    lines = ["set -e", *cfg.setup]
    if code:
        # `python -m` puts the working folder first: from a checkout it would run that instead.
        lines += ["export PYTHONSAFEPATH=1"]
        lines += [f'export PYTHONPATH={shlex.quote(str(code))}"${{PYTHONPATH:+:$PYTHONPATH}}"']
    # Threads of ranks that share cores must not spin for each other.
    lines += ["export OMP_WAIT_POLICY=passive", f"export OMP_NUM_THREADS={threads(cfg)}"]
    return [*lines, f"export LEMON_MUSE_RENDEZVOUS_S={cfg.meet_s}"]


def threads(cfg: "Submit") -> int:
    """Threads of torch on the CPU: all of a rank without a GPU, few beside one."""
    return max(1, cpus(cfg) // 4) if cfg.gpus else cpus(cfg)


def script(
    cfg: "Submit", job: str, *, folder: Path, count: int, code: Path | None, after: str
) -> str:
    """The sbatch script, as submitit writes it; nothing is submitted and no SLURM is needed."""
    from submitit.slurm.slurm import SlurmExecutor, _convert_mem, _make_sbatch_string

    given = parameters(cfg, job, code=code, after=after)
    shared = {k: v for k, v in given.items() if not k.startswith("slurm_")}
    plain: Any = SlurmExecutor._equivalence_dict()
    named: dict[str, Any] = {plain[k]: v for k, v in shared.items()}
    if "mem" in named:
        named["mem"] = _convert_mem(named["mem"])
    named |= {k.removeprefix("slurm_"): v for k, v in given.items() if k.startswith("slurm_")}
    python = cfg.python or shlex.quote(sys.executable)
    command = f"{python} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    if count > 1:
        named["map_count"] = count
    return _make_sbatch_string(command=command, folder=folder, **named)


def executor(cfg: "Submit", job: str, *, folder: Path, code: Path | None, after: str) -> Any:
    """submitit's executor of a stage whose settings have been checked."""
    import submitit

    if cfg.executor == "slurm":
        made = submitit.AutoExecutor(
            folder=folder,
            cluster="slurm",
            slurm_max_num_timeout=cfg.requeues,
            slurm_python=cfg.python,
        )
        made.update_parameters(**parameters(cfg, job, code=code, after=after))
        return made
    _, per_node = ranks(cfg, job)
    made = submitit.AutoExecutor(folder=folder, cluster=cfg.executor)
    made.update_parameters(
        timeout_min=round(cfg.hours * 60), tasks_per_node=per_node, gpus_per_node=cfg.gpus
    )
    return made

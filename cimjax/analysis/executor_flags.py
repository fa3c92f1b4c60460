"""The flags by which `cimjax sweep` and every `cimjax study` that trains say who trains their runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cimjax.command import UsageError

if TYPE_CHECKING:
    from cimjax.analysis.executors import Executor

EXECUTOR_FLAGS: dict[str, dict[str, Any]] = {
    "--jobs": {
        "type": int,
        "metavar": "N",
        "help": "runs at a time; if not given, 1 on this machine, and all on SLURM",
    },
    "--cluster": {
        "choices": ("slurm", "local"),
        "help": "train each run in a job of SLURM, or in one of submitit's own on this machine, to try it",
    },
    "--cluster-options": {
        "nargs": "+",
        "action": "extend",
        "default": [],
        "metavar": "KEY=VALUE",
        "help": "of each job, as submitit has them: timeout_min (needed on SLURM), partition, gpus_per_node, mem_gb, "
        "cpus_per_task, account, qos, constraint, ...",
    },
    "--retry": {"action": "store_true", "help": "try runs again that failed before"},
}


def executor_of(arguments: argparse.Namespace, workdir: str | Path) -> Executor:
    """What trains the runs of a command.

    Raises:
      UsageError: for what cannot be.
    """
    from cimjax.analysis.executors import Processes, require_jobs

    if arguments.jobs is not None:
        require_jobs(arguments.jobs)
    if arguments.cluster is not None:
        from cimjax.analysis.cluster import Cluster, parse_options, require_submitit

        require_submitit()
        options = parse_options(arguments.cluster_options, arguments.cluster)
        return Cluster(arguments.cluster, workdir, options, arguments.jobs)
    if arguments.cluster_options:
        raise UsageError(
            "--cluster-options are those of jobs of a cluster; give --cluster slurm or --cluster local too."
        )
    return Processes(arguments.jobs or 1)

"""The command `cimjax tune`: its arguments; jax is imported when it runs."""

from __future__ import annotations

import argparse
import os
import shlex

from cimjax.command import A_CONFIG, Command, UsageError, path


def _tune(arguments: argparse.Namespace) -> None:
    from cimjax.analysis.plot import check_writable
    from cimjax.training.config.file import load_config

    config = load_config(arguments.config, arguments.overrides)
    if config.spec is None:
        raise UsageError("`tune` times layers in arrays, and this configuration has none.")
    if arguments.runs < 1 or arguments.batch < 0:
        raise UsageError("`tune` takes at least one run, and a batch of at least one image.")
    saved = arguments.save
    if saved:
        check_writable(saved)
    # Processes that compile need some of a GPU's memory; before jax looks for one.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    from cimjax.analysis import timing
    from cimjax.analysis.progress import Progress
    from cimjax.analysis.tune import measure, table
    from cimjax.compilation_cache import keep_compiled_programs
    from cimjax.core.programs import tuning
    from cimjax.user_folders import user_tables

    if saved is None:
        folder = user_tables()
        if folder is None:
            raise UsageError("there is no home folder to keep the table in; name a file by --save.")
        folder.mkdir(parents=True, exist_ok=True)
        saved = folder / tuning.file_name(jax.devices()[0].device_kind)
        check_writable(saved)
    keep_compiled_programs()
    with Progress() as progress:
        found = measure.tune(
            config,
            batch=arguments.batch,
            runs=arguments.runs,
            everything=arguments.all,
            say=progress.doing,
            note=progress.note,
        )
    machine = timing.machine()
    print(f"{machine['device']}, {machine['processor']}, {machine['cores']} cores, jax {machine['jax']}")
    print(f"a layer forwards and back, medians of {arguments.runs} runs\n\n{table.show(found)}\n")
    table.save(found, saved)
    print(shlex.quote(str(saved)))


TUNE = Command(
    "measure by which program each layer of a network is fastest on this device; program=auto then follows it",
    "cimjax tune --config configs/resnet20_c100.py --batch 256",
    {
        "--config": {"required": True, "metavar": A_CONFIG, "help": "the network and its batch size"},
        "--batch": {
            "type": int,
            "default": 0,
            "metavar": "N",
            "help": "images that a device computes at once; the config's if not given",
        },
        "--runs": {"type": int, "default": 10, "metavar": "N", "help": "runs of each program; 10 if not given"},
        "--all": {"action": "store_true", "help": "time the definition too, which is slow"},
        "--save": {
            "metavar": "FILE",
            "type": path,
            "help": "the table, to which layers are added; that of this device in the user's folder of caches if not "
            "given, which `auto` reads. CIMJAX_TUNING names another one, or is off",
        },
    },
    _tune,
)

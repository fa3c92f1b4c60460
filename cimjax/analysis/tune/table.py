"""What `cimjax tune` found, as text and as the table that `auto` reads."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Sequence
from pathlib import Path

import jax

from cimjax.analysis.timing import machine
from cimjax.analysis.tune.measure import Candidate, Tuned
from cimjax.core.programs import tuning
from cimjax.spec import Execution
from cimjax.training.run.files import write_json

_WIDTH = 80


def show(found: Sequence[Tuned]) -> str:
    """All candidates of each layer, and then what was chosen, in 80 columns."""
    lines: list[str] = []
    for problem, candidates, before, best in found:
        others = f" and {len(problem.names) - 1} more" if len(problem.names) > 1 else ""
        lines.append(f"{problem.title}, batch {problem.input[0]}: {problem.names[0]}{others}")
        for one in sorted(candidates, key=lambda one: one.milliseconds):
            remarks = [text for text, other in (("auto until now", before), ("chosen", best)) if one is other]
            figures = f"{one.milliseconds:>10.3f} ms  {_gain(before, one):>6}  {', '.join(remarks)}"
            lines.append(f"  {one.name:<24}{one.trouble or figures}")
        lines.append("")
    lines += [f"{'layer':<26}{'batch':>6}{'auto, ms':>9}{'best, ms':>9}{'gain':>7} chosen", "-" * _WIDTH]
    for problem, _, before, best in found:
        times = f"{before.milliseconds:>9.2f}{best.milliseconds:>9.2f}{_gain(before, best):>7}"
        chosen = best.name if best.seconds else best.trouble
        lines.append(f"{problem.title[:26]:<26}{problem.input[0]:>6}{times} {chosen}")
    return "\n".join(line[:_WIDTH].rstrip() for line in lines)


def _gain(before: Candidate, one: Candidate) -> str:
    """How many times as fast as before; "-" where one of them has no time."""
    return f"{before.milliseconds / one.milliseconds:.2f}x" if before.seconds and one.seconds else "-"


def save(found: Sequence[Tuned], file: Path) -> None:
    """Write what was chosen into a table, beside the other layers of one of this device; what is no such table is
    replaced."""
    device, measured_on = jax.devices()[0], machine()
    layers: dict[str, Execution] = {}
    with contextlib.suppress(ValueError):
        layers |= tuning.read(file, device.device_kind).layers
    layers |= {one.problem.key: one.best.execution for one in found if one.best.seconds}
    content = {
        "format": tuning.FORMAT,
        "device": device.device_kind,
        "platform": device.platform,
        "processor": measured_on["processor"],
        "cores": measured_on["cores"],
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "layers": {name: execution.to_dict() for name, execution in layers.items()},
    }
    write_json(file, content)
    tuning.forget()

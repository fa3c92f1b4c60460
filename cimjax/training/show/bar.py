"""The live line of a run: `rich.progress`, moved by the training loop and drawn by a thread of rich's."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Iterable, Sequence

from rich.console import Console, RenderableType
from rich.progress import Progress
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Column, Table
from rich.text import Text

from cimjax.hardware.table import count, show


class Bar(Progress):
    """Steps, the time left and the last metrics; or what keeps steps from being made, and for how long."""

    def __init__(self, console: Console, *, plain: bool) -> None:
        """Nothing is drawn before `start`, and never if `plain`."""
        super().__init__(
            console=console,
            refresh_per_second=5,
            # Seconds; rich keeps its last thousand samples.
            speed_estimate_period=3600,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
            get_time=time.monotonic,
            disable=plain,
        )
        self._spinner = Spinner("dots", style="cyan")
        self._run = self.add_task("preparing the first steps", total=None)

    def wait(self, reason: str) -> None:
        """Nothing will move for a while; the speed until here says nothing of what follows."""
        self.reset(self._run, description=reason)

    def move(self, step: int, total: int, epoch: float, loss: float, accuracy: float, images_per_second: float) -> None:
        """Take the arguments of `Display.progress`."""
        (task,), now = self.tasks, self.get_time()
        epochs = show(round(epoch * total / step, 1) if step else None)
        self.update(
            self._run,
            description="",
            total=total,
            completed=step,
            moved=now,
            pause=0.0 if task.description else now - task.fields["moved"],
            head=Text(f"epoch {epoch:>{len(epochs) + 2}.1f}/{epochs} {step / max(total, 1):>4.0%}"),
            metrics=[
                labelled("loss", f"{show(loss, '.4f'):>7}"),
                labelled("accuracy", f"{show(accuracy, '.1%'):>7}"),
                Text(f"{count(images_per_second):>6} images/s", "dim"),
            ],
        )

    def parts(self) -> list[Text]:
        """What there is to say, the most important first."""
        (task,) = self.tasks
        if task.description:
            return [Text(f"{task.description} {_duration(task.elapsed)}")]
        # What moved long ago says nothing of now.
        stale = self.get_time() - task.fields["moved"] > 10 + 3 * task.fields["pause"]
        left = Text(f"{_duration(None if stale else task.time_remaining):>7} left")
        return [task.fields["head"], left, *task.fields["metrics"]]

    def get_renderables(self) -> Iterable[RenderableType]:
        """What rich draws: the parts that fit, around a bar as long as there is room."""
        for task in self.tasks:  # there is none yet while rich makes itself ready
            head, *rest = self.parts()
            self._spinner.update(text=head)
            row: list[RenderableType] = [self._spinner]
            if not task.description:
                room = self.console.width - len(head) - 6
                text = fit(rest, room - 10)
                width = max(1, min(40, room - len(text)))
                row += [ProgressBar(task.total, task.completed, width=width, complete_style="cyan"), text]
            grid = Table.grid(*(Column(no_wrap=True) for _ in row), padding=(0, 2, 0, 0))
            grid.add_row(*row)
            yield grid


def fit(parts: Sequence[Text], width: int) -> Text:
    """As many of the parts, from the first one on, as fit in one line; at least one."""
    line, *rest = parts
    for part in rest:
        if len(line) + 2 + len(part) > width:
            break
        line = line + "  " + part
    return line


def labelled(label: str, value: str, style: str = "") -> Text:
    """A value behind its name."""
    return Text.assemble((f"{label} ", "dim"), (value, style))


def _duration(seconds: float | None) -> str:
    return "-" if seconds is None else str(datetime.timedelta(seconds=round(seconds)))

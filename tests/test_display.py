"""What a person sees: plain lines in a file, and a live bar in a real (pseudo-)terminal."""

from __future__ import annotations

import dataclasses
import fcntl
import io
import math
import os
import pathlib
import re
import struct
import subprocess
import sys
import termios
import types
from types import MappingProxyType

import pytest
from rich.console import Console
from test_training import config

from cimjax.hardware.survey import Layer
from cimjax.hardware.table import TIMES, count, layer_table
from cimjax.spec import ActivationSpec, ADCSpec, ArraySpec, CIMSpec, WeightSpec
from cimjax.training.experiment import build
from cimjax.training.result import Result
from cimjax.training.show import bar as bar_lib
from cimjax.training.show import display as display_lib
from cimjax.training.show.display import Display
from cimjax.training.show.report import describe_run, final_rows, step_table

RECORDS = {
    "train": {"loss": 0.51234, "accuracy": 0.8, "learning_rate": 0.0123},
    "test": {"accuracy": 0.98765},
    "validation": {"accuracy": 0.97, "best": True},
}
MOVED = {"weight": {"conv1": 0.02, "conv2": 0.04}, "psum": {"conv1": 0.1}}
HEALTH = {"conv1": {"saturated": 0.012, "codes_used": 6.5}}

# Prints a whole run; with "fail" it ends in an exception, with "kill" by SIGKILL, while the bar is on.
SCRIPT = """
import os, signal, sys, time
import test_display
from cimjax.hardware.table import layer_table
from cimjax.training.show.display import Display
with Display() as display:
    display.start("title", {"run folder": "runs/" + "x" * 90}, layer_table(test_display.resnet()))
    time.sleep(0.3)
    for step in range(1, 21):
        display.progress(step, 40, step / 10, 0.5, 0.75, 12345.6)
        time.sleep(0.02)
        if step % 10 == 0:
            display.epoch(step // 10, 4, test_display.RECORDS, 12345.6)
    print("printed by another library")
    display.warn("the ADC of conv2 saturates")
    time.sleep(0.3)
    if sys.argv[1] == "fail":
        raise RuntimeError("boom")
    if sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    display.finish(test_display.steps(), {"evaluate": "cimjax evaluate runs/x"})
"""


def spec(**array):
    return CIMSpec(
        activation=ActivationSpec(bits=3),
        weight=WeightSpec(bits=3, cell_bits=1),
        adc=ADCSpec(bits=3),
        array=ArraySpec(rows=128, columns=128, **array),
    )


def cim(name, kernel, output, **array):
    return Layer(name, kernel, output, spec(**array), use_bias=False)


def resnet():
    """Twenty layers with long names, the first and the last in full precision."""
    layers = [Layer("stem", (3, 3, 3, 16), (32, 32), None, use_bias=False)]
    for stage, (features, size) in enumerate(((16, 32), (32, 16), (64, 8)), start=1):
        for name in ("block1/conv1", "block1/conv2", "block2/conv1", "block2/conv2", "block3/conv1", "block3/conv2"):
            layers.append(cim(f"stage{stage}_{name}", (3, 3, features, features), (size, size)))
    return [*layers, Layer("classifier", (64, 100), (), None, use_bias=True)]


def steps(layers=("conv1", "conv2"), moved=MOVED, health=HEALTH):
    return step_table([cim(name, (3, 3, 16, 16), (8, 8)) for name in layers], moved, health)


def started(layers, columns=120, facts=MappingProxyType({})):
    """The lines before the training of some layers."""
    return plain(lambda display: display.start("title", facts, layer_table(layers)), columns)


def plain(act, columns=120):
    """The lines that `act(display)` prints to a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        stream = io.StringIO()
        with Display(stream=stream) as display:
            act(display)
    text = stream.getvalue()
    assert "\x1b" not in text and "\r" not in text
    lines = text.splitlines()
    assert all(line == line.rstrip() for line in lines)
    return lines


def row(lines, name):
    """The words of the one line that begins with `name`."""
    (found,) = (line for line in lines if line.startswith(f"{name} "))
    return found.removeprefix(name).replace(TIMES, "x").split()


def test_numbers():
    values = (0, 12, 99_999, 99_999.7, 123_456, 999_499, 999_500, 1.2e6, 5e12, 3e17, 12.34, -1500, math.nan, math.inf)
    texts = "0 12 99,999 100,000 123_k 999_k 1_M 1.2_M 5_T 3e+05_T 12.3 -1,500 nan inf"
    assert [count(value).replace(" ", "_") for value in values] == texts.split()


def test_the_table_of_layers():
    lines = started(resnet(), facts={"run folder": "runs/x", "devices": "cpu"})
    assert lines[:3] == ["title", "run folder  runs/x", "devices     cpu"]
    conv, cost = row(lines, "stage3_block1/conv1"), resnet()[-2].cost
    paper = cost.dequantization_multiplications_of_paper
    assert conv[:9] == ["3x3x64x64", "8x8", "5x2", "10", f"{100 * cost.utilization:.0f}", "%", "A3", "W3/1", "P3"]
    assert conv[9:] == [f"{cost.adc_conversions:,}", f"{cost.dequantization_multiplications}", f"({paper})", "36,864"]
    assert row(lines, "stem") == ["3x3x3x16", "32x32", *"-------", "432"]
    assert row(lines, "classifier") == ["64x100", *"--------", "6,500"]
    costs = [layer.cost for layer in resnet() if layer.cost]
    total = row(lines, "total")
    assert total[0] == str(sum(cost.arrays for cost in costs))
    assert total[3:5] == [*count(sum(cost.adc_conversions for cost in costs)).split()]
    assert total[-2:] == count(432 + 6500 + sum(cost.parameters for cost in costs)).split()
    # The legend explains every column that needs it.
    assert "rows x columns of arrays" in " ".join(row(lines, "tiles"))
    assert not any("wider" in line for line in lines)
    assert not any(line.startswith("reads") for line in lines)


def test_read_groups_are_shown_where_they_differ_from_row_tiles():
    layers = [cim("conv", (3, 3, 32, 32), (8, 8), active_rows=32)]
    lines = started(layers)
    cost = layers[0].cost
    assert cost.read_groups != cost.row_tiles
    assert row(lines, "conv")[2:5] == [f"{cost.row_tiles}x1", str(cost.arrays), str(cost.read_groups)]
    assert row(lines, "reads")
    assert row(lines, "conv")[5] == "27/32"
    assert row(lines, "rows read") == ["at", "once,", "of", "those", "that", "may", "be"]


def test_slices_and_rows_read_are_shown_where_they_say_something_also_in_a_narrow_terminal():
    bits = ActivationSpec(bits=4, slice_bits=1)
    sliced = CIMSpec(activation=bits, array=ArraySpec(active_rows=16))
    names = [f"stage1_block1/conv{index}" for index in range(3)]
    layers = [Layer(name, (3, 3, 32, 32), (8, 8), sliced, use_bias=False) for name in names]
    for columns in (160, 80):
        lines = started(layers, columns)
        words = row(lines, "stage1_block1/conv0")
        assert "9/16" in words and "A4/1" in words and max(map(len, lines)) <= columns
    wide = started(layers, 160)
    assert row(wide, "stage1_block1/conv0")[4:7] == ["32", "9/16", "4"]
    assert row(wide, "slices")
    usual = started(resnet(), 140)
    assert not any(line.startswith(("rows read", "slices", "reads")) for line in usual)


def test_an_ideal_adc_and_no_layer_in_arrays_leave_no_empty_columns():
    ideal = Layer("a", (3, 3, 16, 16), (8, 8), CIMSpec(adc=None), use_bias=False)
    words = row(started([ideal]), "a")
    assert words[5:] == ["%", "A4", "W4/2", "P-", str(ideal.cost.dequantization_multiplications), "(1)", "2,304"]
    assert row(started([resnet()[0]]), "stem") == ["3x3x3x16", "32x32", "432"]
    assert started([]) == ["title", ""]


@pytest.mark.parametrize("columns", [120, 100, 80, 60, 45, 20])
def test_narrow_output_leaves_out_columns_and_breaks_no_row(columns):
    def act(display):
        display.start("title", {}, layer_table(resnet()))
        display.epoch(3, 60, RECORDS, 12345.6)
        display.finish(steps(), {})

    lines = plain(act, columns)
    if columns >= 45:
        assert max(map(len, lines)) <= columns
        assert "A3 W3/1 P3" in " ".join(row(lines, "stage1_block1/conv1"))
    assert sum(line.startswith("stage") for line in lines) == 18 or columns == 20
    assert any("wider" in line for line in lines) == (columns < 120)
    (epoch,) = (line for line in lines if line.startswith("epoch  3/60"))
    assert ("held out  97.00 %  best" in epoch) == (columns >= 60)
    assert ("12,346 images/s" in epoch) == (columns >= 120)


def test_one_line_per_epoch():
    def act(display):
        display.epoch(9, 10, RECORDS, 12345.6)
        wild = {"train": {**RECORDS["train"], "loss": math.nan}, "test": {"accuracy": math.nan}}
        display.epoch(10, 10, wild, 12345.6)
        display.epoch(11, 10, {"train": {"loss": None}}, None)

    assert plain(act) == [
        "epoch  9/10  test  98.77 %  held out  97.00 %  best  train  80.00 %  loss  0.5123  lr   0.0123  "
        "12,346 images/s",
        "epoch 10/10  test    nan %  train  80.00 %  loss     nan  lr   0.0123  12,346 images/s",
        "epoch 11/10  test        -  train        -  loss       -  lr        -       - images/s",
    ]


def test_plain_progress_is_one_line_every_15_seconds_and_fewer_later(monkeypatch):
    clock = types.SimpleNamespace(now=100.0)
    for module in (display_lib, bar_lib):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setenv("COLUMNS", "120")
    stream, printed = io.StringIO(), []
    display = Display(stream=stream)
    for step in range(1, 10_001):
        clock.now += 1
        before = len(stream.getvalue())
        display.progress(step, 20_000, step / 100, 0.5, 0.75, 1e6)
        if len(stream.getvalue()) > before:
            printed.append(step)
    assert printed[:4] == [15, 30, 45, 60]
    assert printed[-1] - printed[-2] > 150
    first = "epoch   0.1/200   0%  5:33:05 left  loss  0.5000  accuracy  75.0 %     1 M images/s"
    assert stream.getvalue().splitlines()[0] == first
    # The line of an epoch is a sign of life too.
    clock.now += 10_000
    display.epoch(1, 2, RECORDS, 1e6)
    before = len(stream.getvalue())
    display.progress(10_001, 20_000, 100.01, 0.5, 0.75, 1e6)
    assert len(stream.getvalue()) == before


def test_time_left_forgets_the_compilation_and_what_was_before_a_resume(monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(bar_lib, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    bar = bar_lib.Bar(Console(file=io.StringIO()), plain=True)

    def said():
        return [part.plain.strip() for part in bar.parts()[:2]]

    assert said() == ["preparing the first steps 0:00:00"]
    clock.now = 50.0
    bar.move(0, 1000, 0.0, math.nan, math.nan, math.nan)
    assert "epoch 0.0/-   0%" in bar.parts()[0].plain
    for step in range(500, 700, 10):
        clock.now += 2
        bar.move(step, 1000, step / 100, 0.5, 0.5, 5.0)
    assert said() == ["epoch  6.9/10  69%", "0:01:02 left"]
    bar.wait("compiling the setting of ADC steps")
    clock.now += 61
    assert said() == ["compiling the setting of ADC steps 0:01:01"]
    bar.move(1200, 1000, math.nan, 0.5, 0.5, 0.0)
    assert said()[1] == "0:00:00 left"


def test_no_time_left_is_told_of_what_has_not_moved_for_long(monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(bar_lib, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    for pause, long in ((0.5, 12), (100.0, 311)):
        bar = bar_lib.Bar(Console(file=io.StringIO()), plain=True)
        for step in range(1, 10):
            clock.now += pause
            bar.move(step, 109, step / 10, 0.5, 0.5, 5.0)
        assert bar.parts()[1].plain.strip() == {0.5: "0:00:50 left", 100.0: "2:46:40 left"}[pause]
        clock.now += long - 2
        assert "- left" not in bar.parts()[1].plain
        clock.now += 2
        assert "- left" in bar.parts()[1].plain


def test_messages_and_commands_are_not_broken_in_a_file():
    command = "  python train.py " + "--config.x=1 " * 20 + "--workdir runs/x"

    def act(display):
        display.warn("[conv1] saturates " * 10)
        display.note(f"stopped; to go on:\n{command}")

    lines = plain(act, 60)
    assert lines == [
        ("warning: " + "[conv1] saturates " * 10).rstrip(),
        "stopped; to go on:",
        command,
    ]


def test_the_end_tells_steps_and_adcs_and_the_result_last():
    facts = {"test accuracy": "98.6 % (best)", "evaluate": "cimjax evaluate runs/x"}
    lines = plain(lambda display: display.finish(steps(), facts))
    assert row(lines, "conv1") == ["0.02", "0.1", "1.2", "%", "6.5", "of", "8"]
    assert row(lines, "conv2") == ["0.04", "-", "-", "-"]
    assert lines[-2:] == ["test accuracy  98.6 % (best)", "evaluate       cimjax evaluate runs/x"]
    assert plain(lambda display: display.finish(steps(()), facts)) == ["", *lines[-2:]]
    offset = plain(lambda display: display.finish(steps(moved={**MOVED, "offset": {"conv1": 0.5}}), {}))
    assert row(offset, "offset moved") != row(offset, "psum moved")
    odd = plain(lambda display: display.finish(steps(moved={"weight": {"conv1": math.nan, "conv2": 0.1}}), {}))
    assert row(odd, "conv1")[0] == "nan"


def test_the_result_of_a_run_names_what_moved_and_the_accuracy_last():
    folder = pathlib.Path("runs/a b")
    result = Result(0.9876, 0.1, 88, {"weight_moved": 0.03, "psum_moved": 0.2}, folder, {"best_accuracy": 0.98})
    assert final_rows(result, own=False) == {
        "steps moved": "weight 0.03, psum 0.2",
        "run folder": "runs/a b",
        "again": "cimjax evaluate 'runs/a b'",
        "best on held-out images": "98.00%",
        "test accuracy": "98.76%",
    }
    assert "steps moved" not in final_rows(dataclasses.replace(result, moved={}), own=False)


def test_an_ascii_stream_gets_ascii(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    file = io.BytesIO()
    stream = io.TextIOWrapper(file, encoding="ascii")
    with Display(stream=stream, plain=False) as display:
        display.start("title", {"run folder": "läufe/\udc80"}, layer_table(resnet()))
        display.progress(20, 40, 1.5, 0.5, 0.75, 100.0)
    with Display(stream=stream) as display:
        display.start("title", {"run folder": "läufe/\udc80"}, layer_table(resnet()))
    text = file.getvalue().decode("ascii")
    assert "l?ufe/?" in text and "3x3x64x64" in text and "-----" in text


def test_a_broken_stream_does_not_end_the_training():
    read, write = os.pipe()
    os.close(read)
    stream = os.fdopen(write, "w", buffering=1)
    with Display(stream=stream) as display:
        display.start("title", {}, layer_table(resnet()))
        display.epoch(1, 2, RECORDS, 1e6)
        display.finish(steps(), {"a": "b"})
    with pytest.raises(BrokenPipeError):
        stream.close()


def in_terminal(ending, columns, **environment):
    """What a real process writes to a pseudo-terminal, and its exit status."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    dropped = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, ending],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={
            **kept,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "PYTHONIOENCODING": "utf-8",
            "TERM": "xterm-256color",
            **environment,
        },
    )
    os.close(slave)
    chunks = []
    try:
        while chunk := os.read(master, 65536):
            chunks.append(chunk)
    except OSError:  # the other end was closed
        pass
    os.close(master)
    return b"".join(chunks).decode(), process.wait()


def screen(text):
    """The lines that a terminal shows in the end, if none of them is wrapped."""
    lines, y, x = [""], 0, 0
    for control, code, letter in re.findall(r"\x1b\[([\d;?]*)([A-Za-z])|([^\x1b])", text):
        if code == "A":
            y -= int(control or 1)
        elif code == "K":
            assert control == "2"
            lines[y] = ""
        elif letter == "\n":
            y += 1
            lines += [""] * (y + 1 - len(lines))
        elif letter == "\r":
            x = 0
        elif letter:
            lines[y] = lines[y].ljust(x)[:x] + letter + lines[y][x + 1 :]
            x += 1
        else:
            assert code == "m", (control, code)
    return lines


@pytest.mark.parametrize(("columns", "environment"), [(60, {}), (120, {"NO_COLOR": "1"})])
def test_a_terminal_gets_a_live_bar_that_is_gone_in_the_end(columns, environment):
    text, status = in_terminal("finish", columns, **environment)
    assert status == 0
    for part in ("preparing the first steps", "epoch 2.0/4", " 50%", " left", "━"):
        assert part in text
    coloured = re.search(r"\x1b\[[\d;]*3\d[\d;]*m", text)
    assert bool(coloured) == ("NO_COLOR" not in environment)
    lines = [line.rstrip() for line in screen(text)]
    assert not any("left" in line or "preparing" in line for line in lines)
    assert [line[:19] for line in lines if line.startswith("epoch")] == ["epoch 1/4  test  98", "epoch 2/4  test  98"]
    assert lines[-2:] == ["evaluate  cimjax evaluate runs/x", ""]
    assert max(len(line) for line in lines if "runs/xxx" not in line) <= columns
    assert "printed by another library" in lines and "warning: the ADC of conv2 saturates" in lines
    assert f"run folder  runs/{'x' * 90}" in lines


def test_the_terminal_is_in_order_after_an_exception():
    text, status = in_terminal("fail", 80)
    lines = screen(text)
    assert status == 1 and lines[-2:] == ["RuntimeError: boom", ""]
    assert not any("left" in line for line in lines)


def test_the_cursor_is_there_after_a_kill():
    text, status = in_terminal("kill", 80)
    assert status == -9 and " left" in text
    assert "\x1b[?25l" not in text


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    for term, escapes in (("xterm-256color", True), ("dumb", False)):
        monkeypatch.setenv("TERM", term)
        stream.truncate(stream.seek(0))
        with Display(stream=stream) as display:
            display.start("title", {}, layer_table([]))
        assert ("\x1b" in stream.getvalue()) == escapes


def test_kernels_that_a_cpu_interprets_are_said_to_be_slow():
    found = [describe_run(build(config(execution={"program": name})))["facts"] for name in ("pallas", "auto")]
    assert "a CPU interprets for tests, very slowly" in found[0]["programs"] and "programs" not in found[1]

import io
import json
import math
import os
import sys
from pathlib import Path

import pytest
from rich.console import Console

from ternlm.config.section import ConfigError
from ternlm.config.training import MonitorConfig
from ternlm.monitor import sinks as sinks_module
from ternlm.monitor.sinks import JsonlSink, LineSink, ProgressSink, TensorboardSink, open_sinks

METRICS = {
    "loss/total": 2.3456789,
    "accuracy/total": 0.25,
    "speed/mfu_full": 0.5,
    "time/eta_s": 3725.0,
    "time/elapsed_s": 30.0,
}


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_steps(path, steps, resume_step=0):
    sink = JsonlSink(path, resume_step)
    for step in steps:
        sink.write(step, {"loss/total": float(step)})
    sink.close()


def test_jsonl_has_one_object_a_line_with_exact_numbers(tmp_path):
    sink = JsonlSink(tmp_path / "new" / "metrics.jsonl")
    sink.write(1, METRICS)
    sink.text(1, "sample/0", "two\nlines 中")
    sink.close()
    first, second = lines_of(tmp_path / "new" / "metrics.jsonl")
    assert first == {"step": 1, **METRICS}
    assert second == {"step": 1, "name": "sample/0", "text": "two\nlines 中"}


def test_jsonl_is_strict_json_and_keeps_nan_and_infinity_apart(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(1, {"a/x": math.nan, "a/y": math.inf, "a/z": -math.inf})
    sink.close()

    def refuse(constant):
        raise AssertionError(constant)

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert math.isnan(float(line["a/x"]))
    assert float(line["a/y"]) == math.inf
    assert float(line["a/z"]) == -math.inf


def test_jsonl_is_on_disk_after_each_write(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(1, METRICS)
    assert len(lines_of(tmp_path / "metrics.jsonl")) == 1
    sink.close()


def test_a_resumed_jsonl_equals_the_uninterrupted_one(tmp_path):
    write_steps(tmp_path / "whole.jsonl", range(1, 9))
    write_steps(tmp_path / "resumed.jsonl", range(1, 7))
    write_steps(tmp_path / "resumed.jsonl", range(5, 9), resume_step=4)
    assert (tmp_path / "resumed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert [path.name for path in tmp_path.glob("*.tmp")] == []


def watch_the_disk(monkeypatch):
    """Return the list in which the names of files and folders that reach the disk, and renames, are noted."""
    noted, fsync, replace = [], os.fsync, os.replace

    def note_sync(descriptor):
        noted.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def note_rename(old, new):
        noted.append(f"{old.name} -> {new.name}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_rename)
    return noted


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_the_kept_lines_are_on_the_disk_before_they_replace_the_old_ones(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    write_steps(folder / "metrics.jsonl", range(1, 4))
    noted = watch_the_disk(monkeypatch)
    sink = JsonlSink(folder / "metrics.jsonl", resume_step=2)
    assert noted == ["metrics.jsonl.tmp", "metrics.jsonl.tmp -> metrics.jsonl", "run"]
    sink.write(3, METRICS)
    sink.sync()
    assert noted[3:] == ["metrics.jsonl"]
    sink.close()


@pytest.mark.parametrize("tail", [b'{"step": 3, "lo', b'{"step": 2', "中".encode()[:2], b"\0\0\0"])
def test_half_a_line_is_left_out_on_resume(tmp_path, tail, caplog):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2])
    with open(path, "ab") as file:
        file.write(tail)
    write_steps(path, [3], resume_step=2)
    assert [line["step"] for line in lines_of(path)] == [1, 2, 3]
    assert str(path) in caplog.text


def test_a_whole_line_without_its_end_is_left_out_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2])
    path.write_bytes(path.read_bytes()[:-1])
    write_steps(path, [2, 3], resume_step=2)
    assert [line["step"] for line in lines_of(path)] == [1, 2, 3]


def test_a_new_run_starts_an_empty_jsonl(tmp_path):
    write_steps(tmp_path / "metrics.jsonl", [0, 1, 2])
    write_steps(tmp_path / "metrics.jsonl", [0, 1])
    assert [line["step"] for line in lines_of(tmp_path / "metrics.jsonl")] == [0, 1]


def scalars(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss/total")]


def test_tensorboard_forgets_the_steps_after_the_checkpoint(tmp_path):
    pytest.importorskip("tensorboard")
    for steps, resume_step, value in [((1, 2, 3, 4), 0, 1.0), ((3, 4, 5), 2, 2.0)]:
        sink = TensorboardSink(tmp_path, resume_step)
        for step in steps:
            sink.write(step, {"loss/total": value})
        sink.text(steps[-1], "sample/0", "text")
        sink.close()
    assert scalars(tmp_path) == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]


def test_without_tensorboard_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"ternlm\[tensorboard\]"):
        open_sinks(MonitorConfig(tensorboard=True, jsonl=False, progress="off"), tmp_path, 10)


def test_a_line_has_the_brief_metrics_for_a_reader():
    stream = io.StringIO()
    LineSink(100, stream).write(7, METRICS)
    assert stream.getvalue() == "step=7/100 loss/total=2.346 speed/mfu_full=50.0% time/eta_s=1:02:05\n"


def test_a_line_has_all_metrics_where_none_is_brief():
    stream = io.StringIO()
    LineSink(100, stream).write(7, {"reward/mean": -12345.0, "reward/max": math.nan})
    assert stream.getvalue() == "step=7/100 reward/mean=-12345 reward/max=nan\n"


def test_of_fast_steps_a_line_a_second_is_printed_and_the_first_the_last_and_validations(monkeypatch):
    now, stream = [100.0], io.StringIO()
    monkeypatch.setattr(sinks_module.time, "monotonic", lambda: now[0])
    sink = LineSink(30, stream)
    for step in range(1, 31):
        sink.write(step, {"loss/total": 1.0} | ({"validation_loss/total": 2.0} if step == 7 else {}))
        now[0] += 0.25
    sink.close()
    printed = [int(line.split("/")[0].removeprefix("step=")) for line in stream.getvalue().splitlines()]
    assert printed == [1, 5, 7, 11, 15, 19, 23, 27, 30]


def test_the_last_line_of_an_interrupted_run_is_printed():
    stream = io.StringIO()
    sink = LineSink(100, stream)
    for step in (1, 2, 3):
        sink.write(step, {"loss/total": float(step)})
    sink.close()
    assert stream.getvalue() == "step=1/100 loss/total=1\nstep=3/100 loss/total=3\n"


def bar(max_seconds=None):
    console = Console(file=io.StringIO(), force_terminal=True, width=150, color_system=None)
    return ProgressSink(100, max_seconds=max_seconds, console=console), console.file


def test_the_bar_shows_step_loss_and_time():
    sink, out = bar(max_seconds=240.0)
    sink.write(7, METRICS)
    sink.close()
    assert "7/100" in out.getvalue()
    assert "loss 2.346  elapsed 30s of 4:00  left 1:02:05  MFU 50.0%" in out.getvalue()


def test_the_bar_prints_validation_and_text_above_it_untouched():
    sink, out = bar()
    sink.write(5, {**METRICS, "validation_loss/en": 3.0})
    sink.text(5, "sample/0", "[bold]not markup[/bold]")
    sink.close()
    assert "step 5 validation_loss/en=3" in out.getvalue()
    assert "[bold]not markup[/bold]" in out.getvalue()


@pytest.mark.parametrize(
    ("monitor", "kinds"),
    [
        (MonitorConfig(), [JsonlSink, LineSink]),  # auto, and pytest's output is no terminal
        (MonitorConfig(progress="bar", jsonl=False), [ProgressSink]),
        (MonitorConfig(progress="lines", jsonl=False), [LineSink]),
        (MonitorConfig(progress="off", jsonl=False), []),
    ],
)
def test_the_sinks_are_those_of_the_settings(tmp_path, monitor, kinds):
    sinks = open_sinks(monitor, tmp_path, total_steps=10)
    for sink in sinks:
        sink.sync()
        sink.close()
    assert [type(sink) for sink in sinks] == kinds

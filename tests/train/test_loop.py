import itertools
import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ternlm.checkpoint.errors import CheckpointError
from ternlm.checkpoint.folders import checkpoint_folder, complete_steps
from ternlm.config import ConfigError, config_from_dict, config_to_dict
from ternlm.ops import loss as ops_loss
from ternlm.train import loop
from ternlm.train.lock import run_lock
from ternlm.train.loop import TrainingError
from ternlm.train.pretrain import pretrain
from ternlm.train.run import set_up
from ternlm.train.validate import validate


def weights(run):
    return {name: parameter.detach() for name, parameter in run.model.named_parameters()}


def records(run):
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    wall_clock = ("speed/", "time/", "data/wait", "memory/")
    return [{k: v for k, v in line.items() if not k.startswith(wall_clock)} for line in lines]


def assert_same(a, b):
    for name, weight in weights(a).items():
        assert torch.equal(weight, weights(b)[name]), name


def test_a_tiny_model_learns(make_config):
    run = pretrain(make_config(train={"steps": 60}, validation={"every_steps": 60}, data={"validation_fraction": 0.1}))
    lines = records(run)
    assert lines[0]["loss/total"] == pytest.approx(math.log(64), abs=0.1)
    assert lines[-1]["validation_loss/numbers"] < 3.2
    assert lines[-1]["accuracy/total"] > 2 * lines[0]["accuracy/total"]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(make_config, kind):
    sections = dict(
        optimizer={"kind": kind, "beta2_ramp": 0.8},
        schedule={"kind": "cosine", "warmup_fraction": 0.3},
        batch={"rampup": {"start": 4, "increment": 4, "every": 2}},
        checkpoint={"every_steps": 1, "keep_last": 10},
        data={"validation_fraction": 0.1},
        validation={"every_steps": 2},
    )
    whole = pretrain(make_config("whole", **sections))
    config = make_config("parts", **sections)
    pretrain(config)
    for step in (4, 5, 6):  # as if killed after step 3, with a half-written line in the metrics
        folder = checkpoint_folder(Path(config.out), step)
        (folder / "COMPLETE").unlink()
    with open(Path(config.out) / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    resumed = pretrain(config)
    assert_same(whole, resumed)
    assert records(whole) == records(resumed)
    assert whole.progress.tokens == resumed.progress.tokens


def test_accumulated_microbatches_equal_one_big_batch(make_config):
    big = pretrain(make_config("big", batch={"microbatch_sequences": 8}))
    small = pretrain(make_config("small", batch={"microbatch_sequences": 1}))
    for name, weight in weights(big).items():
        torch.testing.assert_close(weight, weights(small)[name], rtol=1e-4, atol=1e-5)
    for a, b in zip(records(big), records(small), strict=True):
        assert a["loss/total"] == pytest.approx(b["loss/total"], rel=1e-5)


@pytest.mark.parametrize("compute", [{"recompute": 1.0}, {"recompute": 0.5, "recompute_keep": "matmuls"}])
def test_recompute_changes_nothing(make_config, compute):
    assert_same(pretrain(make_config("plain")), pretrain(make_config("again", compute=compute)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_follows_float32(make_config, dtype):
    full = records(pretrain(make_config("full")))
    low = records(pretrain(make_config("low", compute={"dtype": dtype})))
    for a, b in zip(full, low, strict=True):
        assert a["loss/total"] == pytest.approx(b["loss/total"], rel=0.02)
    assert ("scaler/scale" in low[0]) == (dtype == "float16")


def test_overflow_of_float16_skips_steps_until_the_scale_fits(make_config, monkeypatch):
    real, calls = loop.accumulate_gradients, []

    def overflowing(laid_out, *args):
        loss, scale = real(laid_out, *args), args[-1]
        calls.append(scale)
        if scale > 2**14:
            next(laid_out.model.parameters()).grad.fill_(math.inf)
        return loss

    monkeypatch.setattr(loop, "accumulate_gradients", overflowing)
    run = pretrain(make_config(compute={"dtype": "float16"}, train={"steps": 8}))
    assert calls[:5] == [2**16, 2**16, 2**15, 2**14, 2**14]
    assert (run.progress.skipped, run.progress.updates) == (3, 5)


def poison(monkeypatch, bad_steps):
    real, step = loop.accumulate_gradients, iter(range(1000))

    def poisoned(laid_out, *args):
        loss = real(laid_out, *args)
        if next(step) in bad_steps:
            next(laid_out.model.parameters()).grad[0, 0] = math.nan
        return loss

    monkeypatch.setattr(loop, "accumulate_gradients", poisoned)


def test_a_step_with_a_nan_gradient_is_counted_and_not_applied(make_config, monkeypatch):
    poison(monkeypatch, {2})
    run = pretrain(make_config(checkpoint={"every_steps": 1, "keep_last": 9}))
    assert (run.progress.step, run.progress.updates, run.progress.skipped) == (6, 5, 1)
    assert all(torch.isfinite(weight).all() for weight in weights(run).values())
    lines = records(run)
    assert lines[2]["grad/norm"] == "NaN"
    assert lines[3]["loss/total"] < lines[0]["loss/total"]


def test_too_many_bad_steps_in_a_row_end_the_run_with_the_remedy(make_config, monkeypatch):
    poison(monkeypatch, set(range(2, 100)))
    with pytest.raises(TrainingError, match=r"newest 3 steps .* lower optimizer\.lr"):
        pretrain(make_config(train={"max_skipped_in_row": 3, "steps": 20}))


@pytest.mark.parametrize("action", ["skip", "stop"])
def test_a_loss_spike_is_skipped_or_stops(make_config, monkeypatch, action):
    real, step = loop.accumulate_gradients, iter(range(100))

    def spiking(model, *args):
        loss = real(model, *args)
        return loss if next(step) != 4 else replace(loss, mean=loss.mean * 10)

    monkeypatch.setattr(loop, "accumulate_gradients", spiking)
    run = pretrain(make_config(train={"spike": action, "spike_window": 3}))
    assert run.progress.skipped == 1
    assert run.progress.step == (6 if action == "skip" else 5)
    assert complete_steps(run.folder) == [run.progress.step]


def test_skipped_steps_are_drawn_and_not_trained_on(make_config):
    run = pretrain(make_config(data={"skip_steps": "1-2,4"}))
    assert (run.progress.step, run.progress.updates) == (6, 3)
    assert run.loader.state_dict() == {"step": 6, "sequence": 48}
    assert [line["step"] for line in records(run)] == [3, 5, 6]


def test_the_stop_file_saves_and_stops_or_saves_and_goes_on(make_config, tmp_path):
    path = tmp_path / "stop"
    config = make_config(train={"stop_file": str(path)}, checkpoint={"every_steps": 0, "keep_last": 9})
    path.write_text("-2")
    run = pretrain(config)
    assert complete_steps(run.folder) == [2, 6]
    config = make_config("second", train={"stop_file": str(path)}, checkpoint={"every_steps": 0})
    path.write_text("3")
    assert pretrain(config).progress.step == 3


def test_a_time_budget_saves_and_stops(make_config):
    run = pretrain(make_config(train={"steps": 10**6, "max_minutes": 0.01}))
    assert 1 <= run.progress.step < 10**6
    assert complete_steps(run.folder) == [run.progress.step]


def test_a_fulfilled_stop_file_does_not_stop_the_next_start(make_config, tmp_path):
    path = tmp_path / "stop"
    config = make_config(train={"stop_file": str(path)})
    path.write_text("3")
    assert pretrain(config).progress.step == 3
    assert pretrain(config).progress.step == 6
    assert path.read_text() == "0\n"


def test_a_used_up_time_budget_trains_nothing_more_and_says_how_to(make_config, caplog):
    config = make_config(train={"steps": 10**6, "max_minutes": 0.01})
    step = pretrain(config).progress.step
    # Less than was used: the last step may have left time for one more like the mean.
    again = pretrain(make_config(train={"steps": 10**6, "max_minutes": 0.005}))
    assert again.progress.step == step
    assert "raise train.max_minutes" in again.stopped
    more = config_from_dict({**config_to_dict(config), "train": {"steps": step + 2, "max_minutes": 1.0}})
    assert pretrain(more).progress.step == step + 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_cleanly(make_config, monkeypatch, number):
    real, step = loop.accumulate_gradients, iter(range(100))

    def signalled(*args):
        if next(step) == 2:
            os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(loop, "accumulate_gradients", signalled)
    before = signal.getsignal(number)
    run = pretrain(make_config(train={"steps": 10**6}, checkpoint={"every_steps": 0}))
    assert complete_steps(run.folder) == [3]
    assert run.stopped == f"received {number.name}"
    assert signal.getsignal(number) == before


def test_a_bad_layout_is_told_before_a_device_is_touched(make_config, monkeypatch):
    monkeypatch.setattr("ternlm.train.pretrain.choose_device", lambda *unused: pytest.fail("touched a device"))
    with pytest.raises(ConfigError, match="must divide the number of ranks, 1"):
        pretrain(make_config(parallel={"pipeline": 3}))


def test_a_run_that_another_process_trains_is_refused(make_config):
    config = make_config()
    with run_lock(Path(config.out)), pytest.raises(ConfigError, match="being trained by another process"):
        pretrain(config)
    assert pretrain(config).progress.step == 6


def test_an_explicit_resume_never_drops_newer_checkpoints(make_config):
    first = make_config("first", checkpoint={"every_steps": 2, "keep_last": 9})
    pretrain(first)
    early = checkpoint_folder(Path(first.out), 2)
    with pytest.raises(ConfigError, match=r"already holds step-00000006.*would be lost"):
        pretrain(first, resume=str(early))
    branch = make_config("branch")
    resumed = pretrain(branch, resume=str(early))
    assert records(resumed)[0]["step"] == 3
    assert_same(resumed, pretrain(first))


def test_another_optimizer_is_refused_on_resume_with_both_remedies(make_config):
    pretrain(make_config(checkpoint={"every_steps": 3}))
    with pytest.raises(CheckpointError, match=r"set optimizer\.kind=adamw, or start a new run .* load\.from="):
        pretrain(make_config(optimizer={"kind": "muon"}, train={"steps": 9}))


def test_changed_data_under_the_same_path_are_named_on_resume(make_config, write_data, tmp_path, caplog):
    data = write_data(tmp_path / "numbers")
    sources = {"sources": [{"name": "numbers", "path": str(data)}]}
    pretrain(make_config(data=sources))
    set_up(make_config(data=sources))
    assert "has changed" not in caplog.text
    shutil.rmtree(data)
    write_data(data, seed=1)
    set_up(make_config(data=sources))
    assert "the data of source 'numbers' has changed" in caplog.text


def test_prompts_that_cannot_be_continued_are_refused_before_training(make_config):
    sample = {"every_steps": 2, "prompts": ["def "]}
    with pytest.raises(ConfigError, match=r"set data\.tokenizer"):
        pretrain(make_config(sample=sample), continue_texts=lambda *args: ["x"])


def test_validation_makes_no_gradient_of_the_head(make_config, monkeypatch):
    run = set_up(make_config(data={"validation_fraction": 0.1}))
    monkeypatch.setattr(ops_loss, "_add_product_", lambda *args: pytest.fail("a gradient was made for nobody"))
    assert validate(run)["validation_loss/numbers"] > 0


def test_data_without_a_trainable_token_end_the_run_with_the_reason(make_config, monkeypatch):
    real = loop.accumulate_gradients

    def untrained(laid_out, loss_fn, microbatches, *args):
        nothing = [replace(batch, weights_BT=torch.zeros_like(batch.weights_BT)) for batch in microbatches]
        return real(laid_out, loss_fn, nothing, *args)

    monkeypatch.setattr(loop, "accumulate_gradients", untrained)
    with pytest.raises(TrainingError, match="no token to train on"):
        pretrain(make_config(train={"max_skipped_in_row": 3}))


@pytest.mark.parametrize("content", ["abc", None])
def test_a_stop_file_that_cannot_be_read_is_refused(make_config, tmp_path, content):
    path = tmp_path / "stop"
    path.write_text(content) if content else path.mkdir()
    with pytest.raises(ConfigError, match=r"train\.stop_file = .* must be a file that holds a step number"):
        pretrain(make_config(train={"stop_file": str(path)}))


def test_a_model_larger_than_the_memory_is_refused_before_it_is_allocated(make_config):
    with pytest.raises(ConfigError, match=r"parameters need [\d,.]+ GiB"):
        set_up(make_config(model={"vocab_size": 10**10}))


def test_resume_never_refuses_to_mix_two_runs(make_config):
    config = make_config()
    pretrain(config)
    with pytest.raises(ConfigError, match="already holds checkpoints"):
        pretrain(config, resume="never")


def test_a_complete_run_is_left_as_it_is(make_config):
    config = make_config()
    pretrain(config)
    before = (Path(config.out) / "metrics.jsonl").read_bytes()
    assert pretrain(config).progress.step == 6
    assert (Path(config.out) / "metrics.jsonl").read_bytes() == before


def test_a_new_run_can_start_from_anothers_weights(make_config):
    first = pretrain(make_config("first"))
    second = set_up(make_config("second", load={"from": first.config.out}))
    assert_same(first, second)
    assert second.progress.step == 0


@pytest.mark.parametrize("resume", ["never", "first"])
def test_a_restarted_command_goes_on_from_what_it_has_saved(resume, make_config, tmp_path):
    pretrain(make_config("first"))
    given = "never" if resume == "never" else str(tmp_path / "first")
    pretrain(make_config("second", train={"steps": 9}), given)
    assert set_up(make_config("second", train={"steps": 12}), given, restarted=True).progress.step == 9
    with pytest.raises(ConfigError, match="choose another out"):
        set_up(make_config("second", train={"steps": 12}), given)


def test_weights_of_another_shape_are_refused_before_training(make_config):
    first = pretrain(make_config("first"))
    with pytest.raises(CheckpointError, match=r"model\.num_hidden_layers = 2, this run has 3"):
        set_up(make_config("second", model={"num_hidden_layers": 3}, load={"from": first.config.out}))


def test_changed_settings_are_named_on_resume(make_config, caplog):
    pretrain(make_config())
    set_up(make_config(optimizer={"lr": 5e-3}))
    assert "optimizer.lr" in caplog.text
    assert "0.005" in caplog.text


@pytest.mark.parametrize("packing", ["pad", "documents"])
def test_a_rows_loss_is_that_of_its_documents_alone(make_config, packing):
    batch_settings = {"global_sequences": 4, "microbatch_sequences": 4}
    run = set_up(make_config(data={"packing": packing, "seq_len": 64}, batch=batch_settings))
    batch = next(run.loader)[0]
    together = loop.accumulate_gradients(run.laid_out, run.loss_fn, [batch], run.autocast)
    gradients = {name: parameter.grad for name, parameter in run.model.named_parameters()}
    run.model.zero_grad(set_to_none=True)
    total = torch.zeros(())
    for row, lengths in enumerate(batch.lengths):
        for first, length in zip(itertools.accumulate(lengths, initial=0), lengths, strict=False):
            part = slice(first, first + length)
            hidden = run.model(batch.tokens_BT[row, None, part], torch.arange(length)[None], causal)
            nll = torch.nn.functional.cross_entropy(
                run.model.lm_head(hidden)[0], batch.targets_BT[row, part], reduction="none"
            )
            total = total + (nll * batch.weights_BT[row, part]).sum()
    mean = total / batch.weights_BT.sum()
    mean.backward()
    assert together.mean == pytest.approx(mean.item(), rel=1e-5)
    for name, parameter in run.model.named_parameters():
        torch.testing.assert_close(gradients[name] / together.divisor, parameter.grad, rtol=1e-4, atol=1e-6)


def causal(q, k, v, layer):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

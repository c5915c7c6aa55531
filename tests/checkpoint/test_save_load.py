import json
import re
import subprocess

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from ternlm.checkpoint.checksums import marker_text
from ternlm.checkpoint.errors import CheckpointError
from ternlm.checkpoint.folders import MARKER, checkpoint_folder, complete_steps, find_checkpoint
from ternlm.checkpoint.load import check_same_model, load_everything, load_weights, read_model_config, read_state
from ternlm.checkpoint.save import Saver
from ternlm.checkpoint.tensors import model_tensors, optimizer_tensors
from ternlm.config.model import ModelConfig
from ternlm.config.training import CheckpointConfig, OptimizerConfig
from ternlm.model.decoder import build_model
from ternlm.model.init import init_weights
from ternlm.optim.groups import build_optimizers
from ternlm.parallel.mesh import one_rank
from ternlm.parallel.pieces import make_pieces

ONE = one_rank(torch.device("cpu"))


def pieces(model):
    return make_pieces(model, ONE)


def optimizers_of(model, config):
    return build_optimizers(pieces(model), config, ONE)


def make(seed, kind="adamw", **shape):
    config = ModelConfig(preset="tiny-gqa", attention_bias=True, **shape)
    model = build_model(config)
    init_weights(model, config, seed)
    return config, model, optimizers_of(model, OptimizerConfig(kind=kind))


def train(model, optimizers, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    for optimizer in optimizers:
        optimizer.step()


def save(run, steps, config, model, optimizers, **settings):
    saver = Saver(run, CheckpointConfig(**settings), lambda folder: None, ONE)
    state = {"model": config.model_dump(mode="json"), "tokenizer": {"fingerprint": "f"}}
    for step in steps:
        tensors = {**model_tensors(pieces(model)), **optimizer_tensors(pieces(model), optimizers)}
        saver.save(step, tensors, {**state, "step": step})
    saver.finish()


def seal(folder):
    """Make the marker say that the files are as they should be."""
    (folder / MARKER).write_text(marker_text(folder))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("wait", [True, False])
def test_weights_and_optimizer_go_on_bit_for_bit(tmp_path, kind, tie, wait):
    config, model, optimizers = make(1, kind, tie_word_embeddings=tie)
    train(model, optimizers, 0)
    save(tmp_path, [1], config, model, optimizers, wait=wait)
    _, again, its = make(2, kind, tie_word_embeddings=tie)
    load_everything(pieces(again), its, tmp_path, ONE)
    for seed in (1, 2):
        train(model, optimizers, seed)
        train(again, its, seed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_background_save_writes_the_weights_of_its_moment(tmp_path):
    _, model, optimizers = make(1)
    train(model, optimizers, 0)
    before = [p.detach().clone() for p in model.parameters()]
    saver = Saver(tmp_path, CheckpointConfig(), lambda folder: None, ONE)
    saver.save(1, {**model_tensors(pieces(model)), **optimizer_tensors(pieces(model), optimizers)}, {})
    for seed in range(5):
        train(model, optimizers, seed)
    saver.finish()
    _, again, _ = make(2)
    load_weights(pieces(again), tmp_path, ONE)
    assert all(torch.equal(a, b) for a, b in zip(before, again.parameters(), strict=True))


def test_learning_rate_and_decay_come_from_the_settings_not_the_checkpoint(tmp_path):
    config, model, optimizers = make(1)
    train(model, optimizers, 0)
    save(tmp_path, [1], config, model, optimizers)
    again = make(2)[1]
    its = optimizers_of(again, OptimizerConfig(lr=7e-3, weight_decay=0.5))
    load_everything(pieces(again), its, tmp_path, ONE)
    assert its[0].param_groups[0]["lr"] == 7e-3
    assert its[0].param_groups[0]["weight_decay"] == 0.5


def test_only_the_last_and_every_nth_are_kept(tmp_path):
    save(tmp_path, [2, 4, 6, 8, 10, 11], *make(1), keep_last=2, keep_every_steps=4)
    assert complete_steps(tmp_path) == [4, 8, 10, 11]


def test_a_folder_without_its_marker_is_no_checkpoint_and_is_cleared_away(tmp_path):
    made = make(1)
    save(tmp_path, [1, 2], *made, keep_last=5)
    (checkpoint_folder(tmp_path, 2) / MARKER).unlink()
    assert complete_steps(tmp_path) == [1]
    assert find_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 1)
    with pytest.raises(CheckpointError, match="never completed"):
        find_checkpoint(checkpoint_folder(tmp_path, 2))
    save(tmp_path, [3], *made, keep_last=5)
    assert not checkpoint_folder(tmp_path, 2).exists()


def test_saving_again_over_an_incomplete_folder_works(tmp_path):
    folder = checkpoint_folder(tmp_path, 1)
    folder.mkdir(parents=True)
    (folder / "__0_0.distcp").write_text("half")
    save(tmp_path, [1], *make(1))
    load_weights(pieces(make(2)[1]), folder, ONE)


@pytest.mark.parametrize("wait", [True, False])
def test_a_failed_save_leaves_nothing_and_is_raised_at_the_end(tmp_path, wait):
    def write_files(folder):
        raise OSError("disk full")

    _, model, _ = make(1)
    saver = Saver(tmp_path, CheckpointConfig(wait=wait), write_files, ONE)
    saver.save(1, model_tensors(pieces(model)), {})
    with pytest.raises(CheckpointError, match="disk full"):
        saver.finish()
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_failure_of_dcp_itself_is_caught_too(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise CheckpointException("save", {0: (OSError("no space left"), None)})

    monkeypatch.setattr("torch.distributed.checkpoint.save", fail)
    saver = Saver(tmp_path, CheckpointConfig(), lambda folder: None, ONE)
    saver.save(1, model_tensors(pieces(make(1)[1])), {})
    with pytest.raises(CheckpointError, match="failed: OSError: no space left"):
        saver.finish()
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("state", ["{}", '{"model": {"vocab_size": "x"}}'])
def test_facts_that_describe_no_model_are_a_clear_error(tmp_path, state):
    save(tmp_path, [1], *make(1))
    (checkpoint_folder(tmp_path, 1) / "state.json").write_text(state)
    seal(checkpoint_folder(tmp_path, 1))
    with pytest.raises(CheckpointError, match=r"state\.json doesn't describe a model"):
        read_model_config(tmp_path)


def test_the_save_after_a_failed_one_is_tried_and_counts(tmp_path):
    troubles = iter([OSError("disk full")])

    def write_files(folder):
        for trouble in troubles:
            raise trouble

    _, model, _ = make(1)
    saver = Saver(tmp_path, CheckpointConfig(), write_files, ONE)
    saver.save(1, model_tensors(pieces(model)), {})
    saver.save(2, model_tensors(pieces(model)), {})
    saver.finish()
    assert complete_steps(tmp_path) == [2]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_saving_before_the_first_update_does_not_count_as_one(tmp_path, kind):
    config, model, optimizers = make(1, kind)
    save(tmp_path, [1], config, model, optimizers)
    _, untouched, its = make(1, kind)
    for seed in range(2):
        train(model, optimizers, seed)
        train(untouched, its, seed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), untouched.parameters(), strict=True))


@pytest.mark.parametrize("pattern", ["*.distcp", ".metadata", "state.json"])
@pytest.mark.parametrize("damage", ["bit", "truncated", "gone"])
def test_a_damaged_file_is_refused_by_its_name(tmp_path, pattern, damage):
    save(tmp_path, [1], *make(1))
    path = next(checkpoint_folder(tmp_path, 1).glob(pattern))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data if damage == "bit" else data[:-1])
    with pytest.raises(CheckpointError, match=re.escape(path.name)):
        load_weights(pieces(make(2)[1]), tmp_path, ONE)


def test_damaged_facts_are_refused_when_only_they_are_read(tmp_path):
    save(tmp_path, [1], *make(1))
    path = checkpoint_folder(tmp_path, 1) / "state.json"
    path.write_text(path.read_text().replace("1", "2"))
    with pytest.raises(CheckpointError, match=r"state\.json: damaged since it was written"):
        read_state(tmp_path)


@pytest.mark.parametrize("text", ["", "7\n"])
def test_a_marker_without_checksums_is_refused(tmp_path, text):
    save(tmp_path, [1], *make(1))
    (checkpoint_folder(tmp_path, 1) / MARKER).write_text(text)
    with pytest.raises(CheckpointError, match="COMPLETE: "):
        load_weights(pieces(make(2)[1]), tmp_path, ONE)


def test_sha256sum_understands_the_marker(tmp_path):
    save(tmp_path, [1], *make(1))
    check = ["sha256sum", "--check", "--strict", MARKER]
    said = subprocess.run(check, cwd=checkpoint_folder(tmp_path, 1), capture_output=True, text=True, check=True)
    assert ".metadata: OK" in said.stdout


def test_a_missing_folder_and_an_empty_run_say_so(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        find_checkpoint(tmp_path)


def test_unreadable_facts_are_a_clear_error(tmp_path):
    save(tmp_path, [1], *make(1))
    (checkpoint_folder(tmp_path, 1) / "state.json").write_text('{"model": ')
    seal(checkpoint_folder(tmp_path, 1))
    with pytest.raises(CheckpointError, match=r"state\.json: can't be read"):
        read_state(tmp_path)


def test_another_shape_is_refused_by_the_setting_that_differs(tmp_path):
    config, *made = make(1)
    save(tmp_path, [1], config, *made)
    check_same_model(tmp_path, config, "f")
    other = ModelConfig(preset="tiny-gqa", attention_bias=True, intermediate_size=128)
    with pytest.raises(CheckpointError, match=r"model\.intermediate_size = 256, this run has 128"):
        check_same_model(tmp_path, other, "f")


def test_the_same_shape_spelt_otherwise_is_accepted(tmp_path):
    config, *made = make(1)
    save(tmp_path, [1], config, *made)
    spelt = ModelConfig.model_validate({**config.model_dump(), "preset": None, "head_dim": 16}, strict=False)
    check_same_model(tmp_path, spelt, "f")


def test_another_tokenizer_is_refused(tmp_path):
    config, *made = make(1)
    save(tmp_path, [1], config, *made)
    with pytest.raises(CheckpointError, match="another tokenizer"):
        check_same_model(tmp_path, config, "g")


def test_the_facts_are_readable_json(tmp_path):
    save(tmp_path, [3], *make(1))
    assert json.loads((checkpoint_folder(tmp_path, 3) / "state.json").read_text())["step"] == 3
    assert read_state(tmp_path)["step"] == 3


def test_a_save_of_which_rank_0_does_not_see_a_part_is_no_checkpoint(tmp_path):
    saver = Saver(tmp_path, CheckpointConfig(), lambda folder: None, ONE)
    (tmp_path / "new").mkdir()
    with pytest.raises(CheckpointError, match=r"rank 0 doesn't see __1_0\.distcp, which other ranks have written"):
        saver._finish_folder(tmp_path / "new", {}, {"__1_0.distcp": "0" * 64})
    assert not (tmp_path / "new" / MARKER).exists()

"""Fine-tuning on conversations: the loss is the mean over what is trained, however it is packed, cut up or shared."""

import json
import math
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from ternlm.config import ConfigError, SftConfig, load_sft_config
from ternlm.config.layout import resolve_layout
from ternlm.data.errors import DataError
from ternlm.infer.chat import start_chat
from ternlm.infer.params import SamplingParams
from ternlm.parallel.mesh import make_mesh
from ternlm.post.sft import fine_tune, open_sft
from ternlm.train.loop import train_step
from ternlm.train.models import open_model
from ternlm.train.run import set_up

DORA = pytest.param({"kind": "dora", "rank": 4}, marks=pytest.mark.slow)
EACH = pytest.mark.parametrize("adapter", [None, {"rank": 4}, DORA], ids=["whole", "lora", "dora"])


def one_step(settings: SftConfig, mesh=None):
    """Train on all samples in one step; return loss, trained tokens, gradient norm, and the weights after it."""
    ready = open_sft(settings)
    rows = ready.sources[0].num_sequences
    ranks = mesh.layout.data if mesh else 1
    whole = -(-rows // ranks) * ranks
    assert whole == rows, "the rows must be shared out evenly"
    batch = ready.config.batch.model_copy(update={"global_sequences": rows})
    run = set_up(ready.config.model_copy(update={"batch": batch}), "never", mesh, facts=ready.facts)
    for piece in run.pieces:  # an adapter that begins at nothing has no gradient for A
        if ".lora_B" in piece.name:
            generator = torch.Generator().manual_seed(len(piece.name))
            full = torch.empty(piece.shape).normal_(std=0.1, generator=generator)
            place = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shard().shape, strict=True))
            piece.shard().data.copy_(full[place])
    with run.loader:
        facts = train_step(run, next(run.loader))
    weights = {piece.name: (piece.offset, piece.shard().detach().clone()) for piece in run.pieces}
    return facts.loss.mean, facts.loss.count, facts.norm, weights


def assert_same(found, wanted):
    assert found[1] == wanted[1]
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert found[2] == pytest.approx(wanted[2], rel=1e-5)
    for name, (offset, part) in found[3].items():
        whole = wanted[3][name][1]
        place = tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))
        torch.testing.assert_close(part, whole[place], rtol=0, atol=1e-5 * float(whole.abs().max()))


@EACH
def test_packed_is_padded_is_accumulated(make_settings, adapter):
    given = {} if adapter is None else {"adapter": adapter}
    padded = one_step(make_settings("padded", data={"packing": "pad"}, **given))
    packed = one_step(make_settings("packed", **given))
    assert padded[1] > 100
    assert_same(packed, padded)
    rows = open_sft(make_settings("packed")).sources[0].num_sequences
    assert 1 < rows < 12
    together = make_settings("together", batch={"microbatch_sequences": rows, "global_sequences": rows}, **given)
    assert_same(one_step(together), padded)


def rank_step(settings: SftConfig):
    layout = resolve_layout(_config(settings), torch.distributed.get_world_size())
    mesh = make_mesh(layout, torch.distributed.get_rank(), torch.device("cpu"))
    return one_step(settings, mesh)


def _config(settings):
    return open_sft(settings).config


@EACH
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_train_as_one_does(make_settings, adapter, world):
    given = {} if adapter is None else {"adapter": adapter}
    alone = one_step(make_settings("alone", **given))
    sharding = {"params": 2, "grads": 2, "optimizer": -1}
    settings = make_settings("alone", data={"packing": "pad"}, sharding=sharding, **given)  # 12 rows, not 3
    for found in run_ranks(world, rank_step, settings):
        assert_same(found, alone)


def test_only_answers_are_trained_and_their_end(make_settings):
    ready = open_sft(make_settings())
    store = ready.sources[0].store
    ids, trained = store.document(0)
    said = ready.tokenizer.decode(ids[trained].tolist(), skip_special=False)
    assert said == "Paris.<|im_end|>"
    asked = ready.tokenizer.decode(ids[~trained].tolist(), skip_special=False)
    assert asked.endswith("What is the capital of France?<|im_end|>\n<|im_start|>assistant\n\n")


def test_steps_follow_from_epochs(make_settings):
    rows = open_sft(make_settings()).sources[0].num_sequences
    settings = make_settings(train={"steps": None, "epochs": 2.5}, batch={"global_sequences": 2})
    assert open_sft(settings).config.train.steps == math.ceil(2.5 * rows / 2)


@pytest.mark.parametrize(("adapter", "lr"), [(None, 1e-5), ({}, 2e-4)])
def test_defaults_are_those_of_what_is_trained(base, make_settings, adapter, lr):
    data = {"path": make_settings().data.path, "seq_len": 128}
    given = {"load": {"from": str(base)}, "data": data, "out": make_settings().out}
    config = open_sft(SftConfig.model_validate(given | ({"adapter": adapter} if adapter is not None else {}))).config
    assert config.optimizer.lr == lr
    assert config.optimizer.weight_decay == 0
    assert config.schedule.warmup_fraction == 0.03
    assert config.data.packing == "best_fit"
    assert (config.adapter is None) == (adapter is None)


def test_a_run_is_resumed_with_its_data_as_they_are(make_settings, caplog):
    first = fine_tune(make_settings("straight"))
    caplog.clear()
    stopped = make_settings("stopped", train={"steps": 4, "stop_file": None, "max_minutes": 1e-9})
    assert fine_tune(stopped).progress.step < 4
    resumed = fine_tune(make_settings("stopped"))
    assert resumed.progress.step == 4
    for ours, theirs in zip(resumed.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_a_run_was_told_lies_in_its_folder_and_changes_are_named(make_settings, caplog):
    settings = make_settings("told", train={"steps": 1})
    fine_tune(settings)
    assert load_sft_config(Path(settings.out) / "sft.toml") == settings
    caplog.clear()
    fine_tune(make_settings("told", train={"steps": 1}))
    assert "changed since this run began" not in caplog.text
    data = {**settings.data.model_dump(exclude_none=True, exclude_defaults=True), "system": "be kind"}
    fine_tune(make_settings("told", train={"steps": 2}, data=data))
    assert 'changed since this run began or went on: data.system: not set -> "be kind"' in caplog.text
    assert "has changed since the checkpoint: from here it's other samples" in caplog.text


def test_the_trained_model_chats_by_the_template_that_it_learnt(make_settings):
    settings = make_settings(
        train={"steps": 80}, data={"chat": "chatml"}, adapter={"rank": 32}, optimizer={"lr": 1e-2},
        sample={"every_steps": 80, "prompts": ["Hi"], "temperature": 0.0},
    )  # fmt: skip
    run = fine_tune(settings)
    opened = open_model(run.folder)
    from ternlm.data.protocols import CHATML

    assert opened.facts["chat_template"] == CHATML.template
    assert opened.facts["generation"]["eos_token_id"] == [opened.tokenizer.id_of("<|im_end|>")]
    chat = start_chat(opened, run.model, SamplingParams(max_new_tokens=30, temperature=0.0))
    assert "".join(chat.answer([{"role": "user", "content": "Hi"}])) == "Hello! How can I help you today?"
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [line["text"] for line in lines if "text" in line] == ["Hello! How can I help you today?"]


def test_training_ends_when_the_held_out_loss_no_longer_falls(make_settings):
    questions = make_settings().data.path
    settings = make_settings(
        train={"steps": 200},
        data={"validation": ({"name": "same", "path": questions},)},
        validation={"every_steps": 2, "patience": 2},
        optimizer={"lr": 0.5},
        checkpoint={"every_steps": 0, "keep_last": 1},
    )
    run = fine_tune(settings)
    assert run.progress.step < 200
    assert "has not fallen for 2 validations" in run.stopped
    kept = sorted(folder.name for folder in (run.folder / "checkpoints").iterdir())
    assert kept == [f"step-{step:08d}" for step in (run.progress.best_step, run.progress.step)]
    again = fine_tune(settings)
    assert again.progress.step == run.progress.step
    assert again.stopped == run.stopped
    assert str(run.folder / "checkpoints" / kept[0]) in run.stopped


def test_texts_are_trained_without_a_chat_protocol(make_settings, tmp_path):
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "Once upon a time."}) + "\n")
    ready = open_sft(make_settings(data={"path": str(tmp_path / "texts.jsonl"), "format": "text"}))
    ids, trained = ready.sources[0].store.document(0)
    assert trained is None or trained.all()
    assert ready.tokenizer.decode(ids.tolist()) == "Once upon a time."
    assert "SmolLM" in ready.facts["chat_template"]  # as the model had it


def test_what_cant_be_trained_is_refused_before_the_data_are_prepared(make_settings, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.seq_len = 4096 must be at most 512, the length that"):
        open_sft(make_settings(data={"seq_len": 4096}))
    with pytest.raises(ConfigError, match="must divide the number of ranks"):
        open_sft(make_settings(parallel={"tensor": 2}))
    assert not (tmp_path / "run").exists()


def test_bad_data_says_where_and_why(make_settings, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "a", "answer": "b"}\n{"question": "a"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2"):
        open_sft(make_settings(data={"path": str(bad)}))
    left = open_sft(make_settings(data={"path": str(bad), "on_error": "skip", "packing": "pad"}))
    assert left.sources[0].num_documents == 1
    with pytest.raises(ConfigError, match="no file or folder"):
        open_sft(make_settings(data={"path": str(tmp_path / "gone.jsonl")}))


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="one of path and sources"):
        SftConfig.model_validate({"load": {"from": "x"}, "data": {}})
    with pytest.raises(ValueError, match=r"load\.from must name"):
        SftConfig.model_validate({"load": {}, "data": {"path": "x"}})

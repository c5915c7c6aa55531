import gc
import itertools
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ternlm.config.data import BatchConfig, DataConfig, RampupConfig, SourceConfig
from ternlm.config.section import ConfigError
from ternlm.data.batch import Batch
from ternlm.data.errors import DataError
from ternlm.data.loader import Loader, SequenceReader, validation_batches
from ternlm.data.shards import ShardWriter, write_manifest

SEQ_LEN = 16
VOCAB = 1000


def prepare(folder: Path, count: int, seed: int, fingerprint="f") -> Path:
    """Write `count` documents of random ids over two shards."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    infos = []
    for index in range(2):
        with ShardWriter(folder, f"shard-{index:05}", VOCAB) as writer:
            for _ in range(count // 2):
                writer.add(rng.integers(1, VOCAB, rng.integers(1, 40)))
        infos.append(writer.close())
    tokenizer = {"fingerprint": fingerprint, "vocab_size": VOCAB}
    write_manifest(folder, infos, tokenizer=tokenizer, num_bytes=0, options={})
    return folder


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("corpora")
    prepare(folder / "en", 60, 1)
    prepare(folder / "cn", 24, 2)
    return folder


def settings(corpora: Path, **changes) -> DataConfig:
    sources = (
        SourceConfig(name="en", path=str(corpora / "en"), weight=3.0),
        SourceConfig(name="cn", path=str(corpora / "cn"), weight=1.0),
    )
    return DataConfig(**({"sources": sources, "seq_len": SEQ_LEN} | changes))


BATCH = BatchConfig(global_sequences=8, microbatch_sequences=2)
RAMPING = BatchConfig(
    global_sequences=16,
    microbatch_sequences=2,
    rampup=RampupConfig(start=8, increment=8, every=3),
)


def steps(loader: Loader, count: int) -> list[list[Batch]]:
    with loader:
        return list(itertools.islice(loader, count))


def joined(microbatches: list[Batch]) -> list[object]:
    """All that the microbatches hold, as plain lists, row after row."""
    tensors = ("tokens_BT", "targets_BT", "weights_BT", "positions_BT", "types_B")
    rows = [torch.cat([getattr(batch, name) for batch in microbatches]).tolist() for name in tensors]
    return [*rows, [lengths for batch in microbatches for lengths in batch.lengths]]


def same(left: list[list[Batch]], right: list[list[Batch]]) -> bool:
    return [joined(step) if step else [] for step in left] == [joined(step) if step else [] for step in right]


def before_each_read(monkeypatch, act: Callable[[int], None]) -> None:
    """Let the threads call `act(first sequence)` before they read a microbatch."""
    read = SequenceReader.read

    def act_and_read(self, first, count):
        act(first)
        return read(self, first, count)

    monkeypatch.setattr(SequenceReader, "read", act_and_read)


def data_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("ternlm-data")]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("packing", ["documents", "across", "pad"])
def test_the_ranks_batches_in_a_row_are_the_one_global_batch_of_any_world_size(corpora, world, packing):
    data = settings(corpora, packing=packing, skip_steps="3,5-6")
    whole = steps(Loader(data, RAMPING, 7, VOCAB), 8)
    ranks = [steps(Loader(data, RAMPING, 7, VOCAB, rank=rank, world=world), 8) for rank in range(world)]
    parts = [[batch for rank in ranks for batch in rank[step]] for step in range(8)]
    assert same(whole, parts)
    assert [len(step) for step in whole] == [4, 4, 0, 8, 0, 0, 8, 8]
    assert [len(step) for step in ranks[0]] == [n // world for n in (4, 4, 0, 8, 0, 0, 8, 8)]


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (1, 9), (3, 2), (4, 16)])
def test_batches_do_not_depend_on_workers_or_prefetch(corpora, workers, prefetch):
    expected = steps(Loader(settings(corpora), BATCH, 7, VOCAB), 10)
    data = settings(corpora, workers=workers, prefetch=prefetch)
    assert same(steps(Loader(data, BATCH, 7, VOCAB), 10), expected)


def test_a_slow_thread_does_not_change_the_order(corpora, monkeypatch):
    expected = steps(Loader(settings(corpora), BATCH, 7, VOCAB), 4)
    before_each_read(monkeypatch, lambda first: time.sleep(0.02 if first % 4 == 0 else 0))
    data = settings(corpora, workers=4, prefetch=8)
    assert same(steps(Loader(data, BATCH, 7, VOCAB), 4), expected)


@pytest.mark.parametrize("stop", [0, 1, 5, 23])
def test_a_resumed_loader_goes_on_with_the_same_batches(corpora, stop):
    data = settings(corpora, skip_steps="3", validation_fraction=0.1)
    expected = steps(Loader(data, RAMPING, 7, VOCAB), 26)[stop:]
    with Loader(data, RAMPING, 7, VOCAB) as first:
        for _ in range(stop):
            next(first)
        state = first.state_dict()
    second = Loader(data, RAMPING, 7, VOCAB)
    second.load_state_dict(state)
    assert same(steps(second, 26 - stop), expected)


def test_the_state_is_two_integers_of_what_was_handed_out_whatever_the_rank(corpora):
    loaders = [Loader(settings(corpora, prefetch=20), RAMPING, 7, VOCAB, rank=r, world=2) for r in range(2)]
    for loader in loaders:
        steps(loader, 5)
        assert loader.state_dict() == {"step": 5, "sequence": 3 * 8 + 2 * 16}


def test_a_run_resumed_on_another_world_size_has_the_same_batches(corpora):
    data = settings(corpora)
    expected = steps(Loader(data, BATCH, 7, VOCAB), 6)[3:]
    one = Loader(data, BATCH, 7, VOCAB)
    steps(one, 3)
    ranks = [Loader(data, BATCH, 7, VOCAB, rank=rank, world=2) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(one.state_dict())
    parts = [steps(rank, 3) for rank in ranks]
    assert same(expected, [parts[0][step] + parts[1][step] for step in range(3)])


def test_going_back_to_an_earlier_state_drops_what_was_read_ahead(corpora):
    with Loader(settings(corpora, prefetch=8), BATCH, 7, VOCAB) as loader:
        expected = [next(loader) for _ in range(4)]
        loader.load_state_dict({"step": 0, "sequence": 0})
        assert same([next(loader) for _ in range(4)], expected)


def test_other_batch_sizes_after_a_resume_go_on_at_the_same_sequence_with_a_warning(corpora, caplog):
    loader = Loader(settings(corpora), BatchConfig(global_sequences=4), 7, VOCAB)
    loader.load_state_dict({"step": 3, "sequence": 24})
    assert "goes on at sequence 24, where these settings would have reached 12" in caplog.text
    reader = SequenceReader(settings(corpora), seed=7, vocab_size=VOCAB)
    assert same(steps(loader, 1), [[reader.read(24, 4)]])


def test_an_epoch_draws_every_sequence_of_a_source_once_and_the_next_in_another_order(corpora):
    reader = SequenceReader(settings(corpora), seed=7, vocab_size=VOCAB)
    drawn = [reader.locate(i) for i in range(600)]
    for index, source in enumerate(reader.sources):
        count = source.num_sequences
        own = [(epoch, position) for which, epoch, position in drawn if which == index]
        assert len(own) > 2 * count
        epochs = [own[:count], own[count : 2 * count]]
        for number, epoch in enumerate(epochs):
            assert sorted(epoch) == [(number, position) for position in range(count)]
        assert [p for _, p in epochs[0]] != [p for _, p in epochs[1]]


def test_types_name_the_source_and_follow_the_weights(corpora):
    batches = [batch for step in steps(Loader(settings(corpora), BATCH, 7, VOCAB), 20) for batch in step]
    types = torch.cat([batch.types_B for batch in batches])
    assert {batch.names for batch in batches} == {("en", "cn")}
    assert types.bincount().tolist() == [120, 40]
    reader = SequenceReader(settings(corpora), seed=7, vocab_size=VOCAB)
    for sequence, row in enumerate(torch.cat([batch.tokens_BT for batch in batches])):
        which, _, position = reader.locate(sequence)
        assert types[sequence] == which
        assert row.tolist() == reader.sources[which].window(position).ids[:SEQ_LEN].tolist()


def test_without_weights_all_sources_finish_an_epoch_together(corpora):
    sources = tuple(SourceConfig(name=name, path=str(corpora / name)) for name in ("en", "cn"))
    reader = SequenceReader(settings(corpora, sources=sources), seed=7, vocab_size=VOCAB)
    total = sum(source.num_sequences for source in reader.sources)
    epochs = [reader.locate(sequence)[1] for sequence in range(total)]
    assert epochs.count(0) >= total - 2


def test_seeds_give_other_batches(corpora):
    first, second = (steps(Loader(settings(corpora), BATCH, seed, VOCAB), 1) for seed in (1, 2))
    assert not same(first, second)


def test_an_error_in_a_thread_reaches_the_step_with_its_traceback_and_can_be_retried(corpora, monkeypatch):
    def fail(first):
        if first == 10:
            raise OSError("the disk is gone")

    expected = steps(Loader(settings(corpora), BATCH, 7, VOCAB), 2)
    with monkeypatch.context() as patch:
        before_each_read(patch, fail)
        loader = Loader(settings(corpora, workers=2), BATCH, 7, VOCAB)
        got = [next(loader)]
        with pytest.raises(OSError, match="the disk is gone") as caught:
            next(loader)
    assert "in fail" in "".join(traceback.format_tb(caught.value.__traceback__))
    assert loader.state_dict() == {"step": 1, "sequence": 8}
    assert not data_threads()
    assert same([*got, *steps(loader, 1)], expected)


def test_no_thread_runs_before_the_first_step_or_after_the_end_of_a_with_block(corpora):
    with Loader(settings(corpora, workers=3), BATCH, 7, VOCAB) as loader:
        assert not data_threads()
        next(loader)
        assert data_threads()
    assert not data_threads()


def test_no_thread_outlives_a_loader_that_is_garbage_collected(corpora):
    loader = Loader(settings(corpora, workers=3), BATCH, 7, VOCAB)
    next(loader)
    threads = data_threads()
    assert threads
    del loader
    gc.collect()
    for thread in threads:
        thread.join(timeout=10)
    assert not data_threads()


def test_the_wait_is_the_time_a_step_spent_without_its_data(corpora, monkeypatch):
    slept: list[int] = []
    before_each_read(monkeypatch, lambda first: (time.sleep(0.1), slept.append(first)))
    with Loader(settings(corpora), BATCH, 7, VOCAB) as loader:
        next(loader)
        waited = loader.wait_seconds
        assert waited > 0.3  # 4 microbatches, one after the other
        wait_until(lambda: len(slept) == 8)
        next(loader)
        assert loader.wait_seconds < waited / 2


def test_while_a_step_trains_the_whole_next_one_is_read(corpora, monkeypatch):
    read_firsts: list[int] = []
    before_each_read(monkeypatch, read_firsts.append)
    with Loader(settings(corpora, prefetch=1), BATCH, 7, VOCAB) as loader:
        next(loader)
        wait_until(lambda: len(read_firsts) >= 8)
    assert read_firsts == list(range(0, 16, 2))


def test_skipped_steps_are_not_read(corpora, monkeypatch):
    read_firsts: list[int] = []
    before_each_read(monkeypatch, read_firsts.append)
    with Loader(settings(corpora, skip_steps="2-901"), BATCH, 7, VOCAB) as loader:
        assert [len(next(loader)) for _ in range(900)] == [4] + [0] * 899
    assert max(read_firsts) < 8


@pytest.mark.parametrize(
    ("batch", "name", "value"),
    [
        (BatchConfig(global_sequences=12, microbatch_sequences=2), "batch.global_sequences", 12),
        (
            BatchConfig(
                global_sequences=16,
                microbatch_sequences=2,
                rampup=RampupConfig(start=8, increment=4, every=1),
            ),
            "batch.rampup.increment",
            4,
        ),
    ],
)
def test_a_batch_that_the_ranks_cannot_share_evenly_is_refused(corpora, batch, name, value):
    with pytest.raises(ConfigError, match=rf"{name} = {value} must be a multiple of .* 2 x 4 = 8"):
        Loader(settings(corpora), batch, 7, VOCAB, world=4)


def test_a_model_with_a_smaller_vocabulary_is_refused_before_the_first_step(corpora):
    with pytest.raises(DataError, match=r"'en'.*1000 ids, but the model's vocab_size = 999"):
        Loader(settings(corpora), BATCH, 7, VOCAB - 1)


def test_another_tokenizer_than_the_runs_is_refused_before_the_first_step(corpora):
    with pytest.raises(DataError, match="tokenizer f, but this run's is other"):
        Loader(settings(corpora), BATCH, 7, VOCAB, fingerprint="other")


def test_sources_of_different_tokenizers_are_refused_before_the_first_step(corpora, tmp_path):
    path = prepare(tmp_path / "code", 20, 3, fingerprint="g")
    sources = (*settings(corpora).sources, SourceConfig(name="code", path=str(path), weight=1.0))
    with pytest.raises(DataError, match=r"'en'.*'code'.*different tokenizers, f and g"):
        Loader(settings(corpora, sources=sources), BATCH, 7, VOCAB)


def test_an_id_outside_the_vocabulary_is_refused_with_its_source_and_document(tmp_path):
    documents = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 500, 10], [11, 12]]
    (tmp_path / "en").mkdir()
    with ShardWriter(tmp_path / "en", "shard-00000", VOCAB) as writer:
        for ids in documents:
            writer.add(ids)
    # The manifest claims a smaller vocabulary than the ids have: the data is damaged.
    tokenizer = {"fingerprint": "f", "vocab_size": 100}
    write_manifest(tmp_path / "en", [writer.close()], tokenizer=tokenizer, num_bytes=0, options={})
    data = DataConfig(sources=(SourceConfig(name="en", path=str(tmp_path / "en")),), seq_len=4)
    message = r"'en', .*shard-00000\.tokens, document 2: token id 500 is not below .*vocab_size = 100"
    with Loader(data, BatchConfig(global_sequences=3), 7, 100) as loader, pytest.raises(DataError, match=message):
        next(loader)


def test_validation_holds_every_held_out_token_once_in_a_fixed_order(corpora):
    data = settings(corpora, validation_fraction=0.3)
    sets = validation_batches(data, BATCH, VOCAB)
    assert list(sets) == ["en", "cn"]
    for held_out in sets.values():
        batches = list(held_out)
        assert len(batches) == len(held_out)
        source = held_out.source
        kept = sum(sum(window.lengths) for window in map(source.window, range(source.num_sequences)))
        tokens = torch.cat([batch.tokens_BT for batch in batches]).flatten()
        assert kept == source.num_tokens == int((tokens > 0).sum())
        assert tokens[: source.num_tokens].tolist() == [
            id for position in range(source.num_sequences) for id in source.window(position).ids[:SEQ_LEN].tolist()
        ]
        weights = sum(float(batch.weights_BT.sum()) for batch in batches)
        assert weights == source.num_tokens - source.num_documents
        assert same([list(held_out)], [batches])


def test_training_and_validation_share_no_document(corpora):
    data = settings(corpora, validation_fraction=0.3)
    held_out = validation_batches(data, BATCH, VOCAB)
    for source in SequenceReader(data, seed=7, vocab_size=VOCAB).sources:
        parts = [
            {int(d) for p in range(part.num_sequences) for d in part.window(p).documents}
            for part in (source, held_out[source.name].source)
        ]
        assert all(parts)
        assert not parts[0] & parts[1]


@pytest.mark.parametrize("world", [2, 3])
def test_validation_on_many_ranks_is_that_of_one_with_equal_numbers_of_batches(corpora, world):
    data = settings(corpora, validation_fraction=0.3)
    (whole,) = [s for name, s in validation_batches(data, BATCH, VOCAB).items() if name == "en"]
    ranks = [validation_batches(data, BATCH, VOCAB, rank=r, world=world)["en"] for r in range(world)]
    interleaved = [batch for together in zip(*ranks, strict=True) for batch in together]
    assert len({len(rank) for rank in ranks}) == 1
    rows = torch.cat([batch.tokens_BT for batch in interleaved])
    expected = torch.cat([batch.tokens_BT for batch in whole])
    assert torch.equal(rows[: len(expected)], expected)
    assert not torch.cat([batch.weights_BT for batch in interleaved])[len(expected) :].any()


def test_max_sequences_are_spread_over_the_validation_source(corpora):
    sources = (SourceConfig(name="held", path=str(corpora / "en")),)
    data = settings(corpora, validation=sources)
    whole = validation_batches(data, BATCH, VOCAB)["held"]
    some = validation_batches(data, BATCH, VOCAB, max_sequences=6)["held"]
    rows = torch.cat([batch.tokens_BT for batch in whole])
    picked = [index * whole.num_sequences // 6 for index in range(6)]
    assert picked[-1] > whole.num_sequences // 2
    assert torch.equal(torch.cat([batch.tokens_BT for batch in some]), rows[picked])
    assert len(validation_batches(data, BATCH, VOCAB, max_sequences=10**9)["held"]) == len(whole)


def test_a_validation_source_named_like_one_that_holds_out_documents_is_refused(corpora):
    sources = (SourceConfig(name="en", path=str(corpora / "en")),)
    with pytest.raises(ConfigError, match="'en' is also that of a source"):
        validation_batches(settings(corpora, validation=sources, validation_fraction=0.3), BATCH, VOCAB)
    assert list(validation_batches(settings(corpora, validation=sources), BATCH, VOCAB)) == ["en"]


@pytest.mark.gpu
def test_pinned_batches_lie_in_page_locked_memory(corpora):
    with Loader(settings(corpora), BATCH, 7, VOCAB, pin=True) as loader:
        batch = next(loader)[0]
    assert batch.tokens_BT.is_pinned()
    assert torch.equal(batch.to("cuda", non_blocking=True).tokens_BT.cpu(), batch.tokens_BT)

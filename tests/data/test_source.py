import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ternlm.config.data import DataConfig, SourceConfig
from ternlm.data import source as source_module
from ternlm.data.errors import DataError
from ternlm.data.internlm import InternLMFiles
from ternlm.data.shards import ShardSet, ShardWriter, write_manifest
from ternlm.data.source import Source, check_tokenizers, open_source, open_store


class Listed:
    """A token store in memory; every id of document d at place i is 1000 d + i."""

    path = Path("listed")

    def __init__(self, lengths, vocab_size=None, fingerprint=None):
        self.vocab_size, self.fingerprint = vocab_size, fingerprint
        self.ids = np.array([1000 * d + i for d, n in enumerate(lengths) for i in range(n)], np.int64)
        self._ends = np.cumsum(lengths, dtype=np.int64)
        self.num_tokens, self.num_documents = len(self.ids), len(lengths)

    def read(self, start, stop):
        assert 0 <= start < stop <= self.num_tokens
        return self.ids[start:stop], None

    def ends(self, first, last):
        return self._ends[first:last]

    def leaders(self, first, last):
        return np.arange(first, last)

    def place(self, index):
        return f"listed, document {index}"


def prepare(folder: Path, documents, fingerprint="f", vocab_size=100) -> Path:
    folder.mkdir(parents=True)
    with ShardWriter(folder, "shard-00000", vocab_size) as writer:
        for ids in documents:
            writer.add(ids)
    tokenizer = {"fingerprint": fingerprint, "vocab_size": vocab_size}
    write_manifest(folder, [writer.close()], tokenizer=tokenizer, num_bytes=0, options={})
    return folder


def kept_documents(name: str, count: int, fraction: float, validation: bool) -> list[int]:
    source = Source(
        name,
        Listed([2] * count),
        seq_len=2,
        whole_documents="pad",
        validation_fraction=fraction,
        validation=validation,
    )
    return [int(source.window(p).documents[0]) for p in range(source.num_sequences)]


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), max_size=40),
    seq_len=st.integers(1, 9),
    min_length=st.integers(0, 6),
    validation=st.booleans(),
    fraction=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_windows_are_cuts_of_the_kept_documents_in_a_row(lengths, seq_len, min_length, validation, fraction):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source_module, "_BLOCK", 4)
        patch.setattr(source_module, "_SCAN", 8)
        source = Source(
            "en",
            Listed(lengths),
            seq_len=seq_len,
            min_length=min_length,
            validation_fraction=fraction,
            validation=validation,
        )
        part = kept_documents("en", len(lengths), fraction, validation)
        windows = [source.window(position) for position in range(source.num_sequences)]
    kept = [d for d in part if lengths[d] >= min_length]
    flat = [(d, i) for d in kept for i in range(lengths[d])]
    cuts = [flat[at : at + seq_len] for at in range(0, len(flat), seq_len)]
    if not validation:
        cuts = [cut for cut in cuts if len(cut) == seq_len]
    assert (source.num_documents, source.num_tokens) == (len([d for d in kept if lengths[d]]), len(flat))
    assert len(windows) == len(cuts)
    for window, cut in zip(windows, cuts, strict=True):
        documents = list(dict.fromkeys(d for d, _ in cut))
        last, place = cut[-1]
        more = [(last, place + 1)] if place + 1 < lengths[last] else []
        assert window.ids.tolist() == [1000 * d + i for d, i in cut + more]
        assert window.documents.tolist() == documents
        assert window.lengths.tolist() == [sum(d == document for d, _ in cut) for document in documents]


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 12), max_size=20), seq_len=st.integers(1, 9))
def test_one_document_a_window_cuts_long_ones_and_leaves_out_those_without_a_target(lengths, seq_len):
    source = Source("en", Listed(lengths), seq_len=seq_len, whole_documents="pad")
    windows = [source.window(position) for position in range(source.num_sequences)]
    assert [int(w.documents[0]) for w in windows] == [d for d, n in enumerate(lengths) if n >= 2]
    for window in windows:
        (document,), (length,) = window.documents.tolist(), window.lengths.tolist()
        assert length == min(lengths[document], seq_len)
        assert window.ids.tolist() == [1000 * document + i for i in range(min(lengths[document], seq_len + 1))]


def test_every_document_is_either_trained_on_or_held_out():
    train = kept_documents("en", 5000, 0.1, False)
    held_out = kept_documents("en", 5000, 0.1, True)
    assert sorted(train + held_out) == list(range(5000))
    assert abs(len(held_out) - 500) < 5 * (5000 * 0.1 * 0.9) ** 0.5
    assert train == sorted(train)


def test_documents_held_out_at_a_fraction_stay_so_at_a_larger_one():
    assert set(kept_documents("en", 2000, 0.02, True)) < set(kept_documents("en", 2000, 0.05, True))


def test_sources_hold_out_different_documents():
    assert kept_documents("en", 2000, 0.1, True) != kept_documents("cn", 2000, 0.1, True)


def test_the_held_out_documents_are_these_on_any_machine_and_version():
    # A change here would train on what earlier runs validated on.
    assert kept_documents("en", 200, 0.03, True) == [0, 6, 9, 41, 67, 81, 123, 175]


def test_windows_over_many_blocks_of_documents_are_found():
    lengths = np.random.default_rng(0).integers(0, 7, 5000).tolist()
    store = Listed(lengths)
    source = Source("en", store, seq_len=11)
    for position in [0, 1, 700, source.num_sequences - 1]:
        window = source.window(position)
        assert np.array_equal(window.ids[:11], store.ids[position * 11 : position * 11 + 11])


def test_a_position_outside_the_source_is_refused():
    source = Source("en", Listed([10]), seq_len=4)
    with pytest.raises(IndexError, match="has 2 sequences, not number 2"):
        source.window(2)


def test_document_ends_out_of_order_are_refused():
    store = Listed([3, 3, 3])
    store._ends = np.array([3, 9, 6])
    with pytest.raises(DataError, match="document 2: ends before it begins"):
        Source("en", store, seq_len=2)


def test_the_kind_of_a_store_is_seen_from_its_files(tmp_path):
    (tmp_path / "bins").mkdir()
    (tmp_path / "bins/a.bin").write_text(json.dumps({"tokens": [1, 2]}) + "\n")
    with (tmp_path / "bins/a.bin.meta").open("wb") as file:
        np.save(file, np.array([[0, 2]]))
    assert isinstance(open_store(tmp_path / "bins"), InternLMFiles)
    assert isinstance(open_store(tmp_path / "bins/a.bin"), InternLMFiles)
    assert isinstance(open_store(prepare(tmp_path / "shards", [[1, 2]])), ShardSet)


def test_a_path_without_tokens_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        open_store(tmp_path / "nowhere")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match="turn text into tokens with `tern data prepare`"):
        open_store(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"has no manifest\.json"):
        open_store(tmp_path)


def test_a_source_too_small_for_one_sequence_is_refused_with_its_numbers(tmp_path):
    path = prepare(tmp_path / "en", [[1, 2, 3], [4], [5, 6]])
    config = SourceConfig(name="en", path=str(path), min_length=2)
    data = DataConfig(sources=(config,), seq_len=8)
    with pytest.raises(DataError, match=r"'en'.*seq_len = 8.* 3 documents, 6 tokens; 2 documents, 5 tokens are left"):
        open_source(config, data, validation=False, fraction=0.0)


def test_a_held_out_part_without_documents_is_refused(tmp_path):
    path = prepare(tmp_path / "en", [[1, 2, 3]])
    config = SourceConfig(name="en", path=str(path))
    data = DataConfig(sources=(config,), seq_len=2, validation_fraction=1e-6)
    with pytest.raises(DataError, match=r"held-out part at data.validation_fraction = 1e-06"):
        open_source(config, data, validation=True, fraction=1e-6)


def make_source(name: str, **tokenizer) -> Source:
    return Source(name, Listed([5], **tokenizer), seq_len=2)


def test_sources_of_different_tokenizers_are_refused_by_name():
    sources = [make_source("en", fingerprint="aa"), make_source("bin"), make_source("cn", fingerprint="bb")]
    check_tokenizers(sources[:2], 100)
    with pytest.raises(DataError, match=r"'en'.*'cn'.*different tokenizers, aa and bb"):
        check_tokenizers(sources, 100)


def test_a_source_of_another_tokenizer_than_the_runs_is_refused():
    check_tokenizers([make_source("en", fingerprint="aa")], 100, "aa")
    with pytest.raises(DataError, match=r"'en'.*tokenizer aa, but this run's is cc"):
        check_tokenizers([make_source("en", fingerprint="aa")], 100, "cc")


def test_a_tokenizer_larger_than_the_models_vocabulary_is_refused():
    source = make_source("en", fingerprint="aa", vocab_size=101)
    check_tokenizers([source], 101)
    with pytest.raises(DataError, match=r"'en'.*101 ids.*vocab_size = 100; set model.vocab_size to at least"):
        check_tokenizers([source], 100)

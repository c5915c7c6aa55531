"""`prepare`: the same bytes by any number of workers, in any parts, killed at any time; and its errors."""

import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from ternlm.data.errors import DataError
from ternlm.data.prepare import prepare
from ternlm.data.shards import ShardSet, ShardWriter
from ternlm.data.tokenizer import load_tokenizer, train_bpe
from ternlm.data.train_tokenizer import train_tokenizer

SOME_TEXT = "the tern flies far and def return self 细胞理论 über 12 345 ( ) : = \n \n\n"
WORDS = SOME_TEXT.split(" ")
UNIT_BYTES = 2_000


def sentences(count, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(5, 60))) + "." for _ in range(count)]


def write_bin(path, documents):
    """Write InternLM's two files."""
    offset, rows = 0, []
    with path.open("wb") as file:
        for ids in documents:
            line = json.dumps({"tokens": ids}).encode() + b"\n"
            rows.append((offset, len(ids)))
            offset += file.write(line)
    with path.with_name(path.name + ".meta").open("wb") as file:
        np.save(file, np.array(rows, dtype=np.int64).reshape(-1, 2))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(iter(sentences(400)), 320).save(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Text in every format, some of it cut into units, some sharing one: 1,435 documents."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = sentences(1400, seed=1)
    for number, text in enumerate(texts[:100]):
        (folder / f"{number:03}.txt").write_text(text, "utf-8")
    records = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts[100:900])
    (folder / "many.jsonl").write_text(records)
    (folder / "list.json").write_text(json.dumps([{"text": text} for text in texts[900:1000]]))
    pq.write_table(pa.table({"text": texts[1000:]}), folder / "rows.parquet", row_group_size=50)
    write_bin(folder / "sft.bin", [[1, -7, -8, 9, 2], *([[1, *range(3, 250), 2]] * 34)])
    return folder


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).iterdir())}


@pytest.fixture(scope="module")
def undisturbed(corpus, tokenizer, tmp_path_factory):
    """The files of one worker that nothing disturbed."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert prepare([corpus], tokenizer, out, workers=1, unit_bytes=UNIT_BYTES).complete
    return out


def test_every_document_is_there_with_bos_and_eos(corpus, tokenizer, undisturbed):
    data, its = ShardSet.open(undisturbed), load_tokenizer(tokenizer)
    data.verify()
    decoded = [its.decode(data.document(index)[0]) for index in range(data.num_documents)]
    bins = [its.decode([1, 7, 8, 9, 2]), *([its.decode([1, *range(3, 250), 2])] * 34)]
    texts = sentences(1400, seed=1)
    order = [*texts[:100], *texts[900:1000], *texts[100:900], *texts[1000:], *bins]  # by file name
    assert decoded == order
    first, trained = data.document(0)
    assert trained is None
    assert first.tolist() == its.encode_document(texts[0])
    assert data.manifest["num_bytes"] == sum(len(text.encode()) for text in order[:1400]) + int(
        its.token_bytes()[[1, 7, 8, 9, 2]].sum() + 34 * its.token_bytes()[[1, *range(3, 250), 2]].sum()
    )
    assert data.manifest["tokenizer"] == {
        "fingerprint": its.fingerprint,
        "vocab_size": 320,
        "kind": "tokenizers",
        "bos_id": 0,
        "eos_id": 1,
    }


def test_internlm_files_keep_their_ids_and_their_mask(undisturbed):
    data = ShardSet.open(undisturbed)
    ids, trained = data.document(1400)
    assert ids.tolist() == [1, 7, 8, 9, 2]
    assert trained is not None
    assert trained.tolist() == [True, False, False, True, True]


def test_three_workers_write_the_same_bytes_as_one(corpus, tokenizer, undisturbed, tmp_path):
    prepare([corpus], tokenizer, tmp_path / "out", workers=3, unit_bytes=UNIT_BYTES)
    assert digests(tmp_path / "out") == digests(undisturbed)
    assert len(list(undisturbed.glob("shard-*.json"))) > 15


@pytest.mark.parametrize("order", [("1/3", "2/3", "3/3"), ("3/3", "1/3", "2/3")])
def test_parts_in_any_order_are_the_whole(corpus, tokenizer, undisturbed, tmp_path, order):
    done = [
        prepare([corpus], tokenizer, tmp_path / "out", workers=1, unit_bytes=UNIT_BYTES, part=part) for part in order
    ]
    assert [prepared.complete for prepared in done] == [False, False, True]
    assert sum(prepared.new_shards for prepared in done) == len(list(undisturbed.glob("shard-*.json")))
    assert digests(tmp_path / "out") == digests(undisturbed)


def start(corpus, tokenizer, out, workers):
    """Start a prepare that a signal can kill, with all its workers left to themselves."""
    script = Path(out).parent / "run.py"
    script.write_text(
        "import sys\n"
        "from ternlm.data.prepare import prepare\n"
        "if __name__ == '__main__':\n"
        f"    prepare([sys.argv[1]], sys.argv[2], sys.argv[3], workers={workers}, unit_bytes={UNIT_BYTES})\n"
    )
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, script, corpus, tokenizer, out],
        env=os.environ | {"PYTHONPATH": str(root)},
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize(("workers", "seed"), [(1, 4), (2, 5)])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(corpus, tokenizer, undisturbed, tmp_path, workers, seed):
    rng, out = random.Random(seed), tmp_path / "out"
    expected = digests(undisturbed)
    killed = 0
    for attempt in range(8):
        process = start(corpus, tokenizer, out, workers)
        # Let it write some shards more (none in the first attempt), then kill it within the next few writes.
        goal = len(list(out.glob("shard-*.json"))) + (rng.randint(1, 3) if attempt else 0)
        while process.poll() is None and not (out.exists() and len(list(out.glob("shard-*.json"))) >= goal):
            time.sleep(0.0005)
        time.sleep(rng.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)  # its workers hold the pipe too: this waits for their end
        killed += process.returncode == -signal.SIGKILL
        finished = {name: digest for name, digest in digests(out).items() if ".tmp-" not in name}
        assert finished.items() <= expected.items(), "a file under its own name is whole"
    assert killed >= 5
    prepared = prepare([corpus], tokenizer, out, workers=workers, unit_bytes=UNIT_BYTES)
    assert prepared.complete
    assert digests(out) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_workers_end_when_their_parent_is_killed(corpus, tokenizer, tmp_path):
    process = start(corpus, tokenizer, tmp_path / "out", 2)
    children: list[int] = []
    while process.poll() is None and len(children) < 2:
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        workers = [int(child) for child in listed.split() if b"spawn_main" in _command(int(child))]
        children = workers
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert len(children) == 2
    deadline = time.monotonic() + 10
    while any(b"spawn_main" in _command(child) for child in children):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.01)


def _command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_shards_that_were_damaged_are_made_again(corpus, tokenizer, undisturbed, tmp_path):
    out = tmp_path / "out"
    prepare([corpus], tokenizer, out, workers=1, unit_bytes=UNIT_BYTES)
    (out / "shard-00003.tokens").write_bytes(b"12")
    (out / "shard-00004.json").write_text('{"shard": ')
    (out / "shard-00005.ends").unlink()
    prepared = prepare([corpus], tokenizer, out, workers=1, unit_bytes=UNIT_BYTES)
    assert prepared.new_shards == 3
    assert digests(out) == digests(undisturbed)


def test_a_complete_folder_is_left_alone_and_says_so(corpus, tokenizer, undisturbed):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.iterdir()}
    said = io.StringIO()
    prepared = prepare([corpus], tokenizer, undisturbed, unit_bytes=UNIT_BYTES, console=Console(file=said, width=200))
    assert "complete already, nothing to do" in said.getvalue()
    assert (prepared.complete, prepared.new_shards, prepared.documents) == (True, 0, 1435)
    assert {path: path.stat().st_mtime_ns for path in undisturbed.iterdir()} == before


def test_the_summary_says_documents_tokens_and_what_was_left_out(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "the tern"}\n{"text": ""}\n{"txt": 1}\n{"text": 2}\n{"text": 3}\n')
    said = io.StringIO()
    console = Console(file=said, width=200)
    prepared = prepare([tmp_path / "a.jsonl"], tokenizer, tmp_path / "out", on_error="skip", console=console)
    assert (prepared.documents, prepared.bytes) == (1, 8)
    assert prepared.skipped == {
        "empty text": {"count": 1, "first": "a.jsonl: a record with an empty text"},
        "missing field": {"count": 1, "first": "a.jsonl:3: no field 'text'; its fields: 'txt'"},
        "wrong type": {"count": 2, "first": "a.jsonl:4: field 'text' must be a string, not a number"},
    }
    assert "2 for wrong type, the first: a.jsonl:4: field 'text' must be a string" in said.getvalue()
    assert f"tokens     {prepared.tokens}" in said.getvalue()
    manifest = ShardSet.open(tmp_path / "out").manifest
    assert manifest["options"]["skipped"] == prepared.skipped


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line_stops_the_run_and_skipping_it_later_goes_on(corpus, tokenizer, tmp_path, workers):
    lines = (corpus / "many.jsonl").read_text().splitlines(keepends=True)
    lines[500:500] = ['{"text": \n']
    source, out = tmp_path / "bad.jsonl", tmp_path / "out"
    source.write_text("".join(lines))
    with pytest.raises(DataError) as error:
        prepare([source], tokenizer, out, unit_bytes=UNIT_BYTES, workers=workers)
    assert str(error.value).startswith(f"{source}:501: not one JSON value (Expecting value")
    assert str(error.value).endswith("or leave such records out: --on-error skip, in a recipe data.on_error=skip")
    assert not (out / "manifest.json").exists()
    assert not list(out.glob("*.tmp-*"))
    done = len(list(out.glob("shard-*.json")))
    prepared = prepare([source], tokenizer, out, unit_bytes=UNIT_BYTES, workers=workers, on_error="skip")
    assert done > 0
    assert prepared.new_shards == prepared.shards - done
    assert (prepared.documents, prepared.skipped["not JSON"]["count"]) == (800, 1)
    fresh = prepare([source], tokenizer, tmp_path / "fresh", unit_bytes=UNIT_BYTES, on_error="skip", workers=1)
    assert fresh.complete
    assert digests(out) == digests(tmp_path / "fresh")


def test_what_was_skipped_is_an_error_again_when_errors_are_to_fail(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\nbad\n' * 10)
    arguments = [tmp_path / "a.jsonl"], tokenizer, tmp_path / "out"
    prepare(*arguments, on_error="skip", part="1/2", unit_bytes=40, workers=1)
    with pytest.raises(DataError, match=r"a\.jsonl:2: not one JSON value"):
        prepare(*arguments, part="1/2", unit_bytes=40, workers=1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"field": "body"}, "field was text, now body"),
        ({"unit_bytes": 999}, "unit_bytes was 1048576, now 999"),
        ({"eos": False}, "eos was True, now False"),
        ({"text_document": "line"}, "text_document was file, now line"),
    ],
)
def test_another_plan_in_the_same_folder_is_refused_with_the_reason(tokenizer, tmp_path, change, reason):
    (tmp_path / "a.txt").write_text("the tern")
    prepare([tmp_path / "a.txt"], tokenizer, tmp_path / "out")
    before = digests(tmp_path / "out")
    with pytest.raises(DataError, match=f"begun with another plan: {reason}. Give the inputs.*choose another folder"):
        prepare([tmp_path / "a.txt"], tokenizer, tmp_path / "out", **change)
    assert digests(tmp_path / "out") == before


def test_other_inputs_or_another_tokenizer_are_refused_with_the_reason(tokenizer, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.txt").write_text("the tern")
    prepare([source], tokenizer, tmp_path / "out")
    other = train_bpe(iter(sentences(400)), 321)
    with pytest.raises(DataError, match=r"tokenizer [0-9a-f]{12}\.\.\., now [0-9a-f]{12}"):
        prepare([source], other, tmp_path / "out")
    (source / "b.txt").write_text("x")
    with pytest.raises(DataError, match=r"input in/b\.txt is new"):
        prepare([source], tokenizer, tmp_path / "out")
    (source / "b.txt").unlink()
    (source / "a.txt").write_text("the terns")
    with pytest.raises(DataError, match=r"input in/a\.txt had size 8, now 9"):
        prepare([source], tokenizer, tmp_path / "out")


def test_a_file_that_grows_during_the_run_is_an_error(tokenizer, tmp_path, monkeypatch):
    source = tmp_path / "a.txt"
    source.write_text("the tern")
    planned = prepare.__globals__["make_units"]

    def make_units_and_grow(*arguments):
        units = planned(*arguments)
        source.write_text("the tern flies")
        return units

    monkeypatch.setattr("ternlm.data.prepare.make_units", make_units_and_grow)
    with pytest.raises(DataError, match="had 8 bytes when the work was planned and has 14 now"):
        prepare([source], tokenizer, tmp_path / "out")


def test_two_processes_at_the_same_shard_are_an_error_not_a_mess(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("the tern")
    arguments = [tmp_path / "a.txt"], tokenizer, tmp_path / "out"
    beginning = ShardWriter.add

    def add_while_another_run_begins(*document):
        beginning(*document)
        for leftover in (tmp_path / "out").glob("shard-*.tmp-*"):
            leftover.unlink()

    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "add", add_while_another_run_begins)
        with pytest.raises(DataError, match="another process took its files away"):
            prepare(*arguments)
    assert prepare(*arguments).complete


def test_ids_outside_the_vocabulary_are_named_by_file_and_line(tokenizer, tmp_path):
    write_bin(tmp_path / "a.bin", [[1, 2], [1, -320, 2]])
    with pytest.raises(DataError, match=r"a\.bin:2: id 320 is outside the tokenizer's vocabulary of 320"):
        prepare([tmp_path / "a.bin"], tokenizer, tmp_path / "out")
    prepared = prepare([tmp_path / "a.bin"], tokenizer, tmp_path / "out", on_error="skip")
    assert (prepared.documents, prepared.tokens) == (1, 2)


def test_an_empty_file_stops_the_run_or_is_skipped(tokenizer, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("the tern")
    (tmp_path / "in" / "b.txt").write_text("")
    with pytest.raises(DataError, match=r"b\.txt: holds no document. Remedy: remove the file"):
        prepare([tmp_path / "in"], tokenizer, tmp_path / "out")
    assert prepare([tmp_path / "in"], tokenizer, tmp_path / "out", on_error="skip").documents == 1


def test_nothing_but_bad_records_is_an_error(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text("bad\n")
    for _ in range(2):
        with pytest.raises(DataError, match="the inputs hold no document"):
            prepare([tmp_path / "a.jsonl"], tokenizer, tmp_path / "out", on_error="skip")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_folders_that_hold_something_else_and_wrong_choices_are_refused(tokenizer, tmp_path):
    (tmp_path / "in").mkdir()
    source = tmp_path / "in" / "a.txt"
    source.write_text("the tern")
    cases = [
        ([source], tmp_path / "in", {}, "holds other files \\(such as a.txt\\)"),
        ([tmp_path / "in"], tmp_path / "in" / "out", {}, "lies in the input"),
        ([source], tmp_path / "out", {"part": "0/3"}, "part = '0/3' must be i/n"),
        ([source], tmp_path / "out", {"part": "4/3"}, "part = '4/3' must be i/n"),
        ([source], tmp_path / "out", {"part": "first"}, "part = 'first' must be i/n"),
        ([source], tmp_path / "out", {"on_error": "stop"}, "on_error = 'stop' must be one of fail, skip"),
        ([source], tmp_path / "out", {"workers": 0}, "workers = 0 must be at least 1"),
    ]
    for inputs, out, options, message in cases:
        with pytest.raises(DataError, match=message):
            prepare(inputs, tokenizer, out, **options)
    assert not (tmp_path / "out").exists()


def test_bos_and_eos_can_be_left_out(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("the tern")
    its = load_tokenizer(tokenizer)
    prepare([tmp_path / "a.txt"], its, tmp_path / "out", bos=False, eos=False)
    assert ShardSet.open(tmp_path / "out").document(0)[0].tolist() == its.encode("the tern")


def test_a_tokenizer_is_trained_on_the_same_inputs_as_prepare_takes(corpus, tmp_path):
    files = [path for path in corpus.iterdir() if path.name.partition(".")[2] in ("txt", "jsonl", "json", "parquet")]
    trained = train_tokenizer(files, 320, tmp_path / "a")
    assert load_tokenizer(tmp_path / "a").fingerprint == trained.fingerprint
    assert trained.fingerprint == train_bpe(iter(sentences(1400, seed=1)), 320).fingerprint
    sampled = train_tokenizer(files, 300, tmp_path / "b", sample_bytes=20_000)
    assert sampled.vocab_size == 300
    with pytest.raises(DataError, match="holds a tokenizer already"):
        train_tokenizer(files, 320, tmp_path / "a")
    with pytest.raises(DataError, match="holds tokens, not text"):
        train_tokenizer([corpus], 320, tmp_path / "c")

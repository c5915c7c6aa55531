"""Conversations prepared: ids and masks in shards, counts, bad records, other plans; and what inspect shows of them."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chats import tokenizer_for
from rich.console import Console
from typer.testing import CliRunner

from ternlm.cli import app
from ternlm.data.conversations import read_conversation
from ternlm.data.errors import DataError
from ternlm.data.inspect import inspect
from ternlm.data.inspect_chat import inspect_conversations
from ternlm.data.prepare import prepare
from ternlm.data.protocols import CHATML, INTERNLM, INTERNLM2, ChatProtocol
from ternlm.data.samples import ConversationOptions
from ternlm.data.shards import ShardSet
from ternlm.data.source import Source
from ternlm.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from ternlm.data.turns import encode_turns

TOKENS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<eoh>", "<eoa>")
TEXT = "hello there, how do you do? user assistant system yes and no 0 1 2 3 4 5 6 7 8 9"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(iter([TEXT] * 30), 300, TOKENS)


def options(protocol: ChatProtocol = CHATML, format="auto", system=None) -> ConversationOptions:
    return ConversationOptions(
        format, protocol.template, protocol.stop, protocol.after_end, protocol.document_end, system
    )


def pair(number: int) -> dict[str, str]:
    return {"prompt": f"hello {number}", "completion": f"yes {number}"}


def write(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """One file of each format, one of them cut into many units."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    write(folder / "a.jsonl", [pair(number) for number in range(200)])
    (folder / "b.json").write_text(json.dumps([{"instruction": "how", "input": "do", "output": "no"}] * 3))
    talk = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "yes"}] * 2
    pq.write_table(pa.Table.from_pylist([{"conversations": talk}] * 4), folder / "c.parquet")
    write(folder / "d.jsonl", [{"text": "hello there"}])
    (folder / "e.bin").write_text('{"tokens": [2, -6, -7, 8, 1]}\n')
    with (folder / "e.bin.meta").open("wb") as file:
        np.save(file, np.array([[0, 5]]))
    return folder


def documents(folder: Path) -> list[tuple[list[int], list[bool]]]:
    data = ShardSet.open(folder)
    found = [data.document(index) for index in range(data.num_documents)]
    return [(ids.tolist(), [True] * len(ids) if mask is None else mask.tolist()) for ids, mask in found]


def test_files_of_every_format_become_samples_with_their_masks(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = prepare([corpus], tokenizer, out, workers=2, unit_bytes=1500, conversations=options())
    found = documents(out)
    expected = []
    for number in range(200):
        expected += encode_turns(tokenizer, CHATML.template, read_conversation(pair(number), "pairs"), stop=CHATML.stop)
    assert found[:200] == [(sample.ids, sample.trained.tolist()) for sample in expected]
    said = [tokenizer.decode(np.array(ids)[mask], skip_special=False) for ids, mask in found]
    assert said[200:207] == ["no<|im_end|>"] * 3 + ["yes<|im_end|>yes<|im_end|>"] * 4
    assert found[207] == (tokenizer.encode_document("hello there"), [True] * len(found[207][0]))
    assert found[208] == ([2, 6, 7, 8, 1], [True, False, False, True, True])
    manifest = json.loads((out / "manifest.json").read_text("utf-8"))
    counts = {
        "conversations": 209,
        "samples": 209,
        "trained_tokens": sum(sum(mask) for _, mask in found),
        "formats": {"alpaca": 3, "internlm": 1, "pairs": 200, "sharegpt": 4, "text": 1},
    }
    assert manifest["options"]["counts"] == counts
    assert done.conversations == counts
    assert manifest["options"]["conversations"]["stop"] == ["<|im_end|>"]
    assert len(manifest["shards"]) > 5
    again = prepare([corpus], tokenizer, out, unit_bytes=1500, conversations=options())
    assert (again.new_shards, again.conversations) == (0, counts)


def test_internlms_samples_are_trained_behind_their_end(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [pair(1)])
    prepare([file], tokenizer, tmp_path / "out", conversations=options(INTERNLM, system="be kind"))
    ((ids, mask),) = documents(tmp_path / "out")
    assert tokenizer.decode(ids, skip_special=False) == (
        "<s><|System|>:be kind<eoh>\n<|User|>:hello 1<eoh>\n<|Bot|>:yes 1<eoa>\n</s>"
    )
    assert tokenizer.decode(np.array(ids)[mask], skip_special=False) == "yes 1<eoa>\n</s>"


def test_a_fitted_tokenizer_is_kept_with_its_tokens(tmp_path: Path) -> None:
    its = tokenizer_for("internlm2")
    prepare([write(tmp_path / "a.jsonl", [pair(1)])], its, tmp_path / "out", conversations=options(INTERNLM2))
    ((ids, _),) = documents(tmp_path / "out")
    assert ids.count(load_tokenizer(tmp_path / "out").id_of("<|im_end|>")) == 2


BAD = [
    ({"prompt": "a", "completion": " "}, "no answer", "message 1 is an empty answer. Remedy: give the conversation"),
    (
        {"prompt": "a", "completion": 5},
        "bad conversation",
        "completion must be text, not a number. Remedy: put the rec",
    ),
    (
        {"instruction": "a", "output": "b"},
        "other format",
        "has no pair of fields such as prompt and completion, as the format pairs wants; looks like alpaca. Remedy: ",
    ),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "other format", "is preference data (chosen, rejected)"),
    ([1], "wrong type", "must be an object, not an array"),
]


@pytest.mark.parametrize(("record", "kind", "reason"), BAD)
def test_a_bad_record_ends_the_work_or_is_left_out_and_counted(record, kind, reason, tokenizer, tmp_path) -> None:
    file = write(tmp_path / "a.jsonl", [pair(1), record, pair(2)])
    with pytest.raises(DataError) as caught:
        prepare([file], tokenizer, tmp_path / "fail", workers=1, conversations=options())
    assert f"a.jsonl:2: {reason}" in str(caught.value)
    assert "or leave such records out: --on-error skip, in a recipe data.on_error=skip" in str(caught.value)
    done = prepare([file], tokenizer, tmp_path / "skip", workers=1, on_error="skip", conversations=options())
    assert done.documents == 2
    assert done.skipped[kind]["count"] == 1
    assert done.skipped[kind]["first"].startswith("a.jsonl:2: ")


def test_a_file_of_no_format_says_what_it_has(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"x": 1, "y": 2}] * 2)
    with pytest.raises(
        DataError, match=r"a\.jsonl:1: has the fields 'x', 'y', which are no conversation; expected are me"
    ):
        prepare([file], tokenizer, tmp_path / "out", workers=1, conversations=options())
    file = write(tmp_path / "b.jsonl", [{"x": 1}, pair(1)])
    done = prepare([file], tokenizer, tmp_path / "skip", workers=1, on_error="skip", conversations=options())
    assert (done.documents, list(done.skipped)) == (1, ["other format"])


def test_every_part_of_a_file_has_the_format_of_its_beginning(tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = {"instruction": "how", "output": "no"}
    file = write(tmp_path / "a.jsonl", [*([pair(1)] * 100), *([other] * 100)])
    given = {"workers": 1, "unit_bytes": 1000, "on_error": "skip", "conversations": options()}
    done = prepare([file], tokenizer, tmp_path / "out", **given)
    assert done.shards > 3
    assert (done.documents, done.skipped["other format"]["count"]) == (100, 100)
    assert done.skipped["other format"]["first"].startswith("a.jsonl:101: ")


def test_the_format_asked_for_is_taken(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b", "text": "all of it"}])
    prepare([file], tokenizer, tmp_path / "text", conversations=options(format="text"))
    assert documents(tmp_path / "text")[0][0] == tokenizer.encode_document("all of it")
    with pytest.raises(
        DataError, match=r"a\.jsonl:1: has no 'messages', as the format messages wants; looks like pairs"
    ):
        prepare([file], tokenizer, tmp_path / "messages", workers=1, conversations=options(format="messages"))
    with pytest.raises(DataError, match=r"isn't one of InternLM's \.bin files"):
        prepare([file], tokenizer, tmp_path / "internlm", conversations=options(format="internlm"))
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"a\.txt: a text file holds no conversations"):
        prepare([tmp_path / "a.txt"], tokenizer, tmp_path / "txt", conversations=options())
    with pytest.raises(DataError, match=r"has no token '<\|nothing\|>'"):
        prepare([file], tokenizer, tmp_path / "stop", conversations=ConversationOptions("auto", "", ("<|nothing|>",)))


def test_a_folder_begun_otherwise_is_refused_with_words(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [pair(1)])
    prepare([file], tokenizer, tmp_path / "out", conversations=options())
    for changed, words in (
        (
            options(ChatProtocol("x" + CHATML.template, CHATML.stop)),
            r"chat template was [0-9a-f]{64}, now [0-9a-f]{64}",
        ),
        (options(system="s"), "system was None, now s"),
        (options(format="pairs"), "format was auto, now pairs"),
        (None, "it was begun for conversations, now it is for texts"),
    ):
        with pytest.raises(DataError, match=rf"was begun with another plan: {words}"):
            prepare([file], tokenizer, tmp_path / "out", conversations=changed)
    prepare([file], tokenizer, tmp_path / "texts", field="prompt")
    with pytest.raises(DataError, match="it was begun for texts, now it is for conversations"):
        prepare([file], tokenizer, tmp_path / "texts", field="prompt", conversations=options())


def shown(call, *arguments, **more) -> str:
    said = io.StringIO()
    call(*arguments, console=Console(file=said, width=300, color_system=None, _environ={}), **more)
    return said.getvalue()


def test_inspect_tells_lengths_what_is_trained_and_what_a_sequence_cuts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [pair(1)] * 8 + [{"prompt": "hello " * 100, "completion": "yes"}] * 2)
    prepare([file], tokenizer, tmp_path / "out", conversations=options())
    lengths = sorted(len(ids) for ids, _ in documents(tmp_path / "out"))
    trained = [sum(mask) for _, mask in documents(tmp_path / "out")]
    text = shown(inspect, tmp_path / "out", documents=1, plain=True, seq_len=100)
    share = sum(trained) / sum(lengths)
    assert f"{sum(trained):,} tokens, {share:.1%} of all" in text
    assert f"median {lengths[0]}, 90 % up to {lengths[-1]}, 99 % up to {lengths[-1]}, longest {lengths[-1]}" in text
    assert "100.0% of the samples have an end token as their last trained" in text
    assert f"2 samples, 20.0%; {sum(trained[8:])} trained tokens lost, {sum(trained[8:]) / sum(trained):.1%}" in text
    assert "<|im_start|>user\nhello 1<|im_end|>\n<|im_start|>assistant\n[[yes 1<|im_end|>]]\n" in text
    assert "[[" not in shown(inspect, tmp_path / "out", documents=1)
    whole = shown(inspect, tmp_path / "out", documents=0, seq_len=lengths[-1])
    assert "0 samples, 0.0%; 0 trained tokens lost, 0.0%" in whole
    # Behind <|im_end|>, the last that is trained, stands a newline.
    for less, lost in ((1, 0), (2, 2), (3, 4)):
        text = shown(inspect, tmp_path / "out", documents=0, seq_len=lengths[-1] - less)
        assert f"2 samples, 20.0%; {lost} trained tokens lost" in text


def test_inspect_shows_conversations_that_nobody_prepared(tokenizer: Tokenizer, tmp_path: Path) -> None:
    said = [{"role": ("user", "assistant")[number % 2], "content": str(number)} for number in range(6)]
    file = write(tmp_path / "a.jsonl", [{"messages": said}, {"messages": said[:2]}, {"messages": said[:1]}])
    text = shown(inspect_conversations, file, tokenizer, options(), documents=1, plain=True)
    assert "a.jsonl: all 2 conversations, of the format messages" in text
    assert "1 for no answer, the first: a.jsonl:3: has no assistant message to train on" in text
    assert "a prefix of itself over turns: each of 1 conversations with several answers is one sample" in text
    assert "[[1<|im_end|>]]" in text
    text = shown(inspect_conversations, file, tokenizer, options(INTERNLM), documents=0, records=1)
    assert "a.jsonl: the first 1 conversations, of the format messages" in text
    assert (
        "not always a prefix of itself over turns: 1 of 1 conversations with several answers are a sample per" in text
    )
    with pytest.raises(DataError, match="the first 2,000 records hold no conversation to train on"):
        inspect_conversations(write(tmp_path / "b.jsonl", [{"x": 1}]), tokenizer, options())


def test_the_command_prepares_and_inspects_conversations(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    file = write(tmp_path / "a.jsonl", [pair(1)])
    common = [str(file), "--tokenizer", str(tmp_path / "tokenizer"), "--chat", "chatml", "--system", "be kind"]
    run = CliRunner().invoke(app, ["data", "prepare", *common, "--out", str(tmp_path / "out"), "--workers", "1"])
    assert run.exit_code == 0, run.output
    assert "1 (1 pairs), 1 samples" in run.output
    ((ids, _),) = documents(tmp_path / "out")
    assert tokenizer.decode(ids).startswith("system\nbe kind\n")
    run = CliRunner().invoke(app, ["data", "inspect", *common, "--plain", "--conversations", "pairs"])
    assert run.exit_code == 0, run.output
    assert "[[yes 1<|im_end|>]]" in run.output
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text("{{ 'own' }}" + CHATML.template)
    run = CliRunner().invoke(app, ["data", "inspect", *common[:4], "auto", "--plain"])
    assert "\nown<|im_start|>user\nhello 1" in run.output
    run = CliRunner().invoke(app, ["data", "prepare", *common[:3], "--out", str(tmp_path / "x"), "--system", "s"])
    assert run.exit_code == 2
    assert "name the chat protocol too" in run.output


def test_samples_of_one_conversation_are_held_out_together(tokenizer: Tokenizer, tmp_path: Path) -> None:
    talks = [
        [{"from": who, "value": f"hello {i} {k}"} for k in range(1 + i % 4) for who in ("human", "gpt")]
        for i in range(120)
    ]
    samples = [
        encode_turns(
            tokenizer,
            INTERNLM.template,
            read_conversation({"conversations": talk}, "sharegpt"),
            stop=INTERNLM.stop,
            after_end=INTERNLM.after_end,
            document_end=INTERNLM.document_end,
        )
        for talk in talks
    ]
    file = write(tmp_path / "chats.jsonl", [{"conversations": talk} for talk in talks])
    prepare([file], tokenizer, tmp_path / "out", conversations=options(INTERNLM), unit_bytes=4096)
    store = ShardSet.open(tmp_path / "out")
    assert len(store.shards) > 1
    assert any(shard.joined for shard in store.shards)
    store.verify()

    expected = [i for i, own in enumerate(samples) for _ in own]
    first = {talk: expected.index(talk) for talk in expected}
    leaders = [first[talk] for talk in expected]
    assert store.leaders(0, store.num_documents).tolist() == leaders
    assert store.leaders(7, 30).tolist() == leaders[7:30]

    sides = [
        Source("chats", store, seq_len=256, whole_documents="pad", validation_fraction=0.3, validation=validation)
        for validation in (False, True)
    ]
    talks_of = [{expected[i] for p in range(s.num_sequences) for i in s.window(p).documents.tolist()} for s in sides]
    assert not talks_of[0] & talks_of[1]
    assert talks_of[0] | talks_of[1] == set(range(120))
    assert sum(side.num_documents for side in sides) == len(expected)


def test_records_before_the_first_of_a_format_are_left_out_one_by_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = write(tmp_path / "late.jsonl", [{"foo": 1}] * 50 + [pair(number) for number in range(9)] + [{"foo": 1}])
    done = prepare([file], tokenizer, tmp_path / "out", on_error="skip", conversations=options())
    assert done.conversations["conversations"] == 9
    assert sum(entry["count"] for entry in done.skipped.values()) == 51


def test_a_folders_files_without_records_are_left_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "README.md").write_text("# A data set")
    with pytest.raises(DataError, match=r"set: holds no file of records \(\.json \.jsonl"):
        prepare([folder], tokenizer, tmp_path / "out", conversations=options())
    write(folder / "a.jsonl", [pair(1)])
    assert prepare([folder], tokenizer, tmp_path / "out", conversations=options()).conversations["samples"] == 1
    with pytest.raises(DataError, match="can't tell its format"):
        prepare([folder / "README.md"], tokenizer, tmp_path / "other", conversations=options())


def test_where_nothing_can_be_used_the_reasons_are_told(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = write(tmp_path / "bad.jsonl", [{"foo": 1}] * 3)
    with pytest.raises(DataError, match=r"train on\n  left out 3 for unknown format, the first: bad\.jsonl:1"):
        prepare([file], tokenizer, tmp_path / "out", on_error="skip", conversations=options())

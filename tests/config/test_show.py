"""What is written out reads back as the same settings, and says what each one does."""

import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ternlm.config import (
    Config,
    Section,
    config_from_dict,
    diff,
    json_schema,
    render,
)
from ternlm.config.section import fields_of, section_in

TABLE: dict[str, Any] = {
    "model": {"preset": "tiny"},
    "data": {"seq_len": 64, "sources": [{"name": "en", "path": "data/en"}]},
    "batch": {"global_sequences": 8},
    "train": {"steps": 10},
}


def config(**sections: Any) -> Config:
    return config_from_dict(TABLE | sections)


def all_fields(section: type[Section]) -> Iterator[tuple[str, str]]:
    for name, field in fields_of(section).items():
        inner = section_in(field.annotation)
        if inner:
            yield from all_fields(inner)
        else:
            yield name, field.description or ""


def test_every_setting_is_shown_with_its_meaning() -> None:
    full = config(
        batch={"global_sequences": 8, "rampup": {"start": 2, "increment": 2, "every": 3}},
        data=TABLE["data"] | {"validation": [{"name": "v", "path": "v"}]},
        load={"from": "base"},
        adapter={},
    )
    lines = [line for line in render(full).splitlines() if "#" in line and "=" in line]
    for name, meaning in all_fields(Config):
        shown = [line for line in lines if line.removeprefix("# ").split(" ")[0] == name]
        assert any(meaning in line for line in shown), name
        assert meaning, name


def test_defaults_and_units_are_marked() -> None:
    text = render(config(optimizer={"lr": 1e-3}))
    lines = {line.removeprefix("# ").split(" ")[0]: line for line in text.splitlines() if "=" in line}
    assert lines["weight_decay"].split("#")[1] == " (default) decoupled weight decay"
    assert lines["lr"].split("#")[1] == " (default 0.0001) peak learning rate"
    assert lines["steps"].split("#")[1] == " optimizer steps of the whole run [steps]"
    assert lines["max_minutes"].startswith("# max_minutes =")


text = st.text(min_size=1, max_size=20)
number = st.floats(min_value=0, max_value=1e300, exclude_min=True)


@settings(max_examples=100, deadline=None)
@given(text, text, st.lists(text, min_size=1, max_size=3), number, number, st.integers(0, 2**63 - 1), st.booleans())
def test_what_is_rendered_reads_back_as_the_same(
    out: str, path: str, prompts: list[str], lr: float, weight: float, seed: int, flag: bool
) -> None:
    before = config(
        out=out,
        seed=seed,
        data={"sources": [{"name": n, "path": path, "weight": weight} for n in ("en", "code")]} | {"seq_len": 64},
        optimizer={"lr": lr, "decay_all": flag},
        sample={"every_steps": 5, "prompts": prompts},
        load={"from": path},
    )
    assert config_from_dict(tomllib.loads(render(before))) == before


@pytest.mark.parametrize(
    "value", ['"', "\\", "\n", "\r\n", "\t", "\x00", "\x1f", "\x7f", "\u2028", "é", "中文", "🐦", "'''", "#"]
)
def test_odd_characters_survive(value: str) -> None:
    before = config(sample={"every_steps": 5, "prompts": [value, f"a{value}b"]})
    assert config_from_dict(tomllib.loads(render(before))) == before


def test_absent_sections_stay_absent() -> None:
    shown = config_from_dict(tomllib.loads(render(config())))
    assert shown.batch.rampup is None
    assert shown.data.validation == ()


def test_diff_lists_what_changed() -> None:
    a = config()
    b = config(
        seed=7,
        model={"preset": "tiny", "rope_scaling": {"kind": "linear", "factor": 2}},
        data={
            "seq_len": 64,
            "sources": [{"name": "en", "path": "data/en"}, {"name": "cn", "path": "data/cn"}],
        },
        batch={"global_sequences": 8, "rampup": {"start": 2, "increment": 2, "every": 3}},
        sample={"every_steps": 5, "prompts": ["x"]},
    )
    assert diff(a, a) == []
    assert diff(a, b) == [
        "seed: 1234 -> 7",
        'model.rope_scaling.kind: "default" -> "linear"',
        "model.rope_scaling.factor: 1.0 -> 2.0",
        "sample.every_steps: 0 -> 5",
        'sample.prompts: [] -> ["x"]',
        'data.sources.1.name: not set -> "cn"',
        'data.sources.1.path: not set -> "data/cn"',
        "data.sources.1.min_length: not set -> 0",
        "batch.rampup.start: not set -> 2",
        "batch.rampup.increment: not set -> 2",
        "batch.rampup.every: not set -> 3",
    ]
    assert "batch.rampup.every: 3 -> not set" in diff(b, a)


def test_the_schema_describes_each_setting() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == set(fields_of(Config))
    model = schema["$defs"]["ModelConfig"]
    assert {"required": ["preset"]} in model["anyOf"]
    assert "internlm-7b" in model["properties"]["preset"]["enum"]
    assert "from" in schema["$defs"]["LoadConfig"]["properties"]
    parallel = {"$ref": "#/$defs/ParallelConfig"}
    assert schema["properties"]["parallel"]["anyOf"] == [{"const": "auto", "type": "string"}, parallel]
    for section in schema["$defs"].values():
        assert section["additionalProperties"] is False
        for name, field in section["properties"].items():
            assert field.get("description") or "$ref" in field, name

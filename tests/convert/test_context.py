"""Exports that shorten the context say so, by what, and to how many tokens; others say nothing."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from gguf_models import random_model, small_config

from ternlm.convert.detect import open_foreign
from ternlm.convert.export_hf import export_hf
from ternlm.convert.gguf_write import export_gguf
from ternlm.train.models import import_model, open_model

DYNAMIC = {"kind": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    caplog.clear()
    return found


def test_a_scaling_that_is_left_out_shortens_the_context(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = random_model(small_config(rope_scaling=DYNAMIC, max_position_embeddings=512))
    for rope in ("none", "dynamic", "keep"):
        export_hf(model, tmp_path / rope, rope=rope)
        config = json.loads((tmp_path / rope / "config.json").read_text())
        assert config["max_position_embeddings"] == 64
        wanted = "its context is 64 tokens, the length trained for, not 512: longer ones need another --rope"
        assert said(caplog) == [f"{tmp_path / rope}: {wanted}"]
    export_gguf(model, tmp_path / "none.gguf", rope="none")
    assert "its context is 64 tokens" in said(caplog)[0]
    export_hf(model, tmp_path / "yarn", rope="yarn", max_length=512)
    export_hf(random_model(small_config()), tmp_path / "plain", rope="none")
    assert said(caplog) == []


def test_a_sliding_window_shortens_the_context(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    export_hf(random_model(small_config()), tmp_path / "in")
    path = tmp_path / "in/config.json"
    mistral = {"model_type": "mistral", "sliding_window": 64, "max_position_embeddings": 256}
    path.write_text(json.dumps(json.loads(path.read_text()) | mistral))
    import_model(tmp_path / "in", tmp_path / "checkpoint")
    for name, model in (("open", open_foreign(tmp_path / "in")), ("imported", open_model(tmp_path / "checkpoint"))):
        assert model.config.max_position_embeddings == 64
        export_hf(model, tmp_path / name)
        export_gguf(model, tmp_path / f"{name}.gguf")
        for out, message in zip((name, f"{name}.gguf"), said(caplog), strict=True):
            assert message.startswith(f"{tmp_path / out}: its context is 64 tokens, not 256: the source's attention")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": 256}))
    whole = open_foreign(tmp_path / "in")
    export_hf(whole, tmp_path / "whole")
    longer = replace(whole, config=whole.config.model_copy(update={"max_position_embeddings": 512}))
    export_hf(longer, tmp_path / "longer")
    assert said(caplog) == []

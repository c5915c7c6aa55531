"""kill -9 a real training process again and again: nothing is lost, nothing half-written is used."""

import json
import os
import random
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch

from ternlm.checkpoint.folders import MARKER, complete_steps, find_checkpoint
from ternlm.checkpoint.load import load_weights, read_model_config, read_state
from ternlm.config import config_to_dict, load_config
from ternlm.data.prepare import prepare
from ternlm.data.train_tokenizer import train_tokenizer
from ternlm.model.decoder import build_model
from ternlm.parallel.mesh import one_rank
from ternlm.parallel.pieces import make_pieces

STEPS = 400
RECIPE = """
out = "{out}"
[model]
vocab_size = 512
hidden_size = 64
num_hidden_layers = 2
num_attention_heads = 4
intermediate_size = 128
attention_bias = true
max_position_embeddings = 128
init.kind = "plain"
[data]
seq_len = 64
sources = [{{ name = "code", path = "{data}" }}]
[batch]
global_sequences = 4
microbatch_sequences = 2
[train]
steps = {steps}
[optimizer]
lr = 1e-3
[compute]
device = "cpu"
compile = "off"
threads = 1
peak_tflops = 0.1
[checkpoint]
every_steps = 3
[monitor]
progress = "off"
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("code")
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [library / name for name in ("argparse.py", "ast.py", "typing.py", "turtle.py")]
    train_tokenizer(files, 512, folder / "tokenizer", format="text")
    prepare(files, folder / "tokenizer", folder / "tokens", format="text", workers=1)
    return folder / "tokens"


def start(folder, out, data):
    recipe = folder / f"{out}.toml"
    recipe.write_text(RECIPE.format(out=folder / out, data=data, steps=STEPS))
    command = [sys.executable, "-m", "ternlm", "train", str(recipe)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()


def wait_for_half_written_save(run, process):
    """Return once a checkpoint's folder is there without its marker, or the process has ended."""
    known = set(complete_steps(run))
    while process.poll() is None:
        folders = list((run / "checkpoints").glob("step-*"))
        if any(not (f / MARKER).exists() and int(f.name[5:]) not in known for f in folders):
            return
        time.sleep(0.0005)


def weights(run):
    model = build_model(read_model_config(run))
    mesh = one_rank(torch.device("cpu"))
    load_weights(make_pieces(model, mesh), run, mesh)
    return model.state_dict()


def records(run):
    """The metrics that don't depend on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    wall_clock = ("speed/", "time/", "data/wait", "memory/")
    return [{k: v for k, v in line.items() if not k.startswith(wall_clock)} for line in lines]


@pytest.mark.slow
def test_twenty_kills_at_random_moments_and_amid_saves_end_with_the_same_weights(tmp_path, data):
    finish(start(tmp_path, "whole", data))
    rng, run, progress = random.Random(0), tmp_path / "killed", []
    for kill in range(20):
        process = start(tmp_path, "killed", data)
        before = complete_steps(run)[-1] if complete_steps(run) else 0
        while process.poll() is None and not any(step > before for step in complete_steps(run)):
            time.sleep(0.002)  # let each life get a little further than the one before
        if kill % 2:
            wait_for_half_written_save(run, process)
        else:
            time.sleep(rng.random() * 0.1)
        assert process.poll() is None, "the run ended before it was killed; give it more steps"
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        progress.append(read_state(find_checkpoint(run))["progress"]["step"])
    assert progress == sorted(progress)
    finish(start(tmp_path, "killed", data))
    whole, killed = weights(tmp_path / "whole"), weights(run)
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert records(tmp_path / "whole") == records(run)
    assert len(records(run)) == STEPS
    saved = config_to_dict(load_config(find_checkpoint(run) / "config.toml"))
    assert saved["train"]["steps"] == STEPS


def test_sigterm_saves_and_the_next_start_goes_on(tmp_path, data):
    process = start(tmp_path, "run", data)
    while not complete_steps(tmp_path / "run"):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    finish(process)
    step = complete_steps(tmp_path / "run")[-1]
    assert step == len(records(tmp_path / "run")) < STEPS
    finish(start(tmp_path, "run", data))
    assert len(records(tmp_path / "run")) == STEPS

"""The ancestor's Python configurations as recipes: what is mapped, what is listed, and that nothing is run."""

import sys
from pathlib import Path
from typing import Any

import pytest

from ternlm.cli import main
from ternlm.config import Config, load_config
from ternlm.convert.import_config import import_config
from ternlm.convert.python_values import read_values
from ternlm.convert.weights import ConvertError

PRETRAIN = """
JOB_NAME = "demo_7b"
SEQ_LEN = 2048
HIDDEN_SIZE = 4096
HEADS = 32
MLP_RATIO = 8 / 3
LAYERS = 32
VOCAB = 103168
STEPS = 50_000
ALERT = False

SAVE_TO = f"local:ckpts/{JOB_NAME}"
EVERY = 1000
ckpt = dict(
    enable_save_ckpt=True,
    save_ckpt_folder=SAVE_TO,
    load_ckpt_info=None,
    checkpoint_every=EVERY,
    async_upload=True,
    async_upload_tmp_folder="/dev/shm/parts",
    oss_snapshot_freq=int(EVERY / 2),
    stop_file_path="ckpts/stop",
    auto_resume=True,
)
data = dict(
    seq_len=SEQ_LEN, micro_num=4, micro_bsz=2, valid_micro_num=4, valid_every=500, pack_sample_into_one=False,
    total_steps=STEPS, skip_batches="0-9,20", rampup_batch_size="1 1 200", min_length=50,
    train_folder="/data/tokens/train", valid_folder="/data/tokens/valid",
    empty_cache_and_diag_interval=200, diag_outlier_ratio=1.1,
)
grad_scaler = dict(
    fp16=dict(initial_scale=2**16, min_scale=1, growth_interval=1000),
    growth_factor=2, backoff_factor=0.5, max_scale=2**24, hysteresis=2,
)
hybrid_zero_optimizer = dict(
    overlap_sync_grad=True, overlap_sync_param=False, reduce_bucket_size=512 * 1024 * 1024, clip_grad_norm=1.0
)
loss = dict(label_smoothing=0.1)
adam = dict(lr=1e-4, adam_beta1=0.9, adam_beta2=0.95, adam_beta2_c=0, adam_eps=1e-8, weight_decay=0.01)
lr_scheduler = dict(
    total_steps=data["total_steps"], init_steps=0, warmup_ratio=0.01, eta_min=1e-5, last_epoch=-1
)
beta2_scheduler = dict(init_beta2=adam["adam_beta2"], c=0.8, cur_iter=-1)
model_type = "INTERNLM"
model = dict(
    checkpoint=0.5, num_attention_heads=HEADS, embed_split_hidden=True, vocab_size=VOCAB, embed_grad_scale=1,
    parallel_output=True, hidden_size=HIDDEN_SIZE, num_layers=LAYERS, mlp_ratio=MLP_RATIO,
    apply_post_layer_norm=False, dtype="torch.bfloat16", norm_type="rmsnorm", layer_norm_epsilon=1e-5,
    use_flash_attn=True, num_chunks=1,
)
parallel = dict(
    zero1=8, tensor=4, pipeline=dict(size=2, interleaved_overlap=True), sequence_parallel=True
)
cudnn_deterministic = False
cudnn_benchmark = False
enable_tb = True
monitor = dict(
    alert=dict(enable_feishu_alert=ALERT, feishu_alert_address=None, light_monitor_address="http://10.0.0.1")
)
"""
SFT = '''
"""Fine-tuning of a small model."""
import torch

JOB_NAME = "sft"
ONE_GPU = True
SEQ_LEN: int = 1024 * 2
BASE = "local:ckpts/base/2000"
optimizer_base = {"lr": 2e-5, "weight_decay": 0.0}
if ONE_GPU:
    MICRO = 8
else:
    MICRO = 1
ckpt = dict(
    enable_save_ckpt=False,
    save_ckpt_folder=None,
    load_ckpt_info=dict(path=BASE, content=("model",), ckpt_type="internlm"),
    auto_resume=False,
)
data = dict(
    seq_len=SEQ_LEN, micro_num=MICRO, micro_bsz=1, valid_every=0, pack_sample_into_one=True, total_steps=500,
    skip_batches="", rampup_batch_size=None, min_length=0, train_folder="local:data/alpaca/train", valid_folder=None,
)
adam = dict(**optimizer_base, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8)
lr_scheduler = dict(total_steps=500, warmup_ratio=0.03, eta_min=adam["lr"] / 10)
hybrid_zero_optimizer = dict(clip_grad_norm=0.5, zero_overlap_communication=True)
model = dict(
    checkpoint=True, num_attention_heads=4, vocab_size=1000, hidden_size=64, num_layers=2, mlp_ratio=4.0,
    dtype=torch.float16 if ONE_GPU else torch.bfloat16, num_chunks=1, use_dynamic_ntk_rope=True,
)
parallel = dict(zero1=-1 if ONE_GPU else 8, tensor=1, pipeline=1)
'''
SMALL = """
data = dict(seq_len=64, micro_bsz=2, total_steps=9, train_folder="d")
model = dict(num_attention_heads=2, vocab_size=9, hidden_size=8, num_layers=2)
ckpt = dict(enable_save_ckpt=False)
"""


def imported(folder: Path, text: str, data_ranks: int = 1) -> tuple[Config, list[str]]:
    """Import a configuration, and load the recipe that comes out."""
    source = folder / "theirs.py"
    source.write_text(text)
    recipe, notes = import_config(source, data_ranks)
    (folder / "ours.toml").write_text(recipe)
    return load_config(folder / "ours.toml"), notes


def test_a_pretraining_becomes_a_recipe(tmp_path: Path) -> None:
    config, _ = imported(tmp_path, PRETRAIN, 8)
    model = config.model
    assert model.num_params == 7_321_948_160
    assert (model.intermediate_size, model.attention_bias, model.rms_norm_eps) == (11008, True, 1e-5)
    assert (config.out, config.seed) == ("ckpts/demo_7b", 1024)
    assert (config.batch.global_sequences, config.batch.microbatch_sequences) == (64, 2)
    rampup = config.batch.rampup
    assert rampup
    assert (rampup.start, rampup.increment, rampup.every) == (16, 16, 200)
    assert (config.train.steps, config.train.stop_file) == (50_000, "ckpts/stop")
    data = config.data
    assert (data.seq_len, data.packing, data.skip_steps) == (2048, "documents", "1-10,21")
    (source,), (held_out,) = data.sources, data.validation
    assert (source.name, source.path, source.min_length) == ("train", "/data/tokens/train", 50)
    assert (held_out.name, held_out.path) == ("valid", "/data/tokens/valid")
    assert (config.validation.every_steps, config.validation.max_sequences) == (500, 0)
    adam = config.optimizer
    assert (adam.lr, adam.betas, adam.eps, adam.weight_decay) == (1e-4, (0.9, 0.95), 1e-8, 0.01)
    assert (adam.decay_all, adam.clip_norm, adam.beta2_ramp) == (True, 1.0, 0.8)
    assert (config.schedule.kind, config.schedule.warmup_fraction, config.schedule.min_lr) == ("cosine", 0.01, 0.1)
    assert (config.loss.label_smoothing, config.compute.dtype, config.compute.recompute) == (0.1, "bfloat16", 0.5)
    parallel, sharding = config.parallel, config.sharding
    assert (parallel.tensor, parallel.sequence, parallel.pipeline, parallel.stages_per_rank) == (4, True, 2, 1)
    assert (sharding.params, sharding.grads, sharding.optimizer) == (1, 1, 8)
    saved = config.checkpoint
    assert (saved.every_steps, saved.keep_last, saved.keep_every_steps, saved.wait) == (500, 2, 1000, False)
    assert config.monitor.tensorboard
    assert config.load.checkpoint is None


def test_what_has_no_counterpart_is_listed_with_what_happens_instead(tmp_path: Path) -> None:
    _, notes = imported(tmp_path, PRETRAIN + "odd = 3\nmodel['new'] = {'a': 1}\n", 8)
    assert all(": " in note and " = " in note for note in notes)
    assert [note.split(" = ")[0] for note in notes] == [
        "ckpt.async_upload_tmp_folder",
        "data.valid_micro_num",
        "data.empty_cache_and_diag_interval",
        "data.diag_outlier_ratio",
        "hybrid_zero_optimizer.overlap_sync_grad",
        "hybrid_zero_optimizer.overlap_sync_param",
        "hybrid_zero_optimizer.reduce_bucket_size",
        "model.embed_split_hidden",
        "model.parallel_output",
        "model.new.a",
        "parallel.pipeline.interleaved_overlap",
        "monitor.alert.light_monitor_address",
        "odd",
    ]
    assert notes[-1] == "odd = 3: isn't known; left out"


def test_a_fine_tuning_becomes_a_recipe(tmp_path: Path) -> None:
    config, notes = imported(tmp_path, SFT)
    assert (config.out, config.load.checkpoint) == ("runs/sft", "ckpts/base/2000")
    assert (config.batch.global_sequences, config.batch.microbatch_sequences) == (8, 1)
    assert (config.data.packing, config.data.sources[0].path) == ("across", "data/alpaca/train")
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.optimizer.clip_norm) == (2e-5, 0.0, 0.5)
    assert (config.schedule.warmup_fraction, config.schedule.min_lr) == (0.03, 0.1)
    assert (config.compute.dtype, config.compute.recompute) == ("float16", 1.0)
    assert (config.model.intermediate_size, config.model.rope_scaling.kind) == (256, "dynamic")
    assert (config.sharding.optimizer, config.checkpoint.every_steps) == (-1, 0)
    assert [note.split(" = ")[0] for note in notes] == [
        "ckpt.enable_save_ckpt",
        "ckpt.auto_resume",
        "hybrid_zero_optimizer.zero_overlap_communication",
    ]


@pytest.mark.parametrize(
    ("more", "place", "value"),
    [
        ("model['use_flash_attn'] = False", "data.packing", "pad"),
        ("model['num_chunks'] = 2; parallel = dict(pipeline=2)", "parallel.pipeline_schedule", "interleaved"),
        ("model['num_chunks'] = 2; parallel = dict(pipeline=2)", "parallel.stages_per_rank", 2),
        ("parallel = dict(tensor=2)", "parallel.sequence", False),
        ("parallel = dict(tensor=dict(size=2, mode='fsp'))", "parallel.sequence", True),
        ("parallel = dict(zero1=dict(size=4, fsdp=True))", "sharding.params", 4),
        ("parallel = dict(zero1=0)", "sharding.optimizer", -1),
        ("parallel = dict(zero1=1)", "sharding.optimizer", 1),
        ("ckpt = dict(checkpoint_every=7)", "checkpoint.keep_every_steps", 7),
        ("ckpt = dict(checkpoint_every=7, async_upload=False)", "checkpoint.wait", True),
        ("ckpt = dict(checkpoint_every=7, load_ckpt_folder='local:x')", "load.checkpoint", "x"),
        ("data['rampup_batch_size'] = '192 24 8'", "batch.rampup", None),
        ("beta2_scheduler = dict(init_beta2=0.99, c=-0.8)", "optimizer.beta2_ramp", 0.0),
        ("beta2_scheduler = dict(init_beta2=0.99, c=-0.8)", "optimizer.betas", (0.9, 0.99)),
        ("SEQ_LEN = 128\ndata = dict(micro_bsz=2, total_steps=9, train_folder='d')", "data.seq_len", 128),
        ("model['rope_base'] = 1000000", "model.rope_theta", 1e6),
        ("model['dtype'] = 'torch.tf32'", "compute.dtype", "float32"),
        ("model['mlp_ratio'] = 8 / 3", "model.intermediate_size", 256),
        ("a, (b, c) = 1, [2, 3]\ndata['micro_num'] = b ** c", "batch.global_sequences", 16),
        ("data['micro_num'] = len([1, *range_]) if False else max(3, min(5, 4)) // 2", "batch.global_sequences", 4),
        ("data['micro_num'] = 3 if 1 < 2 <= 2 and 'a' in ('a', 'b') and not False else 0", "batch.global_sequences", 6),
        (
            "x = 2\nx += 1\ndata['train_folder'] = f'a/{x:02d}{JOB!r}' if False else f'a/{x:02d}'",
            "data.sources.0.name",
            "03",
        ),
    ],
)
def test_each_setting_has_its_place(tmp_path: Path, more: str, place: str, value: Any) -> None:
    found: Any
    found, _ = imported(tmp_path, f"{SMALL}\n{more}\n")
    for part in place.split("."):
        found = found[int(part)] if part.isdecimal() else getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    ("more", "note"),
    [
        ("data['train_folder'] = None", "data.train_folder = None: random data"),
        ("data['train_folder'] = 's3:bucket'", "data.train_folder = 's3:bucket': paths are on disks"),
        ("ckpt['save_ckpt_folder'] = 'boto3:s3://b.1/x'", "ckpt.save_ckpt_folder = 'boto3:s3://b.1/x': paths"),
        ("ckpt['load_ckpt_info'] = dict(path='x', content=('all',))", "ckpt.load_ckpt_info.content = tuple('all')"),
        ("lr_scheduler = dict(total_steps=99)", "lr_scheduler.total_steps = 99: the schedule ends with train.steps"),
        ("lr_scheduler = dict(eta_min=1)", "lr_scheduler.eta_min = 1: the learning rate doesn't rise"),
        ("parallel = dict(zero1=8)", "parallel.zero1 = 8: kept, and needs 8 data ranks"),
        ("model['attn_drop_rate'] = 0.1", "model.attn_drop_rate = 0.1: there is no dropout"),
        ("grad_scaler = dict(hysteresis=3)", "grad_scaler.hysteresis = 3: with float16"),
        ("data['valid_every'] = 5", "data.valid_every = 5: there is no data for it"),
        ("UNUSED = [[[1]]] * 3", "UNUSED = list(, ...): isn't known"),
    ],
)
def test_a_setting_without_effect_is_named(tmp_path: Path, more: str, note: str) -> None:
    _, notes = imported(tmp_path, f"{SMALL}\n{more}\n")
    assert [found for found in notes if found.startswith(note)], notes


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("X = open('{made}', 'w')", "calls `open`, which reading doesn't run; write the value itself there"),
        ("X = __import__('os').mkdir('{made}')", "which reading doesn't run"),
        ("import os\nX = os.environ['HOME']", "needs `os.environ`, which is known only by running it"),
        ("import os\nX = dict(a=os.getenv('A'))", "calls `os.getenv`"),
        ("from other import BASE\nX = BASE", "needs `BASE`, which comes from an import"),
        ("from other import *", "brings names from another file"),
        ("with read_base():\n    pass", "is code that would have to run"),
        ("for i in [1]:\n    X = i", "is code that would have to run"),
        ("def f():\n    return 1\nX = f()", "calls `f`"),
        ("data.update(dict(seq_len=3))", "is code that would have to run"),
        ("X = [i for i in (1, 2)]", "needs `[i for i in (1, 2)]`"),
        ("X = (lambda: 1)", "needs `lambda: 1`"),
        ("X = MISSING", "needs `MISSING`, which nothing assigns"),
        ("X = 1 / 0", "goes wrong when computed (division by zero); correct it"),
        ("X = 9 ** 9 ** 9", "is too large for a setting"),
        ("X = 'a' * 10 ** 9", "is too large for a setting"),
        ("X = f'{{1:999999999}}'", "formats more than numbers and text"),
        ("X = 1 << 10 ** 6", "is too large for a setting"),
        ("X = '%999999999d' % 1", "computes with other than numbers"),
        ("X = (1).real", "needs `1 .real`"),
        ("if MISSING:\n    X = 1", "needs `MISSING`"),
        ("X = dict(a=1, a=2)", "gives an argument twice"),
        ("X = (", "not Python: '(' was never closed"),
    ],
)
def test_what_only_running_would_tell_is_an_error(tmp_path: Path, line: str, message: str) -> None:
    made = tmp_path / "made"
    source = tmp_path / "theirs.py"
    source.write_text(SMALL + line.format(made=made) + "\nY = X\n")
    with pytest.raises(ConvertError) as caught:
        import_config(source)
    assert f"{source}:" in str(caught.value)
    assert message in str(caught.value)
    assert not made.exists()


def test_every_unreadable_value_is_told_once_with_its_line() -> None:
    read = read_values("A = 1\nB = f()\nC = B + 1\nD = A + 1\nE = g(\n    h,\n)\n", "c.py")
    assert read.values == {"A": 1, "D": 2}
    assert [problem.split(" ")[0] for problem in read.problems] == ["c.py:2:", "c.py:5:"]


@pytest.mark.parametrize("text", ["X = " + "(" * 5000 + ")" * 5000, "X = " + "-" * 100_000 + "1", "X = '\0'"])
def test_a_text_that_would_break_the_reader_is_a_problem(text: str) -> None:
    assert read_values(text, "c.py").problems


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SMALL.replace("seq_len=64, ", ""), "data.seq_len is missing; add it"),
        (SMALL.replace("micro_bsz=2", "micro_bsz='2'"), "data.micro_bsz = '2' must be a whole number"),
        (SMALL.replace("micro_bsz=2", "micro_bsz=True"), "data.micro_bsz = True must be a whole number"),
        (SMALL.replace("micro_bsz=2", "micro_bsz=0"), "data.micro_bsz = 0 must be above 0"),
        (
            SMALL.replace("hidden_size=8", "hidden_size=9"),
            "(?s)makes no recipe: .*must be a multiple of num_attention_heads",
        ),
        (SMALL.replace("enable_save_ckpt=False", ""), "ckpt.checkpoint_every = None must be above 0"),
        (SMALL + "model_type = 'INTERNLM_MoE'", "model_type = 'INTERNLM_MoE' is another model"),
        (SMALL + "model['norm_type'] = 'layernorm'", "model.norm_type = 'layernorm' is other norms"),
        (SMALL + "model['dtype'] = 'int8'", "model.dtype = 'int8' must be one of"),
        (SMALL + "model['checkpoint'] = 2", "model.checkpoint = 2 must be"),
        (SMALL + "data['skip_batches'] = 'a'", "data.skip_batches = 'a' must be ranges"),
        (SMALL + "data['rampup_batch_size'] = '1 2'", "data.rampup_batch_size = '1 2' must be three numbers"),
        (SMALL + "JOB_NAME = '\\ud800'", "isn't text that can be written"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConvertError, match=message):
        imported(tmp_path, text)


def test_names_can_not_break_out_of_the_recipe(tmp_path: Path) -> None:
    config, _ = imported(tmp_path, SMALL + "JOB_NAME = 'a\\nseed = 5\\x00\\x7f\"'\ndata['train_folder'] = 'x\"]\\n'\n")
    assert config.seed == 1024
    assert config.data.sources[0].path == 'x"]\n'


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="is a folder"):
        import_config(tmp_path)
    with pytest.raises(ConvertError, match="no such file"):
        import_config(tmp_path / "none.py")
    (tmp_path / "latin.py").write_bytes(b"X = '\xe9'")
    with pytest.raises(ConvertError, match="not UTF-8 text at byte 5"):
        import_config(tmp_path / "latin.py")


def tern(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tern", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_the_command_prints_or_writes_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "7b.py", tmp_path / "recipes/7b.toml"
    source.write_text(PRETRAIN)
    assert tern(monkeypatch, "import-config", str(source), "--data-ranks", "8") == 0
    printed = capsys.readouterr()
    assert "micro_num 4 x micro_bsz 2 x 8 data-parallel ranks = 64 sequences" in printed.out
    assert "  model.embed_split_hidden = True: " in printed.err
    assert tern(monkeypatch, "import-config", str(source), "--out", str(out)) == 0
    assert load_config(out).batch.global_sequences == 8
    assert tern(monkeypatch, "import-config", str(source), "--out", str(out)) == 2
    assert "exists; choose another name" in capsys.readouterr().err

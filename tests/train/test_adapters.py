"""Runs that train adapters: what changes, what is saved, and that it's the same model in every form."""

import shutil

import pytest
import torch
from ranks import run_ranks
from torch.nn.utils import parameters_to_vector

from ternlm.checkpoint.errors import CheckpointError
from ternlm.checkpoint.folders import find_checkpoint
from ternlm.config import ConfigError
from ternlm.config.layout import resolve_layout
from ternlm.convert.export_hf import export_hf
from ternlm.convert.fill import fill_model
from ternlm.convert.peft import ConvertError, read_adapter, write_adapter
from ternlm.convert.weights import OpenModel
from ternlm.model.decoder import build_model
from ternlm.ops.attention import make_segment_attend
from ternlm.parallel.mesh import make_mesh
from ternlm.train import run as train_run
from ternlm.train.loop import train_step
from ternlm.train.models import open_adapter, open_model
from ternlm.train.run import set_up
from ternlm.train.validate import validate

CPU = torch.device("cpu")
KINDS = [{"kind": "lora"}, {"kind": "dora"}, {"kind": "lora", "base": "nf4"}, {"kind": "dora", "base": "nf4"}]


def trained(config, steps, resume="auto"):
    run = set_up(config, resume)
    with run.loader:
        for _ in range(steps):
            train_step(run, next(run.loader))
    return run


def saved(run):
    run.save()
    run.saver.finish()
    return run


@pytest.fixture
def base(make_config):
    return find_checkpoint(saved(trained(make_config("base"), 2)).folder)


@pytest.fixture
def adapted_config(make_config, base):
    def make(out="adapted", **sections):
        adapter = {"rank": 3, "alpha": 6.0} | sections.pop("adapter", {})
        return make_config(out, load={"from": str(base)}, adapter=adapter, **sections)

    return make


def weights_of(run):
    return {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}


def logits(model, tokens_BT):
    positions_BT = torch.arange(tokens_BT.shape[1])[None].expand_as(tokens_BT)
    attend = make_segment_attend([(tokens_BT.shape[1],)] * len(tokens_BT), CPU)
    with torch.no_grad():
        return model.lm_head(model(tokens_BT, positions_BT, attend))


def whole(opened: OpenModel):
    model = build_model(opened.config)
    fill_model(model, opened.weights)
    return model


TOKENS = torch.randint(1, 64, (2, 30), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_new_adapter_changes_nothing(adapted_config, base, kind):
    run = set_up(adapted_config(adapter={"kind": kind}))
    torch.testing.assert_close(logits(run.model, TOKENS), logits(whole(open_model(base)), TOKENS), rtol=0, atol=2e-6)


@pytest.mark.parametrize("adapter", KINDS, ids=str)
def test_training_lowers_the_loss_and_leaves_frozen_weights_as_they_are(adapted_config, make_config, adapter):
    run = set_up(adapted_config(adapter=adapter, data={"validation_fraction": 0.2}))
    before, loss = weights_of(run), validate(run)["validation_loss/numbers"]
    frozen = [linear.packed.codes.clone() for linear in packed(run)]
    with run.loader:
        for _ in range(6):
            train_step(run, next(run.loader))
    assert validate(run)["validation_loss/numbers"] < loss - 0.05
    for name, weight in weights_of(run).items():
        changes = ".lora_" in name or name.endswith("magnitude")
        assert torch.equal(weight, before[name]) != changes, name
    assert all(torch.equal(a, linear.packed.codes) for a, linear in zip(frozen, packed(run), strict=True))


def packed(run):
    return [m for m in run.model.modules() if getattr(m, "packed", None) is not None]


@pytest.mark.parametrize("adapter", KINDS, ids=str)
def test_resumed_is_uninterrupted_bit_for_bit(adapted_config, adapter):
    straight = trained(adapted_config("straight", adapter=adapter), 6)
    saved(trained(adapted_config("stopped", adapter=adapter), 3))
    resumed = trained(adapted_config("stopped", adapter=adapter), 3)
    assert resumed.progress.step == 6
    assert torch.equal(
        parameters_to_vector(resumed.model.parameters()), parameters_to_vector(straight.model.parameters())
    )


@pytest.mark.parametrize("adapter", KINDS, ids=str)
def test_the_merged_model_is_the_one_that_was_trained(adapted_config, adapter):
    run = saved(trained(adapted_config(adapter=adapter), 4))
    merged = whole(open_model(run.folder))
    found, wanted = logits(merged, TOKENS), logits(run.model, TOKENS)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_holds_the_adapters_alone(adapted_config):
    run = saved(trained(adapted_config(), 1))
    tensors = open_adapter(run.folder).tensors
    assert len(tensors) == 2 * 7 * 2
    assert all(".lora_" in name for name in tensors)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_peft_finds_the_same_logits_with_our_adapter(adapted_config, base, tmp_path, kind, rank_stabilized):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    run = saved(trained(adapted_config(adapter={"kind": kind, "rank_stabilized": rank_stabilized}), 4))
    export_hf(open_model(base), tmp_path / "hf")
    write_adapter(open_adapter(run.folder), tmp_path / "peft")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft")
    with torch.no_grad():
        found = theirs(TOKENS).logits
    torch.testing.assert_close(logits(run.model, TOKENS), found, rtol=1e-5, atol=1e-5)
    merged = open_model(tmp_path / "peft", tmp_path / "hf")
    torch.testing.assert_close(logits(whole(merged), TOKENS), found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_of_pefts_is_read_and_trained_further(adapted_config, base, tmp_path, kind):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    export_hf(open_model(base), tmp_path / "hf")
    settings = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], use_dora=kind == "dora", init_lora_weights=False
    )
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    theirs = peft.get_peft_model(theirs, settings).eval()
    theirs.save_pretrained(tmp_path / "peft")
    targets = {"targets": ["q_proj", "down_proj"], "from": str(tmp_path / "peft"), "kind": kind}
    run = set_up(adapted_config(adapter=targets))
    with torch.no_grad():
        torch.testing.assert_close(logits(run.model, TOKENS), theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(CheckpointError, match=r"is of q_proj, down_proj, and adapter.targets has .*v_proj"):
        set_up(adapted_config("other", adapter={"from": str(tmp_path / "peft"), "kind": kind}))
    with pytest.raises(CheckpointError, match=r"its rank is 3, and adapter.rank is 4; set it to 3"):
        set_up(adapted_config("other", adapter=targets | {"rank": 4}))


def test_adapters_stay_with_the_base_that_they_began_with(adapted_config, make_config, base):
    saved(trained(adapted_config(), 1))
    saved(trained(make_config("base", train={"steps": 9}), 1))  # goes on, and has a newer checkpoint
    of_run = adapted_config()
    of_run = of_run.model_copy(update={"load": of_run.load.model_copy(update={"checkpoint": make_config("base").out})})
    assert set_up(of_run).facts["adapter"]["base"] == str(base)
    shutil.rmtree(base)
    with pytest.raises(CheckpointError, match=r"set load\.from to the model that the run began with"):
        set_up(of_run)
    with pytest.raises(CheckpointError, match=r"isn't there any more; put it back, or name it: --base MODEL"):
        open_model(adapted_config().out)
    with pytest.raises(CheckpointError, match="has other weights"):
        open_model(adapted_config().out, make_config("base").out)


def test_a_base_is_told_from_itself_with_other_adapters_put_in(adapted_config, make_config):
    first = saved(trained(adapted_config("first", adapter={"targets": ["v_proj"]}), 2))
    second = make_config("second", load={"from": str(first.folder)}, adapter={"rank": 2})
    saved(trained(second, 1))
    saved(trained(adapted_config("first", adapter={"targets": ["v_proj"]}, train={"steps": 9}), 1))
    assert set_up(second).facts["adapter"]["base"].endswith("step-00000002")
    shutil.rmtree(first.folder / "checkpoints" / "step-00000002")
    with pytest.raises(CheckpointError, match=r"set load\.from to the model"):  # whose norms are the same
        set_up(second)


def test_a_run_with_other_adapters_is_refused(adapted_config, make_config, base):
    saved(trained(adapted_config(), 1))
    with pytest.raises(CheckpointError, match=r"adapter.rank was 3 and is 5"):
        set_up(adapted_config(adapter={"rank": 5}))
    with pytest.raises(CheckpointError, match="its run trains adapters, and this one none"):
        set_up(make_config("adapted", load={"from": str(base)}))
    saved(trained(make_config("whole", load={"from": str(base)}), 1))
    with pytest.raises(CheckpointError, match="its run trains no adapters, and this one some"):
        set_up(adapted_config("whole"))
    with pytest.raises(ConfigError, match="holds a whole model, no adapters"):
        open_adapter(base)


def test_what_isnt_an_adapter_of_the_blocks_matrices_is_refused(adapted_config, tmp_path):
    run = saved(trained(adapted_config(), 1))
    write_adapter(open_adapter(run.folder), tmp_path / "peft")
    with pytest.raises(ConvertError, match="exists already"):
        write_adapter(open_adapter(run.folder), tmp_path / "peft")
    settings = tmp_path / "peft" / "adapter_config.json"
    good = settings.read_text()
    for before, after, message in (
        ('"LORA"', '"IA3"', "peft_type is 'IA3'"),
        ('"rank_pattern": {}', '"rank_pattern": {"q_proj": 8}', "rank_pattern"),
        ('"modules_to_save": null', '"modules_to_save": ["lm_head"]', "modules_to_save"),
        ('"r": 3', '"r": 0', "doesn't describe an adapter"),
    ):
        settings.write_text(good.replace(before, after))
        with pytest.raises(ConvertError, match=message):
            read_adapter(tmp_path / "peft")


def test_frozen_weights_in_bfloat16_train_in_float32(adapted_config):
    run = trained(adapted_config(adapter={"base": "bfloat16"}), 2)
    dtypes = {name.split(".")[-2] in ("lora_A", "lora_B"): p.dtype for name, p in run.model.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert run.progress.updates == 2


@pytest.mark.parametrize("adapter", [None, {"rank": 2}], ids=["whole", "more adapters"])
def test_training_goes_on_from_adapters_put_in(adapted_config, make_config, tmp_path, adapter):
    first = saved(trained(adapted_config("first"), 4))
    write_adapter(open_adapter(first.folder), tmp_path / "peft")
    for name, start in (("run", first.folder), ("peft", tmp_path / "peft")):
        more = {} if adapter is None else {"adapter": adapter}
        second = set_up(make_config(f"second-{name}", load={"from": str(start)}, **more))
        torch.testing.assert_close(logits(second.model, TOKENS), logits(first.model, TOKENS), rtol=1e-5, atol=1e-5)
        with second.loader:
            train_step(second, next(second.loader))
        saved(second)
        found, wanted = logits(whole(open_model(second.folder)), TOKENS), logits(second.model, TOKENS)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def losses_on_ranks(config):
    train_run.find_tokenizer = lambda data: None  # as `make_config` has it in its own process
    layout = resolve_layout(config, torch.distributed.get_world_size())
    return losses_of(config, make_mesh(layout, torch.distributed.get_rank(), CPU))


def losses_of(config, mesh=None):
    run = set_up(config, "never", mesh)
    with run.loader:
        return [train_step(run, next(run.loader)).loss.mean for _ in range(5)]


@pytest.mark.parametrize(
    ("adapter", "dtype", "allowed"),
    [({"base": "nf4"}, "float32", 1e-5), ({"kind": "dora", "base": "nf4"}, "float32", 1e-5), ({}, "bfloat16", 5e-3)],
    ids=str,
)
def test_two_ranks_train_frozen_weights_of_other_formats_as_one_does(adapted_config, adapter, dtype, allowed):
    compute = {"dtype": dtype}
    alone = losses_of(adapted_config("alone", adapter=adapter, compute=compute))
    sharding = {"params": 2, "grads": 2, "optimizer": 2}
    together = adapted_config("together", adapter=adapter, compute=compute, sharding=sharding)
    for found in run_ranks(2, losses_on_ranks, together):
        assert found == pytest.approx(alone, rel=allowed)


def test_a_base_is_named_where_it_moved_and_refused_where_there_is_no_adapter(adapted_config, make_config, base):
    run = saved(trained(adapted_config(), 2))
    wanted = logits(whole(open_model(run.folder)), TOKENS)
    moved = base.parents[3] / "moved"
    shutil.move(base, moved)
    torch.testing.assert_close(logits(whole(open_model(run.folder, moved)), TOKENS), wanted, rtol=0, atol=0)
    with pytest.raises(
        ConfigError, match=r"--base .* has no effect: .* holds a whole model, no adapters; leave it out"
    ):
        open_model(moved, moved)

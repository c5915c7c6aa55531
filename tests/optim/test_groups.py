import pytest
import torch

from ternlm.config.adapter import AdapterConfig
from ternlm.config.model import ModelConfig
from ternlm.config.training import OptimizerConfig
from ternlm.model.decoder import build_model
from ternlm.model.linear import adapt
from ternlm.optim.groups import build_optimizers
from ternlm.parallel.mesh import one_rank
from ternlm.parallel.pieces import make_pieces


def model():
    return build_model(ModelConfig(preset="tiny", attention_bias=True, qk_norm=True))


def optimizers_of(lm, config):
    mesh = one_rank(torch.device("cpu"))
    return build_optimizers(make_pieces(lm, mesh), config, mesh)


def decays(optimizers, model):
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    listed = [(names[p], group["weight_decay"]) for group in groups for p in group["params"]]
    assert len(listed) == len(dict(listed)) == len(names)
    return dict(listed)


def test_norms_and_biases_are_not_decayed():
    lm = model()
    decayed = {name for name, decay in decays(optimizers_of(lm, OptimizerConfig()), lm).items() if decay}
    assert decayed == {name for name, p in lm.named_parameters() if p.ndim == 2}


def test_decay_all_decays_everything_as_the_ancestor_did():
    lm = model()
    assert set(decays(optimizers_of(lm, OptimizerConfig(decay_all=True)), lm).values()) == {0.1}


@pytest.mark.parametrize("tie", [True, False])
def test_muon_takes_the_blocks_matrices_and_adamw_the_rest(tie):
    lm = build_model(ModelConfig(preset="tiny", tie_word_embeddings=tie))
    adamw, muon = optimizers_of(lm, OptimizerConfig(kind="muon"))
    names = {parameter: name for name, parameter in lm.named_parameters()}
    taken = {names[p] for group in muon.param_groups for p in group["params"]}
    assert taken == {name for name in names.values() if "proj.weight" in name}
    rest = {names[p] for group in adamw.param_groups for p in group["params"]}
    assert rest | taken == set(names.values())
    assert isinstance(adamw, torch.optim.AdamW)


def test_muon_takes_all_of_low_rank_adapters():
    lm = build_model(ModelConfig(preset="tiny"))
    adapt(lm, AdapterConfig(rank=4), torch.float32)
    mesh = one_rank(torch.device("cpu"))
    trained = [piece for piece in make_pieces(lm, mesh) if piece.parameter.requires_grad]
    (muon,) = build_optimizers(trained, OptimizerConfig(kind="muon"), mesh)
    assert sum(len(group["params"]) for group in muon.param_groups) == len(trained) == 2 * 2 * 7

"""Put weights of any source into a model."""

import torch

from ternlm.convert.weights import Weights
from ternlm.model.decoder import CausalLM


@torch.no_grad()
def fill_model(model: CausalLM, weights: Weights) -> None:
    """Fill a whole model's parameters, in place; one tensor is read at a time."""
    for name, parameter in model.named_parameters():
        parameter.copy_(weights.read(name))

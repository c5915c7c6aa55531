"""Fills a model that was built empty from weights, a tensor at a time."""

import torch
from torch import nn

from ternlm.convert.weights import Weights


@torch.no_grad()
def fill_model(model: nn.Module, weights: Weights) -> None:
    """Copy the weights into a model's parameters, in the parameters' dtype; a tied head comes with its embedding.

    The names and shapes must be the model's: see `check_weights`.
    """
    for name, parameter in model.named_parameters():
        parameter.copy_(weights.read(name))

"""What an export may change of a model: how far its context reaches, and how one chats with it."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from ternlm.config.model import ModelConfig, RopeScaling
from ternlm.convert.weights import ConvertError, OpenModel
from ternlm.data.chat import ChatProtocol

logger = logging.getLogger(__name__)


def stretch(config: ModelConfig, rope: str, max_length: int | None) -> ModelConfig:
    """Return the settings with another way to go past the trained length.

    rope: "keep"; "none"; "dynamic" (the base grows with the length: Hugging Face and LMDeploy); "static-ntk" (the base
    that dynamic has at `max_length`, fixed: every engine); "yarn". max_length (tokens): needed by the last two.
    """
    if rope == "keep":
        if max_length is not None:
            raise ConvertError(f"max_length = {max_length} has no effect with rope = 'keep'; choose static-ntk or yarn")
        return config
    kind, trained = config.rope_scaling.kind, config.rope_original_length
    if kind not in ("default", "dynamic"):
        raise ConvertError(
            f"rope = {rope!r} would take the place of the {kind!r} scaling that the model was trained with; leave it "
            "at 'keep'"
        )
    if rope in ("static-ntk", "yarn") and (max_length is None or max_length <= trained):
        raise ConvertError(
            f"rope = {rope!r} needs a max_length above the trained length, {trained} tokens, not {max_length}; give one"
        )
    if rope == "none":
        return _replaced(config, rope_scaling=RopeScaling(), max_position_embeddings=trained)
    if rope == "dynamic":
        factor = config.rope_scaling.factor if config.rope_scaling.kind == "dynamic" else 1.0
        return _replaced(
            config, rope_scaling=RopeScaling(kind="dynamic", factor=factor), max_position_embeddings=trained
        )
    assert max_length is not None
    if rope == "static-ntk":
        factor, head = config.rope_scaling.factor, config.head_size
        theta = config.rope_theta * (factor * max_length / trained - (factor - 1)) ** (head / (head - 2))
        return _replaced(config, rope_theta=theta, rope_scaling=RopeScaling(), max_position_embeddings=max_length)
    scaling = RopeScaling(kind="yarn", factor=max_length / trained, original_max_position_embeddings=trained)
    return _replaced(config, rope_scaling=scaling, max_position_embeddings=max_length)


def tell_shortened(model: OpenModel, out: Path, context: int) -> None:
    """Warn where `out` is given a shorter context (tokens) than the model has, or than its source named."""
    named = int(model.facts.get("source", {}).get("context", 0))
    own = model.config.max_position_embeddings
    if context < own:
        logger.warning(
            "%s: its context is %s tokens, the length trained for, not %s: longer ones need another --rope",
            out, f"{context:,}", f"{own:,}",
        )  # fmt: skip
    elif context < named:
        logger.warning(
            "%s: its context is %s tokens, not %s: the source's attention looks back no further, which isn't supported "
            "over longer ones",
            out, f"{context:,}", f"{named:,}",
        )  # fmt: skip


def with_protocol(model: OpenModel, chat: ChatProtocol) -> OpenModel:
    """Return the model with a chat protocol of ours; raises DataError where its tokenizer lacks the tokens."""
    if model.tokenizer is None:
        raise ConvertError(f"{model.path}: has no tokenizer, without which nobody can chat; put a tokenizer.json there")
    tokenizer = chat.fit(model.tokenizer)
    ends = [tokenizer.id_of(token) for token in chat.stop]
    generation = {**model.facts.get("generation", {}), "eos_token_id": ends}
    facts = {**model.facts, "chat_template": chat.template, "generation": generation, "eos_token": chat.stop[0]}
    return replace(model, tokenizer=tokenizer, facts=facts)


def _replaced(config: ModelConfig, **changes: Any) -> ModelConfig:
    return config.model_copy(update=changes)

"""Training checkpoints of the ancestor, InternLM's framework of 2023, opened as a model of ours.

A checkpoint's folder has `model_tp{t}_pp{p}.pt` for each tensor-parallel rank t and pipeline part p. Matrices are
merged over t while they are read, one at a time; layers are counted on over p. The optimizer's states aren't read.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from ternlm.config.explain import explain
from ternlm.config.model import ModelConfig, RopeScaling
from ternlm.convert.python_values import read_values
from ternlm.convert.torch_files import Pieces, PiecesWeights, load_harmless, load_tensors
from ternlm.convert.weights import ConvertError, OpenModel, check_weights, model_shapes

Norms = Literal["equal", "mean"]

_FILE = re.compile(r"^model_tp(0|[1-9]\d{0,5})_pp(0|[1-9]\d{0,5})\.pt$")
_NAME = re.compile(r"^(?:(\d{1,4})\.)?(?:model\.)?(?:blocks\.(\d{1,5})\.)?(.+)$")
_WHOLE = None  # the same on each rank
_EMBEDDING, _NORM = "model.embed_tokens.weight", "model.norm.weight"

# The ancestor's names outside and inside a block: our name, and the dim that tensor-parallel ranks share out.
_OUTSIDE: dict[str, tuple[str, int | None]] = {
    "embedding.weight": (_EMBEDDING, 1),
    "embedding.word_embeddings.weight": (_EMBEDDING, 0),
    "norm.weight": (_NORM, _WHOLE),
    "head.weight": ("lm_head.weight", 0),
}
_INSIDE: dict[str, tuple[str, int | None]] = {
    "mixer.Wqkv.weight": ("self_attn.{}_proj.weight", 0),
    "mixer.Wqkv.bias": ("self_attn.{}_proj.bias", 0),
    "mixer.out_proj.weight": ("self_attn.o_proj.weight", 1),
    "mixer.out_proj.bias": ("self_attn.o_proj.bias", _WHOLE),
    "mlp.w1.weight": ("mlp.gate_proj.weight", 0),
    "mlp.w2.weight": ("mlp.up_proj.weight", 0),
    "mlp.w3.weight": ("mlp.down_proj.weight", 1),
    "norm1.weight": ("input_layernorm.weight", _WHOLE),
    "norm2.weight": ("post_attention_layernorm.weight", _WHOLE),
}
_FREQUENCIES = "mixer.rotary_emb.inv_freq"
# What other models of the ancestor and its successors have, by a part of a name.
_OTHERS = {
    "mlp.fc": "an MLP with GELU (use_swiglu = False)",
    "norm1.bias": "LayerNorm (norm_type)",
    "rotary_emb.scale": "XPos positions",
    "moe": "a mixture of experts",
    "experts": "a mixture of experts",
    "attention.wqkv": "InternLM2",
    "wq.weight": "Llama",
}


def open_internlm(folder: Path, *, heads: int | None = None, norms: Norms = "equal") -> OpenModel:
    """Open a training checkpoint of the ancestor; nothing that its files hold is run.

    heads: number of attention heads, where neither `model_config.pt` nor anything else in the folder tells it.
    norms: what to do where tensor-parallel ranks hold different norms, as sequence parallelism left them until
    October 2023: "equal" refuses them, "mean" takes their mean.
    """
    grid = _open_grid(folder)
    stages = [_split_names(folder, part, ranks) for part, ranks in enumerate(grid)]
    tensors, frequencies = _merge(folder, _in_order(folder, stages), norms)
    told = _read_settings(folder)
    config = _derive(folder, tensors, told, len(grid[0]), heads, frequencies)
    weights = PiecesWeights({name: tensors[name] for name in model_shapes(config) if name in tensors} | tensors)
    check_weights(folder, config, weights)
    training = {"tensor": len(grid[0]), "pipeline": len(grid)} | _read_progress(folder)
    return OpenModel(folder, config, weights, facts={"training": training})


def _open_grid(folder: Path) -> list[list[dict[str, Tensor]]]:
    """Open the files of each pipeline part, in the order of the tensor-parallel ranks."""
    if not folder.is_dir():
        raise ConvertError(f"{folder}: no such folder; give the folder that holds model_tp0_pp0.pt")
    found = {(int(m[1]), int(m[2])): path for path in folder.iterdir() if (m := _FILE.match(path.name))}
    if not found:
        steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())
        there = f"; it has checkpoints of steps {', '.join(map(str, steps[-4:]))}: give one, {folder / str(steps[-1])}"
        raise ConvertError(f"{folder}: holds no model_tp0_pp0.pt{there if steps else ''}")
    tensor, pipeline = (max(place[i] for place in found) + 1 for i in (0, 1))
    lost = ((t, p) for p in range(pipeline) for t in range(tensor) if (t, p) not in found)
    missing = [f"model_tp{t}_pp{p}.pt" for t, p in islice(lost, 4)]
    if missing:
        raise ConvertError(
            f"{folder}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing of {tensor} "
            f"tensor-parallel ranks x {pipeline} pipeline parts; copy the whole checkpoint"
        )
    return [[load_tensors(found[t, p]) for t in range(tensor)] for p in range(pipeline)]


@dataclass
class _Stage:
    """Consecutive layers: what each rank holds by the ancestor's name, outside blocks and by block."""

    part: int
    outside: dict[str, list[Tensor]] = field(default_factory=dict)
    blocks: dict[int, dict[str, list[Tensor]]] = field(default_factory=dict)


def _split_names(folder: Path, part: int, ranks: list[dict[str, Tensor]]) -> list[_Stage]:
    """Return the stages of a pipeline part: one, or several where it has interleaved chunks."""
    stages: dict[int, _Stage] = {}
    for name in dict.fromkeys(name for rank in ranks for name in rank):
        match = _NAME.match(name)
        chunk, block, tail = (match[1], match[2], match[3]) if match else (None, None, name)
        if tail not in (_OUTSIDE if block is None else _INSIDE) and tail != _FREQUENCIES:
            other = next((what for word, what in _OTHERS.items() if word in tail), "another model")
            raise ConvertError(
                f"{folder / f'model_tp0_pp{part}.pt'}: {name[:80]!r} belongs to {other}; what can be read is the "
                "ancestor's model INTERNLM, with RMSNorm and SwiGLU"
            )
        stage = stages.setdefault(int(chunk or 0), _Stage(part))
        place = stage.outside if block is None else stage.blocks.setdefault(int(block), {})
        place[tail] = _same_on_ranks(folder, part, ranks, name, tail)
    for stage in stages.values():
        lost = sorted(set(range(len(stage.blocks))) - stage.blocks.keys())
        if lost:
            raise ConvertError(f"{folder / f'model_tp0_pp{part}.pt'}: has no layer {lost[0]}; copy the file again")
    return [stages[chunk] for chunk in sorted(stages)]


def _same_on_ranks(folder: Path, part: int, ranks: list[dict[str, Tensor]], name: str, tail: str) -> list[Tensor]:
    """Return a tensor's pieces by rank; a row-parallel matrix's bias may be on the first rank alone."""
    pieces = [rank[name] for rank in ranks if name in rank]
    if len(pieces) < len(ranks) and (tail != "mixer.out_proj.bias" or name not in ranks[0]):
        lacking = next(t for t, rank in enumerate(ranks) if name not in rank)
        raise ConvertError(
            f"{folder / f'model_tp{lacking}_pp{part}.pt'}: has no {name}, which other tensor-parallel ranks have; "
            "see whether the files are of one checkpoint"
        )
    for t, piece in enumerate(pieces):
        if piece.shape != pieces[0].shape or piece.dtype != pieces[0].dtype:
            raise ConvertError(
                f"{folder / f'model_tp{t}_pp{part}.pt'}: {name} is {tuple(piece.shape)}, {piece.dtype}, and "
                f"{tuple(pieces[0].shape)}, {pieces[0].dtype} on tensor-parallel rank 0; see whether the files are of "
                "one checkpoint"
            )
    return pieces


def _in_order(folder: Path, parts: list[list[_Stage]]) -> list[_Stage]:
    """Return all stages in the order of the model: first chunk of each part, then second of each, and so on."""
    if len({len(stages) for stages in parts}) > 1:
        raise ConvertError(f"{folder}: its pipeline parts have different numbers of chunks; copy the whole checkpoint")
    return [stages[chunk] for chunk in range(len(parts[0])) for stages in parts]


def _merge(folder: Path, stages: list[_Stage], norms: Norms) -> tuple[dict[str, Pieces], int | None]:
    """Return the pieces of each of our tensors, and how many rotary frequencies the files tell."""
    merged: dict[str, Pieces] = {}
    frequencies, layer = None, 0
    for stage in stages:
        file = folder / f"model_tp0_pp{stage.part}.pt"
        for tail, pieces in stage.outside.items():
            name, dim = _OUTSIDE[tail]
            if name in merged or stage is not (stages[0] if name == _EMBEDDING else stages[-1]):
                raise ConvertError(
                    f"{file}: {tail} doesn't belong into this pipeline part, or is there twice; see whether the files "
                    "are of one checkpoint"
                )
            merged[name] = _pieces(file, tail, pieces, dim, norms)
        for block in (stage.blocks[number] for number in range(len(stage.blocks))):
            for tail, pieces in block.items():
                if tail == _FREQUENCIES:
                    frequencies = pieces[0].numel()
                    continue
                name, dim = _INSIDE[tail]
                for ours, own in _split_fused(file, layer, tail, name, pieces):
                    merged[f"model.layers.{layer}.{ours}"] = _pieces(file, tail, own, dim, norms)
            layer += 1
    if _EMBEDDING not in merged:
        raise ConvertError(f"{folder}: its first pipeline part has no embedding; copy the whole checkpoint")
    if _NORM not in merged:
        raise ConvertError(
            f"{folder}: its last pipeline part has no final norm, so model_tp0_pp{stages[-1].part + 1}.pt is missing, "
            "and perhaps more; copy the whole checkpoint"
        )
    return merged, frequencies


def _split_fused(
    file: Path, layer: int, tail: str, name: str, pieces: list[Tensor]
) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield a tensor, or the three of a fused one: on each rank its heads of q, then of k, then of v."""
    if "{}" not in name:
        yield name, pieces
        return
    if pieces[0].dim() == 0 or pieces[0].shape[0] % 3:
        raise ConvertError(
            f"{file}: {tail} of layer {layer} is {tuple(pieces[0].shape)}, whose rows aren't q, k and v of one size"
        )
    for i, letter in enumerate("qkv"):
        yield name.format(letter), [piece.chunk(3)[i] for piece in pieces]


def _pieces(file: Path, tail: str, pieces: list[Tensor], dim: int | None, norms: Norms) -> Pieces:
    if pieces[0].dim() <= (dim or 0):
        raise ConvertError(f"{file}: {tail} is {tuple(pieces[0].shape)}, which has too few dimensions")
    if dim is not None:
        return Pieces(pieces, dim)
    if all(torch.equal(piece, pieces[0]) for piece in pieces[1:]):
        return Pieces(pieces[:1])
    if norms == "mean" and "norm" in tail:
        return Pieces([torch.stack([piece.float() for piece in pieces]).mean(0).to(pieces[0].dtype)])
    apart = max(float((piece.float() - pieces[0].float()).abs().max()) for piece in pieces[1:])
    cause = (
        ". Sequence parallelism left norms so until October 2023: no one model is what was trained; the nearest is "
        "their mean, open_internlm(..., norms='mean')"
        if "norm" in tail
        else "; see whether the files are of one checkpoint"
    )
    raise ConvertError(f"{file}: tensor-parallel ranks disagree about {tail}, by up to {apart:.3g}{cause}")


def _derive(
    folder: Path,
    tensors: Mapping[str, Pieces],
    told: "_Told",
    ranks: int,
    heads: int | None,
    frequencies: int | None,
) -> ModelConfig:
    """Return the shape of the model: the tensors' sizes, and from the settings what tensors don't show."""
    layers = sum(name.endswith("input_layernorm.weight") for name in tensors)
    hidden, vocab = tensors[_NORM].shape[0], tensors[_EMBEDDING].shape[0]
    first = {name.removeprefix("model.layers.0."): pieces for name, pieces in tensors.items()}
    q, gate = first.get("self_attn.q_proj.weight"), first.get("mlp.gate_proj.weight")
    if q is None or gate is None:
        raise ConvertError(f"{folder}: its first layer has no Wqkv or no w1; copy the whole checkpoint")
    if q.shape[0] != hidden and hidden % q.shape[0] == 0:
        raise ConvertError(
            f"{folder}: its {ranks} tensor-parallel rank(s) hold {q.shape[0]} of {hidden} rows of q; "
            f"{hidden // q.shape[0] * ranks - ranks} more rank(s) belong to it: copy the whole checkpoint"
        )
    head = tensors.get("lm_head.weight")
    if told.model.get("is_reward") or (head is not None and head.shape[0] == ranks != vocab):
        raise ConvertError(
            f"{folder}: is a reward model (is_reward), with a score for a head; a language model is read"
        )
    told.check(hidden_size=hidden, num_layers=layers, vocab_size=vocab)
    model = told.model
    dynamic = bool(model.get("use_dynamic_ntk_rope"))
    try:
        return ModelConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=_find_heads(folder, told, hidden, heads, frequencies),
            intermediate_size=gate.shape[0],
            attention_bias="self_attn.q_proj.bias" in first,
            rms_norm_eps=float(told.number("layer_norm_epsilon", 1e-5)),
            rope_theta=float(told.number("rope_base", 10000.0)),
            rope_scaling=RopeScaling(kind="dynamic" if dynamic else "default"),
            max_position_embeddings=int(told.number("max_position_embeddings", 2048 if dynamic else told.length)),
        )
    except ValidationError as trouble:
        raise ConvertError(str(explain(trouble, ModelConfig, str(folder)))) from None


def _find_heads(folder: Path, told: "_Told", hidden: int, heads: int | None, frequencies: int | None) -> int:
    """Return the number of heads, on which all that tell it must agree."""
    known: dict[str, int] = {} if heads is None else {"the argument heads": heads}
    if "num_attention_heads" in told.model:
        known[told.origin] = int(told.number("num_attention_heads", 0))
    if frequencies:
        known[_FREQUENCIES] = hidden // (2 * frequencies)
    if not known:
        raise ConvertError(
            f"{folder}: nothing tells the number of attention heads, on which no tensor's shape depends (neither "
            "model_config.pt nor config_file.pt is there); copy one of them, or open_internlm(..., heads=N)"
        )
    if len(set(known.values())) > 1:
        listed = ", ".join(f"{count} by {source}" for source, count in known.items())
        raise ConvertError(f"{folder}: the number of attention heads is {listed}; correct what is wrong")
    return next(iter(known.values()))


@dataclass(frozen=True)
class _Told:
    """What the files beside the weights tell of the model."""

    origin: str
    model: Mapping[str, Any]
    length: int = 2048

    def number(self, name: str, default: float) -> float:
        """Return a setting that must be a positive number."""
        value = self.model.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e15:
            raise ConvertError(f"{self.origin}: {name} = {value!r} must be a positive number")
        return value

    def check(self, **sizes: int) -> None:
        """Raise ConvertError where settings and tensors tell different sizes."""
        for name, size in sizes.items():
            if self.model.get(name, size) != size:
                raise ConvertError(
                    f"{self.origin}: {name} = {self.model[name]!r}, and the model files make it {size}; see whether "
                    "they are of one checkpoint and all there"
                )


def _read_settings(folder: Path) -> _Told:
    """Return the settings of `model_config.pt`, or else of the text in `config_file.pt`."""
    model: Any = None
    length, origin = 2048, folder / "model_config.pt"
    if origin.is_file():
        model = load_harmless(origin)
        if not isinstance(model, dict):
            raise ConvertError(f"{origin}: holds {type(model).__name__}, not settings; remove it to go without")
    file = folder / "config_file.pt"
    if file.is_file():
        text = load_harmless(file)
        lines: Sequence[Any] = text if isinstance(text, list) else [text]
        values = read_values("".join(map(str, lines)), str(file)).values
        data = values.get("data")
        given = data.get("seq_len") if isinstance(data, dict) else values.get("SEQ_LEN")
        length = given if isinstance(given, int) and given > 0 else length
        if model is None and isinstance(values.get("model"), dict):
            model, origin = values["model"], file
    return _Told(str(origin), model or {}, length)


def _read_progress(folder: Path) -> dict[str, int]:
    """Return how far the training was, if `context.pt` tells it."""
    path = folder / "context.pt"
    if not path.is_file():
        return {}
    state = load_harmless(path)
    if not isinstance(state, dict):
        raise ConvertError(f"{path}: holds {type(state).__name__}, not a training's state; remove it to go without")
    names = {"step_count": "steps", "num_consumed_tokens": "tokens"}
    return {ours: int(state[name]) for name, ours in names.items() if isinstance(state.get(name), Real)}

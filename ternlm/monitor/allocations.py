"""A ledger of live tensor memory by kind, and what it was made of when it was largest.

Counts the bytes of storages between their first appearance in an operator and their end, on real tensors and on fake
ones alike. It knows nothing of an allocator's rounding, fragments and caches, nor of what libraries allocate for
themselves.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    is_traceable_wrapper_subclass,
    is_traceable_wrapper_subclass_type,
)
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

KINDS = ("parameters", "gathered", "gradients", "optimizer", "activations", "logits", "communication")
"""parameters: this rank's shards; gathered: whole weights between gathering and freeing; activations: all that forward
and backward hold beside the rest, for backward or in flight; communication: what collectives read and write."""

Classify = Callable[[Tensor], str | None]
# What turns a gradient into another one of the same weight: FSDP2 adds them up over microbatches in the dtype of the
# reduction.
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.clone.default}


class AllocationLedger(TorchDispatchMode):
    """While active, follows each storage that an operator makes or is given.

    mark: sets the kind of tensors that exist; within: of those made inside a block. Weights' gradients, and what FSDP2
    gathers, reduces and sends, are told by themselves. listen: called after each operator that changed the total.
    """

    def __init__(self, listen: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.now = dict.fromkeys(KINDS, 0)
        """Live bytes by kind."""
        self.total = 0
        self.peak_total = 0
        self.peak = dict(self.now)
        """Live bytes by kind at the moment when the total was largest."""
        self._entries: dict[int, _Entry] = {}
        self._classify: list[Classify] = []
        self._hooked = WeakIdKeyDictionary()
        self._listen = listen
        self._told = 0
        self._undo: list[Callable[[], None]] = []

    def mark(self, kind: str, *tensors: Any, only: str | None = None) -> None:
        """Count the tensors' storages as `kind`; with `only`, just those that are of that kind now."""
        for storage in _storages(tensors):
            entry = self._follow(storage, kind)
            if entry.kind != kind and only in (None, entry.kind):
                self._add(entry.kind, -entry.num_bytes)
                entry.kind = kind
                self._add(kind, entry.num_bytes)
                if self.total == self.peak_total:  # still the same moment, better described
                    self.reset_peak()

    @contextmanager
    def within(self, classify: str | Classify) -> Iterator[None]:
        """Count new storages as `classify` says: a kind, or a function of the tensor that gives one, or None."""
        self._classify.append(classify if callable(classify) else lambda tensor: classify)
        try:
            yield
        finally:
            self._classify.pop()

    def reset_peak(self) -> None:
        """Let the peak be what is held now."""
        self.peak_total, self.peak = self.total, dict(self.now)

    def __enter__(self) -> "AllocationLedger":
        """Begin to follow."""
        resize = torch.UntypedStorage.resize_

        def followed_resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self._resized(storage)
            return result

        # FSDP2 frees and allocates weights by resizing their storage, which no operator shows.
        torch.UntypedStorage.resize_ = followed_resize  # type: ignore[method-assign, assignment]
        hook = register_module_forward_pre_hook(self._hook_weights)

        def undo() -> None:
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
            hook.remove()

        self._undo.append(undo)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop following; the figures stay."""
        super().__exit__(*error)
        self._undo.pop()()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run the operator, and count what it made."""
        if any(is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented  # a DTensor turns into plain tensors first
        result = func(*args, **(kwargs or {}))
        usual = "gradients" if func in _COPIES and self._kind_now(args[0]) == "gradients" else "activations"
        for tensor in tree_leaves(result):
            # DTensor asks for shapes on the meta device, where nothing takes memory.
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._follow(tensor.untyped_storage(), self._kind_of(tensor, usual))
        self._tell_communication(func, args, kwargs or {})
        if self.total > self.peak_total:
            self.reset_peak()
        if self._listen and self.total != self._told:
            self._told = self.total
            self._listen()
        return result

    def _kind_now(self, tensor: Tensor) -> str | None:
        entry = self._entries.get(tensor.untyped_storage()._cdata)
        return None if entry is None or entry.storage() is None else entry.kind

    def _kind_of(self, tensor: Tensor, usual: str) -> str:
        for classify in reversed(self._classify):
            kind = classify(tensor)
            if kind is not None:
                return kind
        return usual

    def _tell_communication(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        namespace = getattr(func, "namespace", "")
        if namespace not in ("fsdp", "c10d"):
            return
        name = func._schema.name
        if name == "fsdp::split_with_sizes_copy":
            self.mark("gathered", kwargs["out"], only="activations")
        elif name == "fsdp::chunk_cat":
            self.mark("gradients", args, kwargs.get("tensors"), only="activations")
            self.mark("communication", kwargs["out"], only="activations")
        elif name == "c10d::_reduce_scatter_base_":  # its result is the shard's gradient, or becomes it
            self.mark("gradients", args[0], only="activations")
            self.mark("communication", args[1], only="activations")
        else:
            self.mark("communication", args, only="activations")

    def _follow(self, storage: torch.UntypedStorage, kind: str) -> "_Entry":
        key = storage._cdata
        entry = self._entries.get(key)
        if entry is None or entry.storage() is None:
            entry = self._entries[key] = _Entry(storage, kind, self._ended)
            self._add(kind, entry.num_bytes)
        return entry

    def _ended(self, entry: "_Entry") -> None:
        self._add(entry.kind, -entry.num_bytes)
        entry.num_bytes = 0
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]

    def _resized(self, storage: torch.UntypedStorage) -> None:
        entry = self._entries.get(storage._cdata)
        if entry is not None and entry.storage() is not None:
            self._add(entry.kind, storage.nbytes() - entry.num_bytes)
            entry.num_bytes = storage.nbytes()
            if self.total > self.peak_total:
                self.reset_peak()

    def _add(self, kind: str, num_bytes: int) -> None:
        self.now[kind] += num_bytes
        self.total += num_bytes

    def _hook_weights(self, module: nn.Module, args: Any) -> None:
        """Have a weight's gradient counted as one from its birth; FSDP2 makes the weights of a pass just before it."""
        for weight in module._parameters.values():
            if weight is not None and weight.requires_grad and weight not in self._hooked:
                self._hooked[weight] = True
                self.mark("gathered", weight, only="activations")  # where a group of one has nothing to gather
                weight.register_hook(lambda grad: self.mark("gradients", grad, only="activations"))


class _Entry:
    """One followed storage."""

    def __init__(self, storage: torch.UntypedStorage, kind: str, ended: Callable[["_Entry"], None]) -> None:
        self.key = storage._cdata
        self.kind = kind
        self.num_bytes = storage.nbytes()
        self.storage = weakref.ref(storage, lambda reference: ended(self))


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    for tensor in tree_leaves(tree):
        if not isinstance(tensor, Tensor):
            continue
        if is_traceable_wrapper_subclass(tensor):
            yield from _storages([getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]])
        else:
            yield tensor.untyped_storage()

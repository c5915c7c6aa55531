"""The microbatches that training and validation draw: order, reading and packing put together.

`Loader` yields, per optimizer step, this rank's list of Batches, read ahead by threads. Its state is two
integers, the same on every rank; the data doesn't depend on threads, ranks or interruptions.
"""

import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple

from ternlm.config.data import BatchConfig, DataConfig
from ternlm.config.section import ConfigError
from ternlm.data.batch import Batch
from ternlm.data.errors import DataError
from ternlm.data.mixture import Mixture
from ternlm.data.order import first_sequence, permutation_keys, permute
from ternlm.data.pack import pack
from ternlm.data.source import EMPTY_WINDOW, Source, Window, check_tokenizers, open_source

_log = logging.getLogger(__name__)


class SequenceReader:
    """Read any sequences of the training data: a pure function of settings, seed and their indices."""

    def __init__(self, data: DataConfig, *, seed: int, vocab_size: int, fingerprint: str | None = None) -> None:
        self.sources = tuple(
            open_source(source, data, validation=False, fraction=data.validation_fraction) for source in data.sources
        )
        check_tokenizers(self.sources, vocab_size, fingerprint)
        self._data = data
        self._seed = seed
        self._vocab_size = vocab_size
        self._names = tuple(source.name for source in self.sources)
        sizes = [float(source.num_sequences) for source in self.sources]
        self._mixture = Mixture([s.weight or size for s, size in zip(data.sources, sizes, strict=True)], seed)

    def locate(self, sequence: int) -> tuple[int, int, int]:
        """Return source, epoch and position in the source of the sequence of that global index."""
        index, draw = self._mixture.pick(sequence)
        source = self.sources[index]
        epoch, rank_in_epoch = divmod(draw, source.num_sequences)
        keys = permutation_keys(self._seed, source.name, epoch)
        return index, epoch, permute(rank_in_epoch, source.num_sequences, keys)

    def read(self, first: int, count: int) -> Batch:
        """Read the sequences first..first+count-1 as one batch."""
        windows, types = [], []
        for sequence in range(first, first + count):
            index, _, position = self.locate(sequence)
            windows.append(_read_window(self.sources[index], position, self._vocab_size))
            types.append(index)
        across = self._data.packing == "across"
        return pack(windows, types, self._names, seq_len=self._data.seq_len, across=across)


class Loader:
    """Yield this rank's microbatches, step after step, for ever.

    A step of `skip_steps` yields an empty list: it is counted, and its sequences are passed over unread.
    Threads read at least `prefetch` microbatches and the whole next step ahead; they start at the first step
    and end with `close`, at the end of a `with` block, or when the loader is garbage collected.
    """

    def __init__(
        self,
        data: DataConfig,
        batch: BatchConfig,
        seed: int,
        vocab_size: int,
        *,
        rank: int = 0,
        world: int = 1,
        pin: bool = False,
        fingerprint: str | None = None,
    ) -> None:
        """Open and check all sources.

        rank, world: of the data-parallel ranks. pin: put batches into page-locked memory, for CUDA.
        fingerprint: of the run's tokenizer, which the data must have been made with; None: not checked.
        """
        batch.check_ranks(world)
        self.wait_seconds = 0.0
        """How long the last step waited for its data."""
        self._reader = SequenceReader(data, seed=seed, vocab_size=vocab_size, fingerprint=fingerprint)
        self._data = data
        self._batch = batch
        self._rank = rank
        self._world = world
        self._pin = pin
        self._step = 0
        self._sequence = 0
        self._ahead: deque[_Step] = deque()
        self._threads: ThreadPoolExecutor | None = None

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources, in the order of a Batch's `names`."""
        return self._reader.sources

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        self._read_ahead()
        step = self._ahead.popleft()
        start = time.perf_counter()
        try:
            microbatches = [future.result() for future in step.microbatches]
        except BaseException:
            self.close()
            raise
        self.wait_seconds = time.perf_counter() - start
        self._step += 1
        self._sequence += step.sequences
        self._read_ahead()
        return microbatches

    def state_dict(self) -> dict[str, int]:
        """Return where the data stands: the next step and the global index of its first sequence.

        It tells what was handed out, not what was read ahead, and is the same on every rank.
        """
        return {"step": self._step, "sequence": self._sequence}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a state, also one saved with another world size, other threads or another batch size."""
        self.close()
        self._step, self._sequence = int(state["step"]), int(state["sequence"])
        expected = first_sequence(self._batch, self._step)
        if self._sequence != expected:
            _log.warning(
                "the batch sizes differ from those of the saved run: step %d goes on at sequence %d, "
                "where these settings would have reached %d",
                self._step,
                self._sequence,
                expected,
            )

    def close(self) -> None:
        """End the threads and drop what was read ahead; iterating again starts from the same state."""
        self._ahead.clear()
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
            self._threads = None

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_ahead(self) -> None:
        """Plan whole steps until one is waiting and `prefetch` microbatches are on their way."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._data.workers, thread_name_prefix="ternlm-data")
        planned = sum(len(step.microbatches) for step in self._ahead)
        step = self._step + len(self._ahead)
        sequence = self._sequence + sum(ahead.sequences for ahead in self._ahead)
        # Steps that are skipped bring no microbatch, so that their number is bounded, too.
        while not self._ahead or (planned < self._data.prefetch and len(self._ahead) < self._data.prefetch):
            self._ahead.append(self._plan(self._threads, step, sequence))
            planned += len(self._ahead[-1].microbatches)
            sequence += self._ahead[-1].sequences
            step += 1

    def _plan(self, threads: ThreadPoolExecutor, step: int, first: int) -> "_Step":
        """Hand this rank's contiguous share of a step to the threads."""
        sequences = self._batch.sequences_at(step)
        if self._data.skipped(step + 1):
            return _Step(sequences, [])
        size = self._batch.microbatch_sequences
        share = sequences // self._world
        starts = range(first + self._rank * share, first + (self._rank + 1) * share, size)
        return _Step(sequences, [threads.submit(_read, self._reader, at, size, self._pin) for at in starts])


class ValidationBatches:
    """A held-out set as microbatches: the same ones in the same order at each iteration.

    Rows are padded, with weight 0, to full microbatches and to equal numbers of them on all ranks.
    """

    def __init__(
        self,
        source: Source,
        *,
        across: bool,
        size: int,
        vocab_size: int,
        max_sequences: int = 0,
        rank: int = 0,
        world: int = 1,
        pin: bool = False,
    ) -> None:
        self.source = source
        self.num_sequences = min(source.num_sequences, max_sequences or source.num_sequences)
        self._across = across
        self._size = size
        self._vocab_size = vocab_size
        self._rank = rank
        self._world = world
        self._pin = pin

    def __len__(self) -> int:
        return -(-self.num_sequences // (self._size * self._world))

    def __iter__(self) -> Iterator[Batch]:
        for number in range(len(self)):
            first = (number * self._world + self._rank) * self._size
            windows = [self._window(index) for index in range(first, first + self._size)]
            types = [0] * self._size
            batch = pack(windows, types, (self.source.name,), seq_len=self.source.seq_len, across=self._across)
            yield batch.pin() if self._pin else batch

    def _window(self, index: int) -> Window:
        if index >= self.num_sequences:
            return EMPTY_WINDOW
        # Spread over the source: its first documents alone may all be of one kind.
        position = index * self.source.num_sequences // self.num_sequences
        return _read_window(self.source, position, self._vocab_size)


def validation_batches(
    data: DataConfig,
    batch: BatchConfig,
    vocab_size: int,
    *,
    max_sequences: int = 0,
    rank: int = 0,
    world: int = 1,
    pin: bool = False,
    fingerprint: str | None = None,
) -> dict[str, ValidationBatches]:
    """Open everything held out, by source name: the held-out part of each source, and `data.validation`.

    max_sequences: of each set, spread evenly over it; 0: all. The last window is padded with weight 0.
    """
    sources = []
    if data.validation_fraction > 0:
        sources += [
            open_source(source, data, validation=True, fraction=data.validation_fraction) for source in data.sources
        ]
    sources += [open_source(source, data, validation=True, fraction=1.0) for source in data.validation]
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"data.validation: the name {name!r} is also that of a source, a part of which is held out "
                f"(data.validation_fraction = {data.validation_fraction:g}); give it another name"
            )
    check_tokenizers(sources, vocab_size, fingerprint)
    return {
        source.name: ValidationBatches(
            source,
            across=data.packing == "across",
            size=batch.microbatch_sequences,
            vocab_size=vocab_size,
            max_sequences=max_sequences,
            rank=rank,
            world=world,
            pin=pin,
        )
        for source in sources
    }


class _Step(NamedTuple):
    """A step that is being read ahead."""

    sequences: int
    """Of all ranks together."""
    microbatches: Sequence[Future[Batch]]
    """Of this rank."""


def _read(reader: SequenceReader, first: int, count: int, pin: bool) -> Batch:
    # A function, not the loader's method: a thread must not keep a forgotten loader alive.
    batch = reader.read(first, count)
    return batch.pin() if pin else batch


def _read_window(source: Source, position: int, vocab_size: int) -> Window:
    """Read a window and refuse ids that the model doesn't have."""
    window = source.window(position)
    if window.ids.max() < vocab_size:
        return window
    at = int((window.ids >= vocab_size).argmax())
    fragment = min(int((window.lengths.cumsum() <= at).sum()), len(window.lengths) - 1)
    raise DataError(
        f"source {source.name!r}, {source.store.place(int(window.documents[fragment]))}: token id "
        f"{window.ids[at]} is not below the model's vocab_size = {vocab_size}; the data was made by another "
        "tokenizer, or is damaged (`tern data inspect PATH --verify` checks it)"
    )

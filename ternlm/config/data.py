"""Where training tokens come from and how they become batches."""

from typing import Literal

from pydantic import model_validator

from ternlm.config.section import ConfigError, Section, refuse_ignored, setting


class SourceConfig(Section):
    """One named set of token shards or of InternLM `.bin` files."""

    name: str = setting(
        ...,
        "data type in the metrics, such as en, cn or code",
        min_length=1,
        pattern=r"^[A-Za-z0-9_.-]+$",
    )
    path: str = setting(
        ...,
        "folder written by `tern data prepare`, or a folder or file of InternLM .bin + .bin.meta",
        min_length=1,
    )
    weight: float | None = setting(
        None, "share of the sequences, relative to the other sources; its number of sequences if not given", gt=0
    )
    min_length: int = setting(0, "shorter documents are dropped", unit="tokens", ge=0)


class RampupConfig(Section):
    """Global batch that grows: `start`, then `increment` more every `every` steps, up to the full batch."""

    start: int = setting(..., "first global batch", unit="sequences", gt=0)
    increment: int = setting(..., "growth", unit="sequences", gt=0)
    every: int = setting(..., "steps at each size", unit="steps", gt=0)


class BatchConfig(Section):
    """How many sequences make a step. The global batch does not depend on the number of devices."""

    global_sequences: int = setting(..., "sequences per optimizer step", unit="sequences", gt=0)
    microbatch_sequences: int = setting(
        1, "sequences in one forward and backward of one device", unit="sequences", gt=0
    )
    rampup: RampupConfig | None = setting(None, "grow the global batch from a smaller one")

    @model_validator(mode="after")
    def _check(self) -> "BatchConfig":
        sizes = {"global_sequences": self.global_sequences}
        if self.rampup:
            sizes |= {"rampup.start": self.rampup.start, "rampup.increment": self.rampup.increment}
            if self.rampup.start > self.global_sequences:
                raise ValueError(
                    f"rampup.start = {self.rampup.start} must be at most global_sequences = {self.global_sequences}"
                )
        for name, size in sizes.items():
            if size % self.microbatch_sequences:
                raise ValueError(
                    f"{name} = {size} must be a multiple of microbatch_sequences = {self.microbatch_sequences}"
                )
        return self

    def check_ranks(self, ranks: int) -> None:
        """Raise ConfigError where the batches can't be shared out evenly among so many data-parallel ranks."""
        unit = self.microbatch_sequences * ranks
        sizes = {"batch.global_sequences": self.global_sequences}
        if self.rampup:
            sizes["batch.rampup.start"] = self.rampup.start
            sizes["batch.rampup.increment"] = self.rampup.increment
        for name, size in sizes.items():
            if size % unit:
                raise ConfigError(
                    f"{name} = {size} must be a multiple of microbatch_sequences x data-parallel ranks = "
                    f"{self.microbatch_sequences} x {ranks} = {unit}; choose {-(-size // unit) * unit}, or "
                    "other degrees"
                )

    def sequences_at(self, step: int) -> int:
        """Global batch (sequences) of the 0-based `step`."""
        if self.rampup is None:
            return self.global_sequences
        grown = self.rampup.start + self.rampup.increment * (step // self.rampup.every)
        return min(grown, self.global_sequences)


class DataConfig(Section):
    """Sources, mixture and packing."""

    tokenizer: str | None = setting(
        None,
        "tokenizer.json, sentencepiece .model or a folder holding one; the prepared data's own if not given",
    )
    seq_len: int = setting(2048, "tokens of one sequence", unit="tokens", gt=0)
    sources: tuple[SourceConfig, ...] = setting(..., "what to train on", min_length=1, strict=False)
    validation: tuple[SourceConfig, ...] = setting((), "what to validate on, beside validation_fraction", strict=False)
    validation_fraction: float = setting(0.0, "share of each source's documents held out for validation", ge=0, lt=1)
    packing: Literal["documents", "across", "pad", "best_fit"] = setting(
        "documents",
        "documents: full sequences, documents never see each other; across: full sequences, attention "
        "crosses documents (the ancestor's pack_sample_into_one); pad: one document a sequence, cut or "
        "padded; best_fit: whole documents, apart, as many as fit",
    )
    too_long: Literal["cut", "drop"] = setting(
        "cut", "pad and best_fit: a document longer than a sequence loses its end, or is left out"
    )
    skip_steps: str = setting(
        "",
        "steps, counted from 1 as in the metrics, whose batch is passed over, such as '100-200,512' (inclusive)",
        pattern=r"^$|^\d+(-\d+)?(,\d+(-\d+)?)*$",
    )
    workers: int = setting(1, "threads that read and pack batches ahead", gt=0)
    prefetch: int = setting(4, "microbatches kept ready", unit="microbatches", gt=0)

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        for group, sources in (("sources", self.sources), ("validation", self.validation)):
            names = [source.name for source in sources]
            if "total" in names:
                raise ValueError(f"{group}: the name 'total' is that of all sources' metrics together; choose another")
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(f"{group}: the name {sorted(twice)[0]!r} stands twice; names must be distinct")
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            bare = self.sources[weighted.index(False)].name
            raise ValueError(f"sources: {bare!r} has no weight; give a weight to all sources or to none")
        for source in self.validation:
            if source.weight is not None:
                raise ValueError(
                    f"validation: {source.name!r} has a weight, but validation sources are measured one by "
                    "one; remove the weight"
                )
        if self.packing not in ("pad", "best_fit"):
            refuse_ignored(self, ("too_long",), f"packing = {self.packing!r}", "set packing to 'best_fit' or 'pad'")
        for first, last in self.skipped_ranges:
            if first > last:
                raise ValueError(f"skip_steps: {first}-{last} runs backwards; write {last}-{first}")
        return self

    @property
    def skipped_ranges(self) -> list[tuple[int, int]]:
        """First and last step (counted from 1, both included) of each range in skip_steps."""
        parts = (part.partition("-") for part in self.skip_steps.split(",") if part)
        return [(int(first), int(last or first)) for first, _, last in parts]

    def skipped(self, step: int) -> bool:
        """Whether the `step`, counted from 1, is passed over."""
        return any(first <= step <= last for first, last in self.skipped_ranges)

"""The ancestor's settings by dotted name, each taken once, and what is said of those that have no counterpart.

`import_config` takes what it maps; `left_over` tells of all the rest.
"""

from collections.abc import Mapping
from typing import Any

from ternlm.convert.weights import ConvertError

_MOST = 2000
_KINDS: dict[type, tuple[tuple[type, ...], str]] = {
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "text"),
    bool: ((bool,), "True or False"),
}

# What happens instead, by name; and the values that change nothing, there and here alike, and aren't worth telling.
_INSTEAD: dict[str, tuple[tuple[Any, ...], str]] = {
    "model.embed_split_hidden": ((), "tensor-parallel ranks share out the embedding by parallel.tensor alone"),
    "model.embed_grad_scale": ((1,), "the embedding's and the head's gradients aren't scaled"),
    "model.parallel_output": ((), "the loss works in chunks; whole logits never exist"),
    "model.residual_in_fp32": ((False,), "the residual stream is in compute.dtype"),
    "model.drop_rate": ((0,), "there is no dropout"),
    "model.attn_drop_rate": ((0,), "there is no dropout"),
    "model.apply_post_layer_norm": ((False,), "blocks norm before attention and MLP, as they did there"),
    "model.dropout_selective_checkpoint": ((), "compute.recompute and recompute_keep say what is recomputed"),
    "model.use_scaled_init": ((True,), "model.init.kind = internlm scales by the layer"),
    "model.sequence_parallel": ((), "parallel.sequence_parallel says it"),
    "use_fp32_norm": ((True,), "norms compute in float32 and keep float32 weights"),
    "model.use_fp32_norm": ((True,), "norms compute in float32 and keep float32 weights"),
    "data.packed_length": ((), "follows from seq_len and micro_bsz, as there"),
    "data.gradient_accumulation": ((), "follows from micro_num, as there"),
    "data.batch_size": ((), "follows from micro_num, as there"),
    "data.min_length_dict": (({}, None), "data.sources have a min_length each: write a source for each type"),
    "data.valid_micro_num": ((), "validation goes in the microbatches of training"),
    "data.empty_cache_and_diag_interval": ((), "the cache isn't emptied and devices aren't measured during a run"),
    "data.diag_outlier_ratio": ((), "devices aren't measured during a run"),
    "ckpt.async_upload_tmp_folder": ((), "checkpoints are written in place and count once complete"),
    "ckpt.auto_resume": ((True,), "a run resumes by itself; `tern train --resume never` starts anew"),
    "ckpt.load_optimizer": ((False,), "only weights are taken over; the optimizer starts anew"),
    "ckpt.load_ckpt_info.ckpt_type": (("internlm",), "`tern import` sees what the files are"),
    "ckpt.snapshot_ckpt_folder": ((), "snapshots are checkpoints beside the others"),
    "hybrid_zero_optimizer.overlap_sync_grad": ((), "overlap with computing isn't a setting"),
    "hybrid_zero_optimizer.overlap_sync_param": ((), "overlap with computing isn't a setting"),
    "hybrid_zero_optimizer.zero_overlap_communication": ((), "overlap with computing isn't a setting"),
    "hybrid_zero_optimizer.reduce_bucket_size": ((), "the size of messages isn't a setting"),
    "hybrid_zero_optimizer.cpu_offload": ((False,), "states stay on the device; sharding cuts them"),
    "grad_scaler.fp16.initial_scale": ((2**16,), "with float16 the loss scale starts at 65536"),
    "grad_scaler.fp16.min_scale": ((1,), "with float16 the loss scale is 1 at least"),
    "grad_scaler.fp16.growth_interval": ((1000,), "with float16 the loss scale doubles after 1000 clean steps"),
    "grad_scaler.growth_factor": ((2,), "with float16 the loss scale doubles"),
    "grad_scaler.backoff_factor": ((0.5,), "with float16 the loss scale halves"),
    "grad_scaler.max_scale": ((2**24,), "with float16 the loss scale is 16777216 at most"),
    "grad_scaler.hysteresis": ((2,), "with float16 the loss scale falls from the second overflow on"),
    "adam.adam_beta2_c": ((0,), "beta2_scheduler.c says it"),
    "lr_scheduler.init_steps": ((0,), "warm-up begins with the first step"),
    "lr_scheduler.last_epoch": ((-1,), "a resumed run goes on with the schedule"),
    "beta2_scheduler.cur_iter": ((-1,), "a resumed run goes on with the schedule"),
    "parallel.pipeline.interleaved_overlap": ((), "overlap of transfers isn't a setting"),
    "cudnn_deterministic": ((False,), "order of sums on CUDA isn't fixed"),
    "cudnn_benchmark": ((False,), "kernels aren't tried out"),
    "tensorboard_folder": ((), "TensorBoard's files are in the folder `tensorboard` of the run"),
    "resume_tb_folder": ((), "a resumed run goes on in the folder `tensorboard` of the run"),
    "monitor.alert.enable_feishu_alert": ((False,), "no messages are sent; train.spike and max_skipped_in_row act"),
    "monitor.alert.feishu_alert_address": ((None, ""), "no messages are sent"),
    "monitor.alert.light_monitor_address": ((None, ""), "no messages are sent; metrics.jsonl has all metrics"),
    "monitor.alert.alert_file_path": ((None, ""), "no messages are sent; metrics.jsonl has all metrics"),
    "monitor.tensorboard.queue_max_length": ((), "TensorBoard's own default"),
}
# Constants that the ancestor read, beside the sections that repeat them.
_SECTIONS = {
    "adam", "beta2_scheduler", "ckpt", "data", "grad_scaler", "hybrid_zero_optimizer", "loss", "lr_scheduler", "model",
    "monitor", "parallel",
}  # fmt: skip
_QUIET = {"JOB_NAME", "SEQ_LEN", "HIDDEN_SIZE", "MLP_RATIO", "NUM_LAYER", "NUM_ATTENTION_HEAD", "VOCAB_SIZE"}


class Settings:
    """All settings of a file by dotted name, such as `data.seq_len`; nested dicts are taken apart."""

    def __init__(self, values: Mapping[str, Any], used: set[str], origin: str) -> None:
        """`used`: names at the top that other values are made of; they are no settings themselves."""
        self.origin = origin
        self.notes: list[str] = []
        """What has no counterpart: `section.field = value: what happens instead`."""
        self._left: dict[str, Any] = {}
        self._used = used | _QUIET
        self._flatten("", values)

    def _flatten(self, prefix: str, table: Mapping[Any, Any]) -> None:
        for key, value in table.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict) and value and name.count(".") < 4:
                self._flatten(f"{name}.", value)
            else:
                self._left[name] = value
            if len(self._left) > _MOST:
                raise ConvertError(f"{self.origin}: has more than {_MOST} settings; is it a configuration?")

    def noted(self, name: str) -> bool:
        """Whether it was told already that a setting has no counterpart."""
        return any(note.startswith(f"{name} = ") for note in self.notes)

    def take(self, name: str, kind: type, default: Any = None) -> Any:
        """Return a setting of this kind once, the default where it isn't given or is None."""
        value = self._left.pop(name, None)
        if value is None:
            return default
        types, words = _KINDS[kind]
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise ConvertError(f"{self.origin}: {name} = {show(value)} isn't text that can be written; correct it")
        if not isinstance(value, types) or (isinstance(value, bool) and kind is not bool):
            raise ConvertError(f"{self.origin}: {name} = {show(value)} must be {words}; correct it")
        return value

    def need(self, name: str, kind: type) -> Any:
        """Return a setting that must be given."""
        value = self.take(name, kind)
        if value is None:
            raise ConvertError(f"{self.origin}: {name} is missing; add it")
        return value

    def positive(self, name: str, default: int | None = None) -> int:
        """Return a whole number above 0; one without a default must be given."""
        number = self.need(name, int) if default is None else self.take(name, int, default)
        if not 0 < number < 10**15:
            raise ConvertError(f"{self.origin}: {name} = {show(number)} must be above 0 and below 10^15; correct it")
        return number

    def take_any(self, name: str) -> Any:
        """Return a setting of any kind once, None where it isn't given."""
        return self._left.pop(name, None)

    def note(self, name: str, value: Any, instead: str) -> None:
        """Tell that a setting has no counterpart."""
        self.notes.append(f"{name} = {show(value)}: {instead}")

    def left_over(self) -> None:
        """Tell of all that nobody took."""
        for name, value in self._left.items():
            quiet, instead = _INSTEAD.get(name, ((), ""))
            if name in _INSTEAD:
                if not any(value == same and isinstance(value, bool) == isinstance(same, bool) for same in quiet):
                    self.note(name, value, instead)
            elif (top := name.partition(".")[0]) in _SECTIONS or top not in self._used:
                self.note(name, value, "isn't known; left out")


def show(value: Any) -> str:
    """Return a value in one short line."""
    if isinstance(value, dict | list | tuple):
        items = [show(item) for item in list(value)[:3] if not isinstance(item, dict | list | tuple)]
        more = ", ..." if len(items) < len(value) else ""
        text = f"{type(value).__name__}({', '.join(items)}{more})" if value else repr(value)
    else:
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

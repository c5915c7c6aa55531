"""When a run saves and ends before its last step: signals, the stop file, the time budget."""

import signal
from pathlib import Path
from types import FrameType, TracebackType

from ternlm.config.section import ConfigError
from ternlm.config.training import TrainConfig


class StopSignals:
    """Note SIGTERM and SIGINT instead of dying by them; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


class StopFile:
    """The ancestor's stop file: a step N written into it means save and stop at N; -N, save at N and go on."""

    def __init__(self, path: str | None, step: int) -> None:
        """step: steps already done; a request that a run before this one has fulfilled is taken back."""
        self.path = Path(path) if path else None
        if self.path and self.path.exists():
            self._check_readable(self.path)
        if self.path and (not self.path.exists() or 0 < abs(self._asked()) <= step):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("0\n")

    def asks(self, step: int) -> str | None:
        """Return "stop" or "save" where the file asks for it after `step` steps."""
        asked = self._asked()
        if asked > 0 and step >= asked:
            return "stop"
        return "save" if asked < 0 and step == -asked else None

    @staticmethod
    def _check_readable(path: Path) -> None:
        try:
            int(path.read_text().strip() or 0)
        except (OSError, ValueError) as trouble:
            raise ConfigError(
                f"train.stop_file = {str(path)!r} must be a file that holds a step number ({trouble}); write 0 into it "
                "or choose another file"
            ) from trouble

    def _asked(self) -> int:
        try:
            return int(self.path.read_text().strip() or 0) if self.path else 0
        except (OSError, ValueError):
            return 0  # absent, or being written at this moment: looked at again after the next step


def out_of_time(train: TrainConfig, seconds: float, step_seconds: float = 0.0) -> bool:
    """Whether another step of `step_seconds` would exceed the time budget, `seconds` of which are gone."""
    return train.max_minutes is not None and seconds + step_seconds >= train.max_minutes * 60

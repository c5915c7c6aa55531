"""The script of docs/many_devices.md for Slurm, run against stand-ins for Slurm's commands."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "many_devices.md"
STAND_INS = {
    # Ranks that train until they fail by themselves, or scancel asks them to end.
    "srun": 'touch started; for i in $(seq 100); do [ -e {asked} ] && exit {status}; sleep 0.05; done; exit 99',
    "scancel": '[ "$*" = "--signal=TERM 7" ] && touch asked',
    "scontrol": 'case "$1" in show) echo node0 ;; *) echo "$*" >> queued ;; esac',
}  # fmt: skip


@pytest.mark.parametrize(
    ("status", "time_is_up", "restarts", "queued_again"),
    [
        (0, False, 0, False),  # the last step, the stop file, max_minutes, a spike that stops
        (2, False, 0, False),  # a mistake in the settings
        (1, False, 0, True),
        (137, False, 19, True),  # a rank was killed
        (1, False, 20, False),
        (0, True, 20, True),
        (2, True, 0, False),
    ],
)
def test_the_job_is_queued_again_only_where_that_helps(
    status: int, time_is_up: bool, restarts: int, queued_again: bool, tmp_path: Path
) -> None:
    asked = "asked" if time_is_up else "started"
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text("#!/bin/bash\n" + body.format(asked=asked, status=status) + "\n")
        (tmp_path / name).chmod(0o755)
    script = re.search(r"```bash\n(#!/bin/bash\n.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert script
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[0-3]", "SLURM_RESTART_COUNT": str(restarts)}
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    job = subprocess.Popen(["bash", "-c", script[1]], cwd=tmp_path, env=environment)
    if time_is_up:
        deadline = time.monotonic() + 10
        while not (tmp_path / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == status
    assert (tmp_path / "queued").exists() == queued_again
    if queued_again:
        assert (tmp_path / "queued").read_text() == "requeue 7\n"

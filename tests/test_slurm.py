"""tools/slurm_train.sh on one machine: small scripts do what srun and scontrol do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.runs import Toy, assert_equal_checkpoints, metrics
from tests.support.processes import free_port

ROOT = Path(__file__).parents[1]
# SIGUSR1 comes to each at another time; when one leaves with an error, srun ends the others.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
tasks=()
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_STEP_NODELIST=127.0.0.1 "$@" &
    tasks+=($!)
done
if [[ -n $STOP_AFTER ]]; then
    until grep -qs "\\"iter\\": $STOP_AFTER," "$METRICS"; do sleep 0.05; done
    kill -USR1 "${tasks[0]}"
    sleep 0.05
    kill -USR1 "${tasks[1]}"
fi
worst=0
for task in first "${tasks[@]}"; do
    if [[ $task == first ]]; then wait -n; else wait "$task"; fi; status=$?
    if ((status > 0)); then kill -TERM "${tasks[@]}" 2>/dev/null; fi
    if ((status > worst && status != 127)); then worst=$status; fi
done
exit $worst
"""
SCONTROL = '#!/usr/bin/env bash\necho "$@" >> "$REQUEUED"\n'


def submit(
    folder: Path, args: list[str], restarts: int, stop_after: str = "", python: str = sys.executable, tasks: int = 2
) -> subprocess.CompletedProcess:
    """What sbatch and a requeue run: the script as a job."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    port = free_port()
    environment = {
        **os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": python, "PYTHONPATH": str(ROOT),
        "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts), "PORT": str(port), "CUDA_VISIBLE_DEVICES": "",
        "SLURM_NTASKS": str(tasks),
        "STOP_AFTER": stop_after, "METRICS": str(folder / "run/metrics.jsonl"), "REQUEUED": str(folder / "requeued"),
    }  # fmt: skip
    script = ["bash", str(ROOT / "tools/slurm_train.sh"), *args]
    return subprocess.run(script, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.soak
def test_a_job_that_is_pre_empted_twice_ends_like_one_that_never_was(toy: Toy, tmp_path: Path) -> None:
    """The first start overwrites, and its next ones do not."""
    path = toy.config("slurm", max_iters=60, num_workers=1)
    args = [path, "--work-dir", str(tmp_path / "run"), "--overwrite"]
    for restarts, stop_after in enumerate(("5", "25")):
        job = submit(tmp_path, args, restarts, stop_after)
        assert job.returncode == 75, job.stderr
        assert "diffengine train: stopped by SIGTERM; continue with --resume" in job.stderr
        assert "Traceback" not in job.stderr
        assert (tmp_path / "requeued").read_text() == "requeue 7\n" * (restarts + 1)
    job = submit(tmp_path, args, 2)
    assert job.returncode == 0, job.stderr
    assert (tmp_path / "requeued").read_text() == "requeue 7\n" * 2
    assert [line["iter"] for line in metrics(tmp_path / "run")] == list(range(1, 61))

    job = submit(tmp_path, [path, "--work-dir", str(tmp_path / "whole")], 0)
    assert job.returncode == 0, job.stderr
    assert_equal_checkpoints(tmp_path / "run/iter_60.pth", tmp_path / "whole/iter_60.pth")


@pytest.mark.parametrize(
    ("restarts", "expected"),
    [(0, "--overwrite --init-from a.pth --data b"), (1, "--data b --resume")],
)
def test_a_restart_resumes_and_an_error_is_not_requeued(tmp_path: Path, restarts: int, expected: str) -> None:
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\necho "$@"\nexit 2\n')
    python.chmod(0o755)
    args = ["a config.py", "--overwrite", "--init-from", "a.pth", "--data", "b"]
    job = submit(tmp_path, args, restarts, python=str(python), tasks=1)
    assert job.returncode == 2
    assert job.stdout == f"-m diffengine train a config.py --launcher slurm {expected}\n"
    assert not (tmp_path / "requeued").exists()

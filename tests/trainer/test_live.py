"""Test that a run can be queried while it trains, but not recorded twice."""

import os
import subprocess
import sys
import time

import pytest

from entrace import open_runs
from entrace.analysis.trace import InputError
from entrace.trainer.runs.run_folder import run_lock

from .conftest import SHORT

STEPS = 12
LIVE = [
    *SHORT,
    f"steps={STEPS}",
    "rollout.prompts_per_step=4",
    "eval.every=6",
    "record.checkpoint_every=4",
]
# Each holds at every moment, whatever has been recorded so far.
CHECKS = {
    "every step once": "select count(*) = count(distinct step) and count(*) = coalesce(max(step), 0) from steps",
    "tokens of every step": """
        select coalesce(bool_and(steps.tokens = found.n), true)
        from steps left join (select step, count(*) as n from tokens group by step) as found using (step)
    """,
    "no step ahead in another table": """
        select coalesce((select max(step) from rollouts), 0) = coalesce((select max(step) from steps), 0)
           and coalesce((select max(step) from tokens), 0) = coalesce((select max(step) from steps), 0)
    """,
    "responses whole": """
        select coalesce(bool_and(response_length = n), true) from (
            select any_value(response_length) as response_length, count(*) as n from tokens group by rollout_id
        )
    """,
}


@pytest.mark.slow
def test_a_run_is_queried_while_it_trains(tmp_path):
    run = tmp_path / "live"
    command = [sys.executable, "-m", "entrace", "train", "tiny", *LIVE, "--out", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment)
    seen = []
    try:
        while process.poll() is None:
            if not (run / "run.json").exists():
                time.sleep(0.05)
                continue
            runs = open_runs(run)
            for name, check in CHECKS.items():
                assert runs.sql(check).item(), name
            runs.query("entropy_by_position")
            seen.append(runs.sql("select count(*) from steps").item())
            if seen[-1] < STEPS:
                assert f"being written or interrupted, {seen[-1]} of {STEPS} steps recorded" in runs.notes["live"]
    finally:
        process.kill()
    assert process.wait() == 0
    assert seen == sorted(seen)
    # It was looked at on the way, not only before and after.
    assert len({steps for steps in seen if 0 < steps < STEPS}) >= 3
    assert open_runs(run).notes == {}


def test_two_processes_do_not_record_one_run(tmp_path, call):
    # The other process only holds the lock: it need not load torch.
    hold = (
        "import sys\nfrom pathlib import Path\nfrom entrace.trainer.runs.run_folder import run_lock\n"
        "with run_lock(Path(sys.argv[1]), waits=False):\n    print('locked', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", hold, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        code, _, err = call("train", "tiny", *SHORT, "--out", tmp_path / "run", "--resume")
        with (
            pytest.raises(InputError, match="another process is already recording this run"),
            run_lock(tmp_path / "run", waits=False),
        ):
            pass
        other.stdin.close()
    assert other.returncode == 0
    assert code == 2
    assert err.splitlines()[-1].endswith("another process is already recording this run; stop it or wait for it")
    assert not (tmp_path / "run").exists()

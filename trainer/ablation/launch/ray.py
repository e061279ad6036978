"""Launch runs as tasks of a Ray cluster.

Every node must have entrace and see the study's folder at the same path.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from entrace.analysis.trace import InputError, in_one_line
from entrace.analysis.trace.errors import with_kind
from entrace.trainer.ablation.launch.job import (
    Job,
    Output,
    ProgressListener,
    describe_error,
    execute,
    settle,
)
from entrace.trainer.ablation.launch.worker import output_to

CONNECT_S = 5.0
PROBE_S = 15.0
PROBE = "import ray, sys; ray.init(address=sys.argv[1])"
GRACE_S = 10.0
POLL_S = 0.5
# Retries of a run whose node or process is lost; each resumes from the run's checkpoint.
MAX_RETRIES = 3


class RayLauncher:
    """Run each job as one Ray task with declared CPUs and GPUs.

    A task whose node is lost is retried on another node.
    """

    def __init__(self, address: str | None = None, cpus_per_run: int = 1, gpus_per_run: float | None = None) -> None:
        """Store where and with which resources runs start.

        Args:
            address: ``host:port`` or ``auto`` (default: RAY_ADDRESS, else a new cluster on this machine).
            cpus_per_run: CPUs per run, and its number of threads.
            gpus_per_run: GPUs per run (default: 1 if the cluster has any, else 0).
        """
        self.address, self.cpus, self._gpus_wanted = address, cpus_per_run, gpus_per_run
        self.gpus = 0.0
        self.slots = 1
        self._is_ours = False

    def connect(self) -> None:
        """Join the cluster.

        Raises:
            InputError: Ray is not installed, no cluster answers at the address, or no node has room for a run.
        """
        if find_spec("ray") is None:
            raise InputError("--launcher ray needs the ray extra: pip install 'entrace[ray]'")
        address = self.address or os.environ.get("RAY_ADDRESS")
        if address and address not in ("auto", "local"):
            _check_reachable(address)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        logging.getLogger("ray").setLevel(logging.ERROR)
        import ray

        if not ray.is_initialized():
            on_sigterm = signal.getsignal(signal.SIGTERM)
            try:
                ray.init(address=self.address, logging_level=logging.ERROR, log_to_driver=False)
            except Exception as error:
                where = f"--address {address}" if address else "ray"
                raise InputError(f"{where}: no Ray cluster answers ({in_one_line(error)})") from None
            self._is_ours = True
            # Ray's own handler would end this process before its runs are stopped.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_sigterm)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        has_gpus = any(node.get("GPU", 0) for node in nodes)
        self.gpus = float(has_gpus) if self._gpus_wanted is None else self._gpus_wanted
        self.slots = sum(_fitting(node, self.cpus, self.gpus) for node in nodes)
        if not self.slots:
            found = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
            raise InputError(f"no node of the Ray cluster has {self.cpus} CPUs and {self.gpus:g} GPUs; nodes: {found}")

    def close(self) -> None:
        """Leave the cluster, unless the process had already joined it."""
        if self._is_ours:
            import ray

            ray.shutdown()
            self._is_ours = False

    def run(self, jobs: Sequence[Job], listener: ProgressListener) -> None:
        """Execute all runs, in order as far as resources allow."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # Reports must survive the loss of any other node.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        mailbox: Any = ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()
        task: Any = ray.remote(_run).options(
            num_cpus=self.cpus, num_gpus=self.gpus, max_retries=MAX_RETRIES, retry_exceptions=False
        )
        outputs = {job.run_id: Output(job) for job in jobs}
        running = {
            task.remote(pickle.dumps(job), job.run_id, job.log, self.cpus, os.getcwd(), mailbox): job for job in jobs
        }
        try:
            while running:
                ended, _ = ray.wait(list(running), timeout=POLL_S)
                for run_id, done, metrics in ray.get(mailbox.collect.remote()):
                    listener.update(run_id, done, **metrics)
                for job in running.values():
                    outputs[job.run_id].show()
                for ref in ended:
                    job = running.pop(ref)
                    listener.end(job.run_id, settle(job, _death(ref) + outputs[job.run_id].quote()))
        finally:
            for ref in running:
                ray.cancel(ref)
            if running:
                ray.wait(list(running), num_returns=len(running), timeout=GRACE_S)
            ray.kill(mailbox)


class Mailbox:
    """An actor that stores the reports of runs until the launcher collects them."""

    def __init__(self) -> None:
        """Start without reports."""
        self._reports: list[tuple[str, int, dict[str, float]]] = []

    def put(self, run_id: str, done: int, metrics: dict[str, float]) -> None:
        """Store one report."""
        self._reports.append((run_id, done, metrics))

    def collect(self) -> list[tuple[str, int, dict[str, float]]]:
        """Return all reports and remove them."""
        reports, self._reports = self._reports, []
        return reports


def _run(pickled: bytes, run_id: str, log: Path, threads: int, cwd: str, mailbox: Any) -> None:
    # Relative paths and modules of the config refer to the folder in which the grid was started, and unpickling the
    # config imports those modules. Ray starts its workers in another folder.
    with suppress(OSError):
        os.chdir(cwd)

    def report(done: int, **metrics: float) -> None:
        mailbox.put.remote(run_id, done, metrics)

    with output_to(log):
        execute(pickle.loads(pickled), threads, report)


def _death(ref: Any) -> str:
    """Return why a task ended before it could record an error, as far as Ray knows."""
    import ray
    from ray.exceptions import RayTaskError

    try:
        ray.get(ref)
    except RayTaskError as error:
        return describe_error(error.cause)
    except Exception as error:
        return with_kind(error)
    return "the task ended before the run was complete"


def _check_reachable(address: str) -> None:
    """Raise an error if no Ray cluster answers at the address.

    Ray itself would wait long and log much.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f'--address "{address}": expected host:port or auto')
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
        subprocess.run([sys.executable, "-c", PROBE, address], capture_output=True, timeout=PROBE_S, check=True)
    except subprocess.SubprocessError:
        raise InputError(
            f"--address {address}: the server at this address is not a Ray cluster that this process can join"
        ) from None
    except (OSError, OverflowError) as error:
        raise InputError(f"--address {address}: no Ray cluster answers ({error})") from None


def _fitting(node: dict[str, float], cpus: float, gpus: float) -> int:
    """Return how many runs fit on a node at once."""
    rooms = [node.get("CPU", 0) // cpus] + ([node.get("GPU", 0) // gpus] if gpus else [])
    return int(min(rooms))

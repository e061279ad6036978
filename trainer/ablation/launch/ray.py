"""Runs as tasks of a Ray cluster. Every node needs entrace and sees the study's folder under the same path."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

from entrace.analysis.trace import InputError, in_one_line
from entrace.analysis.trace.errors import with_kind
from entrace.trainer.ablation.launch.job import Job, ProgressListener, carry_out, settle

CONNECT_S = 5.0
PROBE_S = 15.0
PROBE = "import ray, sys; ray.init(address=sys.argv[1])"
GRACE_S = 10.0
POLL_S = 0.5
# Of a run whose node or process is lost: each goes on from the run's checkpoint.
MAX_RETRIES = 3


class RayLauncher:
    """One Ray task a run, each with its declared CPUs and GPUs; a task whose node is lost is run again elsewhere."""

    def __init__(self, address: str | None = None, cpus_per_run: int = 1, gpus_per_run: float | None = None) -> None:
        """Starts nothing yet.

        Args:
            address: ``host:port`` or ``auto``; without one, what RAY_ADDRESS names, or else a
                cluster of this machine alone.
            cpus_per_run: CPUs that a run claims, and threads that it uses.
            gpus_per_run: GPUs that a run claims; None claims one where the cluster has any.
        """
        self.address, self.cpus, self._gpus_wanted = address, cpus_per_run, gpus_per_run
        self.gpus = 0.0
        self.slots = 1
        self._is_ours = False

    def connect(self) -> None:
        """Joins the cluster.

        Raises:
            InputError: Ray is not installed, nothing answers at the address, or no node could hold a run.
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
            try:
                ray.init(address=self.address, logging_level=logging.ERROR, log_to_driver=False)
            except Exception as error:
                where = f"--address {address}" if address else "ray"
                raise InputError(f"{where}: no Ray cluster answers ({in_one_line(error)})") from None
            self._is_ours = True
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        has_gpus = any(node.get("GPU", 0) for node in nodes)
        self.gpus = float(has_gpus) if self._gpus_wanted is None else self._gpus_wanted
        self.slots = sum(_fitting(node, self.cpus, self.gpus) for node in nodes)
        if not self.slots:
            found = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
            raise InputError(f"no node of the Ray cluster has {self.cpus} CPUs and {self.gpus:g} GPUs; nodes: {found}")

    def close(self) -> None:
        """Leaves the cluster, unless it was joined before."""
        if self._is_ours:
            import ray

            ray.shutdown()
            self._is_ours = False

    def run(self, works: Sequence[Job], watcher: ProgressListener) -> None:
        """Carries out all runs, in order as far as there is room."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # News must outlive every node but this one.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        mailbox: Any = ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()
        task: Any = ray.remote(_run).options(
            num_cpus=self.cpus, num_gpus=self.gpus, max_retries=MAX_RETRIES, retry_exceptions=False
        )
        running = {task.remote(work, self.cpus, os.getcwd(), mailbox): work for work in works}
        try:
            while running:
                ended, _ = ray.wait(list(running), timeout=POLL_S)
                for run_id, done, figures in ray.get(mailbox.collect.remote()):
                    watcher.update(run_id, done, **figures)
                for ref in ended:
                    work = running.pop(ref)
                    watcher.end(work.run_id, settle(work, _death(ref)))
        finally:
            for ref in running:
                ray.cancel(ref)
            if running:
                ray.wait(list(running), num_returns=len(running), timeout=GRACE_S)
            ray.kill(mailbox)


class Mailbox:
    """An actor that keeps what runs report until it is collected."""

    def __init__(self) -> None:
        """Empty."""
        self._news: list[tuple[str, int, dict[str, float]]] = []

    def put(self, run_id: str, done: int, figures: dict[str, float]) -> None:
        """Keeps one report."""
        self._news.append((run_id, done, figures))

    def collect(self) -> list[tuple[str, int, dict[str, float]]]:
        """Hands out all reports and forgets them."""
        news, self._news = self._news, []
        return news


def _run(work: Job, threads: int, cwd: str, mailbox: Any) -> None:
    # Relative paths of the config are meant from where the grid was started.
    with suppress(OSError):
        os.chdir(cwd)

    def report(done: int, **figures: float) -> None:
        mailbox.put.remote(work.run_id, done, figures)

    carry_out(work, threads, report)


def _death(ref: Any) -> str:
    """Why a task ended without a word."""
    import ray

    try:
        ray.get(ref)
    except Exception as error:
        return f"the process was killed ({with_kind(error)})"
    return "the process was killed"


def _check_reachable(address: str) -> None:
    """Ray itself waits long, and complains a lot, where nothing answers or something that is no Ray."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f'--address "{address}": expected host:port or auto')
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
        subprocess.run([sys.executable, "-c", PROBE, address], capture_output=True, timeout=PROBE_S, check=True)
    except subprocess.SubprocessError:
        raise InputError(f"--address {address}: what answers there is not a Ray cluster that can be joined") from None
    except (OSError, OverflowError) as error:
        raise InputError(f"--address {address}: no Ray cluster answers ({error})") from None


def _fitting(node: dict[str, float], cpus: float, gpus: float) -> int:
    """Runs that a node can hold at once."""
    rooms = [node.get("CPU", 0) // cpus] + ([node.get("GPU", 0) // gpus] if gpus else [])
    return int(min(rooms))

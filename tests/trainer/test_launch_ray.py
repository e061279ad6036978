"""Test runs as Ray tasks on two nodes of this machine, one of which is killed."""

import os
import sys
from collections import defaultdict

import pyarrow.parquet as pq
import pytest

from entrace.analysis.trace import InputError, read_manifest
from entrace.trainer.ablation.grid import load_grid
from entrace.trainer.ablation.launch.ray import RayLauncher
from entrace.trainer.ablation.runner import run_grid
from entrace.trainer.train import train

from .conftest import SHORT

STEPS = 14


@pytest.fixture
def cluster(monkeypatch):
    """Start a head that holds one run, and a second node that holds another."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    # Lost nodes are noticed after two seconds instead of half a minute.
    noticed = {"health_check_period_ms": 500, "health_check_timeout_ms": 500, "health_check_failure_threshold": 3}
    node = {"num_cpus": 1, "object_store_memory": 100_000_000}
    cluster = Cluster(
        initialize_head=True, head_node_args={**node, "_system_config": {**noticed, "health_check_initial_delay_ms": 0}}
    )
    cluster.second = cluster.add_node(**node)
    yield cluster
    cluster.shutdown()


class Killer:
    """Kill the second node once both nodes are past their first checkpoint.

    Also keep the reports of every run.
    """

    def __init__(self, cluster):
        self.cluster, self.done, self.ended = cluster, defaultdict(list), []

    def update(self, run_id, done, **metrics):
        self.done[run_id].append(done)
        running = [steps for name, steps in self.done.items() if name not in self.ended]
        if self.cluster.second and len(running) == 2 and all(steps[-1] >= 5 for steps in running):
            self.cluster.remove_node(self.cluster.second, allow_graceful=False)
            self.cluster.second = None

    def end(self, run_id, error):
        self.ended.append(run_id)


@pytest.mark.slow
def test_a_grid_survives_the_loss_of_a_node(cluster, tmp_path):
    specs = load_grid("tiny-study", [*SHORT, f"steps={STEPS}", "record.after_update_every=0"], seeds=[0])
    killer = Killer(cluster)
    out = tmp_path / "study"
    assert run_grid(specs, out, RayLauncher(cluster.address), train, listener=killer) == {}
    assert cluster.second is None
    assert sorted(killer.ended) == sorted(spec.run_id for spec in specs)
    begun_again = [steps for steps in killer.done.values() if steps.count(0) == 2]
    assert len(begun_again) == 1
    first_after = begun_again[0][begun_again[0].index(0, 1) + 1]
    assert first_after % 2 == 1, "resumed after a checkpoint, which is saved every second step"
    assert first_after > 4
    for spec in specs:
        assert read_manifest(out / spec.run_id)["status"] == "complete"
        assert pq.read_table(out / spec.run_id / "steps")["step"].to_pylist() == list(range(1, STEPS + 1))
        assert killer.done[spec.run_id].count(STEPS) == 1

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert run_grid(specs, out, RayLauncher(cluster.address), train, resume=True) == {}
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


def test_without_a_node_that_has_room_a_grid_is_refused(tmp_path, monkeypatch):
    """Starting a cluster takes many seconds; a test of it is slow."""
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    nodes = [{"Alive": True, "Resources": {"CPU": 1.0}}, {"Alive": False, "Resources": {"CPU": 64.0}}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    specs = load_grid("tiny-study", SHORT)
    message = "no node of the Ray cluster has 7 CPUs and 0 GPUs; nodes: 1 CPUs and 0 GPUs$"
    with pytest.raises(InputError, match=message):
        run_grid(specs, tmp_path / "study", RayLauncher("auto", cpus_per_run=7), train)
    assert not (tmp_path / "study").exists()


@pytest.mark.slow
def test_a_run_that_asks_for_more_than_any_node_has_is_refused(cluster, tmp_path):
    specs = load_grid("tiny-study", SHORT)
    with pytest.raises(InputError, match="no node of the Ray cluster has 7 CPUs and 0 GPUs; nodes: 1 CPUs"):
        run_grid(specs, tmp_path / "study", RayLauncher(cluster.address, cpus_per_run=7), train)
    assert not (tmp_path / "study").exists()


@pytest.mark.slow
def test_a_method_of_the_working_directory_is_found_by_the_tasks(cluster, tmp_path, monkeypatch):
    """Ray starts its workers in a folder of its own."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "methods_for_ray.py").write_text(
        "def halved(advantages, rollouts, factor: float = 0.5):\n    return factor * advantages\n"
    )
    (work / "grid.toml").write_text(
        'config = "tiny"\nbaseline = "none"\nseeds = [0]\n[arms]\nnone = {}\n'
        'mine = { method = ["released_noop", "methods_for_ray:halved"], shaping.halved.factor = 0.25 }\n'
    )
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "path", [*sys.path])
    specs = load_grid("grid.toml", [*SHORT, "steps=2"])
    assert run_grid(specs, tmp_path / "study", RayLauncher(cluster.address), train) == {}
    tokens = pq.read_table(tmp_path / "study" / "mine-seed0" / "tokens", columns=["advantage", "shaped_advantage"])
    advantages, shaped = (tokens[name].to_numpy() for name in tokens.column_names)
    assert (advantages != 0).any()
    assert (shaped == 0.25 * advantages).all()


def print_and_exit(config, run_dir, labels, **_):
    """Stand for a library that ends the process."""
    print("terminate called")
    os._exit(3)


@pytest.mark.slow
def test_a_task_that_dies_says_how_and_what_it_printed_last(cluster, tmp_path, capsys):
    spec = load_grid("tiny-study", SHORT, seeds=[0])[0]
    failed = run_grid([spec], tmp_path / "study", RayLauncher(cluster.address), print_and_exit)
    assert failed[spec.run_id].startswith("WorkerCrashedError: The worker died unexpectedly")
    # Ray repeats the task; each attempt prints the line.
    assert "; its last output: terminate called" in failed[spec.run_id]
    assert f"{spec.run_id}: terminate called\n" in capsys.readouterr().err

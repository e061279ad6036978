"""Let a second process write the same run, and let the clock jump."""

from __future__ import annotations

import os
import threading
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np

import entrace
from entrace.analysis.trace import manifest

from .kills import collect
from .trial import Fault, Outcome, Trial, require
from .verify import SECONDS
from .victim import CONFIG

SECOND_WRITERS = {
    "train --resume": ["train", "tiny", *CONFIG, "--out", "RUN", "--resume"],
    "train": ["train", "tiny", *CONFIG, "--out", "RUN"],
    "prune": ["prune", "RUN", "--token-steps", "2"],
    "import --resume": ["import", "DUMP", "--model", "embedded", "--out", "RUN", "--resume"],
}
# Share of the time of a run in which the second process begins.
BEGIN = (0.0, 0.4)
JUMP_S = 3e9


class Writers(Fault):
    """Let a second process write a run while it trains."""

    name = "second writer"
    number = 30

    def attempt(self, index: int, rng: np.random.Generator) -> Trial:
        """Start a training run, and another command on its folder."""
        name = list(SECOND_WRITERS)[index % len(SECOND_WRITERS)]
        harness = self.scene.harness
        # Made before the run starts.
        dump = self.scene.dump
        with self.scene.place(f"writers/{index}") as place:
            run_dir = place / "run"
            endings = []
            first = threading.Thread(target=lambda: endings.append(harness.run(run_dir)))
            first.start()
            while not (run_dir / "run.json").exists() and first.is_alive():
                time.sleep(0.005)
            time.sleep(rng.uniform(*BEGIN) * harness.whole.seconds)
            is_training = first.is_alive()
            words = [{"RUN": run_dir, "DUMP": dump}.get(word, word) for word in SECOND_WRITERS[name]]
            try:
                ended = self.scene.start(*words, log=place / "second.txt").end()
                was_training = first.is_alive()
            finally:
                first.join()
            ended.require_one_line()
            if is_training and was_training:
                require(ended.code == 2, f"{name}: exit code {ended.code}: {ended.last_line}")
            error = endings[0].error
            require(not error, f"the first process: {error}")
            # A prune that found the run complete has thinned it.
            if ended.code == 2:
                defects = collect(harness.reference.final_defects, run_dir)
                require(not defects, f"after {name}: {'; '.join(defects)}")
                return self.refused(index, ended.last_line, second=name)
        return self.survived(index, f"{name} came too late", second=name)


class Clocks(Fault):
    """Let the clock jump while a run trains, and between a kill and its resume."""

    name = "clock jump"
    number = 30

    def attempt(self, index: int, rng: np.random.Generator) -> Trial:
        """Train with a clock that jumps whenever it is read.

        Every second run is killed and resumed.
        """
        harness = self.scene.harness
        with self.scene.place(f"clocks/{index}") as place:
            run_dir = place / "run"
            if index % 2:
                timeout = rng.uniform(0.2, 0.9) * harness.whole.seconds
                harness.run(run_dir, timeout=timeout, prepare=partial(let_jump, int(rng.integers(2**31))))
                touch_at_random(run_dir, rng)
            error = harness.run(run_dir, prepare=partial(let_jump, int(rng.integers(2**31)))).error
            require(not error, str(error))
            touch_at_random(run_dir, rng)
            defects = collect(harness.reference.final_defects, run_dir)
            require(not defects, "; ".join(defects))
            seconds = entrace.open_runs(run_dir).sql(f"select {', '.join(SECONDS)} from steps").to_numpy()
            require(((seconds >= 0) & (seconds < harness.whole.seconds * 10)).all(), "durations jump", Outcome.SILENT)
        return self.survived(index)


def let_jump(seed: int) -> None:
    """Let the clock jump whenever this process reads it.

    Jumps are up to half a century, forward or backward.
    """
    rng, real = np.random.default_rng(seed), time.time

    class Jumping(manifest.datetime):
        @classmethod
        def now(cls, tz=None):
            return manifest_now(tz) + timedelta(seconds=float(rng.uniform(-0.5, 0.5)) * JUMP_S)

    manifest_now = manifest.datetime.now
    manifest.datetime = Jumping  # pyright: ignore[reportPrivateImportUsage]
    time.time = lambda: real() + float(rng.uniform(-0.5, 0.5)) * JUMP_S


def touch_at_random(folder: Path, rng: np.random.Generator) -> None:
    """Give every file a random time of change.

    The effect is that of a clock that jumped while files were written.
    """
    for path in folder.rglob("*"):
        moment = float(rng.uniform(0, 2**31))
        os.utime(path, (moment, moment))

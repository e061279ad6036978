import numpy as np

from entrace.trainer.algorithm.plateau import PlateauConfig, PlateauDetector

CONFIG = PlateauConfig(window_steps=5, tolerance=0.1)


def curve(boundary, steps):
    t = np.arange(steps)
    rise = np.minimum(t / boundary, 1.0)
    return [(1.0 - 0.8 * r, 0.3 + 0.5 * r) for r in rise]


def test_finds_the_bend():
    detector = PlateauDetector(CONFIG, curve(boundary=30, steps=60))
    assert detector.plateau_step is not None
    assert 31 <= detector.plateau_step <= 31 + 2 * CONFIG.window_steps


def test_a_steady_rise_is_no_plateau():
    assert PlateauDetector(CONFIG, curve(boundary=1000, steps=40)).plateau_step is None


def test_both_curves_must_be_flat():
    rising = [(1.0, accuracy) for _, accuracy in curve(boundary=1000, steps=40)]
    assert PlateauDetector(CONFIG, rising).plateau_step is None


def test_once_found_it_stays():
    history = curve(boundary=20, steps=50)
    detector = PlateauDetector(CONFIG, history)
    found = detector.plateau_step
    detector.update(5.0, 0.0)
    assert detector.plateau_step == found


def test_history_restores_the_state():
    history = curve(boundary=20, steps=50)
    one_by_one = PlateauDetector(CONFIG)
    for entropy, accuracy in history:
        one_by_one.update(entropy, accuracy)
    assert one_by_one.plateau_step == PlateauDetector(CONFIG, history).plateau_step

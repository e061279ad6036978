"""Take the pictures of the viewer in README and docs.

The pictures show the runs of ``make study``.

Usage: python -m tests.viewer.pictures data/runs/study --out reports/viewer
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from urllib.parse import urlencode

from playwright.sync_api import sync_playwright

from entrace.analysis.runs import open_runs
from tests.viewer.conftest import serving

SIZE = {"width": 1200, "height": 760}
LONGEST = """
select run_id, rollout_id from staged_responses
where is_correct and stage = 'plateau' and sample_sign = 'positive' and run_id like 'position%'
  and (run_id, rollout_id) in (select (run_id, rollout_id) from tokens where logprob_after is not null)
order by response_length desc, rollout_id limit 1
"""
SAME_PROMPT = """
select run_id, rollout_id from rollouts
where group_id = (select group_id from rollouts where run_id = $run and rollout_id = $rollout) and run_id = $run
order by is_correct, response_length desc limit 1
"""
QUERY = """select step, arm, avg(entropy_mean) as entropy
from rollouts join runs using (run_id)
group by all order by step"""


def main() -> None:
    """Write one PNG file per picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--out", type=Path, default=Path("reports/viewer"))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    runs = open_runs(asked.runs)
    run, rollout = runs.sql(LONGEST).row(0)
    other = runs.sql(SAME_PROMPT, {"run": run, "rollout": rollout}).row(0)
    pages = {
        "overview": ("/", "light"),
        "response": (f"/response?{urlencode({'run': run, 'id': rollout, 'color': 'dp', 'position': 25})}", "light"),
        "response_dark": (
            f"/response?{urlencode({'run': run, 'id': rollout, 'color': 'entropy', 'position': 25})}",
            "dark",
        ),
        "comparison": (f"/compare?{urlencode([('r', f'{run}:{rollout}'), ('r', f'{other[0]}:{other[1]}')])}", "light"),
        "sql": (f"/sql?{urlencode({'q': QUERY})}", "dark"),
    }
    with serving(asked.runs) as served, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, (path, scheme) in pages.items():
            page = browser.new_page(viewport=SIZE, color_scheme=scheme)
            page.goto(served.url.rstrip("/") + path)
            page.locator("#content:not([aria-busy]) h1").wait_for()
            if name == "overview":
                hit = page.locator("#entropy_by_sample_sign .hit")
                hit.wait_for(timeout=120_000)
                page.locator("#stage_dynamics .hit").wait_for(timeout=120_000)
                page.locator("#stage_dynamics").scroll_into_view_if_needed()
                hit.focus()
                for _ in range(340):
                    page.keyboard.press("ArrowRight")
            if name == "sql":
                page.get_by_role("button", name="Plot").click(timeout=120_000)
            page.wait_for_timeout(2500)
            page.screenshot(path=asked.out / f"{name}.png")
            page.close()
        browser.close()


if __name__ == "__main__":
    main()

"use strict";
// Runs, scorecard, and every figure of the report, whose marks open the responses behind them.

const SELECTING = ["run_id", "arm", "seed", "step", "stage", "phase", "sample_sign", "prompt_id", "defect"];

const rowOf = (group, i) => Object.fromEntries(Object.entries(group.columns).map(([name, values]) => [name, values[i]]));

// The address of the responses behind a mark.
function behind(group, i) {
  const row = rowOf(group, i);
  const filters = Object.fromEntries(SELECTING.filter((name) => row[name] !== null && row[name] !== undefined).map((name) => [name, row[name]]));
  return address("/responses", { ...filters, where: group.where[i], at: row.position_mid });
}

// Value, interval, and n of a mark, and what else its row says.
function markFacts(group, i) {
  const row = rowOf(group, i);
  const first = group.x === "step" || !(typeof row[group.x] === "number" && typeof row[group.y] !== "number") ? [group.x, group.y] : [group.y, group.x];
  const entries = first.filter((name) => name in row).map((name) => [name.replaceAll("_", " "),
    number(row[name]) + (name === first[1] ? interval(row.low, row.high) : "")]);
  const rest = Object.keys(row).filter((name) => !first.includes(name) && !["low", "high"].includes(name) && row[name] !== null);
  const isCount = (name) => name.startsWith("num_");
  rest.sort((a, b) => isCount(b) - isCount(a));
  for (const name of rest.slice(0, 14)) {
    entries.push([isCount(name) ? `n (${name.slice(4).replaceAll("_", " ")})` : name.replaceAll("_", " "), number(row[name])]);
  }
  return facts(entries, "");
}

function interactive(found) {
  const source = URL.createObjectURL(new Blob([found.svg], { type: "image/svg+xml" }));
  const image = el("img", { src: source, alt: found.question, width: found.width, height: found.height });
  const all = found.marks.flatMap((group) => group.left.map((left, i) => ({ group, i, left, top: group.top[i] })));
  const dot = el("div", { class: "dot", hidden: true });
  const hit = el("div", {
    class: "hit", tabindex: 0, role: "application",
    "aria-label": `${found.question} Arrow keys move between ${all.length} marks, Enter opens the responses behind one.`,
  });
  const box = el("div", { class: "plot" }, image, dot, hit);
  let current = -1;
  const show = (at) => {
    current = at;
    dot.hidden = at < 0;
    if (at < 0) return hideTip();
    const mark = all[at];
    dot.style.left = `${100 * mark.left}%`;
    dot.style.top = `${100 * mark.top}%`;
    const frame = hit.getBoundingClientRect();
    const note = found.opens ? null : el("p", { class: "soft small" }, "Evaluations: no responses to open");
    showTip(el("div", {}, markFacts(mark.group, mark.i), note), frame.left + mark.left * frame.width, frame.top + mark.top * frame.height);
  };
  hit.addEventListener("mousemove", (event) => {
    const frame = hit.getBoundingClientRect();
    let best = -1;
    let least = 20 ** 2;
    all.forEach((mark, i) => {
      const distance = (frame.left + mark.left * frame.width - event.clientX) ** 2 + (frame.top + mark.top * frame.height - event.clientY) ** 2;
      if (distance < least) [best, least] = [i, distance];
    });
    if (best !== current) show(best);
  });
  hit.addEventListener("mouseleave", () => show(-1));
  hit.addEventListener("blur", () => show(-1));
  const openMark = () => { if (current >= 0 && !SAVED && found.opens) navigate(behind(all[current].group, all[current].i)); };
  // A finger has no pointer to hover with: its first tap shows a mark, its second opens it.
  let tapped = -1;
  hit.addEventListener("click", (event) => {
    if (event.pointerType === "touch" && tapped !== current) tapped = current;
    else openMark();
  });
  hit.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 };
    if (event.key in steps && all.length) {
      show((current + steps[event.key] + all.length) % all.length);
      event.preventDefault();
    } else if (event.key === "Enter") openMark();
  });
  return box;
}

function figureCard(entry) {
  let body = el("div", { class: "soft small" }, "Drawing…");
  const card = el("section", { class: "card", id: entry.stem, "aria-busy": true }, el("h3", {}, visible(entry.question)), body);
  let isAsked = false;
  const put = (next) => { body.replaceWith(next); body = next; };
  const load = async ({ again = false } = {}) => {
    if (isAsked !== again) return;
    isAsked = true;
    try {
      const found = await get(`/api/figure/${entry.stem}`);
      put(found.lacks ? el("p", { class: "soft" }, `Not drawn: ${visible(found.lacks)}.`) : el("figure", {},
        interactive(found),
        el("figcaption", { class: "small soft" }, el("details", {}, el("summary", {}, "Caption and SQL"), el("p", {}, visible(found.caption)),
          el("pre", { tabindex: 0 }, lines(found.sql)), link(address("/sql", { q: found.sql }), {}, "Open in the SQL console")))));
    } catch (error) {
      put(failure(error));
    }
    card.removeAttribute("aria-busy");
  };
  return { card, load };
}

function runsTable(found) {
  const arms = Map.groupBy ? Map.groupBy(found.runs, (run) => run.arm ?? "–") : new Map([["", found.runs]]);
  const rows = [...arms].sort(([a], [b]) => (b === found.baseline) - (a === found.baseline) || (a < b ? -1 : 1)).map(([arm, runs]) =>
    runs.sort((a, b) => (a.seed ?? 0) - (b.seed ?? 0)).map((run, i) => el("tr", {},
      el("td", {}, i ? "" : el("b", {}, visible(arm)), i || arm !== found.baseline ? null : el("span", { class: "soft small" }, " baseline")),
      el("td", { class: "num" }, number(run.seed)),
      el("td", {}, link(address("/responses", { run_id: run.run_id }), {}, visible(run.run_id))),
      el("td", { class: run.status === "failed" ? "failed" : null }, visible(run.status ?? "–"), run.error ? `: ${visible(run.error)}` : ""),
      el("td", { class: "num" }, `${run.steps ?? 0} of ${run.total_steps ?? "?"}`),
      el("td", { class: "num" }, run.stages[0]?.boundary_step ? number(run.stages[0].boundary_step) + interval(run.stages[0].boundary_low, run.stages[0].boundary_high) : "–"),
      el("td", { class: "small soft" }, run.note ? visible(run.note) : ""))));
  return el("div", { class: "card scroll", tabindex: 0, role: "region", "aria-label": "Runs" }, el("table", {},
    el("thead", {}, el("tr", {}, ["Arm", "Seed", "Run", "Status", "Steps", "Stage boundary [95%]", "Note"].map((name) => el("th", { scope: "col" }, name)))),
    el("tbody", {}, rows)));
}

function scorecardTable(found) {
  const rows = Object.entries(found.overall).map(([claim, word]) => {
    const own = found.verdicts.filter((verdict) => verdict.claim === claim);
    return [
      el("tr", { class: "group" }, el("td", { colspan: 6 }, el("b", {}, visible(claim)), " ", el("span", { class: `chip ${word.replaceAll(" ", "-")}` }, word), ` ${visible(own[0]?.question ?? "")}`)),
      own.map((v) => el("tr", {},
        el("td", {}, el("a", { href: `#${v.figure}` }, visible(v.part)), el("div", { class: "small soft" }, visible(v.statistic ?? ""))),
        el("td", {}, visible(v.subject)),
        el("td", {}, el("span", { class: `chip ${v.verdict.replaceAll(" ", "-")}` }, v.verdict)),
        el("td", { class: "num" }, number(v.effect), interval(v.low, v.high)),
        el("td", { class: "small" }, visible(v.null ?? "")),
        el("td", { class: "small" }, visible(v.why ?? "")))),
    ];
  });
  return el("div", { class: "card scroll", tabindex: 0, role: "region", "aria-label": "Scorecard" }, el("table", {},
    el("thead", {}, el("tr", {}, ["Statistic", "Runs", "Verdict", "Effect [95%]", "Null", "Reason"].map((name) => el("th", { scope: "col" }, name)))), el("tbody", {}, rows)));
}

PAGES["/"] = {
  title: () => "Overview",
  async render() {
    const [found, figures] = await Promise.all([get("/api/runs"), get("/api/figures")]);
    const cards = figures.map(figureCard);
    const scorecard = el("details", {}, el("summary", {}, "Scorecard: what these runs say about each claim"));
    scorecard.addEventListener("toggle", async () => {
      if (!scorecard.open || scorecard.dataset.asked) return;
      scorecard.dataset.asked = "yes";
      const waiting = el("p", { class: "soft" }, "Computing intervals and nulls…");
      scorecard.append(waiting);
      try {
        waiting.replaceWith(scorecardTable(await get("/api/scorecard")));
      } catch (error) {
        waiting.replaceWith(failure(error));
      }
    });
    const watcher = new IntersectionObserver((seen) => {
      for (const { target, isIntersecting } of seen) if (isIntersecting) cards.find(({ card }) => card === target).load();
    }, { rootMargin: "300px 0px" });
    cards.forEach(({ card }) => watcher.observe(card));
    let table = runsTable(found);
    // Figures that are drawn are drawn again; what is open stays open.
    this.update = async () => {
      const next = runsTable(await get("/api/runs"));
      table.replaceWith(next);
      table = next;
      await Promise.all(cards.map(({ load }) => load({ again: true })));
    };
    return [
      el("h1", {}, `${found.runs.length} run${found.runs.length === 1 ? "" : "s"}`),
      table, scorecard,
      el("h2", {}, "Figures"),
      el("p", { class: "soft small" }, "Figures of training show the baseline arm, those of ablations all arms. Point at a mark for its value, interval, and n; click it for the responses behind it."),
      el("div", { class: "grid" }, cards.map(({ card }) => card)),
    ];
  },
};

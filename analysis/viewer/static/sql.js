"use strict";
// A console: SQL with completion, limits, a stop button, history, and results as table, plot, and file.

const HISTORY = "entrace-sql-history";
// Okabe and Ito's colors, then the same dashed.
const COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"];
const LINE_COLORS = [...COLORS, ...COLORS];

let editorScript = null;

// The editor is as large as all other scripts together, so only this page loads it.
const loadEditor = () => (editorScript ??= new Promise((done, fail) => {
  document.head.append(el("script", { src: META("editor"), onload: done, onerror: () => fail(new Problem("the editor was not loaded; reload the page")) }));
}));

function readHistory() {
  try { return JSON.parse(localStorage.getItem(HISTORY)) ?? []; } catch { return []; }
}

function remember(text) {
  try { localStorage.setItem(HISTORY, JSON.stringify([text, ...readHistory().filter((one) => one !== text)].slice(0, 50))); } catch { /* no storage */ }
}

// A plot of two columns, one line per value of a third; null if nothing can be drawn.
function resultPlot(found) {
  const { names } = found;
  const numeric = names.filter((name) => /^(U?Int|Float|Decimal)/.test(found.types[name]));
  if (!numeric.length || !found.num_rows) return el("p", { class: "soft" }, "A plot needs rows with a column of numbers.");
  const pick = (label, options, value) => {
    const select = el("select", { onchange: () => draw() }, options.map((name) => el("option", { value: name }, visible(name) || "none")));
    select.value = value;
    return [select, el("label", {}, label, select)];
  };
  const kinds = names.filter((name) => new Set(found.columns[name]).size <= LINE_COLORS.length);
  const [x, xLabel] = pick("Horizontal", numeric, numeric.includes("step") ? "step" : numeric[0]);
  const [y, yLabel] = pick("Vertical", numeric, numeric.find((name) => name !== x.value && !["seed", "rollout_id"].includes(name)) ?? numeric[0]);
  const [by, byLabel] = pick("One line per", ["", ...kinds], kinds.find((name) => !numeric.includes(name)) ?? "");
  const [kind, kindLabel] = pick("Marks", ["lines", "points"], "lines");
  const place = el("div");
  const draw = () => {
    place.replaceChildren();
    const places = [...new Set(found.columns[x.value].filter((value) => value !== null))].sort((a, b) => a - b);
    const index = new Map(places.map((value, i) => [value, i]));
    let hidden = 0;
    const groups = by.value ? [...new Set(found.columns[by.value])] : [null];
    const series = groups.map((group, g) => {
      const values = Array(places.length).fill(null);
      found.columns[x.value].forEach((value, i) => {
        if (value === null || (by.value && found.columns[by.value][i] !== group)) return;
        const at = index.get(value);
        if (values[at] !== null) hidden++;
        else if (typeof found.columns[y.value][i] === "number") values[at] = found.columns[y.value][i];
      });
      return { label: visible(String(group ?? y.value)), values, color: LINE_COLORS[g % LINE_COLORS.length], dash: g >= COLORS.length ? [5, 4] : undefined, points: kind.value === "points", spanGaps: true };
    });
    plot(place, places, series, { xLabel: visible(x.value), yLabel: visible(y.value), height: 320 });
    if (hidden) place.append(el("p", { class: "small" }, `${number(hidden)} rows are not shown, because an earlier row has the same place and line.`));
  };
  const box = el("div", {}, el("div", { class: "bar" }, xLabel, yLabel, byLabel, kindLabel), place);
  requestAnimationFrame(draw);
  return box;
}

function dictionary(found) {
  return el("details", { class: "card" }, el("summary", {}, "Data dictionary"), Object.entries(found).map(([name, table]) => el("details", {},
    el("summary", {}, el("b", { class: "mono" }, visible(name)), ` ${table.grain}`),
    el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `Columns of ${name}` }, el("table", {}, el("tbody", {}, table.columns.map((column) => el("tr", {},
      el("td", { class: "mono" }, column.name), el("td", { class: "mono soft" }, column.type), el("td", { class: "small" }, column.unit), el("td", { class: "small" }, column.meaning)))))))));
}

function resultView(found) {
  const place = el("div");
  const table = () => place.replaceChildren(virtualTable(found.columns, found.types, found.names));
  const tabs = [["Table", table], ["Plot", () => place.replaceChildren(resultPlot(found))]].map(([label, show]) => el("button", {
    type: "button", onclick: (event) => { tabs.forEach((tab) => tab.setAttribute("aria-pressed", String(tab === event.target))); show(); },
  }, label));
  tabs[0].setAttribute("aria-pressed", "true");
  tabs[1].setAttribute("aria-pressed", "false");
  table();
  return el("div", {}, el("div", { class: "bar" }, tabs,
    el("span", { role: "status" }, `${number(found.num_rows)} row${found.num_rows === 1 ? "" : "s"}${found.has_more ? ", and more beyond the limit" : ""}${found.names.length > MOST_COLUMNS ? `, ${MOST_COLUMNS} of ${number(found.names.length)} columns` : ""}, ${number(found.seconds)} s`)), place);
}

PAGES["/sql"] = {
  title: () => "SQL",
  keepsState: true,
  async render() {
    const text = params().get("q") ?? "";
    if (SAVED) {
      const found = SAVED.data["/api/sql"];
      return [el("h1", {}, "SQL"), el("pre", { tabindex: 0 }, lines(found.sql)), resultView(found)];
    }
    const [tables, questions] = await Promise.all([get("/api/dictionary"), get("/api/questions"), loadEditor()]);
    const holder = el("div", { class: "editor" });
    const result = el("div");
    const limit = el("input", { value: params().get("limit") ?? "1000", size: 7, inputmode: "numeric" });
    let running = null;
    // One query at a time: its name, with which Stop ends it, and how far it is.
    const busy = async (verb, ask, place) => {
      if (running || !editor.text.trim()) return;
      running = crypto.getRandomValues(new Uint32Array(2)).join("-");
      const name = running;
      setBusy(true);
      const since = Date.now();
      const clock = el("p", { class: "soft", role: "status" }, `${verb}…`);
      const ticking = setInterval(async () => {
        const found = await answered(fetch(address("/api/progress", { name }))).catch(() => null);
        const rows = found?.num_rows ? `, ${number(found.num_rows)} rows` : "";
        clock.textContent = `${verb}… ${Math.round((Date.now() - since) / 1000)} s${found?.percent ? `, about ${Math.floor(found.percent)}%` : ""}${rows}`;
      }, 1000);
      place(clock);
      try {
        const shown = await ask(name);
        if (shown) clock.replaceWith(shown);
        else clock.remove();
      } catch (error) {
        clock.replaceWith(failure(error));
      }
      clearInterval(ticking);
      running = null;
      setBusy(false);
    };
    const run = () => {
      if (running) return;
      FETCHED.delete("/api/sql");
      replaceParams({ q: editor.text, limit: limit.value });
      return busy("Running", async (name) => {
        saving.disabled = true;
        remember(editor.text);
        fillHistory();
        const found = await post("/api/sql", { sql: editor.text, limit: limit.value, name });
        FETCHED.set("/api/sql", found);
        saving.disabled = false;
        return resultView(found);
      }, (clock) => result.replaceChildren(clock));
    };
    const start = el("button", { type: "button", class: "primary", title: "Ctrl+Enter", onclick: run }, "Run");
    const end = () => running && post("/api/stop", { name: running });
    const stop = el("button", { type: "button", disabled: true, onclick: end }, "Stop");
    const saving = saveButton("query");
    saving.disabled = true;
    this.leave = end;
    const [csv, parquet] = [["csv", "CSV"], ["parquet", "Parquet"]].map(([format, label]) => el("button", {
      type: "button",
      onclick: () => busy(`Exporting ${label}`, (name) => download("/api/export", { sql: editor.text, format, name }, `rows.${format}`), (clock) => result.prepend(clock)),
    }, label));
    const setBusy = (isBusy) => {
      stop.disabled = !isBusy;
      for (const button of [start, csv, parquet]) button.disabled = isBusy;
    };
    const list = (label, entries, onPick) => {
      const select = el("select", { "aria-label": label, onchange: () => { if (select.value) onPick(entries()[Number(select.value)]); select.value = ""; } });
      const fill = () => select.replaceChildren(el("option", { value: "" }, label), ...entries().map((entry, i) => el("option", { value: i }, visible(entry.label).slice(0, 90))));
      fill();
      return [select, fill];
    };
    const [examples] = list("Examples: the questions", () => questions.map((one) => ({ label: `${one.stem}: ${one.question}`, sql: one.sql })), ({ sql }) => { editor.text = sql; });
    const [past, fillHistory] = list("History", () => readHistory().map((sql) => ({ label: sql.replace(/\s+/g, " "), sql })), ({ sql }) => { editor.text = sql; });
    const schema = Object.fromEntries(Object.entries(tables).map(([name, table]) => [name, table.columns.map((column) => column.name)]));
    const editor = SqlEditor.create({ parent: holder, doc: text, schema, nonce: META("nonce"), label: "SQL query", onRun: run, onChange: () => {} });
    this.ready = () => { if (text) run(); };
    return [el("h1", {}, "SQL"), el("div", { class: "card" }, el("div", { class: "bar" }, examples, past), holder,
      el("div", { class: "bar" }, start, stop, el("label", { class: "inline" }, "Row limit", limit), el("span", { class: "soft small" }, "Export all rows:"), csv, parquet, saving,
        el("span", { class: "soft small" }, "Read-only; at most 1 GiB and 300 s. Ctrl+Enter runs."))), result, dictionary(tables)];
  },
};

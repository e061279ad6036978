"use strict";
// Find responses: filters, a condition in SQL that is checked while it is typed, sorting, and a selection to compare.

// What the server needs of the address; the responses chosen to compare may change without another request.
const listPath = () => `/api/responses?${place().search.slice(1).split("&").filter((part) => part && !part.startsWith("r=")).join("&")}`;

const FILTERS = ["run_id", "arm", "seed", "step", "step_from", "step_to", "prompt_id", "group_id", "is_correct", "is_kept", "stage", "phase", "sample_sign", "defect", "turns", "text", "where"];
// Filters of links that have no field of their own.
const HIDDEN = ["phase", "group_id", "is_kept"];
const SORTS = ["step", "reward", "advantage", "ppl", "ppl_z", "entropy_mean", "response_length", "is_correct", "arm", "prompt_id"];
const SHOWN = [
  ["step", "Step"], ["run_id", "Run"], ["prompt_id", "Prompt"], ["is_correct", "Verdict"], ["reward", "Reward"], ["advantage", "Advantage"],
  ["ppl", "Perplexity"], ["entropy_mean", "Entropy"], ["response_length", "Tokens"], ["defects", "Defects"],
];
const NUMBERS = new Set(["step", "reward", "advantage", "ppl", "entropy_mean", "response_length"]);

function choice(name, label, options, value) {
  return el("label", {}, label, el("select", { name }, el("option", { value: "" }, "any"),
    options.map(([key, text]) => {
      const option = el("option", { value: key }, text);
      option.selected = key === value;
      return option;
    })));
}

const field = (name, label, value, more = {}) => el("label", {}, label, el("input", { name, value: value ?? "", size: 8, ...more }));

// Side by side with the nearest response to the same prompt that has the other verdict.
const oppositeLink = (key, isCorrect) => (SAVED || isCorrect === null ? null
  : [el("br"), link(address("/compare", { opposite: key }), { class: "small nowrap", title: `Compare with a ${isCorrect ? "wrong" : "correct"} response to the same prompt` }, `vs ${isCorrect ? "wrong" : "correct"}`)]);

function listTable(columns, { sort, onSort, at, chosen }) {
  const rows = columns.run_id.map((run, i) => {
    const id = columns.rollout_id[i];
    const key = `${run}:${id}`;
    const box = el("input", { type: "checkbox", "aria-label": `Compare response ${id} of ${visible(run)}`, checked: chosen.has(key), onchange: (event) => chosen.toggle(key, event.target.checked) });
    const cells = SHOWN.map(([name]) => {
      const value = columns[name][i];
      if (name === "is_correct") return el("td", {}, verdictOf(value), oppositeLink(key, value));
      if (name === "defects") return el("td", { class: "small" }, (value ?? []).map(visible).join(", "));
      if (name === "prompt_id") return el("td", {}, link(address("/compare", { prompt_id: value, run }), { title: "All responses to this prompt" }, visible(value)));
      return el("td", { class: NUMBERS.has(name) ? "num" : null }, number(value));
    });
    // Texts may come after the rows.
    const text = columns.completion ? columns.completion[i] ?? "" : "…";
    return el("tr", {}, el("td", {}, SAVED ? null : box), cells,
      el("td", { class: "text mono" }, link(responseAddress(run, id, { at }), {}, lines(text.slice(0, 160)) || "(empty)"), text.length > 160 ? "…" : ""));
  });
  const head = SHOWN.map(([name, label]) => {
    const state = sort === name ? "ascending" : sort === `-${name}` ? "descending" : null;
    const can = SORTS.includes(name) && onSort;
    return el("th", { scope: "col", class: NUMBERS.has(name) ? "num" : null, "aria-sort": state },
      can && !SAVED ? el("button", { type: "button", onclick: () => onSort(state === "ascending" ? `-${name}` : name) }, `${label}${state === "ascending" ? " ↑" : state ? " ↓" : ""}`) : label);
  });
  return el("div", { class: "card scroll", tabindex: 0, role: "region", "aria-label": "Responses" }, el("table", {},
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, el("span", { class: "soft" }, "Compare")), head, el("th", { scope: "col" }, "Text"))), el("tbody", {}, rows)));
}

// Up to four responses to compare, kept while the reader turns pages.
function selection() {
  const keys = new Set(params().getAll("r"));
  const button = el("button", { type: "button", class: "primary", disabled: true, onclick: () => navigate(address("/compare", { r: [...keys] })) }, "Compare");
  const show = () => {
    button.disabled = keys.size < 2 || keys.size > 4;
    button.textContent = keys.size ? `Compare ${keys.size} of at most 4` : "Compare";
  };
  show();
  return {
    button, keys,
    has: (key) => keys.has(key),
    toggle(key, isOn) {
      if (isOn) keys.add(key);
      else keys.delete(key);
      replaceParams({ r: [...keys] });
      show();
    },
  };
}

PAGES["/responses"] = {
  title: () => "Responses",
  keepsState: true,
  async render() {
    const given = params();
    const value = (name) => given.get(name) ?? "";
    // The list is asked for at once, and shown as far as it is known.
    const stopping = new AbortController();
    this.leave = () => stopping.abort();
    let latest = null;
    let problem = null;
    let isWhole = false;
    let draw = () => {};
    let begin = null;
    const beginning = new Promise((done) => { begin = done; });
    const note = (found) => { latest = found; begin(); draw(); };
    this.whole = getLines(listPath(), note, stopping.signal).then((found) => { isWhole = true; note(found); }, (error) => {
      problem = error;
      isWhole = true;
      note(latest);
    });
    // A condition may take long; then the filters come first.
    const patience = new Promise((done) => { setTimeout(done, 500); });
    const [{ runs }] = await Promise.all([get("/api/runs"), Promise.race([beginning, patience])]);
    const distinct = (name) => [...new Set(runs.map((run) => run[name]).filter((one) => one !== null && one !== undefined))].sort().map((one) => [String(one), visible(String(one))]);
    const where = el("input", { name: "where", value: value("where"), placeholder: "ppl > 1.5 and list_contains(defects, 'repetition')", spellcheck: "false", autocomplete: "off", class: "mono", "aria-describedby": "where-problem" });
    const whereProblem = el("p", { id: "where-problem", class: "error small", role: "status" });
    let waiting = 0;
    where.addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(async () => {
        const text = where.value.trim();
        const found = text ? await answered(fetch(address("/api/check", { where: text }))).catch((error) => ({ problem: error.message })) : { problem: null };
        if (where.value.trim() !== text) return;
        whereProblem.textContent = found.problem ?? "";
        where.setAttribute("aria-invalid", String(Boolean(found.problem)));
      }, 250);
    });
    const form = el("form", { class: "card" },
      el("div", { class: "bar" },
        choice("run_id", "Run", distinct("run_id"), value("run_id")), choice("arm", "Arm", distinct("arm"), value("arm")), choice("seed", "Seed", distinct("seed"), value("seed")),
        field("step_from", "Step from", value("step") || value("step_from"), { inputmode: "numeric", size: 5 }), field("step_to", "to", value("step") || value("step_to"), { inputmode: "numeric", size: 5 }),
        field("prompt_id", "Prompt", value("prompt_id"), { size: 14 }),
        choice("is_correct", "Verdict", [["true", "correct"], ["false", "wrong"], ["null", "not judged"]], value("is_correct")),
        choice("stage", "Stage", [["rising", "rising"], ["plateau", "plateau"]], value("stage")),
        choice("sample_sign", "Advantage", [["positive", "positive"], ["negative", "negative"], ["null", "zero or none"]], value("sample_sign")),
        choice("defect", "Defect", ["any", "format_violation", "truncated", "repetition", "irrelevant"].map((one) => [one, one.replaceAll("_", " ")]), value("defect")),
        field("turns", "Turns, at least", value("turns") && Number(value("turns")) + 1, { inputmode: "numeric", size: 3 }),
        field("text", "Text contains", value("text"), { size: 14 })),
      el("div", { class: "bar" }, el("label", { class: "grow" }, "Condition in SQL over rollouts, with arm, seed, stage, phase, and sample_sign; subqueries may read any table", where),
        el("button", { class: "primary" }, "Show"), link("/responses", {}, "Clear")),
      whereProblem);
    const hidden = HIDDEN.filter((name) => value(name));
    const currentSort = value("sort") || "step";
    const keep = (changes) => {
      const values = Object.fromEntries([...FILTERS, "sort", "at"].map((name) => [name, value(name)]));
      return address("/responses", { ...values, r: [...chosen.keys], ...changes });
    };
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const entered = Object.fromEntries(new FormData(form));
      if (Number.isInteger(Number(entered.turns || "x"))) entered.turns = String(Number(entered.turns) - 1);
      navigate(address("/responses", { ...Object.fromEntries(["phase", "group_id", "is_kept", "at"].map((name) => [name, value(name)])), ...entered, sort: value("sort") }));
    });
    const chosen = selection();
    // Whatever can be clicked stays in the page: a click is lost if its button is replaced between press and release.
    const status = el("span", { role: "status" });
    const progress = el("progress", { max: 1, "aria-label": "Texts searched" });
    const stop = el("button", { type: "button", onclick: () => stopping.abort() }, "Stop");
    const turn = (by, label) => el("button", { type: "button", disabled: true, onclick: () => navigate(keep({ page: latest.page + by })) }, label);
    const [previous, next] = [turn(-1, "← Previous"), turn(1, "Next →")];
    const place = el("span", { class: "soft" });
    const saving = saveButton("responses") ?? "";
    const searching = el("div", { class: "bar" }, progress, stop);
    const turning = el("div", { class: "bar" }, previous, place, next, chosen.button, saving);
    const body = el("div");
    const holder = el("div", { class: "list" }, el("div", { class: "bar" }, status, searching, turning), body);
    let drawn = "";
    draw = () => {
      holder.toggleAttribute("aria-busy", !isWhole);
      searching.hidden = isWhole || latest?.searched === 1;
      turning.hidden = !latest;
      const isStopped = problem?.name === "AbortError";
      if (problem && !isStopped) return holder.replaceChildren(failure(problem));
      if (!latest) {
        status.textContent = isStopped ? "Stopped." : "Searching…";
        return;
      }
      const found = latest;
      const pages = Math.max(1, Math.ceil(found.num_rows / found.page_rows));
      const share = `${Math.floor(100 * found.searched)}%`;
      const searched = found.searched === 1 ? "" : isStopped ? ` in the ${share} searched before the stop` : ` in the ${share} searched so far`;
      status.textContent = `${number(found.num_rows)} response${found.num_rows === 1 ? "" : "s"}${searched}`;
      progress.value = found.searched;
      for (const [button, page] of [[previous, found.page - 1], [next, found.page + 1]]) button.disabled = SAVED || page < 1 || page > pages;
      place.textContent = found.page > pages ? `no page ${found.page}` : `page ${found.page} of ${number(pages)}`;
      const rows = JSON.stringify([found.columns.run_id, found.columns.rollout_id, "completion" in found.columns, isWhole && !found.num_rows]);
      if (rows === drawn) return;
      drawn = rows;
      body.replaceChildren(found.columns.run_id.length ? listTable(found.columns, { sort: currentSort, onSort: (sort) => navigate(keep({ sort, page: "" })), at: given.get("at"), chosen })
        : el("p", {}, isWhole ? "No response matches. Remove a filter, or look at the condition." : "None found yet."));
    };
    draw();
    return [el("h1", {}, "Responses"), SAVED ? null : form,
      hidden.length ? el("div", { class: "bar" }, "Also filtered by:", hidden.map((name) => el("button", { type: "button", title: "Remove", onclick: () => navigate(keep({ [name]: "", page: "" })) }, `${name} = ${visible(value(name))} ×`))) : null,
      holder];
  },
};

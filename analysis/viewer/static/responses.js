"use strict";
// Find responses: filters, a condition in SQL that is checked while it is typed, sorting, and a selection to compare.

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

function listTable(columns, { sort, onSort, at, chosen }) {
  const rows = columns.run_id.map((run, i) => {
    const id = columns.rollout_id[i];
    const key = `${run}:${id}`;
    const box = el("input", { type: "checkbox", "aria-label": `Compare response ${id} of ${visible(run)}`, checked: chosen.has(key), onchange: (event) => chosen.toggle(key, event.target.checked) });
    const cells = SHOWN.map(([name]) => {
      const value = columns[name][i];
      if (name === "is_correct") return el("td", {}, verdictOf(value));
      if (name === "defects") return el("td", { class: "small" }, (value ?? []).map(visible).join(", "));
      if (name === "prompt_id") return el("td", {}, link(address("/compare", { prompt_id: value, run }), { title: "All responses to this prompt" }, visible(value)));
      return el("td", { class: NUMBERS.has(name) ? "num" : null }, number(value));
    });
    const text = columns.completion[i] ?? "";
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
    const { runs } = await get("/api/runs");
    const distinct = (name) => [...new Set(runs.map((run) => run[name]).filter((one) => one !== null && one !== undefined))].sort().map((one) => [String(one), visible(String(one))]);
    const where = el("input", { name: "where", value: value("where"), placeholder: "ppl > 1.5 and list_contains(defects, 'repetition')", spellcheck: "false", autocomplete: "off", class: "mono", "aria-describedby": "where-problem" });
    const problem = el("p", { id: "where-problem", class: "error small", role: "status" });
    let waiting = 0;
    where.addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(async () => {
        const text = where.value.trim();
        const found = text ? await answered(fetch(address("/api/check", { where: text }))).catch((error) => ({ problem: error.message })) : { problem: null };
        if (where.value.trim() !== text) return;
        problem.textContent = found.problem ?? "";
        where.setAttribute("aria-invalid", String(Boolean(found.problem)));
      }, 250);
    });
    const form = el("form", { class: "card" },
      el("div", { class: "bar" },
        choice("run_id", "Run", distinct("run_id"), value("run_id")), choice("arm", "Arm", distinct("arm"), value("arm")), choice("seed", "Seed", distinct("seed"), value("seed")),
        field("step_from", "Step from", value("step") || value("step_from"), { inputmode: "numeric", size: 5 }), field("step_to", "to", value("step") || value("step_to"), { inputmode: "numeric", size: 5 }),
        field("prompt_id", "Prompt", value("prompt_id"), { size: 14 }),
        choice("is_correct", "Correct", [["true", "yes"], ["false", "no"], ["null", "not judged"]], value("is_correct")),
        choice("stage", "Stage", [["rising", "rising"], ["plateau", "plateau"]], value("stage")),
        choice("sample_sign", "Advantage", [["positive", "positive"], ["negative", "negative"], ["null", "zero or none"]], value("sample_sign")),
        choice("defect", "Defect", ["any", "format_violation", "truncated", "repetition", "irrelevant"].map((one) => [one, one.replaceAll("_", " ")]), value("defect")),
        field("turns", "Turns, at least", value("turns") && Number(value("turns")) + 1, { inputmode: "numeric", size: 3 }),
        field("text", "Text contains", value("text"), { size: 14 })),
      el("div", { class: "bar" }, el("label", { class: "grow" }, "Condition in SQL over rollouts, with arm, seed, stage, phase, and sample_sign; subqueries may read any table", where),
        el("button", { class: "primary" }, "Show"), link("/responses", {}, "Clear")),
      problem);
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
    let content;
    try {
      const found = await get(address("/api/responses", Object.fromEntries([...new Set(given.keys())].filter((name) => name !== "r").map((name) => [name, given.get(name)]))));
      const pages = Math.max(1, Math.ceil(found.num_rows / found.page_rows));
      const turn = (page, label) => el("button", { type: "button", disabled: SAVED || page < 1 || page > pages, onclick: () => navigate(keep({ page })) }, label);
      content = [
        el("div", { class: "bar" }, el("span", { role: "status" }, `${number(found.num_rows)} response${found.num_rows === 1 ? "" : "s"}`), turn(found.page - 1, "← Previous"),
          el("span", { class: "soft" }, found.page > pages ? `no page ${found.page}` : `page ${found.page} of ${number(pages)}`), turn(found.page + 1, "Next →"), chosen.button, saveButton("responses")),
        hidden.length ? el("div", { class: "bar" }, "Also filtered by:", hidden.map((name) => el("button", { type: "button", title: "Remove", onclick: () => navigate(keep({ [name]: "", page: "" })) }, `${name} = ${visible(value(name))} ×`))) : null,
        found.num_rows ? listTable(found.columns, { sort: currentSort, onSort: (sort) => navigate(keep({ sort, page: "" })), at: given.get("at"), chosen })
          : el("p", {}, "No response matches. Remove a filter, or look at the condition."),
      ];
    } catch (error) {
      content = failure(error);
    }
    return [el("h1", {}, "Responses"), SAVED ? null : form, content];
  },
};

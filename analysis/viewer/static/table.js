"use strict";
// A table of any length, of which only the rows in view exist.

const ROW_HEIGHT = 26;

// Columns beyond these would freeze the page.
const MOST_COLUMNS = 200;

function virtualTable(columns, types, allNames) {
  const names = allNames.slice(0, MOST_COLUMNS);
  const length = names.length ? columns[names[0]].length : 0;
  const isNumber = (name) => /^(U?Int|Float|Decimal)/.test(types[name]);
  const body = el("tbody");
  const cell = (name, i) => {
    const value = columns[name][i];
    const whole = value === null ? "–" : lines(typeof value === "object" ? JSON.stringify(value) : value);
    const text = typeof value === "number" && !Number.isInteger(value) ? number(value) : whole;
    return el("td", { class: isNumber(name) ? "num" : null, title: whole.slice(0, 1000) }, text.slice(0, 400).replaceAll("\n", "↵"));
  };
  const head = names.map((name) => el("th", { class: isNumber(name) ? "num" : null, scope: "col", title: types[name] }, visible(name)));
  const table = el("table", { "aria-rowcount": length + 1 }, el("thead", {}, el("tr", {}, head)), body);
  const view = el("div", { class: "rows", tabindex: 0, role: "region", "aria-label": "Rows" }, table);
  let shown = "";
  const fill = () => {
    const first = Math.max(0, Math.floor(view.scrollTop / ROW_HEIGHT) - 20);
    const last = Math.min(length, first + Math.ceil((view.clientHeight || 600) / ROW_HEIGHT) + 40);
    if (shown === `${first}-${last}`) return;
    shown = `${first}-${last}`;
    const gap = (rows) => {
      const filler = el("td", { colspan: Math.max(names.length, 1) });
      filler.style.cssText = `height:${rows * ROW_HEIGHT}px;padding:0;border:0`;
      return el("tr", { "aria-hidden": true }, filler);
    };
    const rows = [];
    for (let i = first; i < last; i++) rows.push(el("tr", { "aria-rowindex": i + 2 }, names.map((name) => cell(name, i))));
    body.replaceChildren(...(first ? [gap(first)] : []), ...rows, ...(last < length ? [gap(length - last)] : []));
  };
  view.addEventListener("scroll", fill, { passive: true });
  fill();
  return view;
}

"use strict";
// What all pages share: elements, numbers, addresses, data, and the tip under the pointer.

// A saved file holds its address and all data that the page asked the server for.
const SAVED = (() => {
  const holder = document.getElementById("saved");
  return holder ? JSON.parse(holder.textContent) : null;
})();
const FETCHED = new Map();
const META = (name) => document.querySelector(`meta[name=${name}]`)?.content ?? "";

// Text is never markup: children are nodes or text.
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked" || name === "disabled" || name === "hidden") node[name] = value;
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]/g;
const PAIRS = /[\ud800-\udbff][\udc00-\udfff]/g;

// Invisible characters as escapes; complete surrogate pairs are ordinary characters.
function visible(text) {
  const escaped = (part) => part.replace(UNSEEN, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);
  const pairs = text.match(PAIRS) ?? [];
  return text.split(PAIRS).map((part, i) => escaped(part) + (pairs[i] ?? "")).join("");
}

const lines = (text) => String(text).split("\n").map(visible).join("\n");

function number(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value !== "number") return visible(typeof value === "object" ? JSON.stringify(value) : String(value));
  const size = Math.abs(value);
  if (size >= 1e15) return String(value);
  if (Number.isInteger(value)) return size >= 10000 ? value.toLocaleString("en-US") : String(value);
  if (size >= 1000) return value.toLocaleString("en-US", { maximumFractionDigits: 0 });
  return size >= 0.001 || size === 0 ? String(Number(value.toPrecision(4))) : value.toExponential(2);
}

const interval = (low, high) => (low === null || low === undefined || high === null ? "" : ` [${number(low)}, ${number(high)}]`);

// Addresses

const place = () => (SAVED ? { path: SAVED.path, search: SAVED.search } : { path: location.pathname, search: location.search });
const params = () => new URLSearchParams(place().search);

function address(path, values) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(values)) {
    for (const one of Array.isArray(value) ? value : [value]) {
      if (one !== null && one !== undefined && one !== "") query.append(name, one);
    }
  }
  const text = query.toString();
  return text ? `${path}?${text}` : path;
}

// A saved file has no server to link to.
const link = (href, attributes, ...children) => (SAVED ? el("span", {}, ...children) : el("a", { href, ...attributes }, ...children));

const responseAddress = (run, id, more = {}) => address("/response", { run, id, ...more });

// Data

class Problem extends Error {}

async function get(path) {
  if (SAVED) {
    if (path in SAVED.data) return SAVED.data[path];
    throw new Problem("not part of this saved file");
  }
  const found = await answered(fetch(path));
  FETCHED.set(path, found);
  return found;
}

// An answer of several lines, each of which says more than the one before; onLine gets all except the last.
async function getLines(path, onLine, signal) {
  if (SAVED) return get(path);
  const answer = await answered(fetch(path, { signal }));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let last = null;
  for (;;) {
    const { value, done } = await reader.read();
    const parts = (rest + (value ?? "")).split("\n");
    rest = parts.pop();
    for (const part of parts) {
      if (last) onLine(last);
      last = JSON.parse(part);
      if (last.error) throw new Problem(last.error);
    }
    if (done) break;
    if (last) {
      onLine(last);
      FETCHED.set(path, last);
    }
  }
  return last;
}

async function answered(request) {
  let answer;
  try {
    answer = await request;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("the server does not answer; is `entrace view` still running?");
  }
  const isJson = (answer.headers.get("content-type") ?? "").startsWith("application/json");
  if (answer.ok) return isJson ? answer.json() : answer;
  throw new Problem(isJson ? (await answer.json()).error : `${answer.status} ${(await answer.text()).slice(0, 300)}`);
}

const post = (path, body, signal) => answered(fetch(path, {
  method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal,
}));

function showProblem(text) {
  const line = document.getElementById("problem");
  line.hidden = !text;
  line.textContent = text ? visible(text) : "";
}

const failure = (error) => {
  if (!(error instanceof Problem)) console.error(error);
  return el("p", { class: "error", role: "alert" }, visible(error.message));
};

async function download(path, body, name, signal) {
  const answer = await post(path, body, signal);
  const at = URL.createObjectURL(await answer.blob());
  el("a", { href: at, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(at), 10000);
}

const saveButton = (name) => SAVED ? null : el("button", {
  type: "button",
  title: "One HTML file that opens without a server",
  onclick: async (event) => {
    try {
      await download("/api/save", { ...place(), data: Object.fromEntries(FETCHED) }, `${name}.html`);
    } catch (error) {
      event.target.after(failure(error));
    }
  },
}, "Save as HTML");

// The tip under the pointer, or beside what has the focus.

function showTip(content, left, top) {
  const tip = document.getElementById("tip");
  tip.replaceChildren(content);
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(left + 14, innerWidth - box.width - 8))}px`;
  tip.style.top = `${Math.max(4, top + 18 + box.height > innerHeight ? top - box.height - 12 : top + 18)}px`;
}

const hideTip = () => { document.getElementById("tip").hidden = true; };

const facts = (entries, name = "facts") => el("dl", { class: name },
  entries.map(([key, value]) => [el("dt", {}, key), el("dd", {}, value instanceof Node ? value : lines(value))]));

const verdictOf = (isCorrect) => isCorrect === null || isCorrect === undefined ? el("span", { class: "chip" }, "not judged")
  : el("span", { class: `chip ${isCorrect ? "right" : "wrong"}` }, isCorrect ? "correct" : "wrong");

// Theme: the system's unless the reader chose one.

function applyTheme() {
  let chosen = null;
  try { chosen = localStorage.getItem("entrace-theme"); } catch { /* a saved file may have no storage */ }
  const isDark = chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = isDark ? "dark" : "light";
}

function switchTheme() {
  const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  try { localStorage.setItem("entrace-theme", next); } catch { /* see above */ }
  document.documentElement.dataset.theme = next;
  dispatchEvent(new Event("theme"));
}

applyTheme();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", applyTheme);

const PAGES = {};

// The list that the reader came from: its address, and how far it was scrolled.
function lastList() {
  try { return JSON.parse(sessionStorage.getItem("entrace-list")); } catch { return null; }
}

function rememberList(href, top) {
  try { sessionStorage.setItem("entrace-list", JSON.stringify({ href, top })); } catch { /* a saved file may have no storage */ }
}

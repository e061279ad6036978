"use strict";
// A response as text, each token colored by one quantity.

// name -> [label, unit, kind]. Signed quantities have two colors, others one; the rest has a color per value.
const QUANTITIES = {
  entropy: ["entropy", "nats", "size"],
  logprob: ["log-probability", "nats", "signed"],
  surprisal: ["surprisal", "nats", "size"],
  advantage: ["advantage", "std of group reward", "signed"],
  shaped_advantage: ["shaped advantage", "std of group reward", "signed"],
  advantage_change: ["shaped minus raw advantage", "std of group reward", "signed"],
  grad_norm: ["gradient norm", "nats", "size"],
  dp: ["change of probability by the update", "probability", "signed"],
  dlogprob: ["change of log-probability by the update", "nats", "signed"],
  dentropy: ["change of entropy by the update", "nats", "signed"],
  impact: ["impact of replacing the token", "accuracy", "signed"],
  mismatch: ["log-probability, trainer minus engine", "nats", "signed"],
  reference_gap: ["log-probability, policy minus reference", "nats", "signed"],
  category: ["category", "", "category"],
  is_clipped: ["gradient removed by the ratio clip", "", "flag"],
  loss_mask: ["in the loss", "", "flag"],
  turn: ["turn", "", "turn"],
};
const CATEGORIES = ["formal_reasoning", "logical_structuring", "metacognitive", "semantic_support", "special"];
const LEVELS = 5;
const CHUNK = 250;

// A quantity is there if some token has a value.
const quantitiesOf = (tokens) => Object.keys(QUANTITIES).filter((name) => tokens[name]?.some((value) => value !== null));

// Text of a token as the page shows it, and whether it is white space alone.
function tokenText(tokens, i) {
  const text = tokens.text[i];
  if (text === null || text === undefined) return [`⟨${tokens.token_id[i]}⟩`, false];
  if (text === "") return ["␀", true];
  if (/^[ \n\r\t\u00a0\u3000]+$/.test(text)) {
    return [text.replaceAll(" ", "␣").replaceAll("\u00a0", "⍽").replaceAll("\t", "⇥\t").replaceAll("\r", "␍").replaceAll("\n", "↵\n"), true];
  }
  return [lines(text.replaceAll("\t", "  ")), false];
}

// Size that has the strongest color: the largest but for one token in a hundred.
function limitOf(values) {
  const sizes = values.filter((value) => typeof value === "number").map(Math.abs).sort((a, b) => a - b);
  return sizes.length ? sizes[Math.min(sizes.length - 1, Math.floor(0.99 * sizes.length))] || sizes.at(-1) || 1 : 1;
}

function colorClass(name, value, limit) {
  if (value === null || value === undefined) return "none";
  const kind = QUANTITIES[name][2];
  if (kind === "category") return `c-${CATEGORIES.includes(value) ? value : "special"}`;
  if (kind === "flag") return value ? "p4" : "m2";
  if (kind === "turn") return `t${value % 2}`;
  const level = Math.min(LEVELS, Math.ceil((LEVELS * Math.abs(value)) / limit - 1e-9));
  return level ? `${kind === "signed" && value < 0 ? "m" : "p"}${level}` : "";
}

function legend(name, limit) {
  const [label, unit, kind] = QUANTITIES[name];
  const swatches = (classes) => el("span", { class: "ramp", "aria-hidden": true }, classes.map((one) => el("span", { class: `swatch ${one}` })));
  const levels = Array.from({ length: LEVELS }, (_, i) => i + 1);
  const parts = [`${label}${unit ? ` (${unit})` : ""}:`];
  if (kind === "category") parts.push(CATEGORIES.map((one) => [swatches([`c-${one}`]), ` ${one.replaceAll("_", " ")} `]));
  else if (kind === "flag") parts.push(swatches(["p4"]), "yes", swatches(["m2"]), "no");
  else if (kind === "turn") parts.push(swatches(["t0", "t1"]), "turns alternate");
  else if (kind === "size") parts.push("0", swatches(["", ...levels.map((n) => `p${n}`)]), `${number(limit)} or more`);
  else parts.push(number(-limit), swatches([...levels.map((n) => `m${n}`).reverse(), "", ...levels.map((n) => `p${n}`)]), `+${number(limit)} and beyond`);
  parts.push(swatches(["none"]), "unknown");
  return el("div", { class: "legend" }, parts.map((part) => (typeof part === "string" ? el("span", {}, part) : part)));
}

// A view of tokens [first, last). Chunks outside the view hold plain text; those in view hold one element per token.
function tokenView(tokens, { first = 0, last = tokens.token_id.length, label, isSame = null, onSelect, onHover }) {
  const root = el("div", { class: "tokens", tabindex: 0, role: "region", "aria-label": label, dir: "auto" });
  let quantity = null;
  let limit = 1;
  let selected = -1;
  const chunks = [];
  const elements = new Map();
  const classOf = (i) => {
    const [, isWhite] = tokenText(tokens, i);
    return [
      quantity ? colorClass(quantity, tokens[quantity][i], limit) : "",
      tokens.is_special[i] ? "special" : isWhite ? "white" : "",
      tokens.loss_mask?.[i] === false ? "context" : "", isSame?.(i) ? "same" : "", i === selected ? "here" : "",
    ].filter(Boolean).join(" ");
  };
  const open = (chunk) => {
    if (chunk.isOpen) return;
    chunk.isOpen = true;
    const parts = [];
    for (let i = chunk.from; i < chunk.to; i++) {
      const item = el("i", { class: classOf(i), "data-i": i }, tokenText(tokens, i)[0]);
      elements.set(i, item);
      parts.push(item);
    }
    chunk.node.replaceChildren(...parts);
  };
  const close = (chunk) => {
    if (!chunk.isOpen) return;
    chunk.isOpen = false;
    for (let i = chunk.from; i < chunk.to; i++) elements.delete(i);
    chunk.node.textContent = chunk.text;
  };
  for (let from = first; from < last; from += CHUNK) {
    const to = Math.min(from + CHUNK, last);
    let text = "";
    for (let i = from; i < to; i++) text += tokenText(tokens, i)[0];
    const chunk = { from, to, text, node: el("span", {}, text), isOpen: false };
    chunk.node.chunk = chunk;
    chunks.push(chunk);
  }
  root.append(...chunks.map((chunk) => chunk.node));
  if (chunks.length <= 4) chunks.forEach(open);
  else {
    const watcher = new IntersectionObserver((seen) => {
      for (const { target, isIntersecting } of seen) (isIntersecting ? open : close)(target.chunk);
    }, { root, rootMargin: "400px 0px" });
    chunks.forEach((chunk) => watcher.observe(chunk.node));
  }
  const indexOf = (event) => (event.target instanceof HTMLElement && event.target.dataset.i ? Number(event.target.dataset.i) : -1);
  const select = (i, { scroll = true, isQuiet = false } = {}) => {
    if (i < first || i >= last) return;
    const before = selected;
    selected = i;
    const chunk = chunks[Math.floor((i - first) / CHUNK)];
    open(chunk);
    for (const one of [before, i]) if (elements.has(one)) elements.get(one).className = classOf(one);
    const box = elements.get(i).getBoundingClientRect();
    const own = root.getBoundingClientRect();
    if (scroll && (box.top < own.top || box.bottom > own.bottom)) root.scrollTop += box.top - own.top - root.clientHeight / 2;
    if (!isQuiet) onSelect?.(i);
  };
  root.addEventListener("click", (event) => { const i = indexOf(event); if (i >= 0) select(i, { scroll: false }); });
  root.addEventListener("mouseover", (event) => { const i = indexOf(event); if (i >= 0) onHover?.(i, event); });
  root.addEventListener("mouseleave", () => onHover?.(-1));
  return {
    root,
    select,
    get selected() { return selected; },
    color(name, most) {
      quantity = name;
      limit = most;
      for (const [i, item] of elements) item.className = classOf(i);
    },
  };
}

// All that is known of one token, for the panel beside the text.
function tokenFacts(tokens, i) {
  const known = (name) => tokens[name]?.[i] !== null && tokens[name]?.[i] !== undefined;
  const text = tokens.text[i];
  return facts([
    ["token", el("span", { class: "mono" }, text === null ? "unknown text" : lines(JSON.stringify(text)))],
    ["id", String(tokens.token_id[i])],
    ["position", String(tokens.position[i])],
    ...(known("logprob") ? [["probability", number(Math.exp(tokens.logprob[i]))]] : []),
    ...Object.keys(QUANTITIES).filter(known).map((name) => {
      const [label, unit, kind] = QUANTITIES[name];
      const value = kind === "category" ? String(tokens[name][i]).replaceAll("_", " ") : number(tokens[name][i]);
      return [label, unit ? `${value} ${unit}` : value];
    }),
    ...["sampling_logprob", "reference_logprob", "num_continuations", "policy_version"].filter(known)
      .map((name) => [name.replaceAll("_", " "), number(tokens[name][i])]),
  ]);
}

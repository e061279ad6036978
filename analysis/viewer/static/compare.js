"use strict";
// Responses to one prompt side by side, aligned where they diverge.

function heading({ response }) {
  return el("p", { class: "small" }, link(responseAddress(response.run_id, response.rollout_id), {}, `${visible(response.run_id)}, step ${response.step}, response ${response.rollout_id}`), " ",
    verdictOf(response.is_correct), ` perplexity ${number(response.ppl)}, ${number(response.response_length)} tokens`);
}

// Rows of an alignment: spans [from, to) of each response, and whether they are equal.
function alignedRows(parts, spans) {
  const lengths = parts.map((part) => part.tokens.token_id.length);
  if (parts.length === 2) return spans[0].map(([a, b, c, d, isEqual]) => ({ spans: [[a, b], [c, d]], isEqual }));
  const ids = parts.map((part) => part.tokens.token_id);
  let same = 0;
  while (same < Math.min(...lengths) && ids.every((own) => own[same] === ids[0][same])) same++;
  const rows = [];
  if (same) rows.push({ spans: parts.map(() => [0, same]), isEqual: true });
  if (lengths.some((length) => length > same)) rows.push({ spans: lengths.map((length) => [same, length]), isEqual: false });
  return rows;
}

async function renderAligned(page) {
  const given = params();
  // The server finds the other response; the address that is kept names both.
  const opposite = given.get("opposite");
  const found = await get(address("/api/compare", opposite ? { opposite } : { r: given.getAll("r") }));
  const parts = found.responses;
  if (opposite) {
    const keys = parts.map(({ response }) => `${response.run_id}:${response.rollout_id}`);
    replaceParams({ opposite: "", r: keys });
    FETCHED.set(address("/api/compare", { r: keys }), found);
  }
  if (parts.some((part) => !part.tokens.token_id.length)) throw new Problem("the tokens of one of these responses are not stored");
  const available = quantitiesOf(parts[0].tokens).filter((name) => parts.every((part) => quantitiesOf(part.tokens).includes(name)));
  const picker = el("select", { "aria-label": "Color tokens by" }, available.map((name) => el("option", { value: name }, QUANTITIES[name][0])));
  const legendPlace = el("div");
  const views = [];
  const rows = alignedRows(parts, found.spans);
  const at = rows.findIndex((row) => !row.isEqual);
  const cells = rows.flatMap((row) => row.spans.map(([from, to], column) => {
    const view = tokenView(parts[column].tokens, {
      first: from, last: to, label: `${row.isEqual ? "Equal" : "Different"} tokens ${from} to ${to} of response ${column + 1}`, isSame: row.isEqual ? () => true : null,
      onHover: (i, event) => (i < 0 ? hideTip() : showTip(tokenFacts(parts[column].tokens, i), event.clientX, event.clientY)),
    });
    views.push({ view, tokens: parts[column].tokens });
    return el("div", { "data-label": `response ${parts[column].response.rollout_id}` }, from === to ? el("span", { class: "soft small" }, "(nothing)") : view.root);
  }));
  const color = (name) => {
    picker.value = name;
    const limit = Math.max(...parts.map((part) => limitOf(part.tokens[name])));
    for (const { view } of views) view.color(name, limit);
    legendPlace.replaceChildren(legend(name, limit));
  };
  picker.addEventListener("change", () => { color(picker.value); replaceParams({ color: picker.value }); });
  page.ready = () => available.length && color(available.includes(given.get("color")) ? given.get("color") : available[0]);
  const grid = el("div", { class: "columns" }, parts.map((part) => el("div", {}, heading(part))), cells);
  grid.style.gridTemplateColumns = `repeat(${parts.length}, minmax(0, 1fr))`;
  const diverges = at < 0 ? "These responses are equal." : `They share ${rows[0].isEqual ? rows[0].spans[0][1] : 0} tokens before they diverge; equal parts are pale.`;
  const prompts = [...new Set(parts.map((part) => part.response.prompt ?? part.response.prompt_id))];
  return [el("h1", {}, `${parts.length} responses side by side`),
    prompts.length > 1 ? el("p", { class: "soft" }, "They answer different prompts.") : el("details", { class: "card" }, el("summary", {}, "Prompt"), el("pre", { tabindex: 0 }, lines(parts[0].response.prompt ?? "unknown"))),
    el("div", { class: "bar" }, el("label", { class: "inline" }, "Color by", picker), el("span", {}, diverges), saveButton("comparison")), legendPlace, grid];
}

PAGES["/compare"] = {
  title: () => "Compare",
  async render() {
    if (params().has("r") || params().has("opposite")) return renderAligned(this);
    const prompt = params().get("prompt_id");
    if (!prompt) return [el("h1", {}, "Compare responses"), el("p", {}, "Choose two to four responses on the page ", link("/responses", {}, "Responses"), ", or a prompt there.")];
    const found = await get(address("/api/prompt", { prompt_id: prompt, run: params().get("run") }));
    const chosen = selection();
    return [el("h1", {}, `Responses to ${visible(prompt)}`),
      el("details", { class: "card", open: true }, el("summary", {}, "Prompt"), el("pre", { tabindex: 0 }, lines(found.prompt.prompt ?? "unknown"))),
      el("div", { class: "bar" }, el("span", {}, `${found.columns.run_id.length} responses over steps and arms${found.num_other_runs ? `; in ${found.num_other_runs} runs this id is another prompt` : ""}`), chosen.button),
      listTable(found.columns, { sort: "step", onSort: null, chosen })];
  },
};

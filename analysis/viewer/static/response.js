"use strict";
// One response: its text colored by a quantity, every column of a token, and the quantity along the response.

function about(response) {
  const known = (name, label = name.replaceAll("_", " ")) => (response[name] === null || response[name] === undefined ? [] : [[label, number(response[name])]]);
  return facts([
    ["run", visible(response.run_id)], ...known("arm"), ...known("seed"), ["step", `${response.step}${response.stage ? `, ${response.stage}` : ""}`],
    ["prompt", link(address("/compare", { prompt_id: response.prompt_id }), {}, visible(response.prompt_id))],
    ["verdict", verdictOf(response.is_correct)], ...known("reward"), ...known("length_penalty"), ...known("advantage"),
    ...(response.reward_components ? [["components", lines(JSON.stringify(response.reward_components))]] : []),
    ...(response.answer === null ? [] : [["answer", lines(response.answer)]]), ...(response.ground_truth ? [["reference", lines(response.ground_truth)]] : []),
    ...known("ppl", "perplexity"), ...known("ppl_z", "perplexity, z in group"), ...known("entropy_mean", "mean entropy (nats)"),
    ["tokens", number(response.response_length) + (response.is_truncated ? ", truncated" : "")],
    ["defects", (response.defects ?? []).join(", ") || "none"],
    ["update", response.is_kept ? "in the update" : `left out: ${response.drop_reason ?? "unknown reason"}`],
    ...known("entropy_kind", "entropy is"), ...known("logprob_kind", "log-probability is"), ...known("temperature"),
  ]);
}

PAGES["/response"] = {
  title: () => `Response ${params().get("id") ?? ""}`,
  async render() {
    const given = params();
    const found = await get(address("/api/response", { run: given.get("run"), id: given.get("id") }));
    const { response, tokens, neighbors } = found;
    const length = tokens.token_id.length;
    const available = quantitiesOf(tokens);
    const list = SAVED ? null : lastList();
    const head = [
      list ? el("p", { class: "small" }, link(list.href, {}, "← Back to the list")) : null,
      el("h1", {}, `Response ${response.rollout_id} `, el("span", { class: "soft small" }, `step ${response.step}, ${visible(response.run_id)}`)),
    ];
    const move = (id, label, key) => (SAVED ? null : el("button", { type: "button", disabled: id === null, title: `Key ${key}`, onclick: () => visit(id) }, label));
    const prompt = el("details", { class: "card" }, el("summary", {}, "Prompt"), el("pre", { tabindex: 0 }, response.prompt === null ? "unknown" : lines(response.prompt)));
    const nav = el("div", { class: "bar" }, move(neighbors.previous, "← Previous response", "p"), move(neighbors.next, "Next response →", "n"),
      move(neighbors.earlier, "↑ Same prompt, earlier step", "e"), move(neighbors.later, "Same prompt, later step ↓", "l"),
      SAVED || response.is_correct === null ? null : el("button", {
        type: "button", title: "Key x", disabled: neighbors.opposite === null, onclick: () => contrast(),
      }, `Compare with a ${response.is_correct ? "wrong" : "correct"} response`), saveButton(`response-${response.rollout_id}`));
    let colored = given.get("color");
    const contrast = () => neighbors.opposite !== null && navigate(address("/compare", { r: [response.rollout_id, neighbors.opposite].map((id) => `${response.run_id}:${id}`), color: colored }));
    const visit = (id) => id !== null && navigate(responseAddress(response.run_id, id, { color: colored }));
    this.keys = { n: () => visit(neighbors.next), p: () => visit(neighbors.previous), l: () => visit(neighbors.later), e: () => visit(neighbors.earlier), x: contrast };
    if (!length) {
      return [head, nav, prompt, el("div", { class: "card" }, el("p", { class: "soft" }, "The tokens of this response are not stored."), el("pre", { tabindex: 0 }, lines(response.completion ?? "")), about(response))];
    }
    const panel = el("div", { class: "card side", "aria-live": "polite" });
    const showToken = (i) => panel.replaceChildren(el("h2", { class: "minor" }, `Token at position ${tokens.position[i]}, ${length} in all`), tokenFacts(tokens, i));
    const relative = Number(given.get("at"));
    const view = tokenView(tokens, {
      label: "Tokens of the response. Left and right arrow keys move between tokens.",
      onSelect: (i) => { showToken(i); replaceParams({ position: tokens.position[i] }); },
      onHover: (i, event) => (i < 0 ? hideTip() : showTip(tokenFacts(tokens, i), event.clientX, event.clientY)),
    });
    const legendPlace = el("div");
    const plotPlace = el("div", { class: "card" });
    const picker = el("select", { "aria-label": "Color tokens by" }, available.map((name) => el("option", { value: name }, QUANTITIES[name][0])));
    const color = async (name) => {
      picker.value = name;
      colored = name;
      const limit = limitOf(tokens[name]);
      view.color(name, limit);
      legendPlace.replaceChildren(legend(name, limit));
      plotPlace.replaceChildren();
      if (["category", "flag", "turn"].includes(QUANTITIES[name][2])) return;
      const own = { label: QUANTITIES[name][0], values: tokens[name], color: ink("--accent"), points: name === "impact" };
      const draw = (series, note) => {
        plotPlace.replaceChildren(el("h2", { class: "minor" }, `${QUANTITIES[name][0]} along the response`));
        plot(plotPlace, tokens.position, series, { xLabel: "position (tokens)", yLabel: QUANTITIES[name][1], onPick: (i) => view.select(i) });
        plotPlace.append(el("p", { class: "small soft" }, note));
      };
      if (!response.stage || name === "impact") {
        draw([own], "");
        return;
      }
      draw([own], "Computing the mean of the stage…");
      const band = await get(address("/api/band", { run: response.run_id, stage: response.stage, quantity: name })).catch((error) => ({ bin: [], problem: error.message }));
      if (picker.value !== name) return;
      const spread = (values) => tokens.position.map((position) => {
        const at = band.bin.indexOf(Math.min(19, Math.floor((20 * position) / length)));
        return at < 0 ? null : values[at];
      });
      if (!band.bin.length) draw([own], band.problem ?? "");
      else {
        draw([{ label: `mean of the ${response.stage} stage`, values: spread(band.mean), color: ink("--soft"), dash: [5, 4], band: [spread(band.low), spread(band.high)] }, own],
          "Gray: mean of the stage at equal relative positions; band: first to last decile.");
      }
    };
    picker.addEventListener("change", () => {
      color(picker.value);
      replaceParams({ color: picker.value });
      // The arrow keys belong to the tokens again.
      view.root.focus();
    });
    const first = available.includes(given.get("color")) ? given.get("color") : (available[0] ?? "category");
    this.keys = {
      ...this.keys,
      ArrowRight: () => view.select(Math.min(view.selected + 1, length - 1)), ArrowLeft: () => view.select(Math.max(view.selected - 1, 0)),
      Home: () => view.select(0), End: () => view.select(length - 1),
      c: () => { const next = available[(available.indexOf(picker.value) + 1) % available.length]; color(next); replaceParams({ color: next }); },
    };
    const absent = Object.keys(QUANTITIES).filter((name) => !available.includes(name));
    this.ready = () => {
      color(first);
      const asked = given.has("position") ? tokens.position.indexOf(Number(given.get("position"))) : Number.isFinite(relative) && given.has("at") ? Math.floor(relative * length) : 0;
      view.select(Math.max(0, Math.min(asked, length - 1)), { isQuiet: !given.has("at") });
      showToken(view.selected);
    };
    return [head, nav, prompt, el("div", { class: "reader" },
      el("div", {}, el("div", { class: "card" },
        el("div", { class: "bar" }, el("label", { class: "inline" }, "Color by", picker), el("span", { class: "soft small" }, "Keys: ← → token, c color, n p response, e l step, x compare")),
        legendPlace, view.root,
        absent.length ? el("details", {}, el("summary", { class: "small" }, `Not recorded: ${absent.length} quantities`), el("p", { class: "small soft" }, absent.map((name) => QUANTITIES[name][0]).join(", "))) : null),
      plotPlace, el("div", { class: "card" }, about(response))),
      panel)];
  },
};

"use strict";
// Show the page that the address names, follow links within the viewer, and take up what a run in training adds.

const LINKS = [["/", "Overview"], ["/responses", "Responses"], ["/compare", "Compare"], ["/sql", "SQL"]];
let rendering = 0;
// What is shown, without the part of the address behind #.
let shown = "";

// How far a list is scrolled is restored by a link back to it as by the button of the browser.
function navigate(href) {
  if (SAVED) return;
  history.replaceState({ top: scrollY }, "");
  if (location.pathname === "/responses") rememberList(shown, scrollY);
  const list = lastList();
  history.pushState(null, "", href);
  document.getElementById("mistake").textContent = "";
  render({ scrollTop: list?.href === place().path + place().search && shown !== list.href ? list.top : 0 });
}

// Change parameters of the address without a new entry in the history.
function replaceParams(changes) {
  if (SAVED) return;
  const query = params();
  for (const [name, value] of Object.entries(changes)) {
    query.delete(name);
    for (const one of Array.isArray(value) ? value : [value]) {
      if (one !== null && one !== undefined && one !== "") query.append(name, one);
    }
  }
  history.replaceState(history.state, "", `${location.pathname}?${query}`);
  shown = place().path + place().search;
}

function showTop(path) {
  const current = path === "/response" ? "/responses" : path;
  const list = path === "/response" || path === "/compare" ? lastList() : null;
  const theme = el("button", { type: "button", onclick: switchTheme, title: "Light or dark" }, "Theme");
  document.getElementById("top").replaceChildren(
    el("b", {}, "entrace"),
    SAVED ? el("span", { class: "soft" }, "saved view") : el("nav", { "aria-label": "Pages" }, LINKS.map(([href, label]) => el("a", { href: href === "/responses" ? list?.href ?? href : href, "aria-current": href === current ? "page" : null }, label))),
    el("div", { class: "right" }, el("span", { id: "live", role: "status" }), theme));
}

async function render({ keepsScroll = false, scrollTop = 0 } = {}) {
  const turn = ++rendering;
  const { path } = place();
  const page = PAGES[path];
  PAGES[shown.split("?")[0]]?.leave?.();
  shown = place().path + place().search;
  hideTip();
  const content = document.getElementById("content");
  if (!page) {
    content.replaceChildren(el("h1", {}, "No such page"), el("p", {}, link("/", {}, "To the overview")));
    return;
  }
  showTop(path);
  document.title = `${page.title()} · entrace`;
  page.keys = {};
  page.ready = null;
  page.whole = null;
  FETCHED.clear();
  content.setAttribute("aria-busy", "true");
  let nodes;
  try {
    nodes = await page.render();
  } catch (error) {
    nodes = [el("h1", {}, page.title()), failure(error), SAVED ? "" : el("p", {}, link("/", {}, "To the overview"))];
  }
  if (turn !== rendering) return;
  const top = keepsScroll ? scrollY : scrollTop;
  content.replaceChildren(...[nodes].flat(9).filter((node) => node !== null && node !== undefined));
  content.removeAttribute("aria-busy");
  scrollTo({ top, behavior: "instant" });
  const reached = scrollY;
  // What arrives later may be what makes the page as long as it was.
  page.whole?.then(() => { if (turn === rendering && scrollY === reached) scrollTo({ top, behavior: "instant" }); });
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
  showProblem(FETCHED.get("/api/runs")?.problem ?? "");
  page.ready?.();
}

document.addEventListener("click", (event) => {
  const anchor = event.target instanceof Element ? event.target.closest("a[href]") : null;
  if (!anchor || SAVED || event.button || event.ctrlKey || event.metaKey || event.shiftKey || anchor.hasAttribute("download")) return;
  const to = new URL(anchor.href);
  if (to.origin !== location.origin || !(to.pathname in PAGES) || anchor.getAttribute("href").startsWith("#")) return;
  event.preventDefault();
  navigate(anchor.href);
});

document.addEventListener("keydown", (event) => {
  const isTyping = event.target instanceof Element && event.target.closest("input, select, textarea, .cm-editor, .hit");
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
  const action = PAGES[place().path]?.keys?.[event.key];
  if (action) {
    event.preventDefault();
    action();
  }
  if (event.key === "Escape") hideTip();
});

addEventListener("popstate", (event) => {
  if (place().path + place().search !== shown) render({ scrollTop: event.state?.top ?? 0 });
});
history.scrollRestoration = "manual";
let scrolled = 0;
addEventListener("scroll", () => {
  clearTimeout(scrolled);
  scrolled = setTimeout(() => { if (!SAVED) history.replaceState({ top: scrollY }, ""); }, 150);
}, { passive: true });
// Plots have the colors of the theme that they were drawn in; a text that is being written is worth more.
addEventListener("theme", () => { if (!PAGES[place().path]?.keepsState) render({ keepsScroll: true }); });

// A console or a form in use is left alone.
// A hidden tab gives up its connection, of which a browser allows few.
function listen() {
  let seen = null;
  let events = null;
  const note = (text) => { const line = document.getElementById("live"); if (line) line.textContent = text; };
  const onMessage = async ({ data }) => {
    if (seen === null || data === seen) {
      seen = data;
      note("");
      return;
    }
    seen = data;
    const found = await answered(fetch("/api/runs")).catch(() => null);
    showProblem(found?.problem ?? "");
    const page = PAGES[place().path];
    if (page?.update) await page.update();
    else if (page?.keepsState || document.activeElement?.closest("form")) note("The runs have changed; reload to see more");
    else await render({ keepsScroll: true });
    if (!page?.keepsState) note("Updated just now");
  };
  const connect = () => {
    if (document.hidden || events) {
      if (document.hidden) events?.close();
      if (document.hidden) events = null;
      return;
    }
    events = new EventSource("/api/events");
    events.onmessage = onMessage;
    events.onerror = () => note("The server does not answer");
  };
  document.addEventListener("visibilitychange", connect);
  connect();
}

render({ scrollTop: SAVED ? 0 : history.state?.top ?? 0 });
if (!SAVED) listen();

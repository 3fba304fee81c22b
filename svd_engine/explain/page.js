"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const column = (name, Type) =>
  new Type(Uint8Array.from(atob(data.columns[name]), (c) => c.charCodeAt(0)).buffer);
const Ids = data.tokenBytes === 2 ? Uint16Array : Uint32Array;
const [token, supportToken, adaptedToken, baseToken] =
  ["token", "supportToken", "adaptedToken", "baseToken"].map((name) => column(name, Ids));
const [divergence, p, delta] = ["divergence", "p", "delta"].map((name) => column(name, Float32Array));
const [adaptedP, baseP] = ["adaptedP", "baseP"].map((name) => column(name, Uint16Array));
const start = column("start", Uint32Array);

/** The token that greedy decoding takes at a position; of equals, the lowest id. */
function choose(i, strength) {
  let best = -Infinity, chosen = -1;
  for (let e = start[i]; e < start[i + 1]; e++) {
    const logit = Math.log(p[e]) + strength * delta[e];
    if (logit > best || (logit === best && supportToken[e] < chosen)) {
      best = logit;
      chosen = supportToken[e];
    }
  }
  return chosen;
}

/** The steered probabilities of a support, [token, probability, delta], best first. */
function steered(i, strength) {
  const rows = [];
  for (let e = start[i]; e < start[i + 1]; e++)
    rows.push([supportToken[e], Math.log(p[e]) + strength * delta[e], delta[e]]);
  const most = Math.max(...rows.map((row) => row[1]));
  const total = rows.reduce((sum, row) => sum + Math.exp(row[1] - most), 0);
  for (const row of rows) row[1] = Math.exp(row[1] - most) / total;
  return rows.sort((a, b) => b[1] - a[1] || a[0] - b[0]);
}

const make = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
};
const byId = (id) => document.getElementById(id);
const visible = (text) => (text === "" ? "·" : text.replace(/\n/g, "⏎").replace(/\t/g, "⇥"));
const name = (id) => `“${visible(data.vocabulary[id])}”`;
const signed = (x) => (x > 0 ? "+" : x < 0 ? "−" : "") + Math.abs(x).toFixed(2);
const percent = (x) => (100 * x).toFixed(1) + " %";
const slider = byId("strength");
const strengthNow = () => slider.valueAsNumber * data.step;
const special = new Set(data.special);
const spans = [], shown = [], answers = [];
const alone = Array.from(token, (_, i) => choose(i, 0)), own = []; // choices that the slider leaves
let current = -1;

/** What an answer's own decoding takes at a position: its text parts where another is chosen. */
function reference(model, i) {
  if (model === "base") return token[i];
  return model === "adapted" ? alone[i] : choose(i, data.strength);
}

function build() {
  document.querySelector("h1").textContent = document.title;
  let i = 0;
  data.prompts.forEach((prompt, number) => {
    const section = make("section", { class: "prompt" }, make("h2", { dir: "auto" }, prompt));
    for (const { model, finish, tokens } of data.answers[number]) {
      const heading = model === "steered" ? `steered at ${signed(data.strength)}` : model;
      const label = `${heading}, ${tokens} tokens${finish === "length" ? ", cut at the limit" : ""}`;
      const text = make("p", { class: "answer", dir: "auto", role: "listbox", "aria-orientation": "horizontal" });
      const parts = make("p", { class: "parts" });
      const first = i;
      for (; i < first + tokens; i++) {
        const piece = data.pieces[i] ?? data.vocabulary[token[i]];
        const span = make("span", { class: "t", role: "option", "data-i": i, tabindex: i === first ? 0 : -1 });
        span.textContent = shown[i] = piece === "" ? "·" : piece;
        span.style.setProperty("--kl", Math.min(1, divergence[i] / 2).toFixed(3));
        spans.push(span);
        own.push(reference(model, i));
        text.append(span);
      }
      answers.push({ model, first, end: i, parts, text, label });
      section.append(make("h3", {}, label), text, parts);
    }
    byId("prompts").append(section);
  });
  const single = spans.filter((_, k) => start[k + 1] - start[k] === 1).length;
  const mean = divergence.reduce((sum, x) => sum + x, 0) / Math.max(1, i);
  byId("facts").textContent =
    `${data.prompts.length} prompts; mean KL ${mean.toFixed(2)} nats per token; at ${percent(single / Math.max(1, i))} of the tokens the support is one token, so steering cannot act (alpha ${data.alpha}, ${data.direction} direction).`;
  byId("marks").append(make("option", { value: Math.round(data.strength / data.step) }));
}

function update() {
  const strength = strengthNow(), at = signed(strength);
  byId("value").textContent = at;
  slider.setAttribute("aria-valuetext", at);
  let changed = 0, kept = 0, written = 0;
  for (const { model, first, end, parts, text, label } of answers) {
    let parted = -1, isNew = !text.hasAttribute("aria-label");
    for (let i = first; i < end; i++) {
      const chosen = choose(i, strength), wanted = own[i], span = spans[i];
      const moved = chosen !== alone[i], other = model === "steered" && chosen !== wanted;
      const classes = "t" + (moved ? " changed" : "") + (other ? " other" : "") +
        (parted >= 0 && model !== "base" ? " after" : "") +
        (special.has(other ? chosen : token[i]) ? " special" : "") + (i === current ? " current" : "");
      if (span.className !== classes) span.className = classes;
      const piece = other ? data.vocabulary[chosen] || "·" : shown[i];
      if (span.textContent !== piece) { span.textContent = piece; isNew = true; }
      if (parted < 0 && chosen !== wanted) parted = i;
      if (moved && model === "steered") changed++;
    }
    if (isNew) text.setAttribute("aria-label", `${label}: ${text.textContent}`);
    parts.textContent = parted < 0
      ? `Steered at ${at}, the text is the same to its end.`
      : `Steered at ${at}, the text parts at token ${parted - first + 1}: ${name(choose(parted, strength))} instead of ${name(token[parted])}.`;
    if (model === "steered") { written += end - first; if (parted < 0) kept++; }
  }
  byId("summary").textContent =
    `${kept} of ${data.prompts.length} steered answers stay as they are; steering changes the adapted model's choice at ${percent(changed / Math.max(1, written))} of their tokens.`;
  byId("here")?.setAttribute("transform", `translate(${across(strength)} 0)`);
  if (current >= 0) show(current);
}

function table(caption, rows) {
  const body = make("table", {}, make("caption", {}, caption));
  for (const [id, share, move] of rows)
    body.append(make("tr", { style: `--share:${share.toFixed(4)}` }, make("th", { scope: "row" }, name(id)),
      ...(move === undefined ? [] : [make("td", {}, "δ " + signed(move))]), make("td", {}, percent(share))));
  return body;
}

function show(i) {
  if (current >= 0) spans[current].classList.remove("current");
  current = i;
  spans[i].classList.add("current");
  const strength = strengthNow(), size = start[i + 1] - start[i];
  const top = (ids, shares) =>
    Array.from({ length: data.top }, (_, k) => [ids[i * data.top + k], shares[i * data.top + k] / 65535]);
  const about = [
    `Token ${name(token[i])}: KL ${divergence[i].toFixed(3)} nats, support of ${size} token${size === 1 ? ", so steering cannot act" : "s"}.`,
    `Chosen at ${signed(strength)}: ${name(choose(i, strength))}; by the adapted model: ${name(choose(i, 0))}.`,
  ];
  byId("panel").classList.remove("unused");
  byId("panel").replaceChildren(
    ...about.map((line) => make("p", {}, line)),
    table(`Steered at ${signed(strength)}, and delta`, steered(i, strength).slice(0, 6)),
    table("Adapted", top(adaptedToken, adaptedP)), table("Base", top(baseToken, baseP)));
  byId("spoken").textContent = about.join(" ");
}

let across = () => 0;
function curve() {
  const found = data.calibration;
  if (!found) return;
  const reach = Math.max(100 * data.step, ...found.interval.map(Math.abs));
  const points = found.curve.filter(([x]) => Math.abs(x) <= reach);
  const [low, high] = [Math.min, Math.max].map((f) => f(...points.map(([, y]) => y)));
  across = (x) => 60 + 500 * (Math.min(reach, Math.max(-reach, x)) / reach + 1) / 2;
  const up = (y) => 190 - 165 * (y - low) / (high - low || 1);
  const draw = (tag, attributes, text = "") => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.textContent = text;
    return element;
  };
  const [from, to] = found.interval.map(across);
  const label = `Loss (${found.objective}) of the calibration examples by strength. Fitted: ${signed(found.strength)}, 95 % interval ${signed(found.interval[0])} to ${signed(found.interval[1])}, the grey band. The line is the slider.`;
  const write = (x, y, anchor, text) =>
    draw("text", { x, y, "text-anchor": anchor, "font-size": 12, fill: "currentColor" }, text);
  const picture = draw("svg", { viewBox: "0 0 600 220", role: "img", "aria-label": label });
  picture.append(
    draw("rect", { x: from, y: 20, width: Math.max(1, to - from), height: 170, fill: "currentColor", opacity: 0.15 }),
    draw("line", { x1: 60, x2: 560, y1: 190, y2: 190, stroke: "currentColor", opacity: 0.4 }),
    draw("path", { d: points.map(([x, y], k) => `${k ? "L" : "M"}${across(x)} ${up(y)}`).join(""), fill: "none", stroke: "currentColor", "stroke-width": 2 }),
    draw("line", { id: "here", x1: 0, x2: 0, y1: 20, y2: 190, stroke: "var(--mark)", "stroke-width": 2 }),
    ...[-reach, 0, reach].map((x) => write(across(x), 207, "middle", signed(x))),
    write(52, 28, "end", high.toFixed(2)), write(52, 194, "end", low.toFixed(2)));
  byId("curve").append(picture, make("p", { class: "parts" }, label));
  byId("calibration").hidden = false;
}

const at = (event) => event.target.closest?.("[data-i]");
for (const kind of ["mouseover", "focusin", "click"])
  document.addEventListener(kind, (event) => { const span = at(event); if (span) show(Number(span.dataset.i)); });
document.addEventListener("click", (event) => at(event)?.scrollIntoView({ block: "nearest" }));
document.addEventListener("keydown", (event) => {
  const span = at(event), step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!span || !step) return;
  const next = step > 0 ? span.nextElementSibling : span.previousElementSibling;
  if (next) { span.tabIndex = -1; next.tabIndex = 0; next.focus(); }
  event.preventDefault();
});
byId("reset").addEventListener("click", () => { slider.value = Math.round(data.strength / data.step); update(); });
slider.addEventListener("input", update);
build();
curve();
slider.value = Math.round(data.strength / data.step);
update();

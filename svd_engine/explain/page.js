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
const visible = (text) => (text === "" ? "·" : text.replace(/\n/g, "⏎").replace(/\t/g, "⇥"));
const name = (id) => `“${visible(data.vocabulary[id])}”`;
const signed = (x) => (x > 0 ? "+" : x < 0 ? "−" : "") + Math.abs(x).toFixed(2);
const percent = (x) => (100 * x).toFixed(1) + " %";
const slider = document.getElementById("strength");
const strengthNow = () => slider.valueAsNumber * data.step;
const spans = [], shown = [], answers = [];
let current = -1;

/** What an answer's own decoding takes at a position: its text parts where another is chosen. */
function reference(model, i) {
  if (model === "base") return token[i];
  return choose(i, model === "adapted" ? 0 : data.strength);
}

function build() {
  const all = document.getElementById("prompts");
  let i = 0;
  data.prompts.forEach((prompt, number) => {
    const section = make("section", { class: "prompt" }, make("h2", {}, prompt));
    for (const { model, finish, tokens } of data.answers[number]) {
      const heading = model === "steered" ? `steered at ${signed(data.strength)}` : model;
      const label = `${heading}, ${tokens} tokens${finish === "length" ? ", cut" : ""}`;
      const text = make("p", { class: "answer", role: "group", "aria-label": label });
      const parts = make("p", { class: "parts" });
      const first = i;
      for (; i < first + tokens; i++) {
        const piece = data.pieces[i] ?? data.vocabulary[token[i]];
        const span = make("span", { class: "t", role: "button", "data-i": i, tabindex: i === first ? 0 : -1 });
        span.textContent = shown[i] = piece === "" ? "·" : piece;
        span.style.setProperty("--kl", Math.min(1, divergence[i] / 2).toFixed(3));
        spans.push(span);
        text.append(span);
      }
      answers.push({ model, first, end: i, parts });
      section.append(make("h3", {}, label), text, parts);
    }
    all.append(section);
  });
}

function update() {
  const strength = strengthNow();
  document.getElementById("value").textContent = signed(strength);
  slider.setAttribute("aria-valuetext", signed(strength));
  let changed = 0, kept = 0, written = 0;
  for (const { model, first, end, parts } of answers) {
    let parted = -1;
    for (let i = first; i < end; i++) {
      const chosen = choose(i, strength), wanted = reference(model, i), span = spans[i];
      const moved = chosen !== choose(i, 0), other = model === "steered" && chosen !== wanted;
      span.className = "t" + (moved ? " changed" : "") + (other ? " other" : "") + (parted >= 0 ? " after" : "");
      const text = other ? data.vocabulary[chosen] || "·" : shown[i];
      if (span.textContent !== text) span.textContent = text;
      if (parted < 0 && chosen !== wanted) parted = i;
      if (moved && model === "steered") changed++;
    }
    const at = signed(strength);
    parts.textContent = parted < 0
      ? `At ${at} the text is the same to its end.`
      : `At ${at} the text parts at token ${parted - first + 1}: ${name(choose(parted, strength))} instead of ${name(token[parted])}.`;
    if (model === "steered") { written += end - first; if (parted < 0) kept++; }
  }
  document.getElementById("summary").textContent =
    `At ${signed(strength)}, ${kept} of ${data.prompts.length} steered answers stay as they are; steering changes the adapted model's choice at ${percent(changed / Math.max(1, written))} of their tokens (alpha ${data.alpha}, ${data.direction}).`;
  document.getElementById("here")?.setAttribute("transform", `translate(${across(strength)} 0)`);
  if (current >= 0) show(current);
}

function table(caption, rows, withDelta) {
  const body = make("table", {}, make("caption", {}, caption));
  for (const [id, share, move] of rows)
    body.append(make("tr", {}, make("th", { scope: "row" }, name(id)), make("td", {}, percent(share)),
      ...(withDelta ? [make("td", {}, "δ " + move.toPrecision(2))] : [])));
  return body;
}

function show(i) {
  current = i;
  const strength = strengthNow(), size = start[i + 1] - start[i], chosen = choose(i, strength);
  const top = (ids, shares) =>
    Array.from({ length: data.top }, (_, k) => [ids[i * data.top + k], shares[i * data.top + k] / 65535]);
  document.getElementById("panel").replaceChildren(
    make("p", {}, `Token ${name(token[i])}, KL ${divergence[i].toFixed(3)} nats, support of ${size} token${size === 1 ? ": steering cannot act" : "s"}.`),
    make("p", {}, `Chosen at ${signed(strength)}: ${name(chosen)}; by the adapted model: ${name(choose(i, 0))}.`),
    table(`Steered at ${signed(strength)}`, steered(i, strength).slice(0, 6), true),
    table("Adapted", top(adaptedToken, adaptedP)), table("Base", top(baseToken, baseP)));
  spans[i].setAttribute("aria-description", `KL ${divergence[i].toFixed(2)}, support ${size}`);
}

let across = () => 0;
function curve() {
  const found = data.calibration;
  if (!found) return;
  const reach = Math.max(100 * data.step, ...found.interval.map(Math.abs));
  const points = found.curve.filter(([x]) => Math.abs(x) <= reach);
  const [low, high] = [Math.min, Math.max].map((f) => f(...points.map(([, y]) => y)));
  across = (x) => 50 + 540 * (Math.min(reach, Math.max(-reach, x)) / reach + 1) / 2;
  const up = (y) => 190 - 170 * (y - low) / (high - low || 1);
  const draw = (tag, attributes, text = "") => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.textContent = text;
    return element;
  };
  const [from, to] = found.interval.map(across);
  const label = `${found.objective} loss over the strength; fitted ${signed(found.strength)}, interval ${signed(found.interval[0])} to ${signed(found.interval[1])}`;
  const picture = draw("svg", { viewBox: "0 0 600 220", role: "img", "aria-label": label });
  picture.append(
    draw("rect", { x: from, y: 20, width: Math.max(1, to - from), height: 170, fill: "currentColor", opacity: 0.12 }),
    draw("path", { d: points.map(([x, y], k) => `${k ? "L" : "M"}${across(x)} ${up(y)}`).join(""), fill: "none", stroke: "currentColor", "stroke-width": 2 }),
    draw("line", { id: "here", x1: 0, x2: 0, y1: 20, y2: 190, stroke: "var(--mark)", "stroke-width": 2 }),
    ...[-reach, 0, reach].map((x) => draw("text", { x: across(x), y: 210, "text-anchor": "middle", "font-size": 12, fill: "currentColor" }, signed(x))),
    draw("text", { x: 46, y: 26, "text-anchor": "end", "font-size": 12, fill: "currentColor" }, high.toFixed(2)),
    draw("text", { x: 46, y: 192, "text-anchor": "end", "font-size": 12, fill: "currentColor" }, low.toFixed(2)));
  document.getElementById("curve").append(picture, make("p", { class: "parts" }, label + "."));
  document.getElementById("calibration").hidden = false;
}

const at = (event) => event.target.closest?.("[data-i]");
for (const kind of ["mouseover", "focusin", "click"])
  document.addEventListener(kind, (event) => { const span = at(event); if (span) show(Number(span.dataset.i)); });
document.addEventListener("keydown", (event) => {
  const span = at(event), step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!span || !step) return;
  const next = step > 0 ? span.nextElementSibling : span.previousElementSibling;
  if (next) { span.tabIndex = -1; next.tabIndex = 0; next.focus(); }
  event.preventDefault();
});
document.getElementById("reset").addEventListener("click", () => { slider.value = Math.round(data.strength / data.step); update(); });
slider.addEventListener("input", update);
build();
curve();
slider.value = Math.round(data.strength / data.step);
update();

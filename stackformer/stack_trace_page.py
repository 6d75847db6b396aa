# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The page of a stack trace: HTML that needs no network, with `{{data}}` in place of the numbers.

It is a module, so that a model which is loaded with its own code has it, too.
"""

PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>Stack trace</title>
<style>
  :root {
    color-scheme: light dark;
    --paper: #fcfcfb; --card: #ffffff; --ink: #1c1d1f; --soft: #6d7178; --line: #e4e4e1; --zero: #f1f1ee;
    --deep: #66a5e3; --full: #1c5fae; --accent: #c2410c;
  }
  @media (prefers-color-scheme: dark) {
    :root {
      --paper: #141517; --card: #1b1d20; --ink: #e7e6e3; --soft: #979ba3; --line: #2d3035; --zero: #212327;
      --deep: #2a67a8; --full: #6db1f5; --accent: #fb923c;
    }
  }
  * { box-sizing: border-box; }
  body {
    margin: 0; background: var(--paper); color: var(--ink); font: 14px/1.45 system-ui, "DejaVu Sans", sans-serif;
    font-variant-numeric: tabular-nums;
  }
  main {
    display: grid; grid-template-columns: minmax(0, 1fr) 352px; gap: 20px 36px; max-width: 1360px; margin: 0 auto;
    padding: 22px 28px 40px; align-items: start;
  }
  header { grid-column: 1 / -1; display: flex; flex-wrap: wrap; gap: 8px 24px; align-items: center; }
  h1 { font-size: 17px; font-weight: 600; margin: 0; }
  h2 { font-size: 12px; font-weight: 600; margin: 20px 0 6px; }
  h2 small, .soft { color: var(--soft); font-weight: 400; font-size: 12px; }
  .colour { margin-left: auto; display: flex; flex-wrap: wrap; gap: 8px 18px; align-items: center; }
  select {
    font: inherit; font-size: 13px; color: var(--ink); background: var(--card); border: 1px solid var(--line);
    border-radius: 6px; padding: 3px 6px;
  }
  .scale { display: inline-flex; align-items: center; gap: 8px; }
  .scale i { width: 110px; height: 10px; border-radius: 3px; background: linear-gradient(90deg, transparent, var(--deep)); box-shadow: inset 0 0 0 1px var(--line); }

  #text {
    font: 15px/1.75 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; white-space: break-spaces;
    overflow-wrap: anywhere; outline: none;
  }
  .token { cursor: pointer; padding: 2px 0; background: color-mix(in oklab, var(--deep) var(--level), transparent); }
  .token:hover, .token.near { box-shadow: inset 0 -2px var(--ink); }
  .token.chosen { box-shadow: inset 0 0 0 1.5px var(--accent); border-radius: 2px; }
  .token.break::before { content: "\21b5"; color: var(--ink); opacity: .3; }
  /* A character of several tokens: the character once, over one stripe for each token. */
  .pieces { position: relative; display: inline-block; line-height: 1.45; min-width: 1ch; white-space: pre; }
  .pieces > b { position: absolute; inset: 0; display: flex; }
  .pieces > b > .token { flex: 1; padding: 0; }
  .pieces > span { position: relative; pointer-events: none; font-weight: 400; }

  aside {
    position: sticky; top: 16px; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
    padding: 14px 18px 18px; max-height: calc(100vh - 32px); overflow: auto;
  }
  #name { font: 600 19px/1.3 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; white-space: pre-wrap; }
  dl { display: grid; grid-template-columns: 1fr 1fr; gap: 8px 12px; margin: 10px 0 0; }
  dt { color: var(--soft); font-size: 12px; } dd { margin: 0; font-size: 15px; }
  table { border-collapse: separate; border-spacing: 2px; width: 100%; table-layout: fixed; }
  th { font-weight: 400; font-size: 11px; color: var(--soft); text-align: left; padding: 0; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
  thead th { text-align: center; font-size: 10px; text-overflow: clip; } thead th:first-child, tbody th { width: 76px; text-align: left; }
  td {
    height: 22px; padding: 0; text-align: center; font-size: 11px; border-radius: 3px; overflow: hidden;
    background: color-mix(in oklab, var(--deep) var(--level), var(--zero));
  }
  td.none { background: none; color: var(--soft); }
  tbody + tbody::before { content: ""; display: block; height: 5px; }
  tr.opens { cursor: pointer; }
  .buttons { display: flex; flex-wrap: wrap; gap: 4px; margin: 2px 0 4px; }
  button {
    font: inherit; font-size: 12px; color: var(--soft); background: none; border: 1px solid var(--line); border-radius: 6px;
    padding: 1px 8px; cursor: pointer;
  }
  button[aria-pressed="true"] { color: var(--ink); border-color: var(--soft); }

  #profile { grid-column: 1; }
  .strip { display: grid; grid-template-columns: 88px minmax(0, 1fr); column-gap: 8px; }
  .strip > div { display: grid; font-size: 10px; color: var(--soft); }
  .strip > div > span { align-self: center; line-height: 1; text-align: right; }
  .scroll { overflow-x: auto; }
  .sheet { position: relative; }
  .sheet i { position: absolute; top: 0; bottom: 0; border: 1.5px solid var(--accent); pointer-events: none; }
  canvas { display: block; width: 100%; cursor: crosshair; }

  #tip {
    position: fixed; z-index: 9; pointer-events: none; background: var(--ink); color: var(--paper); font-size: 12px;
    border-radius: 6px; padding: 4px 9px; white-space: pre; max-width: 90vw; opacity: 0;
  }
  #tip.on { opacity: 1; }
  @media (max-width: 900px) {
    main { grid-template-columns: minmax(0, 1fr); padding: 16px; }
    aside { position: static; max-height: none; }
    #profile, #text { grid-column: 1; }
    .colour { margin-left: 0; }
  }
</style>
</head>
<body>
<main>
  <header>
    <h1>Stack trace</h1>
    <span class="soft" id="summary"></span>
    <div class="colour soft">
      <label>Colour by <select id="colour"></select></label>
      <span class="scale"><span id="low"></span><i></i><span id="high"></span></span>
    </div>
  </header>
  <section>
    <div id="text" tabindex="0" aria-label="The text; the arrow keys go from token to token"></div>
    <div id="profile"></div>
  </section>
  <aside>
    <div id="name"></div>
    <div class="soft" id="which"></div>
    <dl id="facts"></dl>
    <h2>Steps</h2>
    <table id="steps"></table>
    <div id="banks"></div>
  </aside>
</main>
<div id="tip" role="tooltip"></div>
<script type="application/json" id="data">{{data}}</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const count = data.tokens.length;

/** Numbers from 0 to a scale that are kept as 16 bits each: get(t, p, i) of an array of two or three dimensions. */
function decode({ shape, scale, data }) {
  const values = new Uint16Array(Uint8Array.from(atob(data), (c) => c.charCodeAt(0)).buffer);
  const get = (t, p, i = 0) => scale * values[(t * shape[1] + p) * (shape[2] ?? 1) + i] / 65535;
  return { shape, scale, values, get };
}
const arrays = Object.fromEntries(Object.entries(data.arrays).map(([name, array]) => [name, decode(array)]));
const [, P, S] = arrays.pointer.shape;
const STEP_SIZE = "step size";
const kinds = ["read", "written", "forgotten", STEP_SIZE].filter((kind) => kind in arrays);
const banks = kinds.filter((kind) => kind !== STEP_SIZE);
const [L, H, N] = kinds.length ? arrays.read.shape.slice(2) : [0, 0, 0];
const range = (n) => Array.from({ length: n }, (_, i) => i);
const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
const largest = (numbers) => numbers.reduce((a, b) => Math.max(a, b));
const smallest = (numbers) => numbers.reduce((a, b) => Math.min(a, b));
const fixed = (x, digits = 2) => x.toFixed(digits);
const mass = range(count).map((t) => range(P).map((p) => sum(range(S).map((s) => arrays.pointer.get(t, p, s)))));

/** The layers that have a kind of number, and how many numbers each head of them has. */
const layersOf = (kind) => (kind === STEP_SIZE ? data.delta_layers : range(L));
const sizeOf = (kind) => arrays[kind].shape[4];

/** A bank's share, or a step size: of one step and one head, or their means (null), steps by their mass. */
function share(kind, t, layer, bank, step = null, head = null) {
  const { values, scale } = arrays[kind], layers = layersOf(kind), at = layers.indexOf(layer), size = sizeOf(kind);
  const [first, last] = head === null ? [0, H - 1] : [head, head];
  let total = 0, weights = 0;
  for (let p = step ?? 0; p <= (step ?? P - 1); p++) {
    const weight = step === null ? mass[t][p] : 1;
    for (let h = first; h <= last; h++) {
      total += weight * values[(((t * P + p) * layers.length + at) * H + h) * size + bank];
      weights += weight;
    }
  }
  return scale * total / weights / 65535;
}
const meanLevel = (t) => sum(range(P).map((p) => sum(range(S).map((s) => (s + 1) * arrays.pointer.get(t, p, s))))) / sum(mass[t]);

const BANKS = { read: "read from", written: "written to", forgotten: "forgotten by" };

// What the text can be coloured by: [group, name, value of a token, end of a scale from 0 if it is fixed].
const colours = [
  ["Depth", "expected ponder steps", (t) => data.depth[t]],
  ["Depth", "steps computed", (t) => data.steps[t]],
  ["Depth", "mean stack level", meanLevel],
  ["Prediction", "surprise in bits", (t) => data.surprise[t] ?? 0],
  ...banks.flatMap((kind) => range(N).map((n) => [
    "Memory", `${BANKS[kind]} bank ${n + 1}`, (t) => sum(range(L).map((l) => share(kind, t, l, n))) / L,
  ])),
  ...(STEP_SIZE in arrays ? data.delta_layers : []).map((l) => [
    "Memory", `step size of layer ${l + 1}`, (t) => share(STEP_SIZE, t, l, 0), arrays[STEP_SIZE].scale,
  ]),
];

function element(tag, properties = {}, ...children) {
  const { style = {}, ...rest } = properties;
  const node = Object.assign(document.createElement(tag), rest);
  for (const [name, value] of Object.entries(style)) node.style.setProperty(name, value);
  node.append(...children);
  return node;
}

// The text. A token that is only a piece of a character goes with the token that completes it.
const spans = [];
let pieces = [];
for (let t = 0; t < count; t++) {
  const span = element("span", { className: "token" });
  span.dataset.index = t;
  spans.push(span);
  const text = data.tokens[t];
  pieces.push(span);
  if (text === "" && t < count - 1) continue;
  if (pieces.length > 1) {
    $("text").append(element("span", { className: "pieces" }, element("b", {}, ...pieces), element("span", { textContent: text })));
  } else {
    span.textContent = text;
    if (text.includes("\n")) span.classList.add("break");
    $("text").append(span);
  }
  pieces = [];
}

function paint() {
  const [, , value, end] = colours[$("colour").value];
  const values = range(count).map(value);
  const low = end ? 0 : smallest(values), high = end ?? largest(values);
  $("low").textContent = fixed(low); $("high").textContent = fixed(high);
  spans.forEach((span, t) => span.style.setProperty("--level", `${high > low ? 100 * (values[t] - low) / (high - low) : 0}%`));
}

/** A token, or the character that it is a piece of, with what does not show spelled out; and which piece. */
function spell(t) {
  let first = t, last = t;
  while (first > 0 && data.tokens[first - 1] === "") first--;
  while (last < count - 1 && data.tokens[last] === "") last++;
  const text = data.tokens[last].replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5").replace(/ /g, "\u2423");
  return { text, piece: first === last ? "" : `piece ${t - first + 1} of ${last - first + 1}` };
}
function line(t) {
  const { text, piece } = spell(t);
  return piece ? `${text} (${piece})` : text;
}
const surprise = (t) => (data.surprise[t] === null ? "first token" : `${fixed(data.surprise[t])} bits`);
const ACTIONS = ["push", "no-op", "pop"];

function cell(value, tip, shown = fixed(value), scale = 1) {
  const node = element("td", { textContent: shown, style: { "--level": `${Math.min(100, 100 * value / scale)}%` } });
  node.dataset.tip = `${tip}: ${fixed(value, 4)}`;
  return node;
}
const row = (title, cells) => element("tr", {}, element("th", { textContent: title }), ...cells);

let chosen = 0, step = null, open = new Set();

function choose(t, scroll = false) {
  spans[chosen].classList.remove("chosen");
  chosen = t;
  spans[t].classList.add("chosen");
  if (scroll) spans[t].scrollIntoView({ block: "nearest" });
  if (step !== null && step >= data.steps[t]) step = null;
  show();
  for (const { sheet, marker } of strips) {
    marker.style.left = `${100 * t / count}%`;
    const scroll = sheet.parentNode, left = sheet.clientWidth * t / count;
    if (left < scroll.scrollLeft || left > scroll.scrollLeft + scroll.clientWidth - 8) scroll.scrollLeft = left - scroll.clientWidth / 2;
  }
}

function show() {
  const t = chosen;
  const { text, piece } = spell(t);
  $("name").textContent = text;
  $("which").textContent = `token ${t + 1} of ${count}, id ${data.ids[t]}${piece && `, ${piece}`}`;
  $("facts").replaceChildren(...[
    ["expected steps", fixed(data.depth[t])], ["steps computed", `${data.steps[t]} of ${P}`],
    ["surprise", surprise(t)], ["probability", data.surprise[t] === null ? "\u2013" : (2 ** -data.surprise[t]).toPrecision(2)],
  ].map(([name, value]) => element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value }))));

  const cells = (make) => range(P).map((p) => (p < data.steps[t] ? make(p) : element("td", { className: "none", textContent: "\u00b7" })));
  const levels = range(S).reverse().map((s) => row(`level ${s + 1}`, cells((p) => cell(arrays.pointer.get(t, p, s), `step ${p + 1}, mass on level ${s + 1}`))));
  const actions = P > 1 ? ACTIONS.map((name, a) => row(name, cells((p) => cell(arrays.actions.get(t, p, a), `step ${p + 1}, ${name}`)))) : [];
  const finished = row("finished", cells((p) => cell(arrays.finished.get(t, p), `mass that left at step ${p + 1}`)));
  $("steps").replaceChildren(
    element("thead", {}, element("tr", {}, element("th"), ...range(P).map((p) => element("th", { textContent: P > 4 ? p + 1 : `step ${p + 1}` })))),
    ...[levels, actions, [finished]].filter((rows) => rows.length).map((rows) => element("tbody", {}, ...rows)));
  if (kinds.length) showBanks();
}

/** Layers by banks; a layer opens to its heads. */
function showBanks() {
  const t = chosen;
  const button = (p, text) => {
    const node = element("button", { textContent: text, onclick: () => { step = p; showBanks(); } });
    node.setAttribute("aria-pressed", step === p);
    return node;
  };
  const parts = [element("h2", {}, "Memory banks ", element("small", { textContent: step === null ? "mean over steps, by mass" : `at step ${step + 1}` })),
    element("div", { className: "buttons" }, button(null, "all steps"), ...range(data.steps[t]).map((p) => button(p, `step ${p + 1}`)))];
  for (const kind of kinds) {
    const { high } = strips.find((strip) => strip.kind === kind);  // with many banks all shares are small
    const ofBanks = kind !== STEP_SIZE, size = sizeOf(kind);
    const shares = (layer, head) => range(size).map((n) => {
      const of = head === null ? "mean of heads" : `head ${head + 1}`;
      const value = share(kind, t, layer, n, step, head);
      return cell(value, `${kind}, layer ${layer + 1}, ${of}${ofBanks ? `, bank ${n + 1}` : ""}`, size > 8 ? "" : fixed(value), high);
    });
    const rows = layersOf(kind).flatMap((l) => {
      const title = row(`${open.has(l) ? "\u25be" : "\u25b8"} layer ${l + 1}`, shares(l, null));
      title.className = "opens";
      title.onclick = () => { open.has(l) ? open.delete(l) : open.add(l); showBanks(); };
      return [title, ...(open.has(l) ? range(H).map((h) => row(`\u2003head ${h + 1}`, shares(l, h))) : [])];
    });
    const name = (n) => (ofBanks ? (N > 4 ? n + 1 : `bank ${n + 1}`) : `of ${high}`);
    const head = element("tr", {}, element("th", { textContent: kind }), ...range(size).map((n) => element("th", { textContent: name(n) })));
    parts.push(element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows)));
  }
  $("banks").replaceChildren(...parts);
}

// The profile: all tokens side by side, a strip for each kind of number.
const strips = [
  ["Finished", "share of each token that left at the step", range(P).map((p) => [`step ${p + 1}`, (t) => arrays.finished.get(t, p)])],
  ["Stack pointer", "probability mass on each level, before the step", range(P).flatMap((p) => range(S).reverse().map((s) =>
    [`step ${p + 1}, level ${s + 1}`, (t) => arrays.pointer.get(t, p, s)]))],
  ...banks.map((kind) => [`Banks ${kind}`,
    "mean over heads, and over steps by mass", range(L).flatMap((l) => range(N).map((n) => [`layer ${l + 1}, bank ${n + 1}`, (t) => share(kind, t, l, n)])), kind]),
  ...(STEP_SIZE in arrays ? [["Step size of the delta rule",
    "mean over steps by mass; 1 replaces what is held for the key, more reflects it",
    data.delta_layers.flatMap((l) => range(H).map((h) => [`layer ${l + 1}, head ${h + 1}`, (t) => share(STEP_SIZE, t, l, 0, null, h)])),
    STEP_SIZE, arrays[STEP_SIZE].scale]] : []),
].map(([title, note, rows, kind, end]) => {
  const values = rows.map(([, value]) => range(count).map(value));
  return { title, note, kind, names: rows.map(([name]) => name), values, high: end ?? (largest(values.map(largest)) || 1) };
});
const ROW = 12, LEAST_WIDTH = 2;

for (const strip of strips) {
  strip.canvas = element("canvas");
  strip.marker = element("i", { style: { width: `max(3px, ${100 / count}%)` } });
  strip.sheet = element("div", { className: "sheet", style: { "min-width": `${LEAST_WIDTH * count}px` } }, strip.canvas, strip.marker);
  const names = strip.names.map((name) => element("span", { textContent: name }));
  const scroll = element("div", { className: "scroll" }, strip.sheet);
  scroll.onscroll = () => strips.forEach(({ sheet }) => { sheet.parentNode.scrollLeft = scroll.scrollLeft; });
  $("profile").append(
    element("h2", {}, `${strip.title} `, element("small", { textContent: `${strip.note}; up to ${fixed(strip.high)}` })),
    element("div", { className: "strip" }, element("div", { style: { height: `${ROW * names.length}px` } }, ...names), scroll));
  const at = (event) => {
    const box = strip.canvas.getBoundingClientRect();
    const t = Math.floor((event.clientX - box.left) / box.width * count);
    const index = Math.floor((event.clientY - box.top) / ROW);
    return [Math.min(count - 1, Math.max(0, t)), Math.min(strip.names.length - 1, Math.max(0, index))];
  };
  strip.canvas.onmousemove = (event) => {
    const [t, index] = at(event);
    near(t);
    tip(`${line(t)}  ${strip.names[index]}: ${fixed(strip.values[index][t], 4)}`, event);
  };
  strip.canvas.onmouseleave = () => { near(null); tip(null); };
  strip.canvas.onclick = (event) => choose(at(event)[0], true);
}

function draw() {
  const style = getComputedStyle(document.documentElement);
  const [zero, full] = ["--zero", "--full"].map((name) => style.getPropertyValue(name));
  for (const { canvas, sheet, names, values, high } of strips) {
    const height = ROW * names.length, ratio = window.devicePixelRatio;
    Object.assign(canvas, { width: Math.round(sheet.clientWidth * ratio), height: Math.round(height * ratio) });
    canvas.style.height = `${height}px`;
    const pen = canvas.getContext("2d"), column = canvas.width / count, line = canvas.height / names.length;
    pen.fillStyle = zero; pen.fillRect(0, 0, canvas.width, canvas.height);
    pen.fillStyle = full;
    values.forEach((row, index) => row.forEach((value, t) => {
      pen.globalAlpha = value / high;
      const left = Math.round(t * column);
      pen.fillRect(left, Math.round(index * line), Math.round((t + 1) * column) - left, Math.round(line) - 1);
    }));
  }
}

let marked = null;
function near(t) {
  if (marked !== null) spans[marked].classList.remove("near");
  marked = t;
  if (t !== null) spans[t].classList.add("near");
}

function tip(text, event) {
  $("tip").classList.toggle("on", text !== null);
  if (text === null) return;
  $("tip").textContent = text;
  const { width, height } = $("tip").getBoundingClientRect();
  $("tip").style.left = `${Math.max(4, Math.min(event.clientX + 12, innerWidth - width - 8))}px`;
  $("tip").style.top = `${event.clientY + 18 + height > innerHeight ? event.clientY - height - 10 : event.clientY + 18}px`;
}

const tokenAt = (event) => event.target.closest(".token")?.dataset.index;
$("text").onclick = (event) => { if (tokenAt(event)) choose(+tokenAt(event)); };
document.onmousemove = (event) => {
  const t = tokenAt(event), described = event.target.closest("[data-tip]");
  if (t) {
    const [, name, value] = colours[$("colour").value];
    const extra = $("colour").value < 2 ? "" : `  ${name} ${fixed(value(+t))}`;
    tip(`${line(+t)}  ${fixed(data.depth[t])} of ${data.steps[t]} steps  ${surprise(+t)}${extra}`, event);
  } else if (described) tip(described.dataset.tip, event);
  else if (event.target.tagName !== "CANVAS") tip(null);
};
$("text").onkeydown = (event) => {
  const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!move) return;
  event.preventDefault();
  choose(Math.min(count - 1, Math.max(0, chosen + move)), true);
};

const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
$("summary").textContent = [
  plural(count, "token"), `${fixed(sum(data.depth) / count)} of ${plural(P, "step")} on average`, plural(S, "level"),
  ...(kinds.length ? [plural(L, "layer"), plural(H, "head"), plural(N, "bank")] : []),
].join(" \u00b7 ");
for (const group of new Set(colours.map(([group]) => group))) {
  $("colour").append(element("optgroup", { label: group }, ...colours.flatMap(([of, name], value) =>
    (of === group ? [element("option", { value, textContent: name })] : []))));
}
$("colour").onchange = paint;
window.onresize = draw;
matchMedia("(prefers-color-scheme: dark)").onchange = draw;
paint();
draw();
choose(data.depth.indexOf(largest(data.depth)));
</script>
</body>
</html>
"""

__all__ = ["PAGE"]

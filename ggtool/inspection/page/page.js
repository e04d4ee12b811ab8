"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const types = [...new Set(data.tensors.map((t) => t.type))];
const color = (type) => (type === "header" ? "var(--head)" : `var(--c${types.indexOf(type) % 8})`);

function el(name, attributes = {}, text) {
  const node = name.startsWith("svg:") ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}
const size = (n) => (n >= 2 ** 30 ? (n / 2 ** 30).toFixed(2) + " GiB" : n >= 2 ** 20 ? (n / 2 ** 20).toFixed(2) + " MiB" : n >= 1024 ? (n / 1024).toFixed(2) + " KiB" : n + " bytes");
const short = (x) => (typeof x !== "number" ? String(x) : x === 0 ? "0" : Math.abs(x) >= 0.001 && Math.abs(x) < 1e5 ? String(+x.toPrecision(4)) : x.toExponential(2));
document.querySelectorAll(".swatch[data-type]").forEach((s) => (s.style.background = color(s.dataset.type)));

// The map: every part of the model, one after another, wrapped into rows of equal length.
const pieces = [];
let base = 0;
data.parts.forEach((part, number) => {
  pieces.push({ begin: base, end: base + Math.min(part.data_offset, part.bytes), type: "header", name: "header" + (data.parts.length > 1 ? " of " + part.name : "") });
  data.tensors.filter((t) => t.part === number).forEach((t) => pieces.push({ begin: base + t.offset, end: base + t.offset + t.bytes, type: t.type, name: t.name, tensor: t }));
  base += part.bytes;
});
const total = Math.max(base, 1);
const WIDTH = 1000, ROW = 14, GAP = 2;

function drawMap() {
  const narrow = $("drawing").clientWidth < 560;
  const rows = Math.min(narrow ? 48 : 32, Math.max(4, pieces.length));
  const perRow = total / rows, scale = narrow ? 2.4 : 1, height = rows * (ROW + GAP) * scale;
  $("scale").textContent = `One row is ${size(Math.round(perRow))}.`;
  const svg = el("svg:svg", { viewBox: `0 0 ${WIDTH} ${height}`, preserveAspectRatio: "none" });
  for (const piece of pieces) {
    const first = Math.floor(piece.begin / perRow), last = Math.min(rows - 1, Math.floor((piece.end - 1) / perRow));
    for (let row = first; row <= last; row++) {
      const x0 = Math.max(0, (piece.begin - row * perRow) / perRow) * WIDTH, x1 = Math.min(1, (piece.end - row * perRow) / perRow) * WIDTH;
      if (x1 <= x0) continue;
      svg.append(el("svg:rect", { x: x0, y: row * (ROW + GAP) * scale, width: Math.max(x1 - x0 - 1, 0.7), height: ROW * scale, fill: color(piece.type) }));
    }
  }
  const find = (event) => {
    const box = svg.getBoundingClientRect();
    const row = Math.floor(((event.clientY - box.top) / box.height) * rows), at = (row + (event.clientX - box.left) / box.width) * perRow;
    return pieces.find((p) => at >= p.begin && at < p.end);
  };
  const say = (event) => {
    const piece = find(event);
    if (!piece) { $("at").textContent = "padding"; return; }
    const t = piece.tensor;
    $("at").textContent = t ? `${t.name}: ${t.shape.join(" x ")} ${t.type}, ${size(t.bytes)} at byte ${t.offset.toLocaleString("en")}` : `${piece.name}: keys, vocabulary and the list of tensors, ${size(piece.end - piece.begin)}`;
  };
  svg.addEventListener("pointermove", say);
  svg.addEventListener("click", (event) => { say(event); const piece = find(event); if (piece && piece.tensor) choose(piece.tensor); });
  $("drawing").replaceChildren(svg);
}

function histogram(counts, width, height) {
  const svg = el("svg:svg", { viewBox: `0 0 ${counts.length} ${height}`, width, height, preserveAspectRatio: "none", "aria-hidden": "true" });
  const most = Math.max(...counts, 1);
  counts.forEach((count, at) => count && svg.append(el("svg:rect", { x: at, width: 0.9, height: Math.max((count / most) * height, 0.6), y: height - Math.max((count / most) * height, 0.6), fill: "var(--c0)" })));
  return svg;
}

// The list.
const hasStats = data.tensors.some((t) => t.stats);
const natural = new Intl.Collator("en", { numeric: true });
function list() {
  const wanted = $("filter").value.toLowerCase(), by = $("sort").value;
  const shown = data.tensors.filter((t) => t.name.toLowerCase().includes(wanted));
  const stat = (t) => (t.stats && typeof t.stats[by] === "number" ? t.stats[by] : -Infinity);
  if (by === "name") shown.sort((a, b) => natural.compare(a.name, b.name));
  else if (by === "bytes") shown.sort((a, b) => b.bytes - a.bytes);
  else if (by !== "offset") shown.sort((a, b) => stat(b) - stat(a));
  $("count").textContent = `${shown.length} of ${data.tensors.length}`;
  $("list").tBodies[0].replaceChildren(...shown.map(row));
}
function row(t) {
  const tr = el("tr");
  const name = el("td"), button = el("button", { type: "button" }, t.name);
  name.append(button);
  const kind = el("td");
  const swatch = el("i", { class: "swatch" });
  swatch.style.background = color(t.type);
  kind.append(swatch, t.type);
  tr.append(name, el("td", {}, t.shape.join(" x ")), kind, el("td", { class: "n" }, size(t.bytes)));
  if (hasStats) {
    const s = t.stats;
    for (const key of ["minimum", "maximum", "std", "largest_sigmas"]) tr.append(el("td", { class: "n" }, s ? short(s[key]) : "–"));
    const cell = el("td");
    if (s) cell.append(histogram(s.histogram, 120, 22));
    tr.append(cell);
  }
  tr.addEventListener("click", () => choose(t));
  return tr;
}
function choose(t) {
  const box = $("detail");
  box.hidden = false;
  box.replaceChildren(el("h3", {}, t.name), el("p", {}, `${t.shape.join(" x ")} ${t.type}: ${t.params.toLocaleString("en")} weights in ${size(t.bytes)}, ${((8 * t.bytes) / t.params).toFixed(3)} bits each, at byte ${t.offset.toLocaleString("en")} of ${data.parts[t.part].name}`));
  if (t.stats) {
    const s = t.stats;
    box.append(histogram(s.histogram, "100%", 110), el("p", { class: "note" }, `from ${short(s.minimum)} to ${short(s.maximum)}; mean ${short(s.mean)}, standard deviation ${short(s.std)}, skewness ${short(s.skewness)}, excess kurtosis ${short(s.kurtosis)}`));
    box.append(el("p", {}, `${s.n_outliers.toLocaleString("en")} weights beyond 6 standard deviations, the farthest at ${short(s.largest_sigmas)}; ${s.n_zero.toLocaleString("en")} zeros`));
    if (s.n_nan || s.n_inf) box.append(el("p", { class: "bad" }, `${s.n_nan} NaN and ${s.n_inf} infinities`));
  }
  if (data.blocks[t.name] && $("which")) { $("which").value = t.name; explore(); }
  document.querySelectorAll("#list tr.on").forEach((tr) => tr.classList.remove("on"));
  for (const tr of $("list").tBodies[0].rows) if (tr.querySelector("button").textContent === t.name) tr.classList.add("on");
}

// The block.
function explore() {
  const name = $("which").value, block = data.blocks[name];
  const tensor = data.tensors.find((t) => t.name === name), fields = data.fields[tensor.type], out = $("explorer");
  const tint = (at) => `color-mix(in srgb, var(--c${at % 8}) 55%, #fff)`;
  const bytes = el("div", { class: "bytes" }), said = el("p", { class: "readout", "aria-live": "polite" }, "Point at a byte, or tap it.");
  fields.forEach((field, at) => {
    const n = block.hex.length / 2, end = at + 1 < fields.length ? fields[at + 1].offset : n;
    for (let i = field.offset; i < end; i++) {
      const button = el("button", { type: "button" }, block.hex.slice(2 * i, 2 * i + 2));
      button.style.background = tint(at);
      const tell = () => (said.textContent = `byte ${(block.offset + i).toLocaleString("en")}, ${i - field.offset} of ${field.name}: ${field.meaning}` + (block.values[at] ? ` = ${block.values[at]}` : ""));
      button.addEventListener("pointerenter", tell);
      button.addEventListener("focus", tell);
      button.addEventListener("click", tell);
      bytes.append(button);
    }
  });
  const legend = el("div", { class: "legend" });
  fields.forEach((field, at) => {
    const line = el("div"), swatch = el("i", { class: "swatch" });
    swatch.style.background = tint(at);
    line.append(swatch, el("b", {}, field.name), ` ${field.meaning}` + (block.values[at] ? ` = ${block.values[at]}` : ""));
    legend.append(line);
  });
  out.replaceChildren(el("p", {}, `${tensor.type}: ${block.weights.length} weights in ${block.hex.length / 2} bytes, at byte ${block.offset.toLocaleString("en")}.`), bytes, said, legend);
  if (block.weights.length) out.append(el("h3", {}, "Its weights"), weights(block));
  if (block.groups.length) out.append(groups(block));
}
function weights(block) {
  const n = block.weights.length, height = 160, most = Math.max(...block.weights.map((w) => Math.abs(w)), 1e-30);
  const svg = el("svg:svg", { viewBox: `0 0 ${n * 4} ${height}`, width: "100%", height, preserveAspectRatio: "none", role: "img", "aria-label": "Each weight of the block as a bar" });
  const groups = block.groups.length ? block.groups : [{ start: 0, n_weights: n }];
  groups.forEach((g, at) => {
    if (at % 2) svg.append(el("svg:rect", { x: g.start * 4, y: 0, width: g.n_weights * 4, height, fill: "var(--line)", opacity: 0.45 }));
  });
  block.weights.forEach((w, at) => {
    const h = (Math.abs(w) / most) * (height / 2 - 4);
    svg.append(el("svg:rect", { x: at * 4 + 0.5, y: w < 0 ? height / 2 : height / 2 - h, width: 3, height: Math.max(h, 0.5), fill: w < 0 ? "var(--c3)" : "var(--c0)" }));
  });
  const box = el("div");
  box.append(svg, el("p", { class: "note" }, `From ${short(Math.min(...block.weights))} to ${short(Math.max(...block.weights))}` + (block.groups.length > 1 ? "; each shade is a group with a scale of its own." : ".")));
  return box;
}
function groups(block) {
  const box = el("div"), wrap = el("div", { class: "scroll" }), table = el("table"), head = el("tr"), body = el("tbody");
  const isSplit = block.groups[0].scale_code !== null, hasMinimum = block.groups.some((g) => g.minimum !== 0);
  const columns = ["Weights", ...(isSplit ? ["Scale code"] : []), "Scale", ...(hasMinimum ? [...(isSplit ? ["Min code"] : []), "Minimum"] : []), "Levels"];
  columns.forEach((c) => head.append(el("th", {}, c)));
  block.groups.forEach((g) => {
    const levels = block.levels.slice(g.start, g.start + g.n_weights).join(" ");
    const cells = [`${g.start}–${g.start + g.n_weights - 1}`, ...(isSplit ? [g.scale_code] : []), short(g.scale), ...(hasMinimum ? [...(isSplit ? [g.minimum_code ?? ""] : []), short(g.minimum)] : []), levels];
    const tr = el("tr");
    cells.forEach((c) => tr.append(el("td", {}, String(c))));
    body.append(tr);
  });
  const thead = el("thead");
  thead.append(head);
  table.append(thead, body);
  wrap.append(table);
  box.append(el("h3", {}, hasMinimum ? "weight = scale × level − minimum" : "weight = scale × level"), wrap);
  return box;
}

drawMap();
let lastWidth = $("drawing").clientWidth;
addEventListener("resize", () => { if ($("drawing").clientWidth !== lastWidth) { lastWidth = $("drawing").clientWidth; drawMap(); } });
list();
$("filter").addEventListener("input", list);
$("sort").addEventListener("change", list);
if ($("which")) {
  Object.keys(data.blocks).forEach((name) => $("which").append(el("option", {}, name)));
  $("which").addEventListener("change", explore);
  if (Object.keys(data.blocks).length) explore();
  else $("explorer").textContent = "No tensor of this file is quantized in blocks.";
}

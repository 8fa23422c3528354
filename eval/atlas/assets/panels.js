// Colours, thumbnails, and what stands in the panels; app.js says when.
const make = (tag, className = "", words = "") => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (words) element.textContent = words; // never as markup: words come from files
  return element;
};
const byId = (id) => document.getElementById(id);
const count = (v) => v.toLocaleString("en");

const INK = (() => {
  // Middling lightness: seen on white and on black. The first six are the colour-blind-safe ones
  // of Okabe and Ito.
  const palette = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#B5A400",
    "#7E57C2", "#44AA99", "#B3446C", "#8D8A3A", "#4A74D9", "#DD77DD", "#66AA44", "#BB7744",
    "#6C8EA8"];
  // A scale that begins near the ground: low values step back, high ones stand out.
  const ramps = { light: ["#d5dae1", "#dfa0bd", "#a83c80", "#4a0f3c"],
    dark: ["#3a424e", "#8a3f7c", "#e580bf", "#fff0f8"] };
  const dark = () => document.documentElement.dataset.theme === "dark";
  const parse = (text) => [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
  function ofClass(column, code) {
    if (code < 0) return dark() ? [86, 96, 108] : [190, 198, 207];
    if (code >= column.shown) return dark() ? [130, 140, 152] : [140, 150, 162];
    if (code < palette.length) return parse(palette[code]);
    // Beyond the palette: hues a golden angle apart.
    const h = (code * 137.508) % 360, l = code % 2 ? 0.62 : 0.48;
    return [0, 8, 4].map((k) => {
      const a = (k + h / 30) % 12;
      const wave = Math.max(-1, Math.min(a - 3, 9 - a, 1));
      return Math.round(255 * (l - 0.55 * Math.min(l, 1 - l) * wave));
    });
  }
  function ofNumber(column, v) {
    if (!Number.isFinite(v)) return ofClass(column, -1);
    const ramp = ramps[dark() ? "dark" : "light"].map(parse), [low, high] = column.span;
    const t = Math.max(0, Math.min(1, (v - low) / (high - low))) * (ramp.length - 1);
    const k = Math.min(ramp.length - 2, Math.floor(t)), f = t - k;
    return ramp[k].map((c, j) => Math.round(c + f * (ramp[k + 1][j] - c)));
  }
  const of = (column, i) => (column.labels ? ofClass(column, DATA.classOf(column, i))
    : ofNumber(column, column.values[i]));
  const css = (rgb) => `rgb(${rgb.join(",")})`;
  const ramp = () => `linear-gradient(90deg,${ramps[dark() ? "dark" : "light"].join(",")})`;
  return { of, ofClass, css, ramp, dark };
})();

const labelOf = (column, code) => (code < 0 ? ATLAS.meta.unknown
  : code >= column.shown ? `${ATLAS.meta.rest}: ${column.labels.length - column.shown}`
    : column.labels[code]);

// A nucleus as an element of `size` px; a button where `act` is given.
function thumb(i, size, column, act) {
  const element = make(act ? "button" : "div", "thumb"), across = SHEETS.across;
  element.style.width = element.style.height = `${size}px`;
  element.style.setProperty("--c", INK.css(INK.of(column, i)));
  element.dataset.row = i;
  if (DATA.there[i]) {
    const { sheet, column: c, row } = SHEETS.at(i), inner = size - 4;
    element.style.backgroundImage = `url("${SHEETS.url(sheet)}")`;
    element.style.backgroundSize = `${inner * across}px auto`;
    element.style.backgroundPosition = `${-c * inner}px ${-row * inner}px`;
  } else element.classList.add("none");
  const words = [DATA.ids[i], column.name + " " + (DATA.word(column, i) || ATLAS.meta.unknown)];
  element.title = words.join("\n");
  if (act) {
    element.type = "button";
    element.setAttribute("aria-label", words.join(", "));
    element.addEventListener("click", () => act(i));
  }
  return element;
}

// A column in which nothing stands, such as patients that nobody knows, is not shown.
const filled = (column) => !column.labels || column.labels.length > 0;

function facts(i, column, all) {
  const list = make("dl");
  const row = (name, value) => list.append(make("dt", "", name), make("dd", "", value));
  row("id", DATA.ids[i]);
  const skip = new Set(["x_px", "y_px", "x_um", "y_um", "type", "score"]);
  const type = DATA.named.get("type"), score = DATA.named.get("score");
  if (type && filled(type)) {
    const sure = score ? DATA.word(score, i) : "";
    const tail = sure ? ` (${Number(sure).toFixed(2)})` : "";
    row("type", (DATA.word(type, i) || ATLAS.meta.unknown) + tail);
  }
  const usual = new Set(["slide", "patient", "cluster", column.name]);
  for (const c of DATA.columns)
    if (!skip.has(c.name) && (all || usual.has(c.name)) && filled(c))
      row(c.name, DATA.word(c, i) || "–");
  const x = DATA.named.get("x_um"), y = DATA.named.get("y_um");
  if (x && y)
    row("place", [x, y].map((c) => count(Math.round(c.values[i]))).join(", ") + " µm");
  return list;
}

function showLegend(column, hidden, act) {
  const box = byId("legend");
  box.replaceChildren();
  if (!column.labels) {
    const ramp = make("div", "ramp"), ends = make("div", "ends");
    ramp.style.background = INK.ramp();
    for (const end of column.span) ends.append(make("span", "", String(Number(end.toPrecision(4)))));
    box.append(ramp, ends);
    return;
  }
  const counts = new Map();
  for (let i = 0; i < DATA.n; i++) {
    const code = DATA.classOf(column, i);
    counts.set(code, (counts.get(code) || 0) + 1);
  }
  const codes = [...counts.keys()].sort((a, b) => (a < 0) - (b < 0) || a - b);
  for (const code of codes) {
    const row = make("button"), swatch = make("span", "swatch");
    row.type = "button";
    row.dataset.code = code;
    row.setAttribute("aria-pressed", String(!hidden.has(code)));
    row.title = "Show or hide";
    swatch.style.setProperty("--c", INK.css(INK.ofClass(column, code)));
    row.append(swatch, make("span", "name", labelOf(column, code)),
      make("span", "count", count(counts.get(code))));
    row.addEventListener("click", () => act(code));
    box.append(row);
  }
  const all = make("div", "all");
  for (const [words, to] of [["Show all", []], ["Hide all", codes]]) {
    const button = make("button", "", words);
    button.type = "button";
    button.addEventListener("click", () => act(to));
    all.append(button);
  }
  if (codes.length > 1) box.append(all);
}

function showTip(i, column, sx, sy, width, height) {
  const tip = byId("tip");
  tip.hidden = i < 0;
  if (i < 0) return;
  if (tip.dataset.row !== String(i)) {
    tip.dataset.row = i;
    tip.replaceChildren(thumb(i, 100, column), facts(i, column, false));
  }
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, sx + 18 + box.width > width ? sx - 18 - box.width : sx + 18)}px`;
  tip.style.top = `${Math.max(4, Math.min(height - box.height - 6, sy - box.height / 2))}px`;
}

function showFocus(i, column, act) {
  const box = byId("focus");
  if (i < 0) {
    box.replaceChildren(make("p", "hint",
      "Click a nucleus to see the ones that the encoder finds most alike."));
    return;
  }
  const card = make("div", "card"), near = make("div", "near");
  card.append(thumb(i, 100, column), facts(i, column, true));
  for (let k = 0; k < DATA.k; k++) {
    const at = i * DATA.k + k, figure = make("figure");
    figure.append(thumb(DATA.near[at], 52, column, act),
      make("figcaption", "", DATA.cosine(at).toFixed(3)));
    near.append(figure);
  }
  box.replaceChildren(card, make("p", "hint", `The ${DATA.k} most alike, with their cosine:`), near);
}

const SHOWN = 240; // thumbnails of a selection that are shown at once
function showSelection(chosen, column, act) {
  const box = byId("selection");
  byId("csv").disabled = byId("clear").disabled = !chosen.length;
  box.replaceChildren();
  if (!chosen.length) {
    box.append(make("p", "hint", "Draw a lasso around nuclei to see and save them."));
    return;
  }
  box.append(make("p", "count", `${count(chosen.length)} of ${count(DATA.n)} nuclei`));
  box.append(column.labels ? shares(chosen, column) : middle(chosen, column));
  // Evenly spaced along the page's order, which follows the map: all of the selection is seen.
  const step = Math.max(1, chosen.length / SHOWN), sheet = make("div", "sheet");
  for (let k = 0; k < Math.min(SHOWN, chosen.length); k++)
    sheet.append(thumb(chosen[Math.floor(k * step)], 52, column, act));
  box.append(sheet);
  if (chosen.length > SHOWN)
    box.append(make("p", "hint", `${SHOWN} of them are shown; the CSV holds all.`));
}

function shares(chosen, column) {
  const table = make("div", "share"), here = new Map(), all = new Map();
  for (let i = 0; i < DATA.n; i++) {
    const code = DATA.classOf(column, i);
    all.set(code, (all.get(code) || 0) + 1);
  }
  for (const i of chosen) {
    const code = DATA.classOf(column, i);
    here.set(code, (here.get(code) || 0) + 1);
  }
  const percent = (part, whole) => `${((100 * part) / whole).toFixed(1)} %`;
  for (const [code, number] of [...here].sort((a, b) => b[1] - a[1]).slice(0, 8)) {
    const name = make("span", "name"), dot = make("span", "dot");
    dot.style.background = INK.css(INK.ofClass(column, code));
    name.append(dot, labelOf(column, code));
    table.append(name, make("span", "n", percent(number, chosen.length)),
      make("span", "of", `${percent(all.get(code), DATA.n)} of all`));
  }
  return table;
}

function middle(chosen, column) {
  const mean = (rows) => {
    let sum = 0, known = 0;
    for (const i of rows)
      if (Number.isFinite(column.values[i])) { sum += column.values[i]; known++; }
    return known ? Number((sum / known).toPrecision(4)) : "–";
  };
  const every = mean(Array.from({ length: DATA.n }, (_, i) => i));
  return make("p", "", `Mean of ${column.name}: ${mean(chosen)}; of all nuclei: ${every}`);
}

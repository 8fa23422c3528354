// What the page does: state, colours of the dots, mouse and keys, buttons.
const state = { column: null, hidden: new Map(), chosen: [], mask: new Uint8Array(DATA.n),
  focus: -1, hover: -1, lasso: false, pictures: false, line: [], pointer: null };
const plot = new Plot(byId("points"), byId("over"));
const say = (words) => { byId("say").textContent = words; };
const hiddenOf = (column) => {
  if (!state.hidden.has(column.name)) state.hidden.set(column.name, new Set());
  return state.hidden.get(column.name);
};
// Hidden classes cannot be hovered, clicked or selected.
const seen = (i) => plot.colours[4 * i + 3] > 0;

function recolour() {
  const { column, mask, chosen } = state, c = plot.colours, hidden = hiddenOf(column);
  const table = new Map();
  if (column.labels)
    for (let code = -1; code <= column.shown; code++) table.set(code, INK.ofClass(column, code));
  const full = DATA.n > 20000 ? 200 : 225;
  for (let i = 0, at = 0; i < DATA.n; i++, at += 4) {
    const code = column.labels ? DATA.classOf(column, i) : 0;
    const rgb = column.labels ? table.get(code) : INK.of(column, i);
    c[at] = rgb[0]; c[at + 1] = rgb[1]; c[at + 2] = rgb[2];
    // What was not selected fades, so that the selection stands out.
    c[at + 3] = hidden.has(code) ? 0 : chosen.length && !mask[i] ? 38 : full;
  }
  plot.recolour();
}

function colourBy(name) {
  state.column = DATA.named.get(name);
  byId("colour").value = name;
  recolour();
  showLegend(state.column, hiddenOf(state.column), toggle);
  showFocus(state.focus, state.column, take);
  showSelection(state.chosen, state.column, take);
  byId("tip").dataset.row = "";
}

function toggle(code) {
  const hidden = hiddenOf(state.column);
  if (Array.isArray(code)) { hidden.clear(); code.forEach((one) => hidden.add(one)); }
  else if (!hidden.delete(code)) hidden.add(code);
  const button = document.activeElement && document.activeElement.dataset.code;
  recolour();
  showLegend(state.column, hidden, toggle);
  // The list was made anew: who uses the keyboard stays on the same row.
  if (button !== undefined && button !== null)
    document.querySelector(`#legend button[data-code="${button}"]`)?.focus();
}

function select(rows) {
  state.chosen = rows;
  state.mask.fill(0);
  for (const i of rows) state.mask[i] = 1;
  recolour();
  showSelection(rows, state.column, take);
  if (rows.length) unveil("selection");
  say(rows.length ? `${count(rows.length)} nuclei selected` : "nothing selected");
}

// Scroll the side panel, and it alone, to one of its parts.
function unveil(id) {
  const side = document.querySelector("aside"), panel = byId(id).closest(".panel");
  const top = panel.offsetTop - side.offsetTop;
  if (top < side.scrollTop || panel.offsetTop + panel.offsetHeight - side.offsetTop >
      side.scrollTop + side.clientHeight)
    side.scrollTop = top;
}

// A nucleus comes into focus: its card, its neighbours, and lines to them on the map.
function take(i) {
  state.focus = i;
  showFocus(i, state.column, take);
  if (i >= 0) {
    unveil("focus");
    plot.reveal([i]);
    say(`${DATA.ids[i]} and the ${DATA.k} nuclei most like it`);
  }
  plot.draw();
}

const nearOf = (i) => Array.from(DATA.near.subarray(i * DATA.k, (i + 1) * DATA.k));

function ring(pen, i, radius, width, ink) {
  const [x, y] = plot.screen(i);
  pen.beginPath();
  pen.arc(x, y, radius, 0, 2 * Math.PI);
  pen.lineWidth = width;
  pen.strokeStyle = ink;
  pen.stroke();
}

plot.above = (pen) => {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink"), ground = style.getPropertyValue("--page");
  if (state.pictures) PICTURES.draw(pen);
  const r = Math.max(5, plot.dot() / 2 + 3);
  if (state.focus >= 0) {
    const [x, y] = plot.screen(state.focus), near = nearOf(state.focus);
    pen.globalAlpha = 0.45;
    pen.strokeStyle = ink;
    pen.lineWidth = 1;
    for (const i of near) {
      const [nx, ny] = plot.screen(i);
      pen.beginPath(); pen.moveTo(x, y); pen.lineTo(nx, ny); pen.stroke();
    }
    pen.globalAlpha = 1;
    for (const i of near) { ring(pen, i, r, 4, ground); ring(pen, i, r, 1.8, ink); }
    ring(pen, state.focus, r + 3, 6, ground);
    ring(pen, state.focus, r + 3, 3, style.getPropertyValue("--accent"));
  }
  if (state.hover >= 0) { ring(pen, state.hover, r, 4, ground); ring(pen, state.hover, r, 2, ink); }
  if (state.line.length > 2) {
    pen.beginPath();
    for (let k = 0; k < state.line.length; k += 2) pen.lineTo(state.line[k], state.line[k + 1]);
    pen.closePath();
    pen.globalAlpha = 0.12; pen.fillStyle = style.getPropertyValue("--accent"); pen.fill();
    pen.globalAlpha = 1; pen.strokeStyle = style.getPropertyValue("--accent");
    pen.lineWidth = 1.5; pen.stroke();
  }
};

const over = byId("over");
const where = (event) => {
  const box = over.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
};
function hit(sx, sy, reach = Math.max(7, plot.dot() / 2 + 3)) {
  return DATA.nearest(...plot.map(sx, sy), reach / plot.view.scale, seen);
}
function hover(i, sx, sy) {
  if (state.hover !== i) { state.hover = i; plot.draw(); }
  over.classList.toggle("hit", i >= 0 && !state.lasso);
  showTip(i, state.column, sx, sy, plot.width, plot.height);
}

over.addEventListener("pointerdown", (event) => {
  if (event.button !== 0 || state.pointer) return;
  const [sx, sy] = where(event), draws = state.lasso || event.shiftKey;
  over.setPointerCapture(event.pointerId);
  state.pointer = { id: event.pointerId, sx, sy, x: sx, y: sy, draws, moved: false };
  if (draws) state.line = [sx, sy];
});
over.addEventListener("pointermove", (event) => {
  const [sx, sy] = where(event), p = state.pointer;
  if (!p) { hover(hit(sx, sy), sx, sy); return; }
  if (p.id !== event.pointerId) return;
  // A hand trembles: less than 4 px is a click.
  if (!p.moved && Math.hypot(sx - p.sx, sy - p.sy) < 4) return;
  p.moved = true;
  hover(-1);
  if (p.draws) { state.line.push(sx, sy); plot.draw(); }
  else plot.shift((p.x - sx) / plot.view.scale, (sy - p.y) / plot.view.scale);
  p.x = sx; p.y = sy;
});
function release(event) {
  const p = state.pointer;
  if (!p || p.id !== event.pointerId) return;
  const line = state.line;
  state.pointer = null;
  state.line = [];
  plot.draw();
  if (event.type === "pointercancel") return;
  if (!p.moved) { take(hit(p.sx, p.sy)); return; }
  if (!p.draws) return;
  const around = [];
  for (let k = 0; k < line.length; k += 2) around.push(...plot.map(line[k], line[k + 1]));
  select(DATA.inside(around, seen));
}
over.addEventListener("pointerup", release);
over.addEventListener("pointercancel", release);
over.addEventListener("pointerleave", () => hover(-1));
over.addEventListener("wheel", (event) => {
  event.preventDefault();
  const step = event.deltaMode ? event.deltaY * 20 : event.deltaY;
  plot.zoom(Math.exp(-Math.max(-300, Math.min(300, step)) * 0.0022), ...where(event));
  hover(-1);
}, { passive: false });
over.addEventListener("keydown", (event) => {
  const far = 60 / plot.view.scale, middle = [plot.width / 2, plot.height / 2];
  const acts = { ArrowLeft: () => plot.shift(-far, 0), ArrowRight: () => plot.shift(far, 0),
    ArrowUp: () => plot.shift(0, far), ArrowDown: () => plot.shift(0, -far),
    "+": () => plot.zoom(1.4), "=": () => plot.zoom(1.4), "-": () => plot.zoom(1 / 1.4),
    0: () => plot.whole(), Enter: () => take(hit(...middle, plot.width)),
    Escape: () => { select([]); take(-1); } };
  if (!acts[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  acts[event.key]();
});

const click = (id, act) => byId(id).addEventListener("click", act);
function mode(lasso) {
  state.lasso = lasso;
  over.classList.toggle("lasso", lasso);
  byId("lasso").setAttribute("aria-pressed", String(lasso));
  byId("pan").setAttribute("aria-pressed", String(!lasso));
}
click("pan", () => mode(false));
click("lasso", () => mode(true));
click("in", () => plot.zoom(1.6));
click("out", () => plot.zoom(1 / 1.6));
click("whole", () => plot.whole());
click("inview", () => {
  const rows = [];
  DATA.within(...plot.bounds(), (i) => { if (seen(i)) rows.push(i); });
  select(rows.sort((a, b) => a - b));
});
click("pictures", () => {
  state.pictures = !state.pictures;
  byId("pictures").setAttribute("aria-pressed", String(state.pictures));
  plot.points.style.opacity = state.pictures ? 0.3 : 1;
  plot.draw();
});
byId("pictures").disabled = !DATA.there.some(Boolean);
click("clear", () => select([]));
click("csv", () => {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([DATA.csv(state.chosen)], { type: "text/csv" }));
  link.download = "nuclei.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
});
byId("find").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = byId("id").value.trim(), exact = DATA.ids.indexOf(name);
  const i = exact >= 0 || !name ? exact : DATA.ids.findIndex((id) => id.startsWith(name));
  byId("id").setCustomValidity(i < 0 ? "There is no such nucleus on this page." : "");
  if (i >= 0) take(i);
  else { byId("id").reportValidity(); say("There is no such nucleus on this page."); }
});
byId("id").addEventListener("input", () => byId("id").setCustomValidity(""));

function theme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  byId("theme").textContent = dark ? "Light" : "Dark";
  if (state.column) colourBy(state.column.name);
}
click("theme", () => theme(!INK.dark()));
theme(matchMedia("(prefers-color-scheme: dark)").matches);

for (const column of DATA.columns.filter((c) => c.menu)) {
  const option = make("option", "", column.name);
  option.value = column.name;
  byId("colour").append(option);
}
byId("colour").addEventListener("change", (event) => colourBy(event.target.value));
// The first column that says something: with one class only, clusters say more.
const telling = DATA.columns.filter((c) => c.menu && (!c.labels || c.labels.length > 1));
colourBy((telling[0] || DATA.columns[0]).name);

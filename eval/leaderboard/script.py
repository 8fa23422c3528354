"""What the leaderboard adds to the report's style sheet, and its script: sorting on a click.

Without the script every table stands sorted by its headline metric.
"""

CSS = """
main { max-width:1480px; }
h4 { font-size:14.5px; margin:26px 0 6px; font-weight:650; }
caption { text-align:left; color:var(--muted); font-size:13px; padding:0 0 8px; }
tbody th, tfoot th { color:var(--ink); font-weight:400; font-size:14.5px; vertical-align:top;
  min-width:12em; overflow-wrap:anywhere; }
thead th[colspan] { color:var(--ink); border-bottom:0; text-align:center; }
thead th.num { text-align:right; }
tr.floor-row > * { color:var(--muted); }
tr.best-floor > * { border-top:2px solid var(--fair); border-bottom:2px solid var(--fair);
  background:var(--soft); }
.tag { display:inline-block; font-size:11px; font-weight:600; line-height:1.5; padding:0 5px;
  margin-left:6px; border:1px solid currentColor; border-radius:4px; white-space:nowrap; }
.v-above { color:var(--good); } .v-ahead { color:var(--fair); } .v-not { color:var(--poor); }
.say { display:block; font-size:12px; white-space:normal; min-width:9em; }
.matrix td, .matrix thead th { text-align:center; }
.matrix td { border:1px solid var(--page); font-variant-numeric:tabular-nums; }
button.sort { all:unset; cursor:pointer; font:inherit; color:inherit; }
button.sort:hover { text-decoration:underline; }
button.sort:focus-visible { outline:2px solid var(--accent); outline-offset:2px; }
th[aria-sort=descending] button.sort::after { content:" \\25BE"; }
th[aria-sort=ascending] button.sort::after { content:" \\25B4"; }
label.only { display:inline-block; font-size:14px; margin:8px 0 0; cursor:pointer; }
"""

SCRIPT = """
"use strict";
// The order of values: numbers, texts, or null for what is missing, which comes last both ways.
function order(values, down) {
  return values.map(function (_, i) { return i; }).sort(function (a, b) {
    var x = values[a], y = values[b];
    if (x === null || y === null) return (x === null) - (y === null) || a - b;
    var d = typeof x === "number" ? x - y : x.localeCompare(y);
    return (down ? -d : d) || a - b;
  });
}
function keyOf(cell) {
  if (!cell.hasAttribute("data-v")) return cell.textContent.trim();
  var text = cell.getAttribute("data-v");
  return text === "" ? null : Number(text);
}
function sortBy(table, head) {
  var column = Number(head.getAttribute("data-col"));
  var words = !head.classList.contains("num");
  var was = head.getAttribute("aria-sort");
  var down = was ? was === "ascending" : !words;
  table.querySelectorAll("th[aria-sort]").forEach(function (h) { h.removeAttribute("aria-sort"); });
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  var body = table.tBodies[0], rows = Array.from(body.rows);
  var keys = rows.map(function (row) { return keyOf(row.cells[column]); });
  order(keys, down).forEach(function (i) { body.appendChild(rows[i]); });
}
document.querySelectorAll("table.sortable").forEach(function (table) {
  table.querySelectorAll("th[data-col]").forEach(function (head) {
    var button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    while (head.firstChild) button.appendChild(head.firstChild);
    button.addEventListener("click", function () { sortBy(table, head); });
    head.appendChild(button);
  });
  var others = table.querySelectorAll("tr.floor-row:not(.best-floor)");
  if (!others.length) return;
  var label = document.createElement("label"), box = document.createElement("input");
  label.className = "only";
  box.type = "checkbox";
  box.addEventListener("change", function () {
    others.forEach(function (row) { row.hidden = box.checked; });
  });
  label.append(box, " only the best floor");
  table.parentNode.parentNode.insertBefore(label, table.parentNode);
});
"""

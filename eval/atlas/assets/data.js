// The nuclei: typed arrays from base64, their words, a grid to find them by place, CSV.
const DATA = (() => {
  const meta = ATLAS.meta, blobs = ATLAS.blobs, n = meta.n;

  function bytes(text) {
    const raw = atob(text), out = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
    return out;
  }
  // The text is let go once it is read: of 100,000 nuclei it is some 20 MB.
  function take(name, Kind) {
    const found = new Kind(bytes(blobs[name]).buffer);
    delete blobs[name];
    return found;
  }
  const xy = take("xy", Float32Array), near = take("near", Int32Array);
  const cosine = take("cosine", Uint16Array), there = take("there", Uint8Array);
  const ids = blobs.ids;
  const columns = meta.columns.map((c, i) => ({
    ...c, values: take("column" + i, c.labels ? Int32Array : Float32Array),
  }));
  const named = new Map(columns.map((c) => [c.name, c]));

  // Float32 holds seven digits; more of them would be noise.
  const plain = (v) => (Number.isFinite(v) ? String(Number(v.toPrecision(7))) : "");
  function word(column, i) {
    const v = column.values[i];
    if (column.labels) return v < 0 ? "" : column.labels[v];
    return plain(v);
  }
  // The class of a nucleus as the legend has it: -1 not known, `shown` for all without a colour.
  const classOf = (column, i) => Math.min(column.values[i], column.shown);

  // A grid of cells in which rows are sorted by cell: neighbours in place are found at once.
  const G = 256, first = new Int32Array(G * G + 1), rows = new Int32Array(n);
  const cellOf = (v) => Math.max(0, Math.min(G - 1, Math.floor(v * G)));
  for (let i = 0; i < n; i++) first[cellOf(xy[2 * i + 1]) * G + cellOf(xy[2 * i]) + 1]++;
  for (let c = 0; c < G * G; c++) first[c + 1] += first[c];
  const next = first.slice();
  for (let i = 0; i < n; i++) rows[next[cellOf(xy[2 * i + 1]) * G + cellOf(xy[2 * i])]++] = i;

  function within(x0, y0, x1, y1, visit) {
    for (let r = cellOf(y0); r <= cellOf(y1); r++)
      for (let k = first[r * G + cellOf(x0)]; k < first[r * G + cellOf(x1) + 1]; k++) {
        const i = rows[k], x = xy[2 * i], y = xy[2 * i + 1];
        if (x >= x0 && x <= x1 && y >= y0 && y <= y1) visit(i, x, y);
      }
  }
  // The nucleus nearest to a point of the map and at most `reach` away, or -1.
  function nearest(x, y, reach, keep) {
    let best = -1, least = reach * reach;
    within(x - reach, y - reach, x + reach, y + reach, (i, px, py) => {
      const d = (px - x) ** 2 + (py - y) ** 2;
      if (d <= least && keep(i)) { best = i; least = d; }
    });
    return best;
  }
  // Rows inside a closed line of map points [x, y, x, y, …], by the parity of crossings.
  function inside(line, keep) {
    const out = [];
    let x0 = Infinity, y0 = Infinity, x1 = -Infinity, y1 = -Infinity;
    for (let k = 0; k < line.length; k += 2) {
      x0 = Math.min(x0, line[k]); x1 = Math.max(x1, line[k]);
      y0 = Math.min(y0, line[k + 1]); y1 = Math.max(y1, line[k + 1]);
    }
    within(x0, y0, x1, y1, (i, x, y) => {
      let odd = false;
      for (let a = 0, b = line.length - 2; a < line.length; b = a, a += 2)
        if (line[a + 1] > y !== line[b + 1] > y &&
            x < ((line[b] - line[a]) * (y - line[a + 1])) / (line[b + 1] - line[a + 1]) + line[a])
          odd = !odd;
      if (odd && keep(i)) out.push(i);
    });
    return out.sort((a, b) => a - b);
  }

  function csv(chosen) {
    const quote = (s) => (/[",\r\n]/.test(s) ? `"${s.replace(/"/g, '""')}"` : s);
    const lines = [["id", ...columns.map((c) => c.name), "map_x", "map_y"].map(quote).join(",")];
    for (const i of chosen)
      lines.push([quote(ids[i]), ...columns.map((c) => quote(word(c, i))), plain(xy[2 * i]),
        plain(xy[2 * i + 1])].join(","));
    return lines.join("\r\n") + "\r\n";
  }

  return { n, k: meta.k, xy, near, cosine: (at) => cosine[at] / 32767.5 - 1, there, ids, columns,
    named, word, classOf, within, nearest, inside, csv };
})();

// Sprite sheets: addresses that styles can use, and images for the canvas, each loaded when needed.
const SHEETS = (() => {
  const { sheets, across, cell } = ATLAS.meta, images = new Map();
  const urls = sheets.map((address) => {
    if (!address.startsWith("data:")) return address;
    // One blob each: a data address in hundreds of styles would be parsed hundreds of times.
    const raw = atob(address.slice(address.indexOf(",") + 1)), part = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) part[i] = raw.charCodeAt(i);
    return URL.createObjectURL(new Blob([part], { type: "image/jpeg" }));
  });
  function at(i) {
    const sheet = Math.floor(i / (across * across)), rest = i % (across * across);
    return { sheet, column: rest % across, row: Math.floor(rest / across) };
  }
  function image(sheet, ready) {
    let found = images.get(sheet);
    if (!found) {
      found = new Image();
      found.onload = ready;
      found.src = urls[sheet];
      images.set(sheet, found);
    }
    return found.complete && found.naturalWidth ? found : null;
  }
  return { at, image, url: (sheet) => urls[sheet], cell, across };
})();

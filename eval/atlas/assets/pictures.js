// Nuclei in place of dots: one in each cell of a grid, the one nearest to the middle of the cell.
const PICTURES = (() => {
  const SIZE = 46, side = SHEETS.cell, ACROSS = 64, SLOTS = ACROSS * ACROSS;
  // A sheet is decoded anew each time that it is drawn after others have filled the browser's
  // store: 100,000 nuclei have 98 sheets, seconds a frame. So pictures are cut out once and kept.
  const shelf = make("canvas"), slots = new Map(), holder = new Int32Array(SLOTS).fill(-1);
  const cutter = shelf.getContext("2d");
  shelf.width = shelf.height = ACROSS * side;
  let next = 0;
  const corner = (slot) => [(slot % ACROSS) * side, Math.floor(slot / ACROSS) * side];

  function cut(i, place, image) {
    const [x, y] = corner(next);
    slots.delete(holder[next]);
    holder[next] = i;
    slots.set(i, next);
    next = (next + 1) % SLOTS;
    cutter.drawImage(image, place.column * side, place.row * side, side, side, x, y, side, side);
  }

  // The grid lies on the map and moves with it: who drags the map sees the same nuclei again.
  function chosen() {
    const { view } = plot, best = new Map(), reach = SIZE / view.scale;
    const x0 = plot.width / 2 - view.x * view.scale, y0 = plot.height / 2 + view.y * view.scale;
    const [left, low, right, high] = plot.bounds();
    DATA.within(left - reach, low - reach, right + reach, high + reach, (i, mx, my) => {
      if (!DATA.there[i] || !seen(i)) return;
      const x = mx * view.scale, y = -my * view.scale;
      const column = Math.floor(x / SIZE), row = Math.floor(y / SIZE), key = row * 65536 + column;
      const away = (x - (column + 0.5) * SIZE) ** 2 + (y - (row + 0.5) * SIZE) ** 2;
      const found = best.get(key);
      if (!found || away < found.away)
        best.set(key, { i, away, column, row });
    });
    // Whole px: a picture between two px is blurred.
    return Array.from(best.values(), ({ i, column, row }) => (
      { i, x: Math.round(x0 + column * SIZE) + 1, y: Math.round(y0 + row * SIZE) + 1 }));
  }

  // Cut what is missing, sheet by sheet, and only for a moment: the rest comes in the next frames.
  function fill(all) {
    const missing = all.filter((one) => !slots.has(one.i)).sort((a, b) => a.i - b.i);
    const until = performance.now() + 25;
    for (const { i } of missing) {
      if (performance.now() > until) { if (all.length < SLOTS) plot.draw(); return; }
      const place = SHEETS.at(i), image = SHEETS.image(place.sheet, () => plot.draw());
      if (image) cut(i, place, image);
    }
  }

  function draw(pen) {
    const all = chosen(), inner = SIZE - 6;
    fill(all); // before the shelf is drawn: each change after that would copy all of it
    for (const { i, x, y } of all) {
      pen.fillStyle = INK.css(INK.of(state.column, i));
      pen.fillRect(x, y, SIZE - 2, SIZE - 2);
      if (slots.has(i))
        pen.drawImage(shelf, ...corner(slots.get(i)), side, side, x + 2, y + 2, inner, inner);
    }
  }
  return { draw, has: (i) => slots.has(i), chosen };
})();

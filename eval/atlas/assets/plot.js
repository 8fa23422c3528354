// The map: dots by WebGL (a plain canvas where there is none), lines and rings on a canvas above.
class Plot {
  constructor(points, over) {
    this.points = points; this.over = over; this.pen = over.getContext("2d");
    this.colours = new Uint8Array(4 * DATA.n); // r, g, b, and 0 for dots that are hidden
    this.view = { x: 0.5, y: 0.5, scale: 1 };
    this.span = this.spread();
    this.fit = 1; this.waiting = false; this.fresh = true;
    this.above = () => {}; this.moved = () => {};
    const gl = points.getContext("webgl", { antialias: false, premultipliedAlpha: true });
    if (gl) {
      this.prepare(gl);
      points.addEventListener("webglcontextlost", (e) => e.preventDefault());
      points.addEventListener("webglcontextrestored", () => { this.prepare(gl); this.recolour(); });
    } else this.flat = points.getContext("2d");
    new ResizeObserver(() => this.resize()).observe(points);
    this.resize();
    this.whole();
  }

  prepare(gl) {
    this.gl = gl;
    const compile = (kind, text) => {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, text);
      gl.compileShader(shader);
      return shader;
    };
    const program = gl.createProgram();
    gl.attachShader(program, compile(gl.VERTEX_SHADER, `
      attribute vec2 place; attribute vec4 colour;
      uniform vec2 centre, stretch; uniform mediump float size; varying vec4 ink;
      void main() {
        // Hidden dots go outside of the picture.
        gl_Position = colour.a == 0.0 ? vec4(2.0) : vec4((place - centre) * stretch, 0.0, 1.0);
        gl_PointSize = size; ink = colour;
      }`));
    gl.attachShader(program, compile(gl.FRAGMENT_SHADER, `
      precision mediump float; varying vec4 ink; uniform mediump float size;
      void main() {
        float away = length(gl_PointCoord - 0.5) * size;
        float a = ink.a * clamp(size * 0.5 - away, 0.0, 1.0);
        gl_FragColor = vec4(ink.rgb * a, a);
      }`));
    gl.linkProgram(program);
    gl.useProgram(program);
    this.uniform = {};
    for (const name of ["centre", "stretch", "size"])
      this.uniform[name] = gl.getUniformLocation(program, name);
    const attach = (name, data, count, kind, normal) => {
      const buffer = gl.createBuffer(), at = gl.getAttribLocation(program, name);
      gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
      gl.bufferData(gl.ARRAY_BUFFER, data, gl.DYNAMIC_DRAW);
      gl.enableVertexAttribArray(at);
      gl.vertexAttribPointer(at, count, kind, normal, 0, 0);
      return buffer;
    };
    attach("place", DATA.xy, 2, gl.FLOAT, false);
    this.paint = attach("colour", this.colours, 4, gl.UNSIGNED_BYTE, true);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
  }

  // Width and height of the map, at most 1: all but single outliers lies in a box around (½, ½).
  spread() {
    const most = [0.05, 0.05];
    for (let k = 0; k < DATA.xy.length; k++)
      most[k % 2] = Math.max(most[k % 2], Math.min(1, 2 * Math.abs(DATA.xy[k] - 0.5)));
    return most;
  }

  recolour() { this.fresh = true; this.draw(); }

  resize() {
    const box = this.points.getBoundingClientRect(), before = this.fit;
    this.dpr = Math.min(2, window.devicePixelRatio || 1);
    this.width = Math.max(1, box.width); this.height = Math.max(1, box.height);
    for (const canvas of [this.points, this.over]) {
      canvas.width = Math.round(this.width * this.dpr);
      canvas.height = Math.round(this.height * this.dpr);
    }
    // Below the buttons, above the line of help.
    const [wide, high] = this.span;
    this.fit = Math.min((this.width - 40) / wide, Math.max(80, this.height - 100) / high);
    this.view.scale *= this.fit / before;
    this.draw();
  }

  whole() { this.view = { x: 0.5, y: 0.5, scale: this.fit }; this.draw(); }

  screen(i) {
    return [(DATA.xy[2 * i] - this.view.x) * this.view.scale + this.width / 2,
      this.height / 2 - (DATA.xy[2 * i + 1] - this.view.y) * this.view.scale];
  }
  map(sx, sy) {
    return [(sx - this.width / 2) / this.view.scale + this.view.x,
      (this.height / 2 - sy) / this.view.scale + this.view.y];
  }
  bounds() {
    const [x0, y1] = this.map(0, 0), [x1, y0] = this.map(this.width, this.height);
    return [x0, y0, x1, y1];
  }
  zoom(factor, sx = this.width / 2, sy = this.height / 2) {
    const [x, y] = this.map(sx, sy);
    this.view.scale = Math.max(this.fit / 3, Math.min(this.fit * 400, this.view.scale * factor));
    const [nx, ny] = this.map(sx, sy);
    this.shift(x - nx, y - ny);
  }
  shift(dx, dy) {
    const keep = (v) => Math.max(-0.5, Math.min(1.5, v));
    this.view.x = keep(this.view.x + dx); this.view.y = keep(this.view.y + dy);
    this.draw();
  }
  // Bring nuclei into view, without zooming in.
  reveal(rows) {
    const [x0, y0, x1, y1] = this.bounds(), place = DATA.xy;
    const seen = rows.every((i) => place[2 * i] > x0 && place[2 * i] < x1 &&
      place[2 * i + 1] > y0 && place[2 * i + 1] < y1);
    if (seen) return;
    this.view.x = place[2 * rows[0]]; this.view.y = place[2 * rows[0] + 1];
    this.draw();
  }

  // Diameter of a dot in px: smaller where there are many, larger when zoomed in.
  dot() {
    const base = Math.max(2.4, Math.min(8, 420 / Math.sqrt(DATA.n)));
    return Math.min(16, base * Math.max(1, this.view.scale / this.fit) ** 0.4);
  }

  draw() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      if (this.gl) this.drawDots(); else this.drawFlat();
      const pen = this.pen;
      pen.setTransform(this.dpr, 0, 0, this.dpr, 0, 0);
      pen.clearRect(0, 0, this.width, this.height);
      this.above(pen);
      this.moved();
    });
  }
  drawDots() {
    const { gl, view } = this;
    if (this.fresh) {
      gl.bindBuffer(gl.ARRAY_BUFFER, this.paint);
      gl.bufferData(gl.ARRAY_BUFFER, this.colours, gl.DYNAMIC_DRAW);
      this.fresh = false;
    }
    gl.viewport(0, 0, this.points.width, this.points.height);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    gl.uniform2f(this.uniform.centre, view.x, view.y);
    const twice = 2 * view.scale;
    gl.uniform2f(this.uniform.stretch, twice / this.width, twice / this.height);
    gl.uniform1f(this.uniform.size, this.dot() * this.dpr + 1);
    gl.drawArrays(gl.POINTS, 0, DATA.n);
  }
  drawFlat() {
    const pen = this.flat, side = this.dot(), c = this.colours;
    pen.setTransform(this.dpr, 0, 0, this.dpr, 0, 0);
    pen.clearRect(0, 0, this.width, this.height);
    let last = -1;
    DATA.within(...this.bounds(), (i) => {
      const at = 4 * i;
      if (!c[at + 3]) return;
      const key = (c[at] << 16) | (c[at + 1] << 8) | c[at + 2] | (c[at + 3] << 24);
      if (key !== last) {
        pen.fillStyle = `rgba(${c[at]},${c[at + 1]},${c[at + 2]},${c[at + 3] / 255})`;
        last = key;
      }
      const [sx, sy] = this.screen(i);
      pen.fillRect(sx - side / 2, sy - side / 2, side, side);
    });
  }
}

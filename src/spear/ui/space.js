"use strict";
// A small 3D view on a canvas: a camera that circles a point, lines, dots and words. Metres, z up.

class Space {
  constructor(canvas, changed) {
    this.canvas = canvas;
    this.pen = canvas.getContext("2d");
    Object.assign(this, { yaw: 0, pitch: 0.5, away: 1.05, target: [0.46, 0, 0.1] });
    const fingers = new Map();  // pointers that are down -> where; the mouse is one
    const apart = () => { const [a, b] = [...fingers.values()]; return Math.hypot(a[0] - b[0], a[1] - b[1]); };
    const zoom = by => { this.away = Math.min(6, Math.max(0.15, this.away * by)); };
    canvas.addEventListener("pointerdown", e => {
      if (fingers.size < 2) fingers.set(e.pointerId, [e.clientX, e.clientY]);
      canvas.setPointerCapture(e.pointerId);
    });
    for (const kind of ["pointerup", "pointercancel"])
      canvas.addEventListener(kind, e => { fingers.delete(e.pointerId); });
    canvas.addEventListener("pointermove", e => {
      const from = fingers.get(e.pointerId);
      if (!from) return;
      const before = fingers.size === 2 && apart();
      fingers.set(e.pointerId, [e.clientX, e.clientY]);
      if (before) zoom(before / Math.max(apart(), 1));
      else {
        this.yaw -= (e.clientX - from[0]) * 0.008;
        this.pitch = Math.min(1.5, Math.max(-0.1, this.pitch + (e.clientY - from[1]) * 0.008));
      }
      changed();
    });
    canvas.addEventListener("wheel", e => {
      e.preventDefault();
      zoom(Math.exp(e.deltaY * 0.001));
      changed();
    }, { passive: false });
  }

  // Look from the side that a point is on, a little to its right.
  lookFrom(point) {
    this.yaw = Math.atan2(point[1] - this.target[1], point[0] - this.target[0]) + 0.4;
  }

  // Show all of a path; without one, the simulator's table.
  frame(path) {
    if (path.length < 2 && !this.framed) return;
    this.framed = path.length > 1;
    const ends = f => [0, 1, 2].map(k => f(...path.map(p => p[k])));
    const low = ends(Math.min), high = ends(Math.max);
    this.target = this.framed ? add(low, add(high, low, -1), 0.5) : [0.46, 0, 0.1];
    this.away = this.framed ? Math.max(0.5, 1.6 * Math.hypot(...add(high, low, -1))) : 1.05;
  }

  clear() {
    fit(this.canvas);
    const { yaw, pitch, away, target } = this;
    const back = [Math.cos(pitch) * Math.cos(yaw), Math.cos(pitch) * Math.sin(yaw), Math.sin(pitch)];
    this.eye = add(target, back, away);
    this.right = [-Math.sin(yaw), Math.cos(yaw), 0];
    this.up = cross(back, this.right);
    this.forward = back.map(v => -v);
    this.focal = this.canvas.height * 1.25;
    this.taken = [];
    this.ground = getComputedStyle(this.canvas.parentElement).backgroundColor;
    this.pen.clearRect(0, 0, this.canvas.width, this.canvas.height);
  }

  // [x, y] in pixels of the canvas, or null behind the eye
  at(point) {
    const d = add(point, this.eye, -1), depth = dot(d, this.forward);
    if (depth < 0.02) return null;
    return [this.canvas.width / 2 + this.focal * dot(d, this.right) / depth,
      this.canvas.height / 2 - this.focal * dot(d, this.up) / depth];
  }

  line(points, color, width = 1, dash = []) {
    const pen = this.pen;
    pen.beginPath();
    let drawing = false;
    for (const p of points.map(q => this.at(q))) {
      if (p && drawing) pen.lineTo(...p); else if (p) pen.moveTo(...p);
      drawing = !!p;
    }
    Object.assign(pen, { strokeStyle: color, lineWidth: width * scale(), lineJoin: "round", lineCap: "round" });
    pen.setLineDash(dash.map(v => v * scale()));
    pen.stroke();
    pen.setLineDash([]);
  }

  dot(point, color, radius) {
    const p = this.at(point);
    if (!p) return;
    this.pen.beginPath();
    this.pen.arc(...p, radius * scale(), 0, 7);
    this.pen.fillStyle = color;
    this.pen.fill();
  }

  word(point, text, color) {
    const p = this.at(point);
    if (!p) return;
    Object.assign(this.pen, { fillStyle: color, font: `${12 * scale()}px system-ui, "DejaVu Sans", sans-serif`,
      textAlign: "center", textBaseline: "bottom", strokeStyle: this.ground, lineWidth: 4 * scale() });
    const wide = this.pen.measureText(text).width, x = p[0] - wide / 2;
    const y = free(this.taken, x, p[1] - 4 * scale(), wide, 14 * scale());
    this.pen.strokeText(text, p[0], y);
    this.pen.fillText(text, p[0], y);
  }

  wire(vertices, edges, color, width, dash) {
    for (const [a, b] of edges) this.line([vertices[a], vertices[b]], color, width, dash);
  }

  // A gripper: two fingers, as far apart as they are open, below a palm. Between the finger tips is `position`.
  gripper(position, rotation, opening, color, width) {
    const half = 0.008 + 0.04 * opening;
    const put = p => add(position, turn(rotation, p), 1);
    this.line([[0, -half, 0], [0, -half, 0.045], [0, half, 0.045], [0, half, 0]].map(put), color, width);
    this.line([[0, 0, 0.045], [0, 0, 0.085]].map(put), color, width);
  }
}

const scale = () => window.devicePixelRatio || 1;

// The height at which a word does not lie on those that are taken, of the same height: y, or else below them.
function free(taken, x, y, wide, tall) {
  const on = t => x < t.x + t.wide && t.x < x + wide && Math.abs(t.y - y) < tall;
  for (let hit; (hit = taken.find(on)); ) y = hit.y + tall + 1;
  taken.push({ x, y, wide });
  return y;
}

const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
const add = (a, b, k) => a.map((v, i) => v + k * b[i]);
const cross = (a, b) => [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];

// A vector turned by a unit quaternion (w, x, y, z).
function turn([w, x, y, z], v) {
  const t = cross([x, y, z], v).map(c => 2 * c);
  return add(add(v, t, w), cross([x, y, z], t), 1);
}

// From the camera's frame to the base frame; pose is [4][4].
const placed = (pose, p) => pose.slice(0, 3).map(row => dot(row, p) + row[3]);

// As many pixels as the screen has for it.
function fit(canvas) {
  const width = Math.round(canvas.clientWidth * scale()), height = Math.round(canvas.clientHeight * scale());
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
}

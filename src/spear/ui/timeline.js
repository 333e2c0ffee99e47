"use strict";
// An episode over time on a canvas: where the gripper was and how far open, with a cursor that follows the finger.

class Timeline {
  constructor(canvas, seek) {
    this.canvas = canvas;
    this.limit = 1;
    let held = false;
    const go = e => {
      const box = canvas.getBoundingClientRect();
      seek((e.clientX - box.left - EDGE) / (box.width - 2 * EDGE) * this.limit);
    };
    canvas.addEventListener("pointerdown", e => { held = true; canvas.setPointerCapture(e.pointerId); go(e); });
    canvas.addEventListener("pointermove", e => { if (held) go(e); });
    for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, () => { held = false; });
  }

  // track: { every, position [n][3], opening [n] }; marks: the steps at which SPEAR-VLM was asked.
  draw(track, shown, limit, marks) {
    const { canvas } = this, pen = canvas.getContext("2d"), k = scale();
    fit(canvas);
    this.limit = Math.max(1, limit);
    const { width, height } = canvas, across = step => EDGE * k + (width - 2 * EDGE * k) * step / this.limit;
    pen.clearRect(0, 0, width, height);
    const tall = height * 0.66, low = height - 8 * k, line = (values, down, style) => {
      Object.assign(pen, { strokeStyle: style, lineWidth: 1.8 * k, lineJoin: "round" });
      pen.setLineDash([]);
      pen.beginPath();
      values.forEach((v, i) => pen.lineTo(across(i * track.every), down(v)));
      pen.stroke();
    };
    const level = (y, dash) => {
      Object.assign(pen, { strokeStyle: color("line"), lineWidth: k });
      pen.setLineDash(dash);
      pen.beginPath();
      pen.moveTo(across(0), y);
      pen.lineTo(across(this.limit), y);
      pen.stroke();
    };
    for (const y of [tall, low]) level(y, []);
    const opening = v => low - (low - tall - 10 * k) * v;
    const all = track.position.flat();
    const least = Math.min(0, ...all), most = Math.max(0.4, ...all);
    const metres = v => tall - 6 * k - (tall - 14 * k) * (v - least) / (most - least);
    level(metres(0), [2 * k, 4 * k]);
    AXES.forEach((hue, i) => line(track.position.map(p => p[i]), metres, hue));
    Object.assign(pen, { fillStyle: color("soft"), font: `${11 * k}px system-ui, "DejaVu Sans", sans-serif`,
      textAlign: "right", textBaseline: "middle", strokeStyle: color("card"), lineWidth: 4 * k });
    pen.strokeText("0 m", across(this.limit), metres(0));
    pen.fillText("0 m", across(this.limit), metres(0));
    pen.globalAlpha = 0.16;
    if (track.opening.length > 1) {
      pen.beginPath();
      pen.moveTo(across(0), low);
      track.opening.forEach((v, i) => pen.lineTo(across(i * track.every), opening(v)));
      pen.lineTo(across((track.opening.length - 1) * track.every), low);
      pen.fillStyle = color("ink");
      pen.fill();
    }
    pen.globalAlpha = 1;
    line(track.opening, opening, color("soft"));
    pen.fillStyle = color("answer");
    for (const step of marks) {
      pen.beginPath();
      pen.arc(across(step), 5 * k, 3.4 * k, 0, 7);
      pen.fill();
    }
    Object.assign(pen, { strokeStyle: color("accent"), lineWidth: 2 * k });
    pen.beginPath();
    pen.moveTo(across(shown), 0);
    pen.lineTo(across(shown), height);
    pen.stroke();
  }
}

const EDGE = 8;  // pixels: half a slider's thumb, which moves above the same step
const AXES = ["#e0533d", "#2f9e5b", "#3b78e0"];  // x, y, z

"use strict";
// The server sends parts of a view. What belongs to a step is kept by step (memory.js); `view` is what is shown.

const $ = id => document.getElementById(id);
const view = { ...NOTHING, edges: [] };
const picture = new Image();
let socket = null, drawing = false, placedOnce = false, waiting = 0, playing = null, pictured = null;

const space = new Space($("space"), soon);
const timeline = new Timeline($("track"), seek);
const memory = new Memory();
picture.onload = soon;
window.addEventListener("resize", soon);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", soon);
connect();

function connect() {
  socket = new WebSocket(location.origin.replace(/^http/, "ws") + "/ui");
  socket.onopen = () => {
    link("up", "connected");
    Object.assign(memory, new Memory());  // the server begins anew
    if ($("follow").checked) follow();
  };
  socket.onmessage = e => show(JSON.parse(e.data));
  socket.onclose = e => {
    if ($("link").className === "link down")  // still: what the server says to it
      fetch("/ui").then(async r => r.status === 401 ? location.reload() : r.status === 503 && problem(await r.text()), () => {});
    link("down", "not connected: trying again");
    waiting = 0;
    if (e.code === 1009) problem(`that was larger than the ${(view.max_bytes / 2 ** 20).toFixed(0)} MiB that the server takes: spear serve --max-message-mib sets this limit`);
    view.running = false;
    buttons();
    setTimeout(connect, 2000);
  };
}

function link(kind, words) {
  $("link").className = "link " + kind;
  $("link").textContent = words;
}

// Ask the server for something; what it answers arrives as parts of the view.
function ask(what) {
  if (socket.readyState !== WebSocket.OPEN) return problem("not connected to the server");
  const bytes = what instanceof Blob;
  if (bytes && what.size > view.max_bytes)
    return problem(`this file has ${(what.size / 1e6).toFixed(1)} MB: send at most ${(view.max_bytes / 1e6).toFixed(0)} MB`);
  waiting += 1;
  socket.send(bytes ? what : JSON.stringify(what));
  link("up", "working …");
}

function show(part) {
  if ("problem" in part) {
    waiting = Math.max(0, waiting - 1);
    if (!waiting) link("up", "connected");
    if (part.problem) memory.failed();
    problem(part.problem);
  }
  if (part.film) return save(part.film);
  if ("source" in part) play(false);
  Object.assign(view, memory.keep(part));
  if ("families" in part) offer(part);
  if (part.camera?.pose && !placedOnce) {
    space.lookFrom(part.camera.pose.slice(0, 3).map(row => row[3]));
    placedOnce = true;
  }
  if ("source" in part) space.frame(part.track?.position ?? []);
  if ("family" in part) { $("family").value = part.family; $("seed").value = part.seed; }
  if (part.instruction) $("instruction").value = part.instruction;
  if ("default_fov" in part) $("fov").value = part.default_fov;
  if ("model" in part) $("model").textContent = part.model;
  shown();
}

// Everything that depends on the step.
function shown() {
  Object.assign(view, memory.at(memory.shown));
  if (view.images && view.images !== pictured) {
    pictured = view.images;
    picture.src = pictured.external;
    $("wrist").hidden = !pictured.wrist;
    if (pictured.wrist) $("wrist").src = pictured.wrist;
    $("camera").parentElement.style.aspectRatio = $("space").parentElement.style.aspectRatio =
      Math.min(2, Math.max(1.1, view.camera.aspect));
  }
  for (const stage of document.querySelectorAll(".stage")) stage.classList.toggle("late", view.late);
  $("answer").textContent = view.answer ? view.answer.text : "";
  found();
  belongs();
  status();
  buttons();
  soon();
  const wanted = memory.wants();
  if (wanted !== null && socket.readyState === WebSocket.OPEN) {
    memory.asked = wanted;
    ask({ do: "look", step: wanted });
  }
}

// ---- time -----------------------------------------------------------------------------------------------------------

function seek(step) {
  memory.shown = Math.min(memory.newest, Math.max(0, Math.round(step)));
  shown();
}

function play(on) {
  if (on && !playing && memory.shown >= memory.newest && !view.running) seek(0);
  clearTimeout(playing);
  playing = !on ? null : setTimeout(() => {
    if (memory.shown < memory.newest && memory.settled(memory.shown + 1)) seek(memory.shown + 1);
    play(memory.shown < memory.newest || !!view.running);
  }, 1000 / view.rate_hz);
  buttons();
}

function save(film) {
  const bytes = Uint8Array.from(atob(film.data), c => c.charCodeAt(0));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([bytes], { type: "video/mp4" }));
  link.download = film.name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

// The scenes, and the episodes of `spear serve --episodes`.
function offer({ families, episodes, episodes_in_all }) {
  $("family").replaceChildren(...families.map(f => new Option(f.replaceAll("_", " "), f)));
  $("episodes").hidden = !episodes;
  if (!episodes) return;
  const more = episodes_in_all - episodes.length, last = new Option(`… and ${more} more`);
  last.disabled = true;
  $("episode").replaceChildren(...episodes.map((title, i) => new Option(title, i)), ...(more ? [last] : []));
}

function problem(text) {
  $("problem").hidden = !text;
  $("problem").textContent = text || "";
}

function buttons() {
  const still = view.source !== "simulator", over = memory.over();
  $("run").textContent = view.running ? "Stop" : "Start";
  $("run").classList.toggle("stop", !!view.running);
  $("run").disabled = !view.running && (still || over);
  $("step").disabled = still || over || !!view.running;
  $("predict").disabled = !!view.running;
  $("fov-line").hidden = !still;
  $("truth").parentElement.hidden = $("follow").parentElement.hidden = still;
  $("time").hidden = !view.limit;
  $("play").textContent = playing ? "❚❚ Pause" : "▶ Play";
  $("play").disabled = !memory.newest;
  $("back").disabled = !memory.shown;
  $("on").disabled = memory.shown >= memory.newest;
}

const number = v => v.toFixed(3).replace("-", "−");

function status() {
  const words = view.source === "photo" ? ["photo"] : [`step ${view.step} of ${memory.limit(view.limit)}`, ...view.milestones];
  const told = view.told !== view.instruction && view.told, late = view.late && (memory.lost.has(view.step) ? "its picture cannot be shown" : "its picture is not here yet");
  words.push(...[told, late, view.outcome, view.recorded].filter(said => said));
  const g = view.gripper;
  $("readout").textContent = !g ? "" : `${(view.step / view.rate_hz).toFixed(1)} s`
    + ` · x ${number(g.position[0])}, y ${number(g.position[1])}, z ${number(g.position[2])} m · gripper ${(100 * g.opening).toFixed(0)} % open`;
  Object.assign($("scrub"), { max: memory.limit(view.limit) || 1, value: view.step });
  $("progress").textContent = words.join(" · ");
  $("progress").className = view.outcome === "success" ? "good" : view.outcome ? "bad" : "soft";
  const c = view.chunk;
  if (!c) return void ($("chunk").textContent = "none yet: Predict" + (view.source === "simulator" ? ", Step or Start" : ""));
  const n = c.positions.length - 1, ends = Math.hypot(...add(c.positions[n], c.positions[0], -1));
  const open = c.openings[n] > 0.5 ? "open" : "closed";
  const from = view.limit ? `from step ${c.step} · ` : "";
  $("chunk").textContent = `${from}${n} actions · ${(1000 * ends).toFixed(0)} mm, then ${open} · in ${c.ms.toFixed(0)} ms`;
}

// ---- what SPEAR-VLM said --------------------------------------------------------------------------------------------

function found() {
  const names = view.boxes.map(b => b.name), objects = view.objects || [];
  const chips = objects.map(name => chip(name, names.includes(name) ? "on" : "", [name]));
  if (objects.length > 1) chips.push(chip("all of them", "all", objects));
  $("objects").replaceChildren(...chips);
  $("answers").hidden = !view.boxes.length && !view.absent.length;
  const mm = v => v == null ? "–" : v.toFixed(0) + " mm", cell = text => Object.assign(document.createElement("td"), { textContent: text });
  const row = texts => { const made = document.createElement("tr"); made.append(...texts.map(cell)); return made; };
  $("answers").tHead.hidden = !view.boxes.length;
  $("answers").tBodies[0].replaceChildren(...view.boxes.map(b => {
    const middle = [0, 1, 2].map(k => b.vertices.reduce((sum, v) => sum + v[k], 0) / 8);
    return row([b.name, ...middle.map(number), mm(b.within_mm), mm(b.error_mm)]);
  }), ...view.absent.map(name => row([name + ": not found"])));
  $("asked").textContent = view.boxes.length
    ? `${view.boxes.length} ${view.boxes.length > 1 ? "boxes" : "box"} in ${(view.boxes_ms / 1000).toFixed(1)} s` : "";
}

// Of which picture the answers are, and in which frame their numbers.
function belongs() {
  const unit = view.unit === "metre" ? "meters" : "the model’s own units (no scale)";
  const frame = unit + " in the camera’s frame: x right, y down, z forward";
  const now = step => step === view.step ? "" : `, not of step ${view.step}, which is shown`;
  const of = step => view.source === "photo" ? "photo" : `step ${step}${now(step)}`;
  const unsure = view.measured ? "" : "; how sure they are was not measured";
  const within = view.boxes.some(b => b.within_mm !== null) ? "; 80 % of held-out coordinates are within ±" : unsure;
  const missed = view.absent.length ? `; of held-out things that are there ${(100 * view.measured.missed).toFixed(0)} % are not found` : "";
  $("belongs").textContent = of(view.boxes_step) + (view.boxes.length ? " · centers in " + frame + within : "") + missed;
  $("answer-of").textContent = view.answer ? `“${view.answer.question}” · ${of(view.answer.step)} · ${frame}${unsure}` : "";
}

function chip(text, kind, objects) {
  const button = Object.assign(document.createElement("button"), { textContent: text, className: kind });
  button.onclick = () => ask({ do: "boxes", objects, step: view.step });
  return button;
}

// ---- drawing ----------------------------------------------------------------------------------------------------------

function soon() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => { drawing = false; drawCamera(); drawSpace(); drawTime(); });
}

function drawTime() {
  if (view.limit) timeline.draw(memory.track, memory.shown, memory.limit(view.limit), memory.marks());
}

const color = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();

function drawCamera() {
  const canvas = $("camera"), pen = canvas.getContext("2d");
  fit(canvas);
  pen.clearRect(0, 0, canvas.width, canvas.height);
  if (!picture.naturalWidth) return;
  // the whole picture, never stretched
  const k = Math.min(canvas.width / picture.naturalWidth, canvas.height / picture.naturalHeight);
  const width = k * picture.naturalWidth, height = k * picture.naturalHeight;
  const left = (canvas.width - width) / 2, top = (canvas.height - height) / 2;
  pen.imageSmoothingQuality = "high";
  pen.drawImage(picture, left, top, width, height);
  const angle = Number($("fov").value);
  $("fov-value").textContent = angle.toFixed(1) + "°";
  const focal = height * (view.camera.focal ?? 0.5 / Math.tan(angle * Math.PI / 360));
  const at = ([x, y, z]) => z > 1e-3 ? [left + width / 2 + focal * x / z, top + height / 2 + focal * y / z] : null;
  pen.save();
  pen.beginPath();
  pen.rect(left, top, width, height);
  pen.clip();
  if ($("truth").checked)
    for (const t of view.things) wireframe(pen, t.vertices.map(at), color("truth"), 1.4, [5, 4]);
  const boxes = view.boxes.map(b => ({ ...b, corners: b.vertices.map(at) })), taken = [];
  for (const { step, corners } of boxes) {
    pen.globalAlpha = step === view.step ? 1 : 0.4;
    wireframe(pen, corners, "#000a", 4.5, []);
    wireframe(pen, corners, color("answer"), 2.2, []);
  }
  for (const { corners, ...b } of boxes) {
    pen.globalAlpha = b.step === view.step ? 1 : 0.75;  // words have to be read
    if (corners.every(c => c)) label(pen, b.name + (b.within_mm === null ? "" : ` ± ${b.within_mm.toFixed(0)} mm`), corners, canvas, taken);
  }
  pen.restore();
}

function wireframe(pen, corners, style, width, dash) {
  if (!corners.every(c => c)) return;
  Object.assign(pen, { strokeStyle: style, lineWidth: width * scale(), lineCap: "round" });
  pen.setLineDash(dash.map(v => v * scale()));
  pen.beginPath();
  for (const [a, b] of view.edges) { pen.moveTo(...corners[a]); pen.lineTo(...corners[b]); }
  pen.stroke();
  pen.setLineDash([]);
}

function label(pen, text, corners, canvas, taken) {
  pen.font = `600 ${13 * scale()}px system-ui, "DejaVu Sans", sans-serif`;
  const pad = 6 * scale(), tall = 20 * scale(), wide = pen.measureText(text).width + 2 * pad;
  const middle = corners.reduce((sum, c) => sum + c[0], 0) / 8;
  const x = Math.min(Math.max(middle - wide / 2, 0), canvas.width - wide);
  const y = free(taken, x, Math.max(Math.min(...corners.map(c => c[1])) - tall - 4 * scale(), 0), wide, tall);
  pen.fillStyle = color("answer");
  pen.beginPath();
  pen.roundRect(x, y, wide, tall, 5 * scale());
  pen.fill();
  Object.assign(pen, { fillStyle: "#1c1206", textAlign: "left", textBaseline: "middle" });
  pen.fillText(text, x + pad, y + tall / 2);
}

function drawSpace() {
  space.clear();
  const line = color("line"), soft = color("soft"), plan = color("accent"), names = [];
  for (let k = 0; k <= 8; k++) {
    space.line([[k / 10, -0.4, 0], [k / 10, 0.4, 0]], line);
    space.line([[0, k / 10 - 0.4, 0], [0.8, k / 10 - 0.4, 0]], line);
  }
  ["x", "y", "z"].forEach((name, k) => {
    const end = [0, 0, 0];
    end[k] = 0.12;
    space.line([[0, 0, 0], end], AXES[k], 2);
    space.word(end, name, AXES[k]);
  });
  if (view.camera?.pose) {
    const base = vertices => vertices.map(p => placed(view.camera.pose, p));
    for (const t of view.things) {
      const corners = base(t.vertices);
      space.wire(corners, view.edges, soft, 1);
      const top = corners.slice(0, 4).reduce((sum, p) => add(sum, p, 0.25), [0, 0, 0]);
      names.push([top, t.name]);
    }
    if (view.unit === "metre") for (const b of view.boxes) {
      space.pen.globalAlpha = b.step === view.step ? 1 : 0.4;
      space.wire(base(b.vertices), view.edges, color("answer"), 1.8);
      space.pen.globalAlpha = 1;
    }
  }
  if (view.arm?.length) {
    space.line(view.arm, color("robot"), 7);
    for (const joint of view.arm) space.dot(joint, color("robot"), 5);
    space.line([view.arm.at(-1), add(view.gripper.position, turn(view.gripper.rotation, [0, 0, 0.085]), 1)], color("robot"), 5);
  }
  const [past, future] = memory.paths();
  space.line(past, color("past"), 1.6, [2, 4]);
  space.pen.globalAlpha = 0.45;
  space.line(future, color("past"), 1.4);
  space.pen.globalAlpha = 1;
  if (view.gripper) space.gripper(view.gripper.position, view.gripper.rotation, view.gripper.opening, color("ink"), 2.6);
  if (view.chunk) drawChunk(view.chunk, plan);
  for (const [place, name] of names) space.word(place, name, soft);
}

function drawChunk(c, plan) {
  const last = c.positions.length - 1;
  space.line(c.positions, plan, 3);
  space.line([c.positions[last], [...c.positions[last].slice(0, 2), 0]], plan, 1, [3, 4]);
  for (let k = 1; k <= last; k++) {
    space.pen.globalAlpha = 0.35 + 0.65 * k / last;
    space.gripper(c.positions[k], c.rotations[k], c.openings[k], plan, 1.8);
    space.pen.globalAlpha = 1;
    space.dot(c.positions[k], plan, 3.6);
  }
}

// ---- what people do ---------------------------------------------------------------------------------------------------

const instruct = () => ask({ do: "instruct", text: $("instruction").value });
function follow() { ask({ do: "instruct", follow: $("follow").checked }); }
const reset = () => ask({ do: "reset", family: $("family").value, seed: Math.trunc(Number($("seed").value)) });

$("instruction").onchange = instruct;
$("instruction").onkeydown = e => { if (e.key === "Enter") { instruct(); ask({ do: "predict", step: view.step }); } };
$("run").onclick = () => { seek(memory.newest); ask({ do: view.running ? "stop" : "start" }); };
$("step").onclick = () => { seek(memory.newest); ask({ do: "step" }); };
$("predict").onclick = () => ask({ do: "predict", step: view.step });
$("reset").onclick = $("family").onchange = $("seed").onchange = reset;
$("open").onclick = () => $("file").click();
$("file").onchange = () => { if ($("file").files.length) ask($("file").files[0]); $("file").value = ""; };
$("truth").onchange = soon;
$("fov").oninput = soon;
$("follow").onchange = follow;
$("box-form").onsubmit = e => { e.preventDefault(); ask({ do: "boxes", objects: [$("object").value.trim()], step: view.step }); };
$("question-form").onsubmit = e => { e.preventDefault(); ask({ do: "question", text: $("question").value.trim(), step: view.step }); };
$("scrub").oninput = () => seek(Number($("scrub").value));
$("play").onclick = () => play(!playing);
$("back").onclick = () => seek(view.step - 1);
$("on").onclick = () => seek(view.step + 1);
$("film").onclick = () => ask({ do: "film" });
$("episode").onchange = $("replay").onclick = () => ask({ do: "open", episode: Number($("episode").value) });
const MOVES = { ArrowLeft: () => view.step - 1, ArrowRight: () => view.step + 1, Home: () => 0, End: () => memory.newest };
window.addEventListener("keydown", e => {
  const typing = e.target.matches("input:not([type=checkbox], #scrub), select, textarea");
  if (typing || !view.limit || e.ctrlKey || e.metaKey || e.altKey) return;
  if (e.key in MOVES) { e.preventDefault(); seek(MOVES[e.key]()); }
  if (e.key === " " && !e.target.matches("button, [type=checkbox]")) { e.preventDefault(); play(!playing); }
});
window.addEventListener("dragover", e => e.preventDefault());
window.addEventListener("drop", e => { e.preventDefault(); if (e.dataTransfer.files.length) ask(e.dataTransfer.files[0]); });

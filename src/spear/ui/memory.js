"use strict";
// What the page knows of each step of an episode: nothing that was seen is asked for twice, all of it is bounded.

const UNSEEN = { boxes: [], absent: [], boxes_ms: 0, answer: null, chunk: null, milestones: [], outcome: null,
  gripper: null, arm: [], things: [], told: null };
const NOTHING = { images: null, camera: null, ...UNSEEN };  // what belongs to a step; UNSEEN: but its picture
const MOST_PICTURES = 240;
const AHEAD = 4;  // steps whose pictures are fetched before they are shown

class Memory {
  constructor() {
    this.begin("");
    this.newest = 0;
  }

  // Forget all; what comes from now on is of this source.
  begin(source, track) {
    Object.assign(this, { moments: new Map(), pictures: [], lost: new Set(), shown: 0, asked: null, source });
    this.track = track ?? { every: 1, position: [], opening: [] };
  }

  // Keep what a part says of a step; gives the rest of it.
  keep(part) {
    if ("source" in part) {
      this.begin(part.source, part.track);
      this.newest = part.source === "simulator" ? 0 : part.limit;
    }
    const rest = Object.fromEntries(Object.entries(part).filter(([key]) => !(key in NOTHING) && key !== "step"));
    if (!("step" in part)) return rest;
    const { step } = part, own = this.of(step), live = this.shown === this.newest;
    for (const key in part) if (key in NOTHING && key !== "chunk") own[key] = part[key];
    if (part.chunk) this.of(part.chunk.step).chunk = part.chunk;
    if (step === this.asked) this.asked = null;
    if (part.images) this.bound(step);
    if (this.source === "simulator" && part.gripper && step === this.track.position.length) {
      this.track.position.push(part.gripper.position);
      this.track.opening.push(part.gripper.opening);
    }
    if (step > this.newest) { this.newest = step; if (live) this.shown = step; }
    return rest;
  }

  of(step) {
    if (!this.moments.has(step)) this.moments.set(step, {});
    return this.moments.get(step);
  }

  // Something went wrong: perhaps the picture that was asked for. If not it still comes; asked for again, it would fail for ever.
  failed() { this.lost.add(this.asked); this.asked = null; }

  has(step) { return !!this.moments.get(step)?.images; }
  settled(step) { return this.has(step) || this.lost.has(step); }
  over() { return this.source === "simulator" && !!this.moments.get(this.newest)?.outcome; }

  // The last step that there can be.
  limit(most) { return this.over() ? this.newest : most || 0; }

  bound(step) {
    this.pictures = [...this.pictures.filter(s => s !== step), step];
    if (this.pictures.length > MOST_PICTURES) delete this.of(this.pictures.shift()).images;
  }

  // All of a step. Chunk, boxes and answer are its own, or else the last before it; boxes_step, chunk and answer name theirs.
  // While its pictures are on their way (`late`), those shown stay.
  at(step) {
    const own = this.moments.get(step) ?? {}, late = !own.images;
    const last = known => {
      for (let k = step; k >= 0; k--) if (known(this.moments.get(k) ?? {})) return { ...UNSEEN, ...this.moments.get(k), boxes_step: k };
      return UNSEEN;
    };
    const { boxes, absent, boxes_ms, boxes_step } = last(m => m.boxes?.length || m.absent?.length);
    const { answer } = last(m => m.answer), { chunk } = last(m => m.chunk);
    return { ...(late ? UNSEEN : NOTHING), ...own, late, boxes, absent, boxes_ms, boxes_step, answer, chunk, step };
  }

  // The step whose pictures to ask for next, null for none.
  wants() {
    if (this.asked !== null || !this.moments.size) return null;
    for (let k = this.shown; k <= Math.min(this.newest, this.shown + AHEAD); k++) if (!this.settled(k)) return k;
    return null;
  }

  // The steps at which SPEAR-VLM was asked.
  marks() {
    return [...this.moments].filter(([, m]) => m.boxes?.length || m.absent?.length || m.answer).map(([step]) => step);
  }

  // The gripper's path until the step that is shown, and after it.
  paths() {
    const here = Math.floor(this.shown / this.track.every) + 1;
    return [this.track.position.slice(0, here), this.track.position.slice(here - 1)];
  }
}

/** One of the two figures: its picture, its progress, its times and its strip. */

import { fillStrip, grouped, haveOneOrder, summary } from "./strip.js";

const SMALL = 256;
const TICK = 100;
const SHORTEST_TIME = 0.0005;

/** Names of the server's times, in the order in which they are shown, each with the segment that it has in the bar. */
const TIMES = {
  queue: ["in the queue", null],
  encode: ["text", "other"],
  planning: ["planning", "planning"],
  hand_off: ["hand-off", "other"],
  fidelity: ["fidelity", "fidelity"],
  reuse: ["reuse", "reuse"],
  forecast: ["forecast", "forecast"],
  decode: ["decoding", "other"],
  previews: ["partial pictures", "other"],
};

/** What came of one request: the picture and what it took. */
export function resultOf(event, elapsed) {
  const usage = { ...event.usage, ...event.usage?.tgate };
  const seconds = usage.seconds ?? {};
  const counts = usage.steps ?? {};
  const actions = Array.isArray(usage.actions) ? usage.actions.map((action) => action.phase) : null;
  return {
    picture: addressOf(event),
    kind: event.output_format ?? "png",
    seed: event.seed ?? usage.seed,
    seconds,
    isServersTime: Number.isFinite(seconds.total),
    time: Number.isFinite(seconds.total) ? Math.max(0, seconds.total - (seconds.queue ?? 0)) : elapsed,
    phases: actions ?? grouped(counts),
    isOrdered: actions !== null || haveOneOrder(counts),
  };
}

function addressOf(event) {
  return `data:image/${event.output_format ?? "png"};base64,${event.b64_json}`;
}

/** Seconds as people read them. */
export function inSeconds(seconds) {
  const digits = seconds < 0.1 ? 3 : seconds < 10 ? 2 : 1;
  return `${seconds.toFixed(digits)} s`;
}

export class Side {
  #title;
  #figure;
  #phases = [];
  #previews = 0;
  #timer = 0;
  #prompt = "";
  #isWaiting = false;

  /** Adds a figure to a place of the page. */
  constructor(place, title) {
    this.#title = title;
    const copy = document.getElementById("side").content.cloneNode(true);
    this.#figure = copy.querySelector("figure");
    const heading = this.#part("h3");
    heading.textContent = title;
    heading.id = `title-${place.children.length}`;
    this.#figure.setAttribute("aria-labelledby", heading.id);
    this.#part("progress").setAttribute("aria-label", `Progress of ${title}`);
    this.#part("img").addEventListener("load", (event) => {
      event.target.classList.toggle("small", event.target.naturalWidth < SMALL);
    });
    place.append(copy);
  }

  /** The shape of the pictures to come. */
  set ratio({ width, height }) {
    this.#part(".frame").style.aspectRatio = `${width} / ${height}`;
  }

  /** Empties the figure before its turn. */
  clear(prompt, phases, previews) {
    clearInterval(this.#timer);
    this.#prompt = prompt;
    this.#phases = phases;
    this.#previews = previews;
    this.#showPicture(null);
    this.#part("progress").value = 0;
    this.#part("progress").max = previews + 1;
    this.#part(".time").textContent = "";
    this.#part(".times").replaceChildren();
    this.#part(".bar").replaceChildren();
    this.#part(".save").hidden = true;
    this.#showStrip(phases, 0, true);
    this.state = "waits for its turn";
    this.#isWaiting = true;
  }

  /** Ends the wait for a turn that does not come. */
  skip() {
    if (this.#isWaiting) {
      this.stop("not drawn");
    }
  }

  /** Begins to count the time. */
  start() {
    const begin = performance.now();
    this.#isWaiting = false;
    this.state = "draws";
    this.#timer = setInterval(() => {
      this.#part(".time").textContent = `${((performance.now() - begin) / 1000).toFixed(1)} s`;
    }, TICK);
  }

  /** Shows a picture that is not finished. */
  partial(event) {
    const number = event.partial_image_index + 1;
    this.#showPicture(addressOf(event), "not finished");
    this.#part("progress").value = Math.min(number, this.#previews);
    const reached = event.step ?? Math.round((number * this.#phases.length) / (this.#previews + 1));
    this.#showStrip(this.#phases, reached, true);
    this.state = `draws: partial picture ${number} of ${this.#previews}`;
  }

  /** Shows a finished picture; bars of both figures share one scale, the longer of the two times. */
  finish(prompt, result, longest, share = NaN) {
    clearInterval(this.#timer);
    this.#prompt = prompt;
    this.#showPicture(result.picture);
    this.#part("progress").max = 1;
    this.#part("progress").value = 1;
    this.#part(".time").textContent = inSeconds(result.time) + (Number.isFinite(share) ? ` (${share.toFixed(2)} of vanilla’s)` : "");
    this.#showStrip(result.phases.length ? result.phases : this.#phases, undefined, result.isOrdered);
    this.#showTimes(result, longest);
    this.#showSave(result);
    this.state = result.isServersTime ? "done; the server’s time, without the queue" : "done; time as this page measured it";
  }

  /** Ends without a picture; what has come so far stays. */
  stop(reason) {
    clearInterval(this.#timer);
    this.#isWaiting = false;
    this.#part(".time").textContent = "";
    this.state = reason;
  }

  set state(text) {
    this.#part(".state").textContent = text[0].toUpperCase() + text.slice(1);
  }

  #part(selector) {
    return this.#figure.querySelector(selector);
  }

  #showPicture(address, remark = "") {
    const image = this.#part("img");
    image.hidden = address === null;
    this.#part(".empty").hidden = address !== null;
    image.alt = [this.#title, this.#prompt, remark].filter(Boolean).join(", ");
    if (address === null) {
      image.removeAttribute("src");
    } else {
      image.src = address;
    }
  }

  #showStrip(phases, reached, isOrdered) {
    const strip = this.#part(".strip");
    fillStrip(strip, phases, reached);
    strip.setAttribute("aria-label", `Steps of ${this.#title}: ${summary(phases)}`);
    this.#part(".strip-note").hidden = isOrdered;
  }

  #showTimes(result, longest) {
    const shown = Object.entries(TIMES).filter(([name]) => result.seconds[name] >= SHORTEST_TIME);
    this.#part(".times").replaceChildren(...shown.flatMap(([name, [words]]) => entry(words, inSeconds(result.seconds[name]))));
    const segments = shown.filter(([, [, kind]]) => kind !== null);
    const bars = segments.map(([name, [, kind]]) => segment(kind, result.seconds[name] / longest));
    this.#part(".bar").replaceChildren(...bars);
  }

  #showSave(result) {
    const link = this.#part(".save a");
    link.href = result.picture;
    link.download = `${this.#title.toLowerCase()}-${result.seed ?? "picture"}.${result.kind}`;
    link.textContent = `Save ${this.#title}’s picture`;
    this.#part(".save").hidden = false;
  }
}

function entry(words, value) {
  const group = document.createElement("div");
  const term = document.createElement("dt");
  const description = document.createElement("dd");
  term.textContent = words;
  description.textContent = value;
  group.append(term, description);
  return [group];
}

function segment(kind, share) {
  const part = document.createElement("span");
  part.className = `segment ${kind}`;
  part.style.width = `${100 * Math.min(1, share)}%`;
  return part;
}

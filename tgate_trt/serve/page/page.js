/** The page: reads the form, draws vanilla and gated, and keeps what was drawn. */

import { draw, fetchModels, isAbort, Problem } from "./client.js";
import { inSeconds, resultOf, Side } from "./side.js";
import { fillLegend, fillStrip, planOf } from "./strip.js";

const PREVIEWS = 3;
const LONGEST_HISTORY = 6;
const LARGEST_RANDOM_SEED = 2 ** 31;
const DEFAULT_SHARE = 0.4;

/** Prompts for the demo model, where a server suggests none. */
const DEMO_PROMPTS = [
  "a small red circle at the top left on a blue background",
  "a large yellow square at the top left on a green background",
  "a large blue triangle at the center on a black background",
  "a small purple cross at the top left on a black background",
];

/** The control of each field of a request. */
const CONTROLS = {
  model: "model",
  prompt: "prompt",
  seed: "seed",
  num_inference_steps: "steps",
  guidance_scale: "guidance",
  negative_prompt: "negative",
  after_gate: "after-gate",
  gate: "whole-gate",
};

const at = (id) => document.getElementById(id);

const vanilla = new Side(at("pair"), "Vanilla");
const gated = new Side(at("pair"), "T-GATE");
const models = new Map();
const earlier = [];
let running = null;

begin();

function begin() {
  fillLegend(at("legend"));
  at("form").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  at("form").addEventListener("invalid", (event) => reveal(event.target), { capture: true });
  at("form").addEventListener("input", (event) => unmark(event.target));
  at("prompt").addEventListener("keydown", submitOnControlEnter);
  at("cancel").addEventListener("click", () => running?.abort());
  at("die").addEventListener("click", throwDie);
  at("model").addEventListener("change", takeModel);
  at("key").addEventListener("change", loadModels);
  at("steps").addEventListener("change", boundGate);
  for (const id of ["gate", "steps", "whole-gate"]) {
    at(id).addEventListener("input", showGate);
  }
  showGate();
  loadModels();
}

/* Models and the form. */

async function loadModels() {
  if (!at("key").checkValidity()) {
    return;
  }
  try {
    const found = await fetchModels(at("key").value);
    models.clear();
    found.forEach((model) => models.set(model.id, model));
    at("model").replaceChildren(...found.map((model) => new Option(model.id, model.id)));
    at("model-field").hidden = found.length === 0;
    clearProblem();
    takeModel();
  } catch (error) {
    at("model-field").hidden = models.size === 0;
    showProblem(error);
  }
}

/** What a model says of itself, wherever in its description. */
function aboutModel() {
  const model = models.get(at("model").value) ?? {};
  const more = { ...model, ...model.tgate };
  const [width, height] = more.width && more.height ? [more.width, more.height] : sizeOf(more.size);
  return {
    id: model.id,
    width,
    height,
    steps: more.default_steps ?? more.steps ?? 25,
    guidance: more.guidance_scale,
    gate: String(more.default_gate ?? more.gate ?? ""),
    gates: more.gates ?? [],
    prompts: more.prompts ?? (model.id?.startsWith("shapes") ? DEMO_PROMPTS : []),
  };
}

function sizeOf(text) {
  const found = /^(\d+)x(\d+)$/.exec(text ?? "");
  return found ? [Number(found[1]), Number(found[2])] : [1, 1];
}

/** Gives the form a model's own values. */
function takeModel() {
  const model = aboutModel();
  at("steps").value = model.steps;
  at("gate").max = model.steps;
  at("gate").value = gateIn(model.gate, model.steps);
  at("guidance").placeholder = Number.isFinite(model.guidance) ? `model’s own, ${model.guidance}` : "model’s own";
  const names = [...new Set([model.gate, ...model.gates])].filter(Boolean);
  at("gates").replaceChildren(...names.map((name) => new Option(name)));
  at("suggestions").replaceChildren(...model.prompts.map(suggestion));
  at("suggestions").hidden = model.prompts.length === 0;
  vanilla.ratio = model;
  gated.ratio = model;
  if (!at("prompt").value && model.prompts.length) {
    at("prompt").value = model.prompts[0];
  }
  showGate();
}

/** The number of planning steps that a text names, or the usual share of the steps. */
function gateIn(text, steps) {
  return stepsBefore(text, steps) ?? Math.max(1, Math.round(DEFAULT_SHARE * steps));
}

/** How many planning steps a gate's text means; null if only the server can find out. */
function stepsBefore(text, steps) {
  if (!/^\d*\.?\d+$/.test(text)) {
    return null;
  }
  const number = Number(text);
  const count = text.includes(".") ? Math.round(number * steps) : number;
  return Math.min(Math.max(1, count), steps);
}

function suggestion(prompt) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "suggestion";
  button.textContent = prompt;
  button.addEventListener("click", () => {
    at("prompt").value = prompt;
    unmark(at("prompt"));
  });
  return button;
}

function submitOnControlEnter(event) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    at("form").requestSubmit();
  }
}

function throwDie() {
  at("seed").value = crypto.getRandomValues(new Uint32Array(1))[0] % LARGEST_RANDOM_SEED;
  at("seed-spoken").textContent = `Seed ${at("seed").value}`;
}

function boundGate() {
  if (at("steps").validity.valid) {
    at("gate").max = at("steps").value;
    showGate();
  }
}

/** Shows and speaks the gate. */
function showGate() {
  const steps = Number(at("gate").max);
  const gate = at("gate").valueAsNumber;
  const text = at("whole-gate").value.trim();
  at("gate").disabled = text !== "";
  at("gate-output").textContent = text ? `“${text}”, of the text below` : `${gate} of ${steps}`;
  at("gate").setAttribute("aria-valuetext", inWords(gate, steps));
  const before = text ? stepsBefore(text, steps) : gate;
  fillStrip(at("plan"), before === null ? [] : planOf(steps, before));
}

function inWords(gate, steps) {
  const after = steps - gate;
  return `${gate} of ${steps}: ${counted(gate, "planning step")}, then ${counted(after, "fidelity step")}`;
}

function counted(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

function readForm() {
  const steps = at("steps").valueAsNumber;
  return {
    model: models.has(at("model").value) ? at("model").value : null,
    prompt: at("prompt").value.trim(),
    negative: at("negative").value.trim(),
    seed: at("seed").valueAsNumber,
    steps,
    guidance: at("guidance").value === "" ? null : at("guidance").valueAsNumber,
    gate: at("whole-gate").value.trim() || at("gate").value,
    isSlider: at("whole-gate").value.trim() === "",
    afterGate: at("after-gate").value,
    together: at("together").checked,
  };
}

function writeForm(settings) {
  if (settings.model && settings.model !== at("model").value) {
    at("model").value = settings.model;
    takeModel();
  }
  at("prompt").value = settings.prompt;
  at("negative").value = settings.negative;
  at("seed").value = settings.seed;
  at("steps").value = settings.steps;
  at("gate").max = settings.steps;
  at("guidance").value = settings.guidance ?? "";
  at("whole-gate").value = settings.isSlider ? "" : settings.gate;
  if (settings.isSlider) {
    at("gate").value = settings.gate;
  }
  at("after-gate").value = settings.afterGate;
  at("together").checked = settings.together;
  showGate();
}

/* Drawing. */

async function run() {
  if (running) {
    return;
  }
  const settings = readForm();
  running = new AbortController();
  setRunning(true);
  clearProblem();
  at("status").textContent = `Drawing vanilla and T-GATE with gate ${settings.gate}${settings.together ? ", both at once" : ""}.`;
  clearSides(settings);
  bringIntoSight();
  try {
    const pair = await drawPair(settings, at("key").value, running.signal);
    showPair(settings, pair);
    remember(settings, pair);
    at("status").textContent = `Done. ${comparison(settings, pair)}`;
  } catch (error) {
    ended(error);
  } finally {
    running = null;
    setRunning(false);
  }
}

/** Scrolls to the pictures where they lie below the form. */
function bringIntoSight() {
  if (at("pair").getBoundingClientRect().top > 0.6 * window.innerHeight) {
    at("pictures").scrollIntoView({ block: "start" });
  }
}

function clearSides(settings) {
  const before = stepsBefore(settings.gate, settings.steps);
  vanilla.clear(settings.prompt, planOf(settings.steps, settings.steps), PREVIEWS);
  gated.clear(settings.prompt, before === null ? [] : planOf(settings.steps, before), PREVIEWS);
}

/** Draws both. Where they are drawn at once and one fails, the other still comes to its end. */
async function drawPair(settings, key, signal) {
  const one = () => drawSide(vanilla, bodyOf(settings, { gate: "none" }), settings, key, signal);
  const other = () => drawSide(gated, bodyOf(settings, { gate: settings.gate, after_gate: settings.afterGate }), settings, key, signal);
  if (!settings.together) {
    const first = await one();
    return { vanilla: first, gated: await other() };
  }
  const [first, second] = await Promise.allSettled([one(), other()]);
  const failed = [first, second].find(({ status }) => status === "rejected");
  if (failed) {
    throw failed.reason;
  }
  return { vanilla: first.value, gated: second.value };
}

function bodyOf(settings, gate) {
  const body = {
    model: settings.model,
    prompt: settings.prompt,
    n: 1,
    stream: true,
    partial_images: PREVIEWS,
    seed: settings.seed,
    negative_prompt: settings.negative || null,
    num_inference_steps: settings.steps,
    guidance_scale: settings.guidance,
    ...gate,
  };
  return Object.fromEntries(Object.entries(body).filter(([, value]) => value !== null));
}

async function drawSide(side, body, settings, key, signal) {
  const begin = performance.now();
  side.start();
  try {
    for await (const event of draw(body, key, signal)) {
      if (event.type.endsWith(".partial_image")) {
        side.partial(event);
      } else if (event.type.endsWith(".completed")) {
        const result = resultOf(event, (performance.now() - begin) / 1000);
        side.finish(settings.prompt, result, result.time);
        return result;
      }
    }
  } catch (error) {
    side.stop(isAbort(error) ? "cancelled" : "failed");
    throw error;
  }
  throw new Problem("The server’s answer holds no picture.");
}

/** Shows a whole pair, with bars on one scale. */
function showPair(settings, pair) {
  const longest = Math.max(pair.vanilla.time, pair.gated.time);
  vanilla.finish(settings.prompt, pair.vanilla, longest);
  gated.finish(settings.prompt, pair.gated, longest, shareOf(pair));
}

function comparison(settings, pair) {
  const share = shareOf(pair);
  const ratio = Number.isFinite(share) ? `: ${share.toFixed(2)} of vanilla’s time` : "";
  const remark = settings.together ? " They were drawn at once, so their times depend on each other." : "";
  return `Vanilla took ${inSeconds(pair.vanilla.time)}, T-GATE ${inSeconds(pair.gated.time)}${ratio}.${remark}`;
}

function shareOf(pair) {
  return pair.gated.time / pair.vanilla.time;
}

function ended(error) {
  gated.skip();
  at("status").textContent = "";
  if (isAbort(error)) {
    at("status").textContent = "Cancelled.";
  } else {
    showProblem(error);
  }
}

function setRunning(isRunning) {
  const hadFocus = document.activeElement === at("cancel");
  at("draw").setAttribute("aria-disabled", String(isRunning));
  at("cancel").disabled = !isRunning;
  for (const button of at("history-list").querySelectorAll("button")) {
    button.setAttribute("aria-disabled", String(isRunning));
  }
  if (!isRunning && hadFocus) {
    at("draw").focus();
  }
}

/* Problems. */

/** Shows an error once: at the control that it is about, or else above the pictures. */
function showProblem(error) {
  const control = controlOf(error);
  const place = control?.closest(".field") ?? at("place-of-alert");
  place.append(at("alert"));
  if (control) {
    reveal(control);
    control.setAttribute("aria-invalid", "true");
    control.setAttribute("aria-errormessage", "alert");
    control.focus();
  }
  const paragraph = document.createElement("p");
  paragraph.className = "problem";
  paragraph.textContent = error instanceof Problem ? error.message : `The page failed: ${error.message}`;
  at("alert").replaceChildren(paragraph);
}

function clearProblem() {
  at("alert").replaceChildren();
  document.querySelectorAll("[aria-invalid]").forEach(unmark);
}

function controlOf(error) {
  if (error.needsKey) {
    return at("key");
  }
  if (error.field === "gate" && at("whole-gate").value.trim() === "") {
    return at("gate");
  }
  const control = at(CONTROLS[error.field]);
  return control?.closest("[hidden]") ? null : control;
}

function unmark(control) {
  control.removeAttribute("aria-invalid");
  control.removeAttribute("aria-errormessage");
}

/** Opens what hides a control. */
function reveal(control) {
  const hiding = control.closest("details");
  if (hiding) {
    hiding.open = true;
  }
}

/* Earlier pairs. */

function remember(settings, pair) {
  earlier.unshift({ settings, pair });
  earlier.length = Math.min(earlier.length, LONGEST_HISTORY);
  at("history-list").replaceChildren(...earlier.map(entry));
  at("history").hidden = false;
}

function entry(kept) {
  const { settings, pair } = kept;
  const item = document.createElement("li");
  const button = document.createElement("button");
  const words = span("words", "");
  const about = `Seed ${settings.seed}, gate ${settings.gate} of ${settings.steps} steps: ${shareOf(pair).toFixed(2)} of vanilla’s time`;
  words.append(span("prompt", settings.prompt), " ", span("about", about));
  button.type = "button";
  button.append(thumbnail(pair.vanilla), thumbnail(pair.gated), words);
  button.addEventListener("click", () => showAgain(kept));
  item.append(button);
  return item;
}

function span(name, text) {
  const made = document.createElement("span");
  made.className = name;
  made.textContent = text;
  return made;
}

function thumbnail(result) {
  const image = new Image(48, 48);
  image.src = result.picture;
  image.alt = "";
  return image;
}

function showAgain({ settings, pair }) {
  if (running) {
    return;
  }
  clearProblem();
  writeForm(settings);
  showPair(settings, pair);
  at("status").textContent = `An earlier pair. ${comparison(settings, pair)}`;
}

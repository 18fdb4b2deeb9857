/** A run as a strip: one cell for each step, with a colour and a letter for its phase. */

const PHASES = {
  planning: { letter: "P", text: "the whole model, with text and guidance" },
  fidelity: { letter: "F", text: "cross-attention from the cache, no guidance" },
  reuse: { letter: "R", text: "more features from an earlier step" },
  forecast: { letter: "~", text: "predicted without the model" },
};
const UNKNOWN = { letter: "?", text: "another phase" };

const LONGEST_ROW = 25;

/** The phases of a run with a gate after some of its steps. */
export function planOf(steps, gate) {
  return Array.from({ length: steps }, (_, step) => (step < gate ? "planning" : "fidelity"));
}

/** The phases of a run of which only counts are known. */
export function grouped(counts) {
  return Object.entries(counts).flatMap(([phase, count]) => Array.from({ length: count }, () => phase));
}

/** Whether counts leave one order alone: planning comes before fidelity, and other phases come anywhere. */
export function haveOneOrder(counts) {
  const phases = Object.keys(counts).filter((phase) => counts[phase] > 0);
  return phases.length < 2 || phases.every((phase) => phase === "planning" || phase === "fidelity");
}

/** In words: "10 planning, 15 fidelity". */
export function summary(phases) {
  const counts = new Map();
  for (const phase of phases) {
    counts.set(phase, (counts.get(phase) ?? 0) + 1);
  }
  return [...counts].map(([phase, count]) => `${count} ${phase}`).join(", ");
}

/** Fills a list with one cell a step; those after `reached` are hollow. */
export function fillStrip(list, phases, reached = phases.length) {
  const rows = Math.max(1, Math.ceil(phases.length / LONGEST_ROW));
  list.style.setProperty("--columns", Math.ceil(phases.length / rows) || 1);
  list.replaceChildren(...phases.map((phase, index) => cell(phase, `Step ${index + 1}: ${phase}`, index < reached)));
  list.hidden = phases.length === 0;
}

export function fillLegend(list) {
  const items = Object.entries(PHASES).map(([phase, { text }]) => {
    const item = document.createElement("li");
    const words = document.createElement("span");
    const name = document.createElement("b");
    name.textContent = phase;
    words.append(name, `: ${text}`);
    item.append(letter(phase, true), words);
    return item;
  });
  list.replaceChildren(...items);
}

function cell(phase, text, isReached) {
  const item = document.createElement("li");
  const words = document.createElement("span");
  words.className = "for-screen-readers";
  words.textContent = text;
  item.append(letter(phase, isReached), words);
  return item;
}

function letter(phase, isReached) {
  const sign = document.createElement("span");
  sign.className = `cell ${phase in PHASES ? phase : "unknown"}${isReached ? "" : " hollow"}`;
  sign.setAttribute("aria-hidden", "true");
  sign.textContent = (PHASES[phase] ?? UNKNOWN).letter;
  return sign;
}

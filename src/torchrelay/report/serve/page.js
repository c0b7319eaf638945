"use strict";
// Whatever a file, a class or an answer is called is shown as text, never as HTML.

const $ = (id) => document.getElementById(id);
const MOST_CARDS = 40;
const AT_ONCE = 2;
const STOPS = [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]]; // dark to bright: read without hues, too
const PALETTE = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999"];
let model = null;
const waiting = [];
let running = 0;

const percent = (share) => {
  if (share > 0.9995 && share < 1) return ">99.9%";
  return share < 0.0005 && share > 0 ? "<0.1%" : `${(100 * share).toFixed(1)}%`;
};
const visible = (name) => ({ " ": "␣ space", "\n": "⏎ line break", "\t": "⇥ tab", "": "(no name)" })[name] ?? name;

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// ------------------------------------------------------------------------------------------------ asking

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The server doesn't answer. Is it still running?");
  }
  const found = await answer.json().catch(() => null);
  if (!answer.ok || found === null) throw new Error(sentence(found?.error ?? `the server answered ${answer.status}`));
  return found;
}

const sentence = (text) => `${text.charAt(0).toUpperCase()}${text.slice(1)}.`;

function say(text) {
  $("status").textContent = text;
}

function complain(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

// ------------------------------------------------------------------------------------------------ pictures

function send(files) {
  complain("");
  const pictures = [...files];
  if (!pictures.length) return;
  for (const file of pictures) waiting.push({ file, card: newCard(file.name || "picture", file) });
  next();
}

function next() {
  while (running < AT_ONCE && waiting.length) {
    const { file, card } = waiting.shift();
    running += 1;
    predict(file, card).finally(() => {
      running -= 1;
      next();
    });
  }
}

async function predict(file, card, about = null) {
  const query = new URLSearchParams({ top: 8 });
  if (model.heatmaps) query.set("heatmap", 1);
  if (about !== null) query.set("class", about);
  try {
    if (file.size > model.limits.bytes) throw new Error(`The file is larger than ${model.limits.bytes / 1e6} MB, the most that is accepted.`);
    const headers = { "Content-Type": "application/octet-stream" };
    const found = await ask(`/predict?${query}`, { method: "POST", body: file, headers });
    show(card, found.answers[0], (name) => predict(file, card, name));
    if (about === null) say(`${card.dataset.name}: ${card.querySelector(".verdict").textContent}`);
  } catch (error) {
    fail(card, error);
  }
}

function newCard(name, file) {
  const card = $("card").content.firstElementChild.cloneNode(true);
  card.dataset.name = name;
  card.querySelector("h3").textContent = name;
  const verdict = card.querySelector(".verdict");
  verdict.textContent = "Waiting for the answer…";
  verdict.classList.add("wait");
  if (file) showPicture(card, file);
  else card.classList.add("plain");
  $("bar").hidden = false;
  $("results").prepend(card);
  while ($("results").children.length > MOST_CARDS) remove($("results").lastElementChild);
  return card;
}

function showPicture(card, file) {
  const image = card.querySelector("img");
  image.alt = `The picture ${card.dataset.name}`;
  image.addEventListener("load", () => image.classList.toggle("tiny", Math.max(image.naturalWidth, image.naturalHeight) < 200));
  image.addEventListener("error", () => {
    image.hidden = true;
    image.parentElement.append(element("p", { textContent: "This browser can't show the picture." }));
  });
  image.src = URL.createObjectURL(file);
}

function remove(card) {
  const { src } = card.querySelector("img");
  if (src) URL.revokeObjectURL(src);
  card.remove();
}

function fail(card, error) {
  card.classList.add("error");
  card.querySelector(".verdict").classList.remove("wait");
  card.querySelector(".verdict").textContent = error.message;
  say(`${card.dataset.name}: ${error.message}`);
}

// ------------------------------------------------------------------------------------------------ answers

function show(card, answer, explain = null) {
  card.classList.remove("error");
  const verdict = card.querySelector(".verdict");
  verdict.classList.remove("wait");
  const more = card.querySelector(".more");
  more.replaceChildren();
  if (answer.predictions !== undefined) {
    showValues(card, answer);
    return;
  }
  verdict.textContent = answer.present
    ? answer.present.map(visible).join(", ") || "None of the labels"
    : `${visible(answer.class)}, ${percent(answer.probability)}`;
  const chosen = answer.heatmap?.class;
  const rows = answer.top.map((row) => element("li", {}, newRow(row, chosen, explain)));
  const before = [...card.querySelectorAll(".row")].indexOf(document.activeElement);
  card.querySelector(".rows").replaceChildren(...rows);
  if (before >= 0) card.querySelectorAll(".row")[before]?.focus();
  if (answer.heatmap) showHeat(card, answer.heatmap, more);
  const left = (model.classes.length || answer.top.length) - answer.top.length;
  if (left > 0) more.append(` ${left} less probable ${left > 1 ? "classes aren't" : "class isn't"} shown.`);
}

function newRow(row, chosen, explain) {
  const button = element(explain ? "button" : "div", { className: "row" });
  const bar = element("i");
  bar.style.width = `${100 * row.probability}%`;
  button.append(bar, element("span", { textContent: visible(row.class) }), element("b", { textContent: percent(row.probability) }));
  if (explain && chosen !== undefined) {
    button.type = "button";
    button.setAttribute("aria-pressed", row.class === chosen);
    button.title = `What speaks for ${visible(row.class)}`;
  }
  if (explain) button.addEventListener("click", () => explain(row.class));
  return button;
}

function place(card, [left, top, right, bottom]) {
  const box = card.querySelector(".box");
  Object.assign(box.style, { left: `${100 * left}%`, top: `${100 * top}%`, width: `${100 * (right - left)}%`, height: `${100 * (bottom - top)}%` });
  box.hidden = false;
  return box;
}

function paint(canvas, rows, color) {
  canvas.width = rows[0].length;
  canvas.height = rows.length;
  const pixels = new ImageData(canvas.width, canvas.height);
  rows.flat().forEach((value, i) => pixels.data.set(color(value), 4 * i));
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

function heatColor(value) {
  const at = Math.min(Math.max(value, 0), 1) * (STOPS.length - 1);
  const i = Math.min(Math.floor(at), STOPS.length - 2);
  return [...STOPS[i].map((low, c) => low + (at - i) * (STOPS[i + 1][c] - low)), 100 + 55 * value];
}

// Values between those of a coarse map, as an image's pixels are interpolated, but without edges at the map's places.
function finer(rows, times) {
  const at = (list, i) => list[Math.min(Math.max(i, 0), list.length - 1)];
  const between = (list, mix) => Array.from({ length: list.length * times }, (_, i) => {
    const x = (i + 0.5) / times - 0.5;
    const low = Math.floor(x);
    const t = (x - low) ** 2 * (3 - 2 * (x - low));
    return mix(at(list, low), at(list, low + 1), t);
  });
  const mixed = rows.map((row) => between(row, (a, b, t) => a + t * (b - a)));
  return between(mixed, (a, b, t) => a.map((value, i) => value + t * (b[i] - value)));
}

function showHeat(card, heat, more) {
  const box = place(card, heat.box);
  box.classList.add("map");
  const canvas = box.querySelector("canvas");
  const longest = Math.max(heat.values.length, heat.values[0].length);
  paint(canvas, longest < 64 ? finer(heat.values, Math.ceil(128 / longest)) : heat.values, heatColor);
  const where = `What speaks for ${visible(heat.class)} is strongest ${strongest(heat.values)}.`;
  canvas.setAttribute("aria-label", `Heat map. ${where}`);
  more.append(`${where} `, element("span", { className: "legend" }, "Little", element("i", { className: "scale" }), "much."));
}

function strongest(rows) {
  let total = 0;
  let down = 0;
  let across = 0;
  rows.forEach((row, y) => row.forEach((value, x) => {
    const weight = value > 0.7 ? value : 0;
    total += weight;
    down += (weight * (y + 0.5)) / rows.length;
    across += (weight * (x + 0.5)) / row.length;
  }));
  if (!total) return "nowhere: nothing in the picture does";
  const third = (share, names) => names[share < 0.4 ? 0 : share > 0.6 ? 2 : 1];
  const vertical = third(down / total, ["at the top", "", "at the bottom"]);
  const horizontal = third(across / total, ["left", "", "right"]);
  if (!vertical && !horizontal) return "in the middle";
  if (!vertical) return `on the ${horizontal}`;
  return horizontal ? `${vertical} ${horizontal}` : vertical;
}

function showValues(card, answer) {
  const found = answer.predictions;
  const verdict = card.querySelector(".verdict");
  if (Array.isArray(found) && Array.isArray(found[0]) && Number.isInteger(found[0][0]) && model.takes.includes("images")) {
    showMask(card, found, answer.box);
    return;
  }
  const numbers = [found].flat(Infinity);
  verdict.textContent = numbers.slice(0, 8).map((value) => Number(value.toPrecision(6))).join(", ") + (numbers.length > 8 ? ", …" : "");
  if (numbers.length > 8) card.querySelector(".more").append(element("div", { className: "values", textContent: JSON.stringify(found) }));
}

function showMask(card, rows, where) {
  const counts = new Map();
  for (const value of rows.flat()) counts.set(value, (counts.get(value) ?? 0) + 1);
  const total = rows.length * rows[0].length;
  const name = (value) => model.classes[value] ?? `class ${value}`;
  const color = (value) => PALETTE[value % PALETTE.length];
  const box = place(card, where ?? [0, 0, 1, 1]);
  box.classList.add("map");
  paint(box.querySelector("canvas"), rows, (value) => [...color(value).match(/\w\w/g).map((part) => parseInt(part, 16)), 150]);
  box.querySelector("canvas").setAttribute("aria-label", "The picture's parts, a color for each class");
  const shares = [...counts].sort((a, b) => b[1] - a[1]).map(([value, count]) => ({ value, class: name(value), probability: count / total }));
  card.querySelector(".verdict").textContent = `${shares[0].class}, ${percent(shares[0].probability)} of the picture`;
  card.querySelector(".rows").replaceChildren(...shares.slice(0, 12).map((row) => {
    const line = newRow(row, undefined, null);
    const swatch = element("em", { className: "swatch" });
    swatch.style.background = color(row.value);
    line.querySelector("span").prepend(swatch);
    return element("li", {}, line);
  }));
}

// ------------------------------------------------------------------------------------------------ numbers and texts

function rowsOf(text) {
  return text.trim().split(/\n+/).map((line) => line.trim().split(/[\s,;]+/).filter(Boolean).map((part) => {
    const value = Number(part);
    if (!Number.isFinite(value)) throw new Error(`"${part.slice(0, 40)}" is no number.`);
    return value;
  }));
}

async function askNumbers(event) {
  event?.preventDefault();
  complain("");
  const text = $("values").value;
  try {
    if (!text.trim()) throw new Error("There is nothing to answer yet.");
    const isText = model.takes.includes("text");
    const body = isText ? { text } : { inputs: rowsOf(text).map(shaped) };
    const found = await ask("/predict?top=8", { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" } });
    found.answers.forEach((answer, i) => {
      const name = isText ? `After “${text.slice(-30)}”` : found.answers.length > 1 ? `Row ${i + 1}` : "Answer";
      show(newCard(name, null), answer, isText ? (character) => follow(text, character) : null);
    });
    const first = $("results").firstElementChild;
    say(`${first.dataset.name}: ${first.querySelector(".verdict").textContent}`);
  } catch (error) {
    complain(error.message);
  }
}

function follow(text, character) {
  $("values").value = text + character;
  askNumbers();
}

// A line holds a sample's numbers, whatever its shape is.
function shaped(numbers) {
  const { shape } = model.input;
  const wanted = shape.reduce((a, b) => a * b, 1);
  if (numbers.length !== wanted) throw new Error(`A line needs ${wanted} numbers, and one has ${numbers.length}.`);
  return shape.slice(1).reduceRight((flat, size) => Array.from({ length: flat.length / size }, (_, i) => flat.slice(i * size, (i + 1) * size)), numbers);
}

async function example() {
  const { inputs } = await ask("/samples");
  const sample = inputs[Math.floor(Math.random() * inputs.length)];
  const isText = model.takes.includes("text");
  $("values").value = isText ? sample.map((i) => model.classes[i]).join("") : sample.flat(Infinity).map((value) => Number(value.toPrecision(7))).join(", ");
  askNumbers();
}

// ------------------------------------------------------------------------------------------------ the page

function describe() {
  document.title = model.name;
  $("name").textContent = model.name;
  const metric = model.metrics[model.headline];
  const share = metric && metric.value >= 0 && metric.value <= 1;
  const shown = share ? percent : (value) => value.toPrecision(4);
  const parts = [`${model.model}, ${model.parameters.toLocaleString("en")} parameters`];
  if (model.classes.length) parts.push(`${model.classes.length} classes`);
  if (metric) {
    const bounds = metric.low === null ? "" : ` (95% interval ${shown(metric.low)} to ${shown(metric.high)})`;
    parts.push(`${model.headline.replaceAll("_", " ")} ${shown(metric.value)}${bounds} on ${model.data.samples.toLocaleString("en")} ${model.data.proof} samples`);
  }
  $("about").textContent = parts.join(" · ");
  const notes = [];
  if (model.calibration) notes.push(`Probabilities are calibrated: the logits are divided by ${model.temperature.toFixed(3)}, fitted to validation data.`);
  if (model.takes.includes("images") && model.no_heatmaps) notes.push(`No heat maps: ${model.no_heatmaps}.`);
  $("calibrated").textContent = notes.join(" ");
}

function prepare() {
  const takesImages = model.takes.includes("images");
  const takesText = model.takes.includes("text");
  $("pictures").hidden = !takesImages;
  $("numbers").hidden = takesImages;
  $("switch").hidden = !model.heatmaps;
  const sent = takesImages ? "-F file=@picture.jpg" : `--json '${takesText ? '{"text": "…"}' : '{"inputs": [[…]]}'}'`;
  $("curl").textContent = `curl ${sent} ${location.origin}/predict`;
  if (takesImages) {
    $("limit").textContent = `Up to ${model.limits.bytes / 1e6} MB each.`;
    offer();
    return;
  }
  const wanted = model.input.shape.reduce((a, b) => a * b, 1);
  $("numbers-label").textContent = takesText ? "A text, whose next character is asked for" : `${wanted} number${wanted > 1 ? "s" : ""}`;
  $("numbers-hint").textContent = takesText
    ? `The last ${wanted} characters count. Choose one of the answers to go on with it.`
    : "Between commas, blanks or tabs; several samples on a line each.";
}

async function offer() {
  const { pictures } = await ask("/samples");
  $("try").hidden = !pictures.length;
  pictures.forEach((address, i) => {
    const name = `test picture ${i + 1}`;
    const button = element("button", { type: "button" }, element("img", { src: address, alt: name }));
    button.addEventListener("click", async () => {
      const picture = await (await fetch(address)).blob();
      send([new File([picture], name)]);
    });
    $("samples").append(button);
  });
}

function listen() {
  for (const id of ["file", "photo"]) {
    $(id).addEventListener("change", (event) => {
      send(event.target.files);
      event.target.value = "";
    });
  }
  $("numbers").addEventListener("submit", askNumbers);
  $("example").addEventListener("click", () => example().catch((error) => complain(error.message)));
  $("heat").addEventListener("change", () => $("results").classList.toggle("without", !$("heat").checked));
  $("clear").addEventListener("click", () => {
    [...$("results").children].forEach(remove);
    $("bar").hidden = true;
    $(model.takes.includes("images") ? "file" : "values").focus();
  });
  if (!model.takes.includes("images")) return;
  const over = (is) => (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", is);
  };
  document.addEventListener("dragover", over(true));
  document.addEventListener("dragleave", over(false));
  document.addEventListener("drop", (event) => {
    over(false)(event);
    send(event.dataTransfer.files);
  });
  document.addEventListener("paste", (event) => send(event.clipboardData.files));
}

async function start() {
  try {
    model = await ask("/model");
    describe();
    prepare();
    listen();
  } catch (error) {
    $("about").textContent = "";
    complain(error.message);
  }
}

start();

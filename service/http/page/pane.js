/* One model's answer to the image: the photograph with its boxes, and the list. */

import { ask, getKey } from "./api.js";
import { showFacts, showTime } from "./beside.js";
import { LOWEST, mostLike } from "./detections.js";
import { bar, classColor, css, download, element, percent, shortPercent } from "./format.js";
import { Looking } from "./looking.js";
import { drawPicture } from "./picture.js";
import { LANGUAGES, snippet } from "./snippets.js";
import { Stage } from "./stage.js";

const TOP_K = 10;
const TASKS = [["object-detection", "Find objects"], ["image-classification", "Classify"]];

export class Pane {
  /** `desk`: `models`, `facts(name)`, `threshold`, `setThreshold(value)`, and `changed()`, called after each new answer. */
  constructor(root, desk) {
    Object.assign(this, { root, desk, item: null, result: null, language: LANGUAGES[0], turn: 0, shown: [] });
    this.$ = (name) => root.querySelector(`.${name}`);
    this.stage = new Stage(root, {
      enter: (index) => this.highlight(index),
      leave: () => this.highlight(-1),
      choose: (index) => this.looking.choose(this.shown[index]),
      point: (x, y) => this.looking.lookFrom(x, y),
    });
    this.looking = new Looking(this);
    this.#listen();
    this.#fillModels();
  }

  get model() {
    return this.desk.models.find(({ name }) => name === this.$("model").value);
  }

  get detects() {
    return this.model.task === "object-detection";
  }

  get route() {
    return this.detects ? "detect" : "classify";
  }

  /** The entries of an answer. */
  entries({ answer }) {
    return this.detects ? answer.detections : answer.predictions;
  }

  scoreOf(entry) {
    return this.detects ? entry.score : entry.probability;
  }

  chooseModel(name, variant) {
    this.$("model").value = name;
    this.#fillVariants(variant);
    return this.run();
  }

  setItem(item) {
    this.item = item;
    return this.run();
  }

  #listen() {
    const on = (name, event, listener) => this.$(name).addEventListener(event, listener);
    on("model", "change", () => { this.#fillVariants(); this.run(); });
    on("variant", "change", () => this.run());
    on("retry", "click", () => this.run());
    on("threshold-slider", "input", ({ target }) => this.desk.setThreshold(Number(target.value)));
    on("copy", "click", () => navigator.clipboard?.writeText(this.$("program").textContent));
    on("save-json", "click", () => download(new Blob([this.$("document").textContent]), `${this.item.stem}.json`));
    on("save-picture", "click", () => this.#savePicture());
    this.$("copy").hidden = !navigator.clipboard;
    this.$("languages").append(...LANGUAGES.map((language) => element("button", {
      text: language, on: { click: () => { this.language = language; this.#showCode(); } },
    })));
  }

  #fillModels() {
    this.$("model").replaceChildren(...TASKS.flatMap(([task, label]) => {
      const options = this.desk.models.filter((model) => model.task === task)
        .map(({ name }) => element("option", { text: name, value: name }));
      return options.length ? [element("optgroup", { label }, ...options)] : [];
    }));
    this.#fillVariants();
  }

  #fillVariants(variant = this.model.default_variant) {
    const { variants } = this.model;
    this.$("variant").replaceChildren(...variants.map((name) => element("option", { text: name, value: name })));
    this.$("variant").value = variant;
    this.$("variant").hidden = variants.length < 2;
  }

  #parameters(threshold) {
    const { name, default_variant: usual } = this.model, variant = this.$("variant").value;
    return {
      model: name,
      ...(variant && variant !== usual ? { variant } : {}),
      ...(this.detects ? { threshold } : { top_k: TOP_K }),
    };
  }

  /** Ask for the answer to the image, unless it is here already, and show it. */
  async run() {
    const { item } = this, turn = ++this.turn;
    if (!item) return;
    this.result = null;
    this.looking.cool();
    this.root.setAttribute("aria-busy", "true");
    let problem = null;
    try {
      const [result, facts] = await Promise.all([this.fetch(item), this.desk.facts(this.model.name)]);
      if (turn !== this.turn) return;
      const { width, height } = result.answer.image;
      this.result = result;
      this.stage.show(item.url, width, height, item.name);
      this.looking.offer(facts, result);
      showFacts(this.$("facts"), facts);
      showTime(this.$("time"), result);
    } catch (error) {
      if (turn !== this.turn) return;
      problem = error;
      this.stage.show(item.url, item.width ?? 4, item.height ?? 3, item.name);
    }
    this.#showProblem(problem);
    this.root.removeAttribute("aria-busy");
    this.desk.changed();
  }

  /** Return the answer to an item, which is asked for once. */
  fetch(item) {
    return this.once(item, this.route, this.#parameters(LOWEST));
  }

  once(item, route, parameters) {
    const key = JSON.stringify([route, parameters]);
    if (!item.answers.has(key)) {
      const answer = ask(route, item.file, parameters);
      item.answers.set(key, answer);
      answer.catch(() => item.answers.delete(key));
    }
    return item.answers.get(key);
  }

  /** Show the answer; `other` is a pane to compare it with, or null. */
  render(other) {
    const { threshold } = this.desk, { result } = this;
    for (const name of ["summary", "rows", "time", "facts", "code", "json", "save-picture", "heat-bar"]) this.$(name).hidden = !result;
    this.$("threshold").hidden = !result || !this.detects;
    if (!result) {
      this.shown = [];
      this.$("layers").hidden = true;
      return;
    }
    const all = this.entries(result);
    this.shown = this.detects ? all.filter(({ score }) => score >= threshold) : all;
    const differences = this.#differences(other, threshold);
    this.$("rows").replaceChildren(...this.shown.map((entry, index) => this.#row(entry, index, differences[index])));
    if (this.detects) this.stage.drawBoxes(this.shown, differences.map((difference) => difference?.alone));
    this.$("summary").textContent = this.#summary(all, threshold);
    this.#noteThreshold(threshold);
    this.looking.keep(this.shown);
    this.#showCode();
    const answer = { ...result.answer, [this.detects ? "detections" : "predictions"]: this.shown };
    this.$("document").textContent = JSON.stringify(answer, null, 1);
  }

  #summary(all, threshold) {
    if (!this.detects) return `${all[0].label}, ${percent(all[0].probability)}`;
    if (this.shown.length) return this.shown.length === 1 ? "1 object" : `${this.shown.length} objects`;
    const best = all[0] ? `; the best is ${all[0].label}, ${shortPercent(all[0].score)}` : ` of its ${this.model.labels.length} kinds`;
    return `Nothing above ${percent(threshold, 0)}${best}`;
  }

  #noteThreshold(threshold) {
    this.$("threshold-slider").value = threshold;
    this.$("threshold-value").textContent = percent(threshold, 0);
    const { thresholds, data } = this.model.metrics ?? {};
    const away = ({ score }) => Math.abs(score - threshold);
    const near = thresholds?.toSorted((a, b) => away(a) - away(b))[0];
    this.$("threshold-note").textContent = near
      ? `On ${data}, from ${percent(near.score, 0)} on: ${percent(near.precision, 0)} of the boxes are right, ` +
        `${percent(near.recall, 0)} of the objects are found.`
      : "";
  }

  /** Of each shown entry: whether the other pane lacks it, and by how much its score is higher here. */
  #differences(other, threshold) {
    if (!other?.result || other.detects !== this.detects) return [];
    const theirs = other.entries(other.result).filter((they) => !this.detects || they.score >= threshold);
    const taken = new Set();
    return this.shown.map((entry) => {
      const alike = theirs.filter((they) => they.label === entry.label && !taken.has(they));
      const match = this.detects ? mostLike(entry, alike, (they) => they.box) : alike[0];
      taken.add(match);
      return match ? { alone: false, more: this.scoreOf(entry) - this.scoreOf(match) } : { alone: true };
    });
  }

  #row(entry, index, difference) {
    const color = this.detects ? css(classColor(entry.class_id)) : undefined;
    const button = element("button", {
      class: "row", "aria-pressed": "false", title: "Show where the network looks",
      on: {
        mouseenter: () => this.highlight(index), mouseleave: () => this.highlight(-1),
        focus: () => this.highlight(index), blur: () => this.highlight(-1),
        click: () => this.looking.choose(entry),
      },
    }, ...bar(entry.label, this.scoreOf(entry), percent(this.scoreOf(entry)), color));
    const text = difference?.alone ? "only here" : signed(difference?.more ?? 0);
    if (text) button.append(element("span", { class: "mark", text }));
    return element("li", {}, button);
  }

  highlight(index) {
    this.$("rows").querySelectorAll(".row").forEach((row, at) => row.classList.toggle("highlit", at === index));
    this.stage.highlight(this.detects ? index : -1);
  }

  #showProblem(error) {
    this.$("error").hidden = !error;
    this.$("error").textContent = error?.message ?? "";
    const { status } = error ?? {};
    this.$("retry").hidden = !error || !(status === 0 || status === 401 || status === 429 || status >= 500);
  }

  #showCode() {
    const url = new URL(this.route, document.baseURI).href;
    const parameters = this.#parameters(this.desk.threshold);
    this.$("program").textContent = snippet(this.language, url, this.item.name, parameters, Boolean(getKey()));
    for (const button of this.$("languages").children) button.setAttribute("aria-pressed", button.textContent === this.language);
  }

  async #savePicture() {
    const { stage, looking } = this;
    const blob = await drawPicture(stage, {
      heatmap: looking.explained?.heatmap,
      opacity: looking.opacity,
      detections: this.detects ? this.shown.filter((entry) => !looking.chosen || looking.chosen === entry) : [],
      caption: this.detects ? [] : this.shown.slice(0, 5),
    });
    download(blob, `${this.item.stem}-${this.model.name}.png`);
  }
}

const signed = (more) => (Math.abs(more) < 0.0005 ? "" : `${more > 0 ? "+" : "−"}${(100 * Math.abs(more)).toFixed(1)}`);

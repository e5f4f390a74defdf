/* Where the network of a pane looks: heat for an entry of the answer or from a point, and the answer after each layer. */

import { LOWEST, mostLike } from "./detections.js";
import { bar, element, milliseconds, percent } from "./format.js";

const MOST_TARGETS = 32; // of a request
const FROM_POINT = "encoder-attention";
const NAMES = {
  "attention-rollout": "attention rollout", "class-attention": "class attention", "class-activation": "class activation",
  "cross-attention": "cross-attention", "encoder-attention": "encoder attention", occlusion: "occlusion",
};

export class Looking {
  constructor(pane) {
    Object.assign(this, { pane, $: pane.$, stage: pane.stage, chosen: null, explained: null, opacity: 0.6 });
    const on = (name, event, listener) => this.$(name).addEventListener(event, listener);
    on("method", "change", () => this.#showHeat());
    on("opacity", "input", ({ target }) => {
      this.opacity = Number(target.value);
      this.stage.setOpacity(this.opacity);
    });
    on("from-point", "click", async () => {
      const found = this.lookFrom((this.stage.width - 1) / 2, (this.stage.height - 1) / 2);
      this.stage.point.focus();
      await found;
    });
    on("cool", "click", () => this.cool());
    on("layer-slider", "input", () => this.#showLayer());
  }

  /** Offer what the model can be asked; `facts` is its manifest. */
  offer(facts, result) {
    const { explanations } = this.pane.model, select = this.$("method"), before = select.value;
    const methods = explanations.filter((method) => method !== FROM_POINT);
    select.replaceChildren(...methods.map((method) =>
      element("option", { text: method === "occlusion" ? "occlusion (slow)" : NAMES[method], value: method })));
    if (methods.includes(before)) select.value = before;
    this.stage.pointed = explanations.includes(FROM_POINT);
    this.$("from-point").hidden = !this.stage.pointed;
    this.#note();
    const layers = facts.explanation?.outputs.find(({ name }) => name === "layers");
    this.$("layers").hidden = !layers;
    if (layers) {
      const [, count] = layers.shape;
      Object.assign(this.$("layer-slider"), { max: count, value: count });
      this.#drawLayer(result.answer.predictions);
    }
  }

  /** Show the heat of an entry of the answer, or none if it is shown already. */
  async choose(entry) {
    if (this.chosen === entry) {
      this.cool();
      return;
    }
    this.stage.hidePoint();
    this.chosen = entry;
    this.mark();
    await this.#showHeat();
  }

  async #showHeat() {
    const { chosen } = this, { detects } = this.pane, method = this.$("method").value;
    if (!chosen) return;
    const parameters = detects
      ? { method, target: "all", max_targets: MOST_TARGETS, threshold: LOWEST }
      : { method, target: chosen.class_id };
    await this.#explain(parameters, () => chosen === this.chosen && method === this.$("method").value, (explanations) => {
      const alike = explanations.filter(({ target }) => target.label === chosen.label);
      return detects ? mostLike(chosen, alike, ({ target }) => target.box) : alike[0];
    });
  }

  /** Look from a point; of several that are asked for meanwhile, only the last. */
  async lookFrom(x, y) {
    this.chosen = null;
    this.stage.showPoint(x, y);
    this.mark();
    if (this.isLooking) return;
    this.isLooking = true;
    let place = null;
    const here = () => JSON.stringify([this.stage.x, this.stage.y]);
    while (!this.stage.point.hidden && place !== here()) {
      place = here();
      const parameters = { method: FROM_POINT, x: this.stage.x, y: this.stage.y };
      await this.#explain(parameters, () => !this.stage.point.hidden, ([explained]) => explained);
    }
    this.isLooking = false;
  }

  /** Ask for explanations; if it `isWanted` still, show the one that `pick` finds. */
  async #explain(parameters, isWanted, pick) {
    const { pane } = this, { turn } = pane;
    this.$("heat-bar").setAttribute("aria-busy", "true");
    try {
      const { answer } = await pane.once(pane.item, "explain", { model: pane.model.name, ...parameters });
      if (turn !== pane.turn || !isWanted()) return;
      this.explained = pick(answer.explanations) ?? null;
      this.stage.drawHeat(this.explained?.heatmap ?? null);
      this.stage.setOpacity(this.opacity);
      const runs = answer.images_computed === 1 ? "once" : `${answer.images_computed} times`;
      this.#note(this.explained
        ? `${NAMES[answer.method]}: the network ran ${runs}, ${milliseconds(answer.milliseconds)}.`
        : "The float32 network, which is the one that is explained, has no such box among its first 32.");
    } catch (error) {
      if (turn === pane.turn) this.#note(error.message);
    } finally {
      this.$("heat-bar").removeAttribute("aria-busy");
      this.mark();
    }
  }

  /** Keep the heat if what it is for is among the `shown` entries. */
  keep(shown) {
    if (this.chosen && !shown.includes(this.chosen)) this.cool();
    this.mark();
  }

  cool() {
    this.chosen = this.explained = null;
    this.stage.drawHeat(null);
    this.stage.hidePoint();
    this.#note();
    this.mark();
  }

  mark() {
    const at = this.pane.shown.indexOf(this.chosen);
    this.$("rows").querySelectorAll(".row").forEach((row, index) => row.setAttribute("aria-pressed", index === at));
    this.stage.markChosen(this.pane.detects ? at : -1);
    this.$("cool").hidden = !this.explained && !this.chosen;
  }

  #note(text) {
    const hint = `Choose a ${this.pane.detects ? "box" : "label"} to see where the network looks for it`;
    this.$("heat-note").textContent = text ?? `${hint}${this.stage.pointed ? "; press any other place to look from there" : ""}.`;
  }

  async #showLayer() {
    const { pane } = this, { turn } = pane, slider = this.$("layer-slider");
    try {
      const { answer } = await pane.once(pane.item, "explain", { model: pane.model.name, layers: true });
      if (turn === pane.turn) this.#drawLayer(answer.explanations[0].layers[slider.value - 1]);
    } catch (error) {
      if (turn === pane.turn) this.$("layer-value").textContent = error.message;
    }
  }

  #drawLayer(predictions) {
    const { value, max } = this.$("layer-slider");
    this.$("layer-value").textContent = `Block ${value} of ${max}${value === max ? ": the answer" : ""}`;
    this.$("layer-rows").replaceChildren(...predictions.slice(0, 3).map(({ label, probability }) =>
      element("li", { class: "row" }, ...bar(label, probability, percent(probability)))));
  }
}

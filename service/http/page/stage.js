/* The photograph of a pane, with boxes, tags, heat and a point over it; all places are in per cent of its edges. */

import { classColor, css, element, shortPercent, textColor } from "./format.js";
import { heatCanvas } from "./heat.js";

const MOST_TAGS = 12; // more would hide the photograph: then only those of a highlighted box are shown

export class Stage {
  /** `on`: `enter(index)`, `leave()` and `choose(index)` of a box; `point(x, y)`, in pixels of the image. */
  constructor(root, on) {
    this.on = on;
    for (const name of ["stage", "photograph", "blank", "heat", "boxes", "tags", "point"]) this[name] = root.querySelector(`.${name}`);
    this.nodes = []; // of each box
    this.pointed = false; // whether a place that is pressed is looked from
    this.stage.addEventListener("pointerdown", (event) => this.#press(event));
    this.stage.addEventListener("pointermove", (event) => event.buttons & 1 && this.dragging && this.#pointAt(event));
    this.stage.addEventListener("pointerup", () => { this.dragging = false; });
    this.point.addEventListener("keydown", (event) => this.#move(event));
  }

  /** Show an image of `width` x `height` pixels; without a `url`, which the browser cannot show, a blank one. */
  show(url, width, height, name) {
    [this.width, this.height] = [width, height];
    this.photograph.hidden = !url;
    this.blank.hidden = Boolean(url);
    if (url && this.photograph.src !== url) this.photograph.src = url;
    this.photograph.alt = name;
    this.stage.style.aspectRatio = `${width} / ${height}`;
    this.stage.style.setProperty("--ratio", width / height);
    this.stage.classList.toggle("tiny", Math.max(width, height) <= 96);
    this.drawBoxes([]);
    this.drawHeat(null);
    this.hidePoint();
  }

  /** Draw detections; those that are `alone` in one of two compared answers are dashed. */
  drawBoxes(detections, alone = []) {
    const area = ({ box }) => (box.x_max - box.x_min) * (box.y_max - box.y_min);
    const order = detections.map((_, index) => index).sort((a, b) => area(detections[b]) - area(detections[a]));
    this.nodes = [];
    this.boxes.replaceChildren(...order.flatMap((index) => {
      const { box, class_id: id } = detections[index];
      const place = {
        x: `${(100 * box.x_min) / this.width}%`, width: `${(100 * Math.max(0, box.x_max - box.x_min)) / this.width}%`,
        y: `${(100 * box.y_min) / this.height}%`, height: `${(100 * Math.max(0, box.y_max - box.y_min)) / this.height}%`,
      };
      const halo = element("rect", { ...place, class: "halo" });
      const line = element("rect", {
        ...place, class: alone[index] ? "box alone" : "box", stroke: css(classColor(id)), "data-index": index,
        on: { pointerenter: () => this.on.enter(index), pointerleave: () => this.on.leave() },
      });
      this.nodes[index] = [halo, line];
      return [halo, line];
    }));
    const tags = detections.map((detection, index) => this.#tag(detection, index));
    this.tags.replaceChildren(...tags);
    tags.forEach((tag, index) => this.nodes[index].push(tag));
    this.tags.classList.toggle("many", detections.length > MOST_TAGS);
  }

  #tag({ label, score, box, class_id: id }, index) {
    const color = classColor(id);
    const tag = element("span", { class: "tag", text: `${label} ${shortPercent(score)}`, "data-index": index });
    Object.assign(tag.style, {
      background: css(color), color: textColor(color),
      left: `${(100 * Math.min(Math.max(0, box.x_min), this.width)) / this.width}%`,
      top: `${(100 * Math.max(0, box.y_min)) / this.height}%`,
      zIndex: -index, // the best are on top
    });
    if (box.y_min / this.height < 0.08) tag.classList.add("inside");
    if (box.x_min / this.width > 0.7) tag.classList.add("left");
    return tag;
  }

  /** Make a box stand out while the pointer is on it; -1: none. */
  highlight(index) {
    this.#distinguish("highlighting", "highlit", index);
  }

  /** Make a box stand out, as its heat is shown; -1: none. */
  markChosen(index) {
    this.#distinguish("choosing", "chosen", index);
  }

  #distinguish(ofStage, ofNode, index) {
    this.stage.classList.toggle(ofStage, index >= 0);
    this.nodes.forEach((nodes, at) => nodes.forEach((node) => node.classList.toggle(ofNode, at === index)));
  }

  drawHeat(heatmap) {
    this.heat.replaceChildren();
    if (heatmap === null) return;
    const canvas = heatCanvas(heatmap), { box } = heatmap;
    Object.assign(canvas.style, {
      left: `${(100 * box.x_min) / this.width}%`, width: `${(100 * (box.x_max - box.x_min)) / this.width}%`,
      top: `${(100 * box.y_min) / this.height}%`, height: `${(100 * (box.y_max - box.y_min)) / this.height}%`,
    });
    this.heat.append(canvas);
  }

  setOpacity(opacity) {
    this.heat.style.opacity = opacity;
  }

  showPoint(x, y) {
    [this.x, this.y] = [x, y].map(Math.round);
    this.point.hidden = false;
    Object.assign(this.point.style, { left: `${(100 * x) / this.width}%`, top: `${(100 * y) / this.height}%` });
    this.point.setAttribute("aria-label", `Point at ${this.x}, ${this.y}. Arrow keys move it.`);
  }

  hidePoint() {
    this.point.hidden = true;
  }

  #press(event) {
    if (event.button || event.target === this.point) return;
    const index = event.target.dataset?.index;
    if (index !== undefined) {
      this.on.choose(Number(index));
    } else if (this.pointed) {
      this.dragging = true;
      event.preventDefault();
      this.#pointAt(event);
    }
  }

  #pointAt({ clientX, clientY }) {
    const place = this.stage.getBoundingClientRect();
    const inside = (value, length) => Math.min(Math.max(0, value), 1) * (length - 1);
    this.on.point(
      inside((clientX - place.left) / place.width, this.width),
      inside((clientY - place.top) / place.height, this.height),
    );
  }

  #move(event) {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    const size = Math.max(1, Math.round(Math.max(this.width, this.height) * (event.shiftKey ? 0.01 : 0.05)));
    this.on.point(
      Math.min(Math.max(0, this.x + step[0] * size), this.width - 1),
      Math.min(Math.max(0, this.y + step[1] * size), this.height - 1),
    );
  }
}

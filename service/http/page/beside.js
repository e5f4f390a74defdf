/* What stands beside an answer: where the time went, and what the model is. */

import { bar, element, milliseconds, percent } from "./format.js";

const SHOWN_METRICS = ["top1", "top5", "AP50", "AP"];
const MOST_LABELS = 100;

/** Show the stages of a request in `details`. */
export function showTime(details, { stages, total }) {
  const rest = Math.max(0, total - stages.reduce((sum, [, value]) => sum + value, 0));
  const all = [...stages, ["network and browser", rest]];
  details.querySelector(".total").textContent = milliseconds(total);
  details.querySelector("div").replaceChildren(...all.map(([name, value]) =>
    element("p", { class: "row" }, ...bar(name, value / total, milliseconds(value)))));
}

/** Show what a manifest says of its model in `details`. */
export function showFacts(details, manifest) {
  const { description, metrics, licences, architecture, labels, version, calibration } = manifest;
  const figure = (name) => {
    const interval = metrics.intervals[name];
    const range = interval ? ` (${percent(interval[0])} to ${percent(interval[1])})` : "";
    return `${name} ${percent(metrics.values[name])}${range}`;
  };
  const measured = SHOWN_METRICS.filter((name) => name in (metrics?.values ?? {})).map(figure).join(", ");
  const facts = [
    ["Model", `${description} ${architecture}, version ${version}.`],
    ["Measured", metrics ? `${measured}; on ${metrics.images} images of ${metrics.data}, ${metrics.split}` : "not yet"],
    ["Calibrated", calibration?.ece_after != null ? `off by ${percent(calibration.ece_after)} on average` : ""],
    ["Limits", [metrics?.chosen && `Training chose by these images: ${metrics.chosen}.`, metrics?.notes].filter(Boolean).join(" ")],
    ["Licences", `weights: ${licences.weights}; data: ${licences.data}`],
    [`Labels (${labels.length})`, labels.slice(0, MOST_LABELS).join(", ") + (labels.length > MOST_LABELS ? " …" : "")],
  ];
  details.querySelector("dl").replaceChildren(...facts.filter(([, text]) => text)
    .flatMap(([term, text]) => [element("dt", { text: term }), element("dd", { text })]));
}

/* Numbers, colours and elements. */

export const percent = (value, digits = 1) => `${(100 * value).toFixed(digits)} %`;
/** Without decimals, and 100 % only if it is. */
export const shortPercent = (value) => percent(value < 1 ? Math.min(value, 0.99) : value, 0);
export const milliseconds = (value) => `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;

/** Create an element; `text` and listeners are properties, the rest are attributes. */
export function element(name, { text, on = {}, ...attributes } = {}, ...children) {
  const svg = ["rect", "svg"].includes(name);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  if (text !== undefined) node.textContent = text;
  for (const [key, value] of Object.entries(attributes)) if (value !== undefined && value !== null) node.setAttribute(key, value);
  for (const [event, listener] of Object.entries(on)) node.addEventListener(event, listener);
  node.append(...children);
  return node;
}

/** The parts of a row: a bar of a share, a label, and a value. */
export function bar(label, share, value, color) {
  const line = element("i", { class: "bar" });
  line.style.width = `${100 * share}%`;
  if (color) line.style.background = color;
  return [line, element("span", { class: "label", text: label }), element("span", { class: "value", text: value })];
}

/* A class has the same colour as in the server's pictures (bundle/drawing.py). */
const GOLDEN_RATIO = (Math.sqrt(5) - 1) / 2;
const SATURATION_VALUE = [[0.85, 1], [0.62, 0.85], [1, 0.72]];

export function classColor(id) {
  const hue = (0.58 + id * GOLDEN_RATIO) % 1;
  const [saturation, value] = SATURATION_VALUE[Math.floor(id / 5) % 3];
  const channel = (n) => {
    const k = (n + hue * 6) % 6;
    return Math.round(255 * (value - value * saturation * Math.max(0, Math.min(k, 4 - k, 1))));
  };
  return [channel(5), channel(3), channel(1)];
}

export const css = (color) => `rgb(${color.join(" ")})`;

export function textColor(color) {
  const [r, g, b] = color.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}

/** Save bytes as a file of the visitor. */
export function download(blob, name) {
  const url = URL.createObjectURL(blob);
  const link = element("a", { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

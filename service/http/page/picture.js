/* The photograph with what is drawn over it, in its own size, as a PNG. */

import { classColor, css, percent, shortPercent, textColor } from "./format.js";
import { heatCanvas } from "./heat.js";

/** Return a PNG of what is on a stage, with detections, a heat map, or a caption of classes. */
export function drawPicture(stage, { detections, heatmap, opacity, caption }) {
  const { width, height, photograph } = stage;
  const scale = Math.max(1, Math.ceil(320 / Math.min(width, height)));
  const unit = Math.max(12, Math.sqrt(width * height) * scale / 36);
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width * scale, height * scale + caption.length * unit * 1.5];
  const context = canvas.getContext("2d");
  context.fillStyle = "#18181b";
  context.fillRect(0, 0, canvas.width, canvas.height);
  if (!photograph.hidden) context.drawImage(photograph, 0, 0, width * scale, height * scale);
  context.save();
  context.beginPath();
  context.rect(0, 0, width * scale, height * scale);
  context.clip();
  if (heatmap) {
    const { x_min: x, y_min: y, x_max, y_max } = heatmap.box;
    context.globalAlpha = opacity;
    context.drawImage(heatCanvas(heatmap), x * scale, y * scale, (x_max - x) * scale, (y_max - y) * scale);
    context.globalAlpha = 1;
  }
  context.restore();
  context.font = `${unit}px system-ui, sans-serif`;
  context.textBaseline = "middle";
  const line = Math.max(2, unit / 5.5);
  for (const { label, score, box, class_id: id } of [...detections].reverse()) {
    const color = classColor(id), text = `${label} ${shortPercent(score)}`;
    for (const [shade, thickness] of [["rgb(0 0 0 / 60%)", 1.7 * line], [css(color), line]]) {
      [context.strokeStyle, context.lineWidth] = [shade, thickness];
      context.strokeRect(box.x_min * scale, box.y_min * scale, (box.x_max - box.x_min) * scale, (box.y_max - box.y_min) * scale);
    }
    const wide = context.measureText(text).width + unit * 0.7;
    const x = Math.min(Math.max(0, box.x_min * scale), canvas.width - wide);
    const y = Math.max(0, box.y_min * scale - unit * 1.3);
    context.fillStyle = css(color);
    context.fillRect(x, y, wide, unit * 1.3);
    context.fillStyle = textColor(color);
    context.fillText(text, x + unit * 0.35, y + unit * 0.68);
  }
  if (!stage.point.hidden) {
    context.beginPath();
    context.arc(stage.x * scale, stage.y * scale, unit / 2.5, 0, 2 * Math.PI);
    context.fillStyle = "#fff";
    context.fill();
    context.lineWidth = line / 2;
    context.strokeStyle = "#18181b";
    context.stroke();
  }
  caption.forEach(({ label, probability }, row) => {
    const y = height * scale + (row + 0.5) * unit * 1.5;
    context.fillStyle = "#3f3f46";
    context.fillRect(0, y - unit * 0.7, canvas.width * probability, unit * 1.4);
    context.fillStyle = "#fafafa";
    context.textAlign = "left";
    context.fillText(label, unit * 0.4, y, canvas.width - unit * 5);
    context.textAlign = "right";
    context.fillText(percent(probability), canvas.width - unit * 0.4, y);
  });
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

/* Detections of one image, of one answer or of two. */

export const LOWEST = 0.05; // of the scores that are asked for; the slider filters them here
const SAME = 0.5; // IoU of boxes that are the same object

/** Intersection over union of two boxes. */
function iou(a, b) {
  const width = Math.min(a.x_max, b.x_max) - Math.max(a.x_min, b.x_min);
  const height = Math.min(a.y_max, b.y_max) - Math.max(a.y_min, b.y_min);
  const both = Math.max(0, width) * Math.max(0, height);
  const area = (box) => (box.x_max - box.x_min) * (box.y_max - box.y_min);
  return both / (area(a) + area(b) - both) || 0;
}

/** Of `others`, the one whose box, `boxOf(other)`, is the most like an entry's; undefined if none is the same object. */
export function mostLike(entry, others, boxOf) {
  const overlaps = others.map((other) => [iou(boxOf(other), entry.box), other]).sort((a, b) => b[0] - a[0]);
  return overlaps[0]?.[0] >= SAME ? overlaps[0][1] : undefined;
}

/* Heat maps: "inferno" of Matplotlib (CC0), as in the server's pictures. */

const INFERNO = [
  [0, 0, 4], [11, 7, 36], [33, 12, 74], [61, 9, 101], [87, 16, 110], [113, 25, 110],
  [138, 34, 106], [163, 44, 97], [188, 55, 84], [210, 70, 68], [228, 90, 49], [241, 115, 29],
  [249, 142, 9], [252, 172, 17], [249, 203, 53], [242, 234, 105], [252, 255, 164],
];

export function heatColor(strength) {
  const place = Math.min(1, Math.max(0, strength)) * (INFERNO.length - 1);
  const index = Math.min(INFERNO.length - 2, Math.floor(place));
  return INFERNO[index].map((low, channel) => low + (INFERNO[index + 1][channel] - low) * (place - index));
}

/** Draw a map, relative to its largest value, on a canvas with some pixels for each cell; negative values are clear. */
export function heatCanvas({ values, rows, columns }) {
  const most = Math.max(...values.flat(), 1e-12);
  const small = new OffscreenCanvas(columns, rows);
  const levels = new ImageData(columns, rows);
  values.flat().forEach((value, cell) => {
    levels.data.fill(Math.round(255 * Math.max(0, value) / most), 4 * cell, 4 * cell + 3);
    levels.data[4 * cell + 3] = 255;
  });
  small.getContext("2d").putImageData(levels, 0, 0);
  // Values are interpolated before they get a colour: between cold and hot there is no third colour.
  const scale = Math.max(1, Math.min(24, Math.ceil(480 / Math.max(rows, columns))));
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [columns * scale, rows * scale];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let at = 0; at < pixels.data.length; at += 4) {
    const strength = pixels.data[at] / 255;
    pixels.data.set(heatColor(strength), at);
    pixels.data[at + 3] = 255 * Math.min(1, 2 * strength);
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}

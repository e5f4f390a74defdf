/* The visitor's images: from files, the clipboard, the camera and the samples; and their strip. */

import { element } from "./format.js";

const THUMBNAIL = 72; // pixels of the shorter edge, at two for each CSS pixel

/** Return what is kept of an image file; `url` is null if this browser cannot show it, which the server may still read. */
async function toItem(file) {
  const name = file.name || "image.png";
  const item = { file, name, stem: name.replace(/\.\w+$/, ""), answers: new Map(), url: null, thumbnail: element("canvas", {}) };
  try {
    const bitmap = await createImageBitmap(file);
    Object.assign(item, { width: bitmap.width, height: bitmap.height });
    const scale = THUMBNAIL * 2 / Math.min(bitmap.width, bitmap.height);
    [item.thumbnail.width, item.thumbnail.height] = [THUMBNAIL * 2, THUMBNAIL * 2];
    const [width, height] = [bitmap.width * scale, bitmap.height * scale];
    item.thumbnail.getContext("2d").drawImage(bitmap, THUMBNAIL - width / 2, THUMBNAIL - height / 2, width, height);
    item.url = URL.createObjectURL(file.type === "image/gif" ? await firstFrame(bitmap) : file);
    bitmap.close();
  } catch {
    item.thumbnail.classList.add("unknown");
  }
  return item;
}

/* The server reads the first frame of an animation; the browser would play it. */
function firstFrame(bitmap) {
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  return canvas.convertToBlob();
}

export class Images {
  /** `strip`: the element with the thumbnails and the two buttons; `select(item)` is called for the current image. */
  constructor(strip, select) {
    Object.assign(this, { strip, select, items: [], index: -1 });
    this.list = strip.querySelector("ol");
    strip.querySelector("#previous").addEventListener("click", () => this.go(this.index - 1));
    strip.querySelector("#next").addEventListener("click", () => this.go(this.index + 1));
  }

  get current() {
    return this.items[this.index] ?? null;
  }

  /** Add image files, and go to the first of them. */
  async add(files) {
    const first = this.items.length;
    for (const file of files) {
      const item = await toItem(file), index = this.items.push(item) - 1;
      const button = element("button", { "aria-label": `${index + 1}: ${item.name}`, title: item.name, on: { click: () => this.go(index) } }, item.thumbnail);
      this.list.append(element("li", {}, button));
      if (index === first) this.go(index);
    }
    this.#mark();
  }

  go(index) {
    if (index < 0 || index >= this.items.length || index === this.index) return;
    this.index = index;
    this.#mark();
    this.select(this.current);
  }

  #mark() {
    this.strip.hidden = this.items.length < 2;
    this.strip.querySelector("#previous").disabled = this.index <= 0;
    this.strip.querySelector("#next").disabled = this.index >= this.items.length - 1;
    [...this.list.children].forEach(({ firstChild: button }, at) => {
      if (at === this.index) {
        button.setAttribute("aria-current", "true");
        button.scrollIntoView({ block: "nearest", inline: "nearest" });
      } else button.removeAttribute("aria-current");
    });
  }
}

/** Take one picture with the camera; resolves to a file, or null. */
export async function takePicture(dialog) {
  const video = dialog.querySelector("video");
  const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment", width: { ideal: 1920 } } });
  video.srcObject = stream;
  dialog.showModal();
  try {
    return await new Promise((resolve) => {
      dialog.onclose = () => resolve(null);
      dialog.querySelector("#camera-cancel").onclick = () => dialog.close();
      dialog.querySelector("#shoot").onclick = async () => {
        const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
        canvas.getContext("2d").drawImage(video, 0, 0);
        const blob = await canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 });
        resolve(new File([blob], "camera.jpg", { type: blob.type }));
        dialog.close();
      };
    });
  } finally {
    stream.getTracks().forEach((track) => track.stop());
    video.srcObject = null;
  }
}

/** Return the images on the clipboard. */
export async function readClipboard() {
  const entries = await navigator.clipboard.read();
  const blobs = entries.flatMap((entry) => entry.types.filter((type) => type.startsWith("image/")).slice(0, 1).map((type) => entry.getType(type)));
  return (await Promise.all(blobs)).map((blob) => new File([blob], `pasted.${blob.type.split("/")[1]}`, { type: blob.type }));
}

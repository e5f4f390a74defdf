/* The page: gets images in, and gives each to one pane, or to two that are compared. */

import { getBlob, getJson, getKey, onKeyNeeded, setKey } from "./api.js";
import { element } from "./format.js";
import { Images, readClipboard, takePicture } from "./images.js";
import { Pane } from "./pane.js";

const $ = (id) => document.getElementById(id);
const panes = [];
const facts = new Map();
let saying;

const desk = {
  models: [],
  threshold: 0.5, // the default of POST /detect
  facts(name) {
    if (!facts.has(name)) {
      const detail = getJson(`models/${encodeURIComponent(name)}`).then(({ manifest }) => manifest);
      facts.set(name, detail);
      detail.catch(() => facts.delete(name));
    }
    return facts.get(name);
  },
  setThreshold(threshold) {
    desk.threshold = threshold;
    render();
  },
  changed() {
    render();
    clearTimeout(saying);
    saying = setTimeout(() => {
      $("status").textContent = panes.map((pane) => pane.$("error").textContent || pane.$("summary").textContent).join("; ");
    }, 200);
  },
};

function render() {
  panes.forEach((pane, index) => pane.render(panes[1 - index] ?? null));
}

function addPane() {
  const root = $("pane").content.cloneNode(true).firstElementChild;
  $("panes").append(root);
  panes.push(new Pane(root, desk));
  root.setAttribute("aria-label", panes.length > 1 ? "Second answer" : "Answer");
  $("panes").classList.toggle("two", panes.length > 1);
  return panes.at(-1);
}

async function compare() {
  const [first, second] = panes;
  if (second) {
    second.root.remove();
    panes.pop();
    $("panes").classList.remove("two");
    render();
  } else {
    const { model } = first, used = first.$("variant").value;
    const variant = model.variants.find((name) => name !== used);
    const other = desk.models.find(({ name, task }) => task === model.task && name !== model.name) ?? model;
    const pane = addPane();
    await pane.setItem(images.current);
    await pane.chooseModel(variant ? model.name : other.name, variant ?? other.default_variant);
  }
  $("compare").setAttribute("aria-pressed", panes.length > 1);
}

const images = new Images($("strip"), async (item) => {
  $("welcome").hidden = true;
  $("panes").hidden = $("compare").disabled = false;
  $("compare").disabled = !desk.models.length;
  await Promise.all(panes.map((pane) => pane.setItem(item)));
  const after = images.items[images.items.indexOf(item) + 1];
  if (after) panes.forEach((pane) => pane.fetch(after).catch(() => {})); // its error is shown when it is its turn
});

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

async function add(files) {
  notice("");
  if (!files.length) return notice("There was no image. Drop or paste an image file, not a link to one.");
  if (!panes.length && !(await start())) return undefined;
  return images.add(files);
}

/** Do what a button asks for; a failure is shown. */
const doing = (action) => async () => {
  notice("");
  try {
    await action();
  } catch (error) {
    notice(error.message);
  }
};

function listen() {
  $("choose").addEventListener("click", () => $("files").click());
  $("target").addEventListener("click", () => $("files").click());
  $("files").addEventListener("change", async (event) => {
    const files = [...event.target.files];
    event.target.value = "";
    if (files.length) await add(files);
  });
  $("paste").addEventListener("click", doing(async () => {
    if (!navigator.clipboard?.read) throw new Error("This browser lets no page read the clipboard: press Ctrl+V instead.");
    const found = await readClipboard().catch(() => { throw new Error("The clipboard cannot be read: press Ctrl+V instead."); });
    await add(found);
  }));
  $("camera").addEventListener("click", doing(async () => {
    if (!navigator.mediaDevices) throw new Error("Browsers give the camera to pages from localhost and over HTTPS only.");
    const file = await takePicture($("camera-dialog")).catch(() => { throw new Error("There is no camera, or this page may not use it."); });
    if (file) await add([file]);
  }));
  document.addEventListener("paste", (event) => {
    if (event.target.closest?.("input")) return;
    event.preventDefault();
    add([...event.clipboardData.files]);
  });
  let depth = 0;
  const dragging = (by) => {
    depth = Math.max(0, depth + by);
    $("drop").hidden = depth === 0;
  };
  document.addEventListener("dragenter", (event) => { event.preventDefault(); dragging(1); });
  document.addEventListener("dragleave", () => dragging(-1));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    dragging(-depth);
    add([...event.dataTransfer.files]);
  });
  document.addEventListener("keydown", (event) => {
    if (event.target.closest("input, select, textarea, dialog, pre") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "ArrowLeft") images.go(images.index - 1);
    if (event.key === "ArrowRight") images.go(images.index + 1);
    if (event.key === "Escape") panes.forEach((pane) => pane.looking.cool());
  });
  $("compare").addEventListener("click", compare);
  $("key").addEventListener("click", async () => { if (await askForKey("")) await start(); });
  onKeyNeeded(askForKey);
}

let asking = null;

/** Ask the visitor for a key, once for all requests that need one; resolves to the key, or null. */
function askForKey(message) {
  asking ??= new Promise((resolve) => {
    const dialog = $("key-dialog"), input = $("key-input");
    $("key-error").textContent = message;
    $("key").hidden = false;
    input.value = "";
    $("key-cancel").onclick = () => dialog.close("");
    dialog.oncancel = () => { dialog.returnValue = ""; };
    dialog.onclose = () => {
      asking = null;
      const key = (dialog.returnValue && input.value.trim()) || null;
      if (key) setKey(key);
      resolve(key);
    };
    dialog.showModal();
  });
  return asking;
}

/** Get the models; a first pane for the default detector or, without one, the default classifier. */
async function start() {
  try {
    const { models } = await getJson("models");
    desk.models = models;
  } catch (error) {
    notice(error.message);
    return false;
  }
  $("key").hidden = !getKey();
  if (!panes.length && desk.models.length) {
    const defaults = desk.models.filter(({ is_default: usual }) => usual);
    const [first] = [...defaults, ...desk.models].sort((a, b) => (b.task === "object-detection") - (a.task === "object-detection"));
    await addPane().chooseModel(first.name, first.default_variant);
    await offerSamples([first, ...defaults.filter((model) => model !== first)]);
  }
  return panes.length > 0;
}

async function offerSamples(models) {
  const wanted = models.flatMap(({ name, samples }) => Array.from({ length: samples }, (_, number) => [name, number]));
  for (const [name, number] of wanted) {
    const blob = await getBlob(`models/${encodeURIComponent(name)}/samples/${number}`).catch(() => null);
    if (!blob) continue;
    const file = new File([blob], `${name}-${number}.png`, { type: blob.type });
    const image = element("img", { alt: `Sample ${number + 1} of ${name}`, src: URL.createObjectURL(blob) });
    $("samples").append(element("button", {
      on: { click: async () => { await panes[0].chooseModel(name); await add([file]); } },
    }, image));
    $("samples-title").hidden = false;
  }
}

listen();
start();

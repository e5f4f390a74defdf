/* Requests to the service, with the visitor's key; what fails throws an `ApiError`. */

export class ApiError extends Error {
  constructor(status, message, retryAfter) {
    super(message);
    Object.assign(this, { status, retryAfter });
  }
}

const KEY = "vitrine-key";
let askForKey = async () => null;

/** Call `ask(message)` when a key is needed; it resolves to the key, or null. */
export const onKeyNeeded = (ask) => { askForKey = ask; };
export const getKey = () => sessionStorage.getItem(KEY);
export const setKey = (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY));

async function send(path, options) {
  const key = getKey();
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  const message = await response.json().then((body) => body.error.message, () => `The server answered ${response.status}.`);
  if (response.status === 401 && (getKey() !== key || (await askForKey(message)))) return send(path, options);
  throw new ApiError(response.status, message, Number(response.headers.get("Retry-After")) || 0);
}

export const getJson = async (path) => (await send(path, {})).json();
export const getBlob = async (path) => (await send(path, {})).blob();

/** Ask about an image: return the answer, its text, the stages in milliseconds, and the time until it was here. */
export async function ask(route, image, parameters, signal) {
  const query = new URLSearchParams(parameters);
  const started = performance.now();
  const response = await send(`${route}?${query}`, { method: "POST", body: image, signal });
  const answer = await response.json();
  return { answer, stages: readTiming(response.headers.get("Server-Timing")), total: performance.now() - started };
}

function readTiming(header) {
  const entries = (header ?? "").split(",").map((part) => part.trim().match(/^([\w-]+);dur=([\d.]+)/));
  return entries.filter(Boolean).map(([, name, milliseconds]) => [name, Number(milliseconds)]);
}

// The public API as the page uses it: replies or errors in words, server-sent events, films as jobs.

const POLL_MILLISECONDS = 1000;

/** What the server refused: its words, the request's field that they are about, and when to try again. */
export class ApiError extends Error {
  constructor({ message, param = null }, retryAfter = null) {
    super(retryAfter ? `${message} Try again in ${retryAfter} s.` : message);
    this.param = param;
  }
}

let key = "";
let onKeyWanted = () => {};

/** The key is kept in this page alone: it is never stored, and never part of what is copied. */
export function useKey(value) {
  key = value;
}

export function whenKeyIsWanted(callback) {
  onKeyWanted = callback;
}

export function hasKey() {
  return key !== "";
}

export const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

/** The server's reply, or an ApiError with what its error object says. */
export async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  const reply = await fetch(path, { ...options, headers });
  if (reply.ok) return reply;
  if (reply.status === 401) onKeyWanted();
  const body = await reply.json().catch(() => null);
  const error = body?.error ?? { message: `The server answered ${reply.status}.` };
  throw new ApiError(error, reply.status === 429 ? reply.headers.get("Retry-After") : null);
}

function json(body, signal = null) {
  return { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal };
}

/** What /health/ready says, whatever its status; null where nothing answers. */
export async function readiness() {
  try {
    const reply = await fetch("health/ready");
    return { ready: reply.ok, ...(await reply.json()) };
  } catch {
    return null;
  }
}

export async function models() {
  return (await (await call("v1/models")).json()).data;
}

/** The payloads of a stream of server-sent events, until it ends. */
async function* eventsOf(reply) {
  const reader = reply.body.getReader();
  const decoder = new TextDecoder();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += decoder.decode(value, { stream: true });
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n").filter((line) => line.startsWith("data: "));
      const data = lines.map((line) => line.slice(6)).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function blobOf({ b64_json: text, output_format: format }) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: `image/${format}` });
}

/** Streams pictures: `onPartial(index, blob, size)` hears of lower stages' results, `onFinished(index, blob, rmd)` of
 * each finished picture. */
export async function drawPictures(body, { signal, onPartial, onFinished }) {
  const reply = await call("v1/images/generations", json({ ...body, stream: true }, signal));
  let left = body.n;
  for await (const news of eventsOf(reply)) {
    if (news.error) throw new ApiError(news.error);
    if (news.type === "image_generation.partial_image") onPartial(news.rmd.index, blobOf(news), news.size);
    if (news.type !== "image_generation.completed") continue;
    left -= 1;
    onFinished(news.rmd.index, blobOf(news), news.rmd);
  }
  if (left > 0) throw new ApiError({ message: "The connection was lost." });
}

/** Orders a film and polls its job; whoever aborts cancels the job. Returns the film and its `rmd` block. */
export async function drawFilm(body, { signal, onProgress }) {
  // The order itself is not to be stopped half way: the server might have taken a job that nobody here could cancel.
  let job = await (await call("v1/videos", json(body))).json();
  const path = `v1/videos/${job.id}`;
  let wait = POLL_MILLISECONDS;
  try {
    while (job.status === "queued" || job.status === "in_progress") {
      onProgress(job.status, job.progress);
      await pause(wait);
      const reply = await call(path, { signal });
      wait = Number(reply.headers.get("openai-poll-after-ms")) || POLL_MILLISECONDS;
      job = await reply.json();
    }
  } catch (error) {
    if (error.name === "AbortError") await call(path, { method: "DELETE" });
    throw error;
  }
  if (job.error) throw new ApiError({ message: job.error.message });
  const blob = await (await call(`${path}/content`, { signal })).blob();
  return { blob, rmd: job.rmd };
}

// The playground: what a client of the public API does, and nothing else. Every picture is streamed, so a cascade's
// low-resolution result is seen before the full one replaces it. A film is a job, which is polled.

const byId = (id) => document.getElementById(id);
const form = byId("form");
const POLL_MILLISECONDS = 1000;

let schedules = {};
let films = false;
let stop = new AbortController();

/** The server's answer, or an Error with the message of its error object. */
async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (byId("key").value) headers.Authorization = `Bearer ${byId("key").value}`;
  const reply = await fetch(path, { ...options, headers });
  if (reply.ok) return reply;
  if (reply.status === 401) byId("key-row").hidden = false;
  const body = await reply.json().catch(() => null);
  throw new Error(body?.error?.message ?? `The server answered ${reply.status}.`);
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
      const data = block.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function say(text, isError = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("error", isError);
}

/** Waits for the engines, saying how far they are, then fills in what the model offers. */
async function connect() {
  for (;;) {
    try {
      const reply = await fetch("health/ready");
      if (reply.ok) break;
      const { status, reason, progress } = await reply.json();
      say(reason ?? (progress ? `${progress.text} (${progress.done} of ${progress.total})` : status), Boolean(reason));
    } catch {
      say("the server does not answer", true);
    }
    await new Promise((resolve) => setTimeout(resolve, POLL_MILLISECONDS));
  }
  const [model] = (await (await call("v1/models")).json()).data;
  schedules = model.rmd.schedules;
  films = model.rmd.media === "video";
  byId("count").hidden = films;
  byId("model").textContent = model.id;
  byId("schedule").replaceChildren(
    ...Object.entries(schedules).map(([name, { stages }]) => {
      const steps = stages.map(({ steps, size }) => `${steps} at ${size}`).join(", ");
      return new Option(`${name}: ${steps}`, name, false, name === model.rmd.default_schedule);
    }),
  );
  showGuidance();
  byId("draw").disabled = false;
  say("ready");
  watchEngines().catch(() => {});
}

/** Says how many stations run compiled while engines are built, for as long as they are. */
async function watchEngines() {
  for (;;) {
    const { stations = {}, building } = await (await fetch("health/ready")).json().catch(() => ({}));
    const all = Object.values(stations);
    const compiled = all.filter((state) => state === "compiled").length;
    const left = building ? `, building engines: ${building.done} of ${building.total}` : "";
    byId("engines").textContent = compiled < all.length ? `${compiled} of ${all.length} stations compiled${left}` : "";
    if (!building) return;
    await new Promise((resolve) => setTimeout(resolve, 5 * POLL_MILLISECONDS));
  }
}

/** Guidance and the negative prompt belong to guided schedules alone: a student has its guidance distilled in. */
function showGuidance() {
  const guidance = schedules[byId("schedule").value]?.guidance_scale ?? null;
  for (const label of document.querySelectorAll(".guided")) label.hidden = guidance === null;
  byId("guidance").value = guidance ?? "";
}

function requestBody() {
  const body = {
    prompt: byId("prompt").value,
    schedule: byId("schedule").value,
  };
  if (!films) Object.assign(body, { n: byId("n").valueAsNumber, stream: true, partial_images: 1 });
  if (byId("seed").value) body.seed = byId("seed").valueAsNumber;
  if (schedules[body.schedule].guidance_scale !== null) {
    if (byId("guidance").value) body.guidance_scale = byId("guidance").valueAsNumber;
    if (byId("negative").value) body.negative_prompt = byId("negative").value;
  }
  return body;
}

/** A new article on top, with an empty frame for each picture. */
function newRun({ prompt, schedule, n = 1 }) {
  const run = byId("run").content.cloneNode(true).firstElementChild;
  run.querySelector("h2").textContent = prompt;
  run.querySelector("p").textContent = schedule;
  const [width, height] = schedules[schedule].size.split("x");
  const frames = Array.from({ length: n }, () => {
    const figure = document.createElement("figure");
    figure.append(document.createElement("a"), document.createElement("figcaption"));
    figure.style.setProperty("--ratio", `${width} / ${height}`);
    return figure;
  });
  run.querySelector(".pictures").append(...frames);
  byId("runs").prepend(run);
  return { run, frames };
}

function show(figure, prompt, event) {
  const link = figure.querySelector("a");
  const finished = event.type === "image_generation.completed";
  const image = document.createElement("img");
  image.alt = prompt;
  image.src = `data:image/${event.output_format};base64,${event.b64_json}`;
  image.className = finished ? "" : "partial";
  link.replaceChildren(image);
  if (!finished) {
    figure.querySelector("figcaption").textContent = event.size;
    return;
  }
  finish(figure, image.src, event.output_format, event.rmd);
}

/** What is finished can be saved, and says what it took. */
function finish(figure, url, suffix, { seed, seconds, speedup, cut_tokens: cut }) {
  const link = figure.querySelector("a");
  link.href = url;
  link.download = `${seed}.${suffix}`;
  const times = Object.entries(speedup).map(([kind, ratio]) => `, ${ratio.toPrecision(3)} x the ${kind} teacher`);
  const unheard = cut ? `; the prompt's last ${cut} tokens were not heard` : "";
  const took = `${seconds.compute.toPrecision(2)} s${times.join("")}`;
  figure.querySelector("figcaption").textContent = `seed ${seed}: ${took}${unheard}`;
}

/** Draws pictures into their frames as the stream brings them; returns how many were finished. */
async function drawPictures(body, frames) {
  const reply = await call("v1/images/generations", post(body));
  let finished = 0;
  for await (const news of eventsOf(reply)) {
    if (news.error) throw new Error(news.error.message);
    show(frames[news.rmd.index], body.prompt, news);
    finished += news.type === "image_generation.completed";
  }
  if (finished < frames.length) throw new Error("The connection was lost.");
  return finished;
}

/** Orders a film, polls its job and shows it in its frame; returns 1. Whoever stops it cancels the job. */
async function drawFilm(body, [figure]) {
  // Not to be stopped half way: the server might have taken a job that nobody here could cancel.
  let job = await (await call("v1/videos", { ...post(body), signal: null })).json();
  const path = `v1/videos/${job.id}`;
  try {
    while (job.status === "queued" || job.status === "in_progress") {
      say(job.status === "queued" ? "waiting" : `drawing: ${job.progress} %`);
      await new Promise((resolve) => setTimeout(resolve, POLL_MILLISECONDS));
      job = await (await call(path, { signal: stop.signal })).json();
    }
  } catch (error) {
    if (error.name === "AbortError") await call(path, { method: "DELETE" });
    throw error;
  }
  if (job.error) throw new Error(job.error.message);
  const content = await (await call(`${path}/content`, { signal: stop.signal })).blob();
  const video = document.createElement("video");
  Object.assign(video, { src: URL.createObjectURL(content), controls: true, loop: true, muted: true, autoplay: true });
  figure.prepend(video);
  figure.querySelector("a").textContent = "save";
  finish(figure, video.src, "mp4", job.rmd);
  return 1;
}

function post(body) {
  const headers = { "Content-Type": "application/json" };
  return { method: "POST", headers, body: JSON.stringify(body), signal: stop.signal };
}

async function draw(event) {
  event.preventDefault();
  if (byId("draw").disabled) return; // Enter submits whatever the button says
  const body = requestBody();
  const { run, frames } = newRun(body);
  const begin = performance.now();
  let finished = 0;
  stop = new AbortController();
  byId("draw").disabled = true;
  byId("stop").hidden = false;
  say("drawing");
  try {
    finished = await (films ? drawFilm : drawPictures)(body, frames);
    say(`${finished} in ${((performance.now() - begin) / 1000).toPrecision(2)} s`);
  } catch (error) {
    say(error.name === "AbortError" ? "stopped" : error.message, error.name !== "AbortError");
    frames.filter((frame) => !frame.querySelector("a[href]")).forEach((frame) => frame.remove());
    if (!run.querySelector("a[href]")) run.remove();
  } finally {
    byId("draw").disabled = false;
    byId("stop").hidden = true;
  }
}

form.addEventListener("submit", draw);
byId("schedule").addEventListener("change", showGuidance);
byId("stop").addEventListener("click", () => stop.abort());
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    form.requestSubmit();
  }
});
byId("key").addEventListener("change", () => connect().catch((error) => say(error.message, true)));
connect().catch((error) => say(error.message, true));

// The playground: what a client of the public API does, and nothing else. This file ties its parts together.

import { drawFilm, drawPictures, models, pause, readiness, useKey, whenKeyIsWanted } from "./api.js";
import { byId, make } from "./elements.js";
import { Form } from "./form.js";
import { Gallery } from "./gallery.js";
import { Lane } from "./lanes.js";
import { showReport } from "./report.js";
import { asCurl, asPython, copy } from "./snippets.js";
import { openShelf } from "./store.js";
import { sizeText, time } from "./words.js";

const POLL_MILLISECONDS = 1000;
const FALLBACK_AXIS_SECONDS = 10;

let form;
let gallery;
let lanes = [];
let stopping = new AbortController();
let busy = false;
let toSave = "";

function say(text, isError = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("error", isError);
}

function complain(error) {
  if (error.name === "AbortError") return say("Stopped.");
  form.blame(error);
  const named = !error.param || error.message.includes(error.param);
  return say(named ? error.message : `${error.param}: ${error.message}`, true);
}

function progressOf({ status, progress }) {
  return progress ? `${progress.text} (${progress.done} of ${progress.total})` : status;
}

/** Waits for the engines, saying how far they are, then fills in what the server offers. */
async function connect() {
  for (;;) {
    const state = await readiness();
    if (state?.ready) break;
    if (!state) say("The server does not answer.", true);
    else if (state.reason) say(state.reason, true);
    else say(progressOf(state));
    await pause(POLL_MILLISECONDS);
  }
  form.offer(await models());
  allow();
  say("Ready.");
  watchEngines().catch(() => {}); // it only informs
}

/** Says how many stations run compiled while engines are built, for as long as they are. */
async function watchEngines() {
  for (;;) {
    const { stations = {}, building } = (await readiness()) ?? {};
    const all = Object.values(stations);
    const compiled = all.filter((state) => state === "compiled").length;
    const left = building ? `, building engines: ${building.done} of ${building.total}` : "";
    byId("engines").textContent = compiled < all.length ? `${compiled} of ${all.length} stations compiled${left}` : "";
    if (!building) return;
    form.update(await models());
    await pause(5 * POLL_MILLISECONDS);
  }
}

/** Which buttons can be pressed now. None that may have the focus is taken away without passing it on. */
function allow() {
  const { model, films, canRace } = form;
  const focused = document.activeElement;
  byId("model").textContent = model?.id ?? "";
  byId("draw").disabled = !model;
  byId("draw").setAttribute("aria-disabled", String(busy));
  byId("draw").firstChild.textContent = films ? "Film " : "Draw ";
  byId("stop").hidden = !busy;
  byId("race").hidden = busy || !canRace; // Stop takes its place
  if (busy && focused === byId("race")) byId("stop").focus();
  if (!busy && focused === byId("stop")) byId(canRace ? "race" : "draw").focus();
}

/** The length of the track on which lanes run: the teacher's time, so that a student is seen to need a part of it. */
function axisOf(bodies) {
  const seconds = (name) => form.schedules[name]?.expected_seconds ?? 0;
  const longest = Math.max(seconds("teacher"), ...bodies.map(({ schedule }) => seconds(schedule)));
  return 1.05 * longest || FALLBACK_AXIS_SECONDS;
}

/** Draws each request in a lane of its own, all at once, keeps what is finished, and reports on it. */
async function run(bodies) {
  stopping = new AbortController();
  busy = true;
  allow();
  say("Drawing.");
  byId("report").hidden = true;
  const axis = { seconds: axisOf(bodies) };
  show(bodies.map((body) => newLane(body, axis)));
  bringIntoView(byId("stage"));
  const began = performance.now();
  const results = await Promise.allSettled(bodies.map((body, index) => drawInto(lanes[index], body)));
  busy = false;
  allow();
  models().then((offered) => form.update(offered)).catch(() => {}); // what schedules cost is learnt from what ran
  const failures = results.filter(({ status }) => status === "rejected").map(({ reason }) => reason);
  const items = results.map(({ value }) => value);
  const [first, second] = items;
  if (first) report(first, second);
  else if (second) report(second);
  if (failures.length) complain(failures[0]);
  else say(`Done in ${time((performance.now() - began) / 1000)}: ${gistShown()}.`);
}

/** On a phone the stage lies below the form: whoever draws wants to see it. */
function bringIntoView(element) {
  if (element.getBoundingClientRect().top > innerHeight / 2) element.scrollIntoView();
}

/** The headline as far as its figures, for the status line, which is also spoken. */
function gistShown() {
  return byId("report").querySelector(".headline").textContent.split(/[:.](?: |$)/)[0];
}

function newLane({ prompt, schedule, n = 1 }, axis) {
  const { size } = form.schedules[schedule];
  const lane = new Lane({
    title: schedule,
    prompt,
    frames: n,
    size,
    axis,
    onChosen: (item, figure) => {
      if (busy) return;
      lane.mark(figure);
      report(item);
    },
  });
  return lane;
}

/** Puts lanes on the stage, in place of those that were there. */
function show(newLanes) {
  for (const lane of lanes) lane.release();
  lanes = newLanes;
  byId("lanes").replaceChildren(...lanes.map(({ element }) => element));
  byId("lanes").classList.toggle("racing", lanes.length > 1);
}

/** Draws one request and returns the first of its items. */
async function drawInto(lane, body) {
  const { signal } = stopping;
  const media = form.films ? "video" : "image";
  const { size } = form.schedules[body.schedule];
  const kept = [];
  const keep = (index, blob, rmd) => {
    const { n: _n, ...request } = body;
    const { model, prompt, schedule } = body;
    const item = { when: Date.now(), media, model, prompt, schedule, size, rmd, blob };
    item.request = { ...request, seed: rmd.seed };
    lane.finished(index, item);
    kept[index] = gallery.add(item);
  };
  lane.start();
  try {
    if (media === "video") {
      const onProgress = (status, percent) => {
        const words = status === "queued" ? "waiting in line" : `${percent} %`;
        lane.progress(words);
        say(`${body.schedule}: ${words}.`);
      };
      const { blob, rmd } = await drawFilm(body, { signal, onProgress });
      keep(0, blob, rmd);
    } else {
      const onPartial = (...news) => {
        lane.partial(...news);
        say(`A first picture at ${sizeText(news[2])}.`);
      };
      await drawPictures({ ...body, partial_images: 1 }, { signal, onPartial, onFinished: keep });
    }
  } catch (error) {
    lane.failed(error.name === "AbortError" ? "Stopped." : error.message);
    await Promise.all(kept);
    throw error;
  } finally {
    lane.stop();
  }
  return (await Promise.all(kept))[0];
}

/** Shows an item's times, beside those of a rival of the same seed, and what can be done with it. */
function report(item, rival) {
  showReport(byId("report"), item, rival, actionsFor(item));
  gallery.mark(item);
}

/** Shows an item of the gallery as if it had just been drawn. */
function open(item) {
  if (busy) return;
  const { prompt, size } = item;
  const lane = new Lane({ title: prompt, prompt, frames: 1, size });
  show([lane]);
  lane.finished(0, item);
  report(item);
}

function actionsFor(item) {
  const action = (words, work) => {
    const button = make("button", "quiet", words);
    button.type = "button";
    button.addEventListener("click", () => Promise.resolve(work()).catch(complain));
    return button;
  };
  const copied = (text, what) => copy(text).then(() => say(`Copied as ${what}.`));
  const save = make("a", "quiet", "Save");
  URL.revokeObjectURL(toSave);
  toSave = URL.createObjectURL(item.blob);
  save.href = toSave;
  save.download = `${item.rmd.seed}.${item.blob.type.split("/")[1]}`;
  const actions = [
    action("Use again", () => form.fill(item.request)),
    action("Copy as curl", () => copied(asCurl(item), "curl")),
    action("Copy as Python", () => copied(asPython(item), "Python")),
    save,
    action("Delete", () => remove(item)),
  ];
  const group = make("div", "actions", ...actions);
  group.setAttribute("role", "group");
  group.setAttribute("aria-label", "This item");
  return group;
}

async function remove(item) {
  await gallery.remove(item);
  showLatest();
  if (document.activeElement === document.body) byId("stage").focus(); // the button that was pressed is gone
  say("Deleted.");
}

async function clear() {
  if (!confirm("Delete everything in the gallery?")) return;
  await gallery.clear();
  showLatest();
  say("The gallery is empty.");
}

/** What the stage holds when nothing is being drawn; what was deleted is to be seen nowhere. */
function showLatest() {
  if (busy) return;
  show([]);
  byId("report").hidden = true;
  if (gallery.latest) open(gallery.latest);
}

/** Starts drawing unless something is being drawn or the form lacks something, which the browser then says. */
function begin(bodiesOf) {
  if (busy || byId("draw").disabled || !byId("form").reportValidity()) return;
  run(bodiesOf()).catch(complain);
}

async function main() {
  form = new Form({ onChange: allow });
  gallery = new Gallery({
    list: byId("gallery"),
    note: byId("gallery-note"),
    shelf: await openShelf(),
    onOpen: open,
    onDelete: (item) => remove(item).catch(complain),
  });
  whenKeyIsWanted(() => (byId("key-row").hidden = false));
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    begin(() => [form.request()]);
  });
  byId("race").addEventListener("click", () => begin(() => form.race()));
  byId("stop").addEventListener("click", () => stopping.abort());
  byId("clear").addEventListener("click", () => clear().catch(complain));
  document.addEventListener("keydown", (event) => {
    const typed = event.target === byId("prompt") && !event.shiftKey;
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey || typed)) {
      event.preventDefault();
      byId("form").requestSubmit();
    }
    if (event.key === "Escape") stopping.abort();
  });
  byId("key").addEventListener("change", () => {
    useKey(byId("key").value);
    connect().catch(complain);
  });
  await gallery.load();
  showLatest();
  await connect();
}

main().catch(complain);

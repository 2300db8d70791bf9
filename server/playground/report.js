// Where a picture's time went, and the teacher's time on the same axis: the speed-up is to be seen, not read.

import { make } from "./elements.js";
import { ago, ratio, sizeText, time } from "./words.js";

const STEADY_SPREAD = 1.5; // as the server has it: above that it tells no speed-up

/** The parts of an item's time, in the order in which they were spent. */
function partsOf({ rmd }) {
  const { seconds, stages } = rmd;
  const last = stages.length - 1;
  return [
    { kind: "queue", name: "queue", seconds: seconds.queue },
    { kind: "text", name: "text", seconds: seconds.encode },
    ...stages.map(({ size, steps, seconds: took }, index) => {
      const name = `${steps} ${steps === 1 ? "step" : "steps"} at ${sizeText(size)}`;
      return { kind: index === last ? "full" : "low", name, seconds: took };
    }),
    { kind: "decode", name: "decode", seconds: seconds.decode },
    { kind: "package", name: "package", seconds: seconds.package },
  ];
}

const sum = (parts) => parts.reduce((total, { seconds }) => total + seconds, 0);

/** The rows to compare: what was drawn, what it raced against, and else the teacher's own figures. */
function rowsOf(item, rival) {
  const rows = [{ name: item.schedule, parts: partsOf(item) }];
  if (rival) rows.push({ name: rival.schedule, parts: partsOf(rival) });
  else if (item.schedule !== "teacher") {
    for (const [kind, seconds] of Object.entries(item.rmd.teacher_seconds)) {
      rows.push({ name: `teacher, ${kind}`, parts: [{ kind: "teacher", name: "teacher", seconds }] });
    }
  }
  return rows;
}

/** A round step that divides an axis into at most five parts. */
function tickStep(length) {
  const power = 10 ** Math.floor(Math.log10(length / 5));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => length / step <= 5);
}

function bar(parts, length) {
  const row = make("div", "bar");
  for (const { kind, name, seconds } of parts) {
    const part = make("span", `part ${kind}`);
    part.style.width = `${(100 * seconds) / length}%`;
    part.title = `${name}: ${time(seconds)}`;
    row.append(part);
  }
  return row;
}

/** Bars on one axis. Their numbers stand beside them as text; the drawing itself is hidden from screen readers. */
function comparison(rows) {
  const length = 1.02 * Math.max(...rows.map(({ parts }) => sum(parts)));
  const chart = make("div", "chart");
  for (const { name, parts } of rows) {
    const drawn = bar(parts, length);
    drawn.setAttribute("aria-hidden", "true");
    chart.append(make("span", "name", name), drawn, make("span", "value", time(sum(parts))));
  }
  const axis = make("div", "axis");
  axis.setAttribute("aria-hidden", "true");
  const step = tickStep(length);
  for (let at = 0; at <= length; at += step) {
    const tick = make("span", "tick", at === 0 ? "0" : time(at));
    tick.style.left = `${(100 * at) / length}%`;
    axis.append(tick);
  }
  chart.append(axis);
  return chart;
}

/** One picture's own bar, magnified to the full width, with its parts by name. */
function breakdown(item) {
  const parts = partsOf(item);
  const drawn = bar(parts, Math.max(sum(parts), 1e-9));
  drawn.classList.add("magnified");
  drawn.setAttribute("aria-hidden", "true");
  const list = make("dl", "legend");
  for (const { kind, name, seconds } of parts) {
    const term = make("dt", "", make("span", `swatch ${kind}`), name);
    const known = kind === "text" && seconds === 0; // the server keeps what it has encoded
    list.append(make("div", "", term, make("dd", "", known ? "known already" : time(seconds))));
  }
  return [make("h3", "", `Where the time of ${item.schedule} went`), drawn, list];
}

const faster = (times) => (times < 1 ? "as fast as" : "faster than");

/** The headline: how many times faster, or why no such figure is told. */
function headline(item, rival) {
  const { seconds, speedup = {}, teacher_seconds: teacher = {}, teacher_age_seconds: age = {} } = item.rmd;
  if (rival) {
    const theirs = rival.rmd.seconds.compute;
    const against = `${time(seconds.compute)} of work against ${time(theirs)}`;
    const words = `${faster(theirs / seconds.compute)} the teacher, from the same seed: ${against}.`;
    return { figure: ratio(theirs / seconds.compute), words };
  }
  if (item.schedule === "teacher") {
    return { figure: time(seconds.compute), words: "of work: this is the teacher itself." };
  }
  const kind = "eager" in speedup ? "eager" : Object.keys(speedup)[0];
  if (!kind) {
    const unsteady = Object.values(item.rmd.teacher_spread ?? {}).some((spread) => spread > STEADY_SPREAD);
    const lost = "The teacher's timings lie too far apart to tell a speed-up.";
    return { figure: time(seconds.compute), words: `of work. ${unsteady ? lost : "The teacher is not timed here."}` };
  }
  const timed = kind in age ? `, timed ${ago(age[kind])}` : "";
  const against = `${time(seconds.compute)} of work against ${time(teacher[kind])}${timed}`;
  return { figure: ratio(speedup[kind]), words: `${faster(speedup[kind])} the ${kind} teacher: ${against}.` };
}

/** What else is known: facts as pairs of words. */
function facts({ when, model, schedule, size, rmd }) {
  const company = Math.max(1, ...rmd.stages.flatMap(({ batch_sizes: sizes = [] }) => sizes));
  const shown = [
    ["seed", String(rmd.seed)],
    ["schedule", schedule],
    ["size", sizeText(size)],
    ["model", model],
    ["runs", rmd.executor],
    ["drawn", new Date(when).toLocaleString()],
  ];
  if (company > 1) shown.push(["shared a batch of", String(company)]);
  if (rmd.note) shown.push(["note", rmd.note]);
  if (rmd.cut_tokens) shown.push(["not heard", `the prompt's last ${rmd.cut_tokens} tokens`]);
  const pairs = shown.map(([name, value]) => make("div", "", make("dt", "", name), make("dd", "", value)));
  return make("dl", "facts", ...pairs);
}

/** Fills `element` with the report on an item, beside a rival that drew the same seed, where there is one. */
export function showReport(element, item, rival, actions) {
  const { figure, words } = headline(item, rival);
  element.replaceChildren(
    make("p", "headline", make("strong", "", figure), " ", words),
    comparison(rowsOf(item, rival)),
    ...breakdown(item),
    facts(item),
    actions,
  );
  element.hidden = false;
}

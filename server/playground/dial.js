// The schedules as a dial, least work on the left, and what the chosen one costs. The slider under the drawing is the
// real control: it has the arrow keys, the touch and the words that a screen reader says. The drawing is clicked, too.

import { ratio, sizeText, time } from "./words.js";

const SVG = "http://www.w3.org/2000/svg";
const [CENTRE_X, CENTRE_Y, RADIUS] = [150, 136, 92];

function svg(name, attributes, text = "") {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return element;
}

/** The point at a share of the way from left (0) over the top to the right (1). */
function at(share, radius = RADIUS) {
  const angle = Math.PI * (1 - share);
  return [CENTRE_X + radius * Math.cos(angle), CENTRE_Y - radius * Math.sin(angle)];
}

function arc(share) {
  const [fromX, fromY] = at(0);
  const [toX, toY] = at(share);
  return `M ${fromX} ${fromY} A ${RADIUS} ${RADIUS} 0 0 1 ${toX} ${toY}`;
}

/** Denoising work in pixels: what schedules are ordered by, since timings of like ones change places on a busy day. */
function work({ stages, guidance_scale: guidance }) {
  const pixels = (size) => size.split("x").reduce((product, side) => product * Number(side), 1);
  return stages.reduce((sum, { steps, size }) => sum + steps * pixels(size), 0) * (guidance === null ? 1 : 2);
}

/** How often the denoiser sees a picture: guided steps see it twice, with and without the prompt. */
function passes({ stages, guidance_scale: guidance }) {
  return stages.reduce((sum, { steps }) => sum + steps, 0) * (guidance === null ? 1 : 2);
}

export class Dial {
  constructor({ drawing, slider, words, onChange }) {
    Object.assign(this, { drawing, slider, words, onChange, names: [], schedules: {} });
    slider.addEventListener("input", () => this.#changed());
  }

  /** Shows a model's schedules, the one of least work first. */
  offer(schedules, chosen) {
    this.schedules = schedules;
    this.names = Object.keys(schedules).sort((one, other) => work(schedules[one]) - work(schedules[other]));
    this.slider.max = this.names.length - 1;
    this.#draw();
    this.value = chosen;
  }

  /** The same schedules, for which the server may expect other costs by now. */
  update(schedules) {
    if (this.names.some((name) => !(name in schedules))) return;
    this.schedules = schedules;
    this.#changed();
  }

  get value() {
    return this.names[this.slider.valueAsNumber];
  }

  set value(name) {
    const index = this.names.indexOf(name);
    if (index >= 0) this.slider.value = index;
    this.#changed();
  }

  get schedule() {
    return this.schedules[this.value];
  }

  #share(index) {
    return this.names.length > 1 ? index / (this.names.length - 1) : 0.5;
  }

  #draw() {
    const whole = svg("path", { d: arc(1), class: "arc" });
    this.drawing.replaceChildren(whole, svg("path", { class: "arc spent" }));
    this.names.forEach((name, index) => {
      const share = this.#share(index);
      const [x, y] = at(share);
      const [labelX, labelY] = at(share, RADIUS + 20);
      const anchor = share < 0.4 ? "end" : share > 0.6 ? "start" : "middle";
      // At the two ends a label beside the arc would leave the drawing: it stands below.
      const beside = { x: labelX, y: labelY + 4, "text-anchor": anchor };
      const below = { x, y: y + 28, "text-anchor": "middle" };
      const label = svg("text", share === 0 || share === 1 ? below : beside, name);
      const notch = svg("g", { class: "notch" });
      const target = svg("circle", { cx: x, cy: y, r: 22, class: "target" });
      notch.append(target, svg("circle", { cx: x, cy: y, r: 5 }), label);
      notch.addEventListener("click", () => {
        this.value = name;
        this.slider.focus();
      });
      this.drawing.append(notch);
    });
    this.drawing.append(
      svg("circle", { r: 9, class: "hand" }),
      svg("text", { x: CENTRE_X, y: CENTRE_Y - 22, class: "cost" }),
      svg("text", { x: CENTRE_X, y: CENTRE_Y + 2, class: "passes" }),
    );
  }

  #changed() {
    if (!this.schedule) return;
    const share = this.#share(this.slider.valueAsNumber);
    const [x, y] = at(share);
    this.drawing.querySelector(".spent").setAttribute("d", arc(share));
    const hand = this.drawing.querySelector(".hand");
    hand.setAttribute("cx", x);
    hand.setAttribute("cy", y);
    this.drawing.querySelectorAll(".notch").forEach((notch, index) => {
      notch.classList.toggle("chosen", index === this.slider.valueAsNumber);
    });
    const { expected_seconds: seconds, stages, note } = this.schedule;
    const seen = `${passes(this.schedule)} passes`;
    this.drawing.querySelector(".cost").textContent = seconds ? time(seconds) : seen;
    this.drawing.querySelector(".passes").textContent = seconds ? seen : "";
    const steps = stages.map(({ steps: count, size }) => `${count} at ${sizeText(size)}`).join(", then ");
    const remark = note ? ` It is ${note}.` : "";
    this.words.textContent = `Steps: ${steps}.${this.#besideTheTeacher()}${remark}`;
    const cost = seconds ? `about ${time(seconds)}, ${seen}` : seen;
    this.slider.setAttribute("aria-valuetext", `${this.value}: ${cost}. ${this.words.textContent}`);
    this.onChange();
  }

  #besideTheTeacher() {
    const mine = this.schedule.expected_seconds;
    const teacher = this.schedules.teacher?.expected_seconds;
    if (this.value === "teacher" || !mine || !(teacher > mine)) return "";
    return ` The teacher takes ${ratio(teacher / mine)} as long here.`;
  }
}

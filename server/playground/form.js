// The form: which model, what to draw, by which schedule, and whose fault an error is.

import { Dial } from "./dial.js";
import { byId, make } from "./elements.js";

const IDEAS = {
  image: [
    "red apple, noto style",
    "rocket, twemoji style",
    "sailboat, fluent 3d style",
    "maple leaf, fluent flat style",
    "snowman, noto style",
    "guitar, fluent 3d style",
  ],
  video: [
    "rocket, noto style, moving up",
    "red apple, noto style, bouncing",
    "sailboat, fluent flat style, moving left to right",
    "snowman, noto style, turning clockwise slowly",
  ],
};

/** The input that holds a field of the request, by the name that the server's errors use. */
const INPUTS = {
  prompt: "prompt",
  n: "n",
  seed: "seed",
  schedule: "schedule",
  model: "models",
  guidance_scale: "guidance",
  negative_prompt: "negative",
};

export class Form {
  #guided = null; // the schedule whose guidance is shown

  constructor({ onChange }) {
    this.models = [];
    this.model = null;
    this.onChange = onChange;
    this.dial = new Dial({
      drawing: byId("dial"),
      slider: byId("schedule"),
      words: byId("schedule-words"),
      onChange: () => this.#showGuidance(),
    });
    byId("form").addEventListener("input", () => this.blame(null));
  }

  /** Fills in what the server offers; keeps the model that was chosen where it is still there. */
  offer(models) {
    this.models = models;
    byId("models").hidden = models.length < 2;
    const choices = models.map(({ id, rmd }) => {
      const radio = make("input");
      Object.assign(radio, { type: "radio", name: "model", value: id });
      radio.addEventListener("change", () => this.#choose(id));
      return make("label", "", radio, id, " ", make("small", "", rmd.media === "video" ? "films" : "pictures"));
    });
    byId("models").replaceChildren(make("legend", "", "Model"), ...choices);
    this.#choose(models.some(({ id }) => id === this.model?.id) ? this.model.id : models[0].id);
  }

  /** Takes over what the server has learnt since, without moving anything that was chosen. */
  update(models) {
    const known = models.find(({ id }) => id === this.model?.id);
    if (!known) return;
    this.models = models;
    this.model = known;
    this.dial.update(known.rmd.schedules);
  }

  get films() {
    return this.model?.rmd.media === "video";
  }

  get schedules() {
    return this.model.rmd.schedules;
  }

  /** Whether there is a teacher to race against. */
  get canRace() {
    return Boolean(this.model && "teacher" in this.schedules && Object.keys(this.schedules).length > 1);
  }

  #choose(id) {
    this.model = this.models.find((model) => model.id === id);
    this.#guided = null;
    for (const radio of byId("models").querySelectorAll("input")) radio.checked = radio.value === id;
    byId("count").hidden = this.films;
    this.dial.offer(this.schedules, this.model.rmd.default_schedule);
    this.#showIdeas();
    this.onChange();
  }

  #showIdeas() {
    const chips = IDEAS[this.films ? "video" : "image"].map((idea) => {
      const chip = make("button", "chip", idea);
      chip.type = "button";
      chip.addEventListener("click", () => {
        byId("prompt").value = idea;
        this.blame(null);
        byId("prompt").focus();
      });
      return make("li", "", chip);
    });
    byId("ideas").replaceChildren(...chips);
  }

  /** Guidance and the negative prompt belong to guided schedules alone: a student has its guidance distilled in. */
  #showGuidance() {
    if (this.dial.value === this.#guided) return;
    this.#guided = this.dial.value;
    const guidance = this.dial.schedule.guidance_scale;
    for (const label of document.querySelectorAll(".guided")) label.hidden = guidance === null;
    byId("guidance").value = guidance ?? "";
  }

  /** The request that the form describes. */
  request() {
    const body = { model: this.model.id, prompt: byId("prompt").value, schedule: this.dial.value };
    if (!this.films) body.n = byId("n").valueAsNumber;
    if (byId("seed").value) body.seed = byId("seed").valueAsNumber;
    if (this.dial.schedule.guidance_scale !== null) {
      if (byId("guidance").value) body.guidance_scale = byId("guidance").valueAsNumber;
      if (byId("negative").value) body.negative_prompt = byId("negative").value;
    }
    return body;
  }

  /** Two requests that differ in their schedule alone: the chosen one (or else the default) and the teacher. */
  race() {
    const { guidance_scale: _guidance, negative_prompt: _negative, n: _n, ...common } = this.request();
    common.seed ??= crypto.getRandomValues(new Uint32Array(1))[0];
    if (!this.films) common.n = 1;
    const runner = common.schedule === "teacher" ? this.model.rmd.default_schedule : common.schedule;
    return [{ ...common, schedule: runner }, { ...common, schedule: "teacher" }];
  }

  /** Fills the form with an earlier request; what the server no longer offers stays as it is. */
  fill({ model, prompt, schedule, seed, guidance_scale: guidance, negative_prompt: negative }) {
    if (model !== this.model?.id && this.models.some(({ id }) => id === model)) this.#choose(model);
    byId("prompt").value = prompt;
    byId("seed").value = seed ?? "";
    byId("n").value = 1;
    this.dial.value = schedule;
    if (guidance !== undefined) byId("guidance").value = guidance;
    byId("negative").value = negative ?? "";
    byId("prompt").focus();
  }

  /** Marks the input that an error is about and goes there; null takes the mark away. */
  blame(error) {
    for (const input of document.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
    const input = error?.param ? byId(INPUTS[error.param] ?? "") : null;
    if (!input) return;
    input.setAttribute("aria-invalid", "true");
    input.focus();
  }
}

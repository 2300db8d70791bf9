// What is being drawn: a lane for each request, with a clock that runs, and a frame for each picture. The low stage's
// picture is shown first, and sharpens into the final one.

import { make } from "./elements.js";
import { sizeText, time } from "./words.js";

/** A picture or a film from a blob, and its address. */
export function mediaOf({ media, prompt, blob }, { playing = true } = {}) {
  const element = document.createElement(media === "video" ? "video" : "img");
  element.src = URL.createObjectURL(blob);
  if (media !== "video") {
    element.alt = prompt;
    return element;
  }
  element.setAttribute("aria-label", prompt);
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  Object.assign(element, { controls: playing, autoplay: playing && !still });
  Object.assign(element, { loop: true, muted: true, playsInline: true });
  return element;
}

/** Takes an element away, and gives back the memory of the pictures and films in it. */
function letGo(element) {
  for (const { src } of [element, ...element.querySelectorAll("img, video")]) {
    if (src) URL.revokeObjectURL(src);
  }
  element.remove();
}

export class Lane {
  #began = 0;
  #running = false;

  /** `axis.seconds` is the length of the track that the lanes of one race share; no axis where nothing runs. */
  constructor({ title, prompt, frames, size, axis = null, onChosen = () => {} }) {
    Object.assign(this, { axis, prompt, onChosen });
    const [width, height] = size.split("x");
    this.clock = make("span", "clock");
    this.runner = make("div", "runner");
    this.track = make("div", "track", this.runner);
    this.track.setAttribute("aria-hidden", "true");
    this.track.hidden = axis === null;
    this.clock.setAttribute("aria-hidden", "true"); // the status line says what matters
    this.pictures = make("div", frames === 1 ? "pictures single" : "pictures");
    this.note = make("p", "note");
    this.element = make("article", "lane", make("h3", "", title, this.clock), this.track, this.pictures, this.note);
    this.frames = Array.from({ length: frames }, () => {
      const figure = make("figure", "waiting", make("div", "frame"), make("figcaption", "", "drawing"));
      figure.style.setProperty("--ratio", `${width} / ${height}`);
      this.pictures.append(figure);
      return figure;
    });
  }

  start() {
    this.#began = performance.now();
    this.#running = true;
    const tick = () => {
      if (!this.#running) return;
      this.#showClock();
      requestAnimationFrame(tick);
    };
    tick();
  }

  stop() {
    if (this.#running) this.#showClock();
    this.#running = false;
  }

  get seconds() {
    return (performance.now() - this.#began) / 1000;
  }

  #showClock() {
    const { seconds } = this;
    this.clock.textContent = `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
    // Whoever runs beyond the expected end makes the track longer for all lanes, the finished ones too.
    this.axis.seconds = Math.max(this.axis.seconds, seconds);
    this.element.parentElement?.style.setProperty("--axis", this.axis.seconds);
    this.runner.style.setProperty("--seconds", seconds);
  }

  partial(index, blob, size) {
    const figure = this.frames[index];
    const image = mediaOf({ media: "image", prompt: `${this.prompt}, still at ${sizeText(size)}`, blob });
    image.className = "partial";
    figure.querySelector(".frame").replaceChildren(image);
    figure.className = "partly";
    figure.querySelector("figcaption").textContent = `${sizeText(size)}, ${time(this.seconds)}`;
  }

  /** The finished picture or film lies over the partial one and fades in; a click chooses it. */
  finished(index, item) {
    const figure = this.frames[index];
    const frame = figure.querySelector(".frame");
    const media = mediaOf(item);
    media.classList.add("final");
    figure.className = "done";
    figure.querySelector("figcaption").textContent = `seed ${item.rmd.seed}`;
    if (item.media === "video") {
      frame.replaceChildren(media);
      return;
    }
    const button = make("button", "frame", ...frame.childNodes, media);
    button.type = "button";
    button.setAttribute("aria-label", `${item.prompt}, seed ${item.rmd.seed}: show its times`);
    button.addEventListener("click", () => this.onChosen(item, figure));
    frame.replaceWith(button);
    media.addEventListener("animationend", () => button.querySelectorAll(".partial").forEach(letGo));
  }

  /** Says what went wrong, and takes away the frames that stayed empty. */
  failed(message) {
    this.note.textContent = message;
    for (const figure of this.frames) {
      if (figure.className !== "done") letGo(figure);
    }
  }

  progress(words) {
    for (const figure of this.frames) figure.querySelector("figcaption").textContent = words;
  }

  /** Marks the chosen frame; null marks none. */
  mark(chosen) {
    for (const figure of this.frames) figure.classList.toggle("chosen", figure === chosen);
  }

  /** Leaves the page. */
  release() {
    letGo(this.element);
  }
}

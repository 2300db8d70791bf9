// The gallery: what was drawn in this browser, the latest first. An item opens with a click and goes with Delete.

import { make } from "./elements.js";
import { mediaOf } from "./lanes.js";
import { MOST_ITEMS } from "./store.js";

export class Gallery {
  #items = []; // the latest first
  #entries = new Map(); // id -> list entry

  constructor({ list, note, shelf, onOpen, onDelete }) {
    Object.assign(this, { list, note, shelf, onOpen, onDelete });
    list.addEventListener("keydown", (event) => this.#onKey(event));
  }

  get latest() {
    return this.#items[0];
  }

  async load() {
    for (const item of await this.shelf.all()) this.#show(item);
    this.#tell();
  }

  /** Keeps an item, gives it its id, and lets the oldest go where there are too many. Returns it. */
  async add(item) {
    try {
      item.id = await this.shelf.add(item);
    } catch {
      // A full disk must not lose the picture that is on the screen.
      this.note.textContent = "This browser has no room left: the latest items will not survive a reload.";
      item.id = `unkept ${crypto.getRandomValues(new Uint32Array(1))[0]}`;
      this.#show(item);
      return item;
    }
    this.#show(item);
    while (this.#items.length > MOST_ITEMS) await this.remove(this.#items.at(-1));
    this.#tell();
    return item;
  }

  async remove(item) {
    const entry = this.#entries.get(item.id);
    const neighbour = entry?.nextElementSibling ?? entry?.previousElementSibling;
    if (entry?.contains(document.activeElement)) neighbour?.querySelector("button").focus();
    if (entry) URL.revokeObjectURL(entry.querySelector("img, video").src);
    entry?.remove();
    this.#entries.delete(item.id);
    this.#items = this.#items.filter(({ id }) => id !== item.id);
    if (typeof item.id === "number") await this.shelf.remove(item.id);
    this.#tell();
  }

  async clear() {
    for (const item of [...this.#items]) await this.remove(item);
  }

  /** Marks the item that is shown above. */
  mark(item) {
    for (const [id, entry] of this.#entries) entry.classList.toggle("chosen", id === item?.id);
  }

  #show(item) {
    const button = make("button", "", mediaOf(item, { playing: false }), make("span", "badge", item.schedule));
    button.type = "button";
    button.setAttribute("aria-label", `${item.prompt}, ${item.schedule}, seed ${item.rmd.seed}`);
    button.title = item.prompt;
    button.addEventListener("click", () => this.onOpen(item));
    const entry = make("li", "", button);
    entry.item = item;
    this.#items.unshift(item);
    this.#entries.set(item.id, entry);
    this.list.prepend(entry);
  }

  /** Arrow keys walk through the items, Delete lets one go. */
  #onKey(event) {
    const entry = event.target.closest("li");
    const steps = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" };
    if (event.key === "Delete") this.onDelete(entry.item);
    else if (event.key in steps) entry[steps[event.key]]?.querySelector("button").focus();
    else return;
    event.preventDefault();
  }

  #tell() {
    const count = this.#items.length;
    const where = this.shelf.lasting ? "kept in this browser alone" : "this browser keeps nothing: a reload empties it";
    const what = count ? `${count} of at most ${MOST_ITEMS}` : "What you draw is gathered here";
    this.note.textContent = `${what}, ${where}.`;
    this.list.parentElement.classList.toggle("empty", count === 0);
  }
}

// The gallery's shelf: an IndexedDB of this browser, so that what was drawn is there after a reload. Where a browser
// keeps nothing (some private windows), memory stands in until the page is left.

const NAME = "rmd-playground";
const ITEMS = "items";

/** How many pictures and films are kept; the oldest leave first. */
export const MOST_ITEMS = 60;

function settled(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

class Shelf {
  constructor(database) {
    this.database = database;
    this.lasting = true;
  }

  #items(mode) {
    return this.database.transaction(ITEMS, mode).objectStore(ITEMS);
  }

  /** Every item, the oldest first. */
  all() {
    return settled(this.#items("readonly").getAll());
  }

  /** Keeps an item and returns its id. */
  add(item) {
    return settled(this.#items("readwrite").add(item));
  }

  remove(id) {
    return settled(this.#items("readwrite").delete(id));
  }
}

class ShelfInMemory {
  lasting = false;
  #next = 1;
  #items = new Map();

  async all() {
    return [...this.#items.values()];
  }

  async add(item) {
    this.#items.set(this.#next, { ...item, id: this.#next });
    return this.#next++;
  }

  async remove(id) {
    this.#items.delete(id);
  }
}

export async function openShelf() {
  try {
    const opening = indexedDB.open(NAME, 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore(ITEMS, { keyPath: "id", autoIncrement: true });
    return new Shelf(await settled(opening));
  } catch {
    return new ShelfInMemory();
  }
}

// Elements of the page, found and made. Children are text or elements: nothing here ever reads a text as markup.

export const byId = (id) => document.getElementById(id);

export function make(tag, className = "", ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

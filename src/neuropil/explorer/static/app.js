"use strict";
// What all pages share: sending by Ctrl+Enter, SQL examples, and keeping the focus where it was.

document.addEventListener("keydown", (event) => {
  const box = event.target.closest?.("[data-submit]");
  if (box && event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    box.form.requestSubmit();
  }
});

document.addEventListener("click", (event) => {
  const example = event.target.closest?.("[data-sql]");
  if (example) {
    const box = document.getElementById("sql");
    box.value = example.dataset.sql;
    box.form.requestSubmit();
  }
});

// On a phone the filters would push the table off the screen: folded, unless one is in use.
const filters = document.querySelector("details.extra");
const used = filters && [...filters.querySelectorAll("input, select")].some((e) => e.value);
if (filters && !used && matchMedia("(max-width: 760px)").matches) filters.open = false;

let kept = null;
document.addEventListener("htmx:beforeSwap", () => {
  const active = document.activeElement;
  kept = active?.dataset?.keep ?? (active?.name === "sort" ? "select" : null);
});
document.addEventListener("htmx:afterSettle", () => {
  if (kept === null) return;
  const again = kept === "select"
    ? document.querySelector("select[name=sort]")
    : [...document.querySelectorAll("[data-keep]")].find((e) => e.dataset.keep === kept);
  again?.focus({ preventScroll: true });
  kept = null;
});

// A request that fails says so where its answer would have stood.
document.addEventListener("htmx:responseError", (event) => {
  const place = event.detail.target;
  if (!place || place.id === "model") return;
  const note = document.createElement("p");
  note.className = "problem";
  note.setAttribute("role", "alert");
  const text = new DOMParser().parseFromString(event.detail.xhr.responseText, "text/html").body.textContent;
  note.textContent = text.trim() || "That did not work.";
  place.replaceChildren(note);
});

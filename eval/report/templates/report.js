"use strict";
document.documentElement.classList.add("scripted");

const sortBy = (head, body) => {
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = row => row.cells[head.cellIndex];
  const compare = (a, b) => a.dataset.n && b.dataset.n
    ? a.dataset.n - b.dataset.n : a.textContent.localeCompare(b.textContent, undefined, {numeric: true});
  body.append(...[...body.rows].sort((a, b) => (up ? 1 : -1) * compare(key(a), key(b))));
};
for (const head of document.querySelectorAll("th")) { // buttons only where a script can serve them
  const button = document.createElement("button");
  button.textContent = head.textContent;
  button.addEventListener("click", () => sortBy(head, head.closest("table").tBodies[0]));
  head.replaceChildren(button);
}

const tip = document.getElementById("tip");
const show = event => {
  const mark = event.target.closest("[data-tip]");
  tip.hidden = !mark;
  if (!mark) return;
  tip.textContent = mark.dataset.tip;
  const left = Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8);
  const top = event.clientY - tip.offsetHeight - 10;
  tip.style.left = Math.max(8, left) + "px";
  tip.style.top = (top < 8 ? event.clientY + 16 : top) + "px";
};
document.addEventListener("pointerover", show);
document.addEventListener("click", show);

addEventListener("beforeprint", () => {
  for (const closed of document.querySelectorAll("details:not([open])")) closed.open = true;
});

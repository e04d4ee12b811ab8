"use strict";
// Search, families, sorting, and what a mark stands for. Without this script the page is complete, only still.
(() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const search = document.getElementById("search");
  const tip = document.getElementById("tip");
  const families = new Map(all("tr[data-format], blockquote[data-format]").map((e) => [e.dataset.format, e.dataset.family]));
  const shownFamilies = new Set(all(".chip").map((chip) => chip.dataset.toggle));
  const used = new Set(families.values());
  all(".chip").forEach((chip) => { chip.hidden = !used.has(chip.dataset.toggle); });

  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = (label) =>
      words.every((word) => label.toLowerCase().includes(word)) && shownFamilies.has(families.get(label) ?? "");
    all("tr[data-format], blockquote[data-format]").forEach((e) => { e.hidden = !fits(e.dataset.format); });
    all(".mark").forEach((mark) => {
      const label = mark.dataset.format;
      mark.classList.toggle("dim", label !== "" && !fits(label));
    });
    const shown = [...families.keys()].filter(fits).length;
    document.getElementById("found").textContent =
      shown === families.size ? "" : `${shown} of ${families.size} formats`;
  }
  search.addEventListener("input", filter);
  all(".chip").forEach((chip) => chip.addEventListener("click", () => {
    const on = chip.getAttribute("aria-pressed") !== "true";
    chip.setAttribute("aria-pressed", String(on));
    if (on) shownFamilies.add(chip.dataset.toggle); else shownFamilies.delete(chip.dataset.toggle);
    filter();
  }));

  // A cell sorts by its number if it has one, else by its text; a missing number comes last either way.
  const isMissing = (cell) => cell.classList.contains("number") && cell.dataset.value === undefined;
  function compare(a, b) {
    if (a.dataset.value !== undefined && b.dataset.value !== undefined) return a.dataset.value - b.dataset.value;
    return a.textContent.trim().localeCompare(b.textContent.trim(), "en", { numeric: true });
  }
  all("thead button").forEach((button) => button.addEventListener("click", () => {
    const heading = button.closest("th");
    const table = heading.closest("table");
    const column = [...heading.parentNode.children].indexOf(heading);
    const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    table.querySelectorAll("th[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const rows = [...table.tBodies[0].rows];
    rows.sort((x, y) => {
      const [a, b] = [x.cells[column], y.cells[column]];
      return isMissing(a) - isMissing(b) || sign * compare(a, b);
    });
    table.tBodies[0].append(...rows);
  }));

  function show(mark, x, y) {
    const name = document.createElement("b");
    name.textContent = mark.dataset.format;
    tip.replaceChildren(...(mark.dataset.format ? [name] : []), mark.dataset.tip);
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(x + 12, innerWidth - width - 4))}px`;
    tip.style.top = `${y - height - 10 < 4 ? y + 16 : y - height - 10}px`;
  }
  const hide = () => { tip.hidden = true; };
  function pick(label) {
    const was = label && document.querySelector(".picked")?.dataset.format === label;
    all(".picked").forEach((e) => e.classList.remove("picked"));
    if (label && !was) all("[data-format]").filter((e) => e.dataset.format === label).forEach((e) => e.classList.add("picked"));
  }
  all(".mark").forEach((mark) => {
    mark.addEventListener("pointermove", (event) => show(mark, event.clientX, event.clientY));
    mark.addEventListener("pointerleave", hide);
    mark.addEventListener("focus", () => {
      const box = mark.getBoundingClientRect();
      show(mark, box.x + box.width / 2, box.y);
    });
    mark.addEventListener("blur", hide);
    mark.addEventListener("click", () => pick(mark.dataset.format));
  });
  addEventListener("scroll", hide, { passive: true });
  addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    hide();
    pick("");
    search.value = "";
    filter();
  });

  document.getElementById("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
})();

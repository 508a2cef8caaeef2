// What a page does beside lying there: a sentence for the mark under pointer or focus, arrows from mark to mark, a
// filter by build, light and dark. Without it everything is still there: each chart has its data as a table.
(() => {
  "use strict";
  const tip = document.getElementById("tip");
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  const hide = () => { tip.hidden = true; };
  const show = (mark) => {
    tip.textContent = mark.getAttribute("aria-label");
    tip.hidden = false;
    const place = mark.getBoundingClientRect();
    const own = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, place.left + place.width / 2 - own.width / 2), innerWidth - own.width - 8);
    const above = place.top - own.height - 8;
    tip.style.left = `${left}px`;
    tip.style.top = `${above < 8 ? place.bottom + 8 : above}px`;
  };

  const markOf = (event) => event.target.closest?.(".chart .mark");
  document.addEventListener("pointerover", (event) => { const mark = markOf(event); if (mark) show(mark); });
  document.addEventListener("pointerout", (event) => { if (markOf(event)) hide(); });
  document.addEventListener("focusin", (event) => { const mark = markOf(event); if (mark) show(mark); });
  document.addEventListener("focusout", hide);
  document.addEventListener("scroll", () => {
    const mark = document.activeElement?.closest(".chart .mark");
    if (mark && !tip.hidden) show(mark); else hide();
  }, { passive: true });

  // One mark of each chart is where Tab arrives; arrows move on from there.
  const arrive = (chart, mark) => {
    for (const other of all(".mark", chart)) other.setAttribute("tabindex", other === mark ? "0" : "-1");
  };
  const STEPS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  document.addEventListener("keydown", (event) => {
    const mark = markOf(event);
    if (event.key === "Escape") hide();
    if (!mark) return;
    const chart = mark.closest(".chart");
    const marks = all(".mark:not(.off)", chart);
    const last = marks.length - 1;
    const here = marks.indexOf(mark);
    const next = event.key === "Home" ? 0 : event.key === "End" ? last : here + (STEPS[event.key] ?? 0);
    if (next !== here) {
      const other = marks[(next + marks.length) % marks.length];
      arrive(chart, other);
      other.focus();
    } else if (event.key === "Enter" || event.key === " ") {
      if (tip.hidden) show(mark); else hide();
    } else {
      return;
    }
    event.preventDefault();
  });

  for (const box of all("[data-filter]")) {
    box.addEventListener("change", () => {
      for (const part of all(`[data-series="${box.dataset.filter}"]`)) part.classList.toggle("off", !box.checked);
      for (const chart of all("svg.chart")) {
        const marks = all(".mark:not(.off)", chart);
        if (marks.length && !marks.some((mark) => mark.getAttribute("tabindex") === "0")) arrive(chart, marks[0]);
      }
    });
  }

  const dark = () => {
    const asked = document.documentElement.dataset.theme;
    return asked ? asked === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  };
  const button = document.getElementById("theme");
  const name = () => { button.textContent = dark() ? "Light" : "Dark"; };
  button.hidden = false;
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    name();
  });
  name();

  addEventListener("beforeprint", () => { for (const part of all("details")) part.open = true; });
})();

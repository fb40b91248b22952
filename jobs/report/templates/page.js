// The maps: a point's title at the pointer or by arrow keys, the same item in all maps, search and filter.
(() => {
  const source = document.getElementById("titles");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const told = document.getElementById("told"), find = document.getElementById("find"), only = document.getElementById("only");
  const maps = [...document.querySelectorAll("[data-map]")].map((box, place) => {
    const items = data.maps[place], circles = [...box.querySelectorAll("circle")];
    return { box, items, circles, at: new Map(items.map((item, index) => [item, circles[index]])), now: 0,
      xy: circles.map(circle => [+circle.getAttribute("cx"), +circle.getAttribute("cy")]) };
  });
  const say = item => {
    const category = data.categories[data.groups[item]];
    told.textContent = data.titles[item] + (category ? " (" + category + ")" : "");
  };
  // what the line above the maps says, beside the pointer too; screen readers have that line
  const tip = document.createElement("div");
  tip.className = "tip"; tip.hidden = true; tip.setAttribute("aria-hidden", "true");
  document.body.append(tip);
  const point = event => {
    tip.textContent = told.textContent; tip.hidden = false;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 4;
    tip.style.left = Math.max(4, Math.min(event.pageX + 14, room)) + "px"; tip.style.top = event.pageY + 18 + "px";
  };
  const mark = items => {
    for (const map of maps) {
      for (const circle of map.box.querySelectorAll(".on")) circle.classList.remove("on");
      for (const item of items) { const circle = map.at.get(item); if (circle) { circle.classList.add("on"); circle.parentNode.append(circle); } }
    }
  };
  const show = item => { mark([item]); say(item); };
  for (const map of maps) {
    const svg = map.box.querySelector("svg");
    map.box.addEventListener("pointermove", event => {
      const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * 600, y = (event.clientY - box.top) / box.height * 600;
      let best = -1, distance = 400;
      map.xy.forEach(([cx, cy], index) => {
        const away = (cx - x) ** 2 + (cy - y) ** 2;
        if (away < distance && !map.circles[index].classList.contains("dim")) { best = index; distance = away; }
      });
      if (best >= 0) { map.now = best; show(map.items[best]); point(event); } else tip.hidden = true;
    });
    map.box.addEventListener("pointerleave", () => { tip.hidden = true; });
    const order = map.xy.map((_, index) => index).sort((a, b) => map.xy[a][0] - map.xy[b][0] || map.xy[a][1] - map.xy[b][1]);
    map.box.addEventListener("keydown", event => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, PageDown: 25, PageUp: -25 }[event.key];
      if (!step) return;
      event.preventDefault();
      const visible = order.filter(index => !map.circles[index].classList.contains("dim"));
      if (!visible.length) return;
      map.now = visible[Math.min(Math.max(visible.indexOf(map.now) + step, 0), visible.length - 1)];
      show(map.items[map.now]);
    });
  }
  find.addEventListener("input", () => {
    const text = find.value.trim().toLowerCase();
    const found = text ? data.titles.flatMap((title, item) => title.toLowerCase().includes(text) ? [item] : []) : [];
    mark(found);
    if (found.length === 1) say(found[0]);
    else told.textContent = text ? found.length + " items" + (found.length ? ": " + found.slice(0, 5).map(item => data.titles[item]).join("; ") : "") : "";
  });
  only.addEventListener("change", () => {
    for (const map of maps) map.circles.forEach((circle, index) =>
      circle.classList.toggle("dim", only.value !== "" && data.groups[map.items[index]] !== +only.value));
    told.textContent = only.value === "" ? "All items." : "Only " + only.selectedOptions[0].text + ".";
  });
})();

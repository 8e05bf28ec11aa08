"use strict";
(() => {
  const spoken = JSON.parse(document.getElementById("spoken").textContent);
  const maps = document.getElementById("maps"), card = document.getElementById("card");
  const texts = [...maps.querySelectorAll(".passage")].map(text => [...text.querySelectorAll(".token")]);
  const names = Object.keys(spoken.names);
  let shown = null;

  function element(tag, text, ...children) {
    const made = document.createElement(tag);
    if (text) made.textContent = text;
    made.append(...children);
    return made;
  }

  const visible = token => token.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ +| +$/g,
    spaces => "␣".repeat(spaces.length));

  function heading(name) {
    const mark = document.querySelector(`.mark.look-${names.indexOf(name) % 8}`);
    return element("h4", "", ...(mark ? [mark.cloneNode(true)] : []), spoken.names[name] ?? name);
  }

  function voice(name, said, token, index) {
    const rows = said.best[index].map(([text, probability]) => {
      const row = element("tr", "", element("td", visible(text) || "∅"),
        element("td", probability.toFixed(3)));
      row.style.setProperty("--share", probability);
      if (text === token) row.className = "said";
      return row;
    });
    const ahead = element("p", "goes on: ", element("q", said.ahead[index] === null ? "(the window ends)" : visible(said.ahead[index]) || "(it ends)"));
    return element("div", "", heading(name), element("table", "", element("tbody", "", ...rows)), ahead);
  }

  function show(target) {
    const passage = texts.findIndex(tokens => tokens.includes(target));
    const index = texts[passage].indexOf(target), text = spoken.passages[passage];
    const token = text.tokens[index], entropy = text.layers.ambiguity[index];
    hide();
    shown = target;
    target.classList.add("shown");
    target.setAttribute("aria-describedby", "card");
    const values = Object.entries(text.layers)
      .map(([layer, all]) => `${spoken.layers[layer].title.toLowerCase()} ${all[index].toFixed(3)}`);
    const title = element("h3", "", element("code", visible(token)),
      `  ${entropy < spoken.threshold ? "bridge" : "garden"}, ${values.join(", ")}`);
    const voices = element("div", "", ...Object.entries(text.voices)
      .map(([name, said]) => voice(name, said, token, index)));
    voices.className = "voices";
    voices.style.setProperty("--columns", Math.min(5, voices.children.length || 1));
    card.replaceChildren(title, voices);
    card.hidden = false;
    card.dataset.token = `${passage}.${index}`;
    place(target);
  }

  function place(target) {
    const at = target.getBoundingClientRect(), around = target.parentNode.getBoundingClientRect();
    const width = document.documentElement.clientWidth, height = window.innerHeight;
    const high = card.offsetHeight, spots = [
      around.bottom + 8, around.top - high - 8, at.bottom + 8, at.top - high - 8,
    ];
    const top = spots.find(y => y >= 0 && y + high <= height) ?? at.bottom + 8;
    const left = Math.max(16, Math.min(at.left, width - card.offsetWidth - 16));
    card.style.left = `${left + window.scrollX}px`;
    card.style.top = `${top + window.scrollY}px`;
  }

  function hide() {
    card.hidden = true;
    delete card.dataset.token;
    shown?.classList.remove("shown");
    shown?.removeAttribute("aria-describedby");
    shown = null;
  }

  const around = token => texts.find(tokens => tokens.includes(token));

  function focus(token) {
    for (const other of around(token)) other.tabIndex = other === token ? 0 : -1;
    token.focus();
  }

  function onNextLine(tokens, index, step) {
    const from = tokens[index].getBoundingClientRect();
    let found = index, best = Infinity, line = null;
    for (let i = index + step; i >= 0 && i < tokens.length; i += step) {
      const at = tokens[i].getBoundingClientRect();
      if (Math.abs(at.top - from.top) < 4) continue;
      line ??= at.top;
      if (Math.abs(at.top - line) > 4) break;
      if (Math.abs(at.left - from.left) < best) [best, found] = [Math.abs(at.left - from.left), i];
    }
    return found;
  }

  const moves = {
    ArrowRight: (tokens, i) => i + 1, ArrowLeft: (tokens, i) => i - 1,
    ArrowDown: (tokens, i) => onNextLine(tokens, i, 1), ArrowUp: (tokens, i) => onNextLine(tokens, i, -1),
    Home: () => 0, End: tokens => tokens.length - 1,
  };

  const hit = event => event.target.closest?.(".passage .token");
  maps.addEventListener("focusin", event => { if (hit(event)) show(hit(event)); });
  maps.addEventListener("focusout", hide);
  maps.addEventListener("pointerover", event => { if (hit(event)) show(hit(event)); });
  maps.addEventListener("pointerleave", hide);
  maps.addEventListener("click", event => { if (hit(event)) focus(hit(event)); });
  document.addEventListener("keydown", event => {
    if (event.key === "Escape") return hide();
    const token = hit(event), move = moves[event.key];
    if (!token || !move) return;
    event.preventDefault();
    const tokens = around(token);
    focus(tokens[Math.max(0, Math.min(tokens.length - 1, move(tokens, tokens.indexOf(token))))]);
  });

  function colour(layer) {
    maps.dataset.layer = layer;
    for (const key of maps.querySelectorAll(".key")) key.hidden = key.dataset.for !== layer;
    const amount = spoken.layers[layer].scale === "amount";
    texts.forEach((tokens, passage) => tokens.forEach((token, i) => {
      const share = spoken.passages[passage].shades[layer][i];
      token.classList.toggle("low", share < 0);
      token.classList.toggle("high", share >= 0);
      token.classList.toggle("amount", amount);
      token.style.setProperty("--share", Math.abs(share));
    }));
  }

  function frame(student) {
    texts.forEach((tokens, passage) => tokens.forEach((token, i) => {
      const { teacher, [student]: mine } = spoken.passages[passage].voices;
      token.classList.toggle("apart", !!(teacher && mine) && teacher.best[i][0][0] !== mine.best[i][0][0]);
    }));
  }

  const controls = maps.querySelector(".controls");
  controls.addEventListener("change", event =>
    event.target.name === "layer" ? colour(event.target.value) : frame(event.target.value));
  if (controls.elements.student) frame(controls.elements.student.value);
  const [, passage, index] = location.hash.match(/^#(\d+)\.(\d+)$/) ?? [];
  if (texts[passage]?.[index]) focus(texts[passage][index]);
  document.documentElement.dataset.ready = "";
})();

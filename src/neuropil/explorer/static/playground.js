"use strict";
// Clamp neurons and race the two generations; events come as a stream of "data: {json}" lines.

(() => {
  const $ = (id) => document.getElementById(id);
  const list = $("clamps");
  let running = null;

  function add(neuron, value, label) {
    if ([...list.children].some((li) => li.dataset.neuron === neuron)) {
      list.querySelector(`[data-neuron="${neuron}"] input[type=number]`)?.focus();
      return;
    }
    list.append(fill(document.createElement("li"), neuron, value, label));
    changed();
  }
  function fill(li, neuron, value, label) {
    li.dataset.neuron = neuron;
    const who = document.createElement("a");
    who.className = "who"; who.href = "/neuron/" + neuron;
    const code = document.createElement("span");
    code.className = "address"; code.textContent = neuron;
    who.append(code, label ? ` “${label}”` : "");
    const box = document.createElement("input");
    box.type = "number"; box.step = "any"; box.min = -10000; box.max = 10000; box.value = Number(value); box.required = true;
    box.setAttribute("aria-label", `Value for neuron ${neuron}`);
    const slide = document.createElement("input"), reach = Math.max(50, 2 * Math.abs(Number(value)));
    slide.type = "range"; slide.min = -reach; slide.max = reach; slide.step = reach / 100; slide.value = value;
    slide.setAttribute("aria-label", `Slide the value for neuron ${neuron}`);
    const drop = document.createElement("button");
    drop.type = "button"; drop.className = "quiet"; drop.textContent = "×";
    drop.setAttribute("aria-label", `Remove neuron ${neuron}`);
    box.addEventListener("input", () => { slide.value = box.value; changed(); });
    slide.addEventListener("input", () => { box.value = slide.value; changed(); });
    drop.addEventListener("click", () => { li.remove(); changed(); $("offerq").focus(); });
    li.replaceChildren(who, box, drop, slide);
    return li;
  }
  const clamps = () => Object.fromEntries([...list.children].map((li) => [li.dataset.neuron, Number(li.querySelector("input[type=number]").value)]));
  function changed() {
    $("noclamps").hidden = list.children.length > 0;
    const pairs = Object.entries(clamps()).map(([n, v]) => `${n}=${v}`).join(",");
    const query = new URLSearchParams([["clamp", pairs], ["prompt", $("prompt").value], ["where", $("where").value === "up" ? "up" : ""]].filter(([, v]) => v));
    history.replaceState(null, "", "/playground?" + query);
  }

  for (const li of [...list.children]) fill(li, li.dataset.neuron, li.dataset.value, li.dataset.label);
  $("noclamps").hidden = list.children.length > 0;
  $("offer").addEventListener("click", (event) => {
    const b = event.target.closest("[data-add]");
    if (b) add(b.dataset.add, b.dataset.value, b.dataset.label);
  });
  $("offerq").addEventListener("keydown", (event) => { if (event.key === "Enter") event.preventDefault(); });
  for (const id of ["prompt", "where"]) $(id).addEventListener("change", changed);

  const lanes = { plain: [], clamped: [] };
  let apart = -1;
  function start(prompt, chat) {
    apart = -1;
    for (const side of ["plain", "clamped"]) {
      lanes[side] = [];
      const before = document.createElement("span");
      before.className = "said-before";
      before.textContent = prompt + (chat ? "\n\n" : "");
      $(side).replaceChildren(before);
      $(side + "note").textContent = "";
    }
    $("trouble").replaceChildren();
  }
  function token(event) {
    const place = lanes[event.side].length;
    lanes[event.side].push(event.id);
    if (event.side === "clamped" && apart < 0 && lanes.plain[place] !== event.id) apart = place;
    const piece = document.createElement("span");
    piece.textContent = event.text;
    piece.title = `probability ${event.p}`;
    if (event.side === "clamped" && apart >= 0) piece.className = place === apart ? "new first" : "new";
    $(event.side).append(piece);
    $(event.side + "note").textContent = `${lanes[event.side].length} tokens${event.end ? ", ended" : ""}`;
  }
  function trouble(message) {
    const copy = $("bring").content.cloneNode(true);
    copy.querySelector(".problem").textContent = message;
    if (!/model|tokenizer|fingerprint|install|load/i.test(message)) copy.querySelector(".note")?.remove();
    $("trouble").replaceChildren(copy);
  }
  function end(message) {
    running = null;
    $("race").classList.remove("running");
    $("run").disabled = false; $("stop").disabled = true;
    $("state").textContent = message;
    htmx.trigger(document.body, "model");
  }
  async function run() {
    running = new AbortController();
    const stop = running, ask = {
      prompt: $("prompt").value, clamps: clamps(), where: $("where").value, chat: $("chat").checked,
      tokens: Number($("tokens").value), temperature: Number($("temperature").value), seed: Number($("seed").value),
    };
    start(ask.prompt, ask.chat);
    $("race").classList.add("running");
    $("run").disabled = true; $("stop").disabled = false;
    $("state").textContent = "asking the model …";
    let message = "the stream ended early";
    try {
      const answer = await fetch("/playground/run", { method: "POST", signal: stop.signal,
        headers: { "Content-Type": "application/json" }, body: JSON.stringify(ask) });
      if (!answer.ok) {
        const told = await answer.json().catch(() => ({}));
        throw new Error([told.detail].flat().map((d) => d?.msg ? `${d.loc?.at(-1)}: ${d.msg}` : d).join("; ") || answer.statusText);
      }
      htmx.trigger(document.body, "model");
      const lines = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        const { value, done } = await lines.read();
        if (done) break;
        rest += value;
        const parts = rest.split("\n\n");
        rest = parts.pop();
        for (const part of parts) {
          const event = JSON.parse(part.slice(6));
          if (event.event === "token") token(event);
          else if (event.event === "status") $("state").textContent = event.message;
          else if (event.event === "done") message = `done, ${event.seconds} s in the model`;
          else if (event.event === "error") { trouble(event.message); message = ""; }
        }
      }
    } catch (error) {
      if (stop.signal.aborted) message = "stopped";
      else { trouble(error.message); message = ""; }
    }
    end(message);
  }
  $("play").addEventListener("submit", (event) => { event.preventDefault(); if (!running) run(); });
  $("stop").addEventListener("click", () => running?.abort());
})();

"use strict";
// The picture one draws on and the slider that compares: everything they show and send is kept by the server.
(() => {
  const state = { version: -1, frames: 0 };
  let frame = 0, tool = "box", drawing = null, sending = Promise.resolve(), shown = 0;

  const make = (parent, tag, attributes = {}, text = "") => {
    const made = document.createElement(tag);
    Object.entries(attributes).forEach(([name, value]) => made.setAttribute(name, value));
    made.textContent = text;
    parent.append(made);
    return made;
  };

  const parts = {};

  function build(root) {
    root.dataset.built = "1";
    const tools = make(root, "div", { class: "tools" });
    for (const [name, text] of [["box", "Box"], ["brush", "Brush"], ["erase", "Erase"]]) {
      const button = make(tools, "button", { id: `tool-${name}`, type: "button", "aria-pressed": String(name === tool) }, text);
      button.onclick = () => {
        tool = name;
        tools.querySelectorAll("button[aria-pressed]").forEach((one) => one.setAttribute("aria-pressed", String(one === button)));
      };
    }
    make(tools, "label", {}, "Brush size");
    parts.size = make(tools, "input", { type: "range", min: 2, max: 120, value: 24, "aria-label": "Brush size" });
    make(tools, "button", { type: "button", id: "nothing" }, "Nothing here").onclick = () => {
      context().clearRect(0, 0, parts.canvas.width, parts.canvas.height);
      sendMask();
    };
    make(tools, "button", { type: "button", id: "forget" }, "Take marks back").onclick = () => post(`/studio/forget/${frame}`);
    const picture = make(root, "div", { class: "picture" });
    parts.image = make(picture, "img", { alt: "" });
    parts.canvas = make(picture, "canvas", { id: "paint" });
    const time = make(root, "div", { class: "time" });
    parts.slider = make(time, "input", { type: "range", class: "frame", id: "frame", min: 0, value: 0, "aria-label": "Frame" });
    parts.when = make(time, "span", { id: "when" });
    parts.marked = make(root, "div", { class: "marked", id: "marked" });
    parts.error = make(root, "div", { class: "error", id: "error" });
    parts.slider.oninput = () => show(Number(parts.slider.value));
    parts.canvas.onpointerdown = begin;
    parts.canvas.onpointermove = move;
    parts.canvas.onpointerup = end;
    root.hidden = true;
  }

  function buildCompare(root) {
    root.dataset.built = "1";
    root.hidden = true;
    parts.compare = root;
    const picture = make(root, "div", { class: "picture" });
    parts.before = make(picture, "img", { alt: "before" });
    parts.after = make(picture, "img", { alt: "after", class: "after" });
    const time = make(root, "div", { class: "time" });
    make(time, "span", {}, "before");
    parts.divider = make(time, "input", { type: "range", id: "divider", min: 0, max: 100, value: 50, "aria-label": "Before and after" });
    make(time, "span", {}, "after, of the frame chosen above");
    parts.divider.oninput = () => { parts.after.style.clipPath = `inset(0 0 0 ${parts.divider.value}%)`; };
    parts.video = make(root, "video", { controls: "", loop: "", muted: "", playsinline: "", preload: "auto", id: "result" });
  }

  const context = () => parts.canvas.getContext("2d", { willReadFrequently: true });

  const load = (image, url) => new Promise((done) => {
    image.onload = image.onerror = done;
    image.src = url;
  }).then(() => image.decode().catch(() => null)); // it is ready to be painted

  async function show(number) {
    frame = number;
    const mine = ++shown, query = `?v=${state.version}`;
    parts.slider.value = number;
    parts.when.textContent = `frame ${number} of ${state.frames - 1}, ${(number / state.fps).toFixed(2)} s`;
    await sending;
    const mask = new Image();
    const loads = [load(parts.image, `/studio/frame/${number}${query}`), load(mask, `/studio/mask/${number}${query}`)];
    if (state.result) {
      const last = Math.min(number, state.result - 1);
      loads.push(load(parts.before, `/studio/frame/${last}${query}`), load(parts.after, `/studio/result/${last}${query}`));
    }
    await Promise.all(loads);
    if (mine !== shown) return; // another was chosen meanwhile
    paint(mask);
    parts.canvas.dataset.shown = `${number}:${state.version}`;
  }

  function paint(mask) {
    const { width, height } = parts.canvas, pen = context();
    pen.globalCompositeOperation = "source-over";
    pen.clearRect(0, 0, width, height);
    if (!mask.naturalWidth) return;
    pen.drawImage(mask, 0, 0, width, height);
    const pixels = pen.getImageData(0, 0, width, height), data = pixels.data;
    for (let at = 0; at < data.length; at += 4) {
      const marked = data[at] > 127;
      data[at] = 255; data[at + 1] = 40; data[at + 2] = 40; data[at + 3] = marked ? 130 : 0;
    }
    pen.putImageData(pixels, 0, 0);
  }

  async function post(url, body) {
    const answer = fetch(url, { method: "POST", body });
    sending = answer.catch(() => null);
    try {
      const read = await (await answer).json();
      parts.error.textContent = read.error || "";
    } catch {
      parts.error.textContent = "The studio does not answer; is it still running?";
    }
    await refresh();
  }

  function sendMask() {
    const { width, height } = parts.canvas, sent = document.createElement("canvas");
    [sent.width, sent.height] = [width, height];
    const pixels = context().getImageData(0, 0, width, height), data = pixels.data;
    for (let at = 0; at < data.length; at += 4) {
      const marked = data[at + 3] > 60 ? 255 : 0;
      data[at] = data[at + 1] = data[at + 2] = marked;
      data[at + 3] = 255;
    }
    sent.getContext("2d").putImageData(pixels, 0, 0);
    const number = frame;
    sent.toBlob((blob) => post(`/studio/mark/${number}`, blob), "image/png");
  }

  function place(event) {
    const box = parts.canvas.getBoundingClientRect();
    const share = (value, size) => Math.min(1, Math.max(0, value / size));
    return [share(event.clientX - box.left, box.width), share(event.clientY - box.top, box.height)];
  }

  function stroke(from, to) {
    const { width, height } = parts.canvas, pen = context();
    pen.globalCompositeOperation = tool === "erase" ? "destination-out" : "source-over";
    pen.strokeStyle = "rgb(255, 40, 40)";
    pen.lineWidth = Number(parts.size.value);
    pen.lineCap = "round";
    pen.beginPath();
    pen.moveTo(from[0] * width, from[1] * height);
    pen.lineTo(to[0] * width + 0.01, to[1] * height);
    pen.stroke();
  }

  function begin(event) {
    parts.canvas.setPointerCapture(event.pointerId);
    drawing = { from: place(event), last: place(event), under: context().getImageData(0, 0, parts.canvas.width, parts.canvas.height) };
    if (tool !== "box") stroke(drawing.from, drawing.from);
  }

  function move(event) {
    if (!drawing) return;
    const at = place(event), { width, height } = parts.canvas;
    if (tool === "box") {
      const pen = context();
      pen.putImageData(drawing.under, 0, 0);
      pen.globalCompositeOperation = "source-over";
      pen.strokeStyle = "white";
      pen.lineWidth = 2;
      pen.strokeRect(drawing.from[0] * width, drawing.from[1] * height, (at[0] - drawing.from[0]) * width, (at[1] - drawing.from[1]) * height);
    } else {
      stroke(drawing.last, at);
    }
    drawing.last = at;
  }

  function end(event) {
    if (!drawing) return;
    const from = drawing.from, to = place(event);
    context().globalCompositeOperation = "source-over";
    if (tool === "box") {
      context().putImageData(drawing.under, 0, 0);
      const left = Math.min(from[0], to[0]), top = Math.min(from[1], to[1]);
      const width = Math.abs(to[0] - from[0]), height = Math.abs(to[1] - from[1]);
      if (width > 0.005 && height > 0.005) post(`/studio/box/${frame}?left=${left}&top=${top}&width=${width}&height=${height}`);
    } else {
      sendMask();
    }
    drawing = null;
  }

  async function refresh() {
    const root = document.getElementById("studio-canvas"), compare = document.getElementById("studio-compare");
    if (!root || !compare) return;
    if (!root.dataset.built) build(root);
    if (!compare.dataset.built) buildCompare(compare);
    const known = state.version, name = state.name;
    Object.assign(state, { result: 0 }, await (await fetch("/studio/state")).json());
    root.hidden = !state.frames;
    compare.hidden = !state.result;
    if (!state.frames || known === state.version) return;
    if (parts.canvas.width !== state.width || parts.canvas.height !== state.height) {
      [parts.canvas.width, parts.canvas.height] = [state.width, state.height];
    }
    parts.slider.max = state.frames - 1;
    parts.marked.textContent = state.marked.length ? `Marked frames: ${state.marked.join(", ")}.` : "Nothing is marked yet.";
    const source = `/studio/download/video?v=${state.version}`;
    if (state.result && parts.video.dataset.of !== String(state.version)) {
      parts.video.dataset.of = state.version;
      parts.video.src = source;
    }
    await show(name === state.name ? Math.min(frame, state.frames - 1) : 0);
  }

  window.studio = { refresh };
  new MutationObserver(() => {
    const root = document.getElementById("studio-canvas");
    if (root && !root.dataset.built) refresh();
  }).observe(document.documentElement, { childList: true, subtree: true });
})();

// Pictures enlarge on click, and the widgets of the section Explore draw from the sprites in the page's data.
const dialog = document.getElementById("enlarged");
for (const button of document.querySelectorAll(".enlarge")) {
  button.addEventListener("click", () => {
    const picture = button.querySelector("img");
    dialog.querySelector("div").replaceChildren(picture.cloneNode());
    dialog.querySelector("p").textContent = button.closest("figure").querySelector("figcaption").textContent;
    dialog.showModal();
  });
}
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });

// Tables that are wider than their box say so.
for (const box of document.querySelectorAll(".scroll")) {
  const hint = () => box.classList.toggle("more", box.scrollWidth > box.clientWidth + 1 && box.scrollLeft + box.clientWidth < box.scrollWidth - 1);
  box.addEventListener("scroll", hint, { passive: true });
  new ResizeObserver(hint).observe(box);
}

const data = document.getElementById("exploration");
const explored = data ? JSON.parse(data.textContent) : {};
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#A6761D", "#E7298A", "#66A61E"];

// A sprite whose tiles can be drawn once it is loaded.
function load(tiles) {
  const image = new Image();
  image.src = tiles.data;
  return { ...tiles, image, ready: image.decode() };
}

// Draws tiles side by side, `across` in a row, into a canvas.
function draw(canvas, sprite, numbers, across, zoom) {
  const scale = zoom ?? 1;
  const rows = Math.ceil(numbers.length / across);
  canvas.width = across * (sprite.width + 1) * scale;
  canvas.height = rows * (sprite.height + 1) * scale;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  numbers.forEach((number, i) => {
    const from = [(number % sprite.columns) * sprite.width, Math.floor(number / sprite.columns) * sprite.height];
    const to = [(i % across) * (sprite.width + 1) * scale, Math.floor(i / across) * (sprite.height + 1) * scale];
    context.drawImage(sprite.image, ...from, sprite.width, sprite.height, ...to, sprite.width * scale, sprite.height * scale);
  });
}

// Adds a canvas with a caption, and returns the canvas.
function view(parent, caption) {
  const figure = document.createElement("figure");
  const text = document.createElement("figcaption");
  const canvas = document.createElement("canvas");
  text.textContent = caption;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", caption);
  figure.append(text, canvas);
  parent.append(figure);
  return canvas;
}

const zoomTo = (sprite, pixels) => Math.max(1, Math.round(pixels / Math.max(sprite.width, sprite.height)));

function ranges(widget, maxima, values) {
  const inputs = [...widget.querySelectorAll("input")];
  inputs.forEach((input, i) => { input.max = maxima[i]; input.value = values[i]; });
  return inputs;
}

function listen(inputs, update) {
  for (const input of inputs) input.addEventListener("input", update);
  update();
}

const say = (input, text) => {
  input.nextElementSibling.textContent = text;
  input.setAttribute("aria-valuetext", text);
};

const widgets = {
  async truncated(widget, shown) {
    const rows = Object.entries(shown.rows).map(([name, row]) => ({ name, row, sprite: load(row.truncated) }));
    const originals = load(shown.originals);
    await Promise.all([originals.ready, ...rows.map((r) => r.sprite.ready)]);
    const { ks, truncated_images: images } = rows[0].row;
    const views = widget.querySelector(".views");
    const across = Math.min(images, 12);
    const zoom = zoomTo(originals, 36);
    const numbers = (start) => [...Array(across).keys()].map((i) => start + i);
    draw(view(views, "test images"), originals, numbers(0), across, zoom);
    for (const r of rows) r.canvas = view(views, r.name);
    const inputs = ranges(widget, [ks.length - 1], [Math.min(2, ks.length - 1)]);
    listen(inputs, () => {
      const place = Number(inputs[0].value);
      say(inputs[0], `${ks[place]} of ${ks[ks.length - 1]}`);
      for (const r of rows) {
        const own = Math.min(place, r.row.ks.length - 1);
        draw(r.canvas, r.sprite, numbers(own * images), across, zoom);
      }
    });
  },

  async changed(widget, shown) {
    const rows = Object.entries(shown.rows).map(([name, row]) => ({ name, row, sprite: load(row.changed) }));
    await Promise.all(rows.map((r) => r.sprite.ready));
    const { values, steps } = rows[0].row;
    const views = widget.querySelector(".views");
    views.classList.add("side");
    for (const r of rows) r.canvas = view(views, r.name);
    const inputs = ranges(widget, [shown.shown.changed - 1, values.length - 1, steps - 1], [0, 0, Math.floor(steps / 2)]);
    listen(inputs, () => {
      const [image, number, step] = inputs.map((input) => Number(input.value));
      say(inputs[0], `test image ${image + 1}`);
      say(inputs[1], `${number + 1}`);
      const width = 2.5;
      say(inputs[2], `${(-width + (2 * width * step) / (steps - 1)).toFixed(1)} std`);
      for (const r of rows) {
        const dimensions = r.row.values.length;
        draw(r.canvas, r.sprite, [(image * dimensions + Math.min(number, dimensions - 1)) * steps + step], 1, zoomTo(r.sprite, 140));
      }
    });
  },

  async between(widget, shown) {
    const rows = Object.entries(shown.rows).map(([name, row]) => ({ name, row, sprite: load(row.between) }));
    const originals = load(shown.originals);
    await Promise.all([originals.ready, ...rows.map((r) => r.sprite.ready)]);
    const { ends, steps } = rows[0].row;
    const views = widget.querySelector(".views");
    views.classList.add("side");
    const real = view(views, "from and to");
    for (const r of rows) r.canvas = view(views, r.name);
    const inputs = ranges(widget, [ends - 1, ends - 1, steps - 1], [0, Math.min(1, ends - 1), Math.floor(steps / 2)]);
    listen(inputs, () => {
      const [from, to, step] = inputs.map((input) => Number(input.value));
      say(inputs[0], `test image ${from + 1}`);
      say(inputs[1], `test image ${to + 1}`);
      say(inputs[2], `${Math.round((100 * step) / (steps - 1))} %`);
      draw(real, originals, [from, to], 2, zoomTo(originals, 100));
      // Pairs i < j in order; the other way round runs backwards. One image alone is the end of any pair that has it.
      let [i, j, place] = from < to ? [from, to, step] : [to, from, steps - 1 - step];
      if (from === to) [i, j, place] = from + 1 < ends ? [from, from + 1, 0] : [from - 1, from, steps - 1];
      const pair = (i * (2 * ends - i - 1)) / 2 + (j - i - 1);
      for (const r of rows) draw(r.canvas, r.sprite, [pair * steps + place], 1, zoomTo(r.sprite, 140));
    });
  },

  async map(widget, shown) {
    const thumbnails = load(shown.map);
    await thumbnails.ready;
    const [choice, axes] = widget.querySelectorAll("select");
    for (const name of Object.keys(shown.rows)) choice.add(new Option(name, name));
    const canvas = widget.querySelector(".map");
    const pointed = widget.querySelector(".pointed canvas");
    const said = widget.querySelector(".pointed output");
    let points = [];
    let current = -1;
    const colour = (i) => (shown.labels ? COLOURS[shown.labels[i] % COLOURS.length] : COLOURS[0]);
    function place() {
      const raw = shown.rows[choice.value][axes.value];
      const ratio = window.devicePixelRatio || 1;
      canvas.width = canvas.clientWidth * ratio;
      canvas.height = Math.min(canvas.clientWidth, 420) * ratio;
      const [low, high] = [0, 1].map((axis) => raw.map((p) => p[axis])).reduce(
        ([a, b], values) => [[...a, Math.min(...values)], [...b, Math.max(...values)]], [[], []]);
      const margin = 10 * ratio;
      const to = (v, axis, length) => margin + ((v - low[axis]) / (high[axis] - low[axis] || 1)) * (length - 2 * margin);
      points = raw.map((p) => [to(p[0], 0, canvas.width), canvas.height - to(p[1], 1, canvas.height)]);
      paint();
    }
    function paint() {
      const context = canvas.getContext("2d");
      const ratio = window.devicePixelRatio || 1;
      context.clearRect(0, 0, canvas.width, canvas.height);
      points.forEach(([x, y], i) => {
        context.fillStyle = colour(i);
        context.globalAlpha = i === current ? 1 : 0.75;
        context.beginPath();
        context.arc(x, y, (i === current ? 7 : 3.2) * ratio, 0, 2 * Math.PI);
        context.fill();
      });
      context.globalAlpha = 1;
    }
    function choose(i) {
      current = i;
      draw(pointed, thumbnails, [i], 1, zoomTo(thumbnails, 84));
      said.textContent = `test image ${i + 1}` + (shown.labels ? `, label ${shown.labels[i]}` : "");
      canvas.setAttribute("aria-label", `Map of codes: ${said.textContent}`);
      paint();
    }
    const nearest = (x, y) => points.reduce((best, p, i) => {
      const d = (p[0] - x) ** 2 + (p[1] - y) ** 2;
      return d < best[0] ? [d, i] : best;
    }, [Infinity, 0])[1];
    const at = (event) => {
      const box = canvas.getBoundingClientRect();
      choose(nearest(((event.clientX - box.left) * canvas.width) / box.width, ((event.clientY - box.top) * canvas.height) / box.height));
    };
    canvas.addEventListener("pointermove", at);
    canvas.addEventListener("pointerdown", at);
    // An arrow key goes to the nearest point in its direction.
    const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    canvas.addEventListener("keydown", (event) => {
      const step = STEPS[event.key];
      if (!step) return;
      event.preventDefault();
      const [x, y] = points[Math.max(current, 0)];
      const ahead = points.map((p, i) => [i, p[0] - x, p[1] - y])
        .map(([i, dx, dy]) => [i, dx * step[0] + dy * step[1], Math.abs(dx * step[1]) + Math.abs(dy * step[0])])
        .filter(([i, along, aside]) => i !== current && along > 0 && aside <= along);
      if (ahead.length) choose(ahead.reduce((a, b) => (b[1] + b[2] < a[1] + a[2] ? b : a))[0]);
    });
    for (const select of [choice, axes]) select.addEventListener("change", place);
    window.addEventListener("resize", place);
    place();
    choose(0);
  },

  async samples(widget, shown) {
    const [choice, axes] = widget.querySelectorAll("select");
    const sprites = {};
    for (const name of Object.keys(shown.samples)) {
      choice.add(new Option(name, name));
      sprites[name] = load(shown.samples[name]);
    }
    await Promise.all(Object.values(sprites).map((sprite) => sprite.ready));
    const canvas = view(widget.querySelector(".views"), "");
    const update = () => {
      const sprite = sprites[choice.value];
      const drawn = axes.value === "drawn";
      const order = drawn ? [...sprite.order.keys()] : sprite.order;
      draw(canvas, sprite, order, 10, zoomTo(sprite, 44));
      const ends = [sprite.order[0], sprite.order[sprite.order.length - 1]].map((i) => sprite.log_prob[i]);
      const text = `${choice.value}, ${axes.selectedOptions[0].textContent}; log-density of the codes from ${ends[1]} to ${ends[0]} nats`;
      canvas.previousElementSibling.textContent = text;
      canvas.setAttribute("aria-label", text);
    };
    listen([choice, axes], update);
  },
};

for (const explorer of document.querySelectorAll(".explorer")) {
  for (const widget of explorer.querySelectorAll(".widget")) {
    // Drawn when it comes near the screen, so that the page opens at once.
    new IntersectionObserver((entries, observer) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      observer.disconnect();
      widgets[widget.dataset.widget](widget, explored[explorer.dataset.dataset]);
    }, { rootMargin: "400px" }).observe(widget);
  }
}
